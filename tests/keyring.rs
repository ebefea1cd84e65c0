//! The service keyring: creation, rotation, detection of a wrong keyring, authentication of
//! documents, and recovery without it.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use common::{
    catalogue::{catalogue_dir, catalogue_file},
    failing::{FailingDisk, Failure, Published},
    *,
};
use envelog::{
    Cmk, EncryptConf, EncryptType, Error, Logstore, LogstoreSpec, Position, Result, Store,
    admin::VerifyOptions,
    crypto::AwsLc,
    error::ConfigError,
    inspect::{KeySource, SegmentHeader},
};

fn segment_headers(world: &World, logstore: &Logstore) -> Vec<SegmentHeader> {
    let paths = segments(&world.logstore_dir(logstore), 0);
    paths
        .iter()
        .map(|path| SegmentHeader::decode(&fs::read(path).unwrap()).unwrap().header)
        .collect()
}

fn mode(world: &World) -> u32 {
    fs::metadata(world.keyring()).unwrap().permissions().mode() & 0o777
}

fn plain(store: &Store, text: &str) -> Logstore {
    store.create_logstore(&name(text), LogstoreSpec::default()).unwrap()
}

#[track_caller]
fn assert_clean(store: &Store) {
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean() && report.refused.is_empty(), "{report:?}");
}

// ---- creation ----

#[test]
fn the_keyring_is_private_separate_and_never_recreated() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "one");
    assert_eq!(store.keys().keyring_path(), world.keyring());
    assert!(!world.keyring().starts_with(store.path()));
    assert_eq!(mode(&world), 0o600);
    store.keys().rotate_service_key().unwrap();
    assert_eq!(mode(&world), 0o600);
    store.close().unwrap();

    let kept = fs::read(world.keyring()).unwrap();
    fs::remove_file(world.keyring()).unwrap();
    for opened in
        [world.builder().open(), world.builder().open_read_only(), world.builder().open_or_create()]
    {
        assert!(matches!(opened, Err(Error::KeyringMissing { .. })), "{opened:?}");
        assert!(!world.keyring().exists(), "it was made again");
    }
    assert!(matches!(world.builder().create(), Err(Error::StoreExists { .. })));
    assert!(!world.keyring().exists());
    // An existing keyring is not overwritten either, by another store or by a recovery.
    write_private(&world.keyring(), &kept);
    let other = Store::builder(world.path().join("other"), world.keyring(), AwsLc::new()).create();
    assert!(matches!(other, Err(Error::KeyringExists { .. })), "{other:?}");
    assert!(matches!(world.builder().recover_all(), Err(Error::KeyringExists { .. })));
    assert_eq!(fs::read(world.keyring()).unwrap(), kept);
    assert_eq!(texts(&world.open().logstore(&name("p/l")).unwrap()), ["one"]);
}

#[test]
fn absent_anothers_and_too_old_are_three_errors() {
    let world = World::manual();
    let store = world.create();
    put(&world.service(&store, "p/l"), "one");
    let old = fs::read(world.keyring()).unwrap();
    assert_eq!(store.keys().rotate_service_key().unwrap(), 2);
    store.close().unwrap();
    let newest = fs::read(world.keyring()).unwrap();
    let other = World::manual();
    drop(other.create());

    let openings: [fn(&World) -> Result<Store>; 2] =
        [|world| world.builder().open(), |world| world.builder().open_read_only()];
    for open in openings {
        fs::remove_file(world.keyring()).unwrap();
        let path = world.keyring();
        assert!(
            matches!(open(&world), Err(Error::KeyringMissing { path: found }) if found == path)
        );
        fs::copy(other.keyring(), world.keyring()).unwrap();
        assert!(
            matches!(open(&world), Err(Error::KeyringForeign { path: found }) if found == path)
        );
        write_private(&world.keyring(), &old);
        let error = open(&world).unwrap_err();
        assert!(matches!(error, Error::KeyringTooOld { needed: 2, newest: 1, .. }), "{error:?}");
        // Each error names the file and a remedy.
        assert!(error.to_string().contains(&world.keyring().display().to_string()));
        write_private(&world.keyring(), &newest);
        assert_eq!(texts(&open(&world).unwrap().logstore(&name("p/l")).unwrap()), ["one"]);
    }
}

// ---- rotation ----

#[test]
fn a_new_version_is_durable_before_anything_is_under_it() {
    let world = World::manual();
    let disk = FailingDisk::default();
    let store = world.builder().disk(Arc::new(disk.clone())).create().unwrap();
    put(&world.service(&store, "p/service"), "one");
    let before = disk.published().len();
    store.keys().rotate_service_key().unwrap();
    let published = disk.published().split_off(before);
    let parent = world.keyring().parent().unwrap().to_owned();
    let expected = [(Published::Renamed, world.keyring()), (Published::Synced, parent)];
    assert_eq!(published[..2], expected, "{published:?}");
    assert!(published[2..].iter().any(|(how, path)| *how == Published::Renamed && is_meta(path)));
    // Finally, when everything is under the new version, the older versions are retired.
    let renamed = published.iter().filter(|(how, _)| *how == Published::Renamed);
    assert_eq!(renamed.clone().filter(|(_, path)| *path == world.keyring()).count(), 2);
    assert_eq!(renamed.clone().next_back().unwrap().1, world.keyring());
}

#[test]
fn a_keyring_write_failure_keeps_the_old_version() {
    let world = World::manual();
    let disk = FailingDisk::default();
    let store = world.builder().disk(Arc::new(disk.clone())).create().unwrap();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "one");
    let (keyring, wrapped) = (fs::read(world.keyring()).unwrap(), envelopes(&world, &logstore));
    disk.break_paths(Some("/keyring"));
    assert!(matches!(store.keys().rotate_service_key(), Err(Error::Io { .. })));
    assert_eq!(fs::read(world.keyring()).unwrap(), keyring);
    assert_eq!(envelopes(&world, &logstore), wrapped);
    put(&logstore, "two");
    store.keys().rotate_data_key(logstore.name()).unwrap();
    assert!(envelopes(&world, &logstore).iter().all(|(_, version, _)| *version == Some(1)));
    disk.break_paths(None);
    assert_eq!(store.keys().rotate_service_key().unwrap(), 2);
    put(&logstore, "three");
    store.close().unwrap();
    assert_eq!(texts(&world.open().logstore(&name("p/l")).unwrap()), ["one", "two", "three"]);
}

