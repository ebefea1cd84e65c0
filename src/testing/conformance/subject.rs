//! The backend under test, as its author presents it to the suite.

use std::{fmt, net::SocketAddr, sync::Arc};

use crate::kms::{Cmk, Kms};

/// The result of an administrative step.
pub type Admin<T = ()> = Result<T, AdminError>;

/// The reason why an administrative step did not happen.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdminError {
    /// The KMS has no such operation, or the stand-in that the test runs against does not have it.
    /// The checks that need the operation are reported as not applicable, with this reason.
    #[error("not supported: {0}")]
    Unsupported(String),
    /// The operation failed. The checks that need it fail.
    #[error("the administrator failed: {0}")]
    Failed(String),
}

impl AdminError {
    /// The operation failed for this reason.
    pub fn failed(why: impl fmt::Display) -> Self {
        Self::Failed(why.to_string())
    }
}

/// Declares that the KMS under test has no such operation.
///
/// # Errors
/// Always [`AdminError::Unsupported`], with the reason.
pub fn unsupported<T>(reason: impl Into<String>) -> Admin<T> {
    Err(AdminError::Unsupported(reason.into()))
}

/// A backend under test. It makes instances of the backend, and acts as the administrator of the
/// KMS.
///
/// An administrative method returns when the KMS has made the change. If the KMS applies changes
/// later, set [`Settings::settle`](super::Settings::settle). The methods may block and may panic: a
/// panic fails the check. No method has a default that skips checks, so a subject names each
/// operation that its KMS does not have, by [`unsupported`].
pub trait Subject: Sync {
    /// A new instance of the backend, as a process makes it when it starts. All instances use the
    /// same KMS.
    fn kms(&self) -> Arc<dyn Kms>;

    /// Creates a master key that is enabled and that the role may use. Each call creates another
    /// key.
    ///
    /// # Errors
    /// [`AdminError`]. Almost every check needs keys.
    fn create_key(&self) -> Admin<Cmk>;

    /// A master key that the KMS does not have and never had.
    fn missing_key(&self) -> Cmk;

    /// Disables a key, so that it can be enabled again.
    ///
    /// # Errors
    /// [`AdminError`].
    fn disable(&self, cmk: &Cmk) -> Admin;

    /// Enables a disabled key.
    ///
    /// # Errors
    /// [`AdminError`].
    fn enable(&self, cmk: &Cmk) -> Admin;

    /// Schedules the deletion of a key.
    ///
    /// # Errors
    /// [`AdminError`].
    fn schedule_deletion(&self, cmk: &Cmk) -> Admin;

    /// Cancels the deletion of a key, and enables the key if the KMS leaves it disabled.
    ///
    /// # Errors
    /// [`AdminError`].
    fn cancel_deletion(&self, cmk: &Cmk) -> Admin;

    /// Deletes a key now.
    ///
    /// # Errors
    /// [`AdminError`].
    fn delete(&self, cmk: &Cmk) -> Admin;

    /// Deletes a key, and creates another one under the same identifier.
    ///
    /// # Errors
    /// [`AdminError`].
    fn recreate(&self, cmk: &Cmk) -> Admin;

    /// Adds a version to a key, which wraps from then on.
    ///
    /// # Errors
    /// [`AdminError`].
    fn rotate(&self, cmk: &Cmk) -> Admin;

    /// Takes the permission to use a key away from the role.
    ///
    /// # Errors
    /// [`AdminError`].
    fn withdraw(&self, cmk: &Cmk) -> Admin;

    /// Gives the role the permission again that [`Subject::withdraw`] has taken away.
    ///
    /// # Errors
    /// [`AdminError`].
    fn permit(&self, cmk: &Cmk) -> Admin;

    /// The address at which the server of the KMS accepts TCP connections. The suite puts a proxy
    /// in front of it.
    ///
    /// # Errors
    /// [`AdminError`]: `Unsupported` for a backend without a network.
    fn server(&self) -> Admin<SocketAddr>;

    /// A new instance of the backend that connects to this address in place of the server's. With
    /// TLS, the certificate must be valid for the address, which is on the loopback interface.
    ///
    /// # Errors
    /// [`AdminError`]: `Unsupported` for a backend without a network.
    fn kms_at(&self, address: SocketAddr) -> Admin<Arc<dyn Kms>>;

    /// The secrets that the backend logs in with: passwords, tokens, PINs. None of them may be in
    /// an error or in `Debug` output.
    fn secrets(&self) -> Vec<String>;

    /// The reason why a check, given by its name, does not apply although all operations that it
    /// needs are there. Return `Some` only if the server of the test cannot behave as the check
    /// needs: if the backend is wrong, correct the backend.
    fn not_applicable(&self, check: &str) -> Option<String> {
        let _ = check;
        None
    }
}
