//! The administrative commands that this process runs on a store, or sends to the service that has
//! the store open. A call has everything that the command reads: it names no file of the process
//! that runs it.

use std::path::Path;

use base64::{Engine, engine::general_purpose::STANDARD};
use envelog::{EncryptConf, LogstoreName, admin::Checkpoint, audit::AuditMark, kms::Cmk};
use serde::{Deserialize, Serialize};

use crate::{
    args::{
        AuditArgs, BackupArgs, NameArgs, OptionalNameArgs, OutArgs, RepairArgs, RetainArgs,
        RewrapArgs, VerifyArgs,
    },
    commands::{backup, keys, logstore, retain, status, verify},
    exit::{Failure, Result},
    input,
    setup::{Setup, name},
};

/// A command with its arguments.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(tag = "command", content = "arguments", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Call {
    Get(NameArgs),
    List,
    Status(OptionalNameArgs),
    Verify {
        name: Option<String>,
        keyless: bool,
        /// A checkpoint, in base64.
        against: Option<String>,
    },
    Checkpoint(OutArgs),
    Repair(RepairArgs),
    Retain(RetainArgs),
    Backup(BackupArgs),
    RotateData(NameArgs),
    Rewrap(RewrapArgs),
    Usage,
    RotateService,
    Audit,
    VerifyAudit {
        against: Option<AuditMark>,
    },
    ExportAudit(OutArgs),
    RewrapKeyring {
        service_cmk: Option<Cmk>,
    },
    ReplaceCmk {
        name: String,
        encrypt_conf: EncryptConf,
        keep_data_key: bool,
    },
    Shred {
        name: String,
        versions: Vec<u32>,
        yes: bool,
    },
}

impl Call {
    /// Reads the checkpoint that the arguments name.
    pub(crate) fn verify(args: VerifyArgs) -> Result<Self> {
        let VerifyArgs { name, keyless, against } = args;
        let against = against.as_deref().map(input::read_file).transpose()?;
        let against = against.map(|content| STANDARD.encode(content));
        Ok(Self::Verify { name, keyless, against })
    }

    /// Reads the end of the earlier export that the arguments name.
    pub(crate) fn audit(args: AuditArgs) -> Result<Self> {
        let AuditArgs { verify, against, out } = args;
        Ok(match (verify, out) {
            (true, _) => {
                let mark = |path: &Path| -> Result<AuditMark> {
                    let text = input::read_file(path)?;
                    Ok(AuditMark::of_export(&String::from_utf8_lossy(&text))?)
                };
                Self::VerifyAudit { against: against.as_deref().map(mark).transpose()? }
            }
            (false, Some(out)) => Self::ExportAudit(OutArgs { out }),
            (false, None) => Self::Audit,
        })
    }

    /// Runs the command.
    pub(crate) fn run(self, setup: &Setup) -> Result {
        match self {
            Self::Get(args) => logstore::get(setup, &args),
            Self::List => logstore::list(setup),
            Self::Status(args) => status::run(setup, &args),
            Self::Verify { name, keyless, against } => {
                verify::verify(setup, name.as_deref(), keyless, checkpoint(against.as_deref())?)
            }
            Self::Checkpoint(args) => verify::checkpoint(setup, &args),
            Self::Repair(args) => verify::repair(setup, &args),
            Self::Retain(args) => retain::run(setup, &args),
            Self::Backup(args) => backup::backup(setup, &args),
            Self::RotateData(args) => keys::rotate_data(setup, &args.name),
            Self::Rewrap(args) => keys::rewrap(setup, args),
            Self::Usage => keys::usage(setup),
            Self::RotateService => keys::rotate_service(setup),
            Self::Audit => keys::audit(setup),
            Self::VerifyAudit { against } => keys::verify_audit(setup, against.as_ref()),
            Self::ExportAudit(args) => keys::export_audit(setup, &args.out),
            Self::RewrapKeyring { service_cmk } => keys::rewrap_keyring(setup, service_cmk),
            Self::ReplaceCmk { name, encrypt_conf, keep_data_key } => {
                keys::replace_cmk(setup, &name, encrypt_conf, keep_data_key)
            }
            Self::Shred { name, versions, yes } => keys::shred(setup, &name, &versions, yes),
        }
    }

