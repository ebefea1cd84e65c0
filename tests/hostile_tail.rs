//! Fake structures in logged data, or forged after the end of a segment, never stop a shard and
//! never hide damage.
#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use common::{
    disk::{Op, Sim, Survives, Verdict},
    *,
};
use envelog::{
    Compression, EncryptConf, EncryptType, Error, Logstore, LogstoreSpec, Payload, Store,
    admin::VerifyOptions,
    inspect::{
        BlockHeader, BlockKind, DecodedFooter, Footer, Predecessor, PredecessorEnd, SegmentHeader,
    },
};

const NAME: &str = "p/l";
/// The length of tag and CRC32, which follow a block's payload.
const SUFFIX: usize = 20;

/// The origin of the fake bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    /// A log producer: the bytes are in a log line, which is stored verbatim without encryption and
    /// compression.
    LogLine,
    /// An attacker who can write the file: the bytes are in the torn tail of an encrypted segment.
    Disk,
}

fn find(store: &Store) -> Logstore {
    store.logstore(&name(NAME)).unwrap()
}

fn create(by: By) -> (Sim, Logstore) {
    let sim = Sim::new();
    let store = sim.create();
    let spec = LogstoreSpec::default().compression(Compression::None);
    let spec = match by {
        By::LogLine => spec,
        By::Disk => spec.encrypt_conf(EncryptConf::service_key(EncryptType::Aes)),
    };
    let logstore = store.create_logstore(&name(NAME), spec).unwrap();
    (sim, logstore)
}

/// The offsets and headers of the complete blocks of a segment.
fn blocks(bytes: &[u8]) -> Vec<(usize, BlockHeader)> {
    let mut at = SegmentHeader::decode(bytes).unwrap().body_start as usize;
    let mut found = Vec::new();
    while let Ok(block) = BlockHeader::decode(&bytes[at..]) {
        found.push((at, block));
        at += block.block_len() as usize;
    }
    found
}

/// A complete fake block with this segment's identity and a correct CRC32.
fn fake_block(like: &BlockHeader, number: u32, mark: u64) -> Vec<u8> {
    let header = BlockHeader {
        kind: BlockKind::Opaque,
        compression: Compression::None,
        number,
        payload_len: 60,
        raw_len: 60,
        group_count: 1,
        log_count: 0,
        list_len: 56,
        first_seq: like.end_seq() + 50,
        durable_mark: mark,
        ..*like
    };
    let mut bytes = [&header.encode()[..], &[0x45; 60], &[0xfa; 16], &[0; 4]].concat();
    fix_crc(&mut bytes);
    bytes
}

/// A fake footer.
fn fake_footer(like: &BlockHeader, offset: u64) -> Vec<u8> {
    let footer = Footer {
        segment_tag: like.segment_tag,
        block_count: 0,
        group_count: 0,
        log_count: 0,
        raw_bytes: 0,
        end_seq: 0,
        first_time_us: 0,
        last_time_us: 0,
        offset,
        nonce_random: [7; 8],
        recovered: false,
        body: [8; 32],
        index: Vec::new(),
    };
    footer.finish(footer.encode(), &[0xfa; 16])
}

/// A shard after a crash: two synced records, and a torn block whose payload contains the bytes
/// from `make`. Its arguments are the header of the last complete block, the offset of the torn
/// block, and the offset of the fake bytes. A complete, unsynced block follows.
fn torn(by: By, make: impl Fn(&BlockHeader, usize, usize) -> Vec<u8>) -> Sim {
    let (mut sim, logstore) = create(by);
    put(&logstore, "first");
    put(&logstore, "second");
    let segment = sim.segments(&logstore, 0).remove(0);
    let bytes = sim.disk.bytes(&segment);
    let (at, like) = *blocks(&bytes).last().unwrap();
    let carrier = bytes.len();
    assert_eq!(carrier, at + like.block_len() as usize);
    let inside = carrier + BlockHeader::LEN + 40;
    let line = make(&like, carrier, inside);
    // The record is preceded by one byte and its length as a varint.
    let framing = match line.len() + 80 {
        ..=127 => 2,
        128..=16_383 => 3,
        _ => 4,
    };
    let record = [&[b'.'; 40][framing..], &line, &[b'.'; 40]].concat();
    logstore.append(Payload::opaque(record).unwrap(), &written()).unwrap();
    logstore.append(common::record("unsynced"), &written()).unwrap();
    sim.crash(Survives::Everything);
    sim.disk.edit(&segment, |bytes| {
        if by == By::Disk {
            bytes[inside..inside + line.len()].copy_from_slice(&line);
        }
        assert!(bytes[inside..inside + line.len()] == line, "it is in the file as it was logged");
        bytes[carrier + BlockHeader::LEN + 5] ^= 1;
    });
    sim
}

