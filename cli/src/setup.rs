//! What the global options amount to: which store, which keys, which KMS.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
    sync::Arc,
};

use envelog::{Logstore, LogstoreName, ReadOptions, Store, StoreBuilder, StoreOptions, crypto::AwsLc, kms::LocalKms};

use crate::{
    args::Global,
    exit::{Failure, Result},
};

/// Where everything is, and how it is asked for.
pub(crate) struct Setup {
    pub(crate) store: PathBuf,
    pub(crate) keyring: PathBuf,
    pub(crate) kms_dirs: Vec<PathBuf>,
    pub(crate) options: StoreOptions,
    pub(crate) json: bool,
}

impl Setup {
    pub(crate) fn new(global: Global) -> Result<Self> {
        let Global { store, keyring, kms_dir, kms, json, revalidate_every, outage_grace } = global;
        let mut kms_dirs = vec![kms_dir.unwrap_or_else(|| with_suffix(&store, ".kms"))];
        for url in kms {
            match url.strip_prefix("local:") {
                Some(dir) if !dir.is_empty() => kms_dirs.push(PathBuf::from(dir)),
                _ => {
                    return Err(Failure::refused(
                        "kms_unsupported",
                        format!("no KMS backend for \"{url}\" is built in: give local:DIR, or --kms-dir DIR"),
                    ));
                }
            }
        }
        let mut options = StoreOptions::default();
        options.outage_grace = outage_grace.unwrap_or(options.outage_grace);
        // A short grace alone means that the KMS is to be asked as often.
        options.revalidate_every =
            revalidate_every.unwrap_or_else(|| options.revalidate_every.min(options.outage_grace));
        let keyring = keyring.unwrap_or_else(|| with_suffix(&store, ".keyring"));
        Ok(Self { store, keyring, kms_dirs, options, json })
    }

    pub(crate) fn builder(&self) -> StoreBuilder {
        let builder = builder(&self.store, &self.keyring).options(self.options);
        self.kms_dirs.iter().fold(builder, |builder, dir| builder.kms(Arc::new(LocalKms::at(dir))))
    }

    /// The store, for writing.
    pub(crate) fn open(&self) -> Result<Store> {
        Ok(self.builder().open()?)
    }

    /// The store, beside whoever writes.
    pub(crate) fn open_read_only(&self) -> Result<Store> {
        Ok(self.builder().open_read_only()?)
    }

    /// The directory of the embedded KMS that the `kms` commands are about.
    pub(crate) fn kms_dir(&self) -> &Path {
        &self.kms_dirs[0]
    }
}

/// A store and its keyring, with the fastest cryptography there is.
pub(crate) fn builder(store: &Path, keyring: &Path) -> StoreBuilder {
    Store::builder(store, keyring, AwsLc::new())
}

/// Fails when the key of the Logstore may not be used now. To open a reader asks that, and reads nothing yet.
pub(crate) fn check_access(logstore: &Logstore) -> Result {
    let shard = logstore.config().shards.first().map_or(0, |shard| shard.id);
    Ok(logstore.read(shard, &ReadOptions::default()).map(drop)?)
}

/// The Logstore that an argument names.
pub(crate) fn name(argument: &str) -> Result<LogstoreName> {
    Ok(argument.parse()?)
}

/// The Logstore that an argument names, or all of them.
pub(crate) fn names(store: &Store, argument: Option<&str>) -> Result<Vec<LogstoreName>> {
    match argument {
        Some(argument) => Ok(vec![name(argument)?]),
        None => Ok(store.list()?),
    }
}

/// Adds to the last part of a path: `data` becomes `data.keyring`, and so does `data/`.
fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name: OsString = path.components().as_path().into();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyring_and_kms_lie_beside_the_store() {
        assert_eq!(with_suffix(Path::new("/var/data"), ".kms"), Path::new("/var/data.kms"));
        assert_eq!(with_suffix(Path::new("./data/"), ".keyring"), Path::new("./data.keyring"));
    }
}
