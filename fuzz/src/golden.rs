//! The golden stores of `tests/golden`, in memory. Targets put hostile bytes into them and then
//! examine them.

use std::{
    collections::HashSet,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
};

use envelog::{
    AppendOptions, Background, Durability, Logstore, Payload, Position, ReadOptions, Record,
    Result, ShardChoice, Store, StoreBuilder, StoreOptions, admin::VerifyOptions, crypto::Sm4Simd,
    ids::LogstoreId, inspect::BlockKind, kms::LocalKms,
};

use crate::common::{
    TestClock,
    memory::{Image, MemoryDisk},
};

/// The directory of the store in memory, and the path of its keyring.
pub(crate) const DIR: &str = "/golden/store";
pub(crate) const KEYRING: &str = "/golden/keyring";

/// Every golden store.
pub const GOLDEN: [&str; 8] = [
    "service-aes",
    "service-sm4",
    "byok-aes",
    "plain",
    "switched-off",
    "recovered",
    "unclean",
    "compressed",
];

/// A record and its position.
type Written = (LogstoreId, u32, u64, u64, bool, Vec<u8>);

/// A golden store in its original state.
pub struct Golden {
    pub(crate) image: Image,
    kms: Option<PathBuf>,
    written: HashSet<Written>,
}

/// The golden store of this name.
pub fn golden(name: &str) -> &'static Golden {
    static ALL: [OnceLock<Golden>; GOLDEN.len()] = [const { OnceLock::new() }; GOLDEN.len()];
    let index = GOLDEN.iter().position(|one| *one == name).expect("the name of a golden store");
    ALL[index].get_or_init(|| Golden::load(name))
}

/// The golden store that a byte chooses.
pub(crate) fn picked(by: u8) -> &'static Golden {
    golden(GOLDEN[usize::from(by) % GOLDEN.len()])
}

pub(crate) fn manual() -> StoreOptions {
    let mut options = StoreOptions::default();
    options.background = Background::Manual;
    options
}

pub(crate) fn clock() -> Arc<TestClock> {
    TestClock::new()
}

impl Golden {
    fn load(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v2").join(name);
        let mut image = Image::default();
        image
            .files
            .insert(KEYRING.into(), fs::read(dir.join("keyring")).expect("a golden keyring"));
        copy_into(&mut image, &dir.join("store"), Path::new(DIR));
        let kms = Some(dir.join("kms")).filter(|kms| kms.exists());
        let mut golden = Self { image, kms, written: HashSet::new() };
        let store = golden
            .builder(&MemoryDisk::of(&golden.image))
            .open_read_only()
            .expect("a golden store opens");
        let mut written = HashSet::new();
        for name in store.list().expect("its catalogue") {
            let logstore = store.logstore(&name).expect("a golden Logstore");
            for shard in 0..logstore.config().shard_count {
                for record in logstore.read(shard, &ReadOptions::default()).expect("a golden shard")
                {
                    written.insert(entry(&logstore, shard, record.expect("a golden record")));
                }
            }
        }
        assert!(!written.is_empty(), "{name}");
        golden.written = written;
        golden
    }

    pub(crate) fn builder(&self, disk: &Arc<MemoryDisk>) -> StoreBuilder {
        let builder = Store::builder(DIR, KEYRING, Sm4Simd::new()).disk(Arc::clone(disk) as _);
        let builder = builder.clock(clock()).options(manual());
        match &self.kms {
            Some(dir) => builder.kms(Arc::new(LocalKms::at(dir))),
            None => builder,
        }
    }

