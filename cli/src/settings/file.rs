//! The settings file: TOML, with the names of the options as keys.

use std::{
    fmt::Display,
    ops::Range,
    path::{Path, PathBuf},
};

use clap::{
    Arg, ArgAction, Command,
    error::{ContextKind, ContextValue},
};
use toml::de::{DeTable, DeValue};

use super::{SERVE, find_setting, has_secret, in_serve, sentence, settings_in, settings_of_serve};
use crate::{
    exit::{self, Failure, Status},
    input,
};

/// The setting whose value is the URL of a service.
const ENDPOINT: &str = "endpoint";

/// The settings of a file. Their values are valid.
pub(super) struct SettingsFile {
    pub(super) path: PathBuf,
    entries: Vec<Entry>,
}

struct Entry {
    name: String,
    /// From 1.
    line: usize,
    /// As on the command line.
    values: Vec<String>,
}

impl SettingsFile {
    /// Reads a file with settings of this command line.
    pub(super) fn read(path: &Path, command: &Command) -> exit::Result<Self> {
        let text = input::read_text(path).map_err(|failure| failure.with_status(Status::Usage))?;
        let entries = parse(&text, command).map_err(|(line, why)| {
            let message = format!("{}:{line}: {why}", path.display());
            Failure::new(Status::Usage, "settings", message)
        })?;
        Ok(Self { path: path.to_owned(), entries })
    }

    /// The command line with these settings as the defaults of its options.
    pub(super) fn defaults(&self, command: Command) -> Command {
        self.entries.iter().fold(command, |command, Entry { name, values, .. }| {
            let Some(id) = find_setting(name, &command).map(|arg| arg.get_id().clone()) else {
                return command;
            };
            match name.contains('.') {
                true => command.mut_subcommand(SERVE, |serve| {
                    serve.mut_arg(id, |arg| arg.default_values(values))
                }),
                false => command.mut_arg(id, |arg| arg.default_values(values)),
            }
        })
    }

    /// The line of a setting.
    pub(super) fn line_of(&self, name: &str) -> Option<usize> {
        self.entries.iter().find(|entry| entry.name == name).map(|entry| entry.line)
    }
}

/// The entries of a file, or the line of the first fault and one clause on it.
fn parse(text: &str, command: &Command) -> Result<Vec<Entry>, (usize, String)> {
    let line_at = |span: Range<usize>| {
        1 + text.as_bytes().iter().take(span.start).filter(|byte| **byte == b'\n').count()
    };
    let table = DeTable::parse(text).map_err(|error| {
        let line = error.span().map_or(1, line_at);
        (line, format!("this is not TOML: {}", error.message()))
    })?;
    let mut entries = Vec::new();
    let mut add = |name: String, key: Range<usize>, value: &DeValue<'_>| {
        let line = line_at(key);
        let values = values(&name, value, command).map_err(|why| (line, why))?;
        entries.push(Entry { name, line, values });
        Ok(())
    };
    for (key, value) in table.get_ref() {
        match value.get_ref() {
            DeValue::Table(table) if key.get_ref() == SERVE => {
                for (key, value) in table {
                    add(in_serve(key.get_ref()), key.span(), value.get_ref())?;
                }
            }
            value => add(key.get_ref().to_string(), key.span(), value)?,
        }
    }
    entries.sort_by_key(|entry| entry.line);
    Ok(entries)
}

/// The values of a setting, as on the command line, if they are valid.
fn values(name: &str, value: &DeValue<'_>, command: &Command) -> Result<Vec<String>, String> {
    let arg = find_setting(name, command).ok_or_else(|| unknown(name, command))?;
    let wrong = |what: &dyn Display| format!("{name} is {what}");
    let values = match (value, arg.get_action()) {
        (DeValue::Array(values), ArgAction::Append) => values
            .iter()
            .map(|value| scalar(value.get_ref()))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|kind| wrong(&format_args!("a list that has {kind} in it")))?,
        (value, _) => vec![scalar(value).map_err(|kind| {
            wrong(&format_args!("{kind}: give a text, a whole number, true or false"))
        })?],
    };
    if values.iter().any(|value| has_secret(value)) {
        return Err(format!(
            "{name} has a PIN in it, and a settings file holds no secrets: name a file with the PIN, pin-source=file:PATH"
        ));
    }
    if name == ENDPOINT && values.iter().any(|value| value.contains('@')) {
        return Err(format!(
            "{name} is a URL without a user and a password: the access key is in the file of access-key"
        ));
    }
    check(arg, &values)?;
    Ok(values)
}

