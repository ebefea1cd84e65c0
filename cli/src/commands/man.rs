//! `man`.

use std::path::Path;

use crate::{
    exit::{Failure, Result},
    output, settings,
};

/// Writes a manual page for the program and for each command.
pub(crate) fn run(dir: &Path) -> Result {
    clap_mangen::generate_to(settings::command(), dir)
        .map_err(|error| Failure::file("write manual pages to", dir, &error))?;
    output::line(format_args!("wrote manual pages to {}", dir.display()))
}
