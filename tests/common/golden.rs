//! Generates the golden stores. Each is a directory with a `store`, its `keyring`, the `kms` for a
//! customer's key, and `expected.json`. The latter lists every record that a reader has to find,
//! derived from the appended data and not from a read.

#![allow(dead_code, clippy::unwrap_used)]

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use envelog::{
    AppendOptions, Background, Cmk, Compression, Durability, EncryptConf, EncryptType, Logstore,
    LogstoreSpec, Payload, ShardChoice, Store, StoreBuilder, StoreOptions,
    crypto::{AwsLc, HashAlg, hash},
    io::{Clock, Random},
    kms::LocalKms,
};
use serde_json::{Value, json};

use crate::common::{
    QuickDisk, REGION, ROLE, TestClock, copy_dir, group, millis, name, secs, segments,
};

/// Every golden store.
pub(crate) const NAMES: [&str; 10] = [
    "service-aes",
    "service-sm4",
    "byok-aes",
    "sealed-keyring",
    "plain",
    "switched-off",
    "recovered",
    "unclean",
    "compressed",
    "resharded",
];

/// The store whose bytes depend on the versions of the compression libraries.
pub(crate) const COMPRESSED: &str = "compressed";

/// A random source that returns the same numbers in every run and never repeats a draw.
#[derive(Debug)]
struct FixedRandom {
    seed: String,
    drawn: Mutex<u64>,
}

