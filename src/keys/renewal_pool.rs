//! The threads that renew leases: a few threads serve all master keys of a store.

use std::{
    collections::{BTreeSet, HashMap},
    io,
    sync::{Arc, Weak},
    thread::{self, JoinHandle},
    time::Duration,
};

use crate::{
    io::{Clock, SystemClock},
    sync::{Condvar, LockRank, Mutex, lock, wait, wait_timeout},
};

/// The most threads. They wait for no KMS: a call has a thread of its own. But after a loss, one of
/// them waits until the segments are sealed.
const THREADS_MAX: usize = 32;

/// A lease, as the pool sees it.
pub(crate) trait Renewable: Send + Sync {
    /// Does the work that is due. Returns after how long to call this again. Waits for no KMS.
    fn tend(&self) -> Duration;
}

/// Calls [`Renewable::tend`] of each lease when it is due, by the clock of the machine. Its threads
/// wait in real time.
pub(crate) struct RenewalPool {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl RenewalPool {
    pub(crate) fn new() -> Arc<Self> {
        let queue = Mutex::new(LockRank::RenewalPool, Queue::default());
        Arc::new(Self { queue, changed: Condvar::new() })
    }

    /// A number that identifies a lease in this pool.
    pub(crate) fn enter(&self) -> u64 {
        let mut queue = lock(&self.queue);
        queue.next_id += 1;
        queue.next_id
    }

    /// Makes a lease due now. Starts a thread for it if all threads are busy and there may be more.
    ///
    /// # Errors
    /// When the first thread cannot be started. The pool would never tend the lease.
    pub(crate) fn wake(self: &Arc<Self>, id: u64, lease: Weak<dyn Renewable>) -> io::Result<()> {
        let mut queue = lock(&self.queue);
        if queue.stopped {
            return Ok(());
        }
        queue.schedule(id, SystemClock.uptime(), lease);
        let started = self.help(&mut queue);
        let no_thread = queue.threads.is_empty();
        drop(queue);
        self.changed.notify_one();
        if no_thread { started } else { Ok(()) }
    }

    /// Starts another thread if a lease is due and no thread is idle.
    fn help(self: &Arc<Self>, queue: &mut Queue) -> io::Result<()> {
        let now = SystemClock.uptime();
        let due = queue.order.first().is_some_and(|(due, _)| *due <= now);
        if due && queue.idle == 0 && queue.threads.len() < THREADS_MAX && !queue.stopped {
            let this = Arc::clone(self);
            let thread = thread::Builder::new().name("envelog-lease".to_owned());
            queue.threads.push(thread.spawn(move || this.work())?);
        }
        Ok(())
    }

    fn work(self: Arc<Self>) {
        let mut queue = lock(&self.queue);
        while !queue.stopped {
            let Some((due, id)) = queue.order.first().copied() else {
                queue.idle += 1;
                queue = wait(&self.changed, queue);
                queue.idle -= 1;
                continue;
            };
            let left = due.saturating_sub(SystemClock.uptime());
            if !left.is_zero() {
                queue.idle += 1;
                queue = wait_timeout(&self.changed, queue, left);
                queue.idle -= 1;
                continue;
            }
            queue.order.remove(&(due, id));
            let Some((_, weak)) = queue.leases.remove(&id) else { continue };
            let Some(lease) = weak.upgrade() else { continue };
            // Without another thread the pool is slower, and still correct.
            let _ = self.help(&mut queue);
            drop(queue);
            let pause = lease.tend().max(Duration::from_millis(1));
            drop(lease);
            queue = lock(&self.queue);
            queue.schedule(id, SystemClock.uptime() + pause, weak);
        }
    }

    /// Ends the threads and waits for them. If this is one of them, it does not wait for itself.
    pub(crate) fn stop(&self) {
        let threads = {
            let mut queue = lock(&self.queue);
            queue.stopped = true;
            std::mem::take(&mut queue.threads)
        };
        self.changed.notify_all();
        for handle in threads {
            if handle.thread().id() != thread::current().id() {
                let _ = handle.join();
            }
        }
    }
}

#[derive(Default)]
struct Queue {
    /// When each lease is due, in order. A lease that a thread works on is not in it.
    order: BTreeSet<(Duration, u64)>,
    leases: HashMap<u64, (Duration, Weak<dyn Renewable>)>,
    next_id: u64,
    /// Threads that wait for a lease to be due.
    idle: usize,
    threads: Vec<JoinHandle<()>>,
    stopped: bool,
}

impl Queue {
    /// Makes a lease due at `due`. A lease that is due earlier stays so.
    fn schedule(&mut self, id: u64, due: Duration, lease: Weak<dyn Renewable>) {
        if let Some((earlier, _)) = self.leases.get(&id) {
            if *earlier <= due {
                return;
            }
            self.order.remove(&(*earlier, id));
        }
        self.order.insert((due, id));
        self.leases.insert(id, (due, lease));
    }
}

#[cfg(test)]
#[expect(
    clippy::disallowed_methods,
    reason = "the tests watch threads, which signal nothing to them"
)]
mod tests {
    use std::{sync::atomic::Ordering, time::Instant};

