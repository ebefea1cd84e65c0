//! Log groups: the public SLS protobuf messages, their limits, and the framing of a `LogGroupList`.
//!
//! Strings are bytes here, and are not checked for UTF-8. The engine stores and returns a client's
//! bytes verbatim.

use std::ops::Range;

use bytes::Bytes;
use prost::Message;

/// The longest encoded group, in bytes.
pub const GROUP_BYTES_MAX: usize = 16 << 20;
/// The most logs in a group.
pub const LOGS_PER_GROUP_MAX: usize = 1_000_000;
/// The most key-value pairs in a log.
pub const CONTENTS_PER_LOG_MAX: usize = 65_536;
/// The most tags of a group.
pub const TAGS_PER_GROUP_MAX: usize = 65_536;
/// The longest key of a log or tag, and the longest topic, source, category and machine UUID, in
/// bytes.
pub const KEY_BYTES_MAX: usize = 64 << 10;
/// The longest value of a log or tag, in bytes.
pub const VALUE_BYTES_MAX: usize = 10 << 20;

/// The deepest nesting of groups (the protobuf wire type) in unknown fields, including the messages
/// around them.
const NESTING_MAX: u32 = 100;

/// A group of logs that are stored together, in order, under one sequence number.
#[derive(Clone, PartialEq, Message)]
pub struct LogGroup {
    /// The logs.
    #[prost(message, repeated, tag = "1")]
    pub logs: Vec<Log>,
    /// The category; reserved.
    #[prost(bytes = "bytes", optional, tag = "2")]
    pub category: Option<Bytes>,
    /// The topic.
    #[prost(bytes = "bytes", optional, tag = "3")]
    pub topic: Option<Bytes>,
    /// The origin of the logs, such as an IP address.
    #[prost(bytes = "bytes", optional, tag = "4")]
    pub source: Option<Bytes>,
    /// The machine of origin.
    #[prost(bytes = "bytes", optional, tag = "5")]
    pub machine_uuid: Option<Bytes>,
    /// Tags for all logs of the group.
    #[prost(message, repeated, tag = "6")]
    pub log_tags: Vec<LogTag>,
}

/// One log.
#[derive(Clone, PartialEq, Message)]
pub struct Log {
    /// The time of the event, in seconds since the Unix epoch.
    #[prost(uint32, required, tag = "1")]
    pub time: u32,
    /// The contents of the log.
    #[prost(message, repeated, tag = "2")]
    pub contents: Vec<Content>,
    /// Nanoseconds within the second of [`Log::time`].
    #[prost(fixed32, optional, tag = "4")]
    pub time_ns: Option<u32>,
}

/// A key-value pair of a log.
#[derive(Clone, PartialEq, Message)]
pub struct Content {
    /// The key.
    #[prost(bytes = "bytes", required, tag = "1")]
    pub key: Bytes,
    /// The value.
    #[prost(bytes = "bytes", required, tag = "2")]
    pub value: Bytes,
}

/// A tag of a group.
#[derive(Clone, PartialEq, Message)]
pub struct LogTag {
    /// The key.
    #[prost(bytes = "bytes", required, tag = "1")]
    pub key: Bytes,
    /// The value.
    #[prost(bytes = "bytes", required, tag = "2")]
    pub value: Bytes,
}

/// The reason why bytes are not a valid log group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GroupError {
    /// The bytes are not the expected protobuf message.
    #[error("malformed log group: {what} at byte {at}")]
    Malformed {
        /// The offset at which the fault shows.
        at: usize,
        /// The fault.
        what: &'static str,
    },
    /// There are no bytes.
    #[error("the log group is empty")]
    Empty,
    /// The group has no logs.
    #[error("the log group has no logs")]
    NoLogs,
    /// A part of the group exceeds a limit.
    #[error("{what} of the log group: {size} is beyond the limit of {limit}")]
    TooLarge {
        /// The part.
        what: &'static str,
        /// Its size in bytes, or its number. The true value may be larger, because counting stops
        /// beyond the limit.
        size: usize,
        /// The limit.
        limit: usize,
    },
}

