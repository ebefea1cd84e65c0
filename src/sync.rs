//! Locks and atomics: locks without poisoning, whose order debug builds check.
//!
//! **Poisoning.** A panic in the engine is a bug. Every invariant that a lock protects is restored
//! or latched before anything can fail, so [`lock`], [`read`] and [`write`] take a poisoned lock as
//! it is.
//!
//! **Order.** Every lock is made with a [`LockRank`]. A thread that holds a lock may take locks of
//! lower ranks only, in the order of that enum. So no two threads can wait for each other. Debug
//! builds keep the ranks that each thread holds and panic on a wrong order, also when the locks
//! happen to be free. Release builds keep nothing and check nothing. `docs/architecture.md` has the
//! table of all locks.
//!
//! Two kinds of locks are outside the check. The pool of `crypto::secret` is a lock of the process:
//! it is taken last, and its holder calls nothing. Under shuttle (`tests/shuttle`) many tasks share
//! one thread, and shuttle finds deadlocks itself.

use std::{
    collections::BTreeSet,
    fmt,
    ops::{Deref, DerefMut},
    sync::{PoisonError, TryLockError},
    time::Duration,
};

#[cfg(not(shuttle))]
use std::sync as imp;
#[cfg(not(shuttle))]
pub(crate) use std::sync::{Condvar, atomic};

// The scheduler of `tests/shuttle` chooses which task runs next at each of these.
#[cfg(shuttle)]
use shuttle::sync as imp;
#[cfg(shuttle)]
pub(crate) use shuttle::sync::{Condvar, atomic};

use order::{Entered, Rank};

