//! The life of a data key: rotation, re-wrapping, replacement, shredding, and removal from memory.

#![allow(clippy::unwrap_used)]

mod common;

use std::{fs, io, path::PathBuf};

use common::{
    disk::{Op, Sim, Verdict},
    *,
};
use envelog::{
    AppendOptions, Cmk, Durability, EncryptConf, EncryptType, Error, Logstore, LogstoreSpec,
    Position, ReadOptions, Result, ShardChoice, Store,
    admin::{ReplaceCmk, VerifyOptions},
    audit::AuditEvent,
    error::ConfigError,
    inspect::{KeySource, SegmentHeader},
    kms::RevokedReason,
};

/// The key source in the header of each segment of shard 0.
fn key_sources(world: &World, logstore: &Logstore) -> Vec<KeySource> {
    let header = |path: &PathBuf| SegmentHeader::decode(&fs::read(path).unwrap()).unwrap().header;
    segments(&world.logstore_dir(logstore), 0).iter().map(|path| header(path).key_source).collect()
}

/// The segment files with their contents.
fn data(world: &World, logstore: &Logstore) -> Vec<(PathBuf, Vec<u8>)> {
    let files = files(&world.logstore_dir(logstore));
    files.into_iter().filter(|(path, _)| path.extension().is_some_and(|ext| ext == "seg")).collect()
}

fn meta(world: &World, logstore: &Logstore) -> Vec<u8> {
    fs::read(meta_path(&world.logstore_dir(logstore))).unwrap()
}

/// For each data-key version: its number, segments and bytes, and whether it was shredded.
fn under_each(logstore: &Logstore) -> Vec<(u32, u64, u64, bool)> {
    let keys = logstore.status().unwrap().data_keys;
    keys.iter().map(|key| (key.version, key.segments, key.bytes_stored, key.shredded)).collect()
}

#[track_caller]
fn assert_shredded<T: std::fmt::Debug>(result: Result<T>, expected: u32) {
    assert!(
        matches!(&result, Err(Error::Shredded { version, .. }) if *version == expected),
        "{result:?}"
    );
}

#[track_caller]
fn assert_clean(store: &Store) {
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean() && report.refused.is_empty(), "{report:?}");
}

/// A Logstore under the service key and one under a customer's key, each with a record under its
/// first data key.
fn both(world: &World, store: &Store) -> [Logstore; 2] {
    let logstores = [world.service(store, "p/service"), world.byok(store, "p/byok", &world.cmk())];
    logstores.iter().for_each(|logstore| put(logstore, "one"));
    logstores
}

/// Checks that the same files exist, unchanged except for an appended footer.
fn assert_goes_on(before: &[(PathBuf, Vec<u8>)], after: &[(PathBuf, Vec<u8>)]) {
    assert_eq!(before.len(), after.len());
    for ((path, before), (after_path, after)) in before.iter().zip(after) {
        assert_eq!(path, after_path);
        assert!(after.starts_with(before) && after.ends_with(b"SEAL"), "{}", path.display());
    }
}

// ---- rotation ----

#[test]
fn after_a_rotation_old_segments_stay_readable() {
    let world = World::manual();
    let store = world.create();
    for logstore in both(&world, &store) {
        let before = data(&world, &logstore);
        assert_eq!(store.keys().rotate_data_key(logstore.name()).unwrap(), 2);
        // The rotation only seals the open segment.
        assert_goes_on(&before, &data(&world, &logstore));
        put(&logstore, "two");
        assert_eq!(store.keys().rotate_data_key(logstore.name()).unwrap(), 3);
        put(&logstore, "three");
        put(&logstore, "four");
        let expected = [1, 2, 3].map(KeySource::DataKey);
        assert_eq!(key_sources(&world, &logstore), expected);
        assert_eq!(texts(&logstore), ["one", "two", "three", "four"]);
        // The segments and bytes of each version.
        let sizes: Vec<u64> =
            data(&world, &logstore).iter().map(|(_, bytes)| bytes.len() as u64).collect();
        let expected: Vec<_> =
            (1..).zip(&sizes).map(|(version, size)| (version, 1, *size, false)).collect();
        assert_eq!(under_each(&logstore), expected);
    }
    store.close().unwrap();
    let store = world.open();
    for text in ["p/service", "p/byok"] {
        let logstore = store.logstore(&name(text)).unwrap();
        assert_eq!(texts(&logstore), ["one", "two", "three", "four"]);
        put(&logstore, "five");
        assert_eq!(key_sources(&world, &logstore).last(), Some(&KeySource::DataKey(3)));
    }
    assert_clean(&store);
}

