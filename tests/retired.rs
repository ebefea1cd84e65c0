//! Service key versions retired by a rotation no longer authenticate anything. An interrupted
//! rotation can be continued.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use common::{
    disk::{Sim, SimDisk, Survives},
    failing::{FailingDisk, Failure},
    *,
};
use envelog::{
    EncryptConf, EncryptType, Error, Logstore, LogstoreSpec, Result, Store,
    admin::{Checkpoint, RewrapProgress, VerifyOptions},
    crypto::{HashAlg, SecretKey, hkdf, hmac_sha256},
    inspect::{KeySource, SegmentHeader},
    kms::RevokedReason,
};

const SERVICE: &str = "p/service";
const BYOK: &str = "p/byok";
const PLAIN: &str = "p/plain";

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Derives a key from a root in an open keyring's bytes.
fn key_of(keyring: &[u8], version: usize, label: &str) -> SecretKey {
    let (body, _) = document_parts(keyring);
    let root = body["versions"][version - 1]["root"].as_str().unwrap();
    let root: Vec<u8> =
        (0..64).step_by(2).map(|at| u8::from_str_radix(&root[at..at + 2], 16).unwrap()).collect();
    let mut key = [0; 32];
    hkdf(HashAlg::Sha256, &[], &root, &[label.as_bytes()], &mut key);
    SecretKey::from_bytes(&mut key)
}

fn accepts(keyring: &[u8]) -> u64 {
    document_parts(keyring).0["accepts"].as_u64().unwrap()
}

/// The document as a holder of root 1 would seal it.
fn forged(document: &[u8], key: &SecretKey) -> Vec<u8> {
    let mut bytes = document.to_vec();
    bytes[64..68].copy_from_slice(&1_u32.to_le_bytes());
    let signed = 80 + u32_at(&bytes, 72) as usize + u32_at(&bytes, 76) as usize;
    let tag = hmac_sha256(key, &[&bytes[..signed], &bytes[signed + 32..signed + 64]]);
    bytes[signed..signed + 32].copy_from_slice(&tag);
    // In a catalogue file, more data follows the document.
    fix_crc(&mut bytes[..signed + 68]);
    bytes
}

/// A forged audit record that continues the log.
fn forged_record(log: &[u8], key: &SecretKey, version: u32) -> String {
    let last = std::str::from_utf8(log).unwrap().lines().last().unwrap();
    let mut fields = last.split('\t');
    let (json, previous) = (fields.next().unwrap(), fields.next().unwrap());
    let number =
        serde_json::from_str::<serde_json::Value>(json).unwrap()["number"].as_u64().unwrap() + 1;
    let json = format!(
        "{{\"number\":{number},\"time_us\":1,\"event\":\"rotated\",\"detail\":\"forged\",\"keyring_version\":{version}}}"
    );
    let tag = hmac_sha256(key, &[previous.as_bytes(), json.as_bytes()]);
    let tag: String = tag.iter().map(|byte| format!("{byte:02x}")).collect();
    let body = format!("{json}\t{tag}");
    format!("{body}\t{:08x}\n", crc32fast::hash(body.as_bytes()))
}

#[track_caller]
fn assert_retired<T: std::fmt::Debug>(result: Result<T>, what: &str) {
    match result {
        Err(error @ Error::RetiredKeyVersion { version: 1, accepts: 2, .. }) => {
            assert!(error.to_string().contains(what), "{error}");
            assert_eq!(
                (error.code(), error.kind()),
                ("retired_key_version", envelog::ErrorKind::Integrity)
            );
        }
        other => panic!("{what}: {other:?}"),
    }
}

fn fault_kinds(store: &Store, options: &VerifyOptions) -> Vec<&'static str> {
    let report = store.admin().verify(options, &mut |_| {}).unwrap();
    report.faults.iter().map(|fault| fault.code).collect()
}

#[track_caller]
fn assert_clean(store: &Store, at: &str) {
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean() && report.refused.is_empty(), "{at}: {report:?}");
}

fn plain(store: &Store) -> Logstore {
    store.create_logstore(&name(PLAIN), LogstoreSpec::default()).unwrap()
}