/// The result of [`validate_group`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct GroupSummary {
    /// The number of logs in the group.
    pub logs: u32,
}

impl LogGroup {
    /// The protobuf encoding.
    #[must_use]
    pub fn encode_to_bytes(&self) -> Bytes {
        self.encode_to_vec().into()
    }

    /// Decodes the protobuf encoding of a group. Copies it once.
    ///
    /// # Errors
    /// As [`validate_group`].
    pub fn decode(bytes: &[u8]) -> Result<Self, GroupError> {
        validate_group(bytes)?;
        Self::decode_valid(Bytes::copy_from_slice(bytes))
    }

    /// Decodes the protobuf encoding of a group without copying. The strings share its memory.
    ///
    /// # Errors
    /// As [`validate_group`].
    pub fn decode_shared(bytes: Bytes) -> Result<Self, GroupError> {
        validate_group(&bytes)?;
        Self::decode_valid(bytes)
    }

    fn decode_valid(bytes: Bytes) -> Result<Self, GroupError> {
        <Self as Message>::decode(bytes)
            .map_err(|_| GroupError::Malformed { at: 0, what: "message" })
    }
}

impl Content {
    /// A key-value pair.
    pub fn new(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        Self { key: key.into(), value: value.into() }
    }
}

impl LogTag {
    /// A tag.
    pub fn new(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        Self { key: key.into(), value: value.into() }
    }
}

/// Checks that `bytes` are a log group within the limits, without decoding it. Allocates nothing.
///
/// Unknown fields are accepted, as by any protobuf decoder. Required fields must be present.
///
/// # Errors
/// The fault and its position.
pub fn validate_group(bytes: &[u8]) -> Result<GroupSummary, GroupError> {
    if bytes.is_empty() {
        return Err(GroupError::Empty);
    }
    within("length", bytes.len(), GROUP_BYTES_MAX)?;
    let mut group = Walker { bytes, at: 0 };
    let (mut logs, mut tags) = (0, 0);
    while let Some(field) = group.field()? {
        match field.tag {
            1 => {
                logs += 1;
                within("number of logs", logs, LOGS_PER_GROUP_MAX)?;
                validate_log(group.nested(field)?)?;
            }
            2 => within("length of the category", group.length_delimited(field)?, KEY_BYTES_MAX)?,
            3 => within("length of the topic", group.length_delimited(field)?, KEY_BYTES_MAX)?,
            4 => within("length of the source", group.length_delimited(field)?, KEY_BYTES_MAX)?,
            5 => {
                within("length of the machine UUID", group.length_delimited(field)?, KEY_BYTES_MAX)?
            }
            6 => {
                tags += 1;
                within("number of tags", tags, TAGS_PER_GROUP_MAX)?;
                validate_pair(group.nested(field)?)?;
            }
            _ => group.skip(field, NESTING_MAX)?,
        }
    }
    match logs {
        0 => Err(GroupError::NoLogs),
        logs => Ok(GroupSummary { logs: logs as u32 }),
    }
}

fn validate_log(mut log: Walker<'_>) -> Result<(), GroupError> {
    let mut timed = false;
    let mut contents = 0;
    while let Some(field) = log.field()? {
        match (field.tag, field.wire) {
            (1, VARINT) => {
                log.varint()?;
                timed = true;
            }
            (2, LENGTH_DELIMITED) => {
                contents += 1;
                within("number of contents of a log", contents, CONTENTS_PER_LOG_MAX)?;
                validate_pair(log.nested(field)?)?;
            }
            (4, FIXED_32) => log.advance(4)?,
            (1 | 2 | 4, _) => return Err(log.malformed("wire type")),
            _ => log.skip(field, NESTING_MAX - 1)?,
        }
    }
    if timed { Ok(()) } else { Err(log.malformed("log without its time")) }
}

