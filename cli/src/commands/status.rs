//! `status`.

use std::time::Duration;

use envelog::{
    Cmk, Error, KeyState, KeyStatus, LogstoreName, LogstoreStatus, Store,
    admin::{AcceptedLoss, AnchorStatus, DataKeyStatus, ReserveStatus, RetentionStatus},
    audit::{AuditEvent, AuditRecord},
    ids::StoreId,
    metrics::KmsMetrics,
};
use jiff::SignedDuration;
use serde::Serialize;

use super::retain::SUSPENDED;
use crate::{
    args::OptionalNameArgs,
    exit::{Failure, Result},
    output::{self, Cell},
    setup::{Setup, names},
};

pub(crate) fn run(setup: &Setup, args: &OptionalNameArgs) -> Result {
    let store = setup.open_read_only()?;
    let (mut all, mut failed) = (Vec::new(), Vec::new());
    for name in names(&store, args.name.as_deref())? {
        match status(&store, &name) {
            Ok(status) => all.push(status),
            // Continue with the next Logstore: a damaged one must not hide the others.
            Err(failure) => failed.push((name, failure)),
        }
    }
    print(setup, &store, &all, &failed)?;
    let failures = failed.into_iter().map(|(name, failure)| failure.about(&name));
    failures.reduce(Failure::or_worse).map_or(Ok(()), Err)
}

fn status(store: &Store, name: &LogstoreName) -> Result<LogstoreStatus> {
    let logstore = store.logstore(name)?;
    // Ask the KMS first, so that the state is current. The status includes a refusal, so its error
    // is ignored here.
    let _ = logstore.revalidate_now();
    Ok(logstore.status()?)
}

fn print(
    setup: &Setup,
    store: &Store,
    all: &[LogstoreStatus],
    failed: &[(LogstoreName, Failure)],
) -> Result {
    if setup.json {
        let failed = failed.iter().map(|(name, error)| Unread { name, error });
        return output::json(&Answer {
            store: output::path(&setup.store),
            store_id: store.id(),
            service_key: ServiceKey {
                status: store.keys().service_key_status(),
                cmk: store.keys().service_cmk(),
            },
            logstores: all,
            anchor: store.admin().anchor_status(),
            retention: store.admin().retention_status(),
            reserve: store.admin().reserve_status(),
            audit: Audit::of(store),
            failed: failed.collect(),
            kms: store.metrics().kms,
        });
    }
    let mut table = output::table(
        &[
            "Logstore",
            "key",
            "method",
            "algorithm",
            "lease left",
            "data keys",
            "segments",
            "logs",
            "raw",
            "compressed",
            "stored",
        ],
        &[4, 6, 7, 8, 9, 10],
    );
    for status in all {
        table.add_row(row(status));
    }
    if !all.is_empty() || failed.is_empty() {
        output::print_table(&table)?;
    }
    print_notes(store, all)
}

/// The cells of a Logstore.
fn row(status: &LogstoreStatus) -> [Cell; 11] {
    let data_keys: Vec<_> = status.data_keys.iter().map(data_key).collect();
    [
        Cell::new(&status.name),
        output::verdict(
            key_text(&status.key.state),
            !matches!(status.key.state, KeyState::Outage { .. } | KeyState::Revoked { .. }),
        ),
        Cell::new(match &status.cmk {
            Some(cmk) => format!("{}\n{}", status.method, cmk.cmk_key_id),
            None => status.method.to_owned(),
        }),
        Cell::new(match (status.algorithm, status.encrypting) {
            (None, _) => "none".to_owned(),
            (Some(algorithm), true) => algorithm.to_owned(),
            (Some(algorithm), false) => format!("{algorithm}, off"),
        }),
        Cell::new(status.key.lease_left.map_or_else(|| "-".to_owned(), lease_left)),
        Cell::new(data_keys.join("\n")),
        Cell::new(output::count(status.segments)),
        Cell::new(output::count(status.logs)),
        Cell::new(output::size(status.bytes_raw)),
        Cell::new(output::size(status.bytes_compressed)),
        Cell::new(output::size(status.bytes_stored)),
    ]
}

/// A version of the data key, with the bytes under it and the key that wraps it.
fn data_key(version: &DataKeyStatus) -> String {
    let mark = match (version.shredded, version.current) {
        (true, _) => " (shredded)",
        (false, true) => " (current)",
        (false, false) => "",
    };
    let by = match (&version.service_key_version, &version.cmk_version) {
        (Some(by), _) => format!(", by service key v{by}"),
        (None, Some(by)) => format!(", by master key version {by}"),
        (None, None) => String::new(),
    };
    format!("v{}: {}{by}{mark}", version.version, output::size(version.bytes_stored))
}

