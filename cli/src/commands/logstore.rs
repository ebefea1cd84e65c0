//! `create`, `get`, `update`, `list`, `delete`.

use envelog::{
    EncryptConf, LogstoreConfig, LogstoreName, LogstoreSpec, RotateDataKey, admin::DeleteReport,
};
use serde::Serialize;

use super::confirm;
use crate::{
    args::{ConfirmedArgs, CreateArgs, NameArgs, UpdateArgs},
    exit::{Failure, Result},
    input, output,
    setup::{self, Setup, name},
};

/// The answer of `delete`.
#[derive(Serialize)]
struct Deleted<'a> {
    deleted: &'a LogstoreName,
    #[serde(flatten)]
    report: &'a DeleteReport,
}

/// The answer of `list`.
#[derive(Serialize)]
struct Listed {
    logstores: Vec<LogstoreName>,
}

pub(crate) fn create(setup: &Setup, args: &CreateArgs) -> Result {
    // Refuse everything that needs no store to check before creating one.
    let name = name(&args.name)?;
    let encrypt_conf = match &args.encrypt_conf {
        Some(argument) => Some(EncryptConf::from_json(&input::text_argument(argument)?)?),
        None => None,
    };
    let policy = RotateDataKey::default()
        .max_age_days(args.rotate_key_days)
        .max_bytes(args.rotate_key_bytes);
    let spec = LogstoreSpec::default()
        .shard_count(args.shards)
        .ttl_days(args.ttl)
        .retention_bytes(args.retention_bytes)
        .rotate_data_key((policy != RotateDataKey::default()).then_some(policy))
        .compression(args.compression.into())
        .payload_hash(args.payload_hash.into())
        .encrypt_conf(encrypt_conf)
        .probe(args.probe.into());
    spec.check()?;
    let service_cmk = args.service_cmk.as_deref().map(setup::cmk).transpose()?;
    let new_store = !setup.keyring.exists();
    let mut builder = setup.builder();
    if let Some(cmk) = &service_cmk {
        builder = builder.service_cmk(cmk.clone());
    }
    let store = builder.open_or_create()?;
    if service_cmk.is_some() && store.keys().service_cmk() != service_cmk {
        return Err(Failure::refused(
            "service_key_differs",
            "the store exists already, and its service keyring is not under that master key: see `keys rewrap-keyring`",
        ));
    }
    // Report the new store before any later step can fail: no other message reports it.
    if new_store && !setup.json {
        output::line(format_args!(
            "created the store {} and its service keyring {}: back up both, and keep them apart",
            setup.store.display(),
            setup.keyring.display()
        ))?;
    }
    store.create_logstore(&name, spec)?;
    let config = store.logstore(&name)?.config();
    setup.close(store)?;
    if setup.json { output::json(&config) } else { output::line(format_args!("created {name}")) }
}

pub(crate) fn get(setup: &Setup, args: &NameArgs) -> Result {
    let store = setup.open_read_only()?;
    output::json(&store.logstore(&name(&args.name)?)?.config())
}

pub(crate) fn update(setup: &Setup, args: &UpdateArgs) -> Result {
    let name = name(&args.name)?;
    let config = LogstoreConfig::from_json(&input::text_argument(&args.config)?)?;
    let store = setup.open()?;
    let config = store.update_logstore(&name, config)?;
    setup.close(store)?;
    output::json(&config)
}

pub(crate) fn list(setup: &Setup) -> Result {
    let names = setup.open_read_only()?.list()?;
    if setup.json {
        return output::json(&Listed { logstores: names });
    }
    names.iter().try_for_each(output::line)
}

pub(crate) fn delete(setup: &Setup, args: &ConfirmedArgs) -> Result {
    let name = name(&args.name)?;
    confirm(args.yes, &format!("deleting {name}"))?;
    let store = setup.open()?;
    let report = store.delete_logstore(&name)?;
    setup.close(store)?;
    print_deleted(setup, &name, &report)
}

/// Prints the answer to a deletion.
pub(super) fn print_deleted(setup: &Setup, name: &LogstoreName, report: &DeleteReport) -> Result {
    if setup.json {
        return output::json(&Deleted { deleted: name, report });
    }
    output::line(format_args!("deleted {name}"))?;
    if !report.left.is_empty() {
        output::line(
            "these entries could not be removed; envelog tries again at each opening and run of retention:",
        )?;
    }
    report.left.iter().try_for_each(|path| output::line(path.display()))
}
