//! AES by AWS-LC.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use super::{AeadKey, Cipher, CryptoError, CryptoProvider, Sm4Simd, check_len, open_into};

/// AES by AWS-LC (the crate `aws-lc-rs`), the fastest provider. AWS-LC has no SM4, so [`Sm4Simd`]
/// supplies SM4.
///
/// # How expanded keys are wiped
/// `aws-lc-rs` holds a key as an `EVP_AEAD_CTX` of its own. It allocates that with
/// `OPENSSL_malloc`, and frees it with `EVP_AEAD_CTX_free` when the key is dropped. Round keys and
/// GHASH tables are within that allocation (AWS-LC asserts at compile time that they fit). Freeing
/// ends in `OPENSSL_free`, which overwrites the whole allocation with `OPENSSL_cleanse` before it
/// returns to the heap. The Rust side keeps no copy, and moving a key moves a pointer. This holds
/// unless the program replaces AWS-LC's allocator (`CRYPTO_set_mem_functions`, or its own symbol
/// `OPENSSL_memory_free`). Then that allocator must wipe. Checked in aws-lc-rs 1.19 and aws-lc-sys
/// 0.47.
#[derive(Clone, Copy, Debug, Default)]
pub struct AwsLc;

impl AwsLc {
    /// The provider.
    #[must_use]
    pub fn new() -> Self {
        Self
    }
}

impl CryptoProvider for AwsLc {
    fn name(&self) -> &'static str {
        "aws-lc"
    }

    fn aead(&self, cipher: Cipher, key: &[u8]) -> Result<Box<dyn AeadKey>, CryptoError> {
        match cipher {
            Cipher::Aes256Gcm => {
                cipher.check_key(key)?;
                let key = UnboundKey::new(&AES_256_GCM, key)
                    .map_err(|_| CryptoError::Provider("AWS-LC could not expand the key"))?;
                Ok(Box::new(AesKey(LessSafeKey::new(key))))
            }
            Cipher::Sm4Gcm => Sm4Simd.aead(cipher, key),
        }
    }
}

/// "Less safe" because nonces come from the caller. Here a nonce is the block number and new random
/// bits.
struct AesKey(LessSafeKey);

impl AeadKey for AesKey {
    fn seal(
        &self,
        nonce: &[u8; 12],
        aad: &[u8],
        in_out: &mut [u8],
    ) -> Result<[u8; 16], CryptoError> {
        check_len(in_out.len())?;
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let tag = self.0.seal_in_place_separate_tag(nonce, Aad::from(aad), in_out);
        let tag = tag.map_err(|_| CryptoError::Provider("AWS-LC could not seal"))?;
        tag.as_ref()
            .try_into()
            .map_err(|_| CryptoError::Provider("AWS-LC made a tag of another length"))
    }

    fn open(
        &self,
        nonce: &[u8; 12],
        aad: &[u8],
        ciphertext: &[u8],
        tag: &[u8; 16],
        out: &mut [u8],
    ) -> Result<(), CryptoError> {
        open_into(ciphertext.len(), out, |out| {
            let nonce = Nonce::assume_unique_for_key(*nonce);
            let opened = self.0.open_separate_gather(nonce, Aad::from(aad), ciphertext, tag, out);
            opened.map_err(|_| CryptoError::AuthenticationFailed)
        })
    }
}
