//! A KMS that hangs holds up the Logstores under its keys, and no others.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::{Arc, Condvar, Mutex},
    thread,
    time::Duration,
};

use common::{Ask, exchange, group, keys, pull_target, write_keys};
use envelog::{
    Cmk, EncryptConf, EncryptType, LogstoreSpec, Store, StoreOptions,
    crypto::{AwsLc, SecretKey},
    kms::{Kms, KmsCall, KmsError},
};
use envelog_server::Server;

/// More calls than the runtime has threads for those that block.
const CALLS: usize = 600;

/// A KMS in memory that hangs on request. It wraps a key by writing it down.
#[derive(Debug, Default)]
struct HangingKms {
    hangs: Mutex<bool>,
    changed: Condvar,
}

impl HangingKms {
    fn hang(&self, hangs: bool) {
        *self.hangs.lock().unwrap() = hangs;
        self.changed.notify_all();
    }
}

impl Kms for HangingKms {
    fn name(&self) -> &str {
        "hanging"
    }

    fn serves(&self, _region_id: &str) -> bool {
        true
    }

    fn wrap(&self, _call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        Ok(key.expose().to_vec())
    }

    fn unwrap(&self, _call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        let hangs = self.hangs.lock().unwrap();
        drop(self.changed.wait_while(hangs, |hangs| *hangs).unwrap());
        let mut key = <[u8; 32]>::try_from(wrapped).map_err(|_| KmsError::invalid("length"))?;
        Ok(SecretKey::from_bytes(&mut key))
    }
}

#[test]
fn calls_that_wait_for_a_kms_hold_up_their_own_logstore_alone() {
    let dir = tempfile::tempdir().unwrap();
    let kms = Arc::new(HangingKms::default());
    let builder = || {
        let options = StoreOptions::default().kms_timeout(Duration::from_secs(60));
        Store::builder(dir.path().join("store"), dir.path().join("keyring"), AwsLc::new())
            .options(options)
            .kms(Arc::clone(&kms) as _)
    };
    let cmk = Cmk { cmk_key_id: "k".into(), arn: "a".into(), region_id: "r".into() };
    let store = builder().create().unwrap();
    for (name, conf) in [
        ("app/hung", EncryptConf::byok(EncryptType::Aes, cmk)),
        ("app/other", EncryptConf::service_key(EncryptType::Aes)),
    ] {
        let spec = LogstoreSpec::default().encrypt_conf(conf);
        store.create_logstore(&name.parse().unwrap(), spec).unwrap();
    }
    store.close().unwrap();
    // A store that was just opened has no data key in memory.
    let store = builder().open().unwrap();
    let path = dir.path().join("keys.json");
    write_keys(&path, &keys());
    let server = Server::builder().access_keys(path);
    let (address, stop, serving) = common::start(server, store.clone());

    kms.hang(true);
    thread::scope(|threads| {
        let target = "/logstores/hung/shards/0?type=cursor&from=begin";
        let calls: Vec<_> = (0..CALLS)
            .map(|_| threads.spawn(move || exchange(address, &Ask::new("GET", target).signed())))
            .collect();
        // Every one of them has been read, and they wait for the KMS or for their turn.
        thread::sleep(Duration::from_secs(2));
        let put = exchange(address, &Ask::put("other", group("x")).signed());
        assert_eq!(put.status, 200, "{}", put.text());
        let begin = "/logstores/other/shards/0?type=cursor&from=begin";
        let begin = exchange(address, &Ask::new("GET", begin).signed()).json();
        let pull = pull_target("other", 0, begin["cursor"].as_str().unwrap());
        let pulled = exchange(address, &Ask::new("GET", &pull).signed());
        assert_eq!(pulled.header("x-log-count"), "1");
        // The console shows both Logstores.
        let look = |view: &str| {
            let answer = exchange(address, &Ask::new("GET", view).signed());
            assert_eq!(answer.status, 200, "{view}: {}", answer.text());
            answer.json()
        };
        let overview = look("/console/api/overview");
        for row in overview["logstores"].as_array().unwrap() {
            assert!(row["figures"]["stored"].is_u64(), "{row}");
        }
        let hung = look("/console/api/logstore?project=app&logstore=hung");
        assert_eq!(hung["shards"].as_array().unwrap().len(), 1, "{hung}");
        let tail = look("/console/api/tail?project=app&logstore=other&back=9");
        assert_eq!(tail["logs"].as_array().unwrap().len(), 1, "{tail}");
        // None of them was given up to make room.
        assert!(calls.iter().all(|call| !call.is_finished()));
        kms.hang(false);
        for call in calls {
            assert!([200, 503].contains(&call.join().unwrap().status));
        }
    });
    stop.send(()).unwrap();
    serving.join().unwrap();
    store.close().unwrap();
}
