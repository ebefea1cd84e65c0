//! Counters of the calls to KMSs, by outcome.

use std::{array, time::Duration};

use serde::Serialize;

use super::KmsError;
use crate::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// The upper bounds of the buckets of [`KmsCalls::histogram`], in milliseconds. The last bucket has
/// no upper bound.
pub const KMS_LATENCY_BUCKETS_MS: [u64; 8] = [1, 5, 10, 50, 100, 500, 1000, 5000];

const BUCKETS: usize = KMS_LATENCY_BUCKETS_MS.len() + 1;

/// Calls to KMSs that had one outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct KmsCalls {
    /// The number of calls.
    pub count: u64,
    /// The time that all of them took, in microseconds.
    pub sum_us: u64,
    /// The time of the longest call, in microseconds.
    pub max_us: u64,
    /// A histogram that is not cumulative: each bucket counts the calls that took longer than the
    /// bound before and at most its own bound in [`KMS_LATENCY_BUCKETS_MS`]. The last bucket counts
    /// the calls that took longer than every bound.
    pub histogram: [u64; BUCKETS],
}

/// Calls to KMSs, by outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct KmsMetrics {
    /// The KMS did as it was asked.
    pub success: KmsCalls,
    /// The KMS refused the use of the master key.
    pub revoked: KmsCalls,
    /// The KMS did not answer in time, or gave an answer that is not about the key.
    pub unreachable: KmsCalls,
    /// The answer was not valid.
    pub invalid: KmsCalls,
}

/// The outcome of a call: one of the four answers that a backend can give.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Success,
    Revoked,
    Unreachable,
    Invalid,
}

impl Outcome {
    pub(crate) fn of<T>(answer: &Result<T, KmsError>) -> Self {
        match answer {
            Ok(_) => Outcome::Success,
            Err(KmsError::Revoked { .. }) => Outcome::Revoked,
            Err(KmsError::Invalid { .. }) => Outcome::Invalid,
            Err(_) => Outcome::Unreachable,
        }
    }

    pub(crate) fn word(self) -> &'static str {
        match self {
            Outcome::Success => "success",
            Outcome::Revoked => "revoked",
            Outcome::Unreachable => "unreachable",
            Outcome::Invalid => "invalid",
        }
    }
}

/// The counters of the calls to all KMSs of a store.
#[derive(Default)]
pub(crate) struct KmsMeter([Counter; 4]);

impl std::fmt::Debug for KmsMeter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("KmsMeter")
    }
}

impl KmsMeter {
    pub(crate) fn count(&self, outcome: Outcome, took: Duration) {
        self.0[outcome as usize].count(took);
    }

    pub(crate) fn read(&self) -> KmsMetrics {
        let [success, revoked, unreachable, invalid] =
            array::from_fn(|outcome| self.0[outcome].read());
        KmsMetrics { success, revoked, unreachable, invalid }
    }
}

/// The counters of one outcome.
#[derive(Default)]
struct Counter {
    count: AtomicU64,
    sum_us: AtomicU64,
    max_us: AtomicU64,
    histogram: [AtomicU64; BUCKETS],
}

impl Counter {
    fn count(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.count.fetch_add(1, Relaxed);
        self.sum_us.fetch_add(us, Relaxed);
        self.max_us.fetch_max(us, Relaxed);
        let bucket = KMS_LATENCY_BUCKETS_MS.iter().position(|bound| us <= bound * 1000);
        if let Some(bucket) = self.histogram.get(bucket.unwrap_or(BUCKETS - 1)) {
            bucket.fetch_add(1, Relaxed);
        }
    }

    fn read(&self) -> KmsCalls {
        KmsCalls {
            count: self.count.load(Relaxed),
            sum_us: self.sum_us.load(Relaxed),
            max_us: self.max_us.load(Relaxed),
            histogram: array::from_fn(|bucket| self.histogram[bucket].load(Relaxed)),
        }
    }
}
