//! Explores thread schedules of the gate with shuttle: the lease, the wipe, appends, reads, and key
//! operations.
//!
//! - After a revocation has returned, every later operation is refused.
//! - Every operation has one of the typed outcomes, and acknowledged data is present at the end.
//! - No thread waits forever: shuttle detects deadlocks.
//!
//! The compiler ensures that no key is read after its wipe: a wipe takes the keys out of the lock
//! under which they are borrowed (`keys::gate`), and drops them.
//!
//! `ENVELOG_SHUTTLE` sets the number of schedules per test.

#![allow(clippy::unwrap_used)]

extern crate envelog_shuttle as envelog;

#[path = "../../common/mod.rs"]
mod common;

use std::{
    collections::BTreeSet,
    env,
    sync::{Arc, Mutex},
};

use common::{
    TestClock,
    memory::MemoryDisk,
    name, record, secs,
    sim::{Ledger, SeededKms, SeededRandom, cmk},
};
use envelog::{
    AppendOptions, Background, Durability, EncryptConf, EncryptType, Error, Logstore, LogstoreSpec,
    ReadOptions, Result, Store, StoreOptions, admin::ReplaceCmk, crypto::Sm4Simd,
    error::ConfigError,
};
use shuttle::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

fn schedules(usual: usize) -> usize {
    env::var("ENVELOG_SHUTTLE").map_or(usual, |count| count.parse().expect("a number"))
}

struct World {
    store: Store,
    logstore: Logstore,
    kms: Arc<SeededKms>,
    clock: Arc<TestClock>,
    /// The acknowledged texts.
    done: Mutex<BTreeSet<String>>,
}

impl World {
    fn new() -> Arc<Self> {
        let kms = SeededKms::new(1, &Arc::new(Ledger::default()));
        let clock = TestClock::new();
        let mut options = StoreOptions::default();
        options.background = Background::Manual;
        options.block_bytes = 4 << 10;
        let store = Store::builder("/store", "/keyring", Sm4Simd::new())
            .kms(Arc::clone(&kms) as _)
            .disk(Arc::new(MemoryDisk::default()))
            .clock(Arc::clone(&clock) as _)
            .insecure_random_for_tests(SeededRandom::new(1, 2))
            .options(options)
            .create()
            .unwrap();
        let spec =
            LogstoreSpec::default().encrypt_conf(EncryptConf::byok(EncryptType::Aes, cmk(0)));
        let logstore = store.create_logstore(&name("p/l"), spec).unwrap();
        Arc::new(Self { store, logstore, kms, clock, done: Mutex::default() })
    }

    fn append(&self, text: &str, durability: Durability) -> Result<()> {
        self.logstore.append(record(text), &AppendOptions::default().durability(durability))?;
        self.done.lock().unwrap().insert(text.to_owned());
        Ok(())
    }

    fn read(&self) -> Result<BTreeSet<String>> {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        self.logstore
            .read(0, &ReadOptions::default())?
            .map(|record| record.map(|r| text(&r.bytes)))
            .collect()
    }

    /// Ends all faults, and checks that all acknowledged data is present and stays present.
    fn check(&self) {
        self.kms.enable_all();
        self.logstore.revalidate_now().unwrap();
        self.logstore.sync().unwrap();
        let missing: Vec<_> =
            self.done.lock().unwrap().difference(&self.read().unwrap()).cloned().collect();
        assert!(missing.is_empty(), "acknowledged, and lost: {missing:?}");
    }
}

/// Fails unless the operation succeeded or the key was refused, also for a new envelope.
fn revoked_or<T>(result: Result<T>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(Error::Revoked { .. } | Error::Config(ConfigError::CmkRefused { .. })) => None,
        Err(other) => panic!("{other:?}"),
    }
}

