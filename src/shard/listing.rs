//! The segments of a shard by the names of its files.

use std::{ops::Range, path::Path, sync::Arc};

use super::{active::ActiveView, record::ShardRecord, writer::RESERVED_SEQS};
use crate::{
    Error,
    error::Location,
    segment::{PredecessorEnd, SegmentName},
};

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
/// Nothing authenticates a name, so an attacker can add any. A file that is no segment of the shard
/// costs at most the segment of its ordinal, and one with a forged header at most two segments.
/// `is_ours` reads the header of a file: whether it may be the segment of its name. It is asked
/// about names that contradict each other, and about names behind a gap that the catalogue does not
/// know.
pub(super) fn list_segments(
    dir: &Path,
    names: &[String],
    record: &ShardRecord,
    is_ours: &dyn Fn(&SegmentName) -> bool,
) -> Vec<SegmentRef> {
    let names: Vec<SegmentName> = names
        .iter()
        .filter_map(|name| SegmentName::parse(name))
        .filter(|name| is_possible(record, name))
        .collect();
    let mut segments: Vec<SegmentRef> = Vec::new();
    let (mut expected, mut first_seq) = (record.first_ordinal, record.first_seq);
    for name in in_force(names, record, is_ours) {
        let gap = expected.max(record.last_known() + 1)..name.ordinal;
        if !gap.is_empty() && !is_ours(&name) {
            continue;
        }
        segments.extend(missing(dir, record, expected..name.ordinal, name.first_seq));
        (expected, first_seq) = (name.ordinal + 1, name.first_seq);
        segments.push(SegmentRef {
            ordinal: name.ordinal,
            missing_to: None,
            first_seq,
            epoch: name.epoch,
            path: dir.join(name.to_string()).into(),
            active: None,
            sealed: None,
        });
    }
    let known = record.head.as_ref().map(|head| (head.ordinal, head.next_seq));
    let lost = record.losses.last().map(|loss| (loss.last, loss.end_seq));
    if let Some((last, next_seq)) = known.max(lost) {
        segments.extend(missing(dir, record, expected..last + 1, next_seq.max(first_seq)));
    }
    segments
}

/// Whether a writer can have given a segment this name, by the catalogue alone.
fn is_possible(record: &ShardRecord, name: &SegmentName) -> bool {
    let numbers = record.first_seq..=record.first_seq_max(name.ordinal);
    name.ordinal >= record.first_ordinal && numbers.contains(&name.first_seq)
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
        let to = match record.loss_from(first) {
            Some(loss) if loss.first <= first => loss.last.min(last),
            Some(loss) => last.min(loss.first - 1),
            None => last,
        };
        segments.push(SegmentRef::gap(dir, first, to, first_seq));
        first = to + 1;
    }
    segments
}

/// The segments that are in force, in order: one for each ordinal, and their first sequence numbers
/// do not decrease. Nothing authenticates the name of a lost segment, so it decides about no other.
fn in_force(
    names: Vec<SegmentName>,
    record: &ShardRecord,
    is_ours: &dyn Fn(&SegmentName) -> bool,
) -> Vec<SegmentName> {
    let names = one_per_ordinal(names, is_ours);
    let (lost, names): (Vec<_>, Vec<_>) =
        names.into_iter().partition(|name| record.loss(name.ordinal).is_some());
    let names = ascending(names, is_ours);
    let mut behind = names.iter().peekable();
    let (mut all, mut first_seq) = (Vec::with_capacity(names.len() + lost.len()), 0);
    for name in lost {
        while let Some(before) = behind.next_if(|one| one.ordinal < name.ordinal) {
            first_seq = before.first_seq;
            all.push(*before);
        }
        let end = behind.peek().map_or(u64::MAX, |one| one.first_seq);
        if (first_seq..=end).contains(&name.first_seq) {
            first_seq = name.first_seq;
            all.push(name);
        }
    }
    all.extend(behind);
    all
}

