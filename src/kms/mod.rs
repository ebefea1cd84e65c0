//! The customer's key management service, as the engine uses it.
//!
//! With customer-managed keys, the data key of a Logstore is stored only wrapped under a customer
//! master key ([`Cmk`]) that never leaves the customer's KMS. The engine asks the KMS to wrap a
//! data key once, and to unwrap it many times. Every success renews the lease under which the
//! engine may hold the key in memory. Every refusal ends the lease. All of this goes through the
//! trait [`Kms`]. A *backend* implements it for one kind of service.
//!
//! # The four answers
//!
//! The most important duty of a backend is to sort each outcome into the right one of four answers.
//! The engine acts on nothing else.
//!
//! | answer | when | the engine's action |
//! |---|---|---|
//! | `Ok` | the KMS has done it, now | renews the lease, counted from when the call was *sent* |
//! | [`KmsError::Revoked`] | a reachable KMS says no: the CMK is disabled, pending deletion or deleted, or the role may not be assumed or may not use the CMK | rejects all reads and writes at once, wipes the data key and all keys derived from it |
//! | [`KmsError::Unreachable`] | the KMS has not refused: timeout, connection refused, name not resolved, throttled, a 5xx answer, or the *service's own* credentials are missing, expired or refused | rides the lease to its end, then rejects until the KMS answers |
//! | [`KmsError::Invalid`] | an answer that cannot be right: not parseable, a key of another length, a wrapped key that the KMS calls malformed or made under another CMK or context | never renews, rides the lease, then rejects with an error that says so |
//!
//! Three mistakes are costly:
//!
//! - *An outage reported as `Revoked`* stops every Logstore under that CMK at once, although the
//!   customer has not revoked it. Never guess: an unknown error code, an unexpected status or an
//!   empty body is `Unreachable` or `Invalid`, not `Revoked`.
//! - *A refusal reported as `Unreachable`* lets a revoked key live until the lease ends. A refusal
//!   that concerns the CMK or the customer's role must be `Revoked` (for instance `Disabled.Key`,
//!   `KeyState.PendingDeletion`, `NotFound`, `Forbidden`, or that the role does not exist or may
//!   not be assumed). A refusal that concerns the identity under which the service itself logs in
//!   must not be.
//! - *A stale success* is the worst mistake: see the first rule below.
//!
//! # Rules for a backend
//!
//! - **Never cache an answer.** Each call asks the KMS. The engine renews one lease per CMK and
//!   role and shares it among all Logstores, so calls are few. A cached key or a remembered success
//!   would break the promise that a revoked key stops working within the bound that the operator
//!   has set. The same holds for refusals: recovery must show at the next call.
//! - **Assume the role again at each call.** [`Cmk::arn`] names the role that uses the CMK. If the
//!   backend kept temporary credentials of that role from an earlier call, they would outlive the
//!   customer's withdrawal of the role. It may keep connections and the service's own credentials.
//! - **Honour the timeout.** [`KmsCall::timeout`] bounds the whole call: name resolution,
//!   connecting, assuming the role, and any retry. A call that is not done by then is
//!   [`KmsError::Unreachable`]. The engine gives up a call that takes longer, so the bound on
//!   revocation does not depend on the backend. But the thread of that call is occupied until the
//!   backend returns.
//! - **Bind the context.** [`KmsCall::context`] goes to the KMS as its encryption context
//!   (additional authenticated data), unchanged and complete. It holds the immutable identifiers of
//!   the key's purpose (store, Logstore, key version, suite), so a wrapped key that was copied
//!   elsewhere does not open there. A KMS without such a feature is no basis for a backend, unless
//!   the backend authenticates the context itself. A context that does not match is
//!   [`KmsError::Invalid`].
//! - **Never let key material out.** Keep it out of log lines, out of `Debug`, and out of the
//!   details of [`KmsError`], which the engine shows to users and writes to its logs. Do not quote
//!   request or response bodies. Wipe buffers that held a key (`zeroize`), and hand keys on only as
//!   [`SecretKey`].
//! - **Be callable from many threads at once.** The engine makes one call at a time for each CMK
//!   and role. But CMKs are independent: a slow one must not delay the others.
//! - **Do not panic**, for any bytes from the network. Limit how much is read.
//!
//! The suite `testing::conformance` (feature `kms-conformance`) checks a backend against these rules.

