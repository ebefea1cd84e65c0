//! Keys in a hardware security module, or in any other token that speaks PKCS#11.
//!
//! A customer master key is an AES-256 key object in a token, sensitive and not extractable; it never leaves it. Data keys are
//! encrypted and decrypted *in the token*, by `CKM_AES_GCM`, with the encryption context as additional authenticated data.
//! `CKM_AES_KEY_WRAP` and its kin cannot bind a context, and are not used.
//!
//! # Which token, which key
//!
//! A URI (RFC 7512) says which token, and how to log in; see [`Pkcs11Kms::from_uri`]. Of a [`Cmk`],
//!
//! - `cmk_key_id` names the key object: its `CKA_LABEL`, or its `CKA_ID` as `id:` and hexadecimal digits. Exactly one secret key of
//!   the token must have it: several are [`KmsError::Invalid`].
//! - `region_id` must be the `region` of the URI: a token has no regions, so the operator gives it the name of one.
//! - `arn` is not looked at: PKCS#11 knows no roles. Who may use a key is decided by who has the PIN of its token. It is still part of
//!   what a lease belongs to, so write the same one for every Logstore under a key.
//!
//! # What a return value means
//!
//! | what happened | answer |
//! |---|---|
//! | the token is there, the user is logged in, and no key is called so | `Revoked`: `Deleted` |
//! | `CKA_ENCRYPT` (to wrap) or `CKA_DECRYPT` (to unwrap) is false; `CKR_KEY_FUNCTION_NOT_PERMITTED` | `Revoked`: `Disabled` |
//! | to wrap: the key is not AES-256, not sensitive, or extractable | `Revoked`: `NotPermitted` |
//! | no module, no slot, no token: it cannot be loaded, `CKR_TOKEN_NOT_PRESENT`, `CKR_TOKEN_NOT_RECOGNIZED`, `CKR_SLOT_ID_INVALID`, `CKR_CRYPTOKI_NOT_INITIALIZED`, `CKR_CANT_LOCK` | `Unreachable` |
//! | the device: `CKR_DEVICE_REMOVED`, `CKR_DEVICE_ERROR`, `CKR_DEVICE_MEMORY`, `CKR_HOST_MEMORY`, `CKR_GENERAL_ERROR`, `CKR_FUNCTION_FAILED`, `CKR_FUNCTION_CANCELED`, `CKR_FUNCTION_REJECTED` | `Unreachable` |
//! | the session: `CKR_SESSION_HANDLE_INVALID`, `CKR_SESSION_CLOSED`, `CKR_SESSION_COUNT`, `CKR_USER_NOT_LOGGED_IN`, `CKR_OPERATION_ACTIVE`, `CKR_OPERATION_NOT_INITIALIZED` | `Unreachable` |
//! | the service's own credentials: `CKR_PIN_INCORRECT`, `CKR_PIN_INVALID`, `CKR_PIN_LEN_RANGE`, `CKR_PIN_EXPIRED`, `CKR_PIN_LOCKED`, `CKR_USER_PIN_NOT_INITIALIZED`, `CKR_USER_ANOTHER_ALREADY_LOGGED_IN`, `CKR_USER_TOO_MANY_TYPES`; the PIN is missing or cannot be read | `Unreachable` |
//! | a handle that was just found: `CKR_KEY_HANDLE_INVALID`, `CKR_OBJECT_HANDLE_INVALID` | `Unreachable`; the next call looks whether the key is there |
//! | `CKR_ENCRYPTED_DATA_INVALID`, `CKR_ENCRYPTED_DATA_LEN_RANGE`, `CKR_AEAD_DECRYPT_FAILED`; `CKR_GENERAL_ERROR` or `CKR_FUNCTION_FAILED` of `C_Decrypt` from a token that is there | `Invalid`: damaged, or made under another key or context |
//! | `CKR_DATA_INVALID`, `CKR_DATA_LEN_RANGE`, `CKR_KEY_TYPE_INCONSISTENT`, `CKR_KEY_SIZE_RANGE`, `CKR_MECHANISM_INVALID`, `CKR_MECHANISM_PARAM_INVALID`, `CKR_FUNCTION_NOT_SUPPORTED`, `CKR_ARGUMENTS_BAD`, `CKR_BUFFER_TOO_SMALL`, `CKR_ATTRIBUTE_TYPE_INVALID`; several tokens or keys where one is meant; a decrypted key of another length | `Invalid` |
//! | any other return value, a vendor's own among them; the time is up | `Unreachable` |
//!
//! A token that was taken away, or has lost its login, can look like one without keys, so "no key is called so" counts only between
//! two proofs that the token is there and the user logged in, in a session that was opened for this call. `CKA_START_DATE` and `CKA_END_DATE` are not looked at: the standard
//! gives them no effect, and a wrong clock here must not revoke. To end the use of a key, clear `CKA_DECRYPT` or destroy it.
//!
//! # Sessions, logins, losses
//!
//! A call has a session to itself; up to 8 idle ones are kept, and with them the login. Nothing about a key is kept. Whatever goes
//! wrong in a kept session is tried once more, in a new one: the token is looked for anew among all slots, and the user logged in
//! again. Should the token not be there, and nobody else be in the module, the module is initialized anew (`C_Finalize`,
//! `C_Initialize`), as some look for tokens only then; a module that another part of the process has initialized is left alone. So a
//! token that comes back is used again at the next call.
//!
//! A PIN that a token refuses is **not tried again**, by nobody in the process, since a token locks after a few wrong ones. With
//! `pin-source` it is enough to correct the file, which is read at each login.
//!
//! # Limits
//!
//! - **A call into a module cannot be interrupted.** The engine gives up waiting after `kms_timeout` and takes the KMS for unreachable;
//!   the thread stays in the module until it comes back, and its answer is dropped. At most 32 calls are in a module at once; further
//!   ones wait for their time and are `Unreachable`. Between two calls into the module the time is looked at, so a slow token is
//!   not asked for more than anybody waits for.
//! - **A key encrypts at most 2^32 data keys**, as NIST SP 800-38D demands of GCM with random 96-bit nonces: one is used per data key
//!   and per probe. The nonce comes from the operating system, unless the token writes its own in its place, as some must.
//! - **`fork`**: a child has to initialize modules for itself, which happens at its first call; a module that refuses that is
//!   `Unreachable` there. What the parent has opened is not touched.
//! - **A key object has no versions.** Rotating means another key with another name, and `Store::replace_cmk`.
//!
//! # What is wrapped
//!
//! ```text
//! 0   4   magic "ELKP"
//! 4   2   version = 1, little-endian
//! 6   12  nonce
//! 18  48  sealed key and tag
//! ```
//!
//! Associated data: bytes 0 to 6, then the context as a count u32 and for each name and value, in the order of the names,
//! length u32 and bytes, all little-endian.

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
    module::{Deadline, Entered, Module},
    outcome::{invalid, may_be_a_wrong_tag, outcome, revoked, unreachable},
    token::{Kept, Open},
    uri::Uri,
};
use super::{Cmk, Kms, KmsCall, KmsError, KmsUrlError, RevokedReason, context::associated_data};
use crate::{
    crypto::{SecretKey, tags_equal},
    ids::hex_decode,
    io::{OsRandom, Random},
};

