//! Retention and clocks: short runs, small limits, and a wall clock that is wrong for some time.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/traced.rs"]
mod traced;

use std::{sync::Arc, time::Duration};

use common::{
    disk::{Dice, Sim},
    *,
};
use envelog::{
    Compression, Logstore, LogstoreSpec, Payload, Position, ReadOptions, Record, Store,
    StoreOptions,
    admin::{RetainOptions, RetentionReport, VerifyOptions},
    io::Clock as _,
};
use traced::Traced;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// Ten years.
const FAR: Duration = Duration::from_secs(3650 * 24 * 3600);

/// A store whose Logstore `p/l` has these limits, closed.
fn with_limits(ttl_days: Option<u32>, retention_bytes: Option<u64>) -> Sim {
    let sim = Sim::new();
    let store = sim.create();
    let spec = LogstoreSpec::default().compression(Compression::None);
    let spec = spec.ttl_days(ttl_days).retention_bytes(retention_bytes);
    store.create_logstore(&name("p/l"), spec).unwrap();
    store.close().unwrap();
    sim
}

fn find(store: &Store) -> Logstore {
    store.logstore(&name("p/l")).unwrap()
}

/// A short run: opens the store, appends, and closes it.
fn run(sim: &Sim, text: &str) {
    let store = sim.open();
    put(&find(&store), text);
    store.close().unwrap();
}

fn opened_texts(sim: &Sim) -> Vec<String> {
    texts(&find(&sim.builder().open_read_only().unwrap()))
}

/// The bytes of the segments.
fn bytes(sim: &Sim, logstore: &Logstore) -> Vec<u64> {
    let len = |path: &std::path::PathBuf| sim.disk.bytes(path).len() as u64;
    sim.segments(logstore, 0).iter().map(len).collect()
}

fn retain(store: &Store) -> RetentionReport {
    store.admin().apply_retention().unwrap()
}

fn assert_sound(store: &Store, context: &str) {
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.faults.is_empty(), "{context}: {:?}", report.faults);
}

// ---- by size ----

#[test]
fn short_runs_keep_to_the_limit_although_no_run_is_due() {
    const LIMIT: u64 = 100_000;
    let sim = with_limits(None, Some(LIMIT));
    for n in 0..10 {
        run(&sim, &format!("{n} {}", noise(n, 30_000)));
        let store = sim.builder().open_read_only().unwrap();
        let sizes = bytes(&sim, &find(&store));
        let all: u64 = sizes.iter().sum();
        assert!(all <= LIMIT, "run {n}: {sizes:?}");
        // No more than necessary: another segment of this size is over the limit.
        assert!(n < 3 || all + sizes[0] > LIMIT, "run {n}: {sizes:?}");
        assert!(texts(&find(&store)).last().unwrap().starts_with(&format!("{n} ")));
        assert_sound(&store, &format!("run {n}"));
    }
}

#[test]
fn the_newest_segment_stays_however_small_the_limit_is() {
    let sim = with_limits(None, Some(1));
    let store = sim.open();
    let logstore = find(&store);
    put(&logstore, "a");
    logstore.roll().unwrap();
    assert_eq!(retain(&store).segments, 0);
    put(&logstore, "b");
    assert_eq!(retain(&store).segments, 1, "the open segment has data");
    assert_eq!(texts(&logstore), ["b"]);
    store.close().unwrap();
    assert_eq!(opened_texts(&sim), ["b"]);
    // A segment without data is not the newest.
    let store = sim.open();
    let logstore = find(&store);
    assert_eq!(retain(&store).segments, 0);
    assert_eq!(texts(&logstore), ["b"]);
}

/// After the kill of a process, recovery puts the blocks that may not be durable into a new segment.
/// Retention drops nothing until a sync has reached behind that one.
#[test]
fn a_sync_lets_retention_drop_what_recovery_has_left() {
    let mut sim = with_limits(None, Some(1));
    let store = sim.open();
    find(&store).append(record("a"), &written()).unwrap();
    sim.disk = sim.disk.kill();
    let store = sim.open();
    let logstore = find(&store);
    logstore.append(record("b"), &buffered()).unwrap();
    assert_eq!(bytes(&sim, &logstore).len(), 3);
    assert_eq!(retain(&store).segments, 0);
    logstore.sync().unwrap();
    assert_eq!(retain(&store).segments, 2);
    assert_eq!(bytes(&sim, &logstore).len(), 1);
    assert_eq!(texts(&logstore), ["b"]);
    assert_sound(&store, "dropped");
}

