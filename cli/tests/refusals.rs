//! Refused input: configurations, names, sizes, stores and keyrings. Each refusal has its exit
//! status and sentence, and changes nothing.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    io::{ErrorKind, Write},
    thread,
};

use common::{ROLE, Running, World, byok, made_lines, service};
use serde_json::{Value, json};

/// The longest accepted line.
const LINE_BYTES_MAX: usize = 10 << 20;
/// The offset of the format version in the file STORE: after the magic of eight bytes.
const VERSION_AT: usize = 8;

/// Checks that an update is refused with this kind and changes nothing.
fn update_is_refused(
    world: &World,
    name: &str,
    kind: &str,
    change: impl FnOnce(&mut Value),
) -> String {
    let before = world.json(&["get", name]);
    let mut config = before.clone();
    change(&mut config);
    let command = ["update", name, "--config", &config.to_string()];
    let sentence = world.refused(6, &command);
    let (said, message) = world.run(&[&command[..], &["--json"]].concat()).json_error(6);
    assert_eq!((said.as_str(), &message), (kind, &sentence));
    assert_eq!(world.json(&["get", name]), before, "{kind} has changed something");
    sentence
}

#[test]
fn an_update_cannot_change_what_is_fixed() {
    let world = World::new();
    let (key, another) = (world.create_key(), world.create_key());
    let text = made_lines(10);
    let file = world.file("lines", &text);
    for (name, conf) in [("p/service", service("default")), ("p/byok", byok("sm4", &key))] {
        world.create(name, &conf);
        world.ok(&["append", name, &file]);
    }
    let refuse =
        |name, kind, change: &dyn Fn(&mut Value)| update_is_refused(&world, name, kind, change);
    let cmk = byok("sm4", &key)["user_cmk_info"].clone();

    // The method, in both directions.
    assert!(
        refuse("p/service", "method_fixed", &|it| it["encrypt_conf"]["user_cmk_info"] =
            cmk.clone())
        .contains("fixed")
    );
    refuse("p/byok", "method_fixed", &|it| {
        it["encrypt_conf"].as_object_mut().unwrap().remove("user_cmk_info");
    });
    // The algorithm.
    assert!(
        refuse("p/service", "algorithm_fixed", &|it| it["encrypt_conf"]["encrypt_type"] =
            "sm4".into())
        .contains("default")
    );
    refuse("p/byok", "algorithm_fixed", &|it| {
        it["encrypt_conf"]["encrypt_type"] = "default".into()
    });
    // Each of the three parts of the customer's key.
    let replaced = refuse("p/byok", "cmk_fixed", &|it| {
        it["encrypt_conf"]["user_cmk_info"]["cmk_key_id"] = another.as_str().into()
    });
    assert!(replaced.contains(&key), "{replaced}");
    refuse("p/byok", "cmk_fixed", &|it| {
        it["encrypt_conf"]["user_cmk_info"]["arn"] = "acs:ram::1:role/other".into()
    });
    refuse("p/byok", "cmk_fixed", &|it| {
        it["encrypt_conf"]["user_cmk_info"]["region_id"] = "cn-beijing".into()
    });
    // Leaving encrypt_conf out.
    for name in ["p/service", "p/byok"] {
        let sentence = refuse(name, "encrypt_conf_required", &|it| {
            it.as_object_mut().unwrap().remove("encrypt_conf");
        });
        assert!(sentence.contains("encrypt_conf"), "{sentence}");
        refuse(name, "encrypt_conf_required", &|it| it["encrypt_conf"] = Value::Null);
    }
    refuse("p/service", "encrypt_type_required", &|it| {
        it["encrypt_conf"].as_object_mut().unwrap().remove("encrypt_type");
    });
    assert!(
        refuse("p/service", "configuration_invalid", &|it| it["encrypt_conf"]["encrypt_type"] =
            "des".into())
        .contains("\"des\"")
    );
    // The error names unknown fields and values.
    assert!(
        refuse("p/service", "configuration_invalid", &|it| it["ttl"] = 7.into()).contains("`ttl`")
    );
    assert!(
        refuse(
            "p/byok",
            "configuration_invalid",
            &|it| it["encrypt_conf"]["user_cmk_info"]["role"] = 7.into()
        )
        .contains("`role`")
    );
    assert!(
        refuse("p/service", "out_of_range", &|it| it["ttl_days"] = 4000.into())
            .contains("ttl_days")
    );
    assert!(
        refuse("p/service", "field_fixed", &|it| it["shard_count"] = 2.into()).contains("shard")
    );

    for name in ["p/service", "p/byok"] {
        assert_eq!(world.read(name), text);
    }
}

