//! Sealing after a loss: the shards that were being written under a master key that is lost.
//!
//! The lease has wiped the data keys before this begins. The keys of the segments that are being
//! written are still in memory, so that the shards can seal their acknowledged groups under them. A
//! [`Sealer`] runs that in parallel: all shards write their groups as blocks first, and then seal
//! their segments. A block needs no footer to be recovered, so a group is safe once
//! it is written.
//!
//! A deadline bounds this. At the deadline the shards that are not finished wipe their keys and
//! their groups ([`LostShard::expire`]). That takes no I/O, and waits for no thread that a system
//! call holds. If the key can be used again before the deadline, sealing ends without a wipe.
//!
//! The loss is recorded last. The records of a store are written one after the other, in the order
//! of the losses and returns, and delay no wipe.

use std::{collections::VecDeque, io, sync::Arc, thread, time::Duration};

use crate::{
    io::Clock,
    sync::{Condvar, LockRank, Mutex, MutexGuard, lock, wait_timeout},
};

/// The most threads of a store that seal at once. A thread that a system call has held beyond a
/// deadline is not included.
const THREADS_MAX: usize = 16;
/// No thread begins a job while system calls hold this many threads beyond their deadlines.
const STUCK_MAX: usize = 64;
/// How often the deadlines are compared with the clock.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// How long a thread waits for a shard that another thread had at the first attempt.
const PATIENCE: Duration = Duration::from_millis(10);

/// A shard whose key is lost.
pub(crate) trait LostShard: Send + Sync {
    /// Writes the acknowledged groups that are in no block yet. Blocks for I/O. If another thread
    /// has the shard, waits for that thread for at most `patience`, and then returns `false`: the
    /// caller tries again.
    fn write(&self, patience: Duration) -> bool;
    /// Writes the rest, and seals the segment that is being written. Otherwise as
    /// [`LostShard::write`].
    fn seal(&self, patience: Duration) -> bool;
    /// The deadline has passed: wipes the key of the segment, and the groups that are in no block.
    /// Does no I/O and waits for no thread. If a thread is in the middle of a system call for the
    /// shard, that thread wipes its own buffers when the call returns.
    fn expire(&self);
    /// The loss of the key is on record. Records the groups that were lost with it. Blocks for I/O.
    fn record(&self);
}

/// A loss or a return of a master key: the work that remains once the data keys are wiped.
pub(crate) struct Turn {
    /// The shards that have lost their key; none at a return.
    pub(crate) shards: Vec<Arc<dyn LostShard>>,
    /// When the keys of their segments are wiped, by the uptime.
    pub(crate) deadline: Duration,
    /// Whether the key is still lost.
    pub(crate) is_lost: Arc<dyn Fn() -> bool + Send + Sync>,
    /// Records the loss or the return. Blocks for I/O.
    pub(crate) record: Box<dyn FnOnce() + Send>,
}

/// Acts on the losses and returns of the master keys of a store.
pub(crate) struct Sealer {
    clock: Arc<dyn Clock>,
    /// `None` in a store without threads.
    threads: Option<Arc<Threads>>,
}

impl Sealer {
    pub(crate) fn new(clock: Arc<dyn Clock>, threads: bool) -> Arc<Self> {
        let threads = threads.then(|| Threads::new(Arc::clone(&clock)));
        Arc::new(Self { clock, threads })
    }

    /// Hands a turn to threads. Returns the turn if the store has no threads, or none can be
    /// started: the caller then calls [`Sealer::run`], without a lock.
    pub(crate) fn begin(&self, turn: Turn) -> Option<Turn> {
        match &self.threads {
            Some(threads) => threads.begin(turn),
            None => Some(turn),
        }
    }

    /// Acts on a turn in this thread. Blocks for I/O: a system call that does not return holds up
    /// the rest.
    pub(crate) fn run(&self, turn: Turn) {
        let Turn { shards, deadline, is_lost, record } = turn;
        let mut queue = Queue::default();
        queue.add(0, shards.len());
        let mut sealed = vec![false; shards.len()];
        while self.clock.uptime() < deadline
            && is_lost()
            && let Some(job) = queue.pop()
        {
            let done = job.run(&*shards[job.shard]);
            sealed[job.shard] = queue.follow(job, done);
        }
        if is_lost() {
            shards.iter().zip(sealed).filter(|(_, done)| !done).for_each(|(one, _)| one.expire());
        }
        record();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Write,
    Seal,
}

/// The next step of a shard of a turn.
#[derive(Clone, Copy, Debug)]
struct Job {
    turn: u64,
    shard: usize,
    step: Step,
    /// Whether another thread had the shard when it was tried before.
    tried: bool,
}

impl Job {
    /// `false` if another thread has the shard.
    fn run(&self, shard: &dyn LostShard) -> bool {
        let patience = if self.tried { PATIENCE } else { Duration::ZERO };
        match self.step {
            Step::Write => shard.write(patience),
            Step::Seal => shard.seal(patience),
        }
    }
}

/// The jobs that wait: at most one for each shard of a turn.
#[derive(Default)]
struct Queue {
    /// These go first.
    writes: VecDeque<Job>,
    seals: VecDeque<Job>,
}

impl Queue {
    /// Adds the first job of each shard of a turn.
    fn add(&mut self, turn: u64, shards: usize) {
        let job = |shard| Job { turn, shard, step: Step::Write, tried: false };
        self.writes.extend((0..shards).map(job));
    }

