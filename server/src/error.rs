//! The errors of the service, as its clients know them: a status, a code and a sentence.

use std::fmt;

use envelog::{Error, ErrorKind, error::ConfigError};
use hyper::{
    StatusCode,
    header::{HeaderValue, RETRY_AFTER},
};
use serde_json::json;

use crate::response::Answer;

/// The result of an API call.
pub(crate) type Result<T, E = ApiError> = std::result::Result<T, E>;

/// How long a client shall wait before it repeats a call, in seconds.
const RETRY_SOON_S: u32 = 1;
const RETRY_KMS_S: u32 = 5;

/// The reason why a call was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    pub(crate) status: StatusCode,
    pub(crate) code: &'static str,
    pub(crate) message: String,
    /// The seconds after which the same call may succeed.
    pub(crate) retry_after_s: Option<u32>,
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, code, message: message.into(), retry_after_s: None }
    }

    /// A fault of the request, with one of the codes of status 400.
    pub(crate) fn bad(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// A parameter that is missing or has no allowed value.
    pub(crate) fn parameter(message: impl Into<String>) -> Self {
        Self::bad("ParameterInvalid", message)
    }

    /// An operation of the real service that this one does not have.
    pub(crate) fn unsupported(what: impl fmt::Display) -> Self {
        Self::bad("NotSupported", format!("this service does not support {what}"))
    }

    pub(crate) fn unauthorized(code: &'static str, message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, code, message)
    }

    pub(crate) fn no_project(name: &str) -> Self {
        let message = format!("The Project does not exist : {name}");
        Self::new(StatusCode::NOT_FOUND, "ProjectNotExist", message)
    }

    pub(crate) fn no_logstore(name: &str) -> Self {
        let message = format!("logstore {name} does not exist");
        Self::new(StatusCode::NOT_FOUND, "LogStoreNotExist", message)
    }

    /// A refusal for lack of room: the call may be repeated.
    pub(crate) fn busy(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "ServerBusy", message).after(RETRY_SOON_S)
    }

    /// A failure of the service. The message says nothing about its inside: the log does.
    pub(crate) fn internal() -> Self {
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "InternalServerError",
            "the service failed; its log has the reason under this request id",
        )
    }

    fn after(mut self, seconds: u32) -> Self {
        self.retry_after_s = Some(seconds);
        self
    }

    /// The answer to the client.
    pub(crate) fn answer(&self) -> Answer {
        let body = json!({ "errorCode": self.code, "errorMessage": self.message });
        let mut answer = Answer::json_with(self.status, &body);
        if let Some(seconds) = self.retry_after_s {
            answer.headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        answer
    }
}

/// An error of the engine. Its kind says who has to act, and so whether the client shall try again.
impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        match &error {
            Error::Config(config) => return config.into(),
            Error::InvalidGroup(_) => return Self::bad("PostBodyInvalid", error.to_string()),
            Error::TooLarge { .. } => {
                let status = StatusCode::PAYLOAD_TOO_LARGE;
                return Self::new(status, "PostBodyTooLarge", error.to_string());
            }
            Error::LogstoreMissing(name) => return Self::no_logstore(name.logstore()),
            Error::LogstoreExists(name) => {
                let message = format!("logstore {} already exists", name.logstore());
                return Self::bad("LogStoreAlreadyExist", message);
            }
            Error::ShardMissing { .. } => return Self::bad("ShardNotExist", error.to_string()),
            _ => {}
        }
        match error.kind() {
            ErrorKind::Revoked => {
                Self::new(StatusCode::FORBIDDEN, "KmsKeyRevoked", error.to_string())
            }
            ErrorKind::KmsUnreachable => {
                let status = StatusCode::SERVICE_UNAVAILABLE;
                Self::new(status, "ServerBusy", error.to_string()).after(RETRY_KMS_S)
            }
            ErrorKind::Busy => Self::busy(error.to_string()),
            ErrorKind::Invalid => Self::parameter(error.to_string()),
            // The Logstore is being deleted, or the service stops. The next call finds out.
            ErrorKind::Closed => Self::busy("the Logstore is being closed"),
            ErrorKind::NoRoom => {
                tracing::error!(%error, "the store has no room");
                Self::busy("the store has no room left; its operator has to make some")
            }
            _ => {
                tracing::error!(%error, code = error.code(), "the engine failed");
                Self::internal()
            }
        }
    }
}

impl From<&ConfigError> for ApiError {
    fn from(error: &ConfigError) -> Self {
        let message = error.to_string();
        match error {
            ConfigError::EncryptTypeRequired | ConfigError::EncryptTypeUnsupported(_) => Self::bad(
                "LogStoreInfoInvalid",
                format!(
                    "The encrypt_conf is invalid, [encrypt_type] key is missing or not supported: {message}"
                ),
            ),
            ConfigError::Json(_)
            | ConfigError::CmkField { .. }
            | ConfigError::OutOfRange { .. } => Self::bad("LogStoreInfoInvalid", message),
            ConfigError::CmkRefused { .. } => {
                Self::new(StatusCode::FORBIDDEN, "KmsKeyRevoked", message)
            }
            _ => Self::parameter(message),
        }
    }
}

impl From<ConfigError> for ApiError {
    fn from(error: ConfigError) -> Self {
        (&error).into()
    }
}

/// A failure of the service's own state on disk.
impl From<crate::state::StateError> for ApiError {
    fn from(error: crate::state::StateError) -> Self {
        tracing::error!(%error, "the state of the service cannot be kept");
        Self::internal()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::sync::Arc;

    use super::*;

    #[test]
    fn no_refusal_makes_the_python_client_repeat_a_call_without_encrypt_conf() {
        for error in [
            ConfigError::EncryptTypeRequired,
            ConfigError::EncryptConfRequired,
            ConfigError::Json("unknown field `x`".to_owned()),
        ] {
            let refusal = ApiError::from(error);
            assert_eq!(refusal.status, StatusCode::BAD_REQUEST);
            assert_ne!(refusal.message, "redundant key exist in json");
        }
    }

    #[test]
    fn a_failure_tells_the_client_nothing_about_the_disk() {
        let source = Arc::new(std::io::Error::other("a broken disk"));
        let error = Error::Io { op: "read", path: "some/path".into(), source };
        let refusal = ApiError::from(error);
        assert_eq!(refusal.status, StatusCode::INTERNAL_SERVER_ERROR);
        assert!(!refusal.message.contains("path") && !refusal.message.contains("disk"));
    }
}
