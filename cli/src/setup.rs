//! Derives the paths, the KMS list and the store options from the global options.

use std::{
    ffi::{OsStr, OsString},
    fmt::Display,
    io,
    path::{Component, Path, PathBuf},
    sync::Arc,
};

use envelog::{
    Cmk, Logstore, LogstoreName, ReadOptions, Store, StoreBuilder, StoreOptions,
    admin::DirAnchor,
    crypto::CryptoProvider,
    error::ConfigError,
    kms::{self, Kms, LocalKms},
};

use crate::{
    args::Global,
    exit::{Failure, Result},
    input, output,
    settings::StoreSettings,
};

/// The store, if no setting names one.
const STORE: &str = "./envelog-data";

/// The paths and settings of a run.
#[derive(Clone)]
pub(crate) struct Setup {
    /// The store, if this process serves it, and the command came from a caller.
    pub(crate) served: Option<Store>,
    pub(crate) store: PathBuf,
    pub(crate) keyring: PathBuf,
    /// The directory of the embedded KMS, on which the `kms` commands operate.
    pub(crate) kms_dir: PathBuf,
    /// The KMSs given by URL. They come before the embedded KMS, which serves every region for
    /// which it has a key.
    pub(crate) kms: Vec<Arc<dyn Kms>>,
    pub(crate) options: StoreOptions,
    anchor: Option<PathBuf>,
    without_anchor: bool,
    /// Whether retired versions of the service key are accepted.
    pub(crate) accept_retired: bool,
    pub(crate) json: bool,
}

impl Setup {
    pub(crate) fn new(global: Global) -> Result<Self> {
        let Global {
            settings: _,
            store,
            keyring,
            anchor,
            without_anchor,
            accept_retired,
            kms_dir,
            kms,
            json,
            verbose: _,
            log: _,
            endpoint: _,
            access_key: _,
            ca: _,
            of_store: StoreSettings(options),
        } = global;
        let store = store.unwrap_or_else(|| PathBuf::from(STORE));
        let is_default = kms_dir.is_none();
        let kms_dir = kms_dir.unwrap_or_else(|| with_suffix(&store, ".kms"));
        let mut kms = kms
            .iter()
            // The environment variable may end with a newline.
            .filter(|url| !url.is_empty())
            .map(|url| {
                kms::from_url(url)
                    .map_err(|error| Failure::refused("kms_unsupported", error.to_string()))
            })
            .collect::<Result<Vec<_>>>()?;
        // A default that is not there would be an outage to the keys of the other KMSs.
        if !is_default || !is_missing(&kms_dir) {
            kms.push(Arc::new(LocalKms::at(&kms_dir)));
        }
        let inside = |dir: &PathBuf| {
            let (anchor, store) = (dir.canonicalize().ok()?, store.canonicalize().ok()?);
            anchor.starts_with(store).then_some(())
        };
        if let Some(dir) = &anchor
            && inside(dir).is_some()
        {
            let message = format!(
                "the anchor {} is inside the store directory: it protects nothing there",
                dir.display()
            );
            return Err(Failure::usage(message));
        }
        let keyring = keyring.unwrap_or_else(|| with_suffix(&store, ".keyring"));
        Ok(Self {
            served: None,
            store,
            keyring,
            kms_dir,
            kms,
            options,
            anchor,
            without_anchor: without_anchor.unwrap_or(false),
            accept_retired: accept_retired.unwrap_or(false),
            json: json.unwrap_or(false),
        })
    }

    pub(crate) fn builder(&self) -> StoreBuilder {
        let builder = builder(&self.store, &self.keyring).options(self.options);
        let builder = builder.accept_retired_versions(self.accept_retired);
        let builder = self.kms.iter().fold(builder, |builder, kms| builder.kms(Arc::clone(kms)));
        let builder = match &self.anchor {
            Some(dir) => builder.anchor(Arc::new(DirAnchor::new(dir))),
            None => builder,
        };
        if self.without_anchor { builder.without_anchor() } else { builder }
    }

    /// The directory of the anchor.
    pub(crate) fn anchor(&self) -> Option<&Path> {
        self.anchor.as_deref()
    }

    /// Opens the store for writing.
    pub(crate) fn open(&self) -> Result<Store> {
        match &self.served {
            Some(store) => Ok(store.clone()),
            None => Ok(self.builder().open()?),
        }
    }

