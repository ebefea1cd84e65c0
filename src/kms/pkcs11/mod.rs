//! Keys in a hardware security module, or in any other token with PKCS#11.
//!
//! A customer master key is an AES-256 key object in a token. It is sensitive and not extractable,
//! and never leaves the token. The token encrypts and decrypts data keys *inside*, by
//! `CKM_AES_GCM`, with the encryption context as additional authenticated data. `CKM_AES_KEY_WRAP`
//! and similar mechanisms cannot bind a context, and are not used.
//!
//! # Choosing the token and the key
//!
//! A URI (RFC 7512) names the token and the way to log in: see [`Pkcs11Kms::from_uri`]. The fields
//! of a [`Cmk`] mean:
//!
//! - `cmk_key_id` names the key object: its `CKA_LABEL`, or its `CKA_ID` as `id:` and hexadecimal
//!   digits. Exactly one secret key of the token must match. Several matches are
//!   [`KmsError::Invalid`].
//! - `region_id` must be the `region` of the URI. A token has no regions, so the operator gives it
//!   a region name.
//! - `arn` is ignored: PKCS#11 has no roles. The PIN of a token decides who may use its keys. But a
//!   lease is shared per CMK and `arn`, so write the same `arn` for every Logstore under a key.
//!
//! # How return values are sorted
//!
//! | event | answer |
//! |---|---|
//! | the token is there, the user is logged in, and no key has the name | `Revoked`: `Deleted` |
//! | `CKA_ENCRYPT` (for wrap) or `CKA_DECRYPT` (to unwrap) is false; `CKR_KEY_FUNCTION_NOT_PERMITTED` | `Revoked`: `Disabled` |
//! | to wrap: the key is not AES-256, not sensitive, or extractable | `Revoked`: `NotPermitted` |
//! | no module, no slot, no token: it cannot be loaded, `CKR_TOKEN_NOT_PRESENT`, `CKR_TOKEN_NOT_RECOGNIZED`, `CKR_SLOT_ID_INVALID`, `CKR_CRYPTOKI_NOT_INITIALIZED`, `CKR_CANT_LOCK` | `Unreachable` |
//! | the device: `CKR_DEVICE_REMOVED`, `CKR_DEVICE_ERROR`, `CKR_DEVICE_MEMORY`, `CKR_HOST_MEMORY`, `CKR_GENERAL_ERROR`, `CKR_FUNCTION_FAILED`, `CKR_FUNCTION_CANCELED`, `CKR_FUNCTION_REJECTED` | `Unreachable` |
//! | the session: `CKR_SESSION_HANDLE_INVALID`, `CKR_SESSION_CLOSED`, `CKR_SESSION_COUNT`, `CKR_USER_NOT_LOGGED_IN`, `CKR_OPERATION_ACTIVE`, `CKR_OPERATION_NOT_INITIALIZED` | `Unreachable` |
//! | the service's own credentials: `CKR_PIN_INCORRECT`, `CKR_PIN_INVALID`, `CKR_PIN_LEN_RANGE`, `CKR_PIN_EXPIRED`, `CKR_PIN_LOCKED`, `CKR_USER_PIN_NOT_INITIALIZED`, `CKR_USER_ANOTHER_ALREADY_LOGGED_IN`, `CKR_USER_TOO_MANY_TYPES`; the PIN is missing or cannot be read | `Unreachable` |
//! | a handle that was just found: `CKR_KEY_HANDLE_INVALID`, `CKR_OBJECT_HANDLE_INVALID` | `Unreachable`; the next call looks for the key again |
//! | `CKR_ENCRYPTED_DATA_INVALID`, `CKR_ENCRYPTED_DATA_LEN_RANGE`, `CKR_AEAD_DECRYPT_FAILED`; `CKR_GENERAL_ERROR` or `CKR_FUNCTION_FAILED` of `C_Decrypt` from a token that is there | `Invalid`: damaged, or made under another key or context |
//! | `CKR_DATA_INVALID`, `CKR_DATA_LEN_RANGE`, `CKR_KEY_TYPE_INCONSISTENT`, `CKR_KEY_SIZE_RANGE`, `CKR_MECHANISM_INVALID`, `CKR_MECHANISM_PARAM_INVALID`, `CKR_FUNCTION_NOT_SUPPORTED`, `CKR_ARGUMENTS_BAD`, `CKR_BUFFER_TOO_SMALL`, `CKR_ATTRIBUTE_TYPE_INVALID`; several tokens or keys where one is meant; a decrypted key of another length | `Invalid` |
//! | any other return value, a vendor's own among them; the time limit has passed | `Unreachable` |
//!
//! A token that was removed, or has lost its login, can look like a token without keys. So "no key
//! has the name" is accepted only between two proofs that the token is present and the user is
//! logged in, in a session that was opened for this call. The backend ignores `CKA_START_DATE` and
//! `CKA_END_DATE`: the standard gives them no effect, and a wrong clock here must not revoke. To
//! end the use of a key, clear `CKA_DECRYPT` or destroy the key.
//!
//! # Sessions, logins, lost tokens
//!
//! Each call has a session of its own. The backend keeps up to 8 idle sessions, and with them the
//! login. It keeps nothing about a key. If a call fails in any way in a kept session, the backend
//! tries once more in a new session: it looks for the token in all slots and logs in again. If the
//! token is not present and no other call is in the module, the backend finalizes and initializes
//! the module (`C_Finalize`, `C_Initialize`), since some modules look for tokens only then. It does
//! not finalize a module that another part of the process has initialized. So a token that returns
//! is used again at the next call.
//!
//! The process **never tries a refused PIN again**, since a token locks after a few wrong PINs.
//! With `pin-source` it is enough to correct the file, which is read at each login.
//!
//! # Limits
//!
//! - **A call into a module cannot be interrupted.** The engine stops waiting after `kms_timeout`
//!   and treats the KMS as unreachable. The thread stays in the module until the call returns, and
//!   its answer is dropped. At most 32 calls are in a module at once. Further calls wait until
//!   their time limit and are then `Unreachable`. The backend checks the time between two calls
//!   into the module, so a slow token gets no further calls for a caller that has stopped waiting.
//! - **A key encrypts at most 2^32 data keys**: NIST SP 800-38D sets this limit for GCM with random
//!   96-bit nonces. Each data key and each probe uses one nonce. The nonce comes from the operating
//!   system, unless the token replaces it by its own, as some must.
//! - **`fork`**: a child process must initialize modules for itself, and does so at its first call.
//!   If a module refuses that, it is `Unreachable` in the child. The child does not use sessions
//!   that the parent has opened.
//! - **A key object has no versions.** To rotate, create another key with another name, and call
//!   `Keys::replace_cmk`.
//!
//! # The format of a wrapped key
//!
//! ```text
//! 0   4   magic "ELKP"
//! 4   2   version = 1, little-endian
//! 6   12  nonce
//! 18  48  sealed key and tag
//! ```
//!
//! Associated data: bytes 0 to 6, then the context
//! ([`EncryptionContext::to_bytes`](super::EncryptionContext::to_bytes)).

