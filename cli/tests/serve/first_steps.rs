//! The first steps in docs/service.md, as they are written there.

use std::{env, fs, net::TcpStream, path::Path, process::Command};

use super::{PATIENCE, Running, common::World};

const DOCS: &str = include_str!("../../../docs/service.md");
/// Takes minutes, and the tests have a build already.
const INSTALL: &str = "cargo install --path cli --features serve\n";
/// So that a new release of the SDK changes no test.
const PINNED: &str = "aliyun-log-python-sdk==0.9.52\n";

/// The first block of code of this language in the section.
fn block(language: &str) -> &'static str {
    let section = DOCS.split_once("\n## From a fresh machine").unwrap().1;
    let block = section.split_once(&format!("\n```{language}\n")).unwrap().1;
    block.split_once("```").unwrap().0
}

#[test]
fn five_commands_lead_to_a_program_that_writes_and_reads_under_its_own_key() {
    let commands = block("sh");
    assert_eq!(commands.lines().count(), 5);
    let commands = commands.strip_prefix(INSTALL).expect("the first command installs envelog");
    assert!(TcpStream::connect("127.0.0.1:8099").is_err(), "something else uses the port 8099");
    let world = World::new();
    world.file("first.py", block("python"));
    let pinned = world.file("pinned", PINNED);
    let bin = Path::new(env!("CARGO_BIN_EXE_envelog")).parent().unwrap();
    let mut path = bin.as_os_str().to_owned();
    path.push(":");
    path.push(env::var_os("PATH").unwrap());
    let script = format!("set -e\ntrap 'kill $!; wait $!' EXIT\n{commands}");
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).current_dir(world.path(""));
    shell.env("PATH", path).env("PIP_CONSTRAINT", pinned);
    for (variable, _) in env::vars_os() {
        if variable.to_string_lossy().starts_with("ENVELOG_") {
            shell.env_remove(variable);
        }
    }
    let out = Running::start_for(PATIENCE, shell).finish();
    out.assert(0);
    let last = out.text().lines().last().unwrap_or_default().to_owned();
    assert!(last.contains("order 17 paid"), "{}", out.text());
    // The key is the customer's: the logs are closed without it.
    let key = fs::read_to_string(world.path("cmk")).unwrap();
    world.ok(&["verify"]);
    world.ok(&["kms", "disable", key.trim()]);
    world.refused(3, &["read", "shop/orders"]);
}
