//! Revocation: the time bound, the gated operations, the kept data, and the return of the key.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::*;
use envelog::{
    EncryptConf, EncryptType, Error, KeyState, Logstore, LogstoreSpec, Position, ProbeMode,
    ReadOptions, Result, Store,
    admin::{ReplaceCmk, VerifyOptions},
    audit::{AuditEvent, AuditRecord},
    kms::RevokedReason::Disabled,
};

fn disable(world: &World) {
    world.kms.answer(Answer::Revoked(Disabled));
}

fn opened(world: &World) -> (Store, Logstore) {
    let store = world.create();
    let logstore = world.byok(&store, "p/l", &world.cmk());
    put(&logstore, "first");
    (store, logstore)
}

#[track_caller]
fn assert_unreachable<T: std::fmt::Debug>(result: Result<T>) {
    match result {
        Err(Error::KmsUnreachable { .. }) => {}
        other => panic!("expected KmsUnreachable, got {other:?}"),
    }
}

fn events(store: &Store) -> Vec<AuditEvent> {
    store.keys().audit_records().unwrap().into_iter().map(|record| record.event).collect()
}

// ---- the bound ----

/// For any phase between renewal and refusal, with and without ticks.
#[test]
fn no_operation_succeeds_that_starts_after_the_bound() {
    for phase in (0..=62).step_by(5) {
        for ticking in [false, true] {
            let world = World::manual();
            let (store, logstore) = opened(&world);
            let bound = world.options.revalidate_every + world.options.kms_timeout;
            // A use in the middle of the period does not renew the lease.
            for _ in 0..phase {
                world.clock.advance(millis(500));
                put(&logstore, "before");
            }
            disable(&world);
            let step = bound / 20;
            let mut refused = false;
            for _ in 0..20 {
                world.clock.advance(step);
                if ticking {
                    store.tick();
                }
                let now = try_put(&logstore, "maybe").is_err();
                // After the first refusal, all further operations are refused.
                assert!(now || !refused);
                refused = now;
            }
            assert!(refused, "phase {phase}");
            assert_revoked(try_put(&logstore, "refused"), Disabled);
            assert_revoked(try_texts(&logstore), Disabled);
        }
    }
}

#[test]
fn jitter_only_shortens_the_period_of_renewal() {
    let world = World::manual();
    let (store, _logstore) = opened(&world);
    let every = world.options.revalidate_every;
    let mut shortest = every;
    for _ in 0..200 {
        let before = world.kms.probes();
        let mut waited = Duration::ZERO;
        while world.kms.probes() == before {
            world.clock.advance(millis(100));
            waited += millis(100);
            store.tick();
        }
        assert!(waited <= every && waited >= every * 4 / 5, "{waited:?}");
        shortest = shortest.min(waited);
    }
    assert!(shortest < every * 9 / 10);
}

#[test]
fn use_never_renews_the_lease() {
    let world = World::manual();
    let (_store, logstore) = opened(&world);
    world.kms.answer(Answer::Unreachable);
    let began = world.kms.probes();
    let mut ended = None;
    for second in 1..=400u64 {
        world.clock.advance(secs(1));
        if try_put(&logstore, "x").is_err() {
            ended = Some(second);
            break;
        }
        assert!(try_texts(&logstore).is_ok());
    }
    // The lease ends exactly five minutes after the last success, with one call per period
    // meanwhile.
    assert_eq!(ended, Some(300));
    let asked = world.kms.probes() - began;
    assert!((9..=14).contains(&asked), "{asked}");
}

// ---- outage ----

#[test]
fn the_grace_counts_from_the_request_of_the_last_success() {
    let world = World::manual();
    let (store, logstore) = opened(&world);
    let sent = Duration::ZERO;
    // Twenty seconds later: the outage begins, and the grace period still counts from the last
    // success.
    world.clock.advance(secs(20));
    world.kms.answer(Answer::Unreachable);
    let mut now = secs(20);
    while now < sent + world.options.outage_grace - secs(1) {
        world.clock.advance(secs(10).min(sent + world.options.outage_grace - secs(1) - now));
        now = (now + secs(10)).min(sent + world.options.outage_grace - secs(1));
        store.tick();
        put(&logstore, "riding");
    }
    assert!(matches!(logstore.key_status().state, KeyState::Outage { .. }));
    assert_eq!(logstore.key_status().lease_left, Some(secs(1)));
    world.clock.advance(secs(1));
    assert_unreachable(try_put(&logstore, "too late"));
    assert_unreachable(try_texts(&logstore));
    store.tick();
    assert_eq!(logstore.key_status().lease_left, Some(Duration::ZERO));
    let error = try_texts(&logstore).unwrap_err();
    assert_eq!(error.code(), "kms_unreachable");
    assert!(error.to_string().contains(REGION), "{error}");
    assert_eq!(events(&store).last(), Some(&AuditEvent::LeaseEnded));
    // Until the KMS answers.
    world.kms.answer(Answer::Real);
    world.clock.advance(world.options.revalidate_every);
    store.tick();
    put(&logstore, "back");
    assert_eq!(events(&store).last(), Some(&AuditEvent::Recovered));
    assert_eq!(texts(&logstore).len(), 1 + 28 + 1);
}

