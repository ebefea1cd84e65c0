//! Backups of live stores, and restores.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
};

use common::*;
use envelog::{
    AppendOptions, EncryptConf, EncryptType, Error, Logstore, LogstoreSpec, Position, ReadOptions,
    ShardChoice, Store,
    admin::{
        BackupOptions, BackupReport, Checkpoint, RestoreOptions, RestoreReport, VerifyOptions,
    },
    audit::AuditEvent,
    kms::RevokedReason,
};

/// How many sequence numbers a restored shard skips.
const SKIPPED: u64 = 1 << 48;
const NAMES: [&str; 3] = ["p/plain", "p/service", "p/byok"];

/// Makes a backup by an opener that only reads.
fn back_up(world: &World, dir: &Path, options: &BackupOptions) -> BackupReport {
    let store = world.builder().open_read_only().unwrap();
    let (mut bytes, mut total) = (0, 0);
    let report = store.admin().backup(dir, options, &mut |at| {
        (bytes, total) = (at.bytes, at.bytes_total);
    });
    let report = report.unwrap();
    assert_eq!(report.bytes, bytes, "the progress ends at the size of the backup");
    assert!(report.begun_us <= report.finished_us);
    report
}

fn restore(world: &World, from: &Path, to: &Path, options: &RestoreOptions) -> RestoreReport {
    world.builder_at(to).restore(from, options, &mut |_| {}).unwrap()
}

/// All records of a shard: numbers, times and texts.
fn all(logstore: &Logstore, shard: u32) -> Vec<One> {
    let reader = logstore.read(shard, &ReadOptions::default()).unwrap();
    let one = |record: envelog::Record| {
        (record.seq, record.receive_time_us, String::from_utf8(record.bytes.to_vec()).unwrap())
    };
    reader.map(|record| one(record.unwrap())).collect()
}

/// A record: its number, its time and its text.
type One = (u64, u64, String);

/// All records of all shards of a store, by Logstore.
fn contents(store: &Store) -> Vec<(String, u32, Vec<One>)> {
    let mut found = Vec::new();
    for name in store.list().unwrap() {
        let logstore = store.logstore(&name).unwrap();
        for shard in 0..logstore.config().shard_count {
            found.push((name.to_string(), shard, all(&logstore, shard)));
        }
    }
    found
}

fn append(logstore: &Logstore, shard: u32, text: &str) -> u64 {
    let options = AppendOptions::default().shard(ShardChoice::Shard(shard));
    logstore.append(record(text), &options).unwrap().seq
}

fn assert_sound(store: &Store, against: Option<Checkpoint>) {
    let options = VerifyOptions::default().against(against);
    let report = store.admin().verify(&options, &mut |_| {}).unwrap();
    assert!(report.is_clean(), "{:#?}", report.faults);
    assert!(report.refused.is_empty(), "{:?}", report.refused);
}

fn checkpoint_in(dir: &Path) -> Checkpoint {
    Checkpoint::from_bytes(fs::read(dir.join("checkpoint")).unwrap())
}

/// A world with three Logstores, each of two shards with sealed segments and an open one.
fn scene(world: &mut World) -> Store {
    world.options.segment_bytes = 4096;
    let store = world.create();
    let spec = || LogstoreSpec::default().shard_count(2);
    let service = EncryptConf::service_key(EncryptType::Sm4);
    let byok = EncryptConf::byok(EncryptType::Aes, world.cmk());
    for (text, spec) in
        NAMES.into_iter().zip([spec(), spec().encrypt_conf(service), spec().encrypt_conf(byok)])
    {
        store.create_logstore(&name(text), spec).unwrap();
    }
    fill(world, &store, 0..20);
    store
}

fn fill(world: &World, store: &Store, numbers: std::ops::Range<u64>) {
    for text in NAMES {
        let logstore = store.logstore(&name(text)).unwrap();
        for number in numbers.clone() {
            world.clock.advance(millis(10));
            append(&logstore, (number % 2) as u32, &format!("{number} {}", noise(number, 700)));
        }
    }
}

fn seg_files(dir: &Path) -> Vec<PathBuf> {
    files(dir)
        .into_keys()
        .filter(|path| path.extension().is_some_and(|extension| extension == "seg"))
        .collect()
}

#[test]
fn a_backup_of_a_live_store_is_a_store() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let dir = world.path().join("backup");
    let before = files(&world.store_dir());
    let report = back_up(&world, &dir, &BackupOptions::default());
    assert_eq!(files(&world.store_dir()), before, "the store has changed");
    assert_eq!(report.faults, []);
    assert_eq!((report.logstores, report.without_keys.len()), (3, 0));
    assert_eq!(report.segments, seg_files(&world.store_dir()).len() as u64);
    assert_eq!(report.bytes_copied + report.bytes_shared, report.bytes);
    assert!(report.segments_shared >= 6 && report.segments_copied >= 6, "{report:?}");
    assert!(!files(&dir).keys().any(|path| path.ends_with("keyring")));

    let copy = world.builder_at(&dir).open_read_only().unwrap();
    assert_eq!(contents(&copy), contents(&store));
    assert_sound(&copy, Some(checkpoint_in(&dir)));
    assert_sound(&store, Some(checkpoint_in(&dir)));
    drop(copy);

    // A copy of the backup opens for writing too.
    let other = world.path().join("other");
    copy_dir(&dir, &other);
    let copy = world.builder_at(&other).open().unwrap();
    fill(&world, &copy, 100..104);
    assert_sound(&copy, Some(checkpoint_in(&dir)));
    copy.close().unwrap();
}

