//! Submissions that never block, appends as futures, and followers.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    future::Future,
    pin::{Pin, pin},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread,
};

use common::*;
use envelog::{
    AppendOptions, Durability, Error, LogGroup, Logstore, Payload, Position, ReadOptions, Result,
    Ticket, kms::RevokedReason::Disabled,
};
use futures_core::Stream;

/// Counts how often a task is woken, and lets a thread wait for it.
#[derive(Default)]
struct Task {
    wakes: AtomicU64,
    woken: Mutex<bool>,
    changed: Condvar,
}

impl Wake for Task {
    fn wake(self: Arc<Self>) {
        self.wakes.fetch_add(1, Ordering::SeqCst);
        *self.woken.lock().unwrap() = true;
        self.changed.notify_all();
    }
}

impl Task {
    fn poll<F: Future>(self: &Arc<Self>, future: Pin<&mut F>) -> Poll<F::Output> {
        future.poll(&mut Context::from_waker(&Waker::from(Arc::clone(self))))
    }

    fn wakes(&self) -> u64 {
        self.wakes.load(Ordering::SeqCst)
    }

    fn wait(&self) {
        let woken = self.woken.lock().unwrap();
        let waited = self.changed.wait_timeout_while(woken, secs(20), |woken| !*woken);
        let (mut woken, waited) = waited.unwrap();
        assert!(!waited.timed_out(), "the task is not woken");
        *woken = false;
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    let task = Arc::<Task>::default();
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = task.poll(future.as_mut()) {
            return output;
        }
        task.wait();
    }
}

fn written() -> AppendOptions {
    AppendOptions::default().durability(Durability::Written)
}

/// A store that was closed and is opened again while the KMS hangs.
struct Hung {
    world: World,
    logstore: Logstore,
    _store: envelog::Store,
}

impl Hung {
    fn new(set: impl FnOnce(&mut World)) -> Self {
        let mut world = World::threads();
        set(&mut world);
        let store = world.create();
        world.byok(&store, "p/l", &world.cmk());
        store.close().unwrap();
        let store = world.open();
        let logstore = store.logstore(&name("p/l")).unwrap();
        world.kms.answer(Answer::Late);
        Self { world, logstore, _store: store }
    }

    fn submit(&self, text: &str, options: &AppendOptions) -> Result<Ticket> {
        self.logstore.try_submit(record(text), options)
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        self.world.kms.answer(Answer::Real);
    }
}

#[test]
fn a_submission_does_not_wait_for_the_kms() {
    let hung = Hung::new(|world| world.options.kms_timeout = secs(60));
    let mut tickets: Vec<Ticket> =
        (0..3).map(|n| hung.submit(&n.to_string(), &written()).unwrap()).collect();
    let task = Arc::<Task>::default();
    for ticket in &mut tickets {
        assert!(!ticket.is_done() && ticket.appended().is_none());
        assert!(task.poll(Pin::new(ticket)).is_pending());
    }
    // Also for a group that is acknowledged as soon as it has its place.
    let buffered =
        hung.submit("3", &AppendOptions::default().durability(Durability::Buffered)).unwrap();
    assert!(!buffered.is_done());
    // The group of a dropped ticket is appended.
    drop(hung.submit("4", &written()).unwrap());
    hung.world.kms.answer(Answer::Real);
    let first = tickets.remove(0);
    // One waits in a thread, the others in tasks.
    let appended = first.wait().unwrap();
    assert_eq!((appended.shard, appended.seq), (0, 0));
    let seqs: Vec<u64> = tickets.into_iter().map(|ticket| block_on(ticket).unwrap().seq).collect();
    assert_eq!(seqs, [1, 2]);
    assert_eq!(block_on(buffered).unwrap().seq, 3);
    // A later append comes behind all of them.
    assert_eq!(hung.logstore.append(record("5"), &written()).unwrap().seq, 5);
    assert_eq!(texts(&hung.logstore), ["0", "1", "2", "3", "4", "5"]);
}

#[test]
fn a_blocking_append_comes_behind_the_submissions_before_it() {
    let hung = Hung::new(|world| world.options.kms_timeout = secs(60));
    let ticket = hung.submit("0", &written()).unwrap();
    thread::scope(|threads| {
        let append = threads.spawn(|| hung.logstore.append(record("1"), &written()));
        hung.world.kms.answer(Answer::Real);
        assert_eq!(append.join().unwrap().unwrap().seq, 1);
    });
    assert_eq!(ticket.wait().unwrap().seq, 0);
    assert_eq!(texts(&hung.logstore), ["0", "1"]);
}

