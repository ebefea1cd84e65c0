//! Reading: start and end positions, reading next to a writer and over many segments, and files
//! that become damaged during a read.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeSet,
    io,
    ops::Range,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use common::{
    disk::{Op, Sim, Survives, Verdict},
    *,
};
use envelog::{
    Compression, EncryptConf, EncryptType, Error, Logstore, LogstoreSpec, Payload, Position,
    ReadMode, ReadOptions, Reader, Record, ShardChoice, Store,
    crypto::{AeadKey, AwsLc, Cipher, CryptoError, CryptoProvider},
    io::{Clock as _, Disk as _, OpenMode, RealDisk},
    kms::RevokedReason,
};

const MODES: [ReadMode; 2] = [ReadMode::Pread, ReadMode::Map];

/// Writes `segments` segments of `blocks` blocks of `groups` groups, each group one millisecond
/// after the previous one.
fn fill(sim: &Sim, logstore: &Logstore, segments: u32, blocks: u32, groups: u32) {
    for segment in 0..segments {
        for block in 0..blocks {
            for group in 0..groups {
                logstore
                    .append(record(&format!("{segment}.{block}.{group}")), &buffered())
                    .unwrap();
                sim.world.clock.advance(millis(1));
            }
            logstore.sync().unwrap();
        }
        if segment + 1 < segments {
            logstore.roll().unwrap();
        }
    }
}

fn read(logstore: &Logstore, options: ReadOptions) -> Vec<Record> {
    logstore.read(0, &options).unwrap().collect::<Result<_, _>>().unwrap()
}

/// Compares every start and end position with the same selection from a list.
fn check_every_position(logstore: &Logstore, all: &[Record]) {
    let seqs: Vec<u64> = all.iter().map(|record| record.seq).collect();
    let times: Vec<u64> = all.iter().map(|record| record.receive_time_us).collect();
    let around = |values: &[u64]| -> Vec<u64> {
        let near = values.iter().flat_map(|value| [value.saturating_sub(1), *value, value + 1]);
        near.chain([0]).collect::<BTreeSet<_>>().into_iter().collect()
    };
    let positions: Vec<Position> = [Position::Begin, Position::End]
        .into_iter()
        .chain(around(&seqs).into_iter().map(Position::Seq))
        .chain(around(&times).into_iter().chain([u64::MAX]).map(Position::Time))
        .collect();
    let index = |position: Position| match position {
        Position::Begin => 0,
        Position::End => all.len(),
        Position::Seq(seq) => seqs.partition_point(|have| *have < seq),
        Position::Time(time) => times.partition_point(|have| *have < time),
        other => panic!("{other:?} has no index here"),
    };
    let above = ReadOptions::default().from(Position::Seq(u64::MAX - 1));
    let error = logstore.read(0, &above).unwrap().next().unwrap().unwrap_err();
    let end = seqs.last().map_or(0, |last| last + 1);
    assert!(matches!(error, Error::AboveEnd { end_seq, .. } if end_seq == end), "{error}");
    assert!(read(logstore, above.to(Position::End)).is_empty());
    for mode in MODES {
        // Mapping is slow here and differs only in how it gets the bytes.
        let step = if mode == ReadMode::Map { 11 } else { 1 };
        for (n, from) in positions.iter().enumerate().step_by(step) {
            let options = ReadOptions::default().from(*from).mode(mode);
            assert_eq!(read(logstore, options), all[index(*from)..], "{options:?}");
            // Not all pairs, but each position as a start and as an end.
            let to = positions[(n * 7 + 3) % positions.len()];
            let options = options.to(to);
            let end = index(to).max(index(*from));
            assert_eq!(read(logstore, options), all[index(*from)..end], "{options:?}");
        }
    }
}

#[test]
fn every_position_is_found_in_every_kind_of_segment() {
    let mut sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    assert!(read(&logstore, ReadOptions::default()).is_empty());
    check_every_position(&logstore, &[]);
    fill(&sim, &logstore, 4, 3, 3);
    let all = records(&logstore, 0).unwrap();
    assert_eq!(all.len(), 36);
    assert_eq!(sim.segments(&logstore, 0).len(), 4);
    // The last segment is open; a second opener sees it as unfinished.
    check_every_position(&logstore, &all);
    let other = sim.builder().open_read_only().unwrap();
    check_every_position(&other.logstore(logstore.name()).unwrap(), &all);
    // The segment is cut by a crash and recovered.
    sim.crash(Survives::Everything);
    let store = sim.open();
    let logstore = store.logstore(&name("p/l")).unwrap();
    check_every_position(&logstore, &all);
    fill(&sim, &logstore, 2, 2, 2);
    let more = records(&logstore, 0).unwrap();
    assert_eq!(more[..36], all);
    check_every_position(&logstore, &more);
    // All segments are sealed.
    store.close().unwrap();
    check_every_position(&sim.open().logstore(&name("p/l")).unwrap(), &more);
}

