//! Changes of the keys of one Logstore: rotation, re-wrap, replacement of the master key,
//! shredding.
//!
//! Each change records its intent in the audit log before it changes anything.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{core::Core, registry::LogstoreAdministration};
use crate::{
    Result,
    config::{ConfigError, EncryptConf, LogstoreName, check_cmk},
    crypto::SecretKey,
    keys::{AuditEvent, envelope::KeysSection},
    kms::Cmk,
    logstore::{LogstoreShared, Meta},
};

/// Options of [`Keys::replace_cmk`](crate::Keys::replace_cmk).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct ReplaceCmk {
    /// Whether new data gets a new data key. On by default.
    pub fresh_data_key: bool,
}

impl Default for ReplaceCmk {
    fn default() -> Self {
        Self { fresh_data_key: true }
    }
}

impl ReplaceCmk {
    setters! {
        fresh_data_key: bool;
    }
}

/// How a change of keys is recorded in the audit log.
pub(super) struct KeyChange {
    intent: AuditEvent,
    done: AuditEvent,
    /// The detail of both records. If empty, the second record has the result of the change.
    about: String,
}

impl KeyChange {
    const ROTATE: Self = Self::new(AuditEvent::RotateIntended, AuditEvent::Rotated);
    const REWRAP: Self = Self::new(AuditEvent::RewrapIntended, AuditEvent::Rewrapped);
    const REPLACE: Self = Self::new(AuditEvent::ReplaceIntended, AuditEvent::Replaced);

    const fn new(intent: AuditEvent, done: AuditEvent) -> Self {
        Self { intent, done, about: String::new() }
    }

    /// A new data key as a part of a rotation of the service key.
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

    /// The detail of the record of the completed change.
    fn outcome(&self, result: u32) -> String {
        match (self.done, self.about.is_empty()) {
            (_, true) => result.to_string(),
            (AuditEvent::Rotated, false) => format!("{result}, {}", self.about),
            (_, false) => self.about.clone(),
        }
    }
}

/// Gives a Logstore a new data-key version. Returns the version.
pub(super) fn rotate(core: &Core, name: &LogstoreName) -> Result<u32> {
    let one = core.registry.administer_logstore(name)?;
    change_keys(core, &one, &one.logstore()?, &KeyChange::ROTATE, |logstore, section| {
        logstore.gate.admit()?;
        ensure_probe(core, name, section.cmk.as_ref())?;
        core.keys.add_version(section, logstore.id)
    })
}

/// Wraps all data-key versions of a Logstore again, under the wrapping key they have. Returns the
/// number of envelopes.
pub(super) fn rewrap(core: &Core, one: &LogstoreAdministration<'_>) -> Result<u32> {
    change_keys(core, one, &one.logstore()?, &KeyChange::REWRAP, |logstore, section| {
        let cmk = section.cmk.clone();
        rewrap_versions(core, logstore, section, cmk)
    })
}

/// Replaces the master key of a Logstore. Returns the number of envelopes.
pub(super) fn replace_cmk(
    core: &Core,
    name: &LogstoreName,
    new: Cmk,
    how: ReplaceCmk,
) -> Result<u32> {
    check_cmk(&new)?;
    let one = core.registry.administer_logstore(name)?;
    change_keys(core, &one, &one.logstore()?, &KeyChange::REPLACE, |logstore, section| {
        if section.cmk.is_none() {
            return Err(ConfigError::NotByok.into());
        }
        let count = rewrap_versions(core, logstore, section, Some(new))?;
        if how.fresh_data_key {
            core.keys.add_version(section, logstore.id)?;
            return Ok(count + 1);
        }
        Ok(count)
    })
}

/// Wraps all data-key versions in a section again: under `cmk`, or under the newest service key.
/// Returns their number.
pub(super) fn rewrap_versions(
    core: &Core,
    logstore: &LogstoreShared,
    section: &mut KeysSection,
    cmk: Option<Cmk>,
) -> Result<u32> {
    logstore.gate.admit()?;
    ensure_probe(core, &logstore.name, cmk.as_ref())?;
    core.keys.rewrap_versions(&logstore.gate, section, cmk)
}

