//! The threads that help the writers of a store: they make blocks and hash payloads.
//!
//! Compression takes most of the time of an append, and hashing a payload takes about as long as
//! sealing it. A writer that has several blocks to make shares that work with these threads. A
//! thread of the store never waits for a job that no thread has begun: it does that job itself. So
//! the threads are only ever a gain, and a store without threads works the same way.

use std::{collections::VecDeque, io, num::NonZero, sync::Arc, thread::JoinHandle};

use zeroize::Zeroize;

use crate::{
    segment::{Compressor, SealBuffer},
    sync::{Condvar, LockRank, Mutex, lock, wait},
};

/// How many threads help at most. More writers than this compress in their own threads.
const THREADS_MAX: usize = 4;
/// How many jobs may wait for a thread. The caller does any further job itself.
const JOBS_MAX: usize = 32;
/// How many buffers are kept for the next blocks, and how large they may be, in bytes.
const BUFFERS_MAX: usize = 8;
const BUFFER_BYTES_MAX: usize = 1 << 20;

/// What a thread needs to make blocks, reused for each.
#[derive(Default)]
pub(super) struct Scratch {
    /// The plaintext of a block.
    pub(super) raw: Vec<u8>,
    pub(super) compressor: Compressor,
}

impl Scratch {
    /// Overwrites the plaintext of the last block.
    pub(super) fn wipe(&mut self) {
        if !self.raw.is_empty() {
            self.raw.zeroize();
        }
    }
}

/// Work that a helper may do.
pub(super) trait Job: Send + Sync {
    /// Does the work, unless another thread has begun it. Returns whether it did.
    fn run(&self, scratch: &mut Scratch) -> bool;
}

/// The helpers of a store.
pub(crate) struct Helpers {
    queue: Arc<Queue>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Buffers of sealed blocks.
    buffers: Mutex<Vec<SealBuffer>>,
    /// Whether payloads are hashed at all. Only a benchmark that discards its store turns this off.
    hashes: bool,
}

struct Queue {
    jobs: Mutex<Jobs>,
    changed: Condvar,
    /// One for each thread, which holds its lock while it works.
    scratches: Vec<Mutex<Scratch>>,
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Arc<dyn Job>>,
    /// Whether there are threads that take jobs.
    taken: bool,
}

impl Helpers {
    pub(crate) fn new(hashes: bool) -> Arc<Self> {
        let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
        let count = cores.saturating_sub(1).clamp(1, THREADS_MAX);
        let scratch = || Mutex::new(LockRank::HelperScratch, Scratch::default());
        let queue = Arc::new(Queue {
            jobs: Mutex::new(LockRank::HelperJobs, Jobs::default()),
            changed: Condvar::new(),
            scratches: (0..count).map(|_| scratch()).collect(),
        });
        Arc::new(Self {
            queue,
            threads: Mutex::new(LockRank::HelperThreads, Vec::new()),
            buffers: Mutex::new(LockRank::HelperBuffers, Vec::new()),
            hashes,
        })
    }

    /// Starts the threads.
    pub(crate) fn spawn(&self) -> io::Result<()> {
        lock(&self.queue.jobs).taken = true;
        for number in 0..self.queue.scratches.len() {
            let queue = Arc::clone(&self.queue);
            let thread = std::thread::Builder::new().name(format!("envelog-help-{number}"));
            let spawned = thread.spawn(move || queue.work(number)).inspect_err(|_| self.stop())?;
            lock(&self.threads).push(spawned);
        }
        Ok(())
    }

    /// Ends the threads. Jobs that still wait are done when their results are needed.
    pub(crate) fn stop(&self) {
        lock(&self.queue.jobs).taken = false;
        self.queue.changed.notify_all();
        let threads = std::mem::take(&mut *lock(&self.threads));
        for thread in threads {
            let _ = thread.join();
        }
    }

    /// Whether payloads are hashed.
    pub(super) fn hashes(&self) -> bool {
        self.hashes
    }

