//! The lease: for how long a data key in memory may be used, and who says so.
//!
//! One lease serves every Logstore of a store under the same customer master key, region and role. It is renewed by unwrapping a
//! small probe envelope at the KMS and by nothing else, least of all by use. The bound is arithmetic, not scheduling: an
//! operation that finds the last answer older than `revalidate_every` plus the time limit of a call, by either clock, asks the KMS
//! itself, so a renewal thread that was starved, stopped or suspended, or a machine that was paused, cannot stretch it.

use std::{
    fmt,
    sync::{Arc, Weak},
    time::Duration,
};

use serde::Serialize;
use tracing::{debug, info, warn};

use super::{
    circuit::{Circuit, PERIODS_SPARED},
    envelope::fingerprint,
    pool::LeasePool,
};
use crate::{
    crypto::SecretKey,
    io::{Clock, Random},
    kms::{BoundedKms, Cmk, EncryptionContext, KmsError, RevokedReason},
    metrics::LeaseMetrics,
    sync::{
        Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
        lock, wait,
    },
};

/// How often and how long; see [`crate::StoreOptions`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct LeaseTerms {
    pub(crate) revalidate_every: Duration,
    pub(crate) outage_grace: Duration,
    pub(crate) call_timeout: Duration,
}

/// Why the lease does not admit an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    Revoked(RevokedReason),
    Unreachable(String),
    Invalid(String),
}

impl From<&KmsError> for Refusal {
    fn from(error: &KmsError) -> Self {
        match error {
            KmsError::Revoked { reason, .. } => Refusal::Revoked(*reason),
            KmsError::Invalid { detail } => Refusal::Invalid(detail.clone()),
            other => Refusal::Unreachable(other.to_string()),
        }
    }
}

/// Whether the key of a Logstore can be used now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum KeyState {
    /// The Logstore has no envelope.
    None,
    /// Usable.
    Active,
    /// Not asked yet: the KMS is called at first use.
    Idle,
    /// The KMS does not answer. The key is usable for as long as the lease lasts.
    Outage {
        /// What the backend last said.
        detail: String,
    },
    /// The KMS refuses.
    Revoked {
        /// Why.
        reason: RevokedReason,
    },
}

/// The state of a Logstore's key and its lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct KeyStatus {
    /// The state.
    pub state: KeyState,
    /// How long the key may still be used should the KMS stop answering now; `None` where no KMS is involved.
    pub lease_left: Option<Duration>,
}

/// What every unwrap of the probe must prove.
pub(crate) struct Probe {
    pub(crate) wrapped: Vec<u8>,
    pub(crate) context: EncryptionContext,
    pub(crate) fingerprint: String,
}

/// Told when a lease stops or starts admitting. Called without any lock of the lease.
pub(crate) trait LeaseListener: Send + Sync {
    /// Whether it still depends on the lease for this master key, which may have been replaced since it began to listen.
    fn depends_on(&self, cmk: &Cmk) -> bool;
    /// Access is lost: seal what was acknowledged, then wipe.
    fn lost(&self, refusal: &Refusal);
    /// Access is lost, and everybody has dealt with it: put it on record.
    fn note_lost(&self, refusal: &Refusal);
    /// Access is back.
    fn recovered(&self);
}

/// A moment, by both clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Moment {
    uptime: Duration,
    wall_us: u64,
}

impl Moment {
    pub(super) fn now(clock: &dyn Clock) -> Self {
        Self { uptime: clock.uptime(), wall_us: clock.wall_us() }
    }

    /// Whether at least `duration` has passed since, by either clock.
    pub(super) fn is_past(self, duration: Duration, clock: &dyn Clock) -> bool {
        clock.uptime() >= self.uptime + duration || clock.wall_us() >= self.wall_us.saturating_add(micros(duration))
    }
}

#[derive(Default)]
struct State {
    /// When the last successful call was sent.
    last_success: Option<Moment>,
    /// When the call was sent whose answer counts now.
    last_attempt: Option<Moment>,
    /// When it last made a call of its own.
    last_call: Option<Moment>,
    /// When the next renewal is due.
    due: Duration,
    /// What the last call answered, if not success.
    refusal: Option<Refusal>,
    /// When the call under way was sent.
    calling: Option<Moment>,
    /// Whether the listeners were last told of a loss; `None` before the first answer, which they are told in any case: they may
    /// depend on what an earlier process has left on record.
    told_lost: Option<bool>,
}

