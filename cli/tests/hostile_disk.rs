//! A disk that is not to be trusted: links, pipes and strays where files belong, keyrings that others can reach, files of other
//! users, killed processes and interrupted creations.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{ErrorKind, Write},
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown, symlink},
        net::UnixListener,
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use common::{Out, Running, World, byok, copy_dir, service};

/// A user other than root, who owns a store.
const USER: u32 = 12_345;
/// A user who owns nothing.
const STRANGER: u32 = 23_456;
/// No command here waits for anything, so one that takes this long hangs. The machine of the tests may be busy.
const QUICK: Duration = Duration::from_secs(20);

/// What stands where envelog keeps a file or a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Thing {
    LinkToFile,
    LinkToDirectory,
    /// A symlink to a symlink to a file.
    LinkToLink,
    DanglingLink,
    Fifo,
    Socket,
    /// A directory that is not empty.
    Directory,
    /// An empty directory.
    EmptyDirectory,
    /// A regular file with other contents.
    File,
    /// A regular file that has another name outside the store.
    HardLink,
}

impl Thing {
    const ALL: [Self; 10] = [
        Self::LinkToFile,
        Self::LinkToDirectory,
        Self::LinkToLink,
        Self::DanglingLink,
        Self::Fifo,
        Self::Socket,
        Self::Directory,
        Self::EmptyDirectory,
        Self::File,
        Self::HardLink,
    ];

    /// Those that are no file.
    const NO_FILE: [Self; 8] = [
        Self::LinkToFile,
        Self::LinkToDirectory,
        Self::LinkToLink,
        Self::DanglingLink,
        Self::Fifo,
        Self::Socket,
        Self::Directory,
        Self::EmptyDirectory,
    ];

    /// Those that are no directory.
    const NO_DIRECTORY: [Self; 8] = [
        Self::LinkToFile,
        Self::LinkToDirectory,
        Self::LinkToLink,
        Self::DanglingLink,
        Self::Fifo,
        Self::Socket,
        Self::File,
        Self::HardLink,
    ];

    /// Puts it at a path where nothing is. `precious` is a directory outside the store with the file `report`.
    fn put(self, path: &Path, precious: &Path) {
        match self {
            Self::LinkToFile => symlink(precious.join("report"), path).unwrap(),
            Self::LinkToDirectory => symlink(precious, path).unwrap(),
            Self::LinkToLink => symlink(precious.join("link"), path).unwrap(),
            Self::DanglingLink => symlink(precious.join("nowhere"), path).unwrap(),
            Self::Fifo => fifo(path),
            // The path of a socket may not be long.
            Self::Socket => {
                let short = tempfile::tempdir().unwrap();
                drop(UnixListener::bind(short.path().join("s")).unwrap());
                fs::rename(short.path().join("s"), path).unwrap();
            }
            Self::Directory => {
                fs::create_dir(path).unwrap();
                fs::write(path.join("inside"), "inside").unwrap();
            }
            Self::EmptyDirectory => fs::create_dir(path).unwrap(),
            Self::File => fs::write(path, "not written by envelog").unwrap(),
            Self::HardLink => fs::hard_link(precious.join("report"), path).unwrap(),
        }
    }
}

fn fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

/// Runs a command with these bytes on standard input, which a pipe holds at once.
fn feed(command: Command, input: &[u8]) -> Out {
    let begun = Instant::now();
    let mut running = Running::start(command);
    // A process that fails early does not read it.
    let _ = running.stdin.take().unwrap().write_all(input);
    let out = running.finish();
    assert!(begun.elapsed() < QUICK, "it takes {:?}: {}", begun.elapsed(), out.stderr);
    out
}

fn remove(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound),
    }
}

