//! The project's tasks: `cargo xtask TASK`.

mod api;
mod deny;
mod fuzz;
mod layers;
mod msrv;
mod mutants;
mod package;
mod planted;
mod prose;
mod sanitize;
mod toolchain;

use std::{
    env,
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    time::Instant,
};

const HELP: &str = "\
Usage: cargo xtask TASK

Tasks:
  test [ARGS]       every test: the whole workspace with all features (unit, integration, documentation and
                    command-line tests), then the engine without features; ARGS go to the test binaries
  ci                formatting, lints and documentation with warnings denied, then `test`
  docs              the documentation with every feature, without any, with each one alone, and as docs.rs builds
                    it; warnings denied
  layers            checks that the modules of src use each other in one direction, and prints the order
  planted [NAME…]   plants each bug of tests/planted, or the named ones, in a copy of the tree; fails unless the test
                    that the patch names detects it
  fuzz --smoke      builds the fuzz targets (fuzz/) and runs each for a few seconds; fails on any finding
  fuzz --minutes N [--jobs J] [TARGET…]
                    shares N minutes among all targets, or among the named ones; --jobs limits how many run at once
  mutants [AREA…] [OPTIONS OF cargo-mutants]
                    mutation testing of the areas format, recovery, audit, keys and leases, with
                    cargo-mutants
  sanitize [--stable-only]
                    runs the unsafe code under AddressSanitizer; then, with a nightly toolchain, under Miri, and
                    the threaded tests under ThreadSanitizer
  prose [--list]    counts noun clauses with what, and words without an actor, in comments and documents; fails above
                    5 and 1 per 10,000 words; --list prints each with its place
  deny [--offline]  licences, bans and sources, and (not offline) advisories, with cargo-deny, which it installs in
                    the target directory if it is missing
  msrv [--install]  builds the libraries and the command line with the `rust-version` of Cargo.toml, whose
                    toolchain rustup installs if it is missing; --install does only that
  api [--bless | --install]
                    compares the public API of the libraries with docs/api; --bless accepts the present one;
                    --install only installs the toolchain that the comparison needs
  package [--verify]
                    makes the packages to publish, prints their sizes, and fails if one is too large or has files
                    that do not belong in it; --verify also builds them, as `cargo publish --dry-run`
";

fn main() -> ExitCode {
    let mut args = env::args().skip(1);
    let task = args.next();
    let rest: Vec<String> = args.collect();
    let started = Instant::now();
    let done = match task.as_deref() {
        Some("test") => test(&rest),
        Some("ci") if rest.is_empty() => ci(),
        Some("docs") if rest.is_empty() => docs(),
        Some("layers") if rest.is_empty() => layers::layers(),
        Some("planted") => planted::planted(&rest),
        Some("fuzz") => fuzz::fuzz(&rest),
        Some("mutants") => mutants::mutants(&rest),
        Some("sanitize") => sanitize::sanitize(&rest),
        Some("prose") => prose::prose(&rest),
        Some("deny") if rest.iter().all(|arg| arg == "--offline") => deny::deny(!rest.is_empty()),
        Some("msrv") => msrv::msrv(&rest),
        Some("api") => api::api(&rest),
        Some("package") => package::package(&rest),
        Some("help" | "--help" | "-h") => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("{HELP}");
            return ExitCode::from(2);
        }
    };
    match done {
        Ok(()) => {
            eprintln!("xtask: done in {} s", started.elapsed().as_secs());
            ExitCode::SUCCESS
        }
        Err(message) => {
            eprintln!("xtask: {message}");
            ExitCode::FAILURE
        }
    }
}

pub(crate) type Done = Result<(), String>;

/// Runs all tests. They need no set-up besides cargo's builds: the command-line tests run the
/// binary that cargo builds for them, and all other files are in temporary directories.
fn test(args: &[String]) -> Done {
    let with_args = |fixed: &[&'static str]| {
        let mut all: Vec<&OsStr> = fixed.iter().map(OsStr::new).collect();
        if !args.is_empty() {
            all.push(OsStr::new("--"));
            all.extend(args.iter().map(OsStr::new));
        }
        cargo(&all, &[])
    };
    with_args(&["test", "--locked", "--workspace", "--all-features", "--no-fail-fast"])?;
    cargo(&["check", "--locked", "--package", "envelog", "--no-default-features", "--lib"], &[])?;
    // As `cargo demo` builds it.
    cargo(&["check", "--locked", "--package", "envelog-cli", "--no-default-features"], &[])?;
    with_args(&["test", "--locked", "--package", "envelog", "--no-default-features"])
}

