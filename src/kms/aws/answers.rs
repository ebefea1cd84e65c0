//! What an answer of KMS or STS means. The table in the documentation of [`AwsKms`](super::AwsKms) follows this file.

use base64::{Engine, prelude::BASE64_STANDARD};
use reqsign_aws_v4::Credential;
use serde::Deserialize;
use serde_json::Value;
use zeroize::{Zeroize, Zeroizing};

use super::{Answer, unreachable};
use crate::{
    crypto::SecretKey,
    kms::{KmsError, RevokedReason},
};

/// The longest ciphertext that Decrypt takes, and so the longest that Encrypt makes.
/// <https://docs.aws.amazon.com/kms/latest/APIReference/API_Decrypt.html>
pub(super) const CIPHERTEXT_BYTES_MAX: usize = 6144;
/// A code is a name like `ThrottlingException`, and a request id a UUID; what is longer is neither.
const NAME_BYTES_MAX: usize = 64;

/// A failure in the service's own words: an error code that it documents, and what it says about it.
pub(super) struct Failure {
    status: u16,
    /// Empty when the answer is not one of the service's.
    code: String,
    message: String,
    request_id: String,
}

impl Failure {
    /// An answer of KMS: `{"__type": "NotFoundException", "message": …}`.
    pub(super) fn of_kms(answer: &Answer) -> Self {
        let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let text = |name: &str| body.get(name).and_then(Value::as_str).unwrap_or_default();
        // The name of the service may stand before it: `com.amazonaws.kms#NotFoundException`.
        let code = text("__type").rsplit('#').next().unwrap_or_default();
        let message = if text("message").is_empty() { text("Message") } else { text("message") };
        Self::new(answer, code, message)
    }

    /// An answer of STS: `<ErrorResponse><Error><Code>AccessDenied</Code>…`.
    pub(super) fn of_sts(answer: &Answer) -> Self {
        match parse_sts(answer) {
            Some(StsAnswer::ErrorResponse(ErrorResponse { error })) => Self::new(answer, &error.code, &error.message),
            _ => Self::new(answer, "", ""),
        }
    }

    fn new(answer: &Answer, code: &str, message: &str) -> Self {
        let header = answer.headers.get("x-amzn-requestid").and_then(|id| id.to_str().ok());
        Self {
            status: answer.status,
            code: name(code),
            message: message.to_ascii_lowercase(),
            request_id: name(header.unwrap_or_default()),
        }
    }

    /// Whether it may be over in a moment.
    pub(super) fn is_transient(&self) -> bool {
        const TRANSIENT: [&str; 5] = [
            "ThrottlingException",
            "Throttling",
            "KMSInternalException",
            "DependencyTimeoutException",
            "KeyUnavailableException",
        ];
        self.status >= 500 || self.status == 429 || TRANSIENT.contains(&self.code.as_str())
    }

    /// What KMS means by it.
    pub(super) fn sort_kms(&self, what: &str) -> KmsError {
        let reason = match self.code() {
            "DisabledException" => RevokedReason::Disabled,
            "NotFoundException" => RevokedReason::Deleted,
            "AccessDeniedException" => RevokedReason::NotPermitted,
            // Which state is said in the message alone: "ARN is pending deletion."
            "KMSInvalidStateException" if self.message.contains(" is pending deletion") => {
                RevokedReason::PendingDeletion
            }
            "KMSInvalidStateException" if self.message.contains(" is pending replica deletion") => {
                RevokedReason::PendingDeletion
            }
            // The customer has deleted the key material that they had imported, or let it expire.
            "KMSInvalidStateException" if self.message.contains(" is pending import") => RevokedReason::Deleted,
            "InvalidCiphertextException"
            | "IncorrectKeyException"
            | "InvalidKeyUsageException"
            | "InvalidGrantTokenException"
            | "InvalidArnException"
            | "UnsupportedOperationException"
            | "ValidationException"
            | "SerializationException" => return KmsError::Invalid { detail: self.detail(what) },
            _ => return unreachable(self.detail(what)),
        };
        KmsError::Revoked { reason, detail: self.detail(what) }
    }

    /// What STS means by it.
    pub(super) fn sort_sts(&self, what: &str) -> KmsError {
        match self.code() {
            "AccessDenied" => KmsError::Revoked { reason: RevokedReason::NotPermitted, detail: self.detail(what) },
            "ValidationError" | "MalformedPolicyDocument" | "PackedPolicyTooLarge" => {
                KmsError::Invalid { detail: self.detail(what) }
            }
            _ => unreachable(self.detail(what)),
        }
    }

