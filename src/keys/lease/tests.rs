use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::{
    io::OsRandom,
    kms::{Kms, KmsCall, RevokedReason, Watch},
};

pub(in crate::keys) const EVERY: Duration = Duration::from_secs(30);
pub(super) const GRACE: Duration = Duration::from_secs(310);
pub(super) const TIMEOUT: Duration = Duration::from_secs(5);
const STEP: Duration = Duration::from_micros(1);

#[derive(Debug)]
pub(in crate::keys) struct TestClock {
    wall_us: AtomicU64,
    uptime_us: AtomicU64,
}

impl TestClock {
    pub(in crate::keys) fn new() -> Self {
        Self {
            wall_us: AtomicU64::new(1_700_000_000_000_000),
            uptime_us: AtomicU64::new(1_000_000),
        }
    }

    pub(in crate::keys) fn advance(&self, by: Duration) {
        self.jump_wall(by);
        self.run(by);
    }

    /// Advances the uptime alone, as if the wall clock were set back again and again.
    fn run(&self, by: Duration) {
        self.uptime_us.fetch_add(micros(by), Ordering::Relaxed);
    }

    pub(super) fn jump_wall(&self, by: Duration) {
        self.wall_us.fetch_add(micros(by), Ordering::Relaxed);
    }
}

impl Clock for TestClock {
    fn wall_us(&self) -> u64 {
        self.wall_us.load(Ordering::Relaxed)
    }

    fn uptime(&self) -> Duration {
        Duration::from_micros(self.uptime_us.load(Ordering::Relaxed))
    }
}

/// Fills with one byte, or fails.
#[derive(Debug)]
struct Constant(Option<u8>);

impl Random for Constant {
    fn fill(&self, buf: &mut [u8]) -> std::io::Result<()> {
        buf.fill(self.0.ok_or(std::io::ErrorKind::Other)?);
        Ok(())
    }
}

/// Unwraps everything to one key, unless it is to fail.
#[derive(Debug, Default)]
pub(in crate::keys) struct TestKms {
    error: Mutex<Option<KmsError>>,
    /// Held by a test: a call that has its answer comes back only when it lets go.
    pub(in crate::keys) back: Mutex<()>,
    pub(in crate::keys) calls: AtomicU64,
}

impl Kms for TestKms {
    fn name(&self) -> &str {
        "test"
    }

    fn serves(&self, _region_id: &str) -> bool {
        true
    }

    fn wrap(&self, _call: &KmsCall<'_>, _key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        unreachable!("a lease wraps nothing")
    }

    fn unwrap(&self, _call: &KmsCall<'_>, _wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        let answer = lock(&self.error).clone().map_or_else(|| Ok(key()), Err);
        self.calls.fetch_add(1, Ordering::SeqCst);
        let _back = lock(&self.back);
        answer
    }
}

pub(super) fn key() -> SecretKey {
    SecretKey::from_bytes(&mut [7; 32])
}

fn probe() -> Probe {
    let (wrapped, context) = (Vec::new(), EncryptionContext::new());
    Probe { wrapped, context, fingerprint: fingerprint(&key()) }
}

/// A KMS, a clock and a circuit breaker, for leases that the test or a pool tends.
pub(in crate::keys) struct World {
    pub(in crate::keys) clock: Arc<TestClock>,
    pub(in crate::keys) breaker: Arc<CircuitBreaker>,
    pub(in crate::keys) kms: Arc<TestKms>,
    sealer: Arc<Sealer>,
}

impl World {
    pub(in crate::keys) fn new() -> Self {
        let clock = Arc::new(TestClock::new());
        let sealer = Sealer::new(Arc::clone(&clock) as _, false);
        Self { clock, breaker: Arc::default(), kms: Arc::default(), sealer }
    }

    pub(in crate::keys) fn lease(&self) -> Arc<Lease> {
        self.lease_with(Constant(Some(0)), None)
    }

    /// A lease that this pool tends.
    pub(in crate::keys) fn lease_in(&self, pool: &Arc<RenewalPool>) -> Arc<Lease> {
        self.lease_with(Constant(Some(0)), Some(Arc::clone(pool)))
    }

