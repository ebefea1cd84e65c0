//! `keys`.

use std::{
    collections::BTreeMap,
    ffi::OsStr,
    fs::{self, File, OpenOptions, Permissions},
    io::Write,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::Path,
};

use envelog::{
    EncryptConf, LogstoreName,
    admin::{CmkVersionUsage, KeyNeed, Recoverable, ReplaceCmk, RewrapOptions, RewrapReport},
    audit::{AuditMark, AuditRecord},
    error::ConfigError,
    ids::StoreId,
    kms::Cmk,
};
use serde::Serialize;

use super::{Target, confirm};
use crate::{
    args::{KeysCommand, RewrapArgs},
    call::Call,
    exit::{Failure, Result, Status, both},
    input,
    output::{self, Cell, Progress},
    setup::{self, Setup, name},
};

/// The answer of `keys rotate-data`.
#[derive(Serialize)]
struct DataKeyRotated {
    logstore: LogstoreName,
    data_key_version: u32,
}

/// The answer of `keys shred`.
#[derive(Serialize)]
struct DataKeysShredded<'a> {
    logstore: LogstoreName,
    shredded: &'a [u32],
}

/// The answer of `keys rewrap-keyring`.
#[derive(Serialize)]
struct KeyringRewrapped {
    service_cmk: Option<Cmk>,
}

/// The answer of `keys backup`.
#[derive(Serialize)]
struct KeyringCopied {
    keyring: String,
    store_id: StoreId,
}

/// The answer of `keys audit`.
#[derive(Serialize)]
struct AuditLog {
    records: Vec<AuditRecord>,
}

/// The answer of `keys audit --out`.
#[derive(Serialize)]
struct AuditExported {
    audit: String,
    head: AuditMark,
}

/// The answer of `keys recover` without `--expect`.
#[derive(Serialize)]
struct RecoverableFound<'a> {
    found: &'a [Recoverable],
}

pub(crate) fn run(target: Target, command: KeysCommand) -> Result {
    match command {
        KeysCommand::RotateData(args) => target.call(Call::RotateData(args)),
        KeysCommand::Rewrap(args) => target.call(Call::Rewrap(args)),
        KeysCommand::Usage => target.call(Call::Usage),
        KeysCommand::RotateService => target.call(Call::RotateService),
        KeysCommand::Audit(args) => target.call(Call::audit(args)?),
        KeysCommand::Backup(args) => backup(&target.here()?, &args.out),
        KeysCommand::Recover { without_keyring: _, expect, service_cmk } => {
            recover(&target.here()?, expect.as_deref(), service_cmk.as_deref())
        }
        KeysCommand::RewrapKeyring { service_cmk, plain: _ } => {
            let service_cmk = service_cmk.as_deref().map(setup::cmk).transpose()?;
            target.call(Call::RewrapKeyring { service_cmk })
        }
        KeysCommand::ReplaceCmk { name, encrypt_conf, keep_data_key } => {
            let encrypt_conf = EncryptConf::from_json(&input::text_argument(&encrypt_conf)?)?;
            target.call(Call::ReplaceCmk { name, encrypt_conf, keep_data_key })
        }
        KeysCommand::Shred { name, versions, yes } => {
            target.call(Call::Shred { name, versions, yes })
        }
    }
}

pub(crate) fn rewrap(setup: &Setup, args: RewrapArgs) -> Result {
    match &args.name {
        Some(name) => rewrap_one(setup, name),
        None => rewrap_all(setup, args),
    }
}

pub(crate) fn rotate_data(setup: &Setup, argument: &str) -> Result {
    let name = name(argument)?;
    let store = setup.open()?;
    let version = store.keys().rotate_data_key(&name)?;
    setup.close(store)?;
    if setup.json {
        return output::json(&DataKeyRotated { logstore: name, data_key_version: version });
    }
    output::line(format_args!("{name}: new data is sealed under data-key version {version}"))
}

fn rewrap_one(setup: &Setup, argument: &str) -> Result {
    let name = name(argument)?;
    let store = setup.open()?;
    let envelopes = store.keys().rewrap(&name)?;
    setup.close(store)?;
    if setup.json {
        let mut report = RewrapReport::default();
        report.rewrapped.push((name, envelopes));
        return output::json(&report);
    }
    output::line(rewrapped_line(&name, envelopes))
}

