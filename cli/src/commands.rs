//! The commands, one module each.

mod append;
pub(crate) mod backup;
mod bench;
mod completions;
mod demo;
mod doctor;
mod inspect;
pub(crate) mod keys;
mod kms;
pub(crate) mod logstore;
mod man;
mod read;
pub(crate) mod retain;
#[cfg(feature = "serve")]
mod serve;
mod settings;
mod shards;
pub(crate) mod status;
pub(crate) mod verify;

use crate::{
    args::{Command, Global},
    call::Call,
    exit::{Failure, Result},
    remote::Service,
    settings::Given,
    setup::Setup,
};

/// Where commands are run.
pub(crate) enum Target {
    Here(Setup),
    /// A service, which has the store open.
    Service(Service),
}

impl Target {
    fn new(global: &Global) -> Result<Self> {
        match &global.endpoint {
            Some(endpoint) => Service::new(endpoint, global).map(Self::Service),
            None => Setup::new(global.clone()).map(Self::Here),
        }
    }

    /// Runs a command that may be run in either place.
    pub(crate) fn call(self, call: Call) -> Result {
        match self {
            Self::Here(setup) => call.run(&setup),
            Self::Service(service) => service.run(call),
        }
    }

    /// This process, for a command that is only run here.
    pub(crate) fn here(self) -> Result<Setup> {
        match self {
            Self::Here(setup) => Ok(setup),
            Self::Service(_) => Err(Failure::usage(
                "this command does not go to a service: leave out --endpoint; docs/service.md lists those that do",
            )),
        }
    }
}

/// Runs the command that the arguments select.
pub(crate) fn run(given: Given) -> Result {
    let global = given.cli.global.clone();
    let target = || Target::new(&global);
    match given.cli.command {
        Command::Settings => settings::run(&Setup::new(global)?, &given),
        Command::Demo(args) => demo::run(&target()?.here()?, &args),
        Command::Create(args) => logstore::create(&target()?.here()?, &args),
        Command::Get(args) => target()?.call(Call::Get(args)),
        Command::Update(args) => logstore::update(&target()?.here()?, &args),
        Command::List => target()?.call(Call::List),
        Command::Delete(args) => logstore::delete(&target()?.here()?, &args),
        Command::Shards(args) => shards::list(&target()?.here()?, &args),
        Command::Split(args) => shards::split(&target()?.here()?, &args),
        Command::Merge(args) => shards::merge(&target()?.here()?, &args),
        Command::Append(args) => append::run(&target()?.here()?, &args),
        Command::Read(args) => read::read(&target()?.here()?, &args),
        Command::Tail(args) => read::tail(&target()?.here()?, &args),
        Command::Status(args) => target()?.call(Call::Status(args)),
        Command::Doctor(args) => doctor::run(&target()?.here()?, &args),
        Command::Verify(args) => target()?.call(Call::verify(args)?),
        Command::Checkpoint(args) => target()?.call(Call::Checkpoint(args)),
        Command::Inspect(args) => inspect::run(&target()?.here()?, &args),
        Command::Repair(args) => target()?.call(Call::Repair(args)),
        Command::Retain(args) => target()?.call(Call::Retain(args)),
        Command::Backup(args) => target()?.call(Call::Backup(args)),
        Command::Restore(args) => backup::restore(&target()?.here()?, &args),
        #[cfg(feature = "serve")]
        Command::Serve(args) => serve::run(&target()?.here()?, &args),
        Command::Keys(command) => keys::run(target()?, command),
        Command::Kms(command) => kms::run(&target()?.here()?, command),
        Command::Bench(args) => bench::run(&target()?.here()?, &args),
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
