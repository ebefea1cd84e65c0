//! The format: compares the worked examples of `docs/format.md` with the code, and the golden
//! stores of every kind with this build.
//!
//! Earlier builds of this format version wrote the golden stores in `tests/golden/v2`. `cargo run
//! --example golden -- DIR` generates them again. Replace them only together with a deliberate
//! change of the format.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/golden.rs"]
mod golden;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use envelog::{
    Background, Compression, Error, LogGroup, Payload, Record, ShardChoice, Store, StoreBuilder,
    StoreOptions,
    admin::{Checkpoint, ShardStatus, VerifyOptions, VerifyReport},
    crypto::{
        AwsLc, Cipher, CryptoProvider, HashAlg, RustCrypto, SecretKey, SegmentCipher, Suite, hash,
        hkdf, hmac_sha256,
    },
    group,
    inspect::{
        BlockHeader, BlockKind, DecodedHeader, Extension, FORMAT_VERSION, Features, Footer,
        IndexEntry, KeySource, Predecessor, SegmentHeader,
    },
    kms::{EncryptionContext, Kms, KmsCall, LocalKms},
};
use hmac::{Hmac, KeyInit, Mac};
use serde_json::{Value, json};
use tempfile::TempDir;

use common::{
    QuickDisk, catalogue, copy_dir, files, fix_crc, group as log_group, meta_path, name, record,
    records, secs, segments, synced,
};

const DOCUMENT: &str = include_str!("../docs/format.md");

fn golden_dir(which: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v2").join(which)
}

fn unhex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "odd number of digits in {text}");
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

// ---- the examples of the document ----

/// The lines of the only fenced block of the document with this info string.
fn fenced(info: &str) -> Vec<&'static str> {
    let mut blocks =
        DOCUMENT.split("\n```").skip(1).step_by(2).filter_map(|block| block.split_once('\n'));
    let (_, body) =
        blocks.find(|(found, _)| *found == info).unwrap_or_else(|| panic!("no block {info:?}"));
    assert!(blocks.all(|(found, _)| found != info), "two blocks {info:?}");
    body.lines().collect()
}

/// The bytes of a block of hexadecimal digits. Each line may end with a remark.
fn example(which: &str) -> Vec<u8> {
    let lines = fenced(&format!("hex {which}"));
    lines
        .iter()
        .flat_map(|line| unhex(line.split_once("  ").map_or(*line, |(digits, _)| digits)))
        .collect()
}

/// Checks that an example of the document has these bytes. On a mismatch, prints the correct
/// example.
#[track_caller]
fn check_hex(which: &str, expected: &[u8]) {
    if example(which) == expected {
        return;
    }
    let (mut right, mut rest) = (String::new(), expected);
    for line in fenced(&format!("hex {which}")) {
        let (digits, remark) = line.split_once("  ").unwrap_or((line, ""));
        let (bytes, behind) = rest.split_at(rest.len().min(digits.len() / 2));
        right += format!("{}  {remark}", golden::hex(bytes)).trim_end();
        right.push('\n');
        rest = behind;
    }
    rest.chunks(32).for_each(|bytes| right += &format!("{}\n", golden::hex(bytes)));
    panic!("the example is to be:\n```hex {which}\n{right}```");
}

/// Checks that an example of the document has this JSON, which the document splits into lines.
#[track_caller]
fn check_json(which: &str, expected: &[u8]) {
    assert_eq!(
        fenced(&format!("json {which}")).concat(),
        str::from_utf8(expected).unwrap(),
        "{which}"
    );
}

/// Named values of an example.
struct Values(BTreeMap<&'static str, Vec<u8>>);

impl Values {
    fn of(which: &str) -> Self {
        let pairs = fenced(&format!("values {which}"))
            .into_iter()
            .map(|line| line.split_once(" = ").unwrap());
        Self(pairs.map(|(name, digits)| (name, unhex(digits))).collect())
    }

    fn get(&self, name: &str) -> &[u8] {
        &self.0[name]
    }

    /// Checks a value of the document.
    #[track_caller]
    fn check(&self, name: &str, expected: impl AsRef<[u8]>) {
        assert_eq!(golden::hex(self.get(name)), golden::hex(expected.as_ref()), "{name}");
    }
}

fn expand(alg: HashAlg, salt: &[u8], key: &SecretKey, info: &[&[u8]], len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    hkdf(alg, salt, key.expose(), info, &mut out);
    out
}

fn derived(root: &SecretKey, salt: &[u8], label: &str) -> SecretKey {
    SecretKey::from_bytes(
        &mut expand(HashAlg::Sha256, salt, root, &[label.as_bytes()], 32).try_into().unwrap(),
    )
}

/// HKDF-Extract, computed with only the hash function.
fn extract(alg: HashAlg, salt: &[u8], key: &SecretKey) -> Vec<u8> {
    match alg {
        HashAlg::Sha256 => Hmac::<sha2::Sha256>::new_from_slice(salt)
            .unwrap()
            .chain_update(key.expose())
            .finalize()
            .into_bytes()
            .to_vec(),
        HashAlg::Sm3 => Hmac::<sm3::Sm3>::new_from_slice(salt)
            .unwrap()
            .chain_update(key.expose())
            .finalize()
            .into_bytes()
            .to_vec(),
        other => panic!("{other} is not in this test"),
    }
}

/// A document file, parsed as the format document describes.
struct Frame {
    bytes: Vec<u8>,
}

impl Frame {
    fn read(path: &Path) -> Self {
        let bytes = fs::read(path).unwrap();
        assert_eq!(&bytes[..10], b"ENVLDOC\0\x02\0");
        Self { bytes }
    }

    fn u32(&self, at: usize) -> usize {
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().unwrap()) as usize
    }

    fn part_a(&self) -> &[u8] {
        &self.bytes[80..80 + self.u32(72)]
    }

    fn part_b(&self) -> &[u8] {
        &self.bytes[80 + self.u32(72)..][..self.u32(76)]
    }

    fn a(&self) -> Value {
        serde_json::from_slice(self.part_a()).unwrap()
    }

    fn b(&self) -> Value {
        serde_json::from_slice(self.part_b()).unwrap()
    }

    /// Tag A, tag B and CRC.
    fn end(&self) -> &[u8] {
        &self.bytes[80 + self.u32(72) + self.u32(76)..][..68]
    }

    /// Compares the examples of the format document with this file.
    #[track_caller]
    fn check_examples(&self, which: &str) {
        check_hex(&format!("{which}-frame"), &self.bytes[..80]);
        check_json(&format!("{which}-a"), self.part_a());
        check_hex(&format!("{which}-end"), self.end());
    }

    /// Recomputes tag A and CRC.
    fn sign(&mut self, root: &SecretKey) {
        let end = 80 + self.u32(72) + self.u32(76);
        let tag_b = &self.bytes[end + 32..end + 64];
        let tag =
            hmac_sha256(&derived(root, &[], "envelog v2 document"), &[&self.bytes[..end], tag_b]);
        self.bytes[end..end + 32].copy_from_slice(&tag);
        fix_crc(&mut self.bytes);
    }

    /// Turns a catalogue file into a snapshot without records: applies the changes of its records,
    /// and then `change`.
    fn fold(&mut self, root: &SecretKey, change: impl FnOnce(&mut Value)) {
        let (mut body, number) = catalogue::folded(&self.bytes);
        change(&mut body);
        let body = body.to_string();
        let mut document = self.bytes[..80].to_vec();
        document[56..64].copy_from_slice(&number.to_le_bytes());
        document[72..76].copy_from_slice(&(body.len() as u32).to_le_bytes());
        document.extend_from_slice(body.as_bytes());
        document.extend_from_slice(&[0; 68]);
        self.bytes = document;
        self.sign(root);
        self.bytes = catalogue::snapshot(&self.bytes, &derived(root, &[], "envelog v2 document"));
    }
}

