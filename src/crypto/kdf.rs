//! Hashes, key derivation and message authentication.

use std::{fmt, str::FromStr};

use ::hkdf::Hkdf;
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sm3::Sm3;
use subtle::ConstantTimeEq;
use zeroize::Zeroize;

use super::{SecretKey, on_clean_stack};

/// A hash function with an output of 32 bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum HashAlg {
    /// SHA-256 (FIPS 180-4).
    #[default]
    Sha256,
    /// SM3 (GB/T 32905-2016).
    Sm3,
}

impl HashAlg {
    const ALL: [Self; 2] = [Self::Sha256, Self::Sm3];

    /// The name in a configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sm3 => "sm3",
        }
    }

    /// The number in a segment header.
    pub(crate) fn code(self) -> u16 {
        match self {
            Self::Sha256 => 1,
            Self::Sm3 => 2,
        }
    }

    /// The algorithm with that number, if there is one.
    pub(crate) fn from_code(code: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|one| one.code() == code)
    }
}

impl fmt::Display for HashAlg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The error for a string that names no [`HashAlg`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown hash {0:?}: it is sha256 or sm3")]
pub struct UnknownHash(pub String);

impl FromStr for HashAlg {
    type Err = UnknownHash;

    fn from_str(name: &str) -> Result<Self, UnknownHash> {
        Self::ALL
            .into_iter()
            .find(|one| one.name() == name)
            .ok_or_else(|| UnknownHash(name.to_owned()))
    }
}

/// An incremental hash. Its state is wiped on drop.
#[derive(Clone)]
pub struct Hasher(State);

#[derive(Clone)]
enum State {
    Sha256(Sha256),
    Sm3(Sm3),
}

impl Hasher {
    /// A hash of the empty string so far.
    #[must_use]
    pub fn new(alg: HashAlg) -> Self {
        Self(match alg {
            HashAlg::Sha256 => State::Sha256(Sha256::new()),
            HashAlg::Sm3 => State::Sm3(Sm3::new()),
        })
    }

    /// Adds bytes to the hash.
    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            State::Sha256(state) => state.update(bytes),
            State::Sm3(state) => state.update(bytes),
        }
    }

    /// The hash of all bytes so far.
    #[must_use]
    pub fn finish(self) -> [u8; 32] {
        match self.0 {
            State::Sha256(state) => state.finalize().into(),
            State::Sm3(state) => state.finalize().into(),
        }
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            State::Sha256(_) => "Hasher(Sha256, ..)",
            State::Sm3(_) => "Hasher(Sm3, ..)",
        })
    }
}

/// The hash of the concatenation of `parts`.
#[must_use]
pub fn hash(alg: HashAlg, parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = Hasher::new(alg);
    for part in parts {
        hasher.update(part);
    }
    hasher.finish()
}

/// The pseudorandom key between the two steps of HKDF. It is kept as HMAC states, which are wiped
/// on drop.
pub(super) enum Prk {
    Sha256(Hkdf<Sha256>),
    Sm3(Hkdf<Sm3>),
}

impl Prk {
    pub(super) fn extract(alg: HashAlg, salt: &[u8], ikm: &[u8]) -> Self {
        match alg {
            HashAlg::Sha256 => {
                let (mut prk, hkdf) = Hkdf::<Sha256>::extract(Some(salt), ikm);
                prk.as_mut_slice().zeroize();
                Self::Sha256(hkdf)
            }
            HashAlg::Sm3 => {
                let (mut prk, hkdf) = Hkdf::<Sm3>::extract(Some(salt), ikm);
                prk.as_mut_slice().zeroize();
                Self::Sm3(hkdf)
            }
        }
    }

    pub(super) fn expand(&self, info: &[&[u8]], out: &mut [u8]) {
        match self {
            Self::Sha256(hkdf) => hkdf.expand_multi_info(info, out),
            Self::Sm3(hkdf) => hkdf.expand_multi_info(info, out),
        }
        .expect("no caller asks for more than 255 hash lengths");
    }
}

/// HKDF (RFC 5869): fills `out` from `ikm`; `info` is the concatenation of its parts.
///
/// # Panics
/// If `out` is longer than 255 * 32 bytes.
pub fn hkdf(alg: HashAlg, salt: &[u8], ikm: &[u8], info: &[&[u8]], out: &mut [u8]) {
    Prk::extract(alg, salt, ikm).expand(info, out);
}

/// HKDF (RFC 5869) from a secret to a secret of 32 bytes; `info` is the concatenation of its parts.
#[must_use]
pub fn derive(alg: HashAlg, salt: &[u8], ikm: &SecretKey, info: &[&[u8]]) -> SecretKey {
    let mut key = SecretKey::zeroed();
    on_clean_stack(|| hkdf(alg, salt, ikm.expose(), info, key.expose_mut()));
    key
}

/// HMAC-SHA-256 (RFC 2104, FIPS 198-1) over the concatenation of `parts`.
#[must_use]
pub fn hmac_sha256(key: &SecretKey, parts: &[&[u8]]) -> [u8; 32] {
    on_clean_stack(|| {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(key.expose()).expect("HMAC takes keys of any length");
        for part in parts {
            mac.update(part);
        }
        mac.finalize().into_bytes().into()
    })
}

