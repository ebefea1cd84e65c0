//! No secret leaves the process: no log, no key and no name in a log appears in a file, error,
//! `Debug` or JSON output.
//!
//! The test puts canaries into every part of a log group, and records every key that is drawn or
//! wrapped. It searches for them in every single write to the disk, temporary files included, in
//! file names, in the directory of the KMS, and in the output of the public types. The same search
//! finds the canaries in a Logstore without encryption, which shows that it works.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/traced.rs"]
mod traced;

use std::{collections::BTreeSet, fmt::Debug, sync::Arc};

use bytes::Bytes;
use common::{memory::MemoryDisk, *};
use envelog::{
    Cmk, Compression, EncryptConf, EncryptType, Error, LogGroup, Logstore, LogstoreSpec, Payload,
    ReadOptions, Store, StoreBuilder,
    admin::{ReplaceCmk, VerifyOptions},
    crypto::{AwsLc, HashAlg, SecretKey, derive},
    group::{Content, Log, LogTag},
    inspect::{BlockHeader, SegmentHeader},
    io::{OsRandom, Random},
    kms::RevokedReason,
};
use memchr::memmem;
use traced::Traced;

/// The length of a piece of a secret that the search detects: a partial leak is a leak too.
const PIECE: usize = 12;

/// A unique text of letters and digits that does not compress.
fn canary() -> String {
    let mut random = [0; 36];
    OsRandom.fill(&mut random).unwrap();
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";
    random.iter().map(|byte| char::from(letters[usize::from(*byte) % letters.len()])).collect()
}

/// The secrets to search for, each with a name.
#[derive(Default)]
struct Secrets(Vec<(String, Vec<u8>)>);

impl Secrets {
    /// Adds a text, in pieces: compression may have split it.
    fn text(&mut self, what: &str, text: &str) {
        self.0.extend(
            text.as_bytes().chunks_exact(PIECE).map(|piece| (what.to_owned(), piece.to_vec())),
        );
    }

    /// Adds a key, in pieces, in each usual encoding.
    fn key(&mut self, what: &str, key: &[u8; 32]) {
        for piece in key.chunks_exact(16) {
            let hex: String = piece.iter().map(|byte| format!("{byte:02x}")).collect();
            let list = format!("{piece:?}");
            for form in [
                piece.to_vec(),
                hex.to_uppercase().into(),
                hex.into(),
                list.trim_matches(['[', ']']).into(),
            ] {
                self.0.push((what.to_owned(), form));
            }
        }
        for shift in 0..3 {
            self.0.push((what.to_owned(), base64(&key[shift..shift + 27]).into()));
        }
    }

    /// The names of the secrets found in `bytes`.
    fn found_in(&self, bytes: &[u8]) -> BTreeSet<&str> {
        self.0
            .iter()
            .filter(|(_, piece)| memmem::find(bytes, piece).is_some())
            .map(|(what, _)| &**what)
            .collect()
    }

    #[track_caller]
    fn assert_none_in(&self, place: &str, bytes: &[u8]) {
        assert_eq!(self.found_in(bytes), BTreeSet::new(), "in {place}");
    }
}

/// Takes whole groups of three bytes, so without padding.
fn base64(bytes: &[u8]) -> String {
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |three: &[u8]| {
        let bits = three.iter().fold(0usize, |bits, byte| bits << 8 | usize::from(*byte));
        [18, 12, 6, 0].map(|shift| char::from(letters[bits >> shift & 63]))
    };
    bytes.chunks_exact(3).flat_map(group).collect()
}

/// A log group with a canary in each of its parts, and enough repetition for lz4 to compress it.
fn marked_group(secrets: &mut Secrets) -> LogGroup {
    let mut mark = |what: &str| {
        let text = canary();
        secrets.text(what, &text);
        text
    };
    let (topic, source) = (mark("topic"), mark("source"));
    let tag = LogTag::new(mark("name of a tag"), mark("value of a tag"));
    let mut contents = vec![Content::new(mark("name of a field"), mark("value of a field"))];
    contents.extend(
        (0..40).map(|_| Content::new("filler", "the same, and the same, and the same again")),
    );
    LogGroup {
        logs: vec![Log { time: 1_700_000_000, contents, time_ns: None }],
        topic: Some(Bytes::from(topic)),
        source: Some(Bytes::from(source)),
        log_tags: vec![tag],
        ..LogGroup::default()
    }
}

