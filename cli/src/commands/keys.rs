//! `keys`.

use std::{fs::OpenOptions, io::Write, os::unix::fs::OpenOptionsExt, path::Path};

use envelog::{AuditRecord, ConfigError, EncryptConf, ReplaceCmk};
use serde_json::json;

use super::confirm;
use crate::{
    args::KeysCommand,
    exit::{Failure, Result},
    input, output,
    setup::{self, Setup, name, names},
};

pub(crate) fn run(setup: &Setup, command: KeysCommand) -> Result {
    match command {
        KeysCommand::RotateData(args) => rotate_data(setup, &args.name),
        KeysCommand::Rewrap(args) => rewrap(setup, args.name.as_deref()),
        KeysCommand::RotateService => rotate_service(setup),
        KeysCommand::Audit => audit(setup),
        KeysCommand::Backup(args) => backup(setup, &args.out),
        KeysCommand::Recover { without_keyring: _, service_cmk } => recover(setup, service_cmk.as_deref()),
        KeysCommand::RewrapKeyring { service_cmk, plain: _ } => rewrap_keyring(setup, service_cmk.as_deref()),
        KeysCommand::ReplaceCmk { name, encrypt_conf, keep_data_key } => {
            replace_cmk(setup, &name, &encrypt_conf, keep_data_key)
        }
        KeysCommand::Shred { name, versions, yes } => shred(setup, &name, &versions, yes),
    }
}

fn rotate_data(setup: &Setup, argument: &str) -> Result {
    let name = name(argument)?;
    let store = setup.open()?;
    let version = store.rotate_data_key(&name)?;
    store.close()?;
    if setup.json {
        return output::json(&json!({ "logstore": name, "data_key_version": version }));
    }
    output::line(format_args!("{name}: what comes from now on is sealed under data-key version {version}"))
}

fn rewrap(setup: &Setup, argument: Option<&str>) -> Result {
    let store = setup.open()?;
    let mut all = Vec::new();
    for name in names(&store, argument)? {
        let envelopes = match store.rewrap(&name) {
            Ok(envelopes) => envelopes,
            // A Logstore that was never encrypted has nothing to wrap; only the one asked for by name has to have.
            Err(envelog::Error::Config(ConfigError::NotEncrypted)) if argument.is_none() => 0,
            Err(error) => return Err(error.into()),
        };
        if !setup.json {
            output::line(format_args!("{name}: wrapped {envelopes} data keys again"))?;
        }
        all.push(json!({ "logstore": name, "envelopes": envelopes }));
    }
    store.close()?;
    if setup.json { output::json(&json!({ "rewrapped": all })) } else { Ok(()) }
}

fn rotate_service(setup: &Setup) -> Result {
    let store = setup.open()?;
    let version = store.rotate_service_key()?;
    store.close()?;
    if setup.json {
        return output::json(&json!({ "service_key_version": version }));
    }
    output::line(format_args!(
        "the service key has version {version} now, and wraps all that it wrapped before: back up {} again",
        setup.keyring.display()
    ))
}

fn audit(setup: &Setup) -> Result {
    let records = setup.open_read_only()?.audit_records()?;
    if setup.json {
        return output::json(&json!({ "records": records }));
    }
    let mut table = output::table(&["number", "time", "event", "Logstore", "detail"], &[0]);
    for record in &records {
        table.add_row([
            record.number.to_string(),
            output::moment(record.time_us),
            event_word(record),
            record.logstore.as_ref().map_or_else(String::new, ToString::to_string),
            record.detail.clone(),
        ]);
    }
    output::line(table)
}

/// The event, as it is written in JSON.
fn event_word(record: &AuditRecord) -> String {
    serde_json::to_value(record.event)
        .ok()
        .and_then(|event| event.as_str().map(str::to_owned))
        .unwrap_or_else(|| format!("{:?}", record.event))
}

