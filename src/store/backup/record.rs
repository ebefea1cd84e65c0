//! The record of the last run of a backup.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::BackupReport;
use crate::{
    Error, Result,
    error::Location,
    ids::StoreId,
    io::{self, RealDisk},
    store::core::Core,
};

/// The name of its file.
pub(super) const RECORD: &str = "BACKUP";
/// The longest file that is read, in bytes.
const BYTES_MAX: u64 = 64 << 10;

/// The record of the last run of a backup, in its directory, for people and monitoring. Nothing
/// authenticates it and nothing depends on it, except that a directory with such a file may be used
/// for a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct BackupRecord {
    /// The store.
    pub store: StoreId,
    /// When the run began, in microseconds since the Unix epoch.
    pub begun_us: u64,
    /// When the backup was whole, in microseconds since the Unix epoch. `None` while a run is under
    /// way, and after one that was interrupted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_us: Option<u64>,
    /// The number of segments in the backup.
    pub segments: u64,
    /// Their size in bytes.
    pub bytes: u64,
    /// How many of these bytes the run has copied.
    pub bytes_copied: u64,
}

impl BackupRecord {
    pub(super) fn of(core: &Core, report: &BackupReport) -> Self {
        Self {
            store: core.env.id,
            begun_us: report.begun_us,
            finished_us: Some(report.finished_us),
            segments: report.segments,
            bytes: report.bytes,
            bytes_copied: report.bytes_copied,
        }
    }

    /// Reads the record in the directory `dir` of the real file system. Blocks for one small read.
    ///
    /// # Errors
    /// [`Error::Io`], of the kind `NotFound` if the directory has no backup in it;
    /// [`Error::Corrupt`].
    pub fn read(dir: &Path) -> Result<Self> {
        let path = dir.join(RECORD);
        let bytes = io::read_file(&RealDisk, &path, BYTES_MAX).map_err(Error::io("read", &path))?;
        serde_json::from_slice(&bytes).map_err(|error| {
            Error::corrupt(Location::new(path, 0), format!("it does not parse: {error}"))
        })
    }
}
