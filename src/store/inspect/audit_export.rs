//! Verification and export of the key audit log.

use serde::{Deserialize, Serialize, Serializer, ser::SerializeStruct};

use crate::{
    Error, ErrorKind, Result,
    crypto::{HashAlg, hash},
    document::to_json,
    ids::{StoreId, hex_encode},
    keys::{AuditEvent, AuditRecord},
    store::core::Core,
};

/// A position in the key audit log. It commits to a record and to all records before it, and can be
/// compared without any key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct AuditMark {
    /// The number of the record; 0 for an empty log.
    pub number: u64,
    /// The hash over this record and all before it, 64 hexadecimal digits; empty for an empty log.
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
    /// The head of an export, from its last line.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the text does not end as an export does.
    pub fn of_export(text: &str) -> Result<Self> {
        let head = text
            .trim_end()
            .lines()
            .next_back()
            .and_then(|line| serde_json::from_str::<Head>(line).ok());
        let not_one = || {
            Error::InvalidArgument(
                "this is no export of the key audit log, or not all of one".to_owned(),
            )
        };
        Ok(head.ok_or_else(not_one)?.head)
    }

    /// The mark of the next record, from its JSON and its tag in the log.
    fn next(&self, json: &str, tag: &str) -> Self {
        let parts = [self.hash.as_bytes(), json.as_bytes(), b"\t", tag.as_bytes()];
        Self { number: self.number + 1, hash: hex_encode(&hash(HashAlg::Sha256, &parts)) }
    }
}

/// The key audit log in a form that another party can keep and check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct AuditExport {
    /// Lines of JSON: each record with its tag and hash, and then the head. `docs/format.md` lists
    /// the fields.
    pub text: String,
    /// The mark of the last record.
    pub head: AuditMark,
}

/// The result of a verification of the key audit log. As JSON it has the fields of this struct, and
/// `ok`, whether there is no fault.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct AuditVerification {
    /// The mark of the last intact record.
    pub head: AuditMark,
    /// The fault behind that record, if there is one.
    pub fault: Option<Error>,
}

impl Serialize for AuditVerification {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("AuditVerification", 3)?;
        fields.serialize_field("ok", &self.fault.is_none())?;
        fields.serialize_field("head", &self.head)?;
        fields.serialize_field("fault", &self.fault)?;
        fields.end()
    }
}

/// All records, with their chain verified.
pub(in crate::store) fn audit_records(core: &Core) -> Result<Vec<AuditRecord>> {
    core.keys.admit_service_key()?;
    // A store that is open for reading gets the present end of the log, and the newest service key.
    core.registry.reload_catalogue()?;
    let known = core.registry.catalogue().audit.clone();
    core.keys.audit().verified(&[&known])
}

/// What operators have accepted that no shard has a record of, as the key audit log says.
pub(in crate::store) fn accepted_losses(core: &Core) -> Result<Vec<AuditRecord>> {
    core.keys.admit_service_key()?;
    core.registry.reload_catalogue()?;
    let known = core.registry.catalogue().audit.clone();
    let mut accepted = Vec::new();
    core.keys.audit().walk(&[&known], &mut |line| {
        if accepted_loss(&line.record).is_some() {
            accepted.push(line.record);
        }
    })?;
    Ok(accepted)
}

/// A sentence about what an operator has accepted with this record, if no shard has a record of it.
pub(super) fn accepted_loss(record: &AuditRecord) -> Option<String> {
    let (number, detail) = (record.number, &record.detail);
    match (record.event, &record.logstore) {
        (AuditEvent::LossAccepted, None) => Some(format!(
            "an operator has accepted the loss of the key audit log before record {number}: {detail}"
        )),
        (AuditEvent::MetadataAdopted, Some(name)) => Some(format!(
            "an operator has put other metadata of Logstore {name} in force: {detail}"
        )),
        (AuditEvent::GivenUp, Some(name)) => Some(format!(
            "an operator has given up Logstore {name}, whose metadata was lost: {detail}"
        )),
        _ => None,
    }
}

/// Verifies the log, also against an earlier mark.
pub(in crate::store) fn verify_audit(
    core: &Core,
    against: Option<&AuditMark>,
) -> Result<AuditVerification> {
    let mut head = AuditMark::default();
    let mut differs = None;
    let walked = walk_audit(core, &mut |json, tag| {
        head = head.next(json, tag);
        if let Some(mark) =
            against.filter(|mark| mark.number == head.number && mark.hash != head.hash)
        {
            let what =
                format!("audit record {} or one before it is another than it was", mark.number);
            differs.get_or_insert(Error::RolledBack { what });
        }
    });
    let fault = match (walked, differs) {
        (Err(error), _) if error.kind() != ErrorKind::Integrity => return Err(error),
        (Err(error), _) | (Ok(()), Some(error)) => Some(error),
        (Ok(()), None) => {
            against.filter(|mark| mark.number > head.number).map(|mark| Error::RolledBack {
                what: format!(
                    "the audit log ends at record {}, it had {}",
                    head.number, mark.number
                ),
            })
        }
    };
    Ok(AuditVerification { head, fault })
}

/// Exports the log, with its chain verified.
pub(in crate::store) fn export_audit(core: &Core) -> Result<AuditExport> {
    let mut head = AuditMark::default();
    let mut text = String::new();
    walk_audit(core, &mut |json, tag| {
        head = head.next(json, tag);
        text.push_str(&format!(
            "{{\"record\":{json},\"tag\":\"{tag}\",\"hash\":\"{}\"}}\n",
            head.hash
        ));
    })?;
    let last =
        Head { head: head.clone(), store: core.env.id, exported_us: core.env.clock.wall_us() };
    text.push_str(&to_json(&last));
    text.push('\n');
    Ok(AuditExport { text, head })
}

/// Calls `each` with every record, as JSON with its tag, up to the first fault of the chain.
fn walk_audit(core: &Core, each: &mut dyn FnMut(&str, &str)) -> Result<()> {
    core.keys.admit_service_key()?;
    core.registry.reload_catalogue()?;
    let known = core.registry.catalogue().audit.clone();
    core.keys.audit().walk(&[&known], &mut |line| each(&line.json, &line.tag))
}