#[test]
fn a_rotation_rewraps_every_envelope_and_rewrites_no_data() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let (service, byok, plain) =
        (world.service(&store, "p/s"), world.byok(&store, "p/b", &cmk), plain(&store, "p/p"));
    let logstores = [&service, &byok, &plain];
    logstores.iter().for_each(|logstore| put(logstore, "one"));
    store.keys().rotate_data_key(service.name()).unwrap();
    put(&service, "two");
    let data = || -> Vec<_> {
        files(&world.store_dir())
            .into_iter()
            .filter(|(path, _)| path.extension().is_some_and(|ext| ext == "seg"))
            .collect()
    };
    let (before, byok_before) = (data(), envelopes(&world, &byok));
    let versions = |logstore| {
        envelopes(&world, logstore).iter().map(|(_, version, _)| *version).collect::<Vec<_>>()
    };
    assert_eq!(versions(&service), [Some(1), Some(1)]);
    assert_eq!(store.keys().rotate_service_key().unwrap(), 2);
    // One envelope is for the data key of future appends.
    assert_eq!(versions(&service), [Some(2); 3]);
    // The service key does not wrap the envelopes under a customer's key.
    assert_eq!(envelopes(&world, &byok), byok_before);
    // Marks are appended. The open segments without an envelope and under the older data key are
    // sealed.
    let after = data();
    assert!(
        before
            .iter()
            .zip(&after)
            .all(|(before, after)| before.0 == after.0 && after.1.starts_with(&before.1))
    );
    let ended =
        [&plain, &service].map(|logstore| segments(&world.logstore_dir(logstore), 0)).concat();
    assert!(
        after
            .iter()
            .filter(|(path, _)| ended.contains(path))
            .all(|(_, bytes)| bytes.ends_with(b"SEAL"))
    );
    // New objects are under the new version: envelopes, and the blocks of a Logstore without an
    // envelope.
    store.keys().rotate_data_key(service.name()).unwrap();
    assert_eq!(versions(&service), [Some(2); 4]);
    put(&plain, "two");
    let sources: Vec<_> =
        segment_headers(&world, &plain).iter().map(|header| header.key_source).collect();
    assert_eq!(sources, [KeySource::Keyring(1), KeySource::Keyring(2)]);
    // Re-wrapping by hand creates a new envelope for the same key.
    let wrapped = envelopes(&world, &service);
    assert_eq!(store.keys().rewrap(service.name()).unwrap(), 4);
    assert!(
        envelopes(&world, &service)
            .iter()
            .zip(&wrapped)
            .all(|(after, before)| after.1 == before.1 && after.2 != before.2)
    );
    store.close().unwrap();
    let store = world.open();
    let text = |logstore: &str| texts(&store.logstore(&name(logstore)).unwrap());
    assert_eq!(
        (text("p/s"), text("p/b"), text("p/p")),
        (vec!["one".into(), "two".into()], vec!["one".into()], vec!["one".into(), "two".into()])
    );
    assert_clean(&store);
}

#[test]
fn a_logstore_that_cannot_be_rewrapped_stops_no_other() {
    let world = World::manual();
    let store = world.create();
    let (a, b, c) =
        (world.service(&store, "p/a"), world.service(&store, "p/b"), world.service(&store, "p/c"));
    for logstore in [&a, &b, &c] {
        put(logstore, "one");
    }
    store.close().unwrap();
    let broken = meta_path(&world.logstore_dir(&b));
    let good = fs::read(&broken).unwrap();
    write_both(&broken, &good[1..]);
    let store = world.open();
    let error = store.keys().rotate_service_key().unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
    for logstore in [&a, &c] {
        assert_eq!(envelopes(&world, logstore)[0].1, Some(2), "{}", logstore.name());
    }
    // Once the file is restored, the rotation can be continued.
    write_both(&broken, &good);
    assert_eq!(texts(&store.logstore(b.name()).unwrap()), ["one"]);
    assert_eq!(envelopes(&world, &b)[0].1, Some(1));
    assert_eq!(store.keys().rotate_service_key().unwrap(), 2);
    assert_eq!(envelopes(&world, &b)[0].1, Some(2));
}

/// A read-only process opened before the rotation loads the new keyring from its file.
#[test]
fn a_read_only_opener_follows_a_rotation_of_the_service_key() {
    let world = World::manual();
    let store = world.create();
    let (service, plain) = (world.service(&store, "p/s"), plain(&store, "p/p"));
    put(&service, "one");
    put(&plain, "one");
    let reader = world.builder().open_read_only().unwrap();
    let (tail_service, tail_plain) =
        (reader.logstore(service.name()).unwrap(), reader.logstore(plain.name()).unwrap());
    assert_eq!(
        (texts(&tail_service), texts(&tail_plain)),
        (vec!["one".to_owned()], vec!["one".to_owned()])
    );
    store.keys().rotate_service_key().unwrap();
    store.keys().rotate_data_key(service.name()).unwrap();
    put(&service, "two");
    put(&plain, "two");
    let expected = ["one", "two"].map(str::to_owned).to_vec();
    // Through existing handles and through new ones.
    assert_eq!((texts(&tail_service), texts(&tail_plain)), (expected.clone(), expected.clone()));
    assert_eq!(reader.list().unwrap(), [plain.name().clone(), service.name().clone()]);
    for logstore in [&service, &plain] {
        assert_eq!(texts(&reader.logstore(logstore.name()).unwrap()), expected);
    }
    assert_clean(&reader);
}

