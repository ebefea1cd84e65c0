//! Administrative commands with `--endpoint`: their output, the permissions that they need, and how
//! they end when a connection or a process ends in the middle.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeMap,
    fs::{self, Permissions},
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::{PermissionsExt, symlink},
    thread,
    time::{Duration, Instant, SystemTime},
};

use common::{Out, ROLE, Running, World, byok, copy_dir, made_lines, service};
use envelog_server::client::{Key, Method, nonce, sign};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// How long to wait for something that happens in the end.
const IN_THE_END: Duration = Duration::from_secs(60);
const LOGSTORES: [&str; 3] = ["shop/orders", "shop/paid", "other/logs"];

/// A store that a service serves, and a copy of it.
struct Served {
    world: World,
    /// The copy, for the same commands without a service.
    copy: World,
    /// The customer's key of `shop/paid`, and another.
    keys: [String; 2],
    address: String,
    service: Option<Running>,
}

impl Served {
    fn new() -> Self {
        let world = World::new();
        let keys = [world.create_key(), world.create_key()];
        world.create("shop/orders", &service("default"));
        world.create("shop/paid", &byok("sm4", &keys[0]));
        world.create("other/logs", &Value::Null);
        let lines = world.file("lines", made_lines(500));
        for name in LOGSTORES {
            world.ok(&["append", name, &lines]);
        }
        let copy = World::new();
        for dir in ["envelog-data", "envelog-data.kms"] {
            copy_dir(&world.path(dir), &copy.path(dir));
        }
        let keyring = "envelog-data.keyring";
        fs::copy(world.path(keyring), copy.path(keyring)).unwrap();
        for world in [&world, &copy] {
            fs::create_dir(world.path("backups")).unwrap();
        }
        let key = |id: &str, projects: &[&str], allow: &[&str], roles: &[&str]| {
            json!({ "id": id, "secret": secret(id), "projects": projects, "allow": allow,
                    "pass_roles": roles })
        };
        let all = json!({ "keys": [
            key("root", &["*"], &["admin"], &["*"]),
            key("shop", &["shop"], &["admin", "write"], &[]),
            key("reader", &["*"], &["read", "write"], &["*"]),
            key("most", &["*s*", "o*"], &["admin"], &[]),
        ] });
        private(&world, "keys.json", &all);
        for id in ["root", "shop", "reader", "most"] {
            private(&world, id, &json!({ "id": id, "secret": secret(id) }));
        }
        private(&world, "forged", &json!({ "id": "root", "secret": "a guess" }));
        let address = "127.0.0.1:0".to_owned();
        let mut served = Self { world, copy, keys, address, service: None };
        served.start(&[]);
        served
    }

    fn start(&mut self, more: &[&str]) {
        let args = ["serve", "--listen", &self.address, "--access-keys", "keys.json"];
        let args = [&args[..], &["--backup-dir", "backups"], more].concat();
        let mut service = Running::start(self.world.command(&args));
        let line = service.lines().recv_timeout(IN_THE_END).unwrap();
        self.address = line.rsplit_once("://").unwrap().1.to_owned();
        self.service = Some(service);
    }

