//! The background task queue: flushes partial batches, writes mark blocks, rolls old segments,
//! applies retention, rotates data keys.
//!
//! One queue is ordered by time, and a few threads run its tasks, the workers. A worker calls no
//! KMS: it passes a task that may wait for one on to a second queue with its own threads. In a
//! store without threads, [`Scheduler::run_due`] runs the tasks when the embedder calls `tick`, so
//! that a test or a simulation controls the order of events.

use std::{cmp::Reverse, collections::BinaryHeap, sync::Arc, thread::JoinHandle, time::Duration};

use crate::{
    io::Clock,
    schedule::{ShardJob, Wake, Work},
    sync::{Condvar, LockRank, Mutex, lock, wait, wait_for_no_kms, wait_timeout},
};

/// The threads for tasks that may wait for a KMS: one for the work on data keys, and another for
/// the segments of Logstores under customer master keys.
const KMS_THREADS: usize = 2;

struct Entry {
    due: Duration,
    /// Keeps entries of the same moment in the order in which they were queued.
    number: u64,
    work: Work,
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (self.due, self.number) == (other.due, other.number)
    }
}
impl Eq for Entry {}
impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Entry {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.number).cmp(&(other.due, other.number))
    }
}

#[derive(Default)]
struct Queue {
    entries: BinaryHeap<Reverse<Entry>>,
    next_number: u64,
    stopped: bool,
}

pub(crate) struct Scheduler {
    clock: Arc<dyn Clock>,
    queue: Mutex<Queue>,
    changed: Condvar,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Runs the tasks that may wait for a KMS. `None` in that scheduler itself.
    for_kms: Option<Arc<Scheduler>>,
}

impl Scheduler {
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        let for_kms = Self::with(Arc::clone(&clock), None);
        Arc::new(Self::with(clock, Some(Arc::new(for_kms))))
    }

    fn with(clock: Arc<dyn Clock>, for_kms: Option<Arc<Scheduler>>) -> Self {
        Self {
            clock,
            queue: Mutex::new(LockRank::SchedulerQueue, Queue::default()),
            changed: Condvar::new(),
            threads: Mutex::new(LockRank::SchedulerThreads, Vec::new()),
            for_kms,
        }
    }

    /// Starts `workers` threads, and those for tasks that may wait for a KMS.
    pub(crate) fn spawn(self: &Arc<Self>, workers: usize) -> std::io::Result<()> {
        self.spawn_named("envelog-worker", workers)?;
        let for_kms = self.for_kms.as_ref();
        for_kms.map_or(Ok(()), |for_kms| for_kms.spawn_named("envelog-keys", KMS_THREADS))
    }

    fn spawn_named(self: &Arc<Self>, name: &str, count: usize) -> std::io::Result<()> {
        for _ in 0..count {
            let this = Arc::clone(self);
            let thread = std::thread::Builder::new().name(name.to_owned());
            lock(&self.threads).push(thread.spawn(move || this.work())?);
        }
        Ok(())
    }

    fn work(&self) {
        if self.for_kms.is_some() {
            wait_for_no_kms();
        }
        let mut queue = lock(&self.queue);
        loop {
            if queue.stopped {
                return;
            }
            let Some(Reverse(first)) = queue.entries.peek() else {
                queue = wait(&self.changed, queue);
                continue;
            };
            let left = first.due.saturating_sub(self.clock.uptime());
            if !left.is_zero() {
                queue = wait_timeout(&self.changed, queue, left);
                continue;
            }
            let Some(Reverse(entry)) = queue.entries.pop() else { continue };
            drop(queue);
            match &self.for_kms {
                Some(for_kms) if entry.work.may_wait_for_a_kms() => {
                    for_kms.after(Duration::ZERO, entry.work);
                }
                _ => entry.work.run(),
            }
            queue = lock(&self.queue);
        }
    }

    /// Runs all tasks that are due now, in this thread.
    pub(crate) fn run_due(&self) {
        loop {
            let entry = {
                let mut queue = lock(&self.queue);
                match queue.entries.peek() {
                    Some(Reverse(first)) if first.due <= self.clock.uptime() => queue.entries.pop(),
                    _ => None,
                }
            };
            let Some(Reverse(entry)) = entry else { return };
            entry.work.run();
        }
    }

    /// Ends the threads. Queued tasks do not run.
    pub(crate) fn stop(&self) {
        lock(&self.queue).stopped = true;
        self.changed.notify_all();
        let this_thread = std::thread::current().id();
        for thread in lock(&self.threads).drain(..) {
            // A worker thread may drop the last handle of a store.
            if thread.thread().id() != this_thread {
                let _ = thread.join();
            }
        }
        if let Some(for_kms) = &self.for_kms {
            for_kms.stop();
        }
    }
}