#[test]
fn a_rotation_without_a_usable_key_is_refused() {
    let world = World::manual();
    let store = world.create();
    let [_, byok] = both(&world, &store);
    let plain = store.create_logstore(&name("p/plain"), LogstoreSpec::default()).unwrap();
    let before = meta(&world, &byok);
    assert!(matches!(
        store.keys().rotate_data_key(plain.name()),
        Err(Error::Config(ConfigError::NotEncrypted))
    ));
    assert!(matches!(
        store.keys().rotate_data_key(&name("p/none")),
        Err(Error::LogstoreMissing(_))
    ));
    world.kms.answer(Answer::Revoked(RevokedReason::Disabled));
    world.clock.advance(secs(31));
    assert_revoked(store.keys().rotate_data_key(byok.name()), RevokedReason::Disabled);
    world.kms.answer(Answer::Unreachable);
    byok.revalidate_now().unwrap_err();
    assert!(matches!(store.keys().rotate_data_key(byok.name()), Err(Error::KmsUnreachable { .. })));
    assert_eq!(meta(&world, &byok), before);
    world.kms.answer(Answer::Real);
    byok.revalidate_now().unwrap();
    assert_eq!(store.keys().rotate_data_key(byok.name()).unwrap(), 2);
}

#[test]
fn a_reader_that_is_open_reads_on_over_rotations() {
    let world = World::manual();
    let store = world.create();
    for logstore in both(&world, &store) {
        let mut reader = logstore.read(0, &envelog::ReadOptions::default()).unwrap();
        for n in 0..5 {
            assert_eq!(
                strings(&[reader.next().unwrap().unwrap()]),
                [if n == 0 { "one" } else { "more" }]
            );
            store.keys().rotate_data_key(logstore.name()).unwrap();
            put(&logstore, "more");
        }
    }
}

/// Data sealed with the service keyring, in a Logstore that got its master key later, could be read
/// without an answer of the KMS.
#[test]
fn an_outage_after_a_refusal_brings_nothing_back() {
    let world = World::manual();
    let store = world.create();
    let logstore = store.create_logstore(&name("p/l"), LogstoreSpec::default()).unwrap();
    put(&logstore, "before");
    let config = store.logstore(logstore.name()).unwrap().config();
    let conf = EncryptConf::byok(EncryptType::Aes, world.cmk());
    store.update_logstore(logstore.name(), config.encrypt_conf(conf)).unwrap();
    assert_eq!(texts(&logstore), ["before"]);
    world.kms.answer(Answer::Revoked(RevokedReason::Disabled));
    assert_revoked(logstore.revalidate_now(), RevokedReason::Disabled);
    let recoveries = || {
        let records = store.keys().audit_records().unwrap();
        records.iter().filter(|record| record.event == AuditEvent::Recovered).count()
    };
    for answer in [Answer::Unreachable, Answer::Invalid] {
        world.kms.answer(answer);
        for _ in 0..3 {
            let error = logstore.revalidate_now().unwrap_err();
            assert!(
                matches!(error, Error::KmsUnreachable { .. } | Error::KmsInvalid { .. }),
                "{error:?}"
            );
            for refused in [try_texts(&logstore).map(|_| ()), try_put(&logstore, "no")] {
                let error = refused.unwrap_err();
                assert!(
                    matches!(error, Error::KmsUnreachable { .. } | Error::KmsInvalid { .. }),
                    "{error:?}"
                );
            }
            assert_eq!(logstore.key_status().lease_left, Some(std::time::Duration::ZERO));
            world.clock.advance(secs(31));
            store.tick();
        }
    }
    assert_eq!(recoveries(), 0);
    world.kms.answer(Answer::Real);
    logstore.revalidate_now().unwrap();
    assert_eq!(texts(&logstore), ["before"]);
    assert_eq!(recoveries(), 1);
}

// ---- re-wrapping ----

/// The version of the master key that wrapped a data key, as the embedded KMS records it in the
/// ciphertext.
fn cmk_version(wrapped: &str) -> u32 {
    let byte = |at: usize| u8::from_str_radix(&wrapped[2 * at..2 * at + 2], 16).unwrap();
    u32::from_le_bytes([28, 29, 30, 31].map(byte))
}