/// A store on a disk that records every write, with a random source that records every draw.
struct Watched {
    world: World,
    disk: Arc<MemoryDisk>,
    random: Arc<RecordingRandom>,
    secrets: Secrets,
    /// The recorded outputs, each with its source.
    said: Vec<(String, String)>,
}

impl Watched {
    fn new() -> Self {
        let (disk, random) = (MemoryDisk::recording(), Arc::default());
        Self { world: World::manual(), disk, random, secrets: Secrets::default(), said: Vec::new() }
    }

    fn builder(&self) -> StoreBuilder {
        Store::builder(self.world.store_dir(), self.world.keyring(), AwsLc::new())
            .kms(Arc::clone(&self.world.kms) as _)
            .disk(Arc::clone(&self.disk) as _)
            .clock(Arc::clone(&self.world.clock) as _)
            .insecure_random_for_tests(Arc::clone(&self.random) as _)
            .options(self.world.options)
    }

    fn logstore(
        &self,
        store: &Store,
        text: &str,
        compression: Compression,
        conf: Option<EncryptConf>,
    ) -> Logstore {
        let spec = LogstoreSpec::default().compression(compression).encrypt_conf(conf);
        store.create_logstore(&name(text), spec).unwrap()
    }

    fn says(&mut self, thing: &(impl Debug + ?Sized)) {
        self.said.push((format!("{:.40}", format!("{thing:?}")), format!("{thing:?} {thing:#?}")));
    }

    /// Records an error and all of its representations.
    fn refuses<T: Debug>(&mut self, result: Result<T, Error>) {
        let error = result.unwrap_err();
        self.said.push((error.code().to_owned(), format!("{error} {error:?} {error:#?}")));
    }

    fn json(&mut self, thing: &impl serde::Serialize) {
        let json = serde_json::to_string(thing).unwrap();
        self.said.push((format!("{json:.40}"), json));
    }

    /// Searches all outputs. The root keys may appear only in the keyring, and the keyring may
    /// contain no other secret.
    fn assert_nothing_leaked(&self, roots: &Secrets) {
        let mut places = 0;
        let image = self.disk.image();
        let writes = self.disk.writes().into_iter().map(|written| (written.path, written.bytes));
        for (path, bytes) in writes.chain(image.files).chain(files(&self.world.path().join("kms")))
        {
            let place = path.display().to_string();
            self.secrets.assert_none_in(&place, &bytes);
            self.secrets.assert_none_in("the name of a file", place.as_bytes());
            if path.file_stem() != Some("keyring".as_ref()) {
                roots.assert_none_in(&place, &bytes);
            }
            places += 1;
        }
        assert!(places > 50, "the whole life of a store was looked through: {places} places");
        assert!(self.said.len() > 30, "everything has said something: {}", self.said.len());
        for (what, said) in &self.said {
            self.secrets.assert_none_in(what, said.as_bytes());
            roots.assert_none_in(what, said.as_bytes());
        }
    }

    /// Records the output of all getters of a store and a Logstore.
    fn ask(&mut self, store: &Store, logstore: &Logstore) {
        self.says(store);
        self.says(store.options());
        // Exclude the test doubles, which remember everything.
        self.says(
            &Store::builder(self.world.store_dir(), self.world.keyring(), AwsLc::new())
                .options(self.world.options),
        );
        self.says(logstore);
        self.says(&logstore.config());
        self.json(&logstore.config());
        self.says(&logstore.status().unwrap());
        self.json(&logstore.status().unwrap());
        self.says(&logstore.key_status());
        self.says(&store.metrics());
        self.json(&store.metrics());
        self.says(&store.keys().usage().unwrap());
        self.json(&store.keys().usage().unwrap());
        let export = store.keys().export_audit().unwrap();
        self.says(&export);
        self.said.push(("an export of the audit log".to_owned(), export.text));
        self.says(&store.keys().verify_audit(None).unwrap());
        for record in store.keys().audit_records().unwrap() {
            self.says(&record);
            self.json(&record);
        }
        let mut reader = logstore.read(0, &ReadOptions::default()).unwrap();
        assert!(reader.next().unwrap().is_ok());
        self.says(&reader);
        let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
        assert!(report.is_clean(), "{report:?}");
        self.says(&report);
        self.json(&report);
    }
}

