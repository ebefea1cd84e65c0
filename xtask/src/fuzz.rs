//! Fuzzing: builds the targets of `fuzz/` with the stable toolchain and runs each target for an
//! equal share of the time.
//!
//! libFuzzer needs no nightly compiler: the instrumentation is an LLVM pass, which stable compiler
//! options enable.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use crate::{Done, cargo_program, root, target_dir};

/// The flags of `cargo fuzz` without its sanitizer: they count edges, and they report the operands
/// of comparisons to the fuzzer.
const RUSTFLAGS: [&str; 8] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cllvm-args=-simplifycfg-branch-fold-threshold=0",
    "--cfg",
    "fuzzing",
];

/// How long each target runs in the smoke test: its seeds, and a few seconds more.
const SMOKE: Duration = Duration::from_secs(4);

/// The time limit of one input, in seconds.
const UNIT_SECONDS_MAX: u32 = 20;

struct Options {
    /// Wall-clock time for all targets together; `None` for the smoke test.
    minutes: Option<f64>,
    jobs: usize,
    only: BTreeSet<String>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self, String> {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let mut options = Self { minutes: None, jobs: cores, only: BTreeSet::new() };
        let (mut smoke, mut args) = (false, args.iter());
        while let Some(arg) = args.next() {
            let mut number =
                || args.next().and_then(|n| n.parse::<f64>().ok()).filter(|n| *n > 0.0 && *n < 1e6);
            match arg.as_str() {
                "--smoke" => smoke = true,
                "--minutes" => {
                    options.minutes = Some(number().ok_or("--minutes needs a number of minutes")?)
                }
                "--jobs" => {
                    options.jobs = number()
                        .map(|n| n as usize)
                        .filter(|n| *n >= 1)
                        .ok_or("--jobs needs a number")?
                }
                name if !name.starts_with('-') => drop(options.only.insert(name.to_owned())),
                other => return Err(format!("fuzz has no option {other}")),
            }
        }
        match (smoke, options.minutes) {
            (true, None) | (false, Some(_)) => Ok(options),
            _ => Err("fuzz needs either --smoke or --minutes N".to_owned()),
        }
    }
}

/// The result of running one target.
struct Outcome {
    name: String,
    executions: u64,
    coverage: u64,
    /// The finding, and the file that reproduces it.
    finding: Option<(String, String)>,
}

pub(crate) fn fuzz(args: &[String]) -> Done {
    let options = Options::parse(args)?;
    let dir = root().join("fuzz");
    let mut targets = targets(&dir)?;
    if let Some(unknown) = options.only.iter().find(|name| !targets.contains(*name)) {
        return Err(format!("no fuzz target {unknown}; the targets are {targets:?}"));
    }
    targets.retain(|name| options.only.is_empty() || options.only.contains(name));
    let binaries = build(&dir, &targets, options.minutes.is_none())?;

    let jobs = options.jobs.min(targets.len());
    let share = match options.minutes {
        Some(minutes) => {
            Duration::from_secs_f64((minutes * 60.0 * jobs as f64 / targets.len() as f64).max(1.0))
        }
        None => SMOKE,
    };
    eprintln!("xtask: {} targets, {} s each, {jobs} at once", targets.len(), share.as_secs());
    let (next, outcomes) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    println!("{:<16} {:>12} {:>9}  finding", "target", "executions", "coverage");
    thread::scope(|scope| {
        for _ in 0..jobs {
            scope.spawn(|| {
                while let Some(name) = targets.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let outcome = run(&dir, &binaries.join(name), name, share);
                    if let Ok(Outcome { name, executions, coverage, finding }) = &outcome {
                        let finding = finding.as_ref().map_or("-", |(what, _)| what);
                        println!("{name:<16} {executions:>12} {coverage:>9}  {finding}");
                    }
                    outcomes.lock().expect("no thread panics while it holds this").push(outcome);
                }
            });
        }
    });
    let outcomes = outcomes.into_inner().expect("no thread panics while it holds this");
    let outcomes: Vec<Outcome> = outcomes.into_iter().collect::<Result<_, _>>()?;
    println!(
        "{:<16} {:>12}",
        "all",
        outcomes.iter().map(|outcome| outcome.executions).sum::<u64>()
    );
    let findings: Vec<String> = outcomes
        .iter()
        .filter_map(|outcome| {
            outcome
                .finding
                .as_ref()
                .map(|(what, file)| format!("\n  {}: {what}\n    {file}", outcome.name))
        })
        .collect();
    match findings.len() {
        0 => Ok(()),
        count => Err(format!("{count} targets found something:{}", findings.concat())),
    }
}

/// The names of all targets, sorted.
fn targets(dir: &Path) -> Result<Vec<String>, String> {
    let sources = dir.join("fuzz_targets");
    let entries = fs::read_dir(&sources)
        .map_err(|error| format!("cannot list {}: {error}", sources.display()))?;
    let mut names: Vec<String> = entries
        .filter_map(|entry| Some(entry.ok()?.file_name().to_str()?.strip_suffix(".rs")?.to_owned()))
        .collect();
    names.sort();
    Ok(names)
}