#[test]
fn rewrapping_under_a_rotated_master_key_rewrites_no_data() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let logstore = world.byok(&store, "p/l", &cmk);
    put(&logstore, "one");
    store.keys().rotate_data_key(logstore.name()).unwrap();
    put(&logstore, "two");
    world.local().rotate(&cmk.cmk_key_id).unwrap();
    // Keys wrapped under the old version of the master key still unwrap.
    assert_eq!(texts(&logstore), ["one", "two"]);
    let (before, envelopes_before) = (data(&world, &logstore), envelopes(&world, &logstore));
    assert!(
        envelopes_before.iter().all(|(_, _, wrapped)| cmk_version(wrapped.as_ref().unwrap()) == 1)
    );
    assert_eq!(store.keys().rewrap(logstore.name()).unwrap(), 2);
    let after = envelopes(&world, &logstore);
    assert!(after.iter().all(|(_, _, wrapped)| cmk_version(wrapped.as_ref().unwrap()) == 2));
    assert_eq!(after.iter().map(|(version, ..)| *version).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(data(&world, &logstore), before);
    put(&logstore, "three");
    // The data key is unchanged, so the open segment continues.
    assert_eq!(key_sources(&world, &logstore), [1, 2].map(KeySource::DataKey));
    store.close().unwrap();
    let store = world.open();
    assert_eq!(texts(&store.logstore(&name("p/l")).unwrap()), ["one", "two", "three"]);
    assert_clean(&store);
}

#[test]
fn rewrapping_that_fails_half_way_changes_nothing() {
    let world = World::manual();
    let store = world.create();
    let [_, byok] = both(&world, &store);
    store.keys().rotate_data_key(byok.name()).unwrap();
    put(&byok, "two");
    let before = meta(&world, &byok);
    for answer in [
        Answer::Revoked(RevokedReason::NotPermitted),
        Answer::Unreachable,
        Answer::Invalid,
        Answer::WrongKey,
    ] {
        world.kms.answer_for_data_keys(answer);
        let error = store.keys().rewrap(byok.name()).unwrap_err();
        let expected = match answer {
            Answer::Revoked(_) => matches!(error, Error::Revoked { .. }),
            Answer::Unreachable => matches!(error, Error::KmsUnreachable { .. }),
            _ => matches!(error, Error::KmsInvalid { .. }),
        };
        assert!(expected, "{answer:?}: {error:?}");
        assert_eq!(meta(&world, &byok), before);
        world.kms.answer(Answer::Real);
        byok.revalidate_now().unwrap();
        assert_eq!(texts(&byok), ["one", "two"]);
    }
}

// ---- replacing the master key ----

#[test]
fn a_replacement_rewrites_envelopes_but_no_data() {
    let world = World::manual();
    let store = world.create();
    let (old, new, newer) = (world.cmk(), world.cmk(), world.cmk());
    let logstore = world.byok(&store, "p/l", &old);
    put(&logstore, "one");
    store.keys().rotate_data_key(logstore.name()).unwrap();
    put(&logstore, "two");
    let before = data(&world, &logstore);
    let under = |cmk: &Cmk| {
        let id: String = cmk.cmk_key_id.bytes().map(|byte| format!("{byte:02x}")).collect();
        envelopes(&world, &logstore)
            .iter()
            .filter(|(_, _, wrapped)| wrapped.as_ref().unwrap().contains(&id))
            .count()
    };
    assert_eq!((under(&old), under(&new)), (2, 0));
    assert_eq!(
        store.keys().replace_cmk(logstore.name(), new.clone(), ReplaceCmk::default()).unwrap(),
        3
    );
    assert_eq!((under(&old), under(&new)), (0, 3));
    assert_goes_on(&before, &data(&world, &logstore));
    // The fresh data key is used for later appends.
    put(&logstore, "three");
    assert_eq!(key_sources(&world, &logstore), [1, 2, 3].map(KeySource::DataKey));
    // With `keep_data_key`, the data key stays, and the open segment continues.
    assert_eq!(
        store
            .keys()
            .replace_cmk(
                logstore.name(),
                newer.clone(),
                ReplaceCmk::default().fresh_data_key(false)
            )
            .unwrap(),
        3
    );
    put(&logstore, "four");
    assert_eq!((under(&new), under(&newer)), (0, 3));
    assert_eq!(key_sources(&world, &logstore), [1, 2, 3].map(KeySource::DataKey));
    assert_eq!(texts(&logstore), ["one", "two", "three", "four"]);
    assert_clean(&store);
}

#[test]
fn a_failed_replacement_changes_nothing() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.byok(&store, "p/l", &world.cmk());
    put(&logstore, "one");
    let before = meta(&world, &logstore);
    for answer in [Answer::Unreachable, Answer::Invalid, Answer::WrongKey] {
        world.kms.answer_for_data_keys(answer);
        let error = store
            .keys()
            .replace_cmk(logstore.name(), world.cmk(), ReplaceCmk::default())
            .unwrap_err();
        assert!(
            matches!(error, Error::KmsUnreachable { .. } | Error::KmsInvalid { .. }),
            "{answer:?}: {error:?}"
        );
        assert_eq!(meta(&world, &logstore), before);
    }
    world.kms.answer(Answer::Real);
    logstore.revalidate_now().unwrap();
    put(&logstore, "two");
    assert_eq!(texts(&logstore), ["one", "two"]);
    assert_eq!(envelopes(&world, &logstore).len(), 1);
}

