//! Cursors: places in a shard, as clients keep them.
//!
//! A cursor is the sequence number of the next group, counted from an origin that follows from the
//! creation of the Logstore. So most cursors of a deleted Logstore are none of a later one of its
//! name: they lie in front of its origin. Clients see the base64 text of a decimal number. Some
//! subtract one from it.

use base64::{Engine, engine::general_purpose::STANDARD};
use envelog::{Logstore, LogstoreConfig, Position, ReadOptions};
use serde_json::json;

use crate::{
    call::Call,
    error::{ApiError, Result},
    projects::now_s,
    response::Answer,
};

/// The cursors between the origins of Logstores that were created a second apart.
const PER_SECOND: u64 = 1_000_000_000;

/// The cursors of one Logstore.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Cursors {
    origin: u64,
}

impl Cursors {
    pub(crate) fn of(config: &LogstoreConfig) -> Self {
        Self { origin: config.create_time.saturating_mul(PER_SECOND) }
    }

    pub(crate) fn text(self, seq: u64) -> String {
        STANDARD.encode(self.origin.saturating_add(seq).to_string())
    }

    /// The sequence number of a cursor. `None` if it is none of this Logstore.
    pub(crate) fn seq(self, text: &str) -> Option<u64> {
        let decoded = String::from_utf8(STANDARD.decode(text).ok()?).ok()?;
        let is_number = !decoded.is_empty() && decoded.bytes().all(|byte| byte.is_ascii_digit());
        decoded.parse::<u64>().ok().filter(|_| is_number)?.checked_sub(self.origin)
    }

    /// As [`Cursors::seq`].
    ///
    /// # Errors
    /// 400, and not with the code `InvalidCursor`: the Python client then skips logs.
    pub(crate) fn expect(self, text: &str) -> Result<u64> {
        self.seq(text).ok_or_else(|| {
            ApiError::parameter("the cursor is none of this Logstore: get a new one")
        })
    }
}

/// # Errors
/// 400 if the text is no number of a shard of the Logstore.
pub(crate) fn shard_of(logstore: &Logstore, text: &str) -> Result<u32> {
    let id: u32 = text.parse().map_err(|_| ApiError::parameter("invalid shard id"))?;
    if logstore.config().shards.iter().any(|shard| shard.id == id) {
        return Ok(id);
    }
    Err(ApiError::bad("ShardNotExist", format!("the shard {id} does not exist")))
}

/// The end of a shard, authenticated: where a reader goes on that has read everything.
pub(crate) fn end(logstore: &Logstore, shard: u32) -> Result<u64> {
    let at_end = ReadOptions::default().from(Position::End);
    Ok(logstore.read(shard, &at_end)?.next_seq())
}

/// The sequence number and the receive time, in seconds, of the first group from a place on.
fn first(logstore: &Logstore, shard: u32, from: Position) -> Result<Option<(u64, u64)>> {
    let options = ReadOptions::default().from(from).max_groups(1);
    let record = logstore.read(shard, &options)?.try_next()?;
    Ok(record.map(|record| (record.seq, record.receive_time_us / 1_000_000)))
}

/// `GET …/shards/{id}?type=cursor`. Blocks for file I/O and KMS calls.
pub(crate) fn get(logstore: &Logstore, shard: u32, call: &Call) -> Result<Answer> {
    let position = match call.required("from")? {
        "begin" => Position::Begin,
        "end" => Position::End,
        text => {
            let seconds: Option<u64> = text.parse().ok();
            let wrong = || ApiError::parameter("from must be begin, end or a time in seconds");
            Position::Time(seconds.ok_or_else(wrong)?.saturating_mul(1_000_000))
        }
    };
    // Read before the groups: a group that is appended in between must not be skipped.
    let end = end(logstore, shard)?;
    let seq = first(logstore, shard, position)?.map_or(end, |(seq, _)| seq.min(end));
    Ok(Answer::json(&json!({ "cursor": Cursors::of(&logstore.config()).text(seq) })))
}

/// `GET …/shards/{id}?type=cursor_time`: when the group at a cursor was received. At the end, the
/// time now. Blocks for file I/O and KMS calls.
pub(crate) fn time(logstore: &Logstore, shard: u32, call: &Call) -> Result<Answer> {
    let seq = Cursors::of(&logstore.config()).seq(call.required("cursor")?);
    // The Python client asks for the cursor before the first one, and knows this code alone.
    let wrong = || ApiError::bad("InvalidCursor", "the cursor is none of this Logstore");
    let seq = seq.ok_or_else(wrong)?;
    if seq > logstore.end_seq(shard)? {
        return Err(wrong());
    }
    let time = first(logstore, shard, Position::Seq(seq))?.map_or_else(now_s, |(_, time)| time);
    Ok(Answer::json(&json!({ "cursor_time": time })))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    const CURSORS: Cursors = Cursors { origin: 1_700_000_000 * PER_SECOND };

    #[test]
    fn a_cursor_is_a_decimal_number_of_nineteen_digits() {
        let decoded = STANDARD.decode(CURSORS.text(7)).unwrap();
        assert_eq!(decoded, b"1700000000000000007");
    }

    #[test]
    fn a_cursor_of_another_logstore_is_none() {
        let earlier = Cursors { origin: CURSORS.origin - PER_SECOND };
        assert_eq!(CURSORS.seq(&earlier.text(5)), None);
        for text in ["", "!!!!", "MQ", "LTE=", "KzE=", &STANDARD.encode("99999999999999999999")] {
            assert_eq!(CURSORS.seq(text), None, "{text}");
        }
        assert_eq!(CURSORS.expect("!!!!").unwrap_err().code, "ParameterInvalid");
    }

    proptest! {
        #[test]
        fn cursors_round_trip(seq in 0..u64::MAX / 2) {
            prop_assert_eq!(CURSORS.seq(&CURSORS.text(seq)), Some(seq));
        }
    }
}
