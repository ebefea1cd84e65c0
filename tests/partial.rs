//! A reader touches only the data that it asks for: history that is lost, forged or shredded, files
//! with strange names, and another Logstore that is damaged cost it nothing, and neither does the
//! number of segments.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use common::*;
use envelog::{
    EncryptConf, EncryptType, Error, ErrorKind, Logstore, LogstoreSpec, Position, ReadMode,
    ReadOptions, Store,
    admin::{RepairOptions, VerifyFault, VerifyOptions, VerifyReport},
    kms::RevokedReason,
};

const NAME: &str = "p/l";
const OTHER: &str = "p/other";
/// The records of a segment.
const RECORDS: u64 = 5;

/// A fault of the history.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    Lost,
    Emptied,
    Zeroed,
    HalfZeroed,
    /// The two files have each other's contents.
    Exchanged,
    Shredded,
}

const FAULTS: [Fault; 6] = [
    Fault::Lost,
    Fault::Emptied,
    Fault::Zeroed,
    Fault::HalfZeroed,
    Fault::Exchanged,
    Fault::Shredded,
];

/// A store with four segments in one shard. The first two are the history, under a data key of
/// their own.
struct Scene {
    world: World,
    /// The receive times, by sequence number.
    times: Vec<u64>,
    segments: Vec<PathBuf>,
}

impl Scene {
    fn new() -> Self {
        let world = World::manual();
        let store = world.create();
        let logstore = world.service(&store, NAME);
        put(&world.service(&store, OTHER), "other");
        for segment in 0..4 {
            for n in 0..RECORDS {
                world.clock.advance(millis(10));
                put(&logstore, &text(segment * RECORDS + n));
            }
            logstore.roll().unwrap();
            if segment == 1 {
                store.keys().rotate_data_key(&name(NAME)).unwrap();
            }
        }
        let times = records(&logstore, 0).unwrap().iter().map(|one| one.receive_time_us).collect();
        let dir = world.logstore_dir(&logstore);
        drop(logstore);
        store.close().unwrap();
        let segments = segments(&dir, 0);
        Self { world, times, segments }
    }

    fn apply(&self, fault: Fault) {
        if fault == Fault::Shredded {
            let store = self.world.open();
            store.keys().shred_data_keys(&name(NAME), &[1]).unwrap();
            return store.close().unwrap();
        }
        let history: Vec<_> =
            self.segments[..2].iter().map(|path| fs::read(path).unwrap()).collect();
        for (at, path) in self.segments[..2].iter().enumerate() {
            let mut bytes = history[at].clone();
            let half = bytes.len() / 2;
            match fault {
                Fault::Lost => {
                    fs::remove_file(path).unwrap();
                    continue;
                }
                Fault::Emptied => bytes.clear(),
                Fault::Zeroed => bytes.fill(0),
                Fault::HalfZeroed => bytes[half..].fill(0),
                Fault::Exchanged => bytes = history[1 - at].clone(),
                Fault::Shredded => unreachable!(),
            }
            write_private(path, bytes);
        }
    }

    /// The segment's first sequence number and its first receive time.
    fn begin_of(&self, segment: u64) -> (u64, u64) {
        let seq = segment * RECORDS;
        (seq, self.times[seq as usize])
    }
}

fn text(seq: u64) -> String {
    format!("record {seq} {}", noise(seq, 300))
}

fn expected(from: u64, to: u64) -> Vec<String> {
    (from..to).map(text).collect()
}

fn read_texts(logstore: &Logstore, options: &ReadOptions) -> Result<Vec<String>, Error> {
    let records = logstore.read(0, options)?.collect::<Result<Vec<_>, _>>()?;
    Ok(strings(&records))
}

fn from(position: Position) -> ReadOptions {
    ReadOptions::default().from(position)
}

fn verify(store: &Store) -> VerifyReport {
    store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap()
}

