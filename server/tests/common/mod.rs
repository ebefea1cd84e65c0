//! A service in this process, and a client that signs as the SDKs do and can also do it wrong.

#![allow(dead_code, clippy::unwrap_used)]

use std::{
    fs,
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    sync::Arc,
    thread::{self, JoinHandle},
    time::Duration,
};

use base64::{Engine, engine::general_purpose::STANDARD};
use envelog::{
    LogGroup, Store, StoreOptions,
    crypto::AwsLc,
    group::{Content, Log},
    kms::LocalKms,
};
use envelog_server::{Server, ServerBuilder};
use hmac::{Hmac, KeyInit, Mac};
use jiff::{Timestamp, fmt::rfc2822};
use md5::{Digest, Md5};
use serde_json::{Value, json};
use sha1::Sha1;
use tempfile::TempDir;
use tokio::sync::oneshot;

pub(crate) const REGION: &str = "cn-hangzhou";
pub(crate) const ROLE: &str = "acs:ram::13234:role/logs";
pub(crate) const PROTOBUF: &str = "application/x-protobuf";

/// A service on a store of its own, with the access keys of [`KEYS`].
pub(crate) struct World {
    pub(crate) dir: TempDir,
    pub(crate) store: Store,
    pub(crate) kms: Arc<LocalKms>,
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    serving: Option<JoinHandle<()>>,
}

/// `root` may do everything. `reader`, `writer` and `admin` have one permission, in `app` alone.
pub(crate) fn keys() -> Value {
    let key = |id: &str, projects: &[&str], allow: &[&str], roles: &[&str]| {
        json!({ "id": id, "secret": secret(id), "projects": projects, "allow": allow,
                "pass_roles": roles })
    };
    json!({ "keys": [
        key("root", &["*"], &["read", "write", "admin"], &["acs:ram::13234:role/*"]),
        key("reader", &["app"], &["read"], &[]),
        key("writer", &["app"], &["write"], &[]),
        key("admin", &["app"], &["admin"], &[]),
    ] })
}

pub(crate) fn secret(id: &str) -> String {
    format!("secret of {id}")
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(|builder| builder)
    }

    pub(crate) fn with(
        settings: impl FnOnce(ServerBuilder) -> ServerBuilder + Send + 'static,
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kms = Arc::new(LocalKms::create_or_open(dir.path().join("kms")).unwrap());
        let options = StoreOptions::default()
            .revalidate_every(Duration::from_millis(200))
            .outage_grace(Duration::from_secs(1));
        let store =
            Store::builder(dir.path().join("store"), dir.path().join("keyring"), AwsLc::new())
                .options(options)
                .kms(Arc::clone(&kms) as _)
                .create()
                .unwrap();
        let path = dir.path().join("keys.json");
        write_keys(&path, &keys());
        let builder = settings(Server::builder().access_keys(path));
        let (address, stop, serving) = start(builder, store.clone());
        Self { dir, store, kms, address, stop: Some(stop), serving: Some(serving) }
    }

    pub(crate) fn keys_path(&self) -> PathBuf {
        self.dir.path().join("keys.json")
    }

    /// Stops the service, and waits for its end.
    pub(crate) fn stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
        self.serving.take().unwrap().join().unwrap();
    }

    /// A call by `root`.
    pub(crate) fn call(&self, method: &str, target: &str, body: &Value) -> Answer {
        let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
        Ask::new(method, target).json(body).send(self)
    }

    /// A call by `root` that must succeed.
    pub(crate) fn ok(&self, method: &str, target: &str, body: &Value) -> Answer {
        let answer = self.call(method, target, body);
        assert_eq!(answer.status, 200, "{method} {target}: {}", answer.text());
        answer
    }

    /// Makes the project `app` with a Logstore.
    pub(crate) fn create(&self, logstore: &str, encrypt_conf: &Value) {
        let _ = self.call("POST", "/", &json!({ "projectName": "app", "description": "" }));
        let mut body = json!({ "logstoreName": logstore, "shardCount": 2 });
        if !encrypt_conf.is_null() {
            body["encrypt_conf"] = encrypt_conf.clone();
        }
        self.ok("POST", "/logstores", &body);
    }

    /// A new key in the embedded KMS, as `encrypt_conf`.
    pub(crate) fn byok(&self) -> (String, Value) {
        let key = self.kms.create_key(REGION, &[ROLE]).unwrap();
        let cmk = json!({ "cmk_key_id": key, "arn": ROLE, "region_id": REGION });
        (key, json!({ "enable": true, "encrypt_type": "sm4", "user_cmk_info": cmk }))
    }

    /// Puts a group with one log.
    pub(crate) fn put(&self, logstore: &str, text: &str) -> Answer {
        Ask::put(logstore, group(text)).send(self)
    }

    /// The values of all logs of a Logstore.
    pub(crate) fn pull_all(&self, logstore: &str) -> Vec<String> {
        let mut found = Vec::new();
        for shard in 0..2 {
            let target = format!("/logstores/{logstore}/shards/{shard}?type=cursor&from=begin");
            let mut cursor =
                self.ok("GET", &target, &Value::Null).json()["cursor"].as_str().unwrap().to_owned();
            loop {
                let answer = self.ok("GET", &pull_target(logstore, shard, &cursor), &Value::Null);
                if answer.header("x-log-count") == "0" {
                    break;
                }
                for range in envelog::group::frames(&answer.body) {
                    let group = LogGroup::decode(&answer.body[range.unwrap()]).unwrap();
                    for content in group.logs.iter().flat_map(|log| &log.contents) {
                        found.push(String::from_utf8(content.value.to_vec()).unwrap());
                    }
                }
                cursor = answer.header("x-log-cursor").to_owned();
            }
        }
        found.sort();
        found
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.stop.is_some() && !thread::panicking() {
            self.stop();
        }
    }
}

