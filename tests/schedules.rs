//! The revocation bound under random schedules in simulated time. Master keys are disabled and
//! enabled; the KMS fails, recovers, and answers slowly, late or wrongly, also in the middle of a
//! call; the clocks jump; the store is closed and opened.
//!
//! No operation that starts after the bound succeeds. Without faults, no operation fails for long,
//! and every failure has a typed error. A Logstore under the service key is never affected. All
//! acknowledged data is present at the end.
//!
//! `ENVELOG_SCHEDULES` sets the number of schedules; `ENVELOG_SCHEDULE` runs only the one that a
//! violation names.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeMap,
    env, fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use common::{
    REGION, TestClock,
    disk::Dice,
    memory::MemoryDisk,
    millis, name, record,
    sim::{Ledger, SeededKms, SeededRandom, cmk},
};
use envelog::{
    AppendOptions, Background, Durability, EncryptConf, EncryptType, Error, Logstore, LogstoreSpec,
    ReadOptions, Reader, Result, Store, StoreOptions, Ticket,
    crypto::{AwsLc, SecretKey},
    io::Clock,
    kms::{Kms, KmsCall, KmsError},
    testing::{Answer, Fault, FaultyKms},
};

/// The default number of schedules, and the number of operations in each.
const SCHEDULES: u64 = 1_000;
const OPERATIONS: u64 = 80;
/// The circuit breaker may spare an expired lease its own calls for this many periods
/// (`keys::circuit`).
const PERIODS_SPARED: u32 = 8;

// ---- the simulation ----

/// The state of a master key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Good,
    Disabled,
    /// Its KMS is unreachable.
    Away,
    /// Its KMS returns a wrong key.
    Wrong,
}

/// The past and future states of one master key. Times are uptime.
struct History {
    past: Vec<(Duration, Fate)>,
    coming: BTreeMap<Duration, Fate>,
}

impl History {
    fn now(&self) -> Fate {
        self.past.last().unwrap().1
    }

    /// Whether it had such a state at any moment from `from` to `to`.
    fn any(&self, from: Duration, to: Duration, is: impl Fn(Fate) -> bool) -> bool {
        let ends = self.past.iter().skip(1).map(|(began, _)| *began).chain([Duration::MAX]);
        self.past
            .iter()
            .zip(ends)
            .any(|((began, fate), end)| *began <= to && end >= from && is(*fate))
    }
}

struct Time {
    clock: Arc<TestClock>,
    keys: Mutex<[History; 2]>,
    /// The times of calls that failed for reasons unrelated to a master key.
    noise: Mutex<Vec<Duration>>,
}

impl Time {
    fn now(&self) -> Duration {
        self.clock.uptime()
    }

    /// Ignores poisoning: a panic reports a violation, and the store is then still closed.
    fn keys(&self) -> MutexGuard<'_, [History; 2]> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Advances the time and applies the states that are due.
    fn advance(&self, by: Duration) {
        let until = self.now() + by;
        loop {
            let mut keys = self.keys();
            let next =
                keys.iter().filter_map(|key| key.coming.first_key_value()).map(|(at, _)| *at).min();
            let Some(at) = next.filter(|at| *at <= until) else { break };
            self.clock.advance(at.saturating_sub(self.now()));
            for key in keys.iter_mut() {
                if let Some(fate) = key.coming.remove(&at) {
                    key.past.push((at, fate));
                }
            }
        }
        self.clock.advance(until.saturating_sub(self.now()));
    }
}

/// A KMS whose keys have their scheduled state at the time of a call.
struct Fated {
    kms: Arc<SeededKms>,
    time: Arc<Time>,
}

impl fmt::Debug for Fated {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Fated")
    }
}

impl Fated {
    fn fate(&self, call: &KmsCall<'_>) -> std::result::Result<Fate, KmsError> {
        let which = usize::from(*call.cmk == cmk(1));
        let fate = self.time.keys()[which].now();
        match fate {
            Fate::Disabled => Err(KmsError::Revoked {
                reason: envelog::kms::RevokedReason::Disabled,
                detail: "it is disabled".into(),
            }),
            Fate::Away => Err(KmsError::Unreachable { detail: "no connection".into() }),
            Fate::Good | Fate::Wrong => Ok(fate),
        }
    }
}

impl Kms for Fated {
    fn name(&self) -> &str {
        "fated"
    }

