//! `serve`, mostly with the unmodified SDK for Python and its consumer library.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "serve/first_steps.rs"]
mod first_steps;
#[path = "../../tests/common/python.rs"]
mod python;
#[path = "serve/sdks.rs"]
mod sdks;

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    fs::{self, Permissions},
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::mpsc::{Receiver, RecvTimeoutError},
    thread::sleep,
    time::{Duration, Instant},
};

use common::{ROLE, Running, World};
use serde_json::{Value, json};

/// Kills a process that hangs. No tested process needs nearly as long.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long to wait for something that happens in the end.
const IN_THE_END: Duration = Duration::from_secs(180);

/// A store with a service, and Python with the SDK.
struct Served {
    world: World,
    python: PathBuf,
    address: String,
    service: Option<Running>,
}

impl Served {
    fn new() -> Self {
        let packages = ["aliyun-log-python-sdk==0.9.52"];
        let python = python::with_packages("sls", &packages);
        let world = World::new();
        let keys = json!({ "keys": [{
            "id": "tester", "secret": "secret of tester", "projects": ["*"],
            "allow": ["read", "write", "admin"], "pass_roles": [ROLE],
        }] });
        let path = world.file("keys.json", keys.to_string());
        fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
        let mut served = Self { world, python, address: "127.0.0.1:0".to_owned(), service: None };
        served.start();
        served
    }

    /// Starts the service, at the address that it had before.
    fn start(&mut self) {
        let args = [
            "serve",
            "--listen",
            &self.address,
            "--access-keys",
            "keys.json",
            "--revalidate-every",
            "500ms",
        ];
        let mut service = Running::start_for(PATIENCE, self.world.command(&args));
        let line = next(&service.lines());
        self.address = line.strip_prefix("listening on http://").unwrap().to_owned();
        self.service = Some(service);
    }

    fn kill(&mut self) {
        self.service.take().unwrap().kill();
    }

    /// Ends the service as a service manager does.
    fn stop(&mut self) {
        let service = self.service.take().unwrap();
        service.terminate();
        let out = service.wait();
        out.assert(0);
        // Revoked keys and recovered shards are warnings.
        let faults: Vec<&str> = out.stderr.lines().filter(|it| it.contains(" ERROR ")).collect();
        assert!(faults.is_empty(), "{faults:?}");
    }

    /// A script of the tests.
    fn script(&self, name: &str, args: &[&str]) -> Running {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/serve");
        let port = self.address.rsplit_once(':').unwrap().1;
        let mut command = Command::new(&self.python);
        command.arg(dir.join(name)).args(args).env("SERVE_PORT", port);
        // The sources may be read-only.
        command.env("PYTHONDONTWRITEBYTECODE", "1");
        for variable in ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"] {
            command.env_remove(variable);
        }
        Running::start_for(PATIENCE, command)
    }

    /// Runs a script to its end. Returns its output.
    fn run(&self, name: &str, args: &[&str]) -> String {
        let out = self.script(name, args).finish();
        assert_eq!(out.status, Some(0), "{name}: {}", out.stderr);
        String::from_utf8(out.stdout).unwrap()
    }
}

/// The next line of a process.
fn next(lines: &Receiver<String>) -> String {
    lines.recv_timeout(IN_THE_END).unwrap_or_else(|error| panic!("no line: {error}"))
}

fn service_key() -> Value {
    json!({ "enable": true, "encrypt_type": "default" })
}

fn byok(world: &World) -> (String, Value) {
    let key = world.create_key();
    let cmk = json!({ "cmk_key_id": key, "arn": ROLE, "region_id": common::REGION });
    (key, json!({ "enable": true, "encrypt_type": "sm4", "user_cmk_info": cmk }))
}

#[test]
fn the_sdk_does_everything_under_the_service_key_and_under_a_customers_key() {
    let mut served = Served::new();
    let (_, byok) = byok(&served.world);
    // The default KMS of a store is looked for at the start.
    served.stop();
    served.start();
    for conf in [service_key(), byok] {
        assert_eq!(served.run("life_cycle.py", &[&conf.to_string()]), "done\n", "{conf}");
    }
    served.stop();
    // Nothing is left, and the store is sound.
    assert_eq!(served.world.json(&["list", "--json"])["logstores"], json!([]));
    served.world.ok(&["verify"]);
}