fn backup(setup: &Setup, out: &Path) -> Result {
    // Opening the store proves that it is the right keyring, whole and new enough.
    let store = setup.open_read_only()?;
    write_new(out, &input::read_file(&setup.keyring)?)?;
    if setup.json {
        return output::json(&json!({ "keyring": out, "store_id": store.id() }));
    }
    output::line(format_args!(
        "copied the service keyring to {}: keep it secret, and apart from the store, of which {} needs a backup too; \
         copy it again after `keys rotate-service`",
        out.display(),
        setup.store.display()
    ))?;
    match store.service_cmk() {
        Some(cmk) => {
            output::line(format_args!("it opens with master key {} alone, which needs a backup too", cmk.cmk_key_id))
        }
        None => Ok(()),
    }
}

fn rewrap_keyring(setup: &Setup, service_cmk: Option<&str>) -> Result {
    let cmk = service_cmk.map(setup::cmk).transpose()?;
    let store = setup.open()?;
    store.rewrap_keyring(cmk.clone())?;
    store.close()?;
    if setup.json {
        return output::json(&json!({ "service_cmk": cmk }));
    }
    let under = cmk.map_or_else(|| "no master key".to_owned(), |cmk| format!("master key {}", cmk.cmk_key_id));
    output::line(format_args!(
        "the service keyring {} is under {under} now, with the same roots: back it up again, and rotate the service key to be done \
         with old copies",
        setup.keyring.display()
    ))
}

fn recover(setup: &Setup, service_cmk: Option<&str>) -> Result {
    let mut builder = setup.builder();
    if let Some(argument) = service_cmk {
        builder = builder.service_cmk(setup::cmk(argument)?);
    }
    let (store, report) = builder.recover_without_keyring()?;
    store.close()?;
    if setup.json {
        return output::json(&report);
    }
    for name in &report.recovered {
        output::line(format_args!("{name}: recovered"))?;
    }
    for (id, why) in &report.lost {
        output::line(format_args!("Logstore {id}: not recovered: {why}"))?;
    }
    output::line(format_args!("made a new service keyring {}: back it up", setup.keyring.display()))
}

fn replace_cmk(setup: &Setup, argument: &str, encrypt_conf: &str, keep_data_key: bool) -> Result {
    let name = name(argument)?;
    let conf = EncryptConf::from_json(&input::text_argument(encrypt_conf)?)?;
    let Some(cmk) = conf.user_cmk_info else {
        return Err(Failure::refused(
            "not_byok",
            "the encrypt_conf has no user_cmk_info: say which key to replace it by",
        ));
    };
    let store = setup.open()?;
    // Only the key is replaced. Settings that ask for something else too were meant for another Logstore, or for `update`.
    let old = store.config(&name)?.encrypt_conf.ok_or(ConfigError::NotByok)?;
    if let (Some(fixed), Some(asked)) = (old.encrypt_type, conf.encrypt_type)
        && fixed != asked
    {
        return Err(ConfigError::AlgorithmFixed { fixed }.into());
    }
    if conf.enable != old.enable {
        return Err(Failure::refused(
            "enable_differs",
            format!("{name} has enable {}: to switch it is for `update`, not for replace-cmk", old.enable),
        ));
    }
    let how = if keep_data_key { ReplaceCmk::keep_data_key() } else { ReplaceCmk::default() };
    store.replace_cmk(&name, cmk, how)?;
    let config = store.config(&name)?;
    store.close()?;
    if setup.json {
        return output::json(&config);
    }
    output::line(format_args!(
        "{name} is under the new key; whoever held the old one and a copy of an old envelope can still read the old data"
    ))
}

fn shred(setup: &Setup, argument: &str, versions: &[u32], yes: bool) -> Result {
    let name = name(argument)?;
    confirm(yes, &format!("destroying data keys of {name}, and what they sealed,"))?;
    let store = setup.open()?;
    store.shred_data_keys(&name, versions)?;
    store.close()?;
    if setup.json {
        return output::json(&json!({ "logstore": name, "shredded": versions }));
    }
    output::line(format_args!(
        "{name}: data keys destroyed in this store; backups and snapshots of it may still hold them"
    ))
}

/// Writes a new file that only its owner may read, durably.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> Result {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(path).map_err(|error| Failure::file("create", path, &error))?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|error| Failure::file("write", path, &error))
}
