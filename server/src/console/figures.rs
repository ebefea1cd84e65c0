//! The figures of a Logstore that are read from its files: sizes, keys, and the lag of its
//! consumers. They are kept for a while, and read by few threads, so that a page of Logstores with
//! many segments costs other calls nothing.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use envelog::{Logstore, LogstoreName, LogstoreStatus};
use tokio::{sync::Semaphore, time::timeout};

use super::open;
use crate::{
    cursors::Cursors,
    error::Result,
    groups::GroupProgress,
    service::{self, Open, Service},
};

/// How long figures are kept at least.
const AGE_MAX: Duration = Duration::from_secs(5);
/// Figures are kept this many times as long as it takes to read them.
const REST: u32 = 50;
/// How many Logstores are read at once.
const AT_ONCE: usize = 2;
/// How long a call waits for figures that are not known yet.
const PATIENCE: Duration = Duration::from_millis(400);

/// The figures of a Logstore, as they were read.
#[derive(Debug)]
pub(super) struct Known {
    /// `Err`: the code of the error of reading them.
    pub(super) status: Result<LogstoreStatus, &'static str>,
    pub(super) groups: Vec<GroupLag>,
}

/// How far a consumer group has come.
#[derive(Debug)]
pub(super) struct GroupLag {
    pub(super) progress: GroupProgress,
    /// By shard, in the order of `progress.shards`: the log groups that are behind its checkpoint.
    /// `None` without a checkpoint.
    pub(super) behind: Vec<Option<u64>>,
}

impl GroupLag {
    /// The log groups behind the checkpoints of all shards that have one. `None` without any.
    pub(super) fn total(&self) -> Option<u64> {
        self.behind.iter().flatten().copied().reduce(u64::saturating_add)
    }

    /// The groups of a Logstore. Blocks for file I/O.
    pub(super) fn of(service: &Service, logstore: &Logstore) -> Result<Vec<Self>> {
        let config = logstore.config();
        let shards: Vec<u32> = config.shards.iter().map(|shard| shard.id).collect();
        let groups = service.groups.progress(&logstore.id().to_string(), &shards);
        if groups.is_empty() {
            return Ok(Vec::new());
        }
        let cursors = Cursors::of(&config);
        let mut ends = HashMap::new();
        for shard in shards {
            ends.insert(shard, logstore.end_seq(shard)?);
        }
        let lag = |shard: &crate::groups::ShardProgress| {
            let at = cursors.seq(shard.checkpoint.as_deref()?)?;
            Some(ends.get(&shard.shard).copied().unwrap_or(0).saturating_sub(at))
        };
        let of = |progress: GroupProgress| Self {
            behind: progress.shards.iter().map(lag).collect(),
            progress,
        };
        Ok(groups.into_iter().map(of).collect())
    }
}

impl Known {
    fn read(service: &Service, logstore: &Logstore) -> Self {
        let status = logstore.status().map_err(|error| {
            tracing::warn!(%error, logstore = %logstore.name(), "no figures of a Logstore");
            error.code()
        });
        let groups = GroupLag::of(service, logstore).unwrap_or_default();
        Self { status, groups }
    }
}

#[derive(Debug)]
struct Entry {
    known: Option<Arc<Known>>,
    /// When to read them again.
    due: Instant,
    is_reading: bool,
}

/// The figures that are known.
#[derive(Debug)]
pub(super) struct Figures {
    entries: Mutex<HashMap<LogstoreName, Entry>>,
    readers: Arc<Semaphore>,
}

impl Default for Figures {
    fn default() -> Self {
        Self { entries: Mutex::default(), readers: Arc::new(Semaphore::new(AT_ONCE)) }
    }
}

impl Figures {
    fn entries(&self) -> MutexGuard<'_, HashMap<LogstoreName, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The figures of these Logstores, in their order, as far as they are known soon. Reads those
    /// that are too old in the background.
    pub(super) async fn of(
        service: &Arc<Service>,
        names: &[LogstoreName],
    ) -> Vec<Option<Arc<Known>>> {
        let figures = &service.console.figures;
        let mut unknown = Vec::new();
        for name in names.iter().filter(|name| figures.begin(name)) {
            let is_known = figures.known(name).is_some();
            // A task of its own: it ends also if this call does not.
            let reading = tokio::spawn(Self::read(Arc::clone(service), name.clone()));
            if !is_known {
                unknown.push(reading);
            }
        }
        let all = async {
            for reading in unknown {
                let _ = reading.await;
            }
        };
        let _ = timeout(PATIENCE, all).await;
        names.iter().map(|name| figures.known(name)).collect()
    }

    /// Forgets the Logstores that are gone.
    pub(super) fn keep(&self, exists: impl Fn(&LogstoreName) -> bool) {
        self.entries().retain(|name, _| exists(name));
    }

    pub(super) fn len(&self) -> usize {
        self.entries().len()
    }

    fn known(&self, name: &LogstoreName) -> Option<Arc<Known>> {
        self.entries().get(name).and_then(|entry| entry.known.clone())
    }

    /// Whether the figures of a Logstore are to be read now, by the caller.
    fn begin(&self, name: &LogstoreName) -> bool {
        let mut entries = self.entries();
        let new = || Entry { known: None, due: Instant::now(), is_reading: false };
        let entry = entries.entry(name.clone()).or_insert_with(new);
        let is_due = !entry.is_reading && entry.due <= Instant::now();
        entry.is_reading |= is_due;
        is_due
    }

    async fn read(service: Arc<Service>, name: LogstoreName) {
        let figures = &service.console.figures;
        let _reader = Arc::clone(&figures.readers).acquire_owned().await;
        let began = Instant::now();
        let read = Self::read_one(&service, &name).await;
        let mut entries = figures.entries();
        // One without an entry is gone.
        let Some(entry) = entries.get_mut(&name) else { return };
        entry.is_reading = false;
        entry.due = Instant::now() + AGE_MAX.max(began.elapsed() * REST);
        entry.known = read.ok().map(Arc::new);
    }

    async fn read_one(service: &Arc<Service>, name: &LogstoreName) -> Result<Known> {
        let Open { logstore, .. } = open(service, name).await?;
        let shared = Arc::clone(service);
        // Nothing here calls a KMS, so it needs none of the threads that may hang with one.
        service::run(move || Ok(Known::read(&shared, &logstore))).await
    }
}