    fn serves(&self, region_id: &str) -> bool {
        region_id == REGION
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> std::result::Result<Vec<u8>, KmsError> {
        self.fate(call)?;
        self.kms.wrap(call, key)
    }

    fn unwrap(
        &self,
        call: &KmsCall<'_>,
        wrapped: &[u8],
    ) -> std::result::Result<SecretKey, KmsError> {
        let fate = self.fate(call)?;
        let key = self.kms.unwrap(call, wrapped)?;
        Ok(if fate == Fate::Wrong {
            SecretKey::from_bytes(&mut key.expose().map(|byte| byte ^ 0x0f))
        } else {
            key
        })
    }
}

// ---- one schedule ----

/// The model of a Logstore. The first two have a master key each; the third is under the service
/// key.
struct Known {
    logstore: Logstore,
    /// Acknowledged sequence numbers and texts, and whether each survives a failed close.
    acknowledged: BTreeMap<u64, (String, bool)>,
    /// Texts of failed appends, which may be present or not.
    failed: Vec<String>,
    /// The time of the last operation that reported a revocation.
    refused: Option<Duration>,
}

struct Schedule {
    seed: u64,
    dice: Dice,
    time: Arc<Time>,
    options: StoreOptions,
    disk: Arc<MemoryDisk>,
    random: Arc<SeededRandom>,
    kms: Arc<FaultyKms>,
    store: Option<Store>,
    known: Vec<Known>,
    reader: Option<(usize, Reader, Option<u64>)>,
    tickets: Vec<(usize, Duration, String, Ticket)>,
    opened: Duration,
    /// Whether calls fail for reasons unrelated to a master key.
    noisy: bool,
    texts: u64,
    refusals: u64,
}

impl Schedule {
    fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed, 17);
        let clock = TestClock::new();
        let history =
            || History { past: vec![(Duration::ZERO, Fate::Good)], coming: BTreeMap::new() };
        let time = Arc::new(Time {
            clock: Arc::clone(&clock),
            keys: Mutex::new([history(), history()]),
            noise: Mutex::default(),
        });
        let mut options = StoreOptions::default();
        options.background = Background::Manual;
        options.revalidate_every = millis(100 + dice.roll(30_000));
        options.kms_timeout = millis(10 + dice.roll(1_000));
        // A lease shorter than a call's timeout could end before the answer arrives.
        options.outage_grace =
            options.revalidate_every * (100 + dice.roll(900) as u32) / 100 + options.kms_timeout;
        options.segment_bytes = 4 << 10;
        let seeded = SeededKms::new(seed, &Arc::new(Ledger::default()));
        let fated = Arc::new(Fated { kms: seeded, time: Arc::clone(&time) });
        let passing = Arc::clone(&time);
        let kms = Arc::new(FaultyKms::new(fated).sleeping_by(move |by| passing.advance(by)));
        let disk = Arc::new(MemoryDisk::default());
        let random = SeededRandom::new(seed, 18);
        let mut schedule = Self {
            seed,
            dice,
            time,
            options,
            disk,
            random,
            kms,
            store: None,
            known: Vec::new(),
            reader: None,
            tickets: Vec::new(),
            opened: Duration::ZERO,
            noisy: false,
            texts: 0,
            refusals: 0,
        };
        let store = schedule.builder().create().unwrap();
        for text in ["p/a", "p/b", "p/s"] {
            let encrypt_type =
                if seed.is_multiple_of(2) { EncryptType::Aes } else { EncryptType::Sm4 };
            let conf = match text {
                "p/a" => EncryptConf::byok(encrypt_type, cmk(0)),
                "p/b" => EncryptConf::byok(encrypt_type, cmk(1)),
                _ => EncryptConf::service_key(encrypt_type),
            };
            let logstore = store
                .create_logstore(&name(text), LogstoreSpec::default().encrypt_conf(conf))
                .unwrap();
            let (acknowledged, failed) = Default::default();
            schedule.known.push(Known { logstore, acknowledged, failed, refused: None });
        }
        schedule.opened = schedule.time.now();
        schedule.store = Some(store);
        schedule.misbehave();
        schedule
    }

    fn builder(&self) -> envelog::StoreBuilder {
        Store::builder("/store", "/keyring", AwsLc::new())
            .kms(Arc::clone(&self.kms) as _)
            .disk(Arc::clone(&self.disk) as _)
            .clock(Arc::clone(&self.time.clock) as _)
            .insecure_random_for_tests(Arc::clone(&self.random) as _)
            .options(self.options)
    }

    /// Makes all further calls take time; in every third schedule, some also fail in other ways.
    fn misbehave(&mut self) {
        self.noisy = self.dice.roll(3) == 0;
        let (noisy, slow) = (self.noisy, self.dice.roll(2) == 0);
        let mut dice = Dice::new(self.seed, 19);
        let time = Arc::clone(&self.time);
        self.kms.plan(move |_, call| {
            let timeout = call.timeout.as_millis() as u64;
            let fault = if slow {
                // Within the timeout: request and answer together.
                Fault::delay(millis(dice.roll(timeout / 2)), millis(dice.roll(timeout / 2)))
            } else {
                Fault::none()
            };
            if !noisy || dice.roll(4) > 0 {
                return fault;
            }
            time.noise.lock().unwrap().push(time.now());
            match dice.roll(6) {
                0 => Fault::error(KmsError::Unreachable { detail: "throttled".into() }),
                1 => Fault::delay(call.timeout, Duration::ZERO),
                2 => Fault { back: call.timeout, ..fault },
                3 => Fault::answer(Answer::OtherKey),
                4 => Fault::answer(Answer::Truncated),
                _ => Fault::answer(Answer::Garbled),
            }
        });
    }

    fn pick(&mut self) -> usize {
        self.dice.roll(3) as usize
    }

    /// Checks the result of an operation that started at `began` and has just ended.
    fn judge<T>(&mut self, which: usize, began: Duration, what: &str, result: &Result<T>) {
        let end = self.time.now();
        if which == 2 {
            if let Err(error) = result {
                panic!("{what} under the service key failed: {error}");
            }
            return;
        }
        let (every, timeout) = (self.options.revalidate_every, self.options.kms_timeout);
        let since = |long: Duration| (began + Duration::from_micros(1)).saturating_sub(long);
        let keys = self.time.keys();
        let known = &mut self.known[which];
        match result {
            Ok(_) => {
                let bound = every + timeout;
                let noise = self
                    .time
                    .noise
                    .lock()
                    .unwrap()
                    .iter()
                    .any(|at| (since(bound)..=end).contains(at));
                assert!(
                    noise || keys[which].any(since(bound), end, |fate| fate != Fate::Disabled),
                    "{what} succeeded at {began:?}, although the KMS has refused for {bound:?}"
                );
                let from = [
                    self.opened,
                    known.refused.unwrap_or_default(),
                    since(self.options.outage_grace),
                ];
                // An event at that very moment may have happened after the operation.
                let from = from.into_iter().filter(|from| *from < began).max().unwrap_or_default();
                assert!(
                    keys[which].any(from, end, |fate| fate == Fate::Good),
                    "{what} succeeded at {began:?}, although nothing has vouched for the key since {from:?}"
                );
            }
            Err(error) => {
                self.refusals += 1;
                match error {
                    Error::Revoked { .. } => known.refused = Some(end),
                    Error::KmsUnreachable { .. } | Error::KmsInvalid { .. } => {}
                    other => panic!("{what} failed otherwise: {other:?}"),
                }
                let long = every * (PERIODS_SPARED + 1) + timeout;
                assert!(
                    self.noisy || keys[which].any(since(long), end, |fate| fate != Fate::Good),
                    "{what} failed at {began:?}, although all has been well for {long:?}: {error}"
                );
            }
        }
    }

    fn acknowledge(&mut self, which: usize, seq: u64, text: String, durability: Durability) {
        let acknowledged = &mut self.known[which].acknowledged;
        let lasting = durability != Durability::Buffered;
        assert!(
            acknowledged.insert(seq, (text, lasting)).is_none(),
            "the sequence number {seq} was given twice"
        );
    }

    fn append(&mut self) {
        let (which, began) = (self.pick(), self.time.now());
        self.texts += 1;
        let text = format!("{which}-{}", self.texts);
        let durability = [Durability::Buffered, Durability::Written, Durability::Synced]
            [self.dice.roll(3) as usize];
        if self.dice.roll(4) == 0 {
            let ticket = self.known[which]
                .logstore
                .submit(record(&text), &AppendOptions::default().durability(durability));
            self.judge(which, began, "an append", &ticket);
            match ticket {
                // A buffered append is acknowledged by its submission.
                Ok(ticket) if durability == Durability::Buffered => {
                    self.acknowledge(which, ticket.appended().unwrap().seq, text, durability);
                }
                Ok(ticket) => self.tickets.push((which, began, text, ticket)),
                Err(_) => self.known[which].failed.push(text),
            }
            return;
        }
        let appended = self.known[which]
            .logstore
            .append(record(&text), &AppendOptions::default().durability(durability));
        self.judge(which, began, "an append", &appended);
        match appended {
            Ok(appended) => self.acknowledge(which, appended.seq, text, durability),
            Err(_) => self.known[which].failed.push(text),
        }
    }

    fn wait_for_a_ticket(&mut self) {
        if self.tickets.is_empty() {
            return;
        }
        let at = self.dice.roll(self.tickets.len() as u64) as usize;
        let (which, began, text, ticket) = self.tickets.swap_remove(at);
        let outcome = ticket.wait();
        match outcome {
            Ok(appended) => {
                self.judge(which, began, "a ticket", &Ok(()));
                self.acknowledge(which, appended.seq, text, Durability::Written);
            }
            Err(error) => {
                // The cause of a ticket's failure may be much older than the wait.
                assert!(which != 2, "a ticket under the service key failed: {error}");
                assert!(
                    matches!(
                        error,
                        Error::Revoked { .. }
                            | Error::KmsUnreachable { .. }
                            | Error::KmsInvalid { .. }
                    ),
                    "a ticket failed otherwise: {error:?}"
                );
                self.known[which].failed.push(text);
            }
        }
    }

    /// Checks the records of a read against the model.
    fn check(&self, which: usize, read: &[(u64, String)], complete: bool) {
        let known = &self.known[which];
        let submitted = |text: &String| {
            self.tickets.iter().any(|(of, _, other, _)| *of == which && other == text)
        };
        for pair in read.windows(2) {
            assert!(pair[0].0 < pair[1].0, "read out of order: {pair:?}");
        }
        for (seq, text) in read {
            match known.acknowledged.get(seq) {
                Some((acknowledged, _)) => assert_eq!(acknowledged, text, "number {seq}"),
                None => {
                    assert!(
                        known.failed.contains(text) || submitted(text),
                        "{text:?} was read, and never appended"
                    )
                }
            }
        }
        let read: BTreeMap<_, _> = read.iter().cloned().collect();
        for (seq, (text, lasting)) in &known.acknowledged {
            assert!(
                !(complete || *lasting) || read.contains_key(seq),
                "{text:?} was acknowledged, and is missing"
            );
        }
    }

    fn read(&mut self) {
        let (which, began) = (self.pick(), self.time.now());
        let all = read_all(&self.known[which].logstore);
        self.judge(which, began, "a read", &all);
        if let Ok(all) = all {
            self.check(which, &all, false);
        }
    }

    fn iterate(&mut self) {
        let began = self.time.now();
        let Some((which, mut reader, last)) = self.reader.take() else {
            let which = self.pick();
            let opened = self.known[which].logstore.read(0, &ReadOptions::default());
            self.judge(which, began, "opening a reader", &opened);
            self.reader = opened.ok().map(|reader| (which, reader, None));
            return;
        };
        match reader.try_next().transpose() {
            None => self.reader = Some((which, reader, last)),
            Some(result) => {
                self.judge(which, began, "an open reader", &result);
                if let Ok(record) = result {
                    assert!(last.is_none_or(|last| last < record.seq), "a reader went backwards");
                    // The reader skips no record that was present when it passed.
                    let between = last.map_or(0, |last| last + 1)..record.seq;
                    let missed = self.known[which]
                        .acknowledged
                        .range(between)
                        .find(|(_, (_, lasting))| *lasting);
                    assert!(missed.is_none(), "a reader passed over {missed:?}");
                    self.reader = Some((which, reader, Some(record.seq)));
                }
            }
        }
    }

    /// Changes the state of a master key, now or later.
    fn fate(&mut self) {
        let which = self.dice.roll(2) as usize;
        let fates = [Fate::Good, Fate::Good, Fate::Disabled, Fate::Away, Fate::Wrong];
        let fate = fates[self.dice.roll(5) as usize];
        let soon = self.options.kms_timeout.as_micros() as u64;
        let at = self.time.now() + Duration::from_micros(1 + self.dice.roll(soon * 2));
        self.time.keys()[which].coming.insert(at, fate);
    }

    fn pass(&mut self) {
        let every = self.options.revalidate_every;
        let by = match self.dice.roll(4) {
            0 => millis(1 + self.dice.roll(50)),
            1 => every * (1 + self.dice.roll(12) as u32),
            _ => every * (1 + self.dice.roll(100) as u32) / 100,
        };
        self.time.advance(by);
        if self.dice.roll(8) == 0 {
            let by = every * self.dice.roll(20) as u32;
            match self.dice.roll(2) {
                0 => self.time.clock.jump_wall(by),
                _ => self.time.clock.jump_wall_back(by),
            }
        }
    }

    fn reopen(&mut self) {
        self.reader = None;
        while !self.tickets.is_empty() {
            self.wait_for_a_ticket();
        }
        let closed = self.store.take().unwrap().close();
        for known in &mut self.known {
            // Buffered groups without a key to seal them are lost, and the caller got an error.
            known.acknowledged.retain(|_, (text, lasting)| {
                let stays = closed.is_ok() || *lasting;
                if !stays {
                    known.failed.push(text.clone());
                }
                *lasting = true;
                stays
            });
            known.refused = None;
        }
        if let Err(error) = closed {
            assert!(
                matches!(
                    error,
                    Error::Revoked { .. } | Error::KmsUnreachable { .. } | Error::KmsInvalid { .. }
                ),
                "closing failed otherwise: {error:?}"
            );
        }
        let before = self.kms.calls();
        let store = self.builder().open().unwrap();
        for (known, text) in self.known.iter_mut().zip(["p/a", "p/b", "p/s"]) {
            known.logstore = store.logstore(&name(text)).unwrap();
        }
        assert_eq!(self.kms.calls(), before, "opening a store called the KMS");
        self.store = Some(store);
        self.opened = self.time.now();
    }

    fn step(&mut self) {
        match self.dice.roll(16) {
            0..=4 => self.append(),
            5 | 6 => self.read(),
            7 => self.iterate(),
            8 => self.wait_for_a_ticket(),
            9 => self.store.as_ref().unwrap().tick(),
            10 => {
                let (which, began) = (self.pick(), self.time.now());
                let asked = self.known[which].logstore.revalidate_now();
                self.judge(which, began, "a revalidation", &asked);
            }
            11 if self.dice.roll(4) == 0 => self.reopen(),
            11 | 12 => self.fate(),
            _ => self.pass(),
        }
    }

    /// Ends all faults, and checks that all acknowledged data is present.
    fn end(&mut self) {
        self.kms.plan(|_, _| Fault::none());
        self.noisy = false;
        let now = self.time.now();
        for key in self.time.keys().iter_mut() {
            key.coming.clear();
            key.past.push((now, Fate::Good));
        }
        for _ in 0..=PERIODS_SPARED {
            self.time.advance(self.options.revalidate_every);
            self.store.as_ref().unwrap().tick();
        }
        self.time.advance(self.options.kms_timeout + millis(1));
        while !self.tickets.is_empty() {
            self.wait_for_a_ticket();
        }
        for which in 0..3 {
            self.known[which].logstore.sync().unwrap();
            self.check(which, &read_all(&self.known[which].logstore).unwrap(), true);
        }
        self.reopen();
        for which in 0..3 {
            self.check(which, &read_all(&self.known[which].logstore).unwrap(), true);
        }
        self.store.take().unwrap().close().unwrap();
    }
}

