//! The output of every command with `--json` is valid against `docs/admin.schema.json`, errors
//! included, and so are the types of the library that no command prints.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
    rc::Rc,
    sync::Arc,
};

use common::{REGION, ROLE, Running, World, byok, made_lines, service};
use envelog::{
    AppendOptions, LogstoreSpec, Payload, Store,
    admin::{
        BackupOptions, RepairOptions, ReplaceCmk, RestoreOptions, RetainOptions, RewrapOptions,
        VerifyOptions,
    },
    crypto::AwsLc,
    kms::LocalKms,
};
use serde::Serialize;
use serde_json::{Value, json};

/// The prefix of the definition of a command's answer.
const ANSWER: &str = "answer.";

/// A world, and the definitions with which its outputs are compared.
struct Checked {
    world: World,
    schema: Value,
    /// By the name of the definition.
    validators: RefCell<BTreeMap<String, Rc<jsonschema::Validator>>>,
}

impl Checked {
    fn new() -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/admin.schema.json");
        let schema = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        Self { world: World::new(), schema, validators: RefCell::default() }
    }

    /// The validator of a definition.
    fn validator(&self, definition: &str) -> Rc<jsonschema::Validator> {
        if let Some(validator) = self.validators.borrow().get(definition) {
            return Rc::clone(validator);
        }
        let found = self.schema["$defs"].get(definition);
        assert!(found.is_some(), "the schema does not define {definition}");
        let mut schema = self.schema.clone();
        schema["$ref"] = json!(format!("#/$defs/{definition}"));
        let options = jsonschema::options().with_draft(jsonschema::Draft::Draft202012);
        let validator = Rc::new(options.should_validate_formats(true).build(&schema).unwrap());
        self.validators.borrow_mut().insert(definition.to_owned(), Rc::clone(&validator));
        validator
    }

    fn valid(&self, definition: &str, value: &Value) {
        let validator = self.validator(definition);
        let errors: Vec<_> = validator
            .iter_errors(value)
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{definition}: {errors:#?}\n{value:#}");
    }

    /// Runs a command with `--json`, which must end with this status. Its answer and its error must
    /// be valid. Returns the answer, which is null if there is none.
    fn ends(&self, status: i32, command: &str, args: &[&str]) -> Value {
        let words: Vec<&str> = command.split(' ').chain(args.iter().copied()).collect();
        let out = self.world.run(&[&words[..], &["--json"]].concat());
        out.assert(status);
        if status == 0 {
            assert_eq!(out.stderr, "", "{command}");
        } else {
            self.valid("failure", &serde_json::from_str(&out.stderr).unwrap());
        }
        if out.stdout.is_empty() {
            return Value::Null;
        }
        let answer = serde_json::from_slice(&out.stdout).unwrap();
        self.valid(&definition(command), &answer);
        answer
    }

    fn run(&self, command: &str, args: &[&str]) -> Value {
        let answer = self.ends(0, command, args);
        assert!(!answer.is_null(), "{command} prints nothing");
        answer
    }

    /// Runs a command that prints one document a line. Returns the documents.
    fn lines(&self, command: &str, args: &[&str]) -> Vec<Value> {
        let stdout = self.world.ok(&[&[command], args, &["--json"]].concat());
        let lines = stdout.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
        let lines: Vec<Value> = lines.map(|line| serde_json::from_slice(line).unwrap()).collect();
        assert!(!lines.is_empty(), "{command} prints nothing");
        lines.iter().for_each(|line| self.valid(&definition(command), line));
        lines
    }

    /// A value of the library.
    fn library(&self, definition: &str, value: impl Serialize) {
        self.valid(definition, &serde_json::to_value(value).unwrap());
    }
}

fn definition(command: &str) -> String {
    format!("{ANSWER}{}", command.replace(' ', "."))
}

/// All commands without subcommands of their own, as `--help` lists them.
fn commands(world: &World, prefix: &[&str]) -> Vec<String> {
    let help = String::from_utf8(world.ok(&[prefix, &["--help"]].concat())).unwrap();
    let Some((_, list)) = help.split_once("\nCommands:\n") else { return vec![prefix.join(" ")] };
    let name = |line: &str| {
        let name = line.strip_prefix("  ")?.split(' ').next()?;
        (!name.is_empty() && name != "help").then(|| name.to_owned())
    };
    let names = list.lines().take_while(|line| !line.is_empty()).filter_map(name);
    names.flat_map(|name| commands(world, &[prefix, &[&name]].concat())).collect()
}

