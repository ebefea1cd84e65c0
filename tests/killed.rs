//! Unsynced state left by a killed process or a failed disk: later work must not depend on it
//! before it is durable.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    io,
    sync::{Arc, Mutex},
};

use common::{
    disk::{Dice, Op, Sim, SimDisk, Survives, Verdict},
    *,
};
use envelog::{
    EncryptConf, EncryptType, Error, Logstore, LogstoreSpec, Payload, Result, Store,
    admin::VerifyOptions, inspect::SegmentHeader,
};

const NAME: &str = "p/l";

fn find(store: &Store) -> Logstore {
    store.logstore(&name(NAME)).unwrap()
}

#[track_caller]
fn assert_clean(store: &Store, context: &str) {
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean(), "{context}: {:?}", report.faults);
}

/// Kills the process at every operation of `operation` in turn. The next process continues with the
/// state on disk. After a power loss, all data that it synced is present, with all of its
/// dependencies.
fn killed_anywhere(prepare: impl Fn(&Sim, &Store), operation: impl Fn(&Sim, &Store) -> Result<()>) {
    let sim = Sim::new();
    let store = sim.create();
    put(&sim.world.service(&store, NAME), "before");
    prepare(&sim, &store);
    store.close().unwrap();
    let (image, mut world) = (sim.disk, sim.world);
    let mut failed = 0;
    for nth in 1.. {
        let mut sim = Sim::of(world, image.fork());
        let store = sim.open();
        put(&find(&store), "there");
        sim.disk.end_at(nth);
        let began = sim.disk.changes();
        let done = operation(&sim, &store);
        let whole = sim.disk.changes() - began < nth;
        // The last operations may only remove older files, which the next opening does too.
        assert!(done.is_ok() || !whole, "operation {nth}: {done:?}");
        failed += u64::from(done.is_err());
        sim.disk.heal();
        sim.disk = sim.disk.kill();
        drop(store);
        let context = format!("killed at operation {nth}");
        let store = sim.builder().open().unwrap_or_else(|error| panic!("{context}: {error}"));
        let listed = store.list().unwrap();
        for text in &listed {
            put(&store.logstore(text).unwrap(), "after");
        }
        assert_clean(&store, &context);
        sim.crash(Survives::Synced);
        let store = sim.builder().open().unwrap_or_else(|error| panic!("{context}: {error}"));
        assert_eq!(store.list().unwrap(), listed, "{context}");
        for text in &listed {
            let logstore =
                store.logstore(text).unwrap_or_else(|error| panic!("{context}: {text}: {error}"));
            let texts =
                try_texts(&logstore).unwrap_or_else(|error| panic!("{context}: {text}: {error}"));
            assert_eq!(texts.last().map(String::as_str), Some("after"), "{context}: {text}");
        }
        assert!(texts(&find(&store)).starts_with(&["before".into(), "there".into()]), "{context}");
        assert_clean(&store, &context);
        world = sim.world;
        if whole {
            assert!(nth > 5 && failed + 5 > nth, "{failed} of {nth} operations");
            return;
        }
    }
}

#[test]
fn a_new_store() {
    let mut world = World::manual();
    for nth in 1.. {
        let mut sim = Sim::of(world, SimDisk::new(tempfile::tempdir().unwrap().path()));
        sim.disk = SimDisk::new(sim.world.path());
        sim.disk.end_at(nth);
        let created = sim.builder().create().is_ok();
        let whole = created && sim.disk.changes() < nth;
        sim.disk.heal();
        sim.disk = sim.disk.kill();
        if let Ok(store) = sim.builder().open() {
            put(&sim.world.service(&store, NAME), "there");
            sim.crash(Survives::Synced);
            let store = sim
                .builder()
                .open()
                .unwrap_or_else(|error| panic!("killed at operation {nth}: {error}"));
            assert_eq!(texts(&find(&store)), ["there"]);
            assert_clean(&store, &format!("killed at operation {nth}"));
        }
        world = sim.world;
        if whole {
            return;
        }
    }
}