/// Type and mode, inode, owner, group, and contents of everything below a directory, and of the directory.
fn picture(dir: &Path) -> BTreeMap<PathBuf, (u32, u64, u32, u32, Vec<u8>)> {
    let mut found = BTreeMap::new();
    let mut rest = vec![dir.to_owned()];
    while let Some(path) = rest.pop() {
        let stat = fs::symlink_metadata(&path).unwrap();
        let mut bytes = Vec::new();
        if stat.is_dir() {
            rest.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else if stat.is_file() {
            bytes = fs::read(&path).unwrap();
        }
        found.insert(path, (stat.mode(), stat.ino(), stat.uid(), stat.gid(), bytes));
    }
    found
}

fn mode(path: impl AsRef<Path>) -> u32 {
    fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
}

fn chmod(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// The path with something added to its last name.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether this process is root's. If not, says which part is not run.
fn root_for(part: &str) -> bool {
    if !is_root() {
        let text = format!("NOT RUN, because the tests do not run as root: {part}\n");
        // The test harness would capture what `eprintln!` prints.
        std::io::stderr().write_all(text.as_bytes()).unwrap();
    }
    is_root()
}

/// A store at `data/s` with the keyring `secret/keyring` and the Logstores `p/a` and `p/b`, and a directory `precious` beside them.
struct Scene {
    world: World,
}

impl Scene {
    fn new() -> Self {
        let scene = Self::empty();
        for name in ["p/a", "p/b"] {
            scene.run(&["create", name, "--encrypt-conf", &service("default").to_string()]).assert(0);
        }
        scene.append("p/a", "first").assert(0);
        scene.append("p/b", "other").assert(0);
        scene
    }

    fn empty() -> Self {
        let world = World::new();
        for dir in ["data", "secret", "precious"] {
            fs::create_dir(world.path(dir)).unwrap();
        }
        fs::write(world.path("precious/report"), "an audit report").unwrap();
        fs::write(world.path("precious/id_rsa"), "a key").unwrap();
        fs::create_dir(world.path("precious/empty")).unwrap();
        symlink("report", world.path("precious/link")).unwrap();
        Self { world }
    }

    fn store(&self, name: &str) -> PathBuf {
        self.world.path("data/s").join(name)
    }

    fn keyring(&self) -> PathBuf {
        self.world.path("secret/keyring")
    }

    fn precious(&self) -> PathBuf {
        self.world.path("precious")
    }

    /// The directories of all Logstores.
    fn logstores(&self) -> Vec<PathBuf> {
        let mut dirs: Vec<PathBuf> =
            fs::read_dir(self.store("logstores")).unwrap().map(|entry| entry.unwrap().path()).collect();
        dirs.sort();
        dirs
    }

    fn run(&self, args: &[&str]) -> Out {
        self.run_with(args, b"")
    }

    fn run_with(&self, args: &[&str], input: &[u8]) -> Out {
        let begun = Instant::now();
        let base = ["--store", "data/s", "--keyring", "secret/keyring", "--kms-dir", "data/s.kms"];
        let out = self.world.run_with(&[&base[..], args].concat(), input);
        assert!(begun.elapsed() < QUICK, "{args:?} takes {:?}", begun.elapsed());
        out
    }

    fn append(&self, name: &str, line: &str) -> Out {
        self.run_with(&["append", name], format!("{line}\n").as_bytes())
    }

    fn read(&self, name: &str) -> String {
        let out = self.run(&["read", name]);
        out.assert(0);
        out.text()
    }

    /// Fails unless the store is written and read as ever.
    fn works(&self, what: &str) {
        for name in ["p/a", "p/b"] {
            let out = self.append(name, "more");
            assert_eq!(out.status, Some(0), "{what}: {}", out.stderr);
            assert!(self.read(name).ends_with("more\n"), "{what}");
        }
    }
}

/// disk-01: nothing is locked, truncated or written through `LOCK`.
#[test]
fn a_lock_file_that_is_none_is_refused_and_leads_nowhere() {
    let scene = Scene::new();
    let lock = scene.store("LOCK");
    let before = (picture(&scene.precious()), picture(&scene.world.path("secret")));
    let check = |what: &str| {
        let found = fs::symlink_metadata(&lock).unwrap();
        for args in
            [&["append", "p/a"][..], &["keys", "rotate-data", "p/a"], &["delete", "p/a", "--yes"], &["create", "p/c"]]
        {
            let sentence = scene.run_with(args, b"x\n").sentence(5);
            assert!(sentence.contains("LOCK is a "), "{what}: {sentence}");
            assert!(sentence.contains("put the original back"), "{what}: {sentence}");
        }
        // Readers need no lock.
        assert_eq!(scene.read("p/a"), "first\n", "{what}");
        assert_eq!(fs::symlink_metadata(&lock).unwrap().ino(), found.ino(), "{what}");
        assert!(before == (picture(&scene.precious()), picture(&scene.world.path("secret"))), "{what}");
        remove(&lock);
    };
    remove(&lock);
    for thing in Thing::NO_FILE {
        thing.put(&lock, &scene.precious());
        check(&format!("{thing:?}"));
    }
    for target in ["../../secret/keyring", "catalogue", "STORE", "LOCK", "logstores"] {
        symlink(target, &lock).unwrap();
        check(target);
    }
    if root_for("LOCK is a device") {
        assert!(Command::new("mknod").arg(&lock).args(["c", "1", "3"]).status().unwrap().success());
        check("a device");
    }
    scene.works("without LOCK");
    assert_eq!((mode(&lock), fs::metadata(&lock).unwrap().len()), (0o600, 0));
}

#[test]
fn a_lock_file_with_other_contents_or_another_name_is_not_written() {
    let scene = Scene::new();
    let lock = scene.store("LOCK");
    let before = (picture(&scene.precious()), picture(&scene.world.path("secret")));
    for contents in ["a shopping list\n", "12 monkeys", "123456789012345678901234567890\n", "\0\0\0", "-1\n"] {
        fs::write(&lock, contents).unwrap();
        scene.works(contents);
        assert_eq!(fs::read_to_string(&lock).unwrap(), contents);
    }
    // A precious file, and one that looks as if envelog had written it.
    fs::write(scene.world.path("number"), "4711\n").unwrap();
    for (target, contents) in [("precious/report", "an audit report"), ("number", "4711\n")] {
        remove(&lock);
        fs::hard_link(scene.world.path(target), &lock).unwrap();
        scene.works(target);
        assert_eq!(fs::read_to_string(scene.world.path(target)).unwrap(), contents);
    }
    remove(&lock);
    fs::hard_link(scene.keyring(), &lock).unwrap();
    scene.works("a hard link to the keyring");
    remove(&lock);
    assert!(before == (picture(&scene.precious()), picture(&scene.world.path("secret"))));
}

/// disk-03 and disk-06: what is not a file of the log does not keep the store shut, and is not touched.
#[test]
fn strays_in_the_audit_directory_keep_nothing_shut() {
    let names = [
        "audit-000002.log",
        "audit-000009.log",
        "audit-7.log",
        "audit-+2.log",
        "audit-2.log",
        "audit-0000002.log",
        "audit-000002.log.tmp",
        "audit-000000.log",
        "x",
    ];
    for thing in Thing::ALL {
        let scene = Scene::new();
        let before = picture(&scene.precious());
        for name in names {
            thing.put(&scene.store("audit").join(name), &scene.precious());
        }
        symlink("../../../secret/keyring", scene.store("audit/audit-000003.log")).unwrap();
        let keep = |picture: BTreeMap<PathBuf, _>| {
            let ours = |path: &Path| path.ends_with("audit") || path.ends_with("audit-000001.log");
            picture.into_iter().filter(|(path, _)| !ours(path)).collect::<Vec<_>>()
        };
        let planted = keep(picture(&scene.store("audit")));
        let what = format!("{thing:?}");
        scene.works(&what);
        scene.run(&["keys", "rotate-data", "p/a"]).assert(0);
        scene.run(&["keys", "rotate-service"]).assert(0);
        scene.run(&["delete", "p/b", "--yes"]).assert(0);
        scene.run(&["create", "p/b"]).assert(0);
        scene.works(&what);
        scene.run(&["keys", "audit", "--verify"]).assert(0);
        scene.run(&["verify"]).assert(0);
        let now = keep(picture(&scene.store("audit")));
        for (path, found) in &planted {
            assert!(
                now.iter().any(|(there, now)| there == path && now == found),
                "{what}: {} has changed",
                path.display()
            );
        }
        assert!(before == picture(&scene.precious()), "{what}");
    }
}

#[test]
fn audit_files_that_are_copies_garbage_or_huge_keep_nothing_shut() {
    let scene = Scene::new();
    let at = |name: &str| scene.store("audit").join(name);
    let first = fs::read(at("audit-000001.log")).unwrap();
    fs::write(at("audit-000002.log"), &first).unwrap();
    fs::write(at("audit-1.log"), &first).unwrap();
    fs::write(at("audit-000003.log"), vec![0xa5; 3000]).unwrap();
    fs::write(at("audit-000004.log"), &first[..first.len() / 3]).unwrap();
    fs::write(at("audit-000005.log"), "").unwrap();
    File::create(at("audit-000006.log")).unwrap().set_len(1126 << 20).unwrap();
    fs::write(at("audit-000007.log"), [&b"{"[..], &vec![b'x'; 1 << 20]].concat()).unwrap();
    let held = |number: u32| fs::read(at(&format!("audit-{number:06}.log"))).unwrap();
    let before: Vec<Vec<u8>> = [2, 3, 4, 7].map(held).to_vec();
    for _ in 0..2 {
        scene.works("audit files of others");
        scene.run(&["keys", "rotate-data", "p/a"]).assert(0);
        scene.run(&["keys", "audit"]).assert(0);
    }
    assert!(before == [2, 3, 4, 7].map(held), "a file that is no part of the log has changed");
    assert_eq!(fs::metadata(at("audit-000006.log")).unwrap().len(), 1126 << 20);
}

/// disk-04: every file and directory of the store, with every kind of command.
#[test]
fn no_command_waits_for_or_goes_through_what_is_no_file() {
    let scene = Scene::new();
    let key = scene.run(&["kms", "create-key", "--region", "cn-hangzhou", "--grant", common::ROLE]);
    let conf = byok("default", key.text().trim()).to_string();
    scene.run(&["create", "p/c", "--encrypt-conf", &conf]).assert(0);
    scene.append("p/c", "byok").assert(0);
    let store = scene.world.path("data/s");
    let targets: Vec<PathBuf> = picture(&store).into_keys().filter(|path| *path != store).collect();
    let before = picture(&scene.precious());
    let aside = scene.world.path("aside");
    let mut refused = 0;
    for (index, target) in targets.iter().enumerate() {
        let inside = target.strip_prefix(&store).unwrap().to_str().unwrap();
        let was_dir = target.is_dir();
        let things = if was_dir { Thing::NO_DIRECTORY } else { Thing::NO_FILE };
        // A FIFO takes the place of every target, each other thing the place of some.
        for thing in [Thing::Fifo, things[index % 4], things[4 + index % 4]] {
            let what = format!("{inside} as {thing:?}");
            fs::rename(target, &aside).unwrap();
            thing.put(target, &scene.precious());
            let inode = fs::symlink_metadata(target).unwrap().ino();
            let mut served = 0;
            for name in ["p/a", "p/b", "p/c"] {
                for args in [&["read", name][..], &["append", name], &["verify", name], &["status", name]] {
                    let out = scene.run_with(args, b"more\n");
                    // Success, or an error that names the type.
                    assert!(matches!(out.status, Some(0 | 5)), "{what}: {args:?}: {:?}: {}", out.status, out.stderr);
                    if out.status == Some(5) {
                        let said = out.stderr.clone() + &out.text();
                        assert!(said.contains(" is a "), "{what}: {args:?}: {said}");
                        refused += 1;
                    } else if args[0] == "read" {
                        served += 1;
                    }
                }
            }
            let is_shared = matches!(inside, "STORE" | "catalogue" | "audit" | "logstores" | "probes");
            assert!(is_shared || served >= 2, "{what}: {served} Logstores are served");
            for args in [&["keys", "rotate-service"][..], &["list"], &["keys", "audit"], &["create", "p/a"]] {
                let out = scene.run(args);
                assert!(matches!(out.status, Some(0 | 1 | 5)), "{what}: {args:?}: {:?}: {}", out.status, out.stderr);
            }
            assert!(before == picture(&scene.precious()), "{what}: something outside the store has changed");
            assert_eq!(fs::symlink_metadata(target).unwrap().ino(), inode, "{what}: it has been replaced");
            remove(target);
            fs::rename(&aside, target).unwrap();
        }
    }
    scene.works("all put back");
    scene.append("p/c", "more").assert(0);
    scene.run(&["verify"]).assert(0);
    println!("{} files and directories, {refused} refusals", targets.len());
    assert!(targets.len() > 15 && refused > 100, "{} {refused}", targets.len());
}

/// disk-08: a symlink to the keyring is followed once, and stays.
#[test]
fn a_symlink_to_the_keyring_stays_and_its_target_is_replaced() {
    let scene = Scene::new();
    let at = |name: &str| scene.world.path(name);
    symlink("../secret/keyring", at("data/one")).unwrap();
    symlink("one", at("data/two")).unwrap();
    symlink(at("data/two"), at("absolute")).unwrap();
    symlink("secret", at("linked")).unwrap();
    symlink("linked", at("linked-twice")).unwrap();
    let links =
        ["data/one", "data/two", "absolute", "linked/keyring", "linked-twice/keyring", "./secret/../linked/keyring"];
    let run = |keyring: &str, args: &[&str], input: &[u8]| {
        scene.world.run_with(&[&["--store", "data/s", "--keyring", keyring], args].concat(), input)
    };
    let linked = ["data/one", "data/two", "absolute", "linked", "linked-twice"];
    let targets = linked.map(|link| fs::read_link(at(link)).unwrap());
    for link in links {
        let before = fs::metadata(scene.keyring()).unwrap().ino();
        run(link, &["keys", "rotate-service"], b"").assert(0);
        assert_ne!(fs::metadata(scene.keyring()).unwrap().ino(), before, "{link}: the keyring is not replaced");
        run(link, &["append", "p/a"], b"more\n").assert(0);
        scene.works(link);
    }
    assert_eq!(linked.map(|link| fs::read_link(at(link)).unwrap()), targets);
    assert_eq!(fs::read_dir(at("secret")).unwrap().count(), 1, "nothing but the keyring");
    assert_eq!(mode(scene.keyring()), 0o600);
    // A new keyring is made at the end of a dangling link.
    symlink("../secret/new", at("data/dangling")).unwrap();
    scene.world.run(&["--store", "data/t", "--keyring", "data/dangling", "create", "p/a"]).assert(0);
    assert_eq!(mode(at("secret/new")), 0o600);
    assert!(fs::symlink_metadata(at("data/dangling")).unwrap().is_symlink());
    scene.world.run(&["--store", "data/t", "--keyring", "secret/new", "read", "p/a"]).assert(0);
    // A loop of links, a dangling link, and things that are no keyring.
    symlink("loop", at("loop")).unwrap();
    symlink("nowhere/k", at("lost")).unwrap();
    fifo(&at("fifo"));
    symlink("fifo", at("to-fifo")).unwrap();
    for (path, status) in [("loop", 1), ("lost", 7), ("fifo", 5), ("to-fifo", 5), ("secret", 5), ("/dev/null", 5)] {
        let begun = Instant::now();
        for args in [&["read", "p/a"][..], &["append", "p/a"], &["keys", "rotate-service"]] {
            let out = run(path, args, b"");
            assert!(out.sentence(status).contains(path.trim_start_matches("to-")), "{path}: {}", out.stderr);
        }
        assert!(begun.elapsed() < QUICK, "{path}");
    }
    scene.works("the keyring is as it was");
}

/// disk-12: two stores are made at the same time with one path of a keyring.
#[test]
fn of_two_stores_made_at_once_with_one_keyring_one_is_made() {
    let world = World::new();
    for round in 0..30 {
        fs::create_dir(world.path(&round.to_string())).unwrap();
        let keyring = format!("{round}/k");
        let stores = ["a", "b"].map(|name| format!("{round}/{name}"));
        let start =
            |store: &String| Running::start(world.command(&["--store", store, "--keyring", &keyring, "create", "p/l"]));
        let ends = stores.each_ref().map(start).map(Running::finish);
        let made: Vec<&String> =
            stores.iter().zip(&ends).filter(|(_, end)| end.status == Some(0)).map(|(it, _)| it).collect();
        assert_eq!(made.len(), 1, "round {round}: {} {}", ends[0].stderr, ends[1].stderr);
        let lost = ends.iter().find(|end| end.status != Some(0)).unwrap();
        assert!(lost.sentence(lost.status.unwrap()).contains("keyring"), "{}", lost.stderr);
        world.run_with(&["--store", made[0], "--keyring", &keyring, "append", "p/l"], b"x\n").assert(0);
        assert_eq!(world.ok(&["--store", made[0], "--keyring", &keyring, "read", "p/l"]), b"x\n");
        // The other one is made with a keyring of its own.
        if round % 10 != 0 {
            continue;
        }
        let other = stores.iter().find(|store| *store != made[0]).unwrap();
        world.run(&["--store", other, "--keyring", &format!("{round}/other"), "create", "p/l"]).assert(0);
        world.run_with(&["--store", other, "--keyring", &format!("{round}/other"), "append", "p/l"], b"x\n").assert(0);
    }
}

#[test]
fn of_two_processes_that_make_one_store_at_once_one_succeeds() {
    let world = World::new();
    for round in 0..30 {
        let store = format!("s{round}");
        let start = |name| Running::start(world.command(&["--store", &store, "create", name]));
        let ends = [start("p/a"), start("p/b")].map(Running::finish);
        assert!(ends.iter().any(|end| end.status == Some(0)), "round {round}: {} {}", ends[0].stderr, ends[1].stderr);
        for (end, name) in ends.iter().zip(["p/a", "p/b"]) {
            if end.status != Some(0) {
                end.sentence(end.status.unwrap());
                world.run(&["--store", &store, "create", name]).assert(0);
            }
            world.run_with(&["--store", &store, "append", name], b"x\n").assert(0);
        }
        assert!(!world.path(&store).join("CREATING").exists());
        assert_eq!(fs::read_dir(world.path("")).unwrap().count(), 2 * (round + 1), "a store and a keyring a round");
    }
}

/// disk-13: clean-up removes what the format names, and follows nothing.
#[test]
fn clean_up_follows_no_symlink_in_place_of_a_logstore() {
    for thing in Thing::ALL {
        let scene = Scene::new();
        let before = (picture(&scene.precious()), picture(&scene.world.path("secret")));
        let at = |n: u32| scene.store("logstores").join(format!("{n:032x}"));
        thing.put(&at(1), &scene.precious());
        symlink("../../../secret", at(2)).unwrap();
        symlink("../../../precious/", at(3)).unwrap();
        symlink(scene.precious(), scene.store("logstores/not-hex")).unwrap();
        // The same one level below, in what looks like the rest of an interrupted creation.
        fs::create_dir_all(at(4).join("shard-0001")).unwrap();
        symlink(scene.precious(), at(4).join("shard-0000")).unwrap();
        symlink(scene.precious().join("report"), at(4).join("shard-0001/00000000000000000001.seg")).unwrap();
        symlink(scene.precious(), at(4).join("meta")).unwrap();
        fs::create_dir(at(5)).unwrap();
        thing.put(&at(5).join("shard-0000"), &scene.precious());
        thing.put(&at(5).join("meta"), &scene.precious());
        for _ in 0..2 {
            scene.works(&format!("{thing:?}"));
        }
        assert!(before.0.iter().all(|(path, was)| picture(&scene.precious()).get(path) == Some(was)), "{thing:?}");
        assert!(before.1 == picture(&scene.world.path("secret")), "{thing:?}");
    }
}

/// disk-16: a key file that is damaged or no file concerns that key alone.
#[test]
fn a_key_file_that_is_none_concerns_no_other_kms() {
    let world = World::new();
    let precious = world.path("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("report"), "an audit report").unwrap();
    symlink("report", precious.join("link")).unwrap();
    let make = |dir: &str, region: &str| {
        let made = world.ok(&["--kms-dir", dir, "kms", "create-key", "--region", region, "--grant", "r"]);
        String::from_utf8(made).unwrap().trim().to_owned()
    };
    let keys = [("p/a", make("k1", "region-a"), "region-a"), ("p/b", make("k2", "region-b"), "region-b")];
    let base = |args: &[&str], input: &[u8]| {
        let begun = Instant::now();
        let all = [&["--store", "s", "--kms", "local:k1", "--kms", "local:k2"], args].concat();
        let out = world.run_with(&all, input);
        assert!(begun.elapsed() < QUICK, "{args:?}");
        out
    };
    for (name, key, region) in &keys {
        let conf = serde_json::json!({"enable": true, "encrypt_type": "default",
            "user_cmk_info": {"cmk_key_id": key, "arn": "r", "region_id": region}});
        base(&["create", name, "--encrypt-conf", &conf.to_string()], b"").assert(0);
        base(&["append", name], b"x\n").assert(0);
    }
    let before = picture(&precious);
    for file in [format!("keys/{}.json", keys[0].1), "kms.json".to_owned(), "keys".to_owned()] {
        let (target, aside) = (world.path("k1").join(&file), world.path("aside"));
        for thing in if file == "keys" { Thing::NO_DIRECTORY.to_vec() } else { Thing::ALL.to_vec() } {
            fs::rename(&target, &aside).unwrap();
            thing.put(&target, &precious);
            let what = format!("{file} as {thing:?}");
            for (args, input) in
                [(&["read", "p/b"][..], &b""[..]), (&["append", "p/b"], b"y\n"), (&["status", "p/b"], b"")]
            {
                let out = base(args, input);
                assert_eq!(out.status, Some(0), "{what}: {args:?}: {}", out.stderr);
            }
            // The Logstore under that key is refused. The commands of the KMS name the file.
            assert!(matches!(base(&["read", "p/a"], b"").status, Some(4 | 5)), "{what}");
            for args in [&["list"][..], &["disable", &keys[0].1]] {
                let out = world.run(&[&["--kms-dir", "k1", "kms"], args].concat());
                assert!(out.sentence(5).contains(&file), "{what}: {args:?}: {}", out.stderr);
            }
            assert!(before == picture(&precious), "{what}");
            remove(&target);
            fs::rename(&aside, &target).unwrap();
            base(&["read", "p/a"], b"").assert(0);
        }
    }
    let lock = world.path("k1/lock");
    for thing in Thing::NO_FILE {
        remove(&lock);
        thing.put(&lock, &precious);
        let out = world.run(&["--kms-dir", "k1", "kms", "disable", &keys[0].1]);
        assert!(out.sentence(5).contains("lock"), "{thing:?}: {}", out.stderr);
        base(&["append", "p/a"], b"x\n").assert(0);
        assert!(before == picture(&precious), "{thing:?}");
    }
}

/// disk-17: what cannot be removed is reported, and keeps nothing else from working.
#[test]
fn what_a_deletion_cannot_remove_keeps_no_other_logstore_shut() {
    for thing in Thing::ALL {
        let scene = Scene::new();
        scene.run(&["create", "p/gone"]).assert(0);
        let known = scene.logstores();
        scene.append("p/gone", "x").assert(0);
        let before = picture(&scene.precious());
        // The names do not tell which directory is p/gone's, so each gets the strays.
        for dir in &known {
            thing.put(&dir.join("stray"), &scene.precious());
            thing.put(&dir.join("shard-0000/snapshot"), &scene.precious());
            thing.put(&dir.join("shard-0000/.nfs000000000001"), &scene.precious());
        }
        let deleted = scene.run(&["delete", "p/gone", "--yes"]);
        deleted.assert(0);
        let said = deleted.text() + &deleted.stderr;
        assert!(said.contains("snapshot") && said.contains(".nfs000000000001") && said.contains("stray"), "{said}");
        scene.run(&["read", "p/gone"]).sentence(1);
        scene.works(&format!("{thing:?}"));
        scene.run(&["create", "p/gone"]).assert(0);
        scene.append("p/gone", "new").assert(0);
        assert_eq!(scene.read("p/gone"), "new\n");
        for line in deleted.text().lines().filter(|line| line.starts_with("data/s/")) {
            remove(&scene.world.path(line));
        }
        let now = picture(&scene.precious());
        assert!(before.iter().all(|(path, was)| now.get(path).map(|now| (now.0, &now.4)) == Some((was.0, &was.4))));
        // Once they are gone, the next opening removes the rest.
        scene.works("the strays are gone");
        assert_eq!(scene.logstores().len(), 3, "{thing:?}");
    }
}

/// Strays of every kind in every directory, and things at the names that temporary files have.
#[test]
fn strays_and_taken_temporary_names_keep_nothing_from_working() {
    for thing in Thing::ALL {
        let scene = Scene::new();
        let before = picture(&scene.precious());
        let dirs: Vec<PathBuf> =
            picture(&scene.world.path("data/s")).into_keys().filter(|path| path.is_dir()).collect();
        let logstores = scene.logstores();
        let mut planted = Vec::new();
        let mut put = |path: PathBuf| {
            thing.put(&path, &scene.precious());
            planted.push((fs::symlink_metadata(&path).unwrap().ino(), path));
        };
        for dir in &dirs {
            for name in ["stray", ".hidden", "lost+found", "core.1234"] {
                put(dir.join(name));
            }
        }
        // A file of such a name is a leftover, and its name is used.
        if !matches!(thing, Thing::File | Thing::HardLink) {
            let mut of = vec![scene.keyring()];
            of.extend(["catalogue", "STORE", "CREATING"].map(|name| scene.store(name)));
            for logstore in &logstores {
                of.push(logstore.join("meta"));
                of.extend((0..6).map(|number| logstore.join(format!("shard-0000/{number:020}"))));
            }
            for path in of {
                put(beside(&path, ".tmp"));
                put(beside(&path, ".1.tmp"));
            }
        }
        let what = format!("{thing:?}");
        scene.works(&what);
        for args in [
            &["keys", "rotate-service"][..],
            &["keys", "rotate-data", "p/a"],
            &["keys", "rewrap"],
            &["create", "p/new"],
            &["delete", "p/new", "--yes"],
            &["verify"],
            &["keys", "audit", "--verify"],
        ] {
            let out = scene.run(args);
            assert_eq!(out.status, Some(0), "{what}: {args:?}: {}{}", out.text(), out.stderr);
        }
        scene.works(&what);
        for (inode, path) in planted {
            // The program removes names of temporary segments from a shard, and nothing else.
            let is_segment =
                path.parent().unwrap().ends_with("shard-0000") && path.extension().is_some_and(|it| it == "tmp");
            match fs::symlink_metadata(&path) {
                Ok(found) => assert_eq!(found.ino(), inode, "{what}: {} has been replaced", path.display()),
                Err(_) => assert!(is_segment, "{what}: {} is gone", path.display()),
            }
        }
        let now = picture(&scene.precious());
        assert!(
            before.iter().all(|(path, was)| now.get(path).map(|now| (now.0, &now.4)) == Some((was.0, &was.4))),
            "{what}"
        );
    }
}

#[test]
fn a_keyring_that_others_have_a_right_to_is_refused() {
    let scene = Scene::new();
    let with = |more: &[&str], args: &[&str]| scene.run_with(&[more, args].concat(), b"more\n");
    let group = &["--keyring-group"][..];
    for mode in [0o644, 0o640, 0o660, 0o604, 0o606, 0o602, 0o620, 0o601, 0o710, 0o770, 0o777, 0o444, 0o440] {
        chmod(scene.keyring(), mode);
        for args in
            [&["read", "p/a"][..], &["append", "p/a"], &["keys", "rotate-service"], &["keys", "backup", "--out", "b"]]
        {
            let out = with(&[], args);
            let sentence = out.sentence(7);
            assert!(sentence.contains("chmod 600") && sentence.contains(&format!("{mode:04o}")), "{sentence}");
            let out = with(group, args);
            if matches!(mode, 0o640 | 0o440) {
                out.assert(0);
                // A rotation makes a new file.
                chmod(scene.keyring(), mode);
                remove(&scene.world.path("b"));
            } else {
                assert!(out.sentence(7).contains("chmod 640"), "{mode:o}: {}", out.stderr);
            }
        }
        assert_eq!(with(&["--json"], &["read", "p/a"]).json_error(7).0, "keyring_unsafe");
    }
    for mode in [0o600, 0o400, 0o700] {
        chmod(scene.keyring(), mode);
        assert!(scene.read("p/a").starts_with("first"), "{mode:o}");
        scene.run(&["keys", "rotate-service"]).assert(0);
        assert_eq!(self::mode(scene.keyring()), 0o600);
    }
    // With the group, a keyring that is made or replaced gets 0640, and the store stays the owner's.
    with(group, &["keys", "rotate-service"]).assert(0);
    assert_eq!(mode(scene.keyring()), 0o640);
    scene.world.run(&["--keyring-group", "--store", "t", "create", "p/a"]).assert(0);
    assert_eq!(mode(scene.world.path("t.keyring")), 0o640);
    assert_eq!((mode(scene.world.path("t")), mode(scene.world.path("t/catalogue"))), (0o700, 0o600));
}

#[test]
fn a_keyring_does_not_lie_inside_the_store() {
    let scene = Scene::new();
    let world = &scene.world;
    // The default keyring lies beside the store, whatever path names the store.
    fs::create_dir(world.path("here")).unwrap();
    let inside = |store: &str, args: &[&str]| {
        let mut command = world.command(&[args, &["--store", store]].concat());
        feed(
            {
                command.current_dir(world.path("here"));
                command
            },
            b"x\n",
        )
    };
    inside(".", &["create", "p/a"]).assert(0);
    assert_eq!(mode(world.path("here.keyring")), 0o600);
    for store in [".", "./", "../here", "../here/", "../here/.", "audit/.."] {
        inside(store, &["append", "p/a"]).assert(0);
        inside(store, &["read", "p/a"]).assert(0);
    }
    symlink("here", world.path("link")).unwrap();
    symlink("here.keyring", world.path("link.keyring")).unwrap();
    inside("../link", &["append", "p/a"]).assert(0);
    inside("../link/.", &["append", "p/a"]).assert(0);
    world.run(&["--store", "new/", "create", "p/a"]).assert(0);
    assert!(world.path("new.keyring").is_file() && !world.path("new/.keyring").exists());

    // Paths that lead into the store.
    fs::create_dir(world.path("data/s/sub")).unwrap();
    fs::copy(scene.keyring(), scene.store("k")).unwrap();
    chmod(scene.store("k"), 0o600);
    symlink("data/s", world.path("to-store")).unwrap();
    symlink("data/s/k", world.path("to-k")).unwrap();
    symlink("to-k", world.path("to-to-k")).unwrap();
    symlink("data/s/audit", world.path("to-audit")).unwrap();
    let before = picture(&world.path("data"));
    for store in ["data/s", "to-store", "data/s/", "data/../data/s"] {
        for keyring in [
            "data/s/k",
            "data/s/new",
            "data/s/sub/k",
            "data/s/nowhere/k",
            "to-store/k",
            "to-k",
            "to-to-k",
            "to-audit/k",
            "data/s/audit/../k",
            "to-store/sub/../k",
        ] {
            for args in [
                &["read", "p/a"][..],
                &["append", "p/a"],
                &["keys", "rotate-service"],
                &["keys", "recover", "--without-keyring"],
            ] {
                let out = feed(world.command(&[&["--store", store, "--keyring", keyring], args].concat()), b"x\n");
                let sentence = out.sentence(7);
                assert!(sentence.contains("inside the store directory; move it out"), "{keyring}: {sentence}");
            }
        }
    }
    assert!(before == picture(&world.path("data")), "something in the store has changed");
    // The store does not exist yet.
    fs::create_dir(world.path("empty")).unwrap();
    symlink("empty", world.path("to-empty")).unwrap();
    for (store, keyring) in [
        ("none", "none/k"),
        ("none", "none/a/b/k"),
        ("empty", "empty/k"),
        ("to-empty", "empty/k"),
        ("empty", "to-empty/k"),
        ("./none", "none/k"),
    ] {
        let sentence = world.refused(7, &["--store", store, "--keyring", keyring, "create", "p/a"]);
        assert!(sentence.contains("inside the store directory"), "{store} {keyring}: {sentence}");
    }
    assert!(!world.path("none").exists() && fs::read_dir(world.path("empty")).unwrap().next().is_none());
    let mut here = world.command(&["--store", ".", "--keyring", "k", "create", "p/a"]);
    here.current_dir(world.path("empty"));
    assert!(feed(here, b"").sentence(7).contains("inside the store directory"));
    // A keyring beside the store may have a name that begins with the store's.
    world.run(&["--store", "empty", "--keyring", "empty-k", "create", "p/a"]).assert(0);
}

/// The modes of everything below a directory, and of the directory.
fn assert_modes(dir: &Path, file: u32, directory: u32, what: &str) {
    for (path, (found, ..)) in picture(dir) {
        let expected = if path.is_dir() { directory } else { file };
        assert_eq!(found & 0o7777, expected, "{what}: {}: {:o}", path.display(), found);
    }
}

#[test]
fn what_is_made_is_the_owners_whatever_the_umask() {
    let users: &[u32] = if root_for("a umask of another user") { &[0, USER] } else { &[0] };
    for &user in users {
        for umask in ["000", "022", "277", "777"] {
            let world = World::new();
            let program = installed(&world);
            let dir = world.path("home");
            fs::create_dir(&dir).unwrap();
            if user != 0 {
                chown(&dir, Some(user), Some(user)).unwrap();
            }
            let run = |args: &[&str]| {
                let mut command = Command::new("sh");
                command.args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\"")]).arg(&program).args(args);
                command.current_dir(&dir);
                if user != 0 {
                    command.uid(user).gid(user);
                }
                let out = feed(command, b"a line\n");
                assert_eq!(out.status, Some(0), "{umask}, {user}: {args:?}: {}", out.stderr);
                out.text()
            };
            let what = format!("{umask}, {user}");
            let key = run(&["--store", "s", "kms", "create-key", "--region", "cn-hangzhou", "--grant", common::ROLE]);
            let conf = byok("default", key.trim()).to_string();
            for (store, options) in [("s", &[][..]), ("g", &["--group-read", "--kms-dir", "s.kms"])] {
                let run = |args: &[&str]| run(&[&["--store", store], options, args].concat());
                run(&["create", "p/a", "--encrypt-conf", &conf]);
                run(&["create", "p/b"]);
                run(&["append", "p/a"]);
                run(&["append", "p/a"]);
                run(&["keys", "rotate-data", "p/a"]);
                run(&["keys", "rotate-service"]);
                run(&["kms", "rotate", key.trim()]);
                run(&["delete", "p/b", "--yes"]);
                run(&["checkpoint", "--out", &format!("{store}-checkpoint")]);
                run(&["keys", "backup", "--out", &format!("{store}-backup")]);
                run(&["keys", "audit", "--out", &format!("{store}-audit")]);
                run(&["verify"]);
                for out in ["checkpoint", "backup", "audit"] {
                    assert_eq!(mode(dir.join(format!("{store}-{out}"))), 0o600, "{what}: --out {store}-{out}");
                }
            }
            assert_modes(&dir.join("s"), 0o600, 0o700, &what);
            assert_modes(&dir.join("s.kms"), 0o600, 0o700, &what);
            assert_modes(&dir.join("g"), 0o640, 0o750, &what);
            assert_eq!((mode(dir.join("s.keyring")), mode(dir.join("g.keyring"))), (0o600, 0o600), "{what}");
        }
    }
}