/// A clock that stands still, or many groups within its resolution: several segments contain groups
/// of the same time.
#[test]
fn a_time_in_several_segments_is_found_from_its_first_group() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    for n in 0..12 {
        put(&logstore, &n.to_string());
        if n % 2 == 1 {
            logstore.roll().unwrap();
        }
        if n == 3 || n == 8 {
            sim.world.clock.advance(millis(1));
        }
    }
    check_every_position(&logstore, &records(&logstore, 0).unwrap());
    // The newest segment contains no record yet.
    logstore.append(record("queued"), &buffered()).unwrap();
    check_every_position(&logstore, &records(&logstore, 0).unwrap());
}

#[test]
fn a_read_continues_after_a_limit_by_count_or_bytes() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    fill(&sim, &logstore, 3, 2, 4);
    let all = records(&logstore, 0).unwrap();
    for mode in MODES {
        for step in 1..=9u64 {
            for by_bytes in [false, true] {
                let (mut from, mut found) = (0, Vec::new());
                loop {
                    let limit = Some(if by_bytes { step * 3 } else { step });
                    let (max_groups, max_bytes) =
                        if by_bytes { (None, limit) } else { (limit, None) };
                    let options = ReadOptions::default()
                        .from(Position::Seq(from))
                        .to(None)
                        .max_groups(max_groups)
                        .max_bytes(max_bytes)
                        .mode(mode);
                    let mut reader = logstore.read(0, &options).unwrap();
                    let part: Vec<Record> = so_far(&mut reader).collect::<Result<_, _>>().unwrap();
                    if part.is_empty() {
                        break;
                    }
                    let bytes: usize = part.iter().map(|record| record.bytes.len()).sum();
                    let but_last = bytes - part.last().unwrap().bytes.len();
                    match by_bytes {
                        // The group that reaches the limit is still returned, so that every read
                        // makes progress.
                        true => assert!((but_last as u64) < step * 3),
                        false => assert!(part.len() as u64 <= step),
                    }
                    from = reader.next_seq();
                    found.extend(part);
                }
                assert_eq!(found, all, "{step} {by_bytes} {mode:?}");
            }
        }
    }
    let nothing = ReadOptions::default().max_groups(0);
    assert!(read(&logstore, nothing).is_empty());
    let nothing = ReadOptions::default().max_bytes(0);
    assert!(read(&logstore, nothing).is_empty());
}

/// A block, or a part of one, can be passed on as a `LogGroupList` without decoding.
#[test]
fn blocks_are_valid_lists_of_what_was_appended() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    let payloads: Vec<Payload> =
        (0..10).map(|n| Payload::try_from(&group(&format!("g{n}"), 1 + n % 3)).unwrap()).collect();
    for payload in &payloads {
        logstore.append(payload.clone(), &buffered()).unwrap();
    }
    logstore.append(record("opaque"), &buffered()).unwrap();
    logstore.sync().unwrap();
    let expected: Vec<Vec<u8>> =
        (0..10).map(|n| group(&format!("g{n}"), 1 + n % 3).encode_to_bytes().to_vec()).collect();
    let frame = |bytes: &[u8]| {
        let (mut framed, mut len) = (vec![0x0a], bytes.len());
        while len >= 0x80 {
            framed.push(len as u8 | 0x80);
            len >>= 7;
        }
        framed.push(len as u8);
        [framed, bytes.to_vec()].concat()
    };
    for (from, limit) in [(0, None), (3, None), (2, Some(4)), (9, Some(1))] {
        let options = ReadOptions::default().from(Position::Seq(from)).max_groups(limit);
        let block = logstore.read(0, &options).unwrap().next_block().unwrap().unwrap();
        let end = limit.map_or(10, |limit| from + limit) as usize;
        let groups = &expected[from as usize..end];
        assert_eq!(block.list, groups.iter().flat_map(|bytes| frame(bytes)).collect::<Vec<u8>>());
        assert_eq!(
            block.records.iter().map(|record| record.bytes.to_vec()).collect::<Vec<_>>(),
            groups
        );
        for (n, record) in (from as u32..).zip(&block.records) {
            assert_eq!(record.group().unwrap(), group(&format!("g{n}"), 1 + n % 3));
        }
    }
    let all = records(&logstore, 0).unwrap();
    assert!(matches!(all[10].group(), Err(Error::InvalidGroup(_))));
    let status = logstore.status().unwrap();
    assert_eq!((status.groups, status.logs), (11, (0..10).map(|n| 1 + n % 3).sum()));
}

