//! Alibaba Cloud KMS, over HTTPS.

mod credentials;
mod outcome;
mod sign;
#[cfg(test)]
mod tests;
mod wrapped;

use std::{sync::Arc, time::Duration};

use serde::Deserialize;
use serde_json::Value;
use ureq::http::{Request, Uri};
use zeroize::Zeroizing;

use super::{
    Cmk, Kms, KmsCall, KmsError, KmsUrlError, RevokedReason, base64_key,
    deadline::Deadline,
    http::{self, Answer, Http, NoAnswer, authority},
};
use crate::{
    crypto::SecretKey,
    ids::hex_encode,
    io::{Clock, OsRandom, Random, SystemClock},
};
use credentials::{Assumed, Source};
use outcome::{Meaning, State};
use sign::Credentials;

const KMS_VERSION: &str = "2016-01-20";
const STS_VERSION: &str = "2015-04-01";
/// The session name of assumed roles, which the customer's ActionTrail shows.
const SESSION: &str = "envelog";
/// How long the credentials of an assumed role are valid, in seconds: the shortest duration that
/// STS allows. They are used for one call.
const SESSION_SECONDS: &str = "900";

/// Alibaba Cloud KMS in one region, through the API of 2016-01-20.
///
/// Each call first assumes the customer's role in [`Cmk::arn`] (STS `AssumeRole`, API of
/// 2015-04-01), and then asks KMS in that role. Between calls the backend keeps only connections
/// and the service's *own* credentials if it had to fetch them. All of a call happens within
/// [`KmsCall::timeout`].
///
/// # How a key is wrapped
///
/// The data key never goes to KMS. With `GenerateDataKey`, KMS creates a key of 256 bits that is
/// bound to the encryption context. That key seals the data key here (AES-256-GCM) and is then
/// wiped. The wrapped key stores KMS's ciphertext of it beside the sealed data key. To unwrap,
/// `Decrypt` returns the key. `Encrypt` would need one step less, but it takes its plaintext in the
/// URL, where proxies and logs would see data keys.
///
/// | bytes | content |
/// |---|---|
/// | 0–3 | magic `EAKW` |
/// | 4 | version = 1 |
/// | 5–36 | the data key, sealed under the key from KMS. That key is used once, so the nonce is zeros. Associated data: bytes 0–4, then the context as the JSON that KMS gets |
/// | 37–52 | tag |
/// | 53– | KMS's `CiphertextBlob`, in base64 as received, at most 4,096 bytes |
///
/// The key from KMS is wiped here after use. The buffers of the HTTP and TLS libraries, through
/// which it came, are not.
///
/// `Decrypt` takes no CMK. Its answer names the CMK that it used, and an answer with another CMK
/// than the requested one is [`KmsError::Invalid`]. `cmk_key_id` must not be an alias: an alias may
/// point to another key later.
///
/// # The service's credentials
///
/// The backend looks for credentials where the official SDKs do, in the same order:
///
/// 1. `ALIBABA_CLOUD_ACCESS_KEY_ID`, `ALIBABA_CLOUD_ACCESS_KEY_SECRET`, and
///    `ALIBABA_CLOUD_SECURITY_TOKEN` for temporary ones.
/// 2. The token in the file `ALIBABA_CLOUD_OIDC_TOKEN_FILE`, with `ALIBABA_CLOUD_ROLE_ARN` and
///    `ALIBABA_CLOUD_OIDC_PROVIDER_ARN` (pods of ACK).
/// 3. `~/.aliyun/config.json`: the profile that `ALIBABA_CLOUD_PROFILE` names, or the current one,
///    of mode `AK`, `StsToken` or `EcsRamRole`. Not if `ALIBABA_CLOUD_CLI_PROFILE_DISABLED` is
///    `true`.
/// 4. The RAM role of the ECS instance, from the metadata service in hardened mode (with a token).
///    `ALIBABA_CLOUD_ECS_METADATA` names the role, or else the metadata service does. Not if
///    `ALIBABA_CLOUD_ECS_METADATA_DISABLED` is `true`.
///
/// The backend keeps the credentials of places 2 and 4 for 5 minutes, and then looks for newer
/// ones. Without newer ones it tries the kept ones, because STS decides whether they are still
/// valid. If STS refuses kept credentials, for any reason, the same call fetches them again once,
/// and assumes the role with the new ones; their answer is the answer of the call. The refusal of
/// the kept ones stays the answer if no others can be had within half of the time that is left.
///
/// The first source that is set up decides. If it fails, the call fails, and the backend tries no
/// other identity. Not supported: `~/.alibabacloud/credentials`, `ALIBABA_CLOUD_CREDENTIALS_URI`,
/// and profiles of other modes. [`AliyunKms::with_access_key`] replaces all of these sources.
///
/// # How errors are sorted
///
/// From KMS, where the backend is logged in with the customer's role:
///
/// | status | code | becomes | source |
/// |---|---|---|---|
/// | 404 | `Forbidden.KeyNotFound`, `Forbidden.AliasNotFound` | revoked: deleted; from `Decrypt` as the key's state says, invalid if the key can be used (the wrapped key names another one), else revoked: deleted | 1, 2 |
/// | 403 | `Forbidden.NoPermission` | revoked: not permitted | 1, 3 |
/// | 403 | `Forbidden.RAM`, `NoPermission`, `NotAuthorized` | revoked: not permitted | 4 |
/// | 409 | `Rejected.Disabled` | revoked: disabled | 1, 2 |
/// | 409 | `Rejected.PendingImport`: the customer has taken the key material away, and may import it again | revoked: disabled | 1, 3 |
/// | 409 | `Rejected.PendingDeletion` | revoked: pending deletion | 1, 2 |
/// | 409 | `Rejected.Unavailable`: the key, without a reason | as its state says, else unreachable | 2 |
/// | 400 | `InvalidParameter` (a damaged ciphertext or another context, too), `MissingParameter`, `ParseRequestParameterException`, `UnsupportedOperation` (a key of another kind) | invalid | 1, 2 |
/// | 400 | `Throttling`, `Throttling.*` | unreachable | 5 |
/// | 4xx | `InvalidAccessKeyId.*`, `InvalidSecurityToken.*`, `MissingSecurityToken`, `SignatureDoesNotMatch`, `IncompleteSignature`, `SignatureNonceUsed`, `IllegalTimestamp`, `InvalidTimeStamp.*`, `RequestTimeTooSkewed`, `Forbidden.AccessKey` | unreachable | 1, 3, 5 |
/// | 403 | `Forbidden.InDebt`, `Forbidden.InDebtOverdue`, `Forbidden.KmsServiceNotEnabled`, `Forbidden.ProhibitedByRiskControl`, `Forbidden.UbsmsInvalid*`: the account, not the key | unreachable | 1 |
/// | 4xx | any other code | as the key's state says, else unreachable | |
/// | 500, 503 | `InternalFailure`, `ServiceUnavailableTemporary`, `ServiceUnavailable`; any other status, or another code | unreachable | 1, 3 |
///
/// "As the key's state says": the backend also asks `DescribeKey`, which works in every state
/// (source 6). `Disabled` and `PendingImport` are revoked: disabled. `PendingDeletion` is revoked:
/// pending deletion. Its code `Forbidden.KeyNotFound` is revoked: deleted. With `Enabled` the key
/// can be used.
///
/// From STS, where the service itself is logged in:
///
/// | status | code | becomes | source |
/// |---|---|---|---|
/// | 404 | `EntityNotExist.Role` | revoked: not permitted | 7 |
/// | 403 | `NoPermission` | revoked: not permitted, except for the next row | 8 |
/// | 403 | `NoPermission` where `AccessDeniedDetail.PolicyType` names a policy of the caller (`AccountLevelIdentityBasedPolicy`, `ResourceGroupLevelIdentityBasedPolicy`, `SessionPolicy`), or because the caller is a root account | unreachable | 8, 9 |
/// | 400 | `InvalidParameter`, `InvalidParameter.*`: an invalid ARN | invalid | 8 |
/// | 4xx | any other code: `InvalidAccessKeyId.*`, `InvalidSecurityToken.*`, `SignatureDoesNotMatch`, `Throttling.*`, … | unreachable | 5, 8 |
/// | 5xx | `InternalError`; any other status | unreachable | 8 |
///
/// Also unreachable: the time limit has passed, no connection, no TLS, no credentials of the
/// service, an answer that is not HTTP or is longer than 64 KiB, an error without a code. Also
/// invalid: status 200 with an unexpected body.
///
/// Sources, in Alibaba Cloud's documentation: 1 "Sample responses, common error codes" of KMS
/// (doc-detail 69008); 2 `Decrypt` and `GenerateDataKey` of the KMS API reference; 3 "Common error
/// codes" of KMS; 4 "How do I troubleshoot an access denied error?" of RAM; 5 the common error
/// codes of OpenAPI; 6 "Impact of the CMK status on API calls" of KMS; 7 the answers of STS to the
/// tests of the official PHP SDK; 8 `AssumeRole` of the STS API reference, and doc-detail 42775; 9
/// `DecodeDiagnosticMessage` of the RAM API reference.
#[derive(Clone, Debug)]
pub struct AliyunKms {
    region_id: String,
    kms: Uri,
    sts: Uri,
    http: Http,
    source: Source,
}

