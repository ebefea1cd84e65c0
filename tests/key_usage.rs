//! Key usage reports; data keys destroyed with their last segment; re-wrapping the keys of many
//! Logstores.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    sync::{Arc, atomic::Ordering},
};

use common::{failing::FailingDisk, *};
use envelog::{
    Cmk, Error, Logstore, LogstoreConfig, LogstoreSpec, ReadOptions, RotateDataKey, Store,
    admin::{
        DataKeyUsage, KeyNeed, KeyUsage, MasterKeyUsage, ReplaceCmk, RewrapOptions, RewrapReport,
        VerifyOptions,
    },
    audit::AuditEvent,
    error::ConfigError,
    kms::RevokedReason,
};

fn data_key<'a>(usage: &'a KeyUsage, text: &str, version: u32) -> &'a DataKeyUsage {
    usage
        .data_keys
        .iter()
        .find(|key| key.logstore == name(text) && key.status.version == version)
        .unwrap()
}

fn master_key<'a>(usage: &'a KeyUsage, cmk: &Cmk) -> &'a MasterKeyUsage {
    usage.master_keys.iter().find(|key| key.cmk == *cmk).unwrap()
}

/// The data-key versions that the report marks as safe to destroy and that still exist.
fn safe(store: &Store, text: &str) -> Vec<u32> {
    let usage = store.keys().usage().unwrap();
    let of_logstore = usage.data_keys.iter().filter(|key| key.logstore == name(text));
    of_logstore
        .filter(|key| key.safe_to_destroy && !key.status.shredded)
        .map(|key| key.status.version)
        .collect()
}

/// Drops all sealed data by retention. The open segment is kept.
fn drop_sealed(store: &Store, logstore: &Logstore) -> envelog::admin::RetentionReport {
    let config = logstore.config().retention_bytes(1);
    store.update_logstore(logstore.name(), config).unwrap();
    let report = store.admin().apply_retention().unwrap();
    let config = logstore.config().retention_bytes(None);
    store.update_logstore(logstore.name(), config).unwrap();
    report
}

fn shredded(logstore: &Logstore) -> Vec<u32> {
    logstore
        .status()
        .unwrap()
        .data_keys
        .iter()
        .filter(|key| key.shredded)
        .map(|key| key.version)
        .collect()
}

fn events(store: &Store, event: AuditEvent) -> Vec<String> {
    let records = store.keys().audit_records().unwrap();
    records.into_iter().filter(|record| record.event == event).map(|record| record.detail).collect()
}