// ---- crypto-shredding ----

#[test]
fn a_shredded_version_takes_its_data_with_it_and_nothing_else() {
    let world = World::manual();
    let store = world.create();
    let logstores = both(&world, &store);
    for logstore in &logstores {
        for text in ["two", "three"] {
            store.keys().rotate_data_key(logstore.name()).unwrap();
            put(logstore, text);
        }
        let wrapped = envelopes(&world, logstore)[1].2.clone().unwrap();
        store.keys().shred_data_keys(logstore.name(), &[2]).unwrap();
        // The envelope is no longer in any file of the store.
        for (path, bytes) in files(&world.store_dir()) {
            assert!(!String::from_utf8_lossy(&bytes).contains(&wrapped), "{}", path.display());
        }
        assert_eq!(envelopes(&world, logstore)[1].2, None);
        let shredded: Vec<bool> =
            under_each(logstore).into_iter().map(|(.., shredded)| shredded).collect();
        assert_eq!(shredded, [false, true, false]);
        // A reader returns the data before the shredded segment, then reports the shredding, and
        // can continue after it.
        let mut reader = logstore.read(0, &envelog::ReadOptions::default()).unwrap();
        assert_eq!(strings(&[reader.next().unwrap().unwrap()]), ["one"]);
        assert_shredded(reader.next().unwrap(), 2);
        let behind = logstore.end_seq(0).unwrap() - 1;
        assert_eq!(strings(&records_from(logstore, 0, Position::Seq(behind)).unwrap()), ["three"]);
        put(logstore, "four");
    }
    // The other versions, other Logstores, and the whole store are intact.
    assert_clean(&store);
    store.close().unwrap();
    let store = world.open();
    for text in ["p/service", "p/byok"] {
        let logstore = store.logstore(&name(text)).unwrap();
        assert_shredded(try_texts(&logstore), 2);
        put(&logstore, "five");
    }
    // A shredded version never comes back: re-wrapping and rotation do not restore it, and its
    // number is not reused.
    for logstore in &logstores {
        assert_eq!(store.keys().rewrap(logstore.name()).unwrap(), 2);
        assert_eq!(store.keys().rotate_data_key(logstore.name()).unwrap(), 4);
        let logstore = store.logstore(logstore.name()).unwrap();
        assert_shredded(try_texts(&logstore), 2);
    }
}

/// The older metadata file has the envelopes. As long as it is there, no key counts as destroyed.
#[test]
fn shredding_fails_while_the_older_metadata_cannot_be_removed() {
    let sim = Sim::new();
    let store = sim.create();
    let logstores = [
        sim.world.service(&store, "p/service"),
        sim.world.byok(&store, "p/byok", &sim.world.cmk()),
    ];
    for logstore in &logstores {
        store.keys().rotate_data_key(logstore.name()).unwrap();
        let shred = || store.keys().shred_data_keys(logstore.name(), &[1]);
        let recorded = || {
            let records = store.keys().audit_records().unwrap().into_iter();
            records.filter(|record| record.event == AuditEvent::Shredded).count()
        };
        let meta_files = || {
            let files = sim.disk.files(&sim.world.logstore_dir(logstore));
            files.into_keys().filter(|path| path.to_str().unwrap().contains("/meta-")).count()
        };
        let before = recorded();
        // The files of an older generation, or their second copies alone.
        for refused in ["meta-", ".copy"] {
            sim.disk.on_call(move |call| match call.op == Op::Remove && call.is_about(refused) {
                true => Verdict::Refuse(io::ErrorKind::PermissionDenied),
                false => Verdict::Go,
            });
            assert!(matches!(shred(), Err(Error::Io { .. })));
            sim.disk.heal();
            assert_eq!(recorded(), before);
            assert!(meta_files() > 2, "the envelopes are there");
        }
        shred().unwrap();
        assert_eq!((recorded(), meta_files()), (before + 1, 2));
        assert!(logstore.status().unwrap().data_keys[0].shredded);
    }
}

