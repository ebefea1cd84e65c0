//! Sequence numbers are never reused, and a failed append is never mistaken for a successful one.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;

use common::{
    Answer, World, assert_revoked, buffered, copy_dir, disk::Sim, millis, name, record, records,
    secs, segments, strings, synced, texts, written,
};
use envelog::{Error, kms::RevokedReason::Disabled};

/// Numbers that a reader saw before a crash are not assigned again. This holds also if the next
/// crash comes right after recovery put the rewritten segment in place.
#[test]
fn numbers_read_before_a_crash_are_not_reused_after_two() {
    let mut world = World::manual();
    world.options.block_bytes = 4 << 10;
    let store = world.create();
    let logstore = world.service(&store, "shop/orders");
    let texts_written: Vec<String> = (0..6).map(|n| format!("order {n}")).collect();
    let last = texts_written
        .iter()
        .map(|text| logstore.append(record(text), &written()).unwrap().seq)
        .max()
        .unwrap();
    assert_eq!(strings(&records(&logstore, 0).unwrap()), texts_written);
    // A power loss: no data was synced, and the last block is torn.
    let crashed = world.path().join("crashed");
    copy_dir(&world.store_dir(), &crashed);
    let dir = world.logstore_dir(&logstore);
    drop((logstore, store));
    copy_dir(&crashed, &world.store_dir());
    let torn = segments(&dir, 0).pop().unwrap();
    let file = fs::OpenOptions::new().write(true).open(&torn).unwrap();
    file.set_len(file.metadata().unwrap().len() - 3).unwrap();

    let store = world.open();
    let logstore = store.logstore(&name("shop/orders")).unwrap();
    logstore.append(record("after"), &written()).unwrap();
    assert_eq!(logstore.status().unwrap().recovery[0].groups_rewritten, 5);
    // Another power loss: the rewritten segment has its name, and the next segment does not.
    copy_dir(&world.store_dir(), &crashed);
    drop((logstore, store));
    copy_dir(&crashed, &world.store_dir());
    let kept = segments(&dir, 0);
    assert_eq!(kept.len(), 3);
    fs::remove_file(&kept[2]).unwrap();

    let store = world.open();
    let logstore = store.logstore(&name("shop/orders")).unwrap();
    let appended = logstore.append(record("again"), &written()).unwrap();
    assert!(appended.seq > last, "{} was read before the crash", appended.seq);
    assert_eq!(texts(&logstore), [&texts_written[..5], &["again".to_owned()]].concat());
}

/// A segment has been sealed, and the key for the next one is inaccessible. The head that a
/// checkpoint records then must not allow numbers to be assigned later without a segment that
/// reserves them.
#[test]
fn after_a_checkpoint_every_number_needs_a_reserving_segment() {
    let mut sim = Sim::new();
    sim.world.options.block_bytes = 4 << 10;
    let store = sim.create();
    let logstore = sim.world.byok(&store, "shop/orders", &sim.world.cmk());
    logstore.append(record("first"), &synced()).unwrap();
    sim.lose_key_at_the_next_roll(&store, &logstore, Answer::Unreachable);
    let mut given = vec![logstore.append(record("waits"), &buffered()).unwrap().seq];
    sim.world.clock.advance(millis(100));
    store.tick();
    assert_eq!(sim.segments(&logstore, 0).len(), 1);
    store.admin().checkpoint().unwrap();
    given.extend(
        (0..3)
            .filter_map(|_| logstore.append(record("later"), &buffered()).ok())
            .map(|appended| appended.seq),
    );
    // The process dies with these groups in memory.
    let disk = sim.disk.kill();
    drop((logstore, store));
    sim.disk = disk;
    sim.world.kms.answer(Answer::Real);
    let store = sim.open();
    let appended =
        store.logstore(&name("shop/orders")).unwrap().append(record("after"), &synced()).unwrap();
    assert!(
        given.iter().all(|seq| appended.seq > *seq),
        "{} was given out before: {given:?}",
        appended.seq
    );
}

