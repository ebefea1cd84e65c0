//! A disk without a free page or a free inode: the operations that work on it, and how the store
//! continues once the disk has room.
//! `tests/sweep.rs` fills the disk before every operation of a workload.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use common::{
    disk::{Op, Sim, Survives, Verdict},
    *,
};
use envelog::{
    Error, ErrorKind, Logstore, LogstoreSpec, Store,
    admin::{RepairOptions, VerifyOptions},
    io::Disk as _,
};

/// No limit of pages or inodes.
const MANY: u64 = u64::MAX;
/// Longer than the longest time between two attempts to reopen a shard.
const A_WHILE: u64 = 70;

fn small_segments() -> Sim {
    let mut sim = Sim::new();
    sim.world.options.segment_bytes = 4 << 10;
    sim.world.options.block_bytes = 4 << 10;
    sim
}

fn spec() -> LogstoreSpec {
    LogstoreSpec::default().compression(envelog::Compression::None)
}

/// Advances the clock, and runs the background work.
fn pass(sim: &Sim, store: &Store, seconds: u64) {
    sim.world.clock.advance(secs(seconds));
    store.tick();
}

fn latched(logstore: &Logstore) -> Option<String> {
    logstore.status().unwrap().latched
}

#[track_caller]
fn assert_full<T: std::fmt::Debug>(result: envelog::Result<T>) -> Error {
    let error = result.unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::NoRoom, "disk_full"), "{error}");
    error
}

#[track_caller]
fn assert_sound(store: &Store) {
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn the_reserve_is_there_from_the_beginning() {
    let sim = Sim::new();
    let store = sim.create();
    let reserve = store.admin().reserve_status();
    assert_eq!((reserve.bytes, reserve.inodes), (1 << 20, 4));
    assert!(!reserve.is_short() && !store.metrics().reserve_short);
    store.close().unwrap();
    // A process that reads finds it, and an older store gets it.
    for name in ["RESERVE", "RESERVE-1"] {
        assert!(!sim.builder().open_read_only().unwrap().admin().reserve_status().is_short());
        sim.disk.remove_file(&sim.world.store_dir().join(name)).unwrap();
        assert!(sim.builder().open_read_only().unwrap().admin().reserve_status().is_short());
        sim.open().close().unwrap();
    }
}

#[test]
fn appends_cannot_take_the_reserve() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = store.create_logstore(&name("p/l"), spec()).unwrap();
    put(&logstore, "before");
    sim.disk.leave_free(5, MANY);
    let mut refused = 0;
    for n in 0..20 {
        if let Err(error) = try_put(&logstore, &noise(n, 3000)) {
            assert_full(Err::<(), _>(error));
            refused += 1;
        }
        pass(&sim, &store, A_WHILE);
    }
    assert!(refused > 10, "{refused}");
    assert_full(store.create_logstore(&name("p/other"), spec()));
    assert!(!store.admin().reserve_status().is_short());
}

#[test]
fn a_store_without_a_free_page_or_inode_opens_and_frees_space() {
    let mut sim = small_segments();
    let store = sim.create();
    let limited = store.create_logstore(&name("p/limited"), spec()).unwrap();
    let deleted = sim.world.service(&store, "p/deleted");
    for n in 0..20 {
        put(&limited, &noise(n, 3000));
        put(&deleted, &noise(n, 3000));
    }
    let config = limited.config().retention_bytes(Some(8 << 10));
    store.update_logstore(limited.name(), config).unwrap();
    store.keys().rotate_data_key(deleted.name()).unwrap();
    put(&deleted, "under the new key");
    // A close would apply the limit.
    sim.crash(Survives::Everything);
    sim.disk.leave_free(0, 0);
    let store = sim.open();
    store.keys().shred_data_keys(&name("p/deleted"), &[1]).unwrap();
    let dropped = store.admin().apply_retention().unwrap();
    assert!(dropped.segments > 5, "{dropped:?}");
    store.delete_logstore(&name("p/deleted")).unwrap();
    // The space that they have freed is enough for the reserve, and for more.
    sim.disk.leave_free(sim.disk.left().pages + 500, 10);
    pass(&sim, &store, A_WHILE);
    assert!(!store.admin().reserve_status().is_short());
    put(&store.logstore(&name("p/limited")).unwrap(), "after");
    assert_sound(&store);
    store.close().unwrap();
}

