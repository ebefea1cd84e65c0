//! `verify`, `checkpoint`, `repair`.

use envelog::{
    ErrorKind, LogstoreName,
    admin::{
        AcceptedLoss, AdoptedMetadata, Checkpoint, MetadataRepair, RepairOptions, RepairReport,
        StoreRepairReport, VerifyOptions, VerifyReport,
    },
};
use serde::Serialize;

use super::{confirm, logstore, status::Unread};
use crate::{
    args::{OutArgs, RepairArgs},
    commands::keys::write_answer,
    exit::{Failure, Result, Status, both, status_of},
    output::{self, Progress},
    setup::{Setup, name},
};

/// The answer of `checkpoint`.
#[derive(Serialize)]
struct Written<'a> {
    checkpoint: String,
    failed: Vec<Unread<'a>>,
}

pub(crate) fn verify(
    setup: &Setup,
    argument: Option<&str>,
    keyless: bool,
    against: Option<Checkpoint>,
) -> Result {
    let logstore = argument.map(name).transpose()?;
    let store = setup.open_read_only()?;
    let options = VerifyOptions::default().logstore(logstore).keyless(keyless).against(against);
    let mut progress: Option<Progress> = None;
    let report = store.admin().verify(&options, &mut |at| {
        progress.get_or_insert_with(|| Progress::bytes(Some(at.bytes_total))).set(at.bytes);
    })?;
    drop(progress);

    let printed = if setup.json { output::json(&report) } else { print(&report) };
    both(printed, verdict(&report))
}

fn print(report: &VerifyReport) -> Result {
    report
        .faults
        .iter()
        .try_for_each(|fault| output::line(format_args!("FAULT {}", fault.message)))?;
    report
        .refused
        .iter()
        .try_for_each(|(_, error)| output::line(format_args!("REFUSED {error}")))?;
    report.notes.iter().try_for_each(|note| output::line(format_args!("note: {note}")))?;
    output::line(format_args!(
        "checked {} segments, {} blocks, {} groups, {}{}; faults: {}",
        output::count(report.segments),
        output::count(report.blocks),
        output::count(report.groups),
        output::size(report.bytes),
        if report.keyless { " (without keys: CRCs and order only)" } else { "" },
        report.faults.len()
    ))
}

/// Fails with the most severe finding; all findings are printed.
fn verdict(report: &VerifyReport) -> Result {
    let found = if report.faults.is_empty() { Status::Done } else { Status::Integrity };
    let status =
        report.refused.iter().map(|(_, error)| status_of(error)).fold(found, Status::worse);
    let refusal = report.refused.iter().find(|(_, error)| status_of(error) == status);
    match (status, report.faults.first(), refusal) {
        (Status::Done, ..) => Ok(()),
        (Status::Integrity, Some(first), _) => {
            let more = others(report.faults.len(), "fault");
            let advice =
                "restore it from a backup, or accept the loss: see `envelog repair --help`";
            Err(Failure::new(status, first.code, format!("{}{more}; {advice}", first.message)))
        }
        (_, _, Some((_, error))) => {
            let more = others(report.refused.len(), "Logstore");
            Err(Failure::of(error, format!("{error}{more}; without keys, --keyless verifies")))
        }
        (status, ..) => Err(Failure::new(status, "failed", "the verification failed")),
    }
}

/// A suffix that counts the findings besides the named one.
fn others(all: usize, what: &str) -> String {
    match all {
        0 | 1 => String::new(),
        2 => format!(", and 1 more {what}"),
        _ => format!(", and {} more {what}s", all - 1),
    }
}

pub(crate) fn checkpoint(setup: &Setup, args: &OutArgs) -> Result {
    let store = setup.open()?;
    let checkpoint = store.admin().checkpoint()?;
    setup.close(store)?;
    write_answer(&args.out, checkpoint.to_bytes())?;
    let failed: Vec<_> = checkpoint
        .failed()
        .iter()
        .map(|(name, error)| (name, Failure::from(error.clone()).about(name)))
        .collect();
    if setup.json {
        output::json(&Written {
            checkpoint: output::path(&args.out),
            failed: failed.iter().map(|(name, error)| Unread { name, error }).collect(),
        })?;
    } else {
        output::line(format_args!("wrote {}: keep it away from the store", args.out.display()))?;
    }
    // The checkpoint has the state of these Logstores by the catalogue, and all others.
    let failures = failed.into_iter().map(|(_, failure)| failure);
    failures.reduce(Failure::or_worse).map_or(Ok(()), Err)
}

