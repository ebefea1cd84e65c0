//! A disk that fails at the n-th operation, or at the files that a test names.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use envelog::io::{Access, DirEntry, Disk, DiskFile, FileStat, Map, OpenMode};

use super::QuickDisk;

/// How an operation fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The operation has no effect and reports a failure. Later operations succeed.
    Once,
    /// The operation takes effect and reports a failure, so the outcome of a sync or a rename is
    /// unknown.
    Unsaid,
    /// Half of a write is done, and all later operations fail, as after the death of the process or
    /// the machine.
    Death,
}

impl Failure {
    pub(crate) const ALL: [Self; 3] = [Self::Once, Self::Unsaid, Self::Death];
}

#[derive(Debug, Default)]
struct Plan {
    /// The network file system that the disk claims to be.
    network: Option<&'static str>,
    /// The number of operations that still succeed, and then the failure.
    countdown: Option<(u64, Option<Failure>)>,
    dead: bool,
    /// Operations on paths that contain all of these texts fail.
    broken: Option<Vec<String>>,
    /// Completed renames (by the new name) and directory syncs, in order.
    published: Vec<(Published, PathBuf)>,
    /// The order in which directories are listed.
    order: Option<fn(&DirEntry, &DirEntry) -> std::cmp::Ordering>,
}

/// The two steps of publishing a file: renaming it and making the rename durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Published {
    Renamed,
    Synced,
}

/// The test disk that fails on request.
#[derive(Clone, Debug, Default)]
pub(crate) struct FailingDisk {
    plan: Arc<Mutex<Plan>>,
    fired: Arc<AtomicBool>,
}

/// The outcome of an operation.
enum Fate {
    Works,
    Fails { done: bool, torn: bool },
}

fn failed() -> io::Error {
    io::Error::other("the disk was told to fail")
}

impl FailingDisk {
    /// Makes the operation after `count` others fail.
    pub(crate) fn fail_after(&self, count: u64, failure: Failure) {
        self.fired.store(false, Ordering::SeqCst);
        self.plan.lock().unwrap().countdown = Some((count, Some(failure)));
    }

    /// Makes operations succeed again, except after [`Failure::Death`].
    pub(crate) fn disarm(&self) {
        self.plan.lock().unwrap().countdown = None;
    }

    /// Whether an operation has failed since [`FailingDisk::fail_after`].
    pub(crate) fn has_failed(&self) -> bool {
        self.fired.load(Ordering::SeqCst)
    }

    /// Makes every operation on a path that contains `part` fail; `None` ends this.
    pub(crate) fn break_paths(&self, part: Option<&str>) {
        self.plan.lock().unwrap().broken = part.map(|part| vec![part.to_owned()]);
    }

    /// Makes every operation on a path that contains all of these parts fail.
    pub(crate) fn break_paths_with(&self, parts: &[&str]) {
        self.plan.lock().unwrap().broken =
            Some(parts.iter().map(|part| (*part).to_owned()).collect());
    }

    /// Makes the disk claim to be this network file system.
    pub(crate) fn be_on(&self, network: &'static str) {
        self.plan.lock().unwrap().network = Some(network);
    }

    /// Lists directories in this order from now on.
    pub(crate) fn list_in_order(&self, order: fn(&DirEntry, &DirEntry) -> std::cmp::Ordering) {
        self.plan.lock().unwrap().order = Some(order);
    }

    /// Every rename (by the new name) and every directory sync so far.
    pub(crate) fn published(&self) -> Vec<(Published, PathBuf)> {
        self.plan.lock().unwrap().published.clone()
    }

    fn publish(&self, how: Published, path: &Path) {
        self.plan.lock().unwrap().published.push((how, path.to_owned()));
    }

    fn fate(&self, path: &Path) -> Fate {
        let mut plan = self.plan.lock().unwrap();
        let path = path.to_string_lossy();
        let broken = plan
            .broken
            .as_ref()
            .is_some_and(|parts| parts.iter().all(|part| path.contains(part.as_str())));
        if plan.dead || broken {
            return Fate::Fails { done: false, torn: false };
        }
        let Some((left, failure)) = &mut plan.countdown else { return Fate::Works };
        if *left > 0 {
            *left -= 1;
            return Fate::Works;
        }
        let Some(failure) = failure.take() else { return Fate::Works };
        plan.countdown = None;
        plan.dead = failure == Failure::Death;
        self.fired.store(true, Ordering::SeqCst);
        Fate::Fails { done: failure == Failure::Unsaid, torn: failure == Failure::Death }
    }

    fn run<T>(&self, path: &Path, operation: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        match self.fate(path) {
            Fate::Works => operation(),
            Fate::Fails { done, .. } => {
                if done {
                    operation()?;
                }
                Err(failed())
            }
        }
    }
}

#[derive(Debug)]
struct FailingFile {
    file: Arc<dyn DiskFile>,
    path: PathBuf,
    disk: FailingDisk,
}

impl Disk for FailingDisk {
    fn beneath(&self, dir: &Path, _access: Access) -> io::Result<Arc<dyn Disk>> {
        self.run(dir, || QuickDisk.list_dir(dir))?;
        Ok(Arc::new(self.clone()))
    }

    fn network_file_system(&self, dir: &Path) -> io::Result<Option<&'static str>> {
        self.run(dir, || Ok(self.plan.lock().unwrap().network))
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let file = self.run(path, || QuickDisk.open(path, mode))?;
        Ok(Arc::new(FailingFile { file, path: path.to_owned(), disk: self.clone() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.run(to, || QuickDisk.rename(from, to))
            .inspect(|()| self.publish(Published::Renamed, to))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.run(to, || QuickDisk.rename_new(from, to))
            .inspect(|()| self.publish(Published::Renamed, to))
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.run(path, || QuickDisk.remove_file(path))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.run(path, || QuickDisk.create_dir(path))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.run(path, || QuickDisk.remove_dir(path))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.run(path, || QuickDisk.sync_dir(path))
            .inspect(|()| self.publish(Published::Synced, path))
    }

    fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let mut entries = self.run(path, || QuickDisk.list_dir(path))?;
        if let Some(order) = self.plan.lock().unwrap().order {
            entries.sort_by(order);
        }
        Ok(entries)
    }

    fn stat(&self, path: &Path) -> io::Result<Option<FileStat>> {
        self.run(path, || QuickDisk.stat(path))
    }
}

impl DiskFile for FailingFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.disk.run(&self.path, || self.file.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        match self.disk.fate(&self.path) {
            Fate::Works => self.file.write_at(buf, offset),
            Fate::Fails { done, torn } => {
                let written = if done { buf.len() } else { buf.len() / 2 * usize::from(torn) };
                self.file.write_at(&buf[..written], offset)?;
                Err(failed())
            }
        }
    }

    fn sync_data(&self) -> io::Result<()> {
        self.disk.run(&self.path, || self.file.sync_data())
    }

    fn len(&self) -> io::Result<u64> {
        self.disk.run(&self.path, || self.file.len())
    }

    fn stat(&self) -> io::Result<FileStat> {
        self.disk.run(&self.path, || self.file.stat())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.disk.run(&self.path, || self.file.set_len(len))
    }

    fn try_lock(&self) -> io::Result<bool> {
        self.file.try_lock()
    }

    fn map(&self) -> io::Result<Map> {
        self.disk.run(&self.path, || self.file.map())
    }
}
