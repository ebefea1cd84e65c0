//! Envelopes: wrapped data keys, and the identifiers that they are bound to.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{
    Error, Result,
    config::{
        EncryptConf, EncryptType, FixedEncryption, LogstoreConfig, LogstoreName, ProbeMode,
        check_cmk,
    },
    crypto::{CryptoError, CryptoProvider, HashAlg, SecretKey, Suite, derive},
    document::Document,
    error::Location,
    ids::{LogstoreId, StoreId, hex_decode, hex_encode},
    io::Random,
    kms::{Cmk, EncryptionContext},
};

/// The most data-key versions that a Logstore keeps.
pub(crate) const DATA_KEYS_MAX: usize = 10_000;

/// The keys section of a Logstore's metadata: everything that is needed to unwrap its data keys,
/// and the settings that a holder of the service keyring alone must not change. Under a customer's
/// key the current data key authenticates all of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct KeysSection {
    pub(crate) name: LogstoreName,
    pub(crate) encrypt_type: EncryptType,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) cmk: Option<Cmk>,
    /// The generation of the metadata that had the first envelope. Older segments are under the
    /// service keyring.
    pub(crate) since: u64,
    /// Whether new data is encrypted.
    pub(crate) enable: bool,
    #[serde(default)]
    pub(crate) ttl_days: Option<u32>,
    #[serde(default)]
    pub(crate) retention_bytes: Option<u64>,
    /// The name of a [`ProbeMode`].
    pub(crate) probe: String,
    pub(crate) current: u32,
    pub(crate) versions: Vec<DataKeyVersion>,
}

/// The keys section of a Logstore under a customer's key, as its file has it, with the tag that a
/// data key made. It proves nothing until the current data key has verified that tag.
#[derive(Debug)]
pub(crate) struct TaggedKeys {
    /// Without part A.
    document: Document,
    at: Location,
}

impl TaggedKeys {
    /// Part B of the document in `path`; `None` if it has no second tag.
    pub(crate) fn of(document: &Document, path: &Path) -> Option<Self> {
        document.tag_b?;
        let at = Location::new(path, 80 + document.a.len() as u64);
        Some(Self { document: Document { a: Vec::new(), ..document.clone() }, at })
    }

    /// The bytes of the section, and their tag.
    pub(crate) fn parts(&self) -> (Vec<u8>, Option<[u8; 32]>) {
        (self.document.b.clone(), self.document.tag_b)
    }

    /// Verifies the tag with the current data key.
    ///
    /// # Errors
    /// [`Error::Tampered`].
    pub(crate) fn prove(&self, data_key: &SecretKey) -> Result<()> {
        let tampered =
            |_| Error::Tampered { at: self.at.clone(), what: "the keys section of the metadata" };
        self.document.verify_b(&metadata_key(data_key)).map_err(tampered)
    }
}

/// One version of a data key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DataKeyVersion {
    pub(crate) version: u32,
    pub(crate) created_us: u64,
    /// By shard: the first ordinal whose segment is under this version. The segments from there to
    /// the next version's first ordinal are under no other key. So a copy of an older data key
    /// cannot make a new segment.
    pub(crate) ordinals: Vec<u64>,
    /// The keyring version that wrapped the key when it was generated; `None` under a customer
    /// master key. A rotation of the service key replaces data keys that were generated under an
    /// older version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) drawn_under: Option<u32>,
    /// When it was last re-wrapped, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) wrapped_us: Option<u64>,
    /// The keyring version that wraps it; `None` under a customer master key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) keyring_version: Option<u32>,
    /// The wrapped key in hex; `None` once the key was destroyed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) wrapped: Option<String>,
    /// A value derived one-way from the key. It reveals a wrong answer of the KMS.
    pub(crate) fingerprint: String,
}

impl KeysSection {
    pub(crate) fn fixed(&self) -> FixedEncryption {
        FixedEncryption { encrypt_type: self.encrypt_type, cmk: self.cmk.clone() }
    }

    /// `encrypt_conf` by this section.
    pub(crate) fn encrypt_conf(&self) -> EncryptConf {
        EncryptConf {
            enable: self.enable,
            encrypt_type: Some(self.encrypt_type),
            user_cmk_info: self.cmk.clone(),
        }
    }

