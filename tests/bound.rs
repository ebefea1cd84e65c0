//! The bound on revocation, and a hung KMS beside healthy tenants: an answer counts from when its
//! call was sent, and the key of one tenant delays no other tenant.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use common::*;
use envelog::{
    Cmk, Error, Logstore, Payload, ReadOptions, Store,
    crypto::SecretKey,
    kms::{Kms, KmsCall, KmsError, RevokedReason::Disabled},
};

/// Keeps the answer to the next unwrap of a probe until the test releases it.
#[derive(Debug)]
struct SlowAnswers {
    kms: Arc<TestKms>,
    state: Mutex<Held>,
    changed: Condvar,
}

#[derive(Debug, PartialEq)]
enum Held {
    No,
    Next,
    /// The KMS has answered, and the answer is on its way.
    Answered,
}

impl SlowAnswers {
    fn new(world: &World) -> Arc<Self> {
        let (kms, state) = (Arc::clone(&world.kms), Mutex::new(Held::No));
        Arc::new(Self { kms, state, changed: Condvar::new() })
    }

    fn set(&self, to: Held) {
        *self.state.lock().unwrap() = to;
        self.changed.notify_all();
    }

    fn wait_for_the_answer(&self) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |state| *state != Held::Answered).unwrap());
    }
}

impl Kms for SlowAnswers {
    fn name(&self) -> &str {
        self.kms.name()
    }

    fn serves(&self, region_id: &str) -> bool {
        self.kms.serves(region_id)
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        self.kms.wrap(call, key)
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        let answer = self.kms.unwrap(call, wrapped);
        let mut state = self.state.lock().unwrap();
        if *state == Held::Next {
            *state = Held::Answered;
            self.changed.notify_all();
            drop(self.changed.wait_while(state, |state| *state == Held::Answered).unwrap());
        }
        answer
    }
}

/// A store with threads and a clock of the test, whose KMS keeps answers back.
fn with_slow_answers(world: &World) -> (Arc<SlowAnswers>, Store) {
    let kms = SlowAnswers::new(world);
    let builder = Store::builder(world.store_dir(), world.keyring(), Provider::new());
    let builder = builder.kms(Arc::clone(&kms) as _).options(world.options);
    (kms, builder.clock(Arc::clone(&world.clock) as _).create().unwrap())
}

/// A call that is older than its time limit is not joined, and its answer is not the answer to a
/// later operation.
#[test]
fn an_operation_takes_no_answer_from_before_the_revocation() {
    let mut world = World::threads();
    world.options.kms_timeout = secs(10);
    let (kms, store) = with_slow_answers(&world);
    let logstore = world.byok(&store, "p/l", &world.cmk());
    put(&logstore, "first");
    let mut reader = logstore.read(0, &ReadOptions::default()).unwrap();

    // The last answer is too old. The next operation calls the KMS, which says yes. Then the
    // customer revokes, and the machine is suspended while the answer is on its way.
    world.clock.advance(secs(41));
    kms.set(Held::Next);
    thread::scope(|threads| {
        threads.spawn(|| try_put(&logstore, "began before the revocation"));
        kms.wait_for_the_answer();
        world.kms.answer(Answer::Revoked(Disabled));
        world.clock.advance(secs(200));
        let later = threads.spawn(|| reader.next_block());
        let also = threads.spawn(|| try_put(&logstore, "x"));
        let read = later.join().unwrap();
        assert!(matches!(read, Err(Error::Revoked { .. })), "{read:?}");
        assert!(matches!(also.join().unwrap(), Err(Error::Revoked { .. })));
        kms.set(Held::No);
    });
    assert!(matches!(try_put(&logstore, "x"), Err(Error::Revoked { .. })));
}

/// An operation that joined a call in time looks at the age of its answer when it arrives.
#[test]
fn an_answer_that_is_too_old_on_arrival_does_not_count() {
    let mut world = World::threads();
    world.options.kms_timeout = secs(10);
    let (kms, store) = with_slow_answers(&world);
    let logstore = world.byok(&store, "p/l", &world.cmk());
    put(&logstore, "first");
    world.clock.advance(secs(41));
    kms.set(Held::Next);
    thread::scope(|threads| {
        let joined = threads.spawn(|| try_put(&logstore, "x"));
        kms.wait_for_the_answer();
        world.kms.answer(Answer::Revoked(Disabled));
        world.clock.advance(secs(200));
        kms.set(Held::No);
        let joined = joined.join().unwrap();
        assert!(matches!(joined, Err(Error::Revoked { .. })), "{joined:?}");
    });
}

// ---- a hung KMS beside other tenants ----

/// Moves the clock with the real time, as long as it lives.
struct Ticking(Arc<AtomicBool>, Option<thread::JoinHandle<()>>);

impl Ticking {
    fn new(world: &World) -> Self {
        let (clock, stop) = (Arc::clone(&world.clock), Arc::new(AtomicBool::new(false)));
        let stopped = Arc::clone(&stop);
        let tick = move || {
            while !stopped.load(Ordering::SeqCst) {
                thread::sleep(millis(5));
                clock.advance(millis(5));
            }
        };
        Self(stop, Some(thread::spawn(tick)))
    }
}

impl Drop for Ticking {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
        let _ = self.1.take().unwrap().join();
    }
}

/// A Logstore under the service key beside four under a master key whose KMS hangs for as long as
/// the test runs. Each of the four has a group that waits for the KMS.
struct Beside {
    world: World,
    store: Store,
    victim: Logstore,
    hung: Vec<Logstore>,
    cmk: Cmk,
}

