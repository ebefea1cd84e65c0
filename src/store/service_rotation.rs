//! The rotation of the service key.
//!
//! The rotation authenticates every document of the store under a new version, and then the
//! keyring retires the older versions. The next call continues an interrupted rotation.

use std::sync::Arc;

use serde::Serialize;
use tracing::{info, warn};

use super::{
    catalogue::Change,
    core::Core,
    identity::rewrite_identity,
    key_change::{KeyChange, change_keys, rewrap_versions},
    rewrap_all::RewrapProgress,
};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    keys::{AuditEvent, envelope::KeysSection},
    logstore::LogstoreShared,
    segment::KeySource,
    shard::{Head, Shard, ShardRecord},
};

/// The number of Logstores whose metadata is written under one administration, and committed in one
/// record of the catalogue.
const LOGSTORES_AT_ONCE: usize = 8;

/// The result of a rotation of the service key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ServiceRotation {
    /// The newest version of the service key. It alone authenticates documents now. As JSON it is
    /// `service_key_version`.
    #[serde(rename = "service_key_version")]
    pub version: u32,
    /// Whether this call continued an interrupted rotation, with the version that the rotation had
    /// made.
    pub continued: bool,
    /// The number of Logstores whose metadata was written under the new version.
    pub logstores: u64,
    /// The number of data-key envelopes that were wrapped again under the new version.
    pub envelopes: u64,
    /// The number of Logstores under the service key that got a new data key for new data.
    pub data_keys: u64,
    /// The number of probes of master keys that were written under the new version.
    pub probes: u64,
    /// The number of open segments under older versions that were sealed.
    pub ended: u64,
    /// The Logstores with a segment from before encryption was turned on that no process has
    /// sealed. Their master keys cannot be used now, so the next append seals it. The segment is
    /// valid up to the last block that the rotation found in it.
    pub left_open: Vec<LogstoreName>,
}

/// A Logstore without a segment that an older version authenticates and that may grow.
struct Ended {
    logstore: Arc<LogstoreShared>,
    heads: Vec<(Arc<Shard>, Head)>,
}

impl Ended {
    /// The heads as changes of the catalogue.
    fn changes(&self) -> impl Iterator<Item = Change> {
        let (name, id) = (&self.logstore.name, self.logstore.id);
        self.heads
            .iter()
            .map(move |(shard, head)| Change::reached(name, id, shard.id(), head.clone()))
    }
}

/// Rotates the service key. Logs a warning if the rotation stays unfinished.
pub(super) fn rotate_service_key(
    core: &Core,
    progress: &mut dyn FnMut(&RewrapProgress),
) -> Result<ServiceRotation> {
    let rotated = run(core, progress);
    if let Err(error) = &rotated
        && core.keys.keyring().is_rotating()
    {
        warn!(store = %core.env.id, %error, "service key rotation unfinished, older versions still accepted");
    }
    rotated
}

fn run(core: &Core, progress: &mut dyn FnMut(&RewrapProgress)) -> Result<ServiceRotation> {
    let (mut report, names) = begin(core)?;
    let total = names.len();
    let mut result = Ok(());
    for (index, batch) in names.chunks(LOGSTORES_AT_ONCE).enumerate() {
        progress(&RewrapProgress {
            done: index * LOGSTORES_AT_ONCE,
            total,
            logstore: batch.first().cloned(),
        });
        result = result.and(authenticate_logstores(core, batch, &mut report));
    }
    progress(&RewrapProgress { done: total, total, logstore: None });
    result = result.and(authenticate_documents(core, &mut report));
    result.and_then(|()| end(core, &report)).map(|()| report)
}

/// Adds a version to the keyring, unless an interrupted rotation has added one. New documents are
/// under it from then on. Returns the Logstores that may have something under an older version.
fn begin(core: &Core) -> Result<(ServiceRotation, Vec<LogstoreName>)> {
    let Core { env, keys, registry } = core;
    registry.check_writable()?;
    let change = keys.change_keyring();
    let continued = keys.keyring().is_rotating();
    {
        let mut admin = registry.administer()?;
        admin.unlatch()?;
        if !continued {
            keys.audit().record(AuditEvent::ServiceRotateIntended, None, "")?;
        }
    }
    let added = match continued {
        true => None,
        false => {
            Some(change.prepare(|keyring| keyring.add_version(&*env.random, env.clock.wall_us()))?)
        }
    };
    // The list has every Logstore whose metadata was written before the version was added.
    let _admin = registry.administer()?;
    added.map_or(Ok(()), |added| change.put(added))?;
    let version = keys.keyring().newest();
    for logstore in registry.open_logstores() {
        logstore.set_meta(logstore.meta(), version);
    }
    Ok((ServiceRotation { version, continued, ..ServiceRotation::default() }, registry.names()))
}