/// A store with a Logstore of each kind, and one record in each.
fn filled(world: &World) -> Store {
    let store = world.create();
    for logstore in
        [world.service(&store, SERVICE), world.byok(&store, BYOK, &world.cmk()), plain(&store)]
    {
        put(&logstore, "one");
    }
    store
}

/// The documents in the store directory, and the keyring.
fn documents(world: &World) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = files(&world.store_dir());
    found.retain(|_, bytes| bytes.starts_with(b"ENVLDOC\0"));
    found
}

fn log_path(world: &World) -> PathBuf {
    world.store_dir().join("audit/audit-000001.log")
}

// ---- the use of the old root ----

#[test]
fn a_rotation_retires_the_old_version_completely() {
    let world = World::manual();
    let store = filled(&world);
    let bytes = fs::read(world.keyring()).unwrap();
    assert_eq!((accepts(&bytes), &bytes[56..64]), (1, &1_u64.to_le_bytes()[..]));
    let mut steps = Vec::new();
    let done = store
        .keys()
        .rotate_service_key_with(&mut |at: &RewrapProgress| steps.push((at.done, at.total)))
        .unwrap();
    assert_eq!((done.version, done.continued), (2, false));
    assert_eq!((done.logstores, done.envelopes, done.probes, done.ended), (3, 1, 1, 1), "{done:?}");
    assert!(done.left_open.is_empty());
    assert_eq!(steps, [(0, 3), (3, 3)]);
    let found = documents(&world);
    assert_eq!(found.len(), 11, "one probe, and five documents that exist twice");
    assert!(found.iter().all(|(path, bytes)| u32_at(bytes, 64) == 2 || panic!("{path:?}")));
    let bytes = fs::read(world.keyring()).unwrap();
    assert_eq!((accepts(&bytes), &bytes[56..64]), (2, &3_u64.to_le_bytes()[..]));
    // The fields have this order.
    assert!(bytes[80..].starts_with(b"{\"accepts\":2,\"versions\":[{\"version\":1,"));
    let usage = store.keys().usage().unwrap();
    assert!(!usage.service_rotation_unfinished);
    let accepted: Vec<_> =
        usage.service_keys.iter().map(|key| (key.version, key.accepted)).collect();
    assert_eq!(accepted, [(1, false), (2, true)]);
    store.close().unwrap();
    let store = world.open();
    for logstore in [SERVICE, BYOK, PLAIN] {
        let logstore = store.logstore(&name(logstore)).unwrap();
        assert_eq!(texts(&logstore), ["one"]);
        put(&logstore, "two");
    }
    assert_clean(&store, "opened again");
    assert_eq!(store.keys().rotate_service_key().unwrap(), 3);
    store.keys().rewrap_keyring(Some(world.cmk())).unwrap();
    store.keys().rewrap_keyring(None).unwrap();
    let bytes = fs::read(world.keyring()).unwrap();
    assert_eq!(
        (accepts(&bytes), u32_at(&bytes, 64)),
        (3, 3),
        "what it is wrapped under changes neither"
    );
}

/// The old root and a copy of the metadata reveal the older data key, so later appends use another
/// one.
/// A verification proves the open segment up to its head. The segment grows after that, and a
/// rotation seals it: the earlier proof must not be taken for that of the whole segment.
#[test]
fn a_segment_that_was_proved_while_it_was_open_is_proved_again() {
    let world = World::manual();
    let store = world.create();
    let logstore = store.create_logstore(&name(PLAIN), LogstoreSpec::default()).unwrap();
    let mut expected = Vec::new();
    for n in 0..4 {
        for part in ["before", "behind"] {
            put(&logstore, &format!("{part} {n}"));
            expected.push(format!("{part} {n}"));
            assert_clean(&store, &format!("{part} {n}"));
            assert_eq!(texts(&logstore), expected);
        }
        put(&logstore, &format!("last {n}"));
        expected.push(format!("last {n}"));
        store.keys().rotate_service_key().unwrap();
        assert_clean(&store, &format!("rotation {n}"));
        assert_eq!(texts(&logstore), expected);
    }
    store.close().unwrap();
}

