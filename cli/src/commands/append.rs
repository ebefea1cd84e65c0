//! `append`.

use std::{
    collections::BTreeMap,
    io::{self, IsTerminal, Write},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel},
    },
    thread,
    time::Duration,
};

use envelog::{AppendOptions, Logstore, ShardChoice, Ticket, group::GROUP_BYTES_MAX};
use serde::Serialize;

use crate::{
    args::{AppendArgs, DurabilityArg},
    exit::{Failure, Result, Status, both},
    input::{self, Input, Inputs},
    interrupt,
    lines::{LineGroup, Lines},
    output::{self, Progress},
    setup::{Setup, check_access, name},
};

/// The longest time a line waits for others to share its group, and the interval between checks of the
/// key.
const LINGER: Duration = Duration::from_millis(100);
/// The largest number of submitted groups that are not yet acknowledged.
const TICKETS_WAITING: usize = 1024;

pub(crate) fn run(setup: &Setup, args: &AppendArgs) -> Result {
    let name = name(&args.name)?;
    let group_bytes = usize::try_from(args.group_bytes)
        .ok()
        .filter(|bytes| (1..=GROUP_BYTES_MAX).contains(bytes))
        .ok_or_else(|| {
            Failure::usage(format!(
                "--group-bytes is {} bytes, a log group may have 1 to {GROUP_BYTES_MAX} bytes (16 MiB)",
                args.group_bytes
            ))
        })?;
    let inputs = input::open(&args.files)?;
    let store = setup.open()?;
    let logstore = store.logstore(&name)?;
    interrupt::defer()?;
    let _reminder =
        interrupt::Reminder::begin("the lines that were read are stored and acknowledged")?;
    let options = AppendOptions::default()
        .shard(args.shard.map_or(ShardChoice::RoundRobin, ShardChoice::Shard))
        .durability(args.durability.into());
    let lines = Lines::new(group_bytes, args.long_lines);
    let outcome = append(&logstore, &inputs, &options, lines, args.ack);
    // Close after a failure too: this seals the acknowledged groups and releases the lock.
    let closed = setup.close(store);
    let summary = match (outcome, closed) {
        // A caller who repeats the run after a failure has the logs twice.
        (Ok(summary), Err(failure))
            if args.durability != DurabilityArg::Buffered && failure.status() == Status::Other =>
        {
            output::notice(format_args!(
                "all logs are stored as acknowledged, but closing the store failed: {failure}"
            ));
            summary
        }
        (outcome, closed) => both(outcome, closed)?,
    };
    summary.print(setup.json, args.ack)?;
    interrupt::check_after_append(summary.kept_all)
}

fn append(
    logstore: &Logstore,
    inputs: &Inputs,
    options: &AppendOptions,
    lines: Lines,
    ack: bool,
) -> Result<Summary> {
    let (sender, receiver) = sync_channel(TICKETS_WAITING);
    let failed = Arc::new(AtomicBool::new(false));
    let settle = {
        let failed = Arc::clone(&failed);
        move || settle(&receiver, ack).inspect_err(|_| failed.store(true, Ordering::Relaxed))
    };
    let settling = thread::Builder::new()
        .name("settle".to_owned())
        .spawn(settle)
        .map_err(|error| Failure::other(format!("cannot start a thread: {error}")))?;
    // A user who types the lines sees them already. Acknowledgements would interleave with a bar.
    let progress = if io::stdin().is_terminal() && inputs.total.is_none() {
        Progress::none()
    } else if ack {
        Progress::beside_output(inputs.total)
    } else {
        Progress::bytes(inputs.total)
    };
    let feed = Feed { logstore, options, sender, key: KeyWatch::begin(logstore)? };
    let submitted = feed.run(inputs, lines, &failed, &progress);
    // A failure of a submitted group precedes a failure of the input, so report it first.
    let settled =
        settling.join().unwrap_or_else(|_| Err(Failure::other("the acknowledging thread failed")));
    let fed = match (&settled, submitted) {
        (_, Ok(fed)) => fed,
        (Ok(_), Err(failure)) => return Err(failure),
        (Err(_), Err(failure)) => return both(settled, Err(failure)),
    };
    settled.map(|summary| Summary { long_lines: fed.long_lines, kept_all: fed.kept_all, ..summary })
}

