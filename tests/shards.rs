//! Splitting and merging shards.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use common::{
    failing::{FailingDisk, Failure},
    *,
};
use envelog::{
    AppendOptions, Error, Logstore, LogstoreSpec, Position, ReadOptions, Result, ShardChoice,
    Store,
    admin::{BackupOptions, RestoreOptions, ShardStatus, VerifyOptions},
    error::ConfigError,
    kms::RevokedReason::Disabled,
};

const MIDDLE: u128 = 1 << 127;

fn by_key(key: u128) -> AppendOptions {
    synced().shard(ShardChoice::HashKey(key))
}

fn shard_of(logstore: &Logstore, key: u128) -> u32 {
    logstore.append(record("x"), &by_key(key)).unwrap().shard
}

fn of_shard(logstore: &Logstore, shard: u32) -> Vec<String> {
    strings(&records(logstore, shard).unwrap())
}

fn statuses(logstore: &Logstore) -> Vec<ShardStatus> {
    logstore.config().shards.iter().map(|shard| shard.status).collect()
}

fn assert_clean(store: &Store) {
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean() && report.refused.is_empty(), "{report:?}");
}

#[test]
fn appends_go_to_the_shard_that_owns_their_key() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "before");
    let split = store.split_shard(logstore.name(), 0, Some(MIDDLE)).unwrap();
    assert_eq!((split.parent.status, split.low.id, split.high.id), (ShardStatus::ReadOnly, 1, 2));
    assert_eq!(split.low.end_key, split.high.begin_key);
    assert_eq!(shard_of(&logstore, MIDDLE - 1), 1);
    assert_eq!(shard_of(&logstore, MIDDLE), 2);
    assert_eq!(shard_of(&logstore, u128::MAX), 2);
    let in_turn: Vec<u32> =
        (0..4).map(|_| logstore.append(record("x"), &synced()).unwrap().shard).collect();
    assert_eq!(in_turn, [2, 1, 2, 1], "only readwrite shards take appends without a key");

    let merge = store.merge_shards(logstore.name(), 1).unwrap();
    assert_eq!((merge.left.id, merge.right.id, merge.merged.id), (1, 2, 3));
    assert_eq!([0, MIDDLE, u128::MAX].map(|key| shard_of(&logstore, key)), [3, 3, 3]);
    assert_eq!(of_shard(&logstore, 0), ["before"], "a parent keeps its data");
    assert_eq!(logstore.read_merged(&ReadOptions::default()).unwrap().count(), 11);

    let config = logstore.config();
    assert_eq!((config.shard_count, config.revision), (4, 3));
    assert_eq!(config.children(0), [1, 2]);
    assert_eq!(config.children(2), [3]);
    assert!(store.update_logstore(logstore.name(), config).is_ok());
    drop(logstore);
    store.close().unwrap();

    let store = world.open();
    let logstore = store.logstore(&name("p/l")).unwrap();
    use ShardStatus::{ReadOnly, ReadWrite};
    assert_eq!(statuses(&logstore), [ReadOnly, ReadOnly, ReadOnly, ReadWrite]);
    assert_eq!(shard_of(&logstore, 7), 3);
    assert_clean(&store);
}

#[test]
fn each_refusal_has_its_error_and_changes_nothing() {
    let world = World::manual();
    let store = world.create();
    let l = name("p/l");
    let logstore = store.create_logstore(&l, LogstoreSpec::default().shard_count(2)).unwrap();
    store.split_shard(&l, 0, None).unwrap();
    let before = logstore.config();

    let appended = logstore.append(record("x"), &synced().shard(ShardChoice::Shard(0)));
    assert!(
        matches!(&appended, Err(Error::ShardReadOnly { shard: 0, children, .. }) if children == &[2, 3]),
        "{appended:?}"
    );
    let text = appended.unwrap_err().to_string();
    assert!(text.contains("its range went to shards 2 and 3"), "{text}");
    for again in [store.split_shard(&l, 0, None).map(drop), store.merge_shards(&l, 0).map(drop)] {
        assert!(matches!(again, Err(Error::ShardReadOnly { shard: 0, .. })), "{again:?}");
    }
    let missing = store.split_shard(&l, 9, None);
    assert!(matches!(missing, Err(Error::ShardMissing { shard: 9, .. })));
    let key = |key| store.split_shard(&l, 1, Some(key)).unwrap_err();
    for outside in [key(0), key(MIDDLE), key(u128::MAX)] {
        assert!(matches!(outside, Error::Config(ConfigError::SplitKey { shard: 1, .. })));
    }
    let last = store.merge_shards(&l, 1).unwrap_err();
    assert!(matches!(last, Error::Config(ConfigError::NoNeighbour { shard: 1 })));
    let absent = store.split_shard(&name("p/absent"), 0, None).unwrap_err();
    assert!(matches!(absent, Error::LogstoreMissing(_)));
    assert_eq!(logstore.config(), before);
}