// ---- documents under the keyring ----

/// Two Logstores, and a second, unrelated store.
struct Neighbours {
    world: World,
    other: World,
}

impl Neighbours {
    fn new() -> (Self, [Logstore; 2], Logstore) {
        let (world, other) = (World::manual(), World::manual());
        let (store, other_store) = (world.create(), other.create());
        let (a, b) = (world.service(&store, "p/a"), world.service(&store, "p/b"));
        let foreign = other.service(&other_store, "p/a");
        for logstore in [&a, &b, &foreign] {
            put(logstore, "secret");
        }
        store.close().unwrap();
        other_store.close().unwrap();
        (Self { world, other }, [a, b], foreign)
    }

    /// Checks that reading and writing fail with this error, and that the files stay unchanged.
    #[track_caller]
    fn assert_refused(&self, text: &str, expected: impl Fn(&Error) -> bool) {
        let before = files(&self.world.store_dir().join("logstores"));
        let store = self.world.open();
        let error = store.logstore(&name(text)).unwrap_err();
        assert!(expected(&error), "{error:?}");
        let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
        assert!(report.faults.iter().any(|fault| fault.code == error.code()), "{report:?}");
        drop(store);
        assert!(files(&self.world.store_dir().join("logstores")) == before, "a file was changed");
    }
}

#[test]
fn metadata_is_bound_to_store_logstore_and_name() {
    let (scene, [a, b], foreign) = Neighbours::new();
    let meta = |logstore| meta_path(&scene.world.logstore_dir(logstore));
    let (of_a, of_b) = (fs::read(meta(&a)).unwrap(), fs::read(meta(&b)).unwrap());
    let tampered = |error: &Error| matches!(error, Error::Tampered { .. });
    // The metadata of one Logstore replaces that of the other.
    write_both(&meta(&a), &of_b);
    scene.assert_refused("p/a", tampered);
    // The metadata of a Logstore in another store, which has another keyring.
    write_both(&meta(&a), &fs::read(meta_path(&scene.other.logstore_dir(&foreign))).unwrap());
    scene.assert_refused("p/a", tampered);
    // None at all, and half of it.
    let of_a_at = meta(&a);
    remove_both(&of_a_at);
    scene.assert_refused("p/a", |error| matches!(error, Error::Truncated { .. }));
    write_both(&of_a_at, &of_a[..of_a.len() / 2]);
    scene.assert_refused("p/a", |error| matches!(error, Error::Truncated { .. }));
    // A flipped bit, and then also a corrected CRC.
    let mut forged = of_a.clone();
    forged[100] ^= 1;
    write_both(&meta(&a), &forged);
    scene.assert_refused("p/a", |error| matches!(error, Error::Corrupt { .. }));
    fix_crc(&mut forged);
    write_both(&meta(&a), &forged);
    scene.assert_refused("p/a", tampered);
    // The other Logstore is not affected, and restoring the file restores the Logstore.
    write_both(&meta(&a), &of_a);
    let store = scene.world.open();
    for text in ["p/a", "p/b"] {
        assert_eq!(texts(&store.logstore(&name(text)).unwrap()), ["secret"]);
    }
    assert_clean(&store);
}

#[test]
fn a_directory_under_another_logstores_id_is_refused() {
    let (scene, [a, b], _) = Neighbours::new();
    let (dir_a, dir_b, aside) = (
        scene.world.logstore_dir(&a),
        scene.world.logstore_dir(&b),
        scene.world.path().join("aside"),
    );
    let (of_a, of_b) = (meta_path(&dir_a), meta_path(&dir_b));
    fs::rename(&dir_a, &aside).unwrap();
    fs::rename(&dir_b, &dir_a).unwrap();
    fs::rename(&aside, &dir_b).unwrap();
    for text in ["p/a", "p/b"] {
        scene.assert_refused(text, |error| matches!(error, Error::RolledBack { .. }));
    }
    // Nor with the names of the metadata that was there.
    for (dir, of) in [(&dir_a, &of_a), (&dir_b, &of_b)] {
        let (found, name) = (meta_path(dir), dir.join(of.file_name().unwrap()));
        fs::rename(copy_path(&found), copy_path(&name)).unwrap();
        fs::rename(found, name).unwrap();
    }
    for text in ["p/a", "p/b"] {
        scene.assert_refused(text, |error| matches!(error, Error::Tampered { .. }));
    }
}

#[test]
fn documents_of_the_store_itself_are_bound_to_it() {
    let (scene, _, _) = Neighbours::new();
    for kind in ["catalogue", "store"] {
        let file = |world: &World| match kind {
            "store" => world.store_dir().join("STORE"),
            _ => catalogue_file(&world.store_dir()),
        };
        let path = file(&scene.world);
        let good = fs::read(&path).unwrap();
        write_both(&path, &fs::read(file(&scene.other)).unwrap());
        let error = scene.world.builder().open().unwrap_err();
        let expected = if kind == "store" {
            matches!(error, Error::KeyringForeign { .. })
        } else {
            matches!(error, Error::Tampered { .. })
        };
        assert!(expected, "{kind}: {error:?}");
        write_both(&path, &good);
    }
    // A document of one kind replaces one of another kind.
    let (store_file, catalogue) =
        (scene.world.store_dir().join("STORE"), catalogue_file(&scene.world.store_dir()));
    write_both(&catalogue, &fs::read(&store_file).unwrap());
    assert!(matches!(scene.world.builder().open(), Err(Error::Tampered { .. })));
}

