//! Copies of a store that is written meanwhile: backups, and plain copies by `cp`, `tar`, `rsync` and
//! in random order.
//!
//! `ENVELOG_COPIES` sets the number of copies, `ENVELOG_COPIES_SEED` repeats a run.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    ops::Range,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use common::{disk::Dice, *};
use envelog::{
    AppendOptions, EncryptConf, EncryptType, Error, LogstoreSpec, ReadOptions, ShardChoice, Store,
    admin::{BackupOptions, Checkpoint, RepairOptions, RestoreOptions, VerifyOptions},
    inspect::{BlockHeader, SegmentHeader},
};

const SHARDS: u32 = 2;
/// Logstores that are only appended to.
const KEPT: [&str; 3] = ["p/plain", "p/service", "p/byok"];
/// A Logstore that retention drops segments of.
const RETAINED: &str = "p/retained";
/// A Logstore that is deleted and created again.
const PASSING: &str = "p/passing";

/// A record by the Logstore's name, its shard and its number.
type Place = (&'static str, u32, u64);
type Records = BTreeMap<Place, String>;

/// How a copy is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Backup,
    Cp,
    Tar,
    Rsync,
    Random,
    Backwards,
}

const WAYS: [How; 6] = [How::Backup, How::Cp, How::Random, How::Tar, How::Backwards, How::Rsync];

/// The writer's side, while copies are made.
struct Scene {
    world: World,
    store: Store,
    acknowledged: Mutex<Records>,
    /// Held for reading during each operation, and for writing while a copy is checked.
    working: RwLock<()>,
    stop: AtomicBool,
}

impl Scene {
    fn new() -> Self {
        let mut world = World::threads();
        world.options.segment_bytes = 48 << 10;
        world.options.block_bytes = 8 << 10;
        world.options.head_every = millis(100);
        let store = world.create();
        let spec = || LogstoreSpec::default().shard_count(SHARDS);
        let service = || EncryptConf::service_key(EncryptType::Sm4);
        let byok = EncryptConf::byok(EncryptType::Aes, world.cmk());
        let confs = [None, Some(service()), Some(byok)];
        for (text, conf) in KEPT.into_iter().zip(confs) {
            store.create_logstore(&name(text), spec().encrypt_conf(conf)).unwrap();
        }
        let retained = spec().encrypt_conf(service()).retention_bytes(64 << 10);
        store.create_logstore(&name(RETAINED), retained).unwrap();
        store.create_logstore(&name(PASSING), spec().encrypt_conf(service())).unwrap();
        let (acknowledged, working) = (Mutex::default(), RwLock::default());
        Self { world, store, acknowledged, working, stop: AtomicBool::new(false) }
    }

    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Appends until the end. Notes each record once it is durable.
    fn write(&self, text: &'static str, shard: u32) {
        let options = AppendOptions::default().shard(ShardChoice::Shard(shard));
        for number in 0u64.. {
            if !self.goes_on() {
                return;
            }
            let working = self.working.read().unwrap();
            let content = format!("{text} {shard} {number} {}", noise(number, 500));
            let appended = self
                .store
                .logstore(&name(text))
                .and_then(|logstore| logstore.append(record(&content), &options));
            match appended {
                Ok(appended) => {
                    let place = (text, shard, appended.seq);
                    self.acknowledged.lock().unwrap().insert(place, content);
                }
                // The Logstore was deleted.
                Err(_) if text == PASSING => {}
                Err(error) => panic!("{text}: {error}"),
            }
            drop(working);
            thread::sleep(millis(1));
        }
    }

    /// Rolls, rotates data keys, applies retention, deletes and creates, until the end.
    fn administer(&self, seed: u64) {
        let mut dice = Dice::new(seed, 1);
        while self.goes_on() {
            thread::sleep(millis(5 + dice.roll(40)));
            let _working = self.working.read().unwrap();
            match dice.roll(6) {
                0 | 1 => {
                    let text = KEPT[dice.roll(3) as usize];
                    self.store.logstore(&name(text)).unwrap().roll().unwrap();
                }
                2 | 3 => {
                    let text = [KEPT[1], KEPT[2], RETAINED][dice.roll(3) as usize];
                    self.store.keys().rotate_data_key(&name(text)).unwrap();
                }
                4 => drop(self.store.admin().apply_retention().unwrap()),
                _ => {
                    self.store.delete_logstore(&name(PASSING)).unwrap();
                    let spec = LogstoreSpec::default().shard_count(SHARDS);
                    let conf = EncryptConf::service_key(EncryptType::Aes);
                    self.store.create_logstore(&name(PASSING), spec.encrypt_conf(conf)).unwrap();
                }
            }
        }
    }