mod module;
mod outcome;
mod token;
mod uri;

use std::fmt;

use cryptoki::{
    mechanism::{Mechanism, aead::GcmParams},
    object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle},
};
use zeroize::Zeroizing;

use self::{
    module::{Entered, Module, in_time},
    outcome::{may_be_a_wrong_tag, outcome},
    token::{Kept, Open},
    uri::Uri,
};
use super::{Cmk, Kms, KmsCall, KmsError, KmsUrlError, RevokedReason, deadline::Deadline};
use crate::{
    crypto::{SecretKey, tags_equal},
    ids::hex_decode,
    io::{OsRandom, Random},
};

/// The magic and the version of a wrapped key.
const HEAD: &[u8; 6] = b"ELKP\x01\x00";
const NONCE_BYTES: usize = 12;
const SEALED_BYTES: usize = 32 + 16;

/// A token as a [`Kms`]. The [module documentation](self) lists its answers.
pub struct Pkcs11Kms {
    uri: Uri,
    kept: Kept,
}

impl fmt::Debug for Pkcs11Kms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pkcs11Kms").field("uri", &self.uri).finish_non_exhaustive()
    }
}

impl Pkcs11Kms {
    /// The token that a URI names. It loads no module and makes no call. The first call does both.
    ///
    /// ```text
    /// pkcs11:token=logs;serial=0123?region=cn-hangzhou&module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/envelog/pin
    /// ```
    ///
    /// | attribute | meaning |
    /// |---|---|
    /// | `token`, `manufacturer`, `model`, `serial`, `slot-id` | the token's description and its slot; exactly one token must match |
    /// | `library-description`, `library-manufacturer`, `library-version` | the module's description |
    /// | `?region` | the one region that it serves; required |
    /// | `&module-path`, `&module-name` | the module: an absolute path, or a name that the dynamic linker looks for as `libNAME.so`; with both, the name in the directory `module-path` |
    /// | `&pin-source` | the file whose first line is the user's PIN, as `file:/path`; at most 4 KiB |
    /// | `&pin-value` | the PIN itself: anyone who sees the URI has it |
    ///
    /// Without a PIN, the backend uses the token's own way to ask for one, if it has one
    /// (`CKF_PROTECTED_AUTHENTICATION_PATH`).
    ///
    /// # Errors
    /// [`KmsUrlError::Malformed`], also for an attribute that is not in the table.
    pub fn from_uri(uri: &str) -> Result<Self, KmsUrlError> {
        Ok(Self { uri: Uri::parse(uri)?, kept: Kept::default() })
    }

