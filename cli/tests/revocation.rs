//! Revocation of a customer's key: which commands are refused and with which status, in new and in
//! running processes.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    io::{Read, Write},
    process::ChildStdin,
    thread,
    time::{Duration, Instant},
};

use common::{ROLE, Running, World, byok, made_lines, service};
use serde_json::Value;

/// The time from a refusal at the KMS to the last operation that may still succeed:
/// `--revalidate-every 1s`, plus the timeout of one call.
const BOUND: Duration = Duration::from_secs(2);

/// A store with one Logstore under a customer's key and one under the service key, both with these
/// lines.
fn two_logstores(text: &[u8]) -> (World, String) {
    let world = World::new();
    let key = world.create_key();
    let file = world.file("lines", text);
    for (name, conf) in [("p/customer", byok("sm4", &key)), ("p/service", service("default"))] {
        world.create(name, &conf);
        world.ok(&["append", name, &file]);
    }
    (world, key)
}

fn key_state(world: &World, name: &str) -> Value {
    world.json(&["status", name, "--json"])["logstores"][0]["key"].clone()
}

/// Checks that every command that needs the customer's key fails with status 3 and a sentence with
/// these words.
fn assert_refused(world: &World, words: &[&str]) {
    let file = world.file("more", "more\n");
    let commands = [
        &["append", "p/customer", &file][..],
        &["read", "p/customer"],
        &["tail", "p/customer"],
        &["tail", "p/customer", "-f"],
        &["verify", "p/customer"],
        &["verify"],
        &["keys", "rotate-data", "p/customer"],
        &["keys", "rewrap", "p/customer"],
    ];
    for command in commands {
        let sentence = world.refused(3, command);
        for word in [&["p/customer"], words].concat() {
            assert!(sentence.contains(word), "{command:?}: \"{word}\" is missing: {sentence}");
        }
        let (kind, message) = world.run(&[command, &["--json"]].concat()).json_error(3);
        assert_eq!((kind.as_str(), message), ("revoked", sentence), "{command:?}");
    }
}

#[test]
fn a_disabled_key_refuses_only_its_logstore_until_enabled() {
    let text = made_lines(5_000);
    let (world, key) = two_logstores(&text);
    assert_eq!(key_state(&world, "p/customer")["state"], "active");
    world.ok(&["kms", "disable", &key]);
    assert_refused(&world, &[&key, "disabled"]);
    let state = key_state(&world, "p/customer");
    assert_eq!((&state["state"], &state["reason"]), (&"revoked".into(), &"disabled".into()));

    // The other Logstore still works, and so does every command that needs no key.
    world.ok(&["append", "p/service", &world.file("more", "more\n")]);
    assert_eq!(world.read("p/service"), [&text[..], b"more\n"].concat());
    assert_eq!(key_state(&world, "p/service")["state"], "active");
    world.ok(&["verify", "p/service"]);
    world.ok(&["verify", "--keyless"]);
    world.ok(&["verify", "p/customer", "--keyless"]);
    let mut config = world.json(&["get", "p/customer"]);
    config["compression"] = "zstd".into();
    world.ok(&["update", "p/customer", "--config", &config.to_string()]);
    world.ok(&["create", "p/another"]);
    // The key authenticates the retention setting.
    let mut config = world.json(&["get", "p/customer"]);
    config["ttl_days"] = 30.into();
    let update = ["update", "p/customer", "--config", &config.to_string()];
    assert!(world.refused(3, &update).contains("disabled"));
    assert!(world.json(&["get", "p/customer"])["ttl_days"].is_null());

    world.ok(&["kms", "enable", &key]);
    world.ok(&update);
    assert_eq!(world.read("p/customer"), text);
    world.ok(&["append", "p/customer", &world.file("more", "more\n")]);
    assert_eq!(world.read("p/customer"), [&text[..], b"more\n"].concat());
    world.ok(&["verify"]);
    let events: Vec<_> = world.json(&["keys", "audit", "--json"])["records"]
        .as_array()
        .unwrap()
        .iter()
        .map(|record| record["event"].as_str().unwrap().to_owned())
        .collect();
    for event in ["store_created", "created", "revoked"] {
        assert!(events.iter().any(|it| it == event), "no {event} in {events:?}");
    }
}

