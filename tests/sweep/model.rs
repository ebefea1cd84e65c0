//! A model of a store with failures and crashes: the records that must be present, and those that
//! may be.

use bytes::Bytes;
use envelog::{
    Durability, EncryptConf, LogstoreConfig, Record, admin::ShardStatus, inspect::BlockKind,
};

/// `Err` describes a violation of a guarantee.
pub(crate) type Outcome<T = ()> = Result<T, String>;

/// Returns the violation that the other arguments describe, unless the condition holds.
macro_rules! ensure {
    ($holds:expr, $($what:tt)+) => {
        if !$holds {
            return Err(format!($($what)+));
        }
    };
}
pub(crate) use ensure;

/// The visible configuration and keys of a Logstore.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct View {
    pub(crate) encrypt_conf: Option<EncryptConf>,
    pub(crate) ttl_days: Option<u32>,
    pub(crate) retention_bytes: Option<u64>,
    pub(crate) key_versions: usize,
    /// By their numbers.
    pub(crate) shards: Vec<Range>,
}

/// The keys of a shard, up to `end`, and whether it is readwrite.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Range {
    pub(crate) begin: u128,
    pub(crate) end: u128,
    pub(crate) is_writable: bool,
}

impl Range {
    fn new(begin: u128, end: u128) -> Self {
        Self { begin, end, is_writable: true }
    }

    /// The shards of a new Logstore; one or two.
    pub(crate) fn divide(count: usize) -> Vec<Self> {
        match count {
            1 => vec![Self::new(0, u128::MAX)],
            _ => vec![Self::new(0, 1 << 127), Self::new(1 << 127, u128::MAX)],
        }
    }

    pub(crate) fn of(config: &LogstoreConfig) -> Vec<Self> {
        let key = |text: &str| u128::from_str_radix(text, 16).unwrap();
        let shards = config.shards.iter();
        shards
            .map(|shard| Self {
                begin: key(&shard.begin_key),
                end: key(&shard.end_key),
                is_writable: shard.status == ShardStatus::ReadWrite,
            })
            .collect()
    }
}

impl View {
    pub(crate) fn drops(&self) -> bool {
        self.ttl_days.is_some() || self.retention_bytes.is_some()
    }

    /// Splits a shard in the middle. A view in which it is not readwrite stays as it is: then the
    /// store is in another one.
    pub(crate) fn split(&mut self, shard: usize) {
        let Some(Range { begin, end, .. }) = self.take(shard) else { return };
        let middle = begin + (end - begin) / 2;
        self.shards.extend([Range::new(begin, middle), Range::new(middle, end)]);
    }

    /// As [`View::split`]: merges a shard with the one behind it.
    pub(crate) fn merge(&mut self, left: usize) {
        let end = self.shards.get(left).filter(|left| left.is_writable).map(|left| left.end);
        let is_next = |right: &Range| right.is_writable && Some(right.begin) == end;
        let Some(right) = self.shards.iter().position(is_next) else { return };
        if let (Some(left), Some(right)) = (self.take(left), self.take(right)) {
            self.shards.push(Range::new(left.begin, right.end));
        }
    }

    fn take(&mut self, shard: usize) -> Option<Range> {
        let range = self.shards.get_mut(shard).filter(|range| range.is_writable)?;
        range.is_writable = false;
        Some(*range)
    }

    pub(crate) fn encrypts(&self) -> bool {
        self.encrypt_conf.as_ref().is_some_and(|conf| conf.enable)
    }

    /// The view after a rotation of the service key.
    fn renewed(&self) -> Self {
        let byok = self.encrypt_conf.as_ref().is_some_and(|conf| conf.user_cmk_info.is_some());
        let more = usize::from(self.key_versions > 0 && !byok);
        Self { key_versions: self.key_versions + more, ..self.clone() }
    }
}

/// An append.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) bytes: Bytes,
    pub(crate) kind: BlockKind,
    /// Its number, if a caller got one.
    pub(crate) seq: Option<u64>,
    /// The acknowledged durability. `None` while it is pending or after a failure: the record may
    /// be present or not.
    pub(crate) acked: Option<Durability>,
}

impl Item {
    fn name(&self) -> String {
        String::from_utf8_lossy(&self.bytes[..self.bytes.len().min(16)]).into_owned()
    }
}

/// The model of a shard.
#[derive(Clone, Debug, Default)]
pub(crate) struct ShardModel {
    pub(crate) items: Vec<Item>,
    /// The highest number that a caller or reader has seen.
    pub(crate) used: Option<u64>,
    /// The number of leading items that retention may have dropped.
    pub(crate) droppable: usize,
}

impl ShardModel {
    /// Records an assigned number.
    pub(crate) fn use_seq(&mut self, seq: u64) -> Outcome {
        ensure!(
            self.used.is_none_or(|used| seq > used),
            "number {seq} was given out before, up to {:?}",
            self.used
        );
        self.used = Some(seq);
        Ok(())
    }

    /// Marks everything acknowledged so far as at least this durable.
    pub(crate) fn raise(&mut self, durability: Durability) {
        for item in &mut self.items {
            item.acked = item.acked.map(|acked| acked.max(durability));
        }
    }