    fn standby(&self) -> Arc<Lease> {
        Lease::new(LeaseParts {
            scope: LeaseScope::Standby(LogstoreId::from_bytes([1; 16])),
            ..self.parts(Constant(Some(0)), None)
        })
    }

    fn lease_with(&self, random: Constant, pool: Option<Arc<RenewalPool>>) -> Arc<Lease> {
        Lease::new(self.parts(random, pool))
    }

    fn parts(&self, random: Constant, pool: Option<Arc<RenewalPool>>) -> LeaseParts {
        let clock = Arc::clone(&self.clock) as Arc<dyn Clock>;
        let watch = Watch { clock: Arc::clone(&clock), meter: Arc::default() };
        let kms = BoundedKms::new(Arc::clone(&self.kms) as Arc<dyn Kms>, TIMEOUT, true, watch);
        let cmk = Cmk {
            cmk_key_id: "key".to_owned(),
            arn: "role".to_owned(),
            region_id: "region".to_owned(),
        };
        let probe = probe();
        let terms = LeaseTerms {
            revalidate_every: EVERY,
            outage_grace: Some(GRACE),
            call_timeout: TIMEOUT,
            busy_is_outage: false,
        };
        let (breaker, random) = (Arc::clone(&self.breaker), Arc::new(random));
        let sealer = Arc::clone(&self.sealer);
        LeaseParts {
            cmk,
            kms,
            breaker,
            probe,
            terms,
            clock,
            random,
            pool,
            scope: LeaseScope::MasterKey,
            sealer,
        }
    }

    pub(in crate::keys) fn kms_is(&self, error: Option<KmsError>) {
        *lock(&self.kms.error) = error;
    }
}

/// The parts of a lease of this world that its own test tends.
pub(super) fn parts(world: &World) -> LeaseParts {
    world.parts(Constant(Some(0)), None)
}

pub(in crate::keys) fn away() -> Option<KmsError> {
    Some(KmsError::Unreachable { detail: "away".to_owned() })
}

#[derive(Default)]
pub(in crate::keys) struct Ears {
    /// The calls to it, in order.
    told: Mutex<Vec<&'static str>>,
    /// How often it was asked whether it is concerned.
    pub(in crate::keys) asked: AtomicU64,
}

impl Ears {
    pub(in crate::keys) fn listening_to(lease: &Lease) -> Arc<Self> {
        let ears = Arc::new(Self::default());
        let weak: Weak<Self> = Arc::downgrade(&ears);
        lease.listen(weak);
        ears
    }

    fn heard(&self) -> Vec<&'static str> {
        std::mem::take(&mut lock(&self.told))
    }
}

impl LeaseListener for Ears {
    fn depends_on(&self, _lease: &Lease) -> bool {
        self.asked.fetch_add(1, Ordering::SeqCst);
        true
    }

    fn wipe(&self, _refusal: &Refusal) -> Vec<Arc<dyn LostShard>> {
        lock(&self.told).push("wiped");
        Vec::new()
    }

    fn note_lost(&self, _refusal: &Refusal) {
        lock(&self.told).push("noted");
    }

    fn returned(&self) {
        lock(&self.told).push("returned");
    }
}

