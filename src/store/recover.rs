//! Getting Logstores under customer master keys back when the service keyring is lost.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;
use tracing::warn;

use super::{Entry, StoreShared, catalogue::Catalogue};
use crate::{
    Error, Result,
    config::LogstoreName,
    error::Location,
    ids::{LogstoreId, StoreId, hex_decode},
    io::{Disk, FileKind, OpenMode, is_temporary},
    keys::{
        AuditEvent,
        envelope::KeysSection,
        gate::{Gate, GateKeys},
    },
    kms::Cmk,
    logstore::{Meta, MetaName},
    segment::{KeySource, SegmentName},
    shard::{ShardRecord, read_header},
    sync::{lock, read},
};

/// What was recovered without the keyring.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RecoverReport {
    /// Logstores that are back.
    pub recovered: Vec<LogstoreName>,
    /// Directories of Logstores that are not, and why. Nothing of them was touched.
    pub lost: Vec<(LogstoreId, String)>,
    /// Logstores that the caller expected and that are not back.
    pub missing: Vec<LogstoreName>,
    /// Segments of recovered Logstores from before encryption was turned on. They were authenticated under the lost service key, so
    /// reading them fails. Reading from the first sequence number behind them works.
    #[serde(serialize_with = "crate::error::paths_as_text")]
    pub unauthenticated: Vec<PathBuf>,
}

/// A Logstore as its metadata describes it. Nothing authenticates this: an attacker who can write the disk chooses all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Recoverable {
    /// The id, from the name of its directory.
    pub id: LogstoreId,
    /// The name.
    pub name: LogstoreName,
    /// The master key and the role that a recovery would use; `None` under the service key, where no recovery is possible.
    pub cmk: Option<Cmk>,
}

/// A Logstore that can be recovered.
struct Found {
    meta: Meta,
    entry: Entry,
    unauthenticated: Vec<PathBuf>,
}

/// Lists the Logstores of a store by their metadata, which is not authenticated. Damaged metadata is left out.
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
            Err(error) => warn!(logstore = %id, %error, "the metadata of a Logstore cannot be read"),
        }
    }
    found.sort_by(|a, b| (&a.name, a.id).cmp(&(&b.name, b.id)));
    Ok(found)
}

/// The newest metadata of a Logstore, which is not authenticated, and its file. A process may have died between writing a newer one and
/// noting it in the catalogue, and the Logstore gone on under the older one: the last segment of each shard tells that.
fn newest_meta(disk: &dyn Disk, dir: &Path, store: StoreId, id: LogstoreId) -> Result<(PathBuf, Meta)> {
    let mut found = Err(Error::truncated(Location::new(dir, 0), "the metadata of a Logstore is missing"));
    for name in MetaName::list(disk, dir)?.iter().rev() {
        let path = dir.join(name.to_string());
        match Meta::load_unverified(disk, &path, store, id) {
            Ok(meta) if segments_go_with(disk, dir, &meta)? => return Ok((path, meta)),
            Ok(meta) if found.is_err() => found = Ok((path, meta)),
            Err(error) if found.is_err() => found = Err(error),
            _ => {}
        }
    }
    found
}

/// Whether the last segment of each shard is under the data key that owns its ordinal. Nothing of it is authenticated.
fn segments_go_with(disk: &dyn Disk, dir: &Path, meta: &Meta) -> Result<bool> {
    let Some(keys) = &meta.keys else { return Ok(true) };
    for shard in 0..keys.shard_count() as u32 {
        let shard_dir = crate::logstore::shard_dir(dir, shard);
        let names = match disk.list_dir(&shard_dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            entries => entries.map_err(Error::io("list", &shard_dir))?,
        };
        let last = names.iter().filter_map(|entry| Some((SegmentName::parse(&entry.name)?, &entry.name))).max();
        let Some((name, file)) = last else { continue };
        let path = shard_dir.join(file);
        // A segment that cannot be read decides nothing.
        let header = disk
            .open(&path, OpenMode::Read)
            .map_err(Error::io("open", &path))
            .and_then(|file| read_header(&*file, &path));
        if let Ok(header) = header
            && let KeySource::DataKey(version) = header.header.key_source
            && keys.owner(shard, name.ordinal) != Some(version)
        {
            return Ok(false);
        }
    }
    Ok(true)
}

