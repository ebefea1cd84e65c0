//! The key audit log: its records, the detection of changes, and that it never blocks a revocation
//! or other work.

#![allow(clippy::unwrap_used)]

mod common;

use std::{fs, path::PathBuf, sync::Arc, thread};

use common::{
    failing::{FailingDisk, Failure},
    hanging::HangingDisk,
    *,
};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use envelog::{
    EncryptConf, EncryptType, Error, Logstore, LogstoreSpec, Result, Store,
    admin::{Checkpoint, ReplaceCmk, VerifyOptions},
    audit::AuditEvent::{self, *},
    audit::{AuditMark, AuditRecord},
    kms::RevokedReason,
};

fn audit_dir(world: &World) -> PathBuf {
    world.store_dir().join("audit")
}

fn audit_files(world: &World) -> Vec<PathBuf> {
    files(&audit_dir(world)).into_keys().collect()
}

fn events(store: &Store) -> Vec<AuditEvent> {
    store.keys().audit_records().unwrap().into_iter().map(|record| record.event).collect()
}

fn since(store: &Store, count: usize) -> Vec<AuditRecord> {
    store.keys().audit_records().unwrap().split_off(count)
}

/// The kinds of faults that a verification of the whole store finds.
fn fault_kinds(store: &Store) -> Vec<&'static str> {
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    report.faults.iter().map(|fault| fault.code).collect()
}

// ---- the records ----

#[test]
fn every_transition_is_in_it_with_its_reason_and_nothing_else() {
    let world = World::manual();
    let store = world.create();
    let (old, new) = (world.cmk(), world.cmk());
    let byok = world.byok(&store, "p/byok", &old);
    let service = world.service(&store, "p/service");
    let plain = store.create_logstore(&name("p/plain"), LogstoreSpec::default()).unwrap();
    for logstore in [&byok, &service, &plain] {
        put(logstore, "one");
        texts(logstore);
    }
    // A Logstore without a key has no transitions. Its first `enable: true` records one.
    assert_eq!(events(&store), [StoreCreated, Created, Created]);
    let config = store.logstore(plain.name()).unwrap().config();
    let conf = EncryptConf::service_key(EncryptType::Sm4);
    let config = store.update_logstore(plain.name(), config.encrypt_conf(conf.clone())).unwrap();
    // Switching encryption, syncs, checkpoints and closing record no event.
    let off = EncryptConf { enable: false, ..conf };
    store.update_logstore(plain.name(), config.encrypt_conf(off)).unwrap();
    store.admin().checkpoint().unwrap();
    world.clock.advance(secs(40));
    store.tick();
    texts(&byok);
    let begin = events(&store).len();
    assert_eq!(begin, 4);

    for (reason, word) in [
        (RevokedReason::Disabled, "disabled"),
        (RevokedReason::PendingDeletion, "pending deletion"),
        (RevokedReason::Deleted, "deleted"),
        (RevokedReason::NotPermitted, "not permitted"),
    ] {
        let before = events(&store).len();
        world.kms.answer(Answer::Revoked(reason));
        // Repeated checks record one transition.
        for _ in 0..3 {
            byok.revalidate_now().unwrap_err();
            try_put(&byok, "refused").unwrap_err();
        }
        world.kms.answer(Answer::Real);
        byok.revalidate_now().unwrap();
        let records = since(&store, before);
        assert_eq!(
            records.iter().map(|record| record.event).collect::<Vec<_>>(),
            [Revoked, Recovered]
        );
        assert!(records[0].detail.contains(word), "{:?}", records[0].detail);
        assert!(records.iter().all(|record| record.logstore.as_ref() == Some(byok.name())));
        assert!(records.iter().all(|record| record.logstore_id == Some(byok.id())));
    }
    // At most ten transitions of one key are recorded per hour.
    world.clock.advance(secs(3600));
    byok.revalidate_now().unwrap();
    for (answer, word) in [(Answer::Unreachable, "unreachable"), (Answer::Invalid, "invalid")] {
        let before = events(&store).len();
        world.kms.answer(answer);
        world.clock.advance(secs(301));
        store.tick();
        world.kms.answer(Answer::Real);
        byok.revalidate_now().unwrap();
        let records = since(&store, before);
        assert_eq!(
            records.iter().map(|record| record.event).collect::<Vec<_>>(),
            [LeaseEnded, Recovered]
        );
        assert!(records[0].detail.contains(word), "{:?}", records[0].detail);
    }

    let before = events(&store).len();
    store.keys().rotate_data_key(byok.name()).unwrap();
    store.keys().rewrap(service.name()).unwrap();
    store.keys().replace_cmk(byok.name(), new, ReplaceCmk::default()).unwrap();
    store.keys().shred_data_keys(byok.name(), &[1]).unwrap();
    store.delete_logstore(plain.name()).unwrap();
    store.keys().rotate_service_key().unwrap();
    let records = since(&store, before);
    let happened: Vec<_> =
        records.iter().map(|record| (record.event, record.logstore.clone())).collect();
    let (b, s, p) =
        (Some(byok.name().clone()), Some(service.name().clone()), Some(plain.name().clone()));
    let expected = [
        (RotateIntended, &b),
        (Rotated, &b),
        (RewrapIntended, &s),
        (Rewrapped, &s),
        (ReplaceIntended, &b),
        (Replaced, &b),
        (ShredIntended, &b),
        (Shredded, &b),
        (DeleteIntended, &p),
        (Deleted, &p),
        (ServiceRotateIntended, &None),
        (RotateIntended, &s),
        (Rotated, &s),
        (ServiceRotated, &None),
    ];
    let expected: Vec<_> =
        expected.into_iter().map(|(event, logstore)| (event, logstore.clone())).collect();
    assert_eq!(happened, expected);
    // Records after the new service key are tagged under it.
    let versions: Vec<u32> = records.iter().map(|record| record.keyring_version).collect();
    assert_eq!(versions, [vec![1; 11], vec![2; 3]].concat());
    // The numbers have no gaps, the times never go backwards, and reopening returns the same
    // records.
    let all = store.keys().audit_records().unwrap();
    assert!(all.iter().zip(1..).all(|(record, number)| record.number == number));
    assert!(all.windows(2).all(|pair| pair[0].time_us <= pair[1].time_us));
    store.close().unwrap();
    assert_eq!(world.open().keys().audit_records().unwrap(), all);
}