#[test]
fn a_short_outage_is_not_noticed_by_callers() {
    let world = World::manual();
    let (store, logstore) = opened(&world);
    for _ in 0..4 {
        world.kms.answer(Answer::Unreachable);
        for _ in 0..8 {
            world.clock.advance(secs(30));
            store.tick();
            put(&logstore, "x");
        }
        world.kms.answer(Answer::Real);
        world.clock.advance(secs(30));
        store.tick();
        assert_eq!(logstore.key_status().state, KeyState::Active);
    }
    assert!(!events(&store).contains(&AuditEvent::LeaseEnded));
}

#[test]
fn a_refusal_during_an_outage_counts_at_once() {
    let world = World::manual();
    let (store, logstore) = opened(&world);
    world.kms.answer(Answer::Unreachable);
    world.clock.advance(secs(60));
    store.tick();
    put(&logstore, "riding");
    disable(&world);
    world.clock.advance(secs(30));
    store.tick();
    assert_revoked(try_put(&logstore, "refused"), Disabled);
    // An outage after a refusal does not restore access: only a success does.
    world.kms.answer(Answer::Unreachable);
    for _ in 0..5 {
        world.clock.advance(secs(10));
        store.tick();
        assert!(try_put(&logstore, "refused").is_err());
    }
    world.kms.answer(Answer::Real);
    world.clock.advance(secs(30));
    store.tick();
    put(&logstore, "back");
    assert_eq!(texts(&logstore), ["first", "riding", "back"]);
}

#[test]
fn invalid_kms_answers_never_renew_a_lease() {
    for answer in [Answer::Invalid, Answer::WrongKey] {
        let world = World::manual();
        let (store, logstore) = opened(&world);
        world.kms.answer(answer);
        for _ in 0..29 {
            world.clock.advance(secs(10));
            store.tick();
            put(&logstore, "riding");
        }
        world.clock.advance(secs(10));
        store.tick();
        for result in [
            try_put(&logstore, "late"),
            try_texts(&logstore).map(|_| ()),
            logstore.revalidate_now(),
        ] {
            assert!(matches!(result, Err(Error::KmsInvalid { .. })), "{result:?}");
        }
        assert_eq!(events(&store).last(), Some(&AuditEvent::LeaseEnded));
        world.kms.answer(Answer::Real);
        logstore.revalidate_now().unwrap();
        put(&logstore, "back");
    }
}

#[test]
fn a_wrong_key_for_the_logstores_own_envelope_is_never_used() {
    let world = World::manual();
    let (store, logstore) = opened(&world);
    store.close().unwrap();
    drop(logstore);
    let store = world.open();
    let logstore = store.logstore(&name("p/l")).unwrap();
    world.kms.answer_for_data_keys(Answer::WrongKey);
    assert!(matches!(try_texts(&logstore), Err(Error::KmsInvalid { .. })));
    assert!(matches!(try_put(&logstore, "x"), Err(Error::KmsInvalid { .. })));
    world.kms.answer(Answer::Real);
    assert_eq!(texts(&logstore), ["first"]);
}

/// The refusal of an envelope revokes the Logstore of that envelope, and no other one under the
/// key.
#[test]
fn a_refused_envelope_revokes_its_logstore_alone() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let (a, b) = (world.byok(&store, "p/a", &cmk), world.byok(&store, "p/b", &cmk));
    put(&a, "a");
    world.kms.answer_for_logstore(b.id(), Answer::Revoked(Disabled));
    assert_revoked(try_put(&b, "b"), Disabled);
    store.tick();
    put(&a, "a");
    assert_eq!(b.key_status().state, KeyState::Revoked { reason: Disabled });
    assert_eq!(a.key_status().state, KeyState::Active);
    let of_b = |event: AuditEvent| {
        let records = store.keys().audit_records().unwrap();
        let ours = |record: &&AuditRecord| record.logstore.as_ref() == Some(b.name());
        records.iter().filter(ours).filter(|record| record.event == event).count()
    };
    assert_eq!((of_b(AuditEvent::Revoked), of_b(AuditEvent::Recovered)), (1, 0));
    // While the KMS refuses, there is one call per period, however many operations there are.
    let calls = world.kms.calls();
    for _ in 0..10 {
        assert_revoked(try_put(&b, "b"), Disabled);
        assert_revoked(try_texts(&b), Disabled);
    }
    assert_eq!(world.kms.calls(), calls);
    for period in 1..=3 {
        world.clock.advance(secs(30));
        store.tick();
        put(&a, "a");
        assert_revoked(try_put(&b, "b"), Disabled);
        assert_eq!(world.kms.calls(), calls + 2 * period, "the probe, and the envelope of b");
    }
    world.kms.answer(Answer::Real);
    world.clock.advance(secs(30));
    store.tick();
    put(&a, "a");
    put(&b, "b");
    assert_eq!(b.key_status().state, KeyState::Active);
    assert_eq!((of_b(AuditEvent::Revoked), of_b(AuditEvent::Recovered)), (1, 1));
    // From now on the probe alone is asked about again.
    let probes = world.kms.probes();
    let calls = world.kms.calls();
    for _ in 0..120 {
        world.clock.advance(secs(1));
        store.tick();
    }
    assert!(world.kms.probes() > probes + 3);
    assert_eq!(world.kms.calls() - calls, world.kms.probes() - probes);
}

