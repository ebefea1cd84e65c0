//! Bad input, limits and missing files: each has its own error, no data is lost, and the engine
//! does not panic.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use common::{
    disk::{Op, Sim, Survives, Verdict},
    *,
};
use envelog::{
    EncryptConf, EncryptType, Error, ErrorKind, LogGroup, Logstore, LogstoreName, LogstoreSpec,
    Payload, Result, Store, StoreOptions,
    admin::VerifyOptions,
    error::ConfigError,
    group::{
        CONTENTS_PER_LOG_MAX, Content, GROUP_BYTES_MAX, GroupError, KEY_BYTES_MAX,
        LOGS_PER_GROUP_MAX, Log, LogTag, TAGS_PER_GROUP_MAX, VALUE_BYTES_MAX,
    },
    io::{Disk as _, OpenMode},
};

// ---- groups ----

#[test]
fn a_group_of_3_gib_is_refused_before_anybody_looks_into_it() {
    // The system allocates zeroed pages on first access, so this buffer uses no memory.
    let huge = Bytes::from(vec![0; 3 << 30]);
    match Payload::encoded(huge.clone()).unwrap_err() {
        Error::InvalidGroup(GroupError::TooLarge { what: "length", size, limit }) => {
            assert_eq!((size, limit), (3 << 30, GROUP_BYTES_MAX));
        }
        other => panic!("{other}"),
    }
    match Payload::opaque(huge).unwrap_err() {
        Error::TooLarge { what: "opaque record (bytes)", size, limit } => {
            assert_eq!((size, limit), (3 << 30, GROUP_BYTES_MAX as u64));
        }
        other => panic!("{other}"),
    }
}

#[test]
fn groups_at_a_limit_are_stored_and_beyond_it_refused() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    let bytes = |len: usize| Bytes::from(vec![b'v'; len]);
    let log = |contents: Vec<Content>| Log { time: 1, contents, time_ns: None };
    let with =
        |contents: Vec<Content>| LogGroup { logs: vec![log(contents)], ..LogGroup::default() };
    let pair = |key: usize, value: usize| Content::new(bytes(key), bytes(value));
    let topic = |len: usize| LogGroup { topic: Some(bytes(len)), ..with(vec![]) };
    let source = |len: usize| LogGroup { source: Some(bytes(len)), ..with(vec![]) };
    let tags =
        |count: usize| LogGroup { log_tags: vec![LogTag::new("k", "v"); count], ..with(vec![]) };
    let logs = |count: usize| LogGroup { logs: vec![log(vec![]); count], ..LogGroup::default() };
    let (keys, values) = (KEY_BYTES_MAX, VALUE_BYTES_MAX);
    let cases: Vec<(&str, LogGroup, LogGroup)> = vec![
        ("key", with(vec![pair(keys, 1)]), with(vec![pair(keys + 1, 1)])),
        ("value", with(vec![pair(1, values)]), with(vec![pair(1, values + 1)])),
        ("topic", topic(keys), topic(keys + 1)),
        ("source", source(keys), source(keys + 1)),
        ("tags", tags(TAGS_PER_GROUP_MAX), tags(TAGS_PER_GROUP_MAX + 1)),
        (
            "contents",
            with(vec![pair(1, 1); CONTENTS_PER_LOG_MAX]),
            with(vec![pair(1, 1); CONTENTS_PER_LOG_MAX + 1]),
        ),
        ("logs", logs(LOGS_PER_GROUP_MAX), logs(LOGS_PER_GROUP_MAX + 1)),
        (
            "length",
            with(vec![pair(1, 8 << 20), pair(1, 7 << 20)]),
            with(vec![pair(1, 8 << 20), pair(1, 8 << 20)]),
        ),
    ];
    let mut stored = 0;
    for (what, good, bad) in &cases {
        match logstore.append(bad, &written()).unwrap_err() {
            Error::InvalidGroup(error @ GroupError::TooLarge { size, limit, .. }) => {
                assert!(size > limit, "{what}");
                assert!(error.to_string().contains(what), "{what}: {error}");
            }
            other => panic!("{what}: {other}"),
        }
        assert_eq!(logstore.status().unwrap().groups, stored);
        logstore.append(good, &written()).unwrap();
        stored += 1;
        let found = records(&logstore, 0).unwrap().pop().unwrap();
        assert_eq!(found.bytes, good.encode_to_bytes(), "{what}");
    }
    // No bytes, an empty group, and bytes that are not a group.
    let append = |bytes: &[u8]| {
        let payload = Payload::encoded(Bytes::copy_from_slice(bytes))?;
        logstore.append(payload, &written())
    };
    assert!(matches!(append(b""), Err(Error::InvalidGroup(GroupError::Empty))));
    let empty = LogGroup::default();
    assert!(matches!(
        logstore.append(&empty, &written()),
        Err(Error::InvalidGroup(GroupError::Empty))
    ));
    let no_logs = LogGroup { topic: Some("t".into()), ..LogGroup::default() };
    assert!(matches!(
        logstore.append(&no_logs, &written()),
        Err(Error::InvalidGroup(GroupError::NoLogs))
    ));
    let whole = group("g", 3).encode_to_bytes();
    for bytes in
        [&whole[..whole.len() - 1], b"plain text", &[0xff; 64], &[&whole[..], &[0x0a]].concat()]
    {
        match append(bytes) {
            Err(error @ Error::InvalidGroup(GroupError::Malformed { .. })) => {
                assert_eq!(error.kind(), ErrorKind::Invalid)
            }
            other => panic!("{other:?}"),
        }
    }
    // An opaque record may be empty, and as long as the longest group.
    for len in [0, GROUP_BYTES_MAX] {
        logstore.append(Payload::opaque(bytes(len)).unwrap(), &written()).unwrap();
        assert_eq!(records(&logstore, 0).unwrap().pop().unwrap().bytes, bytes(len));
    }
    assert!(matches!(Payload::opaque(bytes(GROUP_BYTES_MAX + 1)), Err(Error::TooLarge { .. })));
    assert_eq!(logstore.status().unwrap().groups, stored + 2);
}

