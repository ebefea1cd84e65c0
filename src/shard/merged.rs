//! Reading several shards as one sequence in the order of time.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap},
    fmt,
    str::FromStr,
};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::{
    Shard,
    reader::{Position, ReadOptions, Reader, Record},
};
use crate::{Error, Result, config::SHARDS_MAX};

/// A place in the merged records of all shards: where a [`MergedReader`] is, and where another one
/// continues ([`Logstore::read_merged_from`](crate::Logstore::read_merged_from)).
///
/// It is a short text (`Display`, `FromStr`, and a string in JSON), for a client or a file: the next
/// sequence number of each shard. It is not secret, and nothing authenticates it: a changed position
/// leads to other records of the same Logstore.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct MergedPosition {
    /// The next sequence number, by shard.
    shards: BTreeMap<u32, u64>,
    /// Groups that were received earlier are left out, in microseconds since the Unix epoch.
    from_us: u64,
}

/// `SHARD:SEQ,SHARD:SEQ`, and `@MICROSECONDS` if there is a time.
impl fmt::Display for MergedPosition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (shard, seq)) in self.shards.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{shard}:{seq}")?;
        }
        if self.from_us > 0 { write!(f, "@{}", self.from_us) } else { Ok(()) }
    }
}

impl FromStr for MergedPosition {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || Error::InvalidArgument("this is no position in merged shards".to_owned());
        let (shards, from_us) = match text.split_once('@') {
            Some((shards, from_us)) => (shards, from_us.parse().map_err(|_| wrong())?),
            None => (text, 0),
        };
        let mut position = Self { shards: BTreeMap::new(), from_us };
        for part in shards.split(',').filter(|_| !shards.is_empty()) {
            let (shard, seq) = part.split_once(':').ok_or_else(wrong)?;
            let (shard, seq) =
                (shard.parse().map_err(|_| wrong())?, seq.parse().map_err(|_| wrong())?);
            if shard >= SHARDS_MAX || position.shards.insert(shard, seq).is_some() {
                return Err(wrong());
            }
        }
        Ok(position)
    }
}

impl Serialize for MergedPosition {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MergedPosition {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// Reads all shards of a Logstore, merged by receive time.
///
/// The items are `(shard, record)`. Of two records with one receive time, the one of the lower
/// shard comes first. The records of one shard keep their order, even if the clock was set back
/// between them.
///
/// The reader ends where each shard ends when it arrives there. After an error it has ended. There is
/// no merged form that waits for more: between two shards the order of records that are still to come
/// is not known. Keep the [position](Self::position), wait for one of the shards
/// ([`Logstore::wait_for`](crate::Logstore::wait_for)) or for some time, and continue from there.
#[derive(Debug)]
pub struct MergedReader {
    /// By shard number.
    readers: Vec<Reader>,
    /// The receive time of the next record of each reader that has one. The record itself stays
    /// with its reader, which wipes it if the key is lost.
    heads: BinaryHeap<Reverse<(u64, usize)>>,
    /// The time of [`ReadOptions::from`], or of the position that the reader continued from.
    from_us: u64,
    groups_left: u64,
    bytes_left: u64,
    /// The error that the next call returns.
    failed: Option<Error>,
}

impl MergedReader {
    /// A reader that begins at `position`, if there is one, and otherwise where the options say.
    pub(crate) fn open<'a>(
        shards: impl Iterator<Item = &'a Shard>,
        position: Option<&MergedPosition>,
        options: &ReadOptions,
    ) -> Result<Self> {
        let from = position.map_or(options.from, |_| Position::Begin);
        if [Some(from), options.to].iter().any(|at| matches!(at, Some(Position::Seq(_)))) {
            let why = "a sequence number belongs to one shard; read all shards by time";
            return Err(Error::InvalidArgument(why.to_owned()));
        }
        let of_each = options.max_groups(None).max_bytes(None);
        let open = |shard: &Shard| match position {
            Some(position) => {
                let seq = position.shards.get(&shard.id()).copied().unwrap_or(0);
                Reader::continuing(shard, seq, position.from_us, &of_each)
            }
            None => Reader::open(shard, &of_each),
        };
        let readers: Vec<_> = shards.map(open).collect::<Result<_>>()?;
        let from_us = match (position, from) {
            (Some(position), _) => position.from_us,
            (None, Position::Time(time_us)) => time_us,
            (None, _) => 0,
        };
        let mut merged = Self {
            heads: BinaryHeap::with_capacity(readers.len()),
            readers,
            from_us,
            groups_left: options.max_groups.unwrap_or(u64::MAX),
            bytes_left: options.max_bytes.unwrap_or(u64::MAX),
            failed: None,
        };
        for index in 0..merged.readers.len() {
            merged.look(index)?;
        }
        Ok(merged)
    }