#[test]
fn every_way_to_withdraw_a_key_has_its_words_and_its_way_back() {
    let text = made_lines(100);
    let (world, key) = two_logstores(&text);
    let ways = [
        (vec!["ungrant", &key, ROLE], "not permitted for the role", vec!["grant", &key, ROLE]),
        (
            vec!["schedule-deletion", &key, "--days", "9"],
            "pending deletion",
            vec!["cancel-deletion", &key],
        ),
        (vec!["disable", &key], "disabled", vec!["enable", &key]),
    ];
    for (away, words, back) in ways {
        world.ok(&[&["kms"], &away[..]].concat());
        assert!(world.refused(3, &["read", "p/customer"]).contains(words), "{words}");
        world.ok(&[&["kms"], &back[..]].concat());
        assert_eq!(world.read("p/customer"), text, "after {words}");
    }
    world.ok(&["kms", "delete", &key]);
    assert!(world.refused(3, &["read", "p/customer"]).contains("deleted"));
    // Deleting needs no key.
    world.ok(&["delete", "p/customer", "--yes"]);
    world.ok(&["verify"]);
}

#[test]
fn encryption_that_is_switched_off_does_not_get_around_the_key() {
    let text = made_lines(100);
    let (world, key) = two_logstores(&text);
    let mut config = world.json(&["get", "p/customer"]);
    config["encrypt_conf"]["enable"] = false.into();
    world.ok(&["update", "p/customer", "--config", &config.to_string()]);
    world.ok(&["append", "p/customer", &world.file("more", "more\n")]);
    world.ok(&["kms", "disable", &key]);
    assert_refused(&world, &["disabled"]);
    world.ok(&["kms", "enable", &key]);
    assert_eq!(world.read("p/customer"), [&text[..], b"more\n"].concat());
}

/// Writes lines into `stdin` until the process closes it.
fn feed(mut stdin: ChildStdin) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for number in 0.. {
            if writeln!(stdin, "line {number}").is_err() {
                break;
            }
        }
    })
}

#[test]
fn running_processes_end_when_the_key_is_withdrawn() {
    let world = World::new();
    let key = world.create_key();
    let kms = world.path("envelog-data.kms");
    let conf = byok("default", &key).to_string();
    // A store has one writing process, so each appending process has its own store. The key is the
    // same.
    let at = |store: &str, args: &[&str]| {
        let global =
            ["--store", store, "--kms-dir", kms.to_str().unwrap(), "--revalidate-every", "1s"];
        world.command(&[&global, args].concat())
    };
    let lines = made_lines(100_000);
    let file = world.file("lines", &lines);
    for store in ["idle", "endless", "busy", "read"] {
        Running::start(at(store, &["create", "p/a", "--encrypt-conf", &conf])).finish().assert(0);
    }
    Running::start(at("read", &["append", "p/a", &file, "--durability", "written"]))
        .finish()
        .assert(0);

    let mut idle = Running::start(at("idle", &["append", "p/a", "-", "--ack"]));
    let idle_acks = idle.lines();
    idle.stdin.as_mut().unwrap().write_all(b"one\n").unwrap();
    assert_eq!(idle_acks.recv().unwrap(), "1");

    // A line that never ends: the input is never idle, and no group is ever submitted.
    let mut endless = Running::start(at("endless", &["append", "p/a", "-", "--ack"]));
    let endless_acks = endless.lines();
    let mut endless_in = endless.stdin.take().unwrap();
    endless_in.write_all(b"one\n").unwrap();
    assert_eq!(endless_acks.recv().unwrap(), "1");
    let dripping = thread::spawn(move || {
        // At this rate the line stays below the maximum length for longer than the test runs.
        while endless_in.write_all(b"x").is_ok() {
            thread::sleep(Duration::from_millis(5));
        }
    });

    let mut busy =
        Running::start(at("busy", &["append", "p/a", "-", "--ack", "--durability", "written"]));
    let busy_acks = busy.lines();
    let feeding = feed(busy.stdin.take().unwrap());
    let first_ack = busy_acks.recv().unwrap();

    let mut tail = Running::start(at("read", &["tail", "p/a", "-n", "1", "-f"]));
    let tail_lines = tail.lines();
    assert!(lines.ends_with(format!("{}\n", tail_lines.recv().unwrap()).as_bytes()));

    let mut read = Running::start(at("read", &["read", "p/a"]));
    let mut out = read.stdout.take().unwrap();
    let mut head = vec![0; 1000];
    out.read_exact(&mut head).unwrap();

    world.ok(&["kms", "disable", &key]);
    let disabled = Instant::now();
    for (what, process) in [("idle", idle), ("endless", endless), ("busy", busy), ("tail -f", tail)]
    {
        let sentence = process.wait().sentence(3);
        assert!(sentence.contains("p/a") && sentence.contains("disabled"), "{what}: {sentence}");
    }
    feeding.join().unwrap();
    dripping.join().unwrap();
    // This process waits for its pipe. Continue reading only after the bound, since its next read
    // is refused from then on.
    thread::sleep(BOUND.saturating_sub(disabled.elapsed()));
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).unwrap();
    let sentence = read.finish().sentence(3);
    assert!(sentence.contains("disabled"), "{sentence}");
    let got = [head, rest].concat();
    assert!(
        got.len() < lines.len() && lines.starts_with(&got),
        "{} of {} bytes",
        got.len(),
        lines.len()
    );

    // All acknowledged lines are present, and no line that was never sent.
    world.ok(&["kms", "enable", &key]);
    let last_ack: usize = busy_acks.iter().last().unwrap_or(first_ack).parse().unwrap();
    let kept =
        String::from_utf8(Running::start(at("busy", &["read", "p/a"])).finish().stdout).unwrap();
    assert!(
        kept.lines().count() >= last_ack,
        "{} lines of {last_ack} acknowledged",
        kept.lines().count()
    );
    assert!(kept.lines().enumerate().all(|(number, line)| line == format!("line {number}")));
    for (store, expected) in [("idle", &b"one\n"[..]), ("endless", b"one\n"), ("read", &lines)] {
        let out = Running::start(at(store, &["read", "p/a"])).finish();
        assert!(out.stdout == expected, "{store}: {} bytes", out.stdout.len());
        Running::start(at(store, &["verify"])).finish().assert(0);
    }
}

