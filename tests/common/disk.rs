//! A simulated file system in memory. It separates the state that programs see from the durable
//! state, counts operations, makes chosen ones fail, and simulates a power loss.
//!
//! Its only assumptions about a disk are those of `docs/testing.md`: a sector is written completely
//! or not at all, a sync that returned has made everything durable, and a rename atomically
//! replaces one name by another.

#![allow(dead_code, clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    io,
    path::{Component, Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard},
};

use envelog::{
    EncryptConf, Logstore, Store, StoreBuilder,
    io::{Access, DirEntry, Disk, DiskFile, FileKind, FileStat, Map, OpenMode, RealDisk},
};

use super::{
    Answer, World,
    catalogue::{catalogue_dir, newest},
    secs,
};

/// The kind of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    Create,
    Write,
    Sync,
    SetLen,
    Allocate,
    Rename,
    Remove,
    CreateDir,
    RemoveDir,
    SyncDir,
    /// Opens an existing file.
    Open,
    Read,
    Len,
    Lock,
    List,
    Stat,
}

impl Op {
    /// Whether it changes the disk or its durable state. Only such operations are numbered.
    pub(crate) fn changes(self) -> bool {
        !matches!(self, Op::Open | Op::Read | Op::Len | Op::Lock | Op::List | Op::Stat)
    }

    /// Whether it may need space.
    fn fills(self) -> bool {
        matches!(
            self,
            Op::Create
                | Op::Write
                | Op::Sync
                | Op::SetLen
                | Op::Allocate
                | Op::Rename
                | Op::CreateDir
                | Op::SyncDir
        )
    }
}

/// An operation before its execution.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) op: Op,
    pub(crate) path: PathBuf,
    /// The number of the change, from 1; for an operation without a change, the number of the last
    /// change.
    pub(crate) number: u64,
    /// The number of the operation among all operations, from 1.
    pub(crate) nth: u64,
}

impl Call {
    /// Whether it concerns a file or directory of that name, or a temporary file for it.
    pub(crate) fn is_about(&self, part: &str) -> bool {
        self.path.to_string_lossy().contains(part)
    }
}

/// The outcome of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Go,
    /// Fails after a part. A write has written half of its data. The data of a failed sync never
    /// becomes durable, although it can still be read.
    Fail(io::ErrorKind),
    /// Fails without any effect.
    Refuse(io::ErrorKind),
    /// Takes effect, and reports a failure.
    DoneAndFail,
}

/// The ways an operation can fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// EIO: a write writes half of its data. The pages of a failed sync are marked clean and never
    /// written back.
    Failing,
    /// ENOSPC, with the same effects, for operations that need space: a short write.
    Full,
    /// EINTR: no effect.
    Interrupted,
    /// EACCES: no effect.
    Denied,
    /// The operation takes effect but returns EIO, so the caller cannot know its outcome.
    Unsaid,
}

impl Fault {
    pub(crate) const ALL: [Self; 5] =
        [Self::Failing, Self::Full, Self::Interrupted, Self::Denied, Self::Unsaid];

    /// Whether an operation can fail in this way.
    pub(crate) fn befalls(self, op: Op) -> bool {
        match self {
            Self::Failing => true,
            Self::Full => op.fills(),
            Self::Interrupted => {
                matches!(op, Op::Open | Op::Create | Op::Read | Op::Write | Op::Sync | Op::SyncDir)
            }
            Self::Denied => {
                !matches!(op, Op::Read | Op::Write | Op::Sync | Op::Len | Op::SetLen | Op::Lock)
            }
            Self::Unsaid => op.changes(),
        }
    }

    fn verdict(self) -> Verdict {
        match self {
            Self::Failing => Verdict::Fail(io::ErrorKind::Other),
            Self::Full => Verdict::Fail(io::ErrorKind::StorageFull),
            Self::Interrupted => Verdict::Refuse(io::ErrorKind::Interrupted),
            Self::Denied => Verdict::Refuse(io::ErrorKind::PermissionDenied),
            Self::Unsaid => Verdict::DoneAndFail,
        }
    }
}

/// The state after a crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Survives {
    /// The process was killed: all data remains.
    Everything,
    /// Power loss, before the system wrote back any unsynced data.
    Synced,
    /// Power loss during write-back: any part of the unsynced data is present, in any order, torn
    /// at sector boundaries.
    Some { seed: u64 },
}

type Hook = Arc<Mutex<dyn FnMut(&Call) -> Verdict + Send>>;

type Catches = Box<dyn FnMut(&Call) -> bool + Send>;

/// Operations that do not return until they are released. Each of them takes effect then.
pub(crate) struct Hang {
    catches: Mutex<Catches>,
    held: Mutex<Held>,
    changed: Condvar,
}

#[derive(Default)]
struct Held {
    calls: Vec<Call>,
    released: bool,
}

impl Hang {
    fn enter(&self, call: &Call) {
        if !(*self.catches.lock().unwrap())(call) {
            return;
        }
        let mut held = self.held.lock().unwrap();
        if held.released {
            return;
        }
        held.calls.push(call.clone());
        self.changed.notify_all();
        // A test that fails does not release it.
        let hangs = |held: &mut Held| !held.released;
        drop(self.changed.wait_timeout_while(held, secs(60), hangs).unwrap());
    }