    /// The place of the record that is returned next, or of the end. Call it at any time, also after
    /// an error or at the end: another reader continues there.
    pub fn position(&self) -> MergedPosition {
        let shards = self.readers.iter().map(|reader| (reader.shard(), reader.resume_seq()));
        MergedPosition { shards: shards.collect(), from_us: self.from_us }
    }

    /// Notes the time of the next record of a reader, if there is one.
    fn look(&mut self, index: usize) -> Result<()> {
        while self.readers[index].ready()? {
            // No record: the key was lost since the reader was ready. The next call says so.
            if let Some(time_us) = self.readers[index].next_time_us() {
                self.heads.push(Reverse((time_us, index)));
                return Ok(());
            }
        }
        Ok(())
    }

    /// The next record and its shard; `None` at the end. Blocks for file I/O and KMS calls.
    ///
    /// # Errors
    /// Any error that keeps a record of a shard from being read. The reader has then ended.
    pub fn try_next(&mut self) -> Result<Option<(u32, Record)>> {
        if self.groups_left == 0 || self.bytes_left == 0 {
            return Ok(None);
        }
        if let Some(error) = self.failed.take() {
            return Err(error);
        }
        let Some(Reverse((_, index))) = self.heads.pop() else { return Ok(None) };
        let record = match self.readers[index].try_next() {
            Ok(Some(record)) => record,
            Ok(None) => return Ok(None),
            Err(error) => {
                self.heads.clear();
                return Err(error);
            }
        };
        if let Err(error) = self.look(index) {
            self.heads.clear();
            self.failed = Some(error);
        }
        self.groups_left -= 1;
        self.bytes_left = self.bytes_left.saturating_sub(record.bytes.len() as u64);
        Ok(Some((self.readers[index].shard(), record)))
    }
}

impl Iterator for MergedReader {
    type Item = Result<(u32, Record)>;

    fn next(&mut self) -> Option<Self::Item> {
        self.try_next().transpose()
    }
}

impl std::iter::FusedIterator for MergedReader {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_position_is_a_text() {
        let position = |shards: &[(u32, u64)], from_us| MergedPosition {
            shards: shards.iter().copied().collect(),
            from_us,
        };
        for (place, text) in [
            (position(&[], 0), ""),
            (position(&[(0, 17)], 0), "0:17"),
            (position(&[(0, 17), (255, u64::MAX)], 0), "0:17,255:18446744073709551615"),
            (position(&[(3, 0)], 1_790_000_000_000_000), "3:0@1790000000000000"),
        ] {
            assert_eq!(place.to_string(), text);
            assert_eq!(text.parse::<MergedPosition>().unwrap(), place);
            assert_eq!(serde_json::to_value(&place).unwrap(), text);
            assert_eq!(serde_json::from_value::<MergedPosition>(text.into()).unwrap(), place);
        }
        let wrong =
            [",", "0", "0:", ":1", "0:1,", "0:1,0:2", "256:0", "-1:0", "0:-1", "0:1@", "0:1@x"];
        for text in wrong {
            let error = text.parse::<MergedPosition>().unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{text}");
        }
    }
}