fn validate_pair(mut pair: Walker<'_>) -> Result<(), GroupError> {
    let (mut has_key, mut has_value) = (false, false);
    let nesting = NESTING_MAX - 2;
    while let Some(field) = pair.field()? {
        match field.tag {
            1 => {
                within("length of a key", pair.length_delimited(field)?, KEY_BYTES_MAX)?;
                has_key = true;
            }
            2 => {
                within("length of a value", pair.length_delimited(field)?, VALUE_BYTES_MAX)?;
                has_value = true;
            }
            _ => pair.skip(field, nesting)?,
        }
    }
    if has_key && has_value { Ok(()) } else { Err(pair.malformed("pair without its key or value")) }
}

fn within(what: &'static str, size: usize, limit: usize) -> Result<(), GroupError> {
    if size <= limit { Ok(()) } else { Err(GroupError::TooLarge { what, size, limit }) }
}

const VARINT: u8 = 0;
const FIXED_64: u8 = 1;
const LENGTH_DELIMITED: u8 = 2;
const START_GROUP: u8 = 3;
const END_GROUP: u8 = 4;
const FIXED_32: u8 = 5;

/// The key of a protobuf field.
#[derive(Clone, Copy)]
struct Field {
    tag: u32,
    wire: u8,
}

/// Iterates over the fields of a message.
struct Walker<'a> {
    /// The whole group, up to the end of the message.
    bytes: &'a [u8],
    /// The position of the next field.
    at: usize,
}

impl<'a> Walker<'a> {
    #[cold]
    fn malformed(&self, what: &'static str) -> GroupError {
        GroupError::Malformed { at: self.at, what }
    }

    /// The key of the next field. `None` at the end of the message.
    #[inline]
    fn field(&mut self) -> Result<Option<Field>, GroupError> {
        if self.at >= self.bytes.len() {
            return Ok(None);
        }
        let key = self.varint()?;
        let tag = match u32::try_from(key) {
            Ok(key) if key >> 3 != 0 => key >> 3,
            _ => return Err(self.malformed("field number")),
        };
        Ok(Some(Field { tag, wire: (key & 7) as u8 }))
    }

    #[inline]
    fn varint(&mut self) -> Result<u64, GroupError> {
        match self.bytes.get(self.at) {
            Some(&byte) if byte < 0x80 => {
                self.at += 1;
                Ok(u64::from(byte))
            }
            _ => self.long_varint(),
        }
    }

    fn long_varint(&mut self) -> Result<u64, GroupError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let (value, len) =
            decode_varint(rest).ok_or_else(|| self.malformed("variable-length integer"))?;
        self.at += len;
        Ok(value)
    }

    #[inline]
    fn advance(&mut self, len: u64) -> Result<(), GroupError> {
        if len > (self.bytes.len() - self.at) as u64 {
            return Err(self.malformed("field beyond the end of its message"));
        }
        self.at += len as usize;
        Ok(())
    }

    /// Skips a length-delimited field and returns its length.
    #[inline]
    fn length_delimited(&mut self, field: Field) -> Result<usize, GroupError> {
        if field.wire != LENGTH_DELIMITED {
            return Err(self.malformed("wire type"));
        }
        let len = self.varint()?;
        self.advance(len)?;
        Ok(len as usize)
    }

    /// Skips an embedded message and returns its walker.
    #[inline]
    fn nested(&mut self, field: Field) -> Result<Self, GroupError> {
        let len = self.length_delimited(field)?;
        Ok(Self { bytes: self.bytes.get(..self.at).unwrap_or_default(), at: self.at - len })
    }

    /// Skips an unknown field.
    fn skip(&mut self, field: Field, nesting: u32) -> Result<(), GroupError> {
        let nesting =
            nesting.checked_sub(1).ok_or_else(|| self.malformed("too deeply nested field"))?;
        match field.wire {
            VARINT => self.varint().map(|_| ()),
            FIXED_64 => self.advance(8),
            LENGTH_DELIMITED => self.length_delimited(field).map(|_| ()),
            START_GROUP => loop {
                match self.field()? {
                    Some(Field { tag, wire: END_GROUP }) if tag == field.tag => return Ok(()),
                    Some(inner) => self.skip(inner, nesting)?,
                    None => return Err(self.malformed("group without its end")),
                }
            },
            FIXED_32 => self.advance(4),
            _ => Err(self.malformed("wire type")),
        }
    }
}