/// A copy of the program that every user can run, in a directory that every user can enter.
fn installed(world: &World) -> PathBuf {
    let program = world.path("envelog");
    if fs::hard_link(env!("CARGO_BIN_EXE_envelog"), &program).is_err() {
        fs::copy(env!("CARGO_BIN_EXE_envelog"), &program).unwrap();
    }
    chmod(world.path(""), 0o755);
    program
}

/// The directory `home` of [`USER`], with room for a store at `s`, and directories of root beside it.
struct Home {
    scene: Scene,
    program: PathBuf,
}

impl Home {
    /// `None` where the tests do not run as root.
    fn new(part: &str) -> Option<Self> {
        root_for(part).then(|| {
            let scene = Scene::empty();
            let program = installed(&scene.world);
            let home = Self { scene, program };
            fs::create_dir(home.path("")).unwrap();
            chmod(home.path(""), 0o700);
            home.give(&home.path(""), USER);
            home
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scene.world.path("home").join(name)
    }

    fn give(&self, path: &Path, user: u32) {
        chown(path, Some(user), Some(user)).unwrap();
    }

    fn run(&self, user: u32, args: &[&str]) -> Out {
        let mut command = Command::new(&self.program);
        command.args(args).current_dir(self.path(""));
        if user != 0 {
            command.uid(user).gid(user);
        }
        let base = ["--store", "s"];
        command.args(if args.contains(&"--store") { &[][..] } else { &base });
        feed(command, b"more\n")
    }

    fn ok(&self, user: u32, args: &[&str]) -> String {
        let out = self.run(user, args);
        assert_eq!(out.status, Some(0), "user {user}: {args:?}: {}{}", out.text(), out.stderr);
        out.text()
    }

    /// Fails unless everything is the user's alone.
    fn assert_owned(&self, what: &str) {
        for (path, (_, _, uid, gid, _)) in picture(&self.path("")) {
            assert_eq!((uid, gid), (USER, USER), "{what}: {}", path.display());
        }
        assert_modes(&self.path(""), 0o600, 0o700, what);
    }

    /// A key in the KMS and two Logstores, one under the key.
    fn fill(&self, user: u32) -> String {
        let key = self.ok(user, &["kms", "create-key", "--region", "cn-hangzhou", "--grant", common::ROLE]);
        let key = key.trim().to_owned();
        self.ok(user, &["create", "p/a", "--encrypt-conf", &byok("default", &key).to_string()]);
        self.ok(user, &["create", "p/b", "--encrypt-conf", &service("sm4").to_string()]);
        key
    }

    /// Everything that the owner of a store does.
    fn use_store(&self, user: u32, key: &str) {
        for args in [
            &["append", "p/a"][..],
            &["append", "p/b"],
            &["read", "p/a"],
            &["read", "p/b"],
            &["keys", "rotate-data", "p/a"],
            &["keys", "rotate-service"],
            &["kms", "rotate", key],
            &["verify"],
            &["keys", "audit", "--verify"],
        ] {
            self.ok(user, args);
        }
    }
}

#[test]
fn a_command_run_as_root_in_between_locks_no_owner_out() {
    let Some(home) = Home::new("one command as root on the store of another user") else { return };
    let key = home.fill(USER);
    home.use_store(USER, &key);
    home.assert_owned("made by its owner");
    let out = home.scene.world.path("out");
    let conf = service("default").to_string();
    let commands: &[&[&str]] = &[
        &["append", "p/a"],
        &["append", "p/b"],
        &["read", "p/a"],
        &["keys", "rotate-data", "p/a"],
        &["keys", "rotate-data", "p/b"],
        &["keys", "rotate-service"],
        &["keys", "rewrap"],
        &["create", "q/new", "--encrypt-conf", &conf],
        &["append", "q/new"],
        &["delete", "q/new", "--yes"],
        &["verify"],
        &["keys", "audit", "--verify"],
        &["checkpoint", "--out", out.to_str().unwrap()],
        &["kms", "disable", &key],
        &["read", "p/b"],
        &["kms", "enable", &key],
        &["kms", "rotate", &key],
        &["kms", "create-key", "--region", "other", "--grant", "r"],
        &["status"],
    ];
    for command in commands {
        home.ok(0, command);
        home.assert_owned(&format!("root: {command:?}"));
        let is_disabled = command.starts_with(&["kms", "disable"]) || *command == ["read", "p/b"];
        if !is_disabled {
            home.ok(USER, &["append", "p/a"]);
            home.ok(USER, &["read", "p/a"]);
        }
    }
    // Root makes the lock files again.
    for name in ["s/LOCK", "s.kms/lock"] {
        remove(&home.path(name));
    }
    home.ok(0, &["append", "p/a"]);
    // Root records that the key is revoked.
    home.ok(0, &["kms", "disable", &key]);
    home.run(0, &["append", "p/a"]).sentence(3);
    home.ok(USER, &["kms", "enable", &key]);
    home.use_store(USER, &key);
    home.assert_owned("in the end");
}

#[test]
fn what_root_makes_in_the_directory_of_a_user_is_the_users() {
    let Some(home) = Home::new("root makes a store in the directory of another user") else { return };
    let key = home.fill(0);
    home.assert_owned("made by root");
    home.use_store(USER, &key);
    home.use_store(0, &key);
    home.assert_owned("used by root");
    home.use_store(USER, &key);
    home.ok(0, &["--store", "t", "create", "p/x"]);
    home.assert_owned("a second store");
}

#[test]
fn a_keyring_in_a_directory_of_root_keeps_its_owner() {
    let Some(home) = Home::new("a keyring in a directory of root") else { return };
    let secret = home.scene.world.path("secret");
    let keyring = secret.join("keyring");
    let with = |args: &[&str]| {
        [&["--store", "s", "--keyring", keyring.to_str().unwrap()], args]
            .concat()
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    };
    let ok = |user: u32, args: &[&str]| {
        let args = with(args);
        home.ok(user, &args.iter().map(String::as_str).collect::<Vec<_>>())
    };
    ok(USER, &["kms", "create-key", "--region", "cn-hangzhou", "--grant", common::ROLE]);
    ok(0, &["create", "p/a", "--encrypt-conf", &service("default").to_string()]);
    // The directory is root's, so the new keyring is root's too.
    assert_eq!(fs::metadata(&keyring).unwrap().uid(), 0);
    ok(0, &["append", "p/a"]);
    home.give(&keyring, USER);
    for _ in 0..2 {
        ok(USER, &["append", "p/a"]);
        for args in [&["keys", "rotate-service"][..], &["keys", "rotate-data", "p/a"], &["append", "p/a"], &["verify"]]
        {
            ok(0, args);
            let found = fs::metadata(&keyring).unwrap();
            assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (USER, USER, 0o600), "{args:?}");
            ok(USER, &["read", "p/a"]);
        }
    }
    home.assert_owned("the store");
    assert_eq!(fs::read_dir(&secret).unwrap().count(), 1);
    // The user cannot replace a file there. The failure leaves no temporary file, and the store works.
    let args = with(&["keys", "rotate-service"]);
    let out = home.run(USER, &args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(out.sentence(1).contains("keyring"), "{}", out.stderr);
    assert_eq!(fs::read_dir(&secret).unwrap().count(), 1);
    ok(USER, &["append", "p/a"]);
}

/// A keyring of root, in a directory of root, that the service reads by its group.
#[test]
fn a_keyring_of_root_keeps_the_group_that_reads_it() {
    let Some(home) = Home::new("a keyring of root that a group reads") else { return };
    let secret = home.scene.world.path("secret");
    let keyring = secret.join("keyring");
    let base = ["--store", "s", "--keyring", keyring.to_str().unwrap(), "--keyring-group"];
    let ok = |user: u32, args: &[&str]| home.ok(user, &[&base[..], args].concat());
    ok(0, &["create", "p/a", "--encrypt-conf", &service("default").to_string()]);
    for group in [USER, STRANGER] {
        chown(&keyring, Some(0), Some(group)).unwrap();
        ok(0, &["keys", "rotate-service"]);
        let found = fs::metadata(&keyring).unwrap();
        assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (0, group, 0o640));
    }
    chown(&keyring, Some(0), Some(USER)).unwrap();
    ok(USER, &["append", "p/a"]);
    home.assert_owned("the store");
    // Root replaces its own file in the user's directory by one of the user's.
    chown(home.path("s/catalogue"), Some(0), Some(0)).unwrap();
    ok(0, &["create", "p/b"]);
    home.assert_owned("the catalogue of root");
}

#[test]
fn a_keyring_of_another_owner_is_refused() {
    let Some(home) = Home::new("the owner of a keyring") else { return };
    home.fill(USER);
    let keyring = home.path("s.keyring");
    let own = |uid: u32, gid: u32, mode: u32| {
        chown(&keyring, Some(uid), Some(gid)).unwrap();
        chmod(&keyring, mode);
    };
    let refused = |user: u32, options: &[&str]| {
        for args in [&["read", "p/b"][..], &["append", "p/b"], &["keys", "rotate-service"]] {
            let sentence = home.run(user, &[options, args].concat()).sentence(7);
            assert!(sentence.contains("run chown on it"), "{sentence}");
        }
    };
    let group = &["--keyring-group"][..];
    // A keyring of a stranger is refused to the owner of the store and to root.
    own(STRANGER, USER, 0o640);
    refused(USER, group);
    refused(0, group);
    own(STRANGER, STRANGER, 0o600);
    refused(0, &[]);
    // A keyring of root is accepted where the process can read it.
    own(0, 0, 0o600);
    home.ok(0, &["append", "p/b"]);
    let sentence = home.run(USER, &["read", "p/b"]).sentence(1);
    assert!(
        sentence.contains("cannot read the service keyring") && sentence.contains("ermission denied"),
        "{sentence}"
    );
    own(0, USER, 0o640);
    home.ok(USER, &[group, &["append", "p/b"]].concat());
    // Root accepts a keyring of another user if that user owns the store.
    own(USER, USER, 0o600);
    home.ok(0, &["append", "p/b"]);
    home.ok(USER, &["append", "p/b"]);
    home.give(&home.path("s"), 0);
    refused(0, &[]);
    home.give(&home.path("s"), STRANGER);
    refused(0, &[]);
    home.give(&home.path("s"), USER);
    home.ok(USER, &["append", "p/b"]);
}

#[test]
fn a_file_of_another_owner_is_read_if_it_can_be() {
    let Some(home) = Home::new("files of root in the store of another user") else { return };
    let key = home.fill(USER);
    home.use_store(USER, &key);
    let mut refused = 0;
    for path in picture(&home.path("s")).into_keys() {
        let mode = self::mode(&path);
        let readable = if path.is_dir() { 0o755 } else { 0o644 };
        chown(&path, Some(0), Some(0)).unwrap();
        for args in [["read", "p/a"], ["append", "p/a"], ["verify", "p/a"]] {
            chmod(&path, mode);
            let out = home.run(USER, &args);
            if out.status != Some(0) {
                let sentence = out.sentence(1);
                assert!(
                    sentence.contains("ermission denied") && sentence.contains(" s/"),
                    "{}: {sentence}",
                    path.display()
                );
                refused += 1;
            }
            // What can be read is enough for readers.
            chmod(&path, readable);
            if args[0] != "append" {
                home.ok(USER, &args);
            }
        }
        home.give(&path, USER);
        chmod(&path, mode);
        home.ok(USER, &["append", "p/a"]);
    }
    home.use_store(USER, &key);
    home.assert_owned("in the end");
    assert!(refused > 20, "{refused}");
}

/// The sweep over file types, on the store of another user, with commands of root in between.
#[test]
fn root_follows_nothing_in_the_store_of_a_user() {
    let Some(home) = Home::new("the sweep over file types as root on the store of another user") else { return };
    let key = home.fill(USER);
    home.use_store(USER, &key);
    let world = &home.scene.world;
    fs::write(world.path("precious/report"), "of root").unwrap();
    chmod(world.path("precious/report"), 0o600);
    let before = picture(&world.path("precious"));
    let store = home.path("s");
    let mut targets: Vec<PathBuf> = picture(&home.path("")).into_keys().collect();
    targets
        .retain(|path| path.starts_with(&store) && *path != store || path.starts_with(home.path("s.kms").join("keys")));
    targets.push(home.path("s.kms/lock"));
    let (aside, mut refused) = (world.path("aside"), 0);
    for (index, target) in targets.iter().enumerate() {
        let things = if target.is_dir() { Thing::NO_DIRECTORY } else { Thing::NO_FILE };
        let things = [things[index % 3], things[3 + index % 3]];
        for thing in things {
            let what = format!("{} as {thing:?}", target.display());
            fs::rename(target, &aside).unwrap();
            thing.put(target, &world.path("precious"));
            for args in [
                &["append", "p/a"][..],
                &["append", "p/b"],
                &["keys", "rotate-data", "p/a"],
                &["keys", "rotate-service"],
                &["kms", "rotate", &key],
            ] {
                let out = home.run(0, args);
                assert!(
                    matches!(out.status, Some(0 | 1 | 4 | 5)),
                    "{what}: {args:?}: {:?}: {}",
                    out.status,
                    out.stderr
                );
                refused += u32::from(out.status == Some(5));
            }
            assert!(before == picture(&world.path("precious")), "{what}: something of root has changed");
            remove(target);
            fs::rename(&aside, target).unwrap();
            home.assert_owned(&what);
            home.ok(USER, &["append", "p/a"]);
        }
    }
    home.use_store(USER, &key);
    println!("{} files and directories, {refused} refusals", targets.len());
    assert!(targets.len() > 15 && refused > 50, "{} {refused}", targets.len());
    // Things at the names of temporary files.
    for name in ["s.keyring", "s/catalogue", "s/STORE", &format!("s.kms/keys/{key}.json")] {
        for (end, thing) in [(".tmp", Thing::LinkToFile), (".1.tmp", Thing::Fifo), (".2.tmp", Thing::LinkToDirectory)] {
            thing.put(&beside(&home.path(name), end), &world.path("precious"));
        }
    }
    home.use_store(0, &key);
    assert!(before == picture(&world.path("precious")), "something of root has changed through a temporary name");
}

/// The temporary files in a directory.
fn temporaries(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.file_name().unwrap().to_str().unwrap().contains(".tmp"));
    found.sort();
    found
}

