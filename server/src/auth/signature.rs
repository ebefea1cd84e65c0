//! The two signatures that clients of the service send, over the head of a request. The head has
//! the digest of the body in it, so a signature is checked before any of the body is read.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{Engine, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use jiff::{civil::DateTime, fmt::rfc2822, tz::TimeZone};
use md5::Md5;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use sha1::Sha1;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use crate::{
    call::Call,
    error::{ApiError, Result},
};

/// How far the time in a signature may be from the clock of the service.
pub(crate) const SKEW_MAX: Duration = Duration::from_secs(15 * 60);

const V1: &str = "LOG ";
const V4: &str = "SLS4-HMAC-SHA256";
const V4_SCOPE: &str = "sls/aliyun_v4_request";
const SHA256_HEADER: &str = "x-log-content-sha256";
const DATE_HEADER: &str = "x-log-date";
const V4_DATE: &str = "%Y%m%dT%H%M%SZ";
/// All characters but the unreserved ones of RFC 3986.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// The signature in a request.
#[derive(Debug)]
pub(crate) struct Signed {
    /// The access key that it claims to be made with.
    pub(crate) key_id: String,
    version: Version,
}

#[derive(Debug)]
enum Version {
    V1 { signature: Vec<u8>, date: String },
    V4 { signature: Vec<u8>, date: String, day: String, region: String, digest: String },
}

/// The digest of the body that a signature covers.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum BodyDigest {
    /// There is none: the body must be empty.
    None,
    Md5([u8; 16]),
    Sha256([u8; 32]),
}

impl BodyDigest {
    /// # Errors
    /// 400 if it is not the digest of `body`.
    pub(crate) fn check(&self, body: &[u8]) -> Result<()> {
        let matches = match self {
            Self::None => body.is_empty(),
            Self::Md5(digest) => bool::from(Md5::digest(body)[..].ct_eq(digest)),
            Self::Sha256(digest) => bool::from(Sha256::digest(body)[..].ct_eq(digest)),
        };
        if matches {
            return Ok(());
        }
        Err(ApiError::unauthorized(
            "SignatureNotMatch",
            "the body is not the one that was signed: Content-MD5 or x-log-content-sha256 differs",
        ))
    }
}

impl Signed {
    /// Finds the signature in the head of a request.
    ///
    /// # Errors
    /// 401 if there is none, or none of a known form.
    pub(crate) fn of(call: &Call) -> Result<Self> {
        let refused = |why: &str| ApiError::unauthorized("Unauthorized", why.to_owned());
        let header = call.header("authorization");
        let header = header.ok_or_else(|| refused("the request has no Authorization header"))?;
        let malformed = || refused("the Authorization header has no known form");
        if let Some(credential) = header.strip_prefix(V1) {
            let (key_id, signature) = credential.trim().rsplit_once(':').ok_or_else(malformed)?;
            let signature = STANDARD.decode(signature).map_err(|_| malformed())?;
            let date = call.header(DATE_HEADER).or_else(|| call.header("date"));
            let date = date.ok_or_else(no_date)?.to_owned();
            return Ok(Self {
                key_id: key_id.to_owned(),
                version: Version::V1 { signature, date },
            });
        }
        let parts = header.strip_prefix(V4).ok_or_else(malformed)?;
        let (credential, signature) = parts.split_once(',').ok_or_else(malformed)?;
        let credential = credential.trim().strip_prefix("Credential=").ok_or_else(malformed)?;
        let signature = signature.trim().strip_prefix("Signature=").ok_or_else(malformed)?;
        let signature = from_hex(signature).ok_or_else(malformed)?;
        let scope = credential.strip_suffix(V4_SCOPE).and_then(|it| it.strip_suffix('/'));
        let mut scope = scope.ok_or_else(malformed)?.rsplitn(3, '/');
        let (Some(region), Some(day), Some(key_id)) = (scope.next(), scope.next(), scope.next())
        else {
            return Err(malformed());
        };
        let digest = call.header(SHA256_HEADER);
        let digest = digest.ok_or_else(|| refused("x-log-content-sha256 is missing"))?.to_owned();
        let date = call.header(DATE_HEADER).ok_or_else(no_date)?.to_owned();
        let (day, region) = (day.to_owned(), region.to_owned());
        let version = Version::V4 { signature, date, day, region, digest };
        Ok(Self { key_id: key_id.to_owned(), version })
    }

