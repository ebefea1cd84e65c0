//! The anchor: a copy of the catalogue in a place that the attacker cannot write. It detects a
//! rollback of the store.
//!
//! The service keyring authenticates the copy, which has no secret. The store feeds the anchor
//! after each record is synced. Each opening compares the store with the anchor.

use std::{fmt, path::PathBuf, sync::Arc, thread::JoinHandle, time::Duration};

use serde::Serialize;
use tracing::{info, warn};

use crate::{
    Error, Result,
    ids::StoreId,
    io::{
        self, Access, Clock, Disk, DiskFile, Existing, FileKind, OpenMode, RealDisk, read_exact_at,
    },
    metrics::Counters,
    shard::AdmitAppend,
    sync::{
        Condvar, LockRank, Mutex,
        atomic::{AtomicU64, Ordering},
        lock, wait, wait_timeout,
    },
};

/// The first and the longest delay before a failed anchor is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);
/// How long closing a store waits for its anchor.
const CLOSE_AFTER: Duration = Duration::from_secs(5);
/// The value for an anchor that is not behind.
const UP_TO_DATE: u64 = u64::MAX;
/// The most bytes that an anchor keeps of a store.
const KEPT_BYTES_MAX: u64 = 512 << 20;

/// Keeps a copy of the catalogue outside the store: on another volume, on another machine, or in a
/// write-once service.
///
/// For each store it keeps one string of bytes, which it need not understand, and the place that
/// the store passes with it. It protects because an attacker who can write the store cannot write
/// the anchor. The engine calls the methods from one thread at a time, and they may block. The
/// store waits for them only when it is opened, at the end of a rotation of the service key, and
/// when it is closed (the last two for at most 5 s).
pub trait Anchor: Send + Sync + fmt::Debug {
    /// The bytes of the store under the highest place; `None` when none were ever kept.
    ///
    /// # Errors
    /// The anchor is unreachable, or cannot answer.
    fn load(&self, store: StoreId) -> std::io::Result<Option<(AnchorPlace, Vec<u8>)>>;

    /// Keeps `bytes` under `place`, durably, and drops the bytes under lower places. After a
    /// failure the anchor has the old bytes or the new ones.
    ///
    /// # Errors
    /// The anchor has bytes under a higher place: another writer has taken over. The anchor is
    /// unreachable, or refuses.
    fn replace(&self, store: StoreId, place: AnchorPlace, bytes: &[u8]) -> std::io::Result<()>;

    /// Appends `bytes` to the `len` bytes under `place`, durably.
    ///
    /// # Errors
    /// The anchor does not have exactly `len` bytes under that place, or is unreachable.
    fn append(
        &self,
        store: StoreId,
        place: AnchorPlace,
        len: u64,
        bytes: &[u8],
    ) -> std::io::Result<()>;

    /// The name of the bytes under `place` in error messages: in a directory, the path of the file.
    fn name_of(&self, store: StoreId, place: AnchorPlace) -> PathBuf {
        let _ = (store, place);
        PathBuf::from("the anchor")
    }
}

/// The place of the bytes that an anchor keeps. Newer bytes have a higher place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AnchorPlace {
    /// The epoch of the writer.
    pub epoch: u64,
    /// The number of the catalogue file among those of this writer.
    pub serial: u64,
}