/// Brings Logstores under the newest version. A failure for one Logstore does not stop the others.
fn authenticate_logstores(
    core: &Core,
    names: &[LogstoreName],
    report: &mut ServiceRotation,
) -> Result<()> {
    core.registry.check_writable()?;
    let mut result = Ok(());
    let mut all = Vec::new();
    for name in names {
        match end_logstore(core, name, report) {
            Ok(ended) => all.push(ended),
            // It was deleted since the rotation began.
            Err(Error::LogstoreMissing(_)) => {}
            Err(error) => result = result.and(Err(error)),
        }
    }
    result.and(authenticate_metadata(core, all, report))
}

/// Writes the metadata of Logstores under the newest version, and commits it together with the
/// heads of the shards. Takes the metadata as it is now: an operation on a Logstore may have
/// changed it meanwhile, and an operation that waits for a KMS continues from this metadata.
fn authenticate_metadata(
    core: &Core,
    mut all: Vec<Ended>,
    report: &mut ServiceRotation,
) -> Result<()> {
    let Core { env, keys, registry } = core;
    let mut admin = registry.administer()?;
    all.retain(|ended| admin.check_exists(&ended.logstore).is_ok());
    let newest = keys.keyring().newest();
    let mut changes: Vec<Change> = all.iter().flat_map(Ended::changes).collect();
    let (mut written, mut result) = (Vec::new(), Ok(()));
    for logstore in all.iter().map(|ended| &ended.logstore) {
        let meta = logstore.meta();
        if meta.keyring_version >= newest {
            continue;
        }
        // The second tag under a customer's key stays as it is, because the keys stay the same.
        match admin.save_meta(logstore, meta, None) {
            Ok(saved) => {
                changes.push(saved.change());
                written.push(saved);
            }
            Err(error) => result = result.and(Err(error)),
        }
    }
    admin.commit(changes)?;
    for (shard, head) in all.iter().flat_map(|ended| &ended.heads) {
        shard.note_head(head);
    }
    report.logstores += written.len() as u64;
    for saved in written {
        // The keys stay, and so does their lease.
        saved.take_effect(&*env.disk, newest);
    }
    result
}

/// Ends the segments of a Logstore that an older version authenticates, and gives the Logstore a
/// new data key if it is under the service key. Returns it with the heads that the catalogue has to
/// know.
fn end_logstore(core: &Core, name: &LogstoreName, report: &mut ServiceRotation) -> Result<Ended> {
    let logstore = core.registry.logstore(name)?;
    let heads = end_shards(core, &logstore, report)
        .map_err(|error| core.registry.cause(&logstore, error))?;
    Ok(Ended { logstore, heads })
}

fn end_shards(
    core: &Core,
    logstore: &LogstoreShared,
    report: &mut ServiceRotation,
) -> Result<Vec<(Arc<Shard>, Head)>> {
    let (name, newest) = (&logstore.name, core.keys.keyring().newest());
    let under_cmk = logstore.keys_section().filter(|section| section.cmk.is_some());
    let is_behind = |shard: &Shard| {
        under_cmk.as_ref().is_some_and(|section| is_behind_the_keyring(section, shard))
    };
    // The writer of a shard under a customer's key may wait for the customer's KMS.
    let table = logstore.table();
    let (behind, others): (Vec<_>, Vec<_>) =
        table.shards().iter().partition(|shard| is_behind(shard));
    let left_open = end_older_segments(name, &others, newest, report)?;
    if logstore.keys_section().is_some_and(|section| section.cmk.is_none()) {
        renew_data_key(core, name, newest, report)?;
    }
    let mut heads = Vec::with_capacity(table.shards().len());
    for shard in behind {
        heads.extend(shard.record().head.map(|head| (Arc::clone(shard), head)));
    }
    for shard in others {
        // After the key of an open segment is retired, only the part up to the head in the
        // catalogue is valid.
        let head = if left_open.contains(&shard.id()) {
            shard.head_in_place()
        } else {
            shard.checkpoint()
        };
        heads.extend(reached(name, shard, head)?.map(|head| (Arc::clone(shard), head)));
    }
    Ok(heads)
}

