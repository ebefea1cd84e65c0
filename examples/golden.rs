//! Creates the golden stores: small stores of every kind that are kept, so that later builds can be
//! tested against them.
//!
//! `cargo run --example golden -- DIR` creates those of this format version in `DIR` (in the
//! repository: `tests/golden/v2`). Clock and randomness are simulated, so every run gives the same
//! bytes. The bytes of `compressed` also depend on the versions of lz4 and zstd.

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../tests/common/golden.rs"]
mod golden;

use std::{env, path::Path, process::ExitCode};

fn main() -> ExitCode {
    let args: Vec<_> = env::args_os().skip(1).collect();
    let [dir] = args.as_slice() else {
        eprintln!("Usage: cargo run --example golden -- DIR");
        return ExitCode::from(2);
    };
    for name in golden::NAMES {
        golden::make(name, &Path::new(dir).join(name));
    }
    ExitCode::SUCCESS
}
