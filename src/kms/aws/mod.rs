//! AWS KMS.
//!
//! A lean client replaces the SDK: three operations (AssumeRole, Encrypt, Decrypt), credentials and
//! signatures by `reqsign`, HTTP by `ureq`, TLS by `rustls` with AWS-LC. The SDK needs an async
//! runtime, and leaves copies of the data key in memory that it does not wipe. `docs/kms.md` has
//! the figures.

mod answers;
mod identity;
#[cfg(test)]
mod tests;

use std::{sync::Arc, thread, time::Duration};

use base64::{Engine, prelude::BASE64_STANDARD};
use reqsign_aws_v4::Credential;
use reqsign_core::Env;
use serde::Serialize;
use ureq::http::{Request, Uri};

use self::{
    answers::{CIPHERTEXT_BYTES_MAX, Failure, Session},
    identity::{Identity, ProcessEnv, sign},
};
use super::{
    Cmk, EncryptionContext, Kms, KmsCall, KmsError, KmsUrlError, base64_key,
    http::{self, Answer, Deadline, Http, NoAnswer, authority},
};
use crate::crypto::SecretKey;

/// The session name that CloudTrail shows when a role is used.
const SESSION_NAME: &str = "envelog";
/// Limits the session to these actions, even if the role allows more. `PackedPolicySize` has a
/// limit; this policy is small.
const SESSION_POLICY: &str = r#"{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":["kms:Encrypt","kms:Decrypt"],"Resource":"*"}]}"#;
/// The shortest session that STS creates. The backend discards it right after the call.
const SESSION_SECONDS: &str = "900";
/// The most attempts for one request, and the pause before the second one. The pause doubles each
/// time.
const TRIES: u32 = 3;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// The variable that names a file of certificates, which replace the system's, as for the other AWS
/// tools.
const CA_BUNDLE: &str = "AWS_CA_BUNDLE";

/// AWS KMS in one region.
///
/// [`Cmk::cmk_key_id`] is a key id, key ARN or alias of a symmetric encryption key. [`Cmk::arn`] is
/// the IAM role that uses the key. The backend assumes the role through AWS STS again at each call.
/// It keeps only connections and the service's own credentials between calls.
///
/// # The service's own credentials
///
/// The backend looks for them in this order: environment (`AWS_ACCESS_KEY_ID`, …), web identity
/// (`AWS_WEB_IDENTITY_TOKEN_FILE` and `AWS_ROLE_ARN`), the profile (`AWS_PROFILE`, or `default`) in
/// `~/.aws/credentials` and `~/.aws/config` with its access key, SSO session or
/// `credential_process`, container (`AWS_CONTAINER_CREDENTIALS_…`), instance metadata (IMDSv2). The
/// first source that is set up decides. If it fails, the backend does not try the next one, because
/// that may be another identity. The backend does not follow a profile's `role_arn`;
/// `credential_process = aws configure export-credentials --profile NAME` serves such a profile.
///
/// Credentials that expire are kept until two minutes before they expire, or until a server refuses
/// them.
///
/// # How answers are sorted
///
/// | source | answer | result |
/// |---|---|---|
/// | KMS | `DisabledException` | `Revoked`: disabled |
/// | KMS | `KMSInvalidStateException`, "… is pending deletion", "… is pending replica deletion" | `Revoked`: pending deletion |
/// | KMS | `KMSInvalidStateException`, "… is pending import": its imported material was deleted or has expired | `Revoked`: deleted |
/// | KMS | any other `KMSInvalidStateException`: AWS calls it a general failure with many causes | `Unreachable` |
/// | KMS | `NotFoundException` | `Revoked`: deleted |
/// | KMS | `AccessDeniedException` | `Revoked`: not permitted |
/// | STS | `AccessDenied`: also for a role that does not exist | `Revoked`: not permitted |
/// | KMS | `InvalidCiphertextException` (damaged, or another context), `IncorrectKeyException`, `InvalidKeyUsageException`, `InvalidGrantTokenException`, `InvalidArnException`, `UnsupportedOperationException`, `ValidationException`, `SerializationException` | `Invalid` |
/// | STS | `ValidationError` (no ARN of a role), `MalformedPolicyDocument`, `PackedPolicyTooLarge` | `Invalid` |
/// | STS | `InvalidClientTokenId`, `ExpiredToken`, `ExpiredTokenException`, `SignatureDoesNotMatch`, `UnrecognizedClientException`, `IncompleteSignature`: the service's own credentials are refused | `Unreachable`; the next call looks for new ones |
/// | both | `ThrottlingException`, `Throttling`, `LimitExceededException`, `KMSInternalException`, `DependencyTimeoutException`, `KeyUnavailableException` | `Unreachable` |
/// | both | a status of 500 or more, with any code; any other code; a status other than 200 without a code (a proxy, say) | `Unreachable` |
/// | both | status 200 with an unexpected body: no document, another one, a plaintext that is not 32 bytes long | `Invalid` |
/// | both | an answer of more than 64 KiB | `Invalid` |
/// | no answer | no credentials of the service's own, no name resolved, no connection, no trusted certificate, no answer in time | `Unreachable` |
///
/// A code is accepted only where the service puts it (`__type` in JSON, `ErrorResponse/Error/Code`
/// in XML). The backend retries failed connections and transient failures, up to three attempts in
/// total, within the call's time limit.
///
/// # Key material
///
/// The backend wipes the request and the answer. It cannot wipe the buffers of `ureq` and `rustls`
/// that held both. They are reused for the next request, and freed with the connection.
#[derive(Clone, Debug)]
pub struct AwsKms {
    region: String,
    kms: Uri,
    sts: Uri,
    external_id: Option<String>,
    http: Http,
    identity: Identity,
}

