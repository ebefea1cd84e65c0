//! Following a shard: readers that wait for more at the end.
//!
//! [`GroupCommit`](super::commit::GroupCommit) wakes the followers of a shard when a block is
//! written, when the key is lost, when the shard becomes read-only, and when it is closed. In a
//! store that is open for reading, a job wakes them every 100 ms: another process writes there.

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::{Arc, Weak},
    task::{Context, Poll, Wake, Waker},
    time::Duration,
};

use super::{ReadOptions, Reader, Record, Shard, wakers::News};
use crate::{
    Result,
    io::Clock,
    schedule::{ReaderJob, Task, Work},
    sync::{Condvar, LockRank, Mutex, lock, wait, wait_timeout},
};

/// After how long a follower looks again whether the KMS has answered.
const ASK_AGAIN_AFTER: Duration = Duration::from_millis(20);

/// A task that follows a shard. The shard forgets it when it is dropped.
struct Follower {
    shard: Arc<Shard>,
    id: u64,
}

impl Follower {
    fn new(shard: &Arc<Shard>) -> Self {
        Self { shard: Arc::clone(shard), id: shard.commit().new_follower() }
    }

    /// Whether there is news since `seen`. If not, has `waker` woken when there is.
    fn poll_news(&self, seen: &News, waker: &Waker) -> bool {
        let has_news = self.shard.commit().poll_news(seen, self.id, waker);
        if !has_news && self.shard.is_read_only() {
            self.shard.schedule_look();
        }
        has_news
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.shard.commit().forget_follower(self.id);
    }
}

/// Waits until a shard has grown beyond a sequence number; from
/// [`Logstore::wait_for`](crate::Logstore::wait_for). Await it, or block in [`WaitFor::wait`].
///
/// The wait also ends when the shard is read-only, when the key is lost, and when the Logstore is
/// closed or deleted. The next read tells which.
#[must_use = "it waits only when it is awaited, or in `wait`"]
pub struct WaitFor {
    follower: Follower,
    seq: u64,
    seen: News,
    /// Whether the shard had grown when the wait began.
    has_grown: bool,
}

impl std::fmt::Debug for WaitFor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WaitFor").field("seq", &self.seq).finish_non_exhaustive()
    }
}

impl WaitFor {
    pub(crate) fn new(shard: &Arc<Shard>, seq: u64) -> Result<Self> {
        let news = shard.commit().news();
        let seen = News { written: news.written.max(seq), ..news };
        // The shard may have grown in another process.
        let has_grown = news.ended || shard.end_seq()? > seq;
        Ok(Self { follower: Follower::new(shard), seq, seen, has_grown })
    }

    /// Blocks until the shard has grown.
    pub fn wait(self) {
        let clock = self.follower.shard.clock();
        block_on(None, &*clock, self);
    }

    /// As [`WaitFor::wait`], for at most `timeout`. Returns whether the wait has ended before.
    pub fn wait_timeout(self, timeout: Duration) -> bool {
        let clock = self.follower.shard.clock();
        block_on(Some(timeout), &*clock, self).is_some()
    }
}

impl Future for WaitFor {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        while !self.has_grown {
            if !self.follower.poll_news(&self.seen, context.waker()) {
                return Poll::Pending;
            }
            let shard = Arc::clone(&self.follower.shard);
            // The job that looks for more wakes every follower. An error is for the next read.
            self.has_grown =
                !shard.is_read_only() || shard.end_seq().map_or(true, |end_seq| end_seq > self.seq);
            self.seen.others = shard.commit().news().others;
        }
        Poll::Ready(())
    }
}

/// Reads a shard forward, and waits at the end for more; from
/// [`Logstore::follow`](crate::Logstore::follow).
///
/// As an iterator it blocks until there is another record. It ends after an error, where
/// [`ReadOptions`] say so, and behind the last record of a read-only shard, which grows no more
/// ([`Follow::has_ended`]). With the feature `stream`, `into_stream` makes a `futures_core::Stream` of
/// it. An append reaches its followers as soon as it is `Written`.
pub struct Follow(Arc<Following>);

struct Following {
    shard: Arc<Shard>,
    follower: Follower,
    state: Mutex<State>,
    this: Weak<Self>,
}

struct State {
    /// `None` while a thread reads.
    reader: Option<Reader>,
    /// Whether the reader has a record, by a job that has read ahead.
    ready: Option<Result<bool>>,
    /// What was known of the shard before the reader looked for more.
    seen: News,
    /// Whether the job that reads ahead is scheduled.
    job_is_scheduled: bool,
    /// The task that waits for the job.
    waker: Option<Waker>,
    /// Whether the follower has read a read-only shard to its end.
    ended: bool,
}

impl std::fmt::Debug for Follow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follow").field("shard", &self.0.shard.id()).finish_non_exhaustive()
    }
}

impl Follow {
    pub(crate) fn new(shard: &Arc<Shard>, options: &ReadOptions) -> Result<Self> {
        let seen = shard.commit().news();
        let reader = Some(Reader::following(shard, options)?);
        let (ready, waker) = (None, None);
        let state = State { reader, ready, seen, job_is_scheduled: false, waker, ended: false };
        Ok(Self(Arc::new_cyclic(|this| Following {
            shard: Arc::clone(shard),
            follower: Follower::new(shard),
            state: Mutex::new(LockRank::Following, state),
            this: this.clone(),
        })))
    }

