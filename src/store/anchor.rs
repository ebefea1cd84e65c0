//! The anchor: a place outside the store that remembers how far the store was, so that no one can put an older one in its place.
//!
//! An anchor keeps a copy of the catalogue file, which is authenticated under the service keyring and holds no secret. The store feeds
//! it after each record is synced. When the store is opened, it is compared with the anchor.

use std::{collections::BTreeSet, fmt, path::PathBuf, sync::Arc, thread::JoinHandle, time::Duration};

use serde::Serialize;
use tracing::{info, warn};

use super::{
    Background, StoreShared,
    catalogue::{Catalogue, Entry, Mirror},
};
use crate::{
    Error, Result,
    config::LogstoreName,
    ids::{LogstoreId, StoreId},
    io::{self, Access, Clock, Disk, Existing, FileKind, OpenMode, RealDisk},
    keys::AuditEvent,
    metrics::Counters,
    shard::{AdmitAppend, ShardRecord},
    sync::{
        Condvar, LockRank, Mutex,
        atomic::{AtomicU64, Ordering},
        lock, read, wait, wait_timeout, write,
    },
};

/// After how long an anchor that has failed is tried again, at first and at most.
const RETRY_AFTER: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);
/// How long a store that is closed waits for its anchor.
const CLOSE_AFTER: Duration = Duration::from_secs(5);
/// Stands for an anchor that is not behind.
const UP_TO_DATE: u64 = u64::MAX;
/// The most bytes that an anchor keeps of a store.
const KEPT_BYTES_MAX: u64 = 512 << 20;

/// Keeps, outside the store, how far the store was: another volume, another machine, a write-once service.
///
/// For each store it keeps one string of bytes, which it need not understand, and the place that the store names with it. What protects
/// is that an attacker who can write the store cannot write the anchor. Methods are called from one thread at a time, and may block: the
/// store does not wait for them, except when it is opened, at the end of a rotation of the service key, and when it is closed (the last
/// two for at most 5 s).
pub trait Anchor: Send + Sync + fmt::Debug {
    /// What is kept of the store, under the highest place; `None` when nothing was ever kept.
    ///
    /// # Errors
    /// The anchor cannot be reached, or does not know.
    fn load(&self, store: StoreId) -> std::io::Result<Option<(AnchorPlace, Vec<u8>)>>;

    /// Keeps `bytes` under `place`, durably, in place of what was kept under lower ones. Should it fail, the old bytes or the new ones are
    /// kept.
    ///
    /// # Errors
    /// Something is kept under a higher place: another writer has taken over. The anchor cannot be reached, or refuses.
    fn replace(&self, store: StoreId, place: AnchorPlace, bytes: &[u8]) -> std::io::Result<()>;

    /// Keeps `bytes` behind the first `len` bytes that are kept under `place`, durably.
    ///
    /// # Errors
    /// Other than `len` bytes are kept under that place, or the anchor cannot be reached.
    fn append(&self, store: StoreId, place: AnchorPlace, len: u64, bytes: &[u8]) -> std::io::Result<()>;

    /// What an error calls the string of bytes under `place`: for a directory, the path of its file.
    fn name_of(&self, store: StoreId, place: AnchorPlace) -> PathBuf {
        let _ = (store, place);
        PathBuf::from("the anchor")
    }
}

/// Which string of bytes an anchor keeps: the higher, the newer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AnchorPlace {
    /// The epoch of the writer.
    pub epoch: u64,
    /// Counts the strings of this writer.
    pub serial: u64,
}

/// An anchor in a directory, which belongs on another volume, best of another machine. Each store has a file `ID-EPOCH-SERIAL.anchor`.
#[derive(Debug)]
pub struct DirAnchor {
    dir: PathBuf,
    disk: Arc<dyn Disk>,
}

