#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
};

use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::*;

/// The disk below a new directory, by each of the two ways to open it.
fn disks() -> Vec<(tempfile::TempDir, Arc<dyn Disk>)> {
    let rooted = |beneath: fn(&Path) -> io::Result<Arc<dyn Disk>>| {
        let dir = tempfile::tempdir().unwrap();
        let disk = beneath(dir.path()).unwrap();
        (dir, disk)
    };
    vec![
        rooted(|dir| RealDisk.beneath(dir, Access::Owner)),
        rooted(|dir| RealDisk.beneath_by_walking(dir, Access::Owner)),
    ]
}

/// Three of the numbers, from the manual page of `statfs(2)`.
#[cfg(target_os = "linux")]
#[test]
fn network_file_systems_are_known_by_their_numbers() {
    let names = [0x6969, 0xff53_4d42, 0x0102_1997].map(real::network_file_system);
    assert_eq!(names, [Some("NFS"), Some("SMB"), Some("9P")]);
    // proc, tmpfs, ext4, btrfs, xfs, overlayfs, FUSE.
    for local in [0x9fa0, 0x0102_1994, 0xef53, 0x9123_683e, 0x5846_5342, 0x794c_7630, 0x6573_5546] {
        assert_eq!(real::network_file_system(local), None, "{local:#x}");
    }
    let proc = Path::new("/proc");
    assert_eq!(RealDisk.network_file_system(proc).unwrap(), None);
    assert_eq!(
        RealDisk.beneath(proc, Access::Owner).unwrap().network_file_system(proc).unwrap(),
        None
    );
    RealDisk.network_file_system(Path::new("/missing")).unwrap_err();
}

fn wrong_type(error: &io::Error) -> Option<(&Path, FileKind, FileKind)> {
    let wrong: &WrongFileType = error.get_ref()?.downcast_ref()?;
    Some((&wrong.path, wrong.expected, wrong.found))
}

fn fifo(path: &Path) {
    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
}

/// There is no mark as long as a change may leave the times of the directory as they are.
#[test]
fn a_directory_that_has_just_changed_has_no_mark() {
    const SECOND: i128 = 1_000_000_000;
    let last = 1_800_000_000 * SECOND + 1;
    for (modified, changed) in [(last, last - 5), (last - 5, last)] {
        let mark = |now| real::mark_of(modified, changed, now);
        for early in [0, last - SECOND, last, last + SECOND / 20 - 1] {
            assert_eq!(mark(early), None);
        }
        let found = mark(last + SECOND / 20);
        assert!(found.is_some() && found == mark(last + 100 * SECOND));
        assert_ne!(found, real::mark_of(changed, modified, last + SECOND));
    }
    // A file system with whole seconds, or every other one.
    let mark = |now| real::mark_of(last - 1, last - 1, now);
    assert_eq!(mark(last + 2 * SECOND), None);
    assert!(mark(last + 3 * SECOND).is_some());
}

#[test]
fn a_directory_shows_that_its_names_change() {
    for (dir, disk) in disks() {
        let below = dir.path().join("below");
        disk.create_dir(&below).unwrap();
        let mark = || {
            let mut marks = std::iter::from_fn(|| Some(disk.names_mark(&below).unwrap()));
            marks.by_ref().flatten().next().unwrap()
        };
        let mut before = mark();
        let (one, two) = (below.join("one"), below.join("two"));
        let changes: [&dyn Fn(); 4] = [
            &|| fs::write(&one, "").unwrap(),
            &|| disk.rename(&one, &two).unwrap(),
            &|| drop(disk.open(&one, OpenMode::CreateNew).unwrap()),
            &|| disk.remove_file(&two).unwrap(),
        ];
        for change in changes {
            assert_eq!(mark(), before);
            change();
            assert_ne!(mark(), before);
            before = mark();
        }
        fs::write(&one, "changes no name").unwrap();
        assert_eq!(mark(), before);
        assert_eq!(RealDisk.names_mark(&below).unwrap(), Some(before));
        disk.names_mark(&dir.path().join("missing")).unwrap_err();
    }
}

#[test]
fn temporary_names() {
    for number in [0, 1, 9, 63] {
        let path = temporary_path(Path::new("dir/x"), number);
        assert!(is_temporary(path.file_name().unwrap().to_str().unwrap(), "x"), "{path:?}");
    }
    for name in [
        "x",
        "xtmp",
        "x.tm",
        "x.0.tmp",
        "x.01.tmp",
        "x.64.tmp",
        "x.+1.tmp",
        "x.-1.tmp",
        "x..tmp",
        "y.tmp",
        "x.a.tmp",
        "x.tmp.tmp",
    ] {
        assert!(!is_temporary(name, "x"), "{name}");
    }
}

