//! Getting Logstores under customer master keys back when the service keyring is lost.

use serde::Serialize;

use super::{Entry, StoreShared, catalogue::Catalogue};
use crate::{
    Error, Result,
    config::LogstoreName,
    ids::LogstoreId,
    keys::{AuditEvent, gate::Gate},
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

impl StoreShared {
    /// Recovers every Logstore whose data key a KMS unwraps, and writes a new catalogue of them.
    pub(super) fn recover_logstores(&self) -> Result<RecoverReport> {
        let mut report = RecoverReport::default();
        let parent = self.dir.join("logstores");
        let mut catalogue = Catalogue::default();
        // The probes were authenticated under the lost keyring; the Logstores' own envelopes serve instead.
        let probes = self.dir.join("probes");
        for entry in self.disk.list_dir(&probes).map_err(Error::io("list", &probes))? {
            let path = probes.join(&entry.name);
            self.disk.remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        for entry in self.disk.list_dir(&parent).map_err(Error::io("list", &parent))? {
            let Ok(id) = entry.name.parse::<LogstoreId>() else { continue };
            match self.recover_logstore(id) {
                Ok((name, recovered)) => {
                    self.audit.record(AuditEvent::Recovered, Some((&name, id)), "without the keyring")?;
                    catalogue.logstores.insert(name.clone(), recovered);
                    report.recovered.push(name);
                }
                Err(error @ (Error::Io { .. } | Error::KmsUnreachable { .. })) => return Err(error),
                Err(error) => report.lost.push((id, error.to_string())),
            }
        }
        let mut admin = lock(&self.admin);
        // Later than anything that the lost catalogue may have reached.
        catalogue.generation = admin.catalogue.generation.max(self.clock.wall_us());
        self.commit(&mut admin, |place| *place = catalogue)?;
        Ok(report)
    }

    fn recover_logstore(&self, id: LogstoreId) -> Result<(LogstoreName, Entry)> {
        let dir = self.logstore_dir(id);
        let unwrap = |keys: &crate::keys::envelope::KeysSection| {
            if keys.cmk.is_none() {
                let path = read(&self.keyring).path().to_owned();
                return Err(Error::KeyringForeign { path });
            }
            let gate_keys = self.gate_keys(Some(keys), id)?;
            let gate = Gate::new(std::sync::Arc::clone(&self.keys), keys.name.clone(), id, gate_keys);
            gate.admit()?;
            gate.unwrap(keys.current)
        };
        let mut meta = Meta::load_without_keyring(&*self.disk, &dir, self.id, id, unwrap)?;
        let name = meta.keys.as_ref().map_or_else(|| meta.config.name.clone(), |keys| keys.name.clone());
        meta.config.name = name.clone();
        let mut shards = Vec::new();
        for info in &meta.config.shards {
            let shard = crate::logstore::shard_dir(&dir, info.id);
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
        meta.save(&*self.disk, &dir, self.id, id, &read(&self.keyring), None)?;
        Ok((name, Entry { id, generation: meta.generation, shards }))
    }
}