impl DirAnchor {
    /// The anchor in `dir`, which must exist when the anchor is used.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), disk: Arc::new(RealDisk) }
    }

    /// Another file system.
    #[must_use]
    pub fn disk(mut self, disk: Arc<dyn Disk>) -> Self {
        self.disk = disk;
        self
    }

    fn rooted(&self) -> std::io::Result<Arc<dyn Disk>> {
        self.disk.beneath(&self.dir, Access::Owner)
    }

    fn path(&self, store: StoreId, place: AnchorPlace) -> PathBuf {
        self.dir.join(format!("{store}-{:010}-{:010}.anchor", place.epoch, place.serial))
    }

    /// The places of what is kept of a store, in order.
    fn places(&self, disk: &dyn Disk, store: StoreId) -> std::io::Result<Vec<AnchorPlace>> {
        let parse = |name: &str| {
            let (epoch, serial) = name.strip_prefix(&format!("{store}-"))?.strip_suffix(".anchor")?.split_once('-')?;
            Some(AnchorPlace { epoch: epoch.parse().ok()?, serial: serial.parse().ok()? })
        };
        let entries = disk.list_dir(&self.dir)?;
        // Another kind of file was put there by mistake: the anchor writes no such.
        let files = entries.iter().filter(|entry| entry.kind == FileKind::File);
        let mut places: Vec<_> = files.filter_map(|entry| parse(&entry.name)).collect();
        places.sort_unstable();
        Ok(places)
    }

    /// Removes the temporary files of a store that killed processes have left.
    fn remove_temporaries(&self, disk: &dyn Disk, store: StoreId) -> std::io::Result<()> {
        let prefix = format!("{store}-");
        for entry in disk.list_dir(&self.dir)? {
            if entry.kind == FileKind::File && entry.name.starts_with(&prefix) && entry.name.ends_with(".anchor.tmp") {
                io::remove_temporary(disk, &self.dir.join(&entry.name));
            }
        }
        Ok(())
    }

    /// An error that names the directory.
    fn in_dir(&self, error: &std::io::Error) -> std::io::Error {
        std::io::Error::new(error.kind(), format!("{}: {error}", self.dir.display()))
    }
}

impl Anchor for DirAnchor {
    fn load(&self, store: StoreId) -> std::io::Result<Option<(AnchorPlace, Vec<u8>)>> {
        let load = || {
            let disk = self.rooted()?;
            let Some(place) = self.places(&*disk, store)?.pop() else { return Ok(None) };
            let bytes = io::read_file(&*disk, &self.path(store, place), KEPT_BYTES_MAX)?;
            Ok(Some((place, bytes)))
        };
        load().map_err(|error| self.in_dir(&error))
    }

    fn replace(&self, store: StoreId, place: AnchorPlace, bytes: &[u8]) -> std::io::Result<()> {
        let replace = || {
            let disk = self.rooted()?;
            let places = self.places(&*disk, store)?;
            if places.last().is_some_and(|last| *last > place) {
                return Err(std::io::Error::other("another writer feeds the anchor"));
            }
            self.remove_temporaries(&*disk, store)?;
            io::write_file(&*disk, &self.path(store, place), bytes, Existing::Replace)?;
            for other in places.into_iter().filter(|other| *other != place) {
                disk.remove_file(&self.path(store, other))?;
            }
            Ok(())
        };
        replace().map_err(|error| self.in_dir(&error))
    }

    fn append(&self, store: StoreId, place: AnchorPlace, len: u64, bytes: &[u8]) -> std::io::Result<()> {
        let append = || {
            let file = self.rooted()?.open(&self.path(store, place), OpenMode::ReadWrite)?;
            if file.len()? != len {
                return Err(std::io::Error::other("the anchor was changed by another process"));
            }
            file.write_at(bytes, len)?;
            file.sync_data()
        };
        append().map_err(|error| self.in_dir(&error))
    }

    fn name_of(&self, store: StoreId, place: AnchorPlace) -> PathBuf {
        self.path(store, place)
    }
}

/// How far the anchor of an open store is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct AnchorStatus {
    /// Whether the keyring says that the store has an anchor.
    pub anchored: bool,
    /// Whether the store was opened with an anchor.
    pub configured: bool,
    /// For how long the anchor has not kept what the catalogue says; `None` when it is up to date.
    pub behind: Option<Duration>,
    /// In a store that was opened for reading: how many records of the catalogue the anchor did not know then.
    pub records_behind: Option<u64>,
    /// Why it could not be fed when that was last tried.
    pub error: Option<String>,
}

/// Feeds the anchor of a store that is open for writing.
pub(super) struct Feeder {
    anchor: Arc<dyn Anchor>,
    store: StoreId,
    clock: Arc<dyn Clock>,
    counters: Arc<Counters>,
    state: Mutex<State>,
    changed: Condvar,
    /// `behind_since` in microseconds, for appends, which do not wait for the lock; [`UP_TO_DATE`] for none.
    behind_since_us: AtomicU64,
}

