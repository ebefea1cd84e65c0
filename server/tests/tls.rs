//! The service over HTTPS.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    io::{Read, Write},
    net::TcpStream,
    path::Path,
    sync::Arc,
    time::Duration,
};

use common::{Ask, World, group};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, StreamOwned,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, ServerName},
};

const HOST: &str = "app.sls.local";

/// Writes a new certificate with its key, and returns it.
fn certify(dir: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed([HOST.to_owned()]).unwrap();
    fs::write(dir.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    fs::write(dir.join("cert.pem"), made.cert.pem()).unwrap();
    made.cert.der().clone()
}

/// Sends a request, trusting this certificate alone. Returns the answer, or `None` if the service
/// has another certificate.
fn exchange(world: &World, trusted: &CertificateDer<'static>, request: &[u8]) -> Option<Vec<u8>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from(HOST).unwrap();
    let connection = ClientConnection::new(Arc::new(config), name).unwrap();
    let socket = TcpStream::connect(world.address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut stream = StreamOwned::new(connection, socket);
    stream.write_all(request).ok()?;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    Some(answer)
}

#[test]
fn calls_are_encrypted_and_a_new_certificate_takes_effect() {
    let dir = tempfile::tempdir().unwrap();
    let first = certify(dir.path());
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let world = World::with(move |builder| builder.tls(cert, key));
    let create = Ask::new("POST", "/").json(r#"{"projectName": "app"}"#);
    let answer = exchange(&world, &first, &create.signed()).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    // Plain HTTP has no answer.
    let plain = common::exchange_raw(world.address, &Ask::put("one", group("x")).signed());
    assert!(!plain.starts_with(b"HTTP"), "{}", String::from_utf8_lossy(&plain));

    // A broken certificate does not take effect, and a new one does.
    fs::write(dir.path().join("cert.pem"), "none").unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let get = Ask::new("GET", "/").signed();
    assert!(exchange(&world, &first, &get).unwrap().starts_with(b"HTTP/1.1 200"));
    let second = certify(dir.path());
    let mut answer = exchange(&world, &second, &get);
    for _ in 0..100 {
        if answer.is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        answer = exchange(&world, &second, &get);
    }
    assert!(answer.unwrap().starts_with(b"HTTP/1.1 200"));
    assert!(exchange(&world, &first, &get).is_none());
}