/// Checks that everything works and that no synced or complete record is lost.
#[track_caller]
fn assert_works(sim: &Sim, kept: &[&str], context: &str) {
    let verified = |store: &Store, when: &str| {
        let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
        assert!(report.is_clean(), "{context}, {when}: {:?}", report.faults);
    };
    let store = sim.open();
    let logstore = find(&store);
    assert_eq!(texts(&logstore), ["first", "second"], "{context}");
    logstore.status().unwrap();
    verified(&store, "before recovery");
    assert_eq!(
        store.admin().repair(&name(NAME), 0, &Default::default()).unwrap().segment,
        None,
        "{context}"
    );
    put(&logstore, "next");
    let expected = [kept, &["next"]].concat();
    assert_eq!(texts(&logstore), expected, "{context}");
    verified(&store, "after recovery");
    assert_eq!(
        store.admin().repair(&name(NAME), 0, &Default::default()).unwrap().segment,
        None,
        "{context}"
    );
    store.close().unwrap();
    let logstore = find(&sim.open());
    assert_eq!(texts(&logstore), expected, "{context}");
}

/// Opens a copy of the setup, which other tests can continue to use.
fn again(sim: &Sim) -> Store {
    sim.world
        .builder()
        .disk(std::sync::Arc::new(sim.disk.crash(Survives::Everything)))
        .open()
        .unwrap()
}

#[test]
fn a_block_in_a_torn_block_does_not_stop_the_shard() {
    for by in [By::LogLine, By::Disk] {
        type Mark = fn(usize, usize) -> u64;
        let marks: [(&str, Mark); 5] = [
            ("at the header's end", |_, _| 0),
            ("at the torn block", |carrier, _| carrier as u64),
            ("within the torn block", |carrier, _| carrier as u64 + 1),
            ("at itself", |_, inside| inside as u64),
            ("beyond itself", |_, _| u64::MAX),
        ];
        for (what, mark) in marks {
            for number in [2, 3, 1000, u32::MAX - 1] {
                let sim = torn(by, |like, carrier, inside| {
                    let mark = if mark(carrier, inside) == 0 {
                        like.durable_mark
                    } else {
                        mark(carrier, inside)
                    };
                    fake_block(like, number, mark)
                });
                let context = format!("{by:?}, the mark {what}, number {number}");
                // Without a key the fake block is accepted, if its mark could be true.
                let keyless = VerifyOptions::default().keyless(true);
                let report = again(&sim).admin().verify(&keyless, &mut |_| {}).unwrap();
                assert_eq!(
                    report.is_clean(),
                    !["within the torn block", "at itself"].contains(&what),
                    "{context}"
                );
                assert_works(&sim, &["first", "second", "unsynced"], &context);
            }
        }
    }
}

/// The payload of a fake block contains a fake block, and so on.
#[test]
fn nested_blocks_do_not_stop_the_shard() {
    for by in [By::LogLine, By::Disk] {
        let sim = torn(by, |like, carrier, _| {
            let mut inner = fake_block(like, 3, carrier as u64 + 1);
            for _ in 0..200 {
                let len = inner.len() as u32;
                let mut header = BlockHeader::decode(&inner).unwrap();
                (header.payload_len, header.raw_len, header.list_len) = (len, len, len - 4);
                inner = [&header.encode()[..], &inner, &[0xfa; SUFFIX]].concat();
                fix_crc(&mut inner);
            }
            inner
        });
        assert_works(&sim, &["first", "second", "unsynced"], &format!("{by:?}"));
    }
}

