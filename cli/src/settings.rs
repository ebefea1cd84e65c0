//! The settings: the options that every command accepts.
//!
//! Each setting is defined in one place: here, in [`STORE`], if it is a setting of the engine's
//! store, or else in [`Global`](crate::args::Global). Its environment variable and its name in a
//! settings file follow from the name of the option, and the table in `docs/operations.md` is
//! generated from the definition. An option of the command line precedes the variable, which
//! precedes the file, which precedes the default.

mod file;

use std::{env, ffi::OsString, path::PathBuf, time::Duration};

use clap::{
    Arg, ArgAction, ArgMatches, Command, CommandFactory, FromArgMatches,
    error::{ContextKind, ContextValue, ErrorKind},
    parser::ValueSource,
};
use envelog::StoreOptions;
use serde_json::{Value, json};

use self::file::SettingsFile;
use crate::{
    args::{self, Cli},
    exit::Failure,
    values::{bytes, count, delay, duration, show_bytes, show_duration, switch},
};

/// The value name of an option that is on or off. It needs no value, which means `true`.
pub(crate) const SWITCH: &str = "true|false";
/// The value of a setting that has none.
const NONE: &str = "none";
/// The option that names the settings file. It is no setting itself.
const FILE: &str = "settings";
/// The command whose options are settings too, and its table in a settings file.
const SERVE: &str = "serve";
const REVALIDATE_EVERY: &str = "revalidate-every";

/// A setting of the store: a field of [`StoreOptions`].
struct StoreSetting {
    name: &'static str,
    kind: Kind,
    /// The values that the engine accepts: `MIN to MAX`, `at least MIN` or `at most MAX`, with
    /// `0s, or ` in front if zero is accepted too. Empty for a switch. A test compares it with the
    /// engine.
    limits: &'static str,
    help: &'static str,
}

/// The type of a setting, with its place in the options.
#[derive(Clone, Copy)]
enum Kind {
    Duration(fn(&mut StoreOptions) -> &mut Duration),
    /// A duration that may be zero.
    Delay(fn(&mut StoreOptions) -> &mut Duration),
    OptionalDuration(fn(&mut StoreOptions) -> &mut Option<Duration>),
    Bytes(fn(&mut StoreOptions) -> &mut u64),
    Memory(fn(&mut StoreOptions) -> &mut usize),
    Count(fn(&mut StoreOptions) -> &mut usize),
    Switch(fn(&mut StoreOptions) -> &mut bool),
}

