//! A directory that plays the customer's KMS.
//!
//! ```text
//! kms.json               what the directory is, and its format version; made last
//! lock                   the advisory lock of those who change something
//! keys/key-….json        one file per key (mode 0600): {"crc32":"8 hex digits","key":{…}}, the CRC being that of the inner object
//! ```
//!
//! A key's file is replaced atomically and durably, so calls read without a lock. A deleted key keeps its file, without material.
//!
//! A wrapped key is, all little-endian:
//!
//! ```text
//! 0    4  magic "ELKW"
//! 4    2  version = 1
//! 6    2  length of the key id, n
//! 8    n  key id
//! 8+n  4  key version, from 1
//! then    salt 32, sealed key 32, tag 16
//! ```
//!
//! Sealed with AES-256-GCM under HKDF-SHA-256(salt, material of that key version, "envelog local kms wrap" || the bytes before the
//! salt), used this once and so with a nonce of zeros. Associated data: the bytes before the salt, then the context as a count u32
//! and for each name and value, in the order of the names, length u32 and bytes.

use std::{
    collections::BTreeSet,
    fmt, io,
    ops::RangeInclusive,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use aes_gcm::{Aes256Gcm, Nonce, Tag, aead::AeadInOut, aead::KeyInit};
use hkdf::Hkdf;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::Sha256;
use zeroize::{Zeroize, Zeroizing};

use super::{Cmk, EncryptionContext, Kms, KmsCall, KmsError, RevokedReason};
use crate::{
    crypto::SecretKey,
    io::{Clock, Disk, DiskFile, OpenMode, OsRandom, Random, RealDisk, SystemClock, read_file, replace_file},
};

/// How many days ahead the deletion of a key can be scheduled.
pub const DELETION_DAYS: RangeInclusive<u32> = 1..=366;

/// The largest key file, in bytes: some thousand key versions and grants.
const KEY_FILE_BYTES_MAX: usize = 256 * 1024;
/// The longest region or role name, in bytes.
const NAME_BYTES_MAX: usize = 1024;
/// How often, and how far apart, the lock is tried: 10 seconds in all.
const LOCK_TRIES: u32 = 2000;
const LOCK_PAUSE: Duration = Duration::from_millis(5);

const DAY_US: u64 = 24 * 60 * 60 * 1_000_000;

/// All of `kms.json`.
const MARKER: &[u8] = b"{\"format\":\"envelog local kms\",\"version\":1}\n";

const BLOB_MAGIC: &[u8; 4] = b"ELKW";
const BLOB_VERSION: u16 = 1;
const WRAP_LABEL: &[u8] = b"envelog local kms wrap";
/// A key that wraps one key only needs no nonce.
const NONCE: [u8; 12] = [0; 12];

/// The embedded KMS: a directory that plays the customer's KMS, with keys, key versions, states and grants of its own.
///
/// It is a stand-in for development, for tests, and for use on a single machine: **whoever can read the directory has the
/// keys**, and a backup of it brings deleted keys back. Deleting a key removes its material from the directory; what the file system
/// keeps in freed blocks and snapshots is out of reach. To put a data key out of the reach of whoever runs the machine, use a
/// real KMS.
///
/// Several processes can use one directory at once. Each call reads the state afresh, so what one process changes counts for every
/// other at its next call. Changes happen one at a time, under an advisory lock, and are durable when the method returns.
///
/// As a [`Kms`] it answers:
///
/// - [`KmsError::Revoked`], in this order: `Deleted` when the region has no such key (a key of another region included) or
///   the key is deleted; `NotPermitted` when the role has no grant; `PendingDeletion`; `Disabled`.
/// - [`KmsError::Unreachable`] when the directory is absent or cannot be read.
/// - [`KmsError::Invalid`] when a file in it is damaged, or the wrapped key is damaged, or was made under another key or for another
///   context.
///
/// Calls read two small local files and wait for no lock; against a file system that hangs, the timeout of a call has no power.
///
/// The deletion of a key that was scheduled happens by the clock: once the day has come, the key counts as deleted, and the next
/// change of anything in the directory destroys its material.
#[derive(Clone, Debug)]
pub struct LocalKms {
    dir: PathBuf,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
}

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

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> LocalKmsError {
    move |source| LocalKmsError::Io { path: path.to_owned(), source }
}

impl LocalKms {
    /// The embedded KMS in `dir`, without looking: whether it is there, and well, shows at each call.
    ///
    /// This is what to hand to a store, which opens whether its KMS is there or not.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), clock: Arc::new(SystemClock), random: Arc::new(OsRandom) }
    }

    /// Opens the embedded KMS in `dir`.
    ///
    /// # Errors
    /// [`LocalKmsError::Missing`] when there is none, `Damaged` or `Io` when it cannot be used.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, LocalKmsError> {
        let kms = Self::at(dir);
        kms.check()?;
        Ok(kms)
    }

    /// Opens the embedded KMS in `dir`, or creates an empty one. Its parent directory must exist.
    ///
    /// # Errors
    /// `Damaged`, `Busy` or `Io`; also [`LocalKmsError::Missing`] when part of an existing one has been lost.
    pub fn create_or_open(dir: impl Into<PathBuf>) -> Result<Self, LocalKmsError> {
        let kms = Self::at(dir);
        let exists_is_fine = |result: io::Result<()>| match result {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        };
        if RealDisk.stat(&kms.marker_path()).map_err(io_error(&kms.dir))?.is_none() {
            exists_is_fine(RealDisk.create_dir(&kms.dir)).map_err(io_error(&kms.dir))?;
            let parent = kms.dir.parent().unwrap_or(Path::new("."));
            RealDisk.sync_dir(parent).map_err(io_error(parent))?;
            let lock = kms.lock_path();
            exists_is_fine(RealDisk.open(&lock, OpenMode::CreateNewPrivate).map(drop)).map_err(io_error(&lock))?;
            let _lock = kms.lock()?;
            let marker = kms.marker_path();
            if RealDisk.stat(&marker).map_err(io_error(&marker))?.is_none() {
                let keys = kms.keys_dir();
                exists_is_fine(RealDisk.create_dir(&keys)).map_err(io_error(&keys))?;
                replace_file(&RealDisk, &marker, MARKER, OpenMode::CreateNewPrivate).map_err(io_error(&marker))?;
            }
        }
        kms.check()?;
        Ok(kms)
    }

    /// The same KMS with another clock, by which keys are created and deleted.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// The same KMS with another source of randomness. Key material and salts come from it: whoever can predict it, or makes it
    /// repeat, has every key.
    #[must_use]
    pub fn insecure_random_for_tests(mut self, random: Arc<dyn Random>) -> Self {
        self.random = random;
        self
    }

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
        if RealDisk.stat(&path).map_err(io_error(&path))?.is_some() {
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

    fn marker_path(&self) -> PathBuf {
        self.dir.join("kms.json")
    }

    fn lock_path(&self) -> PathBuf {
        self.dir.join("lock")
    }

    fn keys_dir(&self) -> PathBuf {
        self.dir.join("keys")
    }

    fn key_path(&self, key_id: &str) -> PathBuf {
        self.keys_dir().join(format!("{key_id}.json"))
    }

    fn today(&self) -> u32 {
        u32::try_from(self.clock.wall_us() / DAY_US).unwrap_or(u32::MAX)
    }

    fn new_material(&self) -> Result<Material, LocalKmsError> {
        SecretKey::generate(&*self.random).map(Material).map_err(io_error(&self.dir))
    }

    /// Checks that the directory is an embedded KMS, so that a key that is not found is known not to exist.
    fn check(&self) -> Result<(), LocalKmsError> {
        let marker = self.marker_path();
        let damaged = |what| LocalKmsError::Damaged { file: marker.clone(), what };
        match read_file(&RealDisk, &marker, MARKER.len() as u64) {
            Ok(bytes) if bytes == MARKER => {}
            Ok(_) => return Err(damaged("it does not name this format")),
            Err(error) => {
                return Err(match error.kind() {
                    io::ErrorKind::NotFound => LocalKmsError::Missing { dir: self.dir.clone() },
                    io::ErrorKind::FileTooLarge => damaged("it is too long"),
                    _ => io_error(&marker)(error),
                });
            }
        }
        let keys = self.keys_dir();
        match RealDisk.stat(&keys).map_err(io_error(&keys))? {
            Some(_) => Ok(()),
            None => Err(LocalKmsError::Missing { dir: keys }),
        }
    }

    /// Takes the lock of those who change something; it lasts as long as what is returned.
    #[expect(
        clippy::disallowed_methods,
        reason = "no condition can signal that another process has let go of a file's lock"
    )]
    fn lock(&self) -> Result<Arc<dyn DiskFile>, LocalKmsError> {
        let path = self.lock_path();
        let file = RealDisk.open(&path, OpenMode::ReadWrite).map_err(io_error(&path))?;
        for _ in 0..LOCK_TRIES {
            if file.try_lock().map_err(io_error(&path))? {
                return Ok(file);
            }
            thread::sleep(LOCK_PAUSE);
        }
        Err(LocalKmsError::Busy { dir: self.dir.clone() })
    }

    /// Takes the lock, and destroys the material of the keys whose day has come.
    fn lock_and_sweep(&self) -> Result<Arc<dyn DiskFile>, LocalKmsError> {
        self.check()?;
        let lock = self.lock()?;
        let today = self.today();
        for key_id in self.key_ids()? {
            let mut key = match self.load(&key_id) {
                // One damaged key must not keep the others from being administered.
                Err(LocalKmsError::Damaged { .. }) => continue,
                loaded => loaded?,
            };
            if key.state(today) == KeyState::Deleted && !key.material.is_empty() {
                key.material.clear();
                self.save(&key)?;
            }
        }
        Ok(lock)
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

    /// The identifiers of all keys, in order.
    fn key_ids(&self) -> Result<Vec<String>, LocalKmsError> {
        self.check()?;
        let keys = self.keys_dir();
        let entries = RealDisk.list_dir(&keys).map_err(io_error(&keys))?;
        let mut ids: Vec<String> = entries
            .iter()
            .filter_map(|entry| entry.name.strip_suffix(".json").filter(|id| is_key_id(id)).map(str::to_owned))
            .collect();
        ids.sort_unstable();
        Ok(ids)
    }

    fn load(&self, key_id: &str) -> Result<StoredKey, LocalKmsError> {
        let not_found = || LocalKmsError::NotFound { key_id: key_id.to_owned() };
        if !is_key_id(key_id) {
            self.check()?;
            return Err(not_found());
        }
        let path = self.key_path(key_id);
        let read = read_file(&RealDisk, &path, KEY_FILE_BYTES_MAX as u64).map(Zeroizing::new);
        // Only after the attempt: a directory that vanishes in between must not look like a key that is gone.
        self.check()?;
        let damaged = |what| LocalKmsError::Damaged { file: path.clone(), what };
        let bytes = read.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => not_found(),
            io::ErrorKind::FileTooLarge => damaged("it is too long"),
            _ => io_error(&path)(error),
        })?;
        let key = StoredKey::decode(&bytes).map_err(damaged)?;
        if key.key_id != key_id {
            return Err(damaged("it holds another key"));
        }
        Ok(key)
    }

    fn save(&self, key: &StoredKey) -> Result<(), LocalKmsError> {
        let path = self.key_path(&key.key_id);
        let bytes = key.encode().ok_or_else(|| LocalKmsError::TooLarge { key_id: key.key_id.clone() })?;
        replace_file(&RealDisk, &path, &bytes, OpenMode::CreateNewPrivate).map_err(io_error(&path))
    }

    /// The key of a call, if it may be used.
    fn usable(&self, cmk: &Cmk) -> Result<StoredKey, KmsError> {
        let revoked = |reason, detail| Err(KmsError::Revoked { reason, detail });
        let Cmk { cmk_key_id, arn, region_id } = cmk;
        let key = match self.load(cmk_key_id) {
            Ok(key) if key.region_id == *region_id => key,
            Ok(_) | Err(LocalKmsError::NotFound { .. }) => {
                return revoked(RevokedReason::Deleted, format!("no key {cmk_key_id} in region {region_id}"));
            }
            Err(error @ LocalKmsError::Damaged { .. }) => return Err(KmsError::Invalid { detail: error.to_string() }),
            Err(error) => return Err(KmsError::Unreachable { detail: error.to_string() }),
        };
        let state = key.state(self.today());
        let reason = match state {
            KeyState::Deleted => RevokedReason::Deleted,
            _ if !key.grants.contains(arn) => {
                return revoked(RevokedReason::NotPermitted, format!("key {cmk_key_id} is not granted to {arn}"));
            }
            KeyState::PendingDeletion { .. } => RevokedReason::PendingDeletion,
            KeyState::Disabled => RevokedReason::Disabled,
            KeyState::Enabled => return Ok(key),
        };
        revoked(reason, format!("key {cmk_key_id} in region {region_id}"))
    }
}

