//! Two writers of one store: `LOCK` was removed, or the file system does not share locks. Neither
//! loses acknowledged data.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use common::{
    disk::{Sim, Survives, Verdict},
    *,
};
use envelog::{Error, ErrorKind, Logstore, LogstoreSpec, Result, Store, admin::VerifyOptions};

const NAMES: [&str; 2] = ["p/l", "p/m"];

fn find(store: &Store, text: &str) -> Logstore {
    store.logstore(&name(text)).unwrap()
}

/// The acknowledged records, by Logstore.
type Acked = BTreeMap<&'static str, Vec<String>>;

/// Appends with a sync, and adds the record to `acked` if it was acknowledged.
fn put_acked(store: &Store, text: &'static str, what: &str, acked: &mut Acked) -> Result<()> {
    let content = format!("{what} {}", noise(what.len() as u64, 1500));
    try_put(&store.logstore(&name(text))?, &content)?;
    acked.entry(text).or_default().push(content);
    Ok(())
}

#[track_caller]
fn assert_all_there(store: &Store, acked: &Acked, context: &str) {
    for (text, expected) in acked {
        let found = texts(&find(store, text));
        for one in expected {
            let times = found.iter().filter(|found| *found == one).count();
            let head: String = one.chars().take(20).collect();
            assert_eq!(times, 1, "{context}: {text} has {head:?} {times} times");
        }
    }
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean(), "{context}: {:?}", report.faults);
}

fn merge(into: &mut Acked, from: Acked) {
    for (text, mut more) in from {
        into.entry(text).or_default().append(&mut more);
    }
}

/// Another writer takes over the store of the first one: before each of its disk operations in
/// turn.
fn taken_over_anywhere(what: &str, operation: impl Fn(&Store, &mut Acked) -> Result<()>) {
    let mut sim = Sim::new();
    sim.world.options.segment_bytes = 4096;
    let store = sim.create();
    for text in NAMES {
        sim.world.service(&store, text);
    }
    let mut before = Acked::new();
    for number in 0..4 {
        NAMES.iter().for_each(|text| {
            put_acked(&store, text, &format!("before {number}"), &mut before).unwrap()
        });
    }
    store.close().unwrap();
    let (image, mut world) = (sim.disk, sim.world);
    for nth in 1.. {
        let sim = Sim::of(world, image.fork());
        let context = format!("{what}, taken over before operation {nth}");
        let mut acked = before.clone();
        let first = sim.open();
        put_acked(&first, NAMES[0], "first", &mut acked).unwrap();

        let second: Arc<Mutex<Option<(Store, Acked)>>> = Arc::default();
        let (lock, disk, builder) =
            (sim.world.store_dir().join("LOCK"), sim.disk.clone(), sim.builder());
        let (at, taken, said) = (sim.disk.operations() + nth, Arc::clone(&second), context.clone());
        sim.disk.on_call(move |call| {
            if call.nth == at {
                disk.heal();
                envelog::io::Disk::remove_file(&disk, &lock).unwrap();
                let take_over = || {
                    let store =
                        builder.clone().open().unwrap_or_else(|error| panic!("{said}: {error}"));
                    let mut acked = Acked::new();
                    for text in NAMES {
                        put_acked(&store, text, "second", &mut acked)
                            .unwrap_or_else(|error| panic!("{said}: {error}"));
                    }
                    (store, acked)
                };
                *taken.lock().unwrap() = Some(elsewhere(take_over));
            }
            Verdict::Go
        });
        let done = operation(&first, &mut acked);
        sim.disk.heal();
        let Some((second, by_second)) = second.lock().unwrap().take() else {
            done.unwrap();
            break;
        };
        merge(&mut acked, by_second);
        if let Err(error) = &done {
            // The second writer removes unfinished files of the first.
            let expected = matches!(error.kind(), ErrorKind::Unavailable | ErrorKind::Io);
            assert!(expected, "{context}: {error:?}");
        }
        // From now on the first writer can do nothing.
        let late = put_acked(&first, NAMES[0], "late", &mut acked).unwrap_err();
        assert!(["fenced", "closed"].contains(&late.code_of_cause()), "{context}: {late:?}");
        assert!(
            first.create_logstore(&name("p/late"), LogstoreSpec::default()).is_err(),
            "{context}"
        );
        let _ = first.close();
        for text in NAMES {
            put_acked(&second, text, "second again", &mut acked)
                .unwrap_or_else(|error| panic!("{context}: {error}"));
        }
        assert_all_there(&second, &acked, &context);
        // With and without a power loss.
        let crashed = sim.disk.crash(Survives::Synced);
        second.close().unwrap();
        assert_all_there(&sim.open(), &acked, &context);
        world = sim.world;
        let store = world.builder().disk(Arc::new(crashed)).open().unwrap();
        assert_all_there(&store, &acked, &format!("{context}, after a crash"));
        assert!(nth < 2000, "{what} never ends");
    }
}