#[test]
fn every_answer_and_every_error_is_valid() {
    let checked = Checked::new();
    let key = kms(&checked);
    logstores(&checked, &key);
    data(&checked);
    keys(&checked, &key);
    library(&checked);
    errors(&checked, &key);
    recovery(&checked, &key);
    checked.run("demo", &[]);
    let lines = checked.world.file("lines", made_lines(200));
    checked.run("bench", &[&lines, "--dir", ".", "--seconds", "0.05"]);
    checked.run("settings", &[]);
    #[cfg(feature = "serve")]
    checked.run("bench", &["--serve", "--dir", ".", "--seconds", "0.3", "--connections", "5"]);
    #[cfg(feature = "serve")]
    serve(&checked);

    let seen: BTreeSet<String> = checked.validators.into_inner().into_keys().collect();
    let commands = commands(&checked.world, &[]);
    assert!(commands.len() > 30 && commands.contains(&"keys rotate-data".to_owned()));
    let mut all: BTreeSet<String> = commands.iter().map(|command| definition(command)).collect();
    // These print no JSON, with --json neither.
    for command in ["completions", "man"] {
        assert!(all.remove(&definition(command)));
    }
    let answers: BTreeSet<String> =
        seen.iter().filter(|name| name.starts_with(ANSWER)).cloned().collect();
    assert_eq!(answers, all, "the commands that this test ran, and those that --help lists");
}

/// `serve` prints one document, and ends by a signal.
#[cfg(feature = "serve")]
fn serve(checked: &Checked) {
    let args = ["serve", "--listen", "127.0.0.1:0", "--store", "served", "--json"];
    let mut service = Running::start(checked.world.command(&args));
    let lines = service.lines();
    let mut text = String::new();
    while serde_json::from_str::<Value>(&text).is_err() {
        text.push_str(&lines.recv().unwrap());
    }
    checked.valid(&definition("serve"), &serde_json::from_str(&text).unwrap());
    service.terminate();
    service.wait().assert(0);
}

/// The commands of the embedded KMS. Returns a key.
fn kms(checked: &Checked) -> String {
    let create = || {
        let answer = checked.run("kms create-key", &["--region", REGION, "--grant", ROLE]);
        answer["cmk_key_id"].as_str().unwrap().to_owned()
    };
    let (key, other) = (create(), create());
    for command in ["kms disable", "kms enable", "kms rotate"] {
        checked.run(command, &[&key]);
    }
    checked.run("kms schedule-deletion", &[&other, "--days", "9"]);
    let listed = checked.run("kms list", &[]);
    assert!(listed["keys"].as_array().unwrap().iter().any(|key| !key["deletion_day"].is_null()));
    checked.run("kms cancel-deletion", &[&other]);
    checked.run("kms grant", &[&other, "acs:ram::1:role/other"]);
    checked.run("kms ungrant", &[&other, "acs:ram::1:role/other"]);
    checked.run("kms delete", &[&other]);
    checked.run("kms list", &[]);
    key
}

/// Makes p/plain, p/service and p/byok.
fn logstores(checked: &Checked, key: &str) {
    checked.run("create", &["p/plain"]);
    checked.run("create", &["p/service", "--encrypt-conf", &service("default").to_string()]);
    let every = [
        "--shards=2",
        "--ttl=30",
        "--retention-bytes=10GiB",
        "--rotate-key-days=90",
        "--rotate-key-bytes=1GiB",
        "--compression=zstd",
        "--payload-hash=sm3",
        "--probe=own",
    ];
    let conf = byok("sm4", key).to_string();
    checked.run("create", &[&["p/byok", "--encrypt-conf", &conf][..], &every].concat());
    checked.run("create", &["p/gone"]);
    checked.run("list", &[]);
    let split = checked.run("split", &["p/gone", "--shard", "0"]);
    assert_eq!(split["low"]["parents"], json!([0]));
    checked.run("merge", &["p/gone", "--shard", "1"]);
    checked.run("shards", &["p/gone"]);
    checked.ends(6, "merge", &["p/gone", "--shard", "3"]);
    checked.ends(1, "split", &["p/gone", "--shard", "0"]);
    checked.run("delete", &["p/gone", "--yes"]);
    let config = checked.run("get", &["p/byok"]).to_string();
    checked.run("update", &["p/byok", "--config", &config]);
}

