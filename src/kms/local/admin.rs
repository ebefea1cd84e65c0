//! Administration: making keys, changing their states, versions and grants.

use std::{
    fmt, io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
};

use rustix::io::Errno;

use super::{
    LocalKms,
    files::{KEY_FILE_BYTES_MAX, StoredKey},
};
use crate::io::{FileKind, WrongFileType};

/// How many days ahead the deletion of a key can be scheduled.
pub const DELETION_DAYS: RangeInclusive<u32> = 1..=366;

/// The longest region or role name, in bytes.
pub(super) const NAME_BYTES_MAX: usize = 1024;

/// What there is to know about a key of a [`LocalKms`], but for its material.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyInfo {
    /// Its identifier: `key-` and 16 hexadecimal digits.
    pub key_id: String,
    /// The region that it belongs to.
    pub region_id: String,
    /// Whether it can be used.
    pub state: KeyState,
    /// How many versions there are: 1, and one more for each rotation. None once the material is destroyed.
    pub versions: u32,
    /// The roles that may use it, in order.
    pub grants: Vec<String>,
    /// When it was created, in microseconds since the Unix epoch.
    pub created_us: u64,
    /// The day on which it will be, or was, deleted: days since 1970-01-01, UTC.
    pub deletion_day: Option<u32>,
}

/// Whether a key of a [`LocalKms`] can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyState {
    /// It can.
    Enabled,
    /// Not until it is enabled again.
    Disabled,
    /// Not unless its deletion is cancelled in time.
    PendingDeletion {
        /// The day on which it will be deleted: days since 1970-01-01, UTC.
        day: u32,
    },
    /// Never again.
    Deleted,
}

impl fmt::Display for KeyState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Enabled => "enabled",
            Self::Disabled => "disabled",
            Self::PendingDeletion { .. } => "pending deletion",
            Self::Deleted => "deleted",
        })
    }
}

