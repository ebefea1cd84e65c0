//! Shared helpers of the integration tests: a clock that the test advances, a KMS with configurable
//! answers, and a small setup around a store.

#![allow(dead_code, clippy::unwrap_used)]

pub(crate) mod catalogue;
pub(crate) mod counting;
pub(crate) mod disk;
pub(crate) mod failing;
pub(crate) mod file_fault;
pub(crate) mod hanging;
pub(crate) mod memory;
pub(crate) mod process;
pub(crate) mod sim;

#[allow(unused_imports)]
pub(crate) use catalogue::{copy_path, is_meta, meta_path, newest_meta, remove_both, write_both};
use std::{
    collections::BTreeMap,
    fs, io,
    os::{fd::BorrowedFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use bytes::Bytes;
#[cfg(feature = "aws-lc")]
pub(crate) use envelog::crypto::AwsLc as Provider;
/// The fast provider. The fuzz targets, which share this file, are built without AWS-LC, because
/// its C code takes minutes to compile.
#[cfg(not(feature = "aws-lc"))]
pub(crate) use envelog::crypto::Sm4Simd as Provider;
use envelog::{
    AppendOptions, Background, Cmk, Durability, EncryptConf, EncryptType, Error, LogGroup,
    Logstore, LogstoreName, LogstoreSpec, Payload, Position, ReadOptions, Reader, Record, Result,
    Store, StoreBuilder, StoreOptions,
    admin::RecoverReport,
    crypto::SecretKey,
    group::{Content, Log, LogTag},
    ids::LogstoreId,
    io::{
        Access, Clock, DirEntry, Disk, DiskFile, FileStat, Map, OpenMode, OsRandom, Owner, Random,
        RealDisk,
    },
    kms::{Kms, KmsCall, KmsError, LocalKms, RevokedReason},
};
use tempfile::TempDir;

pub(crate) const REGION: &str = "cn-hangzhou";
pub(crate) const ROLE: &str = "acs:ram::13234:role/logsource";
pub(crate) const DAY: Duration = Duration::from_secs(24 * 3600);

pub(crate) fn secs(count: u64) -> Duration {
    Duration::from_secs(count)
}

pub(crate) fn millis(count: u64) -> Duration {
    Duration::from_millis(count)
}

/// Runs this in another thread, and waits for it. A hook in the middle of an operation plays
/// another thread's part, and debug builds check the order in which a thread takes the locks of the
/// engine.
pub(crate) fn elsewhere<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|threads| {
        threads.spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

// ---- the clock ----

/// A clock that moves only on request.
#[derive(Debug)]
pub(crate) struct TestClock {
    wall_us: AtomicU64,
    uptime_us: AtomicU64,
}

impl TestClock {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            wall_us: AtomicU64::new(1_700_000_000_000_000),
            uptime_us: AtomicU64::new(1_000_000_000),
        })
    }

    /// A separate clock that shows the same time.
    pub(crate) fn fork(&self) -> Arc<Self> {
        let copy = |time: &AtomicU64| AtomicU64::new(time.load(Ordering::SeqCst));
        Arc::new(Self { wall_us: copy(&self.wall_us), uptime_us: copy(&self.uptime_us) })
    }

    /// Advances both the uptime and the wall clock.
    pub(crate) fn advance(&self, by: Duration) {
        let by = by.as_micros() as u64;
        self.wall_us.fetch_add(by, Ordering::SeqCst);
        self.uptime_us.fetch_add(by, Ordering::SeqCst);
    }

    /// Advances only the wall clock, as if an administrator set it or the machine was suspended
    /// without counting uptime.
    pub(crate) fn jump_wall(&self, forward: Duration) {
        self.wall_us.fetch_add(forward.as_micros() as u64, Ordering::SeqCst);
    }

    pub(crate) fn jump_wall_back(&self, back: Duration) {
        self.wall_us.fetch_sub(back.as_micros() as u64, Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn wall_us(&self) -> u64 {
        self.wall_us.load(Ordering::SeqCst)
    }

    fn uptime(&self) -> Duration {
        Duration::from_micros(self.uptime_us.load(Ordering::SeqCst))
    }
}

// ---- the KMS ----

/// The configurable answer of a [`TestKms`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The answer of the embedded KMS behind it.
    Real,
    Revoked(RevokedReason),
    Unreachable,
    Invalid,
    /// Success, with a key other than the wrapped one.
    WrongKey,
    /// No answer until the configuration changes, and then an error.
    Hang,
    /// No answer until the configuration changes, and then that answer.
    Late,
}

/// An action in the middle of a call to a [`TestKms`].
struct Interlude {
    /// The call is about one of these master keys.
    cmk_key_ids: Vec<String>,
    /// The number of such calls before it.
    after: u32,
    aside: Aside,
}

impl std::fmt::Debug for Interlude {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interlude")
    }
}

