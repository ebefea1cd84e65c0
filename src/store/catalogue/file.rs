//! The bytes of a catalogue file: a snapshot, two tips, and a journal of changes.
//!
//! ```text
//! document | zeros to a multiple of 512 | tip 0 | tip 1 | record | record | …
//! ```
//!
//! The tag of each record covers the tag before it. The tag of the first record covers the tag of
//! the document. A tip names the last record that is known to be synced. The parity of the record
//! selects the slot of its tip. So an attacker without a key cannot cut off synced records,
//! although a torn last record is no fault.

use std::path::{Path, PathBuf};

use bytes::BufMut;
use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{Catalogue, Change};
use crate::{
    Error, Result,
    crypto::{SecretKey, hmac_sha256, tags_equal},
    document::{self, DOCUMENT_BYTES_MAX, Document, DocumentKind, to_json},
    error::Location,
    ids::StoreId,
    io::{self, Disk, Existing, OpenMode},
    keys::keyring::Keyring,
    wire::{Cursor, DecodeError, Features, put_crc, strip_crc},
};

/// The most changes in one record, so that none is longer than a few MiB.
pub(super) const CHANGES_MAX: usize = 4096;
/// The longest catalogue file in bytes. A writer begins another file long before this length.
const FILE_BYTES_MAX: u64 = 4 * DOCUMENT_BYTES_MAX;
/// A tip has a sector of its own, which the disk writes whole or not at all.
const SECTOR: usize = 512;
const TIPS_LEN: usize = 2 * SECTOR;
const RECORD_MAGIC: &[u8; 4] = b"ECHG";
const RECORD_FIXED_LEN: usize = 24;
const TIP_MAGIC: &[u8; 4] = b"ETIP";
const TIP_SIGNED_LEN: usize = 56;
const TIP_LEN: usize = TIP_SIGNED_LEN + TAG_LEN + CRC_LEN;
const TAG_LEN: usize = 32;
const CRC_LEN: usize = 4;
/// The number of attempts of a reader beside a writer.
const ATTEMPTS: u32 = 16;

/// The tag of a record, or of the snapshot.
pub(super) type Tag = [u8; TAG_LEN];

/// The place of a catalogue file in the order of all of them. A newer file has a higher place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    /// The epoch of the writer that made it.
    pub(crate) epoch: u64,
    /// The number of the file among those of this writer, from 1.
    pub(crate) serial: u64,
}

impl Place {
    pub(super) fn path(self, dir: &Path) -> PathBuf {
        dir.join(self.name())
    }

    fn name(self) -> String {
        format!("{:010}-{:010}", self.epoch, self.serial)
    }

    /// Parses the name of a catalogue file or of its second copy. `None` for any other name.
    fn parse(name: &str) -> Option<Self> {
        let name = io::original_name(name);
        let (epoch, serial) = name.split_once('-')?;
        let place = Self { epoch: epoch.parse().ok()?, serial: serial.parse().ok()? };
        (place.name() == name).then_some(place)
    }
}

/// Whether this is the name of a catalogue file or of its second copy.
pub(super) fn is_catalogue_file(name: &str) -> bool {
    Place::parse(name).is_some()
}

/// Whether this is the name of a catalogue file, of its second copy, or of a temporary file for
/// either.
pub(crate) fn is_catalogue_file_or_temporary(name: &str) -> bool {
    let stem = name.split('.').next().unwrap_or_default();
    is_catalogue_file(stem) && io::is_either_or_temporary(name, stem)
}

/// Whether the store in `dir` has a catalogue file.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn exists(disk: &dyn Disk, dir: &Path) -> Result<bool> {
    let dir = super::dir(dir);
    let entries = disk.list_dir(&dir).map_err(Error::io("list", dir));
    match entries {
        Ok(entries) => Ok(entries.iter().any(|entry| is_catalogue_file(&entry.name))),
        Err(error) if error.is_not_found() => Ok(false),
        Err(error) => Err(error),
    }
}