#[test]
fn a_small_limit_has_segments_rolled_earlier() {
    const LIMIT: u64 = 400_000;
    let sim = with_limits(None, Some(LIMIT));
    let store = sim.open();
    let logstore = find(&store);
    for n in 0..100 {
        logstore.append(record(&noise(n, 10_000)), &written()).unwrap();
    }
    let sizes = bytes(&sim, &logstore);
    let largest = *sizes.iter().max().unwrap();
    assert!(largest < LIMIT / 6, "{sizes:?}");
    retain(&store);
    let left: u64 = bytes(&sim, &logstore).iter().sum();
    assert!((LIMIT - largest..=LIMIT).contains(&left), "{left}");
    // Without a limit, a segment has the size of the options.
    let other = sim.world.service(&store, "p/other");
    for n in 0..100 {
        other.append(record(&noise(n, 10_000)), &written()).unwrap();
    }
    assert_eq!(sim.segments(&other, 0).len(), 1);
}

// ---- by age ----

#[test]
fn short_runs_drop_what_is_too_old() {
    let sim = with_limits(Some(1), None);
    for text in ["a", "b", "c", "d"] {
        run(&sim, text);
        sim.world.clock.advance(20 * HOUR);
    }
    // `c` was 40 hours old when `e` was written. The run of `d` came 20 hours after `c`.
    run(&sim, "e");
    assert_eq!(opened_texts(&sim), ["d", "e"]);
}

#[test]
fn retention_is_not_applied_before_it_is_due() {
    let mut sim = with_limits(Some(1), None);
    sim.world.options.retention_every = 30 * HOUR;
    run(&sim, "a");
    sim.world.clock.advance(20 * HOUR);
    run(&sim, "b");
    sim.world.clock.advance(9 * HOUR);
    run(&sim, "c");
    assert_eq!(opened_texts(&sim), ["a", "b", "c"]);
    sim.world.clock.advance(HOUR);
    run(&sim, "d");
    assert_eq!(opened_texts(&sim), ["b", "c", "d"]);
}

#[test]
fn a_clock_that_jumps_ahead_destroys_nothing_until_it_has_settled() {
    let log = Traced::default();
    log.while_running(jump_ahead);
    let text = log.text();
    assert_eq!(text.matches("retention by age suspended").count(), 1, "{text}");
    assert!(text.contains("clock trusted again"), "{text}");
}

fn jump_ahead() {
    let sim = with_limits(Some(1), None);
    let (store, clock) = (sim.open(), &sim.world.clock);
    let logstore = find(&store);
    put(&logstore, "old");
    logstore.roll().unwrap();
    clock.jump_wall(DAY);
    assert!(!retain(&store).suspended, "a day is tolerated");
    clock.jump_wall(DAY + secs(1));
    for minutes in [0, 1, 58] {
        clock.advance(minutes * secs(60));
        store.tick();
        let report = retain(&store);
        assert_eq!((report.suspended, report.segments), (true, 0), "after {minutes} min");
    }
    assert!(store.metrics().retention_suspended);
    assert!(store.admin().retention_status().suspended);
    assert_eq!(texts(&logstore), ["old"]);
    // Retention by size needs no clock.
    let other = sim.world.service(&store, "p/other");
    for text in ["a", "b"] {
        put(&other, text);
        other.roll().unwrap();
    }
    store.update_logstore(other.name(), other.config().retention_bytes(1)).unwrap();
    assert_eq!(retain(&store).segments, 1);
    clock.advance(secs(60));
    let report = retain(&store);
    assert_eq!((report.suspended, report.segments), (false, 1));
    assert!(!store.metrics().retention_suspended);
}

#[test]
fn an_operator_can_trust_the_clock_at_once() {
    let sim = with_limits(Some(1), None);
    run(&sim, "old");
    sim.world.clock.jump_wall(5 * DAY);
    let store = sim.open();
    assert!(retain(&store).suspended);
    let report = store.admin().retain(&RetainOptions::default().trust_clock(true)).unwrap();
    assert_eq!((report.suspended, report.segments), (false, 1));
    store.close().unwrap();
    // The catalogue has it.
    sim.world.clock.advance(HOUR);
    let store = sim.open();
    assert!(!retain(&store).suspended);
}

