//! `doctor`: looks for everything that needs an action.

use std::{
    collections::BTreeSet,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use envelog::{
    Cmk, Error, ErrorKind, KeyState, KeyStatus, Logstore, LogstoreName, ProbeMode, Store,
    admin::BackupRecord, crypto::memory_lock_status,
};
use rustix::fs::{Access, access, statvfs};
use serde::Serialize;

use crate::{
    args::DoctorArgs,
    exit::{Failure, Result, Status, both},
    output::{self, Cell},
    setup::{Setup, names},
    values::show_duration,
};

/// Fewer free inodes than this need an action.
const INODES_MIN: u64 = 1000;
/// A wall clock that is further behind the newest time that the store trusts needs an action.
const CLOCK_BEHIND_MAX: Duration = Duration::from_secs(3600);
/// A wall clock that is further ahead of that time suspends retention by age.
const CLOCK_AHEAD_MAX: Duration = Duration::from_secs(24 * 3600);
/// The time of a backup that is further ahead of the wall clock needs an action.
const BACKUP_AHEAD_MAX: Duration = Duration::from_secs(3600);
/// No clock of a machine that runs this program is right before this time: 2025-01-01.
const CLOCK_MIN_US: u64 = 1_735_689_600_000_000;

/// The answer of `doctor`.
#[derive(Serialize)]
struct Answer {
    /// Whether no finding needs an action.
    ok: bool,
    findings: Vec<Finding>,
}

/// What was found about one subject.
#[derive(Serialize)]
struct Finding {
    subject: &'static str,
    /// The Logstore, if the finding concerns one.
    logstore: Option<LogstoreName>,
    found: String,
    /// What to do. `None` if nothing has to be done.
    action: Option<String>,
}

impl Finding {
    fn fine(subject: &'static str, found: impl Into<String>) -> Self {
        Self { subject, logstore: None, found: found.into(), action: None }
    }

    fn acts(subject: &'static str, found: impl Into<String>, action: impl Into<String>) -> Self {
        Self { action: Some(action.into()), ..Self::fine(subject, found) }
    }

    /// A finding about an error of the engine.
    fn error(subject: &'static str, error: &Error) -> Self {
        Self::acts(subject, error.to_string(), action_of(error))
    }

    fn of(self, name: &LogstoreName) -> Self {
        Self { logstore: Some(name.clone()), ..self }
    }
}

/// What the kind of an error asks an operator to do.
fn action_of(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::Integrity => {
            "run `envelog verify`; restore a backup, or accept the loss with `envelog repair`"
        }
        ErrorKind::Revoked => "the owner of the key has to allow it again",
        ErrorKind::KmsUnreachable => {
            "check the KMS, the network, and the credentials of this service"
        }
        ErrorKind::NoRoom => "make room on the disk",
        ErrorKind::Io => "check the disk and the permissions",
        ErrorKind::NotFound => "name the store with --store, or create it with `envelog create`",
        ErrorKind::Bug => "report it to the developers of envelog",
        _ => "correct what the message names",
    }
}

pub(crate) fn run(setup: &Setup, args: &DoctorArgs) -> Result {
    let opened = setup.builder().open_read_only();
    let trusted_us = |store: &Store| store.admin().retention_status().trusted_us;
    let trusted_us = opened.as_ref().ok().and_then(trusted_us);
    let mut findings = vec![settings(setup), clock(now_us(), trusted_us), memory()];
    match opened {
        Ok(store) => {
            findings.push(Finding::fine("store", setup.store.display().to_string()));
            findings.extend(of_store(setup, &store, args));
        }
        // The finding about the settings has it.
        Err(Error::InvalidArgument(_)) => {}
        // The error may be about the keyring, the anchor, or the KMS of the service key.
        Err(error) => findings.push(Finding::error("store", &error)),
    }
    findings.extend(directories(setup));
    let actions = findings.iter().filter(|finding| finding.action.is_some()).count();
    let answer = Answer { ok: actions == 0, findings };
    let printed = if setup.json { output::json(&answer) } else { print(&answer.findings) };
    let verdict = match actions {
        0 => Ok(()),
        1 => Err("1 finding needs an action".to_owned()),
        _ => Err(format!("{actions} findings need an action")),
    };
    both(printed, verdict.map_err(|said| Failure::new(Status::Other, "action_needed", said)))
}