#[test]
fn an_update_replaces_what_was_got_and_changed() {
    let world = World::new();
    world.create("p/a", &Value::Null);
    let got = world.json(&["get", "p/a"]);
    assert_eq!((&got["name"], &got["revision"]), (&"p/a".into(), &1.into()));

    // As text, as a file, and through standard input.
    let mut config = got.clone();
    config["ttl_days"] = 7.into();
    let updated = world.json(&["update", "p/a", "--config", &config.to_string()]);
    assert_eq!((&updated["ttl_days"], &updated["revision"]), (&7.into(), &2.into()));
    assert_eq!(world.json(&["get", "p/a"]), updated, "`update` prints what `get` prints");
    let mut config = updated.clone();
    config["encrypt_conf"] = service("sm4");
    world.ok(&[
        "update",
        "p/a",
        "--config",
        &format!("@{}", world.file("config", config.to_string())),
    ]);
    let mut config = world.json(&["get", "p/a"]);
    assert_eq!(config["encrypt_conf"], service("sm4"));
    config["encrypt_conf"] = json!({ "enable": false });
    world.run_with(&["update", "p/a", "--config", "-"], config.to_string().as_bytes()).assert(0);
    assert_eq!(world.json(&["get", "p/a"])["encrypt_conf"]["enable"], false);

    // An update based on an older revision is refused.
    let sentence = world.refused(6, &["update", "p/a", "--config", &updated.to_string()]);
    assert!(sentence.contains("revision 2") && sentence.contains("revision 4"), "{sentence}");
    assert!(world.refused(6, &["update", "p/a", "--config", "{"]).contains("not valid"));
    assert!(world.refused(1, &["update", "p/a", "--config", "@/nowhere"]).contains("/nowhere"));
}

#[test]
fn create_needs_a_kms_for_the_region_and_the_role() {
    let world = World::new();
    let key = world.create_key();
    let mut elsewhere = byok("default", &key);
    elsewhere["user_cmk_info"]["region_id"] = "cn-elsewhere".into();
    let mut not_granted = byok("default", &key);
    not_granted["user_cmk_info"]["arn"] = "acs:ram::1:role/other".into();
    let no_such_key = byok("default", "key-0000000000000000");
    let mut half = byok("default", &key);
    half["user_cmk_info"].as_object_mut().unwrap().remove("arn");
    let mut empty = byok("default", &key);
    empty["user_cmk_info"]["arn"] = "".into();
    let cases = [
        (&elsewhere, "no_kms_for_region", "cn-elsewhere"),
        (&not_granted, "cmk_refused", &key),
        (&no_such_key, "cmk_refused", "key-0000000000000000"),
        (&half, "configuration_invalid", "`arn`"),
        (&empty, "cmk_field_refused", "user_cmk_info.arn"),
        (&json!({ "enable": true }), "encrypt_type_required", "encrypt_type"),
        (&json!({ "enable": true, "encrypt_type": "rot13" }), "configuration_invalid", "\"rot13\""),
        (
            &json!({ "enable": true, "encrypt_type": "sm4", "mode": 1 }),
            "configuration_invalid",
            "`mode`",
        ),
    ];
    for (conf, kind, word) in cases {
        let command = ["create", "p/a", "--encrypt-conf", &conf.to_string()];
        // The owner of a key has to act on its refusal, whichever operation meets it.
        let status = if kind == "cmk_refused" { 3 } else { 6 };
        let sentence = world.refused(status, &command);
        assert!(sentence.contains(word), "{word}: {sentence}");
        let out = world.run(&[&command[..], &["--json"]].concat());
        assert_eq!(out.json_error(status).0, kind);
        let said: Value = serde_json::from_str(&out.stderr).unwrap();
        let class = if status == 3 { "revoked" } else { "invalid" };
        assert_eq!(said["error"]["kind"], class);
    }
    world.ok(&["kms", "disable", &key]);
    let sentence =
        world.refused(3, &["create", "p/a", "--encrypt-conf", &byok("sm4", &key).to_string()]);
    assert!(sentence.contains("is disabled") && sentence.contains("enable the key"), "{sentence}");
    assert_eq!(world.json(&["list", "--json"])["logstores"], json!([]), "none of them was made");

    // The second KMS serves the key. An unsupported kind of URL is reported as such.
    let url = format!("local:{}", world.path("second-kms").display());
    let second = ["kms", "create-key", "--region", "cn-elsewhere", "--grant", ROLE, "--kms-dir"];
    let made = world.ok(&[&second[..], &[world.path("second-kms").to_str().unwrap()]].concat());
    elsewhere["user_cmk_info"]["cmk_key_id"] = String::from_utf8(made).unwrap().trim_end().into();
    world.ok(&["create", "p/a", "--encrypt-conf", &elsewhere.to_string(), "--kms", &url]);
    let sentence = world.refused(6, &["list", "--kms", "gopher://kms.example"]);
    assert!(sentence.contains("\"gopher:\"") && sentence.contains("local:DIR"), "{sentence}");
}