/// Every way to ask for the data behind the history gives it.
fn check_behind(scene: &Scene, logstore: &Logstore, fault: Fault) {
    let (seq, time) = scene.begin_of(2);
    let all = expected(seq, 4 * RECORDS);
    for (position, all) in [
        (Position::Seq(seq), &all[..]),
        (Position::Seq(seq + 7), &all[7..]),
        (Position::Time(time), &all),
        // Behind the last record of the history.
        (Position::Time(scene.times[seq as usize - 1] + 1), &all),
        (Position::Time(scene.begin_of(3).1 + 1), &all[RECORDS as usize + 1..]),
        (Position::End, &[]),
        (Position::Seq(4 * RECORDS), &[]),
        (Position::Time(u64::MAX), &[]),
    ] {
        let context = format!("{fault:?}, {position:?}");
        assert_eq!(read_texts(logstore, &from(position)).expect(&context), all, "{context}");
        let mut follow = logstore.follow(0, &from(position)).unwrap();
        for one in all {
            let record = follow.try_next().expect(&context).expect(&context);
            assert_eq!(&strings(&[record])[0], one, "{context}");
        }
        assert_eq!(follow.try_next().expect(&context), None, "{context}");
    }
    let merged = logstore.read_merged(&from(Position::Time(time))).unwrap();
    let merged: Vec<_> = merged.map(|record| record.unwrap().1).collect();
    assert_eq!(strings(&merged), all, "{fault:?}");
}

/// A reader that asks for the history gets an error, and with `skip_lost` everything else.
fn check_history(logstore: &Logstore, fault: Fault) {
    let error = read_texts(logstore, &ReadOptions::default()).unwrap_err();
    let skipped = read_texts(logstore, &ReadOptions::default().skip_lost(true));
    match fault {
        Fault::Exchanged => {
            assert!(error.kind() == ErrorKind::Integrity && !matches!(error, Error::Lost { .. }));
            assert_eq!(skipped.unwrap_err().kind(), ErrorKind::Integrity);
            return;
        }
        Fault::Shredded => assert!(matches!(error, Error::Shredded { version: 1, .. }), "{error}"),
        _ => assert!(matches!(error, Error::Lost { .. }), "{fault:?}: {error}"),
    }
    let skipped = skipped.unwrap();
    let (seq, all) = (2 * RECORDS, expected(0, 4 * RECORDS));
    assert!(skipped.ends_with(&all[seq as usize..]), "{fault:?}");
    assert!(skipped.iter().all(|one| all.contains(one)), "{fault:?}");
    let mut reader = logstore.read(0, &ReadOptions::default().skip_lost(true)).unwrap();
    assert!(reader.by_ref().all(|record| record.is_ok()));
    assert!(!reader.lost().is_empty(), "{fault:?}");
    for lost in reader.lost() {
        assert_eq!((lost.shredded, lost.accepted), (fault == Fault::Shredded, false));
        assert!(lost.end_seq.unwrap() <= seq, "{fault:?}: {lost:?}");
    }
}

#[test]
fn history_that_cannot_be_read_costs_no_reader_of_the_data_behind_it() {
    for fault in FAULTS {
        let scene = Scene::new();
        scene.apply(fault);
        let store = scene.world.builder().open_read_only().unwrap();
        let logstore = store.logstore(&name(NAME)).unwrap();
        check_behind(&scene, &logstore, fault);
        check_history(&logstore, fault);
        assert_eq!(logstore.end_seq(0).unwrap(), 4 * RECORDS);
        drop((logstore, store));

        let store = scene.world.open();
        let logstore = store.logstore(&name(NAME)).unwrap();
        check_behind(&scene, &logstore, fault);
        check_history(&logstore, fault);
        let mut follow = logstore.follow(0, &from(Position::End)).unwrap();
        assert_eq!(follow.try_next().unwrap(), None);
        put(&logstore, "new");
        assert_eq!(strings(&[follow.try_next().unwrap().unwrap()]), ["new"]);
    }
}