    /// The code, which only counts under a status that says whose mistake it is: a refusal never comes as a failure of the server.
    fn code(&self) -> &str {
        if (400..500).contains(&self.status) { &self.code } else { "" }
    }

    /// Names the code and the request, by which it is found in the customer's CloudTrail; quotes nothing else of the answer.
    fn detail(&self, what: &str) -> String {
        let Self { status, code, request_id, .. } = self;
        let said = if code.is_empty() { format!("HTTP status {status}") } else { code.clone() };
        if request_id.is_empty() { format!("{what}: {said}") } else { format!("{what}: {said}, request {request_id}") }
    }
}

/// A name, or nothing when it is none.
fn name(text: &str) -> String {
    let is_name = text.len() <= NAME_BYTES_MAX
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':'));
    if is_name { text.to_owned() } else { String::new() }
}

/// The document of an answer of STS, by the name of its root.
#[derive(Deserialize)]
enum StsAnswer {
    AssumeRoleResponse(AssumeRoleResponse),
    ErrorResponse(ErrorResponse),
}

#[derive(Deserialize)]
struct ErrorResponse {
    #[serde(rename = "Error")]
    error: StsError,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct StsError {
    code: String,
    #[serde(default)]
    message: String,
}

#[derive(Deserialize)]
struct AssumeRoleResponse {
    #[serde(rename = "AssumeRoleResult")]
    result: AssumeRoleResult,
}

#[derive(Deserialize)]
struct AssumeRoleResult {
    #[serde(rename = "Credentials")]
    credentials: StsCredentials,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct StsCredentials {
    access_key_id: String,
    secret_access_key: String,
    session_token: String,
}

fn parse_sts(answer: &Answer) -> Option<StsAnswer> {
    quick_xml::de::from_str(str::from_utf8(&answer.body).ok()?).ok()
}

/// The credentials of a role, for one call: wiped after it.
pub(super) struct Session(Credential);

impl Session {
    /// Takes them from what STS answered to AssumeRole.
    pub(super) fn parse(answer: &Answer) -> Result<Self, KmsError> {
        let Some(StsAnswer::AssumeRoleResponse(response)) = parse_sts(answer) else {
            return Err(invalid("STS: not an answer to AssumeRole"));
        };
        let StsCredentials { access_key_id, secret_access_key, session_token } = response.result.credentials;
        let session_token = Some(session_token);
        Ok(Self(Credential { access_key_id, secret_access_key, session_token, expires_in: None }))
    }

    pub(super) fn credential(&self) -> &Credential {
        &self.0
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.0.secret_access_key.zeroize();
        self.0.session_token.zeroize();
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Encrypted {
    ciphertext_blob: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Decrypted {
    plaintext: Zeroizing<String>,
}

/// The ciphertext in an answer to Encrypt.
pub(super) fn ciphertext(answer: &Answer) -> Result<Vec<u8>, KmsError> {
    let encrypted: Encrypted =
        serde_json::from_slice(&answer.body).map_err(|_| invalid("KMS: not an answer to Encrypt"))?;
    let bytes = BASE64_STANDARD.decode(&encrypted.ciphertext_blob).map_err(|_| invalid("KMS: no base64"))?;
    if bytes.is_empty() || bytes.len() > CIPHERTEXT_BYTES_MAX {
        return Err(invalid("KMS: a ciphertext of an impossible length"));
    }
    Ok(bytes)
}

/// The key in an answer to Decrypt.
pub(super) fn plaintext(answer: &Answer) -> Result<SecretKey, KmsError> {
    let decrypted: Decrypted =
        serde_json::from_slice(&answer.body).map_err(|_| invalid("KMS: not an answer to Decrypt"))?;
    // Room for what base64 of a key can be at most, so that a longer one fails too.
    let mut bytes = Zeroizing::new([0; 36]);
    match BASE64_STANDARD.decode_slice(decrypted.plaintext.as_bytes(), &mut *bytes) {
        Ok(32) => {
            let mut key = Zeroizing::new([0; 32]);
            key.copy_from_slice(&bytes[..32]);
            Ok(SecretKey::from_bytes(&mut key))
        }
        _ => Err(invalid("KMS: the plaintext is not a key of 32 bytes")),
    }
}

fn invalid(detail: &str) -> KmsError {
    KmsError::Invalid { detail: detail.to_owned() }
}