impl Kms for LocalKms {
    fn name(&self) -> &str {
        "local"
    }

    /// Whether the region has a key, be it a deleted one. While the keys cannot be read the answer is yes, so that the call itself
    /// says what is wrong; where there is no embedded KMS at all it is no.
    fn serves(&self, region_id: &str) -> bool {
        match self.list() {
            Ok(keys) => keys.iter().any(|key| key.region_id == region_id),
            Err(LocalKmsError::Missing { .. }) => false,
            Err(_) => true,
        }
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        let cmk = self.usable(call.cmk)?;
        let version = cmk.versions();
        let Some(material) = cmk.version(version) else {
            return Err(invalid("the key has no version"));
        };
        let mut salt = [0; 32];
        self.random
            .fill(&mut salt)
            .map_err(|error| KmsError::Unreachable { detail: format!("no randomness: {error}") })?;
        let mut blob = blob_head(&cmk.key_id, version);
        let mut sealed = Zeroizing::new(*key.expose());
        let tag = wrap_cipher(material, &salt, &blob)
            .encrypt_inout_detached(
                &Nonce::from(NONCE),
                &associated_data(&blob, call.context),
                sealed.as_mut_slice().into(),
            )
            .map_err(|_| invalid("the key could not be sealed"))?;
        blob.extend_from_slice(&salt);
        blob.extend_from_slice(&*sealed);
        blob.extend_from_slice(&tag);
        Ok(blob)
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        let cmk = self.usable(call.cmk)?;
        let blob = Blob::parse(wrapped).map_err(invalid)?;
        if blob.key_id != cmk.key_id.as_bytes() {
            return Err(invalid("the wrapped key was made under another key"));
        }
        let material = cmk
            .version(blob.version)
            .ok_or_else(|| invalid("the wrapped key names a key version that does not exist"))?;
        let mut key = Zeroizing::new(*blob.sealed);
        wrap_cipher(material, blob.salt, blob.head)
            .decrypt_inout_detached(
                &Nonce::from(NONCE),
                &associated_data(blob.head, call.context),
                key.as_mut_slice().into(),
                &Tag::from(*blob.tag),
            )
            .map_err(|_| invalid("the wrapped key is damaged or was made for another context"))?;
        Ok(SecretKey::from_bytes(&mut key))
    }
}

