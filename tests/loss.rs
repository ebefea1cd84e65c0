//! The loss of a master key while the disk hangs or is slow: the order of the wipes, the deadline,
//! the groups that miss it, and threads that return from a system call long after it.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
use common::{
    counting::Counting,
    disk::{Call, Hang, Op, Sim, SimDisk, Verdict},
    *,
};
use envelog::{
    AppendOptions, Background, Cmk, EncryptConf, EncryptType, Error, Logstore, LogstoreSpec,
    Payload, ShardChoice, Store, admin::VerifyOptions, audit::AuditEvent,
    kms::RevokedReason::Disabled,
};

/// A store on a simulated disk whose clock the test advances, also if the store has threads.
struct Setup {
    sim: Sim,
    keys: Counting,
    store: Store,
    cmk: Cmk,
}

impl Setup {
    fn new(background: Background) -> Self {
        let world =
            if background == Background::Manual { World::manual() } else { World::threads() };
        let disk = SimDisk::new(world.path());
        let mut sim = Sim::of(world, disk);
        let (keys, clock) = (Counting::default(), Arc::clone(&sim.world.clock));
        let provider = keys.clone();
        let (dir, keyring, kms) =
            (sim.world.store_dir(), sim.world.keyring(), Arc::clone(&sim.world.kms));
        let options = sim.world.options;
        let disk = sim.disk.clone();
        sim.customize(move |_| {
            Store::builder(&dir, &keyring, provider.clone())
                .kms(Arc::clone(&kms) as _)
                .clock(Arc::clone(&clock) as _)
                .disk(Arc::new(disk.clone()))
                .options(options)
        });
        let store = sim.create();
        let cmk = sim.world.cmk();
        Self { sim, keys, store, cmk }
    }

    fn threads() -> Self {
        Self::new(Background::Threads)
    }

    fn logstore(&self, text: &str, shards: u32) -> Logstore {
        let spec = LogstoreSpec::default().shard_count(shards);
        let conf = EncryptConf::byok(EncryptType::Aes, self.cmk.clone());
        self.store.create_logstore(&name(text), spec.encrypt_conf(conf)).unwrap()
    }

    fn logstores(&self, count: usize) -> Vec<Logstore> {
        (0..count).map(|n| self.logstore(&format!("p/l{n}"), 1)).collect()
    }

    fn refuse(&self) {
        self.sim.world.kms.answer(Answer::Revoked(Disabled));
    }

    fn kms_timeout(&self) -> Duration {
        self.sim.world.options.kms_timeout
    }

    /// The key is usable again.
    fn give_back(&self, logstore: &Logstore) {
        self.sim.world.kms.answer(Answer::Real);
        logstore.revalidate_now().unwrap();
    }

    fn lost(&self) -> u64 {
        self.store.metrics().groups_lost
    }

    /// The records about lost groups, and whether each comes behind a loss of the key.
    fn lost_on_record(&self) -> Vec<String> {
        let (mut lost, mut revoked) = (Vec::new(), BTreeSet::new());
        for record in self.store.keys().audit_records().unwrap() {
            match record.event {
                AuditEvent::Revoked => drop(revoked.insert(record.logstore)),
                AuditEvent::GroupsLost => {
                    assert!(revoked.contains(&record.logstore), "{record:?}");
                    lost.push(format!("{}: {}", record.logstore.unwrap(), record.detail));
                }
                _ => {}
            }
        }
        lost
    }

    /// Has the KMS refuse the key, calls `during`, and has time pass until the loss is on record.
    fn lose(&self, logstore: &Logstore, during: impl FnOnce()) {
        self.refuse();
        thread::scope(|scope| {
            let noticed = scope.spawn(|| logstore.revalidate_now());
            during();
            // The deadline counts from when the other thread notices the loss.
            eventually("the deadline has passed", || {
                self.sim.world.clock.advance(self.kms_timeout());
                noticed.is_finished()
            });
            assert_revoked(noticed.join().unwrap(), Disabled);
        });
    }

