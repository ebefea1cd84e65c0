//! The options, the progress and the report of a verification.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize, Serializer, ser::SerializeStruct};

use super::checkpoint::Checkpoint;
use crate::{Error, ErrorKind, Result, config::LogstoreName};

/// The scope of a verification.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct VerifyOptions {
    /// Only this Logstore; `None` verifies all Logstores and the key audit log.
    pub logstore: Option<LogstoreName>,
    /// Verifies without the Logstores' keys, so it also works while a key is revoked. It checks
    /// CRCs, digests and the chain of segments. They find bit rot, missing parts and changed
    /// payloads. They do not find a payload behind the last head in the catalogue or a checkpoint
    /// that an attacker changed along with its CRC and digest.
    pub keyless: bool,
    /// Reports data that this checkpoint has and that is no longer there.
    pub against: Option<Checkpoint>,
}

impl VerifyOptions {
    setters! {
        logstore: LogstoreName, optional;
        keyless: bool;
        against: Checkpoint, optional;
    }
}

/// The progress of a verification.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct VerifyProgress {
    /// The number of bytes of segments that were checked.
    pub bytes: u64,
    /// The number of bytes of all segments to check.
    pub bytes_total: u64,
}

/// A fault: an object that differs from the one that was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct VerifyFault {
    /// The Logstore, if the fault concerns one.
    pub logstore: Option<LogstoreName>,
    /// The file.
    #[serde(serialize_with = "crate::error::path_if_any_as_text")]
    pub file: Option<PathBuf>,
    /// The number of the block in the file, if the fault concerns one.
    pub block: Option<u32>,
    /// The offset in bytes.
    pub offset: Option<u64>,
    /// The [code](Error::code) of the error: `corrupt`, `tampered`, `wrong_key`, `truncated`,
    /// `rolled_back`, …
    pub code: &'static str,
    /// A sentence about the fault.
    pub message: String,
}

impl VerifyFault {
    pub(in crate::store) fn of(logstore: Option<&LogstoreName>, error: &Error) -> Self {
        let at = match error {
            Error::WrongKey { at }
            | Error::Tampered { at, .. }
            | Error::Corrupt { at, .. }
            | Error::Truncated { at, .. } => Some(at),
            _ => None,
        };
        let file = match error {
            Error::RetiredKeyVersion { path, .. } | Error::WrongFileType { path, .. } => Some(path),
            _ => at.map(|at| &at.file),
        };
        Self {
            logstore: logstore.cloned(),
            file: file.cloned(),
            block: at.and_then(|at| at.block),
            offset: at.map(|at| at.offset),
            code: error.code(),
            message: error.to_string(),
        }
    }
}

/// The result of a verification.
///
/// As JSON it has the fields of this struct, and `ok`, whether it has neither faults nor refusals.
/// Each refusal has the fields `logstore`, `code`, `kind` and `message`.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Whether the Logstores' keys were left out ([`VerifyOptions::keyless`]).
    pub keyless: bool,
    /// The faults.
    pub faults: Vec<VerifyFault>,
    /// The Logstores that could not be verified with their keys, each with the error.
    pub refused: Vec<(LogstoreName, Error)>,
    /// Findings that are no faults: torn tails that the next append will drop, segments that
    /// retention has dropped since the checkpoint.
    pub notes: Vec<String>,
    /// The number of checked segments.
    pub segments: u64,
    /// The number of checked blocks.
    pub blocks: u64,
    /// The number of groups in these blocks.
    pub groups: u64,
    /// The size of the checked segments, in bytes.
    pub bytes: u64,
}

impl VerifyReport {
    /// Whether the verification found no fault in the objects that it could check.
    pub fn is_clean(&self) -> bool {
        self.faults.is_empty()
    }

    /// Adds a note about a lost or damaged copy of a file that exists twice.
    pub(super) fn lost_copy(&mut self, path: &Path) {
        self.notes.push(format!(
            "{} is lost or damaged, and its other copy is whole; the next opening for writing \
             writes it again",
            path.display()
        ));
    }

    /// Adds a finding to the report. Returns an error that is no finding.
    pub(in crate::store) fn note(
        &mut self,
        logstore: Option<&LogstoreName>,
        error: Error,
    ) -> Result<()> {
        match (error.kind(), logstore) {
            (ErrorKind::Integrity, _) => self.faults.push(VerifyFault::of(logstore, &error)),
            (ErrorKind::Revoked | ErrorKind::KmsUnreachable, Some(name)) => {
                if !self.refused.iter().any(|(refused, _)| refused == name) {
                    self.refused.push((name.clone(), error));
                }
            }
            _ if matches!(error, Error::Shredded { .. }) => self.notes.push(error.to_string()),
            _ if matches!(
                error,
                Error::KeyringTooOld { .. }
                    | Error::NewerFormat { .. }
                    | Error::OlderFormat { .. }
                    | Error::UnsupportedFeature { .. }
            ) =>
            {
                self.faults.push(VerifyFault::of(logstore, &error));
            }
            _ => return Err(error),
        }
        Ok(())
    }
}

impl Serialize for VerifyReport {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Refused<'a> {
            logstore: &'a LogstoreName,
            #[serde(flatten)]
            error: &'a Error,
        }
        let refused: Vec<_> =
            self.refused.iter().map(|(logstore, error)| Refused { logstore, error }).collect();
        let mut fields = serializer.serialize_struct("VerifyReport", 9)?;
        fields.serialize_field("ok", &(self.faults.is_empty() && self.refused.is_empty()))?;
        fields.serialize_field("keyless", &self.keyless)?;
        fields.serialize_field("faults", &self.faults)?;
        fields.serialize_field("refused", &refused)?;
        fields.serialize_field("notes", &self.notes)?;
        fields.serialize_field("segments", &self.segments)?;
        fields.serialize_field("blocks", &self.blocks)?;
        fields.serialize_field("groups", &self.groups)?;
        fields.serialize_field("bytes", &self.bytes)?;
        fields.end()
    }
}