#[test]
fn old_metadata_or_an_old_catalogue_put_back_is_rolled_back() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "one");
    store.close().unwrap();
    let (dir, catalogue) = (world.logstore_dir(&logstore), catalogue_dir(&world.store_dir()));
    let keep = |name: &str| {
        let (kept, meta) = (world.path().join(name), meta_path(&dir));
        copy_dir(&catalogue, &kept);
        ((meta.clone(), fs::read(meta).unwrap()), kept)
    };
    let put_back = |(path, bytes): &(PathBuf, Vec<u8>), catalogue_files: &Path| {
        remove_both(&meta_path(&dir));
        write_both(path, bytes);
        copy_dir(catalogue_files, &catalogue);
    };
    let old = keep("old");
    let store = world.open();
    store.keys().rotate_data_key(&name("p/l")).unwrap();
    store.keys().rotate_data_key(&name("p/l")).unwrap();
    put(&store.logstore(&name("p/l")).unwrap(), "two");
    store.close().unwrap();
    let new = keep("new");
    for (what, meta, catalogue) in [("metadata", &old.0, &new.1), ("catalogue", &new.0, &old.1)] {
        put_back(meta, catalogue);
        let store = world.open();
        let error = store.logstore(&name("p/l")).unwrap_err();
        assert!(matches!(error, Error::RolledBack { .. }), "{what}: {error:?}");
        drop(store);
    }
    // Both documents together: the segments record a later generation of the metadata.
    put_back(&old.0, &old.1);
    let store = world.open();
    let error = try_texts(&store.logstore(&name("p/l")).unwrap()).unwrap_err();
    assert!(matches!(error, Error::RolledBack { .. }), "{error:?}");
    drop(store);
    put_back(&new.0, &new.1);
    assert_eq!(texts(&world.open().logstore(&name("p/l")).unwrap()), ["one", "two"]);
}

#[test]
fn a_shredded_envelope_that_is_put_back_is_refused() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "one");
    store.keys().rotate_data_key(logstore.name()).unwrap();
    let meta = meta_path(&world.logstore_dir(&logstore));
    let old = fs::read(&meta).unwrap();
    store.keys().shred_data_keys(logstore.name(), &[1]).unwrap();
    store.close().unwrap();
    let newest = meta_path(&world.logstore_dir(&logstore));
    assert_ne!(meta, newest);
    // An old file next to the newest one has no effect.
    fs::write(&meta, &old).unwrap();
    let shredded =
        world.open().logstore(&name("p/l")).and_then(|logstore| try_texts(&logstore)).unwrap_err();
    assert!(matches!(shredded, Error::Shredded { .. }), "{shredded:?}");
    write_both(&newest, &old);
    let error = world.open().logstore(&name("p/l")).unwrap_err();
    assert!(matches!(error, Error::RolledBack { .. }), "{error:?}");
}

// ---- recovery without the keyring ----

/// A closed store with Logstores of every kind, whose keyring was moved away.
struct Lost {
    world: World,
    cmk: Cmk,
}

impl Lost {
    fn new() -> (Self, [Logstore; 3]) {
        let world = World::manual_in_memory();
        let cmk = world.cmk();
        let store = world.create();
        let logstores = [
            world.byok(&store, "p/byok", &cmk),
            world.service(&store, "p/service"),
            plain(&store, "p/plain"),
        ];
        for logstore in &logstores {
            put(logstore, "one");
        }
        store.keys().rotate_data_key(&name("p/byok")).unwrap();
        put(&logstores[0], "two");
        store.close().unwrap();
        fs::rename(world.keyring(), world.path().join("keyring.lost")).unwrap();
        (Self { world, cmk }, logstores)
    }

    fn byok_meta(&self, logstore: &Logstore, change: impl FnOnce(&mut Vec<u8>)) {
        let path = meta_path(&self.world.logstore_dir(logstore));
        let mut bytes = fs::read(&path).unwrap();
        change(&mut bytes);
        fix_crc(&mut bytes);
        write_both(&path, &bytes);
    }
}

#[test]
fn a_byok_logstore_comes_back_by_the_kms_alone() {
    let (scene, [byok, service, plain]) = Lost::new();
    let world = &scene.world;
    let untouched = [files(&world.logstore_dir(&service)), files(&world.logstore_dir(&plain))];
    let audit = || files(&world.store_dir().join("audit"));
    let audit_before = audit();
    let (store, report) = world.builder().recover_all().unwrap();
    assert_eq!(report.recovered, [name("p/byok")]);
    // The old audit log is kept, although its records can no longer be verified.
    assert!(
        !audit_before.is_empty()
            && audit_before.values().all(|old| audit().values().any(|kept| kept == old))
    );
    let mut lost: Vec<_> = report.lost.iter().map(|(id, _)| *id).collect();
    lost.sort_unstable_by_key(ToString::to_string);
    let mut expected = [service.id(), plain.id()];
    expected.sort_unstable_by_key(ToString::to_string);
    assert_eq!(lost, expected);
    assert!(report.lost.iter().all(|(_, why)| !why.is_empty()));
    assert_eq!(
        [files(&world.logstore_dir(&service)), files(&world.logstore_dir(&plain))],
        untouched
    );
    let logstore = store.logstore(&name("p/byok")).unwrap();
    assert_eq!(logstore.id(), byok.id());
    assert_eq!(texts(&logstore), ["one", "two"]);
    put(&logstore, "three");
    store.keys().rotate_data_key(&name("p/byok")).unwrap();
    put(&logstore, "four");
    store.close().unwrap();
    // A normal store from now on, with a new keyring, which is private too.
    assert_eq!(mode(world), 0o600);
    let store = world.open();
    assert_eq!(store.list().unwrap(), [name("p/byok")]);
    let logstore = store.logstore(&name("p/byok")).unwrap();
    assert_eq!(texts(&logstore), ["one", "two", "three", "four"]);
    let events: Vec<_> =
        store.keys().audit_records().unwrap().into_iter().map(|record| record.event).collect();
    assert_eq!(
        events[..2],
        [envelog::audit::AuditEvent::Recovered, envelog::audit::AuditEvent::KeyringReplaced]
    );
    // The master key controls access as before.
    world.local().disable(&scene.cmk.cmk_key_id).unwrap();
    assert_revoked(logstore.revalidate_now(), envelog::kms::RevokedReason::Disabled);
    drop((store, logstore));
    // The lost keyring now belongs to a different store.
    fs::copy(world.path().join("keyring.lost"), world.keyring()).unwrap();
    assert!(matches!(world.builder().open(), Err(Error::KeyringForeign { .. })));
}