// ---- the cost ----

#[test]
fn opening_reads_no_segment_and_seeking_looks_into_few() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    fill(&sim, &logstore, 64, 1, 1);
    let all = records(&logstore, 0).unwrap();
    store.close().unwrap();

    sim.disk.take_calls();
    let store = sim.open();
    let logstore = store.logstore(&name("p/l")).unwrap();
    let segments_in = |sim: &Sim| -> BTreeSet<_> {
        let calls = sim.disk.take_calls().into_iter();
        calls.filter(|call| call.is_about(".seg")).map(|call| call.path).collect()
    };
    assert_eq!(segments_in(&sim), BTreeSet::new());
    for record in [&all[0], &all[17], &all[40], &all[63]] {
        let one = ReadOptions::default().from(Position::Time(record.receive_time_us)).max_groups(1);
        assert_eq!(read(&logstore, one), std::slice::from_ref(record));
        // A binary search. Opening a segment also reads the header of its successor.
        let looked_at = segments_in(&sim).len();
        assert!(looked_at <= 2 * 6 + 4, "{looked_at} of 64 segments");
        let one = one.from(Position::Seq(record.seq));
        assert_eq!(read(&logstore, one), std::slice::from_ref(record));
        let looked_at = segments_in(&sim).len();
        assert!(looked_at <= 2, "{looked_at} of 64 segments");
    }
}

#[test]
fn readers_are_counted() {
    let mut sim = Sim::new();
    sim.world.options.readers_max = 3;
    let store = sim.create();
    let (a, b) = (sim.world.service(&store, "p/a"), sim.world.service(&store, "p/b"));
    let open = |logstore: &Logstore| logstore.read(0, &ReadOptions::default());
    let mut readers: Vec<Reader> =
        [&a, &b, &a].into_iter().map(|logstore| open(logstore).unwrap()).collect();
    for logstore in [&a, &b] {
        assert!(matches!(open(logstore), Err(Error::TooManyReaders { limit: 3 })));
    }
    readers.pop();
    readers.push(open(&b).unwrap());
    // A reader that failed to open does not use up the limit.
    readers.clear();
    for _ in 0..10 {
        assert!(matches!(
            a.read(7, &ReadOptions::default()),
            Err(Error::ShardMissing { shard: 7, .. })
        ));
    }
    let all: Vec<Reader> = (0..3).map(|_| open(&a).unwrap()).collect();
    assert_eq!(all.len(), 3);
}

// ---- following a writer ----

fn take_texts(reader: &mut Reader) -> Vec<String> {
    strings(&so_far(reader).collect::<Result<Vec<_>, _>>().unwrap())
}

/// A follower in a store that is open for reading looks for more every 100 ms. It lists the
/// directory only after a change, and from time to time: a file system may show changes late.
#[test]
fn a_follower_lists_a_directory_only_after_a_change() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    fill(&sim, &logstore, 8, 1, 1);
    let reading = sim.builder().open_read_only().unwrap();
    let reading = reading.logstore(logstore.name()).unwrap();
    let mut follow = reading.follow(0, &ReadOptions::default().from(Position::End)).unwrap();
    assert_eq!(follow.try_next().unwrap(), None);
    let listed = || {
        let calls = sim.disk.take_calls().into_iter();
        calls.filter(|call| call.op == Op::List && call.is_about("shard-")).count()
    };
    listed();
    let mut next = |looks: u32| {
        let found = (0..looks).find_map(|_| follow.try_next().unwrap());
        found.map(|record| strings(&[record]).remove(0))
    };
    assert_eq!((next(50), listed()), (None, 0));
    logstore.roll().unwrap();
    put(&logstore, "in a new segment");
    assert_eq!(next(1).unwrap(), "in a new segment");
    put(&logstore, "in the same segment");
    assert_eq!(next(1).unwrap(), "in the same segment");
    let lists = listed();
    assert!((1..=3).contains(&lists), "{lists}");
    assert_eq!((next(50), listed()), (None, 0));

    assert_eq!(next(1), None);
    sim.disk.hide_changes();
    assert_eq!(next(1), None);
    logstore.roll().unwrap();
    put(&logstore, "not shown");
    assert_eq!(next(200).unwrap(), "not shown");
}

