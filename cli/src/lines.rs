//! Converts bytes to log groups, one log per line.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use clap::ValueEnum;
use envelog::group::{Content, LOGS_PER_GROUP_MAX, Log, LogGroup, VALUE_BYTES_MAX};

use crate::exit::{Failure, Result, Status};

/// The key under which a line is stored.
pub(crate) const CONTENT: &[u8] = b"content";
/// An upper bound of a log's encoded bytes besides its line: the time and all tags and lengths.
const LOG_OVERHEAD: usize = 64;
/// An upper bound of a group's encoded bytes besides its logs and its source.
const GROUP_OVERHEAD: usize = 16;

/// What becomes of a line that is longer than a log may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum LongLines {
    /// Stop: the lines before it are appended
    #[default]
    Fail,
    /// Append it as several logs
    Split,
    /// Append its beginning
    Truncate,
    /// Leave it out
    Skip,
}

/// A group of whole lines.
pub(crate) struct LineGroup {
    pub(crate) group: LogGroup,
    /// Number of logs.
    pub(crate) logs: u64,
    /// Bytes of input, newlines included.
    pub(crate) bytes: u64,
    /// The number of its last line, counted from 1 over all input.
    pub(crate) last_line: u64,
}

/// Splits input at `\n` only, and collects lines into groups.
pub(crate) struct Lines {
    group_bytes: usize,
    source: Bytes,
    /// The start of a line whose end has not arrived yet.
    unfinished: BytesMut,
    logs: Vec<Log>,
    encoded: usize,
    bytes: u64,
    line: u64,
    since: Option<Instant>,
    policy: LongLines,
    /// Whether the current line is beyond the limit.
    is_long: bool,
    long_lines: u64,
}

impl Lines {
    /// `group_bytes` is the approximate size of an encoded group.
    pub(crate) fn new(group_bytes: usize, policy: LongLines) -> Self {
        Self {
            group_bytes,
            source: Bytes::new(),
            unfinished: BytesMut::new(),
            logs: Vec::new(),
            encoded: 0,
            bytes: 0,
            line: 0,
            since: None,
            policy,
            is_long: false,
            long_lines: 0,
        }
    }

    /// Sets the source of the next bytes. The previous source must have been ended.
    pub(crate) fn begin(&mut self, source: &str) {
        self.source = Bytes::copy_from_slice(source.as_bytes());
    }

    /// Adds bytes, and pushes groups that are full to `full`.
    ///
    /// With [`LongLines::Fail`], a line beyond the limit is an error. The lines before it are in
    /// `full`, or come with the next [`Lines::cut`].
    pub(crate) fn push(&mut self, chunk: &Bytes, full: &mut Vec<LineGroup>) -> Result {
        let now = now();
        let mut begin = 0;
        for end in memchr::memchr_iter(b'\n', chunk) {
            self.part(chunk.slice(begin..end), true, now, full)?;
            begin = end + 1;
        }
        if begin < chunk.len() {
            self.part(chunk.slice(begin..), false, now, full)?;
        }
        Ok(())
    }

    /// Ends the source. A last line without a newline is a line too.
    pub(crate) fn end(&mut self, full: &mut Vec<LineGroup>) {
        if !self.unfinished.is_empty() {
            let line = self.unfinished.split().freeze();
            self.add(line, 0, now(), full);
            self.line += 1;
        }
        self.is_long = false;
        full.extend(self.cut());
    }

    /// Whether a line has begun and not ended.
    pub(crate) fn is_within_line(&self) -> bool {
        !self.unfinished.is_empty() || self.is_long
    }

    /// The number of lines so far that were beyond the limit.
    pub(crate) fn long_lines(&self) -> u64 {
        self.long_lines
    }