/// With a probe of its own, the withdrawal of one Logstore is noticed while it runs.
#[test]
fn a_logstore_with_its_own_probe_is_revoked_within_the_bound() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let spec = |probe| {
        let mut spec =
            LogstoreSpec::default().encrypt_conf(EncryptConf::byok(EncryptType::Aes, cmk.clone()));
        spec.probe = probe;
        spec
    };
    let own = store.create_logstore(&name("p/own"), spec(ProbeMode::Own)).unwrap();
    let shared = store.create_logstore(&name("p/shared"), spec(ProbeMode::Shared)).unwrap();
    for logstore in [&own, &shared] {
        put(logstore, "first");
    }
    world.kms.answer_for_logstore(shared.id(), Answer::Revoked(Disabled));
    world.clock.advance(secs(31));
    put(&shared, "not noticed: its data key is in memory");
    world.kms.answer_for_logstore(own.id(), Answer::Revoked(Disabled));
    world.clock.advance(secs(31));
    assert_revoked(try_put(&own, "x"), Disabled);
    assert_revoked(try_texts(&own), Disabled);
    put(&shared, "second");
    // The mode is bound under the data key, and survives the process.
    drop((own, shared));
    store.close().unwrap();
    let store = world.open();
    let own = store.logstore(&name("p/own")).unwrap();
    assert_eq!(own.config().probe, ProbeMode::Own);
    assert_revoked(try_texts(&own), Disabled);
    world.kms.answer(Answer::Real);
    own.revalidate_now().unwrap();
    assert_eq!(texts(&own), ["first"]);
    // An update changes the mode, and a new data key has a new probe.
    let mut config = own.config();
    config.probe = ProbeMode::Shared;
    store.update_logstore(&name("p/own"), config).unwrap();
    put(&own, "second");
    let mut config = own.config();
    config.probe = ProbeMode::Own;
    store.update_logstore(&name("p/own"), config).unwrap();
    store.keys().rotate_data_key(&name("p/own")).unwrap();
    put(&own, "third");
    world.kms.answer_for_logstore(own.id(), Answer::Revoked(Disabled));
    world.clock.advance(secs(31));
    assert_revoked(try_put(&own, "x"), Disabled);
}

// ---- clocks ----

#[test]
fn a_paused_machine_finds_its_lease_ended() {
    let world = World::manual();
    let (store, logstore) = opened(&world);
    let mut reader = logstore.read(0, &ReadOptions::default()).unwrap();
    world.kms.answer(Answer::Unreachable);
    // The uptime did not advance, but the wall clock did.
    world.clock.jump_wall(world.options.outage_grace);
    assert_unreachable(try_put(&logstore, "x"));
    assert_unreachable(reader.next().unwrap());
    world.kms.answer(Answer::Real);
    world.clock.advance(secs(30));
    store.tick();
    put(&logstore, "y");
}

/// The bound also holds by the wall clock: after a pause of the machine that exceeds it, the engine
/// calls the KMS before it uses the key.
#[test]
fn a_paused_machine_asks_before_it_goes_on() {
    let world = World::manual();
    let (_store, logstore) = opened(&world);
    let mut reader = logstore.read(0, &ReadOptions::default()).unwrap();
    disable(&world);
    world.clock.jump_wall(world.options.revalidate_every + world.options.kms_timeout);
    assert_revoked(reader.next().unwrap(), Disabled);
    assert_revoked(try_put(&logstore, "x"), Disabled);

    // The same during the grace period of an outage.
    let world = World::manual();
    let (store, logstore) = opened(&world);
    world.kms.answer(Answer::Unreachable);
    world.clock.advance(secs(30));
    store.tick();
    put(&logstore, "riding");
    disable(&world);
    world.clock.jump_wall(world.options.revalidate_every + world.options.kms_timeout);
    assert_revoked(try_put(&logstore, "x"), Disabled);
}

#[test]
fn a_wall_clock_that_is_set_back_stretches_nothing() {
    let world = World::manual();
    let (_store, logstore) = opened(&world);
    world.clock.jump_wall_back(secs(30 * 24 * 3600));
    put(&logstore, "fine");
    disable(&world);
    world.clock.advance(world.options.revalidate_every + world.options.kms_timeout);
    assert_revoked(try_put(&logstore, "refused"), Disabled);
    // From the setback on, receive times follow the clock.
    world.kms.answer(Answer::Real);
    logstore.revalidate_now().unwrap();
    put(&logstore, "later");
    let times: Vec<_> =
        records(&logstore, 0).unwrap().iter().map(|record| record.receive_time_us).collect();
    assert!(times[1..].is_sorted() && times[1] < times[0], "{times:?}");
}

// ---- gated operations and kept data ----

