//! The access keys, from a file that is read again when it changes.

use std::{
    collections::HashMap,
    fs::File,
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, RwLock},
};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};
use zeroize::Zeroizing;

use super::{Right, limits::Limiter};

/// The largest file of access keys, in bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;
/// The bits of a mode that give rights to others than the owner.
const EXPOSED: u32 = 0o077;

/// The reason why a file of access keys was refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeysError {
    /// The file cannot be read.
    #[error("cannot read the access keys in {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: std::io::Error,
    },
    /// Others than the owner have a right to the file, or another user owns it.
    #[error("the access keys in {} are refused: {why}", path.display())]
    Unsafe {
        /// The file.
        path: PathBuf,
        /// The reason and the remedy.
        why: String,
    },
    /// The content is not a list of access keys.
    #[error("the access keys in {} are not valid: {why}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The fault. It contains no secret.
        why: String,
    },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    keys: Vec<AccessKey>,
}

/// An access key with its permissions.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct AccessKey {
    id: String,
    secret: Zeroizing<String>,
    /// Names of projects, with `*` for any text.
    projects: Vec<String>,
    allow: Vec<Allowed>,
    /// The roles that the caller may have the service use, with `*` for any text.
    #[serde(default)]
    pass_roles: Vec<String>,
    /// What the caller may use. Without them there is no limit.
    #[serde(default, rename = "limits", deserialize_with = "limiter")]
    limiter: Arc<Limiter>,
}

fn limiter<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Arc<Limiter>, D::Error> {
    Limiter::deserialize(deserializer).map(Arc::new)
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
enum Allowed {
    Read,
    Write,
    Admin,
}

impl std::fmt::Debug for AccessKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessKey").field("id", &self.id).finish_non_exhaustive()
    }
}

impl AccessKey {
    pub(crate) fn secret(&self) -> &[u8] {
        self.secret.as_bytes()
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    pub(crate) fn projects(&self) -> &[String] {
        &self.projects
    }

    /// The names of its permissions.
    pub(crate) fn allowed(&self) -> &[impl Serialize] {
        &self.allow
    }

    pub(super) fn limiter(&self) -> &Limiter {
        &self.limiter
    }

    /// Whether it has the right in some project.
    pub(crate) fn may_somewhere(&self, right: Right) -> bool {
        self.has(right) && !self.projects.is_empty()
    }

    /// Whether it has the right in all projects, also in those to come.
    pub(super) fn may_everywhere(&self, right: Right) -> bool {
        self.has(right) && self.projects.iter().any(|pattern| pattern == "*")
    }

    pub(super) fn may(&self, right: Right, project: &str) -> bool {
        self.has(right) && self.projects.iter().any(|pattern| matches(pattern, project))
    }

    fn has(&self, right: Right) -> bool {
        match right {
            Right::Read => self.allow.contains(&Allowed::Read),
            Right::Write => self.allow.contains(&Allowed::Write),
            Right::Admin => self.allow.contains(&Allowed::Admin),
            Right::Look => !self.allow.is_empty(),
        }
    }

    pub(super) fn may_pass(&self, arn: &str) -> bool {
        self.pass_roles.iter().any(|pattern| matches(pattern, arn))
    }
}

/// Whether `text` matches a pattern in which each `*` stands for any text.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == text };
    let Some(mut text) = text.strip_prefix(head) else { return false };
    let Some((middle, tail)) = rest.rsplit_once('*') else { return text.ends_with(rest) };
    // The shortest match of each part leaves the most for the next.
    for part in middle.split('*') {
        match text.find(part) {
            Some(at) => text = &text[at + part.len()..],
            None => return false,
        }
    }
    text.ends_with(tail)
}

/// The state of a file. It differs after every change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    file: (u64, u64),
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

struct Loaded {
    keys: HashMap<String, Arc<AccessKey>>,
    stamp: Stamp,
}

/// The access keys in force.
pub(crate) struct AccessKeys {
    path: PathBuf,
    loaded: RwLock<Loaded>,
}

impl std::fmt::Debug for AccessKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessKeys").field("path", &self.path).finish_non_exhaustive()
    }
}

impl AccessKeys {
    /// # Errors
    /// As [`KeysError`] says.
    pub(crate) fn load(path: &Path) -> Result<Self, KeysError> {
        Ok(Self { path: path.to_owned(), loaded: RwLock::new(read(path)?) })
    }

