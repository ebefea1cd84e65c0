//! Appends beside a backup: `cargo bench --bench backup`.
//!
//! A store holds 2 GiB of records. Four threads append synced records of 16 KiB as fast as they can.
//! A second process backs the store up meanwhile, which copies every byte. The benchmark prints:
//!
//! 1. the 50th and the 99th percentile of the appends without a backup and beside it, and how fast
//!    the backup was;
//! 2. how much a second, incremental backup copied, beside the same load;
//! 3. the same for a first backup that shares sealed segments with the store.
//!
//! It then restores the last backup of each kind, and compares the restored store, record by record,
//! with the acknowledgements from before that backup began.
//!
//! `ENVELOG_BACKUP_BYTES` sets the size of the store, and `ENVELOG_BACKUP_DIR` the directory for it.
//! With `--test`, as `cargo test --benches` runs it, all of it runs on a small scale, and the
//! percentiles mean nothing.

#![allow(clippy::unwrap_used)]

use std::{
    env,
    path::Path,
    process::{Child, Command},
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use envelog::{
    AppendOptions, Durability, EncryptConf, EncryptType, Logstore, LogstoreSpec, Payload,
    ReadOptions, Record, ShardChoice, Store, StoreBuilder,
    admin::{BackupOptions, RestoreOptions, VerifyOptions},
    crypto::AwsLc,
};

const NAME: &str = "bench/l";
const SHARDS: u32 = 4;
const RECORD_BYTES: usize = 16 << 10;
/// Set in the process that makes the backup: the directories of store and backup, and how.
const CHILD: &str = "ENVELOG_BACKUP_CHILD";

fn builder(store: &Path) -> StoreBuilder {
    let keyring = store.parent().unwrap().join("keyring");
    Store::builder(store, keyring, AwsLc::new())
}

/// A record whose bytes follow from its shard and its count.
fn payload(shard: u32, count: u64) -> Payload {
    Payload::opaque(bytes_of(shard, count)).unwrap()
}

fn bytes_of(shard: u32, count: u64) -> Vec<u8> {
    let mut state = (count << 8 | u64::from(shard)).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(RECORD_BYTES);
    bytes.extend_from_slice(&count.to_le_bytes());
    while bytes.len() < RECORD_BYTES {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes
}

/// The load: one thread for each shard.
struct Load<'a> {
    logstore: &'a Logstore,
    /// By shard, the number of records, and the sequence number of the last one that is durable.
    durable: Vec<Mutex<(u64, u64)>>,
}

impl<'a> Load<'a> {
    fn new(logstore: &'a Logstore, bytes: u64) -> Self {
        let each = bytes / u64::from(SHARDS) / RECORD_BYTES as u64;
        let fill = |shard: u32| {
            let options = AppendOptions::default().shard(ShardChoice::Shard(shard));
            let options = options.durability(Durability::Written);
            let mut last = 0;
            for count in 0..each {
                last = logstore.append(payload(shard, count), &options).unwrap().seq;
            }
            Mutex::new((each, last))
        };
        let durable = (0..SHARDS).map(fill).collect();
        logstore.sync().unwrap();
        Self { logstore, durable }
    }

    fn durable(&self) -> Vec<(u64, u64)> {
        self.durable.iter().map(|one| *one.lock().unwrap()).collect()
    }

    /// Appends while `during` runs. Returns its result, and the latencies.
    fn beside<T>(&self, during: impl FnOnce() -> T) -> (T, Vec<Duration>) {
        let stop = AtomicBool::new(false);
        thread::scope(|threads| {
            let appending: Vec<_> = (0..SHARDS)
                .map(|shard| {
                    let stop = &stop;
                    threads.spawn(move || self.append(shard, stop))
                })
                .collect();
            let done = during();
            stop.store(true, Ordering::Relaxed);
            let mut all: Vec<_> =
                appending.into_iter().flat_map(|thread| thread.join().unwrap()).collect();
            all.sort_unstable();
            (done, all)
        })
    }

    fn append(&self, shard: u32, stop: &AtomicBool) -> Vec<Duration> {
        let options = AppendOptions::default().shard(ShardChoice::Shard(shard));
        let mut latencies = Vec::new();
        while !stop.load(Ordering::Relaxed) {
            let count = self.durable[shard as usize].lock().unwrap().0;
            let payload = payload(shard, count);
            let began = Instant::now();
            let appended = self.logstore.append(payload, &options).unwrap();
            latencies.push(began.elapsed());
            *self.durable[shard as usize].lock().unwrap() = (count + 1, appended.seq);
        }
        latencies
    }
}

fn percentile(sorted: &[Duration], percent: usize) -> f64 {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    sorted.get(at).map_or(0.0, |latency| latency.as_secs_f64() * 1e3)
}

fn print(what: &str, latencies: &[Duration]) {
    let (half, most) = (percentile(latencies, 50), percentile(latencies, 99));
    println!("{what:42} {:7} appends   p50 {half:7.2} ms   p99 {most:7.2} ms", latencies.len());
}

/// Starts the process that makes a backup.
fn start(store: &Path, to: &Path, copy: bool) -> Child {
    let how = format!("{}\n{}\n{copy}", store.display(), to.display());
    Command::new(env::current_exe().unwrap()).env(CHILD, how).spawn().unwrap()
}

/// The process that makes a backup.
fn child(how: &str) {
    let mut lines = how.lines();
    let mut next = || lines.next().unwrap();
    let (store, to, copy) = (next().to_owned(), next().to_owned(), next() == "true");
    let store = builder(Path::new(&store)).open_read_only().unwrap();
    let began = Instant::now();
    let options = BackupOptions::default().copy(copy);
    let report = store.admin().backup(to, &options, &mut |_| {}).unwrap();
    assert_eq!(report.faults, []);
    let (seconds, mib) = (began.elapsed().as_secs_f64(), |bytes: u64| bytes as f64 / 1048576.0);
    println!(
        "  backup: {:.1} MiB in {} segments; copied {:.1} MiB, shared {:.1} MiB, in {seconds:.1} s ({:.0} MiB/s)",
        mib(report.bytes),
        report.segments,
        mib(report.bytes_copied),
        mib(report.bytes_shared),
        mib(report.bytes_copied + report.bytes_shared) / seconds
    );
}

/// Makes a backup in a second process, beside the load. Returns the durable records from before.
fn back_up(load: &Load<'_>, store: &Path, to: &Path, copy: bool, what: &str) -> Vec<(u64, u64)> {
    let durable = load.durable();
    let (ended, latencies) = load.beside(|| start(store, to, copy).wait().unwrap());
    assert!(ended.success());
    print(what, &latencies);
    durable
}

/// Restores a backup, and compares the restored store with the acknowledgements.
fn restore(from: &Path, durable: &[(u64, u64)]) {
    let to = from.with_extension("restored");
    builder(&to).restore(from, &RestoreOptions::default(), &mut |_| {}).unwrap();
    let store = builder(&to).open().unwrap();
    let logstore = store.logstore(&NAME.parse().unwrap()).unwrap();
    let mut compared = 0;
    for (shard, &(count, last)) in (0..).zip(durable) {
        let mut reader = logstore.read(shard, &ReadOptions::default()).unwrap();
        let mut seen: Option<Record> = None;
        for expected in 0..count {
            let record = reader.next().unwrap().unwrap();
            assert!(record.bytes[..] == bytes_of(shard, expected)[..], "shard {shard}, {expected}");
            compared += 1;
            seen = Some(record);
        }
        assert_eq!(seen.unwrap().seq, last, "shard {shard}");
    }
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean(), "{:?}", report.faults);
    println!("  restored: {compared} records, as they were acknowledged before the backup began");
    store.close().unwrap();
    std::fs::remove_dir_all(to).unwrap();
}

