//! Hostile disks: links, pipes and stray files at envelog's paths, keyrings with wrong permissions,
//! files of other users, killed processes and interrupted creations.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "hostile_disk/creation.rs"]
mod creation;
#[path = "hostile_disk/files.rs"]
mod files;
#[path = "hostile_disk/keyring.rs"]
mod keyring;
#[path = "hostile_disk/owners.rs"]
mod owners;
#[path = "hostile_disk/temporaries.rs"]
mod temporaries;

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

/// A non-root user who owns a store.
const USER: u32 = 12_345;
/// A user who owns nothing.
const STRANGER: u32 = 23_456;
/// No command in these tests waits, so a command that takes this long hangs. The limit allows for a
/// busy machine.
const QUICK: Duration = Duration::from_secs(20);

/// The object placed where envelog keeps a file or a directory.
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

    /// The things that are not regular files.
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

    /// The things that are not directories.
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

    /// Creates the thing at a free path. `precious` is a directory outside the store with the file
    /// `report`.
    fn put(self, path: &Path, precious: &Path) {
        match self {
            Self::LinkToFile => symlink(precious.join("report"), path).unwrap(),
            Self::LinkToDirectory => symlink(precious, path).unwrap(),
            Self::LinkToLink => symlink(precious.join("link"), path).unwrap(),
            Self::DanglingLink => symlink(precious.join("nowhere"), path).unwrap(),
            Self::Fifo => fifo(path),
            // The path of a socket has a short maximum length.
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

/// Runs a command with this standard input, which fits into a pipe's buffer.
fn feed(command: Command, input: &[u8]) -> Out {
    let begun = Instant::now();
    let mut running = Running::start(command);
    // A process that fails early does not read its input.
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

/// Type and mode, inode, owner, group, and contents of a directory and everything below it.
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
    let path = path.as_ref();
    let found = fs::symlink_metadata(path);
    let found = found.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    found.permissions().mode() & 0o7777
}

fn chmod(path: impl AsRef<Path>, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// The path with a suffix on its last name.
fn beside(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether this process runs as root. If not, prints which part is skipped.
fn root_for(part: &str) -> bool {
    if !is_root() {
        let text = format!("NOT RUN, because the tests do not run as root: {part}\n");
        // Write directly: the test harness captures the output of `eprintln!`.
        std::io::stderr().write_all(text.as_bytes()).unwrap();
    }
    is_root()
}

/// A store at `data/s` with the keyring `secret/keyring` and the Logstores `p/a` and `p/b`, and a
/// directory `precious` beside them.
struct Scene {
    world: World,
}

impl Scene {
    fn new() -> Self {
        let scene = Self::empty();
        for name in ["p/a", "p/b"] {
            scene
                .run(&["create", name, "--encrypt-conf", &service("default").to_string()])
                .assert(0);
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
        let mut dirs: Vec<PathBuf> = fs::read_dir(self.store("logstores"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
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

    /// Fails unless the store can be written and read.
    fn works(&self, what: &str) {
        for name in ["p/a", "p/b"] {
            let out = self.append(name, "more");
            assert_eq!(out.status, Some(0), "{what}: {}", out.stderr);
            assert!(self.read(name).ends_with("more\n"), "{what}");
        }
    }
}

/// The newest file of the catalogue of a store.
fn catalogue_file(store: &Path) -> PathBuf {
    let files = fs::read_dir(store.join("catalogue")).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|path| is_catalogue_file(path)).max().unwrap()
}

/// Whether a path is in `catalogue` and has a name such as `0000000001-0000000001`.
fn is_catalogue_file(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let number = |text: &str| text.len() == 10 && text.bytes().all(|byte| byte.is_ascii_digit());
    path.parent().is_some_and(|dir| dir.ends_with("catalogue"))
        && name.split_once('-').is_some_and(|(epoch, serial)| number(epoch) && number(serial))
}

/// The current path of a catalogue file or of metadata, or of its second copy: each opening for writing starts a new
/// catalogue file, and each change of a Logstore a new metadata file.
fn as_it_is_now(path: &Path, store: &Path) -> PathBuf {
    let name = path.to_str().unwrap();
    if let Some(original) = name.strip_suffix(".copy") {
        return beside(&as_it_is_now(Path::new(original), store), ".copy");
    }
    if is_catalogue_file(path) {
        catalogue_file(store)
    } else if is_metadata(path) {
        metadata_of(path.parent().unwrap())
    } else {
        path.to_owned()
    }
}

fn is_metadata(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    name.starts_with("meta-") && !name.contains('.')
}

/// The newest metadata in the directory of a Logstore.
fn metadata_of(logstore: &Path) -> PathBuf {
    let entries = fs::read_dir(logstore).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| is_metadata(path)).max().unwrap()
}

/// The epochs of the next openings of a store for writing.
fn next_epochs(store: &Path) -> impl Iterator<Item = u64> + use<> {
    let newest = catalogue_file(store);
    let epoch: u64 = newest.file_name().unwrap().to_str().unwrap()[..10].parse().unwrap();
    epoch + 1..epoch + 30
}

/// Checks the modes of a directory and everything below it.
fn assert_modes(dir: &Path, file: u32, directory: u32, what: &str) {
    for (path, (found, ..)) in picture(dir) {
        let expected = if path.is_dir() { directory } else { file };
        assert_eq!(found & 0o7777, expected, "{what}: {}: {:o}", path.display(), found);
    }
}

/// The temporary files in a directory.
fn temporaries(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.file_name().unwrap().to_str().unwrap().contains(".tmp"));
    found.sort();
    found
}

/// A directory `home` of [`USER`], with a place for a store at `s`, and root's directories next to
/// it.
struct Home {
    scene: Scene,
    program: PathBuf,
}

impl Home {
    /// `None` if the tests do not run as root.
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

    /// Fails unless the user owns everything and no other user has access.
    fn assert_owned(&self, what: &str) {
        for (path, (_, _, uid, gid, _)) in picture(&self.path("")) {
            assert_eq!((uid, gid), (USER, USER), "{what}: {}", path.display());
        }
        assert_modes(&self.path(""), 0o600, 0o700, what);
    }

    /// Creates a key in the KMS and two Logstores, one of them under the key.
    fn fill(&self, user: u32) -> String {
        let key = self
            .ok(user, &["kms", "create-key", "--region", "cn-hangzhou", "--grant", common::ROLE]);
        let key = key.trim().to_owned();
        self.ok(user, &["create", "p/a", "--encrypt-conf", &byok("default", &key).to_string()]);
        self.ok(user, &["create", "p/b", "--encrypt-conf", &service("sm4").to_string()]);
        key
    }

    /// Runs every kind of command as the owner of a store.
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

/// A copy of the program that every user can run, in a directory that every user can enter.
fn installed(world: &World) -> PathBuf {
    let program = world.path("envelog");
    if fs::hard_link(env!("CARGO_BIN_EXE_envelog"), &program).is_err() {
        fs::copy(env!("CARGO_BIN_EXE_envelog"), &program).unwrap();
    }
    chmod(world.path(""), 0o755);
    program
}
