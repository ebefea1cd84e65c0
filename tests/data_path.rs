//! The write path: group commit, lingering, bounded memory, tickets, rolling, retention, shards.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc, Barrier, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread,
    time::Duration,
};

use common::{
    disk::{Op, Sim, SimDisk, Verdict},
    *,
};
use envelog::{
    AppendOptions, Appended, Background, Durability, Error, Logstore, LogstoreConfig, LogstoreSpec,
    Payload, ShardChoice, Ticket, io::Clock,
};

/// The numbers of block writes and of syncs on segment files since the previous call.
fn writes_and_syncs(disk: &SimDisk) -> (usize, usize) {
    let calls = disk.take_calls();
    let count = |op: Op| calls.iter().filter(|call| call.op == op && call.is_about(".seg")).count();
    (count(Op::Write), count(Op::Sync))
}

fn opaque(bytes: usize) -> Payload {
    Payload::opaque(vec![b'x'; bytes]).unwrap()
}

// ---- group commit ----

/// Counts reads of the wall clock. Each group reads it once when it is queued, before a leader can
/// take the group.
#[derive(Debug)]
struct CountingClock {
    clock: Arc<TestClock>,
    reads: Arc<AtomicU64>,
}

impl Clock for CountingClock {
    fn wall_us(&self) -> u64 {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.clock.wall_us()
    }

    fn uptime(&self) -> Duration {
        self.clock.uptime()
    }
}

#[test]
fn callers_that_wait_at_once_share_a_block_and_a_sync() {
    const CALLERS: u64 = 8;
    let sim = Sim::new();
    let reads = Arc::new(AtomicU64::new(0));
    let clock = CountingClock { clock: sim.world.clock.clone(), reads: reads.clone() };
    let store = sim.builder().clock(Arc::new(clock)).create().unwrap();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "the segment is there");
    writes_and_syncs(&sim.disk);
    // Delay the first block until all other callers have queued their groups.
    let (began, queued) = (reads.load(Ordering::SeqCst), reads.clone());
    let mut first = true;
    sim.disk.on_call(move |call| {
        if call.op == Op::Write && std::mem::take(&mut first) {
            while queued.load(Ordering::SeqCst) < began + CALLERS {
                thread::yield_now();
            }
        }
        Verdict::Go
    });
    let mut seqs: Vec<u64> = thread::scope(|scope| {
        let append = |n: u64| logstore.append(record(&n.to_string()), &synced()).unwrap().seq;
        let callers: Vec<_> = (0..CALLERS).map(|n| scope.spawn(move || append(n))).collect();
        callers.into_iter().map(|caller| caller.join().unwrap()).collect()
    });
    seqs.sort_unstable();
    assert_eq!(seqs, (1..=CALLERS).collect::<Vec<_>>());
    assert_eq!(
        writes_and_syncs(&sim.disk),
        (2, 2),
        "one block and sync of the first, one of the other seven"
    );
    assert_eq!(texts(&logstore).len(), 9);
}

#[test]
fn tickets_of_many_threads_become_one_block() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "the segment is there");
    writes_and_syncs(&sim.disk);
    let barrier = Barrier::new(16);
    thread::scope(|scope| {
        for n in 0..16 {
            let (logstore, barrier) = (&logstore, &barrier);
            scope.spawn(move || {
                let ticket = logstore.submit(record(&n.to_string()), &synced()).unwrap();
                barrier.wait();
                ticket.wait().unwrap()
            });
        }
    });
    assert_eq!(writes_and_syncs(&sim.disk), (1, 1));
    // Groups and opaque records never share a block, and a block has a maximum size.
    let tickets: Vec<Ticket> = vec![
        logstore.submit(record("opaque"), &synced()).unwrap(),
        logstore.submit(group("g", 2), &synced()).unwrap(),
        logstore.submit(group("h", 2), &synced()).unwrap(),
        logstore.submit(opaque(200 << 10), &synced()).unwrap(),
        logstore.submit(opaque(100 << 10), &synced()).unwrap(),
        logstore.submit(opaque(3 << 20), &synced()).unwrap(),
    ];
    for ticket in tickets.into_iter().rev() {
        ticket.wait().unwrap();
    }
    assert_eq!(writes_and_syncs(&sim.disk), (5, 1));
}

