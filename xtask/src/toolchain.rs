//! Toolchains other than the default one, by rustup.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    process::{Command, Stdio},
};

use crate::{Done, root, target_dir};

/// Installs a toolchain if it is missing.
pub(crate) fn install(toolchain: &str) -> Done {
    let runs = Command::new("rustup")
        .args(["run", toolchain, "rustc", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if runs.is_ok_and(|status| status.success()) {
        return Ok(());
    }
    let line = ["toolchain", "install", toolchain, "--profile", "minimal", "--no-self-update"];
    eprintln!("xtask: rustup {}", line.join(" "));
    let status = Command::new("rustup").args(line).status();
    match status {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("rustup cannot install Rust {toolchain} ({status})")),
        Err(error) => Err(format!("Rust {toolchain} needs rustup: {error}")),
    }
}

/// The path of a program of a toolchain.
pub(crate) fn which(toolchain: &str, program: &str) -> Result<String, String> {
    let output = Command::new("rustup")
        .args(["which", "--toolchain", toolchain, program])
        .output()
        .map_err(|error| format!("cannot run rustup: {error}"))?;
    if !output.status.success() {
        return Err(format!("Rust {toolchain} has no {program}"));
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Runs the cargo of a toolchain in the workspace's root, and returns an error if it fails.
pub(crate) fn cargo(toolchain: &str, args: &[&str], environment: &[(&str, &str)]) -> Done {
    let line = format!("cargo +{toolchain} {}", args.join(" "));
    eprintln!("xtask: {line}");
    // Run `cargo` by name: the variable `CARGO` is the default toolchain's.
    let status = Command::new("cargo")
        .arg(format!("+{toolchain}"))
        .args(args)
        .env_remove("CARGO")
        .env_remove("RUSTC")
        .env_remove("RUSTDOC")
        .env_remove("RUSTUP_TOOLCHAIN")
        .envs(environment.iter().copied())
        .current_dir(root())
        .status()
        .map_err(|error| format!("cannot run cargo: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("`{line}` failed ({status})")) }
}

/// A script that runs a rustdoc with unstable options, for the variable `RUSTDOC`. The variable
/// `RUSTC_BOOTSTRAP` in the environment of cargo would also reach the build scripts, and cargo would
/// build every dependency again.
pub(crate) fn unstable_rustdoc(rustdoc: &str) -> Result<PathBuf, String> {
    let dir = target_dir().join("xtask");
    let path = dir.join("rustdoc");
    let script = format!("#!/bin/sh\nRUSTC_BOOTSTRAP=1 exec '{rustdoc}' \"$@\"\n");
    fs::create_dir_all(&dir)
        .and_then(|()| fs::write(&path, script))
        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755)))
        .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
    Ok(path)
}