#[test]
fn a_key_is_needed_for_as_long_as_anything_is_under_it() {
    let world = World::manual();
    let (cmk, other) = (world.cmk(), world.cmk());
    let store = world.create();
    let logstore = world.byok(&store, "p/byok", &cmk);
    let service = world.service(&store, "p/service");
    let plain = store.create_logstore(&name("p/plain"), LogstoreSpec::default()).unwrap();
    for logstore in [&logstore, &service, &plain] {
        put(logstore, "first");
    }
    let usage = store.keys().usage().unwrap();
    let first = data_key(&usage, "p/byok", 1);
    assert_eq!(
        first.needed_for,
        [
            KeyNeed::Current,
            KeyNeed::MetadataTag,
            KeyNeed::Segments { segments: 1, bytes: first.status.bytes_stored },
            KeyNeed::Writing { segments: 1 },
        ]
    );
    assert!(first.status.bytes_stored > 0 && !first.safe_to_destroy);
    assert_eq!(first.status.cmk_version.as_deref(), Some("1"));
    let master = master_key(&usage, &cmk);
    assert_eq!(
        (master.logstores.as_slice(), master.segments, master.bytes),
        (&[name("p/byok")][..], 1, first.status.bytes_stored)
    );
    assert!(
        !master.safe_to_destroy && master.versions[0].probe && master.versions[0].envelopes == 1
    );
    assert!(usage.service_keys.iter().all(|key| !key.safe_to_destroy));

    // An older version is needed until its segments are gone. A version that was never used is not
    // needed.
    for logstore in [&logstore, &service] {
        store.keys().rotate_data_key(logstore.name()).unwrap();
        store.keys().rotate_data_key(logstore.name()).unwrap();
        assert_eq!(safe(&store, &logstore.name().to_string()), [2]);
        put(logstore, "second");
        assert_eq!(safe(&store, &logstore.name().to_string()), [2]);
    }

    // A service key is needed for everything it has wrapped, tagged and authenticated. A rotation
    // removes most of these needs, but not all.
    store.keys().rotate_service_key().unwrap();
    let usage = store.keys().usage().unwrap();
    let old = &usage.service_keys[0];
    assert_eq!((old.version, old.current, old.safe_to_destroy), (1, false, false));
    assert!(
        old.needed_for.iter().any(|need| matches!(need, KeyNeed::AuditRecords { .. })),
        "{old:?}"
    );
    assert!(
        old.needed_for.iter().any(|need| matches!(need, KeyNeed::Segments { segments: 1, .. })),
        "{old:?}"
    );
    assert!(
        !old.needed_for.iter().any(|need| matches!(need, KeyNeed::Envelopes { .. })),
        "{old:?}"
    );
    let new = &usage.service_keys[1];
    assert!(
        new.current
            && new
                .needed_for
                .iter()
                .any(|need| matches!(need, KeyNeed::Envelopes { envelopes: 4 }))
    );

    // A replaced master key is no longer needed.
    store.keys().replace_cmk(logstore.name(), other.clone(), ReplaceCmk::default()).unwrap();
    let usage = store.keys().usage().unwrap();
    assert!(master_key(&usage, &cmk).safe_to_destroy, "{:?}", master_key(&usage, &cmk));
    assert!(!master_key(&usage, &other).safe_to_destroy);
    world.local().delete(&cmk.cmk_key_id).unwrap();
    assert_eq!(texts(&logstore), ["first", "second"]);
    store.delete_logstore(logstore.name()).unwrap();
    assert!(master_key(&store.keys().usage().unwrap(), &other).safe_to_destroy);
}

/// Reports need no key, also in another process next to the writer.
#[test]
fn usage_is_told_while_the_key_is_revoked_and_beside_the_writer() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    let logstore = world.byok(&store, "p/byok", &cmk);
    put(&logstore, "first");
    store.keys().rotate_data_key(logstore.name()).unwrap();
    world.local().disable(&cmk.cmk_key_id).unwrap();
    assert!(logstore.revalidate_now().is_err());
    let calls = world.kms.calls();
    let reader = world.builder().open_read_only().unwrap();
    for store in [&store, &reader] {
        let usage = store.keys().usage().unwrap();
        let first = data_key(&usage, "p/byok", 1);
        assert_eq!((first.status.segments, first.safe_to_destroy), (1, false));
        assert!(!master_key(&usage, &cmk).safe_to_destroy);
    }
    assert_eq!(world.kms.calls(), calls);
}

#[test]
fn what_cannot_be_looked_at_counts_as_needed() {
    let world = World::manual();
    let (cmk, other) = (world.cmk(), world.cmk());
    let store = world.create();
    let logstore = world.byok(&store, "p/byok", &cmk);
    put(&logstore, "first");
    store.keys().rotate_data_key(logstore.name()).unwrap();
    store.keys().rotate_data_key(logstore.name()).unwrap();
    put(&logstore, "second");
    store.keys().replace_cmk(logstore.name(), other, ReplaceCmk::default()).unwrap();
    assert!(
        safe(&store, "p/byok").contains(&2)
            && master_key(&store.keys().usage().unwrap(), &cmk).safe_to_destroy
    );
    let dir = world.logstore_dir(&logstore);
    store.close().unwrap();
    let segment = segments(&dir, 0).remove(0);
    let mut bytes = fs::read(&segment).unwrap();
    bytes[130] ^= 1;
    fs::write(&segment, bytes).unwrap();
    let store = world.open();
    let usage = store.keys().usage().unwrap();
    assert!(safe(&store, "p/byok").is_empty());
    assert!(usage.master_keys.iter().all(|key| !key.safe_to_destroy), "{:?}", usage.master_keys);
    assert!(
        data_key(&usage, "p/byok", 2)
            .needed_for
            .iter()
            .any(|need| matches!(need, KeyNeed::Unknown { .. }))
    );
    // A directory that is in no catalogue may need any master key.
    drop(store);
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    let logstore = world.byok(&store, "p/gone", &cmk);
    put(&logstore, "first");
    let (from, to) = (world.logstore_dir(&logstore), world.path().join("kept"));
    logstore.roll().unwrap();
    copy_dir(&from, &to);
    store.delete_logstore(&name("p/gone")).unwrap();
    assert!(master_key(&store.keys().usage().unwrap(), &cmk).safe_to_destroy);
    copy_dir(&to, &from);
    assert!(!master_key(&store.keys().usage().unwrap(), &cmk).safe_to_destroy);
}

