//! Builds the published packages with the oldest supported Rust.

use std::fs;

use crate::{Done, root, target_dir, toolchain};

/// The packages that users build.
const PACKAGES: [&str; 6] =
    ["--package", "sm4-simd", "--package", "envelog", "--package", "envelog-cli"];

pub(crate) fn msrv(args: &[String]) -> Done {
    let only_install = match args {
        [] => false,
        [arg] if arg == "--install" => true,
        _ => return Err("msrv takes no argument but --install".to_owned()),
    };
    let oldest = rust_version()?;
    toolchain::install(&oldest)?;
    if only_install {
        return Ok(());
    }
    // A directory of its own: otherwise each build would replace the other's files.
    let target_dir = target_dir().join("msrv");
    let environment = [("CARGO_TARGET_DIR", &*target_dir.to_string_lossy())];
    let check = ["check", "--locked", "--all-features"];
    toolchain::cargo(&oldest, &[&check[..], &PACKAGES].concat(), &environment)
}

/// The `rust-version` of the workspace.
fn rust_version() -> Result<String, String> {
    let path = root().join("Cargo.toml");
    let manifest = fs::read_to_string(&path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let mut lines = manifest.lines();
    let version = lines.find_map(|line| line.strip_prefix("rust-version = "));
    version
        .map(|version| version.trim_matches('"').to_owned())
        .ok_or_else(|| "Cargo.toml states no rust-version".to_owned())
}
