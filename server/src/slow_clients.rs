//! Clients that send little and hold a connection, in the time of the test: no second of it is
//! waited for.

#![allow(clippy::unwrap_used)]

use std::{net::SocketAddr, sync::Arc, time::Duration};

use envelog::{Store, crypto::AwsLc};
use hyper_util::server::graceful::GracefulShutdown;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex, split},
    sync::watch,
    time::{Instant, sleep},
};

use crate::{
    Server,
    server::{http, open},
    service::Service,
};

const SECOND: Duration = Duration::from_secs(1);
/// More seconds than the service gives any client.
const BYTES: usize = 1000;

fn service() -> (TempDir, Arc<Service>) {
    let dir = tempfile::tempdir().unwrap();
    let (_, stopping) = watch::channel(false);
    let service = service_of(&dir, stopping);
    (dir, service)
}

fn service_of(dir: &TempDir, stopping: watch::Receiver<bool>) -> Arc<Service> {
    let path = |name| dir.path().join(name);
    let store = Store::builder(path("store"), path("keyring"), AwsLc::new()).create().unwrap();
    let settings = Server::builder().state_dir(path("state"));
    let service = open(&settings, None, store, std::time::SystemTime::now(), stopping).unwrap();
    Arc::new(service)
}

/// Sends the begin of a request, and then a byte each `pause`. Returns the answer, and when the
/// connection ended.
async fn trickle(service: &Arc<Service>, begin: &str, pause: Duration) -> (String, Duration) {
    let began = Instant::now();
    let (client, connection) = duplex(1 << 20);
    let peer = SocketAddr::from(([127, 0, 0, 1], 1));
    // Connections end when this is dropped.
    let graceful = GracefulShutdown::new();
    tokio::spawn(http(Arc::clone(service), connection, peer, graceful.watcher()));
    let (mut from, mut to) = split(client);
    let begin = begin.to_owned();
    tokio::spawn(async move {
        to.write_all(begin.as_bytes()).await.unwrap();
        for _ in 0..BYTES {
            sleep(pause).await;
            if to.write_all(b"a").await.is_err() {
                break;
            }
        }
    });
    let mut answer = String::new();
    from.read_to_string(&mut answer).await.unwrap();
    (answer, began.elapsed())
}

#[tokio::test(start_paused = true)]
async fn a_stop_waits_for_no_head_that_is_incomplete() {
    for begin in ["", "P", "POST / HTTP/1.1\r\nHost: sls.local\r\nx-log-"] {
        let dir = tempfile::tempdir().unwrap();
        let (stop, stopping) = watch::channel(false);
        let service = service_of(&dir, stopping);
        let (mut client, connection) = duplex(1 << 20);
        let graceful = GracefulShutdown::new();
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        let serving = tokio::spawn(http(service, connection, peer, graceful.watcher()));
        // The answer to a first call, and a part of the head of a second one.
        client.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut first = [0; 8];
        client.read_exact(&mut first).await.unwrap();
        client.write_all(begin.as_bytes()).await.unwrap();
        sleep(SECOND).await;
        assert!(!serving.is_finished(), "{begin:?}");
        let began = Instant::now();
        stop.send(true).unwrap();
        graceful.shutdown().await;
        serving.await.unwrap();
        assert!(began.elapsed() < SECOND, "{begin:?}: {:?}", began.elapsed());
    }
}

const PUT: &str = "POST /logstores/one/shards/lb HTTP/1.1\r\nHost: app.sls.local\r\n\
    Authorization: LOG x:AAAA\r\nDate: x\r\nContent-Type: application/x-protobuf\r\n\
    x-log-bodyrawsize: 5000000\r\nContent-Length: 5000000\r\n\r\n";

#[tokio::test(start_paused = true)]
async fn a_head_that_trickles_ends_its_connection_in_a_minute() {
    let (_dir, service) = service();
    for begin in ["", "P", "POST / HTTP/1.1\r\nHost: sls.local\r\nx-log-"] {
        let (_, time) = trickle(&service, begin, SECOND).await;
        assert!(time >= 59 * SECOND && time <= 61 * SECOND, "{begin:?}: {time:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_body_that_trickles_or_stalls_is_refused_and_its_memory_is_free_again() {
    let (_dir, service) = service();
    // The service waits 5 s for the rest of a refused body.
    for (pause, longest) in [(SECOND, 126 * SECOND), (30 * SECOND, 26 * SECOND)] {
        let (answer, time) = trickle(&service, PUT, pause).await;
        assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
        assert!(answer.contains("RequestTimeout") && time <= longest, "{time:?}: {answer}");
        assert_eq!(service.memory.taken(), 0);
    }
}
