//! Lost and damaged segments: they cost their own contents and nothing else, and an operator can
//! accept the loss.

#![allow(clippy::unwrap_used)]

mod common;

use std::{collections::BTreeSet, fs, path::PathBuf};

use common::{file_fault::FileFault, *};
use envelog::{
    AppendOptions, EncryptConf, EncryptType, Error, ErrorKind, Logstore, LogstoreSpec, ReadOptions,
    ShardChoice, Store,
    admin::{BackupOptions, Checkpoint, RepairOptions, VerifyOptions, VerifyReport},
    audit::AuditEvent,
};

const NAME: &str = "p/l";
const SHARDS: u32 = 3;
const SEGMENTS: u32 = 4;

/// A store with four segments in each of three shards, and a copy of it.
struct Scene {
    world: World,
    copy: tempfile::TempDir,
    /// By shard: each segment with the texts in it.
    segments: Vec<Vec<(PathBuf, Vec<String>)>>,
    checkpoint: Checkpoint,
}

impl Scene {
    fn new(conf: impl FnOnce(&World) -> EncryptConf) -> Self {
        let world = World::manual_in_memory();
        let store = world.create();
        let spec = LogstoreSpec::default().shard_count(SHARDS).encrypt_conf(conf(&world));
        let logstore = store.create_logstore(&name(NAME), spec).unwrap();
        let mut texts = vec![Vec::new(); SHARDS as usize];
        for segment in 0..SEGMENTS {
            for (shard, texts) in (0..).zip(&mut texts) {
                let options = AppendOptions::default().shard(ShardChoice::Shard(shard));
                let all: Vec<String> =
                    (0..6).map(|n| format!("{shard}.{segment}.{n} {}", noise(n, 300))).collect();
                for text in &all {
                    world.clock.advance(millis(1));
                    logstore.append(record(text), &options).unwrap();
                }
                texts.push(all);
            }
            logstore.roll().unwrap();
            if segment == 1 {
                store.keys().rotate_data_key(&name(NAME)).unwrap();
            }
        }
        let checkpoint = store.admin().checkpoint().unwrap();
        let dir = world.logstore_dir(&logstore);
        drop(logstore);
        store.close().unwrap();
        let segments = (0..)
            .zip(texts)
            .map(|(shard, texts)| segments(&dir, shard).into_iter().zip(texts).collect())
            .collect();
        let copy = tempfile::tempdir_in(world.path().parent().unwrap()).unwrap();
        copy_dir(&world.store_dir(), &copy.path().join("store"));
        Self { world, copy, segments, checkpoint }
    }

    /// Puts the store back as it was.
    fn restore(&self) {
        fs::remove_dir_all(self.world.store_dir()).unwrap();
        copy_dir(&self.copy.path().join("store"), &self.world.store_dir());
    }

    fn verify(&self, store: &Store, against: bool) -> VerifyReport {
        let against = against.then(|| self.checkpoint.clone());
        store.admin().verify(&VerifyOptions::default().against(against), &mut |_| {}).unwrap()
    }

    /// Damages segments, and checks readers, verification, repair and appends.
    fn check(&self, damaged: &[(u32, u32, FileFault)]) {
        self.restore();
        for (shard, segment, fault) in damaged {
            fault.apply(&self.segments[*shard as usize][*segment as usize].0);
        }
        let store = self.world.builder().open_read_only().unwrap();
        let logstore = store.logstore(&name(NAME)).unwrap();
        for shard in 0..SHARDS {
            self.check_reads(&logstore, shard, damaged);
        }
        assert!(!self.verify(&store, false).is_clean(), "{damaged:?}");
        logstore.status().unwrap();
        drop((logstore, store));

        let store = self.world.open();
        let logstore = store.logstore(&name(NAME)).unwrap();
        for shard in 0..SHARDS {
            let accepted =
                store.admin().repair(&name(NAME), shard, &RepairOptions::default()).unwrap();
            let is_damaged = damaged.iter().any(|(one, ..)| *one == shard);
            assert_eq!(accepted.losses.is_empty(), !is_damaged, "{damaged:?}: {accepted:?}");
        }
        self.check_repaired(&store, &logstore, damaged, 0);
        drop(logstore);
        store.close().unwrap();
        let store = self.world.open();
        self.check_repaired(&store, &store.logstore(&name(NAME)).unwrap(), damaged, 1);
        store.close().unwrap();
        let store = self.world.builder().open_read_only().unwrap();
        let report = self.verify(&store, false);
        assert!(report.is_clean(), "{damaged:?}: {report:?}");
        assert!(report.notes.iter().any(|note| note.contains("accepted")), "{report:?}");
        assert!(!self.verify(&store, true).is_clean(), "{damaged:?}: the checkpoint has the data");
    }

