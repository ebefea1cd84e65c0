//! The cipher of one segment.

use std::fmt;

use super::{
    AeadKey, CryptoError, CryptoProvider, SecretKey, Suite, kdf::Prk, on_clean_stack, open_into,
};

const SEAL_LABEL: &[u8] = b"envelog v2 segment seal";
const COMMIT_LABEL: &[u8] = b"envelog v2 segment commit";

/// The expanded key of one segment, and its commitment to that segment.
///
/// PRK = HKDF-Extract(salt, data key); segment key = HKDF-Expand(PRK, `"envelog v2 segment seal"`
/// || info) of the cipher's key length; commitment = HKDF-Expand(PRK, `"envelog v2 segment commit"`
/// || info) of 32 bytes. Here info is the number of the suite (u16, little-endian) and the hash of
/// the segment's header (32 bytes), and HKDF (RFC 5869) runs over the hash of the suite.
///
/// The commitment is stored behind the header. A reader compares it with
/// [`tags_equal`](super::tags_equal) before it opens anything. A different commitment means a wrong
/// key or an altered header.
pub struct SegmentCipher {
    suite: Suite,
    header_hash: [u8; 32],
    commitment: [u8; 32],
    key: Box<dyn AeadKey>,
}

impl SegmentCipher {
    /// Derives the key and the commitment of the segment whose header has this salt and this hash.
    ///
    /// # Errors
    /// The error of the provider when it expands the key.
    pub fn derive(
        provider: &dyn CryptoProvider,
        suite: Suite,
        data_key: &SecretKey,
        salt: &[u8; 32],
        header_hash: &[u8; 32],
    ) -> Result<Self, CryptoError> {
        on_clean_stack(|| {
            let code = suite.code().to_le_bytes();
            let prk = Prk::extract(suite.hash(), salt, data_key.expose());
            let mut commitment = [0; 32];
            prk.expand(&[COMMIT_LABEL, &code, header_hash], &mut commitment);
            let mut segment_key = SecretKey::zeroed();
            let (segment_key, _) = segment_key.expose_mut().split_at_mut(suite.cipher().key_len());
            prk.expand(&[SEAL_LABEL, &code, header_hash], segment_key);
            let key = provider.aead(suite.cipher(), segment_key)?;
            Ok(Self { suite, header_hash: *header_hash, commitment, key })
        })
    }

    /// The commitment of the segment to its key and header. It is not secret.
    #[must_use]
    pub fn commitment(&self) -> &[u8; 32] {
        &self.commitment
    }

    /// The suite.
    #[must_use]
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// The hash of the segment's header.
    #[must_use]
    pub fn header_hash(&self) -> &[u8; 32] {
        &self.header_hash
    }

    /// Seals a block. `buf` is header hash || block header || payload, and the payload begins at
    /// `payload_at`. The payload is encrypted in place if the suite encrypts. Returns the tag over
    /// all of `buf`. The caller must never repeat a nonce.
    ///
    /// # Errors
    /// [`CryptoError::Layout`] if `buf` does not begin with the header hash, or if `payload_at` is
    /// not behind the hash and within `buf`. `buf` is unchanged then. Otherwise the errors of
    /// [`AeadKey::seal`].
    pub fn seal_block(
        &self,
        nonce: &[u8; 12],
        buf: &mut [u8],
        payload_at: usize,
    ) -> Result<[u8; 16], CryptoError> {
        let (bound, payload) = buf.split_at_mut_checked(payload_at).ok_or(CryptoError::Layout)?;
        if !bound.starts_with(&self.header_hash) {
            return Err(CryptoError::Layout);
        }
        if self.suite.encrypts() {
            self.key.seal(nonce, bound, payload)
        } else {
            self.key.seal(nonce, buf, &mut [])
        }
    }