#[test]
fn a_failed_write_leaves_no_temporary_file_with_keys() {
    let scene = Scene::new();
    for _ in 0..6 {
        scene.run(&["keys", "rotate-service"]).assert(0);
    }
    // A limit below the size of the keyring, with an audit log that has room below it.
    let limits = fs::metadata(scene.keyring()).unwrap().len() / 512;
    for limit in 0..=limits {
        for entry in fs::read_dir(scene.store("audit")).unwrap() {
            fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let before = fs::read(scene.keyring()).unwrap();
        let mut command = Command::new("sh");
        command.args([
            "-c",
            &format!("trap '' XFSZ; ulimit -f {limit}; exec \"$0\" \"$@\""),
            env!("CARGO_BIN_EXE_envelog"),
        ]);
        command.args(["--store", "data/s", "--keyring", "secret/keyring", "keys", "rotate-service"]);
        command.current_dir(scene.world.path(""));
        let sentence = feed(command, b"").sentence(1);
        // At the highest limit only the keyring does not fit.
        assert!(limit < limits || sentence.contains("cannot write the service keyring"), "{limit}: {sentence}");
        assert_eq!(fs::read(scene.keyring()).unwrap(), before, "{limit}");
        assert_eq!(fs::read_dir(scene.world.path("secret")).unwrap().count(), 1, "{limit}: {sentence}");
        assert!(temporaries(&scene.world.path("data/s")).is_empty(), "{limit}");
    }
    scene.works("after the failures");
}

#[test]
fn a_keyring_that_cannot_be_replaced_leaves_no_temporary_file() {
    let Some(home) = Home::new("a keyring in a sticky directory") else { return };
    let shared = home.scene.world.path("shared");
    fs::create_dir(&shared).unwrap();
    chmod(&shared, 0o1777);
    let keyring = shared.join("keyring");
    let base = ["--store", "s", "--keyring", keyring.to_str().unwrap(), "--keyring-group"];
    let run = |user: u32, args: &[&str]| home.run(user, &[&base[..], args].concat());
    run(USER, &["create", "p/a"]).assert(0);
    // The user may make files in that directory, but not replace one of root.
    chown(&keyring, Some(0), Some(USER)).unwrap();
    let before = fs::read(&keyring).unwrap();
    let sentence = run(USER, &["keys", "rotate-service"]).sentence(1);
    assert!(sentence.contains("cannot write the service keyring"), "{sentence}");
    assert_eq!(fs::read(&keyring).unwrap(), before);
    assert_eq!(fs::read_dir(&shared).unwrap().count(), 1);
    run(USER, &["append", "p/a"]).assert(0);
}

#[test]
fn the_next_opening_removes_the_keys_that_a_killed_process_left() {
    let scene = Scene::new();
    let secret = scene.world.path("secret");
    let leave = |name: &str| {
        fs::copy(scene.keyring(), secret.join(name)).unwrap();
        secret.join(name)
    };
    let ours = ["keyring.tmp", "keyring.1.tmp", "keyring.3.tmp", "keyring.63.tmp"];
    let others = [
        "keyring.64.tmp",
        "keyring.03.tmp",
        "keyring.x.tmp",
        "keyring.tmp.bak",
        "keyring.+3.tmp",
        "a-keyring.tmp",
        "keyring.0.tmp",
    ];
    for args in
        [&["append", "p/a"][..], &["keys", "rotate-data", "p/a"], &["create", "p/c"], &["delete", "p/c", "--yes"]]
    {
        let ours = ours.map(leave);
        let others = others.map(leave);
        // A reader changes nothing.
        assert!(scene.read("p/a").starts_with("first"));
        assert!(ours.iter().all(|path| path.exists()));
        scene.run_with(args, b"more\n").assert(0);
        assert!(ours.iter().all(|path| !path.exists()), "{args:?}: {:?}", temporaries(&secret));
        assert!(others.iter().all(|path| path.exists()), "{args:?}: {:?}", temporaries(&secret));
        others.iter().for_each(|path| remove(path));
    }
    // A temporary file that a live process has locked stays, and another name is used.
    let held = ["keyring.tmp", "keyring.2.tmp"].map(|name| {
        let path = leave(name);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        assert!(file.try_lock().is_ok());
        (path, file)
    });
    let left = leave("keyring.1.tmp");
    let before = held.each_ref().map(|(path, _)| (fs::metadata(path).unwrap().ino(), fs::read(path).unwrap()));
    scene.run(&["keys", "rotate-service"]).assert(0);
    scene.works("beside a live process");
    assert!(!left.exists());
    assert!(before == held.each_ref().map(|(path, _)| (fs::metadata(path).unwrap().ino(), fs::read(path).unwrap())));
    drop(held.map(|(path, _)| path));
    scene.works("the process is gone");
    assert_eq!(fs::read_dir(&secret).unwrap().count(), 1);
}

#[test]
fn the_embedded_kms_leaves_no_material_behind() {
    let world = World::new();
    let (one, two) = (world.create_key(), world.create_key());
    let keys = world.path("envelog-data.kms/keys");
    let file = |name: &str| keys.join(name);
    let material = fs::read(file(&format!("{one}.json"))).unwrap();
    let unborn = "key-0123456789abcdef";
    for args in [
        &["kms", "disable", &two][..],
        &["kms", "enable", &two],
        &["kms", "create-key", "--region", "r", "--grant", "g"],
        &["kms", "delete", &one, "--yes"],
    ] {
        let ours = [
            format!("{one}.json.tmp"),
            format!("{one}.json.1.tmp"),
            format!("{two}.json.9.tmp"),
            format!("{unborn}.json.tmp"),
        ];
        let others = [format!("{one}.json.99.tmp"), "readme.tmp".to_owned(), format!("{one}.tmp")];
        for name in ours.iter().chain(&others) {
            fs::write(file(name), &material).unwrap();
        }
        let locked = file(&format!("{two}.json.2.tmp"));
        fs::write(&locked, "held").unwrap();
        let held = File::options().read(true).write(true).open(&locked).unwrap();
        assert!(held.try_lock().is_ok());
        world.run(args).assert(0);
        assert!(ours.iter().all(|name| !file(name).exists()), "{args:?}: {:?}", temporaries(&keys));
        assert!(others.iter().all(|name| file(name).exists()) && locked.exists(), "{args:?}");
        drop(held);
    }
}

/// Files at all names that a temporary file of `path` may have, each held by a live process: this one.
fn occupy(path: &Path) -> Vec<(PathBuf, File)> {
    let end = |number: u32| if number == 0 { ".tmp".to_owned() } else { format!(".{number}.tmp") };
    let take = |number| {
        let path = beside(path, &end(number));
        let file = File::create_new(&path).unwrap();
        assert!(file.try_lock().is_ok());
        (path, file)
    };
    (0..64).map(take).collect()
}

fn release(held: Vec<(PathBuf, File)>) {
    held.into_iter().for_each(|(path, _)| fs::remove_file(path).unwrap());
}

/// How far a creation came before it was interrupted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// The directory alone.
    Directory,
    /// The directory and `LOCK`.
    Lock,
    /// The record of both ids.
    Record,
    /// The keyring.
    Keyring,
    /// Some of the directories.
    SomeDirectories,
    /// All directories.
    Directories,
    /// The catalogue. `STORE` is missing.
    Catalogue,
    /// `STORE`, beside the record that is not removed yet.
    Store,
}