#[test]
fn a_jump_is_settled_by_a_later_opening() {
    let sim = with_limits(Some(1), None);
    run(&sim, "old");
    sim.world.clock.jump_wall(5 * DAY);
    run(&sim, "a");
    let reader = sim.builder().open_read_only().unwrap();
    assert!(reader.admin().retention_status().suspended, "a reader knows of it");
    sim.world.clock.advance(HOUR - secs(1));
    let log = Traced::default();
    log.while_running(|| run(&sim, "b"));
    assert!(log.text().contains("retention by age suspended"), "each run says so");
    assert_eq!(opened_texts(&sim), ["old", "a", "b"]);
    sim.world.clock.advance(secs(60));
    run(&sim, "c");
    assert_eq!(opened_texts(&sim), ["a", "b", "c"]);
    let reader = sim.builder().open_read_only().unwrap();
    assert!(!reader.admin().retention_status().suspended);
}

/// A store that is opened once a week keeps to its limit, one run late.
#[test]
fn a_store_that_is_opened_weekly_works() {
    let sim = with_limits(Some(1), None);
    for week in 0..8 {
        run(&sim, &week.to_string());
        let left = opened_texts(&sim);
        assert!(left.len() <= 3, "week {week}: {left:?}");
        sim.world.clock.advance(7 * DAY);
    }
}

/// A process that starts with a clock that is hours slow, or days ahead, applies retention once the
/// clock is right.
#[test]
fn a_clock_that_is_corrected_stops_nothing() {
    for (wrong, ahead) in [(3 * HOUR, false), (20 * DAY, false), (3 * HOUR, true), (20 * DAY, true)]
    {
        let sim = with_limits(Some(1), None);
        let clock = &sim.world.clock;
        let jump =
            |ahead: bool| if ahead { clock.jump_wall(wrong) } else { clock.jump_wall_back(wrong) };
        run(&sim, "old");
        jump(ahead);
        let store = sim.open();
        store.tick();
        clock.advance(secs(3));
        jump(!ahead);
        for _ in 0..30 {
            clock.advance(HOUR);
            store.tick();
        }
        assert_eq!(texts(&find(&store)), [""; 0], "{wrong:?} {ahead}");
    }
}

#[test]
fn the_settling_time_is_an_option() {
    let mut sim = with_limits(Some(1), None);
    sim.world.options = sim.world.options.clock_settle(secs(1));
    run(&sim, "old");
    sim.world.clock.jump_wall(5 * DAY);
    let store = sim.open();
    assert!(retain(&store).suspended);
    sim.world.clock.advance(secs(1));
    assert_eq!(retain(&store).segments, 1);
    let refused = StoreOptions::default().clock_settle(Duration::ZERO).check().unwrap_err();
    assert!(refused.to_string().contains("clock_settle"), "{refused}");
}

// ---- receive times ----

fn read(logstore: &Logstore, options: ReadOptions) -> Vec<Record> {
    logstore.read(0, &options).unwrap().collect::<Result<_, _>>().unwrap()
}

/// One append under a clock that is ten years ahead leaves later data as it should be.
#[test]
fn one_future_append_poisons_nothing() {
    let sim = with_limits(Some(3), None);
    let clock = &sim.world.clock;
    run(&sim, "before");
    clock.jump_wall(FAR);
    run(&sim, "future");
    clock.jump_wall_back(FAR);
    for text in ["a", "b", "c"] {
        clock.advance(20 * HOUR);
        run(&sim, text);
    }
    let store = sim.open();
    let logstore = find(&store);
    let now = clock.wall_us();
    let all = read(&logstore, ReadOptions::default());
    assert_eq!(strings(&all), ["before", "future", "a", "b", "c"]);
    assert_eq!(all[4].receive_time_us, now);
    assert_eq!(now - all[2].receive_time_us, 40 * HOUR.as_micros() as u64);
    let up_to_now = ReadOptions::default().to(Position::Time(now + 1));
    assert_eq!(strings(&read(&logstore, up_to_now)), ["before", "a", "b", "c"]);
    let since = ReadOptions::default().from(Position::Time(all[3].receive_time_us));
    assert_eq!(strings(&read(&logstore, since)), ["future", "b", "c"]);
    assert_sound(&store, "after the correction");
    // The segment from the future is as old as the one behind it.
    clock.advance(25 * HOUR);
    retain(&store);
    assert_eq!(texts(&logstore), ["future", "a", "b", "c"]);
    clock.advance(10 * HOUR);
    retain(&store);
    assert_eq!(texts(&logstore), ["b", "c"]);
}

