//! `backup` and `restore` with the real program, beside a process that appends.

#![allow(clippy::unwrap_used)]

mod common;

use std::{fs, io::Write};

use common::{Running, World, byok, copy_dir, made_lines, service};
use serde_json::Value;

#[test]
fn a_store_is_backed_up_while_it_is_written_and_restored() {
    let world = World::new();
    let key = world.create_key();
    world.create("p/service", &service("default"));
    world.create("p/byok", &byok("sm4", &key));
    let text = world.file("text", made_lines(3000));
    world.ok(&["append", "p/byok", &text]);
    let mut writer = Running::start(world.command(&[
        "append",
        "p/service",
        "-",
        "--ack",
        "--segment-bytes",
        "16KiB",
    ]));
    let acks = writer.lines();
    let mut send = |from: usize, to: usize| {
        let lines: Vec<u8> = made_lines(to)
            .split_inclusive(|byte| *byte == b'\n')
            .skip(from)
            .flatten()
            .copied()
            .collect();
        writer.stdin.as_mut().unwrap().write_all(&lines).unwrap();
        while acks.recv().unwrap().parse::<usize>().unwrap() < to {}
    };
    send(0, 2000);
    let first = world.json(&["backup", "backup", "--json"]);
    assert_eq!(
        (first["logstores"].as_u64(), first["faults"].as_array().unwrap().len()),
        (Some(2), 0)
    );
    send(2000, 2500);
    let said = String::from_utf8(world.ok(&["backup", "backup"])).unwrap();
    assert!(said.contains("has every log that was durable at"), "{said}");
    let again = world.json(&["backup", "backup", "--json"]);
    assert_eq!(again["bytes_copied"], 0);
    assert!(again["segments"].as_u64() >= first["segments"].as_u64());
    assert!(again["bytes"].as_u64() > first["bytes"].as_u64());
    writer.finish().assert(0);
    let record: Value =
        serde_json::from_slice(&fs::read(world.path("backup/BACKUP")).unwrap()).unwrap();
    assert_eq!(record["finished_us"], again["finished_us"]);

    // The backup is a store, and has no keyring.
    let keyring = ["--keyring", "envelog-data.keyring", "--kms-dir", "envelog-data.kms"];
    world.ok(&[&["verify", "--store", "backup"][..], &keyring].concat());
    world.refused(7, &["verify", "--store", "backup"]);

    // The disk is lost.
    fs::rename(world.path("envelog-data"), world.path("lost")).unwrap();
    let said = String::from_utf8(world.ok(&["restore", "backup"])).unwrap();
    assert!(said.contains("verify --against backup/checkpoint"), "{said}");
    assert_eq!(world.read("p/service"), made_lines(2500));
    assert_eq!(world.read("p/byok"), made_lines(3000));
    world.ok(&["verify", "--against", "backup/checkpoint"]);
    let above = world.run(&["read", "p/service", "--shard", "0", "--from", "5000000", "--json"]);
    assert_eq!(above.json_error(1).0, "above_end");
    world.run_with(&["append", "p/service"], b"after the restore\n").assert(0);
    let new = world.ok(&["read", "p/service", "--shard", "0", "--from", "5000000"]);
    assert_eq!(new, b"after the restore\n");
    world.ok(&["verify", "--against", "backup/checkpoint"]);
    assert_eq!(world.run(&["restore", "backup", "--json"]).json_error(1).0, "not_empty");
}

#[test]
fn a_restore_ends_at_a_time() {
    let world = World::new();
    world.create("p/l", &service("default"));
    world.run_with(&["append", "p/l"], b"early\n").assert(0);
    let at = world.json(&["read", "p/l", "--format", "json"]);
    let time = at["receive_time"].as_str().unwrap().to_owned();
    std::thread::sleep(std::time::Duration::from_millis(20));
    world.run_with(&["append", "p/l"], b"late\n").assert(0);
    world.ok(&["backup", "backup", "--copy"]);
    let keyring = ["--keyring", "envelog-data.keyring"];
    for (to, until, logs) in [
        ("at", time.as_str(), &b"early\n"[..]),
        ("before", "2020-01-01T00:00:00Z", b""),
        ("after", "@3000000000", b"early\nlate\n"),
    ] {
        world.ok(&[&["restore", "backup", "--store", to, "--until", until][..], &keyring].concat());
        let read = [&["read", "p/l", "--store", to][..], &keyring].concat();
        assert_eq!(world.ok(&read), logs, "{to}");
        world.ok(&[&["verify", "--store", to][..], &keyring].concat());
    }
    world.run(&["restore", "backup", "--store", "x", "--until", "yesterday"]).assert(2);
    fs::create_dir(world.path("empty")).unwrap();
    for nothing in ["nowhere", "empty"] {
        let refused = world.run(&["restore", nothing, "--store", "x"]);
        refused.assert(7);
        let said = format!("there is no backup at {nothing}");
        assert!(refused.stderr.contains(&said), "{}", refused.stderr);
        assert!(!refused.stderr.contains("create"), "{}", refused.stderr);
    }
}

