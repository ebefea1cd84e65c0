//! The directory in which the service keeps its own state: documents that are replaced as a whole.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Serialize, de::DeserializeOwned};

/// The largest document, in bytes.
const DOCUMENT_BYTES_MAX: u64 = 16 << 20;
const EXTENSION: &str = "json";
const UNFINISHED: &str = "tmp";

/// The reason why the state cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// The system failed an operation.
    #[error("cannot {op} {}: {source}", path.display())]
    Io {
        /// The operation.
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// A document is damaged, or another program has written it.
    #[error("{} is not a document of this service: {why}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The fault.
        why: String,
    },
}

type Result<T> = std::result::Result<T, StateError>;

fn failed(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError::Io { op, path, source }
}

/// A directory of documents. All of its methods block for file I/O.
#[derive(Clone, Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// Opens the directory, or makes it, with mode 0700.
    pub(crate) fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        match DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => sync_dir(path.parent().unwrap_or(Path::new(".")))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(failed("create", &path)(error)),
        }
        let metadata = path.symlink_metadata().map_err(failed("look at", &path))?;
        if !metadata.is_dir() {
            return Err(StateError::Damaged { path, why: "it is not a directory".to_owned() });
        }
        Ok(Self { path })
    }

    /// A directory within this one.
    pub(crate) fn within(&self, name: &str) -> Result<Self> {
        Self::open(self.path.join(name))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.{EXTENSION}"))
    }

    /// The document of this name, if there is one.
    pub(crate) fn load<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let path = self.file(name);
        // A named pipe or a symbolic link is nothing that this service has made.
        let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits();
        let opened = OpenOptions::new().read(true).custom_flags(flags as i32).open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed("open", &path)(error)),
        };
        let damaged = |why: String| StateError::Damaged { path: path.clone(), why };
        let metadata = file.metadata().map_err(failed("look at", &path))?;
        if !metadata.is_file() || metadata.len() > DOCUMENT_BYTES_MAX {
            return Err(damaged("it is no regular file, or too large".to_owned()));
        }
        let mut text = Vec::new();
        file.take(DOCUMENT_BYTES_MAX).read_to_end(&mut text).map_err(failed("read", &path))?;
        serde_json::from_slice(&text).map(Some).map_err(|error| damaged(error.to_string()))
    }

    /// Replaces the document of this name. When this returns, the new one is durable. Two callers
    /// must not write the same document at once.
    pub(crate) fn save(&self, name: &str, document: &impl Serialize) -> Result<()> {
        let path = self.file(name);
        let unfinished = path.with_extension(UNFINISHED);
        let text = serde_json::to_vec(document)
            .map_err(|error| StateError::Damaged { path: path.clone(), why: error.to_string() })?;
        // A crash leaves a file of this name. It is removed and not written to: it might be a link.
        remove_file(&unfinished)?;
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished);
        let mut file = file.map_err(failed("create", &unfinished))?;
        file.write_all(&text).map_err(failed("write", &unfinished))?;
        file.sync_all().map_err(failed("sync", &unfinished))?;
        fs::rename(&unfinished, &path).map_err(failed("rename", &unfinished))?;
        sync_dir(&self.path)
    }

    /// Removes the document of this name, if there is one.
    pub(crate) fn remove(&self, name: &str) -> Result<()> {
        remove_file(&self.file(name))?;
        sync_dir(&self.path)
    }

    /// Removes the directory and the documents in it.
    pub(crate) fn remove_all(self) -> Result<()> {
        for name in self.names()? {
            remove_file(&self.file(&name))?;
        }
        // Something that this service has not made stays, and so does the directory.
        match fs::remove_dir(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => {
                Err(failed("remove", &self.path)(error))
            }
            _ => sync_dir(self.path.parent().unwrap_or(Path::new("."))),
        }
    }

    /// The names of the documents.
    pub(crate) fn names(&self) -> Result<Vec<String>> {
        let names = self
            .entries()?
            .into_iter()
            .filter_map(|name| name.strip_suffix(EXTENSION)?.strip_suffix('.').map(str::to_owned));
        Ok(names.collect())
    }

    /// The names in the directory.
    pub(crate) fn entries(&self) -> Result<Vec<String>> {
        let entries = fs::read_dir(&self.path).map_err(failed("read", &self.path))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(failed("read", &self.path))?;
            names.extend(entry.file_name().into_string().ok());
        }
        names.sort();
        Ok(names)
    }
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove", path)(error)),
        _ => Ok(()),
    }
}

fn sync_dir(path: &Path) -> Result<()> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    File::open(path).and_then(|dir| dir.sync_all()).map_err(failed("sync", path))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_document_is_replaced_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path().join("state")).unwrap();
        assert_eq!(state.load::<Vec<u32>>("a").unwrap(), None);
        state.save("a", &[1]).unwrap();
        // A crash in the middle of a change leaves this.
        fs::write(dir.path().join("state/a.tmp"), "[").unwrap();
        assert_eq!(state.load::<Vec<u32>>("a").unwrap(), Some(vec![1]));
        state.save("a", &[2]).unwrap();
        assert_eq!(state.load::<Vec<u32>>("a").unwrap(), Some(vec![2]));
        assert_eq!(state.names().unwrap(), ["a"]);
        let mode = |name: &str| dir.path().join(name).metadata().unwrap().permissions().mode();
        assert_eq!((mode("state") & 0o777, mode("state/a.json") & 0o777), (0o700, 0o600));
        state.remove("a").unwrap();
        assert_eq!(state.load::<Vec<u32>>("a").unwrap(), None);
        state.remove_all().unwrap();
        assert!(!dir.path().join("state").exists());
    }

    #[test]
    fn what_the_service_has_not_made_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(dir.path().join("state")).unwrap();
        let outside = dir.path().join("outside");
        fs::write(&outside, "[1]").unwrap();
        symlink(&outside, dir.path().join("state/link.json")).unwrap();
        symlink(&outside, dir.path().join("state/a.tmp")).unwrap();
        fs::write(dir.path().join("state/bad.json"), "{").unwrap();
        fs::create_dir(dir.path().join("state/dir.json")).unwrap();
        for name in ["link", "bad", "dir"] {
            assert!(state.load::<Vec<u32>>(name).is_err(), "{name}");
        }
        state.save("a", &[2]).unwrap();
        assert_eq!(fs::read(&outside).unwrap(), b"[1]");
        assert!(StateDir::open(&outside).is_err());
    }
}