#[test]
fn shredding_first_ends_a_segment_under_the_version() {
    let world = World::manual();
    let store = world.create();
    for logstore in both(&world, &store) {
        // The open segment is still sealed with the first version.
        store.keys().rotate_data_key(logstore.name()).unwrap();
        store.keys().shred_data_keys(logstore.name(), &[1]).unwrap();
        assert_shredded(try_texts(&logstore), 1);
        put(&logstore, "two");
        assert_eq!(key_sources(&world, &logstore), [1, 2].map(KeySource::DataKey));
        let last = logstore.end_seq(0).unwrap() - 1;
        assert_eq!(strings(&records_from(&logstore, 0, Position::Seq(last)).unwrap()), ["two"]);
    }
}

#[test]
fn a_refused_shredding_destroys_nothing() {
    let world = World::manual();
    let store = world.create();
    let [service, byok] = both(&world, &store);
    let plain = store.create_logstore(&name("p/plain"), LogstoreSpec::default()).unwrap();
    let refused = |logstore: &Logstore, versions: &[u32]| {
        store.keys().shred_data_keys(logstore.name(), versions).unwrap_err()
    };
    for logstore in [&service, &byok] {
        store.keys().rotate_data_key(logstore.name()).unwrap();
        put(logstore, "two");
        let before = meta(&world, logstore);
        // The current version, a version that never existed, and either of them together with a
        // removable one.
        for (versions, culprit) in [(&[2][..], 2), (&[3], 3), (&[0], 0), (&[1, 2], 2), (&[1, 9], 9)]
        {
            let error = refused(logstore, versions);
            assert!(
                matches!(error, Error::Config(ConfigError::CannotShred { version, .. }) if version == culprit),
                "{error:?}"
            );
        }
        assert_eq!(meta(&world, logstore), before);
    }
    assert!(matches!(refused(&plain, &[1]), Error::Config(ConfigError::NotEncrypted)));
    // The data key computes the second tag of BYOK metadata, so the master key must be usable.
    world.kms.answer(Answer::Revoked(RevokedReason::Disabled));
    assert!(matches!(refused(&byok, &[1]), Error::Revoked { .. }));
    world.kms.answer(Answer::Real);
    byok.revalidate_now().unwrap();
    for logstore in [&service, &byok] {
        assert_eq!(texts(logstore), ["one", "two"]);
    }
}

#[test]
fn deleting_a_revoked_logstore_destroys_its_envelopes() {
    let world = World::manual();
    let store = world.create();
    let [service, byok] = both(&world, &store);
    let kept = world.service(&store, "p/kept");
    put(&kept, "kept");
    world.kms.answer(Answer::Revoked(RevokedReason::Deleted));
    byok.revalidate_now().unwrap_err();
    for logstore in [service, byok] {
        let wrapped = envelopes(&world, &logstore)[0].2.clone().unwrap();
        let dir = world.logstore_dir(&logstore);
        store.delete_logstore(logstore.name()).unwrap();
        assert!(!dir.exists());
        for (path, bytes) in files(&world.store_dir()) {
            assert!(!String::from_utf8_lossy(&bytes).contains(&wrapped), "{}", path.display());
        }
        // A remaining handle uses no key that is still in memory.
        assert!(matches!(try_put(&logstore, "late"), Err(Error::Closed(_))));
        assert!(matches!(try_texts(&logstore), Err(Error::Closed(_))));
    }
    assert_eq!(texts(&kept), ["kept"]);
    assert_clean(&store);
}

// ---- removal of keys from memory ----

/// Whether a secret is anywhere in the memory of this process. The argument is inverted, so that
/// the search does not find its own copy.
#[cfg(target_os = "linux")]
fn in_memory(inverted: &[u8]) -> bool {
    use std::os::unix::fs::FileExt;

    let memory = fs::File::open("/proc/self/mem").unwrap();
    let mut buffer = vec![0; 1 << 20];
    for line in fs::read_to_string("/proc/self/maps").unwrap().lines() {
        let mut words = line.split(' ');
        let range = words.next().unwrap().split_once('-').unwrap();
        if !words.next().unwrap().starts_with("rw") {
            continue;
        }
        let at = |text| u64::from_str_radix(text, 16).unwrap();
        let (mut from, to) = (at(range.0), at(range.1));
        while from < to {
            let len = buffer.len().min((to - from) as usize);
            let read = memory.read_at(&mut buffer[..len], from).unwrap_or(0);
            if read < inverted.len() {
                break;
            }
            let found = buffer[..read].windows(inverted.len()).any(|window| {
                window[0] == !inverted[0]
                    && window.iter().zip(inverted).all(|(byte, inverted)| *byte == !*inverted)
            });
            // Erase the copy, so that the next search does not find it.
            buffer[..read].fill(0);
            if found {
                return true;
            }
            from += (read + 1 - inverted.len()) as u64;
        }
    }
    false
}

