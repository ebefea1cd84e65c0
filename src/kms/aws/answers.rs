//! Sorts the answers of KMS and STS. The table in the documentation of [`AwsKms`](super::AwsKms)
//! follows this file.

use base64::{Engine, prelude::BASE64_STANDARD};
use reqsign_aws_v4::Credential;
use serde::Deserialize;
use serde_json::Value;
use zeroize::Zeroizing;

use super::{Answer, identity::AccessKey};
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
/// The policy of a VPC endpoint, in the words of [`Failure::refusing_policy`]. The endpoint is the
/// service's own, also where the call is made as the customer's role.
const VPC_ENDPOINT_POLICY: &str = "vpc endpoint policy";
/// The policies of the caller of STS, in the words of [`Failure::refusing_policy`].
const CALLERS_POLICIES: [&str; 7] = [
    "identity-based policy",
    "permissions boundary",
    "session policy",
    // The documentation has both.
    "sessions policy",
    "service control policy",
    VPC_ENDPOINT_POLICY,
    "vpc endpoint policy transitively through a service control policy",
];
/// The message of STS to a root user.
/// <https://docs.aws.amazon.com/STS/latest/APIReference/API_AssumeRole.html> states the rule.
const ROOT_REFUSED: &str = "roles may not be assumed by root accounts.";
/// The beginnings of the messages in which an external key store reports that the key or a
/// ciphertext is refused. Any other message is about the key store or its proxy.
/// <https://docs.aws.amazon.com/kms/latest/developerguide/xks-troubleshooting.html>
const EXTERNAL_KEY: [(&str, Meaning); 6] = [
    (
        "the external key store proxy rejected the request because the external key is not enabled",
        Meaning::Revoked(RevokedReason::Disabled),
    ),
    (
        "the external key store proxy rejected the request because the external key does not support the requested operation",
        Meaning::Revoked(RevokedReason::Disabled),
    ),
    (
        "the external key store proxy rejected the request because it could not find the external key",
        Meaning::Revoked(RevokedReason::Deleted),
    ),
    (
        "the external key store proxy denied access to the operation",
        Meaning::Revoked(RevokedReason::NotPermitted),
    ),
    (
        "the external key store proxy rejected the request because the specified ciphertext",
        Meaning::Invalid,
    ),
    ("the ciphertext that the external key store proxy submitted for decryption", Meaning::Invalid),
];

/// The meaning of an error answer.
#[derive(Clone, Copy)]
enum Meaning {
    Revoked(RevokedReason),
    Unreachable,
    Invalid,
}

/// An error answer of KMS or STS: its documented error code and its message.
pub(super) struct Failure {
    status: u16,
    /// Empty if the answer does not come from KMS or STS.
    code: String,
    /// In lower case.
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

    /// Sorts a failure of KMS. The customer's role is logged in there.
    pub(super) fn sort_kms(&self, what: &str) -> KmsError {
        self.error(
            what,
            match self.code() {
                "DisabledException" => Meaning::Revoked(RevokedReason::Disabled),
                "NotFoundException" => Meaning::Revoked(RevokedReason::Deleted),
                "AccessDeniedException"
                    if self.refusing_policy().as_deref() != Some(VPC_ENDPOINT_POLICY) =>
                {
                    Meaning::Revoked(RevokedReason::NotPermitted)
                }
                "KMSInvalidStateException" => self.meaning_of_state(),
                "InvalidCiphertextException"
                | "IncorrectKeyException"
                | "InvalidKeyUsageException"
                | "InvalidGrantTokenException"
                | "InvalidArnException"
                | "UnsupportedOperationException"
                | "ValidationException"
                | "SerializationException" => Meaning::Invalid,
                _ => Meaning::Unreachable,
            },
        )
    }

    /// Sorts a failure of STS. The service itself is logged in there.
    pub(super) fn sort_sts(&self, what: &str) -> KmsError {
        self.error(what, self.meaning_at_sts())
    }

    /// Whether STS refuses this caller. Newer credentials of the service may help.
    pub(super) fn is_refusal_by_sts(&self) -> bool {
        !self.code().is_empty()
            && !self.is_transient()
            && !matches!(self.meaning_at_sts(), Meaning::Invalid)
    }