// ---- names and settings ----

#[test]
fn names_that_could_lead_anywhere_else_do_not_exist() {
    let long = "x".repeat(300);
    let bad = ["", ".", "..", "a/b", "../../etc", "a\0", "a\n", "é", "-a", &long];
    for part in bad {
        for (project, logstore) in [(part, "l"), ("p", part)] {
            let refused = LogstoreName::new(project, logstore).unwrap_err();
            assert!(matches!(refused, ConfigError::Name { .. }), "{part:?}: {refused}");
            assert!(refused.to_string().len() < 300, "{refused}");
            assert!(format!("{project}/{logstore}").parse::<LogstoreName>().is_err(), "{part:?}");
            let json = serde_json::to_string(&format!("{project}/{logstore}")).unwrap();
            assert!(serde_json::from_str::<LogstoreName>(&json).is_err(), "{part:?}");
        }
    }
    // The allowed names are not used as file names, so no file system can make two of them clash.
    let sim = Sim::new();
    let store = sim.create();
    let (lower, upper) = (sim.world.service(&store, "p/con"), sim.world.service(&store, "P/CON"));
    put(&lower, "lower");
    put(&upper, "upper");
    assert_eq!((texts(&lower), texts(&upper)), (vec!["lower".into()], vec!["upper".into()]));
    let text = format!("{:?}", sim.disk.files(&sim.world.store_dir().join("logstores")).keys());
    assert!(!text.contains("con") && !text.contains("CON"), "{text}");
    let error = store.create_logstore(&name("p/con"), LogstoreSpec::default()).unwrap_err();
    assert!(matches!(error, Error::LogstoreExists(_)));
    assert_eq!(texts(&lower), ["lower"]);
    assert!(matches!(store.logstore(&name("p/none")), Err(Error::LogstoreMissing(_))));
}