    /// Takes the settings from `config` that the section holds too, except the fixed ones.
    pub(crate) fn follow(&mut self, config: &LogstoreConfig) {
        self.enable = config.encrypt_conf.as_ref().is_some_and(|conf| conf.enable);
        (self.ttl_days, self.retention_bytes) = (config.ttl_days, config.retention_bytes);
        self.probe = config.probe.name().to_owned();
    }

    /// Sets the settings of `config` that the section holds too.
    pub(crate) fn lead(&self, config: &mut LogstoreConfig) {
        config.name = self.name.clone();
        config.encrypt_conf = Some(self.encrypt_conf());
        (config.ttl_days, config.retention_bytes) = (self.ttl_days, self.retention_bytes);
        config.probe = self.probe_mode();
    }

    /// The mode of its probe. Metadata with a mode that this version does not know is refused when
    /// it is read.
    pub(crate) fn probe_mode(&self) -> ProbeMode {
        ProbeMode::of_name(&self.probe).unwrap_or_default()
    }

    pub(crate) fn version(&self, version: u32) -> Option<&DataKeyVersion> {
        self.versions.iter().find(|v| v.version == version)
    }

    /// The version that a segment of a shard is under, by its ordinal; `None` for a segment from
    /// before the first envelope.
    pub(crate) fn owner(&self, shard: u32, ordinal: u64) -> Option<u32> {
        let begins = |version: &&DataKeyVersion| {
            version.ordinals.get(shard as usize).is_some_and(|&from| from <= ordinal)
        };
        self.versions.iter().rev().find(begins).map(|version| version.version)
    }

    /// For how many shards it has ordinals.
    pub(crate) fn shard_count(&self) -> usize {
        self.versions.first().map_or(0, |version| version.ordinals.len())
    }

    /// Adds shards that have no segment yet: the current version owns all that they will have.
    pub(crate) fn add_shards(&mut self, count: usize) {
        for version in &mut self.versions {
            version.ordinals.resize(version.ordinals.len() + count, 1);
        }
    }

    /// Checks the rules of the format that concern the section alone.
    ///
    /// # Errors
    /// The rule of the format that it breaks.
    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        let broken = |rule: &str| Err(rule.to_owned());
        if let Some(cmk) = &self.cmk {
            check_cmk(cmk).map_err(|error| error.to_string())?;
        }
        // A generation or ordinal is at least 1 and has a next one.
        let counted = 1..u64::MAX;
        if !counted.contains(&self.since) {
            return broken("the generation in since is out of range");
        }
        if self.versions.len() > DATA_KEYS_MAX {
            return broken("there are too many data-key versions");
        }
        if !(1..).zip(&self.versions).all(|(number, version): (u32, _)| version.version == number) {
            return broken("the data-key versions do not ascend from 1 without a gap");
        }
        match self.versions.last() {
            Some(newest) if newest.version == self.current && newest.wrapped.is_some() => {}
            _ => {
                return broken(
                    "the current data-key version is not the newest, or has no envelope",
                );
            }
        }
        let mut before: &[u64] = &[];
        for version in &self.versions {
            if version.ordinals.len() != self.shard_count() {
                return broken(
                    "the data-key versions have ordinals of different numbers of shards",
                );
            }
            if !version.ordinals.iter().all(|ordinal| counted.contains(ordinal)) {
                return broken("an ordinal of a data-key version is out of range");
            }
            if before.iter().zip(&version.ordinals).any(|(before, ordinal)| before > ordinal) {
                return broken("a data-key version begins before the one that it replaces");
            }
            before = &version.ordinals;
            if [version.keyring_version, version.drawn_under]
                .iter()
                .any(|under| under.is_some() == self.cmk.is_some())
            {
                return broken(
                    "a data-key version names a service key beside a customer's key, or neither",
                );
            }
            if version.drawn_under > version.keyring_version {
                return broken(
                    "a data key is wrapped under an older service key than it was drawn under",
                );
            }
            if hex_decode(&version.fingerprint).is_none_or(|bytes| bytes.len() != 16) {
                return broken("the fingerprint of a data-key version is not one");
            }
            let wrapped = version.wrapped.as_deref().map(hex_decode);
            let fits = |bytes: &Vec<u8>| {
                if self.cmk.is_some() { !bytes.is_empty() } else { bytes.len() == WRAPPED_BYTES }
            };
            if wrapped.is_some_and(|bytes| !bytes.as_ref().is_some_and(fits)) {
                return broken("the envelope of a data-key version is not one");
            }
        }
        Ok(())
    }

    /// The versions that have an envelope, and the envelopes in hex.
    pub(crate) fn envelopes(&self) -> impl Iterator<Item = (&DataKeyVersion, &str)> {
        self.versions.iter().filter_map(|version| Some((version, version.wrapped.as_deref()?)))
    }
}

