//! The authenticated files of a store: hostile bytes replace one of them, and the store is then
//! used.
//!
//! The first byte decides how the rest becomes a file. The rest may be the file unchanged. Its
//! CRC32 may be corrected, as by an attacker who knows the format. Its tag may be corrected too, as
//! by an attacker who has the service keyring. Or the rest holds the bodies of such a file, in a
//! correct frame. The last two check only that the engine does not panic, not that it detects
//! everything: the engine believes a holder of the keyring.

use std::{path::Path, time::Duration};

use envelog::{
    Cmk,
    crypto::{HashAlg, SecretKey, derive, hmac_sha256},
    kms::{EncryptionContext, Kms, KmsCall, LocalKms},
};
use serde_json::Value;

use crate::{
    common::{catalogue as common, memory::Image},
    crc,
    golden::{Golden, KEYRING, golden, picked, shown},
};

const FRAME_LEN: usize = 80;
const LENGTHS_AT: usize = 72;
const SUFFIX_LEN: usize = 32 + 32 + 4;

/// Ends part A where a file is given by its bodies. It never occurs in JSON.
pub const BODIES_END: u8 = 0xff;

/// The way from bytes to a file.
enum Making {
    AsIs,
    Crc,
    Tagged,
    Bodies,
}

impl Making {
    fn of(byte: u8) -> Self {
        match byte % 4 {
            0 => Self::AsIs,
            1 => Self::Crc,
            2 => Self::Tagged,
            _ => Self::Bodies,
        }
    }

    /// The file that replaces `original`.
    fn make(&self, bytes: &[u8], original: &[u8], key: &SecretKey) -> Vec<u8> {
        match self {
            Self::AsIs => bytes.to_vec(),
            Self::Crc => {
                let mut file = bytes.to_vec();
                crc::document(&mut file);
                file
            }
            Self::Tagged => tagged(bytes.to_vec(), key),
            Self::Bodies => {
                let mut bodies = bytes.splitn(2, |&byte| byte == BODIES_END);
                let (a, b) = (bodies.next().unwrap_or_default(), bodies.next().unwrap_or_default());
                framed(original, a, b, key)
            }
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?) as usize)
}

/// The bodies of a document.
pub fn bodies(document: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len_a, len_b) = (u32_at(document, LENGTHS_AT)?, u32_at(document, LENGTHS_AT + 4)?);
    Some(document.get(FRAME_LEN..)?.split_at_checked(len_a)?)
        .and_then(|(a, rest)| Some((a, rest.get(..len_b)?)))
}

/// Corrects tag A and the CRC32 of the document.
fn tagged(mut document: Vec<u8>, key: &SecretKey) -> Vec<u8> {
    let Some((a, b)) = bodies(&document) else { return document };
    let signed = FRAME_LEN + a.len() + b.len();
    if document.len() == signed + SUFFIX_LEN {
        let tag = hmac_sha256(key, &[&document[..signed], &document[signed + 32..signed + 64]]);
        document[signed..signed + 32].copy_from_slice(&tag);
        crc::document(&mut document);
    }
    document
}

/// The document with other bodies.
fn framed(original: &[u8], a: &[u8], b: &[u8], key: &SecretKey) -> Vec<u8> {
    let mut document = original[..LENGTHS_AT].to_vec();
    for part in [a, b] {
        document.extend_from_slice(&(part.len() as u32).to_le_bytes());
    }
    document.extend_from_slice(a);
    document.extend_from_slice(b);
    document.extend_from_slice(&original[original.len() - SUFFIX_LEN..]);
    tagged(document, key)
}

/// The newest root in part A of a keyring.
fn newest_root(a: &[u8]) -> Option<SecretKey> {
    let body: Value = serde_json::from_slice(a).ok()?;
    let hex = body["versions"].as_array()?.last()?["root"].as_str()?;
    let mut root = [0; 32];
    for (byte, at) in root.iter_mut().zip((0..).step_by(2)) {
        *byte = u8::from_str_radix(hex.get(at..at + 2)?, 16).ok()?;
    }
    Some(SecretKey::from_bytes(&mut root))
}

