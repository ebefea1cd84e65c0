//! Parses option values: times, sizes and positions. A fuzz target includes this file too.

use std::time::Duration;

use envelog::Position;
use jiff::{SignedDuration, Span};

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    match delay(text)? {
        Duration::ZERO => Err("it must be greater than zero".to_owned()),
        duration => Ok(duration),
    }
}

/// Parses a duration that may be zero.
pub(crate) fn delay(text: &str) -> Result<Duration, String> {
    let duration = text.parse::<SignedDuration>().ok();
    duration
        .and_then(|duration| Duration::try_from(duration).ok())
        .ok_or_else(|| "give a number and a unit, such as 500ms, 30s, 5m".to_owned())
}

/// Parses how long ago something was. As [`duration`], but also in days and weeks of 24 hours each.
pub(crate) fn age(text: &str) -> Result<Duration, String> {
    let wrong = || "give a number and a unit, such as 30s, 5m, 1h, 2d, 1w".to_owned();
    let span = text.parse::<Span>().map_err(|_| wrong())?;
    let days = i64::from(span.get_weeks()) * 7 + i64::from(span.get_days());
    let whole = SignedDuration::try_from_hours(days * 24);
    // Months and years have no one length, and are an error here.
    let rest = span.try_weeks(0).and_then(|span| span.try_days(0)).map(SignedDuration::try_from);
    let age = match (whole, rest) {
        (Some(whole), Ok(Ok(rest))) => whole.checked_add(rest),
        _ => None,
    };
    let age = age.and_then(|age| Duration::try_from(age).ok()).ok_or_else(wrong)?;
    if age.is_zero() { Err("it must be greater than zero".to_owned()) } else { Ok(age) }
}

/// Writes a duration in its largest unit that leaves no fraction, as [`delay`] parses it.
pub(crate) fn show_duration(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    let units = [("h", 3_600_000_000_000), ("m", 60_000_000_000), ("s", 1_000_000_000)];
    let small_units = [("ms", 1_000_000), ("us", 1000), ("ns", 1)];
    let mut units = units.into_iter().chain(small_units);
    match units.find(|(_, unit)| nanos != 0 && nanos.is_multiple_of(*unit)) {
        Some((name, unit)) => format!("{}{name}", nanos / unit),
        None => "0s".to_owned(),
    }
}

/// Parses a yes or no.
pub(crate) fn switch(text: &str) -> Result<bool, String> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err("give true or false".to_owned()),
    }
}

pub(crate) fn count(text: &str) -> Result<usize, String> {
    text.parse().map_err(|_| "give a number, such as 4".to_owned())
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

/// Writes a number of bytes in its largest binary unit that leaves no fraction, as [`bytes`] parses
/// it.
pub(crate) fn show_bytes(bytes: u64) -> String {
    let units = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    match units.into_iter().find(|(_, bits)| bytes != 0 && bytes.is_multiple_of(1 << bits)) {
        Some((name, bits)) => format!("{}{name}", bytes >> bits),
        None => bytes.to_string(),
    }
}

pub(crate) fn seconds(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.05..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("give a number of seconds from 0.05 to 3600".to_owned()),
    }
}

/// Numbers that are rather meant as Unix times in seconds: from 2001 to 2065.
const UNIX_TIMES: std::ops::Range<u64> = 1_000_000_000..3_000_000_000;

pub(crate) fn position(text: &str) -> Result<Position, String> {
    match text {
        "begin" => return Ok(Position::Begin),
        "end" => return Ok(Position::End),
        _ => {}
    }
    if let Some(seconds) = text.strip_prefix('@') {
        let at = seconds.parse::<u64>().ok().and_then(|seconds| seconds.checked_mul(1_000_000));
        return at.map(Position::Time).ok_or_else(|| {
            "give the seconds since 1970 behind the @, such as @1772452800".to_owned()
        });
    }
    if let Ok(seq) = text.parse::<u64>() {
        return if UNIX_TIMES.contains(&seq) {
            Err(format!(
                "{seq} looks like a Unix time: write @{seq} for that, or seq:{seq} for a sequence number"
            ))
        } else {
            Ok(Position::Seq(seq))
        };
    }
    if let Some(seq) = text.strip_prefix("seq:") {
        let wrong = |_| "give a sequence number behind seq:".to_owned();
        return seq.parse().map(Position::Seq).map_err(wrong);
    }
    match text.parse::<jiff::Timestamp>() {
        Ok(timestamp) => match u64::try_from(timestamp.as_microsecond()) {
            Ok(us) => Ok(Position::Time(us)),
            Err(_) => Err("a time before 1970".to_owned()),
        },
        Err(_) => {
            Err("give begin, end, a sequence number, or a time such as 2026-01-31T12:00:00Z or @1772452800"
                .to_owned())
        }
    }
}