#[test]
fn an_answer_lasts_to_the_microsecond_by_either_clock() {
    let lasts = EVERY + TIMEOUT;
    for wall_alone in [false, true] {
        let world = World::new();
        // The other clock follows at half the speed, so that they do not move apart too far.
        let pass = |by: Duration| {
            let (uptime, wall) = if wall_alone { (by / 2, by) } else { (by, by / 2) };
            world.clock.run(uptime);
            world.clock.jump_wall(wall);
        };
        let lease = world.lease();
        assert_eq!(
            lease.status(),
            KeyStatus { state: KeyState::Idle, lease_left: Some(Duration::ZERO) }
        );
        let epoch = lease.admit().unwrap();
        assert_eq!((lease.calls(), lease.status().lease_left), (1, Some(GRACE)));
        pass(lasts - STEP);
        assert_eq!((lease.admit(), lease.calls()), (Ok(epoch), 1));
        pass(STEP);
        assert_eq!((lease.admit(), lease.calls()), (Ok(epoch), 2));
        pass(lasts + STEP);
        assert_eq!((lease.admit(), lease.calls()), (Ok(epoch), 3));

        // And so does the lease, when no other answer comes.
        world.kms_is(away());
        for _ in 0..8 {
            pass(lasts);
            assert_eq!(lease.admit(), Ok(epoch));
        }
        assert_eq!(lease.calls(), 11);
        let outage = KeyState::Outage { detail: "away".to_owned() };
        let left = GRACE - if wall_alone { lasts * 4 } else { lasts * 8 };
        assert_eq!(lease.status(), KeyStatus { state: outage.clone(), lease_left: Some(left) });
        pass(GRACE - lasts * 8 - STEP);
        assert_eq!(lease.admit(), Ok(epoch));
        pass(STEP);
        assert!(matches!(lease.admit(), Err(Refusal::Unreachable(_))));
        assert_eq!(lease.status(), KeyStatus { state: outage, lease_left: Some(Duration::ZERO) });
        // A key that was loaded before a loss is not used after it.
        lease.tell();
        world.kms_is(None);
        lease.renew().unwrap();
        assert!(lease.admit().is_ok_and(|now| now != epoch));
    }
}

/// As the lease of the service key may be told to.
#[test]
fn without_a_grace_an_outage_never_ends_it() {
    let world = World::new();
    let never = LeaseTerms { outage_grace: None, ..parts(&world).terms };
    let lease = Lease::new(LeaseParts { terms: never, ..parts(&world) });
    let ears = Ears::listening_to(&lease);
    lease.begin(lease.now());
    let usable = KeyStatus { state: KeyState::Active, lease_left: None };
    assert_eq!((lease.status(), lease.calls()), (usable, 0));
    assert!(lease.admit().is_ok());
    assert_eq!(lease.calls(), 0, "the call that it began with counts");
    world.kms_is(away());
    for hour in 1..=24 * 30 {
        world.clock.advance(Duration::from_secs(3600));
        assert!(lease.admit().is_ok(), "{hour}");
        assert_eq!(lease.calls(), hour, "each operation asks");
        assert!(lease.tend() <= EVERY);
    }
    assert_eq!(lease.status().lease_left, None);
    assert_eq!(ears.heard(), ["returned"]);
    let reason = crate::kms::RevokedReason::Disabled;
    world.kms_is(Some(KmsError::Revoked { reason, detail: String::new() }));
    world.clock.advance(EVERY + TIMEOUT);
    assert_eq!(lease.admit(), Err(Refusal::Revoked(reason)));
    assert_eq!(lease.status().lease_left, Some(Duration::ZERO));
    lease.tend();
    assert_eq!(ears.heard(), ["wiped", "noted"]);
}

