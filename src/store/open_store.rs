//! The life of an open store: its periodic jobs, and its end.

use std::{fmt, sync::Arc};

use tracing::{info, warn};

use super::{core::Core, env::StoreEnv, jobs::Jobs, retention};
use crate::{
    Result,
    logstore::KeepsOpen,
    sync::atomic::{AtomicBool, Ordering},
};

/// An open store. All handles share it, and dropping the last of them closes the store.
pub(super) struct OpenStore {
    core: Core,
    /// How many records of the catalogue the anchor lacked when the store was opened for reading.
    anchor_lacks: Option<u64>,
    /// Keeps the periodic jobs running.
    _jobs: Option<Arc<Jobs>>,
    /// Whether the store was closed without an error.
    closed: AtomicBool,
}

impl OpenStore {
    /// Starts the periodic jobs of a store that is open for writing.
    pub(super) fn new(core: Core, anchor_lacks: Option<u64>) -> Self {
        let jobs = (!core.env.read_only).then(|| {
            retention::look_at_opening(&core);
            Jobs::start(core.clone())
        });
        Self { core, anchor_lacks, _jobs: jobs, closed: AtomicBool::new(false) }
    }

    pub(super) fn core(&self) -> &Core {
        &self.core
    }

    pub(super) fn anchor_lacks(&self) -> Option<u64> {
        self.anchor_lacks
    }

    /// Closes the store, once or again.
    ///
    /// # Errors
    /// The error that prevented a clean close.
    pub(super) fn close(&self) -> Result<()> {
        let Core { env, keys, registry } = &self.core;
        if keys.check_process().is_err() {
            // A copy of the store that `fork` made: the files belong to the parent process.
            return Ok(());
        }
        // The engine acts on all answers of the KMS and records them, even if the renewal threads
        // have not delivered them yet.
        keys.deliver_answers();
        retention::apply_at_close(&self.core);
        let mut closing = registry.begin_close();
        let excess = retention::find_at_close(&self.core, &closing);
        let borrowed = (!excess.is_empty()).then(|| env.reserve.borrow());
        if registry.record_close(&mut closing, excess.changes()) {
            excess.remove();
        }
        drop(borrowed);
        if closing.is_first {
            env.reserve.fill();
        }
        let result = registry.end_close(closing);
        keys.stop_renewals();
        registry.stop();
        match &result {
            Ok(()) => {
                self.closed.store(true, Ordering::SeqCst);
                info!(store = %env.id, "store closed");
            }
            Err(error) => warn!(store = %env.id, %error, "store closed with an error"),
        }
        result
    }
}

impl fmt::Debug for OpenStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let StoreEnv { id, dir, .. } = &*self.core.env;
        f.debug_struct("OpenStore").field("id", id).field("dir", dir).finish_non_exhaustive()
    }
}

impl KeepsOpen for OpenStore {}

impl Drop for OpenStore {
    fn drop(&mut self) {
        if !self.closed.load(Ordering::SeqCst) {
            // Drop cannot return the error. `Store::close` returns it.
            let _ = self.close();
        }
    }
}