    fn stop(&mut self) {
        let service = self.service.take().unwrap();
        service.terminate();
        service.wait().assert(0);
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// A command to the service, with the access key in this file.
    fn run(&self, key: &str, args: &[&str]) -> Out {
        let endpoint = self.endpoint();
        self.world.run(&[args, &["--endpoint", &endpoint, "--access-key", key]].concat())
    }

    /// Runs a command by the service and on the copy. Requires that they end alike, and returns
    /// both outputs.
    fn both(&self, status: i32, args: &[&str]) -> [Out; 2] {
        let remote = self.run("root", args);
        let local = self.copy.run(args);
        assert_eq!(remote.stderr, local.stderr, "{args:?}");
        remote.assert(status);
        local.assert(status);
        [remote, local]
    }

    /// As [`Served::both`], as text and as JSON. Returns the JSON.
    fn same(&self, status: i32, args: &[&str]) -> Value {
        let [remote, local] = self.both(status, args);
        assert_eq!(without_times(&remote.text()), without_times(&local.text()), "{args:?}");
        self.same_json(status, args)
    }

    fn same_json(&self, status: i32, args: &[&str]) -> Value {
        let args = [args, &["--json"]].concat();
        let [remote, local] = self.both(status, &args);
        if local.stdout.is_empty() {
            assert!(remote.stdout.is_empty(), "{args:?}");
            return Value::Null;
        }
        // The order of the fields too.
        assert_eq!(without_digits(&remote.text()), without_digits(&local.text()), "{args:?}");
        let [remote, local] =
            [remote, local].map(|out| comparable(serde_json::from_slice(&out.stdout).unwrap()));
        assert_eq!(remote, local, "{args:?}");
        remote
    }

    /// The commands that the audit log of the service has, with their callers.
    fn commands(&self) -> Vec<String> {
        let log: Value =
            serde_json::from_slice(&self.world.ok(&["keys", "audit", "--json"])).unwrap();
        let records = log["records"].as_array().unwrap().iter();
        let received = records.filter(|record| record["event"] == "command_received");
        received.map(|record| record["detail"].as_str().unwrap().to_owned()).collect()
    }
}

fn secret(id: &str) -> String {
    format!("secret of {id}")
}

fn private(world: &World, name: &str, content: &Value) {
    let path = world.file(name, content.to_string());
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
}

/// An answer without times, and without what a process counts for itself.
fn comparable(mut value: Value) -> Value {
    fn strip(value: &mut Value) {
        match value {
            Value::Array(values) => values.iter_mut().for_each(strip),
            Value::Object(fields) => {
                if fields.get("what").is_some_and(|what| what == "audit_records") {
                    // The audit log of the service has the commands too.
                    fields.retain(|_, value| !value.is_number());
                }
                let times = ["kms", "anchor", "reserve", "lease_left_s", "last_good_age_s"];
                fields.retain(|name, _| !name.ends_with("_us") && !times.contains(&&**name));
                fields.values_mut().for_each(strip);
            }
            _ => {}
        }
    }
    strip(&mut value);
    value
}

/// The words without times, which begin with a year, and without the number of audit records.
fn without_times(text: &str) -> Vec<&str> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let is_kept = |index: usize| {
        !words[index].starts_with("20") && words.get(index + 1).is_none_or(|next| *next != "audit")
    };
    (0..words.len()).filter(|index| is_kept(*index)).map(|index| words[index]).collect()
}

fn without_digits(text: &str) -> String {
    text.chars().filter(|c| !c.is_ascii_digit()).collect()
}

