//! Ctrl-C and its like: a wish to stop that is looked at where stopping loses nothing.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::exit::{Failure, Result};

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on the signals that end a process only leave a note; a second one ends it all the same.
pub(crate) fn defer() -> Result {
    let handler = || {
        if ASKED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    };
    ctrlc::set_handler(handler).map_err(|error| Failure::other(format!("cannot handle signals: {error}")))
}

/// Whether the process was asked to stop.
pub(crate) fn asked() -> bool {
    ASKED.load(Ordering::Relaxed)
}

/// Fails when the process was asked to stop.
pub(crate) fn check() -> Result {
    if asked() { Err(Failure::interrupted()) } else { Ok(()) }
}