#[test]
fn it_is_tended_when_something_is_due_and_not_before() {
    let world = World::new();
    let lease = world.lease();
    const NOTHING: Duration = Duration::from_secs(3600);
    assert_eq!((lease.tend(), lease.calls()), (NOTHING, 0));
    let ears = Ears::listening_to(&lease);
    assert_eq!((lease.tend(), lease.calls()), (NOTHING, 0), "it is used by nobody yet");
    assert_eq!(lease.told(), None);
    lease.admit().unwrap();
    assert_eq!((lease.tend(), lease.calls(), ears.heard()), (EVERY, 1, vec!["returned"]));
    world.clock.advance(EVERY - STEP);
    assert_eq!((lease.tend(), lease.calls()), (STEP, 1));
    world.clock.advance(STEP);
    assert_eq!((lease.tend(), lease.calls(), ears.heard()), (EVERY, 2, vec![]));
    // A machine that was suspended, as the wall clock says alone.
    world.clock.jump_wall(EVERY);
    assert_eq!((lease.tend(), lease.calls()), (EVERY, 2));
    world.clock.jump_wall(STEP);
    assert_eq!((lease.tend(), lease.calls()), (EVERY, 3));

    // An outage: tended for the next renewal or when the lease ends, whichever comes first.
    world.kms_is(away());
    for n in 1..=10 {
        world.clock.advance(EVERY);
        let next = if n < 10 { EVERY } else { GRACE - EVERY * 10 };
        assert_eq!((lease.tend(), lease.calls()), (next, 3 + n), "{n}");
    }
    world.clock.advance(GRACE - EVERY * 10 - STEP);
    assert_eq!((lease.tend(), ears.heard()), (STEP, vec![]));
    assert_eq!(lease.told(), Some(Ok(())));
    world.clock.advance(STEP);
    assert_eq!(
        (lease.tend(), ears.heard()),
        (EVERY - (GRACE - EVERY * 10), vec!["wiped", "noted"])
    );
    assert!(matches!(lease.told(), Some(Err(Refusal::Unreachable(_)))));
    assert_eq!((lease.tend(), ears.heard()), (EVERY - (GRACE - EVERY * 10), vec![]));
    let calls = lease.calls();

    // A lease without listeners is not renewed.
    drop(ears);
    world.clock.advance(EVERY);
    assert_eq!((lease.tend(), lease.calls()), (NOTHING, calls));
}

/// A caller that knows of a change at the KMS does not rely on the call under way.
#[test]
fn a_renewal_afresh_makes_a_call_after_the_one_under_way() {
    let world = World::new();
    let lease = world.lease();
    let back = lock(&world.kms.back);
    std::thread::scope(|threads| {
        threads.spawn(|| lease.renew().unwrap());
        while world.kms.calls.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        world.kms_is(Some(KmsError::Revoked {
            reason: RevokedReason::Disabled,
            detail: String::new(),
        }));
        threads.spawn(|| lease.renew_afresh().unwrap());
        // Should it begin only later, nothing is shown, and nothing fails.
        std::thread::sleep(Duration::from_millis(50));
        drop(back);
    });
    assert_eq!((lease.calls(), lease.admit()), (2, Err(Refusal::Revoked(RevokedReason::Disabled))));
}

/// A pause of the machine stops one of the clocks, or a correction moves it. The next operation
/// waits for an answer to a call that is sent after that.
#[test]
fn clocks_that_move_apart_need_a_new_answer() {
    for backwards in [false, true] {
        let world = World::new();
        let lease = world.lease();
        lease.admit().unwrap();
        let jump = |by: Duration| match backwards {
            true => drop(world.clock.wall_us.fetch_sub(micros(by), Ordering::Relaxed)),
            false => world.clock.jump_wall(by),
        };
        jump(EVERY);
        assert!(lease.admit().is_ok());
        assert_eq!(lease.calls(), 1);
        jump(STEP);
        world.kms_is(Some(KmsError::Revoked {
            reason: RevokedReason::Disabled,
            detail: String::new(),
        }));
        let disabled = Refusal::Revoked(RevokedReason::Disabled);
        assert_eq!((lease.admit(), lease.calls()), (Err(disabled), 2));
    }
}

/// A standby lease makes no call until an envelope is refused, and none after the KMS has unwrapped
/// that envelope.
#[test]
fn a_standby_lease_is_renewed_only_while_an_envelope_is_refused() {
    let world = World::new();
    let lease = world.standby();
    let ears = Ears::listening_to(&lease);
    let epoch = lease.admit().unwrap();
    world.clock.advance(GRACE * 100);
    assert_eq!((lease.admit(), lease.calls(), lease.told()), (Ok(epoch), 0, None));
    assert!(lease.is_unused() && lease.decides_or_asks());
    let disabled = Refusal::Revoked(RevokedReason::Disabled);
    lease.take_in_refusal(lease.now(), disabled.clone(), probe());
    assert_eq!((lease.admit(), lease.calls()), (Err(disabled), 0));
    lease.tend();
    assert_eq!(ears.heard(), ["wiped", "noted"]);
    world.kms_is(away());
    world.clock.advance(EVERY);
    assert!(matches!(lease.admit(), Err(Refusal::Unreachable(_))), "an outage gives nothing back");
    assert_eq!(lease.calls(), 1);
    world.kms_is(None);
    world.clock.advance(EVERY);
    assert!(lease.admit().is_ok_and(|now| now != epoch));
    lease.tend();
    assert_eq!((ears.heard(), lease.calls()), (vec!["returned"], 2));
    world.clock.advance(GRACE * 100);
    assert!(lease.admit().is_ok());
    lease.tend();
    assert_eq!(lease.calls(), 2);
}

