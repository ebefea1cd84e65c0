//! The backend against a server with scripted answers. `tests/kms_vault.rs` has the tests against a
//! real server.

#![allow(clippy::unwrap_used)]
#![expect(clippy::disallowed_methods, reason = "tests take times and make files of their own")]

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::Mutex,
    thread,
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::kms::{Cmk, EncryptionContext};

const KEY: [u8; 32] = [7; 32];
const WRAPPED: &[u8] = b"vault:v3:AAAA";
const TIMEOUT: Duration = Duration::from_secs(20);

// ---- the server ----

/// A received request.
#[derive(Clone, Debug)]
struct Asked {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
    body: Value,
}

impl Asked {
    fn read(stream: &mut impl BufRead) -> Option<Self> {
        let mut line = || {
            let mut line = String::new();
            (stream.read_line(&mut line).ok()? > 0).then(|| line.trim_end().to_owned())
        };
        let first = line()?;
        let mut words = first.split(' ');
        let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
        let mut headers = BTreeMap::new();
        while let Some((name, value)) = line()?.split_once(':') {
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
        let len = headers.get("content-length").map_or(0, |len: &String| len.parse().unwrap());
        let mut body = vec![0; len];
        stream.read_exact(&mut body).ok()?;
        let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
        Some(Self { method, path, headers, body })
    }

    fn is_login(&self) -> bool {
        self.path.ends_with("/login")
    }

    fn token(&self) -> &str {
        self.headers.get("x-vault-token").map_or("", String::as_str)
    }
}

#[derive(Clone, Debug)]
enum Reply {
    Answer(u16, String),
    Redirect(String),
    /// Closes the connection without an answer.
    HangUp,
    /// Never answers.
    Hang,
    /// Sends a byte from time to time, and never ends.
    Drip,
    /// Sends more than the backend reads.
    Flood,
}

fn reply(status: u16, body: impl ToString) -> Reply {
    Reply::Answer(status, body.to_string())
}

/// An error with these sentences.
fn errors(status: u16, sentences: &[&str]) -> Reply {
    reply(status, json!({ "errors": sentences }))
}

fn denied() -> Reply {
    errors(403, &["1 error occurred:\n\t* permission denied\n\n"])
}

fn logged_in(token: &str) -> Reply {
    let metadata = json!({ "role_name": "envelog" });
    let auth = json!({ "client_token": token, "lease_duration": 3600, "metadata": metadata });
    reply(200, json!({ "data": null, "auth": auth }))
}

fn decrypted(key: &[u8]) -> Reply {
    reply(200, json!({ "data": { "plaintext": BASE64_STANDARD.encode(key) } }))
}

struct Server {
    port: u16,
    asked: Arc<Mutex<Vec<Asked>>>,
    dir: TempDir,
}

impl Server {
    /// Answers by the request and the number of requests of its kind (logins, others) before it.
    fn start(answer: impl Fn(&Asked, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::<Mutex<Vec<Asked>>>::default();
        let (all, answer) = (Arc::clone(&asked), Arc::new(answer));
        let counts = Arc::<Mutex<BTreeMap<bool, usize>>>::default();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (all, counts) = (Arc::clone(&all), Arc::clone(&counts));
                let answer = Arc::clone(&answer);
                let answer = move |asked: Asked| {
                    let before = {
                        let mut counts = counts.lock().unwrap();
                        let count = counts.entry(asked.is_login()).or_default();
                        *count += 1;
                        *count - 1
                    };
                    all.lock().unwrap().push(asked.clone());
                    answer(&asked, before)
                };
                thread::spawn(move || serve(stream.unwrap(), answer));
            }
        });
        let dir = tempfile::tempdir().unwrap();
        for name in ["role-id", "secret-id", "jwt", "token"] {
            fs::write(dir.path().join(name), format!("the-{name}\n")).unwrap();
        }
        Self { port, asked, dir }
    }

    /// Logs anyone in, and answers other requests like this. The number counts them, from 0.
    fn transit(answer: impl Fn(usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::start(move |asked, before| match asked.is_login() {
            true => logged_in("a-token"),
            false => answer(before),
        })
    }

    fn file(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    fn url(&self, auth: &str) -> String {
        let files = match auth {
            "approle" => {
                let (role_id, secret_id) = (self.file("role-id"), self.file("secret-id"));
                format!("&role-id-file={role_id}&secret-id-file={secret_id}")
            }
            "kubernetes" => format!("&jwt-file={}", self.file("jwt")),
            _ => format!("&token-file={}", self.file("token")),
        };
        format!("vault:http://127.0.0.1:{}?region=r&auth={auth}{files}", self.port)
    }

    fn backend(&self, auth: &str) -> VaultKms {
        VaultKms::from_url(&self.url(auth)).unwrap()
    }

    /// Takes the requests received since the previous call: their methods and paths.
    fn taken(&self) -> Vec<String> {
        let asked = std::mem::take(&mut *self.asked.lock().unwrap());
        asked.iter().map(|asked| format!("{} {}", asked.method, asked.path)).collect()
    }
}

fn serve(mut stream: TcpStream, answer: impl Fn(Asked) -> Reply) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Some(asked) = Asked::read(&mut reader) {
        let written = match answer(asked) {
            Reply::Answer(status, body) => {
                let head = format!("HTTP/1.1 {status} x\r\ncontent-length: {}\r\n\r\n", body.len());
                stream.write_all((head + &body).as_bytes())
            }
            Reply::Redirect(to) => {
                write!(stream, "HTTP/1.1 307 x\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n")
            }
            Reply::HangUp => return,
            Reply::Hang => reader.read_to_end(&mut Vec::new()).map(|_| ()),
            Reply::Drip => {
                write!(stream, "HTTP/1.1 200 x\r\ncontent-length: 1000\r\n\r\n").unwrap();
                while stream.write_all(b" ").is_ok() {
                    thread::sleep(Duration::from_millis(20));
                }
                return;
            }
            Reply::Flood => {
                write!(stream, "HTTP/1.1 200 x\r\nconnection: close\r\n\r\n").unwrap();
                while stream.write_all(&[b' '; 4096]).is_ok() {}
                return;
            }
        };
        if written.is_err() {
            return;
        }
    }
}

