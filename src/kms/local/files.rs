//! The files of an embedded KMS: the marker, the lock, and one file per key.

use std::{collections::BTreeSet, fmt, io, path::PathBuf, sync::Arc, thread, time::Duration};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use zeroize::Zeroizing;

use super::{
    LocalKms,
    error::{LocalKmsError, io_error},
    key::{KEY_FILE_BYTES_MAX, LocalKeyInfo, LocalKeyState},
};
use crate::{
    crypto::SecretKey,
    io::{
        Access, Disk, DiskFile, Existing, FileKind, OpenMode, RealDisk, is_temporary, read_file,
        remove_temporary, write_file,
    },
};

/// How often the lock is tried, with [`LOCK_PAUSE`] in between: 10 seconds in total.
const LOCK_TRIES: u32 = 2000;
pub(super) const LOCK_PAUSE: Duration = Duration::from_millis(5);

/// All of `kms.json`.
pub(super) const MARKER: &[u8] = b"{\"format\":\"envelog local kms\",\"version\":1}\n";

impl LocalKms {
    pub(super) fn marker_path(&self) -> PathBuf {
        self.dir.join("kms.json")
    }

    pub(super) fn lock_path(&self) -> PathBuf {
        self.dir.join("lock")
    }

    pub(super) fn keys_dir(&self) -> PathBuf {
        self.dir.join("keys")
    }

    pub(super) fn key_path(&self, key_id: &str) -> PathBuf {
        self.keys_dir().join(format!("{key_id}.json"))
    }

    pub(super) fn new_material(&self) -> Result<Material, LocalKmsError> {
        SecretKey::generate(&*self.random).map(Material).map_err(io_error(&self.dir))
    }

    /// The disk below the directory that has this name now. It follows no symlink below it.
    pub(super) fn disk(&self) -> Result<Arc<dyn Disk>, LocalKmsError> {
        RealDisk.beneath(&self.dir, Access::Owner).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => LocalKmsError::Missing { dir: self.dir.clone() },
            _ => io_error(&self.dir)(error),
        })
    }

    /// Checks that the directory is an embedded KMS. Only then does a missing key file prove that
    /// the key does not exist. Returns the disk below the directory.
    pub(super) fn check(&self) -> Result<Arc<dyn Disk>, LocalKmsError> {
        let disk = self.disk()?;
        let marker = self.marker_path();
        let damaged = |what| LocalKmsError::Damaged { file: marker.clone(), what };
        match read_file(&*disk, &marker, MARKER.len() as u64) {
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
        match disk.stat(&keys).map_err(io_error(&keys))? {
            Some(stat) if stat.kind == FileKind::Directory => Ok(disk),
            Some(_) => Err(LocalKmsError::Damaged { file: keys, what: "it is not a directory" }),
            None => Err(LocalKmsError::Missing { dir: keys }),
        }
    }

    /// Takes the lock for changes. Dropping the returned file releases it.
    #[expect(
        clippy::disallowed_methods,
        reason = "no condition can signal that another process has released a file lock"
    )]
    pub(super) fn lock(&self) -> Result<Arc<dyn DiskFile>, LocalKmsError> {
        let path = self.lock_path();
        let disk = self.disk()?;
        let file = match disk.open(&path, OpenMode::ReadWrite) {
            // The lock file has no content, so a removed one is created again.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match disk.open(&path, OpenMode::CreateNew) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                        return Err(io_error(&path)(error));
                    }
                    _ => disk.open(&path, OpenMode::ReadWrite),
                }
            }
            opened => opened,
        };
        let file = file.map_err(io_error(&path))?;
        for _ in 0..LOCK_TRIES {
            if file.try_lock().map_err(io_error(&path))? {
                return Ok(file);
            }
            thread::sleep(LOCK_PAUSE);
        }
        Err(LocalKmsError::Busy { dir: self.dir.clone() })
    }

    /// Takes the lock, removes temporary files that hold material, and destroys the material of the
    /// keys whose deletion is due.
    pub(super) fn lock_and_sweep(&self) -> Result<Arc<dyn DiskFile>, LocalKmsError> {
        let disk = self.check()?;
        let lock = self.lock()?;
        self.remove_leftovers(&*disk)?;
        let today = self.today();
        for key_id in self.key_ids()? {
            // A key that cannot be read must not block the administration of the others.
            let Ok(mut key) = self.load(&key_id) else { continue };
            if key.state(today) == LocalKeyState::Deleted && !key.material.is_empty() {
                key.material.clear();
                self.save(&key)?;
            }
        }
        Ok(lock)
    }

    /// Removes the temporary key files that killed processes left behind. A file that cannot be
    /// removed stays.
    fn remove_leftovers(&self, disk: &dyn Disk) -> Result<(), LocalKmsError> {
        let keys = self.keys_dir();
        for entry in disk.list_dir(&keys).map_err(io_error(&keys))? {
            let key_id = entry.name.split('.').next().filter(|id| is_key_id(id));
            let is_leftover =
                key_id.is_some_and(|id| is_temporary(&entry.name, &format!("{id}.json")));
            if is_leftover && entry.kind == FileKind::File {
                remove_temporary(disk, &keys.join(&entry.name));
            }
        }
        Ok(())
    }

    /// The identifiers of all keys, in order.
    pub(super) fn key_ids(&self) -> Result<Vec<String>, LocalKmsError> {
        let keys = self.keys_dir();
        let entries = self.check()?.list_dir(&keys).map_err(io_error(&keys))?;
        let mut ids: Vec<String> = entries
            .iter()
            .filter_map(|entry| {
                entry.name.strip_suffix(".json").filter(|id| is_key_id(id)).map(str::to_owned)
            })
            .collect();
        ids.sort_unstable();
        Ok(ids)
    }

    pub(super) fn load(&self, key_id: &str) -> Result<StoredKey, LocalKmsError> {
        let not_found = || LocalKmsError::NotFound { key_id: key_id.to_owned() };
        if !is_key_id(key_id) {
            self.check()?;
            return Err(not_found());
        }
        let path = self.key_path(key_id);
        let read = read_file(&*self.disk()?, &path, KEY_FILE_BYTES_MAX as u64).map(Zeroizing::new);
        // Only after the attempt: a directory that vanishes in between must not look like a missing
        // key.
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

    pub(super) fn save(&self, key: &StoredKey) -> Result<(), LocalKmsError> {
        let path = self.key_path(&key.key_id);
        let bytes =
            key.encode().ok_or_else(|| LocalKmsError::TooLarge { key_id: key.key_id.clone() })?;
        write_file(&*self.disk()?, &path, &bytes, Existing::Replace).map_err(io_error(&path))
    }
}