/// Serializes the tests that search the memory: the read buffer of one is a copy that another would
/// find.
#[cfg(target_os = "linux")]
static SEARCH: std::sync::Mutex<()> = std::sync::Mutex::new(());

/// The operating system's random source. Records the draws of 32 bytes inverted.
#[cfg(target_os = "linux")]
#[derive(Debug, Default)]
struct InvertingRandom(std::sync::Mutex<Vec<[u8; 32]>>);

#[cfg(target_os = "linux")]
impl envelog::io::Random for InvertingRandom {
    fn fill(&self, buf: &mut [u8]) -> std::io::Result<()> {
        envelog::io::OsRandom.fill(buf)?;
        if buf.len() == 32 {
            self.0.lock().unwrap().push(std::array::from_fn(|at| !buf[at]));
        }
        Ok(())
    }
}

/// A data key is in memory while it is in use, and nowhere in memory after its key is revoked,
/// shredded or deleted, or the store is closed.
#[cfg(target_os = "linux")]
#[test]
fn a_data_key_is_nowhere_in_memory_once_it_may_not_be_used() {
    use std::sync::Arc;

    use envelog::{crypto::AwsLc, kms::LocalKms};

    let _alone = SEARCH.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    type End = fn(&Store, &LocalKms, &str, &Logstore);
    let ends: [(&str, End); 4] = [
        ("revoked", |_, kms, key, logstore| {
            kms.disable(key).unwrap();
            assert_revoked(logstore.revalidate_now(), RevokedReason::Disabled);
        }),
        ("shredded", |store, _, _, logstore| {
            store.keys().rotate_data_key(logstore.name()).unwrap();
            store.keys().shred_data_keys(logstore.name(), &[1]).unwrap();
        }),
        ("deleted", |store, _, _, logstore| drop(store.delete_logstore(logstore.name()).unwrap())),
        ("closed", |store, _, _, _| store.clone().close().unwrap()),
    ];
    for (how, end) in ends {
        let dir = tempfile::tempdir().unwrap();
        let kms = LocalKms::create_or_open(dir.path().join("kms")).unwrap();
        let key = kms.create_key(REGION, &[ROLE]).unwrap();
        let cmk = Cmk { cmk_key_id: key.clone(), arn: ROLE.into(), region_id: REGION.into() };
        let random = Arc::new(InvertingRandom::default());
        let store =
            Store::builder(dir.path().join("store"), dir.path().join("keyring"), AwsLc::new())
                .kms(Arc::new(kms.clone()))
                .disk(Arc::new(QuickDisk))
                .insecure_random_for_tests(random.clone())
                .create()
                .unwrap();
        random.0.lock().unwrap().clear();
        let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::byok(EncryptType::Aes, cmk));
        let logstore = store.create_logstore(&name("p/l"), spec).unwrap();
        // The draws are the data key and the secret of the probe. Only the data key stays in
        // memory.
        let drawn = random.0.lock().unwrap().clone();
        put(&logstore, "one");
        assert_eq!(texts(&logstore), ["one"]);
        let held: Vec<&[u8; 32]> = drawn.iter().filter(|drawn| in_memory(&drawn[..])).collect();
        let [data_key] = held[..] else {
            panic!("{how}: expected one of {} keys in memory, got {}", drawn.len(), held.len())
        };
        end(&store, &kms, &key, &logstore);
        assert!(!in_memory(data_key), "{how}");
    }
}

