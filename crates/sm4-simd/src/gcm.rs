//! SM4-GCM.

use core::fmt;

use aead::{AeadCore, AeadInOut, Error, Nonce, Tag, TagPosition};
use cipher::{
    InOutBuf, Key, KeyInit, KeySizeUser,
    consts::{U12, U16},
    zeroize::{Zeroize, ZeroizeOnDrop},
};
use subtle::ConstantTimeEq;

use crate::{
    Backend, Sm4,
    ghash::{GhashKey, Multiplier},
};

/// The most bytes under one nonce: NIST SP 800-38D, section 5.2.1.1.
const DATA_MAX: u64 = (1 << 36) - 32;

/// The most bytes of associated data: GHASH counts their bits in 64 bits. NIST SP 800-38D, section
/// 5.2.1.1.
const AAD_MAX: u64 = (1 << 61) - 1;

/// How many bytes are encrypted and then hashed while they are in the first-level cache. Input and
/// output take half of 32 KiB.
const CHUNK: usize = 8 << 10;

/// The longest message whose key stream is computed in one call, together with the block in front
/// of it that masks the tag.
const SHORT_MAX: usize = 512 - 16;

/// SM4-GCM: SM4 in Galois/Counter Mode (NIST SP 800-38D, RFC 8998) with nonces of 96 bits and tags
/// of 128 bits. Both the cipher and the hash are vectorized.
///
/// It is the same function as `AesGcm<Sm4, U12>` of the crate `aes-gcm`. The caller must never use
/// a nonce twice with one key. Opening checks the tag before it decrypts anything, and leaves the
/// output unchanged if the tag is wrong.
///
/// The round keys, and the powers of the GHASH key, are overwritten on drop.
#[derive(Clone)]
pub struct Sm4Gcm {
    cipher: Sm4,
    ghash: GhashKey,
}

impl Sm4Gcm {
    /// The names of the multiplications that GHASH can use on this processor, the fastest last. For
    /// tests and benchmarks.
    #[doc(hidden)]
    pub fn multipliers() -> impl Iterator<Item = &'static str> {
        Multiplier::ALL
            .iter()
            .filter(|multiplier| multiplier.is_available())
            .map(|multiplier| multiplier.name())
    }

    /// The cipher with the given backend and multiplication. `None` if this processor does not
    /// support one of them. For tests and benchmarks: [`KeyInit::new`] takes the fastest.
    #[doc(hidden)]
    #[must_use]
    pub fn with_backend(key: &Key<Self>, backend: Backend, multiplier: &str) -> Option<Self> {
        let multiplier =
            Multiplier::ALL.iter().find(|m| m.name() == multiplier && m.is_available())?;
        Some(Self::from_parts(Sm4::with_backend(key, backend)?, *multiplier))
    }

    fn from_parts(cipher: Sm4, multiplier: Multiplier) -> Self {
        // The key of GHASH is the encrypted zero block: the key stream for a zero nonce and a zero
        // counter.
        let mut h = [0; 16];
        cipher.ctr32(&[0; 12], 0, (&mut h[..]).into());
        let ghash = GhashKey::new(&h, multiplier);
        h.zeroize();
        Self { cipher, ghash }
    }

    /// The backend that this key uses.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.cipher.backend()
    }

    /// The key stream of a message of `len` bytes: the block that masks the tag, which has number 1
    /// in GCM, and then the message's own blocks if the message is short.
    fn stream(&self, nonce: &[u8; 12], len: usize) -> Stream {
        let len = 16 + if len <= SHORT_MAX { len } else { 0 };
        let mut stream = Stream { bytes: [0; 16 + SHORT_MAX], len };
        self.cipher.ctr32(nonce, 1, (&mut stream.bytes[..len]).into());
        stream
    }
}

/// The beginning of a key stream. It is overwritten on drop, because with the ciphertext it gives
/// the message.
struct Stream {
    bytes: [u8; 16 + SHORT_MAX],
    /// The length of the used part.
    len: usize,
}

