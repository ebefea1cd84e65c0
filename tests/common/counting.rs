//! A provider that counts the expanded keys in memory.

#![allow(dead_code)]

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use envelog::crypto::{AeadKey, Cipher, CryptoError, CryptoProvider};

use super::Provider;

/// A provider that counts the keys in use.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counting(Arc<AtomicUsize>);

struct CountedKey(Box<dyn AeadKey>, Arc<AtomicUsize>);

impl Counting {
    /// How many keys there are now.
    pub(crate) fn count(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

impl CryptoProvider for Counting {
    fn name(&self) -> &'static str {
        "counting"
    }

    fn aead(&self, cipher: Cipher, key: &[u8]) -> Result<Box<dyn AeadKey>, CryptoError> {
        let key = Provider::new().aead(cipher, key)?;
        self.0.fetch_add(1, Ordering::SeqCst);
        Ok(Box::new(CountedKey(key, Arc::clone(&self.0))))
    }
}

impl Drop for CountedKey {
    fn drop(&mut self) {
        self.1.fetch_sub(1, Ordering::SeqCst);
    }
}

impl AeadKey for CountedKey {
    fn seal(
        &self,
        nonce: &[u8; 12],
        aad: &[u8],
        in_out: &mut [u8],
    ) -> Result<[u8; 16], CryptoError> {
        self.0.seal(nonce, aad, in_out)
    }

    fn open(
        &self,
        nonce: &[u8; 12],
        aad: &[u8],
        sealed: &[u8],
        tag: &[u8; 16],
        out: &mut [u8],
    ) -> Result<(), CryptoError> {
        self.0.open(nonce, aad, sealed, tag, out)
    }
}
