//! Automatic rotation of data keys, by the age of the key and by the bytes of the segments under
//! it.

use std::time::Duration;

use tracing::{info, warn};

use super::{
    core::Core,
    env::StoreEnv,
    key_change::{KeyChange, change_keys, ensure_probe},
    unanswered::Unanswered,
};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    io::DAY_US,
    keys::envelope::KeysSection,
    logstore::{BytesUnderKey, LogstoreShared},
    segment::KeySource,
};

/// The delay before the next attempt after a rotation that the KMS prevented.
const RETRY_AFTER: Duration = Duration::from_secs(600);

/// Rotates the data keys that are due. Returns the Logstores that have a new version. A failure
/// for one Logstore does not stop the others. Leaves to the next run a Logstore that another
/// operation changes now.
pub(super) fn rotate_due(core: &Core) -> Result<Vec<LogstoreName>> {
    core.registry.check_writable()?;
    let (mut rotated, mut unanswered) = (Vec::new(), Unanswered::default());
    let mut result = Ok(());
    for name in core.registry.names() {
        match rotate_if_due(core, &name, &mut unanswered) {
            Ok(true) => rotated.push(name),
            Ok(false) | Err(Error::LogstoreMissing(_)) => {}
            Err(error) => result = result.and(Err(error)),
        }
    }
    result.map(|()| rotated)
}

fn rotate_if_due(core: &Core, name: &LogstoreName, unanswered: &mut Unanswered) -> Result<bool> {
    let Core { env, keys, registry } = core;
    let Some(one) = registry.try_administer_logstore(name)? else { return Ok(false) };
    let logstore = one.logstore()?;
    let Some(section) = logstore.keys_section() else { return Ok(false) };
    if env.clock.uptime() < logstore.bytes_under_key().retry_at || unanswered.includes(&logstore) {
        return Ok(false);
    }
    let Some(why) = due(env, &logstore, &section)? else { return Ok(false) };
    // The gate is asked first, so that no intent is recorded that the KMS would prevent.
    let rotated = logstore.gate.admit().and_then(|_| {
        let how = KeyChange::rotate_by_policy(&why);
        change_keys(core, &one, &logstore, &how, |logstore, section| {
            ensure_probe(core, name, section.cmk.as_ref())?;
            keys.add_version(section, logstore.id)
        })
    });
    match unanswered.note(&logstore, rotated) {
        Ok(version) => {
            info!(logstore = %name, version, why, "data key rotated by policy");
            Ok(true)
        }
        Err(error) if matches!(error.kind(), ErrorKind::Revoked | ErrorKind::KmsUnreachable) => {
            warn!(logstore = %name, why, %error, "data key rotation by policy postponed");
            logstore.bytes_under_key().retry_at = env.clock.uptime() + RETRY_AFTER;
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// The reason to replace the current data key now, if there is one.
fn due(env: &StoreEnv, logstore: &LogstoreShared, section: &KeysSection) -> Result<Option<String>> {
    let config = logstore.config();
    let enabled = config.encrypt_conf.as_ref().is_some_and(|conf| conf.enable);
    let policy = config.rotate_data_key.filter(|_| enabled);
    let (Some(policy), Some(current)) = (policy, section.version(section.current)) else {
        return Ok(None);
    };
    if let Some(days) = policy.max_age_days
        && !env.look_at_clock().suspended
        && env.clock.wall_us() >= current.created_us.saturating_add(u64::from(days) * DAY_US)
    {
        return Ok(Some(format!("version {} is {days} days old", section.current)));
    }
    if let Some(max) = policy.max_bytes {
        let bytes =
            bytes_under_key(env, logstore, section.current, &mut logstore.bytes_under_key())?;
        if bytes >= max {
            return Ok(Some(format!("version {} has {bytes} bytes of segments", section.current)));
        }
    }
    Ok(None)
}

/// The bytes on disk of the segments under the current version. Each segment is counted finally
/// once it has ended.
fn bytes_under_key(
    env: &StoreEnv,
    logstore: &LogstoreShared,
    version: u32,
    counted: &mut BytesUnderKey,
) -> Result<u64> {
    let table = logstore.table();
    if counted.version != version {
        counted.version = version;
        counted.shards.clear();
    }
    // A split adds shards.
    counted.shards.resize(table.shards().len(), (0, 0));
    let mut total = 0;
    for (shard, (next, bytes)) in table.shards().iter().zip(&mut counted.shards) {
        let mut ended = 0;
        let segments = shard.segments(false)?;
        let segments: Vec<_> =
            segments.iter().filter(|segment| !shard.is_lost(segment.ordinal)).collect();
        for segment in segments.iter().rev().take_while(|segment| segment.ordinal >= *next) {
            // Versions only grow along a shard, so all earlier segments are under older versions.
            if shard.key_source(segment)? != KeySource::DataKey(version) {
                break;
            }
            match &segment.active {
                Some(view) => total += view.visible(),
                None => {
                    let stat = env
                        .disk
                        .stat(&segment.path)
                        .map_err(Error::io("look for", &*segment.path))?;
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