    fn is_damaged(shard: u32, segment: u32, damaged: &[(u32, u32, FileFault)]) -> bool {
        damaged.iter().any(|(one, two, _)| (*one, *two) == (shard, segment))
    }

    /// The texts in the segments of a shard that are whole, and those in all segments.
    fn expected(
        &self,
        shard: u32,
        damaged: &[(u32, u32, FileFault)],
    ) -> (Vec<String>, Vec<String>) {
        let all = self.segments[shard as usize].iter();
        let whole = (0..).zip(all.clone()).filter(|(at, _)| !Self::is_damaged(shard, *at, damaged));
        let whole = whole.flat_map(|(_, (_, texts))| texts.clone()).collect();
        (whole, all.flat_map(|(_, texts)| texts.clone()).collect())
    }

    fn check_reads(&self, logstore: &Logstore, shard: u32, damaged: &[(u32, u32, FileFault)]) {
        let (whole, all) = self.expected(shard, damaged);
        let mut read = Vec::new();
        let mut end = None;
        for record in logstore.read(shard, &ReadOptions::default()).unwrap() {
            match record {
                Ok(record) => read.extend(strings(&[record])),
                Err(error) => end = Some(error),
            }
        }
        assert_eq!(read, all[..read.len()], "{damaged:?}: a prefix");
        let first = (0..SEGMENTS).find(|at| Self::is_damaged(shard, *at, damaged));
        match (first, end) {
            (None, None) => assert_eq!(read, all),
            (Some(first), Some(Error::Lost { shard: of, from_seq, end_seq, cause })) => {
                assert_eq!(of, shard);
                assert!(cause.kind() == ErrorKind::Integrity, "{cause}");
                assert!(end_seq.is_none_or(|end| end > from_seq), "{damaged:?}");
                let before = first as usize * 6;
                assert!((before..before + 6).contains(&read.len()), "{damaged:?}: {}", read.len());
            }
            other => panic!("{damaged:?}: {other:?}"),
        }
        let options = ReadOptions::default().skip_lost(true);
        self.check_contents(logstore, shard, &options, &whole, &all, damaged);
    }

    /// Everything in whole segments is read, in order, and nothing else but parts of the others.
    fn check_contents(
        &self,
        logstore: &Logstore,
        shard: u32,
        options: &ReadOptions,
        whole: &[String],
        all: &[String],
        damaged: &[(u32, u32, FileFault)],
    ) {
        let mut reader = logstore.read(shard, options).unwrap();
        let read: Vec<_> = (&mut reader).map(|record| record.unwrap()).collect();
        let read = strings(&read);
        let mut rest = all.iter();
        assert!(read.iter().all(|text| rest.any(|one| one == text)), "{damaged:?}: {read:?}");
        let set: BTreeSet<_> = read.iter().collect();
        assert!(whole.iter().all(|text| set.contains(text)), "{damaged:?}: {read:?}");
        let is_damaged = damaged.iter().any(|(one, ..)| *one == shard);
        assert_eq!(reader.lost().is_empty(), !is_damaged, "{damaged:?}: {:?}", reader.lost());
    }

