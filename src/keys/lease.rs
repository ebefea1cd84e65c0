//! The lease: for how long the data keys in memory may be used.
//!
//! All Logstores of a store under the same customer master key, region and role share one lease. A
//! successful unwrap of a small probe envelope at the KMS renews it. Nothing else does, and use
//! does not.
//!
//! The bound on revocation is arithmetic, not scheduling. An operation that finds the last answer
//! of the KMS older than `revalidate_every` plus the time limit of a call, by either clock, calls
//! the KMS itself. So a renewal thread that was starved, stopped or suspended cannot stretch the
//! bound, and neither can a machine that was paused.

use std::{
    fmt,
    sync::{Arc, Weak},
    time::Duration,
};

use tracing::{debug, info, warn};

use super::{
    circuit_breaker::{CircuitBreaker, PERIODS_SPARED, Spared},
    envelope::fingerprint,
    moment::{Moment, micros},
    renewal_pool::{Renewable, RenewalPool},
    sealing::{LostShard, Sealer, Turn},
};
use crate::{
    crypto::SecretKey,
    io::{Clock, Random},
    key_status::{KeyState, KeyStatus, Refusal},
    kms::{BoundedKms, Cmk, EncryptionContext, KmsError},
    metrics::LeaseMetrics,
    sync::{
        Condvar, LockRank, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
        lock, wait,
    },
};

/// The durations of a lease; see [`crate::StoreOptions`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeaseTerms {
    pub(crate) revalidate_every: Duration,
    pub(crate) outage_grace: Duration,
    pub(crate) call_timeout: Duration,
}

/// A wrapped key that renewal unwraps, and the fingerprint that the result must have.
pub(crate) struct Probe {
    pub(crate) wrapped: Vec<u8>,
    pub(crate) context: EncryptionContext,
    pub(crate) fingerprint: String,
}

/// Hears when a lease stops or starts to admit operations.
pub(crate) trait LeaseListener: Send + Sync {
    /// Whether the listener still depends on the lease of this master key. The key of a Logstore
    /// may have been replaced since.
    fn depends_on(&self, cmk: &Cmk) -> bool;
    /// Access is lost. Wipes the keys and the plaintext that can be read again, without I/O and
    /// without waiting for a thread that does I/O. Returns the shards that have still to be sealed.
    fn wipe(&self, refusal: &Refusal) -> Vec<Arc<dyn LostShard>>;
    /// Access is lost, and every listener has wiped its keys. Records the loss.
    fn note_lost(&self, refusal: &Refusal);
    /// Access is back. Records the recovery.
    fn recovered(&self);
}

/// The parts of a lease.
pub(crate) struct LeaseParts {
    pub(crate) cmk: Cmk,
    pub(crate) kms: BoundedKms,
    pub(crate) breaker: Arc<CircuitBreaker>,
    pub(crate) probe: Probe,
    pub(crate) terms: LeaseTerms,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) random: Arc<dyn Random>,
    /// The threads that renew the lease; `None` in a store without threads.
    pub(crate) pool: Option<Arc<RenewalPool>>,
    pub(crate) sealer: Arc<Sealer>,
}

/// The lease of one master key.
pub(crate) struct Lease {
    cmk: Cmk,
    kms: BoundedKms,
    breaker: Arc<CircuitBreaker>,
    probe: Mutex<Arc<Probe>>,
    terms: LeaseTerms,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    state: Mutex<State>,
    changed: Condvar,
    /// Until when, by the uptime in microseconds, [`Lease::admit`] need not look at `state`.
    fresh_until: AtomicU64,
    /// The same by the wall clock. The earlier one counts.
    wall_until: AtomicU64,
    /// Counts the losses. Keys that were loaded before a loss are never used after it.
    epoch: AtomicU64,
    calls: AtomicU64,
    /// The pool that renews the lease, and the lease's number in it.
    pool: Option<(Arc<RenewalPool>, u64)>,
    /// For the pool and the circuit breaker, which do not keep the lease alive.
    this: Weak<Lease>,
    listeners: Mutex<Vec<Weak<dyn LeaseListener>>>,
    sealer: Arc<Sealer>,
    telling: Mutex<Telling>,
    /// Notified when the listeners have acted on a loss or a recovery.
    told: Condvar,
    /// Whether the lease has admitted operations since the listeners last heard of a loss.
    was_back: AtomicBool,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease")
            .field("cmk", &self.cmk)
            .field("terms", &self.terms)
            .finish_non_exhaustive()
    }
}