/// The same for the root keys of the service keyring, as bytes and as the text in its file: after
/// closing the store, and after opening a store with another store's keyring.
#[cfg(target_os = "linux")]
#[test]
fn root_keys_are_nowhere_in_memory_after_use() {
    use std::sync::Arc;

    use envelog::crypto::AwsLc;

    let _alone = SEARCH.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let random = Arc::new(InvertingRandom::default());
    let builder = |store: &str, keyring: &str| {
        Store::builder(dir.path().join(store), dir.path().join(keyring), AwsLc::new())
            .disk(Arc::new(QuickDisk))
            .insecure_random_for_tests(random.clone())
    };
    let store = builder("store", "keyring").create().unwrap();
    // The root keys are those draws that stay in memory while the store is open.
    let roots = |store: &Store| {
        store.keys().rotate_service_key().unwrap();
        let drawn = random.0.lock().unwrap().clone();
        drawn.into_iter().filter(|drawn| in_memory(&drawn[..])).collect::<Vec<_>>()
    };
    let roots = roots(&store);
    assert_eq!(roots.len(), 2);
    store.close().unwrap();
    drop(builder("other", "other-keyring").create().unwrap());
    let text = |root: &[u8; 32]| -> Vec<u8> {
        let digit = |nibble: u8| !b"0123456789abcdef"[usize::from(nibble)];
        // Search for half of the text, which is half of the key.
        root.iter().take(16).flat_map(|byte| [digit(!byte >> 4), digit(!byte & 15)]).collect()
    };
    let gone = |when: &str| {
        for root in &roots {
            assert!(!in_memory(root), "{when}");
            assert!(!in_memory(&text(root)), "{when}, as text");
        }
    };
    gone("closed");
    let store = builder("store", "keyring").open().unwrap();
    assert!(roots.iter().all(|root| in_memory(root)));
    store.close().unwrap();
    gone("opened and closed");
    // Opening another store with this keyring reads the keyring and rejects it.
    let foreign = builder("other", "keyring").open();
    assert!(matches!(foreign, Err(Error::KeyringForeign { .. })), "{foreign:?}");
    gone("as another's");
    // A changed keyring, whose tag is invalid.
    let path = dir.path().join("keyring");
    let mut bytes = fs::read(&path).unwrap();
    let tag = bytes.len() - 4 - 64;
    bytes[tag] ^= 1;
    fix_crc(&mut bytes);
    fs::write(&path, &bytes).unwrap();
    bytes.fill(0);
    let altered = builder("store", "keyring").open();
    assert!(matches!(altered, Err(Error::Tampered { .. })), "{altered:?}");
    gone("altered");
}

/// While the KMS refuses the master key of the keyring, no root, no sealing key and no data key is
/// in memory: also not of an operation that has a copy of the keyring, and whose disk hangs.
#[cfg(target_os = "linux")]
#[test]
fn no_key_is_in_memory_while_the_service_key_is_refused() {
    use std::sync::Arc;

    use common::hanging::HangingDisk;
    use envelog::{KeyState, StoreOptions, crypto::AwsLc, kms::LocalKms};

    let _alone = SEARCH.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let dir = tempfile::tempdir().unwrap();
    let kms = LocalKms::create_or_open(dir.path().join("kms")).unwrap();
    let cmk = || {
        let key = kms.create_key(REGION, &[ROLE]).unwrap();
        Cmk { cmk_key_id: key, arn: ROLE.into(), region_id: REGION.into() }
    };
    let (of_service, of_customer) = (cmk(), cmk());
    let (random, clock) = (Arc::new(InvertingRandom::default()), TestClock::new());
    let disk = HangingDisk::of("keyring.tmp");
    let mut options = StoreOptions::default();
    options.background = envelog::Background::Manual;
    let store = Store::builder(dir.path().join("store"), dir.path().join("keyring"), AwsLc::new())
        .kms(Arc::new(kms.clone()))
        .disk(Arc::new(disk.clone()))
        .clock(clock.clone())
        .options(options)
        .insecure_random_for_tests(random.clone())
        .service_cmk(of_service.clone())
        .create()
        .unwrap();
    let spec = |conf| LogstoreSpec::default().encrypt_conf(conf);
    let service = spec(EncryptConf::service_key(EncryptType::Aes));
    let service = store.create_logstore(&name("p/service"), service).unwrap();
    let byok = spec(EncryptConf::byok(EncryptType::Sm4, of_customer));
    let byok = store.create_logstore(&name("p/byok"), byok).unwrap();
    store.keys().rotate_service_key().unwrap();
    let mut readers = Vec::new();
    for logstore in [&service, &byok] {
        put(logstore, "one");
        assert_eq!(texts(logstore), ["one"]);
        put(logstore, "two");
        let mut reader = logstore.read(0, &ReadOptions::default()).unwrap();
        reader.next().unwrap().unwrap();
        readers.push(reader);
    }
    // A salt is drawn like a key, and is no secret: it is in a file.
    let in_a_file = |drawn: &[u8; 32]| {
        let drawn: Vec<u8> = drawn.iter().map(|byte| !byte).collect();
        let has = |bytes: Vec<u8>| bytes.windows(32).any(|window| window == drawn);
        files(&dir.path().join("store")).into_values().any(has)
    };
    let held = || {
        let drawn = random.0.lock().unwrap().clone();
        let held = drawn.into_iter().filter(|drawn| in_memory(&drawn[..]) && !in_a_file(drawn));
        held.collect::<Vec<_>>()
    };
    let before = held();
    assert_eq!(before.len(), 4, "two roots and two data keys");
    let text = |root: &[u8; 32]| -> Vec<u8> {
        let digit = |nibble: u8| !b"0123456789abcdef"[usize::from(nibble)];
        root.iter().take(16).flat_map(|byte| [digit(!byte >> 4), digit(!byte & 15)]).collect()
    };
    let pass = || {
        clock.advance(secs(31));
        store.tick();
    };
    let refused = |result: Result<()>| {
        assert!(matches!(result, Err(Error::ServiceKey { .. })), "{result:?}");
    };
    std::thread::scope(|threads| {
        disk.hang(true);
        let rotation = threads.spawn(|| store.keys().rotate_service_key().map(drop));
        eventually("the keyring is being written", || disk.hanging() > 0);
        assert_eq!(held().len(), 5, "with the new root");
        kms.disable(&of_service.cmk_key_id).unwrap();
        pass();
        refused(try_put(&service, "x"));
        assert_eq!(held(), Vec::<[u8; 32]>::new());
        for root in &before {
            assert!(!in_memory(&text(root)), "as text");
        }
        disk.hang(false);
        refused(rotation.join().unwrap());
    });
    assert_eq!(held(), Vec::<[u8; 32]>::new(), "and not after that operation");
    readers.iter_mut().for_each(|reader| assert!(reader.next().unwrap().is_err()));
    refused(store.keys().rotate_service_key().map(drop));
    assert_eq!(held(), Vec::<[u8; 32]>::new());
    // They come back with the KMS, and with the version that was written at last.
    kms.enable(&of_service.cmk_key_id).unwrap();
    pass();
    for logstore in [&service, &byok] {
        assert_eq!(texts(logstore), ["one", "two"]);
        put(logstore, "three");
    }
    assert_eq!(store.keys().service_key_status().state, KeyState::Active);
    assert!(before.iter().all(|key| in_memory(key)));
    assert_eq!(store.keys().rotate_service_key().unwrap(), 3);
}