#[test]
fn each_listener_is_told_once() {
    let world = World::new();
    let lease = world.lease();
    let ears = [(); 3].map(|()| Ears::listening_to(&lease));
    let again: Weak<Ears> = Arc::downgrade(&ears[0]);
    lease.listen(again);
    lease.admit().unwrap();
    lease.tend();
    for ears in &ears {
        assert_eq!(ears.heard(), ["returned"]);
    }
    let [first, second, third] = ears;
    drop((second, third));
    let again: Weak<Ears> = Arc::downgrade(&first);
    lease.listen(again);
    assert_eq!(lock(&lease.listeners).len(), 1, "those that are gone are forgotten");
}

#[test]
fn a_refusal_ends_it_and_an_earlier_answer_changes_nothing() {
    let world = World::new();
    let lease = world.lease();
    let ears = Ears::listening_to(&lease);
    lease.admit().unwrap();
    let earlier = Moment::now(&*world.clock);
    world.clock.advance(STEP);
    let disabled = Refusal::Revoked(RevokedReason::Disabled);
    lease.take_in_refusal(lease.now(), disabled.clone(), probe());
    assert_eq!((lease.admit(), lease.calls()), (Err(disabled.clone()), 1));
    assert_eq!(lease.status().lease_left, Some(Duration::ZERO));
    assert_eq!(lease.status().state, KeyState::Revoked { reason: RevokedReason::Disabled });
    lease.answered(None, earlier, Ok(()));
    assert_eq!(lease.admit(), Err(disabled.clone()));
    lease.tend();
    assert_eq!(ears.heard(), ["wiped", "noted"]);
    // An outage that follows has nothing left to ride.
    world.kms_is(away());
    lease.renew().unwrap();
    assert!(matches!(lease.admit(), Err(Refusal::Unreachable(_))));
    world.kms_is(None);
    world.clock.advance(STEP);
    lease.renew_afresh().unwrap();
    assert!(lease.admit().is_ok());
    lease.tend();
    assert_eq!(ears.heard(), ["returned"]);
    // Neither does a refusal that comes late.
    lease.answered(None, earlier, Err(disabled));
    assert!(lease.admit().is_ok());
}

/// The events of several listeners, in order.
struct Chorus {
    name: &'static str,
    told: Arc<Mutex<Vec<String>>>,
}

impl LeaseListener for Chorus {
    fn depends_on(&self, _lease: &Lease) -> bool {
        true
    }

    fn wipe(&self, _refusal: &Refusal) -> Vec<Arc<dyn LostShard>> {
        lock(&self.told).push(format!("{} wiped", self.name));
        let (name, told) = (self.name, Arc::clone(&self.told));
        vec![Arc::new(Self { name, told })]
    }

    fn note_lost(&self, _refusal: &Refusal) {
        lock(&self.told).push(format!("{} noted", self.name));
    }

    fn returned(&self) {}
}

impl LostShard for Chorus {
    fn write(&self, _patience: Duration) -> bool {
        lock(&self.told).push(format!("{} written", self.name));
        true
    }

    fn seal(&self, _patience: Duration) -> bool {
        lock(&self.told).push(format!("{} sealed", self.name));
        true
    }

    fn expire(&self) {
        unreachable!("the clock stands still");
    }

    fn record(&self) {
        lock(&self.told).push(format!("{} recorded", self.name));
    }
}

