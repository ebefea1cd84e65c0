//! The immutable context of an open store.

use std::{path::PathBuf, sync::Arc, time::Duration};

use super::options::{Background, StoreOptions};
use crate::{
    crypto::CryptoProvider,
    ids::{LogstoreId, StoreId},
    io::{Clock, Disk, Random},
};

/// A difference between wall clock and uptime above this counts as a jump of the wall clock.
const JUMP_MAX: Duration = Duration::from_secs(3600);

/// The identity, the settings and the injected dependencies of an open store. It has no locks and
/// never changes.
pub(crate) struct StoreEnv {
    pub(crate) id: StoreId,
    pub(crate) dir: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) options: StoreOptions,
    /// In a store that is open for writing, this disk checks the fence before each rename.
    pub(crate) disk: Arc<dyn Disk>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) random: Arc<dyn Random>,
    pub(crate) provider: Arc<dyn CryptoProvider>,
    /// Both clocks at the time when the store was opened.
    pub(crate) opened: OpenedAt,
}

impl StoreEnv {
    /// The directory that has a directory for each Logstore.
    pub(crate) fn logstores_dir(&self) -> PathBuf {
        self.dir.join("logstores")
    }

    pub(crate) fn logstore_dir(&self, id: LogstoreId) -> PathBuf {
        self.logstores_dir().join(id.to_string())
    }

    pub(crate) fn probes_dir(&self) -> PathBuf {
        self.dir.join("probes")
    }

    /// Whether threads of the store do the background work.
    pub(crate) fn has_threads(&self) -> bool {
        self.options.background == Background::Threads
    }

    /// Whether the wall clock has jumped since the store was opened. Ages that were computed from
    /// it are then not trusted for deleting data or rotating keys.
    pub(crate) fn has_clock_jumped(&self) -> bool {
        let OpenedAt { wall_us, uptime } = self.opened;
        let passed = self.clock.uptime().saturating_sub(uptime).as_micros();
        let passed = u64::try_from(passed).unwrap_or(u64::MAX);
        let expected_us = wall_us.saturating_add(passed);
        self.clock.wall_us().abs_diff(expected_us) > JUMP_MAX.as_micros() as u64
    }
}

/// The readings of the wall clock and of the uptime clock at one moment.
pub(crate) struct OpenedAt {
    wall_us: u64,
    uptime: Duration,
}

impl OpenedAt {
    pub(crate) fn now(clock: &dyn Clock) -> Self {
        Self { wall_us: clock.wall_us(), uptime: clock.uptime() }
    }
}