/// The compression of every block of a Logstore.
fn compressions(watched: &Watched, logstore: &Logstore) -> Vec<Compression> {
    let dir = watched.world.logstore_dir(logstore);
    let image = watched.disk.image();
    let segments = image.files.iter().filter(|(path, _)| {
        path.starts_with(&dir) && path.extension().is_some_and(|ext| ext == "seg")
    });
    let mut found = Vec::new();
    for (_, bytes) in segments {
        let mut at = SegmentHeader::decode(bytes).unwrap().body_start as usize;
        while let Ok(block) = BlockHeader::decode(&bytes[at..]) {
            found.push(block.compression);
            at += block.block_len() as usize;
        }
    }
    found
}

/// Whether `key` is the data key whose fingerprint is in the metadata of a Logstore.
fn is_data_key(watched: &Watched, logstore: &Logstore, key: &[u8; 32]) -> bool {
    let derived = derive(
        HashAlg::Sha256,
        &[],
        &SecretKey::from_bytes(&mut key.clone()),
        &[b"envelog v2 fingerprint"],
    );
    let fingerprint: String =
        derived.expose()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    let image = watched.disk.image();
    let path =
        newest_meta(&watched.world.logstore_dir(logstore), image.files.keys().cloned()).unwrap();
    let meta = image.files[&path].clone();
    memmem::find(&meta, fingerprint.as_bytes()).is_some()
}

#[test]
fn the_search_finds_what_is_not_encrypted() {
    for compression in [Compression::None, Compression::Lz4] {
        let mut watched = Watched::new();
        let store = watched.builder().create().unwrap();
        let logstore = watched.logstore(&store, "app/plain", compression, None);
        let group = marked_group(&mut watched.secrets);
        logstore.append(&group, &synced()).unwrap();
        assert_eq!(compressions(&watched, &logstore), [compression]);
        store.close().unwrap();
        let all = BTreeSet::from([
            "topic",
            "source",
            "name of a tag",
            "value of a tag",
            "name of a field",
            "value of a field",
        ]);
        let in_writes: BTreeSet<&str> = watched
            .disk
            .writes()
            .iter()
            .flat_map(|written| watched.secrets.found_in(&written.bytes))
            .collect();
        assert_eq!(in_writes, all, "{compression:?}");
        let image = watched.disk.image();
        let in_files: BTreeSet<&str> =
            image.files.values().flat_map(|bytes| watched.secrets.found_in(bytes)).collect();
        assert_eq!(in_files, all, "{compression:?}");
        // The search also finds a key in each of its encodings.
        let mut keys = Secrets::default();
        keys.key("key", &std::array::from_fn(|n| (n * 7 + 129) as u8));
        for (_, form) in &keys.0 {
            assert_eq!(
                keys.found_in(&[b"before", &form[..], b"behind"].concat()),
                BTreeSet::from(["key"])
            );
        }
    }
}

/// The whole life of a store: appends of every kind, every key operation, refusals, damage and a
/// restart. Also searches all log events at every level.
#[test]
fn nothing_secret_is_written_or_said() {
    let traced = Traced::default();
    traced.while_running(|| whole_life(&traced));
}

