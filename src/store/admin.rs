//! Making, changing and deleting Logstores.

use std::{path::Path, sync::Arc};

use tracing::warn;

use super::{
    AdminState, DeleteReport, Entry, KmsOrEngine, Store, StoreShared,
    catalogue::{Change, LOGSTORES_MAX, STORE_SHARDS_MAX},
    removal,
};
use crate::{
    Error, Result,
    config::{ConfigError, EncryptConf, LogstoreConfig, LogstoreName, LogstoreSpec},
    crypto::SecretKey,
    ids::{LogstoreId, hex_encode},
    io::{Disk, FileKind},
    keys::{
        AuditEvent,
        envelope::{DataKeyVersion, EnvelopeIdentity, KeysSection, PROBE_SHARED, fingerprint},
        gate::GateKeys,
        lease::Lease,
    },
    kms::{BoundedKms, Cmk},
    logstore::{Logstore, LogstoreShared, Meta, remove_older_meta, shard_dir},
    shard::{Paused, ShardRecord},
    sync::{lock, read},
};

impl Store {
    /// Makes a Logstore, with its envelope if `spec` turns encryption on.
    ///
    /// # Errors
    /// [`Error::LogstoreExists`]; [`Error::Config`] when a rule refuses it, a customer master key that cannot be used among them;
    /// [`Error::KmsUnreachable`]. No Logstore is made then.
    pub fn create_logstore(&self, name: &LogstoreName, spec: LogstoreSpec) -> Result<Logstore> {
        let shared = self.shared.create(name, spec)?;
        Ok(self.handle(shared))
    }

    /// Replaces the whole configuration of a Logstore by `config`, which the caller got from [`Store::config`] and changed. Returns
    /// the new one, with its new revision.
    ///
    /// # Errors
    /// [`Error::Config`], one variant a rule; nothing has changed then. [`Error::KmsUnreachable`] when the first `enable: true` needs
    /// an envelope. Under a customer master key `enable`, `ttl_days` and `retention_bytes` change only while that key can be used:
    /// [`Error::Revoked`] and [`Error::KmsUnreachable`] otherwise, and nothing has changed.
    pub fn update_logstore(&self, name: &LogstoreName, config: LogstoreConfig) -> Result<LogstoreConfig> {
        self.shared.update(name, config)
    }

    /// Deletes a Logstore: its envelopes first, so that what is left of its data on the disk cannot be read through this store, then
    /// its files. Needs no key. Removes the names that envelog gives and follows no symlink; the report lists the entries that are
    /// left.
    ///
    /// # Errors
    /// [`Error::LogstoreMissing`]; [`Error::WrongFileType`] when a symlink, a directory or the like stands where a file of the Logstore
    /// belongs, with nothing changed; [`Error::Io`].
    pub fn delete_logstore(&self, name: &LogstoreName) -> Result<DeleteReport> {
        self.shared.delete(name)
    }

    /// Gives up what is damaged at the end of a shard, so that it can be written again; everything readable is kept. Does nothing
    /// where nothing is damaged.
    ///
    /// # Errors
    /// What keeps the shard from being repaired: a damaged header, or a key that may not be used.
    pub fn repair(&self, name: &LogstoreName, shard: u32) -> Result<crate::RepairReport> {
        self.shared.check_writable()?;
        let logstore = self.shared.logstore(name)?;
        let missing = || Error::ShardMissing { logstore: name.clone(), shard };
        logstore.shards.get(shard as usize).ok_or_else(missing)?.repair()
    }
}