type Ended = Arc<Mutex<Option<thread::Result<()>>>>;

/// An action that plays another thread's part in the middle of an operation.
pub(crate) struct Aside {
    act: Box<dyn FnOnce() + Send>,
    ended: Ended,
}

/// The end of an [`Aside`].
pub(crate) struct During(Ended);

impl Aside {
    pub(crate) fn new(act: impl FnOnce() + Send + 'static) -> (Self, During) {
        let ended = Ended::default();
        (Self { act: Box::new(act), ended: Arc::clone(&ended) }, During(ended))
    }

    /// Runs the action in another thread, and waits for its end. Gives up after 20 s, so that a
    /// test fails if the action waits for the operation.
    pub(crate) fn run(self) {
        let Self { act, ended } = self;
        let (sender, receiver) = mpsc::channel::<()>();
        let actor = thread::spawn(move || {
            act();
            drop(sender);
        });
        let waited = receiver.recv_timeout(secs(20));
        if waited == Err(mpsc::RecvTimeoutError::Disconnected) {
            *ended.lock().unwrap() = Some(actor.join());
        }
    }
}

impl During {
    /// Whether the action ran to its end in the middle of the operation. Passes a panic of it on.
    pub(crate) fn has_ended(&self) -> bool {
        match self.0.lock().unwrap().take() {
            None => false,
            Some(Ok(())) => true,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
        }
    }
}

/// A test double in front of a [`LocalKms`]. It gives the configured answers and records its calls.
#[derive(Debug)]
pub(crate) struct TestKms {
    local: LocalKms,
    answer: Mutex<Answer>,
    /// The answer for calls about data keys. Calls about the lease's probe use `answer`.
    data_key_answer: Mutex<Option<Answer>>,
    /// The answer for calls about one master key.
    master_key_answer: Mutex<Option<(String, Answer)>>,
    /// The answer for calls about the envelopes of one Logstore.
    logstore_answer: Mutex<Option<(LogstoreId, Answer)>>,
    /// The answer for calls about the service keyring.
    service_answer: Mutex<Option<Answer>>,
    changed: Condvar,
    interlude: Mutex<Option<Interlude>>,
    /// Whether the next call fails.
    fails: AtomicBool,
    /// The number of calls about each master key.
    about: Mutex<BTreeMap<String, u64>>,
    wraps: AtomicU64,
    unwraps: AtomicU64,
    probes: AtomicU64,
    /// The versions of the service keyrings that were unwrapped.
    keyrings: Mutex<Vec<String>>,
    wrapped_keys: Mutex<Vec<[u8; 32]>>,
    /// Whether it hides the master key version that wrapped a key.
    pub(crate) hides_versions: AtomicBool,
}

impl TestKms {
    fn new(dir: &Path) -> Arc<Self> {
        Arc::new(Self {
            local: LocalKms::create_or_open(dir).unwrap(),
            answer: Mutex::new(Answer::Real),
            data_key_answer: Mutex::new(None),
            master_key_answer: Mutex::new(None),
            logstore_answer: Mutex::new(None),
            service_answer: Mutex::new(None),
            changed: Condvar::new(),
            interlude: Mutex::default(),
            fails: AtomicBool::new(false),
            about: Mutex::default(),
            wraps: AtomicU64::new(0),
            unwraps: AtomicU64::new(0),
            probes: AtomicU64::new(0),
            keyrings: Mutex::default(),
            wrapped_keys: Mutex::default(),
            hides_versions: AtomicBool::new(false),
        })
    }

    pub(crate) fn local(&self) -> &LocalKms {
        &self.local
    }

    /// Sets the answer of every call from now on.
    pub(crate) fn answer(&self, answer: Answer) {
        *self.answer.lock().unwrap() = answer;
        *self.data_key_answer.lock().unwrap() = None;
        *self.master_key_answer.lock().unwrap() = None;
        *self.logstore_answer.lock().unwrap() = None;
        *self.service_answer.lock().unwrap() = None;
        self.changed.notify_all();
    }