fn whole_life(traced: &Traced) {
    let mut watched = Watched::new();
    let mut roots = Secrets::default();
    let store = watched.builder().create().unwrap();
    let root = watched.random.draws()[0];
    roots.key("root of the service keyring", &root);
    let keyring = watched.disk.image().files[&watched.world.keyring()].clone();
    assert!(
        !roots.found_in(&keyring).is_empty(),
        "the first draw is the root: it is in the keyring, and is found there"
    );

    // Collect the keys. A data key under the service key is drawn just before the salt of its
    // envelope; the KMS sees the others.
    let before = watched.random.draws().len();
    let service = EncryptConf::service_key(EncryptType::Aes);
    let aes = watched.logstore(&store, "app/aes", Compression::Lz4, Some(service));
    let data_key = watched.random.draws()[before];
    assert!(is_data_key(&watched, &aes, &data_key));
    watched.secrets.key("data key under the service key", &data_key);
    let cmk = watched.world.cmk();
    let byok = EncryptConf::byok(EncryptType::Sm4, cmk.clone());
    let sm4 = watched.logstore(&store, "app/sm4", Compression::None, Some(byok));

    let mut group = marked_group(&mut watched.secrets);
    for logstore in [&aes, &sm4] {
        for options in [synced(), written(), buffered()] {
            logstore.append(&group, &options).unwrap();
        }
        let opaque = canary();
        watched.secrets.text("opaque record", &opaque);
        logstore.append(record(&opaque), &synced()).unwrap();
        let ticket = logstore.submit(&group, &synced()).unwrap();
        watched.says(&ticket);
        ticket.wait().unwrap();
    }
    assert!(
        compressions(&watched, &aes).contains(&Compression::Lz4),
        "it was compressed before it was encrypted"
    );
    for logstore in [&aes, &sm4] {
        watched.ask(&store, logstore);
    }

    // Rotate and replace keys.
    let before = watched.random.draws().len();
    store.keys().rotate_data_key(aes.name()).unwrap();
    let rotated = watched.random.draws()[before];
    assert!(is_data_key(&watched, &aes, &rotated));
    watched.secrets.key("second data key under the service key", &rotated);
    store.keys().rotate_data_key(sm4.name()).unwrap();
    let before = watched.random.draws().len();
    store.keys().rotate_service_key().unwrap();
    roots.key("second root of the service keyring", &watched.random.draws()[before]);
    for logstore in [&aes, &sm4] {
        logstore.append(&group, &synced()).unwrap();
        store.keys().rewrap(logstore.name()).unwrap();
    }
    let new: Cmk = watched.world.cmk();
    store.keys().replace_cmk(sm4.name(), new.clone(), ReplaceCmk::default()).unwrap();
    store.keys().shred_data_keys(sm4.name(), &[2]).unwrap();
    let checkpoint = store.admin().checkpoint().unwrap();
    watched.says(&checkpoint);
    watched.secrets.assert_none_in("a checkpoint", checkpoint.to_bytes());
    roots.assert_none_in("a checkpoint", checkpoint.to_bytes());

    // A refusal states its reason but not the data.
    let text = canary();
    watched.secrets.text("refused payload", &text);
    watched.refuses(Payload::encoded(text.clone()));
    watched.refuses(LogGroup::decode(text.as_bytes()).map_err(Error::from));
    group.logs.clear();
    watched.refuses(aes.append(&group, &synced()));
    watched.refuses(aes.append(record(&text), &synced().shard(envelog::ShardChoice::Shard(9))));
    let opaque = records(&aes, 0).unwrap().into_iter().find_map(|record| record.group().err());
    watched.refuses(Err::<(), _>(opaque.unwrap()));
    watched.world.local().disable(&new.cmk_key_id).unwrap();
    watched.refuses(sm4.revalidate_now());
    watched.refuses(sm4.append(record(&text), &synced()));
    watched.refuses(sm4.read(0, &ReadOptions::default()));
    assert_revoked(sm4.sync().and_then(|()| records(&sm4, 0)), RevokedReason::Disabled);
    watched.says(&sm4.key_status());
    watched.world.local().enable(&new.cmk_key_id).unwrap();
    sm4.revalidate_now().unwrap();
    sm4.append(record(&text), &synced()).unwrap();
    store.close().unwrap();

    // A restart, and damage in a block that is read.
    let store = watched.builder().open().unwrap();
    let aes = store.logstore(aes.name()).unwrap();
    watched.ask(&store, &aes);
    let dir = watched.world.logstore_dir(&aes);
    let image = watched.disk.image();
    let (path, bytes) = image
        .files
        .iter()
        .find(|(path, _)| {
            path.starts_with(&dir) && path.extension().is_some_and(|ext| ext == "seg")
        })
        .unwrap();
    let at = SegmentHeader::decode(bytes).unwrap().body_start as usize;
    let block = at..at + BlockHeader::decode(&bytes[at..]).unwrap().block_len() as usize;
    for whole in [false, true] {
        let mut damaged = bytes.clone();
        damaged[at + BlockHeader::LEN] ^= 1;
        if whole {
            fix_crc(&mut damaged[block.clone()]);
        }
        watched.disk.overwrite(path, damaged);
        watched.refuses(records(&aes, 0));
        let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
        assert!(!report.is_clean());
        watched.says(&report);
        watched.json(&report);
    }
    store.close().unwrap();

    for key in watched.world.kms.wrapped_keys() {
        watched.secrets.key("key that passed by the KMS", &key);
    }
    assert!(
        watched.world.kms.wrapped_keys().len() >= 5,
        "two probes, and each data key at least once"
    );
    watched.says(&SecretKey::from_bytes(&mut data_key.clone()));
    let text = traced.text();
    for said in [
        "store opened",
        "KMS call succeeded",
        "audit record written",
        "master key refused",
        "segment sealed",
    ] {
        assert!(text.contains(said), "{said}: everything was traced: {text}");
    }
    watched.said.push(("what is traced".to_owned(), text));
    watched.assert_nothing_leaked(&roots);
}

