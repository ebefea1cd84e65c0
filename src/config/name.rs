//! Names of Logstores.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::ConfigError;

/// The longest project or Logstore name, in bytes.
pub const NAME_BYTES_MAX: usize = 128;

/// The name of a Logstore: a project and the Logstore's own name within it, written
/// `PROJECT/LOGSTORE`.
///
/// Each part has 1 to [`NAME_BYTES_MAX`] bytes of ASCII letters, digits, `-` and `_`, and begins
/// with a letter or digit.
///
/// ```
/// use envelog::LogstoreName;
/// let name: LogstoreName = "shop/orders".parse().unwrap();
/// assert_eq!(name.project(), "shop");
/// assert!("shop/../etc".parse::<LogstoreName>().is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LogstoreName {
    project: String,
    logstore: String,
}

impl LogstoreName {
    /// Creates a name from its two parts.
    ///
    /// # Errors
    /// [`ConfigError::Name`] if a part breaks the syntax.
    pub fn new(project: &str, logstore: &str) -> Result<Self, ConfigError> {
        check("project", project)?;
        check("Logstore", logstore)?;
        Ok(Self { project: project.to_owned(), logstore: logstore.to_owned() })
    }

    /// The project.
    pub fn project(&self) -> &str {
        &self.project
    }

    /// The Logstore's own name.
    pub fn logstore(&self) -> &str {
        &self.logstore
    }
}

fn check(part: &'static str, name: &str) -> Result<(), ConfigError> {
    let refuse = |why| {
        Err(ConfigError::Name {
            part,
            name: name.escape_default().take(NAME_BYTES_MAX).collect(),
            why,
        })
    };
    if name.is_empty() {
        return refuse("it is empty");
    }
    if name.len() > NAME_BYTES_MAX {
        return refuse("it is longer than 128 bytes");
    }
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_') {
        return refuse("only ASCII letters, digits, '-' and '_' may be in it");
    }
    if !name.as_bytes()[0].is_ascii_alphanumeric() {
        return refuse("it must begin with a letter or digit");
    }
    Ok(())
}

impl FromStr for LogstoreName {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let Some((project, logstore)) = text.split_once('/') else {
            return Err(ConfigError::Name {
                part: "Logstore",
                name: text.escape_default().take(NAME_BYTES_MAX).collect(),
                why: "it must be PROJECT/LOGSTORE",
            });
        };
        Self::new(project, logstore)
    }
}

impl TryFrom<String> for LogstoreName {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl From<LogstoreName> for String {
    fn from(name: LogstoreName) -> String {
        name.to_string()
    }
}

impl fmt::Display for LogstoreName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.project, self.logstore)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn good_names_round_trip() {
        for text in ["a/b", "shop-1/orders_2", &format!("{}/{}", "p".repeat(128), "L".repeat(128))]
        {
            assert_eq!(text.parse::<LogstoreName>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_names_are_refused() {
        let long = "x".repeat(300);
        for text in [
            "",
            "/",
            "a",
            "a/",
            "/b",
            "a/b/c",
            "../b",
            "a/..",
            "a/b\0",
            "a/é",
            "-a/b",
            "a/_b",
            "a b/c",
            "a/b.c",
            &format!("a/{long}"),
            &format!("{long}/b"),
        ] {
            assert!(
                matches!(text.parse::<LogstoreName>(), Err(ConfigError::Name { .. })),
                "{text:?}"
            );
        }
    }
}
