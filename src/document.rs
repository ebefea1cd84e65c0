//! The frame of an authenticated document: store, catalogue, Logstore metadata, probe, keyring,
//! checkpoint.
//!
//! A document has two parts. Tag A, under a key of the service keyring, authenticates everything,
//! including tag B. Tag B, under a key derived from a Logstore's data key, authenticates the
//! document's identity and part B alone. So part B can be trusted without the keyring.

use std::path::Path;

use bytes::BufMut;
use serde::Serialize;
use tracing::warn;
use zeroize::Zeroize;

use crate::{
    Error,
    crypto::{SecretKey, hmac_sha256, tags_equal},
    error::Location,
    ids::StoreId,
    io,
    wire::{CRC_LEN, Cursor, DecodeError, Features, put_crc, require, strip_crc},
};

const MAGIC: &[u8; 8] = b"ENVLDOC\0";
const VERSION: u16 = 2;
const FIXED_LEN: usize = 80;
/// The offset of the lengths of the two parts.
const LENGTHS_AT: usize = 72;
const TAG_LEN: usize = 32;

/// Whether the second copy of a file may take its place after this error of the file. A file of the
/// wrong type, or one of another version of envelog, is neither lost nor damaged.
pub(crate) fn may_be_lost(error: &Error) -> bool {
    !matches!(
        error,
        Error::WrongFileType { .. }
            | Error::NewerFormat { .. }
            | Error::OlderFormat { .. }
            | Error::UnsupportedFeature { .. }
    )
}

/// Loads a document that exists twice: from its file `path`, or from the second copy if the file is
/// lost or damaged.
///
/// # Errors
/// As [`error_of_both`] says, if neither can be loaded.
pub(crate) fn load_either<T>(
    path: &Path,
    mut load: impl FnMut(&Path) -> crate::Result<T>,
) -> crate::Result<T> {
    let error = match load(path) {
        Err(error) if may_be_lost(&error) => error,
        loaded => return loaded,
    };
    let loaded =
        load(&io::copy_path(path)).map_err(|of_copy| error_of_both(error.clone(), of_copy))?;
    warn!(path = %path.display(), %error, "file lost or damaged; its second copy is in use");
    Ok(loaded)
}

/// The error of a file and its second copy that cannot be loaded: that of the file; that of the
/// second copy, if the file does not exist.
pub(crate) fn error_of_both(of_file: Error, of_copy: Error) -> Error {
    match of_file.is_not_found() && !of_copy.is_not_found() {
        true => of_copy,
        false => of_file,
    }
}

/// The longest document in bytes.
pub(crate) const DOCUMENT_BYTES_MAX: u64 = 128 << 20;

/// An incompatible feature of the metadata of a Logstore: shards of it were split or merged.
pub(crate) const RESHARDED: u32 = 1;

/// The type of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DocumentKind {
    Store,
    Catalogue,
    Logstore,
    Probe,
    Keyring,
    Checkpoint,
    /// The record of an unfinished creation.
    Creation,
}

impl DocumentKind {
    const ALL: [Self; 7] = [
        Self::Store,
        Self::Catalogue,
        Self::Logstore,
        Self::Probe,
        Self::Keyring,
        Self::Checkpoint,
        Self::Creation,
    ];

    fn code(self) -> u16 {
        match self {
            Self::Store => 1,
            Self::Catalogue => 2,
            Self::Logstore => 3,
            Self::Probe => 4,
            Self::Keyring => 5,
            Self::Checkpoint => 6,
            Self::Creation => 7,
        }
    }

    /// The incompatible features that this build knows.
    fn known_features(self) -> u32 {
        match self {
            Self::Logstore => RESHARDED,
            _ => 0,
        }
    }

    /// The name in error messages.
    fn what(self) -> &'static str {
        match self {
            Self::Store => "the identity of the store",
            Self::Catalogue => "the catalogue",
            Self::Logstore => "the metadata of a Logstore",
            Self::Probe => "the probe of a master key",
            Self::Keyring => "the service keyring",
            Self::Checkpoint => "the checkpoint",
            Self::Creation => "the record of a creation",
        }
    }
}

/// A value as JSON, for the part of a document or for a record. Every type that is stored so is plain
/// data, which always serializes: no map has a key that is not text.
pub(crate) fn to_json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("plain data always serializes")
}

