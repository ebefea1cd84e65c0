//! A disk whose writes to some files hang.

use std::{
    io,
    path::Path,
    sync::{Arc, Condvar, Mutex},
};

use envelog::io::{Access, DirEntry, Disk, DiskFile, FileStat, Map, OpenMode};

use super::QuickDisk;

/// Writes to files whose names end with a text hang while the flag is set.
#[derive(Clone, Debug)]
pub(crate) struct HangingDisk {
    ending: &'static str,
    /// The flag, and the number of hanging writes.
    state: Arc<(Mutex<(bool, u64)>, Condvar)>,
}

impl HangingDisk {
    pub(crate) fn of(ending: &'static str) -> Self {
        Self { ending, state: Arc::default() }
    }

    pub(crate) fn hang(&self, hang: bool) {
        self.state.0.lock().unwrap().0 = hang;
        self.state.1.notify_all();
    }

    pub(crate) fn hanging(&self) -> u64 {
        self.state.0.lock().unwrap().1
    }

    fn pass(&self) {
        let mut state = self.state.0.lock().unwrap();
        state.1 += 1;
        while state.0 {
            state = self.state.1.wait(state).unwrap();
        }
        state.1 -= 1;
    }
}

#[derive(Debug)]
struct HangingFile(Arc<dyn DiskFile>, HangingDisk);

impl Disk for HangingDisk {
    fn beneath(&self, _dir: &Path, _access: Access) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(self.clone()))
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let file = QuickDisk.open(path, mode)?;
        let hangs = path.to_string_lossy().ends_with(self.ending);
        Ok(if hangs { Arc::new(HangingFile(file, self.clone())) } else { file })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        QuickDisk.rename(from, to)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        QuickDisk.rename_new(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        QuickDisk.remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        QuickDisk.create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        QuickDisk.remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        QuickDisk.sync_dir(path)
    }

    fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        QuickDisk.list_dir(path)
    }

    fn stat(&self, path: &Path) -> io::Result<Option<FileStat>> {
        QuickDisk.stat(path)
    }
}

impl DiskFile for HangingFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.1.pass();
        self.0.write_at(buf, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn stat(&self) -> io::Result<FileStat> {
        self.0.stat()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn try_lock(&self) -> io::Result<bool> {
        self.0.try_lock()
    }

    fn map(&self) -> io::Result<Map> {
        self.0.map()
    }
}
