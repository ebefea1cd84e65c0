//! Read-only maps of sealed segments.

use std::{fmt, fs::File, io, ptr};

/// The bytes of a file, mapped for reading.
///
/// The engine maps sealed segments only, and no part of the engine changes those. If another
/// process truncates the file nevertheless, or the disk fails to deliver a page, the operating
/// system ends this process with `SIGBUS`. For this reason positional reads are the default.
///
/// Another process can write to the file at any time, so a map gives out no reference to its bytes.
/// [`Map::read_at`] copies them into a buffer of the caller. The caller verifies that buffer and
/// uses the verified bytes. It does not read the map a second time in between.
pub struct Map(memmap2::MmapRaw);

impl Map {
    pub(super) fn of_file(file: &File) -> io::Result<Self> {
        memmap2::MmapOptions::new().map_raw_read_only(file).map(Self)
    }

    /// Copies bytes from `offset` on into `buf`, up to the length of `buf` or the end of the map.
    /// Returns how many bytes it has copied.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> usize {
        let Some(left) =
            usize::try_from(offset).ok().and_then(|offset| self.0.len().checked_sub(offset))
        else {
            return 0;
        };
        let len = left.min(buf.len());
        // No Rust reference to the mapped bytes exists here or anywhere else, so no code assumes
        // that they stay the same. If a process writes to the file during the copy, the copied
        // bytes are any mixture of old and new bytes. A `u8` has no invalid value. SAFETY: `offset
        // + len` is at most the length of the map, which stays mapped while `self` lives, and `buf`
        // has room for `len` bytes. `buf` belongs to the caller alone, so the two do not overlap.
        unsafe {
            ptr::copy_nonoverlapping(self.0.as_ptr().add(offset as usize), buf.as_mut_ptr(), len)
        };
        len
    }
}

impl fmt::Debug for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Map({} bytes)", self.0.len())
    }
}
