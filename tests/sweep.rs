//! Sweeps: a power loss after every operation of a workload, and again during recovery; a failure
//! of every operation, once or lasting, in each possible way; and random lives from a seed, with
//! all of that and more. Every second power loss also takes one copy of a file that exists twice.
//!
//! After each, the checks are: all data acknowledged as durable is present, exactly and in order,
//! and other data is complete or absent; configuration and keys are old or new; no number that a
//! caller or reader saw is assigned again; no key and nonce pair repeats; no plaintext and no key
//! is on the disk; and the store opens and continues to work. See `docs/testing.md`.
//!
//! `ENVELOG_SWEEP_SEEDS` sets the number of random lives. `ENVELOG_SWEEP_SEED` runs only the life
//! that a violation names. With `ENVELOG_SWEEP_ALL` every recovery is interrupted at each of its
//! operations instead of a sample, which takes most of an hour.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "sweep/life.rs"]
mod life;
#[path = "sweep/model.rs"]
mod model;

use std::{
    env,
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use common::{
    disk::{Call, Dice, Fault, SimDisk, Survives, Verdict},
    elsewhere,
};
use envelog::Durability;
use life::{DIR, Life, Moment, Step};
use model::Outcome;

/// The number of threads that share the cases.
const THREADS: u64 = 2;
/// Interrupts the recovery of one crash in this many at every operation, unless all are requested.
const SECOND_CUTS: u64 = 72;
/// Stop after this many violations.
const ENOUGH: usize = 10;
/// The default number of random lives.
const SEEDS: u64 = 200;

// ---- running cases ----

struct Report {
    second_cuts: u64,
    tried: AtomicU64,
    again: AtomicU64,
    /// The cases in which one copy of a file that exists twice was lost too.
    copies: AtomicU64,
    seals: AtomicU64,
    violations: Mutex<Vec<String>>,
}

impl Default for Report {
    fn default() -> Self {
        let second_cuts = if env::var_os("ENVELOG_SWEEP_ALL").is_some() { 1 } else { SECOND_CUTS };
        let [tried, again, copies, seals] = Default::default();
        Self { second_cuts, tried, again, copies, seals, violations: Mutex::default() }
    }
}

impl Report {
    /// Runs a case, unless there are enough violations already. A panic is a violation too.
    fn case(&self, what: impl FnOnce() -> String, case: impl FnOnce() -> Outcome) {
        if self.violations.lock().unwrap().len() >= ENOUGH {
            return;
        }
        let violation = match catch_unwind(AssertUnwindSafe(case)) {
            Ok(Ok(())) => return,
            Ok(Err(violation)) => violation,
            Err(panic) => {
                let text = panic.downcast_ref::<String>().cloned();
                let text =
                    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
                format!("panicked: {}", text.unwrap_or_default())
            }
        };
        self.violations.lock().unwrap().push(format!("{}: {violation}", what()));
    }

    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    #[track_caller]
    fn finish(&self, what: &str) {
        let violations = self.violations.lock().unwrap();
        let (tried, again) =
            (self.tried.load(Ordering::Relaxed), self.again.load(Ordering::Relaxed));
        let seals = self.seals.load(Ordering::Relaxed);
        println!(
            "{what}: {tried} tried, {again} of a second cut, {} with a lost copy, {seals} seals on record, {} violations",
            self.copies.load(Ordering::Relaxed),
            violations.len()
        );
        assert!(violations.is_empty(), "{} violations: {violations:#?}", violations.len());
    }
}

/// Runs `work` in each thread.
fn share(work: impl Fn(u64) + Sync) {
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let work = &work;
            scope.spawn(move || work(thread));
        }
    });
}

// ---- the workload ----

fn append(to: usize, shard: usize, as_durable: &[Durability], size: usize) -> Step {
    Step::Append { to, shard, as_durable: as_durable.to_vec(), size }
}