impl AliyunKms {
    /// KMS in a region such as `cn-hangzhou`, at its public endpoints
    /// (`https://kms.REGION.aliyuncs.com` and `https://sts.REGION.aliyuncs.com`). Makes no network
    /// call.
    ///
    /// # Errors
    /// [`KmsUrlError::Malformed`] if `region_id` is not a region name: 1 to 63 lower-case letters,
    /// digits and hyphens.
    pub fn new(region_id: &str) -> Result<Self, KmsUrlError> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if !(1..=63).contains(&region_id.len()) || !region_id.bytes().all(plain) {
            return Err(KmsUrlError::Malformed(
                "aliyun-kms: names no region, such as cn-hangzhou".to_owned(),
            ));
        }
        let regional = |service| endpoint(&format!("https://{service}.{region_id}.aliyuncs.com"));
        Ok(Self {
            region_id: region_id.to_owned(),
            kms: regional("kms")?,
            sts: regional("sts")?,
            http: Http::new(None),
            source: Source::Default(Arc::default()),
        })
    }

    /// Creates the backend from the part of a URL behind `aliyun-kms:`.
    pub(super) fn from_url(rest: &str) -> Result<Self, KmsUrlError> {
        let malformed = |why: &str| KmsUrlError::Malformed(format!("aliyun-kms: {why}"));
        let rest =
            rest.strip_prefix("//").ok_or_else(|| malformed("is to be followed by //REGION"))?;
        let (region_id, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut kms = Self::new(region_id.trim_end_matches('/'))?;
        for parameter in query.split('&').filter(|it| !it.is_empty()) {
            let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
            let value = percent_encoding::percent_decode_str(value).decode_utf8_lossy();
            kms = match name {
                "endpoint" => kms.with_endpoint(&value)?,
                "sts-endpoint" => kms.with_sts_endpoint(&value)?,
                _ => {
                    return Err(malformed(
                        "has a parameter that is neither endpoint nor sts-endpoint",
                    ));
                }
            };
        }
        Ok(kms)
    }

    /// The same with KMS at another endpoint, such as one in a VPC
    /// (`https://kms-vpc.cn-hangzhou.aliyuncs.com`). Plain `http:` is allowed only for this machine
    /// (`http://127.0.0.1:PORT`).
    ///
    /// # Errors
    /// [`KmsUrlError::Malformed`].
    pub fn with_endpoint(mut self, url: &str) -> Result<Self, KmsUrlError> {
        self.kms = endpoint(url)?;
        Ok(self)
    }

    /// The same with STS at another endpoint.
    ///
    /// # Errors
    /// [`KmsUrlError::Malformed`].
    pub fn with_sts_endpoint(mut self, url: &str) -> Result<Self, KmsUrlError> {
        self.sts = endpoint(url)?;
        Ok(self)
    }

    /// The same with an access key of the service itself. It replaces all other sources of
    /// credentials.
    #[must_use]
    pub fn with_access_key(mut self, id: &str, secret: &str) -> Self {
        let secret = Zeroizing::new(secret.to_owned());
        self.source =
            Source::Fixed(Arc::new(Credentials { id: id.to_owned(), secret, token: None }.into()));
        self
    }

    /// Temporary credentials of the customer's role, for this call. If STS refuses kept credentials
    /// of the service, newer ones are tried.
    fn assume_role(&self, cmk: &Cmk, deadline: Deadline) -> Result<Credentials, KmsError> {
        let own =
            self.source.get(&self.http, &self.sts, deadline).map_err(KmsError::unreachable)?;
        let mut answer = self.ask_for_role(cmk, &own.login.credentials, deadline)?;
        let mut error = error_in(&answer);
        if outcome::is_refusal_by_sts(answer.status, &error)
            && let Some(newer) = self.source.instead_of(&own, &self.http, &self.sts, deadline)
        {
            answer = self.ask_for_role(cmk, &newer.credentials, deadline)?;
            error = error_in(&answer);
        }
        if answer.status == 200 {
            return Ok(parse::<Assumed>("AssumeRole", &answer)?.credentials.into());
        }
        let meaning = outcome::of_assume_role(answer.status, &error);
        Err(error_of(meaning, "AssumeRole", &error, answer.status))
    }

    /// Asks STS for credentials of the role.
    fn ask_for_role(
        &self,
        cmk: &Cmk,
        own: &Credentials,
        deadline: Deadline,
    ) -> Result<Answer, KmsError> {
        let parameters = sign::Pairs::from([
            ("DurationSeconds", SESSION_SECONDS),
            ("RoleArn", &cmk.arn),
            ("RoleSessionName", SESSION),
        ]);
        self.call(&self.sts, STS_VERSION, "AssumeRole", &parameters, own, deadline)
    }

    /// Asks KMS in the role, and parses the answer as `T`.
    fn ask<T: for<'a> Deserialize<'a>>(
        &self,
        cmk: &Cmk,
        action: &str,
        parameters: &sign::Pairs<'_>,
        deadline: Deadline,
    ) -> Result<T, KmsError> {
        if cmk.cmk_key_id.starts_with("alias/") || cmk.cmk_key_id.contains(":alias/") {
            return Err(KmsError::invalid(
                "cmk_key_id is an alias, which may point at another key tomorrow: give the key's own id",
            ));
        }
        let role = self.assume_role(cmk, deadline)?;
        let answer = self.call(&self.kms, KMS_VERSION, action, parameters, &role, deadline)?;
        if answer.status == 200 {
            return parse(action, &answer);
        }
        let error = error_in(&answer);
        let meaning = match outcome::of_kms(answer.status, &error) {
            Meaning::AskState => match self.state(cmk, &role, deadline) {
                State::Refused(reason) => Meaning::Revoked(reason),
                State::Usable | State::Unknown => Meaning::Unreachable,
            },
            // `Decrypt` takes no CMK. The missing key is the one that the wrapped key names.
            Meaning::Revoked(RevokedReason::Deleted) if action == "Decrypt" => {
                match self.state(cmk, &role, deadline) {
                    State::Usable => Meaning::Invalid,
                    State::Refused(reason) => Meaning::Revoked(reason),
                    State::Unknown => Meaning::Revoked(RevokedReason::Deleted),
                }
            }
            meaning => meaning,
        };
        Err(error_of(meaning, action, &error, answer.status))
    }

    /// Asks for the state of the key.
    fn state(&self, cmk: &Cmk, role: &Credentials, deadline: Deadline) -> State {
        let parameters = sign::Pairs::from([("KeyId", cmk.cmk_key_id.as_str())]);
        let answer = self.call(&self.kms, KMS_VERSION, "DescribeKey", &parameters, role, deadline);
        let Ok(answer) = answer else { return State::Unknown };
        let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        if answer.status == 200 {
            let state = body.pointer("/KeyMetadata/KeyState").and_then(Value::as_str);
            return state.map_or(State::Unknown, outcome::of_state);
        }
        match outcome::of_kms(answer.status, &body) {
            // If the role may not call `DescribeKey`, that says nothing about the failed call.
            Meaning::Revoked(reason) if reason != RevokedReason::NotPermitted => {
                State::Refused(reason)
            }
            _ => State::Unknown,
        }
    }

    /// Makes one signed call of the API. It tries twice if the connection breaks, because the
    /// server may have closed a kept connection.
    fn call(
        &self,
        endpoint: &Uri,
        version: &str,
        action: &str,
        parameters: &sign::Pairs<'_>,
        credentials: &Credentials,
        deadline: Deadline,
    ) -> Result<Answer, KmsError> {
        let query = sign::encode(parameters);
        let target = format!("/?{query}");
        let body_hash = sign::body_hash(&[]);
        let mut again = true;
        loop {
            let mut nonce = [0; 16];
            OsRandom
                .fill(&mut nonce)
                .map_err(|error| KmsError::unreachable(format!("no random nonce: {error}")))?;
            let (date, nonce) = (timestamp(), hex_encode(&nonce));
            let mut headers = sign::Pairs::from([
                ("host", authority(endpoint)),
                ("x-acs-action", action),
                ("x-acs-content-sha256", &body_hash),
                ("x-acs-date", &date),
                ("x-acs-signature-nonce", &nonce),
                ("x-acs-version", version),
            ]);
            if let Some(token) = &credentials.token {
                headers.insert("x-acs-security-token", token);
            }
            let authorization = sign::authorization(&query, &headers, &body_hash, credentials);
            headers.insert("authorization", &authorization);
            let headers: Vec<_> = headers.into_iter().collect();
            match exchange(&self.http, "POST", endpoint, &target, &headers, &[], deadline) {
                Err(NoAnswer::Broken(_)) if again => again = false,
                answer => {
                    return answer.map_err(|why| KmsError::unreachable(format!("{action}: {why}")));
                }
            }
        }
    }
}

