//! The figures of all Logstores at one moment, shared by all viewers.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use envelog::{KeyState, LogstoreName, metrics::StoreMetrics};
use tokio::sync::Mutex;

use crate::{
    error::Result,
    groups::now_us,
    names,
    service::{self, Service},
};

/// How long a snapshot is kept at least.
const AGE_MAX: Duration = Duration::from_millis(900);
/// It is kept this many times as long as it takes to take one, so that 10,000 Logstores cost 5 % of a
/// core at most.
const REST: u32 = 20;

/// A Logstore.
#[derive(Clone, Debug)]
pub(super) struct Row {
    pub(super) name: LogstoreName,
    pub(super) key: envelog::KeyStatus,
    /// Bytes since it was opened, as the next one.
    pub(super) appended: u64,
    pub(super) read: u64,
    pub(super) refusals: u64,
    pub(super) queued_bytes: u64,
    /// Bytes a second since the snapshot before. `None` in the first one.
    pub(super) append_rate: Option<f64>,
    pub(super) read_rate: Option<f64>,
}

impl Row {
    /// The states of keys, the worst first.
    pub(super) fn severity(&self) -> u8 {
        match self.key.state {
            KeyState::Revoked { .. } => 0,
            KeyState::Outage { .. } => 1,
            KeyState::Active => 3,
            KeyState::None => 4,
            _ => 2,
        }
    }

    /// Sets the rates from the figures some time before.
    fn compare(&mut self, before: &Self, seconds: f64) {
        let rate = |now: u64, then: u64| Some(now.saturating_sub(then) as f64 / seconds);
        self.append_rate = rate(self.appended, before.appended);
        self.read_rate = rate(self.read, before.read);
    }
}

/// The Logstores at one moment, by name.
#[derive(Debug)]
pub(super) struct Snapshot {
    taken: Instant,
    /// When to take the next one.
    due: Instant,
    pub(super) time_us: u64,
    pub(super) rows: Vec<Row>,
    pub(super) metrics: StoreMetrics,
}

impl Snapshot {
    /// Looks at all Logstores. Blocks for short locks of the engine, and calls no KMS.
    fn take(service: &Service, before: Option<&Self>) -> Result<Self> {
        let began = Instant::now();
        let mut names = service.store.list()?;
        names.retain(names::is_served);
        let mut metrics = service.store.metrics();
        let mut figures: HashMap<LogstoreName, _> = std::mem::take(&mut metrics.logstores)
            .into_iter()
            .map(|it| (it.name.clone(), it))
            .collect();
        let taken = Instant::now();
        let mut rows = Vec::with_capacity(names.len());
        for name in names {
            // One that is not open yet was created this moment.
            let Some(it) = figures.remove(&name) else { continue };
            let mut row = Row {
                name,
                key: it.key,
                appended: it.bytes,
                read: it.bytes_read,
                refusals: it.refusals,
                queued_bytes: it.queued_bytes,
                append_rate: None,
                read_rate: None,
            };
            if let Some(before) = before
                && let Ok(at) = before.rows.binary_search_by(|it| it.name.cmp(&row.name))
            {
                let seconds = taken.saturating_duration_since(before.taken).as_secs_f64();
                row.compare(&before.rows[at], seconds.max(0.001));
            }
            rows.push(row);
        }
        let due = Instant::now() + AGE_MAX.max(began.elapsed() * REST);
        Ok(Self { taken, due, time_us: now_us(), rows, metrics })
    }

    /// The row of a Logstore.
    pub(super) fn row(&self, name: &LogstoreName) -> Option<&Row> {
        let at = self.rows.binary_search_by(|it| it.name.cmp(name)).ok()?;
        Some(&self.rows[at])
    }
}

/// The last snapshot.
#[derive(Debug, Default)]
pub(super) struct Snapshots(Mutex<Option<Arc<Snapshot>>>);

impl Snapshots {
    /// A snapshot of the last second, or of the last seconds where there are thousands of Logstores.
    /// Callers at the same time share one.
    pub(super) async fn get(&self, service: &Arc<Service>) -> Result<Arc<Snapshot>> {
        let mut last = self.0.lock().await;
        if let Some(last) = last.as_ref().filter(|it| Instant::now() < it.due) {
            return Ok(Arc::clone(last));
        }
        let (service, before) = (Arc::clone(service), last.clone());
        let take = move || Snapshot::take(&service, before.as_deref());
        let new = Arc::new(service::run(take).await?);
        *last = Some(Arc::clone(&new));
        Ok(new)
    }
}
