//! Official Python clients from PyPI, for tests that compare with them.

#![allow(dead_code)]

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

/// Returns the interpreter of a virtual environment with these packages (as in `name==1.2.3`). The
/// environment is created once below the target directory, and later calls with the same packages
/// reuse it.
///
/// # Panics
/// If `python3` with its `venv` module is missing or a package cannot be installed: a test that
/// needs them must fail and not be skipped.
pub(crate) fn with_packages(name: &str, requirements: &[&str]) -> PathBuf {
    // Next to the directory that cargo provides for the files of integration tests.
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
    fs::create_dir_all(&home).expect("the target directory can be written to");
    // Tests run concurrently in several processes. The lock lets one create the environment while
    // the others wait.
    let lock = File::create(home.join(format!("{name}.lock"))).expect("a lock file can be made");
    lock.lock().expect("a lock file can be locked");
    let environment = home.join(name);
    let python = environment.join("bin/python");
    let made = environment.join("made");
    let wanted = requirements.join("\n");
    if fs::read_to_string(&made).is_ok_and(|it| it == wanted) {
        return python;
    }
    let _ = fs::remove_dir_all(&environment);
    run(Command::new("python3").args(["-m", "venv"]).arg(&environment));
    let install = ["-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"];
    run(Command::new(&python).args(install).args(requirements));
    fs::write(made, wanted).expect("the target directory can be written to");
    python
}

fn run(command: &mut Command) {
    let what = format!("{command:?}");
    let needed =
        "this test needs python3 with venv and pip, and PyPI or a mirror of it (PIP_INDEX_URL)";
    let output = command.output().unwrap_or_else(|error| panic!("{what}: {error}; {needed}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {}; {needed}\n{said}", output.status);
}