impl Stage {
    const ALL: [Self; 8] = [
        Self::Directory,
        Self::Lock,
        Self::Record,
        Self::Keyring,
        Self::SomeDirectories,
        Self::Directories,
        Self::Catalogue,
        Self::Store,
    ];
}

const CREATE: &[&str] = &["create", "p/a"];

/// A creation that failed at a stage, with the program's own files.
fn interrupted(stage: Stage) -> Scene {
    let scene = Scene::empty();
    if stage < Stage::Record {
        fs::create_dir(scene.store("")).unwrap();
        chmod(scene.store(""), 0o700);
        if stage == Stage::Lock {
            fs::write(scene.store("LOCK"), "").unwrap();
            chmod(scene.store("LOCK"), 0o600);
        }
        return scene;
    }
    let held = occupy(&scene.keyring());
    let sentence = scene.run(CREATE).sentence(1);
    assert!(sentence.contains("cannot write the service keyring"), "{sentence}");
    release(held);
    assert!(scene.store("CREATING").is_file() && !scene.keyring().exists());
    if stage == Stage::Record {
        return scene;
    }
    // The next creation starts over, because no keyring was written.
    let held = occupy(&scene.store("catalogue"));
    scene.run(CREATE).sentence(1);
    release(held);
    assert!(scene.keyring().is_file() && !scene.store("catalogue").exists());
    match stage {
        Stage::Keyring => ["audit", "logstores", "probes"].iter().for_each(|name| remove(&scene.store(name))),
        Stage::SomeDirectories => ["logstores", "probes"].iter().for_each(|name| remove(&scene.store(name))),
        _ => {}
    }
    if stage <= Stage::Directories {
        return scene;
    }
    let held = occupy(&scene.store("STORE"));
    scene.run(CREATE).sentence(1);
    release(held);
    assert!(scene.store("catalogue").is_file() && !scene.store("STORE").exists());
    if stage == Stage::Store {
        let record = fs::read(scene.store("CREATING")).unwrap();
        scene.run(CREATE).assert(0);
        fs::write(scene.store("CREATING"), record).unwrap();
    }
    scene
}

