//! Randomness.

use std::{fmt, io};

use rand::{TryRng, rngs::SysRng};

/// The source of keys, salts, nonces and identifiers.
pub trait Random: Send + Sync + fmt::Debug {
    /// Fills `buf` with unpredictable bytes. A value never repeats.
    ///
    /// # Errors
    /// The error of the operating system.
    fn fill(&self, buf: &mut [u8]) -> io::Result<()>;
}

/// The operating system's generator. Each call asks the system, so neither `fork` nor a restored
/// snapshot repeats a value that the process had buffered.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsRandom;

impl Random for OsRandom {
    fn fill(&self, buf: &mut [u8]) -> io::Result<()> {
        SysRng.try_fill_bytes(buf).map_err(io::Error::other)
    }
}