#[test]
fn every_listener_wipes_before_one_does_any_io() {
    let world = World::new();
    let lease = world.lease();
    let told = Arc::default();
    let chorus = ["a", "b"].map(|name| Arc::new(Chorus { name, told: Arc::clone(&told) }));
    for one in &chorus {
        let weak: Weak<Chorus> = Arc::downgrade(one);
        lease.listen(weak);
    }
    lease.admit().unwrap();
    lease.take_in_refusal(lease.now(), Refusal::Revoked(RevokedReason::Disabled), probe());
    lease.tell();
    let steps = ["wiped", "written", "sealed", "noted", "recorded"];
    let expected: Vec<_> =
        steps.iter().flat_map(|step| ["a", "b"].map(|name| format!("{name} {step}"))).collect();
    assert_eq!(*lock(&told), expected);
    // A listener that comes late.
    lock(&told).clear();
    lease.tell_late(Arc::clone(&chorus[0]) as _, Refusal::Revoked(RevokedReason::Disabled));
    assert_eq!(*lock(&told), steps.map(|step| format!("a {step}")));
}

/// A subscriber that may block: it notes each event for the listener, and takes a lock of the
/// lease.
struct Log {
    ears: Arc<Ears>,
    lease: Arc<Lease>,
}

impl tracing::Subscriber for Log {
    fn enabled(&self, _: &tracing::Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }

    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}

    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}

    fn event(&self, _: &tracing::Event<'_>) {
        self.lease.status();
        lock(&self.ears.told).push("logged");
    }

    fn enter(&self, _: &tracing::span::Id) {}

    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn no_log_line_comes_before_the_wipe_or_under_a_lock() {
    let world = World::new();
    let heard = |lease: &Arc<Lease>, act: &dyn Fn()| {
        let ears = Ears::listening_to(lease);
        lease.tell();
        ears.heard();
        let log = Log { ears: Arc::clone(&ears), lease: Arc::clone(lease) };
        tracing::subscriber::with_default(log, act);
        ears.heard()
    };
    // The call, its answer, and the loss.
    let expected = ["wiped", "logged", "logged", "logged", "noted"];
    let lease = world.lease();
    lease.admit().unwrap();
    world
        .kms_is(Some(KmsError::Revoked { reason: RevokedReason::Disabled, detail: String::new() }));
    world.clock.advance(EVERY);
    let refused = || {
        lease.tend();
    };
    assert_eq!(heard(&lease, &refused), expected);
    // A call that gets no answer.
    let watch = Watch { clock: Arc::clone(&world.clock) as _, meter: Arc::default() };
    let queue = crate::kms::DeferredCalls::default();
    let kms = BoundedKms::deferred(Arc::clone(&world.kms) as _, TIMEOUT, watch, queue);
    let lease = Lease::new(LeaseParts { kms, ..parts(&world) });
    lease.begin(lease.now());
    let late = || {
        world.clock.advance(EVERY);
        lease.tend();
        world.clock.advance(GRACE);
        lease.tend();
    };
    assert_eq!(heard(&lease, &late), expected);
}

/// The key was back between two refusals, and no listener heard of that: keys that were loaded
/// meanwhile are wiped too.
#[test]
fn a_loss_behind_a_return_that_nobody_heard_of_is_a_loss() {
    let world = World::new();
    let lease = world.lease();
    let ears = Ears::listening_to(&lease);
    lease.admit().unwrap();
    lease.tell();
    let disabled =
        || lease.take_in_refusal(lease.now(), Refusal::Revoked(RevokedReason::Disabled), probe());
    disabled();
    lease.tell();
    disabled();
    lease.tell();
    assert_eq!(ears.heard(), ["returned", "wiped", "noted"]);
    lease.renew().unwrap();
    assert!(lease.admit().is_ok());
    world.clock.advance(STEP);
    disabled();
    lease.tell();
    assert_eq!(ears.heard(), ["wiped", "noted"]);
}

#[test]
fn renewals_are_spread_over_a_fifth_of_the_period() {
    let world = World::new();
    for (random, period) in [
        (Some(0), EVERY),
        (None, EVERY),
        (Some(255), EVERY * 4 / 5),
        (Some(51), EVERY - EVERY / 25),
    ] {
        assert_eq!(world.lease_with(Constant(random), None).jittered(EVERY), period, "{random:?}");
    }
    let lease = world.lease_with(Constant(Some(255)), None);
    let _ears = Ears::listening_to(&lease);
    lease.admit().unwrap();
    assert_eq!(lease.tend(), EVERY * 4 / 5);
    // So are the calls of those that were spared, once the KMS answers.
    lease.ask_soon();
    assert_eq!(lease.tend(), EVERY / 5);
}

