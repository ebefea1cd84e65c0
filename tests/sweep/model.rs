//! What is known of a store that fails, crashes and goes on: what must be there, what may be, and what never was.

use bytes::Bytes;
use envelog::{Durability, EncryptConf, Record, segment::BlockKind};

/// `Err` is a violation: what was promised, and was not kept.
pub(crate) type Outcome<T = ()> = Result<T, String>;

/// Returns the violation that the rest describes, unless the first holds.
macro_rules! ensure {
    ($holds:expr, $($what:tt)+) => {
        if !$holds {
            return Err(format!($($what)+));
        }
    };
}
pub(crate) use ensure;

/// What there is to see of a Logstore's configuration and keys.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct View {
    pub(crate) encrypt_conf: Option<EncryptConf>,
    pub(crate) ttl_days: Option<u32>,
    pub(crate) retention_bytes: Option<u64>,
    pub(crate) key_versions: usize,
}

impl View {
    pub(crate) fn drops(&self) -> bool {
        self.ttl_days.is_some() || self.retention_bytes.is_some()
    }

    pub(crate) fn encrypts(&self) -> bool {
        self.encrypt_conf.as_ref().is_some_and(|conf| conf.enable)
    }

    /// The same after a rotation of the service key.
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
    /// Its number, if anybody was told.
    pub(crate) seq: Option<u64>,
    /// As what it was acknowledged. `None` while it is under way, or when it failed: it may be there or not.
    pub(crate) acked: Option<Durability>,
}

impl Item {
    fn name(&self) -> String {
        String::from_utf8_lossy(&self.bytes[..self.bytes.len().min(16)]).into_owned()
    }
}

/// What is known of a shard.
#[derive(Clone, Debug, Default)]
pub(crate) struct ShardModel {
    pub(crate) items: Vec<Item>,
    /// The highest number that anybody was told of or has read.
    pub(crate) used: Option<u64>,
    /// How many of the first items retention may have dropped.
    pub(crate) droppable: usize,
}

impl ShardModel {
    /// Takes note of a number that was given out.
    pub(crate) fn use_seq(&mut self, seq: u64) -> Outcome {
        ensure!(self.used.is_none_or(|used| seq > used), "number {seq} was given out before, up to {:?}", self.used);
        self.used = Some(seq);
        Ok(())
    }

    /// Everything acknowledged so far is at least this durable now.
    pub(crate) fn raise(&mut self, durability: Durability) {
        for item in &mut self.items {
            item.acked = item.acked.map(|acked| acked.max(durability));
        }
    }

    /// What was only buffered is given up: the writer has stopped, or the process has ended.
    pub(crate) fn give_up_buffered(&mut self) {
        for item in &mut self.items {
            item.acked = item.acked.filter(|acked| *acked > Durability::Buffered);
        }
    }

    /// Compares what was read, from the first record to the last, with what is known. Whatever was acknowledged as `survived` or more
    /// is there; everything is in order, whole, under its number, and nothing is there twice. `seen_stays` as long as nothing can be
    /// lost any more that was seen.
    pub(crate) fn settle(&mut self, found: &[Record], survived: Durability, seen_stays: Durability) -> Outcome {
        let mut at = 0;
        let mut seen = vec![false; self.items.len()];
        for record in found {
            let same = |item: &Item| item.bytes == record.bytes && item.kind == record.kind;
            let Some(skipped) = self.items[at..].iter().position(same) else {
                let text = String::from_utf8_lossy(&record.bytes[..record.bytes.len().min(16)]).into_owned();
                let earlier = self.items[..at].iter().any(same);
                return Err(format!(
                    "number {} ({text:?}) {}",
                    record.seq,
                    if earlier { "is there twice or out of order" } else { "was never appended like that" }
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
                // Nobody waits for it any more. It may show later, when what is in front of it has been recovered.
                item.acked = item.acked.filter(|acked| *acked >= survived);
            }
        }
        Ok(())
    }

    /// As [`ShardModel::settle`], for a store in which something has rotted: what is read is right, as far as it goes. Unless there
    /// was an error, all of it is there.
    pub(crate) fn settle_rotten(&self, found: &[Record], reported: bool) -> Outcome {
        let mut copy = self.clone();
        if reported {
            copy.items.iter_mut().for_each(|item| item.acked = None);
        }
        copy.settle(found, Durability::Synced, Durability::Buffered)
    }

    /// Recovery is done and everything is durable: what was not found then never comes back.
    pub(crate) fn recovered(&mut self, found: &[Record]) {
        let before = self.items.len();
        self.items.retain(|item| found.iter().any(|record| Some(record.seq) == item.seq && record.bytes == item.bytes));
        self.droppable = self.droppable.saturating_sub(before - self.items.len());
        self.items.iter_mut().for_each(|item| item.acked = Some(Durability::Synced));
    }
}

/// What is known of a Logstore.
#[derive(Clone, Debug)]
pub(crate) struct Shelf {
    /// Whether it may be there, and whether it may be absent.
    pub(crate) may_be: [bool; 2],
    /// What the store says of itself now.
    pub(crate) current: View,
    /// What it may be found to be.
    pub(crate) views: Vec<View>,
    pub(crate) shards: Vec<ShardModel>,
}

impl Shelf {
    /// The service key is being rotated: the Logstore may get a new data key. Returns its views from before.
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

    /// Whether everything that is appended now is encrypted, whatever became of the last change.
    pub(crate) fn encrypts(&self) -> bool {
        self.views.iter().all(View::encrypts)
    }

    /// Retention may drop whatever there is now.
    pub(crate) fn allow_dropping(&mut self) {
        for shard in &mut self.shards {
            shard.droppable = shard.items.len();
        }
    }
}
