//! A network that fails: no connection, no answer, half an answer, a slow answer.

use std::{io, thread, time::Duration};

use super::calls::serves_steadily;
use crate::{
    io::{Clock, SystemClock},
    sync::atomic::{AtomicBool, Ordering},
    testing::conformance::{
        proxy::{Fault, Proxy, pause},
        run::{Caller, Check, Run, Sample, Stop, failed},
    },
};

/// A proxy in front of the server, and an instance of the backend behind it.
struct Network<'r> {
    run: &'r Run<'r>,
    proxy: Proxy,
    /// With the short time limit.
    caller: Caller<'r>,
    sample: Sample,
}

impl<'r> Network<'r> {
    fn new(run: &'r Run<'r>) -> Check<Self> {
        let proxy = Proxy::start(run.subject.server()?).map_err(proxy_failed)?;
        let caller = run.caller_of(run.subject.kms_at(proxy.address())?);
        let sample = run.sample(&caller)?;
        let caller = caller.within(run.settings.short_timeout);
        Ok(Self { run, proxy, caller, sample })
    }

    /// An instance that has made no call yet, with the short time limit.
    fn fresh(&self) -> Check<Caller<'r>> {
        let kms = self.run.subject.kms_at(self.proxy.address())?;
        Ok(self.run.caller_of(kms).within(self.run.settings.short_timeout))
    }

    /// The number of answers that the first call of an instance needs.
    fn answers_of_a_call(&self) -> Check<u64> {
        let caller = self.patient(&self.fresh()?);
        let before = self.proxy.answers();
        caller.opens(&self.sample, "through the proxy")?;
        match self.proxy.answers() - before {
            0 => failed("the backend does not call the server through the proxy"),
            answers => Ok(answers),
        }
    }

    /// The same instance with the time limit for a KMS that answers.
    fn patient(&self, caller: &Caller<'r>) -> Caller<'r> {
        caller.within(self.run.settings.timeout)
    }

    /// With this fault both operations are unreachable, at each answer that a call needs. Without
    /// it, the next call succeeds.
    fn is_an_outage(&self, fault: Fault) -> Check {
        for skip in 0..self.answers_of_a_call()? {
            let when = format!("with the fault {fault:?} from answer {} on", skip + 1);
            // An instance that is connected and logged in, and a new one.
            for caller in [self.caller.clone(), self.fresh()?] {
                self.proxy.fail(fault, skip);
                self.caller_fails(&caller, skip, &when)?;
                self.proxy.heal();
                self.patient(&caller).works(&self.sample, &format!("after an outage {when}"))?;
            }
        }
        Ok(())
    }

    /// The calls fail from the answer on that the proxy withholds. An instance that is connected
    /// and logged in needs fewer answers than a new one, so the fault may meet a later call.
    fn caller_fails(&self, caller: &Caller<'r>, skip: u64, when: &str) -> Check {
        let (sample, before) = (&self.sample, self.proxy.answers());
        for _ in 0..skip {
            let unreachable = caller.unreachable_once(sample, when);
            if unreachable.is_ok() || self.proxy.answers() - before > skip {
                unreachable?;
                break;
            }
        }
        caller.unreachable(sample, when)
    }
}

pub(in crate::testing::conformance) fn connection_refused(run: &Run<'_>) -> Check {
    let network = Network::new(run)?;
    network.caller.opens(&network.sample, "through the proxy")?;
    network.proxy.refuse().map_err(proxy_failed)?;
    let when = "while the server refuses connections";
    network.caller.unreachable(&network.sample, when)?;
    let fresh = network.fresh()?;
    fresh.unreachable(&network.sample, when)?;
    network.proxy.accept_again().map_err(proxy_failed)?;
    let when = "after the server accepts connections again";
    network.patient(&network.caller).works(&network.sample, when)?;
    network.patient(&fresh).works(&network.sample, when)
}

