//! Counters of an open store, for monitoring.
//!
//! A counter costs one relaxed addition, at most once a block; a latency costs two or more. A snapshot reads the counters one
//! after the other. Each number is correct in itself, but the snapshot is not of one point in time.

#[cfg(feature = "prometheus")]
mod prometheus;

use std::{sync::Arc, time::Duration};

use serde::Serialize;

use crate::{
    config::LogstoreName,
    crypto::Suite,
    ids::LogstoreId,
    key_status::{KeyStatus, Refusal},
    kms::{Cmk, KmsMeter, RevokedReason},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

pub use crate::kms::meter::{KMS_LATENCY_BUCKETS_MS, KmsCalls, KmsMetrics};

/// The media type of [`StoreMetrics::to_prometheus`], for the header `Content-Type` of the answer to
/// a scrape.
#[cfg(feature = "prometheus")]
pub const PROMETHEUS_CONTENT_TYPE: &str =
    "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The counters of one open store.
#[derive(Default)]
pub(crate) struct Counters {
    kms: Arc<KmsMeter>,
    revoked: [AtomicU64; 5],
    unreachable: AtomicU64,
    invalid: AtomicU64,
    appended: [AtomicU64; Suite::ALL.len()],
    read: [AtomicU64; Suite::ALL.len()],
    appends: LatencyCounter,
    fsyncs: LatencyCounter,
    pub(crate) segments_begun: AtomicU64,
    pub(crate) segments_sealed: AtomicU64,
    pub(crate) sync_failures: AtomicU64,
    pub(crate) writers_latched: AtomicU64,
    pub(crate) groups_lost: AtomicU64,
    pub(crate) anchor_failures: AtomicU64,
    pub(crate) audit_records: AtomicU64,
    pub(crate) audit_failures: AtomicU64,
    pub(crate) audit_left_out: AtomicU64,
}

impl std::fmt::Debug for Counters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Counters")
    }
}

/// The reasons in the order of their counters. The last counter is for reasons unknown here.
const REASONS: [RevokedReason; 4] = [
    RevokedReason::Disabled,
    RevokedReason::PendingDeletion,
    RevokedReason::Deleted,
    RevokedReason::NotPermitted,
];

impl Counters {
    /// Counters that show the calls to KMSs as `kms` counts them.
    pub(crate) fn new(kms: Arc<KmsMeter>) -> Self {
        Self { kms, ..Self::default() }
    }

    pub(crate) fn refused(&self, refusal: &Refusal) {
        let counter = match refusal {
            Refusal::Revoked(reason) => {
                let place =
                    REASONS.iter().position(|known| known == reason).unwrap_or(REASONS.len());
                &self.revoked[place]
            }
            Refusal::Unreachable(_) => &self.unreachable,
            Refusal::Invalid(_) => &self.invalid,
        };
        counter.fetch_add(1, Relaxed);
    }

    pub(crate) fn appended(&self, suite: Suite, bytes: u64) {
        self.appended[place(suite)].fetch_add(bytes, Relaxed);
    }

    /// Counts the groups of a block, each written this long after its submission.
    pub(crate) fn written(&self, after: impl Iterator<Item = Duration>) {
        self.appends.count(after);
    }

    /// Counts a sync of a segment, including a failed one.
    pub(crate) fn synced(&self, took: Duration) {
        self.fsyncs.count([took].into_iter());
    }

    pub(crate) fn read(&self, suite: Suite, bytes: u64) {
        self.read[place(suite)].fetch_add(bytes, Relaxed);
    }

