//! Makes the packages that are published, and checks their contents and sizes.

use std::{fs, path::Path, process::Command};

use crate::{Done, cargo, cargo_program, root, target_dir};

/// A published package, and the limits of its size.
struct Package {
    name: &'static str,
    /// In bytes.
    compressed_max: u64,
    /// In bytes.
    unpacked_max: u64,
}

/// In the order in which they are published: each needs the ones before it.
const PACKAGES: [Package; 4] = [
    Package { name: "sm4-simd", compressed_max: 100 << 10, unpacked_max: 500 << 10 },
    Package { name: "envelog", compressed_max: 1 << 20, unpacked_max: 4 << 20 },
    Package { name: "envelog-server", compressed_max: 200 << 10, unpacked_max: 800 << 10 },
    Package { name: "envelog-cli", compressed_max: 300 << 10, unpacked_max: 1 << 20 },
];
/// No file of a package begins with one of these.
const FORBIDDEN: [&str; 5] = [".cargo/", ".ci/", "fuzz/", "target/", "tests/golden/"];

pub(crate) fn package(args: &[String]) -> Done {
    let verify = match args {
        [] => false,
        [arg] if arg == "--verify" => true,
        _ => return Err("package takes no argument but --verify".to_owned()),
    };
    let names = PACKAGES.iter().flat_map(|package| ["--package", package.name]);
    let names: Vec<&str> = names.collect();
    // In CI the tree is clean, and this hides nothing. Elsewhere a change must be checked before it
    // is committed.
    let options = ["--locked", "--allow-dirty", "--quiet"];
    if verify {
        cargo(&[&["publish", "--dry-run"][..], &options, &names].concat(), &[])?;
    }
    cargo(&[&["package", "--no-verify"][..], &options, &names].concat(), &[])?;
    let mut faults = Vec::new();
    for package in &PACKAGES {
        check(package, &mut faults)?;
    }
    if faults.is_empty() { Ok(()) } else { Err(faults.join("; ")) }
}

fn check(package: &Package, faults: &mut Vec<String>) -> Done {
    let Package { name, compressed_max, unpacked_max } = package;
    let path = target_dir().join("package").join(format!("{name}-{}.crate", version(name)?));
    let bytes =
        fs::read(&path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let compressed = bytes.len() as u64;
    // A gzip file ends with the length of its contents.
    let unpacked = bytes.last_chunk().map_or(0, |len| u64::from(u32::from_le_bytes(*len)));
    let files = files(&path)?;
    println!(
        "{name}: {} files, {} KiB compressed (limit {}), {} KiB unpacked (limit {})",
        files.len(),
        compressed.div_ceil(1 << 10),
        compressed_max >> 10,
        unpacked.div_ceil(1 << 10),
        unpacked_max >> 10
    );
    if compressed > *compressed_max || unpacked > *unpacked_max {
        faults.push(format!("{name} is over a limit of its size"));
    }
    let forbidden = |file: &&String| FORBIDDEN.iter().any(|prefix| file.starts_with(prefix));
    faults.extend(files.iter().filter(forbidden).map(|file| format!("{name} contains {file}")));
    Ok(())
}

/// The files of a package, without the directory that has them all.
fn files(path: &Path) -> Result<Vec<String>, String> {
    let output = Command::new("tar")
        .arg("-tzf")
        .arg(path)
        .output()
        .map_err(|error| format!("cannot run tar: {error}"))?;
    if !output.status.success() {
        return Err(format!("{} cannot be unpacked", path.display()));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let inner = |line: &str| line.split_once('/').map_or(line, |(_, file)| file).to_owned();
    Ok(text.lines().map(inner).collect())
}

/// The version of a package of the workspace.
fn version(name: &str) -> Result<String, String> {
    let output = Command::new(cargo_program())
        .args(["pkgid", "--locked", "--package", name])
        .current_dir(root())
        .output()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    let id = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    id.rsplit(['#', '@'])
        .next()
        .filter(|version| version.starts_with(|first: char| first.is_ascii_digit()))
        .map(str::to_owned)
        .ok_or_else(|| format!("`cargo pkgid` names no version of {name}: {id}"))
}
