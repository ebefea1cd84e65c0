//! PullLogs: stored groups are handed out as they are, behind the prefix that makes a list of them.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use envelog::{BlockKind, Logstore, Position, ReadOptions};
use tokio::time::timeout;

use crate::{
    call::Call,
    compression::{Form, HEADER, RAW_SIZE},
    cursors::{self, Cursors},
    error::{ApiError, Result},
    response::{Answer, Chunks},
    service::{Open, Service},
};

/// The most groups in an answer.
const GROUPS_MAX: u64 = 1000;
/// An answer ends behind the group that makes it this long, in bytes.
const ANSWER_BYTES: u64 = 5 << 20;
/// The memory that is set aside for an answer before its size is known: a block of the engine, and
/// a copy that is compressed.
const MEMORY: usize = 16 << 20;
/// The longest that a call may wait for logs, in milliseconds.
const WAIT_MS_MAX: u64 = 30_000;

/// The parameters of a call.
#[derive(Clone, Copy, Debug)]
struct Asked {
    shard: u32,
    cursor: u64,
    end: Option<u64>,
    groups: u64,
    form: Option<Form>,
    wait: Duration,
}

impl Asked {
    fn parse(logstore: &Logstore, shard: u32, call: &Call) -> Result<Self> {
        if call.parameter("query").is_some() || call.parameter("processor").is_some() {
            return Err(ApiError::unsupported("a query or a processor in PullLogs"));
        }
        let cursors = Cursors::of(&logstore.config());
        let end = call.parameter("end_cursor").or_else(|| call.parameter("endCursor"));
        let groups = call.number("count", GROUPS_MAX, GROUPS_MAX)?;
        if groups == 0 {
            return Err(ApiError::parameter(format!("count must be 1 to {GROUPS_MAX}")));
        }
        Ok(Self {
            shard,
            cursor: cursors.expect(call.required("cursor")?)?,
            end: end.map(|end| cursors.expect(end)).transpose()?,
            groups,
            form: Form::of_accept(call.header("accept-encoding")),
            wait: Duration::from_millis(call.number("wait", 0, WAIT_MS_MAX)?),
        })
    }

    fn options(&self) -> ReadOptions {
        let options = ReadOptions::default()
            .from(Position::Seq(self.cursor))
            .max_groups(self.groups)
            .max_bytes(ANSWER_BYTES);
        match self.end {
            Some(end) => options.to(Position::Seq(end)),
            None => options,
        }
    }

    /// Whether there may be something to read. Checks the key of the Logstore either way.
    fn look(&self, logstore: &Logstore) -> Result<bool> {
        drop(logstore.read(self.shard, &self.options())?);
        let end = logstore.end_seq(self.shard)?;
        if self.cursor > end {
            // After a power cut the groups at the end may be gone that a reader has seen.
            return Err(ApiError::parameter("the cursor is behind the end of the shard"));
        }
        Ok(self.cursor < self.end.unwrap_or(end).min(end))
    }
}

/// Groups, ready to be sent.
#[derive(Debug)]
struct Found {
    groups: u64,
    raw_size: usize,
    next: u64,
    body: Vec<Bytes>,
}

impl Found {
    fn nothing(next: u64) -> Self {
        Self { groups: 0, raw_size: 0, next, body: Vec::new() }
    }

    fn read(asked: &Asked, logstore: &Logstore) -> Result<Self> {
        // Read before the groups: a group that is appended in between must not be skipped.
        let end = cursors::end(logstore, asked.shard)?;
        let mut reader = logstore.read(asked.shard, &asked.options())?;
        let mut found = Self::nothing(0);
        while let Some(block) = reader.next_block()? {
            if block.records.iter().any(|record| record.kind != BlockKind::Groups) {
                let message = "the shard has a record here that is no log group: read it with \
                               the command line";
                return Err(ApiError::unsupported(message));
            }
            found.groups += block.records.len() as u64;
            found.raw_size += block.list.len();
            found.body.push(block.list);
        }
        // Without a group, the numbers up to the end were never used, or retention has dropped
        // them.
        let end = asked.end.unwrap_or(end).min(end);
        found.next = if found.groups > 0 { reader.next_seq() } else { asked.cursor.max(end) };
        Ok(found)
    }

    fn compress(&mut self, form: Form) -> Result<()> {
        let mut raw = BytesMut::with_capacity(self.raw_size);
        for part in self.body.drain(..) {
            raw.extend_from_slice(&part);
        }
        self.body.push(form.compress(&raw)?);
        Ok(())
    }

    fn answer(self, cursors: Cursors, form: Option<Form>) -> Answer {
        let answer = Answer::of(Chunks::new(self.body), "application/x-protobuf")
            .with("x-log-count", self.groups)
            .with("x-log-cursor", cursors.text(self.next))
            .with(RAW_SIZE, self.raw_size);
        match form {
            Some(form) if self.groups > 0 => answer.with(HEADER, form.name()),
            _ => answer,
        }
    }
}

/// `GET …/shards/{id}?type=log`.
pub(crate) async fn pull(
    service: &Arc<Service>,
    open: &Open,
    shard: u32,
    call: &Call,
) -> Result<Answer> {
    let asked = Asked::parse(&open.logstore, shard, call)?;
    let cursors = Cursors::of(&open.logstore.config());
    let mut has_more = open.run(move |logstore| asked.look(logstore)).await?;
    if !has_more && !asked.wait.is_zero() && asked.end.is_none() {
        wait(service, open, &asked).await?;
        has_more = open.run(move |logstore| asked.look(logstore)).await?;
    }
    if !has_more {
        return Ok(Found::nothing(asked.cursor).answer(cursors, None));
    }
    let memory = service.memory.take(MEMORY).await?;
    let found = open.run(move |logstore| {
        let mut found = Found::read(&asked, logstore)?;
        if let Some(form) = asked.form.filter(|_| found.groups > 0) {
            found.compress(form)?;
        }
        Ok(found)
    });
    Ok(found.await?.answer(cursors, asked.form).holding(memory))
}

/// Waits until the shard has grown beyond the cursor, the time is up, or the service stops.
async fn wait(service: &Service, open: &Open, asked: &Asked) -> Result<()> {
    let (shard, cursor) = (asked.shard, asked.cursor);
    let grown = open.run(move |logstore| Ok(logstore.wait_for(shard, cursor)?)).await?;
    let mut stopping = service.stopping.clone();
    let stopped = stopping.wait_for(|stopping| *stopping);
    let first = async {
        tokio::select! {
            () = grown => {}
            _ = stopped => {}
        }
    };
    let _ = timeout(asked.wait, first).await;
    Ok(())
}