/// The variable-length integer at the beginning of `bytes`, and its length.
fn decode_varint(bytes: &[u8]) -> Option<(u64, usize)> {
    let mut value = 0;
    for (n, &byte) in bytes.iter().take(10).enumerate() {
        value |= u64::from(byte & 0x7f) << (7 * n);
        if byte < 0x80 {
            // The tenth byte has room for one bit.
            return (n < 9 || byte < 2).then_some((value, n + 1));
        }
    }
    None
}

/// The key in front of each group in a `LogGroupList`: field 1, length-delimited.
const FRAME: u8 = 0x0a;

/// The length in a `LogGroupList` of a group of `len` bytes.
pub fn frame_len(len: usize) -> usize {
    1 + prost::length_delimiter_len(len) + len
}

/// Appends a group to a `LogGroupList`.
pub fn put_frame(out: &mut Vec<u8>, group: &[u8]) {
    out.reserve(frame_len(group.len()));
    out.push(FRAME);
    let mut len = group.len();
    while len >= 0x80 {
        out.push(len as u8 | 0x80);
        len >>= 7;
    }
    out.push(len as u8);
    out.extend_from_slice(group);
}

/// The positions of the groups in a `LogGroupList`, in order. The iteration ends at the first
/// error.
pub fn frames(list: &[u8]) -> impl Iterator<Item = Result<Range<usize>, GroupError>> {
    let mut walker = Walker { bytes: list, at: 0 };
    std::iter::from_fn(move || {
        let frame = walker.frame().transpose()?;
        if frame.is_err() {
            walker.bytes = &[];
        }
        Some(frame)
    })
}