#[test]
fn names_are_refused_before_anything_is_made() {
    let world = World::new();
    let long = format!("p/{}", "x".repeat(300));
    for name in [
        "p",
        "/",
        "p/",
        "/a",
        "p/a/b",
        "../a",
        "p/..",
        "p/.hidden",
        "p/a b",
        "p/ä",
        "p/a\n",
        "_p/a",
        "-/a",
        &long,
    ] {
        let command = ["create", "--", name];
        let sentence = world.refused(6, &command);
        assert!(sentence.contains("name") && sentence.len() < 400, "{name}: {sentence}");
        assert_eq!(
            world.run(&["--json", "create", "--", name]).json_error(6).0,
            "name_refused",
            "{name}"
        );
    }
    // The operating system does not accept a NUL.
    let error = world.command(&["create", "p/a\0b"]).spawn().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(!world.path("envelog-data").exists() && !world.path("envelog-data.keyring").exists());
    world.create("p/a", &Value::Null);
    assert!(world.refused(1, &["create", "p/a"]).contains("exists already"));
    assert!(world.refused(1, &["read", "p/b"]).contains("no Logstore p/b"));
}

#[test]
fn what_is_too_large_is_refused_and_what_came_before_is_kept() {
    let world = World::new();
    world.create("p/a", &service("default"));
    for size in ["3GiB", "3221225472", "16777217", "0"] {
        let sentence = world.refused(2, &["append", "p/a", "-", "--group-bytes", size]);
        assert!(sentence.contains("--group-bytes"), "{sentence}");
    }
    world.run(&["append", "p/a", "-", "--group-bytes", "many"]).assert(2);
    for (what, args) in [
        ("shard_count", ["--shards", "257"]),
        ("shard_count", ["--shards", "0"]),
        ("ttl_days", ["--ttl", "0"]),
    ] {
        let sentence = world.refused(6, &[&["create", "p/b"][..], &args].concat());
        assert!(sentence.contains(what), "{sentence}");
    }

    // A line of 3 GiB, of which the program reads only a part.
    let mut append = Running::start(world.command(&["append", "p/a", "-", "--ack"]));
    let mut stdin = append.stdin.take().unwrap();
    let feeding = thread::spawn(move || {
        stdin.write_all(b"before\n").unwrap();
        let piece = vec![b'x'; 1 << 20];
        (0..3 * 1024).take_while(|_| stdin.write_all(&piece).is_ok()).count()
    });
    let out = append.wait();
    let sentence = out.sentence(1);
    assert!(sentence.contains("line 2") && sentence.contains("too long"), "{sentence}");
    assert_eq!(out.text(), "1\n");
    let fed = feeding.join().unwrap();
    assert!(fed < 64, "{fed} MiB were taken in before the line was refused");
    assert_eq!(world.read("p/a"), b"before\n");

    // A line of exactly the limit is accepted.
    let line = [vec![b'y'; LINE_BYTES_MAX], b"\n".to_vec()].concat();
    world.run_with(&["append", "p/a"], &line).assert(0);
    assert!(world.read("p/a") == [&b"before\n"[..], &line].concat());
}

