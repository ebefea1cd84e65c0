//! The command line with a customer's key in Alibaba Cloud KMS, simulated by a local server.

#![allow(clippy::unwrap_used)]

#[path = "../../tests/common/aliyun.rs"]
mod aliyun;
mod common;

use std::{
    fs,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    process::Command,
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use aliyun::{Aliyun, Fault, OIDC_TOKEN, SERVICE_ID, SERVICE_SECRET};
use rustls::{ServerConnection, StreamOwned};

use common::{Out, Running, World, byok, made_lines};

/// A test directory and the simulated KMS.
struct Cloud {
    world: World,
    aliyun: Aliyun,
    url: String,
}

impl Cloud {
    fn new() -> Self {
        let aliyun = Aliyun::start();
        let url = aliyun.kms_url();
        Self { world: World::new(), aliyun, url }
    }

    /// The binary with the KMS URL but without credentials of the service, regardless of the test
    /// environment.
    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.world.command(&[&["--kms", &self.url], args].concat());
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("ALIBABA_CLOUD_") {
                command.env_remove(name);
            }
        }
        command.env("ALIBABA_CLOUD_ECS_METADATA_DISABLED", "true").env("HOME", self.world.path(""));
        command
    }

    /// The same with an access key of the service in the environment.
    fn logged_in(&self, args: &[&str]) -> Command {
        let mut command = self.command(args);
        command
            .env("ALIBABA_CLOUD_ACCESS_KEY_ID", SERVICE_ID)
            .env("ALIBABA_CLOUD_ACCESS_KEY_SECRET", SERVICE_SECRET);
        command
    }

    fn run(&self, args: &[&str]) -> Out {
        Running::start(self.logged_in(args)).finish()
    }

    fn ok(&self, args: &[&str]) -> Vec<u8> {
        let out = self.run(args);
        out.assert(0);
        out.stdout
    }

    /// Creates a Logstore under a new key, with these lines.
    fn logstore(&self, lines: &[u8]) -> String {
        let key = self.aliyun.create_key();
        self.ok(&["create", "p/customer", "--encrypt-conf", &byok("default", &key).to_string()]);
        self.ok(&["append", "p/customer", &self.world.file("lines", lines)]);
        key
    }
}

const READ: [&str; 4] = ["read", "p/customer", "--format", "raw"];

#[test]
fn the_life_of_a_logstore_under_a_cloud_key() {
    let lines = made_lines(500);
    let cloud = Cloud::new();
    let key = cloud.logstore(&lines);
    assert_eq!(cloud.ok(&READ), lines);
    let more = cloud.world.file("more", "more\n");
    let refused = |status, words: &str| {
        for command in [
            &READ[..],
            &["append", "p/customer", &more],
            &["verify"],
            &["keys", "rotate-data", "p/customer"],
        ] {
            let sentence = cloud.run(command).sentence(status);
            assert!(sentence.contains(words), "{command:?}: {sentence}");
        }
    };
    for (state, words) in [("Disabled", "disabled"), ("PendingDeletion", "pending deletion")] {
        cloud.aliyun.set_state(&key, state);
        refused(3, words);
        cloud.aliyun.set_state(&key, "Enabled");
        assert_eq!(cloud.ok(&READ), lines);
    }
    for trusts in [Some(false), None] {
        cloud.aliyun.set_role(trusts);
        refused(3, "not permitted");
    }
    cloud.aliyun.set_role(Some(true));
    for fault in [
        Fault::code(503, "ServiceUnavailableTemporary"),
        Fault::code(400, "Throttling.User"),
        Fault::Close,
    ] {
        for action in ["AssumeRole", "Decrypt"] {
            cloud.aliyun.set_fault(action, Some(fault.clone()));
            refused(4, "p/customer");
            cloud.aliyun.set_fault(action, None);
        }
    }
    cloud.aliyun.rotate(&key);
    cloud.ok(&["append", "p/customer", &more]);
    cloud.ok(&["keys", "rewrap"]);
    cloud.ok(&["verify"]);
    assert_eq!(cloud.ok(&READ), [&lines[..], b"more\n"].concat());
    cloud.aliyun.delete(&key);
    refused(3, "deleted");
}

#[test]
fn a_key_disabled_under_a_running_command_ends_it() {
    let cloud = Cloud::new();
    let key = cloud.logstore(b"before\n");
    let terms = ["--revalidate-every", "500ms"];
    let mut append = Running::start(
        cloud.logged_in(&[&["append", "p/customer", "-", "--ack"][..], &terms].concat()),
    );
    let acks = append.lines();
    append.stdin.as_mut().unwrap().write_all(b"during\n").unwrap();
    assert_eq!(acks.recv().unwrap(), "1");
    cloud.aliyun.set_state(&key, "Disabled");
    assert!(append.wait().sentence(3).contains("disabled"));
    cloud.aliyun.set_state(&key, "Enabled");
    assert_eq!(cloud.ok(&READ), b"before\nduring\n");
}