    /// Adds the rest of a line, or a part of one that goes on.
    fn part(
        &mut self,
        mut part: Bytes,
        ends: bool,
        now: (u32, u32),
        full: &mut Vec<LineGroup>,
    ) -> Result {
        while self.unfinished.len() + part.len() > VALUE_BYTES_MAX && !self.drops_rest() {
            if self.policy == LongLines::Fail {
                return Err(self.too_long());
            }
            if !std::mem::replace(&mut self.is_long, true) {
                self.long_lines += 1;
            }
            let rest = part.split_off(VALUE_BYTES_MAX - self.unfinished.len());
            self.unfinished.extend_from_slice(&part);
            part = rest;
            let piece = self.unfinished.split().freeze();
            if self.policy == LongLines::Skip {
                self.bytes += piece.len() as u64;
            } else {
                self.add(piece, 0, now, full);
            }
        }
        if self.drops_rest() {
            self.bytes += part.len() as u64 + u64::from(ends);
        } else if !ends {
            self.unfinished.extend_from_slice(&part);
        } else if self.unfinished.is_empty() {
            self.add(part, 1, now, full);
        } else {
            self.unfinished.extend_from_slice(&part);
            let line = self.unfinished.split().freeze();
            self.add(line, 1, now, full);
        }
        if ends {
            self.line += 1;
            self.is_long = false;
        }
        Ok(())
    }

    /// Whether the rest of the current line is dropped.
    fn drops_rest(&self) -> bool {
        self.is_long && self.policy != LongLines::Split
    }

    /// Makes a group of the whole lines that are waiting.
    pub(crate) fn cut(&mut self) -> Option<LineGroup> {
        if self.logs.is_empty() {
            return None;
        }
        let logs = std::mem::take(&mut self.logs);
        self.encoded = 0;
        self.since = None;
        Some(LineGroup {
            logs: logs.len() as u64,
            bytes: std::mem::take(&mut self.bytes),
            last_line: self.line,
            group: LogGroup { logs, source: Some(self.source.clone()), ..LogGroup::default() },
        })
    }

    /// When the oldest waiting whole line arrived.
    pub(crate) fn waiting_since(&self) -> Option<Instant> {
        self.since
    }

    fn too_long(&self) -> Failure {
        Failure::new(
            Status::Other,
            "too_large",
            format!(
                "line {} of the input is too long: a log may have {VALUE_BYTES_MAX} bytes (see --long-lines); all lines before it are appended",
                self.line + 1
            ),
        )
    }

    fn add(&mut self, line: Bytes, newline: u64, now: (u32, u32), full: &mut Vec<LineGroup>) {
        let encoded = line.len() + LOG_OVERHEAD;
        let group = GROUP_OVERHEAD + self.source.len();
        if group + self.encoded + encoded > self.group_bytes
            || self.logs.len() >= LOGS_PER_GROUP_MAX
        {
            full.extend(self.cut());
        }
        self.since.get_or_insert_with(Instant::now);
        self.encoded += encoded;
        self.bytes += line.len() as u64 + newline;
        self.logs.push(Log {
            time: now.0,
            time_ns: Some(now.1),
            contents: vec![Content::new(CONTENT, line)],
        });
    }
}

/// Converts a whole text to groups.
pub(crate) fn groups(source: &str, text: Bytes, group_bytes: usize) -> Result<Vec<LineGroup>> {
    let mut lines = Lines::new(group_bytes, LongLines::Fail);
    let mut full = Vec::new();
    lines.begin(source);
    lines.push(&text, &mut full)?;
    lines.end(&mut full);
    Ok(full)
}

