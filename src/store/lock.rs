//! The advisory lock of the one process that writes a store.

use std::{path::Path, sync::Arc};

use crate::{
    Error, Result,
    io::{Disk, DiskFile, OpenMode},
};

/// The longest contents of a `LOCK` file that this code wrote: a process number and a newline.
const CONTENTS_MAX: usize = 16;

/// The lock of a store, held until it is dropped.
#[derive(Debug)]
pub(super) struct StoreLock {
    file: Arc<dyn DiskFile>,
    /// Whether the file holds this process' number.
    noted: bool,
    /// Whether the process before this one has closed the store, as far as the file tells.
    clean: bool,
}

impl StoreLock {
    /// Takes the lock, if the store has a `LOCK` file. Does not change the file.
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::WrongFileType`], [`Error::Io`].
    pub(super) fn take(disk: &dyn Disk, dir: &Path) -> Result<Option<Self>> {
        let path = dir.join("LOCK");
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

    /// Takes the lock, and makes the `LOCK` file if there is none.
    ///
    /// # Errors
    /// As [`StoreLock::take`].
    pub(super) fn take_or_create(disk: &dyn Disk, dir: &Path) -> Result<Self> {
        if let Some(lock) = Self::take(disk, dir)? {
            return Ok(lock);
        }
        let path = dir.join("LOCK");
        match disk.open(&path, OpenMode::CreateNew) {
            // Another process was quicker. Whichever takes the lock has the store.
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
            made => drop(made.map_err(Error::io("create", &path))?),
        }
        let lock =
            Self::take(disk, dir)?.ok_or_else(|| Error::io("open", &path)(std::io::ErrorKind::NotFound.into()))?;
        // The one that another process may hold was removed.
        Ok(Self { clean: false, ..lock })
    }

    /// Whether the process before this one has closed the store. If not, it may still run.
    pub(super) fn is_clean(&self) -> bool {
        self.clean
    }

    /// Writes this process' number into the file, for people. A file with other contents, or with another name, is left alone.
    pub(super) fn note_process(&mut self) {
        let ours = self.file.stat().is_ok_and(|stat| stat.links == 1) && contents(&*self.file).is_some();
        if ours {
            let pid = format!("{}\n", std::process::id());
            // Best effort: nothing depends on it.
            self.noted = self.file.set_len(0).and_then(|()| self.file.write_at(pid.as_bytes(), 0)).is_ok();
        }
    }

    /// Lets go of the lock. The file is emptied, so that a store at rest holds nothing unauthenticated.
    pub(super) fn release(self) {
        if self.noted {
            // Best effort: the lock itself goes with the file.
            let _ = self.file.set_len(0);
        }
    }
}

/// What a `LOCK` file holds, if it is empty or a process number.
fn contents(file: &dyn DiskFile) -> Option<String> {
    let mut bytes = [0; CONTENTS_MAX + 1];
    let read = file.read_at(&mut bytes, 0).ok()?;
    let text = std::str::from_utf8(bytes.get(..read)?).ok()?;
    let number = text.strip_suffix('\n').unwrap_or(text);
    (read <= CONTENTS_MAX && number.bytes().all(|byte| byte.is_ascii_digit())).then(|| text.to_owned())
}