    /// Waits until this many operations have hung, and returns them.
    pub(crate) fn wait_for(&self, count: usize) -> Vec<Call> {
        let held = self.held.lock().unwrap();
        let few = |held: &mut Held| held.calls.len() < count;
        let (held, waited) = self.changed.wait_timeout_while(held, secs(20), few).unwrap();
        assert!(!waited.timed_out(), "{} of {count} operations hang", held.calls.len());
        held.calls.clone()
    }

    /// Has every operation return, now and later.
    pub(crate) fn release(&self) {
        self.held.lock().unwrap().released = true;
        self.changed.notify_all();
    }
}

/// The unit of an atomic write, in bytes.
const SECTOR: u64 = 512;
/// The unit in which space is taken, in bytes.
const PAGE: u64 = 4096;
/// How many entries of a directory fit into a page.
const ENTRIES_PER_PAGE: u64 = 32;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Node {
    Dir(u64),
    File(u64),
}

impl Node {
    fn kind(self) -> FileKind {
        match self {
            Node::Dir(_) => FileKind::Directory,
            Node::File(_) => FileKind::File,
        }
    }
}

type Entries = BTreeMap<String, Node>;

/// A change of a directory entry.
#[derive(Clone)]
enum Entry {
    Put(String, Node),
    Gone(String),
    Moved(String, String, Node),
}

#[derive(Clone, Default)]
struct Dir {
    live: Entries,
    durable: Entries,
    unsynced: Vec<Entry>,
}

#[derive(Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Len(u64),
}

#[derive(Clone, Default)]
struct File {
    /// Its current path.
    path: PathBuf,
    live: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Change>,
    locked_by: Option<u64>,
    /// The allocated zeros behind `live`, and those behind `durable`. They are not kept as bytes,
    /// because a test copies the files very often.
    zeros: u64,
    durable_zeros: u64,
}

#[derive(Default)]
struct State {
    dirs: BTreeMap<u64, Dir>,
    files: BTreeMap<u64, File>,
    next_id: u64,
    changes: u64,
    operations: u64,
    calls: Vec<Call>,
    hook: Option<Hook>,
    hang: Option<Arc<Hang>>,
    /// The process that may use it: the previous one was killed.
    process: u64,
    /// The pages and the inodes of the disk, if they are limited.
    limits: Option<Usage>,
    /// Whether directories do not show that they change, as on a network file system.
    hides_changes: bool,
}

/// Pages and inodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) pages: u64,
    pub(crate) inodes: u64,
}

/// The file system. All clones share one state.
#[derive(Clone)]
pub(crate) struct SimDisk {
    state: Arc<Mutex<State>>,
    process: u64,
}

struct SimFile {
    disk: SimDisk,
    file: u64,
    handle: u64,
    writable: bool,
}

fn apply_entry(entries: &mut Entries, entry: &Entry) {
    match entry {
        Entry::Put(name, node) => {
            entries.insert(name.clone(), *node);
        }
        Entry::Gone(name) => {
            entries.remove(name);
        }
        Entry::Moved(from, to, node) => {
            entries.remove(from);
            entries.insert(to.clone(), *node);
        }
    }
}

fn apply(bytes: &mut Vec<u8>, change: &Change) {
    match change {
        Change::Len(len) => bytes.resize(*len as usize, 0),
        Change::Write(offset, data) => {
            let (from, to) = (*offset as usize, *offset as usize + data.len());
            if bytes.len() < to {
                bytes.resize(to, 0);
            }
            bytes[from..to].copy_from_slice(data);
        }
    }
}

/// Pseudo-random numbers that depend only on the seed and the purpose.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64, id: u64) -> Self {
        let mut dice = Self(seed.wrapping_mul(0xd134_2543_de82_ef95) ^ id);
        dice.next();
        dice
    }

    /// The next number (SplitMix64).
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `sides`.
    pub(crate) fn roll(&mut self, sides: u64) -> u64 {
        self.next() % sides
    }
}

impl File {
    fn len(&self) -> u64 {
        self.live.len() as u64 + self.zeros
    }

    fn pages(&self) -> u64 {
        self.len().div_ceil(PAGE)
    }

    /// Makes a change. Zeros that are allocated become bytes if they are written.
    fn change(&mut self, change: Change) {
        match change {
            Change::Len(len) if self.zeros > 0 && len >= self.live.len() as u64 => {
                self.zeros = len - self.live.len() as u64;
                return;
            }
            Change::Len(_) => self.zeros = 0,
            Change::Write(..) => {}
        }
        let len = self.len();
        apply(&mut self.live, &change);
        self.zeros = len.saturating_sub(self.live.len() as u64).min(self.zeros);
        self.unsynced.push(change);
    }