#[test]
fn a_logstore_is_made_only_with_a_key_that_can_be_used() {
    let cloud = Cloud::new();
    let create = |key: &str| {
        let conf = byok("default", key).to_string();
        cloud.run(&["create", "p/customer", "--encrypt-conf", &conf])
    };
    assert!(create("key-nobody-has").sentence(3).contains("deleted"));
    assert!(create("alias/logs").sentence(4).contains("alias"));
    let key = cloud.aliyun.create_key();
    cloud.aliyun.set_state(&key, "Disabled");
    assert!(create(&key).sentence(3).contains("disabled"));
    cloud.aliyun.set_state(&key, "Enabled");
    assert_eq!(cloud.ok(&["list"]), b"");
    create(&key).assert(0);
}

#[test]
fn the_service_logs_in_with_what_it_finds() {
    let cloud = Cloud::new();
    cloud.logstore(b"line\n");
    // No credentials, or only half of them.
    let sentence = Running::start(cloud.command(&READ)).finish().sentence(4);
    assert!(sentence.contains("~/.aliyun/config.json"), "{sentence}");
    let mut half = cloud.command(&READ);
    half.env("ALIBABA_CLOUD_ACCESS_KEY_ID", SERVICE_ID);
    let sentence = Running::start(half).finish().sentence(4);
    assert!(sentence.contains("only one is set"), "{sentence}");
    let mut wrong = cloud.command(&READ);
    wrong
        .env("ALIBABA_CLOUD_ACCESS_KEY_ID", SERVICE_ID)
        .env("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "not it");
    let sentence = Running::start(wrong).finish().sentence(4);
    assert!(
        sentence.contains("SignatureDoesNotMatch") && !sentence.contains("not it"),
        "{sentence}"
    );

    // A profile of the official command-line tool.
    fs::create_dir(cloud.world.path(".aliyun")).unwrap();
    let profile = format!(
        r#"{{"current":"logs","profiles":[{{"name":"logs","mode":"AK","access_key_id":"{SERVICE_ID}","access_key_secret":"{SERVICE_SECRET}"}}]}}"#
    );
    cloud.world.file(".aliyun/config.json", profile);
    assert_eq!(Running::start(cloud.command(&READ)).finish().stdout, b"line\n");
    let mut other = cloud.command(&READ);
    other.env("ALIBABA_CLOUD_PROFILE", "other");
    assert!(Running::start(other).finish().sentence(4).contains("no profile"));

    // A pod's token, which takes precedence over the profile.
    let pod = |token: &str| {
        let mut command = cloud.command(&READ);
        command.env("ALIBABA_CLOUD_ROLE_ARN", "acs:ram::1:role/log-service");
        command.env("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", "acs:ram::1:oidc-provider/ack");
        command.env("ALIBABA_CLOUD_OIDC_TOKEN_FILE", cloud.world.file("token", token));
        Running::start(command).finish()
    };
    cloud.aliyun.take_seen();
    assert_eq!(pod(OIDC_TOKEN).stdout, b"line\n");
    let seen = cloud.aliyun.take_seen();
    assert_eq!(
        seen.iter().filter(|seen| seen.action == "AssumeRoleWithOIDC").count(),
        1,
        "the credentials are kept"
    );
    assert!(seen.iter().all(|seen| !seen.target.contains(OIDC_TOKEN)));
    let sentence = pod("not it").sentence(4);
    assert!(sentence.contains("AssumeRoleWithOIDC") && !sentence.contains("not it"), "{sentence}");
}

#[test]
fn a_url_that_names_no_kms_is_refused() {
    let world = World::new();
    for (url, words) in [
        ("aliyun-kms://", "region"),
        ("aliyun-kms://cn-hangzhou?endpoint=http://kms.example", "https:"),
        ("aliyun-kms://cn-hangzhou?secret=hidden", "endpoint"),
        ("alibaba://cn-hangzhou", "aliyun-kms://REGION"),
    ] {
        let sentence = world.refused(6, &["--kms", url, "list"]);
        assert!(sentence.contains(words) && !sentence.contains("hidden"), "{sentence}");
    }
}

/// Starts a TLS proxy for the simulated KMS and returns its port. `ca.pem` in the test directory is
/// the certificate of its authority.
fn tls_in_front(cloud: &Cloud, ca: &str) -> u16 {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

    let (ca_key, key) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    cloud.world.file(ca, params.self_signed(&ca_key).unwrap().pem());
    let issuer = Issuer::new(params, ca_key);
    let certificate = CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let config = rustls::ServerConfig::builder_with_provider(Arc::new(
        rustls::crypto::aws_lc_rs::default_provider(),
    ))
    .with_safe_default_protocol_versions()
    .unwrap()
    .with_no_client_auth()
    .with_single_cert(vec![certificate.der().clone()], key)
    .unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (config, behind, port) =
        (Arc::new(config), cloud.aliyun.port(), listener.local_addr().unwrap().port());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut tls = StreamOwned::new(
                ServerConnection::new(Arc::clone(&config)).unwrap(),
                stream.unwrap(),
            );
            // A client that rejects the certificate closes the connection.
            thread::spawn(move || -> io::Result<()> {
                let mut plain = TcpStream::connect(("127.0.0.1", behind))?;
                loop {
                    pass_on(&mut tls, &mut plain)?;
                    pass_on(&mut plain, &mut tls)?;
                }
            });
        }
    });
    port
}