/// Chooses one name for each ordinal, and sorts them. A writer that lost the store to another one
/// may have begun a segment that the other did not see, before it noticed. Nothing in it was
/// acknowledged. It has a lower epoch than the segment of the same ordinal.
fn one_per_ordinal(
    mut names: Vec<SegmentName>,
    is_ours: &dyn Fn(&SegmentName) -> bool,
) -> Vec<SegmentName> {
    let rank = |name: &SegmentName| (name.epoch, name.first_seq);
    names.sort_unstable_by_key(|name| (name.ordinal, rank(name)));
    let same_ordinal = names.chunk_by(|one, other| one.ordinal == other.ordinal);
    let chosen = same_ordinal.filter_map(|names| match names {
        [only] => Some(*only),
        _ => names.iter().rev().find(|name| is_ours(name)).or(names.last()).copied(),
    });
    chosen.collect()
}

/// Leaves out names until the first sequence numbers do not decrease. Of two names that contradict
/// each other, the one is left out whose file is no segment of the shard. If both files are, one of
/// them is forged, and the most names that agree with each other stay.
fn ascending(names: Vec<SegmentName>, is_ours: &dyn Fn(&SegmentName) -> bool) -> Vec<SegmentName> {
    let mut kept: Vec<SegmentName> = Vec::with_capacity(names.len());
    for name in names {
        let contradicts = |last: &SegmentName| last.first_seq > name.first_seq;
        while kept.pop_if(|last| contradicts(last) && !is_ours(last)).is_some() {}
        if !kept.last().is_some_and(contradicts) || is_ours(&name) {
            kept.push(name);
        }
    }
    if kept.is_sorted_by_key(|name| name.first_seq) {
        return kept;
    }
    longest_ascending(&kept)
}