/// The root key of a keyring version.
fn root(keyring: &Path, version: u64) -> SecretKey {
    let body = Frame::read(keyring).a();
    let versions = body["versions"].as_array().unwrap();
    let entry = versions.iter().find(|entry| entry["version"] == version).unwrap();
    SecretKey::from_bytes(&mut unhex(entry["root"].as_str().unwrap()).try_into().unwrap())
}

/// The directory of the only Logstore of a store.
fn only_logstore(store: &Path) -> PathBuf {
    let mut entries = fs::read_dir(store.join("logstores")).unwrap();
    let dir = entries.next().unwrap().unwrap().path();
    assert!(entries.next().is_none());
    dir
}

/// Unwraps a data key as the document describes. Compares the intermediate values with the
/// document's, if given.
fn data_key(golden: &Path, version: u64, values: Option<&Values>) -> SecretKey {
    let dir = only_logstore(&golden.join("store"));
    unwrapped(golden, &Frame::read(&meta_path(&dir)), version, values)
}

/// Like [`data_key`], for the Logstore with this metadata.
fn unwrapped(golden: &Path, meta: &Frame, version: u64, values: Option<&Values>) -> SecretKey {
    let keys = meta.b();
    let entry = keys["versions"]
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["version"] == version)
        .unwrap()
        .clone();
    let suite = if keys["encrypt_type"] == "sm4" { Suite::Sm4Gcm } else { Suite::Aes256Gcm };
    let keyring_version = entry["keyring_version"].as_u64().unwrap();
    let root = root(&golden.join("keyring"), keyring_version);
    let envelope = unhex(entry["wrapped"].as_str().unwrap());
    assert_eq!(envelope.len(), 80);
    let (salt, sealed, tag) =
        (&envelope[..32], &envelope[32..64], envelope[64..].try_into().unwrap());
    let code = suite.code().to_le_bytes();
    let wrapping = expand(
        suite.hash(),
        salt,
        &root,
        &[b"envelog v2 envelope", &code],
        suite.cipher().key_len(),
    );
    let (version, keyring_version) =
        ((version as u32).to_le_bytes(), (keyring_version as u32).to_le_bytes());
    let aad = [&meta.bytes[24..56], &version, &code, &keyring_version].concat();
    let mut key = [0; 32];
    AwsLc::new()
        .aead(suite.cipher(), &wrapping)
        .unwrap()
        .open(&[0; 12], &aad, sealed, &tag, &mut key)
        .unwrap();
    let key = SecretKey::from_bytes(&mut key);
    let fingerprint = &expand(HashAlg::Sha256, &[], &key, &[b"envelog v2 fingerprint"], 32)[..16];
    assert_eq!(golden::hex(fingerprint), entry["fingerprint"].as_str().unwrap());
    if let Some(values) = values {
        values.check("root", root.expose());
        values.check("keyring version", keyring_version);
        values.check("document key", derived(&root, &[], "envelog v2 document").expose());
        values.check("audit key", derived(&root, &[], "envelog v2 audit").expose());
        values.check(
            "integrity key",
            derived(&root, &meta.bytes[40..56], "envelog v2 integrity").expose(),
        );
        values.check("envelope", &envelope);
        values.check("wrapping key", wrapping);
        values.check("envelope associated data", aad);
        values.check("data key", key.expose());
        values.check("fingerprint", fingerprint);
    }
    key
}

/// Compares the values of an example, its first block and its footer with the segment in `file`.
fn check_example(
    which: &str,
    golden: &Path,
    file: &[u8],
    suite: Suite,
) -> (DecodedHeader, SegmentCipher) {
    let values = Values::of(which);
    let key = data_key(golden, 1, Some(&values));
    let (decoded, cipher) = check_segment(which, &values, file, suite, &key);
    assert_eq!(decoded.header.key_source, KeySource::DataKey(1));
    // Find the footer from the end of the file.
    let len =
        u32::from_le_bytes(file[file.len() - 16..file.len() - 12].try_into().unwrap()) as usize;
    let footer = Footer::decode(&file[file.len() - len..]).unwrap();
    assert_eq!(footer.footer.offset as usize, file.len() - len);
    values.check("nonce of the footer", footer.footer.nonce());
    let authenticated = footer.footer.encode();
    assert_eq!(authenticated, file[file.len() - len..][..footer.footer.authenticated_len()]);
    cipher.verify_tag_only(&footer.footer.nonce(), &authenticated, &footer.tag).unwrap();
    values.check("body", footer.footer.body);
    values.check(
        "body",
        body(&decoded, &file[decoded.body_start as usize..footer.footer.offset as usize]),
    );
    values.check("digest", footer.footer.digest(decoded.header.payload_hash, &decoded.header_hash));
    values.check("digest", digest(&decoded, footer.footer.block_count, values.get("body")));
    (decoded, cipher)
}

/// Compares the keys of an example and its first block with the segment in `file`, given its input
/// key.
fn check_segment(
    which: &str,
    values: &Values,
    file: &[u8],
    suite: Suite,
    key: &SecretKey,
) -> (DecodedHeader, SegmentCipher) {
    let decoded = SegmentHeader::decode(file).unwrap();
    assert_eq!(decoded.header.suite, suite);
    let encoded = decoded.header.encode();
    assert_eq!(encoded, file[..272]);
    assert_eq!(
        SegmentHeader::finish(encoded.clone(), &decoded.commitment),
        file[..decoded.body_start as usize]
    );
    values.check("header hash", hash(suite.hash(), &[&encoded]));
    values.check("header hash", decoded.header_hash);
    assert_eq!(decoded.segment_tag(), decoded.header_hash[..8]);

    let (salt, code) = (&decoded.header.salt, suite.code().to_le_bytes());
    values.check("PRK", extract(suite.hash(), salt, key));
    let info = |label: &'static [u8]| [label, &code, &decoded.header_hash].concat();
    let segment_key = expand(
        suite.hash(),
        salt,
        key,
        &[&info(b"envelog v2 segment seal")],
        suite.cipher().key_len(),
    );
    values.check("segment key", &segment_key);
    values.check(
        "commitment",
        expand(suite.hash(), salt, key, &[&info(b"envelog v2 segment commit")], 32),
    );
    values.check("commitment", decoded.commitment);
    let cipher =
        SegmentCipher::derive(&AwsLc::new(), suite, key, salt, &decoded.header_hash).unwrap();
    values.check("commitment", cipher.commitment());

    // Block 0, opened with the cipher directly and with the engine's interface.
    let (header, block) = first_block(&decoded, file);
    check_hex(&format!("{which}-block"), block);
    assert_eq!(header.encode(), block[..96]);
    let (covered, crc) = block.split_at(block.len() - 4);
    assert_eq!(crc, crc32fast::hash(covered).to_le_bytes());
    let (payload, tag) =
        (&covered[96..covered.len() - 16], covered[covered.len() - 16..].try_into().unwrap());
    values.check("nonce of block 0", header.nonce());
    values.check("hash of the payload of block 0", hash(HashAlg::Sha256, &[payload]));
    values.check("tag of block 0", tag);
    let (encrypted, open) = if suite.encrypts() { (payload, &[][..]) } else { (&[][..], payload) };
    let mut plain = vec![0; encrypted.len()];
    let aad = [&decoded.header_hash, &block[..96], open].concat();
    let aead = AwsLc::new().aead(suite.cipher(), &segment_key).unwrap();
    aead.open(
        values.get("nonce of block 0").try_into().unwrap(),
        &aad,
        encrypted,
        &tag,
        &mut plain,
    )
    .unwrap();
    plain.extend_from_slice(open);
    let mut again = vec![0; payload.len()];
    cipher.open_block(&header.nonce(), &block[..96], payload, &tag, &mut again).unwrap();
    assert_eq!(again, plain);
    if suite.encrypts() {
        check_hex(&format!("{which}-payload"), &plain);
    }
    let list = &plain[..header.list_len as usize];
    let groups: Vec<_> =
        group::frames(list).map(|frame| LogGroup::decode(&list[frame.unwrap()]).unwrap()).collect();
    assert_eq!(groups.len(), header.group_count as usize);
    assert_eq!(plain.len() - list.len(), 4 * groups.len());
    (decoded, cipher)
}