#[test]
fn a_missing_or_foreign_store_or_keyring_is_told_apart() {
    let world = World::new();
    let refused = |kind: &str, words: &str, args: &[&str]| {
        let sentence = world.refused(7, args);
        assert!(sentence.contains(words), "{kind}: {sentence}");
        assert_eq!(
            world.run(&[args, &["--json"]].concat()).json_error(7),
            (kind.to_owned(), sentence)
        );
    };
    for command in [
        &["read", "p/a"][..],
        &["list"],
        &["verify"],
        &["append", "p/a"],
        &["status"],
        &["keys", "audit"],
    ] {
        refused("store_missing", "no store at ./envelog-data", command);
    }
    fs::create_dir(world.path("photos")).unwrap();
    fs::write(world.path("photos/cat.jpg"), "meow").unwrap();
    for command in [&["list"][..], &["create", "p/a"], &["keys", "recover", "--without-keyring"]] {
        refused("not_a_store", "photos is not", &[command, &["--store", "photos"]].concat());
    }
    let file = world.file("file", "no store");
    refused("not_a_store", "file is not", &["list", "--store", &file]);

    let text = made_lines(10);
    world.create("p/a", &service("default"));
    world.ok(&["append", "p/a", &world.file("lines", &text)]);
    let keyring = world.path("envelog-data.keyring");
    let aside = world.path("aside");
    fs::rename(&keyring, &aside).unwrap();
    for command in
        [&["read", "p/a"][..], &["append", "p/a"], &["create", "p/b"], &["verify"], &["status"]]
    {
        refused("keyring_missing", "envelog-data.keyring is missing", command);
    }
    assert!(!keyring.exists(), "a lost keyring is never made again by accident");
    world.ok(&["create", "p/a", "--store", "other"]);
    refused("keyring_foreign", "another store", &["read", "p/a", "--keyring", "other.keyring"]);
    assert_eq!(world.ok(&["read", "p/a", "--keyring", "aside"]), text);

    // The same through the environment. An option takes precedence.
    let mut command = world.command(&["read", "p/a"]);
    command.env("ENVELOG_STORE", world.path("envelog-data")).env("ENVELOG_KEYRING", &aside);
    assert_eq!(Running::start(command).finish().stdout, text);
    let mut command = world.command(&["list", "--store", "other"]);
    command.env("ENVELOG_STORE", world.path("nowhere"));
    assert_eq!(Running::start(command).finish().text(), "p/a\n");
    fs::rename(&aside, &keyring).unwrap();

    // A keyring with a changed byte is neither missing nor of another store.
    let mut bytes = fs::read(&keyring).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&keyring, bytes).unwrap();
    let sentence = world.refused(5, &["read", "p/a"]);
    assert!(sentence.contains("envelog-data.keyring"), "{sentence}");
}

#[test]
fn a_newer_format_asks_for_a_newer_program() {
    let world = World::new();
    world.create("p/a", &service("default"));
    let path = world.path("envelog-data/STORE");
    let mut bytes = fs::read(&path).unwrap();
    let version = u16::from_le_bytes([bytes[VERSION_AT], bytes[VERSION_AT + 1]]);
    assert_eq!(version, 2, "the version is elsewhere");
    bytes[VERSION_AT] = 3;
    fs::write(&path, bytes).unwrap();
    for command in [&["list"][..], &["read", "p/a"], &["create", "p/b"], &["append", "p/a"]] {
        let sentence = world.refused(7, command);
        assert!(
            sentence.contains("format version 3") && sentence.contains("newer envelog"),
            "{sentence}"
        );
        assert_eq!(world.run(&[command, &["--json"]].concat()).json_error(7).0, "newer_format");
    }
}

#[test]
fn a_second_writer_is_told_who_the_first_is() {
    let world = World::new();
    world.create("p/a", &Value::Null);
    let mut first = Running::start(world.command(&["append", "p/a", "-", "--ack"]));
    let acks = first.lines();
    first.stdin.as_mut().unwrap().write_all(b"one\n").unwrap();
    assert_eq!(acks.recv().unwrap(), "1");
    let who = format!("process {}", first.id());
    let config = world.json(&["get", "p/a"]).to_string();
    for command in [
        &["append", "p/a"][..],
        &["create", "p/b"],
        &["update", "p/a", "--config", &config],
        &["delete", "p/a", "--yes"],
        &["checkpoint", "--out", "checkpoint"],
        &["keys", "rotate-service"],
        &["repair", "p/a", "--shard", "0", "--yes"],
    ] {
        let sentence = world.refused(7, command);
        assert!(sentence.contains(&who), "{command:?}: {sentence}");
        assert_eq!(world.run(&[command, &["--json"]].concat()).json_error(7).0, "locked");
    }
    assert!(!world.path("checkpoint").exists());
    // Readers are not affected, and neither is the writer.
    assert_eq!(world.read("p/a"), b"one\n");
    world.ok(&["verify"]);
    first.stdin.as_mut().unwrap().write_all(b"two\n").unwrap();
    assert_eq!(acks.recv().unwrap(), "2");
    first.finish().assert(0);
    assert_eq!(world.read("p/a"), b"one\ntwo\n");
}