/// The place of a lock in the order in which a thread takes locks, from the outermost to the
/// innermost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum LockRank {
    // May be held across a KMS call, except `LeaseTelling`. These come first. So no thread waits
    // for one of them, and with it for a KMS, while it holds a lock that is not among them.
    /// Closing a store: one thread at a time.
    Closing,
    /// The administration of one Logstore: one operation at a time for each name.
    LogstoreAdmin,
    /// The order of the losses and returns of a lease, held while the data keys are wiped. A
    /// thread that waits for a listener to act may hold no lock below.
    LeaseTelling,
    /// The writer of a shard: the active segment and its file. `Shard::pause` of a whole Logstore
    /// takes the writers of all its shards, in the order of the shards, and a split or a merge those of
    /// the children and then of the parents. `LogstoreAdmin` keeps one out of the other's way.
    ShardWriter,
    /// The unwrap of a data key: threads that need the same key make one call.
    GateLoading,
    /// A change of the service keyring, or its reading from its file.
    KeyringChange,
    // Held across file I/O and syncs.
    /// The removal of segments, by retention or with a deleted Logstore: one at a time.
    Removal,
    /// The administration of a store: compares its state with the state that an operation assumed,
    /// and commits.
    Admin,
    /// The bytes of the segments under a data key, for rotation by policy.
    BytesUnderKey,
    /// The states of keys by the audit log.
    AuditTransitions,
    /// The end of the audit log and its file.
    AuditTail,
    /// The current file of the catalogue.
    JournalFiles,
    // Held for a moment.
    /// The changes of the catalogue that wait for a record.
    JournalQueue,
    /// The feeder that the catalogue notifies of its changes.
    JournalFeeder,
    /// The wanted and the present contents of the anchor.
    Anchor,
    /// The Logstores that are open.
    Logstores,
    /// The shards of a Logstore.
    ShardTable,
    /// The leases of a store, by master key.
    Leases,
    /// The leases of a store, by Logstore.
    OwnLeases,
    /// The circuit breakers of a store, by region.
    Circuits,
    /// The return of the service key, and the record of its loss.
    ServiceReturn,
    /// The lock file of a store.
    StoreLock,
    /// The reader of a follower, and the task that waits for it.
    Following,
    /// The queue and the watermarks of a shard.
    ShardState,
    /// The list of a shard's segments.
    ShardSegments,
    /// The service keyring.
    Keyring,
    /// The contents of the keyring file that this process loaded or wrote last.
    KeyringKnown,
    /// The root keys of the service keyring.
    KeyringRoots,
    /// The catalogue in memory.
    Catalogue,
    /// How far the wall clock is trusted.
    TrustedClock,
    /// The catalogue's record of a shard.
    ShardRecord,
    /// A head of a shard that the catalogue does not know yet.
    ShardReached,
    /// The recovery notices of a shard.
    ShardNotices,
    /// The acknowledged groups of a shard that were lost and are not on the audit log yet.
    ShardLost,
    /// The segments of a shard that the catalogue proves.
    ShardChain,
    /// The keys of a Logstore in memory.
    GateHeld,
    /// The keys section and the lease of a Logstore.
    GateKeys,
    /// The error that keeps a Logstore from beginning a segment.
    GateHalted,
    /// The number of readers in segments under each key.
    GateReaders,
    /// The plaintext that is wiped together with the keys.
    GateKept,
    /// The metadata of a Logstore.
    LogstoreMeta,
    /// The settings of new segments of a Logstore.
    WritePlan,
    /// When a read-only Logstore last caught up with its writer.
    FollowedAt,
    /// The records that a reader has decrypted and not returned yet.
    ReadAhead,
    /// The active segment as readers see it.
    ActiveView,
    /// The plaintext that a helper works on.
    HelperScratch,
    /// Work that a helper may do, and its result.
    Deferred,
    /// The buffers for the next blocks.
    HelperBuffers,
    /// The work that waits for a helper.
    HelperJobs,
    /// The threads that help.
    HelperThreads,
    /// The memory for groups that are not written yet.
    Budget,
    /// The lease of the service key.
    ServiceLease,
    /// The answers of the KMS to a lease.
    LeaseState,
    /// The recent calls to one KMS.
    CircuitBreaker,
    /// The listeners of a lease.
    LeaseListeners,
    /// The probe of a lease.
    LeaseProbe,
    /// The losses of keys that are acted on.
    Sealing,
    /// The leases that are due, and the threads that renew them.
    RenewalPool,
    /// The threads of the scheduler.
    SchedulerThreads,
    /// The tasks of the scheduler.
    SchedulerQueue,
    /// Whether a thread that blocks was woken.
    WokenThread,
    /// The calls to one KMS that have not returned.
    KmsCalls,
    // Held across file I/O. A file operation that meets a full disk takes it, and may hold most of
    // the locks above.
    /// The room that a store keeps free.
    Reserve,
    // Inside a KMS backend.
    /// Credentials that a backend has fetched.
    #[cfg(any(feature = "kms-aliyun", feature = "kms-aws", feature = "kms-vault"))]
    KmsCredentials,
    /// The PKCS#11 modules of the process.
    #[cfg(feature = "kms-pkcs11")]
    KmsModules,
    /// The state of a PKCS#11 module.
    #[cfg(feature = "kms-pkcs11")]
    KmsModule,
    /// PINs that a token has refused.
    #[cfg(feature = "kms-pkcs11")]
    KmsRefusedPins,
    /// Idle sessions with a token.
    #[cfg(feature = "kms-pkcs11")]
    KmsSessions,
    /// The faults that `FaultyKms` is to inject next.
    #[cfg(feature = "testing")]
    KmsScript,
    /// The plan by which `FaultyKms` injects faults.
    #[cfg(feature = "testing")]
    KmsPlan,
    /// The records of a run of the conformance suite, and the faults of its proxy.
    #[cfg(feature = "kms-conformance")]
    KmsConformance,
    /// A lock of a test: outside the order.
    #[cfg(test)]
    Test,
}

#[cfg(all(debug_assertions, not(shuttle)))]
impl LockRank {
    /// Whether a thread may take a lock of this rank while it holds another one.
    fn may_nest(self) -> bool {
        matches!(self, Self::ShardWriter)
    }

