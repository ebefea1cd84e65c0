//! The example of an embedded service works as it stands.

#![allow(clippy::unwrap_used)]

mod common;
#[allow(dead_code)]
#[path = "../examples/embed.rs"]
mod embed;

use std::{sync::mpsc, thread};

use common::{Ask, exchange, group, pull_target};
use serde_json::json;
use tokio::sync::oneshot;

#[test]
fn the_shortest_service_keeps_its_logs_over_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut cursor = String::new();
    for round in 0..2 {
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell, told) = mpsc::channel();
        let path = dir.path().join("new");
        let serving = thread::spawn(move || {
            let any = "127.0.0.1:0".parse().unwrap();
            let tell = |address| tell.send(address).unwrap();
            embed::serve(&path, any, tell, async { drop(stopped.await) })
        });
        let address = told.recv().unwrap();
        let ask = |ask: Ask| {
            let answer = exchange(address, &ask.signed());
            assert_eq!(answer.status, 200, "{}", answer.text());
            answer
        };
        if round == 0 {
            let post = |target: &str, body: serde_json::Value| {
                ask(Ask::new("POST", target).json(body.to_string()))
            };
            post("/", json!({ "projectName": "app" }));
            let conf = json!({ "enable": true, "encrypt_type": "sm4" });
            post(
                "/logstores",
                json!({ "logstoreName": "one", "shardCount": 1, "encrypt_conf": conf }),
            );
            let begin = ask(Ask::new("GET", "/logstores/one/shards/0?type=cursor&from=begin"));
            cursor = begin.json()["cursor"].as_str().unwrap().to_owned();
            ask(Ask::put("one", group("order 17 paid")));
        }
        let pulled = ask(Ask::new("GET", &pull_target("one", 0, &cursor)));
        assert_eq!(pulled.header("x-log-count"), "1");
        assert!(pulled.text().contains("order 17 paid"));
        stop.send(()).unwrap();
        serving.join().unwrap().unwrap();
    }
}
