//! Opening a Logstore: its metadata, its gate and its shards.

use std::{
    path::Path,
    sync::{Arc, Weak},
};

use tracing::warn;

use super::Registry;
use crate::{
    Error, Result,
    config::LogstoreName,
    error::Location,
    io::{self, Disk},
    keys::{
        gate::{FollowWriter, Gate, GateKeys},
        keyring::Keyring,
        lease::LeaseListener,
    },
    logstore::{KeyObserver, LogstoreShared, Meta, remove_older_meta, shard_dir, write_plan},
    shard::{
        AdmitAppend, CurrentPlan, RecordLostGroups, ReloadRecord, Shard, ShardContext,
        ShardOptions, ShardRecord,
    },
    store::{anchor::AnchorLimit, catalogue::Entry},
    sync::lock,
};

impl Registry {
    /// Finds or opens a Logstore of a store that is open for writing. The caller holds the
    /// administration.
    pub(super) fn find_or_open(&self, name: &LogstoreName) -> Result<Arc<LogstoreShared>> {
        if let Some(open) = lock(&self.open).get(name) {
            return Ok(Arc::clone(open));
        }
        let entry = self.entry(name)?;
        let (meta, bytes) = self.load_meta_file(name, &entry)?;
        let (disk, dir) = (&*self.env.disk, self.env.logstore_dir(entry.id));
        let path = entry.meta().path(&dir);
        meta.features.check_writing().map_err(|error| error.in_file(&path, 0))?;
        self.env.reserve.note_document(&path);
        if let Err(error) = io::mend(disk, &path, &bytes) {
            warn!(logstore = %name, %error, "second copy of the metadata not written");
        }
        if let Err(error) = remove_older_meta(disk, &dir, &entry.meta()) {
            warn!(logstore = %name, %error, "older metadata not removed");
        }
        let keys = self.keys.loaded_keys(&meta, entry.id)?;
        Ok(self.open(meta, &entry, keys))
    }

    /// Reads the metadata that an entry of the catalogue names.
    pub(crate) fn load_meta(&self, name: &LogstoreName, entry: &Entry) -> Result<Meta> {
        self.load_meta_file(name, entry).map(|(meta, _)| meta)
    }

    /// As [`Registry::load_meta`]. Returns the bytes of the file too.
    pub(crate) fn load_meta_file(
        &self,
        name: &LogstoreName,
        entry: &Entry,
    ) -> Result<(Meta, Vec<u8>)> {
        let dir = self.env.logstore_dir(entry.id);
        let load = |keyring: &Keyring| {
            Meta::load(&*self.env.disk, &dir, self.env.id, entry.id, keyring, &entry.meta())
        };
        let (meta, bytes) = self.keys.with_keyring(load)?;
        if meta.config.name != *name || meta.keys.as_ref().is_some_and(|keys| keys.name != *name) {
            return Err(Error::Tampered {
                at: Location::new(&dir, 0),
                what: "the metadata under another name",
            });
        }
        let (shards, recorded) = (meta.config.shards.len(), entry.shards.len());
        if shards != recorded {
            let what = format!(
                "the catalogue has {recorded} shards of Logstore {name}, its metadata {shards}"
            );
            return Err(Error::corrupt(Location::new(self.catalogue.path(), 80), what));
        }
        Ok((meta, bytes))
    }

    /// Opens a Logstore with this metadata and these keys, and keeps it. The caller holds the
    /// administration.
    pub(super) fn open(&self, meta: Meta, entry: &Entry, keys: GateKeys) -> Arc<LogstoreShared> {
        let logstore = self.build(meta, entry, keys);
        lock(&self.open).insert(logstore.name.clone(), Arc::clone(&logstore));
        logstore
    }