#[test]
fn every_command_prints_what_it_prints_without_a_service() {
    let served = Served::new();
    for args in [
        &["get", "shop/orders"][..],
        &["list"],
        &["keys", "usage"],
        &["verify"],
        &["verify", "shop/paid", "--keyless"],
        &["retain"],
        &["keys", "audit", "--verify"],
        &["keys", "rotate-data", "shop/orders"],
        &["keys", "rotate-data", "shop/paid"],
        &["keys", "rewrap", "shop/orders"],
        &["keys", "rewrap", "--restart"],
        &["keys", "rewrap-keyring", "--plain"],
        &["keys", "shred", "shop/orders", "--version", "1", "--yes"],
        &["keys", "rotate-service"],
        &["repair", "--yes"],
        &["repair", "shop/orders", "--shard", "0", "--yes"],
    ] {
        if args == ["keys", "audit", "--verify"] {
            // The service has recorded the commands, too.
            served.run("root", args).assert(0);
            continue;
        }
        let answer = served.same(0, args);
        assert!(!answer.is_null(), "{args:?}");
    }
    let conf = byok("sm4", &served.keys[1]).to_string();
    let args = ["keys", "replace-cmk", "shop/paid", "--encrypt-conf", &conf];
    let config = served.same_json(0, &args);
    assert_eq!(config["encrypt_conf"]["user_cmk_info"]["cmk_key_id"], json!(served.keys[1]));
    let status = served.same_json(0, &["status"]);
    assert_eq!(status["logstores"].as_array().unwrap().len(), 3);
    served.run("root", &["status"]).assert(0);

    // The audit log of the service has the commands, and otherwise the same.
    let [mut events, local] = served.both(0, &["keys", "audit", "--json"]).map(|out| {
        let log: Value = serde_json::from_slice(&out.stdout).unwrap();
        let records = log["records"].as_array().unwrap().iter();
        records.map(|record| record["event"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    });
    events.retain(|event| event != "command_received");
    assert_eq!(events, local);

    // Refusals have the same status, code and sentence.
    for args in [
        &["get", "shop/none"][..],
        &["get", "shop"],
        &["keys", "shred", "shop/orders", "--version", "2"],
        &["repair", "--yes", "shop/orders"],
        &["repair", "shop/orders", "--shard", "0"],
        &["keys", "rotate-data", "other/logs"],
        &["keys", "shred", "shop/orders", "--version", "99", "--yes"],
        &["repair", "--give-up", "shop/orders", "--yes"],
    ] {
        let status = served.copy.run(args).status.unwrap();
        assert_ne!(status, 0, "{args:?}");
        served.same(status, args);
    }
}

#[test]
fn files_are_written_and_read_where_the_command_is_given() {
    let mut served = Served::new();
    for args in [&["checkpoint", "--out"][..], &["keys", "audit", "--out"]] {
        let file = args[0].to_owned() + ".out";
        let out = served.run("root", &[args, &[&file]].concat());
        out.assert(0);
        // The audit log of the service has the commands too.
        let local = served.copy.run(&[args, &[&file]].concat()).text();
        assert_eq!(without_digits(&out.text()), without_digits(&local));
        let mode = fs::metadata(served.world.path(&file)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
        // The name must be free.
        served.run("root", &[args, &[&file]].concat()).sentence(1);
    }
    let against = ["--against", "checkpoint.out"];
    served.run("root", &[&["verify"], &against[..]].concat()).assert(0);
    served.run("root", &["keys", "audit", "--verify", "--against", "keys.out"]).assert(0);
    // A checkpoint that the store is behind: as without a service, a rollback.
    served.world.file("checkpoint.bad", "no checkpoint");
    let bad = served.run("root", &["verify", "--against", "checkpoint.bad"]);
    assert_ne!(bad.status, Some(0), "{}", bad.text());
    served.stop();
    served.world.ok(&[&["verify"], &against[..]].concat());
}

#[test]
fn damage_is_found_and_its_loss_accepted_while_the_service_runs() {
    let mut served = Served::new();
    served.stop();
    for world in [&served.world, &served.copy] {
        let largest = world.segments("envelog-data").remove(0);
        let mut bytes = fs::read(&largest).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(largest, bytes).unwrap();
    }
    served.start(&[]);
    let report = served.same_json(5, &["verify"]);
    assert_eq!(report["faults"].as_array().unwrap().len(), 1, "{report}");
    served.run("root", &["repair", "--yes"]).assert(0);
    served.copy.run(&["repair", "--yes"]).assert(0);
    let usable = |args: &[&str]| served.run("root", args).status;
    // The loss keeps being named, and the data key of what is left can be used.
    assert_eq!(usable(&["keys", "rotate-data", "shop/orders"]), Some(0));
}

#[test]
fn a_backup_goes_below_the_directory_of_the_operator_alone() {
    let mut served = Served::new();
    let report = served.run("root", &["backup", "daily", "--json"]);
    report.assert(0);
    let local = served.copy.run(&["backup", "backups/daily", "--json"]);
    let [report, local]: [Value; 2] =
        [report, local].map(|out| comparable(serde_json::from_slice(&out.stdout).unwrap()));
    assert_eq!(report["logstores"], json!(3));
    assert_eq!(report["segments"], local["segments"]);
    served.run("root", &["backup", "daily", "--prune"]).assert(0);
    // Its progress is told while it works.
    let arguments = json!({ "dir": "progress", "prune": false, "copy": true });
    let call = json!({ "command": "backup", "arguments": arguments });
    let request = request(&served.address, &json!({ "call": call, "json": false }));
    let answer = exchange(&served.address, &request);
    let (progress, end) = (r#"{"progress":{"unit":"bytes","total":"#, r#"{"end":{"status":0}}"#);
    assert!(answer.contains(progress) && answer.contains(end), "{answer}");
    let keys = ["--keyring", "envelog-data.keyring", "--kms-dir", "envelog-data.kms"];
    let backup = [&["--store", "backups/daily"], &keys[..]].concat();
    served.world.ok(&[&["verify"], &backup[..]].concat());

    symlink(served.world.path("."), served.world.path("backups/link")).unwrap();
    let outside = served.world.path("outside");
    for dir in [outside.to_str().unwrap(), "../outside", "link/outside", "daily/../../outside", "."]
    {
        let (code, _) = served.run("root", &["backup", dir, "--json"]).json_error(6);
        assert_eq!(code, "backup_dir", "{dir}");
    }
    assert!(!outside.exists());
    // Without the setting there are none.
    served.stop();
    let args = ["serve", "--listen", &served.address, "--access-keys", "keys.json"];
    let mut service = Running::start(served.world.command(&args));
    service.lines().recv_timeout(IN_THE_END).unwrap();
    let refusal = served.run("root", &["backup", "daily"]).sentence(6);
    assert!(refusal.contains("--backup-dir"), "{refusal}");
    service.terminate();
    service.wait().assert(0);
}

#[test]
fn a_key_administers_its_projects_and_only_one_for_all_projects_the_store() {
    let served = Served::new();
    let new_key = byok("sm4", &served.keys[1]).to_string();
    let replace = ["keys", "replace-cmk", "shop/paid", "--encrypt-conf", &new_key];
    for (key, args, word) in [
        // No permission at all, although in all projects.
        ("reader", &["keys", "usage"][..], "permission (admin)"),
        ("reader", &["keys", "rotate-data", "shop/orders"], "permission (admin)"),
        // Another project.
        ("shop", &["keys", "rotate-data", "other/logs"], "project other"),
        ("shop", &["get", "other/logs"], "project other"),
        ("shop", &["verify", "other/logs"], "project other"),
        ("shop", &["repair", "other/logs", "--shard", "0", "--yes"], "project other"),
        // A role of another.
        ("shop", &replace, ROLE),
        ("forged", &["list"], "SignatureNotMatch"),
    ] {
        let refusal = served.run(key, args).sentence(6);
        assert!(refusal.contains(word), "{key} {args:?}: {refusal}");
    }
    let rewrap_keyring = ["keys", "rewrap-keyring", "--plain"];
    for args in [
        &["list"][..],
        &["status"],
        &["status", "shop/orders"],
        &["verify"],
        &["checkpoint", "--out", "c"],
        &["repair", "--yes"],
        &["retain"],
        &["backup", "daily"],
        &["keys", "rewrap"],
        &["keys", "usage"],
        &["keys", "rotate-service"],
        &["keys", "audit"],
        &["keys", "audit", "--verify"],
        &["keys", "audit", "--out", "a"],
        &rewrap_keyring,
    ] {
        // Patterns that match every project of today are not all projects.
        for key in ["shop", "most"] {
            let refusal = served.run(key, args).sentence(6);
            assert!(refusal.contains("whole store"), "{key} {args:?}: {refusal}");
        }
    }
    assert!(!served.world.path("c").exists() && !served.world.path("backups/daily").exists());
    // No refused command has begun.
    assert_eq!(served.commands(), Vec::<String>::new());
    served.run("shop", &["keys", "rotate-data", "shop/orders"]).assert(0);
    served.run("shop", &["verify", "shop/paid"]).assert(0);
    served.run("most", &["get", "other/logs"]).assert(0);
    let commands = served.commands();
    assert_eq!(commands.len(), 3);
    let first = r#"access key shop: {"command":"rotate_data","arguments":{"name":"shop/orders"}}"#;
    assert_eq!(commands[0], first);
    assert!(commands[2].starts_with("access key most: "), "{}", commands[2]);
}

#[test]
fn the_key_comes_from_a_private_file_or_from_the_environment() {
    let mut served = Served::new();
    let list = |variables: &[(&str, &str)], more: &[&str]| {
        let endpoint = served.endpoint();
        let mut command =
            served.world.command(&[&["list", "--endpoint", &endpoint][..], more].concat());
        command.envs(variables.iter().copied());
        Running::start(command).finish()
    };
    let pair = [("ENVELOG_ACCESS_KEY_ID", "root"), ("ENVELOG_ACCESS_KEY_SECRET", "secret of root")];
    list(&pair, &[]).assert(0);
    list(&[("ENVELOG_ACCESS_KEY", "root")], &[]).assert(0);
    assert!(list(&pair[..1], &[]).sentence(2).contains("access key"));
    // The file precedes.
    list(&pair, &["--access-key", "forged"]).assert(6);
    let loose = served.world.path("root");
    fs::set_permissions(&loose, Permissions::from_mode(0o644)).unwrap();
    let refusal = list(&[], &["--access-key", "root"]).sentence(6);
    assert!(refusal.contains("chmod 600") && !refusal.contains("secret of"), "{refusal}");
    // Commands of data do not go to the service this way.
    let endpoint = served.endpoint();
    let args = ["read", "shop/orders", "--endpoint", &endpoint, "--access-key", "shop"];
    assert!(served.world.run(&args).sentence(2).contains("--endpoint"));
    served.stop();
    let (code, _) = served.run("shop", &["get", "shop/orders", "--json"]).json_error(7);
    assert_eq!(code, "service_unreachable");
}

#[test]
fn without_access_keys_nothing_is_administered() {
    let served = Served::new();
    let other = World::new();
    let mut service = Running::start(other.command(&["serve", "--listen", "127.0.0.1:0"]));
    let line = service.lines().recv_timeout(IN_THE_END).unwrap();
    let endpoint = line.strip_prefix("listening on ").unwrap();
    let args = ["list", "--endpoint", endpoint, "--access-key", "root"];
    let refusal = served.world.run(&args).sentence(6);
    assert!(refusal.contains("access keys"), "{refusal}");
    service.terminate();
    service.wait().assert(0);
}

#[test]
fn the_service_is_known_by_its_certificate() {
    let mut served = Served::new();
    served.stop();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    served.world.file("key.pem", made.signing_key.serialize_pem());
    served.world.file("cert.pem", made.cert.pem());
    served.start(&["--tls-cert", "cert.pem", "--tls-key", "key.pem"]);
    let port = served.address.rsplit_once(':').unwrap().1;
    let endpoint = format!("https://localhost:{port}");
    let args = ["list", "--endpoint", &endpoint, "--access-key", "root"];
    let listed = served.world.ok(&[&args[..], &["--ca", "cert.pem"]].concat());
    assert_eq!(String::from_utf8(listed).unwrap().lines().count(), 3);
    let (code, _) = served.world.run(&[&args[..], &["--json"]].concat()).json_error(7);
    assert_eq!(code, "service_unreachable");
    // Another address than that in the certificate.
    let other = format!("https://{}", served.address);
    let args = ["list", "--endpoint", &other, "--access-key", "root", "--ca", "cert.pem"];
    served.world.run(&args).sentence(7);
    served.stop();
}

/// A signed request of `root`, for a connection of the test.
fn request(address: &str, body: &Value) -> Vec<u8> {
    // A service admits what was signed after the second in which it started.
    thread::sleep(Duration::from_millis(1100));
    let key = Key { id: "root".to_owned(), secret: secret("root").into() };
    let (body, nonce) = (body.to_string(), nonce().unwrap());
    let now = SystemTime::now();
    let headers = sign(&key, &Method::POST, "127.0.0.1", "/admin", &nonce, body.as_bytes(), now);
    let mut request = format!("POST /admin HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n");
    for (name, value) in headers {
        request += &format!("{name}: {value}\r\n");
    }
    format!("{request}Content-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn exchange(address: &str, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(IN_THE_END)).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn a_recorded_request_is_refused_also_after_a_restart() {
    let mut served = Served::new();
    let call = json!({ "command": "rotate_data", "arguments": { "name": "shop/orders" } });
    let request = request(&served.address, &json!({ "call": call, "json": true }));
    let answer = exchange(&served.address, &request);
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("data_key_version"), "{answer}");
    let again = exchange(&served.address, &request);
    assert!(again.starts_with("HTTP/1.1 401 ") && again.contains("has come before"), "{again}");
    // With another body, the signature is wrong.
    let text = String::from_utf8(request.clone()).unwrap().replace("true}", "null}");
    assert!(exchange(&served.address, text.as_bytes()).starts_with("HTTP/1.1 401 "));
    served.stop();
    served.start(&[]);
    let again = exchange(&served.address, &request);
    assert!(again.contains("before the service started"), "{again}");
    let rotated = served.commands();
    assert_eq!(rotated.len(), 1, "{rotated:?}");
}

#[test]
fn a_command_goes_on_when_its_client_is_gone() {
    let served = Served::new();
    let arguments = json!({ "dir": "left", "prune": false, "copy": true });
    let call = json!({ "command": "backup", "arguments": arguments });
    let request = request(&served.address, &json!({ "call": call, "json": true }));
    let mut stream = TcpStream::connect(&served.address).unwrap();
    stream.write_all(&request).unwrap();
    // The answer begins when the command does.
    let mut first = [0; 8];
    stream.read_exact(&mut first).unwrap();
    drop(stream);
    let finished = served.world.path("backups/left/BACKUP");
    let began = Instant::now();
    while !finished.exists() {
        assert!(began.elapsed() < IN_THE_END, "the backup was given up");
        thread::sleep(Duration::from_millis(20));
    }
    served.run("root", &["keys", "usage"]).assert(0);
}

#[test]
fn a_service_that_is_killed_is_no_success() {
    let mut served = Served::new();
    // Stopped, the service accepts the connection and does not answer.
    let service = served.service.take().unwrap();
    let pid = Pid::from_raw(service.id().try_into().unwrap()).unwrap();
    kill_process(pid, Signal::STOP).unwrap();
    let endpoint = served.endpoint();
    let args =
        ["keys", "rotate-service", "--endpoint", &endpoint, "--access-key", "root", "--json"];
    let client = Running::start(served.world.command(&args));
    thread::sleep(Duration::from_millis(300));
    service.kill();
    let (code, _) = client.finish().json_error(7);
    assert_eq!(code, "service_unreachable");
    served.start(&[]);
    served.run("root", &["keys", "rotate-service"]).assert(0);
    served.run("root", &["verify"]).assert(0);
}

#[test]
fn an_answer_without_an_end_is_no_success() {
    let world = World::new();
    private(&world, "key", &json!({ "id": "any", "secret": "any" }));
    let head = "HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n";
    let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
    let chunked = format!("{head}Transfer-Encoding: chunked\r\n\r\n");
    let line = chunk("{\"line\":\"one\"}\n\n");
    let answers: BTreeMap<&str, (String, i32)> = BTreeMap::from([
        ("broken", (format!("{chunked}{line}"), 7)),
        ("no end", (format!("{chunked}{line}0\r\n\r\n"), 7)),
        ("half a line", (format!("{chunked}{line}{}0\r\n\r\n", chunk("{\"end\":{\"st")), 1)),
        ("no JSON", (format!("{chunked}{line}{}", chunk("<html>\n")), 1)),
        ("an end", (format!("{chunked}{line}{}", chunk("{\"end\":{\"status\":0}}\n")), 0)),
        ("nothing", (String::new(), 7)),
        (
            "an error with status 0",
            (
                format!(
                    "{chunked}{}",
                    chunk(
                        "{\"end\":{\"status\":0,\"error\":{\"code\":\"x\",\"kind\":\"y\",\"message\":\"z\"}}}\n"
                    )
                ),
                1,
            ),
        ),
        ("a status alone", (format!("{chunked}{}", chunk("{\"end\":{\"status\":3}}\n")), 3)),
        ("another service", ("HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nno".to_owned(), 1)),
    ]);
    for (what, (answer, status)) in answers {
        let out = answered(&world, &["list"], answer.into_bytes());
        out.assert(status);
        let printed = ["broken", "no end", "half a line", "no JSON", "an end"].contains(&what);
        assert_eq!(out.text(), if printed { "one\n" } else { "" }, "{what}");
    }
}

/// Runs a command with a service that answers with these bytes.
fn answered(world: &World, args: &[&str], answer: Vec<u8>) -> Out {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let serving = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 4096];
        // The whole of it, since a close with unread bytes is a reset.
        stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
        while stream.read(&mut request).is_ok_and(|read| read > 0) {}
        let _ = stream.write_all(&answer);
    });
    let out = world.run(&[args, &["--endpoint", &endpoint, "--access-key", "key"]].concat());
    serving.join().unwrap();
    out
}

#[test]
fn a_success_without_its_answer_is_a_failure() {
    let world = World::new();
    private(&world, "key", &json!({ "id": "any", "secret": "any" }));
    let head = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
    let done = "{\"end\":{\"status\":0}}\n";
    for args in [&["list", "--json"][..], &["keys", "usage"], &["checkpoint", "--out", "c"]] {
        let why = answered(&world, args, format!("{head}{done}").into_bytes());
        assert_eq!(why.status, Some(1), "{args:?}");
        assert!(why.stderr.contains("no answer"), "{args:?}: {}", why.stderr);
    }
    let answer = format!("{head}{{\"answer\":{{\"logstores\":[]}}}}\n{done}");
    answered(&world, &["list", "--json"], answer.into_bytes()).assert(0);
    assert!(!world.path("c").exists());
}

#[test]
fn a_line_that_does_not_end_is_given_up() {
    let world = World::new();
    private(&world, "key", &json!({ "id": "any", "secret": "any" }));
    let mut answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_vec();
    answer.resize((65 << 20) + 100, b'x');
    let refusal = answered(&world, &["list"], answer).sentence(7);
    assert!(refusal.contains("more than 64 MiB"), "{refusal}");
}

#[test]
fn what_a_service_says_commands_no_terminal() {
    let world = World::new();
    private(&world, "key", &json!({ "id": "any", "secret": "any" }));
    let evil = "\x1b]0;x\x07\x1b[31mr\u{202e}\u{200f}\r\nnew\u{9b}31m";
    let head = "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
    let error = json!({ "code": evil, "kind": evil, "message": evil });
    let refusal = json!({ "errorCode": evil, "errorMessage": evil });
    for (args, answer) in [
        (&["list"][..], format!("HTTP/1.1 400 No\r\nConnection: close\r\n\r\n{refusal}")),
        (&["list"], format!("{head}{}\n", json!({ "end": { "status": 1, "error": error } }))),
        (
            &["list", "--json"],
            format!("{head}{}\n", json!({ "end": { "status": 1, "error": error } })),
        ),
        (&["list"], format!("{head}{}\n", json!({ "note": evil }))),
        (&["list"], format!("{head}{}\n", json!({ "line": evil }))),
        (&["list"], format!("{head}{}\n", json!({ "answer": evil }))),
    ] {
        let out = answered(&world, args, answer.into_bytes());
        let text = out.text() + &out.stderr;
        let harmful =
            |c: char| (c.is_control() && c != '\n') || matches!(c, '\u{200f}' | '\u{202e}');
        assert!(!text.contains(harmful), "{args:?}: {text:?}");
        assert!(text.contains("]0;x") && !text.contains("\nnew"), "{args:?}: {text:?}");
    }
}
