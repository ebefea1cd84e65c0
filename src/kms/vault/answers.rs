//! Sorts the answers of Vault and OpenBao. The tables in the documentation of
//! [`VaultKms`](super::VaultKms) follow this file.
//!
//! An error has a status and a JSON object with a list of sentences. No code exists, so the
//! sentences are compared. `sdk/helper/keysutil/policy.go` and the `path_*.go` of the Transit
//! engine have them, in both projects. A sentence is quoted in an error only if it is in a table
//! here.

use serde::Deserialize;
use zeroize::Zeroizing;

use super::wrapped;
use crate::{
    crypto::SecretKey,
    kms::{KmsError, RevokedReason, base64_key, http::Answer},
};

/// The key type that a request to encrypt names. Vault reads it only where it would create a
/// missing key, and creates no key of this type.
pub(super) const NO_TYPE: &str = "none";

/// Sentences of a refusal with status 400 that concern the key, and their meanings.
const REFUSALS: [(&str, RevokedReason); 5] = [
    ("encryption key not found", RevokedReason::Deleted),
    // Vault up to 0.10.
    ("policy not found", RevokedReason::Deleted),
    // The answer to `NO_TYPE`, if the policy of the role would allow the creation of a key.
    ("unknown key type none", RevokedReason::Deleted),
    // OpenBao. The administrator can restore the key.
    ("refusing to use soft-deleted key", RevokedReason::Disabled),
    // The administrator has raised `min_decryption_version`, and can lower it again.
    ("ciphertext or signature version is disallowed by policy (too old)", RevokedReason::Disabled),
];

/// The beginnings of other sentences with status 400.
const FAULTS: [&str; 12] = [
    "cipher: message authentication failed",
    "chacha20poly1305: message authentication failed",
    "invalid ciphertext",
    "missing 'context' for key derivation",
    "context should be set",
    "'[0].associated_data' provided for non-AEAD cipher suite",
    "message encryption not supported for key type",
    "message decryption not supported for key type",
    "nonce provided when not allowed",
    "missing ciphertext to decrypt",
    "failed to decode JSON input",
    "refusing to support decryption with old convergent encryption key",
];

/// Sentences of a refused Kubernetes login that concern the role and not the service's own token.
/// `builtin/credential/kubernetes/path_login.go`
const ROLE_REFUSALS: [&str; 2] =
    ["service account name not authorized", "namespace not authorized"];
const NO_SUCH_ROLE: &str = "invalid role name";
const DENIED: &str = "permission denied";
/// The beginnings of sentences about the service's own credentials.
const OWN_REFUSALS: [&str; 6] = [
    DENIED,
    "invalid role or secret ID",
    "invalid expiration time (exp) claim",
    "invalid not before (nbf) claim",
    "invalid audience (aud) claim",
    "invalid issuer (iss) claim",
];

/// The meaning of an answer that is no success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    Revoked(RevokedReason),
    /// The token is not valid, or its policies deny the request.
    Denied,
    Unreachable,
    Invalid,
}

/// An answer that is no success.
#[derive(Debug)]
pub(super) struct Failure {
    status: u16,
    pub(super) meaning: Meaning,
    /// The known sentence that decided.
    said: Option<&'static str>,
}

impl Failure {
    /// Sorts an answer of the Transit engine.
    pub(super) fn of_transit(answer: &Answer) -> Self {
        let said = sentences(answer);
        let (meaning, known) = match answer.status {
            400 if !said.is_empty() => bad_request(&said),
            403 if said.iter().any(|line| line == DENIED) => (Meaning::Denied, Some(DENIED)),
            _ => (Meaning::Unreachable, None),
        };
        Self { status: answer.status, meaning, said: known }
    }

    /// Sorts an answer to a login with Kubernetes. The role is the customer's, the token in the
    /// request is the service's own.
    pub(super) fn of_kubernetes_login(answer: &Answer) -> Self {
        let said = sentences(answer);
        let known = match answer.status {
            400 if said.iter().any(|line| line.starts_with(NO_SUCH_ROLE)) => Some(NO_SUCH_ROLE),
            403 => ROLE_REFUSALS.into_iter().find(|known| said.iter().any(|line| line == known)),
            _ => None,
        };
        match known {
            Some(_) => {
                let meaning = Meaning::Revoked(RevokedReason::NotPermitted);
                Self { status: answer.status, meaning, said: known }
            }
            None => Self::of_own_login(answer),
        }
    }

    /// Sorts an answer about the service's own credentials.
    pub(super) fn of_own_login(answer: &Answer) -> Self {
        let said = sentences(answer);
        let is_said = |known: &&str| said.iter().any(|line| line.starts_with(known));
        let known = OWN_REFUSALS.into_iter().find(is_said);
        Self { status: answer.status, meaning: Meaning::Unreachable, said: known }
    }

    /// The error of a call. A denial is the customer's: the token was valid.
    pub(super) fn error(&self, what: &str) -> KmsError {
        let detail = match self.said {
            Some(said) => format!("{what}: {said}"),
            None => format!("{what}: HTTP status {}", self.status),
        };
        match self.meaning {
            Meaning::Revoked(reason) => KmsError::Revoked { reason, detail },
            Meaning::Denied => KmsError::Revoked { reason: RevokedReason::NotPermitted, detail },
            Meaning::Unreachable => KmsError::Unreachable { detail },
            Meaning::Invalid => KmsError::Invalid { detail },
        }
    }
}

fn bad_request(said: &[String]) -> (Meaning, Option<&'static str>) {
    for (known, reason) in REFUSALS {
        if said.iter().any(|line| line == known) {
            return (Meaning::Revoked(reason), Some(known));
        }
    }
    let fault = FAULTS.into_iter().find(|known| said.iter().any(|line| line.starts_with(known)));
    (Meaning::Invalid, fault)
}

/// The sentences of an error. Several in one text are lines that begin with an asterisk. Empty if
/// the answer is not one of Vault's errors.
fn sentences(answer: &Answer) -> Vec<String> {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<String>,
    }
    let Ok(Errors { errors }) = serde_json::from_slice(&answer.body) else { return Vec::new() };
    let lines = errors.iter().flat_map(|error| error.lines());
    lines.map(|line| line.trim().trim_start_matches("* ").to_owned()).collect()
}

/// The wrapped key in an answer to a request to encrypt.
pub(super) fn ciphertext(answer: &Answer) -> Result<String, KmsError> {
    #[derive(Deserialize)]
    struct Encrypted {
        ciphertext: String,
    }
    let Encrypted { ciphertext } = data(answer)?;
    if wrapped::version(ciphertext.as_bytes()).is_none() {
        return Err(KmsError::invalid("Transit: the ciphertext is none of Transit's"));
    }
    Ok(ciphertext)
}

/// The key in an answer to a request to decrypt.
pub(super) fn plaintext(answer: &Answer) -> Result<SecretKey, KmsError> {
    #[derive(Deserialize)]
    struct Decrypted {
        plaintext: Zeroizing<String>,
    }
    let Decrypted { plaintext } = data(answer)?;
    base64_key::decode(&plaintext)
        .ok_or_else(|| KmsError::invalid("Transit: the plaintext is not a key of 32 bytes"))
}

/// The `data` of a success.
fn data<T: for<'a> Deserialize<'a>>(answer: &Answer) -> Result<T, KmsError> {
    #[derive(Deserialize)]
    struct Success<T> {
        data: T,
    }
    // The parser's error may quote a value.
    let success: Success<T> = serde_json::from_slice(&answer.body)
        .map_err(|_| KmsError::invalid("Transit: the answer is not that to the request"))?;
    Ok(success.data)
}