#[test]
fn a_sync_and_a_close_include_the_submissions_before_them() {
    for closes in [false, true] {
        let hung = Hung::new(|world| world.options.kms_timeout = secs(60));
        let ticket = hung.submit("0", &written()).unwrap();
        let store = hung._store.clone();
        thread::scope(|threads| {
            let end = threads.spawn(|| match closes {
                false => hung.logstore.sync(),
                true => store.close(),
            });
            hung.world.kms.answer(Answer::Real);
            end.join().unwrap().unwrap();
        });
        assert_eq!(ticket.wait().unwrap().seq, 0);
    }
}

#[test]
fn submissions_fail_with_the_refusal_of_the_kms() {
    let hung = Hung::new(|world| world.options.kms_timeout = secs(60));
    let tickets: Vec<Ticket> =
        (0..3).map(|n| hung.submit(&n.to_string(), &written()).unwrap()).collect();
    hung.world.kms.answer(Answer::Revoked(Disabled));
    for ticket in tickets {
        assert!(matches!(block_on(ticket), Err(Error::Revoked { .. })));
    }
    // From now on a submission is refused at once.
    assert!(matches!(hung.submit("x", &written()), Err(Error::Revoked { .. })));
    hung.world.kms.answer(Answer::Real);
    hung.logstore.revalidate_now().unwrap();
    assert_eq!(hung.logstore.append(record("y"), &written()).unwrap().seq, 0);
}

/// A Logstore whose KMS hangs takes one group beyond the budget, and no more.
#[test]
fn an_append_as_a_future_awaits_room() {
    const BYTES: usize = 900 << 10;
    let hung = Hung::new(|world| {
        world.options.kms_timeout = secs(60);
        world.options.pending_bytes_max = 1 << 20;
    });
    let large = || record(&"x".repeat(BYTES));
    let first = hung.logstore.try_submit(large(), &written()).unwrap();
    assert!(matches!(
        hung.logstore.try_submit(large(), &written()),
        Err(Error::Full { pending }) if pending >= BYTES as u64
    ));
    let tasks: Vec<Arc<Task>> = (0..4).map(|_| Arc::default()).collect();
    let mut appends: Vec<_> = tasks
        .iter()
        .map(|task| {
            let mut append = Box::pin(hung.logstore.append_async(large(), &written()));
            assert!(task.poll(append.as_mut()).is_pending());
            append
        })
        .collect();
    // Nothing is appended for a future that was dropped while it awaited room, and the next one is
    // woken in its place.
    drop(appends.remove(0));
    hung.world.kms.answer(Answer::Real);
    block_on(first).unwrap();
    let seqs: Vec<u64> = appends.into_iter().map(|append| block_on(append).unwrap().seq).collect();
    assert_eq!(seqs.len(), 3);
    assert_eq!(records(&hung.logstore, 0).unwrap().len(), 4);
    assert_eq!(tasks[0].wakes(), 0);
}

/// The first poll gives an error that shows at once.
#[test]
fn a_future_returns_the_errors_of_its_arguments() {
    let world = World::threads();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    let options = written().shard(envelog::ShardChoice::Shard(9));
    let append = logstore.append_async(record("x"), &options);
    assert!(matches!(block_on(append), Err(Error::ShardMissing { shard: 9, .. })));
    let append = logstore.append_async(LogGroup::default(), &written());
    assert!(matches!(block_on(append), Err(Error::InvalidGroup(_))));
}

/// Blocks with earlier groups do not wake the task of a later group.
#[test]
fn a_waiting_ticket_costs_one_wake() {
    const GROUPS: usize = 400;
    let mut world = World::threads();
    // Each block takes a few groups.
    world.options.block_bytes = 4 << 10;
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    let text = "x".repeat(1000);
    let tasks: Vec<Arc<Task>> = (0..GROUPS).map(|_| Arc::default()).collect();
    let mut tickets: Vec<Ticket> =
        (0..GROUPS).map(|_| logstore.submit(record(&text), &written()).unwrap()).collect();
    let mut done = [false; GROUPS];
    for ((task, ticket), done) in tasks.iter().zip(&mut tickets).zip(&mut done) {
        *done = task.poll(Pin::new(ticket)).is_ready();
    }
    for ((task, ticket), done) in tasks.iter().zip(&mut tickets).zip(&mut done) {
        if !*done {
            task.wait();
            assert!(task.poll(Pin::new(ticket)).is_ready(), "it is woken when it is done");
        }
    }
    logstore.sync().unwrap();
    assert!(tasks.iter().all(|task| task.wakes() <= 1));
}

// ---- followers ----

fn push(logstore: &Logstore, text: &str) {
    logstore.append(record(text), &written()).unwrap();
}

