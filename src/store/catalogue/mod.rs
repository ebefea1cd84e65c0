//! The catalogue: the Logstores by name, the metadata in force, and the recorded head of each
//! shard.
//!
//! On disk it is a snapshot with a journal of changes behind it ([`file`]). [`Journal`] writes it.

mod file;
mod journal;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    marker::PhantomData,
    path::{Path, PathBuf},
};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, MapAccess, Visitor},
};

use crate::{
    config::{LogstoreName, SHARDS_MAX},
    ids::{LogstoreId, hex_decode},
    keys::audit::AuditHead,
    logstore::MetaRef,
    shard::{Head, Loss, ShardRecord},
};

pub(super) use file::{
    Loaded, exists, is_catalogue_file_or_temporary, load_mirror, load_newest, newest_epoch,
    write_copy, write_first,
};
pub(super) use journal::Journal;

/// The most Logstores in a store.
pub const LOGSTORES_MAX: usize = 100_000;
/// The most shards in a store, of all its Logstores together: the catalogue records the head of
/// each.
pub const STORE_SHARDS_MAX: usize = 100_000;

/// The most accepted losses in a store. Retention forgets those that it has dropped.
const LOSSES_MAX: usize = 10_000;

/// One Logstore in the catalogue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Entry {
    pub(crate) id: LogstoreId,
    /// The generation of its metadata.
    pub(crate) generation: u64,
    /// Tag A of its metadata.
    #[serde(with = "crate::ids::hex")]
    pub(crate) tag: [u8; 32],
    pub(crate) shards: Vec<ShardRecord>,
}

impl Entry {
    /// The metadata in force.
    pub(crate) fn meta(&self) -> MetaRef {
        MetaRef { generation: self.generation, tag: self.tag }
    }

    /// Whether the other entry names the same metadata of the same Logstore.
    pub(crate) fn has_same_meta(&self, other: &Self) -> bool {
        (self.id, self.meta()) == (other.id, other.meta())
    }
}

/// The contents of the catalogue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Catalogue {
    /// The number of the last record of its journal. The frame stores it.
    #[serde(skip)]
    pub(crate) generation: u64,
    /// The recorded end of the key audit log.
    pub(crate) audit: AuditHead,
    #[serde(deserialize_with = "unique")]
    pub(crate) logstores: BTreeMap<LogstoreName, Entry>,
    /// The deleted Logstores whose files may not all be removed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) deleting: Vec<LogstoreId>,
    /// The state of retention; `None` until a Logstore has a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) retention: Option<RetentionState>,
}

/// When retention was applied, and how far the wall clock is trusted. Times are in microseconds
/// since the Unix epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RetentionState {
    /// When retention was applied last.
    pub(crate) retained_us: u64,
    /// The newest trusted time; `None` until a Logstore has retention by age.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) trusted_us: Option<u64>,
    /// The wall clock when its jump was first seen, while the clock is not trusted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) jump_us: Option<u64>,
}

/// The directory of the catalogue's files.
pub(crate) fn dir(store: &Path) -> PathBuf {
    store.join("catalogue")
}

/// One change of the catalogue. A record of the journal has the changes that one sync made durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Change {
    /// A Logstore was created.
    Created {
        name: LogstoreName,
        id: LogstoreId,
        generation: u64,
        #[serde(with = "crate::ids::hex")]
        tag: [u8; 32],
        shards: Vec<ShardRecord>,
    },
    /// The metadata of a Logstore was replaced.
    Replaced {
        name: LogstoreName,
        id: LogstoreId,
        generation: u64,
        #[serde(with = "crate::ids::hex")]
        tag: [u8; 32],
    },
    /// A Logstore was deleted. Its files may still exist.
    Deleted { name: LogstoreName, id: LogstoreId },
    /// The files of a deleted Logstore are removed.
    Removed { id: LogstoreId },
    /// A shard has this head.
    Reached { name: LogstoreName, id: LogstoreId, shard: u32, head: Head },
    /// Retention drops the segments before this ordinal, and the sequence numbers before this one.
    Dropped { name: LogstoreName, id: LogstoreId, shard: u32, first_ordinal: u64, first_seq: u64 },
    /// An operator has accepted the loss of segments of a shard.
    Lost { name: LogstoreName, id: LogstoreId, shard: u32, loss: Loss },
    /// The key audit log has this end.
    Audited(AuditHead),
    /// Retention has this state.
    Retained(RetentionState),
}