#[test]
fn a_logstore_has_at_most_256_shards_with_those_that_were_split() {
    let world = World::manual_in_memory();
    let store = world.create();
    let l = name("p/l");
    store.create_logstore(&l, LogstoreSpec::default().shard_count(253)).unwrap();
    store.split_shard(&l, 0, None).unwrap();
    let full = store.split_shard(&l, 1, None).unwrap_err();
    assert!(matches!(full, Error::TooMany { limit: 256, .. }), "{full}");
    assert_eq!(store.merge_shards(&l, 1).unwrap().merged.id, 255);
    let full = store.merge_shards(&l, 3).unwrap_err();
    assert!(matches!(full, Error::TooMany { limit: 256, .. }), "{full}");
}

/// What was acknowledged as buffered is in the parent, and durable.
#[test]
fn a_split_writes_what_the_parent_has_accepted() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    let tickets: Vec<_> =
        (0..3).map(|n| logstore.submit(record(&format!("{n}")), &buffered()).unwrap()).collect();
    store.split_shard(logstore.name(), 0, None).unwrap();
    assert_eq!(of_shard(&logstore, 0), ["0", "1", "2"]);
    for ticket in tickets {
        assert_eq!(ticket.wait().unwrap().shard, 0);
    }
    assert_clean(&store);
}

#[test]
fn a_follower_ends_behind_the_last_record_of_a_parent() {
    let world = World::threads();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "one");
    let mut follow = logstore.follow(0, &ReadOptions::default()).unwrap();
    let waits = logstore.wait_for(0, 2).unwrap();
    let reading = thread::spawn(move || {
        let read: Vec<_> = follow.by_ref().collect::<Result<_>>().unwrap();
        (strings(&read), follow.has_ended())
    });
    put(&logstore, "two");
    store.split_shard(logstore.name(), 0, None).unwrap();
    assert_eq!(reading.join().unwrap(), (vec!["one".to_owned(), "two".to_owned()], true));
    waits.wait();
    logstore.wait_for(0, 2).unwrap().wait();

    // One that begins later ends too; one with a limit has not reached the end.
    let mut late = logstore.follow(0, &ReadOptions::default().from(Position::Seq(1))).unwrap();
    assert_eq!(strings(&late.by_ref().collect::<Result<Vec<_>>>().unwrap()), ["two"]);
    assert!(late.has_ended());
    let mut limited = logstore.follow(0, &ReadOptions::default().max_groups(1)).unwrap();
    assert_eq!(limited.by_ref().count(), 1);
    assert!(!limited.has_ended());
    let mut child = logstore.follow(1, &ReadOptions::default()).unwrap();
    assert!(child.try_next().unwrap().is_none() && !child.has_ended());
}

#[test]
fn a_read_only_opener_notices_the_new_shards() {
    let world = World::threads();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "one");
    let reading = world.builder().open_read_only().unwrap();
    let beside = reading.logstore(&name("p/l")).unwrap();
    let mut follow = beside.follow(0, &ReadOptions::default()).unwrap();
    assert_eq!(&follow.next().unwrap().unwrap().bytes[..], b"one");
    let ends = thread::spawn(move || (follow.next().is_none(), follow.has_ended()));
    store.split_shard(logstore.name(), 0, None).unwrap();
    logstore.append(record("two"), &by_key(0)).unwrap();
    world.clock.advance(secs(2));
    assert_eq!(ends.join().unwrap(), (true, true));
    // The handle from before the split.
    assert_eq!(of_shard(&beside, 1), ["two"]);
    assert_eq!(beside.read_merged(&ReadOptions::default()).unwrap().count(), 2);
    store.split_shard(logstore.name(), 1, None).unwrap();
    logstore.append(record("three"), &by_key(0)).unwrap();
    assert_eq!(beside.read_merged(&ReadOptions::default()).unwrap().count(), 3);
    let refused = reading.split_shard(&name("p/l"), 2, None);
    assert!(matches!(refused, Err(Error::ReadOnly)));
}