/// A tag does not match: another key made it, or an attacker has altered the document.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the authentication tag does not hold")]
pub(crate) struct TagMismatch;

/// A document. If it comes from [`UnverifiedDocument::verify`], everything but tag B is authentic.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Document {
    pub(crate) kind: DocumentKind,
    pub(crate) features: Features,
    pub(crate) store: StoreId,
    /// The id of its subject, if there may be several: a Logstore's, probe's or keyring's id.
    /// Otherwise zero.
    pub(crate) subject: [u8; 16],
    /// Counts the replacements of this document.
    pub(crate) generation: u64,
    /// The version of the service keyring whose key authenticates it by tag A.
    pub(crate) keyring_version: u32,
    /// Part A. Only tag A authenticates it.
    pub(crate) a: Vec<u8>,
    /// Part B. Tag B authenticates it too.
    pub(crate) b: Vec<u8>,
    /// Tag B, if there is one. It stays valid while kind, store, subject and part B are unchanged,
    /// even if other fields change. So a writer can replace the document while the data key is
    /// unavailable.
    pub(crate) tag_b: Option<[u8; TAG_LEN]>,
}

impl Document {
    /// A document about the store itself: part A is the body, and there is no part B.
    pub(crate) fn new(
        kind: DocumentKind,
        store: StoreId,
        generation: u64,
        keyring_version: u32,
        body: &impl Serialize,
    ) -> Self {
        Self {
            kind,
            features: Features::default(),
            store,
            subject: [0; 16],
            generation,
            keyring_version,
            a: to_json(body).into_bytes(),
            b: Vec::new(),
            tag_b: None,
        }
    }

    /// Checks the rules for the fields of the frame.
    ///
    /// # Errors
    /// [`Error::Corrupt`], with the rule that it breaks.
    pub(crate) fn check_frame(&self, path: &Path) -> Result<(), Error> {
        let broken =
            |at: usize, rule: &str| Err(Error::corrupt(Location::new(path, at as u64), rule));
        // Each generation must have a successor.
        if !(1..u64::MAX).contains(&self.generation) {
            return broken(56, "the generation of a document is out of range");
        }
        let has_b = self.kind == DocumentKind::Logstore && !self.b.is_empty();
        if !has_b && (!self.b.is_empty() || self.tag_b.is_some()) {
            return broken(
                FIXED_LEN + self.a.len(),
                "a document has a second part or tag that its kind has not",
            );
        }
        Ok(())
    }

    /// Computes tag B.
    pub(crate) fn sign_b(&mut self, key_b: &SecretKey) {
        self.tag_b = Some(self.make_tag_b(key_b));
    }

    /// Verifies tag B. It authenticates kind, store, subject and part B, and nothing else.
    ///
    /// # Errors
    /// Tag B does not match, or there is none.
    pub(crate) fn verify_b(&self, key_b: &SecretKey) -> Result<(), TagMismatch> {
        match self.tag_b {
            Some(tag) if tags_equal(&tag, &self.make_tag_b(key_b)) => Ok(()),
            _ => Err(TagMismatch),
        }
    }

    fn make_tag_b(&self, key_b: &SecretKey) -> [u8; TAG_LEN] {
        let (version, kind) = (VERSION.to_le_bytes(), self.kind.code().to_le_bytes());
        hmac_sha256(key_b, &[&version, &kind, self.store.as_bytes(), &self.subject, &self.b])
    }

    /// Encodes the document for a file, with tag A by `key_a`, and with tag B unchanged.
    pub(crate) fn seal(&self, key_a: &SecretKey) -> Vec<u8> {
        let len = FIXED_LEN + self.a.len() + self.b.len() + 2 * TAG_LEN + CRC_LEN;
        debug_assert!(len as u64 <= DOCUMENT_BYTES_MAX);
        let mut out = Vec::with_capacity(len);
        out.put_slice(MAGIC);
        out.put_u16_le(VERSION);
        out.put_u16_le(self.kind.code());
        self.features.encode(&mut out);
        out.put_slice(self.store.as_bytes());
        out.put_slice(&self.subject);
        out.put_u64_le(self.generation);
        out.put_u32_le(self.keyring_version);
        out.put_u32_le(0);
        out.put_u32_le(self.a.len() as u32);
        out.put_u32_le(self.b.len() as u32);
        out.put_slice(&self.a);
        out.put_slice(&self.b);
        let tag_b = self.tag_b.unwrap_or_default();
        let tag_a = hmac_sha256(key_a, &[&out, &tag_b]);
        out.put_slice(&tag_a);
        out.put_slice(&tag_b);
        put_crc(&mut out, 0);
        debug_assert_eq!(out.len(), len);
        out
    }
}