/// A reader at the end of a segment continues after it, regardless of changes to that segment.
#[test]
fn a_reader_follows_over_rolls_recovery_and_retention() {
    for read_only in [false, true] {
        let sim = Sim::new();
        let store = sim.create();
        let logstore = sim.world.service(&store, "p/l");
        put(&logstore, "1");
        let reading =
            if read_only { sim.builder().open_read_only().unwrap() } else { store.clone() };
        let reading = reading.logstore(logstore.name()).unwrap();
        let mut reader = reading.read(0, &ReadOptions::default()).unwrap();
        let mut from_end = reading.read(0, &ReadOptions::default().from(Position::End)).unwrap();
        assert_eq!(take_texts(&mut reader), ["1"]);
        let mut next = |texts: &[&str]| {
            assert_eq!(take_texts(&mut reader), texts);
            assert_eq!(take_texts(&mut from_end), texts);
            assert_eq!(take_texts(&mut reader), [""; 0]);
        };
        next(&[]);
        put(&logstore, "2");
        next(&["2"]);
        logstore.roll().unwrap();
        next(&[]);
        put(&logstore, "3");
        next(&["3"]);
        put(&logstore, "4");
        logstore.roll().unwrap();
        put(&logstore, "5");
        next(&["4", "5"]);
        // The writer fails and recovers.
        sim.disk.fail_next(Op::Write, ".seg", io::ErrorKind::Other);
        try_put(&logstore, "refused").unwrap_err();
        next(&[]);
        logstore.reopen_shard(0).unwrap();
        next(&[]);
        put(&logstore, "6");
        next(&["6"]);
        logstore.append(record("7"), &written()).unwrap();
        next(&["7"]);
        // After a failed sync, the written records can be read and keep their position.
        sim.disk.fail_next(Op::Sync, ".seg", io::ErrorKind::Other);
        try_put(&logstore, "8").unwrap_err();
        next(&["8"]);
        logstore.reopen_shard(0).unwrap();
        put(&logstore, "9");
        next(&["9"]);
        // Retention removes the segment that the reader is at.
        logstore.roll().unwrap();
        let config = logstore.config().ttl_days(1);
        store.update_logstore(logstore.name(), config).unwrap();
        sim.world.clock.advance(2 * 24 * secs(3600));
        assert!(store.admin().apply_retention().unwrap().segments > 0);
        assert!(sim.segments(&logstore, 0).is_empty());
        next(&[]);
        put(&logstore, "10");
        next(&["10"]);
    }
}

/// A reader is in the middle of a segment that retention drops.
#[test]
fn a_reader_overtaken_by_retention_continues_with_kept_data() {
    for read_only in [false, true] {
        let sim = Sim::new();
        let store = sim.create();
        let logstore = sim.world.service(&store, "p/l");
        fill(&sim, &logstore, 4, 2, 1);
        let reading =
            if read_only { sim.builder().open_read_only().unwrap() } else { store.clone() };
        let reading = reading.logstore(logstore.name()).unwrap();
        let mut reader = reading.read(0, &ReadOptions::default()).unwrap();
        let mut late = reading.read(0, &ReadOptions::default().from(Position::Seq(1))).unwrap();
        assert_eq!(reader.next().unwrap().unwrap().seq, 0);
        let config = logstore.config().retention_bytes(1);
        store.update_logstore(logstore.name(), config).unwrap();
        assert_eq!(store.admin().apply_retention().unwrap().segments, 3);
        // The first reader continues in the file that it holds open. The other begins with the
        // first kept segment.
        let seqs =
            |reader: &mut Reader| reader.map(|record| record.unwrap().seq).collect::<Vec<_>>();
        assert_eq!(seqs(&mut reader), [1, 6, 7]);
        assert_eq!(seqs(&mut late), [6, 7]);
    }
}

