//! The end of the log, where records are written.

use std::sync::Arc;

use super::{
    chain::End,
    files::{AuditFiles, is_no_file},
    line::encode_line,
    record::AuditHead,
};
use crate::{Error, Result, epoch::Fence, io::DiskFile};

/// Writes records at the end of the log. A record is one write and one sync.
pub(super) struct Tail {
    files: AuditFiles,
    /// Above this size, in bytes, the next record goes into a new file.
    file_bytes_max: u64,
    /// Checked before and after a record is written; `None` for a log that is only read.
    fence: Option<Arc<Fence>>,
    end: End,
    /// The current file, once it was opened.
    file: Option<Arc<dyn DiskFile>>,
}

impl Tail {
    /// The tail of a log whose end is not known yet.
    pub(super) fn new(files: AuditFiles, file_bytes_max: u64, fence: Option<Arc<Fence>>) -> Self {
        Self { files, file_bytes_max, fence, end: End::empty(), file: None }
    }

    pub(super) fn end(&self) -> &End {
        &self.end
    }

    /// Writes at this end from now on.
    pub(super) fn move_to(&mut self, end: End) {
        self.end = end;
        self.file = None;
    }

    /// The next record goes into a new file.
    pub(super) fn leave(&mut self) {
        self.end.leave();
        self.file = None;
    }

    /// Makes the last record durable unless it is `known`, which the catalogue has. A process that
    /// was killed may have left the record in memory only, or not even have written all of it. So
    /// this writes the record once more and syncs it.
    pub(super) fn make_durable(&mut self, known: &AuditHead) -> Result<()> {
        let current = self.end.current.filter(|_| self.end.head != *known);
        let Some(number) = current else { return Ok(()) };
        let path = self.files.path(number);
        let lines = self.files.lines(number)?;
        let Some(last) = lines.lines.last() else { return Ok(()) };
        let write = || -> std::io::Result<Option<Arc<dyn DiskFile>>> {
            if !self.files.may_continue(&path)? {
                self.files.sync(&path)?;
                return Ok(None);
            }
            let Some(file) = self.files.reopen(&path, self.end.len)? else { return Ok(None) };
            file.write_at(encode_line(&last.json, &last.tag).as_bytes(), last.offset)?;
            file.sync_data()?;
            Ok(Some(file))
        };
        self.file = write().map_err(Error::io("sync the audit log", &path))?;
        Ok(())
    }

    /// Appends a record durably.
    pub(super) fn append(&mut self, json: &str, head: AuditHead) -> Result<()> {
        let line = encode_line(json, &head.tag);
        if self.end.len >= self.file_bytes_max {
            self.leave();
        }
        self.check_fence()?;
        let file = self.file_to_append_to()?;
        let path = self.files.path(self.end.current.unwrap_or(1));
        // A crash may tear the write. The next opener cuts the torn line off.
        let len = self.end.len;
        let written = file
            .write_at(line.as_bytes(), len)
            .and_then(|()| file.sync_data())
            .map_err(Error::io("append to the audit log", &path));
        if let Err(error) = written {
            self.file = None;
            return Err(error);
        }
        self.check_fence()?;
        self.end.len += line.len() as u64;
        self.file = Some(file);
        self.end.head = head;
        Ok(())
    }

    fn check_fence(&self) -> Result<()> {
        self.fence.as_ref().map_or(Ok(()), |fence| fence.check())
    }

    /// The current file, or the next one if it may not be continued.
    fn file_to_append_to(&mut self) -> Result<Arc<dyn DiskFile>> {
        if let Some(number) = self.end.current {
            let path = self.files.path(number);
            let open = || -> std::io::Result<Option<Arc<dyn DiskFile>>> {
                if !self.files.may_continue(&path)? {
                    return Ok(None);
                }
                match self.file.clone() {
                    Some(file) => Ok(Some(file)),
                    None => self.files.reopen(&path, self.end.len),
                }
            };
            match open() {
                Ok(Some(file)) => return Ok(file),
                Err(error) if !is_no_file(&error) => {
                    return Err(Error::io("open the audit log", &path)(error));
                }
                _ => self.leave(),
            }
        }
        self.next_file()
    }

    /// Begins the next file, under the first name above the files so far that is free or has an
    /// empty file. If no name above them is free, the file gets a name below them.
    fn next_file(&mut self) -> Result<Arc<dyn DiskFile>> {
        let names = self.files.names()?;
        let above = self.end.after.saturating_add(1);
        for number in (above..=u32::MAX).chain(1..above) {
            let path = self.files.path(number);
            let usable = match names.get(&number) {
                None => self.files.create(&path),
                Some(true) => self.files.reuse(&path),
                Some(false) => Ok(None),
            };
            let usable = usable.map_err(Error::io("open the audit log", &path))?;
            let Some(file) = usable else { continue };
            // The process that made an empty file may have died before it synced the directory.
            self.files.sync_dir()?;
            self.end.current = Some(number);
            self.file = Some(Arc::clone(&file));
            self.end.len = 0;
            return Ok(file);
        }
        Err(Error::TooMany { what: "files in the audit log", limit: u64::from(u32::MAX) })
    }
}

#[cfg(test)]
impl Tail {
    pub(super) fn reopened(&self) -> Self {
        Self::new(self.files.clone(), self.file_bytes_max, None)
    }
}