/// Whether the text is an identifier of this KMS, and so safe as part of a file name.
fn is_key_id(id: &str) -> bool {
    id.strip_prefix("key-").is_some_and(|hex| {
        hex.len() == 16 && hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// The content of a key file.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StoredKey {
    pub(super) key_id: String,
    pub(super) region_id: String,
    pub(super) created_us: u64,
    pub(super) disabled: bool,
    pub(super) deletion_day: Option<u32>,
    pub(super) grants: BTreeSet<String>,
    /// The versions, from 1. Empty once the material is destroyed.
    pub(super) material: Vec<Material>,
}

impl StoredKey {
    pub(super) fn state(&self, today: u32) -> LocalKeyState {
        match self.deletion_day {
            _ if self.material.is_empty() => LocalKeyState::Deleted,
            Some(day) if day <= today => LocalKeyState::Deleted,
            Some(day) => LocalKeyState::PendingDeletion { day },
            None if self.disabled => LocalKeyState::Disabled,
            None => LocalKeyState::Enabled,
        }
    }

    pub(super) fn info(self, today: u32) -> LocalKeyInfo {
        LocalKeyInfo {
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
    pub(super) fn versions(&self) -> u32 {
        u32::try_from(self.material.len()).expect("the file size limits the number of versions")
    }

    pub(super) fn version(&self, version: u32) -> Option<&SecretKey> {
        let index = usize::try_from(version.checked_sub(1)?).ok()?;
        self.material.get(index).map(|material| &material.0)
    }

    /// Encodes the key file. `None` if it would be too long. It writes into one buffer of the
    /// greatest size: a buffer that grows would leave copies of the material behind.
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

    pub(super) fn decode(file: &[u8]) -> Result<Self, &'static str> {
        let (head, rest) = file.split_at_checked(file_head(0).len()).ok_or("it is cut short")?;
        let body = rest.strip_suffix(FILE_END).ok_or("it is cut short")?;
        if head != file_head(crc32fast::hash(body)).as_bytes() {
            return Err("its checksum does not match");
        }
        // An error of serde_json might quote the file, and so the material.
        serde_json::from_slice(body).map_err(|_| "it does not describe a key")
    }
}

pub(super) fn file_head(crc: u32) -> String {
    format!("{{\"crc32\":\"{crc:08x}\",\"key\":")
}

const FILE_END: &[u8] = b"}\n";

/// The material of one key version. The file stores it as 64 hexadecimal digits. Neither encoding
/// nor decoding leaves a copy behind.
#[derive(Debug)]
pub(super) struct Material(SecretKey);

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

            // Accepts only a borrowed string: serde_json would copy a string with escapes.
            fn visit_borrowed_str<E: de::Error>(self, hex: &'de str) -> Result<Material, E> {
                let wrong = || E::custom("not 64 hexadecimal digits");
                let digit = |byte: u8| {
                    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
                };
                if hex.len() != 64 {
                    return Err(wrong());
                }
                let mut bytes = Zeroizing::new([0; 32]);
                for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
                    let &[high, low] = pair else { return Err(wrong()) };
                    *byte = digit(high)
                        .zip(digit(low))
                        .map(|(high, low)| high << 4 | low)
                        .ok_or_else(wrong)?;
                }
                Ok(Material(SecretKey::from_bytes(&mut bytes)))
            }
        }

        deserializer.deserialize_str(Visitor)
    }
}
