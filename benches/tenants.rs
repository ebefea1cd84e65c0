//! A healthy tenant beside 500 hung master keys: `cargo bench --bench tenants`.
//!
//! A store has 1,000 Logstores, each under a master key of its own, and one more for the neighbour.
//! The KMS hangs for half of the keys: a call under one of them returns after five time limits.
//! Eight threads append to Logstores under hung keys. The benchmark alternates between hung and
//! healthy, five times each, and prints the medians of:
//!
//! 1. the 50th and the 99th percentile of the neighbour's appends, and their ratio to the same run
//!    without hung keys;
//! 2. the time from the refusal of a healthy key to the refusal of its appends, with the bound;
//! 3. threads and resident memory.
//!
//! With `--test`, as `cargo test --benches` runs it, all of it runs on a small scale, and the
//! figures mean nothing.

#![allow(clippy::unwrap_used)]

use std::{
    collections::HashMap,
    env, fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use envelog::{
    AppendOptions, Cmk, Durability, EncryptConf, EncryptType, Logstore, LogstoreSpec, Payload,
    Store, StoreOptions,
    crypto::{AwsLc, SecretKey},
    kms::{Kms, KmsCall, KmsError, RevokedReason},
};

const RUNS: usize = 5;

#[derive(Clone, Copy, PartialEq)]
enum State {
    Healthy,
    Hung,
    Refused,
}

/// A KMS in memory. It answers after a millisecond, and wraps a key by writing it down.
#[derive(Debug, Default)]
struct MemoryKms(Mutex<HashMap<String, StateOf>>);

#[derive(Debug, Default)]
struct StateOf {
    hung: bool,
    refused: bool,
}

impl MemoryKms {
    fn set(&self, key: &str, state: State) {
        let of = StateOf { hung: state == State::Hung, refused: state == State::Refused };
        self.0.lock().unwrap().insert(key.to_owned(), of);
    }

    fn answer(&self, call: &KmsCall<'_>) -> Result<(), KmsError> {
        let key = &call.cmk.cmk_key_id;
        let of = |states: &HashMap<String, StateOf>| {
            states.get(key).map_or((false, false), |of| (of.hung, of.refused))
        };
        let (hung, refused) = of(&self.0.lock().unwrap());
        thread::sleep(if hung { call.timeout * 5 } else { Duration::from_millis(1) });
        match refused {
            true => Err(KmsError::Revoked {
                reason: RevokedReason::Disabled,
                detail: "it is disabled".to_owned(),
            }),
            false => Ok(()),
        }
    }
}

impl Kms for MemoryKms {
    fn name(&self) -> &str {
        "memory"
    }

    fn serves(&self, _region_id: &str) -> bool {
        true
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        self.answer(call)?;
        Ok(key.expose().to_vec())
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        self.answer(call)?;
        let mut bytes = [0; 32];
        bytes.copy_from_slice(wrapped);
        Ok(SecretKey::from_bytes(&mut bytes))
    }
}

struct Scale {
    keys: usize,
    options: StoreOptions,
    /// How long each run lasts.
    run: Duration,
}

struct Figures {
    p50_us: f64,
    p99_us: f64,
    refused_after: Duration,
    threads: usize,
    resident_mib: usize,
}

fn status(field: &str) -> usize {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn put(logstore: &Logstore, durability: Durability) -> envelog::Result<()> {
    let payload = Payload::opaque(Bytes::from(vec![b'x'; 4 << 10])).unwrap();
    logstore.append(payload, &AppendOptions::default().durability(durability)).map(drop)
}

/// Appends to the neighbour for the length of a run. Meanwhile the KMS refuses the key of
/// `healthy`, and allows it again at the end.
fn run(
    scale: &Scale,
    kms: &MemoryKms,
    neighbour: &Logstore,
    healthy: (&str, &Logstore),
) -> Figures {
    let (mut took, mut threads) = (Vec::new(), 0);
    let began = Instant::now();
    let refused_after = thread::scope(|scope| {
        let refusal = scope.spawn(|| {
            put(healthy.1, Durability::Written).unwrap();
            thread::sleep(scale.run / 10);
            kms.set(healthy.0, State::Refused);
            let refused = Instant::now();
            while put(healthy.1, Durability::Written).is_ok() {
                thread::sleep(Duration::from_millis(1));
            }
            let after = refused.elapsed();
            kms.set(healthy.0, State::Healthy);
            after
        });
        while began.elapsed() < scale.run {
            let one = Instant::now();
            put(neighbour, Durability::Written).unwrap();
            took.push(one.elapsed());
            threads = threads.max(status("Threads:"));
        }
        refusal.join().unwrap()
    });
    healthy.1.revalidate_now().unwrap();
    took.sort_unstable();
    let percentile = |n: usize| took[took.len() * n / 100].as_secs_f64() * 1e6;
    Figures {
        p50_us: percentile(50),
        p99_us: percentile(99),
        refused_after,
        threads,
        resident_mib: status("VmRSS:") / 1024,
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let test = env::args().any(|argument| argument == "--test");
    let mut options = StoreOptions::default();
    options.revalidate_every = Duration::from_secs(if test { 1 } else { 5 });
    options.kms_timeout = Duration::from_millis(if test { 100 } else { 1000 });
    options.outage_grace = Duration::from_secs(24 * 3600);
    let scale = match test {
        true => Scale { keys: 20, options, run: Duration::from_secs(3) },
        false => Scale { keys: 1000, options, run: Duration::from_secs(15) },
    };
    let runs = if test { 1 } else { RUNS };

    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let kms = Arc::new(MemoryKms::default());
    let store = Store::builder(dir.path().join("store"), dir.path().join("keyring"), AwsLc::new())
        .kms(Arc::clone(&kms) as _)
        .options(scale.options)
        .create()
        .unwrap();
    let logstore = |name: &str| {
        let cmk = Cmk {
            cmk_key_id: name.to_owned(),
            arn: "role".to_owned(),
            region_id: "region".to_owned(),
        };
        let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::byok(EncryptType::Aes, cmk));
        let logstore = store.create_logstore(&format!("p/{name}").parse().unwrap(), spec).unwrap();
        put(&logstore, Durability::Written).unwrap();
        logstore
    };
    let names: Vec<_> = (0..scale.keys).map(|n| format!("key-{n}")).collect();
    let logstores: Vec<_> = names.iter().map(|name| logstore(name)).collect();
    let neighbour = logstore("neighbour");
    let (hung, healthy) = names.split_at(scale.keys / 2);
    let healthy = (&*healthy[0], &logstores[scale.keys / 2]);

    let mut figures: [Vec<Figures>; 2] = [Vec::new(), Vec::new()];
    for _ in 0..runs {
        for (kind, state) in [State::Healthy, State::Hung].into_iter().enumerate() {
            hung.iter().for_each(|name| kms.set(name, state));
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                for logstore in logstores.iter().take(8.min(hung.len())) {
                    let stop = &stop;
                    scope.spawn(move || {
                        while !stop.load(Ordering::Relaxed) {
                            let _ = put(logstore, Durability::Buffered);
                            thread::sleep(Duration::from_millis(20));
                        }
                    });
                }
                // The leases of the hung keys become due.
                thread::sleep(scale.options.revalidate_every);
                figures[kind].push(run(&scale, &kms, &neighbour, healthy));
                stop.store(true, Ordering::Relaxed);
                hung.iter().for_each(|name| kms.set(name, State::Healthy));
            });
        }
    }
    let of = |kind: usize, value: fn(&Figures) -> f64| median(figures[kind].iter().map(value));
    println!("{} master keys, half of them hung; medians of {runs} runs", scale.keys);
    for (what, value) in [
        ("neighbour's append, p50 (us)", (|f| f.p50_us) as fn(&Figures) -> f64),
        ("neighbour's append, p99 (us)", |f| f.p99_us),
        ("refused after (ms)", |f| f.refused_after.as_secs_f64() * 1e3),
        ("threads", |f| f.threads as f64),
        ("resident (MiB)", |f| f.resident_mib as f64),
    ] {
        let (healthy, hung) = (of(0, value), of(1, value));
        println!(
            "{what:32} healthy {healthy:10.1}   hung {hung:10.1}   ratio {:.2}",
            hung / healthy
        );
    }
    let bound = scale.options.revalidate_every + scale.options.kms_timeout;
    let worst = figures.iter().flatten().map(|figures| figures.refused_after).max().unwrap();
    println!("worst refusal after {worst:?}, bound {bound:?}");
}
