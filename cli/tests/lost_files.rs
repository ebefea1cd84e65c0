//! Lost files: segments, empty directories, and copies that are older than their catalogue.

#![allow(clippy::unwrap_used)]

mod common;

use std::{fs, os::unix::fs::symlink, path::Path, process::Command};

use common::{World, byok, copy_dir, service};
use serde_json::json;

/// A Logstore with four segments of three logs each.
fn filled() -> World {
    let world = World::new();
    world.create("p/l", &service("default"));
    for segment in 1..=4 {
        let lines: String = (1..=3).map(|line| format!("{segment}.{line}\n")).collect();
        world.ok(&["append", "p/l", &world.file("lines", lines)]);
    }
    world
}

fn segment(world: &World, ordinal: u32) -> std::path::PathBuf {
    let begins = |path: &Path| {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        name.starts_with(&format!("{ordinal:010}-"))
    };
    world.segments("envelog-data").into_iter().find(|path| begins(path)).unwrap()
}

#[test]
fn a_lost_segment_is_skipped_and_its_loss_accepted() {
    for lost in 1..=4 {
        let world = filled();
        world.ok(&["checkpoint", "--out", "before"]);
        fs::remove_file(segment(&world, lost)).unwrap();
        let all = |lost: u32| -> String {
            let segments = (1..=4).filter(|segment| *segment != lost);
            segments.flat_map(|n| (1..=3).map(move |line| format!("{n}.{line}\n"))).collect()
        };

        let read = world.run(&["read", "p/l"]);
        read.assert(5);
        assert_eq!(read.text(), all(lost)[..12 * (lost as usize - 1)]);
        assert!(read.stderr.contains("groups of shard 0 are lost"), "{}", read.stderr);
        let skipped = world.run(&["read", "p/l", "--skip-lost"]);
        skipped.assert(0);
        assert_eq!(skipped.text(), all(lost));
        assert!(skipped.stderr.contains("shard 0 has lost groups"), "{}", skipped.stderr);
        world.refused(5, &["verify"]);
        world.refused(2, &["repair", "p/l", "--shard", "0"]);

        let report = world.json(&["repair", "p/l", "--shard", "0", "--yes", "--json"]);
        assert_eq!(report["losses"][0]["first_ordinal"], json!(lost));
        world.ok(&["append", "p/l", &world.file("more", "more\n")]);
        let read = world.run(&["read", "p/l"]);
        read.assert(0);
        assert_eq!(read.text(), all(lost) + "more\n");
        assert!(read.stderr.contains("an operator has accepted that"), "{}", read.stderr);
        let verified = String::from_utf8(world.ok(&["verify"])).unwrap();
        assert!(verified.contains("the loss was accepted"), "{verified}");
        world.refused(5, &["verify", "--against", "before"]);
        let status = world.json(&["status", "--json"]);
        assert_eq!(status["logstores"][0]["losses"][0]["last_ordinal"], json!(lost));
        let audit = world.json(&["keys", "audit", "--json"]);
        let accepted = audit["records"].as_array().unwrap().iter();
        assert_eq!(accepted.filter(|record| record["event"] == "loss_accepted").count(), 1);
        world.ok(&["checkpoint", "--out", "after"]);
        world.ok(&["verify", "--against", "after"]);
        let again = world.json(&["repair", "p/l", "--shard", "0", "--yes", "--json"]);
        assert_eq!(again["losses"], json!([]));
    }
}

