//! The key audit log, verified and handed out.

use serde::{Deserialize, Serialize};

use super::{Store, StoreShared};
use crate::{
    Error, Result,
    crypto::{HashAlg, hash},
    ids::{StoreId, hex_encode},
    keys::AuditRecord,
    sync::lock,
};

/// A point of the key audit log: it stands for this record and all before it, and can be compared without any key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct AuditMark {
    /// The number of the record; 0 stands for none.
    pub number: u64,
    /// The hash over it and all before it, 64 hexadecimal digits; empty for none.
    pub hash: String,
}

/// The last line of an export.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    head: AuditMark,
    store: StoreId,
    exported_us: u64,
}

impl AuditMark {
    /// The head of an export: what its last line says.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the text does not end as an export does.
    pub fn of_export(text: &str) -> Result<Self> {
        let head = text.trim_end().lines().next_back().and_then(|line| serde_json::from_str::<Head>(line).ok());
        let not_one = || Error::InvalidArgument("this is no export of the key audit log, or not all of one".to_owned());
        Ok(head.ok_or_else(not_one)?.head)
    }

    /// The mark of the record that follows: `json` as it stands in the log.
    fn next(&self, json: &str, tag: &str) -> Self {
        let parts = [self.hash.as_bytes(), json.as_bytes(), b"\t", tag.as_bytes()];
        Self { number: self.number + 1, hash: hex_encode(&hash(HashAlg::Sha256, &parts)) }
    }
}

/// The key audit log for somebody else to keep and to check.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AuditExport {
    /// JSON, a line each: the records with their tags and hashes, and at last the head. `docs/format.md` has the fields.
    pub text: String,
    /// The last record and all before it.
    pub head: AuditMark,
}

/// What a verification of the key audit log found.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AuditVerification {
    /// The last record up to which everything is as it was written.
    pub head: AuditMark,
    /// What is wrong behind it, if anything is.
    pub fault: Option<Error>,
}

impl Store {
    /// The key audit log, its chain verified from the first record to the last.
    ///
    /// # Errors
    /// [`Error::Tampered`], [`Error::Corrupt`], [`Error::Truncated`] when the chain does not hold.
    pub fn audit_records(&self) -> Result<Vec<AuditRecord>> {
        let _admin = lock(&self.shared.admin);
        // A reader, which may need the newest service key for it too, looks how far the log is now.
        self.shared.reload_catalogue()?;
        let known = self.shared.catalogue.now().audit.clone();
        self.shared.audit.verified(&[&known])
    }

    /// Verifies the key audit log: the tags, the chain, that it reaches as far as the catalogue knows, and, given a mark of an earlier
    /// time, that the same records are still there. Needs no data key and calls no KMS.
    ///
    /// # Errors
    /// What keeps it from being read: what is found wrong is in the answer.
    pub fn verify_audit(&self, against: Option<&AuditMark>) -> Result<AuditVerification> {
        let mut head = AuditMark::default();
        let mut differs = None;
        let walked = self.shared.walk_audit(&mut |json, tag| {
            head = head.next(json, tag);
            if let Some(mark) = against.filter(|mark| mark.number == head.number && mark.hash != head.hash) {
                let what = format!("audit record {} or one before it is another than it was", mark.number);
                differs.get_or_insert(Error::RolledBack { what });
            }
        });
        let fault = match (walked, differs) {
            (Err(error), _) if error.kind() != crate::ErrorKind::Integrity => return Err(error),
            (Err(error), _) | (Ok(()), Some(error)) => Some(error),
            (Ok(()), None) => against.filter(|mark| mark.number > head.number).map(|mark| Error::RolledBack {
                what: format!("the audit log ends at record {}, it had {}", head.number, mark.number),
            }),
        };
        Ok(AuditVerification { head, fault })
    }

    /// The key audit log as lines of JSON, verified while it is read. Whoever has them can check without any key that no record is
    /// missing, moved or altered since: by the hashes, and by comparing the head with that of an earlier export.
    ///
    /// # Errors
    /// As [`Store::audit_records`]: what is broken is not exported.
    pub fn export_audit(&self) -> Result<AuditExport> {
        let mut head = AuditMark::default();
        let mut text = String::new();
        self.shared.walk_audit(&mut |json, tag| {
            head = head.next(json, tag);
            text.push_str(&format!("{{\"record\":{json},\"tag\":\"{tag}\",\"hash\":\"{}\"}}\n", head.hash));
        })?;
        let last = Head { head: head.clone(), store: self.shared.id, exported_us: self.shared.clock.wall_us() };
        text.push_str(&serde_json::to_string(&last).expect("plain data always serializes"));
        text.push('\n');
        Ok(AuditExport { text, head })
    }
}

impl StoreShared {
    /// Hands out every record, as JSON with its tag, for as long as the chain holds.
    fn walk_audit(&self, each: &mut dyn FnMut(&str, &str)) -> Result<()> {
        let _admin = lock(&self.admin);
        self.reload_catalogue()?;
        let known = self.catalogue.now().audit.clone();
        self.audit.walk(&[&known], &mut |line| each(&line.json, &line.tag))
    }
}
