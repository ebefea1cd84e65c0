//! Re-seals changed stores as a holder of the keys can: the CRCs, tags and links of headers,
//! blocks, footers and documents are all valid.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use envelog::{
    Background, Compression, Store, StoreBuilder, StoreOptions,
    crypto::{
        AwsLc, CryptoProvider, HashAlg, SecretKey, SegmentCipher, Suite, hash, hkdf, hmac_sha256,
    },
    group::put_frame,
    inspect::{
        BlockHeader, BlockKind, Footer, IndexEntry, KeySource, Predecessor, PredecessorEnd,
        SegmentHeader,
    },
    kms::{EncryptionContext, Kms, KmsCall, LocalKms},
};
use serde_json::Value;
use tempfile::TempDir;

use crate::common::{QuickDisk, catalogue, copy_dir, files, fix_crc, secs, segments};

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn unhex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

fn expand(alg: HashAlg, salt: &[u8], key: &SecretKey, info: &[&[u8]], len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    hkdf(alg, salt, key.expose(), info, &mut out);
    out
}

pub(crate) fn derived(root: &SecretKey, salt: &[u8], label: &str) -> SecretKey {
    SecretKey::from_bytes(
        &mut expand(HashAlg::Sha256, salt, root, &[label.as_bytes()], 32).try_into().unwrap(),
    )
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The product in the field of GHASH (NIST SP 800-38D, section 6.3); the first bit of a block is
/// its highest.
fn gf128_mul(x: u128, y: u128) -> u128 {
    let (mut product, mut multiple) = (0, y);
    for bit in (0..128).rev() {
        product ^= if x >> bit & 1 == 1 { multiple } else { 0 };
        multiple = (multiple >> 1) ^ if multiple & 1 == 1 { 0xe1 << 120 } else { 0 };
    }
    product
}

/// Bytes to write at offsets of an encoded structure before it is sealed.
pub(crate) type Patch = Vec<(usize, Vec<u8>)>;

fn patched(mut bytes: Vec<u8>, patch: &Patch) -> Vec<u8> {
    for (at, with) in patch {
        bytes[*at..at + with.len()].copy_from_slice(with);
    }
    bytes
}

/// A copy of a golden store.
pub(crate) struct Copy {
    dir: TempDir,
}

impl Copy {
    pub(crate) fn of(which: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy_dir(
            &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v2").join(which),
            dir.path(),
        );
        // A change to one copy of a file that exists twice has no effect.
        for path in files(dir.path())
            .into_keys()
            .filter(|path| path.extension().is_some_and(|ext| ext == "copy"))
        {
            fs::remove_file(path).unwrap();
        }
        // Git does not store empty directories.
        fs::create_dir_all(dir.path().join("store/probes")).unwrap();
        Self { dir }
    }

    pub(crate) fn path(&self, part: &str) -> PathBuf {
        self.dir.path().join(part)
    }

    pub(crate) fn logstore_dir(&self) -> PathBuf {
        fs::read_dir(self.path("store/logstores")).unwrap().next().unwrap().unwrap().path()
    }

    pub(crate) fn builder(&self) -> StoreBuilder {
        let mut options = StoreOptions::default();
        options.background = Background::Manual;
        let builder = Store::builder(self.path("store"), self.path("keyring"), AwsLc::new());
        let builder = builder.disk(Arc::new(QuickDisk)).options(options);
        let kms = self.path("kms");
        if kms.exists() { builder.kms(Arc::new(LocalKms::open(kms).unwrap())) } else { builder }
    }

    /// The root key of a keyring version, or of the newest version if the given one does not exist.
    pub(crate) fn root(&self, version: u32) -> SecretKey {
        let keyring = Document::read(&fs::read(self.path("keyring")).unwrap()).json();
        let versions = keyring["versions"].as_array().unwrap();
        let entry =
            versions.iter().find(|entry| entry["version"] == version).or(versions.last()).unwrap();
        SecretKey::from_bytes(&mut unhex(entry["root"].as_str().unwrap()).try_into().unwrap())
    }

    /// A data key, unwrapped by the keyring or by the embedded KMS.
    fn data_key(&self, version: u32) -> SecretKey {
        let meta = Document::read(&fs::read(catalogue::meta_path(&self.logstore_dir())).unwrap());
        let keys: Value = serde_json::from_str(&meta.b).unwrap();
        let entry = keys["versions"]
            .as_array()
            .unwrap()
            .iter()
            .find(|entry| entry["version"] == version)
            .unwrap();
        let suite = if keys["encrypt_type"] == "sm4" { Suite::Sm4Gcm } else { Suite::Aes256Gcm };
        let envelope = unhex(entry["wrapped"].as_str().unwrap());
        let Some(keyring_version) = entry["keyring_version"].as_u64().map(|version| version as u32)
        else {
            let cmk = serde_json::from_value(keys["cmk"].clone()).unwrap();
            let context = EncryptionContext::from([
                ("envelog:key-version".to_owned(), version.to_string()),
                ("envelog:logstore".to_owned(), hex(&meta.head[40..56])),
                ("envelog:store".to_owned(), hex(&meta.head[24..40])),
                ("envelog:suite".to_owned(), suite.name().to_owned()),
            ]);
            let call = KmsCall { cmk: &cmk, context: &context, timeout: secs(1) };
            return LocalKms::open(self.path("kms")).unwrap().unwrap(&call, &envelope).unwrap();
        };
        let (salt, sealed, tag) =
            (&envelope[..32], &envelope[32..64], envelope[64..].try_into().unwrap());
        let code = suite.code().to_le_bytes();
        let info: [&[u8]; 2] = [b"envelog v2 envelope", &code];
        let wrapping = expand(
            suite.hash(),
            salt,
            &self.root(keyring_version),
            &info,
            suite.cipher().key_len(),
        );
        let aad =
            [&meta.head[24..56], &version.to_le_bytes(), &code, &keyring_version.to_le_bytes()]
                .concat();
        let mut key = [0; 32];
        AwsLc::new()
            .aead(suite.cipher(), &wrapping)
            .unwrap()
            .open(&[0; 12], &aad, sealed, &tag, &mut key)
            .unwrap();
        SecretKey::from_bytes(&mut key)
    }

    /// Changes the payload of the first block of a segment without changing its tag. GHASH is a sum
    /// of 16-byte blocks, each multiplied by a power of the key's H, so a change of one block is
    /// cancelled by H times that change in the next block.
    pub(crate) fn forge_payload(&self, path: &Path) {
        let mut file = fs::read(path).unwrap();
        let decoded = SegmentHeader::decode(&file).unwrap();
        let cipher = Chain::cipher(self, &decoded.header, &decoded.header_hash);
        // The tags of two messages that differ by 1 in their last block differ by the square of H.
        let tag = |last: u128| {
            u128::from_be_bytes(cipher.tag_only(&[0; 12], &last.to_be_bytes()).unwrap())
        };
        let mut h = tag(0) ^ tag(1 << 127);
        // The square root is the 127th square: squaring 128 times is the identity.
        (0..127).for_each(|_| h = gf128_mul(h, h));

        let start = decoded.body_start as usize;
        let end = start + BlockHeader::decode(&file[start..]).unwrap().block_len() as usize;
        let payload = start + BlockHeader::LEN;
        let change = 0x55 << 64;
        for (at, change) in [(payload + 16, change), (payload + 32, gf128_mul(change, h))] {
            file[at..at + 16]
                .iter_mut()
                .zip(change.to_be_bytes())
                .for_each(|(byte, change)| *byte ^= change);
        }
        fix_crc(&mut file[start..end]);
        fs::write(path, file).unwrap();
    }

    /// The newest file of the catalogue.
    pub(crate) fn catalogue(&self) -> PathBuf {
        catalogue::catalogue_file(&self.path("store"))
    }

    /// Changes a document and recomputes lengths, tags and CRC. The catalogue is updated to name
    /// changed metadata.
    pub(crate) fn change_document(&self, path: &Path, change: impl FnOnce(&mut Document)) {
        let mut document = Document::read(&fs::read(path).unwrap());
        change(&mut document);
        let bytes = self.seal(document);
        if !catalogue::is_meta(path) {
            return fs::write(path, bytes).unwrap();
        }
        let dir = path.parent().unwrap();
        fs::remove_file(path).unwrap();
        self.change_catalogue(|catalogue| {
            catalogue.edit(|json| {
                let entries = json["catalogue"]["logstores"].as_object_mut().unwrap();
                let entry = entries
                    .values_mut()
                    .find(|entry| dir.ends_with(entry["id"].as_str().unwrap()))
                    .unwrap();
                // Keep an invalid generation, so that the engine's check of the document finds it.
                let generation = u64_at(&bytes, 56);
                if (1..u64::MAX).contains(&generation) {
                    entry["generation"] = generation.into();
                }
                entry["tag"] = hex(&catalogue::tag_a(&bytes)).into();
                let name = catalogue::meta_name(entry["generation"].as_u64().unwrap(), &bytes);
                fs::write(dir.join(name), &bytes).unwrap();
            });
        });
    }

    /// Changes the snapshot of the catalogue, after applying the changes of its records. The result
    /// has no records.
    pub(crate) fn change_catalogue(&self, change: impl FnOnce(&mut Document)) {
        let path = self.catalogue();
        let file = fs::read(&path).unwrap();
        let (body, number) = catalogue::folded(&file);
        let mut document = Document::read(&file);
        document.edit(|json| *json = body);
        document.set_generation(number);
        change(&mut document);
        let key = self.document_key(u32_at(&document.head, 64));
        fs::write(path, catalogue::snapshot(&self.seal(document), &key)).unwrap();
    }

    /// The key that authenticates documents under a version of the keyring.
    pub(crate) fn document_key(&self, version: u32) -> SecretKey {
        derived(&self.root(version), &[], "envelog v2 document")
    }

    /// Encodes and seals a document.
    fn seal(&self, mut document: Document) -> Vec<u8> {
        let mut bytes = document.head.clone();
        bytes[72..76].copy_from_slice(&(document.a.len() as u32).to_le_bytes());
        bytes[76..80].copy_from_slice(&(document.b.len() as u32).to_le_bytes());
        bytes.extend_from_slice(document.a.as_bytes());
        bytes.extend_from_slice(document.b.as_bytes());
        if document.tag_b != [0; 32] && document.tag_b_follows {
            let keys: Value = serde_json::from_str(&document.b).unwrap();
            let key = derived(
                &self.data_key(keys["current"].as_u64().unwrap() as u32),
                &[],
                "envelog v2 metadata",
            );
            let covered: [&[u8]; 3] =
                [&document.head[8..12], &document.head[24..56], document.b.as_bytes()];
            document.tag_b = hmac_sha256(&key, &covered);
        }
        let key = self.document_key(u32_at(&bytes, 64));
        let tag = hmac_sha256(&key, &[&bytes, &document.tag_b]);
        bytes.extend_from_slice(&tag);
        bytes.extend_from_slice(&document.tag_b);
        bytes.extend_from_slice(&[0; 4]);
        fix_crc(&mut bytes);
        bytes
    }
}

/// A parsed document.
pub(crate) struct Document {
    /// The bytes before part A.
    pub(crate) head: Vec<u8>,
    pub(crate) a: String,
    pub(crate) b: String,
    pub(crate) tag_b: [u8; 32],
    /// Whether the second tag is recomputed, if there is one.
    pub(crate) tag_b_follows: bool,
}

impl Document {
    /// Parses the document at the beginning of `bytes`.
    pub(crate) fn read(bytes: &[u8]) -> Self {
        let (a, b) = (u32_at(bytes, 72) as usize, u32_at(bytes, 76) as usize);
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        Self {
            a: text(&bytes[80..80 + a]),
            b: text(&bytes[80 + a..80 + a + b]),
            tag_b: bytes[112 + a + b..144 + a + b].try_into().unwrap(),
            head: bytes[..80].to_vec(),
            tag_b_follows: true,
        }
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.a).unwrap()
    }

    /// Changes part A as JSON.
    pub(crate) fn edit(&mut self, change: impl FnOnce(&mut Value)) {
        let mut json = self.json();
        change(&mut json);
        self.a = json.to_string();
    }

    /// Changes part B as JSON.
    pub(crate) fn edit_keys(&mut self, change: impl FnOnce(&mut Value)) {
        let mut json = serde_json::from_str(&self.b).unwrap();
        change(&mut json);
        self.b = json.to_string();
    }

    pub(crate) fn set_generation(&mut self, generation: u64) {
        self.head[56..64].copy_from_slice(&generation.to_le_bytes());
    }
}