#[test]
fn a_second_backup_copies_only_what_is_new() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let dir = world.path().join("backup");
    let options = BackupOptions::default().copy(true);
    let first = back_up(&world, &dir, &options);
    assert_eq!((first.segments_copied, first.bytes_shared), (first.segments, 0));
    let again = back_up(&world, &dir, &options);
    assert_eq!((again.segments_copied, again.bytes_copied), (0, 0));
    assert_eq!((again.segments, again.bytes), (first.segments, first.bytes));

    let logstore = store.logstore(&name("p/service")).unwrap();
    append(&logstore, 0, "new");
    let one = back_up(&world, &dir, &options);
    assert!((1..=2).contains(&one.segments_copied), "the open segment, and one behind it: {one:?}");
    fill(&world, &store, 20..40);
    let more = back_up(&world, &dir, &options);
    assert!(more.segments_copied > 6 && more.segments_copied < more.segments, "{more:?}");
    let copy = world.builder_at(&dir).open_read_only().unwrap();
    assert_eq!(contents(&copy), contents(&store));
    assert_sound(&copy, Some(checkpoint_in(&dir)));
}

#[test]
fn sealed_segments_are_shared_and_open_ones_are_copied() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let (linked, copied) = (world.path().join("linked"), world.path().join("copied"));
    back_up(&world, &linked, &BackupOptions::default());
    back_up(&world, &copied, &BackupOptions::default().copy(true));
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    let mut shared = 0;
    for path in seg_files(&world.store_dir()) {
        let below = path.strip_prefix(world.store_dir()).unwrap();
        assert_ne!(inode(&path), inode(&copied.join(below)));
        shared += u64::from(inode(&path) == inode(&linked.join(below)));
    }
    // A file system with reflinks shares no inode.
    assert!(shared > 0 || reflinks(world.path()), "no segment is shared");
    fill(&world, &store, 20..40);
    let copy = world.builder_at(&linked).open_read_only().unwrap();
    assert_sound(&copy, Some(checkpoint_in(&linked)));
}

fn reflinks(dir: &Path) -> bool {
    let (from, to) = (dir.join("reflink-from"), dir.join("reflink-to"));
    fs::write(&from, "x").unwrap();
    let status = std::process::Command::new("cp")
        .args(["--reflink=always".as_ref(), from.as_os_str(), to.as_os_str()])
        .stderr(std::process::Stdio::null())
        .status();
    status.is_ok_and(|status| status.success())
}

#[test]
fn a_restored_store_repeats_no_number() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let dir = world.path().join("backup");
    let kept = contents(&store);
    store.create_logstore(&name("p/empty"), LogstoreSpec::default()).unwrap();
    back_up(&world, &dir, &BackupOptions::default());
    // The lost store continues, and a reader follows it.
    fill(&world, &store, 20..60);
    let lost: Vec<_> = contents(&store).into_iter().filter(|one| !one.2.is_empty()).collect();
    store.close().unwrap();
    for _ in 0..3 {
        world.open().close().unwrap();
    }
    let epoch = |dir: &Path| {
        let names = fs::read_dir(dir.join("catalogue")).unwrap();
        let epoch = |name: String| name.split('-').next().unwrap().parse::<u64>().unwrap();
        names.map(|entry| epoch(entry.unwrap().file_name().into_string().unwrap())).max().unwrap()
    };
    let to = world.path().join("restored");
    let report = restore(&world, &dir, &to, &RestoreOptions::default());
    assert_eq!((report.logstores, report.shards_cut, report.faults.len()), (4, 0, 0));
    assert!(epoch(&to) > epoch(&world.store_dir()));

    let store = world.builder_at(&to).open().unwrap();
    let found: Vec<_> = contents(&store).into_iter().filter(|one| one.0 != "p/empty").collect();
    assert_eq!(found, kept);
    assert_sound(&store, Some(checkpoint_in(&dir)));
    for (text, shard, records) in &lost {
        let logstore = store.logstore(&name(text)).unwrap();
        let cursor = records.last().unwrap().0 + 1;
        let above = records_from(&logstore, *shard, Position::Seq(cursor)).unwrap_err();
        assert!(matches!(above, Error::AboveEnd { seq, .. } if seq == cursor), "{above}");
        let appended = append(&logstore, *shard, "after the restore");
        assert!(appended >= cursor && appended >= SKIPPED, "{appended} {cursor}");
        let behind = records_from(&logstore, *shard, Position::Seq(cursor)).unwrap();
        assert_eq!(strings(&behind), ["after the restore"]);
    }
    assert!(append(&store.logstore(&name("p/empty")).unwrap(), 0, "first") >= SKIPPED);
    let events: Vec<_> =
        store.keys().audit_records().unwrap().into_iter().map(|one| one.event).collect();
    assert!(events.contains(&AuditEvent::Restored), "{events:?}");
    assert_sound(&store, Some(checkpoint_in(&dir)));
    let before = contents(&store);
    store.close().unwrap();
    let store = world.builder_at(&to).open().unwrap();
    assert_eq!(contents(&store), before);
    assert_sound(&store, None);
}