#[cfg(feature = "kms-aliyun")]
mod aliyun;
#[cfg(feature = "kms-aws")]
mod aws;
#[cfg(any(feature = "kms-aliyun", feature = "kms-aws", feature = "kms-vault"))]
mod base64_key;
mod bounded;
mod calls;
mod context;
#[cfg(any(
    feature = "kms-aliyun",
    feature = "kms-aws",
    feature = "kms-pkcs11",
    feature = "kms-vault"
))]
mod deadline;
#[cfg(any(feature = "kms-aliyun", feature = "kms-aws", feature = "kms-vault"))]
mod http;
#[cfg(any(feature = "kms-aliyun", feature = "kms-aws"))]
mod kept;
#[cfg(feature = "kms-local")]
mod local;
pub(crate) mod meter;
#[cfg(feature = "kms-pkcs11")]
pub mod pkcs11;
mod router;
mod url;
#[cfg(feature = "kms-vault")]
mod vault;

use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

#[cfg(feature = "kms-aliyun")]
pub use aliyun::AliyunKms;
#[cfg(feature = "kms-aws")]
pub use aws::AwsKms;
pub(crate) use bounded::{BoundedKms, Call, CallReport, LOOK_EVERY};
#[cfg(test)]
pub(crate) use bounded::{DeferredCalls, Watch};
pub(crate) use calls::Busy;
pub use context::EncryptionContext;
#[cfg(feature = "kms-local")]
pub use local::{DELETION_DAYS, LocalKeyInfo, LocalKeyState, LocalKms, LocalKmsError};
pub(crate) use meter::KmsMeter;
pub(crate) use router::{KmsRouter, NoKms};
pub use url::{KmsUrlError, from_url};
#[cfg(feature = "kms-vault")]
pub use vault::VaultKms;

use crate::crypto::SecretKey;

/// A customer master key: its identifier, the role that uses it, and the region of its KMS.
///
/// This is the `user_cmk_info` of a Logstore's encryption settings. As JSON it has exactly these
/// three fields, all required.
///
/// None of the fields is secret. The engine stores all three in the clear in the store, shows them
/// in the status of a Logstore and in error messages, writes them to its log lines, and keeps them
/// in the audit log of the keys. So they must not hold a password, a token or a PIN. A backend gets
/// such credentials from its own settings.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cmk {
    /// The identifier of the key in its KMS.
    pub cmk_key_id: String,
    /// The role that the service assumes to use the key, such as `acs:ram::13234:role/logsource`.
    /// Opaque to the engine. Stored and shown in the clear, as the other fields are.
    pub arn: String,
    /// The region of the KMS, such as `cn-hangzhou`.
    pub region_id: String,
}

/// The common arguments of [`Kms::wrap`] and [`Kms::unwrap`].
#[derive(Clone, Copy, Debug)]
pub struct KmsCall<'a> {
    /// The master key, and the role that uses it.
    pub cmk: &'a Cmk,
    /// The immutable identifiers to which the wrapped key is bound. Unwrapping must fail under any
    /// other context.
    pub context: &'a EncryptionContext,
    /// How long the whole call may take, retries included. After that the answer is
    /// [`KmsError::Unreachable`].
    pub timeout: Duration,
}

