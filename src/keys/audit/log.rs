//! The key audit log of an open store.

use std::{path::PathBuf, sync::Arc};

use tracing::{error, info};

use super::{
    chain::{Chain, End},
    files::AuditFiles,
    line::Line,
    record::{AuditEvent, AuditHead, AuditRecord},
    tail::Tail,
    transitions::{
        KeyState, TRANSITIONS_MAX, Transitions, follow, kind, shortened, with_count, without_count,
    },
};
use crate::{
    Error, Result,
    config::LogstoreName,
    crypto::hmac_sha256,
    document::to_json,
    epoch::Fence,
    ids::{LogstoreId, hex_encode},
    io::{Clock, Disk},
    keys::service_key::ServiceKey,
    metrics::Counters,
    sync::{LockRank, Mutex, atomic::Ordering, lock},
};

/// The audit log of an open store.
pub(crate) struct AuditLog {
    chain: Chain,
    clock: Arc<dyn Clock>,
    counters: Arc<Counters>,
    /// `None` until the first transition is recorded. The log is read for them then.
    transitions: Mutex<Option<Transitions>>,
    tail: Mutex<Tail>,
}

impl std::fmt::Debug for AuditLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AuditLog").field("dir", &self.chain.files.dir()).finish_non_exhaustive()
    }
}

impl AuditLog {
    /// The log in `dir`, whose end is not known yet. Without a fence it is only read.
    pub(crate) fn new(
        disk: Arc<dyn Disk>,
        clock: Arc<dyn Clock>,
        service: Arc<ServiceKey>,
        dir: PathBuf,
        file_bytes_max: u64,
        counters: Arc<Counters>,
        fence: Option<Arc<Fence>>,
    ) -> Self {
        let files = AuditFiles::new(disk, dir);
        let tail = Tail::new(files.clone(), file_bytes_max, fence);
        Self {
            chain: Chain { files, service },
            clock,
            counters,
            transitions: Mutex::new(LockRank::AuditTransitions, None),
            tail: Mutex::new(LockRank::AuditTail, tail),
        }
    }

    /// Finds where the log ends, and whether the record `known` of the catalogue is in it.
    ///
    /// # Errors
    /// An error of the disk. Damage is none: the log continues behind it, and [`AuditLog::walk`]
    /// reports it.
    pub(crate) fn find_end(&self, known: &AuditHead) -> Result<()> {
        let end = self.chain.find_end(known)?;
        lock(&self.tail).move_to(end);
        Ok(())
    }

    /// The next record goes into a new file: another writer may still add records to the current
    /// one.
    pub(crate) fn begin_new_file(&self) {
        lock(&self.tail).leave();
    }

    /// Makes the last record durable, unless it is the record `known` of the catalogue.
    pub(crate) fn make_durable(&self, known: &AuditHead) -> Result<()> {
        lock(&self.tail).make_durable(known)
    }

    /// How far the log is, for the catalogue to remember. If the log does not continue the record
    /// `known`, the catalogue keeps that one, so that the loss stays visible for good.
    pub(crate) fn head_after(&self, known: &AuditHead) -> AuditHead {
        let tail = lock(&self.tail);
        let end = tail.end();
        if end.follows { end.head.clone() } else { known.clone() }
    }

    /// Renames the files of the log, since the keyring that tagged them is lost, and begins a new
    /// log.
    pub(crate) fn set_aside(&self, why: &str) -> Result<()> {
        {
            let mut tail = lock(&self.tail);
            self.chain.files.set_aside(why)?;
            tail.move_to(End::empty());
        }
        *lock(&self.transitions) = None;
        Ok(())
    }

    /// Sentences about the files that have a name of the log and are not part of it.
    pub(crate) fn strangers(&self) -> Result<Vec<String>> {
        self.chain.files.strangers()
    }

    pub(crate) fn head(&self) -> AuditHead {
        lock(&self.tail).end().head.clone()
    }