    fn pop(&mut self) -> Option<Job> {
        self.writes.pop_front().or_else(|| self.seals.pop_front())
    }

    /// Adds the job that follows on this one. Returns whether the shard is sealed, and no job
    /// follows.
    fn follow(&mut self, job: Job, done: bool) -> bool {
        let sealed = done && job.step == Step::Seal;
        if !sealed {
            self.seals.push_back(Job { step: Step::Seal, tried: !done, ..job });
        }
        sealed
    }

    fn remove(&mut self, turn: u64) {
        self.writes.retain(|job| job.turn != turn);
        self.seals.retain(|job| job.turn != turn);
    }

    fn len(&self) -> usize {
        self.writes.len() + self.seals.len()
    }
}

/// The threads of a [`Sealer`]. They end when there is nothing to do.
struct Threads {
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
    /// Notified when the thread that watches the deadlines has to look.
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The turns that are not recorded yet, in order.
    turns: VecDeque<Underway>,
    last_turn: u64,
    queue: Queue,
    /// Threads that seal or record, but for those in `stuck`.
    working: usize,
    /// Threads that were in the middle of a job when its turn ended.
    stuck: usize,
    /// Whether a thread watches the deadlines.
    watched: bool,
    /// Whether a thread records a turn.
    recording: bool,
}

struct Underway {
    number: u64,
    turn: Turn,
    /// How far each shard is.
    shards: Vec<Progress>,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Waiting,
    /// A thread has a job of the shard.
    Running,
    Sealed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Sealing,
    /// No job is begun any more, and the shards that are not finished are wiped.
    Ending,
    /// To be recorded.
    Over,
}

impl Threads {
    fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        let state = Mutex::new(LockRank::Sealing, State::default());
        Arc::new(Self { clock, state, changed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn begin(self: &Arc<Self>, turn: Turn) -> Option<Turn> {
        let mut state = self.lock();
        if !state.watched {
            let this = Arc::clone(self);
            let thread = thread::Builder::new().name("envelog-loss".to_owned());
            if thread.spawn(move || this.watch()).is_err() {
                return Some(turn);
            }
            state.watched = true;
        }
        state.last_turn += 1;
        let (number, count) = (state.last_turn, turn.shards.len());
        state.queue.add(number, count);
        let shards = vec![Progress::Waiting; count];
        state.turns.push_back(Underway { number, turn, shards, stage: Stage::Sealing });
        self.changed.notify_all();
        None
    }

    /// Watches the deadlines, and starts the threads that work.
    fn watch(self: Arc<Self>) {
        loop {
            self.look();
            let mut state = self.lock();
            if state.turns.is_empty() {
                state.watched = false;
                return;
            }
            // Without another thread the others work for longer, and the deadline still holds.
            let _ = self.help(&mut state);
            drop(wait_timeout(&self.changed, state, LOOK_EVERY));
        }
    }

    /// Ends the turns that are finished or due.
    fn look(&self) {
        let underway: Vec<_> = {
            let state = self.lock();
            let sealing = state.turns.iter().filter(|turn| turn.stage == Stage::Sealing);
            let of = |one: &Underway| {
                let finished = one.shards.iter().all(|shard| *shard == Progress::Sealed);
                (one.number, one.turn.deadline, finished, Arc::clone(&one.turn.is_lost))
            };
            sealing.map(of).collect()
        };
        for (number, deadline, finished, is_lost) in underway {
            let lost = is_lost();
            if !finished && lost && self.clock.uptime() < deadline {
                continue;
            }
            let unfinished = self.lock().end(number);
            if lost {
                unfinished.iter().for_each(|shard| shard.expire());
            }
            self.lock().find(number, |turn| turn.stage = Stage::Over);
        }
    }

    /// Starts as many threads as there is work for.
    fn help(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        let jobs = if state.may_seal() { state.queue.len() } else { 0 };
        let wanted = jobs + usize::from(state.can_record());
        for _ in 0..wanted.min(THREADS_MAX.saturating_sub(state.working)) {
            let this = Arc::clone(self);
            let thread = thread::Builder::new().name("envelog-seal".to_owned());
            thread.spawn(move || this.work())?;
            state.working += 1;
        }
        Ok(())
    }

    fn work(&self) {
        let mut state = self.lock();
        // A thread that returned from a long system call may raise `working` above the limit; it
        // exits here.
        while state.working <= THREADS_MAX {
            if state.can_record()
                && let Some(underway) = state.turns.pop_front()
            {
                state.recording = true;
                drop(state);
                (underway.turn.record)();
                state = self.lock();
                state.recording = false;
            } else if let Some((job, shard)) = state.begin_job() {
                drop(state);
                let done = job.run(&*shard);
                drop(shard);
                state = self.lock();
                state.end_job(job, done);
            } else {
                break;
            }
        }
        state.working -= 1;
        self.changed.notify_all();
    }
}

impl State {
    /// Whether the next turn can be recorded.
    fn can_record(&self) -> bool {
        !self.recording && self.turns.front().is_some_and(|front| front.stage == Stage::Over)
    }

    fn may_seal(&self) -> bool {
        self.stuck < STUCK_MAX
    }

    fn find<T>(&mut self, number: u64, act: impl FnOnce(&mut Underway) -> T) -> Option<T> {
        self.turns.iter_mut().find(|turn| turn.number == number).map(act)
    }

    fn begin_job(&mut self) -> Option<(Job, Arc<dyn LostShard>)> {
        let job = if self.may_seal() { self.queue.pop()? } else { return None };
        let shard = self.find(job.turn, |underway| {
            underway.shards[job.shard] = Progress::Running;
            Arc::clone(&underway.turn.shards[job.shard])
        });
        shard.map(|shard| (job, shard))
    }

    /// A thread has returned from a job. If the turn has ended meanwhile, the thread works again.
    fn end_job(&mut self, job: Job, done: bool) {
        let is_sealing = |turn: &&mut Underway| turn.stage == Stage::Sealing;
        let turn = self.turns.iter_mut().find(|turn| turn.number == job.turn).filter(is_sealing);
        let Some(turn) = turn else {
            self.stuck -= 1;
            self.working += 1;
            return;
        };
        let sealed = self.queue.follow(job, done);
        turn.shards[job.shard] = if sealed { Progress::Sealed } else { Progress::Waiting };
    }

    /// Begins no further job of a turn. Returns the shards that are not sealed. Threads that are in
    /// the middle of a job of theirs are not waited for.
    fn end(&mut self, number: u64) -> Vec<Arc<dyn LostShard>> {
        self.queue.remove(number);
        let (mut unfinished, mut running) = (Vec::new(), 0);
        self.find(number, |underway| {
            underway.stage = Stage::Ending;
            for (shard, progress) in underway.turn.shards.iter().zip(&underway.shards) {
                if *progress != Progress::Sealed {
                    unfinished.push(Arc::clone(shard));
                }
                running += usize::from(*progress == Progress::Running);
            }
        });
        self.working -= running;
        self.stuck += running;
        unfinished
    }
}

#[cfg(test)]
mod tests {
    use super::{super::lease::tests::TestClock, *};
    use crate::sync::{
        atomic::{AtomicBool, AtomicUsize, Ordering},
        wait,
    };

    const DEADLINE: Duration = Duration::from_secs(1000);

    /// The events of a test, in order.
    #[derive(Default)]
    struct Events {
        events: Mutex<Vec<String>>,
        changed: Condvar,
    }

    impl Events {
        fn add(&self, event: String) {
            lock(&self.events).push(event);
            self.changed.notify_all();
        }

        /// Waits for so many events that begin with `what`.
        fn wait_for(&self, count: usize, what: &str) {
            let mut events = lock(&self.events);
            let few = |events: &[String]| {
                events.iter().filter(|event| event.starts_with(what)).count() < count
            };
            for _ in 0..2000 {
                if !few(&events) {
                    return;
                }
                events = wait_timeout(&self.changed, events, LOOK_EVERY);
            }
            panic!("no {count} events {what:?} in 20 s: {:?}", *events);
        }

        fn take(&self) -> Vec<String> {
            std::mem::take(&mut *lock(&self.events))
        }
    }

    /// A shard whose steps are events. A step can hang, as in a system call.
    struct Shard {
        name: usize,
        events: Arc<Events>,
        hangs: Mutex<bool>,
        released: Condvar,
        /// How often another thread has it.
        busy: AtomicUsize,
    }

    impl Shard {
        fn release(&self) {
            *lock(&self.hangs) = false;
            self.released.notify_all();
        }

        fn step(&self, what: &str) -> bool {
            if self
                .busy
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1))
                .is_ok()
            {
                self.events.add(format!("busy {}", self.name));
                return false;
            }
            self.events.add(format!("{what} {}", self.name));
            let mut hangs = lock(&self.hangs);
            if *hangs {
                while *hangs {
                    hangs = wait(&self.released, hangs);
                }
                self.events.add(format!("back {}", self.name));
            }
            true
        }
    }