/// Whether two tags are equal. The time depends on their lengths alone.
#[must_use]
pub fn tags_equal(a: &[u8], b: &[u8]) -> bool {
    a.ct_eq(b).into()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use zeroize::ZeroizeOnDrop;

    use super::*;
    use crate::crypto::tests::hex;

    #[test]
    fn hash_states_are_wiped_on_drop() {
        fn wiped<T: ZeroizeOnDrop>() {}
        wiped::<Sha256>();
        wiped::<Sm3>();
        wiped::<sha2::block_api::Sha256VarCore>();
        wiped::<sm3::block_api::Sm3Core>();
    }

    #[test]
    fn sha256_fips_180_4() {
        let abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hash(HashAlg::Sha256, &[b"abc"]).as_slice(), hex(abc));
    }

    /// GB/T 32905-2016, appendix A.
    #[test]
    fn sm3_gbt_32905() {
        let abc = "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0";
        assert_eq!(hash(HashAlg::Sm3, &[b"abc"]).as_slice(), hex(abc));
        let abcd = "debe9ff92275b8a138604889c18e5a4d6fdb70e5387e5765293dcba39c0c5732";
        assert_eq!(hash(HashAlg::Sm3, &[&b"abcd".repeat(16)]).as_slice(), hex(abcd));
    }

    #[test]
    fn a_hash_in_parts_is_the_hash_of_the_whole() {
        let bytes: Vec<u8> = (0..=255).collect();
        for alg in [HashAlg::Sha256, HashAlg::Sm3] {
            let whole = hash(alg, &[&bytes]);
            for at in [0, 1, 55, 63, 64, 65, 256] {
                let (left, right) = bytes.split_at(at);
                assert_eq!(hash(alg, &[left, right]), whole);
                let mut hasher = Hasher::new(alg);
                hasher.update(left);
                let mut other = hasher.clone();
                other.update(b"something else");
                hasher.update(right);
                assert_eq!(hasher.finish(), whole);
                assert_ne!(other.finish(), whole);
            }
        }
    }

    /// RFC 5869, appendix A, and the same inputs with SM3, with the results of OpenSSL 3.0
    /// (`openssl kdf HKDF`).
    #[test]
    fn hkdf_vectors() {
        let short = [vec![0x0b; 22], (0..=12).collect(), (0xf0..=0xf9).collect()];
        let long = [(0..=0x4f).collect(), (0x60..=0xaf).collect(), (0xb0..=0xff).collect()];
        let bare = [vec![0x0b; 22], vec![], vec![]];
        for (alg, [ikm, salt, info], okm) in [
            (
                HashAlg::Sha256,
                &short,
                "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865",
            ),
            (
                HashAlg::Sha256,
                &long,
                "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71cc30c58179ec3e87c14c01d5c1f3434f1d87",
            ),
            (
                HashAlg::Sha256,
                &bare,
                "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d9d201395faa4b61a96c8",
            ),
            (
                HashAlg::Sm3,
                &short,
                "c69fe91b7aaee2dd5718d72dcaee0cce93f1b8e41f792da51261b6a517e68b36ed2c595572b01dfa359b",
            ),
            (
                HashAlg::Sm3,
                &long,
                "c1226236bbdefa7921f9febe27b864f33e449201b436d8844ea53f58170dd6426defbd22ed1f3c5960f35523e62e3b6c0d657f2c61893436f539013199bfaef25aafd1e7726ede927623a9f5cbb8885c7e5d",
            ),
        ] {
            let okm = hex(okm);
            let mut out = vec![0; okm.len()];
            hkdf(alg, salt, ikm, &[info], &mut out);
            assert_eq!(out, okm);
            let (left, right) = info.split_at(info.len() / 3);
            hkdf(alg, salt, ikm, &[left, right], &mut out);
            assert_eq!(out, okm);
        }
    }

    #[test]
    fn derive_is_hkdf() {
        let ikm = SecretKey::from_bytes(&mut [7; 32]);
        for alg in [HashAlg::Sha256, HashAlg::Sm3] {
            let mut expected = [0; 32];
            hkdf(alg, b"salt", &[7; 32], &[b"label", b"more"], &mut expected);
            assert_eq!(derive(alg, b"salt", &ikm, &[b"label", b"more"]).expose(), &expected);
        }
    }

    /// RFC 4231, cases 1 to 4. HMAC pads a short key with zeros, so they fit into 32 bytes.
    #[test]
    fn hmac_sha256_rfc_4231() {
        let key_of = |bytes: &[u8]| {
            let mut key = [0; 32];
            key[..bytes.len()].copy_from_slice(bytes);
            SecretKey::from_bytes(&mut key)
        };
        let counting: Vec<u8> = (1..=25).collect();
        for (key, message, mac) in [
            (
                &[0x0b; 20][..],
                &b"Hi There"[..],
                "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
            ),
            (
                b"Jefe",
                b"what do ya want for nothing?",
                "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
            ),
            (
                &[0xaa; 20],
                &[0xdd; 50],
                "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe",
            ),
            (
                &counting,
                &[0xcd; 50],
                "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b",
            ),
        ] {
            let key = key_of(key);
            assert_eq!(hmac_sha256(&key, &[message]).as_slice(), hex(mac));
            assert_eq!(hmac_sha256(&key, &[&message[..3], &message[3..]]).as_slice(), hex(mac));
        }
    }

    #[test]
    fn tags_are_equal_when_all_their_bytes_are() {
        assert!(tags_equal(&[], &[]));
        assert!(tags_equal(&[1, 2, 3], &[1, 2, 3]));
        assert!(!tags_equal(&[1, 2, 3], &[1, 2]));
        for bit in 0..256 {
            let mut other = [0x5a_u8; 32];
            other[bit / 8] ^= 1 << (bit % 8);
            assert!(!tags_equal(&[0x5a; 32], &other));
        }
    }

    #[test]
    fn a_hasher_shows_no_state() {
        let mut hasher = Hasher::new(HashAlg::Sm3);
        hasher.update(b"secret");
        assert_eq!(format!("{hasher:?}"), "Hasher(Sm3, ..)");
    }
}
