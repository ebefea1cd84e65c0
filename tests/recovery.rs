//! Failing disks, crashes and power losses: the latch, the surviving data, and the recovery of a
//! shard.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeSet,
    io,
    sync::{Arc, Mutex},
};

use common::{
    disk::{Op, Sim, Survives, Verdict},
    *,
};
use envelog::{
    AppendOptions, Durability, EncryptConf, EncryptType, Error, ErrorKind, Logstore, LogstoreSpec,
    Position, ReadOptions, Record, Result, ShardChoice, Store,
    admin::VerifyOptions,
    crypto::HashAlg,
    inspect::{BlockHeader, SegmentHeader},
    io::Disk as _,
};

/// The number of sequence numbers that a segment reserves.
const RESERVED: u64 = 1 << 32;

const SURVIVALS: [Survives; 4] = [
    Survives::Everything,
    Survives::Synced,
    Survives::Some { seed: 1 },
    Survives::Some { seed: 2 },
];

fn to_shard(shard: u32, durability: Durability) -> AppendOptions {
    AppendOptions::default().shard(ShardChoice::Shard(shard)).durability(durability)
}

/// A requested append and its outcome.
#[derive(Clone)]
struct Asked {
    text: String,
    durability: Durability,
    result: Result<u64>,
}

impl std::fmt::Debug for Asked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:.16} ({:?}): {:?}",
            self.text,
            self.durability,
            self.result.as_ref().map_err(Error::code)
        )
    }
}

impl Asked {
    fn done(&self, at_least: Durability) -> bool {
        self.result.is_ok() && self.durability >= at_least
    }
}

fn ask(logstore: &Logstore, text: String, durability: Durability, asked: &mut Vec<Asked>) {
    let result =
        logstore.append(record(&text), &to_shard(0, durability)).map(|appended| appended.seq);
    asked.push(Asked { text, durability, result });
}

/// Checks that the found records are requested ones, in order and without repetition, and that
/// every acknowledged record that must have survived is present under its number.
#[track_caller]
fn assert_kept(found: &[Record], asked: &[Asked], survives: Durability, context: &str) {
    let texts = strings(found);
    let short: Vec<&str> = texts.iter().map(|text| &text[..text.len().min(16)]).collect();
    let mut rest = asked.iter();
    for (record, text) in found.iter().zip(&texts) {
        let Some(origin) = rest.find(|asked| asked.text == *text) else {
            panic!(
                "{context}: {text:.16?} is out of order, twice there, or was never asked for; found {short:?}"
            )
        };
        if let Ok(seq) = origin.result {
            assert_eq!(record.seq, seq, "{context}: {text:.16}");
        }
    }
    for asked in asked.iter().filter(|asked| asked.done(survives)) {
        assert!(
            texts.contains(&asked.text),
            "{context}: {asked:?} was acknowledged and is lost; found {short:?}"
        );
    }
    assert!(
        found.is_sorted_by(|a, b| a.seq < b.seq),
        "{context}: the numbers do not increase; found {short:?}"
    );
}

#[track_caller]
fn assert_clean(store: &Store, context: &str) {
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean(), "{context}: {:?}", report.faults);
}

// ---- a failing operation ----

const MIXED: [Durability; 4] =
    [Durability::Synced, Durability::Written, Durability::Buffered, Durability::Written];

fn small_segments(sim: &mut Sim) {
    sim.world.options.segment_bytes = 4 << 10;
}

/// Appends of all kinds, over several segments, while time passes.
fn work(sim: &Sim, store: &Store, logstore: &Logstore, asked: &mut Vec<Asked>) {
    for n in 0..8 {
        // Incompressible.
        let text = format!(
            "{n} {}",
            (0..300)
                .map(|i| format!("{:x}", (i * 7919 + n * 104_729) % 65_521))
                .collect::<String>()
        );
        ask(logstore, text, MIXED[n % MIXED.len()], asked);
        if n % 3 == 2 {
            sim.world.clock.advance(millis(1500));
            store.tick();
        }
    }
}