impl Kms for AliyunKms {
    fn name(&self) -> &str {
        "aliyun"
    }

    fn serves(&self, region_id: &str) -> bool {
        region_id == self.region_id
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Generated {
            key_id: String,
            ciphertext_blob: String,
            plaintext: Zeroizing<String>,
        }
        let deadline = Deadline::after(call.timeout);
        let context = context_json(call)?;
        let parameters = sign::Pairs::from([
            ("EncryptionContext", context.as_str()),
            ("KeyId", &call.cmk.cmk_key_id),
            ("KeySpec", "AES_256"),
        ]);
        let generated: Generated = self.ask(call.cmk, "GenerateDataKey", &parameters, deadline)?;
        check_key(call.cmk, &generated.key_id)?;
        let wrapping = key_of(&generated.plaintext)?;
        wrapped::seal(&wrapping, &generated.ciphertext_blob, &context, key)
            .map_err(KmsError::invalid)
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "PascalCase")]
        struct Decrypted {
            key_id: String,
            plaintext: Zeroizing<String>,
        }
        let deadline = Deadline::after(call.timeout);
        let wrapped = wrapped::Wrapped::parse(wrapped).map_err(KmsError::invalid)?;
        let context = context_json(call)?;
        let parameters = sign::Pairs::from([
            ("CiphertextBlob", wrapped.ciphertext),
            ("EncryptionContext", context.as_str()),
        ]);
        let decrypted: Decrypted = self.ask(call.cmk, "Decrypt", &parameters, deadline)?;
        check_key(call.cmk, &decrypted.key_id)?;
        wrapped.open(&key_of(&decrypted.plaintext)?, &context).map_err(KmsError::invalid)
    }
}