    pub(crate) fn find(&self, id: &str) -> Option<Arc<AccessKey>> {
        let loaded = self.loaded.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        loaded.keys.get(id).cloned()
    }

    /// Reads the file again if it has changed. Returns whether it had. The keys in force stay if
    /// the new ones are refused. Blocks for file I/O.
    ///
    /// # Errors
    /// As [`KeysError`] says.
    pub(crate) fn refresh(&self) -> Result<bool, KeysError> {
        let metadata = std::fs::metadata(&self.path).map_err(io_error(&self.path))?;
        let known = {
            let loaded = self.loaded.read().unwrap_or_else(|poisoned| poisoned.into_inner());
            loaded.stamp
        };
        if stamp(&metadata) == known {
            return Ok(false);
        }
        let mut new = read(&self.path)?;
        for (id, key) in &mut new.keys {
            // A key whose limits are the same does not get a new allowance with each change of the
            // file.
            if let Some(known) = self.find(id)
                && known.limiter.has_limits_of(&key.limiter)
                && let Some(key) = Arc::get_mut(key)
            {
                key.limiter = Arc::clone(&known.limiter);
            }
        }
        *self.loaded.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = new;
        Ok(true)
    }
}

fn io_error(path: &Path) -> impl FnOnce(std::io::Error) -> KeysError {
    let path = path.to_owned();
    move |source| KeysError::Io { path, source }
}

