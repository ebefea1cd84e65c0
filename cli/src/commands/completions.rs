//! `completions`.

use std::io::{self, Write};

use clap_complete::Shell;

use crate::{
    exit::{Failure, Result},
    settings,
};

pub(crate) fn run(shell: Shell) -> Result {
    // Generate into memory first: the generator would panic on a broken pipe.
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut settings::command(), "envelog", &mut script);
    let mut out = io::stdout().lock();
    out.write_all(&script).and_then(|()| out.flush()).map_err(|error| Failure::output(&error))
}