    /// Checks that each Logstore has these records, can be appended to, and is sound. Also after the
    /// store was closed and opened. The first sync reports lost groups.
    fn check(self, expected: &[(&Logstore, &[&str])]) {
        let check = |logstore: &Logstore, texts: &[&str]| {
            let found: Vec<_> = (0..logstore.config().shards.len() as u32)
                .flat_map(|shard| strings(&records(logstore, shard).unwrap()))
                .collect();
            assert_eq!(found, texts, "{}", logstore.name());
        };
        let mut reported = 0;
        for (logstore, texts) in expected {
            match logstore.sync() {
                Ok(()) => {}
                Err(Error::GroupsLost { groups, cause, .. }) => {
                    assert!(is_revoked(&cause, Disabled), "{cause}");
                    reported += groups;
                }
                Err(other) => panic!("{other}"),
            }
            logstore.sync().unwrap();
            check(logstore, texts);
        }
        assert_eq!(reported, self.lost());
        assert_eq!(self.store.metrics().writers_latched, 0);
        self.store.close().unwrap();
        let store = self.sim.open();
        let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
        assert!(report.is_clean(), "{:?}", report.faults);
        for (logstore, texts) in expected {
            let logstore = store.logstore(logstore.name()).unwrap();
            check(&logstore, texts);
            put(&logstore, "end");
        }
    }

    /// Makes operations hang that `catches` accepts, until the returned switch is turned off.
    fn hang(
        &self,
        mut catches: impl FnMut(&Call) -> bool + Send + 'static,
    ) -> (Arc<Hang>, Arc<AtomicBool>) {
        let on = Arc::new(AtomicBool::new(true));
        let switch = Arc::clone(&on);
        let hang = self.sim.disk.hang(move |call| switch.load(Ordering::SeqCst) && catches(call));
        (hang, on)
    }
}

fn to_shard(shard: u32, options: AppendOptions) -> AppendOptions {
    options.shard(ShardChoice::Shard(shard))
}

fn buffer(logstore: &Logstore, text: &str) {
    logstore.append(record(text), &buffered()).unwrap();
}

fn is_sync_of_a_segment(call: &Call) -> bool {
    call.op == Op::Sync && call.is_about(".seg")
}

/// Whether a key is in the memory for keys of this process.
#[cfg(target_os = "linux")]
fn keys_in_memory(keys: &[[u8; 32]]) -> usize {
    let mut found: BTreeSet<&[u8; 32]> = BTreeSet::new();
    common::process::each_region(std::process::id(), |is_dumped, bytes| {
        if !is_dumped {
            found.extend(keys.iter().filter(|key| memchr::memmem::find(bytes, *key).is_some()));
        }
    });
    found.len()
}

/// When the first fsync begins, the data keys of all Logstores are gone, and so are the keys of the
/// segments that are read. Nothing is lost if the disk works.
#[test]
fn every_data_key_is_wiped_before_the_first_sync() {
    const COUNT: usize = 120;
    let setup = Setup::threads();
    let before = setup.keys.count();
    let logstores = setup.logstores(COUNT);
    for logstore in &logstores {
        put(logstore, "first");
        // Reading goes through a sealed segment.
        logstore.roll().unwrap();
        put(logstore, "second");
        assert_eq!(texts(logstore), ["first", "second"]);
        buffer(logstore, "third");
    }
    let writing = before + COUNT;
    assert_eq!(setup.keys.count(), writing + COUNT, "one key is read with, one is written with");
    let data_keys = setup.sim.world.kms.wrapped_keys();
    #[cfg(target_os = "linux")]
    assert!(keys_in_memory(&data_keys) >= COUNT, "the search finds the keys");
    let hang = setup.sim.disk.hang(is_sync_of_a_segment);
    setup.refuse();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| logstores[0].revalidate_now());
        hang.wait_for(1);
        assert_eq!(setup.keys.count(), writing);
        #[cfg(target_os = "linux")]
        assert_eq!(keys_in_memory(&data_keys), 0);
        assert!(!waiting.is_finished());
        hang.release();
        assert_revoked(waiting.join().unwrap(), Disabled);
    });
    assert_eq!(setup.keys.count(), before, "every segment is sealed");
    setup.give_back(&logstores[0]);
    for logstore in &logstores {
        assert_eq!(texts(logstore), ["first", "second", "third"]);
        assert!(logstore.status().unwrap().recovery.is_empty());
    }
    assert_eq!((setup.lost(), setup.lost_on_record().len()), (0, 0));
}