/// A reader that ends at a time does not need the segments behind it either.
#[test]
fn shredded_data_behind_the_end_of_a_reader_costs_nothing() {
    let scene = Scene::new();
    let store = scene.world.open();
    store.keys().rotate_data_key(&name(NAME)).unwrap();
    store.keys().shred_data_keys(&name(NAME), &[2]).unwrap();
    let logstore = store.logstore(&name(NAME)).unwrap();
    for end in [Position::Seq(7), Position::Time(scene.times[7])] {
        let read = read_texts(&logstore, &ReadOptions::default().to(end)).unwrap();
        assert_eq!(read, expected(0, 7), "{end:?}");
    }
}

/// Nothing in the shard can be read any more.
#[test]
fn a_follower_from_the_end_of_a_shredded_shard_gets_new_records() {
    let scene = Scene::new();
    let store = scene.world.open();
    store.keys().rotate_data_key(&name(NAME)).unwrap();
    store.keys().shred_data_keys(&name(NAME), &[1, 2]).unwrap();
    store.close().unwrap();
    let (end, now) = (4 * RECORDS, scene.times.last().unwrap() + 1);
    let positions = [Position::End, Position::Seq(end), Position::Time(now)];

    let reading = scene.world.builder().open_read_only().unwrap();
    let read = reading.logstore(&name(NAME)).unwrap();
    let store = scene.world.open();
    let logstore = store.logstore(&name(NAME)).unwrap();
    scene.world.clock.advance(millis(10));
    let mut followers: Vec<_> = [&read, &logstore]
        .into_iter()
        .flat_map(|one| positions.map(|position| one.follow(0, &from(position)).unwrap()))
        .collect();
    for follow in &mut followers {
        assert_eq!(follow.try_next().unwrap(), None);
    }
    for text in ["new", "newer"] {
        put(&logstore, text);
        logstore.roll().unwrap();
        for follow in &mut followers {
            assert_eq!(strings(&[follow.try_next().unwrap().unwrap()]), [text]);
        }
    }
    let error = read_texts(&logstore, &from(Position::Seq(end - 1))).unwrap_err();
    assert!(matches!(error, Error::Shredded { version: 2, .. }), "{error}");
    let error = read_texts(&logstore, &from(Position::Time(now - 1))).unwrap_err();
    assert!(matches!(error, Error::Shredded { version: 2, .. }), "{error}");
}

/// The last segment is damaged. Its successor comes after a repair.
#[test]
fn a_follower_from_the_end_of_a_damaged_shard_continues_after_a_repair() {
    for fault in 0..3 {
        let scene = Scene::new();
        let last = &scene.segments[3];
        let mut bytes = fs::read(last).unwrap();
        let half = bytes.len() / 2;
        match fault {
            0 => fs::remove_file(last).unwrap(),
            1 => write_private(last, vec![0; bytes.len()]),
            _ => {
                bytes[half..].fill(0);
                write_private(last, bytes);
            }
        }
        let store = scene.world.open();
        let logstore = store.logstore(&name(NAME)).unwrap();
        let mut follow = logstore.follow(0, &from(Position::End)).unwrap();
        assert_eq!(follow.try_next().unwrap(), None);
        assert_eq!(logstore.end_seq(0).unwrap(), 4 * RECORDS);
        assert!(try_put(&logstore, "refused").is_err());
        logstore.reopen_shard(0).unwrap();
        store.admin().repair(&name(NAME), 0, &RepairOptions::default()).unwrap();
        put(&logstore, "new");
        assert_eq!(strings(&[follow.try_next().unwrap().unwrap()]), ["new"], "{fault}");
    }
}