fn invalid(detail: &str) -> KmsError {
    KmsError::Invalid { detail: detail.to_owned() }
}

/// Whether a key can be enabled, disabled and scheduled for deletion.
fn is_live(state: KeyState) -> bool {
    matches!(state, KeyState::Enabled | KeyState::Disabled)
}

fn is_not_deleted(state: KeyState) -> bool {
    state != KeyState::Deleted
}

/// Whether it is an identifier as this KMS makes them, and so safe as part of a file name.
fn is_key_id(id: &str) -> bool {
    id.strip_prefix("key-")
        .is_some_and(|hex| hex.len() == 16 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
}

fn check_name(what: &'static str, name: &str) -> Result<(), LocalKmsError> {
    if (1..=NAME_BYTES_MAX).contains(&name.len()) {
        return Ok(());
    }
    Err(LocalKmsError::InvalidArgument { what, limits: format!("1 to {NAME_BYTES_MAX} bytes") })
}

/// A key as its file holds it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredKey {
    key_id: String,
    region_id: String,
    created_us: u64,
    disabled: bool,
    deletion_day: Option<u32>,
    grants: BTreeSet<String>,
    /// The versions, from 1. Empty once destroyed.
    material: Vec<Material>,
}

impl StoredKey {
    fn state(&self, today: u32) -> KeyState {
        match self.deletion_day {
            _ if self.material.is_empty() => KeyState::Deleted,
            Some(day) if day <= today => KeyState::Deleted,
            Some(day) => KeyState::PendingDeletion { day },
            None if self.disabled => KeyState::Disabled,
            None => KeyState::Enabled,
        }
    }

    fn info(self, today: u32) -> KeyInfo {
        KeyInfo {
            state: self.state(today),
            versions: self.versions(),
            key_id: self.key_id,
            region_id: self.region_id,
            grants: self.grants.into_iter().collect(),
            created_us: self.created_us,
            deletion_day: self.deletion_day,
        }
    }

    /// The number of versions, which is the number of the newest one.
    fn versions(&self) -> u32 {
        u32::try_from(self.material.len()).expect("the file size limits the number of versions")
    }

    fn version(&self, version: u32) -> Option<&SecretKey> {
        let index = usize::try_from(version.checked_sub(1)?).ok()?;
        self.material.get(index).map(|material| &material.0)
    }

    /// The bytes of its file; `None` if they would be too many. Written into one buffer of the greatest size, because one
    /// that grows would leave copies of the material behind.
    fn encode(&self) -> Option<Zeroizing<Vec<u8>>> {
        let mut file = Zeroizing::new(vec![0; KEY_FILE_BYTES_MAX]);
        let (head, body) = file.split_at_mut(file_head(0).len());
        let room = body.len();
        let mut rest = &mut *body;
        serde_json::to_writer(&mut rest, self).ok()?;
        let len = room - rest.len();
        rest.get_mut(..FILE_END.len())?.copy_from_slice(FILE_END);
        head.copy_from_slice(file_head(crc32fast::hash(&body[..len])).as_bytes());
        let total = head.len() + len + FILE_END.len();
        file.truncate(total);
        Some(file)
    }

    fn decode(file: &[u8]) -> Result<Self, &'static str> {
        let (head, rest) = file.split_at_checked(file_head(0).len()).ok_or("it is cut short")?;
        let body = rest.strip_suffix(FILE_END).ok_or("it is cut short")?;
        if head != file_head(crc32fast::hash(body)).as_bytes() {
            return Err("its checksum does not match");
        }
        // What serde_json has to say might quote the file, and so the material.
        serde_json::from_slice(body).map_err(|_| "it does not describe a key")
    }
}