/// The commands of data.
fn data(checked: &Checked) {
    let world = &checked.world;
    let text = world.file("text", [&made_lines(500)[..], b"caf\xe9 \xff\n"].concat());
    for name in ["p/plain", "p/service", "p/byok"] {
        checked.run("append", &[name, &text]);
    }
    let with_ack = world.run(&["append", "p/byok", &text, "--ack", "--json"]);
    with_ack.assert(0);
    checked.valid("answer.append", &serde_json::from_str(&with_ack.stderr).unwrap());
    opaque(world);
    let lines = checked.lines("read", &["p/plain"]);
    assert!(lines.iter().any(|line| !line["opaque"].is_null()));
    assert!(lines.iter().any(|line| !line["contents"]["content"]["base64"].is_null()));
    checked.lines("tail", &["p/byok", "-n", "3"]);
    checked.run("status", &[]);
    checked.run("verify", &[]);
    checked.run("verify", &["p/byok", "--keyless"]);
    // The directory of the test may be on a disk that is nearly full.
    let out = checked.world.run(&["doctor", "--json"]);
    checked.valid("answer.doctor", &serde_json::from_slice(&out.stdout).unwrap());
    checked.run("checkpoint", &["--out", "checkpoint"]);
    checked.run("verify", &["--against", "checkpoint"]);
    checked.run("repair", &["p/plain", "--shard", "0", "--yes"]);
    checked.run("repair", &["--yes"]);
    checked.run("retain", &[]);
    checked.run("retain", &["--trust-clock"]);
    checked.run("backup", &["backup"]);
    checked.run("backup", &["backup", "--prune", "--copy"]);
    // The restored store has its keyring elsewhere.
    let keyring = ["--keyring", "envelog-data.keyring"];
    let restore = [&["backup", "--store", "restored"][..], &keyring].concat();
    checked.run("restore", &restore);
    let until = ["backup", "--store", "until", "--until", "2026-01-31T12:00:00Z", "--copy"];
    checked.run("restore", &[&until[..], &keyring].concat());
    checked.ends(1, "restore", &restore);
    for segment in world.segments("envelog-data") {
        checked.run("inspect", &[segment.to_str().unwrap()]);
    }
    // A segment that was not sealed, since its writer was killed.
    let mut writer = Running::start(world.command(&["append", "p/plain", "-", "--ack"]));
    let acks = writer.lines();
    std::io::Write::write_all(writer.stdin.as_mut().unwrap(), b"one\n").unwrap();
    acks.recv().unwrap();
    writer.kill();
    let open = |path: &std::path::PathBuf| {
        checked.run("inspect", &[path.to_str().unwrap()])["footer"].is_null()
    };
    assert!(world.segments("envelog-data").iter().any(open));
    checked.run("verify", &[]);
    checked.run("append", &["p/plain", &text]);
    checked.run("status", &["p/plain"]);
}

fn open(world: &World) -> Store {
    let (dir, keyring) = (world.path("envelog-data"), world.path("envelog-data.keyring"));
    let kms = Arc::new(LocalKms::at(world.path("envelog-data.kms")));
    Store::builder(dir, keyring, AwsLc::new()).kms(kms).open().unwrap()
}

/// Appends a record that is no group. No command does.
fn opaque(world: &World) {
    let store = open(world);
    let logstore = store.logstore(&"p/plain".parse().unwrap()).unwrap();
    let payload = Payload::opaque(&b"\x00\xff"[..]).unwrap();
    logstore.append(payload, &AppendOptions::default()).unwrap();
    drop(logstore);
    store.close().unwrap();
}

/// The commands of keys, but for the recovery.
fn keys(checked: &Checked, key: &str) {
    for name in ["p/service", "p/byok"] {
        checked.run("keys rotate-data", &[name]);
    }
    checked.run("keys rewrap", &["p/byok"]);
    checked.run("keys rewrap", &[]);
    checked.run("keys usage", &[]);
    checked.run("keys rotate-service", &[]);
    checked.run("keys usage", &[]);
    checked.run("keys audit", &[]);
    checked.run("keys audit", &["--out", "export"]);
    checked.run("keys audit", &["--verify"]);
    checked.run("keys audit", &["--verify", "--against", "export"]);
    checked.run("keys backup", &["--out", "keyring-copy"]);
    let conf = byok("sm4", key).to_string();
    checked.run("keys replace-cmk", &["p/byok", "--encrypt-conf", &conf]);
    checked.run("keys shred", &["p/byok", "--version", "1", "--yes"]);
    checked.run("status", &["p/byok"]);
    let cmk = byok("sm4", key)["user_cmk_info"].to_string();
    checked.run("keys rewrap-keyring", &["--service-cmk", &cmk]);
    checked.run("status", &[]);
    checked.run("keys rewrap-keyring", &["--plain"]);
}

