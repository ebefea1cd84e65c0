//! The commands, one module each.

mod append;
mod backup;
mod bench;
mod completions;
mod demo;
mod doctor;
mod inspect;
mod keys;
mod kms;
mod logstore;
mod man;
mod read;
mod retain;
#[cfg(feature = "serve")]
mod serve;
mod settings;
mod shards;
mod status;
mod verify;

use crate::{
    args::Command,
    exit::{Failure, Result},
    settings::Given,
    setup::Setup,
};

/// Runs the command that the arguments select.
pub(crate) fn run(given: Given) -> Result {
    let setup = Setup::new(given.cli.global.clone())?;
    match given.cli.command {
        Command::Settings => settings::run(&setup, &given),
        Command::Demo(args) => demo::run(&setup, &args),
        Command::Create(args) => logstore::create(&setup, &args),
        Command::Get(args) => logstore::get(&setup, &args),
        Command::Update(args) => logstore::update(&setup, &args),
        Command::List => logstore::list(&setup),
        Command::Delete(args) => logstore::delete(&setup, &args),
        Command::Shards(args) => shards::list(&setup, &args),
        Command::Split(args) => shards::split(&setup, &args),
        Command::Merge(args) => shards::merge(&setup, &args),
        Command::Append(args) => append::run(&setup, &args),
        Command::Read(args) => read::read(&setup, &args),
        Command::Tail(args) => read::tail(&setup, &args),
        Command::Status(args) => status::run(&setup, &args),
        Command::Doctor(args) => doctor::run(&setup, &args),
        Command::Verify(args) => verify::verify(&setup, &args),
        Command::Checkpoint(args) => verify::checkpoint(&setup, &args),
        Command::Inspect(args) => inspect::run(&setup, &args),
        Command::Repair(args) => verify::repair(&setup, &args),
        Command::Retain(args) => retain::run(&setup, &args),
        Command::Backup(args) => backup::backup(&setup, &args),
        Command::Restore(args) => backup::restore(&setup, &args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(&setup, &args),
        Command::Keys(command) => keys::run(&setup, command),
        Command::Kms(command) => kms::run(&setup, command),
        Command::Bench(args) => bench::run(&setup, &args),
        Command::Completions { shell } => completions::run(shell),
        Command::Man { dir } => man::run(&dir),
    }
}

/// Refuses an irreversible command without `--yes`.
fn confirm(yes: bool, what: &str) -> Result {
    if yes {
        Ok(())
    } else {
        Err(Failure::usage(format!("{what} cannot be undone: add --yes to confirm")))
    }
}