/// The identifiers that an envelope is bound to. It unwraps under no others.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EnvelopeIdentity {
    pub(crate) store: StoreId,
    pub(crate) logstore: LogstoreId,
    pub(crate) version: u32,
    pub(crate) suite: Suite,
}

impl EnvelopeIdentity {
    /// The encryption context that a KMS binds the envelope to.
    pub(crate) fn context(&self) -> EncryptionContext {
        EncryptionContext::from([
            ("envelog:store".to_owned(), self.store.to_string()),
            ("envelog:logstore".to_owned(), self.logstore.to_string()),
            ("envelog:key-version".to_owned(), self.version.to_string()),
            ("envelog:suite".to_owned(), self.suite.name().to_owned()),
        ])
    }

    /// The associated data of an envelope under the service key.
    fn associated_data(&self, keyring_version: u32) -> [u8; 42] {
        let mut bytes = [0; 42];
        bytes[0..16].copy_from_slice(self.store.as_bytes());
        bytes[16..32].copy_from_slice(self.logstore.as_bytes());
        bytes[32..36].copy_from_slice(&self.version.to_le_bytes());
        bytes[36..38].copy_from_slice(&self.suite.code().to_le_bytes());
        bytes[38..42].copy_from_slice(&keyring_version.to_le_bytes());
        bytes
    }
}

/// The length of an envelope under the service key: salt, sealed key, tag.
const WRAPPED_BYTES: usize = 32 + 32 + 16;

/// Wraps `key` under a key that is derived from `root` with a fresh salt. The nonce is zero, so the
/// derived key must not be used twice.
pub(super) fn wrap(
    provider: &dyn CryptoProvider,
    random: &dyn Random,
    root: &SecretKey,
    keyring_version: u32,
    identity: &EnvelopeIdentity,
    key: &SecretKey,
) -> Result<Vec<u8>> {
    let mut salt = [0; 32];
    random.fill(&mut salt).map_err(Error::io("draw a random salt", ""))?;
    // The plaintext is sealed in place, in a vector that never grows: no copy stays behind.
    let mut wrapped = Vec::with_capacity(WRAPPED_BYTES);
    wrapped.extend_from_slice(&salt);
    wrapped.extend_from_slice(key.expose());
    let (_, sealed) = wrapped.split_at_mut(32);
    let sealing = wrapping_key(provider, root, &salt, identity.suite)?;
    let tag = sealing
        .seal(&[0; 12], &identity.associated_data(keyring_version), sealed)
        .map_err(Error::Crypto)?;
    wrapped.extend_from_slice(&tag);
    Ok(wrapped)
}

/// Unwraps the result of [`wrap`]; `None` if it fails authentication.
pub(super) fn unwrap(
    provider: &dyn CryptoProvider,
    root: &SecretKey,
    keyring_version: u32,
    identity: &EnvelopeIdentity,
    wrapped: &[u8],
) -> Result<Option<SecretKey>> {
    let Some((salt, rest)) = wrapped.split_first_chunk::<32>() else { return Ok(None) };
    let Some((sealed, tag)) = rest.split_last_chunk::<16>() else { return Ok(None) };
    if sealed.len() != 32 {
        return Ok(None);
    }
    let opening = wrapping_key(provider, root, salt, identity.suite)?;
    let mut key = [0; 32];
    match opening.open(&[0; 12], &identity.associated_data(keyring_version), sealed, tag, &mut key)
    {
        Ok(()) => Ok(Some(SecretKey::from_bytes(&mut key))),
        Err(CryptoError::AuthenticationFailed) => Ok(None),
        Err(error) => Err(Error::Crypto(error)),
    }
}