    /// Sets the answer of calls about data keys from now on. Lease renewals are not affected.
    pub(crate) fn answer_for_data_keys(&self, answer: Answer) {
        *self.data_key_answer.lock().unwrap() = Some(answer);
        self.changed.notify_all();
    }

    /// Sets the answer of calls about this master key from now on. Calls about others are not
    /// affected.
    pub(crate) fn answer_for_master_key(&self, cmk_key_id: &str, answer: Answer) {
        *self.master_key_answer.lock().unwrap() = Some((cmk_key_id.to_owned(), answer));
        self.changed.notify_all();
    }

    /// Sets the answer of calls about the envelopes of this Logstore from now on, as a key policy
    /// does that denies an encryption context.
    pub(crate) fn answer_for_logstore(&self, logstore: LogstoreId, answer: Answer) {
        *self.logstore_answer.lock().unwrap() = Some((logstore, answer));
        self.changed.notify_all();
    }

    /// Sets the answer of calls about the service keyring from now on.
    pub(crate) fn answer_for_service_key(&self, answer: Answer) {
        *self.service_answer.lock().unwrap() = Some(answer);
        self.changed.notify_all();
    }

    /// The versions of the service keyrings that it was asked to unwrap so far.
    pub(crate) fn keyrings(&self) -> Vec<String> {
        self.keyrings.lock().unwrap().clone()
    }

    /// Runs `act` in another thread in the middle of a call about one of these master keys: of the
    /// next one after `after` such calls. The KMS answers as configured when `act` has ended.
    pub(crate) fn during_call(
        &self,
        cmks: &[&Cmk],
        after: u32,
        act: impl FnOnce() + Send + 'static,
    ) -> During {
        let cmk_key_ids = cmks.iter().map(|cmk| cmk.cmk_key_id.clone()).collect();
        let (aside, during) = Aside::new(act);
        *self.interlude.lock().unwrap() = Some(Interlude { cmk_key_ids, after, aside });
        during
    }

    /// Forgets the action of [`TestKms::during_call`]. Returns whether it has not begun.
    pub(crate) fn has_not_called(&self) -> bool {
        self.interlude.lock().unwrap().take().is_some()
    }

    /// Takes the action of this call, if it has one.
    fn interlude(&self, call: &KmsCall<'_>) -> Option<Interlude> {
        let mut interlude = self.interlude.lock().unwrap();
        let planned = interlude.as_mut()?;
        if !planned.cmk_key_ids.contains(&call.cmk.cmk_key_id) {
            return None;
        }
        match planned.after.checked_sub(1) {
            Some(after) => {
                planned.after = after;
                None
            }
            None => interlude.take(),
        }
    }

    /// Makes one call fail: the call under way, or the next one.
    pub(crate) fn fail_once(&self) {
        self.fails.store(true, Ordering::SeqCst);
    }
    /// The number of calls so far.
    pub(crate) fn calls(&self) -> u64 {
        self.wraps.load(Ordering::SeqCst) + self.unwraps.load(Ordering::SeqCst)
    }

    /// The number of calls about a master key so far.
    pub(crate) fn calls_about(&self, cmk_key_id: &str) -> u64 {
        self.about.lock().unwrap().get(cmk_key_id).copied().unwrap_or_default()
    }

    /// The number of calls about a probe so far. These calls renew leases.
    pub(crate) fn probes(&self) -> u64 {
        self.probes.load(Ordering::SeqCst)
    }

    /// Every key that this KMS has wrapped.
    pub(crate) fn wrapped_keys(&self) -> Vec<[u8; 32]> {
        self.wrapped_keys.lock().unwrap().clone()
    }

    fn told(&self, call: &KmsCall<'_>) -> Answer {
        if let Some(answer) = *self.service_answer.lock().unwrap()
            && is_keyring(call)
        {
            return answer;
        }
        if let Some((cmk_key_id, answer)) = &*self.master_key_answer.lock().unwrap()
            && *cmk_key_id == call.cmk.cmk_key_id
        {
            return *answer;
        }
        if let Some((logstore, answer)) = &*self.logstore_answer.lock().unwrap()
            && call.context.get("envelog:logstore") == Some(&logstore.to_string())
        {
            return *answer;
        }
        if !is_probe(call)
            && let Some(answer) = *self.data_key_answer.lock().unwrap()
        {
            return answer;
        }
        *self.answer.lock().unwrap()
    }

