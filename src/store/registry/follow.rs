//! Following the writer, in a store that is open for reading.

use std::sync::Arc;

use tracing::debug;

use super::{Registry, administration::use_keys, hear_of_loss};
use crate::{
    Error, Result,
    config::LogstoreName,
    ids::LogstoreId,
    keys::{
        gate::{FollowWriter, GateKeys},
        keyring::Keyring,
        lease::Lease,
    },
    logstore::{LogstoreShared, Meta, MetaName},
    shard::{ReloadRecord, ShardRecord},
    store::catalogue::{Catalogue, Entry, load_newest},
    sync::lock,
};

impl Registry {
    /// Reads the catalogue again, in a store that is open for reading. May call the KMS of the
    /// service keyring, and holds no lock during that call.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::ServiceKey`], and the integrity errors of the catalogue.
    pub(crate) fn reload_catalogue(&self) -> Result<()> {
        if self.env.read_only {
            let known = self.catalogue().generation;
            self.catalogue.reload(self.load_catalogue()?, known);
        }
        Ok(())
    }

    fn load_catalogue(&self) -> Result<Catalogue> {
        self.keys.follow_keyring()?;
        self.keys
            .with_keyring(|keyring| {
                load_newest(&*self.env.disk, &self.env.dir, self.env.id, keyring)
            })
            .map(|loaded| loaded.catalogue)
    }

    /// Reads the metadata of a Logstore on each call. If the open Logstore of the name has the same
    /// id, keeps it and takes in changed metadata; otherwise opens the new one. May call the KMS of
    /// the service keyring, before it takes the administration.
    pub(super) fn find_or_open_to_read(&self, name: &LogstoreName) -> Result<Arc<LogstoreShared>> {
        loop {
            let (read, meta) = self.read_meta(name)?;
            let keys = self.keys.loaded_keys(&meta, read.id)?;
            let admin = self.exclusive();
            if admin.is_closed() {
                return Err(Error::Closed("the store"));
            }
            let entry = self.entry(name)?;
            if !read.has_same_meta(&entry) {
                // Another thread has read a later catalogue meanwhile.
                continue;
            }
            let open = lock(&self.open).get(name).cloned();
            if let Some(open) = &open {
                if open.id == entry.id {
                    let leases = self.take_in(open, meta, &entry, keys)?;
                    for (shard, record) in open.table().shards().iter().zip(&entry.shards) {
                        shard.set_record(record.clone());
                    }
                    drop(admin);
                    hear_of_loss(open, &leases);
                    return Ok(Arc::clone(open));
                }
                // The writer has deleted the Logstore and made another one of the same name.
                open.close_gate("the Logstore");
            }
            return Ok(self.open(meta, &entry, keys));
        }
    }

    /// Reads the catalogue again, and the metadata that it names.
    fn read_meta(&self, name: &LogstoreName) -> Result<(Entry, Meta)> {
        // The writer may replace the metadata at the same time, and remove the older file.
        let mut attempts = 0;
        loop {
            self.reload_catalogue()?;
            let entry = self.entry(name)?;
            match self.load_meta(name, &entry) {
                Err(Error::RolledBack { .. } | Error::Truncated { .. }) if attempts < 3 => {
                    attempts += 1
                }
                Err(error @ Error::RolledBack { .. }) => {
                    let newer = self.newer_meta(name, &entry)?.ok_or(error)?;
                    return Ok((entry, newer));
                }
                meta => return meta.map(|meta| (entry, meta)),
            }
        }
    }