/// The first block of a segment.
fn first_block<'a>(header: &DecodedHeader, file: &'a [u8]) -> (BlockHeader, &'a [u8]) {
    let bytes = &file[header.body_start as usize..];
    let block = BlockHeader::decode(bytes).unwrap();
    (block, &bytes[..block.block_len() as usize])
}

/// The digest of a segment whose blocks have this body hash.
fn digest(header: &DecodedHeader, blocks: u32, body: &[u8]) -> [u8; 32] {
    hash(HashAlg::Sha256, &[&header.header_hash, &blocks.to_le_bytes(), body])
}

/// A segment that the document names. Checks that it does.
fn named_segment(golden: &Path, shard: u32, index: usize) -> Vec<u8> {
    let path = segments(&only_logstore(&golden.join("store")), shard).remove(index);
    assert_named(&path);
    fs::read(path).unwrap()
}

/// Checks that the document names a file of a golden store.
#[track_caller]
fn assert_named(path: &Path) {
    let path = path.strip_prefix(golden_dir("")).unwrap().to_str().unwrap();
    assert!(DOCUMENT.contains(&format!("`{path}`")), "{path}");
}

/// The body hash over `blocks`.
fn body(header: &DecodedHeader, mut blocks: &[u8]) -> [u8; 32] {
    assert_eq!(header.header.payload_hash, HashAlg::Sha256);
    let mut covered = Vec::new();
    while !blocks.is_empty() {
        let len = BlockHeader::decode(blocks).unwrap().block_len() as usize;
        covered.extend_from_slice(&blocks[..96]);
        covered.extend_from_slice(&hash(HashAlg::Sha256, &[&blocks[96..len - 20]]));
        covered.extend_from_slice(&blocks[len - 20..len - 4]);
        blocks = &blocks[len..];
    }
    hash(HashAlg::Sha256, &[&covered])
}

#[test]
fn the_aes_example_holds() {
    let golden = golden_dir("service-aes");
    let file = named_segment(&golden, 1, 0);
    let mut rest = &file[..];
    let parts = ["aes-header", "aes-block", "aes-mark", "aes-footer"].map(|which| {
        let (part, behind) = rest.split_at(example(which).len().min(rest.len()));
        check_hex(which, part);
        rest = behind;
        part
    });
    assert!(rest.is_empty());
    let (header, cipher) = check_example("aes", &golden, &file, Suite::Aes256Gcm);
    assert_eq!(parts[0].len() as u64, header.body_start);
    assert_eq!(header.header.predecessor, Predecessor::None);

    let mark = BlockHeader::decode(parts[2]).unwrap();
    assert_eq!((mark.kind, mark.block_len()), (BlockKind::Mark, 116));
    assert_eq!(mark.durable_mark, header.body_start + parts[1].len() as u64);
    cipher
        .open_block(
            &mark.nonce(),
            &parts[2][..96],
            &[],
            &parts[2][96..112].try_into().unwrap(),
            &mut [],
        )
        .unwrap();

    let footer = Footer::decode(parts[3]).unwrap().footer;
    let first = BlockHeader::decode(parts[1]).unwrap();
    let entry = IndexEntry {
        offset: 308,
        first_seq: first.first_seq,
        first_time_us: first.first_time_us,
        block: 0,
    };
    assert_eq!((footer.block_count, footer.group_count, &footer.index[..]), (2, 1, &[entry][..]));
}

#[test]
fn the_sm4_example_holds() {
    let golden = golden_dir("service-sm4");
    check_example("sm4", &golden, &named_segment(&golden, 0, 0), Suite::Sm4Gcm);
}

#[test]
fn the_gmac_example_holds() {
    let golden = golden_dir("plain");
    let values = Values::of("gmac");
    let root = root(&golden.join("keyring"), 1);
    let meta = Frame::read(&meta_path(&only_logstore(&golden.join("store"))));
    let key = derived(&root, &meta.bytes[40..56], "envelog v2 integrity");
    values.check("root", root.expose());
    values.check("integrity key", key.expose());
    let file = named_segment(&golden, 0, 0);
    let (decoded, _) = check_segment("gmac", &values, &file, Suite::Aes256Gmac, &key);
    assert_eq!(decoded.header.key_source, KeySource::Keyring(1));
}

#[test]
fn the_compressed_examples_hold() {
    let golden = golden_dir("compressed");
    let expected: Value =
        serde_json::from_slice(&fs::read(golden.join("expected.json")).unwrap()).unwrap();
    for (which, compression) in [("lz4", Compression::Lz4), ("zstd", Compression::Zstd)] {
        let (dir, meta) = fs::read_dir(golden.join("store/logstores"))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|dir| (dir.clone(), Frame::read(&meta_path(&dir))))
            .find(|(_, meta)| meta.a()["name"] == format!("shop/{which}"))
            .unwrap();
        let path = segments(&dir, 0).remove(0);
        assert_named(&path);
        let file = fs::read(path).unwrap();
        let decoded = SegmentHeader::decode(&file).unwrap();
        let key = unwrapped(&golden, &meta, 1, None);
        let (salt, suite) = (&decoded.header.salt, decoded.header.suite);
        let cipher =
            SegmentCipher::derive(&AwsLc::new(), suite, &key, salt, &decoded.header_hash).unwrap();
        assert_eq!(*cipher.commitment(), decoded.commitment);
        let (header, block) = first_block(&decoded, &file);
        assert_eq!((header.compression, header.raw_len), (compression, 1104));
        let (payload, tag) = (
            &block[96..block.len() - 20],
            block[block.len() - 20..block.len() - 4].try_into().unwrap(),
        );
        let mut stored = vec![0; payload.len()];
        cipher.open_block(&header.nonce(), &block[..96], payload, &tag, &mut stored).unwrap();
        check_hex(&format!("{which}-stored"), &stored);
        // The uncompressed payload is the only record, framed, with its time.
        let group = unhex(expected[format!("shop/{which}")]["0"][0]["hex"].as_str().unwrap());
        let len = group.len() as u16;
        let raw = [&[0x0a, len as u8 | 0x80, (len >> 7) as u8][..], &group, &[0; 4]].concat();
        assert_eq!(raw.len(), 1104);
        if compression == Compression::Zstd {
            assert_eq!(stored[..7], [0x28, 0xb5, 0x2f, 0xfd, 0x60, 0x50, 0x03]);
            continue;
        }
        check_hex("lz4-block", block);
        let values = Values::of("lz4");
        let info =
            [b"envelog v2 segment seal", &suite.code().to_le_bytes()[..], &decoded.header_hash]
                .concat();
        values.check("data key", key.expose());
        values.check("header hash", decoded.header_hash);
        values.check("segment key", expand(suite.hash(), salt, &key, &[&info], 32));
        values.check("nonce of block 0", header.nonce());
        values.check("SHA-256 of the payload before compression", hash(HashAlg::Sha256, &[&raw]));
    }
}

