//! A Logstore: its configuration, its keys and its shards.

mod meta;
mod shards;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::Serialize;
use tracing::debug;

use crate::{
    Error, Result,
    config::{EncryptType, LogstoreConfig, LogstoreName, ShardInfo},
    ids::LogstoreId,
    key_status::{KeyStatus, Refusal},
    keys::{
        envelope::{DataKeyVersion, KeysSection},
        gate::Gate,
        lease::{Lease, LeaseListener},
        sealing::LostShard,
    },
    kms::{Cmk, KmsError},
    metrics::LogstoreMetrics,
    segment::{BLOCK_OVERHEAD_BYTES, DecodedHeader, Footer, KeySource},
    shard::{
        AcceptedLoss, AppendFuture, Appended, CurrentPlan, Durability, End, Follow, MergedPosition,
        MergedReader, NotTaken, Payload, ReadOptions, Reader, RecoveryNotice, Route, Shard,
        ShardChoice, ShardContext, ShardLoss, ShardRecord, Ticket, WaitFor, WritePlan,
    },
    sync::{LockRank, Mutex, MutexGuard, lock},
};

use shards::Shards;

pub(crate) use meta::{Meta, MetaName, MetaRef, remove_older as remove_older_meta};
pub(crate) use shards::ShardTable;

/// The options of an append.
///
/// ```
/// use envelog::{AppendOptions, Durability, ShardChoice};
/// let options = AppendOptions::default().durability(Durability::Buffered).shard(ShardChoice::Shard(0));
/// # assert_eq!(options.durability, Durability::Buffered);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct AppendOptions {
    /// The shard; round robin by default.
    pub shard: ShardChoice,
    /// The failure that an acknowledged append survives; [`Durability::Synced`] by default.
    pub durability: Durability,
}

impl AppendOptions {
    setters! {
        shard: ShardChoice;
        durability: Durability;
    }
}

/// The part of the limit of a shard that a segment may have, unless it is smaller than
/// [`SEGMENT_BYTES_MIN`].
const SEGMENTS_IN_LIMIT: u64 = 8;
/// The least size at which a limit of the shard has a segment sealed, in bytes.
const SEGMENT_BYTES_MIN: u64 = 16 << 10;

/// Implemented by the store. A Logstore reports the loss and the return of its key here, after the
/// engine has acted on it.
pub(crate) trait KeyObserver: Send + Sync {
    fn key_lost(&self, logstore: &LogstoreShared, refusal: &Refusal);
    fn key_returned(&self, logstore: &LogstoreShared);
    /// The version of the master key that wraps an envelope, if the KMS reports it.
    fn envelope_version(&self, cmk: &Cmk, version: &DataKeyVersion) -> Option<String>;
    /// In a store without threads: renews the lease of the service key if that is due, and acts on
    /// its loss or its return. Calls the KMS.
    fn tend_service_key(&self);
}

/// Implemented by the store. The store stays open while this lives.
pub(crate) trait KeepsOpen: std::fmt::Debug + Send + Sync {}

/// The bytes of the segments under the current data key. Each check continues the count of the
/// previous one.
#[derive(Debug, Default)]
pub(crate) struct BytesUnderKey {
    pub(crate) version: u32,
    /// For each shard, the first ordinal that is not counted finally, and the bytes of the segments
    /// before it.
    pub(crate) shards: Vec<(u64, u64)>,
    /// The uptime at which a failed rotation is tried again.
    pub(crate) retry_at: Duration,
}

/// An open Logstore, shared by the store and its handles.
pub(crate) struct LogstoreShared {
    pub(crate) name: LogstoreName,
    pub(crate) id: LogstoreId,
    pub(crate) dir: PathBuf,
    pub(crate) gate: Arc<Gate>,
    meta: Mutex<Meta>,
    shards: Shards,
    /// For shards that are added.
    context: Arc<ShardContext>,
    /// The count for automatic rotation of the data key.
    bytes_under_key: Mutex<BytesUnderKey>,
    plan: Arc<CurrentPlan>,
    observer: std::sync::Weak<dyn KeyObserver>,
    threads: bool,
}

impl std::fmt::Debug for LogstoreShared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Logstore")
            .field("name", &self.name)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// The keys and settings for new segments of a Logstore.
