//! Maps errors to an exit status and one sentence.

use std::{
    borrow::Cow,
    fmt,
    io::{self, Write},
    path::Path,
    process::ExitCode,
};

use envelog::{Error, ErrorKind, LogstoreName, kms::LocalKmsError};
use serde::{Deserialize, Deserializer, Serialize, Serializer, ser::SerializeStruct};
use serde_json::json;

use crate::output;

/// The result of a command.
pub(crate) type Result<T = ()> = std::result::Result<T, Failure>;

/// The exit status, as `--help` lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    Done = 0,
    Other = 1,
    Usage = 2,
    Revoked = 3,
    KmsUnreachable = 4,
    Integrity = 5,
    Refused = 6,
    Unavailable = 7,
    Interrupted = 130,
}

impl Status {
    /// The more severe of two statuses: 5, then 3, then 4, then any other.
    pub(crate) fn worse(self, other: Self) -> Self {
        let rank = |status| match status {
            Status::Integrity => 0,
            Status::Revoked => 1,
            Status::KmsUnreachable => 2,
            Status::Done => 4,
            _ => 3,
        };
        if rank(other) < rank(self) { other } else { self }
    }
}

impl Status {
    /// The status with this number. An unknown one is `Other`.
    pub(crate) fn of_number(number: u8) -> Self {
        let all = [
            Self::Done,
            Self::Usage,
            Self::Revoked,
            Self::KmsUnreachable,
            Self::Integrity,
            Self::Refused,
            Self::Unavailable,
            Self::Interrupted,
        ];
        all.into_iter().find(|status| *status as u8 == number).unwrap_or(Self::Other)
    }
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        ExitCode::from(status as u8)
    }
}

/// Why a command failed: an exit status, a code and a kind for programs, and a sentence for people.
#[derive(Clone, Debug)]
pub(crate) struct Failure {
    status: Status,
    code: Cow<'static, str>,
    /// The name of the [`ErrorKind`], or `failed` or `interrupted`.
    kind: Cow<'static, str>,
    message: String,
}

impl Failure {
    /// A failure of the command line itself. Its kind follows from the status.
    pub(crate) fn new(status: Status, code: &'static str, message: impl Into<String>) -> Self {
        let kind = match status {
            Status::Done | Status::Other => "failed",
            Status::Usage | Status::Refused => ErrorKind::Invalid.name(),
            Status::Revoked => ErrorKind::Revoked.name(),
            Status::KmsUnreachable => ErrorKind::KmsUnreachable.name(),
            Status::Integrity => ErrorKind::Integrity.name(),
            Status::Unavailable => ErrorKind::Unavailable.name(),
            Status::Interrupted => "interrupted",
        };
        Self { status, code: code.into(), kind: kind.into(), message: message.into() }
    }

    /// The failure with the kind of an error of the engine.
    pub(crate) fn kind(self, kind: ErrorKind) -> Self {
        Self { kind: kind.name().into(), ..self }
    }

    /// A failure that reports an error of the engine in other words.
    pub(crate) fn of(error: &Error, message: impl Into<String>) -> Self {
        Self::new(status_of(error), error.code(), message).kind(error.kind())
    }

    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Status::Usage, "usage", message)
    }

    pub(crate) fn other(message: impl Into<String>) -> Self {
        Self::new(Status::Other, "failed", message)
    }

    pub(crate) fn refused(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(Status::Refused, code, message)
    }

    pub(crate) fn interrupted() -> Self {
        Self::new(Status::Interrupted, "interrupted", "interrupted: completed work is kept")
    }

    /// A file operation that the operating system refused.
    pub(crate) fn file(doing: &str, path: &Path, error: &io::Error) -> Self {
        Self::new(Status::Other, "io", format!("cannot {doing} {}: {error}", path.display()))
            .kind(ErrorKind::Io)
    }

    /// A failed write to standard output. A reader that closed the pipe has seen enough, so a
    /// broken pipe is a success without a message.
    pub(crate) fn output(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::new(Status::Done, "broken_pipe", String::new())
        } else {
            Self::new(Status::Other, "io", format!("cannot write to standard output: {error}"))
                .kind(ErrorKind::Io)
        }
    }

    /// The reader closed the pipe before the command was done: no message, but not a success.
    pub(crate) fn cut_short() -> Self {
        Self::new(Status::Other, "broken_pipe", String::new())
    }

    /// The failure with the more severe status, or the first if neither is more severe.
    pub(crate) fn or_worse(self, other: Self) -> Self {
        if self.status.worse(other.status) == self.status { self } else { other }
    }

    pub(crate) fn status(&self) -> Status {
        self.status
    }

    /// Appends a clause to the message.
    pub(crate) fn adding(mut self, more: &str) -> Self {
        self.message = format!("{}; {more}", self.message);
        self
    }

    /// Names the Logstore in the message, unless the message has the name already.
    pub(crate) fn about(mut self, name: &LogstoreName) -> Self {
        let name = name.to_string();
        if !self.message.contains(&name) {
            self.message = format!("{name}: {}", self.message);
        }
        self
    }

    /// The failure with another status.
    pub(crate) fn with_status(self, status: Status) -> Self {
        Self { status, ..self }
    }

    /// Prints the failure on standard error. An empty message prints nothing.
    pub(crate) fn report(&self, json: bool) {
        if self.message.is_empty() {
            return;
        }
        let text =
            if json { json!({ "error": self }).to_string() } else { format!("envelog: {self}") };
        let kind = if json { output::Kind::Json } else { output::Kind::Line };
        let text = [&output::for_stderr(text.as_bytes(), kind), &b"\n"[..]].concat();
        // A closed standard error is ignored: there is no other place for the message.
        let _ = io::stderr().write_all(&text);
    }
}

