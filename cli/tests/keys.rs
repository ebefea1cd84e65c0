//! The key life cycle: rotation, re-wrapping, replacement, backup, recovery, shredding and audit.
//! Also verification, checkpoints and inspection.

#![allow(clippy::unwrap_used)]

mod common;

use std::{fs, io::Write, os::unix::fs::PermissionsExt};

use common::{REGION, ROLE, Running, World, byok, copy_dir, made_lines, service};
use serde_json::{Value, json};

fn append(world: &World, name: &str, text: impl AsRef<[u8]>) {
    world.ok(&["append", name, &world.file("piece", text)]);
}

fn status(world: &World, name: &str) -> Value {
    world.json(&["status", name, "--json"])["logstores"][0].clone()
}

fn events(world: &World) -> Vec<String> {
    let records = world.json(&["keys", "audit", "--json"])["records"].clone();
    records
        .as_array()
        .unwrap()
        .iter()
        .map(|record| record["event"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn a_rotated_data_key_seals_what_comes_and_opens_what_was() {
    let world = World::new();
    let key = world.create_key();
    for (name, conf) in [("p/service", service("sm4")), ("p/byok", byok("default", &key))] {
        world.create(name, &conf);
        append(&world, name, "one\n");
        let rotated = world.json(&["keys", "rotate-data", name, "--json"]);
        assert_eq!(rotated, json!({ "logstore": name, "data_key_version": 2 }));
        append(&world, name, "two\n");
        assert_eq!(world.read(name), b"one\ntwo\n");
        let versions = status(&world, name)["data_keys"].clone();
        let versions: Vec<_> = versions.as_array().unwrap().iter().collect();
        assert_eq!(
            versions.iter().map(|it| it["version"].as_u64().unwrap()).collect::<Vec<_>>(),
            [1, 2]
        );
        assert!(versions.iter().all(|it| it["bytes_stored"].as_u64().unwrap() > 0), "{versions:?}");
    }
    world.create("p/plain", &Value::Null);
    assert!(world.refused(6, &["keys", "rotate-data", "p/plain"]).contains("never encrypted"));
    assert!(events(&world).iter().filter(|event| *event == "rotated").count() >= 2);
}

#[test]
fn after_a_master_key_rotation_older_versions_still_unwrap() {
    let world = World::new();
    let key = world.create_key();
    world.create("p/a", &byok("sm4", &key));
    append(&world, "p/a", "one\n");
    world.ok(&["kms", "rotate", &key]);
    assert_eq!(world.json(&["kms", "list", "--json"])["keys"][0]["versions"], 2);
    assert_eq!(world.read("p/a"), b"one\n", "the old version unwraps");
    world.ok(&["keys", "rotate-data", "p/a"]);
    let report = world.json(&["keys", "rewrap", "p/a", "--json"]);
    assert_eq!(report["rewrapped"], json!([{ "logstore": "p/a", "envelopes": 2 }]));
    assert_eq!(world.read("p/a"), b"one\n");
    // Without a name, re-wraps all Logstores and skips those without an envelope.
    world.create("p/plain", &Value::Null);
    world.ok(&["keys", "rewrap"]);
    assert!(world.refused(6, &["keys", "rewrap", "p/plain"]).contains("never encrypted"));
}

#[test]
fn a_rotated_service_key_makes_older_keyring_copies_too_old() {
    let world = World::new();
    world.create("p/a", &service("default"));
    append(&world, "p/a", "one\n");
    let backed_up = world.ok(&["keys", "backup", "--out", "old"]);
    assert!(String::from_utf8(backed_up).unwrap().contains("apart"));
    let mode = |name: &str| fs::metadata(world.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("old"), mode("envelog-data.keyring")), (0o600, 0o600));
    assert_eq!(
        fs::read(world.path("old")).unwrap(),
        fs::read(world.path("envelog-data.keyring")).unwrap()
    );
    assert_eq!(world.ok(&["read", "p/a", "--keyring", "old"]), b"one\n", "the copy serves");

    fs::create_dir(world.path("backup")).unwrap();
    let mut copy = std::process::Command::new("cp");
    copy.arg("-r").args(["envelog-data", "backup"].map(|name| world.path(name)));
    assert!(copy.status().unwrap().success());
    let done = world.json(&["keys", "rotate-service", "--json"]);
    assert_eq!((&done["service_key_version"], &done["continued"]), (&json!(2), &json!(false)));
    assert_eq!(
        (&done["logstores"], &done["envelopes"], &done["left_open"]),
        (&json!(1), &json!(1), &json!([]))
    );
    // A copy from before the rotation is readable only with --accept-retired.
    let backup =
        ["read", "p/a", "--store", "backup/envelog-data", "--keyring", "envelog-data.keyring"];
    let sentence = world.refused(5, &backup);
    assert!(sentence.contains("retired"), "{sentence}");
    assert_eq!(world.ok(&[&backup[..], &["--accept-retired"]].concat()), b"one\n");
    let writing = ["append", "p/a", "--accept-retired"];
    assert!(world.refused(2, &writing).contains("read-only"));
    assert_eq!(world.read("p/a"), b"one\n");
    append(&world, "p/a", "two\n");
    let sentence = world.refused(7, &["read", "p/a", "--keyring", "old"]);
    assert!(sentence.contains("too old") && sentence.contains("restore"), "{sentence}");
    world.ok(&["keys", "backup", "--out", "new"]);
    fs::remove_file(world.path("envelog-data.keyring")).unwrap();
    world.refused(7, &["read", "p/a"]);
    fs::copy(world.path("new"), world.path("envelog-data.keyring")).unwrap();
    assert_eq!(world.read("p/a"), b"one\ntwo\n", "the new copy is enough");
    world.ok(&["verify"]);
    let events = events(&world);
    assert!(
        events.contains(&"service_rotate_intended".to_owned())
            && events.contains(&"service_rotated".to_owned())
    );
}

/// Each rotation retires the previous version, also if it is not the first rotation.
#[test]
fn after_two_rotations_what_is_from_before_the_last_is_refused() {
    let world = World::new();
    world.create("p/a", &service("default"));
    append(&world, "p/a", "one\n");
    for (rotation, line) in [(1, "two\n"), (2, "three\n")] {
        let (store, keyring) = (format!("store-{rotation}"), format!("keyring-{rotation}"));
        copy_dir(&world.path("envelog-data"), &world.path(&store));
        world.ok(&["keys", "backup", "--out", &keyring]);
        world.ok(&["keys", "rotate-service"]);
        append(&world, "p/a", line);
    }
    assert_eq!(world.read("p/a"), b"one\ntwo\nthree\n");
    for (rotation, lines) in [(1, "one\n"), (2, "one\ntwo\n")] {
        let (store, keyring) = (format!("store-{rotation}"), format!("keyring-{rotation}"));
        // The old keyring does not have the key for the current store.
        let command = ["read", "p/a", "--keyring", &keyring];
        assert!(world.refused(7, &command).contains("too old"));
        assert_eq!(
            world.run(&[&command[..], &["--json"]].concat()).json_error(7).0,
            "keyring_too_old"
        );
        // The current keyring accepts the old store only with --accept-retired, and only for
        // reading.
        let copy = ["--store", &store, "--keyring", "envelog-data.keyring"];
        for command in [&["read", "p/a"][..], &["verify"], &["list"], &["append", "p/a"]] {
            let command = [command, &copy].concat();
            assert!(world.refused(5, &command).contains("retired"), "{command:?}");
            let (kind, _) = world.run(&[&command[..], &["--json"]].concat()).json_error(5);
            assert_eq!(kind, "retired_key_version", "{command:?}");
        }
        let accepting = |command: &[&'static str]| [command, &["--accept-retired"], &copy].concat();
        assert_eq!(String::from_utf8(world.ok(&accepting(&["read", "p/a"]))).unwrap(), lines);
        world.ok(&accepting(&["verify"]));
        world.refused(2, &accepting(&["append", "p/a"]));
    }
    world.ok(&["verify"]);
}

#[test]
fn a_customers_key_is_replaced_by_its_own_operation_alone() {
    let world = World::new();
    let (old, new) = (world.create_key(), world.create_key());
    world.create("p/a", &byok("sm4", &old));
    append(&world, "p/a", "one\n");
    let revision = world.json(&["get", "p/a"])["revision"].clone();
    let replace = |conf: &Value| {
        ["keys", "replace-cmk", "p/a", "--encrypt-conf"]
            .map(str::to_owned)
            .into_iter()
            .chain([conf.to_string()])
            .collect::<Vec<_>>()
    };

    // `replace-cmk` refuses to change other settings.
    assert!(world.refused(6, &replace(&byok("default", &new))).contains("algorithm is fixed"));
    let mut off = byok("sm4", &new);
    off["enable"] = false.into();
    assert!(world.refused(6, &replace(&off)).contains("update"));
    assert!(world.refused(6, &replace(&service("sm4"))).contains("user_cmk_info"));
    assert!(
        world
            .refused(3, &replace(&byok("sm4", "key-0000000000000000")))
            .contains("key-0000000000000000")
    );
    assert_eq!(world.json(&["get", "p/a"])["encrypt_conf"], byok("sm4", &old));

    let said = String::from_utf8(world.ok(&replace(&byok("sm4", &new)))).unwrap();
    assert!(said.contains("anyone who held the old one"), "no warning: {said}");
    let config = world.json(&["get", "p/a"]);
    assert_eq!((&config["encrypt_conf"], &config["revision"]), (&byok("sm4", &new), &revision));
    world.ok(&["kms", "disable", &old]);
    append(&world, "p/a", "two\n");
    assert_eq!(world.read("p/a"), b"one\ntwo\n", "the old key is no longer needed");
    let versions = status(&world, "p/a")["data_keys"].clone();
    assert_eq!(
        versions.as_array().unwrap().len(),
        2,
        "what follows has a fresh data key: {versions}"
    );
    world.ok(&["kms", "disable", &new]);
    assert!(world.refused(3, &["read", "p/a"]).contains(&new));
    // It also refuses while the old key is unavailable.
    world.ok(&["kms", "enable", &old]);
    world.refused(3, &replace(&byok("sm4", &old)));
    world.create("p/service", &service("default"));
    world.refused(
        6,
        &["keys", "replace-cmk", "p/service", "--encrypt-conf", &byok("default", &old).to_string()],
    );
    assert!(events(&world).contains(&"replaced".to_owned()));
}

#[test]
fn shredded_data_is_gone_and_the_rest_is_not() {
    let world = World::new();
    world.create("p/a", &service("default"));
    append(&world, "p/a", "one\n");
    assert!(
        world.refused(6, &["keys", "shred", "p/a", "--version", "1", "--yes"]).contains("rotate")
    );
    world.ok(&["keys", "rotate-data", "p/a"]);
    append(&world, "p/a", "two\n");
    world.ok(&["keys", "shred", "p/a", "--version", "1", "--yes"]);
    assert!(world.refused(1, &["read", "p/a"]).contains("shredded"));
    assert_eq!(world.ok(&["read", "p/a", "--from", "1"]), b"two\n");
    let versions = status(&world, "p/a")["data_keys"].clone();
    assert_eq!((&versions[0]["shredded"], &versions[1]["shredded"]), (&true.into(), &false.into()));
    let events = events(&world);
    assert!(
        events.contains(&"shred_intended".to_owned()) && events.contains(&"shredded".to_owned())
    );
}

#[test]
fn a_lost_keyring_costs_what_only_it_could_open() {
    let world = World::new();
    let key = world.create_key();
    let text = made_lines(1000);
    world.create("p/byok", &byok("sm4", &key));
    world.create("p/service", &service("default"));
    append(&world, "p/byok", &text);
    append(&world, "p/service", &text);
    let expect = world.path("expect.json");
    let cmk = byok("sm4", &key)["user_cmk_info"].clone();
    fs::write(&expect, json!({ "p/byok": cmk }).to_string()).unwrap();
    let recover = ["keys", "recover", "--without-keyring", "--expect", expect.to_str().unwrap()];
    assert!(world.refused(1, &recover).contains("never overwritten"));
    world.run(&["keys", "recover"]).assert(2);
    fs::remove_file(world.path("envelog-data.keyring")).unwrap();
    world.refused(7, &["read", "p/byok"]);

    // Without --expect, the command recovers nothing and prints the keys that a recovery would use.
    let shown = world.run(&["keys", "recover", "--without-keyring"]);
    shown.assert(6);
    let found = String::from_utf8_lossy(&shown.stdout).into_owned();
    assert!(found.contains(&key) && found.contains("p/service"), "{found}");
    assert!(!world.path("envelog-data.keyring").exists());
    // With a wrong role in the file, that Logstore is not recovered.
    let other = world.path("other.json");
    let mut role = cmk.clone();
    role["arn"] = "acs:ram::1:role/other".into();
    fs::write(&other, json!({ "p/byok": role }).to_string()).unwrap();
    let kept = ["keys", "recover", "--without-keyring", "--expect", other.to_str().unwrap()];
    assert!(world.refused(1, &kept).contains("p/byok"));
    assert!(!world.path("envelog-data.keyring").exists(), "nothing was changed");

    let report = world.json(&[&recover[..], &["--json"]].concat());
    assert_eq!(report["recovered"], json!(["p/byok"]));
    assert_eq!(report["lost"].as_array().unwrap().len(), 1, "{report}");
    assert_eq!(world.read("p/byok"), text);
    append(&world, "p/byok", "more\n");
    assert_eq!(world.read("p/byok"), [&text[..], b"more\n"].concat());
    assert_eq!(world.ok(&["list"]), b"p/byok\n");
    world.ok(&["verify", "p/byok"]);
    assert!(events(&world).contains(&"recovered".to_owned()));
}

#[test]
fn status_tells_keys_sizes_and_counts() {
    let world = World::new();
    let key = world.create_key();
    let text = made_lines(2000);
    world.create("p/byok", &byok("sm4", &key));
    world.create("p/service", &service("default"));
    world.create("p/plain", &Value::Null);
    for name in ["p/byok", "p/plain"] {
        append(&world, name, &text);
    }
    let all = world.json(&["status", "--json"])["logstores"].clone();
    let names: Vec<_> =
        all.as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["p/byok", "p/plain", "p/service"]);
    let expected = [
        ("byok", json!("SM4-GCM"), "active"),
        ("none", Value::Null, "none"),
        ("service_key", json!("AES-256-GCM"), "active"),
    ];
    for (logstore, (method, algorithm, state)) in all.as_array().unwrap().iter().zip(expected) {
        assert_eq!(
            (&logstore["method"], &logstore["algorithm"]),
            (&method.into(), &algorithm),
            "{logstore}"
        );
        assert_eq!(logstore["key"]["state"], state, "{logstore}");
    }
    let byok = status(&world, "p/byok");
    let number = |field: &str| byok[field].as_u64().unwrap();
    assert_eq!((number("logs"), number("segments")), (2000, 1));
    assert!(number("bytes_raw") > text.len() as u64, "{byok}");
    assert!(
        number("bytes_compressed") < number("bytes_raw")
            && number("bytes_stored") > number("bytes_compressed"),
        "{byok}"
    );
    assert_eq!(byok["data_keys"][0]["bytes_stored"], byok["bytes_stored"]);
    let left = byok["key"]["lease_left_s"].as_f64().unwrap();
    assert!(left > 0.0 && left <= 300.0, "{left}");
    // The table output for people.
    let table = String::from_utf8(world.ok(&["status"])).unwrap();
    for word in ["p/byok", "SM4-GCM", "service_key", "2,000", "active"] {
        assert!(table.contains(word), "{word} is missing: {table}");
    }
    assert!(!table.contains('\x1b'), "colours are for terminals");
}

#[test]
fn a_store_that_was_put_back_is_noticed_with_a_checkpoint() {
    let world = World::new();
    world.create("p/a", &service("default"));
    append(&world, "p/a", made_lines(1000));
    copy_dir(&world.path("envelog-data"), &world.path("earlier"));
    append(&world, "p/a", made_lines(1000));
    let said = world.ok(&["checkpoint", "--out", "checkpoint"]);
    assert!(String::from_utf8(said).unwrap().contains("away from the store"));
    world.ok(&["verify", "--against", "checkpoint"]);
    append(&world, "p/a", "later\n");
    world.ok(&["verify", "--against", "checkpoint"]);

    // A rollback of the whole store: the old copy is consistent in itself.
    let keyring = ["--keyring", "envelog-data.keyring"];
    let earlier = [&["verify", "--store", "earlier"], &keyring[..]].concat();
    world.ok(&earlier);
    let (kind, message) =
        world.run(&[&earlier[..], &["--against", "checkpoint", "--json"]].concat()).json_error(5);
    assert_eq!(kind, "rolled_back", "{message}");

    // A single segment that is missing, or rolled back.
    let segment = world.segments("envelog-data").into_iter().min().unwrap();
    let whole = fs::read(&segment).unwrap();
    fs::remove_file(&segment).unwrap();
    for command in
        [&["verify"][..], &["verify", "--against", "checkpoint"], &["verify", "--keyless"]]
    {
        let sentence = world.refused(5, command);
        assert!(sentence.contains("p/a") || sentence.contains(".seg"), "{sentence}");
    }
    fs::write(&segment, &whole[..whole.len() / 2]).unwrap();
    assert_eq!(world.run(&["verify", "--json"]).json_error(5).0, "truncated");
    fs::write(&segment, &whole).unwrap();
    world.ok(&["verify", "--against", "checkpoint"]);
    let not_one = world.file("not-one", "this is no checkpoint");
    assert!(world.refused(5, &["verify", "--against", &not_one]).contains("heckpoint"));
}

#[test]
fn verify_says_file_block_and_offset() {
    let world = World::new();
    world.create("p/a", &service("sm4"));
    // Write several blocks: each process ends at least one.
    for _ in 0..3 {
        append(&world, "p/a", made_lines(3000));
    }
    let segment = world.segments("envelog-data").remove(0);
    let blocks = world.json(&["inspect", segment.to_str().unwrap(), "--json"])["blocks"].clone();
    let block = blocks.as_array().unwrap().last().unwrap();
    let (number, offset) = (block["number"].as_u64().unwrap(), block["offset"].as_u64().unwrap());
    let mut bytes = fs::read(&segment).unwrap();
    bytes[offset as usize + 100] ^= 0x40;
    fs::write(&segment, &bytes).unwrap();
    for keyless in [&["verify"][..], &["verify", "--keyless"]] {
        let out = world.run(&[keyless, &["--json"]].concat());
        assert_eq!(out.json_error(5).0, "corrupt");
        let report: Value = serde_json::from_str(&out.text()).unwrap();
        let fault = &report["faults"][0];
        assert_eq!(
            (&fault["block"], &fault["offset"]),
            (&number.into(), &offset.into()),
            "{fault}"
        );
        assert!(
            segment.ends_with(fault["file"].as_str().unwrap().trim_start_matches("./")),
            "{fault}"
        );
        let sentence = world.refused(5, keyless);
        assert!(
            sentence.contains(&format!("block {number}")) && sentence.contains(&offset.to_string()),
            "{sentence}"
        );
    }
    // The loss can be accepted; a sealed segment is never changed.
    world.refused(5, &["read", "p/a"]);
    let said = world.ok(&["repair", "p/a", "--shard", "0", "--yes"]);
    assert!(String::from_utf8(said).unwrap().contains("accepted the loss of segments"));
    assert_eq!(fs::read(&segment).unwrap(), bytes);
    world.run(&["read", "p/a"]).assert(0);
    let said = world.ok(&["repair", "p/a", "--shard", "0", "--yes"]);
    assert!(String::from_utf8(said).unwrap().contains("nothing was changed"));
}

#[test]
fn a_shard_with_a_damaged_end_is_written_again_after_a_repair() {
    let world = World::new();
    world.create("p/a", &service("default"));
    let mut append =
        Running::start(world.command(&["append", "p/a", "-", "--ack", "--group-bytes", "1"]));
    let acks = append.lines();
    for line in 0..10 {
        append.stdin.as_mut().unwrap().write_all(format!("line {line}\n").as_bytes()).unwrap();
        assert_eq!(acks.recv().unwrap(), (line + 1).to_string());
    }
    append.kill();
    let segment = world.segments("envelog-data").remove(0);
    let blocks = world.json(&["inspect", segment.to_str().unwrap(), "--json"])["blocks"].clone();
    let offset = blocks[3]["offset"].as_u64().unwrap() as usize;
    let mut bytes = fs::read(&segment).unwrap();
    bytes[offset + 100] ^= 1;
    fs::write(&segment, &bytes).unwrap();

    // Ten blocks were synced one after another, so this is not a torn tail: the open must neither
    // drop nor write anything.
    let more = world.file("more", "more\n");
    let sentence = world.refused(5, &["append", "p/a", &more]);
    assert!(sentence.contains("block 3"), "{sentence}");
    assert_eq!(fs::read(&segment).unwrap(), bytes);
    world.refused(5, &["verify"]);
    let report = world.json(&["repair", "p/a", "--shard", "0", "--yes", "--json"]);
    assert!(report["groups_salvaged"].as_u64().unwrap() > 0, "{report}");
    world.ok(&["append", "p/a", &more]);
    let kept: String =
        (0..10).filter(|&line| line != 3).map(|line| format!("line {line}\n")).collect();
    assert_eq!(String::from_utf8(world.read("p/a")).unwrap(), kept + "more\n");
    world.ok(&["verify"]);
}

#[test]
fn usage_tells_what_may_be_destroyed() {
    let world = World::new();
    let (old, new) = (world.create_key(), world.create_key());
    world.create("p/a", &byok("sm4", &old));
    append(&world, "p/a", "one\n");
    world.ok(&["kms", "rotate", &old]);
    world.ok(&["keys", "rotate-data", "p/a"]);
    append(&world, "p/a", "two\n");
    let usage = || world.json(&["keys", "usage", "--json"]);
    let keys = usage()["data_keys"].clone();
    assert_eq!(
        (&keys[0]["cmk_version"], &keys[1]["cmk_version"]),
        (&"1".into(), &"2".into()),
        "{keys}"
    );
    assert_eq!(
        (&keys[0]["safe_to_destroy"], &keys[1]["current"]),
        (&false.into(), &true.into()),
        "{keys}"
    );
    let replace = ["keys", "replace-cmk", "p/a", "--encrypt-conf", &byok("sm4", &new).to_string()]
        .map(str::to_owned);
    world.ok(&replace);
    let masters = usage()["master_keys"].clone();
    let safe = |key: &str| {
        let of_key =
            masters.as_array().unwrap().iter().find(|it| it["cmk"]["cmk_key_id"] == key).unwrap();
        of_key["safe_to_destroy"].as_bool().unwrap()
    };
    assert!(safe(&old) && !safe(&new), "{masters}");
    let table = String::from_utf8(world.ok(&["keys", "usage"])).unwrap();
    for word in ["data key of p/a", &new, "safe", "no: ", "service key"] {
        assert!(table.contains(word), "{word} is missing: {table}");
    }
    let status = status(&world, "p/a");
    assert_eq!(
        (&status["cmk"]["cmk_key_id"], &status["data_keys"][2]["current"]),
        (&new.into(), &true.into())
    );
}

#[test]
fn the_keys_under_one_master_key_are_wrapped_again_in_one_go() {
    let world = World::new();
    let (key, gone) = (world.create_key(), world.create_key());
    for (name, key) in [("p/a", &key), ("p/b", &key), ("p/c", &gone)] {
        world.create(name, &byok("default", key));
        append(&world, name, "one\n");
    }
    world.create("p/d", &service("default"));
    world.ok(&["kms", "rotate", &key]);
    world.ok(&["kms", "disable", &gone]);
    let report = world.json(&["keys", "rewrap", "--cmk", &key, "--json"]);
    let names: Vec<_> =
        report["rewrapped"].as_array().unwrap().iter().map(|it| it["logstore"].clone()).collect();
    assert_eq!(names, ["p/a", "p/b"], "{report}");
    // A failure is reported at the end and does not stop the other Logstores.
    let out = world.run(&["keys", "rewrap", "--json"]);
    let report: Value = serde_json::from_str(&out.text()).unwrap();
    assert_eq!(report["current"], json!(["p/a", "p/b", "p/d"]), "{report}");
    assert!(report["failed"].as_array().unwrap().iter().any(|it| it["what"] == "p/c"), "{report}");
    let out = world.run(&["keys", "rewrap"]);
    assert!(out.sentence(3).contains(&gone) && out.text().contains("p/c: not re-wrapped"));
    assert_eq!(
        world.json(&["keys", "rewrap", "--cmk", &key, "--region", "nowhere", "--json"])["rewrapped"],
        json!([])
    );
    world.run(&["keys", "rewrap", "p/a", "--cmk", &key]).assert(2);
    assert_eq!(world.read("p/a"), b"one\n");
}

#[test]
fn the_audit_log_is_verified_and_exported() {
    let world = World::new();
    let key = world.create_key();
    world.create("p/a", &byok("sm4", &key));
    append(&world, "p/a", "one\n");
    world.ok(&["keys", "audit", "--out", "export"]);
    // A revocation is recorded once, regardless of how many commands detect it, and so is its end.
    world.ok(&["kms", "disable", &key]);
    let piece = world.file("piece", "two\n");
    for _ in 0..3 {
        world.refused(3, &["append", "p/a", &piece]);
    }
    world.ok(&["kms", "enable", &key]);
    for _ in 0..2 {
        world.ok(&["append", "p/a", &piece]);
    }
    assert_eq!(events(&world), ["store_created", "created", "revoked", "recovered"]);
    let report = world.json(&["keys", "audit", "--verify", "--against", "export", "--json"]);
    assert_eq!((&report["ok"], &report["head"]["number"]), (&true.into(), &4.into()), "{report}");
    let export = fs::read_to_string(world.path("export")).unwrap();
    assert_eq!(export.lines().count(), 3);
    let last: Value = serde_json::from_str(export.lines().last().unwrap()).unwrap();
    assert_eq!(last["head"]["number"], 2);
    assert!(
        world.refused(2, &["keys", "audit", "--verify", "--against", "piece"]).contains("export")
    );
    let log = world.path("envelog-data/audit/audit-000001.log");
    let mut bytes = fs::read(&log).unwrap();
    bytes[20] ^= 1;
    fs::write(&log, bytes).unwrap();
    let sentence = world.refused(5, &["keys", "audit", "--verify"]);
    assert!(sentence.contains("up to record 0"), "{sentence}");
}

#[test]
fn what_the_engine_does_is_said_where_that_is_asked_for() {
    let world = World::new();
    world.create("p/a", &service("sm4"));
    let text =
        |args: &[&str]| String::from_utf8(world.command(args).output().unwrap().stderr).unwrap();
    assert_eq!(text(&["keys", "rotate-data", "p/a"]), "");
    let said = text(&["-v", "keys", "rotate-data", "p/a"]);
    assert!(
        said.contains("store opened") && said.contains("Rotated") && !said.contains('\x1b'),
        "{said}"
    );
    let said = text(&["--log", "envelog::keys=info", "keys", "rotate-data", "p/a"]);
    assert!(!said.contains("store opened") && said.contains("Rotated"), "{said}");
}

#[test]
fn inspect_needs_no_key() {
    let world = World::new();
    let key = world.create_key();
    world.create("p/a", &byok("sm4", &key));
    append(&world, "p/a", made_lines(500));
    world.ok(&["kms", "disable", &key]);
    world.ok(&["verify", "--keyless"]);
    let segment = world.segments("envelog-data").remove(0);
    fs::remove_file(world.path("envelog-data.keyring")).unwrap();
    let path = segment.to_str().unwrap();
    let report = world.json(&["inspect", path, "--json"]);
    assert_eq!(
        (&report["header"]["suite"], &report["header"]["shard"]),
        (&"SM4-GCM".into(), &0.into())
    );
    // The file name contains the epoch too.
    let named = segment
        .file_stem()
        .unwrap()
        .to_str()
        .unwrap()
        .rsplit('-')
        .next()
        .unwrap()
        .parse::<u64>()
        .unwrap();
    assert_eq!(report["header"]["epoch"], named);
    let blocks = report["blocks"].as_array().unwrap();
    let sum = |field: &str| blocks.iter().map(|block| block[field].as_u64().unwrap()).sum::<u64>();
    assert_eq!(sum("logs"), 500);
    assert_eq!(report["footer"]["logs"], 500);
    assert_eq!(report["footer"]["blocks"], blocks.len());
    assert_eq!(report["footer"]["groups"], sum("groups"));
    let text = String::from_utf8(world.ok(&["inspect", path])).unwrap();
    assert!(
        text.contains("SM4-GCM") && text.contains("commitment") && text.contains("footer"),
        "{text}"
    );
    for (name, bytes) in [("text", &b"this is no segment, and rather short"[..]), ("empty", b"")] {
        world.refused(5, &["inspect", &world.file(name, bytes)]);
    }
    world.refused(1, &["inspect", "nowhere.seg"]);
}

#[test]
fn the_embedded_kms_tells_its_keys_and_says_what_it_cannot_do() {
    let world = World::new();
    let made = world.json(&["kms", "create-key", "--region", REGION, "--json"]);
    let other = made["cmk_key_id"].as_str().unwrap();
    let key = world.create_key();
    let keys = || world.json(&["kms", "list", "--json"])["keys"].clone();
    let of_key = || {
        keys()
            .as_array()
            .unwrap()
            .iter()
            .find(|it| it["cmk_key_id"] == key.as_str())
            .unwrap()
            .clone()
    };
    assert_eq!(keys().as_array().unwrap().len(), 2);
    assert_eq!((&of_key()["region_id"], &of_key()["grants"]), (&REGION.into(), &json!([ROLE])));
    let steps: [(&[&str], &str); 6] = [
        (&["disable"], "disabled"),
        (&["enable"], "enabled"),
        (&["rotate"], "enabled"),
        (&["schedule-deletion", "--days", "8"], "pending_deletion"),
        (&["cancel-deletion"], "enabled"),
        (&["delete", "--yes"], "deleted"),
    ];
    for (step, state) in steps {
        let said = world.json(&[&["kms"], step, &[&key, "--json"]].concat());
        assert_eq!(said["cmk_key_id"], key.as_str());
        assert_eq!(of_key()["state"], state, "after {step:?}");
    }
    assert!(world.refused(1, &["kms", "enable", &key]).contains(&key));
    assert!(
        world
            .refused(1, &["kms", "disable", "key-0000000000000000"])
            .contains("key-0000000000000000")
    );
    assert!(world.refused(1, &["kms", "disable", "../key"]).contains("../key"));
    assert!(world.refused(2, &["kms", "schedule-deletion", other, "--days", "0"]).contains("days"));
    assert!(String::from_utf8(world.ok(&["kms", "list"])).unwrap().contains(&key));
}

#[test]
fn the_keyring_can_be_under_a_master_key() {
    let world = World::new();
    let key = world.create_key();
    let cmk = byok("default", &key)["user_cmk_info"].to_string();
    let file = world.file("lines", "one\ntwo\n");
    let create =
        ["create", "p/l", "--encrypt-conf", &service("sm4").to_string(), "--service-cmk", &cmk];
    world.ok(&create);
    world.ok(&["append", "p/l", &file]);
    assert_eq!(world.read("p/l"), b"one\ntwo\n");
    let service_key = || world.json(&["status", "--json"])["service_key"].clone();
    assert_eq!(service_key()["cmk"]["cmk_key_id"], key.as_str());
    assert_eq!(service_key()["state"], "active");
    let left = service_key()["lease_left_s"].as_f64().unwrap();
    assert!(left > 3500.0 && left <= 3600.0, "{left}");
    let said = String::from_utf8(world.ok(&["status"])).unwrap();
    assert!(said.contains(&key) && said.contains("closes the store in 59m"), "{said}");
    let said = String::from_utf8(world.ok(&["status", "--service-outage-grace", "0s"])).unwrap();
    assert!(said.contains("does not close the store"), "{said}");
    let other = cmk.replace(&key, &world.create_key());
    let sentence = world.refused(6, &["create", "p/other", "--service-cmk", &other]);
    assert!(sentence.contains("rewrap-keyring"), "{sentence}");
    assert!(world.refused(6, &["create", "p/other", "--service-cmk", "{}"]).contains("cmk_key_id"));

    world.ok(&["kms", "disable", &key]);
    for command in
        [&["read", "p/l"][..], &["append", "p/l", &file], &["list"], &["keys", "rotate-service"]]
    {
        let sentence = world.refused(3, command);
        assert!(sentence.contains(&key) && sentence.contains("disabled"), "{sentence}");
    }
    fs::rename(world.path("envelog-data.kms"), world.path("away")).unwrap();
    assert!(world.refused(4, &["read", "p/l"]).contains(&key));
    fs::rename(world.path("away"), world.path("envelog-data.kms")).unwrap();
    world.ok(&["kms", "enable", &key]);

    world.ok(&["keys", "rotate-service"]);
    let backup = world.path("backup");
    let said = world.ok(&["keys", "backup", "--out", backup.to_str().unwrap()]);
    assert!(String::from_utf8(said).unwrap().contains(&key));
    assert_eq!(fs::read(&backup).unwrap(), fs::read(world.path("envelog-data.keyring")).unwrap());

    world.ok(&["keys", "rewrap-keyring", "--service-cmk", &other]);
    world.ok(&["kms", "delete", &key, "--yes"]);
    assert_eq!(world.read("p/l"), b"one\ntwo\n");
    world.run(&["keys", "rewrap-keyring"]).assert(2);
    world.ok(&["keys", "rewrap-keyring", "--plain"]);
    assert_eq!(service_key()["cmk"], Value::Null);
    assert!(!String::from_utf8(world.ok(&["status"])).unwrap().contains("master key"));
    fs::remove_dir_all(world.path("envelog-data.kms")).unwrap();
    assert_eq!(world.read("p/l"), b"one\ntwo\n");
}

/// Every copy of the store would include a keyring backup inside it.
#[test]
fn no_backup_of_the_keyring_goes_into_the_store() {
    let world = World::new();
    world.create("p/a", &service("default"));
    std::os::unix::fs::symlink("envelog-data", world.path("link")).unwrap();
    for out in [
        "envelog-data/keyring",
        "envelog-data/audit/keyring",
        "link/keyring",
        "./envelog-data/../envelog-data/k",
    ] {
        let sentence = world.refused(7, &["keys", "backup", "--out", out]);
        assert!(sentence.contains("inside the store directory"), "{out}: {sentence}");
        assert!(!world.path(out).exists(), "{out}");
    }
    world.ok(&["keys", "backup", "--out", "keyring"]);
}