/// Opening creates a lost file, and a deletion is possible after that.
#[test]
fn a_store_opens_on_a_full_disk_although_files_are_lost() {
    for lost in ["LOCK", "EPOCH"] {
        let sim = Sim::new();
        let store = sim.create();
        put(&sim.world.service(&store, "p/deleted"), "1");
        store.close().unwrap();
        sim.disk.remove_file(&sim.world.store_dir().join(lost)).unwrap();
        sim.disk.leave_free(0, 0);
        let store = sim.open();
        assert!(store.admin().reserve_status().is_short() && store.metrics().reserve_short);
        store.delete_logstore(&name("p/deleted")).unwrap();
        sim.disk.grow();
        pass(&sim, &store, A_WHILE);
        assert!(!store.admin().reserve_status().is_short());
        assert_sound(&store);
    }
}

#[test]
fn a_shard_is_repaired_on_a_full_disk() {
    let sim = small_segments();
    let store = sim.create();
    let logstore = store.create_logstore(&name("p/l"), spec()).unwrap();
    for n in 0..10 {
        // Each has a segment of its own.
        put(&logstore, &noise(n, 5000));
    }
    let segments = sim.segments(&logstore, 0);
    store.close().unwrap();
    sim.disk.edit(&segments[2], Vec::clear);
    sim.disk.edit(segments.last().unwrap(), |bytes| bytes.truncate(1000));
    sim.disk.leave_free(0, 0);
    let store = sim.open();
    let repaired = store.admin().repair(&name("p/l"), 0, &RepairOptions::default()).unwrap();
    assert_eq!(repaired.losses.len(), 2, "{repaired:?}");
    let logstore = store.logstore(&name("p/l")).unwrap();
    assert_eq!(texts(&logstore).len(), 8, "{repaired:?}");
    sim.disk.grow();
    put(&logstore, "after");
    assert_sound(&store);
}

/// The change of a deletion may be written by a thread that appends: the leader of the journal.
#[test]
fn a_deletion_finds_room_although_an_append_has_filled_the_disk() {
    let sim = small_segments();
    let store = sim.create();
    let logstore = store.create_logstore(&name("p/l"), spec()).unwrap();
    store.create_logstore(&name("p/deleted"), spec()).unwrap();
    put(&logstore, "before");
    sim.disk.leave_free(1, MANY);
    assert_full(try_put(&logstore, &noise(1, 9000)));
    store.delete_logstore(&name("p/deleted")).unwrap();
    assert_full(logstore.append(record("x"), &synced()));
    sim.disk.grow();
    pass(&sim, &store, A_WHILE);
    put(&logstore, "after");
    assert_eq!(texts(&logstore).first().unwrap(), "before");
    assert_sound(&store);
}

#[test]
fn a_shard_that_a_full_disk_has_stopped_writes_again_by_itself() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "before");
    sim.disk.leave_free(0, 0);
    assert_full(try_put(&logstore, &noise(0, 9000)));
    let message = assert_full(try_put(&logstore, "refused")).to_string();
    assert!(message.contains("once there is room"), "{message}");
    let tried = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&tried);
    sim.disk.on_call(move |call| {
        if call.op == Op::Create && call.is_about("shard-0000") {
            count.fetch_add(1, Ordering::SeqCst);
        }
        Verdict::Go
    });
    for _ in 0..10_000 {
        sim.world.clock.advance(millis(100));
        store.tick();
    }
    // After 1, 2, 4, … 64 s, and every 64 s from then on.
    let tried = tried.load(Ordering::SeqCst);
    assert!((15..=25).contains(&tried), "{tried} attempts in 1,000 s");
    assert!(latched(&logstore).is_some());
    assert_eq!(store.metrics().writers_latched, 1);
    sim.disk.grow();
    pass(&sim, &store, A_WHILE);
    assert_eq!(latched(&logstore), None);
    put(&logstore, "after");
    assert_eq!(texts(&logstore), ["before", "after"]);
    logstore.sync().unwrap();
    store.close().unwrap();
    assert_sound(&sim.open());
}

