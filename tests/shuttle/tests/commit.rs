//! Group commit alone, without files, keys and shards, on schedules that shuttle makes up.
//!
//! - One caller leads at a time, and every group is written once, in order.
//! - A caller whose append succeeded as *synced* finds its group durable. A failed append is not
//!   durable, and never becomes so.
//! - No caller waits for ever: shuttle finds deadlocks and lost wake-ups.
//!
//! `ENVELOG_SHUTTLE` is how many schedules each test tries.

#![allow(clippy::unwrap_used)]

extern crate envelog_shuttle as envelog;

// The file itself: of the engine it uses only the items that this file imports.
#[allow(dead_code)]
#[path = "../../../src/shard/commit.rs"]
mod commit;
#[allow(dead_code)]
#[path = "../../../src/shard/handover.rs"]
mod handover;
#[allow(dead_code, unused_imports)]
#[path = "../../../src/sync.rs"]
mod sync;
#[allow(dead_code)]
#[path = "../../../src/shard/wakers.rs"]
mod wakers;

use std::{env, future::poll_fn, sync::Arc, task::Poll, time::Duration};

use bytes::Bytes;
use commit::{Dropped, Flush, Group, GroupCommit, Pending, Rejected, Reserved, Role};
use envelog::{Durability, Error, Result, group, inspect as segment};
use handover::Claim;
use shuttle::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

const NOW: Duration = Duration::ZERO;

fn schedules(usual: usize) -> usize {
    env::var("ENVELOG_SHUTTLE").map_or(usual, |count| count.parse().expect("a number"))
}

fn explore(scenario: fn()) {
    shuttle::check_random(scenario, schedules(2000));
    shuttle::check_pct(scenario, schedules(2000), 3);
}

/// The work of the leaders.
#[derive(Default)]
struct Disk {
    written: Vec<u64>,
    /// How many of `written` are synced.
    synced: usize,
}

struct World {
    commit: GroupCommit,
    disk: Mutex<Disk>,
    leading: AtomicBool,
    /// Each submitted group holds one byte of it.
    charged: AtomicUsize,
    /// How many turns the key is refused, and how many succeed before the disk fails.
    refusals: AtomicUsize,
    turns_left: AtomicUsize,
}

impl World {
    fn new(refusals: usize, turns: usize) -> Arc<Self> {
        let commit = GroupCommit::new(4, Duration::from_millis(100));
        commit.open(&Reserved { end_seq: 0, limit_seq: 100, last_time_us: 0, losses: 0 });
        Arc::new(Self {
            commit,
            disk: Mutex::default(),
            leading: AtomicBool::new(false),
            charged: AtomicUsize::new(0),
            refusals: AtomicUsize::new(refusals),
            turns_left: AtomicUsize::new(turns),
        })
    }

    fn submit(&self, durability: Durability) -> Option<u64> {
        let group = Group {
            kind: segment::BlockKind::Opaque,
            bytes: Bytes::from_static(b"x"),
            logs: 0,
            charged: 1,
            time_us: 0,
            submitted: NOW,
            acked: durability == Durability::Buffered,
        };
        self.charged.fetch_add(1, Ordering::SeqCst);
        match self.commit.submit(group) {
            Ok(submitted) => Some(submitted.seq),
            Err(Rejected::Stopped(_)) => {
                self.charged.fetch_sub(1, Ordering::SeqCst);
                None
            }
            Err(_) => panic!("it is open, and has numbers left"),
        }
    }

    /// The leader's work, as a shard does it. An error is a refusal of the key.
    fn turn(&self, own: Option<u64>) -> Result<()> {
        assert!(!self.leading.swap(true, Ordering::SeqCst), "two lead");
        let turn = self.write_run();
        if self.commit.wants_sync(own, turn.is_err()) {
            let mut disk = self.disk.lock().unwrap();
            disk.synced = disk.written.len();
            drop(disk);
            self.commit.synced();
        }
        self.leading.store(false, Ordering::SeqCst);
        turn
    }

