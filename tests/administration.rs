//! A KMS that does not answer: the operation that waits for it stops only operations on the same
//! Logstore.
//!
//! Most tests run other operations in the middle of a KMS call, which returns when they have ended.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use common::{
    disk::{Op, Sim, Verdict},
    *,
};
use envelog::{
    Cmk, EncryptConf, EncryptType, Error, Logstore, LogstoreConfig, LogstoreSpec, Position,
    ReadOptions, Result, RotateDataKey, Store,
    admin::{ReplaceCmk, RewrapOptions, VerifyOptions},
    audit::AuditEvent,
    io::Clock,
    kms::RevokedReason,
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
    /// Each Logstore but [`CLOSED`] is open and has been used.
    fn new() -> Self {
        let scene = Self::idle();
        for text in ALL.into_iter().filter(|text| *text != CLOSED) {
            put(&scene.logstore(text), "third");
        }
        scene
    }

    /// As [`Scene::new`], and the next operation under each master key renews its lease.
    fn stale() -> Self {
        let scene = Self::new();
        scene.make_leases_due();
        scene
    }

    /// As [`Scene::new`], and the service keyring is under a master key of its own.
    fn leased() -> Self {
        let scene = Self::new();
        scene.store.keys().rewrap_keyring(Some(scene.world.cmk())).unwrap();
        scene
    }

    /// No Logstore has been used since the store was opened.
    fn idle() -> Self {
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
        // A process that has written the Logstore would drop the first segment when it closes.
        store.close().unwrap();
        let store = world.open();
        change(&store, AGED, |config| {
            config.retention_bytes = Some(1);
            config.rotate_data_key = policy(Some(1), None);
        })
        .unwrap();
        store.close().unwrap();
        let store = world.open();
        Self { world, store, hung, other }
    }

    fn logstore(&self, text: &str) -> Logstore {
        self.store.logstore(&name(text)).unwrap()
    }

    /// Makes the last answers of the KMSs too old, so that the next operation under each master key
    /// renews its lease.
    fn make_leases_due(&self) {
        let options = &self.world.options;
        self.world.clock.advance(options.revalidate_every + options.kms_timeout);
    }

    fn during_call(&self, after: u32, act: impl FnOnce() + Send + 'static) -> During {
        self.world.kms.during_call(&self.hung.each_ref(), after, act)
    }

    /// Every document is under an accepted version of the service key, every tag is valid, and each
    /// Logstore works, also after the store was opened again.
    fn check(self, at: &str) {
        let Self { world, store, .. } = self;
        assert_clean(&store, at);
        let _ = store.close();
        let store = world.open();
        assert_clean(&store, at);
        for listed in store.list().unwrap() {
            let logstore = store.logstore(&listed).unwrap();
            // The segments before may be under a data key that was destroyed.
            let seq = logstore.append(record("last"), &synced()).unwrap().seq;
            let found = records_from(&logstore, 0, Position::Seq(seq)).unwrap();
            assert_eq!(strings(&found), ["last"], "{at}: {listed}");
        }
    }
}

#[track_caller]
fn assert_clean(store: &Store, at: &str) {
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean() && report.refused.is_empty(), "{at}: {report:?}");
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

fn policy(max_age_days: Option<u32>, max_bytes: Option<u64>) -> Option<RotateDataKey> {
    Some(RotateDataKey::default().max_age_days(max_age_days).max_bytes(max_bytes))
}

/// The number of data-key versions of a Logstore.
fn versions(logstore: &Logstore) -> usize {
    logstore.status().unwrap().data_keys.iter().filter(|key| key.version > 0).count()
}

fn missing(text: &str) -> Error {
    Error::LogstoreMissing(name(text))
}

/// An operation that calls the KMS of a Logstore.
struct Operation {
    what: &'static str,
    logstore: &'static str,
    run: fn(&Scene) -> Result<()>,
}

