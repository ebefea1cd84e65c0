//! Handles Ctrl-C and similar signals: they set a flag, which commands check where stopping loses
//! nothing.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::exit::{Failure, Result};

static ASKED: AtomicBool = AtomicBool::new(false);

/// Makes the first signal only set the flag. A second signal ends the process.
pub(crate) fn defer() -> Result {
    let handler = || {
        if ASKED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    };
    ctrlc::set_handler(handler)
        .map_err(|error| Failure::other(format!("cannot handle signals: {error}")))
}

/// Whether a signal asked the process to stop.
pub(crate) fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Fails if a signal asked the process to stop.
pub(crate) fn check() -> Result {
    if asked() { Err(Failure::interrupted()) } else { Ok(()) }
}