    impl LostShard for Shard {
        fn write(&self, _patience: Duration) -> bool {
            self.step("write")
        }

        fn seal(&self, _patience: Duration) -> bool {
            self.step("seal")
        }

        fn expire(&self) {
            self.events.add(format!("expire {}", self.name));
        }

        fn record(&self) {}
    }

    struct World {
        clock: Arc<TestClock>,
        events: Arc<Events>,
        sealer: Arc<Sealer>,
        lost: Arc<AtomicBool>,
    }

    impl World {
        fn new(threads: bool) -> Self {
            let clock = Arc::new(TestClock::new());
            let sealer = Sealer::new(Arc::clone(&clock) as _, threads);
            Self { clock, events: Arc::default(), sealer, lost: Arc::new(AtomicBool::new(true)) }
        }

        fn shards(&self, names: impl IntoIterator<Item = usize>) -> Vec<Arc<Shard>> {
            let shard = |name| {
                let (events, busy) = (Arc::clone(&self.events), AtomicUsize::new(0));
                let (hangs, released) = (Mutex::default(), Condvar::new());
                Arc::new(Shard { name, events, hangs, released, busy })
            };
            names.into_iter().map(shard).collect()
        }

        fn turn(&self, shards: &[Arc<Shard>], record: impl FnOnce() + Send + 'static) -> Turn {
            let lost = Arc::clone(&self.lost);
            Turn {
                shards: shards.iter().map(|shard| Arc::clone(shard) as _).collect(),
                deadline: self.clock.uptime() + DEADLINE,
                is_lost: Arc::new(move || lost.load(Ordering::SeqCst)),
                record: Box::new(record),
            }
        }