pub(crate) fn write_plan(meta: &Meta, keyring_version: u32) -> WritePlan {
    let enabled = meta.config.encrypt_conf.as_ref().is_some_and(|conf| conf.enable);
    let (suite, key_source) = match &meta.keys {
        Some(keys) => (keys.encrypt_type.suite(), KeySource::DataKey(keys.current)),
        None => (EncryptType::Aes.suite(), KeySource::Keyring(keyring_version)),
    };
    WritePlan {
        suite: if enabled && meta.keys.is_some() { suite } else { suite.integrity_only() },
        key_source,
        compression: meta.config.compression,
        payload_hash: meta.config.payload_hash,
        generation: meta.generation,
        segment_bytes_max: meta
            .config
            .retention_bytes
            .map_or(u64::MAX, |limit| (limit / SEGMENTS_IN_LIMIT).max(SEGMENT_BYTES_MIN)),
    }
}

impl LogstoreShared {
    pub(crate) fn new(
        dir: &Path,
        meta: Meta,
        plan: Arc<CurrentPlan>,
        context: Arc<ShardContext>,
        records: &[ShardRecord],
        observer: std::sync::Weak<dyn KeyObserver>,
    ) -> Self {
        let all = meta.config.shards.iter().map(|it| new_shard(&context, dir, it.id, records));
        Self {
            name: meta.config.name.clone(),
            id: context.gate.id(),
            dir: dir.to_owned(),
            gate: Arc::clone(&context.gate),
            shards: Shards::new(&meta.config.shards, all.collect()),
            meta: Mutex::new(LockRank::LogstoreMeta, meta),
            bytes_under_key: Mutex::new(LockRank::BytesUnderKey, BytesUnderKey::default()),
            plan,
            observer,
            threads: context.options.threads,
            context,
        }
    }

    /// The metadata in force.
    pub(crate) fn meta(&self) -> Meta {
        lock(&self.meta).clone()
    }

    /// The configuration in force.
    pub(crate) fn config(&self) -> LogstoreConfig {
        lock(&self.meta).config.clone()
    }

    /// The generation of the metadata in force.
    pub(crate) fn generation(&self) -> u64 {
        lock(&self.meta).generation
    }

    /// The name of the metadata in force.
    pub(crate) fn meta_reference(&self) -> MetaRef {
        lock(&self.meta).reference()
    }

