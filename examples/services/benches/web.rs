//! The axum example under load: `cargo bench -p envelog-examples`.
//!
//! Prints, all from one run:
//!
//! 1. synced appends per second of 10,000 concurrent requests on two executor threads, with the
//!    50th and the 99th percentile, and of 64 blocking threads;
//! 2. the rate and the 99th percentile of a plain tenant on two executor threads, alone and beside
//!    16 connections to a Logstore whose KMS hangs;
//! 3. the processor time of 1,000 idle followers, the number of threads, and the time from an append
//!    to its follower.
//!
//! With `--test`, as `cargo test --benches` runs it, all of it runs on a small scale, and the
//! figures mean nothing.

#![allow(clippy::unwrap_used, missing_docs)]

use std::{
    env, fs,
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::Body,
    http::{Request, StatusCode},
};
use envelog::{
    AppendOptions, Cmk, EncryptConf, EncryptType, Logstore, LogstoreSpec, ReadOptions, Store,
    crypto::{AwsLc, SecretKey},
    kms::{Kms, KmsCall, KmsError},
};
use envelog_examples::{group_of, web::router};
use futures_util::StreamExt;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};
use tower::ServiceExt;

const LINES: &str = "GET /api/v1/orders/123456 200 5120 12ms\nGET /api/v1/orders/99 404 17 3ms\n";

/// A KMS in memory that hangs on request. It wraps a key by writing it down.
#[derive(Debug, Default)]
struct HangingKms {
    hangs: Mutex<bool>,
    changed: Condvar,
}

impl HangingKms {
    fn hang(&self, hangs: bool) {
        *self.hangs.lock().unwrap() = hangs;
        self.changed.notify_all();
    }
}

impl Kms for HangingKms {
    fn name(&self) -> &str {
        "hanging"
    }

    fn serves(&self, _region_id: &str) -> bool {
        true
    }

    fn wrap(&self, _call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        Ok(key.expose().to_vec())
    }

    fn unwrap(&self, _call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        let hangs = self.hangs.lock().unwrap();
        drop(self.changed.wait_while(hangs, |hangs| *hangs).unwrap());
        let mut key = <[u8; 32]>::try_from(wrapped).map_err(|_| KmsError::invalid("length"))?;
        Ok(SecretKey::from_bytes(&mut key))
    }
}

struct World {
    store: Store,
    kms: Arc<HangingKms>,
    dir: TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kms = Arc::new(HangingKms::default());
        let store = Self::builder(&dir, &kms).create().unwrap();
        Self { store, kms, dir }
    }

    fn builder(dir: &TempDir, kms: &Arc<HangingKms>) -> envelog::StoreBuilder {
        let (store, keyring) = (dir.path().join("store"), dir.path().join("keyring"));
        Store::builder(store, keyring, AwsLc::new()).kms(Arc::clone(kms) as _)
    }

    /// The store again, with no data key in memory.
    fn reopen(self) -> Self {
        let Self { store, kms, dir } = self;
        store.close().unwrap();
        let store = Self::builder(&dir, &kms).open().unwrap();
        Self { store, kms, dir }
    }

    fn create(&self, name: &str, conf: EncryptConf) -> Logstore {
        let spec = LogstoreSpec::default().encrypt_conf(conf);
        self.store.create_logstore(&name.parse().unwrap(), spec).unwrap()
    }
}

fn service_key() -> EncryptConf {
    EncryptConf::service_key(EncryptType::Aes)
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn threads() -> usize {
    fs::read_dir("/proc/self/task").map_or(0, Iterator::count)
}

/// The processor time of this process so far.
fn cpu() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
    let ticks = |at: usize| after.split_whitespace().nth(at).and_then(|it| it.parse::<u64>().ok());
    Duration::from_millis(10 * (ticks(11).unwrap_or(0) + ticks(12).unwrap_or(0)))
}

fn percentile(times: &mut [Duration], of_100: usize) -> Duration {
    times.sort_unstable();
    times.get(times.len() * of_100 / 100).copied().unwrap_or_default()
}

async fn post(service: Router, path: &'static str) -> StatusCode {
    let request = Request::post(path).body(Body::from(LINES)).unwrap();
    service.oneshot(request).await.unwrap().status()
}

/// Synced appends: 10,000 requests at once, and 64 threads.
fn concurrent(small: bool) {
    let (tasks, rounds, blocking) = if small { (100, 2, 4) } else { (10_000, 20, 64) };
    let world = World::new();
    let logstore = world.create("app/plain", service_key());
    let service = router(world.store.clone());
    let runtime = runtime();
    let before = threads();
    let (began, most_threads) = (Instant::now(), AtomicUsize::new(0));
    let mut times = runtime.block_on(async {
        let tasks: Vec<_> = (0..tasks)
            .map(|_| {
                let service = service.clone();
                tokio::spawn(async move {
                    let mut times = Vec::with_capacity(rounds);
                    for _ in 0..rounds {
                        let began = Instant::now();
                        assert_eq!(post(service.clone(), "/app/plain").await, StatusCode::OK);
                        times.push(began.elapsed());
                    }
                    times
                })
            })
            .collect();
        let mut times = Vec::new();
        for task in tasks {
            times.extend(task.await.unwrap());
            most_threads.fetch_max(threads(), Ordering::Relaxed);
        }
        times
    });
    let rate = times.len() as f64 / began.elapsed().as_secs_f64();
    let (p50, p99) = (percentile(&mut times, 50), percentile(&mut times, 99));
    let more = most_threads.into_inner().saturating_sub(before);
    println!(
        "{tasks} requests at once: {rate:.0} appends/s, p50 {p50:.1?}, p99 {p99:.1?}, {more} threads more"
    );
    let (began, per_thread) = (Instant::now(), if small { 20 } else { 2_000 });
    thread::scope(|threads| {
        for _ in 0..blocking {
            threads.spawn(|| {
                for _ in 0..per_thread {
                    let group = group_of(LINES.as_bytes(), 1);
                    logstore.append(&group, &AppendOptions::default()).unwrap();
                }
            });
        }
    });
    let of_threads = f64::from(blocking * per_thread) / began.elapsed().as_secs_f64();
    println!(
        "{blocking} threads: {of_threads:.0} appends/s; the requests have {:.2} x that",
        rate / of_threads
    );
}