/// A block before it is sealed. Its position determines number, segment tag and offset.
#[derive(Clone)]
pub(crate) struct Block {
    pub(crate) header: BlockHeader,
    /// The plaintext: the list and the table, compressed if the header says so.
    pub(crate) payload: Vec<u8>,
    pub(crate) patch: Patch,
}

impl Block {
    /// Stores opaque records in the block, with these times in its table.
    pub(crate) fn put_opaque(&mut self, records: &[&[u8]], table: &[u32]) {
        self.put(BlockKind::Opaque, 0, records, table);
    }

    pub(crate) fn put(&mut self, kind: BlockKind, logs: u32, records: &[&[u8]], table: &[u32]) {
        let mut list = Vec::new();
        records.iter().for_each(|record| put_frame(&mut list, record));
        let last = table.last().copied().unwrap_or(0);
        self.header.kind = kind;
        self.header.log_count = logs;
        self.header.group_count = records.len() as u32;
        self.header.list_len = list.len() as u32;
        self.header.last_time_us = self.header.first_time_us + u64::from(last);
        table.iter().for_each(|time| list.extend_from_slice(&time.to_le_bytes()));
        self.store(Compression::None, list.len(), list);
    }

    /// Stores `payload` as the compressed form of `raw_len` bytes.
    pub(crate) fn store(&mut self, compression: Compression, raw_len: usize, payload: Vec<u8>) {
        self.header.compression = compression;
        self.header.raw_len = raw_len as u32;
        self.header.payload_len = payload.len() as u32;
        self.payload = payload;
    }

