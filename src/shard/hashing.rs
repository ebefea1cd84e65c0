//! Payload hashes, computed in parallel with the writing of blocks.
//!
//! The digest of a segment covers each payload, and hashing a payload takes about as long as
//! sealing it. So another thread hashes the payload of a written block while the writer makes the
//! next one. That thread never delays a writer: a thread that needs a hash which is not begun
//! computes it itself.

use std::{collections::VecDeque, io, sync::Arc, thread::JoinHandle};

use crate::{
    crypto::{HashAlg, hash},
    segment::SealBuffer,
    sync::{Condvar, LockRank, Mutex, lock, wait},
};

/// A payload shorter than this, in bytes, is hashed at once: waking a thread takes longer.
const BESIDE_BYTES_MIN: usize = 16 << 10;
/// How many blocks may wait for the thread. The writer hashes any further block at once.
const JOBS_MAX: usize = 16;

/// Hashes the payloads of a store. Without its thread it hashes each payload at once.
pub(crate) struct PayloadHasher {
    queue: Arc<Queue>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// Whether it hashes at all. Only a benchmark that discards its store turns this off.
    on: bool,
}

struct Queue {
    jobs: Mutex<Jobs>,
    changed: Condvar,
}

impl Default for Queue {
    fn default() -> Self {
        Self { jobs: Mutex::new(LockRank::HasherJobs, Jobs::default()), changed: Condvar::new() }
    }
}

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Arc<Job>>,
    /// Whether there is a thread that takes jobs.
    taken: bool,
}

/// A block whose payload is to be hashed.
struct Job {
    algorithm: HashAlg,
    state: Mutex<State>,
    done: Condvar,
}

enum State {
    Waiting(SealBuffer),
    /// A thread is hashing it.
    Begun,
    Done([u8; 32], SealBuffer),
}

/// The hash of a payload, which may not be computed yet, and the buffer with the block.
pub(crate) struct PayloadHash(Arc<Job>);

impl PayloadHasher {
    pub(crate) fn new(on: bool) -> Arc<Self> {
        Arc::new(Self {
            queue: Arc::default(),
            thread: Mutex::new(LockRank::HasherThread, None),
            on,
        })
    }

    /// Starts the thread.
    pub(crate) fn spawn(&self) -> io::Result<()> {
        let queue = Arc::clone(&self.queue);
        lock(&queue.jobs).taken = true;
        let thread = std::thread::Builder::new().name("envelog-hasher".to_owned());
        let spawned = thread
            .spawn(move || queue.work())
            .inspect_err(|_| lock(&self.queue.jobs).taken = false)?;
        *lock(&self.thread) = Some(spawned);
        Ok(())
    }

    /// Ends the thread. Payloads that still wait for it are hashed when their hash is needed.
    pub(crate) fn stop(&self) {
        lock(&self.queue.jobs).taken = false;
        self.queue.changed.notify_all();
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }

    /// Hashes the payload of a completed block.
    pub(crate) fn hash(&self, algorithm: HashAlg, block: SealBuffer) -> PayloadHash {
        let job = |state| {
            Arc::new(Job {
                algorithm,
                state: Mutex::new(LockRank::HashJob, state),
                done: Condvar::new(),
            })
        };
        if !self.on {
            return PayloadHash(job(State::Done([0; 32], block)));
        }
        let long = block.stored_payload().len() >= BESIDE_BYTES_MIN;
        let pending = PayloadHash(job(State::Waiting(block)));
        if !(long && self.queue.push(&pending.0)) {
            pending.0.run();
        }
        pending
    }
}

impl Queue {
    /// Queues a job for the thread. `false` if there is no thread, or no room.
    fn push(&self, job: &Arc<Job>) -> bool {
        let mut jobs = lock(&self.jobs);
        let room = jobs.taken && jobs.waiting.len() < JOBS_MAX;
        if room {
            jobs.waiting.push_back(Arc::clone(job));
            self.changed.notify_one();
        }
        room
    }

    fn work(&self) {
        let mut jobs = lock(&self.jobs);
        while jobs.taken {
            let Some(job) = jobs.waiting.pop_front() else {
                jobs = wait(&self.changed, jobs);
                continue;
            };
            drop(jobs);
            job.run();
            jobs = lock(&self.jobs);
        }
    }
}