/// Threads append in every form while shards are split and merged: each append succeeds once, in a
/// shard that owned its key.
#[test]
fn appends_go_on_during_splits_and_merges() {
    let world = World::threads();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    let done = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..4u32)
        .map(|form| {
            let (logstore, done) = (logstore.clone(), Arc::clone(&done));
            thread::spawn(move || {
                let mut appended = BTreeMap::new();
                let mut n = 0u32;
                while !done.load(Ordering::Relaxed) {
                    let text = format!("{form} {n}");
                    let key = u128::from(n).wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835);
                    let options = match n % 3 {
                        0 => written(),
                        1 => written().shard(ShardChoice::HashKey(key)),
                        _ => buffered().shard(ShardChoice::HashKey(key)),
                    };
                    let at = match form {
                        0 => logstore.append(record(&text), &options).unwrap(),
                        1 => logstore.submit(record(&text), &options).unwrap().wait().unwrap(),
                        2 => loop {
                            match logstore.try_submit(record(&text), &options) {
                                Ok(ticket) => break ticket.wait().unwrap(),
                                Err(Error::Full { .. }) => thread::yield_now(),
                                Err(error) => panic!("{error}"),
                            }
                        },
                        _ => block_on(logstore.append_async(record(&text), &options)).unwrap(),
                    };
                    appended.insert((at.shard, at.seq), text);
                    n += 1;
                }
                appended
            })
        })
        .collect();
    for _ in 0..6 {
        let newest = store.split_shard(logstore.name(), last(&logstore), None).unwrap().low.id;
        thread::sleep(millis(5));
        store.split_shard(logstore.name(), newest, None).unwrap();
        thread::sleep(millis(5));
        store.merge_shards(logstore.name(), last(&logstore) - 1).unwrap();
    }
    done.store(true, Ordering::Relaxed);
    let mut expected = BTreeMap::new();
    for writer in writers {
        for (place, text) in writer.join().unwrap() {
            assert_eq!(expected.insert(place, text), None, "{place:?} was given out twice");
        }
    }
    assert!(expected.len() > 100, "{}", expected.len());
    logstore.sync().unwrap();
    let found: BTreeMap<_, _> = logstore
        .read_merged(&ReadOptions::default())
        .unwrap()
        .map(|item| item.map(|(shard, it)| ((shard, it.seq), strings(&[it]).remove(0))).unwrap())
        .collect();
    assert_eq!(found, expected);
    assert_clean(&store);
}

fn last(logstore: &Logstore) -> u32 {
    let shards = logstore.config().shards;
    shards.iter().rev().find(|it| it.status == ShardStatus::ReadWrite).unwrap().id
}

fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(thread::Thread);
    impl std::task::Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Arc::new(Unpark(thread::current())).into();
    let mut future = std::pin::pin!(future);
    loop {
        let polled = future.as_mut().poll(&mut std::task::Context::from_waker(&waker));
        match polled {
            std::task::Poll::Ready(output) => return output,
            std::task::Poll::Pending => thread::park(),
        }
    }
}

/// A split needs the customer's key, which authenticates what is known of the shards.
#[test]
fn a_revoked_key_refuses_a_split_and_changes_nothing() {
    let world = World::manual();
    let (store, cmk) = (world.create(), world.cmk());
    let logstore = world.byok(&store, "p/l", &cmk);
    put(&logstore, "one");
    store.keys().rotate_data_key(logstore.name()).unwrap();
    put(&logstore, "two");
    world.local().disable(&cmk.cmk_key_id).unwrap();
    world.clock.advance(secs(32));
    let before = logstore.config();
    assert_revoked(store.split_shard(logstore.name(), 0, None), Disabled);
    assert_eq!(logstore.config(), before);
    world.local().enable(&cmk.cmk_key_id).unwrap();
    world.clock.advance(secs(32));
    store.tick();
    put(&logstore, "three");
    store.split_shard(logstore.name(), 0, None).unwrap();
    assert_eq!(of_shard(&logstore, 0), ["one", "two", "three"]);
    assert_eq!(shard_of(&logstore, 0), 1);
    store.keys().rotate_data_key(logstore.name()).unwrap();
    assert_eq!(shard_of(&logstore, 0), 1);
    assert_clean(&store);
    drop(logstore);
    store.close().unwrap();
    let store = world.open();
    assert_eq!(of_shard(&store.logstore(&name("p/l")).unwrap(), 1), ["x", "x"]);
    assert_clean(&store);
}