impl AwsKms {
    /// The KMS of the URL `aws-kms://REGION`. These parameters may follow, with percent-encoded
    /// values (`?endpoint=https://kms.internal&profile=logs`):
    ///
    /// | parameter | value |
    /// |---|---|
    /// | `endpoint` | the endpoint of KMS, in place of `https://kms.REGION.amazonaws.com`; required outside the partitions `aws`, `aws-us-gov`, `aws-cn` and `aws-eusc` |
    /// | `sts-endpoint` | the endpoint of STS; by default that of `endpoint` |
    /// | `profile` | the profile in `~/.aws` whose credentials are used, and no others |
    /// | `external-id` | the external id for assuming roles, which their trust policies may require |
    ///
    /// An endpoint without TLS (`http:`) is allowed only on this machine, for tests.
    ///
    /// # Errors
    /// [`KmsUrlError::Malformed`].
    pub fn from_url(url: &str) -> Result<Self, KmsUrlError> {
        Self::with_env(url, Arc::new(ProcessEnv))
    }

    fn with_env(url: &str, env: Arc<dyn Env>) -> Result<Self, KmsUrlError> {
        let malformed = |what: &str| KmsUrlError::Malformed(format!("aws-kms: {what}"));
        let rest = url
            .strip_prefix("aws-kms://")
            .ok_or_else(|| malformed("it is written aws-kms://REGION"))?;
        let (region, query) = rest.split_once('?').unwrap_or((rest, ""));
        let region = region.strip_suffix('/').unwrap_or(region);
        let is_region =
            |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if region.is_empty() || region.len() > 63 || !region.bytes().all(is_region) {
            return Err(malformed("it names no region"));
        }
        let (mut kms, mut sts, mut profile, mut external_id) = (None, None, None, None);
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let place = match &*name {
                "endpoint" => &mut kms,
                "sts-endpoint" => &mut sts,
                "profile" => &mut profile,
                "external-id" => &mut external_id,
                _ => {
                    return Err(malformed(
                        "the parameters are endpoint, sts-endpoint, profile and external-id",
                    ));
                }
            };
            if value.is_empty() || place.replace(value.into_owned()).is_some() {
                return Err(malformed("a parameter is empty or given twice"));
            }
        }
        let endpoint = |given: Option<&str>, service: &str| match (given, domain(region)) {
            (Some(given), _) => http::endpoint(given).map_err(&malformed),
            (None, Some(domain)) => {
                http::endpoint(&format!("https://{service}.{region}.{domain}")).map_err(&malformed)
            }
            (None, None) => Err(malformed("the endpoints of that region are not known; give them")),
        };
        let http = Http::new(Some(CA_BUNDLE));
        Ok(Self {
            region: region.to_owned(),
            kms: endpoint(kms.as_deref(), "kms")?,
            sts: endpoint(sts.as_deref().or(kms.as_deref()), "sts")?,
            external_id,
            identity: Identity::new(region, profile.as_deref(), env, http.clone()),
            http,
        })
    }

    /// Assumes the role of a master key.
    fn assume(&self, arn: &str, deadline: Deadline) -> Result<Session, KmsError> {
        let own = self.identity.credentials(deadline)?;
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.append_pair("Action", "AssumeRole")
            .append_pair("Version", "2011-06-15")
            .append_pair("RoleArn", arn)
            .append_pair("RoleSessionName", SESSION_NAME)
            .append_pair("DurationSeconds", SESSION_SECONDS)
            .append_pair("Policy", SESSION_POLICY);
        if let Some(external_id) = &self.external_id {
            form.append_pair("ExternalId", external_id);
        }
        let form = form.finish();
        let headers = [
            ("content-type", "application/x-www-form-urlencoded; charset=utf-8"),
            ("accept", "text/xml"),
        ];
        let to = Address { service: "sts", uri: &self.sts };
        let answer = self.ask(&to, &own, &headers, form.as_bytes(), Failure::of_sts, deadline)?;
        if answer.status == 200 {
            return Session::parse(&answer);
        }
        let failure = Failure::of_sts(&answer);
        let error = failure.sort_sts(&format!("AssumeRole of {arn} at {}", to.host()));
        if matches!(error, KmsError::Unreachable { .. }) && !failure.is_transient() {
            self.identity.forget();
        }
        Err(error)
    }

    /// Calls KMS in the role of the master key.
    fn call(&self, call: &KmsCall<'_>, operation: &str, body: &[u8]) -> Result<Answer, KmsError> {
        let deadline = Deadline::after(call.timeout);
        let Cmk { cmk_key_id, arn, .. } = call.cmk;
        let session = self.assume(arn, deadline)?;
        let target = format!("TrentService.{operation}");
        let headers = [("content-type", "application/x-amz-json-1.1"), ("x-amz-target", &target)];
        let to = Address { service: "kms", uri: &self.kms };
        let answer =
            self.ask(&to, session.credential(), &headers, body, Failure::of_kms, deadline)?;
        if answer.status == 200 {
            return Ok(answer);
        }
        Err(Failure::of_kms(&answer)
            .sort_kms(&format!("{operation} with {cmk_key_id} at {}", to.host())))
    }

    /// Sends a request, with retries where they may help, and returns the last answer.
    fn ask(
        &self,
        to: &Address<'_>,
        credential: &Credential,
        headers: &[(&'static str, &str)],
        body: &[u8],
        failure: fn(&Answer) -> Failure,
        deadline: Deadline,
    ) -> Result<Answer, KmsError> {
        let (mut pause, mut tries) = (FIRST_PAUSE, 0);
        loop {
            tries += 1;
            let last = tries == TRIES;
            let parts = sign(credential, (to.service, &self.region), to.uri, headers, body)?;
            let outcome = match self.http.send(Request::from_parts(parts, body), deadline) {
                Ok(answer) if answer.status != 200 && !last && failure(&answer).is_transient() => {
                    Ok(answer)
                }
                Ok(answer) => return Ok(answer),
                Err(why @ NoAnswer::TooLong(_)) => {
                    return Err(KmsError::Invalid { detail: why.to_string() });
                }
                Err(why @ NoAnswer::TimedOut(_)) => return Err(unreachable(why.to_string())),
                Err(why) => Err(unreachable(why.to_string())),
            };
            if last || !paused(pause, deadline) {
                return outcome;
            }
            pause *= 2;
        }
    }
}

/// A service and its endpoint.
struct Address<'a> {
    service: &'static str,
    uri: &'a Uri,
}

