//! A test suite for KMS backends.
//!
//! The rules for a backend are in the documentation of the module [`kms`](super). This suite checks
//! a backend against them: it wraps and unwraps keys, changes the states of master keys as their
//! administrator, damages wrapped keys, and puts a failing network between the backend and its
//! server. Run it in the tests of your backend, against the real service or a stand-in.
//!
//! The backend's author implements [`Subject`], which makes instances of the backend and acts as
//! the administrator of the KMS. [`run`] runs all checks and returns a [`Report`]. Each check is
//! *passed*, *failed*, or *not applicable* with a reason. The suite skips no check silently: a
//! subject declares with [`unsupported`] each operation that its KMS does not have.
//!
//! ```
//! # #[cfg(feature = "kms-local")] {
//! use std::{net::SocketAddr, sync::Arc};
//!
//! use envelog::{
//!     kms::{Cmk, Kms, LocalKms},
//!     testing::conformance::{self, Admin, AdminError, Settings, Subject, unsupported},
//! };
//!
//! struct Local(LocalKms);
//!
//! impl Subject for Local {
//!     fn kms(&self) -> Arc<dyn Kms> {
//!         Arc::new(self.0.clone())
//!     }
//!
//!     fn create_key(&self) -> Admin<Cmk> {
//!         let id = self.0.create_key("r", &["role"]).map_err(AdminError::failed)?;
//!         Ok(Cmk { cmk_key_id: id, arn: "role".into(), region_id: "r".into() })
//!     }
//!
//!     fn missing_key(&self) -> Cmk {
//!         Cmk { cmk_key_id: "none".into(), arn: "role".into(), region_id: "r".into() }
//!     }
//!
//!     fn disable(&self, cmk: &Cmk) -> Admin {
//!         self.0.disable(&cmk.cmk_key_id).map_err(AdminError::failed)
//!     }
//!
//!     fn enable(&self, cmk: &Cmk) -> Admin {
//!         self.0.enable(&cmk.cmk_key_id).map_err(AdminError::failed)
//!     }
//!
//!     fn recreate(&self, _: &Cmk) -> Admin {
//!         unsupported("the embedded KMS draws the identifiers of keys")
//!     }
//!
//!     fn server(&self) -> Admin<SocketAddr> {
//!         unsupported("a directory has no network")
//!     }
//!     // ...
//! #    fn schedule_deletion(&self, _: &Cmk) -> Admin { unsupported("left out") }
//! #    fn cancel_deletion(&self, _: &Cmk) -> Admin { unsupported("left out") }
//! #    fn delete(&self, _: &Cmk) -> Admin { unsupported("left out") }
//! #    fn rotate(&self, _: &Cmk) -> Admin { unsupported("left out") }
//! #    fn withdraw(&self, _: &Cmk) -> Admin { unsupported("left out") }
//! #    fn permit(&self, _: &Cmk) -> Admin { unsupported("left out") }
//! #    fn kms_at(&self, _: SocketAddr) -> Admin<Arc<dyn Kms>> { unsupported("left out") }
//! #    fn secrets(&self) -> Vec<String> { Vec::new() }
//! }
//!
//! let dir = tempfile::tempdir().unwrap();
//! let subject = Local(LocalKms::create_or_open(dir.path().join("kms")).unwrap());
//! let report = conformance::run(&subject, &Settings::default());
//! report.assert_conforming();
//! assert!(report.passed().contains(&"context-binding"), "{report}");
//! # }
//! ```
//!
//! # The checks
//!
//! | check | requirement | needs |
//! |---|---|---|
//! | `round-trip` | a wrapped key unwraps to the key, in any context, also in an instance that did not wrap it | |
//! | `context-binding` | in any other context the wrapped key is invalid: another value, a missing or additional entry, another name | |
//! | `context-boundaries` | the same holds for contexts of the same letters, whose names and values end elsewhere | |
//! | `other-key` | under another master key the wrapped key is invalid | |
//! | `damaged-wrapped-key` | changed, cut, extended, empty, oversized and random bytes are invalid; no panic, no key | |
//! | `cmk-version` | the version is stable; any bytes have one or none, without a panic | |
//! | `disabled` | a disabled key is revoked (disabled) at the next call, and works again once it is enabled; other keys work meanwhile | `disable`, `enable` |
//! | `pending-deletion` | the same for a key whose deletion is scheduled and cancelled (pending deletion) | `schedule_deletion`, `cancel_deletion` |
//! | `deleted` | a deleted key is revoked (deleted) | `delete` |
//! | `missing-key` | a key that never existed is revoked (deleted), and wrapping does not create it | |
//! | `not-permitted` | without the permission the key is revoked (not permitted), and works again with it | `withdraw`, `permit` |
//! | `rotation` | older wrapped keys unwrap after rotations; the version, if the wrapped key has one, changes with each rotation | `rotate` |
//! | `recreation` | under another key of the same name, older wrapped keys are invalid or revoked, and open to no key | `recreate` |
//! | `concurrency` | calls from many threads, with several master keys, all succeed | |
//! | `routing` | `serves` is true for the region and false for others, quickly; the name is the same in each instance | |
//! | `connection-refused` | a server that refuses connections is unreachable; the next call after it is back succeeds | `server`, `kms_at` |
//! | `no-answer` | a server that does not answer, at any exchange of a call, is unreachable when the time limit ends, and not earlier; with a limit of 0 at once | `server`, `kms_at` |
//! | `half-an-answer` | a connection that breaks within or before an answer, at any exchange of a call, is unreachable | `server`, `kms_at` |
//! | `slow-answer` | slow answers in time are accepted; if one answer, or their sum, takes longer than the limit, or an answer comes byte by byte, the call ends in time as unreachable | `server`, `kms_at` |
//! | `independent-calls` | a call that hangs delays no call with another master key | `server`, `kms_at` |
//! | `routing-in-an-outage` | `serves` is as quick and the same while the server hangs or refuses connections | `server`, `kms_at` |
//! | `error-details` | the detail of each error is a clause of one line and at most 1,000 bytes | |
//! | `no-secret-shown` | no error, no `Debug` output and no wrapped key contains a part of a data key (as bytes, hexadecimal, base64 or a list) or a secret of the login | |
//!
//! "In time" is within the time limit of the call plus [`Settings::tolerance`]. An outage must
//! never be revoked, and must never be a success from a cache.
//!
//! The suite does not check every rule. It cannot see whether a backend wipes its buffers, or
//! limits how much it reads, and it knows no error codes: test the sorting of your service's
//! answers as `src/kms/vault/tests.rs` does.