    fn meaning_at_sts(&self) -> Meaning {
        match self.code() {
            "AccessDenied" if !self.refuses_caller() => {
                Meaning::Revoked(RevokedReason::NotPermitted)
            }
            "ValidationError" | "MalformedPolicyDocument" | "PackedPolicyTooLarge" => {
                Meaning::Invalid
            }
            _ => Meaning::Unreachable,
        }
    }

    fn error(&self, what: &str, meaning: Meaning) -> KmsError {
        let detail = self.detail(what);
        match meaning {
            Meaning::Revoked(reason) => KmsError::Revoked { reason, detail },
            Meaning::Unreachable => KmsError::unreachable(detail),
            Meaning::Invalid => KmsError::Invalid { detail },
        }
    }

    /// The meaning of a `KMSInvalidStateException`. Only the message names the state: "ARN is
    /// pending deletion."
    fn meaning_of_state(&self) -> Meaning {
        let is = |state: &str| self.message.contains(state);
        if is(" is pending deletion") || is(" is pending replica deletion") {
            return Meaning::Revoked(RevokedReason::PendingDeletion);
        }
        // The customer has deleted the imported key material, or it has expired.
        if is(" is pending import") {
            return Meaning::Revoked(RevokedReason::Deleted);
        }
        EXTERNAL_KEY
            .iter()
            .find(|(begin, _)| self.message.starts_with(begin))
            .map_or(Meaning::Unreachable, |&(_, meaning)| meaning)
    }

    /// Whether STS refuses the caller by a policy of the caller's own, and not by the trust policy
    /// of the role.
    fn refuses_caller(&self) -> bool {
        self.refusing_policy().is_some_and(|policy| CALLERS_POLICIES.contains(&policy.as_str()))
            || self.message == ROOT_REFUSED
    }

    /// The type of the policy that refuses a call, if the message has the form that AWS documents:
    /// `User: ARN is not authorized to perform: ACTION on resource: ARN because no TYPE allows the
    /// ACTION action`, or `… with an explicit deny in a TYPE: ARN`. The parts about the resource
    /// and, at the end, the policy's ARN may be missing. User, action and resource are single
    /// words, so no name in them passes for a reason.
    /// <https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_access-denied.html>
    fn refusing_policy(&self) -> Option<String> {
        let words: Vec<&str> = self.message.split_ascii_whitespace().collect();
        let ["user:", _, "is", "not", "authorized", "to", "perform:", _, rest @ ..] = &words[..]
        else {
            return None;
        };
        let reason = match rest {
            ["on", "resource:", _, reason @ ..] => reason,
            reason => reason,
        };
        match reason {
            ["because", "no", policy @ .., "allows", "the", _, "action"] => Some(policy.join(" ")),
            ["with", "an", "explicit", "deny", "in", "a" | "an" | "the", policy @ ..] => {
                let policy = policy.join(" ");
                Some(policy.split_once(": ").map_or(policy.as_str(), |(name, _)| name).to_owned())
            }
            _ => None,
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

/// The credentials of a role, in an answer to AssumeRole.
pub(super) fn session(answer: &Answer) -> Result<AccessKey, KmsError> {
    let Some(StsAnswer::AssumeRoleResponse(response)) = parse_sts(answer) else {
        return Err(KmsError::invalid("STS: not an answer to AssumeRole"));
    };
    let StsCredentials { access_key_id, secret_access_key, session_token } =
        response.result.credentials;
    let session_token = Some(session_token);
    Ok(AccessKey::new(Credential {
        access_key_id,
        secret_access_key,
        session_token,
        expires_in: None,
    }))
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
        .map_err(|_| KmsError::invalid("KMS: not an answer to Encrypt"))?;
    let bytes = BASE64_STANDARD
        .decode(&encrypted.ciphertext_blob)
        .map_err(|_| KmsError::invalid("KMS: no base64"))?;
    if bytes.is_empty() || bytes.len() > CIPHERTEXT_BYTES_MAX {
        return Err(KmsError::invalid("KMS: a ciphertext of an impossible length"));
    }
    Ok(bytes)
}

/// The key in an answer to Decrypt.
pub(super) fn plaintext(answer: &Answer) -> Result<SecretKey, KmsError> {
    let decrypted: Decrypted = serde_json::from_slice(&answer.body)
        .map_err(|_| KmsError::invalid("KMS: not an answer to Decrypt"))?;
    base64_key::decode(&decrypted.plaintext)
        .ok_or_else(|| KmsError::invalid("KMS: the plaintext is not a key of 32 bytes"))
}
