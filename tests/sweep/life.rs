//! A store in a simulated environment: the possible operations and faults, and the checks after
//! each.

use std::{
    collections::{BTreeMap, HashSet},
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use envelog::{
    AppendOptions, Background, Compression, Durability, EncryptConf, EncryptType, Error, ErrorKind,
    Logstore, LogstoreConfig, LogstoreSpec, Payload, Record, ShardChoice, Store, StoreBuilder,
    StoreOptions,
    admin::{Anchor, AnchorPlace, RepairOptions, ReplaceCmk, VerifyOptions},
    error::ConfigError,
    ids::StoreId,
    inspect::{BlockKind, SegmentHeader},
};
use memchr::memmem;

use super::{
    common::{
        TestClock,
        disk::{Dice, Fault, SimDisk, Survives, Verdict},
        elsewhere, group, millis, name, records, secs,
        sim::{Ledger, Recorded, SeededKms, SeededRandom, cmk},
    },
    model::{Item, Outcome, Range, Shelf, View, ensure},
};

/// The Logstores: AES under the service key in two shards; SM4 under a master key; one without
/// encryption at first; one that is deleted and created again.
pub(crate) const NAMES: [&str; 4] = ["p/aes", "p/sm4", "p/plain", "p/brief"];
pub(crate) const DIR: &str = "/world/store";
const KEYRING: &str = "/world/keys/keyring";

/// An operation or a fault.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    Open,
    Create(usize),
    /// Queues these appends one after the other, and then waits for them: waiting appends share a
    /// block.
    Append {
        to: usize,
        shard: usize,
        as_durable: Vec<Durability>,
        size: usize,
    },
    Read(usize),
    Sync(usize),
    Roll(usize),
    RotateDataKey(usize),
    Rewrap(usize),
    RotateServiceKey,
    /// Switches encryption on or off. In a Logstore without encryption, the first switch creates
    /// the first envelope.
    Toggle(usize),
    ReplaceCmk(usize),
    /// Splits the last readwrite shard in the middle.
    Split(usize),
    /// Merges the last two readwrite shards.
    Merge(usize),
    /// Runs retention once with the smallest possible limit.
    Retain(usize),
    TimeToLive(usize),
    Delete(usize),
    Checkpoint,
    /// Advances the time by this many milliseconds, and runs the background work that is due.
    Pass(u64),
    JumpWall(i64),
    Disable,
    Enable,
    KmsFails(u64),
    RandomFails,
    /// Makes the disk operation that many from now fail; if lasting, all later ones that can fail
    /// this way too.
    Fail(u64, Fault, bool),
    /// Ends all faults, and restarts everything that has stopped.
    Heal,
    /// Leaves this many pages and inodes free on the disk from now on.
    Fill(u64, u64),
    /// Frees space on the full disk, in one of four ways. No operation that does so may fail.
    Free(u64),
    /// Makes the disk larger. Everything that has stopped continues by itself.
    Grow,
    Shut,
    /// Closes the store and opens it again.
    Close,
    /// Removes `LOCK` and lets another writer take over the store, before that disk operation of an
    /// append and a roll.
    TakeOver {
        to: usize,
        shard: usize,
        nth: u64,
    },
    /// The writer that lost the store tries to continue.
    Fenced,
    /// Makes the anchor fail from now on: it refuses, or stores only a part of the data.
    AnchorFails {
        half: bool,
    },
    /// Replaces the store by an older copy, which its anchor must detect.
    PutBack,
    Kill,
    CutPower(Survives),
}

/// The faults since the store was opened.
#[derive(Clone, Copy, Debug, Default)]
struct Trouble {
    disk: bool,
    kms: bool,
    anchor: bool,
    taken_over: bool,
    /// Shards may still have the unclean end of an earlier process: only an append or a sync of the
    /// Logstore recovers them.
    left_open: bool,
}

/// An in-memory anchor.
#[derive(Clone, Debug, Default)]
struct LifeAnchor(Arc<Mutex<Kept>>);

#[derive(Clone, Debug, Default)]
struct Kept {
    bytes: Option<(AnchorPlace, Vec<u8>)>,
    /// Whether it fails, and whether it then stores half of the appended data.
    fails: Option<bool>,
}

impl LifeAnchor {
    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap()
    }

    fn fork(&self) -> Self {
        Self(Arc::new(Mutex::new(self.lock().clone())))
    }
}

impl Anchor for LifeAnchor {
    fn load(&self, _store: StoreId) -> io::Result<Option<(AnchorPlace, Vec<u8>)>> {
        let kept = self.lock();
        kept.fails.map_or_else(|| Ok(kept.bytes.clone()), |_| Err(io::ErrorKind::TimedOut.into()))
    }

    fn replace(&self, _store: StoreId, place: AnchorPlace, bytes: &[u8]) -> io::Result<()> {
        let mut kept = self.lock();
        if kept.fails.is_some() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        if kept.bytes.as_ref().is_some_and(|(there, _)| *there > place) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        kept.bytes = Some((place, bytes.to_vec()));
        Ok(())
    }

