//! Two Logstores, one under a customer's key. Does what it is told on standard input, a word a line.

use std::io::stdin;

use aliyun_log_rust_sdk::{EncryptConf, Error};
use serde_json::json;

use crate::{client, drain, put};

const PROJECT: &str = "keys";

pub(crate) async fn run(conf: &EncryptConf) {
    let client = client();
    client.create_project(PROJECT).description("").send().await.unwrap();
    let service_key = EncryptConf::new(true, "default");
    for (logstore, conf) in [("mine", conf), ("other", &service_key)] {
        let create = client.create_logstore(PROJECT, logstore).shard_count(1).ttl(3);
        create.encrypt_conf(conf.clone()).send().await.unwrap();
    }
    println!("ready");
    for line in stdin().lines() {
        let word = line.unwrap();
        let mine = [
            outcome(put(&client, PROJECT, "mine", &word).await),
            outcome(drain(&client, PROJECT, "mine", 0).await),
        ];
        put(&client, PROJECT, "other", &word).await.unwrap();
        let other = drain(&client, PROJECT, "other", 0).await.unwrap();
        println!("{}", json!({ "mine": mine, "other": other }));
        let texts = match &*mine[1] {
            "200" => drain(&client, PROJECT, "mine", 0).await.unwrap(),
            _ => Vec::new(),
        };
        println!("{}", json!(texts));
    }
}

fn outcome<T>(result: Result<T, Error>) -> String {
    match result {
        Ok(_) => "200".to_owned(),
        Err(Error::Server { error_code, http_status, .. }) => format!("{http_status} {error_code}"),
        Err(error) => panic!("{error}"),
    }
}
