//! Prints logs.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    io::{self, BufWriter, StdoutLock, Write},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use bytes::Bytes;
use envelog::{
    BlockKind, Record,
    group::{Content, Log, LogGroup},
};
use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::{
    args::Format,
    exit::{Failure, Result},
    lines::CONTENT,
    output::{self, Kind},
};

const BUFFER_BYTES: usize = 256 * 1024;

/// A log without its group.
pub(crate) struct OneLog {
    /// The sequence number of its group.
    pub(crate) seq: u64,
    pub(crate) receive_time_us: u64,
    text: Vec<u8>,
}

/// Prints logs to standard output until a limit is reached.
pub(crate) struct Printer {
    out: BufWriter<StdoutLock<'static>>,
    format: Format,
    left: u64,
}

impl Printer {
    /// Prints at most `limit` logs.
    pub(crate) fn new(format: Format, limit: Option<u64>) -> Self {
        let out = BufWriter::with_capacity(BUFFER_BYTES, io::stdout().lock());
        Self { out, format, left: limit.unwrap_or(u64::MAX) }
    }

    /// Whether the limit is reached.
    pub(crate) fn is_full(&self) -> bool {
        self.left == 0
    }

    /// Prints the logs of a record.
    pub(crate) fn record(&mut self, shard: u32, record: &Record) -> Result {
        let Self { out, format, left } = self;
        each_log(shard, record, *format, |write| {
            if *left == 0 {
                return Ok(());
            }
            *left -= 1;
            write(out).map_err(|error| Failure::output(&error))
        })
    }

    /// Prints a log that was stored before.
    pub(crate) fn log(&mut self, log: &OneLog) -> Result {
        self.out.write_all(&log.text).map_err(|error| Failure::output(&error))
    }

    /// Flushes buffered output.
    pub(crate) fn flush(&mut self) -> Result {
        self.out.flush().map_err(|error| Failure::output(&error))
    }
}

/// Formats the logs of a record.
pub(crate) fn logs(shard: u32, record: &Record, format: Format) -> Result<Vec<OneLog>> {
    let mut all = Vec::new();
    each_log(shard, record, format, |write| {
        let mut text = Vec::new();
        write(&mut text).map_err(|error| Failure::output(&error))?;
        all.push(OneLog { seq: record.seq, receive_time_us: record.receive_time_us, text });
        Ok(())
    })?;
    Ok(all)
}

/// Writes one log, with its newline.
type WriteLog<'a> = &'a dyn Fn(&mut dyn Write) -> io::Result<()>;

fn each_log(
    shard: u32,
    record: &Record,
    format: Format,
    mut take: impl FnMut(WriteLog<'_>) -> Result,
) -> Result {
    let place =
        Place { shard, seq: record.seq, receive_time: output::moment(record.receive_time_us) };
    if record.kind == BlockKind::Opaque {
        return take(&|out| match format {
            Format::Raw => write_line(out, &record.bytes),
            Format::Json => {
                write_json(out, &JsonOpaque { place: &place, opaque: Text(&record.bytes) })
            }
        });
    }
    let group = record.group()?;
    for log in &group.logs {
        take(&|out| match log.contents.iter().find(|content| &content.key[..] == CONTENT) {
            Some(content) if format == Format::Raw => write_line(out, &content.value),
            _ => write_json(out, &JsonLog::new(&place, &group, log)),
        })?;
    }
    Ok(())
}

fn write_line(out: &mut dyn Write, line: &[u8]) -> io::Result<()> {
    out.write_all(&output::for_stdout(line, Kind::Log))?;
    out.write_all(b"\n")
}

fn write_json(out: &mut dyn Write, value: &impl Serialize) -> io::Result<()> {
    if output::is_shown() {
        out.write_all(&output::visible(&serde_json::to_vec(value)?, Kind::Json))?;
    } else {
        serde_json::to_writer(&mut *out, value)?;
    }
    out.write_all(b"\n")
}

#[derive(Serialize)]
struct Place {
    shard: u32,
    seq: u64,
    receive_time: String,
}

#[derive(Serialize)]
struct JsonOpaque<'a> {
    #[serde(flatten)]
    place: &'a Place,
    opaque: Text<'a>,
}

#[derive(Serialize)]
struct JsonLog<'a> {
    #[serde(flatten)]
    place: &'a Place,
    time: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    time_ns: Option<u32>,
    topic: Option<Text<'a>>,
    source: Option<Text<'a>>,
    tags: Pairs<'a>,
    contents: Pairs<'a>,
}

impl<'a> JsonLog<'a> {
    fn new(place: &'a Place, group: &'a LogGroup, log: &'a Log) -> Self {
        Self {
            place,
            time: log.time,
            time_ns: log.time_ns,
            topic: group.topic.as_deref().map(Text),
            source: group.source.as_deref().map(Text),
            tags: Pairs::new(group.log_tags.iter().map(|tag| (&tag.key, &tag.value))),
            contents: Pairs::new(log.contents.iter().map(|Content { key, value }| (key, value))),
        }
    }
}

/// A string, or `{"base64": …}` when it is not UTF-8.
struct Text<'a>(&'a [u8]);

impl Serialize for Text<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        match std::str::from_utf8(self.0) {
            Ok(text) => serializer.serialize_str(text),
            Err(_) => {
                let mut map = serializer.serialize_map(Some(1))?;
                map.serialize_entry("base64", &STANDARD.encode(self.0))?;
                map.end()
            }
        }
    }
}

/// Keys and values as a JSON object. A key that occurs more than once has an array of its values.
struct Pairs<'a>(BTreeMap<&'a [u8], Vec<Text<'a>>>);

impl<'a> Pairs<'a> {
    fn new(pairs: impl Iterator<Item = (&'a Bytes, &'a Bytes)>) -> Self {
        let mut all = BTreeMap::<_, Vec<_>>::new();
        for (key, value) in pairs {
            all.entry(&key[..]).or_default().push(Text(value));
        }
        Self(all)
    }
}

impl Serialize for Pairs<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (key, values) in &self.0 {
            let key = match std::str::from_utf8(key) {
                Ok(key) => Cow::Borrowed(key),
                Err(_) => Cow::Owned(format!("base64:{}", STANDARD.encode(key))),
            };
            match &values[..] {
                [value] => map.serialize_entry(&key, value)?,
                values => map.serialize_entry(&key, values)?,
            }
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn json_keeps_what_is_not_utf8_and_keys_that_repeat() {
        let pair = |key: &'static [u8], value: &'static [u8]| Content {
            key: key.into(),
            value: value.into(),
        };
        let contents =
            vec![pair(b"a", b"1"), pair(b"b", b"\xff"), pair(b"a", b"2"), pair(b"\xfe", b"x")];
        let log = Log { time: 7, time_ns: None, contents };
        let group = LogGroup { source: Some(Bytes::from_static(b"host")), ..LogGroup::default() };
        let place = Place { shard: 1, seq: 2, receive_time: output::moment(1_500_000) };
        let json = serde_json::to_string(&JsonLog::new(&place, &group, &log)).unwrap();
        assert_eq!(
            json,
            r#"{"shard":1,"seq":2,"receive_time":"1970-01-01T00:00:01.500000Z","time":7,"topic":null,"source":"host","tags":{},"#
                .to_owned()
                + r#""contents":{"a":["1","2"],"b":{"base64":"/w=="},"base64:/g==":"x"}}"#
        );
    }
}
