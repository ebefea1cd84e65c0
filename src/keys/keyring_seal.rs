//! A service keyring under a master key: its file holds the roots sealed, under a key that a KMS
//! has wrapped.
//!
//! Each write of the file generates a sealing key, has the KMS wrap it, and seals once with it. So
//! the engine calls the KMS once when it opens a store and once when it writes the keyring. The
//! sealing key as it is in the file is also the probe of the lease of that master key.

use std::{path::Path, sync::Arc};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{envelope::fingerprint, lease::Probe, moment::Moment};
use crate::{
    Error, Result,
    crypto::{AeadKey, Cipher, CryptoError, CryptoProvider, HashAlg, SecretKey, derive},
    document::to_json,
    error::Location,
    ids::{KeyringId, StoreId, hex_decode, hex_encode},
    io::Random,
    kms::{BoundedKms, Cmk, EncryptionContext, KmsError, KmsRouter},
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

/// The master key that a keyring file is under, with the sealing key as the KMS has wrapped it.
#[derive(Clone)]
pub(crate) struct Wrapping {
    pub(crate) cmk: Cmk,
    wrapped: Vec<u8>,
    context: EncryptionContext,
    fingerprint: String,
    /// When the call was sent by which the KMS has wrapped or unwrapped the sealing key.
    pub(crate) asked: Moment,
}

impl Wrapping {
    /// The probe of the lease of the master key.
    pub(crate) fn probe(&self) -> Probe {
        let Self { wrapped, context, fingerprint, .. } = self.clone();
        Probe { wrapped, context, fingerprint }
    }

    /// Whether a file has this sealing key, under this master key.
    pub(super) fn is_of(&self, body: &SealedBody) -> bool {
        self.cmk == body.cmk && hex_decode(&body.wrapped).is_some_and(|it| it == self.wrapped)
    }
}

/// A new sealing key, which the KMS has wrapped.
pub(super) struct Sealing {
    key: SecretKey,
    identity: KeyringIdentity,
    pub(super) wrapping: Wrapping,
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

    /// Draws a sealing key and has the KMS wrap it.
    pub(super) fn begin(
        &self,
        random: &dyn Random,
        path: &Path,
        cmk: &Cmk,
        identity: KeyringIdentity,
    ) -> Result<Sealing> {
        let kms = self.kms.serving(&cmk.region_id)?;
        let key = SecretKey::generate(random).map_err(Error::io("draw a random key for", path))?;
        let (asked, context) = (self.now(), identity.context());
        let wrapped = kms
            .wrap(cmk, context.clone(), &key)
            .map_err(|cause| service_key_error(path, cmk, cause))?;
        let (cmk, fingerprint) = (cmk.clone(), fingerprint(&key));
        let wrapping = Wrapping { cmk, wrapped, context, fingerprint, asked };
        Ok(Sealing { key, identity, wrapping })
    }

    /// Seals `plain` in place, and returns part A.
    pub(super) fn seal(&self, sealing: &Sealing, mut plain: Zeroizing<Vec<u8>>) -> Result<Vec<u8>> {
        let tag = self
            .cipher(&sealing.key)?
            .seal(&[0; 12], &sealing.identity.associated_data(), &mut plain)
            .map_err(Error::Crypto)?;
        let Wrapping { cmk, wrapped, fingerprint, .. } = &sealing.wrapping;
        let body = SealedBody {
            cmk: cmk.clone(),
            wrapped: hex_encode(wrapped),
            fingerprint: fingerprint.clone(),
            sealed: hex_encode(&plain) + &hex_encode(&tag),
        };
        Ok(to_json(&body).into_bytes())
    }

    /// Opens the result of [`KeyringSeal::seal`]. Calls the KMS.
    pub(super) fn open(
        &self,
        path: &Path,
        identity: KeyringIdentity,
        body: SealedBody,
    ) -> Result<(Zeroizing<Vec<u8>>, Wrapping)> {
        let malformed =
            || Error::corrupt(Location::new(path, 80), "the service keyring does not parse");
        let SealedBody { cmk, wrapped, fingerprint: expected, sealed } = body;
        let wrapped = hex_decode(&wrapped).ok_or_else(malformed)?;
        let sealed = hex_decode(&sealed).ok_or_else(malformed)?;
        let (sealed, tag) = sealed.split_last_chunk::<16>().ok_or_else(malformed)?;
        let (asked, context) = (self.now(), identity.context());
        let kms = self.kms.serving(&cmk.region_id).map_err(KmsError::from);
        let unwrap = |kms: BoundedKms| kms.unwrap(&cmk, context.clone(), &wrapped);
        let key = kms.and_then(unwrap).map_err(|cause| service_key_error(path, &cmk, cause))?;
        if fingerprint(&key) != expected {
            let detail = "it unwrapped the keyring's key to another key".to_owned();
            return Err(service_key_error(path, &cmk, KmsError::Invalid { detail }));
        }
        let mut plain = Zeroizing::new(vec![0; sealed.len()]);
        match self.cipher(&key)?.open(
            &[0; 12],
            &identity.associated_data(),
            sealed,
            tag,
            &mut plain,
        ) {
            Ok(()) => Ok((plain, Wrapping { cmk, wrapped, context, fingerprint: expected, asked })),
            Err(CryptoError::AuthenticationFailed) => {
                Err(Error::Tampered { at: Location::new(path, 0), what: "the service keyring" })
            }
            Err(error) => Err(Error::Crypto(error)),
        }
    }

    fn now(&self) -> Moment {
        Moment::now(&**self.kms.clock())
    }
}

/// The error of an operation that needs a keyring whose master key the KMS does not let be used.
pub(super) fn service_key_error(path: &Path, cmk: &Cmk, cause: KmsError) -> Error {
    Error::ServiceKey {
        path: path.to_owned(),
        cmk: cmk.cmk_key_id.clone(),
        region: cmk.region_id.clone(),
        cause,
    }
}