#[test]
fn open_iterators_end_also_in_the_middle_of_what_was_read_ahead() {
    let world = World::manual();
    let (_store, logstore) = opened(&world);
    for n in 0..100 {
        logstore.append(record(&format!("{n}")), &buffered()).unwrap();
    }
    logstore.sync().unwrap();
    let mut by_record = logstore.read(0, &ReadOptions::default()).unwrap();
    let mut by_block = logstore.read(0, &ReadOptions::default()).unwrap();
    let mut at_end = logstore.read(0, &ReadOptions::default().from(Position::End)).unwrap();
    for _ in 0..10 {
        by_record.next().unwrap().unwrap();
    }
    by_block.next_block().unwrap().unwrap();
    assert!(at_end.try_next().unwrap().is_none());
    disable(&world);
    world.clock.advance(secs(31));
    assert_revoked(by_record.next().unwrap(), Disabled);
    assert!(by_record.next().is_none());
    assert_revoked(by_block.next_block(), Disabled);
    assert!(by_block.next_block().unwrap().is_none());
    // A reader that waits at the end gets the error too.
    assert_revoked(at_end.next().unwrap(), Disabled);
    assert!(at_end.next().is_none());
}

#[test]
fn acknowledged_groups_are_sealed_before_the_wipe() {
    let world = World::manual();
    let (store, logstore) = opened(&world);
    // Acknowledged: three buffered groups. Not acknowledged: tickets.
    for text in ["a", "b"] {
        logstore.append(record(text), &buffered()).unwrap();
    }
    let waiting = [
        logstore.submit(record("not acknowledged"), &written()).unwrap(),
        logstore.submit(record("not acknowledged"), &synced()).unwrap(),
    ];
    logstore.append(record("c"), &buffered()).unwrap();
    assert!(waiting.iter().all(|ticket| !ticket.is_done()));
    disable(&world);
    world.clock.advance(secs(31));
    store.tick();
    for ticket in waiting {
        assert!(ticket.is_done());
        assert_revoked(ticket.wait(), Disabled);
    }
    // No segment stays open: it is sealed, and keyless verification finds no fault.
    let keyless = VerifyOptions::default().keyless(true);
    let report = store.admin().verify(&keyless, &mut |_| {}).unwrap();
    assert!(report.is_clean() && report.notes.is_empty(), "{report:?}");
    assert_eq!(report.groups, 4);

    world.kms.answer(Answer::Real);
    logstore.revalidate_now().unwrap();
    assert_eq!(texts(&logstore), ["first", "a", "b", "c"]);
    put(&logstore, "d");
    assert_eq!(texts(&logstore), ["first", "a", "b", "c", "d"]);
    assert!(logstore.status().unwrap().recovery.is_empty());
}

/// A ticket checks the key when it is driven: an early submission does not bypass the check.
#[test]
fn a_ticket_that_is_waited_for_after_the_bound_is_refused() {
    let world = World::manual();
    let (_store, logstore) = opened(&world);
    let ticket = logstore.submit(record("late"), &synced()).unwrap();
    disable(&world);
    world.clock.advance(secs(31));
    assert_revoked(ticket.wait(), Disabled);
    world.kms.answer(Answer::Real);
    logstore.revalidate_now().unwrap();
    assert_eq!(texts(&logstore), ["first"]);
}

/// The operation itself detects the revocation, before any other thread has handled it.
#[test]
fn sync_close_and_checkpoint_that_find_the_key_revoked() {
    for how in ["sync", "close", "drop", "checkpoint", "roll"] {
        let world = World::manual();
        let (store, logstore) = opened(&world);
        logstore.append(record("acknowledged"), &buffered()).unwrap();
        disable(&world);
        world.clock.advance(secs(31));
        match how {
            "sync" => {
                assert_revoked(logstore.sync(), Disabled);
                store.close().unwrap();
            }
            "close" => store.close().unwrap(),
            "drop" => drop(store),
            "checkpoint" => {
                store.admin().checkpoint().unwrap();
                store.close().unwrap();
            }
            _ => {
                let _ = logstore.roll();
                store.close().unwrap();
            }
        }
        drop(logstore);
        world.kms.answer(Answer::Real);
        let store = world.open();
        let logstore = store.logstore(&name("p/l")).unwrap();
        assert_eq!(texts(&logstore), ["first", "acknowledged"], "{how}");
        assert!(store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().is_clean());
        put(&logstore, "more");
        assert!(logstore.status().unwrap().recovery.is_empty(), "{how}: it was closed cleanly");
    }
}

/// The details of the records about lost groups.
fn lost_groups(store: &Store) -> Vec<String> {
    let records = store.keys().audit_records().unwrap().into_iter();
    let lost = records.filter(|record| record.event == AuditEvent::GroupsLost);
    lost.map(|record| record.detail).collect()
}

#[track_caller]
fn assert_reported(logstore: &Logstore, lost: u64) {
    match logstore.sync() {
        Err(Error::GroupsLost { groups, .. }) => assert_eq!(groups, lost),
        other => panic!("expected GroupsLost, got {other:?}"),
    }
}

