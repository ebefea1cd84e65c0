//! The rules of the format that hold between a segment's header, its footer and what stands around it.
//!
//! Each of these parts is authenticated by itself. What breaks a rule here was sealed so by a process that has the key, and is
//! reported as corruption: the engine never writes it.

use std::path::Path;

use super::{End, Opened, Shard};
use crate::{
    Error, Result,
    crypto::Suite,
    error::Location,
    keys::envelope::KeysSection,
    segment::{Footer, KeySource, Predecessor, PredecessorEnd, SegmentHeader},
};

/// Where a header has its suite.
const SUITE_AT: u64 = 10;
/// Where a header has the generation of the metadata.
const GENERATION_AT: u64 = 80;
/// Where a header has its key source.
const KEY_SOURCE_AT: u64 = 120;
/// Where a header has the kind of its predecessor.
const PREDECESSOR_AT: u64 = 160;
/// Where a header has the number of its predecessor's end.
const PREDECESSOR_END_AT: u64 = 176;
/// Where a header has its predecessor's ordinal.
const PREDECESSOR_ORDINAL_AT: u64 = 232;

impl Shard {
    /// Checks what the header and the footer of a segment say against each other and against the keys of the Logstore.
    pub(crate) fn check_rules(&self, opened: &Opened) -> Result<()> {
        let header = &opened.header.header;
        let path = &opened.name.path;
        if self.context.read_only && self.check_generation(path, header).is_err() {
            // The writer may have changed the metadata since it was read.
            self.context.gate.catch_up()?;
            self.check_generation(path, header)?;
        }
        let broken = |at, rule: &str| Err(Error::corrupt(opened.at(at), rule));
        if header.ordinal != 1 && header.predecessor == Predecessor::None {
            return Err(denies_predecessor(path));
        }
        if let Some((at, rule)) = chain_rule(header) {
            return broken(at, rule);
        }
        let section = self.context.gate.keys().section;
        let allowed = match header.key_source {
            KeySource::Keyring(_) => header.suite == Suite::Aes256Gmac,
            KeySource::DataKey(version) => match &section {
                Some(section) if section.version(version).is_some() => {
                    section.encrypt_type.cipher() == header.suite.cipher()
                }
                _ => return Err(self.context.gate.version_missing(version)),
            },
        };
        self.check_retired(opened)?;
        if !allowed {
            return broken(SUITE_AT, "the suite of the segment does not go with its key");
        }
        if let Some(section) = &section
            && let Some((at, rule)) = key_rule(section, header)
        {
            return broken(at, rule);
        }
        match &opened.end {
            End::Sealed(footer) => {
                let footer = &footer.footer;
                let rule = footer_rule(header, opened.header.body_start, footer);
                let rule = rule.or_else(|| vouched_rule(opened.vouched.as_ref(), header, footer));
                rule.map_or(Ok(()), |rule| broken(footer.offset, rule))
            }
            _ => Ok(()),
        }
    }
}

impl Shard {
    /// Checks that no segment is under a data key where the metadata has none. A holder of the service keyring alone can take the
    /// envelopes out of the metadata; no append may follow that into the clear. Reads the header of each segment.
    ///
    /// # Errors
    /// [`Error::RolledBack`], about the data key.
    pub(super) fn check_no_data_key(&self) -> Result<()> {
        if self.context.gate.keys().section.is_some() {
            return Ok(());
        }
        for segment in self.segments(false)?.iter().filter(|segment| segment.active.is_none()) {
            if let KeySource::DataKey(version) = self.key_source(segment)? {
                return Err(self.context.gate.version_missing(version));
            }
        }
        Ok(())
    }
}

/// The rule that a header breaks beside what the keys section says of which key is for which segment, and where. Without it the service
/// keyring alone could add a segment to a Logstore under a customer's key, and a copy of an old data key could add one to any Logstore.
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
            return Some((KEY_SOURCE_AT, "a segment under the service keyring follows one under a data key"));
        }
        (KeySource::DataKey(_), None) => {
            return Some((KEY_SOURCE_AT, "a segment under a data key lies before the first of them"));
        }
    };
    (under_data_key != (header.generation >= section.since))
        .then_some((GENERATION_AT, "the generation of the segment does not go with its key"))
}

/// The error where the header in `path` names no predecessor, and is not the first of its shard.
pub(super) fn denies_predecessor(path: &Path) -> Error {
    Error::Tampered { at: Location::new(path, PREDECESSOR_AT), what: "a segment that denies its predecessor" }
}

/// The rule that a header breaks in what it says of its predecessor, and where.
pub(super) fn chain_rule(header: &SegmentHeader) -> Option<(u64, &'static str)> {
    let (Predecessor::Sealed(end) | Predecessor::Cut(end)) = &header.predecessor else { return None };
    if end.ordinal.checked_add(1) != Some(header.ordinal) {
        return Some((PREDECESSOR_ORDINAL_AT, "the predecessor of a segment is not the one before it"));
    }
    let rule = "the first sequence number of a segment lies below the end of the one before it";
    (end.end_seq > header.first_seq).then_some((PREDECESSOR_END_AT, rule))
}

/// The rule that a footer breaks beside the header of its segment, whose blocks begin at `body_start`.
fn footer_rule(header: &SegmentHeader, body_start: u64, footer: &Footer) -> Option<&'static str> {
    if !(header.first_seq..=header.limit_seq).contains(&footer.end_seq) {
        return Some("the end of the sequence numbers is not within those of the segment");
    }
    if footer.group_count > footer.end_seq - header.first_seq {
        return Some("the footer counts more groups than it has sequence numbers");
    }
    let none = (0, 0, header.first_seq);
    if footer.group_count == 0 && (footer.first_time_us, footer.last_time_us, footer.end_seq) != none {
        return Some("the footer has times or sequence numbers of groups, and counts none");
    }
    let first = footer.index.first()?;
    if first.offset < body_start {
        return Some("the index names a place in front of the blocks");
    }
    (first.first_time_us != footer.first_time_us).then_some("the index does not begin with the first receive time")
}

/// The rule that a footer breaks beside what the successor, or the catalogue, says of the segment's end.
fn vouched_rule(vouched: Option<&PredecessorEnd>, header: &SegmentHeader, footer: &Footer) -> Option<&'static str> {
    let end = vouched?;
    if (footer.block_count, footer.end_seq) != (end.blocks, end.end_seq) {
        return Some("the successor, or the catalogue, names another number of blocks or another end than the footer");
    }
    (header.last_time_us(footer) != end.last_time_us)
        .then_some("the successor, or the catalogue, names another last receive time than the footer")
}
