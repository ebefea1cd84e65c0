//! The cost of revocation for Logstores whose own key is valid: `cargo bench --bench revocation`.
//!
//! 1. The 99th percentile of an append with ten lease renewals a second, compared with one renewal
//!    an hour.
//! 2. The 99th percentile of an append to one Logstore while another one's master key is disabled
//!    and enabled, compared with an undisturbed store.
//! 3. With the feature `kms-aws`, the second measurement again, with moto in the place of AWS KMS
//!    and one renewal a second.
//! 4. The KMS calls for 10,000 Logstores under one master key.
//! 5. The loss of a master key with 1,000 Logstores, each of which is read and written: how long
//!    after the refusal the data keys and the keys for reading are wiped, and how long until every
//!    segment is sealed. On the disk of the temporary directory, and in memory.
//!
//! `cargo bench --bench revocation -- loss` measures the last one alone.
//!
//! Runs are interleaved, and medians of seven are compared. Unless stated otherwise, the KMS is the
//! embedded one, with 5 ms added to each call. The 10,000 Logstores are in memory if the machine
//! has a file system there, because creating them takes 100,000 syncs. With `--test`, as `cargo
//! test --benches` runs it, everything but moto runs on a small scale, and the figures mean
//! nothing.

#![allow(clippy::unwrap_used)]

use std::{
    env,
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
    crypto::{AeadKey, AwsLc, Cipher, CryptoError, CryptoProvider},
    kms::{Kms, KmsError, LocalKms, RevokedReason},
    testing::{Fault, FaultyKms},
};
use tempfile::TempDir;

#[cfg(feature = "kms-aws")]
#[path = "../tests/tools/moto.rs"]
mod moto;

const ROLE: &str = "acs:ram::1:role/log";
const REGION: &str = "cn-hangzhou";
const RUNS: usize = 7;

/// The KMS of the master keys.
enum Master {
    Local(Arc<LocalKms>),
    #[cfg(feature = "kms-aws")]
    Moto(moto::Moto),
}

impl Master {
    fn local(dir: &TempDir) -> Self {
        Self::Local(Arc::new(LocalKms::create_or_open(dir.path().join("kms")).unwrap()))
    }

    fn kms(&self) -> Arc<dyn Kms> {
        match self {
            Self::Local(kms) => {
                let slow = FaultyKms::new(Arc::clone(kms) as _);
                slow.plan(|_, _| Fault::delay(Duration::from_millis(5), Duration::ZERO));
                Arc::new(slow)
            }
            #[cfg(feature = "kms-aws")]
            Self::Moto(moto) => envelog::kms::from_url(&moto.url()).unwrap(),
        }
    }

    fn create_key(&self) -> Cmk {
        let (cmk_key_id, arn, region_id) = match self {
            Self::Local(kms) => (kms.create_key(REGION, &[ROLE]).unwrap(), ROLE, REGION),
            #[cfg(feature = "kms-aws")]
            Self::Moto(moto) => (moto.create_key(), moto::ROLE, moto::REGION),
        };
        Cmk { cmk_key_id, arn: arn.into(), region_id: region_id.into() }
    }

    fn set_enabled(&self, key: &Cmk, enabled: bool) {
        match (self, enabled) {
            (Self::Local(kms), true) => kms.enable(&key.cmk_key_id).unwrap(),
            (Self::Local(kms), false) => kms.disable(&key.cmk_key_id).unwrap(),
            #[cfg(feature = "kms-aws")]
            (Self::Moto(moto), true) => moto.enable(&key.cmk_key_id),
            #[cfg(feature = "kms-aws")]
            (Self::Moto(moto), false) => moto.disable(&key.cmk_key_id),
        }
    }
}

struct World {
    store: Store,
    master: Master,
    _dir: TempDir,
}

impl World {
    fn new(dir: TempDir, master: Master, revalidate_every: Duration) -> Self {
        let mut options = StoreOptions::default();
        options.revalidate_every = revalidate_every;
        options.outage_grace = revalidate_every.max(options.outage_grace);
        let store =
            Store::builder(dir.path().join("store"), dir.path().join("keyring"), AwsLc::new())
                .kms(master.kms())
                .options(options)
                .create()
                .unwrap();
        Self { store, master, _dir: dir }
    }

    fn local(dir: TempDir, revalidate_every: Duration) -> Self {
        let master = Master::local(&dir);
        Self::new(dir, master, revalidate_every)
    }

    fn logstore(&self, name: &str, cmk: &Cmk) -> Logstore {
        let spec =
            LogstoreSpec::default().encrypt_conf(EncryptConf::byok(EncryptType::Aes, cmk.clone()));
        self.store.create_logstore(&name.parse().unwrap(), spec).unwrap()
    }
}

