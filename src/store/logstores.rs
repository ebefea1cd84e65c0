//! Creating, updating and deleting Logstores, and cleaning up after a crash.

use std::sync::Arc;

use tracing::warn;

use super::{
    adoption::open_with_any_metadata,
    catalogue::{Change, Entry, LOGSTORES_MAX, STORE_SHARDS_MAX},
    core::Core,
    env::StoreEnv,
    key_change::ensure_probe,
    keys::KeyService,
    registry::Registry,
    removal::{self, DeleteReport},
};
use crate::{
    Error, Result,
    config::{ConfigError, EncryptConf, LogstoreConfig, LogstoreName, LogstoreSpec},
    crypto::SecretKey,
    ids::LogstoreId,
    keys::{AuditEvent, envelope::KeysSection},
    logstore::{LogstoreShared, Meta, shard_dir},
    shard::{AcceptedLoss, FoundLoss, RepairOptions, RepairReport, Shard, ShardRecord},
};

/// Creates a Logstore, with its envelope if `spec` turns encryption on. Holds the name during the
/// KMS calls for the envelope.
pub(super) fn create(
    core: &Core,
    name: &LogstoreName,
    spec: LogstoreSpec,
) -> Result<Arc<LogstoreShared>> {
    let Core { env, keys, registry } = core;
    let _name = registry.administer_logstore(name)?;
    {
        let mut admin = registry.administer()?;
        admin.unlatch()?;
        check_room(registry, name, spec.shard_count)?;
    }
    let now_us = env.clock.wall_us();
    let config = LogstoreConfig::new(name.clone(), spec, now_us / 1_000_000)?;
    let id = LogstoreId::random(&*env.random)
        .map_err(Error::io("draw an id in", env.logstores_dir()))?;
    let mut meta = Meta::new(config);
    // The KMS is called before any file is made, and before the administration is taken.
    let data_key = match meta.config.encrypt_conf.clone() {
        Some(conf) if conf.enable => Some(make_envelope(core, &mut meta, id, &conf)?),
        _ => None,
    };
    let mut admin = registry.administer()?;
    admin.unlatch()?;
    // Others may have created Logstores meanwhile.
    check_room(registry, name, meta.config.shards.len() as u32)?;
    if let (Some(section), Some(key)) = (&mut meta.keys, &data_key) {
        keys.renew_first_envelope(section, id, key)?;
    }
    let dir = env.logstore_dir(id);
    let made =
        make_files(env, keys, &mut meta, id, data_key.as_ref()).and_then(|()| match &meta.keys {
            Some(_) => keys.audit().record(AuditEvent::Created, Some((name, id)), describe(&meta)),
            None => Ok(()),
        });
    if let Err(error) = made {
        // The catalogue has no entry for these files, so the next opening would remove them too.
        let _ = removal::remove_logstore(&*env.disk, &dir);
        return Err(error);
    }
    let shards = vec![ShardRecord::default(); meta.config.shards.len()];
    let (generation, tag) = (meta.generation, meta.tag);
    let entry = Entry { id, generation, tag, shards: shards.clone() };
    // After a failed commit the catalogue may have the entry or not, so the files stay until the
    // next opening.
    let created = Change::Created { name: name.clone(), id, generation, tag, shards };
    let retention = registry.retention_change(Some(&meta.config), true);
    admin.commit([created].into_iter().chain(retention).collect())?;
    admin.open_created(meta, &entry)
}

/// Checks that the name is free, and that the store has room for the shards.
fn check_room(registry: &Registry, name: &LogstoreName, shard_count: u32) -> Result<()> {
    let catalogue = registry.catalogue();
    if catalogue.logstores.contains_key(name) {
        return Err(Error::LogstoreExists(name.clone()));
    }
    if catalogue.logstores.len() >= LOGSTORES_MAX {
        return Err(Error::TooMany { what: "Logstores", limit: LOGSTORES_MAX as u64 });
    }
    let shards: usize = catalogue.logstores.values().map(|entry| entry.shards.len()).sum();
    if shards.saturating_add(shard_count as usize) > STORE_SHARDS_MAX {
        return Err(Error::TooMany {
            what: "shards of all Logstores",
            limit: STORE_SHARDS_MAX as u64,
        });
    }
    Ok(())
}