/// Prints the lines below the table: the service key, the anchor, a suspended retention, an
/// incomplete reserve, the losses, and the shards that stopped writing.
fn print_notes(store: &Store, all: &[LogstoreStatus]) -> Result {
    if let Some(cmk) = store.keys().service_cmk() {
        let status = store.keys().service_key_status();
        let (cmk, state) = (&cmk.cmk_key_id, key_text(&status.state));
        let left = match status.lease_left {
            Some(left) => format!("an outage of its KMS closes the store in {}", lease_left(left)),
            None => "an outage of its KMS does not close the store".to_owned(),
        };
        output::line(format_args!("the service key is under master key {cmk} ({state}); {left}"))?;
    }
    match store.admin().anchor_status().records_behind {
        Some(0) => output::line("the anchor is up to date with the catalogue")?,
        Some(1) => output::line("the anchor is 1 record behind the catalogue")?,
        Some(records) => {
            output::line(format_args!("the anchor is {records} records behind the catalogue"))?;
        }
        None => {}
    }
    if store.admin().retention_status().suspended {
        output::line(SUSPENDED)?;
    }
    let reserve = store.admin().reserve_status();
    if reserve.is_short() {
        output::line(format_args!(
            "the reserve for a full disk is incomplete ({} of {}, {} of {} inodes): a command that writes the store completes it once the disk has room",
            output::size(reserve.bytes),
            output::size(reserve.wanted_bytes),
            reserve.inodes,
            reserve.wanted_inodes,
        ))?;
    }
    for status in all {
        print_losses(status)?;
        if let Some(cause) = &status.latched {
            output::line(format_args!("{}: a shard has stopped writing: {cause}", status.name))?;
        }
    }
    Audit::of(store).print()
}

/// Prints what a Logstore has lost.
fn print_losses(status: &LogstoreStatus) -> Result {
    let name = &status.name;
    for AcceptedLoss { shard, first_ordinal, last_ordinal, from_seq, end_seq, .. } in &status.losses
    {
        output::line(format_args!(
            "{name}: shard {shard} has lost groups from number {from_seq} to before {end_seq} (segments {first_ordinal} to \
             {last_ordinal}); an operator has accepted that"
        ))?;
    }
    match status.unreadable_segments {
        0 => Ok(()),
        1 => output::line(format_args!("{name}: 1 segment cannot be read: see `envelog verify`")),
        all => output::line(format_args!(
            "{name}: {} segments cannot be read: see `envelog verify`",
            output::count(all)
        )),
    }
}

/// The answer of `status`.
#[derive(Serialize)]
struct Answer<'a> {
    store: String,
    store_id: StoreId,
    service_key: ServiceKey,
    logstores: &'a [LogstoreStatus],
    anchor: AnchorStatus,
    retention: RetentionStatus,
    reserve: ReserveStatus,
    audit: Audit,
    failed: Vec<Unread<'a>>,
    /// The calls, including those for the states.
    kms: KmsMetrics,
}

/// What the key audit log says about accepted losses.
#[derive(Serialize)]
struct Audit {
    /// The records about losses that no Logstore has a record of.
    accepted: Vec<AuditRecord>,
    /// Why the log could not be read.
    fault: Option<Error>,
}

impl Audit {
    fn of(store: &Store) -> Self {
        match store.keys().accepted_losses() {
            Ok(accepted) => Self { accepted, fault: None },
            Err(error) => Self { accepted: Vec::new(), fault: Some(error) },
        }
    }

    fn print(&self) -> Result {
        for AuditRecord { number, event, logstore, detail, time_us, .. } in &self.accepted {
            let of = logstore.as_ref().map_or_else(String::new, |name| format!(" of {name}"));
            let what = match event {
                AuditEvent::GivenUp => "the loss of the metadata",
                AuditEvent::MetadataAdopted => "other metadata",
                _ => "the loss of the key audit log before this record",
            };
            output::line(format_args!(
                "an operator has accepted {what}{of} at {} (audit record {number}): {detail}",
                output::moment(*time_us)
            ))?;
        }
        match &self.fault {
            Some(fault) => output::line(format_args!("the key audit log cannot be read: {fault}")),
            None => Ok(()),
        }
    }
}

/// A Logstore that could not be read.
#[derive(Serialize)]
pub(super) struct Unread<'a> {
    pub(super) name: &'a LogstoreName,
    pub(super) error: &'a Failure,
}

/// The state of the service key, with the master key that its keyring is under.
#[derive(Serialize)]
struct ServiceKey {
    #[serde(flatten)]
    status: KeyStatus,
    cmk: Option<Cmk>,
}

fn key_text(state: &KeyState) -> String {
    match state.reason() {
        None => state.name().to_owned(),
        Some(why) => format!("{}: {why}", state.name()),
    }
}

fn lease_left(left: Duration) -> String {
    format!("{:#}", SignedDuration::from_secs(left.as_secs().try_into().unwrap_or(i64::MAX)))
}