#[test]
fn a_directory_with_other_contents_takes_no_backup() {
    let world = World::new();
    world.create("p/l", &Value::Null);
    fs::create_dir(world.path("other")).unwrap();
    world.file("other/file", "");
    for dir in ["other", "envelog-data", "envelog-data/within"] {
        let (kind, _) = world.run(&["backup", dir, "--json"]).json_error(7);
        assert_eq!(kind, "backup_refused", "{dir}");
    }
    assert_eq!(fs::read_dir(world.path("other")).unwrap().count(), 1);
}

/// The store is replaced by an older copy of it, and goes on from there.
#[test]
fn a_store_that_was_rolled_back_leaves_the_backup_as_it_is() {
    let world = World::new();
    world.create("p/l", &service("default"));
    let append = |text: &str| world.run_with(&["append", "p/l"], text.as_bytes()).assert(0);
    append("1\n");
    copy_dir(&world.path("envelog-data"), &world.path("old"));
    append("good\n");
    world.ok(&["backup", "backup", "--copy"]);
    fs::rename(world.path("envelog-data"), world.path("lost")).unwrap();
    fs::rename(world.path("old"), world.path("envelog-data")).unwrap();
    append("fork\n");
    for _ in 0..2 {
        let said = world.refused(5, &["backup", "backup", "--copy"]);
        assert!(said.contains("does not continue the backup in backup"), "{said}");
        append("more\n");
    }
    let keyring = ["--keyring", "envelog-data.keyring"];
    world.ok(&[&["verify", "--store", "backup"][..], &keyring].concat());
    assert_eq!(
        world.ok(&[&["read", "p/l", "--store", "backup"][..], &keyring].concat()),
        b"1\ngood\n"
    );
    world.ok(&["backup", "another"]);
}

#[test]
fn faults_of_the_store_and_of_the_backup_are_reported() {
    let world = World::new();
    world.create("p/l", &service("default"));
    for text in ["1\n", "2\n", "3\n"] {
        world.run_with(&["append", "p/l"], text.as_bytes()).assert(0);
    }
    world.ok(&["backup", "backup"]);
    // Overwritten in place, so that a backup with the same inode has it too.
    let second = |store: &str| {
        let mut all = world.segments(store);
        all.sort();
        all[1].clone()
    };
    fs::write(second("envelog-data"), "").unwrap();
    fs::write(second("backup"), "").unwrap();
    let out = world.run(&["backup", "backup"]);
    out.assert(5);
    assert!(out.text().contains("FAULT "), "{}", out.text());
    assert!(!out.text().contains("has every log that was durable"), "{}", out.text());
    assert!(out.text().contains("except where it says FAULT"), "{}", out.text());

    let keyring = ["--keyring", "envelog-data.keyring"];
    let out = world.run(&[&["restore", "backup", "--store", "restored"][..], &keyring].concat());
    out.assert(5);
    assert!(out.text().starts_with("FAULT "), "{}", out.text());
    assert!(out.text().contains(" in restored/logstores/"), "{}", out.text());
    let read =
        world.run(&[&["read", "p/l", "--store", "restored", "--skip-lost"][..], &keyring].concat());
    assert_eq!(read.text(), "1\n3\n");
}

#[test]
fn a_backup_without_its_record_takes_the_next_run() {
    let world = World::new();
    world.create("p/l", &Value::Null);
    world.ok(&["backup", "backup"]);
    fs::remove_file(world.path("backup/BACKUP")).unwrap();
    world.ok(&["backup", "backup"]);
    assert!(world.path("backup/BACKUP").exists());
}

/// Segments were copied by another tool a moment before the catalogue.
#[test]
fn a_plain_copy_of_a_live_store_is_read_and_repaired() {
    let world = World::new();
    world.create("p/l", &service("default"));
    let text = world.file("text", made_lines(100));
    world.ok(&["append", "p/l", &text]);
    fs::create_dir(world.path("copy")).unwrap();
    for part in ["logstores", "probes"] {
        copy_dir(&world.path("envelog-data").join(part), &world.path("copy").join(part));
    }
    world.run_with(&["append", "p/l"], b"one more\n").assert(0);
    world.ok(&["keys", "rotate-data", "p/l"]);
    for part in ["audit", "catalogue"] {
        copy_dir(&world.path("envelog-data").join(part), &world.path("copy").join(part));
    }
    fs::copy(world.path("envelog-data/STORE"), world.path("copy/STORE")).unwrap();
    fs::copy(world.path("envelog-data.keyring"), world.path("copy.keyring")).unwrap();
    let kind = world.run(&["read", "p/l", "--store", "copy", "--json"]).json_error(5).0;
    assert_eq!(kind, "rolled_back", "the metadata was copied too early");
    let repair = ["repair", "p/l", "--shard", "0", "--yes", "--store", "copy"];
    world.refused(5, &repair);
    world.ok(&[&repair[..], &["--accept-tampered"]].concat());
    let read = world.run(&["read", "p/l", "--store", "copy"]);
    read.assert(0);
    assert_eq!(read.stdout, made_lines(100));
    world.run_with(&["append", "p/l", "--store", "copy"], b"x\n").assert(0);
    world.run(&["verify", "p/l", "--store", "copy"]).assert(0);
}
