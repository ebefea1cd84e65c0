//! Operations on keys: rotation, re-wrapping, replacing a master key, shredding. The intent is on record before anything changes.

use std::sync::Arc;

use super::{AdminState, Store, StoreShared};
use crate::{
    Error, Result,
    config::{ConfigError, EncryptConf, LogstoreName, check_cmk},
    keys::{
        AuditEvent,
        envelope::{DATA_KEYS_MAX, DataKeyVersion, KeysSection},
    },
    kms::Cmk,
    logstore::{LogstoreShared, Meta},
    sync::{lock, read, write},
};

/// How [`Store::replace_cmk`] goes about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReplaceCmk {
    /// Whether what is written from now on gets a fresh data key, as it does by default.
    pub fresh_data_key: bool,
}

impl Default for ReplaceCmk {
    fn default() -> Self {
        Self { fresh_data_key: true }
    }
}

impl ReplaceCmk {
    /// Keeps the current data key for what is written from now on.
    pub fn keep_data_key() -> Self {
        Self { fresh_data_key: false }
    }
}

impl Store {
    /// Makes a new data-key version for what is written from now on. What is written stays under its version. Returns the new one.
    ///
    /// # Errors
    /// [`ConfigError::NotEncrypted`]; the errors of the KMS.
    pub fn rotate_data_key(&self, name: &LogstoreName) -> Result<u32> {
        self.shared.change_keys(name, &KeyChange::ROTATE, |shared, logstore, section| {
            shared.admit(logstore)?;
            shared.add_version(logstore, section)
        })
    }

    /// Wraps every data-key version of a Logstore anew: under the newest service key, or under the current version of its master
    /// key. No data is rewritten. Returns how many envelopes there are.
    ///
    /// # Errors
    /// [`ConfigError::NotEncrypted`]; the errors of the KMS. Nothing has changed then.
    pub fn rewrap(&self, name: &LogstoreName) -> Result<u32> {
        self.shared.change_keys(name, &KeyChange::REWRAP, |shared, logstore, section| {
            let cmk = section.cmk.clone();
            shared.rewrap_all(logstore, section, cmk)
        })
    }

    /// Replaces the customer master key of a Logstore by another: every data key is unwrapped under the old one and wrapped under the
    /// new one, and what is written from now on gets a fresh data key unless `how` says otherwise. Returns the number of envelopes.
    ///
    /// It cannot undo a leak: whoever held the old master key and has a copy of an old envelope can still read the old data.
    ///
    /// # Errors
    /// [`ConfigError::NotByok`]; [`Error::Revoked`] when the old master key cannot be used; [`ConfigError::NoKmsForRegion`] and
    /// [`ConfigError::CmkRefused`] for the new one. Nothing has changed then.
    pub fn replace_cmk(&self, name: &LogstoreName, new: Cmk, how: ReplaceCmk) -> Result<u32> {
        check_cmk(&new)?;
        self.shared.change_keys(name, &KeyChange::REPLACE, |shared, logstore, section| {
            if section.cmk.is_none() {
                return Err(ConfigError::NotByok.into());
            }
            let count = shared.rewrap_all(logstore, section, Some(new))?;
            if how.fresh_data_key {
                shared.add_version(logstore, section)?;
                return Ok(count + 1);
            }
            Ok(count)
        })
    }

    /// Destroys data-key versions: what they sealed cannot be read through this store any more. Neither the current version nor one
    /// that is being written can go: rotate first. Copies of the metadata made earlier (backups, snapshots, freed blocks of the
    /// disk) are beyond its reach; under a customer master key, deleting that key reaches them too.
    ///
    /// # Errors
    /// [`ConfigError::CannotShred`], [`ConfigError::NotEncrypted`]; the errors of the KMS (the metadata's second tag is made with the
    /// data key).
    pub fn shred_data_keys(&self, name: &LogstoreName, versions: &[u32]) -> Result<()> {
        let shred = |_: &StoreShared, _: &LogstoreShared, section: &mut KeysSection| {
            for &version in versions {
                let refuse = |why| Err(ConfigError::CannotShred { version, why }.into());
                if version == section.current {
                    return refuse("it is the current one: rotate the data key first");
                }
                match section.versions.iter_mut().find(|entry| entry.version == version) {
                    Some(entry) => entry.wrapped = None,
                    None => return refuse("there is no such version"),
                }
            }
            Ok(versions.len() as u32)
        };
        self.shared.change_keys(name, &KeyChange::shred(versions, ""), shred).map(|_| ())
    }

    /// Puts the service keyring under another master key, or with `None` under none. Its roots stay the same, so nothing else is
    /// written anew; to be done with the old ones, [`Store::rotate_service_key`] too.
    ///
    /// It cannot undo a leak: whoever has a copy of the old file, and may use what that was under, has the roots.
    ///
    /// # Errors
    /// [`ConfigError::NoKmsForRegion`]; [`Error::ServiceKey`] when the new master key cannot be used. Nothing has changed then.
    pub fn rewrap_keyring(&self, cmk: Option<Cmk>) -> Result<()> {
        cmk.as_ref().map_or(Ok(()), check_cmk)?;
        let shared = &self.shared;
        let _one_at_a_time = shared.administer()?;
        let detail =
            cmk.as_ref().map_or_else(|| "no master key".to_owned(), |cmk| format!("master key {}", cmk.cmk_key_id));
        shared.audit.record(AuditEvent::KeyringRewrapIntended, None, detail.clone())?;
        let rewrapped = read(&shared.keyring).rewrap(&*shared.random, cmk)?;
        *write(&shared.keyring) = rewrapped;
        shared.audit.record(AuditEvent::KeyringRewrapped, None, detail)
    }
}