/// A partially written block or a submitted group is not visible yet, also for a reader in another
/// process.
#[test]
fn readers_see_what_is_written_and_never_part_of_a_block() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    put(&logstore, "1");
    let other = sim.builder().open_read_only().unwrap();
    assert!(other.is_read_only());
    let beside = other.logstore(logstore.name()).unwrap();
    assert!(matches!(try_put(&beside, "x"), Err(Error::ReadOnly)));
    let seen = |expected: &[&str]| {
        for logstore in [&logstore, &beside] {
            assert_eq!(texts(logstore), expected);
            assert_eq!(logstore.end_seq(0).unwrap(), expected.len() as u64);
        }
    };
    seen(&["1"]);
    logstore.append(record("2"), &buffered()).unwrap();
    seen(&["1"]);
    logstore.append(record("3"), &written()).unwrap();
    seen(&["1", "2", "3"]);
    let mut following = beside.read(0, &ReadOptions::default().from(Position::End)).unwrap();
    // During the write of the block, half of it is in the file.
    let (dir, files) = (sim.world.logstore_dir(&logstore), sim.disk.clone());
    let before = files.files(&dir);
    sim.disk.fail_next(Op::Write, ".seg", io::ErrorKind::Other);
    try_put(&logstore, "4").unwrap_err();
    assert_ne!(sim.disk.files(&dir), before, "a part of the block is there");
    seen(&["1", "2", "3"]);
    assert!(following.try_next().unwrap().is_none());
    logstore.reopen_shard(0).unwrap();
    let seq = logstore.append(record("5"), &written()).unwrap().seq;
    assert_eq!(following.try_next().unwrap().unwrap().seq, seq);
    assert_eq!(texts(&beside), ["1", "2", "3", "5"]);
}

/// A reader that was opened earlier gets all new keys of the writer when it needs them.
#[test]
fn a_reader_in_another_process_follows_all_key_rotations() {
    let sim = Sim::new();
    let store = sim.create();
    let reading = sim.builder().open_read_only().unwrap();
    let plain = store.create_logstore(&name("p/plain"), LogstoreSpec::default()).unwrap();
    let encrypted = sim.world.service(&store, "p/encrypted");
    let mut expected = Vec::new();
    let open = |logstore: &Logstore| reading.logstore(logstore.name()).unwrap();
    let beside = [open(&plain), open(&encrypted)];
    let mut following: Vec<Reader> =
        beside.iter().map(|logstore| logstore.read(0, &ReadOptions::default()).unwrap()).collect();
    for round in 0..4 {
        if round % 2 == 0 {
            store.keys().rotate_service_key().unwrap();
        }
        store.keys().rotate_data_key(encrypted.name()).unwrap();
        let text = round.to_string();
        for logstore in [&plain, &encrypted] {
            put(logstore, &text);
            // With the existing handles, and with new ones.
            assert_eq!(texts(&open(logstore)).last(), Some(&text));
        }
        expected.push(text);
        for (logstore, reader) in beside.iter().zip(&mut following) {
            assert_eq!(texts(logstore), expected);
            assert_eq!(take_texts(reader), expected[round..]);
        }
        assert_eq!(reading.keys().audit_records().unwrap(), store.keys().audit_records().unwrap());
    }
}

#[test]
fn many_readers_follow_one_writer() {
    const COUNT: u64 = 600;
    let mut world = World::threads();
    world.options.segment_bytes = 8 << 10;
    world.options.linger = millis(5);
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    let beside: Store = world.builder().open_read_only().unwrap();
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let mut readers = Vec::new();
        for n in 0..6 {
            let reading = if n % 2 == 0 {
                logstore.clone()
            } else {
                beside.logstore(logstore.name()).unwrap()
            };
            let mode = MODES[n / 2 % 2];
            let stop = &stop;
            readers.push(scope.spawn(move || {
                let mut reader = reading.read(0, &ReadOptions::default().mode(mode)).unwrap();
                let mut seen = 0;
                while seen < COUNT {
                    match reader.try_next().unwrap() {
                        Some(record) => {
                            assert_eq!(
                                record.bytes,
                                format!("{} {seen}", "x".repeat(seen as usize % 200)),
                                "reader {n}"
                            );
                            assert_eq!(record.seq, seen);
                            seen += 1;
                        }
                        None if stop.load(Ordering::SeqCst) && seen == 0 => {
                            panic!("nothing to read")
                        }
                        None => thread::yield_now(),
                    }
                }
            }));
        }
        let durabilities = [buffered(), written(), buffered(), synced()];
        for n in 0..COUNT {
            let text = format!("{} {n}", "x".repeat(n as usize % 200));
            logstore.append(record(&text), &durabilities[n as usize % 4]).unwrap();
        }
        logstore.sync().unwrap();
        stop.store(true, Ordering::SeqCst);
        for reader in readers {
            reader.join().unwrap();
        }
    });
    assert!(logstore.status().unwrap().segments > 1);
}

// ---- damaged files ----