    /// The count for automatic rotation of the data key.
    pub(crate) fn bytes_under_key(&self) -> MutexGuard<'_, BytesUnderKey> {
        lock(&self.bytes_under_key)
    }

    /// Puts changed metadata in force: later appends follow it.
    pub(crate) fn set_meta(&self, meta: Meta, keyring_version: u32) {
        self.plan.replace(write_plan(&meta, keyring_version));
        *lock(&self.meta) = meta;
    }

    pub(crate) fn lease(&self) -> Option<Arc<Lease>> {
        self.gate.keys().lease
    }

    pub(crate) fn keys_section(&self) -> Option<Arc<KeysSection>> {
        self.gate.keys().section
    }

    /// Access is lost: wipes the keys, and returns the shards that have still to be sealed. Groups
    /// that were not acknowledged fail with `error`.
    pub(crate) fn wipe_keys(&self, error: &Error) -> Vec<Arc<dyn LostShard>> {
        let loss = self.gate.lose();
        let lost = |shard: &Arc<Shard>| -> Arc<dyn LostShard> {
            Arc::new(ShardLoss { shard: Arc::clone(shard), loss, error: error.clone() })
        };
        let table = self.table();
        table.shards().iter().for_each(|shard| shard.wake_followers());
        table.shards().iter().filter(|shard| !shard.is_read_only()).map(lost).collect()
    }

    /// Refuses every use of the keys from now on, because this thing was closed or deleted. The
    /// followers wake after that, and get the error.
    pub(crate) fn close_gate(&self, what: &'static str) {
        self.gate.close(what);
        self.table().shards().iter().for_each(|shard| shard.wake_followers());
    }

    /// Marks the Logstore deleted: every handle refuses calls from now on. Waits for no KMS.
    pub(crate) fn delete(&self) {
        for shard in self.table().shards() {
            shard.refuse_appends();
        }
        self.close_gate("the Logstore");
        for shard in self.table().shards() {
            shard.abandon_soon();
        }
    }

    /// In a store without threads: acts on a loss or a return of the key that was noticed.
    fn act_on_losses(&self) {
        if !self.threads {
            if let Some(observer) = self.observer.upgrade() {
                observer.tend_service_key();
            }
            self.gate.keys().leases().for_each(|lease| lease.tell());
        }
    }

    fn shard(&self, id: u32) -> Result<Arc<Shard>> {
        let find = || self.table().get(id).cloned();
        // The writer may have split a shard since this process has looked.
        let found = find().or_else(|| {
            self.look_for_shards();
            find()
        });
        found.ok_or_else(|| Error::ShardMissing { logstore: self.name.clone(), shard: id })
    }

    /// The shards at this moment, by their numbers.
    pub(crate) fn table(&self) -> Arc<ShardTable> {
        self.shards.table()
    }

    /// A table with these shards, which takes effect with [`LogstoreShared::put_table`]. `records`
    /// has what the catalogue knows of the new ones.
    pub(crate) fn changed_table(
        &self,
        infos: &[ShardInfo],
        records: &[ShardRecord],
    ) -> Arc<ShardTable> {
        let create = |id| new_shard(&self.context, &self.dir, id, records);
        self.shards.changed(infos, create)
    }

    /// Puts a table in force for the appends that choose their shard from now on.
    pub(crate) fn put_table(&self, table: Arc<ShardTable>) {
        self.shards.put(table);
    }

    /// Ends the followers of the shards that are read-only in a table, once they have read
    /// everything.
    pub(crate) fn end_read_only(&self, table: &ShardTable) {
        shards::end_read_only(table);
    }

    /// In a store that is open for reading: takes in the shards that the writer has added since. If
    /// that fails, those that are known stay.
    fn look_for_shards(&self) {
        if self.context.read_only
            && let Err(error) = self.gate.catch_up()
        {
            debug!(logstore = %self.name, %error, "the shards of the writer were not looked for");
        }
    }

    pub(crate) fn data_key_status(
        &self,
        keys: &KeysSection,
        key: &DataKeyVersion,
    ) -> DataKeyStatus {
        let observer = self.observer.upgrade();
        DataKeyStatus {
            version: key.version,
            current: key.version == keys.current,
            shredded: key.wrapped.is_none(),
            service_key_version: key.keyring_version,
            cmk_version: keys
                .cmk
                .as_ref()
                .zip(observer)
                .and_then(|(cmk, store)| store.envelope_version(cmk, key)),
            ..DataKeyStatus::default()
        }
    }

    /// The figures since the Logstore was opened.
    pub(crate) fn metrics(&self) -> LogstoreMetrics {
        let mut metrics = LogstoreMetrics::new(self.name.clone(), self.gate.status());
        self.gate.add_to(&mut metrics);
        self.table().shards().iter().for_each(|shard| shard.add_to(&mut metrics));
        metrics
    }

    /// The figures over all segments.
    fn status(&self) -> Result<LogstoreStatus> {
        let (config, generation) = {
            let meta = lock(&self.meta);
            (meta.config.clone(), meta.generation)
        };
        let (keys, table) = (self.keys_section(), self.table());
        let mut status = LogstoreStatus {
            name: self.name.clone(),
            id: self.id,
            generation,
            method: match &keys {
                None => "none",
                Some(keys) if keys.cmk.is_some() => "byok",
                Some(_) => "service_key",
            },
            encrypt_type: keys.as_ref().map(|keys| keys.encrypt_type),
            algorithm: keys.as_ref().map(|keys| keys.encrypt_type.suite().name()),
            cmk: keys.as_ref().and_then(|keys| keys.cmk.clone()),
            encrypting: config.encrypt_conf.as_ref().is_some_and(|conf| conf.enable),
            key: self.gate.status(),
            data_keys: keys
                .iter()
                .flat_map(|keys| keys.versions.iter().map(|key| self.data_key_status(keys, key)))
                .collect(),
            segments: 0,
            groups: 0,
            logs: 0,
            bytes_raw: 0,
            bytes_compressed: 0,
            bytes_stored: 0,
            recovery: table.shards().iter().flat_map(|shard| shard.notices()).collect(),
            losses: table.shards().iter().flat_map(|shard| shard.losses()).collect(),
            unreadable_segments: 0,
            latched: table
                .shards()
                .iter()
                .find_map(|shard| shard.latch_cause())
                .map(|cause| cause.to_string()),
        };
        for shard in table.shards() {
            for name in shard.segments(true)?.iter() {
                let opened = match shard.open_readable(name) {
                    Ok(Some(opened)) => opened,
                    Ok(None) => continue,
                    Err(error) if shard.has_accepted(name.ordinal, &error) => continue,
                    Err(error) if error.is_loss() => {
                        status.unreadable_segments += name.last_ordinal() - name.ordinal + 1;
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let stored = match &opened.end {
                    End::Active(view) => view.visible(),
                    _ => opened.file.len().map_err(Error::io("get the length of", &*name.path))?,
                };
                let (so_far, body_end) = match &opened.end {
                    End::Sealed(footer) => (footer.footer.clone(), footer.footer.offset),
                    End::Active(view) => (view.with_counts(Clone::clone), stored),
                    End::Cut(end) => shard.count(&opened, end.bytes)?,
                    End::Unknown | End::Damaged(_) => shard.count(&opened, stored)?,
                };
                status.count(&opened.header, &so_far, body_end, stored);
            }
        }
        status.data_keys.sort_unstable_by_key(|key| key.version);
        Ok(status)
    }
}

fn new_shard(
    context: &Arc<ShardContext>,
    logstore_dir: &Path,
    id: u32,
    records: &[ShardRecord],
) -> Arc<Shard> {
    let record = records.get(id as usize).cloned().unwrap_or_default();
    Shard::new(Arc::clone(context), id, shard_dir(logstore_dir, id), record)
}

pub(crate) fn shard_dir(logstore_dir: &Path, shard: u32) -> PathBuf {
    logstore_dir.join(format!("shard-{shard:04}"))
}

/// Whether a name is the name of a shard's directory.
pub(crate) fn is_shard_dir(name: &str) -> bool {
    let shard = name.strip_prefix("shard-").and_then(|number| number.parse().ok());
    shard.is_some_and(|shard| shard_dir(Path::new(""), shard) == Path::new(name))
}

impl Route for LogstoreShared {
    fn route(&self, choice: ShardChoice) -> Result<Arc<Shard>> {
        self.shards.route(&self.name, choice)
    }
}

impl LeaseListener for LogstoreShared {
    fn depends_on(&self, lease: &Lease) -> bool {
        let keys = self.gate.keys();
        let mut leases = keys.leases();
        !self.gate.is_closed() && leases.any(|other| std::ptr::eq(&**other, lease))
    }

    fn wipe(&self, refusal: &Refusal) -> Vec<Arc<dyn LostShard>> {
        let Some(lease) = self.lease() else { return Vec::new() };
        self.wipe_keys(&self.gate.refused(refusal, lease.cmk()))
    }

    fn note_lost(&self, refusal: &Refusal) {
        if let Some(observer) = self.observer.upgrade() {
            observer.key_lost(self, refusal);
        }
    }

    fn returned(&self) {
        if let Some(observer) = self.observer.upgrade() {
            observer.key_returned(self);
        }
    }
}

/// One data-key version and the segments under it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct DataKeyStatus {
    /// The version. 0 for segments from before the Logstore had a data key.
    pub version: u32,
    /// Whether new segments use it.
    pub current: bool,
    /// Whether it was deliberately destroyed.
    pub shredded: bool,
    /// The version of the service key that wraps it, if the service key does.
    pub service_key_version: Option<u32>,
    /// The version of the master key that wraps it, if the KMS reports it.
    pub cmk_version: Option<String>,
    /// The number of segments under it.
    pub segments: u64,
    /// The size of those segments on disk, in bytes.
    pub bytes_stored: u64,
}