const OPERATIONS: [Operation; 10] = [
    Operation {
        what: "rotation",
        logstore: HUNG,
        run: |scene| scene.store.keys().rotate_data_key(&name(HUNG)).map(drop),
    },
    Operation {
        what: "re-wrap",
        logstore: HUNG,
        run: |scene| scene.store.keys().rewrap(&name(HUNG)).map(drop),
    },
    Operation {
        what: "re-wrap of all",
        logstore: HUNG,
        run: |scene| {
            scene.store.keys().rotate_data_key(&name(AGED))?;
            let options = RewrapOptions::default().cmk_key_id(scene.hung[0].cmk_key_id.clone());
            let mut report = scene.store.keys().rewrap_all(&options, &mut |_| {})?;
            report.failed.pop().map_or(Ok(()), |(_, error)| Err(error))
        },
    },
    Operation {
        what: "replacement",
        logstore: HUNG,
        run: |scene| {
            let (new, how) = (scene.hung[1].clone(), ReplaceCmk::default());
            scene.store.keys().replace_cmk(&name(HUNG), new, how).map(drop)
        },
    },
    Operation {
        what: "shredding",
        logstore: HUNG,
        run: |scene| scene.store.keys().shred_data_keys(&name(HUNG), &[1]),
    },
    Operation {
        what: "update",
        logstore: HUNG,
        run: |scene| change(&scene.store, HUNG, |config| config.ttl_days = Some(9)),
    },
    Operation {
        what: "first envelope",
        logstore: PLAIN,
        run: |scene| enable(&scene.store, PLAIN, byok(&scene.hung[1])),
    },
    Operation {
        what: "creation",
        logstore: "p/new",
        run: |scene| {
            let spec = LogstoreSpec::default().encrypt_conf(byok(&scene.hung[1]));
            scene.store.create_logstore(&name("p/new"), spec).map(drop)
        },
    },
    Operation {
        what: "retention",
        logstore: AGED,
        run: |scene| {
            let report = scene.store.admin().apply_retention()?;
            if report.data_keys > 0 { Ok(()) } else { Err(missing(AGED)) }
        },
    },
    Operation {
        what: "rotation by policy",
        logstore: AGED,
        run: |scene| {
            scene.world.clock.advance(DAY);
            let rotated = scene.store.keys().rotate_due_data_keys()?;
            if rotated == [name(AGED)] { Ok(()) } else { Err(missing(AGED)) }
        },
    },
];

/// The first append after the store was opened, which calls the KMS under the lock of the writer,
/// and one that calls the KMS as the leader.
const APPENDS: [(fn() -> Scene, Operation); 2] = [
    (
        Scene::idle,
        Operation {
            what: "first append",
            logstore: HUNG,
            run: |scene| try_put(&scene.logstore(HUNG), "third"),
        },
    ),
    (
        Scene::new,
        Operation {
            what: "leader",
            logstore: HUNG,
            run: |scene| {
                let ticket = scene.logstore(HUNG).submit(record("fourth"), &synced())?;
                scene.make_leases_due();
                ticket.wait().map(drop)
            },
        },
    ),
];

/// Runs an operation, and the action that `aside` returns in the middle of each KMS call that the
/// operation makes. `check` gets the result.
fn during_each_call(
    operation: &Operation,
    scene: fn() -> Scene,
    aside: impl Fn(&Scene) -> Box<dyn FnOnce() + Send>,
    check: impl Fn(Scene, Result<()>, &str),
) {
    for call in 0.. {
        let (scene, at) = (scene(), format!("{}, call {call}", operation.what));
        let during = scene.during_call(call, aside(&scene));
        let done = (operation.run)(&scene);
        if scene.world.kms.has_not_called() {
            assert!(call > 0, "{at}: no call");
            done.unwrap_or_else(|error| panic!("{at}: {error}"));
            return;
        }
        assert!(during.has_ended(), "{at}: the operation beside it waits for the KMS");
        check(scene, done, &at);
    }
}