    /// Queues a job for a thread. `false` if there is no thread, or no room.
    pub(super) fn push(&self, job: &Arc<impl Job + 'static>) -> bool {
        let mut jobs = lock(&self.queue.jobs);
        let room = jobs.taken && jobs.waiting.len() < JOBS_MAX;
        if room {
            jobs.waiting.push_back(Arc::clone(job) as Arc<dyn Job>);
            self.queue.changed.notify_one();
        }
        room
    }

    /// A buffer for a block.
    pub(super) fn buffer(&self) -> SealBuffer {
        lock(&self.buffers).pop().unwrap_or_default()
    }

    /// Keeps the buffer of a sealed block for another one.
    pub(super) fn give_back(&self, sealed: SealBuffer) {
        let mut buffers = lock(&self.buffers);
        if buffers.len() < BUFFERS_MAX && sealed.capacity() <= BUFFER_BYTES_MAX {
            buffers.push(sealed);
        }
    }

    /// Overwrites the plaintext that the threads have worked on, and the buffers: a compressor may
    /// have left some behind the block. Waits for the jobs under way.
    pub(super) fn wipe(&self) {
        for scratch in &self.queue.scratches {
            lock(scratch).wipe();
        }
        let buffers = std::mem::take(&mut *lock(&self.buffers));
        for mut buffer in buffers {
            buffer.wipe();
        }
    }
}

impl Queue {
    fn work(&self, number: usize) {
        let mut jobs = lock(&self.jobs);
        while jobs.taken {
            let Some(job) = jobs.waiting.pop_front() else {
                jobs = wait(&self.changed, jobs);
                continue;
            };
            drop(jobs);
            if let Some(scratch) = self.scratches.get(number) {
                job.run(&mut lock(scratch));
            }
            drop(job);
            jobs = lock(&self.jobs);
        }
    }
}

/// A result that is computed once: by a helper, or by the thread that needs it.
pub(super) struct Deferred<I, O> {
    work: fn(I, &mut Scratch) -> O,
    state: Mutex<State<I, O>>,
    done: Condvar,
}

enum State<I, O> {
    Waiting(I),
    /// A thread is at work, or the result was taken.
    Begun,
    Done(O),
    /// The thread at work has panicked.
    Panicked,
}

impl<I, O> Deferred<I, O> {
    pub(super) fn new(input: I, work: fn(I, &mut Scratch) -> O) -> Arc<Self> {
        let state = Mutex::new(LockRank::Deferred, State::Waiting(input));
        Arc::new(Self { work, state, done: Condvar::new() })
    }

    /// A result that is known.
    pub(super) fn known(output: O, work: fn(I, &mut Scratch) -> O) -> Arc<Self> {
        let state = Mutex::new(LockRank::Deferred, State::Done(output));
        Arc::new(Self { work, state, done: Condvar::new() })
    }

    /// Does the work, unless a thread has begun it. Returns whether it did.
    pub(super) fn run(&self, scratch: &mut Scratch) -> bool {
        let Some(input) = self.begin() else { return false };
        let mut end = End { job: self, state: State::Panicked };
        end.state = State::Done((self.work)(input, scratch));
        true
    }

    /// The input, unless a thread has begun the work.
    pub(super) fn begin(&self) -> Option<I> {
        let mut state = lock(&self.state);
        match std::mem::replace(&mut *state, State::Begun) {
            State::Waiting(input) => Some(input),
            other => {
                *state = other;
                None
            }
        }
    }

    /// Whether no thread is at work on it any more.
    pub(super) fn is_done(&self) -> bool {
        matches!(*lock(&self.state), State::Done(_) | State::Panicked)
    }

    /// Takes the result. Does the work if no thread has begun it, and waits for a thread that has.
    ///
    /// # Panics
    /// If that thread has panicked.
    pub(super) fn settle(&self, scratch: &mut Scratch) -> O {
        self.run(scratch);
        let mut state = lock(&self.state);
        loop {
            match std::mem::replace(&mut *state, State::Begun) {
                State::Done(output) => return output,
                State::Panicked => panic!("a helper has panicked"),
                _ => state = wait(&self.done, state),
            }
        }
    }
}