/// A fake footer at the end of a torn file does not end the segment.
#[test]
fn a_footer_at_the_end_of_a_torn_file_does_not_stop_the_shard() {
    // In a log line at the end of the file.
    let sim = torn(By::LogLine, |like, _, inside| fake_footer(like, inside as u64));
    let segment = sim.segments(&find(&again(&sim)), 0).remove(0);
    sim.disk.edit(&segment, |bytes| {
        let at = memchr::memmem::rfind(bytes, b"SEAL").unwrap();
        bytes.truncate(at + 4);
    });
    assert_works(&sim, &["first", "second"], "in a log line");

    // After the last block, torn or complete; and before it, as if the segment ended there.
    for (what, torn_by, from_end, kept) in [
        ("behind a torn block", 5, 0, &["first", "second"][..]),
        ("behind a whole block", 0, 0, &["first", "second", "unsynced"]),
    ] {
        for by in [By::LogLine, By::Disk] {
            let (mut sim, logstore) = create(by);
            put(&logstore, "first");
            put(&logstore, "second");
            logstore.append(record("unsynced"), &written()).unwrap();
            sim.crash(Survives::Everything);
            let segment = sim.segments(&logstore, 0).remove(0);
            sim.disk.edit(&segment, |bytes| {
                let (_, like) = blocks(bytes)[1];
                bytes.truncate(bytes.len() - torn_by);
                let footer = fake_footer(&like, bytes.len() as u64 - from_end);
                bytes.extend_from_slice(&footer);
            });
            let context = format!("{what}, {by:?}");
            let store = sim.open();
            let logstore = find(&store);
            assert_eq!(texts(&logstore), kept, "{context}");
            assert_eq!(
                store.admin().repair(&name(NAME), 0, &Default::default()).unwrap().segment,
                None,
                "{context}"
            );
            put(&logstore, "next");
            assert_eq!(texts(&logstore), [kept, &["next"]].concat(), "{context}");
            assert!(
                store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().is_clean(),
                "{context}"
            );
        }
    }
}

/// Damage to synced data is corruption, regardless of the number of fakes: append and read report
/// it, and repair handles it.
#[test]
fn fakes_do_not_hide_damage() {
    for by in [By::LogLine, By::Disk] {
        for fake in ["low mark", "high mark", "whole"] {
            let (mut sim, logstore) = create(by);
            put(&logstore, "first");
            put(&logstore, "second");
            let segment = sim.segments(&logstore, 0).remove(0);
            let end = sim.disk.bytes(&segment).len();
            let (_, like) = blocks(&sim.disk.bytes(&segment))[1];
            let inside = end + BlockHeader::LEN + 40;
            let mark = match fake {
                "low mark" => like.durable_mark,
                "high mark" => u64::MAX,
                _ => inside as u64,
            };
            let line = fake_block(&like, 2, mark);
            let record = [&[b'.'; 37][..], &line, &[b'.'; 100]].concat();
            logstore.append(Payload::opaque(record).unwrap(), &synced()).unwrap();
            // Its mark says that all data before it was durable.
            put(&logstore, "last");
            sim.crash(Survives::Everything);
            sim.disk.edit(&segment, |bytes| {
                bytes[inside..inside + line.len()].copy_from_slice(&line);
                bytes[end + BlockHeader::LEN + 5] ^= 1;
            });
            let context = format!("{by:?}, {fake}");
            let store = sim.open();
            let logstore = find(&store);
            for _ in 0..2 {
                for result in [try_put(&logstore, "refused"), try_texts(&logstore).map(|_| ())] {
                    match result {
                        Err(Error::Corrupt { at, .. }) => {
                            assert_eq!(at.offset, end as u64, "{context}")
                        }
                        other => panic!("{context}: {other:?}"),
                    }
                }
            }
            let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
            assert!(
                report.faults.iter().any(|fault| fault.code == "corrupt"),
                "{context}: {:?}",
                report.faults
            );
            let report = store.admin().repair(&name(NAME), 0, &Default::default()).unwrap();
            assert_eq!(
                (report.segment.as_ref(), report.groups_salvaged),
                (Some(&segment), 1),
                "{context}"
            );
            assert!(report.bytes_lost >= line.len() as u64, "{context}: {report:?}");
            put(&logstore, "next");
            assert_eq!(texts(&logstore), ["first", "second", "last", "next"], "{context}");
            assert!(
                store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().is_clean(),
                "{context}"
            );
            assert_eq!(
                store.admin().repair(&name(NAME), 0, &Default::default()).unwrap().segment,
                None,
                "{context}"
            );
        }
    }
}

