//! Checkpoints: the recorded ends of all shards, kept outside the store to detect a rollback.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    document::{self, Document, DocumentKind},
    error::Location,
    ids::{LogstoreId, hex_decode, hex_encode},
    keys::audit::AuditHead,
    logstore::LogstoreShared,
    shard::{Head, ShardRecord},
    store::{
        catalogue::{Catalogue, Change, Entry, check_audit_head, check_entry, unique},
        core::Core,
        registry::Registry,
    },
};

/// The state of a store: the heads of all shards, of the catalogue and of the key audit log.
///
/// It holds no secret, and the service keyring authenticates it. Kept on another machine, it lets a
/// later [`Admin::verify`](crate::Admin::verify) detect that data was removed or rolled back. As
/// JSON it is its bytes in hexadecimal.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    bytes: Vec<u8>,
    failed: Vec<(LogstoreName, Error)>,
}

impl Checkpoint {
    /// Its bytes, to be kept.
    pub fn to_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// A checkpoint from its bytes. They are checked when it is used.
    pub fn from_bytes(bytes: impl Into<Vec<u8>>) -> Self {
        Self { bytes: bytes.into(), failed: Vec::new() }
    }

    /// The Logstores with missing or damaged files, each with the first error. If the last segment of
    /// a shard is damaged, the checkpoint has the state of that shard by the catalogue alone. Known to the caller that made the checkpoint; its bytes do not have
    /// them.
    pub fn failed(&self) -> &[(LogstoreName, Error)] {
        &self.failed
    }
}

impl PartialEq for Checkpoint {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for Checkpoint {}

impl Serialize for Checkpoint {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex_encode(&self.bytes))
    }
}

impl<'de> Deserialize<'de> for Checkpoint {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let bytes = hex_decode(&text).ok_or_else(|| D::Error::custom("it is no hexadecimal"))?;
        Ok(Self::from_bytes(bytes))
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

/// The heads of the shards of a Logstore.
type Heads = Vec<Option<Head>>;

/// The Logstores that a checkpoint gets. One that cannot be opened has no heads.
#[derive(Default)]
struct Reached {
    heads: Vec<(Arc<LogstoreShared>, Heads)>,
    unopened: Vec<(LogstoreName, Entry)>,
    failed: Vec<(LogstoreName, Error)>,
}

impl Reached {
    /// Makes a Logstore durable and marked. Damage is noted, and hides no other Logstore.
    fn add(&mut self, registry: &Registry, name: LogstoreName) -> Result<()> {
        let logstore = match registry.logstore(&name) {
            // It was deleted meanwhile.
            Err(Error::LogstoreMissing(_)) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::Integrity => {
                let Ok(entry) = registry.entry(&name) else { return Ok(()) };
                self.unopened.push((name.clone(), entry));
                self.failed.push((name, error));
                return Ok(());
            }
            logstore => logstore?,
        };
        match self.heads_of(&logstore) {
            Ok(heads) => self.heads.push((logstore, heads)),
            Err(error) if registry.entry(&name).is_ok_and(|entry| entry.id == logstore.id) => {
                return Err(error);
            }
            Err(_) => {}
        }
        Ok(())
    }