/// Figures of a Logstore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LogstoreStatus {
    /// Its name.
    pub name: LogstoreName,
    /// Its id.
    pub id: LogstoreId,
    /// The number of times its metadata was written.
    pub generation: u64,
    /// `none`, `service_key` or `byok`.
    pub method: &'static str,
    /// The algorithm, once fixed.
    pub encrypt_type: Option<EncryptType>,
    /// The name of the cipher suite of that algorithm, such as `SM4-GCM`.
    pub algorithm: Option<&'static str>,
    /// The customer master key that wraps its data keys.
    pub cmk: Option<Cmk>,
    /// Whether new data is encrypted.
    pub encrypting: bool,
    /// The state of the key.
    pub key: KeyStatus,
    /// The data-key versions and the segments under each.
    pub data_keys: Vec<DataKeyStatus>,
    /// The number of segments in all shards.
    pub segments: u64,
    /// The number of groups and opaque records.
    pub groups: u64,
    /// The number of logs in all groups.
    pub logs: u64,
    /// The size of all groups as appended, framing included, in bytes.
    pub bytes_raw: u64,
    /// The size of all groups after compression, in bytes.
    pub bytes_compressed: u64,
    /// The size of the segments on disk, in bytes.
    pub bytes_stored: u64,
    /// The reports of recovery since the Logstore was opened.
    pub recovery: Vec<RecoveryNotice>,
    /// The accepted losses that retention has not dropped.
    pub losses: Vec<AcceptedLoss>,
    /// The segments of which nothing can be read and whose loss was not accepted. A verification
    /// finds all damage.
    pub unreadable_segments: u64,
    /// The reason why a shard stopped writing, if one did.
    pub latched: Option<String>,
}