/// Waits until every thread that seals has ended, in this test and in others.
fn threads_are_gone() {
    #[cfg(target_os = "linux")]
    eventually("the threads that seal end", || {
        let tasks = std::fs::read_dir("/proc/self/task").unwrap();
        let named = |task: std::io::Result<std::fs::DirEntry>| {
            std::fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default()
        };
        !tasks.map(named).any(|name| name.trim() == "envelog-seal")
    });
}

/// Every fsync hangs: that of an append, and more of those that seal than there are threads. The
/// deadline waits for none of them. They return when the shards have been recovered.
#[test]
fn the_deadline_waits_for_no_sync() {
    let setup = Setup::threads();
    let before = setup.keys.count();
    let led = setup.logstore("p/led", 1);
    let others = setup.logstores(30);
    for logstore in others.iter().chain([&led]) {
        put(logstore, "synced");
        logstore.append(record("written"), &written()).unwrap();
    }
    others.iter().for_each(|other| buffer(other, "buffered"));
    let first_segments: Vec<_> =
        others.iter().chain([&led]).map(|one| setup.sim.segments(one, 0).remove(0)).collect();
    let (hang, on) = setup.hang(is_sync_of_a_segment);
    thread::scope(|scope| {
        let leader = scope.spawn(|| try_put(&led, "hangs"));
        hang.wait_for(1);
        buffer(&led, "lost");
        let follower = led.submit(record("never acknowledged"), &synced()).unwrap();
        buffer(&led, "lost too");
        setup.lose(&led, || {
            hang.wait_for(1 + 16);
            assert_eq!(setup.keys.count(), before + 31, "the keys of the segments are left");
        });
        assert_eq!(setup.keys.count(), before);
        assert_revoked(follower.wait(), Disabled);
        assert!(!leader.is_finished());
        let lost = "p/led: shard 0: 2 groups, sequence numbers 3 to 5";
        assert_eq!((setup.lost(), setup.lost_on_record()), (2, vec![lost.to_owned()]));
        assert_revoked(try_put(&led, "refused"), Disabled);

        on.store(false, Ordering::SeqCst);
        setup.give_back(&led);
        for logstore in others.iter().chain([&led]) {
            put(logstore, "after");
            assert_eq!(logstore.status().unwrap().recovery.len(), 1);
        }
        let bytes = || first_segments.iter().map(|path| setup.sim.disk.bytes(path));
        let cut: Vec<_> = bytes().collect();
        hang.release();
        assert_revoked(leader.join().unwrap(), Disabled);
        threads_are_gone();
        assert!(bytes().eq(cut), "a thread has written to a segment that was given up");
    });
    let read = |logstore, texts| -> (&Logstore, &[&str]) { (logstore, texts) };
    let expected: Vec<_> = others
        .iter()
        .map(|other| read(other, &["synced", "written", "buffered", "after"]))
        .chain([read(&led, &["synced", "written", "hangs", "after"])])
        .collect();
    setup.check(&expected);
}

/// The footer is written when its fsync hangs. The shard is recovered with it, and the fsync returns
/// when the next segment is in use.
#[test]
fn a_footer_whose_sync_hangs_is_no_loss() {
    let setup = Setup::threads();
    let before = setup.keys.count();
    let logstore = setup.logstore("p/l", 1);
    put(&logstore, "synced");
    buffer(&logstore, "buffered");
    let mut syncs = 0;
    let (hang, _) = setup.hang(move |call| {
        let is_sync = is_sync_of_a_segment(call);
        syncs += u32::from(is_sync);
        is_sync && syncs == 2
    });
    setup.lose(&logstore, || drop(hang.wait_for(1)));
    assert_eq!((setup.keys.count(), setup.lost()), (before, 0));
    setup.give_back(&logstore);
    put(&logstore, "after");
    hang.release();
    threads_are_gone();
    put(&logstore, "later");
    setup.check(&[(&logstore, &["synced", "buffered", "after", "later"])]);
}