fn make_files(
    env: &StoreEnv,
    keys: &KeyService,
    meta: &mut Meta,
    id: LogstoreId,
    data_key: Option<&SecretKey>,
) -> Result<()> {
    let (disk, dir) = (&*env.disk, env.logstore_dir(id));
    disk.create_dir(&dir).map_err(Error::io("create", &dir))?;
    for shard in &meta.config.shards {
        let dir = shard_dir(&dir, shard.id);
        disk.create_dir(&dir).map_err(Error::io("create", &dir))?;
    }
    let byok = data_key.filter(|_| meta.keys.as_ref().is_some_and(|keys| keys.cmk.is_some()));
    meta.save(disk, &dir, env.id, id, &keys.keyring(), byok)?;
    let parent = env.logstores_dir();
    disk.sync_dir(&parent).map_err(Error::io("sync", &parent))
}

/// Makes the first envelope of a Logstore, and fixes method, algorithm and master key for all its
/// segments. Returns the data key. Calls the KMS under a customer master key.
fn make_envelope(
    core: &Core,
    meta: &mut Meta,
    id: LogstoreId,
    conf: &EncryptConf,
) -> Result<SecretKey> {
    let encrypt_type = conf.encrypt_type.ok_or(ConfigError::EncryptTypeRequired)?;
    let mut section = KeysSection {
        name: meta.config.name.clone(),
        encrypt_type,
        cmk: conf.user_cmk_info.clone(),
        since: meta.generation,
        enable: conf.enable,
        ttl_days: meta.config.ttl_days,
        retention_bytes: meta.config.retention_bytes,
        probe: meta.config.probe.name().to_owned(),
        current: 1,
        versions: Vec::new(),
    };
    let (key, ordinals) = (core.keys.draw_data_key()?, vec![1; meta.config.shards.len()]);
    ensure_probe(core, &section.name, section.cmk.as_ref())?;
    core.keys.add_data_key(&mut section, id, 1, ordinals, &key)?;
    meta.keys = Some(section);
    Ok(key)
}

/// Replaces the configuration of a Logstore. Returns the new one. Holds the Logstore during the KMS
/// calls for a first envelope, and for the second tag.
pub(super) fn update(
    core: &Core,
    name: &LogstoreName,
    update: LogstoreConfig,
) -> Result<LogstoreConfig> {
    let one = core.registry.administer_logstore(name)?;
    let logstore = one.logstore()?;
    let mut meta = logstore.meta();
    let fixed = meta.keys.as_ref().map(KeysSection::fixed);
    let now_us = core.env.clock.wall_us();
    meta.config = meta.config.updated(update, fixed.as_ref(), now_us / 1_000_000)?;
    let first_enable =
        meta.keys.is_none() && meta.config.encrypt_conf.as_ref().is_some_and(|conf| conf.enable);
    let data_key = match meta.config.encrypt_conf.clone().filter(|_| first_enable) {
        Some(conf) => make_envelope(core, &mut meta, logstore.id, &conf).map(Some),
        None => bind(&logstore, &mut meta),
    };
    let data_key = data_key.map_err(|error| core.registry.cause(&logstore, error))?;
    let config = meta.config.clone();
    if first_enable {
        // The record comes before the envelope is in force, so no envelope is without a record.
        one.record_intent(AuditEvent::Created, &logstore, &describe(&meta))?;
    }
    one.replace_meta(&logstore, meta, data_key.as_ref(), |_| Ok(()))?;
    Ok(config)
}

/// Copies the settings that the keys section repeats from the configuration into the section.
/// Returns the data key of a customer that authenticates the change.
fn bind(logstore: &LogstoreShared, meta: &mut Meta) -> Result<Option<SecretKey>> {
    let Some(section) = &mut meta.keys else { return Ok(None) };
    let before = section.clone();
    section.follow(&meta.config);
    if *section == before || section.cmk.is_none() {
        return Ok(None);
    }
    logstore.gate.admit()?;
    logstore.gate.unwrap(section.current).map(Some)
}

/// Deletes a Logstore: its envelopes first, then its other files. Waits for no KMS: an operation on
/// the Logstore that waits for one finds later that the Logstore is gone.
pub(super) fn delete(core: &Core, name: &LogstoreName) -> Result<DeleteReport> {
    let Core { env, keys, registry } = core;
    registry.check_writable()?;
    let mut admin = registry.administer()?;
    let entry = registry.entry(name)?;
    let (id, dir) = (entry.id, env.logstore_dir(entry.id));
    removal::check_types(&*env.disk, &dir, &entry.meta().path(&dir))?;
    keys.audit().record(AuditEvent::DeleteIntended, Some((name, id)), "")?;
    admin.commit(vec![Change::Deleted { name: name.clone(), id }])?;
    let open = admin.forget_deleted(name);
    let recorded = keys.audit().record(AuditEvent::Deleted, Some((name, id)), "");
    drop(admin);
    if let Some(open) = open {
        open.delete();
    }
    recorded?;
    finish_deletion(core, id)
}