    /// Gives up the buffered records: the writer has stopped, or the process has ended.
    pub(crate) fn give_up_buffered(&mut self) {
        for item in &mut self.items {
            item.acked = item.acked.filter(|acked| *acked > Durability::Buffered);
        }
    }

    /// Compares all records of the shard with the model. Every record acknowledged as `survived` or
    /// more must be present; all records must be in order, complete, and under their number,
    /// without repetition. `seen_stays` is the durability that visible records have from now on.
    pub(crate) fn settle(
        &mut self,
        found: &[Record],
        survived: Durability,
        seen_stays: Durability,
    ) -> Outcome {
        let mut at = 0;
        let mut seen = vec![false; self.items.len()];
        for record in found {
            let same = |item: &Item| item.bytes == record.bytes && item.kind == record.kind;
            let Some(skipped) = self.items[at..].iter().position(same) else {
                let text = String::from_utf8_lossy(&record.bytes[..record.bytes.len().min(16)])
                    .into_owned();
                let earlier = self.items[..at].iter().any(same);
                return Err(format!(
                    "number {} ({text:?}) {}",
                    record.seq,
                    if earlier {
                        "is there twice or out of order"
                    } else {
                        "was never appended like that"
                    }
                ));
            };
            at += skipped;
            let item = &mut self.items[at];
            ensure!(
                item.seq.is_none_or(|seq| seq == record.seq),
                "{:?} is number {}, it was given {:?}",
                item.name(),
                record.seq,
                item.seq
            );
            item.seq = Some(record.seq);
            item.acked = Some(item.acked.map_or(seen_stays, |acked| acked.max(seen_stays)));
            self.used = self.used.max(Some(record.seq));
            seen[at] = true;
            at += 1;
        }
        ensure!(found.is_sorted_by(|a, b| a.seq < b.seq), "the numbers do not increase");
        let first_seen = seen.iter().position(|seen| *seen).unwrap_or(seen.len());
        for (index, item) in self.items.iter_mut().enumerate().filter(|(index, _)| !seen[*index]) {
            let dropped = index < self.droppable && index < first_seen;
            let missed = item.acked.is_some_and(|acked| acked >= survived);
            ensure!(
                dropped || !missed,
                "{:?} (number {:?}) was acknowledged as {:?} and is not there; {} of {} are",
                item.name(),
                item.seq,
                item.acked,
                found.len(),
                seen.len()
            );
            if survived > Durability::Buffered {
                // No caller waits for it any more. It may appear later, after the records before it
                // are recovered.
                item.acked = item.acked.filter(|acked| *acked >= survived);
            }
        }
        Ok(())
    }

    /// Like [`ShardModel::settle`], for a damaged store: the records before an error are right.
    /// Without an error, all records are present.
    pub(crate) fn settle_rotten(&self, found: &[Record], reported: bool) -> Outcome {
        let mut copy = self.clone();
        if reported {
            copy.items.iter_mut().for_each(|item| item.acked = None);
        }
        copy.settle(found, Durability::Synced, Durability::Buffered)
    }

    /// Recovery is complete and everything is durable: records that are missing now never come
    /// back.
    pub(crate) fn recovered(&mut self, found: &[Record]) {
        let before = self.items.len();
        self.items.retain(|item| {
            found.iter().any(|record| Some(record.seq) == item.seq && record.bytes == item.bytes)
        });
        self.droppable = self.droppable.saturating_sub(before - self.items.len());
        self.items.iter_mut().for_each(|item| item.acked = Some(Durability::Synced));
    }
}

/// The model of a Logstore.
#[derive(Clone, Debug)]
pub(crate) struct Shelf {
    /// Whether it may be present, and whether it may be absent.
    pub(crate) may_be: [bool; 2],
    /// The view that the store reports now.
    pub(crate) current: View,
    /// The views that may be found.
    pub(crate) views: Vec<View>,
    pub(crate) shards: Vec<ShardModel>,
}

impl Shelf {
    /// The service key is being rotated: the Logstore may get a new data key. Returns its views
    /// from before.
    pub(crate) fn may_renew_data_key(&mut self) -> Vec<View> {
        let before = self.views.clone();
        self.views.extend(before.iter().map(View::renewed));
        before
    }

    /// The service key was rotated, and the Logstore has a new data key, if it is under that key.
    pub(crate) fn renewed_data_key(&mut self, before: &[View]) {
        self.current = self.current.renewed();
        self.views = before.iter().map(View::renewed).collect();
    }

    pub(crate) fn absent(view: View, shards: usize) -> Self {
        let shards = vec![ShardModel::default(); shards];
        Self { may_be: [false, true], views: vec![view.clone()], current: view, shards }
    }

    /// A change that is under way may lead to one of these views.
    pub(crate) fn may_become(&mut self, views: &[View]) {
        self.views.extend(views.iter().cloned());
        let shards = self.views.iter().map(|view| view.shards.len()).max().unwrap_or(0);
        if self.shards.len() < shards {
            self.shards.resize_with(shards, ShardModel::default);
        }
    }

    /// Whether all new appends are encrypted, whichever outcome the last change had.
    pub(crate) fn encrypts(&self) -> bool {
        self.views.iter().all(View::encrypts)
    }

    /// Allows retention to drop all current records.
    pub(crate) fn allow_dropping(&mut self) {
        for shard in &mut self.shards {
            shard.droppable = shard.items.len();
        }
    }
}
