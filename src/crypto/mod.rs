//! Suites, authenticated encryption, key derivation and the memory for keys.
//!
//! The caller passes the engine a [`CryptoProvider`] explicitly: `AwsLc` (feature `aws-lc`),
//! [`Sm4Simd`], or [`RustCrypto`], against which the others are tested. All produce and accept the
//! same bytes. A [`Suite`] is a numbered combination for the disk format: the cipher, the hash, and
//! whether blocks are encrypted. A [`SegmentCipher`] holds one segment's key, its commitment and
//! its binding to the header.
//!
//! # Which secrets are wiped, and which cannot be
//! Keys are [`SecretKey`]s: in locked memory, and wiped on drop. Expanded keys (round keys, GHASH
//! tables) live on the heap of their library, which wipes them on drop. The documentation of
//! `AwsLc`, [`Sm4Simd`] and [`RustCrypto`] gives the evidence. Expanded keys are not page-locked.
//! The engine cannot wipe short-lived copies in registers and on the stack while a library hashes a
//! key, expands it or moves it to the heap.

#[cfg(feature = "aws-lc")]
mod aws_lc;
mod cipher;
mod kdf;
mod rustcrypto;
mod secret;
mod sm4_simd;
mod suite;
#[cfg(test)]
mod tests;

use std::fmt;

#[cfg(feature = "aws-lc")]
pub use aws_lc::AwsLc;
pub use cipher::SegmentCipher;
pub use kdf::{HashAlg, Hasher, UnknownHash, derive, hash, hkdf, hmac_sha256, tags_equal};
pub use rustcrypto::RustCrypto;
pub use secret::{LockStatus, SecretKey, memory_lock_status};
pub(crate) use secret::{on_clean_stack, wipe, wipe_shared};
pub use sm4_simd::Sm4Simd;
pub use suite::Suite;

/// The most bytes that GCM seals under one nonce: 2^36 - 32 (NIST SP 800-38D, section 5.2.1.1).
pub const GCM_BYTES_MAX: u64 = (1 << 36) - 32;

/// An implementation of the ciphers.
///
/// Implement it to use another library (a hardware module, a faster SM4). The library must be able
/// to wipe its expanded keys.
pub trait CryptoProvider: Send + Sync + fmt::Debug {
    /// A short name for logs and benchmarks, such as `aws-lc`.
    fn name(&self) -> &'static str;

    /// Expands `key`, which must be [`Cipher::key_len`] bytes long. The expanded key is wiped on
    /// drop.
    ///
    /// # Errors
    /// [`CryptoError::KeyLength`] for a key of another length. [`CryptoError::Provider`] if the
    /// library fails.
    fn aead(&self, cipher: Cipher, key: &[u8]) -> Result<Box<dyn AeadKey>, CryptoError>;
}

/// An expanded key for authenticated encryption: GCM with a 96-bit nonce and a 128-bit tag (NIST SP
/// 800-38D).
///
/// The caller of [`AeadKey::seal`] must never use a nonce twice with one key.
pub trait AeadKey: Send + Sync {
    /// Encrypts `in_out` in place and returns the tag over `aad` and the ciphertext.
    ///
    /// # Errors
    /// [`CryptoError::TooLong`] above [`GCM_BYTES_MAX`]. [`CryptoError::Provider`] if the library
    /// fails. The contents of `in_out` are then undefined, and the nonce must not be used again.
    fn seal(
        &self,
        nonce: &[u8; 12],
        aad: &[u8],
        in_out: &mut [u8],
    ) -> Result<[u8; 16], CryptoError>;

    /// Verifies `tag` over `aad` and `ciphertext`, and decrypts into `out`, which must be as long
    /// as `ciphertext`.
    ///
    /// An implementation may read `ciphertext` more than once, so it must not change during the
    /// call. If another process may write to the bytes, as with a map, the caller copies them
    /// first.
    ///
    /// # Errors
    /// [`CryptoError::AuthenticationFailed`] if any input differs from the sealed one.
    /// [`CryptoError::BufferLength`] if `out` has another length. [`CryptoError::TooLong`] above
    /// [`GCM_BYTES_MAX`]. After any error `out` is zeroed.
    fn open(
        &self,
        nonce: &[u8; 12],
        aad: &[u8],
        ciphertext: &[u8],
        tag: &[u8; 16],
        out: &mut [u8],
    ) -> Result<(), CryptoError>;
}

/// The authenticated ciphers that a provider must offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cipher {
    /// AES-256 in Galois/Counter Mode: FIPS 197 and NIST SP 800-38D.
    Aes256Gcm,
    /// SM4 in Galois/Counter Mode: GB/T 32907-2016 and RFC 8998.
    Sm4Gcm,
}

impl Cipher {
    /// The length of a key in bytes.
    #[must_use]
    pub fn key_len(self) -> usize {
        match self {
            Cipher::Aes256Gcm => 32,
            Cipher::Sm4Gcm => 16,
        }
    }

    fn check_key(self, key: &[u8]) -> Result<(), CryptoError> {
        if key.len() == self.key_len() {
            Ok(())
        } else {
            Err(CryptoError::KeyLength { expected: self.key_len(), actual: key.len() })
        }
    }
}

/// The errors of this module. None contains any part of a key or a plaintext.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CryptoError {
    /// The key, the nonce, the associated data, the ciphertext or the tag differs from the sealed
    /// one.
    #[error("authentication failed")]
    AuthenticationFailed,
    /// A key has the wrong length, in bytes.
    #[error("a key of {actual} bytes instead of {expected}")]
    KeyLength {
        /// The length for the cipher.
        expected: usize,
        /// The length of the given key.
        actual: usize,
    },
    /// The output buffer has the wrong length, in bytes.
    #[error("an output buffer of {actual} bytes instead of {expected}")]
    BufferLength {
        /// The length of the input.
        expected: usize,
        /// The length of the buffer.
        actual: usize,
    },
    /// The input is longer than [`GCM_BYTES_MAX`] bytes.
    #[error("more than {GCM_BYTES_MAX} bytes under one nonce")]
    TooLong,
    /// A buffer to seal does not begin with the header hash of its segment, or its payload begins
    /// outside of it.
    #[error("a buffer to seal is laid out wrongly")]
    Layout,
    /// The library failed for a reason of its own, such as lack of memory.
    #[error("the crypto library failed: {0}")]
    Provider(&'static str),
}

fn check_len(len: usize) -> Result<(), CryptoError> {
    if len as u64 > GCM_BYTES_MAX { Err(CryptoError::TooLong) } else { Ok(()) }
}

/// The common part of every opening: checks the lengths, and zeroes `out` after any error.
fn open_into(
    len: usize,
    out: &mut [u8],
    open: impl FnOnce(&mut [u8]) -> Result<(), CryptoError>,
) -> Result<(), CryptoError> {
    let result = if out.len() == len {
        check_len(len).and_then(|()| open(out))
    } else {
        Err(CryptoError::BufferLength { expected: len, actual: out.len() })
    };
    if result.is_err() {
        out.fill(0);
    }
    result
}