// ---- core dumps ----

/// Set for the child process of the test below, which runs the same program: the path of its store.
#[cfg(target_os = "linux")]
const CHILD: &str = "ENVELOG_CANARY_CHILD";

/// A process with an open store and keys in use, until the parent tells it to abort.
#[cfg(target_os = "linux")]
fn hold_keys(dir: &std::path::Path) -> ! {
    use std::io::Write;

    use envelog::kms::LocalKms;
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let most = getrlimit(Resource::Core).maximum;
    setrlimit(Resource::Core, Rlimit { current: most, maximum: most }).unwrap();
    std::env::set_current_dir(dir.join("cores")).unwrap();
    let store = Store::builder(dir.join("store"), dir.join("keyring"), AwsLc::new())
        .kms(Arc::new(LocalKms::at(dir.join("kms"))))
        .open()
        .unwrap();
    let logstores: Vec<_> =
        store.list().unwrap().iter().map(|name| store.logstore(name).unwrap()).collect();
    for logstore in &logstores {
        put(logstore, "one more");
        assert_eq!(texts(logstore).len(), 2);
    }
    println!("ready {}", most.is_none_or(|most| most > 1 << 30));
    std::io::stdout().flush().unwrap();
    std::io::stdin().read_line(&mut String::new()).unwrap();
    std::process::abort()
}

/// The keys of a process are in its memory, but in no part that a core dump includes, and in no
/// dump.
#[cfg(target_os = "linux")]
#[test]
fn no_key_is_in_a_core_dump() {
    use std::{
        fs,
        io::{BufRead, BufReader, Write},
        process::{Command, Stdio},
    };

    if let Some(dir) = std::env::var_os(CHILD) {
        hold_keys(dir.as_ref());
    }
    let world = World::manual();
    let random = Arc::new(RecordingRandom::default());
    let store =
        world.builder().insecure_random_for_tests(Arc::clone(&random) as _).create().unwrap();
    let mut keys = Secrets::default();
    keys.key("root of the service keyring", &random.draws()[0]);
    let before = random.draws().len();
    put(&world.service(&store, "p/service"), "one");
    keys.key("data key under the service key", &random.draws()[before]);
    put(&world.byok(&store, "p/byok", &world.cmk()), "one");
    store.close().unwrap();
    for key in world.kms.wrapped_keys() {
        keys.key("key that passed by the KMS", &key);
    }
    let cores = world.path().join("cores");
    fs::create_dir(&cores).unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "no_key_is_in_a_core_dump", "--nocapture", "--test-threads", "1"])
        .env(CHILD, world.path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    let ready = lines.find_map(|line| Some(line.split_once("ready ")?.1.to_owned())).unwrap();

    let (mut dumped, mut kept_out) = (Vec::new(), Vec::new());
    common::process::each_region(child.id(), |is_dumped, bytes| {
        let place = if is_dumped { &mut dumped } else { &mut kept_out };
        place.push(bytes.to_vec());
    });
    let held: BTreeSet<&str> = kept_out.iter().flat_map(|bytes| keys.found_in(bytes)).collect();
    assert_eq!(held.len(), 3, "the search finds the keys where they are kept: {held:?}");
    assert!(
        dumped.iter().map(Vec::len).sum::<usize>() > 1 << 20,
        "the rest of the memory was looked through"
    );
    for bytes in &dumped {
        keys.assert_none_in("memory that would be dumped", bytes);
    }

    child.stdin.take().unwrap().write_all(b"\n").unwrap();
    assert!(!child.wait().unwrap().success());
    let cores: Vec<_> = files(&cores).into_iter().collect();
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    // With other settings, the system pipes the dump to a program, stores it where only the
    // administrator can read it, or writes none.
    if ready == "true" && pattern.trim() == "core" {
        assert_eq!(cores.len(), 1, "a core dump was written");
    }
    for (path, bytes) in cores {
        assert!(bytes.starts_with(b"\x7fELF"));
        keys.assert_none_in(&path.display().to_string(), &bytes);
    }
}