/// A file that is no segment of the shard may be one that was moved there, or put back.
#[test]
fn a_strange_file_counts_as_a_use_of_the_keys_of_its_logstore() {
    let world = World::manual();
    let store = world.create();
    let (logstore, other) = (world.service(&store, "p/a"), world.service(&store, "p/b"));
    for logstore in [&logstore, &other] {
        put(logstore, "first");
        store.keys().rotate_data_key(logstore.name()).unwrap();
        store.keys().rotate_data_key(logstore.name()).unwrap();
        put(logstore, "second");
    }
    assert_eq!(safe(&store, "p/a"), [2]);
    let real = segments(&world.logstore_dir(&logstore), 0).remove(0);
    let strange = real.with_file_name("0000000009-00000000000000000900-0000000001.seg");
    fs::copy(&real, &strange).unwrap();
    assert_eq!((safe(&store, "p/a"), safe(&store, "p/b")), (vec![], vec![2]));
    let usage = store.keys().usage().unwrap();
    let is_named = |need: &KeyNeed| match need {
        KeyNeed::Unknown { detail } => detail.contains("0000000009"),
        _ => false,
    };
    assert!(data_key(&usage, "p/a", 2).needed_for.iter().any(is_named), "{usage:?}");
    fs::remove_file(strange).unwrap();
    assert_eq!(safe(&store, "p/a"), [2]);
}

#[test]
fn retention_takes_the_data_key_with_the_last_of_what_it_sealed() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    for logstore in [world.service(&store, "p/service"), world.byok(&store, "p/byok", &cmk)] {
        put(&logstore, "first");
        store.keys().rotate_data_key(logstore.name()).unwrap();
        put(&logstore, "second");
        store.keys().rotate_data_key(logstore.name()).unwrap();
        put(&logstore, "third");
        let report = drop_sealed(&store, &logstore);
        assert_eq!((report.segments, report.data_keys, report.data_keys_postponed), (2, 2, 0));
        assert_eq!(shredded(&logstore), [1, 2]);
        assert_eq!(texts(&logstore), ["third"]);
        put(&logstore, "fourth");
        assert_eq!(texts(&logstore), ["third", "fourth"]);
    }
    let about = events(&store, AuditEvent::Shredded);
    assert_eq!(about.len(), 2);
    assert!(
        about.iter().all(|about| about.contains("version 1, 2") && about.contains("retention")),
        "{about:?}"
    );
    assert_eq!(events(&store, AuditEvent::ShredIntended), about);
    store.close().unwrap();
    let store = world.open();
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean() && report.refused.is_empty(), "{report:?}");
    for text in ["p/service", "p/byok"] {
        assert_eq!(texts(&store.logstore(&name(text)).unwrap()), ["third", "fourth"]);
    }
    // The second tag of the metadata is still valid: without the keyring, the data key
    // authenticates it.
    store.close().unwrap();
    fs::remove_file(world.keyring()).unwrap();
    let (store, report) = world.builder().recover_all().unwrap();
    assert_eq!(report.recovered, [name("p/byok")]);
    assert_eq!(texts(&store.logstore(&name("p/byok")).unwrap()), ["third", "fourth"]);
}