    /// Blocks while the answer is `Hang`.
    fn decide(&self, call: &KmsCall<'_>) -> Result<Answer, KmsError> {
        *self.about.lock().unwrap().entry(call.cmk.cmk_key_id.clone()).or_default() += 1;
        if let Some(interlude) = self.interlude(call) {
            interlude.aside.run();
        }
        if self.fails.swap(false, Ordering::SeqCst) {
            return Err(KmsError::Unreachable { detail: "told to fail once".into() });
        }
        let hung = self.told(call) == Answer::Hang;
        while matches!(self.told(call), Answer::Hang | Answer::Late) {
            let answer = self.answer.lock().unwrap();
            drop(self.changed.wait_timeout(answer, millis(5)).unwrap());
        }
        match self.told(call) {
            _ if hung => Err(KmsError::Unreachable { detail: "it took too long".into() }),
            Answer::Revoked(reason) => {
                Err(KmsError::Revoked { reason, detail: "told to refuse".into() })
            }
            Answer::Unreachable => Err(KmsError::Unreachable { detail: "told to be away".into() }),
            Answer::Invalid => Err(KmsError::Invalid { detail: "told to talk nonsense".into() }),
            answer => Ok(answer),
        }
    }
}

fn is_probe(call: &KmsCall<'_>) -> bool {
    call.context.get("envelog:purpose").is_some_and(|purpose| purpose == "probe")
}

fn is_keyring(call: &KmsCall<'_>) -> bool {
    call.context.get("envelog:purpose").is_some_and(|purpose| purpose == "service-keyring")
}

impl Kms for TestKms {
    fn name(&self) -> &str {
        self.local.name()
    }

    fn serves(&self, region_id: &str) -> bool {
        self.local.serves(region_id)
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        self.wraps.fetch_add(1, Ordering::SeqCst);
        self.decide(call)?;
        self.wrapped_keys.lock().unwrap().push(*key.expose());
        self.local.wrap(call, key)
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        self.unwraps.fetch_add(1, Ordering::SeqCst);
        if is_probe(call) {
            self.probes.fetch_add(1, Ordering::SeqCst);
        }
        if is_keyring(call) {
            let version = call.context.get("envelog:key-version").unwrap().to_owned();
            self.keyrings.lock().unwrap().push(version);
        }
        match self.decide(call)? {
            Answer::WrongKey => Ok(SecretKey::from_bytes(&mut [0x5a; 32])),
            _ => self.local.unwrap(call, wrapped),
        }
    }

    fn cmk_version(&self, wrapped: &[u8]) -> Option<String> {
        if self.hides_versions.load(Ordering::SeqCst) {
            None
        } else {
            self.local.cmk_version(wrapped)
        }
    }
}

// ---- the disk, and randomness ----

/// The real file system without syncs: these tests have no power loss and should run quickly.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QuickDisk;

/// The same for a directory opened by `beneath`.
#[derive(Debug)]
pub(crate) struct QuickRoot(pub(crate) Arc<dyn Disk>);

#[derive(Debug)]
struct QuickFile(Arc<dyn DiskFile>);

/// Implements [`Disk`] without syncs. `$inner` maps `self` to the real disk.
macro_rules! quick_disk {
    ($disk:ty, $inner:expr) => {
        impl Disk for $disk {
            fn beneath(&self, dir: &Path, access: Access) -> io::Result<Arc<dyn Disk>> {
                Ok(Arc::new(QuickRoot($inner(self).beneath(dir, access)?)))
            }

            fn resolve(&self, path: &Path) -> io::Result<PathBuf> {
                $inner(self).resolve(path)
            }

            fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
                Ok(Arc::new(QuickFile($inner(self).open(path, mode)?)))
            }

            fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
                $inner(self).rename(from, to)
            }

            fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
                $inner(self).rename_new(from, to)
            }

            fn remove_file(&self, path: &Path) -> io::Result<()> {
                $inner(self).remove_file(path)
            }

            fn create_dir(&self, path: &Path) -> io::Result<()> {
                $inner(self).create_dir(path)
            }

            fn remove_dir(&self, path: &Path) -> io::Result<()> {
                $inner(self).remove_dir(path)
            }

            fn sync_dir(&self, _path: &Path) -> io::Result<()> {
                Ok(())
            }

            fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
                $inner(self).list_dir(path)
            }

            fn names_mark(&self, dir: &Path) -> io::Result<Option<u128>> {
                $inner(self).names_mark(dir)
            }

            fn stat(&self, path: &Path) -> io::Result<Option<FileStat>> {
                $inner(self).stat(path)
            }

            fn link(&self, file: &dyn DiskFile, path: &Path) -> io::Result<()> {
                $inner(self).link(file, path)
            }
        }
    };
}

