//! Requests of any shape against the log service, which is run without a socket.

use std::{cell::RefCell, collections::BTreeSet, fs, os::unix::fs::PermissionsExt};

use envelog::{Store, crypto::Sm4Simd, group::Content};
use envelog_server::fuzzing::Fuzzed;
use md5::{Digest, Md5};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::golden::{DIR, KEYRING};

/// A service takes this many requests. Then a new one takes its place, so that an input meets few
/// projects and Logstores of other inputs.
const REQUESTS: u32 = 2000;
/// The end of the head in an input.
const HEAD_END: &[u8] = b"\n\n";
/// The form of an input, by its first byte.
const RAW: u8 = 0;
const STRICT: u8 = 1;

/// The service, with a project, a Logstore that has a log, and a consumer group.
struct World {
    runtime: Runtime,
    /// Every caller may do everything.
    open: Fuzzed,
    /// Callers need an access key.
    strict: Fuzzed,
    left: u32,
    _dir: TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let keys = dir.path().join("keys.json");
        let key = r#"{"keys":[{"id":"x","secret":"s","projects":["*"],"allow":["read","write"]}]}"#;
        fs::write(&keys, key).expect("a file");
        fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).expect("a file of its own");
        let service = |name: &str, keys| {
            let disk = crate::common::memory::MemoryDisk::of(&Default::default());
            let store = Store::builder(DIR, KEYRING, Sm4Simd::new()).disk(disk).create();
            let store = store.expect("a new store in memory");
            Fuzzed::new(store, dir.path().join(name), keys).expect("a service")
        };
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.enable_time().start_paused(true).build();
        let world = Self {
            runtime: runtime.expect("a runtime"),
            open: service("open", None),
            strict: service("strict", Some(keys)),
            left: REQUESTS,
            _dir: dir,
        };
        for (head, body) in [
            ("POST /", r#"{"projectName":"app"}"#),
            ("POST /logstores", r#"{"logstoreName":"one","shardCount":1}"#),
            (
                "POST /logstores/one/consumergroups",
                r#"{"consumerGroup":"g","timeout":30,"order":true}"#,
            ),
        ] {
            let input = [head.as_bytes(), HEAD_END, body.as_bytes()].concat();
            world.expect_success(&input);
        }
        let group = group();
        let head = format!(
            "POST /logstores/one/shards/lb\ncontent-type: application/x-protobuf\nx-log-bodyrawsize: {}",
            group.len()
        );
        world.expect_success(&[head.as_bytes(), HEAD_END, &group].concat());
        world
    }

    fn expect_success(&self, input: &[u8]) {
        let request = request(input).expect("a request of the right form");
        let answer = self.runtime.block_on(self.open.answer(&request));
        assert!(answer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer));
    }
}

fn group() -> Vec<u8> {
    let log = envelog::group::Log {
        time: 1_700_000_000,
        contents: vec![Content::new("text", "order 17 paid")],
        ..Default::default()
    };
    envelog::LogGroup { logs: vec![log], ..Default::default() }.encode_to_bytes().to_vec()
}

/// A request with the headers that any call needs, and those of the input.
fn request(input: &[u8]) -> Option<Vec<u8>> {
    let end = input.windows(HEAD_END.len()).position(|it| it == HEAD_END)?;
    let body = &input[end + HEAD_END.len()..];
    let head = std::str::from_utf8(&input[..end]).ok()?;
    let mut lines = head.split('\n');
    let mut text = format!("{} HTTP/1.1\r\n", lines.next()?);
    let mut names = BTreeSet::new();
    for line in lines {
        text += &format!("{line}\r\n");
        names.extend(line.split_once(':').map(|(name, _)| name.to_ascii_lowercase()));
    }
    let digest = match body {
        [] => String::new(),
        body => Md5::digest(body).iter().map(|byte| format!("{byte:02X}")).collect(),
    };
    for (name, value) in [
        ("host", "app.sls.local"),
        ("authorization", "LOG x:AAAA"),
        ("date", "Tue, 14 Nov 2023 22:13:20 GMT"),
        ("content-md5", &digest),
        ("content-length", &body.len().to_string()),
    ] {
        if !names.contains(name) && !value.is_empty() {
            text += &format!("{name}: {value}\r\n");
        }
    }
    Some([text.as_bytes(), b"\r\n", body].concat())
}

/// The service answers with success or a refusal, and never with a failure.
pub fn service(data: &[u8]) {
    thread_local!(static WORLD: RefCell<Option<World>> = const { RefCell::new(None) });
    let Some((&form, rest)) = data.split_first() else { return };
    let request = if form == RAW { Some(rest.to_vec()) } else { request(rest) };
    let Some(request) = request else { return };
    WORLD.with_borrow_mut(|world| {
        let it = world.take_if(|it| it.left == 0);
        drop(it);
        let world = world.get_or_insert_with(World::new);
        world.left -= 1;
        let service = if form == STRICT { &world.strict } else { &world.open };
        check(&world.runtime.block_on(service.answer(&request)));
        let health = b"GET /healthz HTTP/1.1\r\nhost: sls.local\r\n\r\n";
        assert!(world.runtime.block_on(service.answer(health)).starts_with(b"HTTP/1.1 200 "));
    });
}

/// A refusal has the form that clients understand.
fn check(answer: &[u8]) {
    // The HTTP library closes a connection that speaks no HTTP.
    let text = String::from_utf8_lossy(answer);
    let Some(rest) = text.strip_prefix("HTTP/1.1 ").or(text.strip_prefix("HTTP/1.0 ")) else {
        assert!(answer.is_empty(), "{text}");
        return;
    };
    let status: u16 = rest.get(..3).and_then(|it| it.parse().ok()).expect("a status");
    assert!(status < 500 || status == 503, "{text}");
}