    /// The heads of the shards. That of a damaged shard is the one that the catalogue has. Missing
    /// segments are damage too: the digests of a head cover them.
    fn heads_of(&mut self, logstore: &LogstoreShared) -> Result<Heads> {
        let (mut heads, mut damaged) = (Heads::new(), None);
        for shard in logstore.table().shards() {
            heads.push(match shard.checkpoint() {
                Err(error) if error.kind() == ErrorKind::Integrity => {
                    damaged.get_or_insert(error);
                    shard.record().head
                }
                head => head?,
            });
            if let Some(missing) = shard.first_missing()? {
                damaged.get_or_insert(missing.missing());
            }
        }
        self.failed.extend(damaged.map(|error| (logstore.name.clone(), error)));
        Ok(heads)
    }
}

/// Makes all data durable and marked, records the heads in the catalogue, and returns them. May
/// call KMSs before it takes the administration.
pub(in crate::store) fn checkpoint(core: &Core) -> Result<Checkpoint> {
    let Core { env, keys, registry } = core;
    keys.check_process()?;
    keys.admit_service_key()?;
    let mut all = Reached::default();
    for name in registry.list()? {
        all.add(registry, name)?;
    }
    let mut admin = if env.read_only { registry.exclusive() } else { registry.administer()? };
    let (mut logstores, mut reached) = (BTreeMap::new(), Vec::new());
    for (logstore, heads) in all.heads {
        let (name, id) = (&logstore.name, logstore.id);
        if registry.entry(name).is_ok_and(|entry| entry.id == id) {
            let mut shards = Vec::new();
            for (shard, head) in logstore.table().shards().iter().zip(heads) {
                let change = |head: &Head| Change::reached(name, id, shard.id(), head.clone());
                reached.extend(head.as_ref().map(change));
                if !env.read_only
                    && let Some(head) = &head
                {
                    // The head is durable, and the commit may take effect even if it fails.
                    shard.note_head(head);
                }
                shards.push(ShardRecord { head, ..shard.record() });
            }
            let generation = logstore.generation();
            logstores.insert(name.clone(), CheckpointEntry { id, generation, shards });
        }
    }
    for (name, Entry { id, generation, shards, .. }) in all.unopened {
        if registry.entry(&name).is_ok_and(|entry| entry.id == id) {
            logstores.insert(name, CheckpointEntry { id, generation, shards });
        }
    }
    if !env.read_only {
        admin.commit(reached)?;
        admin.sync_tip()?;
    }
    let catalogue_generation = registry.catalogue().generation;
    let audit = keys.audit().head();
    drop(admin);
    let body = CheckpointBody { taken_us: 0, catalogue_generation, audit, logstores };
    Ok(Checkpoint { failed: all.failed, ..seal(core, body)? })
}

/// The checkpoint of a catalogue: its heads, which are durable.
///
/// # Errors
/// The service key cannot be used.
pub(in crate::store) fn checkpoint_of(core: &Core, catalogue: &Catalogue) -> Result<Checkpoint> {
    let entry = |(name, entry): (&LogstoreName, &Entry)| {
        let Entry { id, generation, shards, .. } = entry.clone();
        (name.clone(), CheckpointEntry { id, generation, shards })
    };
    let (catalogue_generation, audit) = (catalogue.generation, catalogue.audit.clone());
    let logstores = catalogue.logstores.iter().map(entry).collect();
    seal(core, CheckpointBody { taken_us: 0, catalogue_generation, audit, logstores })
}

/// Authenticates a checkpoint that is taken now.
fn seal(core: &Core, body: CheckpointBody) -> Result<Checkpoint> {
    let body = CheckpointBody { taken_us: core.env.clock.wall_us(), ..body };
    let (generation, store) = (body.catalogue_generation, core.env.id);
    let keyring = core.keys.keyring();
    let version = keyring.newest();
    let document = Document::new(DocumentKind::Checkpoint, store, generation, version, &body);
    Ok(Checkpoint { bytes: document.seal(&keyring.document_key(version)?), failed: Vec::new() })
}

/// Authenticates a checkpoint of this store.
///
/// # Errors
/// [`Error::InvalidArgument`] for a checkpoint of another store, and the integrity errors of the
/// document.
pub(super) fn open_checkpoint(core: &Core, checkpoint: &Checkpoint) -> Result<CheckpointBody> {
    let path = Path::new("checkpoint");
    let keyring = core.keys.keyring();
    let store = document::claimed_store(&checkpoint.bytes, path)?;
    if store != core.env.id {
        return Err(Error::InvalidArgument(format!(
            "the checkpoint is of another store ({store})"
        )));
    }
    let document = document::open(&checkpoint.bytes, DocumentKind::Checkpoint, path, |version| {
        keyring.document_key(version)
    })?;
    let body: CheckpointBody = serde_json::from_slice(&document.a).map_err(|error| {
        Error::corrupt(Location::new(path, 80), format!("it does not parse: {error}"))
    })?;
    if document.generation != body.catalogue_generation {
        return Err(Error::corrupt(
            Location::new(path, 56),
            "its generation is not that of the catalogue",
        ));
    }
    check_audit_head(&body.audit)
        .and_then(|()| {
            body.logstores
                .values()
                .try_for_each(|entry| check_entry(entry.generation, &entry.shards))
        })
        .map_err(|rule| Error::corrupt(Location::new(path, 80), rule))?;
    Ok(body)
}
