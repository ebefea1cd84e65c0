//! `envelog`: the command line of the encrypted log storage engine.

mod args;
mod commands;
mod exit;
mod input;
mod interrupt;
mod lines;
mod output;
mod record;
mod setup;
mod values;

use std::{
    borrow::Cow,
    ffi::OsString,
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    panic::{AssertUnwindSafe, catch_unwind, set_hook},
    process::ExitCode,
};

use clap::{Parser, error::ErrorKind};
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use args::Cli;
use exit::{Failure, Status};
use output::Kind;

fn main() -> ExitCode {
    forbid_core_dumps();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse_arguments(&error),
    };
    let json = cli.global.json;
    report_panics(json);
    show_events(cli.global.verbose, cli.global.log.clone());
    match catch_unwind(AssertUnwindSafe(|| commands::run(cli))) {
        Ok(Ok(())) => Status::Done.into(),
        // The hook has said it already.
        Err(_) => Status::Other.into(),
        Ok(Err(failure)) => {
            failure.report(json);
            failure.status().into()
        }
    }
}

/// Writes what the engine does to standard error, where that was asked for.
fn show_events(verbose: u8, filter: Option<Targets>) {
    let level = match verbose {
        0 => LevelFilter::OFF,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let filter = filter.unwrap_or_else(|| Targets::new().with_default(level));
    let events = tracing_subscriber::fmt::layer().with_writer(|| output::Events).with_ansi(false);
    tracing_subscriber::registry().with(filter).with(events).init();
}

/// Keys in memory must not land in a file when the process crashes. Where the system refuses, the engine's own protection of
/// key memory remains.
fn forbid_core_dumps() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    // The limit does not hold where the system pipes core dumps to a program; this does.
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{DumpableBehavior, set_dumpable_behavior};
        let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    }
}

/// A bug ends in one sentence too, not in a backtrace.
fn report_panics(json: bool) {
    set_hook(Box::new(move |panic| {
        let place = panic.location().map_or_else(String::new, |at| format!(" at {at}"));
        let payload = panic.payload();
        let what = payload.downcast_ref::<&str>().copied().or(payload.downcast_ref::<String>().map(String::as_str));
        let what = what.unwrap_or("it panicked");
        let message = format!("this is a bug in envelog{place}, please report it: {what}");
        Failure::new(Status::Other, "bug", message).report(json);
    }));
}

/// Help and version go to standard output; anything else is a usage error, which `--json` wants as JSON.
fn refuse_arguments(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print();
        return Status::Done.into();
    }
    if std::env::args_os().any(|arg| arg == "--json") {
        let text = error.to_string();
        // The usage and the hint that follow are for people.
        let said: Vec<&str> = text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
        let said = said.join(" ");
        // What clap says of a command without its subcommand is the help alone.
        let said = match error.kind() {
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => "a command is missing; --help lists them",
            _ => said.trim_start_matches("error: "),
        };
        Failure::usage(said).report(true);
    } else {
        // The colours of the message are escape sequences too. It has them only where no argument can have put others into it.
        let is_plain = |text: OsString| matches!(output::for_stderr(text.as_bytes(), Kind::Line), Cow::Borrowed(_));
        let variables = std::env::vars_os().filter(|(name, _)| name.as_bytes().starts_with(b"ENVELOG_"));
        if std::env::args_os().chain(variables.map(|(_, value)| value)).all(is_plain) {
            let _ = error.print();
        } else {
            let _ = io::stderr().write_all(&output::for_stderr(error.to_string().as_bytes(), Kind::Cell));
        }
    }
    Status::Usage.into()
}