#[derive(Default)]
struct State {
    /// What the anchor is to keep.
    wanted: Option<Mirror>,
    /// What it keeps: which catalogue file, and how many bytes of it. `None` when that is not known.
    kept: Option<(AnchorPlace, u64)>,
    behind_since: Option<Duration>,
    failures: u32,
    error: Option<String>,
    retry_at: Duration,
    feeding: bool,
    stopped: bool,
    thread: Option<JoinHandle<()>>,
}

impl State {
    fn is_up_to_date(&self) -> bool {
        self.wanted.as_ref().is_none_or(|wanted| self.kept == Some((wanted.place, wanted.len)))
    }
}

impl Feeder {
    pub(super) fn new(
        anchor: Arc<dyn Anchor>,
        store: StoreId,
        clock: Arc<dyn Clock>,
        counters: Arc<Counters>,
    ) -> Arc<Self> {
        Arc::new(Self {
            anchor,
            store,
            clock,
            counters,
            state: Mutex::new(LockRank::Anchor, State::default()),
            changed: Condvar::new(),
            behind_since_us: AtomicU64::new(UP_TO_DATE),
        })
    }

    /// Starts the thread that feeds. Without it each [`Feeder::want`] feeds at once.
    pub(super) fn spawn(self: &Arc<Self>) -> std::io::Result<()> {
        let this = Arc::clone(self);
        let thread = std::thread::Builder::new().name("envelog-anchor".to_owned()).spawn(move || this.work())?;
        lock(&self.state).thread = Some(thread);
        Ok(())
    }

    /// Has the anchor keep this. All of it is synced in the store.
    pub(super) fn want(&self, mirror: Mirror) {
        let mut state = lock(&self.state);
        state.wanted = Some(mirror);
        if state.is_up_to_date() {
            return;
        }
        let now = self.clock.uptime();
        let since = *state.behind_since.get_or_insert(now);
        self.behind_since_us.store(since.as_micros() as u64, Ordering::Relaxed);
        let inline = state.thread.is_none() && now >= state.retry_at;
        drop(state);
        if inline {
            self.feed();
        } else {
            self.changed.notify_all();
        }
    }

    /// Tries again if it is time, in a store without threads.
    pub(super) fn tend(&self) {
        let state = lock(&self.state);
        let due = state.thread.is_none() && !state.is_up_to_date() && self.clock.uptime() >= state.retry_at;
        drop(state);
        if due {
            self.feed();
        }
    }

    pub(super) fn status(&self) -> AnchorStatus {
        let state = lock(&self.state);
        let behind = state.behind_since.map(|since| self.clock.uptime().saturating_sub(since));
        AnchorStatus { anchored: true, configured: true, behind, records_behind: None, error: state.error.clone() }
    }