/// Puts the state at the end of the work in place, also if the work panics: otherwise the thread that
/// needs the result would wait for ever.
struct End<'a, I, O> {
    job: &'a Deferred<I, O>,
    state: State<I, O>,
}

impl<I, O> Drop for End<'_, I, O> {
    fn drop(&mut self) {
        *lock(&self.job.state) = std::mem::replace(&mut self.state, State::Begun);
        self.job.done.notify_all();
    }
}

impl<I: Send, O: Send> Job for Deferred<I, O> {
    fn run(&self, scratch: &mut Scratch) -> bool {
        self.run(scratch)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn double(input: u32, scratch: &mut Scratch) -> u32 {
        scratch.raw = vec![7; 3];
        input * 2
    }

    #[test]
    fn a_job_that_no_thread_takes_is_done_by_the_one_who_needs_it() {
        let helpers = Helpers::new(true);
        // A thread that never comes.
        lock(&helpers.queue.jobs).taken = true;
        let jobs: Vec<_> = (0..40).map(|n| Deferred::new(n, double)).collect();
        let queued = jobs.iter().filter(|job| helpers.push(job)).count();
        assert_eq!(queued, JOBS_MAX);
        helpers.stop();
        let last = Deferred::new(40, double);
        assert!(!helpers.push(&last), "there is no thread");
        for (n, job) in jobs.iter().chain([&last]).enumerate() {
            assert!(!job.is_done());
            assert_eq!(job.settle(&mut Scratch::default()), 2 * n as u32);
        }
    }

    #[test]
    fn a_job_is_done_once() {
        let helpers = Helpers::new(true);
        helpers.spawn().unwrap();
        for n in 0..200 {
            let job = Deferred::new(n, double);
            helpers.push(&job);
            assert_eq!(job.settle(&mut Scratch::default()), 2 * n);
            assert!(!job.run(&mut Scratch::default()) && job.begin().is_none());
        }
        helpers.stop();
    }

    #[test]
    fn a_helper_that_panics_leaves_no_thread_waiting() {
        let helpers = Helpers::new(true);
        helpers.spawn().unwrap();
        let job =
            Deferred::new(1, |_: u32, _: &mut Scratch| -> u32 { panic!("as the test wants") });
        assert!(helpers.push(&job));
        while !job.is_done() {
            std::thread::yield_now();
        }
        let settle = std::panic::AssertUnwindSafe(|| job.settle(&mut Scratch::default()));
        assert!(std::panic::catch_unwind(settle).is_err());
        // The others are done all the same.
        let next = Deferred::new(2, double);
        helpers.push(&next);
        assert_eq!(next.settle(&mut Scratch::default()), 4);
        helpers.stop();
    }

    #[test]
    fn wiping_leaves_no_plaintext() {
        let helpers = Helpers::new(true);
        helpers.spawn().unwrap();
        let job = Deferred::new(1, double);
        assert!(helpers.push(&job));
        while !job.is_done() {
            std::thread::yield_now();
        }
        helpers.give_back(SealBuffer::default());
        helpers.wipe();
        assert!(lock(&helpers.buffers).is_empty());
        let scratches = &helpers.queue.scratches;
        assert!(scratches.iter().all(|scratch| lock(scratch).raw.is_empty()));
        helpers.stop();
    }

    #[test]
    fn few_and_small_buffers_are_kept() {
        let helpers = Helpers::new(true);
        let sized = |bytes: usize| {
            let mut buffer = SealBuffer::default();
            buffer.begin().resize(bytes, 0);
            buffer
        };
        helpers.give_back(sized(BUFFER_BYTES_MAX + 1));
        assert_eq!(helpers.buffer().capacity(), 0);
        (0..2 * BUFFERS_MAX).for_each(|_| helpers.give_back(sized(1000)));
        let kept = (0..2 * BUFFERS_MAX).filter(|_| helpers.buffer().capacity() > 0).count();
        assert_eq!(kept, BUFFERS_MAX);
    }
}