#[test]
fn running_processes_end_when_the_service_key_is_withdrawn() {
    let world = World::new();
    let key = world.create_key();
    let cmk = byok("default", &key)["user_cmk_info"].to_string();
    world.ok(&[
        "create",
        "p/service",
        "--encrypt-conf",
        &service("sm4").to_string(),
        "--service-cmk",
        &cmk,
    ]);
    world.create("p/plain", &serde_json::json!({ "enable": false }));
    let every = |args: &[&str]| world.command(&[&["--revalidate-every", "1s"], args].concat());
    let mut append = Running::start(every(&["append", "p/service", "-", "--ack"]));
    let acks = append.lines();
    append.stdin.as_mut().unwrap().write_all(b"one\n").unwrap();
    assert_eq!(acks.recv().unwrap(), "1");
    let mut tail = Running::start(every(&["tail", "p/service", "-n", "1", "-f"]));
    let tail_lines = tail.lines();
    assert_eq!(tail_lines.recv().unwrap(), "one");
    let mut plain = Running::start(every(&["tail", "p/plain", "-f"]));
    let _plain_lines = plain.lines();
    // The other processes have the default grace of an hour. This one ends sooner.
    let hasty = ["--service-outage-grace", "2s", "tail", "p/service", "-n", "1", "-f"];
    let mut hasty = Running::start(every(&hasty));
    let hasty_lines = hasty.lines();
    assert_eq!(hasty_lines.recv().unwrap(), "one");
    let (kms, away) = (world.path("envelog-data.kms"), world.path("away"));
    fs::rename(&kms, &away).unwrap();
    assert!(hasty.wait().sentence(4).contains(&key));
    append.stdin.as_mut().unwrap().write_all(b"two\n").unwrap();
    assert_eq!(acks.recv().unwrap(), "2");
    fs::rename(&away, &kms).unwrap();

    world.ok(&["kms", "disable", &key]);
    for (what, process) in [("append", append), ("tail", tail), ("plain", plain)] {
        let sentence = process.wait().sentence(3);
        assert!(sentence.contains(&key) && sentence.contains("disabled"), "{what}: {sentence}");
    }
    world.refused(3, &["status"]);
    world.ok(&["kms", "enable", &key]);
    assert_eq!(world.read("p/service"), b"one\ntwo\n");
    // The next writer records the return.
    world.ok(&["append", "p/service", &world.file("more", "three\n")]);
    assert_eq!(world.read("p/service"), b"one\ntwo\nthree\n");
    world.ok(&["verify"]);
    let records = world.json(&["keys", "audit", "--json"])["records"].clone();
    let of_store = |event: &str| {
        let is_it = |record: &&Value| {
            record["event"] == event && record.get("logstore").is_none_or(Value::is_null)
        };
        records.as_array().unwrap().iter().filter(is_it).count()
    };
    assert_eq!((of_store("revoked"), of_store("recovered")), (1, 1), "{records}");
}