    /// The uncompressed list.
    pub(crate) fn list_mut(&mut self) -> &mut [u8] {
        &mut self.payload[..self.header.list_len as usize]
    }

    /// Sets all times of the block.
    pub(crate) fn set_time(&mut self, time_us: u64) {
        let length = self.header.last_time_us - self.header.first_time_us;
        (self.header.first_time_us, self.header.last_time_us) = (time_us, time_us + length);
    }

    /// A mark that could follow the block.
    pub(crate) fn mark(&self) -> Self {
        let mut mark = self.clone();
        mark.put(BlockKind::Mark, 0, &[], &[]);
        mark.header.first_seq = self.header.end_seq();
        (mark.header.first_time_us, mark.header.last_time_us) =
            (self.header.last_time_us, self.header.last_time_us);
        mark
    }
}

/// A segment before it is sealed.
#[derive(Clone)]
pub(crate) struct Segment {
    path: PathBuf,
    pub(crate) header: SegmentHeader,
    pub(crate) header_patch: Patch,
    pub(crate) blocks: Vec<Block>,
    /// Whether the segment has a footer, and the footer's `recovered` flag.
    pub(crate) footer: Option<bool>,
    pub(crate) footer_patch: Patch,
    /// Changes the entries of the index.
    pub(crate) index: fn(&mut Vec<IndexEntry>),
    /// The bytes after the last block of a cut segment.
    tail: Vec<u8>,
    /// The number of blocks that the successor keeps.
    kept: usize,
    /// Changes the link to the predecessor after it was computed.
    pub(crate) link: fn(&mut PredecessorEnd),
}