/// The thread that hangs in a write has groups in hand that may be in the file or not. They are
/// counted when it returns.
#[test]
fn groups_in_a_write_that_hangs_are_counted_when_it_returns() {
    for fails in [false, true] {
        let setup = Setup::threads();
        let before = setup.keys.count();
        let logstore = setup.logstore("p/l", 1);
        put(&logstore, "synced");
        buffer(&logstore, "in hand");
        buffer(&logstore, "in hand too");
        let (hang, on) = setup.hang(|call| call.op == Op::Write && call.is_about(".seg"));
        thread::scope(|scope| {
            let leader = scope.spawn(|| logstore.sync());
            hang.wait_for(1);
            buffer(&logstore, "queued");
            setup.lose(&logstore, || {});
            assert_eq!((setup.keys.count(), setup.lost()), (before, 1));
            let queued = "p/l: shard 0: 1 group, sequence numbers 3 to 3".to_owned();
            assert_eq!(setup.lost_on_record(), std::slice::from_ref(&queued));
            on.store(false, Ordering::SeqCst);
            if fails {
                setup.sim.disk.fail_next(Op::Write, ".seg", std::io::ErrorKind::Other);
            }
            hang.release();
            assert_revoked(leader.join().unwrap(), Disabled);
            if fails {
                let in_hand = "p/l: shard 0: 2 groups, sequence numbers 1 to 2".to_owned();
                assert_eq!((setup.lost(), setup.lost_on_record()), (3, vec![queued, in_hand]));
            } else {
                assert_eq!((setup.lost(), setup.lost_on_record()), (1, vec![queued]));
            }
        });
        setup.give_back(&logstore);
        put(&logstore, "after");
        let all = ["synced", "in hand", "in hand too", "after"];
        let expected: &[&str] = if fails { &["synced", "after"] } else { &all };
        setup.check(&[(&logstore, expected)]);
    }
}

/// The thread hangs in a roll with groups in hand: in the fsync of the segment that ends, or while
/// it gives the next one its name.
#[test]
fn groups_in_a_roll_that_hangs_are_lost_once() {
    for in_sync in [true, false] {
        let setup = Setup::threads();
        let before = setup.keys.count();
        let logstore = setup.logstore("p/l", 1);
        put(&logstore, "synced");
        // The next block begins a segment of another suite.
        let config = logstore.config();
        let conf = EncryptConf { enable: false, ..config.encrypt_conf.clone().unwrap() };
        let config = config.encrypt_conf(conf);
        setup.store.update_logstore(logstore.name(), config).unwrap();
        buffer(&logstore, "in hand");
        let (hang, on) = setup.hang(move |call| match in_sync {
            true => is_sync_of_a_segment(call),
            false => call.op == Op::SyncDir && call.is_about("shard-"),
        });
        let record = "p/l: shard 0: 1 group, sequence numbers 1 to 1".to_owned();
        thread::scope(|scope| {
            let leader = scope.spawn(|| logstore.sync());
            hang.wait_for(1);
            setup.lose(&logstore, || {});
            assert_eq!(setup.keys.count(), before);
            on.store(false, Ordering::SeqCst);
            if in_sync {
                // The groups cannot come into a block any more.
                assert_eq!((setup.lost(), setup.lost_on_record()), (1, vec![record.clone()]));
                setup.give_back(&logstore);
                put(&logstore, "after");
            }
            hang.release();
            assert_revoked(leader.join().unwrap(), Disabled);
            if !in_sync {
                assert_eq!((setup.lost(), setup.lost_on_record()), (1, vec![record.clone()]));
                setup.give_back(&logstore);
                put(&logstore, "after");
            }
        });
        assert_eq!(setup.lost_on_record(), [record]);
        setup.check(&[(&logstore, &["synced", "after"])]);
    }
}

