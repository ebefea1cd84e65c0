//! For the tests of an embedder: a KMS that fails on request (feature `testing`), and a suite of
//! checks for a KMS backend (feature `kms-conformance`).

#[cfg(feature = "kms-conformance")]
pub mod conformance;
#[cfg(feature = "testing")]
mod faulty;

#[cfg(feature = "testing")]
pub use faulty::{Answer, Fault, FaultyKms, Operation};