impl Random for FixedRandom {
    fn fill(&self, buf: &mut [u8]) -> io::Result<()> {
        for chunk in buf.chunks_mut(32) {
            let mut drawn = self.drawn.lock().unwrap();
            *drawn += 1;
            let bytes = hash(
                HashAlg::Sha256,
                &[b"envelog golden", self.seed.as_bytes(), &drawn.to_le_bytes()],
            );
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
        Ok(())
    }
}

/// Creates one golden store in `dir`, which must not exist.
pub(crate) fn make(which: &str, dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let mut maker = Maker {
        dir: dir.to_owned(),
        clock: TestClock::new(),
        random: Arc::new(FixedRandom { seed: which.to_owned(), drawn: Mutex::new(0) }),
        expected: json!({}),
    };
    match which {
        "service-aes" => maker.service_aes(),
        "service-sm4" => maker.service_sm4(),
        "byok-aes" => maker.byok_aes(),
        "sealed-keyring" => maker.sealed_keyring(),
        "plain" => maker.plain(),
        "switched-off" => maker.switched_off(),
        "recovered" => maker.recovered(),
        "unclean" => maker.unclean(),
        COMPRESSED => maker.compressed(),
        "resharded" => maker.resharded(),
        other => panic!("there is no golden store {other}"),
    }
    let listing = serde_json::to_string_pretty(&maker.expected).unwrap();
    fs::write(dir.join("expected.json"), listing + "\n").unwrap();
}

/// The data to append.
#[derive(Clone, Copy)]
enum What<'a> {
    Opaque(&'a str),
    /// This many logs about this topic.
    Group(&'a str, u32),
}

struct Maker {
    dir: PathBuf,
    clock: Arc<TestClock>,
    random: Arc<FixedRandom>,
    /// The expected records, by Logstore and shard.
    expected: Value,
}

fn spec(conf: Option<EncryptConf>, shard_count: u32) -> LogstoreSpec {
    LogstoreSpec::default()
        .shard_count(shard_count)
        .compression(Compression::None)
        .encrypt_conf(conf)
}

impl Maker {
    fn builder(&self, store: &Path) -> StoreBuilder {
        let mut options = StoreOptions::default();
        options.background = Background::Manual;
        Store::builder(store, self.dir.join("keyring"), AwsLc::new())
            .disk(Arc::new(QuickDisk))
            .clock(Arc::clone(&self.clock) as _)
            .insecure_random_for_tests(Arc::clone(&self.random) as _)
            .options(options)
    }

    fn store_dir(&self) -> PathBuf {
        self.dir.join("store")
    }

    fn create(&self) -> Store {
        self.builder(&self.store_dir()).create().unwrap()
    }

    /// Appends, one millisecond later than the previous append, and adds the data to the expected
    /// records.
    fn put(&mut self, logstore: &Logstore, shard: u32, what: What<'_>, durability: Durability) {
        let record = self.put_unseen(logstore, shard, what, durability);
        let shards = self
            .expected
            .as_object_mut()
            .unwrap()
            .entry(logstore.name().to_string())
            .or_insert_with(|| json!({}));
        let records =
            shards.as_object_mut().unwrap().entry(shard.to_string()).or_insert_with(|| json!([]));
        records.as_array_mut().unwrap().push(record);
    }

    /// Like [`Maker::put`], but the caller decides whether a reader finds the data.
    fn put_unseen(
        &self,
        logstore: &Logstore,
        shard: u32,
        what: What<'_>,
        durability: Durability,
    ) -> Value {
        self.clock.advance(millis(1));
        let (kind, bytes) = match what {
            What::Opaque(text) => ("opaque", text.as_bytes().to_vec()),
            What::Group(text, logs) => ("groups", group(text, logs).encode_to_bytes().to_vec()),
        };
        let payload = match what {
            What::Opaque(_) => Payload::opaque(bytes.clone()).unwrap(),
            What::Group(..) => Payload::encoded(bytes.clone()).unwrap(),
        };
        let options =
            AppendOptions::default().shard(ShardChoice::Shard(shard)).durability(durability);
        let appended = logstore.append(payload, &options).unwrap();
        json!({ "seq": appended.seq, "receive_time_us": self.clock.wall_us(), "kind": kind, "hex": hex(&bytes) })
    }

    /// Writes a mark block in every shard that has synced but unmarked data.
    fn idle(&self, store: &Store) {
        self.clock.advance(secs(2));
        store.tick();
    }

    /// Service key, AES: two shards, groups and opaque records, blocks of several groups, a mark,
    /// two data-key versions, several segments, all sealed.
    fn service_aes(&mut self) {
        let store = self.create();
        let conf = EncryptConf::service_key(EncryptType::Aes);
        let logstore = store.create_logstore(&name("shop/orders"), spec(Some(conf), 2)).unwrap();
        self.put(&logstore, 0, What::Group("paid", 2), Durability::Buffered);
        self.put(&logstore, 0, What::Group("sent", 1), Durability::Synced);
        self.put(&logstore, 1, What::Group("returned", 1), Durability::Synced);
        self.idle(&store);
        self.put(&logstore, 0, What::Opaque("an opaque record"), Durability::Buffered);
        self.put(&logstore, 0, What::Opaque(""), Durability::Synced);
        logstore.roll().unwrap();
        self.put(&logstore, 0, What::Group("the second segment", 1), Durability::Synced);
        store.keys().rotate_data_key(logstore.name()).unwrap();
        self.put(&logstore, 0, What::Group("the second data key", 1), Durability::Synced);
        self.put(&logstore, 1, What::Opaque("the second data key"), Durability::Written);
        store.close().unwrap();
    }

    /// Service key rotated once, SM4, and a checkpoint next to the store.
    fn service_sm4(&mut self) {
        let store = self.create();
        let conf = EncryptConf::service_key(EncryptType::Sm4);
        let logstore = store.create_logstore(&name("shop/orders"), spec(Some(conf), 1)).unwrap();
        self.put(&logstore, 0, What::Group("paid", 2), Durability::Buffered);
        self.put(&logstore, 0, What::Group("sent", 1), Durability::Synced);
        store.keys().rotate_service_key().unwrap();
        self.put(&logstore, 0, What::Opaque("an opaque record"), Durability::Synced);
        let checkpoint = store.admin().checkpoint().unwrap();
        fs::write(self.dir.join("checkpoint"), checkpoint.to_bytes()).unwrap();
        self.put(&logstore, 0, What::Group("behind the checkpoint", 1), Durability::Synced);
        store.close().unwrap();
    }

    /// An embedded KMS with one key.
    fn kms(&self) -> (LocalKms, Cmk) {
        let kms = LocalKms::create_or_open(self.dir.join("kms")).unwrap();
        let kms = kms.with_clock(Arc::clone(&self.clock) as _);
        let kms = kms.insecure_random_for_tests(Arc::clone(&self.random) as _);
        let cmk_key_id = kms.create_key(REGION, &[ROLE]).unwrap();
        let cmk = Cmk { cmk_key_id, arn: ROLE.into(), region_id: REGION.into() };
        (kms, cmk)
    }

    /// Service keyring under a master key in the embedded KMS, rotated once, AES.
    fn sealed_keyring(&mut self) {
        let (kms, cmk) = self.kms();
        let store =
            self.builder(&self.store_dir()).kms(Arc::new(kms)).service_cmk(cmk).create().unwrap();
        let conf = EncryptConf::service_key(EncryptType::Aes);
        let logstore = store.create_logstore(&name("shop/orders"), spec(Some(conf), 1)).unwrap();
        self.put(&logstore, 0, What::Group("paid", 2), Durability::Synced);
        store.keys().rotate_service_key().unwrap();
        self.put(&logstore, 0, What::Opaque("an opaque record"), Durability::Synced);
        store.close().unwrap();
    }

    /// Customer's key in the embedded KMS, rotated once, AES.
    fn byok_aes(&mut self) {
        let (kms, cmk) = self.kms();
        let cmk_key_id = cmk.cmk_key_id.clone();
        let store = self.builder(&self.store_dir()).kms(Arc::new(kms.clone())).create().unwrap();
        let conf = EncryptConf::byok(EncryptType::Aes, cmk);
        let logstore = store.create_logstore(&name("shop/payments"), spec(Some(conf), 1)).unwrap();
        self.put(&logstore, 0, What::Group("paid", 2), Durability::Synced);
        kms.rotate(&cmk_key_id).unwrap();
        store.keys().rotate_data_key(logstore.name()).unwrap();
        self.put(
            &logstore,
            0,
            What::Opaque("under the second version of both keys"),
            Durability::Synced,
        );
        store.close().unwrap();
    }

    /// Never encrypted: authenticated under the service keyring.
    fn plain(&mut self) {
        let store = self.create();
        let logstore = store.create_logstore(&name("shop/clicks"), spec(None, 1)).unwrap();
        self.put(&logstore, 0, What::Group("clicked", 2), Durability::Synced);
        self.put(&logstore, 0, What::Opaque("an opaque record"), Durability::Synced);
        store.close().unwrap();
    }

    /// Encrypted first, then switched off: authenticated under the data key.
    fn switched_off(&mut self) {
        let store = self.create();
        let conf = EncryptConf::service_key(EncryptType::Sm4);
        let logstore =
            store.create_logstore(&name("shop/orders"), spec(Some(conf.clone()), 1)).unwrap();
        self.put(&logstore, 0, What::Group("encrypted", 1), Durability::Synced);
        let mut config = store.logstore(logstore.name()).unwrap().config();
        config.encrypt_conf = Some(EncryptConf { enable: false, ..conf });
        store.update_logstore(logstore.name(), config).unwrap();
        self.put(&logstore, 0, What::Group("authenticated only", 1), Durability::Synced);
        store.close().unwrap();
    }

    /// Creates a store that crashes: one block below the durable mark, one above it, and a torn
    /// one.
    fn crash(&mut self) {
        let work = self.dir.join("work");
        let store = self.builder(&work).create().unwrap();
        let conf = EncryptConf::service_key(EncryptType::Aes);
        let logstore = store.create_logstore(&name("shop/orders"), spec(Some(conf), 1)).unwrap();
        self.put(&logstore, 0, What::Group("sealed", 1), Durability::Synced);
        logstore.roll().unwrap();
        self.put(&logstore, 0, What::Group("durable", 1), Durability::Synced);
        self.put(&logstore, 0, What::Group("above the mark", 1), Durability::Written);
        self.put_unseen(&logstore, 0, What::Group("torn", 1), Durability::Written);
        copy_dir(&work, &self.store_dir());
        store.close().unwrap();
        fs::remove_dir_all(work).unwrap();

        let logstore_dir = self.store_dir().join("logstores").join(logstore.id().to_string());
        let torn = segments(&logstore_dir, 0).pop().unwrap();
        let bytes = fs::read(&torn).unwrap();
        fs::write(&torn, &bytes[..bytes.len() - 25]).unwrap();
        // Use a fixed number for the crashed process, which differs in every run.
        fs::write(self.store_dir().join("LOCK"), "4242\n").unwrap();
    }

    /// The store as the crash leaves it.
    fn unclean(&mut self) {
        self.crash();
    }

    /// The same store after a recovery and further appends.
    fn recovered(&mut self) {
        self.crash();
        let store = self.builder(&self.store_dir()).open().unwrap();
        let logstore = store.logstore(&name("shop/orders")).unwrap();
        self.put(&logstore, 0, What::Group("after the crash", 1), Durability::Synced);
        store.close().unwrap();
    }

    /// A shard that was split, and its children, which were merged.
    fn resharded(&mut self) {
        let store = self.create();
        let conf = EncryptConf::service_key(EncryptType::Aes);
        let logstore = store.create_logstore(&name("shop/orders"), spec(Some(conf), 1)).unwrap();
        self.put(&logstore, 0, What::Group("before the split", 1), Durability::Synced);
        store.split_shard(logstore.name(), 0, Some(0x40 << 120)).unwrap();
        self.put(&logstore, 1, What::Group("a low key", 1), Durability::Synced);
        self.put(&logstore, 2, What::Group("a high key", 1), Durability::Synced);
        store.keys().rotate_data_key(logstore.name()).unwrap();
        self.put(&logstore, 2, What::Opaque("the second data key"), Durability::Synced);
        store.merge_shards(logstore.name(), 1).unwrap();
        self.put(&logstore, 3, What::Group("after the merge", 1), Durability::Synced);
        store.close().unwrap();
    }

    /// Blocks that lz4 and zstd compress.
    fn compressed(&mut self) {
        let store = self.create();
        for (text, compression) in
            [("shop/lz4", Compression::Lz4), ("shop/zstd", Compression::Zstd)]
        {
            let conf = EncryptConf::service_key(EncryptType::Aes);
            let spec = spec(Some(conf), 1).compression(compression);
            let logstore = store.create_logstore(&name(text), spec).unwrap();
            self.put(&logstore, 0, What::Group("again and again", 20), Durability::Synced);
            self.put(&logstore, 0, What::Opaque("short"), Durability::Synced);
            logstore.roll().unwrap();
        }
        store.close().unwrap();
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