    /// Opens a block: verifies its header and payload (the associated data are header hash || block
    /// header, and the payload too if the suite does not encrypt), and decrypts the payload into
    /// `out`, which has the same length. If the suite does not encrypt, `out` receives the verified
    /// copy.
    ///
    /// # Errors
    /// The errors of [`AeadKey::open`]. `out` is then zeroed.
    pub fn open_block(
        &self,
        nonce: &[u8; 12],
        block_header: &[u8],
        payload: &[u8],
        tag: &[u8; 16],
        out: &mut [u8],
    ) -> Result<(), CryptoError> {
        if self.suite.encrypts() {
            let aad = [self.header_hash.as_slice(), block_header].concat();
            return self.key.open(nonce, &aad, payload, tag, out);
        }
        open_into(payload.len(), out, |out| {
            let aad = [self.header_hash.as_slice(), block_header, payload].concat();
            self.key.open(nonce, &aad, &[], tag, &mut [])?;
            let (_, verified) = aad.split_at(aad.len() - payload.len());
            out.copy_from_slice(verified);
            Ok(())
        })
    }

    /// The tag over header hash || `bytes`, without plaintext, as for a footer. The caller must
    /// never repeat a nonce.
    ///
    /// # Errors
    /// The errors of [`AeadKey::seal`].
    pub fn tag_only(&self, nonce: &[u8; 12], bytes: &[u8]) -> Result<[u8; 16], CryptoError> {
        self.key.seal(nonce, &[self.header_hash.as_slice(), bytes].concat(), &mut [])
    }

    /// Verifies a tag from [`SegmentCipher::tag_only`].
    ///
    /// # Errors
    /// The errors of [`AeadKey::open`].
    pub fn verify_tag_only(
        &self,
        nonce: &[u8; 12],
        bytes: &[u8],
        tag: &[u8; 16],
    ) -> Result<(), CryptoError> {
        self.key.open(nonce, &[self.header_hash.as_slice(), bytes].concat(), &[], tag, &mut [])
    }
}

