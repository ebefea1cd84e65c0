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
use reqsign_core::Env;
use serde::Serialize;
use ureq::http::{Request, Uri};

use self::{
    answers::{CIPHERTEXT_BYTES_MAX, Failure},
    identity::{AccessKey, Identity, ProcessEnv, sign},
};
use super::{
    Cmk, EncryptionContext, Kms, KmsCall, KmsError, KmsUrlError, base64_key,
    deadline::Deadline,
    http::{self, Answer, Http, NoAnswer, authority},
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
/// Credentials that expire are kept, and newer ones are looked for two minutes before their end.
/// The local clock may be wrong, so it refuses none: without newer ones the backend tries the kept
/// ones, and STS decides. If STS refuses kept credentials, for any reason (they have expired, or
/// the machine's role was replaced), the same call fetches them again once, and assumes the role
/// with the new ones; their answer is the answer of the call. The refusal of the kept ones stays
/// the answer if no others can be had within half of the time that is left.
///
/// # How answers are sorted
///
/// From KMS, where the backend is logged in with the customer's role:
///
/// | answer | result | source |
/// |---|---|---|
/// | `DisabledException` | `Revoked`: disabled | 1 |
/// | `KMSInvalidStateException`, "… is pending deletion", "… is pending replica deletion" | `Revoked`: pending deletion | 1, 2 |
/// | `KMSInvalidStateException`, "… is pending import": its imported material was deleted or has expired | `Revoked`: deleted | 1, 2 |
/// | `KMSInvalidStateException` of an external key store, "The external key store proxy rejected the request because the external key is not enabled in the external key manager" or "… because the external key does not support the requested operation" | `Revoked`: disabled | 3 |
/// | the same, "… because it could not find the external key" | `Revoked`: deleted | 3 |
/// | the same, "The external key store proxy denied access to the operation" | `Revoked`: not permitted | 3 |
/// | the same, "… because the specified ciphertext or additional authenticated data is corrupted …" or "The ciphertext that the external key store proxy submitted for decryption … is corrupted …" | `Invalid` | 3 |
/// | any other `KMSInvalidStateException`: the proxy of an external key store does not answer, answers nonsense or cannot log AWS in, or the key store is disconnected | `Unreachable` | 3 |
/// | `NotFoundException` | `Revoked`: deleted | 1 |
/// | `AccessDeniedException`, "… because no VPC endpoint policy allows …" or "… with an explicit deny in a VPC endpoint policy": the endpoint is the service's own | `Unreachable` | 4 |
/// | any other `AccessDeniedException`: by the key policy, a grant, or a policy of the role or of its organization | `Revoked`: not permitted | 1, 4 |
/// | `InvalidCiphertextException` (damaged, or another context), `IncorrectKeyException`, `InvalidKeyUsageException`, `InvalidGrantTokenException`, `InvalidArnException`, `UnsupportedOperationException`, `ValidationException`, `SerializationException` | `Invalid` | 1, 5 |
///
/// `CustomKeyStoreInvalidStateException` and the codes that begin with `Xks` are answers to the
/// management of key stores and keys. To Encrypt and Decrypt, KMS answers
/// `KMSInvalidStateException` in their place (source 3).
///
/// From STS, where the service itself is logged in:
///
/// | answer | result | source |
/// |---|---|---|
/// | `AccessDenied`, "… because no TYPE allows …" or "… with an explicit deny in a TYPE", where TYPE is `identity-based policy`, `permissions boundary`, `session policy`, `service control policy` or `VPC endpoint policy`: the caller's own policies | `Unreachable` | 4 |
/// | `AccessDenied`, "Roles may not be assumed by root accounts." | `Unreachable` | 6 |
/// | any other `AccessDenied`: by the role's trust policy (`role trust policy`, `resource-based policy`) or the `resource control policy` of its organization, without a reason, or for a role that does not exist | `Revoked`: not permitted | 4 |
/// | `ValidationError` (no ARN of a role), `MalformedPolicyDocument`, `PackedPolicyTooLarge` | `Invalid` | 6 |
/// | `InvalidClientTokenId`, `ExpiredToken`, `ExpiredTokenException`, `SignatureDoesNotMatch`, `UnrecognizedClientException`, `IncompleteSignature`: the service's own credentials are refused | `Unreachable` | 5 |
///
/// From both:
///
/// | answer | result |
/// |---|---|
/// | `ThrottlingException`, `Throttling`, `LimitExceededException`, `KMSInternalException`, `DependencyTimeoutException`, `KeyUnavailableException` | `Unreachable` |
/// | a status of 500 or more, with any code; any other code; a status other than 200 without a code (a proxy, say) | `Unreachable` |
/// | status 200 with an unexpected body: no document, another one, a plaintext that is not 32 bytes long | `Invalid` |
/// | an answer of more than 64 KiB | `Invalid` |
/// | none: no credentials of the service's own, no name resolved, no connection, no trusted certificate, no answer in time | `Unreachable` |
///
/// A code is accepted only where the service puts it (`__type` in JSON, `ErrorResponse/Error/Code`
/// in XML). A reason for denied access is accepted only in the form that source 4 states, where the
/// reason follows "User: … is not authorized to perform: …", and "on resource: …" if that is there.
/// The names in these parts must be single words, so no name of a role or key passes for a reason.
/// A message of an external key store is accepted only from its beginning. The backend retries
/// failed connections and transient failures, up to three attempts in total, within the call's time
/// limit.
///
/// If policies of several types refuse, AWS names one of them (source 4). So a customer's refusal
/// can be an outage here as long as the service's own policy refuses too, and then takes effect at
/// the end of the lease. Within one account, a trust policy that names the service's identity lets
/// it assume the role without a policy of its own. Give the identity that policy all the same:
/// otherwise AWS may name the identity-based policy when the trust policy no longer names the
/// identity.
///
/// Sources, in the documentation of AWS: 1 `Decrypt` and `Encrypt` of the KMS API reference; 2 "Key
/// states of AWS KMS keys"; 3 "Troubleshooting external key stores"; 4 "Troubleshoot access denied
/// error messages" of the IAM user guide; 5 the common errors of the KMS and the STS API reference;
/// 6 `AssumeRole` of the STS API reference.
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

    /// Assumes the role of a master key. If STS refuses kept credentials of the service, newer ones
    /// are tried.
    fn assume(&self, arn: &str, deadline: Deadline) -> Result<AccessKey, KmsError> {
        let own = self.identity.own(deadline)?;
        let mut answer = self.ask_for_role(arn, &own.login, deadline)?;
        if Failure::of_sts(&answer).is_refusal_by_sts()
            && let Some(newer) = self.identity.instead_of(&own, deadline)
        {
            answer = self.ask_for_role(arn, &newer, deadline)?;
        }
        if answer.status == 200 {
            return answers::session(&answer);
        }
        let what = format!("AssumeRole of {arn} at {}", authority(&self.sts));
        Err(Failure::of_sts(&answer).sort_sts(&what))
    }

    /// Asks STS for a session of the role.
    fn ask_for_role(
        &self,
        arn: &str,
        own: &AccessKey,
        deadline: Deadline,
    ) -> Result<Answer, KmsError> {
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
        self.ask(&to, own, &headers, form.as_bytes(), Failure::of_sts, deadline)
    }

    /// Calls KMS in the role of the master key.
    fn call(&self, call: &KmsCall<'_>, operation: &str, body: &[u8]) -> Result<Answer, KmsError> {
        let deadline = Deadline::after(call.timeout);
        let Cmk { cmk_key_id, arn, .. } = call.cmk;
        let session = self.assume(arn, deadline)?;
        let target = format!("TrentService.{operation}");
        let headers = [("content-type", "application/x-amz-json-1.1"), ("x-amz-target", &target)];
        let to = Address { service: "kms", uri: &self.kms };
        let answer = self.ask(&to, &session, &headers, body, Failure::of_kms, deadline)?;
        if answer.status == 200 {
            return Ok(answer);
        }
        Err(Failure::of_kms(&answer)
            .sort_kms(&format!("{operation} with {cmk_key_id} at {}", authority(&self.kms))))
    }

    /// Sends a request, with retries where they may help, and returns the last answer.
    fn ask(
        &self,
        to: &Address<'_>,
        login: &AccessKey,
        headers: &[(&'static str, &str)],
        body: &[u8],
        failure: fn(&Answer) -> Failure,
        deadline: Deadline,
    ) -> Result<Answer, KmsError> {
        let (mut pause, mut tries) = (FIRST_PAUSE, 0);
        loop {
            tries += 1;
            let last = tries == TRIES;
            let parts = sign(login, (to.service, &self.region), to.uri, headers, body)?;
            let outcome = match self.http.send(Request::from_parts(parts, body), deadline) {
                Ok(answer) if answer.status != 200 && !last && failure(&answer).is_transient() => {
                    Ok(answer)
                }
                Ok(answer) => return Ok(answer),
                Err(why @ NoAnswer::TooLong(_)) => {
                    return Err(KmsError::invalid(why.to_string()));
                }
                Err(why @ NoAnswer::TimedOut(_)) => {
                    return Err(KmsError::unreachable(why.to_string()));
                }
                Err(why) => Err(KmsError::unreachable(why.to_string())),
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
            return Err(KmsError::invalid("the wrapped key has an impossible length"));
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