/// Unencrypted data left by a crash is recovered under the data key, if the Logstore got its first
/// envelope before. A shard that was not opened before continues under that key.
#[test]
fn what_a_crash_left_is_recovered_under_a_first_data_key() {
    for crash_again in [false, true] {
        let world = World::manual();
        let (mut store, cmk) = (world.create(), world.cmk());
        let spec = LogstoreSpec::default().shard_count(3);
        let mut logstore = store.create_logstore(&name("p/l"), spec).unwrap();
        let to = |shard, durability| {
            AppendOptions::default().shard(ShardChoice::Shard(shard)).durability(durability)
        };
        for shard in [0, 1] {
            logstore.append(record("durable"), &to(shard, Durability::Synced)).unwrap();
        }
        logstore.append(record("above the mark"), &to(0, Durability::Written)).unwrap();
        let crash = |store: Store, logstore: Logstore| {
            let copy = world.path().join("copy");
            copy_dir(&world.store_dir(), &copy);
            store.close().unwrap();
            let empty = world.logstore_dir(&logstore).join("shard-0002");
            drop(logstore);
            copy_dir(&copy, &world.store_dir());
            fs::create_dir_all(empty).unwrap();
            let store = world.open();
            let logstore = store.logstore(&name("p/l")).unwrap();
            (store, logstore)
        };
        (store, logstore) = crash(store, logstore);
        let conf = Some(EncryptConf::byok(EncryptType::Aes, cmk));
        store.update_logstore(logstore.name(), logstore.config().encrypt_conf(conf)).unwrap();
        if crash_again {
            (store, logstore) = crash(store, logstore);
        }
        for shard in 0..3 {
            logstore.append(record("after"), &to(shard, Durability::Synced)).unwrap();
        }
        for _ in 0..2 {
            let found = [0, 1, 2].map(|shard| strings(&records(&logstore, shard).unwrap()));
            assert_eq!(found[0], ["durable", "above the mark", "after"]);
            assert_eq!(
                (&found[1][..], &found[2][..]),
                (&["durable".into(), "after".into()][..], &["after".into()][..])
            );
            assert_clean(&store);
            store.close().unwrap();
            store = world.open();
            logstore = store.logstore(&name("p/l")).unwrap();
        }
        let sources = [0, 1, 2].map(|shard| {
            let source = |path: PathBuf| {
                SegmentHeader::decode(&fs::read(path).unwrap()).unwrap().header.key_source
            };
            segments(&world.logstore_dir(&logstore), shard)
                .into_iter()
                .map(source)
                .collect::<Vec<_>>()
        });
        let (plain, sealed) = (KeySource::Keyring(1), KeySource::DataKey(1));
        assert_eq!(
            sources,
            [vec![plain, sealed, sealed], vec![plain, sealed, sealed], vec![sealed]]
        );
    }
}