/// All settings of the store. To add one, add it here.
const STORE: &[StoreSetting] = &[
    StoreSetting {
        name: REVALIDATE_EVERY,
        kind: Kind::Duration(|options| &mut options.revalidate_every),
        limits: "100ms to 1h",
        help: "How often to ask the KMS whether a key may still be used. Unless set, shortened to the shorter non-zero grace",
    },
    StoreSetting {
        name: "kms-timeout",
        kind: Kind::Duration(|options| &mut options.kms_timeout),
        limits: "10ms to 1m",
        help: "Timeout of one KMS call; a refusal takes effect within --revalidate-every plus this",
    },
    StoreSetting {
        name: "outage-grace",
        kind: Kind::Duration(|options| &mut options.outage_grace),
        limits: "revalidate-every to 24h",
        help: "How long a key stays usable after the last good answer while the KMS cannot be reached",
    },
    StoreSetting {
        name: "service-outage-grace",
        kind: Kind::Delay(|options| &mut options.service_outage_grace),
        limits: "0s, or revalidate-every to 168h",
        help: "How long the store stays usable after the last good answer while the KMS of its service key cannot be reached; 0s: without end",
    },
    StoreSetting {
        name: "keyring-group",
        kind: Kind::Switch(|options| &mut options.keyring_group_read),
        limits: "",
        help: "Accept a service keyring that its group may read, and create new ones that way (mode 0640 instead of 0600)",
    },
    StoreSetting {
        name: "group-read",
        kind: Kind::Switch(|options| &mut options.group_read),
        limits: "",
        help: "Let the group read the files and directories that the store creates (modes 0640 and 0750 instead of 0600 and 0700)",
    },
    StoreSetting {
        name: "allow-network-fs",
        kind: Kind::Switch(|options| &mut options.allow_network_fs),
        limits: "",
        help: "Open a store for writing on a network file system, although its locks may not exclude a writer on another machine",
    },
    StoreSetting {
        name: "anchor-required",
        kind: Kind::OptionalDuration(|options| &mut options.anchor_required),
        limits: "at least 1s",
        help: "Refuse appends while the anchor has been behind for longer than this. By default a failing anchor stops nothing",
    },
    StoreSetting {
        name: "reopen-full-shards",
        kind: Kind::Switch(|options| &mut options.reopen_full_shards),
        limits: "",
        help: "Let a shard that a full disk has stopped write again by itself once there is room",
    },
    StoreSetting {
        name: "head-every",
        kind: Kind::Duration(|options| &mut options.head_every),
        limits: "100ms to 1h",
        help: "How often to record the end of each open segment. An attacker can remove data synced after the last record unnoticed",
    },
    StoreSetting {
        name: "retention-every",
        kind: Kind::Duration(|options| &mut options.retention_every),
        limits: "at least 1s",
        help: "How often to apply retention",
    },
    StoreSetting {
        name: "clock-settle",
        kind: Kind::Duration(|options| &mut options.clock_settle),
        limits: "at least 1s",
        help: "How far the clock must advance after it was more than 24 h ahead of the last trusted time, before data is dropped by age again",
    },
    StoreSetting {
        name: "segment-bytes",
        kind: Kind::Bytes(|options| &mut options.segment_bytes),
        limits: "4KiB to 3GiB",
        help: "The size on disk at which a segment is sealed and the next one begun",
    },
    StoreSetting {
        name: "segment-age",
        kind: Kind::Duration(|options| &mut options.segment_age),
        limits: "at least 1s",
        help: "The age at which a segment is sealed and the next one begun",
    },
    StoreSetting {
        name: "block-bytes",
        kind: Kind::Memory(|options| &mut options.block_bytes),
        limits: "4KiB to 32MiB",
        help: "The most bytes of groups in one block. A larger group gets a block of its own",
    },
    StoreSetting {
        name: "linger",
        kind: Kind::Delay(|options| &mut options.linger),
        limits: "at most 10s",
        help: "How long a partial block waits for more groups if no caller waits for it",
    },
    StoreSetting {
        name: "pending-bytes-max",
        kind: Kind::Memory(|options| &mut options.pending_bytes_max),
        limits: "at least 1MiB",
        help: "The memory for groups that wait to be written; appends wait while it is full",
    },
    StoreSetting {
        name: "readers-max",
        kind: Kind::Count(|options| &mut options.readers_max),
        limits: "at least 1",
        help: "How many readers may be open at once",
    },
    StoreSetting {
        name: "followers-max",
        kind: Kind::Count(|options| &mut options.followers_max),
        limits: "at least 1",
        help: "How many followers may be open at once",
    },
    StoreSetting {
        name: "workers",
        kind: Kind::Count(|options| &mut options.workers),
        limits: "1 to 64",
        help: "The number of worker threads for flushes, mark blocks, rolls, heads and retention",
    },
    StoreSetting {
        name: "audit-file-bytes",
        kind: Kind::Bytes(|options| &mut options.audit_file_bytes),
        limits: "4KiB to 64MiB",
        help: "The size at which a new file of the key audit log is begun",
    },
];

impl StoreSetting {
    fn find(name: &str) -> Option<&'static Self> {
        STORE.iter().find(|setting| setting.name == name)
    }

    fn arg(&self) -> Arg {
        let (kind, name) = (self.kind, self.kind.value_name());
        let limits = if self.limits.is_empty() { "" } else { &format!(" ({})", self.limits) };
        let help = format!("{}{limits} [default: {}]", self.help, self.default());
        Arg::new(self.name).long(self.name).global(true).value_name(name).help(help).value_parser(
            move |text: &str| {
                kind.set(&mut StoreOptions::default(), text).map(|()| text.to_owned())
            },
        )
    }

    fn default(&self) -> String {
        text_of(&self.kind.value(&StoreOptions::default()))
    }
}

