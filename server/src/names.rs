//! The syntax of the names that the service accepts.

use std::ops::RangeInclusive;

use crate::error::{ApiError, Result};

const PROJECT_BYTES: RangeInclusive<usize> = 3..=63;
const LOGSTORE_BYTES: RangeInclusive<usize> = 2..=63;
/// The longest name of a consumer group, or of a consumer, in bytes.
const CONSUMER_BYTES_MAX: usize = 256;

pub(crate) fn check_project(name: &str) -> Result<()> {
    if is_name(name, PROJECT_BYTES, b"-") {
        return Ok(());
    }
    let message = format!(
        "project name {} is invalid: it must have 3 to 63 lower-case letters, digits and -, and \
         begin and end with a letter or digit",
        name.escape_default().take(128).collect::<String>()
    );
    Err(ApiError::parameter(message))
}

pub(crate) fn check_logstore(name: &str) -> Result<()> {
    if is_name(name, LOGSTORE_BYTES, b"-_") {
        return Ok(());
    }
    let name: String = name.escape_default().take(128).collect();
    Err(ApiError::bad("LogStoreInfoInvalid", format!("logstore name {name} is invalid")))
}

/// Checks the name of a consumer group, or of a consumer.
pub(crate) fn check_consumer(what: &str, name: &str) -> Result<()> {
    let fits = (1..=CONSUMER_BYTES_MAX).contains(&name.len());
    if fits && !name.chars().any(char::is_control) {
        return Ok(());
    }
    Err(ApiError::parameter(format!("{what} must have 1 to 256 bytes and no control character")))
}

/// Whether the service accepts both parts of this name of a Logstore.
pub(crate) fn is_served(name: &envelog::LogstoreName) -> bool {
    is_name(name.project(), PROJECT_BYTES, b"-") && is_name(name.logstore(), LOGSTORE_BYTES, b"-_")
}

fn is_name(name: &str, bytes: RangeInclusive<usize>, inside: &[u8]) -> bool {
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let name = name.as_bytes();
    bytes.contains(&name.len())
        && name.iter().all(|byte| alphanumeric(byte) || inside.contains(byte))
        && name.first().is_some_and(alphanumeric)
        && name.last().is_some_and(alphanumeric)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for name in ["abc", "a-b", "0-9", &"p".repeat(63)] {
            assert!(check_project(name).is_ok(), "{name}");
        }
        for name in ["", "ab", "a_b", "-ab", "ab-", "Abc", "a.b", "a/b", &"p".repeat(64)] {
            assert!(check_project(name).is_err(), "{name}");
        }
        assert!(check_logstore("a_b").is_ok() && check_logstore("a").is_err());
        assert!(check_consumer("group", "g v4/é").is_ok());
        assert!(check_consumer("group", "").is_err() && check_consumer("group", "a\n").is_err());
    }
}