/// A key management service. The [module documentation](self) states the rules for a backend.
///
/// # A complete backend
///
/// This one keeps master keys in files, as a machine that mounts them from a secret manager has them:
/// `DIR/REGION/ROLE/KEY`, 32 bytes each. It has no network, so no call takes long, and the timeout
/// needs no care.
///
/// ```
/// use std::{fs, io::{ErrorKind, Read}, path::PathBuf, sync::Arc};
///
/// use envelog::{
///     crypto::{AeadKey, Cipher, CryptoProvider, RustCrypto, SecretKey},
///     io::{OsRandom, Random},
///     kms::{Cmk, Kms, KmsCall, KmsError, RevokedReason},
/// };
///
/// #[derive(Debug)]
/// struct MountedKeys {
///     dir: PathBuf,
/// }
///
/// impl MountedKeys {
///     /// The master key, if the role may use it now. Reads the file at each call.
///     fn master_key(&self, cmk: &Cmk) -> Result<Box<dyn AeadKey>, KmsError> {
///         let Cmk { cmk_key_id, arn, region_id } = cmk;
///         // The customer chooses these names. They must not lead out of the directory.
///         let is_plain = |name: &&String| {
///             !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
///         };
///         if ![cmk_key_id, arn, region_id].iter().all(is_plain) {
///             return Err(KmsError::revoked(RevokedReason::Deleted, "no key has such a name"));
///         }
///         let unreachable = |error: std::io::Error| KmsError::unreachable(error.to_string());
///         // Without this a volume that is not mounted would make all keys look deleted.
///         let region = self.dir.join(region_id);
///         fs::metadata(&region).map_err(unreachable)?;
///         let role = region.join(arn);
///         if !role.try_exists().map_err(unreachable)? {
///             return Err(KmsError::revoked(RevokedReason::NotPermitted, format!("there is no role {arn}")));
///         }
///         let mut file = fs::File::open(role.join(cmk_key_id)).map_err(|error| match error.kind() {
///             ErrorKind::NotFound => KmsError::revoked(RevokedReason::Deleted, "there is no such file"),
///             _ => unreachable(error),
///         })?;
///         let mut bytes = [0; 32];
///         file.read_exact(&mut bytes).map_err(|error| match error.kind() {
///             ErrorKind::UnexpectedEof => KmsError::invalid("the file of the key is too short"),
///             _ => unreachable(error),
///         })?;
///         // Moves the key to locked memory, and wipes `bytes`.
///         let key = SecretKey::from_bytes(&mut bytes);
///         let invalid = |error| KmsError::invalid(format!("{error}"));
///         RustCrypto::new().aead(Cipher::Aes256Gcm, key.expose()).map_err(invalid)
///     }
/// }
///
/// impl Kms for MountedKeys {
///     fn name(&self) -> &str {
///         "mounted"
///     }
///
///     fn serves(&self, region_id: &str) -> bool {
///         region_id.starts_with("mounted-")
///     }
///
///     /// A nonce of 12 bytes, the encrypted key, and a tag of 16 bytes.
///     fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
///         let master = self.master_key(call.cmk)?;
///         let mut nonce = [0; 12];
///         OsRandom.fill(&mut nonce).map_err(|error| KmsError::unreachable(error.to_string()))?;
///         let mut sealed = *key.expose();
///         // The context is bound: the wrapped key opens nowhere else.
///         let tag = master
///             .seal(&nonce, &call.context.to_bytes(), &mut sealed)
///             .map_err(|error| KmsError::invalid(error.to_string()))?;
///         Ok([&nonce[..], &sealed, &tag].concat())
///     }
///
///     fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
///         let master = self.master_key(call.cmk)?;
///         let (nonce, rest) = wrapped.split_first_chunk().ok_or_else(|| KmsError::invalid("cut short"))?;
///         let (sealed, tag) = rest.split_last_chunk().ok_or_else(|| KmsError::invalid("cut short"))?;
///         let mut key = [0; 32];
///         master
///             .open(nonce, &call.context.to_bytes(), sealed, tag, &mut key)
///             .map_err(|error| KmsError::invalid(error.to_string()))?;
///         Ok(SecretKey::from_bytes(&mut key))
///     }
/// }
///
/// # use envelog::{AppendOptions, EncryptConf, EncryptType, ErrorKind as Kind, LogstoreSpec, Payload, Store};
/// # let dir = tempfile::tempdir().unwrap();
/// # let keys = dir.path().join("keys");
/// # let role = keys.join("mounted-1/logs");
/// # fs::create_dir_all(&role).unwrap();
/// # fs::write(role.join("key-1"), [7; 32]).unwrap();
/// let store = Store::builder(dir.path().join("data"), dir.path().join("keyring"), RustCrypto::new())
///     .kms(Arc::new(MountedKeys { dir: keys }))
///     .create()?;
/// let cmk = Cmk { cmk_key_id: "key-1".into(), arn: "logs".into(), region_id: "mounted-1".into() };
/// let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::byok(EncryptType::Aes, cmk));
/// let logstore = store.create_logstore(&"shop/orders".parse()?, spec)?;
/// logstore.append(Payload::opaque("paid")?, &AppendOptions::default())?;
///
/// // The customer removes the key. The engine asks every 30 s; this asks now.
/// fs::remove_file(role.join("key-1")).unwrap();
/// assert_eq!(logstore.revalidate_now().unwrap_err().kind(), Kind::Revoked);
/// # Ok::<(), envelog::Error>(())
/// ```
///
/// Have the conformance suite test a backend of your own: `testing::conformance` (feature
/// `kms-conformance`).
pub trait Kms: Send + Sync + fmt::Debug {
    /// A short name of the backend for error messages and status, such as `local`. The engine
    /// stores it with the probe that renews a lease, and asks only a backend of that name to unwrap
    /// the probe.
    fn name(&self) -> &str;