// ---- lingering ----

#[test]
fn a_partial_batch_lingers_and_a_full_one_does_not() {
    let sim = Sim::new();
    let store = sim.create();
    assert_eq!(store.options().linger, millis(100));
    let logstore = sim.world.service(&store, "p/l");
    let tick = |by: u64| {
        sim.world.clock.advance(millis(by));
        store.tick();
        texts(&logstore).len()
    };
    logstore.append(record("a"), &buffered()).unwrap();
    assert_eq!(tick(60), 0);
    logstore.append(record("b"), &buffered()).unwrap();
    // 100 ms after the first group of the batch, not after the last.
    assert_eq!(tick(39), 0);
    assert_eq!(tick(1), 2);
    assert_eq!(tick(1000), 2);
    logstore.append(record("c"), &buffered()).unwrap();
    assert_eq!(tick(99), 2);
    assert_eq!(tick(1), 3);
    // A full block does not linger, and neither does a group that a caller waits for.
    logstore.append(opaque(store.options().block_bytes), &buffered()).unwrap();
    assert_eq!(tick(0), 4);
    let ticket = logstore.submit(record("d"), &written()).unwrap();
    assert!(!ticket.is_done());
    assert_eq!(tick(0), 5);
    assert!(ticket.is_done());
    // A waiting append also writes the groups queued before it.
    logstore.append(record("e"), &buffered()).unwrap();
    logstore.append(record("f"), &written()).unwrap();
    assert_eq!(tick(0), 7);
}

#[test]
fn threads_write_a_partial_batch_by_themselves() {
    let world = World::threads();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    logstore.append(record("a"), &buffered()).unwrap();
    eventually("it is written", || texts(&logstore) == ["a"]);
    let ticket = logstore.submit(record("b"), &synced()).unwrap();
    eventually("the ticket is done", || ticket.is_done());
}

// ---- bounded memory ----

#[test]
fn a_full_pipeline_refuses_tickets_and_blocks_submit() {
    let mut sim = Sim::new();
    sim.world.options.pending_bytes_max = 1 << 20;
    let store = sim.create();
    let (a, b) = (sim.world.service(&store, "p/a"), sim.world.service(&store, "p/b"));
    for _ in 0..4 {
        drop(a.try_submit(opaque(255 << 10), &buffered()).unwrap());
    }
    // The bound applies to the whole store, but for one group of each shard. A refused group is not
    // stored.
    drop(b.try_submit(opaque(8 << 10), &buffered()).unwrap());
    for logstore in [&a, &b] {
        for durability in [Durability::Buffered, Durability::Synced] {
            match logstore
                .try_submit(opaque(8 << 10), &AppendOptions::default().durability(durability))
            {
                Err(Error::Full { pending }) => {
                    assert!(
                        (4 * (255 << 10)..=(1 << 20) + (9 << 10)).contains(&pending),
                        "{pending}"
                    )
                }
                other => panic!("{other:?}"),
            }
        }
    }
    assert_eq!(records(&b, 0).unwrap().len() + records(&a, 0).unwrap().len(), 0);
    // The blocking form waits for room.
    drop(b.submit(opaque(8 << 10), &buffered()).unwrap());
    assert_eq!(records(&a, 0).unwrap().len(), 4);
    drop(a.try_submit(opaque(512 << 10), &buffered()).unwrap());
    a.sync().unwrap();
    b.sync().unwrap();
    // A group larger than the bound is accepted when no other group is pending.
    drop(a.try_submit(opaque(3 << 20), &buffered()).unwrap());
    drop(b.try_submit(record("x"), &buffered()).unwrap());
    assert!(
        matches!(b.try_submit(record("y"), &buffered()), Err(Error::Full { pending }) if pending >= 3 << 20)
    );
    a.sync().unwrap();
    b.append(record("z"), &synced()).unwrap();
    assert_eq!((records(&a, 0).unwrap().len(), records(&b, 0).unwrap().len()), (6, 4));
}

/// A gate that blocks operations of a disk.
#[derive(Default)]
struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn set(&self, open: bool) {
        *self.open.lock().unwrap() = open;
        self.changed.notify_all();
    }

    fn pass(&self) {
        drop(self.changed.wait_while(self.open.lock().unwrap(), |open| !*open).unwrap());
    }
}