/// Magic and version of a wrapped key.
const HEAD: &[u8; 6] = b"ELKP\x01\x00";
const NONCE_BYTES: usize = 12;
const SEALED_BYTES: usize = 32 + 16;

/// A token as a [`Kms`]. The [module documentation](self) says how it answers.
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
    /// The token that a URI names. Loads nothing and calls nobody: that is done at the first call.
    ///
    /// ```text
    /// pkcs11:token=logs;serial=0123?region=cn-hangzhou&module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=file:/etc/envelog/pin
    /// ```
    ///
    /// | attribute | means |
    /// |---|---|
    /// | `token`, `manufacturer`, `model`, `serial`, `slot-id` | what the token must say of itself, and where it is; exactly one token must match |
    /// | `library-description`, `library-manufacturer`, `library-version` | what the module must say of itself |
    /// | `?region` | the one region that it serves; required |
    /// | `&module-path`, `&module-name` | the module: an absolute path; or a name, which the dynamic linker looks for as `libNAME.so`, in the directory `module-path` if both are there |
    /// | `&pin-source` | the file whose first line is the PIN of the user, as `file:/path`; at most 4 KiB |
    /// | `&pin-value` | the PIN itself: whoever sees the URI has it |
    ///
    /// Without a PIN the token's own way to ask for one is used, if it has one (`CKF_PROTECTED_AUTHENTICATION_PATH`).
    ///
    /// # Errors
    /// [`KmsUrlError::Malformed`], also for an attribute that is not in the table.
    pub fn from_uri(uri: &str) -> Result<Self, KmsUrlError> {
        Ok(Self { uri: Uri::parse(uri)?, kept: Kept::default() })
    }

    /// Does something in a session: in a kept one, and, should that fail in whatever way, in a new one.
    fn in_session<T>(
        &self,
        call: &KmsCall<'_>,
        act: impl Fn(&Open, &Entered, Deadline) -> Result<T, KmsError>,
    ) -> Result<T, KmsError> {
        if call.cmk.region_id != self.uri.region {
            return Err(invalid(format!("it serves region {} and no other", self.uri.region)));
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
        deadline.check()?;
        let open = Open::new(&self.uri, &entered, deadline)?;
        let done = act(&open, &entered, deadline)?;
        Ok(keep(open, done))
    }

    /// The one key object that a master key names.
    fn find(&self, cmk: &Cmk, open: &Open, entered: &Entered) -> Result<ObjectHandle, KmsError> {
        let name = &cmk.cmk_key_id;
        let named = match name.strip_prefix("id:") {
            None => Attribute::Label(name.clone().into_bytes()),
            Some(hex) => match hex_decode(hex) {
                Some(id) if !id.is_empty() => Attribute::Id(id),
                _ => return Err(revoked(RevokedReason::Deleted, format!("no key can have the name {name}"))),
            },
        };
        let template = [Attribute::Class(ObjectClass::SECRET_KEY), Attribute::Token(true), named];
        let look = || {
            let objects = open.session().iter_objects(&template)?;
            objects.take(2).collect::<Result<Vec<_>, _>>()
        };
        let mut found = look().map_err(|error| outcome(&error))?;
        if found.is_empty() {
            // The login may have been lost, and another thread have logged in again behind the look.
            open.check_presence(&self.uri, entered)?;
            found = look().map_err(|error| outcome(&error))?;
        }
        match found[..] {
            [key] => Ok(key),
            [] => {
                open.check_presence(&self.uri, entered)?;
                Err(revoked(RevokedReason::Deleted, format!("the token has no key {name}")))
            }
            _ => Err(invalid(format!("the token has several keys {name}"))),
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
        OsRandom.fill(&mut nonce).map_err(|error| unreachable(format!("no randomness: {error}")))?;
        let aad = associated_data(HEAD, call.context);
        let params = GcmParams::new(&mut nonce, &aad, 128.into()).map_err(|error| outcome(&error))?;
        let sealed = open.session().encrypt(&Mechanism::AesGcm(params), key, secret.expose());
        let sealed = sealed.map_err(|error| outcome(&error))?;
        if sealed.len() != SEALED_BYTES {
            return Err(invalid("the token encrypts to another length"));
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
        let parts = wrapped.strip_prefix(HEAD).and_then(|rest| rest.split_first_chunk::<NONCE_BYTES>());
        let (nonce, sealed) = parts.ok_or_else(|| invalid("it is not a key that a token has wrapped"))?;
        if sealed.len() != SEALED_BYTES {
            return Err(invalid("the wrapped key has another length"));
        }
        let (mut nonce, aad) = (*nonce, associated_data(HEAD, call.context));
        let params = GcmParams::new(&mut nonce, &aad, 128.into()).map_err(|error| outcome(&error))?;
        let opened = match open.session().decrypt(&Mechanism::AesGcm(params), key, sealed) {
            Ok(opened) => Zeroizing::new(opened),
            Err(error) if may_be_a_wrong_tag(&error) => {
                open.check_presence(&self.uri, entered)?;
                return Err(invalid(
                    "the wrapped key is damaged, or was made under another key or for another context",
                ));
            }
            Err(error) => return Err(outcome(&error)),
        };
        let secret = <[u8; 32]>::try_from(opened.as_slice()).map(Zeroizing::new);
        let mut secret = secret.map_err(|_| invalid("the token decrypts to another length"))?;
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
            deadline.check()?;
            let wrapped = self.seal(call, open, cmk, key)?;
            deadline.check()?;
            // A data key that the token cannot give back is found out before anything is written under it.
            let again = self.open(call, open, entered, cmk, &wrapped)?;
            if !tags_equal(again.expose(), key.expose()) {
                return Err(invalid("the token does not decrypt to what it encrypted"));
            }
            Ok(wrapped)
        })
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        self.in_session(call, |open, entered, deadline| {
            let cmk = self.find(call.cmk, open, entered)?;
            check_allowed(open, cmk, AttributeType::Decrypt, &call.cmk.cmk_key_id)?;
            deadline.check()?;
            self.open(call, open, entered, cmk, wrapped)
        })
    }
}

