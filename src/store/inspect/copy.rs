//! Verification of a copy of a shard.

use std::collections::BTreeSet;

use super::{report::VerifyReport, segment::SegmentCheck};
use crate::{ErrorKind, Result, config::LogstoreName, shard::Shard};

/// Verifies the segments with these ordinals, without their keys if `keyless`. A segment whose loss
/// was accepted is left out.
///
/// # Errors
/// An error that prevents the verification. The report has the faults.
pub(in crate::store) fn verify_copy(
    report: &mut VerifyReport,
    keyless: bool,
    name: &LogstoreName,
    shard: &Shard,
    ordinals: &BTreeSet<u64>,
) -> Result<()> {
    let record = shard.record();
    let mut before = None;
    for segment in shard.segments(false)?.iter() {
        if !ordinals.contains(&segment.ordinal) || record.loss(segment.ordinal).is_some() {
            continue;
        }
        let opened = match shard.open_listed(segment) {
            Ok(Some(opened)) => opened,
            Ok(None) => continue,
            Err(error) => {
                report.note(Some(name), error.clone())?;
                // The blocks in front of the damage are checked all the same.
                match shard.open_damaged(segment, error) {
                    Err(error) if error.kind() == ErrorKind::Integrity => continue,
                    opened => opened?,
                }
            }
        };
        let heads = record.head.iter().filter(|head| head.ordinal == segment.ordinal).collect();
        SegmentCheck::run(report, keyless, name, shard, opened, heads, &mut before)
            .or_else(|error| report.note(Some(name), error))?;
    }
    Ok(())
}