    /// Whether a thread may hold a lock of this rank across a KMS call. Threads that need the lock
    /// then wait for up to the time limit of the call.
    fn may_span_a_kms_call(self) -> bool {
        self <= Self::KeyringChange && self != Self::LeaseTelling
    }
}

/// A mutual exclusion lock with a rank. Take it with [`lock`].
pub(crate) struct Mutex<T: ?Sized> {
    rank: Rank,
    inner: imp::Mutex<T>,
}

impl<T> Mutex<T> {
    pub(crate) const fn new(rank: LockRank, value: T) -> Self {
        Self { rank: Rank::new(rank), inner: imp::Mutex::new(value) }
    }
}

#[cfg(test)]
impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self::new(LockRank::Test, T::default())
    }
}

impl<T: ?Sized> fmt::Debug for Mutex<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Mutex(..)")
    }
}

/// A reader-writer lock with a rank. Take it with [`read`] or [`write`].
pub(crate) struct RwLock<T: ?Sized> {
    rank: Rank,
    inner: imp::RwLock<T>,
}

impl<T> RwLock<T> {
    pub(crate) fn new(rank: LockRank, value: T) -> Self {
        Self { rank: Rank::new(rank), inner: imp::RwLock::new(value) }
    }
}

/// Locks by name, all of one rank. A name that no thread holds takes no memory.
pub(crate) struct NamedLocks<K> {
    rank: Rank,
    /// A thread holds it for a moment, and takes no other lock under it.
    held: imp::Mutex<BTreeSet<K>>,
    freed: Condvar,
}

impl<K: Ord + Clone> NamedLocks<K> {
    pub(crate) fn new(rank: LockRank) -> Self {
        let held = imp::Mutex::new(BTreeSet::new());
        Self { rank: Rank::new(rank), held, freed: Condvar::new() }
    }

    /// Takes the lock of this name. Blocks until it is free.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(crate) fn lock(&self, name: &K) -> NamedGuard<'_, K> {
        let entered = self.rank.enter();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        while !held.insert(name.clone()) {
            held = self.freed.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        NamedGuard { locks: self, name: name.clone(), _entered: entered }
    }

    /// Takes the lock of this name if it is free.
    #[cfg_attr(debug_assertions, track_caller)]
    pub(crate) fn try_lock(&self, name: &K) -> Option<NamedGuard<'_, K>> {
        let entered = self.rank.enter();
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let free = held.insert(name.clone());
        free.then(|| NamedGuard { locks: self, name: name.clone(), _entered: entered })
    }
}

/// Holds the lock of one name in [`NamedLocks`].
pub(crate) struct NamedGuard<'a, K: Ord> {
    locks: &'a NamedLocks<K>,
    name: K,
    _entered: Entered,
}

impl<K: Ord> Drop for NamedGuard<'_, K> {
    fn drop(&mut self) {
        let mut held = self.locks.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.remove(&self.name);
        drop(held);
        self.locks.freed.notify_all();
    }
}

/// Holds a [`Mutex`].
pub(crate) struct MutexGuard<'a, T: ?Sized> {
    // Dropped in this order: the lock is free before the thread forgets its rank.
    inner: imp::MutexGuard<'a, T>,
    entered: Entered,
}

impl<T: ?Sized> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T: ?Sized> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

/// Holds a [`RwLock`] together with other readers.
pub(crate) struct RwLockReadGuard<'a, T: ?Sized> {
    inner: imp::RwLockReadGuard<'a, T>,
    _entered: Entered,
}

impl<T: ?Sized> Deref for RwLockReadGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

/// Holds a [`RwLock`] alone.
pub(crate) struct RwLockWriteGuard<'a, T: ?Sized> {
    inner: imp::RwLockWriteGuard<'a, T>,
    _entered: Entered,
}

impl<T: ?Sized> Deref for RwLockWriteGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T: ?Sized> DerefMut for RwLockWriteGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