// ---- calls ----

fn context() -> EncryptionContext {
    [("envelog:store".to_owned(), "s".to_owned())].into()
}

fn cmk(key: &str, role: &str) -> Cmk {
    Cmk { cmk_key_id: key.to_owned(), arn: role.to_owned(), region_id: "r".to_owned() }
}

fn unwrap_of(kms: &VaultKms, key: &str, timeout: Duration) -> Result<SecretKey, KmsError> {
    let cmk = cmk(key, "envelog");
    kms.unwrap(&KmsCall { cmk: &cmk, context: &context(), timeout }, WRAPPED)
}

fn unwrap(kms: &VaultKms) -> Result<SecretKey, KmsError> {
    unwrap_of(kms, "orders", TIMEOUT)
}

fn wrap(kms: &VaultKms) -> Result<Vec<u8>, KmsError> {
    let cmk = cmk("orders", "envelog");
    let call = KmsCall { cmk: &cmk, context: &context(), timeout: TIMEOUT };
    kms.wrap(&call, &SecretKey::from_bytes(&mut KEY.clone()))
}

/// The expected sorting of an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sorted {
    Revoked(RevokedReason),
    Unreachable,
    Invalid,
}
use RevokedReason::{Deleted, Disabled, NotPermitted};
use Sorted::{Invalid, Revoked, Unreachable};

#[track_caller]
fn assert_sorted<T>(result: Result<T, KmsError>, expected: Sorted, what: &str) -> String {
    let Err(error) = result else { panic!("{what}: it succeeded") };
    let (sorted, detail) = match &error {
        KmsError::Revoked { reason, detail } => (Revoked(*reason), detail),
        KmsError::Unreachable { detail } => (Unreachable, detail),
        KmsError::Invalid { detail } => (Invalid, detail),
    };
    assert_eq!(sorted, expected, "{what}: {error}");
    assert!((1..200).contains(&detail.len()) && !detail.contains('\n'), "{detail:?}");
    detail.clone()
}

// ---- answers ----

