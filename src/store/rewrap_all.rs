//! Wrapping the data keys of many Logstores again, in a run that can be interrupted and continued.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize, Serializer};

use super::{
    core::Core,
    key_change,
    keys::{KeyService, KmsOrEngine},
    registry::Registry,
};
use crate::{
    Error, Result,
    config::LogstoreName,
    ids::LogstoreId,
    io::DAY_US,
    keys::{AuditEvent, AuditRecord},
    kms::Cmk,
    logstore::LogstoreShared,
};

/// The Logstores of [`Keys::rewrap_all`](crate::Keys::rewrap_all).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct RewrapOptions {
    /// Only Logstores under a customer master key with this `cmk_key_id`. `None` includes all
    /// Logstores, also those under the service key.
    pub cmk_key_id: Option<String>,
    /// Only Logstores whose master key is in this region.
    pub region_id: Option<String>,
    /// Starts from the beginning, even if an interrupted run could be continued.
    pub restart: bool,
}

impl RewrapOptions {
    setters! {
        cmk_key_id: String, optional;
        region_id: String, optional;
        restart: bool;
    }

    fn includes(&self, cmk: Option<&Cmk>) -> bool {
        let id =
            self.cmk_key_id.as_ref().is_none_or(|id| cmk.is_some_and(|cmk| cmk.cmk_key_id == *id));
        id && self
            .region_id
            .as_ref()
            .is_none_or(|region| cmk.is_some_and(|cmk| cmk.region_id == *region))
    }

    /// The name of the run in the audit log.
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

/// The progress of [`Keys::rewrap_all`](crate::Keys::rewrap_all).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RewrapProgress {
    /// The number of Logstores that are done.
    pub done: usize,
    /// The number of all Logstores.
    pub total: usize,
    /// The next Logstore; `None` at the end.
    pub logstore: Option<LogstoreName>,
}

/// The result of [`Keys::rewrap_all`](crate::Keys::rewrap_all).
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct RewrapReport {
    /// The Logstores whose data keys were wrapped again, each with its number of envelopes. As JSON
    /// each has the fields `logstore` and `envelopes`.
    #[serde(serialize_with = "rewrapped")]
    pub rewrapped: Vec<(LogstoreName, u32)>,
    /// The Logstores that needed no re-wrap: their envelopes are under the newest version already,
    /// or the interrupted run has wrapped them.
    pub current: Vec<LogstoreName>,
    /// The Logstores, and the master keys with their probes, that could not be wrapped again, each
    /// with the error. They are unchanged. As JSON each has the fields `what`, `code`, `kind` and
    /// `message`.
    #[serde(serialize_with = "failed")]
    pub failed: Vec<(String, Error)>,
    /// When the interrupted run began that this run continues, in microseconds since the Unix
    /// epoch.
    pub continues_us: Option<u64>,
}

fn rewrapped<S: Serializer>(
    all: &[(LogstoreName, u32)],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Rewrapped<'a> {
        logstore: &'a LogstoreName,
        envelopes: u32,
    }
    serializer.collect_seq(
        all.iter().map(|(logstore, envelopes)| Rewrapped { logstore, envelopes: *envelopes }),
    )
}

fn failed<S: Serializer>(
    all: &[(String, Error)],
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct Failed<'a> {
        what: &'a str,
        #[serde(flatten)]
        error: &'a Error,
    }
    serializer.collect_seq(all.iter().map(|(what, error)| Failed { what, error }))
}

/// An interrupted run, as found in the audit log.
#[derive(Default)]
struct Earlier {
    began_us: Option<u64>,
    done: BTreeSet<LogstoreId>,
}

impl Earlier {
    /// The last run of a scope, if it has not ended and began not long ago.
    fn find(records: Vec<AuditRecord>, scope: &str, now_us: u64) -> Self {
        let mut run = Self::default();
        for record in records {
            match (record.event, record.logstore_id) {
                (AuditEvent::RewrapBegun, _) if record.detail == scope => {
                    run = Self { began_us: Some(record.time_us), done: BTreeSet::new() };
                }
                (AuditEvent::RewrapEnded, _) if record.detail == scope => run = Self::default(),
                (AuditEvent::Rewrapped | AuditEvent::Replaced, Some(id))
                    if run.began_us.is_some() =>
                {
                    run.done.insert(id);
                }
                _ => {}
            }
        }
        match run.began_us {
            // An older run is not continued: the master key may have been rotated since.
            Some(began_us) if now_us.abs_diff(began_us) <= DAY_US => run,
            _ => Self::default(),
        }
    }
}

/// A run under way.
struct Run<'a> {
    core: &'a Core,
    options: &'a RewrapOptions,
    earlier: Earlier,
    /// The current version of each master key, if the KMS reports it.
    versions: BTreeMap<Cmk, Option<String>>,
    report: RewrapReport,
}

/// Whether the run waits for another operation on a Logstore.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Busy {
    Wait,
    /// The run continues with the other Logstores first.
    Later,
}