#[test]
fn a_service_key_rotation_also_rotates_its_data_keys() {
    let world = World::manual();
    let store = filled(&world);
    let service = store.logstore(&name(SERVICE)).unwrap();
    let done = store.keys().rotate_service_key_with(&mut |_| {}).unwrap();
    assert_eq!(done.data_keys, 1);
    for logstore in [SERVICE, BYOK] {
        put(&store.logstore(&name(logstore)).unwrap(), "two");
    }
    let dir = world.logstore_dir(&service);
    let sources = |dir: &Path| -> Vec<_> {
        let headers = segments(dir, 0)
            .into_iter()
            .map(|path| SegmentHeader::decode(&fs::read(path).unwrap()).unwrap());
        headers.map(|decoded| decoded.header.key_source).collect()
    };
    assert_eq!(sources(&dir), [KeySource::DataKey(1), KeySource::DataKey(2)]);
    let keys = document_parts(&fs::read(meta_path(&dir)).unwrap()).1;
    let versions = keys["versions"].as_array().unwrap();
    let told: Vec<_> = versions
        .iter()
        .map(|v| (&v["drawn_under"], &v["keyring_version"], &v["ordinals"]))
        .collect();
    assert_eq!(told, [(&1.into(), &2.into(), &[1].into()), (&2.into(), &2.into(), &[2].into())]);
    let byok = world.logstore_dir(&store.logstore(&name(BYOK)).unwrap());
    assert_eq!(
        sources(&byok),
        [KeySource::DataKey(1)],
        "the customer's key is not the service key's concern"
    );
    // An envelope re-wrapped in the middle of a rotation still contains a key from before the
    // rotation.
    let mut interrupted = false;
    let at_the_logstores = std::panic::AssertUnwindSafe(|| {
        store.keys().rotate_service_key_with(&mut |_| {
            interrupted = true;
            panic!("interrupted");
        })
    });
    assert!(std::panic::catch_unwind(at_the_logstores).is_err() && interrupted);
    store.keys().rewrap(&name(SERVICE)).unwrap();
    assert!(store.keys().is_service_rotation_unfinished());
    let done = store.keys().rotate_service_key_with(&mut |_| {}).unwrap();
    assert_eq!((done.version, done.continued, done.data_keys), (3, true, 1));
    assert!(!store.keys().is_service_rotation_unfinished());
    put(&service, "three");
    assert_eq!(sources(&dir), [1, 2, 3].map(KeySource::DataKey));
    assert_eq!(texts(&service), ["one", "two", "three"]);
    assert_clean(&store, "rotated twice");
}

#[test]
fn documents_that_a_holder_of_the_old_root_forges_are_refused() {
    let world = World::manual();
    let store = filled(&world);
    let beside = world.builder().open_read_only().unwrap();
    assert_eq!(texts(&beside.logstore(&name(SERVICE)).unwrap()), ["one"]);
    store.keys().rotate_service_key().unwrap();
    let service = world.logstore_dir(&store.logstore(&name(SERVICE)).unwrap());
    store.close().unwrap();
    let key = key_of(&fs::read(world.keyring()).unwrap(), 1, "envelog v2 document");
    let openings: [fn(&World) -> Result<Store>; 2] =
        [|world| world.builder().open(), |world| world.builder().open_read_only()];
    let probe = files(&world.store_dir().join("probes")).into_keys().next().unwrap();
    for (path, what) in [
        (world.store_dir().join("STORE"), "the identity of the store"),
        (catalogue::catalogue_file(&world.store_dir()), "the catalogue"),
        (meta_path(&service), "the metadata of a Logstore"),
        (probe, "the probe of a master key"),
    ] {
        let verifying = world.builder().open_read_only().unwrap();
        let good = fs::read(&path).unwrap();
        write_both(&path, &forged(&good, &key));
        for open in openings {
            let refused = open(&world).and_then(|store| {
                store.logstore(&name(SERVICE))?;
                store.logstore(&name(BYOK))
            });
            assert_retired(refused, what);
        }
        // Readers that were already open also detect it, including one opened before the rotation.
        if what == "the catalogue" {
            assert_retired(verifying.list(), what);
            assert_retired(beside.list(), what);
        } else {
            let kinds = fault_kinds(&verifying, &VerifyOptions::default());
            assert!(
                !kinds.is_empty() && kinds.iter().all(|kind| *kind == "retired_key_version"),
                "{what}: {kinds:?}"
            );
        }
        if what == "the metadata of a Logstore" {
            assert_retired(beside.logstore(&name(SERVICE)), what);
        }
        write_both(&path, &good);
    }
    // A verification by a writer finds them too.
    let store = world.open();
    for path in [world.store_dir().join("STORE"), catalogue::catalogue_file(&world.store_dir())] {
        let good = fs::read(&path).unwrap();
        write_both(&path, &forged(&good, &key));
        assert_eq!(fault_kinds(&store, &VerifyOptions::default()), ["retired_key_version"]);
        write_both(&path, &good);
    }
    assert_clean(&store, "all put back");
}