pub(crate) fn write_keys(path: &std::path::Path, keys: &Value) {
    let new = path.with_extension("new");
    fs::write(&new, keys.to_string()).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(&new, path).unwrap();
}

pub(crate) fn start(
    builder: ServerBuilder,
    store: Store,
) -> (SocketAddr, oneshot::Sender<()>, JoinHandle<()>) {
    let (stop, stopped) = oneshot::channel();
    let server = builder.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let address = server.local_addr();
    let serving = thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
        runtime.block_on(server.run(store, async { drop(stopped.await) })).unwrap();
    });
    (address, stop, serving)
}

pub(crate) fn pull_target(logstore: &str, shard: u32, cursor: &str) -> String {
    let cursor = cursor.replace('=', "%3D");
    format!("/logstores/{logstore}/shards/{shard}?type=log&cursor={cursor}&count=100")
}

/// A group with one log.
pub(crate) fn group(text: &str) -> Vec<u8> {
    let now = u32::try_from(Timestamp::now().as_second()).unwrap();
    let log =
        Log { time: now, contents: vec![Content::new("text", text.to_owned())], ..Log::default() };
    LogGroup { logs: vec![log], ..LogGroup::default() }.encode_to_bytes().to_vec()
}

/// A request, before it is signed.
#[derive(Clone)]
pub(crate) struct Ask {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) host: String,
    pub(crate) key: String,
    pub(crate) secret: String,
    pub(crate) time: Timestamp,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Ask {
    pub(crate) fn new(method: &str, target: &str) -> Self {
        Self {
            method: method.to_owned(),
            target: target.to_owned(),
            host: "app.sls.local".to_owned(),
            key: "root".to_owned(),
            secret: secret("root"),
            time: Timestamp::now(),
            headers: vec![("x-log-apiversion".to_owned(), "0.6.0".to_owned())],
            body: Vec::new(),
        }
    }

    pub(crate) fn put(logstore: &str, body: Vec<u8>) -> Self {
        let ask = Self::new("POST", &format!("/logstores/{logstore}/shards/lb"));
        let ask = ask.header("x-log-bodyrawsize", &body.len().to_string());
        Self { body, ..ask }.header("content-type", PROTOBUF)
    }

    pub(crate) fn by(mut self, key: &str) -> Self {
        (self.key, self.secret) = (key.to_owned(), secret(key));
        self
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.retain(|(it, _)| it != name);
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn without(mut self, name: &str) -> Self {
        self.headers.retain(|(it, _)| it != name);
        self
    }

    pub(crate) fn json(self, body: impl Into<Vec<u8>>) -> Self {
        Self { body: body.into(), ..self }.header("content-type", "application/json")
    }

    /// The request as bytes, with the first signature.
    pub(crate) fn signed(&self) -> Vec<u8> {
        let date = self.time.to_http_date();
        let mut headers = self.headers.clone();
        headers.push(("x-log-signaturemethod".to_owned(), "hmac-sha1".to_owned()));
        let digest: String = match &self.body[..] {
            [] => String::new(),
            body => Md5::digest(body).iter().map(|byte| format!("{byte:02X}")).collect(),
        };
        let content_type = headers.iter().find(|(name, _)| name == "content-type");
        let content_type = content_type.map_or("", |(_, value)| value);
        let mut text = format!("{}\n{digest}\n{content_type}\n{date}\n", self.method);
        headers.sort();
        for (name, value) in headers.iter().filter(|(name, _)| name.starts_with("x-log-")) {
            text.push_str(&format!("{name}:{value}\n"));
        }
        let (path, query) = self.target.split_once('?').unwrap_or((&self.target, ""));
        text.push_str(&percent_encoding::percent_decode_str(path).decode_utf8_lossy());
        let mut query: Vec<(String, String)> =
            form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        query.sort();
        for (index, (name, value)) in query.iter().enumerate() {
            text.push_str(&format!("{}{name}={value}", if index == 0 { '?' } else { '&' }));
        }
        let mut mac = Hmac::<Sha1>::new_from_slice(self.secret.as_bytes()).unwrap();
        mac.update(text.as_bytes());
        let signature = STANDARD.encode(mac.finalize().into_bytes());
        headers.push(("date".to_owned(), date));
        headers.push(("authorization".to_owned(), format!("LOG {}:{signature}", self.key)));
        if !digest.is_empty() {
            headers.push(("content-md5".to_owned(), digest));
        }
        self.raw(&headers)
    }

    /// The request with these headers.
    pub(crate) fn raw(&self, headers: &[(String, String)]) -> Vec<u8> {
        let mut request =
            format!("{} {} HTTP/1.1\r\nHost: {}\r\n", self.method, self.target, self.host);
        if !headers.iter().any(|(name, _)| name == "content-length" || name == "transfer-encoding")
        {
            request.push_str(&format!("Content-Length: {}\r\n", self.body.len()));
        }
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("Connection: close\r\n\r\n");
        [request.into_bytes(), self.body.clone()].concat()
    }

    pub(crate) fn send(&self, world: &World) -> Answer {
        exchange(world.address, &self.signed())
    }

    /// Sends it, and returns the code of the refusal.
    pub(crate) fn refused(&self, world: &World, status: u16) -> String {
        let answer = self.send(world);
        assert_eq!(answer.status, status, "{} {}: {}", self.method, self.target, answer.text());
        answer.code()
    }
}

trait HttpDate {
    fn to_http_date(self) -> String;
}

impl HttpDate for Timestamp {
    fn to_http_date(self) -> String {
        rfc2822::DateTimePrinter::new().timestamp_to_rfc9110_string(&self).unwrap()
    }
}

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Self {
        let end = bytes
            .windows(4)
            .position(|it| it == b"\r\n\r\n")
            .unwrap_or_else(|| panic!("no answer: {:?}", String::from_utf8_lossy(bytes)));
        let head = std::str::from_utf8(&bytes[..end]).unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let header = |line: &str| {
            let (name, value) = line.split_once(':').unwrap();
            (name.to_ascii_lowercase(), value.trim().to_owned())
        };
        Self { status, headers: lines.map(header).collect(), body: bytes[end + 4..].to_vec() }
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.iter().find(|(it, _)| it == name).map_or("", |(_, value)| value)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{}", self.text()))
    }

    /// The code of a refusal, which must have the form that clients expect.
    pub(crate) fn code(&self) -> String {
        assert_eq!(self.header("content-type"), "application/json");
        assert_eq!(self.header("x-log-requestid").len(), 24);
        let body = self.json();
        assert!(body["errorMessage"].is_string(), "{body}");
        body["errorCode"].as_str().unwrap().to_owned()
    }
}

/// Sends bytes, and reads the answer until the end of the connection.
pub(crate) fn exchange_raw(address: SocketAddr, request: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // The service may refuse the rest.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

pub(crate) fn exchange(address: SocketAddr, request: &[u8]) -> Answer {
    Answer::parse(&exchange_raw(address, request))
}
