//! Sorts the answers of KMS and STS. The table in the documentation of [`AwsKms`](super::AwsKms)
//! follows this file.

use base64::{Engine, prelude::BASE64_STANDARD};
use reqsign_aws_v4::Credential;
use serde::Deserialize;
use serde_json::Value;
use zeroize::{Zeroize, Zeroizing};

use super::{Answer, unreachable};
use crate::{
    crypto::SecretKey,
    kms::{KmsError, RevokedReason, base64_key},
};

/// The longest ciphertext that Decrypt accepts, and so the longest that Encrypt returns.
/// <https://docs.aws.amazon.com/kms/latest/APIReference/API_Decrypt.html>
pub(super) const CIPHERTEXT_BYTES_MAX: usize = 6144;
/// The longest code or request id, in bytes. A code is a name like `ThrottlingException`, and a
/// request id is a UUID.
const NAME_BYTES_MAX: usize = 64;

/// An error answer of KMS or STS: its documented error code and its message.
pub(super) struct Failure {
    status: u16,
    /// Empty if the answer does not come from KMS or STS.
    code: String,
    message: String,
    request_id: String,
}

impl Failure {
    /// An answer of KMS: `{"__type": "NotFoundException", "message": …}`.
    pub(super) fn of_kms(answer: &Answer) -> Self {
        let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        let text = |name: &str| body.get(name).and_then(Value::as_str).unwrap_or_default();
        // The name of the service may precede it: `com.amazonaws.kms#NotFoundException`.
        let code = text("__type").rsplit('#').next().unwrap_or_default();
        let message = if text("message").is_empty() { text("Message") } else { text("message") };
        Self::new(answer, code, message)
    }

    /// An answer of STS: `<ErrorResponse><Error><Code>AccessDenied</Code>…`.
    pub(super) fn of_sts(answer: &Answer) -> Self {
        match parse_sts(answer) {
            Some(StsAnswer::ErrorResponse(ErrorResponse { error })) => {
                Self::new(answer, &error.code, &error.message)
            }
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

    /// Whether a retry may succeed.
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

    /// Sorts a failure of KMS.
    pub(super) fn sort_kms(&self, what: &str) -> KmsError {
        let reason = match self.code() {
            "DisabledException" => RevokedReason::Disabled,
            "NotFoundException" => RevokedReason::Deleted,
            "AccessDeniedException" => RevokedReason::NotPermitted,
            // Only the message names the state: "ARN is pending deletion."
            "KMSInvalidStateException" if self.message.contains(" is pending deletion") => {
                RevokedReason::PendingDeletion
            }
            "KMSInvalidStateException" if self.message.contains(" is pending replica deletion") => {
                RevokedReason::PendingDeletion
            }
            // The customer has deleted the imported key material, or it has expired.
            "KMSInvalidStateException" if self.message.contains(" is pending import") => {
                RevokedReason::Deleted
            }
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

    /// Sorts a failure of STS.
    pub(super) fn sort_sts(&self, what: &str) -> KmsError {
        match self.code() {
            "AccessDenied" => {
                KmsError::Revoked { reason: RevokedReason::NotPermitted, detail: self.detail(what) }
            }
            "ValidationError" | "MalformedPolicyDocument" | "PackedPolicyTooLarge" => {
                KmsError::Invalid { detail: self.detail(what) }
            }
            _ => unreachable(self.detail(what)),
        }
    }

    /// The code, if the status is 4xx. A refusal never has the status of a server failure, so the
    /// code is ignored then.
    fn code(&self) -> &str {
        if (400..500).contains(&self.status) { &self.code } else { "" }
    }

    /// Names the code and the request id, by which the customer finds the call in CloudTrail.
    /// Quotes nothing else of the answer.
    fn detail(&self, what: &str) -> String {
        let Self { status, code, request_id, .. } = self;
        let said = if code.is_empty() { format!("HTTP status {status}") } else { code.clone() };
        if request_id.is_empty() {
            format!("{what}: {said}")
        } else {
            format!("{what}: {said}, request {request_id}")
        }
    }
}

/// The text if it is a name, or an empty string.
fn name(text: &str) -> String {
    let is_name = text.len() <= NAME_BYTES_MAX
        && text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':'));
    if is_name { text.to_owned() } else { String::new() }
}

/// The document in an answer of STS, by the name of its root element.
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

/// The credentials of a role for one call. Wiped after it.
pub(super) struct Session(Credential);

impl Session {
    /// Parses the answer of STS to AssumeRole.
    pub(super) fn parse(answer: &Answer) -> Result<Self, KmsError> {
        let Some(StsAnswer::AssumeRoleResponse(response)) = parse_sts(answer) else {
            return Err(invalid("STS: not an answer to AssumeRole"));
        };
        let StsCredentials { access_key_id, secret_access_key, session_token } =
            response.result.credentials;
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
    let encrypted: Encrypted = serde_json::from_slice(&answer.body)
        .map_err(|_| invalid("KMS: not an answer to Encrypt"))?;
    let bytes = BASE64_STANDARD
        .decode(&encrypted.ciphertext_blob)
        .map_err(|_| invalid("KMS: no base64"))?;
    if bytes.is_empty() || bytes.len() > CIPHERTEXT_BYTES_MAX {
        return Err(invalid("KMS: a ciphertext of an impossible length"));
    }
    Ok(bytes)
}

/// The key in an answer to Decrypt.
pub(super) fn plaintext(answer: &Answer) -> Result<SecretKey, KmsError> {
    let decrypted: Decrypted = serde_json::from_slice(&answer.body)
        .map_err(|_| invalid("KMS: not an answer to Decrypt"))?;
    base64_key::decode(&decrypted.plaintext)
        .ok_or_else(|| invalid("KMS: the plaintext is not a key of 32 bytes"))
}

fn invalid(detail: &str) -> KmsError {
    KmsError::Invalid { detail: detail.to_owned() }
}
