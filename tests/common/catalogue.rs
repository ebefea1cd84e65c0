//! Catalogue files: finding the current file, and taking files apart and assembling them with the
//! keys.

use std::{
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use envelog::crypto::{SecretKey, hmac_sha256};
use serde_json::Value;

use super::write_private;

const SECTOR: usize = 512;
/// The length of both tips.
pub(crate) const TIPS_LEN: usize = 2 * SECTOR;
/// The length of a record's header, before its changes.
pub(crate) const RECORD_HEAD_LEN: usize = 24;
/// The length of tag and CRC, after the changes.
pub(crate) const RECORD_SUFFIX_LEN: usize = 36;

/// The directory of the catalogue files.
pub(crate) fn catalogue_dir(store_dir: &Path) -> PathBuf {
    store_dir.join("catalogue")
}

/// The current catalogue file, which is the newest one.
pub(crate) fn catalogue_file(store_dir: &Path) -> PathBuf {
    let entries =
        fs::read_dir(catalogue_dir(store_dir)).unwrap().map(|entry| entry.unwrap().path());
    newest(store_dir, entries).expect("a store has a catalogue")
}

/// The newest catalogue file among these paths.
pub(crate) fn newest(
    store_dir: &Path,
    paths: impl IntoIterator<Item = PathBuf>,
) -> Option<PathBuf> {
    let dir = catalogue_dir(store_dir);
    paths.into_iter().filter(|path| path.parent() == Some(&dir) && is_catalogue_file(path)).max()
}

/// Whether a path is that of a catalogue file.
pub(crate) fn is_catalogue_file(path: &Path) -> bool {
    let digits = |text: &str| text.len() == 10 && text.bytes().all(|byte| byte.is_ascii_digit());
    path.parent().is_some_and(|dir| dir.ends_with("catalogue"))
        && path
            .file_name()
            .and_then(|name| name.to_str()?.split_once('-'))
            .is_some_and(|(epoch, serial)| digits(epoch) && digits(serial))
}

/// The current metadata file in the directory of a Logstore, which is the newest one.
pub(crate) fn meta_path(logstore_dir: &Path) -> PathBuf {
    let entries = fs::read_dir(logstore_dir).unwrap().map(|entry| entry.unwrap().path());
    newest_meta(logstore_dir, entries).expect("a Logstore has metadata")
}

/// The newest metadata file of a Logstore among these paths.
pub(crate) fn newest_meta(
    logstore_dir: &Path,
    paths: impl IntoIterator<Item = PathBuf>,
) -> Option<PathBuf> {
    paths.into_iter().filter(|path| path.parent() == Some(logstore_dir) && is_meta(path)).max()
}

/// Whether a path is that of a metadata file.
pub(crate) fn is_meta(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.starts_with("meta-") && !name.contains('.')
}

/// The path of the second copy of a file.
pub(crate) fn copy_path(path: &Path) -> PathBuf {
    PathBuf::from(format!("{}.copy", path.display()))
}

/// Changes a file, and its second copy if it has one, in the same way.
pub(crate) fn write_both(path: &Path, bytes: &[u8]) {
    write_private(path, bytes);
    if copy_path(path).exists() {
        write_private(&copy_path(path), bytes);
    }
}

/// Removes a file and its second copy.
pub(crate) fn remove_both(path: &Path) {
    fs::remove_file(path).unwrap();
    let _ = fs::remove_file(copy_path(path));
}

/// The name of a metadata file.
pub(crate) fn meta_name(generation: u64, document: &[u8]) -> String {
    let tag: String = tag_a(document)[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("meta-{generation:010}-{tag}")
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// The offsets of the parts of a file.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    pub(crate) document: Range<usize>,
    pub(crate) tips: [Range<usize>; 2],
    pub(crate) records: Vec<Range<usize>>,
}

impl Layout {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let document = 0..80 + u32_at(bytes, 72) as usize + u32_at(bytes, 76) as usize + 68;
        let at = document.end.next_multiple_of(SECTOR);
        let tips = [at..at + SECTOR, at + SECTOR..at + TIPS_LEN];
        let mut records = Vec::new();
        let mut at = at + TIPS_LEN;
        while bytes.get(at..at + 4) == Some(b"ECHG") {
            let end = at + RECORD_HEAD_LEN + u32_at(bytes, at + 4) as usize + RECORD_SUFFIX_LEN;
            records.push(at..end);
            at = end;
        }
        Self { document, tips, records }
    }
}

/// Tag A of a document.
pub(crate) fn tag_a(document: &[u8]) -> [u8; 32] {
    document[document.len() - 68..][..32].try_into().unwrap()
}

/// The tag of a record.
pub(crate) fn record_tag(record: &[u8]) -> [u8; 32] {
    record[record.len() - RECORD_SUFFIX_LEN..][..32].try_into().unwrap()
}

fn with_crc(mut bytes: Vec<u8>) -> Vec<u8> {
    let crc = crc32fast::hash(&bytes);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes
}

/// Builds a record with these changes, which follows the record or document with the tag `before`.
pub(crate) fn record(
    number: u64,
    version: u32,
    changes: &[u8],
    before: &[u8; 32],
    key: &SecretKey,
) -> Vec<u8> {
    let len = changes.len() as u32;
    let head =
        [b"ECHG", &len.to_le_bytes(), &number.to_le_bytes()[..], &version.to_le_bytes(), &[0; 4]]
            .concat();
    let signed = [&head, changes].concat();
    let tag = hmac_sha256(key, &[&signed, before]);
    with_crc([&signed[..], &tag].concat())
}

/// Builds a tip for this slot.
pub(crate) fn tip(
    slot: u32,
    version: u32,
    number: u64,
    tag: &[u8; 32],
    key: &SecretKey,
) -> Vec<u8> {
    let signed = [
        b"ETIP",
        &slot.to_le_bytes(),
        &version.to_le_bytes(),
        &[0; 4],
        &number.to_le_bytes()[..],
        tag,
    ]
    .concat();
    let mut sector = with_crc([&signed[..], &hmac_sha256(key, &[&signed])].concat());
    sector.resize(SECTOR, 0);
    sector
}

/// Builds a file from this document, without records.
pub(crate) fn snapshot(document: &[u8], key: &SecretKey) -> Vec<u8> {
    let (version, number, tag) = (
        u32_at(document, 64),
        u64::from_le_bytes(document[56..64].try_into().unwrap()),
        tag_a(document),
    );
    let mut file = document.to_vec();
    file.resize(file.len().next_multiple_of(SECTOR), 0);
    for slot in 0..2 {
        file.extend(tip(slot, version, number, &tag, key));
    }
    file
}

/// Part A of the snapshot with the changes of all records applied, and the number of the last
/// record.
pub(crate) fn folded(file: &[u8]) -> (Value, u64) {
    let layout = Layout::of(file);
    let mut body: Value =
        serde_json::from_slice(&file[80..80 + u32_at(file, 72) as usize]).unwrap();
    let mut number = u64::from_le_bytes(file[56..64].try_into().unwrap());
    for record in layout.records {
        let record = &file[record];
        number = u64::from_le_bytes(record[8..16].try_into().unwrap());
        let changes: Value =
            serde_json::from_slice(&record[RECORD_HEAD_LEN..record.len() - RECORD_SUFFIX_LEN])
                .unwrap();
        changes.as_array().unwrap().iter().for_each(|change| apply(&mut body["catalogue"], change));
    }
    (body, number)
}

fn apply(catalogue: &mut Value, change: &Value) {
    let (kind, change) = change.as_object().unwrap().iter().next().unwrap();
    let name = change["name"].as_str().unwrap_or_default();
    let deleting =
        |catalogue: &Value| catalogue["deleting"].as_array().cloned().unwrap_or_default();
    match kind.as_str() {
        "created" => {
            let entry = ["id", "generation", "tag", "shards"]
                .map(|field| (field.to_owned(), change[field].clone()));
            catalogue["logstores"][name] = entry.into_iter().collect();
        }
        "replaced" => {
            for field in ["generation", "tag"] {
                catalogue["logstores"][name][field] = change[field].clone();
            }
        }
        "deleted" => {
            catalogue["logstores"].as_object_mut().unwrap().remove(name);
            let mut ids = deleting(catalogue);
            ids.push(change["id"].clone());
            catalogue["deleting"] = ids.into();
        }
        "removed" => {
            let mut ids = deleting(catalogue);
            ids.retain(|id| *id != change["id"]);
            catalogue["deleting"] = ids.into();
        }
        "reached" => {
            let known = &mut catalogue["logstores"][name]["shards"]
                [change["shard"].as_u64().unwrap() as usize]["head"];
            let reaches = |head: &Value| {
                (head["ordinal"].as_u64(), head["sealed"].as_bool(), head["blocks"].as_u64())
            };
            if reaches(known) <= reaches(&change["head"]) {
                *known = change["head"].clone();
            }
        }
        "dropped" => {
            let shard = &mut catalogue["logstores"][name]["shards"]
                [change["shard"].as_u64().unwrap() as usize];
            for field in ["first_ordinal", "first_seq"] {
                shard[field] = change[field].clone();
            }
        }
        "audited" => catalogue["audit"] = change.clone(),
        other => panic!("a change that no test knows: {other}"),
    }
}
