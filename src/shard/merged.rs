//! Reading several shards as one sequence in the order of time.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::{
    Shard,
    reader::{Position, ReadOptions, Reader, Record},
};
use crate::{Error, Result};

/// Reads all shards of a Logstore, merged by receive time.
///
/// The items are `(shard, record)`. Of two records with one receive time, the one of the lower
/// shard comes first. The records of one shard keep their order, even if the clock was set back
/// between them.
///
/// The reader ends where each shard ends when it arrives there. After an error it has ended.
#[derive(Debug)]
pub struct MergedReader {
    /// By shard number.
    readers: Vec<Reader>,
    /// The receive time of the next record of each reader that has one. The record itself stays
    /// with its reader, which wipes it if the key is lost.
    heads: BinaryHeap<Reverse<(u64, usize)>>,
    groups_left: u64,
    bytes_left: u64,
    /// The error that the next call returns.
    failed: Option<Error>,
}

impl MergedReader {
    pub(crate) fn open<'a>(
        shards: impl Iterator<Item = &'a Shard>,
        options: &ReadOptions,
    ) -> Result<Self> {
        if [Some(options.from), options.to].iter().any(|at| matches!(at, Some(Position::Seq(_)))) {
            let why = "a sequence number belongs to one shard; read all shards by time";
            return Err(Error::InvalidArgument(why.to_owned()));
        }
        let of_each = options.max_groups(None).max_bytes(None);
        let readers: Vec<_> =
            shards.map(|shard| Reader::open(shard, &of_each)).collect::<Result<_>>()?;
        let mut merged = Self {
            heads: BinaryHeap::with_capacity(readers.len()),
            readers,
            groups_left: options.max_groups.unwrap_or(u64::MAX),
            bytes_left: options.max_bytes.unwrap_or(u64::MAX),
            failed: None,
        };
        for index in 0..merged.readers.len() {
            merged.look(index)?;
        }
        Ok(merged)
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