    fn write_run(&self) -> Result<()> {
        let mut run = self.commit.take_run(1);
        while !run.is_empty() {
            let batch = run.remove(0);
            self.write_batch(batch, &mut run)?;
        }
        Ok(())
    }

    /// Writes a batch. If that fails, so do the ones that are `left`.
    fn write_batch(&self, batch: Vec<Pending>, left: &mut Vec<Vec<Pending>>) -> Result<()> {
        let and_left = |batch: Vec<Pending>, left: &mut Vec<Vec<Pending>>| -> Vec<Pending> {
            batch.into_iter().chain(left.drain(..).flatten()).collect()
        };
        let free = |count| {
            self.charged.fetch_sub(count, Ordering::SeqCst);
        };
        if self
            .refusals
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            .is_ok()
        {
            let refusal = Error::Closed("the key");
            free(self.commit.refuse(and_left(batch, left), &refusal, NOW).freed);
            return Err(refusal);
        }
        let charged_of =
            |batch: &[Pending]| batch.iter().map(|pending| pending.group.charged).sum();
        if self
            .turns_left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
            .is_err()
        {
            let batch = and_left(batch, left);
            free(charged_of(&batch));
            let error = Error::Closed("the disk");
            self.commit.fail(batch[0].seq..batch[batch.len() - 1].seq + 1, &error);
            free(self.commit.latch(Arc::new(error.clone()), &error));
            return Ok(());
        }
        self.disk.lock().unwrap().written.extend(batch.iter().map(|pending| pending.seq));
        free(charged_of(&batch));
        self.commit.written(batch[batch.len() - 1].seq + 1, None);
        Ok(())
    }

    fn wait(&self, seq: u64, durability: Durability) -> Result<()> {
        loop {
            let term = match self.commit.wait_or_lead(seq, durability) {
                Role::Done(outcome) => return outcome,
                Role::Leader(term) => term,
            };
            let turn = self.turn(Some(seq));
            let resigned = self.commit.resign(term, NOW, Some((seq, durability)));
            match (resigned.outcome, turn) {
                (Some(outcome), _) => return outcome,
                (None, Err(refusal)) if resigned.is_queued => return Err(refusal),
                _ => {}
            }
        }
    }

    /// A flush job under which no group lingers.
    fn flush(&self) {
        self.commit.begin_flush(NOW, true);
        while let Flush::Leader(term) = self.commit.lead_if_due(NOW) {
            let turn = self.turn(None);
            self.commit.resign(term, NOW, None);
            if turn.is_err() {
                return;
            }
        }
    }

    fn is_on_disk(&self, seq: u64, durability: Durability) -> bool {
        let disk = self.disk.lock().unwrap();
        match disk.written.iter().position(|&written| written == seq) {
            Some(at) => durability != Durability::Synced || at < disk.synced,
            None => durability == Durability::Buffered,
        }
    }

    /// Appends, and compares the outcome with the disk.
    fn append(&self, durability: Durability) {
        let Some(seq) = self.submit(durability) else { return };
        match self.wait(seq, durability) {
            Ok(()) => {
                assert!(self.is_on_disk(seq, durability), "{seq} is acknowledged, and not there")
            }
            Err(_) => assert!(
                !self.is_on_disk(seq, Durability::Synced),
                "{seq} has failed, and is durable"
            ),
        }
        self.commit.leave();
    }

    fn check(&self) {
        let disk = self.disk.lock().unwrap();
        assert!(disk.written.is_sorted_by(|a, b| a < b), "each once, in order: {:?}", disk.written);
        assert_eq!(self.charged.load(Ordering::SeqCst), 0, "what was charged is returned");
    }
}

fn spawn(world: &Arc<World>, act: fn(&World)) -> thread::JoinHandle<()> {
    let world = Arc::clone(world);
    thread::spawn(move || act(&world))
}