#[test]
fn a_data_key_under_a_revoked_master_key_goes_when_that_is_back() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    let logstore = world.byok(&store, "p/byok", &cmk);
    put(&logstore, "first");
    store.keys().rotate_data_key(logstore.name()).unwrap();
    put(&logstore, "second");
    let config = logstore.config().retention_bytes(1);
    store.update_logstore(logstore.name(), config).unwrap();
    for answer in [Answer::Revoked(RevokedReason::Disabled), Answer::Unreachable] {
        world.kms.answer(answer);
        world.clock.advance(secs(600));
        let report = store.admin().apply_retention().unwrap();
        assert_eq!((report.data_keys, report.data_keys_postponed), (0, 1), "{answer:?}");
        assert!(shredded(&logstore).is_empty());
    }
    assert_eq!(events(&store, AuditEvent::ShredIntended).len(), 0, "nothing was begun");
    world.kms.answer(Answer::Real);
    world.clock.advance(secs(60));
    let report = store.admin().apply_retention().unwrap();
    assert_eq!((report.segments, report.data_keys, report.data_keys_postponed), (0, 1, 0));
    assert_eq!(shredded(&logstore), [1]);
    assert_eq!(texts(&logstore), ["second"]);
}

#[test]
fn a_reader_keeps_the_data_key_of_the_segment_that_it_is_in() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/service");
    put(&logstore, "first");
    put(&logstore, "and more");
    store.keys().rotate_data_key(logstore.name()).unwrap();
    put(&logstore, "second");
    let mut reader = logstore.read(0, &ReadOptions::default()).unwrap();
    assert_eq!(&reader.next().unwrap().unwrap().bytes[..], b"first");
    let report = drop_sealed(&store, &logstore);
    assert_eq!((report.segments, report.data_keys), (1, 0));
    let usage = store.keys().usage().unwrap();
    assert_eq!(data_key(&usage, "p/service", 1).needed_for, [KeyNeed::Readers { readers: 1 }]);
    let rest: Vec<_> = so_far(&mut reader).map(Result::unwrap).collect();
    assert_eq!(strings(&rest), ["and more", "second"]);
    // The reader has moved to the next segment and no longer uses the old one.
    assert_eq!(drop_sealed(&store, &logstore).data_keys, 1);
    assert_eq!(texts(&logstore), ["second"]);
}

// ---- re-wrapping ----

fn rewrap(store: &Store, options: &RewrapOptions) -> RewrapReport {
    let mut steps = Vec::new();
    let report = store.keys().rewrap_all(options, &mut |at| steps.push(at.done)).unwrap();
    assert!(
        steps.is_sorted() && *steps.last().unwrap() == store.list().unwrap().len(),
        "{steps:?}"
    );
    report
}

fn names_of(report: &RewrapReport) -> Vec<String> {
    report.rewrapped.iter().map(|(name, _)| name.to_string()).collect()
}

#[test]
fn what_is_under_the_newest_version_already_is_passed_over() {
    let world = World::manual();
    let (cmk, other) = (world.cmk(), world.cmk());
    let store = world.create();
    for (text, cmk) in [("p/a", &cmk), ("p/b", &cmk), ("p/c", &other)] {
        put(&world.byok(&store, text, cmk), "first");
    }
    world.service(&store, "p/d");
    store.create_logstore(&name("p/e"), LogstoreSpec::default()).unwrap();
    let nothing = rewrap(&store, &RewrapOptions::default());
    assert!(nothing.rewrapped.is_empty() && nothing.current.len() == 4, "{nothing:?}");
    world.local().rotate(&cmk.cmk_key_id).unwrap();
    store.keys().rotate_data_key(&name("p/a")).unwrap();
    let master = |store: &Store| {
        let usage = store.keys().usage().unwrap();
        let versions = &master_key(&usage, &cmk).versions;
        versions
            .iter()
            .map(|it| (it.version.clone().unwrap(), it.envelopes, it.probe))
            .collect::<Vec<_>>()
    };
    assert_eq!(master(&store), [("1".to_owned(), 2, true), ("2".to_owned(), 1, false)]);
    let report = rewrap(&store, &RewrapOptions::default().cmk_key_id(cmk.cmk_key_id.clone()));
    assert_eq!(names_of(&report), ["p/a", "p/b"]);
    assert!(report.failed.is_empty() && report.current.is_empty() && report.continues_us.is_none());
    assert_eq!(master(&store), [("2".to_owned(), 3, true)], "the probe as well");
    // From now on, the new probe renews the lease.
    world.clock.advance(secs(60));
    store.logstore(&name("p/a")).unwrap().revalidate_now().unwrap();
    let report = rewrap(&store, &RewrapOptions::default());
    assert!(report.rewrapped.is_empty() && report.current.len() == 4, "{report:?}");
    store.close().unwrap();
    let store = world.open();
    assert_eq!(texts(&store.logstore(&name("p/b")).unwrap()), ["first"]);
    let mut elsewhere = RewrapOptions::default().cmk_key_id(cmk.cmk_key_id.clone());
    elsewhere.region_id = Some("eu-central-1".to_owned());
    let report = rewrap(&store, &elsewhere);
    assert!(report.rewrapped.is_empty() && report.current.is_empty());
}

