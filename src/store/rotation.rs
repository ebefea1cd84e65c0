//! The rotation of the service key: everything that the store authenticates by itself comes under a new version, and then the keyring
//! retires the older ones. The next call continues a rotation that was interrupted.

use std::sync::Arc;

use serde::Serialize;
use tracing::{info, warn};

use super::{
    AdminState, Change, Store, StoreShared, admin::SavedMeta, builder::rewrite_identity, keyops::KeyChange,
    rewrap::RewrapProgress,
};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    ids::hex_decode,
    io::FileKind,
    keys::AuditEvent,
    logstore::LogstoreShared,
    segment::KeySource,
    shard::{Head, Shard},
    sync::{lock, read, write},
};

/// After how many Logstores the catalogue is written, and other administrative operations have their turn.
const LOGSTORES_AT_ONCE: usize = 64;

/// What a rotation of the service key did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ServiceRotation {
    /// The newest version of the service key, which alone authenticates documents now.
    pub version: u32,
    /// Whether it continued a rotation that was interrupted, with the version that this one had made.
    pub continued: bool,
    /// Logstores whose metadata was written under the new version.
    pub logstores: u64,
    /// Envelopes of data keys that were wrapped under it again.
    pub envelopes: u64,
    /// Logstores under the service key that got a new data key: what is appended from now on is under it.
    pub data_keys: u64,
    /// Probes of master keys that were written under it.
    pub probes: u64,
    /// Segments under older versions that were being written and have been ended.
    pub ended: u64,
    /// Logstores with a segment from before encryption was turned on that no process has ended. Their master keys cannot be used now, so
    /// the next append ends it. It counts as far as the rotation has found blocks in it.
    pub left_open: Vec<LogstoreName>,
}

/// A Logstore under the new version, of which neither the catalogue nor the audit log knows yet.
struct Authenticated {
    logstore: Arc<LogstoreShared>,
    heads: Vec<(Arc<Shard>, Head)>,
    saved: Option<SavedMeta>,
}

impl Authenticated {
    /// What the catalogue is to note.
    fn changes(&self) -> Vec<Change> {
        let (name, id) = (&self.logstore.name, self.logstore.id);
        let heads = self.heads.iter().map(|(shard, head)| Change::reached(name, id, shard.id(), head.clone()));
        heads.chain(self.saved.as_ref().map(SavedMeta::change)).collect()
    }
}

impl Store {
    /// Makes a new version of the service key, brings everything under it, and retires the older versions. Returns the new one. The
    /// keyring must be backed up again.
    ///
    /// A holder of an older version authenticates nothing from then on: the store refuses documents, audit records and checkpoints under
    /// it with [`Error::RetiredKeyVersion`]. The older versions stay in the keyring, since segments of Logstores without an envelope, and
    /// envelopes in copies of the store, need them. No data is rewritten. Each Logstore under the service key gets a new data key for what is
    /// appended from then on, as with [`Store::rotate_data_key`]: the older version and a copy of the metadata give the older data keys.
    ///
    /// The new version is durable in the keyring before anything is under it, and the older ones are retired last. A rotation that was
    /// interrupted, or could not be finished, is continued by the next call, with the version that it has made. The store is open and
    /// usable meanwhile, and older versions are accepted until then.
    ///
    /// No KMS is asked, unless the keyring is under a master key, or a Logstore under one has a segment that was being written without
    /// encryption when a process was killed.
    ///
    /// A document costs one write to a temporary file, its rename, and two syncs: of the file and of its directory. For n Logstores with m
    /// of them under the service key, and p probes, there are n + p + 3 documents (the metadata, the probes, `STORE`, and twice the
    /// keyring), n / 64 + m + 2 writings of the catalogue, and 2m + 2 records of the audit log with one sync each. A shard costs one sync of
    /// its directory, and three of files for a segment that has to be ended. Appends to a Logstore under the service key wait while its data
    /// key is replaced.
    ///
    /// # Errors
    /// [`Error::Io`], and what kept a Logstore, a probe or the `STORE` file from coming under the new version; the others do all the same.
    /// The older versions are accepted on then. A Logstore that cannot be read keeps the rotation from its end until it is repaired or
    /// deleted.
    pub fn rotate_service_key(&self) -> Result<u32> {
        self.rotate_service_key_with(&mut |_| {}).map(|done| done.version)
    }