#[test]
fn a_new_logstore() {
    let spec = || LogstoreSpec::default().encrypt_conf(EncryptConf::service_key(EncryptType::Sm4));
    killed_anywhere(
        |_, _| {},
        |_, store| store.create_logstore(&name("p/new"), spec()).map(|_| ()),
    );
}

#[test]
fn a_changed_logstore() {
    killed_anywhere(
        |_, _| {},
        |_, store| {
            let config = store.logstore(&name(NAME))?.config();
            store.update_logstore(&name(NAME), config.ttl_days(7)).map(|_| ())
        },
    );
}

#[test]
fn a_new_data_key() {
    killed_anywhere(|_, _| {}, |_, store| store.keys().rotate_data_key(&name(NAME)).map(|_| ()));
}

#[test]
fn a_new_service_key() {
    killed_anywhere(|_, _| {}, |_, store| store.keys().rotate_service_key().map(|_| ()));
}

#[test]
fn a_deleted_logstore() {
    killed_anywhere(
        |sim, store| put(&sim.world.service(store, "p/doomed"), "doomed"),
        |_, store| store.delete_logstore(&name("p/doomed")).map(drop),
    );
}

#[test]
fn a_sealed_segment() {
    killed_anywhere(
        |_, _| {},
        |_, store| {
            find(store).append(record("written"), &written())?;
            find(store).roll()?;
            find(store).append(record("written"), &written())?;
            find(store).roll()
        },
    );
}

#[test]
fn a_checkpoint() {
    killed_anywhere(|_, _| {}, |_, store| store.admin().checkpoint().map(|_| ()));
}

/// After a power loss during sealing, all synced data is present, and any damage is treated as a
/// torn tail.
#[test]
fn a_power_loss_during_sealing_leaves_no_footer_without_blocks() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, NAME);
    put(&logstore, "synced");
    for n in 0..4 {
        logstore.append(record(&format!("{n} {}", "long ".repeat(n * 150))), &written()).unwrap();
    }
    let cuts = Arc::new(Mutex::new(Vec::new()));
    let (disk, taken) = (sim.disk.clone(), Arc::clone(&cuts));
    sim.disk.on_call(move |call| {
        if call.op.changes() {
            let survivals = (0..200).map(|seed| Survives::Some { seed });
            taken.lock().unwrap().extend(survivals.map(|survives| disk.crash(survives)));
        }
        Verdict::Go
    });
    logstore.roll().unwrap();
    sim.disk.heal();
    let cuts = std::mem::take(&mut *cuts.lock().unwrap());
    assert!(cuts.len() >= 600, "the blocks are synced, the footer is written, and is synced");
    let mut footers = 0;
    for disk in cuts {
        let store = sim.world.builder().disk(Arc::new(disk)).open().unwrap();
        let logstore = find(&store);
        let read = texts(&logstore);
        assert_eq!(read[0], "synced");
        put(&logstore, "after");
        assert_clean(&store, "recovered");
        footers += usize::from(texts(&logstore).len() == 6);
    }
    assert!(footers > 200, "{footers}");
}

/// A footer is written only after its blocks are durable, so damage to the blocks did not come from
/// a crash.
#[test]
fn damage_before_an_unrecorded_footer_is_corruption() {
    let mut sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, NAME);
    logstore.append(record("written"), &written()).unwrap();
    // The process ends before the catalogue records the head of the shard.
    sim.disk.fail_next(Op::Write, "catalogue", io::ErrorKind::Other);
    logstore.roll().unwrap_err();
    sim.crash(Survives::Everything);
    let segment = sim.segments(&logstore, 0).remove(0);
    let intact = Arc::new(sim.disk.crash(Survives::Everything));
    let store = sim.world.builder().disk(intact).open().unwrap();
    put(&find(&store), "after");
    assert_eq!(texts(&find(&store)), ["written", "after"]);
    assert_eq!(
        find(&store).status().unwrap().recovery,
        [],
        "nothing was lost, and nothing rewritten"
    );
    let header = SegmentHeader::decode(&sim.disk.bytes(&segment)).unwrap();
    sim.disk.edit(&segment, |bytes| bytes[header.body_start as usize + 100] ^= 1);
    let logstore = find(&sim.open());
    assert!(matches!(try_texts(&logstore), Err(Error::Corrupt { .. })));
    assert!(matches!(try_put(&logstore, "after"), Err(Error::Corrupt { .. })));
}