/// Part A of the snapshot.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body<C> {
    epoch: u64,
    serial: u64,
    catalogue: C,
}

/// The contents of a catalogue file.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) catalogue: Catalogue,
    pub(crate) place: Place,
    pub(crate) path: PathBuf,
    /// The feature bits of the snapshot.
    pub(crate) features: Features,
    /// The version of the service keyring that authenticates the last record.
    pub(crate) keyring_version: u32,
    /// The file, or its second copy, if that one is lost or damaged.
    pub(crate) lost: Option<PathBuf>,
}

/// The bytes of a new file without records, and the tag that the first record covers.
///
/// # Errors
/// The keyring has no newest version.
pub(super) fn encode_snapshot(
    catalogue: &Catalogue,
    place: Place,
    store: StoreId,
    keyring: &Keyring,
) -> Result<(Vec<u8>, Tag)> {
    let version = keyring.newest();
    let key = keyring.document_key(version)?;
    let body = Body { epoch: place.epoch, serial: place.serial, catalogue };
    let document =
        Document::new(DocumentKind::Catalogue, store, catalogue.generation, version, &body);
    let mut bytes = document.seal(&key);
    let tag = document::tag_a(&bytes);
    bytes.resize(bytes.len().next_multiple_of(SECTOR), 0);
    for slot in 0..2 {
        let tip = Tip { number: catalogue.generation, tag };
        bytes.extend_from_slice(&tip.encode(slot, version, &key));
    }
    Ok((bytes, tag))
}

/// The bytes of a record, and its tag.
pub(super) fn encode_record(
    number: u64,
    changes: &[&Change],
    before: &Tag,
    version: u32,
    key: &SecretKey,
) -> (Vec<u8>, Tag) {
    let changes = to_json(&changes);
    let mut out = Vec::with_capacity(RECORD_FIXED_LEN + changes.len() + TAG_LEN + CRC_LEN);
    out.put_slice(RECORD_MAGIC);
    out.put_u32_le(changes.len() as u32);
    out.put_u64_le(number);
    out.put_u32_le(version);
    out.put_u32_le(0);
    out.put_slice(changes.as_bytes());
    let tag = hmac_sha256(key, &[&out, before]);
    out.put_slice(&tag);
    put_crc(&mut out, 0);
    (out, tag)
}

/// The last record that is known to be synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tip {
    pub(super) number: u64,
    pub(super) tag: Tag,
}

impl Tip {
    /// Its sector, and the offset of the sector in a file whose snapshot and tips have
    /// `snapshot_len` bytes. The other slot keeps the tip before, because a crash may tear this
    /// one.
    pub(super) fn encode_at(
        &self,
        snapshot_len: u64,
        version: u32,
        key: &SecretKey,
    ) -> (u64, Vec<u8>) {
        let slot = (self.number % 2) as usize;
        let at = snapshot_len - TIPS_LEN as u64 + (slot * SECTOR) as u64;
        (at, self.encode(slot, version, key))
    }

    /// The sector of this slot.
    fn encode(&self, slot: usize, version: u32, key: &SecretKey) -> Vec<u8> {
        let mut out = Vec::with_capacity(SECTOR);
        out.put_slice(TIP_MAGIC);
        out.put_u32_le(slot as u32);
        out.put_u32_le(version);
        out.put_u32_le(0);
        out.put_u64_le(self.number);
        out.put_slice(&self.tag);
        debug_assert_eq!(out.len(), TIP_SIGNED_LEN);
        let tag = hmac_sha256(key, &[&out]);
        out.put_slice(&tag);
        put_crc(&mut out, 0);
        out.resize(SECTOR, 0);
        out
    }
}

/// Reads a file with the keys of the keyring.
struct Parser<'a> {
    bytes: &'a [u8],
    path: &'a Path,
    keyring: &'a Keyring,
    /// The key of the last version that was needed, with that version.
    key: Option<(u32, SecretKey)>,
    is_mirror: bool,
}

