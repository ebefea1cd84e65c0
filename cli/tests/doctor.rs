//! `doctor`: it finds what needs an action, says what to do, and changes nothing.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt,
};

use common::{Running, World, byok, made_lines, service};
use serde_json::Value;

/// A store with three Logstores, and the key of the third.
fn world() -> (World, String) {
    let world = World::new();
    let key = world.create_key();
    world.create("p/plain", &Value::Null);
    world.create("p/service", &service("default"));
    world.create("p/byok", &byok("sm4", &key));
    let lines = world.file("lines", made_lines(100));
    for name in ["p/plain", "p/service", "p/byok"] {
        world.ok(&["append", name, &lines]);
    }
    (world, key)
}

/// The findings that need an action, but for those about the machine of the test: its disk may be
/// nearly full, and it may not lock memory.
fn actions(world: &World, args: &[&str]) -> Vec<Value> {
    let out = world.run(&[&["doctor", "--json"], args].concat());
    let answer: Value = serde_json::from_slice(&out.stdout).unwrap();
    let findings = answer["findings"].as_array().unwrap();
    let needs = |it: &&Value| !it["action"].is_null();
    let all: Vec<_> = findings.iter().filter(needs).cloned().collect();
    assert_eq!(answer["ok"], all.is_empty(), "{answer:#}");
    out.assert(if all.is_empty() { 0 } else { 1 });
    let of_machine =
        |it: &Value| ["disk space", "memory"].contains(&it["subject"].as_str().unwrap());
    all.into_iter().filter(|it| !of_machine(it)).collect()
}

fn only(world: &World, args: &[&str], subject: &str, logstore: Value, words: &str) {
    let found = actions(world, args);
    let [finding] = &found[..] else { panic!("{subject}: {found:#?}") };
    assert_eq!((&finding["subject"], &finding["logstore"]), (&subject.into(), &logstore));
    assert!(finding.to_string().contains(words), "{finding:#}");
}

#[test]
fn a_sound_store_needs_nothing() {
    let (world, _) = world();
    assert_eq!(actions(&world, &[]), Vec::<Value>::new());
    let answer: Value = serde_json::from_slice(&world.run(&["doctor", "--json"]).stdout).unwrap();
    let subjects: Vec<_> =
        answer["findings"].as_array().unwrap().iter().map(|it| &it["subject"]).collect();
    for subject in [
        "settings",
        "clock",
        "memory",
        "store",
        "keyring",
        "anchor",
        "key audit log",
        "backup",
        "reserve",
        "Logstores",
        "permissions",
        "disk space",
    ] {
        let found = subjects.iter().filter(|it| **it == subject).count();
        assert!(found == 1 || subject == "disk space" && found > 1, "{subject}: {subjects:?}");
    }
    let text = world.run(&["doctor"]).text();
    for word in ["keyring", "3 of 3 need nothing", "free"] {
        assert!(text.contains(word), "{word}: {text}");
    }
}

#[test]
fn it_looks_at_the_age_of_the_last_backup() {
    let (world, _) = world();
    let about_backup = |args: &[&str]| {
        let found = actions(&world, args);
        found.into_iter().filter(|finding| finding["subject"] == "backup").collect::<Vec<_>>()
    };
    let none = about_backup(&["--backup", "backup"]);
    assert!(none[0]["action"].as_str().unwrap().contains("envelog backup backup"), "{none:?}");
    world.ok(&["backup", "backup"]);
    assert_eq!(about_backup(&["--backup", "backup"]), Vec::<Value>::new());
    let old = about_backup(&["--backup", "backup", "--backup-age", "1us"]);
    assert!(old[0]["found"].as_str().unwrap().contains("older than"), "{old:?}");
    let record = world.path("backup/BACKUP");
    let mut json: Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    let mut future = json.clone();
    for moment in ["begun_us", "finished_us"] {
        future[moment] = (json[moment].as_u64().unwrap() + 48 * 3_600_000_000).into();
    }
    fs::write(&record, future.to_string()).unwrap();
    let ahead = about_backup(&["--backup", "backup"]);
    assert!(ahead[0]["found"].as_str().unwrap().contains("in the future"), "{ahead:?}");
    json.as_object_mut().unwrap().remove("finished_us");
    fs::write(&record, json.to_string()).unwrap();
    let unfinished = about_backup(&["--backup", "backup"]);
    assert!(unfinished[0]["found"].as_str().unwrap().contains("not finished"), "{unfinished:?}");
    fs::write(&record, "junk").unwrap();
    assert_eq!(about_backup(&["--backup", "backup"]).len(), 1);
}

