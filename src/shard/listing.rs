//! The segments of a shard by the names of its files.

use std::{ops::Range, path::Path, sync::Arc};

use super::{active::ActiveView, record::ShardRecord, writer::RESERVED_SEQS};
use crate::{
    Error, Result,
    error::Location,
    segment::{PredecessorEnd, SegmentName},
};

/// Where a header has the first sequence number.
const FIRST_SEQ_AT: u64 = 96;

/// A segment as its name describes it, or consecutive segments that are missing.
#[derive(Clone, Debug)]
pub(crate) struct SegmentRef {
    pub(crate) ordinal: u64,
    /// For missing segments: the last of them. The path is a pattern for the name of the first one,
    /// and the first sequence number is that of the segment behind them.
    pub(crate) missing_to: Option<u64>,
    pub(crate) first_seq: u64,
    pub(crate) epoch: u64,
    pub(crate) path: Arc<Path>,
    /// Set while this process writes it.
    pub(crate) active: Option<Arc<ActiveView>>,
    /// How it ends, once this process has sealed it. Successor and catalogue may not name it yet.
    pub(crate) sealed: Option<PredecessorEnd>,
}

impl SegmentRef {
    /// Segments from `first` to `last` that are missing. The one behind them begins at `first_seq`.
    pub(super) fn gap(dir: &Path, first: u64, last: u64, first_seq: u64) -> Self {
        Self {
            ordinal: first,
            missing_to: Some(last),
            first_seq,
            epoch: 0,
            path: dir.join(format!("{first:010}-*.seg")).into(),
            active: None,
            sealed: None,
        }
    }

    pub(crate) fn is_missing(&self) -> bool {
        self.missing_to.is_some()
    }

    /// The last ordinal: its own, unless several segments are missing.
    pub(crate) fn last_ordinal(&self) -> u64 {
        self.missing_to.unwrap_or(self.ordinal)
    }

    /// The first sequence number that a segment of this name cannot have reserved.
    pub(crate) fn limit_seq(&self) -> u64 {
        self.first_seq.saturating_add(RESERVED_SEQS)
    }

    /// The error for segments that are missing.
    pub(crate) fn missing(&self) -> Error {
        let what = match self.last_ordinal() {
            last if last == self.ordinal => format!("segment {last} of the shard is missing"),
            last => format!("segments {} to {last} of the shard are missing", self.ordinal),
        };
        Error::truncated(Location::new(&*self.path, 0), what)
    }
}

/// The segments in `dir`, which has files of these names, by ordinal. Segments that the catalogue
/// knows of, or that lie between others, and that are not there, are listed as missing.
///
/// # Errors
/// The names contradict each other, or the record.
pub(super) fn list_segments(
    dir: &Path,
    names: &[String],
    record: &ShardRecord,
) -> Result<Vec<SegmentRef>> {
    let mut names: Vec<SegmentName> = names
        .iter()
        .filter_map(|name| SegmentName::parse(name))
        .filter(|name| name.ordinal >= record.first_ordinal)
        .collect();
    let mut segments: Vec<SegmentRef> = Vec::new();
    let (mut expected, mut first_seq) = (record.first_ordinal, record.first_seq);
    let names = in_force(&mut names, record);
    for (index, name) in names.iter().enumerate() {
        if record.loss(name.ordinal).is_some() {
            // Nothing authenticates the name of a lost segment. One that does not fit between the
            // others is no name of this shard, and its segment is missing.
            let behind = names.get(index + 1..).unwrap_or_default();
            let behind = behind.iter().find(|name| record.loss(name.ordinal).is_none());
            let fits = first_seq..=behind.map_or(u64::MAX, |name| name.first_seq);
            if name.ordinal < expected || !fits.contains(&name.first_seq) {
                continue;
            }
        }
        let path: Arc<Path> = dir.join(name.to_string()).into();
        if name.first_seq < first_seq {
            let what = format!(
                "the segment begins at sequence number {}, below {first_seq}",
                name.first_seq
            );
            return Err(Error::corrupt(Location::new(&*path, FIRST_SEQ_AT), what));
        }
        if name.ordinal < expected {
            let what = format!("two segments have the ordinal {}", name.ordinal);
            return Err(Error::corrupt(Location::new(&*path, 0), what));
        }
        segments.extend(missing(dir, record, expected..name.ordinal, name.first_seq));
        (expected, first_seq) = (name.ordinal + 1, name.first_seq);
        segments.push(SegmentRef {
            ordinal: name.ordinal,
            missing_to: None,
            first_seq,
            epoch: name.epoch,
            path,
            active: None,
            sealed: None,
        });
    }
    let known = record.head.as_ref().map(|head| (head.ordinal, head.next_seq));
    let lost = record.losses.last().map(|loss| (loss.last, loss.end_seq));
    if let Some((last, next_seq)) = known.max(lost) {
        segments.extend(missing(dir, record, expected..last + 1, next_seq.max(first_seq)));
    }
    Ok(segments)
}