/// The bytes at the offset of a record.
enum Next {
    Record {
        end: usize,
        number: u64,
        version: u32,
        tag: Tag,
        changes: Vec<Change>,
    },
    /// No complete record.
    Nothing,
}

impl Parser<'_> {
    fn at(&self, offset: usize) -> Location {
        Location::new(self.path, offset as u64)
    }

    fn corrupt<T>(&self, offset: usize, rule: impl std::fmt::Display) -> Result<T> {
        Err(Error::corrupt(self.at(offset), format!("the catalogue: {rule}")))
    }

    fn tampered<T>(&self, offset: usize, what: &'static str) -> Result<T> {
        Err(Error::Tampered { at: self.at(offset), what })
    }

    fn key(&mut self, version: u32) -> Result<&SecretKey> {
        let key = match self.key.take().filter(|(known, _)| *known == version) {
            Some(known) => known,
            None => {
                let key = self.keyring.document_key(version);
                (version, key.map_err(|error| error.retired_in(self.path, "the catalogue"))?)
            }
        };
        Ok(&self.key.insert(key).1)
    }

    /// The tip in a slot; `None` for a tip that is not complete.
    fn tip(&mut self, start: usize, slot: usize) -> Result<Option<Tip>> {
        let at = start + slot * SECTOR;
        let sector = self.bytes.get(at..at + SECTOR).unwrap_or_default();
        let Some((used, rest)) = sector.split_at_checked(TIP_LEN) else { return Ok(None) };
        if strip_crc(used).is_err() || rest.iter().any(|&byte| byte != 0) {
            return Ok(None);
        }
        let decode = || {
            let mut cursor = Cursor::new(used);
            cursor.magic(TIP_MAGIC)?;
            let (place, version) = (cursor.u32()?, cursor.u32()?);
            cursor.zeros(4, "reserved bytes of a tip")?;
            let tip = Tip { number: cursor.u64()?, tag: cursor.array()? };
            Ok((place, version, tip, cursor.array::<TAG_LEN>()?))
        };
        let (place, version, tip, tag) =
            decode().map_err(|error: DecodeError| error.in_file(self.path, at as u64))?;
        let signed = used.get(..TIP_SIGNED_LEN).unwrap_or_default();
        let expected = hmac_sha256(self.key(version)?, &[signed]);
        if !tags_equal(&tag, &expected) || place as usize != slot {
            return self.tampered(at, "a tip of the catalogue");
        }
        Ok(Some(tip))
    }

    /// The record at an offset, whose tag covers `before`.
    fn record(&mut self, at: usize, before: &Tag) -> Result<Next> {
        let rest = self.bytes.get(at..).unwrap_or_default();
        let frame = || {
            let mut cursor = Cursor::new(rest);
            cursor.magic(RECORD_MAGIC)?;
            let len = cursor.u32()? as usize;
            let (number, version, reserved) = (cursor.u64()?, cursor.u32()?, cursor.u32()?);
            let changes = cursor.bytes(len)?;
            let tag: Tag = cursor.array()?;
            cursor.bytes(CRC_LEN)?;
            let end = RECORD_FIXED_LEN + len + TAG_LEN + CRC_LEN;
            strip_crc(Cursor::new(rest).bytes(end)?)?;
            Ok((end, number, version, reserved, changes, tag))
        };
        let Ok((len, number, version, reserved, changes, tag)) =
            frame().map_err(|error: DecodeError| error)
        else {
            return Ok(Next::Nothing);
        };
        let signed = rest.get(..len - TAG_LEN - CRC_LEN).unwrap_or_default();
        let expected = hmac_sha256(self.key(version)?, &[signed, before]);
        if !tags_equal(&tag, &expected) {
            return self.tampered(at, "a record of the catalogue");
        }
        if reserved != 0 {
            return self.corrupt(at + 20, "reserved bytes of a record are not zero");
        }
        match serde_json::from_slice(changes) {
            Ok(changes) => Ok(Next::Record { end: at + len, number, version, tag, changes }),
            Err(error) => {
                self.corrupt(at + RECORD_FIXED_LEN, format!("a record does not parse: {error}"))
            }
        }
    }

    fn parse(&mut self, expected: Option<Place>, store: StoreId) -> Result<Loaded> {
        let len = document::framed_len(self.bytes).map_err(|error| error.in_file(self.path, 0))?;
        let whole =
            Cursor::new(self.bytes).bytes(len).map_err(|error| error.in_file(self.path, 0))?;
        let keyring = self.keyring;
        let document = document::open(whole, DocumentKind::Catalogue, self.path, |version| {
            keyring.document_key(version)
        })?;
        if document.store != store {
            return self.tampered(24, "the catalogue of another store");
        }
        let body: Body<Catalogue> = match serde_json::from_slice(&document.a) {
            Ok(body) => body,
            Err(error) => return self.corrupt(80, format!("it does not parse: {error}")),
        };
        let place = Place { epoch: body.epoch, serial: body.serial };
        if expected.is_some_and(|expected| expected != place) {
            return self.tampered(80, "the catalogue under another name");
        }
        let mut catalogue = body.catalogue;
        if let Err(rule) = catalogue.check() {
            return self.corrupt(80, rule);
        }
        catalogue.generation = document.generation;

        let tips_at = len.next_multiple_of(SECTOR);
        let between = self.bytes.get(len..).unwrap_or_default();
        if between.iter().take(tips_at - len).any(|&byte| byte != 0) {
            return self.corrupt(len, "it does not continue with zeros");
        }
        if self.bytes.len() < tips_at + TIPS_LEN {
            return Err(Error::truncated(
                self.at(self.bytes.len()),
                "the catalogue ends before its tips do",
            ));
        }
        let snapshot = Tip { number: document.generation, tag: document::tag_a(whole) };
        let tips = match self.is_mirror {
            true => [Some(snapshot); 2],
            false => [self.tip(tips_at, 0)?, self.tip(tips_at, 1)?],
        };
        let (mut last, mut version, mut at) =
            (snapshot, document.keyring_version, tips_at + TIPS_LEN);
        let mut confirmed = tips.map(|tip| tip.is_none_or(|tip| tip == snapshot));
        while let Next::Record { end, number, version: under, tag, changes } =
            self.record(at, &last.tag)?
        {
            if under < version {
                return self
                    .tampered(at + 16, "a record of the catalogue under an older service key");
            }
            if Some(number) != last.number.checked_add(1) || number == u64::MAX {
                return self.corrupt(at + 8, "the number of a record is not the next one");
            }
            for change in &changes {
                if let Err(rule) = catalogue.apply(change) {
                    return self.corrupt(at + RECORD_FIXED_LEN, rule);
                }
            }
            (last, version, at) = (Tip { number, tag }, under, end);
            for (tip, confirmed) in tips.iter().zip(&mut confirmed) {
                *confirmed |= *tip == Some(last);
            }
        }
        self.check_tips(tips_at, tips, confirmed, last, at)?;
        catalogue.generation = last.number;
        let (path, features) = (self.path.to_owned(), document.features);
        let lost = None;
        Ok(Loaded { catalogue, place, path, features, keyring_version: version, lost })
    }

    /// Checks the tips against the last record, which ends at `end`.
    fn check_tips(
        &self,
        tips_at: usize,
        tips: [Option<Tip>; 2],
        confirmed: [bool; 2],
        last: Tip,
        end: usize,
    ) -> Result<()> {
        let missing = |number: u64| {
            let rest = self.bytes.get(end..).unwrap_or_default();
            let what = format!(
                "the catalogue ends with record {}, record {number} was synced",
                last.number
            );
            if rest.iter().all(|&byte| byte == 0) || is_cut_record(rest) {
                Err(Error::truncated(self.at(end), what))
            } else {
                Err(Error::corrupt(self.at(end), what))
            }
        };
        if let Some(tip) = tips.iter().flatten().find(|tip| tip.number > last.number) {
            return missing(tip.number);
        }
        if let Some(slot) = confirmed.iter().position(|confirmed| !confirmed) {
            return self.tampered(tips_at + slot * SECTOR, "a tip of another catalogue");
        }
        match tips {
            [Some(_), Some(_)] => Ok(()),
            // A crash tore the tip of the next record, which was synced before its tip was written.
            [Some(tip), None] | [None, Some(tip)] if last.number > tip.number => Ok(()),
            [Some(tip), None] | [None, Some(tip)] => missing(tip.number + 1),
            [None, None] => self.corrupt(tips_at, "neither of its tips is whole"),
        }
    }
}

