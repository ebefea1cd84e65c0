//! Reading a shard of many segments, in one run: `cargo bench --bench segments`.
//!
//! Prints the rate of segments of 1 MiB as a part of that of segments of 64 MiB with the same
//! groups, the cost of a tiny segment, and how a shard of 100,000 segments opens and is read. The
//! files are those of the real disk, in the page cache. `ENVELOG_BENCH_SEGMENTS` sets another
//! number of segments. The times of a tiny segment are CPU times of the reading thread, system calls
//! included, so that other work on the machine does not count.

#![allow(missing_docs, clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::{
    path::Path,
    time::{Duration, Instant},
};

use common::*;
use envelog::{
    Compression, EncryptConf, EncryptType, Logstore, LogstoreSpec, Position, ReadOptions, Store,
};

const BYTES: usize = 256 << 20;
const GROUP_BYTES: usize = 64 << 10;
const ROUNDS: usize = 5;
const TINY: u64 = 2_000;
const LOOKS: u32 = 100;

fn spec(compression: Compression) -> LogstoreSpec {
    LogstoreSpec::default()
        .compression(compression)
        .encrypt_conf(EncryptConf::service_key(EncryptType::Aes))
}

/// Lines that LZ4 compresses to about a half.
fn group(seed: u64) -> String {
    let line = |n: u64| format!("10.0.0.1 GET /api/v1/orders/{} 200 12ms\n", noise(seed + n, 24));
    (0..)
        .map(line)
        .scan(0, |len, line| {
            *len += line.len();
            (*len <= GROUP_BYTES).then_some(line)
        })
        .collect()
}

/// A store with segments of this size, closed and opened for reading.
fn filled(segment_bytes: u64, compression: Compression) -> (World, Store, Logstore) {
    let mut world = World::threads();
    world.options.segment_bytes = segment_bytes;
    let store = world.create();
    let logstore = store.create_logstore(&name("p/l"), spec(compression)).unwrap();
    let groups: Vec<_> = (0..64).map(|n| record(&group(n * 10_000))).collect();
    for group in groups.iter().cycle().take(BYTES / GROUP_BYTES) {
        logstore.append(group.clone(), &buffered()).unwrap();
    }
    logstore.roll().unwrap();
    drop(logstore);
    store.close().unwrap();
    let store = world.builder().open_read_only().unwrap();
    let logstore = store.logstore(&name("p/l")).unwrap();
    (world, store, logstore)
}

/// Reads from there to the end. Returns how many bytes there are, and how long that took.
fn read(logstore: &Logstore, options: &ReadOptions) -> (usize, Duration) {
    let began = Instant::now();
    let mut reader = logstore.read(0, options).unwrap();
    let mut bytes = 0;
    while let Some(block) = reader.next_block().unwrap() {
        bytes += block.records.iter().map(|record| record.bytes.len()).sum::<usize>();
    }
    (bytes, began.elapsed())
}

/// The two sizes take turns, and the best round of each counts.
fn rates() {
    for compression in [Compression::None, Compression::Lz4] {
        let stores = [1 << 20, 64 << 20].map(|segment_bytes| filled(segment_bytes, compression));
        let mut best = [Duration::MAX; 2];
        for _ in 0..ROUNDS {
            for (best, (.., logstore)) in best.iter_mut().zip(&stores) {
                let (bytes, took) = read(logstore, &ReadOptions::default());
                assert!(bytes > BYTES * 9 / 10);
                *best = took.min(*best);
            }
        }
        let segments = stores.map(|(.., logstore)| logstore.status().unwrap().segments);
        let rate = best.map(|took| BYTES as f64 / took.as_secs_f64() / f64::from(1 << 20));
        println!(
            "{compression}: {} segments of 1 MiB {:.0} MiB/s, {} of 64 MiB {:.0} MiB/s, small/large {:.2}",
            segments[0],
            rate[0],
            segments[1],
            rate[1],
            rate[0] / rate[1]
        );
    }
}

/// Makes a shard with one record in each segment.
fn tiny_segments(world: &World, count: u64) {
    let store = world.create();
    let logstore = store.create_logstore(&name("p/l"), spec(Compression::Lz4)).unwrap();
    for n in 0..count {
        world.clock.advance(millis(1));
        logstore.append(record(&n.to_string()), &written()).unwrap();
        logstore.roll().unwrap();
    }
    drop(logstore);
    store.close().unwrap();
}

fn per_segment(took: Duration, count: u64) -> f64 {
    took.as_secs_f64() * 1e6 / count as f64
}

/// The CPU time of this thread so far.
fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