mod checks;
mod proxy;
mod report;
mod run;
mod subject;

use std::time::Duration;

use crate::io::{Clock, SystemClock};

use checks::{CHECKS, Listed};
pub use report::{CheckReport, Outcome, Report};
use run::{Run, Stop, caught};
pub use subject::{Admin, AdminError, Subject, unsupported};

/// The times of the suite, and the number of its threads.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Settings {
    /// The time limit of a call to a KMS that answers. 20 s by default, because the machine may be
    /// busy.
    pub timeout: Duration,
    /// The time limit of a call to a KMS that does not answer. 600 ms by default. A call that
    /// succeeds needs less than three quarters of it.
    pub short_timeout: Duration,
    /// How much later than its time limit a call may end. 1 s by default.
    pub tolerance: Duration,
    /// How long a change of the administrator takes at most to take effect. 0 by default: the next
    /// call must show it. The services of some clouds need more.
    pub settle: Duration,
    /// How many threads call at once. 16 by default.
    pub threads: usize,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(20),
            short_timeout: Duration::from_millis(600),
            tolerance: Duration::from_secs(1),
            settle: Duration::ZERO,
            threads: 16,
        }
    }
}

/// Runs all checks, one after the other, and reports the outcome of each. It continues after a
/// check that fails.
///
/// It blocks for some seconds with a local KMS, and for a minute or more with a distant one: the
/// checks make about 500 calls, and those of the network wait for time limits. Do not run other
/// tests with the same keys meanwhile. The keys that it creates stay.
pub fn run(subject: &dyn Subject, settings: &Settings) -> Report {
    let run = Run::new(subject, settings);
    let report = |&Listed { name, run: check }: &Listed| {
        let began = SystemClock.uptime();
        let outcome = match subject.not_applicable(name) {
            Some(reason) => Outcome::NotApplicable(reason),
            None => match caught(name, || check(&run)).and_then(|done| done) {
                Ok(()) => Outcome::Passed,
                Err(Stop::Failed(reason)) => Outcome::Failed(reason),
                Err(Stop::NotApplicable(reason)) => Outcome::NotApplicable(reason),
            },
        };
        CheckReport { name, outcome, took: SystemClock.uptime().saturating_sub(began) }
    };
    Report { kms: subject.kms().name().to_owned(), checks: CHECKS.iter().map(report).collect() }
}