/// If any operation on a shard's files fails, only that shard stops. It reports the error, can
/// still be read, and continues after it is reopened.
#[test]
fn a_failed_operation_latches_only_its_shard_until_reopened() {
    for done_first in [false, true] {
        let mut hit = BTreeSet::new();
        for nth in 1.. {
            let mut sim = Sim::new();
            small_segments(&mut sim);
            let store = sim.create();
            let spec = LogstoreSpec::default().shard_count(2);
            let logstore = store.create_logstore(&name("p/l"), spec).unwrap();
            let mut asked = Vec::new();
            ask(&logstore, "first".into(), Durability::Synced, &mut asked);
            let mut count = 0;
            let failed = Arc::new(Mutex::new(None));
            let failed_op = failed.clone();
            sim.disk.on_call(move |call| {
                count += u64::from(call.op.changes() && call.is_about("shard-0000"));
                if count == nth && call.op.changes() && call.is_about("shard-0000") {
                    *failed_op.lock().unwrap() = Some(call.op);
                    return if done_first {
                        Verdict::DoneAndFail
                    } else {
                        Verdict::Fail(io::ErrorKind::Other)
                    };
                }
                Verdict::Go
            });
            work(&sim, &store, &logstore, &mut asked);
            let Some(op) = *failed.lock().unwrap() else {
                assert!(asked.iter().all(|asked| asked.result.is_ok()));
                assert!(logstore.status().unwrap().segments >= 3);
                break;
            };
            hit.insert(format!("{op:?}"));
            let context = format!("operation {nth} ({op:?}, done first: {done_first})");

            // The shard is latched, even if no caller waited, and returns the error on every
            // append.
            assert!(logstore.status().unwrap().latched.is_some(), "{context}");
            for _ in 0..2 {
                let error = logstore
                    .append(record("refused"), &to_shard(0, Durability::Written))
                    .unwrap_err();
                assert!(matches!(&error, Error::Latched { shard: 0, .. }), "{context}: {error}");
                assert_eq!(error.kind(), ErrorKind::Io);
                assert!(matches!(logstore.sync(), Err(Error::Latched { .. })), "{context}");
            }
            for asked in &asked {
                let expected = |error: &Error| {
                    matches!(error, Error::Io { .. } | Error::Latched { shard: 0, .. })
                };
                assert!(asked.result.as_ref().err().is_none_or(expected), "{context}: {asked:?}");
            }
            // Reads continue to work, and so does the other shard.
            assert_kept(&records(&logstore, 0).unwrap(), &asked, Durability::Written, &context);
            logstore.append(record("elsewhere"), &to_shard(1, Durability::Synced)).unwrap();

            // After a power loss at this point, the synced data is present.
            let after_a_cut = Arc::new(sim.disk.crash(Survives::Synced));
            let reopened = sim.world.builder().disk(after_a_cut).open().unwrap();
            assert_kept(
                &records(&find(&reopened), 0).unwrap(),
                &asked,
                Durability::Synced,
                &context,
            );
            reopened.close().unwrap();

            // After reopening, it continues.
            sim.disk.heal();
            logstore.reopen_shard(0).unwrap();
            ask(&logstore, "after".into(), Durability::Synced, &mut asked);
            assert!(asked.last().unwrap().result.is_ok(), "{context}: {asked:?}");
            assert_eq!(logstore.status().unwrap().latched, None);
            work(&sim, &store, &logstore, &mut asked);
            let found = records(&logstore, 0).unwrap();
            assert_kept(&found, &asked, Durability::Written, &context);
            assert_clean(&store, &context);
            store.close().unwrap();
            let store = sim.open();
            let logstore = store.logstore(&name("p/l")).unwrap();
            assert_eq!(records(&logstore, 0).unwrap(), found, "{context}");
            assert_clean(&store, &context);
        }
        let expected = ["Create", "Rename", "Sync", "SyncDir", "Write"].map(str::to_owned);
        assert_eq!(hit, BTreeSet::from(expected));
    }
}

// ---- a crash ----

/// A short history of a store with an existing Logstore `p/l`. Operations may fail.
fn live(sim: &Sim, store: Store, asked: &mut Vec<Asked>) {
    let Ok(logstore) = store.logstore(&name("p/l")) else { return };
    let spec = || LogstoreSpec::default().encrypt_conf(EncryptConf::service_key(EncryptType::Sm4));
    ask(&logstore, "life 1".into(), Durability::Synced, asked);
    work(sim, &store, &logstore, asked);
    if let Ok(doomed) = store.create_logstore(&name("p/doomed"), spec()) {
        let _ = try_put(&doomed, "doomed");
    }
    let _ = store.keys().rotate_data_key(logstore.name());
    ask(&logstore, "life 2".into(), Durability::Buffered, asked);
    ask(&logstore, "life 3".into(), Durability::Written, asked);
    let _ = store.admin().checkpoint();
    let _ = logstore.roll();
    ask(&logstore, "life 4".into(), Durability::Synced, asked);
    let _ = store.delete_logstore(&name("p/doomed"));
    let _ = store.keys().rotate_service_key();
    ask(&logstore, "life 5".into(), Durability::Written, asked);
    let _ = store.close();
}

/// The crash happens at every single operation in turn, in each variant.
#[test]
fn a_crash_at_any_operation_loses_nothing_that_was_acknowledged() {
    let mut prepared = Sim::new();
    small_segments(&mut prepared);
    let store = prepared.create();
    let logstore = prepared.world.service(&store, "p/l");
    let mut before = Vec::new();
    ask(&logstore, "before".into(), Durability::Synced, &mut before);
    store.close().unwrap();
    for nth in 1.. {
        let mut sim = Sim::of(prepared.world, prepared.disk.crash(Survives::Everything));
        let mut asked = before.clone();
        let store = sim.open();
        sim.disk.end_at(nth);
        let began = sim.disk.changes();
        live(&sim, store, &mut asked);
        let whole = sim.disk.changes() - began < nth;
        let ended = sim.disk;
        for survives in SURVIVALS {
            let context = format!("operation {nth}, {survives:?}");
            sim.disk = ended.crash(survives);
            let store = sim.builder().open().unwrap_or_else(|error| panic!("{context}: {error}"));
            let logstore =
                store.logstore(&name("p/l")).unwrap_or_else(|error| panic!("{context}: {error}"));
            let kept = if survives == Survives::Everything || whole {
                Durability::Written
            } else {
                Durability::Synced
            };
            assert_kept(&records(&logstore, 0).unwrap(), &asked, kept, &context);
            // The first append recovers the shard. Its number is not one that a caller has seen.
            let mut asked = asked.clone();
            ask(&logstore, "after".into(), Durability::Synced, &mut asked);
            let given: Vec<u64> =
                asked.iter().filter_map(|asked| asked.result.clone().ok()).collect();
            assert!(
                given.is_sorted_by(|a, b| a < b),
                "{context}: a number was given twice: {asked:?}"
            );
            assert_kept(&records(&logstore, 0).unwrap(), &asked, kept, &context);
            assert!(asked.last().unwrap().result.is_ok(), "{context}: {asked:?}");
            assert_clean(&store, &context);
            // The other Logstore is present or absent, without an intermediate state.
            match store.logstore(&name("p/doomed")) {
                Ok(doomed) => put(&doomed, "still usable"),
                Err(error) => {
                    assert!(matches!(error, Error::LogstoreMissing(_)), "{context}: {error}");
                    assert_only_listed_logstores_have_files(&sim, &store, &context);
                }
            }
            store.close().unwrap();
        }
        prepared.world = sim.world;
        if whole {
            assert!(nth > 60, "only {nth} operations");
            return;
        }
    }
}