#[test]
fn no_key_is_ever_in_it() {
    let world = World::manual();
    let random = Arc::new(RecordingRandom::default());
    let store = world.builder().insecure_random_for_tests(random.clone()).create().unwrap();
    let logstore = world.byok(&store, "p/l", &world.cmk());
    store.keys().rotate_data_key(logstore.name()).unwrap();
    store.keys().replace_cmk(logstore.name(), world.cmk(), ReplaceCmk::default()).unwrap();
    store.keys().rotate_service_key().unwrap();
    let log: Vec<u8> = files(&audit_dir(&world)).into_values().flatten().collect();
    let text = String::from_utf8(log).unwrap();
    let keys = [random.draws(), world.kms.wrapped_keys()].concat();
    assert!(keys.len() > 6);
    for key in keys {
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(!text.contains(&hex));
    }
}

// ---- intent first ----

/// An operation whose intent cannot be recorded is not done. If the operation itself fails, its
/// intent is still recorded.
#[test]
fn intent_is_on_record_before_anything_changes() {
    let world = World::manual();
    let disk = FailingDisk::default();
    let store = world.builder().disk(Arc::new(disk.clone())).create().unwrap();
    let (service, byok) =
        (world.service(&store, "p/service"), world.byok(&store, "p/byok", &world.cmk()));
    for logstore in [&service, &byok] {
        put(logstore, "one");
        store.keys().rotate_data_key(logstore.name()).unwrap();
        put(logstore, "two");
    }
    type Operation<'a> = (AuditEvent, Box<dyn Fn() -> Result<()> + 'a>);
    let operations: [Operation<'_>; 6] = [
        (RotateIntended, Box::new(|| store.keys().rotate_data_key(service.name()).map(|_| ()))),
        (RewrapIntended, Box::new(|| store.keys().rewrap(byok.name()).map(|_| ()))),
        (
            ReplaceIntended,
            Box::new(|| {
                store
                    .keys()
                    .replace_cmk(byok.name(), world.cmk(), ReplaceCmk::default())
                    .map(|_| ())
            }),
        ),
        (ShredIntended, Box::new(|| store.keys().shred_data_keys(byok.name(), &[1]))),
        (DeleteIntended, Box::new(|| store.delete_logstore(service.name()).map(drop))),
        (ServiceRotateIntended, Box::new(|| store.keys().rotate_service_key().map(|_| ()))),
    ];
    let state = || {
        let mut files = files(&world.store_dir());
        files.retain(|path, _| !path.starts_with(audit_dir(&world)));
        files.insert(world.keyring(), fs::read(world.keyring()).unwrap());
        files
    };
    let (before, recorded) = (state(), events(&store));
    for (intent, operation) in &operations {
        disk.break_paths(Some("/audit/"));
        assert!(matches!(operation(), Err(Error::Io { .. })), "{intent:?}");
        disk.break_paths(None);
        assert!(state() == before, "{intent:?} changed something without being on record");
    }
    assert_eq!(events(&store), recorded);
    // The intent stays recorded if the operation fails.
    world.kms.answer_for_data_keys(Answer::Unreachable);
    store.keys().rewrap(byok.name()).unwrap_err();
    assert_eq!(events(&store)[recorded.len()..], [RewrapIntended]);
}

// ---- changes are detected ----

/// A closed store with a history in several audit files.
fn with_history(options: impl FnOnce(&mut World)) -> World {
    let mut world = World::manual();
    options(&mut world);
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "one");
    for _ in 0..10 {
        store.keys().rotate_data_key(logstore.name()).unwrap();
    }
    store.close().unwrap();
    world
}

#[test]
fn it_goes_on_in_a_new_file_when_one_is_full() {
    let world = with_history(|world| world.options.audit_file_bytes = 4096);
    let sizes: Vec<u64> =
        audit_files(&world).iter().map(|path| fs::metadata(path).unwrap().len()).collect();
    assert!(sizes.len() >= 2, "{sizes:?}");
    // A file exceeds the limit by at most one record.
    assert!(sizes.iter().all(|size| *size < 4096 + 512), "{sizes:?}");
    let store = world.open();
    assert_eq!(events(&store).len(), 22);
    store.keys().rotate_data_key(&name("p/l")).unwrap();
    assert_eq!(events(&store)[22..], [RotateIntended, Rotated]);
    assert!(fault_kinds(&store).is_empty());
}