impl Stream {
    /// The block that masks the tag.
    fn mask(&self) -> &[u8] {
        &self.bytes[..16]
    }

    /// The key stream of the message, if the message is short.
    fn message(&self) -> &[u8] {
        &self.bytes[16..self.len]
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.bytes[..self.len].zeroize();
    }
}

fn check_lengths(aad: &[u8], data: &InOutBuf<'_, '_, u8>) -> Result<(), Error> {
    if aad.len() as u64 > AAD_MAX || data.len() as u64 > DATA_MAX { Err(Error) } else { Ok(()) }
}

/// The last block of the hash input: both lengths in bits.
fn lengths(aad: usize, data: usize) -> [u8; 16] {
    (u128::from(aad as u64 * 8) << 64 | u128::from(data as u64 * 8)).to_be_bytes()
}

fn mask(mut hash: [u8; 16], stream: &[u8]) -> [u8; 16] {
    for (hash, mask) in hash.iter_mut().zip(stream) {
        *hash ^= mask;
    }
    hash
}

impl KeySizeUser for Sm4Gcm {
    type KeySize = U16;
}

impl KeyInit for Sm4Gcm {
    fn new(key: &Key<Self>) -> Self {
        Self::from_parts(Sm4::new(key), Multiplier::detect())
    }
}

impl AeadCore for Sm4Gcm {
    type NonceSize = U12;
    type TagSize = U16;
    const TAG_POSITION: TagPosition = TagPosition::Postfix;
}

impl AeadInOut for Sm4Gcm {
    fn encrypt_inout_detached(
        &self,
        nonce: &Nonce<Self>,
        associated_data: &[u8],
        mut buffer: InOutBuf<'_, '_, u8>,
    ) -> Result<Tag<Self>, Error> {
        check_lengths(associated_data, &buffer)?;
        let (nonce, len) = (nonce.as_ref(), buffer.len());
        let stream = self.stream(nonce, len);
        let mut hash = self.ghash.hasher();
        hash.update_padded(associated_data);
        if len <= SHORT_MAX {
            buffer.xor_in2out(stream.message());
            hash.update_padded(buffer.get_out());
        } else {
            let mut counter = 2;
            while !buffer.is_empty() {
                let chunk_len = buffer.len().min(CHUNK);
                let (mut chunk, rest) = buffer.split_at(chunk_len);
                self.cipher.ctr32(nonce, counter, chunk.reborrow());
                hash.update_padded(chunk.get_out());
                counter = counter.wrapping_add((CHUNK / 16) as u32);
                buffer = rest;
            }
        }
        hash.update_padded(&lengths(associated_data.len(), len));
        Ok(mask(hash.finalize(), stream.mask()).into())
    }

    fn decrypt_inout_detached(
        &self,
        nonce: &Nonce<Self>,
        associated_data: &[u8],
        mut buffer: InOutBuf<'_, '_, u8>,
        tag: &Tag<Self>,
    ) -> Result<(), Error> {
        check_lengths(associated_data, &buffer)?;
        let (nonce, len) = (nonce.as_ref(), buffer.len());
        let stream = self.stream(nonce, len);
        let mut hash = self.ghash.hasher();
        hash.update_padded(associated_data);
        hash.update_padded(buffer.get_in());
        hash.update_padded(&lengths(associated_data.len(), len));
        if !bool::from(mask(hash.finalize(), stream.mask()).ct_eq(tag.as_ref())) {
            return Err(Error);
        }
        if len <= SHORT_MAX {
            buffer.xor_in2out(stream.message());
        } else {
            self.cipher.ctr32(nonce, 2, buffer);
        }
        Ok(())
    }
}

impl fmt::Debug for Sm4Gcm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sm4Gcm").field("backend", &self.backend()).finish_non_exhaustive()
    }
}

// The cipher and the GHASH key overwrite themselves.
impl ZeroizeOnDrop for Sm4Gcm {}
