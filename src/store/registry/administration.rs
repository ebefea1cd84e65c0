//! The right to change a store, and the right to change one Logstore.
//!
//! An operation on a Logstore holds the lock of that Logstore ([`LogstoreAdministration`]) from
//! beginning to end, also while it calls a KMS. Only other operations on the same Logstore need
//! that lock. An operation holds the lock of the store ([`Administration`]) while it compares the
//! store with the state that it assumed, and commits. No KMS is called under it.

use std::sync::{Arc, Weak};

use tracing::warn;

use super::Registry;
use crate::{
    Error, Result,
    config::LogstoreName,
    crypto::SecretKey,
    io::Disk,
    keys::{
        AuditEvent,
        gate::GateKeys,
        lease::{Lease, LeaseListener},
    },
    logstore::{LogstoreShared, Meta, ShardTable, remove_older_meta},
    shard::Paused,
    store::catalogue::{Catalogue, Change, Entry},
    sync::{MutexGuard, NamedGuard, lock},
};

/// The state that the lock of the administration protects.
#[derive(Default)]
pub(super) struct AdminState {
    /// Set when a change of the catalogue failed and the catalogue could not be written again
    /// without it. The change may be in force after a crash, so nothing more is changed until the
    /// catalogue can be written.
    latched: Option<Error>,
    /// Whether the store was closed, or is being closed. A caller that waited for the lock must
    /// check this.
    closed: bool,
}

/// Holds the administration lock of a store. Every operation holds one while it changes the store,
/// except that the heads of shards are recorded without one. Its holder calls no KMS, and waits for
/// no lock that may be held across a KMS call.
pub(crate) struct Administration<'a> {
    registry: &'a Registry,
    state: MutexGuard<'a, AdminState>,
}

impl<'a> Administration<'a> {
    pub(super) fn new(registry: &'a Registry) -> Self {
        Self { registry, state: lock(&registry.admin) }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state.closed
    }

    pub(super) fn close(&mut self) {
        self.state.closed = true;
    }

    /// The failure of a change that may be in force after a crash, if there is one.
    pub(crate) fn latched(&self) -> Option<&Error> {
        self.state.latched.as_ref()
    }

    /// Prevents further changes of the catalogue.
    pub(crate) fn latch(&mut self, error: Error) {
        self.state.latched = Some(error);
    }

    /// Writes the catalogue again, in a new file, after a change of it has failed. The change is
    /// not in force from then on.
    ///
    /// # Errors
    /// The error of the failed change, if the catalogue cannot be written yet.
    pub(crate) fn unlatch(&mut self) -> Result<()> {
        let Some(error) = &self.state.latched else { return Ok(()) };
        self.registry.catalogue.rewrite().map_err(|_| error.clone())?;
        self.state.latched = None;
        for logstore in self.registry.open_logstores() {
            logstore.gate.resume();
        }
        Ok(())
    }

    /// Finds a Logstore, and opens it if it is not open.
    ///
    /// # Errors
    /// As [`Registry::logstore`].
    pub(crate) fn logstore(&mut self, name: &LogstoreName) -> Result<Arc<LogstoreShared>> {
        if self.state.closed {
            return Err(Error::Closed("the store"));
        }
        self.registry.find_or_open(name)
    }

    /// Opens a Logstore that this operation has created and committed.
    ///
    /// # Errors
    /// The error of starting a thread for its lease, and the integrity errors of its probe.
    pub(crate) fn open_created(
        &mut self,
        meta: Meta,
        entry: &Entry,
    ) -> Result<Arc<LogstoreShared>> {
        let keys = self.registry.keys.loaded_keys(&meta, entry.id)?;
        Ok(self.registry.open(meta, entry, keys))
    }

    /// Forgets an open Logstore that this operation has deleted from the catalogue, and returns it.
    /// The caller gives the administration back before it ends the shards.
    pub(crate) fn forget_deleted(&mut self, name: &LogstoreName) -> Option<Arc<LogstoreShared>> {
        let open = lock(&self.registry.open).remove(name)?;
        self.registry.keys.forget_leases_of(open.id);
        Some(open)
    }