    /// The records that are durable now.
    fn durable(&self) -> Records {
        self.acknowledged.lock().unwrap().clone()
    }

    /// Makes a copy.
    fn copy(&self, how: How, to: &Path, dice: &mut Dice) {
        let from = self.world.store_dir();
        if how == How::Backup {
            let reader = self.world.builder().open_read_only().unwrap();
            let options = BackupOptions::default().copy(dice.roll(2) == 0);
            let report = reader.admin().backup(to, &options, &mut |_| {}).unwrap();
            assert_eq!(report.faults, [], "{how:?}");
            assert_eq!(report.without_keys, []);
            return;
        }
        fs::create_dir(to).unwrap();
        match how {
            How::Cp => run(Command::new("cp").arg("-r").arg(from.join(".")).arg(to)),
            How::Rsync if has("rsync") => {
                run(Command::new("rsync").arg("-a").arg(from.join(".")).arg(to));
            }
            How::Tar => {
                let pipe = format!(
                    "tar -C '{}' -cf - . | tar -C '{}' -xf -",
                    from.display(),
                    to.display()
                );
                run(Command::new("sh").arg("-c").arg(pipe));
            }
            _ => {
                let mut paths: Vec<PathBuf> = below(&from);
                paths.sort();
                if how == How::Backwards {
                    paths.reverse();
                } else {
                    for last in (1..paths.len()).rev() {
                        paths.swap(last, dice.roll(last as u64 + 1) as usize);
                    }
                }
                for path in &paths {
                    copy_one(&from, path, to);
                    thread::sleep(std::time::Duration::from_micros(dice.roll(300)));
                }
            }
        }
        // A tool that meets a catalogue or metadata which vanishes reports that, and its user runs it
        // again.
        let has_file = |dir: &Path| {
            let files = fs::read_dir(dir).into_iter().flatten().flatten();
            files.into_iter().any(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
        };
        let mut needed = vec![from.join("catalogue")];
        needed.extend(
            KEPT.map(|text| self.world.logstore_dir(&self.store.logstore(&name(text)).unwrap())),
        );
        for dir in needed {
            while !has_file(&to.join(dir.strip_prefix(&from).unwrap())) {
                for entry in fs::read_dir(&dir).unwrap().flatten() {
                    if entry.file_type().is_ok_and(|kind| kind.is_file()) {
                        copy_one(&from, &entry.path(), to);
                    }
                }
            }
        }
    }
}

fn has(tool: &str) -> bool {
    Command::new(tool).arg("--version").stdout(Stdio::null()).status().is_ok_and(|it| it.success())
}

fn run(command: &mut Command) {
    // It may end with an error, since files vanish.
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
}

fn below(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => dirs.push(entry.path()),
                _ => found.push(entry.path()),
            }
        }
    }
    found
}

fn copy_one(from: &Path, path: &Path, to: &Path) {
    let to = to.join(path.strip_prefix(from).unwrap());
    fs::create_dir_all(to.parent().unwrap()).unwrap();
    // It may have vanished.
    let _ = fs::copy(path, to);
}

/// The sequence numbers in the whole blocks of the segment files of a shard.
fn numbers_in(dir: &Path) -> BTreeSet<u64> {
    let mut numbers = BTreeSet::new();
    for path in below(dir) {
        if path.extension().is_none_or(|extension| extension != "seg") {
            continue;
        }
        let bytes = fs::read(&path).unwrap();
        let Ok(header) = SegmentHeader::decode(&bytes) else { continue };
        let mut at = header.body_start as usize;
        while let Some(Ok(block)) = bytes.get(at..at + BlockHeader::LEN).map(BlockHeader::decode) {
            let end = at + block.block_len() as usize;
            if end > bytes.len() {
                break;
            }
            numbers.extend(block.first_seq..block.first_seq + u64::from(block.group_count));
            at = end;
        }
    }
    numbers
}