/// disk-19: the next creation continues one that was interrupted, with its keyring.
#[test]
fn an_interrupted_creation_is_continued() {
    for stage in Stage::ALL {
        let scene = interrupted(stage);
        let keyring = fs::read(scene.keyring()).ok();
        // No command opens it as a store.
        if stage < Stage::Store {
            scene.append("p/a", "x").sentence(7);
            scene.run(&["read", "p/a"]).sentence(7);
            scene.run(CREATE).assert(0);
        }
        scene.run(&["create", "p/b"]).assert(0);
        scene.works(&format!("{stage:?}"));
        scene.run(&["verify"]).assert(0);
        scene.run(&["keys", "audit", "--verify"]).assert(0);
        assert!(
            keyring.is_none_or(|before| before == fs::read(scene.keyring()).unwrap()),
            "{stage:?}: another keyring"
        );
        assert!(!scene.store("CREATING").exists(), "{stage:?}: the record is left");
        assert_modes(&scene.store(""), 0o600, 0o700, &format!("{stage:?}"));
    }
}

#[test]
fn another_keyring_continues_no_creation() {
    let other = Scene::new();
    for stage in Stage::ALL {
        let scene = interrupted(stage);
        remove(&scene.keyring());
        fs::copy(other.keyring(), scene.keyring()).unwrap();
        let before = (picture(&scene.store("")), picture(&scene.world.path("secret")));
        let (kind, sentence) =
            scene.run(&[&["--json"], CREATE].concat()).json_error(if stage == Stage::Directory { 1 } else { 7 });
        let expected = if stage == Stage::Directory { "keyring_exists" } else { "keyring_foreign" };
        assert_eq!(kind, expected, "{stage:?}: {sentence}");
        let now = (picture(&scene.store("")), picture(&scene.world.path("secret")));
        let names = |picture: &BTreeMap<PathBuf, (u32, u64, u32, u32, Vec<u8>)>| {
            picture.clone().into_iter().filter(|(path, _)| !path.ends_with("LOCK")).collect::<Vec<_>>()
        };
        assert!(names(&before.0) == names(&now.0) && before.1 == now.1, "{stage:?}: something has changed");
    }
}