    fn check_repaired(
        &self,
        store: &Store,
        logstore: &Logstore,
        damaged: &[(u32, u32, FileFault)],
        round: u32,
    ) {
        for shard in 0..SHARDS {
            let options = AppendOptions::default().shard(ShardChoice::Shard(shard));
            let text = format!("{shard} after repair {round}");
            logstore.append(record(&text), &options).unwrap();
            let (mut whole, mut all) = self.expected(shard, damaged);
            for round in 0..=round {
                let text = format!("{shard} after repair {round}");
                whole.push(text.clone());
                all.push(text);
            }
            let mut reader = logstore.read(shard, &ReadOptions::default()).unwrap();
            let read: Vec<_> = (&mut reader).map(|record| record.unwrap()).collect();
            let numbers: BTreeSet<_> = read.iter().map(|record| record.seq).collect();
            assert_eq!(numbers.len(), read.len());
            let read = strings(&read);
            let set: BTreeSet<_> = read.iter().collect();
            assert!(whole.iter().all(|text| set.contains(text)), "{damaged:?}: {read:?}");
            let mut rest = all.iter();
            assert!(read.iter().all(|text| rest.any(|one| one == text)), "{damaged:?}: {read:?}");
        }
        let report = self.verify(store, false);
        assert!(report.is_clean(), "{damaged:?}: {report:?}");
        let losses = logstore.status().unwrap().losses;
        let shards: BTreeSet<_> = losses.iter().map(|loss| loss.shard).collect();
        assert_eq!(shards, damaged.iter().map(|(shard, ..)| *shard).collect());
        let records = store.keys().audit_records().unwrap();
        let accepted = records.iter().filter(|record| record.event == AuditEvent::LossAccepted);
        assert!(accepted.count() >= shards.len());
    }
}

fn byok(world: &World) -> EncryptConf {
    EncryptConf::byok(EncryptType::Aes, world.cmk())
}

fn service(_: &World) -> EncryptConf {
    EncryptConf::service_key(EncryptType::Sm4)
}

fn all_segments() -> impl Iterator<Item = (u32, u32)> {
    (0..SHARDS).flat_map(|shard| (0..SEGMENTS).map(move |segment| (shard, segment)))
}

#[test]
fn one_damaged_segment_costs_its_own_contents() {
    for scene in [Scene::new(service), Scene::new(byok)] {
        for (shard, segment) in all_segments() {
            for fault in FileFault::ALL {
                scene.check(&[(shard, segment, fault)]);
            }
        }
    }
}

/// The file of an accepted loss is there again.
#[test]
fn a_segment_that_comes_back_is_read() {
    let scene = Scene::new(byok);
    for lost in 0..SEGMENTS as usize {
        scene.restore();
        let path = &scene.segments[0][lost].0;
        let bytes = fs::read(path).unwrap();
        fs::write(path, b"junk").unwrap();
        let store = scene.world.open();
        store.admin().repair(&name(NAME), 0, &RepairOptions::default()).unwrap();
        let logstore = store.logstore(&name(NAME)).unwrap();
        put_in_first(&logstore, "behind it");
        drop(logstore);
        store.close().unwrap();
        fs::write(path, bytes).unwrap();
        let store = scene.world.open();
        let logstore = store.logstore(&name(NAME)).unwrap();
        let (_, mut all) = scene.expected(0, &[]);
        all.push("behind it".to_owned());
        assert_eq!(texts(&logstore), all, "segment {lost}");
        assert!(scene.verify(&store, false).is_clean());
    }
}

fn put_in_first(logstore: &Logstore, text: &str) {
    let options = AppendOptions::default().shard(ShardChoice::Shard(0));
    logstore.append(record(text), &options).unwrap();
}

#[test]
fn two_damaged_segments_cost_their_own_contents() {
    let scene = Scene::new(byok);
    let pairs = all_segments().flat_map(|one| all_segments().map(move |two| (one, two)));
    for (index, ((a, b), (c, d))) in pairs.filter(|(one, two)| one < two).enumerate() {
        let (one, two) = (FileFault::ALL[index % 5], FileFault::ALL[index / 5 % 5]);
        scene.check(&[(a, b, one), (c, d, two)]);
    }
}