fn stamp(metadata: &std::fs::Metadata) -> Stamp {
    Stamp {
        file: (metadata.dev(), metadata.ino()),
        size: metadata.size(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    }
}

fn read(path: &Path) -> Result<Loaded, KeysError> {
    let (text, metadata) = read_text(path)?;
    Ok(Loaded { keys: parse(path, &text)?, stamp: stamp(&metadata) })
}

/// Reads a JSON document with secrets.
pub(crate) fn read_private<T: DeserializeOwned>(path: &Path) -> Result<T, KeysError> {
    from_json(path, &read_text(path)?.0)
}

fn read_text(path: &Path) -> Result<(Zeroizing<Vec<u8>>, std::fs::Metadata), KeysError> {
    // Without O_NONBLOCK, opening a named pipe would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = rustix::fs::open(path, flags, Mode::empty())
        .map(File::from)
        .map_err(|error| io_error(path)(error.into()))?;
    let metadata = file.metadata().map_err(io_error(path))?;
    check_file(path, &metadata)?;
    // One allocation, which is wiped: a vector that grows would leave copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(metadata.len() as usize + 1));
    (&file).take(metadata.len()).read_to_end(&mut text).map_err(io_error(path))?;
    Ok((text, metadata))
}

fn from_json<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T, KeysError> {
    serde_json::from_slice(text).map_err(|error| {
        // The message of a type error would show the value, which may be a secret.
        let why = format!("line {} column {} is not as expected", error.line(), error.column());
        KeysError::Invalid { path: path.to_owned(), why }
    })
}

fn check_file(path: &Path, metadata: &std::fs::Metadata) -> Result<(), KeysError> {
    let refuse = |why: String| Err(KeysError::Unsafe { path: path.to_owned(), why });
    if !metadata.is_file() {
        return refuse("it is not a regular file".to_owned());
    }
    if metadata.len() > FILE_BYTES_MAX {
        return refuse(format!("it is larger than {FILE_BYTES_MAX} bytes"));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & EXPOSED != 0 {
        return refuse(format!(
            "its mode is {mode:04o}, so others may use it; run chmod 600 on it"
        ));
    }
    let owner = metadata.uid();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return refuse(format!("it belongs to user {owner}; run chown on it"));
    }
    Ok(())
}

fn parse(path: &Path, text: &[u8]) -> Result<HashMap<String, Arc<AccessKey>>, KeysError> {
    let refuse = |why: String| KeysError::Invalid { path: path.to_owned(), why };
    let document: Document = from_json(path, text)?;
    let mut keys = HashMap::new();
    for key in document.keys {
        if key.id.is_empty() || key.id.contains([':', '/', ',']) || key.secret.is_empty() {
            return Err(refuse(format!("the key \"{}\" has no valid id or no secret", key.id)));
        }
        let id = key.id.clone();
        if keys.insert(id.clone(), Arc::new(key)).is_some() {
            return Err(refuse(format!("the key \"{id}\" comes twice")));
        }
    }
    Ok(keys)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    const KEYS: &str = r#"{"keys": [{"id": "a", "secret": "s", "projects": ["shop-*", "x"],
        "allow": ["read", "write"], "pass_roles": ["acs:ram::1:role/*"]}]}"#;

    fn write(path: &Path, text: &str, mode: u32) {
        fs::write(path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn patterns() {
        for (pattern, text, expected) in [
            ("*", "", true),
            ("*", "anything", true),
            ("a", "a", true),
            ("a", "ab", false),
            ("a*", "ab", true),
            ("a*b*c", "aXbYc", true),
            ("a*b*c", "abc", true),
            ("a*b*c", "acb", false),
            ("a*a", "a", false),
            ("*x*", "axb", true),
            ("*x*", "ab", false),
            ("", "a", false),
            ("a*bb*b", "abb", false),
        ] {
            assert_eq!(matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn a_key_may_what_the_file_says() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        write(&path, KEYS, 0o600);
        let key = AccessKeys::load(&path).unwrap().find("a").unwrap();
        assert!(key.may(Right::Read, "shop-1") && key.may(Right::Look, "x"));
        assert!(!key.may(Right::Admin, "shop-1") && !key.may(Right::Read, "other"));
        assert!(key.may_pass("acs:ram::1:role/a") && !key.may_pass("acs:ram::2:role/a"));
        assert!(!format!("{key:?}").contains("\"s\""));
    }

    #[test]
    fn a_file_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        for mode in [0o640, 0o604, 0o660] {
            write(&path, KEYS, mode);
            let refusal = AccessKeys::load(&path).unwrap_err();
            assert!(refusal.to_string().contains("chmod 600"), "{refusal}");
        }
        let directory = AccessKeys::load(dir.path()).unwrap_err();
        assert!(directory.to_string().contains("regular file"), "{directory}");
    }

    #[test]
    fn an_error_shows_no_secret() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        for text in [
            r#"{"keys": "hunter2"}"#,
            r#"{"keys": [{"id": "a", "secret": "hunter2", "hunter2": 1}]}"#,
            r#"{"keys": [{"id": "", "secret": "hunter2", "projects": [], "allow": []}]}"#,
            "",
        ] {
            write(&path, text, 0o600);
            let refusal = AccessKeys::load(&path).unwrap_err().to_string();
            assert!(!refusal.contains("hunter2"), "{refusal}");
        }
        let twice =
            KEYS.replace("}]", r#"}, {"id": "a", "secret": "t", "projects": [], "allow": []}]"#);
        write(&path, &twice, 0o600);
        assert!(AccessKeys::load(&path).unwrap_err().to_string().contains("twice"));
    }

    #[test]
    fn a_changed_file_takes_effect_and_a_broken_one_does_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        write(&path, KEYS, 0o600);
        let keys = AccessKeys::load(&path).unwrap();
        assert!(!keys.refresh().unwrap());
        write(&path, &KEYS.replace("\"a\"", "\"bb\""), 0o600);
        assert!(keys.refresh().unwrap());
        assert!(keys.find("a").is_none() && keys.find("bb").is_some());
        write(&path, "{", 0o600);
        keys.refresh().unwrap_err();
        assert!(keys.find("bb").is_some());
        fs::remove_file(&path).unwrap();
        keys.refresh().unwrap_err();
        assert!(keys.find("bb").is_some());
    }

    #[test]
    fn a_change_of_the_file_gives_no_new_allowance() {
        use crate::auth::Use;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        let with = |rate: u32, secret: &str| {
            let text = KEYS.replace("\"s\"", &format!("\"{secret}\""));
            text.replace("}]", &format!(", \"limits\": {{\"requests_per_s\": {rate}}}}}]"))
        };
        write(&path, &with(1, "s"), 0o600);
        let keys = AccessKeys::load(&path).unwrap();
        let (now, spend) = (std::time::Instant::now(), |now| {
            keys.find("a").unwrap().limiter().spend(Use::Other, now)
        });
        spend(now).unwrap();
        spend(now).unwrap_err();
        write(&path, &with(1, "other"), 0o600);
        assert!(keys.refresh().unwrap());
        spend(now).unwrap_err();
        write(&path, &with(2, "other"), 0o600);
        assert!(keys.refresh().unwrap());
        spend(now).unwrap();
    }
}