/// The clock has one finding, also if the store trusts a time.
#[test]
fn a_store_with_retention_by_age_has_one_finding_about_the_clock() {
    let world = World::new();
    world.ok(&["create", "p/l"]);
    let mut config = world.json(&["get", "p/l"]);
    config["ttl_days"] = 1.into();
    world.ok(&["update", "p/l", "--config", &config.to_string()]);
    world.ok(&["retain"]);
    let status = world.json(&["status", "--json"]);
    assert!(status["retention"]["trusted_us"].is_u64(), "{status}");
    let answer: Value = serde_json::from_slice(&world.run(&["doctor", "--json"]).stdout).unwrap();
    let findings = answer["findings"].as_array().unwrap();
    assert_eq!(findings.iter().filter(|it| it["subject"] == "clock").count(), 1, "{answer:#}");
}

#[test]
fn it_works_beside_a_writer_and_changes_nothing() {
    let (world, _) = world();
    let before = files(&world);
    actions(&world, &[]);
    assert_eq!(files(&world), before);
    let mut writer = Running::start(world.command(&["append", "p/plain", "-", "--ack"]));
    let acks = writer.lines();
    std::io::Write::write_all(writer.stdin.as_mut().unwrap(), b"one\n").unwrap();
    acks.recv().unwrap();
    assert_eq!(actions(&world, &[]), Vec::<Value>::new());
    writer.finish().assert(0);
}

/// The files of the store and their contents.
fn files(world: &World) -> Vec<(std::path::PathBuf, Vec<u8>)> {
    let (mut dirs, mut files) = (vec![world.path("envelog-data")], Vec::new());
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                files.push((path.clone(), fs::read(path).unwrap()));
            }
        }
    }
    files.sort();
    files
}

#[test]
fn each_fault_has_its_finding_and_its_action() {
    let (world, key) = world();
    let nothing = Value::Null;

    world.ok(&["kms", "disable", &key]);
    only(&world, &[], "master key", "p/byok".into(), "the owner of the key");
    world.ok(&["kms", "enable", &key]);

    let (kms, away) = (world.path("envelog-data.kms"), world.path("away"));
    fs::rename(&kms, &away).unwrap();
    only(&world, &[], "master key", "p/byok".into(), "check the KMS");
    fs::rename(&away, &kms).unwrap();

    let store = world.path("envelog-data");
    fs::set_permissions(&store, Permissions::from_mode(0o755)).unwrap();
    only(&world, &[], "permissions", nothing.clone(), "chmod 700");
    only(&world, &["--group-read"], "permissions", nothing.clone(), "chmod 750");
    fs::set_permissions(&store, Permissions::from_mode(0o750)).unwrap();
    assert_eq!(actions(&world, &["--group-read"]), Vec::<Value>::new());
    fs::set_permissions(&store, Permissions::from_mode(0o700)).unwrap();

    let keyring = world.path("envelog-data.keyring");
    fs::set_permissions(&keyring, Permissions::from_mode(0o644)).unwrap();
    only(&world, &[], "store", nothing.clone(), "chmod 600");
    fs::set_permissions(&keyring, Permissions::from_mode(0o600)).unwrap();
    fs::rename(&keyring, world.path("away")).unwrap();
    only(&world, &[], "store", nothing.clone(), "restore it from its backup");
    fs::rename(world.path("away"), &keyring).unwrap();

    only(&world, &["--workers", "65"], "settings", nothing.clone(), "workers");
    only(&world, &["--store", "nowhere"], "store", nothing.clone(), "create");

    // The end of the audit log is missing.
    let audit = fs::read_dir(store.join("audit")).unwrap().next().unwrap().unwrap().path();
    let whole = fs::read(&audit).unwrap();
    fs::write(&audit, &whole[..whole.len() / 2]).unwrap();
    only(&world, &[], "key audit log", nothing.clone(), "verify");
    fs::write(&audit, whole).unwrap();

    // A segment is gone.
    let segment = world.segments("envelog-data")[0].clone();
    fs::write(&segment, b"").unwrap();
    let found = actions(&world, &[]);
    assert!(
        found.len() == 1 && found[0]["action"].as_str().unwrap().contains("repair"),
        "{found:#?}"
    );
}

#[test]
fn an_anchor_that_is_not_given_is_found() {
    let world = World::new();
    fs::create_dir(world.path("anchor")).unwrap();
    world.ok(&["create", "p/a", "--anchor", "anchor"]);
    assert_eq!(actions(&world, &["--anchor", "anchor"]), Vec::<Value>::new());
    only(&world, &[], "anchor", Value::Null, "--anchor");
    // The store is older than its anchor.
    fs::write(world.path("lines"), made_lines(10)).unwrap();
    common::copy_dir(&world.path("envelog-data"), &world.path("older"));
    world.ok(&["append", "p/a", "lines", "--anchor", "anchor"]);
    let args = ["--anchor", "anchor", "--store", "older", "--keyring", "envelog-data.keyring"];
    let found = actions(&world, &args);
    assert!(found.iter().any(|it| it["subject"] == "store"), "{found:#?}");
}
