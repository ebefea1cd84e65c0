//! The command line with master keys of AWS KMS, simulated by moto.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "../../tests/tools/moto.rs"]
mod moto;

use std::{
    io::{Read, Write},
    thread,
    time::{Duration, Instant},
};

use common::{Out, Running, World, made_lines};
use moto::{Moto, REGION, ROLE};
use serde_json::{Value, json};

/// The time from a refusal at the KMS to the last operation that may still succeed:
/// `--revalidate-every 1s`, plus the timeout of one call.
const BOUND: Duration = Duration::from_secs(2);

/// A directory for stores, and the KMS.
struct Aws {
    world: World,
    moto: Moto,
}

impl Aws {
    fn new() -> Self {
        Self { world: World::new(), moto: Moto::start() }
    }

    fn start(&self, store: &str, args: &[&str]) -> Running {
        let url = self.moto.url();
        let mut command = self.world.command(&[&["--store", store, "--kms", &url], args].concat());
        moto::credentials(&mut command);
        Running::start(command)
    }

    fn run(&self, store: &str, args: &[&str]) -> Out {
        self.start(store, args).finish()
    }

    fn ok(&self, store: &str, args: &[&str]) -> Vec<u8> {
        let out = self.run(store, args);
        out.assert(0);
        out.stdout
    }

    /// Creates a Logstore `p/a` in a new store, under this key.
    fn create(&self, store: &str, key: &str) {
        self.ok(store, &["create", "p/a", "--encrypt-conf", &conf(key)]);
    }
}

fn conf(key: &str) -> String {
    let cmk = json!({ "cmk_key_id": key, "arn": ROLE, "region_id": REGION });
    json!({ "enable": true, "encrypt_type": "sm4", "user_cmk_info": cmk }).to_string()
}

#[test]
fn a_logstore_follows_the_state_of_its_key() {
    let aws = Aws::new();
    let key = aws.moto.create_key();
    let text = made_lines(1000);
    let file = aws.world.file("lines", &text);
    aws.create("data", &key);
    aws.ok("data", &["append", "p/a", &file]);
    let read = || aws.run("data", &["read", "p/a"]);
    assert!(read().stdout == text);

    aws.moto.disable(&key);
    for command in
        [&["read", "p/a"][..], &["append", "p/a", &file], &["verify"], &["keys", "rewrap", "p/a"]]
    {
        assert!(aws.run("data", command).sentence(3).contains("disabled"), "{command:?}");
    }
    let status: Value =
        serde_json::from_slice(&aws.ok("data", &["status", "p/a", "--json"])).unwrap();
    assert_eq!(status["logstores"][0]["key"]["reason"], "disabled");
    aws.moto.enable(&key);
    assert!(read().stdout == text);

    aws.moto.schedule_deletion(&key);
    assert!(read().sentence(3).contains("pending deletion"));
    aws.moto.cancel_deletion(&key);
    assert!(read().sentence(3).contains("disabled"));
    aws.moto.enable(&key);
    assert!(read().stdout == text);
    aws.ok("data", &["verify"]);

    // A missing key, a wrong region or missing credentials create no Logstore.
    let nowhere = "00000000-0000-4000-8000-000000000000";
    let out = aws.run("data", &["create", "p/b", "--encrypt-conf", &conf(nowhere)]);
    assert!(out.sentence(3).contains("deleted"));
    let elsewhere = conf(&key).replace(REGION, "us-east-1");
    aws.run("data", &["create", "p/b", "--encrypt-conf", &elsewhere]).sentence(6);
    let url = aws.moto.url();
    let mut command = aws.world.command(&[
        "--store",
        "data",
        "--kms",
        &url,
        "create",
        "p/b",
        "--encrypt-conf",
        &conf(&key),
    ]);
    moto::credentials(&mut command);
    command
        .env_remove("AWS_ACCESS_KEY_ID")
        .env("AWS_EC2_METADATA_DISABLED", "true")
        .env("HOME", "nowhere");
    assert!(Running::start(command).finish().sentence(4).contains("no AWS credentials"));
    assert!(!String::from_utf8(aws.ok("data", &["list"])).unwrap().contains("p/b"));
}