    /// As [`Store::rotate_service_key`], tells how far it is, and returns what it did.
    ///
    /// # Errors
    /// As [`Store::rotate_service_key`].
    pub fn rotate_service_key_with(&self, progress: &mut dyn FnMut(&RewrapProgress)) -> Result<ServiceRotation> {
        let shared = &self.shared;
        let rotated = shared.rotate_service_key(progress);
        if let Err(error) = &rotated
            && read(&shared.keyring).is_rotating()
        {
            warn!(store = %shared.id, %error, "the rotation of the service key is unfinished, and older versions are accepted on");
        }
        rotated
    }

    /// Whether a rotation of the service key is unfinished: older versions are accepted until [`Store::rotate_service_key`] ends it.
    pub fn is_service_rotation_unfinished(&self) -> bool {
        read(&self.shared.keyring).is_rotating()
    }
}

impl StoreShared {
    fn rotate_service_key(&self, progress: &mut dyn FnMut(&RewrapProgress)) -> Result<ServiceRotation> {
        let (mut report, names) = self.begin_rotation()?;
        let total = names.len();
        let mut result = Ok(());
        for (index, batch) in names.chunks(LOGSTORES_AT_ONCE).enumerate() {
            progress(&RewrapProgress { done: index * LOGSTORES_AT_ONCE, total, logstore: batch.first().cloned() });
            result = result.and(self.authenticate_logstores(batch, &mut report));
        }
        progress(&RewrapProgress { done: total, total, logstore: None });
        result = result.and(self.authenticate_documents(&mut report));
        result.and_then(|()| self.end_rotation(&report)).map(|()| report)
    }

    /// Adds a version to the keyring, unless an interrupted rotation has. New documents are under it from here on. Returns the Logstores that
    /// may have something under an older one.
    fn begin_rotation(&self) -> Result<(ServiceRotation, Vec<LogstoreName>)> {
        let mut admin = self.administer()?;
        self.unlatch(&mut admin)?;
        let continued = read(&self.keyring).is_rotating();
        if !continued {
            self.audit.record(AuditEvent::ServiceRotateIntended, None, "")?;
            let rotated = read(&self.keyring).add_version(&*self.random, self.clock.wall_us())?;
            *write(&self.keyring) = rotated;
        }
        let version = read(&self.keyring).newest();
        for logstore in self.open_logstores() {
            let meta = lock(&logstore.meta).clone();
            logstore.set_meta(meta, version);
        }
        Ok((ServiceRotation { version, continued, ..ServiceRotation::default() }, self.names()))
    }

    /// Brings Logstores under the newest version. A failure for one does not keep it from the others.
    fn authenticate_logstores(&self, names: &[LogstoreName], report: &mut ServiceRotation) -> Result<()> {
        let mut admin = self.administer()?;
        let mut result = Ok(());
        let mut all = Vec::new();
        for name in names {
            match self.authenticate_logstore(&mut admin, name, report) {
                Ok(done) => all.push(done),
                // It was deleted meanwhile.
                Err(Error::LogstoreMissing(_)) => {}
                Err(error) => result = result.and(Err(error)),
            }
        }
        let changes = all.iter().flat_map(Authenticated::changes).collect();
        self.commit(&mut admin, changes)?;
        let newest = read(&self.keyring).newest();
        for done in all {
            for (shard, head) in &done.heads {
                shard.note_head(head);
            }
            report.logstores += u64::from(done.saved.is_some());
            if let Some(saved) = done.saved {
                let lease = saved.take_effect(&*self.disk, newest);
                super::hear_of_loss(&done.logstore, lease);
            }
        }
        result
    }

