//! Read-only maps of sealed segments.

use std::{fmt, fs::File, io, ops::Deref};

/// The bytes of a file, mapped for reading.
///
/// A map is offered for sealed segments only, which nobody changes. Should somebody truncate the file all the same, or the disk
/// fail to deliver a page, the operating system ends the process with `SIGBUS`: that is why positional reads are the default.
pub struct Map(memmap2::Mmap);

impl Map {
    pub(super) fn of_file(file: &File) -> io::Result<Self> {
        // SAFETY: sealed segments are immutable: the engine writes them once and never truncates them. Another program that
        // modifies the file behind our back could make the bytes change under a reader; every block is authenticated on a private
        // copy or decrypted into one, so no decision rests on bytes that could change between check and use.
        unsafe { memmap2::Mmap::map(file) }.map(Self)
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Map({} bytes)", self.0.len())
    }
}
