//! Every change of a store's files is detected and classified: damage, tampering, wrong key,
//! truncation, rollback.
//!
//! The stores are in memory, so that the tests can try every byte: they make every single-byte
//! change and every truncation of every file, without sampling.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "tamper/moved.rs"]
mod moved;
#[path = "tamper/structures.rs"]
mod structures;
#[path = "tamper/unclean.rs"]
mod unclean;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use common::{
    memory::{Image, MemoryDisk},
    *,
};
use envelog::{
    EncryptConf, EncryptType, Error, LogstoreName, LogstoreSpec, ReadOptions, Result, ShardChoice,
    Store, StoreBuilder,
    admin::{Checkpoint, VerifyOptions},
    crypto::{AwsLc, SecretKey},
    kms::{Kms, KmsCall, KmsError},
};
use structures::{FileKind, Part, fix_crc, parts};

/// Caches successful unwraps of the KMS behind it, so that a hundred thousand openings do not read
/// its files each time. Other calls pass through.
#[derive(Debug)]
struct MemoKms {
    inner: Arc<TestKms>,
    unwrapped: Mutex<HashMap<String, [u8; 32]>>,
}

impl Kms for MemoKms {
    fn name(&self) -> &str {
        "memo"
    }

    fn serves(&self, region_id: &str) -> bool {
        self.inner.serves(region_id)
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        self.inner.wrap(call, key)
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        let question = format!("{:?} {:?} {wrapped:?}", call.cmk, call.context);
        if let Some(key) = self.unwrapped.lock().unwrap().get(&question) {
            return Ok(SecretKey::from_bytes(&mut key.clone()));
        }
        let key = self.inner.unwrap(call, wrapped)?;
        self.unwrapped.lock().unwrap().insert(question, *key.expose());
        Ok(key)
    }
}

const AES: &str = "app/aes";
const SM4: &str = "app/sm4";
const PLAIN: &str = "app/plain";

/// A store in memory, and the records written to it.
struct Fixture {
    world: World,
    kms: Arc<MemoKms>,
    disk: Arc<MemoryDisk>,
    /// The records of each shard of each Logstore, in order.
    written: BTreeMap<(LogstoreName, u32), Vec<String>>,
}

impl Fixture {
    fn new() -> Self {
        let world = World::manual();
        let kms = Arc::new(MemoKms { inner: Arc::clone(&world.kms), unwrapped: Mutex::default() });
        Self { world, kms, disk: MemoryDisk::of(&Image::default()), written: BTreeMap::new() }
    }

    /// The files, without the second copies of those that exist twice: a change to one copy has no
    /// effect.
    fn image(&self) -> Image {
        let mut image = self.disk.image();
        image.files.retain(|path, _| path.extension().is_none_or(|extension| extension != "copy"));
        image
    }

    fn builder(&self, disk: Arc<MemoryDisk>) -> StoreBuilder {
        Store::builder(self.world.store_dir(), self.world.keyring(), AwsLc::new())
            .kms(Arc::clone(&self.kms) as _)
            .disk(disk)
            .clock(Arc::clone(&self.world.clock) as _)
            .options(self.world.options)
    }

    /// A store with a Logstore under the service key with AES, one under a master key with SM4, and
    /// one without encryption.
    fn create(&self) -> Store {
        let store = self.builder(Arc::clone(&self.disk)).create().unwrap();
        for (text, conf) in [
            (AES, Some(EncryptConf::service_key(EncryptType::Aes))),
            (SM4, Some(EncryptConf::byok(EncryptType::Sm4, self.world.cmk()))),
            (PLAIN, None),
        ] {
            let spec = LogstoreSpec::default().shard_count(2).encrypt_conf(conf);
            store.create_logstore(&name(text), spec).unwrap();
        }
        store
    }

