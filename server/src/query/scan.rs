//! Scans logs: there is no index. Logs are found by their own time within a window of receive
//! times.

use std::{
    collections::BTreeSet,
    ops::Range,
    time::{Duration, Instant},
};

use envelog::{BlockKind, LogGroup, Logstore, Position, ReadOptions, Record, group::Log};

use super::expression::Expression;
use crate::error::Result;

/// A call reads no more than this, in bytes of logs.
const SCAN_BYTES_MAX: u64 = 512 << 20;
/// A call reads no longer than this.
const SCAN_TIME_MAX: Duration = Duration::from_secs(20);
/// How long before its own time a log may have been received, in seconds.
const EARLY_S: u64 = 15 * 60;
/// How long after its own time a log may have been received, in seconds.
const LATE_S: u64 = 7 * 86_400;
const MICROSECONDS: u64 = 1_000_000;

/// The logs to find.
#[derive(Debug)]
pub(crate) struct Search {
    /// The times of the logs, in seconds since the Unix epoch.
    pub(crate) times: Range<u64>,
    pub(crate) topic: Option<String>,
    pub(crate) expression: Expression,
    /// Only this shard.
    pub(crate) shard: Option<u32>,
}

/// The place of a log, in the order of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    time: u32,
    time_ns: u32,
    shard: u32,
    seq: u64,
    index: usize,
}

/// Whether everything was read that could match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    Complete,
    Incomplete,
}

impl Progress {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Complete => "Complete",
            Self::Incomplete => "Incomplete",
        }
    }
}

impl Search {
    /// Calls `found` with each log that matches. Blocks for file I/O and KMS calls.
    pub(crate) fn run(
        &self,
        logstore: &Logstore,
        mut found: impl FnMut(Place, &LogGroup, &Log),
    ) -> Result<Progress> {
        let (began, mut bytes) = (Instant::now(), 0);
        let from = self.times.start.saturating_sub(EARLY_S).saturating_mul(MICROSECONDS);
        let to = self.times.end.saturating_add(LATE_S).saturating_mul(MICROSECONDS);
        let options = ReadOptions::default().from(Position::Time(from)).to(Position::Time(to));
        let config = logstore.config();
        let wanted =
            |shard: &&envelog::admin::ShardInfo| self.shard.is_none_or(|wanted| wanted == shard.id);
        for shard in config.shards.iter().filter(wanted) {
            let mut reader = logstore.read(shard.id, &options)?;
            while let Some(block) = reader.next_block()? {
                if bytes > SCAN_BYTES_MAX || began.elapsed() > SCAN_TIME_MAX {
                    return Ok(Progress::Incomplete);
                }
                bytes += block.list.len() as u64;
                if !self.expression.may_match(&block.list) {
                    continue;
                }
                let may_match = |it: &&Record| {
                    it.kind == BlockKind::Groups && self.expression.may_match(&it.bytes)
                };
                for record in block.records.iter().filter(may_match) {
                    let group = record.group()?;
                    self.search_group(&group, |index, log| {
                        let time_ns = log.time_ns.unwrap_or(0);
                        let (shard, seq) = (shard.id, record.seq);
                        found(Place { time: log.time, time_ns, shard, seq, index }, &group, log);
                    });
                }
            }
        }
        Ok(Progress::Complete)
    }

    fn search_group<'a>(&self, group: &'a LogGroup, mut found: impl FnMut(usize, &'a Log)) {
        let topic = group.topic.as_deref().unwrap_or_default();
        if self.topic.as_ref().is_some_and(|wanted| wanted.as_bytes() != topic) {
            return;
        }
        for (index, log) in group.logs.iter().enumerate() {
            let in_time = self.times.contains(&u64::from(log.time));
            if in_time && self.expression.matches(log) {
                found(index, log);
            }
        }
    }
}

/// Keeps the first places in the order of time, or with `reverse` the last ones.
#[derive(Debug)]
pub(crate) struct First {
    most: usize,
    reverse: bool,
    kept: BTreeSet<Place>,
}

impl First {
    pub(crate) fn new(most: usize, reverse: bool) -> Self {
        Self { most, reverse, kept: BTreeSet::new() }
    }

    pub(crate) fn add(&mut self, place: Place) {
        self.kept.insert(place);
        if self.kept.len() > self.most {
            if self.reverse {
                self.kept.pop_first();
            } else {
                self.kept.pop_last();
            }
        }
    }

    /// The places behind the first `offset` ones.
    pub(crate) fn skip(self, offset: usize) -> Vec<Place> {
        let mut places: Vec<Place> = self.kept.into_iter().collect();
        if self.reverse {
            places.reverse();
        }
        places.split_off(offset.min(places.len()))
    }
}

/// The group at a place, and the log in it. `None` if retention has dropped it meanwhile.
pub(crate) fn fetch(logstore: &Logstore, place: Place) -> Result<Option<(LogGroup, Log)>> {
    let options = ReadOptions::default().from(Position::Seq(place.seq)).max_groups(1);
    let record = logstore.read(place.shard, &options)?.try_next()?;
    let Some(record) = record.filter(|record| record.seq == place.seq) else { return Ok(None) };
    let mut group = record.group()?;
    if place.index >= group.logs.len() {
        return Ok(None);
    }
    let log = group.logs.swap_remove(place.index);
    Ok(Some((group, log)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_in_the_order_of_time() {
        let place = |time| Place { time, time_ns: 0, shard: 0, seq: 0, index: 0 };
        let page = |reverse| {
            let mut first = First::new(4, reverse);
            [5, 1, 9, 3, 7].into_iter().for_each(|time| first.add(place(time)));
            first.skip(1).iter().map(|place| place.time).collect::<Vec<_>>()
        };
        assert_eq!(page(false), [3, 5, 7]);
        assert_eq!(page(true), [7, 5, 3]);
    }
}