/// The 99th percentile of appends of 4 KiB during `long`, in microseconds.
fn p99(logstore: &Logstore, long: Duration) -> f64 {
    let payload = Bytes::from(vec![b'x'; 4 << 10]);
    let options = AppendOptions::default().durability(Durability::Written);
    let mut took = Vec::new();
    let began = Instant::now();
    while began.elapsed() < long {
        let one = Instant::now();
        logstore.append(Payload::opaque(payload.clone()).unwrap(), &options).unwrap();
        took.push(one.elapsed());
    }
    took.sort_unstable();
    took[took.len() * 99 / 100].as_secs_f64() * 1e6
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Compares two variants in turn. Prints both and their ratio.
fn compare(what: &str, names: [&str; 2], runs: usize, mut run: impl FnMut(bool) -> f64) {
    let (mut plain, mut tried, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    for turn in 0..runs {
        // The first variant alternates.
        let (a, b) = if turn % 2 == 0 {
            let a = run(false);
            (a, run(true))
        } else {
            let b = run(true);
            (run(false), b)
        };
        plain.push(a);
        tried.push(b);
        ratios.push(b / a);
    }
    println!(
        "{what}: p99 {:.1} us {}, {:.1} us {}; ratio {:.3} (medians of {runs} interleaved runs)",
        median(plain),
        names[0],
        median(tried),
        names[1],
        median(ratios)
    );
}

fn renewal(runs: usize, long: Duration) {
    let [seldom, often] = [Duration::from_secs(3600), Duration::from_millis(100)].map(|every| {
        let world = World::local(tempfile::tempdir().unwrap(), every);
        let logstore = world.logstore("p/l", &world.master.create_key());
        (world, logstore)
    });
    compare(
        "an append",
        ["renewing once an hour", "renewing ten times a second"],
        runs,
        |renewing| p99(if renewing { &often.1 } else { &seldom.1 }, long),
    );
    println!(
        "  renewals: {} and {}",
        seldom.0.store.keys().renewal_calls(),
        often.0.store.keys().renewal_calls()
    );
}

fn neighbour(what: &str, world: &World, runs: usize, long: Duration) {
    let (victim, other) = (world.master.create_key(), world.master.create_key());
    let (revoked, measured) =
        (world.logstore("p/revoked", &victim), world.logstore("p/measured", &other));
    let refused = AtomicBool::new(false);
    compare(
        what,
        ["whose key is in order", "whose key is disabled and enabled"],
        runs,
        |revoking| {
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                // The other Logstore appends in both variants, so that its load is the same.
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let payload = Payload::opaque(Bytes::from_static(b"x")).unwrap();
                        if revoked
                            .append(
                                payload,
                                &AppendOptions::default().durability(Durability::Written),
                            )
                            .is_err()
                        {
                            refused.store(true, Ordering::Relaxed);
                        }
                        thread::sleep(Duration::from_millis(1));
                    }
                });
                scope.spawn(|| {
                    while revoking && !stop.load(Ordering::Relaxed) {
                        for enabled in [false, true] {
                            world.master.set_enabled(&victim, enabled);
                            thread::sleep(long / 4);
                        }
                    }
                });
                let p99 = p99(&measured, long);
                stop.store(true, Ordering::Relaxed);
                p99
            })
        },
    );
    assert!(refused.load(Ordering::Relaxed), "nothing was ever revoked");
}

fn crowd(logstores: usize, long: Duration) {
    let every = Duration::from_secs(1);
    let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let world = World::local(dir, every);
    let cmk = world.master.create_key();
    let all: Vec<_> = (0..logstores).map(|n| world.logstore(&format!("p/l{n}"), &cmk)).collect();
    for logstore in &all {
        // Each Logstore is in use.
        logstore.read(0, &envelog::ReadOptions::default()).unwrap();
    }
    let (before, began) = (world.store.keys().renewal_calls(), Instant::now());
    thread::sleep(long);
    let calls = world.store.keys().renewal_calls() - before;
    println!(
        "{logstores} Logstores under one master key, renewed every {every:?}: {calls} calls in {:.1} s",
        began.elapsed().as_secs_f64()
    );
    assert!(calls as f64 <= 2.0 * began.elapsed().as_secs_f64() + 1.0);
}

/// A provider that notes when each expanded key is wiped.
#[derive(Clone, Debug, Default)]
struct Wiped(Arc<Mutex<Vec<Instant>>>);

struct NotedKey(Box<dyn AeadKey>, Wiped);

impl CryptoProvider for Wiped {
    fn name(&self) -> &'static str {
        "wiped"
    }

    fn aead(&self, cipher: Cipher, key: &[u8]) -> Result<Box<dyn AeadKey>, CryptoError> {
        Ok(Box::new(NotedKey(AwsLc::new().aead(cipher, key)?, self.clone())))
    }
}

impl Drop for NotedKey {
    fn drop(&mut self) {
        self.1.0.lock().unwrap().push(Instant::now());
    }
}

impl AeadKey for NotedKey {
    fn seal(
        &self,
        nonce: &[u8; 12],
        aad: &[u8],
        in_out: &mut [u8],
    ) -> Result<[u8; 16], CryptoError> {
        self.0.seal(nonce, aad, in_out)
    }

    fn open(
        &self,
        nonce: &[u8; 12],
        aad: &[u8],
        sealed: &[u8],
        tag: &[u8; 16],
        out: &mut [u8],
    ) -> Result<(), CryptoError> {
        self.0.open(nonce, aad, sealed, tag, out)
    }
}