    /// The one Logstore that the command is about. `None` for the whole store, of which a status
    /// always tells something.
    pub(crate) fn logstore(&self) -> Result<Option<LogstoreName>> {
        let argument = match self {
            Self::Get(args) | Self::RotateData(args) => Some(&args.name),
            Self::Verify { name, .. } => name.as_ref(),
            Self::Repair(args) => args.name.as_ref(),
            Self::Rewrap(args) => args.name.as_ref(),
            Self::ReplaceCmk { name, .. } | Self::Shred { name, .. } => Some(name),
            Self::List
            | Self::Status(_)
            | Self::Checkpoint(_)
            | Self::Retain(_)
            | Self::Backup(_)
            | Self::Usage
            | Self::RotateService
            | Self::Audit
            | Self::VerifyAudit { .. }
            | Self::ExportAudit(_)
            | Self::RewrapKeyring { .. } => None,
        };
        argument.map(|argument| name(argument)).transpose()
    }

    /// The role that the command lets the store use.
    pub(crate) fn role(&self) -> Option<&str> {
        let cmk = match self {
            Self::RewrapKeyring { service_cmk } => service_cmk.as_ref(),
            Self::ReplaceCmk { encrypt_conf, .. } => encrypt_conf.user_cmk_info.as_ref(),
            _ => None,
        };
        cmk.map(|cmk| &*cmk.arn)
    }

    /// The file that the command makes.
    pub(crate) fn out(&self) -> Option<&Path> {
        match self {
            Self::Checkpoint(args) | Self::ExportAudit(args) => Some(&args.out),
            _ => None,
        }
    }

    /// The command as JSON, without the content of files.
    pub(crate) fn describe(&self) -> String {
        let mut call = self.clone();
        if let Self::Verify { against: Some(content), .. } = &mut call {
            content.clear();
        }
        serde_json::to_string(&call).unwrap_or_else(|_| "a command".to_owned())
    }
}

fn checkpoint(against: Option<&str>) -> Result<Option<Checkpoint>> {
    let decode = |text: &str| {
        let wrong = |error| Failure::usage(format!("against is not base64: {error}"));
        STANDARD.decode(text).map(Checkpoint::from_bytes).map_err(wrong)
    };
    against.map(decode).transpose()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use serde_json::json;

    use super::*;

    fn call(json: serde_json::Value) -> Call {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn a_call_of_the_whole_store_has_no_logstore_and_any_other_has_its_own() {
        let name = || Some("p/l".parse().unwrap());
        for (command, arguments, logstore) in [
            ("get", json!({ "name": "p/l" }), name()),
            ("status", json!({ "name": "p/l" }), None),
            ("verify", json!({ "name": "p/l", "keyless": true, "against": null }), name()),
            ("verify", json!({ "name": null, "keyless": true, "against": null }), None),
            ("rewrap", json!({ "name": null, "cmk": "k", "region": null, "restart": false }), None),
            (
                "repair",
                json!({ "name": "p/l", "shard": 1, "give_up": false, "yes": true,
                        "accept_tampered": false }),
                name(),
            ),
            ("shred", json!({ "name": "p/l", "versions": [1], "yes": true }), name()),
        ] {
            let call = call(json!({ "command": command, "arguments": arguments }));
            assert_eq!(call.logstore().unwrap(), logstore, "{command}");
        }
        assert!(call(json!({ "command": "list" })).logstore().unwrap().is_none());
        let wrong = json!({ "command": "get", "arguments": { "name": "p" } });
        assert!(call(wrong).logstore().is_err());
    }

    #[test]
    fn unknown_commands_and_arguments_are_refused() {
        for wrong in [
            json!({ "command": "create", "arguments": { "name": "p/l" } }),
            json!({ "command": "get", "arguments": { "name": "p/l", "store": "/" } }),
            json!({ "command": "shred", "arguments": { "name": "p/l", "yes": true } }),
            json!({ "command": "backup", "arguments": { "dir": "d" } }),
            json!({ "command": "verify", "arguments":
                { "name": null, "keyless": true, "against": null, "file": "/etc/shadow" } }),
            json!({}),
        ] {
            assert!(serde_json::from_value::<Call>(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_description_has_no_content_of_a_file() {
        let secret = Call::Verify { name: None, keyless: true, against: Some("Y29udGVudA".into()) };
        assert!(!secret.describe().contains("Y29"));
    }
}