/// The rows of a table of the document.
fn assert_rows(context: &EncryptionContext) {
    let rows: Vec<_> =
        context.iter().map(|(name, value)| format!("| `{name}` | `{value}` |")).collect();
    let rows = rows.join("\n");
    assert!(DOCUMENT.contains(&rows), "{rows}");
}

fn context<const N: usize>(pairs: [(&str, String); N]) -> EncryptionContext {
    pairs.map(|(name, value)| (name.to_owned(), value)).into()
}

/// Unwraps a key that the embedded KMS wrapped, both as the document describes and with the KMS.
fn locally_unwrapped(
    golden: &Path,
    cmk: &Value,
    context: &EncryptionContext,
    wrapped: &[u8],
    values: &Values,
) -> SecretKey {
    assert_rows(context);
    values.check("wrapped", wrapped);
    let cmk = serde_json::from_value(cmk.clone()).unwrap();
    let call = KmsCall { cmk: &cmk, context, timeout: secs(1) };
    LocalKms::open(golden.join("kms")).unwrap().unwrap(&call, wrapped).unwrap()
}

#[test]
fn the_example_of_a_document_with_both_tags_holds() {
    let golden = golden_dir("byok-aes");
    let path = meta_path(&only_logstore(&golden.join("store")));
    assert_named(&path);
    let meta = Frame::read(&path);
    meta.check_examples("byok");
    check_json("byok-b", meta.part_b());

    // The envelope of the embedded KMS.
    let (keys, values) = (meta.b(), Values::of("kms"));
    let entry = &keys["versions"][1];
    assert_eq!((&entry["version"], &keys["current"]), (&json!(2), &json!(2)));
    let context = context([
        ("envelog:key-version", "2".to_owned()),
        ("envelog:logstore", golden::hex(&meta.bytes[40..56])),
        ("envelog:store", golden::hex(&meta.bytes[24..40])),
        ("envelog:suite", "AES-256-GCM".to_owned()),
    ]);
    let wrapped = unhex(entry["wrapped"].as_str().unwrap());
    let data_key = locally_unwrapped(&golden, &keys["cmk"], &context, &wrapped, &values);
    values.check("data key", data_key.expose());
    values.check(
        "fingerprint",
        &expand(HashAlg::Sha256, &[], &data_key, &[b"envelog v2 fingerprint"], 32)[..16],
    );
    values.check("fingerprint", unhex(entry["fingerprint"].as_str().unwrap()));
    let key_id = keys["cmk"]["cmk_key_id"].as_str().unwrap();
    let (head, sealed) = wrapped.split_at(12 + key_id.len());
    let file: Value =
        serde_json::from_slice(&fs::read(golden.join(format!("kms/keys/{key_id}.json"))).unwrap())
            .unwrap();
    let material = unhex(file["key"]["material"][1].as_str().unwrap());
    let mut aad = [head, &4_u32.to_le_bytes()].concat();
    for text in context.iter().flat_map(|(name, value)| [name, value]) {
        aad.extend_from_slice(&(text.len() as u32).to_le_bytes());
        aad.extend_from_slice(text.as_bytes());
    }
    let material = SecretKey::from_bytes(&mut material.try_into().unwrap());
    let wrapping =
        expand(HashAlg::Sha256, &sealed[..32], &material, &[b"envelog local kms wrap", head], 32);
    values.check("head", head);
    values.check("salt", &sealed[..32]);
    values.check("key material", material.expose());
    values.check("wrapping key", &wrapping);
    values.check("associated data", &aad);
    let mut plain = [0; 32];
    let aead = AwsLc::new().aead(Cipher::Aes256Gcm, &wrapping).unwrap();
    aead.open(&[0; 12], &aad, &sealed[32..64], sealed[64..].try_into().unwrap(), &mut plain)
        .unwrap();
    assert_eq!(plain, *data_key.expose());

    // Both tags.
    let values = Values::of("byok");
    let (tag_a, rest) = meta.end().split_at(32);
    let tag_b = &rest[..32];
    let root = root(&golden.join("keyring"), 1);
    let (document_key, metadata_key) = (
        derived(&root, &[], "envelog v2 document"),
        derived(&data_key, &[], "envelog v2 metadata"),
    );
    values.check("root", root.expose());
    values.check("document key", document_key.expose());
    values.check("data key", data_key.expose());
    values.check("metadata key", metadata_key.expose());
    values.check(
        "tag B",
        hmac_sha256(&metadata_key, &[&meta.bytes[8..12], &meta.bytes[24..56], meta.part_b()]),
    );
    values.check("tag B", tag_b);
    let signed = &meta.bytes[..meta.bytes.len() - 68];
    values.check("tag A", hmac_sha256(&document_key, &[signed, tag_b]));
    values.check("tag A", tag_a);
}

#[test]
fn the_example_of_an_audit_record_holds() {
    let golden = golden_dir("byok-aes");
    let path = golden.join("store/audit/audit-000001.log");
    assert_named(&path);
    let log = fs::read_to_string(path).unwrap();
    let lines: Vec<Vec<&str>> = log.lines().map(|line| line.split('\t').collect()).collect();
    let [json, tag, crc] = lines[1][..] else { panic!("{:?}", lines[1]) };
    check_json("audit", json.as_bytes());
    let values = Values::of("audit");
    let key = derived(&root(&golden.join("keyring"), 1), &[], "envelog v2 audit");
    values.check("audit key", key.expose());
    values.check("tag of record 1", unhex(lines[0][1]));
    values.check("tag", hmac_sha256(&key, &[lines[0][1].as_bytes(), json.as_bytes()]));
    values.check("tag", unhex(tag));
    values.check("CRC32 as it is written", unhex(crc));
    values.check(
        "CRC32 as it is written",
        crc32fast::hash(format!("{json}\t{tag}").as_bytes()).to_be_bytes(),
    );
}

#[test]
fn the_example_of_a_cut_segment_and_its_recovery_holds() {
    let golden = golden_dir("recovered");
    let [cut, recovered, successor] = [1, 2, 3].map(|index| named_segment(&golden, 0, index));
    let [cut_header, header, next_header] =
        [&cut, &recovered, &successor].map(|file| SegmentHeader::decode(file).unwrap());
    check_hex("cut-tail", &cut[703..799]);
    let torn = BlockHeader::decode(&cut[703..]).unwrap();
    assert_eq!((torn.number, 703 + torn.block_len() as usize), (2, cut.len() + 25));
    let above = BlockHeader::decode(&cut[502..]).unwrap();
    assert_eq!((above.number, above.durable_mark, 502 + above.block_len()), (1, 502, 703));

    check_hex("recovered-predecessor", &recovered[160..248]);
    let (block, bytes) = first_block(&header, &recovered);
    check_hex("recovered-block", bytes);
    let same = BlockHeader {
        number: 1,
        segment_tag: above.segment_tag,
        nonce_random: above.nonce_random,
        ..block
    };
    assert_eq!(BlockHeader { durable_mark: 502, ..same }, above);
    let footer = &recovered[509..];
    check_hex("recovered-footer", footer);
    assert!(Footer::decode(footer).unwrap().footer.recovered);
    check_hex("successor-predecessor", &successor[160..248]);
    assert_eq!(next_header.header.first_seq, cut_header.header.limit_seq);

    let values = Values::of("cut");
    values.check("header hash of the cut segment", cut_header.header_hash);
    values.check("body of its first block", body(&cut_header, &cut[308..502]));
    let kept = digest(&cut_header, 1, values.get("body of its first block"));
    values.check("digest of it up to there", kept);
    let Predecessor::Cut(end) = header.header.predecessor else {
        panic!("{:?}", header.header.predecessor)
    };
    assert_eq!((end.blocks, end.bytes, end.digest), (1, 502, kept));
    values.check("header hash of the recovered segment", header.header_hash);
    let whole = digest(&header, 1, &body(&header, bytes));
    values.check("digest of the recovered segment", whole);
    let Predecessor::Sealed(end) = next_header.header.predecessor else {
        panic!("{:?}", next_header.header.predecessor)
    };
    assert_eq!((end.blocks, end.bytes as usize, end.digest), (1, recovered.len(), whole));
}