#[track_caller]
fn assert_only_listed_logstores_have_files(sim: &Sim, store: &Store, context: &str) {
    let dirs = sim.disk.list_dir(&sim.world.store_dir().join("logstores")).unwrap().len();
    assert_eq!(dirs, store.list().unwrap().len(), "{context}");
}

/// The creation of a store is interrupted at every operation. Afterwards the store exists, or can
/// be created.
#[test]
fn a_creation_that_was_interrupted_can_be_done_again() {
    for nth in 1.. {
        let mut sim = Sim::new();
        sim.disk.end_at(nth);
        let created = sim.builder().create();
        let whole = created.is_ok() && sim.disk.changes() < nth;
        drop(created);
        let ended = sim.disk;
        for survives in SURVIVALS {
            sim.disk = ended.crash(survives);
            let store = match sim.builder().open() {
                Err(Error::StoreMissing { .. } | Error::NotAStore { .. }) => {
                    assert!(!whole, "{survives:?}");
                    // The engine never overwrites a keyring: the operator has to remove it, knowing
                    // that no store uses it.
                    match sim.builder().create() {
                        Err(Error::KeyringExists { path }) => {
                            sim.disk.remove_file(&path).unwrap();
                            sim.create()
                        }
                        created => created.unwrap_or_else(|error| {
                            panic!("operation {nth}, {survives:?}: {error}")
                        }),
                    }
                }
                opened => {
                    opened.unwrap_or_else(|error| panic!("operation {nth}, {survives:?}: {error}"))
                }
            };
            put(&sim.world.service(&store, "p/l"), "works");
        }
        if whole {
            assert!(nth > 10);
            return;
        }
    }
}

/// A Logstore after a crash: two records below the durable mark, and three above it, the last of
/// them torn.
fn crashed() -> (Sim, Vec<Asked>) {
    let mut sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    let mut asked = Vec::new();
    for (text, durability) in [
        ("a", Durability::Synced),
        ("b", Durability::Synced),
        ("c", Durability::Written),
        ("d", Durability::Written),
        ("torn", Durability::Written),
    ] {
        ask(&logstore, text.into(), durability, &mut asked);
    }
    sim.crash(Survives::Everything);
    let segment = sim.segments(&logstore, 0).remove(0);
    sim.disk.edit(&segment, |bytes| bytes.truncate(bytes.len() - 5));
    let torn = asked.pop().unwrap();
    asked.push(Asked { durability: Durability::Buffered, ..torn });
    (sim, asked)
}

fn find(store: &Store) -> Logstore {
    store.logstore(&name("p/l")).unwrap()
}

#[test]
fn a_torn_tail_is_dropped_and_valid_blocks_are_rewritten() {
    let (sim, _) = crashed();
    let store = sim.open();
    let logstore = find(&store);
    let old = sim.segments(&logstore, 0);
    let before = sim.disk.bytes(&old[0]);
    // Reading changes nothing.
    assert_eq!(texts(&logstore), ["a", "b", "c", "d"]);
    assert_eq!(logstore.status().unwrap().recovery, []);
    assert_eq!(sim.segments(&logstore, 0), old);
    // The first append recovers the shard and starts at the reserved limit.
    let appended = logstore.append(record("e"), &synced()).unwrap();
    assert!(appended.seq >= RESERVED);
    let found = records(&logstore, 0).unwrap();
    assert_eq!(strings(&found), ["a", "b", "c", "d", "e"]);
    assert_eq!(
        found.iter().map(|record| record.seq).collect::<Vec<_>>(),
        [0, 1, 2, 3, appended.seq]
    );
    let notices = logstore.status().unwrap().recovery;
    assert_eq!(notices.len(), 1);
    assert_eq!(
        (notices[0].shard, &notices[0].segment, notices[0].groups_rewritten),
        (0, &old[0], 2)
    );
    assert!(notices[0].bytes_dropped > 0);
    // The old segment is unchanged.
    assert_eq!(sim.disk.bytes(&old[0]), before);
    let segments = sim.segments(&logstore, 0);
    assert_eq!(segments.len(), 3);
    // The recovery segment begins at the first rewritten record.
    assert!(segments[1].to_str().unwrap().contains("-00000000000000000002-"), "{segments:?}");
    // A record that is now in two files is counted once.
    assert_eq!(logstore.status().unwrap().groups, 5);
    assert_clean(&store, "recovered");
    // The rewritten records are durable, regardless of the state of the page cache.
    let after = Sim::of(sim.world, sim.disk.crash(Survives::Synced));
    let logstore = find(&after.open());
    assert_eq!(texts(&logstore), ["a", "b", "c", "d", "e"]);
}

/// A read error is not damage: repair discards no data because of it.
#[test]
fn a_repair_that_cannot_read_repairs_nothing() {
    let (sim, _) = crashed();
    let store = sim.open();
    let segments = sim.segments(&find(&store), 0);
    let mut failed = 0;
    for nth in 0..30 {
        let mut reads = 0;
        sim.disk.on_call(move |call| {
            reads += u64::from(call.op == Op::Read && call.is_about(".seg"));
            if call.op == Op::Read && reads == nth + 1 {
                Verdict::Fail(io::ErrorKind::Other)
            } else {
                Verdict::Go
            }
        });
        match store.admin().repair(&name("p/l"), 0, &Default::default()) {
            Ok(report) => assert_eq!(report.segment, None),
            Err(error) => {
                assert!(matches!(error, Error::Io { .. }), "{error}");
                failed += 1;
            }
        }
    }
    assert!(failed > 2, "{failed} reads failed");
    sim.disk.heal();
    assert_eq!(sim.segments(&find(&store), 0), segments);
    assert_eq!(texts(&find(&store)), ["a", "b", "c", "d"]);
}