/// The lease ends between two segments. No segment can take the acknowledged groups, so they are
/// lost with the key: counted, recorded, and reported once. The store does not keep asking the KMS.
#[test]
fn acknowledged_groups_without_a_segment_are_lost_with_the_key() {
    let sim = disk::Sim::new();
    let store = sim.create();
    let world = &sim.world;
    let logstore = world.byok(&store, "p/l", &world.cmk());
    put(&logstore, "first");
    let mut records = Vec::new();
    for answer in [Answer::Unreachable, Answer::Revoked(Disabled)] {
        sim.lose_key_at_the_next_roll(&store, &logstore, answer);
        let seqs: Vec<_> = ["lost", "lost too"]
            .map(|text| logstore.append(record(text), &buffered()).unwrap().seq)
            .into();
        for _ in 0..50 {
            world.clock.advance(millis(100));
            store.tick();
        }
        let calls = world.kms.calls();
        assert!(calls < 100, "{calls} calls");
        assert!(try_put(&logstore, "refused").is_err());
        records.push(format!("shard 0: 2 groups, sequence numbers {} to {}", seqs[0], seqs[1]));
        assert_eq!(
            (store.metrics().groups_lost, lost_groups(&store)),
            (2 * records.len() as u64, records.clone())
        );
        assert_reported(&logstore, 2);
        world.kms.answer(Answer::Real);
        logstore.revalidate_now().unwrap();
        logstore.sync().unwrap();
        put(&logstore, "more");
    }
    assert_eq!(texts(&logstore), ["first", "more", "more"]);
    store.close().unwrap();
}

/// Encryption was switched on or off since the open segment was begun. The segment is no place for
/// groups that were acknowledged after that, so they are lost with the key, and not written.
#[test]
fn groups_under_newer_settings_are_lost_with_the_key() {
    for encrypts in [false, true] {
        let world = World::manual();
        let store = world.create();
        let logstore = world.byok(&store, "p/l", &world.cmk());
        let switch = |enable| {
            let config = logstore.config();
            let conf = EncryptConf { enable, ..config.encrypt_conf.clone().unwrap() };
            let config = config.encrypt_conf(conf);
            store.update_logstore(logstore.name(), config).unwrap();
        };
        switch(!encrypts);
        put(&logstore, "before");
        switch(encrypts);
        logstore.append(record("never in the open segment"), &buffered()).unwrap();
        disable(&world);
        assert_revoked(logstore.revalidate_now(), Disabled);
        let all: Vec<u8> = files(&world.store_dir()).into_values().flatten().collect();
        assert!(memchr::memmem::find(&all, b"never in the open segment").is_none());
        assert_eq!(lost_groups(&store), ["shard 0: 1 group, sequence numbers 1 to 1"]);
        world.kms.answer(Answer::Real);
        logstore.revalidate_now().unwrap();
        put(&logstore, "after");
        assert_eq!(texts(&logstore), ["before", "after"]);
        // A caller that has not asked since hears of it at the end.
        assert!(matches!(store.close(), Err(Error::GroupsLost { groups: 1, .. })));
    }
}

#[test]
fn other_logstores_are_undisturbed() {
    let world = World::manual();
    let store = world.create();
    let (revoked_cmk, other_cmk) = (world.cmk(), world.cmk());
    let revoked = world.byok(&store, "p/revoked", &revoked_cmk);
    let others = [
        world.byok(&store, "p/other", &other_cmk),
        world.service(&store, "p/service"),
        store.create_logstore(&name("p/plain"), LogstoreSpec::default()).unwrap(),
    ];
    for logstore in others.iter().chain([&revoked]) {
        put(logstore, "before");
    }
    let mut readers: Vec<_> =
        others.iter().map(|other| other.read(0, &ReadOptions::default()).unwrap()).collect();
    world.local().disable(&revoked_cmk.cmk_key_id).unwrap();
    world.clock.advance(secs(31));
    store.tick();
    assert_revoked(try_put(&revoked, "x"), Disabled);
    for (other, reader) in others.iter().zip(&mut readers) {
        put(other, "after");
        let texts: Vec<_> = reader.map(|record| record.unwrap().bytes).collect();
        assert_eq!(texts, ["before", "after"]);
        // Their segments are not even ended.
        assert_eq!(segments(&world.logstore_dir(other), 0).len(), 1);
    }
}

#[test]
fn after_a_replacement_the_old_master_key_concerns_nobody() {
    let world = World::manual();
    let store = world.create();
    let (old, new) = (world.cmk(), world.cmk());
    let logstore = world.byok(&store, "p/l", &old);
    put(&logstore, "one");
    store.keys().replace_cmk(logstore.name(), new.clone(), ReplaceCmk::default()).unwrap();
    put(&logstore, "two");
    logstore.append(record("three"), &buffered()).unwrap();
    let ticket = logstore.submit(record("four"), &synced()).unwrap();
    let before = segments(&world.logstore_dir(&logstore), 0).len();
    world.local().disable(&old.cmk_key_id).unwrap();
    world.clock.advance(secs(31));
    store.tick();
    ticket.wait().unwrap();
    assert_eq!(texts(&logstore), ["one", "two", "three", "four"]);
    assert_eq!(segments(&world.logstore_dir(&logstore), 0).len(), before);
    assert!(!events(&store).contains(&AuditEvent::Revoked));
    // The new master key does affect it.
    world.local().disable(&new.cmk_key_id).unwrap();
    world.clock.advance(secs(31));
    store.tick();
    assert_revoked(try_put(&logstore, "x"), Disabled);
    assert!(events(&store).contains(&AuditEvent::Revoked));
}

