//! Hostile file types: the tests replace every file and directory of a store by a symlink, a named
//! pipe, a socket, a device, a directory or a file. The engine returns an error that names the
//! path, follows no link, changes nothing outside of the store, and serves the other Logstores. It
//! works again once the original is back.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    os::unix::fs::{MetadataExt, symlink},
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    thread,
};

use envelog::{
    Error, Result, Store, StoreBuilder,
    admin::VerifyOptions,
    io::{Access, DirEntry, Disk, DiskFile, FileKind, FileStat, OpenMode, RealDisk},
};
use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

use tempfile::TempDir;

use common::{
    QuickRoot, World,
    catalogue::{catalogue_dir, catalogue_file},
    copy_dir, copy_path, files, is_meta, meta_path, name, put, secs, texts, try_put, try_texts,
};

/// The replacement of a file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hostile {
    /// A symlink to an object of the right type outside of the store.
    LinkOutside,
    /// A symlink to the original, which was renamed.
    LinkInside,
    DanglingLink,
    Fifo,
    Socket,
    Device,
    /// A directory in place of a file, or a file in place of a directory.
    OtherType,
}

impl Hostile {
    const ALL: [Self; 7] = [
        Self::LinkOutside,
        Self::LinkInside,
        Self::DanglingLink,
        Self::Fifo,
        Self::Socket,
        Self::Device,
        Self::OtherType,
    ];

    fn kind(self, was_dir: bool) -> FileKind {
        match self {
            Self::LinkOutside | Self::LinkInside | Self::DanglingLink => FileKind::Symlink,
            Self::Fifo => FileKind::Fifo,
            Self::Socket => FileKind::Socket,
            Self::Device => FileKind::Device,
            Self::OtherType if was_dir => FileKind::File,
            Self::OtherType => FileKind::Directory,
        }
    }
}

/// How the engine accesses the disk.
#[derive(Clone, Copy, Debug)]
enum Way {
    Kernel,
    Walk,
}

/// The real disk without syncs, with the fallback path resolution: it opens one directory handle
/// for each component of a path.
#[derive(Debug)]
struct WalkingDisk;

impl Disk for WalkingDisk {
    fn beneath(&self, dir: &Path, access: Access) -> std::io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(QuickRoot(RealDisk.beneath_by_walking(dir, access)?)))
    }

    fn resolve(&self, path: &Path) -> std::io::Result<PathBuf> {
        RealDisk.resolve(path)
    }

    fn open(&self, path: &Path, mode: OpenMode) -> std::io::Result<Arc<dyn DiskFile>> {
        RealDisk.open(path, mode)
    }

    fn rename(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        RealDisk.rename(from, to)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> std::io::Result<()> {
        RealDisk.rename_new(from, to)
    }

    fn remove_file(&self, path: &Path) -> std::io::Result<()> {
        RealDisk.remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> std::io::Result<()> {
        RealDisk.create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> std::io::Result<()> {
        RealDisk.remove_dir(path)
    }

    fn sync_dir(&self, _path: &Path) -> std::io::Result<()> {
        Ok(())
    }

    fn list_dir(&self, path: &Path) -> std::io::Result<Vec<DirEntry>> {
        RealDisk.list_dir(path)
    }

    fn stat(&self, path: &Path) -> std::io::Result<Option<FileStat>> {
        RealDisk.stat(path)
    }
}

/// The operations that depend on a file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Concerns {
    /// Readers and writers of the whole store.
    All,
    /// Writers of the whole store.
    Writers,
    /// Only the victim.
    Victim,
    /// Only the other Logstore.
    Other,
    /// One of the two Logstores.
    EitherOne,
    /// No operation: the store works without it.
    None,
}

/// A store with two Logstores, and a neighbouring tree that must not change.
struct Scene {
    world: World,
    way: Way,
    victim: String,
    /// A copy of the initial state.
    template: TempDir,
}

const VICTIM: &str = "p/victim";
const OTHER: &str = "p/other";

impl Scene {
    fn new(way: Way) -> Self {
        let world = World::manual_in_memory();
        let mut scene =
            Self { world, way, victim: String::new(), template: tempfile::tempdir().unwrap() };
        let canary = scene.world.path().join("canary");
        fs::create_dir_all(canary.join("deep")).unwrap();
        fs::write(canary.join("report"), "an audit report").unwrap();
        fs::write(canary.join("deep/id_rsa"), "a key").unwrap();
        let store = scene.builder().create().unwrap();
        let (one, two) = (scene.world.cmk(), scene.world.cmk());
        let victim = scene.world.byok(&store, VICTIM, &one);
        scene.victim = victim.id().to_string();
        put(&victim, "first");
        victim.roll().unwrap();
        put(&victim, "second");
        let other = scene.world.byok(&store, OTHER, &two);
        put(&other, "other");
        store.close().unwrap();
        copy_dir(scene.world.path(), scene.template.path());
        scene
    }

    /// Restores the initial state.
    fn reset(&self) {
        copy_dir(self.template.path(), self.world.path());
    }

    fn builder(&self) -> StoreBuilder {
        match self.way {
            Way::Kernel => self.world.builder(),
            Way::Walk => self.world.builder().disk(Arc::new(WalkingDisk)),
        }
    }

    /// All files and directories of the store, and its keyring.
    fn targets(&self) -> Vec<PathBuf> {
        let mut found = vec![self.world.keyring()];
        let mut dirs = vec![self.world.store_dir()];
        while let Some(dir) = dirs.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    dirs.push(path.clone());
                }
                found.push(path);
            }
        }
        found.sort();
        found
    }

    fn concerns(&self, target: &Path) -> Concerns {
        let Ok(inside) = target.strip_prefix(self.world.store_dir()) else { return Concerns::All };
        let text = inside.to_str().unwrap();
        if text.ends_with(".copy") {
            // The other copy takes its place.
            return Concerns::None;
        }
        match text {
            // Every opening searches for the end of the audit log.
            "STORE" | "logstores" | "audit" => Concerns::All,
            _ if text.starts_with("catalogue") => Concerns::All,
            "LOCK" | "EPOCH" => Concerns::Writers,
            _ if text.starts_with("audit/") => Concerns::None,
            // One directory contains the probes of both master keys.
            "probes" => Concerns::All,
            // The probe of one of the two master keys.
            _ if text.starts_with("probes/") => Concerns::EitherOne,
            _ if text.contains(&self.victim) => Concerns::Victim,
            _ => Concerns::Other,
        }
    }
}

