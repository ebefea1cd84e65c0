//! A directory in the role of the customer's KMS.
//!
//! ```text
//! kms.json               the directory's type and its format version; created last
//! lock                   the advisory lock for changes
//! keys/key-….json        one file per key (mode 0600): {"crc32":"8 hex digits","key":{…}}; the CRC32 covers the inner object
//! ```
//!
//! A key's file is replaced atomically and durably, so calls read without a lock. A deleted key
//! keeps its file, without material.
//!
//! A wrapped key has this format, all little-endian:
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
//! The key is sealed with AES-256-GCM under HKDF-SHA-256(salt, material of that key version,
//! "envelog local kms wrap" || the bytes before the salt). That sealing key is used once, so the
//! nonce is zeros. The associated data are the bytes before the salt, then the context
//! ([`EncryptionContext::to_bytes`](super::EncryptionContext::to_bytes)).

mod admin;
mod error;
mod files;
mod key;
#[cfg(test)]
mod tests;
mod wrapped;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use aes_gcm::{Nonce, Tag, aead::AeadInOut};
use zeroize::Zeroizing;

use super::{Cmk, Kms, KmsCall, KmsError, RevokedReason};
use crate::{
    crypto::SecretKey,
    io::{
        Access, Clock, DAY_US, Disk, Existing, OsRandom, Random, RealDisk, SystemClock, write_file,
    },
};

pub use admin::DELETION_DAYS;
pub use error::LocalKmsError;
use error::io_error;
use files::{MARKER, StoredKey};
pub use key::{LocalKeyInfo, LocalKeyState};
use wrapped::{Blob, NONCE, blob_head, wrap_cipher};

/// The embedded KMS: a directory in the role of the customer's KMS, with keys, key versions, states
/// and grants of its own.
///
/// It is a stand-in for development, for tests, and for use on a single machine. **Anyone who can
/// read the directory has the keys**, and a backup of it brings deleted keys back. Deleting a key
/// removes its material from the directory. The blocks that the file system has freed, and its
/// snapshots, may still hold it. To keep a data key from the operator of the machine, use a real
/// KMS.
///
/// Several processes can use one directory at once. Each call reads the state again, so a change by
/// one process takes effect at the next call of every other process. Changes happen one at a time,
/// under an advisory lock, and are durable when the method returns.
///
/// As a [`Kms`] it answers:
///
/// - [`KmsError::Revoked`], in this order: `Deleted` if the region has keys, but not this one, or the
///   key is deleted; `NotPermitted` if the role has no grant; `PendingDeletion`; `Disabled`.
/// - [`KmsError::Unreachable`] if the directory is absent or cannot be read, or if it has no key of the
///   region: a directory whose keys are all gone is a damaged KMS, and no decision of the customer.
/// - [`KmsError::Invalid`] if a file in it is damaged, or the wrapped key is damaged or was made
///   under another key or for another context.
///
/// It serves the regions of the keys that it can read, deleted keys included. A key file that is
/// damaged, unreadable or no regular file concerns that key alone: the other keys serve their
/// regions, and can be used and administered. A directory that cannot be read serves no region, so
/// that another KMS keeps its regions. If no other KMS serves the region of a call, the call fails
/// with the error of the directory, and the next call looks again. The same holds if the process
/// has no file descriptor or memory left to look.
///
/// A call reads two small local files and waits for no lock. On a file system that hangs, the
/// timeout of a call has no effect.
///
/// The clock triggers a scheduled deletion. From that day on the key is deleted, and the next
/// change of anything in the directory destroys its material.
#[derive(Clone, Debug)]
pub struct LocalKms {
    dir: PathBuf,
    clock: Arc<dyn Clock>,
    random: Arc<dyn Random>,
}

