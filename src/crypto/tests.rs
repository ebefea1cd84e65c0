//! The providers against published vectors, against each other, and against a GCM built from other
//! parts.

#![allow(clippy::unwrap_used)]

use ::ghash::{GHash, universal_hash::UniversalHash};
use aes_gcm::{aead::consts::U16, aes::Aes256};
use ctr::{
    Ctr32BE, CtrCore,
    cipher::{BlockCipherEncrypt, BlockSizeUser, InnerIvInit, KeyInit, StreamCipher},
};
use sm4::Sm4;

use super::*;

/// Bytes from hexadecimal digits.
pub(super) fn hex(digits: &str) -> Vec<u8> {
    assert!(digits.len().is_multiple_of(2));
    (0..digits.len())
        .step_by(2)
        .map(|i| u8::from_str_radix(&digits[i..i + 2], 16).unwrap())
        .collect()
}

/// Every provider of this build.
pub(super) fn providers() -> Vec<Box<dyn CryptoProvider>> {
    vec![
        Box::new(RustCrypto::new()),
        Box::new(Sm4Simd::new()),
        #[cfg(feature = "aws-lc")]
        Box::new(AwsLc::new()),
    ]
}

const CIPHERS: [Cipher; 2] = [Cipher::Aes256Gcm, Cipher::Sm4Gcm];

/// Bytes that vary with the position and with `seed`.
fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(167) ^ (i >> 8) ^ seed.wrapping_mul(59)) as u8).collect()
}

fn nonce(seed: usize) -> [u8; 12] {
    pattern(seed, 12).try_into().unwrap()
}

/// Lengths around all block and batch sizes of the implementations, and a few large ones.
fn lengths() -> impl Iterator<Item = usize> {
    (0..=300).chain([4_095, 65_536, 65_543, 1_000_003])
}

struct Vector {
    cipher: Cipher,
    key: &'static str,
    nonce: &'static str,
    aad: &'static str,
    plaintext: &'static str,
    ciphertext: &'static str,
    tag: &'static str,
}

const GCM_KEY: &str = "feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308";
const ZERO_KEY: &str = "0000000000000000000000000000000000000000000000000000000000000000";

const VECTORS: [Vector; 6] = [
    // RFC 8998, appendix A.1.
    Vector {
        cipher: Cipher::Sm4Gcm,
        key: "0123456789abcdeffedcba9876543210",
        nonce: "00001234567800000000abcd",
        aad: "feedfacedeadbeeffeedfacedeadbeefabaddad2",
        plaintext: "aaaaaaaaaaaaaaaabbbbbbbbbbbbbbbbccccccccccccccccddddddddddddddddeeeeeeeeeeeeeeeeffffffffffffffffeeeeeeeeeeeeeeeeaaaaaaaaaaaaaaaa",
        ciphertext: "17f399f08c67d5ee19d0dc9969c4bb7d5fd46fd3756489069157b282bb200735d82710ca5c22f0ccfa7cbf93d496ac15a56834cbcf98c397b4024a2691233b8d",
        tag: "83de3541e4c2b58177e065a9bf7b62ec",
    },
    // McGrew and Viega, "The Galois/Counter Mode of Operation (GCM)", appendix B: test cases 13 to
    // 16.
    Vector {
        cipher: Cipher::Aes256Gcm,
        key: ZERO_KEY,
        nonce: "000000000000000000000000",
        aad: "",
        plaintext: "",
        ciphertext: "",
        tag: "530f8afbc74536b9a963b4f1c4cb738b",
    },
    Vector {
        cipher: Cipher::Aes256Gcm,
        key: ZERO_KEY,
        nonce: "000000000000000000000000",
        aad: "",
        plaintext: "00000000000000000000000000000000",
        ciphertext: "cea7403d4d606b6e074ec5d3baf39d18",
        tag: "d0d1c8a799996bf0265b98b5d48ab919",
    },
    Vector {
        cipher: Cipher::Aes256Gcm,
        key: GCM_KEY,
        nonce: "cafebabefacedbaddecaf888",
        aad: "",
        plaintext: "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255",
        ciphertext: "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad",
        tag: "b094dac5d93471bdec1a502270e3cc6c",
    },
    Vector {
        cipher: Cipher::Aes256Gcm,
        key: GCM_KEY,
        nonce: "cafebabefacedbaddecaf888",
        aad: "feedfacedeadbeeffeedfacedeadbeefabaddad2",
        plaintext: "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a721c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39",
        ciphertext: "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662",
        tag: "76fc6ece0f4e1768cddf8853bb2d551b",
    },
    // NIST CAVP, gcmEncryptExtIV256.rsp, [PTlen = 0] [AADlen = 128] count 0: authentication only.
    Vector {
        cipher: Cipher::Aes256Gcm,
        key: "78dc4e0aaf52d935c3c01eea57428f00ca1fd475f5da86a49c8dd73d68c8e223",
        nonce: "d79cf22d504cc793c3fb6c8a",
        aad: "b96baa8c1c75a671bfb2d08d06be5f36",
        plaintext: "",
        ciphertext: "",
        tag: "3e5d486aa2e30b22e040b85723a06e76",
    },
];

