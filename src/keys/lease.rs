//! The lease: for how long the data keys in memory may be used.
//!
//! All Logstores of a store under the same customer master key, region and role share one lease. A
//! successful unwrap of the lease's probe at the KMS renews it; the use of a key does not. The
//! probe is normally a small random key. Where a master key has none, an envelope of a Logstore is
//! the probe. The lease of the service key begins when the KMS unwraps the keyring. A Logstore in
//! probe mode `own` ([`crate::ProbeMode::Own`]) has a lease of its own, and one of its envelopes is
//! the probe.
//!
//! Beside a shared lease, each Logstore has a *standby* lease. It admits everything and makes no
//! call, until the KMS refuses an envelope of the Logstore. From then on that envelope is its
//! probe: it is renewed like the others, and admits nothing until the KMS unwraps the envelope.
//!
//! The bound on revocation is arithmetic, not scheduling. The age of an answer is the time since
//! its call was sent. An operation that finds the last answer older than `revalidate_every` plus
//! the time limit of a call, by either clock, calls the KMS itself or joins a call that is younger
//! than its time limit. Then it looks at the age again. So a renewal thread that was starved,
//! stopped or suspended cannot stretch the bound. Neither can a machine that was paused, if one of
//! the clocks shows it: either the time has passed, or the two clocks have moved apart.
//!
//! No log line delays a wipe, although a subscriber may block. A lease queues its lines, and
//! [`Lease::log`] writes them: without a lock, and in a thread that has nothing left to wipe.

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
    ids::LogstoreId,
    io::{Clock, Random},
    key_status::{KeyState, KeyStatus, Refusal},
    kms::{BoundedKms, Busy, Call, CallReport, Cmk, EncryptionContext, KmsError, LOOK_EVERY},
    metrics::LeaseMetrics,
    sync::{
        Condvar, LockRank, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
        lock, wait, wait_timeout,
    },
};

/// How many answers of the KMS an operation waits for, if each is too old on arrival.
const CALLS_OF_AN_OPERATION: u32 = 3;

/// The durations of a lease; see [`crate::StoreOptions`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeaseTerms {
    pub(crate) revalidate_every: Duration,
    /// `None`: an outage alone never ends the lease.
    pub(crate) outage_grace: Option<Duration>,
    pub(crate) call_timeout: Duration,
    /// If true, being unable to start a call (too many outstanding) is treated as an outage. If
    /// false, the last answer stays valid until it is too old.
    pub(crate) busy_is_outage: bool,
}

/// The wrapped key that renewal unwraps, and the fingerprint that the result must have.
pub(crate) struct Probe {
    pub(crate) wrapped: Vec<u8>,
    pub(crate) context: EncryptionContext,
    pub(crate) fingerprint: String,
}

/// Is notified when a lease stops or starts to admit operations.
pub(crate) trait LeaseListener: Send + Sync {
    /// Whether the listener still depends on this lease. The key of a Logstore may have been
    /// replaced since.
    fn depends_on(&self, lease: &Lease) -> bool;
    /// Access is lost, and nothing is wiped yet. May block for at most the time limit of a call.
    fn before_wipe(&self, _refusal: &Refusal) {}
    /// Access is lost. Wipes the keys and the plaintext that can be read again, without I/O and
    /// without waiting for a thread that does I/O. Returns the shards that have still to be sealed.
    fn wipe(&self, refusal: &Refusal) -> Vec<Arc<dyn LostShard>>;
    /// Access is lost, and every listener has wiped its keys. Records the loss.
    fn note_lost(&self, refusal: &Refusal);
    /// Access is back. Records the return.
    fn returned(&self);
}

/// The keys that depend on a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeaseScope {
    /// The keys of all Logstores under a master key that share its probe.
    MasterKey,
    /// The keys of a Logstore in probe mode `own`.
    Logstore(LogstoreId),
    /// The keys of a Logstore whose envelope was refused, beside a shared lease.
    Standby(LogstoreId),
    /// The service key, and with it every key of the store.
    ServiceKey,
}