fn rewrapped_line(name: &LogstoreName, envelopes: u32) -> String {
    format!("{name}: re-wrapped {envelopes} data key{}", if envelopes == 1 { "" } else { "s" })
}

fn rewrap_all(setup: &Setup, args: RewrapArgs) -> Result {
    let mut options = RewrapOptions::default();
    options.cmk_key_id = args.cmk;
    options.region_id = args.region;
    options.restart = args.restart;
    let store = setup.open()?;
    let mut progress: Option<Progress> = None;
    let report = store.keys().rewrap_all(&options, &mut |at| {
        let bar = progress.get_or_insert_with(|| Progress::steps(at.total as u64));
        bar.set(at.done as u64);
        bar.say(at.logstore.as_ref().map_or_else(String::new, ToString::to_string));
    })?;
    drop(progress);
    setup.close(store)?;
    let printed = print_rewrapped(setup, &report);
    // Fail with the most severe one; all of them are printed.
    let failures = report.failed.into_iter().map(|(_, error)| Failure::from(error));
    both(printed, failures.reduce(Failure::or_worse).map_or(Ok(()), Err))
}

fn print_rewrapped(setup: &Setup, report: &RewrapReport) -> Result {
    if setup.json {
        return output::json(report);
    }
    if let Some(began_us) = report.continues_us {
        let began = output::moment(began_us);
        output::line(format_args!(
            "continuing the run that began at {began}; --restart starts over"
        ))?;
    }
    for (name, envelopes) in &report.rewrapped {
        output::line(rewrapped_line(name, *envelopes))?;
    }
    for (what, error) in &report.failed {
        output::line(format_args!("{what}: not re-wrapped: {error}"))?;
    }
    output::line(format_args!(
        "Logstores re-wrapped: {}; already current: {}; failed: {}",
        report.rewrapped.len(),
        report.current.len(),
        report.failed.len()
    ))
}

pub(crate) fn usage(setup: &Setup) -> Result {
    let usage = setup.open_read_only()?.keys().usage()?;
    if setup.json {
        return output::json(&usage);
    }
    let mut table = output::table(
        &["key", "version", "segments", "stored", "wrapped by", "since", "destroy?"],
        &[2, 3],
    );
    for key in &usage.data_keys {
        let status = &key.status;
        let wrapped_by = match (&status.service_key_version, &status.cmk_version) {
            _ if status.shredded => "shredded".to_owned(),
            (Some(version), _) => format!("service key v{version}"),
            (None, Some(version)) => format!("master key, version {version}"),
            (None, None) => "master key".to_owned(),
        };
        table.add_row([
            Cell::new(format!("data key of {}", key.logstore)),
            Cell::new(status.version),
            Cell::new(output::count(status.segments)),
            Cell::new(output::size(status.bytes_stored)),
            Cell::new(wrapped_by),
            Cell::new(output::moment(key.wrapped_us)),
            destroy(key.safe_to_destroy, &key.needed_for),
        ]);
    }
    for key in &usage.master_keys {
        let versions: Vec<_> = key.versions.iter().map(cmk_version).collect();
        table.add_row([
            Cell::new(format!("master key {} in {}", key.cmk.cmk_key_id, key.cmk.region_id)),
            Cell::new(versions.join("\n")),
            Cell::new(output::count(key.segments)),
            Cell::new(output::size(key.bytes)),
            Cell::new("the KMS"),
            Cell::new("-"),
            destroy(key.safe_to_destroy, &key.needed_for),
        ]);
    }
    for key in &usage.service_keys {
        table.add_row([
            Cell::new("service key"),
            Cell::new(key.version),
            Cell::new("-"),
            Cell::new("-"),
            Cell::new("-"),
            Cell::new(output::moment(key.created_us)),
            destroy(key.safe_to_destroy, &key.needed_for),
        ]);
    }
    output::print_table(&table)?;
    if usage.service_rotation_unfinished {
        output::line(
            "The rotation of the service key is unfinished, and older versions are accepted: run `keys rotate-service` again.",
        )?;
    }
    output::line(
        "Backups, snapshots and checkpoints of the store, and readers in other processes, may need more.",
    )
}