/// Returns the first result if the second succeeded. Of two failures, returns the more severe one,
/// so that a closed pipe or a full disk under standard output cannot hide a verdict.
pub(crate) fn both<T>(first: Result<T>, second: Result) -> Result<T> {
    match (first, second) {
        (Err(first), Err(second)) => Err(first.or_worse(second)),
        (first, second) => first.and_then(|done| second.map(|()| done)),
    }
}

/// The same form as an [`Error`] of the engine.
impl Serialize for Failure {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("Failure", 3)?;
        fields.serialize_field("code", &*self.code)?;
        fields.serialize_field("kind", &*self.kind)?;
        fields.serialize_field("message", &self.message)?;
        fields.end()
    }
}

/// A failure in another process. Its status comes apart from it.
impl<'de> Deserialize<'de> for Failure {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Fields {
            code: String,
            kind: String,
            message: String,
        }
        let Fields { code, kind, message } = Fields::deserialize(deserializer)?;
        Ok(Self { status: Status::Other, code: code.into(), kind: kind.into(), message })
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

/// The exit status for an engine error.
pub(crate) fn status_of(error: &Error) -> Status {
    match (error, error.kind()) {
        (_, ErrorKind::Revoked) => Status::Revoked,
        (Error::InvalidArgument(_), _) => Status::Usage,
        (Error::Config(_) | Error::UnexpectedCmk { .. }, _) => Status::Refused,
        (_, ErrorKind::KmsUnreachable) => Status::KmsUnreachable,
        (_, ErrorKind::Integrity) => Status::Integrity,
        (
            Error::StoreMissing { .. } | Error::NotAStore { .. } | Error::KeyringChanged { .. },
            _,
        )
        | (_, ErrorKind::Unavailable) => Status::Unavailable,
        _ => Status::Other,
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::of(&error, error.to_string())
    }
}

impl From<envelog::error::ConfigError> for Failure {
    fn from(error: envelog::error::ConfigError) -> Self {
        Error::from(error).into()
    }
}

impl From<LocalKmsError> for Failure {
    fn from(error: LocalKmsError) -> Self {
        let status = match &error {
            LocalKmsError::Missing { .. } | LocalKmsError::Busy { .. } => Status::KmsUnreachable,
            LocalKmsError::InvalidArgument { .. } => Status::Usage,
            LocalKmsError::Damaged { .. } => Status::Integrity,
            _ => Status::Other,
        };
        let (code, message) = (error.code(), error.to_string());
        Self::new(status, code, message).kind(Error::from(error).kind())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integrity_outranks_revocation_then_outage_then_the_rest() {
        let order = [
            Status::Integrity,
            Status::Revoked,
            Status::KmsUnreachable,
            Status::Unavailable,
            Status::Done,
        ];
        for (rank, better) in order.into_iter().enumerate() {
            for worse in &order[..rank] {
                assert_eq!((better.worse(*worse), worse.worse(better)), (*worse, *worse));
            }
        }
        let failure = |status, code| Failure::new(status, code, "");
        let first = failure(Status::Other, "first").or_worse(failure(Status::Other, "second"));
        assert_eq!(first.code, "first");
        assert_eq!(first.or_worse(failure(Status::Revoked, "revoked")).code, "revoked");
    }
}