    /// The path and the bytes of each file whose path ends in `end`.
    pub fn files<'a>(&'a self, end: &'a str) -> impl Iterator<Item = (&'a Path, &'a [u8])> {
        let all = self.image.files.iter().map(|(path, bytes)| (&**path, &**bytes));
        all.filter(move |(path, _)| path.to_string_lossy().ends_with(end))
    }

    /// The bytes of its first segment.
    pub fn first_segment(&self) -> Vec<u8> {
        self.files(".seg").next().expect("every golden store has a segment").1.to_vec()
    }

    /// Opens the store in `image`, a changed version of this store. Reads it, writes to it, and
    /// uses all operations that inspect it.
    ///
    /// # Panics
    /// If it reads a record that was never written there, or misses an acknowledged one.
    pub(crate) fn examine(&self, image: &Image) {
        let disk = MemoryDisk::of(image);
        let builder = self.builder(&disk);
        if let Some(store) = shown(builder.clone().open_read_only()) {
            self.look(&store, &HashSet::new());
            shown(store.close());
        }
        assert!(disk.image() == *image, "reading has changed something");

        let Some(store) = shown(builder.clone().open()) else { return };
        let mut added = HashSet::new();
        self.look(&store, &added);
        for name in shown(store.list()).unwrap_or_default() {
            let Some(logstore) = shown(store.logstore(&name)) else { continue };
            append(&logstore, &mut added);
            shown(store.keys().rotate_data_key(&name));
            append(&logstore, &mut added);
            shown(logstore.roll());
            for shard in shards(&logstore) {
                shown(store.admin().repair(&name, shard, &Default::default()));
            }
            append(&logstore, &mut added);
        }
        shown(store.keys().rotate_service_key());
        let checkpoint = shown(store.admin().checkpoint());
        if checkpoint.is_some() {
            shown(store.admin().verify(&VerifyOptions::default().against(checkpoint), &mut |_| {}));
        }
        self.look(&store, &added);
        let closed = shown(store.close()).is_some();

        let reopened = shown(builder.clone().open());
        assert!(reopened.is_some() || !closed, "it was closed cleanly, and does not open");
        let Some(store) = reopened else { return };
        self.look(&store, &added);
        for name in shown(store.list()).unwrap_or_default() {
            let Some(logstore) = shown(store.logstore(&name)) else { continue };
            for (_, shard, seq, ..) in added.iter().filter(|(id, ..)| *id == logstore.id()) {
                assert_eq!(
                    first_from(&logstore, *shard, *seq),
                    Some(*seq),
                    "{name} {shard}: a synced record is gone"
                );
            }
        }
        shown(store.admin().apply_retention());
        shown(store.close());
    }

    /// Recovers the store in `image` without its keyring, and reads the result.
    pub(crate) fn recover(&self, image: &Image) {
        let image = if image.files.contains_key(Path::new(KEYRING)) {
            image.without(Path::new(KEYRING))
        } else {
            image.clone()
        };
        let disk = MemoryDisk::of(&image);
        let Some(found) = shown(self.builder(&disk).recoverable()) else { return };
        let expected = found.into_iter().filter_map(|one| Some((one.name, one.cmk?))).collect();
        if let Some((store, _)) = shown(self.builder(&disk).recover_without_keyring(&expected)) {
            self.look(&store, &HashSet::new());
            shown(store.close());
        }
    }

    /// Reads everything, from several positions. Only records that were written or added may be
    /// present.
    fn look(&self, store: &Store, added: &HashSet<Written>) {
        for name in shown(store.list()).unwrap_or_default() {
            let Some(logstore) = shown(store.logstore(&name)) else { continue };
            drop(logstore.config());
            shown(logstore.status());
            drop(logstore.key_status());
            for shard in shards(&logstore) {
                shown(logstore.end_seq(shard));
                for from in [
                    Position::Begin,
                    Position::End,
                    Position::Seq(2),
                    Position::Time(1_700_000_000_002_000),
                ] {
                    let Some(reader) =
                        shown(logstore.read(shard, &ReadOptions::default().from(from)))
                    else {
                        continue;
                    };
                    let mut last = None;
                    for record in reader {
                        let Some(record) = shown(record) else { break };
                        assert!(last < Some(record.seq), "{} after {last:?}", record.seq);
                        last = Some(record.seq);
                        shown(record.group());
                        let entry = entry(&logstore, shard, record);
                        assert!(
                            self.written.contains(&entry) || added.contains(&entry),
                            "nobody wrote {entry:?}"
                        );
                    }
                }
            }
        }
        shown(store.keys().audit_records());
        for keyless in [true, false] {
            shown(store.admin().verify(&VerifyOptions::default().keyless(keyless), &mut |_| {}));
        }
    }
}

/// The shards to read: damaged metadata may claim many.
fn shards(logstore: &Logstore) -> std::ops::Range<u32> {
    0..logstore.config().shard_count.min(3)
}

fn entry(logstore: &Logstore, shard: u32, record: Record) -> Written {
    let opaque = record.kind == BlockKind::Opaque;
    (logstore.id(), shard, record.seq, record.receive_time_us, opaque, record.bytes.to_vec())
}

/// Appends to each shard. An acknowledged record must be readable at once.
fn append(logstore: &Logstore, added: &mut HashSet<Written>) {
    for shard in shards(logstore) {
        let options = AppendOptions::default()
            .shard(ShardChoice::Shard(shard))
            .durability(Durability::Synced);
        let payload = Payload::opaque("added by the fuzzer").expect("a short record");
        let Some(appended) = shown(logstore.append(payload, &options)) else { continue };
        let reader =
            logstore.read(shard, &ReadOptions::default().from(Position::Seq(appended.seq)));
        let record = reader
            .expect("it could be written")
            .next()
            .expect("it was acknowledged")
            .expect("it is intact");
        assert_eq!((record.seq, &record.bytes[..]), (appended.seq, &b"added by the fuzzer"[..]));
        added.insert(entry(logstore, shard, record));
    }
}

/// The sequence number of the first record from `seq` on.
fn first_from(logstore: &Logstore, shard: u32, seq: u64) -> Option<u64> {
    let mut reader = shown(logstore.read(shard, &ReadOptions::default().from(Position::Seq(seq))))?;
    Some(shown(reader.next()?)?.seq)
}

/// The value of the result. An error is formatted in every way, and becomes `None`.
pub(crate) fn shown<T, E: std::fmt::Debug + std::fmt::Display>(result: Result<T, E>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            assert!(!format!("{error} {error:?}").is_empty());
            None
        }
    }
}

fn copy_into(image: &mut Image, from: &Path, to: &Path) {
    image.dirs.insert(to.to_owned());
    for found in fs::read_dir(from).expect("a directory of a golden store") {
        let found = found.expect("an entry of a golden store").path();
        let to = to.join(found.file_name().expect("an entry has a name"));
        if found.is_dir() {
            copy_into(image, &found, &to);
        } else {
            image.files.insert(to, fs::read(&found).expect("a file of a golden store"));
        }
    }
}