/// Describes the data that needs a version of a master key.
fn cmk_version(version: &CmkVersionUsage) -> String {
    let name = version.version.as_deref().unwrap_or("unknown");
    let mut under = Vec::new();
    if version.envelopes > 0 {
        let plural = if version.envelopes == 1 { "" } else { "s" };
        under.push(format!("{} data key{plural}", output::count(version.envelopes)));
    }
    if version.probe {
        under.push("the probe".to_owned());
    }
    let since = version
        .oldest_wrapped_us
        .map_or_else(String::new, |us| format!(", wrapped since {}", output::moment(us)));
    format!("{name}: {}{since}", under.join(" and "))
}

fn destroy(safe: bool, needed_for: &[KeyNeed]) -> Cell {
    if safe {
        return output::verdict("safe", true);
    }
    let needs: Vec<_> = needed_for.iter().map(ToString::to_string).collect();
    output::verdict(format!("no: {}", needs.join(", ")), false)
}

pub(crate) fn rotate_service(setup: &Setup) -> Result {
    let store = setup.open()?;
    let mut progress: Option<Progress> = None;
    let done = store.keys().rotate_service_key_with(&mut |at| {
        let bar = progress.get_or_insert_with(|| Progress::steps(at.total as u64));
        bar.set(at.done as u64);
        bar.say(at.logstore.as_ref().map_or_else(String::new, ToString::to_string));
    });
    drop(progress);
    let done = done.map_err(|error| {
        let unfinished = store.keys().is_service_rotation_unfinished();
        let failure = Failure::from(error);
        match unfinished {
            true => failure
                .adding("older versions of the service key are accepted until a run of `keys rotate-service` succeeds"),
            false => failure,
        }
    })?;
    let anchor = store.admin().anchor_status();
    setup.close(store)?;
    if anchor.anchored && !anchor.configured {
        setup.notice(
            "the anchor still has a copy under the retired version: the next command needs --anchor with --without-anchor",
        );
    }
    let version = done.version;
    if setup.json {
        return output::json(&done);
    }
    if done.continued {
        output::line("this run continued an unfinished rotation")?;
    }
    output::line(format_args!(
        "written under the new version: the metadata of {} Logstores, {} envelopes of data keys, {} probes; new data keys: {}; \
         segments ended: {}",
        output::count(done.logstores),
        output::count(done.envelopes),
        output::count(done.probes),
        output::count(done.data_keys),
        output::count(done.ended)
    ))?;
    for name in &done.left_open {
        output::line(format_args!(
            "{name}: a segment from before encryption stays open until the next append, since the master key cannot be used now"
        ))?;
    }
    output::line(format_args!(
        "the service key has version {version} now, and older versions are retired: back up {} again",
        setup.keyring.display()
    ))
}