/// The findings about an open store.
fn of_store(setup: &Setup, store: &Store, args: &DoctorArgs) -> Vec<Finding> {
    let mut findings = vec![
        keyring(setup, store),
        anchor(store),
        audit(store),
        backup(store, args),
        reserve(store),
    ];
    if store.admin().retention_status().suspended {
        findings.push(Finding::acts(
            "retention",
            "retention by age is suspended: the clock is more than 24 h ahead of the last trusted time",
            "correct the clock; if it is right, run `envelog retain --trust-clock`",
        ));
    }
    if store.keys().is_service_rotation_unfinished() {
        findings.push(Finding::acts(
            "service key",
            "a rotation is unfinished, and older versions are accepted",
            "run `envelog keys rotate-service` again",
        ));
    }
    match names(store, None) {
        Ok(names) => findings.extend(logstores(store, &names)),
        Err(failure) => {
            findings.push(Finding::acts("Logstores", failure.to_string(), "run `envelog verify`"))
        }
    }
    findings
}

fn settings(setup: &Setup) -> Finding {
    match setup.options.check() {
        Ok(()) => Finding::fine("settings", "valid"),
        Err(error) => Finding::acts("settings", error.to_string(), "correct the setting"),
    }
}

/// The wall clock, in microseconds since the Unix epoch.
fn now_us() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// The wall clock, compared with the newest time that the store trusts, if there is one.
fn clock(now_us: u64, trusted_us: Option<u64>) -> Finding {
    let now = output::moment(now_us);
    let acts = |far_us: u64, way: &str, than: &str, action: &str| {
        let far = show_duration(Duration::from_secs(far_us / 1_000_000));
        Finding::acts("clock", format!("{now}, {far} {way} {than}"), action)
    };
    let Some(trusted_us) = trusted_us else {
        return match CLOCK_MIN_US.saturating_sub(now_us) {
            0 => Finding::fine("clock", now),
            behind_us => acts(behind_us, "behind", "any right clock", "correct the clock (NTP)"),
        };
    };
    let newest = format!("the newest time that the store trusts, {}", output::moment(trusted_us));
    let (behind_us, ahead_us) =
        (trusted_us.saturating_sub(now_us), now_us.saturating_sub(trusted_us));
    if u128::from(behind_us) > CLOCK_BEHIND_MAX.as_micros() {
        acts(behind_us, "behind", &newest, "correct the clock (NTP)")
    } else if u128::from(ahead_us) > CLOCK_AHEAD_MAX.as_micros() {
        let action = "correct the clock (NTP); if it is right, retention by age waits for `clock-settle`, or run `envelog retain --trust-clock`";
        acts(ahead_us, "ahead of", &newest, action)
    } else {
        Finding::fine("clock", now)
    }
}

/// Whether the memory for keys is kept out of the swap.
fn memory() -> Finding {
    // Keys are drawn and wiped again, so that there is memory to look at.
    let _probe = envelog::crypto::SecretKey::from_bytes(&mut [0; 32]);
    match memory_lock_status().unlocked_bytes {
        0 => Finding::fine("memory", "keys are locked in memory"),
        _ => Finding::acts(
            "memory",
            "the system does not let this process lock the memory of keys, which may reach the swap",
            "raise the limit of locked memory (`ulimit -l`, LimitMEMLOCK= of systemd)",
        ),
    }
}

fn keyring(setup: &Setup, store: &Store) -> Finding {
    let path = setup.keyring.display();
    let Some(cmk) = store.keys().service_cmk() else {
        return Finding::fine("keyring", format!("{path}, under no master key"));
    };
    let status = store.keys().service_key_status();
    let under = format!("{path}, under master key {}", cmk.cmk_key_id);
    refusal(&status, "keyring", &under).unwrap_or_else(|| Finding::fine("keyring", under))
}

/// The finding about a key that is refused or whose KMS does not answer.
fn refusal(status: &KeyStatus, subject: &'static str, key: &str) -> Option<Finding> {
    let why = status.state.reason().unwrap_or_default();
    let action = match &status.state {
        KeyState::Revoked { .. } => "the owner of the key has to allow it again in the KMS",
        KeyState::Outage { .. } => {
            "check the KMS, the network, and the credentials of this service"
        }
        _ => return None,
    };
    Some(Finding::acts(subject, format!("{key}: {}: {why}", status.state.name()), action))
}

fn anchor(store: &Store) -> Finding {
    let status = store.admin().anchor_status();
    match (status.anchored, status.configured, status.records_behind) {
        (false, ..) => {
            Finding::fine("anchor", "none: a rollback of the whole store is not detected")
        }
        (true, false, _) => Finding::acts(
            "anchor",
            "the store has an anchor, and none is given: a rollback is not detected",
            "name it with --anchor",
        ),
        (true, true, Some(0) | None) => Finding::fine("anchor", "up to date"),
        (true, true, Some(records)) => Finding::fine(
            "anchor",
            format!(
                "{records} records behind the catalogue; the writer brings it up to date within seconds, and at its close"
            ),
        ),
    }
}

