//! The Logstores of a store: the catalogue, the open Logstores, and the right to change them.

mod administration;
mod follow;
mod open;
mod resharding;
mod service_key;

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    sync::{Arc, Weak},
};

use super::{
    anchor::Feeder,
    catalogue::{Catalogue, Change, Entry, Journal},
    env::StoreEnv,
    keys::KeyService,
    lock::StoreLock,
    scheduler::Scheduler,
    trusted_clock::must_record,
};
use crate::{
    Error, Result,
    config::{LogstoreConfig, LogstoreName},
    epoch::Fence,
    ids::LogstoreId,
    io::FileKind,
    logstore::LogstoreShared,
    shard::{Budget, Head, Helpers, ReaderPermits, Shard},
    sync::{LockRank, Mutex, MutexGuard, NamedLocks, RwLockReadGuard, lock},
};

use administration::AdminState;
pub(crate) use administration::{Administration, LogstoreAdministration, hear_of_loss};

/// The Logstores of an open store.
///
/// It finds and opens Logstores, and a store that is open for reading follows the changes of the
/// writer here. A change of the store goes through an [`Administration`]. Only the heads of shards
/// are recorded without one, by [`Registry::record_heads`] and at a roll: a head changes no
/// Logstore.
pub(crate) struct Registry {
    /// For the observers and listeners that Logstores, leases and a reader's shards keep.
    this: Weak<Registry>,
    env: Arc<StoreEnv>,
    keys: Arc<KeyService>,
    catalogue: Arc<Journal>,
    /// Detects that another writer has taken over. `None` in a store that is open for reading.
    fence: Option<Arc<Fence>>,
    wiring: Wiring,
    /// Serializes the changes of the store. Only [`Administration`] reads or changes it.
    admin: Mutex<AdminState>,
    /// Serializes the operations on each Logstore. Only [`LogstoreAdministration`] takes it.
    administered: NamedLocks<LogstoreName>,
    /// Held while retention or a deletion removes files.
    removing: Mutex<()>,
    /// Held while the store is closed, so that a second caller waits for the first.
    closing: Mutex<()>,
    /// A simulation needs the fixed order of the map.
    open: Mutex<BTreeMap<LogstoreName, Arc<LogstoreShared>>>,
    /// The advisory lock, held while the store is open for writing.
    held: Mutex<Option<StoreLock>>,
}

/// The parts of a store that its Logstores share.
pub(crate) struct Wiring {
    pub(crate) scheduler: Arc<Scheduler>,
    pub(crate) budget: Arc<Budget>,
    pub(crate) helpers: Arc<Helpers>,
    pub(crate) permits: ReaderPermits,
    pub(crate) anchor: Option<Arc<Feeder>>,
}

/// A store that is being closed.
pub(crate) struct Closing<'a> {
    _one_at_a_time: MutexGuard<'a, ()>,
    /// Whether no earlier caller has closed the store.
    pub(crate) is_first: bool,
    /// The heads that are to be recorded.
    heads: Vec<Change>,
    result: Result<()>,
}

impl Registry {
    /// `held` and `fence` are `None` in a store that is open for reading.
    pub(crate) fn new(
        env: Arc<StoreEnv>,
        keys: Arc<KeyService>,
        catalogue: Journal,
        fence: Option<Arc<Fence>>,
        held: Option<StoreLock>,
        wiring: Wiring,
    ) -> Arc<Self> {
        Arc::new_cyclic(|this| Self {
            this: Weak::clone(this),
            env,
            keys,
            catalogue: Arc::new(catalogue),
            fence,
            wiring,
            admin: Mutex::new(LockRank::Admin, AdminState::default()),
            administered: NamedLocks::new(LockRank::LogstoreAdmin),
            removing: Mutex::new(LockRank::Removal, ()),
            closing: Mutex::new(LockRank::Closing, ()),
            open: Mutex::new(LockRank::Logstores, BTreeMap::new()),
            held: Mutex::new(LockRank::StoreLock, held),
        })
    }