impl Address<'_> {
    fn host(&self) -> &str {
        authority(self.uri)
    }
}

/// The domain of the services of a region.
/// <https://docs.aws.amazon.com/general/latest/gr/rande.html>
fn domain(region: &str) -> Option<&'static str> {
    match region.split('-').next() {
        Some("cn") => Some("amazonaws.com.cn"),
        Some("eusc") => Some("amazonaws.eu"),
        Some("us") if region.starts_with("us-iso") => None,
        Some("eu") if region.starts_with("eu-iso") => None,
        _ => Some("amazonaws.com"),
    }
}

fn unreachable(detail: impl Into<String>) -> KmsError {
    KmsError::Unreachable { detail: detail.into() }
}

/// Sleeps, unless no time would be left afterwards. Returns whether it slept.
#[expect(
    clippy::disallowed_methods,
    reason = "a backend has no condition that a test could signal"
)]
fn paused(pause: Duration, deadline: Deadline) -> bool {
    let pauses = deadline.left().is_some_and(|left| left > pause);
    if pauses {
        thread::sleep(pause);
    }
    pauses
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Encrypt<'a> {
    key_id: &'a str,
    plaintext: &'a str,
    encryption_context: &'a EncryptionContext,
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Decrypt<'a> {
    key_id: &'a str,
    ciphertext_blob: &'a str,
    encryption_context: &'a EncryptionContext,
}

impl Kms for AwsKms {
    fn name(&self) -> &str {
        "aws-kms"
    }

    fn serves(&self, region_id: &str) -> bool {
        region_id == self.region
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        let body = http::json(&Encrypt {
            key_id: &call.cmk.cmk_key_id,
            plaintext: &base64_key::encode(key),
            encryption_context: call.context,
        })?;
        answers::ciphertext(&self.call(call, "Encrypt", &body)?)
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        if wrapped.is_empty() || wrapped.len() > CIPHERTEXT_BYTES_MAX {
            return Err(KmsError::Invalid {
                detail: "the wrapped key has an impossible length".to_owned(),
            });
        }
        let ciphertext_blob = &BASE64_STANDARD.encode(wrapped);
        let body = http::json(&Decrypt {
            key_id: &call.cmk.cmk_key_id,
            ciphertext_blob,
            encryption_context: call.context,
        })?;
        answers::plaintext(&self.call(call, "Decrypt", &body)?)
    }
}