fn audit(store: &Store) -> Finding {
    match store.keys().verify_audit(None) {
        Ok(found) => match found.fault {
            None => Finding::fine("key audit log", format!("{} records, sound", found.head.number)),
            Some(fault) => Finding::error("key audit log", &fault),
        },
        Err(error) => Finding::error("key audit log", &error),
    }
}

/// The age of the last backup, by the record in its directory. The store has none.
fn backup(store: &Store, args: &DoctorArgs) -> Finding {
    let Some(dir) = &args.backup else {
        return Finding::fine("backup", "name its directory with --backup to look at its age");
    };
    let again = format!("run `envelog backup {}`", dir.display());
    let record = match BackupRecord::read(dir) {
        Ok(record) if record.store == store.id() => record,
        Ok(_) => {
            let found = format!("{} has a backup of another store", dir.display());
            return Finding::acts("backup", found, "name the directory of this store's backup");
        }
        Err(error) => return Finding::acts("backup", error.to_string(), again),
    };
    let Some(finished_us) = record.finished_us else {
        let begun = output::moment(record.begun_us);
        let found = format!("the run that began at {begun} has not finished");
        return Finding::acts("backup", found, format!("{again} again, unless it is under way"));
    };
    let made = format!("of {}", output::moment(finished_us));
    let now_us = now_us();
    let newest_us = record.begun_us.max(finished_us);
    if u128::from(newest_us.saturating_sub(now_us)) > BACKUP_AHEAD_MAX.as_micros() {
        let found = format!("of {}, which is in the future", output::moment(newest_us));
        let action = format!("correct the clock; if it is right, {again} again");
        return Finding::acts("backup", found, action);
    }
    match now_us.saturating_sub(record.begun_us) > args.backup_age.as_micros() as u64 {
        true => Finding::acts(
            "backup",
            format!("{made}, older than {}", show_duration(args.backup_age)),
            again,
        ),
        false => Finding::fine("backup", made),
    }
}

/// Whether the store has the room that it keeps for a full disk.
fn reserve(store: &Store) -> Finding {
    match store.admin().reserve_status() {
        status if status.is_short() => Finding::acts(
            "reserve",
            "the store does not have all of the room that it keeps for a full disk",
            "make room on the disk",
        ),
        _ => Finding::fine("reserve", "the store keeps room for a full disk"),
    }
}

/// The findings about the Logstores, and about the master keys that they are under.
fn logstores(store: &Store, names: &[LogstoreName]) -> Vec<Finding> {
    let (mut findings, mut asked, mut sound) = (Vec::new(), BTreeSet::new(), 0);
    for name in names {
        match store.logstore(name) {
            Ok(logstore) => {
                let found = of_logstore(&logstore, &mut asked);
                sound += u64::from(found.is_empty());
                findings.extend(found.into_iter().map(|finding| finding.of(name)));
            }
            Err(error) => findings.push(Finding::error("Logstore", &error).of(name)),
        }
    }
    let found =
        format!("{} of {} need nothing", output::count(sound), output::count(names.len() as u64));
    findings.push(Finding::fine("Logstores", found));
    findings
}

/// The findings about one Logstore. Each master key that Logstores share is asked once.
fn of_logstore(logstore: &Logstore, asked: &mut BTreeSet<Cmk>) -> Vec<Finding> {
    let config = logstore.config();
    let cmk = config.encrypt_conf.and_then(|conf| conf.user_cmk_info);
    let mut findings = Vec::new();
    if let Some(cmk) = cmk
        && (asked.insert(cmk.clone()) || config.probe == ProbeMode::Own)
    {
        // A refusal shows in the status.
        let _ = logstore.revalidate_now();
        let key = format!("master key {} in {}", cmk.cmk_key_id, cmk.region_id);
        findings.extend(refusal(&logstore.key_status(), "master key", &key));
    }
    match logstore.status() {
        Ok(status) if status.unreadable_segments > 0 => {
            let found = format!("{} segments cannot be read", status.unreadable_segments);
            let action =
                "run `envelog verify`; restore a backup, or accept the loss with `envelog repair`";
            findings.push(Finding::acts("Logstore", found, action));
        }
        Ok(_) => {}
        Err(error) => findings.push(Finding::error("Logstore", &error)),
    }
    findings
}

