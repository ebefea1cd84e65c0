//! Accepting losses: of segments, of the key audit log, of probes, and of a Logstore whose metadata
//! is lost.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;
use tracing::warn;

use super::{
    adoption::open_with_any_metadata, catalogue::Change, core::Core, inspect::VerifyFault,
    logstores, removal::DeleteReport,
};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    io::{Disk, FileKind},
    keys::AuditEvent,
    logstore::LogstoreShared,
    shard::{AcceptedLoss, AdoptedMetadata, FoundLoss, RepairOptions, RepairReport, Shard},
};

/// The result of [`Admin::repair_all`](crate::Admin::repair_all).
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct StoreRepairReport {
    /// The Logstores for which other metadata was put in force, because the metadata that the
    /// catalogue names is lost.
    pub metadata: Vec<MetadataRepair>,
    /// The fault of the key audit log, if it was accepted: the files of the log were renamed, and
    /// a new log begins.
    pub audit: Option<VerifyFault>,
    /// The damaged probes that were removed, and the objects of other types in the places of
    /// probes. The envelopes of the Logstores take their place.
    #[serde(serialize_with = "crate::error::paths_as_text")]
    pub probes: Vec<PathBuf>,
    /// The shards that had damage.
    pub shards: Vec<ShardRepair>,
    /// The Logstores that could not be repaired, each with the error.
    pub failed: Vec<FailedRepair>,
}

/// Metadata that a repair has put in force, in a [`StoreRepairReport`].
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct MetadataRepair {
    /// The Logstore.
    pub logstore: LogstoreName,
    /// Which metadata.
    #[serde(flatten)]
    pub adopted: AdoptedMetadata,
}

/// The repair of one shard, in a [`StoreRepairReport`].
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct ShardRepair {
    /// The Logstore.
    pub logstore: LogstoreName,
    /// What was done.
    #[serde(flatten)]
    pub report: RepairReport,
}

/// A Logstore that could not be repaired, in a [`StoreRepairReport`].
///
/// As JSON it has the fields `logstore`, `code`, `kind` and `message`.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct FailedRepair {
    /// The Logstore.
    pub logstore: LogstoreName,
    /// Why.
    #[serde(flatten)]
    pub error: Error,
}

/// Repairs the key audit log, the probes, and every shard. A Logstore that cannot be repaired does
/// not stop the others.
pub(super) fn repair_all(core: &Core, options: &RepairOptions) -> Result<StoreRepairReport> {
    core.registry.check_writable()?;
    let _borrowed = core.env.reserve.borrow();
    let mut report = StoreRepairReport {
        audit: repair_audit(core, options)?,
        probes: remove_damaged_probes(core, options)?,
        ..StoreRepairReport::default()
    };
    let names: Vec<LogstoreName> = core.registry.catalogue().logstores.keys().cloned().collect();
    for name in names {
        if let Err(error) = repair_logstore(core, &name, options, &mut report) {
            report.failed.push(FailedRepair { logstore: name, error });
        }
    }
    Ok(report)
}

fn repair_logstore(
    core: &Core,
    name: &LogstoreName,
    options: &RepairOptions,
    report: &mut StoreRepairReport,
) -> Result<()> {
    let (logstore, adopted) = open_with_any_metadata(core, name, options)?;
    let repaired = |adopted| MetadataRepair { logstore: name.clone(), adopted };
    report.metadata.extend(adopted.map(repaired));
    for shard in 0..logstore.table().shards().len() as u32 {
        let repaired = repair_shard(core, name, shard, options)?;
        if repaired.segment.is_some() || !repaired.losses.is_empty() {
            report.shards.push(ShardRepair { logstore: name.clone(), report: repaired });
        }
    }
    Ok(())
}

/// Whether an operator may accept this error as a loss.
fn may_be_accepted(error: &Error, options: &RepairOptions) -> bool {
    error.is_loss() || (options.accept_tampered && error.kind() == ErrorKind::Integrity)
}

/// Accepts the fault of the key audit log, if it has one: renames its files, and begins a new log
/// with a record of the loss. The catalogue then names that record as the end of the log.
fn repair_audit(core: &Core, options: &RepairOptions) -> Result<Option<VerifyFault>> {
    let Core { env, keys, registry } = core;
    let mut admin = registry.administer()?;
    let known = registry.catalogue().audit.clone();
    let error = match keys.audit().verified(&[&known]) {
        Ok(_) => return Ok(None),
        Err(error) if may_be_accepted(&error, options) => error,
        Err(error) => return Err(error),
    };
    keys.audit().set_aside(&format!("damaged-{}-audit", env.clock.wall_us()))?;
    let detail = format!(
        "the key audit log up to record {} of the tag {}, by user {}: {error}",
        known.number,
        known.tag,
        rustix::process::getuid().as_raw(),
    );
    keys.audit().record(AuditEvent::LossAccepted, None, detail)?;
    admin.commit(vec![Change::Audited(keys.audit().head())])?;
    warn!(%error, "damage of the key audit log accepted");
    Ok(Some(VerifyFault::of(None, &error)))
}

