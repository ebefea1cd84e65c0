//! Metadata in the place of the one that the catalogue names, which is lost.
//!
//! A copy that was made beside a writer may have the catalogue from before a change of a Logstore and
//! the metadata from after it, or the reverse. A repair puts the metadata in force that is there.

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
};

/// Finds or opens a Logstore. If the metadata that the catalogue names is lost, puts the newest
/// authentic metadata of the Logstore in force that is there, under a new generation.
///
/// # Errors
/// As [`super::registry::Registry::logstore`], also if there is no such metadata.
pub(super) fn open_with_any_metadata(
    core: &Core,
    name: &LogstoreName,
) -> Result<Arc<LogstoreShared>> {
    match core.registry.logstore(name) {
        Err(error @ (Error::RolledBack { .. } | Error::Truncated { .. })) => {
            adopt(core, name, &error)?;
            core.registry.logstore(name)
        }
        opened => opened,
    }
}

fn adopt(core: &Core, name: &LogstoreName, lost: &Error) -> Result<()> {
    let Core { env, keys, registry } = core;
    let mut admin = registry.administer()?;
    let entry = registry.entry(name)?;
    let Some(found) = newest_metadata(core, name, &entry)? else { return Err(lost.clone()) };
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
    keys.audit().record(AuditEvent::LossAccepted, Some((name, entry.id)), detail)?;
    admin.commit(vec![Change::Replaced {
        name: name.clone(),
        id: entry.id,
        generation: meta.generation,
        tag: meta.tag,
    }])?;
    warn!(logstore = %name, generation, cause = %lost, "loss of metadata accepted");
    Ok(())
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