impl Kind {
    fn value_name(self) -> &'static str {
        match self {
            Self::Duration(_) | Self::Delay(_) => "DURATION",
            Self::OptionalDuration(_) => "DURATION|none",
            Self::Bytes(_) | Self::Memory(_) => "BYTES",
            Self::Count(_) => "N",
            Self::Switch(_) => SWITCH,
        }
    }

    fn set(self, options: &mut StoreOptions, text: &str) -> Result<(), String> {
        match self {
            Self::Duration(field) => *field(options) = duration(text)?,
            Self::Delay(field) => *field(options) = delay(text)?,
            Self::OptionalDuration(field) => {
                *field(options) = if text == NONE { None } else { Some(duration(text)?) };
            }
            Self::Bytes(field) => *field(options) = bytes(text)?,
            Self::Memory(field) => {
                *field(options) = usize::try_from(bytes(text)?).map_err(|_| "that is too large")?;
            }
            Self::Count(field) => *field(options) = count(text)?,
            Self::Switch(field) => *field(options) = switch(text)?,
        }
        Ok(())
    }

    fn value(self, options: &StoreOptions) -> Value {
        let options = &mut options.clone();
        match self {
            Self::Duration(field) | Self::Delay(field) => json!(show_duration(*field(options))),
            Self::OptionalDuration(field) => json!(field(options).map(show_duration)),
            Self::Bytes(field) => json!(show_bytes(*field(options))),
            Self::Memory(field) => json!(show_bytes(*field(options) as u64)),
            Self::Count(field) => json!(*field(options)),
            Self::Switch(field) => json!(*field(options)),
        }
    }
}

/// The settings of the store, as options of the command line.
#[derive(Clone, Debug)]
pub(crate) struct StoreSettings(pub(crate) StoreOptions);