#[test]
fn a_completed_revocation_refuses_every_later_operation() {
    let scenario = || {
        let world = World::new();
        let revoked = Arc::new(AtomicBool::new(false));
        let spawn = |act: fn(&World, usize) -> Result<()>| {
            let (world, revoked) = (Arc::clone(&world), Arc::clone(&revoked));
            thread::spawn(move || {
                for turn in 0..3 {
                    let after = revoked.load(Ordering::SeqCst);
                    let went_through = revoked_or(act(&world, turn)).is_some();
                    assert!(
                        !(after && went_through),
                        "it began after the revocation, and went through"
                    );
                }
            })
        };
        let threads = [
            spawn(|world, turn| world.append(&format!("a{turn}"), Durability::Written)),
            spawn(|world, turn| world.append(&format!("b{turn}"), Durability::Synced)),
            spawn(|world, _| world.read().map(drop)),
        ];
        world.kms.disable(&cmk(0));
        assert!(world.logstore.revalidate_now().is_err());
        revoked.store(true, Ordering::SeqCst);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        world.check();
    };
    shuttle::check_random(scenario, schedules(400));
    shuttle::check_pct(scenario, schedules(400), 3);
}

/// An open reader with read-ahead records, concurrent with a revocation and a recovery: it returns
/// the error, or all records.
#[test]
fn a_reader_misses_nothing_or_ends() {
    let scenario = || {
        let world = World::new();
        let texts: Vec<_> = (0..4).map(|n| n.to_string()).collect();
        texts.iter().for_each(|text| world.append(text, Durability::Buffered).unwrap());
        world.logstore.sync().unwrap();
        let mut reader = world.logstore.read(0, &ReadOptions::default()).unwrap();
        let reading = thread::spawn(move || {
            let mut read = Vec::new();
            loop {
                match reader.next() {
                    Some(Ok(record)) => {
                        read.push(String::from_utf8(record.bytes.to_vec()).unwrap())
                    }
                    Some(Err(Error::Revoked { .. })) => return None,
                    Some(Err(other)) => panic!("{other:?}"),
                    None => return Some(read),
                }
            }
        });
        world.kms.disable(&cmk(0));
        let _ = world.logstore.revalidate_now();
        world.kms.enable_all();
        world.logstore.revalidate_now().unwrap();
        if let Some(read) = reading.join().unwrap() {
            assert_eq!(read, texts);
        }
        world.check();
    };
    shuttle::check_random(scenario, schedules(400));
    shuttle::check_pct(scenario, schedules(400), 3);
}