impl Change {
    pub(crate) fn reached(name: &LogstoreName, id: LogstoreId, shard: u32, head: Head) -> Self {
        Self::Reached { name: name.clone(), id, shard, head }
    }

    /// Whether the change has no effect, because its Logstore was deleted since.
    fn is_moot(&self, catalogue: &Catalogue) -> bool {
        match self {
            Self::Reached { name, id, .. } => {
                catalogue.logstores.get(name).is_none_or(|entry| entry.id != *id)
            }
            _ => false,
        }
    }
}

impl Catalogue {
    /// Checks that a change can be made.
    ///
    /// # Errors
    /// The rule of the format that the change breaks.
    pub(crate) fn check_change(&self, change: &Change) -> std::result::Result<(), &'static str> {
        match change {
            Change::Created { name, generation, shards, .. } => {
                if self.logstores.contains_key(name) {
                    return Err("a change makes a Logstore that is there");
                }
                if self.logstores.len() >= LOGSTORES_MAX {
                    return Err("there are too many Logstores");
                }
                check_entry(*generation, shards)
            }
            Change::Replaced { name, id, generation, .. } => {
                let entry = self.entry(name, *id)?;
                if *generation <= entry.generation {
                    return Err("a change takes the metadata of a Logstore back");
                }
                check_entry(*generation, &entry.shards)
            }
            Change::Deleted { name, id } => self.entry(name, *id).map(drop),
            Change::Removed { .. } => Ok(()),
            Change::Reached { name, id, shard, head } => {
                let record = self.shard(name, *id, *shard)?;
                check_shard(&ShardRecord { head: Some(head.clone()), ..record.clone() })
            }
            Change::Dropped { name, id, shard, first_ordinal, first_seq } => {
                let record = self.shard(name, *id, *shard)?;
                if *first_ordinal < record.first_ordinal || *first_seq < record.first_seq {
                    return Err("a change takes retention back");
                }
                check_shard(&ShardRecord { first_ordinal: *first_ordinal, ..record.clone() })
            }
            Change::Lost { name, id, shard, loss } => {
                let record = self.shard(name, *id, *shard)?;
                if self.losses() >= LOSSES_MAX {
                    return Err("there are too many accepted losses");
                }
                let mut record = record.clone();
                record.accept(loss.clone());
                check_shard(&record)
            }
            Change::Audited(head) => check_audit_head(head),
            Change::Retained(state) => check_retention(state),
        }
    }

    /// Makes a change.
    ///
    /// # Errors
    /// The rule of the format that the change breaks. Nothing has changed then.
    pub(crate) fn apply(&mut self, change: &Change) -> std::result::Result<(), &'static str> {
        self.check_change(change)?;
        match change {
            Change::Created { name, id, generation, tag, shards } => {
                let entry =
                    Entry { id: *id, generation: *generation, tag: *tag, shards: shards.clone() };
                self.logstores.insert(name.clone(), entry);
            }
            Change::Replaced { name, generation, tag, .. } => {
                if let Some(entry) = self.logstores.get_mut(name) {
                    (entry.generation, entry.tag) = (*generation, *tag);
                }
            }
            Change::Deleted { name, id } => {
                self.logstores.remove(name);
                self.deleting.push(*id);
            }
            Change::Removed { id } => self.deleting.retain(|deleting| deleting != id),
            Change::Reached { name, shard, head, .. } => {
                // Two threads may record heads of one shard in reverse order.
                if let Some(record) = self.shard_mut(name, *shard)
                    && record.head.as_ref().is_none_or(|known| known.reach() <= head.reach())
                {
                    record.head = Some(head.clone());
                }
            }
            Change::Dropped { name, shard, first_ordinal, first_seq, .. } => {
                if let Some(record) = self.shard_mut(name, *shard) {
                    (record.first_ordinal, record.first_seq) = (*first_ordinal, *first_seq);
                    record.forget_dropped_losses();
                }
            }
            Change::Lost { name, shard, loss, .. } => {
                if let Some(record) = self.shard_mut(name, *shard) {
                    record.accept(loss.clone());
                }
            }
            Change::Audited(head) => self.audit = head.clone(),
            Change::Retained(state) => self.retention = Some(*state),
        }
        Ok(())
    }

    /// Adds shards without a segment to a Logstore.
    ///
    /// # Errors
    /// The rule of the format that the shards would break.
    pub(crate) fn add_shards(
        &mut self,
        name: &LogstoreName,
        id: LogstoreId,
        count: usize,
    ) -> std::result::Result<(), &'static str> {
        self.entry(name, id)?;
        if let Some(entry) = self.logstores.get_mut(name) {
            entry.shards.resize_with(entry.shards.len() + count, ShardRecord::default);
        }
        self.check()
    }

    fn entry(
        &self,
        name: &LogstoreName,
        id: LogstoreId,
    ) -> std::result::Result<&Entry, &'static str> {
        let entry = self.logstores.get(name).filter(|entry| entry.id == id);
        entry.ok_or("a change is about a Logstore that is not there")
    }

    fn shard(
        &self,
        name: &LogstoreName,
        id: LogstoreId,
        shard: u32,
    ) -> std::result::Result<&ShardRecord, &'static str> {
        let record = self.entry(name, id)?.shards.get(shard as usize);
        record.ok_or("a change is about a shard that is not there")
    }

    fn shard_mut(&mut self, name: &LogstoreName, shard: u32) -> Option<&mut ShardRecord> {
        self.logstores.get_mut(name)?.shards.get_mut(shard as usize)
    }

    /// The number of accepted losses.
    fn losses(&self) -> usize {
        self.logstores
            .values()
            .flat_map(|entry| &entry.shards)
            .map(|shard| shard.losses.len())
            .sum()
    }

    /// Checks the rules that need no other document.
    fn check(&self) -> Result<(), &'static str> {
        check_audit_head(&self.audit)?;
        self.retention.as_ref().map_or(Ok(()), check_retention)?;
        if self.logstores.len() > LOGSTORES_MAX {
            return Err("there are too many Logstores");
        }
        if self.logstores.values().map(|entry| entry.shards.len()).sum::<usize>() > STORE_SHARDS_MAX
        {
            return Err("there are too many shards");
        }
        if self.losses() > LOSSES_MAX {
            return Err("there are too many accepted losses");
        }
        let mut ids = BTreeSet::new();
        if !self
            .logstores
            .values()
            .map(|entry| &entry.id)
            .chain(&self.deleting)
            .all(|id| ids.insert(*id))
        {
            return Err("a Logstore is there twice");
        }
        self.logstores.values().try_for_each(|entry| check_entry(entry.generation, &entry.shards))
    }
}