/// Opens the gate when the test ends, also by a panic: a thread blocked at the gate would prevent
/// closing the store.
struct OpenAtLast(Arc<Gate>);

impl Drop for OpenAtLast {
    fn drop(&mut self) {
        self.0.set(true);
    }
}

#[test]
fn appends_wait_while_the_disk_does_not_keep_up() {
    let mut sim = Sim::new();
    sim.world.options.background = Background::Threads;
    sim.world.options.pending_bytes_max = 1 << 20;
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "the segment is there");
    let gate = OpenAtLast(Arc::new(Gate::default()));
    let passing = gate.0.clone();
    sim.disk.on_call(move |call| {
        if call.op == Op::Write {
            passing.pass();
        }
        Verdict::Go
    });
    for _ in 0..4 {
        drop(logstore.try_submit(opaque(255 << 10), &buffered()).unwrap());
    }
    let returned = AtomicBool::new(false);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let appended = logstore.append(opaque(8 << 10), &buffered()).unwrap();
            returned.store(true, Ordering::SeqCst);
            appended
        });
        assert!(matches!(
            logstore.try_submit(opaque(8 << 10), &buffered()),
            Err(Error::Full { .. })
        ));
        assert!(!returned.load(Ordering::SeqCst), "nothing can have made room for it");
        gate.0.set(true);
        assert_eq!(waiting.join().unwrap().seq, 5);
    });
    logstore.sync().unwrap();
    assert_eq!(records(&logstore, 0).unwrap().len(), 6);
}

// ---- tickets ----

#[derive(Default)]
struct CountingWaker(AtomicU64);

impl Wake for CountingWaker {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

fn poll(ticket: &mut Ticket, waker: &Arc<CountingWaker>) -> Poll<Result<Appended, Error>> {
    Pin::new(ticket).poll(&mut Context::from_waker(&Waker::from(waker.clone())))
}

#[test]
fn tickets_are_futures() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    let wakers: Vec<Arc<CountingWaker>> = (0..3).map(|_| Arc::default()).collect();
    let mut tickets: Vec<Ticket> =
        (0..3).map(|n| logstore.submit(record(&n.to_string()), &synced()).unwrap()).collect();
    for (ticket, waker) in tickets.iter_mut().zip(&wakers) {
        assert!(poll(ticket, waker).is_pending());
        assert!(poll(ticket, waker).is_pending());
    }
    // A dropped ticket gets no result, but its group is written.
    let dropped = tickets.pop().unwrap().appended().unwrap();
    store.tick();
    for (n, (ticket, waker)) in (0..).zip(tickets.iter_mut().zip(&wakers)) {
        assert!(waker.0.load(Ordering::SeqCst) > 0, "it is woken");
        assert!(ticket.is_done());
        match poll(ticket, waker) {
            Poll::Ready(Ok(appended)) => assert_eq!((appended.shard, appended.seq), (0, n)),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(dropped.seq, 2);
    assert_eq!(texts(&logstore), ["0", "1", "2"]);
    // A buffered append completes immediately.
    let mut ticket = logstore.submit(record("3"), &buffered()).unwrap();
    assert!(matches!(poll(&mut ticket, &wakers[0]), Poll::Ready(Ok(Appended { seq: 3, .. }))));
    // A failure also wakes the tickets, and each affected ticket gets it.
    let mut failing: Vec<Ticket> = [written(), synced()]
        .iter()
        .map(|options| logstore.submit(record("lost"), options).unwrap())
        .collect();
    let waker = Arc::new(CountingWaker::default());
    for ticket in &mut failing {
        assert!(poll(ticket, &waker).is_pending());
    }
    sim.disk.fail_next(Op::Write, ".seg", io::ErrorKind::StorageFull);
    store.tick();
    assert!(waker.0.load(Ordering::SeqCst) > 0);
    for ticket in &mut failing {
        match poll(ticket, &waker) {
            Poll::Ready(Err(error)) => assert_eq!(error.code(), "disk_full", "{error}"),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(texts(&logstore), ["0", "1", "2"]);
}

#[test]
fn a_failed_sync_fails_only_the_tickets_that_asked_for_it() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "before");
    let was_written = logstore.submit(record("written"), &written()).unwrap();
    let was_synced = logstore.submit(record("synced"), &synced()).unwrap();
    sim.disk.fail_next(Op::Sync, ".seg", io::ErrorKind::Other);
    store.tick();
    was_written.wait().unwrap();
    let error = was_synced.wait().unwrap_err();
    assert!(matches!(&error, Error::Latched { .. }), "{error}");
    // A later success does not change the result of a failed ticket.
    logstore.reopen_shard(0).unwrap();
    put(&logstore, "after");
    assert_eq!(texts(&logstore), ["before", "written", "synced", "after"]);
}

#[test]
fn handles_refuse_once_the_store_is_closed() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    let ticket = logstore.submit(record("in time"), &synced()).unwrap();
    let mut reader = logstore.read(0, &envelog::ReadOptions::default()).unwrap();
    store.clone().close().unwrap();
    // The group was pending, and closing wrote it.
    assert_eq!(ticket.wait().unwrap().seq, 0);
    assert!(matches!(try_put(&logstore, "late"), Err(Error::Closed(_))));
    assert!(matches!(try_texts(&logstore), Err(Error::Closed(_))));
    assert!(matches!(reader.next(), Some(Err(Error::Closed(_)))));
    assert!(matches!(
        store.create_logstore(&name("p/n"), LogstoreSpec::default()),
        Err(Error::Closed(_))
    ));
    assert!(matches!(store.logstore(logstore.name()), Err(Error::Closed(_))));
    assert_eq!(texts(&sim.open().logstore(&name("p/l")).unwrap()), ["in time"]);
}

/// Dropping the last handle closes the store cleanly.
#[test]
fn dropping_every_handle_closes_the_store() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    logstore.append(record("buffered"), &buffered()).unwrap();
    drop(store);
    assert!(
        matches!(sim.builder().open(), Err(Error::Locked { .. })),
        "the Logstore keeps it open"
    );
    drop(logstore);
    let logstore = sim.open().logstore(&name("p/l")).unwrap();
    assert_eq!(logstore.append(record("next"), &synced()).unwrap().seq, 1);
    assert_eq!(texts(&logstore), ["buffered", "next"]);
}

