//! What an append costs, in one run: `cargo bench --bench write_path`.
//!
//! For groups of 4 and 64 KiB, one and eight callers, every suite, buffered and synced appends, it
//! prints the rate (the final sync included), the latencies of synced appends, the CPU time of the
//! process for a gigabyte of logs, and for each append: allocations, blocks written, fsyncs,
//! context switches and page faults. `ENVELOG_BENCH_LOGS=DIR` takes the files of a directory as
//! logs. `ENVELOG_BENCH_SECONDS` sets the length of a run, and a filter such as `64k/1/aes` selects
//! rows.

#![allow(missing_docs, unsafe_code, clippy::unwrap_used, clippy::disallowed_methods)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use envelog::{
    AppendOptions, Compression, Durability, EncryptConf, EncryptType, Logstore, LogstoreSpec,
    Payload, Store,
    crypto::AwsLc,
    group::{Content, Log, LogGroup},
};
use rustix::time::{ClockId, clock_gettime};

/// Counts allocations.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `GlobalAlloc::dealloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A run appends at most this much, so that it does not fill the disk.
const RUN_BYTES_MAX: u64 = 1 << 30;
const SUITES: [(&str, Option<EncryptType>); 3] =
    [("none", None), ("aes", Some(EncryptType::Aes)), ("sm4", Some(EncryptType::Sm4))];

/// Lines of the files in `ENVELOG_BENCH_LOGS`, or lines that look like those of a web server.
fn lines() -> Vec<Vec<u8>> {
    let Some(dir) = std::env::var_os("ENVELOG_BENCH_LOGS") else {
        return (0..40_000_u64)
            .map(|n| {
                let draw = n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
                format!(
                    "10.0.{}.{} - - [24/Nov/2026:03:{:02}:{:02} +0000] \"GET /api/v1/orders/{} HTTP/1.1\" 200 {} {}ms",
                    draw % 256, draw / 256 % 256, n / 60 % 60, n % 60,
                    draw % 1_000_003, draw % 50_021, draw % 907,
                )
                .into_bytes()
            })
            .collect();
    };
    let mut files: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let read = |file| std::fs::read(file).unwrap();
    files
        .iter()
        .filter(|file| file.is_file())
        .flat_map(|file| {
            read(file).split(|&byte| byte == b'\n').map(<[u8]>::to_vec).collect::<Vec<_>>()
        })
        .collect()
}

/// Encoded groups of about this many bytes.
fn groups(bytes: usize) -> Vec<Payload> {
    let (mut groups, mut logs, mut size) = (Vec::new(), Vec::new(), 0);
    for line in lines() {
        size += line.len() + 20;
        let contents = vec![Content::new("content", Bytes::from(line))];
        logs.push(Log { time: 1_700_000_000, contents, time_ns: Some(0) });
        if size >= bytes {
            let group = LogGroup { logs: std::mem::take(&mut logs), ..LogGroup::default() };
            groups.push(Payload::try_from(&group).unwrap());
            size = 0;
        }
    }
    groups
}

/// What the process has used so far.
#[derive(Clone, Copy)]
struct Used {
    cpu: Duration,
    switches: u64,
    faults: u64,
    allocations: u64,
}

impl Used {
    fn now() -> Self {
        let cpu = clock_gettime(ClockId::ProcessCPUTime);
        let (mut switches, mut faults) = (0, 0);
        for task in std::fs::read_dir("/proc/self/task").unwrap() {
            let Ok(status) = std::fs::read_to_string(task.unwrap().path().join("status")) else {
                continue;
            };
            switches += status
                .lines()
                .filter(|line| line.contains("ctxt_switches"))
                .map(|line| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap())
                .sum::<u64>();
        }
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
        faults += fields[7].parse::<u64>().unwrap();
        Self {
            cpu: Duration::new(cpu.tv_sec as u64, cpu.tv_nsec as u32),
            switches,
            faults,
            allocations: ALLOCATIONS.load(Ordering::Relaxed),
        }
    }
}

struct Cell<'a> {
    groups: &'a [Payload],
    callers: usize,
    durability: Durability,
    seconds: f64,
}