#[test]
fn a_checkpoint_from_before_a_rotation_is_refused_as_such() {
    let world = World::manual();
    let store = filled(&world);
    let before = store.admin().checkpoint().unwrap();
    let against = |checkpoint: &Checkpoint| VerifyOptions::default().against(checkpoint.clone());
    assert!(fault_kinds(&store, &against(&before)).is_empty());
    store.keys().rotate_service_key().unwrap();
    assert_retired(store.admin().verify(&against(&before), &mut |_| {}), "the checkpoint");
    let after = store.admin().checkpoint().unwrap();
    assert!(fault_kinds(&store, &against(&after)).is_empty());
    let key = key_of(&fs::read(world.keyring()).unwrap(), 1, "envelog v2 document");
    let forged = Checkpoint::from_bytes(forged(after.to_bytes(), &key));
    assert_retired(store.admin().verify(&against(&forged), &mut |_| {}), "the checkpoint");
}

#[test]
fn a_holder_of_the_old_root_appends_nothing_to_the_audit_log() {
    let world = World::manual();
    let store = filled(&world);
    let before = fs::read(log_path(&world)).unwrap();
    store.keys().rotate_service_key().unwrap();
    store.close().unwrap();
    let keyring = fs::read(world.keyring()).unwrap();
    let [old, new] = [1, 2].map(|version| key_of(&keyring, version, "envelog v2 audit"));
    let good = fs::read(log_path(&world)).unwrap();
    let last = good.split_inclusive(|&byte| byte == b'\n').next_back().unwrap();
    assert!(std::str::from_utf8(last).unwrap().contains("service_rotated"));
    let fault = |log: &[u8]| {
        fs::write(log_path(&world), log).unwrap();
        let store = world.builder().open_read_only().unwrap();
        let fault = store.keys().verify_audit(None).unwrap().fault;
        assert_eq!(store.keys().audit_records().is_err(), fault.is_some());
        fault
    };
    assert!(fault(&good).is_none());
    // A record under the newer version is accepted: it is the version that the log uses.
    let appended = [&good[..], forged_record(&good, &new, 2).as_bytes()].concat();
    assert!(fault(&appended).is_none());
    let appended = [&good[..], forged_record(&good, &old, 1).as_bytes()].concat();
    assert!(matches!(fault(&appended), Some(Error::Tampered { .. })), "the version goes back");
    // A writer does not continue from such a record either.
    let store = world.open();
    store.keys().rotate_data_key(&name(SERVICE)).unwrap();
    store.close().unwrap();
    let number_of_first = |log: &[u8]| {
        let line = std::str::from_utf8(log).unwrap().lines().next().unwrap();
        serde_json::from_str::<serde_json::Value>(line.split('\t').next().unwrap()).unwrap()["number"].as_u64().unwrap()
    };
    let next = fs::read(world.store_dir().join("audit/audit-000002.log")).unwrap();
    assert_eq!(
        number_of_first(&next),
        number_of_first(&appended[good.len()..]),
        "it takes the place of the forged one"
    );
    // A log that is cut before the rotation is detected as incomplete.
    for path in files(&world.store_dir().join("audit")).into_keys() {
        fs::remove_file(path).unwrap();
    }
    assert!(matches!(fault(&before), Some(Error::Truncated { .. })));
}

// ---- backups ----