quick_disk!(QuickDisk, |_| RealDisk);
quick_disk!(QuickRoot, |disk: &QuickRoot| Arc::clone(&disk.0));

impl DiskFile for QuickFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(buf, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn stat(&self) -> io::Result<FileStat> {
        self.0.stat()
    }

    fn set_owner(&self, owner: Owner) -> io::Result<()> {
        self.0.set_owner(owner)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn try_lock(&self) -> io::Result<bool> {
        self.0.try_lock()
    }

    fn map(&self) -> io::Result<Map> {
        self.0.map()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.0.descriptor()
    }

    fn clone_contents(&self, from: &dyn DiskFile) -> io::Result<()> {
        self.0.clone_contents(from)
    }
}

/// The operating system's random source. Records every draw of 32 bytes: keys and salts.
#[derive(Debug, Default)]
pub(crate) struct RecordingRandom(Mutex<Vec<[u8; 32]>>);

impl RecordingRandom {
    pub(crate) fn draws(&self) -> Vec<[u8; 32]> {
        self.0.lock().unwrap().clone()
    }
}

impl Random for RecordingRandom {
    fn fill(&self, buf: &mut [u8]) -> io::Result<()> {
        OsRandom.fill(buf)?;
        if let Ok(draw) = <[u8; 32]>::try_from(&*buf) {
            self.0.lock().unwrap().push(draw);
        }
        Ok(())
    }
}

// ---- the setup ----

/// A directory for a store, its keyring and a KMS; a clock; and the options to open the store with.
pub(crate) struct World {
    dir: TempDir,
    pub(crate) clock: Arc<TestClock>,
    pub(crate) kms: Arc<TestKms>,
    pub(crate) options: StoreOptions,
}

impl World {
    /// Without background threads: the test advances the clock and ticks the store.
    pub(crate) fn manual() -> Self {
        Self::with(Background::Manual, tempfile::tempdir().unwrap())
    }

    /// Like [`World::manual`], in a memory-backed file system if the machine has one: for tests
    /// that create many thousands of files.
    pub(crate) fn manual_in_memory() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        Self::with(Background::Manual, dir)
    }

    /// With background threads and real time.
    pub(crate) fn threads() -> Self {
        Self::with(Background::Threads, tempfile::tempdir().unwrap())
    }

    fn with(background: Background, dir: TempDir) -> Self {
        let kms = TestKms::new(&dir.path().join("kms"));
        let mut options = StoreOptions::default();
        options.background = background;
        Self { dir, clock: TestClock::new(), kms, options }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn store_dir(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub(crate) fn keyring(&self) -> PathBuf {
        self.dir.path().join("keyring")
    }

    pub(crate) fn local(&self) -> &LocalKms {
        self.kms.local()
    }

    pub(crate) fn builder(&self) -> StoreBuilder {
        self.builder_at(&self.store_dir())
    }

    /// The builder of a copy of the store in another directory, with the same keyring.
    pub(crate) fn builder_at(&self, dir: &Path) -> StoreBuilder {
        let builder = Store::builder(dir, self.keyring(), Provider::new())
            .kms(Arc::clone(&self.kms) as _)
            .disk(Arc::new(QuickDisk))
            .options(self.options);
        if self.options.background == Background::Manual {
            builder.clock(Arc::clone(&self.clock) as _)
        } else {
            builder
        }
    }

    pub(crate) fn create(&self) -> Store {
        self.builder().create().unwrap()
    }

    pub(crate) fn open(&self) -> Store {
        self.builder().open().unwrap()
    }

    /// Creates a master key that the service's role may use.
    pub(crate) fn cmk(&self) -> Cmk {
        let id = self.local().create_key(REGION, &[ROLE]).unwrap();
        Cmk { cmk_key_id: id, arn: ROLE.into(), region_id: REGION.into() }
    }

    /// Creates a Logstore under the service key.
    pub(crate) fn service(&self, store: &Store, text: &str) -> Logstore {
        let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::service_key(EncryptType::Aes));
        store.create_logstore(&name(text), spec).unwrap()
    }

    /// Creates a Logstore under a master key.
    pub(crate) fn byok(&self, store: &Store, text: &str, cmk: &Cmk) -> Logstore {
        let spec =
            LogstoreSpec::default().encrypt_conf(EncryptConf::byok(EncryptType::Aes, cmk.clone()));
        store.create_logstore(&name(text), spec).unwrap()
    }

    /// The directory of a Logstore.
    pub(crate) fn logstore_dir(&self, logstore: &Logstore) -> PathBuf {
        self.store_dir().join("logstores").join(logstore.id().to_string())
    }
}

/// Recovers a store without its keyring, expecting every key that its metadata names.
pub(crate) trait RecoverAll {
    fn recover_all(self) -> Result<(Store, RecoverReport)>;
}

impl RecoverAll for StoreBuilder {
    fn recover_all(self) -> Result<(Store, RecoverReport)> {
        let found = self.clone().recoverable()?;
        self.recover_without_keyring(
            &found.into_iter().filter_map(|one| Some((one.name, one.cmk?))).collect(),
        )
    }
}

pub(crate) fn name(text: &str) -> LogstoreName {
    text.parse().unwrap()
}

pub(crate) fn synced() -> AppendOptions {
    AppendOptions::default().durability(Durability::Synced)
}

pub(crate) fn written() -> AppendOptions {
    AppendOptions::default().durability(Durability::Written)
}

pub(crate) fn buffered() -> AppendOptions {
    AppendOptions::default().durability(Durability::Buffered)
}

pub(crate) fn record(text: &str) -> Payload {
    Payload::opaque(Bytes::copy_from_slice(text.as_bytes())).unwrap()
}

/// Incompressible text, the same for the same seed.
pub(crate) fn noise(seed: u64, len: usize) -> String {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut letter = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        char::from(b'0' + (state >> 57) as u8 % 75)
    };
    (0..len).map(|_| letter()).collect()
}