#[test]
fn a_failure_stops_no_other_and_the_next_run_does_the_rest() {
    let world = World::manual();
    let (cmk, away) = (world.cmk(), world.cmk());
    // This KMS does not report key versions, so only the audit log records the progress.
    world.kms.hides_versions.store(true, Ordering::SeqCst);
    let store = world.create();
    for (text, cmk) in [("p/a", &cmk), ("p/b", &away), ("p/c", &cmk)] {
        put(&world.byok(&store, text, cmk), "first");
    }
    world.kms.answer_for_master_key(&away.cmk_key_id, Answer::Unreachable);
    let report = rewrap(&store, &RewrapOptions::default());
    assert_eq!(names_of(&report), ["p/a", "p/c"]);
    assert_eq!(report.failed.len(), 2, "the probe and the Logstore: {report:?}");
    assert!(
        report.failed.iter().all(|(_, error)| matches!(error, Error::KmsUnreachable { .. })),
        "{report:?}"
    );
    world.kms.answer(Answer::Real);
    store.close().unwrap();
    let store = world.open();
    let began_us = store
        .keys()
        .audit_records()
        .unwrap()
        .iter()
        .find(|it| it.event == AuditEvent::RewrapBegun)
        .unwrap()
        .time_us;
    let report = rewrap(&store, &RewrapOptions::default());
    assert_eq!((names_of(&report), report.continues_us), (vec!["p/b".to_owned()], Some(began_us)));
    assert_eq!(report.current, [name("p/a"), name("p/c")]);
    // That run is complete: the next run starts over with all Logstores.
    let report = rewrap(&store, &RewrapOptions::default());
    assert_eq!((names_of(&report).len(), report.continues_us), (3, None));
    let usage = store.keys().usage().unwrap();
    assert_eq!(master_key(&usage, &cmk).versions[0].version, None);
}

#[test]
fn an_old_run_is_not_continued_and_none_is_where_that_is_asked() {
    let world = World::manual();
    let cmk = world.cmk();
    world.kms.hides_versions.store(true, Ordering::SeqCst);
    let store = world.create();
    for text in ["p/a", "p/b"] {
        world.byok(&store, text, &cmk);
    }
    // The run is interrupted in the middle.
    let mut fails = |at: &envelog::admin::RewrapProgress| {
        if at.done == 1 {
            world.kms.answer(Answer::Unreachable);
        }
    };
    let interrupted = store.keys().rewrap_all(&RewrapOptions::default(), &mut fails).unwrap();
    assert_eq!((interrupted.rewrapped.len(), interrupted.failed.len()), (1, 1));
    world.kms.answer(Answer::Real);
    let mut again = RewrapOptions::default();
    again.restart = true;
    assert_eq!(rewrap(&store, &again).rewrapped.len(), 2);
    world.kms.answer(Answer::Unreachable);
    world.clock.advance(secs(600));
    assert!(!rewrap(&store, &again).failed.is_empty());
    world.kms.answer(Answer::Real);
    world.clock.advance(2 * DAY);
    let report = rewrap(&store, &RewrapOptions::default());
    assert_eq!((report.rewrapped.len(), report.continues_us), (2, None));
}

