//! The master keys whose KMS does not answer, in a run over many Logstores.

use std::collections::BTreeSet;

use crate::{ErrorKind, Result, kms::Cmk, logstore::LogstoreShared};

/// The master keys for which a KMS has not answered in this run. The run asks no KMS for them
/// again, so a KMS that hangs delays the run by the time limit of one call for each of its keys.
#[derive(Default)]
pub(super) struct Unanswered(BTreeSet<Cmk>);

impl Unanswered {
    /// Whether the master key of a Logstore is one of them.
    pub(super) fn includes(&self, logstore: &LogstoreShared) -> bool {
        logstore.lease().is_some_and(|lease| self.0.contains(lease.cmk()))
    }

    /// Notes whether the KMS has answered an operation on this Logstore.
    pub(super) fn note<T>(&mut self, logstore: &LogstoreShared, done: Result<T>) -> Result<T> {
        if let Err(error) = &done
            && error.kind() == ErrorKind::KmsUnreachable
            && let Some(lease) = logstore.lease()
        {
            self.0.insert(lease.cmk().clone());
        }
        done
    }
}