    /// Whether this KMS serves the CMKs of a region. The engine asks the first KMS that returns
    /// `true`.
    ///
    /// This is about routing, not about permission or health: a KMS that is down still serves its
    /// regions. A backend answers from its settings where it can, and quickly.
    fn serves(&self, region_id: &str) -> bool;

    /// The answer of [`Kms::serves`], or the reason why a backend that has to look cannot tell. By
    /// default the answer of `serves`, which never fails.
    ///
    /// A KMS that cannot tell takes no region from another one: the engine asks the KMSs behind it.
    /// If none of them serves the region, the call fails with this reason, and the next call asks
    /// again.
    ///
    /// # Errors
    /// [`KmsError::Unreachable`] or [`KmsError::Invalid`].
    fn try_serves(&self, region_id: &str) -> Result<bool, KmsError> {
        Ok(self.serves(region_id))
    }

    /// Encrypts `key` under the CMK, bound to the context. The result is opaque to the engine,
    /// which stores it.
    ///
    /// # Errors
    /// [`KmsError`], sorted as the [module documentation](self) says.
    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError>;

    /// Decrypts the output of [`Kms::wrap`], including output under an older version of a CMK that
    /// has been rotated since.
    ///
    /// `wrapped` comes from a disk and may be any bytes.
    ///
    /// # Errors
    /// [`KmsError`], sorted as the [module documentation](self) says.
    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError>;

    /// The version of the CMK that wrapped `wrapped`, as the KMS names it. `None` if the wrapped
    /// key does not contain it. This method calls no KMS. It looks at the bytes alone, which come
    /// from a disk and may be anything.
    fn cmk_version(&self, _wrapped: &[u8]) -> Option<String> {
        None
    }
}