impl Wake for Scheduler {
    fn after(&self, delay: Duration, work: Work) {
        let mut queue = lock(&self.queue);
        let (due, number) = (self.clock.uptime() + delay, queue.next_number);
        queue.next_number += 1;
        queue.entries.push(Reverse(Entry { due, number, work }));
        drop(queue);
        self.changed.notify_one();
    }

    fn relieve(&self) {
        let waiting: Vec<_> = lock(&self.queue)
            .entries
            .iter()
            .filter_map(|Reverse(entry)| entry.work.flushes())
            .collect();
        for task in waiting {
            task.run(ShardJob::FlushAll);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Weak,
        atomic::{AtomicU64, Ordering},
    };

    use super::*;
    use crate::schedule::Task;

    #[derive(Debug, Default)]
    struct TestClock(AtomicU64);

    impl Clock for TestClock {
        fn wall_us(&self) -> u64 {
            0
        }
        fn uptime(&self) -> Duration {
            Duration::from_millis(self.0.load(Ordering::SeqCst))
        }
    }

    #[derive(Default)]
    struct Recorder(Mutex<Vec<ShardJob>>);

    impl Task<ShardJob> for Recorder {
        fn run(&self, job: ShardJob) {
            lock(&self.0).push(job);
        }

        fn may_wait_for_a_kms(&self, job: ShardJob) -> bool {
            job == ShardJob::Mark
        }
    }

    /// A task that waits until it is let go.
    struct Waiting(std::sync::Barrier);

    impl Task<ShardJob> for Waiting {
        fn run(&self, _job: ShardJob) {
            self.0.wait();
        }

        fn may_wait_for_a_kms(&self, _job: ShardJob) -> bool {
            true
        }
    }

    fn at(scheduler: &Scheduler, task: &Arc<Recorder>, ms: u64, job: ShardJob) {
        scheduler.after(
            Duration::from_millis(ms),
            Work::Shard(Arc::<Recorder>::downgrade(task) as _, job),
        );
    }

    #[test]
    fn due_tasks_run_in_order_and_no_others() {
        let clock = Arc::new(TestClock::default());
        let scheduler = Scheduler::new(Arc::clone(&clock) as _);
        let task = Arc::new(Recorder::default());
        at(&scheduler, &task, 20, ShardJob::Mark);
        at(&scheduler, &task, 10, ShardJob::Flush);
        at(&scheduler, &task, 10, ShardJob::RollByAge);
        at(&scheduler, &task, 30, ShardJob::Flush);
        scheduler.run_due();
        assert!(lock(&task.0).is_empty());
        clock.0.store(20, Ordering::SeqCst);
        scheduler.run_due();
        assert_eq!(*lock(&task.0), [ShardJob::Flush, ShardJob::RollByAge, ShardJob::Mark]);
    }

    #[test]
    fn relief_flushes_at_once() {
        let scheduler = Scheduler::new(Arc::new(TestClock::default()));
        let task = Arc::new(Recorder::default());
        at(&scheduler, &task, 1000, ShardJob::Mark);
        at(&scheduler, &task, 1000, ShardJob::Flush);
        scheduler.relieve();
        assert_eq!(*lock(&task.0), [ShardJob::FlushAll]);
    }

    #[test]
    fn threads_run_due_tasks_and_end() {
        let scheduler = Scheduler::new(Arc::new(crate::io::SystemClock));
        scheduler.spawn(2).unwrap();
        let task = Arc::new(Recorder::default());
        let gone = Arc::new(Recorder::default());
        at(&scheduler, &gone, 0, ShardJob::Flush);
        drop(gone);
        for _ in 0..100 {
            at(&scheduler, &task, 1, ShardJob::Flush);
        }
        while lock(&task.0).len() < 100 {
            std::thread::yield_now();
        }
        scheduler.stop();
    }

    #[test]
    fn a_task_that_waits_for_a_kms_holds_no_worker() {
        let scheduler = Scheduler::new(Arc::new(crate::io::SystemClock));
        scheduler.spawn(1).unwrap();
        let waiting = Arc::new(Waiting(std::sync::Barrier::new(KMS_THREADS + 1)));
        let waits: Weak<dyn Task<ShardJob>> = Arc::<Waiting>::downgrade(&waiting);
        for _ in 0..KMS_THREADS {
            scheduler.after(Duration::ZERO, Work::Shard(Weak::clone(&waits), ShardJob::Mark));
        }
        let task = Arc::new(Recorder::default());
        at(&scheduler, &task, 0, ShardJob::Mark);
        at(&scheduler, &task, 0, ShardJob::Flush);
        while lock(&task.0).is_empty() {
            std::thread::yield_now();
        }
        assert_eq!(*lock(&task.0), [ShardJob::Flush]);
        waiting.0.wait();
        while lock(&task.0).len() < 2 {
            std::thread::yield_now();
        }
        scheduler.stop();
    }
}