fn join(threads: impl IntoIterator<Item = thread::JoinHandle<()>>) {
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

/// Followers, leaders, a flush job, and a caller that claims the leadership for itself.
#[test]
fn acknowledged_groups_are_there() {
    explore(|| {
        let world = World::new(0, usize::MAX);
        let threads = [
            spawn(&world, |world| (0..2).for_each(|_| world.append(Durability::Synced))),
            spawn(&world, |world| world.append(Durability::Written)),
            spawn(&world, |world| {
                world.append(Durability::Buffered);
                world.flush();
            }),
            spawn(&world, |world| {
                let term = world.commit.lead();
                assert!(!world.leading.swap(true, Ordering::SeqCst), "two lead");
                world.leading.store(false, Ordering::SeqCst);
                world.commit.resign(term, NOW, None);
            }),
        ];
        join(threads);
        world.flush();
        world.check();
        assert_eq!(world.disk.lock().unwrap().written, [0, 1, 2, 3]);
        assert!(world.commit.is_idle());
    });
}

/// A sync covers every group that was submitted before it, under any leader.
#[test]
fn a_sync_covers_every_group_before_it() {
    explore(|| {
        let world = World::new(0, usize::MAX);
        let other = spawn(&world, |world| world.append(Durability::Written));
        let seq = world.submit(Durability::Buffered).unwrap();
        if let Ok(Some(last)) = world.commit.begin_sync() {
            world.wait(last, Durability::Synced).unwrap();
            world.commit.leave();
        }
        assert!(world.is_on_disk(seq, Durability::Synced));
        world.commit.leave();
        join([other]);
        world.check();
    });
}

/// The second write fails: every caller gets an error, and no group is accepted afterwards.
#[test]
fn a_failure_leaves_no_caller_waiting() {
    explore(|| {
        let world = World::new(0, 1);
        let threads = [
            spawn(&world, |world| (0..2).for_each(|_| world.append(Durability::Synced))),
            spawn(&world, |world| (0..2).for_each(|_| world.append(Durability::Written))),
            spawn(&world, |world| {
                world.append(Durability::Buffered);
                world.flush();
            }),
        ];
        join(threads);
        world.flush();
        world.check();
        let latched = world.commit.latch_cause().is_some();
        assert_eq!(latched, world.disk.lock().unwrap().written.len() < 5);
        assert_eq!(latched, world.submit(Durability::Synced).is_none());
    });
}

/// The key is refused for one turn: acknowledged groups stay queued and are written later. All
/// others fail.
#[test]
fn a_refusal_loses_no_acknowledged_group() {
    explore(|| {
        let world = World::new(1, usize::MAX);
        let threads = [
            spawn(&world, |world| (0..2).for_each(|_| world.append(Durability::Buffered))),
            spawn(&world, |world| (0..2).for_each(|_| world.append(Durability::Synced))),
            spawn(&world, World::flush),
        ];
        join(threads);
        // Now the key can be used again.
        world.flush();
        world.flush();
        world.check();
        assert!(!world.commit.has_queued());
    });
}

/// A caller that awaits its append is woken when a leader resigns.
#[test]
fn a_future_is_woken() {
    explore(|| {
        let world = World::new(0, usize::MAX);
        let seq = world.submit(Durability::Written).unwrap();
        let flusher = spawn(&world, World::flush);
        let outcome = shuttle::future::block_on(poll_fn(|context| {
            let outcome = world.commit.poll(Claim::Seq(seq), Durability::Written, context.waker());
            outcome.map_or(Poll::Pending, Poll::Ready)
        }));
        assert_eq!(outcome.unwrap(), seq);
        assert!(world.is_on_disk(seq, Durability::Written));
        world.commit.leave_claim(Claim::Seq(seq), Durability::Written);
        join([flusher]);
        world.check();
    });
}

/// Closing fails the groups that are still queued, and leaves no caller waiting.
#[test]
fn nothing_waits_for_ever_when_it_is_closed() {
    explore(|| {
        let world = World::new(0, usize::MAX);
        let threads = [
            spawn(&world, |world| world.append(Durability::Synced)),
            spawn(&world, |world| world.append(Durability::Written)),
        ];
        world.commit.close();
        let term = world.commit.lead();
        let (_, freed) = world.commit.give_up(&Error::Closed("the shard"));
        world.charged.fetch_sub(freed, Ordering::SeqCst);
        world.commit.resign(term, NOW, None);
        join(threads);
        world.check();
        assert!(world.submit(Durability::Written).is_none());
    });
}

/// A shard whose key is lost once. Its leaders sync without the lock of the writer.
struct Losing {
    commit: GroupCommit,
    writer: Mutex<Writer>,
    lost: AtomicBool,
    losses: AtomicUsize,
    /// How many acknowledged groups were counted as lost.
    dropped: AtomicUsize,
    /// The groups that were acknowledged in memory.
    buffered: Mutex<Vec<u64>>,
    charged: AtomicUsize,
}

#[derive(Default)]
struct Writer {
    /// The open segment: its number, and how often the key had been lost when it was begun.
    segment: Option<(u64, u64)>,
    begun: u64,
    syncing: bool,
    written: Vec<u64>,
}

impl Losing {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            commit: GroupCommit::new(4, Duration::from_millis(100)),
            writer: Mutex::default(),
            lost: AtomicBool::new(false),
            losses: AtomicUsize::new(0),
            dropped: AtomicUsize::new(0),
            buffered: Mutex::default(),
            charged: AtomicUsize::new(0),
        })
    }

    fn account(&self, dropped: Dropped) {
        self.charged.fetch_sub(dropped.freed, Ordering::SeqCst);
        self.dropped.fetch_add(dropped.lost.groups as usize, Ordering::SeqCst);
    }

    fn finish(&self, writer: &mut Writer) {
        let Some(loss) = self.commit.unfinished_expiry() else { return };
        let syncing = writer.syncing;
        if writer.segment.is_some_and(|(_, losses)| losses < loss) {
            (writer.segment, writer.syncing) = (None, false);
        }
        self.account(self.commit.finish_expiry(syncing));
    }

    /// Takes the writer, and gives it back.
    fn with_writer<T>(&self, act: impl FnOnce(&mut Writer) -> T) -> T {
        let mut writer = self.writer.lock().unwrap();
        self.finish(&mut writer);
        let done = act(&mut writer);
        drop(writer);
        if self.commit.writer_is_free().is_some()
            && let Ok(mut writer) = self.writer.try_lock()
        {
            self.finish(&mut writer);
        }
        done
    }

    fn reserved(&self, writer: &Writer) -> Option<Reserved> {
        writer.segment.map(|(_, losses)| Reserved {
            end_seq: 0,
            limit_seq: 100,
            last_time_us: 0,
            losses,
        })
    }

    fn prepare(&self) -> Result<()> {
        self.with_writer(|writer| {
            if self.lost.load(Ordering::SeqCst) {
                return Err(Error::Closed("the key"));
            }
            if writer.segment.is_none() {
                writer.begun += 1;
                let losses = self.losses.load(Ordering::SeqCst) as u64;
                writer.segment = Some((writer.begun, losses));
            }
            self.reserved(writer).iter().for_each(|reserved| self.commit.open(reserved));
            Ok(())
        })
    }

    /// One block, and one sync if a caller waits for it.
    fn turn(&self, own: Option<u64>) -> Result<()> {
        let (turn, syncing) = self.with_writer(|writer| {
            let turn = self.write(writer);
            let wants = self.commit.wants_sync(own, turn.is_err());
            writer.syncing = wants && writer.segment.is_some();
            (turn, writer.syncing.then_some(writer.segment))
        });
        if let Some(segment) = syncing {
            thread::yield_now();
            self.with_writer(|writer| {
                // Otherwise this leader is deposed.
                if writer.segment == segment {
                    writer.syncing = false;
                    self.commit.synced();
                }
            });
        }
        turn
    }

    fn write(&self, writer: &mut Writer) -> Result<()> {
        let mut run = self.commit.take_run(1);
        while !run.is_empty() {
            if self.lost.load(Ordering::SeqCst) || writer.segment.is_none() {
                let error = Error::Closed("the key");
                let left = run.into_iter().flatten().collect();
                self.account(self.commit.refuse(left, &error, NOW));
                return Err(error);
            }
            let batch = run.remove(0);
            writer.written.extend(batch.iter().map(|pending| pending.seq));
            let charged = batch.iter().map(|pending| pending.group.charged).sum();
            self.charged.fetch_sub(charged, Ordering::SeqCst);
            let to = batch[batch.len() - 1].seq + 1;
            self.commit.written(to, self.reserved(writer).as_ref());
        }
        Ok(())
    }

    fn append(&self, durability: Durability) {
        let mut group = Group {
            kind: segment::BlockKind::Opaque,
            bytes: Bytes::from_static(b"x"),
            logs: 0,
            charged: 1,
            time_us: 0,
            submitted: NOW,
            acked: durability == Durability::Buffered,
        };
        self.charged.fetch_add(1, Ordering::SeqCst);
        let seq = loop {
            group = match self.commit.submit(group) {
                Ok(submitted) => break submitted.seq,
                Err(Rejected::NotOpen(group)) if self.prepare().is_ok() => group,
                Err(_) => {
                    self.charged.fetch_sub(1, Ordering::SeqCst);
                    return;
                }
            };
        };
        let outcome = loop {
            let term = match self.commit.wait_or_lead(seq, durability) {
                Role::Done(outcome) => break outcome,
                Role::Leader(term) => term,
            };
            let turn = self.turn(Some(seq));
            let resigned = self.commit.resign(term, NOW, Some((seq, durability)));
            match (resigned.outcome, turn) {
                (Some(outcome), _) => break outcome,
                (None, Err(refusal)) if resigned.is_queued => break Err(refusal),
                _ => {}
            }
        };
        if durability == Durability::Buffered {
            self.buffered.lock().unwrap().push(seq);
        } else if outcome.is_ok() {
            assert!(self.writer.lock().unwrap().written.contains(&seq), "{seq} is not there");
        }
        self.commit.leave();
    }

    fn flush(&self) {
        self.commit.begin_flush(NOW, true);
        while let Flush::Leader(term) = self.commit.lead_if_due(NOW) {
            let turn = self.turn(None);
            self.commit.resign(term, NOW, None);
            if turn.is_err() {
                return;
            }
        }
    }

    /// The key is lost, the deadline passes at once, and the key is back.
    fn lose(&self) {
        self.lost.store(true, Ordering::SeqCst);
        let loss = self.losses.fetch_add(1, Ordering::SeqCst) as u64 + 1;
        self.account(self.commit.expire(loss, &Error::Closed("the key")));
        if let Ok(mut writer) = self.writer.try_lock() {
            self.finish(&mut writer);
        }
        self.lost.store(false, Ordering::SeqCst);
    }
}

