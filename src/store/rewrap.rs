//! Wrapping the data keys of many Logstores again, one after the other, in a run that can be interrupted and continued.

use std::collections::{BTreeMap, BTreeSet};

use super::{FoundProbe, KmsOrEngine, Store, StoreShared};
use crate::{
    Error, Result,
    config::LogstoreName,
    crypto::SecretKey,
    ids::LogstoreId,
    keys::{
        AuditEvent,
        envelope::{KeysSection, fingerprint},
        lease::Probe,
    },
    kms::{BoundedKms, Cmk, KmsError},
    logstore::KeyObserver as _,
    sync::{lock, read},
};

/// A run that was interrupted longer ago than this is not continued, in microseconds: the master key may have been rotated since.
const CONTINUED_WITHIN_US: u64 = 86_400_000_000;

/// Which Logstores [`Store::rewrap_all`] goes through, and how.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RewrapOptions {
    /// Only those under a customer master key with this `cmk_key_id`; `None` is all, those under the service key included.
    pub cmk_key_id: Option<String>,
    /// And only those whose master key is in this region.
    pub region_id: Option<String>,
    /// Begins anew, also where an interrupted run could be continued.
    pub restart: bool,
}

impl RewrapOptions {
    /// Those under one master key, in whatever region.
    pub fn master_key(cmk_key_id: impl Into<String>) -> Self {
        Self { cmk_key_id: Some(cmk_key_id.into()), ..Self::default() }
    }

    fn includes(&self, cmk: Option<&Cmk>) -> bool {
        let id = self.cmk_key_id.as_ref().is_none_or(|id| cmk.is_some_and(|cmk| cmk.cmk_key_id == *id));
        id && self.region_id.as_ref().is_none_or(|region| cmk.is_some_and(|cmk| cmk.region_id == *region))
    }

    /// What the run is called in the audit log.
    fn scope(&self) -> String {
        let mut scope = match &self.cmk_key_id {
            Some(id) => format!("master key {id}"),
            None => "every key".to_owned(),
        };
        if let Some(region) = &self.region_id {
            scope = format!("{scope} in {region}");
        }
        scope
    }
}

/// How far [`Store::rewrap_all`] is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RewrapProgress {
    /// Logstores that are done.
    pub done: usize,
    /// Logstores there are.
    pub total: usize,
    /// The one that is next; `None` at the end.
    pub logstore: Option<LogstoreName>,
}

/// What [`Store::rewrap_all`] did.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RewrapReport {
    /// Logstores whose data keys were wrapped again, and how many each had.
    pub rewrapped: Vec<(LogstoreName, u32)>,
    /// Logstores that needed nothing: their envelopes are under the newest version already, or the run that this one continues has
    /// done them.
    pub current: Vec<LogstoreName>,
    /// Logstores, and master keys whose probe, could not be wrapped again, and why. They are as they were.
    pub failed: Vec<(String, Error)>,
    /// When the run began that this one continues, in microseconds since the Unix epoch.
    pub continues_us: Option<u64>,
}

/// An interrupted run, as the audit log tells of it.
#[derive(Default)]
struct Earlier {
    began_us: Option<u64>,
    done: BTreeSet<LogstoreId>,
}

impl Store {
    /// Wraps the data keys of many Logstores again, under the newest service key and the current versions of their master keys, and
    /// with them the probes that renew the leases. No data is rewritten, and reads and writes go on. What fails for one Logstore does
    /// not keep it from the others.
    ///
    /// A Logstore is passed over when all its envelopes are under the newest version already, as far as the KMS lets that be seen.
    /// A run that was killed, or in which something failed, is continued by the next one of the same scope within a day: what it has
    /// done is passed over, as the audit log tells.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Closed`], and what keeps the beginning or the end from being recorded. What concerns one
    /// Logstore is in the report.
    pub fn rewrap_all(
        &self,
        options: &RewrapOptions,
        progress: &mut dyn FnMut(&RewrapProgress),
    ) -> Result<RewrapReport> {
        let shared = &self.shared;
        shared.check_writable()?;
        let scope = options.scope();
        let earlier = if options.restart { Earlier::default() } else { shared.interrupted_run(&scope) };
        if earlier.began_us.is_none() {
            shared.audit.record(AuditEvent::RewrapBegun, None, &*scope)?;
        }
        let mut report = RewrapReport { continues_us: earlier.began_us, ..RewrapReport::default() };
        let mut versions: BTreeMap<Cmk, Option<String>> = BTreeMap::new();
        let names = self.list()?;
        let total = names.len();
        for (done, name) in names.into_iter().enumerate() {
            progress(&RewrapProgress { done, total, logstore: Some(name.clone()) });
            let logstore = match shared.logstore(&name) {
                Ok(logstore) => logstore,
                // Deleted meanwhile.
                Err(Error::LogstoreMissing(_)) => continue,
                Err(error) => {
                    report.failed.push((name.to_string(), error));
                    continue;
                }
            };
            let Some(section) = logstore.keys_section() else { continue };
            if !options.includes(section.cmk.as_ref()) {
                continue;
            }
            let newest = match &section.cmk {
                None => None,
                Some(cmk) => match versions.get(cmk) {
                    Some(version) => version.clone(),
                    None => {
                        let version = shared.rewrap_probe(cmk).unwrap_or_else(|error| {
                            let error = error.refusing(&name, cmk);
                            report.failed.push((format!("the probe of master key {}", cmk.cmk_key_id), error));
                            None
                        });
                        versions.insert(cmk.clone(), version.clone());
                        version
                    }
                },
            };
            if earlier.done.contains(&logstore.id) || shared.is_current(&section, newest.as_deref()) {
                report.current.push(name);
                continue;
            }
            match self.rewrap(&name) {
                Ok(envelopes) => report.rewrapped.push((name, envelopes)),
                Err(Error::LogstoreMissing(_)) => {}
                Err(error) => report.failed.push((name.to_string(), error)),
            }
        }
        progress(&RewrapProgress { done: total, total, logstore: None });
        if report.failed.is_empty() {
            shared.audit.record(AuditEvent::RewrapEnded, None, scope)?;
        }
        Ok(report)
    }
}