/// The segments of these ordinals, which are missing: those whose loss is accepted and the others
/// apart. The segment behind them begins at `first_seq`.
fn missing(
    dir: &Path,
    record: &ShardRecord,
    ordinals: Range<u64>,
    first_seq: u64,
) -> Vec<SegmentRef> {
    let (mut first, mut segments) = (ordinals.start, Vec::new());
    while first < ordinals.end {
        let last = ordinals.end - 1;
        let to = match record.losses.iter().find(|loss| loss.last >= first) {
            Some(loss) if loss.first <= first => loss.last.min(last),
            Some(loss) => last.min(loss.first - 1),
            None => last,
        };
        segments.push(SegmentRef::gap(dir, first, to, first_seq));
        first = to + 1;
    }
    segments
}

/// The segments that are in force, in order. A writer that lost the store to another one may have
/// begun segments that the other did not see, before it noticed. Nothing in them was acknowledged.
/// They have an older epoch than the segment of the same ordinal, or than one before them.
///
/// Nothing authenticates the epoch in the name of a lost segment, so it puts no later segment out of
/// force.
fn in_force(names: &mut [SegmentName], record: &ShardRecord) -> Vec<SegmentName> {
    names.sort_unstable();
    let mut segments: Vec<SegmentName> = Vec::with_capacity(names.len());
    let mut epoch = 0;
    for name in names.iter() {
        match segments.last_mut() {
            Some(last) if last.ordinal == name.ordinal && last.epoch < name.epoch => *last = *name,
            _ if epoch > name.epoch => continue,
            _ => segments.push(*name),
        }
        if record.loss(name.ordinal).is_none() {
            epoch = name.epoch;
        }
    }
    segments
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::{super::record::Loss, *};

    fn name(ordinal: u64, first_seq: u64, epoch: u64) -> String {
        SegmentName { ordinal, first_seq, epoch }.to_string()
    }

    fn loss(first: u64, last: u64) -> Loss {
        let (from_seq, end_seq) = (0, 100);
        Loss { first, last, from_seq, end_seq, tampered: false, before: None, accepted_us: 0 }
    }

    /// The first and last ordinals, the epochs, and which are missing.
    fn listed(names: &[String], losses: Vec<Loss>) -> Vec<(u64, u64, u64, bool)> {
        let record = ShardRecord { losses, ..ShardRecord::default() };
        let segments = list_segments(Path::new("shard"), names, &record).unwrap();
        let shown =
            |one: &SegmentRef| (one.ordinal, one.last_ordinal(), one.epoch, one.is_missing());
        segments.iter().map(shown).collect()
    }

    #[test]
    fn a_fenced_writer_puts_nothing_in_force() {
        let names = [name(1, 0, 1), name(2, 5, 1), name(2, 5, 2), name(3, 9, 1), name(3, 8, 2)];
        let expected = [(1, 1, 1, false), (2, 2, 2, false), (3, 3, 2, false)];
        assert_eq!(listed(&names, Vec::new()), expected);
    }

    #[test]
    fn a_gap_is_listed_and_accepted_losses_apart() {
        let names = [name(2, 5, 1), name(9, 40, 1)];
        let expected = [
            (1, 1, 0, true),
            (2, 2, 1, false),
            (3, 3, 0, true),
            (4, 5, 0, true),
            (6, 8, 0, true),
            (9, 9, 1, false),
        ];
        assert_eq!(listed(&names, vec![loss(4, 5)]), expected);
        assert_eq!(listed(&[], vec![loss(1, 3)]), [(1, 3, 0, true)]);
    }

    /// A stranger can give a file any epoch.
    #[test]
    fn the_epoch_of_a_lost_segment_hides_no_later_one() {
        let names = [name(1, 0, 1), name(2, 5, 62), name(3, 100, 2)];
        assert_eq!(listed(&names, Vec::new()), [(1, 1, 1, false), (2, 2, 62, false)]);
        let expected = [(1, 1, 1, false), (2, 2, 62, false), (3, 3, 2, false)];
        assert_eq!(listed(&names, vec![loss(2, 2)]), expected);
    }

    #[test]
    fn the_names_of_lost_segments_contradict_nothing() {
        let names = [
            name(1, 0, 1),
            name(2, 900, 9),
            name(3, 3, 9),
            name(4, 50, 9),
            name(4, 51, 9),
            name(5, 100, 2),
        ];
        let found = listed(&names, vec![loss(2, 4)]);
        let ordinals: Vec<_> = found.iter().map(|(first, last, ..)| (*first, *last)).collect();
        assert_eq!(ordinals, [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]);
        assert!(found[1].3, "900 is behind the segment 5");
        assert_eq!(found[4], (5, 5, 2, false));
        assert!(list_segments(Path::new("shard"), &names, &ShardRecord::default()).is_err());
    }

    #[test]
    fn names_that_contradict_each_other_are_an_error() {
        for names in [[name(1, 7, 1), name(2, 5, 1)], [name(1, 0, 1), name(1, 1, 1)]] {
            let record = ShardRecord::default();
            assert!(list_segments(Path::new("shard"), &names, &record).is_err(), "{names:?}");
        }
    }
}