#[test]
fn a_backup_from_before_a_rotation_is_read_on_request_alone() {
    let world = World::manual();
    let store = filled(&world);
    store.close().unwrap();
    let backup = world.path().join("backup");
    copy_dir(&world.store_dir(), &backup);
    let store = world.open();
    store.keys().rotate_service_key().unwrap();
    put(&store.logstore(&name(PLAIN)).unwrap(), "two");
    store.close().unwrap();
    copy_dir(&backup, &world.store_dir());
    assert_retired(world.builder().open(), "the identity of the store");
    assert_retired(world.builder().open_read_only(), "the identity of the store");
    let builder = || world.builder().accept_retired_versions(true);
    let before = files(&world.store_dir());
    for refused in [builder().open(), builder().open_or_create()] {
        assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{refused:?}");
    }
    assert!(before == files(&world.store_dir()), "it was changed");
    let store = builder().open_read_only().unwrap();
    for logstore in [SERVICE, BYOK, PLAIN] {
        assert_eq!(texts(&store.logstore(&name(logstore)).unwrap()), ["one"]);
    }
    assert_clean(&store, "a backup");
    assert_retired(
        world.builder().accept_retired_versions(false).open_read_only(),
        "the identity of the store",
    );
}

/// A reader may know a segment's head from before the writer sealed the segment.
#[test]
fn a_reader_proves_a_segment_from_an_older_head() {
    let world = World::manual();
    let store = world.create();
    let logstore = plain(&store);
    put(&logstore, "one");
    store.keys().rotate_service_key().unwrap();
    put(&logstore, "two");
    store.admin().checkpoint().unwrap();
    let reader = world.builder().open_read_only().unwrap();
    let beside = reader.logstore(&name(PLAIN)).unwrap();
    put(&logstore, "three");
    logstore.roll().unwrap();
    put(&logstore, "four");
    assert_eq!(texts(&beside), ["one", "two", "three", "four"]);
    assert_clean(&reader, "beside the writer");
}

// ---- interruptions ----

/// Checks the state after a rotation was interrupted and continued.
fn check_continued(
    at: &str,
    bytes: impl Fn(&Path) -> Vec<u8>,
    files: &BTreeMap<PathBuf, Vec<u8>>,
    world: &World,
) {
    let keyring = bytes(&world.keyring());
    let newest = u32_at(&keyring, 64);
    assert_eq!(accepts(&keyring), u64::from(newest), "{at}");
    for (path, bytes) in files.iter().filter(|(_, bytes)| bytes.starts_with(b"ENVLDOC\0")) {
        // Ignore older metadata that a kill prevented from being removed.
        let older = is_meta(path)
            && newest_meta(path.parent().unwrap(), files.keys().cloned()).as_ref() != Some(path);
        if path.extension().is_none_or(|ext| ext != "tmp") && !older {
            assert_eq!(u32_at(bytes, 64), newest, "{at}: {}", path.display());
        }
    }
    // The current data key under the service key was drawn under the newest version. Otherwise the
    // old root would reveal it.
    for (path, bytes) in files.iter().filter(|(path, _)| {
        newest_meta(path.parent().unwrap(), files.keys().cloned()).as_ref() == Some(*path)
    }) {
        let b = document_parts(bytes).1;
        if b["cmk"].is_null() && !b.is_null() {
            let versions = b["versions"].as_array().unwrap();
            assert_eq!(versions.last().unwrap()["drawn_under"], newest, "{at}: {}", path.display());
        }
    }
    // A segment under an older version has a successor, or ends with a footer.
    let shards = files.keys().filter(|path| path.extension().is_some_and(|ext| ext == "seg"));
    let last: BTreeMap<&Path, &PathBuf> =
        shards.map(|path| (path.parent().unwrap(), path)).collect();
    for path in last.values() {
        let header = SegmentHeader::decode(&files[*path]).unwrap().header;
        if matches!(header.key_source, KeySource::Keyring(version) if version < newest) {
            assert!(files[*path].ends_with(b"SEAL"), "{at}: {} is open", path.display());
        }
    }
}

