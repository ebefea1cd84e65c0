//! The output that people and scripts rely on: help, tables, JSON, completions, closed pipes,
//! `demo` and `bench`.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read},
    process::Stdio,
};

use common::{ROLE, Running, World, byok, made_lines, service};
use serde_json::Value;

const COMMANDS: [&[&str]; 25] = [
    &["demo"],
    &["doctor"],
    &["create"],
    &["get"],
    &["update"],
    &["list"],
    &["delete"],
    &["shards"],
    &["split"],
    &["merge"],
    &["append"],
    &["read"],
    &["tail"],
    &["status"],
    &["verify"],
    &["checkpoint"],
    &["inspect"],
    &["backup"],
    &["restore"],
    &["keys"],
    &["kms"],
    &["bench"],
    &["settings"],
    &["completions"],
    &["man"],
];
const KEYS: [&str; 8] = [
    "rotate-data",
    "rewrap",
    "rotate-service",
    "audit",
    "backup",
    "recover",
    "replace-cmk",
    "shred",
];
const KMS: [&str; 10] = [
    "create-key",
    "list",
    "disable",
    "enable",
    "rotate",
    "schedule-deletion",
    "cancel-deletion",
    "delete",
    "grant",
    "ungrant",
];

#[test]
fn every_command_has_its_help() {
    let world = World::new();
    let keys = KEYS.map(|command| vec!["keys", command]);
    let kms = KMS.map(|command| vec!["kms", command]);
    let serve = cfg!(feature = "serve").then(|| vec!["serve"]);
    let all = COMMANDS.iter().map(|command| command.to_vec()).chain(keys).chain(kms).chain(serve);
    let overview = String::from_utf8(world.ok(&["--help"])).unwrap();
    for word in [
        "Examples:",
        "ENVELOG_STORE",
        "ENVELOG_KEYRING",
        "ENVELOG_KMS_DIR",
        "--outage-grace",
        "3 key revoked",
    ] {
        assert!(overview.contains(word), "{word} is not in the overview");
    }
    for command in all {
        let help = String::from_utf8(world.ok(&[&command[..], &["--help"]].concat())).unwrap();
        assert!(help.contains(&format!("envelog {}", command.join(" "))), "{command:?}: {help}");
        assert!(!help.contains('\x1b'), "{command:?}: colours are for terminals");
        if let [command] = command[..] {
            assert!(
                overview.contains(&format!("\n  {command} ")),
                "{command} is not in the overview"
            );
            assert!(command == "list" || help.contains("Example"), "{command} has no example");
        }
    }
    assert!(String::from_utf8(world.ok(&["--version"])).unwrap().starts_with("envelog "));
}

#[test]
fn what_cannot_be_understood_is_a_usage_error() {
    let world = World::new();
    for args in [
        &["frobnicate"][..],
        &["append"],
        &["read", "p/a", "--from", "yesterday"],
        &["list", "--revalidate-every", "5"],
        &[],
    ] {
        let out = world.run(args);
        out.assert(2);
        assert!(!out.stderr.is_empty() && out.stdout.is_empty(), "{args:?}");
    }
    let (kind, message) = world.run(&["append", "--json"]).json_error(2);
    assert!(kind == "usage" && message.contains("PROJECT/LOGSTORE"), "{kind}: {message}");
    let (_, message) = world.run(&["--json", "read", "p/a", "--format", "xml"]).json_error(2);
    assert!(message.contains("xml"), "{message}");
}

#[test]
fn completions_are_made_for_every_shell() {
    let world = World::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = String::from_utf8(world.ok(&["completions", shell])).unwrap();
        for word in ["envelog", "replace-cmk", "outage-grace", "schedule-deletion"] {
            assert!(script.contains(word), "{shell} does not complete {word}");
        }
    }
    world.run(&["completions", "cmd.exe"]).assert(2);
}

#[test]
fn manual_pages_are_made_for_every_command() {
    let world = World::new();
    std::fs::create_dir(world.path("man1")).unwrap();
    world.ok(&["man", "man1"]);
    for page in ["envelog.1", "envelog-repair.1", "envelog-keys-rotate-data.1"] {
        let text = std::fs::read_to_string(world.path("man1").join(page)).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "{page}");
    }
    world.run(&["man", "missing"]).assert(1);
}