/// The findings about the directories: permissions and free space.
fn directories(setup: &Setup) -> Vec<Finding> {
    let beside = |path: &Path| path.parent().map(Path::to_owned);
    let keyring = beside(&setup.keyring).filter(|dir| !dir.as_os_str().is_empty());
    let mut findings = Vec::new();
    let (mut roots, mut devices) = (vec![setup.store.clone()], BTreeSet::new());
    roots.extend(keyring);
    roots.extend(setup.anchor().map(Path::to_owned));
    for root in roots {
        // What is missing was reported as an error of the store.
        let Ok(metadata) = root.metadata() else { continue };
        if root == setup.store {
            findings.push(permissions(setup, &root, metadata.mode()));
            findings.extend(["LOCK", "EPOCH"].into_iter().filter_map(|name| no_file(&root, name)));
        }
        if devices.insert(metadata.dev()) {
            findings.push(space(setup, &root));
        }
    }
    findings
}

/// The finding about a file that a writer needs, if another object has its name.
fn no_file(store: &Path, name: &str) -> Option<Finding> {
    let path = store.join(name);
    let metadata = path.symlink_metadata().ok().filter(|metadata| !metadata.is_file())?;
    let what = if metadata.is_dir() { "a directory" } else { "not a regular file" };
    let found = format!("{} is {what}: nothing can be written", path.display());
    Some(Finding::acts("store", found, "move it away; the next command that writes makes the file"))
}

fn permissions(setup: &Setup, dir: &Path, mode: u32) -> Finding {
    let subject = "permissions";
    let mode = mode & 0o7777;
    let shown = format!("{} has mode {mode:04o}", dir.display());
    let allowed = if setup.options.group_read { 0o750 } else { 0o700 };
    if mode & 0o777 & !allowed != 0 {
        let action = format!("run `chmod {allowed:o} {}`", dir.display());
        return Finding::acts(subject, format!("{shown}: other users have a right to it"), action);
    }
    match access(dir, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => Finding::fine(subject, shown),
        Err(error) => Finding::acts(
            subject,
            format!("{shown}, and this user cannot write there: {error}"),
            "run envelog as the user that the directory belongs to",
        ),
    }
}

/// The free space of the file system of a directory.
fn space(setup: &Setup, dir: &PathBuf) -> Finding {
    let subject = "disk space";
    let free = match statvfs(dir) {
        Ok(free) => free,
        Err(error) => {
            let found = format!("{}: {error}", dir.display());
            return Finding::acts(subject, found, "check the disk");
        }
    };
    let bytes = free.f_bavail.saturating_mul(free.f_frsize);
    let all = free.f_blocks.saturating_mul(free.f_frsize);
    let found = format!("{}: {} of {} free", dir.display(), output::size(bytes), output::size(all));
    // Two segments, and a hundredth of the disk.
    let needed = setup.options.segment_bytes.saturating_mul(2).max(all / 100);
    let action = "make room: delete other files, or have `envelog retain` drop old logs";
    if bytes < needed {
        return Finding::acts(
            subject,
            format!("{found}, less than {}", output::size(needed)),
            action,
        );
    }
    // A file system without a table of inodes reports zero of them.
    if free.f_files > 0 && free.f_favail < INODES_MIN {
        return Finding::acts(subject, format!("{found}, {} inodes free", free.f_favail), action);
    }
    Finding::fine(subject, found)
}

fn print(findings: &[Finding]) -> Result {
    let mut table = output::table(&["subject", "state", "found", "what to do"], &[]);
    for Finding { subject, logstore, found, action } in findings {
        let subject = match logstore {
            Some(name) => format!("{subject}\n{name}"),
            None => (*subject).to_owned(),
        };
        let is_fine = action.is_none();
        table.add_row([
            Cell::new(subject),
            output::verdict(if is_fine { "fine" } else { "ACT" }, is_fine),
            Cell::new(found),
            Cell::new(action.as_deref().unwrap_or("-")),
        ]);
    }
    output::print_table(&table)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_retention_does_not_trust_needs_an_action() {
        const HOUR_US: u64 = 3_600_000_000;
        let trusted_us = CLOCK_MIN_US + 1000 * HOUR_US;
        let found = |now_us, trusted_us| clock(now_us, trusted_us);
        for fine in [trusted_us - HOUR_US, trusted_us, trusted_us + 24 * HOUR_US] {
            assert!(found(fine, Some(trusted_us)).action.is_none());
        }
        let behind = found(trusted_us - 2 * HOUR_US, Some(trusted_us));
        assert!(behind.action.is_some() && behind.found.contains("2h behind"), "{}", behind.found);
        let ahead = found(trusted_us + 25 * HOUR_US, Some(trusted_us));
        assert!(ahead.found.contains("ahead of the newest time"), "{}", ahead.found);
        assert!(ahead.action.is_some_and(|action| action.contains("--trust-clock")));
        assert!(found(CLOCK_MIN_US, None).action.is_none());
        assert!(found(CLOCK_MIN_US - HOUR_US, None).found.contains("any right clock"));
    }
}
