//! The runbook of `docs/operations.md` and the systemd units: the commands work as written, and the
//! units are valid.

// systemd, named pipes and `/proc`.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    io::Write,
    os::{fd::AsFd, unix::fs::PermissionsExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use common::{Running, World, copy_dir, service};

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

fn operations() -> String {
    fs::read_to_string(repository().join("docs/operations.md")).unwrap()
}

/// The blocks of the runbook that are marked `sh`.
fn blocks(text: &str) -> Vec<&str> {
    let (_, runbook) = text.split_once("\n## Runbook\n").unwrap();
    let blocks = runbook.split("\n```sh\n").skip(1);
    blocks.map(|block| block.split_once("\n```").unwrap().0).collect()
}

#[test]
fn the_commands_of_the_runbook_work() {
    let world = World::new();
    let root = world.path("root");
    for dir in ["etc/envelog", "srv/envelog", "var/lib/envelog/main", "var/lib/envelog-keys/main"] {
        let dir = root.join(dir);
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).unwrap();
    }
    let text = operations();
    let blocks = blocks(&text);
    assert!(blocks.len() >= 10, "{blocks:?}");
    let mut script = "set -euo pipefail\n".to_owned();
    for (number, block) in blocks.iter().enumerate() {
        script.push_str(&format!("echo 'block {number}' >&2\n{block}\n"));
    }
    let at = |path: &str| root.join(path).to_str().unwrap().to_owned();
    for dir in ["/etc/envelog", "/srv/envelog", "/var/lib/envelog"] {
        script = script.replace(dir, &at(&dir[1..]));
    }
    let script = script.replace("sudo -u envelog envelog", env!("CARGO_BIN_EXE_envelog"));
    assert!(!script.contains("sudo"));
    let mut command = Command::new("bash");
    let inherited = std::env::vars_os().map(|(variable, _)| variable);
    for variable in inherited.filter(|one| one.to_string_lossy().starts_with("ENVELOG_")) {
        command.env_remove(variable);
    }
    command.args(["-c", &script]).current_dir(world.path(""));
    let out = Running::start(command).finish();
    let stdout = String::from_utf8_lossy(&out.stdout);
    assert_eq!(out.status, Some(0), "{script}\n{stdout}\n{}", out.stderr);
    assert!(stdout.contains("order 3"), "{stdout}");
}

/// The metrics in the table of alerts are metrics of the engine.
#[test]
fn the_metrics_of_the_runbook_exist() {
    let text = operations();
    let (_, runbook) = text.split_once("\n### Monitor\n").unwrap();
    let (runbook, _) = runbook.split_once("\n### Rotate\n").unwrap();
    let named = runbook.split('`').filter(|word| word.starts_with("envelog_"));
    let source = fs::read_to_string(repository().join("src/metrics/prometheus.rs")).unwrap();
    let mut count = 0;
    for metric in named {
        let name = metric.trim_start_matches("envelog_").trim_end_matches("_total");
        assert!(source.contains(&format!("\"{name}\"")), "{metric}");
        count += 1;
    }
    assert!(count >= 10);
}

/// The units, with the path of the binary under test.
fn units(world: &World) -> PathBuf {
    let dir = world.path("units");
    copy_dir(&repository().join("contrib/systemd"), &dir);
    for entry in fs::read_dir(&dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            let unit = fs::read_to_string(&path).unwrap();
            let unit = unit.replace("/usr/bin/envelog", env!("CARGO_BIN_EXE_envelog"));
            fs::write(&path, unit).unwrap();
        }
    }
    dir
}

#[test]
fn the_units_are_valid_and_confined() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        eprintln!("NOT RUN: there is no systemd-analyze (Debian: the package systemd)");
        return;
    }
    let world = World::new();
    let dir = units(&world);
    let names: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
        .filter(|name| name.contains('@'))
        .map(|name| name.replace('@', "@main"))
        .collect();
    assert_eq!(names.len(), 6, "{names:?}");
    let paths: Vec<_> = names.iter().map(|name| dir.join(name)).collect();
    let verified =
        Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&paths).output().unwrap();
    let said = String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success(), "{said}");
    assert!(!said.contains("envelog"), "{said}");
    for path in paths.iter().filter(|path| path.extension().is_some_and(|it| it == "service")) {
        // The exposure is at most 2.0 of 10: nothing but the network is open.
        let security = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--threshold=20"])
            .arg(path)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&security.stdout);
        assert!(security.status.success(), "{}: {said}", path.display());
    }
}

/// The service appends from a named pipe that stays open, as systemd opens it, and stores every line
/// before it ends.
#[test]
fn the_service_appends_from_a_pipe_until_it_is_stopped() {
    let world = World::new();
    world.ok(&["create", "p/l", "--encrypt-conf", &service("default").to_string()]);
    let path = world.path("main.fifo");
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    let mut pipe = fs::File::options().read(true).write(true).open(&path).unwrap();
    let command = world.command(&["append", "p/l"]);
    let input = Stdio::from(pipe.as_fd().try_clone_to_owned().unwrap());
    let running = Running::start_reading(command, input);
    pipe.write_all(b"one\ntwo\n").unwrap();
    let began = Instant::now();
    while world.read("p/l") != b"one\ntwo\n" {
        assert!(began.elapsed() < Duration::from_secs(60));
        thread::sleep(Duration::from_millis(50));
    }
    pipe.write_all(b"three\n").unwrap();
    thread::sleep(Duration::from_millis(200));
    running.terminate();
    running.wait().assert(0);
    assert_eq!(world.read("p/l"), b"one\ntwo\nthree\n");
}