fn ci() -> Done {
    cargo(&["fmt", "--all", "--check"], &[])?;
    for other in ["fuzz/Cargo.toml", "cli/tests/serve/rust/Cargo.toml"] {
        cargo(&["fmt", "--manifest-path", other, "--check"], &[])?;
    }
    layers::layers()?;
    prose::prose(&[])?;
    // All targets except the unit tests of the engine's second build (tests/shuttle), which has
    // none.
    let targets = ["--lib", "--bins", "--examples", "--tests", "--benches"];
    let strict = ["--", "--deny", "warnings"];
    cargo(
        &[&["clippy", "--locked", "--workspace", "--all-features"][..], &targets, &strict].concat(),
        &[],
    )?;
    cargo(
        &[
            "clippy",
            "--locked",
            "--package",
            "envelog",
            "--all-targets",
            "--no-default-features",
            "--",
            "--deny",
            "warnings",
        ],
        &[],
    )?;
    docs()?;
    test(&[])
}

/// Builds the documentation with every feature, without any, with the default ones, and with each
/// one alone: a link to an item of another feature must not fail it. Then builds that of the
/// libraries as docs.rs does.
fn docs() -> Done {
    let strict = [("RUSTDOCFLAGS", "--deny warnings")];
    cargo(&["doc", "--locked", "--workspace", "--all-features", "--no-deps"], &strict)?;
    let engine = ["doc", "--locked", "--package", "envelog", "--no-deps"];
    cargo(&engine, &strict)?;
    cargo(&[&engine[..], &["--no-default-features"]].concat(), &strict)?;
    for feature in features()? {
        let alone = ["--no-default-features", "--features", &feature];
        cargo(&[&engine[..], &alone].concat(), &strict)?;
    }
    // As docs.rs builds it, with the feature that each item needs.
    let rustdoc = toolchain::unstable_rustdoc("rustdoc")?;
    let as_published = [
        ("RUSTDOCFLAGS", "--cfg docsrs --deny warnings"),
        ("RUSTDOC", &*rustdoc.to_string_lossy()),
    ];
    let libraries = ["doc", "--locked", "--workspace", "--all-features", "--no-deps", "--lib"];
    cargo(&libraries, &as_published)
}

/// The features of the engine, but for the default one.
fn features() -> Result<Vec<String>, String> {
    let path = root().join("Cargo.toml");
    let manifest = std::fs::read_to_string(&path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let section = manifest.split("\n[features]\n").nth(1).unwrap_or_default();
    let lines = section.lines().take_while(|line| !line.starts_with('['));
    let names = lines.filter_map(|line| line.split_once(" = [")).map(|(name, _)| name.to_owned());
    let names: Vec<String> = names.filter(|name| name != "default").collect();
    if names.is_empty() { Err("Cargo.toml has no features".to_owned()) } else { Ok(names) }
}

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    dir.parent().unwrap_or(dir).to_owned()
}

/// Cargo's target directory. Tasks build in subdirectories of it.
pub(crate) fn target_dir() -> PathBuf {
    root().join(
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from),
    )
}

pub(crate) fn cargo_program() -> std::ffi::OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Runs cargo in the workspace's root, and returns an error if cargo fails.
pub(crate) fn cargo<A: AsRef<OsStr>>(args: &[A], environment: &[(&str, &str)]) -> Done {
    let words: Vec<_> = args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect();
    let line = format!("cargo {}", words.join(" "));
    eprintln!("xtask: {line}");
    let status = Command::new(cargo_program())
        .args(args)
        .envs(environment.iter().copied())
        .current_dir(root())
        .status()
        .map_err(|error| format!("cannot run `{line}`: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("`{line}` failed ({status})")) }
}