/// The types of the library: requests, and the answers that no command prints.
fn library(checked: &Checked) {
    let store = open(&checked.world);
    let name = "p/service".parse::<envelog::LogstoreName>().unwrap();
    checked.library("retention_report", store.admin().retain(&RetainOptions::default()).unwrap());
    checked.library("audit_export", store.keys().export_audit().unwrap());
    let checkpoint = store.admin().checkpoint().unwrap();
    checked.library("checkpoint", &checkpoint);
    let options = VerifyOptions::default().logstore(name).against(checkpoint);
    round_trip(checked, "verify_options", &options);
    round_trip(checked, "verify_options", &VerifyOptions::default());
    let report = store.admin().verify(&options, &mut |at| checked.library("verify_progress", at));
    checked.library("verify_report", report.unwrap());
    let rewrap = RewrapOptions::default().region_id("nowhere".to_owned()).restart(true);
    round_trip(checked, "rewrap_options", &rewrap);
    let seen = &mut |at: &_| checked.library("rewrap_progress", at);
    checked.library("rewrap_report", store.keys().rewrap_all(&rewrap, seen).unwrap());
    round_trip(checked, "retain_options", &RetainOptions::default().trust_clock(true));
    round_trip(checked, "repair_options", &RepairOptions::default().accept_tampered(true));
    round_trip(checked, "backup_options", &BackupOptions::default().prune(true));
    round_trip(checked, "restore_options", &RestoreOptions::default().until_us(17));
    let dir = checked.world.path("by-the-library");
    let seen = &mut |at| checked.library("copy_progress", at);
    let report = store.admin().backup(dir, &BackupOptions::default(), seen).unwrap();
    checked.library("backup_report", report);
    round_trip(checked, "replace_cmk", &ReplaceCmk::default().fresh_data_key(false));
    round_trip(checked, "logstore_spec", &LogstoreSpec::default());
    let spec: LogstoreSpec = serde_json::from_value(json!({ "shard_count": 2 })).unwrap();
    assert_eq!(spec, LogstoreSpec::default().shard_count(2));
    serde_json::from_value::<LogstoreSpec>(json!({ "shards": 2 })).unwrap_err();
    store.close().unwrap();
}

/// A request has the same JSON after it was read.
fn round_trip<T>(checked: &Checked, definition: &str, request: &T)
where
    T: Serialize + for<'de> serde::Deserialize<'de>,
{
    let json = serde_json::to_value(request).unwrap();
    checked.valid(definition, &json);
    let read: T = serde_json::from_value(json.clone()).unwrap();
    assert_eq!(serde_json::to_value(read).unwrap(), json);
    serde_json::from_value::<T>(json!({ "no such field": 1 })).err().unwrap();
    assert!(!checked.validator(definition).is_valid(&json!({ "no such field": 1 })));
}

/// Each exit status, and answers that come with an error.
fn errors(checked: &Checked, key: &str) {
    let world = &checked.world;
    checked.ends(1, "inspect", &["no-such-file"]);
    checked.ends(2, "status", &["--no-such-option"]);
    checked.ends(2, "delete", &["p/plain"]);
    checked.ends(6, "create", &["p/new", "--encrypt-conf", "{}"]);
    checked.ends(7, "list", &["--store", "no-such-store"]);

    world.ok(&["kms", "disable", key]);
    checked.ends(3, "read", &["p/byok"]);
    let report = checked.ends(3, "verify", &[]);
    assert_eq!(report["refused"][0]["logstore"], "p/byok");
    let report = checked.ends(3, "keys rewrap", &[]);
    assert!(!report["failed"].as_array().unwrap().is_empty());
    let status = checked.run("status", &[]);
    let byok = status["logstores"].as_array().unwrap().iter().find(|it| it["name"] == "p/byok");
    assert_eq!(byok.unwrap()["key"]["state"], "revoked");
    world.ok(&["kms", "enable", key]);

    let (kms, away) = (world.path("envelog-data.kms"), world.path("away.kms"));
    fs::rename(&kms, &away).unwrap();
    checked.ends(4, "kms list", &[]);
    checked.ends(4, "read", &["p/byok", "--kms-dir", "envelog-data.kms"]);
    fs::rename(&away, &kms).unwrap();

    let segment = world.segments("envelog-data").swap_remove(0);
    let bytes = fs::read(&segment).unwrap();
    let mut bad = bytes.clone();
    bad[bytes.len() / 2] ^= 1;
    fs::write(&segment, bad).unwrap();
    let report = checked.ends(5, "verify", &[]);
    assert!(!report["faults"].as_array().unwrap().is_empty());
    fs::write(&segment, bytes).unwrap();

    checked.ends(5, "keys audit", &["--verify", "--against", &older_export(world)]);
}