#[test]
fn a_recovery_without_the_kms_recovers_nothing_of_it() {
    let (scene, [byok, ..]) = Lost::new();
    let world = &scene.world;
    world.local().disable(&scene.cmk.cmk_key_id).unwrap();
    let (store, report) = world.builder().recover_all().unwrap();
    assert_eq!(report.recovered, []);
    let why = report.lost.iter().find(|(id, _)| *id == byok.id()).unwrap();
    assert!(why.1.contains("disabled"), "{}", why.1);
    store.close().unwrap();
    // The Logstore was not changed: once the key is enabled, another recovery restores it.
    world.local().enable(&scene.cmk.cmk_key_id).unwrap();
    fs::remove_file(world.keyring()).unwrap();
    let (store, report) = world.builder().recover_all().unwrap();
    assert_eq!(report.recovered, [name("p/byok")]);
    assert_eq!(texts(&store.logstore(&name("p/byok")).unwrap()), ["one", "two"]);
}

/// A temporary KMS outage must not damage the store. A recovery that stops there has changed
/// nothing, and if the keyring is found after all, the store works as before.
#[test]
fn a_recovery_that_the_kms_does_not_answer_changes_nothing() {
    let world = World::manual();
    let store = world.create();
    let (near, far) = (world.cmk(), world.cmk());
    for n in 0..8 {
        put(&world.byok(&store, &format!("p/near-{n}"), &near), "one");
    }
    put(&world.byok(&store, "p/far", &far), "one");
    put(&world.service(&store, "p/service"), "one");
    store.close().unwrap();
    // Excludes the lock file, which names its holder, and the epoch, which each opening for writing
    // raises.
    let contents = || {
        let mut files = files(&world.store_dir());
        files.retain(|path, _| !path.ends_with("LOCK") && !path.ends_with("EPOCH"));
        files
    };
    let before = contents();
    let kept = fs::read(world.keyring()).unwrap();
    fs::remove_file(world.keyring()).unwrap();
    world.kms.answer_for_master_key(&far.cmk_key_id, Answer::Unreachable);
    let error = world.builder().recover_all().unwrap_err();
    assert!(matches!(error, Error::KmsUnreachable { .. }), "{error:?}");
    assert!(!world.keyring().exists());
    assert!(contents() == before, "the store was changed");
    write_private(&world.keyring(), kept);
    let store = world.open();
    assert_eq!(texts(&store.logstore(&name("p/near-0")).unwrap()), ["one"]);
    assert_eq!(texts(&store.logstore(&name("p/service")).unwrap()), ["one"]);
    store.keys().audit_records().unwrap();
    store.close().unwrap();
    // Once the KMS answers, a recovery completes.
    world.kms.answer(Answer::Real);
    fs::remove_file(world.keyring()).unwrap();
    let (store, report) = world.builder().recover_all().unwrap();
    assert_eq!(report.recovered.len(), 9);
    assert_eq!(texts(&store.logstore(&name("p/far")).unwrap()), ["one"]);
}

/// A recovery that fails half-way discards its new keyring. The catalogue must not be under that
/// keyring, or the lost keyring would be useless when it is found.
#[test]
fn a_failed_recovery_keeps_the_catalogue_under_the_old_keyring() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let logstores = [world.byok(&store, "p/a", &cmk), world.byok(&store, "p/b", &cmk)];
    put(&world.service(&store, "p/service"), "one");
    store.close().unwrap();
    let kept = fs::read(world.keyring()).unwrap();
    fs::remove_file(world.keyring()).unwrap();
    let catalogue = files(&catalogue_dir(&world.store_dir()));
    // The second metadata cannot be written.
    let disk = FailingDisk::default();
    disk.break_paths_with(&[&logstores[1].id().to_string(), ".tmp"]);
    let error = world.builder().disk(Arc::new(disk)).recover_all().unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
    assert!(!world.keyring().exists());
    assert!(files(&catalogue_dir(&world.store_dir())) == catalogue, "the catalogue was replaced");
    write_private(&world.keyring(), kept);
    let store = world.open();
    assert_eq!(texts(&store.logstore(&name("p/service")).unwrap()), ["one"]);
    store.close().unwrap();
    // The recovery can be repeated.
    fs::remove_file(world.keyring()).unwrap();
    let (_store, report) = world.builder().recover_all().unwrap();
    assert_eq!(report.recovered, [name("p/a"), name("p/b")]);
}