#[test]
fn a_follower_waits_for_more() {
    let world = World::threads();
    let store = world.create();
    let logstore = world.byok(&store, "p/l", &world.cmk());
    push(&logstore, "0");
    let mut follow = logstore.follow(0, &ReadOptions::default()).unwrap();
    assert_eq!(follow.try_next().unwrap().unwrap().bytes, "0");
    assert!(follow.try_next().unwrap().is_none());
    assert!(follow.next_timeout(millis(1)).unwrap().is_none());
    thread::scope(|threads| {
        let following = threads
            .spawn(|| (1..4).map(|_| follow.next().unwrap().unwrap().bytes).collect::<Vec<_>>());
        for text in ["1", "2", "3"] {
            push(&logstore, text);
        }
        assert_eq!(following.join().unwrap(), ["1", "2", "3"]);
    });
    // Until its options say that it ends.
    let options = ReadOptions::default().max_groups(2);
    let texts: Vec<_> =
        logstore.follow(0, &options).unwrap().map(|record| record.unwrap().bytes).collect();
    assert_eq!(texts, ["0", "1"]);
}

/// The loss of the key, and the end of the store, wake every follower.
#[test]
fn a_follower_ends_with_its_key_and_with_its_store() {
    for revokes in [true, false] {
        let world = World::threads();
        let store = world.create();
        let logstore = world.byok(&store, "p/l", &world.cmk());
        push(&logstore, "0");
        let from = ReadOptions::default().from(Position::End);
        let (mut follow, wait) = (logstore.follow(0, &from).unwrap(), logstore.wait_for(0, 1));
        thread::scope(|threads| {
            let following = threads.spawn(|| (follow.next().unwrap(), follow.next()));
            let waiting = threads.spawn(|| wait.unwrap().wait());
            if revokes {
                world.kms.answer(Answer::Revoked(Disabled));
                logstore.revalidate_now().unwrap_err();
            } else {
                store.clone().close().unwrap();
            }
            waiting.join().unwrap();
            let (ended, after) = following.join().unwrap();
            let error = ended.unwrap_err();
            match revokes {
                true => assert!(matches!(error, Error::Revoked { .. }), "{error}"),
                false => assert!(matches!(error, Error::Closed(_)), "{error}"),
            }
            assert!(after.is_none());
        });
    }
}

#[test]
fn a_wait_ends_when_the_shard_has_grown() {
    let world = World::threads();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    assert!(!logstore.wait_for(0, 0).unwrap().wait_timeout(millis(1)));
    let task = Arc::<Task>::default();
    let mut wait = Box::pin(logstore.wait_for(0, 1).unwrap());
    assert!(task.poll(wait.as_mut()).is_pending());
    push(&logstore, "0");
    assert!(logstore.wait_for(0, 0).unwrap().wait_timeout(secs(0)));
    push(&logstore, "1");
    block_on(wait);
    // Another process writes the store.
    let beside = world.builder().open_read_only().unwrap();
    let logstore_beside = beside.logstore(logstore.name()).unwrap();
    logstore_beside.wait_for(0, 1).unwrap().wait();
    thread::scope(|threads| {
        let waiting = threads.spawn(|| logstore_beside.wait_for(0, 2).unwrap().wait());
        let mut follow =
            logstore_beside.follow(0, &ReadOptions::default().from(Position::Seq(2))).unwrap();
        let following = threads.spawn(move || follow.next().unwrap().unwrap().bytes);
        push(&logstore, "2");
        waiting.join().unwrap();
        assert_eq!(following.join().unwrap(), "2");
    });
}

/// Numbers that no group has do not keep a follower busy.
#[test]
fn a_follower_does_not_spin_over_numbers_that_are_not_there() {
    let world = World::threads();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    push(&logstore, "0");
    drop(store);
    drop(logstore);
    let store = world.open();
    let logstore = store.logstore(&name("p/l")).unwrap();
    let first = logstore.append(record("1"), &written()).unwrap().seq;
    let mut follow = logstore.follow(0, &ReadOptions::default()).unwrap();
    assert_eq!(follow.next().unwrap().unwrap().seq, 0);
    assert_eq!(follow.next().unwrap().unwrap().seq, first);
    let task = Arc::<Task>::default();
    let waker = Waker::from(Arc::clone(&task));
    let mut context = Context::from_waker(&waker);
    let mut stream = follow.into_stream();
    assert!(Pin::new(&mut stream).poll_next(&mut context).is_pending());
    assert_eq!(task.wakes(), 0);
}