#[test]
fn every_command_answers_in_json() {
    let world = World::new();
    let json = |args: &[&str]| world.json(&[args, &["--json"]].concat());
    let key =
        json(&["kms", "create-key", "--region", "cn-hangzhou", "--grant", ROLE])["cmk_key_id"]
            .clone();
    let key = key.as_str().unwrap();
    let conf = byok("sm4", key).to_string();
    assert_eq!(json(&["create", "p/a", "--encrypt-conf", &conf])["name"], "p/a");
    let create = [
        "create",
        "p/b",
        "--shards",
        "4",
        "--ttl",
        "30",
        "--compression",
        "zstd",
        "--payload-hash",
        "sm3",
    ];
    assert_eq!(json(&create)["ttl_days"], 30);
    let config = json(&["get", "p/b"]);
    assert_eq!((&config["shard_count"], &config["compression"]), (&4.into(), &"zstd".into()));
    assert_eq!(config["payload_hash"], "sm3");
    assert_eq!(json(&["update", "p/b", "--config", &config.to_string()])["revision"], 2);
    assert_eq!(json(&["list"])["logstores"], serde_json::json!(["p/a", "p/b"]));
    let file = world.file("lines", made_lines(10));
    let appended = json(&["append", "p/a", &file]);
    assert_eq!((&appended["groups"], &appended["logs"]), (&1.into(), &10.into()));
    assert_eq!(
        appended["shards"],
        serde_json::json!([{ "shard": 0, "first_seq": 0, "last_seq": 0 }])
    );
    for command in [&["read", "p/a"][..], &["tail", "p/a"]] {
        let out = String::from_utf8(world.ok(&[command, &["--json"]].concat())).unwrap();
        let logs: Vec<Value> = out.lines().map(|line| line.parse().unwrap()).collect();
        assert_eq!(logs.len(), 10);
        assert!(logs.iter().all(|log| log["contents"]["content"].is_string()));
    }
    assert_eq!(json(&["status"])["logstores"].as_array().unwrap().len(), 2);
    assert_eq!(json(&["verify"])["ok"], true);
    assert_eq!(json(&["checkpoint", "--out", "checkpoint"])["checkpoint"], "checkpoint");
    assert!(
        json(&["inspect", world.segments("envelog-data")[0].to_str().unwrap()])["header"]
            .is_object()
    );
    assert!(json(&["repair", "p/a", "--shard", "0", "--yes"])["segment"].is_null());
    assert_eq!(json(&["keys", "rotate-data", "p/a"])["data_key_version"], 2);
    // Envelopes under the newest version are skipped, unless a name is given.
    assert_eq!(json(&["keys", "rewrap"])["current"], serde_json::json!(["p/a"]));
    assert_eq!(json(&["keys", "rewrap", "p/a"])["rewrapped"].as_array().unwrap().len(), 1);
    assert_eq!(json(&["keys", "rotate-service"])["service_key_version"], 2);
    assert!(json(&["keys", "audit"])["records"].as_array().unwrap().len() > 5);
    assert_eq!(json(&["keys", "backup", "--out", "keyring"])["keyring"], "keyring");
    let other = world.create_key();
    let replaced =
        json(&["keys", "replace-cmk", "p/a", "--encrypt-conf", &byok("sm4", &other).to_string()]);
    assert_eq!(replaced["encrypt_conf"]["user_cmk_info"]["cmk_key_id"], other.as_str());
    assert_eq!(
        json(&["keys", "shred", "p/a", "--version", "1", "--yes"])["shredded"],
        serde_json::json!([1])
    );
    assert_eq!(json(&["kms", "list"])["keys"].as_array().unwrap().len(), 2);
    for command in [
        &["grant", key, "other"][..],
        &["ungrant", key, "other"],
        &["disable", key],
        &["enable", key],
    ] {
        assert_eq!(json(&[&["kms"], command].concat())["cmk_key_id"], key);
    }
    assert_eq!(json(&["delete", "p/b", "--yes"])["deleted"], "p/b");
}