impl Lease {
    /// Makes a lease that admits nothing yet. Its first use calls the KMS.
    pub(crate) fn new(parts: LeaseParts) -> Arc<Self> {
        let LeaseParts { cmk, kms, breaker, probe, terms, clock, random, pool, sealer } = parts;
        Arc::new_cyclic(|this| Self {
            cmk,
            kms,
            breaker,
            probe: Mutex::new(LockRank::LeaseProbe, Arc::new(probe)),
            terms,
            clock,
            random,
            state: Mutex::new(LockRank::LeaseState, State::default()),
            changed: Condvar::new(),
            fresh_until: AtomicU64::new(0),
            wall_until: AtomicU64::new(0),
            epoch: AtomicU64::new(1),
            calls: AtomicU64::new(0),
            pool: pool.map(|pool| (Arc::clone(&pool), pool.enter())),
            this: Weak::clone(this),
            listeners: Mutex::new(LockRank::LeaseListeners, Vec::new()),
            sealer,
            telling: Mutex::new(LockRank::LeaseTelling, Telling::default()),
            told: Condvar::new(),
            was_back: AtomicBool::new(false),
        })
    }

    pub(crate) fn cmk(&self) -> &Cmk {
        &self.cmk
    }

    /// Renews with this probe from now on. It holds the same key, wrapped again.
    pub(crate) fn set_probe(&self, probe: Probe) {
        *lock(&self.probe) = Arc::new(probe);
    }

    /// Adds a listener, once.
    pub(crate) fn listen(&self, listener: Weak<dyn LeaseListener>) {
        {
            let mut listeners = lock(&self.listeners);
            let same = |other: &Weak<dyn LeaseListener>| {
                std::ptr::addr_eq(other.as_ptr(), listener.as_ptr())
            };
            listeners.retain(|other| other.strong_count() > 0 && !same(other));
            listeners.push(listener);
        }
        // A lease without listeners is not renewed.
        self.wake();
    }

    /// Has a thread of the pool tend the lease now.
    fn wake(&self) {
        // The first wake, in `start`, has started a thread. No later one can fail.
        let _ = self.start();
    }

    /// Has the pool renew the lease from now on.
    ///
    /// # Errors
    /// When the pool cannot start its first thread.
    pub(crate) fn start(&self) -> std::io::Result<()> {
        let Some((pool, id)) = &self.pool else { return Ok(()) };
        let this: Weak<dyn Renewable> = self.this.clone();
        pool.wake(*id, this)
    }

    /// Takes in the answer to the call that was sent at `sent`, and wakes the threads that wait for
    /// it. The pool then tells the listeners at once, and reschedules the next renewal.
    fn answered(&self, sent: Moment, answer: Result<(), Refusal>) {
        {
            let mut state = lock(&self.state);
            if state.calling == Some(sent) {
                state.calling = None;
            }
            self.settle(&mut state, sent, answer);
        }
        self.changed.notify_all();
        self.wake();
    }

    /// The listeners that depend on the lease now.
    fn dependents(&self) -> Vec<Arc<dyn LeaseListener>> {
        let listeners: Vec<_> = lock(&self.listeners).iter().filter_map(Weak::upgrade).collect();
        listeners.into_iter().filter(|listener| listener.depends_on(&self.cmk)).collect()
    }

    /// Admits an operation that starts now. Returns the epoch: the caller must not use keys that
    /// were loaded under another epoch. Blocks for a KMS call if the last answer is too old.
    ///
    /// # Errors
    /// Why the lease does not admit it.
    pub(crate) fn admit(&self) -> Result<u64, Refusal> {
        let epoch = self.epoch.load(Ordering::Acquire);
        if micros(self.clock.uptime()) < self.fresh_until.load(Ordering::Acquire)
            && self.clock.wall_us() < self.wall_until.load(Ordering::Acquire)
        {
            return Ok(epoch);
        }
        self.admit_slowly()
    }