pub(in crate::testing::conformance) fn no_answer(run: &Run<'_>) -> Check {
    let network = Network::new(run)?;
    network.is_an_outage(Fault::Hang)?;
    // A longer time limit waits longer.
    let short = run.settings.short_timeout;
    let long = network.caller.within(short * 3);
    network.proxy.fail(Fault::Hang, 0);
    let began = SystemClock.uptime();
    long.unreachable(&network.sample, "without an answer")?;
    // Both operations were called.
    let took = SystemClock.uptime().saturating_sub(began) / 2;
    if took < short * 2 {
        return failed(format!(
            "without an answer, calls with a time limit of {:?} ended after {took:?}",
            short * 3
        ));
    }
    let none = network.caller.within(Duration::ZERO);
    none.unreachable(&network.sample, "with a time limit of 0")?;
    network.proxy.heal();
    none.unreachable(&network.sample, "with a time limit of 0, from a server that answers")?;
    network.patient(&network.caller).works(&network.sample, "after an outage")
}

pub(in crate::testing::conformance) fn half_an_answer(run: &Run<'_>) -> Check {
    let network = Network::new(run)?;
    [Fault::Half, Fault::AllButOneByte, Fault::Close]
        .into_iter()
        .try_for_each(|fault| network.is_an_outage(fault))
}

pub(in crate::testing::conformance) fn slow_answer(run: &Run<'_>) -> Check {
    let network = Network::new(run)?;
    let short = run.settings.short_timeout;
    let answers = u32::try_from(network.answers_of_a_call()?).unwrap_or(u32::MAX);
    // In time.
    network.proxy.fail(Fault::Delay(short / 4), 0);
    for caller in [network.caller.clone(), network.fresh()?] {
        network.patient(&caller).works(&network.sample, "with slow answers in time")?;
    }
    // Too late: each answer by itself, or their sum.
    for delay in [short * 2, short * 3 / (2 * answers.max(1))] {
        network.proxy.fail(Fault::Delay(delay), 0);
        let when = format!("with answers that take {delay:?}");
        network.fresh()?.unreachable_once(&network.sample, &when)?;
    }
    // One byte after the other. A very short answer may be complete in time.
    network.proxy.fail(Fault::Drip, 0);
    let caller = network.fresh()?;
    let when = "with an answer that comes byte by byte";
    caller.in_time(when, |_| match caller.opens(&network.sample, when) {
        Ok(()) => Ok(()),
        Err(_) => caller.unreachable_once(&network.sample, when),
    })?;
    network.proxy.heal();
    network.patient(&network.caller).works(&network.sample, "after slow answers")
}

pub(in crate::testing::conformance) fn independent_calls(run: &Run<'_>) -> Check {
    let network = Network::new(run)?;
    let other = run.sample(&network.patient(&network.caller))?;
    // Long enough for the other call to be complete before.
    let limit = run.settings.short_timeout * 2 + run.settings.tolerance;
    let hung = network.caller.within(limit);
    let (before, ended) = (network.proxy.answers(), AtomicBool::new(false));
    network.proxy.fail_once(Fault::Hang);
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let done = hung.unreachable_once(&network.sample, "without an answer");
            ended.store(true, Ordering::SeqCst);
            done
        });
        let began = SystemClock.uptime();
        while network.proxy.answers() == before && !ended.load(Ordering::SeqCst) {
            if SystemClock.uptime() > began + limit {
                break;
            }
            pause(Duration::from_millis(1));
        }
        let works = network.patient(&network.caller).works(&other, "while another call hangs");
        let waited = ended.load(Ordering::SeqCst);
        let hung = thread.join().unwrap_or_else(|_| failed("a thread panicked"));
        works?;
        hung?;
        if waited { failed("a call has waited for a call with another master key") } else { Ok(()) }
    })
}

pub(in crate::testing::conformance) fn routing_in_an_outage(run: &Run<'_>) -> Check {
    let network = Network::new(run)?;
    let region = network.sample.cmk.region_id.clone();
    network.proxy.fail(Fault::Hang, 0);
    serves_steadily(run, &network.caller, &region)?;
    serves_steadily(run, &network.fresh()?, &region)?;
    network.proxy.refuse().map_err(proxy_failed)?;
    serves_steadily(run, &network.caller, &region)?;
    serves_steadily(run, &network.fresh()?, &region)
}

fn proxy_failed(error: io::Error) -> Stop {
    Stop::Failed(format!("the proxy of the suite failed: {error}"))
}
