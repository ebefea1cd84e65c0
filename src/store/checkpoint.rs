//! Checkpoints: how far everything was, to be kept elsewhere, so that a store put back to an earlier state is found out.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{
    Change, Store, StoreShared,
    catalogue::{check_audit_head, check_entry, unique},
};
use crate::{
    Error, Result,
    config::LogstoreName,
    document::{self, Document, DocumentKind},
    error::Location,
    ids::LogstoreId,
    keys::audit::AuditHead,
    segment::Features,
    shard::{Head, ShardRecord},
    sync::{lock, read},
};

/// How far a store was: the heads of all shards, of the catalogue and of the key audit log.
///
/// It holds no secret, and is authenticated under the service keyring. Kept on another machine, it tells a later
/// [`Store::verify`] whether anything that was there has been taken back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    bytes: Vec<u8>,
}

impl Checkpoint {
    /// Its bytes, to be kept.
    pub fn to_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A checkpoint from its bytes. They are checked when it is used.
    pub fn from_bytes(bytes: impl Into<Vec<u8>>) -> Self {
        Self { bytes: bytes.into() }
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CheckpointBody {
    pub(super) taken_us: u64,
    pub(super) catalogue_generation: u64,
    pub(super) audit: AuditHead,
    #[serde(deserialize_with = "unique")]
    pub(super) logstores: BTreeMap<LogstoreName, CheckpointEntry>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct CheckpointEntry {
    pub(super) id: LogstoreId,
    pub(super) generation: u64,
    pub(super) shards: Vec<ShardRecord>,
}

impl Store {
    /// Makes everything durable and marked, notes in the catalogue how far each shard is, and returns that for keeping elsewhere. A
    /// Logstore whose key cannot be used is taken as it is on disk.
    ///
    /// # Errors
    /// What kept a shard from being synced, or the catalogue from being written.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        self.shared.checkpoint()
    }
}

impl StoreShared {
    fn checkpoint(&self) -> Result<Checkpoint> {
        self.keys.check_process()?;
        let mut admin = lock(&self.admin);
        self.reload_catalogue()?;
        let (mut logstores, mut reached) = (BTreeMap::new(), Vec::new());
        for name in self.names() {
            let logstore = self.logstore_locked(&mut admin, &name)?;
            let mut shards = Vec::new();
            for shard in &logstore.shards {
                let head: Option<Head> = shard.checkpoint()?;
                reached.extend(head.clone().map(|head| Change::reached(&logstore.name, logstore.id, shard.id(), head)));
                let record = ShardRecord { head, ..shard.record() };
                if !self.read_only {
                    // It is durable, whatever becomes of the catalogue, which may be found to say so.
                    shard.set_record(record.clone());
                }
                shards.push(record);
            }
            let generation = lock(&logstore.meta).generation;
            logstores.insert(name, CheckpointEntry { id: logstore.id, generation, shards });
        }
        if !self.read_only {
            self.commit(&mut admin, reached)?;
            self.catalogue.settle()?;
        }
        let catalogue_generation = self.catalogue.now().generation;
        let body = CheckpointBody {
            taken_us: self.clock.wall_us(),
            catalogue_generation,
            audit: self.audit.head(),
            logstores,
        };
        let keyring = read(&self.keyring);
        let document = Document {
            kind: DocumentKind::Checkpoint,
            features: Features::default(),
            store: self.id,
            subject: [0; 16],
            generation: catalogue_generation,
            keyring_version: keyring.newest(),
            a: serde_json::to_vec(&body).expect("plain data always serializes"),
            b: Vec::new(),
            tag_b: None,
        };
        Ok(Checkpoint { bytes: document.seal(&keyring.document_key(keyring.newest())?) })
    }

    /// Reads a checkpoint of this store.
    pub(super) fn open_checkpoint(&self, checkpoint: &Checkpoint) -> Result<CheckpointBody> {
        let path = std::path::Path::new("checkpoint");
        let keyring = read(&self.keyring);
        let store = document::claimed_store(&checkpoint.bytes, path)?;
        if store != self.id {
            return Err(Error::InvalidArgument(format!("the checkpoint is of another store ({store})")));
        }
        let document =
            document::open(&checkpoint.bytes, DocumentKind::Checkpoint, path, |version| keyring.document_key(version))?;
        let body: CheckpointBody = serde_json::from_slice(&document.a)
            .map_err(|error| Error::corrupt(Location::new(path, 80), format!("it does not parse: {error}")))?;
        if document.generation != body.catalogue_generation {
            return Err(Error::corrupt(Location::new(path, 56), "its generation is not that of the catalogue"));
        }
        check_audit_head(&body.audit)
            .and_then(|()| body.logstores.values().try_for_each(|entry| check_entry(entry.generation, &entry.shards)))
            .map_err(|rule| Error::corrupt(Location::new(path, 80), rule))?;
        Ok(body)
    }
}