fn endpoint(url: &str) -> Result<Uri, KmsUrlError> {
    http::endpoint(url).map_err(|why| KmsUrlError::Malformed(format!("aliyun-kms: {why}")))
}

/// One request and its answer. `target` begins with a slash.
fn exchange(
    http: &Http,
    method: &str,
    endpoint: &Uri,
    target: &str,
    headers: &[(&str, &str)],
    body: &[u8],
    deadline: Deadline,
) -> Result<Answer, NoAnswer> {
    let uri =
        format!("{}://{}{target}", endpoint.scheme_str().unwrap_or_default(), authority(endpoint));
    let mut request =
        Request::builder().method(method).uri(uri).header("accept", "application/json");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(body);
    let request = request
        .map_err(|_| NoAnswer::Failed("what is to be sent fits into no HTTP request".to_owned()))?;
    http.send(request, deadline)
}

/// The encryption context in the JSON form for KMS.
fn context_json(call: &KmsCall<'_>) -> Result<String, KmsError> {
    serde_json::to_string(call.context)
        .map_err(|_| KmsError::invalid("the encryption context is not JSON"))
}

/// Fails unless KMS has used the requested key.
fn check_key(cmk: &Cmk, used: &str) -> Result<(), KmsError> {
    let asked = cmk.cmk_key_id.as_str();
    // An ARN is `acs:kms:REGION:ACCOUNT:key/ID`.
    let asked = asked
        .strip_prefix("acs:kms:")
        .and_then(|arn| arn.split_once(":key/"))
        .map_or(asked, |(_, id)| id);
    if asked == used {
        Ok(())
    } else {
        Err(KmsError::invalid("KMS used another key than the one that was asked for"))
    }
}