/// Seconds since the Unix epoch, and the nanoseconds beyond them.
fn now() -> (u32, u32) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    (u32::try_from(since.as_secs()).unwrap_or(u32::MAX), since.subsec_nanos())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn text(groups: &[LineGroup]) -> Vec<Vec<u8>> {
        groups
            .iter()
            .flat_map(|group| &group.group.logs)
            .map(|log| log.contents.iter().flat_map(|content| content.value.to_vec()).collect())
            .collect()
    }

    #[test]
    fn lines_are_split_at_newlines_alone_however_the_bytes_come() {
        let input = b"one\r\n\n\xff\xfe two\x0b\nthree";
        let expected: Vec<Vec<u8>> =
            vec![b"one\r".to_vec(), b"".to_vec(), b"\xff\xfe two\x0b".to_vec(), b"three".to_vec()];
        for piece in 1..=input.len() {
            let mut lines = Lines::new(64 * 1024, LongLines::Fail);
            let mut full = Vec::new();
            lines.begin("file");
            for chunk in input.chunks(piece) {
                lines.push(&Bytes::copy_from_slice(chunk), &mut full).unwrap();
            }
            lines.end(&mut full);
            assert_eq!(text(&full), expected, "in pieces of {piece}");
            assert_eq!(full.iter().map(|group| group.bytes).sum::<u64>(), input.len() as u64);
            assert_eq!(full.last().unwrap().last_line, 4);
        }
    }

    #[test]
    fn groups_keep_to_their_size() {
        let text = Bytes::from("0123456789\n".repeat(1000));
        let full = groups("file", text, 1000).unwrap();
        assert_eq!(full.iter().map(|group| group.logs).sum::<u64>(), 1000);
        for group in &full {
            assert!(group.group.encode_to_bytes().len() <= 1000, "{} logs", group.logs);
            assert!(group.logs > 1);
        }
    }

    #[test]
    fn a_line_longer_than_a_group_is_a_group_of_its_own() {
        let text = Bytes::from([b"a\n".to_vec(), vec![b'x'; 5000], b"\nb\n".to_vec()].concat());
        let full = groups("file", text, 1000).unwrap();
        assert_eq!(full.iter().map(|group| group.logs).collect::<Vec<_>>(), [1, 1, 1]);
    }

    #[test]
    fn a_line_beyond_the_limit_is_refused_and_earlier_ones_kept() {
        let mut lines = Lines::new(64 * 1024, LongLines::Fail);
        let mut full = Vec::new();
        lines.begin("file");
        lines.push(&Bytes::from_static(b"before\n"), &mut full).unwrap();
        let half = Bytes::from(vec![b'x'; VALUE_BYTES_MAX / 2 + 1]);
        lines.push(&half, &mut full).unwrap();
        let failure = lines.push(&half, &mut full).unwrap_err();
        assert!(failure.to_string().contains("line 2"), "{failure}");
        full.extend(lines.cut());
        assert_eq!(text(&full), [b"before".to_vec()]);
    }

    #[test]
    fn long_lines_are_split_truncated_or_skipped() {
        let long = VALUE_BYTES_MAX * 2 + 7;
        let input = [b"one\n".to_vec(), vec![b'x'; long], b"\nthree\nrest".to_vec()].concat();
        for (policy, lens) in [
            (LongLines::Split, vec![3, VALUE_BYTES_MAX, VALUE_BYTES_MAX, 7, 5, 4]),
            (LongLines::Truncate, vec![3, VALUE_BYTES_MAX, 5, 4]),
            (LongLines::Skip, vec![3, 5, 4]),
        ] {
            for piece in [1 << 20, 7_000_003, input.len()] {
                let mut lines = Lines::new(64 * 1024, policy);
                let mut full = Vec::new();
                lines.begin("file");
                for chunk in input.chunks(piece) {
                    lines.push(&Bytes::copy_from_slice(chunk), &mut full).unwrap();
                }
                lines.end(&mut full);
                let found: Vec<usize> = text(&full).iter().map(Vec::len).collect();
                assert_eq!(found, lens, "{policy:?} in pieces of {piece}");
                assert_eq!(lines.long_lines(), 1);
                assert_eq!(full.last().unwrap().last_line, 4);
                let bytes: u64 = full.iter().map(|group| group.bytes).sum();
                assert_eq!(bytes, input.len() as u64, "{policy:?}");
            }
        }
    }
}