    pub(crate) fn snapshot(
        &self,
        leases: Vec<LeaseMetrics>,
        service_lease: Option<LeaseMetrics>,
    ) -> StoreMetrics {
        let at = |counter: &AtomicU64| counter.load(Relaxed);
        let revoked = |place: usize| at(&self.revoked[place]);
        let sync_latency = self.fsyncs.read();
        StoreMetrics {
            kms: self.kms.read(),
            leases,
            service_lease,
            refusals: RefusalMetrics {
                disabled: revoked(0),
                pending_deletion: revoked(1),
                deleted: revoked(2),
                not_permitted: revoked(3) + revoked(4),
                unreachable: at(&self.unreachable),
                invalid: at(&self.invalid),
            },
            bytes: Suite::ALL
                .iter()
                .map(|&suite| SuiteMetrics {
                    suite: suite.name(),
                    appended: at(&self.appended[place(suite)]),
                    read: at(&self.read[place(suite)]),
                })
                .collect(),
            append_latency: self.appends.read(),
            sync_latency,
            logstores: Vec::new(),
            pending_bytes: 0,
            segments_begun: at(&self.segments_begun),
            segments_sealed: at(&self.segments_sealed),
            syncs: sync_latency.count,
            sync_failures: at(&self.sync_failures),
            writers_latched: at(&self.writers_latched),
            groups_lost: at(&self.groups_lost),
            anchor_failures: at(&self.anchor_failures),
            audit_records: at(&self.audit_records),
            audit_failures: at(&self.audit_failures),
            audit_left_out: at(&self.audit_left_out),
            retention_suspended: false,
            reserve_short: false,
        }
    }
}

fn place(suite: Suite) -> usize {
    Suite::ALL.iter().position(|known| *known == suite).unwrap_or(0)
}

/// The upper bounds of the buckets of [`LatencyMetrics::histogram`], in microseconds. The last
/// bucket has no upper bound.
pub const LATENCY_BUCKETS_US: [u64; 12] =
    [50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 50_000, 100_000, 500_000, 1_000_000];

const LATENCY_BUCKETS: usize = LATENCY_BUCKETS_US.len() + 1;

/// How long operations took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LatencyMetrics {
    /// The number of operations.
    pub count: u64,
    /// The time that all of them took, in microseconds.
    pub sum_us: u64,
    /// A histogram that is not cumulative: each bucket counts the operations that took longer than
    /// the bound before and at most its own bound in [`LATENCY_BUCKETS_US`].
    pub histogram: [u64; LATENCY_BUCKETS],
}

#[derive(Default)]
struct LatencyCounter {
    sum_us: AtomicU64,
    histogram: [AtomicU64; LATENCY_BUCKETS],
}

impl LatencyCounter {
    fn count(&self, took: impl Iterator<Item = Duration>) {
        let (mut sum_us, mut counts) = (0u64, [0; LATENCY_BUCKETS]);
        for took in took {
            let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            sum_us = sum_us.saturating_add(us);
            counts[LATENCY_BUCKETS_US.partition_point(|bound| *bound < us)] += 1;
        }
        self.sum_us.fetch_add(sum_us, Relaxed);
        for (bucket, count) in self.histogram.iter().zip(counts).filter(|(_, count)| *count > 0) {
            bucket.fetch_add(count, Relaxed);
        }
    }

    fn read(&self) -> LatencyMetrics {
        let histogram = std::array::from_fn(|bucket| self.histogram[bucket].load(Relaxed));
        let count = histogram.iter().sum();
        LatencyMetrics { count, sum_us: self.sum_us.load(Relaxed), histogram }
    }
}

/// One open Logstore.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LogstoreMetrics {
    /// Its name.
    pub name: LogstoreName,
    /// The state of its key.
    pub key: KeyStatus,
    /// Groups written since the Logstore was opened.
    pub groups: u64,
    /// The bytes of these groups, before compression.
    pub bytes: u64,
    /// Bytes of groups opened to be read since then, framing included, after decompression.
    pub bytes_read: u64,
    /// Uses of the key that were refused since then.
    pub refusals: u64,
    /// Groups that wait to be written.
    pub queued_groups: u64,
    /// The bytes of the groups that wait.
    pub queued_bytes: u64,
}

impl LogstoreMetrics {
    pub(crate) fn new(name: LogstoreName, key: KeyStatus) -> Self {
        Self {
            name,
            key,
            groups: 0,
            bytes: 0,
            bytes_read: 0,
            refusals: 0,
            queued_groups: 0,
            queued_bytes: 0,
        }
    }
}