/// Operations that need no KMS, or another KMS.
fn beside(store: &Store, other: &[Cmk; 2], checkpoint: bool) {
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
    let keyless = VerifyOptions::default().keyless(true);
    assert!(admin.verify(&keyless, &mut |_| {}).unwrap().is_clean());
    keys.audit_records().unwrap();
    assert!(keys.verify_audit(None).unwrap().fault.is_none());
    keys.export_audit().unwrap();
    admin.anchor_status();
    if checkpoint {
        admin.checkpoint().unwrap();
    }
    // Operations on other Logstores.
    let spec = |conf| LogstoreSpec::default().encrypt_conf(conf);
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
    let report = keys
        .rewrap_all(&RewrapOptions::default().cmk_key_id(other[1].cmk_key_id.clone()), &mut |_| {});
    assert!(report.unwrap().failed.is_empty());
    admin.repair(&name(OTHER), 0, &Default::default()).unwrap();
    for text in ["p/a", "p/b", "p/c"] {
        assert!(store.delete_logstore(&name(text)).unwrap().left.is_empty());
    }
    // The service key and its keyring.
    let rotated = keys.rotate_service_key_with(&mut |_| {}).unwrap();
    assert!(rotated.left_open.is_empty() && !keys.is_service_rotation_unfinished());
    keys.rewrap_keyring(Some(other[0].clone())).unwrap();
    keys.rewrap_keyring(None).unwrap();
    keys.rotate_service_key().unwrap();
}

#[test]
fn no_other_operation_waits_for_a_hung_kms() {
    for operation in &OPERATIONS {
        for (fresh, begin) in [(true, Scene::new as fn() -> Scene), (false, Scene::stale)] {
            during_each_call(
                operation,
                begin,
                |scene| {
                    let (store, other) = (scene.store.clone(), scene.other.clone());
                    // A checkpoint marks the shards of all Logstores, under their leases.
                    let checkpoint = fresh && operation.what != "rotation by policy";
                    Box::new(move || beside(&store, &other, checkpoint))
                },
                |scene, done, at| {
                    done.unwrap_or_else(|error| panic!("{at}: {error}"));
                    scene.check(at);
                },
            );
        }
    }
}

#[test]
fn no_other_operation_waits_for_an_append() {
    for (scene, append) in &APPENDS {
        during_each_call(
            append,
            *scene,
            |scene| {
                let (store, other) = (scene.store.clone(), scene.other.clone());
                Box::new(move || {
                    beside(&store, &other, false);
                    let logstore = store.logstore(&name(HUNG)).unwrap();
                    assert_eq!(versions(&logstore), 2);
                })
            },
            |scene, done, at| {
                done.unwrap_or_else(|error| panic!("{at}: {error}"));
                scene.check(at);
            },
        );
    }
}

/// Retention and rotation by policy leave out a Logstore that another operation holds.
#[test]
fn retention_and_policies_do_not_wait_for_a_hung_kms() {
    for operation in OPERATIONS.iter().filter(|operation| operation.logstore != "p/new") {
        during_each_call(
            operation,
            Scene::new,
            |scene| {
                change(&scene.store, SERVICE, |config| config.retention_bytes = Some(1)).unwrap();
                scene.logstore(SERVICE).roll().unwrap();
                let store = scene.store.clone();
                Box::new(move || {
                    let report = store.admin().apply_retention().unwrap();
                    assert!(report.segments > 0 || report.data_keys_postponed > 0, "{report:?}");
                    let service = store.logstore(&name(SERVICE)).unwrap();
                    assert_eq!(service.status().unwrap().segments, 1, "the newest");
                    store.keys().rotate_due_data_keys().unwrap();
                })
            },
            // The other run may have done the work of this one.
            |scene, done, at| {
                assert!(matches!(done, Ok(()) | Err(Error::LogstoreMissing(_))), "{at}: {done:?}");
                scene.check(at);
            },
        );
    }
}

/// An operation is admitted under the master key of the keyring when it begins. It asks that KMS
/// again under no lock of the store: debug builds check each call.
#[test]
fn the_answer_about_the_keyring_grows_old_during_an_operation() {
    for operation in &OPERATIONS {
        let aside = |scene: &Scene| -> Box<dyn FnOnce() + Send> {
            let (clock, options) = (Arc::clone(&scene.world.clock), &scene.world.options);
            let too_old = options.revalidate_every + options.kms_timeout;
            Box::new(move || clock.advance(too_old))
        };
        during_each_call(operation, Scene::leased, aside, |scene, done, at| {
            // The call under way has had no answer within its time limit.
            if let Err(error) = done {
                let late =
                    matches!(error, Error::KmsUnreachable { .. } | Error::LogstoreMissing(_));
                assert!(late, "{at}: {error:?}");
            }
            scene.check(at);
        });
    }
}