    /// Appends a record and adds it to `written`.
    fn put(&mut self, store: &Store, logstore: &str, shard: u32) {
        let logstore = name(logstore);
        let written = self.written.entry((logstore.clone(), shard)).or_default();
        let text = format!("{logstore} {shard} {}", written.len());
        let options = synced().shard(ShardChoice::Shard(shard));
        store.logstore(&logstore).unwrap().append(record(&text), &options).unwrap();
        written.push(text);
    }

    /// A cleanly closed store. Each Logstore has two segments in its first shard, except the one
    /// with AES, which has three there and one in its second shard.
    fn closed() -> Self {
        let mut fixture = Self::new();
        let store = fixture.create();
        for logstore in [AES, SM4, PLAIN] {
            fixture.put(&store, logstore, 0);
            fixture.put(&store, logstore, 0);
            store.logstore(&name(logstore)).unwrap().roll().unwrap();
            fixture.put(&store, logstore, 0);
            fixture.put(&store, logstore, 1);
        }
        store.logstore(&name(AES)).unwrap().roll().unwrap();
        fixture.put(&store, AES, 0);
        store.close().unwrap();
        fixture
    }

    /// Reopens the fixture's own store, runs `change`, and closes it.
    fn reopened(&mut self, change: impl FnOnce(&mut Self, &Store)) {
        let store = self.builder(Arc::clone(&self.disk)).open().unwrap();
        change(self, &store);
        store.close().unwrap();
    }

    /// The Logstore that a file belongs to.
    fn logstore_of(&self, store: &Store, path: &Path) -> Option<LogstoreName> {
        let inside = path.strip_prefix(self.world.store_dir().join("logstores")).ok()?;
        let id = inside.iter().next()?.to_str()?.to_owned();
        store
            .list()
            .unwrap()
            .into_iter()
            .find(|name| store.logstore(name).unwrap().id().to_string() == id)
    }

    /// The scope to check after damage to this file: its Logstore, or everything.
    fn concerned(&self, store: &Store, path: &Path) -> Option<LogstoreName> {
        if FileKind::of(path) == FileKind::Segment { self.logstore_of(store, path) } else { None }
    }

    /// The faults that `verify` finds in `image`, with a checkpoint.
    fn verify_against(&self, image: &Image, checkpoint: &Checkpoint) -> Vec<&'static str> {
        let store = self.builder(MemoryDisk::of(image)).open_read_only().unwrap();
        let options = VerifyOptions::default().against(checkpoint.clone());
        store
            .admin()
            .verify(&options, &mut |_| {})
            .unwrap()
            .faults
            .iter()
            .map(|fault| fault.code)
            .collect()
    }

    /// Opens `image` for reading, and checks everything or only one Logstore.
    fn examine(&self, image: &Image, only: Option<&LogstoreName>) -> Verdict {
        let mut verdict = Verdict::default();
        let store = match self.builder(MemoryDisk::of(image)).open_read_only() {
            Ok(store) => store,
            Err(error) => {
                verdict.open = Some(error);
                return verdict;
            }
        };
        match store.list() {
            Ok(names) => {
                let expected: BTreeSet<_> =
                    self.written.keys().map(|(name, _)| name.clone()).collect();
                assert_eq!(names.into_iter().collect::<BTreeSet<_>>(), expected);
            }
            Err(error) => verdict.used.push(error),
        }
        for ((logstore, shard), written) in &self.written {
            if only.is_none_or(|only| only == logstore) {
                verdict.used.extend(read_prefix(&store, logstore, *shard, written).err());
            }
        }
        if only.is_none() {
            verdict.used.extend(store.keys().audit_records().err());
        }
        for keyless in [false, true] {
            let options =
                VerifyOptions::default().logstore(only.cloned()).keyless(keyless).against(None);
            let report = store.admin().verify(&options, &mut |_| {}).unwrap();
            assert!(report.refused.is_empty(), "{:?}", report.refused);
            let probes = self.world.store_dir().join("probes");
            verdict.of_probe = report
                .faults
                .iter()
                .all(|fault| fault.file.as_ref().is_some_and(|file| file.starts_with(&probes)));
            let kinds = report.faults.iter().map(|fault| fault.code).collect();
            if keyless { verdict.keyless = kinds } else { verdict.verified = kinds }
        }
        verdict
    }
}