#[test]
fn revalidate_now_makes_it_immediate_both_ways() {
    let world = World::manual();
    let (store, logstore) = opened(&world);
    logstore.append(record("acknowledged"), &buffered()).unwrap();
    disable(&world);
    put(&logstore, "still fine");
    assert_revoked(logstore.revalidate_now(), Disabled);
    assert_revoked(try_put(&logstore, "refused"), Disabled);
    assert_eq!(events(&store).last(), Some(&AuditEvent::Revoked));
    world.kms.answer(Answer::Real);
    assert_revoked(try_put(&logstore, "refused"), Disabled);
    logstore.revalidate_now().unwrap();
    put(&logstore, "back");
    assert_eq!(texts(&logstore), ["first", "acknowledged", "still fine", "back"]);
    assert_eq!(events(&store).last(), Some(&AuditEvent::Recovered));
    // A Logstore without a master key needs no call.
    world.service(&store, "p/service").revalidate_now().unwrap();
}

#[test]
fn switching_enable_needs_the_key_and_frees_nothing() {
    let world = World::manual();
    let (store, logstore) = opened(&world);
    disable(&world);
    world.clock.advance(secs(31));
    store.tick();
    let config = logstore.config();
    let conf = EncryptConf { enable: false, ..config.encrypt_conf.clone().unwrap() };
    let off = config.clone().encrypt_conf(conf);
    assert_revoked(store.update_logstore(logstore.name(), off), Disabled);
    assert_eq!(logstore.config(), config);
    assert_revoked(try_put(&logstore, "never in plaintext"), Disabled);
    assert_revoked(try_texts(&logstore), Disabled);
    let all: Vec<u8> = files(&world.store_dir()).into_values().flatten().collect();
    assert!(memchr::memmem::find(&all, b"never in plaintext").is_none());
}

// ---- opening a Logstore, and the number of calls ----

#[test]
fn opening_with_a_dead_kms_works_and_calls_nothing() {
    let world = World::manual();
    let (store, logstore) = opened(&world);
    let service = world.service(&store, "p/service");
    put(&service, "service");
    let spec = LogstoreSpec::default().ttl_days(1);
    let plain = store.create_logstore(&name("p/plain"), spec).unwrap();
    put(&plain, "old");
    store.close().unwrap();
    drop((logstore, service, plain));

    world.kms.answer(Answer::Unreachable);
    let calls = world.kms.calls();
    let store = world.open();
    assert_eq!(store.list().unwrap().len(), 3);
    let logstore = store.logstore(&name("p/l")).unwrap();
    assert_eq!(logstore.key_status().state, KeyState::Idle);
    assert_eq!(logstore.status().unwrap().groups, 1);
    logstore.config();
    // Another Logstore, retention and keyless verification still work.
    put(&store.logstore(&name("p/service")).unwrap(), "more");
    world.clock.advance(secs(60));
    store.tick();
    assert!(store.admin().apply_retention().unwrap().segments == 0);
    let keyless = VerifyOptions::default().keyless(true);
    assert!(store.admin().verify(&keyless, &mut |_| {}).unwrap().is_clean());
    assert_eq!(world.kms.calls(), calls);
    assert_unreachable(try_texts(&logstore));
    assert_eq!(world.kms.calls(), calls + 1);
    world.kms.answer(Answer::Real);
    world.clock.advance(secs(30));
    assert_eq!(texts(&logstore), ["first"]);
}

#[test]
fn a_missing_kms_is_an_outage_for_its_logstores_only() {
    let world = World::manual();
    let (store, _) = opened(&world);
    let service = world.service(&store, "p/service");
    put(&service, "service");
    store.close().unwrap();
    let store = Store::builder(world.store_dir(), world.keyring(), envelog::crypto::AwsLc::new())
        .open()
        .unwrap();
    let error = try_texts(&store.logstore(&name("p/l")).unwrap()).unwrap_err();
    assert!(
        matches!(&error, Error::KmsUnreachable { .. }) && error.to_string().contains(REGION),
        "{error}"
    );
    assert_eq!(texts(&store.logstore(&name("p/service")).unwrap()), ["service"]);
}

/// `ENVELOG_CROWD` sets the number of Logstores, a thousand by default.
#[test]
fn a_thousand_logstores_share_one_renewal_per_period() {
    let world = World::manual_in_memory();
    let store = world.create();
    let cmk = world.cmk();
    let count = std::env::var("ENVELOG_CROWD")
        .map_or(1000, |count| count.parse::<u64>().expect("a number"));
    let logstores: Vec<_> =
        (0..count).map(|n| world.byok(&store, &format!("p/l{n}"), &cmk)).collect();
    assert_eq!(store.keys().renewal_calls(), 0);
    // At first use, each Logstore unwraps its own envelope once, and one of them probes for the
    // lease.
    let calls = world.kms.calls();
    for logstore in &logstores {
        logstore.append(record("x"), &buffered()).unwrap();
    }
    assert_eq!(world.kms.calls() - calls, count + 1);
    assert_eq!(store.keys().renewal_calls(), 1);
    let calls = world.kms.calls();
    let mut periods = 0;
    for _ in 0..10 {
        world.clock.advance(world.options.revalidate_every);
        store.tick();
        periods += 1;
        for logstore in logstores.iter().step_by(100) {
            logstore.append(record("y"), &written()).unwrap();
        }
    }
    println!("{count} Logstores: {} calls in {periods} periods", world.kms.calls() - calls);
    assert_eq!(world.kms.calls() - calls, periods);
    assert_eq!(store.keys().renewal_calls(), 1 + periods);
    // One refusal stops all of them, and one success restores all of them.
    disable(&world);
    world.clock.advance(world.options.revalidate_every);
    store.tick();
    for logstore in logstores.iter().step_by(50) {
        assert_revoked(try_put(logstore, "z"), Disabled);
    }
    world.kms.answer(Answer::Real);
    world.clock.advance(world.options.revalidate_every);
    store.tick();
    for logstore in logstores.iter().step_by(50) {
        put(logstore, "z");
    }
}