impl clap::Args for StoreSettings {
    fn augment_args(command: Command) -> Command {
        command.next_help_heading("Settings of the store").args(STORE.iter().map(StoreSetting::arg))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for StoreSettings {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut settings = Self(StoreOptions::default());
        settings.update_from_arg_matches(matches)?;
        Ok(settings)
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        let options = &mut self.0;
        for setting in STORE {
            if let Some(text) = matches.get_one::<String>(setting.name) {
                let set = setting.kind.set(options, text);
                set.map_err(|why| clap::Error::raw(ErrorKind::ValueValidation, why))?;
            }
        }
        // If only a grace period is shortened, shorten the revalidation interval with it.
        if !matches.contains_id(REVALIDATE_EVERY) {
            let graces = [options.outage_grace, options.service_outage_grace];
            for grace in graces.into_iter().filter(|grace| !grace.is_zero()) {
                options.revalidate_every = options.revalidate_every.min(grace);
            }
        }
        Ok(())
    }
}

/// The command line with the environment variables of the settings.
pub(crate) fn command() -> Command {
    command_for(&[])
}

/// The command line with the environment variables of the settings that are not among these
/// arguments. clap would check the value of a variable that an option behind the command overrides.
fn command_for(args: &[OsString]) -> Command {
    let command = Cli::command().mut_args(|arg| match arg.get_long() {
        Some(name) if arg.is_global_set() => {
            let name = name.to_owned();
            with_variable(arg, &name, args)
        }
        _ => arg,
    });
    if !cfg!(feature = "serve") {
        return command;
    }
    command.mut_subcommand(SERVE, |serve| {
        serve.mut_args(|arg| match arg.get_long() {
            Some(name) => {
                let name = in_serve(name);
                with_variable(arg, &name, args)
            }
            None => arg,
        })
    })
}

/// The name of a setting that is an option of `serve`.
fn in_serve(name: &str) -> String {
    format!("{SERVE}.{name}")
}

/// A setting with its environment variable, unless the arguments have the option.
fn with_variable(arg: Arg, name: &str, args: &[OsString]) -> Arg {
    let is_given = arg.get_long().is_some_and(|long| is_given(long, args));
    // A variable may hold a PIN, which a help text must not show.
    let arg = if is_given { arg } else { arg.env(variable(name)).hide_env_values(true) };
    if is_switch(&arg) {
        arg.num_args(0..=1).require_equals(true).default_missing_value("true")
    } else {
        arg
    }
}

fn is_switch(arg: &Arg) -> bool {
    arg.get_value_names().is_some_and(|names| names.iter().any(|name| name == SWITCH))
}

/// Whether the arguments have this option. Behind `--` are no options.
fn is_given(name: &str, args: &[OsString]) -> bool {
    args.iter().take_while(|arg| *arg != "--").any(|arg| {
        let rest = arg.to_str().and_then(|arg| arg.strip_prefix("--")?.strip_prefix(name));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    })
}

/// The environment variable of a setting.
fn variable(name: &str) -> String {
    format!("ENVELOG_{}", name.to_ascii_uppercase().replace(['-', '.'], "_"))
}

/// The arguments of the settings in this command line, without `--settings`.
fn settings_in(command: &Command) -> impl Iterator<Item = &Arg> {
    let is_setting = |arg: &&Arg| arg.is_global_set() && arg.get_long() != Some(FILE);
    command.get_arguments().filter(is_setting)
}

/// The arguments of the settings of `serve`, with their names.
fn settings_of_serve(command: &Command) -> impl Iterator<Item = (String, &Arg)> {
    let serve = command.find_subcommand(SERVE).filter(|_| cfg!(feature = "serve"));
    let arguments = serve.into_iter().flat_map(Command::get_arguments);
    arguments.filter_map(|arg| Some((in_serve(arg.get_long()?), arg)))
}

/// The argument of the setting with this name in a settings file.
fn find_setting<'a>(name: &str, command: &'a Command) -> Option<&'a Arg> {
    let global = || settings_in(command).find(|arg| arg.get_long() == Some(name));
    let of_serve = || settings_of_serve(command).find(|(it, _)| it == name).map(|(_, arg)| arg);
    global().or_else(of_serve)
}

/// The values that the settings of `serve` would have.
fn parse_serve(command: &Command) -> Result<ArgMatches, clap::Error> {
    let args = settings_of_serve(command).map(|(_, arg)| arg.clone());
    let serve = Command::new(SERVE).no_binary_name(true).args(args);
    serve.try_get_matches_from(Vec::<OsString>::new())
}

/// The parsed command line, and where its settings come from.
pub(crate) struct Given {
    pub(crate) cli: Cli,
    matches: ArgMatches,
    /// For `settings` alone.
    serve: Option<ArgMatches>,
    file: Option<SettingsFile>,
}

/// Why there is no command line.
pub(crate) enum Refused {
    Arguments(clap::Error),
    /// The settings file is refused. With `true`, the error is to be printed as JSON.
    File(Failure, bool),
}

impl From<clap::Error> for Refused {
    fn from(error: clap::Error) -> Self {
        Self::Arguments(error)
    }
}

/// Parses the command line, with the settings of the environment and of the settings file.
pub(crate) fn parse(args: &[OsString]) -> Result<Given, Refused> {
    let mut matches = command_for(args).try_get_matches_from(args)?;
    let mut file = None;
    if let Some(path) = matches.get_one::<PathBuf>(FILE) {
        let json = matches.get_one("json").copied().unwrap_or(false);
        let read =
            SettingsFile::read(path, &command()).map_err(|failure| Refused::File(failure, json))?;
        // The values of the file become the defaults of the command line, behind the environment.
        matches = read.defaults(command_for(args)).try_get_matches_from(args)?;
        file = Some(read);
    }
    let cli = Cli::from_arg_matches(&matches)?;
    let serve = match cli.command {
        args::Command::Settings => {
            // The parsed command line has propagated the global options.
            let command = command_for(args);
            let command = match &file {
                Some(file) => file.defaults(command),
                None => command,
            };
            Some(parse_serve(&command)?)
        }
        _ => None,
    };
    Ok(Given { cli, matches, serve, file })
}