/// Recovery reports rewritten groups and dropped bytes separately, and reports nothing if it
/// changed nothing.
#[test]
fn recovery_reports_rewritten_and_dropped_data_separately() {
    let told = |sim: &Sim| -> Vec<(u64, u64)> {
        let store = sim.open();
        let logstore = find(&store);
        put(&logstore, "e");
        let notices = logstore.status().unwrap().recovery;
        notices.iter().map(|notice| (notice.groups_rewritten, notice.bytes_dropped)).collect()
    };
    // Two complete blocks above the mark, with no bytes after them.
    let (sim, _) = crashed();
    let segment = sim.segments(&find(&sim.open()), 0).remove(0);
    let end = block_offsets(&sim.disk.bytes(&segment))[3].end;
    sim.disk.edit(&segment, |bytes| bytes.truncate(end));
    assert_eq!(told(&sim), [(2, 0)]);
    // A mark that covers all preceding data, followed by ten bytes of a block or none.
    for torn in [10, 0] {
        let mut sim = Sim::new();
        let store = sim.create();
        let logstore = sim.world.service(&store, "p/l");
        put(&logstore, "a");
        sim.world.clock.advance(secs(2));
        store.tick();
        sim.crash(Survives::Everything);
        let segment = sim.segments(&find(&sim.open()), 0).remove(0);
        sim.disk.edit(&segment, |bytes| bytes.extend([0x5a; 10].iter().take(torn)));
        assert_eq!(told(&sim), if torn > 0 { vec![(0, 10)] } else { vec![] });
    }
}

/// Unsynced blocks reach the disk in any order. A hole above the mark is therefore part of a torn
/// tail, and only its own records are lost.
#[test]
fn a_hole_above_the_mark_costs_only_what_is_in_it() {
    let (sim, _) = crashed();
    let segment = sim.segments(&find(&sim.open()), 0).remove(0);
    let blocks = block_offsets(&sim.disk.bytes(&segment));
    sim.disk.edit(&segment, |bytes| bytes[blocks[2].start..blocks[2].end].fill(0));
    let store = sim.open();
    let logstore = find(&store);
    assert_eq!(texts(&logstore), ["a", "b"]);
    put(&logstore, "e");
    assert_eq!(texts(&logstore), ["a", "b", "d", "e"]);
    // Zeros at the end count as bytes that were never written. The last byte of the torn block is
    // random, so it may be one.
    let bytes = sim.disk.bytes(&segment);
    let torn = bytes[blocks[3].end..].iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1);
    let notices = logstore.status().unwrap().recovery;
    assert_eq!(notices[0].groups_rewritten, 1);
    assert_eq!(
        notices[0].bytes_dropped,
        (blocks[2].len() + torn) as u64,
        "the hole and the torn block, no more"
    );
    assert_clean(&store, "recovered");
}

/// The ranges of the complete blocks of a segment without a footer.
fn block_offsets(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let header = SegmentHeader::decode(bytes).unwrap();
    let mut found = Vec::new();
    let mut at = header.body_start as usize;
    while let Ok(block) = BlockHeader::decode(&bytes[at..]) {
        let end = at + block.block_len() as usize;
        if end > bytes.len() {
            break;
        }
        found.push(at..end);
        at = end;
    }
    found
}

#[test]
fn damage_below_the_mark_is_corruption_until_it_is_repaired() {
    for (broken, kept) in [(0, ["b", "c", "d"]), (1, ["a", "c", "d"])] {
        let (sim, _) = crashed();
        let store = sim.open();
        let other = sim.world.service(&store, "p/other");
        let logstore = find(&store);
        let segment = sim.segments(&logstore, 0).remove(0);
        let range = block_offsets(&sim.disk.bytes(&segment))[broken].clone();
        sim.disk.edit(&segment, |bytes| bytes[range.end - 30] ^= 1);
        let before = sim.disk.files(&sim.world.logstore_dir(&logstore));
        for _ in 0..2 {
            let error = try_put(&logstore, "refused").unwrap_err();
            match &error {
                Error::Corrupt { at, .. } => {
                    assert_eq!(
                        (&at.file, at.offset, at.block),
                        (&segment, range.start as u64, Some(broken as u32))
                    );
                }
                other => panic!("{other}"),
            }
            assert!(matches!(try_texts(&logstore), Err(Error::Corrupt { .. })));
        }
        assert_eq!(sim.disk.files(&sim.world.logstore_dir(&logstore)), before);
        let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
        assert!(report.faults.iter().any(|fault| fault.code == "corrupt"), "{:?}", report.faults);
        put(&other, "undisturbed");

        // Repair keeps the readable data and reports the discarded data, and the sequence numbers
        // continue.
        let report = store.admin().repair(logstore.name(), 0, &Default::default()).unwrap();
        let lost = range.len() as u64;
        assert_eq!((report.shard, report.segment.as_ref()), (0, Some(&segment)));
        assert!(report.bytes_lost > lost, "the broken block and the torn tail: {report:?}");
        let appended = logstore.append(record("e"), &synced()).unwrap();
        assert!(appended.seq >= RESERVED, "{appended:?}");
        let found = records(&logstore, 0).unwrap();
        assert_eq!(strings(&found), [kept[0], kept[1], kept[2], "e"]);
        assert!(found.is_sorted_by(|a, b| a.seq < b.seq));
        store.close().unwrap();
        let store = sim.open();
        assert_eq!(records(&find(&store), 0).unwrap(), found);
        assert_clean(&store, "repaired");
        // A second repair has nothing to do.
        assert_eq!(
            store.admin().repair(&name("p/l"), 0, &Default::default()).unwrap().segment,
            None
        );
        put(&find(&store), "f");
    }
}