#[test]
fn a_restore_wants_an_empty_directory() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let dir = world.path().join("backup");
    back_up(&world, &dir, &BackupOptions::default());
    store.close().unwrap();
    let to = world.path().join("to");
    fs::create_dir(&to).unwrap();
    fs::write(to.join("file"), "").unwrap();
    let options = RestoreOptions::default();
    let refused = world.builder_at(&to).restore(&dir, &options, &mut |_| {}).unwrap_err();
    assert!(matches!(refused, Error::NotEmpty { .. }), "{refused}");
    let refused = world.builder().restore(&dir, &options, &mut |_| {}).unwrap_err();
    assert!(matches!(refused, Error::NotEmpty { .. }), "{refused}");
    let within = dir.join("within");
    let refused = world.builder_at(&within).restore(&dir, &options, &mut |_| {}).unwrap_err();
    assert!(matches!(refused, Error::InvalidArgument(_)), "{refused}");
    fs::remove_file(to.join("file")).unwrap();
    restore(&world, &dir, &to, &options);
    world.builder_at(&to).open().unwrap().close().unwrap();
}

/// The records of a restore up to each time are those of whole blocks that were received by then.
#[test]
fn a_restore_ends_at_a_time() {
    let mut world = World::manual();
    let store = scene(&mut world);
    // Keys and the clock change at different times.
    store.keys().rotate_data_key(&name("p/service")).unwrap();
    fill(&world, &store, 20..30);
    world.clock.jump_wall_back(secs(60));
    fill(&world, &store, 30..40);
    store.keys().rotate_data_key(&name("p/byok")).unwrap();
    fill(&world, &store, 40..44);
    let dir = world.path().join("backup");
    back_up(&world, &dir, &BackupOptions::default());
    let whole = contents(&store);
    let mut times: Vec<u64> =
        whole.iter().flat_map(|(_, _, records)| records.iter().map(|one| one.1)).collect();
    times.sort_unstable();
    let all_times =
        [0, times[0] - 1, times[0], times[7], times[60], times[90], times[131], u64::MAX];
    for (number, until_us) in all_times.into_iter().enumerate() {
        let to = world.path().join(format!("restored-{number}"));
        let report = restore(&world, &dir, &to, &RestoreOptions::default().until_us(until_us));
        // The clock of the restored store is ahead of all records.
        let store = world.builder_at(&to).open().unwrap();
        let mut cut = 0;
        for (text, shard, records) in &whole {
            let until = records.iter().position(|one| one.1 > until_us).unwrap_or(records.len());
            cut += u64::from(until < records.len());
            let logstore = store.logstore(&name(text)).unwrap();
            assert_eq!(all(&logstore, *shard), records[..until], "{text} {shard} until {until_us}");
            let appended = append(&logstore, *shard, "more");
            assert!(appended >= SKIPPED);
            let read = all(&logstore, *shard);
            assert_eq!(read.len(), until + 1);
            assert_eq!(read[until].2, "more");
        }
        assert_eq!(report.shards_cut, cut);
        assert_eq!(report.faults, []);
        assert_sound(&store, None);
        store.close().unwrap();
        let store = world.builder_at(&to).open_read_only().unwrap();
        assert_sound(&store, None);
    }
}

#[test]
fn pruning_removes_what_the_store_has_destroyed() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let dir = world.path().join("backup");
    back_up(&world, &dir, &BackupOptions::default());
    store.keys().rotate_data_key(&name("p/service")).unwrap();
    back_up(&world, &dir, &BackupOptions::default());

    store.keys().shred_data_keys(&name("p/service"), &[1]).unwrap();
    let gone = store.logstore(&name("p/byok")).unwrap().id().to_string();
    store.delete_logstore(&name("p/byok")).unwrap();
    let plain = store.logstore(&name("p/plain")).unwrap();
    let mut config = plain.config();
    config.retention_bytes = Some(4096);
    store.update_logstore(&name("p/plain"), config).unwrap();
    assert!(store.admin().apply_retention().unwrap().segments > 0);
    let dropped: Vec<_> = {
        let in_backup = seg_files(&dir.join("logstores").join(plain.id().to_string()));
        let present =
            |path: &PathBuf| world.store_dir().join(path.strip_prefix(&dir).unwrap()).exists();
        in_backup.into_iter().filter(|path| !present(path)).collect()
    };
    let envelopes_of = |dir: &Path| {
        let id = store.logstore(&name("p/service")).unwrap().id().to_string();
        let names = fs::read_dir(dir.join("logstores").join(id)).unwrap();
        let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        // Of the second copies none counts.
        names.filter(|name| name.starts_with("meta-") && !name.ends_with(".copy")).count()
    };
    assert!(!dropped.is_empty());

    let report = back_up(&world, &dir, &BackupOptions::default());
    assert_eq!(report.files_pruned, 0);
    assert!(dropped.iter().all(|path| path.exists()), "retention reaches no backup");
    assert!(dir.join("logstores").join(&gone).exists(), "a deletion reaches no backup");
    assert!(envelopes_of(&dir) > 1, "the destruction of a key reaches no backup");
    let copy = world.builder_at(&dir).open_read_only().unwrap();
    assert!(!copy.list().unwrap().contains(&name("p/byok")));
    assert_sound(&copy, Some(checkpoint_in(&dir)));
    drop(copy);

    let report = back_up(&world, &dir, &BackupOptions::default().prune(true));
    assert!(report.files_pruned as usize > dropped.len() && report.bytes_pruned > 0, "{report:?}");
    assert!(dropped.iter().all(|path| !path.exists()));
    assert!(!dir.join("logstores").join(&gone).exists());
    assert_eq!(envelopes_of(&dir), 1);
    let copy = world.builder_at(&dir).open_read_only().unwrap();
    assert_sound(&copy, Some(checkpoint_in(&dir)));
    let plain = copy.logstore(&name("p/plain")).unwrap();
    assert_eq!(all(&plain, 0), all(&store.logstore(&name("p/plain")).unwrap(), 0));
}