    /// Appends a record durably.
    pub(crate) fn record(
        &self,
        event: AuditEvent,
        logstore: Option<(&LogstoreName, LogstoreId)>,
        detail: impl Into<String>,
    ) -> Result<()> {
        let detail = shortened(detail.into());
        let mut transitions = lock(&self.transitions);
        if let (Some(all), Some((_, id))) = (&mut *transitions, logstore)
            && let Some(state) = all.get_mut(&Some(id))
        {
            // A transition that was left out comes before this record. Its failure does not decide
            // about this record.
            let _ = self.catch_up(Some(id), state);
        }
        self.put(event, logstore, &detail)?;
        if let (Some(all), Some((_, id))) = (&mut *transitions, logstore) {
            follow(all, event, Some(id), &detail, self.clock.wall_us());
        }
        Ok(())
    }

    /// Appends a record, and logs and counts it.
    fn put(
        &self,
        event: AuditEvent,
        logstore: Option<(&LogstoreName, LogstoreId)>,
        detail: &str,
    ) -> Result<()> {
        let name = logstore.map(|(name, _)| name.to_string());
        match self.append(event, logstore, detail.to_owned()) {
            Ok(number) => {
                self.counters.audit_records.fetch_add(1, Ordering::Relaxed);
                info!(number, ?event, logstore = name, detail, "audit record written");
                Ok(())
            }
            Err(cause) => {
                self.counters.audit_failures.fetch_add(1, Ordering::Relaxed);
                error!(?event, logstore = name, detail, error = %cause, "key audit log write failed");
                Err(cause)
            }
        }
    }

    fn append(
        &self,
        event: AuditEvent,
        logstore: Option<(&LogstoreName, LogstoreId)>,
        detail: String,
    ) -> Result<u64> {
        let mut tail = lock(&self.tail);
        // Asked under the lock, so that the version never decreases from one record to the next.
        let (keyring_version, key) = {
            let keyring = self.chain.service.keyring();
            (keyring.newest(), keyring.audit_key(keyring.newest())?)
        };
        let before = &tail.end().head;
        let record = AuditRecord {
            number: before.number.saturating_add(1),
            time_us: self.clock.wall_us(),
            event,
            logstore: logstore.map(|(name, _)| name.clone()),
            logstore_id: logstore.map(|(_, id)| id),
            detail,
            keyring_version,
        };
        let json = to_json(&record);
        let tag = hex_encode(&hmac_sha256(&key, &[before.tag.as_bytes(), json.as_bytes()]));
        // Before the disk, which may hang.
        drop(key);
        tail.append(&json, AuditHead { number: record.number, tag })?;
        Ok(record.number)
    }

    /// Records that access to a key was lost or is back, unless the log says so already. Another
    /// process may have written that. Without a Logstore the key is the service key. At most
    /// [`TRANSITIONS_MAX`] transitions of one key are recorded in an hour. The log counts the
    /// others, and the next record has their count.
    pub(crate) fn transition(
        &self,
        event: AuditEvent,
        logstore: Option<(&LogstoreName, LogstoreId)>,
        detail: String,
    ) -> Result<()> {
        self.transition_if(event, logstore, detail, "", || true).map(|_| ())
    }

    /// As [`AuditLog::transition`], if `wanted` holds when the log is free. Returns whether it
    /// held. `note` follows the detail in the record, and does not tell one transition from
    /// another.
    pub(crate) fn transition_if(
        &self,
        event: AuditEvent,
        logstore: Option<(&LogstoreName, LogstoreId)>,
        detail: String,
        note: &str,
        wanted: impl FnOnce() -> bool,
    ) -> Result<bool> {
        let detail = shortened(detail);
        let mut transitions = lock(&self.transitions);
        let transitions = transitions.get_or_insert_with(|| self.read_transitions());
        if !wanted() {
            return Ok(false);
        }
        let (name, id) = logstore.unzip();
        let state = transitions.entry(id).or_default();
        let news = match (event, state.loss()) {
            (AuditEvent::Recovered, known) => known.is_some(),
            // The errors of one outage differ. It is one loss.
            (AuditEvent::LeaseEnded, Some((AuditEvent::LeaseEnded, before))) => {
                kind(before) != kind(&detail)
            }
            (event, Some((before, reason))) => event != before || detail != *reason,
            (_, None) => true,
        };
        if !news {
            return Ok(true);
        }
        let now_us = self.clock.wall_us();
        if state.recent(now_us) < TRANSITIONS_MAX {
            let noted = with_count(&format!("{detail}{note}"), state.left_out);
            let recorded = self.put(event, logstore, &noted);
            if recorded.is_ok() {
                state.recorded(event, detail, now_us);
                return Ok(true);
            }
            // Without the service key no record is written. The next record has their number.
            let waits =
                matches!(recorded, Err(Error::ServiceKey { .. } | Error::KeyringNotRead { .. }));
            if state.left_out == 0 && !waits {
                return recorded.map(|()| true);
            }
        } else if state.left_out == 0 {
            let logstore = name.map(LogstoreName::to_string);
            info!(logstore, "key audit log: too many transitions of one key, counting the rest");
        }
        state.left_out += 1;
        state.latest = Some((event, detail, name.cloned()));
        self.counters.audit_left_out.fetch_add(1, Ordering::Relaxed);
        Ok(true)
    }