/// Reads a shard and checks that the records are the written ones, or a prefix of them followed by
/// an error.
fn read_prefix(
    store: &Store,
    logstore: &LogstoreName,
    shard: u32,
    written: &[String],
) -> Result<()> {
    let mut expected = written.iter();
    for record in store.logstore(logstore)?.read(shard, &ReadOptions::default())? {
        let record = record?;
        assert_eq!(
            Some(&*record.bytes),
            expected.next().map(|text| text.as_bytes()),
            "{logstore} {shard}"
        );
    }
    assert_eq!(expected.len(), 0, "records of {logstore} {shard} are missing, and nothing said so");
    Ok(())
}

/// The results of the checks of a store.
#[derive(Debug, Default)]
struct Verdict {
    /// The error of the opening, if it failed.
    open: Option<Error>,
    /// The errors of listing and opening Logstores, and of reading them and the audit log.
    used: Vec<Error>,
    /// The faults that `verify` found, with and without keys.
    verified: Vec<&'static str>,
    keyless: Vec<&'static str>,
    /// Whether all of them are about a probe. A damaged probe counts as missing, so only `verify`
    /// reports it.
    of_probe: bool,
}

impl Verdict {
    fn is_clean(&self) -> bool {
        self.open.is_none()
            && self.used.is_empty()
            && self.verified.is_empty()
            && self.keyless.is_empty()
    }

    /// Whether opening and using the store reports one of `codes`, and no other error.
    fn shows(&self, codes: &[&str]) -> bool {
        let is_damage = |code| ["corrupt", "truncated"].contains(code);
        if self.of_probe && self.open.is_none() && self.verified.first().is_some_and(is_damage) {
            return self.used.is_empty();
        }
        let mut seen = self.open.iter().chain(&self.used).map(Error::code).peekable();
        seen.peek().is_some() && seen.all(|code| codes.contains(&code))
    }

    /// Whether `verify` reports one of `codes` first. Faults that follow from it may be reported
    /// too.
    fn is_verified(&self, codes: &[&str]) -> bool {
        self.open.is_some() || self.verified.first().is_some_and(|code| codes.contains(code))
    }

    fn is_found_without_keys(&self) -> bool {
        self.open.is_some() || !self.keyless.is_empty()
    }
}

/// Runs `work` for each item, with one thread per processor.
fn in_parallel<T: Sync>(items: &[T], work: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(item);
                }
            });
        }
    });
}

/// Every part of every file in the image that can be damaged.
fn all_parts(image: &Image) -> Vec<(PathBuf, FileKind, Part)> {
    let of_file = |(path, bytes): (&PathBuf, &Vec<u8>)| {
        let kind = FileKind::of(path);
        parts(kind, bytes).into_iter().map(|part| (path.clone(), kind, part)).collect::<Vec<_>>()
    };
    image.files.iter().flat_map(of_file).collect()
}

/// The expected codes for a change of a part whose CRC does not match.
fn damaged(part: &Part) -> &'static [&'static str] {
    match part.name {
        // A later version may have its CRC elsewhere, so the engine checks the version first.
        "version" | "footer version" => &["corrupt", "newer_format"],
        // A length beyond the end of the file looks like a truncated file.
        "lengths" | "header length" | "change length" => &["corrupt", "truncated"],
        // A crash can tear a tip only after the record that it names was synced, and there is no
        // such record.
        "tip magic"
        | "tip slot"
        | "tip keyring version"
        | "tip reserved"
        | "tip number"
        | "tip names"
        | "tip tag"
        | "tip crc"
        | "tip padding" => &["truncated"],
        // Without the newline, the line looks cut off by a crash, but the catalogue knows the
        // record.
        "last newline" => &["truncated"],
        _ => &["corrupt"],
    }
}