#[test]
fn published_vectors() {
    for provider in providers() {
        for vector in &VECTORS {
            let key = provider.aead(vector.cipher, &hex(vector.key)).unwrap();
            let nonce: [u8; 12] = hex(vector.nonce).try_into().unwrap();
            let aad = hex(vector.aad);
            let mut in_out = hex(vector.plaintext);
            let tag = key.seal(&nonce, &aad, &mut in_out).unwrap();
            assert_eq!(in_out, hex(vector.ciphertext), "{provider:?}");
            assert_eq!(tag.as_slice(), hex(vector.tag), "{provider:?}");
            let mut out = vec![0xee; in_out.len()];
            key.open(&nonce, &aad, &in_out, &tag, &mut out).unwrap();
            assert_eq!(out, hex(vector.plaintext), "{provider:?}");
        }
    }
}

/// GCM as defined in NIST SP 800-38D, from a counter mode and GHASH.
fn oracle<C>(key: &[u8], nonce: &[u8; 12], aad: &[u8], in_out: &mut [u8]) -> [u8; 16]
where
    C: BlockCipherEncrypt + BlockSizeUser<BlockSize = U16> + KeyInit,
{
    let cipher = C::new_from_slice(key).unwrap();
    let mut hash_key = [0; 16].into();
    cipher.encrypt_block(&mut hash_key);
    let mut first = [0; 16];
    first[..12].copy_from_slice(nonce);
    first[15] = 1;
    let mut stream = Ctr32BE::<C>::from_core(CtrCore::inner_iv_init(cipher, &first.into()));
    let mut tag = [0; 16];
    stream.apply_keystream(&mut tag);
    stream.apply_keystream(in_out);
    let mut ghash = GHash::new(&hash_key);
    ghash.update_padded(aad);
    ghash.update_padded(in_out);
    let bits = ((aad.len() as u128 * 8) << 64) | (in_out.len() as u128 * 8);
    ghash.update(&[bits.to_be_bytes().into()]);
    for (tag, hash) in tag.iter_mut().zip(ghash.finalize()) {
        *tag ^= hash;
    }
    tag
}

#[test]
fn providers_agree_with_a_gcm_from_other_parts() {
    for cipher in CIPHERS {
        for len in lengths() {
            let key = pattern(len, cipher.key_len());
            let (nonce, aad, plaintext) = (nonce(len), pattern(1, len * 7 % 200), pattern(2, len));
            let mut expected = plaintext.clone();
            let expected_tag = match cipher {
                Cipher::Aes256Gcm => oracle::<Aes256>(&key, &nonce, &aad, &mut expected),
                Cipher::Sm4Gcm => oracle::<Sm4>(&key, &nonce, &aad, &mut expected),
            };
            for provider in providers() {
                let mut in_out = plaintext.clone();
                let tag =
                    provider.aead(cipher, &key).unwrap().seal(&nonce, &aad, &mut in_out).unwrap();
                assert!(in_out == expected && tag == expected_tag, "{provider:?} {cipher:?} {len}");
            }
        }
    }
}

#[test]
fn what_one_provider_seals_every_other_opens() {
    for cipher in CIPHERS {
        for len in lengths() {
            let key = pattern(len + 1, cipher.key_len());
            let (nonce, aad, plaintext) = (nonce(len), pattern(3, len * 11 % 170), pattern(4, len));
            let keys: Vec<_> =
                providers().iter().map(|provider| provider.aead(cipher, &key).unwrap()).collect();
            for sealer in &keys {
                let mut ciphertext = plaintext.clone();
                let tag = sealer.seal(&nonce, &aad, &mut ciphertext).unwrap();
                for opener in &keys {
                    let mut out = vec![0xee; len];
                    opener.open(&nonce, &aad, &ciphertext, &tag, &mut out).unwrap();
                    assert!(out == plaintext, "{cipher:?} {len}");
                }
            }
        }
    }
}