#[test]
fn a_directory_that_is_no_backup_of_the_store_is_refused() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let refusal =
        |dir: &Path| store.admin().backup(dir, &BackupOptions::default(), &mut |_| {}).unwrap_err();
    let other = World::manual();
    other.create().close().unwrap();
    let strange = world.path().join("strange");
    fs::create_dir(&strange).unwrap();
    fs::write(strange.join("file"), "").unwrap();
    let used = world.path().join("used");
    back_up(&world, &used, &BackupOptions::default());
    let restored = world.path().join("restored");
    restore(&world, &used, &restored, &RestoreOptions::default());
    world.builder_at(&used).open().unwrap().close().unwrap();
    for dir in [
        world.store_dir(),
        world.store_dir().join("in"),
        world.path().to_owned(),
        strange,
        restored,
        used,
        other.store_dir(),
    ] {
        let before = if dir.exists() { files(&dir) } else { Default::default() };
        let error = refusal(&dir);
        assert!(matches!(error, Error::BackupRefused { .. }), "{}: {error}", dir.display());
        assert_eq!(if dir.exists() { files(&dir) } else { Default::default() }, before);
    }

    // An older copy of the store does not replace a newer backup.
    let old = world.path().join("old");
    store.close().unwrap();
    copy_dir(&world.store_dir(), &old);
    let store = world.open();
    fill(&world, &store, 20..30);
    store.close().unwrap();
    let dir = world.path().join("backup");
    back_up(&world, &dir, &BackupOptions::default());
    let older = world.builder_at(&old).open_read_only().unwrap();
    let error = older.admin().backup(&dir, &BackupOptions::default(), &mut |_| {}).unwrap_err();
    assert!(matches!(error, Error::RolledBack { .. }), "{error}");
}

#[test]
fn a_backup_that_has_lost_its_record_takes_the_next_run() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let dir = world.path().join("backup");
    back_up(&world, &dir, &BackupOptions::default());
    fs::remove_file(dir.join("BACKUP")).unwrap();
    fill(&world, &store, 20..24);
    let report = back_up(&world, &dir, &BackupOptions::default());
    assert!(report.segments_copied < report.segments);
    assert!(dir.join("BACKUP").exists());
    let copy = world.builder_at(&dir).open_read_only().unwrap();
    assert_eq!(contents(&copy), contents(&store));
}

/// Requires that the store in `from` is refused by the backup in `dir`, which stays as it is.
fn assert_does_not_continue(world: &World, from: &Path, dir: &Path) {
    let before = files(dir);
    let reader = world.builder_at(from).open_read_only().unwrap();
    let options = BackupOptions::default().copy(true).prune(true);
    let error = reader.admin().backup(dir, &options, &mut |_| {}).unwrap_err();
    assert!(matches!(error, Error::RolledBack { .. }), "{error}");
    assert!(error.to_string().contains("does not continue the backup"), "{error}");
    assert!(files(dir) == before, "the backup has changed");
    let other = world.path().join("other backup");
    assert_eq!(reader.admin().backup(&other, &options, &mut |_| {}).unwrap().faults, []);
    fs::remove_dir_all(other).unwrap();
}

#[test]
fn a_store_that_does_not_continue_the_backup_is_refused() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let (copied, closed) = (world.path().join("copied"), world.path().join("closed"));
    // From before two records that the same segments have.
    copy_dir(&world.store_dir(), &copied);
    fill(&world, &store, 20..22);
    store.close().unwrap();
    copy_dir(&world.store_dir(), &closed);
    let store = world.open();
    fill(&world, &store, 22..30);
    let dir = world.path().join("backup");
    back_up(&world, &dir, &BackupOptions::default().copy(true));
    // Each goes on by itself, and records more changes than the store had.
    for fork in [copied, closed] {
        let store = world.builder_at(&fork).open().unwrap();
        fill(&world, &store, 100..160);
        store.close().unwrap();
        assert_does_not_continue(&world, &fork, &dir);
    }
    let copy = world.builder_at(&dir).open_read_only().unwrap();
    assert_eq!(contents(&copy), contents(&store));
    assert_sound(&copy, Some(checkpoint_in(&dir)));
}

/// Damages all files of the catalogue of a backup.
fn lose_catalogue(dir: &Path) {
    for (path, _) in files(&dir.join("catalogue")) {
        fs::write(path, "junk").unwrap();
    }
}

