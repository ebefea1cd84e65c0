//! The newest logs of a Logstore, from all its shards, and a wait for more.

use std::{
    collections::BTreeMap, future::poll_fn, pin::Pin, sync::Arc, task::Poll, time::Duration,
};

use envelog::{
    BlockKind, Logstore, Position, ReadOptions, Record, group::Content, limits::SHARDS_MAX,
};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::logstore_of;
use crate::{
    auth::{Caller, Right},
    call::Call,
    error::{ApiError, Result},
    response::Answer,
    service::{Open, Service},
};

/// The longest that a call may wait for logs, in milliseconds.
const WAIT_MS_MAX: u64 = 30_000;
/// The most log groups of a shard from before the first call.
const BACK_MAX: u64 = 1_000;
/// A reader that is further behind than this many groups in a shard goes on at the newest ones.
const BEHIND_MAX: u64 = 2_000;
/// Where such a reader goes on, in groups in front of the end.
const RESUME: u64 = 100;
/// The most logs in an answer.
const LOGS_MAX: usize = 500;
/// The most bytes of logs that a call reads from all shards together, but one group of each.
const READ_BYTES: u64 = 1 << 20;
/// The longest field in an answer, in bytes.
const FIELD_BYTES_MAX: usize = 4 << 10;
/// The most bytes of fields in an answer.
const ANSWER_BYTES: usize = 2 << 20;
/// The memory that a call is accounted for: a block of the engine, and the answer.
const MEMORY: usize = 16 << 20;

/// The next sequence number, by shard. Its text is `SHARD:SEQ,SHARD:SEQ`.
type Place = BTreeMap<u32, u64>;

fn parse(text: &str) -> Option<Place> {
    let mut place = Place::new();
    for part in text.split(',') {
        let (shard, seq) = part.split_once(':')?;
        let shard = shard.parse().ok().filter(|shard| *shard < SHARDS_MAX)?;
        if place.insert(shard, seq.parse().ok()?).is_some() {
            return None;
        }
    }
    Some(place)
}

fn text(place: &Place) -> String {
    place.iter().map(|(shard, seq)| format!("{shard}:{seq}")).collect::<Vec<_>>().join(",")
}

/// Where a call begins.
#[derive(Debug)]
struct Look {
    place: Place,
    /// The shards that have more, with their ends.
    grown: Place,
    /// The groups that were passed over.
    skipped: u64,
}

impl Look {
    /// Checks the key of the Logstore, and which of its shards have logs behind `from`. Without
    /// that, the last `back` groups of each shard count. Blocks for file I/O and KMS calls.
    fn at(logstore: &Logstore, from: Option<&Place>, back: u64) -> Result<Self> {
        let mut look = Self { place: Place::new(), grown: Place::new(), skipped: 0 };
        for shard in &logstore.config().shards {
            if look.place.is_empty() {
                let at_end = ReadOptions::default().from(Position::End);
                drop(logstore.read(shard.id, &at_end)?);
            }
            let end = logstore.end_seq(shard.id)?;
            let seq = match from {
                None => end.saturating_sub(back),
                // A shard that the place does not have is newer.
                Some(from) => {
                    // After a power cut the groups at the end may be gone that a reader has seen.
                    let seq = from.get(&shard.id).copied().unwrap_or(0).min(end);
                    let resume = if end - seq > BEHIND_MAX { end - RESUME } else { seq };
                    look.skipped += resume - seq;
                    resume
                }
            };
            look.place.insert(shard.id, seq);
            if seq < end {
                look.grown.insert(shard.id, end);
            }
        }
        Ok(look)
    }
}

/// The logs of an answer.
#[derive(Debug, Default)]
struct Logs {
    /// With the time at which each was received.
    logs: Vec<(u64, Value)>,
    bytes: usize,
    /// Logs that were read and have no room in the answer.
    left_out: u64,
}

impl Logs {
    /// Reads the shards that have grown, and moves the place behind the groups that it has read.
    fn read(logstore: &Logstore, look: &mut Look) -> Result<Self> {
        let mut found = Self::default();
        let of_each = READ_BYTES / look.grown.len().max(1) as u64;
        for (&shard, &end) in &look.grown {
            let from = look.place.get(&shard).copied().unwrap_or(0);
            let options = ReadOptions::default()
                .from(Position::Seq(from))
                .to(Position::Seq(end))
                .max_bytes(of_each.max(1));
            let mut reader = logstore.read(shard, &options)?;
            let mut next = None;
            while let Some(record) = reader.try_next()? {
                next = Some(record.seq + 1);
                found.add(shard, &record);
            }
            // Without a group, the numbers up to the end were never used, or retention has dropped
            // them.
            look.place.insert(shard, next.unwrap_or(end));
        }
        found.logs.sort_by_key(|(received, _)| *received);
        Ok(found)
    }