/// The key is back before the deadline, while an fsync hangs.
#[test]
fn a_key_that_is_back_in_time_costs_nothing() {
    let setup = Setup::threads();
    let before = setup.keys.count();
    let logstore = setup.logstore("p/l", 2);
    for shard in 0..2 {
        logstore.append(record("synced"), &to_shard(shard, synced())).unwrap();
    }
    let (hang, on) = setup.hang(|call| is_sync_of_a_segment(call) && call.is_about("shard-0001"));
    thread::scope(|scope| {
        let leader =
            scope.spawn(|| logstore.append(record("hangs"), &to_shard(1, synced())).unwrap());
        hang.wait_for(1);
        logstore.append(record("queued"), &to_shard(1, buffered())).unwrap();
        setup.refuse();
        let noticed = scope.spawn(|| logstore.revalidate_now());
        eventually("the other shard is sealed", || setup.keys.count() == before + 1);
        setup.give_back(&logstore);
        let _ = noticed.join().unwrap();
        setup.sim.world.clock.advance(setup.kms_timeout());
        assert_eq!((setup.keys.count(), setup.lost()), (before + 1, 0));
        on.store(false, Ordering::SeqCst);
        hang.release();
        leader.join().unwrap();
    });
    logstore.sync().unwrap();
    assert!(logstore.status().unwrap().recovery.is_empty());
    setup.check(&[(&logstore, &["synced", "synced", "hangs", "queued"])]);
}

/// The audit log hangs at the first loss. The second one is acted on all the same.
#[test]
fn an_audit_log_that_hangs_delays_no_wipe() {
    let setup = Setup::threads();
    let before = setup.keys.count();
    let logstores = setup.logstores(3);
    logstores.iter().for_each(|logstore| put(logstore, "one"));
    let (hang, on) = setup.hang(|call| call.op == Op::Sync && call.is_about("audit"));
    setup.refuse();
    thread::scope(|scope| {
        let first = scope.spawn(|| logstores[0].revalidate_now());
        hang.wait_for(1);
        assert_eq!(setup.keys.count(), before);
        setup.sim.world.kms.answer(Answer::Real);
        let back = scope.spawn(|| logstores[0].revalidate_now());
        eventually("the key is back", || try_put(&logstores[0], "two").is_ok());
        buffer(&logstores[0], "three");
        assert_ne!(setup.keys.count(), before);
        setup.refuse();
        let second = scope.spawn(|| logstores[0].revalidate_now());
        eventually("everything is wiped", || setup.keys.count() == before);
        assert!(!first.is_finished() && !back.is_finished() && !second.is_finished());
        on.store(false, Ordering::SeqCst);
        hang.release();
        for noticed in [first, back, second] {
            let _ = noticed.join().unwrap();
        }
    });
    let events: Vec<_> = setup.store.keys().audit_records().unwrap();
    let of_first =
        |event: &envelog::audit::AuditRecord| event.logstore.as_ref() == Some(logstores[0].name());
    let events: Vec<_> =
        events.iter().filter(|event| of_first(event)).map(|one| one.event).collect();
    use AuditEvent::{Created, Recovered, Revoked};
    assert_eq!(events, [Created, Revoked, Recovered, Revoked]);
    setup.give_back(&logstores[0]);
    setup.check(&[(&logstores[0], &["one", "two", "three"]), (&logstores[1], &["one"])]);
}

/// Without threads, the caller seals one shard after the other. The deadline passes in one of them.
#[test]
fn without_threads_the_rest_is_wiped_after_the_deadline() {
    const COUNT: usize = 10;
    // In an fsync every group is in a block already; in a write, only those before it are.
    for (op, slow, in_blocks) in [(Op::Sync, 1, COUNT), (Op::Write, 4, 4)] {
        let setup = Setup::new(Background::Manual);
        let before = setup.keys.count();
        let logstores = setup.logstores(COUNT);
        for logstore in &logstores {
            put(logstore, "synced");
            buffer(logstore, "buffered");
        }
        let (clock, timeout) = (Arc::clone(&setup.sim.world.clock), setup.kms_timeout());
        let mut calls = 0;
        setup.sim.disk.on_call(move |call| {
            calls += u32::from(call.op == op && call.is_about(".seg"));
            if calls == slow {
                clock.advance(timeout);
            }
            Verdict::Go
        });
        setup.refuse();
        assert_revoked(logstores[0].revalidate_now(), Disabled);
        setup.sim.disk.heal();
        assert_eq!(setup.keys.count(), before);
        let lost: Vec<_> = logstores[in_blocks..]
            .iter()
            .map(|one| format!("{}: shard 0: 1 group, sequence numbers 1 to 1", one.name()))
            .collect();
        assert_eq!((setup.lost(), setup.lost_on_record()), (lost.len() as u64, lost));
        setup.give_back(&logstores[0]);
        logstores.iter().for_each(|logstore| put(logstore, "after"));
        let expected = |n| -> &[&str] {
            if n < in_blocks { &["synced", "buffered", "after"] } else { &["synced", "after"] }
        };
        let expected: Vec<_> =
            logstores.iter().enumerate().map(|(n, one)| (one, expected(n))).collect();
        setup.check(&expected);
    }
}

