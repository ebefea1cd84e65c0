//! The bytes of wrapped keys, and the cipher that seals one of them.

use aes_gcm::{Aes256Gcm, aead::KeyInit};
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::{Zeroize, Zeroizing};

use crate::crypto::SecretKey;

const BLOB_MAGIC: &[u8; 4] = b"ELKW";
const BLOB_VERSION: u16 = 1;
const WRAP_LABEL: &[u8] = b"envelog local kms wrap";
/// The sealing key wraps only one key, so it needs no nonce.
pub(super) const NONCE: [u8; 12] = [0; 12];

/// The part of a wrapped key that is not random: the bytes before the salt.
pub(super) fn blob_head(key_id: &str, version: u32) -> Vec<u8> {
    let id_len = u16::try_from(key_id.len()).expect("identifiers of this KMS have 20 bytes");
    let mut head = Vec::with_capacity(BLOB_MAGIC.len() + 2 + 2 + key_id.len() + 4 + 32 + 32 + 16);
    head.extend_from_slice(BLOB_MAGIC);
    head.extend_from_slice(&BLOB_VERSION.to_le_bytes());
    head.extend_from_slice(&id_len.to_le_bytes());
    head.extend_from_slice(key_id.as_bytes());
    head.extend_from_slice(&version.to_le_bytes());
    head
}

/// A parsed wrapped key.
pub(super) struct Blob<'a> {
    pub(super) head: &'a [u8],
    pub(super) key_id: &'a [u8],
    pub(super) version: u32,
    pub(super) salt: &'a [u8; 32],
    pub(super) sealed: &'a [u8; 32],
    pub(super) tag: &'a [u8; 16],
}

impl<'a> Blob<'a> {
    pub(super) fn parse(wrapped: &'a [u8]) -> Result<Self, &'static str> {
        const NOT_OURS: &str =
            "it is not a key that the embedded KMS has wrapped, or it is damaged";
        let rest = wrapped.strip_prefix(BLOB_MAGIC).ok_or(NOT_OURS)?;
        let (format, rest) = rest.split_first_chunk().ok_or(NOT_OURS)?;
        if u16::from_le_bytes(*format) != BLOB_VERSION {
            return Err("the wrapped key is damaged or of a newer format");
        }
        let (id_len, rest) = rest.split_first_chunk().ok_or(NOT_OURS)?;
        let (key_id, rest) =
            rest.split_at_checked(u16::from_le_bytes(*id_len).into()).ok_or(NOT_OURS)?;
        let (version, rest) = rest.split_first_chunk().ok_or(NOT_OURS)?;
        let head = wrapped.strip_suffix(rest).ok_or(NOT_OURS)?;
        let (salt, rest) = rest.split_first_chunk().ok_or(NOT_OURS)?;
        let (sealed, rest) = rest.split_first_chunk().ok_or(NOT_OURS)?;
        let tag = rest.try_into().map_err(|_| NOT_OURS)?;
        Ok(Self { head, key_id, version: u32::from_le_bytes(*version), salt, sealed, tag })
    }
}

/// The cipher that wraps exactly one key.
pub(super) fn wrap_cipher(material: &SecretKey, salt: &[u8; 32], head: &[u8]) -> Aes256Gcm {
    let (mut prk, hkdf) = Hkdf::<Sha256>::extract(Some(salt), material.expose());
    prk.as_mut_slice().zeroize();
    let mut key = Zeroizing::new([0; 32]);
    hkdf.expand_multi_info(&[WRAP_LABEL, head], key.as_mut_slice())
        .expect("32 bytes is a length that HKDF can make");
    Aes256Gcm::new_from_slice(key.as_slice()).expect("the key has 32 bytes")
}