/// The result of feeding lines to the store.
struct Fed {
    /// The number of lines that were longer than a log may be.
    long_lines: u64,
    /// Whether no line was dropped in the middle.
    kept_all: bool,
}

/// Submits groups to the store. Dropping the feed drops the sender, which ends the settling thread.
struct Feed<'a> {
    logstore: &'a Logstore,
    options: &'a AppendOptions,
    sender: SyncSender<Pending>,
    key: KeyWatch,
}

/// Checks again and again whether the key may be used, so that a revocation ends an append whose
/// input is idle or whose line does not end. It does so in a thread of its own, because a check may
/// wait for a KMS, and a signal must not.
struct KeyWatch {
    refused: Receiver<Failure>,
    /// Dropping it ends the thread after the check that is under way.
    _watched: Sender<()>,
}

impl KeyWatch {
    fn begin(logstore: &Logstore) -> Result<Self> {
        let ((refuse, refused), (watched, ended)) = (sync_channel(1), channel());
        let logstore = logstore.clone();
        let watch = move || {
            while ended.recv_timeout(LINGER) == Err(RecvTimeoutError::Timeout) {
                if let Err(failure) = check_access(&logstore) {
                    // The receiver is gone if the append has ended.
                    let _ = refuse.send(failure);
                    return;
                }
            }
        };
        thread::Builder::new()
            .name("key".to_owned())
            .spawn(watch)
            .map_err(|error| Failure::other(format!("cannot start a thread: {error}")))?;
        Ok(Self { refused, _watched: watched })
    }

    fn check(&self) -> Result {
        self.refused.try_recv().map_or(Ok(()), Err)
    }
}

impl Feed<'_> {
    fn run(
        self,
        inputs: &Inputs,
        mut lines: Lines,
        failed: &AtomicBool,
        progress: &Progress,
    ) -> Result<Fed> {
        while !failed.load(Ordering::Relaxed) && !interrupt::asked() {
            let mut full = Vec::new();
            let patience = lines
                .waiting_since()
                .map_or(LINGER, |since| LINGER.saturating_sub(since.elapsed()));
            let taken = match inputs.receiver.recv_timeout(patience) {
                Ok(input) => take(input, &mut lines, &mut full, progress),
                Err(RecvTimeoutError::Timeout) => Ok(()),
                Err(RecvTimeoutError::Disconnected) => break,
            };
            if taken.is_err()
                || lines.waiting_since().is_some_and(|since| since.elapsed() >= LINGER)
            {
                full.extend(lines.cut());
            }
            full.into_iter().try_for_each(|group| self.submit(group))?;
            taken?;
            self.key.check()?;
        }
        // After a signal nothing more is read. The bytes that were read already are stored.
        while interrupt::asked()
            && !failed.load(Ordering::Relaxed)
            && let Ok(input) = inputs.receiver.recv_timeout(LINGER)
        {
            let mut full = Vec::new();
            let taken = take(input, &mut lines, &mut full, progress);
            full.into_iter().try_for_each(|group| self.submit(group))?;
            taken?;
        }
        lines.cut().into_iter().try_for_each(|group| self.submit(group))?;
        Ok(Fed { long_lines: lines.long_lines(), kept_all: !lines.is_within_line() })
    }

    fn submit(&self, group: LineGroup) -> Result {
        let ticket = self.logstore.submit(&group.group, self.options)?;
        let pending =
            Pending { ticket, logs: group.logs, bytes: group.bytes, last_line: group.last_line };
        // The receiver is gone only after a failure, which the settling thread reports.
        let _ = self.sender.send(pending);
        Ok(())
    }
}

