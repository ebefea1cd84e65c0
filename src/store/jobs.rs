//! The periodic background jobs of a store that is open for writing.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tracing::warn;

use super::{auto_rotation, core::Core, retention};
use crate::schedule::{StoreJob, Task, Wake, Work};

/// The shortest time between the opening of a store and the first run of retention.
const FIRST_RUN_AFTER: Duration = Duration::from_secs(1);

/// Runs the jobs of a store that do not concern a single shard. The scheduler keeps only a weak
/// reference, so no job runs after the owner of this object is gone.
pub(super) struct Jobs {
    this: Weak<Jobs>,
    core: Core,
}

impl Jobs {
    /// Schedules the first run of each job.
    pub(super) fn start(core: Core) -> Arc<Self> {
        let jobs = Arc::new_cyclic(|this| Self { this: Weak::clone(this), core });
        // A process that ends within this time applies retention when it closes the store.
        let soon = retention::due_in(&jobs.core).max(FIRST_RUN_AFTER);
        jobs.schedule_after(StoreJob::Retention, soon);
        for job in [StoreJob::Keys, StoreJob::Heads] {
            jobs.schedule(job);
        }
        jobs
    }

    fn schedule(&self, job: StoreJob) {
        let options = &self.core.env.options;
        let after = match job {
            StoreJob::Heads => options.head_every,
            // Apart from each other, because a KMS may be slow.
            StoreJob::Retention | StoreJob::Keys => options.retention_every,
        };
        self.schedule_after(job, after);
    }

    fn schedule_after(&self, job: StoreJob, after: Duration) {
        self.core.registry.scheduler().after(after, Work::Store(self.this.clone(), job));
    }

    /// Applies retention as far as that needs no data key, and writes delayed audit records. The
    /// next run retries each failure.
    fn retain(&self) {
        let keys = &self.core.keys;
        let result = retention::apply_without_kms(&self.core);
        retention::note_failure(&self.core, "without_kms", result);
        keys.audit().record_omitted();
    }

    /// Applies the rest of retention, and rotates data keys that are due. The next run retries each
    /// failure.
    fn tend_data_keys(&self) {
        let Core { env, .. } = &self.core;
        retention::note_failure(&self.core, "with_kms", retention::apply_with_kms(&self.core));
        if let Err(error) = auto_rotation::rotate_due(&self.core) {
            warn!(store = %env.id, %error, "data key rotation by policy failed");
        }
    }

    fn record_heads(&self) {
        if let Err(error) = self.core.registry.record_heads() {
            warn!(store = %self.core.env.id, %error, "recording the heads of shards failed");
        }
    }
}

impl Task<StoreJob> for Jobs {
    fn run(&self, job: StoreJob) {
        if self.core.keys.is_service_key_usable() {
            match job {
                StoreJob::Retention => self.retain(),
                StoreJob::Keys => self.tend_data_keys(),
                StoreJob::Heads => {
                    self.record_heads();
                    self.core.tend_reserve();
                }
            }
        }
        self.schedule(job);
    }

    fn may_wait_for_a_kms(&self, job: StoreJob) -> bool {
        match job {
            StoreJob::Heads => false,
            // It is admitted by the lease of the service key.
            StoreJob::Retention => self.core.keys.has_service_lease(),
            StoreJob::Keys => true,
        }
    }
}
