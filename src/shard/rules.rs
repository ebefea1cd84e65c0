//! The rules of the format that hold between a segment's header, its footer and its neighbours.
//!
//! Each of these parts is authenticated by itself. A part that breaks a rule here was sealed that
//! way by a process that has the key. It is reported as corruption: the engine never writes it.

use std::path::Path;

use super::{
    chain::check_retired,
    listing::SegmentRef,
    segments::{End, Opened, SegmentList},
};
use crate::{
    Error, Result,
    crypto::Suite,
    error::Location,
    keys::envelope::KeysSection,
    segment::{DecodedHeader, Footer, KeySource, Predecessor, PredecessorEnd, SegmentHeader},
};

/// Where a header has its suite.
const SUITE_AT: u64 = 10;
/// Where a header has the generation of the metadata.
const GENERATION_AT: u64 = 80;
/// Where a header has the time when it was made.
const CREATED_AT: u64 = 112;
/// Where a header has its key source.
const KEY_SOURCE_AT: u64 = 120;
/// Where a header has the kind of its predecessor.
const PREDECESSOR_AT: u64 = 160;
/// Where a header has the number of its predecessor's end.
const PREDECESSOR_END_AT: u64 = 176;
/// Where a header has how often receive times have gone back.
const SETBACKS_AT: u64 = 252;
/// Where a header has the latest receive time before it.
const LATEST_AT: u64 = 264;
/// Where a header has its predecessor's ordinal.
const PREDECESSOR_ORDINAL_AT: u64 = 232;

/// Checks header and footer of a segment against each other and against the keys of the Logstore.
pub(super) fn check_rules(list: &SegmentList, opened: &Opened) -> Result<()> {
    let (header, path, gate) = (&*opened.header, &*opened.name.path, list.gate());
    if list.is_read_only() && list.check_generation(path, header).is_err() {
        // The writer may have changed the metadata since it was read.
        gate.catch_up()?;
        list.check_generation(path, header)?;
    }
    let broken = |at, rule: &str| Err(Error::corrupt(opened.at(at), rule));
    if header.ordinal != 1 && header.predecessor == Predecessor::None {
        return Err(denies_predecessor(path));
    }
    if let Some((at, rule)) = chain_rule(header).or_else(|| time_rule(header)) {
        return broken(at, rule);
    }
    let section = gate.keys().section;
    let allowed = match header.key_source {
        KeySource::Keyring(_) => header.suite == Suite::Aes256Gmac,
        KeySource::DataKey(version) => match &section {
            Some(section) if section.version(version).is_some() => {
                section.encrypt_type.cipher() == header.suite.cipher()
            }
            _ => return Err(gate.version_missing(version)),
        },
    };
    check_retired(list, opened)?;
    if !allowed {
        return broken(SUITE_AT, "the suite of the segment does not go with its key");
    }
    if let Some(section) = &section
        && let Some((at, rule)) = key_rule(section, header)
    {
        return broken(at, rule);
    }
    match &opened.end {
        End::Sealed(sealed) => {
            let rule = footer_rule(header, &sealed.footer);
            let rule =
                rule.or_else(|| vouched_rule(opened.vouched.as_ref(), header, &sealed.footer));
            rule.map_or(Ok(()), |rule| broken(sealed.footer.offset, rule))
        }
        _ => Ok(()),
    }
}

/// Checks that no segment is under a data key if the metadata has no envelope. A holder of the
/// service keyring alone can remove the envelopes from the metadata; no append may then be written
/// in the clear. Reads the header of each segment, once in a process: not only the last ones, because
/// such a holder can add a segment under the service keyring behind them.
///
/// # Errors
/// [`Error::RolledBack`], about the data key.
pub(super) fn check_no_data_key(list: &SegmentList) -> Result<()> {
    if list.gate().keys().section.is_some() || list.has_no_data_key() {
        return Ok(());
    }
    let looked_at =
        |segment: &&SegmentRef| segment.active.is_none() && !list.is_lost(segment.ordinal);
    for segment in list.segments(false)?.iter().filter(looked_at) {
        if let KeySource::DataKey(version) = list.key_source(segment)? {
            return Err(list.gate().version_missing(version));
        }
    }
    list.note_no_data_key();
    Ok(())
}

