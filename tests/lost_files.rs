//! Every file of a store, lost or damaged, alone and in pairs: a file that exists twice costs
//! nothing, and every other one costs its own contents only.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use common::{file_fault::FileFault, *};
use envelog::{
    AppendOptions, EncryptConf, EncryptType, Error, ErrorKind, LogstoreSpec, ReadOptions,
    ShardChoice, Store,
    admin::{RepairOptions, VerifyOptions, VerifyReport},
    audit::AuditEvent,
};

const LOGSTORES: [&str; 2] = ["p/byok", "q/service"];
const SHARDS: u32 = 3;
const SEGMENTS: u32 = 4;
const PER_SEGMENT: u32 = 3;

/// What a file is, by its path below the store.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    /// A file that exists twice, by the path of the first.
    Twice(PathBuf),
    /// A segment of a Logstore, by the index of the Logstore and the shard.
    Segment(usize, u32),
    Audit,
    Other,
}

struct Scene {
    world: World,
    copy: tempfile::TempDir,
    /// Every file, below the store.
    files: Vec<PathBuf>,
    /// The directories of the two Logstores, below the store.
    dirs: [PathBuf; 2],
}

/// A file below the store, and its fault.
type Damage<'a> = (&'a Path, FileFault);

impl Scene {
    fn new() -> Self {
        let world = World::manual_in_memory();
        let store = world.create();
        let confs = [
            EncryptConf::byok(EncryptType::Aes, world.cmk()),
            EncryptConf::service_key(EncryptType::Sm4),
        ];
        let mut dirs = Vec::new();
        for (logstore, conf) in LOGSTORES.iter().zip(confs) {
            let spec = LogstoreSpec::default().shard_count(SHARDS).encrypt_conf(conf);
            let logstore = store.create_logstore(&name(logstore), spec).unwrap();
            for segment in 0..SEGMENTS {
                for shard in 0..SHARDS {
                    let options = AppendOptions::default().shard(ShardChoice::Shard(shard));
                    for n in 0..PER_SEGMENT {
                        world.clock.advance(millis(1));
                        logstore.append(record(&text(shard, segment, n)), &options).unwrap();
                    }
                }
                logstore.roll().unwrap();
            }
            dirs.push(world.logstore_dir(&logstore));
        }
        store.close().unwrap();
        let root = world.store_dir();
        let below = |path: &PathBuf| path.strip_prefix(&root).unwrap().to_owned();
        let files = files(&root).keys().map(below).collect();
        let copy = tempfile::tempdir_in(world.path().parent().unwrap()).unwrap();
        copy_dir(&root, &copy.path().join("store"));
        let dirs = [below(&dirs[0]), below(&dirs[1])];
        Self { world, copy, files, dirs }
    }

    fn kind(&self, file: &Path) -> Kind {
        let name = file.file_name().unwrap().to_str().unwrap();
        let first = name.strip_suffix(".copy").unwrap_or(name);
        let parent = file.parent().unwrap();
        if name == "STORE"
            || first != name
            || parent.ends_with("catalogue")
            || name.starts_with("meta-")
        {
            return Kind::Twice(file.with_file_name(first));
        }
        if name.ends_with(".seg") {
            let logstore = self.dirs.iter().position(|dir| file.starts_with(dir)).unwrap();
            let shard = parent.file_name().unwrap().to_str().unwrap();
            return Kind::Segment(logstore, shard.strip_prefix("shard-").unwrap().parse().unwrap());
        }
        if parent.ends_with("audit") { Kind::Audit } else { Kind::Other }
    }