#[test]
fn a_pipe_that_closes_ends_it_quietly() {
    let world = World::new();
    world.create("p/a", &service("default"));
    let text = made_lines(50_000);
    let file = world.file("lines", &text);
    world.ok(&["append", "p/a", &file]);
    // The output exceeds a pipe's buffer, and the reader closes the pipe after one line.
    for command in
        [&["read", "p/a"][..], &["read", "p/a", "--json"], &["tail", "p/a", "-n", "50000"]]
    {
        let mut running = Running::start(world.command(command));
        let mut line = String::new();
        BufReader::with_capacity(64, running.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(!line.is_empty());
        let out = running.finish();
        out.assert(0);
        assert_eq!(out.stderr, "", "{command:?}");
    }
    // A closed pipe interrupts an append: no message, but not a success.
    let mut running =
        Running::start(world.command(&["append", "p/a", &file, "--ack", "--group-bytes", "100"]));
    running.stdout.take().unwrap().read_exact(&mut [0; 2]).unwrap();
    let out = running.finish();
    out.assert(1);
    assert_eq!(out.stderr, "");
    world.ok(&["verify"]);
    // Standard error is closed too: the status is the same.
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = world.command(&["read", "p/nothing"]);
    let status =
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(writer).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

/// A script that only uses the status has closed the pipe. A full disk under the output must not
/// hide the verdict either.
#[cfg(target_os = "linux")]
#[test]
fn a_verdict_does_not_depend_on_where_it_is_printed() {
    let world = World::new();
    world.create("p/a", &service("default"));
    world.ok(&["append", "p/a", &world.file("lines", made_lines(1000))]);
    let segment = world.segments("envelog-data")[0].clone();
    let mut bytes = fs::read(&segment).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&segment, bytes).unwrap();
    let audit = find_one(&world.path("envelog-data/audit"));
    let mut text = fs::read(&audit).unwrap();
    text[5] ^= 1;
    fs::write(&audit, text).unwrap();
    for command in [
        &["verify"][..],
        &["verify", "--json"],
        &["inspect", segment.to_str().unwrap()],
        &["keys", "audit", "--verify", "--json"],
    ] {
        let (reader, closed) = std::io::pipe().unwrap();
        drop(reader);
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        for stdout in [Stdio::from(closed), Stdio::from(full)] {
            let status = world
                .command(command)
                .stdin(Stdio::null())
                .stdout(stdout)
                .stderr(Stdio::null())
                .status()
                .unwrap();
            assert_eq!(status.code(), Some(5), "{command:?}");
        }
    }
    // A closed or full standard error for the summary does not change the status: the logs are
    // acknowledged.
    world.create("p/b", &service("default"));
    let (reader, closed) = std::io::pipe().unwrap();
    drop(reader);
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    for stderr in [Stdio::from(closed), Stdio::from(full)] {
        let mut command = world.command(&["append", "p/b", "lines", "--ack"]);
        assert_eq!(
            command
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(stderr)
                .status()
                .unwrap()
                .code(),
            Some(0)
        );
    }
}

fn find_one(dir: &std::path::Path) -> std::path::PathBuf {
    fs::read_dir(dir).unwrap().next().unwrap().unwrap().path()
}

/// Only Linux has a device that is always full.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_with_its_sentence() {
    let world = World::new();
    world.create("p/a", &Value::Null);
    world.ok(&["append", "p/a", &world.file("lines", made_lines(10))]);
    for command in
        [&["read", "p/a"][..], &["list"], &["status", "--json"], &["completions", "bash"]]
    {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let out = world.command(command).stdin(Stdio::null()).stdout(full).output().unwrap();
        assert_eq!(out.status.code(), Some(1), "{command:?}");
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(said.contains("cannot write to standard output"), "{command:?}: {said}");
    }
}

#[test]
fn the_demo_shows_the_whole_story() {
    let world = World::new();
    let file = world.file("app.log", made_lines(3000));
    // With the given files, with the built-in text, and with the store kept.
    for args in [&["demo", &file][..], &["demo"], &["demo", &file, "--dir", "kept"]] {
        let text = String::from_utf8(world.ok(args)).unwrap();
        let held = text.matches(" yes ").count();
        assert!(held >= 17 && !text.contains("NO"), "{text}");
        for word in [
            "AES, service key",
            "SM4, customer's key",
            "MB/s",
            "refused: the key is revoked",
            "no plaintext",
        ] {
            assert!(text.contains(word), "{word} is missing: {text}");
        }
    }
    assert_eq!(
        world.ok(&["list", "--store", "kept/store"]),
        b"demo/customer-sm4\ndemo/service-aes\n"
    );
    assert!(world.refused(1, &["demo", "--dir", "kept"]).contains("not empty"));
    let report = world.json(&["demo", &file, "--json"]);
    assert!(
        report["checks"].as_array().unwrap().iter().all(|check| check["held"] == true),
        "{report}"
    );
    assert!(
        report["rates"]
            .as_array()
            .unwrap()
            .iter()
            .all(|rate| rate["mb_per_s"].as_f64().unwrap() > 0.0),
        "{report}"
    );
    assert!(
        world
            .refused(1, &["demo", &world.file("empty", "")])
            .contains("these files contain no logs")
    );
    assert!(world.refused(1, &["demo", "/nowhere/at-all"]).contains("/nowhere/at-all"));
}