#[test]
fn an_outage_is_ridden_out_for_its_grace_and_then_refused() {
    let text = made_lines(1000);
    let (world, key) = two_logstores(&text);
    // Another store under the same key, with a process that uses the default grace period.
    let patient =
        ["--store", "patient", "--kms-dir", "envelog-data.kms", "--revalidate-every", "1s"];
    world.ok(&[&["create", "p/a", "--encrypt-conf", &byok("sm4", &key).to_string()][..], &patient]
        .concat());
    let mut rides =
        Running::start(world.command(&[&["append", "p/a", "-", "--ack"][..], &patient].concat()));
    let rides_acks = rides.lines();
    rides.stdin.as_mut().unwrap().write_all(b"before\n").unwrap();
    assert_eq!(rides_acks.recv().unwrap(), "1");
    let (kms, away) = (world.path("envelog-data.kms"), world.path("away"));
    let short = ["--revalidate-every", "1s", "--outage-grace", "2s"];
    let mut append = Running::start(
        world.command(&[&["append", "p/customer", "-", "--ack"][..], &short].concat()),
    );
    let acks = append.lines();
    append.stdin.as_mut().unwrap().write_all(b"before\n").unwrap();
    assert_eq!(acks.recv().unwrap(), "1");
    let mut tail = Running::start(
        world.command(&[&["tail", "p/customer", "-f", "-n", "1"][..], &short].concat()),
    );
    assert_eq!(tail.lines().recv().unwrap(), "before");

    fs::rename(&kms, &away).unwrap();
    for process in [append, tail] {
        let sentence = process.wait().sentence(4);
        assert!(sentence.contains("p/customer"), "{sentence}");
    }
    rides.stdin.as_mut().unwrap().write_all(b"during\n").unwrap();
    assert_eq!(rides_acks.recv().unwrap(), "2", "the last good answer still counts");
    // A new process has no lease from before the outage.
    let file = world.file("more", "more\n");
    for command in [&["append", "p/customer", &file][..], &["read", "p/customer"], &["verify"]] {
        let sentence = world.refused(4, command);
        assert!(sentence.contains("p/customer"), "{sentence}");
        let (kind, _) = world.run(&[command, &["--json"]].concat()).json_error(4);
        assert_eq!(kind, "kms_unreachable");
    }
    assert!(world.refused(4, &["kms", "list"]).contains("no embedded KMS"));
    assert_eq!(key_state(&world, "p/customer")["state"], "outage");
    assert_eq!(world.read("p/service"), text);

    fs::rename(&away, &kms).unwrap();
    rides.finish().assert(0);
    assert_eq!(world.ok(&[&["read", "p/a"][..], &patient].concat()), b"before\nduring\n");
    assert_eq!(world.read("p/customer"), [&text[..], b"before\n"].concat());
    world.ok(&["verify"]);
}

#[test]
fn corruption_outranks_a_refusal_and_a_refusal_an_outage() {
    let (world, key) = two_logstores(&made_lines(1000));
    // Another customer, with another KMS.
    let elsewhere = world.path("elsewhere");
    let elsewhere = elsewhere.to_str().unwrap();
    let made = world.ok(&[
        "kms",
        "create-key",
        "--region",
        "eu-central-1",
        "--grant",
        ROLE,
        "--kms-dir",
        elsewhere,
    ]);
    let mut conf = byok("default", String::from_utf8(made).unwrap().trim_end());
    conf["user_cmk_info"]["region_id"] = "eu-central-1".into();
    let url = format!("local:{elsewhere}");
    world.ok(&["create", "p/other", "--encrypt-conf", &conf.to_string(), "--kms", &url]);
    world.ok(&["append", "p/other", &world.file("more", "more\n"), "--kms", &url]);
    world.ok(&["verify", "--kms", &url]);

    // That KMS is missing: status 4.
    world.refused(4, &["verify"]);
    world.ok(&["kms", "disable", &key]);
    assert!(world.refused(3, &["verify"]).contains("disabled"));
    let segment = &world.segments("envelog-data")[0];
    let mut bytes = fs::read(segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(segment, bytes).unwrap();
    let out = world.run(&["verify", "--json"]);
    assert_eq!(out.json_error(5).0, "corrupt");
    let report: Value = serde_json::from_str(&out.text()).unwrap();
    assert_eq!(report["ok"], false);
    assert_eq!(report["faults"].as_array().unwrap().len(), 1, "{report}");
    let refused: Vec<_> = report["refused"]
        .as_array()
        .unwrap()
        .iter()
        .map(|it| it["kind"].as_str().unwrap())
        .collect();
    assert_eq!(refused, ["revoked", "kms_unreachable"]);
}