fn derived(root: &SecretKey, label: &str) -> SecretKey {
    derive(HashAlg::Sha256, &[], root, &[label.as_bytes()])
}

fn root_of(golden: &Golden) -> SecretKey {
    let keyring = &golden.image.files[Path::new(KEYRING)];
    bodies(keyring).and_then(|(a, _)| newest_root(a)).expect("a golden keyring has a root")
}

/// Uses a golden store, chosen by the second byte, after replacing one of its files by the bytes
/// behind it.
fn examine_and_recover(data: &[u8], is_it: impl Fn(&Path) -> bool) {
    let Some((&[making, which], bytes)) = data.split_first_chunk() else { return };
    let golden = picked(which);
    let Some((path, original)) = golden.image.files.iter().find(|(path, _)| is_it(path)) else {
        return;
    };
    let key = derived(&root_of(golden), "envelog v2 document");
    let image = golden.image.with(path, Making::of(making).make(bytes, original, &key));
    golden.examine(&image);
    golden.recover(&image);
}

/// The metadata of a Logstore. The catalogue names it, or a reader would not look further than its
/// tag.
pub fn metadata(data: &[u8]) {
    let Some((&[making, which], bytes)) = data.split_first_chunk() else { return };
    let golden = picked(which);
    let Some((path, original)) = golden.image.files.iter().find(|(path, _)| common::is_meta(path))
    else {
        return;
    };
    let key = derived(&root_of(golden), "envelog v2 document");
    let image = named_metadata(golden, path, Making::of(making).make(bytes, original, &key), &key);
    golden.examine(&image);
    golden.recover(&image);
}

/// A golden store with other metadata in place of the file `path`, and a catalogue that names it.
fn named_metadata(golden: &Golden, path: &Path, metadata: Vec<u8>, key: &SecretKey) -> Image {
    let files = &golden.image.files;
    let catalogue = files.iter().find(|(path, _)| is_catalogue_file(path));
    let (Some((catalogue, file)), Some(dir)) = (catalogue, path.parent()) else {
        return golden.image.clone();
    };
    if metadata.len() < SUFFIX_LEN {
        return golden.image.with(path, metadata);
    }
    let tag: String = common::tag_a(&metadata).iter().map(|byte| format!("{byte:02x}")).collect();
    let (mut body, number) = common::folded(file);
    let entries = body["catalogue"]["logstores"].as_object_mut().into_iter().flatten();
    let Some((_, entry)) = entries
        .into_iter()
        .find(|(_, entry)| entry["id"].as_str().is_some_and(|id| dir.ends_with(id)))
    else {
        return golden.image.clone();
    };
    entry["tag"] = tag.into();
    let name = common::meta_name(entry["generation"].as_u64().unwrap_or_default(), &metadata);
    let mut original = file[crc::catalogue_layout(file).document].to_vec();
    original[56..64].copy_from_slice(&number.to_le_bytes());
    let document = framed(&original, body.to_string().as_bytes(), b"", key);
    let image = golden.image.without(path).with(&dir.join(name), metadata);
    image.with(catalogue, common::snapshot(&document, key))
}

/// `STORE`, the catalogue, or a probe.
pub fn catalogue(data: &[u8]) {
    let Some((&which, rest)) = data.split_first() else { return };
    match which % 3 {
        0 => catalogue_file(rest),
        1 => examine_and_recover(rest, |path| path.ends_with("STORE")),
        _ => examine_and_recover(rest, |path| {
            path.parent().is_some_and(|dir| dir.ends_with("probes"))
        }),
    }
}