impl StoreShared {
    /// Recovers every expected Logstore whose data key a KMS unwraps, and writes a new catalogue of them.
    pub(super) fn recover_logstores(&self, expected: &BTreeMap<LogstoreName, Cmk>) -> Result<RecoverReport> {
        let mut report = RecoverReport::default();
        // Nothing is changed until every KMS has answered: should one be out of reach, all stays as it is.
        let found = self.find_logstores(expected, &mut report)?;
        let mut catalogue = Catalogue::default();
        // The probes were authenticated under the lost keyring; the Logstores' own envelopes serve instead.
        let probes = self.dir.join("probes");
        for entry in self.disk.list_dir(&probes).map_err(Error::io("list", &probes))? {
            let is_probe = |name: &str| hex_decode(name).is_some_and(|id| id.len() == 16);
            let stem = entry.name.split('.').next().unwrap_or_default();
            let ours = is_probe(&entry.name) || (is_probe(stem) && is_temporary(&entry.name, stem));
            if entry.kind != FileKind::File || !ours {
                continue;
            }
            let path = probes.join(&entry.name);
            self.disk.remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        self.audit.set_aside(&format!("lost-keyring-{}-audit", self.clock.wall_us()))?;
        for (name, mut found) in found {
            let id = found.entry.id;
            found.meta.save(&*self.disk, &self.logstore_dir(id), self.id, id, &read(&self.keyring), None)?;
            found.entry.tag = found.meta.tag;
            self.audit.record(AuditEvent::Recovered, Some((&name, id)), "without the keyring")?;
            catalogue.logstores.insert(name.clone(), found.entry);
            report.unauthenticated.append(&mut found.unauthenticated);
            report.recovered.push(name);
        }
        // In the order of the names, as the map was.
        report.missing =
            expected.keys().filter(|name| report.recovered.binary_search(name).is_err()).cloned().collect();
        let mut admin = lock(&self.admin);
        // Later than anything that the lost catalogue may have reached.
        catalogue.generation = self.catalogue.now().generation.max(self.clock.wall_us());
        catalogue.audit = self.audit.head_after(&catalogue.audit);
        self.catalogue.replace(catalogue).inspect_err(|error| admin.latched = Some(error.clone()))?;
        Ok(report)
    }

    /// Every expected Logstore whose keys section its own data key authenticates.
    fn find_logstores(
        &self,
        expected: &BTreeMap<LogstoreName, Cmk>,
        report: &mut RecoverReport,
    ) -> Result<BTreeMap<LogstoreName, Found>> {
        let parent = self.dir.join("logstores");
        let mut all: BTreeMap<LogstoreName, Found> = BTreeMap::new();
        for entry in self.disk.list_dir(&parent).map_err(Error::io("list", &parent))? {
            let Ok(id) = entry.name.parse::<LogstoreId>() else { continue };
            let (name, found) = match self.find_logstore(id, expected) {
                Ok(found) => found,
                Err(error @ (Error::Io { .. } | Error::KmsUnreachable { .. })) => return Err(error),
                Err(error) => {
                    report.lost.push((id, error.to_string()));
                    continue;
                }
            };
            if let Some(other) = all.insert(name.clone(), found) {
                let (here, other) = (self.logstore_dir(id), self.logstore_dir(other.entry.id));
                let what = format!(
                    "there are two Logstores of the name {name}, the other is in {}; move one of the directories away and recover \
                     again",
                    other.display()
                );
                return Err(Error::corrupt(Location::new(here, 0), what));
            }
        }
        Ok(all)
    }

    fn find_logstore(&self, id: LogstoreId, expected: &BTreeMap<LogstoreName, Cmk>) -> Result<(LogstoreName, Found)> {
        let dir = self.logstore_dir(id);
        let unwrap = |keys: &KeysSection| {
            let Some(cmk) = &keys.cmk else {
                let path = read(&self.keyring).path().to_owned();
                return Err(Error::KeyringForeign { path });
            };
            // Asked before the KMS is: it would assume any role that an attacker wrote into the metadata.
            if expected.get(&keys.name) != Some(cmk) {
                return Err(Error::UnexpectedCmk { logstore: keys.name.clone(), cmk: cmk.clone() });
            }
            // A lease of its own: those of the store rest on probes that the lost keyring authenticated.
            let lease = self.new_lease(cmk, self.envelope_probe(keys, id)?);
            let gate_keys = GateKeys { section: Some(Arc::new(keys.clone())), lease: Some(lease), unproved: None };
            Gate::new(Arc::clone(&self.keys), keys.name.clone(), id, gate_keys).unwrap(keys.current)
        };
        let (path, _) = newest_meta(&*self.disk, &dir, self.id, id)?;
        let mut meta = Meta::load_without_keyring(&*self.disk, &path, self.id, id, unwrap)?;
        let tampered = || Error::Tampered { at: Location::new(&dir, 0), what: "the configuration of a Logstore" };
        let keys = meta.keys.as_ref().ok_or_else(tampered)?;
        let (name, keys) = (keys.name.clone(), keys.clone());
        // Nothing authenticates the configuration. Where the keys section has the same setting, that one counts.
        keys.lead(&mut meta.config);
        if meta.config.check().is_err() || meta.config.shards.len() != keys.shard_count() {
            return Err(tampered());
        }
        // Nor for the generation, which has to be one.
        meta.generation = meta.generation.clamp(keys.since, u64::MAX - 1);
        let (mut shards, mut unauthenticated) = (Vec::new(), Vec::new());
        for info in &meta.config.shards {
            let shard = crate::logstore::shard_dir(&dir, info.id);
            if self.disk.stat(&shard).map_err(Error::io("look for", &shard))?.is_none() {
                return Err(Error::truncated(Location::new(&shard, 0), "the directory of a shard is missing"));
            }
            let mut first: Option<SegmentName> = None;
            for entry in self.disk.list_dir(&shard).map_err(Error::io("list", &shard))? {
                let found = SegmentName::parse(&entry.name);
                if found.is_some_and(|name| keys.owner(info.id, name.ordinal).is_none()) {
                    unauthenticated.push(shard.join(&entry.name));
                }
                first = match (first, found) {
                    (Some(first), Some(found)) => Some(first.min(found)),
                    (first, found) => first.or(found),
                };
            }
            shards.push(match first {
                Some(SegmentName { ordinal: first_ordinal, first_seq, .. }) => {
                    ShardRecord { first_ordinal, first_seq, head: None }
                }
                None => ShardRecord::default(),
            });
        }
        unauthenticated.sort();
        let entry = Entry { id, generation: meta.generation, tag: meta.tag, shards };
        Ok((name, Found { meta, entry, unauthenticated }))
    }
}