impl Walker<'_> {
    fn frame(&mut self) -> Result<Option<Range<usize>>, GroupError> {
        let Some(field) = self.field()? else { return Ok(None) };
        if field.tag != 1 {
            return Err(self.malformed("field number"));
        }
        let len = self.length_delimited(field)?;
        Ok(Some(self.at - len..self.at))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;
    use crate::ids::{hex_decode, hex_encode};

    fn sample() -> LogGroup {
        LogGroup {
            logs: vec![
                Log {
                    time: 1_700_000_000,
                    contents: vec![
                        Content::new("method", "GET"),
                        Content::new("raw", &b"\xff\x00"[..]),
                    ],
                    time_ns: Some(7),
                },
                Log { time: 0, contents: Vec::new(), time_ns: None },
            ],
            category: None,
            topic: Some("t".into()),
            source: Some("10.0.0.1".into()),
            machine_uuid: Some(Bytes::new()),
            log_tags: vec![LogTag::new("host", "")],
        }
    }

    #[test]
    fn golden() {
        let golden = concat!(
            "0a250880e2cfaa06120d0a066d6574686f64120347455412090a037261771202ff0025070000000a0208001a01742208",
            "31302e302e302e312a0032080a04686f73741200",
        );
        assert_eq!(hex_encode(&sample().encode_to_bytes()), golden);
        let bytes = hex_decode(golden).unwrap();
        assert_eq!(validate_group(&bytes), Ok(GroupSummary { logs: 2 }));
        assert_eq!(LogGroup::decode(&bytes), Ok(sample()));
        assert_eq!(LogGroup::decode_shared(bytes.into()), Ok(sample()));
    }

    fn malformed(at: usize, what: &'static str) -> Result<GroupSummary, GroupError> {
        Err(GroupError::Malformed { at, what })
    }

    #[test]
    fn malformed_groups() {
        assert_eq!(validate_group(b""), Err(GroupError::Empty));
        assert_eq!(LogGroup::decode(b""), Err(GroupError::Empty));
        assert_eq!(validate_group(b"\x1a\x01t"), Err(GroupError::NoLogs));
        assert_eq!(validate_group(b"\x0a\x02\x08\x00"), Ok(GroupSummary { logs: 1 }));
        for (bytes, at, what) in [
            (&b"\x0a"[..], 1, "variable-length integer"),
            (b"\x0a\x01", 2, "field beyond the end of its message"),
            (b"\x0a\x00", 2, "log without its time"),
            (b"\x0a\x05\x25\x00\x00\x00\x00", 7, "log without its time"),
            (b"\x08\x00", 1, "wire type"),
            (b"\x0a\x02\x0a\x00", 3, "wire type"),
            (b"\x0a\x02\x10\x00", 3, "wire type"),
            (b"\x0a\x02\x22\x00", 3, "wire type"),
            (b"\x0a\x03\x08\x80\x80", 3, "variable-length integer"),
            (b"\x0a\x04\x08\x00\x12\x00", 6, "pair without its key or value"),
            (b"\x0a\x06\x08\x00\x12\x02\x0a\x00", 8, "pair without its key or value"),
            (b"\x0a\x06\x08\x00\x12\x02\x12\x00", 8, "pair without its key or value"),
            (b"\x0a\x06\x08\x00\x12\x02\x08\x00", 7, "wire type"),
            (b"\x32\x02\x0a\x00", 4, "pair without its key or value"),
            (b"\x00\x00", 1, "field number"),
            (b"\xff\xff\xff\xff\x7f", 5, "field number"),
            (b"\x3e\x00", 1, "wire type"),
            (b"\x3c", 1, "wire type"),
            (b"\x3b\x44", 2, "wire type"),
            (b"\x3b", 1, "group without its end"),
        ] {
            assert_eq!(validate_group(bytes), malformed(at, what), "{}", hex_encode(bytes));
        }
        let missing = b"\x0a\x04\x08\x00\x12\x00";
        assert!(matches!(LogGroup::decode(missing), Err(GroupError::Malformed { at: 6, .. })));
    }

    #[test]
    fn nesting_is_bounded() {
        let nested = |depth: usize| {
            [&b"\x0a\x02\x08\x00"[..], &vec![0x3b; depth], &vec![0x3c; depth]].concat()
        };
        for depth in [1, 99, 100, 101] {
            let bytes = nested(depth);
            let fits = <LogGroup as Message>::decode(&bytes[..]).is_ok();
            assert_eq!(fits, depth <= 100);
            assert_eq!(validate_group(&bytes).is_ok(), fits);
        }
        assert_eq!(validate_group(&nested(1_000_000)), malformed(105, "too deeply nested field"));
    }

    #[test]
    fn limits() {
        let too_large = |group: &LogGroup| match validate_group(&group.encode_to_bytes()) {
            Err(GroupError::TooLarge { what, size, limit }) => Some((what, size, limit)),
            result => {
                result.unwrap();
                None
            }
        };
        let of = |change: &dyn Fn(&mut LogGroup)| {
            let mut group = sample();
            change(&mut group);
            too_large(&group)
        };
        let bytes = |len| Some(Bytes::from(vec![b'x'; len]));
        let pair = |key, value| Content::new(vec![b'x'; key], vec![b'x'; value]);
        let (key, value) = (KEY_BYTES_MAX, VALUE_BYTES_MAX);
        assert_eq!(of(&|group| group.topic = bytes(key)), None);
        for (what, found) in [
            ("length of the category", of(&|group| group.category = bytes(key + 1))),
            ("length of the topic", of(&|group| group.topic = bytes(key + 1))),
            ("length of the source", of(&|group| group.source = bytes(key + 1))),
            ("length of the machine UUID", of(&|group| group.machine_uuid = bytes(key + 1))),
            ("length of a key", of(&|group| group.logs[0].contents.push(pair(key + 1, 0)))),
            (
                "length of a key",
                of(&|group| group.log_tags.push(LogTag::new(vec![0; key + 1], ""))),
            ),
        ] {
            assert_eq!(found, Some((what, key + 1, key)));
        }
        assert_eq!(of(&|group| group.logs[0].contents.push(pair(key, value))), None);
        let long_value = of(&|group| group.logs[0].contents.push(pair(0, value + 1)));
        assert_eq!(long_value, Some(("length of a value", value + 1, value)));
        let logs = |count| of(&|group| group.logs = vec![Log::default(); count]);
        let tags = |count| of(&|group| group.log_tags = vec![LogTag::default(); count]);
        let contents =
            |count| of(&|group| group.logs[0].contents = vec![Content::default(); count]);
        for (what, limit, of) in [
            ("number of logs", LOGS_PER_GROUP_MAX, &logs as &dyn Fn(usize) -> _),
            ("number of tags", TAGS_PER_GROUP_MAX, &tags),
            ("number of contents of a log", CONTENTS_PER_LOG_MAX, &contents),
        ] {
            assert_eq!(of(limit), None);
            assert_eq!(of(limit + 1), Some((what, limit + 1, limit)));
        }
        let long = of(&|group| group.logs[0].contents = vec![pair(0, value), pair(0, value)]);
        assert!(matches!(long, Some(("length", _, GROUP_BYTES_MAX))));
    }

    #[test]
    fn framing() {
        let groups = [&b""[..], b"a", &[1; 127], &[2; 128], &[3; 16384], &vec![4; 1 << 21]];
        let mut list = Vec::new();
        for group in groups {
            let before = list.len();
            put_frame(&mut list, group);
            assert_eq!(list.len() - before, frame_len(group.len()));
        }
        let found: Vec<_> = frames(&list).map(|frame| &list[frame.unwrap()]).collect();
        assert_eq!(found, groups);
        assert_eq!(frames(b"").count(), 0);
        for wrong in [&b"\x0a"[..], b"\x0a\x01", b"\x12\x00", b"\x08\x00", b"\x00"] {
            let list = [&b"\x0a\x01x"[..], wrong].concat();
            let found: Vec<_> = frames(&list).collect();
            assert_eq!(found.len(), 2, "{}", hex_encode(wrong));
            assert_eq!(found[0], Ok(2..3));
            assert!(found[1].is_err());
        }
    }

    /// The list matches the public definition of `LogGroupList`.
    #[test]
    fn a_list_is_a_protobuf_message() {
        #[derive(Clone, PartialEq, Message)]
        struct LogGroupList {
            #[prost(message, repeated, tag = "1")]
            log_groups: Vec<LogGroup>,
        }
        let mut list = Vec::new();
        put_frame(&mut list, &sample().encode_to_bytes());
        put_frame(&mut list, &sample().encode_to_bytes());
        assert_eq!(
            LogGroupList::decode(&list[..]),
            Ok(LogGroupList { log_groups: vec![sample(), sample()] })
        );
    }

    fn bytes() -> impl Strategy<Value = Bytes> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..20),
            prop::collection::vec(any::<u8>(), 120..140)
        ]
        .prop_map(Bytes::from)
    }

    prop_compose! {
        fn log()(
            time: u32,
            contents in prop::collection::vec((bytes(), bytes()), 0..4),
            time_ns: Option<u32>,
        ) -> Log {
            Log { time, contents: contents.into_iter().map(|(key, value)| Content { key, value }).collect(), time_ns }
        }
    }

    prop_compose! {
        fn group()(
            logs in prop::collection::vec(log(), 1..5),
            texts in prop::array::uniform4(prop::option::of(bytes())),
            log_tags in prop::collection::vec((bytes(), bytes()), 0..3),
        ) -> LogGroup {
            let [category, topic, source, machine_uuid] = texts;
            let log_tags = log_tags.into_iter().map(|(key, value)| LogTag { key, value }).collect();
            LogGroup { logs, category, topic, source, machine_uuid, log_tags }
        }
    }

    /// A well-formed field of any wire type.
    fn field(tags: impl Strategy<Value = u32> + Clone + 'static) -> impl Strategy<Value = Vec<u8>> {
        let varint = |value: u64| {
            let mut out = Vec::new();
            prost::encoding::encode_varint(value, &mut out);
            out
        };
        let key = move |tag: u32, wire: u32| varint(u64::from(tag << 3 | wire));
        let leaf = (tags.clone(), 0..4, any::<u64>(), bytes()).prop_map(
            move |(tag, kind, value, bytes)| match kind {
                0 => [key(tag, 0), varint(value)].concat(),
                1 => [&key(tag, 1)[..], &value.to_le_bytes()].concat(),
                2 => [&key(tag, 2)[..], &varint(bytes.len() as u64), &bytes].concat(),
                _ => [&key(tag, 5)[..], &(value as u32).to_le_bytes()].concat(),
            },
        );
        leaf.prop_recursive(3, 8, 3, move |inner| {
            (tags.clone(), prop::collection::vec(inner, 0..3))
                .prop_map(move |(tag, inner)| [key(tag, 3), inner.concat(), key(tag, 4)].concat())
        })
    }

    /// Decodes `bytes` with prost, which does not require the required fields.
    fn by_prost(bytes: &[u8]) -> Option<LogGroup> {
        <LogGroup as Message>::decode(bytes).ok()
    }

    proptest! {
        #[test]
        fn round_trip(group in group()) {
            let bytes = group.encode_to_bytes();
            prop_assert_eq!(validate_group(&bytes), Ok(GroupSummary { logs: group.logs.len() as u32 }));
            prop_assert_eq!(LogGroup::decode(&bytes), Ok(group));
        }

        #[test]
        fn unknown_fields_are_let_through(
            group in group(),
            unknown in prop::collection::vec(field(7..=(1u32 << 29) - 1), 0..4),
            in_log in prop::collection::vec(field(prop_oneof![Just(3u32), 5..1000u32]), 0..4),
            in_pair in prop::collection::vec(field(3..1000u32), 0..4),
        ) {
            let pair = [in_pair.concat(), Content::new("key", "value").encode_to_vec()].concat();
            let mut log = in_log.concat();
            log.extend_from_slice(b"\x08\x01\x12");
            prost::encoding::encode_varint(pair.len() as u64, &mut log);
            log.extend_from_slice(&pair);
            let mut bytes = unknown.concat();
            put_frame(&mut bytes, &log);
            bytes.extend_from_slice(&group.encode_to_bytes());
            prop_assert_eq!(validate_group(&bytes), Ok(GroupSummary { logs: group.logs.len() as u32 + 1 }));
            let decoded = LogGroup::decode(&bytes).unwrap();
            prop_assert_eq!(&decoded.logs[0].contents, &[Content::new("key", "value")]);
            prop_assert_eq!(&decoded.logs[1..], &group.logs);
        }

        /// Messages with fields that may or may not fit. This decoder and prost accept the same
        /// messages, except that prost does not check required fields.
        #[test]
        fn agrees_with_prost(
            fields in prop::collection::vec(field(1..8u32), 0..6),
            in_log in prop::collection::vec(field(1..6u32), 0..4),
            cut in 0..4usize,
        ) {
            let mut bytes = fields.concat();
            put_frame(&mut bytes, &[&in_log.concat()[..], b"\x08\x01"].concat());
            bytes.truncate(bytes.len() - cut);
            let prost = by_prost(&bytes);
            match validate_group(&bytes) {
                Ok(summary) => prop_assert_eq!(prost.map(|group| group.logs.len()), Some(summary.logs as usize)),
                Err(GroupError::Malformed { what: "log without its time" | "pair without its key or value", .. }) => {}
                Err(GroupError::Empty | GroupError::NoLogs) => prop_assert!(prost.is_some()),
                Err(error) => prop_assert_eq!(prost, None, "{}", error),
            }
        }

        #[test]
        fn agrees_with_prost_on_damage(
            group in group(),
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        ) {
            let mut bytes = group.encode_to_bytes().to_vec();
            for (at, with) in flips {
                let at = at.index(bytes.len());
                bytes[at] ^= with;
            }
            let prost = by_prost(&bytes);
            match validate_group(&bytes) {
                Ok(summary) => {
                    prop_assert_eq!(prost.map(|group| group.logs.len()), Some(summary.logs as usize));
                    prop_assert!(LogGroup::decode(&bytes).is_ok());
                }
                Err(GroupError::Malformed { what: "log without its time" | "pair without its key or value", .. }) => {}
                Err(GroupError::Empty | GroupError::NoLogs) => prop_assert!(prost.is_some()),
                Err(error) => prop_assert_eq!(prost, None, "{}", error),
            }
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(bytes: Vec<u8>) {
            let _ = LogGroup::decode(&bytes);
            let _ = frames(&bytes).count();
        }
    }
}
