//! The compressed forms of bodies.

use std::io::{Read, Write};

use bytes::Bytes;

use crate::error::{ApiError, Result};

/// The names of the header that names the form of a body.
pub(crate) const HEADER: &str = "x-log-compresstype";
pub(crate) const RAW_SIZE: &str = "x-log-bodyrawsize";

/// The level for answers: their speed counts.
const ZSTD_LEVEL: i32 = 1;

/// A compressed form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// One raw block, without its size.
    Lz4,
    /// One frame.
    Zstd,
    /// RFC 1950.
    Deflate,
}

impl Form {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Deflate => "deflate",
        }
    }

    fn of_name(name: &str) -> Option<Self> {
        let named = |form: &Self| name.eq_ignore_ascii_case(form.name());
        [Self::Lz4, Self::Zstd, Self::Deflate].into_iter().find(named)
    }

    /// The form of the body of a request, by the header that names it.
    ///
    /// # Errors
    /// 400 for an unknown name.
    pub(crate) fn of_request(header: Option<&str>) -> Result<Option<Self>> {
        match header {
            None | Some("") => Ok(None),
            Some(name) => Self::of_name(name).map(Some).ok_or_else(|| {
                let message = "x-log-compresstype must be lz4, zstd or deflate";
                ApiError::bad("InvalidCompressType", message)
            }),
        }
    }

    /// The first form that the client accepts.
    pub(crate) fn of_accept(header: Option<&str>) -> Option<Self> {
        let name = |item: &str| item.split(';').next().unwrap_or_default().trim().to_owned();
        header?.split(',').find_map(|item| Self::of_name(&name(item)))
    }

    /// Decompresses a body of which the size is known. Takes no more memory than that size.
    ///
    /// # Errors
    /// 400 if it is not a body of this form and size.
    pub(crate) fn decompress(self, body: &[u8], raw_size: usize) -> Result<Bytes> {
        let wrong = |why: String| {
            let message = format!("the body is not {} of {raw_size} bytes: {why}", self.name());
            ApiError::bad("PostBodyUncompressError", message)
        };
        let mut raw = Vec::new();
        match self {
            Self::Lz4 => {
                raw.resize(raw_size, 0);
                let written = lz4_flex::block::decompress_into(body, &mut raw)
                    .map_err(|error| wrong(error.to_string()))?;
                raw.truncate(written);
            }
            Self::Zstd => {
                let decoder = zstd::stream::read::Decoder::with_buffer(body)
                    .map_err(|error| wrong(error.to_string()))?;
                // A window that is larger than any body would be memory for nothing.
                let mut decoder = decoder.single_frame();
                decoder.window_log_max(24).map_err(|error| wrong(error.to_string()))?;
                read_all(decoder, raw_size, &mut raw).map_err(|error| wrong(error.to_string()))?;
            }
            Self::Deflate => read_all(flate2::read::ZlibDecoder::new(body), raw_size, &mut raw)
                .map_err(|error| wrong(error.to_string()))?,
        }
        if raw.len() != raw_size {
            return Err(wrong("its size is another".to_owned()));
        }
        Ok(raw.into())
    }

    /// Compresses an answer.
    ///
    /// # Errors
    /// 500 if a library fails where it cannot fail.
    pub(crate) fn compress(self, raw: &[u8]) -> Result<Bytes> {
        let failed = |error| {
            tracing::error!(%error, "an answer cannot be compressed");
            ApiError::internal()
        };
        Ok(match self {
            Self::Lz4 => lz4_flex::block::compress(raw),
            Self::Zstd => zstd::bulk::compress(raw, ZSTD_LEVEL).map_err(failed)?,
            Self::Deflate => {
                let level = flate2::Compression::fast();
                let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), level);
                encoder.write_all(raw).and_then(|()| encoder.finish()).map_err(failed)?
            }
        }
        .into())
    }
}

/// Reads at most one byte more than `raw_size`.
fn read_all(decoder: impl Read, raw_size: usize, raw: &mut Vec<u8>) -> std::io::Result<()> {
    raw.reserve_exact(raw_size.min(64 << 10));
    decoder.take(raw_size as u64 + 1).read_to_end(raw).map(|_| ())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use proptest::prelude::*;

    use super::*;

    const FORMS: [Form; 3] = [Form::Lz4, Form::Zstd, Form::Deflate];

    #[test]
    fn a_bomb_is_refused_at_the_announced_size() {
        let raw = vec![0; 50 << 20];
        for form in FORMS {
            let bomb = form.compress(&raw).unwrap();
            let refusal = form.decompress(&bomb, 1000).unwrap_err();
            assert_eq!(refusal.code, "PostBodyUncompressError", "{form:?}");
        }
    }

    #[test]
    fn what_a_client_accepts() {
        for (header, form) in [
            (None, None),
            (Some(""), None),
            (Some("lz4"), Some(Form::Lz4)),
            (Some("gzip, deflate"), Some(Form::Deflate)),
            (Some("br, ZSTD;q=0.5"), Some(Form::Zstd)),
        ] {
            assert_eq!(Form::of_accept(header), form, "{header:?}");
        }
        assert_eq!(Form::of_request(Some("snappy")).unwrap_err().code, "InvalidCompressType");
    }

    proptest! {
        #[test]
        fn bodies_round_trip(raw in prop::collection::vec(0..4_u8, 0..5000)) {
            for form in FORMS {
                let compressed = form.compress(&raw).unwrap();
                prop_assert_eq!(&form.decompress(&compressed, raw.len()).unwrap()[..], &raw[..]);
                prop_assert!(form.decompress(&compressed, raw.len() + 1).is_err());
                if !raw.is_empty() {
                    prop_assert!(form.decompress(&compressed, raw.len() - 1).is_err());
                }
            }
        }

        #[test]
        fn no_body_is_too_strange(body in prop::collection::vec(any::<u8>(), 0..300), size in 0..2000_usize) {
            for form in FORMS {
                if let Ok(raw) = form.decompress(&body, size) {
                    prop_assert_eq!(raw.len(), size);
                }
            }
        }
    }
}