/// The expected codes for a change of a part whose CRC was recomputed.
fn forged(kind: FileKind, part: &Part) -> &'static [&'static str] {
    match (kind, part.name) {
        // Bytes without a meaning for this build are not authenticated.
        (_, "version" | "footer version") => &["corrupt", "newer_format"],
        // Its first bit is known there.
        (FileKind::Meta, "incompatible features") => &["tampered", "unsupported_feature"],
        (_, "incompatible features") => &["unsupported_feature"],
        (_, "lengths" | "header length" | "footer index length" | "change length") => {
            &["corrupt", "truncated"]
        }
        (_, "magic" | "reserved" | "tip magic" | "tip reserved" | "change magic") => &["corrupt"],
        (_, "block magic" | "block kind" | "block lengths" | "block reserved") => &["corrupt"],
        (_, "footer magic" | "footer reserved" | "footer segment tag" | "footer offset") => {
            &["corrupt"]
        }
        (FileKind::Segment, "footer blocks") => &["corrupt", "rolled_back"],
        (FileKind::Segment, "footer counts" | "footer index" | "footer flags") => {
            &["corrupt", "tampered"]
        }
        (FileKind::Segment, "suite" | "payload hash") => &["tampered", "unsupported_feature"],
        (FileKind::Segment, "key source" | "predecessor kind") => &["corrupt", "tampered"],
        (FileKind::Segment, "first seq" | "limit seq" | "setbacks" | "latest time") => {
            &["corrupt", "tampered"]
        }
        (FileKind::Segment, "block seq" | "block times") => &["corrupt", "tampered"],
        (FileKind::Audit, "record") => &["corrupt", "keyring_too_old", "tampered"],
        (FileKind::Audit, "record tag") => &["corrupt", "tampered"],
        // The key that authenticates the keyring is inside it, so the engine parses the keyring
        // before authenticating it.
        (FileKind::Keyring, "kind" | "keyring version") => &["corrupt"],
        (FileKind::Keyring, "part A") => &["corrupt", "tampered"],
        // The content of a document selects the key that authenticates it.
        (_, "keyring version" | "tip keyring version" | "change keyring version") => {
            &["keyring_too_old"]
        }
        // The store's content selects its keyring, and the keyring's content its store.
        (FileKind::Store, "store") | (FileKind::Keyring, "store" | "subject") => {
            &["keyring_foreign"]
        }
        (FileKind::Store, "part A") => &["corrupt", "keyring_foreign", "tampered"],
        (FileKind::Store, "kind") => &["corrupt", "not_a_store", "tampered"],
        (_, "kind") => &["corrupt", "tampered"],
        // The engine compares the end that other files record before it uses the segment's key.
        (FileKind::Segment, "footer body") => &["rolled_back"],
        (FileKind::Segment, "predecessor") => &["corrupt", "rolled_back", "tampered"],
        (FileKind::Segment, "commitment") => &["wrong_key"],
        _ => &["tampered"],
    }
}

/// Changes that only the segment's key can detect. The digest commits to all payloads.
const KEY_NEEDED: [&str; 4] = ["commitment", "footer flags", "footer nonce", "footer tag"];

#[test]
fn an_intact_store_is_found_intact() {
    let fixture = Fixture::closed();
    let image = fixture.image();
    let verdict = fixture.examine(&image, None);
    assert!(verdict.is_clean(), "{verdict:?}");
    let kinds: BTreeSet<FileKind> = image.files.keys().map(|path| FileKind::of(path)).collect();
    assert_eq!(kinds.len(), 9, "each kind of file there is, is in the store: {kinds:?}");
}