/// Whether the key is one to put data keys under. What is sensitive and not extractable stays so, by the standard.
fn check_fit(open: &Open, key: ObjectHandle, name: &str) -> Result<(), KmsError> {
    let asked = [AttributeType::KeyType, AttributeType::ValueLen, AttributeType::Sensitive, AttributeType::Extractable];
    let attributes = open.session().get_attributes(key, &asked).map_err(|error| outcome(&error))?;
    let unfit = |what| Err(revoked(RevokedReason::NotPermitted, format!("key {name} {what}")));
    let has = |wanted: &Attribute| attributes.contains(wanted);
    if !has(&Attribute::KeyType(KeyType::AES)) || !has(&Attribute::ValueLen(32.into())) {
        return unfit("is not an AES-256 key");
    }
    if !has(&Attribute::Sensitive(true)) || !has(&Attribute::Extractable(false)) {
        return unfit("can leave the token: make one that is sensitive and not extractable");
    }
    Ok(())
}

/// Refuses a key that its owner has taken the use from. Where the token does not say, it refuses the use itself.
fn check_allowed(open: &Open, key: ObjectHandle, usage: AttributeType, name: &str) -> Result<(), KmsError> {
    let attributes = open.session().get_attributes(key, &[usage]).map_err(|error| outcome(&error))?;
    let attribute = match attributes.first() {
        Some(Attribute::Encrypt(false)) => "CKA_ENCRYPT",
        Some(Attribute::Decrypt(false)) => "CKA_DECRYPT",
        _ => return Ok(()),
    };
    Err(revoked(RevokedReason::Disabled, format!("{attribute} of key {name} is false")))
}
