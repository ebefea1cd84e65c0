//! Sequence numbers are never used twice, and no append that failed is ever taken for one that succeeded.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::fs;

use common::{
    Answer, World, assert_revoked, buffered, copy_dir, disk::Sim, millis, name, record, records, secs, segments,
    strings, synced, texts, written,
};
use envelog::{Error, kms::RevokedReason::Disabled};

/// Numbers that were read before a crash are gone for good, also when the next crash comes before recovery has done more than
/// put the rewritten segment in place.
#[test]
fn numbers_that_were_read_before_a_crash_are_not_given_out_again_after_a_second_one() {
    let mut world = World::manual();
    world.options.block_bytes = 4 << 10;
    let store = world.create();
    let logstore = world.service(&store, "shop/orders");
    let texts_written: Vec<String> = (0..6).map(|n| format!("order {n}")).collect();
    let last = texts_written.iter().map(|text| logstore.append(record(text), &written()).unwrap().seq).max().unwrap();
    assert_eq!(strings(&records(&logstore, 0).unwrap()), texts_written);
    // Power fails: nothing of it was synced, and the last block did not reach the disk in full.
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
    // It fails again, when the rewritten segment has its name and the next one does not.
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

/// A segment has been sealed, and the key for the next one is out of reach: what a checkpoint notes of the shard then leaves no room for
/// numbers that are given out later without a segment that reserves them.
#[test]
fn numbers_are_not_given_out_without_a_segment_behind_a_checkpoint() {
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
    store.checkpoint().unwrap();
    given
        .extend((0..3).filter_map(|_| logstore.append(record("later"), &buffered()).ok()).map(|appended| appended.seq));
    // The process dies with all that in memory.
    let disk = sim.disk.kill();
    drop((logstore, store));
    sim.disk = disk;
    sim.world.kms.answer(Answer::Real);
    let store = sim.open();
    let appended = store.logstore(&name("shop/orders")).unwrap().append(record("after"), &synced()).unwrap();
    assert!(given.iter().all(|seq| appended.seq > *seq), "{} was given out before: {given:?}", appended.seq);
}

/// A repair ends what is damaged; the handle that asked for it appends behind it.
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
    let middle = bytes.windows(4).enumerate().filter(|(_, window)| window == b"EBLK").nth(1).unwrap().0;
    bytes[middle + 100] ^= 1;
    fs::write(&damaged, &bytes).unwrap();

    let store = world.open();
    let logstore = store.logstore(&name("shop/orders")).unwrap();
    let refused = logstore.append(record("too early"), &synced()).unwrap_err();
    assert!(matches!(refused, Error::Corrupt { .. }), "{refused}");
    let report = store.repair(&name("shop/orders"), 0).unwrap();
    assert_eq!((report.groups_salvaged, report.segment.as_ref()), (1, Some(&damaged)));
    assert!(logstore.append(record("d"), &synced()).unwrap().seq > 2);
    assert_eq!(texts(&logstore), ["a", "c", "d"]);
    drop((logstore, store));
    let store = world.open();
    let logstore = store.logstore(&name("shop/orders")).unwrap();
    assert!(logstore.append(record("e"), &synced()).unwrap().seq > 3);
    assert_eq!(texts(&logstore), ["a", "c", "d", "e"]);
}

/// More appends fail than anybody would think to remember; then the key comes back, and others succeed.
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
    let expected: Vec<String> = ["first".to_owned()].into_iter().chain(kept).chain(["last".to_owned()]).collect();
    assert_eq!(texts(&logstore), expected);
}

/// What a refused Logstore keeps in memory takes no room from the others.
#[test]
fn a_refused_logstore_holds_no_part_of_the_memory_that_others_wait_for() {
    let mut sim = Sim::new();
    sim.world.options.pending_bytes_max = 1 << 20;
    let store = sim.create();
    let world = &sim.world;
    let cmk = world.cmk();
    let (refused, other) = (world.byok(&store, "shop/orders", &cmk), world.service(&store, "shop/carts"));
    refused.append(record("first"), &synced()).unwrap();
    // The next block needs a new segment, whose key cannot be had: what is acknowledged now can only wait.
    sim.lose_key_at_the_next_roll(&store, &refused, Answer::Revoked(Disabled));
    let text = "x".repeat(300 << 10);
    let accepted = (0..100).take_while(|_| refused.append(record(&text), &buffered()).is_ok()).count();
    assert!(accepted >= 3);
    store.tick();
    for _ in 0..4 {
        other.append(record(&text), &written()).unwrap();
    }
    assert_eq!(records(&other, 0).unwrap().len(), 4);
    world.kms.answer(Answer::Real);
    refused.revalidate_now().unwrap();
    refused.append(record("last"), &written()).unwrap();
    assert_eq!(records(&refused, 0).unwrap().len(), accepted + 2);
}