// ---- rolling ----

#[test]
fn segments_roll_by_bytes_and_by_age() {
    let mut sim = Sim::new();
    sim.world.options.segment_bytes = 64 << 10;
    let store = sim.create();
    let spec = LogstoreSpec::default().compression(envelog::Compression::None);
    let logstore = store.create_logstore(&name("p/l"), spec).unwrap();
    let segments = || sim.segments(&logstore, 0).len();
    for n in 1..=5usize {
        // The second record fills the segment. The next append detects this.
        logstore.append(opaque(40 << 10), &written()).unwrap();
        assert_eq!(segments(), n.div_ceil(2));
    }
    // By age: the segment is sealed when it is old enough, but only if it contains data.
    let sealed = |logstore: &Logstore| {
        sim.builder().open_read_only().unwrap().logstore(logstore.name()).unwrap()
    };
    let count = segments();
    let age = store.options().segment_age;
    for (step, passed) in [(age - secs(1), false), (secs(1), true), (age, true), (age, true)] {
        let last = sim.segments(&logstore, 0).pop().unwrap();
        let before = sim.disk.bytes(&last).len();
        sim.world.clock.advance(step);
        store.tick();
        assert_eq!(segments(), count);
        let grown = sim.disk.bytes(&last).len() > before;
        assert_eq!(grown, step == secs(1), "it gets its footer then, and only then ({passed})");
    }
    put(&logstore, "in the next");
    assert_eq!(segments(), count + 1);
    assert_eq!(records(&sealed(&logstore), 0).unwrap().len(), 6);
    // Without a tick, the next append finds the segment too old and rolls it.
    sim.world.clock.advance(age);
    put(&logstore, "in the one after");
    assert_eq!(segments(), count + 2);
    // On request, and without data to seal.
    logstore.roll().unwrap();
    logstore.roll().unwrap();
    assert_eq!(segments(), count + 2);
}

