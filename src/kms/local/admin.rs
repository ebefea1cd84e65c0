//! Administration: creating keys, and changing their states, versions and grants.

use std::{io, ops::RangeInclusive};

use super::{
    LocalKms,
    error::{LocalKmsError, io_error},
    files::StoredKey,
    key::{LocalKeyInfo, LocalKeyState},
};

/// How many days ahead the deletion of a key can be scheduled.
pub const DELETION_DAYS: RangeInclusive<u32> = 1..=366;

/// The longest region or role name, in bytes.
pub(super) const NAME_BYTES_MAX: usize = 1024;

impl LocalKms {
    /// Creates a key in a region and grants it to the roles in `grants`. Returns its identifier.
    ///
    /// # Errors
    /// `InvalidArgument` for an empty or overlong name; `TooLarge`; `Missing`, `Damaged`, `Busy` or
    /// `Io`.
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

    /// All keys, in the order of their identifiers. Deleted keys are included.
    ///
    /// # Errors
    /// `Missing`, `Io`, or `Damaged`, which names the first damaged file.
    pub fn list(&self) -> Result<Vec<LocalKeyInfo>, LocalKmsError> {
        self.list_each()?.into_iter().collect()
    }

    /// As [`LocalKms::list`], with the error of each key that cannot be read in its place.
    ///
    /// # Errors
    /// `Missing` or `Io`, for the directory.
    pub fn list_each(&self) -> Result<Vec<Result<LocalKeyInfo, LocalKmsError>>, LocalKmsError> {
        let today = self.today();
        let info = |key_id: &String| Ok(self.load(key_id)?.info(today));
        Ok(self.key_ids()?.iter().map(info).collect())
    }

    /// Disables a key. The KMS refuses all use of it until it is enabled again. Disabling a
    /// disabled key changes nothing.
    ///
    /// # Errors
    /// `WrongState` for a key that is deleted or pending deletion; `NotFound`, `Missing`,
    /// `Damaged`, `Busy` or `Io`.
    pub fn disable(&self, key_id: &str) -> Result<(), LocalKmsError> {
        self.change(key_id, "disable", is_live, |key| {
            key.disabled = true;
            Ok(())
        })
    }

    /// Enables a key again. Enabling an enabled key changes nothing.
    ///
    /// # Errors
    /// `WrongState` for a key that is deleted or pending deletion; `NotFound`, `Missing`,
    /// `Damaged`, `Busy` or `Io`.
    pub fn enable(&self, key_id: &str) -> Result<(), LocalKmsError> {
        self.change(key_id, "enable", is_live, |key| {
            key.disabled = false;
            Ok(())
        })
    }

    /// Adds a version to an enabled key. The new version wraps from now on. Older versions still
    /// unwrap.
    ///
    /// # Errors
    /// `WrongState` for a key that is not enabled; `TooLarge`, `NotFound`, `Missing`, `Damaged`,
    /// `Busy` or `Io`.
    pub fn rotate(&self, key_id: &str) -> Result<(), LocalKmsError> {
        self.change(
            key_id,
            "rotate",
            |state| state == LocalKeyState::Enabled,
            |key| {
                key.material.push(self.new_material()?);
                Ok(())
            },
        )
    }

    /// Schedules the deletion of a key, `days` days from today (UTC). The KMS refuses all use of it
    /// at once.
    ///
    /// # Errors
    /// `InvalidArgument` when `days` is not within [`DELETION_DAYS`]; `WrongState` for a key that
    /// is deleted or pending deletion already; `NotFound`, `Missing`, `Damaged`, `Busy` or `Io`.
    pub fn schedule_deletion(&self, key_id: &str, days: u32) -> Result<(), LocalKmsError> {
        if !DELETION_DAYS.contains(&days) {
            let limits = format!("{} to {}", DELETION_DAYS.start(), DELETION_DAYS.end());
            return Err(LocalKmsError::InvalidArgument {
                what: "the number of days until deletion",
                limits,
            });
        }
        self.change(key_id, "schedule the deletion of", is_live, |key| {
            key.deletion_day = Some(self.today().saturating_add(days));
            Ok(())
        })
    }

    /// Cancels the scheduled deletion of a key. The key is then enabled or disabled as before.
    ///
    /// # Errors
    /// `WrongState` for a key that is not pending deletion; `NotFound`, `Missing`, `Damaged`,
    /// `Busy` or `Io`.
    pub fn cancel_deletion(&self, key_id: &str) -> Result<(), LocalKmsError> {
        self.change(
            key_id,
            "cancel the deletion of",
            |state| matches!(state, LocalKeyState::PendingDeletion { .. }),
            |key| {
                key.deletion_day = None;
                Ok(())
            },
        )
    }

    /// Deletes a key now. Its material is destroyed, so every key wrapped under it is lost. The key
    /// stays listed.
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
    /// `InvalidArgument` for an empty or overlong name; `WrongState` for a key that is deleted;
    /// `TooLarge`, `NotFound`, `Missing`, `Damaged`, `Busy` or `Io`.
    pub fn grant(&self, key_id: &str, arn: &str) -> Result<(), LocalKmsError> {
        check_name("a role", arn)?;
        self.change(key_id, "grant the use of", is_not_deleted, |key| {
            key.grants.insert(arn.to_owned());
            Ok(())
        })
    }

    /// Withdraws a grant. The KMS then refuses all use of the key by that role.
    ///
    /// # Errors
    /// `NotGranted` when there is no such grant; `WrongState` for a key that is deleted;
    /// `NotFound`, `Missing`, `Damaged`, `Busy` or `Io`.
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
        allowed: impl FnOnce(LocalKeyState) -> bool,
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
fn is_live(state: LocalKeyState) -> bool {
    matches!(state, LocalKeyState::Enabled | LocalKeyState::Disabled)
}

fn is_not_deleted(state: LocalKeyState) -> bool {
    state != LocalKeyState::Deleted
}

fn check_name(what: &'static str, name: &str) -> Result<(), LocalKmsError> {
    if (1..=NAME_BYTES_MAX).contains(&name.len()) {
        return Ok(());
    }
    Err(LocalKmsError::InvalidArgument { what, limits: format!("1 to {NAME_BYTES_MAX} bytes") })
}