/// After a failed sync of a seal, the same process does not treat the seal as durable either.
#[test]
fn reopening_a_shard_recovers_a_segment_with_a_failed_seal() {
    let mut sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, NAME);
    put(&logstore, "synced");
    logstore.append(record("written"), &written()).unwrap();
    sim.disk.fail_next(Op::Sync, ".seg", io::ErrorKind::Other);
    logstore.roll().unwrap_err();
    sim.disk.heal();
    logstore.reopen_shard(0).unwrap();
    put(&logstore, "after");
    assert_eq!(texts(&logstore), ["synced", "written", "after"]);
    sim.crash(Survives::Synced);
    assert_eq!(texts(&find(&sim.open())), ["synced", "written", "after"]);
}

/// For a stopped writer, a checkpoint records the durable head of the shard, not the written one.
#[test]
fn a_checkpoint_of_a_stopped_shard_records_its_durable_end() {
    let mut sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, NAME);
    put(&logstore, "synced");
    logstore.append(record("written"), &written()).unwrap();
    sim.disk.fail_next(Op::Sync, ".seg", io::ErrorKind::Other);
    logstore.sync().unwrap_err();
    sim.disk.heal();
    assert_eq!(texts(&logstore), ["synced", "written"], "it can still be read");
    store.admin().checkpoint().unwrap();
    sim.crash(Survives::Synced);
    let logstore = find(&sim.open());
    put(&logstore, "after");
    assert_eq!(texts(&logstore), ["synced", "after"]);
}

/// After a kill of the writer, a checkpoint in the next process records the same head.
#[test]
fn a_checkpoint_counts_the_blocks_of_an_unclean_shard() {
    let mut sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, NAME);
    for text in ["one", "two", "three"] {
        put(&logstore, text);
    }
    let head = |store: &Store| {
        let checkpoint = store.admin().checkpoint().unwrap();
        // The JSON follows the document's frame.
        let mut documents =
            serde_json::Deserializer::from_slice(&checkpoint.to_bytes()[80..]).into_iter();
        let body: serde_json::Value = documents.next().unwrap().unwrap();
        let head = &body["logstores"][NAME]["shards"][0]["head"];
        ["segment", "blocks", "bytes", "end_seq", "digest"].map(|field| head[field].clone())
    };
    let told = head(&store);
    assert_eq!(told[1], 4, "three of groups, and a mark");
    sim.disk = sim.disk.kill();
    assert_eq!(head(&sim.open()), told);
}

/// A killed process could not sync a segment's name. The catalogue must not refer to the segment
/// before the name is durable.
#[test]
fn the_catalogue_knows_of_no_segment_whose_name_is_not_durable() {
    for by_retention in [false, true] {
        let mut sim = Sim::new();
        sim.world.options.segment_bytes = 4 << 10;
        let store = sim.create();
        let logstore = sim.world.service(&store, NAME);
        let mut dice = Dice::new(1, 1);
        let incompressible: Vec<u8> = (0..6000).map(|_| dice.next() as u8).collect();
        logstore.append(Payload::opaque(incompressible).unwrap(), &synced()).unwrap();
        let told = logstore.append(record("queued"), &buffered()).unwrap();
        // The next segment is renamed, and the process is killed before the rename is durable.
        sim.disk.on_call(|call| match call.op == Op::SyncDir && call.is_about("shard-0000") {
            true => Verdict::Fail(io::ErrorKind::Other),
            false => Verdict::Go,
        });
        sim.world.clock.advance(millis(100));
        store.tick();
        assert_eq!(sim.segments(&logstore, 0).len(), 2);
        sim.disk.heal();
        sim.disk = sim.disk.kill();
        let store = sim.open();
        if by_retention {
            let config = find(&store).config().retention_bytes(1);
            store.update_logstore(&name(NAME), config).unwrap();
            assert_eq!(store.admin().apply_retention().unwrap().segments, 1);
        } else {
            store.admin().checkpoint().unwrap();
        }
        sim.crash(Survives::Synced);
        let store = sim.open();
        let appended = find(&store).append(record("after"), &synced()).unwrap();
        assert!(appended.seq > told.seq, "number {} was given out before", appended.seq);
        assert_clean(&store, "gone on");
    }
}

