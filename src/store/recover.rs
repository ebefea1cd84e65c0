//! Getting Logstores under customer master keys back when the service keyring is lost.

use std::{collections::BTreeMap, sync::Arc};

use serde::Serialize;

use super::{Entry, StoreShared, catalogue::Catalogue};
use crate::{
    Error, Result,
    config::{EncryptConf, LogstoreName},
    error::Location,
    ids::{LogstoreId, hex_decode},
    io::{FileKind, is_temporary},
    keys::{
        AuditEvent,
        envelope::KeysSection,
        gate::{Gate, GateKeys},
    },
    logstore::Meta,
    segment::parse_segment_file_name,
    shard::ShardRecord,
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
}

/// A Logstore that can be recovered.
struct Found {
    /// When its first data key was made.
    created_us: u64,
    meta: Meta,
    entry: Entry,
}

impl StoreShared {
    /// Recovers every Logstore whose data key a KMS unwraps, and writes a new catalogue of them.
    pub(super) fn recover_logstores(&self) -> Result<RecoverReport> {
        let mut report = RecoverReport::default();
        // Nothing is changed until every KMS has answered: should one be out of reach, all stays as it is.
        let found = self.find_logstores(&mut report)?;
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
            self.audit.record(AuditEvent::Recovered, Some((&name, id)), "without the keyring")?;
            catalogue.logstores.insert(name.clone(), found.entry);
            report.recovered.push(name);
        }
        let mut admin = lock(&self.admin);
        // Later than anything that the lost catalogue may have reached.
        catalogue.generation = admin.catalogue.generation.max(self.clock.wall_us());
        self.commit(&mut admin, |place| *place = catalogue)?;
        Ok(report)
    }

    /// Every Logstore whose metadata its own data key vouches for.
    fn find_logstores(&self, report: &mut RecoverReport) -> Result<BTreeMap<LogstoreName, Found>> {
        let parent = self.dir.join("logstores");
        let mut all: BTreeMap<LogstoreName, Found> = BTreeMap::new();
        for entry in self.disk.list_dir(&parent).map_err(Error::io("list", &parent))? {
            let Ok(id) = entry.name.parse::<LogstoreId>() else { continue };
            let (name, found) = match self.find_logstore(id) {
                Ok(found) => found,
                Err(error @ (Error::Io { .. } | Error::KmsUnreachable { .. })) => return Err(error),
                Err(error) => {
                    report.lost.push((id, error.to_string()));
                    continue;
                }
            };
            // One that was deleted may not be all gone: the one that was made later has the name.
            let older = match all.remove(&name) {
                Some(other) if other.created_us > found.created_us => {
                    all.insert(name.clone(), other);
                    Some(id)
                }
                other => {
                    all.insert(name.clone(), found);
                    other.map(|other| other.entry.id)
                }
            };
            if let Some(older) = older {
                report.lost.push((older, format!("there is a newer Logstore of the name {name}")));
            }
        }
        Ok(all)
    }

    fn find_logstore(&self, id: LogstoreId) -> Result<(LogstoreName, Found)> {
        let dir = self.logstore_dir(id);
        let unwrap = |keys: &KeysSection| {
            let Some(cmk) = &keys.cmk else {
                let path = read(&self.keyring).path().to_owned();
                return Err(Error::KeyringForeign { path });
            };
            // A lease of its own: those of the store rest on probes that the lost keyring authenticated.
            let lease = self.new_lease(cmk, self.envelope_probe(keys, id)?);
            let gate_keys = GateKeys { section: Some(Arc::new(keys.clone())), lease: Some(lease) };
            Gate::new(Arc::clone(&self.keys), keys.name.clone(), id, gate_keys).unwrap(keys.current)
        };
        let mut meta = Meta::load_without_keyring(&*self.disk, &dir, self.id, id, unwrap)?;
        let tampered = || Error::Tampered { at: Location::new(&dir, 0), what: "the configuration of a Logstore" };
        let keys = meta.keys.as_ref().ok_or_else(tampered)?;
        let (name, created_us) = (keys.name.clone(), keys.versions.first().map_or(0, |version| version.created_us));
        // Nothing vouches for the configuration: what the keys section says as well counts, and encryption is on, whatever it says.
        meta.config.name = name.clone();
        meta.config.encrypt_conf =
            Some(EncryptConf { enable: true, encrypt_type: Some(keys.encrypt_type), user_cmk_info: keys.cmk.clone() });
        if meta.config.check().is_err() {
            return Err(tampered());
        }
        // Nor for the generation, which has to be one.
        meta.generation = meta.generation.clamp(1, u64::MAX - 1);
        let mut shards = Vec::new();
        for info in &meta.config.shards {
            let shard = crate::logstore::shard_dir(&dir, info.id);
            if self.disk.stat(&shard).map_err(Error::io("look for", &shard))?.is_none() {
                return Err(Error::truncated(Location::new(&shard, 0), "the directory of a shard is missing"));
            }
            let mut first: Option<(u64, u64)> = None;
            for entry in self.disk.list_dir(&shard).map_err(Error::io("list", &shard))? {
                let found = parse_segment_file_name(&entry.name);
                first = match (first, found) {
                    (Some(first), Some(found)) => Some(first.min(found)),
                    (first, found) => first.or(found),
                };
            }
            shards.push(match first {
                Some((first_ordinal, first_seq)) => ShardRecord { first_ordinal, first_seq, head: None },
                None => ShardRecord::default(),
            });
        }
        let entry = Entry { id, generation: meta.generation, shards };
        Ok((name, Found { created_us, meta, entry }))
    }
}