/// Recovery is interrupted at each of its operations. The next recovery gives the same result.
#[test]
fn recovery_can_be_interrupted_anywhere_and_comes_to_the_same() {
    let (prepared, asked) = crashed();
    let image = prepared.disk;
    let mut world = prepared.world;
    for nth in 1.. {
        let mut sim = Sim::of(world, image.crash(Survives::Everything));
        let mut asked = asked.clone();
        let store = sim.open();
        let logstore = find(&store);
        sim.disk.end_at(nth);
        let began = sim.disk.changes();
        // Record the number if the append gets far enough to assign one.
        let during = logstore.submit(record("during"), &synced());
        let seq = during.as_ref().ok().map(|ticket| ticket.appended().unwrap().seq);
        let result = during.and_then(|ticket| ticket.wait()).map(|appended| appended.seq);
        asked.push(Asked { text: "during".into(), durability: Durability::Synced, result });
        let whole = sim.disk.changes() - began < nth;
        assert_eq!(asked.last().unwrap().result.is_ok(), whole);
        let ended = sim.disk;
        for survives in SURVIVALS {
            let context = format!("operation {nth}, {survives:?}");
            sim.disk = ended.crash(survives);
            let store = sim.open();
            let logstore = find(&store);
            let mut asked = asked.clone();
            ask(&logstore, "after".into(), Durability::Synced, &mut asked);
            let found = records(&logstore, 0).unwrap();
            assert_kept(&found, &asked, Durability::Synced, &context);
            if survives == Survives::Everything {
                assert_eq!(strings(&found)[..4], ["a", "b", "c", "d"], "{context}");
            }
            let after = *asked
                .last()
                .unwrap()
                .result
                .as_ref()
                .unwrap_or_else(|error| panic!("{context}: {error}"));
            assert!(after >= RESERVED, "{context}: {after} may have been used before the crash");
            assert!(seq.is_none_or(|seq| after > seq), "{context}: {after} was given before");
            assert_clean(&store, &context);
            // A further crash and opening give the same result.
            sim.crash(Survives::Synced);
            assert_eq!(records(&find(&sim.open()), 0).unwrap(), found, "{context}");
        }
        world = sim.world;
        if whole {
            assert!(nth > 10);
            return;
        }
    }
}

/// The same within one process: an operation of recovery fails, and reopening the shard recovers
/// again.
#[test]
fn a_failed_recovery_is_repeated_when_the_shard_is_reopened() {
    let (prepared, asked) = crashed();
    let image = prepared.disk;
    let mut world = prepared.world;
    for nth in 1.. {
        for done_first in [false, true] {
            let sim = Sim::of(world, image.crash(Survives::Everything));
            let context = format!("operation {nth}, done first: {done_first}");
            let mut asked = asked.clone();
            let store = sim.open();
            let logstore = find(&store);
            let at = sim.disk.changes() + nth;
            sim.disk.on_call(move |call| {
                match (call.op.changes() && call.number == at, done_first) {
                    (false, _) => Verdict::Go,
                    (true, true) => Verdict::DoneAndFail,
                    (true, false) => Verdict::Fail(io::ErrorKind::Other),
                }
            });
            ask(&logstore, "during".into(), Durability::Synced, &mut asked);
            let whole = sim.disk.changes() < at;
            assert_eq!(asked.last().unwrap().result.is_ok(), whole, "{context}");
            assert_eq!(texts(&logstore)[..4], ["a", "b", "c", "d"], "{context}");
            sim.disk.heal();
            logstore.reopen_shard(0).unwrap();
            ask(&logstore, "after".into(), Durability::Synced, &mut asked);
            let found = records(&logstore, 0).unwrap();
            assert_kept(&found, &asked, Durability::Synced, &context);
            assert!(*asked.last().unwrap().result.as_ref().unwrap() >= RESERVED, "{context}");
            store.close().unwrap();
            let store = sim.open();
            assert_eq!(records(&find(&store), 0).unwrap(), found, "{context}");
            assert_clean(&store, &context);
            world = sim.world;
            if whole {
                return;
            }
        }
    }
}

/// One second after the last sync, a mark block records the durable end of the segment, so that
/// damage below it is not mistaken for a torn tail.
#[test]
fn a_second_of_idleness_after_a_sync_is_marked() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "only");
    let segment = sim.segments(&logstore, 0).remove(0);
    let tick = |by: u64| {
        sim.world.clock.advance(millis(by));
        store.tick();
        block_offsets(&sim.disk.bytes(&segment)).len()
    };
    assert_eq!(tick(999), 1);
    assert_eq!(tick(2), 2);
    // Only one mark is written.
    assert_eq!((tick(2000), tick(5000)), (2, 2));
    assert_eq!(texts(&logstore), ["only"]);

    // Without the mark, damage to the only block looks like a torn tail. With it, it is corruption.
    for marked in [false, true] {
        let disk = sim.disk.crash(Survives::Everything);
        let block = block_offsets(&disk.bytes(&segment))[0].clone();
        disk.edit(&segment, |bytes| {
            bytes[block.end - 30] ^= 1;
            if !marked {
                bytes.truncate(block.end);
            }
        });
        let store = sim.world.builder().disk(Arc::new(disk)).open().unwrap();
        let logstore = find(&store);
        match try_put(&logstore, "next") {
            Err(Error::Corrupt { .. }) => assert!(marked),
            put => {
                put.unwrap();
                assert!(!marked);
                assert_eq!(texts(&logstore), ["next"]);
            }
        }
    }
}

/// Removing a file becomes durable later. A power loss before that brings the file back, without
/// other effects.
#[test]
fn dropped_segments_that_a_power_loss_restores_are_removed() {
    let mut sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    for text in ["a", "b", "c"] {
        put(&logstore, text);
        logstore.roll().unwrap();
    }
    let dropped = sim.segments(&logstore, 0);
    put(&logstore, "d");
    let config = logstore.config().retention_bytes(1);
    store.update_logstore(logstore.name(), config).unwrap();
    assert_eq!(store.admin().apply_retention().unwrap().segments, 3);
    sim.crash(Survives::Synced);
    assert_eq!(sim.segments(&logstore, 0)[..3], dropped, "they are back");
    let store = sim.open();
    let logstore = find(&store);
    assert_eq!(texts(&logstore), ["d"]);
    assert_clean(&store, "before recovery");
    put(&logstore, "e");
    assert_eq!(texts(&logstore), ["d", "e"]);
    assert!(!sim.segments(&logstore, 0).iter().any(|path| dropped.contains(path)));
    assert_clean(&store, "after recovery");
}