/// Whether the last head of a shard proves every segment that the service key authenticates, and
/// none of them can grow. Waits for no writer.
fn is_behind_the_keyring(section: &KeysSection, shard: &Shard) -> bool {
    let has_data_key = |ordinal| section.owner(shard.id(), ordinal).is_some();
    let ShardRecord { first_ordinal, head, .. } = shard.record();
    has_data_key(first_ordinal)
        || head.is_some_and(|head| {
            has_data_key(head.ordinal) || (head.sealed && has_data_key(head.ordinal + 1))
        })
}

/// Seals the open segments of these shards that an older version of the service key authenticates.
/// Returns the shards whose segment stays open, because the master key cannot be used now.
fn end_older_segments(
    name: &LogstoreName,
    shards: &[&Arc<Shard>],
    newest: u32,
    report: &mut ServiceRotation,
) -> Result<Vec<u32>> {
    let mut left_open = Vec::new();
    for shard in shards {
        match shard.end_segment_if(
            |source| matches!(source, KeySource::Keyring(version) if version < newest),
        ) {
            Ok(ended) => report.ended += u64::from(ended),
            Err(error)
                if matches!(error.kind(), ErrorKind::Revoked | ErrorKind::KmsUnreachable) =>
            {
                warn!(logstore = %name, shard = shard.id(), %error, "segment under an older service key left open");
                left_open.push(shard.id());
                if report.left_open.last() != Some(name) {
                    report.left_open.push(name.clone());
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(left_open)
}

/// Wraps the envelopes of a Logstore under the newest service key, and gives the Logstore a new
/// data key unless the current one was drawn under that version. An attacker with the old root key
/// and a copy of the metadata has the older data keys. With them the attacker can make no segment
/// that is accepted from here on, and can read nothing that is appended.
///
/// Waits for another operation on the Logstore. That operation calls no KMS either, because the
/// Logstore is under the service key.
fn renew_data_key(
    core: &Core,
    name: &LogstoreName,
    newest: u32,
    report: &mut ServiceRotation,
) -> Result<()> {
    let one = core.registry.administer_logstore(name)?;
    let logstore = one.logstore()?;
    let Some(section) = logstore.keys_section() else { return Ok(()) };
    let drawn = section.version(section.current).and_then(|version| version.drawn_under);
    if drawn == Some(newest) && core.keys.is_current(&section, None) {
        return Ok(());
    }
    let mut envelopes = 0;
    let how = KeyChange::rotate_with_service_key();
    change_keys(core, &one, &logstore, &how, |logstore, section| {
        envelopes = rewrap_versions(core, logstore, section, None)?;
        core.keys.add_version(section, logstore.id)
    })?;
    report.logstores += 1;
    report.envelopes += u64::from(envelopes);
    report.data_keys += 1;
    Ok(())
}

/// Brings the probes and the `STORE` file under the newest version.
fn authenticate_documents(core: &Core, report: &mut ServiceRotation) -> Result<()> {
    let Core { env, keys, registry } = core;
    registry.check_writable()?;
    let _one_at_a_time = registry.administer()?;
    let result = keys.rewrite_probes(&mut report.probes);
    result.and(rewrite_identity(&*env.disk, &env.dir, &keys.keyring()))
}

/// Retires the older versions, unless another call has retired them.
fn end(core: &Core, report: &ServiceRotation) -> Result<()> {
    let Core { env, keys, registry } = core;
    registry.check_writable()?;
    let (change, version) = (keys.change_keyring(), report.version);
    {
        let keyring = keys.keyring();
        if keyring.newest() != version || !keyring.is_rotating() {
            return Ok(());
        }
    }
    let retired = change.prepare(|keyring| keyring.retire_older(&*env.random))?;
    let mut admin = registry.administer()?;
    // The catalogue must have an audit record under the new version before the keyring retires the
    // older versions.
    keys.audit().record(AuditEvent::ServiceRotated, None, format!("version {version}"))?;
    admin.commit(Vec::new())?;
    admin.rewrite_catalogue()?;
    if let Some(anchor) = registry.anchor() {
        // The copy in the anchor is under an older version until the anchor has this catalogue.
        anchor.catch_up().map_err(|why| Error::Anchor { path: env.dir.clone(), why })?;
    }
    change.put(retired)?;
    info!(store = %env.id, version, "older service key versions retired");
    Ok(())
}

/// The head of a shard. A damaged shard keeps the head that the catalogue has.
fn reached(name: &LogstoreName, shard: &Shard, head: Result<Option<Head>>) -> Result<Option<Head>> {
    match head {
        Err(error) if error.kind() == ErrorKind::Integrity => {
            warn!(logstore = %name, shard = shard.id(), %error, "damaged shard left unchanged");
            Ok(None)
        }
        head => head,
    }
}
