//! Transitions of keys, and how many of them go on record.
//!
//! A customer who toggles a key must neither fill the disk nor hide other records among his own. So the log takes a limited number
//! of transitions an hour for each key, and counts the others.

use std::collections::{BTreeMap, VecDeque};

use super::AuditEvent;
use crate::{config::LogstoreName, ids::LogstoreId};

/// What of a detail goes on record, in bytes: in JSON each may become six, and the line holds it all the same.
pub(super) const DETAIL_BYTES_MAX: usize = 8 << 10;
/// How many transitions of one Logstore's key are recorded within [`WINDOW_US`].
pub(super) const TRANSITIONS_MAX: usize = 10;
pub(super) const WINDOW_US: u64 = 3_600_000_000;

/// The state of the keys of Logstores, as far as transitions tell of it.
pub(super) type Transitions = BTreeMap<LogstoreId, KeyState>;

#[derive(Default)]
pub(super) struct KeyState {
    /// The last loss on record, if the key has not come back since: the event and its detail.
    pub(super) on_record: Option<(AuditEvent, String)>,
    /// When the last transitions on record happened, the oldest first. There are at most [`TRANSITIONS_MAX`].
    pub(super) times: VecDeque<u64>,
    /// How many transitions were left out since the last one on record.
    pub(super) left_out: u64,
    /// The last one of them.
    pub(super) latest: Option<(AuditEvent, String, LogstoreName)>,
}

impl KeyState {
    /// The loss that the key suffers from now, on record or not.
    pub(super) fn loss(&self) -> Option<(AuditEvent, &String)> {
        match &self.latest {
            Some((AuditEvent::Recovered, ..)) => None,
            Some((event, detail, _)) => Some((*event, detail)),
            None => self.on_record.as_ref().map(|(event, detail)| (*event, detail)),
        }
    }

    /// How many transitions on record are less than an hour old. A wall clock that was set back lets none of them stay for longer.
    pub(super) fn recent(&self, now_us: u64) -> usize {
        self.times.iter().filter(|time_us| now_us.abs_diff(**time_us) < WINDOW_US).count()
    }

    /// A transition went on record, and with it the count of those before it.
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

/// What a record says of the key of a Logstore. The detail is without a count.
pub(super) fn follow(
    transitions: &mut Transitions,
    event: AuditEvent,
    logstore: LogstoreId,
    detail: &str,
    time_us: u64,
) {
    match event {
        AuditEvent::Revoked | AuditEvent::LeaseEnded | AuditEvent::Recovered => {
            transitions.entry(logstore).or_default().recorded(event, detail.to_owned(), time_us);
        }
        // A key is replaced only while it can be used.
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

/// The detail that [`with_count`] was given.
pub(super) fn without_count(detail: &str) -> &str {
    let counted = |(before, count): (&'_ str, &str)| -> Option<usize> {
        let count = count
            .strip_suffix(" transitions before this one are not on record")
            .or_else(|| count.strip_suffix(" transition before this one is not on record"))?;
        (!count.is_empty() && count.bytes().all(|byte| byte.is_ascii_digit())).then_some(before.len())
    };
    let len = detail.rsplit_once("; ").and_then(counted);
    len.and_then(|len| detail.get(..len)).unwrap_or(detail)
}

/// As much of a detail as goes on record. A count at its end is not one of ours: it must not be taken for one.
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