#[test]
fn a_rotation_that_is_killed_anywhere_is_continued() {
    let sim = Sim::new();
    let store = sim.create();
    for logstore in [
        sim.world.service(&store, SERVICE),
        sim.world.byok(&store, BYOK, &sim.world.cmk()),
        plain(&store),
    ] {
        put(&logstore, "one");
    }
    store.close().unwrap();
    let (image, mut world) = (sim.disk, sim.world);
    let mut continued = 0;
    for nth in 1.. {
        let mut sim = Sim::of(world, SimDisk::fork(&image));
        let store = sim.open();
        for logstore in [SERVICE, BYOK, PLAIN] {
            put(&store.logstore(&name(logstore)).unwrap(), "two");
        }
        sim.disk.end_at(nth);
        let began = sim.disk.changes();
        let done = store.keys().rotate_service_key();
        let whole = sim.disk.changes() - began < nth;
        assert_eq!(done.is_ok(), whole, "operation {nth}: {done:?}");
        sim.disk.heal();
        // Kill only the process, or cut the power too.
        sim.disk = if nth % 2 == 0 { sim.disk.kill() } else { sim.disk.crash(Survives::Synced) };
        drop(store);
        let at = format!("operation {nth}");
        let store = sim.builder().open().unwrap_or_else(|error| panic!("{at}: {error}"));
        let usage = store.keys().usage().unwrap();
        let newest = usage.service_keys.len() as u32;
        let accepted = usage.service_keys.iter().filter(|key| key.accepted).count();
        assert_eq!(usage.service_rotation_unfinished, accepted > 1, "{at}: {usage:?}");
        for logstore in [SERVICE, BYOK, PLAIN] {
            assert_eq!(
                texts(&store.logstore(&name(logstore)).unwrap()),
                ["one", "two"],
                "{at}: {logstore}"
            );
        }
        let done = store
            .keys()
            .rotate_service_key_with(&mut |_| {})
            .unwrap_or_else(|error| panic!("{at}: {error}"));
        assert_eq!(done.continued, usage.service_rotation_unfinished, "{at}");
        assert_eq!(done.version, newest + u32::from(!done.continued), "{at}");
        continued += u32::from(done.continued);
        let (disk, found) = (&sim.disk, sim.disk.files(&sim.world.store_dir()));
        check_continued(&at, |path| disk.bytes(path), &found, &sim.world);
        assert_clean(&store, &at);
        for logstore in [SERVICE, BYOK, PLAIN] {
            let logstore = store.logstore(&name(logstore)).unwrap();
            put(&logstore, "three");
            assert_eq!(texts(&logstore), ["one", "two", "three"], "{at}");
        }
        store.close().unwrap();
        sim.crash(Survives::Synced);
        let store = sim.open();
        assert_clean(&store, &at);
        assert_eq!(texts(&store.logstore(&name(PLAIN)).unwrap()), ["one", "two", "three"], "{at}");
        store.close().unwrap();
        world = sim.world;
        if whole {
            assert!(continued > 10, "{continued} of {nth}");
            return;
        }
    }
}

#[test]
fn a_rotation_that_fails_anywhere_is_continued() {
    let world = World::manual_in_memory();
    filled(&world).close().unwrap();
    let template = world.path().join("template");
    copy_dir(&world.store_dir(), &template);
    let keyring = fs::read(world.keyring()).unwrap();
    for failure in Failure::ALL {
        for count in 0.. {
            let at = format!("{failure:?} after {count}");
            copy_dir(&template, &world.store_dir());
            write_private(&world.keyring(), &keyring);
            let disk = FailingDisk::default();
            let store = world.builder().disk(Arc::new(disk.clone())).open().unwrap();
            for logstore in [SERVICE, BYOK, PLAIN] {
                put(&store.logstore(&name(logstore)).unwrap(), "two");
            }
            disk.fail_after(count, failure);
            let outcome = store.keys().rotate_service_key();
            let ran_through = !disk.has_failed();
            disk.disarm();
            // If no shard has stopped, the same process continues.
            let store = match store.keys().rotate_service_key() {
                Ok(_) => store,
                Err(_) => {
                    drop(store);
                    let store = world.open();
                    store
                        .keys()
                        .rotate_service_key()
                        .unwrap_or_else(|error| panic!("{at}: {error}"));
                    store
                }
            };
            check_continued(
                &at,
                |path| fs::read(path).unwrap(),
                &files(&world.store_dir()),
                &world,
            );
            assert_clean(&store, &at);
            for logstore in [SERVICE, BYOK, PLAIN] {
                assert_eq!(
                    texts(&store.logstore(&name(logstore)).unwrap()),
                    ["one", "two"],
                    "{at}: {logstore}"
                );
            }
            // A shard that the failure has stopped reports this at closing.
            let closed = store.close();
            assert!(matches!(closed, Ok(()) | Err(Error::Latched { .. })), "{at}: {closed:?}");
            assert_clean(&world.open(), &at);
            if ran_through {
                outcome.unwrap();
                break;
            }
        }
    }
}

