//! Temporary files with keys.

use super::*;

#[test]
fn a_failed_write_leaves_no_temporary_file_with_keys() {
    let scene = Scene::new();
    // A file size limit below the size of the keyring, but above the sizes of the audit log and the
    // catalogue.
    let blocks = |path: PathBuf| fs::metadata(path).unwrap().len() / 512;
    while blocks(scene.keyring()) < blocks(catalogue_file(&scene.store(""))) + 3 {
        scene.run(&["keys", "rotate-service"]).assert(0);
    }
    let limits = blocks(scene.keyring());
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
        command.args([
            "--store",
            "data/s",
            "--keyring",
            "secret/keyring",
            "keys",
            "rotate-service",
        ]);
        command.current_dir(scene.world.path(""));
        let sentence = feed(command, b"").sentence(1);
        // At the highest limit, only the keyring exceeds it.
        assert!(
            limit < limits || sentence.contains("cannot write the service keyring"),
            "{limit}: {sentence}"
        );
        assert_eq!(fs::read(scene.keyring()).unwrap(), before, "{limit}");
        assert_eq!(
            fs::read_dir(scene.world.path("secret")).unwrap().count(),
            1,
            "{limit}: {sentence}"
        );
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
    // The user may create files in that directory, but may not replace a file of root.
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
    for args in [
        &["append", "p/a"][..],
        &["keys", "rotate-data", "p/a"],
        &["create", "p/c"],
        &["delete", "p/c", "--yes"],
    ] {
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
    let before = held
        .each_ref()
        .map(|(path, _)| (fs::metadata(path).unwrap().ino(), fs::read(path).unwrap()));
    scene.run(&["keys", "rotate-service"]).assert(0);
    scene.works("beside a live process");
    assert!(!left.exists());
    assert!(
        before
            == held
                .each_ref()
                .map(|(path, _)| (fs::metadata(path).unwrap().ino(), fs::read(path).unwrap()))
    );
    // Unlocks, because closing alone leaves the lock to a child of another test that has not called
    // exec yet.
    held.iter().for_each(|(_, file)| file.unlock().unwrap());
    drop(held);
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
        // Closing alone would leave the lock to a child of another test that has not called exec
        // yet.
        held.unlock().unwrap();
    }
}