/// All operations on a store, in parts that each begin with an opening and end with a close.
fn workload() -> Vec<Vec<Step>> {
    use Durability::{Buffered, Synced, Written};
    use Step::*;
    let first = vec![
        Create(0),
        Create(1),
        Create(2),
        append(0, 0, &[Synced], 20),
        append(0, 1, &[Written], 20),
        append(0, 0, &[Buffered, Written, Synced, Written], 300),
        append(1, 0, &[Written, Written], 700),
        append(2, 0, &[Synced, Buffered], 20),
        Pass(150),
        Read(0),
        Pass(1100),
        Roll(0),
        append(0, 0, &[Written], 20),
        append(1, 0, &[Synced], 20),
        Checkpoint,
        append(0, 0, &[Written], 600),
        RotateDataKey(0),
        append(0, 0, &[Synced], 20),
        append(2, 0, &[Written], 600),
        append(1, 0, &[Buffered], 20),
        Split(1),
        append(1, 1, &[Synced], 20),
        Close,
    ];
    let second = vec![
        append(0, 0, &[Written], 1500),
        append(0, 0, &[Synced, Written], 1500),
        append(0, 0, &[Buffered, Written], 1500),
        Toggle(0),
        append(0, 0, &[Synced], 20),
        Toggle(0),
        append(0, 0, &[Written], 20),
        Read(0),
        Toggle(2),
        append(2, 0, &[Synced], 20),
        Rewrap(0),
        Rewrap(1),
        append(1, 0, &[Written, Synced, Written], 1200),
        RotateServiceKey,
        append(2, 0, &[Written], 20),
        Create(3),
        append(3, 0, &[Synced], 20),
        Close,
    ];
    let third = vec![
        append(1, 0, &[Written], 20),
        ReplaceCmk(1),
        append(1, 0, &[Synced, Written], 20),
        Sync(1),
        Delete(3),
        Create(3),
        append(3, 0, &[Buffered], 20),
        Roll(1),
        append(1, 0, &[Written], 20),
        Retain(0),
        append(0, 0, &[Synced, Written], 20),
        Merge(1),
        append(1, 3, &[Written], 20),
        Pass(2000),
        Checkpoint,
        RotateDataKey(1),
        append(1, 0, &[Written], 20),
        TimeToLive(2),
        append(2, 0, &[Synced], 20),
        Pass(25 * 3600 * 1000),
        append(2, 0, &[Written], 20),
        Close,
    ];
    vec![first, second, third]
}

// ---- (a) a power loss after every operation ----

/// The kind of crash, and the least durability of the appends that must survive it.
#[derive(Clone, Copy, Debug)]
enum End {
    Power(Survives),
    /// The process is killed. The machine continues, and later loses power too.
    Killed,
}

impl End {
    fn all(seed: u64) -> [Self; 5] {
        [
            Self::Power(Survives::Synced),
            Self::Power(Survives::Everything),
            Self::Power(Survives::Some { seed }),
            Self::Power(Survives::Some { seed: seed + 1 }),
            Self::Killed,
        ]
    }

    fn of(self, disk: &SimDisk) -> (SimDisk, Durability) {
        match self {
            Self::Power(survives) => (disk.crash(survives), Durability::Synced),
            Self::Killed => (disk.fork(), Durability::Written),
        }
    }
}

/// Recovers and checks everything, and repeats that after a further power loss.
fn recovers(life: &mut Life, survived: Durability) -> Outcome {
    life.reopen(survived)?;
    let disk = life.disk.crash(Survives::Synced);
    life.crash(disk, Durability::Synced).map_err(|what| format!("after another cut: {what}"))
}

/// Calls `cut` with the state so far, before each change of `life`'s disk that `wanted` selects.
fn before_changes(
    life: &Life,
    wanted: impl Fn(u64) -> bool + Send + 'static,
    cut: impl Fn(&Moment, &SimDisk, &Call) + Send + Sync + 'static,
) {
    let (moment, disk) = (life.moment(), life.disk.clone());
    life.disk.on_call(move |call| {
        if call.op.changes() && wanted(call.number) {
            elsewhere(|| cut(&moment, &disk, call));
        }
        Verdict::Go
    });
}

fn seed_of(parts: &[u64]) -> u64 {
    parts.iter().fold(0, |seed, part| Dice::new(seed, *part).next())
}