pub(crate) struct Lease {
    cmk: Cmk,
    kms: BoundedKms,
    circuit: Arc<Circuit>,
    probe: Mutex<Arc<Probe>>,
    terms: LeaseTerms,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
    state: Mutex<State>,
    changed: Condvar,
    /// Until when (uptime in microseconds) operations need not look at `state`.
    fresh_until: AtomicU64,
    /// The wall-clock time that ends it too.
    wall_until: AtomicU64,
    /// Counts the losses: keys loaded before a loss are never used after it.
    epoch: AtomicU64,
    calls: AtomicU64,
    /// Who tends it, and as what; nobody in a store without threads.
    pool: Option<(Arc<LeasePool>, u64)>,
    /// For the pool, which does not keep it alive.
    this: Weak<Lease>,
    listeners: Mutex<Vec<Weak<dyn LeaseListener>>>,
    /// Serializes the telling of listeners, so that a loss and a recovery are heard in order.
    telling: Mutex<()>,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("cmk", &self.cmk).field("terms", &self.terms).finish_non_exhaustive()
    }
}

impl Lease {
    #[expect(clippy::too_many_arguments, reason = "what the store injects, in one place")]
    pub(crate) fn new(
        cmk: Cmk,
        kms: BoundedKms,
        circuit: Arc<Circuit>,
        probe: Probe,
        terms: LeaseTerms,
        clock: Arc<dyn Clock>,
        random: Arc<dyn Random>,
        pool: Option<Arc<LeasePool>>,
    ) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            cmk,
            kms,
            circuit,
            probe: Mutex::new(Arc::new(probe)),
            terms,
            clock,
            random,
            state: Mutex::default(),
            changed: Condvar::new(),
            fresh_until: AtomicU64::new(0),
            wall_until: AtomicU64::new(0),
            epoch: AtomicU64::new(1),
            calls: AtomicU64::new(0),
            pool: pool.map(|pool| (Arc::clone(&pool), pool.enter())),
            this: Weak::clone(this),
            listeners: Mutex::default(),
            telling: Mutex::default(),
        })
    }

    pub(crate) fn cmk(&self) -> &Cmk {
        &self.cmk
    }

    /// Renews with this probe from now on: the same key, wrapped again.
    pub(crate) fn set_probe(&self, probe: Probe) {
        *lock(&self.probe) = Arc::new(probe);
    }

    pub(crate) fn listen(&self, listener: Weak<dyn LeaseListener>) {
        {
            let mut listeners = lock(&self.listeners);
            let same = |other: &Weak<dyn LeaseListener>| std::ptr::addr_eq(other.as_ptr(), listener.as_ptr());
            listeners.retain(|other| other.strong_count() > 0 && !same(other));
            listeners.push(listener);
        }
        // Renewal may have been put off for as long as nobody listened.
        self.wake();
    }

    /// Has it tended now, in another thread.
    fn wake(&self) {
        if let Some((pool, id)) = &self.pool {
            // The first waking, in `start`, has a thread; no later one can fail.
            let _ = pool.wake(*id, Weak::clone(&self.this));
        }
    }

    /// Has it tended from now on.
    ///
    /// # Errors
    /// When there is no thread for it.
    pub(crate) fn start(&self) -> std::io::Result<()> {
        self.pool.as_ref().map_or(Ok(()), |(pool, id)| pool.wake(*id, Weak::clone(&self.this)))
    }

    /// Takes in an answer and wakes who waited for it. It is tended next: a loss or a recovery is told at once, and the next renewal
    /// is due anew.
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

    /// Those that depend on it now.
    fn dependents(&self) -> Vec<Arc<dyn LeaseListener>> {
        let listeners: Vec<_> = lock(&self.listeners).iter().filter_map(Weak::upgrade).collect();
        listeners.into_iter().filter(|listener| listener.depends_on(&self.cmk)).collect()
    }

    /// Admits an operation that starts now, or says why not. Returns the epoch: keys of another one must not be used.
    pub(crate) fn admit(&self) -> Result<u64, Refusal> {
        let epoch = self.epoch.load(Ordering::Acquire);
        if micros(self.clock.uptime()) < self.fresh_until.load(Ordering::Acquire)
            && self.clock.wall_us() < self.wall_until.load(Ordering::Acquire)
        {
            return Ok(epoch);
        }
        self.admit_slowly()
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
        sent.is_past(self.answer_lasts(), &*self.clock)
            || if state.refusal.is_some() { self.clock.uptime() >= state.due } else { self.ended(&state) }
    }

    /// For how long after it was sent the answer to a call is good enough to decide by.
    fn answer_lasts(&self) -> Duration {
        self.terms.revalidate_every + self.terms.call_timeout
    }

    /// Whether the lease has run out, by either clock, or the customer's refusal has ended it.
    fn ended(&self, state: &State) -> bool {
        state.last_success.is_none_or(|sent| sent.is_past(self.terms.outage_grace, &*self.clock))
    }

    /// What holds at this moment, without asking anybody.
    fn standing(&self, state: &State) -> Result<(), Refusal> {
        if !self.ended(state) {
            return Ok(());
        }
        Err(state.refusal.clone().unwrap_or_else(|| Refusal::Unreachable("the lease has ended".to_owned())))
    }

    /// Asks the KMS by a call that is sent from now on: one that is under way may have been answered before what the caller knows of.
    pub(crate) fn renew_afresh(&self) {
        let mut state = lock(&self.state);
        let under_way = state.calling;
        while under_way.is_some() && state.calling == under_way {
            state = wait(&self.changed, state);
        }
        drop(state);
        self.renew();
    }

    /// Asks the KMS now, unless a call is under way: then waits for that one. Either takes no longer than a call may take.
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
        let spared = self.circuit.note(sent, &answer);
        self.answered(sent, answer);
        spared.iter().for_each(|lease| lease.ask_soon());
    }

    /// Asks the KMS, unless the lease has ended and another one's call has just found that the KMS does not answer.
    fn renew_unless_spared(&self) {
        let outage = {
            let state = lock(&self.state);
            let every = self.terms.revalidate_every;
            let unreachable = matches!(state.refusal, Some(Refusal::Unreachable(_)));
            let long_ago = state.last_call.is_none_or(|sent| sent.is_past(every * PERIODS_SPARED, &*self.clock));
            if state.calling.is_some() || !unreachable || !self.ended(&state) || long_ago {
                None
            } else {
                // Earlier than the next renewal of whoever asked, so that it goes round.
                self.circuit.spare(Weak::clone(&self.this), Moment::now(&*self.clock), every * 4 / 5, &*self.clock)
            }
        };
        match outage {
            Some((asked, detail)) => self.answered(asked, Err(Refusal::Unreachable(detail))),
            None => self.renew(),
        }
    }

    /// The KMS answers again: asks within a fifth of a period.
    fn ask_soon(&self) {
        let every = self.terms.revalidate_every;
        lock(&self.state).due = self.clock.uptime() + (every - self.jittered(every));
        self.wake();
    }

    fn ask(&self) -> Result<(), Refusal> {
        let probe = Arc::clone(&lock(&self.probe));
        let key = self.unwrap(probe.context.clone(), &probe.wrapped).map_err(|error| Refusal::from(&error))?;
        if fingerprint(&key) == probe.fingerprint {
            Ok(())
        } else {
            Err(Refusal::Invalid("it unwrapped the probe to another key".to_owned()))
        }
    }

    /// Unwraps the envelope of a Logstore, which is first used. In an outage that is known it does not wait for the KMS to
    /// fail to answer once more.
    pub(crate) fn unwrap_envelope(&self, context: EncryptionContext, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        let outage = match &lock(&self.state) {
            state if self.clock.uptime() < state.due && self.circuit.is_open() => match &state.refusal {
                Some(Refusal::Unreachable(detail)) => Some(detail.clone()),
                _ => None,
            },
            _ => None,
        };
        match outage {
            Some(detail) => Err(KmsError::Unreachable { detail }),
            None => self.unwrap(context, wrapped),
        }
    }

    /// Unwraps at the KMS, in the time that a call may take.
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
            // The customer's refusal ends the lease: an outage that follows has nothing left to ride.
            Err(Refusal::Revoked(_)) => state.last_success = None,
            Err(Refusal::Unreachable(_) | Refusal::Invalid(_)) => {}
        }
        self.trace(state.refusal.as_ref(), &answer);
        state.refusal = answer.err();
        self.publish(state);
    }

    /// Says what an answer changes.
    fn trace(&self, before: Option<&Refusal>, answer: &Result<(), Refusal>) {
        let (key, region) = (&*self.cmk.cmk_key_id, &*self.cmk.region_id);
        match (before, answer) {
            (None, Ok(())) => debug!(key, region, "a lease was renewed"),
            (Some(_), Ok(())) => info!(key, region, "the KMS answers again: a lease was renewed"),
            (_, Err(Refusal::Revoked(reason))) => warn!(key, region, %reason, "the KMS refuses a master key"),
            (Some(Refusal::Unreachable(_) | Refusal::Invalid(_)), Err(_)) => debug!(key, region, "an outage goes on"),
            (_, Err(Refusal::Unreachable(detail))) => {
                warn!(key, region, detail, "an outage begins: the KMS cannot be reached, and the lease runs on");
            }
            (_, Err(Refusal::Invalid(detail))) => {
                warn!(key, region, detail, "an outage begins: the KMS gives no valid answer, and the lease runs on");
            }
        }
    }

    /// Updates what the quick path looks at.
    fn publish(&self, state: &State) {
        match (self.standing(state), state.last_success, state.last_attempt) {
            (Ok(()), Some(success), Some(attempt)) => {
                let (lasts, grace) = (self.answer_lasts(), self.terms.outage_grace);
                let uptime = (attempt.uptime + lasts).min(success.uptime + grace);
                let wall = attempt.wall_us.saturating_add(micros(lasts));
                let wall = wall.min(success.wall_us.saturating_add(micros(grace)));
                self.wall_until.store(wall, Ordering::Release);
                self.fresh_until.store(micros(uptime), Ordering::Release);
            }
            _ => {
                self.fresh_until.store(0, Ordering::Release);
                self.epoch.fetch_add(1, Ordering::AcqRel);
            }
        }
    }

    /// Between four fifths of `period` and all of it, so that many leases do not call at the same moment.
    fn jittered(&self, period: Duration) -> Duration {
        let mut byte = [0];
        // Without randomness there is no jitter, and nothing worse.
        let _ = self.random.fill(&mut byte);
        period - period * u32::from(byte[0]) / (5 * 255)
    }

    /// A refusal that another call under the same master key was given (the unwrap of a Logstore's own envelope).
    pub(crate) fn report(&self, refusal: Refusal) {
        if matches!(refusal, Refusal::Revoked(_)) {
            self.answered(Moment::now(&*self.clock), Err(refusal));
        }
    }

    /// Renews if that is due, notices the end of the lease, and tells the listeners what changed. Returns how long nothing
    /// more is due. Must be called without any lock that a listener takes.
    pub(crate) fn tend(&self) -> Duration {
        const IDLE: Duration = Duration::from_secs(3600);
        if self.dependents().is_empty() {
            // Its last Logstore was deleted, or has another master key now: whoever comes asks afresh.
            self.tell();
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
        self.tell();
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

    /// Tells the listeners, if the standing is not what they were last told.
    pub(crate) fn tell(&self) {
        let _in_order = lock(&self.telling);
        let standing = {
            let mut state = lock(&self.state);
            if state.last_attempt.is_none() {
                return;
            }
            let standing = self.standing(&state);
            if Some(standing.is_err()) == state.told_lost {
                return;
            }
            state.told_lost = Some(standing.is_err());
            if standing.is_err() {
                self.publish(&state);
            }
            standing
        };
        let dependents = self.dependents();
        let (key, region, logstores) = (&*self.cmk.cmk_key_id, &*self.cmk.region_id, dependents.len());
        match &standing {
            Ok(()) => info!(key, region, logstores, "a master key can be used"),
            Err(refusal) => {
                warn!(key, region, logstores, ?refusal, "a master key cannot be used: its data keys are wiped")
            }
        }
        match &standing {
            Ok(()) => dependents.iter().for_each(|listener| listener.recovered()),
            // Every key is wiped before the first record is written: however long that takes, or whether it fails, delays none.
            Err(refusal) => {
                dependents.iter().for_each(|listener| listener.lost(refusal));
                dependents.iter().for_each(|listener| listener.note_lost(refusal));
            }
        }
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

    /// What the listeners were told last, if anything.
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

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a thread that waits for another one's call signals nothing")]
pub(super) mod tests;
