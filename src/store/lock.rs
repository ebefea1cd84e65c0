//! The advisory lock of the process that writes a store.

use std::{path::Path, sync::Arc};

use crate::{
    Error, Result,
    io::{Disk, DiskFile, OpenMode},
};

/// The name of the file.
pub(super) const NAME: &str = "LOCK";
/// The longest contents of a `LOCK` file that this code writes: a process number and a newline.
const CONTENTS_MAX: usize = 16;

/// The lock of a store, held until it is dropped.
#[derive(Debug)]
pub(super) struct StoreLock {
    file: Arc<dyn DiskFile>,
    /// Whether the file has the number of this process.
    noted: bool,
    /// Whether the previous writer has closed the store, according to the file.
    clean: bool,
}

impl StoreLock {
    /// Takes the lock, if the store has a `LOCK` file. Does not change the file.
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::WrongFileType`], [`Error::Io`].
    pub(super) fn take(disk: &dyn Disk, dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(NAME);
        let file = match disk.open(&path, OpenMode::ReadWrite) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(Error::io("open", &path))?,
        };
        if !file.try_lock().map_err(Error::io("lock", &path))? {
            let pid = contents(&*file).and_then(|text| text.trim_ascii_end().parse().ok());
            return Err(Error::Locked { path: dir.to_owned(), pid });
        }
        let clean = file.len().is_ok_and(|len| len == 0);
        Ok(Some(Self { file, noted: false, clean }))
    }

    /// Takes the lock, and creates the `LOCK` file if there is none.
    ///
    /// # Errors
    /// As [`StoreLock::take`].
    pub(super) fn take_or_create(disk: &dyn Disk, dir: &Path) -> Result<Self> {
        if let Some(lock) = Self::take(disk, dir)? {
            return Ok(lock);
        }
        let path = dir.join(NAME);
        match disk.open(&path, OpenMode::CreateNew) {
            // Another process has created the file. The process that gets the lock has the store.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => drop(made.map_err(Error::io("create", &path))?),
        }
        let lock = Self::take(disk, dir)?
            .ok_or_else(|| Error::io("open", &path)(std::io::ErrorKind::NotFound.into()))?;
        // Another process may hold a lock on a `LOCK` file that was removed.
        Ok(Self { clean: false, ..lock })
    }

    /// Whether the previous writer has closed the store. If not, it may still run.
    pub(super) fn is_clean(&self) -> bool {
        self.clean
    }

    /// Writes the number of this process into the file, for operators. Does not change a file with
    /// other contents, or with a second name.
    pub(super) fn note_process(&mut self) {
        let ours =
            self.file.stat().is_ok_and(|stat| stat.links == 1) && contents(&*self.file).is_some();
        if ours {
            let pid = format!("{}\n", std::process::id());
            // Best effort: no code depends on the number.
            self.noted =
                self.file.set_len(0).and_then(|()| self.file.write_at(pid.as_bytes(), 0)).is_ok();
        }
    }

    /// Releases the lock. Empties the file, so that a store at rest has no unauthenticated bytes.
    pub(super) fn release(self) {
        if self.noted {
            // Best effort: dropping the file releases the lock.
            let _ = self.file.set_len(0);
        }
    }
}

/// The contents of a `LOCK` file that is empty or has a process number.
fn contents(file: &dyn DiskFile) -> Option<String> {
    let mut bytes = [0; CONTENTS_MAX + 1];
    let read = file.read_at(&mut bytes, 0).ok()?;
    let text = std::str::from_utf8(bytes.get(..read)?).ok()?;
    let number = text.strip_suffix('\n').unwrap_or(text);
    (read <= CONTENTS_MAX && number.bytes().all(|byte| byte.is_ascii_digit()))
        .then(|| text.to_owned())
}