#[test]
fn every_answer_of_transit_is_sorted() {
    const TOO_OLD: &str = "ciphertext or signature version is disallowed by policy (too old)";
    let cases = [
        (errors(400, &["encryption key not found"]), Revoked(Deleted)),
        (errors(400, &["policy not found"]), Revoked(Deleted)),
        (errors(400, &["unknown key type none"]), Revoked(Deleted)),
        (errors(400, &["1 error occurred:\n\t* encryption key not found\n\n"]), Revoked(Deleted)),
        (errors(400, &["refusing to use soft-deleted key"]), Revoked(Disabled)),
        (errors(400, &[TOO_OLD]), Revoked(Disabled)),
        (errors(400, &["cipher: message authentication failed"]), Invalid),
        (errors(400, &["chacha20poly1305: message authentication failed"]), Invalid),
        (errors(400, &["invalid ciphertext: version is too new"]), Invalid),
        (errors(400, &["invalid ciphertext: unable to decrypt"]), Invalid),
        (errors(400, &["invalid ciphertext length"]), Invalid),
        (
            errors(400, &["'[0].associated_data' provided for non-AEAD cipher suite rsa-2048"]),
            Invalid,
        ),
        (errors(400, &["a sentence that is new"]), Invalid),
        (errors(400, &["the encryption key not found"]), Invalid),
        // Without the token's refusal a denial is the customer's.
        (denied(), Revoked(NotPermitted)),
        (errors(403, &["permission denied"]), Revoked(NotPermitted)),
        (
            errors(403, &["2 errors occurred:\n\t* permission denied\n\t* invalid token\n"]),
            Revoked(NotPermitted),
        ),
        (errors(403, &["encryption key not found"]), Unreachable),
        (errors(403, &["a sentence about permission denied"]), Unreachable),
        (errors(403, &[]), Unreachable),
        (reply(403, "<html>permission denied</html>"), Unreachable),
        (reply(403, r#"{"errors":"permission denied"}"#), Unreachable),
        (reply(400, "Client sent an HTTP request to an HTTPS server.\n"), Unreachable),
        (reply(400, "encryption key not found"), Unreachable),
        (reply(400, r#"{"errors":[7]}"#), Unreachable),
        (reply(400, ""), Unreachable),
        (errors(404, &["no handler for route \"transit/x\". route entry not found."]), Unreachable),
        (errors(404, &["namespace not found"]), Unreachable),
        (errors(404, &["encryption key not found"]), Unreachable),
        (errors(405, &["1 error occurred:\n\t* unsupported operation\n\n"]), Unreachable),
        (errors(412, &["required index state not present"]), Unreachable),
        (errors(413, &["http: request body too large"]), Unreachable),
        (errors(429, &["rate limit quota exceeded"]), Unreachable),
        (errors(472, &[]), Unreachable),
        (errors(473, &[]), Unreachable),
        (errors(500, &["internal error"]), Unreachable),
        (errors(500, &["encryption key not found"]), Unreachable),
        (errors(502, &["permission denied"]), Unreachable),
        (errors(503, &["Vault is sealed"]), Unreachable),
        (reply(503, ""), Unreachable),
        (reply(204, ""), Unreachable),
        (reply(201, r#"{"data":{}}"#), Unreachable),
        (errors(301, &["encryption key not found"]), Unreachable),
        (Reply::Redirect("http://127.0.0.1:1/".to_owned()), Unreachable),
        (reply(200, ""), Invalid),
        (reply(200, "{}"), Invalid),
        (reply(200, "null"), Invalid),
        (reply(200, "[".repeat(60_000)), Invalid),
        (reply(200, json!({ "data": null })), Invalid),
        (reply(200, json!({ "data": { "plaintext": 7, "ciphertext": 7 } })), Invalid),
        (reply(200, json!({ "data": { "plaintext": "", "ciphertext": "" } })), Invalid),
        (
            reply(200, json!({ "data": { "plaintext": "!", "ciphertext": "vault:v0:AAAA" } })),
            Invalid,
        ),
        (reply(200, json!({ "data": { "ciphertext": "x".repeat(5000) } })), Invalid),
        (
            reply(
                200,
                json!({ "data": { "ciphertext": format!("vault:v1:{}", "A".repeat(5000)) } }),
            ),
            Invalid,
        ),
        (errors(200, &["encryption key not found"]), Invalid),
        (decrypted(&[]), Invalid),
        (decrypted(&[1; 31]), Invalid),
        (decrypted(&[1; 33]), Invalid),
        (decrypted(&[1; 4000]), Invalid),
        (Reply::Flood, Invalid),
        (Reply::HangUp, Unreachable),
    ];
    for (answer, expected) in cases {
        let what = format!("{:.120}", format!("{answer:?}"));
        let server = Server::transit(move |_| answer.clone());
        let kms = server.backend("approle");
        assert_sorted(unwrap(&kms), expected, &what);
        assert_sorted(wrap(&kms), expected, &what);
    }
}

#[test]
fn every_answer_to_a_login_is_sorted() {
    let auth = |auth: Value| reply(200, json!({ "auth": auth }));
    let other = json!({ "role_name": "other" });
    let cases = [
        ("kubernetes", errors(400, &["invalid role name \"envelog\""]), Revoked(NotPermitted)),
        (
            "kubernetes",
            errors(403, &["service account name not authorized"]),
            Revoked(NotPermitted),
        ),
        ("kubernetes", errors(403, &["namespace not authorized"]), Revoked(NotPermitted)),
        // Vault could not ask Kubernetes about the labels of the namespace.
        ("kubernetes", errors(403, &["namespace not authorized err=timeout"]), Unreachable),
        ("kubernetes", errors(403, &["permission denied"]), Unreachable),
        ("kubernetes", errors(403, &["invalid audience (aud) claim: audience claim"]), Unreachable),
        ("kubernetes", errors(400, &["missing jwt"]), Unreachable),
        ("kubernetes", errors(500, &["could not load backend configuration"]), Unreachable),
        ("kubernetes", errors(500, &["invalid role name \"envelog\""]), Unreachable),
        ("kubernetes", errors(503, &["service account name not authorized"]), Unreachable),
        ("kubernetes", reply(403, "service account name not authorized"), Unreachable),
        ("approle", errors(400, &["invalid role or secret ID"]), Unreachable),
        ("approle", errors(400, &["invalid role name \"envelog\""]), Unreachable),
        ("approle", errors(403, &["service account name not authorized"]), Unreachable),
        ("approle", denied(), Unreachable),
        ("approle", errors(404, &["namespace not found"]), Unreachable),
        ("approle", errors(429, &["rate limit quota exceeded"]), Unreachable),
        ("approle", errors(503, &["Vault is sealed"]), Unreachable),
        ("approle", reply(204, ""), Unreachable),
        ("approle", reply(200, "{}"), Invalid),
        ("approle", auth(Value::Null), Invalid),
        ("approle", auth(json!({ "client_token": 7 })), Invalid),
        // No role; another role; no duration.
        ("approle", auth(json!({ "client_token": "t", "metadata": null })), Invalid),
        ("approle", auth(json!({ "client_token": "t", "metadata": other })), Invalid),
        ("approle", auth(json!({ "client_token": "t", "lease_duration": -1 })), Invalid),
        // Texts that are no token.
        ("approle", logged_in(""), Unreachable),
        ("approle", logged_in("two words"), Unreachable),
        ("approle", logged_in("a\r\nx-vault-token: b"), Unreachable),
        ("approle", Reply::Flood, Invalid),
        ("approle", Reply::HangUp, Unreachable),
    ];
    for (auth, answer, expected) in cases {
        let what = format!("{auth} {:.120}", format!("{answer:?}"));
        let server = Server::start(move |asked, _| {
            assert!(asked.is_login(), "{asked:?}");
            answer.clone()
        });
        let kms = server.backend(auth);
        assert_sorted(unwrap(&kms), expected, &what);
        assert_sorted(wrap(&kms), expected, &what);
    }
    for (auth, file) in [
        ("approle", "role-id"),
        ("approle", "secret-id"),
        ("kubernetes", "jwt"),
        ("token-file", "token"),
    ] {
        let server = Server::start(|asked, _| panic!("{asked:?}"));
        let kms = server.backend(auth);
        for content in ["", " \n\t", "\u{0}"] {
            fs::write(server.file(file), content).unwrap();
            if content != "\u{0}" || auth == "token-file" {
                assert_sorted(unwrap(&kms), Unreachable, file);
            }
        }
        fs::write(server.file(file), [0xff; 4]).unwrap();
        assert_sorted(unwrap(&kms), Unreachable, file);
        fs::write(server.file(file), "a".repeat(70_000)).unwrap();
        assert_sorted(unwrap(&kms), Unreachable, file);
        fs::remove_file(server.file(file)).unwrap();
        let detail = assert_sorted(unwrap(&kms), Unreachable, file);
        assert!(detail.contains(file), "{detail}");
    }
}

// ---- requests and tokens ----

#[test]
fn requests_have_the_form_of_the_api() {
    let server = Server::start(|asked, _| match asked.path.as_str() {
        "/v1/auth/team/k8s/login" => logged_in("a-token"),
        "/v1/customer/engine/encrypt/orders" => {
            reply(200, json!({ "data": { "ciphertext": "vault:v3:AAAA" } }))
        }
        "/v1/customer/engine/decrypt/orders"
            if asked.body["associated_data"] == "AQAAAA0AAABlbnZlbG9nOnN0b3JlAQAAAHM=" =>
        {
            decrypted(&KEY)
        }
        "/v1/customer/engine/decrypt/orders" => {
            errors(400, &["cipher: message authentication failed"])
        }
        other => panic!("{other}"),
    });
    let more = "&mount=customer/engine&auth-mount=team/k8s&namespace=a/b%20c";
    let kms = VaultKms::from_url(&(server.url("kubernetes") + more)).unwrap();
    assert_eq!(wrap(&kms).unwrap(), WRAPPED);
    assert_eq!(unwrap(&kms).unwrap().expose(), &KEY);
    let asked = server.asked.lock().unwrap().clone();
    let login = json!({ "role": "envelog", "jwt": "the-jwt" });
    assert_eq!((asked[0].body.clone(), asked[0].token()), (login, ""));
    let encrypt = json!({
        "plaintext": BASE64_STANDARD.encode(KEY), "type": "none",
        "associated_data": BASE64_STANDARD.encode(context().to_bytes()),
    });
    assert_eq!(asked[1].body, encrypt);
    // The first wrapped key is tried in another context.
    assert_eq!(asked[2].body["ciphertext"], "vault:v3:AAAA");
    assert_ne!(asked[2].body["associated_data"], encrypt["associated_data"]);
    let decrypt = json!({
        "ciphertext": "vault:v3:AAAA", "associated_data": encrypt["associated_data"],
    });
    assert_eq!(asked[3].body, decrypt);
    assert_eq!(asked.len(), 4);
    for asked in &asked {
        assert_eq!(asked.method, "POST");
        assert_eq!(asked.headers["x-vault-namespace"], "a/b c");
        assert_eq!(asked.headers["x-vault-request"], "true");
        assert!(asked.is_login() || asked.token() == "a-token", "{asked:?}");
    }
    let (shown, both) = (format!("{kms:?}"), ["the-jwt", "a-token"]);
    assert!(both.iter().all(|secret| !shown.contains(secret)), "{shown}");
}

#[test]
fn a_server_that_ignores_associated_data_is_refused() {
    let wrapped = || reply(200, json!({ "data": { "ciphertext": "vault:v1:AAAA" } }));
    let server = Server::start(move |asked, _| match asked.is_login() {
        true => logged_in("a-token"),
        false if asked.path.contains("/encrypt/") => wrapped(),
        false => decrypted(&KEY),
    });
    let kms = server.backend("approle");
    for _ in 0..2 {
        let detail = assert_sorted(wrap(&kms), Invalid, "an old Vault");
        assert!(detail.contains("1.13"), "{detail}");
    }

    // A failure of the check is the call's. A success counts for the instance and its clones.
    let server = Server::start(move |asked, before| match asked.is_login() {
        true => logged_in("a-token"),
        false if asked.path.contains("/encrypt/") => wrapped(),
        false if before == 1 => errors(503, &["Vault is sealed"]),
        false => errors(400, &["cipher: message authentication failed"]),
    });
    let kms = server.backend("approle");
    assert_sorted(wrap(&kms), Unreachable, "the check failed");
    assert_eq!(server.taken().len(), 3);
    assert!(wrap(&kms).is_ok());
    assert_eq!(server.taken().len(), 2);
    assert!(wrap(&kms.clone()).is_ok() && wrap(&kms).is_ok());
    assert_eq!(server.taken().len(), 2);
}

const LOGIN: &str = "POST /v1/auth/approle/login";
const DECRYPT: &str = "POST /v1/transit/decrypt/orders";
const ENCRYPT: &str = "POST /v1/transit/encrypt/orders";
const LOOK_UP: &str = "GET /v1/auth/token/lookup-self";

#[test]
fn a_kept_token_is_replaced_once_before_a_denial_counts() {
    let valid = Arc::new(Mutex::new("token-0".to_owned()));
    let now = Arc::clone(&valid);
    let server = Server::start(move |asked, _| {
        let valid = now.lock().unwrap().clone();
        match asked.is_login() {
            true => logged_in(&valid),
            false if valid == asked.token() && valid != "token-denied" => decrypted(&KEY),
            false => denied(),
        }
    });
    let kms = server.backend("approle");
    for calls in [&[LOGIN, DECRYPT][..], &[DECRYPT], &[DECRYPT]] {
        assert!(unwrap(&kms).is_ok());
        assert_eq!(server.taken(), calls);
    }
    let set = |token: &str| *valid.lock().unwrap() = token.to_owned();
    set("token-1");
    assert!(unwrap(&kms).is_ok());
    assert_eq!(server.taken(), [DECRYPT, LOGIN, DECRYPT]);
    assert!(unwrap(&kms).is_ok());
    assert_eq!(server.taken(), [DECRYPT]);
    // A new token that is denied too: the policy denies.
    set("token-denied");
    assert_sorted(unwrap(&kms), Revoked(NotPermitted), "denied");
    assert_eq!(server.taken(), [DECRYPT, LOGIN, DECRYPT]);
    assert_sorted(unwrap(&server.backend("approle")), Revoked(NotPermitted), "denied");
    assert_eq!(server.taken(), [LOGIN, DECRYPT]);
    // Wrapping asks whether the key exists, with a token that was not used before.
    assert_sorted(wrap(&kms), Revoked(NotPermitted), "denied");
    assert_eq!(server.taken(), [ENCRYPT, LOGIN, ENCRYPT, DECRYPT, LOGIN, DECRYPT]);
    // The denial does not outlive the permission.
    set("token-2");
    assert!(unwrap(&kms).is_ok());
}

#[test]
fn a_denial_counts_without_a_login_if_the_kept_token_is_valid() {
    let is_valid = Arc::new(AtomicBool::new(true));
    let now = Arc::clone(&is_valid);
    let server = Server::start(move |asked, before| match asked.path.as_str() {
        "/v1/auth/approle/login" if before == 0 => logged_in("a-token"),
        "/v1/auth/approle/login" => errors(503, &["Vault is sealed"]),
        _ if !now.load(Ordering::SeqCst) => denied(),
        "/v1/auth/token/lookup-self" => reply(200, json!({ "data": {} })),
        "/v1/transit/decrypt/orders" => denied(),
        _ => decrypted(&KEY),
    });
    let kms = server.backend("approle");
    let other = || unwrap_of(&kms, "others", TIMEOUT);
    assert!(other().is_ok());
    server.taken();
    assert_sorted(unwrap(&kms), Revoked(NotPermitted), "a valid token");
    assert_eq!(server.taken(), [DECRYPT, LOGIN, LOOK_UP]);
    // The denial of one key takes the token from no other key.
    assert!(other().is_ok());
    is_valid.store(false, Ordering::SeqCst);
    server.taken();
    assert_sorted(unwrap(&kms), Unreachable, "an expired token");
    assert_eq!(server.taken(), [DECRYPT, LOGIN, LOOK_UP]);
    assert_sorted(other(), Unreachable, "an expired token");
}

#[test]
fn a_token_is_kept_for_as_long_as_it_is_certain_to_be_valid() {
    let login = |seconds: u64, uses: u64| {
        let metadata = json!({ "role_name": "envelog" });
        let auth = json!({
            "client_token": "t", "lease_duration": seconds, "num_uses": uses, "metadata": metadata,
        });
        reply(200, json!({ "auth": auth }))
    };
    for (seconds, uses, is_kept) in
        [(3600, 0, true), (0, 0, true), (u64::MAX, 0, true), (3600, 5, false)]
    {
        let server = Server::start(move |asked, _| match asked.is_login() {
            true => login(seconds, uses),
            false => decrypted(&KEY),
        });
        let kms = server.backend("approle");
        assert!(unwrap(&kms).is_ok() && unwrap(&kms).is_ok());
        let logins = server.taken().iter().filter(|asked| *asked == LOGIN).count();
        assert_eq!(logins, if is_kept { 1 } else { 2 }, "{seconds} {uses}");
    }
    // A token of 2 s is kept for 1.3 s.
    let server = Server::start(move |asked, _| match asked.is_login() {
        true => login(2, 0),
        false => decrypted(&KEY),
    });
    let kms = server.backend("approle");
    assert!(unwrap(&kms).is_ok());
    thread::sleep(Duration::from_millis(1400));
    assert!(unwrap(&kms).is_ok());
    assert_eq!(server.taken(), [LOGIN, DECRYPT, LOGIN, DECRYPT]);
}

#[test]
fn a_token_in_a_file_is_looked_up_before_a_denial_counts() {
    let found = Arc::new(Mutex::new(reply(200, json!({ "data": { "id": "the-token" } }))));
    let answer = Arc::clone(&found);
    let server = Server::start(move |asked, _| match asked.path.as_str() {
        "/v1/auth/token/lookup-self" => answer.lock().unwrap().clone(),
        _ if asked.token() == "good" => decrypted(&KEY),
        _ => denied(),
    });
    let kms = server.backend("token-file");
    assert_sorted(unwrap(&kms), Revoked(NotPermitted), "a valid token");
    assert_eq!(server.taken(), [DECRYPT, LOOK_UP]);
    for (answer, expected) in [
        (errors(403, &["permission denied"]), Unreachable),
        (errors(503, &["Vault is sealed"]), Unreachable),
        (reply(200, "<html>log in</html>"), Unreachable),
        (reply(200, "{}"), Unreachable),
        (Reply::HangUp, Unreachable),
        (Reply::Flood, Invalid),
    ] {
        let what = format!("{answer:?}");
        *found.lock().unwrap() = answer;
        assert_sorted(unwrap(&kms), expected, &what);
    }
    fs::write(server.file("token"), "good\n").unwrap();
    server.taken();
    assert!(unwrap(&kms).is_ok());
    assert_eq!(server.taken(), [DECRYPT]);
}

#[test]
fn a_token_in_a_file_may_change_during_a_call_but_not_forever() {
    let file = Arc::<Mutex<String>>::default();
    let path = Arc::clone(&file);
    let server = Server::start(move |_, before| {
        // Another process renews the token at each request, three times.
        if before < 4 {
            fs::write(&*path.lock().unwrap(), format!("token-{before}")).unwrap();
        }
        if before == 5 { reply(200, json!({ "data": {} })) } else { denied() }
    });
    *file.lock().unwrap() = server.file("token");
    let kms = server.backend("token-file");
    assert_sorted(unwrap(&kms), Unreachable, "three tokens");
    assert_eq!(server.taken(), [DECRYPT, DECRYPT, DECRYPT]);
    // The third is renewed once more, and the look-up shows that the fourth is valid.
    assert_sorted(unwrap(&kms), Revoked(NotPermitted), "two tokens");
    assert_eq!(server.taken(), [DECRYPT, DECRYPT, LOOK_UP]);
}

#[test]
fn each_kubernetes_role_has_a_token_of_its_own() {
    let server = Server::start(|asked, _| match asked.is_login() {
        true => logged_in(asked.body["role"].as_str().unwrap()),
        false if asked.path.ends_with(asked.token()) => decrypted(&KEY),
        false => denied(),
    });
    let kms = server.backend("kubernetes");
    for _ in 0..2 {
        for role in ["a", "b"] {
            let cmk = cmk(role, role);
            let call = KmsCall { cmk: &cmk, context: &context(), timeout: TIMEOUT };
            assert!(kms.unwrap(&call, WRAPPED).is_ok(), "{role}");
        }
    }
    assert_eq!(server.taken().iter().filter(|asked| asked.ends_with("/login")).count(), 2);
    // More roles than the backend keeps tokens for.
    for role in 0..1100 {
        let role = format!("k{role}");
        let cmk = cmk(&role, &role);
        let call = KmsCall { cmk: &cmk, context: &context(), timeout: TIMEOUT };
        assert!(kms.unwrap(&call, WRAPPED).is_ok(), "{role}");
    }
}

// ---- time and connections ----

#[test]
fn the_whole_call_keeps_within_its_time() {
    let timeout = Duration::from_millis(400);
    for reply in [Reply::Hang, Reply::Drip] {
        for at_login in [true, false] {
            let reply_now = reply.clone();
            let server = Server::start(move |asked, _| match asked.is_login() == at_login {
                true => reply_now.clone(),
                false => logged_in("a-token"),
            });
            let began = Instant::now();
            let what = format!("{reply:?} {at_login}");
            assert_sorted(
                unwrap_of(&server.backend("approle"), "orders", timeout),
                Unreachable,
                &what,
            );
            let took = began.elapsed();
            assert!(took > timeout - Duration::from_millis(50), "{what}: {took:?}");
            assert!(took < timeout + Duration::from_secs(8), "{what}: {took:?}");
        }
    }
    let server = Server::start(|asked, _| panic!("{asked:?}"));
    assert_sorted(
        unwrap_of(&server.backend("approle"), "orders", Duration::ZERO),
        Unreachable,
        "no time",
    );
}

#[test]
fn a_connection_that_breaks_is_tried_once_more() {
    let server = Server::transit(|before| match before {
        0 => Reply::HangUp,
        1 => decrypted(&KEY),
        _ => Reply::HangUp,
    });
    let kms = server.backend("approle");
    assert!(unwrap(&kms).is_ok());
    server.taken();
    assert_sorted(unwrap(&kms), Unreachable, "broken twice");
}

#[test]
fn no_token_follows_a_redirection() {
    let elsewhere = Server::start(|asked, _| panic!("{asked:?}"));
    let to = format!("http://127.0.0.1:{}/v1/transit/decrypt/orders", elsewhere.port);
    let server = Server::transit(move |_| Reply::Redirect(to.clone()));
    assert_sorted(unwrap(&server.backend("approle")), Unreachable, "a redirection");
    assert!(elsewhere.taken().is_empty());
}

// ---- URLs ----

#[test]
fn a_url_names_the_server_and_the_login() {
    let auth = "auth=kubernetes";
    for url in [
        format!("vault:https://vault.example?region=r&{auth}"),
        format!(
            "vault:https://vault.example:8200/?{auth}&region=r&mount=a/b-c.d/e_f&namespace=x/y"
        ),
        format!("vault:http://127.0.0.1:8200?region=r&{auth}&jwt-file=/a&auth-mount=k8s/one"),
        "vault:http://[::1]:8200?region=r&auth=approle&role-id-file=/a&secret-id-file=/b"
            .to_owned(),
        "vault:http://localhost:8200?region=r&auth=token-file&token-file=/a%20b&ca-file=/c"
            .to_owned(),
    ] {
        let kms = VaultKms::from_url(&url).unwrap_or_else(|error| panic!("{url}: {error}"));
        assert!(kms.serves("r") && !kms.serves("other") && kms.name() == "vault", "{url}");
    }
    for url in [
        "vault:",
        "vault:?region=r&auth=kubernetes",
        "vault://vault.example?region=r&auth=kubernetes",
        "vault:vault.example?region=r&auth=kubernetes",
        "vault:http://vault.example?region=r&auth=kubernetes",
        "vault:ftp://127.0.0.1?region=r&auth=kubernetes",
        "vault:https://me:hidden@vault.example?region=r&auth=kubernetes",
        "vault:https://vault.example/v1?region=r&auth=kubernetes",
        "vault:https://vault.example",
        "vault:https://vault.example?region=r",
        "vault:https://vault.example?auth=kubernetes",
        "vault:https://vault.example?region=&auth=kubernetes",
        "vault:https://vault.example?region=r&region=s&auth=kubernetes",
        "vault:https://vault.example?region=r&auth=hidden",
        "vault:https://vault.example?region=r&auth=kubernetes&token=hidden",
        "vault:https://vault.example?region=r&auth=kubernetes&mount=",
        "vault:https://vault.example?region=r&auth=kubernetes&mount=../sys",
        "vault:https://vault.example?region=r&auth=kubernetes&mount=/transit",
        "vault:https://vault.example?region=r&auth=kubernetes&mount=transit/",
        "vault:https://vault.example?region=r&auth=kubernetes&mount=a%3Fb",
        "vault:https://vault.example?region=r&auth=kubernetes&auth-mount=a%2F..%2Fb",
        "vault:https://vault.example?region=r&auth=kubernetes&namespace=a%0D%0Ab",
        "vault:https://vault.example?region=r&auth=kubernetes&token-file=/hidden",
        "vault:https://vault.example?region=r&auth=approle&role-id-file=/a",
        "vault:https://vault.example?region=r&auth=approle&secret-id-file=/a",
        "vault:https://vault.example?region=r&auth=approle&role-id-file=/a&secret-id-file=/b&jwt-file=/c",
        "vault:https://vault.example?region=r&auth=token-file",
        "vault:https://vault.example?region=r&auth=token-file&token-file=/a&auth-mount=token",
        "https://vault.example?region=r&auth=kubernetes",
    ] {
        let error = VaultKms::from_url(url).unwrap_err();
        assert!(matches!(error, KmsUrlError::Malformed(_)), "{url}: {error}");
        assert!(!error.to_string().contains("hidden"), "{error}");
    }
}