/// How a change of keys is put on record.
pub(super) struct KeyChange {
    intent: AuditEvent,
    done: AuditEvent,
    /// What it is about; where there is nothing to say, the outcome is.
    about: String,
}

impl KeyChange {
    const ROTATE: Self = Self::new(AuditEvent::RotateIntended, AuditEvent::Rotated);
    const REWRAP: Self = Self::new(AuditEvent::RotateIntended, AuditEvent::Rewrapped);
    const REPLACE: Self = Self::new(AuditEvent::ReplaceIntended, AuditEvent::Replaced);

    const fn new(intent: AuditEvent, done: AuditEvent) -> Self {
        Self { intent, done, about: String::new() }
    }

    /// A new data key, since the service key is rotated.
    pub(super) fn rotate_with_service_key() -> Self {
        Self { about: "with the service key".to_owned(), ..Self::ROTATE }
    }

    pub(super) fn rotate_by_policy(why: &str) -> Self {
        Self { about: format!("by policy: {why}"), ..Self::ROTATE }
    }

    pub(super) fn shred(versions: &[u32], why: &str) -> Self {
        let numbers: Vec<_> = versions.iter().map(u32::to_string).collect();
        let about = format!("data-key version {}{why}", numbers.join(", "));
        Self { about, ..Self::new(AuditEvent::ShredIntended, AuditEvent::Shredded) }
    }
}

impl StoreShared {
    /// Changes the keys of a Logstore by `change`, whole or not at all.
    fn change_keys(
        &self,
        name: &LogstoreName,
        how: &KeyChange,
        change: impl FnOnce(&Self, &LogstoreShared, &mut KeysSection) -> Result<u32>,
    ) -> Result<u32> {
        let mut admin = self.administer()?;
        let logstore = self.logstore_locked(&mut admin, name)?;
        self.change_keys_locked(&mut admin, &logstore, how, change)
    }

    pub(super) fn change_keys_locked(
        &self,
        admin: &mut AdminState,
        logstore: &Arc<LogstoreShared>,
        how: &KeyChange,
        change: impl FnOnce(&Self, &LogstoreShared, &mut KeysSection) -> Result<u32>,
    ) -> Result<u32> {
        let mut meta = lock(&logstore.meta).clone();
        let mut section = meta.keys.clone().ok_or(ConfigError::NotEncrypted)?;
        self.audit.record(how.intent, Some((&logstore.name, logstore.id)), &*how.about)?;
        let result = change(self, logstore, &mut section)?;
        let data_key = match &section.cmk {
            // The second tag is made with the current data key, over what the one before has proved.
            Some(_) => {
                logstore.gate.prove()?;
                Some(self.unwrap_in(logstore, &section)?)
            }
            None => None,
        };
        self.follow(&mut meta, &section);
        meta.keys = Some(section);
        self.replace_meta(admin, logstore, meta, data_key.as_ref())?;
        let outcome = match (how.done, how.about.is_empty()) {
            (_, true) => result.to_string(),
            (AuditEvent::Rotated, false) => format!("{result}, {}", how.about),
            (_, false) => how.about.clone(),
        };
        self.audit.record(how.done, Some((&logstore.name, logstore.id)), outcome)?;
        Ok(result)
    }

    /// The configuration names the master key too.
    fn follow(&self, meta: &mut Meta, section: &KeysSection) {
        if let Some(conf) = &mut meta.config.encrypt_conf {
            *conf = EncryptConf { user_cmk_info: section.cmk.clone(), ..conf.clone() };
        }
    }

    pub(super) fn admit(&self, logstore: &LogstoreShared) -> Result<()> {
        logstore.gate.admit().map(|_| ())
    }

    pub(super) fn add_version(&self, logstore: &LogstoreShared, section: &mut KeysSection) -> Result<u32> {
        if section.versions.len() >= DATA_KEYS_MAX {
            return Err(Error::TooMany { what: "data-key versions", limit: DATA_KEYS_MAX as u64 });
        }
        let version = section.versions.iter().map(|entry| entry.version).max().unwrap_or(0) + 1;
        // Where it begins is found out when the shards stand still.
        self.new_data_key(section, logstore.id, version, Vec::new())?;
        Ok(version)
    }

    /// Wraps every version that is left under `cmk`, or under the service key.
    pub(super) fn rewrap_all(
        &self,
        logstore: &LogstoreShared,
        section: &mut KeysSection,
        cmk: Option<Cmk>,
    ) -> Result<u32> {
        self.admit(logstore)?;
        section.cmk = cmk;
        let mut count = 0;
        for index in 0..section.versions.len() {
            let Some(entry) = section.versions.get(index).filter(|entry| entry.wrapped.is_some()).cloned() else {
                continue;
            };
            let key = logstore.gate.unwrap(entry.version)?;
            let (keyring_version, wrapped) = self.wrap_data_key(section, logstore.id, entry.version, &key)?;
            if let Some(place) = section.versions.get_mut(index) {
                let (wrapped, wrapped_us) = (Some(wrapped), Some(self.clock.wall_us()));
                *place = DataKeyVersion { keyring_version, wrapped, wrapped_us, ..entry };
                count += 1;
            }
        }
        Ok(count)
    }

    /// The current data key of a section that is not in place yet.
    fn unwrap_in(&self, logstore: &LogstoreShared, section: &KeysSection) -> Result<crate::crypto::SecretKey> {
        let keys = self.gate_keys(Some(section), logstore.id)?;
        let context = Arc::clone(logstore.gate.context());
        let gate = crate::keys::gate::Gate::new(context, logstore.name.clone(), logstore.id, keys);
        gate.unwrap(section.current)
    }
}