fn wrapping_key(
    provider: &dyn CryptoProvider,
    root: &SecretKey,
    salt: &[u8; 32],
    suite: Suite,
) -> Result<Box<dyn crate::crypto::AeadKey>> {
    let key =
        derive(suite.hash(), salt, root, &[b"envelog v2 envelope", &suite.code().to_le_bytes()]);
    let cipher = suite.cipher();
    provider.aead(cipher, &key.expose()[..cipher.key_len()]).map_err(Error::Crypto)
}

/// The fingerprint of a key: 16 bytes derived one-way, in hex.
pub(crate) fn fingerprint(key: &SecretKey) -> String {
    let derived = derive(HashAlg::Sha256, &[], key, &[b"envelog v2 fingerprint"]);
    hex_encode(&derived.expose()[..16])
}

/// The key of the second tag of metadata under a customer's key, derived from the current data key.
pub(crate) fn metadata_key(data_key: &SecretKey) -> SecretKey {
    derive(HashAlg::Sha256, &[], data_key, &[b"envelog v2 metadata"])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{crypto::RustCrypto, io::OsRandom};

    fn identity() -> EnvelopeIdentity {
        EnvelopeIdentity {
            store: StoreId::from_bytes([1; 16]),
            logstore: LogstoreId::from_bytes([2; 16]),
            version: 3,
            suite: Suite::Aes256Gcm,
        }
    }

    #[test]
    fn an_envelope_opens_only_for_the_identity_it_is_bound_to() {
        let provider = RustCrypto::new();
        let root = SecretKey::from_bytes(&mut [7; 32]);
        let key = SecretKey::from_bytes(&mut [9; 32]);
        for suite in [Suite::Aes256Gcm, Suite::Sm4Gcm] {
            let identity = EnvelopeIdentity { suite, ..identity() };
            let wrapped = wrap(&provider, &OsRandom, &root, 4, &identity, &key).unwrap();
            assert_eq!(wrapped.len(), WRAPPED_BYTES);
            let open = |root: &SecretKey, version, identity: &EnvelopeIdentity, wrapped: &[u8]| {
                unwrap(&provider, root, version, identity, wrapped)
                    .unwrap()
                    .map(|key| *key.expose())
            };
            assert_eq!(open(&root, 4, &identity, &wrapped), Some([9; 32]));
            let other = if suite == Suite::Aes256Gcm { Suite::Sm4Gcm } else { Suite::Aes256Gcm };
            for wrong in [
                EnvelopeIdentity { store: StoreId::from_bytes([8; 16]), ..identity },
                EnvelopeIdentity { logstore: LogstoreId::from_bytes([8; 16]), ..identity },
                EnvelopeIdentity { version: 4, ..identity },
                EnvelopeIdentity { suite: other, ..identity },
            ] {
                assert_eq!(open(&root, 4, &wrong, &wrapped), None, "{wrong:?}");
            }
            assert_eq!(open(&root, 5, &identity, &wrapped), None);
            assert_eq!(open(&SecretKey::from_bytes(&mut [8; 32]), 4, &identity, &wrapped), None);
            for byte in 0..wrapped.len() {
                let mut damaged = wrapped.clone();
                damaged[byte] ^= 1;
                assert_eq!(open(&root, 4, &identity, &damaged), None, "byte {byte}");
                assert_eq!(open(&root, 4, &identity, &wrapped[..byte]), None, "cut at {byte}");
            }
        }
    }

    #[test]
    fn no_two_envelopes_are_alike() {
        let provider = RustCrypto::new();
        let root = SecretKey::from_bytes(&mut [7; 32]);
        let key = SecretKey::from_bytes(&mut [9; 32]);
        let make = || wrap(&provider, &OsRandom, &root, 1, &identity(), &key).unwrap();
        assert_ne!(make(), make());
    }

    /// Computed independently with Python's `hmac`, after RFC 5869.
    #[test]
    fn golden() {
        let key = SecretKey::from_bytes(&mut std::array::from_fn(|n| n as u8));
        assert_eq!(fingerprint(&key), "ee58b9e738c395cc5a959214bb8b5caa");
        assert_eq!(
            hex_encode(metadata_key(&key).expose()),
            "dcc5807dfa5049aff1cdbcca7e2e18e36e2f3bf83ddced1c7eeefca749504ed8"
        );
    }
}