/// The deadline of a revocation passes at any moment of its handling and of concurrent appends.
/// Groups that were acknowledged as written are there, and the missing ones are counted.
#[test]
fn the_deadline_passes_at_any_moment() {
    let scenario = || {
        let world = World::new();
        world.append("first", Durability::Synced).unwrap();
        let spawn = |act: fn(&World)| {
            let world = Arc::clone(&world);
            thread::spawn(move || act(&world))
        };
        let threads = [
            spawn(|world| {
                let _ = revoked_or(world.append("written", Durability::Written));
            }),
            spawn(|world| {
                let _ = revoked_or(world.append("synced", Durability::Synced));
            }),
            spawn(|world| {
                for turn in 0..2 {
                    let _ = revoked_or(world.append(&format!("b{turn}"), Durability::Buffered));
                }
            }),
            spawn(|world| world.clock.advance(secs(1))),
        ];
        world.kms.disable(&cmk(0));
        assert!(world.logstore.revalidate_now().is_err());
        world.kms.enable_all();
        world.logstore.revalidate_now().unwrap();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        match world.logstore.sync() {
            Ok(()) | Err(Error::GroupsLost { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
        world.logstore.sync().unwrap();
        let read = world.read().unwrap();
        let done = world.done.lock().unwrap();
        let missing: Vec<_> = done.difference(&read).collect();
        assert!(missing.iter().all(|text| text.starts_with('b')), "{missing:?}");
        assert_eq!(missing.len() as u64, world.store.metrics().groups_lost);
    };
    shuttle::check_random(scenario, schedules(400));
    shuttle::check_pct(scenario, schedules(400), 3);
}

/// A rotation of the service key, concurrent with the first enable of encryption in a Logstore that
/// used the service key: the acknowledged configuration stays.
#[test]
fn a_service_key_rotation_undoes_no_configuration_change() {
    let scenario = || {
        let world = World::new();
        let plain = world.store.create_logstore(&name("p/plain"), LogstoreSpec::default()).unwrap();
        let rotating = {
            let world = Arc::clone(&world);
            thread::spawn(move || world.store.keys().rotate_service_key().unwrap())
        };
        let mut config = world.store.logstore(&name("p/plain")).unwrap().config();
        config.encrypt_conf = Some(EncryptConf::service_key(EncryptType::Aes));
        let updated = world.store.update_logstore(&name("p/plain"), config).unwrap();
        rotating.join().unwrap();
        assert_eq!(world.store.logstore(&name("p/plain")).unwrap().config(), updated);
        plain.append(record("sealed"), &AppendOptions::default()).unwrap();
        assert!(plain.status().unwrap().encrypting);
    };
    shuttle::check_random(scenario, schedules(400));
    shuttle::check_pct(scenario, schedules(400), 3);
}

/// Renewal, rotation, replacement, shredding and appends run concurrently, while the key is revoked
/// and enabled.
#[test]
fn nothing_waits_for_ever_when_keys_change() {
    let scenario = || {
        let world = World::new();
        let mut threads = Vec::new();
        let mut spawn = |act: fn(&World)| {
            let world = Arc::clone(&world);
            threads.push(thread::spawn(move || act(&world)));
        };
        spawn(|world| {
            for turn in 0..2 {
                let _ = revoked_or(world.append(&turn.to_string(), Durability::Written));
            }
        });
        spawn(|world| {
            let name = name("p/l");
            let Some(version) = revoked_or(world.store.keys().rotate_data_key(&name)) else {
                return;
            };
            // Rotate twice, so that at most a concurrent append uses this version.
            if revoked_or(world.store.keys().rotate_data_key(&name)).is_some() {
                assert!(version > 1);
            }
        });
        spawn(|world| {
            let _ = revoked_or(world.store.keys().replace_cmk(
                &name("p/l"),
                cmk(1),
                ReplaceCmk::default(),
            ));
        });
        spawn(|world| {
            world.clock.advance(secs(31));
            world.store.tick();
            let _ = revoked_or(world.read());
        });
        world.kms.disable(&cmk(0));
        let _ = world.logstore.revalidate_now();
        world.kms.enable_all();
        let _ = world.logstore.revalidate_now();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        world.check();
    };
    shuttle::check_random(scenario, schedules(400));
    shuttle::check_pct(scenario, schedules(400), 3);
}

/// The store is closed during all of this, including the destruction of keys.
#[test]
fn nothing_waits_for_ever_when_the_store_is_closed() {
    let scenario = || {
        let world = World::new();
        let mut threads = Vec::new();
        let mut spawn = |act: fn(&World) -> Result<()>| {
            let world = Arc::clone(&world);
            threads.push(thread::spawn(move || match act(&world) {
                Ok(())
                | Err(
                    Error::Revoked { .. }
                    | Error::Closed(_)
                    | Error::Config(_)
                    | Error::Shredded { .. },
                ) => {}
                Err(other) => panic!("{other:?}"),
            }));
        };
        spawn(|world| world.append("a", Durability::Synced));
        spawn(|world| world.append("b", Durability::Buffered));
        spawn(|world| world.read().map(drop));
        spawn(|world| {
            world.store.keys().rotate_data_key(&name("p/l"))?;
            world.store.keys().shred_data_keys(&name("p/l"), &[1])
        });
        spawn(|world| {
            world.kms.disable(&cmk(0));
            world.logstore.revalidate_now()
        });
        match world.store.clone().close() {
            Ok(()) | Err(Error::Revoked { .. } | Error::GroupsLost { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    };
    shuttle::check_random(scenario, schedules(400));
    shuttle::check_pct(scenario, schedules(400), 3);
}