#[test]
fn the_example_of_a_catalogue_holds() {
    let golden = golden_dir("unclean");
    let path = catalogue::catalogue_file(&golden.join("store"));
    assert_named(&path);
    let frame = Frame::read(&path);
    frame.check_examples("catalogue");
    let (root, values) = (root(&golden.join("keyring"), 1), Values::of("catalogue"));
    let key = derived(&root, &[], "envelog v2 document");
    values.check("root", root.expose());
    values.check("document key", key.expose());
    let file = &frame.bytes;
    let catalogue::Layout { document, tips, records } = catalogue::Layout::of(file);
    assert_eq!(
        (document.end, tips[0].start, records[0].start, records[1].start),
        (229, 512, 1536, 1903)
    );
    assert_eq!((records.len(), records[1].end, file.len()), (2, 2294, 2294));
    let mut tag = catalogue::tag_a(&file[document]);
    for (index, record) in records.into_iter().enumerate() {
        let (number, which) = (index as u64 + 2, format!("catalogue-record-{}", index + 1));
        let bytes = &file[record];
        let (head, rest) = bytes.split_at(catalogue::RECORD_HEAD_LEN);
        let (changes, end) = rest.split_at(rest.len() - catalogue::RECORD_SUFFIX_LEN);
        check_hex(&which, head);
        check_json(&which, changes);
        check_hex(&format!("{which}-end"), end);
        assert_eq!(catalogue::record(number, 1, changes, &tag, &key), bytes);
        tag = catalogue::record_tag(bytes);
        let slot = (number % 2) as usize;
        let tip = &file[tips[slot].clone()];
        check_hex(&format!("catalogue-tip-{slot}"), &tip[..92]);
        assert_eq!(catalogue::tip(slot as u32, 1, number, &tag, &key), tip);
    }
}

#[test]
fn the_example_of_an_epoch_holds() {
    let file = fs::read(golden_dir("unclean").join("store/EPOCH")).unwrap();
    check_hex("epoch", &file[..60]);
    assert_eq!(file[56..60], crc32fast::hash(&file[..56]).to_le_bytes());
    assert!(file.len() == 1024 && file[60..].iter().all(|&byte| byte == 0));
}

#[test]
fn what_the_document_lists_is_what_there_is() {
    assert_eq!(FORMAT_VERSION, 2);
    assert!(DOCUMENT.contains("in format version 2."));
    // In a document, a segment header, a footer and an epoch.
    assert_eq!(DOCUMENT.matches("| u16 | version: 2 |").count(), 4);
    for suite in Suite::ALL {
        let (cipher, hash) = match suite.cipher() {
            Cipher::Aes256Gcm => ("AES-256-GCM", "SHA-256"),
            Cipher::Sm4Gcm => ("SM4-GCM", "SM3"),
        };
        let blocks = if suite.encrypts() { "encrypted" } else { "authenticated only" };
        let (code, len) = (suite.code(), suite.cipher().key_len());
        let row =
            format!("| {code} | {} | {cipher} | {len} bytes | {hash} | {blocks} |", suite.name());
        assert!(DOCUMENT.contains(&row), "{row}");
    }
    for compression in [Compression::None, Compression::Lz4, Compression::Zstd] {
        assert!(DOCUMENT.contains(&format!("`{}`", compression.name())));
    }
    assert_eq!(crc32fast::hash(b"123456789"), 0xCBF4_3926);
    assert!(DOCUMENT.contains("0xCBF43926"));
    let mib = |bytes: u64| bytes >> 20;
    for (what, limit) in [
        (
            "log group, encoded; opaque record",
            format!("{} MiB", mib(group::GROUP_BYTES_MAX as u64)),
        ),
        ("logs of a group", "1,000,000".to_owned()),
        ("list of a block", format!("{} MiB", mib(envelog::inspect::BLOCK_LIST_BYTES_MAX.into()))),
        ("groups of a block", "65,536".to_owned()),
        ("value of a log or tag", format!("{} MiB", mib(group::VALUE_BYTES_MAX as u64))),
        ("window of a Zstandard frame", "128 MiB".to_owned()),
        ("index entries", "65,536".to_owned()),
    ] {
        assert!(DOCUMENT.contains(&format!("| {what} | {limit} |")), "{what}: {limit}");
    }
    assert_eq!(group::LOGS_PER_GROUP_MAX, 1_000_000);
    assert_eq!(envelog::inspect::BLOCK_GROUPS_MAX, 65_536);
    // A list of 32 MiB, and a four-byte time per group for the maximum number of groups.
    assert_eq!(envelog::inspect::BLOCK_RAW_BYTES_MAX, 33_816_576);
    assert_eq!(envelog::inspect::BLOCK_OVERHEAD_BYTES, 116);
    assert_eq!(envelog::inspect::INDEX_ENTRIES_MAX, 65_536);
}

// ---- golden stores ----

/// A copy of a golden store.
struct Copy {
    dir: TempDir,
}

impl Copy {
    fn of(which: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy_dir(&golden_dir(which), dir.path());
        // Git does not store empty directories.
        fs::create_dir_all(dir.path().join("store/probes")).unwrap();
        Self { dir }
    }

    fn path(&self, part: &str) -> PathBuf {
        self.dir.path().join(part)
    }

    fn store(&self) -> PathBuf {
        self.path("store")
    }

    fn logstore_dir(&self) -> PathBuf {
        only_logstore(&self.store())
    }

    fn builder(&self) -> StoreBuilder {
        self.builder_with(AwsLc::new())
    }

    fn builder_with(&self, provider: impl CryptoProvider + 'static) -> StoreBuilder {
        let mut options = StoreOptions::default();
        options.background = Background::Manual;
        let builder = Store::builder(self.store(), self.path("keyring"), provider)
            .disk(Arc::new(QuickDisk))
            .options(options);
        let kms = self.path("kms");
        if kms.exists() { builder.kms(Arc::new(LocalKms::open(kms).unwrap())) } else { builder }
    }

    fn expected(&self) -> Value {
        serde_json::from_slice(&fs::read(self.path("expected.json")).unwrap()).unwrap()
    }

    /// Changes the bytes of a file.
    fn change(&self, path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    }
}

fn listed(record: &Record) -> Value {
    assert_ne!(record.kind, BlockKind::Mark, "a mark is no record");
    let kind = record.kind.name();
    let hex = golden::hex(&record.bytes);
    json!({ "seq": record.seq, "receive_time_us": record.receive_time_us, "kind": kind, "hex": hex })
}