impl Run<'_> {
    /// Wraps the data keys of a Logstore again if it needs that. Returns `false` if the run has to
    /// come back later.
    fn logstore(&mut self, name: &LogstoreName, busy: Busy) -> bool {
        match self.rewrap(name, busy) {
            Ok(done) => done,
            // It was deleted since the run began.
            Err(Error::LogstoreMissing(_)) => true,
            Err(error) => {
                self.report.failed.push((name.to_string(), error));
                true
            }
        }
    }

    /// Whether the run is about a Logstore.
    fn includes(&self, logstore: &LogstoreShared) -> bool {
        let section = logstore.keys_section();
        section.is_some_and(|section| self.options.includes(section.cmk.as_ref()))
    }

    fn rewrap(&mut self, name: &LogstoreName, busy: Busy) -> Result<bool> {
        let registry = &self.core.registry;
        if !self.includes(&*registry.logstore(name)?) {
            return Ok(true);
        }
        let one = match busy {
            Busy::Wait => registry.administer_logstore(name)?,
            Busy::Later => match registry.try_administer_logstore(name)? {
                Some(one) => one,
                None => return Ok(false),
            },
        };
        let logstore = one.logstore()?;
        let Some(section) = logstore.keys_section().filter(|_| self.includes(&logstore)) else {
            return Ok(true);
        };
        let newest = section.cmk.as_ref().and_then(|cmk| self.newest_version(name, cmk));
        if self.earlier.done.contains(&logstore.id)
            || self.core.keys.is_current(&section, newest.as_deref())
        {
            self.report.current.push(name.clone());
            return Ok(true);
        }
        let envelopes = key_change::rewrap(self.core, &one)?;
        self.report.rewrapped.push((name.clone(), envelopes));
        Ok(true)
    }

    /// Wraps the probe of a master key again, once in a run. Returns the version of the master key
    /// that wraps now, if the KMS reports it.
    fn newest_version(&mut self, name: &LogstoreName, cmk: &Cmk) -> Option<String> {
        if let Some(version) = self.versions.get(cmk) {
            return version.clone();
        }
        let version =
            rewrap_probe(&self.core.keys, &self.core.registry, cmk).unwrap_or_else(|error| {
                let error = error.refusing(name, cmk);
                self.report
                    .failed
                    .push((format!("the probe of master key {}", cmk.cmk_key_id), error));
                None
            });
        self.versions.insert(cmk.clone(), version.clone());
        version
    }
}

/// Wraps the data keys of many Logstores again, and the probes of their master keys. Comes back at
/// the end to a Logstore that another operation changes, and waits for that operation then.
pub(super) fn rewrap_all(
    core: &Core,
    options: &RewrapOptions,
    progress: &mut dyn FnMut(&RewrapProgress),
) -> Result<RewrapReport> {
    let Core { env, keys, registry } = core;
    registry.check_writable()?;
    let scope = options.scope();
    let earlier = match options.restart {
        true => Earlier::default(),
        // An audit log that fails verification has no run to continue.
        false => {
            let known = registry.catalogue().audit.clone();
            let records = keys.audit().verified(&[&known]).unwrap_or_default();
            Earlier::find(records, &scope, env.clock.wall_us())
        }
    };
    if earlier.began_us.is_none() {
        let _admin = registry.administer()?;
        keys.audit().record(AuditEvent::RewrapBegun, None, &*scope)?;
    }
    let report = RewrapReport { continues_us: earlier.began_us, ..RewrapReport::default() };
    let mut run = Run { core, options, earlier, versions: BTreeMap::new(), report };
    let names = registry.list()?;
    let (total, mut done) = (names.len(), 0);
    let mut visit = |name: &LogstoreName, busy| {
        progress(&RewrapProgress { done, total, logstore: Some(name.clone()) });
        let is_done = run.logstore(name, busy);
        done += usize::from(is_done);
        is_done
    };
    let later: Vec<_> = names.iter().filter(|name| !visit(name, Busy::Later)).collect();
    for name in later {
        visit(name, Busy::Wait);
    }
    progress(&RewrapProgress { done: total, total, logstore: None });
    if run.report.failed.is_empty() {
        let _admin = registry.administer()?;
        keys.audit().record(AuditEvent::RewrapEnded, None, scope)?;
    }
    Ok(run.report)
}

/// Wraps the probe of a master key again. Returns the version of the master key that wraps now, if
/// the KMS reports it. Calls the KMS before it takes the administration.
fn rewrap_probe(
    keys: &KeyService,
    registry: &Registry,
    cmk: &Cmk,
) -> std::result::Result<Option<String>, KmsOrEngine> {
    let rewrapped = keys.rewrap_probe(cmk)?;
    if let Some(probe) = rewrapped.new {
        let _one_at_a_time = registry.administer()?;
        keys.put_probe(probe)?;
    }
    Ok(rewrapped.cmk_version)
}