/// A rotation ends an open segment left by a killed process.
#[test]
fn a_segment_that_a_killed_process_left_is_ended() {
    let sim = Sim::new();
    let store = sim.create();
    put(&plain(&store), "one");
    sim.disk.end_at(1);
    drop(store);
    sim.disk.heal();
    let sim = Sim::of(sim.world, sim.disk.kill());
    let store = sim.open();
    let done = store.keys().rotate_service_key_with(&mut |_| {}).unwrap();
    assert_eq!(done.ended, 1);
    let logstore = store.logstore(&name(PLAIN)).unwrap();
    let sources: Vec<_> = sim
        .segments(&logstore, 0)
        .iter()
        .map(|path| SegmentHeader::decode(&sim.disk.bytes(path)).unwrap().header.key_source)
        .collect();
    // The groups above the durable mark are in a separate segment.
    assert_eq!(sources, [KeySource::Keyring(1), KeySource::Keyring(2), KeySource::Keyring(2)]);
    put(&logstore, "two");
    assert_eq!(texts(&logstore), ["one", "two"]);
    assert_clean(&store, "ended");
}

// ---- inaccessible keys ----

#[test]
fn a_revoked_master_key_keeps_no_rotation_from_its_end() {
    let world = World::manual();
    let store = filled(&world);
    let byok = store.logstore(&name(BYOK)).unwrap();
    let meta = meta_path(&world.logstore_dir(&byok));
    let tag_b = |bytes: &[u8]| bytes[bytes.len() - 36..].to_vec()[..32].to_vec();
    let before = fs::read(&meta).unwrap();
    world.kms.answer(Answer::Revoked(RevokedReason::Disabled));
    byok.revalidate_now().unwrap_err();
    let calls = world.kms.calls();
    let done = store.keys().rotate_service_key_with(&mut |_| {}).unwrap();
    assert_eq!((done.logstores, done.left_open.len()), (3, 0));
    assert_eq!(world.kms.calls(), calls);
    store.close().unwrap();
    // The same in a process that has never had the key.
    let store = world.open();
    assert_eq!(store.keys().rotate_service_key().unwrap(), 3);
    assert_eq!(world.kms.calls(), calls);
    let after = fs::read(meta_path(meta.parent().unwrap())).unwrap();
    assert_eq!((u32_at(&before, 64), u32_at(&after, 64)), (1, 3));
    assert_eq!(tag_b(&before), tag_b(&after));
    assert_revoked(try_texts(&store.logstore(&name(BYOK)).unwrap()), RevokedReason::Disabled);
    world.kms.answer(Answer::Real);
    let byok = store.logstore(&name(BYOK)).unwrap();
    byok.revalidate_now().unwrap();
    assert_eq!(texts(&byok), ["one"]);
    assert_clean(&store, "allowed again");
}

/// A segment from before a customer's key, while that key is revoked: a rotation ends the segment,
/// or reports it as open if no process has its key.
#[test]
fn a_rotation_ends_or_reports_a_segment_of_a_revoked_key() {
    for killed in [false, true] {
        let sim = Sim::new();
        let store = sim.create();
        let logstore = plain(&store);
        put(&logstore, "one");
        let encrypt = |sim: &Sim, store: &Store| {
            let encrypt_conf = Some(EncryptConf::byok(EncryptType::Aes, sim.world.cmk()));
            let config = store.logstore(&name(PLAIN)).unwrap().config().encrypt_conf(encrypt_conf);
            store.update_logstore(&name(PLAIN), config).unwrap();
        };
        let (sim, store, logstore) = if killed {
            sim.disk.end_at(1);
            drop((logstore, store));
            sim.disk.heal();
            let sim = Sim::of(sim.world, sim.disk.kill());
            let store = sim.open();
            let logstore = store.logstore(&name(PLAIN)).unwrap();
            (sim, store, logstore)
        } else {
            (sim, store, logstore)
        };
        encrypt(&sim, &store);
        sim.world.kms.answer(Answer::Revoked(RevokedReason::Disabled));
        logstore.revalidate_now().unwrap_err();
        let done = store.keys().rotate_service_key_with(&mut |_| {}).unwrap();
        assert_eq!(done.left_open, if killed { vec![name(PLAIN)] } else { Vec::new() });
        sim.world.kms.answer(Answer::Real);
        logstore.revalidate_now().unwrap();
        assert_eq!(
            texts(&sim.builder().open_read_only().unwrap().logstore(&name(PLAIN)).unwrap()),
            ["one"]
        );
        put(&logstore, "two");
        assert_eq!(texts(&logstore), ["one", "two"]);
        assert_clean(&store, "allowed again");
    }
}

