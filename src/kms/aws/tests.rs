//! The backend against a server with scripted answers, which checks every signature.

#![allow(clippy::unwrap_used)]
#![expect(clippy::disallowed_methods, reason = "tests take times and make files of their own")]

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, prelude::BASE64_STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use reqsign_core::StaticEnv;
use sha2::{Digest, Sha256};

use super::*;
use crate::kms::RevokedReason;

const ROLE: &str = "arn:aws:iam::123456789012:role/logs";
const KEY: [u8; 32] = [7; 32];
const TIMEOUT: Duration = Duration::from_secs(20);

// ---- the server ----

/// A received request.
#[derive(Clone, Debug)]
struct Asked {
    method: String,
    path: String,
    headers: BTreeMap<String, String>,
    body: String,
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
        loop {
            let line = line()?;
            let Some((name, value)) = line.split_once(':') else { break };
            let before = headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
            assert_eq!(before, None, "{name} came twice");
        }
        let mut body =
            vec![0; headers.get("content-length").map_or(0, |len: &String| len.parse().unwrap())];
        stream.read_exact(&mut body).ok()?;
        Some(Self { method, path, headers, body: String::from_utf8(body).unwrap() })
    }

    fn is_sts(&self) -> bool {
        self.body.starts_with("Action=AssumeRole&")
    }

    fn is_kms(&self) -> bool {
        self.headers.contains_key("x-amz-target")
    }

    /// The access key id that signed the request. The signature is computed again from the received
    /// bytes.
    fn signer(&self) -> String {
        let header =
            self.headers["authorization"].strip_prefix("AWS4-HMAC-SHA256 Credential=").unwrap();
        let (credential, rest) = header.split_once(", SignedHeaders=").unwrap();
        let (signed, signature) = rest.split_once(", Signature=").unwrap();
        let (id, scope) = credential.split_once('/').unwrap();
        let [date, region, service, "aws4_request"] = scope.split('/').collect::<Vec<_>>()[..]
        else {
            panic!("{scope}")
        };
        assert_eq!((region, service), ("eu-west-1", if self.is_sts() { "sts" } else { "kms" }));
        for needed in ["content-type", "host", "x-amz-date"] {
            assert!(signed.split(';').any(|name| name == needed), "{needed} is not signed");
        }
        let hash = |bytes: &[u8]| hex(&Sha256::digest(bytes));
        let canonical: String =
            signed.split(';').map(|name| format!("{name}:{}\n", self.headers[name])).collect();
        let request = format!(
            "{}\n{}\n\n{canonical}\n{signed}\n{}",
            self.method,
            self.path,
            hash(self.body.as_bytes())
        );
        let text = format!(
            "AWS4-HMAC-SHA256\n{}\n{scope}\n{}",
            self.headers["x-amz-date"],
            hash(request.as_bytes())
        );
        let mut key = format!("AWS4secret of {id}").into_bytes();
        for part in [date, region, service, "aws4_request", &text] {
            let mut mac = Hmac::<Sha256>::new_from_slice(&key).unwrap();
            mac.update(part.as_bytes());
            key = mac.finalize().into_bytes().to_vec();
        }
        assert_eq!(hex(&key), signature, "{self:?}");
        id.to_owned()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[derive(Clone, Debug)]
enum Reply {
    Answer(u16, Vec<u8>),
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

fn reply(status: u16, body: impl Into<Vec<u8>>) -> Reply {
    Reply::Answer(status, body.into())
}

fn kms_error(status: u16, code: &str, message: &str) -> Reply {
    reply(status, serde_json::json!({ "__type": code, "message": message }).to_string())
}

fn sts_error(status: u16, code: &str) -> Reply {
    sts_message(status, code, "m")
}

fn sts_message(status: u16, code: &str, message: &str) -> Reply {
    let xml = "<ErrorResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><Error><Type>Sender</Type>";
    reply(
        status,
        format!(
            "{xml}<Code>{code}</Code><Message>{message}</Message></Error><RequestId>1</RequestId></ErrorResponse>"
        ),
    )
}

/// A role's credentials.
fn assumed() -> Reply {
    reply(
        200,
        "<AssumeRoleResponse xmlns=\"https://sts.amazonaws.com/doc/2011-06-15/\"><AssumeRoleResult><Credentials>\
         <AccessKeyId>ROLE</AccessKeyId><SecretAccessKey>secret of ROLE</SecretAccessKey><SessionToken>token/+=</SessionToken>\
         <Expiration>2030-01-01T00:00:00Z</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>",
    )
}

fn decrypted(key: &[u8]) -> Reply {
    let plaintext = BASE64_STANDARD.encode(key);
    reply(200, serde_json::json!({ "KeyId": "k", "Plaintext": plaintext }).to_string())
}

struct Server {
    port: u16,
    asked: Arc<Mutex<Vec<Asked>>>,
    connections: Arc<Mutex<usize>>,
}

impl Server {
    fn start(answer: impl Fn(&Asked, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (asked, connections) = (Arc::default(), Arc::default());
        let server =
            Self { port, asked: Arc::clone(&asked), connections: Arc::clone(&connections) };
        let answer = Arc::new(answer);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (asked, answer) = (Arc::clone(&asked), Arc::clone(&answer));
                *connections.lock().unwrap() += 1;
                thread::spawn(move || serve(stream.unwrap(), &asked, &*answer));
            }
        });
        server
    }

    /// A server that assumes any role and answers KMS requests like this. The number counts the KMS
    /// requests, from 0.
    fn kms(answer: impl Fn(usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::start(move |asked, before| if asked.is_kms() { answer(before) } else { assumed() })
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// A backend for this server, with credentials in its environment.
    fn backend(&self) -> AwsKms {
        self.backend_with(&[
            ("AWS_ACCESS_KEY_ID", "OWN"),
            ("AWS_SECRET_ACCESS_KEY", "secret of OWN"),
        ])
    }

    fn backend_with(&self, envs: &[(&str, &str)]) -> AwsKms {
        backend(&format!("aws-kms://eu-west-1?endpoint={}", self.url()), envs)
    }

    fn asked(&self, which: fn(&Asked) -> bool) -> Vec<Asked> {
        self.asked.lock().unwrap().iter().filter(|asked| which(asked)).cloned().collect()
    }
}

fn backend(url: &str, envs: &[(&str, &str)]) -> AwsKms {
    let envs = envs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
    AwsKms::with_env(url, Arc::new(StaticEnv { home_dir: None, envs })).unwrap()
}

fn serve(mut stream: TcpStream, all: &Mutex<Vec<Asked>>, answer: &dyn Fn(&Asked, usize) -> Reply) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    while let Some(asked) = Asked::read(&mut reader) {
        let before = {
            let mut all = all.lock().unwrap();
            let before = all.iter().filter(|other| other.is_kms() == asked.is_kms()).count();
            all.push(asked.clone());
            before
        };
        let id = "x-amzn-requestid: 0f5c-77";
        let written = match answer(&asked, before) {
            Reply::Answer(status, body) => {
                let head = format!(
                    "HTTP/1.1 {status} x\r\n{id}\r\ncontent-length: {}\r\n\r\n",
                    body.len()
                );
                stream.write_all(&[head.as_bytes(), &body].concat())
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

fn cmk() -> Cmk {
    Cmk { cmk_key_id: "key-1".into(), arn: ROLE.into(), region_id: "eu-west-1".into() }
}

fn context() -> EncryptionContext {
    [("envelog:store", "s"), ("envelog:suite", "AES-256-GCM")]
        .map(|(name, value)| (name.into(), value.into()))
        .into()
}

fn unwrap_in(kms: &AwsKms, timeout: Duration) -> Result<SecretKey, KmsError> {
    kms.unwrap(&KmsCall { cmk: &cmk(), context: &context(), timeout }, b"wrapped")
}

fn unwrap_at(server: &Server) -> Result<SecretKey, KmsError> {
    unwrap_in(&server.backend(), TIMEOUT)
}

/// The expected sorting of an answer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Sorted {
    Revoked(RevokedReason),
    Unreachable,
    Invalid,
}
use Sorted::{Invalid, Revoked, Unreachable};

#[track_caller]
fn assert_sorted<T>(result: Result<T, KmsError>, expected: Sorted, what: &str) -> String {
    let Err(error) = result else { panic!("{what}: it succeeded") };
    let sorted = match &error {
        KmsError::Revoked { reason, .. } => Revoked(*reason),
        KmsError::Unreachable { .. } => Unreachable,
        KmsError::Invalid { .. } => Invalid,
    };
    assert_eq!(sorted, expected, "{what}: {error}");
    error.to_string()
}

#[test]
fn each_call_assumes_the_role_and_uses_its_own_session() {
    let server =
        Server::start(|asked, _| match asked.headers.get("x-amz-target").map(String::as_str) {
            None => assumed(),
            Some("TrentService.Encrypt") => {
                reply(200, r#"{"CiphertextBlob":"d3JhcHBlZA==","KeyId":"k"}"#)
            }
            Some("TrentService.Decrypt") => decrypted(&KEY),
            Some(other) => panic!("{other}"),
        });
    let url = format!("aws-kms://eu-west-1/?endpoint={}&external-id=ours%2Falone", server.url());
    let own = [
        ("AWS_ACCESS_KEY_ID", "OWN"),
        ("AWS_SECRET_ACCESS_KEY", "secret of OWN"),
        ("AWS_SESSION_TOKEN", "own"),
    ];
    let kms = backend(&url, &own);
    let (cmk, context) = (cmk(), context());
    let call = KmsCall { cmk: &cmk, context: &context, timeout: TIMEOUT };
    assert_eq!(kms.wrap(&call, &SecretKey::from_bytes(&mut KEY.clone())).unwrap(), b"wrapped");
    for _ in 0..2 {
        assert_eq!(kms.unwrap(&call, b"wrapped").unwrap().expose(), &KEY);
    }

    let (sts, asked) = (server.asked(Asked::is_sts), server.asked(Asked::is_kms));
    assert_eq!((sts.len(), asked.len()), (3, 3));
    for asked in &sts {
        assert_eq!(asked.signer(), "OWN");
        assert_eq!(asked.headers["x-amz-security-token"], "own");
        let form: BTreeMap<_, _> = form_urlencoded::parse(asked.body.as_bytes()).collect();
        assert_eq!(
            (&*form["RoleArn"], &*form["ExternalId"], &*form["DurationSeconds"]),
            (ROLE, "ours/alone", "900")
        );
        assert_eq!(&*form["RoleSessionName"], "envelog");
        let policy: serde_json::Value = serde_json::from_str(&form["Policy"]).unwrap();
        assert_eq!(
            policy["Statement"][0]["Action"],
            serde_json::json!(["kms:Encrypt", "kms:Decrypt"])
        );
    }
    for asked in &asked {
        assert_eq!(asked.signer(), "ROLE");
        assert_eq!(asked.headers["x-amz-security-token"], "token/+=");
        let body: serde_json::Value = serde_json::from_str(&asked.body).unwrap();
        let bound = serde_json::json!({ "envelog:store": "s", "envelog:suite": "AES-256-GCM" });
        assert_eq!((&body["KeyId"], &body["EncryptionContext"]), (&"key-1".into(), &bound));
    }
    // One call after the other, over one connection.
    assert_eq!(*server.connections.lock().unwrap(), 1);
    assert!(!format!("{kms:?}").contains("secret"));
    assert!(kms.serves("eu-west-1") && !kms.serves("eu-west-2"));
}

#[test]
fn every_answer_of_kms_is_sorted() {
    use RevokedReason::{Deleted, Disabled, NotPermitted, PendingDeletion};
    let invalid_state = |state: &str| {
        kms_error(
            400,
            "KMSInvalidStateException",
            &format!("arn:aws:kms:eu-west-1:123456789012:key/k is {state}."),
        )
    };
    let cases = [
        (kms_error(400, "DisabledException", "k is disabled."), Revoked(Disabled)),
        (
            kms_error(400, "com.amazonaws.kms#DisabledException", "k is disabled."),
            Revoked(Disabled),
        ),
        (invalid_state("pending deletion"), Revoked(PendingDeletion)),
        (invalid_state("pending replica deletion"), Revoked(PendingDeletion)),
        (invalid_state("pending import"), Revoked(Deleted)),
        (invalid_state("unavailable"), Unreachable),
        (invalid_state("creating"), Unreachable),
        (kms_error(400, "NotFoundException", ""), Revoked(Deleted)),
        (kms_error(400, "AccessDeniedException", ""), Revoked(NotPermitted)),
        (
            reply(400, r#"{"__type":"AccessDeniedException","Message":"a","message":"b"}"#),
            Revoked(NotPermitted),
        ),
        (kms_error(400, "InvalidCiphertextException", ""), Invalid),
        (kms_error(400, "IncorrectKeyException", ""), Invalid),
        (kms_error(400, "InvalidKeyUsageException", ""), Invalid),
        (kms_error(400, "InvalidGrantTokenException", ""), Invalid),
        (kms_error(400, "InvalidArnException", ""), Invalid),
        (kms_error(400, "UnsupportedOperationException", ""), Invalid),
        (kms_error(400, "ValidationException", ""), Invalid),
        (kms_error(400, "SerializationException", ""), Invalid),
        (kms_error(500, "KeyUnavailableException", ""), Unreachable),
        (kms_error(503, "DependencyTimeoutException", ""), Unreachable),
        (kms_error(500, "KMSInternalException", ""), Unreachable),
        (kms_error(400, "ThrottlingException", ""), Unreachable),
        (kms_error(400, "LimitExceededException", ""), Unreachable),
        (kms_error(400, "UnrecognizedClientException", ""), Unreachable),
        (kms_error(400, "ExpiredTokenException", ""), Unreachable),
        (kms_error(400, "InvalidSignatureException", ""), Unreachable),
        (kms_error(400, "SomethingNewException", "k is pending deletion."), Unreachable),
        // A refusal never has the status of a failure, of a proxy's redirection or of success.
        (kms_error(500, "DisabledException", ""), Unreachable),
        (kms_error(302, "DisabledException", ""), Unreachable),
        (kms_error(200, "DisabledException", ""), Invalid),
        (reply(403, "<html>AccessDeniedException</html>"), Unreachable),
        (reply(404, ""), Unreachable),
        (reply(407, "{}"), Unreachable),
        (reply(400, r#"{"__type":["DisabledException"]}"#), Unreachable),
        (reply(502, "bad gateway"), Unreachable),
        (reply(204, ""), Unreachable),
        (reply(200, ""), Invalid),
        (reply(200, "{}"), Invalid),
        (reply(200, [0xff; 100]), Invalid),
        (reply(200, "[".repeat(60_000)), Invalid),
        (reply(200, r#"{"Plaintext":"not base64"}"#), Invalid),
        (reply(200, r#"{"Plaintext":7}"#), Invalid),
        (decrypted(&[]), Invalid),
        (decrypted(&[1; 31]), Invalid),
        (decrypted(&[1; 33]), Invalid),
        (decrypted(&[1; 4000]), Invalid),
        (Reply::Flood, Invalid),
    ];
    for (answer, expected) in cases {
        let what = match &answer {
            Reply::Answer(status, body) => {
                format!("{status} {:.80}", String::from_utf8_lossy(body))
            }
            other => format!("{other:?}"),
        };
        let server = Server::kms(move |_| answer.clone());
        let said = assert_sorted(unwrap_at(&server), expected, &what);
        // The error quotes at most the code, and the request id for looking it up.
        assert!(!said.contains("arn:aws:kms:") && !said.contains('<'), "{said}");
        if let Revoked(_) = expected {
            assert!(
                said.contains("key-1")
                    && said.contains("Exception")
                    && said.contains("request 0f5c-77"),
                "{said}"
            );
            assert_eq!(server.asked(Asked::is_kms).len(), 1, "{what}: a refusal is asked for once");
        }
    }
}

#[test]
fn answers_to_encrypt_are_looked_at_too() {
    let (cmk, context) = (cmk(), context());
    for (body, what) in [
        ("{}".to_owned(), "nothing"),
        (r#"{"CiphertextBlob":""}"#.to_owned(), "empty"),
        (r#"{"CiphertextBlob":"*"}"#.to_owned(), "no base64"),
        (format!(r#"{{"CiphertextBlob":"{}"}}"#, BASE64_STANDARD.encode([1; 6145])), "too long"),
    ] {
        let server = Server::kms(move |_| reply(200, body.clone()));
        let call = KmsCall { cmk: &cmk, context: &context, timeout: TIMEOUT };
        assert_sorted(
            server.backend().wrap(&call, &SecretKey::from_bytes(&mut KEY.clone())),
            Invalid,
            what,
        );
    }
    let server = Server::kms(|_| kms_error(400, "AccessDeniedException", ""));
    let call = KmsCall { cmk: &cmk, context: &context, timeout: TIMEOUT };
    let refused = server.backend().wrap(&call, &SecretKey::from_bytes(&mut KEY.clone()));
    assert_sorted(refused, Revoked(RevokedReason::NotPermitted), "wrap");
    // The backend does not ask KMS about bytes that cannot be a wrapped key.
    for wrapped in [vec![], vec![1; CIPHERTEXT_BYTES_MAX + 1]] {
        assert_sorted(server.backend().unwrap(&call, &wrapped), Invalid, "the wrapped key");
    }
    assert_eq!(server.asked(Asked::is_kms).len(), 1);
}

#[test]
fn every_answer_of_sts_is_sorted() {
    let refused = Revoked(RevokedReason::NotPermitted);
    let cases = [
        (sts_error(403, "AccessDenied"), refused),
        (sts_error(403, "InvalidClientTokenId"), Unreachable),
        (sts_error(400, "ExpiredToken"), Unreachable),
        (sts_error(403, "ExpiredTokenException"), Unreachable),
        (sts_error(403, "SignatureDoesNotMatch"), Unreachable),
        (sts_error(403, "UnrecognizedClientException"), Unreachable),
        (sts_error(400, "IncompleteSignature"), Unreachable),
        (sts_error(403, "MissingAuthenticationToken"), Unreachable),
        (sts_error(403, "RegionDisabledException"), Unreachable),
        (sts_error(403, "OptInRequired"), Unreachable),
        (sts_error(400, "Throttling"), Unreachable),
        (sts_error(503, "ServiceUnavailable"), Unreachable),
        (sts_error(500, "AccessDenied"), Unreachable),
        (sts_error(400, "SomethingNew"), Unreachable),
        (sts_error(400, "ValidationError"), Invalid),
        (sts_error(400, "MalformedPolicyDocument"), Invalid),
        (sts_error(400, "PackedPolicyTooLarge"), Invalid),
        // Answers of another server than STS.
        (reply(403, "<Error><Code>AccessDenied</Code><Message>m</Message></Error>"), Unreachable),
        (reply(403, "<html><Code>AccessDenied</Code></html>"), Unreachable),
        (reply(403, r#"{"__type":"AccessDenied"}"#), Unreachable),
        (reply(403, ""), Unreachable),
        (sts_error(200, "AccessDenied"), Invalid),
        (reply(200, ""), Invalid),
        (reply(200, "<AssumeRoleResponse/>"), Invalid),
        (reply(200, "<a>".repeat(10_000)), Invalid),
        (reply(200, [0xff; 100]), Invalid),
        (Reply::Redirect("http://127.0.0.1:1/".to_owned()), Unreachable),
    ];
    for (answer, expected) in cases {
        let what = format!("{answer:.200?}");
        let server = Server::start(move |_, _| answer.clone());
        let said = assert_sorted(unwrap_at(&server), expected, &what);
        assert_eq!(server.asked(Asked::is_kms).len(), 0, "{what}");
        if expected == refused {
            assert!(said.contains(ROLE) && said.contains("AccessDenied"), "{said}");
        }
    }
}

/// The reasons that AWS gives in the message of a refusal, for this action, and whether the policy
/// belongs to the caller of STS.
fn reasons(action: &str) -> Vec<(String, bool)> {
    let types = [
        ("identity-based policy", "an", true),
        ("service control policy", "a", true),
        ("permissions boundary", "a", true),
        ("session policy", "a", true),
        ("VPC endpoint policy", "a", true),
        ("resource-based policy", "a", false),
        ("resource control policy", "a", false),
        ("role trust policy", "the", false),
        ("policy of a new kind", "a", false),
    ];
    let of_type = |(policy, article, own): (&str, &str, bool)| {
        [
            format!("because no {policy} allows the {action} action"),
            format!("with an explicit deny in {article} {policy}"),
            format!("with an explicit deny in {article} {policy}: arn:aws:iam::1:policy/p-1/own"),
        ]
        .map(|reason| (reason, own))
    };
    let mut reasons: Vec<_> = types.into_iter().flat_map(of_type).collect();
    let of_endpoint = "with an explicit deny in a VPC endpoint policy transitively through a service control policy";
    reasons.push((of_endpoint.to_owned(), true));
    // The documentation has this spelling too.
    reasons.push(("with an explicit deny in a sessions policy".to_owned(), true));
    reasons
}

const CALLER: &str = "arn:aws:sts::210987654321:assumed-role/log-service/i-1";

#[test]
fn a_refusal_by_the_services_own_policy_is_an_outage() {
    let refused = Revoked(RevokedReason::NotPermitted);
    for (reason, own) in reasons("sts:AssumeRole") {
        for resource in ["", " on resource: arn:aws:iam::123456789012:role/logs"] {
            let message = format!(
                "User: {CALLER} is not authorized to perform: sts:AssumeRole{resource} {reason}"
            );
            let what = message.clone();
            let server = Server::start(move |_, _| sts_message(403, "AccessDenied", &message));
            let expected = if own { Unreachable } else { refused };
            let said = assert_sorted(unwrap_at(&server), expected, &what);
            assert!(said.contains("AccessDenied") && !said.contains(CALLER), "{said}");
        }
    }
    for message in [
        "Not authorized to perform sts:AssumeRole",
        "User: U is not authorized to perform: sts:AssumeRole on resource: R",
        "",
        // A type of policy that is not the reason, in a name or behind the reason.
        "User: U is not authorized to perform: sts:AssumeRole on resource: R/because-no-identity-based-policy-allows",
        "User: U is not authorized to perform: sts:AssumeRole on resource: R because no identity-based policy allows the sts:AssumeRole action because no role trust policy allows the sts:AssumeRole action",
        "User: U is not authorized to perform: sts:AssumeRole on resource: R because no identity-based policy allows",
        "User: because no identity-based policy allows the x action",
        "User: U is not authorized to perform: sts:AssumeRole on resource: R because no role trust policy allows the because no identity-based policy allows the sts:AssumeRole action",
        "User: U is not authorized to perform: sts:AssumeRole on resource: R with an explicit deny in the role trust policy: with an explicit deny in an identity-based policy",
        "with an explicit deny in a service control policy",
        "I am not sure: with an explicit deny in a service control policy",
    ] {
        let server = Server::start(move |_, _| sts_message(403, "AccessDenied", message));
        assert_sorted(unwrap_at(&server), refused, message);
    }
    // An account's root user may assume no role at all.
    let root = "Roles may not be assumed by root accounts.";
    let server = Server::start(move |_, _| sts_message(403, "AccessDenied", root));
    assert_sorted(unwrap_at(&server), Unreachable, root);
}

#[test]
fn a_refusal_as_the_customers_role_is_a_revocation() {
    let refused = Revoked(RevokedReason::NotPermitted);
    let session = "arn:aws:sts::123456789012:assumed-role/logs/envelog";
    for (reason, _) in reasons("kms:Decrypt") {
        let own = reason.ends_with(" VPC endpoint policy")
            || reason.starts_with("because no VPC endpoint policy")
            || reason.contains(" VPC endpoint policy: ");
        for resource in ["", " on resource: arn:aws:kms:eu-west-1:123456789012:key/k"] {
            let message = format!(
                "User: {session} is not authorized to perform: kms:Decrypt{resource} {reason}"
            );
            let what = message.clone();
            let server = Server::kms(move |_| kms_error(400, "AccessDeniedException", &message));
            assert_sorted(unwrap_at(&server), if own { Unreachable } else { refused }, &what);
        }
    }
    for message in [
        "User: U is not authorized to perform: kms:Decrypt on this resource because the resource does not exist in this Region, no resource-based policies allow access, or a resource-based policy explicitly denies access",
        "The ciphertext refers to a customer master key that does not exist, does not exist in this region, or you are not allowed to access.",
        "User: U is not authorized to perform: kms:Decrypt on resource: R/because-no-VPC-endpoint-policy-allows-the-kms:Decrypt-action",
        "because no VPC endpoint policy allows the kms:Decrypt action",
    ] {
        let server = Server::kms(move |_| kms_error(400, "AccessDeniedException", message));
        assert_sorted(unwrap_at(&server), refused, message);
    }
}

#[test]
fn a_refused_external_key_is_revoked_a_failed_proxy_an_outage() {
    use RevokedReason::{Deleted, Disabled, NotPermitted};
    for (message, expected) in [
        (
            "The external key store proxy rejected the request because the external key is not enabled in the external key manager.",
            Revoked(Disabled),
        ),
        (
            "The external key store proxy rejected the request because the external key does not support the requested operation.",
            Revoked(Disabled),
        ),
        (
            "The external key store proxy rejected the request because it could not find the external key.",
            Revoked(Deleted),
        ),
        (
            "The external key store proxy denied access to the operation. Verify that the user and the external key are both authorized for this operation, and try the request again.",
            Revoked(NotPermitted),
        ),
        (
            "The external key store proxy rejected the request because the specified ciphertext or additional authenticated data is corrupted, missing, or otherwise invalid.",
            Invalid,
        ),
        (
            "The ciphertext that the external key store proxy submitted for decryption, or the encryption context, is corrupted, missing, or otherwise invalid.",
            Invalid,
        ),
        (
            "AWS KMS cannot communicate with the external key store proxy. This might be a transient network issue.",
            Unreachable,
        ),
        (
            "AWS KMS rejected the request because the external key store proxy did not respond in time. Retry the request.",
            Unreachable,
        ),
        (
            "The external key store proxy did not respond to the request in the time allotted. Retry the request.",
            Unreachable,
        ),
        (
            "The external key store proxy rejected the request because it could not authenticate AWS KMS. Verify the credentials for your external key store and update if necessary.",
            Unreachable,
        ),
        (
            "The external key store proxy rejected the request because of an invalid URI path. Verify the URI path for your external key store and update if necessary.",
            Unreachable,
        ),
        (
            "The external key store proxy rejected the request because it does not support the requested cryptographic operation.",
            Unreachable,
        ),
        ("The external key store proxy is in an unhealthy state.", Unreachable),
        ("AWS KMS cannot interpret the response from the external key store proxy.", Unreachable),
        ("AWS KMS cannot establish a TLS connection to the external key store proxy.", Unreachable),
        ("arn:aws:kms:eu-west-1:123456789012:key/k is unavailable.", Unreachable),
        (
            "Something new: the external key store proxy rejected the request because the external key is not enabled in the external key manager.",
            Unreachable,
        ),
        ("", Unreachable),
    ] {
        let server = Server::kms(move |_| kms_error(400, "KMSInvalidStateException", message));
        assert_sorted(unwrap_at(&server), expected, message);
    }
    // AWS documents these codes only for the management of keys and key stores.
    for code in [
        "CustomKeyStoreInvalidStateException",
        "XksKeyInvalidConfigurationException",
        "XksKeyNotFoundException",
        "XksProxyUriUnreachableException",
        "XksProxyInvalidResponseException",
        "XksProxyIncorrectAuthenticationCredentialException",
    ] {
        let server = Server::kms(move |_| kms_error(400, code, "m"));
        assert_sorted(unwrap_at(&server), Unreachable, code);
    }
}

#[test]
fn what_may_be_over_in_a_moment_is_tried_again() {
    let blips = [
        Reply::HangUp,
        kms_error(500, "KMSInternalException", ""),
        kms_error(400, "ThrottlingException", ""),
        reply(429, ""),
        reply(503, ""),
    ];
    for blip in blips {
        let what = format!("{blip:?}");
        let server =
            Server::kms(move |before| if before < 2 { blip.clone() } else { decrypted(&KEY) });
        assert_eq!(unwrap_at(&server).unwrap().expose(), &KEY, "{what}");
        let asked = server.asked(Asked::is_kms);
        assert_eq!((asked.len(), server.asked(Asked::is_sts).len()), (3, 1), "{what}");
        asked.iter().for_each(|asked| assert_eq!(asked.signer(), "ROLE"));
    }
    let server = Server::start(|asked, before| match asked.is_kms() {
        true => decrypted(&KEY),
        false if before < 2 => sts_error(400, "Throttling"),
        false => assumed(),
    });
    assert_eq!(unwrap_at(&server).unwrap().expose(), &KEY);
    // Three attempts, and no more.
    let server = Server::kms(|_| kms_error(400, "ThrottlingException", ""));
    assert_sorted(unwrap_at(&server), Unreachable, "throttled");
    assert_eq!(server.asked(Asked::is_kms).len(), 3);
}

#[test]
fn a_call_ends_in_its_time_whatever_hangs() {
    let timeout = Duration::from_millis(700);
    // The timeout covers the whole call: the role, and each attempt.
    let slow = |reply: Reply| {
        move |_: &Asked, _: usize| {
            thread::sleep(Duration::from_millis(400));
            reply.clone()
        }
    };
    let slow_blip = slow(reply(503, ""));
    let slow_answer = {
        let (role, key) = (slow(assumed()), slow(decrypted(&KEY)));
        move |asked: &Asked, before| {
            if asked.is_kms() { key(asked, before) } else { role(asked, before) }
        }
    };
    let servers = [
        ("STS hangs", Server::start(|_, _| Reply::Hang)),
        ("KMS hangs", Server::kms(|_| Reply::Hang)),
        ("KMS drips", Server::kms(|_| Reply::Drip)),
        ("slow blips", Server::start(slow_blip)),
        ("slow answers", Server::start(slow_answer)),
    ];
    for (what, server) in servers {
        let began = Instant::now();
        let said = assert_sorted(unwrap_in(&server.backend(), timeout), Unreachable, what);
        let took = began.elapsed();
        // A busy machine may wake the thread late.
        assert!(took < timeout + Duration::from_secs(8), "{what}: {took:?}");
        // The backend does not begin an attempt that would not end in time. It then reports the
        // last answer.
        assert!(said.contains(" in time") || what == "slow blips", "{what}: {said}");
    }
    // No server listens at the port.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let own = [("AWS_ACCESS_KEY_ID", "OWN"), ("AWS_SECRET_ACCESS_KEY", "x")];
    let kms = backend(&format!("aws-kms://eu-west-1?endpoint=http://127.0.0.1:{port}"), &own);
    assert_sorted(unwrap_in(&kms, TIMEOUT), Unreachable, "no server");
    let kms = backend("aws-kms://eu-west-1?endpoint=https://kms.invalid", &own);
    assert_sorted(unwrap_in(&kms, TIMEOUT), Unreachable, "no such name");
    // The backend speaks only TLS to an https endpoint.
    let server = Server::kms(|_| decrypted(&KEY));
    let kms =
        backend(&format!("aws-kms://eu-west-1?endpoint=https://127.0.0.1:{}", server.port), &own);
    assert_sorted(unwrap_in(&kms, Duration::from_secs(2)), Unreachable, "no TLS there");
}

// ---- the service's own credentials ----

/// The answers of an instance's metadata service, with credentials that last.
fn metadata(asked: &Asked) -> Option<Reply> {
    metadata_of(asked, "META", "2999-01-01T00:00:00Z")
}

/// The same with these credentials.
fn metadata_of(asked: &Asked, id: &str, ends: &str) -> Option<Reply> {
    let credentials = serde_json::json!({
        "Code": "Success", "LastUpdated": "2026-01-01T00:00:00Z", "Type": "AWS-HMAC", "AccessKeyId": id,
        "SecretAccessKey": format!("secret of {id}"), "Token": "t", "Expiration": ends,
    });
    match (asked.method.as_str(), asked.path.as_str()) {
        ("PUT", "/latest/api/token") => Some(reply(200, "metadata-token")),
        ("GET", "/latest/meta-data/iam/security-credentials/") => Some(reply(200, "service-role")),
        ("GET", "/latest/meta-data/iam/security-credentials/service-role" | "/container") => {
            Some(reply(200, credentials.to_string()))
        }
        _ => None,
    }
}

const LATER: &str = "2999-01-01T00:00:00Z";
const PAST: &str = "2000-01-01T00:00:00Z";

/// AWS and an instance's metadata service, and how both behave.
struct Instance {
    server: Server,
    mood: Arc<Mutex<Mood>>,
    kms: AwsKms,
}

#[derive(Clone)]
struct Mood {
    /// The credentials that the metadata service gives, and their end.
    gives: (&'static str, &'static str),
    /// The behaviour of the metadata service in place of that.
    metadata: Option<Reply>,
    /// The answer of STS to credentials with this id.
    refuses: Option<(&'static str, Reply)>,
    /// The answer of STS to all others.
    sts: Reply,
}

impl Instance {
    fn new() -> Self {
        let mood = Arc::new(Mutex::new(Mood {
            gives: ("OLD", LATER),
            metadata: None,
            refuses: None,
            sts: assumed(),
        }));
        let server = Server::start({
            let mood = Arc::clone(&mood);
            move |asked, _| {
                let mood = mood.lock().unwrap().clone();
                if asked.is_kms() {
                    return decrypted(&KEY);
                }
                if asked.is_sts() {
                    return match mood.refuses {
                        Some((id, reply)) if id == asked.signer() => reply,
                        _ => mood.sts,
                    };
                }
                let (id, ends) = mood.gives;
                mood.metadata.or_else(|| metadata_of(asked, id, ends)).unwrap()
            }
        });
        let kms = server.backend_with(&[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &server.url())]);
        Self { server, mood, kms }
    }

    fn set(&self, change: impl FnOnce(&mut Mood)) {
        change(&mut self.mood.lock().unwrap());
    }

    fn unwrap(&self) -> Result<(), KmsError> {
        unwrap_in(&self.kms, TIMEOUT).map(|key| assert_eq!(key.expose(), &KEY))
    }

    /// The signers of the requests to STS since the last call of this method, and the number of
    /// credentials that were fetched.
    fn asked(&self) -> (Vec<String>, usize) {
        let mut asked = self.server.asked.lock().unwrap();
        let asked = std::mem::take(&mut *asked);
        let fetched = asked.iter().filter(|asked| asked.path.ends_with("/service-role")).count();
        (asked.iter().filter(|asked| asked.is_sts()).map(Asked::signer).collect(), fetched)
    }

    fn assert_asked(&self, signers: &[&str], fetched: usize, what: &str) {
        let (asked, count) = self.asked();
        assert_eq!(
            (asked, count),
            (signers.iter().map(|&id| id.to_owned()).collect(), fetched),
            "{what}"
        );
    }
}

#[test]
fn own_credentials_with_an_end_are_kept() {
    let instance = Instance::new();
    for _ in 0..3 {
        instance.unwrap().unwrap();
    }
    instance.assert_asked(&["OLD", "OLD", "OLD"], 1, "kept");
    // A failure that may be over in a moment says nothing about the credentials.
    for reply in [sts_error(503, "ServiceUnavailable"), sts_error(400, "Throttling")] {
        instance.set(|mood| mood.sts = reply);
        assert_sorted(instance.unwrap(), Unreachable, "a transient failure");
        instance.assert_asked(&["OLD", "OLD", "OLD"], 0, "a transient failure");
    }
    // Nor does an invalid request.
    instance.set(|mood| mood.sts = sts_error(400, "ValidationError"));
    assert_sorted(instance.unwrap(), Invalid, "an invalid request");
    instance.assert_asked(&["OLD"], 0, "an invalid request");
}

/// The answers of STS to credentials that it refuses, the last two those of a replaced role.
fn refusals() -> Vec<Reply> {
    let mut refusals: Vec<_> = [
        (400, "ExpiredToken"),
        (403, "ExpiredTokenException"),
        (403, "InvalidClientTokenId"),
        (403, "UnrecognizedClientException"),
        (403, "SignatureDoesNotMatch"),
        (400, "IncompleteSignature"),
        (403, "SomethingNew"),
    ]
    .map(|(status, code)| sts_error(status, code))
    .into();
    let message = format!(
        "User: {CALLER} is not authorized to perform: sts:AssumeRole on resource: {ROLE} because no identity-based policy allows the sts:AssumeRole action"
    );
    refusals.push(sts_message(403, "AccessDenied", &message));
    refusals.push(sts_error(403, "AccessDenied"));
    refusals
}

#[test]
fn refused_kept_credentials_are_fetched_again_in_the_same_call() {
    for refusal in refusals() {
        let what = format!("{refusal:?}");
        let instance = Instance::new();
        instance.unwrap().unwrap();
        instance.assert_asked(&["OLD"], 1, &what);
        instance.set(|mood| {
            mood.gives = ("NEW", LATER);
            mood.refuses = Some(("OLD", refusal.clone()));
        });
        instance.unwrap().unwrap();
        instance.assert_asked(&["OLD", "NEW"], 1, &what);
        instance.unwrap().unwrap();
        instance.assert_asked(&["NEW"], 0, &what);
        // Credentials that this call has fetched are not fetched again.
        instance.set(|mood| {
            mood.gives = ("NEWEST", LATER);
            mood.refuses = None;
            mood.sts = refusal.clone();
        });
        instance.unwrap().unwrap_err();
        instance.assert_asked(&["NEW", "NEWEST"], 1, &what);
        // Nor are the same credentials tried twice.
        instance.unwrap().unwrap_err();
        instance.assert_asked(&["NEWEST"], 1, &what);
        instance.set(|mood| mood.sts = assumed());
        instance.unwrap().unwrap();
    }
}

#[test]
fn a_refusal_holds_if_no_newer_credentials_can_be_had() {
    let refused = Revoked(RevokedReason::NotPermitted);
    for (metadata, what) in [
        (reply(500, ""), "it fails"),
        (reply(404, ""), "it has none"),
        (reply(200, "{}"), "it answers nonsense"),
        (Reply::HangUp, "it hangs up"),
        (Reply::Hang, "it hangs"),
        (Reply::Drip, "it drips"),
    ] {
        let instance = Instance::new();
        instance.unwrap().unwrap();
        instance.set(|mood| {
            mood.metadata = Some(metadata);
            mood.sts = sts_error(403, "AccessDenied");
        });
        let began = Instant::now();
        // The refusal is reported in time.
        let timeout = Duration::from_secs(3);
        assert_sorted(unwrap_in(&instance.kms, timeout), refused, what);
        assert!(began.elapsed() < timeout, "{what}: {:?}", began.elapsed());
        instance.set(|mood| mood.sts = sts_error(400, "ExpiredToken"));
        assert_sorted(unwrap_in(&instance.kms, timeout), Unreachable, what);
        // The kept credentials stay, and are tried again.
        instance.set(|mood| mood.sts = assumed());
        instance.unwrap().unwrap();
    }
}

#[test]
fn expired_looking_credentials_are_tried_if_none_are_newer() {
    let instance = Instance::new();
    // The clock of this machine may be wrong. STS decides.
    instance.set(|mood| mood.gives = ("OLD", PAST));
    instance.unwrap().unwrap();
    instance.assert_asked(&["OLD"], 1, "they look expired from the beginning");
    instance.unwrap().unwrap();
    instance.assert_asked(&["OLD"], 1, "newer ones are looked for");
    instance.set(|mood| mood.metadata = Some(reply(500, "")));
    instance.unwrap().unwrap();
    instance.assert_asked(&["OLD"], 0, "there are no newer ones");
    instance.set(|mood| mood.sts = sts_error(400, "ExpiredToken"));
    assert_sorted(instance.unwrap(), Unreachable, "STS says that they have expired");
    instance.assert_asked(&["OLD"], 0, "newer ones are looked for once");
    instance.set(|mood| {
        mood.metadata = None;
        mood.gives = ("NEW", LATER);
        mood.sts = assumed();
    });
    instance.unwrap().unwrap();
    instance.assert_asked(&["NEW"], 1, "newer ones come first");
}

#[test]
fn a_refused_token_of_the_metadata_service_is_fetched_again() {
    let tokens = Arc::new(Mutex::new(0));
    let given = Arc::clone(&tokens);
    let server = Server::start(move |asked, _| {
        let mut given = given.lock().unwrap();
        if asked.path == "/latest/api/token" {
            *given += 1;
            return reply(200, given.to_string());
        }
        match asked.headers.get("x-aws-ec2-metadata-token") {
            Some(token) if *token != given.to_string() => reply(401, ""),
            Some(_) => metadata_of(asked, "META", PAST).unwrap(),
            None if asked.is_kms() => decrypted(&KEY),
            None => assumed(),
        }
    });
    let kms = server.backend_with(&[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &server.url())]);
    unwrap_in(&kms, TIMEOUT).unwrap();
    // As after a restart of the metadata service.
    *tokens.lock().unwrap() += 1;
    server.asked.lock().unwrap().clear();
    unwrap_in(&kms, TIMEOUT).unwrap();
    let fetched = server.asked(|asked| asked.path.ends_with("/service-role"));
    assert_eq!(fetched.len(), 1, "{fetched:?}");
}

#[test]
fn own_credentials_are_found_where_aws_tools_find_them() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let server = Server::start(|asked, _| match metadata(asked) {
        Some(reply) => reply,
        None if asked.is_kms() => decrypted(&KEY),
        None => assumed(),
    });
    let credentials = file(
        "credentials",
        "[default]\naws_access_key_id = FILE\naws_secret_access_key = secret of FILE\n\
         [other]\naws_access_key_id = OTHER\naws_secret_access_key = secret of OTHER\n",
    );
    let said = r#"{"Version":1,"AccessKeyId":"PROCESS","SecretAccessKey":"secret of PROCESS"}"#;
    let process = format!("cat {}", file("said", said));
    let config = file(
        "config",
        &format!(
            "[profile process]\ncredential_process = {process}\n\
             [profile stuck]\ncredential_process = sleep 60\n[profile failing]\ncredential_process = false\n"
        ),
    );
    let none = file("none", "");
    let files = [("AWS_SHARED_CREDENTIALS_FILE", &*credentials), ("AWS_CONFIG_FILE", &*config)];
    let environment = [("AWS_ACCESS_KEY_ID", "ENV"), ("AWS_SECRET_ACCESS_KEY", "secret of ENV")];
    let container = format!("{}/container", server.url());
    let container = [
        ("AWS_SHARED_CREDENTIALS_FILE", &*none),
        ("AWS_CONTAINER_CREDENTIALS_FULL_URI", &*container),
    ];
    let url = format!("aws-kms://eu-west-1?endpoint={}", server.url());
    let by = |who: &str, url: &str, envs: &[(&str, &str)]| {
        unwrap_in(&backend(url, envs), TIMEOUT).unwrap();
        assert_eq!(server.asked(Asked::is_sts).last().unwrap().signer(), who);
    };
    by("ENV", &url, &[&files[..], &environment].concat());
    by("FILE", &url, &files);
    by("OTHER", &url, &[&files[..], &[("AWS_PROFILE", "other")]].concat());
    by("OTHER", &format!("{url}&profile=other"), &[&files[..], &environment].concat());
    by("PROCESS", &format!("{url}&profile=process"), &files);
    by("META", &url, &container);

    // Files are read again each time: their credentials may be replaced at any time.
    let kms = backend(&url, &files);
    unwrap_in(&kms, TIMEOUT).unwrap();
    file(
        "credentials",
        "[default]\naws_access_key_id = NEW\naws_secret_access_key = secret of NEW\n",
    );
    unwrap_in(&kms, TIMEOUT).unwrap();
    assert_eq!(server.asked(Asked::is_sts).last().unwrap().signer(), "NEW");

    // Missing credentials are not a refusal by the customer. If the source that is set up fails, no
    // other identity replaces it.
    let before = server.asked(Asked::is_sts).len();
    let off = ("AWS_EC2_METADATA_DISABLED", "true");
    let missing = file("missing", "");
    let web = [("AWS_ROLE_ARN", ROLE), ("AWS_WEB_IDENTITY_TOKEN_FILE", &*missing)];
    for (url, envs, what) in [
        (url.clone(), vec![off], "in no place"),
        (url.clone(), [&web[..], &files].concat(), "web identity"),
        (format!("{url}&profile=nobody"), [&files[..], &environment].concat(), "in no place"),
        (format!("{url}&profile=failing"), files.to_vec(), "profile with a process"),
    ] {
        let said = assert_sorted(unwrap_in(&backend(&url, &envs), TIMEOUT), Unreachable, what);
        assert!(said.contains("no AWS credentials") && said.contains(what), "{said}");
    }
    let began = Instant::now();
    let stuck = backend(&format!("{url}&profile=stuck"), &files);
    assert_sorted(unwrap_in(&stuck, Duration::from_millis(300)), Unreachable, "stuck");
    assert!(began.elapsed() < Duration::from_secs(10), "{:?}", began.elapsed());
    assert_eq!(server.asked(Asked::is_sts).len(), before);
}

#[test]
fn urls() {
    let parse = |url: &str| AwsKms::with_env(url, Arc::new(StaticEnv::default()));
    let at = |url: &str| {
        let kms = parse(url).unwrap_or_else(|error| panic!("{url}: {error}"));
        (kms.kms.to_string(), kms.sts.to_string())
    };
    let pair = |kms: &str, sts: &str| (kms.to_owned(), sts.to_owned());
    assert_eq!(
        at("aws-kms://eu-west-1"),
        pair("https://kms.eu-west-1.amazonaws.com/", "https://sts.eu-west-1.amazonaws.com/")
    );
    assert_eq!(
        at("aws-kms://cn-north-1/"),
        pair(
            "https://kms.cn-north-1.amazonaws.com.cn/",
            "https://sts.cn-north-1.amazonaws.com.cn/"
        )
    );
    assert_eq!(
        at("aws-kms://x-1?endpoint=https://kms.test"),
        pair("https://kms.test/", "https://kms.test/")
    );
    assert_eq!(
        at("aws-kms://x-1?endpoint=https%3A%2F%2Fkms.test:8443&sts-endpoint=http://[::1]:5"),
        pair("https://kms.test:8443/", "http://[::1]:5/")
    );
    for url in [
        "aws-kms:",
        "aws-kms:eu-west-1",
        "aws-kms://",
        "aws-kms://?endpoint=https://kms.test",
        "aws-kms://EU",
        "aws-kms://user@eu-west-1",
        "aws-kms://eu-west-1/path",
        "aws-kms://eu-west-1?region=x",
        "aws-kms://eu-west-1?endpoint=",
        "aws-kms://eu-west-1?profile=a&profile=b",
        "aws-kms://eu-west-1?endpoint=kms.test",
        "aws-kms://eu-west-1?endpoint=https://user:password@kms.test",
        "aws-kms://eu-west-1?endpoint=https://kms.test/path",
        "aws-kms://eu-west-1?endpoint=ftp://kms.test",
        "aws-kms://eu-west-1?endpoint=http://kms.test",
        "aws-kms://eu-west-1?endpoint=http://10.0.0.1",
        "aws-kms://eu-west-1?endpoint=http://localhost.kms.test",
        "aws-kms://us-iso-east-1",
    ] {
        let error = parse(url).unwrap_err();
        assert!(matches!(error, KmsUrlError::Malformed(_)), "{url}: {error}");
        assert!(!error.to_string().contains("password"), "{error}");
    }
}