    /// Checks that the signature was made with `secret`, in constant time.
    ///
    /// # Errors
    /// 401 if it was not.
    pub(crate) fn verify(&self, call: &Call, secret: &[u8]) -> Result<()> {
        let (wanted, given) = match &self.version {
            Version::V1 { signature, date } => (v1(call, date, secret), signature),
            Version::V4 { signature, date, day, region, digest } => {
                // Clients leave the port out of the host that they sign, or keep it.
                let bare = call.host.rsplit_once(':').map_or(&*call.host, |(host, _)| host);
                let sign = |host| v4(call, host, date, &format!("{day}/{region}"), digest, secret);
                let with_port = sign(&call.host);
                let matches = bool::from(with_port.ct_eq(signature));
                (if matches { with_port } else { sign(bare) }, signature)
            }
        };
        if bool::from(wanted.ct_eq(given)) {
            return Ok(());
        }
        let message = "the signature does not match: check the access key secret";
        Err(ApiError::unauthorized("SignatureNotMatch", message))
    }

    /// How long a signature may be valid, from its time on, in seconds.
    pub(crate) const VALID_S: u64 = SKEW_MAX.as_secs();

    /// The time and the bytes of a signature of version 4.
    pub(crate) fn of_version_4(self) -> Option<(i64, Vec<u8>)> {
        match self.version {
            Version::V4 { signature, date, .. } => Some((v4_time(&date)?, signature)),
            Version::V1 { .. } => None,
        }
    }

    /// Checks the time of the signature against the clock.
    ///
    /// # Errors
    /// 400 if they are further apart than [`SKEW_MAX`].
    pub(crate) fn check_time(&self, now: SystemTime) -> Result<()> {
        let (signed, text) = match &self.version {
            Version::V1 { date, .. } => (v1_time(date), date),
            Version::V4 { date, day, .. } => {
                // The key of the signature is one of a day.
                (v4_time(date).filter(|_| date.starts_with(&**day)), date)
            }
        };
        let invalid = || ApiError::bad("InvalidDateFormat", format!("the date {text} is invalid"));
        let signed = signed.ok_or_else(invalid)?;
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let now = i64::try_from(now).unwrap_or(i64::MAX);
        if now.abs_diff(signed) <= SKEW_MAX.as_secs() {
            return Ok(());
        }
        let message = "the time of the request is more than 15 minutes away from that of the \
                       service: check the clock";
        Err(ApiError::bad("RequestTimeTooSkewed", message))
    }

    /// The digest of the body that the signature covers.
    ///
    /// # Errors
    /// 400 for a digest of no known form.
    pub(crate) fn body_digest(&self, call: &Call) -> Result<BodyDigest> {
        let malformed = || ApiError::parameter("the digest of the body is not hexadecimal");
        let decode = |text: &str| from_hex(text).ok_or_else(malformed);
        Ok(match &self.version {
            Version::V1 { .. } => match call.header("content-md5") {
                None | Some("") => BodyDigest::None,
                Some(text) => BodyDigest::Md5(decode(text)?.try_into().map_err(|_| malformed())?),
            },
            Version::V4 { digest, .. } => {
                BodyDigest::Sha256(decode(digest)?.try_into().map_err(|_| malformed())?)
            }
        })
    }
}