#[test]
fn the_power_fails_after_every_operation_and_during_recovery() {
    use Durability::{Synced, Written};
    let report = Arc::new(Report::default());
    let changes = AtomicU64::new(0);
    share(|thread| {
        let cut_after_each = |life: &Life| {
            let shared = Arc::clone(&report);
            before_changes(
                life,
                move |number| number % THREADS == thread,
                move |moment, disk, call| {
                    for (way, end) in End::all(call.number).into_iter().enumerate() {
                        crash(&shared, moment, disk, call, way as u64, end);
                    }
                },
            );
        };
        let run = |life: &mut Life, steps: &[Step]| {
            for step in steps {
                report.case(|| format!("{step:?}"), || life.run(step));
            }
            report.case(|| "the workload".into(), || life.look_for_keys());
            life.disk.heal();
            changes.fetch_add(life.disk.changes(), Ordering::Relaxed);
        };
        let mut life = Life::new(1);
        cut_after_each(&life);
        run(&mut life, &workload().concat());
        run(
            &mut life,
            &[append(0, 0, &[Written, Synced, Written], 400), append(1, 0, &[Synced, Written], 20)],
        );
        // The sweep includes a recovery.
        let mut next = life.moment().branch(life.disk.fork(), 5);
        cut_after_each(&next);
        report.case(|| "the recovery".into(), || next.reopen(Written));
        run(&mut next, &[append(0, 0, &[Written], 20), Step::Close]);
    });
    println!("{} operations that change something", changes.load(Ordering::Relaxed) / THREADS);
    report.finish("power cuts");
    assert!(
        report.tried.load(Ordering::Relaxed) > 2000 && report.again.load(Ordering::Relaxed) > 2000
    );
}

fn crash(report: &Arc<Report>, moment: &Moment, disk: &SimDisk, call: &Call, way: u64, end: End) {
    Report::count(&report.tried);
    let (disk, survived) = end.of(disk);
    let mut what =
        format!("before change {} ({:?} {}), {end:?}", call.number, call.op, call.path.display());
    // In every second case, one copy of a file that exists twice is lost too.
    if (call.number + way).is_multiple_of(2)
        && let Some(lost) = disk.lose_a_copy(Path::new(DIR), &mut Dice::new(call.number, way))
    {
        Report::count(&report.copies);
        what = format!("{what}; {lost}");
    }
    let mut life = moment.branch(disk, seed_of(&[call.number, way]));
    if (call.number * 5 + way).is_multiple_of(report.second_cuts) {
        let (shared, what) = (Arc::clone(report), what.clone());
        before_changes(
            &life,
            |_| true,
            move |moment, disk, again| {
                for survives in [Survives::Synced, Survives::Some { seed: again.number }] {
                    Report::count(&shared.again);
                    let seed = seed_of(&[again.number, u64::from(survives == Survives::Synced), 2]);
                    let mut life = moment.branch(disk.crash(survives), seed);
                    let what = || {
                        format!(
                            "{what}; in recovery before change {} ({:?} {}), {survives:?}",
                            again.number,
                            again.op,
                            again.path.display()
                        )
                    };
                    shared.case(what, || life.reopen(Durability::Synced));
                    shared.seals.fetch_add(life.ledger.seals(), Ordering::Relaxed);
                }
            },
        );
    }
    report.case(|| what, || recovers(&mut life, survived));
    report.seals.fetch_add(life.ledger.seals(), Ordering::Relaxed);
}

// ---- (b) every operation fails ----

/// A part of the workload, its starting state, and its disk operations.
struct Part {
    steps: Vec<Step>,
    begin: Moment,
    disk: SimDisk,
    calls: Vec<Call>,
}

fn parts() -> Vec<Part> {
    let mut life = Life::new(2);
    let mut parts = Vec::new();
    for (n, mut steps) in workload().into_iter().enumerate() {
        assert!(matches!(steps.pop(), Some(Step::Close)));
        // The first two parts begin after a clean end, the last one after a kill.
        life.run(if n < 2 { &Step::Shut } else { &Step::Kill }).unwrap();
        let (begin, disk) = (life.moment().freeze(), life.disk.fork());
        steps.insert(0, Step::Open);
        let mut alone = begin.branch(disk.fork(), 3);
        steps.iter().for_each(|step| alone.run(step).unwrap());
        steps.iter().for_each(|step| life.run(step).unwrap());
        parts.push(Part { steps, begin, disk, calls: alone.disk.take_calls() });
    }
    parts
}

