//! `backup` and `restore`.

use envelog::{
    Error, LogstoreName,
    admin::{
        BackupOptions, BackupReport, CopyProgress, RestoreOptions, RestoreReport, VerifyFault,
    },
};

use crate::{
    args::{BackupArgs, RestoreArgs},
    exit::{Failure, Result, Status, both},
    output::{self, Progress},
    setup::Setup,
};

pub(crate) fn backup(setup: &Setup, args: &BackupArgs) -> Result {
    let store = setup.open_read_only()?;
    let options = BackupOptions::default().copy(args.copy).prune(args.prune);
    let report = with_progress(|each| store.admin().backup(&args.dir, &options, each))?;
    let printed = if setup.json { output::json(&report) } else { print_backup(args, &report) };
    let advice = "the backup has the rest; restore the damaged files from an older backup, or see `envelog repair --help`";
    both(printed, verdict(&report.faults, advice))
}

pub(crate) fn restore(setup: &Setup, args: &RestoreArgs) -> Result {
    let options = RestoreOptions::default().copy(args.copy).until_us(args.until);
    let restored = with_progress(|each| setup.builder().restore(&args.dir, &options, each));
    let report = restored.map_err(|error| match &error {
        Error::StoreMissing { path } | Error::NotAStore { path } if *path == args.dir => {
            let found = format!("there is no backup at {}", path.display());
            Failure::of(&error, found + ": name the directory that `envelog backup` has written")
        }
        _ => error.into(),
    })?;
    let printed =
        if setup.json { output::json(&report) } else { print_restore(setup, args, &report) };
    both(printed, verdict(&report.faults, "the rest is restored; look for it in another backup"))
}

/// Shows the progress of a copy.
fn with_progress<T>(
    copy: impl FnOnce(&mut dyn FnMut(CopyProgress)) -> envelog::Result<T>,
) -> envelog::Result<T> {
    let mut progress: Option<(u64, Progress)> = None;
    copy(&mut |at| {
        // The total grows as Logstores are reached.
        if progress.as_ref().is_none_or(|(total, _)| *total != at.bytes_total) {
            progress = Some((at.bytes_total, Progress::bytes(Some(at.bytes_total))));
        }
        if let Some((_, progress)) = &progress {
            progress.set(at.bytes);
        }
    })
}

fn print_backup(args: &BackupArgs, report: &BackupReport) -> Result {
    print_faults(&report.faults)?;
    print_without_keys(&report.without_keys, "its new segments were")?;
    let (every, except) = match report.faults.is_empty() {
        true => ("every log that was", ""),
        false => ("the logs that were", ", except where it says FAULT"),
    };
    output::line(format_args!(
        "{}: {} has {every} durable at {}{except}: {} Logstores, {} segments, {}",
        output::moment(report.finished_us),
        args.dir.display(),
        output::moment(report.begun_us),
        output::count(report.logstores),
        output::count(report.segments),
        output::size(report.bytes),
    ))?;
    output::line(format_args!(
        "copied {} segments, {}; shared {} segments, {}, with the store",
        output::count(report.segments_copied),
        output::size(report.bytes_copied),
        output::count(report.segments_shared),
        output::size(report.bytes_shared),
    ))?;
    if args.prune {
        let (files, bytes) =
            (output::count(report.files_pruned), output::size(report.bytes_pruned));
        output::line(format_args!("removed {files} files, {bytes}, from the backup"))?;
    }
    Ok(())
}

fn print_restore(setup: &Setup, args: &RestoreArgs, report: &RestoreReport) -> Result {
    print_faults(&report.faults)?;
    print_without_keys(&report.without_keys, "it was")?;
    output::line(format_args!(
        "restored {} Logstores, {} segments, {} to {}",
        output::count(report.logstores),
        output::count(report.segments),
        output::size(report.bytes),
        setup.store.display(),
    ))?;
    if let Some(until_us) = args.until {
        output::line(format_args!(
            "{} shards end earlier than in the backup: no log that was received after {} is restored",
            output::count(report.shards_cut),
            output::moment(until_us),
        ))?;
    }
    output::line(format_args!(
        "next: envelog verify{}",
        match args.until {
            Some(_) => String::new(),
            None => format!(" --against {}", args.dir.join("checkpoint").display()),
        }
    ))
}

fn print_without_keys(names: &[LogstoreName], what: &str) -> Result {
    names.iter().try_for_each(|name| {
        output::line(format_args!(
            "note: the key of {name} cannot be used now: {what} verified without it"
        ))
    })
}

fn print_faults(faults: &[VerifyFault]) -> Result {
    faults.iter().try_for_each(|fault| output::line(format_args!("FAULT {}", fault.message)))
}

fn verdict(faults: &[VerifyFault], advice: &str) -> Result {
    let Some(first) = faults.first() else { return Ok(()) };
    let more = match faults.len() {
        1 => String::new(),
        all => format!(", and {} more", all - 1),
    };
    let message = format!("{}{more}; {advice}", first.message);
    Err(Failure::new(Status::Integrity, first.code, message))
}