    /// The path of the file whose two copies are both damaged, if there is one.
    fn lost_twice(&self, damage: &[Damage<'_>]) -> Option<PathBuf> {
        match damage.iter().map(|(file, _)| self.kind(file)).collect::<Vec<_>>().as_slice() {
            [Kind::Twice(one), Kind::Twice(two)] if one == two => Some(one.clone()),
            _ => None,
        }
    }

    fn check(&self, damage: &[Damage<'_>]) {
        let root = self.world.store_dir();
        copy_dir(&self.copy.path().join("store"), &root);
        for (file, fault) in damage {
            fault.apply(&root.join(file));
        }
        let lost = self.lost_twice(damage);
        let logstore = lost
            .as_ref()
            .and_then(|lost| self.dirs.iter().position(|dir| lost.parent() == Some(dir)));
        if lost.is_some() && logstore.is_none() {
            return self.check_lost_store(damage);
        }
        let store = self.world.builder().open_read_only().unwrap();
        self.check_reads(&store, damage, logstore);
        drop(store);

        let store = self.world.open();
        let report = store.admin().repair_all(&RepairOptions::default()).unwrap();
        if let Some(lost) = logstore {
            let failed: Vec<_> = report.failed.iter().map(|failed| &failed.logstore).collect();
            assert_eq!(failed, [&name(LOGSTORES[lost])]);
            assert_eq!(report.failed[0].error.kind(), ErrorKind::Integrity);
            let other = store.admin().give_up(&name(LOGSTORES[1 - lost])).unwrap_err();
            assert!(matches!(other, Error::InvalidArgument(_)), "{other}");
            store.admin().give_up(&name(LOGSTORES[lost])).unwrap();
        } else {
            assert!(report.failed.is_empty(), "{damage:?}: {report:?}");
        }
        self.append(&store, logstore);
        self.check_repaired(&store, damage, logstore);
        store.close().unwrap();
        let store = self.world.open();
        self.append(&store, logstore);
        self.check_repaired(&store, damage, logstore);
        store.close().unwrap();
        let store = self.world.builder().open_read_only().unwrap();
        let report = verify(&store);
        assert!(report.is_clean(), "{damage:?}: {report:?}");
        let copies = report.notes.iter().filter(|note| note.contains("other copy"));
        assert_eq!(
            copies.count(),
            0,
            "the openings for writing wrote the copies again: {report:?}"
        );
    }

    /// `STORE` or the catalogue is lost, and its second copy too.
    fn check_lost_store(&self, damage: &[Damage<'_>]) {
        for error in [
            self.world.builder().open_read_only().unwrap_err(),
            self.world.builder().open().unwrap_err(),
        ] {
            let typed = error.kind() == ErrorKind::Integrity
                || matches!(error, Error::StoreMissing { .. } | Error::NotAStore { .. });
            assert!(typed, "{damage:?}: {error:?}");
        }
    }

    /// The segments of a shard that are damaged, by their position.
    fn damaged(&self, damage: &[Damage<'_>], logstore: usize, shard: u32) -> BTreeSet<u32> {
        let of_shard =
            damage.iter().filter(|(file, _)| self.kind(file) == Kind::Segment(logstore, shard));
        let ordinal = |file: &Path| -> u32 {
            let name = file.file_name().unwrap().to_str().unwrap();
            name.split_once('-').unwrap().0.parse().unwrap()
        };
        of_shard.map(|(file, _)| ordinal(file) - 1).collect()
    }

    fn check_reads(&self, store: &Store, damage: &[Damage<'_>], lost: Option<usize>) {
        for (index, logstore) in LOGSTORES.iter().enumerate() {
            let opened = store.logstore(&name(logstore));
            if lost == Some(index) {
                let error = opened.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Integrity, "{damage:?}: {error}");
                continue;
            }
            let logstore = opened.unwrap();
            for shard in 0..SHARDS {
                let damaged = self.damaged(damage, index, shard);
                let read: Vec<_> = logstore.read(shard, &ReadOptions::default()).unwrap().collect();
                assert_eq!(read.last().unwrap().is_err(), !damaged.is_empty(), "{damage:?}");
                let options = ReadOptions::default().skip_lost(true);
                let read: Vec<_> =
                    logstore.read(shard, &options).unwrap().map(Result::unwrap).collect();
                check_texts(&strings(&read), shard, &damaged, damage);
            }
        }
    }

    fn append(&self, store: &Store, lost: Option<usize>) {
        for logstore in intact(lost) {
            let logstore = store.logstore(&name(logstore)).unwrap();
            for shard in 0..SHARDS {
                let options = AppendOptions::default().shard(ShardChoice::Shard(shard));
                logstore.append(record("after the repair"), &options).unwrap();
            }
        }
    }

    fn check_repaired(&self, store: &Store, damage: &[Damage<'_>], lost: Option<usize>) {
        for (index, logstore) in LOGSTORES.iter().enumerate() {
            if lost == Some(index) {
                assert!(matches!(store.logstore(&name(logstore)), Err(Error::LogstoreMissing(_))));
                continue;
            }
            let logstore = store.logstore(&name(logstore)).unwrap();
            for shard in 0..SHARDS {
                let read = logstore.read(shard, &ReadOptions::default()).unwrap();
                let read: Vec<_> = read.map(Result::unwrap).collect();
                let mut read = strings(&read);
                assert_eq!(read.pop().unwrap(), "after the repair");
                read.retain(|text| text != "after the repair");
                check_texts(&read, shard, &self.damaged(damage, index, shard), damage);
            }
        }
        let report = verify(store);
        assert!(report.is_clean(), "{damage:?}: {report:?}");
        let kinds: Vec<_> = damage.iter().map(|(file, _)| self.kind(file)).collect();
        let costs = |kind: &Kind| matches!(kind, Kind::Segment(..) | Kind::Audit);
        if kinds.iter().any(costs) || lost.is_some() {
            let records = store.keys().audit_records().unwrap();
            let accepts = |event| matches!(event, AuditEvent::LossAccepted | AuditEvent::GivenUp);
            assert!(records.iter().any(|record| accepts(record.event)), "{damage:?}");
        }
    }
}

fn intact(lost: Option<usize>) -> impl Iterator<Item = &'static str> {
    let all = LOGSTORES.iter().enumerate();
    all.filter(move |(index, _)| lost != Some(*index)).map(|(_, name)| *name)
}

fn text(shard: u32, segment: u32, n: u32) -> String {
    format!("{shard}.{segment}.{n} {}", noise(u64::from(n), 200))
}

/// Everything in whole segments is there, in order, and nothing else but parts of the others.
fn check_texts(read: &[String], shard: u32, damaged: &BTreeSet<u32>, damage: &[Damage<'_>]) {
    let all = (0..SEGMENTS).flat_map(|segment| (0..PER_SEGMENT).map(move |n| (segment, n)));
    let mut rest = read.iter().peekable();
    for (segment, n) in all {
        let text = text(shard, segment, n);
        if rest.next_if(|read| **read == text).is_none() {
            assert!(damaged.contains(&segment), "{damage:?}: {text} of shard {shard} is gone");
        }
    }
    assert_eq!(rest.next(), None, "{damage:?}: other data in shard {shard}");
}

fn verify(store: &Store) -> VerifyReport {
    store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap()
}

#[test]
fn one_lost_file_costs_its_own_contents() {
    let scene = Scene::new();
    assert!(scene.files.len() >= 34, "{:?}", scene.files);
    for file in &scene.files {
        for fault in FileFault::ALL {
            scene.check(&[(file, fault)]);
        }
    }
}

#[test]
fn two_lost_files_cost_their_own_contents() {
    let scene = Scene::new();
    // Of the segments of a shard, the first and the last stand for all.
    let chosen: Vec<_> = scene
        .files
        .iter()
        .filter(|file| {
            let name = file.file_name().unwrap().to_str().unwrap();
            !name.ends_with(".seg")
                || name.starts_with("0000000001")
                || name.starts_with("0000000004")
        })
        .filter(|file| !file.to_str().unwrap().contains("shard-0002"))
        .collect();
    let mut round = 0;
    for (index, one) in chosen.iter().enumerate() {
        for two in &chosen[index + 1..] {
            let all = || FileFault::ALL.into_iter();
            if scene.lost_twice(&[(one, FileFault::Lost), (two, FileFault::Lost)]).is_some() {
                for (fault, other) in all().flat_map(|one| all().map(move |two| (one, two))) {
                    scene.check(&[(one, fault), (two, other)]);
                }
                continue;
            }
            scene.check(&[(one, FileFault::ALL[round % 5]), (two, FileFault::ALL[round / 5 % 5])]);
            round += 1;
        }
    }
}

/// Whole directories, and files that a store can do without.
#[test]
fn lost_directories_keep_nothing_shut() {
    let scene = Scene::new();
    for lost in
        [&["audit"][..], &["probes"], &["LOCK"], &["EPOCH"], &["audit", "probes", "LOCK", "EPOCH"]]
    {
        let root = scene.world.store_dir();
        copy_dir(&scene.copy.path().join("store"), &root);
        for lost in lost {
            let path = root.join(lost);
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }.unwrap();
        }
        let store = scene.world.builder().open_read_only().unwrap();
        scene.check_reads(&store, &[], None);
        drop(store);
        let store = scene.world.open();
        scene.append(&store, None);
        let audit_is_lost = lost.contains(&"audit");
        assert_eq!(verify(&store).is_clean(), !audit_is_lost, "{lost:?}");
        let report = store.admin().repair_all(&RepairOptions::default()).unwrap();
        assert_eq!(report.audit.is_some(), audit_is_lost, "{lost:?}");
        scene.check_repaired(&store, &[], None);
        store.close().unwrap();
        let store = scene.world.open();
        assert!(verify(&store).is_clean(), "{lost:?}");
        store.close().unwrap();
    }
}