impl LogstoreStatus {
    /// Adds a segment. Its blocks end at `body_end`, and it takes `stored` bytes of the disk.
    fn count(&mut self, header: &DecodedHeader, so_far: &Footer, body_end: u64, stored: u64) {
        // No header or footer is authenticated here, so their numbers may be anything.
        let add = |sum: &mut u64, more: u64| *sum = sum.saturating_add(more);
        self.segments += 1;
        add(&mut self.groups, so_far.group_count);
        add(&mut self.logs, so_far.log_count);
        add(&mut self.bytes_raw, so_far.raw_bytes);
        let overhead = u64::from(so_far.block_count) * BLOCK_OVERHEAD_BYTES;
        let body = body_end.saturating_sub(header.body_start);
        add(&mut self.bytes_compressed, body.saturating_sub(overhead));
        add(&mut self.bytes_stored, stored);
        let version = match header.key_source {
            KeySource::DataKey(version) => version,
            KeySource::Keyring(_) => 0,
        };
        if !self.data_keys.iter().any(|key| key.version == version) {
            self.data_keys.push(DataKeyStatus { version, ..DataKeyStatus::default() });
        }
        for key in self.data_keys.iter_mut().filter(|key| key.version == version) {
            key.segments += 1;
            add(&mut key.bytes_stored, stored);
        }
    }
}

/// A handle to a Logstore: cheap to clone, usable from any thread. It keeps the store open.
#[derive(Clone, Debug)]
pub struct Logstore {
    shared: Arc<LogstoreShared>,
    /// Closes the store when the last handle is dropped.
    _open: Arc<dyn KeepsOpen>,
}

impl Logstore {
    pub(crate) fn new(shared: Arc<LogstoreShared>, open: Arc<dyn KeepsOpen>) -> Self {
        Self { shared, _open: open }
    }

    /// Its name.
    pub fn name(&self) -> &LogstoreName {
        &self.shared.name
    }

    /// Its id.
    pub fn id(&self) -> LogstoreId {
        self.shared.id
    }

    /// The whole configuration.
    pub fn config(&self) -> LogstoreConfig {
        self.shared.config()
    }

    /// The state of its key. Calls no KMS.
    pub fn key_status(&self) -> KeyStatus {
        self.shared.gate.status()
    }

    /// Figures over all its segments. Needs no key and calls no KMS.
    ///
    /// # Errors
    /// The error of opening a segment.
    pub fn status(&self) -> Result<LogstoreStatus> {
        self.shared.status()
    }