/// `envelog bench --serve` with its defaults measures 10,000 idle connections, whose memory is to
/// stay below 200 MiB.
#[cfg(feature = "serve")]
#[test]
fn the_bench_measures_the_service_beside_the_engine() {
    const CONNECTIONS: u64 = 1000;
    let world = World::new();
    let connections = CONNECTIONS.to_string();
    let args = ["bench", "--serve", "--dir", ".", "--seconds", "0.5", "--connections"];
    let answer = world.json(&[&args[..], &[&connections, "--json"]].concat());
    for (rows, names) in [("put", ["lz4", "plain"]), ("read", ["get_logs", "pull_logs"])] {
        for (row, name) in answer[rows].as_array().unwrap().iter().zip(names) {
            assert!(row["body"] == name || row["what"] == name, "{row}");
            for field in ["mb_per_s", "engine_mb_per_s", "ratio"] {
                assert!(row[field].as_f64().unwrap() > 0.0, "{row}");
            }
        }
    }
    let mib = |name: &str| answer["idle"][name].as_f64().unwrap();
    let each = (mib("mib") - mib("before_mib")) / CONNECTIONS as f64;
    assert!(mib("before_mib") + each * 10_000.0 < 200.0, "{answer}");
    let left: Vec<_> = fs::read_dir(world.path("")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn the_bench_measures_what_it_says() {
    let world = World::new();
    let file = world.file("app.log", made_lines(3000));
    let rows =
        world.json(&["bench", &file, "--dir", ".", "--seconds", "0.1", "--json"])["rows"].clone();
    let rows = rows.as_array().unwrap();
    for row in rows {
        for field in [
            "what",
            "suite",
            "compression",
            "group_bytes",
            "durability",
            "callers",
            "mb_per_s",
            "ratio",
        ] {
            assert!(row.get(field).is_some(), "{field} is missing: {row}");
        }
        assert!(row["what"] == "open_store" || row["mb_per_s"].as_f64().unwrap() > 0.0, "{row}");
        assert!(row["suite"] != "none" || row["ratio"] == 1.0, "{row}");
    }
    let count = |what: &str, suite: &str| {
        rows.iter().filter(|row| row["what"] == what && row["suite"] == suite).count()
    };
    for suite in ["none", "aes", "sm4"] {
        for (what, least) in [("append", 4), ("read", 2), ("seal", 1), ("open", 1)] {
            assert!(count(what, suite) >= least, "{what} under {suite}");
        }
    }
    assert_eq!(count("plain_write", "none"), 1);
    let opening = rows.iter().find(|row| row["what"] == "open_store").unwrap();
    assert_eq!(
        (&opening["segments"], &opening["segment_files_opened"]),
        (&2000.into(), &0.into()),
        "{opening}"
    );
    assert_eq!(opening["kms_calls"], 0, "{opening}");
    assert!(opening["ms"].as_f64().unwrap() > 0.0, "{opening}");
    // The demo removes its temporary files.
    let left: Vec<_> =
        fs::read_dir(world.path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["app.log"]);
    world.run(&["bench", "--seconds", "0"]).assert(2);

    let rows =
        world.json(&["bench", &file, "--dir", ".", "--seconds", "0.1", "--payload-hash", "--json"])
            ["rows"]
            .clone();
    let rows = rows.as_array().unwrap();
    for what in ["append", "append_unhashed"] {
        for suite in ["none", "aes", "sm4"] {
            for compression in ["lz4", "none"] {
                let is_it = |row: &&serde_json::Value| {
                    row["what"] == what
                        && row["suite"] == suite
                        && row["compression"] == compression
                };
                let row = rows.iter().find(is_it).unwrap();
                assert!(row["ratio"].as_f64().unwrap() > 0.0, "{row}");
                assert!(what == "append" || row["ratio"] == 1.0, "{row}");
            }
        }
    }
    assert_eq!(rows.len(), 12);
}
