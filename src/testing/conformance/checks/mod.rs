//! The checks, in the order in which they run.

mod calls;
mod network;
mod secrecy;
mod states;
mod wrapping;

use super::run::{Check, Run};

/// A check of the suite. The table in the documentation of the suite has the same names.
pub(super) struct Listed {
    pub(super) name: &'static str,
    pub(super) run: fn(&Run<'_>) -> Check,
}

/// All checks. Those of secrecy are last, because they examine the records of all others.
pub(super) const CHECKS: [Listed; 23] = [
    Listed { name: "round-trip", run: wrapping::round_trip },
    Listed { name: "context-binding", run: wrapping::context_binding },
    Listed { name: "context-boundaries", run: wrapping::context_boundaries },
    Listed { name: "other-key", run: wrapping::other_key },
    Listed { name: "damaged-wrapped-key", run: wrapping::damaged },
    Listed { name: "cmk-version", run: wrapping::cmk_version },
    Listed { name: "disabled", run: states::disabled },
    Listed { name: "pending-deletion", run: states::pending_deletion },
    Listed { name: "deleted", run: states::deleted },
    Listed { name: "missing-key", run: states::missing },
    Listed { name: "not-permitted", run: states::not_permitted },
    Listed { name: "rotation", run: states::rotation },
    Listed { name: "recreation", run: states::recreation },
    Listed { name: "concurrency", run: calls::concurrency },
    Listed { name: "routing", run: calls::routing },
    Listed { name: "connection-refused", run: network::connection_refused },
    Listed { name: "no-answer", run: network::no_answer },
    Listed { name: "half-an-answer", run: network::half_an_answer },
    Listed { name: "slow-answer", run: network::slow_answer },
    Listed { name: "independent-calls", run: network::independent_calls },
    Listed { name: "routing-in-an-outage", run: network::routing_in_an_outage },
    Listed { name: "error-details", run: secrecy::error_details },
    Listed { name: "no-secret-shown", run: secrecy::no_secret_shown },
];