#[test]
fn removal_alteration_reordering_and_truncation_are_found() {
    let world = with_history(|world| world.options.audit_file_bytes = 4096);
    let good = files(&audit_dir(&world));
    let paths: Vec<_> = good.keys().cloned().collect();
    let lines = |path: &PathBuf| -> Vec<Vec<u8>> {
        good[path].split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect()
    };
    let (first, last) = (&paths[0], paths.last().unwrap());
    let with = |change: &dyn Fn(&mut Vec<Vec<u8>>)| {
        let mut lines = lines(first);
        change(&mut lines);
        lines.concat()
    };
    // Recompute the CRC of an altered line, as an attacker can.
    let altered = |line: &[u8]| {
        let text = std::str::from_utf8(line).unwrap().trim_end();
        let (body, _) = text.rsplit_once('\t').unwrap();
        let body = body.replacen("\"rotated\"", "\"created\"", 1);
        format!("{body}\t{:08x}\n", crc32fast::hash(body.as_bytes())).into_bytes()
    };
    type Change<'a> = (&'static str, &'static str, Box<dyn Fn() + 'a>);
    let changes: Vec<Change<'_>> = vec![
        (
            "a record removed",
            "tampered",
            Box::new(|| fs::write(first, with(&|lines| drop(lines.remove(4)))).unwrap()),
        ),
        (
            "the first removed",
            "tampered",
            Box::new(|| fs::write(first, with(&|lines| drop(lines.remove(0)))).unwrap()),
        ),
        (
            "two swapped",
            "tampered",
            Box::new(|| fs::write(first, with(&|lines| lines.swap(2, 3))).unwrap()),
        ),
        (
            "one twice",
            "tampered",
            Box::new(|| {
                fs::write(first, with(&|lines| lines.insert(3, lines[3].clone()))).unwrap()
            }),
        ),
        (
            "one altered",
            "tampered",
            Box::new(|| fs::write(first, with(&|lines| lines[3] = altered(&lines[3]))).unwrap()),
        ),
        (
            "a bit flipped at the end",
            "corrupt",
            Box::new(|| {
                let mut bytes = good[last].clone();
                bytes[30] ^= 1;
                fs::write(last, bytes).unwrap();
            }),
        ),
        (
            "a bit flipped",
            "corrupt",
            Box::new(|| fs::write(first, with(&|lines| lines[3][30] ^= 1)).unwrap()),
        ),
        (
            "the last records cut off",
            "truncated",
            Box::new(|| {
                let lines = lines(last);
                fs::write(last, lines[..lines.len() - 1].concat()).unwrap();
            }),
        ),
        (
            "the end torn off",
            "truncated",
            Box::new(|| fs::write(last, &good[last][..good[last].len() - 9]).unwrap()),
        ),
        ("the last file removed", "truncated", Box::new(|| fs::remove_file(last).unwrap())),
        ("the first file removed", "truncated", Box::new(|| fs::remove_file(first).unwrap())),
        (
            "all files removed",
            "truncated",
            Box::new(|| paths.iter().for_each(|path| fs::remove_file(path).unwrap())),
        ),
        (
            "two files swapped",
            "tampered",
            Box::new(|| {
                fs::write(first, &good[&paths[1]]).unwrap();
                fs::write(&paths[1], &good[first]).unwrap();
            }),
        ),
    ];
    let template = world.path().join("template");
    copy_dir(&world.store_dir(), &template);
    for (what, expected, change) in &changes {
        copy_dir(&template, &world.store_dir());
        change();
        // A fault in the log does not prevent reading the data.
        let store = world.builder().open().unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(texts(&store.logstore(&name("p/l")).unwrap()), ["one"], "{what}");
        let found = store.keys().audit_records().unwrap_err();
        assert_eq!(found.code(), *expected, "{what}: {found}");
        assert_eq!(fault_kinds(&store), [*expected], "{what}");
        // The store and the log continue. The damage is still reported, also after closing and
        // reopening.
        store.keys().rotate_data_key(&name("p/l")).unwrap();
        store.keys().rotate_data_key(&name("p/l")).unwrap();
        store.close().unwrap();
        let store = world.open();
        store.keys().rotate_data_key(&name("p/l")).unwrap();
        let error = store.keys().audit_records().expect_err(what);
        assert!(
            matches!(error.code(), "tampered" | "corrupt" | "truncated" | "rolled_back"),
            "{what}: {error}"
        );
        assert!(!fault_kinds(&store).is_empty(), "{what}");
    }
    copy_dir(&template, &world.store_dir());
    assert_eq!(events(&world.open()).len(), 22);
}

#[test]
fn a_checkpoint_finds_an_older_log_and_catalogue() {
    let world = with_history(|_| {});
    let old = world.path().join("old");
    copy_dir(&world.store_dir(), &old);
    let store = world.open();
    store.keys().rotate_data_key(&name("p/l")).unwrap();
    // As a caller reads it back from storage.
    let checkpoint =
        Checkpoint::from_bytes(store.admin().checkpoint().unwrap().to_bytes().to_vec());
    store.close().unwrap();
    copy_dir(&old, &world.store_dir());
    let store = world.open();
    // The old state is consistent in itself.
    assert!(fault_kinds(&store).is_empty());
    let options = VerifyOptions::default().against(checkpoint);
    let report = store.admin().verify(&options, &mut |_| {}).unwrap();
    let kinds: Vec<_> = report.faults.iter().map(|fault| fault.code).collect();
    assert!(kinds.contains(&"truncated") && kinds.contains(&"rolled_back"), "{kinds:?}");
}

