//! SM4 of the crate `sm4-simd`.

use sm4_simd::Sm4Gcm;

use super::{AeadKey, Cipher, CryptoError, CryptoProvider, RustCrypto, rustcrypto::expand};

/// SM4 with the vector instructions of the processor (the crate `sm4-simd`); AES, which that crate does not have, is that of
/// [`RustCrypto`]. The provider for builds without AWS-LC.
///
/// # How expanded keys are wiped
/// Round keys: `sm4-simd` overwrites them in `Drop`, always. GHASH key: it overwrites the powers in `Drop`, and where it falls back on
/// the crate `ghash`, it builds that with the feature `zeroize`, of which see [`RustCrypto`]. A key of this provider must implement
/// `ZeroizeOnDrop` to compile at all. Not wiped are the variables on the stack of the key schedule.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sm4Simd;

impl Sm4Simd {
    /// The provider.
    #[must_use]
    pub fn new() -> Self {
        Self
    }
}

impl CryptoProvider for Sm4Simd {
    fn name(&self) -> &'static str {
        "sm4-simd"
    }

    fn aead(&self, cipher: Cipher, key: &[u8]) -> Result<Box<dyn AeadKey>, CryptoError> {
        match cipher {
            Cipher::Aes256Gcm => RustCrypto.aead(cipher, key),
            Cipher::Sm4Gcm => {
                cipher.check_key(key)?;
                expand::<Sm4Gcm>(key)
            }
        }
    }
}
