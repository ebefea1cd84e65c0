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
    key_change::{KeyChange, change_keys_in},
    keys::KeyService,
    registry::{Administration, SavedMeta, hear_of_loss},
    rewrap_all::RewrapProgress,
};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    keys::AuditEvent,
    logstore::LogstoreShared,
    segment::KeySource,
    shard::{Head, Shard},
};

/// The number of Logstores after which the catalogue is written and other administrative
/// operations can run.
const LOGSTORES_AT_ONCE: usize = 64;

/// The result of a rotation of the service key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ServiceRotation {
    /// The newest version of the service key. It alone authenticates documents now.
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

/// A Logstore under the new version, before the commit.
struct Authenticated {
    logstore: Arc<LogstoreShared>,
    heads: Vec<(Arc<Shard>, Head)>,
    saved: Option<SavedMeta>,
}

impl Authenticated {
    /// The changes of the catalogue.
    fn changes(&self) -> Vec<Change> {
        let (name, id) = (&self.logstore.name, self.logstore.id);
        let heads = self
            .heads
            .iter()
            .map(|(shard, head)| Change::reached(name, id, shard.id(), head.clone()));
        heads.chain(self.saved.as_ref().map(SavedMeta::change)).collect()
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
    let mut admin = registry.administer()?;
    admin.unlatch()?;
    let continued = keys.keyring().is_rotating();
    if !continued {
        keys.audit().record(AuditEvent::ServiceRotateIntended, None, "")?;
        keys.change_keyring(|keyring| keyring.add_version(&*env.random, env.clock.wall_us()))?;
    }
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
    let Core { env, keys, registry } = core;
    let mut admin = registry.administer()?;
    let mut result = Ok(());
    let mut all = Vec::new();
    for name in names {
        match authenticate_logstore(keys, &mut admin, name, report) {
            Ok(done) => all.push(done),
            // It was deleted since the rotation began.
            Err(Error::LogstoreMissing(_)) => {}
            Err(error) => result = result.and(Err(error)),
        }
    }
    admin.commit(all.iter().flat_map(Authenticated::changes).collect())?;
    let newest = keys.keyring().newest();
    for done in all {
        for (shard, head) in &done.heads {
            shard.note_head(head);
        }
        report.logstores += u64::from(done.saved.is_some());
        if let Some(saved) = done.saved {
            let leases = saved.take_effect(&*env.disk, newest);
            hear_of_loss(&done.logstore, &leases);
        }
    }
    result
}

fn authenticate_logstore(
    keys: &KeyService,
    admin: &mut Administration<'_>,
    name: &LogstoreName,
    report: &mut ServiceRotation,
) -> Result<Authenticated> {
    let newest = keys.keyring().newest();
    let logstore = admin.logstore(name)?;
    let left_open = end_older_segments(&logstore, newest, report)?;
    if logstore.keys_section().is_some_and(|section| section.cmk.is_none()) {
        renew_data_key(keys, admin, &logstore, newest, report)?;
    }
    let mut heads = Vec::with_capacity(logstore.shards.len());
    for shard in &logstore.shards {
        // After the key of an open segment is retired, only the part up to the head in the
        // catalogue is valid.
        let head = if left_open.contains(&shard.id()) {
            shard.head_in_place()
        } else {
            shard.checkpoint()
        };
        heads.extend(reached(name, shard, head)?.map(|head| (Arc::clone(shard), head)));
    }
    let meta = logstore.meta();
    let saved = match meta.keyring_version < newest {
        // The second tag under a customer's key stays as it is, because the keys stay the same.
        true => Some(admin.save_meta(&logstore, meta, None)?),
        false => None,
    };
    Ok(Authenticated { logstore, heads, saved })
}

/// Seals the open segments that an older version of the service key authenticates. Returns the
/// shards whose segment stays open, because the master key cannot be used now.
fn end_older_segments(
    logstore: &LogstoreShared,
    newest: u32,
    report: &mut ServiceRotation,
) -> Result<Vec<u32>> {
    let name = &logstore.name;
    let mut left_open = Vec::new();
    for shard in &logstore.shards {
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
fn renew_data_key(
    keys: &KeyService,
    admin: &mut Administration<'_>,
    logstore: &Arc<LogstoreShared>,
    newest: u32,
    report: &mut ServiceRotation,
) -> Result<()> {
    let Some(section) = logstore.keys_section() else { return Ok(()) };
    let drawn = section.version(section.current).and_then(|version| version.drawn_under);
    if drawn == Some(newest) && keys.is_current(&section, None) {
        return Ok(());
    }
    let mut envelopes = 0;
    change_keys_in(
        keys,
        admin,
        logstore,
        &KeyChange::rotate_with_service_key(),
        |logstore, section| {
            envelopes = keys.rewrap_versions(&logstore.gate, section, None)?;
            keys.add_version(section, logstore.id)
        },
    )?;
    report.logstores += 1;
    report.envelopes += u64::from(envelopes);
    report.data_keys += 1;
    Ok(())
}

/// Brings the probes and the `STORE` file under the newest version.
fn authenticate_documents(core: &Core, report: &mut ServiceRotation) -> Result<()> {
    let Core { env, keys, registry } = core;
    let _one_at_a_time = registry.administer()?;
    let result = keys.rewrite_probes(&mut report.probes);
    result.and(rewrite_identity(&*env.disk, &env.dir, &keys.keyring()))
}

/// Retires the older versions, unless another call has retired them.
fn end(core: &Core, report: &ServiceRotation) -> Result<()> {
    let Core { env, keys, registry } = core;
    let mut admin = registry.administer()?;
    let version = report.version;
    {
        let keyring = keys.keyring();
        if keyring.newest() != version || !keyring.is_rotating() {
            return Ok(());
        }
    }
    // The catalogue must have an audit record under the new version before the keyring retires the
    // older versions.
    keys.audit().record(AuditEvent::ServiceRotated, None, format!("version {version}"))?;
    admin.commit(Vec::new())?;
    admin.rewrite_catalogue()?;
    if let Some(anchor) = registry.anchor() {
        // The copy in the anchor is under an older version until the anchor has this catalogue.
        anchor.catch_up().map_err(|why| Error::Anchor { path: env.dir.clone(), why })?;
    }
    keys.change_keyring(|keyring| keyring.retire_older(&*env.random))?;
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