#[test]
fn running_processes_end_within_the_bound_and_others_go_on() {
    let aws = Aws::new();
    let (key, other_key) = (aws.moto.create_key(), aws.moto.create_key());
    let lines = made_lines(100_000);
    let file = aws.world.file("lines", &lines);
    // A store has one writing process, so each appending process has its own store.
    for (store, key) in [("append", &key), ("read", &key), ("other", &other_key)] {
        aws.create(store, key);
    }
    aws.ok("read", &["append", "p/a", &file, "--durability", "written"]);
    let watchful = "--revalidate-every=1s";
    let [mut append, mut other] = ["append", "other"]
        .map(|store| aws.start(store, &["append", "p/a", "-", "--ack", watchful]));
    let (acks, other_acks) = (append.lines(), other.lines());
    for (process, acks) in [(&mut append, &acks), (&mut other, &other_acks)] {
        process.stdin.as_mut().unwrap().write_all(b"one\n").unwrap();
        assert_eq!(acks.recv().unwrap(), "1");
    }
    let mut read = aws.start("read", &["read", "p/a", watchful]);
    let mut out = read.stdout.take().unwrap();
    let mut head = vec![0; 1000];
    out.read_exact(&mut head).unwrap();

    let disabled = Instant::now();
    aws.moto.disable(&key);
    let ended = thread::spawn(move || {
        let sentence = append.wait().sentence(3);
        (sentence, disabled.elapsed())
    });
    // This process waits for its pipe. Continue reading only after the bound, since its next read
    // is refused from then on.
    thread::sleep(BOUND.saturating_sub(disabled.elapsed()));
    let mut rest = Vec::new();
    out.read_to_end(&mut rest).unwrap();
    assert!(read.finish().sentence(3).contains("disabled"));
    assert!(head.len() + rest.len() < lines.len(), "it has read everything");
    let (sentence, took) = ended.join().unwrap();
    assert!(sentence.contains("p/a") && sentence.contains("disabled"), "{sentence}");
    println!("append ended {} ms after DisableKey", took.as_millis());
    // It stops within the bound. Exit and sealing take longer on a busy machine.
    assert!(took < BOUND * 10, "{took:?}");

    other.stdin.as_mut().unwrap().write_all(b"two\n").unwrap();
    assert_eq!(other_acks.recv().unwrap(), "2");
    other.finish().assert(0);
    assert_eq!(aws.ok("other", &["read", "p/a"]), b"one\ntwo\n");
    aws.moto.enable(&key);
    assert_eq!(aws.ok("append", &["read", "p/a"]), b"one\n");
    assert!(aws.ok("read", &["read", "p/a"]) == lines);
}

#[test]
fn a_store_opens_and_works_in_an_outage_for_its_grace() {
    let mut aws = Aws::new();
    let key = aws.moto.create_key();
    aws.create("short", &key);
    aws.create("long", &key);
    let watchful = "--revalidate-every=1s";
    let mut short =
        aws.start("short", &["append", "p/a", "-", "--ack", watchful, "--outage-grace=3s"]);
    let mut long =
        aws.start("long", &["append", "p/a", "-", "--ack", watchful, "--outage-grace=5m"]);
    let (short_acks, long_acks) = (short.lines(), long.lines());
    for (process, acks) in [(&mut short, &short_acks), (&mut long, &long_acks)] {
        process.stdin.as_mut().unwrap().write_all(b"one\n").unwrap();
        assert_eq!(acks.recv().unwrap(), "1");
    }
    aws.moto.kill();
    let killed = Instant::now();
    let sentence = short.wait().sentence(4);
    assert!(sentence.contains("p/a"), "{sentence}");
    let took = killed.elapsed();
    // The grace period starts when the last good answer was requested: at most a second and one
    // call earlier.
    assert!(took > Duration::from_secs(1) && took < Duration::from_secs(30), "{took:?}");
    long.stdin.as_mut().unwrap().write_all(b"two\n").unwrap();
    assert_eq!(long_acks.recv().unwrap(), "2", "the last good answer still counts");
    long.finish().assert(0);

    // A new process has no lease from before the outage. It can still open the store and do work
    // that needs no key.
    assert!(String::from_utf8(aws.ok("long", &["list"])).unwrap().contains("p/a"));
    aws.ok("long", &["verify", "--keyless"]);
    assert!(aws.run("long", &["read", "p/a"]).sentence(4).contains("p/a"));
    let file = aws.world.file("more", "more\n");
    let (kind, _) = aws.run("long", &["append", "p/a", &file, "--json"]).json_error(4);
    assert_eq!(kind, "kms_unreachable");
    let status: Value =
        serde_json::from_slice(&aws.ok("long", &["status", "p/a", "--json"])).unwrap();
    assert_eq!(status["logstores"][0]["key"]["state"], "outage");
}