/// The segments of a shard.
pub(crate) struct Chain<'a> {
    copy: &'a Copy,
    shard: u32,
    pub(crate) segments: Vec<Segment>,
}

impl<'a> Chain<'a> {
    fn cipher(copy: &Copy, header: &SegmentHeader, header_hash: &[u8; 32]) -> SegmentCipher {
        let key = match header.key_source {
            KeySource::DataKey(version) => copy.data_key(version),
            KeySource::Keyring(version) => {
                derived(&copy.root(version), header.logstore.as_bytes(), "envelog v2 integrity")
            }
        };
        SegmentCipher::derive(&AwsLc::new(), header.suite, &key, &header.salt, header_hash).unwrap()
    }

    /// Decrypts every block of a shard. Only the store `compressed` has compressed blocks.
    pub(crate) fn load(copy: &'a Copy, shard: u32) -> Self {
        let mut chain = Self { copy, shard, segments: Vec::new() };
        for path in segments(&copy.logstore_dir(), shard) {
            let file = fs::read(&path).unwrap();
            let decoded = SegmentHeader::decode(&file).unwrap();
            let cipher = Self::cipher(copy, &decoded.header, &decoded.header_hash);
            let mut rest = &file[decoded.body_start as usize..];
            let mut blocks = Vec::new();
            while let Ok(header) = BlockHeader::decode(rest) {
                let Some(bytes) = rest.get(..header.block_len() as usize) else { break };
                let (covered, tag) = bytes[..bytes.len() - 4].split_last_chunk().unwrap();
                let mut payload = vec![0; header.payload_len as usize];
                cipher
                    .open_block(&header.nonce(), &bytes[..96], &covered[96..], tag, &mut payload)
                    .unwrap();
                blocks.push(Block { header, payload, patch: Patch::new() });
                rest = &rest[bytes.len()..];
            }
            let footer = Footer::decode(rest).ok().map(|footer| footer.footer.recovered);
            if let Some(before) = chain.segments.last_mut()
                && let Predecessor::Cut(end) = decoded.header.predecessor
            {
                before.kept = end.blocks as usize;
            }
            chain.segments.push(Segment {
                path,
                header: decoded.header,
                header_patch: Patch::new(),
                kept: blocks.len(),
                blocks,
                tail: if footer.is_none() { rest.to_vec() } else { Vec::new() },
                footer,
                footer_patch: Patch::new(),
                index: |_| {},
                link: |_| {},
            });
        }
        chain
    }