fn no_date() -> ApiError {
    ApiError::bad("MissingDate", "the request has neither x-log-date nor Date")
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u8> =
        text.chars().map(|c| c.to_digit(16).map(|it| it as u8)).collect::<Option<_>>()?;
    digits
        .len()
        .is_multiple_of(2)
        .then(|| digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn v1_time(text: &str) -> Option<i64> {
    Some(rfc2822::DateTimeParser::new().parse_timestamp(text).ok()?.as_second())
}

fn v4_time(text: &str) -> Option<i64> {
    let time = DateTime::strptime(V4_DATE, text).ok()?;
    Some(TimeZone::UTC.to_timestamp(time).ok()?.as_second())
}

/// The headers of the service that a signature covers, in the order of their names.
fn signed_headers(call: &Call) -> Vec<(&str, &str)> {
    let is_signed = |name: &str| {
        (name.starts_with("x-log-") || name.starts_with("x-acs-"))
            && !name.starts_with("x-log-meta-")
    };
    let headers = call.headers.iter().filter(|(name, _)| is_signed(name.as_str()));
    let mut headers: Vec<(&str, &str)> =
        headers.map(|(name, value)| (name.as_str(), value.to_str().unwrap_or_default())).collect();
    headers.sort_unstable();
    headers
}

fn v1(call: &Call, date: &str, secret: &[u8]) -> Vec<u8> {
    let header = |name| call.header(name).unwrap_or_default();
    let mut text =
        format!("{}\n{}\n{}\n{date}\n", call.method, header("content-md5"), header("content-type"));
    for (name, value) in signed_headers(call) {
        if name != DATE_HEADER {
            text.push_str(&format!("{name}:{value}\n"));
        }
    }
    text.push_str(&call.path);
    for (index, (name, value)) in call.query.iter().enumerate() {
        let separator = if index == 0 { '?' } else { '&' };
        text.push_str(&format!("{separator}{name}={value}"));
    }
    // A MAC takes keys of any length.
    let Ok(mut mac) = Hmac::<Sha1>::new_from_slice(secret) else { return Vec::new() };
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

fn v4(
    call: &Call,
    host: &str,
    date: &str,
    day_and_region: &str,
    digest: &str,
    secret: &[u8],
) -> Vec<u8> {
    let mut headers = signed_headers(call);
    headers.extend(call.header("content-type").map(|value| ("content-type", value)));
    headers.extend((!host.is_empty()).then_some(("host", host)));
    headers.sort_unstable();
    let query: Vec<String> = (call.query.iter())
        .map(|(name, value)| match &**value {
            "" => name.clone(),
            value => format!("{name}={}", utf8_percent_encode(value, ESCAPED)),
        })
        .collect();
    let mut text = format!("{}\n{}\n{}\n", call.method, call.path, query.join("&"));
    for (name, value) in &headers {
        text.push_str(&format!("{name}:{}\n", value.trim()));
    }
    let names: Vec<&str> = headers.iter().map(|(name, _)| *name).collect();
    text.push_str(&format!("\n{}\n{digest}", names.join(";")));
    let scope = format!("{day_and_region}/{V4_SCOPE}");
    let hashed = hex(&Sha256::digest(text.as_bytes()));
    let to_sign = format!("{V4}\n{date}\n{scope}\n{hashed}");
    let first = Zeroizing::new([b"aliyun_v4", secret].concat());
    let mac = |key: Zeroizing<Vec<u8>>, part: &str| sha256_mac(&key, part.as_bytes()).into();
    let key = scope.split('/').fold(first, mac);
    sha256_mac(&key, to_sign.as_bytes())
}

/// The value of `Authorization` for a request, by version 4.
pub(crate) fn sign_v4(call: &Call, key_id: &str, secret: &[u8]) -> String {
    let date = call.header(DATE_HEADER).unwrap_or_default();
    let digest = call.header(SHA256_HEADER).unwrap_or_default();
    let scope = format!("{}/local", date.get(..8).unwrap_or_default());
    let signature = v4(call, &call.host, date, &scope, digest, secret);
    format!("{V4} Credential={key_id}/{scope}/{V4_SCOPE},Signature={}", hex(&signature))
}

pub(crate) fn sha256_hex(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn sha256_mac(key: &[u8], text: &[u8]) -> Vec<u8> {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else { return Vec::new() };
    mac.update(text);
    mac.finalize().into_bytes().to_vec()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use hyper::Request;
    use proptest::prelude::*;

    use super::*;

    /// A request as a client recorded it, without its body.
    fn recorded(head: &str) -> Call {
        let mut lines = head.lines();
        let mut line = lines.next().unwrap().split(' ');
        let mut request = Request::builder().method(line.next().unwrap()).uri(line.next().unwrap());
        for line in lines {
            let (name, value) = line.split_once(':').unwrap();
            request = request.header(name, value.trim());
        }
        Call::new(request.body(()).unwrap().into_parts().0, "sls.local").unwrap()
    }

    fn check(head: &str, secret: &str) -> Result<()> {
        let call = recorded(head);
        Signed::of(&call)?.verify(&call, secret.as_bytes())
    }

    const PUT_V1: &str =
        "POST http://demo-project.sls.local:8099/logstores/demo-store/shards/lb HTTP/1.1
Host: demo-project.sls.local
x-log-bodyrawsize: 74
Content-Type: application/x-protobuf
x-log-compresstype: lz4
x-log-apiversion: 0.6.0
x-log-signaturemethod: hmac-sha1
Date: Tue, 24 Nov 2026 02:12:27 GMT
Content-MD5: 4EE8490E8ADB1E993F2349B314DA7A8C
Authorization: LOG testAK:2thopOs4lj1cwoFXOPUAJDWNH1A=
x-log-date: Tue, 24 Nov 2026 02:12:27 GMT";
    const CURSOR_V1: &str =
        "GET /logstores/demo-store/shards/0?type=cursor_time&cursor=MA%3D%3D HTTP/1.1
Content-Type: application/json
x-log-bodyrawsize: 0
x-log-apiversion: 0.6.0
Host: demo-project.sls.local
x-log-signaturemethod: hmac-sha1
Date: Tue, 24 Nov 2026 02:12:26 GMT
Authorization: LOG testAK:DyYWwVEQ6940ypvgZyP3ZH57AjU=
x-log-date: Tue, 24 Nov 2026 02:12:26 GMT";
    const NODE_V1: &str = "POST /logstores/node-store/shards/lb? HTTP/1.1
content-type: application/x-protobuf
date: Sun, 29 Nov 2026 00:17:12 GMT
x-log-apiversion: 0.6.0
x-log-signaturemethod: hmac-sha1
x-log-bodyrawsize: 70
content-md5: 036E3F8EE672D0F214A921C63FCF5C45
authorization: LOG testAK:I9Dn2UwMHiLswbdExlMYf/kuz1g=
Host: node-project.sls.local:8198";
    const PUT_V4: &str = "POST /logstores/demo-store/shards/lb HTTP/1.1
x-log-bodyrawsize: 74
Content-Type: application/x-protobuf
x-log-compresstype: lz4
x-log-apiversion: 0.6.0
Host: demo-project.sls.local
x-log-content-sha256: 8fe69dffed021b36271eb9a7e8847ac0457975d6101936a9f509c6e2e42922c0
x-log-date: 20261124T021227Z
Authorization: SLS4-HMAC-SHA256 Credential=testAK/20261124/local/sls/aliyun_v4_request,Signature=5d8516c66f088cc2b0069a8bc26553e4f25562a1be6773b6e017e0a2f49107c8";
    const HEARTBEAT_V4: &str = "POST /logstores/demo-store/consumergroups/g%20v4?type=heartbeat&consumer=consumer+1%2F%C3%A9 HTTP/1.1
Content-Type: application/json
x-log-apiversion: 0.6.0
Host: demo-project.sls.local
x-log-content-sha256: 4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945
x-log-date: 20261129T002841Z
Authorization: SLS4-HMAC-SHA256 Credential=testAK/20261129/local/sls/aliyun_v4_request,Signature=482187e47390611a9fd29c5fa9cb9435f58a9bd18454958b82eae56d21b84e7f";

    #[test]
    fn the_signatures_of_real_clients_hold() {
        for head in [PUT_V1, CURSOR_V1, NODE_V1, PUT_V4, HEARTBEAT_V4] {
            check(head, "testSK").unwrap();
            assert_eq!(check(head, "testSK ").unwrap_err().code, "SignatureNotMatch");
        }
    }

    #[test]
    fn published_examples_of_both_signatures_hold() {
        let v1 = "POST /logstores/test-logstore?line=100&offset=0&type=log HTTP/1.1
Host: sls.local
x-log-apiversion: 0.6.0
x-log-signaturemethod: hmac-sha1
Content-Type: application/json
Content-MD5: CE688F8D1AC3ED309BA9BE0A5ABAFCE5
Date: Thu, 01 Jan 1970 00:00:00 GMT
Authorization: LOG id:4pL2xZJERC3tPKtRiHh9+nMG3tI=";
        check(v1, "test-access-key").unwrap();
        let empty = "GET / HTTP/1.1
Host: sls.local
x-log-apiversion: 0.6.0
x-log-signaturemethod: hmac-sha1
Date: Thu, 01 Jan 1970 00:00:00 GMT
Authorization: LOG id:SApFTtfTFKHmzdEdaMe5TjNn+RQ=";
        check(empty, "").unwrap();
        // This one signs no host.
        let mut call =
            recorded("POST /logstores HTTP/1.1\nHost: sls.local\nx-log-date: 20220808T032330Z");
        let digest = hex(&Sha256::digest(b"adasd= -asd zcas"));
        call.headers.insert(SHA256_HEADER, digest.parse().unwrap());
        let sign =
            v4(&call, "", "20220808T032330Z", "20220808/cn-shanghai", &digest, b"zxasdasdasw2");
        assert_eq!(hex(&sign), "8a10a5e723cb2e75964816de660b2c16a58af8bc0261f7f0722d832468c76ce8");
    }

    #[test]
    fn every_signed_part_counts() {
        for (head, from, to) in [
            (PUT_V1, "POST", "PUT"),
            (PUT_V1, "demo-store", "demo-stor"),
            (PUT_V1, "4EE8", "5EE8"),
            (PUT_V1, "bodyrawsize: 74", "bodyrawsize: 75"),
            (PUT_V1, "x-log-date: Tue, 24", "x-log-date: Tue, 25"),
            (CURSOR_V1, "MA%3D%3D", "MQ%3D%3D"),
            (PUT_V4, "x-log-compresstype: lz4", "x-log-compresstype: zstd"),
            (PUT_V4, "8fe69d", "9fe69d"),
            (PUT_V4, "20261124T021227Z", "20261124T021228Z"),
            (PUT_V4, "/local/", "/other/"),
            (PUT_V4, "Host: demo-project", "Host: demo-projecu"),
            (HEARTBEAT_V4, "consumer+1", "consumer+2"),
        ] {
            assert!(head.contains(from));
            let refusal = check(&head.replace(from, to), "testSK").unwrap_err();
            assert_eq!(refusal.code, "SignatureNotMatch", "{from}");
        }
    }

    #[test]
    fn a_time_beyond_the_window_is_refused() {
        // 24 November 2026, 02:12:27.
        let signed_at = UNIX_EPOCH + Duration::from_secs(1_795_486_347);
        for head in [PUT_V1, PUT_V4] {
            let signed = Signed::of(&recorded(head)).unwrap();
            for now in [signed_at, signed_at + SKEW_MAX, signed_at - SKEW_MAX] {
                signed.check_time(now).unwrap();
            }
            let second = Duration::from_secs(1);
            for now in [signed_at + SKEW_MAX + second, signed_at - SKEW_MAX - second, UNIX_EPOCH] {
                assert_eq!(signed.check_time(now).unwrap_err().code, "RequestTimeTooSkewed");
            }
        }
        let other_day = PUT_V4.replace("testAK/20261124", "testAK/20261123");
        let refusal = Signed::of(&recorded(&other_day)).unwrap().check_time(signed_at);
        assert_eq!(refusal.unwrap_err().code, "InvalidDateFormat");
    }

    #[test]
    fn the_body_must_be_the_one_that_was_signed() {
        let body = b"[]";
        let call = recorded(HEARTBEAT_V4);
        let digest = Signed::of(&call).unwrap().body_digest(&call).unwrap();
        digest.check(body).unwrap();
        assert_eq!(digest.check(b"[1]").unwrap_err().code, "SignatureNotMatch");
        let call = recorded(CURSOR_V1);
        let digest = Signed::of(&call).unwrap().body_digest(&call).unwrap();
        assert_eq!(digest, BodyDigest::None);
        assert!(digest.check(b"").is_ok() && digest.check(b"x").is_err());
    }

    proptest! {
        #[test]
        fn no_header_is_too_strange(header in "(LOG |SLS4-HMAC-SHA256 )?[ -~]{0,60}", date in "[ -~]{0,40}") {
            let head = format!("GET / HTTP/1.1\nHost: sls.local\nx-log-date: {date}\nAuthorization: {header}");
            let call = recorded(&head);
            if let Ok(signed) = Signed::of(&call) {
                prop_assert!(signed.verify(&call, b"secret").is_err());
                let _ = (signed.check_time(UNIX_EPOCH), signed.body_digest(&call));
            }
        }
    }
}