/// A file that is truncated or unreadable during a read makes the reader return an error and end.
/// Other readers are not affected.
#[test]
fn a_file_that_breaks_under_a_reader_is_an_error() {
    for truncated in [true, false] {
        let sim = Sim::new();
        let store = sim.create();
        let spec = LogstoreSpec::default().compression(Compression::None);
        let logstore = store.create_logstore(&name("p/l"), spec).unwrap();
        // Large enough to exceed the read-ahead.
        let noise = |n: u32| -> Vec<u8> {
            (0..200_000u32).map(|i| ((i ^ n).wrapping_mul(2_654_435_761) >> 23) as u8).collect()
        };
        for n in 0..6 {
            logstore.append(Payload::opaque(noise(n)).unwrap(), &written()).unwrap();
        }
        logstore.roll().unwrap();
        put(&logstore, "in the next segment");
        let segment = sim.segments(&logstore, 0).remove(0);
        let mut reader = logstore.read(0, &ReadOptions::default()).unwrap();
        assert_eq!(reader.next().unwrap().unwrap().bytes, noise(0));
        if truncated {
            sim.disk.edit(&segment, |bytes| bytes.truncate(700_000));
        } else {
            sim.disk.on_call(move |call| match call.op == Op::Read && call.path == segment {
                true => Verdict::Fail(io::ErrorKind::Other),
                false => Verdict::Go,
            });
        }
        let rest: Vec<_> = so_far(&mut reader).collect();
        let error = &damage(rest.last().unwrap().clone().unwrap_err());
        match truncated {
            true => {
                assert!(matches!(error, Error::Corrupt { .. } | Error::Truncated { .. }), "{error}")
            }
            false => assert!(matches!(error, Error::Io { op: "read", .. }), "{error}"),
        }
        assert!(
            rest[..rest.len() - 1].iter().zip(1..).all(|(record, n)| record
                .as_ref()
                .unwrap()
                .bytes
                == noise(n))
        );
        assert!(reader.next().is_none() && reader.next_block().unwrap().is_none());
        // The data after it is still readable.
        assert_eq!(
            strings(&records_from(&logstore, 0, Position::Seq(6)).unwrap()),
            ["in the next segment"]
        );
        put(&logstore, "more");
    }
}

#[test]
fn shards_are_read_each_by_itself() {
    let sim = Sim::new();
    let store = sim.create();
    let spec = LogstoreSpec::default().shard_count(3);
    let logstore = store.create_logstore(&name("p/l"), spec).unwrap();
    for n in 0..9u32 {
        let options = written().shard(ShardChoice::Shard(n % 3));
        assert_eq!(
            logstore.append(record(&n.to_string()), &options).unwrap().seq,
            u64::from(n / 3)
        );
    }
    for shard in 0..3 {
        let expected: Vec<String> = (0..3).map(|n| (n * 3 + shard).to_string()).collect();
        assert_eq!(strings(&records(&logstore, shard).unwrap()), expected);
    }
}

#[test]
fn reading_by_time_finds_all_groups_of_one_microsecond() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/a");
    put(&logstore, "end of a segment");
    logstore.roll().unwrap();
    put(&logstore, "beginning of the next");
    let time = records(&logstore, 0).unwrap()[0].receive_time_us;
    let read = records_from(&logstore, 0, Position::Time(time)).unwrap();
    assert_eq!(strings(&read), ["end of a segment", "beginning of the next"]);
}