/// The kinds of hostile files that this process can create.
fn kinds() -> Vec<Hostile> {
    let dir = tempfile::tempdir().unwrap();
    let device =
        mknodat(CWD, dir.path().join("null"), FileType::CharacterDevice, Mode::RUSR, makedev(1, 3))
            .is_ok();
    if !device {
        let _ = writeln!(
            std::io::stderr(),
            "NOT RUN: devices, which this process has no right to make"
        );
    }
    Hostile::ALL.into_iter().filter(|kind| device || *kind != Hostile::Device).collect()
}

/// Replaces `target`, and moves the original to `aside`.
fn replace(target: &Path, by: Hostile, canary: &Path, aside: &Path) {
    let was_dir = target.is_dir();
    fs::rename(target, aside).unwrap();
    let node =
        |kind, device| mknodat(CWD, target, kind, Mode::from_raw_mode(0o600), device).unwrap();
    match by {
        Hostile::LinkOutside if was_dir => symlink(canary, target).unwrap(),
        Hostile::LinkOutside => symlink(canary.join("report"), target).unwrap(),
        Hostile::LinkInside => symlink(aside, target).unwrap(),
        Hostile::DanglingLink => symlink("/nonexistent/nowhere", target).unwrap(),
        Hostile::Fifo => node(FileType::Fifo, 0),
        Hostile::Socket => node(FileType::Socket, 0),
        // /dev/null: harmless even if the engine opens it.
        Hostile::Device => node(FileType::CharacterDevice, makedev(1, 3)),
        Hostile::OtherType if was_dir => fs::write(target, "a file").unwrap(),
        Hostile::OtherType => fs::create_dir(target).unwrap(),
    }
}

fn put_back(target: &Path, aside: &Path) {
    match fs::symlink_metadata(target) {
        Ok(found) if found.is_dir() => fs::remove_dir(target).unwrap(),
        Ok(_) => fs::remove_file(target).unwrap(),
        Err(_) => {}
    }
    fs::rename(aside, target).unwrap();
}

