//! Who may do what: access keys, signatures and permissions.

mod keys;
mod limits;
mod signature;

pub use keys::KeysError;
pub(crate) use keys::{AccessKey, AccessKeys, read_private};
pub(crate) use limits::Use;
pub(crate) use signature::{BodyDigest, Signed, sha256_hex, sign_v4};

use std::time::{Instant, SystemTime};

use crate::{
    call::Call,
    error::{ApiError, Result},
};

/// The permission that a call needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Right {
    /// Read logs, and manage the consumer groups that do.
    Read,
    /// Write logs.
    Write,
    /// Create, change and delete projects and Logstores.
    Admin,
    /// Look at projects and Logstores: any of the others includes it.
    Look,
}

impl Right {
    fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Admin => "admin",
            Self::Look => "any",
        }
    }
}

/// The caller, after its signature has been checked, with its permissions.
#[derive(Clone, Debug)]
pub(crate) enum Caller {
    /// The service has no access keys, and serves this machine alone.
    Local,
    Key(std::sync::Arc<keys::AccessKey>),
}

impl Caller {
    /// # Errors
    /// 401 if the caller's key does not have the right in the project.
    pub(crate) fn require(&self, right: Right, project: &str) -> Result<()> {
        if self.may(right, project) {
            return Ok(());
        }
        let message =
            format!("the access key has no permission ({}) in the project {project}", right.name());
        Err(ApiError::unauthorized("Unauthorized", message))
    }

    pub(crate) fn may(&self, right: Right, project: &str) -> bool {
        match self {
            Self::Local => true,
            Self::Key(key) => key.may(right, project),
        }
    }

    /// Whether the caller has the right in every project, those to come included.
    pub(crate) fn may_everywhere(&self, right: Right) -> bool {
        match self {
            Self::Local => true,
            Self::Key(key) => key.may_everywhere(right),
        }
    }

    /// The access key, if there are any.
    pub(crate) fn key(&self) -> Option<&AccessKey> {
        match self {
            Self::Local => None,
            Self::Key(key) => Some(key),
        }
    }

    /// # Errors
    /// 401 if the caller's key does not have the right in all projects, also in those to come.
    pub(crate) fn require_everywhere(&self, right: Right) -> Result<()> {
        match self {
            Self::Key(key) if !key.may_everywhere(right) => {
                let message = format!(
                    "this is about the whole store: it needs an access key with the permission \
                     ({}) in the projects [\"*\"]",
                    right.name()
                );
                Err(ApiError::unauthorized("Unauthorized", message))
            }
            _ => Ok(()),
        }
    }

    /// The id of the caller's key.
    pub(crate) fn id(&self) -> &str {
        match self {
            Self::Local => "none",
            Self::Key(key) => key.id(),
        }
    }

    /// Counts a call, without its bytes, against the limits of the caller's key.
    ///
    /// # Errors
    /// 403 if the key is over one of them.
    pub(crate) fn spend(&self, what: Use, now: Instant) -> Result<()> {
        match self {
            Self::Local => Ok(()),
            Self::Key(key) => key.limiter().spend(what, now),
        }
    }

    /// Counts the bytes of a call or of its answer, for which later calls wait.
    pub(crate) fn owe(&self, bytes: u64, now: Instant) {
        if let Self::Key(key) = self {
            key.limiter().owe(bytes, now);
        }
    }

    /// # Errors
    /// 401 if the caller may not let the service use this role.
    pub(crate) fn require_role(&self, arn: &str) -> Result<()> {
        match self {
            Self::Key(key) if !key.may_pass(arn) => {
                let message = format!("the access key may not pass the role {arn} (pass_roles)");
                Err(ApiError::unauthorized("Unauthorized", message))
            }
            _ => Ok(()),
        }
    }
}

/// Checks the signature of a call. Returns the caller, and the digest that the body must have.
///
/// # Errors
/// 400 or 401, with the code of the service for each reason.
pub(crate) fn authenticate(
    call: &Call,
    keys: Option<&AccessKeys>,
    now: SystemTime,
) -> Result<(Caller, BodyDigest)> {
    // Also without keys a request needs an Authorization header: a web page cannot send one to
    // another origin.
    let signed = Signed::of(call)?;
    let digest = signed.body_digest(call)?;
    let Some(keys) = keys else { return Ok((Caller::Local, digest)) };
    if call.header("x-acs-security-token").is_some() {
        let message = "this service knows no temporary access keys: leave out the security token";
        return Err(ApiError::unauthorized("Unauthorized", message));
    }
    let key = keys.find(&signed.key_id).ok_or_else(|| {
        ApiError::unauthorized("InvalidAccessKeyId", "the access key id does not exist")
    })?;
    signed.verify(call, key.secret())?;
    signed.check_time(now)?;
    Ok((Caller::Key(key), digest))
}