impl LeaseScope {
    fn word(self) -> &'static str {
        match self {
            LeaseScope::MasterKey => "master_key",
            LeaseScope::Logstore(_) => "logstore",
            LeaseScope::Standby(_) => "envelope",
            LeaseScope::ServiceKey => "service_key",
        }
    }

    fn logstore(self) -> Option<LogstoreId> {
        match self {
            LeaseScope::Logstore(id) | LeaseScope::Standby(id) => Some(id),
            LeaseScope::MasterKey | LeaseScope::ServiceKey => None,
        }
    }
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
    pub(crate) scope: LeaseScope,
    pub(crate) sealer: Arc<Sealer>,
}

/// A lease on a master key. [`LeaseScope`] lists the keys that depend on it.
pub(crate) struct Lease {
    cmk: Cmk,
    kms: BoundedKms,
    breaker: Arc<CircuitBreaker>,
    probe: Mutex<Arc<Probe>>,
    terms: LeaseTerms,
    scope: LeaseScope,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    state: Mutex<State>,
    changed: Condvar,
    /// Until when, by the uptime in microseconds, [`Lease::admit`] need not look at `state`.
    fresh_until: AtomicU64,
    /// The same by the wall clock. The earlier one is valid.
    wall_until: AtomicU64,
    /// By how much the wall clock was ahead of the uptime, in microseconds, when the last call was
    /// sent.
    apart: AtomicU64,
    /// Raised at least once for each loss. Keys that were loaded before a loss are never used after
    /// it.
    epoch: AtomicU64,
    calls: AtomicU64,
    /// The pool that renews the lease, and the lease's number in it.
    pool: Option<(Arc<RenewalPool>, u64)>,
    /// For the pool and the circuit breaker, which do not keep the lease alive.
    this: Weak<Lease>,
    listeners: Mutex<Vec<Weak<dyn LeaseListener>>>,
    sealer: Arc<Sealer>,
    telling: Mutex<Telling>,
    /// Every answer, for a test: when its call was sent, and what it was.
    #[cfg(test)]
    heard: Mutex<Vec<(Moment, Result<(), Refusal>)>>,
    /// Notified when the listeners have acted on a loss or a return.
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
        let LeaseParts { cmk, kms, breaker, probe, terms, clock, random, pool, .. } = parts;
        let LeaseParts { scope, sealer, .. } = parts;
        let fresh_until = if matches!(scope, LeaseScope::Standby(_)) { u64::MAX } else { 0 };
        Arc::new_cyclic(|this| Self {
            cmk,
            kms,
            breaker,
            probe: Mutex::new(LockRank::LeaseProbe, Arc::new(probe)),
            terms,
            scope,
            clock,
            random,
            state: Mutex::new(LockRank::LeaseState, State::default()),
            changed: Condvar::new(),
            fresh_until: AtomicU64::new(fresh_until),
            wall_until: AtomicU64::new(0),
            apart: AtomicU64::new(0),
            epoch: AtomicU64::new(1),
            calls: AtomicU64::new(0),
            pool: pool.map(|pool| (Arc::clone(&pool), pool.enter())),
            this: Weak::clone(this),
            listeners: Mutex::new(LockRank::LeaseListeners, Vec::new()),
            sealer,
            telling: Mutex::new(LockRank::LeaseTelling, Telling::default()),
            #[cfg(test)]
            heard: Mutex::default(),
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

    /// Wakes a pool thread to tend the lease now.
    fn wake(&self) {
        // `start` reports a pool that can start no thread.
        let _ = self.start();
    }

    /// Begins with a call that was sent at `sent`, by which the KMS has allowed the key. The
    /// listeners hear of that after [`Lease::start`].
    pub(crate) fn begin(&self, sent: Moment) {
        let mut state = lock(&self.state);
        (state.last_attempt, state.last_success) = (Some(sent), Some(sent));
        // One store has one such lease, so its first renewal needs no jitter.
        state.due = sent.uptime + self.terms.revalidate_every;
        self.publish(&state);
    }

    /// The pool renews the lease from now on.
    ///
    /// # Errors
    /// When the pool cannot start its first thread.
    pub(crate) fn start(&self) -> std::io::Result<()> {
        let Some((pool, id)) = &self.pool else { return Ok(()) };
        let this: Weak<dyn Renewable> = self.this.clone();
        pool.wake(*id, this)
    }

    /// Takes in an answer whose call was sent at `sent`, and wakes the threads that wait for it.
    /// The pool then notifies the listeners at once, and reschedules the next renewal. `number` is
    /// the number of the call, if it was a call of this lease. The caller calls [`Lease::log`]
    /// later.
    fn answered(&self, number: Option<u64>, sent: Moment, answer: Result<(), Refusal>) {
        {
            let mut state = lock(&self.state);
            state.calling.take_if(|calling| Some(calling.number) == number);
            self.take_in(&mut state, sent, answer);
        }
        self.changed.notify_all();
        self.wake();
    }

    /// The listeners that depend on the lease now.
    fn dependents(&self) -> Vec<Arc<dyn LeaseListener>> {
        let listeners: Vec<_> = lock(&self.listeners).iter().filter_map(Weak::upgrade).collect();
        listeners.into_iter().filter(|listener| listener.depends_on(self)).collect()
    }

    /// Admits an operation that starts now. Returns the epoch: the caller must not use keys that
    /// were loaded under another epoch. Blocks for a KMS call if the last answer is too old.
    ///
    /// # Errors
    /// Why the lease does not admit it.
    pub(crate) fn admit(&self) -> Result<u64, Refusal> {
        let epoch = self.epoch.load(Ordering::Acquire);
        if self.is_fresh(Duration::ZERO) {
            return Ok(epoch);
        }
        self.admit_slowly()
    }

    /// Whether the lease admits operations for at least this long, without a call.
    fn is_fresh(&self, margin: Duration) -> bool {
        let until = self.fresh_until.load(Ordering::Acquire);
        if until == u64::MAX {
            return true;
        }
        let (uptime, wall) = (micros(self.clock.uptime()), self.clock.wall_us());
        let apart = wall.wrapping_sub(uptime).wrapping_sub(self.apart.load(Ordering::Acquire));
        uptime + micros(margin) < until
            && wall.saturating_add(micros(margin)) < self.wall_until.load(Ordering::Acquire)
            && apart.cast_signed().unsigned_abs() <= micros(self.terms.revalidate_every)
    }

    /// Whether [`Lease::admit`] decides without waiting for a KMS call, now and for a while. If not,
    /// starts a call, and does not wait for it. A lost lease decides also when too many calls are
    /// outstanding for another one: [`Lease::admit`] refuses at once then.
    pub(crate) fn decides_or_asks(&self) -> bool {
        let margin = self.terms.call_timeout.min(self.terms.revalidate_every) / 2;
        let decides = self.is_fresh(margin) || (self.is_lost() && !self.needs_call());
        if decides {
            return true;
        }
        // If too many calls are outstanding, the caller of a lease that is not lost tries again
        // later.
        self.ask().is_err() && self.is_lost()
    }

    /// Whether a call is under way.
    #[cfg(test)]
    fn is_calling(&self) -> bool {
        lock(&self.state).calling.is_some()
    }

    /// The epoch. Calls no KMS.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    fn admit_slowly(&self) -> Result<u64, Refusal> {
        let mut busy = None;
        // An answer that comes late, after a pause say, may be too old on arrival.
        for _ in 0..CALLS_OF_AN_OPERATION {
            if self.needs_call() {
                busy = self.renew_unless_spared().err();
            }
            let state = lock(&self.state);
            if self.is_standby() || state.last_attempt.is_some_and(|sent| !self.is_too_old(sent)) {
                return self.standing(&state).map(|()| self.epoch.load(Ordering::Acquire));
            }
        }
        self.check()?;
        let too_late = || KmsError::unreachable("its answers come too late");
        Err(Refusal::from(&busy.map_or_else(too_late, KmsError::from)))
    }

    /// Whether the last answer is too old to decide by.
    fn needs_call(&self) -> bool {
        let state = lock(&self.state);
        if self.is_standby() && !self.ended(&state) {
            return false;
        }
        let Some(sent) = state.last_attempt else { return true };
        let again = match state.refusal {
            Some(_) => self.clock.uptime() >= state.due,
            None => self.ended(&state),
        };
        again || self.is_too_old(sent)
    }

    /// Whether the answer to a call that was sent then is not valid any more.
    fn is_too_old(&self, sent: Moment) -> bool {
        sent.is_past(self.answer_lasts(), &*self.clock)
            || sent.clocks_have_parted(self.terms.revalidate_every, &*self.clock)
    }

    /// How long an answer is valid, from when its call was sent.
    fn answer_lasts(&self) -> Duration {
        self.terms.revalidate_every + self.terms.call_timeout
    }

    /// Whether the lease has run out, by either clock, or a refusal of the customer has ended it.
    fn ended(&self, state: &State) -> bool {
        if self.is_standby() {
            return state.last_attempt.is_some() && state.last_success.is_none();
        }
        let is_past = |sent: Moment, grace| sent.is_past(grace, &*self.clock);
        let grace = self.terms.outage_grace;
        state.last_success.is_none_or(|sent| grace.is_some_and(|grace| is_past(sent, grace)))
    }

    /// Whether the lease admits operations at this moment. Makes no call.
    fn standing(&self, state: &State) -> Result<(), Refusal> {
        if !self.ended(state) {
            return Ok(());
        }
        let ended = || Refusal::Unreachable("the lease has ended".to_owned());
        Err(state.refusal.clone().unwrap_or_else(ended))
    }

    /// Makes a new call even if one is under way: the answer to that one may be older than a change
    /// at the KMS that the caller knows of. Blocks for at most twice the time limit of a call.
    ///
    /// # Errors
    /// [`Busy`]: the KMS was not called.
    pub(crate) fn renew_afresh(&self) -> Result<(), Busy> {
        if self.stands_by() {
            return Ok(());
        }
        let under_way = lock(&self.state).calling.as_ref().map(|calling| calling.number);
        if let Some(number) = under_way {
            self.wait_for(number);
        }
        self.renew()
    }

    /// Calls the KMS now. If a call is under way, waits for that one instead. Blocks for at most
    /// the time limit of a call.
    ///
    /// # Errors
    /// [`Busy`]: the KMS was not called.
    pub(crate) fn renew(&self) -> Result<(), Busy> {
        self.ask().map(|number| self.wait_for(number))
    }

    /// Starts a KMS call, unless one is under way that is younger than its time limit. Returns the
    /// number of the call. Blocks only in a store without threads.
    fn ask(&self) -> Result<u64, Busy> {
        self.end_late_call();
        let (number, sent) = {
            let mut state = lock(&self.state);
            if let Some(calling) = &state.calling {
                return Ok(calling.number);
            }
            let sent = Moment::now(&*self.clock);
            state.last_number += 1;
            let number = state.last_number;
            state.calling = Some(Calling { number, sent, call: None });
            state.last_call = Some(sent);
            (number, sent)
        };
        let probe = Arc::clone(&lock(&self.probe));
        let (this, asked) = (self.this.clone(), Arc::clone(&probe));
        let done = move |answer: Result<SecretKey, KmsError>, report: CallReport| {
            let Some(lease) = this.upgrade() else { return report.log() };
            lease.hear(number, sent, report, judge(answer, &asked));
            // Without threads, the caller logs once it has notified the listeners.
            if lease.pool.is_some() {
                lease.log();
            }
        };
        let started = self.kms.start_unwrap(&self.cmk, probe.context.clone(), &probe.wrapped, done);
        let mut state = lock(&self.state);
        match started {
            Ok(call) => {
                self.calls.fetch_add(1, Ordering::Relaxed);
                if let Some(calling) = &mut state.calling
                    && calling.number == number
                {
                    calling.call = Some(call);
                }
                Ok(number)
            }
            Err(busy) => {
                // The last answer stays valid.
                state.calling.take_if(|calling| calling.number == number);
                state.due = state.due.max(self.clock.uptime() + self.terms.revalidate_every / 5);
                drop(state);
                self.changed.notify_all();
                if self.terms.busy_is_outage {
                    let outage = Refusal::from(&KmsError::from(busy.clone()));
                    self.answered(None, sent, Err(outage));
                }
                Err(busy)
            }
        }
    }

    /// Waits for the answer to a call of this lease, or for its time limit.
    fn wait_for(&self, number: u64) {
        let mut state = lock(&self.state);
        while let Some(calling) = state.calling.as_ref().filter(|calling| calling.number == number)
        {
            let left = calling.left(self.terms.call_timeout, &*self.clock);
            if left.is_zero() {
                drop(state);
                self.end_late_call();
                state = lock(&self.state);
                continue;
            }
            state = wait_timeout(&self.changed, state, left.min(LOOK_EVERY));
        }
    }

    /// Ends the call under way if its time limit has passed.
    fn end_late_call(&self) {
        let (number, sent, call) = match &lock(&self.state).calling {
            Some(calling) if calling.left(self.terms.call_timeout, &*self.clock).is_zero() => {
                (calling.number, calling.sent, calling.call.clone())
            }
            _ => return,
        };
        if let Some(call) = call
            && let Some(report) = call.give_up()
        {
            self.hear(number, sent, report, Err(Refusal::from(&call.no_answer())));
        } else {
            // The answer is here, and its thread takes it in at this moment.
            std::thread::yield_now();
        }
    }

    /// Takes in the answer to a call of this lease. The caller calls [`Lease::log`] later.
    fn hear(&self, number: u64, sent: Moment, report: CallReport, answer: Result<(), Refusal>) {
        #[cfg(test)]
        lock(&self.heard).push((sent, answer.clone()));
        lock(&self.state).unlogged.push(Line::Call(report));
        let spared = self.breaker.note(sent, &answer);
        self.answered(Some(number), sent, answer);
        spared.iter().for_each(|lease| lease.ask_soon());
    }

    /// Calls the KMS and waits, unless the lease has expired and another lease's call has just
    /// found that the KMS does not answer. Then it reuses that result.
    fn renew_unless_spared(&self) -> Result<(), Busy> {
        if let Some(number) = self.ask_unless_spared()? {
            self.wait_for(number);
        }
        Ok(())
    }

    /// As [`Lease::renew_unless_spared`], but does not wait. Returns the number of the call.
    fn ask_unless_spared(&self) -> Result<Option<u64>, Busy> {
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
        let take_in = |(asked, detail)| self.take_in_shared_outage(asked, detail);
        if outage.is_some_and(take_in) { Ok(None) } else { self.ask().map(Some) }
    }

    /// Takes in the outage that another lease's call has found. `false` if an answer of its own has
    /// renewed this lease meanwhile. The outage of another key may refuse, but never admit.
    fn take_in_shared_outage(&self, asked: Moment, detail: String) -> bool {
        {
            let mut state = lock(&self.state);
            if !self.ended(&state) {
                return false;
            }
            self.take_in(&mut state, asked, Err(Refusal::Unreachable(detail)));
        }
        self.changed.notify_all();
        self.wake();
        true
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
    fn take_in(&self, state: &mut State, sent: Moment, answer: Result<(), Refusal>) {
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
        let before = std::mem::replace(&mut state.refusal, answer.clone().err());
        self.publish(state);
        let usable = self.standing(state).is_ok();
        state.unlogged.push(Line::Answer { before, answer, usable });
    }

    /// Writes the queued log lines. A subscriber may block: the caller holds no lock, and has
    /// notified the listeners if that is its task.
    fn log(&self) {
        let lines = std::mem::take(&mut lock(&self.state).unlogged);
        lines.iter().for_each(|line| self.log_line(line));
    }

    fn log_line(&self, line: &Line) {
        use Refusal::{Invalid, Revoked, Unreachable};
        let (key, region) = (&*self.cmk.cmk_key_id, &*self.cmk.region_id);
        let (scope, logstore) =
            (self.scope.word(), self.scope.logstore().map(tracing::field::display));
        match line {
            Line::Call(report) => report.log(),
            Line::Answer { before, answer, usable } => match (before, answer) {
                (None, Ok(())) => debug!(key, region, scope, logstore, "lease renewed"),
                (Some(Revoked(_)), Ok(())) => {
                    info!(key, region, scope, logstore, "lease renewed after refusal");
                }
                (Some(Unreachable(_) | Invalid(_)), Ok(())) => {
                    info!(key, region, scope, logstore, "lease renewed after outage");
                }
                (_, Err(Revoked(reason))) => {
                    warn!(key, region, scope, logstore, %reason, "master key refused");
                }
                (Some(Unreachable(_) | Invalid(_)), Err(_)) => {
                    debug!(key, region, scope, logstore, usable, "KMS outage continues");
                }
                (_, Err(Unreachable(detail))) => {
                    warn!(key, region, scope, logstore, usable, detail, "KMS unreachable");
                }
                (_, Err(Invalid(detail))) => {
                    warn!(key, region, scope, logstore, usable, detail, "KMS answer invalid");
                }
            },
            Line::Told(Ok(())) => info!(key, region, scope, logstore, "lease usable"),
            Line::Told(Err(refusal)) => {
                warn!(key, region, scope, logstore, ?refusal, "lease lost, data keys wiped");
            }
        }
    }

    /// Updates the atomics that [`Lease::admit`] looks at.
    fn publish(&self, state: &State) {
        match (self.standing(state), state.last_success, state.last_attempt) {
            (Ok(()), ..) if self.is_standby() => {
                self.was_back.store(true, Ordering::Release);
                self.fresh_until.store(u64::MAX, Ordering::Release);
            }
            (Ok(()), Some(success), Some(attempt)) => {
                self.apart.store(attempt.apart(), Ordering::Release);
                self.was_back.store(true, Ordering::Release);
                let lasts = self.answer_lasts();
                let mut uptime = attempt.uptime + lasts;
                let mut wall = attempt.wall_us.saturating_add(micros(lasts));
                if let Some(grace) = self.terms.outage_grace {
                    uptime = uptime.min(success.uptime + grace);
                    wall = wall.min(success.wall_us.saturating_add(micros(grace)));
                }
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

    /// Takes in a refusal of an envelope, by a call that was sent at `sent`. From now on the lease
    /// is renewed with that envelope, whose wrapped key is `probe`.
    pub(super) fn take_in_refusal(&self, sent: Moment, refusal: Refusal, probe: Probe) {
        self.set_probe(probe);
        self.answered(None, sent, Err(refusal));
    }

    /// The time, for [`Lease::take_in_refusal`].
    pub(super) fn now(&self) -> Moment {
        Moment::now(&*self.clock)
    }

    /// Starts a renewal if one is due, ends one whose time limit has passed, and notifies the
    /// listeners of a loss or a return. Returns after how long to call this again. In a store with
    /// threads, this waits for no KMS, and for a listener only in [`LeaseListener::before_wipe`]:
    /// for at most the time limit of a call. Without threads it makes the call and seals itself.
    /// The caller must hold no lock that a listener takes.
    pub(crate) fn tend(&self) -> Duration {
        let next = self.tend_quietly();
        self.log();
        next
    }

    /// As [`Lease::tend`], without the log lines.
    fn tend_quietly(&self) -> Duration {
        const IDLE: Duration = Duration::from_secs(3600);
        if self.dependents().is_empty() || self.stands_by() {
            // Every Logstore was deleted or has another master key, and the next use calls the KMS;
            // or there is nothing to renew.
            self.begin_telling();
            return IDLE;
        }
        self.end_late_call();
        let due = {
            let state = lock(&self.state);
            let due = |sent| self.clock.uptime() >= state.due || self.is_too_old(sent);
            state.last_attempt.is_some_and(due)
        };
        if due {
            // If too many calls are under way, the next renewal is due again soon.
            let _ = self.ask_unless_spared();
        }
        self.begin_telling();
        let now = self.clock.uptime();
        let state = lock(&self.state);
        if let Some(calling) = &state.calling {
            // Sooner if the answer comes.
            return calling.left(self.terms.call_timeout, &*self.clock);
        }
        match (state.last_attempt, state.last_success) {
            (None, _) => IDLE,
            (Some(_), Some(sent)) if state.told_lost != Some(true) => {
                let end = self.terms.outage_grace.map(|grace| sent.uptime + grace);
                end.map_or(state.due, |end| state.due.min(end)).saturating_sub(now)
            }
            _ => state.due.saturating_sub(now),
        }
    }

    /// Whether it is a standby lease whose envelopes the KMS has not refused. It needs no renewal.
    fn stands_by(&self) -> bool {
        self.is_standby() && !self.ended(&lock(&self.state))
    }

    pub(crate) fn scope(&self) -> LeaseScope {
        self.scope
    }

    fn is_standby(&self) -> bool {
        matches!(self.scope, LeaseScope::Standby(_))
    }

    /// Whether it is a standby lease that was never needed.
    pub(crate) fn is_unused(&self) -> bool {
        self.is_standby() && lock(&self.state).last_attempt.is_none()
    }

    /// Notifies the listeners of a loss or a return that they have not heard of. Blocks until they
    /// have acted on it, and on all before it: they seal segments and write to the audit log.
    pub(crate) fn tell(&self) {
        let turn = self.begin_telling();
        drop(self.acted_on(turn));
        self.log();
    }

    /// As [`Lease::tell`], but in a store with threads does not wait until segments are sealed and
    /// records are written. Blocks for [`LeaseListener::before_wipe`], for at most the time limit
    /// of a call. The data keys are wiped when this returns. Returns the number of the last turn.
    pub(crate) fn begin_telling(&self) -> u64 {
        if let Some(refusal) = self.untold_loss() {
            self.dependents().iter().for_each(|listener| listener.before_wipe(&refusal));
        }
        let noticed = self.clock.uptime();
        let mut telling = lock(&self.telling);
        let Some(standing) = self.news() else { return telling.issued };
        telling.returns += u64::from(standing.is_ok());
        self.begin_turn(telling, noticed, standing, self.dependents())
    }

    /// Notifies a listener of a loss that the others had heard of before it listened.
    pub(crate) fn tell_late(&self, listener: Arc<dyn LeaseListener>, refusal: Refusal) {
        let noticed = self.clock.uptime();
        let telling = lock(&self.telling);
        let turn = self.begin_turn(telling, noticed, Err(refusal), vec![listener]);
        drop(self.acted_on(turn));
        self.log();
    }

    /// A loss that the listeners have to hear of.
    fn untold_loss(&self) -> Option<Refusal> {
        let state = lock(&self.state);
        state.last_attempt.filter(|_| state.told_lost != Some(true))?;
        self.standing(&state).err()
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

    /// Wipes the keys of the dependents if access is lost. That takes no I/O, no KMS call and no
    /// log line, so nothing delays it. The sealer does the rest, in this thread if the store has no
    /// threads. Returns the number of the turn. The caller calls [`Lease::log`] later.
    fn begin_turn(
        &self,
        mut telling: MutexGuard<'_, Telling>,
        noticed: Duration,
        standing: Result<(), Refusal>,
        dependents: Vec<Arc<dyn LeaseListener>>,
    ) -> u64 {
        telling.issued += 1;
        let (number, returns) = (telling.issued, telling.returns);
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
                this.upgrade().is_none_or(|lease| lease.is_lost_since(returns))
            }),
            record: Box::new(move || {
                let lease = told.upgrade();
                let _done = lease.as_ref().map(|lease| lease.in_turn(number));
                dependents.iter().for_each(|listener| match &standing {
                    Ok(()) => listener.returned(),
                    Err(refusal) => listener.note_lost(refusal),
                });
                recorded.iter().for_each(|shard| shard.record());
            }),
        });
        drop(telling);
        lock(&self.state).unlogged.push(Line::Told(lost.map_or(Ok(()), Err)));
        if let Some(turn) = rest {
            self.log();
            self.sealer.run(turn);
        }
        number
    }

    /// Whether the lease has not admitted operations since the listeners had heard of this many
    /// returns.
    fn is_lost_since(&self, returns: u64) -> bool {
        self.is_lost() && lock(&self.telling).returns == returns
    }

    /// Whether the lease admits operations now, as far as is known. Calls no KMS.
    ///
    /// # Errors
    /// Why it does not.
    pub(crate) fn check(&self) -> Result<(), Refusal> {
        self.standing(&lock(&self.state))
    }

    /// Whether the lease admits no operation now, as far as is known. Calls no KMS.
    pub(crate) fn is_lost(&self) -> bool {
        self.check().is_err()
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
        let left = match (self.standing(&state), state.last_success) {
            (Ok(()), Some(sent)) => {
                let left = |grace| (sent.uptime + grace).saturating_sub(self.clock.uptime());
                self.terms.outage_grace.map(left)
            }
            _ => Some(Duration::ZERO),
        };
        let state = match (&state.refusal, state.last_attempt) {
            (_, None) => KeyState::Idle,
            (Some(Refusal::Revoked(reason)), _) => KeyState::Revoked { reason: *reason },
            (Some(Refusal::Unreachable(detail) | Refusal::Invalid(detail)), _) => {
                KeyState::Outage { detail: detail.clone() }
            }
            (None, _) => KeyState::Active,
        };
        KeyStatus { state, lease_left: left }
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
            logstore: self.scope.logstore(),
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

/// The losses and returns of which the listeners are notified, by their numbers.
#[derive(Default)]
struct Telling {
    /// The last one.
    issued: u64,
    /// The last one that the listeners have acted on.
    done: u64,
    /// How many returns there were.
    returns: u64,
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
    /// When the call was sent whose answer is valid now. It may be a call of another lease.
    last_attempt: Option<Moment>,
    /// When this lease last made a call of its own.
    last_call: Option<Moment>,
    /// When the next renewal is due, by the uptime.
    due: Duration,
    /// The last answer, unless it was a success.
    refusal: Option<Refusal>,
    /// The number of the last call.
    last_number: u64,
    /// The call under way.
    calling: Option<Calling>,
    /// Whether the listeners last heard of a loss; `None` before the first answer. They hear of
    /// that one in any case: a loss that an earlier process recorded may have ended since.
    told_lost: Option<bool>,
    /// The log lines for [`Lease::log`], in order.
    unlogged: Vec<Line>,
}

/// A log line of a lease.
enum Line {
    /// A call has ended.
    Call(CallReport),
    /// An answer was taken in. `before` is the refusal before it, and `usable` says whether the
    /// lease still admits operations.
    Answer { before: Option<Refusal>, answer: Result<(), Refusal>, usable: bool },
    /// The listeners were notified of a return or a loss.
    Told(Result<(), Refusal>),
}

/// A call of a lease that is under way.
struct Calling {
    number: u64,
    sent: Moment,
    /// Not set while the call is being started.
    call: Option<Call>,
}

impl Calling {
    /// How long the call may take from now on. Zero: its time limit has passed, by one of the
    /// clocks.
    fn left(&self, limit: Duration, clock: &dyn Clock) -> Duration {
        let Some(call) = &self.call else { return LOOK_EVERY };
        if self.sent.is_past(limit, clock) { Duration::ZERO } else { call.left() }
    }
}

/// The meaning of an answer to the unwrap of a probe.
fn judge(answer: Result<SecretKey, KmsError>, probe: &Probe) -> Result<(), Refusal> {
    let key = answer.map_err(|error| Refusal::from(&error))?;
    if fingerprint(&key) == probe.fingerprint {
        Ok(())
    } else {
        Err(Refusal::Invalid("it unwrapped the probe to another key".to_owned()))
    }
}

#[cfg(test)]
mod schedules;
#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "a thread that waits for another one's call signals nothing"
)]
pub(super) mod tests;