/// The files of the backup show whether the store continues it.
#[test]
fn a_lost_catalogue_of_the_backup_hides_no_fork() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let (fork, behind) = (world.path().join("fork"), world.path().join("behind"));
    copy_dir(&world.store_dir(), &behind);
    store.close().unwrap();
    copy_dir(&world.store_dir(), &fork);
    let store = world.open();
    fill(&world, &store, 20..30);
    let dir = world.path().join("backup");
    back_up(&world, &dir, &BackupOptions::default().copy(true));
    let forked = world.builder_at(&fork).open().unwrap();
    fill(&world, &forked, 100..160);
    forked.close().unwrap();
    lose_catalogue(&dir);
    assert_does_not_continue(&world, &fork, &dir);
    assert_does_not_continue(&world, &behind, &dir);
    // One damaged segment, also the last one of its shard, is no reason to overwrite the others.
    let last = seg_files(&dir).pop().unwrap();
    fs::write(&last, "junk").unwrap();
    assert_does_not_continue(&world, &fork, &dir);
    // The store itself goes on, and heals the backup.
    fill(&world, &store, 30..34);
    let report = back_up(&world, &dir, &BackupOptions::default().copy(true));
    assert_eq!(report.faults, []);
    let copy = world.builder_at(&dir).open_read_only().unwrap();
    assert_eq!(contents(&copy), contents(&store));
    assert_sound(&copy, Some(checkpoint_in(&dir)));
}

/// Recovery rewrites the blocks that the backup has above the durable mark.
#[test]
fn a_store_that_was_killed_continues_the_backup() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let (killed, dir) = (world.path().join("killed"), world.path().join("backup"));
    let options = BackupOptions::default().copy(true);
    back_up(&world, &dir, &options);
    copy_dir(&world.store_dir(), &killed);
    drop(store);
    for number in [100, 110] {
        let store = world.builder_at(&killed).open().unwrap();
        fill(&world, &store, number..number + 3);
        let all = contents(&store);
        for loses_catalogue in [number == 110, false] {
            if loses_catalogue {
                lose_catalogue(&dir);
            }
            let report = store.admin().backup(&dir, &options, &mut |_| {}).unwrap();
            assert_eq!(report.faults, []);
            let copy = world.builder_at(&dir).open_read_only().unwrap();
            assert_eq!(contents(&copy), all);
            assert_sound(&copy, Some(checkpoint_in(&dir)));
        }
        // The process ends without closing it.
        let next = world.path().join("next");
        copy_dir(&killed, &next);
        drop(store);
        copy_dir(&next, &killed);
    }
}

#[test]
fn a_restored_store_continues_the_backup_unless_it_was_cut() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let dir = world.path().join("backup");
    let options = BackupOptions::default().copy(true);
    back_up(&world, &dir, &options);
    let whole = contents(&store);
    store.close().unwrap();
    let times = || whole.iter().flat_map(|(_, _, records)| records.iter().map(|one| one.1));
    let last = times().max().unwrap();
    for until_us in [times().min().unwrap(), last - 1] {
        let cut = world.path().join("cut");
        restore(&world, &dir, &cut, &RestoreOptions::default().until_us(until_us));
        assert_does_not_continue(&world, &cut, &dir);
        let store = world.builder_at(&cut).open().unwrap();
        fill(&world, &store, 20..40);
        store.close().unwrap();
        assert_does_not_continue(&world, &cut, &dir);
        fs::remove_dir_all(cut).unwrap();
    }
    let to = world.path().join("restored");
    restore(&world, &dir, &to, &RestoreOptions::default());
    for number in [20, 30] {
        let store = world.builder_at(&to).open().unwrap();
        let report = store.admin().backup(&dir, &options, &mut |_| {}).unwrap();
        assert_eq!(report.faults, []);
        fill(&world, &store, number..number + 6);
        let report = store.admin().backup(&dir, &options, &mut |_| {}).unwrap();
        assert_eq!(report.faults, []);
        let copy = world.builder_at(&dir).open_read_only().unwrap();
        assert_eq!(contents(&copy), contents(&store));
        assert_sound(&copy, Some(checkpoint_in(&dir)));
        store.close().unwrap();
    }
}

#[test]
fn a_key_that_is_refused_keeps_nothing_out_of_a_backup() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let whole = contents(&store);
    world.kms.answer(Answer::Revoked(RevokedReason::Disabled));
    let dir = world.path().join("backup");
    let report = back_up(&world, &dir, &BackupOptions::default());
    assert_eq!(report.without_keys, [name("p/byok")]);
    assert_eq!(report.faults, []);
    let to = world.path().join("restored");
    restore(&world, &dir, &to, &RestoreOptions::default());
    world.kms.answer(Answer::Real);
    for dir in [&dir, &to] {
        let copy = world.builder_at(dir).open_read_only().unwrap();
        assert_eq!(contents(&copy), whole);
        assert_sound(&copy, Some(checkpoint_in(&world.path().join("backup"))));
    }
    let store = world.builder_at(&to).open().unwrap();
    for text in NAMES {
        assert!(append(&store.logstore(&name(text)).unwrap(), 0, "more") >= SKIPPED);
    }
    assert_sound(&store, None);
}

#[test]
fn damage_in_the_store_does_not_reach_a_backup_that_is_older() {
    let mut world = World::manual();
    let store = scene(&mut world);
    store.close().unwrap();
    let dir = world.path().join("backup");
    let options = BackupOptions::default().copy(true);
    back_up(&world, &dir, &options);
    let whole = contents(&world.builder_at(&dir).open_read_only().unwrap());
    let victims = seg_files(&world.store_dir());
    fs::remove_file(&victims[1]).unwrap();
    let len = fs::metadata(&victims[3]).unwrap().len();
    fs::OpenOptions::new().write(true).open(&victims[3]).unwrap().set_len(len / 2).unwrap();
    let report = back_up(&world, &dir, &options);
    assert!(!report.faults.is_empty());
    let copy = world.builder_at(&dir).open_read_only().unwrap();
    assert_eq!(contents(&copy), whole);
    assert_sound(&copy, Some(checkpoint_in(&dir)));
}