impl StoreShared {
    fn create(&self, name: &LogstoreName, spec: LogstoreSpec) -> Result<Arc<LogstoreShared>> {
        let mut admin = self.administer()?;
        self.unlatch(&mut admin)?;
        {
            let catalogue = self.catalogue.now();
            if catalogue.logstores.contains_key(name) {
                return Err(Error::LogstoreExists(name.clone()));
            }
            if catalogue.logstores.len() >= LOGSTORES_MAX {
                return Err(Error::TooMany { what: "Logstores", limit: LOGSTORES_MAX as u64 });
            }
            let shards: usize = catalogue.logstores.values().map(|entry| entry.shards.len()).sum();
            if shards.saturating_add(spec.shard_count as usize) > STORE_SHARDS_MAX {
                return Err(Error::TooMany { what: "shards of all Logstores", limit: STORE_SHARDS_MAX as u64 });
            }
        }
        let now_us = self.clock.wall_us();
        let config = LogstoreConfig::new(name.clone(), spec, now_us / 1_000_000)?;
        let dir = self.dir.join("logstores");
        let id = LogstoreId::random(&*self.random).map_err(Error::io("draw an id in", &dir))?;
        let mut meta = Meta::new(config);
        // The KMS is asked before anything is made.
        let data_key = match meta.config.encrypt_conf.clone() {
            Some(conf) if conf.enable => Some(self.make_envelope(&mut meta, id, &conf)?),
            _ => None,
        };
        let dir = self.logstore_dir(id);
        let made = self.make_files(&mut meta, id, &dir, data_key.as_ref()).and_then(|()| match &meta.keys {
            Some(_) => self.audit.record(AuditEvent::Created, Some((name, id)), describe(&meta)),
            None => Ok(()),
        });
        if let Err(error) = made {
            // Without an entry in the catalogue it is nothing; what is left is cleaned up at the next opening, if not now.
            let _ = removal::remove_logstore(&*self.disk, &dir);
            return Err(error);
        }
        let shards = vec![ShardRecord::default(); meta.config.shards.len()];
        let (generation, tag) = (meta.generation, meta.tag);
        let entry = Entry { id, generation, tag, shards: shards.clone() };
        // Should this fail, the catalogue may know it or not: the files stay until an opening finds out.
        let created = Change::Created { name: name.clone(), id, generation, tag, shards };
        self.commit(&mut admin, vec![created])?;
        let shared = self.open_logstore(meta, &entry)?;
        lock(&self.logstores).insert(name.clone(), Arc::clone(&shared));
        Ok(shared)
    }

    fn make_files(&self, meta: &mut Meta, id: LogstoreId, dir: &Path, data_key: Option<&SecretKey>) -> Result<()> {
        let disk = &*self.disk;
        disk.create_dir(dir).map_err(Error::io("create", dir))?;
        for shard in &meta.config.shards {
            let dir = shard_dir(dir, shard.id);
            disk.create_dir(&dir).map_err(Error::io("create", &dir))?;
        }
        let byok = data_key.filter(|_| meta.keys.as_ref().is_some_and(|keys| keys.cmk.is_some()));
        meta.save(disk, dir, self.id, id, &read(&self.keyring), byok)?;
        let parent = self.dir.join("logstores");
        disk.sync_dir(&parent).map_err(Error::io("sync", &parent))
    }

    /// Makes the first envelope of a Logstore and fixes method, algorithm and master key: for all its segments, as there are none yet.
    /// Returns the data key.
    fn make_envelope(&self, meta: &mut Meta, id: LogstoreId, conf: &EncryptConf) -> Result<SecretKey> {
        let encrypt_type = conf.encrypt_type.ok_or(ConfigError::EncryptTypeRequired)?;
        let mut section = KeysSection {
            name: meta.config.name.clone(),
            encrypt_type,
            cmk: conf.user_cmk_info.clone(),
            since: meta.generation,
            enable: conf.enable,
            ttl_days: meta.config.ttl_days,
            retention_bytes: meta.config.retention_bytes,
            probe: PROBE_SHARED.to_owned(),
            current: 1,
            versions: Vec::new(),
        };
        let key = self.new_data_key(&mut section, id, 1, vec![1; meta.config.shards.len()])?;
        meta.keys = Some(section);
        Ok(key)
    }

    /// Draws a data key and adds it to the section, wrapped. `ordinals` is where its segments begin, by shard.
    pub(super) fn new_data_key(
        &self,
        section: &mut KeysSection,
        id: LogstoreId,
        version: u32,
        ordinals: Vec<u64>,
    ) -> Result<SecretKey> {
        let key = SecretKey::generate(&*self.random).map_err(Error::io("draw a data key for", &self.dir))?;
        let (keyring_version, wrapped) = self.wrap_data_key(section, id, version, &key)?;
        section.versions.push(DataKeyVersion {
            version,
            created_us: self.clock.wall_us(),
            ordinals,
            drawn_under: keyring_version,
            wrapped_us: None,
            keyring_version,
            wrapped: Some(wrapped),
            fingerprint: fingerprint(&key),
        });
        section.current = version;
        Ok(key)
    }