    use super::{
        super::lease::{
            Lease,
            tests::{EVERY, Ears, World},
        },
        *,
    };

    fn eventually(what: &str, holds: impl Fn() -> bool) {
        let begin = Instant::now();
        while !holds() {
            assert!(begin.elapsed() < Duration::from_secs(20), "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// Leases after their first answer, and the listener of each.
    type Tended = (Arc<RenewalPool>, Vec<(Arc<Lease>, Arc<Ears>)>);

    fn with_leases(world: &World, count: usize) -> Tended {
        let pool = RenewalPool::new();
        let at_rest = |leases: usize| {
            let queue = lock(&pool.queue);
            let due = queue.order.first().is_some_and(|(due, _)| *due <= SystemClock.uptime());
            !due && queue.order.len() == leases && queue.idle == queue.threads.len()
        };
        let lease = |n| {
            let lease = world.lease_in(&pool);
            let ears = Ears::listening_to(&lease);
            eventually("it is tended", || at_rest(n));
            lease.admit().unwrap();
            eventually("it is tended again", || at_rest(n));
            (lease, ears)
        };
        let leases = (1..=count).map(lease).collect();
        (Arc::clone(&pool), leases)
    }

    #[test]
    fn all_leases_are_tended_while_calls_hang() {
        let world = World::new();
        let (pool, leases) = with_leases(&world, THREADS_MAX + 8);
        let calls = || world.kms.calls.load(Ordering::SeqCst) as usize - leases.len();
        assert_eq!(lock(&pool.queue).threads.len(), 1);
        let back = lock(&world.kms.back);
        world.clock.advance(EVERY);
        leases.iter().for_each(|(lease, _)| lease.start().unwrap());
        eventually("as many calls as there may be", || calls() == THREADS_MAX);
        assert_eq!(lock(&pool.queue).threads.len(), THREADS_MAX);
        drop(back);
        eventually("the others", || calls() == leases.len());
        eventually("all is done", || lock(&pool.queue).idle == THREADS_MAX);
        let known = Arc::strong_count(&pool);
        pool.stop();
        assert_eq!(Arc::strong_count(&pool), known - THREADS_MAX, "each thread has one");
        leases[0].0.start().unwrap();
        assert!(lock(&pool.queue).threads.is_empty());
    }

    #[test]
    fn a_thread_that_is_idle_is_used_before_another_one_is_started() {
        let world = World::new();
        let (pool, leases) = with_leases(&world, 2);
        let [(first, ears), (second, _)] = &leases[..] else { unreachable!() };
        let threads = || lock(&pool.queue).threads.len();
        for _ in 0..8 {
            let asked = ears.asked.load(Ordering::SeqCst);
            first.start().unwrap();
            eventually("it is tended", || {
                ears.asked.load(Ordering::SeqCst) > asked && lock(&pool.queue).idle == 1
            });
            assert_eq!(threads(), 1);
        }
        // No lease is due, so no thread tends one.
        let asked = ears.asked.load(Ordering::SeqCst);
        thread::sleep(Duration::from_millis(50));
        assert_eq!(ears.asked.load(Ordering::SeqCst), asked);
        // Threads in a call are not idle.
        let both_are_held = |count: usize| {
            let back = lock(&world.kms.back);
            let calls = world.kms.calls.load(Ordering::SeqCst);
            world.clock.advance(EVERY);
            first.start().unwrap();
            eventually("a call", || world.kms.calls.load(Ordering::SeqCst) == calls + 1);
            second.start().unwrap();
            eventually("another call", || world.kms.calls.load(Ordering::SeqCst) == calls + 2);
            assert_eq!(threads(), count);
            back
        };
        let back = both_are_held(2);
        first.start().unwrap();
        eventually("a third thread", || threads() == 3);
        drop(back);
        // An answer wakes the pool too, which may have started more threads.
        let all_are_idle = || {
            let queue = lock(&pool.queue);
            queue.order.len() == 2 && queue.idle == queue.threads.len()
        };
        eventually("all are idle", all_are_idle);
        let count = threads();
        // A thread that finds the queue empty is idle, too.
        let back = both_are_held(count);
        let look = || {
            pool.changed.notify_all();
            thread::sleep(Duration::from_millis(50));
        };
        look();
        eventually("the others are idle", || lock(&pool.queue).idle == count - 2);
        drop(back);
        eventually("both are tended", || lock(&pool.queue).order.len() == 2);
        look();
        eventually("all are idle again", all_are_idle);
        pool.stop();
    }
}