    /// Feeds once.
    fn feed(&self) {
        let (wanted, kept) = {
            let mut state = lock(&self.state);
            let Some(wanted) = state.wanted.clone() else { return };
            state.feeding = true;
            (wanted, state.kept)
        };
        // What is wanted later than now has not been waiting for longer.
        let wanted_since = self.clock.uptime();
        let fed = match kept {
            Some((place, len)) if place == wanted.place && len <= wanted.len => {
                wanted.read_from(len).and_then(|bytes| match bytes.is_empty() {
                    true => Ok(()),
                    false => self.anchor.append(self.store, place, len, &bytes),
                })
            }
            _ => wanted.read_from(0).and_then(|bytes| self.anchor.replace(self.store, wanted.place, &bytes)),
        };
        let mut state = lock(&self.state);
        state.feeding = false;
        match fed {
            Ok(()) => {
                if state.failures > 0 {
                    info!(store = %self.store, "the anchor can be fed again");
                }
                state.kept = Some((wanted.place, wanted.len));
                (state.failures, state.error) = (0, None);
                state.behind_since = if state.is_up_to_date() { None } else { Some(wanted_since) };
                let since_us = state.behind_since.map_or(UP_TO_DATE, |since| since.as_micros() as u64);
                self.behind_since_us.store(since_us, Ordering::Relaxed);
            }
            Err(error) => {
                self.counters.anchor_failures.fetch_add(1, Ordering::Relaxed);
                if state.failures == 0 {
                    warn!(store = %self.store, %error, "the anchor cannot be fed; this is tried again");
                }
                // It may have kept a part: it gets all of it next time.
                state.kept = None;
                state.error = Some(error.to_string());
                let delay = RETRY_AFTER.saturating_mul(1 << state.failures.min(5)).min(RETRY_AFTER_MAX);
                state.failures = state.failures.saturating_add(1);
                state.retry_at = self.clock.uptime() + delay;
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    fn work(&self) {
        let mut state = lock(&self.state);
        loop {
            if state.stopped {
                return;
            }
            if state.is_up_to_date() {
                state = wait(&self.changed, state);
                continue;
            }
            let left = state.retry_at.saturating_sub(self.clock.uptime());
            if !left.is_zero() {
                state = wait_timeout(&self.changed, state, left);
                continue;
            }
            drop(state);
            self.feed();
            state = lock(&self.state);
        }
    }

    /// Waits, for a few seconds at most, until the anchor keeps all of it.
    ///
    /// # Errors
    /// Why it does not.
    pub(super) fn catch_up(&self) -> std::result::Result<(), String> {
        let until = self.clock.uptime() + CLOSE_AFTER;
        let mut state = lock(&self.state);
        if state.thread.is_none() && !state.is_up_to_date() {
            drop(state);
            self.feed();
            state = lock(&self.state);
        }
        state.retry_at = Duration::ZERO;
        self.changed.notify_all();
        while !state.is_up_to_date() && state.thread.is_some() {
            let left = until.saturating_sub(self.clock.uptime());
            if left.is_zero() {
                break;
            }
            state = wait_timeout(&self.changed, state, left);
        }
        match state.is_up_to_date() {
            true => Ok(()),
            false => Err(state.error.clone().unwrap_or_else(|| "it does not answer".to_owned())),
        }
    }

    /// Feeds what is left, for a few seconds at most, and ends the thread. A thread that hangs in the anchor is left behind.
    pub(super) fn stop(&self) {
        let until = self.clock.uptime() + CLOSE_AFTER;
        let mut state = lock(&self.state);
        if state.thread.is_none() {
            drop(state);
            self.tend();
            return;
        }
        state.retry_at = Duration::ZERO;
        self.changed.notify_all();
        let failures = state.failures;
        while (!state.is_up_to_date() && state.failures == failures) || state.feeding {
            let left = until.saturating_sub(self.clock.uptime());
            if left.is_zero() {
                break;
            }
            state = wait_timeout(&self.changed, state, left);
        }
        state.stopped = true;
        let hangs = state.feeding;
        let thread = state.thread.take();
        let behind = !state.is_up_to_date();
        drop(state);
        self.changed.notify_all();
        if behind {
            warn!(store = %self.store, "the store is closed, and its anchor does not know all of it yet");
        }
        if let Some(thread) = thread.filter(|_| !hangs) {
            let _ = thread.join();
        }
    }
}

/// Refuses appends while the anchor is behind by more than a limit.
pub(super) struct AnchorLimit {
    pub(super) feeder: Arc<Feeder>,
    pub(super) limit: Duration,
}

impl AdmitAppend for AnchorLimit {
    fn admit_append(&self) -> Result<()> {
        let since_us = self.feeder.behind_since_us.load(Ordering::Relaxed);
        if since_us == UP_TO_DATE {
            return Ok(());
        }
        let behind = self.feeder.clock.uptime().saturating_sub(Duration::from_micros(since_us));
        if behind <= self.limit { Ok(()) } else { Err(Error::AnchorBehind { behind, limit: self.limit }) }
    }
}

impl fmt::Debug for Feeder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feeder").field("anchor", &self.anchor).finish_non_exhaustive()
    }
}

impl StoreShared {
    /// Compares the store with what its anchor keeps of it. Reads at most two headers a shard, and only of shards that have gone on since.
    ///
    /// # Errors
    /// [`Error::RolledBack`]: the store is older or shorter than its anchor.
    pub(super) fn check_against_anchor(&self, kept: &Catalogue) -> Result<()> {
        let now = self.catalogue.now().clone();
        if now.generation < kept.generation {
            let (found, known) = (now.generation, kept.generation);
            return Err(rolled_back(format!("the catalogue ends with record {found}, the anchor knows {known}")));
        }
        let mut deleted: Option<BTreeSet<LogstoreId>> = None;
        for (name, entry) in &kept.logstores {
            match now.logstores.get(name).filter(|found| found.id == entry.id) {
                Some(found) => self.check_logstore_against_anchor(name, found, entry)?,
                None if now.deleting.contains(&entry.id) => {}
                None => {
                    if deleted.is_none() {
                        deleted = Some(self.deleted_since(kept)?);
                    }
                    if !deleted.as_ref().is_some_and(|deleted| deleted.contains(&entry.id)) {
                        return Err(rolled_back(format!("the anchor knows Logstore {name}, which is not there")));
                    }
                }
            }
        }
        Ok(())
    }