    /// The next record, if there is one. Blocks for file I/O and KMS calls, and does not wait for
    /// more.
    ///
    /// # Errors
    /// Any error that keeps it from being read. The follower has then ended.
    pub fn try_next(&mut self) -> Result<Option<Record>> {
        match self.0.poll_next(Waker::noop(), true) {
            Poll::Ready(record) => record.transpose(),
            Poll::Pending => Ok(None),
        }
    }

    /// As the iterator, but gives up after `timeout`.
    ///
    /// # Errors
    /// As [`Follow::try_next`].
    pub fn next_timeout(&mut self, timeout: Duration) -> Result<Option<Record>> {
        self.next_within(Some(timeout)).flatten().transpose()
    }

    /// Whether the follower has read a read-only shard to its end, after it has returned `None`: a
    /// split or a merge has given the range of the shard to others
    /// ([`LogstoreConfig::children`](crate::LogstoreConfig::children)). Follow these to go on.
    ///
    /// ```
    /// # use envelog::{Store, crypto::RustCrypto, LogstoreSpec, ReadOptions};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let store = Store::builder(dir.path().join("s"), dir.path().join("k"), RustCrypto::new()).create().unwrap();
    /// let name = "app/events".parse()?;
    /// let logstore = store.create_logstore(&name, LogstoreSpec::default())?;
    /// let mut follow = logstore.follow(0, &ReadOptions::default())?;
    /// store.split_shard(&name, 0, None)?;
    /// assert!(follow.next().is_none() && follow.has_ended());
    /// assert_eq!(logstore.config().children(0), [1, 2]);
    /// # Ok::<(), envelog::Error>(())
    /// ```
    pub fn has_ended(&self) -> bool {
        lock(&self.0.state).ended
    }

    /// The same as a stream, for a task.
    #[cfg(feature = "stream")]
    pub fn into_stream(self) -> FollowStream {
        FollowStream(self)
    }

    /// `None` if `timeout` has passed, and then what the iterator returns.
    fn next_within(&mut self, timeout: Option<Duration>) -> Option<Option<Result<Record>>> {
        let clock = self.0.shard.clock();
        let next = std::future::poll_fn(|context| self.0.poll_next(context.waker(), true));
        block_on(timeout, &*clock, next)
    }
}

impl Iterator for Follow {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Result<Record>> {
        self.next_within(None).flatten()
    }
}

/// Follows a shard as a stream; from [`Follow::into_stream`].
///
/// Polling it calls no KMS. It reads the segment files of a Logstore that is not under a customer's
/// key; for the others a thread of the store does that. It needs no particular runtime. With
/// `futures_util::StreamExt` or `tokio_stream::StreamExt`, `stream.next().await` is the next record.
///
/// ```
/// use std::{future::poll_fn, pin::pin};
///
/// use envelog::{AppendOptions, Logstore, Payload, ReadOptions};
/// use futures_core::Stream;
///
/// # fn block_on<F: Future>(future: F) -> F::Output {
/// #     struct Unpark(std::thread::Thread);
/// #     impl std::task::Wake for Unpark {
/// #         fn wake(self: std::sync::Arc<Self>) { self.0.unpark() }
/// #     }
/// #     let waker = std::sync::Arc::new(Unpark(std::thread::current())).into();
/// #     let mut future = pin!(future);
/// #     loop {
/// #         match future.as_mut().poll(&mut std::task::Context::from_waker(&waker)) {
/// #             std::task::Poll::Ready(output) => return output,
/// #             std::task::Poll::Pending => std::thread::park(),
/// #         }
/// #     }
/// # }
/// /// Hands each record of a shard on, also those that are still to come, until `take` has enough.
/// async fn hand_on(logstore: &Logstore, mut take: impl FnMut(&[u8]) -> bool) -> envelog::Result<()> {
///     let mut stream = pin!(logstore.follow(0, &ReadOptions::default())?.into_stream());
///     while let Some(record) = poll_fn(|context| stream.as_mut().poll_next(context)).await {
///         if !take(&record?.bytes) {
///             break;
///         }
///     }
///     Ok(())
/// }
///
/// # use envelog::{Store, crypto::RustCrypto, LogstoreSpec};
/// # let dir = tempfile::tempdir().unwrap();
/// # let store = Store::builder(dir.path().join("s"), dir.path().join("k"), RustCrypto::new()).create().unwrap();
/// let logstore = store.create_logstore(&"app/events".parse()?, LogstoreSpec::default())?;
/// let writer = logstore.clone();
/// let writing = std::thread::spawn(move || {
///     ["one", "two"].map(|text| writer.append(Payload::opaque(text).unwrap(), &AppendOptions::default()))
/// });
/// let mut taken = Vec::new();
/// block_on(hand_on(&logstore, |bytes| {
///     taken.push(bytes.to_vec());
///     taken.len() < 2
/// }))?;
/// assert_eq!(taken, [b"one", b"two"]);
/// # writing.join().unwrap();
/// # Ok::<(), envelog::Error>(())
/// ```
#[cfg(feature = "stream")]
#[derive(Debug)]
pub struct FollowStream(Follow);