    /// The contents after a power loss during write-back. One of four styles: no change is present;
    /// all are; of each change none, all, or a prefix; or of each change any subset of its sectors.
    /// The new length may be present without the data.
    fn written_back(&self, dice: &mut Dice) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        let style = dice.roll(4);
        for change in &self.unsynced {
            match change {
                Change::Len(_) if style == 0 || (style > 1 && dice.roll(2) == 0) => {}
                Change::Len(_) => apply(&mut bytes, change),
                Change::Write(offset, data) => {
                    let sectors = sectors(*offset, data);
                    let count = sectors.len() as u64;
                    let whole = match style {
                        0 => 0,
                        1 => count,
                        2 => [0, count, count, dice.roll(count + 1)][dice.roll(4) as usize],
                        _ => count,
                    };
                    for (at, part) in sectors.into_iter().take(whole as usize) {
                        if style < 3 || dice.roll(2) == 0 {
                            apply(&mut bytes, &Change::Write(at, part.to_vec()));
                        }
                    }
                }
            }
        }
        if style > 1 && dice.roll(3) == 0 && bytes.len() < self.live.len() {
            bytes.resize(self.live.len(), 0);
        }
        bytes
    }
}

/// Splits a write at sector boundaries.
fn sectors(offset: u64, data: &[u8]) -> Vec<(u64, &[u8])> {
    let (mut at, mut rest, mut parts) = (offset, data, Vec::new());
    while !rest.is_empty() {
        let (part, after) = rest.split_at(rest.len().min((SECTOR - at % SECTOR) as usize));
        parts.push((at, part));
        (at, rest) = (at + part.len() as u64, after);
    }
    parts
}

