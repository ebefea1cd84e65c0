//! Request signatures, version 3: `ACS3-HMAC-SHA256`.
//!
//! The signature covers the *canonical request*: method, path, query, headers, their names, and the
//! hash of the body, one per line. The access key's secret is the key of the HMAC. "Request syntax
//! and signature method V3" of Alibaba Cloud's OpenAPI documentation specifies it. The test
//! compares with requests of the official Python SDK.

use std::{collections::BTreeMap, fmt};

use hmac::{Hmac, KeyInit, Mac};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::{
    crypto::{HashAlg, hash},
    ids::hex_encode,
};

const ALGORITHM: &str = "ACS3-HMAC-SHA256";
/// All but the unreserved characters of RFC 3986.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// An access key, with a security token where it is a temporary one.
pub(super) struct Credentials {
    pub(super) id: String,
    pub(super) secret: Zeroizing<String>,
    pub(super) token: Option<Zeroizing<String>>,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credentials(..)")
    }
}

/// Names and values, in the order of the names.
pub(super) type Pairs<'a> = BTreeMap<&'a str, &'a str>;

/// A query in its canonical form, which is also sent. Also the body of a form.
pub(super) fn encode(parameters: &Pairs<'_>) -> String {
    let escape = |text| utf8_percent_encode(text, ESCAPED);
    let pairs =
        parameters.iter().map(|(name, value)| format!("{}={}", escape(name), escape(value)));
    pairs.collect::<Vec<_>>().join("&")
}

/// The value of `x-acs-content-sha256`.
pub(super) fn body_hash(body: &[u8]) -> String {
    hex_encode(&hash(HashAlg::Sha256, &[body]))
}

/// The value of the header `Authorization` for a POST to `/`. It signs all of these headers, whose
/// names are in lower case.
pub(super) fn authorization(
    query: &str,
    headers: &Pairs<'_>,
    body_hash: &str,
    credentials: &Credentials,
) -> String {
    let names = headers.keys().copied().collect::<Vec<_>>().join(";");
    let lines: String =
        headers.iter().map(|(name, value)| format!("{name}:{}\n", value.trim())).collect();
    let canonical = format!("POST\n/\n{query}\n{lines}\n{names}\n{body_hash}");
    let digest = hex_encode(&hash(HashAlg::Sha256, &[canonical.as_bytes()]));
    let secret = credentials.secret.as_bytes();
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes keys of any length");
    mac.update(format!("{ALGORITHM}\n{digest}").as_bytes());
    let signature = hex_encode(&mac.finalize().into_bytes());
    format!("{ALGORITHM} Credential={},SignedHeaders={names},Signature={signature}", credentials.id)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::Value;

    use super::*;

    /// `tests/kms_aliyun/sdk.json` holds requests of the official SDK at a fixed date and nonce.
    /// `tests/kms_aliyun.rs` can generate it again.
    #[test]
    fn the_same_input_gives_the_signature_of_the_official_sdk() {
        let requests: Value =
            serde_json::from_str(include_str!("../../../tests/kms_aliyun/sdk.json")).unwrap();
        let requests = requests.as_array().unwrap();
        assert_eq!(requests.len(), 5);
        for request in requests {
            let text = |name: &str| request[name].as_str().unwrap();
            let pairs = |name: &str| -> Pairs<'_> {
                let pairs = request[name].as_object().unwrap().iter();
                pairs.map(|(name, value)| (name.as_str(), value.as_str().unwrap())).collect()
            };
            let credentials = Credentials {
                id: text("access_key_id").to_owned(),
                secret: Zeroizing::new(text("access_key_secret").to_owned()),
                token: None,
            };
            let query = encode(&pairs("query"));
            assert_eq!(query, text("canonical_query"));
            let body_hash = body_hash(text("body").as_bytes());
            let ours = authorization(&query, &pairs("signed_headers"), &body_hash, &credentials);
            assert_eq!(ours, text("authorization"), "{}", text("action"));
        }
    }
}