/// After `LOCK` is removed, a second writer takes over. The first one acknowledges nothing more and
/// ends.
#[test]
fn a_writer_that_another_one_has_taken_over_from_ends() {
    // The first writer detects this at the next line, or when it seals its data.
    for appends_more in [true, false] {
        let world = World::new();
        world.create("p/a", &service("default"));
        let mut first = Running::start(world.command(&["append", "p/a", "-", "--ack", "--json"]));
        let acks = first.lines();
        first.stdin.as_mut().unwrap().write_all(b"one\n").unwrap();
        assert_eq!(acks.recv().unwrap(), "1");
        let file = world.file("second", "by the second\n");
        world.refused(7, &["append", "p/a", &file]);
        fs::remove_file(world.path("envelog-data/LOCK")).unwrap();
        world.ok(&["append", "p/a", &file]);
        let out = if appends_more {
            let mut stdin = first.stdin.take().unwrap();
            stdin.write_all(b"never acknowledged\n").unwrap();
            let out = first.wait();
            drop(stdin);
            out
        } else {
            first.finish()
        };
        let (kind, sentence) = out.json_error(7);
        assert_eq!(kind, "fenced", "{sentence}");
        assert!(sentence.contains("another writer"), "{sentence}");
        assert_eq!(acks.iter().count(), 0);
        assert_eq!(world.read("p/a"), b"one\nby the second\n");
        world.ok(&["append", "p/a", &file]);
        assert_eq!(world.read("p/a"), b"one\nby the second\nby the second\n");
        world.ok(&["verify"]);
    }
}

/// A refused command leaves no files. The hint to back up appears when the store is created, even
/// if the command then fails.
#[test]
fn a_refused_create_makes_no_store_and_a_new_store_says_backup() {
    let world = World::new();
    for options in [
        &["--shards", "0"][..],
        &["--ttl", "0"],
        &["--retention-bytes", "0"],
        &["--encrypt-conf", "{}"],
    ] {
        world.refused(6, &[&["create", "p/a"], options].concat());
        assert!(
            !world.path("envelog-data").exists() && !world.path("envelog-data.keyring").exists(),
            "{options:?}"
        );
    }
    let elsewhere = byok("sm4", "no-such-key").to_string();
    let out = world.run(&["create", "p/a", "--encrypt-conf", &elsewhere]);
    out.sentence(6);
    assert!(out.text().contains("back up both"), "{}", out.text());
    assert!(world.path("envelog-data.keyring").exists());
    let again = world.run(&["create", "p/a"]);
    again.assert(0);
    assert!(!again.text().contains("back up"), "{}", again.text());
}

/// The length that a file claims is not trusted.
#[cfg(target_os = "linux")]
#[test]
fn a_segment_that_claims_to_be_huge_takes_no_memory() {
    let world = World::new();
    world.create("p/a", &service("default"));
    world.ok(&["append", "p/a", &world.file("lines", made_lines(10))]);
    let segment = world.segments("envelog-data")[0].clone();
    let bytes = fs::read(&segment).unwrap();
    let footer = bytes.windows(4).rposition(|window| window == b"EFTR").unwrap();
    let huge = world.file("huge.seg", &bytes[..footer + 4]);
    fs::OpenOptions::new().write(true).open(&huge).unwrap().set_len(6 << 40).unwrap();
    assert!(world.refused(5, &["inspect", &huge]).contains("footer"));
}

#[test]
fn irreversible_commands_need_yes_and_overwrite_no_file() {
    let world = World::new();
    world.create("p/a", &service("default"));
    for command in [
        &["delete", "p/a"][..],
        &["repair", "p/a", "--shard", "0"],
        &["keys", "shred", "p/a", "--version", "1"],
    ] {
        assert!(world.refused(2, command).contains("--yes"), "{command:?}");
    }
    assert_eq!(world.ok(&["list"]), b"p/a\n");
    let huge = world.file("huge.json", vec![b' '; (1 << 20) + 1]);
    assert!(
        world.refused(1, &["update", "p/a", "--config", &format!("@{huge}")]).contains("too large")
    );
    assert_eq!(
        world.run(&["--json", "kms"]).json_error(2).1,
        "a command is missing; --help lists them"
    );
    let taken = world.file("taken", "precious");
    for command in [&["checkpoint", "--out", &taken][..], &["keys", "backup", "--out", &taken]] {
        assert!(world.refused(1, command).contains("taken"), "{command:?}");
    }
    assert_eq!(fs::read(&taken).unwrap(), b"precious");
    let sentence = world.refused(2, &["list", "--revalidate-every", "10s", "--outage-grace", "5s"]);
    assert!(sentence.contains("outage_grace"), "{sentence}");
    for directory in [world.path("envelog-data").to_str().unwrap(), "/nowhere/at-all"] {
        assert!(world.refused(1, &["append", "p/a", directory]).contains(directory), "{directory}");
    }
    world.ok(&["delete", "p/a", "--yes"]);
    assert_eq!(world.ok(&["list"]), b"");
}
