//! Data keys as base64, in requests and answers of cloud KMSs.

use base64::{Engine, prelude::BASE64_STANDARD};
use zeroize::Zeroizing;

use crate::crypto::SecretKey;

/// The length of 32 bytes in base64.
#[cfg(any(feature = "kms-aws", feature = "kms-vault"))]
const TEXT_BYTES: usize = 44;

/// The key as text, which is wiped on drop.
#[cfg(any(feature = "kms-aws", feature = "kms-vault"))]
pub(super) fn encode(key: &SecretKey) -> Zeroizing<String> {
    // The library's own string would grow, and leave copies of its content behind.
    let mut bytes = Zeroizing::new([0; TEXT_BYTES]);
    let len = BASE64_STANDARD.encode_slice(key.expose(), bytes.as_mut_slice()).unwrap_or(0);
    let mut text = Zeroizing::new(String::with_capacity(TEXT_BYTES));
    text.push_str(str::from_utf8(&bytes[..len]).unwrap_or_default());
    text
}

/// The key in a text, if the text is the base64 of 32 bytes.
pub(super) fn decode(text: &str) -> Option<SecretKey> {
    // Room for the longest base64 of a key, so that a longer key fails too.
    let mut bytes = Zeroizing::new([0; 36]);
    match BASE64_STANDARD.decode_slice(text, bytes.as_mut_slice()) {
        Ok(32) => bytes.first_chunk().map(|key| SecretKey::from_bytes(&mut Zeroizing::new(*key))),
        _ => None,
    }
}

#[cfg(all(test, any(feature = "kms-aws", feature = "kms-vault")))]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_text_is_one_key_of_32_bytes() {
        let text = encode(&SecretKey::from_bytes(&mut [7; 32]));
        assert_eq!((text.len(), text.capacity()), (TEXT_BYTES, TEXT_BYTES));
        assert_eq!(decode(&text).unwrap().expose(), &[7; 32]);
        for len in [0, 1, 31, 33, 64, 4000] {
            assert!(decode(&BASE64_STANDARD.encode(vec![7; len])).is_none(), "{len}");
        }
        for text in ["not base64", &text[..43], &format!("{}\n", &*text), &text.replace('=', "")] {
            assert!(decode(text).is_none(), "{text}");
        }
    }
}