impl State {
    /// The used pages and inodes. An unlinked file uses none.
    fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        self.add_usage(0, &mut usage);
        usage
    }

    fn add_usage(&self, dir: u64, usage: &mut Usage) {
        let entries = &self.dirs[&dir].live;
        usage.inodes += 1 + entries.len() as u64;
        usage.pages += 1 + entries.len() as u64 / ENTRIES_PER_PAGE;
        for node in entries.values() {
            match node {
                Node::Dir(dir) => {
                    usage.inodes -= 1;
                    self.add_usage(*dir, usage);
                }
                Node::File(file) => usage.pages += self.files[file].pages(),
            }
        }
    }

    /// The pages and inodes that are left.
    fn left(&self) -> Usage {
        let Some(limits) = self.limits else {
            return Usage { pages: u64::MAX, inodes: u64::MAX };
        };
        let used = self.usage();
        Usage {
            pages: limits.pages.saturating_sub(used.pages),
            inodes: limits.inodes.saturating_sub(used.inodes),
        }
    }

    /// Refuses a new entry of a directory that has no room.
    fn check_entry(&self, dir: u64, pages: u64) -> io::Result<()> {
        let left = self.left();
        let grows = (self.dirs[&dir].live.len() as u64 + 1).is_multiple_of(ENTRIES_PER_PAGE);
        match left.inodes == 0 || left.pages < pages + u64::from(grows) {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }

    fn new_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    fn look_up(&self, path: &Path) -> io::Result<Node> {
        let mut node = Node::Dir(0);
        for part in path.components() {
            let Component::Normal(name) = part else { continue };
            let Node::Dir(dir) = node else { return Err(io::ErrorKind::NotADirectory.into()) };
            node = *self.dirs[&dir]
                .live
                .get(&*name.to_string_lossy())
                .ok_or(io::ErrorKind::NotFound)?;
        }
        Ok(node)
    }

    fn stat(&self, node: Node) -> FileStat {
        let (identity, len) = match node {
            Node::Dir(dir) => (dir, 0),
            Node::File(file) => (file, self.files[&file].len()),
        };
        let is_it = |other: &Node| matches!((other, node), (Node::File(one), Node::File(other)) if *one == other);
        let links = match node {
            Node::Dir(_) => 1,
            Node::File(_) => self
                .dirs
                .values()
                .flat_map(|dir| dir.live.values())
                .filter(|one| is_it(one))
                .count() as u64,
        };
        FileStat { kind: node.kind(), len, identity, links, owner: None }
    }

    fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let node = self.look_up(from)?;
        if let Node::File(file) = node {
            self.files.get_mut(&file).unwrap().path = to.to_owned();
        }
        let ((dir, from), (target, to)) = (self.parent(from)?, self.parent(to)?);
        assert_eq!(dir, target, "files are never moved between directories");
        self.change_dir(dir, Entry::Moved(from, to, node));
        Ok(())
    }

    fn dir(&self, path: &Path) -> io::Result<u64> {
        match self.look_up(path)? {
            Node::Dir(dir) => Ok(dir),
            Node::File(_) => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    /// The directory that contains a path, and the name in it.
    fn parent(&self, path: &Path) -> io::Result<(u64, String)> {
        let name =
            path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_string_lossy().into_owned();
        Ok((self.dir(path.parent().ok_or(io::ErrorKind::InvalidInput)?)?, name))
    }

    fn change_dir(&mut self, dir: u64, entry: Entry) {
        let dir = self.dirs.get_mut(&dir).unwrap();
        apply_entry(&mut dir.live, &entry);
        dir.unsynced.push(entry);
    }

    /// Copies the surviving entries of a directory, recursively.
    fn survivors(&self, dir: u64, survives: Survives, seed: u64, into: &mut State) -> u64 {
        let found = &self.dirs[&dir];
        let dice = &mut Dice::new(seed, dir);
        let mut entries = match survives {
            Survives::Everything => found.live.clone(),
            Survives::Synced | Survives::Some { .. } => found.durable.clone(),
        };
        if let Survives::Some { .. } = survives {
            // Either a prefix of the changes survives, or any subset.
            let in_order = dice.roll(2) == 0;
            let until = dice.roll(found.unsynced.len() as u64 + 1) as usize;
            for (index, entry) in found.unsynced.iter().enumerate() {
                if if in_order { index < until } else { dice.roll(2) == 0 } {
                    apply_entry(&mut entries, entry);
                }
            }
        }
        for node in entries.values_mut() {
            *node = match *node {
                Node::Dir(dir) => Node::Dir(self.survivors(dir, survives, seed, into)),
                Node::File(file) => {
                    let found = &self.files[&file];
                    let dice = &mut Dice::new(seed, file);
                    let bytes = match survives {
                        Survives::Everything => found.live.clone(),
                        Survives::Synced => found.durable.clone(),
                        Survives::Some { .. } => found.written_back(dice),
                    };
                    let zeros = match survives {
                        Survives::Everything => found.zeros,
                        Survives::Synced => found.durable_zeros,
                        Survives::Some { .. } => {
                            [found.zeros, found.durable_zeros][dice.roll(2) as usize]
                        }
                    };
                    let (id, path) = (into.new_id(), found.path.clone());
                    let file = File {
                        path,
                        live: bytes.clone(),
                        durable: bytes,
                        zeros,
                        durable_zeros: zeros,
                        ..File::default()
                    };
                    into.files.insert(id, file);
                    Node::File(id)
                }
            };
        }
        let id = if dir == 0 { 0 } else { into.new_id() };
        into.dirs.insert(id, Dir { live: entries.clone(), durable: entries, unsynced: Vec::new() });
        id
    }
}

impl SimDisk {
    /// An empty file system with the directory `dir`.
    pub(crate) fn new(dir: &Path) -> Self {
        let disk = Self { state: Arc::default(), process: 0 };
        disk.lock().dirs.insert(0, Dir::default());
        let mut made = PathBuf::new();
        for part in dir.components() {
            made.push(part);
            if let Component::Normal(_) = part {
                disk.create_dir(&made).unwrap();
            }
        }
        let mut state = disk.lock();
        for dir in state.dirs.values_mut() {
            dir.durable = dir.live.clone();
            dir.unsynced.clear();
        }
        (state.changes, state.operations, state.calls) = (0, 0, Vec::new());
        drop(state);
        disk
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Directories do not show any more that they change.
    pub(crate) fn hide_changes(&self) {
        self.lock().hides_changes = true;
    }

    /// Returns the state after a crash at this moment, as a separate file system. This one
    /// continues unaffected.
    pub(crate) fn crash(&self, survives: Survives) -> Self {
        let state = self.lock();
        let seed = if let Survives::Some { seed } = survives { seed } else { 0 };
        let mut after = State::default();
        state.survivors(0, survives, seed, &mut after);
        Self { state: Arc::new(Mutex::new(after)), process: 0 }
    }

    /// Kills the process that uses the file system, and returns a handle for the next process. The
    /// data is unchanged, and none of it becomes durable.
    pub(crate) fn kill(&self) -> Self {
        let mut state = self.lock();
        state.process += 1;
        state.files.values_mut().for_each(|file| file.locked_by = None);
        Self { state: Arc::clone(&self.state), process: state.process }
    }

    /// Like [`SimDisk::kill`], on a copy of the file system: this one continues unaffected.
    pub(crate) fn fork(&self) -> Self {
        let state = self.lock();
        let files = state
            .files
            .iter()
            .map(|(id, file)| (*id, File { locked_by: None, ..file.clone() }))
            .collect();
        let copy = State {
            dirs: state.dirs.clone(),
            files,
            next_id: state.next_id,
            limits: state.limits,
            ..State::default()
        };
        Self { state: Arc::new(Mutex::new(copy)), process: 0 }
    }

    /// Leaves this many pages and inodes free from now on. The limits stay with [`SimDisk::fork`]
    /// and [`SimDisk::kill`], but not with [`SimDisk::crash`].
    pub(crate) fn leave_free(&self, pages: u64, inodes: u64) {
        let mut state = self.lock();
        let used = state.usage();
        let limit = |used: u64, free: u64| used.saturating_add(free);
        state.limits =
            Some(Usage { pages: limit(used.pages, pages), inodes: limit(used.inodes, inodes) });
    }

    /// Makes the disk large enough for everything.
    pub(crate) fn grow(&self) {
        self.lock().limits = None;
    }

    /// The pages and inodes that are left.
    pub(crate) fn left(&self) -> Usage {
        self.lock().left()
    }

    /// The number of changes requested so far.
    pub(crate) fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// The number of operations requested so far.
    pub(crate) fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// Takes the calls since the previous call of this function.
    pub(crate) fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.lock().calls)
    }

    /// Calls `hook` before every further operation.
    pub(crate) fn on_call(&self, hook: impl FnMut(&Call) -> Verdict + Send + 'static) {
        self.lock().hook = Some(Arc::new(Mutex::new(hook)));
    }

    /// Makes the operations hang from now on that `catches` accepts. Other operations are not
    /// affected.
    pub(crate) fn hang(&self, catches: impl FnMut(&Call) -> bool + Send + 'static) -> Arc<Hang> {
        let catches: Box<dyn FnMut(&Call) -> bool + Send> = Box::new(catches);
        let hang = Arc::new(Hang {
            catches: Mutex::new(catches),
            held: Mutex::default(),
            changed: Condvar::new(),
        });
        self.lock().hang = Some(Arc::clone(&hang));
        hang
    }

    /// Removes the hook, so that operations succeed again.
    pub(crate) fn heal(&self) {
        self.lock().hook = None;
    }

    /// Makes the `nth` change from now fail, once.
    pub(crate) fn fail_nth(&self, nth: u64) {
        let at = self.changes() + nth;
        self.on_call(move |call| match call.op.changes() && call.number == at {
            true => Verdict::Fail(io::ErrorKind::Other),
            false => Verdict::Go,
        });
    }

    /// Makes the `nth` change from now and all changes after it fail.
    pub(crate) fn end_at(&self, nth: u64) {
        let at = self.changes() + nth;
        self.on_call(move |call| match call.number >= at && call.op.changes() {
            true => Verdict::Fail(io::ErrorKind::Other),
            false => Verdict::Go,
        });
    }

    /// Makes the `nth` operation from now fail with `fault`, if it can fail in this way. With
    /// `lasting`, every later operation that can fail this way fails too. Returns a slot that
    /// receives the first failed call.
    pub(crate) fn fail_with(
        &self,
        nth: u64,
        fault: Fault,
        lasting: bool,
    ) -> Arc<Mutex<Option<Call>>> {
        let at = self.operations() + nth;
        let failed = Arc::new(Mutex::new(None));
        let first = Arc::clone(&failed);
        self.on_call(move |call| {
            if call.nth < at || (call.nth > at && !lasting) || !fault.befalls(call.op) {
                return Verdict::Go;
            }
            first.lock().unwrap().get_or_insert_with(|| call.clone());
            fault.verdict()
        });
        failed
    }

    /// Makes the next operation `op` on a path that contains `part` fail with `kind`, once.
    pub(crate) fn fail_next(&self, op: Op, part: &'static str, kind: io::ErrorKind) {
        let mut armed = true;
        self.on_call(move |call| {
            match call.op == op && call.is_about(part) && std::mem::take(&mut armed) {
                true => Verdict::Fail(kind),
                false => Verdict::Go,
            }
        });
    }

    /// The contents of a file, as programs see it.
    pub(crate) fn bytes(&self, path: &Path) -> Vec<u8> {
        let state = self.lock();
        match state.look_up(path) {
            Ok(Node::File(file)) => state.files[&file].live.clone(),
            _ => panic!("there is no file {}", path.display()),
        }
    }

    /// Changes the contents of a file durably, without an operation.
    pub(crate) fn edit(&self, path: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
        let mut state = self.lock();
        let Ok(Node::File(file)) = state.look_up(path) else {
            panic!("there is no file {}", path.display())
        };
        let file = state.files.get_mut(&file).unwrap();
        edit(&mut file.live);
        file.durable = file.live.clone();
        file.unsynced.clear();
    }

    /// Damages synced data in a file below `dir`: flips a bit, loses a sector, or overwrites a
    /// sector with data for another place. Returns a description.
    pub(crate) fn rot(&self, dir: &Path, dice: &mut Dice) -> String {
        let mut files: Vec<(PathBuf, Vec<u8>)> = self.files(dir).into_iter().collect();
        files.retain(|(_, bytes)| !bytes.is_empty());
        let (path, bytes) = &files[dice.roll(files.len() as u64) as usize];
        let (stray, other) = &files[dice.roll(files.len() as u64) as usize];
        let sector = |bytes: &[u8], n: u64| {
            bytes.chunks(SECTOR as usize).nth(n as usize).unwrap_or_default().to_vec()
        };
        let n = dice.roll((bytes.len() as u64).div_ceil(SECTOR));
        let old = sector(bytes, n);
        let mut new = old.clone();
        let what = match dice.roll(4) {
            0 => {
                new.fill(0);
                "is zeroed".to_owned()
            }
            1 => {
                let from = dice.roll((other.len() as u64).div_ceil(SECTOR));
                let strayed = sector(other, from);
                let len = new.len().min(strayed.len());
                new[..len].copy_from_slice(&strayed[..len]);
                format!("has sector {from} of {} written over it", stray.display())
            }
            _ => {
                let bit = dice.roll(8 * new.len() as u64) as usize;
                new[bit / 8] ^= 1 << (bit % 8);
                format!("has bit {bit} flipped")
            }
        };
        if new == old {
            new[0] ^= 1;
        }
        self.edit(path, |bytes| bytes[(n * SECTOR) as usize..][..new.len()].copy_from_slice(&new));
        format!("sector {n} of {} {what}", path.display())
    }

    /// Empties one of the files below `dir` that exist twice, or its second copy. Returns a
    /// description; `None` if there is no such file.
    pub(crate) fn lose_a_copy(&self, dir: &Path, dice: &mut Dice) -> Option<String> {
        let files = self.files(dir);
        let copy_of = |path: &Path| PathBuf::from(format!("{}.copy", path.display()));
        let twice: Vec<_> =
            files.keys().filter(|path| files.contains_key(&copy_of(path))).collect();
        if twice.is_empty() {
            return None;
        }
        let original = twice[dice.roll(twice.len() as u64) as usize];
        let lost = if dice.roll(2) == 0 { original.clone() } else { copy_of(original) };
        self.edit(&lost, Vec::clear);
        Some(format!("{} is empty", lost.display()))
    }

    /// All files below a directory, as programs see them.
    pub(crate) fn files(&self, dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        let entries = {
            let state = self.lock();
            state.dirs[&state.dir(dir).unwrap()].live.clone()
        };
        for (name, node) in entries {
            let path = dir.join(name);
            match node {
                Node::Dir(_) => found.append(&mut self.files(&path)),
                Node::File(_) => drop(found.insert(path.clone(), self.bytes(&path))),
            }
        }
        found
    }

    /// The newest file of the catalogue.
    pub(crate) fn catalogue_file(&self, store_dir: &Path) -> PathBuf {
        newest(store_dir, self.files(&catalogue_dir(store_dir)).into_keys())
            .expect("a store has a catalogue")
    }

    /// The segment files of a shard, oldest first.
    pub(crate) fn segments(&self, logstore_dir: &Path, shard: u32) -> Vec<PathBuf> {
        let dir = logstore_dir.join(format!("shard-{shard:04}"));
        self.files(&dir)
            .into_keys()
            .filter(|path| path.extension().is_some_and(|ext| ext == "seg"))
            .collect()
    }

    /// Counts a call and asks the hook. Returns `Err` if the call fails without any effect.
    fn enter(&self, op: Op, path: &Path) -> io::Result<Verdict> {
        let (call, hang) = {
            let mut state = self.lock();
            if state.process != self.process {
                return Err(io::Error::other("the process was killed"));
            }
            state.changes += u64::from(op.changes());
            state.operations += 1;
            let call =
                Call { op, path: path.to_owned(), number: state.changes, nth: state.operations };
            state.calls.push(call.clone());
            (call, state.hang.clone())
        };
        if let Some(hang) = hang {
            hang.enter(&call);
        }
        let hook = self.lock().hook.clone();
        // The state is unlocked here: the hook may use the file system.
        match hook.map_or(Verdict::Go, |hook| (*hook.lock().unwrap())(&call)) {
            Verdict::Refuse(kind) => Err(injected(kind)),
            // A write or a sync that fails has a partial effect, so the caller handles it.
            Verdict::Fail(kind) if !matches!(op, Op::Write | Op::Sync) => Err(injected(kind)),
            verdict => Ok(verdict),
        }
    }

    fn change(
        &self,
        op: Op,
        path: &Path,
        change: impl FnOnce(&mut State) -> io::Result<()>,
    ) -> io::Result<()> {
        let verdict = self.enter(op, path)?;
        let done = change(&mut self.lock());
        if verdict == Verdict::DoneAndFail { Err(injected(io::ErrorKind::Other)) } else { done }
    }
}