/// Makes something of the name of a segment.
fn make(path: &Path, kind: usize, real: &Path) {
    match kind % 5 {
        0 => fs::write(path, b"junk").unwrap(),
        1 => fs::write(path, b"").unwrap(),
        2 => drop(fs::copy(real, path).unwrap()),
        3 => fs::create_dir(path).unwrap(),
        _ => symlink(real, path).unwrap(),
    }
}

/// A file that no writer has made, with the name of a segment, costs at most the segment of its
/// ordinal.
#[test]
fn a_strange_name_costs_at_most_its_own_ordinal() {
    let scene = Scene::new();
    let mut kind = 0;
    for ordinal in [1, 2, 3, 4, 6, 40, 1 << 40, u64::MAX - 1] {
        for first_seq in [0, 7, 15, 20, 1 << 50, u64::MAX] {
            for epoch in [0, 9, u64::MAX] {
                kind += 1;
                let strange = format!("{ordinal:010}-{first_seq:020}-{epoch:010}.seg");
                let path = scene.segments[0].with_file_name(&strange);
                make(&path, kind, &scene.segments[kind % 4]);
                let store = scene.world.builder().open_read_only().unwrap();
                let logstore = store.logstore(&name(NAME)).unwrap();
                let read = read_texts(&logstore, &ReadOptions::default()).expect(&strange);
                assert_eq!(read, expected(0, 4 * RECORDS), "{strange}");
                let report = verify(&store);
                assert!(report.is_clean(), "{strange}: {report:?}");
                let named = |note: &String| note.contains(&strange);
                assert_eq!(report.notes.iter().filter(|note| named(note)).count(), 1, "{strange}");
                fs::remove_dir(&path).or_else(|_| fs::remove_file(&path)).unwrap();
            }
        }
    }
}

/// The same beside a writer, which keeps appending.
#[test]
fn strange_names_stop_no_writer() {
    let scene = Scene::new();
    let names = [
        "0000000002-00000000000000000900-0000000097",
        "0000000003-00000000000000000000-0000000001",
        "0000000143-00000000000000040464-0000000097",
        "0000000163-00000000000000005184-0000000062",
    ];
    for (kind, strange) in names.iter().enumerate() {
        let path = scene.segments[0].with_file_name(format!("{strange}.seg"));
        make(&path, kind, &scene.segments[1]);
    }
    let mut all = expected(0, 4 * RECORDS);
    for round in 0..3 {
        let store = scene.world.open();
        let logstore = store.logstore(&name(NAME)).unwrap();
        assert_eq!(read_texts(&logstore, &ReadOptions::default()).unwrap(), all);
        let text = format!("round {round}");
        put(&logstore, &text);
        all.push(text);
        assert_eq!(read_texts(&logstore, &ReadOptions::default()).unwrap(), all);
        store.admin().apply_retention().unwrap();
        assert!(store.admin().repair(&name(NAME), 0, &RepairOptions::default()).is_ok());
        let report = verify(&store);
        assert!(report.is_clean(), "{report:?}");
        assert!(names.iter().all(|one| report.notes.iter().any(|note| note.contains(one))));
    }
}

/// A name at the end of the shard that its next segment may have hides nothing, and a repair gives
/// it up.
#[test]
fn a_strange_name_at_the_end_is_given_up_by_a_repair() {
    for (kind, epoch) in [0, 3, u64::MAX].into_iter().flat_map(|epoch| [(0, epoch), (1, epoch)]) {
        for first_seq in [20, 1_u64 << 32] {
            let scene = Scene::new();
            let strange = format!("0000000005-{first_seq:020}-{epoch:010}.seg");
            let path = scene.segments[0].with_file_name(&strange);
            make(&path, kind, &scene.segments[0]);
            let store = scene.world.open();
            let logstore = store.logstore(&name(NAME)).unwrap();
            assert!(try_put(&logstore, "refused").is_err(), "{strange}");
            let mut reader = logstore.read(0, &ReadOptions::default()).unwrap();
            let read: Vec<_> =
                reader.by_ref().take(4 * RECORDS as usize).map(Result::unwrap).collect();
            assert_eq!(strings(&read), expected(0, 4 * RECORDS));
            assert!(matches!(reader.next().unwrap(), Err(Error::Lost { .. })), "{strange}");
            let named = |fault: &VerifyFault| fault.message.contains(&strange);
            assert!(verify(&store).faults.iter().any(named), "{strange}");
            store.admin().repair(&name(NAME), 0, &RepairOptions::default()).unwrap();
            put(&logstore, "new");
            let mut all = expected(0, 4 * RECORDS);
            all.push("new".to_owned());
            assert_eq!(read_texts(&logstore, &ReadOptions::default()).unwrap(), all, "{strange}");
        }
    }
}

