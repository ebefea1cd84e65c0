//! A KMS that does not answer while many master keys wait for it, and the removal of data from
//! memory when a key is lost.

#![allow(clippy::unwrap_used)]

mod common;

use common::*;
use envelog::{
    Cmk, Compression, EncryptConf, Error, Logstore, ReadOptions, Store,
    kms::RevokedReason::Disabled,
};

/// A store with `count` Logstores, each with its own master key and each in use.
fn crowd(world: &World, count: usize) -> (Store, Vec<(Cmk, Logstore)>) {
    let store = world.create();
    let logstores = (0..count)
        .map(|n| {
            let cmk = world.cmk();
            let logstore = world.byok(&store, &format!("p/l{n}"), &cmk);
            put(&logstore, "first");
            (cmk, logstore)
        })
        .collect();
    (store, logstores)
}

fn tick_for(world: &World, store: &Store, seconds: u64) {
    for _ in 0..seconds {
        world.clock.advance(secs(1));
        store.tick();
    }
}

#[test]
fn leases_that_have_ended_ask_together_and_come_back_together() {
    let world = World::manual_in_memory();
    let (store, logstores) = crowd(&world, 40);
    world.kms.answer(Answer::Unreachable);
    tick_for(&world, &store, 310);
    assert!(
        logstores.iter().all(|(_, logstore)| matches!(
            try_put(logstore, "x"),
            Err(Error::KmsUnreachable { .. })
        ))
    );

    // Eight periods: each lease makes at most one call of its own, and one shared probe per period,
    // or slightly more, checks the KMS for all.
    let before = world.kms.calls();
    tick_for(&world, &store, 8 * 30);
    let asked = world.kms.calls() - before;
    assert!((8..=40 + 16).contains(&asked), "{asked} calls of 40 leases in 8 periods");

    world.kms.answer(Answer::Real);
    tick_for(&world, &store, 30 + 6);
    for (_, logstore) in &logstores {
        assert_eq!(logstore.key_status().state, envelog::KeyState::Active);
        put(logstore, "second");
        assert_eq!(texts(logstore), ["first", "second"]);
    }
}

/// Refused operations trigger a call when one is due. They must not call more often than the leases
/// do.
#[test]
fn operations_that_are_refused_ask_no_more_often() {
    let world = World::manual_in_memory();
    let (_store, logstores) = crowd(&world, 20);
    world.kms.answer(Answer::Unreachable);
    let mut asked = 0;
    for second in 0..310 + 8 * 30 {
        world.clock.advance(secs(1));
        if second == 310 {
            asked = world.kms.calls();
        }
        logstores.iter().for_each(|(_, logstore)| drop(try_put(logstore, "x")));
    }
    let asked = world.kms.calls() - asked;
    assert!(asked <= 20 + 16, "{asked} calls");
}

/// Most master keys of a KMS fail. A lease whose key works must not be affected.
#[test]
fn a_lease_that_is_alive_is_never_spared_a_call() {
    let world = World::manual_in_memory();
    let (store, logstores) = crowd(&world, 10);
    let (healthy, others) = logstores.split_first().unwrap();
    world.kms.answer(Answer::Unreachable);
    world.kms.answer_for_master_key(&healthy.0.cmk_key_id, Answer::Real);
    for _ in 0..900 {
        tick_for(&world, &store, 1);
        put(&healthy.1, "x");
    }
    assert!(
        others.iter().all(|(_, logstore)| matches!(
            try_put(logstore, "x"),
            Err(Error::KmsUnreachable { .. })
        ))
    );
}

#[test]
fn an_expired_lease_probes_in_time_among_many_failures() {
    let world = World::manual_in_memory();
    let (store, logstores) = crowd(&world, 10);
    world.kms.answer(Answer::Unreachable);
    tick_for(&world, &store, 400);
    let (cmk, logstore) = &logstores[3];
    world.kms.answer_for_master_key(&cmk.cmk_key_id, Answer::Real);
    tick_for(&world, &store, 9 * 30);
    put(logstore, "back");
}

/// Two Logstores under one master key, of which this process has used one.
fn used_and_unused(world: &World) -> (Store, [Logstore; 2]) {
    let store = world.create();
    let cmk = world.cmk();
    let names = ["p/used", "p/unused"];
    for text in names {
        put(&world.byok(&store, text, &cmk), "first");
    }
    store.close().unwrap();
    let store = world.open();
    let [used, unused] = names.map(|text| store.logstore(&name(text)).unwrap());
    put(&used, "second");
    (store, [used, unused])
}

#[test]
fn a_first_use_does_not_wait_for_an_outage_that_is_known() {
    let world = World::manual_in_memory();
    let (store, [used, unused]) = used_and_unused(&world);
    world.kms.answer(Answer::Unreachable);
    tick_for(&world, &store, 100);
    put(&used, "third");
    let before = world.kms.calls();
    for _ in 0..10 {
        assert!(matches!(try_texts(&unused), Err(Error::KmsUnreachable { .. })));
    }
    assert_eq!(world.kms.calls(), before);
    world.kms.answer(Answer::Real);
    tick_for(&world, &store, 30);
    assert_eq!(texts(&unused), ["first"]);
}