/// Opens the document in `bytes`, which come from the file `path`. Checks it, asks `key` for the
/// key of the keyring version that the document claims, and authenticates it.
///
/// # Errors
/// [`Error::Truncated`], [`Error::Corrupt`], [`Error::NewerFormat`], [`Error::UnsupportedFeature`],
/// [`Error::RetiredKeyVersion`], [`Error::Tampered`], and the errors of `key`.
pub(crate) fn open(
    bytes: &[u8],
    kind: DocumentKind,
    path: &Path,
    key: impl FnOnce(u32) -> Result<SecretKey, Error>,
) -> Result<Document, Error> {
    let parsed = UnverifiedDocument::parse(bytes).map_err(|error| error.in_file(path, 0))?;
    let key = key(parsed.unverified().keyring_version)
        .map_err(|error| error.retired_in(path, kind.what()))?;
    let tampered = || Error::Tampered { at: Location::new(path, 0), what: "a document" };
    let document = parsed.verify(&key).map_err(|_| tampered())?;
    let has_no_subject =
        matches!(kind, DocumentKind::Store | DocumentKind::Catalogue | DocumentKind::Checkpoint);
    if document.kind != kind || (has_no_subject && document.subject != [0; 16]) {
        return Err(tampered());
    }
    document.check_frame(path)?;
    Ok(document)
}

/// The store id that the document in `bytes` claims.
///
/// # Errors
/// As [`open`], except for authentication errors.
pub(crate) fn claimed_store(bytes: &[u8], path: &Path) -> Result<StoreId, Error> {
    Ok(UnverifiedDocument::parse(bytes).map_err(|error| error.in_file(path, 0))?.unverified().store)
}

/// The length of the document at the beginning of `bytes`. More bytes may follow it.
///
/// # Errors
/// [`DecodeError`]: it is not a document of this version, or `bytes` is too short.
pub(crate) fn framed_len(bytes: &[u8]) -> Result<usize, DecodeError> {
    let mut cursor = Cursor::new(bytes);
    cursor.magic(MAGIC)?;
    cursor.version(VERSION)?;
    cursor.bytes(LENGTHS_AT - MAGIC.len() - size_of_val(&VERSION))?;
    let (len_a, len_b) = (cursor.u32()? as usize, cursor.u32()? as usize);
    Ok(FIXED_LEN + len_a + len_b + 2 * TAG_LEN + CRC_LEN)
}

/// Tag A of the document in these bytes. Zeros if they are too short.
pub(crate) fn tag_a(bytes: &[u8]) -> [u8; TAG_LEN] {
    let at = bytes.len().saturating_sub(2 * TAG_LEN + CRC_LEN);
    Cursor::new(bytes.get(at..).unwrap_or_default()).array().unwrap_or_default()
}

/// A document whose CRC32 matches. None of it is authenticated yet.
#[derive(Debug)]
pub(crate) struct UnverifiedDocument<'a> {
    document: Document,
    /// The bytes under tag A, except tag B.
    signed: &'a [u8],
    tag_a: [u8; TAG_LEN],
}

impl<'a> UnverifiedDocument<'a> {
    /// Parses the bytes of a file.
    ///
    /// # Errors
    /// [`DecodeError::Short`] if the file is shorter than its lengths say. Any other error if it is
    /// not a document.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor::new(bytes);
        cursor.magic(MAGIC)?;
        cursor.version(VERSION)?;
        let (kind, features) = (cursor.u16()?, Features::decode(&mut cursor)?);
        let (store, subject) = (StoreId::from_bytes(cursor.array()?), cursor.array()?);
        let (generation, keyring_version) = (cursor.u64()?, cursor.u32()?);
        let reserved = cursor.u32()?;
        let (len_a, len_b) = (cursor.u32()? as usize, cursor.u32()? as usize);
        let (a, b) = (cursor.bytes(len_a)?, cursor.bytes(len_b)?);
        let (tag_a, tag_b) = (cursor.array()?, cursor.array()?);
        cursor.bytes(CRC_LEN)?;
        require(cursor.is_empty(), "length of the document")?;
        strip_crc(bytes)?;

