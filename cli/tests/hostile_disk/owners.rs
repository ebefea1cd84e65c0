//! Modes, umasks and owners.

use super::*;

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
                command
                    .args(["-c", &format!("umask {umask}; exec \"$0\" \"$@\"")])
                    .arg(&program)
                    .args(args);
                command.current_dir(&dir);
                if user != 0 {
                    command.uid(user).gid(user);
                }
                let out = feed(command, b"a line\n");
                assert_eq!(out.status, Some(0), "{umask}, {user}: {args:?}: {}", out.stderr);
                out.text()
            };
            let what = format!("{umask}, {user}");
            let key = run(&[
                "--store",
                "s",
                "kms",
                "create-key",
                "--region",
                "cn-hangzhou",
                "--grant",
                common::ROLE,
            ]);
            let conf = byok("default", key.trim()).to_string();
            for (store, options) in [("s", &[][..]), ("g", &["--group-read", "--kms-dir", "s.kms"])]
            {
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
                    assert_eq!(
                        mode(dir.join(format!("{store}-{out}"))),
                        0o600,
                        "{what}: --out {store}-{out}"
                    );
                }
            }
            assert_modes(&dir.join("s"), 0o600, 0o700, &what);
            assert_modes(&dir.join("s.kms"), 0o600, 0o700, &what);
            assert_modes(&dir.join("g"), 0o640, 0o750, &what);
            assert_eq!(
                (mode(dir.join("s.keyring")), mode(dir.join("g.keyring"))),
                (0o600, 0o600),
                "{what}"
            );
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
    // Root recreates the lock files.
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
    let Some(home) = Home::new("root makes a store in the directory of another user") else {
        return;
    };
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
        for args in [
            &["keys", "rotate-service"][..],
            &["keys", "rotate-data", "p/a"],
            &["append", "p/a"],
            &["verify"],
        ] {
            ok(0, args);
            let found = fs::metadata(&keyring).unwrap();
            assert_eq!(
                (found.uid(), found.gid(), found.mode() & 0o7777),
                (USER, USER, 0o600),
                "{args:?}"
            );
            ok(USER, &["read", "p/a"]);
        }
    }
    home.assert_owned("the store");
    assert_eq!(fs::read_dir(&secret).unwrap().count(), 1);
    // The user cannot replace a file there. The failure leaves no temporary file, and the store
    // works.
    let args = with(&["keys", "rotate-service"]);
    let out = home.run(USER, &args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(out.sentence(1).contains("keyring"), "{}", out.stderr);
    assert_eq!(fs::read_dir(&secret).unwrap().count(), 1);
    ok(USER, &["append", "p/a"]);
}

/// A keyring owned by root, in a directory of root, that the service reads through its group.
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
    // Root replaces its own file in the user's directory by a file of the user.
    chown(catalogue_file(&home.path("s")), Some(0), Some(0)).unwrap();
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
    // A keyring of another user is refused for the store's owner and for root.
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
        sentence.contains("cannot read the service keyring")
            && sentence.contains("ermission denied"),
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
        let path = as_it_is_now(&path, &home.path("s"));
        let mode = self::mode(&path);
        let readable = if path.is_dir() { 0o755 } else { 0o644 };
        chown(&path, Some(0), Some(0)).unwrap();
        // A writer replaces a file whose second copy it can read.
        let chmod_if_there = |mode| {
            if path.exists() {
                chmod(&path, mode);
            }
        };
        for args in [["read", "p/a"], ["append", "p/a"], ["verify", "p/a"]] {
            chmod_if_there(mode);
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
            // A reader needs only read permission.
            chmod_if_there(readable);
            if args[0] != "append" {
                home.ok(USER, &args);
            }
        }
        if path.exists() {
            home.give(&path, USER);
        }
        chmod_if_there(mode);
        home.ok(USER, &["append", "p/a"]);
    }
    home.use_store(USER, &key);
    home.assert_owned("in the end");
    assert!(refused > 20, "{refused}");
}

/// The sweep over file types, on the store of another user, interleaved with commands of root.
#[test]
fn root_follows_nothing_in_the_store_of_a_user() {
    let Some(home) = Home::new("the sweep over file types as root on the store of another user")
    else {
        return;
    };
    let key = home.fill(USER);
    home.use_store(USER, &key);
    let world = &home.scene.world;
    fs::write(world.path("precious/report"), "of root").unwrap();
    chmod(world.path("precious/report"), 0o600);
    let before = picture(&world.path("precious"));
    let store = home.path("s");
    let mut targets: Vec<PathBuf> = picture(&home.path("")).into_keys().collect();
    targets.retain(|path| {
        path.starts_with(&store) && *path != store
            || path.starts_with(home.path("s.kms").join("keys"))
    });
    targets.push(home.path("s.kms/lock"));
    let (aside, mut refused) = (world.path("aside"), 0);
    for (index, target) in targets.iter().enumerate() {
        let things = if target.is_dir() { Thing::NO_DIRECTORY } else { Thing::NO_FILE };
        let things = [things[index % 3], things[3 + index % 3]];
        for thing in things {
            let target = &as_it_is_now(target, &store);
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
            assert!(
                before == picture(&world.path("precious")),
                "{what}: something of root has changed"
            );
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
    let files =
        next_epochs(&home.path("s")).map(|epoch| format!("s/catalogue/{epoch:010}-0000000001"));
    let names =
        ["s.keyring", "s/EPOCH", "s/STORE", &format!("s.kms/keys/{key}.json")].map(str::to_owned);
    for name in files.chain(names) {
        for (end, thing) in [
            (".tmp", Thing::LinkToFile),
            (".1.tmp", Thing::Fifo),
            (".2.tmp", Thing::LinkToDirectory),
        ] {
            thing.put(&beside(&home.path(&name), end), &world.path("precious"));
        }
    }
    home.use_store(0, &key);
    assert!(
        before == picture(&world.path("precious")),
        "something of root has changed through a temporary name"
    );
}