#[test]
fn no_calls_are_made_for_a_master_key_that_nobody_uses_any_more() {
    let world = World::manual();
    let store = world.create();
    let (old, new) = (world.cmk(), world.cmk());
    let logstore = world.byok(&store, "p/l", &old);
    let deleted = world.byok(&store, "p/deleted", &world.cmk());
    put(&logstore, "one");
    put(&deleted, "one");
    store.keys().replace_cmk(logstore.name(), new, ReplaceCmk::default()).unwrap();
    put(&logstore, "two");
    store.delete_logstore(deleted.name()).unwrap();
    drop(deleted);
    world.clock.advance(secs(30));
    let probes = world.kms.probes();
    store.tick();
    assert_eq!(world.kms.probes(), probes + 1);
}

#[test]
fn a_read_only_opener_is_refused_too_and_recovers() {
    let world = World::manual();
    let (store, logstore) = opened(&world);
    put(&logstore, "second");
    let reading = world.builder().open_read_only().unwrap();
    let beside = reading.logstore(&name("p/l")).unwrap();
    let mut reader = beside.read(0, &ReadOptions::default()).unwrap();
    assert_eq!(&reader.next().unwrap().unwrap().bytes[..], b"first");
    disable(&world);
    world.clock.advance(secs(31));
    reading.tick();
    assert_revoked(reader.next().unwrap(), Disabled);
    assert_revoked(beside.read(0, &ReadOptions::default()), Disabled);
    assert_eq!(beside.key_status().state, KeyState::Revoked { reason: Disabled });
    // A read-only process writes nothing, not even to the audit log.
    assert!(!events(&store).contains(&AuditEvent::Revoked));
    world.kms.answer(Answer::Real);
    world.clock.advance(secs(30));
    reading.tick();
    assert_eq!(texts(&beside), ["first", "second"]);
}

// ---- in real time, with threads ----

fn quick() -> World {
    let mut world = World::threads();
    world.options.revalidate_every = millis(100);
    world.options.kms_timeout = millis(100);
    world.options.outage_grace = millis(600);
    world
}

#[test]
fn threads_notice_a_revocation_and_recover_by_themselves() {
    let world = quick();
    let store = world.create();
    let cmk = world.cmk();
    let logstore = world.byok(&store, "p/l", &cmk);
    let other = world.service(&store, "p/other");
    put(&logstore, "one");
    let mut tail = logstore.read(0, &ReadOptions::default().from(Position::End)).unwrap();
    logstore.append(record("two"), &buffered()).unwrap();
    world.local().disable(&cmk.cmk_key_id).unwrap();
    let revoked = Instant::now();
    eventually("the revocation is noticed", || events(&store).contains(&AuditEvent::Revoked));
    assert_revoked(try_put(&logstore, "refused"), Disabled);
    assert!(tail.any(|record| matches!(record, Err(Error::Revoked { .. }))));
    put(&other, "fine");
    assert!(revoked.elapsed() < secs(15));
    world.local().enable(&cmk.cmk_key_id).unwrap();
    eventually("the recovery", || events(&store).contains(&AuditEvent::Recovered));
    put(&logstore, "three");
    assert_eq!(texts(&logstore), ["one", "two", "three"]);
    store.close().unwrap();
}

#[test]
fn writers_lose_nothing_acknowledged_while_the_key_toggles() {
    let world = quick();
    let store = world.create();
    let cmk = world.cmk();
    let logstore = world.byok(&store, "p/l", &cmk);
    let stop = Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = (0..3)
        .map(|writer| {
            let (logstore, stop) = (logstore.clone(), Arc::clone(&stop));
            thread::spawn(move || {
                let options = [buffered(), written(), synced()][writer];
                let mut acknowledged = Vec::new();
                for n in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let text = format!("{writer}-{n}");
                    match logstore.append(record(&text), &options) {
                        Ok(appended) => acknowledged.push((appended.seq, text)),
                        Err(error) => assert!(matches!(error, Error::Revoked { .. }), "{error}"),
                    }
                    thread::sleep(millis(1));
                }
                acknowledged
            })
        })
        .collect();
    for _ in 0..4 {
        thread::sleep(millis(150));
        world.local().disable(&cmk.cmk_key_id).unwrap();
        eventually("refused", || logstore.read(0, &ReadOptions::default()).is_err());
        world.local().enable(&cmk.cmk_key_id).unwrap();
        eventually("back", || logstore.read(0, &ReadOptions::default()).is_ok());
    }
    stop.store(true, Ordering::Relaxed);
    let mut expected: Vec<_> =
        writers.into_iter().flat_map(|writer| writer.join().unwrap()).collect();
    expected.sort_unstable();
    logstore.sync().unwrap();
    let found: Vec<_> = records(&logstore, 0)
        .unwrap()
        .into_iter()
        .map(|record| (record.seq, String::from_utf8(record.bytes.to_vec()).unwrap()))
        .collect();
    assert!(found.is_sorted());
    for acknowledged in &expected {
        assert!(found.binary_search(acknowledged).is_ok(), "{acknowledged:?} is missing");
    }
    store.close().unwrap();
}

