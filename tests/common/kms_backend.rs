//! The tests that every KMS backend runs: the conformance suite, and the life of a Logstore whose
//! master key is disabled and enabled.

#![allow(dead_code, clippy::unwrap_used)]

use std::{
    thread,
    time::{Duration, Instant},
};

use envelog::{
    AppendOptions, Cmk, Durability, EncryptConf, EncryptType, Error, KeyState, Logstore,
    LogstoreSpec, Payload, Position, ReadOptions, Result, Store, StoreBuilder, StoreOptions,
    crypto::Sm4Simd,
    kms::RevokedReason,
    testing::conformance::{self, Settings, Subject},
};
use tempfile::TempDir;

/// The checks that need a network between the backend and its server.
pub(crate) const NETWORK: [&str; 6] = [
    "connection-refused",
    "no-answer",
    "half-an-answer",
    "slow-answer",
    "independent-calls",
    "routing-in-an-outage",
];
/// More time for a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs the conformance suite. The checks that do not apply must be these.
#[track_caller]
pub(crate) fn conforms(subject: &dyn Subject, not_applicable: &[&str]) {
    let mut settings = Settings::default();
    settings.short_timeout = Duration::from_secs(1);
    settings.tolerance = Duration::from_secs(5);
    let report = conformance::run(subject, &settings);
    println!("{report}");
    report.assert_conforming();
    assert_eq!(report.not_applicable(), not_applicable, "{report}");
}

/// A Logstore works, is refused within the bound after its master key is disabled, and works again
/// with all its records after the key is enabled. Other Logstores are undisturbed.
#[track_caller]
pub(crate) fn a_logstore_follows_its_key(subject: &dyn Subject) {
    let dir = tempfile::tempdir().unwrap();
    let mut options = StoreOptions::default();
    options.revalidate_every = Duration::from_secs(1);
    options.kms_timeout = Duration::from_secs(3);
    // From the refusal to the start of the last operation that succeeds.
    let bound = options.revalidate_every + options.kms_timeout;
    let store = builder(&dir, subject, options).create().unwrap();
    let (key, other_key) = (subject.create_key().unwrap(), subject.create_key().unwrap());
    let byok = |cmk: &Cmk| EncryptConf::byok(EncryptType::Sm4, cmk.clone());
    let mut mine = Written::create(&store, "p/mine", byok(&key));
    let mut others = [
        Written::create(&store, "p/other", byok(&other_key)),
        Written::create(&store, "p/service", EncryptConf::service_key(EncryptType::Aes)),
    ];
    mine.put().unwrap();
    others.iter_mut().for_each(|other| other.put().unwrap());

    for _ in 0..2 {
        subject.disable(&key).unwrap();
        let began = Instant::now();
        let refused = loop {
            let started = began.elapsed();
            match mine.put() {
                Ok(()) => assert!(started < bound, "an append started {started:?} after"),
                Err(error) => break error,
            }
            others.iter_mut().for_each(|other| other.put().unwrap());
            thread::sleep(Duration::from_millis(10));
        };
        assert_disabled(refused);
        println!("refused {:?} after the key was disabled", began.elapsed());
        thread::sleep(bound.saturating_sub(began.elapsed()));
        assert_disabled(mine.put().unwrap_err());
        assert_disabled(mine.texts().unwrap_err());
        let reason = RevokedReason::Disabled;
        assert_eq!(mine.logstore.key_status().state, KeyState::Revoked { reason });
        for other in &mut others {
            other.put().unwrap();
            other.check();
        }

        subject.enable(&key).unwrap();
        let began = Instant::now();
        while let Err(error) = mine.put() {
            assert_disabled(error);
            assert!(began.elapsed() < bound + PATIENCE, "it stays refused");
            thread::sleep(Duration::from_millis(10));
        }
        println!("accepted {:?} after the key was enabled", began.elapsed());
        mine.check();
    }

    // Another process finds the same.
    let written = [mine.written.clone(), others[0].written.clone(), others[1].written.clone()];
    drop((mine, others));
    store.close().unwrap();
    let store = builder(&dir, subject, options).open().unwrap();
    for (name, written) in ["p/mine", "p/other", "p/service"].into_iter().zip(written) {
        let logstore = store.logstore(&name.parse().unwrap()).unwrap();
        Written { logstore, written }.check();
    }
    subject.disable(&key).unwrap();
    drop(store);
    let store = builder(&dir, subject, options).open().unwrap();
    let logstore = store.logstore(&"p/mine".parse().unwrap()).unwrap();
    assert_disabled(Written { logstore, written: Vec::new() }.texts().unwrap_err());
}

fn builder(dir: &TempDir, subject: &dyn Subject, options: StoreOptions) -> StoreBuilder {
    Store::builder(dir.path().join("store"), dir.path().join("keyring"), Sm4Simd::new())
        .kms(subject.kms())
        .options(options)
}

#[track_caller]
fn assert_disabled(error: Error) {
    assert!(
        matches!(&error, Error::Revoked { reason: RevokedReason::Disabled, .. }),
        "the key is disabled, but: {error}"
    );
}

/// A Logstore, and the records that it has acknowledged.
struct Written {
    logstore: Logstore,
    written: Vec<String>,
}

impl Written {
    fn create(store: &Store, name: &str, conf: EncryptConf) -> Self {
        let spec = LogstoreSpec::default().encrypt_conf(conf);
        let logstore = store.create_logstore(&name.parse().unwrap(), spec).unwrap();
        Self { logstore, written: Vec::new() }
    }

    fn put(&mut self) -> Result<()> {
        let text = format!("record {}", self.written.len());
        let options = AppendOptions::default().durability(Durability::Synced);
        self.logstore.append(Payload::opaque(text.clone()).unwrap(), &options)?;
        self.written.push(text);
        Ok(())
    }

    fn texts(&self) -> Result<Vec<String>> {
        let records = self.logstore.read(0, &ReadOptions::default().from(Position::Begin))?;
        records.map(|record| Ok(String::from_utf8(record?.bytes.to_vec()).unwrap())).collect()
    }

    /// Nothing is lost and nothing was added.
    #[track_caller]
    fn check(&self) {
        assert_eq!(self.texts().unwrap(), self.written);
    }
}
