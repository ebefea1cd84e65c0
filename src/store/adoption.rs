//! Metadata in the place of the one that the catalogue names, which is lost.
//!
//! A copy that was made beside a writer may have the catalogue from before a change of a Logstore and
//! the metadata from after it, or the reverse. A repair puts the metadata of the copy in force.

use std::sync::Arc;

use tracing::warn;

use super::{
    catalogue::{Change, Entry},
    core::Core,
};
use crate::{
    Error, Result,
    config::LogstoreName,
    keys::AuditEvent,
    logstore::{LogstoreShared, Meta, MetaName},
    shard::{AdoptedMetadata, RepairOptions},
};

/// Finds or opens a Logstore. If the metadata that the catalogue names is lost, puts the newest
/// authentic metadata of the Logstore in force, under a new generation, and returns both
/// generations. Metadata that is not newer than the lost one takes the Logstore back, so `options` have to
/// allow that.
///
/// # Errors
/// As [`super::registry::Registry::logstore`], also if there is no such metadata.
pub(super) fn open_with_any_metadata(
    core: &Core,
    name: &LogstoreName,
    options: &RepairOptions,
) -> Result<(Arc<LogstoreShared>, Option<AdoptedMetadata>)> {
    match core.registry.logstore(name) {
        Err(error @ (Error::RolledBack { .. } | Error::Truncated { .. })) => {
            let adopted = adopt(core, name, options, &error)?;
            Ok((core.registry.logstore(name)?, Some(adopted)))
        }
        opened => opened.map(|logstore| (logstore, None)),
    }
}

fn adopt(
    core: &Core,
    name: &LogstoreName,
    options: &RepairOptions,
    lost: &Error,
) -> Result<AdoptedMetadata> {
    let Core { env, keys, registry } = core;
    let mut admin = registry.administer()?;
    let entry = registry.entry(name)?;
    let found = newest_metadata(core, name, &entry)?
        .filter(|found| found.generation > entry.generation || options.accept_tampered);
    let Some(found) = found else { return Err(lost.clone()) };
    let dir = env.logstore_dir(entry.id);
    let mut meta = found;
    let generation = meta.generation;
    meta.generation = generation.max(entry.generation) + 1;
    meta.save(&*env.disk, &dir, env.id, entry.id, &keys.keyring(), None)?;
    let user = rustix::process::getuid().as_raw();
    let detail = format!(
        "metadata of generation {}, by user {user}: that of generation {generation} is in force: {lost}",
        entry.generation
    );
    keys.audit().record(AuditEvent::MetadataAdopted, Some((name, entry.id)), detail)?;
    admin.commit(vec![Change::Replaced {
        name: name.clone(),
        id: entry.id,
        generation: meta.generation,
        tag: meta.tag,
    }])?;
    warn!(logstore = %name, generation, cause = %lost, "loss of metadata accepted");
    Ok(AdoptedMetadata { lost_generation: entry.generation, adopted_generation: generation })
}

/// The newest authentic metadata in the directory of a Logstore.
///
/// # Errors
/// [`Error::Io`], [`Error::ServiceKey`].
pub(super) fn newest_metadata(
    core: &Core,
    name: &LogstoreName,
    entry: &Entry,
) -> Result<Option<Meta>> {
    let Core { env, keys, .. } = core;
    let dir = env.logstore_dir(entry.id);
    for file in MetaName::list(&*env.disk, &dir)?.into_iter().rev() {
        let path = dir.join(file.to_string());
        let load = |keyring: &_| Meta::load_from(&*env.disk, &path, env.id, entry.id, keyring);
        match keys.with_keyring(load) {
            Ok(meta)
                if meta.config.name == *name && meta.config.shards.len() == entry.shards.len() =>
            {
                return Ok(Some(meta));
            }
            Err(error @ (Error::Io { .. } | Error::ServiceKey { .. })) if !error.is_not_found() => {
                return Err(error);
            }
            _ => {}
        }
    }
    Ok(None)
}