    fn append(
        &self,
        _store: StoreId,
        place: AnchorPlace,
        len: u64,
        bytes: &[u8],
    ) -> io::Result<()> {
        let mut kept = self.lock();
        let fails = kept.fails;
        let there =
            kept.bytes.as_mut().filter(|(at, there)| *at == place && there.len() as u64 == len);
        let (_, there) = there.ok_or(io::ErrorKind::InvalidInput)?;
        match fails {
            None => there.extend_from_slice(bytes),
            Some(half) => {
                there.extend_from_slice(&bytes[..if half { bytes.len() / 2 } else { 0 }]);
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        Ok(())
    }
}

pub(crate) type Shelves = BTreeMap<&'static str, Shelf>;

pub(crate) struct Life {
    pub(crate) disk: SimDisk,
    pub(crate) clock: Arc<TestClock>,
    pub(crate) ledger: Arc<Ledger>,
    kms: Arc<SeededKms>,
    random: Arc<SeededRandom>,
    seed: u64,
    openings: u64,
    store: Option<Store>,
    /// The writer that another writer has taken over from, and that has not noticed it.
    fenced: Option<Store>,
    anchor: LifeAnchor,
    shelves: Arc<Mutex<Shelves>>,
    appended: u64,
    trouble: Trouble,
}

/// A saved state from which several lives can continue.
pub(crate) struct Moment {
    clock: Arc<TestClock>,
    ledger: Arc<Ledger>,
    kms: Arc<SeededKms>,
    anchor: LifeAnchor,
    shelves: Arc<Mutex<Shelves>>,
    appended: u64,
}

impl Moment {
    /// A life that continues from this state with its own disk, as the next process. All randomness
    /// comes from `seed`.
    pub(crate) fn branch(&self, disk: SimDisk, seed: u64) -> Life {
        let ledger = self.ledger.fork();
        Life {
            disk,
            clock: self.clock.fork(),
            kms: self.kms.fork(seed, &ledger),
            random: SeededRandom::new(seed, 0),
            ledger,
            seed,
            openings: 0,
            store: None,
            fenced: None,
            anchor: self.anchor.fork(),
            shelves: Arc::new(Mutex::new(self.shelves.lock().unwrap().clone())),
            appended: self.appended + 1_000_000,
            trouble: Trouble::default(),
        }
    }

    /// A frozen copy of the state, to branch from later.
    pub(crate) fn freeze(&self) -> Self {
        Self {
            clock: self.clock.fork(),
            ledger: Arc::clone(&self.ledger),
            kms: Arc::clone(&self.kms),
            anchor: self.anchor.fork(),
            shelves: Arc::new(Mutex::new(self.shelves.lock().unwrap().clone())),
            appended: self.appended,
        }
    }
}

fn conf(n: usize) -> Option<EncryptConf> {
    match n {
        0 => Some(EncryptConf::service_key(EncryptType::Aes)),
        1 => Some(EncryptConf::byok(EncryptType::Sm4, cmk(0))),
        2 => None,
        _ => Some(EncryptConf::service_key(EncryptType::Sm4)),
    }
}

fn shards(n: usize) -> usize {
    if n == 0 { 2 } else { 1 }
}

/// The numbers of the readwrite shards.
fn writable(config: &LogstoreConfig) -> Vec<usize> {
    let ranges = Range::of(config);
    (0..ranges.len()).filter(|&id| ranges[id].is_writable).collect()
}

fn options() -> StoreOptions {
    let mut options = StoreOptions::default();
    options.background = Background::Manual;
    options.block_bytes = 4 << 10;
    options.segment_bytes = 4 << 10;
    options.audit_file_bytes = 4 << 10;
    options
}

impl Life {
    /// A new, empty store.
    pub(crate) fn new(seed: u64) -> Self {
        let disk = SimDisk::new(Path::new(KEYRING).parent().unwrap());
        let ledger = Arc::<Ledger>::default();
        let mut life = Self {
            disk,
            clock: TestClock::new(),
            kms: SeededKms::new(seed, &ledger),
            random: SeededRandom::new(seed, 0),
            ledger,
            seed,
            openings: 0,
            store: None,
            fenced: None,
            anchor: LifeAnchor::default(),
            shelves: Arc::default(),
            appended: 0,
            trouble: Trouble::default(),
        };
        life.store = Some(life.builder().create().unwrap());
        let view = |n| View {
            encrypt_conf: conf(n),
            ttl_days: None,
            retention_bytes: None,
            key_versions: conf(n).iter().count(),
            shards: Range::divide(shards(n)),
        };
        *life.shelves() =
            (0..NAMES.len()).map(|n| (NAMES[n], Shelf::absent(view(n), shards(n)))).collect();
        life
    }

    pub(crate) fn moment(&self) -> Moment {
        Moment {
            clock: Arc::clone(&self.clock),
            ledger: Arc::clone(&self.ledger),
            kms: Arc::clone(&self.kms),
            anchor: self.anchor.clone(),
            shelves: Arc::clone(&self.shelves),
            appended: self.appended,
        }
    }

    fn shelves(&self) -> MutexGuard<'_, Shelves> {
        self.shelves.lock().unwrap()
    }

    fn builder(&mut self) -> StoreBuilder {
        self.openings += 1;
        self.random = SeededRandom::new(self.seed, self.openings);
        Store::builder(DIR, KEYRING, Recorded(Arc::clone(&self.ledger)))
            .kms(Arc::clone(&self.kms) as _)
            .disk(Arc::new(self.disk.clone()))
            .clock(Arc::clone(&self.clock) as _)
            .insecure_random_for_tests(Arc::clone(&self.random) as _)
            .anchor(Arc::new(self.anchor.clone()))
            .options(options())
    }

    /// Checks that an error is explained by the injected faults. A failing disk must never be
    /// reported as damage.
    fn excused(&self, what: &str, error: &Error) -> Outcome {
        let excused = match error.kind() {
            ErrorKind::Io | ErrorKind::NoRoom | ErrorKind::Busy => {
                self.trouble.disk || self.trouble.taken_over
            }
            ErrorKind::Unavailable => match error {
                // Updating the anchor reads the catalogue file.
                Error::Anchor { .. } => self.trouble.anchor || self.trouble.disk,
                _ => self.trouble.taken_over,
            },
            ErrorKind::Revoked | ErrorKind::KmsUnreachable => self.trouble.kms,
            ErrorKind::Invalid => {
                self.trouble.kms && matches!(error, Error::Config(ConfigError::CmkRefused { .. }))
            }
            _ => false,
        };
        ensure!(excused, "{what}: {error}");
        Ok(())
    }

    /// The Logstore, if it exists.
    fn handle(&mut self, n: usize) -> Outcome<Option<Logstore>> {
        let Some(store) = &self.store else { return Ok(None) };
        match store.logstore(&name(NAMES[n])) {
            Ok(logstore) => Ok(Some(logstore)),
            Err(Error::LogstoreMissing(_)) => {
                ensure!(self.shelves()[NAMES[n]].may_be[1], "{} is missing", NAMES[n]);
                Ok(None)
            }
            Err(error) => self.excused("to find a Logstore", &error).map(|()| None),
        }
    }

    fn payload(
        &mut self,
        n: usize,
        durability: Durability,
        size: usize,
    ) -> (Payload, BlockKind, Bytes) {
        self.appended += 1;
        let mut dice = Dice::new(self.seed, self.appended);
        let filler: String = (0..size).map(|_| char::from(b'a' + dice.roll(26) as u8)).collect();
        // Data that is still buffered when encryption is switched off is written unencrypted.
        let secret = self.shelves()[NAMES[n]].encrypts() && durability > Durability::Buffered;
        let text = format!("{} {} {filler}", self.appended, if secret { CANARY } else { "plain" });
        if self.appended.is_multiple_of(4) {
            let bytes = group(&text, 2).encode_to_bytes();
            return (Payload::encoded(bytes.clone()).unwrap(), BlockKind::Groups, bytes);
        }
        let bytes = Bytes::from(text);
        (Payload::opaque(bytes.clone()).unwrap(), BlockKind::Opaque, bytes)
    }

    fn append(
        &mut self,
        n: usize,
        shard: usize,
        as_durable: &[Durability],
        size: usize,
    ) -> Outcome {
        let Some(logstore) = self.handle(n)? else { return Ok(()) };
        let writable = writable(&logstore.config());
        let shard =
            if writable.contains(&shard) { shard } else { writable[shard % writable.len()] };
        let mut tickets = Vec::new();
        for &durability in as_durable {
            let (payload, kind, bytes) = self.payload(n, durability, size);
            let options = AppendOptions::default()
                .shard(ShardChoice::Shard(shard as u32))
                .durability(durability);
            let index = {
                let mut shelves = self.shelves();
                let items = &mut shelves.get_mut(NAMES[n]).unwrap().shards[shard].items;
                items.push(Item { bytes, kind, seq: None, acked: None });
                items.len() - 1
            };
            match logstore.submit(payload, &options) {
                Ok(ticket) => {
                    let mut shelves = self.shelves();
                    let place = &mut shelves.get_mut(NAMES[n]).unwrap().shards[shard];
                    let seq = ticket.appended().unwrap().seq;
                    place.use_seq(seq)?;
                    place.items[index].seq = Some(seq);
                    place.items[index].acked =
                        Some(durability).filter(|durability| *durability == Durability::Buffered);
                    tickets.push((index, durability, ticket));
                }
                Err(error) => self.failed(n, shard, &error)?,
            }
        }
        for (index, durability, ticket) in tickets {
            match ticket.wait() {
                Ok(_) => {
                    let mut shelves = self.shelves();
                    let place = &mut shelves.get_mut(NAMES[n]).unwrap().shards[shard];
                    place.items[index].acked = Some(durability);
                    // All records before it are at least as durable.
                    place.items[..index]
                        .iter_mut()
                        .for_each(|item| item.acked = item.acked.map(|a| a.max(durability)));
                }
                Err(error) => self.failed(n, shard, &error)?,
            }
        }
        Ok(())
    }

    /// Handles a failed append: if the writer has stopped, the buffered records are lost.
    fn failed(&mut self, n: usize, shard: usize, error: &Error) -> Outcome {
        self.excused("to append", error)?;
        if matches!(error.kind(), ErrorKind::Io | ErrorKind::NoRoom | ErrorKind::Unavailable) {
            self.shelves().get_mut(NAMES[n]).unwrap().shards[shard].give_up_buffered();
        }
        Ok(())
    }

    /// Handles a failed operation on a Logstore: if a writer has stopped, the failure is reported
    /// once, and the buffered records are lost.
    fn stopped(&self, n: usize, what: &str, error: &Error) -> Outcome {
        self.excused(what, error)?;
        let mut shelves = self.shelves();
        let shards = &mut shelves.get_mut(NAMES[n]).unwrap().shards;
        shards.iter_mut().for_each(|shard| shard.give_up_buffered());
        Ok(())
    }

    /// Marks everything acknowledged in a Logstore as durable.
    fn durable(&self, n: usize) {
        for shard in &mut self.shelves().get_mut(NAMES[n]).unwrap().shards {
            shard.raise(Durability::Synced);
        }
    }

    /// Changes a Logstore, which afterwards is in its old or new state.
    fn change<T>(
        &mut self,
        n: usize,
        change: impl Fn(&mut View),
        operation: impl FnOnce(&Store) -> envelog::Result<T>,
    ) -> Outcome {
        if self.handle(n)?.is_none() {
            return Ok(());
        }
        let changed = |view: &View| {
            let mut view = view.clone();
            change(&mut view);
            view
        };
        let old = self.shelves()[NAMES[n]].views.clone();
        let new: Vec<View> = old.iter().map(changed).collect();
        self.shelves().get_mut(NAMES[n]).unwrap().may_become(&new);
        let done = operation(self.store.as_ref().unwrap());
        let mut shelves = self.shelves();
        let shelf = shelves.get_mut(NAMES[n]).unwrap();
        match done {
            Ok(_) => {
                shelf.current = changed(&shelf.current);
                shelf.views = new;
                Ok(())
            }
            Err(error) => {
                if !matches!(error.kind(), ErrorKind::Io | ErrorKind::NoRoom) {
                    // A refused change has no effect.
                    shelf.views = old;
                }
                drop(shelves);
                self.excused("to change a Logstore", &error)
            }
        }
    }

    fn update(&mut self, n: usize, change: impl Fn(&mut View)) -> Outcome {
        let applied = |store: &Store| {
            let config = store.logstore(&name(NAMES[n]))?.config();
            let mut view = View {
                encrypt_conf: config.encrypt_conf.clone(),
                ttl_days: config.ttl_days,
                retention_bytes: config.retention_bytes,
                key_versions: 0,
                shards: Vec::new(),
            };
            change(&mut view);
            let View { encrypt_conf, ttl_days, retention_bytes, .. } = view;
            store.update_logstore(
                &name(NAMES[n]),
                config
                    .encrypt_conf(encrypt_conf)
                    .ttl_days(ttl_days)
                    .retention_bytes(retention_bytes),
            )
        };
        self.change(
            n,
            |view| {
                change(view);
                if view.encrypts() {
                    view.key_versions = view.key_versions.max(1);
                }
            },
            applied,
        )
    }

    /// Splits the last readwrite shard, or merges the last two by their ranges. What they had
    /// accepted is durable then.
    fn reshard(&mut self, n: usize, splits: bool) -> Outcome {
        let Some(logstore) = self.handle(n)? else { return Ok(()) };
        let config = logstore.config();
        let mut ids = writable(&config);
        ids.sort_by_key(|&id| Range::of(&config)[id].begin);
        let wanted = if splits { 1 } else { 2 };
        if ids.len() < wanted || config.shards.len() >= SHARDS_ENOUGH {
            return Ok(());
        }
        let first = ids[ids.len() - wanted];
        let text = name(NAMES[n]);
        self.change(
            n,
            |view| match splits {
                true => view.split(first),
                false => view.merge(first),
            },
            |store| match splits {
                true => store.split_shard(&text, first as u32, None).map(|_| ()),
                false => store.merge_shards(&text, first as u32).map(|_| ()),
            },
        )?;
        let now = logstore.config();
        for &parent in &ids[ids.len() - wanted..] {
            if !writable(&now).contains(&parent) {
                self.shelves().get_mut(NAMES[n]).unwrap().shards[parent].raise(Durability::Synced);
            } else {
                // Its segment may not be sealed, and the queue may have failed.
                self.shelves().get_mut(NAMES[n]).unwrap().shards[parent].give_up_buffered();
            }
        }
        Ok(())
    }

    fn retain(&mut self, n: usize) -> Outcome {
        if self.handle(n)?.is_none() {
            return Ok(());
        }
        self.shelves().get_mut(NAMES[n]).unwrap().allow_dropping();
        self.update(n, |view| view.retention_bytes = Some(1))?;
        if let Some(Err(error)) = self.store.as_ref().map(|store| store.admin().apply_retention()) {
            self.excused("retention", &error)?;
        }
        self.update(n, |view| view.retention_bytes = None)
    }

    fn create(&mut self, n: usize) -> Outcome {
        let Some(store) = self.store.clone() else { return Ok(()) };
        match store.logstore(&name(NAMES[n])) {
            Err(Error::LogstoreMissing(_)) => {}
            found => {
                return found.map(drop).or_else(|error| self.excused("to find a Logstore", &error));
            }
        }
        let conf = conf(n);
        let view = View {
            key_versions: conf.iter().count(),
            encrypt_conf: conf.clone(),
            ttl_days: None,
            retention_bytes: None,
            shards: Range::divide(shards(n)),
        };
        self.shelves()
            .insert(NAMES[n], Shelf { may_be: [true, true], ..Shelf::absent(view, shards(n)) });
        let compression = if n == 1 { Compression::None } else { Compression::Lz4 };
        let spec = LogstoreSpec::default()
            .shard_count(shards(n) as u32)
            .compression(compression)
            .encrypt_conf(conf);
        match store.create_logstore(&name(NAMES[n]), spec) {
            Ok(_) => {
                self.shelves().get_mut(NAMES[n]).unwrap().may_be = [true, false];
                Ok(())
            }
            Err(error) => self.excused("to create a Logstore", &error),
        }
    }

    fn delete(&mut self, n: usize) -> Outcome {
        if self.handle(n)?.is_none() {
            return Ok(());
        }
        self.shelves().get_mut(NAMES[n]).unwrap().may_be[1] = true;
        match self.store.as_ref().unwrap().delete_logstore(&name(NAMES[n])) {
            Ok(_) => {
                self.shelves().get_mut(NAMES[n]).unwrap().may_be = [false, true];
                Ok(())
            }
            Err(error) => self.excused("to delete a Logstore", &error),
        }
    }

    fn read(&mut self, n: usize) -> Outcome {
        let Some(logstore) = self.handle(n)? else { return Ok(()) };
        for shard in 0..logstore.config().shards.len() {
            match records(&logstore, shard as u32) {
                Ok(found) => {
                    self.settle(n, shard, &found, Durability::Written, Durability::Written)?
                }
                Err(error) => self.excused("to read", &error)?,
            }
        }
        Ok(())
    }

    fn settle(
        &self,
        n: usize,
        shard: usize,
        found: &[Record],
        survived: Durability,
        seen_stays: Durability,
    ) -> Outcome {
        let mut shelves = self.shelves();
        let place = &mut shelves.get_mut(NAMES[n]).unwrap().shards[shard];
        // While the process runs, buffered records are not visible yet, but not lost.
        let buffered: Vec<bool> =
            place.items.iter().map(|item| item.acked == Some(Durability::Buffered)).collect();
        place
            .settle(found, survived, seen_stays)
            .map_err(|what| format!("{} shard {shard}: {what}", NAMES[n]))?;
        if self.store.is_some() && survived == Durability::Written {
            for (item, buffered) in place.items.iter_mut().zip(buffered) {
                item.acked = item.acked.or(Some(Durability::Buffered).filter(|_| buffered));
            }
        }
        Ok(())
    }

    fn tick(&mut self) {
        if let Some(store) = &self.store {
            store.tick();
        }
    }

    /// Runs a step. Operations may fail; `Err` reports a violation.
    pub(crate) fn run(&mut self, step: &Step) -> Outcome {
        for shelf in self.shelves().values_mut() {
            if shelf.views.iter().any(View::drops) {
                shelf.allow_dropping();
            }
        }
        match step.clone() {
            Step::Open => {
                if self.store.is_none() {
                    match self.builder().open() {
                        Ok(store) => self.store = Some(store),
                        Err(error) => self.excused("to open", &error)?,
                    }
                }
            }
            Step::Create(n) => self.create(n)?,
            Step::Append { to, shard, as_durable, size } => {
                self.append(to, shard, &as_durable, size)?
            }
            Step::Read(n) => self.read(n)?,
            Step::Sync(n) => {
                let Some(logstore) = self.handle(n)? else { return Ok(()) };
                match logstore.sync() {
                    Ok(()) => self.durable(n),
                    Err(error) => self.stopped(n, "to sync", &error)?,
                }
            }
            Step::Roll(n) => {
                let Some(logstore) = self.handle(n)? else { return Ok(()) };
                match logstore.roll() {
                    Ok(()) if !self.trouble.disk && !self.trouble.left_open => self.durable(n),
                    Ok(()) => {}
                    Err(error) => self.stopped(n, "to roll", &error)?,
                }
            }
            Step::RotateDataKey(n) | Step::Rewrap(n)
                if self.shelves()[NAMES[n]].current.key_versions == 0 => {}
            Step::RotateDataKey(n) => {
                self.change(
                    n,
                    |view| view.key_versions += 1,
                    |store| store.keys().rotate_data_key(&name(NAMES[n])),
                )?;
            }
            Step::Rewrap(n) => {
                self.change(n, |_| {}, |store| store.keys().rewrap(&name(NAMES[n])))?
            }
            Step::RotateServiceKey => {
                let Some(store) = self.store.clone() else { return Ok(()) };
                let before: Vec<_> =
                    self.shelves().values_mut().map(Shelf::may_renew_data_key).collect();
                let done = store.keys().rotate_service_key_with(&mut |_| {});
                // A Logstore under the service key gets a new data key, or already got it from the
                // interrupted run that this one continued.
                if done.as_ref().is_ok_and(|done| !done.continued) {
                    self.shelves()
                        .values_mut()
                        .zip(before)
                        .for_each(|(shelf, before)| shelf.renewed_data_key(&before));
                }
                if let Err(error) = done {
                    self.excused("to rotate the service key", &error)?;
                }
            }
            Step::Toggle(n) => {
                let first = if n == 2 {
                    EncryptConf::byok(EncryptType::Aes, cmk(1))
                } else {
                    EncryptConf::service_key(EncryptType::Aes)
                };
                self.update(n, |view| {
                    view.encrypt_conf = Some(match view.encrypt_conf.clone() {
                        Some(conf) => EncryptConf { enable: !conf.enable, ..conf },
                        None => first.clone(),
                    });
                })?;
            }
            Step::ReplaceCmk(n) => {
                let conf = self.shelves()[NAMES[n]].current.encrypt_conf.clone();
                let Some(old) = conf.and_then(|conf| conf.user_cmk_info) else { return Ok(()) };
                let new = if old == cmk(0) { cmk(1) } else { cmk(0) };
                let replace = |store: &Store| {
                    store.keys().replace_cmk(&name(NAMES[n]), new.clone(), ReplaceCmk::default())
                };
                let change = |view: &mut View| {
                    view.key_versions += 1;
                    view.encrypt_conf = view
                        .encrypt_conf
                        .take()
                        .map(|conf| EncryptConf { user_cmk_info: Some(new.clone()), ..conf });
                };
                self.change(n, change, replace)?;
            }
            Step::Split(n) => self.reshard(n, true)?,
            Step::Merge(n) => self.reshard(n, false)?,
            Step::Retain(n) => self.retain(n)?,
            Step::TimeToLive(n) => {
                if self.handle(n)?.is_some() {
                    self.shelves().get_mut(NAMES[n]).unwrap().allow_dropping();
                    self.update(n, |view| view.ttl_days = Some(1))?;
                }
            }
            Step::Delete(n) => self.delete(n)?,
            Step::Checkpoint => match self.store.as_ref().map(|store| store.admin().checkpoint()) {
                Some(Ok(_))
                    if !self.trouble.disk && !self.trouble.kms && !self.trouble.left_open =>
                {
                    (0..NAMES.len()).for_each(|n| self.durable(n))
                }
                Some(Err(error)) => (0..NAMES.len())
                    .try_for_each(|n| self.stopped(n, "to take a checkpoint", &error))?,
                _ => {}
            },
            Step::Pass(ms) => {
                self.clock.advance(millis(ms));
                self.tick();
            }
            Step::JumpWall(by) => match u64::try_from(by) {
                Ok(by) => self.clock.jump_wall(secs(by)),
                Err(_) => self.clock.jump_wall_back(secs(by.unsigned_abs())),
            },
            Step::Disable => {
                self.trouble.kms = true;
                self.kms.disable(&cmk(0));
                self.clock.advance(secs(32));
                self.tick();
            }
            Step::Enable => {
                self.kms.enable_all();
                self.kms.fail_one_in(0);
                self.clock.advance(secs(32));
                self.tick();
            }
            Step::KmsFails(one_in) => {
                self.trouble.kms = true;
                self.kms.fail_one_in(one_in);
            }
            Step::RandomFails => {
                self.trouble.disk = true;
                self.random.fail_next(true);
            }
            Step::Fail(nth, fault, lasting) => {
                self.trouble.disk = true;
                drop(self.disk.fail_with(nth, fault, lasting));
            }
            Step::Heal => self.heal()?,
            Step::Fill(pages, inodes) => {
                self.trouble.disk = true;
                self.disk.leave_free(pages, inodes);
            }
            Step::Free(how) => self.free(how)?,
            Step::Grow => self.grow()?,
            Step::Shut => self.shut()?,
            Step::Close => {
                self.shut()?;
                if self.trouble.disk {
                    self.disk.heal();
                }
                self.reopen(Durability::Written)?;
            }
            Step::TakeOver { to, shard, nth } => self.take_over(to, shard, nth)?,
            Step::Fenced => self.try_fenced()?,
            Step::AnchorFails { half } => {
                self.trouble.anchor = true;
                self.anchor.lock().fails = Some(half);
            }
            Step::PutBack => self.put_back()?,
            Step::Kill => {
                let disk = self.disk.fork();
                self.crash(disk, Durability::Written)?;
            }
            Step::CutPower(survives) => {
                let disk = self.disk.crash(survives);
                self.crash(disk, Durability::Synced)?;
            }
        }
        Ok(())
    }

    /// Another writer opens the store while this one appends and rolls.
    fn take_over(&mut self, to: usize, shard: usize, nth: u64) -> Outcome {
        let Some(first) = self.store.clone() else { return Ok(()) };
        if self.trouble.disk || self.trouble.anchor {
            return Ok(());
        }
        let lock = Path::new(DIR).join("LOCK");
        let (builder, disk) = (self.builder(), self.disk.clone());
        let second: Arc<Mutex<Option<envelog::Result<Store>>>> = Arc::default();
        let open = {
            let (disk, second) = (disk.clone(), Arc::clone(&second));
            move || {
                disk.heal();
                // The file may be gone already.
                let _ = envelog::io::Disk::remove_file(&disk, &lock);
                *second.lock().unwrap() = Some(builder.clone().open());
            }
        };
        let (at, during) = (disk.operations() + nth, open.clone());
        disk.on_call(move |call| {
            if call.nth == at {
                elsewhere(&during);
            }
            Verdict::Go
        });
        self.trouble.taken_over = true;
        self.append(
            to,
            shard,
            &[Durability::Synced, Durability::Written, Durability::Buffered],
            300,
        )?;
        if let Some(logstore) = self.handle(to)?
            && let Err(error) = logstore.roll()
        {
            self.excused("to roll", &error)?;
        }
        disk.heal();
        if second.lock().unwrap().is_none() {
            open();
        }
        let opened = second.lock().unwrap().take().unwrap();
        self.fenced = Some(first);
        self.end();
        self.store =
            Some(opened.map_err(|error| format!("another writer cannot take over: {error}"))?);
        self.try_fenced()?;
        self.trouble.taken_over = false;
        self.trouble.left_open = true;
        Ok(())
    }

    /// Checks that the writer that lost the store can do nothing.
    fn try_fenced(&mut self) -> Outcome {
        let Some(fenced) = self.fenced.clone() else { return Ok(()) };
        for (n, text) in NAMES.into_iter().enumerate() {
            let Ok(logstore) = fenced.logstore(&name(text)) else { continue };
            for durability in [Durability::Written, Durability::Synced] {
                let (payload, kind, bytes) = self.payload(n, durability, 20);
                // The other writer may find the record at the end of the shard.
                let item = Item { bytes, kind, seq: None, acked: None };
                self.shelves().get_mut(text).unwrap().shards[0].items.push(item);
                let options =
                    AppendOptions::default().shard(ShardChoice::Shard(0)).durability(durability);
                ensure!(
                    logstore.append(payload, &options).is_err(),
                    "a writer that was taken over acknowledges an append"
                );
            }
        }
        let created = fenced.create_logstore(&name("p/fenced"), LogstoreSpec::default());
        ensure!(created.is_err(), "a writer that was taken over makes a Logstore");
        fenced.tick();
        Ok(())
    }

    /// Continues and closes, and then replaces the store by its earlier state.
    fn put_back(&mut self) -> Outcome {
        if self.trouble.disk || self.trouble.anchor {
            return Ok(());
        }
        self.shut()?;
        let old = self.disk.fork();
        self.reopen(Durability::Written)?;
        let any =
            self.store.as_ref().is_some_and(|store| store.list().is_ok_and(|all| !all.is_empty()));
        self.shut()?;
        let disk = std::mem::replace(&mut self.disk, old);
        let opened = self.builder().open();
        let read = self.builder().open_read_only();
        self.disk = disk;
        for opened in [opened, read] {
            match opened {
                Err(Error::RolledBack { .. }) => {}
                Ok(_) if !any => {}
                other => {
                    return Err(format!(
                        "an older store was put back, and opening it says {other:?}"
                    ));
                }
            }
        }
        self.reopen(Durability::Written)
    }

    fn shut(&mut self) -> Outcome {
        match self.store.take().map(Store::close) {
            None => Ok(()),
            Some(Ok(())) => {
                if !self.trouble.left_open {
                    (0..NAMES.len()).for_each(|n| self.durable(n));
                }
                Ok(())
            }
            Some(Err(error)) => {
                self.end();
                self.excused("to close", &error)
            }
        }
    }

    /// The process has ended: buffered records are lost.
    fn end(&self) {
        for shelf in self.shelves().values_mut() {
            shelf.shards.iter_mut().for_each(|shard| shard.give_up_buffered());
        }
    }

    /// Continues in the next process with `disk`. Operations of the old process no longer matter.
    pub(crate) fn crash(&mut self, disk: SimDisk, survived: Durability) -> Outcome {
        self.disk.heal();
        let before = (self.store.take(), self.fenced.take());
        self.disk = disk;
        let checked = self.reopen(survived);
        drop(before);
        checked
    }

    /// Restarts everything that has stopped within the same process, and checks that it continues.
    fn heal(&mut self) -> Outcome {
        self.disk.heal();
        self.anchor.lock().fails = None;
        self.random.fail_next(false);
        if let Some(store) = &self.store {
            // A retention run does the same: it takes back a key change that the catalogue lacks.
            store
                .keys()
                .rotate_due_data_keys()
                .map_err(|error| format!("no key can be changed: {error}"))?;
        }
        for (n, text) in NAMES.into_iter().enumerate() {
            let Some(logstore) = self.handle(n)? else { continue };
            for shard in writable(&logstore.config()) {
                let status = logstore
                    .status()
                    .map_err(|error| format!("{} has no status: {error}", text))?;
                // A shard that a full disk has stopped may write again. The next call reports that.
                let stopped =
                    self.trouble.disk && matches!(logstore.sync(), Err(Error::Latched { .. }));
                if status.latched.is_some() || stopped {
                    self.shelves()
                        .get_mut(text)
                        .unwrap()
                        .shards
                        .iter_mut()
                        .for_each(|s| s.give_up_buffered());
                }
                logstore.reopen_shard(shard as u32).unwrap();
                if self.trouble.kms {
                    continue;
                }
                self.append_one(n, shard, &logstore)?;
                let found = records(&logstore, shard as u32)
                    .map_err(|error| format!("{}: {error}", text))?;
                self.settle(n, shard, &found, Durability::Written, Durability::Written)?;
            }
        }
        Ok(())
    }

    /// Frees space on a full disk by the commands of the store: in the process that filled it, after
    /// a close, after a kill, or after a repair. Deletes a Logstore in the end.
    fn free(&mut self, how: u64) -> Outcome {
        let must = |what: &str, error: Error| format!("on a full disk, cannot {what}: {error}");
        // A killed process does nothing more before the next one has opened the store.
        let mut killed = None;
        match how % 4 {
            1 => self.shut()?,
            2 => {
                self.end();
                self.disk = self.disk.fork();
                killed = self.store.take();
            }
            _ => {}
        }
        if self.store.is_none() {
            let opened = self.builder().open().map_err(|error| must("open", error))?;
            self.store = Some(opened);
            self.trouble.left_open = true;
        }
        drop(killed);
        let store = self.store.clone().unwrap();
        store.admin().apply_retention().map_err(|error| must("apply retention", error))?;
        for n in (0..NAMES.len()).cycle().skip(how as usize % NAMES.len()).take(NAMES.len()) {
            let Some(logstore) = self.handle(n)? else { continue };
            if how % 4 == 3 {
                for shard in writable(&logstore.config()) {
                    let options = RepairOptions::default();
                    let repaired = store.admin().repair(logstore.name(), shard as u32, &options);
                    repaired.map_err(|error| must("repair", error))?;
                }
            }
            let status = logstore.status().map_err(|error| must("get the status", error))?;
            let old = status
                .data_keys
                .iter()
                .filter(|key| key.version > 0 && !key.current && !key.shredded);
            let old: Vec<u32> = old.map(|key| key.version).collect();
            if !old.is_empty() {
                store
                    .keys()
                    .shred_data_keys(logstore.name(), &old)
                    .map_err(|error| must("shred", error))?;
            }
            store.delete_logstore(logstore.name()).map_err(|error| must("delete", error))?;
            self.shelves().get_mut(NAMES[n]).unwrap().may_be = [false, true];
            break;
        }
        Ok(())
    }

    /// There is room again: the shards that have stopped, and the reserve, come back by themselves.
    fn grow(&mut self) -> Outcome {
        self.disk.grow();
        // Longer than the longest time between two attempts.
        for _ in 0..2 {
            self.clock.advance(secs(70));
            self.tick();
        }
        let Some(store) = self.store.clone() else { return Ok(()) };
        let reserve = store.admin().reserve_status();
        ensure!(!reserve.is_short(), "the reserve is short: {reserve:?}");
        for (n, text) in NAMES.into_iter().enumerate() {
            let Some(logstore) = self.handle(n)? else { continue };
            let status = logstore.status().map_err(|error| format!("{text}: {error}"))?;
            ensure!(status.latched.is_none(), "{text} does not continue: {:?}", status.latched);
            // A failure of a background write shows now, once.
            if logstore.sync().is_err() {
                let mut shelves = self.shelves();
                let shards = &mut shelves.get_mut(text).unwrap().shards;
                shards.iter_mut().for_each(|shard| shard.give_up_buffered());
            }
            logstore.sync().map_err(|error| format!("{text} cannot be synced: {error}"))?;
            self.durable(n);
            for shard in writable(&logstore.config()) {
                self.append_one(n, shard, &logstore)?;
                let found =
                    records(&logstore, shard as u32).map_err(|error| format!("{text}: {error}"))?;
                self.settle(n, shard, &found, Durability::Written, Durability::Written)?;
            }
        }
        Ok(())
    }

    /// An append that no fault may affect.
    fn append_one(&mut self, n: usize, shard: usize, logstore: &Logstore) -> Outcome {
        let before = self.shelves()[NAMES[n]].shards[shard].items.len();
        let trouble = std::mem::take(&mut self.trouble);
        let appended = self.append(n, shard, &[Durability::Synced], 10);
        self.trouble = trouble;
        appended.map_err(|what| format!("{} shard {shard} does not continue: {what}", NAMES[n]))?;
        let shelves = self.shelves();
        let item = &shelves[NAMES[n]].shards[shard].items[before];
        ensure!(
            item.acked == Some(Durability::Synced),
            "{} does not continue: {item:?}",
            logstore.name()
        );
        Ok(())
    }

    /// Opens the store again without faults and checks everything: the state, that it continues to
    /// work, and that this survives.
    pub(crate) fn reopen(&mut self, survived: Durability) -> Outcome {
        self.end();
        self.trouble = Trouble::default();
        self.anchor.lock().fails = None;
        self.kms.enable_all();
        self.kms.fail_one_in(0);
        let store =
            self.builder().open().map_err(|error| format!("the store does not open: {error}"))?;
        let listed = store.list().map_err(|error| format!("the store has no list: {error}"))?;
        for text in &listed {
            ensure!(NAMES.contains(&text.to_string().as_str()), "{text} was never created");
        }
        self.store = Some(store.clone());
        for (n, text) in NAMES.into_iter().enumerate() {
            let there = listed.contains(&name(text));
            let may_be = self.shelves()[text].may_be;
            ensure!(
                may_be[usize::from(!there)],
                "{} is {}there",
                text,
                if there { "" } else { "not " }
            );
            self.shelves().get_mut(text).unwrap().may_be = [there, !there];
            if there {
                self.look_at(n, &store, survived)?;
            }
        }
        let report = store
            .admin()
            .verify(&VerifyOptions::default(), &mut |_| {})
            .map_err(|error| format!("verify: {error}"))?;
        ensure!(report.is_clean() && report.refused.is_empty(), "verify finds {report:?}");
        self.look_for_secrets()
    }

    fn look_at(&mut self, n: usize, store: &Store, survived: Durability) -> Outcome {
        let failed = |what: &str, error: Error| format!("{} {what}: {error}", NAMES[n]);
        let logstore =
            store.logstore(&name(NAMES[n])).map_err(|error| failed("does not open", error))?;
        let status = logstore.status().map_err(|error| failed("has no status", error))?;
        let config = logstore.config();
        let (all, writable) = (config.shards.len(), writable(&config));
        let found = View {
            shards: Range::of(&config),
            encrypt_conf: config.encrypt_conf,
            ttl_days: config.ttl_days,
            retention_bytes: config.retention_bytes,
            key_versions: status.data_keys.iter().filter(|key| key.version > 0).count(),
        };
        {
            let mut shelves = self.shelves();
            let shelf = shelves.get_mut(NAMES[n]).unwrap();
            ensure!(
                shelf.views.contains(&found),
                "{} is mixed up: {found:?}, not one of {:?}",
                NAMES[n],
                shelf.views
            );
            (shelf.current, shelf.views) = (found.clone(), vec![found]);
        }
        // After a power loss, the visible records are on the disk.
        let seen_stays =
            if survived == Durability::Synced { Durability::Synced } else { Durability::Written };
        for shard in 0..all {
            let found = records(&logstore, shard as u32)
                .map_err(|error| failed("cannot be read", error))?;
            self.settle(n, shard, &found, survived, seen_stays)?;
            if writable.contains(&shard) {
                self.append_one(n, shard, &logstore)?;
            }
            let found = records(&logstore, shard as u32)
                .map_err(|error| failed("cannot be read on", error))?;
            self.settle(n, shard, &found, Durability::Synced, Durability::Synced)?;
            self.shelves().get_mut(NAMES[n]).unwrap().shards[shard].recovered(&found);
        }
        Ok(())
    }

    /// Checks that no key and nonce pair repeats, that no two segments share a salt, and that no
    /// secret is on the disk.
    fn look_for_secrets(&self) -> Outcome {
        if let Some(what) = self.ledger.repeated() {
            return Err(what);
        }
        let files = self.disk.files(Path::new(DIR));
        let mut salts = HashSet::new();
        let canary = memmem::Finder::new(CANARY);
        for (path, bytes) in &files {
            ensure!(canary.find(bytes).is_none(), "plaintext in {}", path.display());
            if path.extension().is_some_and(|extension| extension == "seg") {
                let header = SegmentHeader::decode(bytes)
                    .map_err(|error| format!("{}: {error}", path.display()))?;
                ensure!(
                    salts.insert(header.header.salt),
                    "{} has the salt of another",
                    path.display()
                );
            }
        }
        Ok(())
    }

    /// Checks that no file of the store contains a key, in binary or in hex.
    pub(crate) fn look_for_keys(&self) -> Outcome {
        let files = self.disk.files(Path::new(DIR));
        for key in self.ledger.keys() {
            let hex: String = key[..12].iter().map(|byte| format!("{byte:02x}")).collect();
            for (path, bytes) in &files {
                let found =
                    memmem::find(bytes, &key[..12]).or_else(|| memmem::find(bytes, hex.as_bytes()));
                ensure!(found.is_none(), "a key is in {}", path.display());
            }
        }
        Ok(())
    }

    /// Damages a closed store: the damage is reported, and never read as an appended record.
    pub(crate) fn rot(&mut self, dice: &mut Dice) -> Outcome {
        let what = self.disk.rot(Path::new("/world"), dice);
        let context = |violation: String| format!("{what}: {violation}");
        self.look_at_rotten().map_err(context)
    }

    fn look_at_rotten(&mut self) -> Outcome {
        let rotten =
            |error: &Error| matches!(error.kind(), ErrorKind::Integrity | ErrorKind::Unavailable);
        let store = match self.builder().open() {
            Ok(store) => store,
            Err(error) => {
                ensure!(rotten(&error), "the store does not open for another reason: {error}");
                return Ok(());
            }
        };
        let mut reported = 0;
        for text in NAMES {
            let shelf = self.shelves()[text].clone();
            let logstore = match store.logstore(&name(text)) {
                Ok(logstore) => logstore,
                Err(Error::LogstoreMissing(_)) if shelf.may_be[1] => continue,
                Err(error) => {
                    ensure!(rotten(&error), "{} does not open for another reason: {error}", text);
                    reported += 1;
                    continue;
                }
            };
            let there = logstore.config().shards.len();
            for (shard, model) in shelf.shards.iter().enumerate().take(there) {
                let mut found = Vec::new();
                let mut failed = false;
                match logstore.read(shard as u32, &envelog::ReadOptions::default()) {
                    Ok(reader) => {
                        for record in reader {
                            match record {
                                Ok(record) => found.push(record),
                                Err(error) => {
                                    ensure!(
                                        rotten(&error),
                                        "{} is not read for another reason: {error}",
                                        text
                                    );
                                    failed = true;
                                }
                            }
                        }
                    }
                    Err(error) => {
                        ensure!(rotten(&error), "{} is not read for another reason: {error}", text);
                        failed = true;
                    }
                }
                reported += usize::from(failed);
                model.settle_rotten(&found, failed)?;
            }
        }
        let report = store
            .admin()
            .verify(&VerifyOptions::default(), &mut |_| {})
            .map_err(|error| format!("verify: {error}"))?;
        ensure!(reported == 0 || !report.is_clean(), "reading found damage, verify did not");
        Ok(())
    }
}

/// A Logstore with that many shards is not split or merged any more.
const SHARDS_ENOUGH: usize = 10;

/// Does not occur in any name, key or number. Short enough that compression does not split it.
const CANARY: &str = "SECRET-canary-4711";