    /// Checks that a Logstore is still there. An operation that gave the administration back calls
    /// this before it changes the Logstore.
    ///
    /// # Errors
    /// [`Error::LogstoreMissing`] if it was deleted, whether or not there is another one of its
    /// name.
    pub(crate) fn check_exists(&self, logstore: &Arc<LogstoreShared>) -> Result<()> {
        match lock(&self.registry.open).get(&logstore.name) {
            Some(open) if Arc::ptr_eq(open, logstore) => Ok(()),
            _ => Err(Error::LogstoreMissing(logstore.name.clone())),
        }
    }

    /// Appends a record about a Logstore to the key audit log.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn record(
        &mut self,
        event: AuditEvent,
        logstore: &LogstoreShared,
        detail: impl Into<String>,
    ) -> Result<()> {
        let subject = Some((&logstore.name, logstore.id));
        self.registry.keys.audit().record(event, subject, detail)
    }

    /// Changes the catalogue durably, and then in memory. Records the end of the audit log too.
    ///
    /// # Errors
    /// The error of the write or the sync. The administration latches if the catalogue cannot be
    /// written again without the changes.
    pub(crate) fn commit(&mut self, changes: Vec<Change>) -> Result<()> {
        self.unlatch()?;
        let changes = self.with_audit_head(changes);
        if changes.is_empty() {
            return Ok(());
        }
        let committed = self.registry.catalogue.commit(changes);
        self.latch_if_failed(committed)
    }

    /// As [`Administration::commit`], and adds `shards` shards to a Logstore. Writes the catalogue
    /// in a new file.
    ///
    /// # Errors
    /// As [`Administration::commit`].
    pub(super) fn commit_shards(
        &mut self,
        logstore: &LogstoreShared,
        changes: Vec<Change>,
        shards: usize,
    ) -> Result<()> {
        self.unlatch()?;
        let changes = self.with_audit_head(changes);
        let grow = |catalogue: &mut Catalogue| {
            changes.iter().try_for_each(|change| catalogue.apply(change))?;
            catalogue.add_shards(&logstore.name, logstore.id, shards)
        };
        let committed = self.registry.catalogue.rewrite_with(grow);
        self.latch_if_failed(committed)
    }

    fn with_audit_head(&self, mut changes: Vec<Change>) -> Vec<Change> {
        let known = self.registry.catalogue().audit.clone();
        let audit = self.registry.keys.audit().head_after(&known);
        if audit != known {
            changes.push(Change::Audited(audit));
        }
        changes
    }

    fn latch_if_failed(&mut self, committed: Result<()>) -> Result<()> {
        committed.inspect_err(|error| {
            self.latch(error.clone());
            let _ = self.unlatch();
        })
    }

    /// Syncs the tip of the catalogue, so that its last record cannot be cut off without a key.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn sync_tip(&mut self) -> Result<()> {
        self.registry.catalogue.sync_tip()
    }

    /// Writes the catalogue in a new file, under the newest version of the service key.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Fenced`].
    pub(crate) fn rewrite_catalogue(&mut self) -> Result<()> {
        self.registry.catalogue.rewrite()
    }

    /// Replaces the whole catalogue. Latches if that fails.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Fenced`].
    pub(crate) fn replace_catalogue(&mut self, catalogue: Catalogue) -> Result<()> {
        self.registry.catalogue.replace(catalogue).inspect_err(|error| self.latch(error.clone()))
    }

    /// Removes the older metadata of a Logstore. [`LogstoreAdministration::replace_meta`] has tried
    /// that, and has only logged a failure.
    ///
    /// # Errors
    /// [`Error::Io`] if a file of older metadata stays.
    pub(crate) fn remove_older_meta(&mut self, logstore: &LogstoreShared) -> Result<()> {
        remove_older_meta(&*self.registry.env.disk, &logstore.dir, &logstore.meta_reference())
    }

    /// Writes changed metadata into a file of its own. The caller commits it before it gives the
    /// administration back, so no other change comes between the metadata in force and this one.
    ///
    /// # Errors
    /// [`Error::Io`], and the errors of the lease.
    pub(crate) fn save_meta(
        &mut self,
        logstore: &Arc<LogstoreShared>,
        mut meta: Meta,
        data_key: Option<&SecretKey>,
    ) -> Result<SavedMeta> {
        self.unlatch()?;
        let Registry { env, keys, .. } = self.registry;
        meta.generation += 1;
        // The steps that can fail without a change come first.
        let gate_keys = match logstore.keys_section().as_deref() == meta.keys.as_ref() {
            false => Some(keys.gate_keys(meta.keys.as_ref(), logstore.id)?),
            true => None,
        };
        let byok = data_key.filter(|_| meta.keys.as_ref().is_some_and(|keys| keys.cmk.is_some()));
        meta.save(&*env.disk, &logstore.dir, env.id, logstore.id, &keys.keyring(), byok)?;
        env.reserve.note_document(&meta.reference().path(&logstore.dir));
        Ok(SavedMeta { logstore: Arc::clone(logstore), meta, gate_keys })
    }
}