/// A setting in force.
pub(crate) struct Setting {
    pub(crate) name: String,
    pub(crate) value: Value,
    pub(crate) source: Source,
}

/// The source of a setting.
pub(crate) enum Source {
    CommandLine,
    Environment,
    /// The settings file, with the line.
    File(PathBuf, usize),
    Default,
}

impl Source {
    /// The word for programs.
    pub(crate) fn word(&self) -> &'static str {
        match self {
            Self::CommandLine => "option",
            Self::Environment => "environment",
            Self::File(..) => "file",
            Self::Default => "default",
        }
    }

    /// The option, the variable, or the place in the file.
    pub(crate) fn place(&self, name: &str) -> Option<String> {
        match self {
            Self::CommandLine => Some(format!("--{name}")),
            Self::Environment => Some(variable(name)),
            Self::File(path, line) => Some(format!("{}:{line}", path.display())),
            Self::Default => None,
        }
    }
}

impl Given {
    /// The settings in force, with the settings file itself, in the order of `--help`. A path that
    /// is not given is null.
    pub(crate) fn settings(&self) -> Vec<Setting> {
        let options = &self.cli.global.of_store.0;
        let command = command();
        let global = command.get_arguments().filter(|arg| arg.is_global_set()).map(|arg| {
            let name = arg.get_long().unwrap_or_default().to_owned();
            let value = match StoreSetting::find(&name) {
                Some(setting) => setting.kind.value(options),
                None => value(arg, &self.matches),
            };
            Setting { source: self.source(arg, &name, &self.matches), name, value }
        });
        let of_serve = self.serve.iter().flat_map(|matches| {
            settings_of_serve(&command).map(move |(name, arg)| {
                let value = value(arg, matches);
                Setting { source: self.source(arg, &name, matches), name, value }
            })
        });
        global.chain(of_serve).collect()
    }

    fn source(&self, arg: &Arg, name: &str, matches: &ArgMatches) -> Source {
        match matches.value_source(arg.get_id().as_str()) {
            Some(ValueSource::CommandLine) => Source::CommandLine,
            Some(ValueSource::EnvVariable) => Source::Environment,
            _ => match self.file.as_ref().and_then(|file| Some((file, file.line_of(name)?))) {
                Some((file, line)) => Source::File(file.path.clone(), line),
                None => Source::Default,
            },
        }
    }
}

fn value(arg: &Arg, matches: &ArgMatches) -> Value {
    let id = arg.get_id().as_str();
    if is_switch(arg) {
        return json!(matches.get_one(id).copied().unwrap_or(false));
    }
    let raw = matches.get_raw(id).unwrap_or_default();
    let mut texts = raw.map(|text| without_secret(&text.to_string_lossy()));
    match arg.get_action() {
        ArgAction::Count => json!(matches.get_count(id)),
        ArgAction::Append => json!(texts.collect::<Vec<_>>()),
        _ => json!(texts.next()),
    }
}

/// The parameter of a KMS URL whose value is secret.
const SECRET: &str = "pin-value=";

/// Whether a KMS URL has a secret in it.
fn has_secret(url: &str) -> bool {
    url.contains(SECRET)
}

/// The text with the secret of a KMS URL replaced.
fn without_secret(url: &str) -> String {
    let Some(at) = url.find(SECRET) else { return url.to_owned() };
    let (before, rest) = url.split_at(at + SECRET.len());
    let after = rest.find('&').map_or("", |end| &rest[end..]);
    format!("{before}…{}", without_secret(after))
}

/// A value of a setting as text. A list has one line for each of its values.
pub(crate) fn text_of(value: &Value) -> String {
    match value {
        Value::Null => NONE.to_owned(),
        Value::String(text) => text.clone(),
        Value::Array(values) if values.is_empty() => NONE.to_owned(),
        Value::Array(values) => values.iter().map(text_of).collect::<Vec<_>>().join("\n"),
        other => other.to_string(),
    }
}