/// The loss of the keyring's master key in the middle of a change of the keyring prevents the
/// change, and the keyring comes back as its file has it.
#[test]
fn a_change_of_the_keyring_is_beside_a_loss_of_its_key() {
    type Change = fn(&Scene) -> Result<()>;
    let changes: [(&str, Change); 3] = [
        ("re-wrap", |scene| scene.store.keys().rewrap_keyring(Some(scene.other[1].clone()))),
        ("no master key", |scene| scene.store.keys().rewrap_keyring(None)),
        ("rotation", |scene| scene.store.keys().rotate_service_key().map(drop)),
    ];
    for (what, change) in changes {
        let mut prevented = 0;
        for call in 0.. {
            let scene = Scene::leased();
            let at = format!("{what}, call {call}");
            let cmks = [scene.store.keys().service_cmk().unwrap(), scene.other[1].clone()];
            let (store, kms, clock) =
                (scene.store.clone(), Arc::clone(&scene.world.kms), Arc::clone(&scene.world.clock));
            let every = scene.world.options.revalidate_every;
            let during = scene.world.kms.during_call(&cmks.each_ref(), call, move || {
                kms.answer_for_service_key(Answer::Revoked(RevokedReason::Disabled));
                clock.advance(every);
                store.tick();
                kms.answer(Answer::Real);
            });
            let done = change(&scene);
            if scene.world.kms.has_not_called() {
                done.unwrap_or_else(|error| panic!("{at}: {error}"));
                break;
            }
            assert!(during.has_ended(), "{at}: the store waits for the change");
            if let Err(error) = done {
                assert!(matches!(error, Error::ServiceKey { .. }), "{at}: {error:?}");
                prevented += 1;
            }
            scene.world.clock.advance(every);
            scene.store.tick();
            change(&scene).unwrap_or_else(|error| panic!("{at}, again: {error}"));
            scene.check(&at);
        }
        assert!(prevented > 0 || what == "no master key", "{what}");
    }
}

/// A run of retention asks the KMSs last.
#[test]
fn retention_of_a_logstore_that_needs_no_kms_comes_first() {
    let scene = Scene::idle();
    change(&scene.store, SERVICE, |config| config.retention_bytes = Some(1)).unwrap();
    let [aged, service] = [AGED, SERVICE].map(|text| scene.logstore(text));
    let during = scene.during_call(0, move || {
        // The data key of the first has not proved its settings yet.
        assert_eq!([aged, service].map(|logstore| logstore.status().unwrap().segments), [2, 1]);
    });
    let report = scene.store.admin().apply_retention().unwrap();
    assert!(during.has_ended());
    assert_eq!((report.segments, report.data_keys), (2, 2));
    scene.check("retention");
}

#[test]
fn a_name_that_is_being_created_twice_belongs_to_the_first() {
    for fails in [false, true] {
        let scene = Scene::new();
        let (store, conf) = (scene.store.clone(), byok(&scene.hung[0]));
        let spec = LogstoreSpec::default().encrypt_conf(conf);
        let second: Arc<Mutex<Option<thread::JoinHandle<Result<Logstore>>>>> = Arc::default();
        let (handle, kms, again) =
            (Arc::clone(&second), Arc::clone(&scene.world.kms), spec.clone());
        let during = scene.during_call(0, move || {
            store.create_logstore(&name("p/else"), LogstoreSpec::default()).unwrap();
            let other = thread::spawn(move || store.create_logstore(&name("p/new"), again));
            *handle.lock().unwrap() = Some(other);
            if fails {
                kms.fail_once();
            }
        });
        let first = scene.store.create_logstore(&name("p/new"), spec);
        assert!(during.has_ended());
        let second = second.lock().unwrap().take().unwrap().join().unwrap();
        // The second caller waits, and finds the name taken or free.
        let (made, refused) = if fails { (second, first) } else { (first, second) };
        put(&made.unwrap(), "new");
        match refused.unwrap_err() {
            Error::LogstoreExists(_) => assert!(!fails),
            Error::KmsUnreachable { .. } => assert!(fails),
            other => panic!("{other:?}"),
        }
        scene.check("creation");
    }
}