#[test]
fn every_operation_fails_once_and_lastingly_in_each_way() {
    let report = Report::default();
    let parts = parts();
    let mut cases = Vec::new();
    for part in &parts {
        for call in &part.calls {
            for fault in Fault::ALL.into_iter().filter(|fault| fault.befalls(call.op)) {
                cases.extend([false, true].map(|lasting| (part, call, fault, lasting)));
            }
        }
    }
    let next = AtomicU64::new(0);
    share(|_| {
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let Some((part, call, fault, lasting)) = cases.get(n as usize) else { break };
            Report::count(&report.tried);
            let mut life = part.begin.branch(part.disk.fork(), seed_of(&[n, 4]));
            let what = || format!("case {n}: {fault:?} at {call:?}, lasting: {lasting}");
            report.case(what, || fails(&mut life, &part.steps, n, call.nth, *fault, *lasting));
            report.seals.fetch_add(life.ledger.seals(), Ordering::Relaxed);
        }
    });
    report.finish("failing operations");
    assert!(report.tried.load(Ordering::Relaxed) > 5000);
}

fn fails(
    life: &mut Life,
    steps: &[Step],
    n: u64,
    nth: u64,
    fault: Fault,
    lasting: bool,
) -> Outcome {
    life.run(&Step::Fail(nth, fault, lasting))?;
    steps.iter().try_for_each(|step| life.run(step))?;
    if !n.is_multiple_of(3) {
        // The process continues when the disk works again.
        life.run(&Step::Heal)?;
    }
    match n % 5 {
        0 => life.run(&Step::Close),
        1 => life.run(&Step::CutPower(Survives::Synced)),
        2 | 3 => life.run(&Step::CutPower(Survives::Some { seed: n })),
        _ => life.run(&Step::Kill),
    }?;
    life.run(&Step::CutPower(Survives::Synced)).map_err(|what| format!("after a cut: {what}"))
}

// ---- (c) the disk is full ----

/// The most pages that are left free.
const FREE_PAGES: u64 = 20;
/// No limit of pages or inodes.
const MANY: u64 = u64::MAX;

/// Every operation of the workload meets a disk with 0 to 20 free pages, and one without a free
/// inode. The rest of the workload follows on the full disk. Then the store frees space itself, and
/// continues once the disk has room.
#[test]
fn the_disk_is_full_before_every_operation() {
    let report = Report::default();
    let parts = parts();
    let limits: Vec<_> = (0..=FREE_PAGES).map(|pages| (pages, MANY)).chain([(MANY, 0)]).collect();
    let mut cases = Vec::new();
    for part in &parts {
        for at in 0..part.steps.len() {
            cases.extend(limits.iter().map(|limits| (part, at, *limits)));
        }
    }
    let next = AtomicU64::new(0);
    share(|_| {
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            let Some((part, at, limits)) = cases.get(n as usize) else { break };
            Report::count(&report.tried);
            let mut life = part.begin.branch(part.disk.fork(), seed_of(&[n, 6]));
            let what = || format!("case {n}: {limits:?} free before {:?} ({at})", part.steps[*at]);
            report.case(what, || fills(&mut life, &part.steps, n, *at, *limits));
            report.seals.fetch_add(life.ledger.seals(), Ordering::Relaxed);
        }
    });
    report.finish("full disks");
    assert!(report.tried.load(Ordering::Relaxed) > 1000);
}

fn fills(
    life: &mut Life,
    steps: &[Step],
    n: u64,
    at: usize,
    (pages, inodes): (u64, u64),
) -> Outcome {
    steps[..at].iter().try_for_each(|step| life.run(step))?;
    life.run(&Step::Fill(pages, inodes))?;
    steps[at..].iter().try_for_each(|step| life.run(step))?;
    life.run(&Step::Free(n / 22 + n))?;
    life.run(&Step::Grow)?;
    match n % 3 {
        0 => life.run(&Step::Close),
        1 => life.run(&Step::CutPower(Survives::Synced)),
        _ => life.run(&Step::CutPower(Survives::Some { seed: n })),
    }
}

// ---- (d) random lives ----