    /// Runs `act` in a kept session. If that fails in any way, runs it again in a new session.
    fn in_session<T>(
        &self,
        call: &KmsCall<'_>,
        act: impl Fn(&Open, &Entered, Deadline) -> Result<T, KmsError>,
    ) -> Result<T, KmsError> {
        if call.cmk.region_id != self.uri.region {
            return Err(KmsError::invalid(format!(
                "it serves region {} and no other",
                self.uri.region
            )));
        }
        let deadline = Deadline::after(call.timeout);
        let entered = Module::at(&self.uri.module).enter(deadline)?;
        let keep = |open: Open, done: T| {
            self.kept.keep(open);
            done
        };
        if let Some(open) = self.kept.take()
            && let Ok(done) = act(&open, &entered, deadline)
        {
            return Ok(keep(open, done));
        }
        in_time(deadline)?;
        let open = Open::new(&self.uri, &entered, deadline)?;
        let done = act(&open, &entered, deadline)?;
        Ok(keep(open, done))
    }

    /// Finds the one key object that a master key names.
    fn find(&self, cmk: &Cmk, open: &Open, entered: &Entered) -> Result<ObjectHandle, KmsError> {
        let name = &cmk.cmk_key_id;
        let named = match name.strip_prefix("id:") {
            None => Attribute::Label(name.clone().into_bytes()),
            Some(hex) => match hex_decode(hex) {
                Some(id) if !id.is_empty() => Attribute::Id(id),
                _ => {
                    return Err(KmsError::revoked(
                        RevokedReason::Deleted,
                        format!("no key can have the name {name}"),
                    ));
                }
            },
        };
        let template = [Attribute::Class(ObjectClass::SECRET_KEY), Attribute::Token(true), named];
        let look = || {
            let objects = open.session().iter_objects(&template)?;
            objects.take(2).collect::<Result<Vec<_>, _>>()
        };
        let mut found = look().map_err(|error| outcome(&error))?;
        if found.is_empty() {
            // The login may have been lost, and another thread may have logged in again since the
            // search. So it checks the login and searches again.
            open.check_presence(&self.uri, entered)?;
            found = look().map_err(|error| outcome(&error))?;
        }
        match found[..] {
            [key] => Ok(key),
            [] => {
                open.check_presence(&self.uri, entered)?;
                Err(KmsError::revoked(
                    RevokedReason::Deleted,
                    format!("the token has no key {name}"),
                ))
            }
            _ => Err(KmsError::invalid(format!("the token has several keys {name}"))),
        }
    }

    fn seal(
        &self,
        call: &KmsCall<'_>,
        open: &Open,
        key: ObjectHandle,
        secret: &SecretKey,
    ) -> Result<Vec<u8>, KmsError> {
        let mut nonce = [0; NONCE_BYTES];
        OsRandom
            .fill(&mut nonce)
            .map_err(|error| KmsError::unreachable(format!("no randomness: {error}")))?;
        let aad = associated_data(call);
        let params =
            GcmParams::new(&mut nonce, &aad, 128.into()).map_err(|error| outcome(&error))?;
        let sealed = open.session().encrypt(&Mechanism::AesGcm(params), key, secret.expose());
        let sealed = sealed.map_err(|error| outcome(&error))?;
        if sealed.len() != SEALED_BYTES {
            return Err(KmsError::invalid("the token encrypts to another length"));
        }
        Ok([HEAD, &nonce[..], &sealed].concat())
    }