/// The deadline of a loss passes at any moment. No caller waits for ever, every group is written at
/// most once, and every acknowledged group is written or counted as lost.
#[test]
fn an_expiry_counts_every_group_once() {
    explore(|| {
        let world = Losing::new();
        let spawn = |act: fn(&Losing)| {
            let world = Arc::clone(&world);
            thread::spawn(move || act(&world))
        };
        join([
            spawn(|world| (0..2).for_each(|_| world.append(Durability::Synced))),
            spawn(|world| world.append(Durability::Written)),
            spawn(|world| {
                (0..2).for_each(|_| world.append(Durability::Buffered));
                world.flush();
            }),
            spawn(Losing::lose),
        ]);
        // Now the key can be used again.
        world.append(Durability::Synced);
        world.flush();
        let mut written = world.writer.lock().unwrap().written.clone();
        let numbers = written.len();
        written.sort_unstable();
        written.dedup();
        assert_eq!(written.len(), numbers, "each once");
        assert_eq!(world.charged.load(Ordering::SeqCst), 0, "what was charged is returned");
        assert!(!world.commit.has_queued());
        let buffered = world.buffered.lock().unwrap();
        let missing = buffered.iter().filter(|seq| !written.contains(seq)).count();
        assert_eq!(world.dropped.load(Ordering::SeqCst), missing);
    });
}