/// If retention is interrupted at any point, it has dropped whole segments from the front, and the
/// shard continues.
#[test]
fn retention_can_be_interrupted_anywhere() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    for text in ["a", "b", "c", "d"] {
        put(&logstore, text);
        logstore.roll().unwrap();
    }
    drop(logstore);
    store.close().unwrap();
    let (image, mut world) = (sim.disk, sim.world);
    for nth in 1.. {
        let mut sim = Sim::of(world, image.crash(Survives::Everything));
        let store = sim.open();
        let config = find(&store).config().retention_bytes(1);
        store.update_logstore(&name("p/l"), config).unwrap();
        sim.disk.end_at(nth);
        let began = sim.disk.changes();
        let done = store.admin().apply_retention();
        let whole = sim.disk.changes() - began < nth;
        // A file that cannot be removed is reported and left for the next run.
        let complete = done.as_ref().is_ok_and(|report| report.left == 0);
        assert_eq!(complete, whole, "operation {nth}: {done:?}");
        let ended = sim.disk;
        for survives in SURVIVALS {
            let context = format!("operation {nth}, {survives:?}");
            sim.disk = ended.crash(survives);
            let store = sim.open();
            let logstore = find(&store);
            let kept = texts(&logstore);
            assert!(
                ["a", "b", "c", "d"].map(str::to_owned).ends_with(&kept),
                "{context}: {kept:?}"
            );
            let appended = logstore.append(record("e"), &synced()).unwrap();
            assert!(appended.seq >= 4, "{context}: {appended:?}");
            assert_eq!(texts(&logstore), [kept, vec!["e".into()]].concat(), "{context}");
            assert_clean(&store, &context);
            store.admin().apply_retention().unwrap();
            assert_eq!(texts(&logstore), ["e"], "{context}");
            assert_clean(&store, &context);
        }
        world = sim.world;
        if whole {
            assert_eq!(done.unwrap().segments, 3);
            return;
        }
    }
}

// ---- the survival of each durability ----

#[test]
fn what_each_durability_survives() {
    let mut sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "synced");
    logstore.append(record("written"), &written()).unwrap();
    logstore.append(record("buffered"), &buffered()).unwrap();
    let running = sim.disk.clone();
    let survivors = |sim: &Sim| {
        let logstore = find(&sim.open());
        let read = texts(&logstore);
        put(&logstore, "next");
        assert_eq!(texts(&logstore), [read.clone(), vec!["next".into()]].concat());
        read
    };
    sim.crash(Survives::Everything);
    assert_eq!(survivors(&sim), ["synced", "written"]);
    sim.disk = running.crash(Survives::Synced);
    assert_eq!(survivors(&sim), ["synced"]);
    // A clean close makes all data durable.
    store.close().unwrap();
    sim.disk = running.crash(Survives::Synced);
    assert_eq!(survivors(&sim), ["synced", "written", "buffered"]);
}

/// A sync makes everything durable, including data written by a killed process or before a failed
/// sync.
#[test]
fn a_sync_covers_earlier_processes_and_failed_syncs() {
    let mut sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "synced");
    logstore.append(record("written"), &written()).unwrap();
    sim.disk.fail_next(Op::Sync, ".seg", io::ErrorKind::Other);
    logstore.sync().unwrap_err();
    logstore.reopen_shard(0).unwrap();
    logstore.sync().unwrap();
    let after_a_cut = |sim: &Sim| {
        let disk = sim.disk.crash(Survives::Synced);
        texts(&find(&sim.world.builder().disk(Arc::new(disk)).open().unwrap()))
    };
    assert_eq!(after_a_cut(&sim), ["synced", "written"]);
    logstore.append(record("more"), &written()).unwrap();
    sim.disk = sim.disk.kill();
    let store = sim.open();
    assert_eq!(after_a_cut(&sim), ["synced", "written"]);
    let logstore = find(&store);
    // The sync fails if recovery fails, and succeeds after the shard is reopened.
    sim.disk.fail_next(Op::Sync, ".tmp", io::ErrorKind::Other);
    assert!(matches!(logstore.sync(), Err(Error::Io { op: "sync", .. })));
    assert!(matches!(logstore.sync(), Err(Error::Latched { .. })));
    logstore.reopen_shard(0).unwrap();
    logstore.sync().unwrap();
    assert_eq!(after_a_cut(&sim), ["synced", "written", "more"]);
    // A sync with nothing to do creates no segment.
    let segments = sim.segments(&logstore, 0);
    logstore.sync().unwrap();
    store.close().unwrap();
    find(&sim.open()).sync().unwrap();
    assert_eq!(sim.segments(&logstore, 0), segments);
    let store = sim.open();
    put(&find(&store), "last");
    assert_eq!(texts(&find(&store)), ["synced", "written", "more", "last"]);
    assert_clean(&store, "synced");
}

/// Recovery's segment is complete, but its name may not be durable yet. A sync makes it durable.
#[test]
fn a_sync_makes_the_name_durable_that_a_failed_recovery_left() {
    for killed in [false, true] {
        let mut sim = Sim::new();
        let store = sim.create();
        put(&sim.world.service(&store, "p/l"), "synced");
        find(&store).append(record("written"), &written()).unwrap();
        sim.disk = sim.disk.kill();
        let mut store = sim.open();
        sim.disk.fail_next(Op::SyncDir, "shard-", io::ErrorKind::Other);
        assert!(matches!(
            try_put(&find(&store), "next"),
            Err(Error::Io { op: "sync", .. } | Error::Latched { .. })
        ));
        if killed {
            sim.disk = sim.disk.kill();
            store = sim.open();
        } else {
            find(&store).reopen_shard(0).unwrap();
        }
        find(&store).sync().unwrap();
        sim.crash(Survives::Synced);
        assert_eq!(texts(&find(&sim.open())), ["synced", "written"], "killed: {killed}");
    }
}