/// A name at the end of the shard that its next segment cannot have is no segment, whatever has it.
/// Nothing has to be given up, and the shard keeps its numbers.
#[test]
fn a_name_that_no_segment_can_have_needs_no_repair() {
    for kind in 0..5 {
        for first_seq in [1_u64 << 50, u64::MAX - (1 << 32), u64::MAX - 1, u64::MAX] {
            for ordinal in [4, 5] {
                let scene = Scene::new();
                let strange = format!("{ordinal:010}-{first_seq:020}-0000000009.seg");
                let path = scene.segments[0].with_file_name(&strange);
                make(&path, kind, &scene.segments[3]);
                let lost = ordinal == 4;
                if lost {
                    fs::remove_file(&scene.segments[3]).unwrap();
                }
                let store = scene.world.open();
                let logstore = store.logstore(&name(NAME)).unwrap();
                let repaired = store.admin().repair(&name(NAME), 0, &RepairOptions::default());
                assert_eq!(repaired.unwrap().losses.len(), usize::from(lost), "{strange}");
                put(&logstore, "new");
                let mut all = expected(0, if lost { 3 * RECORDS } else { 4 * RECORDS });
                all.push("new".to_owned());
                let read = read_texts(&logstore, &ReadOptions::default());
                assert_eq!(read.unwrap(), all, "{strange}");
                assert!(logstore.end_seq(0).unwrap() < 1 << 33, "{strange}");
                let report = verify(&store);
                assert!(report.is_clean(), "{strange}: {report:?}");
                assert!(report.notes.iter().any(|note| note.contains(&strange)), "{strange}");
            }
        }
    }
}

/// A Logstore that is damaged, shredded or revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bad {
    Metadata,
    NoMetadata,
    Segment,
    LastSegment,
    Shredded,
    Revoked,
}