        /// Has the sealer act on a loss, and waits for it if the store has no threads.
        fn lose(&self, name: &'static str, shards: &[Arc<Shard>]) {
            let events = Arc::clone(&self.events);
            let turn = self.turn(shards, move || events.add(format!("record {name}")));
            if let Some(turn) = self.sealer.begin(turn) {
                self.sealer.run(turn);
            }
        }
    }

    fn of(what: &str, names: impl IntoIterator<Item = usize>) -> Vec<String> {
        names.into_iter().map(|name| format!("{what} {name}")).collect()
    }

    #[test]
    fn every_group_is_written_before_a_segment_is_sealed() {
        for threads in [false, true] {
            let world = World::new(threads);
            let shards = world.shards(0..40);
            world.lose("a", &shards);
            world.events.wait_for(1, "record");
            let events = world.events.take();
            let place = |event: &String| events.iter().position(|other| other == event).unwrap();
            let (writes, seals) = (of("write", 0..40), of("seal", 0..40));
            assert_eq!(events.len(), 81);
            if threads {
                // The last writes may still run while the first segments are sealed.
                let first = seals.iter().map(place).min().unwrap();
                assert!(first > 40 - THREADS_MAX, "{events:?}");
            } else {
                assert_eq!(events[..40], writes);
                assert_eq!(events[40..80], seals);
            }
            assert!(writes.iter().zip(&seals).all(|(write, seal)| place(write) < place(seal)));
            assert_eq!(events[80], "record a");
        }
    }

    #[test]
    fn a_shard_that_another_thread_has_is_tried_again() {
        for threads in [false, true] {
            let world = World::new(threads);
            let shards = world.shards(0..3);
            shards[0].busy.store(3, Ordering::SeqCst);
            world.lose("a", &shards);
            world.events.wait_for(1, "record");
            let events = world.events.take();
            assert_eq!(events.iter().filter(|event| *event == "busy 0").count(), 3);
            // It is not written by itself any more: it is sealed in the end.
            let mut sorted = events.clone();
            sorted.retain(|event| !event.starts_with("busy"));
            sorted.sort_unstable();
            let expected =
                [vec!["record a".to_owned()], of("seal", 0..3), of("write", 1..3)].concat();
            assert_eq!(sorted, expected);
        }
    }