pub(crate) fn audit(setup: &Setup) -> Result {
    let records = setup.open_read_only()?.keys().audit_records()?;
    if setup.json {
        return output::json(&AuditLog { records });
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
    output::print_wide_table(&table)
}

pub(crate) fn verify_audit(setup: &Setup, against: Option<&AuditMark>) -> Result {
    let found = setup.open_read_only()?.keys().verify_audit(against)?;
    let number = found.head.number;
    let printed = if setup.json {
        output::json(&found)
    } else if found.fault.is_none() {
        output::line(format_args!("{number} audit records, all intact"))
    } else {
        Ok(())
    };
    let verdict = found.fault.map_or(Ok(()), |error| {
        let message =
            format!("the audit log is sound up to record {number}, but not after it: {error}");
        Err(Failure::of(&error, message))
    });
    both(printed, verdict)
}

pub(crate) fn export_audit(setup: &Setup, out: &Path) -> Result {
    let export = setup.open_read_only()?.keys().export_audit()?;
    write_answer(out, export.text.as_bytes())?;
    if setup.json {
        return output::json(&AuditExported { audit: output::path(out), head: export.head });
    }
    output::line(format_args!(
        "wrote {} records to {}: keep the file away from the store, for a later `keys audit --verify --against`",
        export.head.number,
        out.display()
    ))
}

/// The event's name in JSON.
fn event_word(record: &AuditRecord) -> String {
    serde_json::to_value(record.event)
        .ok()
        .and_then(|event| event.as_str().map(str::to_owned))
        .unwrap_or_else(|| format!("{:?}", record.event))
}

fn backup(setup: &Setup, out: &Path) -> Result {
    // Opening the store proves that this is the store's keyring, undamaged and not outdated.
    let store = setup.open_read_only()?;
    refuse_inside(&setup.store, out)?;
    write_new(out, &input::read_file(&setup.keyring)?)?;
    if setup.json {
        return output::json(&KeyringCopied { keyring: output::path(out), store_id: store.id() });
    }
    output::line(format_args!(
        "copied the service keyring to {}: keep it secret, and apart from the store, of which {} needs a backup too; \
         copy it again after `keys rotate-service`",
        out.display(),
        setup.store.display()
    ))?;
    match store.keys().service_cmk() {
        Some(cmk) => output::line(format_args!(
            "it can be opened only with master key {}, which needs a backup too",
            cmk.cmk_key_id
        )),
        None => Ok(()),
    }
}

/// Refuses a copy of the keyring in the store directory: every copy of the store would hold it.
fn refuse_inside(store: &Path, out: &Path) -> Result {
    let dir = out.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let inside = dir
        .canonicalize()
        .ok()
        .zip(store.canonicalize().ok())
        .is_some_and(|(dir, store)| dir.starts_with(store));
    if !inside {
        return Ok(());
    }
    Err(Failure::new(
        Status::Unavailable,
        "keyring_unsafe",
        format!(
            "{} is inside the store directory, and a keyring must be kept apart from the store; give another path",
            out.display()
        ),
    ))
}

pub(crate) fn rewrap_keyring(setup: &Setup, cmk: Option<Cmk>) -> Result {
    let store = setup.open()?;
    store.keys().rewrap_keyring(cmk.clone())?;
    setup.close(store)?;
    if setup.json {
        return output::json(&KeyringRewrapped { service_cmk: cmk });
    }
    let under = cmk
        .map_or_else(|| "no master key".to_owned(), |cmk| format!("master key {}", cmk.cmk_key_id));
    output::line(format_args!(
        "the service keyring {} is under {under} now, with the same roots: back it up again, and rotate the service key to be done \
         with old copies",
        setup.keyring.display()
    ))
}

fn recover(setup: &Setup, expect: Option<&Path>, service_cmk: Option<&OsStr>) -> Result {
    let mut builder = setup.builder();
    if let Some(argument) = service_cmk {
        builder = builder.service_cmk(setup::cmk(argument)?);
    }
    let found = builder.clone().recoverable()?;
    let Some(expect) = expect else {
        if setup.json {
            output::json(&RecoverableFound { found: &found })?;
        } else {
            found.iter().try_for_each(|one| output::line(found_line(one)))?;
        }
        return Err(Failure::refused(
            "nothing_expected",
            "nothing is recovered without --expect FILE: compare these keys and roles with your own records, and write them there",
        ));
    };
    let expected = expected_keys(expect)?;
    if !setup.json {
        // Print before assuming any role and before writing anything.
        found.iter().try_for_each(|one| output::line(found_line(one)))?;
    }
    let matches = |one: &envelog::admin::Recoverable| {
        one.cmk.is_some() && expected.get(&one.name) == one.cmk.as_ref()
    };
    if !found.iter().any(matches) {
        let names: Vec<_> = expected.keys().map(ToString::to_string).collect();
        return Err(Failure::other(format!(
            "the store names none of the expected Logstores with the expected key and role: {}; nothing was changed",
            names.join(", ")
        )));
    }
    let mut progress: Option<Progress> = None;
    let recovered = builder.recover_without_keyring_with(&expected, &mut |at| {
        progress.get_or_insert_with(|| Progress::steps(at.total as u64)).set(at.done as u64);
    });
    drop(progress);
    let (store, report) = recovered?;
    setup.close(store)?;
    if setup.json {
        output::json(&report)?;
    } else {
        for name in &report.recovered {
            output::line(format_args!("{name}: recovered"))?;
        }
        for (id, why) in &report.lost {
            output::line(format_args!("Logstore {id}: not recovered: {why}"))?;
        }
        for path in &report.unauthenticated {
            let path = path.display();
            output::line(format_args!(
                "{path}: from before encryption was on, and can no longer be authenticated"
            ))?;
        }
        output::line(format_args!(
            "created a new service keyring {}: back it up",
            setup.keyring.display()
        ))?;
    }
    if report.missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = report.missing.iter().map(ToString::to_string).collect();
    Err(Failure::other(format!("not every expected Logstore is back: {}", names.join(", "))))
}

fn found_line(found: &Recoverable) -> String {
    let Recoverable { id, name, cmk, .. } = found;
    match cmk {
        Some(Cmk { cmk_key_id, arn, region_id }) => {
            format!(
                "{name}: Logstore {id} names master key {cmk_key_id} in {region_id} with role {arn}"
            )
        }
        None => format!("{name}: Logstore {id} was under the lost service key"),
    }
}

/// Reads the master keys that a recovery may use, by the name of the Logstore.
fn expected_keys(path: &Path) -> Result<BTreeMap<LogstoreName, Cmk>> {
    let text = fs::read(path).map_err(|error| Failure::file("read", path, &error))?;
    serde_json::from_slice(&text).map_err(|error| {
        let what =
            format!("{} is no map of Logstores to their user_cmk_info: {error}", path.display());
        Failure::refused("invalid_expectation", what)
    })
}

pub(crate) fn replace_cmk(
    setup: &Setup,
    argument: &str,
    conf: EncryptConf,
    keep_data_key: bool,
) -> Result {
    let name = name(argument)?;
    let Some(cmk) = conf.user_cmk_info else {
        return Err(Failure::refused(
            "not_byok",
            "the encrypt_conf has no user_cmk_info: it must name the new key",
        ));
    };
    let store = setup.open()?;
    // Replace only the key. Refuse other changed settings: they are probably meant for another
    // Logstore or for `update`.
    let old = store.logstore(&name)?.config().encrypt_conf.ok_or(ConfigError::NotByok)?;
    if let (Some(fixed), Some(asked)) = (old.encrypt_type, conf.encrypt_type)
        && fixed != asked
    {
        return Err(ConfigError::AlgorithmFixed { fixed }.into());
    }
    if conf.enable != old.enable {
        return Err(Failure::refused(
            "enable_differs",
            format!(
                "{name} has enable {}: use `update`, not replace-cmk, to change that",
                old.enable
            ),
        ));
    }
    let how = if keep_data_key {
        ReplaceCmk::default().fresh_data_key(false)
    } else {
        ReplaceCmk::default()
    };
    store.keys().replace_cmk(&name, cmk, how)?;
    let config = store.logstore(&name)?.config();
    setup.close(store)?;
    if setup.json {
        return output::json(&config);
    }
    output::line(format_args!(
        "{name} is under the new key; anyone who held the old one and a copy of an old envelope can still read the old data"
    ))
}

pub(crate) fn shred(setup: &Setup, argument: &str, versions: &[u32], yes: bool) -> Result {
    let name = name(argument)?;
    confirm(yes, &format!("destroying data keys of {name}, and the data they sealed,"))?;
    let store = setup.open()?;
    store.keys().shred_data_keys(&name, versions)?;
    setup.close(store)?;
    if setup.json {
        return output::json(&DataKeysShredded { logstore: name, shredded: versions });
    }
    output::line(format_args!(
        "{name}: data keys destroyed in this store; backups and snapshots of it may still hold them"
    ))
}

/// Writes the file that a command makes, or sends it to the caller whose command it is.
pub(super) fn write_answer(path: &Path, bytes: &[u8]) -> Result {
    if output::send_file(bytes) { Ok(()) } else { write_new(path, bytes) }
}

/// Durably writes a new file that only its owner may read and write. The name must be free: the
/// function does not write through a link, or to a pipe or a device.
pub(crate) fn write_new(path: &Path, bytes: &[u8]) -> Result {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(path).map_err(|error| Failure::file("create", path, &error))?;
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The umask may have removed the owner's rights too.
    let written = file
        .set_permissions(Permissions::from_mode(0o600))
        .and_then(|()| file.write_all(bytes))
        .and_then(|()| file.sync_all())
        .and_then(|()| File::open(dir)?.sync_all());
    written.map_err(|error| {
        // Remove the partial file: it would make a retry with the same name fail.
        let _ = fs::remove_file(path);
        Failure::file("write", path, &error)
    })
}