#[test]
fn a_shard_stays_stopped_if_it_is_to() {
    let mut sim = Sim::new();
    sim.world.options.reopen_full_shards = false;
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "before");
    sim.disk.leave_free(0, 0);
    assert_full(try_put(&logstore, &noise(0, 9000)));
    sim.disk.grow();
    pass(&sim, &store, A_WHILE);
    assert!(latched(&logstore).is_some());
    logstore.reopen_shard(0).unwrap();
    put(&logstore, "after");
}

/// Another failure needs a person.
#[test]
fn a_shard_that_a_broken_disk_has_stopped_stays_stopped() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "before");
    sim.disk.fail_next(Op::Write, ".seg", io::ErrorKind::Other);
    assert_eq!(try_put(&logstore, "lost").unwrap_err().kind(), ErrorKind::Io);
    sim.disk.heal();
    pass(&sim, &store, A_WHILE);
    assert!(latched(&logstore).is_some());
    assert_eq!(try_put(&logstore, "refused").unwrap_err().code(), "latched");
}

#[test]
fn groups_that_were_only_buffered_are_reported_once() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "before");
    logstore.append(record(&noise(0, 9000)), &buffered()).unwrap();
    sim.disk.leave_free(0, 0);
    pass(&sim, &store, 1);
    assert!(latched(&logstore).is_some());
    sim.disk.grow();
    pass(&sim, &store, A_WHILE);
    assert_eq!(latched(&logstore), None);
    assert_full(logstore.sync());
    logstore.sync().unwrap();
    put(&logstore, "after");
    assert_eq!(texts(&logstore), ["before", "after"]);
    store.close().unwrap();
}

/// A sync that found the disk full is never taken as done, however the shard continues.
#[test]
fn a_sync_that_failed_acknowledges_nothing() {
    for survives in [Survives::Synced, Survives::Everything] {
        let mut sim = Sim::new();
        let store = sim.create();
        let logstore = sim.world.service(&store, "p/l");
        put(&logstore, "before");
        logstore.append(record("written"), &written()).unwrap();
        sim.disk.fail_next(Op::Sync, ".seg", io::ErrorKind::StorageFull);
        assert_full(try_put(&logstore, "refused"));
        pass(&sim, &store, A_WHILE);
        assert_eq!(latched(&logstore), None);
        assert_full(logstore.sync());
        put(&logstore, "after");
        let known = texts(&logstore);
        assert_eq!((&*known[0], &*known[known.len() - 1]), ("before", "after"));
        sim.crash(survives);
        let store = sim.open();
        assert_eq!(texts(&store.logstore(&name("p/l")).unwrap()), known);
        assert_sound(&store);
    }
}

/// Only the operations that free space may take the reserve, and none of their acknowledged effects
/// depends on it afterwards.
#[test]
fn the_reserve_files_have_no_authority() {
    let sim = Sim::new();
    let store = sim.create();
    put(&sim.world.service(&store, "p/l"), "kept");
    store.close().unwrap();
    let names: Vec<PathBuf> =
        ["RESERVE", "RESERVE-1", "RESERVE-2"].map(|name| sim.world.store_dir().join(name)).to_vec();
    for damage in [
        |disk: &common::disk::SimDisk, path: &PathBuf| disk.remove_file(path).unwrap(),
        |disk: &common::disk::SimDisk, path: &PathBuf| {
            disk.edit(path, |bytes| bytes.extend_from_slice(b"something else"));
        },
        |disk: &common::disk::SimDisk, path: &PathBuf| {
            disk.remove_file(path).unwrap();
            disk.create_dir(path).unwrap();
        },
    ] {
        names.iter().for_each(|path| damage(&sim.disk, path));
        let store = sim.open();
        assert_eq!(texts(&store.logstore(&name("p/l")).unwrap()), ["kept"]);
        assert_sound(&store);
        store.close().unwrap();
    }
}