/// Takes a mutex. Blocks until it is free.
#[cfg_attr(debug_assertions, track_caller)]
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    let entered = mutex.rank.enter();
    MutexGuard { inner: mutex.inner.lock().unwrap_or_else(PoisonError::into_inner), entered }
}

/// Takes a mutex if it is free.
#[cfg_attr(debug_assertions, track_caller)]
pub(crate) fn try_lock<T: ?Sized>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    let entered = mutex.rank.enter();
    let inner = match mutex.inner.try_lock() {
        Ok(inner) => inner,
        Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
        Err(TryLockError::WouldBlock) => return None,
    };
    Some(MutexGuard { inner, entered })
}

/// Takes a reader-writer lock together with other readers. Blocks while a writer holds it.
#[cfg_attr(debug_assertions, track_caller)]
pub(crate) fn read<T: ?Sized>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    let _entered = lock.rank.enter();
    RwLockReadGuard { inner: lock.inner.read().unwrap_or_else(PoisonError::into_inner), _entered }
}

/// Takes a reader-writer lock alone. Blocks until it is free.
#[cfg_attr(debug_assertions, track_caller)]
pub(crate) fn write<T: ?Sized>(lock: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    let _entered = lock.rank.enter();
    RwLockWriteGuard { inner: lock.inner.write().unwrap_or_else(PoisonError::into_inner), _entered }
}

/// Waits for a notification without the mutex, and takes it again. The mutex must be the innermost
/// lock that the thread holds: the thread that notifies may need any lock below it.
#[cfg_attr(debug_assertions, track_caller)]
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    let MutexGuard { inner, entered } = guard;
    entered.assert_innermost();
    MutexGuard { inner: condvar.wait(inner).unwrap_or_else(PoisonError::into_inner), entered }
}

/// As [`wait`], for at most `limit`.
#[cfg_attr(debug_assertions, track_caller)]
pub(crate) fn wait_timeout<'a, T>(
    condvar: &Condvar,
    guard: MutexGuard<'a, T>,
    limit: Duration,
) -> MutexGuard<'a, T> {
    let MutexGuard { inner, entered } = guard;
    entered.assert_innermost();
    let (inner, _) = condvar.wait_timeout(inner, limit).unwrap_or_else(PoisonError::into_inner);
    MutexGuard { inner, entered }
}

pub(crate) use order::{assert_may_wait_for_kms, wait_for_no_kms};

/// The check, in debug builds.
#[cfg(all(debug_assertions, not(shuttle)))]
mod order {
    use std::{
        cell::{Cell, RefCell},
        thread,
    };

    use super::LockRank;

    thread_local! {
        /// The ranks of the locks that this thread holds, in the order in which it took them.
        static HELD: RefCell<Vec<LockRank>> = const { RefCell::new(Vec::new()) };
        /// Whether this thread may wait for no KMS.
        static WAITS_FOR_NO_KMS: Cell<bool> = const { Cell::new(false) };
    }

    #[derive(Clone, Copy)]
    pub(super) struct Rank(LockRank);

    impl Rank {
        pub(super) const fn new(rank: LockRank) -> Self {
            Self(rank)
        }

        /// Checks and notes that the thread takes a lock of this rank, before it does.
        #[track_caller]
        pub(super) fn enter(self) -> Entered {
            let Self(rank) = self;
            #[cfg(test)]
            if rank == LockRank::Test {
                return Entered(rank);
            }
            if let Some(inner) = find(|held| held > rank || (held == rank && !rank.may_nest())) {
                fail(&format!(
                    "{rank:?} is taken under {inner:?}: the order is the other way round"
                ));
            }
            // While a thread ends, its list is gone, and nothing is checked.
            let _ = HELD.try_with(|held| held.borrow_mut().push(rank));
            Entered(rank)
        }
    }

    /// States that the thread holds a lock of this rank.
    pub(super) struct Entered(LockRank);

