//! The command line with a key of a real OpenBao server, given as `--kms vault:…`.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "../../tests/common/openbao.rs"]
mod openbao;

use std::io::Write;

use common::{Out, Running, World, made_lines};
use openbao::OpenBao;
use serde_json::{Value, json};

const ROLE: &str = "envelog";

/// A directory for a store, and the server with a key that the AppRole may use.
struct Vault {
    world: World,
    bao: OpenBao,
    url: String,
}

impl Vault {
    fn new() -> Self {
        let bao = OpenBao::start();
        bao.create_key("transit", "orders");
        bao.set_policy("", ROLE, &["orders".to_owned()]);
        let url = bao.approle_url(&bao.create_approle("", ROLE, &json!({})));
        Self { world: World::new(), bao, url }
    }

    fn with_kms<'a>(&'a self, args: &[&'a str]) -> Vec<&'a str> {
        [&["--kms", &self.url], args].concat()
    }

    fn run(&self, args: &[&str]) -> Out {
        self.world.run(&self.with_kms(args))
    }

    fn ok(&self, args: &[&str]) -> Vec<u8> {
        self.world.ok(&self.with_kms(args))
    }
}

fn conf(key: &str, role: &str) -> String {
    let cmk = json!({ "cmk_key_id": key, "arn": role, "region_id": "eu-1" });
    json!({ "enable": true, "encrypt_type": "sm4", "user_cmk_info": cmk }).to_string()
}

#[test]
fn a_logstore_follows_its_transit_key() {
    let vault = Vault::new();
    let text = made_lines(1000);
    let file = vault.world.file("lines", &text);
    vault.ok(&["create", "p/a", "--encrypt-conf", &conf("orders", ROLE)]);
    vault.ok(&["append", "p/a", &file]);
    assert_eq!(vault.ok(&["read", "p/a"]), text);

    vault.bao.soft_delete("transit", "orders");
    for command in [&["read", "p/a"][..], &["append", "p/a", &file], &["keys", "rewrap", "p/a"]] {
        assert!(vault.run(command).sentence(3).contains("disabled"), "{command:?}");
    }
    vault.bao.restore("transit", "orders");
    assert_eq!(vault.ok(&["read", "p/a"]), text);

    vault.bao.set_policy("", ROLE, &[]);
    assert!(vault.run(&["read", "p/a"]).sentence(3).contains("not permitted"));
    vault.bao.set_policy("", ROLE, &["orders".to_owned()]);

    // After a rotation in Vault, a re-wrap of all keys uses the new version, and the old one is not
    // needed.
    vault.bao.rotate("transit", "orders");
    vault.ok(&["keys", "rewrap"]);
    let least = json!({ "min_decryption_version": 2 });
    vault.bao.configure("transit", "orders", &least);
    assert_eq!(vault.ok(&["read", "p/a"]), text);
    let usage: Value = serde_json::from_slice(&vault.ok(&["keys", "usage", "--json"])).unwrap();
    assert!(usage.to_string().contains(r#""version":"2""#), "{usage}");

    vault.bao.seal();
    assert!(vault.run(&["read", "p/a"]).sentence(4).contains("p/a"));
    vault.ok(&["verify", "--keyless"]);
    vault.bao.unseal();
    assert_eq!(vault.ok(&["read", "p/a"]), text);

    vault.bao.delete_key("transit", "orders");
    assert!(vault.run(&["read", "p/a"]).sentence(3).contains("deleted"));
}

#[test]
fn a_running_process_ends_when_the_key_is_taken_away() {
    let vault = Vault::new();
    vault.ok(&["create", "p/a", "--encrypt-conf", &conf("orders", ROLE)]);
    let args = ["--revalidate-every", "200ms", "append", "p/a", "-", "--ack"];
    let mut running = Running::start(vault.world.command(&vault.with_kms(&args)));
    let (mut stdin, acknowledged) = (running.stdin.take().unwrap(), running.lines());
    stdin.write_all(b"one\n").unwrap();
    assert_eq!(acknowledged.recv().unwrap(), "1");
    vault.bao.soft_delete("transit", "orders");
    assert!(running.wait().sentence(3).contains("disabled"));
    vault.bao.restore("transit", "orders");
    assert_eq!(vault.ok(&["read", "p/a"]), b"one\n");
}

#[test]
fn a_setting_that_does_not_serve_is_refused() {
    let vault = Vault::new();
    // A key and a role that do not exist, and another region.
    let create = |conf: &str| vault.run(&["create", "p/a", "--encrypt-conf", conf]);
    assert!(create(&conf("missing", ROLE)).sentence(3).contains("not permitted"));
    assert!(create(&conf("orders", "another")).sentence(4).contains("another AppRole"));
    let elsewhere = conf("orders", ROLE).replace("eu-1", "eu-2");
    assert!(create(&elsewhere).sentence(6).contains("region"));
    let url = "vault:http://vault.example?region=r&auth=kubernetes";
    let sentence = vault.world.refused(6, &["--kms", url, "list"]);
    assert!(sentence.contains("only by https:"), "{sentence}");
    assert_eq!(vault.world.json(&["list", "--json"])["logstores"], json!([]));
}