/// Whether the bytes are an incomplete record, by its magic and by the length that it claims.
fn is_cut_record(bytes: &[u8]) -> bool {
    let mut cursor = Cursor::new(bytes);
    if cursor.magic(RECORD_MAGIC).is_err() {
        return RECORD_MAGIC.starts_with(bytes);
    }
    let len =
        cursor.u32().map_or(usize::MAX, |len| RECORD_FIXED_LEN + len as usize + TAG_LEN + CRC_LEN);
    bytes.len() < len
}

/// Writes the catalogue of a new store, under an epoch below that of every writer. The first writer
/// replaces it when it opens the store.
pub(crate) fn write_first(
    disk: &dyn Disk,
    dir: &Path,
    store: StoreId,
    keyring: &Keyring,
) -> Result<()> {
    let place = Place { epoch: 0, serial: 1 };
    let path = place.path(&super::dir(dir));
    let catalogue = Catalogue { generation: 1, ..Catalogue::default() };
    let (bytes, _) = encode_snapshot(&catalogue, place, store, keyring)?;
    io::write_twice(disk, &path, &bytes, Existing::Keep).map_err(Error::io("write", path))
}

/// Writes a catalogue into the copy of a store in `dir`, in two new files of this epoch, and removes
/// the other files. The caller holds the lock of the copy.
///
/// # Errors
/// [`Error::Io`]; the keyring has no newest version.
pub(crate) fn write_copy(
    disk: &dyn Disk,
    dir: &Path,
    store: StoreId,
    keyring: &Keyring,
    catalogue: &Catalogue,
    epoch: u64,
) -> Result<()> {
    let dir = super::dir(dir);
    let entries = disk.list_dir(&dir).map_err(Error::io("list", &dir))?;
    let places = entries.iter().filter_map(|entry| Place::parse(&entry.name));
    let newest = places.max().unwrap_or(Place { epoch, serial: 0 });
    let place = match newest.epoch.cmp(&epoch) {
        std::cmp::Ordering::Less => Place { epoch, serial: 1 },
        _ => Place { serial: newest.serial.saturating_add(1), ..newest },
    };
    let (bytes, _) = encode_snapshot(catalogue, place, store, keyring)?;
    let path = place.path(&dir);
    io::write_twice(disk, &path, &bytes, Existing::Keep).map_err(Error::io("write", &path))?;
    for other in entries.iter().filter(|entry| is_catalogue_file(&entry.name)) {
        let other = dir.join(&other.name);
        disk.remove_file(&other).map_err(Error::io("remove", other))?;
    }
    disk.sync_dir(&dir).map_err(Error::io("sync", dir))
}