/// What a copy has.
struct Found {
    records: Records,
    /// The Logstores that cannot be opened.
    closed: Vec<&'static str>,
}

/// Checks that an error is about data that the copy lacks, and not about an attacker.
fn assert_lacks(error: &Error, context: &str) {
    let expected = matches!(error.code(), "truncated" | "rolled_back");
    assert!(expected, "{context}: {}: {error}", error.code());
}

/// Reads everything in the Logstores that are only appended to, and goes on behind losses.
fn read_all(store: &Store, context: &str) -> Found {
    let mut found = Found { records: Records::new(), closed: Vec::new() };
    for text in KEPT {
        let logstore = match store.logstore(&name(text)) {
            Ok(logstore) => logstore,
            Err(error) => {
                assert_lacks(&error, context);
                found.closed.push(text);
                continue;
            }
        };
        for shard in 0..SHARDS {
            let options = ReadOptions::default().skip_lost(true);
            for one in logstore.read(shard, &options).unwrap() {
                match one {
                    Ok(one) => {
                        let content = String::from_utf8(one.bytes.to_vec()).unwrap();
                        found.records.insert((text, shard, one.seq), content);
                    }
                    Err(error) => assert_lacks(&damage(error), context),
                }
            }
        }
    }
    found
}

/// The records of `durable` that the files of a copy have.
fn expected_in(dir: &Path, ids: &BTreeMap<&'static str, String>, durable: &Records) -> Records {
    let mut expected = Records::new();
    for text in KEPT {
        for shard in 0..SHARDS {
            let shard_dir =
                dir.join("logstores").join(&ids[text]).join(format!("shard-{shard:04}"));
            let numbers = numbers_in(&shard_dir);
            let of_shard = durable.range((text, shard, 0)..=(text, shard, u64::MAX));
            let there = of_shard.filter(|(place, _)| numbers.contains(&place.2));
            expected.extend(there.map(|(place, content)| (*place, content.clone())));
        }
    }
    expected
}

fn assert_has(found: &Found, expected: &Records, context: &str) {
    for (place, content) in expected {
        if !found.closed.contains(&place.0) {
            assert_eq!(found.records.get(place), Some(content), "{context}: {place:?}");
        }
    }
}

/// Checks a backup: it has everything, and so has a store that is restored from it.
fn check_backup(scene: &Scene, dir: &Path, durable: &Records, context: &str) -> Records {
    let kept: Records = durable
        .iter()
        .filter(|(place, _)| KEPT.contains(&place.0))
        .map(|(place, content)| (*place, content.clone()))
        .collect();
    let to = dir.with_extension("restored");
    let builder = scene.world.builder_at(&to);
    builder.clone().restore(dir, &RestoreOptions::default(), &mut |_| {}).unwrap();
    let mut all = Records::new();
    let stores = [scene.world.builder_at(dir).open_read_only().unwrap(), builder.open().unwrap()];
    for store in &stores {
        let found = read_all(store, context);
        assert_eq!(found.closed, [""; 0], "{context}");
        assert_has(&found, &kept, context);
        let checkpoint = Checkpoint::from_bytes(fs::read(dir.join("checkpoint")).unwrap());
        let options = VerifyOptions::default().against(checkpoint);
        let report = store.admin().verify(&options, &mut |_| {}).unwrap();
        assert!(report.is_clean(), "{context}: {:#?}", report.faults);
        assert!(report.refused.is_empty(), "{context}");
        all = found.records;
    }
    for text in KEPT {
        let logstore = stores[1].logstore(&name(text)).unwrap();
        let appended = logstore.append(record("more"), &synced()).unwrap();
        assert!(appended.seq >= 1 << 48, "{context}");
    }
    drop(stores);
    fs::remove_dir_all(to).unwrap();
    all
}