#[test]
fn a_recovery_refuses_what_the_second_tag_does_not_vouch_for() {
    let at = |bytes: &[u8], part: &str| {
        let found: Vec<usize> =
            (0..bytes.len()).filter(|at| bytes[*at..].starts_with(part.as_bytes())).collect();
        *found.last().unwrap_or_else(|| panic!("no {part}"))
    };
    type Forgery = (&'static str, fn(&mut Vec<u8>, usize));
    let forgeries: [Forgery; 4] = [
        // The algorithm, the current version, the name, an envelope.
        ("\"encrypt_type\":\"default\"", |bytes, at| {
            bytes[at + 15..at + 24].copy_from_slice(b"\"sm4\"    ")
        }),
        ("\"current\":2", |bytes, at| bytes[at + 10] = b'1'),
        ("\"name\":\"p/byok\"", |bytes, at| bytes[at + 10] = b'x'),
        ("\"wrapped\":\"", |bytes, at| {
            bytes[at + 11] = if bytes[at + 11] == b'0' { b'1' } else { b'0' }
        }),
    ];
    for (part, forge) in forgeries {
        let (scene, [byok, ..]) = Lost::new();
        scene.byok_meta(&byok, |bytes| {
            let at = at(bytes, part);
            forge(bytes, at);
        });
        let (store, report) = scene.world.builder().recover_all().unwrap();
        assert_eq!(report.recovered, [], "{part}");
        assert!(report.lost.iter().any(|(id, _)| *id == byok.id()), "{part}");
        assert!(store.list().unwrap().is_empty());
    }
    // The tag itself, and metadata without a tag (as for a Logstore under the service key).
    let tag_at = |bytes: &Vec<u8>| bytes.len() - 4 - 32;
    let changes: [fn(&mut [u8]); 2] = [|tag| tag[0] ^= 1, |tag| tag.fill(0)];
    for change in changes {
        let (scene, [byok, ..]) = Lost::new();
        scene.byok_meta(&byok, |bytes| {
            let at = tag_at(bytes);
            change(&mut bytes[at..at + 32]);
        });
        let (_store, report) = scene.world.builder().recover_all().unwrap();
        assert_eq!(report.recovered, []);
    }
}

/// The first tag covers the second, so that a change of the second is detected before it is needed.
#[test]
fn a_touched_second_tag_is_refused_while_there_is_a_keyring() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.byok(&store, "p/l", &world.cmk());
    put(&logstore, "one");
    store.close().unwrap();
    let meta = meta_path(&world.logstore_dir(&logstore));
    let good = fs::read(&meta).unwrap();
    let mut bytes = good.clone();
    let tag = bytes.len() - 4 - 32;
    bytes[tag] ^= 1;
    fix_crc(&mut bytes);
    write_both(&meta, &bytes);
    let store = world.open();
    assert!(matches!(store.logstore(&name("p/l")), Err(Error::Tampered { .. })));
    for keyless in [false, true] {
        let options = VerifyOptions::default().keyless(keyless);
        let report = store.admin().verify(&options, &mut |_| {}).unwrap();
        assert_eq!(report.faults.iter().map(|fault| fault.code).collect::<Vec<_>>(), ["tampered"]);
    }
    store.close().unwrap();
    write_both(&meta, &good);
    assert_eq!(texts(&world.open().logstore(&name("p/l")).unwrap()), ["one"]);
}

/// Without the keyring the configuration is not authenticated. After a recovery, new data is
/// encrypted as the authenticated keys section requires, even if the configuration differs.
#[test]
fn a_recovery_ignores_a_forged_enable_false() {
    let (scene, [byok, ..]) = Lost::new();
    scene.byok_meta(&byok, |bytes| {
        let on = b"\"encrypt_conf\":{\"enable\":true";
        let at = (0..bytes.len()).find(|at| bytes[*at..].starts_with(on)).unwrap();
        bytes.splice(at..at + on.len(), b"\"encrypt_conf\":{\"enable\":false".iter().copied());
        let a = u32::from_le_bytes(bytes[72..76].try_into().unwrap());
        bytes[72..76].copy_from_slice(&(a + 1).to_le_bytes());
    });
    let (store, report) = scene.world.builder().recover_all().unwrap();
    assert_eq!(report.recovered, [name("p/byok")]);
    let config = store.logstore(&name("p/byok")).unwrap().config();
    let expected = EncryptConf::byok(EncryptType::Aes, scene.cmk.clone());
    assert_eq!(config.encrypt_conf, Some(expected));
    let logstore = store.logstore(&name("p/byok")).unwrap();
    put(&logstore, "three");
    assert!(segment_headers(&scene.world, &logstore).last().unwrap().suite.encrypts());
    // The owner may still switch encryption off.
    let off = EncryptConf { enable: false, ..config.encrypt_conf.clone().unwrap() };
    let off = config.encrypt_conf(off).ttl_days(8);
    store.update_logstore(&name("p/byok"), off.clone()).unwrap();
    // The data key authenticates that change, so it survives a recovery.
    store.close().unwrap();
    drop(logstore);
    fs::remove_file(scene.world.keyring()).unwrap();
    let (store, _) = scene.world.builder().recover_all().unwrap();
    let config = store.logstore(&name("p/byok")).unwrap().config();
    assert_eq!((config.encrypt_conf, config.ttl_days), (off.encrypt_conf, Some(8)));
}

/// The data key authenticates the number of shards, but the shards' ranges in the configuration are
/// not authenticated.
#[test]
fn a_forged_list_of_shards_is_refused_by_a_recovery() {
    type List = fn(&serde_json::Value) -> Vec<serde_json::Value>;
    // Shards that divide the hash range: each has the keys that begin with its id.
    let possible: List =
        |shard| (0..envelog::limits::SHARDS_MAX).map(|id| with_range(shard, id)).collect();
    let lists: [List; 5] = [
        possible,
        |_| Vec::new(),
        |shard| vec![with_id(shard, 1)],
        |shard| vec![with_id(shard, 1), with_id(shard, 0)],
        |shard| (0..=envelog::limits::SHARDS_MAX).map(|id| with_id(shard, id)).collect(),
    ];
    for list in lists {
        let (scene, [byok, ..]) = Lost::new();
        for shard in 1..=envelog::limits::SHARDS_MAX {
            fs::create_dir(scene.world.logstore_dir(&byok).join(format!("shard-{shard:04}")))
                .unwrap();
        }
        scene.byok_meta(&byok, |bytes| {
            let end = 80 + u32::from_le_bytes(bytes[72..76].try_into().unwrap()) as usize;
            let mut config: serde_json::Value = serde_json::from_slice(&bytes[80..end]).unwrap();
            config["shards"] = list(&config["shards"][0]).into();
            config["shard_count"] = config["shards"].as_array().unwrap().len().into();
            let forged = config.to_string().into_bytes();
            bytes[72..76].copy_from_slice(&(forged.len() as u32).to_le_bytes());
            bytes.splice(80..end, forged);
        });
        let (_store, report) = scene.world.builder().recover_all().unwrap();
        let lost = report.lost.iter().find(|(id, _)| *id == byok.id());
        assert_eq!(report.recovered, []);
        assert!(lost.unwrap().1.contains("configuration"), "{lost:?}");
    }
}