/// Checks the entry of one Logstore in a catalogue or a checkpoint.
///
/// # Errors
/// The rule of the format that the entry breaks.
pub(super) fn check_entry(generation: u64, shards: &[ShardRecord]) -> Result<(), &'static str> {
    // The next number must exist.
    let ordinals = 1..u64::MAX;
    if !ordinals.contains(&generation) {
        return Err("the generation of a Logstore is out of range");
    }
    if !(1..=SHARDS_MAX as usize).contains(&shards.len()) {
        return Err("the number of shards of a Logstore is out of range");
    }
    shards.iter().try_for_each(check_shard)
}

fn check_shard(shard: &ShardRecord) -> Result<(), &'static str> {
    let (ordinals, head) = (1..u64::MAX, shard.head.as_ref());
    if !ordinals.contains(&shard.first_ordinal)
        || !head.is_none_or(|head| ordinals.contains(&head.ordinal))
    {
        return Err("the ordinal of a segment is out of range");
    }
    if head.is_some_and(|head| head.next_seq < head.end_seq) {
        return Err("the next sequence number of a shard lies below its end");
    }
    let mut behind = 1;
    for loss in &shard.losses {
        let in_order = behind <= loss.first && loss.first <= loss.last && loss.last < u64::MAX - 1;
        if !in_order || loss.from_seq > loss.end_seq {
            return Err("the accepted losses of a shard are out of order");
        }
        behind = loss.last + 1;
    }
    Ok(())
}