#[test]
fn damage_of_a_segment_that_an_earlier_run_copied_is_reported() {
    for damage in Damage::ALL.into_iter().filter(|damage| *damage != Damage::Body) {
        for options in [BackupOptions::default(), BackupOptions::default().copy(true)] {
            let mut world = World::manual();
            let store = scene(&mut world);
            store.close().unwrap();
            let dir = world.path().join("backup");
            back_up(&world, &dir, &options);
            let victim = sealed_segment(&world.store_dir());
            let kept = dir.join(victim.strip_prefix(world.store_dir()).unwrap());
            let before = fs::read(&kept).unwrap();
            damage.apply(&victim);
            let was_shared = fs::read(&kept).unwrap() != before;
            assert!(!was_shared || !options.copy);
            let report = back_up(&world, &dir, &options);
            assert!(!report.faults.is_empty(), "{damage:?} {options:?}");
            let faults = report.faults.iter();
            let files = faults.filter_map(|fault| fault.file.as_deref());
            assert!(files.clone().any(|file| file == victim), "{damage:?}: {:?}", report.faults);
            let copy = world.builder_at(&dir).open_read_only().unwrap();
            let report = copy.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
            assert_eq!(report.is_clean(), !was_shared, "{damage:?}: {:?}", report.faults);
        }
    }
}

/// Damage in front of the footer is in none of the parts that say where a segment ends.
#[test]
fn a_damaged_block_of_the_store_replaces_no_segment_of_the_backup() {
    let mut world = World::manual();
    let store = scene(&mut world);
    store.close().unwrap();
    let dir = world.path().join("backup");
    let options = BackupOptions::default().copy(true);
    back_up(&world, &dir, &options);
    let whole = contents(&world.builder_at(&dir).open_read_only().unwrap());
    let place = |path: &Path| path.strip_prefix(world.store_dir()).unwrap().to_owned();
    // A sealed segment of each shard.
    let all = seg_files(&world.store_dir());
    let mut victims: Vec<_> = all
        .windows(2)
        .filter(|two| two[0].parent() == two[1].parent())
        .map(|two| two[0].clone())
        .collect();
    victims.dedup_by_key(|path| path.parent().unwrap().to_owned());
    assert_eq!(victims.len(), 6);
    for (victim, back) in victims.iter().zip([700, 1000, 1500, 700, 1000, 1500]) {
        let good = fs::read(victim).unwrap();
        let at = good.len() - back;
        write_at(victim, at as u64, &[good[at] ^ 0x10]);
        let report = back_up(&world, &dir, &options);
        let mut files = report.faults.iter().filter_map(|fault| fault.file.as_deref());
        assert!(files.any(|file| file == victim), "{back}: {:?}", report.faults);
        assert_eq!(report.segments_copied, 0);
        assert_eq!(fs::read(dir.join(place(victim))).unwrap(), good);
        fs::write(victim, good).unwrap();
    }
    let copy = world.builder_at(&dir).open_read_only().unwrap();
    assert_eq!(contents(&copy), whole);
    assert_sound(&copy, Some(checkpoint_in(&dir)));
}

/// A directory in the place of a segment of the backup costs no other segment.
#[test]
fn a_directory_in_the_place_of_a_segment_ends_no_backup() {
    for options in [BackupOptions::default(), BackupOptions::default().copy(true)] {
        let mut world = World::manual();
        let store = scene(&mut world);
        store.close().unwrap();
        let dir = world.path().join("backup");
        back_up(&world, &dir, &options);
        let whole = contents(&world.builder_at(&dir).open_read_only().unwrap());
        let all = seg_files(&dir);
        for victim in [&all[0], all.last().unwrap()] {
            fs::remove_file(victim).unwrap();
            fs::create_dir(victim).unwrap();
            let kept = victim.join("kept");
            fs::write(&kept, "of the operator").unwrap();
            let other = all.iter().find(|path| path.parent() != victim.parent()).unwrap();
            fs::remove_file(other).unwrap();
            let report = back_up(&world, &dir, &options);
            let faults = report.faults.iter();
            let files: Vec<_> = faults.filter_map(|fault| fault.file.as_deref()).collect();
            assert_eq!(files, [victim], "{:?}", report.faults);
            assert!(kept.exists() && other.exists());
            // An empty directory is replaced.
            fs::remove_file(&kept).unwrap();
            assert!(back_up(&world, &dir, &options).faults.is_empty());
            let copy = world.builder_at(&dir).open_read_only().unwrap();
            assert_eq!(contents(&copy), whole);
            assert_sound(&copy, Some(checkpoint_in(&dir)));
        }
    }
}