/// The rule of the keys section that a header breaks, and where: which key a segment must be under.
/// Without it, a holder of the service keyring alone could add a segment to a Logstore under a
/// customer's key, and a holder of an old data key could add one to its Logstore.
fn key_rule(section: &KeysSection, header: &SegmentHeader) -> Option<(u64, &'static str)> {
    let under_data_key = match (header.key_source, section.owner(header.shard, header.ordinal)) {
        (KeySource::Keyring(_), None) => false,
        (KeySource::DataKey(version), Some(owner)) if version == owner => true,
        (KeySource::DataKey(_), Some(_)) => {
            return Some((
                KEY_SOURCE_AT,
                "a segment is under another version of the data key than the one at its ordinal",
            ));
        }
        (KeySource::Keyring(_), Some(_)) => {
            return Some((
                KEY_SOURCE_AT,
                "a segment under the service keyring follows one under a data key",
            ));
        }
        (KeySource::DataKey(_), None) => {
            return Some((
                KEY_SOURCE_AT,
                "a segment under a data key lies before the first of them",
            ));
        }
    };
    (under_data_key != (header.generation >= section.since))
        .then_some((GENERATION_AT, "the generation of the segment does not go with its key"))
}

/// The error for the header in `path`, which names no predecessor and is not the first of its
/// shard.
pub(super) fn denies_predecessor(path: &Path) -> Error {
    Error::Tampered {
        at: Location::new(path, PREDECESSOR_AT),
        what: "a segment that denies its predecessor",
    }
}

/// The rule that a header breaks in its description of its predecessor, and where.
pub(super) fn chain_rule(header: &SegmentHeader) -> Option<(u64, &'static str)> {
    let (Predecessor::Sealed(end) | Predecessor::Cut(end)) = &header.predecessor else {
        return None;
    };
    if end.ordinal.checked_add(1) != Some(header.ordinal) {
        return Some((
            PREDECESSOR_ORDINAL_AT,
            "the predecessor of a segment is not the one before it",
        ));
    }
    let rule = "the first sequence number of a segment lies below the end of the one before it";
    (end.end_seq > header.first_seq).then_some((PREDECESSOR_END_AT, rule))
}

/// The rule that a header breaks in its times, and where. A reader by time relies on them.
fn time_rule(header: &SegmentHeader) -> Option<(u64, &'static str)> {
    if header.is_setback() && header.setbacks == 0 {
        let rule = "the segment was made before the last receive time of the one before it";
        return Some((CREATED_AT, rule));
    }
    if header.setbacks > 0 && header.predecessor == Predecessor::None {
        return Some((SETBACKS_AT, "receive times go back in front of the first segment"));
    }
    (header.setbacks > 0 && header.latest_us < header.last_before_us())
        .then_some((LATEST_AT, "the latest receive time before a segment is before the last one"))
}

/// Checks that a segment continues the receive times of the segment before it, whose last group was
/// received at `before_us`; 0 if that is not known.
pub(super) fn check_times(before: &SegmentHeader, before_us: u64, opened: &Opened) -> Result<()> {
    let header = &*opened.header;
    let back = header.is_setback();
    let latest_us = before.latest_before_us().max(header.last_before_us());
    let (at, rule) = if !back && header.created_us < before_us {
        (CREATED_AT, "the segment was made before the last receive time of the one before it")
    } else if header.setbacks != before.setbacks.saturating_add(back.into()) {
        (SETBACKS_AT, "a segment counts receive times that go back and do not, or the reverse")
    } else if header.setbacks > 0 && header.latest_us != latest_us {
        (
            LATEST_AT,
            "the latest receive time before a segment is not that of the segments before it",
        )
    } else {
        return Ok(());
    };
    Err(Error::corrupt(opened.at(at), rule))
}

/// The rule that a footer breaks beside the header of its segment.
fn footer_rule(header: &DecodedHeader, footer: &Footer) -> Option<&'static str> {
    if !(header.first_seq..=header.limit_seq).contains(&footer.end_seq) {
        return Some("the end of the sequence numbers is not within those of the segment");
    }
    if footer.group_count > footer.end_seq - header.first_seq {
        return Some("the footer counts more groups than it has sequence numbers");
    }
    let none = (0, 0, header.first_seq);
    if footer.group_count == 0
        && (footer.first_time_us, footer.last_time_us, footer.end_seq) != none
    {
        return Some("the footer has times or sequence numbers of groups, and counts none");
    }
    let first = footer.index.first()?;
    if first.offset < header.body_start {
        return Some("the index names a place in front of the blocks");
    }
    (first.first_time_us != footer.first_time_us)
        .then_some("the index does not begin with the first receive time")
}

/// The rule that a footer breaks beside the end that the successor, or the catalogue, names for the
/// segment.
fn vouched_rule(
    vouched: Option<&PredecessorEnd>,
    header: &SegmentHeader,
    footer: &Footer,
) -> Option<&'static str> {
    let end = vouched?;
    if (footer.block_count, footer.end_seq) != (end.blocks, end.end_seq) {
        return Some(
            "the successor, or the catalogue, names another number of blocks or another end than the footer",
        );
    }
    (header.last_time_us(footer) != end.last_time_us).then_some(
        "the successor, or the catalogue, names another last receive time than the footer",
    )
}
