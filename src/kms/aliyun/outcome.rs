//! Sorts error codes. The table is in the documentation of [`AliyunKms`](super::AliyunKms).

use serde_json::Value;

use super::super::RevokedReason;

/// The meaning of an error answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    Revoked(RevokedReason),
    Unreachable,
    Invalid,
    /// The code says nothing certain about the key. Its state, from `DescribeKey`, may.
    AskState,
}

/// Sorts an error of KMS. The customer's role is logged in there.
pub(super) fn of_kms(status: u16, error: &Value) -> Meaning {
    if !(400..500).contains(&status) {
        return Meaning::Unreachable;
    }
    match text(error, "Code") {
        "Forbidden.KeyNotFound" | "Forbidden.AliasNotFound" => {
            Meaning::Revoked(RevokedReason::Deleted)
        }
        "Forbidden.NoPermission" | "Forbidden.RAM" | "NoPermission" | "NotAuthorized" => {
            Meaning::Revoked(RevokedReason::NotPermitted)
        }
        "Rejected.Disabled" | "Rejected.PendingImport" => Meaning::Revoked(RevokedReason::Disabled),
        "Rejected.PendingDeletion" => Meaning::Revoked(RevokedReason::PendingDeletion),
        "InvalidParameter"
        | "MissingParameter"
        | "ParseRequestParameterException"
        | "UnsupportedOperation" => Meaning::Invalid,
        "" => Meaning::Unreachable,
        code if code.starts_with("Throttling")
            || is_about_login(code)
            || is_about_account(code) =>
        {
            Meaning::Unreachable
        }
        _ => Meaning::AskState,
    }
}

/// Sorts an error of `AssumeRole`. The service itself is logged in there.
pub(super) fn of_assume_role(status: u16, error: &Value) -> Meaning {
    if !(400..500).contains(&status) {
        return Meaning::Unreachable;
    }
    match text(error, "Code") {
        "EntityNotExist.Role" => Meaning::Revoked(RevokedReason::NotPermitted),
        "NoPermission" if !is_own_lack(error) => Meaning::Revoked(RevokedReason::NotPermitted),
        code if code == "InvalidParameter" || code.starts_with("InvalidParameter.") => {
            Meaning::Invalid
        }
        _ => Meaning::Unreachable,
    }
}

/// Whether STS refuses this caller. Newer credentials of the service may help.
pub(super) fn is_refusal_by_sts(status: u16, error: &Value) -> bool {
    let code = text(error, "Code");
    (400..500).contains(&status)
        && !code.is_empty()
        && !code.starts_with("Throttling")
        && of_assume_role(status, error) != Meaning::Invalid
}

/// The state of a key, as far as `DescribeKey` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Usable,
    Refused(RevokedReason),
    Unknown,
}

/// Sorts the state of a key from `DescribeKey`.
pub(super) fn of_state(state: &str) -> State {
    match state {
        "Enabled" => State::Usable,
        "Disabled" | "PendingImport" => State::Refused(RevokedReason::Disabled),
        "PendingDeletion" => State::Refused(RevokedReason::PendingDeletion),
        _ => State::Unknown,
    }
}

/// Whether `AssumeRole` was refused because the service's identity lacks a permission, and not by
/// the role's trust policy. The details of the answer say so. If an identity of that kind may never
/// assume a role, the message says so.
fn is_own_lack(error: &Value) -> bool {
    let detail = error.get("AccessDeniedDetail").unwrap_or(&Value::Null);
    match text(detail, "PolicyType") {
        "AccountLevelIdentityBasedPolicy"
        | "ResourceGroupLevelIdentityBasedPolicy"
        | "SessionPolicy" => true,
        "" => text(error, "Message").contains("may not be assumed by root accounts"),
        _ => false,
    }
}

/// Codes about the caller's identity, the time, or the signature.
fn is_about_login(code: &str) -> bool {
    let root = code.split('.').next().unwrap_or_default();
    matches!(
        root,
        "IllegalTimestamp"
            | "IncompleteSignature"
            | "InvalidAccessKeyId"
            | "InvalidSecurityToken"
            | "InvalidTimeStamp"
            | "MissingSecurityToken"
            | "RequestTimeTooSkewed"
            | "SignatureDoesNotMatch"
            | "SignatureNonceUsed"
    ) || code == "Forbidden.AccessKey"
}

/// Codes about the customer's account as a whole. They do not revoke a key.
fn is_about_account(code: &str) -> bool {
    matches!(
        code,
        "Forbidden.InDebt"
            | "Forbidden.InDebtOverdue"
            | "Forbidden.KmsServiceNotEnabled"
            | "Forbidden.ProhibitedByRiskControl"
            | "Forbidden.UbsmsInvalidBid"
            | "Forbidden.UbsmsInvalidUserid"
    )
}

fn text<'a>(object: &'a Value, name: &str) -> &'a str {
    object.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// The error's code and the request id, which support asks for, if both are well-formed. The
/// backend quotes nothing else of an answer.
pub(super) fn code_of(error: &Value, status: u16) -> String {
    let word = |name| {
        let word = text(error, name);
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        Some(word).filter(|word| (1..=64).contains(&word.len()) && word.chars().all(plain))
    };
    let code = word("Code")
        .map_or_else(|| format!("status {status} without an error code"), str::to_owned);
    match word("RequestId") {
        Some(id) => format!("{code} (request {id})"),
        None => code,
    }
}