    /// The epoch. Calls no KMS.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    fn admit_slowly(&self) -> Result<u64, Refusal> {
        if self.needs_call() {
            self.renew_unless_spared();
        }
        let state = lock(&self.state);
        match self.standing(&state) {
            Ok(()) => Ok(self.epoch.load(Ordering::Acquire)),
            Err(refusal) => Err(refusal),
        }
    }

    /// Whether the last answer is too old to decide by.
    fn needs_call(&self) -> bool {
        let state = lock(&self.state);
        let Some(sent) = state.last_attempt else { return true };
        let again = match state.refusal {
            Some(_) => self.clock.uptime() >= state.due,
            None => self.ended(&state),
        };
        again || sent.is_past(self.answer_lasts(), &*self.clock)
    }

    /// How long an answer counts, from when its call was sent.
    fn answer_lasts(&self) -> Duration {
        self.terms.revalidate_every + self.terms.call_timeout
    }

    /// Whether the lease has run out, by either clock, or a refusal of the customer has ended it.
    fn ended(&self, state: &State) -> bool {
        let grace = self.terms.outage_grace;
        state.last_success.is_none_or(|sent| sent.is_past(grace, &*self.clock))
    }

    /// Whether the lease admits operations at this moment. Makes no call.
    fn standing(&self, state: &State) -> Result<(), Refusal> {
        if !self.ended(state) {
            return Ok(());
        }
        let ended = || Refusal::Unreachable("the lease has ended".to_owned());
        Err(state.refusal.clone().unwrap_or_else(ended))
    }

    /// Calls the KMS by a call that is sent after this began. The answer to a call under way may be
    /// older than a change at the KMS that the caller knows of.
    pub(crate) fn renew_afresh(&self) {
        let mut state = lock(&self.state);
        let under_way = state.calling;
        while under_way.is_some() && state.calling == under_way {
            state = wait(&self.changed, state);
        }
        drop(state);
        self.renew();
    }

    /// Calls the KMS now. If a call is under way, waits for that one instead. Blocks for at most
    /// the time limit of a call.
    pub(crate) fn renew(&self) {
        let mut state = lock(&self.state);
        if let Some(sent) = state.calling {
            while state.calling == Some(sent) {
                state = wait(&self.changed, state);
            }
            return;
        }
        let sent = Moment::now(&*self.clock);
        state.calling = Some(sent);
        state.last_call = Some(sent);
        drop(state);
        self.calls.fetch_add(1, Ordering::Relaxed);
        let answer = self.ask();
        let spared = self.breaker.note(sent, &answer);
        self.answered(sent, answer);
        spared.iter().for_each(|lease| lease.ask_soon());
    }

    /// Calls the KMS, unless the lease has expired and another lease's call has just found that the
    /// KMS does not answer. Then it reuses that result.
    fn renew_unless_spared(&self) {
        let outage = {
            let state = lock(&self.state);
            let every = self.terms.revalidate_every;
            let unreachable = matches!(state.refusal, Some(Refusal::Unreachable(_)));
            let spared_for = every * PERIODS_SPARED;
            let long_ago =
                state.last_call.is_none_or(|sent| sent.is_past(spared_for, &*self.clock));
            if state.calling.is_some() || !unreachable || !self.ended(&state) || long_ago {
                None
            } else {
                // Shorter than a period, so that the leases take turns: the lease that called last
                // is not due again by then.
                let (this, now) = (self.this.clone(), Moment::now(&*self.clock));
                self.breaker.spare(this, now, every * 4 / 5, &*self.clock)
            }
        };
        match outage {
            Some((asked, detail)) => self.answered(asked, Err(Refusal::Unreachable(detail))),
            None => self.renew(),
        }
    }

    /// Unwraps the probe at the KMS.
    fn ask(&self) -> Result<(), Refusal> {
        let probe = Arc::clone(&lock(&self.probe));
        let key = self.unwrap(probe.context.clone(), &probe.wrapped);
        let key = key.map_err(|error| Refusal::from(&error))?;
        if fingerprint(&key) == probe.fingerprint {
            Ok(())
        } else {
            Err(Refusal::Invalid("it unwrapped the probe to another key".to_owned()))
        }
    }

    /// Unwraps the envelope of a Logstore at its first use. In a known outage this fails at once
    /// instead of waiting for the KMS.
    pub(crate) fn unwrap_envelope(
        &self,
        context: EncryptionContext,
        wrapped: &[u8],
    ) -> Result<SecretKey, KmsError> {
        let outage = match &lock(&self.state) {
            state if self.clock.uptime() < state.due && self.breaker.is_open() => {
                match &state.refusal {
                    Some(Refusal::Unreachable(detail)) => Some(detail.clone()),
                    _ => None,
                }
            }
            _ => None,
        };
        match outage {
            Some(detail) => Err(KmsError::Unreachable { detail }),
            None => self.unwrap(context, wrapped),
        }
    }

    /// Unwraps at the KMS. Blocks for at most the time limit of a call.
    fn unwrap(&self, context: EncryptionContext, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        self.kms.unwrap(&self.cmk, context, wrapped)
    }

    /// Takes in the answer to a call sent at `sent`.
    fn settle(&self, state: &mut State, sent: Moment, answer: Result<(), Refusal>) {
        if state.last_attempt.is_some_and(|last| last.uptime > sent.uptime) {
            return; // the answer to a later call is known already
        }
        state.last_attempt = Some(sent);
        state.due = sent.uptime + self.jittered(self.terms.revalidate_every);
        match &answer {
            Ok(()) => state.last_success = Some(sent),
            // A refusal of the customer ends the lease. An outage that follows has no grace left.
            Err(Refusal::Revoked(_)) => state.last_success = None,
            Err(Refusal::Unreachable(_) | Refusal::Invalid(_)) => {}
        }
        self.trace(state.refusal.as_ref(), &answer);
        state.refusal = answer.err();
        self.publish(state);
    }

    /// Logs the change that an answer brings.
    fn trace(&self, before: Option<&Refusal>, answer: &Result<(), Refusal>) {
        use Refusal::{Invalid, Revoked, Unreachable};
        let (key, region) = (&*self.cmk.cmk_key_id, &*self.cmk.region_id);
        match (before, answer) {
            (None, Ok(())) => debug!(key, region, "lease renewed"),
            (Some(_), Ok(())) => info!(key, region, "the KMS answers again: lease renewed"),
            (_, Err(Revoked(reason))) => {
                warn!(key, region, %reason, "the KMS refuses a master key");
            }
            (Some(Unreachable(_) | Invalid(_)), Err(_)) => {
                debug!(key, region, "KMS outage continues");
            }
            (_, Err(Unreachable(detail))) => {
                warn!(key, region, detail, "an outage begins: KMS unreachable, the lease runs on");
            }
            (_, Err(Invalid(detail))) => {
                warn!(
                    key,
                    region, detail, "an outage begins: invalid KMS answer, the lease runs on"
                );
            }
        }
    }

    /// Updates the atomics that [`Lease::admit`] looks at.
    fn publish(&self, state: &State) {
        match (self.standing(state), state.last_success, state.last_attempt) {
            (Ok(()), Some(success), Some(attempt)) => {
                let (lasts, grace) = (self.answer_lasts(), self.terms.outage_grace);
                let uptime = (attempt.uptime + lasts).min(success.uptime + grace);
                let wall = attempt.wall_us.saturating_add(micros(lasts));
                let wall = wall.min(success.wall_us.saturating_add(micros(grace)));
                self.was_back.store(true, Ordering::Release);
                self.wall_until.store(wall, Ordering::Release);
                self.fresh_until.store(micros(uptime), Ordering::Release);
            }
            _ => {
                self.fresh_until.store(0, Ordering::Release);
                self.epoch.fetch_add(1, Ordering::AcqRel);
            }
        }
    }

    /// A duration between four fifths of `period` and `period`, so that many leases do not call at
    /// the same moment.
    fn jittered(&self, period: Duration) -> Duration {
        let mut byte = [0];
        // Without randomness there is no jitter. Nothing else depends on it.
        let _ = self.random.fill(&mut byte);
        period - period * u32::from(byte[0]) / (5 * 255)
    }

    /// Takes in a refusal that another call under the same master key got: the unwrap of a
    /// Logstore's own envelope.
    pub(crate) fn report(&self, refusal: Refusal) {
        if matches!(refusal, Refusal::Revoked(_)) {
            self.answered(Moment::now(&*self.clock), Err(refusal));
        }
    }

    /// Renews if that is due, and tells the listeners about a loss or a recovery. Returns after how
    /// long to call this again. The caller must hold no lock that a listener takes. In a store with
    /// threads it waits for no listener, so that a slow disk delays no other lease.
    pub(crate) fn tend(&self) -> Duration {
        const IDLE: Duration = Duration::from_secs(3600);
        if self.dependents().is_empty() {
            // Every Logstore was deleted or has another master key. The next use calls the KMS.
            self.begin_telling();
            return IDLE;
        }
        let due = {
            let state = lock(&self.state);
            let stale = |sent: Moment| sent.is_past(self.answer_lasts(), &*self.clock);
            state.last_attempt.is_some_and(|sent| self.clock.uptime() >= state.due || stale(sent))
        };
        if due {
            self.renew_unless_spared();
        }
        self.begin_telling();
        let now = self.clock.uptime();
        let state = lock(&self.state);
        match (state.last_attempt, state.last_success) {
            (None, _) => IDLE,
            (Some(_), Some(sent)) if state.told_lost != Some(true) => {
                state.due.min(sent.uptime + self.terms.outage_grace).saturating_sub(now)
            }
            _ => state.due.saturating_sub(now),
        }
    }

    /// Tells the listeners about a loss or a recovery that they have not heard of, and blocks until
    /// they have acted on it, and on all before it: they seal segments and write to the audit log.
    pub(crate) fn tell(&self) {
        let turn = self.begin_telling();
        drop(self.acted_on(turn));
    }

    /// As [`Lease::tell`], but does not block in a store with threads. The data keys are wiped when
    /// this returns. Returns the number of the last turn.
    pub(crate) fn begin_telling(&self) -> u64 {
        let noticed = self.clock.uptime();
        let mut telling = lock(&self.telling);
        let Some(standing) = self.news() else { return telling.issued };
        telling.recoveries += u64::from(standing.is_ok());
        self.begin_turn(telling, noticed, standing, self.dependents())
    }

    /// Tells a listener about a loss that the others had heard of before it listened.
    pub(crate) fn tell_late(&self, listener: Arc<dyn LeaseListener>, refusal: Refusal) {
        let noticed = self.clock.uptime();
        let telling = lock(&self.telling);
        let turn = self.begin_turn(telling, noticed, Err(refusal), vec![listener]);
        drop(self.acted_on(turn));
    }

    /// Whether the lease admits operations, if the listeners have to hear that.
    fn news(&self) -> Option<Result<(), Refusal>> {
        let mut state = lock(&self.state);
        state.last_attempt?;
        let standing = self.standing(&state);
        let lost = standing.is_err();
        // A key that was back in between may be in memory again.
        if Some(lost) == state.told_lost && !(lost && self.was_back.load(Ordering::Acquire)) {
            return None;
        }
        state.told_lost = Some(lost);
        if lost {
            self.publish(&state);
            self.was_back.store(false, Ordering::Release);
        }
        Some(standing)
    }

    /// Has the dependents wipe their keys if access is lost. That takes no I/O and no KMS call, so
    /// nothing delays it. The sealer does the rest, in this thread if the store has no threads.
    /// Returns the number of the turn.
    fn begin_turn(
        &self,
        mut telling: MutexGuard<'_, Telling>,
        noticed: Duration,
        standing: Result<(), Refusal>,
        dependents: Vec<Arc<dyn LeaseListener>>,
    ) -> u64 {
        telling.issued += 1;
        let (number, recoveries) = (telling.issued, telling.recoveries);
        let logstores = dependents.len();
        let lost = standing.clone().err();
        let wipe =
            |refusal| dependents.iter().flat_map(|listener| listener.wipe(refusal)).collect();
        let shards: Vec<Arc<dyn LostShard>> = lost.as_ref().map_or_else(Vec::new, wipe);
        let recorded = shards.clone();
        let (this, told) = (self.this.clone(), self.this.clone());
        let rest = self.sealer.begin(Turn {
            shards,
            deadline: noticed + self.terms.call_timeout,
            is_lost: Arc::new(move || {
                this.upgrade().is_none_or(|lease| lease.is_lost_since(recoveries))
            }),
            record: Box::new(move || {
                let lease = told.upgrade();
                let _done = lease.as_ref().map(|lease| lease.in_turn(number));
                dependents.iter().for_each(|listener| match &standing {
                    Ok(()) => listener.recovered(),
                    Err(refusal) => listener.note_lost(refusal),
                });
                recorded.iter().for_each(|shard| shard.record());
            }),
        });
        drop(telling);
        // Not before the wipe: writing the log may block.
        let (key, region) = (&*self.cmk.cmk_key_id, &*self.cmk.region_id);
        match lost {
            None => info!(key, region, logstores, "master key usable"),
            Some(refusal) => {
                warn!(key, region, logstores, ?refusal, "master key lost: data keys wiped");
            }
        }
        if let Some(turn) = rest {
            self.sealer.run(turn);
        }
        number
    }

    /// Whether the lease has not admitted operations since the listeners had heard of this many
    /// recoveries.
    fn is_lost_since(&self, recoveries: u64) -> bool {
        self.is_lost() && lock(&self.telling).recoveries == recoveries
    }

    /// Whether the lease admits no operation now, as far as is known. Calls no KMS.
    pub(crate) fn is_lost(&self) -> bool {
        self.standing(&lock(&self.state)).is_err()
    }

    /// Waits until the listeners have acted on this turn and all before it.
    fn acted_on(&self, turn: u64) -> MutexGuard<'_, Telling> {
        let mut telling = lock(&self.telling);
        while telling.done < turn {
            telling = wait(&self.told, telling);
        }
        telling
    }

    /// Waits for the turns before this one. The turn is done when the returned value is dropped.
    fn in_turn(&self, turn: u64) -> InTurn<'_> {
        drop(self.acted_on(turn - 1));
        InTurn { lease: self, turn }
    }

    pub(crate) fn status(&self) -> KeyStatus {
        let state = lock(&self.state);
        let left = state.last_success.map(|sent| {
            if self.standing(&state).is_err() {
                Duration::ZERO
            } else {
                (sent.uptime + self.terms.outage_grace).saturating_sub(self.clock.uptime())
            }
        });
        let state = match (&state.refusal, state.last_attempt) {
            (_, None) => KeyState::Idle,
            (Some(Refusal::Revoked(reason)), _) => KeyState::Revoked { reason: *reason },
            (Some(Refusal::Unreachable(detail) | Refusal::Invalid(detail)), _) => {
                KeyState::Outage { detail: detail.clone() }
            }
            (None, _) => KeyState::Active,
        };
        KeyStatus { state, lease_left: Some(left.unwrap_or(Duration::ZERO)) }
    }

    /// Whether the lease admits operations; `None` before the listeners have heard of any answer.
    pub(crate) fn told(&self) -> Option<Result<(), Refusal>> {
        let state = lock(&self.state);
        state.told_lost.map(|_| self.standing(&state))
    }

    pub(crate) fn metrics(&self) -> LeaseMetrics {
        let last_success = lock(&self.state).last_success;
        LeaseMetrics {
            cmk: self.cmk.clone(),
            status: self.status(),
            age: last_success.map(|sent| self.clock.uptime().saturating_sub(sent.uptime)),
            calls: self.calls(),
        }
    }

    /// How many calls were made for renewal.
    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }
}