#[test]
fn a_kms_that_hangs_does_not_hang_callers() {
    let world = quick();
    let store = world.create();
    let cmk = world.cmk();
    let logstore = world.byok(&store, "p/l", &cmk);
    put(&logstore, "one");
    world.kms.answer(Answer::Hang);
    // During the grace period callers succeed, then they get an error. No caller waits long.
    let mut slowest = Duration::ZERO;
    eventually("the lease ends", || {
        let began = Instant::now();
        let ended = try_put(&logstore, "riding").is_err();
        slowest = slowest.max(began.elapsed());
        ended
    });
    assert!(slowest < secs(5), "{slowest:?}");
    assert_unreachable(try_put(&logstore, "x"));
    assert_unreachable(logstore.revalidate_now());
    world.service(&store, "p/service").append(record("fine"), &synced()).unwrap();
    world.kms.answer(Answer::Real);
    eventually("it recovers", || try_put(&logstore, "back").is_ok());
    world.kms.answer(Answer::Hang);
    // Closing does not wait for the KMS either.
    let began = Instant::now();
    store.close().unwrap();
    assert!(began.elapsed() < secs(5));
    world.kms.answer(Answer::Real);
}

/// The KMS answers lease probes, but hangs on the Logstore's own envelope and on a new one.
#[test]
fn a_kms_that_hangs_over_a_data_key_does_not_hang_callers() {
    let mut world = quick();
    world.options.outage_grace = secs(60);
    let store = world.create();
    let cmk = world.cmk();
    let logstore = world.byok(&store, "p/l", &cmk);
    put(&logstore, "one");
    let second = world.byok(&store, "p/second", &cmk);
    world.kms.answer_for_data_keys(Answer::Hang);
    let began = Instant::now();
    assert_unreachable(try_put(&second, "x"));
    assert_unreachable(store.keys().rotate_data_key(logstore.name()));
    let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::byok(EncryptType::Sm4, cmk));
    assert_unreachable(store.create_logstore(&name("p/third"), spec));
    assert!(began.elapsed() < secs(10));
    put(&logstore, "two");
    world.kms.answer(Answer::Real);
    put(&second, "x");
    assert_eq!(texts(&logstore), ["one", "two"]);
    store.close().unwrap();
}

#[test]
fn nobody_waits_for_a_revocation_to_be_dealt_with_for_ever() {
    let world = quick();
    let store = world.create();
    let cmk = world.cmk();
    let logstore = world.byok(&store, "p/l", &cmk);
    put(&logstore, "one");
    let tickets: Vec<_> =
        (0..50).map(|n| logstore.submit(record(&format!("{n}")), &synced()).unwrap()).collect();
    world.local().disable(&cmk.cmk_key_id).unwrap();
    assert_revoked(logstore.revalidate_now(), Disabled);
    for ticket in tickets {
        match ticket.wait() {
            Ok(_) => {}
            Err(error) => assert!(matches!(error, Error::Revoked { .. }), "{error}"),
        }
    }
    store.close().unwrap();
}

/// A small number of threads renews any number of master keys. A refused master key is handled
/// separately.
#[test]
fn many_master_keys_are_renewed_by_few_threads() {
    const KEYS: usize = 80;
    let mut world = World::threads();
    world.options.revalidate_every = millis(200);
    let store = world.create();
    let logstores: Vec<_> = (0..KEYS).map(|n| (n, world.cmk())).collect();
    let logstores: Vec<_> = logstores
        .iter()
        .map(|(n, cmk)| (world.byok(&store, &format!("p/l{n}"), cmk), cmk.clone()))
        .collect();
    for (logstore, _) in &logstores {
        put(logstore, "first");
    }
    let began = world.kms.probes();
    let deadline = Instant::now() + secs(60);
    while world.kms.probes() < began + 3 * KEYS as u64 {
        assert!(Instant::now() < deadline, "{} renewals", world.kms.probes() - began);
        thread::sleep(millis(10));
    }
    #[cfg(target_os = "linux")]
    {
        let named = |task: std::fs::DirEntry| {
            std::fs::read_to_string(task.path().join("comm")).unwrap_or_default()
        };
        let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| named(task.unwrap()));
        // The count includes threads of other tests in this process.
        let count = tasks.filter(|name| name.trim() == "envelog-lease").count();
        assert!((1..=64).contains(&count), "{count} threads");
    }
    let (refused, others) = logstores.split_first().unwrap();
    world.local().disable(&refused.1.cmk_key_id).unwrap();
    while refused.0.key_status().state != (KeyState::Revoked { reason: Disabled }) {
        assert!(Instant::now() < deadline);
        thread::sleep(millis(10));
    }
    assert_revoked(try_put(&refused.0, "refused"), Disabled);
    others.iter().for_each(|(logstore, _)| put(logstore, "second"));
}