/// The code of an error, or of the cause that stopped a shard.
trait CodeOfCause {
    fn code_of_cause(&self) -> &'static str;
}

impl CodeOfCause for Error {
    fn code_of_cause(&self) -> &'static str {
        match self {
            Error::Latched { cause, .. } => cause.code(),
            other => other.code(),
        }
    }
}

#[test]
fn appends_that_roll() {
    taken_over_anywhere("appends", |store, acked| {
        (0..5).try_for_each(|number| put_acked(store, NAMES[0], &format!("during {number}"), acked))
    });
}

#[test]
fn the_first_append_of_a_shard() {
    taken_over_anywhere("a first append", |store, acked| {
        put_acked(store, NAMES[1], "during", acked)
    });
}

#[test]
fn a_checkpoint_and_a_close() {
    taken_over_anywhere("a checkpoint", |store, acked| {
        put_acked(store, NAMES[1], "during", acked)?;
        store.admin().checkpoint().map(drop)?;
        store.clone().close()
    });
}

#[test]
fn administration() {
    taken_over_anywhere("administration", |store, acked| {
        store.create_logstore(&name("p/new"), LogstoreSpec::default())?;
        let mut config = store.logstore(&name(NAMES[0]))?.config();
        config.ttl_days = Some(9);
        store.update_logstore(&name(NAMES[0]), config)?;
        store.keys().rotate_data_key(&name(NAMES[0]))?;
        put_acked(store, NAMES[0], "during", acked)
    });
}

#[test]
fn retention() {
    taken_over_anywhere("retention", |store, acked| {
        let mut config = store.logstore(&name(NAMES[0]))?.config();
        config.retention_bytes = Some(1);
        // A failed change may be in force. Then each close keeps to the limit.
        let _ = acked.remove(NAMES[0]);
        store.update_logstore(&name(NAMES[0]), config)?;
        store.admin().apply_retention().map(drop)
    });
}

/// A forged epoch far above the catalogue's. If the engine accepted it, no higher epoch would be
/// left.
#[test]
fn an_epoch_that_no_writer_had_does_not_count() {
    let world = World::manual();
    let store = world.create();
    let id = store.id();
    store.close().unwrap();
    for epoch in [u64::MAX, 1 << 48, (1 << 48) - 1, 1 << 40] {
        let mut slot =
            [&b"ENVLEPO\0"[..], &2u16.to_le_bytes(), &[0; 6], &u64::to_le_bytes(epoch)].concat();
        slot.extend_from_slice(&[7; 16]);
        slot.extend_from_slice(id.as_bytes());
        slot.extend_from_slice(&crc32fast::hash(&slot).to_le_bytes());
        slot.resize(1024, 0);
        std::fs::write(world.store_dir().join("EPOCH"), slot).unwrap();
        for _ in 0..2 {
            world.open().close().unwrap();
        }
        let names: Vec<_> = files(&world.store_dir().join("catalogue")).into_keys().collect();
        assert!(
            names.iter().all(|name| name.to_str().unwrap().contains("/00000000")),
            "{epoch}: {names:?}"
        );
    }
}