#[cfg(feature = "stream")]
impl futures_core::Stream for FollowStream {
    type Item = Result<Record>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.0.poll_next(context.waker(), false)
    }
}

impl Following {
    /// The next record. `None` if there is none any more. A caller that `may_block` reads here. For
    /// others a job does that, if it may have to wait for a KMS.
    fn poll_next(&self, waker: &Waker, may_block: bool) -> Poll<Option<Result<Record>>> {
        loop {
            let (mut reader, ready) = {
                let mut state = lock(&self.state);
                let Some(reader) = state.reader.take() else {
                    state.waker = Some(waker.clone());
                    return Poll::Pending;
                };
                (reader, state.ready.take())
            };
            let reads_here = may_block || self.needs_no_kms(&reader);
            if ready.is_none() && !reads_here {
                self.read_by_job(reader, waker);
                // No job runs after the store is closed. The close wakes the followers.
                let news = self.shard.commit().news();
                if self.follower.poll_news(&news, waker) || self.shard.gate().is_closed() {
                    continue;
                }
                return Poll::Pending;
            }
            if ready.is_none() {
                self.shard.look_for_end();
            }
            let seen = self.shard.commit().news();
            let has_read = ready.is_none();
            let next = match ready.unwrap_or_else(|| reader.ready()) {
                Ok(true) => reader.take_next().map(Ok),
                Ok(false) => None,
                Err(error) => Some(Err(error)),
            };
            let (is_over, at_end) = (reader.is_over(), next.is_none());
            let mut state = lock(&self.state);
            state.reader = Some(reader);
            if has_read {
                state.seen = seen;
            }
            let seen = state.seen;
            // What was known before the reader looked: the shard has not grown since.
            state.ended |= at_end && !is_over && seen.ended;
            let is_over = is_over || state.ended;
            drop(state);
            if !at_end || is_over {
                return Poll::Ready(next);
            }
            if !self.follower.poll_news(&seen, waker) {
                return Poll::Pending;
            }
        }
    }

    /// Schedules the job that reads ahead, and has `waker` woken when it has run.
    fn read_by_job(&self, reader: Reader, waker: &Waker) {
        let is_scheduled = {
            let mut state = lock(&self.state);
            (state.reader, state.waker) = (Some(reader), Some(waker.clone()));
            std::mem::replace(&mut state.job_is_scheduled, true)
        };
        if !is_scheduled {
            let read = Work::Reader(self.this.clone(), ReaderJob::Read);
            self.shard.wake_after(Duration::ZERO, read);
        }
    }

    /// Whether the reader can look for the next record without a KMS call.
    fn needs_no_kms(&self, reader: &Reader) -> bool {
        let gate = self.shard.gate();
        gate.is_closed()
            || !gate.may_call_a_kms()
            || (reader.has_read_ahead() && gate.decides_or_asks())
    }
}

impl Task<ReaderJob> for Following {
    fn run(&self, ReaderJob::Read: ReaderJob) {
        if !self.shard.gate().decides_or_asks() {
            let again = Work::Reader(self.this.clone(), ReaderJob::Read);
            return self.shard.wake_after(ASK_AGAIN_AFTER, again);
        }
        let reader = {
            let mut state = lock(&self.state);
            state.job_is_scheduled = false;
            state.reader.take()
        };
        let Some(mut reader) = reader else { return };
        self.shard.look_for_end();
        let seen = self.shard.commit().news();
        let ready = reader.ready();
        let waker = {
            let mut state = lock(&self.state);
            (state.reader, state.ready, state.seen) = (Some(reader), Some(ready), seen);
            state.waker.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    fn may_wait_for_a_kms(&self, _: ReaderJob) -> bool {
        true
    }
}

/// Wakes a thread that blocks.
struct Thread {
    woken: Mutex<bool>,
    changed: Condvar,
}

impl Wake for Thread {
    fn wake(self: Arc<Self>) {
        *lock(&self.woken) = true;
        self.changed.notify_one();
    }
}

/// Blocks until `future` is ready. `None` if `timeout` has passed.
fn block_on<T>(
    timeout: Option<Duration>,
    clock: &dyn Clock,
    future: impl Future<Output = T>,
) -> Option<T> {
    let woken = Mutex::new(LockRank::WokenThread, false);
    let thread = Arc::new(Thread { woken, changed: Condvar::new() });
    let waker = Waker::from(Arc::clone(&thread));
    let mut future = pin!(future);
    let deadline = timeout.map(|timeout| clock.uptime().saturating_add(timeout));
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return Some(output);
        }
        let mut woken = lock(&thread.woken);
        while !std::mem::take(&mut *woken) {
            woken = match deadline.map(|deadline| deadline.saturating_sub(clock.uptime())) {
                None => wait(&thread.changed, woken),
                Some(Duration::ZERO) => return None,
                Some(left) => wait_timeout(&thread.changed, woken, left),
            };
        }
    }
}