/// An export whose last record is another than it was.
fn older_export(world: &World) -> String {
    let text = fs::read_to_string(world.path("export")).unwrap();
    let (records, head) = text.trim_end().rsplit_once('\n').unwrap();
    let mut head: Value = serde_json::from_str(head).unwrap();
    head["head"]["hash"] = "0".repeat(64).into();
    world.file("other-export", format!("{records}\n{head}\n"))
}

/// The loss of the keyring.
fn recovery(checked: &Checked, key: &str) {
    fs::remove_file(checked.world.path("envelog-data.keyring")).unwrap();
    let found = checked.ends(6, "keys recover", &["--without-keyring"]);
    assert!(!found["found"].as_array().unwrap().is_empty());
    let cmk = byok("sm4", key)["user_cmk_info"].clone();
    let expect = checked.world.file("expect", json!({ "p/byok": cmk }).to_string());
    let report = checked.run("keys recover", &["--without-keyring", "--expect", &expect]);
    assert!(!report["lost"].as_array().unwrap().is_empty());
    recovery_by_the_library(checked, &cmk);
}

/// The same by the library, which reports its progress.
fn recovery_by_the_library(checked: &Checked, cmk: &Value) {
    let (dir, keyring) =
        (checked.world.path("envelog-data"), checked.world.path("another.keyring"));
    let kms = Arc::new(LocalKms::at(checked.world.path("envelog-data.kms")));
    let expected = [("p/byok".parse().unwrap(), serde_json::from_value(cmk.clone()).unwrap())];
    let mut seen = Vec::new();
    let (store, report) = Store::builder(dir, keyring, AwsLc::new())
        .kms(kms)
        .recover_without_keyring_with(&expected.into(), &mut |at| {
            checked.library("recover_progress", at);
            seen.push((at.done, at.total));
        })
        .unwrap();
    checked.library("recover_report", report);
    let (_, total) = seen[0];
    assert!(total > 1);
    assert_eq!(seen, (0..=total).map(|done| (done, total)).collect::<Vec<_>>());
    store.close().unwrap();
}

/// The parts of the schema that no output can check.
#[test]
fn the_schema_is_strict_and_has_no_definition_without_use() {
    let checked = Checked::new();
    assert!(jsonschema::meta::is_valid(&checked.schema));
    let mut used = BTreeSet::new();
    strict(&checked.schema, "", &mut used);
    let defined = checked.schema["$defs"].as_object().unwrap().keys();
    // The types that the library takes or returns, and no command prints.
    let library = [
        "failure",
        "logstore_spec",
        "verify_options",
        "verify_progress",
        "retention_report",
        "rewrap_options",
        "rewrap_progress",
        "recover_progress",
        "retain_options",
        "repair_options",
        "backup_options",
        "copy_progress",
        "restore_options",
        "replace_cmk",
        "audit_export",
        "delete_report",
    ];
    for name in defined.filter(|name| !name.starts_with(ANSWER)) {
        assert!(used.contains(name) || library.contains(&name.as_str()), "{name} has no use");
    }
}

/// Every object refuses unknown fields. Collects the names of references.
fn strict(schema: &Value, at: &str, used: &mut BTreeSet<String>) {
    match schema {
        Value::Object(fields) => {
            if fields.contains_key("properties") && fields.contains_key("type") {
                assert_eq!(fields["additionalProperties"], false, "{at}");
            }
            if let Some(Value::String(name)) = fields.get("$ref") {
                used.insert(name.trim_start_matches("#/$defs/").to_owned());
            }
            fields.iter().for_each(|(name, it)| strict(it, &format!("{at}/{name}"), used));
        }
        Value::Array(all) => all.iter().for_each(|it| strict(it, at, used)),
        _ => {}
    }
}