fn with_range(shard: &serde_json::Value, id: u32) -> serde_json::Value {
    let mut shard = with_id(shard, id);
    let key =
        |id: u32| if id == 256 { "f".repeat(32) } else { format!("{id:02x}{}", "0".repeat(30)) };
    (shard["begin_key"], shard["end_key"]) = (key(id).into(), key(id + 1).into());
    shard
}

fn with_id(shard: &serde_json::Value, id: u32) -> serde_json::Value {
    let mut shard = shard.clone();
    shard["id"] = id.into();
    shard
}

/// The store does not show which of two Logstores with one name is the customer's, so a recovery
/// takes neither.
#[test]
fn a_recovery_refuses_two_logstores_of_one_name() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    let older = world.byok(&store, "p/l", &cmk);
    put(&older, "old");
    let (dir, aside) = (world.logstore_dir(&older), world.path().join("aside"));
    store.close().unwrap();
    copy_dir(&dir, &aside);
    let store = world.open();
    store.delete_logstore(&name("p/l")).unwrap();
    let newer = world.byok(&store, "p/l", &cmk);
    put(&newer, "new");
    store.close().unwrap();
    copy_dir(&aside, &dir);
    fs::remove_file(world.keyring()).unwrap();
    let contents = || {
        let mut files = files(&world.store_dir());
        files.retain(|path, _| !path.ends_with("LOCK") && !path.ends_with("EPOCH"));
        files
    };
    let before = contents();
    let error = world.builder().recover_all().unwrap_err();
    assert!(matches!(error, Error::Corrupt { .. }) && error.to_string().contains("p/l"), "{error}");
    assert!(
        contents() == before && !world.keyring().exists(),
        "the refused recovery changed something"
    );
    fs::remove_dir_all(&dir).unwrap();
    let (store, report) = world.builder().recover_all().unwrap();
    assert_eq!(report.recovered, [name("p/l")]);
    assert_eq!(texts(&store.logstore(&name("p/l")).unwrap()), ["new"]);
}

/// An attacker with write access creates a Logstore with the customer's name under their own master
/// key.
#[test]
fn a_recovery_uses_only_expected_master_keys() {
    let world = World::manual();
    let (customer, attacker) = (world.cmk(), world.cmk());
    let store = world.create();
    put(&world.byok(&store, "p/l", &customer), "genuine");
    put(&world.byok(&store, "p/other", &customer), "other");
    store.close().unwrap();
    let expected =
        BTreeMap::from([(name("p/l"), customer.clone()), (name("p/gone"), customer.clone())]);
    let role = Cmk { arn: "acs:ram::13234:role/other".to_owned(), ..customer.clone() };
    let region = Cmk { region_id: "cn-beijing".to_owned(), ..customer.clone() };
    for forged in [attacker, role, region] {
        let theirs =
            BTreeMap::from([(name("p/l"), forged.clone()), (name("p/gone"), customer.clone())]);
        fs::remove_file(world.keyring()).unwrap();
        let asked = world.kms.calls();
        let (store, report) = world.builder().recover_without_keyring(&theirs).unwrap();
        assert_eq!(world.kms.calls(), asked, "a KMS was asked about {forged:?}");
        assert_eq!((report.recovered.len(), report.lost.len()), (0, 2), "{report:?}");
        assert!(
            report.lost.iter().all(|(_, why)| why.contains(&customer.cmk_key_id)),
            "{report:?}"
        );
        assert_eq!(report.missing, [name("p/gone"), name("p/l")]);
        drop(store);
    }
    fs::remove_file(world.keyring()).unwrap();
    let found = world.builder().recoverable().unwrap();
    assert_eq!(
        found.iter().map(|one| one.name.to_string()).collect::<Vec<_>>(),
        ["p/l", "p/other"]
    );
    assert!(found.iter().all(|one| one.cmk.as_ref() == Some(&customer)));
    assert!(!world.keyring().exists());
    let (store, report) = world.builder().recover_without_keyring(&expected).unwrap();
    assert_eq!((report.recovered, report.missing), (vec![name("p/l")], vec![name("p/gone")]));
    assert!(report.lost[0].1.contains("not expected"), "{:?}", report.lost);
    assert_eq!(texts(&store.logstore(&name("p/l")).unwrap()), ["genuine"]);
}

/// The attacker's Logstore is valid in itself: its own data key authenticates all of it. It is next
/// to the customer's Logstore, or replaces it.
#[test]
fn a_recovery_takes_no_logstore_of_an_attacker() {
    for replaces in [false, true] {
        let world = World::manual();
        let (customer, attacker) = (world.cmk(), world.cmk());
        let store = world.create();
        let genuine = world.byok(&store, "p/l", &customer);
        put(&genuine, "genuine");
        let genuine_dir = world.logstore_dir(&genuine);
        store.close().unwrap();
        let (before, keyring) = (world.path().join("before"), fs::read(world.keyring()).unwrap());
        copy_dir(&world.store_dir(), &before);
        let store = world.open();
        store.delete_logstore(&name("p/l")).unwrap();
        let forged = world.byok(&store, "p/l", &attacker);
        put(&forged, "forged");
        let forged_dir = world.logstore_dir(&forged);
        store.close().unwrap();
        let aside = world.path().join("forged");
        copy_dir(&forged_dir, &aside);
        copy_dir(&before, &world.store_dir());
        copy_dir(&aside, &forged_dir);
        write_private(&world.keyring(), &keyring);
        if replaces {
            fs::remove_dir_all(&genuine_dir).unwrap();
        }
        fs::remove_file(world.keyring()).unwrap();
        let expected = BTreeMap::from([(name("p/l"), customer.clone())]);
        let (store, report) = world.builder().recover_without_keyring(&expected).unwrap();
        assert_eq!(report.lost.len(), 1, "{report:?}");
        assert!(report.lost[0].1.contains(&attacker.cmk_key_id), "{report:?}");
        if replaces {
            assert_eq!((report.recovered, report.missing), (vec![], vec![name("p/l")]));
            assert!(matches!(store.logstore(&name("p/l")), Err(Error::LogstoreMissing(_))));
        } else {
            assert_eq!((report.recovered, report.missing), (vec![name("p/l")], vec![]));
            assert_eq!(texts(&store.logstore(&name("p/l")).unwrap()), ["genuine"]);
        }
    }
}