/// Removes the probes that cannot be read, and objects of other types in their places.
fn remove_damaged_probes(core: &Core, options: &RepairOptions) -> Result<Vec<PathBuf>> {
    let _admin = core.registry.administer()?;
    let mut removed = Vec::new();
    for path in core.keys.probe_paths()? {
        match core.keys.read_probe(&path) {
            // No data is in an object of another type.
            Err(error @ Error::WrongFileType { .. }) => {
                remove_object(&*core.env.disk, &path, &error)?;
                warn!(path = %path.display(), %error, "object in the place of a probe removed");
                removed.push(path);
            }
            Err(error) if may_be_accepted(&error, options) => {
                core.env.disk.remove_file(&path).map_err(Error::io("remove", &path))?;
                warn!(path = %path.display(), %error, "damaged probe removed");
                removed.push(path);
            }
            Err(error) if !error.is_not_found() => return Err(error),
            _ => {}
        }
    }
    Ok(removed)
}

/// Removes an object of the wrong type, for which there is the error `wrong`. A directory with
/// contents stays.
fn remove_object(disk: &dyn Disk, path: &Path, wrong: &Error) -> Result<()> {
    let removed = match disk.stat(path).map_err(Error::io("look for", path))? {
        Some(found) if found.kind == FileKind::Directory => disk.remove_dir(path),
        Some(_) => disk.remove_file(path),
        None => Ok(()),
    };
    removed.map_err(|error| match error.kind() {
        std::io::ErrorKind::DirectoryNotEmpty => wrong.clone(),
        _ => Error::io("remove", path)(error),
    })
}

/// Deletes a Logstore whose metadata is lost. The audit log records the loss before anything else
/// changes.
///
/// # Errors
/// [`Error::InvalidArgument`] if the metadata can be read; and as for a deletion.
pub(super) fn give_up(core: &Core, name: &LogstoreName) -> Result<DeleteReport> {
    let Core { keys, registry, .. } = core;
    registry.check_writable()?;
    logstores::delete_if(core, name, |entry| {
        let cause = match registry.load_meta(name, entry) {
            Err(error) if error.kind() == ErrorKind::Integrity => error,
            Err(error) => return Err(error),
            Ok(_) => {
                let what = format!("the metadata of Logstore {name} is whole: nothing is given up");
                return Err(Error::InvalidArgument(what));
            }
        };
        let user = rustix::process::getuid().as_raw();
        let detail = format!("by user {user}: {cause}");
        keys.audit().record(AuditEvent::GivenUp, Some((name, entry.id)), &detail)?;
        warn!(logstore = %name, %cause, "Logstore given up");
        Ok(())
    })
}

/// Accepts the losses of a shard, and gives up the damaged data at its end. The audit log and the
/// catalogue record each loss before anything else changes.
pub(super) fn repair_shard(
    core: &Core,
    name: &LogstoreName,
    shard: u32,
    options: &RepairOptions,
) -> Result<RepairReport> {
    core.registry.check_writable()?;
    let _borrowed = core.env.reserve.borrow();
    let (logstore, metadata) = open_with_any_metadata(core, name, options)?;
    let missing = || Error::ShardMissing { logstore: name.clone(), shard };
    let shard = logstore.table().get(shard).cloned().ok_or_else(missing)?;
    let mut losses = Vec::new();
    loop {
        let found = shard.find_losses(options.accept_tampered)?;
        if found.is_empty() {
            break;
        }
        // The name of a lost segment may have hidden others, which are found then.
        for found in found {
            accept_loss(core, &logstore, &shard, &found)?;
            losses.push(AcceptedLoss::new(shard.id(), &found.loss));
        }
    }
    let report = shard.repair()?;
    Ok(RepairReport { losses, metadata, ..report })
}

fn accept_loss(
    core: &Core,
    logstore: &Arc<LogstoreShared>,
    shard: &Shard,
    found: &FoundLoss,
) -> Result<()> {
    let FoundLoss { loss, cause } = found;
    let (name, id) = (&logstore.name, logstore.id);
    let mut admin = core.registry.administer()?;
    admin.check_exists(logstore)?;
    let detail = format!(
        "shard {}, segments {} to {}, sequence numbers {} to before {}, by user {}: {cause}",
        shard.id(),
        loss.first,
        loss.last,
        loss.from_seq,
        loss.end_seq,
        rustix::process::getuid().as_raw(),
    );
    let change = Change::Lost { name: name.clone(), id, shard: shard.id(), loss: loss.clone() };
    let allowed = core.registry.catalogue().check_change(&change);
    allowed.map_err(|rule| Error::InvalidArgument(format!("the loss is not accepted: {rule}")))?;
    core.keys.audit().record(AuditEvent::LossAccepted, Some((name, id)), &detail)?;
    admin.commit(vec![change])?;
    shard.note_loss(loss.clone());
    let (first, last) = (loss.first, loss.last);
    warn!(logstore = %name, shard = shard.id(), first, last, %cause, "loss of segments accepted");
    Ok(())
}