/// Whether errors of these arguments are to be printed as JSON.
pub(crate) fn asks_for_json(args: &[OsString]) -> bool {
    let in_variable = || env::var(variable("json")).is_ok_and(|on| switch(&on) == Ok(true));
    let mut options = args.iter().take_while(|arg| *arg != "--");
    options.any(|arg| arg == "--json" || arg == "--json=true") || in_variable()
}

/// The first paragraph of a message of clap, in one line. The usage and the hint after it are left
/// out.
pub(crate) fn sentence(error: &clap::Error) -> String {
    let text = error.to_string();
    let lines: Vec<&str> =
        text.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    lines.join(" ").trim_start_matches("error: ").to_owned()
}

/// The variable whose value this error refuses, if the option is not on the command line.
pub(crate) fn refused_variable(error: &clap::Error, args: &[OsString]) -> Option<String> {
    if !matches!(error.kind(), ErrorKind::InvalidValue | ErrorKind::ValueValidation) {
        return None;
    }
    let Some(ContextValue::String(arg)) = error.get(ContextKind::InvalidArg) else { return None };
    let name = arg.strip_prefix("--")?.split(['=', '[', ' ', '.']).next()?;
    let variables = [variable(name), variable(&in_serve(name))];
    variables.into_iter().find(|it| env::var_os(it).is_some() && !is_given(name, args))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        command().debug_assert();
    }

    /// The fields of the options, and their values as `Debug` shows them.
    fn fields(options: &StoreOptions) -> Vec<(String, String)> {
        let text = format!("{options:?}");
        let fields = text.split_once("{ ").unwrap().1.trim_end_matches(" }").split(", ");
        let fields = fields.map(|field| field.split_once(": ").unwrap());
        fields.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn every_field_of_the_store_options_is_a_setting_of_its_name() {
        let defaults = StoreOptions::default();
        let mut set = BTreeSet::new();
        for setting in STORE {
            let mut options = defaults;
            let text = match setting.kind {
                Kind::Duration(_) | Kind::Delay(_) | Kind::OptionalDuration(_) => "77s",
                Kind::Bytes(_) | Kind::Memory(_) | Kind::Count(_) => "77",
                Kind::Switch(_) if setting.default() == "true" => "false",
                Kind::Switch(_) => "true",
            };
            setting.kind.set(&mut options, text).unwrap();
            assert_eq!(text_of(&setting.kind.value(&options)), text, "{}", setting.name);
            let pairs = fields(&defaults).into_iter().zip(fields(&options));
            let changed: Vec<_> = pairs.filter(|(before, after)| before != after).collect();
            let [((field, _), _)] = &changed[..] else { panic!("{}: {changed:?}", setting.name) };
            let name = field.replace("keyring_group_read", "keyring_group").replace('_', "-");
            assert_eq!(name, setting.name);
            set.insert(field.clone());
        }
        for (field, _) in fields(&defaults) {
            // The first is for embedders, the second for a benchmark.
            let is_none = ["background", "hash_payloads"].contains(&field.as_str());
            assert_eq!(set.contains(&field), !is_none, "{field}");
        }
    }

    #[test]
    fn limits_and_defaults_are_those_of_the_engine() {
        /// The values directly below and above one.
        fn neighbours(kind: Kind, text: &str) -> [String; 2] {
            let number = match kind {
                Kind::Bytes(_) | Kind::Memory(_) => bytes(text).unwrap(),
                Kind::Count(_) => count(text).unwrap() as u64,
                _ => {
                    let nanos = delay(text).unwrap().as_nanos() as u64;
                    return [nanos - 1, nanos + 1].map(|nanos| format!("{nanos}ns"));
                }
            };
            [number - 1, number + 1].map(|number| number.to_string())
        }
        for StoreSetting { name, kind, limits, .. } in STORE {
            // The largest grace, so that each interval of renewals is shorter.
            let mut base = StoreOptions::default();
            base.outage_grace = Duration::from_secs(24 * 3600);
            let accepts = |text: &str| {
                let mut options = base;
                kind.set(&mut options, text).is_ok() && options.check().is_ok()
            };
            let default = kind.value(&StoreOptions::default());
            assert!(accepts(&text_of(&default)), "{name}");
            let (zero, limits) = match limits.strip_prefix("0s, or ") {
                Some(limits) => (true, limits),
                None => (false, *limits),
            };
            assert!(!zero || accepts("0s"), "{name}");
            let (min, max) = match limits.split_once(" to ") {
                Some((min, max)) => (Some(min), Some(max)),
                None => (limits.strip_prefix("at least "), limits.strip_prefix("at most ")),
            };
            let is_switch = matches!(kind, Kind::Switch(_));
            assert_eq!(min.is_none() && max.is_none(), is_switch, "{name}: {limits}");
            if let Some(min) = min {
                let min = min.replace(REVALIDATE_EVERY, &show_duration(base.revalidate_every));
                let [below, _] = neighbours(*kind, &min);
                assert!(accepts(&min) && !accepts(&below), "{name}: at least {min}");
            }
            if let Some(max) = max {
                let [_, above] = neighbours(*kind, max);
                assert!(accepts(max) && !accepts(&above), "{name}: at most {max}");
            }
        }
    }

    /// The table of the settings in `docs/operations.md`.
    #[cfg(feature = "serve")]
    fn documented() -> String {
        let mut table = String::from(
            "| setting | variable | value | limits | default | meaning |\n|---|---|---|---|---|---|\n",
        );
        let command = command();
        let global = settings_in(&command).map(|arg| (arg.get_long().unwrap().to_owned(), arg));
        for (name, arg) in global.chain(settings_of_serve(&command)) {
            let name = &*name;
            let help = arg.get_help().unwrap().to_string();
            let (help, default) = match help.rsplit_once(" [default: ") {
                Some((help, default)) => (help, default.trim_end_matches(']')),
                None if is_switch(arg) => (help.as_str(), "false"),
                None if matches!(arg.get_action(), ArgAction::Count) => (help.as_str(), "0"),
                None => {
                    let default = arg.get_default_values().first().and_then(|it| it.to_str());
                    (help.as_str(), default.unwrap_or(NONE))
                }
            };
            let limits = StoreSetting::find(name).map_or("", |setting| setting.limits);
            let help = help.strip_suffix(&format!(" ({limits})")).unwrap_or(help);
            let value = match arg.get_action() {
                ArgAction::Count => "0 to 3",
                ArgAction::Append => "URLs",
                _ => &arg.get_value_names().unwrap()[0].replace('|', " or "),
            };
            let variable = variable(name);
            table +=
                &format!("| `{name}` | `{variable}` | {value} | {limits} | {default} | {help} |\n");
        }
        table
    }

    #[cfg(feature = "serve")]
    #[test]
    fn the_operators_page_documents_every_setting() {
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md");
        let page = std::fs::read_to_string(page).unwrap();
        let table = documented();
        assert!(page.contains(&format!("\n{table}\n")), "docs/operations.md lacks:\n{table}");
    }

    #[test]
    fn the_secret_of_a_kms_url_is_not_shown() {
        for (url, shown) in [
            ("aws-kms://eu-west-1", "aws-kms://eu-west-1"),
            ("pkcs11:token=a?pin-value=1234", "pkcs11:token=a?pin-value=…"),
            ("pkcs11:?pin-value=1234&region=r", "pkcs11:?pin-value=…&region=r"),
            (
                "pkcs11:?pin-value=1&pin-value=2&region=r",
                "pkcs11:?pin-value=…&pin-value=…&region=r",
            ),
            ("pkcs11:?pin-value=", "pkcs11:?pin-value=…"),
            ("pkcs11:?pin-source=file:/pin", "pkcs11:?pin-source=file:/pin"),
        ] {
            assert_eq!(without_secret(url), shown);
            assert_eq!(has_secret(url), shown.contains('…'));
        }
    }
}
