//! A service keyring under a master key: its file holds the roots only sealed, under a key that a KMS has wrapped.
//!
//! Each writing draws a sealing key of its own, has it wrapped, and seals once with it; so the KMS is asked once when a store is
//! opened and once when the keyring is written, and at no other time.

use std::{path::Path, sync::Arc};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::envelope::fingerprint;
use crate::{
    Error, Result,
    config::ConfigError,
    crypto::{AeadKey, Cipher, CryptoError, CryptoProvider, HashAlg, SecretKey, derive},
    error::Location,
    ids::{KeyringId, StoreId, hex_decode, hex_encode},
    io::Random,
    kms::{BoundedKms, Cmk, EncryptionContext, KmsError},
    metrics::Counters,
};

/// What a keyring is bound to.
#[derive(Clone, Copy)]
pub(super) struct KeyringIdentity {
    pub(super) store: StoreId,
    pub(super) id: KeyringId,
    pub(super) newest: u32,
}

impl KeyringIdentity {
    fn context(&self) -> EncryptionContext {
        EncryptionContext::from([
            ("envelog:store".to_owned(), self.store.to_string()),
            ("envelog:keyring".to_owned(), self.id.to_string()),
            ("envelog:key-version".to_owned(), self.newest.to_string()),
            ("envelog:purpose".to_owned(), "service-keyring".to_owned()),
        ])
    }

    fn associated_data(&self) -> [u8; 36] {
        let mut bytes = [0; 36];
        bytes[0..16].copy_from_slice(self.store.as_bytes());
        bytes[16..32].copy_from_slice(self.id.as_bytes());
        bytes[32..36].copy_from_slice(&self.newest.to_le_bytes());
        bytes
    }
}

/// Part A of a keyring under a master key.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SealedBody {
    pub(super) cmk: Cmk,
    /// What the KMS made of the sealing key, in hex.
    wrapped: String,
    /// Of the sealing key, to recognise a wrong answer of the KMS.
    fingerprint: String,
    /// Part A of an open keyring, sealed, and its tag; in hex.
    sealed: String,
}

/// Who seals keyrings and asks the KMS.
#[derive(Clone)]
pub(crate) struct Custody {
    pub(crate) provider: Arc<dyn CryptoProvider>,
    /// The KMSs of the store.
    pub(crate) kms: Vec<BoundedKms>,
    /// What counts for the store.
    pub(crate) counters: Arc<Counters>,
}

impl Custody {
    fn kms_for(&self, cmk: &Cmk) -> Option<&BoundedKms> {
        self.kms.iter().find(|kms| kms.serves(&cmk.region_id))
    }

    fn cipher(&self, key: &SecretKey) -> Result<Box<dyn AeadKey>> {
        let key = derive(HashAlg::Sha256, &[], key, &[b"envelog v2 keyring"]);
        self.provider.aead(Cipher::Aes256Gcm, key.expose()).map_err(Error::Crypto)
    }

    /// Seals `plain`, which holds ciphertext afterwards.
    pub(super) fn seal(
        &self,
        random: &dyn Random,
        path: &Path,
        cmk: &Cmk,
        identity: KeyringIdentity,
        mut plain: Zeroizing<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let kms = self
            .kms_for(cmk)
            .ok_or_else(|| Error::Config(ConfigError::NoKmsForRegion { region: cmk.region_id.clone() }))?;
        let key = SecretKey::generate(random).map_err(Error::io("draw a random key for", path))?;
        let wrapped = kms.wrap(cmk, identity.context(), &key).map_err(|cause| service_key(path, cmk, cause))?;
        let tag = self.cipher(&key)?.seal(&[0; 12], &identity.associated_data(), &mut plain).map_err(Error::Crypto)?;
        let body = SealedBody {
            cmk: cmk.clone(),
            wrapped: hex_encode(&wrapped),
            fingerprint: fingerprint(&key),
            sealed: hex_encode(&plain) + &hex_encode(&tag),
        };
        Ok(serde_json::to_vec(&body).expect("plain data always serializes"))
    }

    /// Opens what [`Custody::seal`] made.
    pub(super) fn open(&self, path: &Path, identity: KeyringIdentity, body: &SealedBody) -> Result<Zeroizing<Vec<u8>>> {
        let cmk = &body.cmk;
        let malformed = || Error::corrupt(Location::new(path, 80), "the service keyring does not parse");
        let wrapped = hex_decode(&body.wrapped).ok_or_else(malformed)?;
        let sealed = hex_decode(&body.sealed).ok_or_else(malformed)?;
        let (sealed, tag) = sealed.split_last_chunk::<16>().ok_or_else(malformed)?;
        let key = match self.kms_for(cmk) {
            Some(kms) => kms.unwrap(cmk, identity.context(), &wrapped),
            None => Err(KmsError::Unreachable {
                detail: format!("no KMS is configured that serves region {}", cmk.region_id),
            }),
        };
        let key = key.map_err(|cause| service_key(path, cmk, cause))?;
        if fingerprint(&key) != body.fingerprint {
            let detail = "it unwrapped the keyring's key to another key".to_owned();
            return Err(service_key(path, cmk, KmsError::Invalid { detail }));
        }
        let mut plain = Zeroizing::new(vec![0; sealed.len()]);
        match self.cipher(&key)?.open(&[0; 12], &identity.associated_data(), sealed, tag, &mut plain) {
            Ok(()) => Ok(plain),
            Err(CryptoError::AuthenticationFailed) => {
                Err(Error::Tampered { at: Location::new(path, 0), what: "the service keyring" })
            }
            Err(error) => Err(Error::Crypto(error)),
        }
    }
}

fn service_key(path: &Path, cmk: &Cmk, cause: KmsError) -> Error {
    Error::ServiceKey { path: path.to_owned(), cmk: cmk.cmk_key_id.clone(), region: cmk.region_id.clone(), cause }
}
