//! Comparing a store with its anchor when it is opened, and the first feeding of the anchor.

use std::collections::BTreeSet;

use super::{
    anchor::AnchorStatus,
    catalogue::{Catalogue, Entry},
    core::Core,
};
use crate::{
    Error, Result,
    config::LogstoreName,
    ids::LogstoreId,
    keys::AuditEvent,
    shard::{Head, Loss, ShardRecord},
};

/// Compares a store with the catalogue that its anchor keeps. Reads at most two headers of each
/// shard that has changed since.
///
/// # Errors
/// [`Error::RolledBack`]: the store is older or shorter than its anchor.
pub(super) fn check(core: &Core, kept: &Catalogue) -> Result<()> {
    let now = core.registry.catalogue().clone();
    if now.generation < kept.generation {
        let (found, known) = (now.generation, kept.generation);
        return Err(rolled_back(format!(
            "the catalogue ends with record {found}, the anchor knows {known}"
        )));
    }
    let mut deleted: Option<BTreeSet<LogstoreId>> = None;
    for (name, entry) in &kept.logstores {
        match now.logstores.get(name).filter(|found| found.id == entry.id) {
            Some(found) => check_logstore(core, name, found, entry)?,
            None if now.deleting.contains(&entry.id) => {}
            None => {
                if deleted.is_none() {
                    deleted = Some(deleted_since(core, kept)?);
                }
                if !deleted.as_ref().is_some_and(|deleted| deleted.contains(&entry.id)) {
                    return Err(rolled_back(format!(
                        "the anchor knows Logstore {name}, which is not there"
                    )));
                }
            }
        }
    }
    Ok(())
}

/// The Logstores that were deleted since, according to the audit log.
fn deleted_since(core: &Core, kept: &Catalogue) -> Result<BTreeSet<LogstoreId>> {
    let known = core.registry.catalogue().audit.clone();
    let records = core.keys.audit().verified(&[&known, &kept.audit])?;
    let since = records.into_iter().skip(kept.audit.number as usize);
    let deletions = since
        .filter(|record| matches!(record.event, AuditEvent::DeleteIntended | AuditEvent::Deleted))
        .filter_map(|record| record.logstore_id);
    Ok(deletions.collect())
}

fn check_logstore(core: &Core, name: &LogstoreName, found: &Entry, kept: &Entry) -> Result<()> {
    if found.generation < kept.generation {
        let (found, known) = (found.generation, kept.generation);
        let what = format!(
            "the metadata of Logstore {name} is of generation {found}, the anchor knows {known}"
        );
        return Err(rolled_back(what));
    }
    if found.shards.len() < kept.shards.len() {
        return Err(rolled_back(format!("the anchor knows more shards of Logstore {name}")));
    }
    for (shard, (found, kept)) in found.shards.iter().zip(&kept.shards).enumerate() {
        if found == kept {
            continue;
        }
        let what = |what: &str| {
            rolled_back(format!("shard {shard} of Logstore {name} {what} its anchor knows"))
        };
        if found.first_ordinal < kept.first_ordinal {
            return Err(what("has segments again that retention dropped, as"));
        }
        let ShardRecord { head: Some(head), .. } = kept else { continue };
        let unknown = |loss: &Loss| loss.first <= head.ordinal && !kept.losses.contains(loss);
        if found.losses.iter().any(unknown) {
            return Err(what("has lost segments that"));
        }
        if head.ordinal < found.first_ordinal || found.loss(head.ordinal).is_some() {
            continue;
        }
        match &found.head {
            Some(found) if found.ordinal == head.ordinal => {
                if !continues(found, head) {
                    return Err(what("does not go on from what"));
                }
            }
            Some(found) if found.ordinal > head.ordinal => {
                let logstore = core.registry.logstore(name)?;
                let Some(shard) = logstore.table().get(shard as u32).cloned() else { continue };
                if !shard.agrees_with(head)? {
                    return Err(what("does not go on from what"));
                }
            }
            _ => return Err(what("is shorter than")),
        }
    }
    Ok(())
}

/// Whether the head `found` continues the segment of the head `kept`.
fn continues(found: &Head, kept: &Head) -> bool {
    let same_digest = found.blocks > kept.blocks || found.digest == kept.digest;
    found.segment == kept.segment
        && found.blocks >= kept.blocks
        && same_digest
        && (found.sealed || !kept.sealed)
}

/// Feeds the anchor for the first time since the store was opened, and from then on after each
/// change of the catalogue. `without_anchor` means that the store was opened without comparing it
/// with the anchor; the store is then opened even if the anchor cannot be fed yet.
///
/// # Errors
/// [`Error::Anchor`] if the anchor cannot be fed, and [`Error::Io`].
pub(super) fn begin(core: &Core, without_anchor: bool) -> Result<()> {
    let Core { env, keys, registry } = core;
    if without_anchor && keys.keyring().is_anchored() {
        keys.audit().record(AuditEvent::OpenedWithoutAnchor, None, "")?;
    }
    let Some(feeder) = registry.anchor() else { return Ok(()) };
    registry.feed_anchor(feeder);
    let fed = match feeder.status().error {
        Some(why) if !without_anchor => {
            return Err(Error::Anchor {
                path: env.dir.clone(),
                why: format!("it cannot be written: {why}"),
            });
        }
        error => error.is_none(),
    };
    // The anchor now has a copy, so no opening for writing may ignore it.
    if fed && !keys.keyring().is_anchored() {
        let change = keys.change_keyring();
        let anchored = change.prepare(|keyring| keyring.anchor(&*env.random))?;
        let _admin = registry.administer()?;
        change.put(anchored)?;
        keys.audit().record(AuditEvent::Anchored, None, "")?;
    }
    if env.has_threads() {
        feeder.spawn().map_err(Error::io("start a thread for the anchor of", &env.dir))?;
    }
    Ok(())
}

/// The state of the anchor. `lacks` is the number of catalogue records that the anchor lacked when
/// the store was opened for reading with an anchor.
pub(super) fn status(core: &Core, lacks: Option<u64>) -> AnchorStatus {
    match core.registry.anchor() {
        Some(feeder) => feeder.status(),
        None => AnchorStatus {
            anchored: core.keys.keyring().is_anchored(),
            configured: lacks.is_some(),
            records_behind: lacks,
            ..AnchorStatus::default()
        },
    }
}

fn rolled_back(what: String) -> Error {
    Error::RolledBack { what }
}