/// A value as on the command line, or the name of its type.
fn scalar(value: &DeValue<'_>) -> Result<String, &'static str> {
    match value {
        DeValue::String(text) => Ok(text.to_string()),
        DeValue::Integer(number) => i128::from_str_radix(number.as_str(), number.radix())
            .map(|number| number.to_string())
            .map_err(|_| "a number that is too large"),
        DeValue::Boolean(on) => Ok(on.to_string()),
        DeValue::Float(_) => Err("a fraction"),
        DeValue::Datetime(_) => Err("a date"),
        DeValue::Array(_) => Err("a list"),
        DeValue::Table(_) => Err("a table"),
    }
}

/// Has clap parse the values alone.
fn check(arg: &Arg, values: &[String]) -> Result<(), String> {
    let name = arg.get_long().unwrap_or_default();
    // This option is repeated on the command line, and takes no value there.
    if let ArgAction::Count = arg.get_action() {
        let is_count = values.iter().all(|value| value.parse::<u8>().is_ok());
        return if is_count { Ok(()) } else { Err(format!("{name}: give a number from 0 to 255")) };
    }
    let args = values.iter().map(|value| format!("--{name}={value}"));
    let alone = Command::new(name.to_owned()).no_binary_name(true).arg(arg.clone());
    alone.try_get_matches_from(args).map(drop).map_err(|error| sentence(&error))
}

/// The refusal of a name, with a similar name if there is one.
fn unknown(name: &str, command: &Command) -> String {
    let (long, all): (&str, Vec<Arg>) =
        match name.strip_prefix(SERVE).and_then(|it| it.strip_prefix('.')) {
            Some(long) => (long, settings_of_serve(command).map(|(_, arg)| arg.clone()).collect()),
            None => (name, settings_in(command).cloned().collect()),
        };
    let parsed = Command::new("settings")
        .no_binary_name(true)
        .args(all)
        .try_get_matches_from([format!("--{long}")]);
    let similar = parsed.err().and_then(|error| match error.get(ContextKind::SuggestedArg) {
        Some(ContextValue::String(similar)) => Some(similar.trim_start_matches("--").to_owned()),
        _ => None,
    });
    match similar {
        Some(similar) => format!("there is no setting {name}; is {similar} meant?"),
        None => format!("there is no setting {name}; `envelog settings` lists all of them"),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::command, *};

    /// A name, a line, and values.
    type Parsed = (String, usize, Vec<String>);

    fn parsed(text: &str) -> Result<Vec<Parsed>, (usize, String)> {
        let entries = parse(text, &command())?;
        Ok(entries.into_iter().map(|entry| (entry.name, entry.line, entry.values)).collect())
    }

    #[test]
    fn an_endpoint_has_no_password() {
        let (line, why) = parsed("\nendpoint = \"https://u:secret@x\"").unwrap_err();
        assert!(line == 2 && why.contains("access-key") && !why.contains("secret"), "{why}");
        assert!(parsed("endpoint = \"https://logs.example.org\"").is_ok());
    }

    #[test]
    fn names_values_and_lines() {
        let text = r#"
            # The store and its KMSs.
            store = "/srv/logs"
            kms = [
                "local:/srv/kms",
                'aws-kms://eu-west-1?external-id="x"',
            ]
            kms-timeout = "5s"   # far away
            block-bytes = 65_536
            workers = 0x10
            segment-bytes = "1 GiB"
            group-read = true
            "json" = false
            verbose = 2
        "#;
        let entry = |name: &str, line, values: &[&str]| {
            (name.to_owned(), line, values.iter().map(|&value| value.to_owned()).collect())
        };
        let expected = vec![
            entry("store", 3, &["/srv/logs"]),
            entry("kms", 4, &["local:/srv/kms", "aws-kms://eu-west-1?external-id=\"x\""]),
            entry("kms-timeout", 8, &["5s"]),
            entry("block-bytes", 9, &["65536"]),
            entry("workers", 10, &["16"]),
            entry("segment-bytes", 11, &["1 GiB"]),
            entry("group-read", 12, &["true"]),
            entry("json", 13, &["false"]),
            entry("verbose", 14, &["2"]),
        ];
        assert_eq!(parsed(text), Ok(expected));
        assert_eq!(parsed(""), Ok(vec![]));
        assert_eq!(parsed("kms = 'local:/one'"), Ok(vec![entry("kms", 1, &["local:/one"])]));
    }

    #[test]
    fn a_fault_is_reported_with_its_line_and_a_hint() {
        for (text, line, words) in [
            ("kms-timout = '5s'", 1, "there is no setting kms-timout; is kms-timeout meant?"),
            ("\nkms_timeout = '5s'", 2, "is kms-timeout meant?"),
            ("\n\nKMS-TIMEOUT = '5s'", 3, "there is no setting KMS-TIMEOUT"),
            ("zzz = 1", 1, "`envelog settings` lists all of them"),
            ("settings = 'other.toml'", 1, "there is no setting settings"),
            ("help = true", 1, "there is no setting help"),
            ("'' = 1", 1, "there is no setting"),
            ("yes = true", 1, "there is no setting yes"),
            ("[store]\npath = 'x'", 1, "store is a table"),
            ("store.path = 'x'", 1, "store is a table"),
            ("store = ['a', 'b']", 1, "store is a list"),
            ("kms = ['a', ['b']]", 1, "a list that has a list in it"),
            ("kms-timeout = 1.5", 1, "kms-timeout is a fraction"),
            ("kms-timeout = 2026-01-31", 1, "kms-timeout is a date"),
            ("kms-timeout = 5", 1, "give a number and a unit"),
            ("kms-timeout = '0s'", 1, "greater than zero"),
            ("block-bytes = true", 1, "give a number of bytes"),
            ("block-bytes = 99999999999999999999", 1, "give a number of bytes"),
            ("block-bytes = 9999999999999999999999999999999999999999", 1, "too large"),
            ("workers = -1", 1, "give a number"),
            ("group-read = 'maybe'", 1, "give true or false"),
            ("verbose = 256", 1, "from 0 to 255"),
            ("log = 'a=b=c'", 1, "invalid filter"),
            ("workers = 1\nworkers = 2", 2, "duplicate key"),
            ("workers = 1\n= 2", 2, "this is not TOML"),
            ("workers = 'open", 1, "this is not TOML"),
            ("kms = 'pkcs11:token=a?pin-value=1234'", 1, "holds no secrets"),
            ("kms = ['local:/a', 'pkcs11:token=a?pin-value=1234']", 1, "holds no secrets"),
        ] {
            let (at, why) = parsed(text).expect_err(text);
            assert_eq!(at, line, "{text}: {why}");
            assert!(why.contains(words) && why.lines().count() == 1, "{text}: {why}");
            assert!(!why.contains("1234"), "{why}");
        }
    }

    #[test]
    fn damage_does_not_panic() {
        let intact = "store = \"a\"\nkms = [\"local:/a\"]\nworkers = 0x1f # c\ngroup-read = true\n";
        for at in 0..intact.len() {
            for byte in ["", "\"", "\n", "[", "=", "{", "\\", "é", "\0"] {
                let text = format!("{}{byte}{}", &intact[..at], &intact[at + 1..]);
                if let Err((line, _)) = parsed(&text) {
                    assert!((1..=6).contains(&line), "{text}");
                }
            }
        }
        for deep in ["[".repeat(100_000), "a=".to_owned() + &"[".repeat(100_000)] {
            assert!(parsed(&deep).is_err());
        }
    }
}
