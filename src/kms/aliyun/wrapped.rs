//! The bytes of wrapped keys, as documented at [`AliyunKms`](super::AliyunKms).

use aes_gcm::{
    Aes256Gcm, Nonce, Tag,
    aead::{AeadInOut, KeyInit},
};

use crate::crypto::SecretKey;

const HEAD: &[u8; 5] = b"EAKW\x01";
/// The sealing key is used once.
const NONCE: [u8; 12] = [0; 12];
/// The longest accepted ciphertext of KMS. That of a 256-bit key has about 200 bytes.
const CIPHERTEXT_MAX: usize = 4096;

/// A parsed wrapped key.
pub(super) struct Wrapped<'a> {
    sealed: &'a [u8; 32],
    tag: &'a [u8; 16],
    /// The ciphertext for KMS to decrypt, in base64.
    pub(super) ciphertext: &'a str,
}

impl<'a> Wrapped<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, &'static str> {
        const NOT_OURS: &str =
            "it is not a key that was wrapped with Alibaba Cloud KMS, or it is damaged";
        let rest = bytes.strip_prefix(HEAD).ok_or(NOT_OURS)?;
        let (sealed, rest) = rest.split_first_chunk().ok_or(NOT_OURS)?;
        let (tag, rest) = rest.split_first_chunk().ok_or(NOT_OURS)?;
        let ciphertext = std::str::from_utf8(rest).map_err(|_| NOT_OURS)?;
        if is_ciphertext(ciphertext) { Ok(Self { sealed, tag, ciphertext }) } else { Err(NOT_OURS) }
    }

    /// Opens the sealed key.
    pub(super) fn open(
        &self,
        wrapping: &SecretKey,
        context: &str,
    ) -> Result<SecretKey, &'static str> {
        let mut key = *self.sealed;
        cipher(wrapping)
            .decrypt_inout_detached(
                &Nonce::from(NONCE),
                &associated_data(context),
                key.as_mut_slice().into(),
                &Tag::from(*self.tag),
            )
            .map_err(|_| "the wrapped key is damaged, or was made for something else")?;
        Ok(SecretKey::from_bytes(&mut key))
    }
}

/// Wraps `key` under a key from KMS, and stores that key's ciphertext beside it.
pub(super) fn seal(
    wrapping: &SecretKey,
    ciphertext: &str,
    context: &str,
    key: &SecretKey,
) -> Result<Vec<u8>, &'static str> {
    if !is_ciphertext(ciphertext) {
        return Err("KMS gave a ciphertext that is none");
    }
    // The key is sealed in place, in a vector that does not grow afterwards.
    let mut out = Vec::with_capacity(HEAD.len() + 32 + 16 + ciphertext.len());
    out.extend_from_slice(HEAD);
    out.extend_from_slice(key.expose());
    let sealed = &mut out[HEAD.len()..];
    let tag = cipher(wrapping)
        .encrypt_inout_detached(&Nonce::from(NONCE), &associated_data(context), sealed.into())
        .map_err(|_| "a key of 32 bytes was too long to be sealed")?;
    out.extend_from_slice(&tag);
    out.extend_from_slice(ciphertext.as_bytes());
    Ok(out)
}

fn is_ciphertext(text: &str) -> bool {
    let base64 = |byte: u8| byte.is_ascii_alphanumeric() || b"+/=".contains(&byte);
    (1..=CIPHERTEXT_MAX).contains(&text.len()) && text.bytes().all(base64)
}

fn cipher(wrapping: &SecretKey) -> Aes256Gcm {
    Aes256Gcm::new_from_slice(wrapping.expose()).expect("the key has 32 bytes")
}

fn associated_data(context: &str) -> Vec<u8> {
    [HEAD, context.as_bytes()].concat()
}
