//! Compression of a block's payload.

use std::{fmt, str::FromStr};

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};
use serde::{Deserialize, Serialize};
use zeroize::Zeroize;
use zstd::zstd_safe::{compress_bound, find_frame_compressed_size, get_frame_content_size};

use super::BLOCK_RAW_BYTES_MAX;
use crate::wire::{DecodeError, require};

/// The compression level for zstd.
const ZSTD_LEVEL: i32 = 1;
/// The largest accepted window of a Zstandard frame, in bytes. Decoders accept this much by
/// default.
const ZSTD_WINDOW_MAX: u64 = 1 << 27;

/// How the blocks of a Logstore are compressed. A block that does not shrink is stored
/// uncompressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Compression {
    /// No compression. Choose it if the length of a block must not hint at its contents.
    None,
    /// LZ4: fast.
    #[default]
    Lz4,
    /// Zstandard at level 1: slower and smaller.
    Zstd,
}

impl Compression {
    const ALL: [Self; 3] = [Self::None, Self::Lz4, Self::Zstd];

    /// The name in a configuration.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// The number in a block header.
    pub(super) fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    pub(super) fn from_code(code: u8) -> Result<Self, DecodeError> {
        Self::ALL
            .into_iter()
            .find(|one| one.code() == code)
            .ok_or(DecodeError::Field("compression"))
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The error for a string that names no [`Compression`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown compression {0:?}: it is none, lz4 or zstd")]
pub struct UnknownCompression(pub String);

impl FromStr for Compression {
    type Err = UnknownCompression;

    fn from_str(name: &str) -> Result<Self, UnknownCompression> {
        Self::ALL
            .into_iter()
            .find(|one| one.name() == name)
            .ok_or_else(|| UnknownCompression(name.to_owned()))
    }
}

/// Compresses payloads. It reuses its tables for the next block.
#[derive(Default)]
pub(crate) struct Compressor {
    lz4: Option<CompressTable>,
    zstd: Option<zstd::bulk::Compressor<'static>>,
}

impl Compressor {
    /// Appends the compressed `raw` to `out`. Returns the compression used: the requested one, or
    /// `None` if `raw` would not shrink.
    pub(crate) fn compress(
        &mut self,
        compression: Compression,
        raw: &[u8],
        out: &mut Vec<u8>,
    ) -> Compression {
        let start = out.len();
        let bound = match compression {
            Compression::None => 0,
            Compression::Lz4 => get_maximum_output_size(raw.len()),
            Compression::Zstd => compress_bound(raw.len()),
        };
        out.resize(start + bound, 0);
        let room = &mut out[start..];
        let len = match compression {
            Compression::None => None,
            Compression::Lz4 => {
                let table = self.lz4.get_or_insert_with(CompressTable::large);
                compress_into_with_table(raw, room, table).ok()
            }
            Compression::Zstd => {
                self.zstd().and_then(|zstd| zstd.compress_to_buffer(raw, room).ok())
            }
        };
        match len.filter(|&len| len < raw.len()) {
            Some(len) => {
                out.truncate(start + len);
                compression
            }
            None => {
                // The attempt may be longer than `raw`, and has parts of it.
                if let Some(behind) = room.get_mut(raw.len()..) {
                    behind.zeroize();
                }
                out.truncate(start);
                out.extend_from_slice(raw);
                Compression::None
            }
        }
    }

    fn zstd(&mut self) -> Option<&mut zstd::bulk::Compressor<'static>> {
        if self.zstd.is_none() {
            self.zstd = zstd::bulk::Compressor::new(ZSTD_LEVEL).ok();
        }
        self.zstd.as_mut()
    }
}

/// Decompresses payloads. It reuses its tables for the next block.
#[derive(Default)]
pub(crate) struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decompressor {
    /// Replaces the contents of `out` by the `raw_len` bytes from which `stored` was compressed.
    ///
    /// # Errors
    /// `stored` is not the output of [`Compressor::compress`] for exactly `raw_len` bytes, or
    /// `raw_len` is above [`BLOCK_RAW_BYTES_MAX`]. The contents of `out` are then undefined.
    pub(crate) fn decompress(
        &mut self,
        compression: Compression,
        stored: &[u8],
        raw_len: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), DecodeError> {
        const WRONG: DecodeError = DecodeError::Field("compressed payload");
        require(raw_len <= BLOCK_RAW_BYTES_MAX, "raw length")?;
        let raw_len = raw_len as usize;
        out.clear();
        if compression == Compression::None {
            out.extend_from_slice(stored);
            return require(stored.len() == raw_len, "raw length");
        }
        out.resize(raw_len, 0);
        let len = match compression {
            Compression::None => None,
            Compression::Lz4 => decompress_into(stored, out).ok(),
            Compression::Zstd => {
                let one_frame = find_frame_compressed_size(stored) == Ok(stored.len())
                    && matches!(get_frame_content_size(stored), Ok(Some(len)) if len == raw_len as u64);
                if !one_frame || zstd_window(stored).is_none_or(|window| window > ZSTD_WINDOW_MAX) {
                    return Err(WRONG);
                }
                let zstd = self.zstd.get_or_insert_default();
                zstd.decompress_to_buffer(stored, out.as_mut_slice()).ok()
            }
        };
        if len == Some(raw_len) { Ok(()) } else { Err(WRONG) }
    }
}

/// The window size in the header of a Zstandard frame (RFC 8878, section 3.1.1.1). 0 if the frame
/// is a single segment: its window is its content, which has its own limit. `None` if the frame has
/// no header.
fn zstd_window(frame: &[u8]) -> Option<u64> {
    const SINGLE_SEGMENT: u8 = 1 << 5;
    let [_, _, _, _, descriptor, window, ..] = *frame else { return None };
    if descriptor & SINGLE_SEGMENT != 0 {
        return Some(0);
    }
    let base = 1 << (10 + (window >> 3));
    Some(base + base / 8 * u64::from(window & 7))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    fn logs(lines: usize) -> Vec<u8> {
        let mut text = Vec::new();
        for line in 0..lines {
            let status = [200, 404, 500][line * 7 % 3];
            text.extend_from_slice(
                format!(
                    "10.0.{}.{} GET /api/v1/items/{} {status}\n",
                    line % 7,
                    line % 251,
                    line * 31
                )
                .as_bytes(),
            );
        }
        text
    }

    #[test]
    fn names() {
        for one in Compression::ALL {
            assert_eq!(one.to_string().parse(), Ok(one));
            assert_eq!(serde_json::to_string(&one).unwrap(), format!("\"{one}\""));
            assert_eq!(serde_json::from_str::<Compression>(&format!("\"{one}\"")).unwrap(), one);
            assert_eq!(Compression::from_code(one.code()), Ok(one));
        }
        assert_eq!(Compression::default(), Compression::Lz4);
        assert_eq!("LZ4".parse::<Compression>(), Err(UnknownCompression("LZ4".to_owned())));
        serde_json::from_str::<Compression>("\"gzip\"").unwrap_err();
        assert_eq!(Compression::from_code(3), Err(DecodeError::Field("compression")));
    }

    #[test]
    fn logs_shrink_and_come_back() {
        let (mut compressor, mut decompressor) = (Compressor::default(), Decompressor::default());
        let mut raw = Vec::new();
        // The tables are reused with inputs on both sides of 64 KiB.
        for lines in [10, 5000, 20, 3000] {
            let text = logs(lines);
            for compression in [Compression::Lz4, Compression::Zstd] {
                let mut out = b"before".to_vec();
                assert_eq!(compressor.compress(compression, &text, &mut out), compression);
                assert!(out.len() - 6 < text.len());
                assert_eq!(out[..6], *b"before");
                decompressor
                    .decompress(compression, &out[6..], text.len() as u32, &mut raw)
                    .unwrap();
                assert_eq!(raw, text);
            }
        }
    }

    #[test]
    fn what_does_not_shrink_is_stored() {
        let mut random = vec![0; 1000];
        crate::io::Random::fill(&crate::io::OsRandom, &mut random).unwrap();
        for raw in [&[][..], b"a", &random] {
            for compression in Compression::ALL {
                let mut out = b"before".to_vec();
                assert_eq!(
                    Compressor::default().compress(compression, raw, &mut out),
                    Compression::None
                );
                assert_eq!(out[6..], *raw);
            }
        }
    }

    #[test]
    fn wrong_lengths_are_refused() {
        let text = logs(100);
        let len = text.len() as u32;
        let mut raw = Vec::new();
        for compression in Compression::ALL {
            let mut stored = Vec::new();
            assert_eq!(
                Compressor::default().compress(compression, &text, &mut stored),
                compression
            );
            let mut decompressor = Decompressor::default();
            for wrong in
                [0, 1, len - 1, len + 1, BLOCK_RAW_BYTES_MAX, BLOCK_RAW_BYTES_MAX + 1, u32::MAX]
            {
                decompressor.decompress(compression, &stored, wrong, &mut raw).unwrap_err();
            }
            decompressor
                .decompress(compression, &stored[..stored.len() - 1], len, &mut raw)
                .unwrap_err();
            let twice = [&stored[..], &stored].concat();
            decompressor.decompress(compression, &twice, len, &mut raw).unwrap_err();
            // A zstd decoder skips such a frame (RFC 8878, section 3.1.2). The engine never writes
            // one.
            let skipped = [&stored[..], b"\x50\x2a\x4d\x18\0\0\0\0"].concat();
            decompressor.decompress(compression, &skipped, len, &mut raw).unwrap_err();
            decompressor.decompress(compression, &twice, 2 * len, &mut raw).map_err(|_| ()).ok();
            decompressor.decompress(compression, &stored, len, &mut raw).unwrap();
            assert_eq!(raw, text);
        }
    }

    #[test]
    fn a_zstd_window_has_a_limit() {
        let mut raw = Vec::new();
        for (window, taken) in [
            (9 << 3, true),
            (17 << 3, true),
            (17 << 3 | 1, false),
            (18 << 3, false),
            (31 << 3 | 7, false),
        ] {
            // A frame with its content size in four bytes, and one block that repeats one byte 1000
            // times.
            let frame =
                [&b"\x28\xb5\x2f\xfd\x80"[..], &[window], &1000_u32.to_le_bytes(), b"\x43\x1f\0a"]
                    .concat();
            let back =
                Decompressor::default().decompress(Compression::Zstd, &frame, 1000, &mut raw);
            assert_eq!(back.is_ok(), taken, "{window:#x}");
            assert!(!taken || raw == [b'a'; 1000]);
        }
    }

    proptest! {
        #[test]
        fn round_trip(raw: Vec<u8>, repeat in 1..20usize) {
            let raw = raw.repeat(repeat);
            let (mut stored, mut back) = (Vec::new(), Vec::new());
            for compression in Compression::ALL {
                stored.clear();
                let used = Compressor::default().compress(compression, &raw, &mut stored);
                prop_assert!(used == Compression::None || stored.len() < raw.len());
                Decompressor::default().decompress(used, &stored, raw.len() as u32, &mut back).unwrap();
                prop_assert_eq!(&back, &raw);
            }
        }

        #[test]
        fn hostile_bytes_do_not_panic(
            lines in 1..60usize,
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            raw_len in 0..100_000u32,
            garbage: Vec<u8>,
        ) {
            let text = logs(lines);
            let mut raw = Vec::new();
            for compression in Compression::ALL {
                let mut stored = Vec::new();
                Compressor::default().compress(compression, &text, &mut stored);
                for (at, with) in &flips {
                    let at = at.index(stored.len());
                    stored[at] ^= with;
                }
                let mut decompressor = Decompressor::default();
                for (stored, raw_len) in [(&stored, text.len() as u32), (&stored, raw_len), (&garbage, raw_len)] {
                    if decompressor.decompress(compression, stored, raw_len, &mut raw).is_ok() {
                        prop_assert_eq!(raw.len(), raw_len as usize);
                    }
                }
            }
        }
    }
}
