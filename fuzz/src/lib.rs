//! The code of the fuzz targets. `README.md` describes how to run them.
//!
//! A target panics if the engine fails: if it panics itself, accepts data that no writer wrote, or
//! loses acknowledged data. An error is the right answer to hostile bytes. The targets only check
//! that it can be displayed.

mod config;
mod crc;
mod documents;
mod formats;
mod golden;
mod lives;
mod service;
mod sm4;
mod store;

// The shared code of the tests, and the model that they compare a store with.
#[allow(dead_code)]
#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../tests/model/life.rs"]
mod life;

pub use config::{config, values};
pub use documents::{
    BODIES_END, audit, bodies, catalogue, catalogue_bodies, envelope, is_catalogue_file, is_meta,
    keyring, kms_files, metadata,
};
pub use formats::{block, compression, footer, group, scan, scanned_header, segment_header};
pub use golden::{GOLDEN, Golden, golden};
pub use lives::model;
pub use service::service;
pub use sm4::sm4;
pub use store::store;
