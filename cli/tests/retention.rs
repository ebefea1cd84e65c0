//! Retention in short runs, `retain`, and the state of retention in `status`.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;

use common::World;
use serde_json::json;

fn bytes(world: &World) -> u64 {
    let segments = world.segments("envelog-data");
    segments.iter().map(|path| fs::metadata(path).unwrap().len()).sum()
}

#[test]
fn short_runs_keep_to_the_limit() {
    let world = World::new();
    world.ok(&["create", "p/l", "--retention-bytes", "100KB", "--compression", "none"]);
    let file = world.file("lines", "some line of a log\n".repeat(2000));
    for _ in 0..6 {
        world.ok(&["append", "p/l", &file]);
        assert!(bytes(&world) <= 100_000);
    }
    assert_eq!(world.read("p/l").len(), 19 * 2000, "two runs are over the limit");
}

#[test]
fn retain_applies_retention_now() {
    let world = World::new();
    world.ok(&["create", "p/l", "--compression", "none"]);
    for text in ["a\n", "b\n", "c\n"] {
        let file = world.file("line", text);
        world.ok(&["append", "p/l", &file]);
    }
    let status = world.json(&["status", "--json"]);
    let none = json!({ "last_run_us": null, "trusted_us": null, "suspended": false });
    assert_eq!(status["retention"], none);
    let mut config = world.json(&["get", "p/l"]);
    config["retention_bytes"] = json!(1);
    config["ttl_days"] = json!(1);
    world.ok(&["update", "p/l", "--config", &config.to_string()]);
    assert_eq!(world.read("p/l"), b"a\nb\nc\n", "retention is not due yet");
    let report = world.json(&["retain", "--json"]);
    assert_eq!((&report["segments"], &report["suspended"]), (&json!(2), &json!(false)));
    assert_eq!(world.read("p/l"), b"c\n", "the newest segment stays");
    let out = String::from_utf8(world.ok(&["retain", "--trust-clock"])).unwrap();
    assert_eq!(out, "dropped 0 segments, 0 B freed\n");
    let status = world.json(&["status", "--json"]);
    assert_eq!(status["retention"]["suspended"], json!(false));
    assert!(status["retention"]["trusted_us"].as_u64().unwrap() > 1_700_000_000_000_000);
    assert!(status["retention"]["last_run_us"].is_u64());
    world.ok(&["verify"]);
}