    /// Appends a group and waits until it has the durability in `options`. Groups of several
    /// callers share blocks and syncs.
    ///
    /// # Errors
    /// [`Error::Revoked`] or [`Error::KmsUnreachable`] if the key may not be used.
    /// [`Error::ShardReadOnly`] for a shard that was split or merged.
    /// [`Error::InvalidGroup`] or [`Error::TooLarge`] for the payload. [`Error::Io`] for a failed
    /// write, and [`Error::Latched`] after one. A failed append may or may not be on disk, but
    /// never in part.
    ///
    /// ```
    /// # use envelog::{Store, crypto::RustCrypto, LogstoreSpec, Payload, AppendOptions, ReadOptions};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let store = Store::builder(dir.path().join("s"), dir.path().join("k"), RustCrypto::new()).create().unwrap();
    /// let logstore = store.create_logstore(&"app/events".parse()?, LogstoreSpec::default())?;
    /// let appended = logstore.append(Payload::opaque("hello")?, &AppendOptions::default())?;
    /// let mut reader = logstore.read(appended.shard, &ReadOptions::default())?;
    /// assert_eq!(&reader.next().unwrap()?.bytes[..], b"hello");
    /// # Ok::<(), envelog::Error>(())
    /// ```
    pub fn append<P>(&self, payload: P, options: &AppendOptions) -> Result<Appended>
    where
        P: TryInto<Payload>,
        Error: From<P::Error>,
    {
        let append = |shard: Arc<Shard>, payload| shard.enqueue(payload, options.durability);
        self.routed(payload, options, append)?.wait()
    }

    /// Appends a group as a future: awaits room in the memory budget
    /// ([`StoreOptions::pending_bytes_max`](crate::StoreOptions::pending_bytes_max)), and then the
    /// durability in `options`. Needs no particular runtime. Neither this call nor polling the
    /// future blocks. Groups of one Logstore are appended in the order of the first polls.
    ///
    /// # Errors
    /// As [`Logstore::append`].
    ///
    /// ```
    /// # use envelog::{Store, crypto::RustCrypto, LogstoreSpec, Payload, AppendOptions};
    /// # fn block_on<F: std::future::Future>(future: F) -> F::Output {
    /// #     let mut future = std::pin::pin!(future);
    /// #     let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    /// #     loop {
    /// #         if let std::task::Poll::Ready(output) = future.as_mut().poll(&mut context) { return output; }
    /// #         std::thread::yield_now();
    /// #     }
    /// # }
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let store = Store::builder(dir.path().join("s"), dir.path().join("k"), RustCrypto::new()).create().unwrap();
    /// # let logstore = store.create_logstore(&"app/events".parse()?, LogstoreSpec::default())?;
    /// let appended = block_on(async {
    ///     logstore.append_async(Payload::opaque("hello")?, &AppendOptions::default()).await
    /// })?;
    /// assert_eq!(appended.seq, 0);
    /// # Ok::<(), envelog::Error>(())
    /// ```
    pub fn append_async<P>(&self, payload: P, options: &AppendOptions) -> AppendFuture
    where
        P: TryInto<Payload>,
        Error: From<P::Error>,
    {
        self.shared.act_on_losses();
        match payload.try_into() {
            Ok(payload) => {
                let router = Arc::clone(&self.shared) as _;
                AppendFuture::new(router, options.shard, payload, options.durability)
            }
            Err(error) => AppendFuture::failed(error.into()),
        }
    }

    /// Submits a group and returns a ticket for it. Blocks only while the memory budget
    /// ([`StoreOptions::pending_bytes_max`](crate::StoreOptions::pending_bytes_max)) is used up.
    /// A thread of the store calls the KMS and recovers the shard where that is necessary.
    ///
    /// # Errors
    /// As [`Logstore::append`] for errors that show at once. The ticket returns the others.
    pub fn submit<P>(&self, payload: P, options: &AppendOptions) -> Result<Ticket>
    where
        P: TryInto<Payload>,
        Error: From<P::Error>,
    {
        self.routed(payload, options, |shard, payload| {
            shard.hand_over(payload, options.durability, true)
        })
    }

    /// As [`Logstore::submit`], but never blocks.
    ///
    /// In a store without threads ([`Background::Manual`](crate::Background::Manual)) it calls the
    /// KMS and recovers the shard itself, as [`Logstore::submit`] does there.
    ///
    /// # Errors
    /// [`Error::Full`] while the memory budget is used up; otherwise as [`Logstore::submit`].
    pub fn try_submit<P>(&self, payload: P, options: &AppendOptions) -> Result<Ticket>
    where
        P: TryInto<Payload>,
        Error: From<P::Error>,
    {
        self.routed(payload, options, |shard, payload| {
            shard.hand_over(payload, options.durability, false)
        })
    }