// ---- retention ----

fn seqs(logstore: &Logstore) -> Vec<u64> {
    records(logstore, 0).unwrap().iter().map(|record| record.seq).collect()
}

fn with_retention(
    logstore: &Logstore,
    ttl_days: Option<u32>,
    retention_bytes: Option<u64>,
) -> LogstoreConfig {
    logstore.config().ttl_days(ttl_days).retention_bytes(retention_bytes)
}

#[test]
fn retention_by_time_drops_whole_segments_only() {
    let mut sim = Sim::new();
    // Prevent automatic rolls: the test gives each segment its own day.
    sim.world.options.segment_age = 1000 * DAY;
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    // Segment n: one record at the beginning of day n, one at its end. The last segment is not
    // sealed.
    for day in 0..4 {
        put(&logstore, "morning");
        sim.world.clock.advance(23 * secs(3600));
        put(&logstore, "evening");
        if day < 3 {
            logstore.roll().unwrap();
        }
        sim.world.clock.advance(secs(3600));
    }
    assert_eq!(store.admin().apply_retention().unwrap().segments, 0, "kept for ever");
    store.update_logstore(logstore.name(), with_retention(&logstore, Some(3), None)).unwrap();
    // The newest record of the first day is three days and an hour old. That of the second day is
    // younger than three days.
    assert_eq!(store.admin().apply_retention().unwrap().segments, 1);
    assert_eq!(seqs(&logstore), [2, 3, 4, 5, 6, 7]);
    sim.world.clock.advance(23 * secs(3600) - millis(1));
    assert_eq!(store.admin().apply_retention().unwrap().segments, 0);
    sim.world.clock.advance(millis(2));
    // Automatically, when the next run is due.
    sim.world.clock.advance(store.options().retention_every);
    store.tick();
    assert_eq!(seqs(&logstore), [4, 5, 6, 7]);
    assert_eq!(sim.segments(&logstore, 0).len(), 2);
    // Regardless of age, the open segment is not dropped.
    sim.world.clock.advance(2 * DAY);
    assert_eq!(store.admin().apply_retention().unwrap().segments, 1);
    assert_eq!(seqs(&logstore), [6, 7]);
    // Dropped numbers are not reused, even after the last segment is dropped.
    logstore.roll().unwrap();
    sim.world.clock.advance(10 * DAY);
    assert_eq!(store.admin().apply_retention().unwrap().segments, 1);
    store.close().unwrap();
    let store = sim.open();
    let logstore = store.logstore(&name("p/l")).unwrap();
    assert_eq!(seqs(&logstore), [0; 0]);
    put(&logstore, "later");
    assert_eq!(seqs(&logstore), [8]);
}

#[test]
fn retention_by_bytes_drops_the_oldest_segments_of_each_shard() {
    let sim = Sim::new();
    let store = sim.create();
    let spec = LogstoreSpec::default().shard_count(2).compression(envelog::Compression::None);
    let logstore = store.create_logstore(&name("p/l"), spec).unwrap();
    for n in 0..8 {
        let options = written().shard(ShardChoice::Shard(u32::from(n >= 5)));
        logstore.append(opaque(10_000), &options).unwrap();
        logstore.roll().unwrap();
    }
    let sizes = |shard| -> Vec<u64> {
        sim.segments(&logstore, shard)
            .iter()
            .map(|path| sim.disk.bytes(path).len() as u64)
            .collect()
    };
    let (first, second) = (sizes(0), sizes(1));
    assert_eq!((first.len(), second.len()), (5, 3));
    let keep: u64 = first[1..].iter().sum();
    store.update_logstore(logstore.name(), with_retention(&logstore, None, Some(keep))).unwrap();
    let report = store.admin().apply_retention().unwrap();
    assert_eq!((report.segments, report.bytes, report.suspended), (1, first[0], false));
    assert_eq!((sizes(0), sizes(1)), (first[1..].to_vec(), second.clone()));
    // One byte less than the size of the kept segments drops one more.
    store
        .update_logstore(logstore.name(), with_retention(&logstore, None, Some(keep - 1)))
        .unwrap();
    assert_eq!(store.admin().apply_retention().unwrap().segments, 1);
    store.update_logstore(logstore.name(), with_retention(&logstore, None, Some(1))).unwrap();
    put(&logstore, "being written");
    // The newest segment of a shard stays, whether it is being written or not.
    assert_eq!(store.admin().apply_retention().unwrap().segments, 5);
    assert_eq!(sizes(0).len() + sizes(1).len(), 2);
}

