//! The store that is copied, as its writer changes it meanwhile.

use std::{path::PathBuf, sync::Arc};

use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    logstore::{LogstoreShared, Meta, MetaName},
    shard::{SegmentRef, Shard},
    store::{
        catalogue::{Catalogue, Entry, Loaded, load_newest},
        core::Core,
    },
};

/// How often a Logstore is looked at again that changes meanwhile.
const ATTEMPTS: u32 = 16;

/// The store by its files.
pub(super) struct Source<'a> {
    core: &'a Core,
    loaded: Loaded,
}

/// A Logstore at one moment: this metadata was in force when its segments were listed, and the
/// records of its shards were in the catalogue before.
pub(super) struct View {
    pub(super) name: LogstoreName,
    pub(super) entry: Entry,
    pub(super) logstore: Arc<LogstoreShared>,
    pub(super) meta: Meta,
    /// The name of the metadata file, and its bytes.
    pub(super) meta_file: (PathBuf, Vec<u8>),
    pub(super) shards: Vec<(Arc<Shard>, Arc<Vec<SegmentRef>>)>,
}

impl<'a> Source<'a> {
    pub(super) fn new(core: &'a Core) -> Result<Self> {
        Ok(Self { core, loaded: load(core)? })
    }

    /// The catalogue as it was read last.
    pub(super) fn catalogue(&self) -> &Catalogue {
        &self.loaded.catalogue
    }

    /// The epoch of the writer that made the catalogue.
    pub(super) fn epoch(&self) -> u64 {
        self.loaded.place.epoch
    }

    /// Reads the catalogue again.
    pub(super) fn reload(&mut self) -> Result<()> {
        self.loaded = load(self.core)?;
        Ok(())
    }

    /// Looks at a Logstore. `None` if there is none of the name.
    ///
    /// # Errors
    /// The integrity errors of its metadata; [`Error::Io`].
    pub(super) fn view(&mut self, name: &LogstoreName) -> Result<Option<View>> {
        let mut seen = Err(Error::LogstoreMissing(name.clone()));
        for _ in 0..ATTEMPTS {
            let Some(entry) = self.catalogue().logstores.get(name).cloned() else {
                return Ok(None);
            };
            seen = self.look(name, &entry);
            if let Ok((view, true)) = seen {
                return Ok(Some(view));
            }
            self.reload()?;
            let now = self.catalogue().logstores.get(name);
            if now == Some(&entry) {
                // The catalogue does not explain the difference, so it is none of the writer's.
                break;
            }
        }
        match seen {
            Ok((view, _)) => Ok(Some(view)),
            Err(Error::LogstoreMissing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Looks at a Logstore, and whether its files are those that the catalogue names.
    fn look(&self, name: &LogstoreName, entry: &Entry) -> Result<(View, bool)> {
        let Core { env, registry, .. } = self.core;
        let logstore = registry.logstore(name)?;
        if logstore.id != entry.id {
            return Err(Error::LogstoreMissing(name.clone()));
        }
        let dir = env.logstore_dir(entry.id);
        let (meta, bytes) = registry.load_meta_file(name, entry)?;
        let path = entry.meta().path(&dir);
        let mut is_settled = true;
        let mut shards = Vec::new();
        for shard in registry.shards_in(&logstore, &meta, &env.disk, &dir, &entry.shards) {
            let segments = shard.segments(false)?;
            is_settled &=
                !segments.iter().any(|one| one.is_missing() && !shard.is_lost(one.ordinal));
            shards.push((shard, segments));
        }
        // Changed metadata has a file of its own before it is in force.
        let files = MetaName::list(&*env.disk, &dir)?;
        is_settled &= files.iter().all(|file| dir.join(file.to_string()) == path);
        let meta_file = (PathBuf::from(path.file_name().unwrap_or_default()), bytes);
        let (name, entry) = (name.clone(), entry.clone());
        Ok((View { name, entry, logstore, meta, meta_file, shards }, is_settled))
    }

    /// Whether a segment that is not there was dropped by retention, or with its Logstore.
    ///
    /// # Errors
    /// As [`Source::reload`].
    pub(super) fn is_dropped(
        &mut self,
        name: &LogstoreName,
        entry: &Entry,
        shard: u32,
        ordinal: u64,
    ) -> Result<bool> {
        self.reload()?;
        let now = self.catalogue().logstores.get(name).filter(|now| now.id == entry.id);
        let record = now.and_then(|now| now.shards.get(shard as usize));
        Ok(record.is_none_or(|record| record.first_ordinal > ordinal))
    }
}

/// Reads the newest catalogue file. The writer may replace it at the same time.
fn load(core: &Core) -> Result<Loaded> {
    let Core { env, keys, .. } = core;
    keys.follow_keyring()?;
    let read = || keys.with_keyring(|keyring| load_newest(&*env.disk, &env.dir, env.id, keyring));
    match read() {
        // A rotation of the service key may have ended in between.
        Err(error) if error.kind() == ErrorKind::Integrity => {
            keys.follow_keyring()?;
            read()
        }
        loaded => loaded,
    }
}