/// Removes the files of a deleted Logstore. When none is left, the catalogue forgets the Logstore.
fn finish_deletion(core: &Core, id: LogstoreId) -> Result<DeleteReport> {
    let _one_at_a_time = core.registry.remove_files();
    if !core.registry.catalogue().deleting.contains(&id) {
        // Another thread has removed them.
        return Ok(DeleteReport::default());
    }
    let report = removal::remove_logstore(&*core.env.disk, &core.env.logstore_dir(id))?;
    if report.left.is_empty() {
        core.registry.administer()?.commit(vec![Change::Removed { id }])?;
    }
    Ok(report)
}

/// Continues unfinished deletions. A deletion that fails does not stop the others.
///
/// # Errors
/// The failure of a change that latched the administration.
pub(super) fn finish_deletions(core: &Core) -> Result<()> {
    core.registry.check_writable()?;
    let deleting = core.registry.catalogue().deleting.clone();
    for id in deleting {
        if let Err(error) = finish_deletion(core, id) {
            if let Some(latched) = core.registry.administer()?.latched() {
                return Err(latched.clone());
            }
            warn!(logstore = %id, %error, "files of a deleted Logstore not removed; will retry");
        }
    }
    Ok(())
}

/// Finishes the deletions and removes the files of the creations that a crash interrupted. Keeps a
/// directory that the catalogue does not list and that may have segments in it: a verification
/// reports it.
pub(super) fn clean_up(core: &Core) -> Result<()> {
    finish_deletions(core)?;
    let unlisted = {
        let _admin = core.registry.exclusive();
        core.registry.unlisted()?
    };
    for (dir, _) in unlisted.into_iter().filter(|(_, may_have_segments)| !may_have_segments) {
        if let Err(error) = removal::remove_logstore(&*core.env.disk, &dir) {
            warn!(dir = %dir.display(), %error, "remains of an interrupted creation not removed");
        }
    }
    Ok(())
}

/// Accepts the losses of a shard, and gives up the damaged data at its end. The audit log and the
/// catalogue record each loss before anything else changes.
pub(super) fn repair(
    core: &Core,
    name: &LogstoreName,
    shard: u32,
    options: &RepairOptions,
) -> Result<RepairReport> {
    core.registry.check_writable()?;
    let logstore = open_with_any_metadata(core, name)?;
    let missing = || Error::ShardMissing { logstore: name.clone(), shard };
    let shard = logstore.shards.get(shard as usize).ok_or_else(missing)?;
    let mut losses = Vec::new();
    loop {
        let found = shard.find_losses(options.accept_tampered)?;
        if found.is_empty() {
            break;
        }
        // The name of a lost segment may have hidden others, which are found then.
        for found in found {
            accept_loss(core, &logstore, shard, &found)?;
            losses.push(AcceptedLoss::new(shard.id(), &found.loss));
        }
    }
    let report = shard.repair()?;
    Ok(RepairReport { losses, ..report })
}

fn accept_loss(
    core: &Core,
    logstore: &Arc<LogstoreShared>,
    shard: &Shard,
    found: &FoundLoss,
) -> Result<()> {
    let FoundLoss { loss, cause } = found;
    let (name, id) = (&logstore.name, logstore.id);
    let mut admin = core.registry.administer()?;
    admin.check_exists(logstore)?;
    let detail = format!(
        "shard {}, segments {} to {}, sequence numbers {} to before {}, by user {}: {cause}",
        shard.id(),
        loss.first,
        loss.last,
        loss.from_seq,
        loss.end_seq,
        rustix::process::getuid().as_raw(),
    );
    let change = Change::Lost { name: name.clone(), id, shard: shard.id(), loss: loss.clone() };
    let allowed = core.registry.catalogue().check_change(&change);
    allowed.map_err(|rule| Error::InvalidArgument(format!("the loss is not accepted: {rule}")))?;
    core.keys.audit().record(AuditEvent::LossAccepted, Some((name, id)), &detail)?;
    admin.commit(vec![change])?;
    shard.note_loss(loss.clone());
    let (first, last) = (loss.first, loss.last);
    warn!(logstore = %name, shard = shard.id(), first, last, %cause, "loss of segments accepted");
    Ok(())
}

/// The detail of the audit record of a first envelope.
fn describe(meta: &Meta) -> String {
    meta.keys.as_ref().map_or_else(String::new, |keys| match &keys.cmk {
        Some(cmk) => format!(
            "encrypt_type {}, master key {} in {}",
            keys.encrypt_type, cmk.cmk_key_id, cmk.region_id
        ),
        None => format!("encrypt_type {}, service key", keys.encrypt_type),
    })
}
