//! The immutable context of an open store.

use std::{path::PathBuf, sync::Arc};

use tracing::{info, warn};

use super::{
    options::{Background, StoreOptions},
    reserve::Reserve,
    trusted_clock::{Look, TrustedClock},
};
use crate::{
    crypto::CryptoProvider,
    ids::{LogstoreId, StoreId},
    io::{Clock, Disk, Random},
};

/// The identity, the settings and the injected dependencies of an open store. It never changes, and
/// has no lock but that of the trusted clock.
pub(crate) struct StoreEnv {
    pub(crate) id: StoreId,
    pub(crate) dir: PathBuf,
    pub(crate) read_only: bool,
    pub(crate) options: StoreOptions,
    /// In a store that is open for writing, this disk checks the fence before each rename.
    pub(crate) disk: Arc<dyn Disk>,
    /// The room that is kept for a full disk.
    pub(crate) reserve: Arc<Reserve>,
    /// The whole disk, for a directory outside the store.
    pub(crate) outside: Arc<dyn Disk>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) random: Arc<dyn Random>,
    pub(crate) provider: Arc<dyn CryptoProvider>,
    /// How far the wall clock is trusted.
    pub(crate) trusted: TrustedClock,
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

    /// Reads the wall clock, and decides whether ages by it may destroy data or rotate keys. Logs a
    /// suspension and its end.
    pub(crate) fn look_at_clock(&self) -> Look {
        let look = self.trusted.look(&*self.clock, self.options.clock_settle);
        if look.has_changed {
            let Look { now_us, trusted_us, .. } = look;
            let store = self.id;
            match look.suspended {
                true => {
                    warn!(%store, now_us, trusted_us, "clock ahead of the newest trusted time; retention by age suspended");
                }
                false => info!(%store, now_us, "clock trusted again; retention by age resumed"),
            }
        }
        look
    }
}