#[test]
fn a_record_of_another_creation_is_refused() {
    let other = interrupted(Stage::Directories);
    for stage in [Stage::Keyring, Stage::Directories, Stage::Catalogue] {
        let scene = interrupted(stage);
        let record = fs::read(scene.store("CREATING")).unwrap();
        let refused = |what: &str, bytes: &[u8], status: &[i32]| {
            fs::write(scene.store("CREATING"), bytes).unwrap();
            let before = (picture(&scene.store("")), picture(&scene.world.path("secret")));
            let out = scene.run(CREATE);
            assert!(status.contains(&out.status.unwrap()), "{stage:?}: {what}: {}", out.stderr);
            out.sentence(out.status.unwrap());
            assert!(before == (picture(&scene.store("")), picture(&scene.world.path("secret"))), "{stage:?}: {what}");
        };
        refused("another store's record", &fs::read(other.store("CREATING")).unwrap(), &[7]);
        refused("an empty record", b"", &[5]);
        refused("half a record", &record[..record.len() / 2], &[5]);
        refused("the keyring as a record", &fs::read(scene.keyring()).unwrap(), &[5, 7]);
        for at in [0, 10, 40, 60, record.len() / 2, record.len() - 1] {
            let mut changed = record.clone();
            changed[at] ^= 1;
            refused(&format!("bit 0 of byte {at} changed"), &changed, &[1, 5, 7]);
        }
        for thing in Thing::NO_FILE {
            remove(&scene.store("CREATING"));
            thing.put(&scene.store("CREATING"), &scene.precious());
            let before = (picture(&scene.store("")), picture(&scene.world.path("")));
            let out = scene.run(CREATE);
            assert!(out.sentence(5).contains("CREATING is a "), "{thing:?}: {}", out.stderr);
            assert!(before == (picture(&scene.store("")), picture(&scene.world.path(""))), "{thing:?}");
        }
        remove(&scene.store("CREATING"));
        fs::write(scene.store("CREATING"), &record).unwrap();
        scene.run(CREATE).assert(0);
    }
}