/// A plain tenant, alone and beside connections to a Logstore whose KMS hangs.
fn beside_a_hung_kms(small: bool) {
    let world = World::new();
    world.create("app/plain", service_key());
    let cmk =
        Cmk { cmk_key_id: "key".to_owned(), arn: "role".to_owned(), region_id: "eu".to_owned() };
    world.create("app/hung", EncryptConf::byok(EncryptType::Aes, cmk));
    let world = world.reopen();
    let service = router(world.store.clone());
    let runtime = runtime();
    let seconds = Duration::from_secs_f64(if small { 0.1 } else { 3.0 });
    let measure = || {
        runtime.block_on(async {
            let tenants: Vec<_> = (0..16)
                .map(|_| {
                    let service = service.clone();
                    tokio::spawn(async move {
                        let (began, mut times) = (Instant::now(), Vec::new());
                        while began.elapsed() < seconds {
                            let began = Instant::now();
                            assert_eq!(post(service.clone(), "/app/plain").await, StatusCode::OK);
                            times.push(began.elapsed());
                        }
                        times
                    })
                })
                .collect();
            let mut times = Vec::new();
            for tenant in tenants {
                times.extend(tenant.await.unwrap());
            }
            (times.len() as f64 / seconds.as_secs_f64(), percentile(&mut times, 99))
        })
    };
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for _ in 0..if small { 1 } else { 3 } {
        alone.push(measure());
        world.kms.hang(true);
        let stop = Arc::new(AtomicBool::new(false));
        let hung: Vec<_> = (0..16)
            .map(|_| {
                let (service, stop) = (service.clone(), Arc::clone(&stop));
                runtime.spawn(async move {
                    while !stop.load(Ordering::Relaxed) {
                        let status = post(service.clone(), "/app/hung").await;
                        if status != StatusCode::OK {
                            tokio::time::sleep(Duration::from_millis(10)).await;
                        }
                    }
                })
            })
            .collect();
        beside.push(measure());
        stop.store(true, Ordering::Relaxed);
        world.kms.hang(false);
        runtime.block_on(async {
            for task in hung {
                task.await.unwrap();
            }
        });
    }
    let median = |runs: &mut Vec<(f64, Duration)>| {
        runs.sort_by(|a, b| a.0.total_cmp(&b.0));
        runs[runs.len() / 2]
    };
    let ((rate, p99), (rate_beside, p99_beside)) = (median(&mut alone), median(&mut beside));
    println!(
        "a plain tenant alone: {rate:.0} appends/s, p99 {p99:.1?}; beside 16 connections to a hung KMS: \
         {rate_beside:.0} ({:.2} x), p99 {p99_beside:.1?} ({:.2} x)",
        rate_beside / rate,
        p99_beside.as_secs_f64() / p99.as_secs_f64()
    );
}

/// Followers that wait, and the time to reach one.
fn followers(small: bool) {
    let (count, appends) = if small { (50, 10) } else { (1_000, 200) };
    let world = World::new();
    let logstore = world.create("app/plain", service_key());
    let quiet = world.create("app/quiet", service_key());
    logstore.append(group_of(LINES.as_bytes(), 1), &AppendOptions::default()).unwrap();
    let runtime = runtime();
    let before = threads();
    for _ in 0..count {
        let mut follow = quiet.follow(0, &ReadOptions::default()).unwrap().into_stream();
        runtime.spawn(async move { while follow.next().await.is_some() {} });
    }
    let idle = Duration::from_secs_f64(if small { 0.1 } else { 10.0 });
    thread::sleep(Duration::from_millis(200));
    let (cpu_before, more) = (cpu(), threads().saturating_sub(before));
    thread::sleep(idle);
    let of_core = (cpu() - cpu_before).as_secs_f64() / idle.as_secs_f64() * 100.0;
    println!("{count} idle followers: {of_core:.2} % of a core, {more} threads more");

    let (sender, received) = std::sync::mpsc::channel();
    let mut follow = logstore.follow(0, &ReadOptions::default()).unwrap().into_stream();
    runtime.spawn(async move {
        while follow.next().await.is_some() {
            if sender.send(Instant::now()).is_err() {
                return;
            }
        }
    });
    received.recv().unwrap();
    let mut times: Vec<Duration> = (0..appends)
        .map(|_| {
            let began = Instant::now();
            let options = AppendOptions::default().durability(envelog::Durability::Written);
            logstore.append(group_of(LINES.as_bytes(), 1), &options).unwrap();
            received.recv().unwrap() - began
        })
        .collect();
    let (p50, p99) = (percentile(&mut times, 50), percentile(&mut times, 99));
    println!("from the call of an append to its follower: p50 {p50:.0?}, p99 {p99:.0?}");
}

fn main() {
    let small = env::args().any(|arg| arg == "--test");
    concurrent(small);
    beside_a_hung_kms(small);
    followers(small);
}