/// An attacker damages the open segment, so that a rotation cannot end it, and would undo that
/// later. No data key is replaced before the shard is repaired.
#[test]
fn a_damaged_shard_gets_no_new_data_key() {
    let world = World::manual();
    let store = filled(&world);
    let dirs = [SERVICE, BYOK]
        .map(|logstore| world.logstore_dir(&store.logstore(&name(logstore)).unwrap()));
    for logstore in [SERVICE, BYOK] {
        // The second record carries the durable mark of the first.
        put(&store.logstore(&name(logstore)).unwrap(), "two");
    }
    let copy = world.path().join("killed");
    copy_dir(&world.store_dir(), &copy);
    drop(store);
    copy_dir(&copy, &world.store_dir());
    let paths = dirs.map(|dir| segments(&dir, 0).remove(0));
    let good = paths.clone().map(|path| fs::read(path).unwrap());
    for (path, good) in paths.iter().zip(&good) {
        let mut bytes = good.clone();
        // In the payload of the first block.
        bytes[408] ^= 1;
        fs::write(path, bytes).unwrap();
    }
    let store = world.open();
    let integrity =
        |result: Result<u32>| result.unwrap_err().kind() == envelog::ErrorKind::Integrity;
    for logstore in [SERVICE, BYOK] {
        assert!(integrity(store.keys().rotate_data_key(&name(logstore))), "{logstore}");
    }
    assert!(integrity(store.keys().replace_cmk(
        &name(BYOK),
        world.cmk(),
        envelog::admin::ReplaceCmk::default()
    )));
    assert!(integrity(store.keys().rotate_service_key()));
    assert!(store.keys().is_service_rotation_unfinished());
    drop(store);
    for (path, good) in paths.iter().zip(&good) {
        fs::write(path, good).unwrap();
    }
    let store = world.open();
    store.keys().rotate_service_key().unwrap();
    for logstore in [SERVICE, BYOK] {
        store.keys().rotate_data_key(&name(logstore)).unwrap();
        assert_eq!(texts(&store.logstore(&name(logstore)).unwrap()), ["one", "two"]);
    }
    assert_clean(&store, "undone");
}

/// An unreadable Logstore keeps older versions accepted until it is readable again or deleted.
#[test]
fn a_damaged_logstore_leaves_the_rotation_unfinished() {
    for deletes in [false, true] {
        let world = World::manual();
        filled(&world).close().unwrap();
        let path = {
            let store = world.builder().open_read_only().unwrap();
            meta_path(&world.logstore_dir(&store.logstore(&name(SERVICE)).unwrap()))
        };
        let good = fs::read(&path).unwrap();
        write_both(&path, &good[1..]);
        let store = world.open();
        for _ in 0..2 {
            assert!(matches!(store.keys().rotate_service_key(), Err(Error::Corrupt { .. })));
            assert!(store.keys().usage().unwrap().service_rotation_unfinished);
            let notes = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().notes;
            assert!(notes.iter().any(|note| note.contains("unfinished")), "{notes:?}");
            assert_eq!(accepts(&fs::read(world.keyring()).unwrap()), 1);
        }
        put(&store.logstore(&name(PLAIN)).unwrap(), "two");
        if deletes {
            store.delete_logstore(&name(SERVICE)).unwrap();
        } else {
            write_both(&path, &good);
        }
        let done = store.keys().rotate_service_key_with(&mut |_| {}).unwrap();
        assert_eq!((done.version, done.continued, done.logstores), (2, true, u64::from(!deletes)));
        assert_clean(&store, "continued");
    }
}
