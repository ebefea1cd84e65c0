//! Logstores under a master key of AWS KMS, simulated by moto.

#![allow(clippy::unwrap_used)]

#[path = "common/kms_backend.rs"]
mod kms_backend;
#[path = "tools/moto.rs"]
mod moto;

use std::{
    env,
    net::SocketAddr,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use envelog::{
    AppendOptions, Cmk, Durability, EncryptConf, EncryptType, Error, KeyState, Logstore,
    LogstoreSpec, Payload, Position, ReadOptions, Result, Store, StoreOptions,
    crypto::{AwsLc, SecretKey},
    kms::{self, EncryptionContext, Kms, KmsCall, KmsError, RevokedReason},
    testing::conformance::{Admin, Subject, unsupported},
};
use kms_backend::{a_logstore_follows_its_key, conforms};
use moto::{Moto, REGION, ROLE};
use tempfile::TempDir;

/// Set in the child process that runs the test body.
const INSIDE: &str = "ENVELOG_TEST_WITH_AWS_CREDENTIALS";

/// Runs a test in its own process with credentials in the environment. Changing the environment of
/// this process while other tests run would be unsound.
fn with_credentials(test: &str, body: fn()) {
    if env::var_os(INSIDE).is_some() {
        return body();
    }
    let mut command = Command::new(env::current_exe().unwrap());
    moto::credentials(&mut command);
    let out = command.args(["--exact", test, "--nocapture"]).env(INSIDE, "1").output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

fn cmk(key: &str) -> Cmk {
    Cmk { cmk_key_id: key.to_owned(), arn: ROLE.to_owned(), region_id: REGION.to_owned() }
}

fn store(dir: &TempDir, moto: &Moto, options: StoreOptions) -> Store {
    Store::builder(dir.path().join("store"), dir.path().join("keyring"), AwsLc::new())
        .kms(kms::from_url(&moto.url()).unwrap())
        .options(options)
        .create()
        .unwrap()
}

fn logstore(store: &Store, name: &str, key: &str) -> Logstore {
    let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::byok(EncryptType::Sm4, cmk(key)));
    store.create_logstore(&name.parse().unwrap(), spec).unwrap()
}

fn put(logstore: &Logstore, text: &str) -> Result<()> {
    let record = Payload::opaque(Bytes::copy_from_slice(text.as_bytes())).unwrap();
    logstore.append(record, &AppendOptions::default().durability(Durability::Synced)).map(drop)
}

fn texts(logstore: &Logstore) -> Result<Vec<String>> {
    let records = logstore.read(0, &ReadOptions::default().from(Position::Begin))?;
    records.map(|record| Ok(String::from_utf8(record?.bytes.to_vec()).unwrap())).collect()
}

#[track_caller]
fn assert_revoked<T: std::fmt::Debug>(result: Result<T>, expected: RevokedReason) {
    match result {
        Err(Error::Revoked { reason, .. }) if reason == expected => {}
        other => panic!("expected {expected}, got {other:?}"),
    }
}

/// moto as the suite's subject.
impl Subject for Moto {
    fn kms(&self) -> Arc<dyn Kms> {
        kms::from_url(&self.url()).unwrap()
    }

    fn create_key(&self) -> Admin<Cmk> {
        Ok(cmk(&self.create_key()))
    }

    fn missing_key(&self) -> Cmk {
        cmk("00000000-0000-4000-8000-000000000000")
    }

    fn disable(&self, cmk: &Cmk) -> Admin {
        self.disable(&cmk.cmk_key_id);
        Ok(())
    }

    fn enable(&self, cmk: &Cmk) -> Admin {
        self.enable(&cmk.cmk_key_id);
        Ok(())
    }

    fn schedule_deletion(&self, cmk: &Cmk) -> Admin {
        self.schedule_deletion(&cmk.cmk_key_id);
        Ok(())
    }

    fn cancel_deletion(&self, cmk: &Cmk) -> Admin {
        self.cancel_deletion(&cmk.cmk_key_id);
        self.enable(&cmk.cmk_key_id);
        Ok(())
    }

    fn delete(&self, _: &Cmk) -> Admin {
        unsupported("AWS deletes a key 7 days after the order at the earliest, and moto never")
    }

    fn recreate(&self, _: &Cmk) -> Admin {
        unsupported("AWS draws the identifiers of keys, and uses none twice")
    }

    fn rotate(&self, cmk: &Cmk) -> Admin {
        self.kms("RotateKeyOnDemand", &serde_json::json!({ "KeyId": cmk.cmk_key_id }));
        Ok(())
    }

    fn withdraw(&self, cmk: &Cmk) -> Admin {
        self.set_policy(&cmk.cmk_key_id, "Deny");
        Ok(())
    }

    fn permit(&self, cmk: &Cmk) -> Admin {
        self.set_policy(&cmk.cmk_key_id, "Allow");
        Ok(())
    }

    fn server(&self) -> Admin<SocketAddr> {
        Ok(self.address())
    }

    fn kms_at(&self, address: SocketAddr) -> Admin<Arc<dyn Kms>> {
        Ok(kms::from_url(&moto::url_at(address)).unwrap())
    }

    fn secrets(&self) -> Vec<String> {
        vec![moto::SECRET.to_owned()]
    }
}

#[test]
fn aws_kms_conforms() {
    with_credentials("aws_kms_conforms", || conforms(&Moto::start(), &["deleted", "recreation"]));
}

#[test]
fn a_logstore_follows_its_key_in_aws_kms() {
    with_credentials("a_logstore_follows_its_key_in_aws_kms", || {
        a_logstore_follows_its_key(&Moto::start());
    });
}

#[test]
fn a_key_binds_its_context_and_says_its_state() {
    with_credentials("a_key_binds_its_context_and_says_its_state", || {
        let moto = Moto::start();
        let kms = kms::from_url(&moto.url()).unwrap();
        let (key, other_key) = (moto.create_key(), moto.create_key());
        let context: EncryptionContext = [("envelog:store".to_owned(), "a".to_owned())].into();
        let other_context: EncryptionContext =
            [("envelog:store".to_owned(), "b".to_owned())].into();
        let ask = |key: &str,
                   context: &EncryptionContext,
                   wrapped: Option<&[u8]>|
         -> Result<Vec<u8>, KmsError> {
            let cmk = cmk(key);
            let call = KmsCall { cmk: &cmk, context, timeout: Duration::from_secs(20) };
            match wrapped {
                None => kms.wrap(&call, &SecretKey::from_bytes(&mut [7; 32])),
                Some(wrapped) => kms.unwrap(&call, wrapped).map(|key| key.expose().to_vec()),
            }
        };
        let wrapped = ask(&key, &context, None).unwrap();
        assert_ne!(wrapped, ask(&key, &context, None).unwrap());
        let unwrap = |key: &str, context| ask(key, context, Some(&wrapped));
        assert_eq!(unwrap(&key, &context).unwrap(), [7; 32]);
        let arn = moto.kms("DescribeKey", &serde_json::json!({ "KeyId": key }));
        assert_eq!(unwrap(arn["KeyMetadata"]["Arn"].as_str().unwrap(), &context).unwrap(), [7; 32]);

        let invalid =
            |result| assert!(matches!(result, Err(KmsError::Invalid { .. })), "{result:?}");
        invalid(unwrap(&key, &other_context));
        let mut damaged = wrapped.clone();
        *damaged.last_mut().unwrap() ^= 1;
        invalid(ask(&key, &context, Some(&damaged)));

        let revoked = |result: Result<Vec<u8>, KmsError>, expected| match result {
            Err(KmsError::Revoked { reason, .. }) if reason == expected => {}
            other => panic!("expected {expected}, got {other:?}"),
        };
        let both = |key: &str, expected| {
            revoked(ask(key, &context, None), expected);
            revoked(unwrap(key, &context), expected);
        };
        moto.disable(&key);
        both(&key, RevokedReason::Disabled);
        moto.enable(&key);
        assert_eq!(unwrap(&key, &context).unwrap(), [7; 32]);
        moto.schedule_deletion(&key);
        both(&key, RevokedReason::PendingDeletion);
        moto.cancel_deletion(&key);
        moto.enable(&key);
        assert_eq!(unwrap(&key, &context).unwrap(), [7; 32]);
        revoked(
            ask("00000000-0000-4000-8000-000000000000", &context, None),
            RevokedReason::Deleted,
        );
        // None of this affects the other key.
        assert!(ask(&other_key, &context, None).is_ok());
    });
}

#[test]
fn a_logstore_lives_as_long_as_its_key() {
    with_credentials("a_logstore_lives_as_long_as_its_key", || {
        let (moto, dir) = (Moto::start(), tempfile::tempdir().unwrap());
        let mut options = StoreOptions::default();
        options.revalidate_every = Duration::from_secs(1);
        // From the refusal to the last success.
        let bound = options.revalidate_every + options.kms_timeout;
        let store = store(&dir, &moto, options);
        let (key, other_key) = (moto.create_key(), moto.create_key());
        let (mine, other) =
            (logstore(&store, "p/mine", &key), logstore(&store, "p/other", &other_key));
        put(&mine, "first").unwrap();
        put(&other, "first").unwrap();

        let lost_within_bound = |began: Instant, reason| {
            loop {
                let started = began.elapsed();
                if put(&mine, "meanwhile").is_err() {
                    break;
                }
                assert!(started < bound, "it still writes");
            }
            std::thread::sleep(bound.saturating_sub(began.elapsed()));
            assert_revoked(put(&mine, "refused"), reason);
            assert_revoked(texts(&mine), reason);
            assert_eq!(mine.key_status().state, KeyState::Revoked { reason });
            put(&other, "goes on").unwrap();
        };
        let comes_back = |began: Instant| {
            while let Err(error) = put(&mine, "back") {
                // Within the bound, with a margin for a busy machine.
                assert!(began.elapsed() < bound * 10, "{error}");
                std::thread::sleep(Duration::from_millis(20));
            }
            assert_eq!(texts(&mine).unwrap().first().unwrap(), "first");
        };
        let began = Instant::now();
        moto.disable(&key);
        lost_within_bound(began, RevokedReason::Disabled);
        let began = Instant::now();
        moto.enable(&key);
        comes_back(began);
        let began = Instant::now();
        moto.schedule_deletion(&key);
        lost_within_bound(began, RevokedReason::PendingDeletion);
        // A key is disabled after its deletion is cancelled.
        moto.cancel_deletion(&key);
        std::thread::sleep(bound);
        assert_revoked(put(&mine, "refused"), RevokedReason::Disabled);
        let began = Instant::now();
        moto.enable(&key);
        comes_back(began);

        drop((mine, other));
        store.close().unwrap();
        let kms: Arc<dyn Kms> = kms::from_url(&moto.url()).unwrap();
        let store =
            Store::builder(dir.path().join("store"), dir.path().join("keyring"), AwsLc::new())
                .kms(kms)
                .open_read_only()
                .unwrap();
        let texts = texts(&store.logstore(&"p/mine".parse().unwrap()).unwrap()).unwrap();
        assert!(texts.first().unwrap() == "first" && texts.last().unwrap() == "back");
    });
}