    /// Gives the payload of an append to its shard, and to another one if that was split or merged
    /// since it was chosen.
    fn routed<P>(
        &self,
        payload: P,
        options: &AppendOptions,
        take: impl Fn(Arc<Shard>, Payload) -> std::result::Result<Ticket, NotTaken>,
    ) -> Result<Ticket>
    where
        P: TryInto<Payload>,
        Error: From<P::Error>,
    {
        self.shared.act_on_losses();
        let mut payload = payload.try_into()?;
        loop {
            match take(self.shared.route(options.shard)?, payload) {
                Ok(ticket) => return Ok(ticket),
                Err(NotTaken::Failed(error)) => return Err(error),
                Err(NotTaken::Moved(moved)) => payload = moved,
            }
        }
    }

    /// Makes everything durable that was appended before the call. Bytes from a killed process, or
    /// from before a failed sync, are not synced in place: recovery rewrites them.
    ///
    /// # Errors
    /// The error of the write or the sync. [`Error::GroupsLost`], once, if groups of an earlier
    /// append are lost with their key: nothing can make them durable. [`Error::Latched`], once, if a
    /// full disk had stopped a shard before they were durable, and the shard writes again by itself
    /// ([`StoreOptions::reopen_full_shards`](crate::StoreOptions::reopen_full_shards)).
    pub fn sync(&self) -> Result<()> {
        self.shared.act_on_losses();
        self.shared.table().shards().iter().try_for_each(|shard| shard.make_durable())
    }

    /// Opens a reader on a shard.
    ///
    /// # Errors
    /// [`Error::Revoked`] or [`Error::KmsUnreachable`] if the key may not be used.
    /// [`Error::ShardMissing`]. [`Error::TooManyReaders`] if [`crate::StoreOptions::readers_max`] readers
    /// are open.
    pub fn read(&self, shard: u32, options: &ReadOptions) -> Result<Reader> {
        self.shared.act_on_losses();
        Reader::open(&*self.shared.shard(shard)?, options)
    }

    /// Opens a reader on all shards, which merges their records by receive time. The limits of the
    /// options count the records of all shards together. It takes one reader
    /// of [`readers_max`](crate::StoreOptions::readers_max) for each shard, and reads the first
    /// block of each. Blocks for file I/O and KMS calls.
    ///
    /// # Errors
    /// As [`Logstore::read`]. [`Error::InvalidArgument`] for a position that is a sequence number,
    /// which has no meaning across shards. The error of a record that cannot be read.
    pub fn read_merged(&self, options: &ReadOptions) -> Result<MergedReader> {
        self.merged(None, options)
    }

    /// As [`Logstore::read_merged`], but begins where another reader was
    /// ([`MergedReader::position`]), in place of [`ReadOptions::from`]. A shard that the position does
    /// not have is newer, and is read from its beginning.
    ///
    /// # Errors
    /// As [`Logstore::read_merged`].
    ///
    /// ```
    /// # use envelog::{Store, crypto::RustCrypto, LogstoreSpec, Payload, AppendOptions, ReadOptions};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let store = Store::builder(dir.path().join("s"), dir.path().join("k"), RustCrypto::new()).create().unwrap();
    /// let spec = LogstoreSpec::default().shard_count(2);
    /// let logstore = store.create_logstore(&"app/events".parse()?, spec)?;
    /// for text in ["one", "two", "three"] {
    ///     logstore.append(Payload::opaque(text)?, &AppendOptions::default())?;
    /// }
    /// // Pages of two records, as for a client that comes back with the text.
    /// let page = ReadOptions::default().max_groups(2);
    /// let mut reader = logstore.read_merged(&page)?;
    /// assert_eq!(reader.by_ref().count(), 2);
    /// let cursor = reader.position().to_string();
    /// assert_eq!(logstore.read_merged_from(&cursor.parse()?, &page)?.count(), 1);
    /// # Ok::<(), envelog::Error>(())
    /// ```
    pub fn read_merged_from(
        &self,
        position: &MergedPosition,
        options: &ReadOptions,
    ) -> Result<MergedReader> {
        self.merged(Some(position), options)
    }