impl Beside {
    fn new(pending_bytes_max: usize) -> Self {
        let mut world = World::threads();
        world.options.kms_timeout = secs(60);
        world.options.outage_grace = secs(24 * 3600);
        world.options.pending_bytes_max = pending_bytes_max;
        let store = world.builder().clock(Arc::clone(&world.clock) as _).create().unwrap();
        let victim = world.service(&store, "p/victim");
        let cmk = world.cmk();
        let hung: Vec<_> =
            (0..4).map(|n| world.byok(&store, &format!("p/hung{n}"), &cmk)).collect();
        for logstore in hung.iter().chain([&victim]) {
            put(logstore, "first");
        }
        Self { world, store, victim, hung, cmk }
    }

    /// From now on, the KMS does not answer. `fill` appends to the hung Logstores just before the
    /// last answer becomes too old.
    fn hang(&self, fill: impl Fn(&Logstore)) {
        self.world.kms.answer_for_master_key(&self.cmk.cmk_key_id, Answer::Hang);
        self.hung.iter().for_each(fill);
        self.world.clock.advance(secs(91));
    }
}

/// The workers of the store wait for no KMS.
#[test]
fn a_hung_key_delays_no_buffered_group_of_another_logstore() {
    let beside = Beside::new(64 << 20);
    beside.hang(|logstore| {
        logstore.append(record("waits"), &buffered()).unwrap();
    });
    let ticking = Ticking::new(&beside.world);
    let end = beside.victim.end_seq(0).unwrap();
    beside.victim.append(record("does not wait"), &buffered()).unwrap();
    eventually("the group is written", || beside.victim.end_seq(0).unwrap() > end);
    drop(ticking);
    beside.world.kms.answer(Answer::Real);
    for logstore in &beside.hung {
        logstore.sync().unwrap();
        assert_eq!(texts(logstore), ["first", "waits"]);
    }
    beside.store.close().unwrap();
}

/// The leases are in force, and the KMS hangs over the data keys alone: those of a rotation are in
/// no memory yet, and groups wait for them.
#[test]
fn a_hung_data_key_delays_no_buffered_group_of_another_logstore() {
    end_if_a_worker_panics();
    let beside = Beside::new(64 << 20);
    for logstore in &beside.hung {
        logstore.append(record("waits"), &buffered()).unwrap();
        beside.store.keys().rotate_data_key(logstore.name()).unwrap();
    }
    beside.world.kms.answer_for_data_keys(Answer::Hang);
    let asked = || beside.world.kms.calls_about(&beside.cmk.cmk_key_id);
    let before = asked();
    let ticking = Ticking::new(&beside.world);
    // There are two workers, and the threads for this are two.
    eventually("groups wait for the KMS", || asked() >= before + 2);
    let end = beside.victim.end_seq(0).unwrap();
    beside.victim.append(record("does not wait"), &buffered()).unwrap();
    eventually("the group is written", || beside.victim.end_seq(0).unwrap() > end);
    // No refusal reaches an acknowledged group, and the background writes all of them.
    beside.world.kms.answer(Answer::Real);
    for logstore in &beside.hung {
        eventually("the groups are written", || texts(logstore) == ["first", "waits"]);
    }
    drop(ticking);
    beside.store.close().unwrap();
}

/// A Logstore whose KMS hangs may use up the memory budget. A shard without a waiting group goes
/// on.
#[test]
fn a_hung_key_takes_no_memory_that_another_logstore_needs() {
    let beside = Beside::new(1 << 20);
    let big = || Payload::opaque(vec![7; 400 << 10]).unwrap();
    // Four groups are more than the budget, and each waits for the KMS.
    beside.hang(|logstore| drop(logstore.append(big(), &buffered())));
    put(&beside.victim, "synced");
    assert_eq!(texts(&beside.victim), ["first", "synced"]);
    beside.world.kms.answer(Answer::Real);
}

#[test]
fn a_panic_in_a_backend_is_told_from_a_time_out() {
    #[derive(Debug)]
    struct Panics(Arc<TestKms>, AtomicBool);
    impl Kms for Panics {
        fn name(&self) -> &str {
            self.0.name()
        }
        fn serves(&self, region_id: &str) -> bool {
            self.0.serves(region_id)
        }
        fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
            self.0.wrap(call, key)
        }
        fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
            assert!(!self.1.load(Ordering::SeqCst), "a defect of the backend");
            self.0.unwrap(call, wrapped)
        }
    }
    for mut world in [World::threads(), World::manual()] {
        world.options.kms_timeout = secs(60);
        world.options.outage_grace = Duration::from_secs(30);
        let kms = Arc::new(Panics(Arc::clone(&world.kms), AtomicBool::new(false)));
        let builder = Store::builder(world.store_dir(), world.keyring(), Provider::new());
        let builder = builder.kms(Arc::clone(&kms) as _).options(world.options);
        let store = builder.clock(Arc::clone(&world.clock) as _).create().unwrap();
        let logstore = world.byok(&store, "p/l", &world.cmk());
        put(&logstore, "first");
        kms.1.store(true, Ordering::SeqCst);
        world.clock.advance(secs(31));
        let refused = try_put(&logstore, "x");
        let Err(Error::KmsInvalid { detail, .. }) = refused else { panic!("{refused:?}") };
        assert!(detail.contains("the backend has panicked"), "{detail}");
        kms.1.store(false, Ordering::SeqCst);
        logstore.revalidate_now().unwrap();
        put(&logstore, "second");
    }
}