#[test]
fn a_record_that_a_crash_tore_was_never_there() {
    let world = World::manual();
    let disk = FailingDisk::default();
    let store = world.builder().disk(Arc::new(disk.clone())).create().unwrap();
    world.service(&store, "p/l");
    // Two reads of the epoch and one read of the audit file succeed; the append fails.
    disk.fail_after(3, Failure::Death);
    store.keys().rotate_data_key(&name("p/l")).unwrap_err();
    drop(store);
    assert!(!fs::read(&audit_files(&world)[0]).unwrap().ends_with(b"\n"), "it was torn");
    let store = world.open();
    assert_eq!(events(&store), [StoreCreated, Created]);
    assert!(fault_kinds(&store).is_empty());
    store.keys().rotate_data_key(&name("p/l")).unwrap();
    assert_eq!(events(&store), [StoreCreated, Created, RotateIntended, Rotated]);
}

// ---- it does not block ----

#[test]
fn a_failing_audit_disk_does_not_affect_a_revocation() {
    let world = World::manual();
    let disk = FailingDisk::default();
    let store = world.builder().disk(Arc::new(disk.clone())).create().unwrap();
    let cmk = world.cmk();
    let logstores = [world.byok(&store, "p/a", &cmk), world.byok(&store, "p/b", &cmk)];
    for logstore in &logstores {
        put(logstore, "synced");
        logstore.append(record("buffered"), &buffered()).unwrap();
    }
    let before = events(&store).len();
    disk.break_paths(Some("/audit/"));
    world.local().disable(&cmk.cmk_key_id).unwrap();
    assert_revoked(logstores[0].revalidate_now(), RevokedReason::Disabled);
    for logstore in &logstores {
        assert_revoked(try_put(logstore, "refused"), RevokedReason::Disabled);
        assert_revoked(try_texts(logstore), RevokedReason::Disabled);
    }
    // It does not prevent recovery either. The acknowledged data was sealed before the wipe.
    world.local().enable(&cmk.cmk_key_id).unwrap();
    logstores[0].revalidate_now().unwrap();
    for logstore in &logstores {
        assert_eq!(texts(logstore), ["synced", "buffered"]);
        put(logstore, "after");
    }
    disk.break_paths(None);
    assert_eq!(events(&store).len(), before);
    // When the disk works again, the log continues where it stopped.
    world.local().disable(&cmk.cmk_key_id).unwrap();
    logstores[0].revalidate_now().unwrap_err();
    assert_eq!(events(&store)[before..], [Revoked, Revoked]);
    store.close().unwrap();
    world.local().enable(&cmk.cmk_key_id).unwrap();
    let store = world.open();
    for text in ["p/a", "p/b"] {
        assert_eq!(texts(&store.logstore(&name(text)).unwrap()), ["synced", "buffered", "after"]);
    }
    assert!(fault_kinds(&store).is_empty());
}

/// All Logstores under the master key are wiped before the first record is written, so a hanging
/// write delays none of them.
#[test]
fn a_hanging_audit_disk_holds_up_no_logstore() {
    let world = World::threads();
    let disk = HangingDisk::of(".log");
    let store = world.builder().disk(Arc::new(disk.clone())).create().unwrap();
    let cmk = world.cmk();
    let logstores: Vec<Logstore> =
        (0..5).map(|n| world.byok(&store, &format!("p/l{n}"), &cmk)).collect();
    logstores.iter().for_each(|logstore| put(logstore, "one"));
    let sealed = |logstore: &Logstore| {
        let path = &segments(&world.logstore_dir(logstore), 0)[0];
        fs::read(path).unwrap().ends_with(b"SEAL")
    };
    assert!(!logstores.iter().any(sealed));
    disk.hang(true);
    world.local().disable(&cmk.cmk_key_id).unwrap();
    thread::scope(|scope| {
        let asking = scope.spawn(|| logstores[0].revalidate_now());
        eventually("the audit log hangs", || disk.hanging() > 0);
        // All are sealed although no record could be written: sealing happens right before the
        // wipe.
        assert!(logstores.iter().all(sealed));
        for logstore in &logstores {
            assert_revoked(try_put(logstore, "refused"), RevokedReason::Disabled);
            assert_revoked(try_texts(logstore), RevokedReason::Disabled);
        }
        disk.hang(false);
        assert_revoked(asking.join().unwrap(), RevokedReason::Disabled);
    });
    eventually("all is on record", || {
        events(&store).iter().filter(|event| **event == Revoked).count() == 5
    });
    store.close().unwrap();
}

// ---- files that do not belong to the log ----

/// The notes of a verification of the whole store, which must find no fault.
fn notes(store: &Store) -> Vec<String> {
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    report.notes
}

/// A stray in the log's directory: its name, a function that creates it, and whether a verification
/// mentions it.
type Planted<'a> = (&'static str, Box<dyn Fn(&std::path::Path) + 'a>, bool);