    fn build(&self, meta: Meta, entry: &Entry, keys: GateKeys) -> Arc<LogstoreShared> {
        let leases: Vec<_> = keys.leases().cloned().collect();
        let gate = Arc::new(self.keys.new_gate(&meta.config.name, entry.id, keys));
        let plan = self.plan(&meta);
        let context = Arc::new(self.shard_context(gate, Arc::clone(&plan)));
        let observer: Weak<dyn KeyObserver> =
            Arc::<crate::store::keys::KeyService>::downgrade(&self.keys);
        let dir = self.env.logstore_dir(entry.id);
        let logstore =
            Arc::new(LogstoreShared::new(&dir, meta, plan, context, &entry.shards, observer));
        if self.env.read_only {
            // Another master key takes effect within `revalidate_every`, and a new version of the
            // data key as soon as a segment uses it.
            let (writer, every): (Weak<dyn FollowWriter>, _) =
                (self.this.clone(), self.env.options.revalidate_every);
            logstore.gate.follow_with(writer, Arc::clone(&self.env.clock), every);
        }
        for lease in leases {
            let listener: Weak<dyn LeaseListener> = Arc::<LogstoreShared>::downgrade(&logstore);
            lease.listen(listener);
            // The lease may have reported its state to its listeners before this one was added.
            match lease.told() {
                Some(Ok(())) => logstore.returned(),
                Some(Err(refusal)) => logstore.note_lost(&refusal),
                None => {}
            }
        }
        logstore
    }

    fn plan(&self, meta: &Meta) -> Arc<CurrentPlan> {
        Arc::new(CurrentPlan::new(write_plan(meta, self.keys.keyring().newest())))
    }

    fn shard_context(&self, gate: Arc<Gate>, plan: Arc<CurrentPlan>) -> ShardContext {
        let lost: Weak<dyn RecordLostGroups> =
            Arc::<crate::store::keys::KeyService>::downgrade(&self.keys);
        ShardContext {
            disk: Arc::clone(&self.env.disk),
            clock: Arc::clone(&self.env.clock),
            random: Arc::clone(&self.env.random),
            wake: Arc::clone(&self.wiring.scheduler) as _,
            budget: Arc::clone(&self.wiring.budget),
            helpers: Arc::clone(&self.wiring.helpers),
            gate,
            options: self.shard_options(),
            read_only: self.env.read_only,
            heads: Arc::clone(&self.catalogue) as _,
            fence: self.fence.clone(),
            limit: self.append_limit(),
            plan,
            permits: self.wiring.permits.clone(),
            reload: self.env.read_only.then(|| self.this.clone() as Weak<dyn ReloadRecord>),
            lost,
        }
    }

    /// The shards of an open Logstore by the files in another directory, for reading: each has this
    /// record, and no list of segments that the writer keeps. `meta` is the metadata beside them.
    pub(crate) fn shards_in(
        &self,
        logstore: &LogstoreShared,
        meta: &Meta,
        disk: &Arc<dyn Disk>,
        dir: &Path,
        records: &[ShardRecord],
    ) -> Vec<Arc<Shard>> {
        let context = Arc::new(ShardContext {
            disk: Arc::clone(disk),
            read_only: true,
            fence: None,
            limit: None,
            reload: None,
            ..self.shard_context(Arc::clone(&logstore.gate), self.plan(meta))
        });
        let shard = |(id, record): (u32, &ShardRecord)| {
            Shard::new(Arc::clone(&context), id, shard_dir(dir, id), record.clone())
        };
        (0..).zip(records).map(shard).collect()
    }

    /// Refuses appends while the anchor is too far behind, if the options ask for that.
    fn append_limit(&self) -> Option<Arc<dyn AdmitAppend>> {
        let (feeder, limit) = (Arc::clone(self.anchor()?), self.env.options.anchor_required?);
        Some(Arc::new(AnchorLimit { feeder, limit }))
    }

    fn shard_options(&self) -> ShardOptions {
        let options = &self.env.options;
        ShardOptions {
            block_bytes: options.block_bytes,
            linger: options.linger,
            segment_bytes: options.segment_bytes,
            segment_age: options.segment_age,
            threads: self.env.has_threads(),
            reopen_full_shards: options.reopen_full_shards,
        }
    }
}