/// Why the administration of a [`LocalKms`] failed. Nothing has changed then, except as [`LocalKmsError::Io`] says.
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
        state: KeyState,
        /// What was to be done.
        operation: &'static str,
    },
    /// A grant that is to be withdrawn does not exist.
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
        /// Which argument.
        what: &'static str,
        /// What is allowed.
        limits: String,
    },
    /// The key has reached the largest size that its file may have: too many versions or grants.
    #[error("key {key_id} has too many versions or grants: its file may have {} bytes", KEY_FILE_BYTES_MAX)]
    TooLarge {
        /// The key.
        key_id: String,
    },
    /// A file is not what was written.
    #[error("{} is damaged: {what}", file.display())]
    Damaged {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Others kept changing the directory for ten seconds, or one of them hangs.
    #[error("another process has the lock of the embedded KMS in {}", dir.display())]
    Busy {
        /// The directory.
        dir: PathBuf,
    },
    /// The file system failed. If that happened while changing a key, the change may or may not have been made.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl LocalKmsError {
    /// Whether the process, or the system, has nothing left to look at a file with.
    pub(super) fn is_exhaustion(&self) -> bool {
        let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOMEM].map(Errno::raw_os_error);
        matches!(self, Self::Io { source, .. } if source.raw_os_error().is_some_and(|code| exhausted.contains(&code)))
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

impl LocalKms {
    /// Creates a key in a region, which the roles in `grants` may use, and returns its identifier.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty or overlong name; `TooLarge`; `Missing`, `Damaged`, `Busy` or `Io`.
    pub fn create_key(&self, region_id: &str, grants: &[&str]) -> Result<String, LocalKmsError> {
        check_name("a region", region_id)?;
        grants.iter().try_for_each(|arn| check_name("a role", arn))?;
        let _lock = self.lock_and_sweep()?;
        let mut id = [0; 8];
        self.random.fill(&mut id).map_err(io_error(&self.dir))?;
        let key = StoredKey {
            key_id: format!("key-{:016x}", u64::from_be_bytes(id)),
            region_id: region_id.to_owned(),
            created_us: self.clock.wall_us(),
            disabled: false,
            deletion_day: None,
            grants: grants.iter().map(|&arn| arn.to_owned()).collect(),
            material: vec![self.new_material()?],
        };
        let path = self.key_path(&key.key_id);
        if self.disk()?.stat(&path).map_err(io_error(&path))?.is_some() {
            return Err(io_error(&path)(io::ErrorKind::AlreadyExists.into()));
        }
        self.save(&key)?;
        Ok(key.key_id)
    }

    /// All keys, deleted ones included, in the order of their identifiers.
    ///
    /// # Errors
    /// `Missing`, `Io`, or `Damaged`, which names the first damaged file.
    pub fn list(&self) -> Result<Vec<KeyInfo>, LocalKmsError> {
        let today = self.today();
        self.key_ids()?.iter().map(|key_id| Ok(self.load(key_id)?.info(today))).collect()
    }

    /// Disables a key: all use of it is refused until it is enabled again. Disabling a disabled key changes nothing.
    ///
    /// # Errors
    /// `WrongState` for a key that is deleted or pending deletion; `NotFound`, `Missing`, `Damaged`, `Busy` or `Io`.
    pub fn disable(&self, key_id: &str) -> Result<(), LocalKmsError> {
        self.change(key_id, "disable", is_live, |key| {
            key.disabled = true;
            Ok(())
        })
    }

    /// Enables a key again. Enabling an enabled key changes nothing.
    ///
    /// # Errors
    /// `WrongState` for a key that is deleted or pending deletion; `NotFound`, `Missing`, `Damaged`, `Busy` or `Io`.
    pub fn enable(&self, key_id: &str) -> Result<(), LocalKmsError> {
        self.change(key_id, "enable", is_live, |key| {
            key.disabled = false;
            Ok(())
        })
    }

    /// Adds a version to an enabled key: what is wrapped from now on is wrapped under it; older versions still unwrap.
    ///
    /// # Errors
    /// `WrongState` for a key that is not enabled; `TooLarge`, `NotFound`, `Missing`, `Damaged`, `Busy` or `Io`.
    pub fn rotate(&self, key_id: &str) -> Result<(), LocalKmsError> {
        self.change(
            key_id,
            "rotate",
            |state| state == KeyState::Enabled,
            |key| {
                key.material.push(self.new_material()?);
                Ok(())
            },
        )
    }

    /// Schedules the deletion of a key, `days` days from today (UTC). Until then all use of it is refused.
    ///
    /// # Errors
    /// `InvalidArgument` when `days` is not within [`DELETION_DAYS`]; `WrongState` for a key that is deleted or pending deletion
    /// already; `NotFound`, `Missing`, `Damaged`, `Busy` or `Io`.
    pub fn schedule_deletion(&self, key_id: &str, days: u32) -> Result<(), LocalKmsError> {
        if !DELETION_DAYS.contains(&days) {
            let limits = format!("{} to {}", DELETION_DAYS.start(), DELETION_DAYS.end());
            return Err(LocalKmsError::InvalidArgument { what: "the number of days until deletion", limits });
        }
        self.change(key_id, "schedule the deletion of", is_live, |key| {
            key.deletion_day = Some(self.today().saturating_add(days));
            Ok(())
        })
    }

    /// Cancels the scheduled deletion of a key, which is then enabled or disabled as it was before.
    ///
    /// # Errors
    /// `WrongState` for a key that is not pending deletion; `NotFound`, `Missing`, `Damaged`, `Busy` or `Io`.
    pub fn cancel_deletion(&self, key_id: &str) -> Result<(), LocalKmsError> {
        self.change(
            key_id,
            "cancel the deletion of",
            |state| matches!(state, KeyState::PendingDeletion { .. }),
            |key| {
                key.deletion_day = None;
                Ok(())
            },
        )
    }

    /// Deletes a key now: its material is destroyed and all that was wrapped under it is lost. The key itself stays listed.
    ///
    /// # Errors
    /// `WrongState` for a key that is deleted; `NotFound`, `Missing`, `Damaged`, `Busy` or `Io`.
    pub fn delete(&self, key_id: &str) -> Result<(), LocalKmsError> {
        self.change(key_id, "delete", is_not_deleted, |key| {
            key.deletion_day = Some(self.today());
            key.material.clear();
            Ok(())
        })
    }

    /// Allows a role to use a key. Granting it twice changes nothing.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty or overlong name; `WrongState` for a key that is deleted; `TooLarge`, `NotFound`, `Missing`,
    /// `Damaged`, `Busy` or `Io`.
    pub fn grant(&self, key_id: &str, arn: &str) -> Result<(), LocalKmsError> {
        check_name("a role", arn)?;
        self.change(key_id, "grant the use of", is_not_deleted, |key| {
            key.grants.insert(arn.to_owned());
            Ok(())
        })
    }

    /// Withdraws a grant: all use of the key by that role is refused.
    ///
    /// # Errors
    /// `NotGranted` when there is no such grant; `WrongState` for a key that is deleted; `NotFound`, `Missing`, `Damaged`, `Busy` or
    /// `Io`.
    pub fn ungrant(&self, key_id: &str, arn: &str) -> Result<(), LocalKmsError> {
        self.change(key_id, "withdraw a grant of", is_not_deleted, |key| {
            if key.grants.remove(arn) {
                return Ok(());
            }
            Err(LocalKmsError::NotGranted { key_id: key_id.to_owned(), arn: arn.to_owned() })
        })
    }

    fn change(
        &self,
        key_id: &str,
        operation: &'static str,
        allowed: impl FnOnce(KeyState) -> bool,
        change: impl FnOnce(&mut StoredKey) -> Result<(), LocalKmsError>,
    ) -> Result<(), LocalKmsError> {
        let _lock = self.lock_and_sweep()?;
        let mut key = self.load(key_id)?;
        let state = key.state(self.today());
        if !allowed(state) {
            return Err(LocalKmsError::WrongState { key_id: key_id.to_owned(), state, operation });
        }
        change(&mut key)?;
        self.save(&key)
    }
}

/// Whether a key can be enabled, disabled and scheduled for deletion.
fn is_live(state: KeyState) -> bool {
    matches!(state, KeyState::Enabled | KeyState::Disabled)
}

fn is_not_deleted(state: KeyState) -> bool {
    state != KeyState::Deleted
}

fn check_name(what: &'static str, name: &str) -> Result<(), LocalKmsError> {
    if (1..=NAME_BYTES_MAX).contains(&name.len()) {
        return Ok(());
    }
    Err(LocalKmsError::InvalidArgument { what, limits: format!("1 to {NAME_BYTES_MAX} bytes") })
}