    fn add(&mut self, shard: u32, record: &Record) {
        let received = record.receive_time_us;
        let base = || json!({ "shard": shard, "seq": record.seq, "received_us": received });
        let group = match record.kind {
            BlockKind::Groups => record.group().ok(),
            _ => None,
        };
        let Some(group) = group else {
            let mut log = base();
            log["fields"] = json!([["(opaque record)", self.show(&record.bytes)]]);
            return self.push(received, log);
        };
        let topic = group.topic.as_deref().unwrap_or_default();
        let source = group.source.as_deref().unwrap_or_default();
        for log in &group.logs {
            if self.is_full() {
                self.left_out += 1;
                continue;
            }
            let mut json = base();
            let mut fields = Vec::with_capacity(log.contents.len());
            for Content { key, value } in &log.contents {
                fields.push(json!([self.show(key.as_ref()), self.show(value.as_ref())]));
            }
            for tag in &group.log_tags {
                let key = format!("__tag__:{}", self.show(tag.key.as_ref()));
                fields.push(json!([key, self.show(tag.value.as_ref())]));
            }
            json["time"] = json!(log.time);
            json["topic"] = json!(self.show(topic));
            json["source"] = json!(self.show(source));
            json["fields"] = json!(fields);
            self.push(received, json);
        }
    }

    fn is_full(&self) -> bool {
        self.logs.len() >= LOGS_MAX || self.bytes >= ANSWER_BYTES
    }

    fn push(&mut self, received: u64, log: Value) {
        match self.is_full() {
            true => self.left_out += 1,
            false => self.logs.push((received, log)),
        }
    }

    /// Bytes as text, cut if they are long. Bytes that are not UTF-8 are replaced.
    fn show(&mut self, bytes: &[u8]) -> String {
        let room = ANSWER_BYTES.saturating_sub(self.bytes).min(FIELD_BYTES_MAX);
        let shown = &bytes[..bytes.len().min(room)];
        self.bytes += shown.len();
        let mut text = String::from_utf8_lossy(shown).into_owned();
        if shown.len() < bytes.len() {
            text.push_str(&format!("… ({} bytes)", bytes.len()));
        }
        text
    }
}

/// `GET /console/api/tail`.
pub(super) async fn answer(service: &Arc<Service>, caller: &Caller, call: &Call) -> Result<Answer> {
    let open = logstore_of(service, caller, call, Right::Read).await?;
    let invalid = || ApiError::parameter("position is none of the console");
    let from = call.parameter("position").map(|it| parse(it).ok_or_else(invalid)).transpose()?;
    let back = call.number("back", 0, BACK_MAX)?;
    let time = Duration::from_millis(call.number("wait", 0, WAIT_MS_MAX)?);
    let mut look = look_at(&open, from, back).await?;
    if look.grown.is_empty() && !time.is_zero() {
        wait(service, &open, &look.place, time).await?;
        look = look_at(&open, Some(look.place), back).await?;
    }
    if look.grown.is_empty() {
        return Ok(json_of(&look, Logs::default()));
    }
    let memory = service.memory.take(MEMORY).await?;
    let read = move |logstore: &Logstore| {
        let logs = Logs::read(logstore, &mut look)?;
        Ok(json_of(&look, logs))
    };
    Ok(open.run(read).await?.holding(memory))
}

async fn look_at(open: &Open, from: Option<Place>, back: u64) -> Result<Look> {
    open.run(move |logstore| Look::at(logstore, from.as_ref(), back)).await
}

fn json_of(look: &Look, logs: Logs) -> Answer {
    let left_out = logs.left_out;
    let logs: Vec<Value> = logs.logs.into_iter().map(|(_, log)| log).collect();
    Answer::json(&json!({
        "position": text(&look.place),
        "skipped_groups": look.skipped,
        "left_out": left_out,
        "logs": logs,
    }))
}

/// Waits until a shard has grown, the time is up, or the service stops.
async fn wait(service: &Service, open: &Open, place: &Place, time: Duration) -> Result<()> {
    let place = place.clone();
    let waits = move |logstore: &Logstore| {
        place
            .iter()
            .map(|(shard, seq)| Ok(logstore.wait_for(*shard, *seq)?))
            .collect::<Result<Vec<_>>>()
    };
    let mut waits = open.run(waits).await?;
    let grown = poll_fn(|context| {
        let is_ready = |it| Future::poll(Pin::new(it), context).is_ready();
        match waits.iter_mut().map(is_ready).fold(false, |any, it| any | it) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    });
    let mut stopping = service.stopping.clone();
    let stopped = stopping.wait_for(|stopping| *stopping);
    let first = async {
        tokio::select! {
            () = grown => {}
            _ = stopped => {}
        }
    };
    let _ = timeout(time, first).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_place_is_a_short_text() {
        let place = Place::from([(0, 5), (7, 0)]);
        assert_eq!(text(&place), "0:5,7:0");
        assert_eq!(parse("0:5,7:0"), Some(place));
        for wrong in ["", "0", "0:", ":1", "0:1,", "0:1,0:2", "256:1", "0:-1", "x:1"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn long_fields_are_cut_and_say_so() {
        let mut logs = Logs::default();
        assert_eq!(logs.show(b"short \xff"), "short \u{fffd}");
        let long = logs.show(&vec![b'x'; FIELD_BYTES_MAX + 1]);
        assert!(long.ends_with("… (4097 bytes)") && long.len() < FIELD_BYTES_MAX + 32);
    }
}