impl Cell<'_> {
    /// Appends until the time is up. Returns the bytes and the latencies in microseconds.
    fn caller(&self, logstore: &Logstore, appended: &AtomicU64, from: usize) -> Vec<f64> {
        let options = AppendOptions::default().durability(self.durability);
        let (began, mut latencies) = (Instant::now(), Vec::new());
        for payload in self.groups.iter().cycle().skip(from) {
            let at = Instant::now();
            logstore.append(payload.clone(), &options).unwrap();
            latencies.push(at.elapsed().as_secs_f64() * 1e6);
            let so_far = appended.fetch_add(payload.len() as u64, Ordering::Relaxed);
            if began.elapsed().as_secs_f64() > self.seconds || so_far > RUN_BYTES_MAX {
                break;
            }
        }
        latencies
    }

    fn run(&self, store: &Store, logstore: &Logstore, what: &str) {
        let (before, metrics, used) = (Instant::now(), store.metrics(), Used::now());
        let appended = AtomicU64::new(0);
        let mut latencies: Vec<f64> = thread::scope(|scope| {
            let callers: Vec<_> = (0..self.callers)
                .map(|n| {
                    scope.spawn({
                        let appended = &appended;
                        move || self.caller(logstore, appended, n * 7)
                    })
                })
                .collect();
            callers.into_iter().flat_map(|caller| caller.join().unwrap()).collect()
        });
        logstore.sync().unwrap();
        let (took, after, spent) = (before.elapsed(), store.metrics(), Used::now());
        latencies.sort_by(f64::total_cmp);
        let (count, bytes) = (latencies.len() as f64, appended.into_inner() as f64);
        let per = |before: u64, after: u64| (after - before) as f64 / count;
        println!(
            "{what:24} {:7.0} {:8.1} {:8.1} {:7.2} {:8.2} {:8.4} {:8.2} {:8.2}",
            bytes / 1e6 / took.as_secs_f64(),
            latencies[latencies.len() / 2],
            latencies[latencies.len() * 99 / 100],
            (spent.cpu - used.cpu).as_secs_f64() / (bytes / 1e9),
            per(used.allocations, spent.allocations),
            per(metrics.syncs, after.syncs),
            per(used.switches, spent.switches),
            per(used.faults, spent.faults),
        );
    }
}

fn main() {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with('-')).unwrap_or_default();
    let seconds = std::env::var("ENVELOG_BENCH_SECONDS").map_or(1.0, |text| text.parse().unwrap());
    let place = std::env::var_os("ENVELOG_BENCH_DIR").unwrap_or_else(|| ".".into());
    let dir = tempfile::Builder::new().prefix(".bench-").tempdir_in(place).unwrap();
    let store = Store::builder(dir.path().join("store"), dir.path().join("keyring"), AwsLc::new())
        .create()
        .unwrap();
    println!(
        "{:24} {:>7} {:>8} {:>8} {:>7} {:>8} {:>8} {:>8} {:>8}",
        "groups/callers/suite",
        "MB/s",
        "p50 us",
        "p99 us",
        "s/GB",
        "allocs",
        "fsyncs",
        "switches",
        "faults"
    );
    for (size, bytes) in [("4k", 4 << 10), ("64k", 64 << 10)] {
        let groups = groups(bytes);
        for callers in [1, 8] {
            for (suite, encrypt) in SUITES {
                for compression in [Compression::Lz4, Compression::None] {
                    for durability in [Durability::Buffered, Durability::Synced] {
                        let how =
                            if durability == Durability::Synced { "synced" } else { "buffered" };
                        let what = format!("{size}/{callers}/{suite}/{compression}/{how}");
                        if !what.contains(&filter) {
                            continue;
                        }
                        let name = format!("bench/{suite}-{callers}-{size}-{compression}-{how}");
                        let spec = LogstoreSpec::default()
                            .compression(compression)
                            .encrypt_conf(encrypt.map(EncryptConf::service_key));
                        let logstore = store.create_logstore(&name.parse().unwrap(), spec).unwrap();
                        let cell = Cell { groups: &groups, callers, durability, seconds };
                        cell.run(&store, &logstore, &what);
                        drop(logstore);
                        store.delete_logstore(&name.parse().unwrap()).unwrap();
                    }
                }
            }
        }
    }
    store.close().unwrap();
}