#[test]
fn what_is_no_part_of_the_log_is_passed_over_and_stays_as_it_is() {
    for file_bytes in [4096, 4 << 20] {
        let world = with_history(|world| world.options.audit_file_bytes = file_bytes);
        let paths = audit_files(&world);
        let next = format!("audit-{:06}.log", paths.len() + 1);
        let next = &*next.leak();
        let (first, last) =
            (fs::read(&paths[0]).unwrap(), fs::read(paths.last().unwrap()).unwrap());
        let write = |bytes: Vec<u8>| move |path: &std::path::Path| fs::write(path, &bytes).unwrap();
        let sparse = |len: u64| {
            move |path: &std::path::Path| fs::File::create(path).unwrap().set_len(len).unwrap()
        };
        let garbage: Vec<u8> =
            (0..3000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let cut = first[..first.len().min(40)].to_vec();
        let damaged = [&b"x"[..], &first].concat();
        let planted: Vec<Planted<'_>> = vec![
            ("audit-7.log", Box::new(write(Vec::new())), false),
            ("audit-1.log", Box::new(write(first.clone())), false),
            ("audit-+2.log", Box::new(write(last.clone())), false),
            ("audit-0000001.log", Box::new(write(first.clone())), false),
            ("audit-000000.log", Box::new(write(first.clone())), false),
            ("audit-4294967296.log", Box::new(write(last.clone())), false),
            ("audit-000002.log.bak", Box::new(write(last.clone())), false),
            (next, Box::new(write(garbage)), true),
            (next, Box::new(write(vec![0; 5000])), true),
            (next, Box::new(write(b"\n".to_vec())), true),
            (next, Box::new(write(b"{}\n".to_vec())), true),
            (next, Box::new(write(cut)), true),
            (next, Box::new(write(damaged)), true),
            (next, Box::new(write(vec![b'{'; 70_000])), true),
            (next, Box::new(sparse(1126 << 20)), true),
            (next, Box::new(sparse(60 << 20)), true),
            (next, Box::new(|path: &std::path::Path| fs::create_dir(path).unwrap()), true),
            (
                next,
                Box::new(|path: &std::path::Path| {
                    std::os::unix::fs::symlink("/nonexistent", path).unwrap()
                }),
                true,
            ),
            (
                next,
                Box::new(|path: &std::path::Path| {
                    std::os::unix::fs::symlink("audit-000001.log", path).unwrap()
                }),
                true,
            ),
            (
                next,
                Box::new(|path: &std::path::Path| {
                    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
                }),
                true,
            ),
            // A hard link to a file of the log.
            (
                next,
                Box::new(|path: &std::path::Path| {
                    fs::hard_link(path.with_file_name("audit-000001.log"), path).unwrap();
                }),
                true,
            ),
            (next, Box::new(write(first.clone())), true),
            (next, Box::new(write(last.clone())), true),
            (next, Box::new(write(Vec::new())), false),
            ("audit-999999999.log", Box::new(write(b"garbage\n".to_vec())), true),
            ("audit-999999999.log", Box::new(write(first.clone())), true),
            ("audit-4294967295.log", Box::new(write(b"garbage\n".to_vec())), true),
            ("audit-4294967295.log", Box::new(write(last.clone())), true),
            ("audit-4294967295.log", Box::new(write(Vec::new())), false),
        ];
        let template = world.path().join("template");
        copy_dir(&world.store_dir(), &template);
        for (index, (file, plant, is_noted)) in planted.iter().enumerate() {
            let what = format!("{index}: {file}, files of {file_bytes} bytes");
            copy_dir(&template, &world.store_dir());
            let path = audit_dir(&world).join(file);
            plant(&path);
            let content = || {
                let metadata = fs::symlink_metadata(&path).unwrap();
                let bytes = (metadata.is_file() && metadata.len() < 1 << 20)
                    .then(|| fs::read(&path).unwrap());
                (metadata.len(), bytes)
            };
            let before = content();
            let store = world.builder().open().unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(
                store
                    .keys()
                    .audit_records()
                    .unwrap_or_else(|error| panic!("{what}: {error}"))
                    .len(),
                22,
                "{what}"
            );
            assert_eq!(notes(&store).iter().any(|note| note.contains(file)), *is_noted, "{what}");
            // The log continues over several files and a reopening, and does not write to the
            // strays.
            for _ in 0..12 {
                store.keys().rotate_data_key(&name("p/l")).unwrap();
            }
            store.close().unwrap();
            let store = world.open();
            store.keys().rotate_data_key(&name("p/l")).unwrap();
            let found =
                store.keys().audit_records().unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(found.len(), 22 + 26, "{what}");
            if before.0 > 0 {
                assert!(content() == before, "{what} was changed");
            }
            assert_eq!(notes(&store).iter().any(|note| note.contains(file)), *is_noted, "{what}");
            store.close().unwrap();
            // It also continues after the stray is removed. The file numbers then have a gap, but
            // the record numbers do not.
            if *is_noted {
                fs::remove_file(&path).or_else(|_| fs::remove_dir(&path)).unwrap();
                let store = world.open();
                store.keys().rotate_data_key(&name("p/l")).unwrap();
                assert_eq!(store.keys().audit_records().unwrap().len(), 22 + 28, "{what}");
                assert!(notes(&store).is_empty(), "{what}");
            }
        }
    }
}

#[test]
fn a_log_whose_last_name_is_taken_goes_on_all_the_same() {
    let world = with_history(|world| world.options.audit_file_bytes = 4096);
    let last = audit_files(&world).pop().unwrap();
    fs::rename(&last, audit_dir(&world).join("audit-4294967295.log")).unwrap();
    let store = world.open();
    assert_eq!(events(&store).len(), 22, "the records are as they were written");
    for _ in 0..24 {
        store.keys().rotate_data_key(&name("p/l")).unwrap();
    }
    store.close().unwrap();
    let store = world.open();
    store.keys().rotate_data_key(&name("p/l")).unwrap();
    // A renamed file is detected once no file number follows its own.
    assert_eq!(fault_kinds(&store), ["tampered"]);
}