/// A forged block at the position of a real one: append and read report it, and repair does not
/// consider the shard sound.
#[test]
fn a_forged_block_in_its_place_is_reported_and_repaired() {
    for by in [By::LogLine, By::Disk] {
        for kind in [BlockKind::Opaque, BlockKind::Mark] {
            let (mut sim, logstore) = create(by);
            put(&logstore, "first");
            put(&logstore, "second");
            sim.crash(Survives::Everything);
            let segment = sim.segments(&logstore, 0).remove(0);
            sim.disk.edit(&segment, |bytes| {
                let (_, like) = blocks(bytes)[1];
                let mut fake = fake_block(&like, 2, like.durable_mark);
                if kind == BlockKind::Mark {
                    let zero = BlockHeader {
                        payload_len: 0,
                        raw_len: 0,
                        group_count: 0,
                        list_len: 0,
                        ..like
                    };
                    let header = BlockHeader {
                        kind,
                        number: 2,
                        first_seq: like.end_seq(),
                        log_count: 0,
                        ..zero
                    };
                    fake = [&header.encode()[..], &[0xfa; SUFFIX]].concat();
                    fix_crc(&mut fake);
                }
                bytes.extend_from_slice(&fake);
            });
            let context = format!("{by:?}, {kind:?}");
            let store = sim.open();
            let logstore = find(&store);
            assert!(matches!(try_texts(&logstore), Err(Error::Tampered { .. })), "{context}");
            if kind == BlockKind::Opaque {
                assert!(
                    matches!(try_put(&logstore, "refused"), Err(Error::Tampered { .. })),
                    "{context}"
                );
            }
            let report = store.admin().repair(&name(NAME), 0, &Default::default()).unwrap();
            assert_eq!(report.segment.as_ref(), Some(&segment), "{context}");
            assert!(report.bytes_lost >= 116, "{context}: {report:?}");
            put(&logstore, "next");
            assert_eq!(texts(&logstore), ["first", "second", "next"], "{context}");
            assert!(
                store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().is_clean(),
                "{context}"
            );
            assert_eq!(
                store.admin().repair(&name(NAME), 0, &Default::default()).unwrap().segment,
                None,
                "{context}"
            );
        }
    }
}

/// A forged mark in the file does not split a block.
#[test]
fn a_forged_mark_cuts_no_block() {
    for by in [By::LogLine, By::Disk] {
        let (mut sim, logstore) = create(by);
        put(&logstore, "first");
        put(&logstore, "second");
        sim.crash(Survives::Everything);
        let segment = sim.segments(&logstore, 0).remove(0);
        sim.disk.edit(&segment, |bytes| {
            let (at, like) = blocks(bytes)[1];
            let fields = BlockHeader {
                payload_len: 0,
                raw_len: 0,
                group_count: 0,
                list_len: 0,
                log_count: 0,
                ..like
            };
            let (number, first_seq, durable_mark) = (2, like.end_seq(), at as u64 + 10);
            let mark =
                BlockHeader { kind: BlockKind::Mark, number, first_seq, durable_mark, ..fields };
            let mut fake = [&mark.encode()[..], &[0xfa; SUFFIX]].concat();
            fix_crc(&mut fake);
            bytes.extend_from_slice(&fake);
        });
        let store = sim.open();
        put(&find(&store), "next");
        assert_eq!(texts(&find(&store)), ["first", "second", "next"], "{by:?}");
        assert!(
            store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().is_clean(),
            "{by:?}"
        );
    }
}

