//! What the fuzz targets do with the bytes that they are given. `README.md` says how to run them.
//!
//! A target panics when the engine does what it must not: panic itself, accept what nobody wrote, or lose what it acknowledged. An error
//! is what hostile bytes deserve, and is only checked to be one that can be shown.

mod config;
mod crc;
mod documents;
mod formats;
mod golden;
mod lives;
mod sm4;
mod store;

// What the tests share, and the model of a store that they hold it against.
#[allow(dead_code)]
#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/model/life.rs"]
mod life;

pub use config::{config, values};
pub use documents::{
    BODIES_END, audit, bodies, catalogue, catalogue_bodies, envelope, is_catalogue_file, keyring, kms_files, metadata,
};
pub use formats::{block, compression, footer, group, scan, scanned_header, segment_header};
pub use golden::{GOLDEN, Golden, golden};
pub use lives::model;
pub use sm4::sm4;
pub use store::store;