#[test]
fn missing_records_are_blamed_on_a_skipped_file() {
    let world = with_history(|world| world.options.audit_file_bytes = 2 * 4096);
    let store = world.open();
    for _ in 0..60 {
        store.keys().rotate_data_key(&name("p/l")).unwrap();
    }
    store.close().unwrap();
    let paths = audit_files(&world);
    assert!(paths.len() > 3, "{paths:?}");
    let template = world.path().join("template");
    copy_dir(&world.store_dir(), &template);
    for path in [&paths[0], &paths[1], paths.last().unwrap()] {
        for garbage in [&b"garbage\n"[..], &[0; 9000], b"\xff"] {
            copy_dir(&template, &world.store_dir());
            fs::write(path, garbage).unwrap();
            for _ in 0..2 {
                let store = world.open();
                let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
                let faults: Vec<_> =
                    report.faults.iter().map(|it| (it.code, it.file.as_ref().unwrap())).collect();
                assert_eq!(faults, [("corrupt", path)], "{:?}", report.faults);
                store.keys().rotate_data_key(&name("p/l")).unwrap();
                store.close().unwrap();
                assert_eq!(fs::read(path).unwrap(), garbage);
            }
        }
        // A removed file is reported as missing and not as damage.
        copy_dir(&template, &world.store_dir());
        fs::remove_file(path).unwrap();
        assert_eq!(fault_kinds(&world.open()), ["truncated"], "{path:?}");
    }
}

/// If the log continued elsewhere after a disk error, there would be two logs.
#[test]
fn an_error_of_the_disk_keeps_the_store_shut() {
    let world = with_history(|_| {});
    let disk = FailingDisk::default();
    disk.break_paths(Some("/audit/"));
    let opened = world.builder().disk(Arc::new(disk.clone())).open().map(drop);
    assert!(matches!(opened, Err(Error::Io { .. })), "{opened:?}");
    disk.break_paths(None);
    assert_eq!(audit_files(&world).len(), 1);
    assert_eq!(events(&world.open()).len(), 22);
}

#[test]
fn a_file_of_it_has_a_largest_size() {
    let mut world = World::manual();
    for (bytes, taken) in
        [(4095, false), (4096, true), (64 << 20, true), ((64 << 20) + 1, false), (u64::MAX, false)]
    {
        world.options.audit_file_bytes = bytes;
        let made = world.builder().create().map(|store| store.close().unwrap());
        assert_eq!(
            made.is_ok() || matches!(made, Err(Error::StoreExists { .. })),
            taken,
            "{bytes}: {made:?}"
        );
    }
}

// ---- a key that is switched on and off ----

/// The number of omitted transitions that a record counts before its own.
fn left_out(record: &AuditRecord) -> u64 {
    let Some((_, count)) = record.detail.rsplit_once("; ") else { return 0 };
    count.split(' ').next().unwrap().parse().unwrap()
}

#[test]
fn a_key_that_is_toggled_leaves_few_records_and_their_number() {
    let world = World::manual();
    let (toggled, other) = (world.cmk(), world.cmk());
    let store = world.create();
    let toggling = [world.byok(&store, "p/a", &toggled), world.byok(&store, "p/b", &toggled)];
    let quiet = world.byok(&store, "p/c", &other);
    let logstores = [&toggling[0], &toggling[1], &quiet];
    logstores.iter().for_each(|logstore| put(logstore, "one"));
    let begin = events(&store).len();
    let bytes = || files(&audit_dir(&world)).values().map(Vec::len).sum::<usize>();
    let size = bytes();
    let toggle = || {
        world.local().disable(&toggled.cmk_key_id).unwrap();
        // The hourly limit does not delay the revocation itself.
        assert_revoked(toggling[0].revalidate_now(), RevokedReason::Disabled);
        for logstore in &toggling {
            assert_revoked(try_put(logstore, "refused"), RevokedReason::Disabled);
        }
        world.local().enable(&toggled.cmk_key_id).unwrap();
        toggling[0].revalidate_now().unwrap();
        toggling.iter().for_each(|logstore| put(logstore, "more"));
    };
    for n in 0..1000 {
        toggle();
        world.clock.advance(std::time::Duration::from_millis(3500));
        if n == 500 {
            // The limit of one key does not affect the records of another Logstore.
            world.local().disable(&other.cmk_key_id).unwrap();
            assert_revoked(quiet.revalidate_now(), RevokedReason::Disabled);
        }
    }
    let of = |records: &[AuditRecord], logstore: &Logstore| -> Vec<AuditRecord> {
        records.iter().filter(|record| record.logstore_id == Some(logstore.id())).cloned().collect()
    };
    let records = since(&store, begin);
    for logstore in &toggling {
        assert_eq!(of(&records, logstore).len(), 10);
    }
    assert_eq!(
        of(&records, &quiet).iter().map(|record| record.event).collect::<Vec<_>>(),
        [Revoked]
    );
    assert!(bytes() - size < 21 * 600, "{} bytes", bytes() - size);
    assert_eq!(store.metrics().audit_left_out, 2 * (2000 - 10));
    // The last change is a revocation. Within the hour it is recorded automatically, with the
    // number of omitted transitions.
    world.local().disable(&toggled.cmk_key_id).unwrap();
    assert_revoked(toggling[0].revalidate_now(), RevokedReason::Disabled);
    world.clock.advance(secs(3600));
    store.tick();
    let records = since(&store, begin);
    for logstore in &toggling {
        let records = of(&records, logstore);
        assert_eq!(records.len(), 11);
        let last = records.last().unwrap();
        assert_eq!((last.event, left_out(last)), (Revoked, 2001 - 11));
        assert!(last.detail.starts_with("disabled; "), "{}", last.detail);
        assert_eq!(records.iter().map(|record| 1 + left_out(record)).sum::<u64>(), 2001);
    }
    // The count is not part of the reason: another process that finds the same revocation records
    // nothing.
    store.close().unwrap();
    let store = world.open();
    let count = events(&store).len();
    assert_revoked(
        try_put(&store.logstore(&name("p/a")).unwrap(), "refused"),
        RevokedReason::Disabled,
    );
    assert_eq!(events(&store).len(), count);
    assert!(fault_kinds(&store).is_empty());
}

