//! Interrupted creations.

use super::*;

/// Creates files at all names that a temporary file of `path` may have, each locked by a live
/// process: this one.
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

/// The last step of a creation before the interruption.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    /// Only the directory.
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
    /// `STORE`. The creation record is not removed yet.
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

/// The first file of the catalogue. The first opening replaces it.
const FIRST: &str = "catalogue/0000000000-0000000001";
const CREATE: &[&str] = &["create", "p/a"];

/// A store whose creation failed at a stage, made of files that the program wrote.
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
    fs::create_dir(scene.store("catalogue")).unwrap();
    chmod(scene.store("catalogue"), 0o700);
    let first = scene.store(FIRST);
    let held = occupy(&first);
    scene.run(CREATE).sentence(1);
    release(held);
    assert!(scene.keyring().is_file() && !first.exists());
    match stage {
        Stage::Keyring => ["audit", "catalogue", "logstores", "probes"]
            .iter()
            .for_each(|name| remove(&scene.store(name))),
        Stage::SomeDirectories => {
            ["logstores", "probes"].iter().for_each(|name| remove(&scene.store(name)))
        }
        _ => {}
    }
    if stage <= Stage::Directories {
        return scene;
    }
    let held = occupy(&scene.store("STORE"));
    scene.run(CREATE).sentence(1);
    release(held);
    assert!(first.is_file() && scene.store("EPOCH").is_file() && !scene.store("STORE").exists());
    if stage == Stage::Store {
        let record = fs::read(scene.store("CREATING")).unwrap();
        scene.run(CREATE).assert(0);
        fs::write(scene.store("CREATING"), record).unwrap();
    }
    scene
}

/// The next creation continues one that was interrupted, with its keyring.
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
        let (kind, sentence) = scene
            .run(&[&["--json"], CREATE].concat())
            .json_error(if stage == Stage::Directory { 1 } else { 7 });
        let expected = if stage == Stage::Directory { "keyring_exists" } else { "keyring_foreign" };
        assert_eq!(kind, expected, "{stage:?}: {sentence}");
        let now = (picture(&scene.store("")), picture(&scene.world.path("secret")));
        let names = |picture: &BTreeMap<PathBuf, (u32, u64, u32, u32, Vec<u8>)>| {
            picture
                .clone()
                .into_iter()
                .filter(|(path, _)| !path.ends_with("LOCK"))
                .collect::<Vec<_>>()
        };
        assert!(
            names(&before.0) == names(&now.0) && before.1 == now.1,
            "{stage:?}: something has changed"
        );
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
            assert!(
                before == (picture(&scene.store("")), picture(&scene.world.path("secret"))),
                "{stage:?}: {what}"
            );
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
            assert!(
                before == (picture(&scene.store("")), picture(&scene.world.path(""))),
                "{thing:?}"
            );
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
        (Stage::Directories, "catalogue"),
        (Stage::Catalogue, "catalogue"),
        (Stage::Catalogue, FIRST),
        (Stage::Catalogue, "EPOCH"),
    ];
    // A creation raises the epoch before it reads the catalogue.
    let everything = |scene: &Scene, name: &str| {
        let mut found = picture(&scene.world.path(""));
        if name == FIRST {
            found.remove(&scene.store("EPOCH"));
        }
        found
    };
    for (stage, name) in targets {
        let scene = interrupted(stage);
        let (target, aside) = (scene.store(name), scene.world.path("aside"));
        for thing in if target.is_dir() { Thing::NO_DIRECTORY } else { Thing::NO_FILE } {
            fs::rename(&target, &aside).unwrap();
            thing.put(&target, &scene.precious());
            let before = everything(&scene, name);
            let sentence = scene.run(CREATE).sentence(5);
            assert!(
                sentence.contains(&format!("{name} is a ")),
                "{stage:?}: {name} as {thing:?}: {sentence}"
            );
            assert!(before == everything(&scene, name), "{stage:?}: {name} as {thing:?}");
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
    remove(&early.store("STORE.copy"));
    // With and without the record of its own creation, its keyring, its lock file and its audit
    // log.
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
                for args in [
                    CREATE,
                    &["create", "p/new"],
                    &["append", "p/a"],
                    &["keys", "recover", "--without-keyring"],
                ] {
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
        let base = |args: &[&str]| {
            [&["--store", &*store], args]
                .concat()
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
        };
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