/// The highest epoch in the names of the catalogue files in `dir`. It is not authenticated.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn newest_epoch(disk: &dyn Disk, dir: &Path) -> Result<u64> {
    let dir = super::dir(dir);
    let entries = match disk.list_dir(&dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        entries => entries.map_err(Error::io("list", dir))?,
    };
    let epochs =
        entries.iter().filter_map(|entry| Place::parse(&entry.name)).map(|place| place.epoch);
    Ok(epochs.max().unwrap_or(0))
}

/// Reads a copy of a catalogue file from an anchor, which names the copy `path`. Ignores its tips,
/// because they may name records after the copied ones.
///
/// # Errors
/// The integrity errors of the catalogue.
pub(crate) fn load_mirror(
    bytes: &[u8],
    path: &Path,
    store: StoreId,
    keyring: &Keyring,
) -> Result<Catalogue> {
    let loaded = Parser { bytes, path, keyring, key: None, is_mirror: true }.parse(None, store)?;
    Ok(loaded.catalogue)
}

/// Reads the newest catalogue file of the store in `dir`.
///
/// # Errors
/// The integrity errors of the catalogue, and [`Error::Io`].
pub(crate) fn load_newest(
    disk: &dyn Disk,
    dir: &Path,
    store: StoreId,
    keyring: &Keyring,
) -> Result<Loaded> {
    let dir = super::dir(dir);
    let missing = || Error::truncated(Location::new(&dir, 0), "the catalogue is missing");
    let mut found = None;
    for _ in 0..ATTEMPTS {
        let entries = match disk.list_dir(&dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(missing()),
            entries => entries.map_err(Error::io("list", &dir))?,
        };
        let Some(place) = entries.iter().filter_map(|entry| Place::parse(&entry.name)).max() else {
            return Err(missing());
        };
        let path = place.path(&dir);
        match load(disk, place, &path, store, keyring) {
            // The writer has begun another file in between.
            Err(error) if error.is_not_found() => found = Some(path),
            loaded => return loaded,
        }
    }
    Err(found
        .map_or_else(missing, |path| Error::io("read", path)(std::io::ErrorKind::NotFound.into())))
}