    fn merged(
        &self,
        position: Option<&MergedPosition>,
        options: &ReadOptions,
    ) -> Result<MergedReader> {
        self.shared.act_on_losses();
        self.shared.look_for_shards();
        let table = self.shared.table();
        MergedReader::open(table.shards().iter().map(|shard| &**shard), position, options)
    }

    /// Follows a shard: reads it, and waits at the end for more. Ends behind the last record of a
    /// read-only shard ([`Follow::has_ended`]). Blocks for file I/O, and for a KMS
    /// call if the last answer of the KMS is too old.
    ///
    /// # Errors
    /// As [`Logstore::read`]. [`Error::TooManyReaders`] if
    /// [`followers_max`](crate::StoreOptions::followers_max) followers are open.
    ///
    /// ```
    /// # use envelog::{Store, crypto::RustCrypto, LogstoreSpec, Payload, AppendOptions, ReadOptions};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let store = Store::builder(dir.path().join("s"), dir.path().join("k"), RustCrypto::new()).create().unwrap();
    /// # let logstore = store.create_logstore(&"app/events".parse()?, LogstoreSpec::default())?;
    /// let mut follow = logstore.follow(0, &ReadOptions::default())?;
    /// let writer = logstore.clone();
    /// std::thread::spawn(move || {
    ///     writer.append(Payload::opaque("hello").unwrap(), &AppendOptions::default())
    /// });
    /// assert_eq!(&follow.next().unwrap()?.bytes[..], b"hello");
    /// # Ok::<(), envelog::Error>(())
    /// ```
    pub fn follow(&self, shard: u32, options: &ReadOptions) -> Result<Follow> {
        self.shared.act_on_losses();
        Follow::new(&self.shared.shard(shard)?, options)
    }

    /// Waits until a shard has grown beyond the sequence number `seq`. This call reads the
    /// directory of the shard. The returned wait does no I/O, but in a store that is open for
    /// reading: there it looks at the files every 100 ms.
    ///
    /// # Errors
    /// As [`Logstore::end_seq`].
    pub fn wait_for(&self, shard: u32, seq: u64) -> Result<WaitFor> {
        WaitFor::new(&self.shared.shard(shard)?, seq)
    }

    /// The sequence number that retention has dropped everything in front of: 0 at first, and the end
    /// of the shard once all its data is dropped. In a store that is open for reading, as the
    /// catalogue had it when the Logstore was looked up.
    ///
    /// # Errors
    /// [`Error::ShardMissing`].
    pub fn first_seq(&self, shard: u32) -> Result<u64> {
        Ok(self.shared.shard(shard)?.record().first_seq)
    }

    /// One past the newest sequence number of a shard that a reader can see.
    ///
    /// # Errors
    /// [`Error::ShardMissing`], or the error of opening the newest segment.
    pub fn end_seq(&self, shard: u32) -> Result<u64> {
        self.shared.shard(shard)?.end_seq()
    }

    /// Asks the KMS at once whether the master key may still be used, and acts on the answer before
    /// it returns. Blocks for the KMS call.
    ///
    /// # Errors
    /// [`Error::Revoked`], [`Error::KmsUnreachable`] or [`Error::KmsInvalid`] if operations are
    /// refused from now on.
    pub fn revalidate_now(&self) -> Result<()> {
        let gate = &self.shared.gate;
        for lease in gate.keys().leases() {
            let asked = lease.renew_afresh();
            lease.tell();
            let busy = |busy| gate.refused(&Refusal::from(&KmsError::from(busy)), lease.cmk());
            asked.map_err(busy)?;
        }
        gate.admit().map(|_| ())
    }

    /// Lets a latched shard ([`Error::Latched`]) write again after a failure. The next append
    /// recovers it first, as after a crash.
    ///
    /// # Errors
    /// [`Error::ShardMissing`].
    pub fn reopen_shard(&self, shard: u32) -> Result<()> {
        self.shared.shard(shard)?.reopen();
        Ok(())
    }

    /// Seals the segments that are being written. The next append begins a new one.
    ///
    /// # Errors
    /// The error of sealing a segment.
    pub fn roll(&self) -> Result<()> {
        self.shared.act_on_losses();
        self.shared.table().shards().iter().try_for_each(|shard| shard.roll())
    }
}

impl AsRef<LogstoreShared> for Logstore {
    fn as_ref(&self) -> &LogstoreShared {
        &self.shared
    }
}