/// The parents go on as before after a failed split, in the same process.
#[test]
fn the_parent_takes_appends_again_after_a_failed_split() {
    for failure in [Failure::Once, Failure::Unsaid] {
        let world = World::manual_in_memory();
        drop(world.create());
        let disk = FailingDisk::default();
        let store = world.builder().disk(Arc::new(disk.clone())).open().unwrap();
        let logstore = world.service(&store, "p/l");
        let mut expected = Vec::new();
        for count in 0.. {
            let text = format!("{count}");
            put(&logstore, &text);
            expected.push(text);
            disk.fail_after(count, failure);
            let split = store.split_shard(logstore.name(), 0, None);
            let ran_through = !disk.has_failed();
            disk.disarm();
            if split.is_ok() {
                assert!(ran_through || statuses(&logstore).len() == 3, "{failure:?} {count}");
                break;
            }
            assert_eq!(statuses(&logstore), [ShardStatus::ReadWrite], "{failure:?} {count}");
            logstore.reopen_shard(0).unwrap();
            // The next change of the catalogue takes back what is left of this one.
            store.keys().rotate_due_data_keys().unwrap();
        }
        assert!(expected.len() > 5, "{failure:?}: {}", expected.len());
        assert_eq!(of_shard(&logstore, 0), expected, "{failure:?}");
        assert_eq!(shard_of(&logstore, 0), 1, "{failure:?}");
        assert_clean(&store);
    }
}

/// The data of a parent is dropped as that of any shard, to its last segment. The parent stays,
/// since its number is not used again.
#[test]
fn retention_drops_the_data_of_a_parent() {
    let world = World::manual();
    let store = world.create();
    let l = name("p/l");
    let logstore = store.create_logstore(&l, LogstoreSpec::default().ttl_days(1)).unwrap();
    put(&logstore, "old");
    store.split_shard(&l, 0, None).unwrap();
    world.clock.advance(DAY + secs(60));
    store.tick();
    store.admin().apply_retention().unwrap();
    assert_eq!(of_shard(&logstore, 0), [""; 0]);
    let mut follow = logstore.follow(0, &ReadOptions::default()).unwrap();
    assert!(follow.next().is_none() && follow.has_ended());
    assert_eq!(statuses(&logstore).len(), 3);
    assert_eq!(shard_of(&logstore, 0), 1);
    assert_clean(&store);
}

#[test]
fn a_checkpoint_an_anchor_a_backup_and_a_rotation_know_the_new_shards() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "one");
    let before = store.admin().checkpoint().unwrap();
    let backup = world.path().join("backup");
    store.admin().backup(&backup, &BackupOptions::default(), &mut |_| {}).unwrap();
    store.split_shard(logstore.name(), 0, Some(MIDDLE)).unwrap();
    assert_eq!([0, MIDDLE].map(|key| shard_of(&logstore, key)), [1, 2]);
    let after = store.admin().checkpoint().unwrap();
    for against in [before, after] {
        let options = VerifyOptions::default().against(against);
        let report = store.admin().verify(&options, &mut |_| {}).unwrap();
        assert!(report.is_clean(), "{report:?}");
    }
    store.keys().rotate_service_key().unwrap();
    assert_eq!([0, MIDDLE].map(|key| shard_of(&logstore, key)), [1, 2]);
    let report = store.admin().backup(&backup, &BackupOptions::default(), &mut |_| {}).unwrap();
    assert!(report.faults.is_empty(), "{report:?}");
    drop(logstore);
    store.close().unwrap();

    std::fs::remove_dir_all(world.store_dir()).unwrap();
    world.builder().restore(&backup, &RestoreOptions::default(), &mut |_| {}).unwrap();
    let store = world.open();
    let logstore = store.logstore(&name("p/l")).unwrap();
    assert_eq!([0, 1, 2].map(|shard| of_shard(&logstore, shard).len()), [1, 2, 2]);
    assert!(matches!(
        logstore.append(record("x"), &synced().shard(ShardChoice::Shard(0))),
        Err(Error::ShardReadOnly { .. })
    ));
    assert_eq!(shard_of(&logstore, MIDDLE), 2);
    assert_clean(&store);
}

/// A segment that a crash has left open is recovered before its shard is split, and has a successor
/// that says where it ends.
#[test]
fn a_split_recovers_what_a_crash_has_left_open() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "one");
    logstore.append(record("two"), &written()).unwrap();
    let copy = world.path().join("copy");
    copy_dir(&world.store_dir(), &copy);
    drop((logstore, store));
    let store = world.builder_at(&copy).open().unwrap();
    store.split_shard(&name("p/l"), 0, None).unwrap();
    let logstore = store.logstore(&name("p/l")).unwrap();
    assert_eq!(of_shard(&logstore, 0), ["one", "two"]);
    assert_clean(&store);
    drop(logstore);
    store.close().unwrap();
    let store = world.builder_at(&copy).open().unwrap();
    assert_eq!(of_shard(&store.logstore(&name("p/l")).unwrap(), 0), ["one", "two"]);
    assert_clean(&store);
}