impl Job {
    /// Hashes the payload, unless another thread has begun to.
    fn run(&self) {
        let begun = std::mem::replace(&mut *lock(&self.state), State::Begun);
        let state = match begun {
            State::Waiting(block) => {
                State::Done(hash(self.algorithm, &[block.stored_payload()]), block)
            }
            State::Begun => return,
            done @ State::Done(..) => done,
        };
        *lock(&self.state) = state;
        self.done.notify_all();
    }
}

impl PayloadHash {
    /// The hash, and the buffer for reuse. Hashes the payload if no thread has begun to, and waits
    /// for a thread that has.
    pub(crate) fn settle(self) -> ([u8; 32], SealBuffer) {
        self.0.run();
        let mut state = lock(&self.0.state);
        loop {
            match std::mem::replace(&mut *state, State::Begun) {
                State::Done(hash, block) => return (hash, block),
                _ => state = wait(&self.0.done, state),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::segment::{BlockHeader, BlockKind, Compression};

    const HEADER_HASH: [u8; 32] = [7; 32];

    /// A completed block.
    fn block(payload: &[u8]) -> SealBuffer {
        let mut buffer = SealBuffer::default();
        buffer.begin().extend_from_slice(payload);
        let len = payload.len() as u32;
        let header = BlockHeader {
            kind: BlockKind::Opaque,
            compression: Compression::None,
            segment_tag: [7; 8],
            number: 0,
            payload_len: len,
            raw_len: len,
            group_count: 1,
            log_count: 0,
            list_len: len - 4,
            first_seq: 0,
            first_time_us: 0,
            last_time_us: 0,
            durable_mark: 0,
            nonce_random: [0; 8],
        };
        buffer.with_header(&HEADER_HASH, &header);
        buffer.finish(&[9; 16]);
        buffer
    }

    /// Payloads shorter and longer than the length from which the thread hashes them.
    fn payloads() -> Vec<Vec<u8>> {
        (0..40_u8)
            .map(|n| vec![n; if n % 3 == 0 { 100 } else { BESIDE_BYTES_MIN + usize::from(n) }])
            .collect()
    }

    #[track_caller]
    fn check(pending: PayloadHash, algorithm: HashAlg, payload: &[u8]) {
        let (hashed, buffer) = pending.settle();
        assert_eq!(hashed, hash(algorithm, &[payload]));
        assert_eq!(buffer.stored_payload(), payload);
    }

    #[test]
    fn each_payload_gets_its_hash() {
        for threads in [false, true] {
            let hasher = PayloadHasher::new(true);
            if threads {
                hasher.spawn().unwrap();
            }
            for algorithm in [HashAlg::Sha256, HashAlg::Sm3] {
                // One behind, as a writer does it; then all at once, which is more than may wait.
                let mut before = None;
                for payload in payloads() {
                    let pending = hasher.hash(algorithm, block(&payload));
                    if let Some((pending, payload)) = before.replace((pending, payload)) {
                        check(pending, algorithm, &payload);
                    }
                }
                let pending: Vec<_> = payloads()
                    .into_iter()
                    .map(|payload| (hasher.hash(algorithm, block(&payload)), payload))
                    .collect();
                for (pending, payload) in pending.into_iter().rev() {
                    check(pending, algorithm, &payload);
                }
            }
            hasher.stop();
        }
    }

    #[test]
    fn many_writers_share_it() {
        let hasher = PayloadHasher::new(true);
        hasher.spawn().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for payload in payloads() {
                        check(
                            hasher.hash(HashAlg::Sha256, block(&payload)),
                            HashAlg::Sha256,
                            &payload,
                        );
                    }
                });
            }
        });
        hasher.stop();
    }

    #[test]
    fn what_waits_when_it_ends_is_hashed_all_the_same() {
        let hasher = PayloadHasher::new(true);
        let payload = vec![5; BESIDE_BYTES_MIN];
        // A thread that never comes.
        lock(&hasher.queue.jobs).taken = true;
        let waiting: Vec<_> =
            (0..JOBS_MAX).map(|_| hasher.hash(HashAlg::Sm3, block(&payload))).collect();
        assert_eq!(lock(&hasher.queue.jobs).waiting.len(), JOBS_MAX);
        let beyond = hasher.hash(HashAlg::Sm3, block(&payload));
        assert_eq!(lock(&hasher.queue.jobs).waiting.len(), JOBS_MAX);
        hasher.stop();
        for pending in waiting.into_iter().chain([beyond]) {
            check(pending, HashAlg::Sm3, &payload);
        }
    }
}