pub(crate) fn repair(setup: &Setup, args: &RepairArgs) -> Result {
    let options = RepairOptions::default().accept_tampered(args.accept_tampered);
    match (args.name.as_deref().map(name).transpose()?, args.shard) {
        (Some(name), _) if args.give_up => give_up(setup, &name, args.yes),
        (Some(name), Some(shard)) => repair_shard(setup, &name, shard, &options, args.yes),
        (Some(_), None) => Err(Failure::usage("name the shard of the Logstore (--shard N)")),
        (None, _) => repair_all(setup, &options, args.yes),
    }
}

fn repair_shard(
    setup: &Setup,
    name: &LogstoreName,
    shard: u32,
    options: &RepairOptions,
    yes: bool,
) -> Result {
    confirm(yes, &format!("accepting the losses of shard {shard} of {name}"))?;
    let store = setup.open()?;
    let repaired = store.admin().repair(name, shard, options);
    let report = repaired.map_err(|error| match error.kind() {
        ErrorKind::Integrity if !options.accept_tampered => Failure::from(error).adding(
            "no loss is accepted: find the cause first; --accept-tampered gives such files up too",
        ),
        _ => error.into(),
    })?;
    setup.close(store)?;
    if setup.json {
        return output::json(&report);
    }
    if report.segment.is_none() && report.losses.is_empty() && report.metadata.is_none() {
        return output::line(format_args!("shard {shard} of {name} is sound: nothing was changed"));
    }
    print_repair(name, &report)
}

fn repair_all(setup: &Setup, options: &RepairOptions, yes: bool) -> Result {
    confirm(yes, "accepting all losses of the store")?;
    let store = setup.open()?;
    let report = store.admin().repair_all(options)?;
    setup.close(store)?;
    let printed = if setup.json { output::json(&report) } else { print_repairs(&report) };
    let failed = match report.failed.first() {
        Some(failed) => Err(failed.error.clone().into()),
        None => Ok(()),
    };
    both(printed, failed)
}

fn print_repairs(report: &StoreRepairReport) -> Result {
    if let Some(fault) = &report.audit {
        output::line(format_args!("began a new key audit log: {}", fault.message))?;
    }
    for probe in &report.probes {
        output::line(format_args!("removed the damaged probe {}", probe.display()))?;
    }
    for MetadataRepair { logstore, adopted, .. } in &report.metadata {
        print_adopted(logstore, adopted)?;
    }
    for repair in &report.shards {
        print_repair(&repair.logstore, &repair.report)?;
    }
    for failed in &report.failed {
        output::line(format_args!("NOT REPAIRED {}: {}", failed.logstore, failed.error))?;
    }
    if report.audit.is_none()
        && report.probes.is_empty()
        && report.metadata.is_empty()
        && report.shards.is_empty()
        && report.failed.is_empty()
    {
        output::line(format_args!("the store is sound: nothing was changed"))?;
    }
    Ok(())
}

fn print_adopted(name: &LogstoreName, adopted: &AdoptedMetadata) -> Result {
    let AdoptedMetadata { lost_generation, adopted_generation, .. } = adopted;
    output::line(format_args!(
        "metadata of generation {lost_generation} of {name} is lost; that of generation {adopted_generation} is in force now: \
         look at its configuration and keys"
    ))
}

fn print_repair(name: &LogstoreName, report: &RepairReport) -> Result {
    let shard = report.shard;
    if let Some(adopted) = &report.metadata {
        print_adopted(name, adopted)?;
    }
    for loss in &report.losses {
        let AcceptedLoss { first_ordinal, last_ordinal, from_seq, end_seq, .. } = loss;
        output::line(format_args!(
            "accepted the loss of segments {first_ordinal} to {last_ordinal} of shard {shard} of {name}: groups from number \
             {from_seq} to before {end_seq}"
        ))?;
    }
    let Some(segment) = &report.segment else { return Ok(()) };
    output::line(format_args!(
        "repaired {}: {} groups after the damage kept, {} discarded",
        segment.display(),
        output::count(report.groups_salvaged),
        output::size(report.bytes_lost)
    ))
}

fn give_up(setup: &Setup, name: &LogstoreName, yes: bool) -> Result {
    confirm(yes, &format!("giving up {name}"))?;
    let store = setup.open()?;
    let report = store.admin().give_up(name)?;
    setup.close(store)?;
    logstore::print_deleted(setup, name, &report)
}