/// Checks a plain copy: everything in it can be read, and a repair makes it writable.
fn check_plain(
    scene: &Scene,
    dir: &Path,
    ids: &BTreeMap<&'static str, String>,
    durable: &Records,
    context: &str,
) -> Records {
    let expected = expected_in(dir, ids, durable);
    let store = scene.world.builder_at(dir).open_read_only();
    let store = store.unwrap_or_else(|error| panic!("{context}: {error}"));
    let found = read_all(&store, context);
    assert_has(&found, &expected, context);
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    for fault in &report.faults {
        let expected = matches!(fault.code, "truncated" | "rolled_back");
        assert!(expected, "{context}: {fault:?}");
    }
    drop(store);

    let store = scene.world.builder_at(dir).open();
    let store = store.unwrap_or_else(|error| panic!("{context}: {error}"));
    for text in KEPT {
        for shard in 0..SHARDS {
            let repair =
                |options: RepairOptions| store.admin().repair(&name(text), shard, &options);
            let repaired = match repair(RepairOptions::default()) {
                // Metadata that is older than the catalogue names takes the Logstore back.
                Err(Error::RolledBack { .. }) => {
                    repair(RepairOptions::default().accept_tampered(true))
                }
                repaired => repaired,
            };
            repaired.unwrap_or_else(|error| panic!("{context}: {text} {shard}: {error}"));
            let logstore = store.logstore(&name(text)).unwrap();
            let options = AppendOptions::default().shard(ShardChoice::Shard(shard));
            let appended = logstore.append(record("after the repair"), &options);
            appended.unwrap_or_else(|error| panic!("{context}: {text} {shard}: {error}"));
        }
    }
    let found = read_all(&store, context);
    assert_eq!(found.closed, [""; 0], "{context}");
    assert_has(&found, &expected, context);
    let options = VerifyOptions::default();
    for text in KEPT {
        let report = store.admin().verify(&options.clone().logstore(name(text)), &mut |_| {});
        let report = report.unwrap();
        assert!(report.is_clean(), "{context}: {:#?}", report.faults);
    }
    store.close().unwrap();
    found.records.into_iter().filter(|(_, content)| content != "after the repair").collect()
}

#[test]
fn copies_beside_a_writer() {
    let number = |variable, default| env::var(variable).map_or(default, |it| it.parse().unwrap());
    let (copies, seed) = (number("ENVELOG_COPIES", 6), number("ENVELOG_COPIES_SEED", 7));
    println!("ENVELOG_COPIES_SEED={seed}");
    // A store grows with each copy, and a new one is small again.
    for first in (0..copies).step_by(2 * WAYS.len()) {
        let last = (first + 2 * WAYS.len() as u64).min(copies);
        copies_of_one_store(first..last, seed.wrapping_add(first << 32));
    }
}

fn copies_of_one_store(copies: Range<u64>, seed: u64) {
    let scene = Scene::new();
    let id =
        |text: &'static str| (text, scene.store.logstore(&name(text)).unwrap().id().to_string());
    let ids: BTreeMap<_, _> = KEPT.into_iter().map(id).collect();
    let mut dice = Dice::new(seed, 2);
    let mut copy_all = || {
        for copy in copies.clone() {
            thread::sleep(millis(100 + dice.roll(200)));
            let how = WAYS[copy as usize % WAYS.len()];
            let context = format!("copy {copy}, {how:?}");
            let dir = scene.world.path().join(format!("copy-{copy}"));
            let durable = scene.durable();
            scene.copy(how, &dir, &mut dice);
            let _paused = scene.working.write().unwrap();
            let records = match how {
                How::Backup => check_backup(&scene, &dir, &durable, &context),
                _ => check_plain(&scene, &dir, &ids, &durable, &context),
            };
            println!("{context}: {} of {} durable records", records.len(), durable.len());
            // No copy has a record that the store has not taken.
            let all = scene.acknowledged.lock().unwrap();
            for (place, content) in records {
                assert_eq!(all.get(&place), Some(&content), "{context}: {place:?}");
            }
            fs::remove_dir_all(dir).unwrap();
        }
    };
    let checked = thread::scope(|threads| {
        for text in KEPT.into_iter().chain([RETAINED, PASSING]) {
            for shard in 0..SHARDS {
                let scene = &scene;
                threads.spawn(move || scene.write(text, shard));
            }
        }
        threads.spawn(|| scene.administer(seed));
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&mut copy_all));
        scene.stop.store(true, Ordering::Relaxed);
        checked
    });
    if let Err(panic) = checked {
        std::panic::resume_unwind(panic);
    }
    let report = scene.store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert_eq!(report.faults, []);
}