    fn authenticate_logstore(
        &self,
        admin: &mut AdminState,
        name: &LogstoreName,
        report: &mut ServiceRotation,
    ) -> Result<Authenticated> {
        let newest = read(&self.keyring).newest();
        let logstore = self.logstore_locked(admin, name)?;
        let mut left_open = Vec::new();
        for shard in &logstore.shards {
            match shard.end_segment_if(|source| matches!(source, KeySource::Keyring(version) if version < newest)) {
                Ok(ended) => report.ended += u64::from(ended),
                Err(error) if matches!(error.kind(), ErrorKind::Revoked | ErrorKind::KmsUnreachable) => {
                    warn!(logstore = %name, shard = shard.id(), %error, "a segment under an older service key is left open");
                    left_open.push(shard.id());
                    if report.left_open.last() != Some(name) {
                        report.left_open.push(name.clone());
                    }
                }
                Err(error) => return Err(error),
            }
        }
        if logstore.keys_section().is_some_and(|section| section.cmk.is_none()) {
            self.renew_data_key(admin, &logstore, newest, report)?;
        }
        let mut heads = Vec::with_capacity(logstore.shards.len());
        for shard in &logstore.shards {
            // What the catalogue knows of a segment that is left open is all that counts of it once its key is retired.
            let head = if left_open.contains(&shard.id()) { shard.head_in_place() } else { shard.checkpoint() };
            heads.extend(reached(name, shard, head)?.map(|head| (Arc::clone(shard), head)));
        }
        let meta = lock(&logstore.meta).clone();
        let saved = match meta.keyring_version < newest {
            // The second tag under a customer's key stays as it is: the keys are the same.
            true => Some(self.save_meta(admin, &logstore, meta, None)?),
            false => None,
        };
        Ok(Authenticated { logstore, heads, saved })
    }

    /// Brings the envelopes of a Logstore under the service key under its newest version, and gives the Logstore a new data key unless the
    /// current one was drawn under that version. A holder of the old root and of a copy of the metadata has the older data keys: they
    /// make no segment that counts from here on, and read nothing that is appended.
    fn renew_data_key(
        &self,
        admin: &mut AdminState,
        logstore: &Arc<LogstoreShared>,
        newest: u32,
        report: &mut ServiceRotation,
    ) -> Result<()> {
        let Some(section) = logstore.keys_section() else { return Ok(()) };
        let drawn = section.version(section.current).and_then(|version| version.drawn_under);
        if drawn == Some(newest) && self.is_current(&section, None) {
            return Ok(());
        }
        let mut envelopes = 0;
        self.change_keys_locked(
            admin,
            logstore,
            &KeyChange::rotate_with_service_key(),
            |shared, logstore, section| {
                envelopes = shared.rewrap_all(logstore, section, None)?;
                shared.add_version(logstore, section)
            },
        )?;
        report.logstores += 1;
        report.envelopes += u64::from(envelopes);
        report.data_keys += 1;
        Ok(())
    }

    /// Brings the probes and `STORE` under the newest version.
    fn authenticate_documents(&self, report: &mut ServiceRotation) -> Result<()> {
        let _one_at_a_time = self.administer()?;
        let probes = self.probes_dir();
        let mut result = Ok(());
        for entry in self.disk.list_dir(&probes).map_err(Error::io("list", &probes))? {
            if entry.kind != FileKind::File || hex_decode(&entry.name).is_none_or(|id| id.len() != 16) {
                continue;
            }
            let rewritten = self.read_probe(&probes.join(&entry.name)).and_then(|mut probe| {
                probe.generation = probe.generation.saturating_add(1);
                self.write_probe(probe)
            });
            report.probes += u64::from(rewritten.is_ok());
            result = result.and(rewritten);
        }
        result.and(rewrite_identity(&*self.disk, &self.dir, &read(&self.keyring)))
    }

    /// Retires the older versions, unless another call has.
    fn end_rotation(&self, report: &ServiceRotation) -> Result<()> {
        let mut admin = self.administer()?;
        let version = report.version;
        {
            let keyring = read(&self.keyring);
            if keyring.newest() != version || !keyring.is_rotating() {
                return Ok(());
            }
        }
        // The catalogue knows of a record under the new version before the audit log needs one.
        self.audit.record(AuditEvent::ServiceRotated, None, format!("version {version}"))?;
        self.commit(&mut admin, Vec::new())?;
        self.catalogue.write_anew()?;
        if let Some(anchor) = &self.anchor {
            // What it keeps is under an older version until it has this catalogue.
            anchor.catch_up().map_err(|why| Error::Anchor { path: self.dir.clone(), why })?;
        }
        let retired = read(&self.keyring).retire_older(&*self.random)?;
        *write(&self.keyring) = retired;
        info!(store = %self.id, version, "the older versions of the service key are retired");
        Ok(())
    }
}

/// How far a shard is. One that is damaged keeps what the catalogue knows of it.
fn reached(name: &LogstoreName, shard: &Shard, head: Result<Option<Head>>) -> Result<Option<Head>> {
    match head {
        Err(error) if error.kind() == ErrorKind::Integrity => {
            warn!(logstore = %name, shard = shard.id(), %error, "a damaged shard is left as it is");
            Ok(None)
        }
        head => head,
    }
}