/// Without threads of its own, the store does not wait for a thread of the embedder either.
#[test]
fn without_threads_the_deadline_waits_for_no_other_thread() {
    let setup = Setup::new(Background::Manual);
    let before = setup.keys.count();
    let logstore = setup.logstore("p/l", 1);
    put(&logstore, "synced");
    let (hang, on) = setup.hang(is_sync_of_a_segment);
    thread::scope(|scope| {
        let leader = scope.spawn(|| try_put(&logstore, "hangs"));
        hang.wait_for(1);
        buffer(&logstore, "queued");
        setup.lose(&logstore, || {});
        assert_eq!((setup.keys.count(), setup.lost()), (before, 1));
        on.store(false, Ordering::SeqCst);
        setup.give_back(&logstore);
        put(&logstore, "after");
        hang.release();
        assert_revoked(leader.join().unwrap(), Disabled);
    });
    setup.check(&[(&logstore, &["synced", "hangs", "after"])]);
}

/// How often a text is in the memory of this process. The text is given with each bit inverted, so
/// that the search does not find itself.
#[cfg(target_os = "linux")]
fn times_in_memory(inverted: &[u8]) -> usize {
    let mut times = 0;
    common::process::each_region(std::process::id(), |_, bytes| {
        let first = !inverted[0];
        let found = memchr::memchr_iter(first, bytes).filter(|&at| {
            let there = bytes.get(at..at + inverted.len());
            there.is_some_and(|there| there.iter().zip(inverted).all(|(a, b)| *a == !*b))
        });
        times += found.count();
    });
    times
}

/// The groups that miss the deadline leave no plaintext: neither in the queue, nor in the batch of a
/// thread that was in a system call.
#[cfg(target_os = "linux")]
#[test]
fn no_plaintext_is_left_behind() {
    let setup = Setup::threads();
    let logstore = setup.logstore("p/l", 1);
    put(&logstore, "synced");
    let inverted = |n: u8| -> Vec<u8> { (0..64).map(|i: u8| !(i.wrapping_mul(37) ^ n)).collect() };
    // Moved into the payload: there is no other copy.
    let payload = |n: u8| {
        let bytes: Vec<u8> = inverted(n).into_iter().map(|byte| !byte).collect();
        Payload::opaque(Bytes::from(bytes)).unwrap()
    };
    logstore.append(payload(0xa1), &buffered()).unwrap();
    let (hang, on) = setup.hang(|call| call.op == Op::Write && call.is_about(".seg"));
    thread::scope(|scope| {
        let leader = scope.spawn(|| logstore.sync());
        hang.wait_for(1);
        logstore.append(payload(0xb2), &buffered()).unwrap();
        let (in_hand, queued) = (inverted(0xa1), inverted(0xb2));
        assert!(times_in_memory(&in_hand) > 0 && times_in_memory(&queued) > 0);
        setup.lose(&logstore, || {});
        assert_eq!(times_in_memory(&queued), 0);
        on.store(false, Ordering::SeqCst);
        hang.release();
        assert_revoked(leader.join().unwrap(), Disabled);
        assert_eq!(times_in_memory(&in_hand), 0);
    });
    assert_eq!(setup.lost(), 1);
}