/// Adds an event of the input to the lines. Full groups are put into `full`.
fn take(input: Input, lines: &mut Lines, full: &mut Vec<LineGroup>, progress: &Progress) -> Result {
    match input {
        Input::Begin(source) => lines.begin(&source),
        Input::Bytes(bytes) => {
            progress.add(bytes.len() as u64);
            return lines.push(&bytes, full);
        }
        Input::End => lines.end(full),
        Input::Failed(failure) => return Err(failure),
    }
    Ok(())
}

/// A submitted group that is not yet acknowledged.
struct Pending {
    ticket: Ticket,
    logs: u64,
    bytes: u64,
    last_line: u64,
}

/// Waits for the groups in order, and prints an acknowledgement for each if `ack` is set.
///
/// # Errors
/// The failure of a group, with the groups that were acknowledged before it.
fn settle(pending: &Receiver<Pending>, ack: bool) -> Result<Summary> {
    let mut summary = Summary::default();
    for Pending { ticket, logs, bytes, last_line } in pending {
        let appended = ticket.wait().map_err(|error| summary.acknowledged(Failure::from(error)))?;
        summary.groups += 1;
        summary.logs += logs;
        summary.bytes += bytes;
        summary.shards.entry(appended.shard).or_insert((appended.seq, appended.seq)).1 =
            appended.seq;
        if ack {
            let mut out = io::stdout().lock();
            writeln!(out, "{last_line}").and_then(|()| out.flush()).map_err(|error| match error
                .kind()
            {
                io::ErrorKind::BrokenPipe => Failure::cut_short(),
                _ => Failure::other(format!("cannot print an acknowledgement: {error}")),
            })?;
        }
    }
    Ok(summary)
}

/// Totals of the appended groups.
#[derive(Default)]
struct Summary {
    groups: u64,
    logs: u64,
    bytes: u64,
    /// For each shard, the first and the last sequence number.
    shards: BTreeMap<u32, (u64, u64)>,
    /// The number of lines that were longer than a log may be.
    long_lines: u64,
    /// Whether no line was dropped in the middle.
    kept_all: bool,
}

/// The answer of `append`.
#[derive(Serialize)]
struct Answer {
    groups: u64,
    logs: u64,
    bytes: u64,
    long_lines: u64,
    shards: Vec<OfShard>,
}

/// The groups that an `append` has added to a shard.
#[derive(Serialize)]
struct OfShard {
    shard: u32,
    first_seq: u64,
    last_seq: u64,
}

impl Summary {
    /// Adds the acknowledged groups to a failure, so that a caller can continue behind them.
    fn acknowledged(&self, failure: Failure) -> Failure {
        if self.groups == 0 {
            return failure;
        }
        let shards: Vec<_> = self
            .shards
            .iter()
            .map(|(shard, (first, last))| format!("shard {shard}: sequence {first} to {last}"))
            .collect();
        let (logs, shards) = (output::count(self.logs), shards.join(", "));
        failure.adding(&format!("{logs} logs were acknowledged before that ({shards})"))
    }

    /// Prints to standard output, or to standard error if acknowledgements use standard output.
    fn print(&self, json: bool, ack: bool) -> Result {
        let text = if json {
            let shards = self.shards.iter().map(|(&shard, &(first_seq, last_seq))| OfShard {
                shard,
                first_seq,
                last_seq,
            });
            output::json_line(&Answer {
                groups: self.groups,
                logs: self.logs,
                bytes: self.bytes,
                long_lines: self.long_lines,
                shards: shards.collect(),
            })?
        } else {
            let mut text = format!(
                "appended {} groups, {} logs, {} ({} bytes)",
                output::count(self.groups),
                output::count(self.logs),
                output::size(self.bytes),
                self.bytes
            );
            if self.long_lines > 0 {
                text += &format!("\nlines that were too long: {}", output::count(self.long_lines));
            }
            for (shard, (first, last)) in &self.shards {
                text += &format!("\nshard {shard}: first sequence {first}, last sequence {last}");
            }
            text
        };
        if ack {
            // A closed standard error is no failure: the appended groups are acknowledged already.
            let _ = writeln!(io::stderr(), "{text}");
            return Ok(());
        }
        text.lines().try_for_each(output::line)
    }
}