/// Only the lost service key authenticates data from before encryption was enabled.
#[test]
fn a_recovery_names_the_segments_that_it_cannot_authenticate() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    let logstore = store.create_logstore(&name("p/l"), LogstoreSpec::default()).unwrap();
    put(&logstore, "plain");
    let mut config = store.logstore(&name("p/l")).unwrap().config();
    config.encrypt_conf = Some(EncryptConf::byok(EncryptType::Aes, cmk));
    store.update_logstore(&name("p/l"), config).unwrap();
    put(&logstore, "sealed");
    let plain = segments(&world.logstore_dir(&logstore), 0)[0].clone();
    store.close().unwrap();
    drop(logstore);
    fs::remove_file(world.keyring()).unwrap();
    let (store, report) = world.builder().recover_all().unwrap();
    assert_eq!((report.recovered, report.unauthenticated), (vec![name("p/l")], vec![plain]));
    let logstore = store.logstore(&name("p/l")).unwrap();
    records(&logstore, 0).unwrap_err();
    let rest = records_from(&logstore, 0, Position::Seq(1)).unwrap();
    assert_eq!(strings(&rest), ["sealed"]);
}

#[test]
fn what_the_system_does_not_read_is_not_missing() {
    let world = World::manual();
    world.create().close().unwrap();
    let disk = FailingDisk::default();
    for part in ["catalogue", "keyring"] {
        disk.break_paths(Some(part));
        let opened = world.builder().disk(Arc::new(disk.clone())).open();
        assert!(matches!(opened, Err(Error::Io { .. })), "{opened:?}");
    }
    fs::remove_dir_all(catalogue_dir(&world.store_dir())).unwrap();
    assert!(matches!(world.builder().open(), Err(Error::Truncated { .. })));
}

#[test]
fn a_recovery_that_fails_anywhere_can_be_done_again() {
    let (scene, _) = Lost::new();
    let world = &scene.world;
    let template = world.path().join("template");
    copy_dir(&world.store_dir(), &template);
    for failure in Failure::ALL {
        for count in 0.. {
            copy_dir(&template, &world.store_dir());
            let _ = fs::remove_file(world.keyring());
            let disk = FailingDisk::default();
            disk.fail_after(count, failure);
            let outcome = world.builder().disk(Arc::new(disk.clone())).recover_all();
            let ran_through = !disk.has_failed();
            disk.disarm();
            if outcome.is_ok() {
                drop(outcome);
                assert_eq!(texts(&world.open().logstore(&name("p/byok")).unwrap()), ["one", "two"]);
            }
            if ran_through {
                break;
            }
            // A dead process leaves its keyring file, which is unused unless the store names it.
            if world.keyring().exists() && world.builder().open().is_err() {
                fs::remove_file(world.keyring()).unwrap();
            }
            let store = if world.keyring().exists() {
                world.open()
            } else {
                let (store, report) = world.builder().recover_all().unwrap();
                assert_eq!(report.recovered, [name("p/byok")], "{failure:?} after {count}");
                store
            };
            assert_eq!(
                texts(&store.logstore(&name("p/byok")).unwrap()),
                ["one", "two"],
                "{failure:?} after {count}"
            );
            store.keys().audit_records().unwrap();
            store.close().unwrap();
        }
    }
}

#[test]
fn a_recovered_logstore_obeys_the_rules_of_its_method() {
    let (scene, _) = Lost::new();
    let (store, _) = scene.world.builder().recover_all().unwrap();
    let config = store.logstore(&name("p/byok")).unwrap().config();
    let conf = EncryptConf::service_key(EncryptType::Aes);
    let error = store.update_logstore(&name("p/byok"), config.encrypt_conf(conf)).unwrap_err();
    assert!(matches!(error, Error::Config(ConfigError::MethodFixed { .. })), "{error:?}");
}

/// A lock may not exclude a writer on another machine, so the caller must explicitly allow this.
#[test]
fn a_store_on_a_network_fs_is_written_only_if_allowed() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    put(&world.byok(&store, "p/l", &cmk), "one");
    store.close().unwrap();
    let disk = FailingDisk::default();
    disk.be_on("NFS");
    let remote = || world.builder().disk(Arc::new(disk.clone()));
    let refused = |error: &Error| matches!(error, Error::NetworkFileSystem { kind: "NFS", .. });
    assert!(refused(&remote().open().unwrap_err()));
    assert!(refused(&remote().open_or_create().unwrap_err()));
    let store = remote().open_read_only().unwrap();
    assert_eq!(texts(&store.logstore(&name("p/l")).unwrap()), ["one"]);
    store.close().unwrap();
    let allowed = || {
        let mut options = world.options;
        options.allow_network_fs = true;
        remote().options(options)
    };
    let store = allowed().open().unwrap();
    put(&store.logstore(&name("p/l")).unwrap(), "two");
    store.close().unwrap();
    fs::remove_file(world.keyring()).unwrap();
    assert!(refused(&remote().recover_all().unwrap_err()));
    assert!(!world.keyring().exists());
    assert_eq!(allowed().recover_all().unwrap().1.recovered, [name("p/l")]);
    fs::remove_dir_all(world.store_dir()).unwrap();
    fs::remove_file(world.keyring()).unwrap();
    assert!(refused(&remote().create().unwrap_err()));
    assert!(!world.keyring().exists());
}