/// Every byte of every file, and of the keyring.
#[test]
fn every_changed_byte_of_a_closed_store_is_found() {
    let fixture = Fixture::closed();
    let image = fixture.image();
    let store = fixture.builder(MemoryDisk::of(&image)).open_read_only().unwrap();
    in_parallel(&all_parts(&image), |(path, _, part)| {
        let only = fixture.concerned(&store, path);
        // A CRC detects a flip of any bit, and over all bytes each bit position is tried.
        for (at, flip) in part.bytes.clone().map(|at| (at, 1u8 << (at % 8))) {
            let mut bytes = image.files[path].clone();
            bytes[at] ^= flip;
            let verdict = fixture.examine(&image.with(path, bytes), only.as_ref());
            let codes = damaged(part);
            let found = verdict.shows(codes)
                && verdict.is_verified(codes)
                && verdict.is_found_without_keys();
            let expected = if part.may_be_lost { verdict.is_clean() } else { found };
            assert!(
                expected,
                "{}, byte {at} ({}) by {flip:#x}: {verdict:?}",
                path.display(),
                part.name
            );
        }
    });
}

/// A bad sector reads as zeros: each part of each file, and each file as a whole.
#[test]
fn every_zeroed_part_of_a_closed_store_is_found() {
    let fixture = Fixture::closed();
    let image = fixture.image();
    let store = fixture.builder(MemoryDisk::of(&image)).open_read_only().unwrap();
    for (path, _, part) in all_parts(&image) {
        let bytes = &image.files[&path];
        let mut zeroed = bytes.clone();
        zeroed[part.bytes.clone()].fill(0);
        if zeroed == *bytes {
            continue;
        }
        let only = fixture.concerned(&store, &path);
        // An audit file of zeros is not part of the log, so the fault is the records that the
        // catalogue knows and the log lacks.
        let emptied: &[&str] = &["corrupt"];
        let harmless = [part.may_be_lost, part.bytes.len() == bytes.len() && part.may_be_lost];
        let cases = [(part.name, zeroed, damaged(&part)), ("all", vec![0; bytes.len()], emptied)];
        for ((what, zeroed, codes), harmless) in cases.into_iter().zip(harmless) {
            let verdict = fixture.examine(&image.with(&path, zeroed), only.as_ref());
            let found = verdict.shows(codes)
                && verdict.is_verified(codes)
                && verdict.is_found_without_keys();
            let expected = if harmless { verdict.is_clean() } else { found };
            assert!(expected, "{what} of {}: {verdict:?}", path.display());
        }
    }
}

/// The same by an attacker who knows the format and recomputes the CRC.
#[test]
fn every_forged_byte_of_a_closed_store_is_found() {
    let fixture = Fixture::closed();
    let image = fixture.image();
    let store = fixture.builder(MemoryDisk::of(&image)).open_read_only().unwrap();
    in_parallel(&all_parts(&image), |(path, kind, part)| {
        let only = fixture.concerned(&store, path);
        let bytes = part.bytes.clone().filter(|_| part.covered.is_some());
        for (at, flip) in bytes.flat_map(|at| [(at, 0x01), (at, 0x80)]) {
            let mut bytes = image.files[path].clone();
            bytes[at] ^= flip;
            fix_crc(*kind, part, &mut bytes);
            let verdict = fixture.examine(&image.with(path, bytes), only.as_ref());
            let codes = forged(*kind, part);
            let without_keys = verdict.is_found_without_keys() || KEY_NEEDED.contains(&part.name);
            let found = verdict.shows(codes) && verdict.is_verified(codes) && without_keys;
            assert!(
                found,
                "{}, byte {at} ({}) by {flip:#x}: {verdict:?}",
                path.display(),
                part.name
            );
        }
    });
}