    /// Records the state of each key whose last transition was left out, if the hourly limit allows
    /// it.
    pub(crate) fn record_omitted(&self) {
        let now_us = self.clock.wall_us();
        for (id, state) in lock(&self.transitions).iter_mut().flatten() {
            if state.latest.is_some() && state.recent(now_us) < TRANSITIONS_MAX {
                // A failure leaves the transition for later.
                let _ = self.catch_up(*id, state);
            }
        }
    }

    /// Records the last transition that was left out, and how many were left out before it.
    fn catch_up(&self, id: Option<LogstoreId>, state: &mut KeyState) -> Result<()> {
        let Some((event, detail, name)) = state.latest.clone() else { return Ok(()) };
        let left_out = state.left_out.saturating_sub(1);
        self.put(event, name.as_ref().zip(id), &with_count(&detail, left_out))?;
        state.recorded(event, detail, self.clock.wall_us());
        Ok(())
    }

    /// The state of every key by the log, as far as the log can be read. [`AuditLog::walk`] reports
    /// damage.
    fn read_transitions(&self) -> Transitions {
        let files = &self.chain.files;
        let mut transitions = Transitions::new();
        for part in files.scan().map(|scan| scan.parts).unwrap_or_default() {
            for line in files.front(part.number).map(|lines| lines.lines).unwrap_or_default() {
                let AuditRecord { event, logstore_id, time_us, .. } = line.record;
                let detail = without_count(&line.record.detail);
                follow(&mut transitions, event, logstore_id, detail, time_us);
            }
        }
        transitions
    }

    /// All records. Verifies the chain from the first to the last, and against `heads` that were
    /// noted earlier.
    pub(crate) fn verified(&self, heads: &[&AuditHead]) -> Result<Vec<AuditRecord>> {
        let mut records = Vec::new();
        self.walk(heads, &mut |line| records.push(line.record))?;
        Ok(records)
    }

    /// Calls `each` with the records in order, and verifies them as [`AuditLog::verified`] does.
    ///
    /// # Errors
    /// The first record that is not as it was written. `each` has seen the records before it.
    pub(crate) fn walk(&self, heads: &[&AuditHead], each: &mut dyn FnMut(Line)) -> Result<()> {
        self.chain.walk(heads, each)
    }
}

#[cfg(test)]
impl AuditLog {
    /// The log as the next opener finds it, before it looks for the end.
    pub(super) fn reopened(&self) -> Self {
        let (files, service) = (self.chain.files.clone(), Arc::clone(&self.chain.service));
        let tail = lock(&self.tail).reopened();
        Self {
            chain: Chain { files, service },
            clock: Arc::clone(&self.clock),
            counters: Arc::default(),
            transitions: Mutex::new(LockRank::AuditTransitions, None),
            tail: Mutex::new(LockRank::AuditTail, tail),
        }
    }

    pub(super) fn follows(&self) -> bool {
        lock(&self.tail).end().follows
    }

    pub(super) fn files(&self) -> &AuditFiles {
        &self.chain.files
    }

    pub(super) fn service(&self) -> &ServiceKey {
        &self.chain.service
    }
}
