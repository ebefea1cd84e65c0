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
        // The panic hook has printed the message.
        Err(_) => Status::Other.into(),
        Ok(Err(failure)) => {
            failure.report(json);
            failure.status().into()
        }
    }
}

/// Logs engine events to standard error, if the options ask for it.
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

/// Disables core dumps, which would write keys from memory to a file. If the system refuses, the
/// engine's own protection of key memory still applies.
fn forbid_core_dumps() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    // Needed where the system pipes core dumps to a program: the limit above does not apply there.
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{DumpableBehavior, set_dumpable_behavior};
        let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    }
}

/// Prints a panic as one sentence, without a backtrace.
fn report_panics(json: bool) {
    set_hook(Box::new(move |panic| {
        let place = panic.location().map_or_else(String::new, |at| format!(" at {at}"));
        let payload = panic.payload();
        let what = payload
            .downcast_ref::<&str>()
            .copied()
            .or(payload.downcast_ref::<String>().map(String::as_str));
        let what = what.unwrap_or("it panicked");
        let message = format!("this is a bug in envelog{place}, please report it: {what}");
        Failure::new(Status::Other, "bug", message).report(json);
    }));
}

/// Prints help and version to standard output. Any other error is a usage error, printed as JSON
/// with `--json`.
fn refuse_arguments(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print();
        return Status::Done.into();
    }
    if std::env::args_os().any(|arg| arg == "--json") {
        let text = error.to_string();
        // JSON gets only the first paragraph: the usage and the hint after it are for people.
        let said: Vec<&str> =
            text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
        let said = said.join(" ");
        // For a missing subcommand, clap's message is only the help text.
        let said = match error.kind() {
            ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                "a command is missing; --help lists them"
            }
            _ => said.trim_start_matches("error: "),
        };
        Failure::usage(said).report(true);
    } else {
        // clap colours messages with escape sequences. Keep them only if no argument can have added
        // its own.
        let is_plain = |text: OsString| {
            matches!(output::for_stderr(text.as_bytes(), Kind::Line), Cow::Borrowed(_))
        };
        let variables =
            std::env::vars_os().filter(|(name, _)| name.as_bytes().starts_with(b"ENVELOG_"));
        if std::env::args_os().chain(variables.map(|(_, value)| value)).all(is_plain) {
            let _ = error.print();
        } else {
            let _ = io::stderr()
                .write_all(&output::for_stderr(error.to_string().as_bytes(), Kind::Cell));
        }
    }
    Status::Usage.into()
}