/// Parses a time, in microseconds since the Unix epoch.
pub(crate) fn time(text: &str) -> Result<u64, String> {
    match position(text) {
        Ok(Position::Time(us)) => Ok(us),
        _ => Err("give a time such as 2026-01-31T12:00:00Z or @1772452800".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn positions_are_words_numbers_and_times() {
        assert!(matches!(position("begin"), Ok(Position::Begin)));
        assert!(matches!(position("@1772452800"), Ok(Position::Time(1_772_452_800_000_000))));
        assert!(matches!(position("seq:1772452800"), Ok(Position::Seq(1_772_452_800))));
        assert!(matches!(position("4294967296"), Ok(Position::Seq(4_294_967_296))));
        for wrong in ["1772452800", "@", "@-1", "@18446744073709551615", "seq:", "seq:x"] {
            assert!(position(wrong).is_err(), "{wrong}");
        }
        assert!(matches!(position("end"), Ok(Position::End)));
        assert!(matches!(position("17"), Ok(Position::Seq(17))));
        assert!(matches!(position("1970-01-01T00:00:01Z"), Ok(Position::Time(1_000_000))));
        assert!(matches!(position("1970-01-01T01:00:01.5+01:00"), Ok(Position::Time(1_500_000))));
        for bad in ["", "-1", "yesterday", "1969-12-31T23:59:59Z", "2026-01-31"] {
            assert!(position(bad).is_err(), "{bad}");
        }
        assert_eq!(time("1970-01-01T00:00:01Z"), Ok(1_000_000));
        for bad in ["begin", "17", "2026-01-31"] {
            assert!(time(bad).is_err(), "{bad}");
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
    fn durations_and_sizes_are_written_as_they_are_parsed() {
        for (nanos, text) in [
            (0, "0s"),
            (1, "1ns"),
            (1000, "1us"),
            (1_500_000_000, "1500ms"),
            (30_000_000_000, "30s"),
            (90_000_000_000, "90s"),
            (300_000_000_000, "5m"),
            (86_400_000_000_000, "24h"),
            (i64::MAX as u64, "9223372036854775807ns"),
        ] {
            let duration = Duration::from_nanos(nanos);
            assert_eq!(show_duration(duration), text);
            assert_eq!(delay(text), Ok(duration));
        }
        for (number, text) in [
            (0, "0"),
            (1, "1"),
            (1024, "1KiB"),
            (10_000_000, "10000000"),
            (64 << 20, "64MiB"),
            (3 << 30, "3GiB"),
            (u64::MAX, "18446744073709551615"),
        ] {
            assert_eq!(show_bytes(number), text);
            assert_eq!(bytes(text), Ok(number));
        }
    }

    #[test]
    fn switches_are_words_or_digits() {
        for (text, on) in [("true", true), ("Yes", true), ("1", true), ("off", false), ("0", false)]
        {
            assert_eq!(switch(text), Ok(on));
        }
        for bad in ["", "2", "enabled", " true"] {
            assert!(switch(bad).is_err(), "{bad}");
        }
        assert_eq!(count("17"), Ok(17));
        for bad in ["", "-1", "1.5", "99999999999999999999999"] {
            assert!(count(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ages_may_be_in_days_and_weeks() {
        for (text, seconds) in [
            ("90s", 90),
            ("5m", 300),
            ("1h", 3600),
            ("1d", 86_400),
            ("1d 12h", 129_600),
            ("2w", 1_209_600),
            ("1w1d1h1m1s", 694_861),
            ("500 days", 43_200_000),
        ] {
            assert_eq!(age(text), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(age("10ms"), Ok(Duration::from_millis(10)));
        for bad in [
            "",
            "0s",
            "0d",
            "1",
            "d",
            "-1d",
            "1d ago",
            "1mo",
            "1y",
            "1y 1d",
            "99999999999999999999d",
        ] {
            assert!(age(bad).is_err(), "{bad}");
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