    /// Wraps a data key under what the section names: its master key, or the newest service key, whose version is returned beside the
    /// envelope.
    pub(super) fn wrap_data_key(
        &self,
        section: &KeysSection,
        id: LogstoreId,
        version: u32,
        key: &SecretKey,
    ) -> Result<(Option<u32>, String)> {
        let identity = EnvelopeIdentity { store: self.id, logstore: id, version, suite: section.encrypt_type.suite() };
        let (keyring_version, wrapped) = match &section.cmk {
            None => {
                let (version, wrapped) = read(&self.keyring).wrap(&*self.provider, &*self.random, &identity, key)?;
                (Some(version), wrapped)
            }
            Some(cmk) => {
                let kms = self.serving(cmk)?;
                let wrapped =
                    self.wrap_at(kms, cmk, &identity, key).map_err(|error| error.refusing(&section.name, cmk))?;
                (None, wrapped)
            }
        };
        Ok((keyring_version, hex_encode(&wrapped)))
    }

    pub(super) fn serving(&self, cmk: &Cmk) -> Result<&BoundedKms> {
        Ok(self.kms.serving(&cmk.region_id)?)
    }

    /// Wraps a data key at the KMS, and sees to it that there is a probe.
    fn wrap_at(
        &self,
        kms: &BoundedKms,
        cmk: &Cmk,
        identity: &EnvelopeIdentity,
        key: &SecretKey,
    ) -> std::result::Result<Vec<u8>, KmsOrEngine> {
        self.ensure_probe(kms, cmk)?;
        self.wrap_proved(kms, cmk, identity.context(), key)
    }

    fn update(&self, name: &LogstoreName, update: LogstoreConfig) -> Result<LogstoreConfig> {
        let mut admin = self.administer()?;
        let logstore = self.logstore_locked(&mut admin, name)?;
        let mut meta = lock(&logstore.meta).clone();
        let fixed = meta.keys.as_ref().map(KeysSection::fixed);
        meta.config = meta.config.updated(update, fixed.as_ref(), self.clock.wall_us() / 1_000_000)?;
        let first_enable = meta.keys.is_none() && meta.config.encrypt_conf.as_ref().is_some_and(|conf| conf.enable);
        let data_key = match meta.config.encrypt_conf.clone().filter(|_| first_enable) {
            Some(conf) => Some(self.make_envelope(&mut meta, logstore.id, &conf)?),
            None => self.bind(&logstore, &mut meta)?,
        };
        let config = meta.config.clone();
        if first_enable {
            // Before the envelope is in place, so that none ever is without a record.
            self.audit.record(AuditEvent::Created, Some((name, logstore.id)), describe(&meta))?;
        }
        self.replace_meta(&mut admin, &logstore, meta, data_key.as_ref())?;
        Ok(config)
    }

    /// Takes over into the keys section what the configuration has changed and the section holds too. Returns the data key that a
    /// customer's key gives to authenticate the change.
    fn bind(&self, logstore: &LogstoreShared, meta: &mut Meta) -> Result<Option<SecretKey>> {
        let Some(section) = &mut meta.keys else { return Ok(None) };
        let before = section.clone();
        section.follow(&meta.config);
        if *section == before || section.cmk.is_none() {
            return Ok(None);
        }
        self.admit(logstore)?;
        logstore.gate.unwrap(section.current).map(Some)
    }

