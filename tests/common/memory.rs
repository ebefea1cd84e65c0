//! A file system in memory that is cheap to copy, damage and inspect.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use super::catalogue::newest;
use envelog::io::{Access, DirEntry, Disk, DiskFile, FileKind, FileStat, Map, OpenMode};

/// A snapshot of a [`MemoryDisk`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Image {
    pub(crate) files: BTreeMap<PathBuf, Vec<u8>>,
    pub(crate) dirs: BTreeSet<PathBuf>,
}

impl Image {
    /// A copy with other bytes in one file.
    pub(crate) fn with(&self, path: &Path, bytes: Vec<u8>) -> Self {
        let mut image = self.clone();
        image.files.insert(path.to_owned(), bytes);
        image
    }

    /// A copy without one file.
    pub(crate) fn without(&self, path: &Path) -> Self {
        let mut image = self.clone();
        image.files.remove(path).expect("there is such a file");
        image
    }

    /// The newest catalogue file.
    pub(crate) fn catalogue_file(&self, store_dir: &Path) -> PathBuf {
        newest(store_dir, self.files.keys().cloned()).expect("a store has a catalogue")
    }

    /// A copy with everything below `dir` taken from `other`.
    pub(crate) fn with_dir_of(&self, dir: &Path, other: &Self) -> Self {
        let below = |path: &PathBuf| path.starts_with(dir);
        let mut image = self.clone();
        image.files.retain(|path, _| !below(path));
        image.dirs.retain(|path| !below(path));
        image.files.extend(
            other.files.iter().filter(|(path, _)| below(path)).map(|(p, b)| (p.clone(), b.clone())),
        );
        image.dirs.extend(other.dirs.iter().filter(|path| below(path)).cloned());
        image
    }
}

/// A write request.
#[derive(Clone, Debug)]
pub(crate) struct Written {
    pub(crate) path: PathBuf,
    pub(crate) bytes: Vec<u8>,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<PathBuf, Arc<Contents>>,
    dirs: BTreeSet<PathBuf>,
}

#[derive(Debug)]
struct Contents {
    identity: u64,
    bytes: Mutex<Vec<u8>>,
}

impl Contents {
    fn new(bytes: Vec<u8>) -> Arc<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self { identity: NEXT.fetch_add(1, Ordering::Relaxed), bytes: Mutex::new(bytes) })
    }

    fn stat(&self) -> FileStat {
        let len = self.bytes.lock().unwrap().len() as u64;
        FileStat { kind: FileKind::File, len, identity: self.identity, links: 1, owner: None }
    }
}

/// A file system in memory. Every directory outside of its contents appears to exist.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemoryDisk {
    state: Arc<Mutex<State>>,
    /// Every write so far, if recording is on.
    written: Option<Arc<Mutex<Vec<Written>>>>,
}

impl MemoryDisk {
    pub(crate) fn of(image: &Image) -> Arc<Self> {
        let files = image
            .files
            .iter()
            .map(|(path, bytes)| (path.clone(), Contents::new(bytes.clone())))
            .collect();
        let state = State { files, dirs: image.dirs.clone() };
        Arc::new(Self { state: Arc::new(Mutex::new(state)), written: None })
    }

    /// An empty disk that records every write, even if the file is later removed.
    pub(crate) fn recording() -> Arc<Self> {
        Arc::new(Self { state: Arc::default(), written: Some(Arc::default()) })
    }

    pub(crate) fn image(&self) -> Image {
        let state = self.state.lock().unwrap();
        let files = state
            .files
            .iter()
            .map(|(path, file)| (path.clone(), file.bytes.lock().unwrap().clone()))
            .collect();
        Image { files, dirs: state.dirs.clone() }
    }

    /// Replaces the bytes of a file, unseen by its open handles.
    pub(crate) fn overwrite(&self, path: &Path, bytes: Vec<u8>) {
        *self.state.lock().unwrap().files[path].bytes.lock().unwrap() = bytes;
    }

    pub(crate) fn writes(&self) -> Vec<Written> {
        self.written.as_ref().expect("a recording disk").lock().unwrap().clone()
    }
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Disk for MemoryDisk {
    fn beneath(&self, _dir: &Path, _access: Access) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(self.clone()))
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.state.lock().unwrap();
        let contents = match (state.files.get(path), mode) {
            (Some(contents), OpenMode::Read | OpenMode::ReadWrite) => Arc::clone(contents),
            (None, OpenMode::Read | OpenMode::ReadWrite) => return Err(not_found()),
            (Some(_), _) => return Err(io::ErrorKind::AlreadyExists.into()),
            (None, _) => {
                let contents = Contents::new(Vec::new());
                state.files.insert(path.to_owned(), Arc::clone(&contents));
                contents
            }
        };
        Ok(Arc::new(MemoryFile { contents, path: path.to_owned(), written: self.written.clone() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        let contents = state.files.remove(from).ok_or_else(not_found)?;
        state.files.insert(to.to_owned(), contents);
        Ok(())
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        let taken = self.state.lock().unwrap().files.contains_key(to);
        if taken { Err(io::ErrorKind::AlreadyExists.into()) } else { self.rename(from, to) }
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.state.lock().unwrap().files.remove(path).map(|_| ()).ok_or_else(not_found)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        match self.state.lock().unwrap().dirs.insert(path.to_owned()) {
            true => Ok(()),
            false => Err(io::ErrorKind::AlreadyExists.into()),
        }
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        match self.state.lock().unwrap().dirs.remove(path) {
            true => Ok(()),
            false => Err(not_found()),
        }
    }

    fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let state = self.state.lock().unwrap();
        if !state.dirs.contains(path) {
            return Err(not_found());
        }
        let inside = |entry: &&PathBuf| entry.parent() == Some(path);
        let entry = |path: &PathBuf, kind| {
            let name =
                path.file_name().expect("an entry has a name").to_string_lossy().into_owned();
            DirEntry { name, kind }
        };
        let files = state.files.keys().filter(inside).map(|path| entry(path, FileKind::File));
        Ok(files
            .chain(state.dirs.iter().filter(inside).map(|path| entry(path, FileKind::Directory)))
            .collect())
    }

    fn stat(&self, path: &Path) -> io::Result<Option<FileStat>> {
        let state = self.state.lock().unwrap();
        if let Some(contents) = state.files.get(path) {
            return Ok(Some(contents.stat()));
        }
        let dir =
            FileStat { kind: FileKind::Directory, len: 0, identity: 0, links: 1, owner: None };
        Ok(state.dirs.contains(path).then_some(dir))
    }
}

#[derive(Debug)]
struct MemoryFile {
    contents: Arc<Contents>,
    /// The path under which it was opened.
    path: PathBuf,
    written: Option<Arc<Mutex<Vec<Written>>>>,
}

impl DiskFile for MemoryFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let bytes = self.contents.bytes.lock().unwrap();
        let rest = bytes.get(offset as usize..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if let Some(written) = &self.written {
            written.lock().unwrap().push(Written { path: self.path.clone(), bytes: buf.to_vec() });
        }
        let mut bytes = self.contents.bytes.lock().unwrap();
        let (from, to) = (offset as usize, offset as usize + buf.len());
        if bytes.len() < to {
            bytes.resize(to, 0);
        }
        bytes[from..to].copy_from_slice(buf);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.contents.bytes.lock().unwrap().len() as u64)
    }

    fn stat(&self) -> io::Result<FileStat> {
        Ok(self.contents.stat())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.contents.bytes.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }

    fn try_lock(&self) -> io::Result<bool> {
        Ok(true)
    }

    fn map(&self) -> io::Result<Map> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
