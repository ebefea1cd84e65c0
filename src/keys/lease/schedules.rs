//! Random schedules of a few leases at one KMS: joined calls, late answers, hung keys, withdrawals,
//! suspended and paused machines. No operation may succeed after the bound.
//!
//! The KMS decides a call at one moment of the schedule and delivers the answer at a later one. An
//! operation that has to wait runs in a thread of its own while the schedule goes on.

use std::thread;

use super::{
    tests::{GRACE, TIMEOUT, TestClock, World, parts},
    *,
};
use crate::kms::{DeferredCalls, Kms, KmsCall, RevokedReason, Watch};

/// `EVERY` and `TIMEOUT`.
const BOUND: Duration = Duration::from_secs(35);
const LEASES: usize = 4;

/// Pseudo-random numbers: SplitMix64 (Steele, Lea and Flood, 2014).
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }

    fn up_to(&mut self, seconds: u64) -> Duration {
        Duration::from_millis(self.below(seconds * 1000))
    }
}

/// The state of a master key at the KMS.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Key {
    Allowed,
    Refused,
    Unreachable,
}

/// Gives the answer that the schedule has set for the call that it delivers.
#[derive(Debug)]
struct SimKms(Mutex<Key>);

impl Kms for SimKms {
    fn name(&self) -> &str {
        "sim"
    }

    fn serves(&self, _region_id: &str) -> bool {
        true
    }

    fn wrap(&self, _call: &KmsCall<'_>, _key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        unreachable!("a lease wraps nothing")
    }

    fn unwrap(&self, _call: &KmsCall<'_>, _wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        match *lock(&self.0) {
            Key::Allowed => Ok(super::tests::key()),
            Key::Refused => {
                Err(KmsError::Revoked { reason: RevokedReason::Disabled, detail: String::new() })
            }
            Key::Unreachable => Err(KmsError::Unreachable { detail: "away".to_owned() }),
        }
    }
}

/// A call, as the schedule knows it.
#[derive(Debug)]
struct Sent {
    lease: usize,
    at: Duration,
    /// The state of the key when the KMS decided.
    decided: Option<Key>,
    /// When the answer arrived.
    delivered: Option<Duration>,
}

/// An operation that waits.
type Waiting = thread::JoinHandle<Result<(), Refusal>>;

/// An operation that was admitted or refused.
struct Operation {
    lease: usize,
    began: Duration,
    admitted: Result<(), Refusal>,
}

struct Schedule {
    dice: Dice,
    clock: Arc<TestClock>,
    /// The time that has really passed, and when it began, by the wall clock.
    now: Duration,
    began_us: u64,
    kms: Arc<SimKms>,
    queue: DeferredCalls,
    leases: Vec<Arc<Lease>>,
    keys: Vec<Key>,
    /// The calls in the queue by their place in it, and all calls.
    waiting: Vec<usize>,
    sent: Vec<Sent>,
    /// The operations that wait in a thread, and how they ended.
    threads: Vec<(usize, Duration, Waiting)>,
    done: Vec<Operation>,
}

impl Schedule {
    fn new(seed: u64) -> Self {
        let world = World::new();
        let (kms, queue) =
            (Arc::new(SimKms(Mutex::new(LockRank::Test, Key::Allowed))), DeferredCalls::default());
        let watch = Watch { clock: Arc::clone(&world.clock) as _, meter: Arc::default() };
        let bounded = BoundedKms::deferred(Arc::clone(&kms) as _, TIMEOUT, watch, queue.clone());
        let lease = |n: usize| {
            let cmk = Cmk {
                cmk_key_id: format!("key-{n}"),
                arn: "role".to_owned(),
                region_id: "region".to_owned(),
            };
            Lease::new(LeaseParts { cmk, kms: bounded.clone(), ..parts(&world) })
        };
        Self {
            dice: Dice(seed),
            clock: Arc::clone(&world.clock),
            now: Duration::ZERO,
            began_us: world.clock.wall_us(),
            kms,
            queue,
            leases: (0..LEASES).map(lease).collect(),
            keys: vec![Key::Allowed; LEASES],
            waiting: Vec::new(),
            sent: Vec::new(),
            threads: Vec::new(),
            done: Vec::new(),
        }
    }

    /// Notes the calls that were sent since the last look.
    fn look_for_calls(&mut self) {
        let queue = lock(&self.queue.0);
        for (cmk, sent_us, _) in queue.iter().skip(self.waiting.len()) {
            let lease = self.leases.iter().position(|lease| lease.cmk() == cmk);
            let lease = lease.expect("a lease of this schedule");
            self.waiting.push(self.sent.len());
            // By the wall clock, which misses no pause.
            let at = Duration::from_micros(sent_us - self.began_us);
            self.sent.push(Sent { lease, at, decided: None, delivered: None });
        }
    }

    /// Runs `act`, which may send calls. The answers to the calls of lease 0 arrive at once: its
    /// key is never refused, and its KMS never hangs.
    fn act(&mut self, act: impl FnOnce(&mut Self)) {
        act(self);
        self.answer_lease_0();
    }

    fn answer_lease_0(&mut self) {
        self.look_for_calls();
        while let Some(place) = self.waiting.iter().position(|&call| self.sent[call].lease == 0) {
            self.deliver(place);
        }
    }

    fn decide(&mut self, place: usize) {
        let call = &mut self.sent[self.waiting[place]];
        call.decided = call.decided.or(Some(self.keys[call.lease]));
    }