impl Renewable for Lease {
    fn tend(&self) -> Duration {
        Lease::tend(self)
    }
}

impl Spared for Lease {
    /// Makes the next renewal due within a fifth of a period.
    fn ask_soon(&self) {
        let every = self.terms.revalidate_every;
        lock(&self.state).due = self.clock.uptime() + (every - self.jittered(every));
        self.wake();
    }
}

/// The losses and recoveries that the listeners hear of, by their numbers.
#[derive(Default)]
struct Telling {
    /// The last one.
    issued: u64,
    /// The last one that the listeners have acted on.
    done: u64,
    /// How many recoveries there were.
    recoveries: u64,
}

/// A turn whose listeners act now.
struct InTurn<'a> {
    lease: &'a Lease,
    turn: u64,
}

impl Drop for InTurn<'_> {
    fn drop(&mut self) {
        lock(&self.lease.telling).done = self.turn;
        self.lease.told.notify_all();
    }
}

#[derive(Default)]
struct State {
    /// When the last successful call was sent.
    last_success: Option<Moment>,
    /// When the call was sent whose answer counts now. It may be a call of another lease.
    last_attempt: Option<Moment>,
    /// When this lease last made a call of its own.
    last_call: Option<Moment>,
    /// When the next renewal is due, by the uptime.
    due: Duration,
    /// The last answer, unless it was a success.
    refusal: Option<Refusal>,
    /// When the call under way was sent.
    calling: Option<Moment>,
    /// Whether the listeners last heard of a loss; `None` before the first answer. They hear of
    /// that one in any case: a loss that an earlier process recorded may have ended since.
    told_lost: Option<bool>,
}

#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "a thread that waits for another one's call signals nothing"
)]
pub(super) mod tests;