fn read_all(logstore: &Logstore) -> Result<Vec<(u64, String)>> {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    logstore
        .read(0, &ReadOptions::default())?
        .map(|record| record.map(|r| (r.seq, text(&r.bytes))))
        .collect()
}

/// Returns the numbers of refused operations and of KMS calls.
fn run(seed: u64) -> (u64, u64) {
    let mut schedule = Schedule::new(seed);
    for _ in 0..OPERATIONS {
        schedule.step();
    }
    schedule.end();
    (schedule.refusals, schedule.kms.calls())
}

#[test]
fn no_schedule_breaks_the_bound() {
    let number =
        |name: &str| env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    if let Some(seed) = number("ENVELOG_SCHEDULE") {
        run(seed);
        return;
    }
    let count = number("ENVELOG_SCHEDULES").unwrap_or(SCHEDULES);
    let [next, refusals, calls] = [const { AtomicU64::new(0) }; 3];
    let violations = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= count {
                        break;
                    }
                    match catch_unwind(AssertUnwindSafe(|| run(seed))) {
                        Ok((refused, called)) => {
                            refusals.fetch_add(refused, Ordering::Relaxed);
                            calls.fetch_add(called, Ordering::Relaxed);
                        }
                        Err(_) => violations.lock().unwrap().push(seed),
                    }
                }
            });
        }
    });
    let violations = violations.into_inner().unwrap();
    let (refusals, calls) = (refusals.into_inner(), calls.into_inner());
    println!(
        "{count} schedules of {OPERATIONS} operations, {refusals} refused, {calls} calls to the KMS: {} violations",
        violations.len()
    );
    assert!(refusals > count, "the schedules hardly ever revoke anything");
    assert!(
        violations.is_empty(),
        "violations: {violations:?}; to see one: ENVELOG_SCHEDULE={} cargo test --all-features --test schedules",
        violations[0]
    );
}