#[test]
fn a_merged_read_gives_all_shards_in_the_order_of_time() {
    let world = World::manual();
    let store = world.create();
    let spec = LogstoreSpec::default()
        .shard_count(3)
        .encrypt_conf(EncryptConf::byok(EncryptType::Aes, world.cmk()));
    let logstore = store.create_logstore(&name("p/merged"), spec).unwrap();
    // Segments of different lengths, and three records of each microsecond.
    let mut expected = Vec::new();
    for n in 0..60_u32 {
        let shard = n * 7 % 3;
        let options = written().shard(ShardChoice::Shard(shard));
        logstore.append(record(&n.to_string()), &options).unwrap();
        expected.push((world.clock.wall_us(), shard, n.to_string()));
        if n % 3 == 2 {
            world.clock.advance(millis(1));
        }
        if n == 31 {
            logstore.roll().unwrap();
        }
    }
    expected.sort_by_key(|(time, shard, _)| (*time, *shard));
    let merged = |options: &ReadOptions| -> Vec<(u64, u32, String)> {
        let text = |record: &Record| String::from_utf8(record.bytes.to_vec()).unwrap();
        logstore
            .read_merged(options)
            .unwrap()
            .map(|item| item.map(|(shard, got)| (got.receive_time_us, shard, text(&got))).unwrap())
            .collect()
    };
    assert_eq!(merged(&ReadOptions::default()), expected);
    assert_eq!(merged(&ReadOptions::default().max_groups(7)), expected[..7]);
    assert_eq!(merged(&ReadOptions::default().max_bytes(3)), expected[..3]);
    let (from, to) = (expected[9].0, expected[30].0);
    let range = ReadOptions::default().from(Position::Time(from)).to(Position::Time(to));
    assert_eq!(merged(&range), expected[9..30]);
    assert!(merged(&ReadOptions::default().from(Position::End)).is_empty());
    let by_seq = ReadOptions::default().from(Position::Seq(1));
    assert!(matches!(logstore.read_merged(&by_seq), Err(Error::InvalidArgument(_))));

    // Pages, each continued from the position behind the one before, as text. Appends in between are
    // read too.
    for page in [1, 7, 59, 60] {
        let options = ReadOptions::default().max_groups(page);
        let mut cursor = None::<String>;
        let (mut pages, mut count) = (0, 0);
        loop {
            let mut reader = match &cursor {
                None => logstore.read_merged(&options).unwrap(),
                Some(cursor) => {
                    logstore.read_merged_from(&cursor.parse().unwrap(), &options).unwrap()
                }
            };
            let got: Vec<_> = reader.by_ref().map(|item| item.unwrap()).collect();
            cursor = Some(reader.position().to_string());
            if got.is_empty() {
                break;
            }
            for (shard, got) in got {
                let text = String::from_utf8(got.bytes.to_vec()).unwrap();
                assert_eq!((got.receive_time_us, shard, text), expected[count]);
                count += 1;
            }
            pages += 1;
        }
        assert_eq!((count, pages), (60, 60_u64.div_ceil(page)));
    }
    // The time stays in the position, and so it does where no record was found yet.
    for from_us in [from, world.clock.wall_us() + 1] {
        let options = ReadOptions::default().from(Position::Time(from_us));
        let start = logstore.read_merged(&options).unwrap().position();
        let rest = logstore.read_merged_from(&start, &ReadOptions::default()).unwrap();
        let wanted = expected.iter().filter(|(time, ..)| *time >= from_us).count();
        assert_eq!(rest.count(), wanted);
    }
    let mut reader = logstore.read_merged(&ReadOptions::default()).unwrap();
    assert_eq!(reader.by_ref().count(), 60);
    let end = reader.position();
    world.clock.advance(millis(1));
    logstore.append(record("later"), &written()).unwrap();
    let later: Vec<_> = logstore
        .read_merged_from(&end, &ReadOptions::default())
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(later.len(), 1);
    assert_eq!(&later[0].1.bytes[..], b"later");

    // A refused key ends it, with the records that it has looked at. Another reader continues.
    let mut reader = logstore.read_merged(&ReadOptions::default()).unwrap();
    assert!(reader.next().unwrap().is_ok());
    world.kms.answer(Answer::Revoked(RevokedReason::Disabled));
    logstore.revalidate_now().unwrap_err();
    assert!(matches!(reader.next(), Some(Err(Error::Revoked { .. }))));
    assert!(reader.next().is_none());
    let position = reader.position();
    world.kms.answer(Answer::Real);
    logstore.revalidate_now().unwrap();
    let rest = logstore.read_merged_from(&position, &ReadOptions::default()).unwrap();
    assert_eq!(rest.count(), 60);
}

// ---- a file that changes under a map ----

/// A file, and the offsets at which it is overwritten.
type Target = Arc<Mutex<Option<(PathBuf, Range<u64>)>>>;

/// A provider that reads the ciphertext twice, as the trait allows: once to check the tag, and once
/// to decrypt. In between, another process writes to the file.
#[derive(Debug)]
struct ReadsTwice {
    inner: AwsLc,
    file: Target,
}

struct TwiceKey {
    inner: Box<dyn AeadKey>,
    file: Target,
}

impl CryptoProvider for ReadsTwice {
    fn name(&self) -> &'static str {
        "reads twice"
    }

    fn aead(&self, cipher: Cipher, key: &[u8]) -> Result<Box<dyn AeadKey>, CryptoError> {
        Ok(Box::new(TwiceKey {
            inner: self.inner.aead(cipher, key)?,
            file: Arc::clone(&self.file),
        }))
    }
}