fn tiny() {
    let world = World::manual();
    tiny_segments(&world, TINY);
    let store = world.builder().open_read_only().unwrap();
    let logstore = store.logstore(&name("p/l")).unwrap();
    let best = |count| {
        let options = ReadOptions::default().max_groups(count);
        let round = |_| {
            let began = cpu_time();
            read(&logstore, &options);
            cpu_time() - began
        };
        (0..ROUNDS).map(round).min().unwrap()
    };
    let (half, whole) = (best(TINY / 2), best(TINY));
    println!(
        "a tiny segment: {:.1} us in {TINY}, twice the segments take {:.2} times the time",
        per_segment(whole, TINY),
        whole.as_secs_f64() / half.as_secs_f64()
    );
}

/// The descriptors of this process on files below `dir`.
fn descriptors(dir: &Path) -> usize {
    let all = std::fs::read_dir("/proc/self/fd").unwrap();
    all.filter(|fd| {
        let target = std::fs::read_link(fd.as_ref().unwrap().path());
        target.is_ok_and(|target| target.starts_with(dir))
    })
    .count()
}

fn many() {
    let count: u64 =
        std::env::var("ENVELOG_BENCH_SEGMENTS").map_or(100_000, |count| count.parse().unwrap());
    let world = World::manual();
    let began = Instant::now();
    tiny_segments(&world, count);
    println!("{count} segments, made in {:.1?}", began.elapsed());

    let began = Instant::now();
    let store = world.builder().open_read_only().unwrap();
    let logstore = store.logstore(&name("p/l")).unwrap();
    let opened = began.elapsed();
    let first = logstore.read(0, &ReadOptions::default()).unwrap().next().unwrap().unwrap();
    let first_read = began.elapsed();
    println!("    opened for reading in {opened:.1?}, the first record after {first_read:.1?}");

    let seek = |text: &str, from| {
        let began = Instant::now();
        let found = logstore.read(0, &ReadOptions::default().from(from)).unwrap().next();
        println!("    {text} found in {:.1?}", began.elapsed());
        assert_eq!(found.unwrap().unwrap().seq, count / 2);
    };
    seek("a sequence number in the middle", Position::Seq(count / 2));
    seek("a time in the middle", Position::Time(first.receive_time_us + 1_000 * (count / 2)));

    let began = Instant::now();
    assert_eq!(logstore.end_seq(0).unwrap(), count);
    println!("    the end of the shard found in {:.1?}", began.elapsed());

    let from_end = ReadOptions::default().from(Position::End);
    let mut follow = logstore.follow(0, &from_end).unwrap();
    assert_eq!(follow.try_next().unwrap(), None);
    let cpu = cpu_time();
    for _ in 0..LOOKS {
        assert_eq!(follow.try_next().unwrap(), None);
    }
    println!(
        "    a follower at the end looks for more in {:.3} ms of CPU time, {LOOKS} times",
        (cpu_time() - cpu).as_secs_f64() * 1000.0 / f64::from(LOOKS)
    );
    drop(follow);

    let (began, cpu) = (Instant::now(), cpu_time());
    let (mut records, mut most) = (0_u64, 0);
    for record in logstore.read(0, &ReadOptions::default()).unwrap() {
        record.unwrap();
        records += 1;
        if records.is_multiple_of(100) {
            most = most.max(descriptors(world.path()));
        }
    }
    let (took, cpu) = (began.elapsed(), cpu_time() - cpu);
    assert_eq!(records, count);
    println!(
        "    read in {took:.1?}, {:.1} us a segment, with {most} descriptors at most",
        per_segment(cpu, count)
    );
    drop((logstore, store));

    let began = Instant::now();
    let store = world.open();
    let logstore = store.logstore(&name("p/l")).unwrap();
    let opened = began.elapsed();
    logstore.append(record("one more"), &written()).unwrap();
    let appended = began.elapsed();
    println!("    opened for writing in {opened:.1?}, the first append after {appended:.1?}");

    // The catalogue proves the segments under an older data key, from the newest to the oldest.
    store.keys().rotate_data_key(&name("p/l")).unwrap();
    logstore.append(record("under another key"), &written()).unwrap();
    drop(logstore);
    store.close().unwrap();
    let store = world.builder().open_read_only().unwrap();
    let logstore = store.logstore(&name("p/l")).unwrap();
    let (began, cpu) = (Instant::now(), cpu_time());
    let mut reader = logstore.read(0, &ReadOptions::default()).unwrap();
    reader.next().unwrap().unwrap();
    let first_read = began.elapsed();
    assert_eq!(reader.map(Result::unwrap).count() as u64, count + 1);
    println!(
        "    after a rotation of the data key: the first record after {first_read:.1?}, {:.1} us a segment",
        per_segment(cpu_time() - cpu, count)
    );
}

fn main() {
    rates();
    tiny();
    many();
}