impl LocalKms {
    /// The embedded KMS in `dir`. This method does not look at the directory. A missing or damaged
    /// KMS shows at each call.
    ///
    /// Hand this to a store: a store opens whether or not its KMS is available.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), clock: Arc::new(SystemClock), random: Arc::new(OsRandom) }
    }

    /// Opens the embedded KMS in `dir`.
    ///
    /// # Errors
    /// [`LocalKmsError::Missing`] if there is none, `Damaged` or `Io` if it cannot be used.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, LocalKmsError> {
        let kms = Self::at(dir);
        kms.check()?;
        Ok(kms)
    }

    /// Opens the embedded KMS in `dir`, or creates an empty one. Its parent directory must exist.
    ///
    /// # Errors
    /// `Damaged`, `Busy` or `Io`. Also [`LocalKmsError::Missing`] if part of an existing KMS has
    /// been lost.
    pub fn create_or_open(dir: impl Into<PathBuf>) -> Result<Self, LocalKmsError> {
        let kms = Self::at(dir);
        let exists_is_fine = |result: io::Result<()>| match result {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        };
        // The path may lead to the directory through a symlink.
        let dir = RealDisk.resolve(&kms.dir).map_err(io_error(&kms.dir))?;
        if RealDisk.stat(&dir).map_err(io_error(&kms.dir))?.is_none() {
            let parent = dir
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty())
                .unwrap_or(Path::new("."));
            let beside = RealDisk.beneath(parent, Access::Owner).map_err(io_error(parent))?;
            exists_is_fine(beside.create_dir(&dir)).map_err(io_error(&kms.dir))?;
            beside.sync_dir(parent).map_err(io_error(parent))?;
        }
        let (disk, marker) = (kms.disk()?, kms.marker_path());
        if disk.stat(&marker).map_err(io_error(&marker))?.is_none() {
            let _lock = kms.lock()?;
            if disk.stat(&marker).map_err(io_error(&marker))?.is_none() {
                let keys = kms.keys_dir();
                exists_is_fine(disk.create_dir(&keys)).map_err(io_error(&keys))?;
                write_file(&*disk, &marker, MARKER, Existing::Replace)
                    .map_err(io_error(&marker))?;
            }
        }
        kms.check()?;
        Ok(kms)
    }

    /// The same KMS with another clock. The clock decides creation times and deletions.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// The same KMS with another source of randomness. It supplies key material and salts. An
    /// attacker who can predict or repeat its output has every key.
    #[must_use]
    pub fn insecure_random_for_tests(mut self, random: Arc<dyn Random>) -> Self {
        self.random = random;
        self
    }

    fn today(&self) -> u32 {
        u32::try_from(self.clock.wall_us() / DAY_US).unwrap_or(u32::MAX)
    }

    /// The key of a call, if the call may use it.
    fn usable(&self, cmk: &Cmk) -> Result<StoredKey, KmsError> {
        let Cmk { cmk_key_id, arn, region_id } = cmk;
        let key = match self.load(cmk_key_id) {
            Ok(key) if key.region_id == *region_id => key,
            Ok(_) | Err(LocalKmsError::NotFound { .. }) => {
                // Only a KMS of the region can tell that the key does not exist.
                return Err(if self.try_serves(region_id)? {
                    let detail = format!("no key {cmk_key_id} in region {region_id}");
                    KmsError::revoked(RevokedReason::Deleted, detail)
                } else {
                    let dir = self.dir.display();
                    KmsError::unreachable(format!("{dir} has no key of region {region_id}"))
                });
            }
            Err(error) => return Err(error.into()),
        };
        let state = key.state(self.today());
        let reason = match state {
            LocalKeyState::Deleted => RevokedReason::Deleted,
            _ if !key.grants.contains(arn) => {
                return Err(KmsError::revoked(
                    RevokedReason::NotPermitted,
                    format!("key {cmk_key_id} is not granted to {arn}"),
                ));
            }
            LocalKeyState::PendingDeletion { .. } => RevokedReason::PendingDeletion,
            LocalKeyState::Disabled => RevokedReason::Disabled,
            LocalKeyState::Enabled => return Ok(key),
        };
        Err(KmsError::revoked(reason, format!("key {cmk_key_id} in region {region_id}")))
    }
}

impl Kms for LocalKms {
    fn name(&self) -> &str {
        "local"
    }

    /// Whether [`Kms::try_serves`] finds the region.
    fn serves(&self, region_id: &str) -> bool {
        self.try_serves(region_id).unwrap_or(false)
    }

    /// Looks for a readable key of the region, deleted keys included. The region of a key that
    /// cannot be read is unknown, so the other keys decide, unless the process has nothing left to
    /// look at a key with.
    fn try_serves(&self, region_id: &str) -> Result<bool, KmsError> {
        let mut exhausted = None;
        for key_id in self.key_ids()? {
            match self.load(&key_id) {
                Ok(key) if key.region_id == region_id => return Ok(true),
                Err(error) if error.is_exhaustion() => exhausted = Some(error),
                _ => {}
            }
        }
        exhausted.map_or(Ok(false), |error| Err(error.into()))
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        let cmk = self.usable(call.cmk)?;
        let version = cmk.versions();
        let Some(material) = cmk.version(version) else {
            return Err(KmsError::invalid("the key has no version"));
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
                &[&blob[..], &call.context.to_bytes()].concat(),
                sealed.as_mut_slice().into(),
            )
            .map_err(|_| KmsError::invalid("the key could not be sealed"))?;
        blob.extend_from_slice(&salt);
        blob.extend_from_slice(&*sealed);
        blob.extend_from_slice(&tag);
        Ok(blob)
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        let cmk = self.usable(call.cmk)?;
        let blob = Blob::parse(wrapped).map_err(KmsError::invalid)?;
        if blob.key_id != cmk.key_id.as_bytes() {
            return Err(KmsError::invalid("the wrapped key was made under another key"));
        }
        let material = cmk.version(blob.version).ok_or_else(|| {
            KmsError::invalid("the wrapped key names a key version that does not exist")
        })?;
        let mut key = Zeroizing::new(*blob.sealed);
        wrap_cipher(material, blob.salt, blob.head)
            .decrypt_inout_detached(
                &Nonce::from(NONCE),
                &[blob.head, &call.context.to_bytes()].concat(),
                key.as_mut_slice().into(),
                &Tag::from(*blob.tag),
            )
            .map_err(|_| {
                KmsError::invalid("the wrapped key is damaged or was made for another context")
            })?;
        Ok(SecretKey::from_bytes(&mut key))
    }

    fn cmk_version(&self, wrapped: &[u8]) -> Option<String> {
        Blob::parse(wrapped).ok().map(|blob| blob.version.to_string())
    }
}