    impl Entered {
        #[track_caller]
        pub(super) fn assert_innermost(&self) {
            if let Some(inner) = find(|held| held > self.0) {
                fail(&format!(
                    "the thread waits for a change under {:?} while it holds {inner:?}",
                    self.0
                ));
            }
        }
    }

    impl Drop for Entered {
        fn drop(&mut self) {
            let _ = HELD.try_with(|held| {
                let mut held = held.borrow_mut();
                if let Some(at) = held.iter().rposition(|rank| *rank == self.0) {
                    held.remove(at);
                }
            });
        }
    }

    /// From now on, this thread makes no call to a KMS.
    pub(crate) fn wait_for_no_kms() {
        WAITS_FOR_NO_KMS.set(true);
    }

    /// Panics if this thread may not wait for a KMS call: it is a worker, or it holds a lock that
    /// other threads need meanwhile.
    #[track_caller]
    pub(crate) fn assert_may_wait_for_kms() {
        if WAITS_FOR_NO_KMS.get() {
            fail("a worker waits for a KMS call");
        }
        if let Some(rank) = find(|held| !held.may_span_a_kms_call()) {
            fail(&format!("{rank:?} is held across a KMS call"));
        }
    }

    fn find(is: impl Fn(LockRank) -> bool) -> Option<LockRank> {
        HELD.try_with(|held| held.borrow().iter().copied().find(|held| is(*held))).ok().flatten()
    }

    #[track_caller]
    fn fail(what: &str) {
        // A second panic would abort the process and hide the first.
        if !thread::panicking() {
            panic!("lock order: {what}");
        }
    }
}

/// No check, in release builds and under shuttle.
#[cfg(not(all(debug_assertions, not(shuttle))))]
mod order {
    use super::LockRank;

    #[derive(Clone, Copy)]
    pub(super) struct Rank;

    impl Rank {
        pub(super) const fn new(_rank: LockRank) -> Self {
            Self
        }

        pub(super) fn enter(self) -> Entered {
            Entered
        }
    }

    pub(super) struct Entered;

    impl Entered {
        pub(super) fn assert_innermost(&self) {}
    }

    pub(crate) fn wait_for_no_kms() {}

    pub(crate) fn assert_may_wait_for_kms() {}
}

#[cfg(all(test, debug_assertions, not(shuttle)))]
mod tests {
    use super::*;

    const RANKS: [LockRank; 3] = [LockRank::ShardWriter, LockRank::Admin, LockRank::ShardState];

    fn locks() -> [Mutex<u32>; 3] {
        RANKS.map(|rank| Mutex::new(rank, 0))
    }

    /// The message with which this panics, in a thread of its own.
    fn panic_of(run: impl FnOnce() + Send + 'static) -> String {
        let panic = std::thread::spawn(run).join().expect_err("it panics");
        *panic.downcast::<String>().expect("a message")
    }

    #[test]
    fn locks_are_taken_from_the_outermost_to_the_innermost() {
        let [writer, admin, state] = locks();
        for _ in 0..2 {
            let _writer = lock(&writer);
            let outer = lock(&admin);
            *lock(&state) += 1;
            drop(outer);
            // A lock may be given back before those inside it.
            let (outer, inner) = (lock(&admin), lock(&state));
            drop(outer);
            drop(inner);
        }
        // Writers of several shards are taken together.
        let [other, _, _] = locks();
        let _both = (lock(&writer), lock(&other));
        assert_eq!(*lock(&state), 2);
    }