/// Holds the administration lock of one Logstore. Every operation that changes the metadata of the
/// Logstore holds one, from the first look at the metadata to the commit. It may call KMSs.
///
/// Three operations do without it, so that they wait for no KMS of a customer: the deletion of the
/// Logstore, retention, and the rotation of the service key. Retention changes no metadata. The
/// rotation changes no content of the metadata, but authenticates it under another version, which
/// is another generation.
pub(crate) struct LogstoreAdministration<'a> {
    pub(super) registry: &'a Registry,
    name: LogstoreName,
    _one_at_a_time: NamedGuard<'a, LogstoreName>,
}

impl<'a> LogstoreAdministration<'a> {
    pub(super) fn new(registry: &'a Registry, name: &LogstoreName) -> Self {
        let guard = registry.administered.lock(name);
        Self { registry, name: name.clone(), _one_at_a_time: guard }
    }

    /// `None` if another operation holds the lock.
    pub(super) fn try_new(registry: &'a Registry, name: &LogstoreName) -> Option<Self> {
        let guard = registry.administered.try_lock(name)?;
        Some(Self { registry, name: name.clone(), _one_at_a_time: guard })
    }

    /// Finds the Logstore, and opens it if it is not open.
    ///
    /// # Errors
    /// As [`Registry::administer`] and [`Registry::logstore`].
    pub(crate) fn logstore(&self) -> Result<Arc<LogstoreShared>> {
        self.registry.administer()?.logstore(&self.name)
    }

    /// Appends the record of an intended change to the key audit log, unless the Logstore was
    /// deleted.
    ///
    /// # Errors
    /// As [`Registry::administer`]; [`Error::LogstoreMissing`]; [`Error::Io`].
    pub(crate) fn record_intent(
        &self,
        event: AuditEvent,
        logstore: &Arc<LogstoreShared>,
        detail: &str,
    ) -> Result<()> {
        let mut admin = self.registry.administer()?;
        admin.check_exists(logstore)?;
        admin.record(event, logstore, detail)
    }

    /// Puts changed metadata in force: writes its file, commits it to the catalogue, and then
    /// changes the memory. Calls `and_then` before another operation can change the store.
    /// `data_key` is the current data key if the keys have changed.
    ///
    /// Pausing the shards may call the KMS. The administration of the store is taken after that.
    ///
    /// # Errors
    /// As [`Registry::administer`]; [`Error::LogstoreMissing`] if the Logstore was deleted since
    /// the operation began; the error of the write or the commit; the error of a shard whose
    /// segment cannot be ended before a new data key; the error of `and_then`, with the change in
    /// force.
    pub(crate) fn replace_meta(
        &self,
        logstore: &Arc<LogstoreShared>,
        mut meta: Meta,
        data_key: Option<&SecretKey>,
        and_then: impl FnOnce(&mut Administration<'_>) -> Result<()>,
    ) -> Result<()> {
        let table = logstore.table();
        let paused = pause_for_new_key(logstore, &table, &mut meta);
        let (paused, mut changes) = paused.map_err(|error| self.registry.cause(logstore, error))?;
        let mut admin = self.registry.administer()?;
        admin.unlatch()?;
        admin.check_exists(logstore)?;
        // A rotation of the service key may have authenticated the metadata, and have added a
        // version, since this operation read it.
        meta.generation = logstore.generation();
        if logstore.keys_section().is_none()
            && let Some(section) = &mut meta.keys
        {
            section.since = meta.generation + 1;
            if let Some(key) = data_key {
                self.registry.keys.renew_first_envelope(section, logstore.id, key)?;
            }
        }
        let saved = admin.save_meta(logstore, meta, data_key)?;
        changes.push(saved.change());
        changes.extend(self.registry.retention_change(Some(&saved.meta.config), false));
        let committed = admin.commit(changes);
        committed.inspect_err(|error| {
            if !paused.is_empty() && admin.latched().is_some() {
                // The catalogue names the new metadata or the old one, and each would give a new
                // segment other keys.
                logstore.gate.halt(error);
            }
        })?;
        let leases =
            saved.take_effect(&*self.registry.env.disk, self.registry.keys.keyring().newest());
        for paused in &paused {
            paused.note_head();
        }
        drop(paused);
        let done = and_then(&mut admin);
        drop(admin);
        hear_of_loss(logstore, &leases);
        done
    }
}

/// Metadata that has a file, and that neither the catalogue nor the memory knows yet.
pub(crate) struct SavedMeta {
    logstore: Arc<LogstoreShared>,
    meta: Meta,
    /// The keys, if they have changed.
    gate_keys: Option<GateKeys>,
}

impl SavedMeta {
    /// The change of the catalogue.
    pub(crate) fn change(&self) -> Change {
        let (name, id) = (self.logstore.name.clone(), self.logstore.id);
        Change::Replaced { name, id, generation: self.meta.generation, tag: self.meta.tag }
    }

