//! The states of a master key, as its administrator changes them.

use crate::kms::RevokedReason;
use crate::testing::conformance::run::{Caller, Check, Run, Sample, Wanted, failed, refused};

pub(in crate::testing::conformance) fn disabled(run: &Run<'_>) -> Check {
    let caller = run.caller();
    let (sample, other) = (run.sample(&caller)?, run.sample(&caller)?);
    run.subject.disable(&sample.cmk)?;
    gone(run, &caller, &sample, RevokedReason::Disabled, "with a disabled key")?;
    caller.works(&other, "while another key is disabled")?;
    run.subject.enable(&sample.cmk)?;
    back(run, &caller, &sample, "with a key that is enabled again")
}

pub(in crate::testing::conformance) fn pending_deletion(run: &Run<'_>) -> Check {
    let caller = run.caller();
    let (sample, other) = (run.sample(&caller)?, run.sample(&caller)?);
    run.subject.schedule_deletion(&sample.cmk)?;
    let when = "with a key pending deletion";
    gone(run, &caller, &sample, RevokedReason::PendingDeletion, when)?;
    caller.works(&other, "while another key is pending deletion")?;
    run.subject.cancel_deletion(&sample.cmk)?;
    back(run, &caller, &sample, "after its deletion is cancelled")
}

pub(in crate::testing::conformance) fn deleted(run: &Run<'_>) -> Check {
    let caller = run.caller();
    let (sample, other) = (run.sample(&caller)?, run.sample(&caller)?);
    run.subject.delete(&sample.cmk)?;
    gone(run, &caller, &sample, RevokedReason::Deleted, "with a deleted key")?;
    caller.works(&other, "while another key is deleted")
}

pub(in crate::testing::conformance) fn missing(run: &Run<'_>) -> Check {
    let caller = run.caller();
    let sample = run.sample(&caller)?;
    // A KMS may look at the wrapped key before it looks for the master key.
    let missing = run.subject.missing_key();
    let answer = caller.wrap(&missing, &sample.context, &sample.key)?;
    refused(answer, Wanted::Revoked(RevokedReason::Deleted), "wrapping with a missing key")?;
    let answer = caller.unwrap(&missing, &sample.context, &sample.wrapped)?;
    refused(answer, Wanted::InvalidOrRevoked, "unwrapping with a missing key")?;
    // Wrapping must not have created it.
    let answer = caller.wrap(&missing, &sample.context, &sample.key)?;
    refused(answer, Wanted::Revoked(RevokedReason::Deleted), "wrapping with a missing key again")?;
    caller.works(&sample, "with another key afterwards")
}

pub(in crate::testing::conformance) fn not_permitted(run: &Run<'_>) -> Check {
    let caller = run.caller();
    let (sample, other) = (run.sample(&caller)?, run.sample(&caller)?);
    run.subject.withdraw(&sample.cmk)?;
    let when = "without the permission";
    gone(run, &caller, &sample, RevokedReason::NotPermitted, when)?;
    caller.works(&other, "with another key, which is permitted")?;
    run.subject.permit(&sample.cmk)?;
    back(run, &caller, &sample, "with the permission given again")
}

pub(in crate::testing::conformance) fn rotation(run: &Run<'_>) -> Check {
    let caller = run.caller();
    let mut samples = vec![run.sample(&caller)?];
    for _ in 0..3 {
        let cmk = samples[0].cmk.clone();
        run.subject.rotate(&cmk)?;
        let before = samples.last().map(|sample| sample.wrapped.clone()).unwrap_or_default();
        run.settled(|| {
            let sample = run.sample_under(&caller, cmk.clone())?;
            match (caller.cmk_version(&before)?, caller.cmk_version(&sample.wrapped)?) {
                (None, None) => Ok(()),
                (Some(before), Some(after)) if before != after => Ok(()),
                (before, after) => failed(format!(
                    "the version is {before:?} before a rotation and {after:?} after it"
                )),
            }
        })?;
        samples.push(run.sample_under(&caller, cmk)?);
        for (rotations, sample) in samples.iter().enumerate() {
            caller.opens(sample, &format!("a key that was wrapped after {rotations} rotations"))?;
        }
    }
    let later = run.caller();
    samples.iter().try_for_each(|sample| later.opens(sample, "in an instance made after rotations"))
}

pub(in crate::testing::conformance) fn recreation(run: &Run<'_>) -> Check {
    let caller = run.caller();
    let sample = run.sample(&caller)?;
    run.subject.recreate(&sample.cmk)?;
    let old = |caller: &Caller<'_>| {
        let answer = caller.unwrap(&sample.cmk, &sample.context, &sample.wrapped)?;
        let what = "unwrapping under another key of the same name";
        refused(answer, Wanted::InvalidOrRevoked, what)
    };
    run.settled(|| old(&caller))?;
    // The new key works, and does not open wrapped keys of the old one.
    let new = run.sample_under(&caller, sample.cmk.clone())?;
    caller.works(&new, "under the new key of the same name")?;
    old(&caller)?;
    old(&run.caller())
}

/// The key is refused, in this instance and in new ones, and stays refused.
fn gone(
    run: &Run<'_>,
    caller: &Caller<'_>,
    sample: &Sample,
    reason: RevokedReason,
    when: &str,
) -> Check {
    run.settled(|| caller.revoked(sample, reason, when))?;
    run.caller().revoked(sample, reason, when)?;
    caller.revoked(sample, reason, when)
}

/// The key works again, in this instance and in new ones.
fn back(run: &Run<'_>, caller: &Caller<'_>, sample: &Sample, when: &str) -> Check {
    run.settled(|| caller.works(sample, when))?;
    run.caller().works(sample, when)
}