/// A kill at every step: the store opens and reads, and the next run completes the work.
#[test]
fn a_run_that_is_killed_is_continued() {
    let world = World::manual_in_memory();
    let cmk = world.cmk();
    world.kms.hides_versions.store(true, Ordering::SeqCst);
    let store = world.create();
    for text in ["p/a", "p/b"] {
        put(&world.byok(&store, text, &cmk), "first");
    }
    put(&world.service(&store, "p/c"), "first");
    store.close().unwrap();
    let template = world.path().join("template");
    copy_dir(&world.store_dir(), &template);
    let mut continued = 0;
    for count in 0.. {
        copy_dir(&template, &world.store_dir());
        let disk = FailingDisk::default();
        let store = world.builder().disk(Arc::new(disk.clone())).open().unwrap();
        disk.fail_after(count, common::failing::Failure::Death);
        let outcome = store.keys().rewrap_all(&RewrapOptions::default(), &mut |_| {});
        let ran_through = !disk.has_failed();
        disk.disarm();
        drop(store);
        if ran_through {
            assert!(outcome.unwrap().failed.is_empty());
            break;
        }
        let store = world.open();
        for text in ["p/a", "p/b", "p/c"] {
            assert_eq!(
                texts(&store.logstore(&name(text)).unwrap()),
                ["first"],
                "killed after {count}"
            );
        }
        let report = rewrap(&store, &RewrapOptions::default());
        assert!(report.failed.is_empty(), "killed after {count}: {report:?}");
        assert_eq!(
            report.rewrapped.len() + report.current.len(),
            3,
            "killed after {count}: {report:?}"
        );
        continued += usize::from(report.current.len() > 1);
        let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
        assert!(report.is_clean() && report.refused.is_empty(), "killed after {count}: {report:?}");
        store.close().unwrap();
    }
    assert!(continued > 5, "{continued} runs skipped completed work");
}

// ---- automatic rotation ----

fn policy(max_age_days: Option<u32>, max_bytes: Option<u64>) -> Option<RotateDataKey> {
    Some(RotateDataKey::default().max_age_days(max_age_days).max_bytes(max_bytes))
}

fn set_policy(store: &Store, logstore: &Logstore, rotate_data_key: Option<RotateDataKey>) {
    let config = logstore.config().rotate_data_key(rotate_data_key);
    store.update_logstore(logstore.name(), config).unwrap();
}

fn versions(logstore: &Logstore) -> usize {
    logstore.status().unwrap().data_keys.len()
}

#[test]
fn a_data_key_rotates_when_it_is_old_enough() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    let (byok, service) = (world.byok(&store, "p/byok", &cmk), world.service(&store, "p/service"));
    for logstore in [&byok, &service] {
        put(logstore, "first");
    }
    set_policy(&store, &byok, policy(Some(3), None));
    let json = serde_json::to_value(byok.config()).unwrap();
    assert_eq!(json["rotate_data_key"], serde_json::json!({ "max_age_days": 3 }));
    assert_eq!(LogstoreConfig::from_json(&json.to_string()).unwrap(), byok.config());
    assert!(serde_json::to_value(service.config()).unwrap().get("rotate_data_key").is_none());
    world.clock.advance(3 * DAY - secs(1));
    assert!(store.keys().rotate_due_data_keys().unwrap().is_empty());
    world.clock.advance(secs(1));
    // The background work includes the rotation.
    store.tick();
    assert_eq!((versions(&byok), versions(&service)), (2, 1));
    let about = events(&store, AuditEvent::Rotated);
    assert!(
        about.len() == 1 && about[0].starts_with("2, by policy") && about[0].contains("3 days"),
        "{about:?}"
    );
    put(&byok, "second");
    assert!(store.keys().rotate_due_data_keys().unwrap().is_empty());
    store.close().unwrap();
    let store = world.open();
    assert_eq!(texts(&store.logstore(&name("p/byok")).unwrap()), ["first", "second"]);
    // After a jump of the wall clock, the age is unknown.
    world.clock.jump_wall(10 * DAY);
    assert!(store.keys().rotate_due_data_keys().unwrap().is_empty());
    world.clock.jump_wall_back(10 * DAY);
    world.clock.advance(3 * DAY);
    assert_eq!(store.keys().rotate_due_data_keys().unwrap(), [name("p/byok")]);
}