    /// Feeds the anchor for the first time since the store was opened, and from then on after each change of the catalogue.
    /// `without_anchor` tells that the store was not compared with it; the store is then opened although it cannot be fed yet.
    ///
    /// # Errors
    /// [`Error::Anchor`] when it cannot be fed; [`Error::Io`].
    pub(super) fn begin_anchoring(&self, without_anchor: bool) -> Result<()> {
        if without_anchor && read(&self.keyring).is_anchored() {
            self.audit.record(AuditEvent::OpenedWithoutAnchor, None, "")?;
        }
        let Some(feeder) = &self.anchor else { return Ok(()) };
        self.catalogue.feed(Arc::clone(feeder));
        let fed = match feeder.status().error {
            Some(why) if !without_anchor => {
                return Err(Error::Anchor { path: self.dir.clone(), why: format!("it cannot be written: {why}") });
            }
            error => error.is_none(),
        };
        // Now that it keeps something of the store, no opening for writing may go without it.
        if fed && !read(&self.keyring).is_anchored() {
            let anchored = read(&self.keyring).anchor(&*self.random)?;
            *write(&self.keyring) = anchored;
            self.audit.record(AuditEvent::Anchored, None, "")?;
        }
        if self.options.background == Background::Threads {
            feeder.spawn().map_err(Error::io("start a thread for the anchor of", &self.dir))?;
        }
        Ok(())
    }

    /// The Logstores that the audit log says were deleted since.
    fn deleted_since(&self, kept: &Catalogue) -> Result<BTreeSet<LogstoreId>> {
        let known = self.catalogue.now().audit.clone();
        let records = self.audit.verified(&[&known, &kept.audit])?;
        let since = records.into_iter().skip(kept.audit.number as usize);
        let deletions = since
            .filter(|record| matches!(record.event, AuditEvent::DeleteIntended | AuditEvent::Deleted))
            .filter_map(|record| record.logstore_id);
        Ok(deletions.collect())
    }

    fn check_logstore_against_anchor(&self, name: &LogstoreName, found: &Entry, kept: &Entry) -> Result<()> {
        if found.generation < kept.generation {
            let (found, known) = (found.generation, kept.generation);
            let what = format!("the metadata of Logstore {name} is of generation {found}, the anchor knows {known}");
            return Err(rolled_back(what));
        }
        for (shard, (found, kept)) in found.shards.iter().zip(&kept.shards).enumerate() {
            if found == kept {
                continue;
            }
            let what = |what: &str| rolled_back(format!("shard {shard} of Logstore {name} {what} its anchor knows"));
            if found.first_ordinal < kept.first_ordinal {
                return Err(what("has segments again that retention dropped, as"));
            }
            let ShardRecord { head: Some(head), .. } = kept else { continue };
            if head.ordinal < found.first_ordinal {
                continue;
            }
            match &found.head {
                Some(found) if found.ordinal == head.ordinal => {
                    let goes_on = found.segment == head.segment && found.blocks >= head.blocks;
                    let same = found.blocks > head.blocks || found.digest == head.digest;
                    if !goes_on || !same || (head.sealed && !found.sealed) {
                        return Err(what("does not go on from what"));
                    }
                }
                Some(found) if found.ordinal > head.ordinal => {
                    let logstore = self.logstore(name)?;
                    let Some(shard) = logstore.shards.get(shard) else { continue };
                    if !shard.agrees_with(head)? {
                        return Err(what("does not go on from what"));
                    }
                }
                _ => return Err(what("is shorter than")),
            }
        }
        Ok(())
    }
}

fn rolled_back(what: String) -> Error {
    Error::RolledBack { what }
}