/// Both copies of the metadata of a Logstore, the audit log and a segment of another are lost.
#[test]
fn the_losses_of_a_store_are_accepted() {
    let world = filled();
    let logstores = || -> Vec<_> {
        let entries = fs::read_dir(world.path("envelog-data/logstores")).unwrap();
        entries.map(|entry| entry.unwrap().path()).collect()
    };
    let kept = logstores();
    world.create("p/gone", &service("sm4"));
    let gone = logstores().into_iter().find(|dir| !kept.contains(dir)).unwrap();
    world.ok(&["checkpoint", "--out", "before"]);
    for entry in fs::read_dir(&gone).unwrap().map(Result::unwrap) {
        if entry.file_name().to_str().unwrap().starts_with("meta-") {
            fs::remove_file(entry.path()).unwrap();
        }
    }
    fs::remove_file(segment(&world, 2)).unwrap();
    fs::remove_dir_all(world.path("envelog-data/audit")).unwrap();

    world.refused(5, &["verify"]);
    world.refused(5, &["append", "p/gone", &world.file("more", "more\n")]);
    world.refused(2, &["repair"]);
    world.run(&["repair", "--give-up", "--yes"]).assert(2);
    world.refused(2, &["repair", "p/l", "--yes"]);
    let repaired = world.run(&["repair", "--yes", "--json"]);
    repaired.assert(5);
    let report: serde_json::Value = serde_json::from_slice(&repaired.stdout).unwrap();
    assert_eq!(report["audit"]["code"], json!("truncated"));
    assert_eq!(report["shards"][0]["losses"][0]["first_ordinal"], json!(2));
    assert_eq!(report["failed"][0]["logstore"], json!("p/gone"));
    world.refused(2, &["repair", "--give-up", "p/l", "--yes"]);
    let given_up = world.json(&["repair", "--give-up", "p/gone", "--yes", "--json"]);
    assert_eq!(given_up, json!({"deleted": "p/gone", "left": []}));
    world.ok(&["verify"]);
    world.ok(&["append", "p/l", &world.file("more", "more\n")]);
    let left = b"1.1\n1.2\n1.3\n3.1\n3.2\n3.3\n4.1\n4.2\n4.3\nmore\n";
    assert_eq!(world.run(&["read", "p/l"]).stdout, left);
    let audit = world.json(&["keys", "audit", "--json"]);
    let records = audit["records"].as_array().unwrap();
    let of = |event: &str| records.iter().filter(|record| record["event"] == event).count();
    assert_eq!((of("loss_accepted"), of("given_up"), of("deleted")), (2, 1, 1));
    world.refused(5, &["verify", "--against", "before"]);
    world.ok(&["checkpoint", "--out", "after"]);
    world.ok(&["verify", "--against", "after"]);
    // Each acceptance stays visible.
    let accepted = ["the loss of the key audit log", "p/gone", "shard 0 of p/l has lost groups"];
    let notes = String::from_utf8(world.ok(&["verify"])).unwrap();
    let status = String::from_utf8(world.ok(&["status"])).unwrap();
    assert!(accepted.iter().all(|what| notes.contains(what)), "{notes}");
    let shown = ["the loss of the key audit log", "p/gone", "p/l: shard 0 has lost groups"];
    assert!(shown.iter().all(|what| status.contains(what)), "{status}");
    let status = world.json(&["status", "--json"]);
    let events: Vec<_> = status["audit"]["accepted"].as_array().unwrap().iter().collect();
    assert_eq!(
        (&events[0]["event"], &events[1]["event"]),
        (&json!("loss_accepted"), &json!("given_up"))
    );
    assert_eq!(status["audit"]["fault"], json!(null));
    world.create("p/gone", &service("sm4"));
}

/// `status` says that the key audit log is damaged, and shows the Logstores all the same.
#[test]
fn a_damaged_audit_log_hides_no_status() {
    let world = filled();
    fs::remove_dir_all(world.path("envelog-data/audit")).unwrap();
    let status = String::from_utf8(world.ok(&["status"])).unwrap();
    assert!(
        status.contains("p/l") && status.contains("the key audit log cannot be read"),
        "{status}"
    );
    let status = world.json(&["status", "--json"]);
    assert_eq!(status["audit"]["fault"]["code"], json!("truncated"));
    world.ok(&["repair", "--yes"]);
    let status = world.json(&["status", "--json"]);
    assert_eq!(status["audit"]["accepted"][0]["event"], json!("loss_accepted"));
}

