//! SM4 by the crate `sm4-simd`.

use sm4_simd::Sm4Gcm;

use super::{AeadKey, Cipher, CryptoError, CryptoProvider, RustCrypto, rustcrypto::expand};

/// SM4 with the vector instructions of the processor (the crate `sm4-simd`). That crate has no AES,
/// so [`RustCrypto`] supplies AES. This is the provider for builds without AWS-LC.
///
/// # How expanded keys are wiped
/// Round keys: `sm4-simd` always overwrites them in `Drop`. GHASH key: `sm4-simd` overwrites its
/// powers in `Drop`. Where it falls back to the crate `ghash`, it builds that with the feature
/// `zeroize`: see [`RustCrypto`]. A key of this provider does not compile unless it implements
/// `ZeroizeOnDrop`. The variables on the stack of the key schedule are not wiped.
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