    /// Appends a segment under the service keyring, with the blocks of the last one.
    pub(crate) fn append_under_the_keyring(&mut self) {
        self.append_under(Suite::Aes256Gmac, KeySource::Keyring(1));
    }

    /// Appends a segment under a key, with the blocks of the last one.
    pub(crate) fn append_under(&mut self, suite: Suite, source: KeySource) {
        let last = self.segments.last().unwrap();
        let (mut segment, end) = (last.clone(), last.blocks.last().unwrap().header);
        let moved = end.end_seq() - last.header.first_seq;
        (segment.header.suite, segment.header.key_source) = (suite, source);
        segment.header.ordinal += 1;
        segment.header.first_seq += moved;
        segment.header.created_us = end.last_time_us;
        for block in &mut segment.blocks {
            block.header.first_seq += moved;
            block.set_time(end.last_time_us);
        }
        segment.path.set_extension("forged");
        fs::write(&segment.path, b"").unwrap();
        self.segments.push(segment);
    }

    /// Seals every segment again, each linked to the previous one. Returns the end of each.
    pub(crate) fn save_segments(&mut self) -> Vec<PredecessorEnd> {
        let mut before: Option<PredecessorEnd> = None;
        let mut ends = Vec::new();
        for segment in &mut self.segments {
            if let (Some(end), Predecessor::Sealed(place) | Predecessor::Cut(place)) =
                (before, &mut segment.header.predecessor)
            {
                *place = end;
                (segment.link)(place);
            }
            fs::remove_file(&segment.path).unwrap();
            let epoch = segment.path.file_stem().unwrap().to_str().unwrap()[31..].to_owned();
            let name = format!(
                "{:010}-{:020}{epoch}.seg",
                segment.header.ordinal, segment.header.first_seq
            );
            segment.path.set_file_name(name);
            let (file, end) = segment.seal(self.copy);
            fs::write(&segment.path, file).unwrap();
            ends.push(end);
            before = Some(end);
        }
        ends
    }

    /// Seals the segments and the catalogue again. The catalogue knows one of the segments.
    pub(crate) fn save(mut self) {
        let ends = self.save_segments();
        let shard = self.shard as usize;
        self.copy.change_catalogue(|catalogue| {
            catalogue.edit(|json| {
                let logstore = json["catalogue"]["logstores"]
                    .as_object_mut()
                    .unwrap()
                    .values_mut()
                    .next()
                    .unwrap();
                let head = &mut logstore["shards"][shard]["head"];
                if let Some(end) = ends.iter().rfind(|end| head["ordinal"] == end.ordinal) {
                    (head["blocks"], head["bytes"]) = (end.blocks.into(), end.bytes.into());
                    (head["end_seq"], head["digest"]) =
                        (end.end_seq.into(), hex(&end.digest).into());
                    head["last_time_us"] = end.last_time_us.into();
                    head["next_seq"] = end.end_seq.max(head["next_seq"].as_u64().unwrap()).into();
                }
            });
        });
    }
}