/// A random step of a life.
fn any_step(dice: &mut Dice) -> Step {
    use Durability::{Buffered, Synced, Written};
    let n = dice.roll(4) as usize;
    let mut appends = || {
        let as_durable = (0..=dice.roll(3))
            .map(|_| [Buffered, Written, Synced][dice.roll(3) as usize])
            .collect();
        Step::Append {
            to: n,
            shard: dice.roll(3) as usize,
            as_durable,
            size: [20, 300, 1500][dice.roll(3) as usize],
        }
    };
    match (appends(), dice.roll(69)) {
        (append, 0..22) => append,
        (_, 22 | 23) => Step::Create(n),
        (_, 24..27) => Step::Read(n),
        (_, 27) => Step::Sync(n),
        (_, 28 | 29) => Step::Roll(n),
        (_, 30) => Step::RotateDataKey(n),
        (_, 31) => Step::Rewrap(n),
        (_, 32) => Step::RotateServiceKey,
        (_, 33) => Step::Toggle([0, 2][n % 2]),
        (_, 34) => Step::ReplaceCmk(n),
        (_, 35) => Step::Retain(n),
        (_, 36) => Step::TimeToLive(n),
        (_, 37) => Step::Delete(n),
        (_, 38 | 39) => Step::Checkpoint,
        (_, 40..44) => Step::Pass([50, 150, 1100, 40_000, 90_000_000][dice.roll(5) as usize]),
        (_, 44) => Step::JumpWall([-7200, -5, 5, 7200][n]),
        (_, 45) => Step::Disable,
        (_, 46) => Step::Enable,
        (_, 47) => Step::KmsFails(1 + dice.roll(4)),
        (_, 48) => Step::RandomFails,
        (_, 49..53) => {
            let fault = Fault::ALL[dice.roll(Fault::ALL.len() as u64) as usize];
            Step::Fail(1 + dice.roll(60), fault, dice.roll(3) == 0)
        }
        (_, 53) => Step::Heal,
        (_, 54 | 55) => Step::Close,
        (_, 56) => Step::Kill,
        (_, 57) => Step::CutPower(Survives::Synced),
        (_, 58..61) => {
            Step::TakeOver { to: n, shard: dice.roll(2) as usize, nth: 1 + dice.roll(80) }
        }
        (_, 61) => Step::Fenced,
        (_, 62) => Step::AnchorFails { half: dice.roll(2) == 0 },
        (_, 63) => Step::PutBack,
        (_, 64 | 65) => Step::Split(n),
        (_, 66) => Step::Merge(n),
        _ => Step::CutPower(Survives::Some { seed: dice.next() }),
    }
}

/// A whole life with a crash at its end, sometimes followed by damage to the closed store.
fn random_life(seed: u64) -> (Vec<Step>, Outcome, u64) {
    let mut dice = Dice::new(seed, 0);
    let mut life = Life::new(seed);
    let mut steps: Vec<Step> = (0..3).map(Step::Create).collect();
    steps.extend((0..10 + dice.roll(30)).map(|_| any_step(&mut dice)));
    steps.push(match dice.roll(3) {
        0 => Step::Close,
        1 => Step::Kill,
        _ => Step::CutPower(Survives::Some { seed }),
    });
    steps.push(Step::CutPower(Survives::Synced));
    let mut lived = 0;
    let outcome = steps.iter().try_for_each(|step| {
        lived += 1;
        life.run(step)
    });
    let outcome = outcome.and_then(|()| life.look_for_keys()).and_then(|()| {
        life.run(&Step::Shut)?;
        life.rot(&mut dice)
    });
    steps.truncate(lived);
    (steps, outcome, life.ledger.seals())
}

#[test]
fn lives_made_up_from_a_seed() {
    let number =
        |name: &str| env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    if let Some(seed) = number("ENVELOG_SWEEP_SEED") {
        let (steps, outcome, _) = random_life(seed);
        panic!("seed {seed}: {outcome:?} after {steps:#?}");
    }
    let (report, next) = (Report::default(), AtomicU64::new(0));
    let seeds = number("ENVELOG_SWEEP_SEEDS").unwrap_or(SEEDS);
    share(|_| {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds {
                break;
            }
            Report::count(&report.tried);
            let what = || {
                format!("ENVELOG_SWEEP_SEED={seed} cargo test --test sweep lives -- --nocapture")
            };
            report.case(what, || {
                let (_, outcome, seals) = random_life(seed);
                report.seals.fetch_add(seals, Ordering::Relaxed);
                outcome
            });
        }
    });
    report.finish("random lives");
}