/// How the file of a segment is replaced.
#[derive(Clone, Copy, Debug)]
enum Exchange {
    /// By the other one, and the other one by it.
    Swapped((u32, u32)),
    /// By a copy of another one.
    Foreign((u32, u32)),
    Directory,
    Link,
}

impl Scene {
    fn path(&self, (shard, segment): (u32, u32)) -> &PathBuf {
        &self.segments[shard as usize][segment as usize].0
    }

    /// Exchanges a segment. Returns those that cannot be read any more.
    fn exchange(&self, at: (u32, u32), exchange: Exchange) -> BTreeSet<(u32, u32)> {
        let path = self.path(at);
        let bytes = fs::read(path).unwrap();
        let mut lost = BTreeSet::from([at]);
        match exchange {
            Exchange::Swapped(other) => {
                fs::write(path, fs::read(self.path(other)).unwrap()).unwrap();
                fs::write(self.path(other), bytes).unwrap();
                lost.insert(other);
            }
            Exchange::Foreign(other) => {
                fs::write(path, fs::read(self.path(other)).unwrap()).unwrap();
            }
            Exchange::Directory => {
                fs::remove_file(path).unwrap();
                fs::create_dir(path).unwrap();
            }
            Exchange::Link => {
                let there = self.copy.path().join("segment");
                fs::write(&there, &bytes).unwrap();
                fs::remove_file(path).unwrap();
                std::os::unix::fs::symlink(&there, path).unwrap();
            }
        }
        lost
    }

    fn check_exchanged(&self, at: (u32, u32), exchange: Exchange) {
        self.restore();
        let lost = self.exchange(at, exchange);
        let is_lost = |shard, segment| lost.contains(&(shard, segment));
        let store = self.world.builder().open_read_only().unwrap();
        let logstore = store.logstore(&name(NAME)).unwrap();
        for (shard, segments) in (0..).zip(&self.segments) {
            let in_front = (0..).zip(segments).take_while(|(one, _)| !is_lost(shard, *one));
            let in_front: Vec<_> = in_front.flat_map(|(_, (_, texts))| texts.clone()).collect();
            let (mut read, mut end) = (Vec::new(), None);
            for record in logstore.read(shard, &ReadOptions::default()).unwrap() {
                match record {
                    Ok(record) => read.push(record),
                    Err(error) => end = Some(error.kind()),
                }
            }
            assert_eq!(strings(&read), in_front, "{at:?} {exchange:?}");
            let hit = (0..SEGMENTS).any(|segment| is_lost(shard, segment));
            assert_eq!(end, hit.then_some(ErrorKind::Integrity), "{at:?} {exchange:?}");
        }
        assert!(!self.verify(&store, false).is_clean());
        drop((logstore, store));

        let store = self.world.open();
        let mut accepted = BTreeSet::new();
        for shard in 0..SHARDS {
            let refused = store.admin().repair(&name(NAME), shard, &RepairOptions::default());
            let hit = (0..SEGMENTS).any(|segment| is_lost(shard, segment));
            assert_eq!(refused.is_err(), hit, "{at:?} {exchange:?}: {refused:?}");
            let options = RepairOptions::default().accept_tampered(true);
            let report = store.admin().repair(&name(NAME), shard, &options).unwrap();
            for loss in report.losses {
                accepted.extend(
                    (loss.first_ordinal..=loss.last_ordinal).map(|at| (shard, at as u32 - 1)),
                );
            }
        }
        assert_eq!(accepted, lost, "{at:?} {exchange:?}");
        let logstore = store.logstore(&name(NAME)).unwrap();
        put_in_first(&logstore, "after the repair");
        for (shard, segments) in (0..).zip(&self.segments) {
            let whole = (0..).zip(segments).filter(|(one, _)| !is_lost(shard, *one));
            let mut whole: Vec<_> = whole.flat_map(|(_, (_, texts))| texts.clone()).collect();
            whole.extend((shard == 0).then(|| "after the repair".to_owned()));
            let read: Vec<_> = logstore
                .read(shard, &ReadOptions::default())
                .unwrap()
                .map(|record| record.unwrap())
                .collect();
            assert_eq!(strings(&read), whole, "{at:?} {exchange:?}");
        }
        let status = logstore.status().unwrap();
        assert!(status.unreadable_segments == 0 && !status.losses.is_empty(), "{status:?}");
        assert_eq!(store.admin().checkpoint().unwrap().failed().len(), 0);
        store.admin().apply_retention().unwrap();
        let backup = tempfile::tempdir_in(self.world.path()).unwrap();
        let options = BackupOptions::default().copy(true);
        let report = store.admin().backup(backup.path(), &options, &mut |_| {}).unwrap();
        assert_eq!(report.faults, [], "{at:?} {exchange:?}");
        drop(logstore);
        store.close().unwrap();
        let store = self.world.builder().open_read_only().unwrap();
        let report = self.verify(&store, false);
        assert!(report.is_clean(), "{at:?} {exchange:?}: {report:?}");
    }
}

