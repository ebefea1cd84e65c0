//! Requests that no client sends: the service answers or closes, and goes on.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    sync::LazyLock,
    time::Duration,
};

use common::{Ask, PROTOBUF, World, exchange, group};
use proptest::prelude::*;
use serde_json::Value;

/// One service for all cases. It stays with the process.
static WORLD: LazyLock<World> = LazyLock::new(|| {
    let world = World::new();
    world.create("one", &Value::Null);
    world.ok("POST", "/logstores/one/consumergroups", &serde_json::json!({ "consumerGroup": "g" }));
    world
});

/// Whether the service still answers.
fn is_alive() -> bool {
    exchange(WORLD.address, &Ask::new("GET", "/healthz").raw(&[])).status == 200
}

/// Sends bytes and the end of the connection: the service must not wait for more. Returns the
/// answer.
fn exchange_and_end(request: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(WORLD.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    // The service may have closed the connection already.
    let _ = stream.write_all(request);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        Just("logstores".to_owned()),
        Just("one".to_owned()),
        Just("shards".to_owned()),
        Just("consumergroups".to_owned()),
        Just("g".to_owned()),
        Just("lb".to_owned()),
        Just("route".to_owned()),
        Just("logs".to_owned()),
        Just("0".to_owned()),
        Just("..".to_owned()),
        Just(String::new()),
        "[0-9]{1,20}",
        "(%[0-9a-f]{2}|[a-z~]){0,6}",
    ]
}

fn parameter() -> impl Strategy<Value = String> {
    let name = prop_oneof![
        Just("type"),
        Just("from"),
        Just("to"),
        Just("cursor"),
        Just("count"),
        Just("key"),
        Just("offset"),
        Just("size"),
        Just("consumer"),
        Just("shard"),
        Just("query"),
        Just("line"),
        Just("wait"),
        Just("end_cursor"),
        Just("forceSuccess"),
        Just("action"),
    ];
    let value = prop_oneof![
        Just("log".to_owned()),
        Just("cursor".to_owned()),
        Just("cursor_time".to_owned()),
        Just("heartbeat".to_owned()),
        Just("checkpoint".to_owned()),
        Just("histogram".to_owned()),
        Just("begin".to_owned()),
        Just("end".to_owned()),
        Just("MTIz".to_owned()),
        Just(String::new()),
        Just("18446744073709551615".to_owned()),
        Just("-1".to_owned()),
        "[0-9]{1,4}",
        "(%[0-9a-f]{2}|[a-zA-Z0-9=+*]){0,12}",
    ];
    // A call that waits would only take time.
    (name, value).prop_map(|(name, value)| match name {
        "wait" => "wait=1".to_owned(),
        _ => format!("{name}={value}"),
    })
}

fn body() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..200),
        Just(group("x")),
        Just(b"[]".to_vec()),
        "\\{(\"[a-zA-Z_]{1,12}\": ?(null|true|-?[0-9]{1,20}|\"[a-z]{0,5}\"|\\[\\]|\\{\\}),?){0,4}\\}".prop_map(String::into_bytes),
        prop::sample::select(vec![
            r#"{"logstoreName": "two", "encrypt_conf": {"enable": true}}"#,
            r#"{"logstoreName": "../x", "ttl": 1}"#,
            r#"{"shard": 0, "checkpoint": "MQ=="}"#,
            r#"{"shard": 99999999999, "checkpoint": ""}"#,
            r#"{"from": 0, "to": 18446744073709551615, "query": "a"}"#,
            r#"{"from": 1, "to": 2, "query": "((((("}"#,
            "[4294967295, 0]",
        ]).prop_map(|text| text.as_bytes().to_vec()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// Signed requests of any shape: an answer of the right form, and never one of a failure.
    #[test]
    fn a_signed_request_of_any_shape_is_answered(
        method in prop::sample::select(vec!["GET", "POST", "PUT", "DELETE", "PATCH", "HEAD"]),
        pieces in prop::collection::vec(piece(), 0..5),
        parameters in prop::collection::vec(parameter(), 0..4),
        content_type in prop::sample::select(vec!["", PROTOBUF, "application/json", "x"]),
        raw_size in prop::sample::select(vec!["", "0", "10", "99999999999999999999", "x"]),
        form in prop::sample::select(vec!["", "lz4", "zstd", "deflate", "x"]),
        body in body(),
    ) {
        // A deletion would take the Logstore from the other cases.
        let is_lasting = method != "DELETE" || pieces.len() > 3;
        prop_assume!(is_lasting);
        let target = format!("/{}?{}", pieces.join("/"), parameters.join("&"));
        let mut ask = Ask { body, ..Ask::new(method, &target) };
        for (name, value) in [("content-type", content_type), ("x-log-bodyrawsize", raw_size), ("x-log-compresstype", form)] {
            if !value.is_empty() {
                ask = ask.header(name, value);
            }
        }
        let answer = ask.send(&WORLD);
        prop_assert!(answer.status < 500, "{} {}: {} {}", method, target, answer.status, answer.text());
        if answer.status >= 400 && method != "HEAD" {
            answer.code();
        }
    }

    /// Bytes of any kind: an answer or the end of the connection, and the service goes on.
    #[test]
    fn bytes_of_any_kind_end_nothing(
        head in "(GET|POST|PRI|[A-Z]{0,9}) (/|\\*|http://x/|[!-~]{0,30}) HTTP/(1\\.1|1\\.0|2\\.0|9)\r\n",
        headers in prop::collection::vec("(Host|Content-Length|Transfer-Encoding|Authorization|x-log-date|[A-Za-z-]{1,9}): ?[ -~]{0,30}\r\n", 0..5),
        end in prop::sample::select(vec!["\r\n", "\n", ""]),
        body in prop::collection::vec(any::<u8>(), 0..100),
    ) {
        let request = [head.as_bytes(), headers.concat().as_bytes(), end.as_bytes(), &body].concat();
        let answer = exchange_and_end(&request);
        prop_assert!(!answer.starts_with(b"HTTP/1.1 5"), "{}", String::from_utf8_lossy(&answer));
    }

    /// Any change of one byte of a good request is refused, or means the same.
    #[test]
    fn a_damaged_request_stores_nothing_else(at in 0..500_usize, bit in 0..8) {
        let ask = Ask::put("one", group("the only text"));
        let mut request = ask.signed();
        let at = at % request.len();
        request[at] ^= 1_u8 << bit;
        let answer = exchange_and_end(&request);
        prop_assert!(!answer.starts_with(b"HTTP/1.1 5"), "{}", String::from_utf8_lossy(&answer));
    }
}