fn main() {
    if let Ok(how) = env::var(CHILD) {
        return child(&how);
    }
    let is_test = env::args().any(|argument| argument == "--test");
    let default = if is_test { 24 << 20 } else { 2 << 30 };
    let bytes = env::var("ENVELOG_BACKUP_BYTES").map_or(default, |bytes| bytes.parse().unwrap());
    let parent = env::var_os("ENVELOG_BACKUP_DIR").map_or_else(env::temp_dir, Into::into);
    let dir = tempfile::tempdir_in(parent).unwrap();
    let path = dir.path().join("store");
    let store = builder(&path).create().unwrap();
    let spec = LogstoreSpec::default()
        .shard_count(SHARDS)
        .encrypt_conf(EncryptConf::service_key(EncryptType::Aes));
    let logstore = store.create_logstore(&NAME.parse().unwrap(), spec).unwrap();
    let load = Load::new(&logstore, bytes);
    let (_, latencies) = load.beside(|| {
        thread::sleep(if is_test { Duration::from_millis(200) } else { Duration::from_secs(10) });
    });
    print("without a backup", &latencies);
    let copied = dir.path().join("copied");
    back_up(&load, &path, &copied, true, "beside a backup that copies");
    let durable = back_up(&load, &path, &copied, true, "beside the second backup, incremental");
    restore(&copied, &durable);
    std::fs::remove_dir_all(&copied).unwrap();
    let shared = dir.path().join("shared");
    let durable = back_up(&load, &path, &shared, false, "beside a backup that shares segments");
    restore(&shared, &durable);
    drop(logstore);
    store.close().unwrap();
}