/// One or two failed calls do not open the circuit breaker: a first use still calls the KMS.
#[test]
fn a_first_use_asks_although_a_call_has_failed() {
    let world = World::manual_in_memory();
    let (_store, [used, unused]) = used_and_unused(&world);
    world.kms.answer(Answer::Unreachable);
    assert!(used.revalidate_now().is_ok(), "the lease runs on");
    world.kms.answer(Answer::Real);
    assert!(matches!(unused.key_status().state, envelog::KeyState::Outage { .. }));
    assert_eq!(texts(&unused), ["first"]);
}

/// Backend calls that never return occupy threads, but only up to a limit.
#[test]
fn calls_that_never_come_back_do_not_pile_up() {
    let mut world = World::threads();
    world.options.kms_timeout = millis(300);
    let (store, logstores) = crowd(&world, 1);
    drop(logstores);
    store.close().unwrap();
    // From now on the timeout is shorter than any answer.
    world.options.kms_timeout = millis(10);
    let store = world.open();
    let logstore = store.logstore(&name("p/l0")).unwrap();
    let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
    world.kms.answer(Answer::Hang);
    let mut most = 0;
    for _ in 0..300 {
        let _ = logstore.revalidate_now();
        most = most.max(threads());
    }
    match logstore.revalidate_now() {
        Err(Error::KmsUnreachable { detail, .. }) => {
            assert!(detail.contains("4 calls under this key have not returned"), "{detail}");
        }
        other => panic!("{other:?}"),
    }
    assert!(most < 60, "{most} threads");
    world.kms.answer(Answer::Real);
    eventually("the calls come back", || threads() < 60 && logstore.revalidate_now().is_ok());
}

/// When the key is revoked, an open reader's read-ahead data is wiped. Once the key is back, the
/// reader reads it again and skips no record.
#[test]
fn an_idle_reader_skips_nothing_after_a_revocation() {
    let world = World::manual_in_memory();
    let (store, logstores) = crowd(&world, 1);
    let (_, logstore) = &logstores[0];
    let all: Vec<String> = (0..10).map(|n| format!("record {n}")).collect();
    for text in &all {
        logstore.append(record(text), &buffered()).unwrap();
    }
    logstore.sync().unwrap();
    let from_us = records(logstore, 0).unwrap()[1].receive_time_us;
    for from in [envelog::Position::Seq(1), envelog::Position::Time(from_us)] {
        for taken in [0, 1, 4] {
            let mut reader = logstore.read(0, &ReadOptions::default().from(from)).unwrap();
            let mut got: Vec<_> = so_far(&mut reader).take(taken).map(Result::unwrap).collect();
            world.kms.answer(Answer::Revoked(Disabled));
            let _ = logstore.revalidate_now();
            world.kms.answer(Answer::Real);
            logstore.revalidate_now().unwrap();
            got.extend(so_far(&mut reader).map(Result::unwrap));
            let got: Vec<String> =
                strings(&got).into_iter().filter(|text| text != "first").collect();
            assert_eq!(got, all, "{from:?}, {taken} taken before");

            // The same block by block.
            let mut reader = logstore.read(0, &ReadOptions::default().from(from)).unwrap();
            let mut got: Vec<_> = so_far(&mut reader).take(taken).map(Result::unwrap).collect();
            world.kms.answer(Answer::Revoked(Disabled));
            let _ = logstore.revalidate_now();
            world.kms.answer(Answer::Real);
            logstore.revalidate_now().unwrap();
            while let Some(block) = reader.next_block().unwrap() {
                got.extend(block.records);
            }
            let got: Vec<String> =
                strings(&got).into_iter().filter(|text| text != "first").collect();
            assert_eq!(got, all);
        }
    }
    store.close().unwrap();
}

/// Settings that the data key authenticates cannot change while its KMS does not answer, neither
/// before nor after the lease ends.
#[test]
fn authenticated_settings_cannot_change_during_an_outage() {
    let world = World::manual_in_memory();
    let (store, logstores) = crowd(&world, 1);
    let (_, logstore) = &logstores[0];
    let meta = || std::fs::read(meta_path(&world.logstore_dir(logstore))).unwrap();
    for (seconds, revision) in [(0, 1), (310, 2)] {
        world.kms.answer(Answer::Unreachable);
        tick_for(&world, &store, seconds);
        let (config, before) = (logstore.config(), meta());
        let conf = EncryptConf { enable: false, ..config.encrypt_conf.clone().unwrap() };
        for bound in [
            config.clone().encrypt_conf(conf),
            config.clone().ttl_days(2),
            config.clone().retention_bytes(1 << 40),
        ] {
            let refused = store.update_logstore(logstore.name(), bound);
            assert!(matches!(refused, Err(Error::KmsUnreachable { .. })), "{refused:?}");
            assert_eq!((logstore.config(), meta()), (config.clone(), before.clone()));
        }
        let compression = if revision == 1 { Compression::None } else { Compression::Zstd };
        store.update_logstore(logstore.name(), config.compression(compression)).unwrap();
        world.kms.answer(Answer::Real);
    }
    tick_for(&world, &store, 36);
    let config = logstore.config();
    assert_eq!((config.revision, config.compression), (3, Compression::Zstd));
    store.update_logstore(logstore.name(), config.ttl_days(2)).unwrap();
    put(logstore, "second");
    assert_eq!(texts(logstore), ["first", "second"]);
}