/// If the disk does not perform a sync, the data is lost. This shows that the simulated disk can
/// lose data at all.
#[test]
fn a_disk_that_skips_syncs_loses_data_detectably() {
    let mut sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "kept");
    store.admin().checkpoint().unwrap();
    sim.crash(Survives::Synced);
    assert_eq!(texts(&find(&sim.open())), ["kept"]);
    let segment = sim.segments(&logstore, 0).remove(0);
    let len = sim.disk.bytes(&segment).len();
    sim.disk.edit(&segment, |bytes| bytes.truncate(len - 1));
    assert!(matches!(
        try_put(&find(&sim.open()), "next"),
        Err(Error::Truncated { .. } | Error::Corrupt { .. })
    ));
}

// ---- sequence numbers ----

#[test]
fn numbers_skip_the_reserve_only_after_an_unclean_end() {
    let mut sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    let next = |store: &Store| find(store).append(record("x"), &synced()).unwrap().seq;
    assert_eq!((next(&store), next(&store)), (0, 1));
    logstore.roll().unwrap();
    assert_eq!(next(&store), 2);
    store.close().unwrap();
    let mut store = sim.open();
    assert_eq!(next(&store), 3);
    for unclean in 1..4 {
        sim.crash(Survives::Synced);
        store = sim.open();
        let seq = next(&store);
        assert!(seq >= unclean * RESERVED, "{seq}");
        assert_eq!(
            records(&find(&sim.builder().open_read_only().unwrap()), 0).unwrap().len(),
            4 + unclean as usize
        );
    }
}