// ---- deleting ----

#[test]
fn deleting_leaves_no_file_and_the_name_is_free() {
    let sim = Sim::new();
    let store = sim.create();
    let kept = sim.world.service(&store, "p/kept");
    put(&kept, "kept");
    let before = sim.disk.files(&sim.world.store_dir().join("logstores"));
    let spec = LogstoreSpec::default().shard_count(3);
    let doomed = store.create_logstore(&name("p/l"), spec.clone()).unwrap();
    for _ in 0..6 {
        put(&doomed, "doomed");
    }
    doomed.append(record("queued"), &buffered()).unwrap();
    let mut reader = doomed.read(0, &envelog::ReadOptions::default()).unwrap();
    store.delete_logstore(doomed.name()).unwrap();
    assert_eq!(sim.disk.files(&sim.world.store_dir().join("logstores")), before);
    assert!(matches!(try_put(&doomed, "late"), Err(Error::Closed(_))));
    assert!(matches!(reader.next(), Some(Err(Error::Closed(_)))));
    assert!(matches!(store.delete_logstore(doomed.name()), Err(Error::LogstoreMissing(_))));
    // A new Logstore with the same name starts empty.
    let again = store.create_logstore(&name("p/l"), spec).unwrap();
    assert_ne!(again.id(), doomed.id());
    assert_eq!(again.append(record("new"), &synced()).unwrap().seq, 0);
    assert_eq!((texts(&again), texts(&kept)), (vec!["new".into()], vec!["kept".into()]));
    store.close().unwrap();
    assert_eq!(sim.open().list().unwrap(), [name("p/kept"), name("p/l")]);
}

// ---- shards ----

#[test]
fn hash_keys_choose_the_shard_that_owns_them() {
    let sim = Sim::new();
    let store = sim.create();
    for count in [1, 3, 8] {
        let spec = LogstoreSpec::default().shard_count(count);
        let logstore = store.create_logstore(&name(&format!("p/l{count}")), spec).unwrap();
        let shards = logstore.config().shards;
        let mut expected = BTreeMap::new();
        let edges = shards.iter().map(|shard| u128::from_str_radix(&shard.begin_key, 16).unwrap());
        let keys = edges.flat_map(|edge| [edge.saturating_sub(1), edge, edge + 1]).chain([
            0,
            u128::MAX - 1,
            u128::MAX,
        ]);
        for key in keys {
            let owner = shards.iter().find(|shard| shard.owns(key)).unwrap().id;
            let options = written().shard(ShardChoice::HashKey(key));
            let appended = logstore.append(record(&format!("{key:x}")), &options).unwrap();
            assert_eq!(appended.shard, owner, "{key:x} of {count}");
            expected.entry(owner).or_insert_with(Vec::new).push(format!("{key:x}"));
        }
        assert_eq!(expected.len(), count as usize, "every shard has had some");
        for (shard, expected) in expected {
            assert_eq!(strings(&records(&logstore, shard).unwrap()), expected);
        }
    }
}

#[test]
fn round_robin_spreads_evenly_and_numbers_are_the_shards_own() {
    let sim = Sim::new();
    let store = sim.create();
    let spec = LogstoreSpec::default().shard_count(4);
    let logstore = store.create_logstore(&name("p/l"), spec).unwrap();
    let appended: Vec<(u32, u64)> = (0..12)
        .map(|n| logstore.append(record(&n.to_string()), &written()).unwrap())
        .map(|appended| (appended.shard, appended.seq))
        .collect();
    let expected: Vec<(u32, u64)> = (0..12).map(|n| (n % 4, u64::from(n / 4))).collect();
    assert_eq!(appended, expected);
    let options = written().shard(ShardChoice::Shard(4));
    let error = logstore.append(record("x"), &options).unwrap_err();
    assert!(matches!(error, Error::ShardMissing { shard: 4, .. }));
}