#[test]
fn a_damaged_segment_of_the_backup_is_copied_again() {
    let mut world = World::manual();
    let store = scene(&mut world);
    store.close().unwrap();
    let dir = world.path().join("backup");
    let options = BackupOptions::default().copy(true);
    back_up(&world, &dir, &options);
    let whole = contents(&world.builder_at(&dir).open_read_only().unwrap());
    for damage in Damage::ALL.into_iter().filter(|damage| *damage != Damage::Body) {
        damage.apply(&sealed_segment(&dir));
        let report = back_up(&world, &dir, &options);
        assert_eq!((report.segments_copied, report.faults.len()), (1, 0), "{damage:?}");
        let copy = world.builder_at(&dir).open_read_only().unwrap();
        assert_eq!(contents(&copy), whole);
        assert_sound(&copy, Some(checkpoint_in(&dir)));
    }
}

/// A restore verifies everything, with the keys or without them.
#[test]
fn a_restore_reports_the_damage_of_the_backup() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let whole = contents(&store);
    let byok = store.logstore(&name("p/byok")).unwrap().id().to_string();
    store.close().unwrap();
    let dir = world.path().join("backup");
    let to = world.path().join("restored");
    for damage in Damage::ALL {
        back_up(&world, &dir, &BackupOptions::default().copy(true));
        damage.apply(&sealed_segment(&dir.join("logstores").join(&byok)));
        for answer in [Answer::Real, Answer::Revoked(RevokedReason::Disabled)] {
            let is_refused = answer != Answer::Real;
            world.kms.answer(answer);
            let report = restore(&world, &dir, &to, &RestoreOptions::default());
            world.kms.answer(Answer::Real);
            assert!(!report.faults.is_empty(), "{damage:?}");
            assert_eq!(report.without_keys, vec![name("p/byok"); is_refused.into()]);
            for fault in &report.faults {
                assert_eq!(fault.logstore, Some(name("p/byok")), "{fault:?}");
                assert!(fault.file.as_ref().is_none_or(|file| file.starts_with(&to)), "{fault:?}");
            }
            let store = world.builder_at(&to).open_read_only().unwrap();
            for (text, shard, records) in whole.iter().filter(|one| one.0 != "p/byok") {
                assert_eq!(all(&store.logstore(&name(text)).unwrap(), *shard), *records);
            }
            drop(store);
            fs::remove_dir_all(&to).unwrap();
        }
        fs::remove_dir_all(&dir).unwrap();
    }
}

/// How a file is damaged in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Damage {
    Emptied,
    Cut,
    Head,
    Body,
    Footer,
}

impl Damage {
    const ALL: [Self; 5] = [Self::Emptied, Self::Cut, Self::Head, Self::Body, Self::Footer];

    fn apply(self, path: &Path) {
        let file = fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
        let len = file.metadata().unwrap().len();
        let flip = |at: u64| {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        };
        match self {
            Self::Emptied => file.set_len(0).unwrap(),
            Self::Cut => file.set_len(len - 10).unwrap(),
            Self::Head => flip(20),
            Self::Body => flip(len / 2),
            Self::Footer => flip(len - 20),
        }
    }
}

/// A segment that has a successor.
fn sealed_segment(dir: &Path) -> PathBuf {
    let all = seg_files(dir);
    all.windows(2).find(|two| two[0].parent() == two[1].parent()).unwrap()[0].clone()
}

/// The faults of one segment of a backup.
const FAULTS: [fn(&Path); 6] = [
    |path| fs::write(path, "junk").unwrap(),
    |path| write_at(path, 40, &[0xff; 64]),
    |path| {
        let len = fs::metadata(path).unwrap().len();
        write_at(path, len / 2, &[0xff; 64]);
    },
    |path| {
        let len = fs::metadata(path).unwrap().len();
        fs::File::options().write(true).open(path).unwrap().set_len(len - 20).unwrap();
    },
    |path| fs::remove_file(path).unwrap(),
    |path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
    },
];