#[test]
fn configurations_out_of_range_are_refused_by_field() {
    let sim = Sim::new();
    let store = sim.create();
    let spec = LogstoreSpec::default;
    let refused = [
        ("shard_count", spec().shard_count(0)),
        ("shard_count", spec().shard_count(257)),
        ("ttl_days", spec().ttl_days(0)),
        ("ttl_days", spec().ttl_days(3651)),
        ("retention_bytes", spec().retention_bytes(0)),
    ];
    for (expected, spec) in refused {
        match store.create_logstore(&name("p/l"), spec).unwrap_err() {
            Error::Config(ConfigError::OutOfRange { field, .. }) => assert_eq!(field, expected),
            other => panic!("{other}"),
        }
    }
    assert!(store.list().unwrap().is_empty());
    let most = spec().shard_count(256).ttl_days(3650).retention_bytes(u64::MAX);
    let logstore = store.create_logstore(&name("p/l"), most).unwrap();
    let config = logstore.config().ttl_days(9999);
    let error = store.update_logstore(logstore.name(), config).unwrap_err();
    assert!(matches!(error, Error::Config(ConfigError::OutOfRange { field: "ttl_days", .. })));
    assert_eq!(logstore.config().revision, 1);
}

#[test]
fn options_out_of_range_are_refused_by_name() {
    type Change = fn(&mut StoreOptions);
    let changes: [(&str, Change); 19] = [
        ("revalidate_every", |options| options.revalidate_every = millis(99)),
        ("revalidate_every", |options| options.revalidate_every = secs(3601)),
        ("outage_grace", |options| options.outage_grace = secs(29)),
        ("outage_grace", |options| options.outage_grace = DAY + millis(1)),
        ("kms_timeout", |options| options.kms_timeout = millis(9)),
        ("kms_timeout", |options| options.kms_timeout = secs(61)),
        ("workers", |options| options.workers = 0),
        ("workers", |options| options.workers = 65),
        ("block_bytes", |options| options.block_bytes = 4095),
        ("block_bytes", |options| options.block_bytes = (32 << 20) + 1),
        ("linger", |options| options.linger = secs(11)),
        ("segment_bytes", |options| options.segment_bytes = 0),
        ("segment_bytes", |options| options.segment_bytes = 4 << 30),
        ("segment_age", |options| options.segment_age = Duration::ZERO),
        ("pending_bytes_max", |options| options.pending_bytes_max = 0),
        ("readers_max", |options| options.readers_max = 0),
        ("followers_max", |options| options.followers_max = 0),
        ("audit_file_bytes", |options| options.audit_file_bytes = 0),
        ("retention_every", |options| options.retention_every = Duration::ZERO),
    ];
    for (what, change) in changes {
        let mut sim = Sim::new();
        change(&mut sim.world.options);
        for opened in [sim.builder().create(), sim.builder().open(), sim.builder().open_read_only()]
        {
            match opened.unwrap_err() {
                Error::InvalidArgument(text) => assert!(text.starts_with(what), "{what}: {text}"),
                other => panic!("{what}: {other}"),
            }
        }
        assert_eq!(sim.disk.changes(), 0);
    }
}

// ---- stores and keyrings ----

/// A closed store that contains data.
fn closed() -> Sim {
    let sim = Sim::new();
    let store = sim.create();
    put(&sim.world.service(&store, "p/l"), "kept");
    store.close().unwrap();
    sim
}

/// Checks that every way to open the store fails with the error and changes nothing.
#[track_caller]
fn refused_untouched(sim: &Sim, expected: impl Fn(&Error) -> bool) {
    let before = sim.disk.files(sim.world.path());
    for opened in
        [sim.builder().open(), sim.builder().open_read_only(), sim.builder().open_or_create()]
    {
        let error = opened.unwrap_err();
        assert!(expected(&error), "{error:?}");
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:?}");
    }
    let mut after = sim.disk.files(sim.world.path());
    // Opening takes and releases the lock and raises the epoch.
    let is_kept = |path: &Path| !path.ends_with("LOCK") && !path.ends_with("EPOCH");
    after.retain(|path, _| is_kept(path));
    let kept = before.into_iter().filter(|(path, _)| is_kept(path)).collect();
    assert_eq!(after, kept);
}

#[track_caller]
fn is_whole(sim: &Sim) {
    let store = sim.open();
    assert_eq!(texts(&store.logstore(&name("p/l")).unwrap()), ["kept"]);
    assert!(store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().is_clean());
}