    /// The newest authentic metadata of a Logstore, if it is newer than the one that the catalogue
    /// names. The writer removes older metadata only once newer metadata is in force, so this is a
    /// copy of a store whose catalogue was copied first. Metadata that is older would be a rollback.
    fn newer_meta(&self, name: &LogstoreName, entry: &Entry) -> Result<Option<Meta>> {
        let dir = self.env.logstore_dir(entry.id);
        let newest = MetaName::list(&*self.env.disk, &dir)?.pop();
        let Some(newest) = newest.filter(|newest| newest.generation > entry.generation) else {
            return Ok(None);
        };
        let path = dir.join(newest.to_string());
        let load = |keyring: &Keyring| {
            Meta::load_from(&*self.env.disk, &path, self.env.id, entry.id, keyring)
        };
        let meta = self.keys.with_keyring(load)?;
        let fits = meta.config.name == *name && meta.config.shards.len() == entry.shards.len();
        Ok(fits.then_some(meta))
    }

    /// Reads the metadata of a Logstore again if the writer has changed it.
    fn catch_up_with_writer(&self, logstore: &Arc<LogstoreShared>) -> Result<()> {
        self.keys.follow_keyring()?;
        let current = logstore.meta_reference().path(&logstore.dir);
        let files = MetaName::list(&*self.env.disk, &logstore.dir)?;
        if let [only] = files.as_slice()
            && logstore.dir.join(only.to_string()) == current
        {
            return Ok(());
        }
        if files.is_empty() {
            // The writer removes the metadata first when it deletes a Logstore.
            debug!(logstore = %logstore.name, "Logstore deleted by the writer");
            logstore.close_gate("the Logstore");
            return Err(Error::Closed("the Logstore"));
        }
        loop {
            let (read, meta) = self.read_meta(&logstore.name)?;
            let keys = self.keys.loaded_keys(&meta, read.id)?;
            let admin = self.exclusive();
            let entry = self.entry(&logstore.name)?;
            if !read.has_same_meta(&entry) {
                // Another thread has read a later catalogue meanwhile.
                continue;
            }
            if entry.id != logstore.id {
                logstore.close_gate("the Logstore");
                return Err(Error::Closed("the Logstore"));
            }
            let leases = self.take_in(logstore, meta, &entry, keys)?;
            drop(admin);
            hear_of_loss(logstore, &leases);
            return Ok(());
        }
    }

    /// Puts metadata in force that the writer may have changed. The caller holds the
    /// administration, and passes the leases to [`hear_of_loss`].
    fn take_in(
        &self,
        logstore: &Arc<LogstoreShared>,
        meta: Meta,
        entry: &Entry,
        keys: GateKeys,
    ) -> Result<Vec<Arc<Lease>>> {
        let known = logstore.generation();
        if meta.generation < known {
            let (name, found) = (&logstore.name, meta.generation);
            let what = format!(
                "the metadata of Logstore {name} is of generation {found}, it was of {known}"
            );
            return Err(Error::RolledBack { what });
        }
        if meta.generation == known {
            return Ok(Vec::new());
        }
        let changed = logstore.keys_section().as_deref() != meta.keys.as_ref();
        let leases = if changed { use_keys(logstore, keys) } else { Vec::new() };
        let table = logstore.changed_table(&meta.config.shards, &entry.shards);
        logstore.set_meta(meta, self.keys.keyring().newest());
        logstore.put_table(Arc::clone(&table));
        // The files of a read-only shard were complete before the catalogue named this metadata.
        logstore.end_read_only(&table);
        Ok(leases)
    }
}

impl ReloadRecord for Registry {
    fn reload_record(&self, logstore: &LogstoreName, shard: u32) -> Result<ShardRecord> {
        let catalogue = self.load_catalogue()?;
        let entry = catalogue.logstores.get(logstore).ok_or(Error::Closed("the Logstore"))?;
        entry.shards.get(shard as usize).cloned().ok_or(Error::Closed("the shard"))
    }
}

impl FollowWriter for Registry {
    fn catch_up(&self, name: &LogstoreName, id: LogstoreId) -> Result<()> {
        let logstore = lock(&self.open).get(name).cloned().ok_or(Error::Closed("the store"))?;
        if logstore.id != id {
            return Err(Error::Closed("the Logstore"));
        }
        self.catch_up_with_writer(&logstore)
    }
}
