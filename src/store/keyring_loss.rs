//! Recovery without the keyring: Logstores under customer master keys outlive the loss of the
//! service keyring.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use serde::Serialize;
use tracing::warn;

use super::{
    catalogue::{Catalogue, Entry},
    core::Core,
};
use crate::{
    Error, Result,
    config::LogstoreName,
    error::Location,
    ids::{LogstoreId, StoreId},
    io::{Disk, OpenMode},
    keys::{AuditEvent, envelope::KeysSection},
    kms::Cmk,
    logstore::{Meta, MetaName, shard_dir},
    segment::{KeySource, SegmentName},
    shard::{ShardRecord, read_header},
};

/// The result of a recovery without the keyring.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RecoverReport {
    /// The Logstores that were recovered.
    pub recovered: Vec<LogstoreName>,
    /// The directories of Logstores that were not recovered, each with the reason. They are
    /// unchanged.
    pub lost: Vec<(LogstoreId, String)>,
    /// The Logstores that the caller expected and that were not recovered.
    pub missing: Vec<LogstoreName>,
    /// The segments of recovered Logstores from before encryption was turned on. The lost service
    /// key authenticated them, so reading them fails. Reading from the first sequence number
    /// behind them works.
    #[serde(serialize_with = "crate::error::paths_as_text")]
    pub unauthenticated: Vec<PathBuf>,
}

/// The progress of a recovery without the keyring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RecoverProgress {
    /// The number of directories of Logstores that are done.
    pub done: usize,
    /// The number of all directories of Logstores.
    pub total: usize,
}

/// A Logstore as its metadata describes it. Nothing authenticates the metadata: an attacker who can
/// write the disk chooses all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Recoverable {
    /// The id, from the name of its directory.
    pub id: LogstoreId,
    /// The name.
    pub name: LogstoreName,
    /// The master key and the role that a recovery would use. `None` for a Logstore under the
    /// service key, which cannot be recovered.
    pub cmk: Option<Cmk>,
}

/// A Logstore that can be recovered.
struct Found {
    meta: Meta,
    entry: Entry,
    unauthenticated: Vec<PathBuf>,
}

/// Lists the Logstores of a store by their metadata, which is not authenticated. Leaves out
/// damaged metadata.
pub(super) fn recoverable(disk: &dyn Disk, dir: &Path, store: StoreId) -> Result<Vec<Recoverable>> {
    let parent = dir.join("logstores");
    let mut found = Vec::new();
    for entry in disk.list_dir(&parent).map_err(Error::io("list", &parent))? {
        let Ok(id) = entry.name.parse::<LogstoreId>() else { continue };
        match newest_meta(disk, &parent.join(&entry.name), store, id).map(|(_, meta)| meta) {
            Ok(Meta { config, keys, .. }) => {
                let name = keys.as_ref().map_or(config.name, |keys| keys.name.clone());
                found.push(Recoverable { id, name, cmk: keys.and_then(|keys| keys.cmk) });
            }
            Err(error @ Error::Io { .. }) => return Err(error),
            Err(error) => warn!(logstore = %id, %error, "metadata of a Logstore not readable"),
        }
    }
    found.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    Ok(found)
}

/// The newest metadata of a Logstore, which is not authenticated, and its file.
///
/// A process may have died between writing newer metadata and its commit to the catalogue. The
/// Logstore then continued under the older metadata. The last segment of each shard shows that.
fn newest_meta(
    disk: &dyn Disk,
    dir: &Path,
    store: StoreId,
    id: LogstoreId,
) -> Result<(PathBuf, Meta)> {
    let mut found =
        Err(Error::truncated(Location::new(dir, 0), "the metadata of a Logstore is missing"));
    for name in MetaName::list(disk, dir)?.iter().rev() {
        let path = dir.join(name.to_string());
        match Meta::load_unverified(disk, &path, store, id) {
            Ok(meta) if segments_fit(disk, dir, &meta)? => return Ok((path, meta)),
            Ok(meta) if found.is_err() => found = Ok((path, meta)),
            Err(error) if found.is_err() => found = Err(error),
            _ => {}
        }
    }
    found
}