/// Another object has the name of a file that a writer needs.
#[test]
fn verify_reports_what_no_writer_can_use() {
    for file in ["LOCK", "EPOCH"] {
        for object in ["directory", "link", "dangling link", "fifo"] {
            let world = filled();
            let path = world.path("envelog-data").join(file);
            let _ = fs::remove_file(&path);
            world.ok(&["verify"]);
            let aside = world.path("aside");
            fs::write(&aside, "").unwrap();
            match object {
                "directory" => fs::create_dir(&path).unwrap(),
                "link" => symlink(&aside, &path).unwrap(),
                "dangling link" => symlink("nowhere", &path).unwrap(),
                _ => assert!(Command::new("mkfifo").arg(&path).status().unwrap().success()),
            }
            let verified = world.run(&["verify", "--json"]);
            verified.assert(5);
            let report: serde_json::Value = serde_json::from_slice(&verified.stdout).unwrap();
            let fault = &report["faults"][0];
            assert_eq!(fault["code"], json!("wrong_file_type"), "{file} {object}: {report}");
            assert!(fault["file"].as_str().unwrap().ends_with(file), "{report}");
            assert!(world.read("p/l").starts_with(b"1.1\n"));
            world.run(&["append", "p/l", &world.file("more", "more\n")]).assert(5);
        }
    }
}

/// A checkpoint of a damaged store says so, and has everything else.
#[test]
fn a_checkpoint_names_missing_segments() {
    let world = filled();
    world.create("p/other", &service("sm4"));
    world.ok(&["append", "p/other", &world.file("lines", "other\n")]);
    fs::remove_file(segment(&world, 2)).unwrap();
    let checkpoint = world.run(&["checkpoint", "--out", "damaged", "--json"]);
    checkpoint.assert(5);
    let answer: serde_json::Value = serde_json::from_slice(&checkpoint.stdout).unwrap();
    assert_eq!(answer["failed"][0]["name"], json!("p/l"), "{answer}");
    assert_eq!(answer["failed"][0]["error"]["code"], json!("truncated"), "{answer}");
    world.ok(&["verify", "p/other", "--against", "damaged"]);
    world.ok(&["repair", "p/l", "--shard", "0", "--yes"]);
    world.ok(&["checkpoint", "--out", "repaired"]);
    world.ok(&["verify", "--against", "repaired"]);
}

#[test]
fn history_that_cannot_be_read_fails_no_tail() {
    let newest = b"4.1\n4.2\n4.3\n";
    for fault in ["lost", "junk", "exchanged", "shredded"] {
        let world = filled();
        let (first, second) = (segment(&world, 1), segment(&world, 2));
        match fault {
            "lost" => fs::remove_file(&first).unwrap(),
            "junk" => fs::write(&first, "junk").unwrap(),
            "exchanged" => drop(fs::copy(&second, &first).unwrap()),
            _ => {
                world.ok(&["keys", "rotate-data", "p/l"]);
                world.ok(&["keys", "shred", "p/l", "--version", "1", "--yes"]);
                world.ok(&["append", "p/l", &world.file("new", newest)]);
            }
        }
        assert_eq!(world.ok(&["tail", "p/l", "-n", "3"]), newest, "{fault}");
        // More logs than can be read.
        let tail = world.run(&["tail", "p/l", "-n", "100"]);
        if fault == "exchanged" {
            tail.assert(5);
            continue;
        }
        tail.assert(0);
        assert!(tail.stdout.ends_with(newest), "{fault}");
        assert!(tail.stderr.contains("shard 0 has lost groups"), "{fault}: {}", tail.stderr);
        assert_eq!(tail.stderr.contains("key was destroyed"), fault == "shredded");
    }
}

/// Envelopes take the place of a probe, so an object in its place is removed.
#[test]
fn a_repair_removes_an_object_in_the_place_of_a_probe() {
    for object in ["directory", "link", "dangling link", "fifo"] {
        let world = World::new();
        let key = world.create_key();
        world.create("p/l", &byok("sm4", &key));
        world.ok(&["append", "p/l", &world.file("lines", "one\n")]);
        let probes = fs::read_dir(world.path("envelog-data/probes")).unwrap();
        let probe = probes.map(|entry| entry.unwrap().path()).next().unwrap();
        let aside = world.path("aside");
        fs::rename(&probe, &aside).unwrap();
        match object {
            "directory" => fs::create_dir(&probe).unwrap(),
            "link" => symlink(&aside, &probe).unwrap(),
            "dangling link" => symlink("nowhere", &probe).unwrap(),
            _ => assert!(Command::new("mkfifo").arg(&probe).status().unwrap().success()),
        }
        world.refused(5, &["verify"]);
        if object == "directory" {
            let kept = probe.join("kept");
            fs::write(&kept, "").unwrap();
            world.refused(5, &["repair", "--yes"]);
            fs::remove_file(kept).unwrap();
        }
        let report = world.json(&["repair", "--yes", "--json"]);
        let removed = report["probes"][0].as_str().unwrap();
        assert_eq!(Path::new(removed).file_name(), probe.file_name(), "{object}: {report}");
        assert!(fs::symlink_metadata(&probe).is_err() && aside.exists());
        world.ok(&["verify"]);
        assert_eq!(world.read("p/l"), b"one\n");
    }
}