    fn open(
        &self,
        call: &KmsCall<'_>,
        open: &Open,
        entered: &Entered,
        key: ObjectHandle,
        wrapped: &[u8],
    ) -> Result<SecretKey, KmsError> {
        let parts =
            wrapped.strip_prefix(HEAD).and_then(|rest| rest.split_first_chunk::<NONCE_BYTES>());
        let (nonce, sealed) =
            parts.ok_or_else(|| KmsError::invalid("it is not a key that a token has wrapped"))?;
        if sealed.len() != SEALED_BYTES {
            return Err(KmsError::invalid("the wrapped key has another length"));
        }
        let (mut nonce, aad) = (*nonce, associated_data(call));
        let params =
            GcmParams::new(&mut nonce, &aad, 128.into()).map_err(|error| outcome(&error))?;
        let opened = match open.session().decrypt(&Mechanism::AesGcm(params), key, sealed) {
            Ok(opened) => Zeroizing::new(opened),
            Err(error) if may_be_a_wrong_tag(&error) => {
                open.check_presence(&self.uri, entered)?;
                return Err(KmsError::invalid(
                    "the wrapped key is damaged, or was made under another key or for another context",
                ));
            }
            Err(error) => return Err(outcome(&error)),
        };
        let secret = <[u8; 32]>::try_from(opened.as_slice()).map(Zeroizing::new);
        let mut secret =
            secret.map_err(|_| KmsError::invalid("the token decrypts to another length"))?;
        Ok(SecretKey::from_bytes(&mut secret))
    }
}

impl Kms for Pkcs11Kms {
    fn name(&self) -> &str {
        "pkcs11"
    }

    fn serves(&self, region_id: &str) -> bool {
        self.uri.region == region_id
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        self.in_session(call, |open, entered, deadline| {
            let cmk = self.find(call.cmk, open, entered)?;
            check_fit(open, cmk, &call.cmk.cmk_key_id)?;
            check_allowed(open, cmk, AttributeType::Encrypt, &call.cmk.cmk_key_id)?;
            check_allowed(open, cmk, AttributeType::Decrypt, &call.cmk.cmk_key_id)?;
            in_time(deadline)?;
            let wrapped = self.seal(call, open, cmk, key)?;
            in_time(deadline)?;
            // Detects a data key that the token cannot decrypt, before the engine writes anything
            // under it.
            let again = self.open(call, open, entered, cmk, &wrapped)?;
            if !tags_equal(again.expose(), key.expose()) {
                return Err(KmsError::invalid("the token does not decrypt to what it encrypted"));
            }
            Ok(wrapped)
        })
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        self.in_session(call, |open, entered, deadline| {
            let cmk = self.find(call.cmk, open, entered)?;
            check_allowed(open, cmk, AttributeType::Decrypt, &call.cmk.cmk_key_id)?;
            in_time(deadline)?;
            self.open(call, open, entered, cmk, wrapped)
        })
    }
}

fn associated_data(call: &KmsCall<'_>) -> Vec<u8> {
    [&HEAD[..], &call.context.to_bytes()].concat()
}

/// Checks that the key is fit to wrap data keys. By the standard, a key that is sensitive and not
/// extractable stays so.
fn check_fit(open: &Open, key: ObjectHandle, name: &str) -> Result<(), KmsError> {
    let asked = [
        AttributeType::KeyType,
        AttributeType::ValueLen,
        AttributeType::Sensitive,
        AttributeType::Extractable,
    ];
    let attributes = open.session().get_attributes(key, &asked).map_err(|error| outcome(&error))?;
    let unfit =
        |what| Err(KmsError::revoked(RevokedReason::NotPermitted, format!("key {name} {what}")));
    let has = |wanted: &Attribute| attributes.contains(wanted);
    if !has(&Attribute::KeyType(KeyType::AES)) || !has(&Attribute::ValueLen(32.into())) {
        return unfit("is not an AES-256 key");
    }
    if !has(&Attribute::Sensitive(true)) || !has(&Attribute::Extractable(false)) {
        return unfit("can leave the token: make one that is sensitive and not extractable");
    }
    Ok(())
}

/// Fails if the key's owner has disabled this usage. If the token does not report the attribute,
/// the token itself refuses the usage.
fn check_allowed(
    open: &Open,
    key: ObjectHandle,
    usage: AttributeType,
    name: &str,
) -> Result<(), KmsError> {
    let attributes =
        open.session().get_attributes(key, &[usage]).map_err(|error| outcome(&error))?;
    let attribute = match attributes.first() {
        Some(Attribute::Encrypt(false)) => "CKA_ENCRYPT",
        Some(Attribute::Decrypt(false)) => "CKA_DECRYPT",
        _ => return Ok(()),
    };
    Err(KmsError::revoked(RevokedReason::Disabled, format!("{attribute} of key {name} is false")))
}