#[test]
fn a_data_key_rotates_when_it_has_sealed_enough() {
    let mut world = World::manual();
    world.options.segment_bytes = 128 << 10;
    let store = world.create();
    let spec = LogstoreSpec::default().shard_count(2).rotate_data_key(policy(None, Some(1 << 20)));
    let spec = spec.compression(envelog::Compression::None);
    let conf = envelog::EncryptConf::service_key(envelog::EncryptType::Sm4);
    let logstore = store.create_logstore(&name("p/a"), spec.encrypt_conf(conf)).unwrap();
    let piece = "x".repeat(64 << 10);
    for version in 1..4 {
        for n in 0..16 {
            assert!(
                store.keys().rotate_due_data_keys().unwrap().is_empty(),
                "after {n} pieces under version {version}"
            );
            put(&logstore, &piece);
        }
        assert_eq!(
            store.keys().rotate_due_data_keys().unwrap(),
            [name("p/a")],
            "1 MiB and what frames it"
        );
        assert_eq!(versions(&logstore), version + 1);
        assert!(store.keys().rotate_due_data_keys().unwrap().is_empty());
    }
    let about = events(&store, AuditEvent::Rotated);
    assert!(
        about.iter().all(|about| about.contains("by policy") && about.contains("bytes")),
        "{about:?}"
    );
    // Bytes sealed before a restart are included.
    for _ in 0..16 {
        put(&logstore, &piece);
    }
    store.close().unwrap();
    let store = world.open();
    assert_eq!(store.keys().rotate_due_data_keys().unwrap(), [name("p/a")]);
    // A Logstore with encryption switched off seals no data.
    let logstore = store.logstore(&name("p/a")).unwrap();
    let conf =
        logstore.config().encrypt_conf.map(|conf| envelog::EncryptConf { enable: false, ..conf });
    store.update_logstore(&name("p/a"), logstore.config().encrypt_conf(conf)).unwrap();
    for _ in 0..40 {
        put(&logstore, &piece);
    }
    assert!(store.keys().rotate_due_data_keys().unwrap().is_empty());
}

#[test]
fn a_rotation_that_the_kms_refuses_is_retried_later() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    let logstore = world.byok(&store, "p/byok", &cmk);
    put(&logstore, "first");
    set_policy(&store, &logstore, policy(Some(1), None));
    world.clock.advance(DAY);
    for answer in [Answer::Unreachable, Answer::Revoked(RevokedReason::Disabled)] {
        world.kms.answer(answer);
        world.clock.advance(secs(601));
        assert!(store.keys().rotate_due_data_keys().unwrap().is_empty());
        let calls = world.kms.calls();
        world.clock.advance(secs(60));
        assert!(store.keys().rotate_due_data_keys().unwrap().is_empty());
        assert_eq!(world.kms.calls(), calls, "not so soon");
    }
    assert!(
        events(&store, AuditEvent::RotateIntended).is_empty(),
        "no intent that cannot come about"
    );
    world.kms.answer(Answer::Real);
    world.clock.advance(secs(601));
    assert_eq!(store.keys().rotate_due_data_keys().unwrap(), [name("p/byok")]);
    put(&logstore, "second");
    assert_eq!(texts(&logstore), ["first", "second"]);
}

#[test]
fn a_policy_has_its_ranges() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/a");
    for (refused, field) in [
        (policy(Some(0), None), "rotate_data_key.max_age_days"),
        (policy(Some(3651), None), "rotate_data_key.max_age_days"),
        (policy(None, Some((1 << 20) - 1)), "rotate_data_key.max_bytes"),
    ] {
        let out_of_range = |error: Error| {
            assert!(
                matches!(&error, Error::Config(ConfigError::OutOfRange { field: of, .. }) if *of == field),
                "{error}"
            );
        };
        let config = logstore.config().rotate_data_key(refused);
        out_of_range(store.update_logstore(logstore.name(), config).unwrap_err());
        let spec = LogstoreSpec::default().rotate_data_key(refused);
        out_of_range(store.create_logstore(&name("p/new"), spec).unwrap_err());
    }
}