/// Names, types, links and contents of everything below a directory.
fn picture(dir: &Path) -> BTreeMap<PathBuf, (u32, u64, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let stat = fs::symlink_metadata(&path).unwrap();
            let bytes = if stat.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            if stat.is_dir() {
                dirs.push(path.clone());
            }
            found.insert(path, (stat.mode(), stat.ino(), bytes));
        }
    }
    found
}

/// Runs an action that must not hang.
fn at_once<T: Send>(what: &str, act: impl FnOnce() -> T + Send) -> T {
    let (done, waiting) = mpsc::channel::<()>();
    let what = what.to_owned();
    let watchdog = thread::spawn(move || {
        if let Err(mpsc::RecvTimeoutError::Timeout) = waiting.recv_timeout(secs(60)) {
            // A hanging thread cannot be stopped. Write to standard output directly, because ending
            // the process discards captured output.
            let _ = writeln!(std::io::stdout(), "{what}: hangs, ended by the watchdog");
            std::process::abort();
        }
    });
    let result = act();
    drop(done);
    watchdog.join().unwrap();
    result
}

type Operation = (&'static str, fn(&Store) -> Result<()>);

/// The operations on the victim in one opening: by a reader, by a writer, and by a writer that
/// deletes it.
const OPENINGS: [(bool, &[Operation]); 3] = [
    (
        false,
        &[
            ("read", |store| try_texts(&store.logstore(&name(VICTIM))?).map(drop)),
            ("verify", verify),
        ],
    ),
    (
        true,
        &[
            ("append", |store| try_put(&store.logstore(&name(VICTIM))?, "third")),
            ("rotate", |store| store.keys().rotate_data_key(&name(VICTIM)).map(drop)),
        ],
    ),
    (true, &[("delete", |store| store.delete_logstore(&name(VICTIM)).map(drop))]),
];

/// Verifies the victim, and returns the first fault as the corresponding error.
fn verify(store: &Store) -> Result<()> {
    let options = VerifyOptions::default().logstore(name(VICTIM));
    let report = store.admin().verify(&options, &mut |_| {})?;
    match report.faults.first() {
        Some(fault) if fault.code == "wrong_file_type" => Err(Error::WrongFileType {
            path: fault.message.split(" is a ").next().unwrap().into(),
            expected: FileKind::File,
            found: FileKind::Unknown,
        }),
        Some(fault) => panic!("{fault:?}"),
        None => Ok(()),
    }
}

/// Checks that an operation succeeded or returned the error that names the replaced path. Returns
/// whether it failed.
fn check(what: &str, target: &Path, result: Result<()>) -> bool {
    match result {
        Ok(()) => false,
        Err(Error::WrongFileType { path, .. }) if path == target => true,
        Err(error) => panic!("{what}: {error:?}"),
    }
}

fn sweep(way: Way) {
    let mut refused = BTreeMap::<&str, u32>::new();
    let scene = Scene::new(way);
    let targets = scene.targets();
    assert!(targets.len() > 15, "{targets:?}");
    let kinds = kinds();
    for target in &targets {
        for &by in &kinds {
            // Each opening starts with the initial state.
            for (writes, operations) in OPENINGS {
                scene.reset();
                if *target == scene.world.keyring() && by.kind(false) == FileKind::Symlink {
                    // One symlink to a keyring is followed.
                    continue;
                }
                let was_dir = target.is_dir();
                let deletes = operations.iter().any(|(operation, _)| *operation == "delete");
                let what = format!("{way:?}: {} as {by:?}, {}", target.display(), operations[0].0);
                let (canary, aside) =
                    (scene.world.path().join("canary"), scene.world.path().join("aside"));
                replace(target, by, &canary, &aside);
                let (outside, link) =
                    (picture(&canary), fs::symlink_metadata(target).unwrap().ino());
                let kept = if aside.is_dir() { picture(&aside) } else { BTreeMap::new() };
                let concerns = scene.concerns(target);
                // A writer first raises the epoch, and then writes a new catalogue file.
                let catalogue = catalogue_dir(&scene.world.store_dir());
                let renewed = |path: &Path| path.ends_with("EPOCH") || path.starts_with(&catalogue);
                let inside = || {
                    let mut found = picture(&scene.world.store_dir());
                    found.retain(|path, _| {
                        path == target
                            || !renewed(path)
                            || path.starts_with(&catalogue) && target.starts_with(&catalogue)
                    });
                    found
                };
                let before = inside();

                let opened = at_once(&what, || {
                    if writes { scene.builder().open() } else { scene.builder().open_read_only() }
                });
                let shut = concerns == Concerns::All
                    && !target.ends_with("logstores")
                    && !target.ends_with("probes")
                    || concerns == Concerns::Writers && writes;
                match opened {
                    Err(error) => {
                        assert!(check(&what, target, Err(error)));
                        assert!(
                            shut || target.ends_with("logstores"),
                            "{what}: the store stays shut"
                        );
                        assert!(inside() == before, "{what}: something in the store has changed");
                    }
                    Ok(store) => {
                        assert!(!shut, "{what}: the store opens");
                        for (operation, act) in operations {
                            let result = at_once(&what, || act(&store));
                            if check(&what, target, result) {
                                *refused.entry(*operation).or_default() += 1;
                                assert!(
                                    !matches!(concerns, Concerns::None | Concerns::Other),
                                    "{what}"
                                );
                            }
                        }
                        // The other Logstore works unless the replaced file belongs to it or is
                        // shared.
                        let served = at_once(&what, || {
                            let other = store.logstore(&name(OTHER))?;
                            assert_eq!(try_texts(&other)?, ["other"], "{what}");
                            if writes { try_put(&other, "more") } else { Ok(()) }
                        });
                        if check(&what, target, served) {
                            assert!(
                                !matches!(concerns, Concerns::None | Concerns::Victim),
                                "{what}"
                            );
                        }
                        at_once(&what, || drop(store.close()));
                    }
                }
                assert!(
                    picture(&canary) == outside,
                    "{what}: something outside of the store has changed"
                );
                if aside.is_dir() {
                    assert!(
                        picture(&aside) == kept,
                        "{what}: the original has changed through a link"
                    );
                }
                let left = fs::symlink_metadata(target);
                if let Ok(left) = &left {
                    assert_eq!(
                        left.ino(),
                        link,
                        "{what}: what was put in its place has been replaced"
                    );
                }
                if deletes && left.is_err() {
                    // The deletion completed.
                    continue;
                }
                put_back(target, &aside);
                assert_eq!(target.is_dir(), was_dir);
                let store =
                    scene.builder().open().unwrap_or_else(|error| panic!("{what}: {error:?}"));
                if !deletes {
                    let victim = store.logstore(&name(VICTIM)).unwrap();
                    let read = texts(&victim);
                    assert_eq!(read[..2], ["first", "second"], "{what}");
                    put(&victim, "last");
                }
                put(&store.logstore(&name(OTHER)).unwrap(), "last");
                let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
                assert!(report.is_clean(), "{what}: {:?}", report.faults);
            }
        }
    }
    println!("{way:?}: {} files and directories, refused: {refused:?}", targets.len());
    let operations: BTreeSet<&str> = refused.keys().copied().collect();
    let all = OPENINGS
        .iter()
        .flat_map(|(_, operations)| operations.iter().map(|(operation, _)| *operation));
    assert_eq!(operations, all.collect(), "each of them met one");
}

#[test]
fn every_file_is_replaced_in_turn() {
    sweep(Way::Kernel);
}

#[test]
fn every_file_is_replaced_in_turn_without_openat2() {
    sweep(Way::Walk);
}

/// Deleting removes the names that the format defines. Other files stay and are reported, and do
/// not prevent opening the store.
#[test]
fn a_deletion_leaves_strays_and_is_finished_when_they_are_gone() {
    let scene = Scene::new(Way::Kernel);
    let logstores = scene.world.store_dir().join("logstores");
    let victim = logstores.join(&scene.victim);
    let canary = scene.world.path().join("canary");
    let outside = picture(&canary);
    let strays = [
        victim.join("notes"),
        victim.join("shard-7"),
        victim.join("shard-0000/snapshot"),
        victim.join("shard-0000/.nfs0001"),
        victim.join("shard-0000/0000000001-1.seg"),
        victim.join("shard-0000/link"),
    ];
    for stray in &strays {
        match stray.extension() {
            None if stray.ends_with("link") => symlink(&canary, stray).unwrap(),
            None if stray.ends_with("snapshot") || stray.ends_with("shard-7") => {
                fs::create_dir(stray).unwrap()
            }
            _ => fs::write(stray, "not ours").unwrap(),
        }
    }
    // Links with names that a Logstore directory could have.
    let links = ["1", "2"].map(|digit| logstores.join(digit.repeat(32)));
    symlink(&canary, &links[0]).unwrap();
    symlink(canary.join("report"), &links[1]).unwrap();

    let store = scene.builder().open().unwrap();
    let report = store.delete_logstore(&name(VICTIM)).unwrap();
    assert_eq!(report.left.iter().collect::<BTreeSet<_>>(), strays.iter().collect());
    assert!(!files(&victim).into_keys().any(|path| is_meta(&path)), "the envelopes are gone");
    assert!(strays.iter().all(|stray| fs::symlink_metadata(stray).is_ok()));
    assert_eq!(fs::read_dir(victim.join("shard-0000")).unwrap().count(), 4, "no segment is left");
    let noted = |store: &Store| {
        let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
        assert!(report.is_clean(), "{:?}", report.faults);
        report.notes.iter().any(|note| note.contains(&scene.victim))
    };
    assert!(noted(&store));
    store.close().unwrap();

    // Each opening and each run of retention tries again. Meanwhile, other Logstores work and can
    // be created.
    let store = scene.builder().open().unwrap();
    assert_eq!(texts(&store.logstore(&name(OTHER)).unwrap()), ["other"]);
    put(&scene.world.service(&store, VICTIM), "another of the name");
    assert!(noted(&store));
    for stray in &strays {
        fs::remove_file(stray).or_else(|_| fs::remove_dir(stray)).unwrap();
    }
    store.admin().apply_retention().unwrap();
    assert!(!victim.exists() && !noted(&store));
    store.close().unwrap();
    assert!(
        links.iter().all(|link| fs::symlink_metadata(link).unwrap().is_symlink()),
        "a link is no remains of ours"
    );
    assert!(picture(&canary) == outside, "something outside of the store has changed");
}

/// A leftover that cannot be removed, of a dropped segment or a temporary file, does not block its
/// shard.
#[test]
fn leftovers_that_cannot_be_removed_keep_no_shard_shut() {
    let scene = Scene::new(Way::Kernel);
    let shard = scene.world.store_dir().join("logstores").join(&scene.victim).join("shard-0000");
    // A directory at a temporary file's name cannot be removed as a file. The next segment has
    // ordinal 3 and begins at sequence number 2.
    for epoch in 1..10 {
        for end in ["tmp", "1.tmp"] {
            let segment = format!("0000000003-00000000000000000002-{epoch:010}.{end}");
            fs::create_dir(shard.join(segment)).unwrap();
            let catalogue = format!("{epoch:010}-0000000001.{end}");
            fs::create_dir(catalogue_dir(&scene.world.store_dir()).join(catalogue)).unwrap();
        }
    }
    fs::create_dir(scene.world.store_dir().join("EPOCH.tmp")).unwrap();
    fs::create_dir(shard.with_file_name("meta.tmp")).unwrap();
    fs::create_dir(scene.world.path().join("keyring.tmp")).unwrap();
    let store = scene.builder().open().unwrap();
    let victim = store.logstore(&name(VICTIM)).unwrap();
    put(&victim, "third");
    store.keys().rotate_service_key().unwrap();
    store.keys().rotate_data_key(&name(VICTIM)).unwrap();
    assert_eq!(texts(&victim), ["first", "second", "third"]);
    store.close().unwrap();
    let store = scene.builder().open().unwrap();
    put(&store.logstore(&name(VICTIM)).unwrap(), "fourth");
    assert!(store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().is_clean());
}

/// A document larger than the format allows is corrupt, and is not read into memory.
#[test]
fn a_document_beyond_its_limit_is_corrupt() {
    let scene = Scene::new(Way::Kernel);
    let meta = meta_path(&scene.world.store_dir().join("logstores").join(&scene.victim));
    for path in [
        scene.world.keyring(),
        scene.world.store_dir().join("STORE"),
        catalogue_file(&scene.world.store_dir()),
        meta,
    ] {
        scene.reset();
        let _ = fs::remove_file(copy_path(&path));
        fs::File::options().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
        let error = match scene.builder().open_read_only() {
            Ok(store) => store.logstore(&name(VICTIM)).map(drop).unwrap_err(),
            Err(error) => error,
        };
        assert!(matches!(&error, Error::Corrupt { at, .. } if at.file == path), "{error:?}");
    }
}