#[test]
fn a_bad_logstore_hides_no_other() {
    use Bad::*;
    for bad in [Metadata, NoMetadata, Segment, LastSegment, Shredded, Revoked] {
        let world = World::manual();
        let cmk = world.cmk();
        let store = world.create();
        let victim = world.byok(&store, NAME, &cmk);
        put(&world.service(&store, OTHER), "other");
        for n in 0..3 {
            put(&victim, &text(n));
            victim.roll().unwrap();
        }
        let dir = world.logstore_dir(&victim);
        // The metadata, and a copy of it if there is one.
        let is_meta =
            |path: &PathBuf| path.file_name().unwrap().to_string_lossy().starts_with("meta-");
        let meta: Vec<_> = common::files(&dir).into_keys().filter(is_meta).collect();
        let files = segments(&dir, 0);
        drop(victim);
        match bad {
            Shredded => {
                store.keys().rotate_data_key(&name(NAME)).unwrap();
                store.keys().shred_data_keys(&name(NAME), &[1]).unwrap();
            }
            Revoked => world.kms.answer(Answer::Revoked(RevokedReason::Disabled)),
            _ => {}
        }
        store.close().unwrap();
        match bad {
            Metadata => meta.iter().for_each(|path| write_private(path, vec![0; 1000])),
            NoMetadata => meta.iter().for_each(|path| fs::remove_file(path).unwrap()),
            Segment => write_private(&files[1], b"junk"),
            LastSegment => write_private(&files[2], b"junk"),
            Shredded | Revoked => {}
        }
        for read_only in [true, false] {
            let builder = world.builder();
            let store = if read_only { builder.open_read_only() } else { builder.open() }.unwrap();
            assert_eq!(store.list().unwrap(), [name(NAME), name(OTHER)]);
            let other = store.logstore(&name(OTHER)).unwrap();
            assert_eq!(texts(&other), ["other"], "{bad:?}");
            assert_eq!(other.status().unwrap().groups, 1);
            let status = store.logstore(&name(NAME)).and_then(|logstore| logstore.status());
            assert_eq!(status.is_ok(), !matches!(bad, Metadata | NoMetadata), "{bad:?}");
            let checkpoint = store.admin().checkpoint().unwrap();
            let failed: Vec<_> = checkpoint.failed().iter().map(|(name, _)| name).collect();
            let expected = matches!(bad, Metadata | NoMetadata | LastSegment);
            assert_eq!(failed, vec![&name(NAME); expected.into()], "{bad:?}");

            let options = VerifyOptions::default().against(checkpoint);
            let report = store.admin().verify(&options, &mut |_| {}).unwrap();
            let about = |fault: &envelog::admin::VerifyFault| fault.logstore == Some(name(NAME));
            assert!(report.faults.iter().all(about), "{bad:?}: {report:?}");
            assert_eq!(report.faults.is_empty(), matches!(bad, Shredded | Revoked), "{bad:?}");
            assert!(report.blocks > 0);
        }
    }
}

/// The descriptors of this process on files below `dir`.
fn descriptors(dir: &Path) -> usize {
    let all = fs::read_dir("/proc/self/fd").unwrap();
    let targets = all.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok());
    targets.filter(|target| target.starts_with(dir)).count()
}

/// A reader holds one file open, and a merged one holds one for each shard.
#[test]
fn many_segments_are_read_with_few_descriptors() {
    const SHARDS: u32 = 4;
    const SEGMENTS: u64 = 200;
    let world = World::manual_in_memory();
    let store = world.create();
    let conf = EncryptConf::service_key(EncryptType::Aes);
    let spec = LogstoreSpec::default().shard_count(SHARDS).encrypt_conf(conf);
    let logstore = store.create_logstore(&name(NAME), spec).unwrap();
    for n in 0..SEGMENTS {
        for _ in 0..SHARDS {
            world.clock.advance(millis(1));
            logstore.append(record(&n.to_string()), &written()).unwrap();
        }
        logstore.roll().unwrap();
    }
    drop(logstore);
    store.close().unwrap();
    let store = world.builder().open_read_only().unwrap();
    let logstore = store.logstore(&name(NAME)).unwrap();
    let before = descriptors(world.path());
    for mode in [ReadMode::Pread, ReadMode::Map] {
        let reader = logstore.read(0, &ReadOptions::default().mode(mode)).unwrap();
        let (mut most, mut count) = (0, 0);
        for record in reader {
            record.unwrap();
            (most, count) = (most.max(descriptors(world.path())), count + 1);
        }
        assert_eq!((count, most), (SEGMENTS, before + 1), "{mode:?}");
    }
    let mut follow = logstore.follow(0, &ReadOptions::default()).unwrap();
    while follow.try_next().unwrap().is_some() {
        assert!(descriptors(world.path()) <= before + 1);
    }
    drop(follow);
    let mut count = 0;
    for record in logstore.read_merged(&ReadOptions::default()).unwrap() {
        record.unwrap();
        count += 1;
        assert!(descriptors(world.path()) <= before + SHARDS as usize);
    }
    assert_eq!(count, SEGMENTS * u64::from(SHARDS));
    assert!(verify(&store).is_clean());
    assert_eq!(descriptors(world.path()), before);
}