/// After a repair, the handle that requested it appends after the kept data.
#[test]
fn appends_after_a_repair_go_on_behind_what_was_kept() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "shop/orders");
    for text in ["a", "b", "c"] {
        logstore.append(record(text), &synced()).unwrap();
    }
    world.clock.advance(secs(2));
    store.tick();
    let crashed = world.path().join("crashed");
    copy_dir(&world.store_dir(), &crashed);
    let dir = world.logstore_dir(&logstore);
    drop((logstore, store));
    copy_dir(&crashed, &world.store_dir());
    let damaged = segments(&dir, 0).pop().unwrap();
    let mut bytes = fs::read(&damaged).unwrap();
    let middle =
        bytes.windows(4).enumerate().filter(|(_, window)| window == b"EBLK").nth(1).unwrap().0;
    bytes[middle + 100] ^= 1;
    fs::write(&damaged, &bytes).unwrap();

    let store = world.open();
    let logstore = store.logstore(&name("shop/orders")).unwrap();
    let refused = logstore.append(record("too early"), &synced()).unwrap_err();
    assert!(matches!(refused, Error::Corrupt { .. }), "{refused}");
    let report = store.admin().repair(&name("shop/orders"), 0, &Default::default()).unwrap();
    assert_eq!((report.groups_salvaged, report.segment.as_ref()), (1, Some(&damaged)));
    assert!(logstore.append(record("d"), &synced()).unwrap().seq > 2);
    assert_eq!(texts(&logstore), ["a", "c", "d"]);
    drop((logstore, store));
    let store = world.open();
    let logstore = store.logstore(&name("shop/orders")).unwrap();
    assert!(logstore.append(record("e"), &synced()).unwrap().seq > 3);
    assert_eq!(texts(&logstore), ["a", "c", "d", "e"]);
}

/// Thousands of tickets fail while the key is revoked. They stay failed after the key is enabled
/// and later appends succeed.
#[test]
fn tickets_of_a_refused_flood_stay_refused_when_the_key_is_back() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let logstore = world.byok(&store, "shop/orders", &cmk);
    logstore.append(record("first"), &written()).unwrap();
    let submit = |n: u32| {
        let kind = if n % 2 == 1 { buffered() } else { written() };
        logstore.submit(record(&n.to_string()), &kind).unwrap()
    };
    let tickets: Vec<_> = (0..10_000).map(submit).collect();
    world.kms.answer(Answer::Revoked(Disabled));
    world.clock.advance(secs(31));
    store.tick();
    world.kms.answer(Answer::Real);
    logstore.revalidate_now().unwrap();
    logstore.append(record("last"), &written()).unwrap();
    for (n, ticket) in (0..).zip(tickets) {
        let acknowledged = n % 2 == 1;
        match acknowledged {
            true => assert!(ticket.wait().is_ok(), "{n}"),
            false => assert_revoked(ticket.wait(), Disabled),
        }
    }
    let kept = (0..10_000).filter(|n| n % 2 == 1).map(|n| n.to_string());
    let expected: Vec<String> =
        ["first".to_owned()].into_iter().chain(kept).chain(["last".to_owned()]).collect();
    assert_eq!(texts(&logstore), expected);
}

/// The buffered groups of a refused Logstore do not use up the memory budget of the others: neither
/// before the loss of the key is noticed, nor after they are lost with it.
#[test]
fn a_refused_logstore_uses_no_memory_budget_of_others() {
    let mut sim = Sim::new();
    sim.world.options.pending_bytes_max = 1 << 20;
    let store = sim.create();
    let world = &sim.world;
    let cmk = world.cmk();
    let (refused, other) =
        (world.byok(&store, "shop/orders", &cmk), world.service(&store, "shop/carts"));
    refused.append(record("first"), &synced()).unwrap();
    // The next block needs a new segment, whose key is inaccessible, so no segment can take the
    // acknowledged groups.
    sim.lose_key_at_the_next_roll(&store, &refused, Answer::Revoked(Disabled));
    let text = "x".repeat(300 << 10);
    let accepted =
        (0..100).take_while(|_| refused.append(record(&text), &buffered()).is_ok()).count();
    assert!(accepted >= 3);
    store.tick();
    for _ in 0..4 {
        other.append(record(&text), &written()).unwrap();
    }
    assert_eq!(records(&other, 0).unwrap().len(), 4);
    world.kms.answer(Answer::Real);
    refused.revalidate_now().unwrap();
    refused.append(record("last"), &written()).unwrap();
    assert_eq!(store.metrics().groups_lost, accepted as u64);
    assert_eq!(strings(&records(&refused, 0).unwrap()), ["first", "last"]);
}
