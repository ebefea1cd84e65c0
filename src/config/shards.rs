//! The shards of a Logstore: the range of hash keys that each owns, and how a split or a merge
//! changes them.

use serde::{Deserialize, Serialize};

use super::ConfigError;
use crate::ids::hex_decode;

/// Whether a shard accepts writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ShardStatus {
    /// The shard can be read and written.
    ReadWrite,
    /// The shard can only be read: a parent that was split or merged keeps its data until retention
    /// drops it.
    ReadOnly,
}

/// A shard and the range of hash keys that it owns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct ShardInfo {
    /// Its number within the Logstore. No number is used twice.
    pub id: u32,
    /// Whether it accepts writes.
    pub status: ShardStatus,
    /// The first hash key of its range, as 32 lower-case hex digits.
    pub begin_key: String,
    /// One past the last hash key of its range; 32 `f` for the last range, which includes that key.
    pub end_key: String,
    /// The shards from which it was split or merged.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub parents: Vec<u32>,
    /// When it was split or merged from its parents, in seconds since the Unix epoch. `None` for
    /// the shards that the Logstore was created with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub create_time: Option<u64>,
}

impl ShardInfo {
    /// A readwrite shard with the keys from `begin` up to `end`.
    fn new(id: u32, (begin, end): (u128, u128), parents: Vec<u32>, now_s: Option<u64>) -> Self {
        let (begin_key, end_key) = (key_text(begin), key_text(end));
        let status = ShardStatus::ReadWrite;
        Self { id, status, begin_key, end_key, parents, create_time: now_s }
    }

    /// The first key of its range, and the end of it. `None` if they are no range.
    pub(crate) fn range(&self) -> Option<(u128, u128)> {
        let (begin, end) = (hash_key(&self.begin_key)?, hash_key(&self.end_key)?);
        (begin < end).then_some((begin, end))
    }

    /// Whether the shard owns `key`.
    pub fn owns(&self, key: u128) -> bool {
        let owns = |(begin, end)| begin <= key && (key < end || end == u128::MAX);
        self.range().is_some_and(owns)
    }

    fn is_writable(&self) -> bool {
        self.status == ShardStatus::ReadWrite
    }
}

/// A hash key of exactly 32 lower-case hexadecimal digits.
fn hash_key(text: &str) -> Option<u128> {
    Some(u128::from_be_bytes(hex_decode(text)?.try_into().ok()?))
}

fn key_text(key: u128) -> String {
    format!("{key:032x}")
}

/// `count` shards that divide the 128-bit hash range evenly.
pub(super) fn divide(count: u32) -> Vec<ShardInfo> {
    let step = (u128::MAX / u128::from(count)).wrapping_add(u128::from(count.is_power_of_two()));
    let key = |n: u32| if n == count { u128::MAX } else { step.wrapping_mul(u128::from(n)) };
    (0..count).map(|id| ShardInfo::new(id, (key(id), key(id + 1)), Vec::new(), None)).collect()
}

/// Checks the rules of the format.
///
/// # Errors
/// The rule that the shards break.
pub(super) fn check(shards: &[ShardInfo]) -> Result<(), String> {
    let broken = |rule: &str| Err(rule.to_owned());
    let mut writable = Vec::new();
    for (id, shard) in (0..).zip(shards) {
        if shard.id != id {
            return broken("the id of a shard is not its place");
        }
        let is_other = |&parent: &u32| parent != id && (parent as usize) < shards.len();
        if !shard.parents.iter().all(is_other) {
            return broken("a parent of a shard is not another shard");
        }
        match shard.range() {
            Some(range) if shard.is_writable() => writable.push(range),
            Some(_) => {}
            None => return broken("the range of a shard is not a range"),
        }
    }
    writable.sort_unstable();
    let mut end = Some(0);
    for range in writable {
        end = (end == Some(range.0)).then_some(range.1);
    }
    match end == Some(u128::MAX) {
        true => Ok(()),
        false => broken("the ranges of the writable shards leave a gap or overlap"),
    }
}

/// A change of the shards: the parents become read-only, and the children take their ranges.
#[derive(Clone, Debug)]
pub(crate) struct Resharding {
    /// The numbers of the parents, by their ranges.
    pub(crate) parents: Vec<u32>,
    /// The numbers of the children, by their ranges.
    pub(crate) children: Vec<u32>,
    /// All shards after the change.
    pub(crate) shards: Vec<ShardInfo>,
}

impl Resharding {
    /// Splits the readwrite shard `parent` at a hash key, which belongs to the higher child, or in
    /// the middle.
    ///
    /// # Errors
    /// [`ConfigError::SplitKey`].
    pub(crate) fn split(
        shards: &[ShardInfo],
        parent: u32,
        at: Option<u128>,
        now_s: u64,
    ) -> Result<Self, ConfigError> {
        let (begin, end) = range_of(shards, parent);
        let key = at.unwrap_or(begin + (end - begin) / 2);
        if !(begin < key && key < end) {
            return Err(ConfigError::SplitKey {
                shard: parent,
                key: key_text(key),
                begin: key_text(begin),
                end: key_text(end),
            });
        }
        Ok(Self::new(shards, vec![parent], &[(begin, key), (key, end)], now_s))
    }

