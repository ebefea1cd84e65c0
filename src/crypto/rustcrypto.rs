//! The ciphers of the RustCrypto project.

use aes_gcm::{
    AeadInOut, Aes256Gcm, AesGcm, KeyInit,
    aead::{
        consts::{U12, U16},
        inout::InOutBuf,
    },
};
use sm4::Sm4;
use zeroize::ZeroizeOnDrop;

use super::{AeadKey, Cipher, CryptoError, CryptoProvider, check_len, open_into};

/// AES and SM4 in pure Rust (the crates `aes-gcm`, `aes`, `sm4` and `ghash`). It runs on every
/// platform. Its SM4 is slow, and looks tables up at addresses that depend on the key and the data:
/// prefer [`Sm4Simd`](super::Sm4Simd).
///
/// # How expanded keys are wiped
/// Round keys: `aes` and `sm4` overwrite theirs in `Drop` if built with their feature `zeroize`.
/// Only then do `Aes256` and `Sm4`, and with them `AesGcm`, implement [`ZeroizeOnDrop`]. A key of
/// this provider does not compile unless it implements that trait. GHASH key: the feature `zeroize`
/// of `aes-gcm` turns on that of `ghash`, which turns on that of `polyval`, whose `Drop` overwrites
/// the key and all powers of it. `aes-gcm` and `ghash` overwrite the intermediate forms of the key.
/// The variables on the stack of the key schedules are not wiped.
#[derive(Clone, Copy, Debug, Default)]
pub struct RustCrypto;

type Sm4Gcm = AesGcm<Sm4, U12>;

impl RustCrypto {
    /// The provider.
    #[must_use]
    pub fn new() -> Self {
        Self
    }
}

impl CryptoProvider for RustCrypto {
    fn name(&self) -> &'static str {
        "rustcrypto"
    }

    fn aead(&self, cipher: Cipher, key: &[u8]) -> Result<Box<dyn AeadKey>, CryptoError> {
        cipher.check_key(key)?;
        match cipher {
            Cipher::Aes256Gcm => expand::<Aes256Gcm>(key),
            Cipher::Sm4Gcm => expand::<Sm4Gcm>(key),
        }
    }
}

/// Expands a key for a GCM that implements the traits of RustCrypto.
pub(super) fn expand<G>(key: &[u8]) -> Result<Box<dyn AeadKey>, CryptoError>
where
    G: KeyInit,
    GcmKey<G>: AeadKey + 'static,
{
    let key =
        G::new_from_slice(key).map_err(|_| CryptoError::Provider("the cipher refused the key"))?;
    Ok(Box::new(GcmKey(key)))
}

pub(super) struct GcmKey<G>(G);

impl<G> AeadKey for GcmKey<G>
where
    G: AeadInOut<NonceSize = U12, TagSize = U16> + ZeroizeOnDrop + Send + Sync,
{
    fn seal(
        &self,
        nonce: &[u8; 12],
        aad: &[u8],
        in_out: &mut [u8],
    ) -> Result<[u8; 16], CryptoError> {
        check_len(in_out.len())?;
        let tag = self.0.encrypt_inout_detached(nonce.into(), aad, in_out.into());
        Ok(tag.map_err(|_| CryptoError::Provider("sealing failed"))?.into())
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
            let in_out = InOutBuf::new(ciphertext, out)
                .map_err(|_| CryptoError::Provider("buffers of two lengths"))?;
            let opened = self.0.decrypt_inout_detached(nonce.into(), aad, in_out, tag.into());
            opened.map_err(|_| CryptoError::AuthenticationFailed)
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use aes_gcm::aes::Aes256;
    use sm4::cipher::{Array, BlockCipherEncrypt};

    use super::*;
    use crate::crypto::tests::hex;

    #[test]
    fn expanded_keys_are_wiped_on_drop() {
        fn wiped<T: ZeroizeOnDrop>() {
            assert!(std::mem::needs_drop::<T>());
        }
        wiped::<Aes256>();
        wiped::<Sm4>();
        wiped::<Aes256Gcm>();
        wiped::<Sm4Gcm>();
    }

    /// GB/T 32907-2016, appendix A: one block, and the same block after a million encryptions.
    #[test]
    fn sm4_gbt_32907() {
        let key = hex("0123456789abcdeffedcba9876543210");
        let cipher = Sm4::new_from_slice(&key).unwrap();
        let mut block = Array::try_from(key.as_slice()).unwrap();
        cipher.encrypt_block(&mut block);
        assert_eq!(block.as_slice(), hex("681edf34d206965e86b3e94f536e4246"));
        if cfg!(miri) {
            return;
        }
        for _ in 1..1_000_000 {
            cipher.encrypt_block(&mut block);
        }
        assert_eq!(block.as_slice(), hex("595298c7c6fd271f0402f804c33d3f66"));
    }
}