impl AeadKey for TwiceKey {
    fn seal(
        &self,
        nonce: &[u8; 12],
        aad: &[u8],
        in_out: &mut [u8],
    ) -> Result<[u8; 16], CryptoError> {
        self.inner.seal(nonce, aad, in_out)
    }

    fn open(
        &self,
        nonce: &[u8; 12],
        aad: &[u8],
        ciphertext: &[u8],
        tag: &[u8; 16],
        out: &mut [u8],
    ) -> Result<(), CryptoError> {
        let first: Vec<u8> = ciphertext.to_vec();
        self.inner.open(nonce, aad, &first, tag, out)?;
        // Skip footers: only blocks are read from the map.
        let is_block = aad.get(32..36) == Some(b"EBLK");
        if let Some((path, range)) = self.file.lock().unwrap().as_ref().filter(|_| is_block) {
            let file = RealDisk.open(path, OpenMode::ReadWrite).unwrap();
            let mut bytes = vec![0; (range.end - range.start) as usize];
            file.read_at(&mut bytes, range.start).unwrap();
            bytes.iter_mut().for_each(|byte| *byte ^= 1);
            file.write_at(&bytes, range.start).unwrap();
        }
        for (out, (before, now)) in
            out.iter_mut().zip(first.iter().zip(std::hint::black_box(ciphertext)))
        {
            *out ^= before ^ now;
        }
        Ok(())
    }
}

/// The opened copy is the one whose tag was checked.
#[test]
fn a_file_that_changes_under_a_map_gives_no_forged_plaintext() {
    for (encrypt_type, enable) in [
        (EncryptType::Aes, true),
        (EncryptType::Sm4, true),
        (EncryptType::Aes, false),
        (EncryptType::Sm4, false),
    ] {
        let world = World::manual();
        let provider = || ReadsTwice { inner: AwsLc::new(), file: Arc::default() };
        let builder = |provider: ReadsTwice| {
            Store::builder(world.store_dir(), world.keyring(), provider)
                .disk(Arc::new(QuickDisk))
                .clock(Arc::clone(&world.clock) as _)
                .options(world.options)
        };
        let store = builder(provider()).create().unwrap();
        let conf = EncryptConf::service_key(encrypt_type);
        let spec = LogstoreSpec::default().compression(Compression::None);
        let logstore =
            store.create_logstore(&name("p/l"), spec.encrypt_conf(conf.clone())).unwrap();
        if !enable {
            let off = logstore.config().encrypt_conf(EncryptConf { enable, ..conf });
            store.update_logstore(logstore.name(), off).unwrap();
        }
        put(&logstore, "what was written");
        let dir = world.logstore_dir(&logstore);
        drop(logstore);
        store.close().unwrap();

        let provider = provider();
        let armed = Arc::clone(&provider.file);
        let store = builder(provider).open_read_only().unwrap();
        let logstore = store.logstore(&name("p/l")).unwrap();
        let options = ReadOptions::default().mode(ReadMode::Map);
        let mut reader = logstore.read(0, &options).unwrap();
        // The payload of the only block, which begins after the two headers.
        let payload = 308 + 96..308 + 96 + 18;
        *armed.lock().unwrap() = Some((segments(&dir, 0).remove(0), payload));
        let record = reader.next().unwrap().unwrap();
        *armed.lock().unwrap() = None;
        assert_eq!(record.bytes, "what was written", "{encrypt_type} {enable}");
        // A new read detects the change.
        let error = damage(logstore.read(0, &options).unwrap().next().unwrap().unwrap_err());
        assert!(matches!(error, Error::Corrupt { .. }), "{encrypt_type} {enable}: {error}");
    }
}

/// A reader in another process lists the directory of a shard only a few times, regardless of the
/// number of segments.
#[test]
fn reading_many_segments_lists_their_directory_a_few_times() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, "p/l");
    fill(&sim, &logstore, 40, 1, 1);
    store.close().unwrap();
    let reading = sim.builder().open_read_only().unwrap();
    let logstore = reading.logstore(&name("p/l")).unwrap();
    sim.disk.take_calls();
    assert_eq!(read(&logstore, ReadOptions::default()).len(), 40);
    let calls = sim.disk.take_calls();
    let count =
        |op: Op| calls.iter().filter(|call| call.op == op && call.is_about("shard-0000")).count();
    assert!(count(Op::List) <= 3, "{} lists", count(Op::List));
    assert!(count(Op::Open) <= 2 * 40 + 2, "{} files opened", count(Op::Open));
}
