//! Parses option values: times, sizes and positions. A fuzz target includes this file too.

use std::time::Duration;

use envelog::Position;
use jiff::SignedDuration;

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let duration =
        text.parse::<SignedDuration>().ok().and_then(|duration| Duration::try_from(duration).ok());
    match duration {
        Some(Duration::ZERO) => Err("it must be greater than zero".to_owned()),
        Some(duration) => Ok(duration),
        None => Err("give a number and a unit, such as 500ms, 30s, 5m".to_owned()),
    }
}

/// Parses a number of bytes with an optional unit: `65536`, `64KiB`, `3 GiB`, `10MB`.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    const UNITS: [(&str, u64); 10] = [
        ("", 1),
        ("B", 1),
        ("KIB", 1 << 10),
        ("MIB", 1 << 20),
        ("GIB", 1 << 30),
        ("TIB", 1 << 40),
        ("KB", 1000),
        ("MB", 1_000_000),
        ("GB", 1_000_000_000),
        ("TB", 1_000_000_000_000),
    ];
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let unit = text[digits.len()..].trim().to_ascii_uppercase();
    let number = digits.parse::<u64>().ok();
    let factor = UNITS.iter().find(|(name, _)| *name == unit).map(|(_, factor)| *factor);
    match (number, factor) {
        (Some(number), Some(factor)) => {
            number.checked_mul(factor).ok_or_else(|| "that is too large".to_owned())
        }
        _ => Err("give a number of bytes, such as 65536, 64KiB, 10GiB".to_owned()),
    }
}

pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.05..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give a number of seconds from 0.05 to 3600".to_owned()),
    }
}

pub(crate) fn position(text: &str) -> Result<Position, String> {
    match text {
        "begin" => return Ok(Position::Begin),
        "end" => return Ok(Position::End),
        _ => {}
    }
    if let Ok(seq) = text.parse() {
        return Ok(Position::Seq(seq));
    }
    match text.parse::<jiff::Timestamp>() {
        Ok(timestamp) => match u64::try_from(timestamp.as_microsecond()) {
            Ok(us) => Ok(Position::Time(us)),
            Err(_) => Err("a time before 1970".to_owned()),
        },
        Err(_) => {
            Err("give begin, end, a sequence number, or a time such as 2026-01-31T12:00:00Z"
                .to_owned())
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn positions_are_words_numbers_and_times() {
        assert!(matches!(position("begin"), Ok(Position::Begin)));
        assert!(matches!(position("end"), Ok(Position::End)));
        assert!(matches!(position("17"), Ok(Position::Seq(17))));
        assert!(matches!(position("1970-01-01T00:00:01Z"), Ok(Position::Time(1_000_000))));
        assert!(matches!(position("1970-01-01T01:00:01.5+01:00"), Ok(Position::Time(1_500_000))));
        for bad in ["", "-1", "yesterday", "1969-12-31T23:59:59Z", "2026-01-31"] {
            assert!(position(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_numbers_with_or_without_a_unit() {
        for (text, value) in
            [("0", 0), ("65536", 65536), ("64KiB", 65536), ("3 GiB", 3 << 30), ("10mb", 10_000_000)]
        {
            assert_eq!(bytes(text), Ok(value), "{text}");
        }
        for bad in ["", "KiB", "-1", "1.5MiB", "1 parsec", "99999999999TiB"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn durations_need_a_unit_and_a_value() {
        assert_eq!(duration("500ms").unwrap(), Duration::from_millis(500));
        assert_eq!(duration("5m").unwrap(), Duration::from_secs(300));
        assert_eq!(duration("1h 30m").unwrap(), Duration::from_secs(5400));
        assert_eq!(duration("1.5s").unwrap(), Duration::from_millis(1500));
        // The fuzzer found the last one: it made an earlier parser panic.
        for bad in [
            "0s",
            "5",
            "five",
            "",
            "-5s",
            "5s ago",
            "99999999999999999999s",
            "0.5s018446744073709551615.5s25.5s7us",
        ] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