/// The lease of one master key, or of one Logstore under it, or of the service key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct LeaseMetrics {
    /// The master key.
    pub cmk: Cmk,
    /// The Logstore whose envelopes renew it. `None`: the Logstores under the master key share it.
    pub logstore: Option<LogstoreId>,
    /// Its state, with the time left in the lease.
    pub status: KeyStatus,
    /// The time since the last successful call was sent. `None` if there was none since the store
    /// was opened, or since the key was refused.
    pub age: Option<Duration>,
    /// The number of calls made to renew it.
    pub calls: u64,
}

/// The number of refused key uses, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RefusalMetrics {
    /// The master key is disabled.
    pub disabled: u64,
    /// The master key is pending deletion.
    pub pending_deletion: u64,
    /// The master key is deleted.
    pub deleted: u64,
    /// The role may not use the master key.
    pub not_permitted: u64,
    /// The lease has ended, and the KMS cannot be reached.
    pub unreachable: u64,
    /// The lease has ended, and the answer of the KMS is invalid.
    pub invalid: u64,
}

/// The bytes written and read under one suite.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct SuiteMetrics {
    /// The suite.
    pub suite: &'static str,
    /// Bytes of groups written, framing included, before compression.
    pub appended: u64,
    /// Bytes of groups opened to be read, framing included, after decompression.
    pub read: u64,
}

/// The counts of an open store since it was opened, from [`crate::Store::metrics`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct StoreMetrics {
    /// Calls to KMSs.
    pub kms: KmsMetrics,
    /// The leases of customers' master keys.
    pub leases: Vec<LeaseMetrics>,
    /// The lease of the master key that the service keyring is under; `None` if it is under none.
    pub service_lease: Option<LeaseMetrics>,
    /// Refused key uses.
    pub refusals: RefusalMetrics,
    /// The bytes written and read, by suite.
    pub bytes: Vec<SuiteMetrics>,
    /// From the submission of a group until it is `Written`.
    pub append_latency: LatencyMetrics,
    /// The syncs of segments, including failed ones.
    pub sync_latency: LatencyMetrics,
    /// The Logstores that are open, by name.
    pub logstores: Vec<LogstoreMetrics>,
    /// How much of the memory budget is used, in bytes
    /// ([`StoreOptions::pending_bytes_max`](crate::StoreOptions::pending_bytes_max)).
    pub pending_bytes: u64,
    /// Segments begun.
    pub segments_begun: u64,
    /// Segments sealed.
    pub segments_sealed: u64,
    /// Syncs of segments, including failed ones.
    pub syncs: u64,
    /// Syncs of segments that failed.
    pub sync_failures: u64,
    /// The number of times that a failure stopped the writer of a shard.
    pub writers_latched: u64,
    /// Groups that were acknowledged as [`Buffered`](crate::Durability::Buffered) and lost, because
    /// their master key was lost and they were not in a block within
    /// [`StoreOptions::kms_timeout`](crate::StoreOptions::kms_timeout). The key audit log names
    /// them ([`AuditEvent::GroupsLost`](crate::audit::AuditEvent::GroupsLost)).
    pub groups_lost: u64,
    /// The number of failed updates of the anchor.
    pub anchor_failures: u64,
    /// Records written to the key audit log.
    pub audit_records: u64,
    /// Records that could not be written to the key audit log.
    pub audit_failures: u64,
    /// Key transitions that the audit log omits: it records at most 10 an hour for one key. The
    /// next record counts the omitted ones.
    pub audit_left_out: u64,
    /// Whether retention by age is suspended, because the wall clock has jumped ahead:
    /// [`Admin::retention_status`](crate::Admin::retention_status).
    pub retention_suspended: bool,
    /// Whether a part of the room is missing that the store keeps for a full disk:
    /// [`Admin::reserve_status`](crate::Admin::reserve_status). Always `false` in a store that is
    /// open for reading.
    pub reserve_short: bool,
}
