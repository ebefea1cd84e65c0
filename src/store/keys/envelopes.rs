//! Drawing, wrapping and unwrapping data keys.

use super::{KeyService, KmsOrEngine};
use crate::{
    Error, Result,
    config::LogstoreName,
    crypto::SecretKey,
    ids::{LogstoreId, hex_encode},
    keys::{
        envelope::{DATA_KEYS_MAX, DataKeyVersion, EnvelopeIdentity, KeysSection, fingerprint},
        gate::{Gate, GateKeys},
        lease::LeaseScope,
    },
    kms::{BoundedKms, Cmk, EncryptionContext},
    logstore::KeyObserver as _,
};

impl KeyService {
    /// A new data key.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn draw_data_key(&self) -> Result<SecretKey> {
        SecretKey::generate(&*self.env.random)
            .map_err(Error::io("draw a data key for", &self.env.dir))
    }

    /// Adds a new data key to the section as the current version, wrapped. `ordinals` has the
    /// ordinal of its first segment for each shard. Calls the KMS under a customer master key.
    ///
    /// # Errors
    /// The error of the KMS.
    pub(crate) fn add_data_key(
        &self,
        section: &mut KeysSection,
        id: LogstoreId,
        version: u32,
        ordinals: Vec<u64>,
        key: &SecretKey,
    ) -> Result<()> {
        let (keyring_version, wrapped) = self.wrap_data_key(section, id, version, key)?;
        section.versions.push(DataKeyVersion {
            version,
            created_us: self.env.clock.wall_us(),
            ordinals,
            drawn_under: keyring_version,
            wrapped_us: None,
            keyring_version,
            wrapped: Some(wrapped),
            fingerprint: fingerprint(key),
        });
        section.current = version;
        Ok(())
    }

    /// Adds a new current data-key version to the section of an existing Logstore. Its ordinals
    /// stay empty until the shards are paused. Returns the version.
    ///
    /// # Errors
    /// [`Error::TooMany`], and as [`KeyService::add_data_key`].
    pub(crate) fn add_version(&self, section: &mut KeysSection, id: LogstoreId) -> Result<u32> {
        if section.versions.len() >= DATA_KEYS_MAX {
            return Err(Error::TooMany { what: "data-key versions", limit: DATA_KEYS_MAX as u64 });
        }
        let version = section.versions.iter().map(|entry| entry.version).max().unwrap_or(0) + 1;
        let key = self.draw_data_key()?;
        self.add_data_key(section, id, version, Vec::new(), &key)?;
        Ok(version)
    }

    /// Wraps the first data key of a Logstore again, if the service key was rotated since it was
    /// wrapped: the rotation did not see this envelope, which is in no file yet. Does nothing under
    /// a customer master key. The caller holds the administration.
    ///
    /// # Errors
    /// The error of the wrapping.
    pub(crate) fn renew_first_envelope(
        &self,
        section: &mut KeysSection,
        id: LogstoreId,
        key: &SecretKey,
    ) -> Result<()> {
        let (newest, version) = (self.keyring().newest(), section.current);
        let is_older = |entry: &DataKeyVersion| {
            entry.version == version && entry.keyring_version.is_some_and(|under| under < newest)
        };
        let Some(at) = section.versions.iter().position(is_older) else { return Ok(()) };
        let (under, wrapped) = self.wrap_data_key(section, id, version, key)?;
        if let Some(entry) = section.versions.get_mut(at) {
            (entry.drawn_under, entry.keyring_version) = (under, under);
            entry.wrapped = Some(wrapped);
        }
        Ok(())
    }

    /// Wraps all remaining versions of one Logstore again: under `cmk`, or under the newest
    /// service key. `gate`, which the caller has asked, unwraps them. Returns their number.
    ///
    /// # Errors
    /// The error of the KMS.
    pub(crate) fn rewrap_versions(
        &self,
        gate: &Gate,
        section: &mut KeysSection,
        cmk: Option<Cmk>,
    ) -> Result<u32> {
        section.cmk = cmk;
        let mut count = 0;
        for index in 0..section.versions.len() {
            let Some(entry) =
                section.versions.get(index).filter(|entry| entry.wrapped.is_some()).cloned()
            else {
                continue;
            };
            let key = gate.unwrap(entry.version)?;
            let (keyring_version, wrapped) =
                self.wrap_data_key(section, gate.id(), entry.version, &key)?;
            if let Some(place) = section.versions.get_mut(index) {
                let (wrapped, wrapped_us) = (Some(wrapped), Some(self.env.clock.wall_us()));
                *place = DataKeyVersion { keyring_version, wrapped, wrapped_us, ..entry };
                count += 1;
            }
        }
        Ok(count)
    }

    /// Wraps a data key under the master key that the section names, or under the newest service
    /// key. Returns the version of that service key with the envelope.
    fn wrap_data_key(
        &self,
        section: &KeysSection,
        id: LogstoreId,
        version: u32,
        key: &SecretKey,
    ) -> Result<(Option<u32>, String)> {
        let suite = section.encrypt_type.suite();
        let identity = EnvelopeIdentity { store: self.env.id, logstore: id, version, suite };
        let (keyring_version, wrapped) = match &section.cmk {
            None => {
                let (provider, random) = (&*self.env.provider, &*self.env.random);
                let (version, wrapped) = self.keyring().wrap(provider, random, &identity, key)?;
                (Some(version), wrapped)
            }
            Some(cmk) => {
                let kms = &self.serving(cmk)?;
                let wrapped = self.wrap_proved(kms, cmk, identity.context(), key);
                (None, wrapped.map_err(|error| error.refusing(&section.name, cmk))?)
            }
        };
        Ok((keyring_version, hex_encode(&wrapped)))
    }

    /// Wraps a key at the KMS, and proves that the envelope unwraps to the same key. An envelope
    /// that does not would lose the data.
    pub(super) fn wrap_proved(
        &self,
        kms: &BoundedKms,
        cmk: &Cmk,
        context: EncryptionContext,
        key: &SecretKey,
    ) -> std::result::Result<Vec<u8>, KmsOrEngine> {
        let wrapped = kms.wrap(cmk, context.clone(), key).map_err(KmsOrEngine::Kms)?;
        let unwrapped = kms.unwrap(cmk, context, &wrapped).map_err(KmsOrEngine::Kms)?;
        if fingerprint(&unwrapped) != fingerprint(key) {
            return Err(KmsOrEngine::invalid("it does not unwrap what it wrapped"));
        }
        Ok(wrapped)
    }

    /// The current data key of a section that is not in force yet. Calls the KMS under a customer
    /// master key.
    ///
    /// # Errors
    /// The error of the KMS.
    pub(crate) fn unwrap_new(
        &self,
        name: &LogstoreName,
        id: LogstoreId,
        section: &KeysSection,
    ) -> Result<SecretKey> {
        let keys = self.gate_keys(Some(section), id)?;
        self.new_gate(name, id, keys).unwrap(section.current)
    }

    /// The current data key of a section in a store whose keyring is lost. Uses a lease of its own,
    /// because the lost keyring has authenticated the probes.
    ///
    /// # Errors
    /// The error of the KMS.
    pub(crate) fn unwrap_without_keyring(
        &self,
        section: &KeysSection,
        cmk: &Cmk,
        id: LogstoreId,
    ) -> Result<SecretKey> {
        let lease = self.new_lease(cmk, self.envelope_probe(section, id)?, LeaseScope::MasterKey);
        let keys = GateKeys {
            section: Some(section.clone().into()),
            lease: Some(lease),
            ..GateKeys::default()
        };
        self.new_gate(&section.name, id, keys).unwrap(section.current)
    }

    /// Whether all envelopes of a section are under the newest service key, or under
    /// `newest_cmk`, the version of the master key that is known to be the current one.
    pub(crate) fn is_current(&self, section: &KeysSection, newest_cmk: Option<&str>) -> bool {
        let newest = self.keyring().newest();
        section.envelopes().all(|(version, _)| match (&section.cmk, newest_cmk) {
            (None, _) => version.keyring_version == Some(newest),
            (Some(_), None) => false,
            (Some(cmk), Some(current)) => {
                self.envelope_version(cmk, version).as_deref() == Some(current)
            }
        })
    }

    /// The version of a master key that made an envelope, if the KMS reports it.
    pub(super) fn cmk_version(&self, cmk: &Cmk, wrapped: &[u8]) -> Option<String> {
        self.kms.serving(&cmk.region_id).ok()?.cmk_version(wrapped)
    }
}