/// A crash between two segments: numbers of groups that were queued when their segment was sealed
/// are not assigned again.
#[test]
fn a_crash_between_two_segments_reuses_no_queued_number() {
    let mut sim = Sim::new();
    small_segments(&mut sim);
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    let filler: String = (0..6000u32).map(|n| char::from(b'!' + (n * n % 89) as u8)).collect();
    let big: Vec<u8> = filler
        .bytes()
        .zip(0u32..)
        .map(|(byte, n)| byte ^ (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    logstore.append(envelog::Payload::opaque(big).unwrap(), &synced()).unwrap();
    let queued = logstore.append(record("buffered"), &buffered()).unwrap();
    // The old segment is sealed, and the new one cannot be created.
    sim.disk.on_call(|call| match call.op == Op::Create && call.is_about(".tmp") {
        true => Verdict::Fail(io::ErrorKind::StorageFull),
        false => Verdict::Go,
    });
    sim.world.clock.advance(millis(100));
    store.tick();
    assert!(logstore.status().unwrap().latched.is_some());
    sim.crash(Survives::Everything);
    let appended = find(&sim.open()).append(record("after"), &synced()).unwrap();
    assert!(appended.seq > queued.seq, "{} was given before", appended.seq);
}

// ---- zeros after the last block ----

/// A store left by a killed process, with an encrypted and an unencrypted Logstore, each with one
/// open segment.
fn killed_world() -> (World, [std::path::PathBuf; 2]) {
    let world = World::manual();
    let store = world.create();
    let plain = store.create_logstore(&name("p/plain"), LogstoreSpec::default()).unwrap();
    let logstores = [world.service(&store, "p/aes"), plain];
    for logstore in &logstores {
        put(logstore, "first");
        put(logstore, "second");
    }
    let killed = world.path().join("killed");
    copy_dir(&world.store_dir(), &killed);
    let open =
        logstores.each_ref().map(|logstore| segments(&world.logstore_dir(logstore), 0).remove(0));
    drop((logstores, store));
    copy_dir(&killed, &world.store_dir());
    (world, open)
}

fn extend(path: &std::path::Path, zeros: u64) {
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.set_len(file.metadata().unwrap().len() + zeros).unwrap();
}

#[track_caller]
fn assert_spotless(store: &Store, context: &str) {
    for keyless in [false, true] {
        let report =
            store.admin().verify(&VerifyOptions::default().keyless(keyless), &mut |_| {}).unwrap();
        assert!(report.is_clean() && report.notes.is_empty(), "{context}: {report:?}");
    }
}

/// Zeros after the last block of an open segment are unwritten space.
#[test]
fn an_open_segment_ends_before_its_zeros() {
    for zeros in [1, 95, 4096, (1 << 20) + 3, 5 << 20] {
        let (world, open) = killed_world();
        let lens = open.each_ref().map(|path| std::fs::metadata(path).unwrap().len());
        open.iter().for_each(|path| extend(path, zeros));
        let context = format!("{zeros} zeros");
        let read_only = world.builder().open_read_only().unwrap();
        for text in ["p/aes", "p/plain"] {
            let logstore = read_only.logstore(&name(text)).unwrap();
            assert_eq!(texts(&logstore), ["first", "second"], "{context}");
            assert_eq!(records_from(&logstore, 0, Position::End).unwrap(), [], "{context}");
        }
        assert_spotless(&read_only, &context);
        let checkpoint = read_only.admin().checkpoint().unwrap();
        drop(read_only);

        let store = world.open();
        assert_spotless(&store, &context);
        for text in ["p/aes", "p/plain"] {
            let logstore = store.logstore(&name(text)).unwrap();
            put(&logstore, "third");
            assert_eq!(texts(&logstore), ["first", "second", "third"], "{context}");
            // The last synced record has no mark and is rewritten. The zeros do not count as
            // dropped bytes.
            let recovery = logstore.status().unwrap().recovery;
            let found: Vec<_> = recovery
                .iter()
                .map(|notice| (notice.groups_rewritten, notice.bytes_dropped))
                .collect();
            assert_eq!(found, [(1, 0)], "{context}");
        }
        assert_spotless(&store, &context);
        store.close().unwrap();
        // The segment that recovery cut is unchanged.
        for (path, len) in open.iter().zip(lens) {
            assert_eq!(std::fs::metadata(path).unwrap().len(), len + zeros, "{context}");
        }
        let store = world.builder().open_read_only().unwrap();
        let options = VerifyOptions::default().against(checkpoint);
        let report = store.admin().verify(&options, &mut |_| {}).unwrap();
        assert!(report.is_clean(), "{context}: {report:?}");
    }
}

/// Damage before the zeros is still distinguished from unwritten space.
#[test]
fn zeros_hide_no_damage() {
    let (world, open) = killed_world();
    for path in &open {
        let mut bytes = std::fs::read(path).unwrap();
        let first = SegmentHeader::decode(&bytes).unwrap().body_start as usize;
        let len = BlockHeader::decode(&bytes[first..]).unwrap().block_len() as usize;
        bytes[first..first + len].fill(0);
        write_private(path, bytes);
        extend(path, 2 << 20);
    }
    let store = world.builder().open_read_only().unwrap();
    for (keyless, text) in
        [(false, "p/aes"), (true, "p/aes"), (false, "p/plain"), (true, "p/plain")]
    {
        let options = VerifyOptions::default().keyless(keyless).logstore(name(text));
        let faults = store.admin().verify(&options, &mut |_| {}).unwrap().faults;
        assert_eq!(
            faults.iter().map(|fault| fault.code).collect::<Vec<_>>(),
            ["corrupt"],
            "{text}: {faults:?}"
        );
        assert!(try_texts(&store.logstore(&name(text)).unwrap()).is_err(), "{text}");
    }
}

/// The file was extended ahead of the blocks. A reader in another process follows it, and sealing
/// makes it end with its footer.
#[test]
fn a_file_that_is_longer_than_its_blocks_is_followed_and_sealed() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/aes");
    put(&logstore, "first");
    let path = segments(&world.logstore_dir(&logstore), 0).remove(0);
    extend(&path, 3 << 20);
    let other = world.builder().open_read_only().unwrap();
    let followed = other.logstore(&name("p/aes")).unwrap();
    let mut reader = followed.read(0, &ReadOptions::default()).unwrap();
    let mut next = || reader.try_next().unwrap().map(|record| strings(&[record]).remove(0));
    assert_eq!((next(), next()), (Some("first".to_owned()), None));
    for text in ["second", "third"] {
        put(&logstore, text);
        assert_eq!((next(), next()), (Some(text.to_owned()), None));
    }
    assert_spotless(&other, "while it is written");
    let long = std::fs::metadata(&path).unwrap().len();
    logstore.roll().unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert!((bytes.len() as u64) < long && bytes.ends_with(b"SEAL"));
    put(&logstore, "fourth");
    assert_eq!((next(), next()), (Some("fourth".to_owned()), None));
    store.close().unwrap();
    assert_eq!(texts(&followed), ["first", "second", "third", "fourth"]);
    assert_spotless(&other, "when it is closed");
}

// ---- the payload hash ----

/// A Logstore stores its payload hash. Changing it begins a new segment, also after a crash. Each
/// segment is verified with its own hash.
#[test]
fn a_changed_payload_hash_is_that_of_new_segments() {
    let world = World::manual();
    let store = world.create();
    let spec = LogstoreSpec::default().payload_hash(HashAlg::Sm3);
    let logstore = store
        .create_logstore(
            &name("p/l"),
            spec.encrypt_conf(EncryptConf::service_key(EncryptType::Aes)),
        )
        .unwrap();
    put(&logstore, "first");
    let update = |payload_hash| {
        let config = store.logstore(&name("p/l")).unwrap().config().payload_hash(payload_hash);
        store.update_logstore(&name("p/l"), config).unwrap();
    };
    // Another setting changes: the segment continues.
    let config = store.logstore(&name("p/l")).unwrap().config().ttl_days(9);
    store.update_logstore(&name("p/l"), config).unwrap();
    put(&logstore, "second");
    update(HashAlg::Sha256);
    put(&logstore, "third");
    let dir = world.logstore_dir(&logstore);
    let hashes = || {
        let header = |path: &std::path::PathBuf| {
            SegmentHeader::decode(&std::fs::read(path).unwrap()).unwrap().header
        };
        segments(&dir, 0).iter().map(|path| header(path).payload_hash).collect::<Vec<_>>()
    };
    assert_eq!(hashes(), [HashAlg::Sm3, HashAlg::Sha256]);
    let kept = |payload_hash| {
        let json = serde_json::to_value(store.logstore(&name("p/l")).unwrap().config()).unwrap();
        assert_eq!(json.get("payload_hash"), payload_hash);
    };
    kept(None);
    // The block is written but not synced when the process is killed, so recovery rewrites it under
    // the new hash.
    logstore.append(record("fourth"), &written()).unwrap();
    update(HashAlg::Sm3);
    kept(Some(&"sm3".into()));
    let killed = world.path().join("killed");
    copy_dir(&world.store_dir(), &killed);
    drop((logstore, store));
    copy_dir(&killed, &world.store_dir());
    let store = world.open();
    let logstore = store.logstore(&name("p/l")).unwrap();
    put(&logstore, "fifth");
    assert_eq!(texts(&logstore), ["first", "second", "third", "fourth", "fifth"]);
    assert_eq!(hashes(), [HashAlg::Sm3, HashAlg::Sha256, HashAlg::Sm3, HashAlg::Sm3]);
    store.close().unwrap();
    assert_spotless(&world.builder().open_read_only().unwrap(), "when it is closed");
}
