//! Handles signals. SIGINT, SIGTERM and SIGHUP set a flag, which commands check where stopping loses
//! nothing.

use std::sync::{
    Arc, LazyLock,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ},
    flag,
};

use crate::exit::{Failure, Result, Status};

/// The last signal; 0 before the first one.
static SIGNAL: LazyLock<Arc<AtomicUsize>> = LazyLock::new(Arc::default);

/// Makes the first signal only set the flag. A second signal ends the process.
pub(crate) fn defer() -> Result {
    let again = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        // In this order: the first signal passes the check, and arms it.
        flag::register_conditional_shutdown(signal, Status::Interrupted as i32, Arc::clone(&again))
            .and_then(|_| flag::register(signal, Arc::clone(&again)))
            .and_then(|_| flag::register_usize(signal, Arc::clone(&SIGNAL), signal as usize))
            .map_err(|error| Failure::other(format!("cannot handle signals: {error}")))?;
    }
    Ok(())
}

/// Makes a write beyond the limit of the size of files (`ulimit -f`) an error. By default the system
/// ends the process with SIGXFSZ.
pub(crate) fn survive_file_size_limit() {
    // If it cannot be registered, the system's default stays.
    let _ = flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)));
}

/// Whether a signal asked the process to stop.
pub(crate) fn asked() -> bool {
    SIGNAL.load(Ordering::Relaxed) != 0
}

/// Fails if a signal asked the process to stop.
pub(crate) fn check() -> Result {
    if asked() { Err(Failure::interrupted()) } else { Ok(()) }
}

/// As [`check`], but SIGTERM is no failure if everything that was read is kept: a service manager
/// stops a service with it.
pub(crate) fn check_after_append(kept_all: bool) -> Result {
    let terminated = SIGNAL.load(Ordering::Relaxed) == SIGTERM as usize;
    if terminated && kept_all { Ok(()) } else { check() }
}
