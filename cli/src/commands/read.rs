//! `read` and `tail`.

use std::{
    collections::VecDeque,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use envelog::{Error, Logstore, LostRange, Position, ReadOptions, Reader};

use crate::{
    args::{Format, ReadArgs, TailArgs},
    exit::{Result, Status, both},
    output::{self, Progress},
    record::{self, OneLog, Printer},
    setup::{Setup, check_access, name},
};

/// How many times further back `tail` looks if it has found too few logs.
const STEP: u64 = 16;
/// How often `tail -f` polls for new logs.
const LOOK_EVERY: Duration = Duration::from_millis(100);

pub(crate) fn read(setup: &Setup, args: &ReadArgs) -> Result {
    let store = setup.open_read_only()?;
    let logstore = store.logstore(&name(&args.name)?)?;
    let mut printer = Printer::new(Format::choose(args.format, setup.json), args.limit);
    let from = args.since.map_or(args.from, before_now);
    // Print the logs read before an error.
    let progress = Progress::beside_output(None);
    let all = shards(&logstore, args.shard);
    let is_one = all.len() == 1;
    let outcome = all.into_iter().try_for_each(|shard| {
        if printer.is_full() {
            return Ok(());
        }
        let options = ReadOptions::default().from(from).to(args.to).skip_lost(args.skip_lost);
        let mut reader = logstore.read(shard, &options)?;
        loop {
            let record = match reader.try_next() {
                // Of several shards, one may have fewer groups than the others.
                Err(Error::AboveEnd { .. }) if !is_one => None,
                record => record?,
            };
            let Some(record) = record else { break };
            progress.add(record.bytes.len() as u64);
            printer.record(shard, &record)?;
            if printer.is_full() {
                break;
            }
        }
        warn_of_lost(&reader, 0)
    });
    drop(progress);
    both(outcome, printer.flush())
}

/// The receive time that is this long ago.
fn before_now(since: Duration) -> Position {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Position::Time(now.saturating_sub(since).as_micros().try_into().unwrap_or(u64::MAX))
}

/// Names the groups from a number on that a reader has passed because they are lost.
fn warn_of_lost(reader: &Reader, from: u64) -> Result {
    for lost in reader.lost().iter().filter(|lost| lost.end_seq.is_none_or(|end| end > from)) {
        let LostRange { shard, from_seq, end_seq, .. } = lost;
        let to = end_seq.map_or_else(|| "on".to_owned(), |end| format!("to before {end}"));
        let how = match lost {
            LostRange { shredded: true, .. } => " (their data key was destroyed)",
            LostRange { accepted: true, .. } => " (an operator has accepted that)",
            _ => "",
        };
        output::notice(format_args!(
            "shard {shard} has lost groups from number {from_seq} {to}{how}"
        ));
    }
    Ok(())
}

pub(crate) fn tail(setup: &Setup, args: &TailArgs) -> Result {
    let store = setup.open_read_only()?;
    let logstore = store.logstore(&name(&args.name)?)?;
    let format = Format::choose(args.format, setup.json);
    let mut last = Vec::new();
    let mut followed = Vec::new();
    for shard in shards(&logstore, args.shard) {
        let (logs, reader) = last_logs(&logstore, shard, args.lines, format)?;
        last.extend(logs);
        followed.push((shard, reader));
    }
    last.sort_by_key(|log| log.receive_time_us);
    let mut printer = Printer::new(format, None);
    let skipped = last.len().saturating_sub(args.lines);
    last.iter().skip(skipped).try_for_each(|log| printer.log(log))?;
    printer.flush()?;
    if !args.follow {
        return Ok(());
    }
    let passed = |reader: &Reader| reader.lost().last().and_then(|lost| lost.end_seq).unwrap_or(0);
    let mut named: Vec<u64> = followed.iter().map(|(_, reader)| passed(reader)).collect();
    loop {
        let mut idle = true;
        for ((shard, reader), named) in followed.iter_mut().zip(&mut named) {
            while let Some(record) = reader.try_next()? {
                idle = false;
                printer.record(*shard, &record)?;
            }
            if passed(reader) > *named {
                warn_of_lost(reader, *named)?;
                *named = passed(reader);
            }
        }
        printer.flush()?;
        if idle {
            // A split or a merge has added shards.
            let next = followed.len() as u32;
            if args.shard.is_none()
                && let Some(reader) = new_shard(&logstore, next)?
            {
                followed.push((next, reader));
                continue;
            }
            // Check access here: without new records, reading does not detect a revocation.
            check_access(&logstore)?;
            output::wait_while_read(LOOK_EVERY)?;
        }
    }
}

/// A reader of a shard, if there is one of that number by now.
fn new_shard(logstore: &Logstore, shard: u32) -> Result<Option<Reader>> {
    match logstore.read(shard, &ReadOptions::default().skip_lost(true)) {
        Err(Error::ShardMissing { .. }) => Ok(None),
        reader => Ok(Some(reader?)),
    }
}

/// Returns the last `wanted` logs of a shard, and a reader positioned behind them.
fn last_logs(
    logstore: &Logstore,
    shard: u32,
    wanted: usize,
    format: Format,
) -> Result<(VecDeque<OneLog>, Reader)> {
    let end = logstore.end_seq(shard)?;
    let most = wanted as u64;
    let read = |distance| logs_from(logstore, shard, end.saturating_sub(distance), wanted, format);
    // A group has at least one log, and may have many. Sequence numbers may have gaps.
    let mut distance = 1.min(most);
    let mut found = read(distance)?;
    let mut forged = None;
    while found.0.len() < wanted && distance < end {
        let further = match &forged {
            None if distance < most => distance.saturating_mul(STEP).min(most),
            None => distance.saturating_mul(STEP),
            // Forged logs hide none of those behind them.
            Some((too_far, _)) => distance + (too_far - distance) / 2,
        };
        if further == distance {
            break;
        }
        match read(further) {
            Err(failure) if failure.status() == Status::Integrity => {
                forged = Some((further, failure));
            }
            more => (distance, found) = (further, more?),
        }
    }
    if let Some((too_far, failure)) = forged.filter(|_| found.0.len() < wanted) {
        if too_far <= most {
            return Err(failure);
        }
        output::notice(format_args!("shard {shard} has no older logs: {failure}"));
    }
    // Losses in front of the wanted logs cost nothing.
    let oldest = found.0.front().filter(|_| found.0.len() >= wanted).map_or(0, |log| log.seq);
    warn_of_lost(&found.1, oldest)?;
    Ok(found)
}

/// Returns at most the last `wanted` logs of a shard from a number on, and a reader positioned
/// behind them.
fn logs_from(
    logstore: &Logstore,
    shard: u32,
    from: u64,
    wanted: usize,
    format: Format,
) -> Result<(VecDeque<OneLog>, Reader)> {
    let options = ReadOptions::default().from(Position::Seq(from)).skip_lost(true);
    let mut reader = logstore.read(shard, &options)?;
    let mut kept = VecDeque::new();
    while let Some(record) = reader.try_next()? {
        kept.extend(record::logs(shard, &record, format)?);
        kept.drain(..kept.len().saturating_sub(wanted));
    }
    Ok((kept, reader))
}

/// The requested shard, or all shards.
fn shards(logstore: &Logstore, asked: Option<u32>) -> Vec<u32> {
    match asked {
        Some(shard) => vec![shard],
        None => logstore.config().shards.iter().map(|shard| shard.id).collect(),
    }
}
