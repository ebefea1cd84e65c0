//! Handles signals. SIGINT, SIGTERM and SIGHUP set a flag, which commands check where stopping loses
//! nothing.

use std::{
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::{RecvTimeoutError, Sender, channel},
    },
    thread,
    time::Duration,
};

use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ},
    flag,
};

use crate::{
    exit::{Failure, Result, Status},
    output,
};

/// How often [`Reminder`] looks for a signal.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// After how many looks since the signal it says something.
const LOOKS: u32 = 10;

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

/// Says what the process waits for if it has not ended a second after a signal: a disk or a KMS that
/// does not answer may keep it for ever. Dropping it ends its thread.
pub(crate) struct Reminder {
    _ends: Sender<()>,
}

impl Reminder {
    pub(crate) fn begin(waits_for: &'static str) -> Result<Self> {
        let (ends, ended) = channel();
        let watch = move || {
            let mut looks = 0;
            while looks < LOOKS && ended.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout)
            {
                looks += u32::from(asked());
            }
            if looks == LOOKS {
                output::notice(format_args!(
                    "waiting until {waits_for}; a second signal ends this at once"
                ));
            }
        };
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(watch)
            .map_err(|error| Failure::other(format!("cannot start a thread: {error}")))?;
        Ok(Self { _ends: ends })
    }
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