/// The reason why a KMS call failed. The [module documentation](self) defines the variants.
///
/// A detail is one clause for people, without key material. The engine shows it to users and logs
/// it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KmsError {
    /// A reachable KMS refuses the use of the CMK. The engine stops using the key at once.
    #[error("the customer master key is {reason}: {detail}")]
    Revoked {
        /// The kind of refusal.
        reason: RevokedReason,
        /// The KMS's explanation.
        detail: String,
    },
    /// The KMS has not answered, or cannot be asked. The engine continues until the lease ends.
    #[error("the KMS cannot be reached: {detail}")]
    Unreachable {
        /// The cause.
        detail: String,
    },
    /// The answer of the KMS is impossible, or the wrapped key is. The engine does not renew the
    /// lease.
    #[error("the KMS gave no valid answer: {detail}")]
    Invalid {
        /// The fault.
        detail: String,
    },
}

impl KmsError {
    /// [`KmsError::Revoked`], with the KMS's explanation.
    pub fn revoked(reason: RevokedReason, detail: impl Into<String>) -> Self {
        Self::Revoked { reason, detail: detail.into() }
    }

    /// [`KmsError::Unreachable`], with the cause.
    pub fn unreachable(detail: impl Into<String>) -> Self {
        Self::Unreachable { detail: detail.into() }
    }

    /// [`KmsError::Invalid`], with the fault.
    pub fn invalid(detail: impl Into<String>) -> Self {
        Self::Invalid { detail: detail.into() }
    }
}

/// The reason why a CMK may not be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RevokedReason {
    /// The customer has disabled it and may enable it again.
    Disabled,
    /// The customer has scheduled its deletion and may cancel that.
    PendingDeletion,
    /// It has been deleted, or the KMS knows no such key.
    Deleted,
    /// The role may not be assumed, or may not use the key.
    NotPermitted,
}

impl RevokedReason {
    /// What the owner of the key can do, as a clause.
    pub(crate) fn remedy(self) -> &'static str {
        match self {
            Self::Disabled => "enable the key again in the KMS",
            Self::PendingDeletion => "cancel the deletion of the key in the KMS",
            Self::Deleted => "restore the key, if its KMS still can",
            Self::NotPermitted => "grant the role the use of the key in the KMS",
        }
    }
}

impl fmt::Display for RevokedReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Disabled => "disabled",
            Self::PendingDeletion => "pending deletion",
            Self::Deleted => "deleted",
            Self::NotPermitted => "not permitted for the role",
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn cmk_json_has_exactly_three_fields() {
        let text = r#"{"cmk_key_id":"key-1","arn":"acs:ram::13234:role/logsource","region_id":"cn-hangzhou"}"#;
        let cmk: Cmk = serde_json::from_str(text).unwrap();
        assert_eq!(cmk.cmk_key_id, "key-1");
        assert_eq!(serde_json::to_string(&cmk).unwrap(), text);
        let missing =
            serde_json::from_str::<Cmk>(r#"{"cmk_key_id":"key-1","arn":"a"}"#).unwrap_err();
        assert!(missing.to_string().contains("region_id"), "{missing}");
        let unknown = serde_json::from_str::<Cmk>(&text.replace("arn", "role")).unwrap_err();
        assert!(unknown.to_string().contains("role"), "{unknown}");
    }

    #[test]
    fn reasons_have_words_and_names() {
        for (reason, words, name) in [
            (RevokedReason::Disabled, "disabled", "disabled"),
            (RevokedReason::PendingDeletion, "pending deletion", "pending_deletion"),
            (RevokedReason::Deleted, "deleted", "deleted"),
            (RevokedReason::NotPermitted, "not permitted for the role", "not_permitted"),
        ] {
            assert_eq!(reason.to_string(), words);
            assert_eq!(serde_json::to_value(reason).unwrap(), name);
            assert_eq!(serde_json::from_value::<RevokedReason>(name.into()).unwrap(), reason);
        }
        let error = KmsError::Revoked {
            reason: RevokedReason::Disabled,
            detail: "key-1 of cn-hangzhou".into(),
        };
        assert_eq!(error.to_string(), "the customer master key is disabled: key-1 of cn-hangzhou");
    }
}