/// Revokes a master key with this many Logstores. Each has a data key, a key that it reads with, a
/// key that it writes with, and a group in its queue.
fn loss(place: &str, dir: TempDir, logstores: usize) {
    let kms = Arc::new(LocalKms::create_or_open(dir.path().join("kms")).unwrap());
    let cmk = Cmk {
        cmk_key_id: kms.create_key(REGION, &[ROLE]).unwrap(),
        arn: ROLE.into(),
        region_id: REGION.into(),
    };
    let faulty = Arc::new(FaultyKms::new(kms as _));
    let wiped = Wiped::default();
    let mut options = StoreOptions::default();
    options.revalidate_every = Duration::from_secs(3600);
    options.outage_grace = Duration::from_secs(3600);
    // The queues are to be full when the key is lost, and to be sealed all.
    options.linger = Duration::from_secs(10);
    options.kms_timeout = Duration::from_secs(60);
    let store = Store::builder(dir.path().join("store"), dir.path().join("keyring"), wiped.clone())
        .kms(Arc::clone(&faulty) as _)
        .options(options)
        .create()
        .unwrap();
    let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::byok(EncryptType::Aes, cmk));
    let append = |logstore: &Logstore, durability| {
        let payload = Payload::opaque(Bytes::from(vec![b'x'; 4 << 10])).unwrap();
        logstore.append(payload, &AppendOptions::default().durability(durability)).unwrap();
    };
    let all: Vec<_> = (0..logstores)
        .map(|n| {
            let name = format!("p/l{n}").parse().unwrap();
            let logstore = store.create_logstore(&name, spec.clone()).unwrap();
            append(&logstore, Durability::Written);
            logstore.roll().unwrap();
            append(&logstore, Durability::Written);
            let read = logstore.read(0, &envelog::ReadOptions::default()).unwrap();
            assert_eq!(read.map(Result::unwrap).count(), 2);
            logstore
        })
        .collect();
    all.iter().for_each(|logstore| append(logstore, Durability::Buffered));
    wiped.0.lock().unwrap().clear();
    let refused = Arc::new(Mutex::new(None));
    let at = Arc::clone(&refused);
    faulty.plan(move |_, _| {
        at.lock().unwrap().get_or_insert_with(Instant::now);
        let reason = RevokedReason::Disabled;
        Fault::error(KmsError::Revoked { reason, detail: "refused".into() })
    });
    let _ = all[0].revalidate_now();
    let refused = refused.lock().unwrap().unwrap();
    let times = wiped.0.lock().unwrap();
    // The keys for reading go first.
    assert_eq!(times.len(), 2 * logstores);
    let after = |place: usize| (times[place] - refused).as_secs_f64() * 1e3;
    println!(
        "the loss of a master key with {logstores} Logstores {place}: data keys wiped after {:.1} ms, all segments sealed after {:.0} ms, {} groups lost",
        after(logstores - 1),
        after(2 * logstores - 1),
        store.metrics().groups_lost
    );
}

/// AWS credentials come from the environment of the process. So this program starts itself again
/// with credentials.
#[cfg(feature = "kms-aws")]
fn with_moto() {
    const INSIDE: &str = "ENVELOG_BENCH_WITH_AWS_CREDENTIALS";
    if env::var_os(INSIDE).is_none() {
        let mut command = std::process::Command::new(env::current_exe().unwrap());
        moto::credentials(&mut command);
        assert!(command.env(INSIDE, "1").status().unwrap().success());
        return;
    }
    let master = Master::Moto(moto::Moto::start());
    let world = World::new(tempfile::tempdir().unwrap(), master, Duration::from_secs(1));
    neighbour(
        "an append beside another Logstore, both with moto",
        &world,
        RUNS,
        Duration::from_secs(8),
    );
    std::process::exit(0);
}

fn beside(runs: usize, long: Duration) {
    let world = World::local(tempfile::tempdir().unwrap(), Duration::from_millis(100));
    neighbour("an append beside another Logstore", &world, runs, long);
}

fn main() {
    if env::args().any(|arg| arg == "--test") {
        let long = Duration::from_millis(200);
        renewal(1, long);
        beside(1, long * 4);
        crowd(50, long);
        loss("on a disk", tempfile::tempdir().unwrap(), 50);
        return;
    }
    if env::args().any(|arg| arg == "loss") {
        return losses();
    }
    // First, because the process that this starts ends here.
    #[cfg(feature = "kms-aws")]
    with_moto();
    renewal(RUNS, Duration::from_secs(3));
    beside(RUNS, Duration::from_secs(3));
    crowd(10_000, Duration::from_secs(60));
    losses();
}

fn losses() {
    for _ in 0..3 {
        loss("on a disk", tempfile::tempdir().unwrap(), 1_000);
    }
    match tempfile::tempdir_in("/dev/shm") {
        Ok(dir) => loss("in memory", dir, 1_000),
        Err(error) => println!("no file system in memory: {error}"),
    }
}