#[test]
fn an_interrupted_creation_leads_nowhere() {
    let targets = [
        (Stage::Lock, "LOCK"),
        (Stage::Record, "LOCK"),
        (Stage::Directories, "audit"),
        (Stage::Directories, "logstores"),
        (Stage::Catalogue, "catalogue"),
    ];
    for (stage, name) in targets {
        let scene = interrupted(stage);
        let (target, aside) = (scene.store(name), scene.world.path("aside"));
        for thing in if target.is_dir() { Thing::NO_DIRECTORY } else { Thing::NO_FILE } {
            fs::rename(&target, &aside).unwrap();
            thing.put(&target, &scene.precious());
            let before = picture(&scene.world.path(""));
            let sentence = scene.run(CREATE).sentence(5);
            assert!(sentence.contains(&format!("{name} is a ")), "{stage:?}: {name} as {thing:?}: {sentence}");
            assert!(before == picture(&scene.world.path("")), "{stage:?}: {name} as {thing:?}");
            remove(&target);
            fs::rename(&aside, &target).unwrap();
        }
        scene.run(CREATE).assert(0);
        scene.append("p/a", "x").assert(0);
    }
}

#[test]
fn a_finished_store_without_its_identity_is_never_overwritten() {
    let early = interrupted(Stage::Catalogue);
    let record = fs::read(early.store("CREATING")).unwrap();
    early.run(CREATE).assert(0);
    early.run(&["create", "p/b"]).assert(0);
    early.works("made");
    let identity = fs::read(early.store("STORE")).unwrap();
    let keyring = fs::read(early.keyring()).unwrap();
    remove(&early.store("STORE"));
    // With and without the record of its own creation, its keyring, its lock file and its audit log.
    for record in [None, Some(&record)] {
        for with_keyring in [true, false] {
            for without in [&[][..], &["LOCK"], &["audit"]] {
                let scene = Scene::empty();
                copy_dir(&early.store(""), &scene.store(""));
                if let Some(record) = record {
                    fs::write(scene.store("CREATING"), record).unwrap();
                }
                if with_keyring {
                    fs::copy(early.keyring(), scene.keyring()).unwrap();
                }
                without.iter().for_each(|name| remove(&scene.store(name)));
                let before = picture(&scene.store(""));
                for args in
                    [CREATE, &["create", "p/new"], &["append", "p/a"], &["keys", "recover", "--without-keyring"]]
                {
                    let out = scene.run_with(args, b"x\n");
                    out.sentence(7);
                }
                assert!(before == picture(&scene.store("")), "something has changed");
                assert_eq!(fs::read(scene.keyring()).ok(), with_keyring.then(|| keyring.clone()));
                // With `STORE` put back, the store works.
                if with_keyring && without != ["audit"] {
                    fs::write(scene.store("STORE"), &identity).unwrap();
                    scene.works("put back");
                }
            }
        }
    }
}

#[test]
fn a_creation_that_is_killed_at_any_time_can_be_continued() {
    let world = World::new();
    for round in 0..30_u32 {
        let store = format!("s{round}");
        let base =
            |args: &[&str]| [&["--store", &*store], args].concat().iter().map(ToString::to_string).collect::<Vec<_>>();
        let running = Running::start(world.command(&base(CREATE)));
        thread::sleep(Duration::from_micros(u64::from(round) * 700));
        running.kill();
        let again = world.run(&base(CREATE));
        // Status 1: the killed process had made the Logstore.
        assert!(matches!(again.status, Some(0 | 1)), "round {round}: {}", again.stderr);
        world.run_with(&base(&["append", "p/a"]), b"x\n").assert(0);
        world.run(&base(&["verify"])).assert(0);
        assert!(!world.path(&store).join("CREATING").exists(), "round {round}");
        assert!(temporaries(&world.path("")).is_empty(), "round {round}");
    }
}
