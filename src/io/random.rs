//! Randomness.

use std::{fmt, io};

use rand::{TryRng, rngs::SysRng};

/// Where keys, salts, nonces and identifiers come from.
pub trait Random: Send + Sync + fmt::Debug {
    /// Fills `buf` with bytes that nobody can predict and that never repeat.
    ///
    /// # Errors
    /// What the system says.
    fn fill(&self, buf: &mut [u8]) -> io::Result<()>;
}

/// The operating system's generator, asked anew each time, so that neither `fork` nor a restored snapshot repeats a value that
/// was buffered in the process.
#[derive(Clone, Copy, Debug, Default)]
pub struct OsRandom;

impl Random for OsRandom {
    fn fill(&self, buf: &mut [u8]) -> io::Result<()> {
        SysRng.try_fill_bytes(buf).map_err(io::Error::other)
    }
}
