//! A KMS that does not answer: the operation that waits for it stops only operations on the same
//! Logstore.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use envelog::{
    Cmk, EncryptConf, EncryptType, LogstoreConfig, LogstoreSpec, Position, ReplaceCmk, Result,
    RewrapOptions, RotateDataKey, Store, VerifyOptions,
};

/// Logstores under the master key whose KMS does not answer.
const HUNG: &str = "p/hung";
const AGED: &str = "p/aged";
/// A Logstore without an envelope.
const PLAIN: &str = "p/plain";
/// Logstores under another master key, and under the service key.
const OTHER: &str = "p/other";
const SERVICE: &str = "p/service";
/// A Logstore that has no handle.
const CLOSED: &str = "p/closed";
const ALL: [&str; 6] = [HUNG, AGED, PLAIN, OTHER, SERVICE, CLOSED];

struct Scene {
    world: World,
    store: Store,
    /// The master key of [`HUNG`] and [`AGED`], and one that replaces it.
    hung: [Cmk; 2],
    /// The master key of [`OTHER`], and one that replaces it.
    other: [Cmk; 2],
}

impl Scene {
    fn new() -> Self {
        let world = World::manual_in_memory();
        let (hung, other) = ([world.cmk(), world.cmk()], [world.cmk(), world.cmk()]);
        let store = world.create();
        for text in [HUNG, AGED] {
            world.byok(&store, text, &hung[0]);
        }
        world.byok(&store, OTHER, &other[0]);
        world.service(&store, SERVICE);
        for text in [PLAIN, CLOSED] {
            store.create_logstore(&name(text), LogstoreSpec::default()).unwrap();
        }
        for text in ALL {
            put(&store.logstore(&name(text)).unwrap(), "first");
        }
        for text in [HUNG, AGED, OTHER, SERVICE] {
            store.keys().rotate_data_key(&name(text)).unwrap();
            put(&store.logstore(&name(text)).unwrap(), "second");
        }
        change(&store, AGED, |config| {
            config.retention_bytes = Some(1);
            config.rotate_data_key = Some(RotateDataKey { max_age_days: Some(1), max_bytes: None });
        })
        .unwrap();
        store.close().unwrap();
        let store = world.open();
        for text in ALL.into_iter().filter(|text| *text != CLOSED) {
            put(&store.logstore(&name(text)).unwrap(), "third");
        }
        Self { world, store, hung, other }
    }

    fn hung(&self) -> [&Cmk; 2] {
        self.hung.each_ref()
    }

    /// All documents are under the newest version of the service key, every tag is valid, and each
    /// Logstore works, also after the store was opened again.
    fn check(self, at: &str) {
        let Self { world, store, .. } = self;
        let verified = |store: &Store| {
            let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
            assert!(report.is_clean() && report.refused.is_empty(), "{at}: {report:?}");
        };
        verified(&store);
        store.close().unwrap();
        let store = world.open();
        verified(&store);
        for listed in store.list().unwrap() {
            let logstore = store.logstore(&listed).unwrap();
            // The segments before may be under a data key that was destroyed.
            let seq = logstore.append(record("last"), &synced()).unwrap().seq;
            let found = records_from(&logstore, 0, Position::Seq(seq)).unwrap();
            assert_eq!(strings(&found), ["last"], "{at}: {listed}");
        }
    }
}

/// Changes the configuration of a Logstore.
fn change(store: &Store, text: &str, how: impl FnOnce(&mut LogstoreConfig)) -> Result<()> {
    let mut config = store.logstore(&name(text))?.config();
    how(&mut config);
    store.update_logstore(&name(text), config).map(drop)
}

fn enable(store: &Store, text: &str, conf: EncryptConf) -> Result<()> {
    change(store, text, |config| config.encrypt_conf = Some(conf))
}

fn byok(cmk: &Cmk) -> EncryptConf {
    EncryptConf::byok(EncryptType::Aes, cmk.clone())
}

type Operation = fn(&Scene) -> Result<()>;

/// The operations that call the KMS of a Logstore.
const OPERATIONS: [(&str, Operation); 9] = [
    ("rotation", |scene| scene.store.keys().rotate_data_key(&name(HUNG)).map(drop)),
    ("re-wrap", |scene| scene.store.keys().rewrap(&name(HUNG)).map(drop)),
    ("re-wrap of all", |scene| {
        let options = RewrapOptions::master_key(&scene.hung[0].cmk_key_id);
        let report = scene.store.keys().rewrap_all(&options, &mut |_| {})?;
        assert!(report.failed.is_empty(), "{report:?}");
        Ok(())
    }),
    ("replacement", |scene| {
        let (new, how) = (scene.hung[1].clone(), ReplaceCmk::default());
        scene.store.keys().replace_cmk(&name(HUNG), new, how).map(drop)
    }),
    ("shredding", |scene| scene.store.keys().shred_data_keys(&name(HUNG), &[1])),
    ("update", |scene| change(&scene.store, HUNG, |config| config.ttl_days = Some(9))),
    ("first envelope", |scene| enable(&scene.store, PLAIN, byok(&scene.hung[1]))),
    ("creation", |scene| {
        let spec = LogstoreSpec::default().encrypted(byok(&scene.hung[1]));
        scene.store.create_logstore(&name("p/new"), spec).map(drop)
    }),
    ("retention", |scene| {
        let report = scene.store.admin().apply_retention()?;
        assert_eq!((report.data_keys, report.data_keys_postponed), (1, 0), "{report:?}");
        Ok(())
    }),
];

