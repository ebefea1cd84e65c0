//! Anchors: a directory on another volume records how far the store is written, so that a rollback
//! of the store is detected.

#![allow(clippy::unwrap_used)]

mod common;

use std::{fs, io::Write, path::Path};

use common::{Running, World, copy_dir, made_lines, service};
use serde_json::{Value, json};

/// A store whose anchor is in `anchors`, with one Logstore.
fn anchored() -> World {
    let world = World::new();
    fs::create_dir(world.path("anchors")).unwrap();
    world.ok(&[
        "create",
        "p/a",
        "--encrypt-conf",
        &service("default").to_string(),
        "--anchor",
        "anchors",
    ]);
    append(&world, "one\n");
    world
}

fn append(world: &World, text: impl AsRef<[u8]>) {
    world.ok(&["append", "p/a", &world.file("piece", text), "--anchor", "anchors"]);
}

/// The records, read without the anchor.
fn read_alone(world: &World) -> Vec<u8> {
    world.ok(&["read", "p/a", "--without-anchor"])
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

fn count(events: &[String], event: &str) -> usize {
    events.iter().filter(|found| *found == event).count()
}

fn anchor_status(world: &World) -> Value {
    world.json(&["status", "--json", "--anchor", "anchors"])["anchor"].clone()
}

fn put_back(world: &World, copy: &str) {
    fs::remove_dir_all(world.path("envelog-data")).unwrap();
    copy_dir(&world.path(copy), &world.path("envelog-data"));
}

fn files(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

#[test]
fn an_older_store_in_its_place_is_found_out() {
    let world = anchored();
    copy_dir(&world.path("envelog-data"), &world.path("earlier"));
    append(&world, "two\n");
    copy_dir(&world.path("envelog-data"), &world.path("latest"));
    world.ok(&["verify", "--anchor", "anchors"]);
    put_back(&world, "earlier");
    let piece = world.file("piece", "three\n");

    // A refused command must not move the anchor towards the older store.
    for _ in 0..3 {
        for command in [
            &["append", "p/a", &piece][..],
            &["read", "p/a"],
            &["verify"],
            &["verify", "--keyless"],
            &["status"],
        ] {
            let command = [command, &["--anchor", "anchors"]].concat();
            let sentence = world.refused(5, &command);
            assert!(
                sentence.contains("rolled back") && sentence.contains("anchor"),
                "{command:?}: {sentence}"
            );
            let asked = [&command[..], &["--json"]].concat();
            assert_eq!(world.run(&asked).json_error(5).0, "rolled_back", "{command:?}");
        }
    }
    // The copy is consistent in itself, and a reader without the anchor cannot detect the rollback.
    assert_eq!(read_alone(&world), b"one\n");
    world.ok(&["verify", "--without-anchor"]);

    // Omitting --anchor does not allow writing to the older store.
    let writing = ["append", "p/a", &piece];
    assert!(world.refused(7, &writing).contains("anchor"));
    assert_eq!(world.run(&[&writing[..], &["--json"]].concat()).json_error(7).0, "anchor");
    assert_eq!(read_alone(&world), b"one\n");
    put_back(&world, "latest");
    append(&world, "three\n");
    assert_eq!(world.ok(&["read", "p/a", "--anchor", "anchors"]), b"one\ntwo\nthree\n");
}

#[test]
fn a_store_is_written_without_its_anchor_on_request_alone() {
    let world = anchored();
    copy_dir(&world.path("envelog-data"), &world.path("earlier"));
    append(&world, "two\n");
    let found = events(&world);
    assert_eq!(
        (count(&found, "anchored"), count(&found, "opened_without_anchor")),
        (1, 0),
        "{found:?}"
    );
    put_back(&world, "earlier");
    let piece = world.file("piece", "another two\n");
    world.ok(&["append", "p/a", &piece, "--without-anchor"]);
    assert_eq!(count(&events(&world), "opened_without_anchor"), 1);
    // The anchor still detects the rollback.
    world.refused(5, &["append", "p/a", &piece, "--anchor", "anchors"]);
    world.refused(7, &["append", "p/a", &piece]);

    // Both options together restart the anchor from the store's current state.
    world.ok(&["append", "p/a", &piece, "--anchor", "anchors", "--without-anchor"]);
    assert_eq!(count(&events(&world), "opened_without_anchor"), 2);
    append(&world, "three\n");
    assert_eq!(
        world.ok(&["read", "p/a", "--anchor", "anchors"]),
        b"one\nanother two\nanother two\nthree\n"
    );
    world.ok(&["verify", "--anchor", "anchors"]);
    put_back(&world, "earlier");
    world.refused(5, &["read", "p/a", "--anchor", "anchors"]);
}

#[test]
fn an_anchor_that_is_missing_or_empty_is_said_so() {
    let world = anchored();
    let piece = world.file("piece", "two\n");
    let refused = |words: &str| {
        for command in [&["append", "p/a", &piece][..], &["read", "p/a"], &["verify"], &["status"]]
        {
            let command = [command, &["--anchor", "anchors"]].concat();
            let sentence = world.refused(7, &command);
            assert!(
                sentence.contains("anchor") && sentence.contains(words),
                "{command:?}: {sentence}"
            );
            assert_eq!(
                world.run(&[&command[..], &["--json"]].concat()).json_error(7).0,
                "anchor",
                "{command:?}"
            );
        }
    };
    fs::rename(world.path("anchors"), world.path("away")).unwrap();
    refused("cannot be read");
    fs::create_dir(world.path("anchors")).unwrap();
    refused("keeps nothing");
    assert_eq!(files(&world.path("anchors")), 0, "refused data is not stored");
    fs::remove_dir(world.path("anchors")).unwrap();
    fs::rename(world.path("away"), world.path("anchors")).unwrap();
    // The anchor's content is authenticated.
    let kept = fs::read_dir(world.path("anchors")).unwrap().next().unwrap().unwrap().path();
    let bytes = fs::read(&kept).unwrap();
    let mut changed = bytes.clone();
    let middle = changed.len() / 4;
    changed[middle] ^= 1;
    fs::write(&kept, changed).unwrap();
    let sentence = world.refused(5, &["append", "p/a", &piece, "--anchor", "anchors"]);
    assert!(sentence.contains(kept.file_name().unwrap().to_str().unwrap()), "{sentence}");
    fs::write(&kept, bytes).unwrap();
    world.ok(&["append", "p/a", &piece, "--anchor", "anchors"]);
    assert_eq!(read_alone(&world), b"one\ntwo\n");

    // A failed creation with a missing anchor directory must not leave a store that requires an
    // anchor.
    for command in [&["create", "p/a"][..], &["create", "p/b"]] {
        let command = [command, &["--store", "other", "--anchor", "nowhere"]].concat();
        world.run(&command).assert(7);
        assert!(!world.path("nowhere").exists());
    }
    world.ok(&["create", "p/c", "--store", "other"]);
}

/// An unusable anchor can be skipped on request, and is updated once it is usable again.
#[test]
fn an_anchor_that_cannot_be_used_is_left_out_on_request() {
    let world = anchored();
    let piece = world.file("piece", "two\n");
    let append = ["append", "p/a", &piece, "--anchor", "anchors", "--without-anchor"];
    fs::rename(world.path("anchors"), world.path("away")).unwrap();
    world.refused(7, &append[..5]);
    let said = world.run(&append).sentence(0);
    assert!(said.contains("the anchor is behind the store"), "{said}");
    fs::rename(world.path("away"), world.path("anchors")).unwrap();

    // A directory at the path of the anchor's file.
    let kept = fs::read_dir(world.path("anchors")).unwrap().next().unwrap().unwrap().path();
    fs::remove_file(&kept).unwrap();
    fs::create_dir(&kept).unwrap();
    assert!(world.refused(7, &append[..5]).contains("keeps nothing"));
    world.ok(&append);
    world.ok(&append[..5]);
    assert_eq!(world.ok(&["read", "p/a", "--anchor", "anchors"]), b"one\ntwo\ntwo\ntwo\n");
    assert_eq!(count(&events(&world), "opened_without_anchor"), 2);
}

#[test]
fn an_anchor_inside_the_store_is_refused() {
    let world = anchored();
    let inside = world.path("envelog-data/anchor");
    fs::create_dir(&inside).unwrap();
    let sentence = world.refused(2, &["read", "p/a", "--anchor", inside.to_str().unwrap()]);
    assert!(sentence.contains("inside the store"), "{sentence}");
}

#[test]
fn a_reader_without_the_anchor_is_told_so() {
    let world = anchored();
    for command in [&["read", "p/a"][..], &["verify"], &["status"]] {
        let told = |more: &[&str]| {
            let out = world.run(&[command, more].concat());
            out.assert(0);
            out.stderr.contains("has an anchor")
        };
        assert!(told(&[]), "{command:?}");
        assert!(!told(&["--anchor", "anchors"]) && !told(&["--without-anchor"]), "{command:?}");
    }
}

#[test]
fn what_a_killed_process_left_in_the_anchor_is_removed() {
    let world = anchored();
    let kept = fs::read_dir(world.path("anchors")).unwrap().next().unwrap().unwrap().path();
    let left = kept.with_extension("anchor.tmp");
    let foreign = world.path("anchors").join("notes.anchor.tmp");
    for path in [&left, &foreign] {
        fs::write(path, "half").unwrap();
    }
    append(&world, "two\n");
    assert_eq!((left.exists(), foreign.exists()), (false, true));
}

#[test]
fn the_environment_names_the_anchor_too() {
    let world = anchored();
    copy_dir(&world.path("envelog-data"), &world.path("earlier"));
    let run = |args: &[&str], anchor: &str| {
        let mut command = world.command(args);
        command.env("ENVELOG_ANCHOR", world.path(anchor));
        Running::start(command).finish()
    };
    let piece = world.file("piece", "two\n");
    run(&["append", "p/a", &piece], "anchors").assert(0);
    run(&["append", "p/a", &piece], "nowhere").sentence(7);
    // The option takes precedence over the environment.
    run(&["append", "p/a", &piece, "--anchor", "anchors"], "nowhere").assert(0);
    put_back(&world, "earlier");
    for command in [&["append", "p/a", &piece][..], &["read", "p/a"], &["verify"]] {
        assert!(run(command, "anchors").sentence(5).contains("rolled back"), "{command:?}");
    }
}

/// An unreachable anchor does not stop a writer. It stays behind until the next writer updates it.
#[test]
fn status_tells_how_far_the_anchor_is() {
    let world = anchored();
    assert_eq!(world.json(&["status", "--json"])["anchor"]["configured"], json!(false));
    let status = anchor_status(&world);
    assert_eq!(
        (&status["configured"], &status["records_behind"]),
        (&json!(true), &json!(0)),
        "{status}"
    );
    let text = |args: &[&str]| String::from_utf8(world.ok(args)).unwrap();
    assert!(
        text(&["status", "--anchor", "anchors"])
            .contains("the anchor is up to date with the catalogue")
    );
    assert!(!text(&["status", "--without-anchor"]).contains("the anchor"));

    let mut append_more =
        Running::start(world.command(&["append", "p/a", "-", "--ack", "--anchor", "anchors"]));
    let acks = append_more.lines();
    append_more.stdin.as_mut().unwrap().write_all(b"two\n").unwrap();
    assert_eq!(acks.recv().unwrap(), "1");
    fs::rename(world.path("anchors"), world.path("away")).unwrap();
    append_more.stdin.as_mut().unwrap().write_all(&made_lines(100)).unwrap();
    while acks.recv().unwrap() != "101" {}
    append_more.finish().assert(0);
    fs::rename(world.path("away"), world.path("anchors")).unwrap();

    let behind = anchor_status(&world)["records_behind"].as_u64().unwrap();
    assert!(behind > 0);
    let said = text(&["status", "--anchor", "anchors"]);
    let records = if behind == 1 { "1 record".to_owned() } else { format!("{behind} records") };
    assert!(said.contains(&format!("the anchor is {records} behind the catalogue")), "{said}");
    world.ok(&["verify", "--anchor", "anchors"]);
    append(&world, "last\n");
    assert_eq!(anchor_status(&world)["records_behind"], json!(0));
}
