//! Transitions of keys, and how many of them are recorded.
//!
//! A customer who toggles a key must neither fill the disk nor hide other records among the
//! customer's own. So the log records a limited number of transitions an hour for each key, and
//! counts the others.

use std::collections::{BTreeMap, VecDeque};

use super::record::AuditEvent;
use crate::{config::LogstoreName, ids::LogstoreId};

/// The longest detail that is recorded, in bytes. JSON may turn each byte into six, which still
/// fits into a line.
pub(super) const DETAIL_BYTES_MAX: usize = 8 << 10;
/// How many transitions of one Logstore's key are recorded within [`WINDOW_US`] microseconds.
pub(super) const TRANSITIONS_MAX: usize = 10;
pub(super) const WINDOW_US: u64 = 3_600_000_000;

/// The states of the keys of Logstores, by their transitions. `None` is the service key.
pub(super) type Transitions = BTreeMap<Option<LogstoreId>, KeyState>;

#[derive(Default)]
pub(super) struct KeyState {
    /// The last recorded loss, unless a recovery was recorded since: the event and its detail.
    pub(super) on_record: Option<(AuditEvent, String)>,
    /// When the last recorded transitions happened, the oldest first. At most [`TRANSITIONS_MAX`].
    pub(super) times: VecDeque<u64>,
    /// How many transitions were left out since the last recorded one.
    pub(super) left_out: u64,
    /// The last transition that was left out.
    pub(super) latest: Option<(AuditEvent, String, Option<LogstoreName>)>,
}

impl KeyState {
    /// The present loss of the key, recorded or not.
    pub(super) fn loss(&self) -> Option<(AuditEvent, &String)> {
        match &self.latest {
            Some((AuditEvent::Recovered, ..)) => None,
            Some((event, detail, _)) => Some((*event, detail)),
            None => self.on_record.as_ref().map(|(event, detail)| (*event, detail)),
        }
    }

    /// How many recorded transitions are less than an hour old. Transitions in the future count too
    /// within that distance: setting the wall clock back keeps none of them for longer.
    pub(super) fn recent(&self, now_us: u64) -> usize {
        self.times.iter().filter(|time_us| now_us.abs_diff(**time_us) < WINDOW_US).count()
    }

    /// Notes that a transition was recorded, with the count of those left out before it.
    pub(super) fn recorded(&mut self, event: AuditEvent, detail: String, time_us: u64) {
        self.on_record = (event != AuditEvent::Recovered).then_some((event, detail));
        self.left_out = 0;
        self.latest = None;
        self.times.push_back(time_us);
        if self.times.len() > TRANSITIONS_MAX {
            self.times.pop_front();
        }
    }
}

/// Takes in a record about the key of a Logstore, or about the service key. `detail` is without a
/// count.
pub(super) fn follow(
    transitions: &mut Transitions,
    event: AuditEvent,
    logstore: Option<LogstoreId>,
    detail: &str,
    time_us: u64,
) {
    match event {
        AuditEvent::Revoked | AuditEvent::LeaseEnded | AuditEvent::Recovered => {
            transitions.entry(logstore).or_default().recorded(event, detail.to_owned(), time_us);
        }
        // A master key can be replaced only while the KMS lets it be used.
        AuditEvent::Replaced => {
            if let Some(state) = transitions.get_mut(&logstore) {
                state.on_record = None;
            }
        }
        AuditEvent::Deleted => {
            transitions.remove(&logstore);
        }
        _ => {}
    }
}

/// A detail with the number of transitions that were left out before its own.
pub(super) fn with_count(detail: &str, left_out: u64) -> String {
    match left_out {
        0 => detail.to_owned(),
        1 => format!("{detail}; 1 transition before this one is not on record"),
        count => format!("{detail}; {count} transitions before this one are not on record"),
    }
}

/// The detail without the count that [`with_count`] added.
pub(super) fn without_count(detail: &str) -> &str {
    let counted = |(before, count): (&'_ str, &str)| -> Option<usize> {
        let count = count
            .strip_suffix(" transitions before this one are not on record")
            .or_else(|| count.strip_suffix(" transition before this one is not on record"))?;
        (!count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit()))
            .then_some(before.len())
    };
    let len = detail.rsplit_once("; ").and_then(counted);
    len.and_then(|len| detail.get(..len)).unwrap_or(detail)
}

/// Cuts a detail to the length that is recorded. Text at its end that reads like a count gets a
/// full stop, so that [`without_count`] does not remove it.
pub(super) fn shortened(mut detail: String) -> String {
    if detail.len() > DETAIL_BYTES_MAX {
        let end = (0..=DETAIL_BYTES_MAX).rev().find(|&end| detail.is_char_boundary(end));
        detail.truncate(end.unwrap_or(0));
        detail.push('…');
    }
    if without_count(&detail).len() < detail.len() {
        detail.push('.');
    }
    detail
}

/// The word that the detail of an ended lease begins with.
pub(super) fn kind(detail: &str) -> &str {
    detail.split(':').next().unwrap_or_default()
}