impl StoreShared {
    /// The last run of this scope, if it began not long ago and has not ended. A log that cannot be trusted tells of none.
    fn interrupted_run(&self, scope: &str) -> Earlier {
        let mut run = Earlier::default();
        let known = self.catalogue.now().audit.clone();
        for record in self.audit.verified(&[&known]).unwrap_or_default() {
            match (record.event, record.logstore_id) {
                (AuditEvent::RewrapBegun, _) if record.detail == scope => {
                    run = Earlier { began_us: Some(record.time_us), done: BTreeSet::new() };
                }
                (AuditEvent::RewrapEnded, _) if record.detail == scope => run = Earlier::default(),
                (AuditEvent::Rewrapped | AuditEvent::Replaced, Some(id)) if run.began_us.is_some() => {
                    run.done.insert(id);
                }
                _ => {}
            }
        }
        let now_us = self.clock.wall_us();
        match run.began_us {
            Some(began_us) if now_us.abs_diff(began_us) <= CONTINUED_WITHIN_US => run,
            _ => Earlier::default(),
        }
    }

    /// Whether every envelope is under the newest service key, or under the version of the master key that is known to be current.
    pub(super) fn is_current(&self, section: &KeysSection, newest_cmk: Option<&str>) -> bool {
        let newest = read(&self.keyring).newest();
        section.envelopes().all(|(version, _)| match (&section.cmk, newest_cmk) {
            (None, _) => version.keyring_version == Some(newest),
            (Some(_), None) => false,
            (Some(cmk), Some(current)) => self.envelope_version(cmk, version).as_deref() == Some(current),
        })
    }

    /// Wraps the probe of a master key again, or makes it. Returns the version of the master key that wraps now, where the KMS tells.
    fn rewrap_probe(&self, cmk: &Cmk) -> std::result::Result<Option<String>, KmsOrEngine> {
        let kms = self.serving(cmk)?;
        let path = self.probe_path(self.probe_id(kms.name(), cmk));
        let found = match self.read_probe(&path) {
            Err(error) if error.is_not_found() => None,
            found => Some(found?),
        };
        let (secret, generation) = match &found {
            Some(found) => {
                let secret = kms.unwrap(cmk, self.probe_context(), &found.wrapped).map_err(KmsOrEngine::Kms)?;
                if fingerprint(&secret) != found.fingerprint {
                    return Err(wrong("it unwrapped the probe to another key"));
                }
                (secret, found.generation.saturating_add(1))
            }
            None => {
                let drawn = SecretKey::generate(&*self.random);
                (drawn.map_err(Error::io("draw a random key for", &path))?, 1)
            }
        };
        let wrapped = self.wrap_proved(kms, cmk, self.probe_context(), &secret)?;
        let version = self.cmk_version(cmk, &wrapped);
        if let Some(found) = &found
            && version.is_some()
            && self.cmk_version(cmk, &found.wrapped) == version
        {
            return Ok(version);
        }
        let fingerprint = fingerprint(&secret);
        // Else a rotation of the service key, which writes the probes too, would put the one that it has read in the place of this one.
        let _one_at_a_time = self.administer()?;
        let probe = Probe { wrapped: wrapped.clone(), context: self.probe_context(), fingerprint: fingerprint.clone() };
        self.write_probe(FoundProbe {
            kms: kms.name().to_owned(),
            cmk: cmk.clone(),
            wrapped,
            fingerprint,
            generation,
        })?;
        if let Some(lease) = lock(&self.leases).get(cmk) {
            lease.set_probe(probe);
        }
        Ok(version)
    }

    /// Wraps at the KMS, and proves that what comes back unwraps to the same key: an envelope that does not is worth nothing.
    pub(super) fn wrap_proved(
        &self,
        kms: &BoundedKms,
        cmk: &Cmk,
        context: crate::kms::EncryptionContext,
        key: &SecretKey,
    ) -> std::result::Result<Vec<u8>, KmsOrEngine> {
        let wrapped = kms.wrap(cmk, context.clone(), key).map_err(KmsOrEngine::Kms)?;
        let unwrapped = kms.unwrap(cmk, context, &wrapped).map_err(KmsOrEngine::Kms)?;
        if fingerprint(&unwrapped) != fingerprint(key) {
            return Err(wrong("it does not unwrap what it wrapped"));
        }
        Ok(wrapped)
    }
}

fn wrong(detail: &str) -> KmsOrEngine {
    KmsOrEngine::Kms(KmsError::Invalid { detail: detail.to_owned() })
}
