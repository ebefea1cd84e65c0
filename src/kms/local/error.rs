//! Errors of the administration of an embedded KMS.

use std::{
    io,
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use super::key::{KEY_FILE_BYTES_MAX, LocalKeyState};
use crate::{
    io::{FileKind, WrongFileType},
    kms::KmsError,
};

/// Why the administration of a [`LocalKms`](super::LocalKms) failed. Nothing has changed then,
/// except as [`LocalKmsError::Io`] says.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LocalKmsError {
    /// There is no embedded KMS in that directory, or not any more.
    #[error("there is no embedded KMS in {}", dir.display())]
    Missing {
        /// The directory.
        dir: PathBuf,
    },
    /// There is no such key.
    #[error("there is no key {key_id}")]
    NotFound {
        /// The key that was asked for.
        key_id: String,
    },
    /// The state that the key is in does not allow it.
    #[error("cannot {operation} key {key_id}, which is {state}")]
    WrongState {
        /// The key.
        key_id: String,
        /// Its state.
        state: LocalKeyState,
        /// The operation.
        operation: &'static str,
    },
    /// The grant to withdraw does not exist.
    #[error("key {key_id} is not granted to {arn}")]
    NotGranted {
        /// The key.
        key_id: String,
        /// The role.
        arn: String,
    },
    /// An argument is outside its limits.
    #[error("{what} must be {limits}")]
    InvalidArgument {
        /// The argument.
        what: &'static str,
        /// The limits.
        limits: String,
    },
    /// The key has too many versions or grants: its file would exceed its largest size.
    #[error(
        "key {key_id} has too many versions or grants: its file may have {} bytes",
        KEY_FILE_BYTES_MAX
    )]
    TooLarge {
        /// The key.
        key_id: String,
    },
    /// A file is damaged.
    #[error("{} is damaged: {what}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// The fault.
        what: &'static str,
    },
    /// Other processes held the lock of the directory for ten seconds. One of them may hang.
    #[error("another process has the lock of the embedded KMS in {}", dir.display())]
    Busy {
        /// The directory.
        dir: PathBuf,
    },
    /// The file system failed. If that happened while changing a key, the change may or may not
    /// have been made.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl LocalKmsError {
    /// A short stable word for the variant, for programs: `key_missing`, `kms_damaged`, …
    pub fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "kms_missing",
            Self::NotFound { .. } => "key_missing",
            Self::WrongState { .. } => "key_state",
            Self::NotGranted { .. } => "not_granted",
            Self::InvalidArgument { .. } => "invalid_argument",
            Self::TooLarge { .. } => "key_too_large",
            Self::Damaged { .. } => "kms_damaged",
            Self::Busy { .. } => "kms_busy",
            Self::Io { .. } => "io",
        }
    }

    /// Whether the process, or the system, has nothing left to look at a file with.
    pub(super) fn is_exhaustion(&self) -> bool {
        let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOMEM].map(Errno::raw_os_error);
        matches!(self, Self::Io { source, .. } if source.raw_os_error().is_some_and(|code| exhausted.contains(&code)))
    }
}

/// The error of a call that could not read the directory, or its key.
impl From<LocalKmsError> for KmsError {
    fn from(error: LocalKmsError) -> Self {
        let detail = error.to_string();
        match error {
            LocalKmsError::Damaged { .. } => Self::Invalid { detail },
            _ => Self::Unreachable { detail },
        }
    }
}

pub(super) fn io_error(path: &Path) -> impl FnOnce(io::Error) -> LocalKmsError {
    move |source| match source.get_ref().and_then(|inner| inner.downcast_ref::<WrongFileType>()) {
        Some(wrong) => {
            let what = match wrong.expected {
                FileKind::Directory => "it is no directory",
                _ => "it is no regular file",
            };
            LocalKmsError::Damaged { file: wrong.path.clone(), what }
        }
        None => LocalKmsError::Io { path: path.to_owned(), source },
    }
}