#[test]
fn a_missing_store_is_told_from_something_else() {
    let sim = Sim::new();
    let dir = sim.world.store_dir();
    let missing = |opened: Result<Store>| match opened.unwrap_err() {
        Error::StoreMissing { path } => assert_eq!(path, dir),
        other => panic!("{other}"),
    };
    missing(sim.builder().open());
    missing(sim.builder().open_read_only());
    assert_eq!(sim.disk.stat(&dir).unwrap(), None, "opening makes nothing");
    sim.disk.create_dir(&dir).unwrap();
    missing(sim.builder().open());
    missing(sim.builder().open_read_only());
    // The directory contains something else, or is not a directory.
    let is_no_store = |sim: &Sim| {
        for opened in [sim.builder().open(), sim.builder().open_read_only(), sim.builder().create()]
        {
            assert!(matches!(opened.unwrap_err(), Error::NotAStore { path } if path == dir));
        }
        let mut files = sim.disk.files(sim.world.path());
        files.retain(|path, _| !path.ends_with("thesis"));
        assert_eq!(files, Default::default(), "nothing was made beside it");
    };
    sim.disk.open(&dir.join("thesis"), OpenMode::CreateNew).unwrap();
    is_no_store(&sim);
    sim.disk.remove_file(&dir.join("thesis")).unwrap();
    sim.disk.remove_dir(&dir).unwrap();
    let other = sim.disk.open(&sim.world.path().join("thesis"), OpenMode::CreateNew).unwrap();
    other.write_at(b"words", 0).unwrap();
    sim.disk.rename(&sim.world.path().join("thesis"), &dir).unwrap();
    for opened in [sim.builder().open(), sim.builder().open_read_only(), sim.builder().create()] {
        assert!(matches!(opened.unwrap_err(), Error::NotAStore { path } if path == dir));
    }
    assert_eq!(sim.disk.bytes(&dir), b"words");
}

#[test]
fn creating_overwrites_neither_a_store_nor_a_keyring() {
    let sim = closed();
    let before = sim.disk.files(sim.world.path());
    let error = sim.builder().create().unwrap_err();
    assert!(
        matches!(&error, Error::StoreExists { path } if *path == sim.world.store_dir()),
        "{error}"
    );
    assert_eq!(sim.disk.files(sim.world.path()), before);
    is_whole(&sim);
    // Another store with this store's keyring.
    let beside = sim.world.path().join("beside");
    let builder = Store::builder(&beside, sim.world.keyring(), envelog::crypto::AwsLc::new());
    let error = builder.disk(std::sync::Arc::new(sim.disk.clone())).create().unwrap_err();
    assert!(
        matches!(&error, Error::KeyringExists { path } if *path == sim.world.keyring()),
        "{error}"
    );
    assert_eq!(sim.disk.bytes(&sim.world.keyring()), before[&sim.world.keyring()]);
    is_whole(&sim);
}

#[test]
fn each_kind_of_wrong_keyring_has_its_own_error() {
    let sim = closed();
    let keyring = sim.world.keyring();
    let put_back = |bytes: &[u8]| sim.disk.edit(&keyring, |place| *place = bytes.to_vec());
    let first = sim.disk.bytes(&keyring);
    let store = sim.open();
    assert_eq!(store.keys().rotate_service_key().unwrap(), 2);
    store.close().unwrap();
    let newest = sim.disk.bytes(&keyring);

    put_back(&first);
    refused_untouched(
        &sim,
        |error| matches!(error, Error::KeyringTooOld { path, needed: 2, newest: 1 } if *path == keyring),
    );
    put_back(&sim_keyring_of_another_store());
    refused_untouched(
        &sim,
        |error| matches!(error, Error::KeyringForeign { path } if *path == keyring),
    );
    // A missing keyring is not recreated.
    let aside = keyring.with_extension("aside");
    sim.disk.rename(&keyring, &aside).unwrap();
    refused_untouched(
        &sim,
        |error| matches!(error, Error::KeyringMissing { path } if *path == keyring),
    );
    sim.disk.rename(&aside, &keyring).unwrap();
    for at in [9, newest.len() / 2, newest.len() - 1] {
        put_back(&newest);
        sim.disk.edit(&keyring, |bytes| bytes[at] ^= 1);
        let error = sim.builder().open().unwrap_err();
        let expected = matches!(
            &error,
            Error::Corrupt { at, .. } | Error::Tampered { at, .. } | Error::Truncated { at, .. } if at.file == keyring
        ) || matches!(&error, Error::NewerFormat { path, .. } | Error::OlderFormat { path, .. } if *path == keyring);
        assert!(expected, "{error:?}");
    }
    put_back(&[]);
    assert_eq!(sim.builder().open().unwrap_err().kind(), ErrorKind::Integrity);
    // With the right keyring, all data is readable.
    put_back(&newest);
    is_whole(&sim);
}