/// Forwards one HTTP message.
fn pass_on(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut message = Vec::new();
    let head = loop {
        let mut byte = [0];
        from.read_exact(&mut byte)?;
        message.extend(byte);
        if message.ends_with(b"\r\n\r\n") {
            break String::from_utf8_lossy(&message).to_ascii_lowercase();
        }
    };
    let len = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .map_or(0, |len| len.trim().parse().unwrap());
    let mut body = vec![0; len];
    from.read_exact(&mut body)?;
    message.extend(body);
    to.write_all(&message)?;
    to.flush()
}

#[test]
fn tls_trusts_what_the_system_trusts_and_nobody_else() {
    let mut cloud = Cloud::new();
    let port = tls_in_front(&cloud, "ca.pem");
    let other = tls_in_front(&cloud, "other.pem");
    assert_ne!(port, other);
    cloud.url = cloud
        .url
        .replace("http://", "https://")
        .replace(&cloud.aliyun.port().to_string(), &port.to_string());
    let key = cloud.aliyun.create_key();
    let conf = byok("default", &key).to_string();
    let certificates = cloud.world.path("");
    let create = |ca: &str, url: &str| {
        let cloud =
            Cloud { world: World::new(), aliyun: cloud.aliyun.clone(), url: url.to_owned() };
        let mut command = cloud.logged_in(&["create", "p/customer", "--encrypt-conf", &conf]);
        command.env("SSL_CERT_FILE", certificates.join(ca));
        Running::start(command).finish()
    };
    let sentence = create("other.pem", &cloud.url).sentence(4);
    assert!(sentence.contains("certificate"), "{sentence}");
    // The host name must match the certificate too.
    let named = cloud.url.replace("127.0.0.1", "localhost");
    let sentence = create("ca.pem", &named).sentence(4);
    assert!(sentence.contains("certificate"), "{sentence}");
    assert!(cloud.aliyun.take_seen().is_empty(), "nothing was sent to whom is not trusted");
    create("ca.pem", &cloud.url).assert(0);
    assert!(!cloud.aliyun.take_seen().is_empty());
}

/// A signal ends an append whose input is idle at once, although a check of the key waits for the KMS.
#[test]
fn a_signal_does_not_wait_for_the_kms() {
    const DELAY: Duration = Duration::from_secs(50);
    let cloud = Cloud::new();
    cloud.logstore(b"before\n");
    let args = [
        "append",
        "p/customer",
        "-",
        "--ack",
        "--kms-timeout=1m",
        "--revalidate-every=200ms",
        "--outage-grace=200ms",
    ];
    let mut append = Running::start(cloud.logged_in(&args));
    let acks = append.lines();
    append.stdin.as_mut().unwrap().write_all(b"one\n").unwrap();
    assert_eq!(acks.recv().unwrap(), "1");
    cloud.aliyun.set_delay(DELAY);
    cloud.aliyun.take_seen();
    // The lease is over when it asks again.
    while cloud.aliyun.take_seen().is_empty() {
        thread::sleep(Duration::from_millis(50));
    }
    thread::sleep(Duration::from_millis(500));
    let asked = Instant::now();
    append.interrupt();
    let stdin = append.stdin.take();
    let out = append.wait();
    drop(stdin);
    out.assert(130);
    assert!(asked.elapsed() < DELAY / 2, "it ended when the KMS answered");
    cloud.aliyun.set_delay(Duration::ZERO);
    assert_eq!(cloud.ok(&READ), b"before\none\n");
}
