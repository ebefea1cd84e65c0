//! Mutation testing: cargo-mutants makes small changes to the engine one by one, and the tests of
//! the area must detect each.
//!
//! `.cargo/mutants.toml` lists the mutants that no test can detect, each with the reason, so that
//! every survivor is new.

use std::process::{Command, Stdio};

use crate::{Done, root};

struct Area {
    name: &'static str,
    files: &'static [&'static str],
    /// The files of `tests/` to run for every mutant, after the unit tests.
    quick: &'static [&'static str],
    /// The files of `tests/` to run for the survivors of `quick`.
    thorough: &'static [&'static str],
}

const AREAS: [Area; 5] = [
    Area {
        name: "format",
        files: &[
            "src/segment/*.rs",
            "src/document.rs",
            "src/wire.rs",
            "src/crypto/kdf.rs",
            "src/crypto/secret.rs",
        ],
        quick: &["format", "recovery"],
        thorough: &["canary", "data_path", "keys", "reading", "sweep", "tamper"],
    },
    Area {
        name: "recovery",
        files: &[
            "src/epoch.rs",
            "src/shard/recovery.rs",
            "src/shard/scanning.rs",
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
        files: &[
            "src/keys/envelope.rs",
            "src/keys/keyring.rs",
            "src/keys/keyring_seal.rs",
            "src/logstore/meta.rs",
        ],
        quick: &["format", "key_usage", "keyring", "keys", "service_cmk"],
        thorough: &["key_crashes", "revocation", "sweep", "tamper"],
    },
    Area {
        name: "leases",
        files: &[
            "src/keys/circuit_breaker.rs",
            "src/keys/gate.rs",
            "src/keys/lease.rs",
            "src/keys/renewal_pool.rs",
            "src/keys/sealing.rs",
        ],
        // Only the survivors run the tests of a store: many mutants block a store forever, and each
        // then takes the whole timeout.
        quick: &[],
        thorough: &[
            "beside",
            "key_usage",
            "keyring",
            "keys",
            "loss",
            "outage",
            "revocation",
            "service_cmk",
            "watching",
        ],
    },
];

/// These exhaustive sweeps take minutes per mutant. The random runs from a seed stay included.
const TOO_SLOW: [&str; 2] = ["the_power_fails", "every_operation_fails"];

pub(crate) fn mutants(args: &[String]) -> Done {
    let installed =
        Command::new("cargo").args(["mutants", "--version"]).stderr(Stdio::null()).output();
    if !installed.is_ok_and(|output| output.status.success()) {
        return Err(
            "cargo-mutants is not installed; get it with `cargo install --locked cargo-mutants`"
                .to_owned(),
        );
    }
    let (names, rest) = match args.iter().position(|arg| arg.starts_with('-')) {
        Some(at) => args.split_at(at),
        None => (args, &[][..]),
    };
    if let Some(unknown) = names.iter().find(|name| AREAS.iter().all(|area| area.name != **name)) {
        return Err(format!(
            "no area {unknown}; the areas are {}",
            AREAS.map(|area| area.name).join(", ")
        ));
    }
    let mut survivors = Vec::new();
    for area in
        AREAS.iter().filter(|area| names.is_empty() || names.iter().any(|name| name == area.name))
    {
        let mut left = pass(area, "quick", area.quick, 60, rest)?;
        if !left.is_empty() {
            // Mutants selected by name need no selection options; of the others only `--in-place`
            // is kept.
            let mut options: Vec<String> =
                rest.iter().filter(|option| *option == "--in-place").cloned().collect();
            options.extend(
                left.iter()
                    .flat_map(|mutant| ["--re".to_owned(), format!("^{}$", escaped(mutant))]),
            );
            left = pass(area, "thorough", area.thorough, 300, &options)?;
        }
        survivors.extend(left);
    }
    if survivors.is_empty() {
        Ok(())
    } else {
        Err(format!("mutants survived:\n{}", survivors.join("\n")))
    }
}

/// Runs cargo-mutants and returns the mutants that survived. A mutant whose tests take longer than
/// `seconds` is detected.
fn pass(
    area: &Area,
    name: &str,
    tests: &[&str],
    seconds: u32,
    options: &[String],
) -> Result<Vec<String>, String> {
    let output = root().join("target/mutants").join(area.name).join(name);
    std::fs::create_dir_all(&output)
        .map_err(|error| format!("cannot make {}: {error}", output.display()))?;
    let mut command = Command::new("cargo");
    command.current_dir(root()).args(["mutants", "--package", "envelog", "--features", "testing"]);
    command.args(["--timeout", &seconds.to_string()]);
    command.arg("--output").arg(&output);
    command.args(area.files.iter().flat_map(|file| ["--file", file]));
    // Pass the tests as arguments of every cargo call: otherwise cargo compiles the other tests for
    // each mutant too.
    command
        .arg("--cargo-arg=--lib")
        .args(tests.iter().map(|test| format!("--cargo-arg=--test={test}")));
    command
        .args(options)
        .args(["--", "--"])
        .args(TOO_SLOW.iter().flat_map(|test| ["--skip", test]));
    // Halves the compile time of a mutant.
    command.env("CARGO_PROFILE_DEV_LTO", "off");
    let status = command.status().map_err(|error| format!("cannot run cargo mutants: {error}"))?;
    // 2: mutants survived; 3: tests timed out (<https://mutants.rs/exit-codes.html>).
    if !matches!(status.code(), Some(0 | 2 | 3)) {
        return Err(format!("cargo mutants failed ({status}); see {}", output.display()));
    }
    let missed = output.join("mutants.out/missed.txt");
    let missed = std::fs::read_to_string(&missed)
        .map_err(|error| format!("cannot read {}: {error}", missed.display()))?;
    Ok(missed.lines().map(str::to_owned).collect())
}

/// A regular expression that matches `text` alone.
fn escaped(text: &str) -> String {
    text.chars()
        .flat_map(|c| r"\.+*?()|[]{}^$".contains(c).then_some('\\').into_iter().chain([c]))
        .collect()
}