/// An operation that continues after its Logstore was deleted changes nothing.
#[test]
fn a_logstore_is_deleted_while_an_operation_waits_for_its_kms() {
    for operation in OPERATIONS.iter().filter(|operation| operation.logstore != "p/new") {
        for begin in [Scene::new as fn() -> Scene, Scene::stale] {
            during_each_call(
                operation,
                begin,
                |scene| {
                    let (store, text) = (scene.store.clone(), operation.logstore);
                    Box::new(move || {
                        assert!(store.delete_logstore(&name(text)).unwrap().left.is_empty());
                    })
                },
                |scene, done, at| {
                    let is_missing = matches!(&done, Err(Error::LogstoreMissing(_)));
                    let of_many = operation.what == "re-wrap of all" && done.is_ok();
                    assert!(is_missing || of_many, "{at}: {done:?}");
                    let text = name(operation.logstore);
                    assert!(!scene.store.list().unwrap().contains(&text), "{at}");
                    // The name can be given again.
                    let spec = LogstoreSpec::default();
                    put(&scene.store.create_logstore(&text, spec).unwrap(), "new");
                    scene.check(at);
                },
            );
        }
    }
}

#[test]
fn a_logstore_is_deleted_while_an_append_waits_for_its_kms() {
    for (scene, append) in &APPENDS {
        let logstore = Mutex::new(None);
        during_each_call(
            append,
            *scene,
            |scene| {
                *logstore.lock().unwrap() = Some(scene.logstore(HUNG));
                let store = scene.store.clone();
                Box::new(move || {
                    store.delete_logstore(&name(HUNG)).unwrap();
                    assert!(!store.list().unwrap().contains(&name(HUNG)));
                })
            },
            |scene, done, at| {
                let error = done.unwrap_err();
                let cause = match &error {
                    Error::Latched { cause, .. } => cause,
                    error => error,
                };
                assert!(matches!(cause, Error::Closed(_) | Error::Io { .. }), "{at}: {error:?}");
                let logstore = logstore.lock().unwrap().take().unwrap();
                assert!(matches!(try_put(&logstore, "later"), Err(Error::Closed(_))), "{at}");
                // The files that were in use are removed.
                scene.store.tick();
                scene.store.admin().apply_retention().unwrap();
                assert!(!scene.world.logstore_dir(&logstore).exists(), "{at}");
                drop(logstore);
                scene.check(at);
            },
        );
    }
}

/// An operation that continues after the store was closed changes nothing, although another writer
/// may have opened the store.
#[test]
fn a_store_is_closed_while_an_operation_waits_for_a_kms() {
    for operation in &OPERATIONS {
        during_each_call(
            operation,
            Scene::new,
            |scene| {
                let (store, builder) = (scene.store.clone(), scene.world.builder());
                Box::new(move || {
                    store.close().unwrap();
                    let next = builder.open().unwrap();
                    next.keys().rotate_service_key().unwrap();
                    next.keys().rotate_data_key(&name(HUNG)).unwrap();
                    put(&next.logstore(&name(HUNG)).unwrap(), "next");
                    next.close().unwrap();
                })
            },
            |scene, done, at| {
                let is_closed = matches!(&done, Err(Error::Closed(_)));
                let of_many = matches!(&done, Err(Error::LogstoreMissing(_)));
                assert!(is_closed || (of_many && operation.logstore == AGED), "{at}: {done:?}");
                let store = scene.world.open();
                let (hung, plain) = (name(HUNG), name(PLAIN));
                assert_eq!(store.list().unwrap().len(), ALL.len(), "{at}");
                assert_eq!(versions(&store.logstore(&hung).unwrap()), 3, "{at}");
                let status = store.logstore(&hung).unwrap().status().unwrap();
                assert!(status.data_keys.iter().all(|key| !key.shredded), "{at}");
                assert_eq!(status.cmk.as_ref(), Some(&scene.hung[0]), "{at}");
                assert_eq!(versions(&store.logstore(&plain).unwrap()), 0, "{at}");
                Scene { store, ..scene }.check(at);
            },
        );
    }
}