#[test]
fn a_stream_calls_no_kms_when_it_is_polled() {
    let mut world = World::threads();
    world.options.kms_timeout = secs(60);
    let store = world.create();
    let logstore = world.byok(&store, "p/l", &world.cmk());
    push(&logstore, "0");
    store.close().unwrap();
    let store = world.open();
    let logstore = store.logstore(&name("p/l")).unwrap();
    let mut follow = logstore.follow(0, &ReadOptions::default()).unwrap().into_stream();
    // The data key is not in memory yet.
    world.kms.answer_for_data_keys(Answer::Late);
    let task = Arc::<Task>::default();
    let waker = Waker::from(Arc::clone(&task));
    let mut context = Context::from_waker(&waker);
    assert!(Pin::new(&mut follow).poll_next(&mut context).is_pending());
    world.kms.answer(Answer::Real);
    let mut next =
        || block_on(std::future::poll_fn(|context| Pin::new(&mut follow).poll_next(context)));
    assert_eq!(next().unwrap().unwrap().bytes, "0");
}

/// A job reads for the stream, and no job runs after the close.
#[test]
fn a_stream_ends_with_its_store_whether_or_not_its_job_has_run() {
    for _ in 0..20 {
        let world = World::threads();
        let store = world.create();
        let logstore = world.byok(&store, "p/l", &world.cmk());
        push(&logstore, "0");
        let mut stream = logstore.follow(0, &ReadOptions::default()).unwrap().into_stream();
        let task = Arc::<Task>::default();
        let waker = Waker::from(Arc::clone(&task));
        let mut context = Context::from_waker(&waker);
        assert!(Pin::new(&mut stream).poll_next(&mut context).is_pending());
        store.close().unwrap();
        loop {
            match Pin::new(&mut stream).poll_next(&mut context) {
                Poll::Pending => task.wait(),
                Poll::Ready(Some(Ok(record))) => assert_eq!(record.bytes, "0"),
                Poll::Ready(ended) => {
                    let error = ended.unwrap().unwrap_err();
                    assert!(matches!(error, Error::Closed(_)), "{error}");
                    break;
                }
            }
        }
    }
}

/// Followers have their own limit.
#[test]
fn followers_take_no_reader_away() {
    let mut world = World::threads();
    (world.options.readers_max, world.options.followers_max) = (1, 2);
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    let options = ReadOptions::default();
    let _followers: Vec<_> = (0..2).map(|_| logstore.follow(0, &options).unwrap()).collect();
    let error = logstore.follow(0, &options).unwrap_err();
    assert!(matches!(error, Error::TooManyReaders { limit: 2 }), "{error}");
    let _reader = logstore.read(0, &options).unwrap();
    let error = logstore.read(0, &options).unwrap_err();
    assert!(matches!(error, Error::TooManyReaders { limit: 1 }), "{error}");
}

/// A payload of any kind can be appended as a future that is sent to another thread.
#[test]
fn the_futures_are_send() {
    fn is_send<T: Send + 'static>(_: &T) {}
    let world = World::threads();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    let append = logstore.append_async(Payload::opaque("x").unwrap(), &written());
    is_send(&append);
    is_send(&logstore.wait_for(0, 0).unwrap());
    is_send(&logstore.follow(0, &ReadOptions::default()).unwrap());
    block_on(append).unwrap();
}

/// A KMS that hangs beyond its time limit holds calls, until the key's share of them is used up. A
/// second master key makes that share smaller than all calls.
#[test]
fn a_group_under_a_hung_key_is_refused_without_a_free_call() {
    let mut world = World::threads();
    world.options.revalidate_every = millis(100);
    world.options.kms_timeout = millis(150);
    world.options.outage_grace = millis(200);
    let store = world.create();
    let (hung, healthy) = (world.cmk(), world.cmk());
    let logstore = world.byok(&store, "p/hung", &hung);
    let other = world.byok(&store, "p/healthy", &healthy);
    put(&logstore, "before");
    put(&other, "before");
    world.kms.answer_for_master_key(&hung.cmk_key_id, Answer::Hang);
    eventually("the lease ends", || try_put(&logstore, "refused").is_err());
    // Renewals use up the share of calls meanwhile.
    for _ in 0..60 {
        thread::sleep(millis(50));
        let refused = logstore.try_submit(record("refused"), &synced()).and_then(block_on);
        assert!(matches!(refused, Err(Error::KmsUnreachable { .. })), "{refused:?}");
    }
    let mut follow = logstore.follow(0, &ReadOptions::default());
    if let Ok(follow) = &mut follow {
        assert!(matches!(follow.next(), Some(Err(Error::KmsUnreachable { .. }))));
    }
    put(&other, "another tenant goes on");
    world.kms.answer(Answer::Real);
}