/// Whether the last segment of each shard is under the data key that owns its ordinal. Neither is
/// authenticated.
fn segments_fit(disk: &dyn Disk, dir: &Path, meta: &Meta) -> Result<bool> {
    let Some(keys) = &meta.keys else { return Ok(true) };
    for shard in 0..keys.shard_count() as u32 {
        let shard_dir = shard_dir(dir, shard);
        let names = match disk.list_dir(&shard_dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries.map_err(Error::io("list", &shard_dir))?,
        };
        let last = names
            .iter()
            .filter_map(|entry| Some((SegmentName::parse(&entry.name)?, &entry.name)))
            .max();
        let Some((name, file)) = last else { continue };
        let path = shard_dir.join(file);
        // A segment that cannot be read is ignored.
        let header = disk
            .open(&path, OpenMode::Read)
            .map_err(Error::io("open", &path))
            .and_then(|file| read_header(&*file, &path));
        if let Ok(header) = header
            && let KeySource::DataKey(version) = header.key_source
            && keys.owner(shard, name.ordinal) != Some(version)
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Recovers every expected Logstore whose data key a KMS unwraps, and writes a new catalogue of
/// them.
pub(super) fn recover_logstores(
    core: &Core,
    expected: &BTreeMap<LogstoreName, Cmk>,
    progress: &mut dyn FnMut(&RecoverProgress),
) -> Result<RecoverReport> {
    let Core { env, keys, registry } = core;
    let mut report = RecoverReport::default();
    // Nothing is changed until every KMS has answered. If a KMS is unreachable, the store stays as
    // it is.
    let found = find_logstores(core, expected, &mut report, progress)?;
    let mut catalogue = Catalogue::default();
    keys.remove_probes()?;
    keys.audit().set_aside(&format!("lost-keyring-{}-audit", env.clock.wall_us()))?;
    for (name, mut found) in found {
        let id = found.entry.id;
        found.meta.save(&*env.disk, &env.logstore_dir(id), env.id, id, &keys.keyring(), None)?;
        found.entry.tag = found.meta.tag;
        keys.audit().record(AuditEvent::Recovered, Some((&name, id)), "without the keyring")?;
        catalogue.logstores.insert(name.clone(), found.entry);
        report.unauthenticated.append(&mut found.unauthenticated);
        report.recovered.push(name);
    }
    // `recovered` is sorted, as the map is.
    report.missing = expected
        .keys()
        .filter(|name| report.recovered.binary_search(name).is_err())
        .cloned()
        .collect();
    let mut admin = registry.exclusive();
    // Above every generation that the lost catalogue may have reached.
    catalogue.generation = registry.catalogue().generation.max(env.clock.wall_us());
    catalogue.audit = keys.audit().head_after(&catalogue.audit);
    admin.replace_catalogue(catalogue)?;
    Ok(report)
}

/// Finds every expected Logstore whose keys section its own data key authenticates.
fn find_logstores(
    core: &Core,
    expected: &BTreeMap<LogstoreName, Cmk>,
    report: &mut RecoverReport,
    progress: &mut dyn FnMut(&RecoverProgress),
) -> Result<BTreeMap<LogstoreName, Found>> {
    let env = &core.env;
    let parent = env.logstores_dir();
    let mut all: BTreeMap<LogstoreName, Found> = BTreeMap::new();
    let entries = env.disk.list_dir(&parent).map_err(Error::io("list", &parent))?;
    let ids: Vec<LogstoreId> = entries.iter().filter_map(|entry| entry.name.parse().ok()).collect();
    for (done, &id) in ids.iter().enumerate() {
        progress(&RecoverProgress { done, total: ids.len() });
        let (name, found) = match find_logstore(core, id, expected) {
            Ok(found) => found,
            Err(error @ (Error::Io { .. } | Error::KmsUnreachable { .. })) => return Err(error),
            Err(error) => {
                report.lost.push((id, error.to_string()));
                continue;
            }
        };
        if let Some(other) = all.insert(name.clone(), found) {
            let (here, other) = (env.logstore_dir(id), env.logstore_dir(other.entry.id));
            let what = format!(
                "there are two Logstores of the name {name}, the other is in {}; move one of the directories away and recover \
                 again",
                other.display()
            );
            return Err(Error::corrupt(Location::new(here, 0), what));
        }
    }
    progress(&RecoverProgress { done: ids.len(), total: ids.len() });
    Ok(all)
}

fn find_logstore(
    core: &Core,
    id: LogstoreId,
    expected: &BTreeMap<LogstoreName, Cmk>,
) -> Result<(LogstoreName, Found)> {
    let env = &core.env;
    let dir = env.logstore_dir(id);
    let unwrap = |section: &KeysSection| {
        let Some(cmk) = &section.cmk else {
            let path = core.keys.keyring().path().to_owned();
            return Err(Error::KeyringForeign { path });
        };
        // Checked before the KMS call, because the KMS would assume any role that an attacker
        // wrote into the metadata.
        if expected.get(&section.name) != Some(cmk) {
            return Err(Error::UnexpectedCmk { logstore: section.name.clone(), cmk: cmk.clone() });
        }
        core.keys.unwrap_without_keyring(section, cmk, id)
    };
    let (path, _) = newest_meta(&*env.disk, &dir, env.id, id)?;
    let mut meta = Meta::load_without_keyring(&*env.disk, &path, env.id, id, unwrap)?;
    let tampered =
        || Error::Tampered { at: Location::new(&dir, 0), what: "the configuration of a Logstore" };
    let keys = meta.keys.as_ref().ok_or_else(tampered)?;
    let (name, keys) = (keys.name.clone(), keys.clone());
    // Nothing authenticates the configuration. Settings that the keys section repeats are taken
    // from the section.
    keys.lead(&mut meta.config);
    if meta.config.check().is_err() || meta.config.shards.len() != keys.shard_count() {
        return Err(tampered());
    }
    // Nothing authenticates the generation either, so it is forced into its range.
    meta.generation = meta.generation.clamp(keys.since, u64::MAX - 1);
    let (mut shards, mut unauthenticated) = (Vec::new(), Vec::new());
    for info in &meta.config.shards {
        shards.push(find_shard(
            &*env.disk,
            &shard_dir(&dir, info.id),
            info.id,
            &keys,
            &mut unauthenticated,
        )?);
    }
    unauthenticated.sort();
    let entry = Entry { id, generation: meta.generation, tag: meta.tag, shards };
    Ok((name, Found { meta, entry, unauthenticated }))
}

/// The record of a shard by the names of its segments. Adds the segments from before the first
/// data key to `unauthenticated`.
fn find_shard(
    disk: &dyn Disk,
    dir: &Path,
    id: u32,
    keys: &KeysSection,
    unauthenticated: &mut Vec<PathBuf>,
) -> Result<ShardRecord> {
    if disk.stat(dir).map_err(Error::io("look for", dir))?.is_none() {
        return Err(Error::truncated(Location::new(dir, 0), "the directory of a shard is missing"));
    }
    let mut first: Option<SegmentName> = None;
    for entry in disk.list_dir(dir).map_err(Error::io("list", dir))? {
        let Some(name) = SegmentName::parse(&entry.name) else { continue };
        if keys.owner(id, name.ordinal).is_none() {
            unauthenticated.push(dir.join(&entry.name));
        }
        first = Some(first.map_or(name, |first| first.min(name)));
    }
    Ok(match first {
        Some(SegmentName { ordinal: first_ordinal, first_seq, .. }) => {
            ShardRecord { first_ordinal, first_seq, ..ShardRecord::default() }
        }
        None => ShardRecord::default(),
    })
}