/// Builds the targets and returns their directory. `quickly` reduces optimization, for targets that
/// run only a few seconds.
fn build(dir: &Path, targets: &[String], quickly: bool) -> Result<PathBuf, String> {
    if !Command::new(env::var_os("CXX").unwrap_or_else(|| "c++".into()))
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
    {
        return Err(
            "libFuzzer needs a C++ compiler with the name `c++` (Debian: install g++)".to_owned()
        );
    }
    let host = host()?;
    let target_dir = target_dir().join("fuzz");
    let mut cargo = Command::new(cargo_program());
    // With an explicit `--target`, cargo builds build scripts and procedural macros without the
    // instrumentation.
    cargo
        .args(["build", "--locked", "--target", &host, "--manifest-path"])
        .arg(dir.join("Cargo.toml"));
    for name in targets {
        cargo.args(["--bin", name]);
    }
    if quickly {
        cargo.args([
            "--config",
            "profile.dev.package.\"*\".opt-level=1",
            "--config",
            "profile.dev.debug=false",
        ]);
    }
    cargo
        .env("CARGO_TARGET_DIR", &target_dir)
        .env("CARGO_ENCODED_RUSTFLAGS", RUSTFLAGS.join("\u{1f}"));
    eprintln!("xtask: building {} fuzz targets", targets.len());
    let status = cargo.status().map_err(|error| format!("cannot run cargo: {error}"))?;
    if !status.success() {
        return Err(format!("the fuzz targets do not build ({status})"));
    }
    Ok(target_dir.join(host).join("debug"))
}

pub(crate) fn host() -> Result<String, String> {
    let output = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()))
        .arg("-vV")
        .output()
        .map_err(|error| format!("cannot run rustc: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let host = text.lines().find_map(|line| line.strip_prefix("host: "));
    host.map(str::to_owned).ok_or_else(|| "rustc -vV prints no host".to_owned())
}

/// The dictionary for a target's inputs, where one helps.
fn dictionary(name: &str) -> Option<&'static str> {
    match name {
        "segment_header" | "block" | "footer" | "scan" => Some("segment.dict"),
        "metadata" | "keyring" | "catalogue" | "audit" | "config" | "kms_files" => {
            Some("json.dict")
        }
        "values" => Some("values.dict"),
        "service" => Some("service.dict"),
        _ => None,
    }
}

fn run(dir: &Path, binary: &Path, name: &str, share: Duration) -> Result<Outcome, String> {
    let failed = |what: &str, error: std::io::Error| format!("{what} for {name}: {error}");
    let (corpus, artifacts) =
        (dir.join("corpus-work").join(name), dir.join("artifacts").join(name));
    for made in [&corpus, &artifacts] {
        fs::create_dir_all(made).map_err(|error| failed("cannot make a directory", error))?;
    }
    let mut command = Command::new(binary);
    command
        .arg(format!("-max_total_time={}", share.as_secs()))
        .arg(format!("-timeout={UNIT_SECONDS_MAX}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-print_final_stats=1", "-rss_limit_mb=2048"]);
    if let Some(dictionary) = dictionary(name) {
        command.arg(format!("-dict={}", dir.join("dictionaries").join(dictionary).display()));
    }
    // Targets write only throw-away files, which need not reach a disk.
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        command.env("TMPDIR", memory);
    }
    // The fuzzer adds new inputs to the first directory and only reads the seeds in the second.
    command.arg(&corpus).arg(dir.join("seeds").join(name));
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed("cannot run the target", error))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let log = artifacts.join("log");
    fs::write(&log, &said).map_err(|error| failed("cannot write the log", error))?;

    let number =
        |text: &str| text.trim().split(' ').next().and_then(|word| word.parse::<u64>().ok());
    let executions =
        said.lines().find_map(|line| number(line.strip_prefix("stat::number_of_executed_units:")?));
    let coverage = said.lines().rev().find_map(|line| number(line.split_once(" cov: ")?.1));
    let finding = (!output.status.success()).then(|| {
        let panicked =
            |line: &&str| line.contains("panicked at") || line.contains("ERROR: libFuzzer");
        let mut lines = said.lines().skip_while(|line| !panicked(line));
        let what: Vec<&str> = lines.by_ref().take(2).map(str::trim).collect();
        let what = if what.is_empty() { output.status.to_string() } else { what.join(" ") };
        let file = said
            .lines()
            .find_map(|line| line.split_once("Test unit written to ").map(|(_, file)| file));
        (what, format!("{} {}", binary.display(), file.unwrap_or(&log.to_string_lossy())))
    });
    let nothing_done = executions.unwrap_or(0) == 0 && finding.is_none();
    if nothing_done {
        return Err(format!("{name} did not run; see its output in {}", log.display()));
    }
    Ok(Outcome {
        name: name.to_owned(),
        executions: executions.unwrap_or(0),
        coverage: coverage.unwrap_or(0),
        finding,
    })
}