/// Appends a record, synced.
pub(crate) fn put(logstore: &Logstore, text: &str) {
    try_put(logstore, text).unwrap();
}

pub(crate) fn try_put(logstore: &Logstore, text: &str) -> Result<()> {
    logstore.append(record(text), &synced()).map(|_| ())
}

/// All records of a shard from `from` on.
pub(crate) fn records_from(logstore: &Logstore, shard: u32, from: Position) -> Result<Vec<Record>> {
    let reader = logstore.read(shard, &ReadOptions::default().from(from))?;
    reader.map(|record| record.map_err(damage)).collect()
}

/// The damage that a reader reports as a loss; any other error unchanged.
pub(crate) fn damage(error: Error) -> Error {
    match error {
        Error::Lost { cause, .. } => (*cause).clone(),
        error => error,
    }
}

pub(crate) fn records(logstore: &Logstore, shard: u32) -> Result<Vec<Record>> {
    records_from(logstore, shard, Position::Begin)
}

pub(crate) fn try_texts(logstore: &Logstore) -> Result<Vec<String>> {
    Ok(strings(&records(logstore, 0)?))
}

/// All records of shard 0, as text.
pub(crate) fn texts(logstore: &Logstore) -> Vec<String> {
    try_texts(logstore).unwrap()
}

/// The records up to the present end. A later call continues with those behind it.
pub(crate) fn so_far(reader: &mut Reader) -> impl Iterator<Item = Result<Record>> {
    std::iter::from_fn(|| reader.try_next().transpose())
}

pub(crate) fn strings(records: &[Record]) -> Vec<String> {
    records.iter().map(|record| String::from_utf8(record.bytes.to_vec()).unwrap()).collect()
}

/// A group of `logs` logs about `text`.
pub(crate) fn group(text: &str, logs: u32) -> LogGroup {
    let log = |n: u32| Log {
        time: 1_700_000_000 + n,
        contents: vec![
            Content::new("message", format!("{text} {n}")),
            Content::new("level", "info"),
        ],
        time_ns: None,
    };
    LogGroup {
        logs: (0..logs).map(log).collect(),
        topic: Some(Bytes::from_static(b"app")),
        source: Some(Bytes::from_static(b"10.0.0.1")),
        log_tags: vec![LogTag::new("host", "h1")],
        ..LogGroup::default()
    }
}