/// An anchor in a directory. The directory belongs on another volume, preferably of another
/// machine. Each store has a file `ID-EPOCH-SERIAL.anchor`.
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

    /// Replaces the file system.
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

    /// The places of the files of a store, in order.
    fn places(&self, disk: &dyn Disk, store: StoreId) -> std::io::Result<Vec<AnchorPlace>> {
        let parse = |name: &str| {
            let (epoch, serial) = name
                .strip_prefix(&format!("{store}-"))?
                .strip_suffix(".anchor")?
                .split_once('-')?;
            Some(AnchorPlace { epoch: epoch.parse().ok()?, serial: serial.parse().ok()? })
        };
        let entries = disk.list_dir(&self.dir)?;
        // The anchor writes regular files only, so another type of entry is not its own.
        let files = entries.iter().filter(|entry| entry.kind == FileKind::File);
        let mut places: Vec<_> = files.filter_map(|entry| parse(&entry.name)).collect();
        places.sort_unstable();
        Ok(places)
    }

    /// Removes the temporary files that killed processes left for a store.
    fn remove_temporaries(&self, disk: &dyn Disk, store: StoreId) -> std::io::Result<()> {
        let prefix = format!("{store}-");
        for entry in disk.list_dir(&self.dir)? {
            if entry.kind == FileKind::File
                && entry.name.starts_with(&prefix)
                && entry.name.ends_with(".anchor.tmp")
            {
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

    fn append(
        &self,
        store: StoreId,
        place: AnchorPlace,
        len: u64,
        bytes: &[u8],
    ) -> std::io::Result<()> {
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

/// The state of the anchor of an open store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct AnchorStatus {
    /// Whether the keyring records that the store has an anchor.
    pub anchored: bool,
    /// Whether the store was opened with an anchor.
    pub configured: bool,
    /// How long the anchor has been behind the catalogue; `None` when it is up to date. As JSON it
    /// is `behind_s`, in seconds.
    #[serde(rename = "behind_s", serialize_with = "crate::error::seconds_if_any")]
    pub behind: Option<Duration>,
    /// In a store that is open for reading: the number of catalogue records that the anchor lacked
    /// when the store was opened.
    pub records_behind: Option<u64>,
    /// The error of the last attempt to feed it.
    pub error: Option<String>,
}

/// The synced part of a catalogue file, to be copied to the anchor.
#[derive(Clone, Debug)]
pub(super) struct Mirror {
    file: Arc<dyn DiskFile>,
    place: AnchorPlace,
    /// Its length in bytes.
    len: u64,
}

impl Mirror {
    /// The first `len` bytes of a catalogue file, which are synced.
    pub(super) fn new(file: Arc<dyn DiskFile>, place: AnchorPlace, len: u64) -> Self {
        Self { file, place, len }
    }

    /// Its bytes from an offset on.
    fn read_from(&self, offset: u64) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; self.len.saturating_sub(offset) as usize];
        read_exact_at(&*self.file, &mut bytes, offset)?;
        Ok(bytes)
    }
}

/// Feeds the anchor of a store that is open for writing.
pub(super) struct Feeder {
    anchor: Arc<dyn Anchor>,
    store: StoreId,
    clock: Arc<dyn Clock>,
    counters: Arc<Counters>,
    state: Mutex<State>,
    changed: Condvar,
    /// `behind_since` in microseconds, or [`UP_TO_DATE`]. Appends read it without the lock.
    behind_since_us: AtomicU64,
}

#[derive(Default)]
struct State {
    /// The bytes that the anchor is to keep.
    wanted: Option<Mirror>,
    /// The catalogue file that the anchor keeps, and the number of its bytes. `None` if unknown.
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

    /// Starts the thread that feeds. Without this thread each [`Feeder::want`] feeds at once.
    pub(super) fn spawn(self: &Arc<Self>) -> std::io::Result<()> {
        let this = Arc::clone(self);
        let thread = std::thread::Builder::new()
            .name("envelog-anchor".to_owned())
            .spawn(move || this.work())?;
        lock(&self.state).thread = Some(thread);
        Ok(())
    }

    /// Asks for a copy of these bytes, which are synced in the store. In a store without threads,
    /// blocks while it feeds the anchor.
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

    /// In a store without threads, tries again if a retry is due.
    pub(super) fn tend(&self) {
        let state = lock(&self.state);
        let due = state.thread.is_none()
            && !state.is_up_to_date()
            && self.clock.uptime() >= state.retry_at;
        drop(state);
        if due {
            self.feed();
        }
    }

    pub(super) fn status(&self) -> AnchorStatus {
        let state = lock(&self.state);
        let behind = state.behind_since.map(|since| self.clock.uptime().saturating_sub(since));
        AnchorStatus {
            anchored: true,
            configured: true,
            behind,
            records_behind: None,
            error: state.error.clone(),
        }
    }

    /// Feeds once.
    fn feed(&self) {
        let (wanted, kept) = {
            let mut state = lock(&self.state);
            let Some(wanted) = state.wanted.clone() else { return };
            state.feeding = true;
            (wanted, state.kept)
        };
        // Bytes that are wanted after this moment have not waited longer.
        let wanted_since = self.clock.uptime();
        let fed = match kept {
            Some((place, len)) if place == wanted.place && len <= wanted.len => {
                wanted.read_from(len).and_then(|bytes| match bytes.is_empty() {
                    true => Ok(()),
                    false => self.anchor.append(self.store, place, len, &bytes),
                })
            }
            _ => wanted
                .read_from(0)
                .and_then(|bytes| self.anchor.replace(self.store, wanted.place, &bytes)),
        };
        let mut state = lock(&self.state);
        state.feeding = false;
        match fed {
            Ok(()) => {
                if state.failures > 0 {
                    info!(store = %self.store, "anchor feed recovered");
                }
                state.kept = Some((wanted.place, wanted.len));
                (state.failures, state.error) = (0, None);
                state.behind_since = if state.is_up_to_date() { None } else { Some(wanted_since) };
                let since_us =
                    state.behind_since.map_or(UP_TO_DATE, |since| since.as_micros() as u64);
                self.behind_since_us.store(since_us, Ordering::Relaxed);
            }
            Err(error) => {
                self.counters.anchor_failures.fetch_add(1, Ordering::Relaxed);
                if state.failures == 0 {
                    warn!(store = %self.store, %error, "anchor feeding failed; will retry");
                }
                // The anchor may have a part of the bytes, so the next attempt replaces them all.
                state.kept = None;
                state.error = Some(error.to_string());
                let delay =
                    RETRY_AFTER.saturating_mul(1 << state.failures.min(5)).min(RETRY_AFTER_MAX);
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

    /// Waits at most 5 s until the anchor is up to date.
    ///
    /// # Errors
    /// The reason why it is not.
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

    /// Feeds the remaining bytes for at most 5 s, and ends the thread. Does not wait for a thread
    /// that hangs in a call to the anchor.
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
            warn!(store = %self.store, "store closed, anchor behind");
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
        if behind <= self.limit {
            Ok(())
        } else {
            Err(Error::AnchorBehind { behind, limit: self.limit })
        }
    }
}

impl fmt::Debug for Feeder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Feeder").field("anchor", &self.anchor).finish_non_exhaustive()
    }
}