fn file_head(crc: u32) -> String {
    format!("{{\"crc32\":\"{crc:08x}\",\"key\":")
}

const FILE_END: &[u8] = b"}\n";

/// The material of one key version; in the file 64 hexadecimal digits. Neither way leaves a copy behind.
#[derive(Debug)]
struct Material(SecretKey);

impl Serialize for Material {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut hex = Zeroizing::new([0; 64]);
        for (pair, byte) in hex.chunks_exact_mut(2).zip(self.0.expose()) {
            pair.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
        }
        serializer.serialize_str(std::str::from_utf8(&*hex).expect("the digits are ASCII"))
    }
}

impl<'de> Deserialize<'de> for Material {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Material;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("64 hexadecimal digits")
            }

            // Borrowed only: a string with escapes would be copied on its way here.
            fn visit_borrowed_str<E: de::Error>(self, hex: &'de str) -> Result<Material, E> {
                let wrong = || E::custom("not 64 hexadecimal digits");
                let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
                if hex.len() != 64 {
                    return Err(wrong());
                }
                let mut bytes = Zeroizing::new([0; 32]);
                for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
                    let &[high, low] = pair else { return Err(wrong()) };
                    *byte = digit(high).zip(digit(low)).map(|(high, low)| high << 4 | low).ok_or_else(wrong)?;
                }
                Ok(Material(SecretKey::from_bytes(&mut bytes)))
            }
        }

        deserializer.deserialize_str(Visitor)
    }
}

/// The part of a wrapped key that is not random: what comes before the salt.
fn blob_head(key_id: &str, version: u32) -> Vec<u8> {
    let id_len = u16::try_from(key_id.len()).expect("identifiers of this KMS have 20 bytes");
    let mut head = Vec::with_capacity(BLOB_MAGIC.len() + 2 + 2 + key_id.len() + 4 + 32 + 32 + 16);
    head.extend_from_slice(BLOB_MAGIC);
    head.extend_from_slice(&BLOB_VERSION.to_le_bytes());
    head.extend_from_slice(&id_len.to_le_bytes());
    head.extend_from_slice(key_id.as_bytes());
    head.extend_from_slice(&version.to_le_bytes());
    head
}

/// A wrapped key, taken apart.
struct Blob<'a> {
    head: &'a [u8],
    key_id: &'a [u8],
    version: u32,
    salt: &'a [u8; 32],
    sealed: &'a [u8; 32],
    tag: &'a [u8; 16],
}

