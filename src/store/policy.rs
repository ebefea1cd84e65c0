//! Data keys that rotate by themselves: by age, and by how much was sealed under them.

use std::{sync::Arc, time::Duration};

use tracing::{info, warn};

use super::{AdminState, Store, StoreShared, keyops::KeyChange};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    keys::envelope::KeysSection,
    logstore::{LogstoreShared, SealedBytes},
    segment::KeySource,
    sync::lock,
};

const DAY_US: u64 = 86_400_000_000;
/// How long after a rotation that the KMS did not let happen the next one is tried.
const RETRY_AFTER: Duration = Duration::from_secs(600);

impl Store {
    /// Makes a new data-key version for each Logstore whose [`crate::RotateDataKey`] asks for one now. Done by itself every
    /// [`crate::StoreOptions::retention_every`]. Where the KMS does not let it happen it is tried again, ten minutes later at the
    /// earliest. Returns the Logstores that have a new version.
    ///
    /// # Errors
    /// What kept it from being done for a Logstore, but for a KMS; the others are done all the same.
    pub fn rotate_due_data_keys(&self) -> Result<Vec<LogstoreName>> {
        self.shared.rotate_due_data_keys()
    }
}

impl StoreShared {
    pub(super) fn rotate_due_data_keys(&self) -> Result<Vec<LogstoreName>> {
        self.check_writable()?;
        let names = self.names();
        let mut rotated = Vec::new();
        let mut result = Ok(());
        for name in names {
            match self.rotate_if_due(&name) {
                Ok(true) => rotated.push(name),
                Ok(false) | Err(Error::LogstoreMissing(_)) => {}
                Err(error) => result = result.and(Err(error)),
            }
        }
        result.map(|()| rotated)
    }

    fn rotate_if_due(&self, name: &LogstoreName) -> Result<bool> {
        let mut admin = self.administer()?;
        let logstore = self.logstore_locked(&mut admin, name)?;
        let Some(section) = logstore.keys_section() else { return Ok(false) };
        let mut sealed = lock(&logstore.sealed);
        if self.clock.uptime() < sealed.retry_at {
            return Ok(false);
        }
        let Some(why) = self.due(&logstore, &section, &mut sealed)? else { return Ok(false) };
        match self.rotate_by_policy(&mut admin, &logstore, &why) {
            Ok(version) => {
                info!(logstore = %name, version, why, "a data key was rotated by its policy");
                Ok(true)
            }
            Err(error) if matches!(error.kind(), ErrorKind::Revoked | ErrorKind::KmsUnreachable) => {
                warn!(logstore = %name, why, %error, "a data key is due to be rotated, and will be later");
                sealed.retry_at = self.clock.uptime() + RETRY_AFTER;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn rotate_by_policy(&self, admin: &mut AdminState, logstore: &Arc<LogstoreShared>, why: &str) -> Result<u32> {
        // Asked first, so that no intent is recorded that cannot come about.
        self.admit(logstore)?;
        self.change_keys_locked(admin, logstore, &KeyChange::rotate_by_policy(why), |shared, logstore, section| {
            shared.add_version(logstore, section)
        })
    }

    /// Why the current data key is to be replaced, if it is.
    fn due(
        &self,
        logstore: &LogstoreShared,
        section: &KeysSection,
        sealed: &mut SealedBytes,
    ) -> Result<Option<String>> {
        let policy = {
            let meta = lock(&logstore.meta);
            meta.config.rotate_data_key.filter(|_| meta.config.encrypt_conf.as_ref().is_some_and(|conf| conf.enable))
        };
        let (Some(policy), Some(current)) = (policy, section.version(section.current)) else { return Ok(None) };
        if let Some(days) = policy.max_age_days
            // A clock that has jumped says nothing of the age.
            && !lock(&self.retention).has_jumped(&*self.clock)
            && self.clock.wall_us() >= current.created_us.saturating_add(u64::from(days) * DAY_US)
        {
            return Ok(Some(format!("version {} is {days} days old", section.current)));
        }
        if let Some(max) = policy.max_bytes {
            let bytes = self.sealed_bytes(logstore, section.current, sealed)?;
            if bytes >= max {
                return Ok(Some(format!("version {} has sealed {bytes} bytes", section.current)));
            }
        }
        Ok(None)
    }

    /// The bytes on disk of the segments under the current version. Each segment is looked at once after it has ended.
    fn sealed_bytes(&self, logstore: &LogstoreShared, version: u32, sealed: &mut SealedBytes) -> Result<u64> {
        if sealed.version != version || sealed.shards.len() != logstore.shards.len() {
            sealed.version = version;
            sealed.shards = vec![(0, 0); logstore.shards.len()];
        }
        let mut total = 0;
        for (shard, (next, bytes)) in logstore.shards.iter().zip(&mut sealed.shards) {
            let mut ended = 0;
            let segments = shard.segments(false)?;
            for segment in segments.iter().rev().take_while(|segment| segment.ordinal >= *next) {
                // Versions only grow along a shard: what comes before is under older ones.
                if shard.key_source(segment)? != KeySource::DataKey(version) {
                    break;
                }
                match &segment.active {
                    Some(view) => total += view.visible(),
                    None => {
                        let stat = self.disk.stat(&segment.path).map_err(Error::io("look for", &*segment.path))?;
                        ended += stat.map_or(0, |stat| stat.len);
                    }
                }
            }
            *bytes += ended;
            total += *bytes;
            if let Some(last) = segments.iter().rev().find(|segment| segment.active.is_none()) {
                *next = (*next).max(last.ordinal + 1);
            }
        }
        Ok(total)
    }
}