/// Every file, truncated to every length.
#[test]
fn every_truncation_of_a_closed_store_is_found() {
    let fixture = Fixture::closed();
    let image = fixture.image();
    let store = fixture.builder(MemoryDisk::of(&image)).open_read_only().unwrap();
    let cuts: Vec<(&PathBuf, usize)> = image
        .files
        .iter()
        .flat_map(|(path, bytes)| (0..bytes.len()).map(move |len| (path, len)))
        .collect();
    in_parallel(&cuts, |&(path, len)| {
        let only = fixture.concerned(&store, path);
        let verdict =
            fixture.examine(&image.with(path, image.files[path][..len].to_vec()), only.as_ref());
        let codes = &["truncated"];
        let found =
            verdict.shows(codes) && verdict.is_verified(codes) && verdict.is_found_without_keys();
        let expected =
            if FileKind::of(path) == FileKind::Epoch { verdict.is_clean() } else { found };
        assert!(expected, "{} cut to {len}: {verdict:?}", path.display());
    });
}

/// Changes that are harmless by design, file by file.
#[test]
fn what_may_be_lost_is_known_by_name() {
    let fixture = Fixture::closed();
    let image = fixture.image();
    let of_kind =
        |kind| image.files.keys().find(|path| FileKind::of(path) == kind).unwrap().clone();
    let lock = of_kind(FileKind::Lock);
    let epoch = of_kind(FileKind::Epoch);
    let audit = of_kind(FileKind::Audit);
    let catalogue = of_kind(FileKind::Catalogue);
    let stray = audit.with_file_name("stray");
    for (what, image) in [
        // The file exists to be locked. Its content only names the holder.
        ("no lock file", image.without(&lock)),
        ("a lock file with something in it", image.with(&lock, b"4711\n".to_vec())),
        // The next writer recreates it.
        ("no epoch", image.without(&epoch)),
        // The Logstores' own envelopes can renew a lease too.
        ("no probe", image.without(&of_kind(FileKind::Probe))),
        // A file without a meaningful name belongs to no part of the store.
        ("a stray file", image.with(&stray, b"stray".to_vec())),
        // A line cut off by a crash was never acknowledged. The next record replaces it.
        (
            "the beginning of an audit record",
            image.with(&audit, [&image.files[&audit][..], b"{\"num"].concat()),
        ),
        (
            "the beginning of a change",
            image.with(&catalogue, [&image.files[&catalogue][..], b"ECHG\x09"].concat()),
        ),
    ] {
        let verdict = fixture.examine(&image, None);
        assert!(verdict.is_clean(), "{what}: {verdict:?}");
    }
}

/// If `EPOCH` is damaged, the epoch in the names of the catalogue files is used. Only a version
/// that a newer build may have written prevents opening for writing.
#[test]
fn a_writer_takes_over_whatever_has_become_of_the_epoch() {
    let fixture = Fixture::closed();
    let image = fixture.image();
    let path = fixture.world.store_dir().join("EPOCH");
    let bytes = &image.files[&path];
    let flipped = (0..bytes.len()).map(|at| {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1 << (at % 8);
        (format!("byte {at} flipped"), bytes)
    });
    let cut =
        (0..bytes.len()).step_by(64).map(|len| (format!("cut to {len}"), bytes[..len].to_vec()));
    let rest = [("zeros", vec![0; bytes.len()]), ("longer", [&bytes[..], &[7; 100]].concat())];
    let rest = rest.map(|(what, bytes)| (what.to_owned(), bytes));
    for (what, damaged) in flipped.chain(cut).chain(rest) {
        let newer = [0, 512].iter().any(|slot| {
            damaged.get(slot + 8..slot + 10).is_some_and(|version| version > [2, 0].as_slice())
        }) && what.contains("flipped");
        let disk = MemoryDisk::of(&image.with(&path, damaged));
        match fixture.builder(Arc::clone(&disk)).open() {
            Ok(store) => {
                assert!(!newer, "{what}");
                assert!(
                    disk.image().catalogue_file(&fixture.world.store_dir())
                        > image.catalogue_file(&fixture.world.store_dir()),
                    "{what}"
                );
                store.close().unwrap();
                assert!(fixture.examine(&disk.image(), None).is_clean(), "{what}");
            }
            Err(error) => assert!(newer && error.code() == "newer_format", "{what}: {error}"),
        }
    }
}