/// Recovery reads a segment several times. If the file changes in between, recovery either fails
/// without a change, or gives the same result as if the change had been made before.
#[test]
fn a_change_of_a_segment_during_its_recovery_is_safe() {
    type Change = fn(&mut Vec<u8>, &[(usize, BlockHeader)]);
    let changes: [Change; 4] = [
        |bytes, blocks| bytes[blocks[2].0 + 100] ^= 1,
        |bytes, blocks| bytes[blocks[3].0 + 100] ^= 1,
        |bytes, blocks| bytes.truncate(blocks[2].0),
        |bytes, blocks| bytes.truncate(blocks[3].0 + 7),
    ];
    for by in [By::LogLine, By::Disk] {
        for (what, change) in changes.into_iter().enumerate() {
            let (mut noticed, mut reads) = (0, 0);
            for nth in 1.. {
                let (mut sim, logstore) = create(by);
                put(&logstore, "first");
                put(&logstore, "second");
                for text in ["third", "fourth"] {
                    logstore.append(record(text), &written()).unwrap();
                }
                sim.crash(Survives::Everything);
                let segment = sim.segments(&logstore, 0).remove(0);
                let whole = sim.disk.bytes(&segment);
                let store = sim.open();
                let logstore = find(&store);
                let (disk, path, found) = (sim.disk.clone(), segment.clone(), blocks(&whole));
                let counted = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
                let count = counted.clone();
                sim.disk.on_call(move |call| {
                    if call.op == Op::Read && call.is_about(path.to_str().unwrap()) {
                        let so_far = count.fetch_add(1, std::sync::atomic::Ordering::SeqCst) + 1;
                        if so_far == nth {
                            disk.edit(&path, |bytes| change(bytes, &found));
                        }
                    }
                    Verdict::Go
                });
                let result = try_put(&logstore, "next");
                sim.disk.heal();
                reads = counted.load(std::sync::atomic::Ordering::SeqCst);
                let context = format!("{by:?}, change {what} before read {nth}: {result:?}");
                match result {
                    Ok(()) => {
                        let read = texts(&logstore);
                        let possible = [&["third", "fourth"][..], &["third"], &["fourth"], &[]];
                        let expected =
                            possible.map(|kept| [&["first", "second"], kept, &["next"]].concat());
                        assert!(
                            expected.iter().any(|expected| *expected == read),
                            "{context}: {read:?}"
                        );
                        if nth > reads {
                            assert_eq!(
                                read,
                                ["first", "second", "third", "fourth", "next"],
                                "{context}"
                            );
                        }
                    }
                    Err(
                        Error::Corrupt { .. }
                        | Error::Truncated { .. }
                        | Error::Tampered { .. }
                        | Error::Io { .. },
                    ) => {
                        noticed += 1;
                        sim.disk.edit(&segment, |bytes| bytes.clone_from(&whole));
                        let _ = logstore.reopen_shard(0);
                        put(&logstore, "next");
                        assert_eq!(
                            texts(&logstore),
                            ["first", "second", "third", "fourth", "next"],
                            "{context}"
                        );
                    }
                    Err(_) => panic!("{context}"),
                }
                if nth > reads {
                    break;
                }
            }
            assert!(
                noticed > 0 && reads > 4,
                "{by:?}, change {what}: noticed {noticed} times in {reads} reads"
            );
        }
    }
}

