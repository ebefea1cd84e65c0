//! The periodic background jobs of a store that is open for writing.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

use tracing::warn;

use super::{auto_rotation, core::Core, retention};
use crate::schedule::{StoreJob, Task, Wake, Work};

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
        jobs.schedule_retention();
        jobs.schedule_heads();
        jobs
    }

    fn schedule_retention(&self) {
        self.schedule(self.core.env.options.retention_every, StoreJob::Retention);
    }

    fn schedule_heads(&self) {
        self.schedule(self.core.env.options.head_every, StoreJob::Heads);
    }

    fn schedule(&self, delay: Duration, job: StoreJob) {
        self.core.registry.scheduler().after(delay, Work::Store(self.this.clone(), job));
    }

    /// Applies retention, rotates data keys that are due, and writes delayed audit records. The
    /// next run retries each failure.
    fn retain(&self) {
        let Core { env, keys, .. } = &self.core;
        if let Err(error) = retention::apply(&self.core) {
            warn!(store = %env.id, %error, "retention failed");
        }
        if let Err(error) = auto_rotation::rotate_due(&self.core) {
            warn!(store = %env.id, %error, "data key rotation by policy failed");
        }
        keys.audit().settle();
    }

    fn record_heads(&self) {
        if let Err(error) = self.core.registry.record_heads() {
            warn!(store = %self.core.env.id, %error, "recording the heads of shards failed");
        }
    }
}

impl Task<StoreJob> for Jobs {
    fn run(&self, job: StoreJob) {
        match job {
            StoreJob::Retention => {
                if self.core.keys.is_service_key_usable() {
                    self.retain();
                }
                self.schedule_retention();
            }
            StoreJob::Heads => {
                if self.core.keys.is_service_key_usable() {
                    self.record_heads();
                }
                self.schedule_heads();
            }
        }
    }
}