/// Operations that need no KMS, or another KMS.
fn beside(store: &Store, other: &[Cmk; 2]) {
    let (keys, admin) = (store.keys(), store.admin());
    let mut names: Vec<_> = ALL.map(name).into();
    names.sort();
    assert_eq!(store.list().unwrap(), names);
    // Operations on the store, and reports about all Logstores.
    for text in ALL {
        let logstore = store.logstore(&name(text)).unwrap();
        logstore.status().unwrap();
        logstore.key_status();
        logstore.config();
    }
    assert!(!keys.usage().unwrap().data_keys.is_empty());
    store.metrics();
    let keyless = VerifyOptions { keyless: true, ..VerifyOptions::default() };
    assert!(admin.verify(&keyless, &mut |_| {}).unwrap().is_clean());
    keys.audit_records().unwrap();
    assert!(keys.verify_audit(None).unwrap().fault.is_none());
    keys.export_audit().unwrap();
    admin.anchor_status();
    admin.checkpoint().unwrap();
    // Operations on other Logstores.
    let spec = |conf| LogstoreSpec::default().encrypted(conf);
    let service = || EncryptConf::service_key(EncryptType::Sm4);
    store.create_logstore(&name("p/a"), LogstoreSpec::default()).unwrap();
    put(&store.create_logstore(&name("p/b"), spec(service())).unwrap(), "new");
    put(&store.create_logstore(&name("p/c"), spec(byok(&other[0]))).unwrap(), "new");
    enable(store, "p/a", service()).unwrap();
    for text in [OTHER, SERVICE] {
        keys.rotate_data_key(&name(text)).unwrap();
        keys.rewrap(&name(text)).unwrap();
        keys.shred_data_keys(&name(text), &[1]).unwrap();
        change(store, text, |config| config.ttl_days = Some(7)).unwrap();
        put(&store.logstore(&name(text)).unwrap(), "beside");
    }
    enable(store, CLOSED, byok(&other[1])).unwrap();
    keys.replace_cmk(&name(OTHER), other[1].clone(), ReplaceCmk::default()).unwrap();
    let report = keys.rewrap_all(&RewrapOptions::master_key(&other[1].cmk_key_id), &mut |_| {});
    assert!(report.unwrap().failed.is_empty());
    admin.repair(&name(OTHER), 0).unwrap();
    for text in ["p/a", "p/b", "p/c"] {
        assert!(store.delete_logstore(&name(text)).unwrap().left.is_empty());
    }
    // The service key and its keyring.
    let rotated = keys.rotate_service_key_with(&mut |_| {}).unwrap();
    assert!(rotated.left_open.is_empty() && !keys.is_service_rotation_unfinished());
    keys.rewrap_keyring(Some(other[0].clone())).unwrap();
    keys.rewrap_keyring(None).unwrap();
    keys.rotate_service_key().unwrap();
    store.tick();
}

/// Runs `operation`, and `beside` in the middle of each KMS call that it makes. Returns the number
/// of the calls.
fn during_each_call(
    at: &str,
    operation: Operation,
    beside: impl Fn(&Scene) -> Box<dyn FnOnce() + Send>,
    check: impl Fn(Scene, Result<()>, &str),
) -> u32 {
    for call in 0.. {
        let at = format!("{at}, call {call}");
        let scene = Scene::new();
        let during = scene.world.kms.during_call(&scene.hung(), call, beside(&scene));
        let done = operation(&scene);
        if scene.world.kms.has_not_called() {
            assert!(call > 0, "{at}: no call");
            return call;
        }
        assert!(during.has_ended(), "{at}: an operation beside it waits for the KMS");
        check(scene, done, &at);
    }
    unreachable!()
}

#[test]
fn no_other_operation_waits_for_a_hung_kms() {
    for (what, operation) in OPERATIONS {
        during_each_call(
            what,
            operation,
            |scene| {
                let (store, other) = (scene.store.clone(), scene.other.clone());
                Box::new(move || beside(&store, &other))
            },
            |scene, done, at| {
                done.unwrap_or_else(|error| panic!("{at}: {error}"));
                scene.check(at);
            },
        );
    }
}