/// Without the key, operations that need none still work: status, checkpoint and keyless
/// verification.
#[test]
fn a_hostile_tail_asks_for_no_key_where_none_is_needed() {
    let mut sim = Sim::new();
    let store = sim.create();
    let cmk = sim.world.cmk();
    let logstore = sim.world.byok(&store, NAME, &cmk);
    put(&logstore, "first");
    put(&logstore, "second");
    logstore.append(record("torn"), &written()).unwrap();
    sim.crash(Survives::Everything);
    let segment = sim.segments(&logstore, 0).remove(0);
    sim.disk.edit(&segment, |bytes| {
        let (_, like) = blocks(bytes)[1];
        bytes.truncate(bytes.len() - 5);
        let fake = fake_block(&like, 7, like.durable_mark);
        bytes.extend_from_slice(&fake);
        let footer = fake_footer(&like, bytes.len() as u64);
        bytes.extend_from_slice(&footer);
    });
    sim.world.kms.answer(Answer::Revoked(envelog::kms::RevokedReason::Disabled));
    let calls = sim.world.kms.calls();
    let store = sim.open();
    let logstore = find(&store);
    assert_eq!(logstore.status().unwrap().groups, 2);
    assert_eq!(logstore.end_seq(0).unwrap(), 2);
    let keyless = VerifyOptions::default().keyless(true);
    assert!(store.admin().verify(&keyless, &mut |_| {}).unwrap().is_clean());
    store.keys().usage().unwrap();
    assert_eq!(sim.world.kms.calls(), calls, "the KMS was asked");
    store.admin().checkpoint().unwrap();
    // Once the key is available again, the shard continues.
    sim.world.kms.answer(Answer::Real);
    sim.world.clock.advance(secs(3600));
    store.tick();
    put(&logstore, "next");
    assert_eq!(texts(&logstore), ["first", "second", "next"]);
}

/// Status sums figures of unauthenticated headers and footers. No value may make it panic.
#[test]
fn status_takes_any_figure_from_a_header_or_a_footer() {
    let (mut sim, logstore) = create(By::LogLine);
    put(&logstore, "first");
    sim.crash(Survives::Everything);
    // Recovery cuts the segment, and its successor records the end.
    put(&find(&sim.open()), "next");
    sim.crash(Survives::Everything);
    let segments = sim.segments(&logstore, 0);
    let (first, last) = (&segments[0], segments.last().unwrap());
    let whole = sim.disk.bytes(last);
    let decoded = SegmentHeader::decode(&sim.disk.bytes(&segments[1])).unwrap();
    let Predecessor::Cut(end) = decoded.header.predecessor else { panic!("{decoded:?}") };
    let body_start = SegmentHeader::decode(&sim.disk.bytes(first)).unwrap().body_start;
    for bytes in [0, 1, body_start - 1, body_start, end.bytes] {
        let mut header = decoded.header.clone();
        header.predecessor = Predecessor::Cut(PredecessorEnd { bytes, ..end });
        let forged = SegmentHeader::finish(header.encode(), &decoded.commitment);
        sim.disk.edit(&segments[1], |file| file[..forged.len()].copy_from_slice(&forged));
        let status = find(&sim.open()).status();
        // The changed value may contradict the successor, which is reported.
        assert!(
            matches!(status, Ok(_) | Err(Error::Corrupt { .. } | Error::Tampered { .. })),
            "{bytes}: {status:?}"
        );
    }
    assert_eq!(sim.disk.bytes(last).len(), whole.len());

    let (sim, logstore) = create(By::LogLine);
    for text in ["first", "second"] {
        put(&logstore, text);
        logstore.roll().unwrap();
    }
    for segment in sim.segments(&logstore, 0) {
        sim.disk.edit(&segment, |bytes| {
            let at = memchr::memmem::rfind(bytes, b"EFTR").unwrap();
            let DecodedFooter { footer, tag } = Footer::decode(&bytes[at..]).unwrap();
            let forged = Footer {
                group_count: u64::MAX,
                log_count: u64::MAX,
                raw_bytes: u64::MAX,
                ..footer
            };
            bytes.truncate(at);
            bytes.extend_from_slice(&forged.finish(forged.encode(), &tag));
        });
    }
    let status = logstore.status().unwrap();
    assert_eq!((status.groups, status.logs, status.bytes_raw), (u64::MAX, u64::MAX, u64::MAX));
    assert!(matches!(try_texts(&logstore), Err(Error::Tampered { .. })));
}