/// Whether the error reports a revoked key for this reason.
pub(crate) fn is_revoked(error: &Error, expected: RevokedReason) -> bool {
    matches!(error, Error::Revoked { reason, .. } if *reason == expected)
}

#[track_caller]
pub(crate) fn assert_revoked<T: std::fmt::Debug>(result: Result<T>, expected: RevokedReason) {
    match result {
        Err(error) if is_revoked(&error, expected) => {}
        other => panic!("expected a refusal ({expected}), got {other:?}"),
    }
}

/// Writes a file that only its owner may read, as a keyring requires.
pub(crate) fn write_private(path: &Path, bytes: impl AsRef<[u8]>) {
    fs::write(path, bytes).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

/// Every file below `dir`, with its contents.
pub(crate) fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                found.insert(path.clone(), fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// Copies a directory recursively, replacing `to`.
pub(crate) fn copy_dir(from: &Path, to: &Path) {
    if to.exists() {
        fs::remove_dir_all(to).unwrap();
    }
    fs::create_dir_all(to).unwrap();
    for (path, bytes) in files(from) {
        let target = to.join(path.strip_prefix(from).unwrap());
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        write_private(&target, &bytes);
    }
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.path().is_dir() {
            fs::create_dir_all(to.join(entry.file_name())).unwrap();
        }
    }
}

/// The segment files of a shard, oldest first.
pub(crate) fn segments(logstore_dir: &Path, shard: u32) -> Vec<PathBuf> {
    let dir = logstore_dir.join(format!("shard-{shard:04}"));
    files(&dir)
        .into_keys()
        .filter(|path| path.extension().is_some_and(|ext| ext == "seg"))
        .collect()
}

/// Ends the test run if a worker of a store panics: it may have held a shard, for which the test
/// would wait forever. In debug builds a worker panics if it calls a KMS.
pub(crate) fn end_if_a_worker_panics() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        if std::thread::current().name() == Some("envelog-worker") {
            std::process::abort();
        }
    }));
}

/// Waits in real time until `met` holds.
#[track_caller]
pub(crate) fn eventually(what: &str, mut met: impl FnMut() -> bool) {
    let began = std::time::Instant::now();
    while !met() {
        assert!(began.elapsed() < secs(20), "gave up waiting: {what}");
        std::thread::sleep(millis(10));
    }
}

/// Corrects the CRC32 at the end of a document or header.
pub(crate) fn fix_crc(bytes: &mut [u8]) {
    let at = bytes.len() - 4;
    let crc = crc32fast::hash(&bytes[..at]);
    bytes[at..].copy_from_slice(&crc.to_le_bytes());
}

/// The two JSON parts of an authenticated document: the part that only the keyring authenticates,
/// and the part that the data key authenticates too.
pub(crate) fn document_parts(bytes: &[u8]) -> (serde_json::Value, serde_json::Value) {
    const FIXED_LEN: usize = 80;
    let len = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let (a, b) = (len(FIXED_LEN - 8), len(FIXED_LEN - 4));
    let json = |bytes: &[u8]| {
        if bytes.is_empty() {
            serde_json::Value::Null
        } else {
            serde_json::from_slice(bytes).unwrap()
        }
    };
    (json(&bytes[FIXED_LEN..FIXED_LEN + a]), json(&bytes[FIXED_LEN + a..FIXED_LEN + a + b]))
}

/// The envelopes in a Logstore's metadata: version, keyring version, and the wrapped key (hex)
/// unless it was shredded.
pub(crate) fn envelopes(
    world: &World,
    logstore: &Logstore,
) -> Vec<(u64, Option<u64>, Option<String>)> {
    let (_, keys) = document_parts(&fs::read(meta_path(&world.logstore_dir(logstore))).unwrap());
    let envelope = |version: &serde_json::Value| {
        let wrapped = version["wrapped"].as_str().map(str::to_owned);
        (version["version"].as_u64().unwrap(), version["keyring_version"].as_u64(), wrapped)
    };
    keys["versions"].as_array().unwrap().iter().map(envelope).collect()
}