#[test]
fn no_symlink_below_the_root_is_followed() {
    for (dir, disk) in disks() {
        let dir = dir.path();
        fs::create_dir_all(dir.join("real/deep")).unwrap();
        fs::write(dir.join("real/deep/file"), "contents").unwrap();
        symlink("real", dir.join("link")).unwrap();
        symlink("file", dir.join("real/deep/link")).unwrap();
        fifo(&dir.join("real/fifo"));

        assert_eq!(read_file(&*disk, &dir.join("real/deep/file"), 100).unwrap(), b"contents");
        let through = dir.join("link/deep/file");
        for error in [
            disk.open(&through, OpenMode::Read).map(drop).unwrap_err(),
            disk.open(&dir.join("link/deep/new"), OpenMode::CreateNew).map(drop).unwrap_err(),
            disk.remove_file(&through).unwrap_err(),
            disk.rename(&through, &dir.join("real/other")).unwrap_err(),
            disk.rename_new(&dir.join("real/deep/file"), &dir.join("link/other")).unwrap_err(),
            disk.create_dir(&dir.join("link/new")).unwrap_err(),
            disk.remove_dir(&dir.join("link/deep")).unwrap_err(),
            disk.sync_dir(&dir.join("link/deep")).unwrap_err(),
            disk.list_dir(&dir.join("link")).unwrap_err(),
            disk.stat(&through).unwrap_err(),
            disk.beneath(&dir.join("link"), Access::Owner).map(drop).unwrap_err(),
        ] {
            let link = dir.join("link");
            assert_eq!(
                wrong_type(&error),
                Some((&*link, FileKind::Directory, FileKind::Symlink)),
                "{error}"
            );
        }
        for mode in [OpenMode::Read, OpenMode::ReadWrite] {
            for (name, found) in [
                ("real/deep/link", FileKind::Symlink),
                ("real/fifo", FileKind::Fifo),
                ("real/deep", FileKind::Directory),
            ] {
                let path = dir.join(name);
                let error = disk.open(&path, mode).map(drop).unwrap_err();
                assert_eq!(wrong_type(&error), Some((&*path, FileKind::File, found)), "{error}");
            }
        }
        let file = dir.join("real/deep/file");
        let error = disk.list_dir(&file).unwrap_err();
        assert_eq!(
            wrong_type(&error),
            Some((&*file, FileKind::Directory, FileKind::File)),
            "{error}"
        );
        assert_eq!(
            disk.stat(&dir.join("real/deep/link")).unwrap().unwrap().kind,
            FileKind::Symlink
        );
        assert_eq!(disk.stat(&dir.join("real/none/none")).unwrap(), None);
        for outside in [dir.join("../x"), dir.join("real/../x"), "/etc/passwd".into(), "x".into()] {
            let error = disk.open(&outside, OpenMode::Read).map(drop).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{outside:?}");
        }
        let kinds = disk.list_dir(&dir.join("real")).unwrap();
        let kind = |name: &str| kinds.iter().find(|entry| entry.name == name).unwrap().kind;
        assert_eq!((kind("deep"), kind("fifo")), (FileKind::Directory, FileKind::Fifo));
    }
}

#[test]
fn a_root_stays_the_directory_that_it_was() {
    for (dir, disk) in disks() {
        let parent = tempfile::tempdir().unwrap();
        let (root, link) = (dir.path(), parent.path().join("link"));
        fs::write(root.join("file"), "kept").unwrap();
        symlink(root, &link).unwrap();
        let through = RealDisk.beneath(&link, Access::Owner).unwrap();
        fs::remove_file(&link).unwrap();
        symlink("/", &link).unwrap();
        assert_eq!(read_file(&*through, &link.join("file"), 100).unwrap(), b"kept");
        assert_eq!(read_file(&*disk, &root.join("file"), 100).unwrap(), b"kept");
    }
}

#[test]
fn modes_are_as_asked_for() {
    for (access, file_mode, dir_mode) in
        [(Access::Owner, 0o600, 0o700), (Access::GroupRead, 0o640, 0o750)]
    {
        let dir = tempfile::tempdir().unwrap();
        let disk = RealDisk.beneath(dir.path(), access).unwrap();
        let (file, sub) = (dir.path().join("file"), dir.path().join("sub"));
        disk.open(&file, OpenMode::CreateNew).unwrap();
        disk.create_dir(&sub).unwrap();
        write_file(&*disk, &sub.join("document"), b"x", Existing::Replace).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!(
            (mode(&file), mode(&sub), mode(&sub.join("document"))),
            (file_mode, dir_mode, file_mode)
        );
    }
}

#[test]
fn a_file_is_replaced_or_kept_whole() {
    for (dir, disk) in disks() {
        let path = dir.path().join("x");
        write_file(&*disk, &path, b"one", Existing::Keep).unwrap();
        let error = write_file(&*disk, &path, b"two", Existing::Keep).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"one");
        write_file(&*disk, &path, b"three", Existing::Replace).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"three");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
        // A directory has the name already.
        let taken = dir.path().join("taken");
        fs::create_dir(&taken).unwrap();
        assert!(write_file(&*disk, &taken, b"four", Existing::Replace).is_err());
        assert!(write_file(&*disk, &taken, b"four", Existing::Keep).is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "no temporary file is left");
    }
}

