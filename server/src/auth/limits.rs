//! The limits of an access key: token buckets for calls and for bytes.
//!
//! A bucket may go into debt: a call passes while there is anything in it, and its bytes are paid
//! for when they are known. So a body may be larger than a second's allowance, and the calls that
//! follow wait for it.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use hyper::StatusCode;
use serde::{Deserialize, Deserializer};

use crate::error::{ApiError, Result};

/// What a call is for. It decides the code of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Use {
    /// PutLogs.
    Write,
    /// Any other call.
    Other,
}

/// The limits of a key in the file. Both are optional.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(deny_unknown_fields)]
struct Limits {
    requests_per_s: Option<u32>,
    bytes_per_s: Option<u64>,
}

/// The limits of a key, with what is left.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    limits: Limits,
    buckets: Mutex<Buckets>,
}

#[derive(Debug, Default)]
struct Buckets {
    requests: Bucket,
    bytes: Bucket,
}

/// What is left of an allowance. A full one has the allowance of a second.
#[derive(Debug, Default)]
struct Bucket {
    /// In millionths, so that a short time gives something too. Negative for a debt.
    left: i128,
    /// When `left` was right. `None`: the bucket is full.
    at: Option<Instant>,
}

const MILLION: i128 = 1_000_000;

impl<'de> Deserialize<'de> for Limiter {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let limits = Limits::deserialize(deserializer)?;
        if limits.requests_per_s == Some(0) || limits.bytes_per_s == Some(0) {
            return Err(serde::de::Error::custom("a limit must be at least 1"));
        }
        Ok(Self { limits, buckets: Mutex::default() })
    }
}

impl Limiter {
    pub(super) fn has_limits_of(&self, other: &Self) -> bool {
        self.limits == other.limits
    }

    /// Pays for a call, without its bytes.
    ///
    /// # Errors
    /// 403 with the code of the service for an exceeded quota, and the seconds to wait. Nothing is
    /// paid then.
    pub(super) fn spend(&self, what: Use, now: Instant) -> Result<()> {
        let code = match what {
            Use::Write => "WriteQuotaExceed",
            Use::Other => "ReadQuotaExceed",
        };
        let Limits { requests_per_s, bytes_per_s } = self.limits;
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let Buckets { requests, bytes } = &mut *buckets;
        let requests_rate = requests_per_s.map(u64::from);
        let waits = [
            (requests.wait(requests_rate, now), "calls", requests_rate),
            (bytes.wait(bytes_per_s, now), "bytes", bytes_per_s),
        ];
        if let Some((wait, what, Some(rate))) = waits.into_iter().max_by_key(|(wait, ..)| *wait)
            && !wait.is_zero()
        {
            let message =
                format!("the access key may use {rate} {what} a second, and has used more");
            let seconds = u32::try_from(wait.as_secs()).unwrap_or(u32::MAX).saturating_add(1);
            let mut refusal = ApiError::new(StatusCode::FORBIDDEN, code, message);
            refusal.retry_after_s = Some(seconds);
            return Err(refusal);
        }
        requests.take(requests_rate, 1, now);
        Ok(())
    }

    /// Pays for the bytes of a call or of its answer.
    pub(super) fn owe(&self, bytes: u64, now: Instant) {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets.bytes.take(self.limits.bytes_per_s, bytes, now);
    }
}

impl Bucket {
    /// What is left now.
    fn level(&self, rate: u64, now: Instant) -> i128 {
        let full = i128::from(rate) * MILLION;
        let Some(at) = self.at else { return full };
        // An hour fills every bucket but one in deep debt, and keeps the product in range.
        let micros = now.saturating_duration_since(at).as_micros().min(3_600_000_000) as i128;
        (self.left + micros * i128::from(rate)).min(full)
    }

    /// How long until a call passes. Zero: now, also without a limit.
    fn wait(&self, rate: Option<u64>, now: Instant) -> Duration {
        let Some(rate) = rate else { return Duration::ZERO };
        let missing = 1 - self.level(rate, now);
        if missing <= 0 {
            return Duration::ZERO;
        }
        let micros = (missing + i128::from(rate) - 1) / i128::from(rate);
        Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
    }

    fn take(&mut self, rate: Option<u64>, amount: u64, now: Instant) {
        let Some(rate) = rate else { return };
        self.left = self.level(rate, now) - i128::from(amount) * MILLION;
        self.at = Some(now);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn limiter(json: &str) -> Limiter {
        serde_json::from_str(json).unwrap()
    }

    /// The seconds that a refused call must wait; `None` for one that passes.
    fn after(limiter: &Limiter, what: Use, now: Instant) -> Option<u32> {
        limiter.spend(what, now).err().map(|refusal| {
            assert_eq!(refusal.status, StatusCode::FORBIDDEN);
            refusal.retry_after_s.unwrap()
        })
    }

    #[test]
    fn calls_pass_at_their_rate_after_a_burst_of_a_second() {
        let limiter = limiter(r#"{"requests_per_s": 10}"#);
        let start = Instant::now();
        let passed = |now| (0..100).filter(|_| after(&limiter, Use::Other, now).is_none()).count();
        assert_eq!(passed(start), 10);
        assert_eq!(after(&limiter, Use::Other, start), Some(1));
        assert_eq!(passed(start + Duration::from_millis(100)), 1);
        assert_eq!(passed(start + Duration::from_millis(350)), 3);
        // An idle minute earns the calls of one second. A clock that goes back earns none.
        assert_eq!(passed(start + Duration::from_secs(60)), 10);
        assert_eq!(passed(start), 0);
    }

    #[test]
    fn a_large_body_passes_and_is_paid_for_afterwards() {
        let limiter = limiter(r#"{"bytes_per_s": 1000}"#);
        let start = Instant::now();
        assert_eq!(after(&limiter, Use::Write, start), None);
        limiter.owe(4000, start);
        let refusal = limiter.spend(Use::Write, start).unwrap_err();
        assert_eq!((refusal.code, refusal.retry_after_s), ("WriteQuotaExceed", Some(4)));
        // A refused call costs nothing.
        assert_eq!(after(&limiter, Use::Other, start + Duration::from_secs(2)), Some(2));
        assert_eq!(after(&limiter, Use::Other, start + Duration::from_millis(3001)), None);
        let refusal = limiter.spend(Use::Other, start).unwrap_err();
        assert_eq!(refusal.code, "ReadQuotaExceed");
        limiter.owe(u64::MAX, start);
        assert_eq!(after(&limiter, Use::Other, start), Some(u32::MAX));
    }

    #[test]
    fn without_limits_everything_passes() {
        let (limiter, now) = (limiter("{}"), Instant::now());
        assert!((0..1000).all(|_| after(&limiter, Use::Write, now).is_none()));
        for wrong in [r#"{"requests_per_s": 0}"#, r#"{"bytes": 1}"#, r#"{"bytes_per_s": -1}"#] {
            serde_json::from_str::<Limiter>(wrong).unwrap_err();
        }
    }
}