#[test]
fn the_hour_of_a_toggled_key_is_remembered_by_the_next_process() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    let logstore = world.byok(&store, "p/a", &cmk);
    put(&logstore, "one");
    let begin = events(&store).len();
    let toggle = |logstore: &Logstore| {
        world.local().disable(&cmk.cmk_key_id).unwrap();
        logstore.revalidate_now().unwrap_err();
        world.local().enable(&cmk.cmk_key_id).unwrap();
        logstore.revalidate_now().unwrap();
    };
    for _ in 0..8 {
        toggle(&logstore);
    }
    assert_eq!(events(&store).len(), begin + 10);
    store.close().unwrap();
    let store = world.open();
    let last = since(&store, begin).pop().unwrap();
    assert_eq!((last.event, left_out(&last), events(&store).len()), (Recovered, 0, begin + 10));
    // Another process counts the log's records of this hour, and further processes add no record.
    let mut store = store;
    for _ in 0..20 {
        let logstore = store.logstore(&name("p/a")).unwrap();
        put(&logstore, "more");
        toggle(&logstore);
        store.close().unwrap();
        store = world.open();
    }
    assert_eq!(events(&store).len(), begin + 10);
    // A deliberate operation on the key is recorded after the count of omitted transitions.
    let logstore = store.logstore(&name("p/a")).unwrap();
    toggle(&logstore);
    store.keys().rotate_data_key(logstore.name()).unwrap();
    let last = since(&store, begin + 10);
    assert_eq!(
        last.iter().map(|it| it.event).collect::<Vec<_>>(),
        [Recovered, RotateIntended, Rotated]
    );
    assert_eq!(left_out(&last[0]), 1);
    // After an hour, transitions are recorded normally again.
    world.clock.advance(secs(3600));
    logstore.revalidate_now().unwrap();
    toggle(&logstore);
    let last = since(&store, begin + 13);
    assert_eq!(
        last.iter().map(|it| (it.event, left_out(it))).collect::<Vec<_>>(),
        [(Revoked, 0), (Recovered, 0)]
    );
    assert!(fault_kinds(&store).is_empty());
}

// ---- over several processes ----

#[test]
fn a_loss_is_recorded_once_and_its_end_also_by_another_process() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    for text in ["p/a", "p/b"] {
        put(&world.byok(&store, text, &cmk), "one");
    }
    let begin = events(&store).len();
    store.close().unwrap();
    // Three processes find the key revoked. The second one opens only one Logstore.
    world.local().disable(&cmk.cmk_key_id).unwrap();
    for opened in [&["p/a", "p/b"][..], &["p/b"], &["p/a", "p/b"]] {
        let store = world.open();
        for text in opened {
            assert!(try_put(&store.logstore(&name(text)).unwrap(), "refused").is_err());
        }
        store.close().unwrap();
    }
    let store = world.open();
    assert_eq!(events(&store)[begin..], [Revoked, Revoked]);
    store.close().unwrap();
    // A different reason is recorded, and so is an outage.
    world.local().enable(&cmk.cmk_key_id).unwrap();
    world.local().schedule_deletion(&cmk.cmk_key_id, 7).unwrap();
    for _ in 0..2 {
        let store = world.open();
        assert!(try_put(&store.logstore(&name("p/a")).unwrap(), "refused").is_err());
        store.close().unwrap();
    }
    let store = world.open();
    let records = since(&store, begin + 2);
    assert_eq!(
        records.iter().map(|it| (it.event, &*it.detail)).collect::<Vec<_>>(),
        [(Revoked, "pending deletion")]
    );
    store.close().unwrap();
    world.local().cancel_deletion(&cmk.cmk_key_id).unwrap();
    // A process that never saw the revocation records that the key is back. The Logstore that it
    // opens later does so too.
    for _ in 0..2 {
        let store = world.open();
        put(&store.logstore(&name("p/a")).unwrap(), "two");
        store.tick();
        put(&store.logstore(&name("p/b")).unwrap(), "two");
        store.close().unwrap();
    }
    let store = world.open();
    let records = since(&store, begin + 3);
    let told: Vec<_> =
        records.iter().map(|it| (it.event, it.logstore.clone().unwrap().to_string())).collect();
    assert_eq!(told, [(Recovered, "p/a".to_owned()), (Recovered, "p/b".to_owned())]);
    // A later revocation is recorded again.
    world.local().disable(&cmk.cmk_key_id).unwrap();
    let logstore = store.logstore(&name("p/a")).unwrap();
    assert!(logstore.revalidate_now().is_err());
    assert_eq!(events(&store).last(), Some(&Revoked));
}