/// The run wraps the keys of the other Logstores before it waits for an operation.
#[test]
fn rewrapping_all_comes_back_to_a_logstore_that_is_busy() {
    let scene = Scene::new();
    let (store, visited) = (scene.store.clone(), Arc::<Mutex<Vec<_>>>::default());
    let run: Arc<Mutex<Option<thread::JoinHandle<_>>>> = Arc::default();
    let (handle, seen) = (Arc::clone(&run), Arc::clone(&visited));
    let during = scene.during_call(0, move || {
        let notes = Arc::clone(&seen);
        let rewrap = move || {
            let mut note = |at: &envelog::admin::RewrapProgress| {
                notes.lock().unwrap().extend(at.logstore.clone());
            };
            store.keys().rewrap_all(&RewrapOptions::default(), &mut note)
        };
        *handle.lock().unwrap() = Some(thread::spawn(rewrap));
        eventually("the run comes back", || seen.lock().unwrap().len() > ALL.len());
    });
    scene.store.keys().rotate_data_key(&name(HUNG)).unwrap();
    assert!(during.has_ended());
    let report = run.lock().unwrap().take().unwrap().join().unwrap().unwrap();
    assert!(report.failed.is_empty(), "{report:?}");
    let done: Vec<_> =
        report.rewrapped.iter().map(|(name, _)| name).chain(&report.current).collect();
    assert_eq!((done.len(), visited.lock().unwrap().last()), (4, Some(&name(HUNG))));
    scene.check("re-wrap of all");
}

/// A KMS that does not answer delays the other Logstores by one call, however many Logstores are
/// under its master key.
#[test]
fn rotation_by_policy_asks_a_kms_that_does_not_answer_once() {
    let scene = Scene::new();
    for text in [HUNG, OTHER, SERVICE] {
        change(&scene.store, text, |config| config.rotate_data_key = policy(Some(1), None))
            .unwrap();
    }
    scene.world.clock.advance(DAY);
    // The leases are renewed, and then the KMS of one master key fails.
    for text in [HUNG, AGED, OTHER] {
        put(&scene.logstore(text), "fourth");
    }
    let hung = &scene.hung[0].cmk_key_id;
    let rotate = || scene.store.keys().rotate_due_data_keys().unwrap();
    scene.world.kms.answer_for_master_key(hung, Answer::Unreachable);
    let calls = scene.world.kms.calls_about(hung);
    assert_eq!(rotate(), [name(OTHER), name(SERVICE)]);
    assert_eq!(scene.world.kms.calls_about(hung), calls + 1);
    // The Logstore that the KMS was not asked for is the next run's.
    scene.world.kms.answer(Answer::Real);
    assert_eq!(rotate(), [name(HUNG)]);
    scene.world.clock.advance(secs(600));
    assert_eq!(rotate(), [name(AGED)]);
    scene.check("rotation by policy");
}

/// A clock that runs an action at one reading of the wall clock.
struct Tripwire {
    clock: Arc<TestClock>,
    /// The readings before it, and the action.
    trip: Mutex<Option<(u32, Aside)>>,
}

impl std::fmt::Debug for Tripwire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tripwire")
    }
}

impl Clock for Tripwire {
    fn uptime(&self) -> Duration {
        self.clock.uptime()
    }

    fn wall_us(&self) -> u64 {
        let mut trip = self.trip.lock().unwrap();
        let tripped = match &mut *trip {
            Some((0, _)) => trip.take(),
            Some((after, _)) => {
                *after -= 1;
                None
            }
            None => None,
        };
        drop(trip);
        if let Some((_, aside)) = tripped {
            aside.run();
        }
        self.clock.wall_us()
    }
}