    /// Checks that the store is open for writing, in this process, and that its service key may be
    /// used. Blocks for a KMS call if the last answer is too old.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Closed`], [`Error::Forked`], [`Error::ServiceKey`].
    pub(crate) fn check_writable(&self) -> Result<()> {
        self.check_open_for_writing()?;
        self.keys.admit_service_key()
    }

    fn check_open_for_writing(&self) -> Result<()> {
        self.keys.check_process()?;
        if self.env.read_only {
            return Err(Error::ReadOnly);
        }
        if lock(&self.held).is_none() {
            return Err(Error::Closed("the store"));
        }
        Ok(())
    }

    /// The right to change the store. Waits for the change that is under way. Calls no KMS: the
    /// operation has begun with [`Registry::check_writable`], and the last answer about the service
    /// key decides. So the caller may hold locks of shards, of the keyring and of removal.
    ///
    /// # Errors
    /// As [`Registry::check_writable`].
    pub(crate) fn administer(&self) -> Result<Administration<'_>> {
        self.check_open_for_writing()?;
        self.keys.check_service_key()?;
        let mut admin = self.exclusive();
        if admin.is_closed() {
            return Err(Error::Closed("the store"));
        }
        // An operation that needs the catalogue tries this again, and returns the error.
        let _ = admin.unlatch();
        Ok(admin)
    }

    /// The right to change one Logstore, or to create it. Waits for the operation on the same name
    /// that is under way, also while that operation calls a KMS.
    ///
    /// # Errors
    /// As [`Registry::check_writable`].
    pub(crate) fn administer_logstore(
        &self,
        name: &LogstoreName,
    ) -> Result<LogstoreAdministration<'_>> {
        self.check_writable()?;
        Ok(LogstoreAdministration::new(self, name))
    }

    /// As [`Registry::administer_logstore`], but returns `None` where that would wait.
    ///
    /// # Errors
    /// As [`Registry::check_writable`].
    pub(crate) fn try_administer_logstore(
        &self,
        name: &LogstoreName,
    ) -> Result<Option<LogstoreAdministration<'_>>> {
        self.check_writable()?;
        Ok(LogstoreAdministration::try_new(self, name))
    }

    /// The error of a step that an operation made without the administration. Another thread may
    /// have deleted the Logstore or closed the store meanwhile. Then the error is a consequence,
    /// and this returns the cause.
    pub(crate) fn cause(&self, logstore: &Arc<LogstoreShared>, error: Error) -> Error {
        match self.administer().and_then(|admin| admin.check_exists(logstore)) {
            Err(cause @ (Error::LogstoreMissing(_) | Error::Closed(_))) => cause,
            _ => error,
        }
    }

    /// The right to remove files of segments: by retention, or of deleted Logstores. Waits for the
    /// removal that is under way.
    pub(crate) fn remove_files(&self) -> MutexGuard<'_, ()> {
        lock(&self.removing)
    }

    /// Keeps changes out, also in a store that is open for reading or closed.
    pub(crate) fn exclusive(&self) -> Administration<'_> {
        Administration::new(self)
    }

    /// Whether the store was closed, or is being closed.
    pub(crate) fn is_closed(&self) -> bool {
        self.exclusive().is_closed()
    }

    /// The catalogue, up to the last durable change. The caller must not commit while it holds
    /// this guard.
    pub(crate) fn catalogue(&self) -> RwLockReadGuard<'_, Catalogue> {
        self.catalogue.now()
    }

    /// The names of all Logstores in the catalogue.
    pub(crate) fn names(&self) -> Vec<LogstoreName> {
        self.catalogue().logstores.keys().cloned().collect()
    }

    /// The names of all Logstores. A store that is open for reading reads the catalogue again.
    ///
    /// # Errors
    /// As [`Registry::reload_catalogue`].
    pub(crate) fn list(&self) -> Result<Vec<LogstoreName>> {
        if self.env.read_only {
            self.keys.admit_service_key()?;
        }
        self.reload_catalogue()?;
        Ok(self.names())
    }

    /// The catalogue's entry of a Logstore.
    ///
    /// # Errors
    /// [`Error::LogstoreMissing`].
    pub(crate) fn entry(&self, name: &LogstoreName) -> Result<Entry> {
        let entry = self.catalogue().logstores.get(name).cloned();
        entry.ok_or_else(|| Error::LogstoreMissing(name.clone()))
    }

    /// Finds a Logstore, and opens it if it is not open. Calls no KMS of a customer. Opening waits
    /// for the change of the store that is under way; finding an open Logstore in a store that is
    /// open for writing does not.
    ///
    /// # Errors
    /// [`Error::LogstoreMissing`], [`Error::Closed`], and the integrity errors of the metadata.
    /// [`Error::ServiceKey`] for a Logstore that is not open.
    pub(crate) fn logstore(&self, name: &LogstoreName) -> Result<Arc<LogstoreShared>> {
        self.keys.check_process()?;
        if self.env.read_only {
            self.keys.admit_service_key()?;
            return self.find_or_open_to_read(name);
        }
        if lock(&self.held).is_none() {
            return Err(Error::Closed("the store"));
        }
        if let Some(open) = lock(&self.open).get(name) {
            return Ok(Arc::clone(open));
        }
        self.keys.admit_service_key()?;
        self.exclusive().logstore(name)
    }

    /// The Logstores that are open now.
    pub(crate) fn open_logstores(&self) -> Vec<Arc<LogstoreShared>> {
        lock(&self.open).values().cloned().collect()
    }

    /// The directories of Logstores that the catalogue does not list, and whether segments may be
    /// in them. Ignores symlinks and files. The caller holds the administration.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn unlisted(&self) -> Result<Vec<(PathBuf, bool)>> {
        let disk = &*self.env.disk;
        let parent = self.env.logstores_dir();
        let known: HashSet<String> = {
            let catalogue = self.catalogue();
            let ids = catalogue.logstores.values().map(|entry| entry.id);
            ids.chain(catalogue.deleting.iter().copied()).map(|id| id.to_string()).collect()
        };
        let mut unlisted = Vec::new();
        for entry in disk.list_dir(&parent).map_err(Error::io("list", &parent))? {
            let is_dir = entry.kind == FileKind::Directory;
            if !is_dir || known.contains(&entry.name) || entry.name.parse::<LogstoreId>().is_err() {
                continue;
            }
            let dir = parent.join(&entry.name);
            // A directory that cannot be listed may have segments in it.
            let has_files = |shard: &std::path::Path| {
                disk.list_dir(shard).map_or(true, |files| !files.is_empty())
            };
            let may_have_segments = disk.list_dir(&dir).map_or(true, |parts| {
                let mut dirs = parts.iter().filter(|part| part.kind == FileKind::Directory);
                dirs.any(|part| has_files(&dir.join(&part.name)))
            });
            unlisted.push((dir, may_have_segments));
        }
        Ok(unlisted)
    }

    /// Records in the catalogue the end of the synced part of each open segment, so that an
    /// attacker without a key can cut off no more than the last few seconds unnoticed.
    ///
    /// # Errors
    /// The error of the commit.
    pub(crate) fn record_heads(&self) -> Result<()> {
        let mut heads = Vec::new();
        for logstore in self.open_logstores() {
            for shard in logstore.table().shards() {
                heads.extend(
                    shard
                        .take_reached()
                        .map(|head| (Arc::clone(&logstore), Arc::clone(shard), head)),
                );
            }
        }
        if !heads.is_empty() {
            let change = |(logstore, shard, head): &(Arc<LogstoreShared>, Arc<Shard>, Head)| {
                Change::reached(&logstore.name, logstore.id, shard.id(), head.clone())
            };
            let recorded = self.catalogue.commit(heads.iter().map(change).collect());
            for (_, shard, head) in heads {
                match recorded {
                    Ok(()) => shard.note_head(&head),
                    Err(_) => shard.give_back(head),
                }
            }
            recorded?;
        }
        self.catalogue.sync_tip()
    }

    /// The state of retention as a change of the catalogue, if it is to be recorded now. With
    /// `beside`, another change is recorded in any case. `limited` has the settings of a Logstore
    /// that the catalogue may not know to have limits.
    pub(crate) fn retention_change(
        &self,
        limited: Option<&LogstoreConfig>,
        beside: bool,
    ) -> Option<Change> {
        let known = self.catalogue().retention;
        let has_limit =
            limited.is_some_and(|it| it.ttl_days.is_some() || it.retention_bytes.is_some());
        if known.is_none() && !has_limit {
            return None;
        }
        let by_age = known.is_some_and(|known| known.trusted_us.is_some())
            || limited.is_some_and(|limited| limited.ttl_days.is_some());
        let now = self.env.trusted.state(by_age);
        let is_due = known.is_none_or(|known| match beside {
            true => known != now,
            false => must_record(&known, &now),
        });
        is_due.then_some(Change::Retained(now))
    }

    /// The anchor of a store that is open for writing.
    pub(crate) fn anchor(&self) -> Option<&Arc<Feeder>> {
        self.wiring.anchor.as_ref()
    }

    /// Copies the catalogue to the anchor, from now on and after each change.
    pub(crate) fn feed_anchor(&self, feeder: &Arc<Feeder>) {
        self.catalogue.feed(Arc::clone(feeder));
    }

    /// How much of the memory budget is used, in bytes.
    pub(crate) fn pending_bytes(&self) -> u64 {
        self.wiring.budget.used() as u64
    }

    /// The queue of the background jobs.
    pub(crate) fn scheduler(&self) -> &Scheduler {
        &self.wiring.scheduler
    }

    /// Begins to close the store: refuses changes from now on, and seals every segment. An operation
    /// that waits for a KMS is not waited for: it finds the store closed before it changes anything.
    pub(crate) fn begin_close(&self) -> Closing<'_> {
        let one_at_a_time = lock(&self.closing);
        let is_first = {
            let mut admin = self.exclusive();
            let is_first = lock(&self.held).is_some() && !admin.is_closed();
            admin.close();
            is_first
        };
        let (mut heads, mut result) = (Vec::new(), Ok(()));
        if is_first {
            if self.keys.is_service_key_usable() {
                self.keys.audit().record_omitted();
            }
            for logstore in self.open_logstores() {
                for shard in logstore.table().shards() {
                    match shard.close() {
                        Ok(Some(head)) => heads.push(Change::reached(
                            &logstore.name,
                            logstore.id,
                            shard.id(),
                            head,
                        )),
                        Ok(None) => {}
                        Err(error) => result = Err(error),
                    }
                    result = result.and(shard.report_lost());
                }
            }
        }
        Closing { _one_at_a_time: one_at_a_time, is_first, heads, result }
    }

    /// Records the heads in the catalogue, with `changes`. Returns whether they are recorded.
    pub(crate) fn record_close(&self, closing: &mut Closing<'_>, changes: Vec<Change>) -> bool {
        let mut all = std::mem::take(&mut closing.heads);
        all.extend(changes);
        let known_us = self.catalogue().retention.map(|known| known.retained_us);
        let has_run = known_us.is_some_and(|us| us != self.env.trusted.state(false).retained_us);
        all.extend(self.retention_change(None, has_run || !all.is_empty()));
        let mut admin = self.exclusive();
        if !closing.is_first || admin.latched().is_some() {
            return false;
        }
        let recorded = admin.commit(all).and_then(|()| admin.sync_tip());
        let is_recorded = recorded.is_ok();
        closing.result = std::mem::replace(&mut closing.result, Ok(())).and(recorded);
        is_recorded
    }

    /// Closes the gates: other calls of handles are refused from now on.
    ///
    /// # Errors
    /// The last error of a shard, or that of the commit.
    pub(crate) fn end_close(&self, closing: Closing<'_>) -> Result<()> {
        for logstore in self.open_logstores() {
            logstore.close_gate("the store");
        }
        closing.result
    }

    /// Ends the threads, and releases the Logstores and the advisory lock.
    pub(crate) fn stop(&self) {
        self.wiring.scheduler.stop();
        if let Some(anchor) = &self.wiring.anchor {
            anchor.stop();
        }
        self.wiring.helpers.stop();
        lock(&self.open).clear();
        let held = lock(&self.held).take();
        if let Some(held) = held {
            held.release();
        }
    }
}