#[test]
fn the_name_of_a_temporary_file_may_be_taken() {
    for (dir, disk) in disks() {
        let path = dir.path().join("x");
        let temporary = |number| temporary_path(&path, number);
        fs::create_dir(temporary(0)).unwrap();
        symlink("/etc/passwd", temporary(1)).unwrap();
        fifo(&temporary(2));
        fs::write(temporary(3), "of a process that is gone").unwrap();
        fs::write(temporary(4), "of a process that is alive").unwrap();
        let alive = disk.open(&temporary(4), OpenMode::ReadWrite).unwrap();
        assert!(alive.try_lock().unwrap());

        let made = Temporary::create(&*disk, &path).unwrap();
        assert_eq!(made.path, temporary(3));
        assert_eq!(
            Temporary::create(&*disk, &path).unwrap().path,
            temporary(5),
            "the third is in use now"
        );
        drop(made);
        remove_temporaries(&*disk, &path).unwrap();
        let left = |number| fs::symlink_metadata(temporary(number)).is_ok();
        assert_eq!([0, 1, 2, 3, 4, 5].map(left), [true, true, true, false, true, false]);
        drop(alive);
        remove_temporaries(&*disk, &path).unwrap();
        assert!(!left(4));
        write_file(&*disk, &path, b"one", Existing::Replace).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"one");
    }
}

#[test]
fn a_path_is_resolved_to_where_it_leads() {
    let dir = tempfile::tempdir().unwrap();
    let root = fs::canonicalize(dir.path()).unwrap();
    fs::create_dir_all(root.join("a/b")).unwrap();
    symlink("b/target", root.join("a/one")).unwrap();
    symlink("a/one", root.join("two")).unwrap();
    symlink("a", root.join("dir")).unwrap();
    symlink("loop", root.join("loop")).unwrap();
    let resolve = |name: &str| RealDisk.resolve(&root.join(name));
    let target = root.join("a/b/target");
    // Once while the target does not exist, and once while it does.
    for _ in 0..2 {
        for name in ["a/b/target", "a/one", "two", "dir/one", "a/../two"] {
            assert_eq!(resolve(name).unwrap(), target, "{name}");
        }
        fs::write(&target, "x").unwrap();
    }
    assert_eq!(resolve("dir").unwrap(), root.join("a"));
    assert_eq!(resolve("dir/.").unwrap(), root.join("a"));
    assert_eq!(resolve("dir/b/..").unwrap(), root.join("a"));
    assert!(resolve("loop").is_err());
    assert_eq!(resolve("none/x").unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn a_rename_without_replacing_works_by_a_link_too() {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (dir.path().join("from"), dir.path().join("to"));
    fs::write(&from, "x").unwrap();
    real::rename_by_link(&from, &to).unwrap();
    assert_eq!((fs::read(&to).unwrap(), from.exists()), (b"x".to_vec(), false));
    assert_eq!(fs::metadata(&to).unwrap().nlink(), 1);
    fs::write(&from, "y").unwrap();
    assert_eq!(real::rename_by_link(&from, &to).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    assert_eq!(fs::read(&to).unwrap(), b"x");
}

#[test]
fn without_a_temporary_name_the_file_is_not_reported_existing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x");
    for number in 0..TEMPORARIES_MAX {
        RealDisk.create_dir(&temporary_path(&path, number)).unwrap();
    }
    for existing in [Existing::Keep, Existing::Replace] {
        let error = write_file(&RealDisk, &path, b"bytes", existing).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ResourceBusy, "{error}");
    }
}

#[test]
fn an_allocated_file_has_blocks_and_zeros() {
    for (dir, disk) in disks() {
        let (new, longer) = (dir.path().join("new"), dir.path().join("longer"));
        fs::write(&longer, [7; 50_000]).unwrap();
        for path in [&new, &longer] {
            disk.allocate(path, 40_000).unwrap();
            let meta = fs::metadata(path).unwrap();
            assert!(meta.blocks() * 512 >= 40_000, "{} blocks", meta.blocks());
        }
        assert_eq!(fs::read(&new).unwrap(), [0; 40_000]);
        assert_eq!(fs::metadata(&longer).unwrap().len(), 50_000);
        // The other name of a file is not overwritten, and no link is followed.
        fs::hard_link(&longer, dir.path().join("linked")).unwrap();
        symlink(&new, dir.path().join("symlink")).unwrap();
        for refused in ["linked", "symlink"] {
            assert!(disk.allocate(&dir.path().join(refused), 90_000).is_err(), "{refused}");
        }
        assert_eq!(fs::metadata(&longer).unwrap().len(), 50_000);
        assert!(disk.available(dir.path()).unwrap().is_some_and(|bytes| bytes > 0));
        let written = dir.path().join("written");
        real::allocate_by_writing(&written, 100_000).unwrap();
        assert_eq!(fs::read(&written).unwrap(), [0; 100_000]);
    }
}