#[test]
fn an_outage_that_goes_on_is_one_loss() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    put(&world.byok(&store, "p/a", &cmk), "one");
    let begin = events(&store).len();
    store.close().unwrap();
    for answer in
        [Answer::Unreachable, Answer::Unreachable, Answer::Invalid, Answer::Real, Answer::Real]
    {
        world.kms.answer(answer);
        let store = world.open();
        let put = try_put(&store.logstore(&name("p/a")).unwrap(), "more");
        assert_eq!(put.is_ok(), answer == Answer::Real);
        store.close().unwrap();
    }
    let store = world.open();
    assert_eq!(events(&store)[begin..], [LeaseEnded, LeaseEnded, Recovered]);
    let records = since(&store, begin);
    let kinds: Vec<_> =
        records[..2].iter().map(|record| record.detail.split(':').next().unwrap()).collect();
    assert_eq!(kinds, ["unreachable", "invalid"]);
}

// ---- verification by a third party ----

/// Verifies an export without any key, using only the description in `docs/format.md`. Returns the
/// hash of each record.
fn checked_by_a_third_party(text: &str) -> Vec<String> {
    use sha2::{Digest, Sha256};
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut lines: Vec<&str> = text.lines().collect();
    let last: serde_json::Value = serde_json::from_str(lines.pop().unwrap()).unwrap();
    let mut hashes: Vec<String> = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        assert_eq!(value["record"]["number"], index as u64 + 1);
        let (record, _) =
            line.strip_prefix("{\"record\":").unwrap().rsplit_once(",\"tag\":").unwrap();
        let before = hashes.last().cloned().unwrap_or_default();
        let hash =
            hex(&Sha256::digest(format!("{before}{record}\t{}", value["tag"].as_str().unwrap())));
        assert_eq!(value["hash"], *hash, "record {}", index + 1);
        hashes.push(hash);
    }
    assert_eq!(last["head"]["number"], hashes.len() as u64);
    assert_eq!(last["head"]["hash"], *hashes.last().unwrap().as_str());
    hashes
}

#[test]
fn an_export_is_verified_without_a_key() {
    let mut world = World::manual();
    world.options.audit_file_bytes = 4 << 10;
    let store = world.create();
    let logstore = world.service(&store, "p/a");
    put(&logstore, "one");
    for _ in 0..20 {
        store.keys().rotate_data_key(logstore.name()).unwrap();
    }
    let first = store.keys().export_audit().unwrap();
    let hashes = checked_by_a_third_party(&first.text);
    assert_eq!((first.head.number, &first.head.hash), (42, hashes.last().unwrap()));
    assert_eq!(AuditMark::of_export(&first.text).unwrap(), first.head);
    assert!(
        AuditMark::of_export(first.text.lines().next().unwrap()).is_err(),
        "the end is missing"
    );
    store.keys().rotate_service_key().unwrap();
    let second = store.keys().export_audit().unwrap();
    assert_eq!(checked_by_a_third_party(&second.text)[..hashes.len()], hashes);
    for mark in [None, Some(&first.head), Some(&second.head)] {
        let found = store.keys().verify_audit(mark).unwrap();
        assert!(found.fault.is_none() && found.head == second.head, "{found:?}");
    }
    // An older state of the log, and a diverging one.
    let (earlier, keyring) = (world.path().join("earlier"), fs::read(world.keyring()).unwrap());
    store.close().unwrap();
    copy_dir(&world.store_dir(), &earlier);
    let store = world.open();
    store.keys().rotate_data_key(&name("p/a")).unwrap();
    let third = store.keys().export_audit().unwrap();
    store.close().unwrap();
    copy_dir(&earlier, &world.store_dir());
    fs::write(world.keyring(), keyring).unwrap();
    let store = world.open();
    assert!(store.keys().verify_audit(None).unwrap().fault.is_none(), "in itself it is sound");
    let gone = store.keys().verify_audit(Some(&third.head)).unwrap().fault;
    assert!(matches!(gone, Some(Error::RolledBack { .. })), "{gone:?}");
    world.clock.advance(secs(1));
    store.keys().rotate_data_key(&name("p/a")).unwrap();
    let other = store.keys().verify_audit(Some(&third.head)).unwrap().fault;
    assert!(matches!(other, Some(Error::RolledBack { .. })), "{other:?}");
}

#[test]
fn verification_says_up_to_which_record_the_log_is_sound() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/a");
    store.keys().rotate_data_key(logstore.name()).unwrap();
    store.close().unwrap();
    let file = audit_files(&world).remove(0);
    let good = fs::read_to_string(&file).unwrap();
    let lines: Vec<&str> = good.split_inclusive('\n').collect();
    assert_eq!(lines.len(), 4);
    // Record 3 with a changed detail and a matching CRC.
    let (body, _) = lines[2].trim_end().rsplit_once('\t').unwrap();
    let body = body.replace("rotate_intended", "rotated");
    let forged = format!("{body}\t{:08x}\n", crc32fast::hash(body.as_bytes()));
    fs::write(&file, [lines[0], lines[1], &forged, lines[3]].concat()).unwrap();
    let store = world.builder().open_read_only().unwrap();
    let found = store.keys().verify_audit(None).unwrap();
    assert_eq!(found.head.number, 2);
    assert!(matches!(found.fault, Some(Error::Tampered { .. })), "{found:?}");
    assert!(matches!(store.keys().export_audit(), Err(Error::Tampered { .. })));
    fs::write(&file, [lines[0], lines[1], lines[2]].concat()).unwrap();
    let found = store.keys().verify_audit(None).unwrap();
    assert_eq!(found.head.number, 3);
    assert!(matches!(found.fault, Some(Error::Truncated { .. })), "{found:?}");
}