        let kind = DocumentKind::ALL.into_iter().find(|one| one.code() == kind);
        features.check(kind.map_or(0, DocumentKind::known_features))?;
        require(reserved == 0, "reserved bytes of the document")?;
        let document = Document {
            kind: kind.ok_or(DecodeError::Field("kind of the document"))?,
            features,
            store,
            subject,
            generation,
            keyring_version,
            a: a.to_vec(),
            b: b.to_vec(),
            tag_b: Some(tag_b).filter(|tag| *tag != [0; TAG_LEN]),
        };
        Ok(Self { document, signed: Cursor::new(bytes).bytes(FIXED_LEN + len_a + len_b)?, tag_a })
    }

    /// The unverified contents, to find the keys for verification. Do not use them for anything
    /// else.
    pub(crate) fn unverified(&self) -> &Document {
        &self.document
    }

    /// Verifies tag A.
    ///
    /// # Errors
    /// Tag A does not match.
    pub(crate) fn verify(self, key_a: &SecretKey) -> Result<Document, TagMismatch> {
        self.check(key_a).map(|()| self.document)
    }

    /// As [`UnverifiedDocument::verify`], but keeps the document here, so that it can be wiped.
    ///
    /// # Errors
    /// Tag A does not match.
    pub(crate) fn check(&self, key_a: &SecretKey) -> Result<(), TagMismatch> {
        let tag_b = self.document.tag_b.unwrap_or_default();
        if tags_equal(&self.tag_a, &hmac_sha256(key_a, &[self.signed, &tag_b])) {
            Ok(())
        } else {
            Err(TagMismatch)
        }
    }

    /// Wipes part A, if that holds secrets.
    pub(crate) fn wipe(&mut self) {
        self.document.a.zeroize();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::{
        ids::{hex_decode, hex_encode},
        segment::tests::damage_each,
    };

    fn key(byte: u8) -> SecretKey {
        SecretKey::from_bytes(&mut [byte; 32])
    }

    fn sample() -> Document {
        let mut document = Document {
            kind: DocumentKind::Logstore,
            features: Features { compatible: 1, read_only_compatible: 2, incompatible: 0 },
            store: StoreId::from_bytes([0x11; 16]),
            subject: [0x22; 16],
            generation: 9,
            keyring_version: 3,
            a: b"{\"a\":1}".to_vec(),
            b: b"{}".to_vec(),
            tag_b: None,
        };
        document.sign_b(&key(2));
        document
    }

    #[test]
    fn golden() {
        let golden = concat!(
            "454e564c444f430002000300010000000200000000000000111111111111111111111111111111112222222222222222",
            "22222222222222220900000000000000030000000000000007000000020000007b2261223a317d7b7d4a490c831739e9",
            "b45eff8b65dc4fa4ce7751b2bb7d2ca068c0f835ce113e49a50b39c68790ec8d416e8e4e0edc26dbb01693c2b61164c8",
            "5a7364f037e489e3ec53297a3b",
        );
        assert_eq!(hex_encode(&sample().seal(&key(1))), golden);
        let bytes = hex_decode(golden).unwrap();
        let unverified = UnverifiedDocument::parse(&bytes).unwrap();
        assert_eq!(unverified.unverified().keyring_version, 3);
        unverified.unverified().verify_b(&key(2)).unwrap();
        let document = unverified.verify(&key(1)).unwrap();
        assert_eq!(document, sample());
        document.verify_b(&key(2)).unwrap();
    }

    #[test]
    fn what_is_wiped_is_gone() {
        let bytes = sample().seal(&key(1));
        let mut unverified = UnverifiedDocument::parse(&bytes).unwrap();
        // `zeroize` also overwrites the spare capacity. The test can only see that nothing is left.
        unverified.wipe();
        assert!(unverified.unverified().a.is_empty() && !unverified.unverified().b.is_empty());
    }

    #[test]
    fn another_key_is_noticed() {
        let bytes = sample().seal(&key(1));
        let unverified = UnverifiedDocument::parse(&bytes).unwrap();
        unverified.unverified().verify_b(&key(1)).unwrap_err();
        unverified.verify(&key(2)).unwrap_err();
        let none = Document { tag_b: None, ..sample() };
        none.verify_b(&key(2)).unwrap_err();
        let bytes = none.seal(&key(1));
        assert_eq!(UnverifiedDocument::parse(&bytes).unwrap().verify(&key(1)).unwrap().tag_b, None);
    }

    #[test]
    fn tag_b_survives_changes_elsewhere() {
        let changed = Document { a: Vec::new(), generation: 10, keyring_version: 4, ..sample() };
        changed.verify_b(&key(2)).unwrap();
        for changed in [
            Document { b: b"{ }".to_vec(), ..sample() },
            Document { subject: [0; 16], ..sample() },
            Document { store: StoreId::from_bytes([0; 16]), ..sample() },
            Document { kind: DocumentKind::Probe, ..sample() },
        ] {
            changed.verify_b(&key(2)).unwrap_err();
        }
    }

    #[test]
    fn damage_is_refused() {
        let bytes = sample().seal(&key(1));
        damage_each(&bytes, |damaged, how| {
            UnverifiedDocument::parse(damaged).map(|_| ()).expect_err(&how);
        });
        for len in 0..bytes.len() {
            let error = UnverifiedDocument::parse(&bytes[..len]).unwrap_err();
            assert!(
                matches!(error, DecodeError::Short { have, .. } if have == len as u64),
                "{len}"
            );
        }
        let longer = [&bytes[..], &[0]].concat();
        assert_eq!(
            UnverifiedDocument::parse(&longer).unwrap_err(),
            DecodeError::Field("length of the document")
        );
    }

    /// With a corrected CRC32, tag A detects every change, even of tag B.
    #[test]
    fn tampering_is_noticed() {
        let bytes = sample().seal(&key(1));
        damage_each(&bytes[..bytes.len() - CRC_LEN], |damaged, how| {
            if damaged.len() < bytes.len() - CRC_LEN {
                return;
            }
            let mut damaged = damaged.to_vec();
            put_crc(&mut damaged, 0);
            let Ok(unverified) = UnverifiedDocument::parse(&damaged) else {
                return;
            };
            assert_eq!(unverified.verify(&key(1)), Err(TagMismatch), "{how}");
        });
        let unsigned = Document { tag_b: None, ..sample() };
        let tag_a = |bytes: &[u8]| bytes[bytes.len() - CRC_LEN - 2 * TAG_LEN..][..TAG_LEN].to_vec();
        assert_ne!(tag_a(&unsigned.seal(&key(1))), tag_a(&bytes));
    }

    #[test]
    fn what_is_not_known_is_refused() {
        let refused = |at: usize, with: u8| {
            let mut bytes = sample().seal(&key(1));
            bytes.truncate(bytes.len() - CRC_LEN);
            bytes[at] = with;
            put_crc(&mut bytes, 0);
            UnverifiedDocument::parse(&bytes).unwrap_err()
        };
        assert_eq!(refused(0, 0), DecodeError::Magic);
        assert_eq!(refused(8, 3), DecodeError::NewerVersion(3));
        assert_eq!(refused(10, 0), DecodeError::Field("kind of the document"));
        assert_eq!(refused(10, 8), DecodeError::Field("kind of the document"));
        assert_eq!(
            refused(20, 2),
            DecodeError::Feature("incompatible feature bits 0x2".to_owned())
        );
        assert_eq!(refused(68, 1), DecodeError::Field("reserved bytes of the document"));
    }

    proptest! {
        #[test]
        fn round_trip(
            kind in prop::sample::select(&DocumentKind::ALL[..]),
            (compatible, read_only_compatible, store, subject) in any::<(u32, u32, [u8; 16], [u8; 16])>(),
            (generation, keyring_version, a, b) in any::<(u64, u32, Vec<u8>, Vec<u8>)>(),
            signed: bool,
        ) {
            let features = Features { compatible, read_only_compatible, incompatible: 0 };
            let store = StoreId::from_bytes(store);
            let mut document = Document { kind, features, store, subject, generation, keyring_version, a, b, tag_b: None };
            if signed {
                document.sign_b(&key(2));
            }
            let bytes = document.seal(&key(1));
            let back = UnverifiedDocument::parse(&bytes).unwrap().verify(&key(1)).unwrap();
            prop_assert_eq!(back.verify_b(&key(2)).is_ok(), signed);
            prop_assert_eq!(back, document);
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes: Vec<u8>) {
            let _ = UnverifiedDocument::parse(&bytes);
            let _ = UnverifiedDocument::parse(&[&MAGIC[..], &[2, 0], &bytes].concat());
        }
    }
}