fn injected(kind: io::ErrorKind) -> io::Error {
    io::Error::new(kind, "injected")
}

impl fmt::Debug for SimDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SimDisk")
    }
}

impl Disk for SimDisk {
    fn beneath(&self, dir: &Path, _access: Access) -> io::Result<Arc<dyn Disk>> {
        self.enter(Op::Stat, dir)?;
        self.lock().dir(dir)?;
        Ok(Arc::new(self.clone()))
    }

    fn available(&self, _dir: &Path) -> io::Result<Option<u64>> {
        let state = self.lock();
        Ok(state.limits.map(|_| state.left().pages.saturating_mul(PAGE)))
    }

    fn allocate(&self, path: &Path, len: u64) -> io::Result<()> {
        let verdict = self.enter(Op::Allocate, path)?;
        let mut state = self.lock();
        let file = match state.look_up(path) {
            Ok(Node::File(file)) => file,
            Ok(Node::Dir(_)) => return Err(io::ErrorKind::IsADirectory.into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let (dir, name) = state.parent(path)?;
                state.check_entry(dir, 0)?;
                let id = state.new_id();
                state.files.insert(id, File { path: path.to_owned(), ..File::default() });
                state.change_dir(dir, Entry::Put(name, Node::File(id)));
                id
            }
            Err(error) => return Err(error),
        };
        let left = state.left().pages;
        let file = state.files.get_mut(&file).unwrap();
        let missing = len.div_ceil(PAGE).saturating_sub(file.pages());
        // A real disk may allocate a part.
        let len = if missing > left { (file.pages() + left) * PAGE } else { len };
        file.zeros = file.zeros.max(len.saturating_sub(file.live.len() as u64));
        if missing > left {
            return Err(io::ErrorKind::StorageFull.into());
        }
        file.durable_zeros = file.zeros;
        if verdict == Verdict::DoneAndFail { Err(injected(io::ErrorKind::Other)) } else { Ok(()) }
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        let create = mode == OpenMode::CreateNew;
        let verdict = self.enter(if create { Op::Create } else { Op::Open }, path)?;
        let mut state = self.lock();
        let file = match (state.look_up(path), create) {
            (Ok(Node::Dir(_)), _) => return Err(io::ErrorKind::IsADirectory.into()),
            (Ok(_), true) => return Err(io::ErrorKind::AlreadyExists.into()),
            (Ok(Node::File(file)), false) => file,
            (Err(error), true) if error.kind() == io::ErrorKind::NotFound => {
                let (dir, name) = state.parent(path)?;
                state.check_entry(dir, 0)?;
                let id = state.new_id();
                state.files.insert(id, File { path: path.to_owned(), ..File::default() });
                state.change_dir(dir, Entry::Put(name, Node::File(id)));
                id
            }
            (Err(error), _) => return Err(error),
        };
        if verdict == Verdict::DoneAndFail {
            return Err(injected(io::ErrorKind::Other));
        }
        let handle = state.new_id();
        drop(state);
        Ok(Arc::new(SimFile { disk: self.clone(), file, handle, writable: mode != OpenMode::Read }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(Op::Rename, from, |state| state.rename(from, to))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change(Op::Rename, from, |state| match state.look_up(to) {
            Ok(_) => Err(io::ErrorKind::AlreadyExists.into()),
            Err(_) => state.rename(from, to),
        })
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.change(Op::Remove, path, |state| {
            let Node::File(_) = state.look_up(path)? else {
                return Err(io::ErrorKind::IsADirectory.into());
            };
            let (dir, name) = state.parent(path)?;
            state.change_dir(dir, Entry::Gone(name));
            Ok(())
        })
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.change(Op::CreateDir, path, |state| {
            if state.look_up(path).is_ok() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            let (parent, name) = state.parent(path)?;
            state.check_entry(parent, 1)?;
            let id = state.new_id();
            state.dirs.insert(id, Dir::default());
            state.change_dir(parent, Entry::Put(name, Node::Dir(id)));
            Ok(())
        })
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.change(Op::RemoveDir, path, |state| {
            let dir = state.dir(path)?;
            if !state.dirs[&dir].live.is_empty() {
                return Err(io::ErrorKind::DirectoryNotEmpty.into());
            }
            let (parent, name) = state.parent(path)?;
            state.change_dir(parent, Entry::Gone(name));
            Ok(())
        })
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.change(Op::SyncDir, path, |state| {
            let dir = state.dir(path)?;
            let dir = state.dirs.get_mut(&dir).unwrap();
            dir.durable = dir.live.clone();
            dir.unsynced.clear();
            Ok(())
        })
    }

    fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        self.enter(Op::List, path)?;
        let state = self.lock();
        let dir = state.dir(path)?;
        let entry =
            |(name, node): (&String, &Node)| DirEntry { name: name.clone(), kind: node.kind() };
        Ok(state.dirs[&dir].live.iter().map(entry).collect())
    }

    fn names_mark(&self, dir: &Path) -> io::Result<Option<u128>> {
        self.enter(Op::Stat, dir)?;
        let state = self.lock();
        let names = &state.dirs[&state.dir(dir)?].live;
        let mut hasher = DefaultHasher::new();
        if !state.hides_changes {
            names.keys().for_each(|name| name.hash(&mut hasher));
        }
        Ok(Some(hasher.finish().into()))
    }

    fn stat(&self, path: &Path) -> io::Result<Option<FileStat>> {
        self.enter(Op::Stat, path)?;
        let state = self.lock();
        match state.look_up(path) {
            Ok(node) => Ok(Some(state.stat(node))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl SimFile {
    fn path(&self) -> PathBuf {
        self.disk.lock().files[&self.file].path.clone()
    }

    fn change(&self, op: Op, change: Change) -> io::Result<()> {
        if !self.writable {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let verdict = self.disk.enter(op, &self.path())?;
        let change = match (change, verdict) {
            (Change::Write(offset, mut data), Verdict::Fail(_)) => {
                data.truncate(data.len() / 2);
                Change::Write(offset, data)
            }
            (change, _) => change,
        };
        let mut state = self.disk.lock();
        let left = state.left().pages;
        let file = state.files.get_mut(&self.file).unwrap();
        let end = match &change {
            Change::Write(offset, data) => (*offset + data.len() as u64).max(file.len()),
            Change::Len(len) => *len,
        };
        let room = file.pages().saturating_add(left).saturating_mul(PAGE);
        let is_full = end > room;
        let change = match change {
            // A short write.
            Change::Write(offset, mut data) if is_full => {
                data.truncate(room.saturating_sub(offset) as usize);
                Change::Write(offset, data)
            }
            Change::Len(_) if is_full => return Err(io::ErrorKind::StorageFull.into()),
            change => change,
        };
        if !matches!(&change, Change::Write(_, data) if data.is_empty()) {
            file.change(change);
        }
        if is_full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        match verdict {
            Verdict::Go => Ok(()),
            Verdict::Fail(kind) | Verdict::Refuse(kind) => Err(injected(kind)),
            Verdict::DoneAndFail => Err(injected(io::ErrorKind::Other)),
        }
    }
}

impl fmt::Debug for SimFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimFile({})", self.path().display())
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        let mut state = self.disk.lock();
        let file = state.files.get_mut(&self.file).unwrap();
        if file.locked_by == Some(self.handle) {
            file.locked_by = None;
        }
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.disk.enter(Op::Read, &self.path())?;
        let state = self.disk.lock();
        let bytes = state.files[&self.file].live.get(offset as usize..).unwrap_or_default();
        let len = bytes.len().min(buf.len());
        buf[..len].copy_from_slice(&bytes[..len]);
        Ok(len)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.change(Op::Write, Change::Write(offset, buf.to_vec()))
    }

    fn sync_data(&self) -> io::Result<()> {
        let verdict = self.disk.enter(Op::Sync, &self.path())?;
        let mut state = self.disk.lock();
        let file = state.files.get_mut(&self.file).unwrap();
        let unsynced = std::mem::take(&mut file.unsynced);
        if let Verdict::Fail(kind) = verdict {
            // The data will never be written back, but can still be read.
            return Err(injected(kind));
        }
        unsynced.iter().for_each(|change| apply(&mut file.durable, change));
        file.durable_zeros = file.zeros;
        if verdict == Verdict::DoneAndFail { Err(injected(io::ErrorKind::Other)) } else { Ok(()) }
    }

    fn len(&self) -> io::Result<u64> {
        self.disk.enter(Op::Len, &self.path())?;
        Ok(self.disk.lock().files[&self.file].len())
    }

    fn stat(&self) -> io::Result<FileStat> {
        self.disk.enter(Op::Stat, &self.path())?;
        Ok(self.disk.lock().stat(Node::File(self.file)))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Op::SetLen, Change::Len(len))
    }

    fn try_lock(&self) -> io::Result<bool> {
        self.disk.enter(Op::Lock, &self.path())?;
        let mut state = self.disk.lock();
        let file = state.files.get_mut(&self.file).unwrap();
        let free = file.locked_by.is_none_or(|holder| holder == self.handle);
        if free {
            file.locked_by = Some(self.handle);
        }
        Ok(free)
    }

    /// Maps a copy: a sealed segment does not change.
    fn map(&self) -> io::Result<Map> {
        let copy = tempfile::NamedTempFile::new()?;
        std::fs::write(copy.path(), &self.disk.lock().files[&self.file].live)?;
        RealDisk.open(copy.path(), OpenMode::Read)?.map()
    }
}

/// A test setup on a [`SimDisk`].
pub(crate) struct Sim {
    pub(crate) world: World,
    pub(crate) disk: SimDisk,
    customize: Box<dyn Fn(StoreBuilder) -> StoreBuilder>,
}

impl Sim {
    pub(crate) fn new() -> Self {
        let world = World::manual();
        let disk = SimDisk::new(world.path());
        Self::of(world, disk)
    }

    pub(crate) fn of(world: World, disk: SimDisk) -> Self {
        Self { world, disk, customize: Box::new(|builder| builder) }
    }

    /// Changes how every store is created and opened from now on.
    pub(crate) fn customize(&mut self, how: impl Fn(StoreBuilder) -> StoreBuilder + 'static) {
        self.customize = Box::new(how);
    }

    pub(crate) fn builder(&self) -> StoreBuilder {
        (self.customize)(self.world.builder().disk(Arc::new(self.disk.clone())))
    }

    pub(crate) fn create(&self) -> Store {
        self.builder().create().unwrap()
    }

    pub(crate) fn open(&self) -> Store {
        self.builder().open().unwrap()
    }

    /// Continues with the state after a crash. Existing handles continue with the old state.
    pub(crate) fn crash(&mut self, survives: Survives) {
        self.disk = self.disk.crash(survives);
    }

    /// Makes the next roll of a Logstore under a customer's key seal its segment and then find the
    /// key inaccessible for the new one: from then on the KMS gives this answer, and the lease ends
    /// while the footer is synced.
    pub(crate) fn lose_key_at_the_next_roll(
        &self,
        store: &Store,
        logstore: &Logstore,
        answer: Answer,
    ) {
        // With another suite, the next block begins a new segment.
        let config = logstore.config();
        let encrypt_conf =
            config.encrypt_conf.clone().map(|conf| EncryptConf { enable: !conf.enable, ..conf });
        store.update_logstore(logstore.name(), config.encrypt_conf(encrypt_conf)).unwrap();
        let (clock, kms) = (Arc::clone(&self.world.clock), Arc::clone(&self.world.kms));
        let lease = self.world.options.outage_grace + self.world.options.revalidate_every;
        let mut answer = Some(answer);
        self.disk.on_call(move |call| {
            if call.op == Op::Sync
                && call.is_about(".seg")
                && let Some(answer) = answer.take()
            {
                kms.answer(answer);
                clock.advance(lease);
            }
            Verdict::Go
        });
    }

    /// The segments of a shard, oldest first.
    pub(crate) fn segments(&self, logstore: &Logstore, shard: u32) -> Vec<PathBuf> {
        self.disk.segments(&self.world.logstore_dir(logstore), shard)
    }
}
