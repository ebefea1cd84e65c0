//! The mode and the location of the keyring.

use super::*;

#[test]
fn a_keyring_that_others_have_a_right_to_is_refused() {
    let scene = Scene::new();
    let with = |more: &[&str], args: &[&str]| scene.run_with(&[more, args].concat(), b"more\n");
    let group = &["--keyring-group"][..];
    for mode in
        [0o644, 0o640, 0o660, 0o604, 0o606, 0o602, 0o620, 0o601, 0o710, 0o770, 0o777, 0o444, 0o440]
    {
        chmod(scene.keyring(), mode);
        for args in [
            &["read", "p/a"][..],
            &["append", "p/a"],
            &["keys", "rotate-service"],
            &["keys", "backup", "--out", "b"],
        ] {
            let out = with(&[], args);
            let sentence = out.sentence(7);
            assert!(
                sentence.contains("chmod 600") && sentence.contains(&format!("{mode:04o}")),
                "{sentence}"
            );
            let out = with(group, args);
            if matches!(mode, 0o640 | 0o440) {
                out.assert(0);
                // A rotation creates a new file.
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
    // With group access, a created or replaced keyring gets 0640, and the store stays private to
    // its owner.
    with(group, &["keys", "rotate-service"]).assert(0);
    assert_eq!(mode(scene.keyring()), 0o640);
    scene.world.run(&["--keyring-group", "--store", "t", "create", "p/a"]).assert(0);
    assert_eq!(mode(scene.world.path("t.keyring")), 0o640);
    assert_eq!(
        (mode(scene.world.path("t")), mode(scene.world.path("t/catalogue"))),
        (0o700, 0o700)
    );
    assert_eq!(mode(catalogue_file(&scene.world.path("t"))), 0o600);
}

#[test]
fn a_keyring_does_not_lie_inside_the_store() {
    let scene = Scene::new();
    let world = &scene.world;
    // The default keyring is next to the store directory, for every path that leads there.
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
                let out = feed(
                    world.command(&[&["--store", store, "--keyring", keyring], args].concat()),
                    b"x\n",
                );
                let sentence = out.sentence(7);
                assert!(
                    sentence.contains("inside the store directory; move it out"),
                    "{keyring}: {sentence}"
                );
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
    assert!(
        !world.path("none").exists() && fs::read_dir(world.path("empty")).unwrap().next().is_none()
    );
    let mut here = world.command(&["--store", ".", "--keyring", "k", "create", "p/a"]);
    here.current_dir(world.path("empty"));
    assert!(feed(here, b"").sentence(7).contains("inside the store directory"));
    // The name of a keyring next to the store may begin with the store's name.
    world.run(&["--store", "empty", "--keyring", "empty-k", "create", "p/a"]).assert(0);
}