    #[test]
    fn a_lock_is_tried_and_not_waited_for() {
        let [admin, writer, _] = locks();
        let held = lock(&writer);
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(try_lock(&writer).is_none()));
        });
        drop(held);
        // A failed attempt leaves no trace: outer locks may be taken.
        let _admin = lock(&admin);
        *try_lock(&writer).expect("it is free") += 1;
        assert_eq!(*lock(&writer), 1);
    }

    #[test]
    fn a_wrong_order_panics_with_both_names() {
        let said = panic_of(|| {
            let [_, admin, state] = locks();
            let _state = lock(&state);
            drop(lock(&admin));
        });
        assert_eq!(
            said,
            "lock order: Admin is taken under ShardState: the order is the other way round"
        );
        let said = panic_of(|| {
            let records = [1, 2].map(|record| RwLock::new(LockRank::ShardRecord, record));
            let _first = read(&records[0]);
            drop(write(&records[1]));
        });
        assert_eq!(
            said,
            "lock order: ShardRecord is taken under ShardRecord: the order is the other way round"
        );
    }

    #[test]
    fn a_wait_holds_no_inner_lock() {
        let changed = Condvar::new();
        let [writer, admin, _] = locks();
        let _writer = lock(&writer);
        drop(wait_timeout(&changed, lock(&admin), Duration::from_millis(1)));
        let said = panic_of(move || {
            let [_, admin, state] = locks();
            let (admin, _state) = (lock(&admin), lock(&state));
            drop(wait_timeout(&changed, admin, Duration::from_millis(1)));
        });
        assert_eq!(
            said,
            "lock order: the thread waits for a change under Admin while it holds ShardState"
        );
    }

    #[test]
    fn a_kms_call_is_made_under_few_locks() {
        assert_may_wait_for_kms();
        let (logstores, [writer, ..]) = (NamedLocks::new(LockRank::LogstoreAdmin), locks());
        let _both = (logstores.lock(&"p/l"), lock(&writer));
        assert_may_wait_for_kms();
        for n in 1..3 {
            let said = panic_of(move || {
                let locks = locks();
                let _lock = lock(&locks[n]);
                assert_may_wait_for_kms();
            });
            assert_eq!(said, format!("lock order: {:?} is held across a KMS call", RANKS[n]));
        }
    }

    #[test]
    fn a_worker_makes_no_kms_call() {
        let said = panic_of(|| {
            wait_for_no_kms();
            assert_may_wait_for_kms();
        });
        assert_eq!(said, "lock order: a worker waits for a KMS call");
    }

    /// A thread that holds a lock which others need without a KMS does not wait for a KMS.
    #[test]
    fn a_lock_across_a_kms_call_is_taken_first() {
        let said = panic_of(|| {
            let [_, admin, _] = locks();
            let _admin = lock(&admin);
            drop(NamedLocks::new(LockRank::LogstoreAdmin).lock(&"p/l"));
        });
        assert_eq!(
            said,
            "lock order: LogstoreAdmin is taken under Admin: the order is the other way round"
        );
    }

    #[test]
    fn a_lock_by_name_excludes_the_same_name_only() {
        let locks = NamedLocks::new(LockRank::Test);
        let held = locks.lock(&"a");
        assert!(locks.try_lock(&"a").is_none());
        drop(locks.try_lock(&"b").expect("another name is free"));
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| drop(locks.lock(&"a")));
            drop(locks.lock(&"b"));
            drop(held);
            waits.join().expect("the name is free again");
        });
        assert!(locks.held.lock().expect("it is not poisoned").is_empty());
    }

    #[test]
    fn a_mutex_that_is_held_is_not_waited_for() {
        let mutex = Mutex::new(LockRank::Test, 1);
        let held = lock(&mutex);
        assert!(try_lock(&mutex).is_none());
        drop(held);
        assert_eq!(try_lock(&mutex).map(|value| *value), Some(1));
    }

    /// The first panic says more than a second one.
    #[test]
    fn what_unwinds_does_not_panic_again() {
        struct Locks(Mutex<u32>);
        impl Drop for Locks {
            fn drop(&mut self) {
                drop(lock(&self.0));
            }
        }
        let said = panic_of(|| {
            let [_, admin, state] = locks();
            let _state = lock(&state);
            let _locks = Locks(admin);
            panic!("{}", "the first");
        });
        assert_eq!(said, "the first");
    }
}