    /// Puts changed metadata in place: a file of its own, then the catalogue, then memory. `data_key` is given when the keys have changed.
    pub(super) fn replace_meta(
        &self,
        admin: &mut AdminState,
        logstore: &Arc<LogstoreShared>,
        mut meta: Meta,
        data_key: Option<&SecretKey>,
    ) -> Result<()> {
        self.unlatch(admin)?;
        let before = logstore.keys_section();
        let generation = meta.generation + 1;
        let mut paused = Vec::new();
        let mut changes = Vec::new();
        if let Some(section) = &mut meta.keys
            && before.as_ref().is_none_or(|before| before.current != section.current)
        {
            // A new data key owns the segments from the next ordinals on: no shard may begin one before the key is in place.
            if before.is_some() {
                end_segments(logstore)?;
            }
            for shard in &logstore.shards {
                paused.push(shard.pause()?);
            }
            if before.is_none() {
                section.since = generation;
            }
            if let Some(newest) = section.versions.last_mut() {
                newest.ordinals = paused.iter().map(Paused::next_ordinal).collect::<Result<_>>()?;
            }
            // The older key adds nothing to what the catalogue knows from here on.
            let heads = paused.iter().filter_map(|paused| Some((paused.shard_id(), paused.head()?)));
            changes.extend(heads.map(|(shard, head)| Change::reached(&logstore.name, logstore.id, shard, head)));
        }
        let saved = self.save_meta(admin, logstore, meta, data_key)?;
        changes.push(saved.change());
        let committed = self.commit(admin, changes);
        committed.inspect_err(|error| {
            if !paused.is_empty() && admin.latched.is_some() {
                // The catalogue names the new metadata or the old one. A segment would have to be under other keys in either case.
                logstore.gate.halt(error);
            }
        })?;
        let lease = saved.take_effect(&*self.disk, read(&self.keyring).newest());
        for paused in &paused {
            paused.note_head();
        }
        drop(paused);
        super::hear_of_loss(logstore, lease);
        Ok(())
    }

    /// Writes changed metadata into a file of its own, as the first part of [`StoreShared::replace_meta`].
    pub(super) fn save_meta(
        &self,
        admin: &mut AdminState,
        logstore: &Arc<LogstoreShared>,
        mut meta: Meta,
        data_key: Option<&SecretKey>,
    ) -> Result<SavedMeta> {
        self.unlatch(admin)?;
        meta.generation += 1;
        // What can fail without having changed anything is done first.
        let gate_keys = match logstore.keys_section().as_deref() == meta.keys.as_ref() {
            false => Some(self.gate_keys(meta.keys.as_ref(), logstore.id)?),
            true => None,
        };
        let byok = data_key.filter(|_| meta.keys.as_ref().is_some_and(|keys| keys.cmk.is_some()));
        meta.save(&*self.disk, &logstore.dir, self.id, logstore.id, &read(&self.keyring), byok)?;
        Ok(SavedMeta { logstore: Arc::clone(logstore), meta, gate_keys })
    }

    fn delete(&self, name: &LogstoreName) -> Result<DeleteReport> {
        let mut admin = self.administer()?;
        let entry = self.entry(name)?;
        let (id, dir) = (entry.id, self.logstore_dir(entry.id));
        removal::check_types(&*self.disk, &dir, &entry.meta().path(&dir))?;
        self.audit.record(AuditEvent::DeleteIntended, Some((name, id)), "")?;
        self.commit(&mut admin, vec![Change::Deleted { name: name.clone(), id }])?;
        let open = lock(&self.logstores).remove(name);
        if let Some(open) = open {
            open.delete();
        }
        self.audit.record(AuditEvent::Deleted, Some((name, id)), "")?;
        self.finish_deletion(&mut admin, id)
    }

    /// Removes the files of a deleted Logstore. The catalogue forgets it when nothing is left.
    fn finish_deletion(&self, admin: &mut AdminState, id: LogstoreId) -> Result<DeleteReport> {
        let report = removal::remove_logstore(&*self.disk, &self.logstore_dir(id))?;
        if report.left.is_empty() {
            self.commit(admin, vec![Change::Removed { id }])?;
        }
        Ok(report)
    }

    /// Goes on with the deletions that are not finished. One that cannot be finished keeps nothing else from being done.
    pub(super) fn finish_deletions(&self) -> Result<()> {
        let mut admin = self.administer()?;
        let deleting = self.catalogue.now().deleting.clone();
        for id in deleting {
            if let Err(error) = self.finish_deletion(&mut admin, id) {
                if let Some(latched) = &admin.latched {
                    return Err(latched.clone());
                }
                warn!(logstore = %id, %error, "the files of a deleted Logstore cannot be removed; this is tried again later");
            }
        }
        Ok(())
    }