    /// Opens the store read-only. Another process may be writing it. Prints a note if the store has
    /// an anchor but is not compared with it.
    pub(crate) fn open_read_only(&self) -> Result<Store> {
        let store = match &self.served {
            Some(store) => store.clone(),
            None => self.builder().open_read_only()?,
        };
        let anchor = store.admin().anchor_status();
        if anchor.anchored && !anchor.configured && !self.without_anchor {
            self.notice(
                "the store has an anchor: without --anchor a rollback of the store is not detected",
            );
        }
        Ok(store)
    }

    /// Closes a store that was open for writing, unless it is served. Prints a note if the anchor
    /// is behind the store.
    pub(crate) fn close(&self, store: Store) -> Result {
        let handle = store.clone();
        if self.served.is_none() {
            store.close()?;
        }
        let anchor = handle.admin().anchor_status();
        if anchor.configured && anchor.behind.is_some() {
            let why = anchor.error.unwrap_or_else(|| "it does not respond".to_owned());
            self.notice(format_args!("the anchor is behind the store: {why}"));
        }
        Ok(())
    }

    /// Prints a note on standard error, unless `--json` is set.
    pub(crate) fn notice(&self, text: impl Display) {
        if !self.json {
            output::notice(text);
        }
    }
}

/// The fastest cryptography provider of this build.
#[cfg(feature = "aws-lc")]
pub(crate) fn provider() -> impl CryptoProvider + 'static {
    envelog::crypto::AwsLc::new()
}

/// The fastest cryptography provider of this build.
#[cfg(not(feature = "aws-lc"))]
pub(crate) fn provider() -> impl CryptoProvider + 'static {
    envelog::crypto::Sm4Simd::new()
}

/// A builder with the fastest cryptography provider of this build.
pub(crate) fn builder(store: &Path, keyring: &Path) -> StoreBuilder {
    Store::builder(store, keyring, provider())
}

/// Fails if the Logstore's key may not be used now. Opening a reader checks the access and reads no
/// data.
pub(crate) fn check_access(logstore: &Logstore) -> Result {
    let shard = logstore.config().shards.first().map_or(0, |shard| shard.id);
    Ok(logstore.read(shard, &ReadOptions::default()).map(drop)?)
}

/// Parses a master key argument.
pub(crate) fn cmk(argument: &OsStr) -> Result<Cmk> {
    serde_json::from_str(&input::text_argument(argument)?)
        .map_err(|error| ConfigError::Json(error.to_string()).into())
}

/// Parses a Logstore name argument.
pub(crate) fn name(argument: &str) -> Result<LogstoreName> {
    Ok(argument.parse()?)
}

/// The Logstore that an argument names, or all Logstores without an argument.
pub(crate) fn names(store: &Store, argument: Option<&str>) -> Result<Vec<LogstoreName>> {
    match argument {
        Some(argument) => Ok(vec![name(argument)?]),
        None => Ok(store.list()?),
    }
}

/// Appends a suffix to the last part of a path: `data` becomes `data.keyring`, and so does `data/`.
/// A path without a last name, such as `.`, is first made absolute, so that the result is next to
/// the directory and not inside it.
fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let named = matches!(path.components().next_back(), Some(Component::Normal(_)));
    let absolute = (!named).then(|| path.canonicalize().ok()).flatten();
    let path = absolute.as_deref().unwrap_or(path);
    let mut name: OsString = path.components().as_path().into();
    name.push(suffix);
    name.into()
}

/// Whether nothing has this name. A directory that cannot be looked at is not missing.
fn is_missing(path: &Path) -> bool {
    matches!(path.symlink_metadata(), Err(error) if error.kind() == io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyring_and_kms_lie_beside_the_store() {
        assert_eq!(with_suffix(Path::new("/var/data"), ".kms"), Path::new("/var/data.kms"));
        assert_eq!(with_suffix(Path::new("./data/"), ".keyring"), Path::new("./data.keyring"));
        let here = std::env::current_dir().unwrap();
        let beside = |dir: &Path| {
            dir.with_file_name(format!("{}.keyring", dir.file_name().unwrap().to_string_lossy()))
        };
        assert_eq!(with_suffix(Path::new("."), ".keyring"), beside(&here));
        assert_eq!(with_suffix(Path::new("src/.."), ".keyring"), beside(&here));
        assert_eq!(with_suffix(Path::new(".."), ".keyring"), beside(here.parent().unwrap()));
    }
}