/// A file of the catalogue. Its bodies are those of the snapshot and of each record.
fn catalogue_file(data: &[u8]) {
    let Some((&[making, which], bytes)) = data.split_first_chunk() else { return };
    let golden = picked(which);
    let Some((path, original)) =
        golden.image.files.iter().find(|(path, _)| is_catalogue_file(path))
    else {
        return;
    };
    let key = derived(&root_of(golden), "envelog v2 document");
    let file = match Making::of(making) {
        Making::AsIs => bytes.to_vec(),
        Making::Crc => {
            let mut file = bytes.to_vec();
            crc::catalogue(&mut file);
            file
        }
        Making::Tagged => tagged_catalogue(bytes.to_vec(), &key),
        Making::Bodies => {
            let mut bodies = bytes.split(|&byte| byte == BODIES_END);
            let original = &original[crc::catalogue_layout(original).document];
            let document = framed(original, bodies.next().unwrap_or_default(), b"", &key);
            let number = u64::from_le_bytes(*document[56..].first_chunk().expect("a frame"));
            let version = u32::from_le_bytes(*document[64..].first_chunk().expect("a frame"));
            let mut before = common::tag_a(&document);
            let mut file = common::snapshot(&document, &key);
            for (number, changes) in (number + 1..).zip(bodies) {
                let record = common::record(number, version, changes, &before, &key);
                before = common::record_tag(&record);
                file.extend(record);
            }
            file
        }
    };
    let image = golden.image.with(path, file);
    golden.examine(&image);
    golden.recover(&image);
}

/// Corrects every tag in the file. Each tag depends on those before it.
fn tagged_catalogue(mut file: Vec<u8>, key: &SecretKey) -> Vec<u8> {
    let layout = crc::catalogue_layout(&file);
    let Some(document) = file.get(layout.document.clone()) else { return file };
    let document = tagged(document.to_vec(), key);
    let mut before = common::tag_a(&document);
    file[layout.document].copy_from_slice(&document);
    for tip in layout.tips {
        let tag = hmac_sha256(key, &[&file[tip.start..tip.end - 36]]);
        file[tip.end - 36..tip.end - 4].copy_from_slice(&tag);
    }
    for record in layout.records {
        before = hmac_sha256(key, &[&file[record.start..record.end - 36], &before]);
        file[record.end - 36..record.end - 4].copy_from_slice(&before);
    }
    crc::catalogue(&mut file);
    file
}

/// The bodies of a file of the catalogue: the snapshot's, and the changes of each record.
#[must_use]
pub fn catalogue_bodies(file: &[u8]) -> Option<Vec<u8>> {
    let mut found = bodies(file)?.0.to_vec();
    for record in crc::catalogue_layout(file).records {
        found.push(BODIES_END);
        found.extend_from_slice(
            &file[record.start + common::RECORD_HEAD_LEN..record.end - common::RECORD_SUFFIX_LEN],
        );
    }
    Some(found)
}

/// Whether a path is the path of a Logstore's metadata.
pub fn is_meta(path: &Path) -> bool {
    common::is_meta(path)
}

/// Whether a path is the path of a file of the catalogue.
#[must_use]
pub fn is_catalogue_file(path: &Path) -> bool {
    common::is_catalogue_file(path)
}

/// The service keyring. A key inside it makes its tag, so any attacker can forge it.
pub fn keyring(data: &[u8]) {
    let Some((&[making, which], bytes)) = data.split_first_chunk() else { return };
    let golden = picked(which);
    let path = Path::new(KEYRING);
    let making = Making::of(making);
    let a = match making {
        Making::Bodies => Some(bytes),
        _ => bodies(bytes).map(|(a, _)| a),
    };
    let root = a.and_then(newest_root).unwrap_or_else(|| root_of(golden));
    let key = derived(&root, "envelog v2 document");
    golden.examine(&golden.image.with(path, making.make(bytes, &golden.image.files[path], &key)));
}