impl fmt::Debug for SegmentCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SegmentCipher").field("suite", &self.suite).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::crypto::{
        RustCrypto,
        tests::{hex, providers},
    };

    const SALT: [u8; 32] = [0x42; 32];
    const HEADER_HASH: [u8; 32] = [0x24; 32];
    const PAYLOAD: &[u8] = b"hello, envelog";

    fn data_key() -> SecretKey {
        SecretKey::from_bytes(&mut std::array::from_fn(|i| i as u8))
    }

    fn cipher(suite: Suite) -> SegmentCipher {
        SegmentCipher::derive(&RustCrypto, suite, &data_key(), &SALT, &HEADER_HASH).unwrap()
    }

    /// The number of a block, and 00 01 .. 07 as the random part of the nonce.
    fn nonce(block: u32) -> [u8; 12] {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(&block.to_be_bytes());
        nonce[4..].copy_from_slice(&[0, 1, 2, 3, 4, 5, 6, 7]);
        nonce
    }

    fn block_header() -> [u8; 96] {
        std::array::from_fn(|i| i as u8)
    }

    fn frame(payload: &[u8]) -> Vec<u8> {
        [HEADER_HASH.as_slice(), &block_header(), payload].concat()
    }

    /// Data key 00 01 .. 1f, salt 32 * 42, header hash 32 * 24; block 0 with a header of 00 01 ..
    /// 5f; a footer of "footer". Another program computed the expected values: HKDF and GCM in
    /// Python over OpenSSL's hashes and block ciphers.
    #[test]
    fn golden_vectors() {
        for (suite, commitment, stored, tag, footer_tag) in [
            (
                Suite::Aes256Gcm,
                "2ad497443d452ea16d8b90063f9777fc08c1d54644248f429c1c1afb65ceec17",
                "29f2c1f8f7ef894e40f3cd82d843",
                "cd582306e082d6915d259f6e4f24aecd",
                "046bb9e3d25eb71299c9c7ea229eeb79",
            ),
            (
                Suite::Sm4Gcm,
                "5dc10207b5102959b4886f56fa168661ea44b4715167f059749f2bf127089729",
                "ed0ddfbc1d1b5d5276e859926e2f",
                "6e3307cfcb63311d20db2cce561f6fe8",
                "43f078af61de8c378233a61ddd334477",
            ),
            (
                Suite::Aes256Gmac,
                "1ccf0c568b5b4329a60ea6d2eda4cf00a32e8942478a22cee07a2cbff72b565c",
                "68656c6c6f2c20656e76656c6f67",
                "c3b2dfc6cda9649f3f4cd3ea87f00147",
                "2eb0e833efd8580a9798a46f32fe6b4f",
            ),
            (
                Suite::Sm4Gmac,
                "97667e23cdaf1c72e82e550d753cfcce297461401844aef8375446f3bfa3a3cd",
                "68656c6c6f2c20656e76656c6f67",
                "0bff1c9f470ba9f514ffe042851e99a9",
                "222976ab98b2a98b42c465df2ea490f1",
            ),
        ] {
            for provider in providers() {
                let cipher = SegmentCipher::derive(
                    provider.as_ref(),
                    suite,
                    &data_key(),
                    &SALT,
                    &HEADER_HASH,
                )
                .unwrap();
                assert_eq!(cipher.suite(), suite);
                assert_eq!(cipher.header_hash(), &HEADER_HASH);
                assert_eq!(cipher.commitment().as_slice(), hex(commitment), "{suite:?}");

                let mut buf = frame(PAYLOAD);
                let sealed = cipher.seal_block(&nonce(0), &mut buf, 128).unwrap();
                assert_eq!(buf[..128], frame(&[]));
                assert_eq!(buf[128..], hex(stored), "{suite:?}");
                assert_eq!(sealed.as_slice(), hex(tag), "{suite:?}");

                let mut out = [0; PAYLOAD.len()];
                cipher
                    .open_block(&nonce(0), &block_header(), &hex(stored), &sealed, &mut out)
                    .unwrap();
                assert_eq!(out, PAYLOAD);

                let sealed = cipher.tag_only(&nonce(u32::MAX), b"footer").unwrap();
                assert_eq!(sealed.as_slice(), hex(footer_tag), "{suite:?}");
                cipher.verify_tag_only(&nonce(u32::MAX), b"footer", &sealed).unwrap();
            }
        }
    }

    #[test]
    fn everything_that_goes_into_a_segment_key_matters() {
        let mut commitments = Vec::new();
        let mut tags = Vec::new();
        let mut add = |suite, key_byte, salt: &[u8; 32], header_hash: &[u8; 32]| {
            let key = SecretKey::from_bytes(&mut [key_byte; 32]);
            let cipher =
                SegmentCipher::derive(&RustCrypto, suite, &key, salt, header_hash).unwrap();
            commitments.push(*cipher.commitment());
            tags.push(cipher.key.seal(&nonce(0), b"", &mut []).unwrap());
        };
        for suite in Suite::ALL {
            add(suite, 0, &SALT, &HEADER_HASH);
            add(suite, 1, &SALT, &HEADER_HASH);
            add(suite, 0, &[0x43; 32], &HEADER_HASH);
            add(suite, 0, &SALT, &[0x25; 32]);
        }
        assert_eq!((commitments.len(), tags.len()), (16, 16));
        commitments.sort_unstable();
        commitments.dedup();
        tags.sort_unstable();
        tags.dedup();
        assert_eq!((commitments.len(), tags.len()), (16, 16));
    }

    #[test]
    fn whatever_is_changed_is_refused() {
        let mut payload = vec![0x77; 70];
        payload[0] = 1;
        for suite in Suite::ALL {
            let cipher = cipher(suite);
            let mut buf = frame(&payload);
            let tag = cipher.seal_block(&nonce(7), &mut buf, 128).unwrap();
            let stored = buf.split_off(128);
            assert_eq!(stored != payload, suite.encrypts());
            let refused = |nonce: &[u8; 12], header: &[u8], stored: &[u8], tag: &[u8; 16]| {
                let mut out = vec![0xee; stored.len()];
                let result = cipher.open_block(nonce, header, stored, tag, &mut out);
                assert_eq!(result, Err(CryptoError::AuthenticationFailed), "{suite:?}");
                assert_eq!(out, vec![0; stored.len()], "{suite:?}");
            };
            for i in 0..96 {
                let mut header = block_header();
                header[i] ^= 0x80;
                refused(&nonce(7), &header, &stored, &tag);
            }
            for i in 0..stored.len() {
                let mut stored = stored.clone();
                stored[i] ^= 1;
                refused(&nonce(7), &block_header(), &stored, &tag);
            }
            for i in 0..16 {
                let mut tag = tag;
                tag[i] ^= 0x10;
                refused(&nonce(7), &block_header(), &stored, &tag);
            }
            refused(&nonce(8), &block_header(), &stored, &tag);
            refused(&nonce(7), &block_header(), &stored[..69], &tag);
            refused(&nonce(7), &block_header(), &[], &tag);
            // Moving a byte from the payload to the header leaves the concatenation unchanged. The
            // suites that encrypt notice it. For the others, the caller fixes the length of the
            // header.
            let longer = [block_header().as_slice(), &stored[..1]].concat();
            if suite.encrypts() {
                refused(&nonce(7), &longer, &stored[1..], &tag);
            }
            let other = Suite::ALL[(suite.code() as usize) % 4];
            let other = self::cipher(other).open_block(
                &nonce(7),
                &block_header(),
                &stored,
                &tag,
                &mut [0; 70],
            );
            assert_eq!(other, Err(CryptoError::AuthenticationFailed));
        }
    }

    #[test]
    fn a_changed_footer_is_refused() {
        for suite in Suite::ALL {
            let cipher = cipher(suite);
            let tag = cipher.tag_only(&nonce(u32::MAX), b"footer").unwrap();
            let failed = Err(CryptoError::AuthenticationFailed);
            assert_eq!(cipher.verify_tag_only(&nonce(u32::MAX), b"footed", &tag), failed);
            assert_eq!(cipher.verify_tag_only(&nonce(u32::MAX), b"foote", &tag), failed);
            assert_eq!(cipher.verify_tag_only(&nonce(0), b"footer", &tag), failed);
            assert_eq!(cipher.verify_tag_only(&nonce(u32::MAX), b"footer", &[0; 16]), failed);
        }
    }

    #[test]
    fn empty_payloads_are_authenticated_too() {
        for suite in Suite::ALL {
            let cipher = cipher(suite);
            let mut buf = frame(&[]);
            let tag = cipher.seal_block(&nonce(0), &mut buf, 128).unwrap();
            assert_eq!(buf, frame(&[]));
            cipher.open_block(&nonce(0), &block_header(), &[], &tag, &mut []).unwrap();
            let changed = cipher.open_block(&nonce(0), &[0; 96], &[], &tag, &mut []);
            assert_eq!(changed, Err(CryptoError::AuthenticationFailed));
        }
    }

    #[test]
    fn wrong_layouts_and_lengths_are_errors() {
        for suite in Suite::ALL {
            let cipher = cipher(suite);
            let mut buf = frame(PAYLOAD);
            for payload_at in [0, 31, buf.len() + 1, usize::MAX] {
                assert_eq!(
                    cipher.seal_block(&nonce(0), &mut buf, payload_at),
                    Err(CryptoError::Layout)
                );
            }
            buf[31] ^= 1;
            assert_eq!(cipher.seal_block(&nonce(0), &mut buf, 128), Err(CryptoError::Layout));
            buf[31] ^= 1;
            assert_eq!(buf, frame(PAYLOAD));
            let tag = cipher.seal_block(&nonce(0), &mut buf, 128).unwrap();
            let len = PAYLOAD.len();
            for actual in [0, len - 1, len + 1] {
                let mut out = vec![0xee; actual];
                let result =
                    cipher.open_block(&nonce(0), &block_header(), &buf[128..], &tag, &mut out);
                assert_eq!(result, Err(CryptoError::BufferLength { expected: len, actual }));
                assert_eq!(out, vec![0; actual]);
            }
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        assert_eq!(format!("{:?}", cipher(Suite::Sm4Gmac)), "SegmentCipher { suite: Sm4Gmac, .. }");
    }
}