#[test]
fn a_disabled_key_refuses_its_logstore_alone_and_comes_back() {
    let refused = "403 KmsKeyRevoked";
    a_disabled_key_refuses(refused, |served, conf| served.script("revoked.py", &[conf]));
}

/// `start` starts a client that answers to words, and that reports a refused call as `refused`.
fn a_disabled_key_refuses(refused: &str, start: impl Fn(&Served, &str) -> Running) {
    let mut served = Served::new();
    let (key, conf) = byok(&served.world);
    served.stop();
    served.start();
    let mut script = start(&served, &conf.to_string());
    let lines = script.lines();
    assert_eq!(next(&lines), "ready");
    let mut stdin = script.stdin.take().unwrap();
    let mut ask = |word: &str| -> (Value, Value) {
        use std::io::Write;
        writeln!(stdin, "{word}").unwrap();
        let told: Value = serde_json::from_str(&next(&lines)).unwrap();
        (told, serde_json::from_str(&next(&lines)).unwrap())
    };
    let (told, mine) = ask("one");
    assert_eq!(told, json!({ "mine": ["200", "200"], "other": ["one"] }));
    assert_eq!(mine, json!(["one"]));

    served.world.ok(&["kms", "disable", &key]);
    // 500 ms between questions to the KMS, and its time-out of 1 s.
    sleep(Duration::from_secs(2));
    let (told, _) = ask("two");
    assert_eq!(told["mine"], json!([refused, refused]));
    assert_eq!(told["other"], json!(["one", "two"]));

    served.world.ok(&["kms", "enable", &key]);
    let began = Instant::now();
    let healed = loop {
        let (told, mine) = ask("three");
        if told["mine"] == json!(["200", "200"]) {
            break mine;
        }
        assert!(began.elapsed() < IN_THE_END, "{told}");
        sleep(Duration::from_millis(200));
    };
    let healed: BTreeSet<&str> =
        healed.as_array().unwrap().iter().map(|it| it.as_str().unwrap()).collect();
    assert_eq!(healed, BTreeSet::from(["one", "three"]));
    drop(stdin);
    script.finish().assert(0);
    served.stop();
}

#[test]
fn nothing_acknowledged_is_lost_when_the_service_is_killed() {
    let mut served = Served::new();
    served.run("create.py", &["crash", "logs", "3"]);
    let mut producer = served.script("produce.py", &[]);
    let lines = producer.lines();
    let mut acknowledged = BTreeSet::new();
    let mut take = |at_least: usize| {
        for _ in 0..at_least {
            acknowledged.extend(next(&lines).split(' ').map(str::to_owned));
        }
    };
    for _ in 0..3 {
        take(40);
        served.kill();
        served.start();
    }
    take(40);
    drop(producer.stdin.take());
    loop {
        match lines.recv_timeout(IN_THE_END) {
            Ok(line) => acknowledged.extend(line.split(' ').map(str::to_owned)),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(error) => panic!("{error}"),
        }
    }
    producer.wait().assert(0);
    let text = served.run("drain.py", &["crash", "logs"]);
    let stored: BTreeSet<String> = text.lines().map(str::to_owned).collect();
    let lost: Vec<&String> = acknowledged.difference(&stored).collect();
    assert!(lost.is_empty() && acknowledged.len() >= 800, "{}: {lost:?}", acknowledged.len());
    served.stop();
}

/// The events that the workers of a consumer group have printed.
#[derive(Default)]
struct Told {
    logs: Vec<String>,
    /// When each log was read first, by a clock that all processes share.
    first: BTreeMap<String, u64>,
    /// The worker that has a shard now.
    owners: BTreeMap<String, &'static str>,
}

impl Told {
    /// Takes the lines that have arrived. Two live workers must not have a shard at once.
    fn take(&mut self, worker: &'static str, lines: &Receiver<String>) {
        self.note(worker, lines.try_iter());
    }