/// A group has many logs, so fewer groups than logs are needed.
#[test]
fn damage_in_front_of_the_wanted_logs_fails_no_tail() {
    for fault in ["directory", "link", "exchanged"] {
        let world = filled();
        for text in ["5.1\n5.2\n5.3\n", "6.1\n6.2\n6.3\n"] {
            world.ok(&["append", "p/l", &world.file("more", text)]);
        }
        let (first, third) = (segment(&world, 1), segment(&world, 3));
        fs::rename(&third, world.path("aside")).unwrap();
        match fault {
            "directory" => fs::create_dir(&third).unwrap(),
            "link" => symlink(world.path("aside"), &third).unwrap(),
            _ => drop(fs::copy(&first, &third).unwrap()),
        }
        let behind = b"4.1\n4.2\n4.3\n5.1\n5.2\n5.3\n6.1\n6.2\n6.3\n";
        for wanted in 0..=9 {
            let logs = world.ok(&["tail", "p/l", "-n", &wanted.to_string()]);
            assert_eq!(logs, behind[4 * (9 - wanted)..], "{fault}, {wanted} logs");
        }
        world.run(&["tail", "p/l", "-n", "10"]).assert(5);
    }
}

#[test]
fn a_damaged_logstore_hides_no_other() {
    for damage in ["metadata", "segment"] {
        let world = filled();
        let logstore = segment(&world, 1).ancestors().nth(2).unwrap().to_owned();
        let damaged: Vec<_> = match damage {
            "segment" => vec![segment(&world, 4)],
            // The metadata, and a copy of it if there is one.
            _ => {
                let all = fs::read_dir(logstore).unwrap().map(|entry| entry.unwrap().path());
                all.filter(|path| path.to_str().unwrap().contains("/meta-")).collect()
            }
        };
        world.create("p/other", &service("sm4"));
        world.ok(&["append", "p/other", &world.file("lines", "other\n")]);
        damaged.iter().for_each(|path| fs::write(path, "junk").unwrap());

        assert_eq!(world.ok(&["list"]), b"p/l\np/other\n");
        assert_eq!(world.read("p/other"), b"other\n");
        let status = world.run(&["status", "--json"]);
        status.assert(if damage == "metadata" { 5 } else { 0 });
        let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
        let shown = status["logstores"].as_array().unwrap();
        assert!(shown.iter().any(|one| one["name"] == "p/other" && one["logs"] == 1), "{status}");
        assert_eq!(status["failed"].as_array().unwrap().len(), usize::from(damage == "metadata"));

        let checkpoint = world.run(&["checkpoint", "--out", "checkpoint", "--json"]);
        checkpoint.assert(5);
        assert!(checkpoint.stderr.contains("p/l"), "{}", checkpoint.stderr);
        let checkpoint: serde_json::Value = serde_json::from_slice(&checkpoint.stdout).unwrap();
        assert_eq!(checkpoint["failed"].as_array().unwrap().len(), 1);
        assert_eq!(checkpoint["failed"][0]["name"], "p/l");
        world.ok(&["verify", "p/other", "--against", "checkpoint"]);
    }
}