/// The key in a base64 text.
fn key_of(text: &str) -> Result<SecretKey, KmsError> {
    base64_key::decode(text).ok_or_else(|| KmsError::invalid("KMS gave no key of 256 bits"))
}

fn parse<T: for<'a> Deserialize<'a>>(action: &str, answer: &Answer) -> Result<T, KmsError> {
    // The parser's error may quote a value.
    serde_json::from_slice(&answer.body)
        .map_err(|_| KmsError::invalid(format!("{action} answered something else")))
}

/// The error in an answer, or null.
fn error_in(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).unwrap_or(Value::Null)
}

fn error_of(meaning: Meaning, action: &str, error: &Value, status: u16) -> KmsError {
    let detail = format!("{action} answered {}", outcome::code_of(error, status));
    match meaning {
        Meaning::Revoked(reason) => KmsError::Revoked { reason, detail },
        Meaning::Invalid => KmsError::Invalid { detail },
        Meaning::Unreachable | Meaning::AskState => KmsError::Unreachable { detail },
    }
}

/// The current time in the form of the API, such as `2026-01-31T12:00:00Z`.
fn timestamp() -> String {
    let seconds = Duration::from_micros(SystemClock.wall_us()).as_secs();
    jiff::Timestamp::from_second(i64::try_from(seconds).unwrap_or(0))
        .unwrap_or_default()
        .to_string()
}