fn check_retention(state: &RetentionState) -> Result<(), &'static str> {
    if state.jump_us.is_some() && state.trusted_us.is_none() {
        return Err("the clock has jumped away from no trusted time");
    }
    Ok(())
}

/// Checks the end of the audit log in a catalogue or a checkpoint.
///
/// # Errors
/// The rule of the format that it breaks.
pub(super) fn check_audit_head(head: &AuditHead) -> Result<(), &'static str> {
    let fits = match head.number {
        0 => head.tag.is_empty(),
        _ => hex_decode(&head.tag).is_some_and(|tag| tag.len() == 32),
    };
    if fits { Ok(()) } else { Err("the tag of the audit record is not one") }
}

/// Deserializes a map, and refuses a duplicate key.
pub(super) fn unique<'de, D, K, V>(deserializer: D) -> Result<BTreeMap<K, V>, D::Error>
where
    D: Deserializer<'de>,
    K: Deserialize<'de> + Ord,
    V: Deserialize<'de>,
{
    struct Unique<K, V>(PhantomData<(K, V)>);
    impl<'de, K: Deserialize<'de> + Ord, V: Deserialize<'de>> Visitor<'de> for Unique<K, V> {
        type Value = BTreeMap<K, V>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a map without doubled keys")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
            let mut map = BTreeMap::new();
            while let Some((key, value)) = entries.next_entry()? {
                if map.insert(key, value).is_some() {
                    return Err(de::Error::custom("a key is there twice"));
                }
            }
            Ok(map)
        }
    }
    deserializer.deserialize_map(Unique(PhantomData))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::{config::NAME_BYTES_MAX, ids::SegmentId, shard::Head};

    /// A store of the greatest size that the limits allow can be opened again.
    #[test]
    fn the_largest_catalogue_can_be_read() {
        let head = Head {
            ordinal: u64::MAX,
            segment: SegmentId::from_bytes([0xff; 16]),
            sealed: false,
            blocks: u32::MAX,
            bytes: u64::MAX,
            end_seq: u64::MAX,
            next_seq: u64::MAX,
            last_time_us: u64::MAX,
            digest: [0xff; 32],
        };
        let record = ShardRecord {
            first_ordinal: u64::MAX,
            first_seq: u64::MAX,
            head: Some(head),
            losses: Vec::new(),
        };
        let shard = serde_json::to_vec(&record).unwrap().len() + 1;
        let loss = 512;
        let id = LogstoreId::from_bytes([0xff; 16]);
        let entry = Entry { id, generation: u64::MAX, tag: [0xff; 32], shards: Vec::new() };
        let logstore = serde_json::to_vec(&entry).unwrap().len() + 2 * NAME_BYTES_MAX + 8;
        let deleting = 40;
        let all =
            STORE_SHARDS_MAX * shard + LOGSTORES_MAX * (logstore + deleting) + LOSSES_MAX * loss;
        assert!((all as u64) < crate::document::DOCUMENT_BYTES_MAX - (1 << 20), "{all} bytes");
    }
}
