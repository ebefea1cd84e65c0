//! Links, pipes, devices and stray files at envelog's paths.

use super::*;

/// A name that metadata may have.
const META: &str = "meta-0000000001-0123456789abcdef";

/// The program does not lock, truncate or write through a wrong `LOCK`.
#[test]
fn a_lock_file_that_is_none_is_refused_and_leads_nowhere() {
    let scene = Scene::new();
    let lock = scene.store("LOCK");
    let before = (picture(&scene.precious()), picture(&scene.world.path("secret")));
    let check = |what: &str| {
        let found = fs::symlink_metadata(&lock).unwrap();
        for args in [
            &["append", "p/a"][..],
            &["keys", "rotate-data", "p/a"],
            &["delete", "p/a", "--yes"],
            &["create", "p/c"],
        ] {
            let sentence = scene.run_with(args, b"x\n").sentence(5);
            assert!(sentence.contains("LOCK is a "), "{what}: {sentence}");
            assert!(sentence.contains("put the original back"), "{what}: {sentence}");
        }
        // Readers need no lock.
        assert_eq!(scene.read("p/a"), "first\n", "{what}");
        assert_eq!(fs::symlink_metadata(&lock).unwrap().ino(), found.ino(), "{what}");
        assert!(
            before == (picture(&scene.precious()), picture(&scene.world.path("secret"))),
            "{what}"
        );
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
fn a_foreign_lock_file_is_not_written() {
    let scene = Scene::new();
    let lock = scene.store("LOCK");
    let before = (picture(&scene.precious()), picture(&scene.world.path("secret")));
    for contents in
        ["a shopping list\n", "12 monkeys", "123456789012345678901234567890\n", "\0\0\0", "-1\n"]
    {
        fs::write(&lock, contents).unwrap();
        scene.works(contents);
        assert_eq!(fs::read_to_string(&lock).unwrap(), contents);
    }
    // A precious file, and one that looks like a file of envelog.
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

/// Stray files in the audit directory do not prevent opening the store, and stay unchanged.
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
fn copied_garbage_or_huge_audit_files_block_nothing() {
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

/// Every file and directory of the store, with every kind of command.
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
        // A FIFO replaces every target, each other thing replaces some targets.
        for thing in [Thing::Fifo, things[index % 4], things[4 + index % 4]] {
            let target = &as_it_is_now(target, &store);
            let what = format!("{inside} as {thing:?}");
            fs::rename(target, &aside).unwrap();
            thing.put(target, &scene.precious());
            let inode = fs::symlink_metadata(target).unwrap().ino();
            let mut served = 0;
            for name in ["p/a", "p/b", "p/c"] {
                for args in
                    [&["read", name][..], &["append", name], &["verify", name], &["status", name]]
                {
                    let out = scene.run_with(args, b"more\n");
                    // Success, or an error that names the type.
                    assert!(
                        matches!(out.status, Some(0 | 5)),
                        "{what}: {args:?}: {:?}: {}",
                        out.status,
                        out.stderr
                    );
                    if out.status == Some(5) {
                        let said = out.stderr.clone() + &out.text();
                        assert!(said.contains(" is a "), "{what}: {args:?}: {said}");
                        refused += 1;
                    } else if args[0] == "read" {
                        served += 1;
                    }
                }
            }
            let is_shared = matches!(inside, "STORE" | "audit" | "logstores" | "probes")
                || inside.starts_with("catalogue");
            assert!(is_shared || served >= 2, "{what}: {served} Logstores are served");
            for args in
                [&["keys", "rotate-service"][..], &["list"], &["keys", "audit"], &["create", "p/a"]]
            {
                let out = scene.run(args);
                assert!(
                    matches!(out.status, Some(0 | 1 | 5)),
                    "{what}: {args:?}: {:?}: {}",
                    out.status,
                    out.stderr
                );
            }
            assert!(
                before == picture(&scene.precious()),
                "{what}: something outside the store has changed"
            );
            assert_eq!(
                fs::symlink_metadata(target).unwrap().ino(),
                inode,
                "{what}: it has been replaced"
            );
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

/// A symlink to the keyring is followed once, and stays.
#[test]
fn a_symlink_to_the_keyring_stays_and_its_target_is_replaced() {
    let scene = Scene::new();
    let at = |name: &str| scene.world.path(name);
    symlink("../secret/keyring", at("data/one")).unwrap();
    symlink("one", at("data/two")).unwrap();
    symlink(at("data/two"), at("absolute")).unwrap();
    symlink("secret", at("linked")).unwrap();
    symlink("linked", at("linked-twice")).unwrap();
    let links = [
        "data/one",
        "data/two",
        "absolute",
        "linked/keyring",
        "linked-twice/keyring",
        "./secret/../linked/keyring",
    ];
    let run = |keyring: &str, args: &[&str], input: &[u8]| {
        scene.world.run_with(&[&["--store", "data/s", "--keyring", keyring], args].concat(), input)
    };
    let linked = ["data/one", "data/two", "absolute", "linked", "linked-twice"];
    let targets = linked.map(|link| fs::read_link(at(link)).unwrap());
    for link in links {
        let before = fs::read(scene.keyring()).unwrap();
        run(link, &["keys", "rotate-service"], b"").assert(0);
        assert_ne!(
            fs::read(scene.keyring()).unwrap(),
            before,
            "{link}: the keyring is not replaced"
        );
        run(link, &["append", "p/a"], b"more\n").assert(0);
        scene.works(link);
    }
    assert_eq!(linked.map(|link| fs::read_link(at(link)).unwrap()), targets);
    assert_eq!(fs::read_dir(at("secret")).unwrap().count(), 1, "nothing but the keyring");
    assert_eq!(mode(scene.keyring()), 0o600);
    // Creating a keyring through a dangling link creates the target of the link.
    symlink("../secret/new", at("data/dangling")).unwrap();
    scene
        .world
        .run(&["--store", "data/t", "--keyring", "data/dangling", "create", "p/a"])
        .assert(0);
    assert_eq!(mode(at("secret/new")), 0o600);
    assert!(fs::symlink_metadata(at("data/dangling")).unwrap().is_symlink());
    scene.world.run(&["--store", "data/t", "--keyring", "secret/new", "read", "p/a"]).assert(0);
    // A loop of links, a dangling link, and other things that are not a keyring.
    symlink("loop", at("loop")).unwrap();
    symlink("nowhere/k", at("lost")).unwrap();
    fifo(&at("fifo"));
    symlink("fifo", at("to-fifo")).unwrap();
    for (path, status) in
        [("loop", 1), ("lost", 7), ("fifo", 5), ("to-fifo", 5), ("secret", 5), ("/dev/null", 5)]
    {
        let begun = Instant::now();
        for args in [&["read", "p/a"][..], &["append", "p/a"], &["keys", "rotate-service"]] {
            let out = run(path, args, b"");
            assert!(
                out.sentence(status).contains(path.trim_start_matches("to-")),
                "{path}: {}",
                out.stderr
            );
        }
        assert!(begun.elapsed() < QUICK, "{path}");
    }
    scene.works("the keyring is as it was");
}

/// Two concurrent creations use the same keyring path.
#[test]
fn of_two_stores_made_at_once_with_one_keyring_one_is_made() {
    let world = World::new();
    for round in 0..30 {
        fs::create_dir(world.path(&round.to_string())).unwrap();
        let keyring = format!("{round}/k");
        let stores = ["a", "b"].map(|name| format!("{round}/{name}"));
        let start = |store: &String| {
            Running::start(world.command(&[
                "--store",
                store,
                "--keyring",
                &keyring,
                "create",
                "p/l",
            ]))
        };
        let ends = stores.each_ref().map(start).map(Running::finish);
        let made: Vec<&String> = stores
            .iter()
            .zip(&ends)
            .filter(|(_, end)| end.status == Some(0))
            .map(|(it, _)| it)
            .collect();
        assert_eq!(made.len(), 1, "round {round}: {} {}", ends[0].stderr, ends[1].stderr);
        let lost = ends.iter().find(|end| end.status != Some(0)).unwrap();
        assert!(lost.sentence(lost.status.unwrap()).contains("keyring"), "{}", lost.stderr);
        world
            .run_with(&["--store", made[0], "--keyring", &keyring, "append", "p/l"], b"x\n")
            .assert(0);
        assert_eq!(world.ok(&["--store", made[0], "--keyring", &keyring, "read", "p/l"]), b"x\n");
        // Create the other store with its own keyring.
        if round % 10 != 0 {
            continue;
        }
        let other = stores.iter().find(|store| *store != made[0]).unwrap();
        world
            .run(&["--store", other, "--keyring", &format!("{round}/other"), "create", "p/l"])
            .assert(0);
        world
            .run_with(
                &["--store", other, "--keyring", &format!("{round}/other"), "append", "p/l"],
                b"x\n",
            )
            .assert(0);
    }
}

#[test]
fn of_two_processes_that_make_one_store_at_once_one_succeeds() {
    let world = World::new();
    for round in 0..30 {
        let store = format!("s{round}");
        let start = |name| Running::start(world.command(&["--store", &store, "create", name]));
        let ends = [start("p/a"), start("p/b")].map(Running::finish);
        assert!(
            ends.iter().any(|end| end.status == Some(0)),
            "round {round}: {} {}",
            ends[0].stderr,
            ends[1].stderr
        );
        for (end, name) in ends.iter().zip(["p/a", "p/b"]) {
            if end.status != Some(0) {
                end.sentence(end.status.unwrap());
                world.run(&["--store", &store, "create", name]).assert(0);
            }
            world.run_with(&["--store", &store, "append", name], b"x\n").assert(0);
        }
        assert!(!world.path(&store).join("CREATING").exists());
        assert_eq!(
            fs::read_dir(world.path("")).unwrap().count(),
            2 * (round + 1),
            "a store and a keyring a round"
        );
    }
}

/// Clean-up removes only names that the format defines, and follows no symlink.
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
        // The same one level deeper, in a directory that looks like the remains of an interrupted
        // creation.
        fs::create_dir_all(at(4).join("shard-0001")).unwrap();
        symlink(scene.precious(), at(4).join("shard-0000")).unwrap();
        symlink(
            scene.precious().join("report"),
            at(4).join("shard-0001/0000000001-00000000000000000000-0000000001.seg"),
        )
        .unwrap();
        symlink(scene.precious(), at(4).join(META)).unwrap();
        fs::create_dir(at(5)).unwrap();
        thing.put(&at(5).join("shard-0000"), &scene.precious());
        thing.put(&at(5).join(META), &scene.precious());
        for _ in 0..2 {
            scene.works(&format!("{thing:?}"));
        }
        assert!(
            before.0.iter().all(|(path, was)| picture(&scene.precious()).get(path) == Some(was)),
            "{thing:?}"
        );
        assert!(before.1 == picture(&scene.world.path("secret")), "{thing:?}");
    }
}

/// A damaged key file, or a non-file in its place, affects only that key.
#[test]
fn a_key_file_that_is_none_concerns_no_other_kms() {
    let world = World::new();
    let precious = world.path("precious");
    fs::create_dir(&precious).unwrap();
    fs::write(precious.join("report"), "an audit report").unwrap();
    symlink("report", precious.join("link")).unwrap();
    let make = |dir: &str, region: &str| {
        let made =
            world.ok(&["--kms-dir", dir, "kms", "create-key", "--region", region, "--grant", "r"]);
        String::from_utf8(made).unwrap().trim().to_owned()
    };
    let keys =
        [("p/a", make("k1", "region-a"), "region-a"), ("p/b", make("k2", "region-b"), "region-b")];
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
        for thing in if file == "keys" { Thing::NO_DIRECTORY.to_vec() } else { Thing::ALL.to_vec() }
        {
            fs::rename(&target, &aside).unwrap();
            thing.put(&target, &precious);
            let what = format!("{file} as {thing:?}");
            for (args, input) in [
                (&["read", "p/b"][..], &b""[..]),
                (&["append", "p/b"], b"y\n"),
                (&["status", "p/b"], b""),
            ] {
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

/// A stray that cannot be removed is reported, and does not prevent other work.
#[test]
fn what_a_deletion_cannot_remove_keeps_no_other_logstore_shut() {
    for thing in Thing::ALL {
        let scene = Scene::new();
        scene.run(&["create", "p/gone"]).assert(0);
        let known = scene.logstores();
        scene.append("p/gone", "x").assert(0);
        let before = picture(&scene.precious());
        // The directory names do not reveal which directory is p/gone's, so each gets the strays.
        for dir in &known {
            thing.put(&dir.join("stray"), &scene.precious());
            thing.put(&dir.join("shard-0000/snapshot"), &scene.precious());
            thing.put(&dir.join("shard-0000/.nfs000000000001"), &scene.precious());
        }
        let deleted = scene.run(&["delete", "p/gone", "--yes"]);
        deleted.assert(0);
        let said = deleted.text() + &deleted.stderr;
        assert!(
            said.contains("snapshot")
                && said.contains(".nfs000000000001")
                && said.contains("stray"),
            "{said}"
        );
        scene.run(&["read", "p/gone"]).sentence(1);
        scene.works(&format!("{thing:?}"));
        scene.run(&["create", "p/gone"]).assert(0);
        scene.append("p/gone", "new").assert(0);
        assert_eq!(scene.read("p/gone"), "new\n");
        for line in deleted.text().lines().filter(|line| line.starts_with("data/s/")) {
            remove(&scene.world.path(line));
        }
        let now = picture(&scene.precious());
        assert!(
            before.iter().all(
                |(path, was)| now.get(path).map(|now| (now.0, &now.4)) == Some((was.0, &was.4))
            )
        );
        // Once they are gone, the next opening removes the rest.
        scene.works("the strays are gone");
        assert_eq!(scene.logstores().len(), 3, "{thing:?}");
    }
}

/// Strays of every kind in every directory, and things at the names of temporary files.
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
        // A regular file at such a name is a leftover; the program reuses the name.
        if !matches!(thing, Thing::File | Thing::HardLink) {
            let mut of = vec![scene.keyring()];
            of.extend(["EPOCH", "STORE", "CREATING"].map(|name| scene.store(name)));
            for epoch in next_epochs(&scene.store("")) {
                of.push(scene.store(&format!("catalogue/{epoch:010}-0000000001")));
                // Each opening starts a segment with one record.
                let segment =
                    |seq: u64| format!("shard-0000/{:010}-{seq:020}-{epoch:010}", seq + 1);
                of.extend(
                    logstores
                        .iter()
                        .flat_map(|logstore| (0..6).map(|seq| logstore.join(segment(seq)))),
                );
            }
            of.extend(logstores.iter().map(|logstore| logstore.join(META)));
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
            // In a shard, the program removes only names of temporary segments.
            let is_segment = path.parent().unwrap().ends_with("shard-0000")
                && path.extension().is_some_and(|it| it == "tmp");
            match fs::symlink_metadata(&path) {
                Ok(found) => {
                    assert_eq!(found.ino(), inode, "{what}: {} has been replaced", path.display())
                }
                Err(_) => assert!(is_segment, "{what}: {} is gone", path.display()),
            }
        }
        let now = picture(&scene.precious());
        assert!(
            before.iter().all(
                |(path, was)| now.get(path).map(|now| (now.0, &now.4)) == Some((was.0, &was.4))
            ),
            "{what}"
        );
    }
}

/// `status` shows the accessible Logstores and then reports why the others are not accessible.
#[test]
fn one_unreadable_logstore_hides_no_other_in_status() {
    let scene = Scene::new();
    let segment = scene.world.segments("data/s").into_iter().find(|path| {
        let dir = path.parent().unwrap().parent().unwrap();
        fs::read(metadata_of(dir)).unwrap().windows(3).any(|part| part == b"p/a")
    });
    let segment = segment.unwrap();
    let aside = scene.world.path("aside");
    fs::rename(&segment, &aside).unwrap();
    fifo(&segment);
    let out = scene.run(&["status"]);
    out.assert(5);
    assert!(out.text().contains("p/b") && !out.text().contains("p/a"), "{}", out.text());
    assert!(out.stderr.contains("p/a") && out.stderr.contains("named pipe"), "{}", out.stderr);
    let out = scene.run(&["--json", "status"]);
    out.assert(5);
    let shown: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    assert_eq!(shown["logstores"][0]["name"], "p/b");
    assert_eq!(
        (&shown["failed"][0]["name"], &shown["failed"][0]["error"]["code"]),
        (&"p/a".into(), &"wrong_file_type".into())
    );
    remove(&segment);
    fs::rename(&aside, &segment).unwrap();
    assert!(scene.run(&["status"]).text().contains("p/a"));
}
