//! The state that all calls share, and the threads on which blocking ones run.

use std::{
    collections::HashMap,
    sync::{Arc, PoisonError, RwLock},
};

use envelog::{Logstore, LogstoreName, Store};
use tokio::{
    sync::{Semaphore, watch},
    task::spawn_blocking,
};

use crate::{
    admin::Admin,
    auth::AccessKeys,
    console::Console,
    error::{ApiError, Result},
    groups::Groups,
    memory::Budget,
    metrics::Counters,
    names,
    projects::Projects,
};

/// The threads that the calls to one Logstore may block at once. A KMS that hangs blocks those of
/// its Logstores, and leaves the others to all other callers.
const THREADS_PER_LOGSTORE: usize = 16;

/// The service.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) store: Store,
    pub(crate) base_host: String,
    pub(crate) region: String,
    /// `None`: every caller may do everything. The service serves this machine alone then.
    pub(crate) keys: Option<AccessKeys>,
    pub(crate) projects: Projects,
    pub(crate) groups: Groups,
    pub(crate) memory: Budget,
    pub(crate) counters: Counters,
    pub(crate) console: Console,
    pub(crate) admin: Admin,
    /// Becomes true when the service is to stop.
    pub(crate) stopping: watch::Receiver<bool>,
    pub(crate) open: OpenLogstores,
}

/// The Logstores that calls have used.
#[derive(Debug, Default)]
pub(crate) struct OpenLogstores(RwLock<Known>);

#[derive(Debug, Default)]
struct Known {
    by_name: HashMap<LogstoreName, Open>,
    /// Counts the Logstores that were forgotten.
    forgotten: u64,
}

impl OpenLogstores {
    /// The Logstore of this name, if it is known, and how many were forgotten.
    fn find(&self, name: &LogstoreName) -> (Option<Open>, u64) {
        let known = self.0.read().unwrap_or_else(PoisonError::into_inner);
        (known.by_name.get(name).cloned(), known.forgotten)
    }

    /// Remembers a Logstore, unless one has been deleted since `forgotten` was read: it may be
    /// this.
    fn remember(&self, logstore: Logstore, forgotten: u64) -> Open {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if known.forgotten != forgotten {
            return Open::new(logstore);
        }
        let name = logstore.name().clone();
        known.by_name.entry(name).or_insert_with(|| Open::new(logstore)).clone()
    }

    /// Forgets a Logstore that is deleted.
    pub(crate) fn forget(&self, name: &LogstoreName) {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        known.by_name.remove(name);
        known.forgotten += 1;
    }
}

/// A Logstore that calls have used.
#[derive(Clone, Debug)]
pub(crate) struct Open {
    pub(crate) logstore: Logstore,
    threads: Arc<Semaphore>,
}

impl Open {
    fn new(logstore: Logstore) -> Self {
        Self { logstore, threads: Arc::new(Semaphore::new(THREADS_PER_LOGSTORE)) }
    }

    /// Runs a call that may block on a thread that may, when the Logstore has one free.
    ///
    /// # Errors
    /// The error of the call.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Logstore) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let permit = Arc::clone(&self.threads).acquire_owned().await;
        let logstore = self.logstore.clone();
        let done = spawn_blocking(move || {
            // A call whose client has gone keeps its thread until it is done.
            let _permit = permit;
            call(&logstore)
        });
        done.await.unwrap_or_else(failed)
    }
}

/// Runs a call that may block, and is about no Logstore in particular.
///
/// # Errors
/// The error of the call.
pub(crate) async fn run<T: Send + 'static>(
    call: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    spawn_blocking(call).await.unwrap_or_else(failed)
}

fn failed<T>(error: tokio::task::JoinError) -> Result<T> {
    tracing::error!(%error, "a call has panicked");
    Err(ApiError::internal())
}

impl Service {
    /// A Logstore of a project.
    ///
    /// # Errors
    /// 404 if the project or the Logstore does not exist.
    pub(crate) async fn logstore(self: &Arc<Self>, project: &str, logstore: &str) -> Result<Open> {
        self.projects.get(project)?;
        let missing = |_| ApiError::no_logstore(logstore);
        let name = LogstoreName::new(project, logstore).map_err(missing)?;
        if !names::is_served(&name) {
            return Err(ApiError::no_logstore(logstore));
        }
        let (known, forgotten) = self.open.find(&name);
        if let Some(known) = known {
            return Ok(known);
        }
        let service = Arc::clone(self);
        run(move || Ok(service.open.remember(service.store.logstore(&name)?, forgotten))).await
    }
}
