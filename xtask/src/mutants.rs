//! Mutation testing: cargo-mutants changes the engine in small ways, one by one, and the tests of the area have to notice each.
//!
//! What no test can notice is listed with the reason in `.cargo/mutants.toml`, so that a survivor is news.

use std::process::{Command, Stdio};

use crate::{Done, root};

struct Area {
    name: &'static str,
    files: &'static [&'static str],
    /// The files of `tests/` that are run for every mutant, after the unit tests.
    quick: &'static [&'static str],
    /// And for those that survived.
    thorough: &'static [&'static str],
}

const AREAS: [Area; 5] = [
    Area {
        name: "format",
        files: &["src/segment/*.rs", "src/document.rs", "src/wire.rs", "src/crypto/kdf.rs", "src/crypto/secret.rs"],
        quick: &["format", "recovery"],
        thorough: &["canary", "data_path", "keys", "reading", "sweep", "tamper"],
    },
    Area {
        name: "recovery",
        files: &[
            "src/epoch.rs",
            "src/shard/recovery.rs",
            "src/store/recover.rs",
            "src/store/catalogue/*.rs",
            "src/store/checkpoint.rs",
        ],
        quick: &["data_path", "keyring", "killed", "numbers", "recovery", "sweep"],
        thorough: &["audit", "canary", "reading", "tamper"],
    },
    Area {
        name: "audit",
        files: &["src/keys/audit/*.rs"],
        quick: &["audit", "keyring", "killed"],
        thorough: &["key_crashes", "outage", "revocation", "sweep", "tamper"],
    },
    Area {
        name: "keys",
        files: &["src/keys/envelope.rs", "src/keys/keyring.rs", "src/keys/keyring_seal.rs", "src/logstore/meta.rs"],
        quick: &["format", "key_usage", "keyring", "keys", "service_cmk"],
        thorough: &["key_crashes", "revocation", "sweep", "tamper"],
    },
    Area {
        name: "leases",
        files: &["src/keys/circuit_breaker.rs", "src/keys/gate.rs", "src/keys/lease.rs", "src/keys/renewal_pool.rs"],
        // What leases do to a store is asked of those that survive: many keep it waiting for ever, which takes its time.
        quick: &[],
        thorough: &["beside", "key_usage", "keyring", "keys", "outage", "revocation", "service_cmk", "watching"],
    },
];

/// The sweeps that try everything take minutes for each mutant; lives from a seed do not.
const TOO_SLOW: [&str; 2] = ["the_power_fails", "every_operation_fails"];

pub(crate) fn mutants(args: &[String]) -> Done {
    let installed = Command::new("cargo").args(["mutants", "--version"]).stderr(Stdio::null()).output();
    if !installed.is_ok_and(|output| output.status.success()) {
        return Err("cargo-mutants is not installed; get it with `cargo install --locked cargo-mutants`".to_owned());
    }
    let (names, rest) = match args.iter().position(|arg| arg.starts_with('-')) {
        Some(at) => args.split_at(at),
        None => (args, &[][..]),
    };
    if let Some(unknown) = names.iter().find(|name| AREAS.iter().all(|area| area.name != **name)) {
        return Err(format!("mutants knows no area {unknown}; there are {}", AREAS.map(|area| area.name).join(", ")));
    }
    let mut survivors = Vec::new();
    for area in AREAS.iter().filter(|area| names.is_empty() || names.iter().any(|name| name == area.name)) {
        let mut left = pass(area, "quick", area.quick, 60, rest)?;
        if !left.is_empty() {
            // Of the options only where to work applies to mutants that are named.
            let mut options: Vec<String> = rest.iter().filter(|option| *option == "--in-place").cloned().collect();
            options.extend(left.iter().flat_map(|mutant| ["--re".to_owned(), format!("^{}$", escaped(mutant))]));
            left = pass(area, "thorough", area.thorough, 300, &options)?;
        }
        survivors.extend(left);
    }
    if survivors.is_empty() { Ok(()) } else { Err(format!("mutants survived:\n{}", survivors.join("\n"))) }
}

/// Runs cargo-mutants; tells which mutants survived. One whose tests take longer than `seconds` was noticed.
fn pass(area: &Area, name: &str, tests: &[&str], seconds: u32, options: &[String]) -> Result<Vec<String>, String> {
    let output = root().join("target/mutants").join(area.name).join(name);
    std::fs::create_dir_all(&output).map_err(|error| format!("cannot make {}: {error}", output.display()))?;
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(["mutants", "--package", "envelog", "--features", "kms-faulty"]);
    command.args(["--timeout", &seconds.to_string()]);
    command.arg("--output").arg(&output);
    command.args(area.files.iter().flat_map(|file| ["--file", file]));
    // As arguments of every cargo, lest the tests that are not run be compiled for each mutant.
    command.arg("--cargo-arg=--lib").args(tests.iter().map(|test| format!("--cargo-arg=--test={test}")));
    command.args(options).args(["--", "--"]).args(TOO_SLOW.iter().flat_map(|test| ["--skip", test]));
    // Halves what it takes to compile a mutant.
    command.env("CARGO_PROFILE_DEV_LTO", "off");
    let status = command.status().map_err(|error| format!("cannot run cargo mutants: {error}"))?;
    // <https://mutants.rs/exit-codes.html>: mutants survived, or timed out.
    if !matches!(status.code(), Some(0 | 2 | 3)) {
        return Err(format!("cargo mutants failed ({status}); see {}", output.display()));
    }
    let missed = output.join("mutants.out/missed.txt");
    let missed =
        std::fs::read_to_string(&missed).map_err(|error| format!("cannot read {}: {error}", missed.display()))?;
    Ok(missed.lines().map(str::to_owned).collect())
}

/// A regular expression that matches `text` alone.
fn escaped(text: &str) -> String {
    text.chars().flat_map(|c| r"\.+*?()|[]{}^$".contains(c).then_some('\\').into_iter().chain([c])).collect()
}
