//! Background jobs: the jobs that can be scheduled, and the tasks that run them.

use std::{
    sync::{Arc, Weak},
    time::Duration,
};

/// A job of a shard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ShardJob {
    /// Write the groups that have lingered in the queue.
    Flush,
    /// Write every group that is queued.
    FlushAll,
    /// As `Flush`, in a thread that may call a KMS.
    FlushByKms,
    /// Open a segment for the groups that were handed over, and queue them.
    Place,
    /// Wake the followers of a shard that another process writes.
    Look,
    /// Write a mark block, unless a later block has carried the mark.
    Mark,
    /// Roll the active segment, if it is old enough.
    RollByAge,
    /// Forget the queue of a Logstore that was deleted.
    Abandon,
    /// Let the shard write again that a full disk has stopped, if there is room.
    Reopen,
}

/// A job of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StoreJob {
    /// Record the heads of the shards, and make the reserve again.
    Heads,
    /// Drop the segments that retention allows to drop, as far as that needs no data key.
    Retention,
    /// The work on data keys: rotation by policy, and the rest of retention.
    Keys,
}

/// A job of a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ReaderJob {
    /// Read the next records for a task that may not block.
    Read,
}

/// Runs jobs of one kind.
pub(crate) trait Task<J>: Send + Sync {
    fn run(&self, job: J);

    /// Whether the job may call a KMS, or wait for a thread that does.
    fn may_wait_for_a_kms(&self, job: J) -> bool;
}

/// A job and the task that runs it. Once the task is gone, the job does nothing.
#[derive(Clone)]
pub(crate) enum Work {
    Shard(Weak<dyn Task<ShardJob>>, ShardJob),
    Store(Weak<dyn Task<StoreJob>>, StoreJob),
    Reader(Weak<dyn Task<ReaderJob>>, ReaderJob),
}

impl Work {
    pub(crate) fn run(&self) {
        match self {
            Self::Shard(task, job) => run(task, *job),
            Self::Store(task, job) => run(task, *job),
            Self::Reader(task, job) => run(task, *job),
        }
    }

    /// Whether the job may call a KMS, or wait for a thread that does.
    pub(crate) fn may_wait_for_a_kms(&self) -> bool {
        match self {
            Self::Shard(task, job) => may_wait(task, *job),
            Self::Store(task, job) => may_wait(task, *job),
            Self::Reader(task, job) => may_wait(task, *job),
        }
    }

    /// The shard whose queue this job flushes, if it is such a job.
    pub(crate) fn flushes(&self) -> Option<Arc<dyn Task<ShardJob>>> {
        match self {
            Self::Shard(task, ShardJob::Flush) => task.upgrade(),
            _ => None,
        }
    }
}

fn run<J>(task: &Weak<dyn Task<J>>, job: J) {
    if let Some(task) = task.upgrade() {
        task.run(job);
    }
}

fn may_wait<J>(task: &Weak<dyn Task<J>>, job: J) -> bool {
    task.upgrade().is_some_and(|task| task.may_wait_for_a_kms(job))
}

/// Schedules jobs.
pub(crate) trait Wake: Send + Sync {
    /// Runs `work` after `delay`.
    fn after(&self, delay: Duration, work: Work);

    /// Writes every group that is queued in any shard, in this thread: for a store without threads
    /// whose memory budget is used up.
    fn relieve(&self);
}