    /// Takes the rest of a worker that is dead. Its shards have no owner.
    fn take_rest(&mut self, worker: &'static str, lines: &Receiver<String>) {
        self.note(worker, lines.iter());
        self.owners.retain(|_, it| *it != worker);
    }

    fn note(&mut self, worker: &'static str, lines: impl Iterator<Item = String>) {
        for line in lines {
            match line.split_once(' ') {
                Some(("log", text)) => {
                    let (text, at) = text.rsplit_once(' ').unwrap();
                    let (text, at) = (text.to_owned(), at.parse().unwrap());
                    let first = self.first.entry(text.clone()).or_insert(at);
                    *first = at.min(*first);
                    self.logs.push(text);
                }
                Some(("begin", shard)) => {
                    let before = self.owners.insert(shard.to_owned(), worker);
                    assert!(
                        before.is_none_or(|it| it == worker),
                        "{shard}: {before:?} and {worker}"
                    );
                }
                Some(("end", shard)) => drop(self.owners.remove(shard)),
                _ => {}
            }
        }
    }

    fn owned_by(&self, worker: &str) -> usize {
        self.owners.values().filter(|it| **it == worker).count()
    }
}

fn in_the_end(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < IN_THE_END, "{what}");
        sleep(Duration::from_millis(100));
    }
}

#[test]
fn two_workers_of_the_consumer_library_share_the_shards_and_one_takes_over() {
    let mut served = Served::new();
    served.run("create.py", &["crash", "logs", "4"]);
    let worker = |served: &Served, name: &str| {
        let mut worker = served.script("consume.py", &["crash", "logs", "group", name]);
        let lines = worker.lines();
        (worker, lines)
    };
    let (one, from_one) = worker(&served, "one");
    let (two, from_two) = worker(&served, "two");
    let mut told = Told::default();
    in_the_end("each worker has two shards", || {
        told.take("one", &from_one);
        told.take("two", &from_two);
        told.owned_by("one") == 2 && told.owned_by("two") == 2
    });
    let mut producer = served.script("produce.py", &[]);
    let produced = producer.lines();
    let mut acknowledged = BTreeSet::new();
    let mut take = |at_least: usize| {
        for _ in 0..at_least {
            acknowledged.extend(next(&produced).split(' ').map(str::to_owned));
        }
    };
    take(30);
    one.kill();
    told.take_rest("one", &from_one);
    take(30);
    // The service is killed too. The other worker goes on with its shards.
    served.kill();
    served.start();
    take(30);
    drop(producer.stdin.take());
    while let Ok(line) = produced.recv_timeout(IN_THE_END) {
        acknowledged.extend(line.split(' ').map(str::to_owned));
    }
    producer.wait().assert(0);
    let began = Instant::now();
    loop {
        told.take("two", &from_two);
        let seen: BTreeSet<&String> = told.logs.iter().collect();
        let missing: Vec<&String> = acknowledged.iter().filter(|id| !seen.contains(id)).collect();
        if missing.is_empty() && told.owned_by("two") == 4 {
            break;
        }
        assert!(began.elapsed() < IN_THE_END, "missing: {missing:?}, owners: {:?}", told.owners);
        sleep(Duration::from_millis(100));
    }
    // It stops, and no log is read again.
    two.finish().assert(0);
    let (late, from_late) = worker(&served, "late");
    let mut told = Told::default();
    in_the_end("a late worker has all shards", || {
        told.take("late", &from_late);
        told.owned_by("late") == 4
    });
    sleep(Duration::from_secs(2));
    told.take("late", &from_late);
    assert_eq!(told.logs, [""; 0]);
    late.finish().assert(0);
    served.stop();
}