impl<'a> Blob<'a> {
    fn parse(wrapped: &'a [u8]) -> Result<Self, &'static str> {
        const NOT_OURS: &str = "it is not a key that the embedded KMS has wrapped, or it is damaged";
        let rest = wrapped.strip_prefix(BLOB_MAGIC).ok_or(NOT_OURS)?;
        let (format, rest) = rest.split_first_chunk().ok_or(NOT_OURS)?;
        if u16::from_le_bytes(*format) != BLOB_VERSION {
            return Err("the wrapped key is damaged or of a newer format");
        }
        let (id_len, rest) = rest.split_first_chunk().ok_or(NOT_OURS)?;
        let (key_id, rest) = rest.split_at_checked(u16::from_le_bytes(*id_len).into()).ok_or(NOT_OURS)?;
        let (version, rest) = rest.split_first_chunk().ok_or(NOT_OURS)?;
        let head = wrapped.strip_suffix(rest).ok_or(NOT_OURS)?;
        let (salt, rest) = rest.split_first_chunk().ok_or(NOT_OURS)?;
        let (sealed, rest) = rest.split_first_chunk().ok_or(NOT_OURS)?;
        let tag = rest.try_into().map_err(|_| NOT_OURS)?;
        Ok(Self { head, key_id, version: u32::from_le_bytes(*version), salt, sealed, tag })
    }
}

/// The cipher that wraps one key and no other.
fn wrap_cipher(material: &SecretKey, salt: &[u8; 32], head: &[u8]) -> Aes256Gcm {
    let (mut prk, hkdf) = Hkdf::<Sha256>::extract(Some(salt), material.expose());
    prk.as_mut_slice().zeroize();
    let mut key = Zeroizing::new([0; 32]);
    hkdf.expand_multi_info(&[WRAP_LABEL, head], key.as_mut_slice()).expect("32 bytes is a length that HKDF can make");
    Aes256Gcm::new_from_slice(key.as_slice()).expect("the key has 32 bytes")
}

/// The head of the blob, then the context in its one encoding.
fn associated_data(head: &[u8], context: &EncryptionContext) -> Vec<u8> {
    fn put(out: &mut Vec<u8>, len: usize, bytes: &str) {
        out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(bytes.as_bytes());
    }
    let mut out = head.to_vec();
    put(&mut out, context.len(), "");
    for text in context.iter().flat_map(|(name, value)| [name, value]) {
        put(&mut out, text.len(), text);
    }
    out
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::disallowed_types)]

    use std::{
        fs,
        os::unix::fs::PermissionsExt,
        sync::atomic::{AtomicBool, AtomicU64, Ordering},
    };

    use super::*;

    const REGION: &str = "cn-hangzhou";
    const ROLE: &str = "acs:ram::13234:role/logsource";
    const DATA_KEY: [u8; 32] = [0xd5; 32];

    #[derive(Debug, Default)]
    struct TestClock(AtomicU64);

    impl TestClock {
        fn set_day(&self, day: u64) {
            self.0.store(day * DAY_US, Ordering::Relaxed);
        }
    }

    impl Clock for TestClock {
        fn wall_us(&self) -> u64 {
            self.0.load(Ordering::Relaxed)
        }

        fn uptime(&self) -> Duration {
            Duration::from_micros(self.wall_us())
        }
    }

    /// 0, 1, 2, ...: all that it gives out is known.
    #[derive(Debug, Default)]
    struct Counting(AtomicU64);

    impl Random for Counting {
        fn fill(&self, buf: &mut [u8]) -> io::Result<()> {
            buf.fill_with(|| self.0.fetch_add(1, Ordering::Relaxed).to_le_bytes()[0]);
            Ok(())
        }
    }

    struct Setup {
        temporary: tempfile::TempDir,
        kms: LocalKms,
        cmk: Cmk,
        context: EncryptionContext,
    }

    fn context(pairs: &[(&str, &str)]) -> EncryptionContext {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    impl Setup {
        fn new() -> Self {
            Self::with(|kms| kms)
        }

        fn with(adjust: impl FnOnce(LocalKms) -> LocalKms) -> Self {
            let temporary = tempfile::tempdir().unwrap();
            let kms = adjust(LocalKms::create_or_open(temporary.path().join("kms")).unwrap());
            let cmk_key_id = kms.create_key(REGION, &[ROLE]).unwrap();
            let cmk = Cmk { cmk_key_id, arn: ROLE.to_owned(), region_id: REGION.to_owned() };
            Self { temporary, kms, cmk, context: context(&[("store", "s1"), ("logstore", "l1")]) }
        }

        fn id(&self) -> &str {
            &self.cmk.cmk_key_id
        }

        fn call(&self) -> KmsCall<'_> {
            KmsCall { cmk: &self.cmk, context: &self.context, timeout: Duration::from_secs(1) }
        }

        fn wrap(&self) -> Result<Vec<u8>, KmsError> {
            self.kms.wrap(&self.call(), &SecretKey::from_bytes(&mut DATA_KEY.clone()))
        }

        fn unwrap(&self, wrapped: &[u8]) -> Result<[u8; 32], KmsError> {
            self.kms.unwrap(&self.call(), wrapped).map(|key| *key.expose())
        }

        fn state(&self) -> KeyState {
            self.info().state
        }

        fn info(&self) -> KeyInfo {
            self.kms.list().unwrap().into_iter().find(|key| key.key_id == self.id()).unwrap()
        }

        /// Both calls are refused for this reason.
        #[track_caller]
        fn assert_revoked(&self, wrapped: &[u8], expected: RevokedReason) {
            for error in [self.wrap().unwrap_err(), self.unwrap(wrapped).unwrap_err()] {
                assert!(matches!(&error, KmsError::Revoked { reason, .. } if *reason == expected), "{error:?}");
            }
        }
    }

    #[track_caller]
    fn assert_invalid<T: fmt::Debug>(result: Result<T, KmsError>) {
        assert!(matches!(result, Err(KmsError::Invalid { .. })), "{result:?}");
    }

    #[track_caller]
    fn assert_unreachable<T: fmt::Debug>(result: Result<T, KmsError>) {
        assert!(matches!(result, Err(KmsError::Unreachable { .. })), "{result:?}");
    }

    #[track_caller]
    fn assert_wrong_state(result: Result<(), LocalKmsError>, expected: KeyState) {
        assert!(matches!(&result, Err(LocalKmsError::WrongState { state, .. }) if *state == expected), "{result:?}");
    }

    #[test]
    fn wraps_and_unwraps() {
        let setup = Setup::new();
        let (first, second) = (setup.wrap().unwrap(), setup.wrap().unwrap());
        assert_ne!(first, second, "each wrap has a salt of its own");
        assert_eq!(first.len(), 112);
        assert_eq!(setup.unwrap(&first).unwrap(), DATA_KEY);
        assert_eq!(setup.unwrap(&second).unwrap(), DATA_KEY);
        assert_eq!(setup.kms.name(), "local");
    }

    #[test]
    fn bytes_are_as_documented() {
        let clock = Arc::new(TestClock(AtomicU64::new(1_000_000)));
        let setup = Setup::with(|kms| LocalKms { random: Arc::new(Counting::default()), ..kms }.with_clock(clock));
        // Both computed by another implementation of CRC-32, HKDF and AES-GCM.
        let file = concat!(
            r#"{"crc32":"4a90f9b6","key":{"key_id":"key-0001020304050607","region_id":"cn-hangzhou","created_us":1000000,"#,
            r#""disabled":false,"deletion_day":null,"grants":["acs:ram::13234:role/logsource"],"#,
            r#""material":["08090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f2021222324252627"]}}"#,
            "\n"
        );
        assert_eq!(fs::read_to_string(setup.kms.key_path(setup.id())).unwrap(), file);
        let wrapped = setup.wrap().unwrap();
        let hex: String = wrapped.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            hex,
            concat!(
                "454c4b57010014006b65792d3030303130323033303430353036303701000000",
                "28292a2b2c2d2e2f303132333435363738393a3b3c3d3e3f4041424344454647",
                "3c6262224650014d62126b3da073c2ed03b59810679368f6d3dfcb908c6c29eb",
                "dde00771b04a4c3679de73a62ed9e2bb",
            )
        );
        assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
    }

    #[test]
    fn every_changed_bit_and_every_length_of_a_wrapped_key_is_invalid() {
        let setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        for bit in 0..wrapped.len() * 8 {
            let mut changed = wrapped.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert_invalid(setup.unwrap(&changed));
        }
        for len in 0..wrapped.len() {
            assert_invalid(setup.unwrap(&wrapped[..len]));
        }
        assert_invalid(setup.unwrap(&[wrapped.as_slice(), &[0]].concat()));
    }

    #[test]
    fn the_context_and_the_key_are_bound() {
        let mut setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        for other in [
            context(&[]),
            context(&[("store", "s1")]),
            context(&[("store", "s1"), ("logstore", "l2")]),
            context(&[("store", "l1"), ("logstore", "s1")]),
            context(&[("store", "s1"), ("logstore", "l1"), ("suite", "")]),
            // The same text, cut elsewhere.
            context(&[("stores", "1"), ("logstore", "l1")]),
        ] {
            let call = KmsCall { context: &other, ..setup.call() };
            assert_invalid(setup.kms.unwrap(&call, &wrapped));
        }
        assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
        setup.cmk.cmk_key_id = setup.kms.create_key(REGION, &[ROLE]).unwrap();
        assert_invalid(setup.unwrap(&wrapped));
    }

    #[test]
    fn disabled_and_enabled_again() {
        let setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        for _ in 0..2 {
            setup.kms.disable(setup.id()).unwrap();
            assert_eq!(setup.state(), KeyState::Disabled);
            setup.assert_revoked(&wrapped, RevokedReason::Disabled);
        }
        assert_wrong_state(setup.kms.rotate(setup.id()), KeyState::Disabled);
        assert_wrong_state(setup.kms.cancel_deletion(setup.id()), KeyState::Disabled);
        for _ in 0..2 {
            setup.kms.enable(setup.id()).unwrap();
            assert_eq!(setup.state(), KeyState::Enabled);
            assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
        }
        assert_wrong_state(setup.kms.cancel_deletion(setup.id()), KeyState::Enabled);
    }

    #[test]
    fn pending_deletion_can_be_cancelled() {
        let clock = Arc::new(TestClock::default());
        clock.set_day(20_000);
        let setup = Setup::with(|kms| kms.with_clock(clock.clone()));
        let wrapped = setup.wrap().unwrap();
        for before in [KeyState::Enabled, KeyState::Disabled] {
            if before == KeyState::Disabled {
                setup.kms.disable(setup.id()).unwrap();
            }
            setup.kms.schedule_deletion(setup.id(), 7).unwrap();
            let pending = KeyState::PendingDeletion { day: 20_007 };
            assert_eq!(setup.state(), pending);
            assert_eq!(setup.info().deletion_day, Some(20_007));
            setup.assert_revoked(&wrapped, RevokedReason::PendingDeletion);
            assert_wrong_state(setup.kms.enable(setup.id()), pending);
            assert_wrong_state(setup.kms.disable(setup.id()), pending);
            assert_wrong_state(setup.kms.rotate(setup.id()), pending);
            assert_wrong_state(setup.kms.schedule_deletion(setup.id(), 8), pending);
            setup.kms.cancel_deletion(setup.id()).unwrap();
            assert_eq!(setup.state(), before);
            assert_eq!(setup.info().deletion_day, None);
        }
        setup.kms.enable(setup.id()).unwrap();
        assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
        for days in [0, 367, u32::MAX] {
            let refused = setup.kms.schedule_deletion(setup.id(), days);
            assert!(matches!(refused, Err(LocalKmsError::InvalidArgument { .. })), "{refused:?}");
        }
    }

    #[test]
    fn the_clock_deletes_and_the_next_change_destroys() {
        let clock = Arc::new(TestClock::default());
        clock.set_day(20_000);
        let setup = Setup::with(|kms| kms.with_clock(clock.clone()));
        let other = setup.kms.create_key("cn-beijing", &[]).unwrap();
        let wrapped = setup.wrap().unwrap();
        setup.kms.schedule_deletion(setup.id(), 1).unwrap();
        clock.0.store(20_001 * DAY_US - 1, Ordering::Relaxed);
        setup.assert_revoked(&wrapped, RevokedReason::PendingDeletion);
        clock.set_day(20_001);
        setup.assert_revoked(&wrapped, RevokedReason::Deleted);
        assert_eq!((setup.state(), setup.info().versions), (KeyState::Deleted, 1));
        // Too late, and that attempt is the change that destroys it.
        assert_wrong_state(setup.kms.cancel_deletion(setup.id()), KeyState::Deleted);
        assert_eq!((setup.state(), setup.info().versions), (KeyState::Deleted, 0));
        // A clock put back brings nothing back, and a change of another key destroys as well.
        clock.set_day(20_000);
        assert_eq!(setup.state(), KeyState::Deleted);
        let third = setup.kms.create_key("cn-beijing", &[]).unwrap();
        setup.kms.schedule_deletion(&other, 2).unwrap();
        clock.set_day(20_002);
        setup.kms.grant(&third, ROLE).unwrap();
        let file = fs::read_to_string(setup.kms.key_path(&other)).unwrap();
        assert!(file.contains(r#""material":[]"#), "{file}");
    }

    #[test]
    fn deleted_is_final() {
        let setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        setup.kms.disable(setup.id()).unwrap();
        setup.kms.delete(setup.id()).unwrap();
        setup.assert_revoked(&wrapped, RevokedReason::Deleted);
        let info = setup.info();
        assert_eq!((info.state, info.versions), (KeyState::Deleted, 0));
        assert_eq!(info.deletion_day, Some(setup.kms.today()));
        for refused in [
            setup.kms.enable(setup.id()),
            setup.kms.disable(setup.id()),
            setup.kms.rotate(setup.id()),
            setup.kms.schedule_deletion(setup.id(), 7),
            setup.kms.cancel_deletion(setup.id()),
            setup.kms.delete(setup.id()),
            setup.kms.grant(setup.id(), ROLE),
            setup.kms.ungrant(setup.id(), ROLE),
        ] {
            assert_wrong_state(refused, KeyState::Deleted);
        }
        assert!(setup.kms.serves(REGION), "so that a call can say that the key is deleted");
    }

    #[test]
    fn grants_are_of_a_role_and_a_key() {
        let mut setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        let other = "acs:ram::13234:role/other";
        setup.kms.grant(setup.id(), other).unwrap();
        setup.kms.grant(setup.id(), other).unwrap();
        assert_eq!(setup.info().grants, [ROLE, other]);
        setup.kms.ungrant(setup.id(), ROLE).unwrap();
        setup.assert_revoked(&wrapped, RevokedReason::NotPermitted);
        let again = setup.kms.ungrant(setup.id(), ROLE);
        assert!(matches!(again, Err(LocalKmsError::NotGranted { .. })), "{again:?}");
        // Who has no grant does not learn the state.
        setup.kms.disable(setup.id()).unwrap();
        setup.assert_revoked(&wrapped, RevokedReason::NotPermitted);
        setup.kms.enable(setup.id()).unwrap();
        setup.cmk.arn = other.to_owned();
        assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
        for name in ["", &"x".repeat(NAME_BYTES_MAX + 1)] {
            for refused in [
                setup.kms.grant(setup.id(), name),
                setup.kms.create_key(name, &[]).map(drop),
                setup.kms.create_key(REGION, &[name]).map(drop),
            ] {
                assert!(matches!(refused, Err(LocalKmsError::InvalidArgument { .. })), "{refused:?}");
            }
        }
    }

    #[test]
    fn rotation_keeps_old_versions() {
        let setup = Setup::new();
        let mut wrapped = vec![setup.wrap().unwrap()];
        for versions in 2..5 {
            setup.kms.rotate(setup.id()).unwrap();
            assert_eq!(setup.info().versions, versions);
            wrapped.push(setup.wrap().unwrap());
        }
        for (blob, version) in wrapped.iter().zip(1..) {
            assert_eq!(Blob::parse(blob).unwrap().version, version);
            assert_eq!(setup.unwrap(blob).unwrap(), DATA_KEY);
        }
    }

    #[test]
    fn unknown_keys_and_other_regions_are_deleted_keys() {
        let mut setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        assert!(setup.kms.serves(REGION));
        assert!(!setup.kms.serves("cn-beijing"));
        setup.cmk.region_id = "cn-beijing".to_owned();
        setup.assert_revoked(&wrapped, RevokedReason::Deleted);
        setup.cmk.region_id = REGION.to_owned();
        for id in [
            "",
            "key-0000000000000000",
            "../kms",
            "key-../../../kms0000",
            "KEY-0000000000000000",
            "key-000000000000000G",
        ] {
            setup.cmk.cmk_key_id = id.to_owned();
            setup.assert_revoked(&wrapped, RevokedReason::Deleted);
            let refused = setup.kms.disable(id);
            assert!(matches!(refused, Err(LocalKmsError::NotFound { .. })), "{refused:?}");
        }
    }

    #[test]
    fn another_handle_sees_a_change_at_its_next_call() {
        let setup = Setup::new();
        let other = LocalKms::open(setup.temporary.path().join("kms")).unwrap();
        let wrapped = setup.wrap().unwrap();
        other.disable(setup.id()).unwrap();
        setup.assert_revoked(&wrapped, RevokedReason::Disabled);
        other.enable(setup.id()).unwrap();
        assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
        other.ungrant(setup.id(), ROLE).unwrap();
        setup.assert_revoked(&wrapped, RevokedReason::NotPermitted);
        assert_eq!(other.list().unwrap(), setup.kms.list().unwrap());
    }

    #[test]
    fn concurrent_changes_are_all_kept_and_calls_never_see_half_of_one() {
        let setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        let dir = setup.temporary.path().join("kms");
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut calls = 0;
                while !done.load(Ordering::Relaxed) {
                    assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
                    assert_eq!(setup.unwrap(&setup.wrap().unwrap()).unwrap(), DATA_KEY);
                    calls += 1;
                }
                calls
            });
            let writers: Vec<_> = (0..4)
                .map(|writer| {
                    let (dir, id) = (&dir, setup.id());
                    scope.spawn(move || {
                        let kms = LocalKms::create_or_open(dir).unwrap();
                        for turn in 0..5 {
                            kms.grant(id, &format!("role-{writer}-{turn}")).unwrap();
                            kms.rotate(id).unwrap();
                            kms.create_key(REGION, &[]).unwrap();
                        }
                    })
                })
                .collect();
            for writer in writers {
                writer.join().unwrap();
            }
            done.store(true, Ordering::Relaxed);
            assert!(reader.join().unwrap() > 0);
        });
        assert_eq!(setup.info().grants.len(), 1 + 4 * 5);
        assert_eq!(setup.info().versions, 1 + 4 * 5);
        assert_eq!(setup.kms.list().unwrap().len(), 1 + 4 * 5);
    }

    #[test]
    fn several_may_create_the_directory_at_once() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = temporary.path().join("kms");
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| LocalKms::create_or_open(&dir).unwrap().create_key(REGION, &[]).unwrap());
            }
        });
        assert_eq!(LocalKms::open(&dir).unwrap().list().unwrap().len(), 4);
    }

    #[test]
    fn every_changed_bit_and_every_length_of_a_key_file_shows() {
        let setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        let path = setup.kms.key_path(setup.id());
        let intact = fs::read(&path).unwrap();
        for bit in 0..intact.len() * 8 {
            let mut changed = intact.clone();
            changed[bit / 8] ^= 1 << (bit % 8);
            assert!(StoredKey::decode(&changed).is_err(), "bit {bit}");
        }
        for len in 0..intact.len() {
            assert!(StoredKey::decode(&intact[..len]).is_err(), "length {len}");
        }
        let text = String::from_utf8(intact.clone()).unwrap();
        let resealed = |from: &str, to: &str| {
            let body = text[file_head(0).len()..].strip_suffix("}\n").unwrap().replacen(from, to, 1);
            format!("{}{body}}}\n", file_head(crc32fast::hash(body.as_bytes()))).into_bytes()
        };
        let another_id = resealed(setup.id(), "key-0123456789abcdef");
        for damaged in [
            intact[1..].to_vec(),
            vec![b' '; KEY_FILE_BYTES_MAX + 1],
            // A checksum that holds does not make a file right.
            another_id,
            resealed("\"disabled\"", "\"dis\":1,\"disabled\""),
            resealed("\"material\":[\"", "\"material\":[\"0"),
            resealed("\"material\":[\"", "\"material\":[\"\\u0030"),
        ] {
            fs::write(&path, &damaged).unwrap();
            assert_invalid(setup.wrap());
            assert_invalid(setup.unwrap(&wrapped));
            for error in [setup.kms.list().unwrap_err(), setup.kms.disable(setup.id()).unwrap_err()] {
                assert!(matches!(&error, LocalKmsError::Damaged { file, .. } if *file == path), "{error:?}");
            }
            assert!(setup.kms.serves("anywhere"), "the call is to say what is wrong");
            assert_eq!(fs::read(&path).unwrap(), damaged, "a damaged file is left as it is");
        }
        // Others stay usable.
        let other = setup.kms.create_key(REGION, &[]).unwrap();
        setup.kms.disable(&other).unwrap();
        fs::write(&path, &intact).unwrap();
        assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
    }

    #[test]
    fn a_damaged_marker_shows() {
        let setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        let path = setup.kms.marker_path();
        let newer = String::from_utf8(MARKER.to_vec()).unwrap().replace(":1}", ":2}").into_bytes();
        for damaged in [Vec::new(), MARKER[1..].to_vec(), newer, [MARKER, b"\n"].concat()] {
            fs::write(&path, damaged).unwrap();
            assert_invalid(setup.wrap());
            assert_invalid(setup.unwrap(&wrapped));
            for result in [
                LocalKms::open(&setup.kms.dir).map(drop),
                LocalKms::create_or_open(&setup.kms.dir).map(drop),
                setup.kms.create_key(REGION, &[]).map(drop),
                setup.kms.list().map(drop),
                setup.kms.disable(setup.id()),
            ] {
                assert!(matches!(&result, Err(LocalKmsError::Damaged { file, .. }) if *file == path), "{result:?}");
            }
        }
    }

    #[test]
    fn an_absent_directory_is_unreachable_until_it_is_back() {
        let setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        let (dir, away) = (&setup.kms.dir, setup.temporary.path().join("away"));
        let (keys, keys_away) = (setup.kms.keys_dir(), setup.temporary.path().join("keys"));
        for (from, to) in [(dir, &away), (&keys, &keys_away), (&setup.kms.marker_path(), &away)] {
            fs::rename(from, to).unwrap();
            assert_unreachable(setup.wrap());
            assert_unreachable(setup.unwrap(&wrapped));
            assert!(!setup.kms.serves(REGION));
            for result in [LocalKms::open(dir).map(drop), setup.kms.list().map(drop), setup.kms.disable(setup.id())] {
                assert!(matches!(result, Err(LocalKmsError::Missing { .. })), "{result:?}");
            }
            fs::rename(to, from).unwrap();
            assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
        }
        // Lost keys are not made up for by an empty directory.
        fs::rename(&keys, &keys_away).unwrap();
        let result = LocalKms::create_or_open(dir);
        assert!(matches!(result, Err(LocalKmsError::Missing { .. })), "{result:?}");
    }

    #[test]
    fn an_unreadable_directory_is_unreachable() {
        let setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        fs::rename(&setup.kms.dir, setup.temporary.path().join("away")).unwrap();
        fs::write(&setup.kms.dir, "a file").unwrap();
        assert_unreachable(setup.unwrap(&wrapped));
        assert!(setup.kms.serves(REGION));
        let result = setup.kms.disable(setup.id());
        assert!(matches!(result, Err(LocalKmsError::Io { .. })), "{result:?}");
        assert!(LocalKms::create_or_open(&setup.kms.dir).is_err());
    }

    #[test]
    fn calls_need_no_lock_and_changes_wait_for_it() {
        let setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        let lock = setup.kms.lock().unwrap();
        assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
        thread::scope(|scope| {
            let change = scope.spawn(|| setup.kms.disable(setup.id()));
            thread::sleep(LOCK_PAUSE * 4);
            assert_eq!(setup.state(), KeyState::Enabled);
            drop(lock);
            change.join().unwrap().unwrap();
        });
        assert_eq!(setup.state(), KeyState::Disabled);
        fs::remove_file(setup.kms.lock_path()).unwrap();
        let result = setup.kms.enable(setup.id());
        assert!(matches!(result, Err(LocalKmsError::Io { .. })), "{result:?}");
    }

    #[test]
    fn a_key_has_a_largest_size() {
        let setup = Setup::new();
        let before = setup.info();
        let roles: Vec<String> = (0..KEY_FILE_BYTES_MAX / NAME_BYTES_MAX)
            .map(|role| format!("{role:0width$}", width = NAME_BYTES_MAX))
            .collect();
        let grants: Vec<&str> = roles.iter().map(String::as_str).collect();
        let result = setup.kms.create_key(REGION, &grants);
        assert!(matches!(result, Err(LocalKmsError::TooLarge { .. })), "{result:?}");
        let id = setup.kms.create_key(REGION, &grants[1..grants.len() - 1]).unwrap();
        setup.kms.grant(&id, &"x".repeat(100)).unwrap();
        let result = setup.kms.grant(&id, grants[0]);
        assert!(matches!(result, Err(LocalKmsError::TooLarge { .. })), "{result:?}");
        setup.kms.disable(&id).unwrap();
        assert_eq!(setup.info(), before);
    }

    #[test]
    fn an_interrupted_change_leaves_the_key_and_no_material() {
        let setup = Setup::new();
        let wrapped = setup.wrap().unwrap();
        let mut left_over = setup.kms.key_path(setup.id()).into_os_string();
        left_over.push(".tmp");
        fs::write(&left_over, "half a file").unwrap();
        assert_eq!(setup.unwrap(&wrapped).unwrap(), DATA_KEY);
        assert_eq!(setup.kms.list().unwrap().len(), 1);
        setup.kms.delete(setup.id()).unwrap();
        assert!(!Path::new(&left_over).exists());
    }

    #[test]
    fn a_random_identifier_never_replaces_a_key() {
        let setup = Setup::with(|kms| LocalKms { random: Arc::new(Counting::default()), ..kms });
        let again = LocalKms { random: Arc::new(Counting::default()), ..setup.kms.clone() };
        let before = fs::read(setup.kms.key_path(setup.id())).unwrap();
        let result = again.create_key(REGION, &[]);
        assert!(matches!(result, Err(LocalKmsError::Io { .. })), "{result:?}");
        assert_eq!(fs::read(setup.kms.key_path(setup.id())).unwrap(), before);
    }

    #[test]
    fn only_the_owner_can_read_keys() {
        let setup = Setup::new();
        setup.kms.rotate(setup.id()).unwrap();
        for path in [setup.kms.key_path(setup.id()), setup.kms.marker_path(), setup.kms.lock_path()] {
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600, "{}", path.display());
        }
    }

    #[test]
    fn nothing_that_is_shown_holds_key_material() {
        let setup = Setup::with(|kms| LocalKms { random: Arc::new(Counting::default()), ..kms });
        let wrapped = setup.wrap().unwrap();
        let stored = setup.kms.load(setup.id()).unwrap();
        let path = setup.kms.key_path(setup.id());
        let mut shown = format!("{:?} {:?} {stored:?} {:?}", setup.kms, setup.kms.list(), setup.call());
        let mut show = |error: &dyn std::error::Error| shown.push_str(&format!("{error} {error:?} "));
        show(&setup.unwrap(&wrapped[1..]).unwrap_err());
        show(&setup.unwrap(&wrapped[..111]).unwrap_err());
        // A file whose checksum holds although its material is one digit short.
        let text = fs::read_to_string(&path).unwrap();
        let body = text[file_head(0).len()..].strip_suffix("}\n").unwrap().replace("\"08090a", "\"8090a");
        fs::write(&path, format!("{}{body}}}\n", file_head(crc32fast::hash(body.as_bytes())))).unwrap();
        show(&setup.unwrap(&wrapped).unwrap_err());
        show(&setup.kms.rotate(setup.id()).unwrap_err());
        fs::write(&path, &text[..text.len() - 1]).unwrap();
        show(&setup.unwrap(&wrapped).unwrap_err());
        show(&setup.kms.list().unwrap_err());
        assert!(shown.contains("Counting"), "{shown}");
        for material in ["0a0b0c", "0A0B0C", "10, 11, 12", "0xa, 0xb", "d5d5d5", "213, 213"] {
            assert!(!shown.contains(material), "{material} in {shown}");
        }
    }
}
