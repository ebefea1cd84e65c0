//! Read-only maps of sealed segments.

use std::{fmt, fs::File, io, ptr};

/// The bytes of a file, mapped for reading.
///
/// A map is offered for sealed segments only, which nobody changes. Should somebody truncate the file all the same, or the disk
/// fail to deliver a page, the operating system ends the process with `SIGBUS`: that is why positional reads are the default.
///
/// Another process can write to the file at any time, so a map gives out no reference to its bytes. [`Map::read_at`] copies them
/// into a buffer of the caller. The caller checks that buffer and uses that buffer, and never reads the map a second time in between.
pub struct Map(memmap2::MmapRaw);

impl Map {
    pub(super) fn of_file(file: &File) -> io::Result<Self> {
        memmap2::MmapOptions::new().map_raw_read_only(file).map(Self)
    }

    /// Copies bytes from `offset` on into `buf`, as many as there are, up to the length of `buf`. Returns how many it has copied.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> usize {
        let Some(left) = usize::try_from(offset).ok().and_then(|offset| self.0.len().checked_sub(offset)) else {
            return 0;
        };
        let len = left.min(buf.len());
        // No Rust reference to the mapped bytes exists here or anywhere else, so no code assumes that they stay the same. A process
        // that writes to the file during the copy makes the copied bytes any mixture of old and new; a `u8` has no invalid value.
        // SAFETY: `offset + len` is at most the length of the map, which stays mapped while `self` lives, and `buf` has room for
        // `len` bytes. `buf` is the caller's alone, so the two do not overlap.
        unsafe { ptr::copy_nonoverlapping(self.0.as_ptr().add(offset as usize), buf.as_mut_ptr(), len) };
        len
    }
}

impl fmt::Debug for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Map({} bytes)", self.0.len())
    }
}
