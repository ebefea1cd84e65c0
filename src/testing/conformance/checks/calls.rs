//! Calls from many threads, and the choice of a KMS.

use std::thread;

use crate::{
    io::{Clock, SystemClock},
    testing::conformance::run::{Caller, Check, Run, failed},
};

/// How often each thread calls.
const ROUNDS: usize = 4;
/// A region that no KMS has.
const OTHER_REGION: &str = "envelog-nowhere-1";

pub(in crate::testing::conformance) fn concurrency(run: &Run<'_>) -> Check {
    let caller = run.caller();
    let samples = [run.sample(&caller)?, run.sample(&caller)?, run.sample(&caller)?];
    let results: Vec<Check> = thread::scope(|scope| {
        let start = |number: usize| {
            let (caller, sample) = (&caller, &samples[number % samples.len()]);
            scope.spawn(move || -> Check {
                (0..ROUNDS).try_for_each(|_| caller.works(sample, "in many threads at once"))
            })
        };
        let threads: Vec<_> = (0..run.settings.threads).map(start).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined.map(|result| result.unwrap_or_else(|_| failed("a thread panicked"))).collect()
    });
    results.into_iter().collect()
}

pub(in crate::testing::conformance) fn routing(run: &Run<'_>) -> Check {
    let caller = run.caller();
    let region = run.subject.create_key()?.region_id;
    serves_steadily(run, &caller, &region)?;
    let (name, again) = (caller.kms.name().to_owned(), run.caller().kms.name().to_owned());
    if name.is_empty() || name != again {
        return failed(format!("the backend has the names {name:?} and {again:?}"));
    }
    Ok(())
}

/// `serves` answers quickly and always the same: yes for the region, and no for another one.
pub(super) fn serves_steadily(run: &Run<'_>, caller: &Caller<'_>, region: &str) -> Check {
    for _ in 0..20 {
        for (region, wanted) in [(region, true), (OTHER_REGION, false)] {
            let began = SystemClock.uptime();
            if caller.serves(region)? != wanted {
                return failed(format!("serves({region:?}) must be {wanted}"));
            }
            let took = SystemClock.uptime().saturating_sub(began);
            if took > run.settings.short_timeout {
                return failed(format!("serves({region:?}) took {took:?}"));
            }
        }
    }
    Ok(())
}