    /// One shard hangs and others wait for a thread when the deadline passes.
    #[test]
    fn the_deadline_waits_for_no_system_call() {
        let world = World::new(true);
        let hanging = world.shards(0..THREADS_MAX);
        let waiting = world.shards(THREADS_MAX..THREADS_MAX + 4);
        hanging.iter().for_each(|shard| *lock(&shard.hangs) = true);
        let all = [&hanging[..], &waiting].concat();
        world.lose("a", &all);
        world.events.wait_for(THREADS_MAX, "write");
        world.clock.advance(DEADLINE - Duration::from_micros(1));
        world.lose("b", &[]);
        assert_eq!(world.events.take().len(), THREADS_MAX, "no other thread works");
        world.clock.advance(Duration::from_micros(1));
        world.events.wait_for(1, "record b");
        let mut events = world.events.take();
        assert_eq!(events[..all.len()], of("expire", 0..all.len()));
        assert_eq!(events.split_off(all.len()), ["record a", "record b"]);

        // The threads that hang are given up: others take their places.
        let more = world.shards(100..103);
        world.lose("c", &more);
        world.events.wait_for(1, "record c");
        assert_eq!(world.events.take().len(), 7);
        // When they are back, they do nothing more for the first loss.
        hanging.iter().for_each(|shard| shard.release());
        world.events.wait_for(THREADS_MAX, "back");
        world.lose("d", &more);
        world.events.wait_for(1, "record d");
        let events = world.events.take();
        assert_eq!(events.len(), THREADS_MAX + 7, "{events:?}");
    }

    #[test]
    fn a_key_that_is_back_before_the_deadline_is_not_wiped() {
        for threads in [false, true] {
            let world = World::new(threads);
            let shards = world.shards(0..2);
            *lock(&shards[0].hangs) = threads;
            if threads {
                world.lose("a", &shards);
                world.events.wait_for(1, "seal 1");
            }
            world.lost.store(false, Ordering::SeqCst);
            if !threads {
                world.lose("a", &shards);
            }
            world.events.wait_for(1, "record");
            shards[0].release();
            let events = world.events.take();
            assert!(!events.iter().any(|event| event.starts_with("expire")), "{events:?}");
        }
    }

    /// A caller that has no threads, and a disk that is slow.
    #[test]
    fn without_threads_the_deadline_counts_between_two_shards() {
        struct Slow(Arc<Shard>, Arc<TestClock>);
        impl LostShard for Slow {
            fn write(&self, patience: Duration) -> bool {
                self.0.write(patience)
            }
            fn seal(&self, patience: Duration) -> bool {
                self.1.advance(DEADLINE / 2);
                self.0.seal(patience)
            }
            fn expire(&self) {
                self.0.expire();
            }
            fn record(&self) {}
        }
        let world = World::new(false);
        let shards = world.shards(0..3);
        let slow = |shard: &Arc<Shard>| -> Arc<dyn LostShard> {
            Arc::new(Slow(Arc::clone(shard), Arc::clone(&world.clock)))
        };
        let turn = Turn { shards: shards.iter().map(slow).collect(), ..world.turn(&[], || ()) };
        let turn = world.sealer.begin(turn).unwrap();
        world.sealer.run(turn);
        let expected = [of("write", 0..3), of("seal", 0..2), vec!["expire 2".to_owned()]].concat();
        assert_eq!(world.events.take(), expected);
    }

    /// The record of the first loss hangs: the second one is sealed and wiped all the same, and its
    /// record follows the first.
    #[test]
    fn a_record_that_hangs_delays_nothing_but_records() {
        let world = World::new(true);
        let log = world.shards([7]).remove(0);
        *lock(&log.hangs) = true;
        let slow = Arc::clone(&log);
        let turn = world.turn(&[], move || assert!(slow.step("log")));
        assert!(world.sealer.begin(turn).is_none());
        let shards = world.shards(0..2);
        *lock(&shards[1].hangs) = true;
        world.events.wait_for(1, "log");
        world.lose("b", &shards);
        world.events.wait_for(1, "seal 0");
        world.events.wait_for(1, "write 1");
        world.clock.advance(DEADLINE);
        world.events.wait_for(1, "expire 1");
        assert!(!world.events.take().contains(&"record b".to_owned()));
        log.release();
        world.events.wait_for(1, "record b");
        shards[1].release();
        assert_eq!(world.events.take()[..2], ["back 7", "record b"]);
    }
}