/// A rotation of the service key between the wrapping of a first data key and its commit does not
/// know that key. The key comes into force under the new version all the same.
#[test]
fn a_first_envelope_is_under_the_newest_service_key() {
    let world = World::manual();
    let clock = Arc::new(Tripwire { clock: Arc::clone(&world.clock), trip: Mutex::default() });
    let store = world.builder().clock(Arc::clone(&clock) as _).create().unwrap();
    store.create_logstore(&name(PLAIN), LogstoreSpec::default()).unwrap();
    let service = EncryptConf::service_key(EncryptType::Aes);
    let create = |store: &Store| {
        let spec = LogstoreSpec::default().encrypt_conf(service.clone());
        store.create_logstore(&name("p/new"), spec).map(drop)
    };
    type Operation<'a> = &'a dyn Fn(&Store) -> Result<()>;
    let operations: [Operation<'_>; 2] = [&create, &|store| enable(store, PLAIN, service.clone())];
    for (number, operation) in operations.into_iter().enumerate() {
        let rotating = store.clone();
        let (aside, during) = Aside::new(move || {
            rotating.keys().rotate_service_key().unwrap();
        });
        // The operation reads the clock when it begins, and when it has wrapped the key.
        *clock.trip.lock().unwrap() = Some((1, aside));
        operation(&store).unwrap();
        assert!(during.has_ended());
        let logstore = store.logstore(&name(["p/new", PLAIN][number])).unwrap();
        let newest = number as u64 + 2;
        let found = envelopes(&world, &logstore);
        assert!(matches!(found[..], [(1, Some(under), Some(_))] if under == newest), "{found:?}");
        let usage = store.keys().usage().unwrap();
        assert_eq!(usage.service_keys.last().unwrap().version as u64, newest);
        assert_clean(&store, "after the rotation");
        put(&logstore, "one");
    }
    store.close().unwrap();
    let store = world.open();
    assert_clean(&store, "opened again");
    assert_eq!(texts(&store.logstore(&name(PLAIN)).unwrap()), ["one"]);
}

/// Two threads of a read-only opener read the metadata, and the one that read an older state comes
/// second: an operation that follows the writer, or a caller that gets a handle.
#[test]
fn a_reader_reads_metadata_again_if_another_thread_has_newer() {
    for follows in [true, false] {
        let sim = Sim::new();
        let store = sim.create();
        let logstore = sim.world.service(&store, "p/l");
        put(&logstore, "one");
        let reader = sim.builder().open_read_only().unwrap();
        let read = reader.logstore(&name("p/l")).unwrap();
        assert_eq!(texts(&read), ["one"]);
        store.keys().rotate_data_key(&name("p/l")).unwrap();
        sim.world.clock.advance(sim.world.options.revalidate_every);
        let (disk, writer, other) = (sim.disk.clone(), store.clone(), reader.clone());
        let (aside, during) = Aside::new(move || {
            writer.keys().rotate_data_key(&name("p/l")).unwrap();
            assert_eq!(texts(&other.logstore(&name("p/l")).unwrap()), ["one"]);
        });
        let mut aside = Some(aside);
        sim.disk.on_call(move |call| {
            if call.op == Op::Read
                && call.is_about("meta-0000000002")
                && let Some(aside) = aside.take()
            {
                disk.heal();
                aside.run();
            }
            Verdict::Go
        });
        let found = match follows {
            true => texts(&read),
            false => texts(&reader.logstore(&name("p/l")).unwrap()),
        };
        assert!(during.has_ended());
        assert_eq!(found, ["one"]);
        put(&logstore, "two");
        assert_eq!(texts(&read), ["one", "two"]);
    }
}

/// A store with one worker, which writes what no caller waits for.
fn one_worker() -> (World, Store, [Logstore; 2], Cmk) {
    let mut world = World::threads();
    world.options.workers = 1;
    world.options.kms_timeout = secs(60);
    world.options.retention_every = secs(1);
    let store = world.create();
    let cmk = world.cmk();
    let logstores = [world.byok(&store, HUNG, &cmk), world.service(&store, SERVICE)];
    (world, store, logstores, cmk)
}

/// A worker still writes the records of another Logstore.
#[track_caller]
fn assert_worker_is_free(logstore: &Logstore, text: &str) {
    let mut reader = logstore.read(0, &ReadOptions::default().from(Position::End)).unwrap();
    logstore.append(record(text), &buffered()).unwrap();
    eventually("a worker writes the record", || reader.try_next().unwrap().is_some());
}

#[test]
fn a_rotation_by_policy_that_hangs_holds_no_worker() {
    let (world, store, [hung, service], cmk) = one_worker();
    for n in 0..20 {
        put(&hung, &noise(n, 64 << 10));
        put(&service, &noise(n, 64 << 10));
    }
    let calls = world.kms.calls_about(&cmk.cmk_key_id);
    world.kms.answer_for_master_key(&cmk.cmk_key_id, Answer::Hang);
    change(&store, HUNG, |config| config.rotate_data_key = policy(None, Some(1 << 20))).unwrap();
    eventually("the policy asks the KMS", || world.kms.calls_about(&cmk.cmk_key_id) > calls);
    assert_worker_is_free(&service, "beside");
    // Retention runs meanwhile.
    let dropped = || !texts(&service).iter().any(|text| text.len() > 1000);
    change(&store, SERVICE, |config| config.retention_bytes = Some(1)).unwrap();
    service.roll().unwrap();
    put(&service, "newest");
    eventually("retention drops the segment", dropped);
    world.kms.answer(Answer::Real);
    let intended =
        |record: &envelog::audit::AuditRecord| record.event == AuditEvent::RotateIntended;
    assert!(store.keys().audit_records().unwrap().iter().any(intended));
    store.close().unwrap();
}

/// A debug build checks each KMS call.
#[test]
fn no_job_of_a_worker_calls_a_kms() {
    end_if_a_worker_panics();
    let mut world = World::threads();
    world.options.workers = 1;
    world.options.revalidate_every = millis(100);
    world.options.retention_every = secs(1);
    world.options.segment_age = secs(1);
    world.options.segment_bytes = 64 << 10;
    world.options.linger = millis(10);
    let store = world.builder().service_cmk(world.cmk()).create().unwrap();
    let cmk = world.cmk();
    let logstores = [world.byok(&store, HUNG, &cmk), world.service(&store, SERVICE)];
    for text in [HUNG, SERVICE] {
        change(&store, text, |config| {
            config.rotate_data_key = policy(None, Some(1 << 20));
            config.retention_bytes = Some(512 << 10);
        })
        .unwrap();
    }
    let in_background = |round: u64| {
        for (n, logstore) in (0..).zip(&logstores) {
            let text = noise(round * 2 + n, 60 << 10);
            // The key may be lost.
            let _ = logstore.append(record(&text), &buffered());
        }
    };
    let events = || {
        let records = store.keys().audit_records().unwrap();
        records.into_iter().map(|record| record.event).collect::<Vec<_>>()
    };
    let jobs =
        [AuditEvent::Rotated, AuditEvent::Shredded, AuditEvent::Revoked, AuditEvent::Recovered];
    let mut round = 0;
    eventually("each job has run", || {
        round += 1;
        in_background(round);
        match round % 20 {
            5 => drop(store.keys().rotate_data_key(&name(HUNG))),
            10 => world
                .kms
                .answer_for_master_key(&cmk.cmk_key_id, Answer::Revoked(RevokedReason::Disabled)),
            15 => world.kms.answer(Answer::Real),
            _ => {}
        }
        round > 300 && jobs.iter().all(|job| events().contains(job))
    });
    world.kms.answer(Answer::Real);
    eventually("the key is back", || try_put(&logstores[0], "back").is_ok());
    for logstore in &logstores {
        assert_worker_is_free(logstore, "written");
    }
    // A group that waited when the key was refused may be lost with it.
    let closed = store.close();
    assert!(matches!(closed, Ok(()) | Err(Error::GroupsLost { .. })), "{closed:?}");
}

/// The lease has ended, so a mark block and a roll by age wait for the KMS.
#[test]
fn marks_and_rolls_that_hang_hold_no_worker() {
    let (mut world, store, _, cmk) = one_worker();
    store.close().unwrap();
    world.options.revalidate_every = millis(100);
    world.options.outage_grace = millis(100);
    world.options.segment_age = secs(1);
    let store = world.open();
    let [hung, service] = [HUNG, SERVICE].map(|text| store.logstore(&name(text)).unwrap());
    put(&hung, "one");
    put(&service, "one");
    world.kms.answer_for_master_key(&cmk.cmk_key_id, Answer::Hang);
    // Both are due after one second.
    for n in 0..25 {
        assert_worker_is_free(&service, &format!("beside {n}"));
        thread::sleep(millis(100));
    }
    world.kms.answer(Answer::Real);
    store.close().unwrap();
}