/// A wrapped data key, in otherwise valid metadata: under the service key, or under the embedded
/// KMS.
pub fn envelope(data: &[u8]) {
    let Some((&which, wrapped)) = data.split_first() else { return };
    let golden =
        golden(["service-aes", "service-sm4", "byok-aes", "switched-off"][usize::from(which % 4)]);
    let mut files = golden.image.files.iter();
    let (path, original) =
        files.find(|(path, _)| common::is_meta(path)).expect("it has a Logstore");
    let (a, b) = bodies(original).expect("golden metadata");
    let mut keys: Value = serde_json::from_slice(b).expect("a golden keys section");
    let newest =
        keys["versions"].as_array_mut().and_then(|all| all.last_mut()).expect("it has a data key");
    let hex: String = wrapped.iter().map(|byte| format!("{byte:02x}")).collect();
    let intact = newest["wrapped"] == Value::String(hex.clone());
    newest["wrapped"] = Value::String(hex);
    let key = derived(&root_of(golden), "envelog v2 document");
    let file = framed(original, a, keys.to_string().as_bytes(), &key);
    golden.examine(&named_metadata(golden, path, file, &key));
    if which % 4 == 2 {
        let cmk: Cmk = serde_json::from_value(keys["cmk"].clone()).expect("a golden master key");
        let context = EncryptionContext::new();
        let call = KmsCall { cmk: &cmk, context: &context, timeout: Duration::from_secs(1) };
        let kms = LocalKms::at(
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v2/byok-aes/kms"),
        );
        assert!(
            kms.unwrap(&call, wrapped).is_err(),
            "unwrapped under another context, intact: {intact}"
        );
    }
}

/// The key audit log: unchanged, with corrected CRC32s, or as records with a valid chain.
pub fn audit(data: &[u8]) {
    let Some((&[making, which], bytes)) = data.split_first_chunk() else { return };
    let golden = picked(which);
    let (path, _) = golden.files(".log").next().expect("every store has an audit log");
    let mut log = bytes.to_vec();
    match Making::of(making) {
        Making::AsIs => {}
        Making::Crc | Making::Tagged => crc::fix("audit-000001.log", &mut log),
        Making::Bodies => {
            let key = derived(&root_of(golden), "envelog v2 audit");
            let mut tag = String::new();
            log.clear();
            for record in bytes.split(|&byte| byte == b'\n').filter(|record| !record.is_empty()) {
                let bytes = hmac_sha256(&key, &[tag.as_bytes(), record]);
                tag = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
                log.extend_from_slice(record);
                log.extend_from_slice(format!("\t{tag}\t\n").as_bytes());
            }
            crc::fix("audit-000001.log", &mut log);
        }
    }
    golden.examine(&golden.image.with(path, log));
}

/// A key file of the embedded KMS. The first byte chooses the file that the rest replaces.
pub fn kms_files(data: &[u8]) {
    let Some((&which, bytes)) = data.split_first() else { return };
    let dir = tempfile::tempdir_in("/dev/shm")
        .or_else(|_| tempfile::tempdir())
        .expect("a temporary directory");
    let kms = LocalKms::create_or_open(dir.path().join("kms")).expect("a new KMS");
    let id = kms.create_key("cn-hangzhou", &["role"]).expect("a new key");
    let cmk = Cmk { cmk_key_id: id.clone(), arn: "role".into(), region_id: "cn-hangzhou".into() };
    let context = EncryptionContext::new();
    let call = KmsCall { cmk: &cmk, context: &context, timeout: Duration::from_secs(1) };
    let mut secret = [7; 32];
    let wrapped =
        kms.wrap(&call, &SecretKey::from_bytes(&mut secret)).expect("a key that is enabled");
    let file = if which % 2 == 0 { format!("keys/{id}.json") } else { "kms.json".into() };
    std::fs::write(dir.path().join("kms").join(file), bytes).expect("a temporary file");
    let kms = LocalKms::at(dir.path().join("kms"));
    if let Some(key) = shown(kms.unwrap(&call, &wrapped)) {
        assert_eq!(key.expose(), &[7; 32]);
    }
    shown(kms.list());
    let _ = kms.serves("cn-hangzhou");
    shown(kms.rotate(&id));
    shown(kms.disable(&id));
    shown(kms.enable(&id));
    shown(kms.schedule_deletion(&id, 7));
    shown(kms.cancel_deletion(&id));
    shown(kms.wrap(&call, &SecretKey::from_bytes(&mut [7; 32])));
}