/// Makes the probe of a master key, if it has none. Calls the KMS before it takes the
/// administration.
pub(super) fn ensure_probe(core: &Core, name: &LogstoreName, cmk: Option<&Cmk>) -> Result<()> {
    let Some(cmk) = cmk else { return Ok(()) };
    let new = core.keys.new_probe(cmk).map_err(|error| error.refusing(name, cmk))?;
    let Some(probe) = new else { return Ok(()) };
    let _admin = core.registry.administer()?;
    core.keys.add_probe(probe)
}

/// Destroys data-key versions of a Logstore.
pub(super) fn shred(core: &Core, name: &LogstoreName, versions: &[u32]) -> Result<()> {
    let shred = |_: &LogstoreShared, section: &mut KeysSection| {
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
    let _borrowed = core.env.reserve.borrow();
    let one = core.registry.administer_logstore(name)?;
    change_keys(core, &one, &one.logstore()?, &KeyChange::shred(versions, ""), shred).map(|_| ())
}

/// Puts the service keyring under another master key, or under none. Calls the KMS.
pub(super) fn rewrap_keyring(core: &Core, cmk: Option<Cmk>) -> Result<()> {
    cmk.as_ref().map_or(Ok(()), check_cmk)?;
    let Core { env, keys, registry } = core;
    registry.check_writable()?;
    let change = keys.change_keyring();
    let detail = cmk
        .as_ref()
        .map_or_else(|| "no master key".to_owned(), |cmk| format!("master key {}", cmk.cmk_key_id));
    {
        let _admin = registry.administer()?;
        keys.audit().record(AuditEvent::KeyringRewrapIntended, None, detail.clone())?;
    }
    let rewrapped = change.prepare(|keyring| keyring.rewrap(&*env.random, cmk))?;
    let _admin = registry.administer()?;
    change.put(rewrapped)?;
    keys.audit().record(AuditEvent::KeyringRewrapped, None, detail)
}

/// Changes the keys of a Logstore by `change`, completely or not at all. `change` may call the KMS.
/// The caller got the Logstore from `one`.
pub(super) fn change_keys(
    core: &Core,
    one: &LogstoreAdministration<'_>,
    logstore: &Arc<LogstoreShared>,
    how: &KeyChange,
    change: impl FnOnce(&LogstoreShared, &mut KeysSection) -> Result<u32>,
) -> Result<u32> {
    let mut meta = logstore.meta();
    let mut section = meta.keys.clone().ok_or(ConfigError::NotEncrypted)?;
    one.record_intent(how.intent, logstore, &how.about)?;
    let changed = change(logstore, &mut section)
        .and_then(|result| Ok((result, second_tag_key(core, logstore, &section)?)));
    let (result, data_key) = changed.map_err(|error| core.registry.cause(logstore, error))?;
    follow(&mut meta, &section);
    meta.keys = Some(section);
    one.replace_meta(logstore, meta, data_key.as_ref(), |admin| {
        if how.done == AuditEvent::Shredded {
            // The older metadata has the envelopes. The keys are destroyed once it is gone.
            admin.remove_older_meta(logstore)?;
        }
        admin.record(how.done, logstore, how.outcome(result))
    })?;
    Ok(result)
}

/// The current data key under a customer master key, which makes the second tag.
fn second_tag_key(
    core: &Core,
    logstore: &LogstoreShared,
    section: &KeysSection,
) -> Result<Option<SecretKey>> {
    if section.cmk.is_none() {
        return Ok(None);
    }
    // The section before must be proved first.
    logstore.gate.prove()?;
    core.keys.unwrap_new(&logstore.name, logstore.id, section).map(Some)
}

/// Copies the master key of the section into the configuration, which also names it.
fn follow(meta: &mut Meta, section: &KeysSection) {
    if let Some(conf) = &mut meta.config.encrypt_conf {
        *conf = EncryptConf { user_cmk_info: section.cmk.clone(), ..conf.clone() };
    }
}