    /// Puts the metadata in force in memory, after the commit. The caller passes the leases to
    /// [`hear_of_loss`].
    pub(crate) fn take_effect(self, disk: &dyn Disk, keyring_version: u32) -> Vec<Arc<Lease>> {
        let leases = self.gate_keys.map(|keys| use_keys(&self.logstore, keys)).unwrap_or_default();
        let current = self.meta.reference();
        self.logstore.set_meta(self.meta, keyring_version);
        if let Err(error) = remove_older_meta(disk, &self.logstore.dir, &current) {
            // No reader uses it any more. The next change and the next opening try again.
            warn!(logstore = %self.logstore.name, %error, "older metadata not removed");
        }
        leases
    }
}

/// Pauses the shards of a Logstore that gets a new data key. The new key owns the segments from
/// the next ordinals on, so no shard may begin a segment before the key is in force. Sets these
/// ordinals in `meta`. Returns the paused shards and their heads as changes of the catalogue; the
/// older key adds nothing behind these heads. Returns nothing if the data key stays. May call the
/// KMS.
fn pause_for_new_key<'a>(
    logstore: &LogstoreShared,
    table: &'a ShardTable,
    meta: &mut Meta,
) -> Result<(Vec<Paused<'a>>, Vec<Change>)> {
    let before = logstore.keys_section();
    let Some(section) = &mut meta.keys else { return Ok(Default::default()) };
    if before.as_ref().is_some_and(|before| before.current == section.current) {
        return Ok(Default::default());
    }
    if before.is_some() {
        end_segments(table)?;
    }
    let paused: Vec<_> = table.shards().iter().map(|shard| shard.pause()).collect::<Result<_>>()?;
    if let Some(newest) = section.versions.last_mut() {
        newest.ordinals = paused.iter().map(Paused::next_ordinal).collect::<Result<_>>()?;
    }
    let heads = paused.iter().filter_map(|paused| Some((paused.shard_id(), paused.head()?)));
    let changes = heads
        .map(|(shard, head)| Change::reached(&logstore.name, logstore.id, shard, head))
        .collect();
    Ok((paused, changes))
}

/// Ends the last segment of each shard, including one that a killed process left open.
///
/// # Errors
/// A damaged shard must be repaired first: an open segment would let the older key add blocks to
/// it.
fn end_segments(table: &ShardTable) -> Result<()> {
    table.shards().iter().try_for_each(|shard| shard.end_segment_if(|_| true).map(drop))
}

/// Puts changed keys into the gate of a Logstore. Returns their leases, which the caller passes to
/// [`hear_of_loss`] after the metadata is in force.
pub(super) fn use_keys(logstore: &LogstoreShared, keys: GateKeys) -> Vec<Arc<Lease>> {
    let leases = keys.leases().cloned().collect();
    logstore.gate.replace_keys(keys);
    leases
}

/// Makes a Logstore listen to its leases, and reports a loss that happened before it listened.
pub(crate) fn hear_of_loss(logstore: &Arc<LogstoreShared>, leases: &[Arc<Lease>]) {
    for lease in leases {
        let listener: Weak<dyn LeaseListener> = Arc::<LogstoreShared>::downgrade(logstore);
        lease.listen(listener);
        // The lease may have reported a loss to its listeners just before this one was added.
        if let Some(Err(refusal)) = lease.told() {
            lease.tell_late(Arc::clone(logstore) as _, refusal);
        }
    }
}
