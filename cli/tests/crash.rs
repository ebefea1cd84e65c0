//! Kills the real binary repeatedly while it appends: every acknowledged line must survive, and no
//! line may be partial.
//!
//! ENVELOG_KILL_CYCLES sets the number of cycles (30 by default); ENVELOG_KILL_SEED repeats a
//! failed run.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    io::Write,
    time::{SystemTime, UNIX_EPOCH},
};

use common::{Running, World, byok, service};

/// Lines offered in one cycle: usually more than are appended before the kill.
const LINES: usize = 40_000;
const CYCLES_PER_LOGSTORE: usize = 15;

fn number_from(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().unwrap_or_else(|_| panic!("{variable} is not a number: {text}")))
}

/// A small random generator with a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// A line that names its cycle and number. The lengths vary widely.
fn line(cycle: u64, number: usize) -> String {
    format!("{cycle}.{number} {}", "=".repeat((number * 7919 + cycle as usize * 10_007) % 200))
}

/// Runs `cycles` cycles with this durability: append, kill, check. Returns in how many of them the
/// kill interrupted work.
fn kill_and_look(world: &World, name: &str, durability: &str, cycles: u64, dice: &mut Dice) -> u64 {
    // The lines that must be present: for each cycle so far, a prefix of its lines.
    let mut kept: Vec<String> = Vec::new();
    let mut killed_at_work = 0;
    for cycle in 0..cycles {
        let group_bytes = (512 + dice.below(8192)).to_string();
        let mut append = Running::start(world.command(&[
            "append",
            name,
            "-",
            "--ack",
            "--durability",
            durability,
            "--group-bytes",
            &group_bytes,
        ]));
        let acks = append.lines();
        let mut stdin = append.stdin.take().unwrap();
        let feeding = std::thread::spawn(move || {
            for first in (0..LINES).step_by(100) {
                let text: String =
                    (first..first + 100).map(|number| line(cycle, number) + "\n").collect();
                if stdin.write_all(text.as_bytes()).is_err() {
                    return None;
                }
            }
            // Keep standard input open until the kill: its end would let the process end by itself.
            Some(stdin)
        });
        let mut acknowledged = 0;
        for _ in 0..dice.below(40) {
            match acks.recv() {
                Ok(ack) => acknowledged = ack.parse().unwrap(),
                Err(_) => panic!("cycle {cycle}: it ended before it was killed"),
            }
            if acknowledged == LINES {
                break;
            }
        }
        append.kill();
        drop(feeding.join().unwrap());
        // Acknowledgements that were printed before the kill are valid too.
        for ack in acks {
            acknowledged = ack.parse().unwrap();
        }
        killed_at_work += u64::from(acknowledged < LINES);

        let read = String::from_utf8(world.read(name)).unwrap();
        assert!(read.is_empty() || read.ends_with('\n'));
        let read: Vec<&str> = read.lines().collect();
        let known = kept.len();
        assert!(
            read.len() >= known + acknowledged,
            "cycle {cycle}: {} lines, {known} + {acknowledged} due",
            read.len()
        );
        assert!(read[..known] == kept[..], "cycle {cycle}: what earlier cycles left has changed");
        let new = &read[known..];
        let first_wrong =
            new.iter().enumerate().position(|(number, read)| *read != line(cycle, number));
        assert_eq!(first_wrong, None, "cycle {cycle}: a line is half there, or not in its place");
        kept.extend(new.iter().map(|&line| line.to_owned()));
    }
    world.ok(&["verify"]);
    killed_at_work
}

/// Runs half of the cycles with one durability. Both durabilities must survive a kill.
fn cycles(durability: &str, conf: impl FnOnce(&World) -> serde_json::Value) {
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
    let seed = number_from("ENVELOG_KILL_SEED").unwrap_or_else(now);
    let cycles = number_from("ENVELOG_KILL_CYCLES").unwrap_or(30).div_ceil(2);
    // The test harness shows this only on failure.
    println!("ENVELOG_KILL_SEED={seed}");
    let mut dice = Dice(seed);
    let world = World::new();
    let conf = conf(&world);
    // Use several Logstores: each cycle reads everything that the earlier cycles left in its
    // Logstore.
    let mut killed_at_work = 0;
    for first in (0..cycles).step_by(CYCLES_PER_LOGSTORE) {
        let name = format!("p/from-{first}");
        world.create(&name, &conf);
        let cycles = (cycles - first).min(CYCLES_PER_LOGSTORE as u64);
        killed_at_work += kill_and_look(&world, &name, durability, cycles, &mut dice);
    }
    assert!(killed_at_work * 2 >= cycles, "only {killed_at_work} of {cycles} kills met work");
}

#[test]
fn a_kill_loses_nothing_that_was_acknowledged_as_synced() {
    cycles("synced", |_| service("default"));
}

#[test]
fn a_kill_loses_nothing_that_was_acknowledged_as_written() {
    cycles("written", |world| byok("sm4", &world.create_key()));
}
