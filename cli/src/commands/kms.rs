//! `kms`: the embedded KMS.

use envelog::kms::{LocalKeyInfo, LocalKeyState, LocalKms};
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use crate::{
    args::{GrantArgs, KeyArgs, KmsCommand},
    exit::{Failure, Result},
    output,
    setup::Setup,
};

/// The answer of `kms create-key`.
#[derive(Serialize)]
struct Created {
    cmk_key_id: String,
}

/// The answer of `kms list`.
#[derive(Serialize)]
struct Listed<'a> {
    keys: Vec<Key<'a>>,
}

/// A key of `kms list`.
#[derive(Serialize)]
struct Key<'a> {
    cmk_key_id: &'a str,
    region_id: &'a str,
    state: &'static str,
    /// A date.
    deletion_day: Option<String>,
    versions: u32,
    grants: &'a [String],
    /// A time.
    created: String,
}

impl<'a> From<&'a LocalKeyInfo> for Key<'a> {
    fn from(key: &'a LocalKeyInfo) -> Self {
        Self {
            cmk_key_id: &key.key_id,
            region_id: &key.region_id,
            state: key.state.name(),
            deletion_day: key.deletion_day.map(day),
            versions: key.versions,
            grants: &key.grants,
            created: output::moment(key.created_us),
        }
    }
}

/// The answer of a command that changes a key.
#[derive(Serialize)]
struct Changed {
    cmk_key_id: String,
    done: String,
}

pub(crate) fn run(setup: &Setup, command: KmsCommand) -> Result {
    let dir = &setup.kms_dir;
    let open = || LocalKms::open(dir);
    let (key, done) = match command {
        KmsCommand::CreateKey { region, grant } => {
            let grants: Vec<&str> = grant.iter().map(String::as_str).collect();
            let key = LocalKms::create_or_open(dir)?.create_key(&region, &grants)?;
            return if setup.json {
                output::json(&Created { cmk_key_id: key })
            } else {
                output::line(key)
            };
        }
        KmsCommand::List => {
            // A damaged key must not hide the others.
            let (mut keys, mut failed) = (Vec::new(), None);
            for key in open()?.list_each()? {
                match key {
                    Ok(key) => keys.push(key),
                    Err(error) => failed = failed.or(Some(Failure::from(error))),
                }
            }
            list(setup, &keys)?;
            return failed.map_or(Ok(()), Err);
        }
        KmsCommand::Disable(KeyArgs { key }) => {
            open()?.disable(&key)?;
            (key, "disabled".to_owned())
        }
        KmsCommand::Enable(KeyArgs { key }) => {
            open()?.enable(&key)?;
            (key, "enabled".to_owned())
        }
        KmsCommand::Rotate(KeyArgs { key }) => {
            open()?.rotate(&key)?;
            (key, "rotated".to_owned())
        }
        KmsCommand::ScheduleDeletion { key: KeyArgs { key }, days } => {
            open()?.schedule_deletion(&key, days)?;
            (key, format!("to be deleted in {days} days"))
        }
        KmsCommand::CancelDeletion(KeyArgs { key }) => {
            open()?.cancel_deletion(&key)?;
            (key, "kept".to_owned())
        }
        KmsCommand::Delete { key: KeyArgs { key }, yes: _ } => {
            open()?.delete(&key)?;
            (key, "deleted".to_owned())
        }
        KmsCommand::Grant(GrantArgs { key, arn }) => {
            open()?.grant(&key, &arn)?;
            (key, format!("granted to {arn}"))
        }
        KmsCommand::Ungrant(GrantArgs { key, arn }) => {
            open()?.ungrant(&key, &arn)?;
            (key, format!("no longer granted to {arn}"))
        }
    };
    if setup.json {
        return output::json(&Changed { cmk_key_id: key, done });
    }
    output::line(format_args!("{key}: {done}"))
}

fn list(setup: &Setup, keys: &[LocalKeyInfo]) -> Result {
    if setup.json {
        return output::json(&Listed { keys: keys.iter().map(Key::from).collect() });
    }
    let mut table =
        output::table(&["key", "region", "state", "versions", "grants", "created"], &[3]);
    for key in keys {
        let state = match (key.state, key.deletion_day) {
            (LocalKeyState::PendingDeletion { .. }, Some(on)) => {
                format!("{} on {}", key.state, day(on))
            }
            (state, _) => state.to_string(),
        };
        table.add_row([
            key.key_id.clone(),
            key.region_id.clone(),
            state,
            key.versions.to_string(),
            key.grants.join("\n"),
            output::moment(key.created_us),
        ]);
    }
    output::print_table(&table)
}

/// Formats a number of days since 1970-01-01 as a date.
fn day(days: u32) -> String {
    Timestamp::UNIX_EPOCH
        .checked_add(SignedDuration::from_hours(24 * i64::from(days)))
        .map_or_else(|_| format!("day {days}"), |at| at.strftime("%Y-%m-%d").to_string())
}