    fn deliver(&mut self, place: usize) {
        self.decide(place);
        let call = self.waiting.remove(place);
        let (.., run) = lock(&self.queue.0).remove(place);
        self.sent[call].delivered = Some(self.now);
        *lock(&self.kms.0) = self.sent[call].decided.unwrap_or(Key::Allowed);
        run();
    }

    fn pass(&mut self, by: Duration) {
        self.clock.advance(by);
        self.now += by;
    }

    fn operate(&mut self, lease: usize) {
        let began = self.now;
        let this = Arc::clone(&self.leases[lease]);
        if this.is_fresh(Duration::ZERO) {
            self.done.push(Operation { lease, began, admitted: this.admit().map(drop) });
            return;
        }
        let calls = this.calls();
        let thread = thread::spawn({
            let this = Arc::clone(&this);
            move || this.admit().map(drop)
        });
        // Until the operation has sent its call, has joined one, or needs none.
        while this.calls() == calls && !thread.is_finished() && !this.is_calling() {
            thread::yield_now();
        }
        while lease == 0 && !thread.is_finished() {
            self.answer_lease_0();
            thread::yield_now();
        }
        self.threads.push((lease, began, thread));
    }

    fn collect(&mut self) {
        let (finished, threads) = std::mem::take(&mut self.threads)
            .into_iter()
            .partition(|(.., thread)| thread.is_finished());
        self.threads = threads;
        let finished: Vec<_> = finished;
        for (lease, began, thread) in finished {
            let admitted = thread.join().expect("an operation does not panic");
            self.done.push(Operation { lease, began, admitted });
        }
    }

    fn step(&mut self) {
        let lease = self.dice.below(LEASES as u64) as usize;
        match self.dice.below(100) {
            0..25 => {
                let by = self.dice.up_to(12);
                self.pass(by);
            }
            // The machine is suspended: nothing runs meanwhile.
            25..28 => {
                let by = self.dice.up_to(400);
                self.pass(by);
            }
            // A paused virtual machine: the wall clock shows it alone.
            28..30 => {
                let by = self.dice.up_to(100);
                self.clock.jump_wall(by);
                self.now += by;
            }
            30..40 if lease > 0 => {
                self.keys[lease] =
                    [Key::Allowed, Key::Refused, Key::Unreachable][self.dice.below(3) as usize];
            }
            40..70 if !self.waiting.is_empty() => {
                let place = self.dice.below(self.waiting.len() as u64) as usize;
                if self.dice.below(10) < 3 {
                    self.decide(place);
                } else {
                    self.act(|this| this.deliver(place));
                }
            }
            70..80 => self.act(|this| {
                this.leases[lease].tend();
            }),
            _ => self.act(|this| this.operate(lease)),
        }
        self.collect();
    }

    /// Lets the operations that wait come to their end.
    fn finish(&mut self) {
        while !self.threads.is_empty() {
            self.look_for_calls();
            while !self.waiting.is_empty() {
                self.deliver(0);
            }
            thread::yield_now();
            self.collect();
        }
    }

    /// The operations that were admitted although every call that could have admitted them was
    /// refused in time, and the refusals of the lease whose key was never refused.
    fn violations(&self) -> Vec<String> {
        let mut found = Vec::new();
        for operation in &self.done {
            let Operation { lease, began, admitted } = operation;
            match admitted {
                Ok(()) => {
                    // A call after the bound whose answer was no refusal, or did not come in time.
                    let admits = |(sent, answer): &(Moment, Result<(), Refusal>)| {
                        Duration::from_micros(sent.wall_us - self.began_us) + BOUND >= *began
                            && !matches!(answer, Err(Refusal::Revoked(_)))
                    };
                    if !lock(&self.leases[*lease].heard).iter().any(admits) {
                        found
                            .push(format!("lease {lease}: admitted after the bound, at {began:?}"));
                    }
                    let succeeded = |call: &&Sent| {
                        call.lease == *lease
                            && call.at + GRACE >= *began
                            && call.decided == Some(Key::Allowed)
                    };
                    if !self.sent.iter().any(|call| succeeded(&call)) {
                        found
                            .push(format!("lease {lease}: admitted after the grace, at {began:?}"));
                    }
                }
                Err(refusal) if *lease == 0 => found.push(format!("refused: {refusal:?}")),
                Err(_) => {}
            }
        }
        found
    }
}

/// Runs the schedules of these seeds. Returns the operations that were admitted and refused.
fn run(seeds: std::ops::Range<u64>) -> (usize, usize) {
    let (mut admitted, mut refused) = (0, 0);
    for seed in seeds {
        let mut schedule = Schedule::new(seed);
        for _ in 0..120 {
            schedule.step();
        }
        schedule.finish();
        assert_eq!(
            schedule.violations(),
            Vec::<String>::new(),
            "seed {seed}\n{:#?}",
            schedule.sent
        );
        admitted += schedule.done.iter().filter(|operation| operation.admitted.is_ok()).count();
        refused += schedule.done.iter().filter(|operation| operation.admitted.is_err()).count();
    }
    (admitted, refused)
}

/// `ENVELOG_SWEEP_SEEDS` sets the number of schedules.
#[test]
fn no_schedule_admits_an_operation_after_the_bound() {
    let seeds = std::env::var("ENVELOG_SWEEP_SEEDS").ok();
    let seeds = seeds.map_or(200, |seeds| seeds.parse().expect("a number of seeds"));
    let (admitted, refused) = run(0..seeds);
    assert!(admitted > 0 && refused > 0);
    println!("{seeds} schedules: {admitted} operations admitted, {refused} refused");
}
