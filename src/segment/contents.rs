//! The contents of a block: its list and its table of receive times.

use std::ops::Range;

use super::BlockHeader;
use crate::group::{self, GROUP_BYTES_MAX};

/// One group, or one opaque record, of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Its sequence number.
    pub(crate) seq: u64,
    /// Its receive time, in microseconds since the Unix epoch.
    pub(crate) time_us: u64,
    /// The position of its bytes in the list.
    pub(crate) bytes: Range<usize>,
}

/// Calls `each` with every entry of a block, in order. Checks the list and the table against each
/// other and against `header`. `raw` is the payload before compression. The groups are not parsed.
///
/// # Errors
/// The rule of the format that the block breaks. `each` may have received some entries by then.
pub(crate) fn entries(
    header: &BlockHeader,
    raw: &[u8],
    mut each: impl FnMut(Entry),
) -> Result<(), &'static str> {
    let (list, table) = raw
        .split_at_checked(header.list_len as usize)
        .ok_or("its list is longer than its payload")?;
    let mut table = table.chunks_exact(4);
    let (mut end, mut last, mut count) = (0, 0, 0u64);
    for frame in group::frames(list) {
        let bytes = frame.map_err(|_| "its list does not parse")?;
        if bytes.start - end != group::frame_len(bytes.len()) - bytes.len() {
            return Err("a frame of its list is not written in the shortest way");
        }
        if bytes.len() > GROUP_BYTES_MAX {
            return Err("its list has a record beyond the limit");
        }
        let delta = table.next().and_then(|delta| delta.try_into().ok()).map(u32::from_le_bytes);
        let delta = delta.ok_or("its list has more records than its header says")?;
        if delta < last {
            return Err("receive times run backwards within its table");
        }
        if count == 0 && delta != 0 {
            return Err("its first receive time is not the one in its header");
        }
        (end, last) = (bytes.end, delta);
        let time_us = header.first_time_us.saturating_add(delta.into());
        each(Entry { seq: header.first_seq.saturating_add(count), time_us, bytes });
        count += 1;
    }
    if count != u64::from(header.group_count) || table.next().is_some() {
        return Err("its list has fewer records than its header says");
    }
    // The table stores a difference that is too large for it as the largest number.
    if u64::from(last)
        != header.last_time_us.saturating_sub(header.first_time_us).min(u32::MAX.into())
    {
        return Err("its last receive time is not the one in its header");
    }
    Ok(())
}

/// Checks that `list`, from a block of log groups, holds valid groups at `bytes`. Checks that they
/// have as many logs as `header` says.
///
/// # Errors
/// The rule of the format that the block breaks.
pub(crate) fn check_groups(
    header: &BlockHeader,
    list: &[u8],
    bytes: &[Range<usize>],
) -> Result<(), String> {
    let mut logs = 0u64;
    for (number, range) in bytes.iter().enumerate() {
        let group = list.get(range.clone()).unwrap_or_default();
        let summary = group::validate_group(group)
            .map_err(|error| format!("group {number} of it: {error}"))?;
        logs += u64::from(summary.logs);
    }
    match logs == u64::from(header.log_count) {
        true => Ok(()),
        false => Err(format!("its groups have {logs} logs, its header says {}", header.log_count)),
    }
}