    /// Merges the readwrite shard `left` with the one that has the range behind its own.
    ///
    /// # Errors
    /// [`ConfigError::NoNeighbour`].
    pub(crate) fn merge(shards: &[ShardInfo], left: u32, now_s: u64) -> Result<Self, ConfigError> {
        let (begin, middle) = range_of(shards, left);
        let is_next = |shard: &&ShardInfo| {
            shard.is_writable() && shard.range().is_some_and(|range| range.0 == middle)
        };
        let right = shards.iter().find(is_next).ok_or(ConfigError::NoNeighbour { shard: left })?;
        let (_, end) = range_of(shards, right.id);
        Ok(Self::new(shards, vec![left, right.id], &[(begin, end)], now_s))
    }

    fn new(shards: &[ShardInfo], parents: Vec<u32>, ranges: &[(u128, u128)], now_s: u64) -> Self {
        let mut shards = shards.to_vec();
        for shard in shards.iter_mut().filter(|shard| parents.contains(&shard.id)) {
            shard.status = ShardStatus::ReadOnly;
        }
        let mut children = Vec::new();
        for range in ranges {
            let id = shards.len() as u32;
            shards.push(ShardInfo::new(id, *range, parents.clone(), Some(now_s)));
            children.push(id);
        }
        Self { parents, children, shards }
    }
}

fn range_of(shards: &[ShardInfo], id: u32) -> (u128, u128) {
    shards.get(id as usize).and_then(ShardInfo::range).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    const KEYS: [u128; 7] =
        [0, 1, u128::MAX / 3, u128::MAX / 2, u128::MAX / 2 + 1, u128::MAX - 1, u128::MAX];

    fn owners(shards: &[ShardInfo], key: u128) -> Vec<u32> {
        let owner = |shard: &&ShardInfo| shard.is_writable() && shard.owns(key);
        shards.iter().filter(owner).map(|shard| shard.id).collect()
    }

    #[test]
    fn hash_ranges_cover_everything_once() {
        for count in [1, 2, 3, 4, 7, 256] {
            let shards = divide(count);
            assert_eq!(shards[0].begin_key, "0".repeat(32));
            assert_eq!(shards.last().unwrap().end_key, "f".repeat(32));
            for key in KEYS {
                assert_eq!(owners(&shards, key).len(), 1, "{count} shards, key {key:x}");
            }
        }
    }

    #[test]
    fn the_key_of_a_split_belongs_to_the_higher_child() {
        let shards = divide(1);
        let split = Resharding::split(&shards, 0, Some(7), 9).unwrap();
        assert_eq!((&*split.parents, &*split.children), (&[0][..], &[1, 2][..]));
        assert_eq!(owners(&split.shards, 6), [1]);
        assert_eq!(owners(&split.shards, 7), [2]);
        assert_eq!(owners(&split.shards, u128::MAX), [2]);
        assert_eq!(split.shards[0].status, ShardStatus::ReadOnly);
        assert_eq!(split.shards[2].parents, [0]);
        assert_eq!(split.shards[2].create_time, Some(9));
        assert_eq!(shards[0].create_time, None);
        check(&split.shards).unwrap();
    }

    #[test]
    fn a_key_outside_of_the_range_is_refused() {
        let shards = divide(2);
        let (begin, end) = range_of(&shards, 1);
        for key in [0, begin - 1, begin, end] {
            let refused = Resharding::split(&shards, 1, Some(key), 1).unwrap_err();
            assert!(matches!(refused, ConfigError::SplitKey { shard: 1, .. }), "{key:x}");
        }
        let one = [ShardInfo::new(0, (4, 5), Vec::new(), None)];
        assert!(Resharding::split(&one, 0, None, 1).is_err(), "one key cannot be divided");
    }

    #[test]
    fn the_last_shard_has_no_neighbour() {
        let shards = divide(2);
        let refused = Resharding::merge(&shards, 1, 1).unwrap_err();
        assert_eq!(refused, ConfigError::NoNeighbour { shard: 1 });
        let merged = Resharding::merge(&shards, 0, 1).unwrap();
        assert_eq!((&*merged.parents, &*merged.children), (&[0, 1][..], &[2][..]));
        check(&merged.shards).unwrap();
    }

    proptest! {
        /// After any splits and merges each key has one owner, and its owner descends from the one
        /// that it had before.
        #[test]
        fn each_key_has_one_owner(
            count in 1u32..5,
            steps in proptest::collection::vec((any::<u32>(), any::<bool>(), any::<u128>()), 0..12),
        ) {
            let mut shards = divide(count);
            for (pick, splits, key) in steps {
                let writable: Vec<u32> =
                    shards.iter().filter(|it| it.is_writable()).map(|it| it.id).collect();
                let shard = writable[pick as usize % writable.len()];
                let change = match splits {
                    true => Resharding::split(&shards, shard, Some(key), 1)
                        .or_else(|_| Resharding::split(&shards, shard, None, 1)),
                    false => Resharding::merge(&shards, shard, 1),
                };
                let Ok(change) = change else { continue };
                for key in KEYS.into_iter().chain([key]) {
                    let (before, after) = (owners(&shards, key), owners(&change.shards, key));
                    prop_assert_eq!(after.len(), 1);
                    let parents = &change.shards[after[0] as usize].parents;
                    prop_assert!(after == before || parents.contains(&before[0]));
                }
                prop_assert_eq!(check(&change.shards), Ok(()));
                shards = change.shards;
            }
        }
    }
}
