//! The unmodified SDKs for Rust and for Node, and many clients at once while the service is killed.

use std::{env, fs, fs::File, path::PathBuf, process::Command, sync::LazyLock};

use super::{PATIENCE, Running, Served, byok, next, service_key};

/// The client with the SDK for Rust, built once for all tests.
static RUST: LazyLock<PathBuf> = LazyLock::new(|| {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("sdk-rust");
    let manifest = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/serve/rust/Cargo.toml");
    let mut build = Command::new(cargo);
    build.args(["build", "--locked", "--quiet", "--manifest-path", manifest]);
    make(build.arg("--target-dir").arg(&target), "the header files of OpenSSL (libssl-dev)");
    target.join("debug/envelog-sdk-client")
});

/// A directory with the SDK for Node, installed once for all tests.
static NODE: LazyLock<PathBuf> = LazyLock::new(|| {
    let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/serve/node");
    let home = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("sdk-node");
    fs::create_dir_all(&home).unwrap();
    // Two runs of the tests must not install at once.
    let lock = File::create(home.join("lock")).unwrap();
    lock.lock().unwrap();
    let (wanted, made) = (fs::read(sources.join("package-lock.json")).unwrap(), home.join("made"));
    if !fs::read(&made).is_ok_and(|it| it == wanted) {
        for file in ["package.json", "package-lock.json"] {
            fs::copy(sources.join(file), home.join(file)).unwrap();
        }
        let args = ["ci", "--ignore-scripts", "--no-audit", "--no-fund"];
        make(Command::new("npm").args(args).current_dir(&home), "node and npm, and a registry");
        fs::write(made, wanted).unwrap();
    }
    home.join("node_modules")
});

/// A test that needs a client must fail without it, and not be skipped.
fn make(command: &mut Command, needs: &str) {
    let what = format!("{command:?}");
    let output = command.output();
    let output = output.unwrap_or_else(|error| panic!("{what}: {error}; this test needs {needs}"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {}; this test needs {needs}\n{said}", output.status);
}

fn rust(served: &Served, args: &[&str]) -> Running {
    let mut command = Command::new(&*RUST);
    command.args(args).env("HTTP_PROXY", format!("http://{}", served.address));
    for variable in ["NO_PROXY", "no_proxy", "http_proxy", "ALL_PROXY", "all_proxy"] {
        command.env_remove(variable);
    }
    Running::start_for(PATIENCE, command)
}

fn node(served: &Served, script: &str, conf: &str) -> Running {
    let sources = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/serve/node");
    let mut command = Command::new("node");
    command.arg(sources.join(script)).arg(conf).env("NODE_PATH", &*NODE);
    command.env("SERVE_PORT", served.address.rsplit_once(':').unwrap().1);
    Running::start_for(PATIENCE, command)
}

#[test]
fn the_other_sdks_do_everything_under_the_service_key_and_under_a_customers_key() {
    let mut served = Served::new();
    let (_, byok) = byok(&served.world);
    // The default KMS of a store is looked for at the start.
    served.stop();
    served.start();
    for conf in [service_key().to_string(), byok.to_string()] {
        for client in [rust(&served, &["life_cycle", &conf]), node(&served, "life_cycle.js", &conf)]
        {
            let out = client.finish();
            assert_eq!(out.status, Some(0), "{conf}: {}", out.stderr);
            assert_eq!(out.stdout, b"done\n", "{conf}");
        }
    }
    served.stop();
    served.world.ok(&["verify"]);
}

#[test]
fn a_disabled_key_refuses_the_sdk_for_rust_and_comes_back() {
    super::a_disabled_key_refuses("403 KmsKeyRevoked", |served, conf| {
        rust(served, &["revoked", conf])
    });
}

#[test]
fn a_disabled_key_refuses_the_sdk_for_node_and_comes_back() {
    super::a_disabled_key_refuses("KmsKeyRevoked", |served, conf| node(served, "revoked.js", conf));
}

/// A number from the environment, for a longer run.
fn number(variable: &str, default: usize) -> usize {
    env::var(variable).map_or(default, |text| text.parse().expect("a number"))
}

/// `ENVELOG_SERVE_KILLS` and `ENVELOG_SERVE_CLIENTS` make it a longer run.
#[test]
fn many_clients_lose_nothing_and_read_nothing_wrong_while_the_service_is_killed() {
    let (kills, clients) =
        (number("ENVELOG_SERVE_KILLS", 4), number("ENVELOG_SERVE_CLIENTS", 64).to_string());
    let mut served = Served::new();
    let (_, conf) = byok(&served.world);
    served.stop();
    served.start();
    let mut load = rust(&served, &["load", &conf.to_string(), &clients, &clients]);
    let lines = load.lines();
    assert_eq!(next(&lines), "ready");
    for _ in 0..kills {
        // Each of these lines stands for 200 acknowledged groups.
        for _ in 0..2 {
            next(&lines);
        }
        served.kill();
        served.start();
    }
    next(&lines);
    drop(load.stdin.take());
    let summary = lines.iter().last().unwrap_or_default();
    load.wait().assert(0);
    let summary: serde_json::Value = serde_json::from_str(&summary).unwrap();
    println!("{kills} kills, {clients} producers, {clients} consumers: {summary}");
    let count = |name: &str| summary[name].as_u64().unwrap();
    assert!(count("acknowledged") >= 400 * kills as u64, "{summary}");
    // Each kill interrupts puts.
    assert!(count("unanswered") >= kills as u64, "{summary}");
    assert!(count("stored") >= count("acknowledged"), "{summary}");
    served.stop();
    served.world.ok(&["verify"]);
}
