//! `settings`.

use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    exit::{Failure, Result},
    output,
    settings::{Given, Setting, text_of},
    setup::Setup,
};

/// The answer of `settings`.
#[derive(Serialize)]
struct Answer<'a> {
    settings: Vec<InForce<'a>>,
}

/// A setting, and where it comes from.
#[derive(Serialize)]
struct InForce<'a> {
    name: &'a str,
    value: &'a Value,
    source: &'static str,
    place: Option<String>,
}

impl<'a> From<&'a Setting> for InForce<'a> {
    fn from(Setting { name, value, source }: &'a Setting) -> Self {
        Self { name, value, source: source.word(), place: source.place(name) }
    }
}

/// Prints the settings in force. Fails if the engine would refuse them.
pub(crate) fn run(setup: &Setup, given: &Given) -> Result {
    let settings: Vec<Setting> =
        given.settings().into_iter().map(|it| derived(setup, it)).collect();
    print(setup, &settings)?;
    setup.options.check().map_err(Failure::from)
}

/// Fills in the value that a setting has if it is not given.
fn derived(setup: &Setup, mut setting: Setting) -> Setting {
    if setting.value.is_null() {
        setting.value = match setting.name.as_str() {
            "store" => json!(output::path(&setup.store)),
            "keyring" => json!(output::path(&setup.keyring)),
            "kms-dir" => json!(output::path(&setup.kms_dir)),
            _ => Value::Null,
        };
    }
    setting
}

fn print(setup: &Setup, settings: &[Setting]) -> Result {
    if setup.json {
        return output::json(&Answer { settings: settings.iter().map(InForce::from).collect() });
    }
    let mut table = output::table(&["setting", "value", "source"], &[]);
    for Setting { name, value, source } in settings {
        let place = source.place(name).unwrap_or_else(|| source.word().to_owned());
        table.add_row([name.clone(), text_of(value), place]);
    }
    output::print_table(&table)
}