#[test]
fn damaged_requests_left_only_good_logs() {
    for _ in 0..3 {
        let mut request = Ask::put("one", group("the only text")).signed();
        let last = request.len() - 1;
        request[last] ^= 1;
        assert_eq!(exchange(WORLD.address, &request).status, 401);
    }
    let texts = WORLD.pull_all("one");
    assert!(texts.iter().all(|text| text == "the only text" || text == "x"), "{texts:?}");
}

/// Bodies that grow when they are decompressed: to 10 MiB, of which the head announces less, all,
/// or more than there is.
#[test]
fn bombs_of_every_form_are_refused_and_take_no_memory() {
    let zeros = vec![0; 10 << 20];
    let mut deflate = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    deflate.write_all(&zeros).unwrap();
    let bombs = [
        ("lz4", lz4_flex::block::compress(&zeros)),
        ("zstd", zstd::bulk::compress(&zeros, 19).unwrap()),
        ("deflate", deflate.finish().unwrap()),
    ];
    for (form, bomb) in &bombs {
        for (raw_size, status, code) in [
            ("1", 400, "PostBodyUncompressError"),
            ("10485759", 400, "PostBodyUncompressError"),
            // It is what its head says, and no log group.
            ("10485760", 400, "PostBodyInvalid"),
            ("10485761", 413, "PostBodyTooLarge"),
            ("18446744073709551615", 413, "PostBodyTooLarge"),
        ] {
            let ask = Ask::put("one", bomb.clone()).header("x-log-compresstype", form);
            let ask = ask.header("x-log-bodyrawsize", raw_size);
            assert_eq!(ask.refused(&WORLD, status), code, "{form} {raw_size}");
        }
    }
    // A body without an announced length that does not end.
    let head = "POST /logstores/one/shards/lb HTTP/1.1\r\nHost: app.sls.local\r\n\
                Transfer-Encoding: chunked\r\nAuthorization: LOG root:AAAA\r\n\r\n";
    let mut endless = head.as_bytes().to_vec();
    for _ in 0..20 {
        endless.extend_from_slice(b"100000\r\n");
        endless.resize(endless.len() + (1 << 20), 0);
        endless.extend_from_slice(b"\r\n");
    }
    let answer = exchange_and_end(&endless);
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"));
    assert!(is_alive());
}

#[test]
fn a_thousand_idle_connections_hold_nobody_up() {
    let idle: Vec<TcpStream> =
        (0..1000).map(|_| TcpStream::connect(WORLD.address).unwrap()).collect();
    // And some that begin a request and do not go on.
    for mut stream in idle.iter().take(100) {
        stream.write_all(b"POST / HTTP/1.1\r\nHost: ").unwrap();
    }
    assert_eq!(WORLD.put("one", "x").status, 200);
    assert!(is_alive());
}

#[test]
fn a_client_that_takes_no_answer_holds_nobody_up() {
    let world = World::with(|builder| builder.memory_max(32 << 20));
    world.create("one", &Value::Null);
    let text = "0123456789abcdef".repeat(1 << 16);
    for _ in 0..8 {
        assert_eq!(world.put("one", &text).status, 200);
    }
    let begin =
        world.ok("GET", "/logstores/one/shards/0?type=cursor&from=begin", &Value::Null).json();
    let pull = common::pull_target("one", 0, begin["cursor"].as_str().unwrap());
    let request = Ask::new("GET", &pull).signed();
    // Their answers, of 4 MiB each, fit into no socket buffer.
    let slow: Vec<TcpStream> = (0..4)
        .map(|_| {
            let mut stream = TcpStream::connect(world.address).unwrap();
            stream.write_all(&request).unwrap();
            stream
        })
        .collect();
    std::thread::sleep(Duration::from_secs(1));
    // A small body needs little memory.
    assert_eq!(world.put("one", "x").status, 200);
    drop(slow);
    assert_eq!(world.pull_all("one").len(), 9);
}
