//! A moto server that simulates AWS KMS and STS for a test: real HTTP, real key states.
//!
//! moto is installed once into a virtual environment below the target directory. Without `python3`
//! and `pip` the test fails.

#![allow(dead_code)]

use std::{
    env, fs,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

#[path = "../common/python.rs"]
mod python;

pub(crate) const REGION: &str = "eu-west-1";
/// moto lets a caller assume any role, existing or not. Keys are in the account of the role.
pub(crate) const ROLE: &str = "arn:aws:iam::123456789012:role/logs";

pub(crate) const SECRET: &str = "the-secret-of-the-service";

/// Python imports many modules, and the machine may be busy.
const START_PATIENCE: Duration = Duration::from_secs(120);

pub(crate) struct Moto {
    port: u16,
    process: Option<Child>,
}

impl Moto {
    pub(crate) fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut moto = Self { port, process: None };
        moto.run();
        moto
    }

    fn run(&mut self) {
        let mut command = Command::new(python());
        command.arg(tools().join("moto_kms.py")).args(["--port", &self.port.to_string()]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        self.process = Some(command.spawn().unwrap());
        let began = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            if let Some(status) = self.process.as_mut().unwrap().try_wait().unwrap() {
                panic!("moto did not start: {status}");
            }
            assert!(began.elapsed() < START_PATIENCE, "moto did not start");
            thread::sleep(Duration::from_millis(50));
        }
    }

    /// Sends SIGKILL. The server loses its state, which is in memory.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// The backend's URL for this server.
    pub(crate) fn url(&self) -> String {
        url_at(self.address())
    }

    /// Calls a KMS operation as the administrator.
    #[track_caller]
    pub(crate) fn kms(&self, operation: &str, input: &Value) -> Value {
        let body = input.to_string();
        let scope = format!("testing/20260101/{REGION}/kms/aws4_request");
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        write!(
            stream,
            "POST / HTTP/1.1\r\nhost: kms.{REGION}.amazonaws.com\r\nconnection: close\r\n\
             content-type: application/x-amz-json-1.1\r\nx-amz-target: TrentService.{operation}\r\n\
             authorization: AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0\r\n\
             content-length: {}\r\n\r\n{body}",
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{operation}: {answer}");
        if body.is_empty() { Value::Null } else { serde_json::from_str(body).unwrap() }
    }

    pub(crate) fn create_key(&self) -> String {
        self.kms("CreateKey", &json!({}))["KeyMetadata"]["KeyId"].as_str().unwrap().to_owned()
    }

    pub(crate) fn disable(&self, key: &str) {
        self.kms("DisableKey", &json!({ "KeyId": key }));
    }

    pub(crate) fn enable(&self, key: &str) {
        self.kms("EnableKey", &json!({ "KeyId": key }));
    }

    /// Replaces the key policy by one statement about [`ROLE`], with this effect.
    pub(crate) fn set_policy(&self, key: &str, effect: &str) {
        let statement = json!({
            "Effect": effect, "Principal": { "AWS": ROLE }, "Action": "kms:*", "Resource": "*",
        });
        let policy = json!({ "Version": "2012-10-17", "Statement": [statement] }).to_string();
        let input = json!({ "KeyId": key, "PolicyName": "default", "Policy": policy });
        self.kms("PutKeyPolicy", &input);
    }

    pub(crate) fn schedule_deletion(&self, key: &str) {
        self.kms("ScheduleKeyDeletion", &json!({ "KeyId": key, "PendingWindowInDays": 7 }));
    }

    /// Cancels a deletion. The key is disabled afterwards, as at AWS.
    pub(crate) fn cancel_deletion(&self, key: &str) {
        self.kms("CancelKeyDeletion", &json!({ "KeyId": key }));
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The backend's URL for a server at this address.
pub(crate) fn url_at(address: SocketAddr) -> String {
    format!("aws-kms://{REGION}?endpoint=http://{address}")
}

/// Replaces all `AWS_` variables by credentials for the backend. moto accepts any credentials.
pub(crate) fn credentials(command: &mut Command) {
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("AWS_")) {
            command.env_remove(name);
        }
    }
    command.env("AWS_ACCESS_KEY_ID", "testing").env("AWS_SECRET_ACCESS_KEY", SECRET);
}

fn tools() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    // The command-line tests use this file too.
    let root = if root.ends_with("cli") { root.parent().unwrap() } else { root };
    root.join("tests/tools")
}

/// The Python interpreter with moto.
fn python() -> PathBuf {
    let requirements = fs::read_to_string(tools().join("moto-requirements.txt")).unwrap();
    let pinned: Vec<&str> = requirements.lines().filter(|line| !line.starts_with('#')).collect();
    python::with_packages("moto", &pinned)
}
