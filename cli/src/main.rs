//! `envelog`: the command line of the encrypted log storage engine.

mod args;
#[cfg_attr(not(feature = "serve"), allow(dead_code))]
mod call;
mod commands;
mod exit;
mod input;
mod interrupt;
mod lines;
mod output;
mod record;
mod remote;
mod settings;
mod setup;
mod values;

use std::{
    borrow::Cow,
    env,
    ffi::OsString,
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    panic::{AssertUnwindSafe, catch_unwind, set_hook},
    process::ExitCode,
};

use clap::error::ErrorKind;
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

use exit::{Failure, Status};
use output::Kind;
use settings::Refused;

fn main() -> ExitCode {
    forbid_core_dumps();
    interrupt::survive_file_size_limit();
    let args: Vec<OsString> = env::args_os().collect();
    let given = match settings::parse(&args) {
        Ok(given) => given,
        Err(Refused::Arguments(error)) => return refuse_arguments(&error, &args),
        Err(Refused::File(failure, json)) => {
            failure.report(json);
            return failure.status().into();
        }
    };
    let global = &given.cli.global;
    let json = global.json.unwrap_or(false);
    output::set_json(json);
    report_panics(json);
    let service = given.cli.command.is_service();
    show_events(global.verbose, global.log.clone(), service);
    match catch_unwind(AssertUnwindSafe(|| commands::run(given))) {
        Ok(Ok(())) => Status::Done.into(),
        // The panic hook has printed the message.
        Err(_) => Status::Other.into(),
        Ok(Err(failure)) => {
            failure.report(json);
            failure.status().into()
        }
    }
}

/// Logs engine events to standard error, if the options ask for it. A service always logs faults:
/// its clients are told only that there is one.
fn show_events(verbose: u8, filter: Option<Targets>, service: bool) {
    let level = match verbose {
        0 if service => LevelFilter::WARN,
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
        Failure::new(Status::Other, "bug", message).kind(envelog::ErrorKind::Bug).report(json);
    }));
}

/// Prints help and version to standard output. Any other error is a usage error, printed as JSON
/// with `--json`.
fn refuse_arguments(error: &clap::Error, args: &[OsString]) -> ExitCode {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print();
        return Status::Done.into();
    }
    let json = settings::asks_for_json(args);
    let sentence = match error.kind() {
        // For a missing subcommand, clap's message is only the help text.
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            "a command is missing; --help lists them".to_owned()
        }
        _ => settings::sentence(error),
    };
    let variable = settings::refused_variable(error, args);
    if let Some(variable) = variable {
        Failure::usage(format!("{variable}: {sentence}")).report(json);
    } else if json {
        Failure::usage(sentence).report(true);
    } else {
        // clap colours messages with escape sequences. Keep them only if no argument can have added
        // its own.
        let is_plain = |text: &OsString| {
            matches!(output::for_stderr(text.as_bytes(), Kind::Line), Cow::Borrowed(_))
        };
        let variables: Vec<OsString> = env::vars_os()
            .filter(|(name, _)| name.as_bytes().starts_with(b"ENVELOG_"))
            .map(|(_, value)| value)
            .collect();
        if args.iter().chain(&variables).all(is_plain) {
            let _ = error.print();
        } else {
            let _ = io::stderr()
                .write_all(&output::for_stderr(error.to_string().as_bytes(), Kind::Cell));
        }
    }
    Status::Usage.into()
}
