//! Reading and writing little-endian bytes, for segments, documents and the writer epoch.
//!
//! Decoded bytes come from a disk and are hostile. No function here panics on them, and none
//! allocates.

use bytes::BufMut;

/// The version of the format that this build reads and writes.
pub const FORMAT_VERSION: u16 = 2;

/// The bytes of a CRC32.
pub(crate) const CRC_LEN: usize = 4;

/// Why bytes do not decode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// There are too few bytes.
    #[error("{needed} bytes are needed, there are {have}")]
    Short {
        /// How many bytes the decoder needs at least.
        needed: u64,
        /// How many bytes there are.
        have: u64,
    },
    /// The magic bytes, at the beginning (of a trailer: at the end), are wrong.
    #[error("the magic bytes are wrong")]
    Magic,
    /// The CRC32 does not match.
    #[error("the CRC32 does not hold")]
    Crc,
    /// A newer envelog wrote the bytes, in this version of the format.
    #[error("format version {0} is newer than this build")]
    NewerVersion(u16),
    /// An older envelog wrote the bytes, in this version of the format, which this build does not
    /// read.
    #[error("format version {0} is older than this build reads")]
    OlderVersion(u16),
    /// The bytes use a feature that this build does not have.
    #[error("unknown feature: {0}")]
    Feature(String),
    /// This field has a value that it cannot have.
    #[error("impossible value: {0}")]
    Field(&'static str),
}

/// The three sets of feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// A build that does not know one of these reads and writes all the same.
    pub compatible: u32,
    /// A build that does not know one of these reads, but does not write.
    pub read_only_compatible: u32,
    /// A build that does not know one of these refuses.
    pub incompatible: u32,
}

impl Features {
    /// The bits of [`Features::read_only_compatible`] that this build does not know. If there are
    /// any, it must not write.
    #[must_use]
    pub fn unknown_read_only(&self) -> u32 {
        self.read_only_compatible
    }

    /// Refuses writing beside features that a writer must know and this build does not.
    pub(crate) fn check_writing(&self) -> Result<(), DecodeError> {
        match self.unknown_read_only() {
            0 => Ok(()),
            bits => Err(DecodeError::Feature(format!(
                "read-only-compatible feature bits {bits:#x}: it can be read, not written"
            ))),
        }
    }

    /// Refuses incompatible features other than the `known` ones.
    pub(crate) fn check(&self, known: u32) -> Result<(), DecodeError> {
        match self.incompatible & !known {
            0 => Ok(()),
            bits => Err(DecodeError::Feature(format!("incompatible feature bits {bits:#x}"))),
        }
    }

    pub(crate) fn encode(&self, out: &mut impl BufMut) {
        out.put_u32_le(self.compatible);
        out.put_u32_le(self.read_only_compatible);
        out.put_u32_le(self.incompatible);
    }

    pub(crate) fn decode(cursor: &mut Cursor<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            compatible: cursor.u32()?,
            read_only_compatible: cursor.u32()?,
            incompatible: cursor.u32()?,
        })
    }
}

/// Reads little-endian values from the front of a byte string.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.at >= self.bytes.len()
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], DecodeError> {
        let short = || DecodeError::Short {
            needed: (self.at as u64).saturating_add(len as u64),
            have: self.bytes.len() as u64,
        };
        let end = self.at.checked_add(len).ok_or_else(short)?;
        let taken = self.bytes.get(self.at..end).ok_or_else(short)?;
        self.at = end;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let mut array = [0; N];
        array.copy_from_slice(self.bytes(N)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, DecodeError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, DecodeError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Reads `len` bytes, which must be zero.
    pub(crate) fn zeros(&mut self, len: usize, what: &'static str) -> Result<(), DecodeError> {
        require(self.bytes(len)?.iter().all(|&byte| byte == 0), what)
    }

    /// Reads the bytes `magic`.
    pub(crate) fn magic(&mut self, magic: &[u8]) -> Result<(), DecodeError> {
        if self.bytes(magic.len())? == magic { Ok(()) } else { Err(DecodeError::Magic) }
    }

    /// Reads a format version, which must be `known`: the one that this build reads and writes.
    pub(crate) fn version(&mut self, known: u16) -> Result<(), DecodeError> {
        match self.u16()? {
            version if version == known => Ok(()),
            0 => Err(DecodeError::Field("version")),
            version if version > known => Err(DecodeError::NewerVersion(version)),
            version => Err(DecodeError::OlderVersion(version)),
        }
    }
}

/// Fails with [`DecodeError::Field`] unless `holds`.
pub(crate) fn require(holds: bool, what: &'static str) -> Result<(), DecodeError> {
    if holds { Ok(()) } else { Err(DecodeError::Field(what)) }
}

/// Splits the CRC32 off the end of `bytes` and checks it. Returns the bytes in front of it, which
/// it covers.
pub(crate) fn strip_crc(bytes: &[u8]) -> Result<&[u8], DecodeError> {
    match bytes.split_last_chunk::<CRC_LEN>() {
        Some((covered, crc)) if crc32fast::hash(covered) == u32::from_le_bytes(*crc) => Ok(covered),
        Some(_) => Err(DecodeError::Crc),
        None => Err(DecodeError::Short { needed: CRC_LEN as u64, have: bytes.len() as u64 }),
    }
}

/// Appends the CRC32 of the bytes of `out` from `from` on.
pub(crate) fn put_crc(out: &mut Vec<u8>, from: usize) {
    let crc = crc32fast::hash(&out[from..]);
    out.extend_from_slice(&crc.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cursor_reports_what_is_missing() {
        let mut cursor = Cursor::new(&[1, 2, 3]);
        assert_eq!(cursor.u16(), Ok(0x0201));
        assert_eq!(cursor.u32(), Err(DecodeError::Short { needed: 6, have: 3 }));
        assert_eq!(cursor.bytes(usize::MAX), Err(DecodeError::Short { needed: u64::MAX, have: 3 }));
        assert_eq!(cursor.u8(), Ok(3));
        assert!(cursor.is_empty());
    }
}