/// Data that a checkpoint found durable stays part of the shard, even if the sync of its catalogue
/// record failed: the record may be on the disk.
#[test]
fn a_failed_checkpoint_keeps_the_durable_end_that_it_found() {
    let mut sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, NAME);
    put(&logstore, "synced");
    sim.disk.on_call(|call| match call.op == Op::Sync && call.is_about("catalogue") {
        true => Verdict::DoneAndFail,
        false => Verdict::Go,
    });
    store.admin().checkpoint().unwrap_err();
    sim.disk.fail_next(Op::Write, ".seg", io::ErrorKind::Other);
    try_put(&logstore, "fails").unwrap_err();
    sim.disk.heal();
    logstore.reopen_shard(0).unwrap();
    put(&logstore, "after");
    sim.crash(Survives::Everything);
    let store = sim.open();
    assert_eq!(texts(&find(&store)), ["synced", "after"]);
    assert_clean(&store, "gone on");
}

/// A head of an open segment that the catalogue recorded stays valid when the same process recovers
/// the shard.
#[test]
fn what_was_noted_of_an_open_segment_is_not_cut_off() {
    let mut sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, NAME);
    put(&logstore, "synced");
    sim.world.clock.advance(secs(11));
    store.tick();
    sim.disk.fail_next(Op::Write, ".seg", io::ErrorKind::Other);
    try_put(&logstore, "fails").unwrap_err();
    sim.disk.heal();
    logstore.reopen_shard(0).unwrap();
    put(&logstore, "after");
    assert_clean(&store, "gone on");
    sim.crash(Survives::Synced);
    let store = sim.open();
    assert_eq!(texts(&find(&store)), ["synced", "after"]);
    assert_clean(&store, "opened again");
}

/// An unsynced audit record may have lost its beginning but not its end.
#[test]
fn the_last_audit_record_may_be_torn_anywhere() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, NAME);
    store.admin().checkpoint().unwrap();
    let audit = sim.world.store_dir().join("audit/audit-000001.log");
    let known = sim.disk.bytes(&audit).len();
    // The process dies before any other file refers to the record.
    sim.disk.on_call(|call| match call.op == Op::Sync && call.is_about("audit") {
        true => Verdict::DoneAndFail,
        false => Verdict::Go,
    });
    store.keys().rotate_data_key(logstore.name()).unwrap_err();
    let len = sim.disk.bytes(&audit).len();
    for lost in [1, 10, len - known - 1, len - known] {
        let disk = sim.disk.fork();
        disk.edit(&audit, |bytes| bytes[known..known + lost].fill(0));
        let store = sim.world.builder().disk(Arc::new(disk.clone())).open().unwrap();
        let before = store.keys().audit_records().unwrap().len();
        assert_clean(&store, "torn");
        store.keys().rotate_data_key(&name(NAME)).unwrap();
        assert_eq!(store.keys().audit_records().unwrap().len(), before + 2);
        store.close().unwrap();
        assert_clean(&sim.world.builder().disk(Arc::new(disk)).open().unwrap(), "gone on");
    }
}

/// A process died during the creation of a store, after it created the audit log file and before it
/// synced the file's name.
#[test]
fn the_name_of_the_audit_log_is_durable_before_a_record_counts() {
    let mut sim = Sim::new();
    sim.disk.on_call(|call| match call.op == Op::SyncDir && call.is_about("audit") {
        true => Verdict::Fail(io::ErrorKind::Other),
        false => Verdict::Go,
    });
    sim.world.builder().disk(Arc::new(sim.disk.clone())).create().unwrap_err();
    sim.disk.heal();
    sim.disk = sim.disk.kill();
    let store = sim.open();
    sim.world.service(&store, NAME);
    let told = store.keys().audit_records().unwrap();
    assert!(!told.is_empty());
    sim.crash(Survives::Synced);
    assert_eq!(sim.open().keys().audit_records().unwrap()[..told.len()], told);
}
