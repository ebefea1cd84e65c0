//! Mutation testing: cargo-mutants changes the engine in small ways, one by one, and the tests of the area have to notice each.
//!
//! What no test can notice is listed with the reason in `.cargo/mutants.toml`, so that a survivor is news.

use std::process::{Command, Stdio};

use crate::{Done, cargo, root};

struct Area {
    name: &'static str,
    files: &'static [&'static str],
    /// The arguments of `cargo test` that pick the tests: those that are quick enough to be run for every mutant.
    tests: &'static [&'static str],
}

const AREAS: [Area; 3] = [
    Area {
        name: "format",
        files: &["src/segment/*.rs", "src/document.rs", "src/crypto/kdf.rs", "src/crypto/secret.rs"],
        tests: &["format", "recovery", "reading", "data_path", "canary", "tamper"],
    },
    Area {
        name: "keys",
        files: &["src/keys/*.rs", "src/logstore/meta.rs"],
        tests: &["audit", "keys", "keyring", "key_crashes", "key_usage", "outage", "revocation", "service_cmk"],
    },
    Area {
        name: "recovery",
        files: &["src/shard/recovery.rs", "src/store/recover.rs", "src/store/catalogue.rs", "src/store/checkpoint.rs"],
        tests: &["recovery", "killed", "numbers", "data_path", "keyring", "model"],
    },
];

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
    let mut failed = Vec::new();
    for area in AREAS.iter().filter(|area| names.is_empty() || names.iter().any(|name| name == area.name)) {
        let output = root().join("target/mutants").join(area.name);
        std::fs::create_dir_all(&output).map_err(|error| format!("cannot make {}: {error}", output.display()))?;
        let output = output.to_string_lossy().into_owned();
        let mut words = vec!["mutants", "--package", "envelog", "--features", "kms-faulty"];
        words.extend(["--output", &output, "--timeout", "180"]);
        words.extend(area.files.iter().flat_map(|file| ["--file", file]));
        // As arguments of every cargo, lest the tests that are not run be compiled for each mutant.
        words.push("--cargo-arg=--lib");
        let tests: Vec<String> = area.tests.iter().map(|test| format!("--cargo-arg=--test={test}")).collect();
        words.extend(tests.iter().map(String::as_str));
        words.extend(rest.iter().map(String::as_str));
        if cargo(&words, &[]).is_err() {
            failed.push(format!("{} (see {output}/mutants.out)", area.name));
        }
    }
    if failed.is_empty() { Ok(()) } else { Err(format!("mutants survived: {}", failed.join(", "))) }
}