/// A clock that is set back within a run begins a segment. A step of up to a second does not.
#[test]
fn a_clock_set_back_begins_a_segment() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    let clock = &sim.world.clock;
    put(&logstore, "a");
    clock.jump_wall_back(secs(1));
    put(&logstore, "b");
    assert_eq!(sim.segments(&logstore, 0).len(), 1);
    clock.jump_wall_back(millis(1));
    let now = clock.wall_us();
    // In one batch: the groups on both sides of the step.
    logstore.append(record("c"), &buffered()).unwrap();
    clock.jump_wall_back(secs(60));
    logstore.append(record("d"), &buffered()).unwrap();
    logstore.sync().unwrap();
    assert_eq!(sim.segments(&logstore, 0).len(), 3);
    let all = records(&logstore, 0).unwrap();
    assert_eq!(strings(&all), ["a", "b", "c", "d"]);
    let times: Vec<_> = all.iter().map(|record| record.receive_time_us).collect();
    assert_eq!(times[0], times[1]);
    assert_eq!((times[2], times[3]), (now, now - secs(60).as_micros() as u64));
    assert_sound(&store, "set back");
}

/// Reads by time over segments whose times go back, compared with a list of all groups.
#[test]
fn time_search_agrees_with_a_list() {
    for seed in 0..12 {
        let mut dice = Dice::new(seed, 7);
        let mut sim = Sim::new();
        let mut store = sim.create();
        sim.world.service(&store, "p/l");
        let clock = Arc::clone(&sim.world.clock);
        for n in 0..60 {
            match dice.roll(12) {
                0 => clock.jump_wall(secs(dice.roll(100_000))),
                1 => clock.jump_wall_back(secs(dice.roll(50_000))),
                2 => clock.jump_wall_back(millis(dice.roll(1500))),
                3 => find(&store).roll().unwrap(),
                4 => {
                    store.close().unwrap();
                    store = sim.open();
                }
                5 => {
                    // The process is killed, and the shard is recovered.
                    sim.disk = sim.disk.kill();
                    store = sim.open();
                }
                _ => {
                    clock.advance(millis(dice.roll(5_000)));
                    let payload = Payload::opaque(format!("{n}")).unwrap();
                    let how = if dice.roll(2) == 0 { synced() } else { buffered() };
                    find(&store).append(payload, &how).unwrap();
                }
            }
        }
        let logstore = find(&store);
        logstore.sync().unwrap();
        let all = records(&logstore, 0).unwrap();
        assert!(!all.is_empty(), "seed {seed}");
        assert!(all.windows(2).all(|pair| pair[0].seq < pair[1].seq), "seed {seed}");
        assert_sound(&store, &format!("seed {seed}"));
        let readers = [logstore, find(&sim.builder().open_read_only().unwrap())];
        let mut times: Vec<u64> = all.iter().map(|record| record.receive_time_us).collect();
        times.extend(times.clone().iter().map(|time| time + 1));
        times.extend([0, u64::MAX]);
        for _ in 0..200 {
            let pick = |dice: &mut Dice| times[dice.roll(times.len() as u64) as usize];
            let (from, to) = (pick(&mut dice), pick(&mut dice));
            let expected: Vec<Record> = all
                .iter()
                .filter(|record| (from..to).contains(&record.receive_time_us))
                .cloned()
                .collect();
            let options = ReadOptions::default().from(Position::Time(from)).to(Position::Time(to));
            for logstore in &readers {
                assert_eq!(read(logstore, options), expected, "seed {seed}: {from} to {to}");
            }
        }
    }
}

/// A follower up to a time ends there, as long as times do not go back.
#[test]
fn a_follower_ends_at_its_time() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "a");
    let end = sim.world.clock.wall_us() + 1;
    let options = ReadOptions::default().to(Position::Time(end));
    let mut follow = logstore.follow(0, &options).unwrap();
    assert_eq!(follow.try_next().unwrap().unwrap().seq, 0);
    assert!(follow.try_next().unwrap().is_none());
    sim.world.clock.advance(secs(1));
    put(&logstore, "b");
    assert!(follow.next().is_none());
}