/// Older metadata with the envelope of a destroyed data key is put back in the place of the newest.
#[test]
fn older_metadata_needs_more_than_a_yes() {
    let world = filled();
    let logstore = segment(&world, 1).ancestors().nth(2).unwrap().to_owned();
    let metadata = || -> Vec<_> {
        let entries = fs::read_dir(&logstore).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_file()).collect()
    };
    let old: Vec<_> =
        metadata().into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect();
    world.ok(&["keys", "rotate-data", "p/l"]);
    world.ok(&["checkpoint", "--out", "before"]);
    metadata().iter().for_each(|path| fs::remove_file(path).unwrap());
    for (path, bytes) in &old {
        fs::write(path, bytes).unwrap();
    }
    world.refused(5, &["verify"]);
    world.refused(5, &["repair", "p/l", "--shard", "0", "--yes"]);
    let refused = world.run(&["repair", "--yes", "--json"]);
    refused.assert(5);
    let report: serde_json::Value = serde_json::from_slice(&refused.stdout).unwrap();
    assert_eq!(report["failed"][0]["code"], json!("rolled_back"));
    let repaired =
        world.json(&["repair", "p/l", "--shard", "0", "--yes", "--accept-tampered", "--json"]);
    assert_eq!(repaired["metadata"], json!({"lost_generation": 2, "adopted_generation": 1}));
    let verified = String::from_utf8(world.ok(&["verify"])).unwrap();
    assert!(verified.contains("other metadata of Logstore p/l"), "{verified}");
    world.refused(5, &["verify", "--against", "before"]);
}

/// The directory of a shard is lost, with the segments in it.
#[test]
fn the_loss_of_a_whole_shard_is_accepted() {
    let world = filled();
    fs::remove_dir_all(segment(&world, 1).parent().unwrap()).unwrap();
    world.refused(5, &["verify"]);
    world.ok(&["repair", "p/l", "--shard", "0", "--yes"]);
    world.ok(&["repair", "p/l", "--shard", "0", "--yes"]);
    world.ok(&["append", "p/l", &world.file("more", "more\n")]);
    assert_eq!(world.run(&["read", "p/l"]).stdout, b"more\n");
    world.ok(&["verify"]);
}

/// The segments were copied, then the store went on, and then the rest was copied.
#[test]
fn a_plain_copy_of_a_live_store_gives_what_is_in_it() {
    let world = filled();
    let (store, copy) = (world.path("envelog-data"), world.path("copy"));
    fs::create_dir(&copy).unwrap();
    for part in ["logstores", "probes"] {
        copy_dir(&store.join(part), &copy.join(part));
    }
    world.ok(&["append", "p/l", &world.file("later", "later\n")]);
    for part in ["audit", "catalogue"] {
        copy_dir(&store.join(part), &copy.join(part));
    }
    for file in ["STORE", "LOCK", "EPOCH"] {
        fs::copy(store.join(file), copy.join(file)).unwrap();
    }
    fs::copy(world.path("envelog-data.keyring"), world.path("copy.keyring")).unwrap();
    let of_copy = |args: &[&str]| world.run(&[&["--store", "copy"], args].concat());

    let read = of_copy(&["read", "p/l"]);
    read.assert(5);
    assert_eq!(read.text().lines().count(), 12);
    let refused = of_copy(&["verify", "--json"]);
    refused.assert(5);
    assert!(!refused.text().contains("tampered"), "{}", refused.text());
    of_copy(&["repair", "p/l", "--shard", "0", "--yes"]).assert(0);
    of_copy(&["append", "p/l", &world.file("copied", "of the copy\n")]).assert(0);
    let read = of_copy(&["read", "p/l"]);
    read.assert(0);
    assert_eq!(read.text().lines().count(), 13);
    of_copy(&["verify"]).assert(0);
}

#[test]
fn a_copy_without_empty_directories_is_whole() {
    let world = World::new();
    let conf = service("sm4").to_string();
    world.ok(&["create", "p/l", "--shards", "4", "--encrypt-conf", &conf]);
    world.ok(&["append", "p/l", "--shard", "1", &world.file("lines", "1\n2\n3\n")]);
    remove_empty_directories(&world.path("envelog-data"));
    assert!(!world.path("envelog-data/probes").exists());
    assert_eq!(world.read("p/l"), b"1\n2\n3\n");
    world.ok(&["verify"]);
    world.ok(&["append", "p/l", &world.file("more", "4\n")]);
    world.ok(&["status"]);
    world.ok(&["repair", "p/l", "--shard", "0", "--yes"]);
    let key = world.create_key();
    world.create("p/byok", &common::byok("default", &key));
    world.ok(&["verify"]);
}

fn remove_empty_directories(dir: &Path) {
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            remove_empty_directories(&entry.path());
            let _ = fs::remove_dir(entry.path());
        }
    }
}
