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

use std::process::ExitCode;

use clap::{Parser, error::ErrorKind};

use args::Cli;
use exit::{Failure, Status};

fn main() -> ExitCode {
    forbid_core_dumps();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refuse_arguments(&error),
    };
    let json = cli.global.json;
    match commands::run(cli) {
        Ok(()) => Status::Done.into(),
        Err(failure) => {
            failure.report(json);
            failure.status().into()
        }
    }
}

/// Keys in memory must not land in a file when the process crashes. Where the system refuses, the engine's own protection of
/// key memory remains.
fn forbid_core_dumps() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
}

/// Help and version go to standard output; anything else is a usage error, which `--json` wants as JSON.
fn refuse_arguments(error: &clap::Error) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print();
        return Status::Done.into();
    }
    if std::env::args_os().any(|arg| arg == "--json") {
        let text = error.to_string();
        let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        Failure::usage(first).report(true);
    } else {
        let _ = error.print();
    }
    Status::Usage.into()
}