/// Another object in the place of a segment costs the contents of that place, and no other: not
/// those of the segment in front of it, whose end the successor names.
#[test]
fn an_exchanged_segment_costs_its_own_contents() {
    for scene in [Scene::new(service), Scene::new(byok)] {
        for at in (0..SEGMENTS).map(|segment| (0, segment)) {
            for other in all_segments().filter(|other| *other != at) {
                scene.check_exchanged(at, Exchange::Swapped(other));
                scene.check_exchanged(at, Exchange::Foreign(other));
            }
            scene.check_exchanged(at, Exchange::Directory);
            scene.check_exchanged(at, Exchange::Link);
        }
    }
}

/// A segment of a fork of the store has the name of another one and an authentic header.
#[test]
fn a_segment_of_a_fork_costs_its_own_contents() {
    for exchanged in [2, 3] {
        let world = World::manual_in_memory();
        let store = world.create();
        let logstore = world.service(&store, NAME);
        let write = |logstore: &Logstore, texts: [&str; 2]| {
            for text in texts {
                put_in_first(logstore, text);
                logstore.roll().unwrap();
            }
        };
        write(&logstore, ["1", "2"]);
        let dir = world.logstore_dir(&logstore);
        drop(logstore);
        store.close().unwrap();
        let fork = world.path().join("fork");
        copy_dir(&world.store_dir(), &fork);
        let stores = [world.open(), world.builder_at(&fork).open().unwrap()];
        for (store, texts) in stores.into_iter().zip([["3", "4"], ["other 3", "other 4"]]) {
            write(&store.logstore(&name(NAME)).unwrap(), texts);
            store.close().unwrap();
        }
        let path = segments(&dir, 0).remove(exchanged);
        let other = fork.join(path.strip_prefix(world.store_dir()).unwrap());
        fs::copy(other, &path).unwrap();

        let store = world.open();
        let logstore = store.logstore(&name(NAME)).unwrap();
        let mut all = vec!["1", "2", "3", "4"];
        let mut reader = logstore.read(0, &ReadOptions::default()).unwrap();
        let read: Vec<_> = reader.by_ref().map_while(Result::ok).collect();
        assert_eq!(strings(&read), all[..exchanged]);
        store.admin().repair(&name(NAME), 0, &RepairOptions::default()).unwrap_err();
        let options = RepairOptions::default().accept_tampered(true);
        let losses = store.admin().repair(&name(NAME), 0, &options).unwrap().losses;
        let ordinals: Vec<_> =
            losses.iter().map(|loss| (loss.first_ordinal, loss.last_ordinal)).collect();
        let ordinal = exchanged as u64 + 1;
        assert_eq!(ordinals, [(ordinal, ordinal)]);
        drop(logstore);
        store.close().unwrap();
        let store = world.open();
        let logstore = store.logstore(&name(NAME)).unwrap();
        put_in_first(&logstore, "after the repair");
        all.remove(exchanged);
        all.push("after the repair");
        assert_eq!(texts(&logstore), all, "{exchanged}");
        let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
        assert!(report.is_clean(), "{exchanged}: {report:?}");
    }
}