/// All records of a store, in the form of `expected.json`.
fn listing(store: &Store) -> Value {
    let mut all = json!({});
    for name in store.list().unwrap() {
        let logstore = store.logstore(&name).unwrap();
        for shard in 0..logstore.config().shard_count {
            let found: Vec<Value> = records(&logstore, shard).unwrap().iter().map(listed).collect();
            all[name.to_string()][shard.to_string()] = found.into();
        }
    }
    all
}

#[track_caller]
fn assert_clean(which: &str, store: &Store, keyless: bool) -> VerifyReport {
    let options = VerifyOptions::default().keyless(keyless);
    let report = store.admin().verify(&options, &mut |_| {}).unwrap();
    assert!(
        report.is_clean() && report.refused.is_empty(),
        "{which} (keyless: {keyless}): {report:?}"
    );
    report
}

fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let relative = |path: PathBuf| path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
    files(dir).into_iter().map(|(path, bytes)| (relative(path), bytes)).collect()
}

/// A keyring under a master key, opened as the document describes.
#[test]
fn a_sealed_keyring_is_as_the_document_says() {
    let golden = golden_dir("sealed-keyring");
    let frame = Frame::read(&golden.join("keyring"));
    let body = frame.a();
    frame.check_examples("keyring");
    let (values, newest) = (Values::of("keyring"), frame.u32(64));
    assert_eq!(newest, 2);
    let context = context([
        ("envelog:key-version", newest.to_string()),
        ("envelog:keyring", golden::hex(&frame.bytes[40..56])),
        ("envelog:purpose", "service-keyring".to_owned()),
        ("envelog:store", golden::hex(&frame.bytes[24..40])),
    ]);
    let wrapped = unhex(body["wrapped"].as_str().unwrap());
    let key = locally_unwrapped(&golden, &body["cmk"], &context, &wrapped, &values);
    values.check("own key", key.expose());
    let fingerprint = &expand(HashAlg::Sha256, &[], &key, &[b"envelog v2 fingerprint"], 32)[..16];
    assert_eq!(golden::hex(fingerprint), body["fingerprint"].as_str().unwrap());
    let sealed = unhex(body["sealed"].as_str().unwrap());
    let (sealed, tag) = sealed.split_last_chunk().unwrap();
    let aad = [&frame.bytes[24..56], &(newest as u32).to_le_bytes()].concat();
    let mut plain = vec![0; sealed.len()];
    let key = derived(&key, &[], "envelog v2 keyring");
    values.check("encrypting key", key.expose());
    values.check("associated data", &aad);
    let aead = AwsLc::new().aead(Cipher::Aes256Gcm, key.expose()).unwrap();
    aead.open(&[0; 12], &aad, sealed, tag, &mut plain).unwrap();
    check_json("keyring-open", &plain);
    let open: Value = serde_json::from_slice(&plain).unwrap();
    let versions: Vec<_> = open["versions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| entry["version"].as_u64())
        .collect();
    assert_eq!(versions, [Some(1), Some(2)]);
    // The rotation is complete: its completion is the third generation of the keyring.
    assert_eq!(
        (open["accepts"].as_u64(), &frame.bytes[56..64]),
        (Some(2), &3_u64.to_le_bytes()[..])
    );
    let root = unhex(open["versions"][1]["root"].as_str().unwrap());
    values.check("root", &root);
    let mut signed = Frame { bytes: frame.bytes.clone() };
    let root = SecretKey::from_bytes(&mut root.try_into().unwrap());
    values.check("document key", derived(&root, &[], "envelog v2 document").expose());
    signed.sign(&root);
    assert_eq!(
        golden::hex(&signed.bytes),
        golden::hex(&frame.bytes),
        "tag A is that of an open keyring"
    );
}

/// The golden stores together contain every form that a segment can have.
#[test]
fn the_golden_stores_have_every_form() {
    let mut forms = BTreeSet::new();
    for which in golden::NAMES {
        for (path, file) in files(&golden_dir(which)) {
            if path.extension().is_none_or(|extension| extension != "seg") {
                continue;
            }
            let decoded = SegmentHeader::decode(&file).unwrap();
            forms.insert(decoded.header.suite.name());
            forms.insert(match decoded.header.key_source {
                KeySource::DataKey(1) => "data key 1",
                KeySource::DataKey(_) => "later data key",
                KeySource::Keyring(_) => "keyring",
            });
            forms.insert(match decoded.header.predecessor {
                Predecessor::None => "first",
                Predecessor::Sealed(_) => "after a sealed one",
                Predecessor::Cut(_) => "after a cut one",
            });
            let mut rest = &file[decoded.body_start as usize..];
            while let Ok(block) = BlockHeader::decode(rest) {
                forms.insert(block.compression.name());
                forms.insert(block.kind.name());
                rest = rest.get(block.block_len() as usize..).unwrap_or_default();
            }
            forms.insert(match Footer::decode(rest) {
                Ok(footer) if footer.footer.recovered => "recovered",
                Ok(_) => "sealed",
                Err(_) => "not sealed",
            });
        }
    }
    let mut all: BTreeSet<_> = Suite::ALL.iter().map(|suite| suite.name()).collect();
    all.extend([
        "data key 1",
        "later data key",
        "keyring",
        "first",
        "after a sealed one",
        "after a cut one",
    ]);
    all.extend([
        "none",
        "lz4",
        "zstd",
        "groups",
        "opaque",
        "mark",
        "recovered",
        "sealed",
        "not sealed",
    ]);
    assert_eq!(forms, all);
}

/// A change of any written byte is a change of the format. It needs a new version or a feature bit,
/// and new golden stores.
#[test]
fn this_build_writes_the_golden_bytes() {
    let dir = tempfile::tempdir().unwrap();
    for which in golden::NAMES {
        let made = dir.path().join(which);
        golden::make(which, &made);
        let (made, golden) = (contents(&made), contents(&golden_dir(which)));
        assert_eq!(made.keys().collect::<Vec<_>>(), golden.keys().collect::<Vec<_>>(), "{which}");
        for (path, bytes) in golden {
            // Compressed sizes are not part of the format and may change with the version of the
            // library.
            if which != golden::COMPRESSED || path == "expected.json" || path == "keyring" {
                assert_eq!(golden::hex(&made[&path]), golden::hex(&bytes), "{which}/{path}");
            }
        }
    }
}

#[test]
fn golden_stores_are_read_and_verified() {
    for which in golden::NAMES {
        let copy = Copy::of(which);
        let before = contents(copy.dir.path());
        let store = copy.builder().open_read_only().unwrap();
        assert_eq!(listing(&store), copy.expected(), "{which}");
        let groups: usize = copy
            .expected()
            .as_object()
            .unwrap()
            .values()
            .flat_map(|shards| shards.as_object().unwrap().values())
            .map(|records| records.as_array().unwrap().len())
            .sum();
        for keyless in [false, true] {
            let report = assert_clean(which, &store, keyless);
            assert_eq!(report.groups, groups as u64, "{which}");
            assert_eq!(
                report.notes.len(),
                usize::from(which == "unclean"),
                "{which}: {:?}",
                report.notes
            );
        }
        assert!(!store.keys().audit_records().unwrap().is_empty(), "{which}");
        store.close().unwrap();
        let store = copy.builder_with(RustCrypto::new()).open_read_only().unwrap();
        assert_eq!(listing(&store), copy.expected(), "{which}");
        store.close().unwrap();
        assert_eq!(contents(copy.dir.path()), before, "reading {which} has changed it");
    }
}

#[test]
fn golden_stores_are_written_on() {
    for which in golden::NAMES {
        let copy = Copy::of(which);
        let mut expected = copy.expected();
        let store = copy.builder().open().unwrap();
        assert_eq!(listing(&store), expected, "{which}");
        assert_clean(which, &store, false);
        for name in store.list().unwrap() {
            let logstore = store.logstore(&name).unwrap();
            let writable = logstore.config().shards.into_iter();
            let writable = writable.filter(|shard| shard.status == ShardStatus::ReadWrite);
            for shard in writable.map(|shard| shard.id) {
                let options = synced().shard(ShardChoice::Shard(shard));
                let added = [
                    record("by this build"),
                    Payload::try_from(&log_group("by this build", 2)).unwrap(),
                ];
                for payload in added {
                    let appended = logstore.append(payload, &options).unwrap();
                    let all = records(&logstore, shard).unwrap();
                    assert_eq!(all.last().unwrap().seq, appended.seq);
                    let before =
                        expected[name.to_string()][shard.to_string()].as_array_mut().unwrap();
                    before.push(listed(all.last().unwrap()));
                }
            }
            let notices = logstore.status().unwrap().recovery;
            assert_eq!(notices.len(), usize::from(which == "unclean"), "{which}: {notices:?}");
        }
        assert_eq!(listing(&store), expected, "{which}");
        store.close().unwrap();

        let store = copy.builder().open_read_only().unwrap();
        assert_eq!(listing(&store), expected, "{which}");
        assert_clean(which, &store, false);
        assert_clean(which, &store, true);
    }
}

#[test]
fn the_golden_checkpoint_holds() {
    let copy = Copy::of("service-sm4");
    let store = copy.builder().open_read_only().unwrap();
    let checkpoint = fs::read(copy.path("checkpoint")).unwrap();
    let against = |bytes: &[u8]| VerifyOptions::default().against(Checkpoint::from_bytes(bytes));
    let report = store.admin().verify(&against(&checkpoint), &mut |_| {}).unwrap();
    assert!(report.is_clean(), "{report:?}");
    let mut newer = checkpoint;
    newer[8] = 3;
    fix_crc(&mut newer);
    assert_newer(store.admin().verify(&against(&newer), &mut |_| {}).map(|_| ()), 3);
}

// ---- files of a newer build ----

#[track_caller]
fn assert_newer(result: envelog::Result<()>, version: u16) {
    match result {
        Err(error @ Error::NewerFormat { found, supported, .. }) => {
            assert_eq!((found, supported), (version, FORMAT_VERSION));
            assert!(error.to_string().contains(&format!("format version {version}")), "{error}");
        }
        other => panic!("expected a refusal of version {version}, got {other:?}"),
    }
}

#[track_caller]
fn assert_unsupported<T: std::fmt::Debug>(result: envelog::Result<T>) {
    assert!(matches!(&result, Err(Error::UnsupportedFeature { .. })), "{result:?}");
}

/// Opens the store, its Logstore and its records, either read-only or for writing.
fn use_all(copy: &Copy, read_only: bool) -> envelog::Result<()> {
    let store = if read_only { copy.builder().open_read_only()? } else { copy.builder().open()? };
    for name in store.list()? {
        let logstore = store.logstore(&name)?;
        if !read_only {
            logstore.append(record("by this build"), &synced())?;
        }
        for shard in 0..logstore.config().shard_count {
            records(&logstore, shard)?;
        }
    }
    Ok(())
}

/// The length of the document at the beginning of a file.
fn document_len(bytes: &[u8]) -> usize {
    let len = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    80 + len(72) + len(76) + 68
}

/// The documents of a store that are read when its Logstore is opened.
fn documents(copy: &Copy) -> Vec<PathBuf> {
    let probe = files(&copy.store().join("probes")).into_keys().next().unwrap();
    vec![
        copy.store().join("STORE"),
        copy.path("keyring"),
        catalogue::catalogue_file(&copy.store()),
        meta_path(&copy.logstore_dir()),
        probe,
    ]
}

#[test]
fn a_newer_version_of_any_file_is_refused_by_its_number() {
    for (index, version) in (0..7).zip([3, 4, 7, 255, 256, 0x1234, u16::MAX]) {
        let copy = Copy::of("byok-aes");
        let segment = segments(&copy.logstore_dir(), 0).pop().unwrap();
        match index {
            5 => copy.change(&segment, |bytes| {
                bytes[8..10].copy_from_slice(&version.to_le_bytes());
                fix_crc(&mut bytes[..308]);
            }),
            6 => copy.change(&segment, |bytes| {
                let len = u32::from_le_bytes(
                    bytes[bytes.len() - 16..bytes.len() - 12].try_into().unwrap(),
                ) as usize;
                let (at, end) = (bytes.len() - len, bytes.len() - 16);
                assert_eq!(bytes[at..at + 6], *b"EFTR\x02\0");
                bytes[at + 4..at + 6].copy_from_slice(&version.to_le_bytes());
                fix_crc(&mut bytes[at..end]);
            }),
            document => copy.change(&documents(&copy)[document], |bytes| {
                bytes[8..10].copy_from_slice(&version.to_le_bytes());
                let end = document_len(bytes);
                fix_crc(&mut bytes[..end]);
            }),
        }
        for read_only in [true, false] {
            assert_newer(use_all(&copy, read_only), version);
        }
    }
}

#[test]
fn a_store_of_version_1_is_refused_by_its_number() {
    let dir = tempfile::tempdir().unwrap();
    copy_dir(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1/plain"), dir.path());
    let before = files(dir.path());
    let builder =
        || Store::builder(dir.path().join("store"), dir.path().join("keyring"), AwsLc::new());
    for opened in [builder().open(), builder().open_read_only()] {
        let error = opened.unwrap_err();
        assert!(matches!(error, Error::OlderFormat { found: 1, supported: 2, .. }), "{error:?}");
        assert!(error.to_string().contains("format version 1"), "{error}");
    }
    assert_eq!(files(dir.path()), before);
}

#[test]
fn an_unknown_incompatible_feature_of_any_file_is_refused() {
    for index in 0..6 {
        let copy = Copy::of("byok-aes");
        let (path, features, end) = match documents(&copy).get(index) {
            Some(document) => (document.clone(), 12, document_len(&fs::read(document).unwrap())),
            None => (segments(&copy.logstore_dir(), 0).pop().unwrap(), 16, 308),
        };
        copy.change(&path, |bytes| {
            bytes[features + 11] = 0x80;
            fix_crc(&mut bytes[..end]);
        });
        for read_only in [true, false] {
            assert_unsupported(use_all(&copy, read_only));
        }
    }
}

/// Makes the catalogue name this metadata instead of the file `old`. Returns its path.
fn replace_meta(copy: &Copy, old: &Path, bytes: &[u8], root: &SecretKey) -> PathBuf {
    let generation = u64::from_le_bytes(bytes[56..64].try_into().unwrap());
    let path = catalogue::catalogue_file(&copy.store());
    let mut frame = Frame::read(&path);
    frame.fold(root, |body| {
        let entries = body["catalogue"]["logstores"].as_object_mut().unwrap();
        entries.values_mut().next().unwrap()["tag"] = golden::hex(&catalogue::tag_a(bytes)).into();
    });
    fs::write(path, frame.bytes).unwrap();
    fs::remove_file(old).unwrap();
    old.with_file_name(catalogue::meta_name(generation, bytes))
}

/// The feature bits are authenticated, so the test sets them as a newer build would: with the key.
#[test]
fn unknown_features_of_a_document_that_are_no_reason_to_refuse() {
    for document in ["store/STORE", "keyring", "catalogue", "meta"] {
        for (at, writable) in [(12, true), (16, false)] {
            let copy = Copy::of("service-aes");
            let path = match document {
                "meta" => meta_path(&copy.logstore_dir()),
                "catalogue" => catalogue::catalogue_file(&copy.store()),
                other => copy.path(other),
            };
            let root = root(&copy.path("keyring"), 1);
            let mut frame = Frame::read(&path);
            frame.bytes[at] = 0x10;
            if document == "catalogue" {
                frame.fold(&root, |_| {});
            } else {
                frame.sign(&root);
            }
            let path = if document == "meta" {
                replace_meta(&copy, &path, &frame.bytes, &root)
            } else {
                path
            };
            fs::write(&path, &frame.bytes).unwrap();
            use_all(&copy, true).unwrap();
            if writable {
                use_all(&copy, false).unwrap();
            } else {
                assert_unsupported(use_all(&copy, false));
                assert_eq!(fs::read(&path).unwrap(), frame.bytes, "{document}");
            }
        }
    }
}

/// Re-seals the blocks of an open segment under a changed header.
fn reseal(copy: &Copy, path: &Path, change: impl FnOnce(&mut SegmentHeader)) {
    let file = fs::read(path).unwrap();
    let old = SegmentHeader::decode(&file).unwrap();
    let key = data_key(copy.dir.path(), 1, None);
    let cipher = |decoded: &DecodedHeader| {
        let (suite, salt) = (decoded.header.suite, &decoded.header.salt);
        SegmentCipher::derive(&AwsLc::new(), suite, &key, salt, &decoded.header_hash).unwrap()
    };
    let mut header = old.header.clone();
    change(&mut header);
    header.salt[0] ^= 1;
    let encoded = header.encode();
    let draft = SegmentHeader::decode(&SegmentHeader::finish(encoded.clone(), &[0; 32])).unwrap();
    let (opening, sealing) = (cipher(&old), cipher(&draft));
    let mut out = SegmentHeader::finish(encoded, sealing.commitment());
    let mut rest = &file[old.body_start as usize..];
    while let Ok(mut block) = BlockHeader::decode(rest) {
        let Some(bytes) = rest.get(..block.block_len() as usize) else { break };
        let (payload, tag) = (
            &bytes[96..bytes.len() - 20],
            bytes[bytes.len() - 20..bytes.len() - 4].try_into().unwrap(),
        );
        let mut plain = vec![0; payload.len()];
        opening.open_block(&block.nonce(), &bytes[..96], payload, &tag, &mut plain).unwrap();
        block.segment_tag = draft.segment_tag();
        block.durable_mark = block.durable_mark + draft.body_start - old.body_start;
        let mut sealed = [&draft.header_hash[..], &block.encode(), &plain].concat();
        let tag = sealing.seal_block(&block.nonce(), &mut sealed, 128).unwrap();
        sealed.extend_from_slice(&tag);
        sealed.extend_from_slice(&crc32fast::hash(&sealed[32..]).to_le_bytes());
        out.extend_from_slice(&sealed[32..]);
        rest = &rest[bytes.len()..];
    }
    fs::write(path, out).unwrap();
}

#[test]
fn unknown_features_of_a_segment_that_are_no_reason_to_refuse() {
    let reads = |copy: &Copy| {
        assert_eq!(listing(&copy.builder().open_read_only().unwrap()), copy.expected())
    };
    let features = [
        (Features::default(), true),
        (Features { compatible: 0x10, ..Features::default() }, true),
        (Features { read_only_compatible: 0x10, ..Features::default() }, false),
    ];
    for (features, writable) in features {
        let copy = Copy::of("unclean");
        let path = segments(&copy.logstore_dir(), 0).pop().unwrap();
        reseal(&copy, &path, |header| header.features = features);
        reads(&copy);
        let store = copy.builder().open().unwrap();
        assert_eq!(listing(&store), copy.expected());
        let appended =
            store.logstore(&name("shop/orders")).unwrap().append(record("more"), &synced());
        if writable {
            appended.unwrap();
        } else {
            assert_unsupported(appended);
        }
    }

    // This build knows padding, so padding may be marked critical. It skips unknown extensions
    // unless they are critical.
    let extension = |kind, critical| Extension { kind, critical, data: vec![7; 9] };
    let copy = Copy::of("unclean");
    let path = segments(&copy.logstore_dir(), 0).pop().unwrap();
    let extensions = vec![extension(Extension::PADDING, true), extension(0x4000, false)];
    reseal(&copy, &path, |header| header.extensions = extensions);
    reads(&copy);
    use_all(&copy, false).unwrap();
    copy.change(&path, |bytes| {
        let mut header = SegmentHeader::decode(bytes).unwrap().header;
        header.extensions = vec![extension(Extension::DICTIONARY, true)];
        *bytes = SegmentHeader::finish(header.encode(), &[0; 32]);
    });
    for read_only in [true, false] {
        assert_unsupported(use_all(&copy, read_only));
    }
}

// ---- recovery ----

/// A store after a crash, whose recovery crashed too: after rewriting the kept groups and before
/// beginning the next segment.
fn recovered_by_half() -> (Copy, u64) {
    let first = Copy::of("unclean");
    let store = first.builder().open().unwrap();
    let appended =
        store.logstore(&name("shop/orders")).unwrap().append(record("lost"), &synced()).unwrap();
    let second = Copy::of("unclean");
    copy_dir(&first.store(), &second.store());
    let all = segments(&second.logstore_dir(), 0);
    assert_eq!(all.len(), 4);
    fs::remove_file(&all[3]).unwrap();
    (second, appended.seq)
}

/// The torn group had a sequence number, which a reader may have seen.
#[test]
fn a_recovery_that_was_cut_off_gives_no_number_out_again() {
    let (copy, goes_on_at) = recovered_by_half();
    let expected = copy.expected();
    let torn = 1 + expected["shop/orders"]["0"].as_array().unwrap().last().unwrap()["seq"]
        .as_u64()
        .unwrap();
    let store = copy.builder().open().unwrap();
    assert_eq!(listing(&store), expected);
    let logstore = store.logstore(&name("shop/orders")).unwrap();
    let appended = logstore.append(record("more"), &synced()).unwrap();
    assert!(appended.seq >= goes_on_at && appended.seq > torn, "{appended:?} after {torn}");
    assert_eq!(records(&logstore, 0).unwrap().len(), 4);
    store.close().unwrap();
    assert_clean("recovered by half", &copy.builder().open_read_only().unwrap(), false);
}

/// From the header of an unsealed segment, a writer takes its sequence limit and the identity of
/// its blocks.
#[test]
fn a_writer_goes_by_no_header_that_does_not_authenticate() {
    for (at, bytes) in [(112, [1; 8]), (104, [0xff; 8]), (104, [0xff, 0xff, 0, 0, 0, 0, 0, 0])] {
        let copy = Copy::of("unclean");
        let path = segments(&copy.logstore_dir(), 0).pop().unwrap();
        copy.change(&path, |file| {
            file[at..at + 8].copy_from_slice(&bytes);
            fix_crc(&mut file[..308]);
        });
        let before = files(&copy.logstore_dir());
        let store = copy.builder().open().unwrap();
        let appended =
            store.logstore(&name("shop/orders")).unwrap().append(record("more"), &synced());
        assert!(matches!(appended, Err(Error::WrongKey { .. })), "{at}: {appended:?}");
        drop(store);
        assert_eq!(files(&copy.logstore_dir()), before);
    }
}