fn write_at(path: &Path, offset: u64, bytes: &[u8]) {
    fs::File::options().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

/// A damaged segment of the backup costs a restore its own contents, also a restore to a time, and
/// is reported. Nothing is restored that was received later.
#[test]
fn a_damaged_segment_costs_a_restore_its_own_contents() {
    let mut world = World::manual();
    let store = scene(&mut world);
    let dir = world.path().join("backup");
    back_up(&world, &dir, &BackupOptions::default().copy(true));
    let whole = contents(&store);
    let logstore = store.logstore(&name("p/byok")).unwrap();
    let shard =
        world.logstore_dir(&logstore).strip_prefix(world.store_dir()).unwrap().join("shard-0000");
    let paths = seg_files(&dir.join(&shard));
    let first_seq = |path: &Path| -> u64 {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.split('-').nth(1).unwrap().parse().unwrap()
    };
    let of_shard = |text: &str, shard: u32| (text, shard) == ("p/byok", 0);
    let hit = whole.iter().find(|(text, shard, _)| of_shard(text, *shard)).unwrap();
    let times = [hit.2[1].1, hit.2[hit.2.len() / 2].1, u64::MAX];
    let rounds = paths.iter().enumerate().flat_map(|one| FAULTS.map(|fault| (one, fault)));
    for (round, ((at, path), fault)) in rounds.enumerate() {
        let (damaged, to) = (world.path().join("damaged"), world.path().join("restored"));
        copy_dir(&dir, &damaged);
        fault(&damaged.join(path.strip_prefix(&dir).unwrap()));
        let until_us = times[round % 3];
        let report = restore(&world, &damaged, &to, &RestoreOptions::default().until_us(until_us));
        let lost = first_seq(path)..paths.get(at + 1).map_or(u64::MAX, |next| first_seq(next));
        let store = world.builder_at(&to).open_read_only().unwrap();
        for (text, shard, records) in &whole {
            let until = records.iter().position(|one| one.1 > until_us).unwrap_or(records.len());
            let expected = &records[..until];
            let logstore = store.logstore(&name(text)).unwrap();
            if !of_shard(text, *shard) {
                assert_eq!(all(&logstore, *shard), expected, "{path:?} {round}");
                continue;
            }
            let options = ReadOptions::default().skip_lost(true);
            let read = logstore.read(*shard, &options).unwrap().map(|record| record.unwrap());
            let read: Vec<_> = read.map(|one| (one.seq, one.receive_time_us)).collect();
            let expected: Vec<_> = expected.iter().map(|one| (one.0, one.1)).collect();
            let whole = expected.iter().filter(|one| !lost.contains(&one.0));
            assert!(whole.clone().all(|one| read.contains(one)), "{path:?} {round}: {read:?}");
            assert!(read.iter().all(|one| expected.contains(one)), "{path:?} {round}: {read:?}");
            let is_whole = read.len() == expected.len();
            assert!(is_whole || !report.faults.is_empty(), "{path:?} {round}: {report:?}");
        }
        drop(store);
        fs::remove_dir_all(&to).unwrap();
    }
}

/// A restore gives the segments up that lie between its time and the current data key.
#[test]
fn a_loss_that_the_backup_does_not_have_ends_it() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    append(&logstore, 0, "early");
    let until_us = all(&logstore, 0)[0].1;
    for text in ["later", "last"] {
        world.clock.advance(millis(10));
        store.keys().rotate_data_key(&name("p/l")).unwrap();
        append(&logstore, 0, text);
    }
    let (dir, cut) = (world.path().join("backup"), world.path().join("cut"));
    let other = world.path().join("other");
    back_up(&world, &dir, &BackupOptions::default().copy(true));
    store.close().unwrap();
    restore(&world, &dir, &cut, &RestoreOptions::default().until_us(until_us));
    assert_does_not_continue(&world, &cut, &dir);
    let store = world.builder_at(&cut).open().unwrap();
    for text in ["one", "two"] {
        append(&store.logstore(&name("p/l")).unwrap(), 0, text);
        store.admin().backup(&other, &BackupOptions::default(), &mut |_| {}).unwrap();
        let copy = world.builder_at(&other).open_read_only().unwrap();
        assert_eq!(contents(&copy), contents(&store));
        assert_sound(&copy, Some(checkpoint_in(&other)));
    }
    assert_does_not_continue(&world, &cut, &dir);
}

/// Fails operations of a backup one at a time. The former backup, or the new one, is in the
/// directory, and the next run completes it.
#[test]
fn an_interrupted_backup_leaves_the_former_one() {
    let mut world = World::manual_in_memory();
    let store = scene(&mut world);
    let (former, dir) = (world.path().join("former"), world.path().join("backup"));
    let options = BackupOptions::default().copy(true).prune(true);
    back_up(&world, &former, &options);
    let before = contents(&world.builder_at(&former).open_read_only().unwrap());
    store.keys().rotate_data_key(&name("p/service")).unwrap();
    fill(&world, &store, 20..30);
    store.create_logstore(&name("p/new"), LogstoreSpec::default()).unwrap();
    let after = contents(&store);
    let (mut nth, mut failed, mut old) = (0, 0, 0);
    loop {
        for first in [false, true] {
            if first {
                let _ = fs::remove_dir_all(&dir);
            } else {
                copy_dir(&former, &dir);
            }
            let failure = failing::Failure::ALL[nth as usize % 3];
            let disk = failing::FailingDisk::default();
            let reader = world.builder().disk(std::sync::Arc::new(disk.clone()));
            let reader = reader.open_read_only().unwrap();
            disk.fail_after(nth, failure);
            let done = reader.admin().backup(&dir, &options, &mut |_| {});
            let has_failed = disk.has_failed();
            drop(reader);
            let context = format!("{failure:?} at {nth}, first {first}: {done:?}");
            if !has_failed {
                done.unwrap();
                assert!(failed > 50 && old > 10, "{failed} {old}");
                if first {
                    return;
                }
                continue;
            }
            failed += 1;
            match world.builder_at(&dir).open_read_only() {
                Ok(copy) => {
                    let found = contents(&copy);
                    // Until the new catalogue is in force, the former one has new records too.
                    let is_former = found.len() == before.len()
                        && found.iter().zip(&before).all(|(found, before)| {
                            let all =
                                after.iter().find(|all| (&all.0, all.1) == (&found.0, found.1));
                            found.2.starts_with(&before.2) && all.unwrap().2.starts_with(&found.2)
                        });
                    assert!(found == after || (!first && is_former), "{context}");
                    let checkpoint = dir.join("checkpoint").exists().then(|| checkpoint_in(&dir));
                    assert_sound(&copy, checkpoint);
                    old += u64::from(found != after);
                }
                Err(error) => assert!(first, "{context}: {error}"),
            }
            back_up(&world, &dir, &options);
            let copy = world.builder_at(&dir).open_read_only().unwrap();
            assert_eq!(contents(&copy), after, "{context}");
            assert_sound(&copy, Some(checkpoint_in(&dir)));
        }
        // Each of the first operations, and a sample of the others.
        nth += 1 + nth / 16;
    }
}
