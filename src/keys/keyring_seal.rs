//! A service keyring under a master key: its file holds the roots sealed, under a key that a KMS
//! has wrapped.
//!
//! Each write of the file generates a sealing key, has the KMS wrap it, and seals once with it. So
//! the engine calls the KMS once when it opens a store and once when it writes the keyring, and at
//! no other time.

use std::{path::Path, sync::Arc};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::envelope::fingerprint;
use crate::{
    Error, Result,
    crypto::{AeadKey, Cipher, CryptoError, CryptoProvider, HashAlg, SecretKey, derive},
    error::Location,
    ids::{KeyringId, StoreId, hex_decode, hex_encode},
    io::Random,
    kms::{Cmk, EncryptionContext, KmsError, KmsRouter},
};

/// The identifiers that a sealed keyring is bound to.
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

/// Part A of the document of a keyring under a master key.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SealedBody {
    pub(super) cmk: Cmk,
    /// The sealing key as the KMS has wrapped it, in hex.
    wrapped: String,
    /// The fingerprint of the sealing key, which reveals a wrong answer of the KMS.
    fingerprint: String,
    /// Part A of a keyring under no master key, sealed, and its tag; in hex.
    sealed: String,
}

/// Seals and opens keyrings with the KMSs of a store.
#[derive(Clone)]
pub(crate) struct KeyringSeal {
    provider: Arc<dyn CryptoProvider>,
    kms: KmsRouter,
}

impl KeyringSeal {
    pub(crate) fn new(provider: Arc<dyn CryptoProvider>, kms: KmsRouter) -> Self {
        Self { provider, kms }
    }

    /// The KMSs of the store.
    pub(crate) fn kms(&self) -> &KmsRouter {
        &self.kms
    }

    fn cipher(&self, key: &SecretKey) -> Result<Box<dyn AeadKey>> {
        let key = derive(HashAlg::Sha256, &[], key, &[b"envelog v2 keyring"]);
        self.provider.aead(Cipher::Aes256Gcm, key.expose()).map_err(Error::Crypto)
    }

    /// Seals `plain` in place, and returns part A. Calls the KMS.
    pub(super) fn seal(
        &self,
        random: &dyn Random,
        path: &Path,
        cmk: &Cmk,
        identity: KeyringIdentity,
        mut plain: Zeroizing<Vec<u8>>,
    ) -> Result<Vec<u8>> {
        let kms = self.kms.serving(&cmk.region_id)?;
        let key = SecretKey::generate(random).map_err(Error::io("draw a random key for", path))?;
        let wrapped = kms
            .wrap(cmk, identity.context(), &key)
            .map_err(|cause| service_key(path, cmk, cause))?;
        let tag = self
            .cipher(&key)?
            .seal(&[0; 12], &identity.associated_data(), &mut plain)
            .map_err(Error::Crypto)?;
        let body = SealedBody {
            cmk: cmk.clone(),
            wrapped: hex_encode(&wrapped),
            fingerprint: fingerprint(&key),
            sealed: hex_encode(&plain) + &hex_encode(&tag),
        };
        Ok(serde_json::to_vec(&body).expect("plain data always serializes"))
    }

    /// Opens the result of [`KeyringSeal::seal`]. Calls the KMS.
    pub(super) fn open(
        &self,
        path: &Path,
        identity: KeyringIdentity,
        body: &SealedBody,
    ) -> Result<Zeroizing<Vec<u8>>> {
        let cmk = &body.cmk;
        let malformed =
            || Error::corrupt(Location::new(path, 80), "the service keyring does not parse");
        let wrapped = hex_decode(&body.wrapped).ok_or_else(malformed)?;
        let sealed = hex_decode(&body.sealed).ok_or_else(malformed)?;
        let (sealed, tag) = sealed.split_last_chunk::<16>().ok_or_else(malformed)?;
        let kms = self.kms.serving(&cmk.region_id).map_err(KmsError::from);
        let key = kms.and_then(|kms| kms.unwrap(cmk, identity.context(), &wrapped));
        let key = key.map_err(|cause| service_key(path, cmk, cause))?;
        if fingerprint(&key) != body.fingerprint {
            let detail = "it unwrapped the keyring's key to another key".to_owned();
            return Err(service_key(path, cmk, KmsError::Invalid { detail }));
        }
        let mut plain = Zeroizing::new(vec![0; sealed.len()]);
        match self.cipher(&key)?.open(
            &[0; 12],
            &identity.associated_data(),
            sealed,
            tag,
            &mut plain,
        ) {
            Ok(()) => Ok(plain),
            Err(CryptoError::AuthenticationFailed) => {
                Err(Error::Tampered { at: Location::new(path, 0), what: "the service keyring" })
            }
            Err(error) => Err(Error::Crypto(error)),
        }
    }
}

fn service_key(path: &Path, cmk: &Cmk, cause: KmsError) -> Error {
    Error::ServiceKey {
        path: path.to_owned(),
        cmk: cmk.cmk_key_id.clone(),
        region: cmk.region_id.clone(),
        cause,
    }
}