/// The most names whose first sequence numbers do not decrease, in their order.
fn longest_ascending(names: &[SegmentName]) -> Vec<SegmentName> {
    // From the last name to the first. `best[n]` begins the sequence of n + 1 names that begins
    // with the highest number; longer sequences begin with lower ones. `next` has the name that
    // follows each name in its sequence.
    let (mut best, mut next): (Vec<usize>, Vec<Option<usize>>) = (Vec::new(), Vec::new());
    next.resize(names.len(), None);
    for (at, name) in names.iter().enumerate().rev() {
        let len = best.partition_point(|&other| names[other].first_seq >= name.first_seq);
        next[at] = len.checked_sub(1).map(|shorter| best[shorter]);
        match best.get_mut(len) {
            Some(other) => *other = at,
            None => best.push(at),
        }
    }
    let following = |at: &usize| next[*at];
    std::iter::successors(best.last().copied(), following).map(|at| names[at]).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::{
        super::record::{Head, Loss},
        *,
    };
    use crate::ids::SegmentId;

    fn name(ordinal: u64, first_seq: u64, epoch: u64) -> String {
        SegmentName { ordinal, first_seq, epoch }.to_string()
    }

    fn loss(first: u64, last: u64) -> Loss {
        let (from_seq, end_seq) = (0, 100);
        Loss { first, last, from_seq, end_seq, tampered: false, before: None, accepted_us: 0 }
    }

    /// The first and last ordinals, the epochs, and which are missing. The files of `junk` are no
    /// segments.
    fn listed_beside(
        names: &[String],
        junk: &[String],
        record: &ShardRecord,
    ) -> Vec<(u64, u64, u64, bool)> {
        let all = [names, junk].concat();
        let is_ours = |name: &SegmentName| !junk.contains(&name.to_string());
        let segments = list_segments(Path::new("shard"), &all, record, &is_ours);
        assert!(segments.is_sorted_by_key(|one| (one.ordinal, one.first_seq)));
        assert!(segments.is_sorted_by_key(|one| one.first_seq));
        let shown =
            |one: &SegmentRef| (one.ordinal, one.last_ordinal(), one.epoch, one.is_missing());
        segments.iter().map(shown).collect()
    }

    fn listed(names: &[String], losses: Vec<Loss>) -> Vec<(u64, u64, u64, bool)> {
        listed_beside(names, &[], &ShardRecord { losses, ..ShardRecord::default() })
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

    /// An attacker can give a file any epoch.
    #[test]
    fn the_epoch_of_a_segment_hides_no_later_one() {
        let names = [name(1, 0, 1), name(2, 5, 62), name(3, 100, 2)];
        let expected = [(1, 1, 1, false), (2, 2, 62, false), (3, 3, 2, false)];
        assert_eq!(listed(&names, Vec::new()), expected);
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
    }

    fn head(ordinal: u64, end_seq: u64) -> Head {
        Head {
            ordinal,
            segment: SegmentId::from_bytes([1; 16]),
            sealed: true,
            blocks: 1,
            bytes: 1,
            end_seq,
            next_seq: end_seq,
            last_time_us: 0,
            digest: [0; 32],
        }
    }

    /// Ten segments, of which one may be lost, beside a file that no writer has made.
    #[test]
    fn a_strange_name_costs_at_most_its_own_ordinal() {
        let names: Vec<_> = (1..=10).map(|n| name(n, n * 10, 2)).collect();
        let record = ShardRecord { head: Some(head(10, 110)), ..ShardRecord::default() };
        for lost in 0..=10 {
            let mut names = names.clone();
            names.retain(|one| *one != name(lost, lost * 10, 2));
            for ordinal in (1..=12).chain([1 << 40, u64::MAX - 1]) {
                for first_seq in [0, 5, ordinal.saturating_mul(10), 55, 111, u64::MAX] {
                    for epoch in [1, 3, u64::MAX] {
                        let junk = [name(ordinal, first_seq, epoch)];
                        let found = listed_beside(&names, &junk, &record);
                        let there = |n: u64| found.contains(&(n, n, 2, false));
                        let gone = (1..=10).find(|n| *n != lost && *n != ordinal && !there(*n));
                        assert_eq!(gone, None, "{junk:?} beside {names:?}: {found:?}");
                        let reached = found.last().unwrap().1;
                        assert!(reached <= 11, "{junk:?}: {found:?}");
                    }
                }
            }
        }
    }

    /// A forged file hides the segment of its ordinal, and may contradict one more.
    #[test]
    fn a_forged_file_costs_at_most_two_segments() {
        let real: Vec<_> = (1..=40).map(|n| name(n, n * 10, 2)).collect();
        let record = ShardRecord { head: Some(head(40, 410)), ..ShardRecord::default() };
        let mut state = 7_u64;
        let mut draw = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 33) % below
        };
        for _ in 0..2_000 {
            let forged = draw(12);
            let mut names = real.clone();
            names.extend((0..forged).map(|_| name(1 + draw(42), draw(420), 1 + draw(4))));
            let found = listed_beside(&names, &[], &record);
            let kept = real.iter().zip(1..).filter(|(_, n)| found.contains(&(*n, *n, 2, false)));
            assert!(kept.count() as u64 >= 40 - 2 * forged, "{names:?}: {found:?}");
        }
    }

    #[test]
    fn names_below_the_first_number_are_strange() {
        let record = ShardRecord { first_ordinal: 3, first_seq: 20, ..ShardRecord::default() };
        let names = [name(2, 25, 1), name(3, 20, 1), name(4, 19, 1)];
        assert_eq!(listed_beside(&names, &[], &record), [(3, 3, 1, false)]);
    }

    /// A name beyond the numbers that the segments in front of it can have used up. If it counted, the
    /// shard would have no numbers left.
    #[test]
    fn names_above_all_numbers_are_strange() {
        let known = ShardRecord { head: Some(head(2, 30)), ..ShardRecord::default() };
        let lost = ShardRecord { losses: vec![loss(1, 2)], ..ShardRecord::default() };
        for (record, last) in [(ShardRecord::default(), 0), (known, 2), (lost, 2)] {
            let names = if last == 2 { vec![name(1, 0, 1), name(2, 5, 1)] } else { Vec::new() };
            let before = listed(&names, record.losses.clone());
            for ordinal in last..=last + 1 {
                for first_seq in [u64::MAX, u64::MAX - RESERVED_SEQS, 1 << 63, 1 << 34] {
                    let names = [&names[..], &[name(ordinal.max(1), first_seq, 9)]].concat();
                    assert_eq!(listed_beside(&names, &[], &record), before, "{names:?}");
                }
            }
            let reached = record.first_seq_max(last + 1);
            let names = [&names[..], &[name(last + 1, reached, 9)]].concat();
            let found = listed_beside(&names, &[], &record);
            assert_eq!(found.last(), Some(&(last + 1, last + 1, 9, false)), "{names:?}");
        }
    }
}