#[test]
fn metrics_tell_its_age() {
    let world = World::new();
    let lease = world.lease();
    assert_eq!(lease.metrics().age, None);
    lease.admit().unwrap();
    world.clock.advance(STEP * 5);
    let metrics = lease.metrics();
    assert_eq!((metrics.age, metrics.calls), (Some(STEP * 5), 1));
    assert_eq!(
        (metrics.status.lease_left, metrics.status),
        (Some(GRACE - STEP * 5), lease.status())
    );
}

#[test]
fn an_ended_lease_is_spared_calls_and_a_valid_one_is_not() {
    let world = World::new();
    let [ended, alive, asks] = [(); 3].map(|()| world.lease());
    for lease in [&ended, &asks] {
        lease.admit().unwrap();
    }
    world.clock.advance(GRACE);
    alive.admit().unwrap();
    world.kms_is(away());
    for _ in 0..3 {
        asks.renew().unwrap();
    }
    assert!(world.breaker.is_open());
    assert!(ended.admit().is_err());
    let of_its_own = ended.calls();
    let asked = world.clock.uptime();
    for period in 1..=7 {
        world.clock.advance(EVERY);
        asks.renew().unwrap();
        assert!(matches!(ended.admit(), Err(Refusal::Unreachable(_))));
        let long_ago = world.clock.uptime() - asked >= EVERY * PERIODS_SPARED;
        assert_eq!(
            (ended.calls() - of_its_own, long_ago),
            (u64::from(period == 7), period == 7),
            "{period}"
        );
        let calls = alive.calls();
        world.clock.advance(TIMEOUT);
        assert!(alive.admit().is_ok());
        assert_eq!(alive.calls(), calls + 1, "{period}");
    }
    // A lease that the customer has refused makes its own calls.
    ended.take_in_refusal(ended.now(), Refusal::Revoked(RevokedReason::Disabled), probe());
    world.clock.advance(EVERY);
    asks.renew().unwrap();
    let calls = ended.calls();
    assert!(ended.admit().is_err());
    assert_eq!(ended.calls(), calls + 1);
}

/// A first use in an outage asks only when too few calls have failed to know it, or when a call is
/// due anyway.
#[test]
fn an_envelope_is_not_unwrapped_in_an_outage_that_is_known() {
    let world = World::new();
    let lease = world.lease();
    let unwrap = || lease.unwrap_envelope(EncryptionContext::new(), b"").map(|_| ());
    lease.admit().unwrap();
    world.kms_is(away());
    for _ in 0..2 {
        lease.renew().unwrap();
    }
    world.kms_is(None);
    assert_eq!(unwrap(), Ok(()));
    world.kms_is(away());
    lease.renew().unwrap();
    world.kms_is(None);
    assert!(matches!(unwrap(), Err(KmsError::Unreachable { .. })));
    world.clock.advance(EVERY);
    assert_eq!(unwrap(), Ok(()));
    // A lease whose last answer was a refusal or a success calls the KMS.
    world.kms_is(away());
    let other = world.lease();
    assert!(
        world.breaker.is_open() && other.unwrap_envelope(EncryptionContext::new(), b"").is_err()
    );
    world.kms_is(None);
    assert!(other.unwrap_envelope(EncryptionContext::new(), b"").is_ok());
}

#[test]
fn a_probe_must_come_out_as_the_key_that_it_was() {
    let world = World::new();
    let lease = world.lease();
    let fingerprint = fingerprint(&SecretKey::generate(&OsRandom).unwrap());
    lease.set_probe(Probe { wrapped: Vec::new(), context: EncryptionContext::new(), fingerprint });
    assert!(matches!(lease.admit(), Err(Refusal::Invalid(_))));
}