fn sim_keyring_of_another_store() -> Vec<u8> {
    let other = closed();
    other.disk.bytes(&other.world.keyring())
}

#[test]
fn files_of_a_newer_format_are_refused_and_unchanged() {
    let sim = closed();
    let store = sim.open();
    let logstore = store.logstore(&name("p/l")).unwrap();
    store.close().unwrap();
    // Each writer uses a new name for the catalogue file.
    let paths: [&dyn Fn() -> PathBuf; 5] = [
        &|| sim.world.store_dir().join("STORE"),
        &|| sim.disk.catalogue_file(&sim.world.store_dir()),
        &|| sim.world.keyring(),
        &|| {
            newest_meta(
                &sim.world.logstore_dir(&logstore),
                sim.disk.files(&sim.world.logstore_dir(&logstore)).into_keys(),
            )
            .unwrap()
        },
        &|| sim.segments(&logstore, 0).remove(0),
    ];
    for path in paths {
        let path = path();
        let original = sim.disk.bytes(&path);
        sim.disk.edit(&path, |bytes| bytes[8..10].copy_from_slice(&7u16.to_le_bytes()));
        let before = sim.disk.bytes(&path);
        let try_all =
            |store: Store| store.logstore(&name("p/l")).and_then(|logstore| try_texts(&logstore));
        for opened in [sim.builder().open(), sim.builder().open_read_only()] {
            match opened.and_then(try_all).unwrap_err() {
                Error::NewerFormat { path: found_in, found, supported } => {
                    assert_eq!(
                        (found_in, found, supported),
                        (path.clone(), 7, envelog::inspect::FORMAT_VERSION)
                    );
                }
                other => panic!("{}: {other}", path.display()),
            }
        }
        assert_eq!(sim.disk.bytes(&path), before);
        sim.disk.edit(&path, |bytes| *bytes = original);
        is_whole(&sim);
    }
}

/// Uses the real file system, which provides the lock.
#[test]
fn a_second_writer_is_told_who_is_there() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    for _ in 0..2 {
        match world.builder().open().unwrap_err() {
            Error::Locked { path, pid } => {
                assert_eq!((path, pid), (world.store_dir(), Some(std::process::id())))
            }
            other => panic!("{other}"),
        }
    }
    // The first writer is not affected, and readers can open the store.
    put(&logstore, "still here");
    let reading = world.builder().open_read_only().unwrap();
    assert_eq!(texts(&reading.logstore(logstore.name()).unwrap()), ["still here"]);
    let refused = [
        reading.delete_logstore(logstore.name()).unwrap_err(),
        reading.create_logstore(&name("p/n"), LogstoreSpec::default()).unwrap_err(),
        reading.update_logstore(logstore.name(), logstore.config()).unwrap_err(),
        reading.keys().rotate_data_key(logstore.name()).unwrap_err(),
        reading.keys().rotate_service_key().unwrap_err(),
        reading.admin().apply_retention().unwrap_err(),
        reading.admin().repair(logstore.name(), 0, &Default::default()).unwrap_err(),
    ];
    for error in refused {
        assert!(matches!(error, Error::ReadOnly), "{error}");
    }
    store.close().unwrap();
    assert_eq!(texts(&world.open().logstore(&name("p/l")).unwrap()), ["still here"]);
}

// ---- disks that refuse ----