/// Two workers read in order while a shard is split, the service is killed, and two shards are
/// merged: nothing is lost, and the logs of each hash key arrive in their order.
#[test]
fn two_workers_go_on_through_a_split_and_a_merge_in_order() {
    let mut served = Served::new();
    served.run("create.py", &["crash", "logs", "2"]);
    let worker = |served: &Served, name: &str| {
        let mut worker = served.script("consume.py", &["crash", "logs", "group", name]);
        let lines = worker.lines();
        (worker, lines)
    };
    let (one, from_one) = worker(&served, "one");
    let (two, from_two) = worker(&served, "two");
    let mut told = Told::default();
    in_the_end("each worker has a shard", || {
        told.take("one", &from_one);
        told.take("two", &from_two);
        told.owned_by("one") == 1 && told.owned_by("two") == 1
    });
    let mut producer = served.script("keyed.py", &["crash", "logs"]);
    let produced = producer.lines();
    let mut acknowledged = BTreeSet::new();
    let mut take = |at_least: usize| {
        for _ in 0..at_least {
            acknowledged.insert(next(&produced));
        }
    };
    take(200);
    assert_eq!(served.run("reshard.py", &["crash", "logs", "split", "0"]), "2 3\n");
    take(200);
    served.kill();
    served.start();
    take(200);
    assert_eq!(served.run("reshard.py", &["crash", "logs", "merge", "3"]), "4\n");
    take(200);
    drop(producer.stdin.take());
    while let Ok(line) = produced.recv_timeout(IN_THE_END) {
        acknowledged.insert(line);
    }
    producer.wait().assert(0);
    in_the_end("the workers have read everything, and share the shards that are not split", || {
        told.take("one", &from_one);
        told.take("two", &from_two);
        let owned: BTreeSet<&str> = told.owners.keys().map(String::as_str).collect();
        acknowledged.iter().all(|id| told.first.contains_key(id))
            && owned == BTreeSet::from(["2", "4"])
            && told.owned_by("one") == 1
    });
    let mut by_key: BTreeMap<&str, BTreeMap<u32, u64>> = BTreeMap::new();
    for (id, at) in &told.first {
        let (key, number) = id.split_once('.').unwrap();
        by_key.entry(key).or_default().insert(number.parse().unwrap(), *at);
    }
    assert_eq!(by_key.len(), 8);
    for (key, times) in by_key {
        assert!(times.values().is_sorted(), "key {key} is out of order: {times:?}");
    }
    one.finish().assert(0);
    two.finish().assert(0);
    served.stop();
}

#[test]
fn what_would_leave_the_service_open_is_refused() {
    let world = World::new();
    let keys = world.file("keys.json", json!({ "keys": [] }).to_string());
    let open = world.refused(2, &["serve", "--listen", "0.0.0.0:0"]);
    assert!(open.contains("--access-keys"), "{open}");
    // Others may read the keys.
    let mode = |mode| fs::set_permissions(&keys, Permissions::from_mode(mode)).unwrap();
    mode(0o644);
    let exposed = world.refused(6, &["serve", "--listen", "127.0.0.1:0", "--access-keys", &keys]);
    assert!(exposed.contains("chmod 600"), "{exposed}");
    mode(0o600);
    let args = ["serve", "--listen", "0.0.0.0:0", "--access-keys", &keys];
    let plain = world.refused(2, &args);
    assert!(plain.contains("--plain-http"), "{plain}");
    let cert =
        world.refused(6, &[&args[..], &["--tls-cert", "none", "--tls-key", "none"]].concat());
    assert!(cert.contains("none"), "{cert}");
    world.run(&["serve", "--tls-cert", "x"]).assert(2);
    // A refusal makes no store.
    assert!(!world.path("envelog-data").exists());
}

#[test]
fn without_keys_it_serves_this_machine_alone_and_says_so() {
    let world = World::new();
    let mut service = Running::start(world.command(&["serve", "--listen", "127.0.0.1:0"]));
    let line = next(&service.lines());
    let address = line.strip_prefix("listening on http://").unwrap();
    drop(TcpStream::connect(address).unwrap());
    // The store is the service's.
    let locked = world.refused(7, &["create", "shop/orders"]);
    assert!(locked.contains("locked"), "{locked}");
    let taken = world.refused(7, &["serve", "--listen", address, "--store", "other"]);
    assert!(taken.contains("cannot listen"), "{taken}");
    service.interrupt();
    let out = service.wait();
    out.assert(0);
    assert!(
        out.stderr.contains("every program on this machine may do everything"),
        "{}",
        out.stderr
    );
    world.ok(&["create", "shop/orders"]);
}