/// Loads the catalogue file at a place, or its second copy: the one that reaches further, since the
/// other may lack a record that was not synced, or may be an older one.
///
/// # Errors
/// The integrity errors of the file if neither can be loaded. [`Error::WrongFileType`] if the file
/// is none.
fn load(
    disk: &dyn Disk,
    place: Place,
    path: &Path,
    store: StoreId,
    keyring: &Keyring,
) -> Result<Loaded> {
    let parse = |path: &Path, bytes: &[u8]| {
        Parser { bytes, path, keyring, key: None, is_mirror: false }.parse(Some(place), store)
    };
    let beside = io::copy_path(path);
    let original = read(disk, path).map_err(Error::io("read", path));
    let copy = read(disk, &beside).map_err(Error::io("read", &beside));
    if let (Ok(original), Ok(copy)) = (&original, &copy)
        && original == copy
    {
        return parse(path, original);
    }
    let original = original.and_then(|bytes| parse(path, &bytes));
    let copy = copy.and_then(|bytes| parse(&beside, &bytes));
    let (loaded, lost) = match (original, copy) {
        (Ok(original), Ok(copy)) if copy.catalogue.generation > original.catalogue.generation => {
            (copy, None)
        }
        (Ok(original), Ok(_)) => (original, None),
        (Ok(original), Err(error)) => (original, Some((beside, error))),
        (Err(error), Ok(copy)) if document::may_be_lost(&error) => {
            (copy, Some((path.to_owned(), error)))
        }
        (Err(error), Err(of_copy)) => return Err(document::error_of_both(error, of_copy)),
        (Err(error), Ok(_)) => return Err(error),
    };
    if let Some((path, error)) = &lost {
        warn!(path = %path.display(), %error, "catalogue file lost or damaged; the other copy is in use");
    }
    Ok(Loaded { lost: lost.map(|(path, _)| path), ..loaded })
}

/// Reads a whole file that a writer may be appending to. Reads it again if it has grown, because a
/// tip must not be read without the record that it names.
fn read(disk: &dyn Disk, path: &Path) -> std::io::Result<Vec<u8>> {
    let file = disk.open(path, OpenMode::Read)?;
    let mut bytes = io::read_open_file(&*file, FILE_BYTES_MAX)?;
    for _ in 0..ATTEMPTS {
        if file.len()? == bytes.len() as u64 {
            break;
        }
        bytes = io::read_open_file(&*file, FILE_BYTES_MAX)?;
    }
    Ok(bytes)
}