#[test]
fn a_read_only_directory_can_be_read_but_not_written() {
    let deny = |sim: &Sim| {
        sim.disk.on_call(|call| match call.op.changes() {
            true => Verdict::Fail(io::ErrorKind::ReadOnlyFilesystem),
            false => Verdict::Go,
        });
    };
    let sim = Sim::new();
    deny(&sim);
    let error = sim.builder().create().unwrap_err();
    assert!(
        matches!(&error, Error::Io { op: "create", path, .. } if *path == sim.world.store_dir()),
        "{error}"
    );
    assert!(error.to_string().contains("injected"), "the system's own word is passed on");

    let sim = closed();
    deny(&sim);
    let error = sim.builder().open().unwrap_err();
    assert!(
        matches!(&error, Error::Io { path, .. } if path.starts_with(sim.world.store_dir())),
        "{error}"
    );
    let changes = sim.disk.changes();
    let store = sim.builder().open_read_only().unwrap();
    assert_eq!(texts(&store.logstore(&name("p/l")).unwrap()), ["kept"]);
    store.tick();
    drop(store);
    assert_eq!(sim.disk.changes(), changes, "a reader writes nothing, not even a lock");
}

/// If any administrative operation runs out of space at any step, it returns an error, and existing
/// data stays intact.
#[test]
fn a_full_disk_is_told_and_costs_nothing_that_was_there() {
    type Operation = fn(&Store, &Logstore) -> Result<()>;
    let operations: [(&str, Operation); 7] = [
        ("append", |_, logstore| try_put(logstore, "new")),
        ("create", |store, _| {
            let spec =
                LogstoreSpec::default().encrypt_conf(EncryptConf::service_key(EncryptType::Sm4));
            store.create_logstore(&name("p/new"), spec).map(drop)
        }),
        ("update", |store, logstore| {
            let config = logstore.config().ttl_days(7);
            store.update_logstore(logstore.name(), config).map(drop)
        }),
        ("rotate", |store, logstore| store.keys().rotate_data_key(logstore.name()).map(drop)),
        ("rotate the service key", |store, _| store.keys().rotate_service_key().map(drop)),
        ("checkpoint", |store, _| store.admin().checkpoint().map(drop)),
        ("close", |store, _| store.clone().close()),
    ];
    let mut prepared = closed();
    for (what, operation) in operations {
        for nth in 1.. {
            let sim = Sim::of(prepared.world, prepared.disk.crash(Survives::Everything));
            let store = sim.open();
            let logstore = store.logstore(&name("p/l")).unwrap();
            if what != "append" {
                put(&logstore, "more");
            }
            let at = sim.disk.changes() + nth;
            sim.disk.on_call(move |call| {
                let grows = matches!(call.op, Op::Create | Op::Write | Op::CreateDir | Op::Sync);
                match grows && call.number >= at {
                    true => Verdict::Fail(io::ErrorKind::StorageFull),
                    false => Verdict::Go,
                }
            });
            let done = operation(&store, &logstore);
            let whole = sim.disk.changes() < at;
            let context = format!("{what}, operation {nth}: {done:?}");
            match &done {
                Ok(()) => {}
                Err(error) => {
                    assert!(matches!(error, Error::Io { .. } | Error::Latched { .. }), "{context}");
                    assert_eq!(error.kind(), ErrorKind::NoRoom, "{context}");
                }
            }
            // When space is available again, reopening finds all data, and the store works.
            sim.disk.heal();
            drop((logstore, store));
            let store = sim.open();
            let logstore = store.logstore(&name("p/l")).unwrap();
            let found = texts(&logstore);
            assert_eq!(found[0], "kept", "{context}");
            assert!(found.len() == 2 || what == "append", "{context}: {found:?}");
            if what == "append" && done.is_ok() {
                assert_eq!(found, ["kept", "new"], "{context}");
            }
            put(&logstore, "after");
            match store.logstore(&name("p/new")) {
                Ok(new) => put(&new, "usable"),
                Err(error) => {
                    assert!(matches!(error, Error::LogstoreMissing(_)), "{context}: {error}")
                }
            }
            operation(&store, &logstore)
                .or_else(|error| {
                    if matches!(error, Error::LogstoreExists(_)) { Ok(()) } else { Err(error) }
                })
                .unwrap_or_else(|error| panic!("{context}: again: {error}"));
            drop((logstore, store));
            let report = sim.open().admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
            assert!(report.is_clean(), "{context}: {:?}", report.faults);
            prepared.world = sim.world;
            if whole {
                assert!(done.is_ok() && nth > 1, "{context}");
                break;
            }
        }
    }
}