#[test]
fn whatever_is_changed_is_refused_and_nothing_leaks() {
    for provider in providers() {
        for cipher in CIPHERS {
            let key = provider.aead(cipher, &pattern(0, cipher.key_len())).unwrap();
            for len in [0, 1, 16, 100, 4_096] {
                let (aad, plaintext) = (pattern(1, 33), pattern(2, len));
                let mut ciphertext = plaintext.clone();
                let tag = key.seal(&nonce(5), &aad, &mut ciphertext).unwrap();
                let refused = |nonce: &[u8; 12], aad: &[u8], ciphertext: &[u8], tag: &[u8; 16]| {
                    let mut out = vec![0xee; ciphertext.len()];
                    let result = key.open(nonce, aad, ciphertext, tag, &mut out);
                    assert_eq!(
                        result,
                        Err(CryptoError::AuthenticationFailed),
                        "{provider:?} {cipher:?} {len}"
                    );
                    assert!(out.iter().all(|byte| *byte == 0), "{provider:?} {cipher:?} {len}");
                };
                for bit in 0..128 {
                    let mut tag = tag;
                    tag[bit / 8] ^= 1 << (bit % 8);
                    refused(&nonce(5), &aad, &ciphertext, &tag);
                }
                for bit in 0..96 {
                    let mut nonce = nonce(5);
                    nonce[bit / 8] ^= 1 << (bit % 8);
                    refused(&nonce, &aad, &ciphertext, &tag);
                }
                for at in 0..aad.len() {
                    let mut aad = aad.clone();
                    aad[at] ^= 4;
                    refused(&nonce(5), &aad, &ciphertext, &tag);
                }
                for at in (0..len).step_by(len / 50 + 1) {
                    let mut ciphertext = ciphertext.clone();
                    ciphertext[at] ^= 0x40;
                    refused(&nonce(5), &aad, &ciphertext, &tag);
                }
                refused(&nonce(5), &aad[1..], &ciphertext, &tag);
                refused(&nonce(5), &[], &ciphertext, &tag);
                ciphertext.push(0);
                refused(&nonce(5), &aad, &ciphertext, &tag);
            }
        }
    }
}

#[test]
fn wrong_lengths_are_errors() {
    for provider in providers() {
        for cipher in CIPHERS {
            let expected = cipher.key_len();
            for actual in [0, 1, 15, 16, 17, 24, 31, 32, 33, 64] {
                let result = provider.aead(cipher, &vec![1; actual]).err();
                let error = CryptoError::KeyLength { expected, actual };
                assert_eq!(
                    result,
                    (actual != expected).then_some(error),
                    "{provider:?} {cipher:?}"
                );
            }
            let key = provider.aead(cipher, &vec![1; expected]).unwrap();
            let mut ciphertext = [3; 40];
            let tag = key.seal(&nonce(0), b"", &mut ciphertext).unwrap();
            for actual in [0, 39, 41] {
                let mut out = vec![0xee; actual];
                let result = key.open(&nonce(0), b"", &ciphertext, &tag, &mut out);
                assert_eq!(result, Err(CryptoError::BufferLength { expected: 40, actual }));
                assert_eq!(out, vec![0; actual]);
            }
        }
    }
}

#[cfg(target_pointer_width = "64")]
#[test]
fn the_limit_of_gcm_is_kept() {
    assert_eq!(GCM_BYTES_MAX, 68_719_476_704);
    assert_eq!(check_len(GCM_BYTES_MAX as usize), Ok(()));
    assert_eq!(check_len(GCM_BYTES_MAX as usize + 1), Err(CryptoError::TooLong));
}

#[test]
fn names_and_errors() {
    fn shared<T: Send + Sync + Copy + Default>(_: T) {}
    shared(RustCrypto::new());
    assert_eq!(RustCrypto.name(), "rustcrypto");
    shared(Sm4Simd::new());
    assert_eq!(Sm4Simd.name(), "sm4-simd");
    #[cfg(feature = "aws-lc")]
    {
        shared(AwsLc::new());
        assert_eq!(AwsLc.name(), "aws-lc");
    }
    let error = CryptoError::KeyLength { expected: 32, actual: 16 };
    assert_eq!(error.to_string(), "a key of 16 bytes instead of 32");
    assert_eq!(CryptoError::TooLong.to_string(), "more than 68719476704 bytes under one nonce");
}