impl Segment {
    /// The sealed bytes, and the end that a successor records.
    fn seal(&self, copy: &Copy) -> (Vec<u8>, PredecessorEnd) {
        let (suite, encoded) =
            (self.header.suite, patched(self.header.encode(), &self.header_patch));
        let header_hash = hash(suite.hash(), &[&encoded]);
        let cipher = Chain::cipher(copy, &self.header, &header_hash);
        let mut file = SegmentHeader::finish(encoded, cipher.commitment());
        let algorithm = self.header.payload_hash;
        // The part of the blocks that the digest covers.
        let mut digested = Vec::new();
        let mut footer = Footer {
            segment_tag: header_hash[..8].try_into().unwrap(),
            block_count: 0,
            group_count: 0,
            log_count: 0,
            raw_bytes: 0,
            end_seq: self.header.first_seq,
            first_time_us: 0,
            last_time_us: 0,
            offset: 0,
            nonce_random: *b"a footer",
            recovered: self.footer == Some(true),
            body: hash(algorithm, &[]),
            index: Vec::new(),
        };
        let time_before_us = match self.header.predecessor {
            Predecessor::None => 0,
            Predecessor::Sealed(end) | Predecessor::Cut(end) => end.last_time_us,
        };
        let mut end = PredecessorEnd {
            ordinal: self.header.ordinal,
            segment: self.header.segment,
            blocks: 0,
            bytes: file.len() as u64,
            end_seq: footer.end_seq,
            digest: footer.digest(algorithm, &header_hash),
            last_time_us: time_before_us,
        };
        for (number, block) in self.blocks.iter().enumerate() {
            let mut header = block.header;
            header.segment_tag = footer.segment_tag;
            header.number = number as u32;
            header.durable_mark = header.durable_mark.min(file.len() as u64);
            let head = patched(header.encode().to_vec(), &block.patch);
            let nonce =
                [&u32_at(&head, 16).to_be_bytes()[..], &head[72..80]].concat().try_into().unwrap();
            let mut sealed = [&header_hash[..], &head, &block.payload].concat();
            let tag = cipher.seal_block(&nonce, &mut sealed, 128).unwrap();
            let offset = file.len();
            file.extend_from_slice(&sealed[32..]);
            file.extend_from_slice(&tag);
            file.extend_from_slice(&[0; 4]);
            fix_crc(&mut file[offset..]);
            digested.extend_from_slice(&head);
            digested.extend_from_slice(&hash(algorithm, &[&sealed[128..]]));
            digested.extend_from_slice(&tag);
            footer.block_count += 1;
            footer.body = hash(algorithm, &[&digested]);
            if header.kind != BlockKind::Mark {
                if footer.group_count == 0 {
                    footer.first_time_us = header.first_time_us;
                }
                if footer.index.last().is_none_or(|last| offset as u64 - last.offset >= 64 << 10) {
                    let (first_seq, first_time_us) =
                        (header.first_seq, header.first_time_us.max(footer.last_time_us));
                    footer.index.push(IndexEntry {
                        offset: offset as u64,
                        first_seq,
                        first_time_us,
                        block: header.number,
                    });
                }
                footer.group_count += u64::from(header.group_count);
                footer.log_count += u64::from(header.log_count);
                footer.raw_bytes += u64::from(header.list_len);
                footer.end_seq = header.end_seq();
                footer.last_time_us = footer.last_time_us.max(header.last_time_us);
            }
            if number < self.kept {
                end.blocks += 1;
                (end.bytes, end.end_seq) = (file.len() as u64, footer.end_seq);
                end.digest = footer.digest(algorithm, &header_hash);
                end.last_time_us =
                    if footer.group_count > 0 { footer.last_time_us } else { time_before_us };
            }
        }
        if self.footer.is_none() {
            file.extend_from_slice(&self.tail);
            return (file, end);
        }
        footer.offset = file.len() as u64;
        (self.index)(&mut footer.index);
        let encoded = patched(footer.encode(), &self.footer_patch);
        let tag = cipher.tag_only(&footer.nonce(), &encoded).unwrap();
        end.blocks = u32_at(&encoded, 16);
        end.end_seq = u64_at(&encoded, 48);
        let patched: [&[u8]; 3] = [&header_hash, &encoded[16..20], &encoded[96..128]];
        end.digest = hash(algorithm, &patched);
        end.last_time_us =
            if u64_at(&encoded, 24) > 0 { u64_at(&encoded, 64) } else { time_before_us };
        file.extend(footer.finish(encoded, &tag));
        end.bytes = file.len() as u64;
        (file, end)
    }
}