    /// Finishes what a crash interrupted: deletions, and creations that never reached the catalogue. A directory that the catalogue
    /// does not know and that has segments in it is left alone: [`Store::verify`] reports it.
    pub(super) fn clean_up(&self) -> Result<()> {
        self.finish_deletions()?;
        let unlisted = {
            let _admin = lock(&self.admin);
            self.unlisted()?
        };
        for (dir, _) in unlisted.into_iter().filter(|(_, may_have_segments)| !may_have_segments) {
            if let Err(error) = removal::remove_logstore(&*self.disk, &dir) {
                warn!(dir = %dir.display(), %error, "the remains of an interrupted creation cannot be removed");
            }
        }
        Ok(())
    }

    /// The directories of Logstores that the catalogue does not know, and whether there may be segments in them. A symlink or a file
    /// of such a name is none.
    pub(super) fn unlisted(&self) -> Result<Vec<(std::path::PathBuf, bool)>> {
        let disk = &*self.disk;
        let parent = self.dir.join("logstores");
        let known: std::collections::HashSet<String> = {
            let catalogue = self.catalogue.now();
            let ids = catalogue.logstores.values().map(|entry| entry.id).chain(catalogue.deleting.iter().copied());
            ids.map(|id| id.to_string()).collect()
        };
        let mut unlisted = Vec::new();
        for entry in disk.list_dir(&parent).map_err(Error::io("list", &parent))? {
            let is_dir = entry.kind == FileKind::Directory;
            if !is_dir || known.contains(&entry.name) || entry.name.parse::<LogstoreId>().is_err() {
                continue;
            }
            let dir = parent.join(&entry.name);
            // A directory that cannot be looked into may have segments in it.
            let holds_something = |shard: &Path| disk.list_dir(shard).map_or(true, |files| !files.is_empty());
            let may_have_segments = disk.list_dir(&dir).map_or(true, |parts| {
                let mut dirs = parts.iter().filter(|part| part.kind == FileKind::Directory);
                dirs.any(|part| holds_something(&dir.join(&part.name)))
            });
            unlisted.push((dir, may_have_segments));
        }
        Ok(unlisted)
    }
}

/// Metadata that has a file, and that neither the catalogue nor the memory knows yet.
pub(super) struct SavedMeta {
    logstore: Arc<LogstoreShared>,
    meta: Meta,
    /// The keys, where they have changed.
    gate_keys: Option<GateKeys>,
}

impl SavedMeta {
    /// What the catalogue is to note.
    pub(super) fn change(&self) -> Change {
        let (name, id) = (self.logstore.name.clone(), self.logstore.id);
        Change::Replaced { name, id, generation: self.meta.generation, tag: self.meta.tag }
    }

    /// Puts it in place in memory, once the catalogue knows of it. The caller has the Logstore hear of the loss of the lease, if there
    /// is one.
    pub(super) fn take_effect(self, disk: &dyn Disk, keyring_version: u32) -> Option<Arc<Lease>> {
        let lease = self.gate_keys.and_then(|keys| super::use_keys(&self.logstore, keys));
        let current = self.meta.reference();
        self.logstore.set_meta(self.meta, keyring_version);
        if let Err(error) = remove_older_meta(disk, &self.logstore.dir, &current) {
            // Nothing reads it any more. The next change and the next opening try again.
            warn!(logstore = %self.logstore.name, %error, "older metadata of a Logstore cannot be removed");
        }
        lease
    }
}

/// Ends the last segment of each shard, including one that a killed process left open.
///
/// # Errors
/// A damaged shard must be repaired first: an open segment would let the older key add blocks to it.
fn end_segments(logstore: &LogstoreShared) -> Result<()> {
    logstore.shards.iter().try_for_each(|shard| shard.end_segment_if(|_| true).map(drop))
}

fn describe(meta: &Meta) -> String {
    meta.keys.as_ref().map_or_else(String::new, |keys| match &keys.cmk {
        Some(cmk) => format!("encrypt_type {}, master key {} in {}", keys.encrypt_type, cmk.cmk_key_id, cmk.region_id),
        None => format!("encrypt_type {}, service key", keys.encrypt_type),
    })
}
