//! Resource limits from the kernel: no file descriptors left, a full disk, a read-only directory,
//! and a file truncated while it is read. The simulated disk covers more cases of each.

// Mount tables and `ulimit -n` as on Linux.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeSet,
    fs,
    io::{Read, Write},
    process::{Command, Output, Stdio},
};

use common::{Running, World, byok, made_lines, service};
use serde_json::{Value, json};

/// Appends the command to the arguments of a wrapper command.
fn through(wrapper: &[&str], command: &Command) -> Command {
    let mut outer = Command::new(wrapper[0]);
    outer.args(&wrapper[1..]).arg(command.get_program()).args(command.get_args());
    for (variable, value) in command.get_envs() {
        match value {
            Some(value) => outer.env(variable, value),
            None => outer.env_remove(variable),
        };
    }
    outer.current_dir(command.get_current_dir().unwrap());
    outer
}

/// With any limit on open files, a command succeeds or reports the limit, and acknowledged lines
/// are present exactly once.
#[test]
fn without_file_descriptors_it_says_so_and_loses_nothing() {
    let world = World::new();
    let names = ["p/service", "p/byok"];
    world.ok(&[
        "create",
        names[0],
        "--shards",
        "8",
        "--encrypt-conf",
        &service("default").to_string(),
    ]);
    let conf = byok("sm4", &world.create_key()).to_string();
    world.ok(&["create", names[1], "--shards", "8", "--encrypt-conf", &conf]);
    let (mut sent, mut acknowledged) = (BTreeSet::new(), [BTreeSet::new(), BTreeSet::new()]);
    let (mut done, mut refused) = (0, 0);
    for descriptors in 4..=24 {
        let limit = format!("ulimit -n {descriptors} && exec \"$0\" \"$@\"");
        let mut limited = |args: &[&str]| {
            let out = Running::start(through(&["sh", "-c", &limit], &world.command(args))).finish();
            match out.status {
                Some(0) => done += 1,
                // The KMS is a directory here, so without descriptors it is unreachable.
                Some(status @ (1 | 4)) => {
                    let said = out.sentence(status);
                    assert!(
                        said.contains("Too many open files"),
                        "{descriptors}, {args:?}: {said}"
                    );
                    refused += 1;
                }
                // The dynamic loader could not open its libraries.
                Some(127) => assert!(descriptors < 6, "{descriptors}, {args:?}: {}", out.stderr),
                status => panic!("{descriptors}, {args:?}: {status:?}: {}", out.stderr),
            }
            out
        };
        // Each line is its own group. Groups go to the shards in turn, and each shard has an open
        // file.
        let lines: Vec<String> = (0..16).map(|n| format!("{descriptors} {n}")).collect();
        let file = world.file("lines", lines.join("\n"));
        for (name, acknowledged) in names.into_iter().zip(&mut acknowledged) {
            let out = limited(&["append", name, &file, "--group-bytes", "1", "--ack"]);
            let count = out.text().lines().last().map_or(0, |line| line.parse().unwrap());
            assert!(count == lines.len() || out.status != Some(0));
            acknowledged.extend(lines[..count].iter().cloned());
            let out = limited(&["read", name, "--format", "raw"]);
            assert!(
                out.status != Some(0) || out.text().lines().count() >= acknowledged.len(),
                "{descriptors}"
            );
        }
        sent.extend(lines);
    }
    assert!(refused > 10 && done > 10, "{refused} refused, {done} done");
    world.ok(&["verify"]);
    for (name, acknowledged) in names.into_iter().zip(acknowledged) {
        let read = String::from_utf8(world.read(name)).unwrap();
        let found: BTreeSet<String> = read.lines().map(str::to_owned).collect();
        assert_eq!(found.len(), read.lines().count(), "a line is there twice");
        assert!(found.is_superset(&acknowledged) && found.is_subset(&sent), "{found:?}");
    }
}

/// Runs a script, with the binary as `$0`, in its own mount namespace, where it may mount. If the
/// system does not permit that, returns `None` and prints a note, bypassing the capture of the test
/// harness.
fn with_own_mounts(world: &World, script: &str) -> Option<String> {
    let run = |script: &str| -> Output {
        let wrapper = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-euc", script];
        through(&wrapper, &world.command::<&str>(&[])).stdin(Stdio::null()).output().unwrap()
    };
    fs::create_dir_all(world.path("mnt")).unwrap();
    if !run("mount -t tmpfs -o size=64k none mnt").status.success() {
        let note = "NOT RUN: this system does not allow mounts in a user namespace (unshare --user --mount)\n";
        std::io::stderr().write_all(note.as_bytes()).unwrap();
        return None;
    }
    let output = run(script);
    let (said, errors) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{said}{errors}");
    Some(said)
}

/// The whole life of a store on a file system of 2 MiB that fills up and is then freed again.
#[test]
fn on_a_disk_that_is_really_full_nothing_acknowledged_is_lost() {
    let world = World::new();
    let lines = made_lines(4000);
    world.file("lines", &lines);
    let script = r#"
        mount -t tmpfs -o size=2m none mnt
        cd mnt
        "$0" create p/a --compression none --encrypt-conf '{"enable":true,"encrypt_type":"default"}'
        head -c 600000 /dev/zero > ballast
        done=0
        while "$0" append p/a ../lines > acks 2> said; do done=$((done + 1)); done
        echo "acknowledged $done"
        cat said
        "$0" create p/b 2>> said || cat said
        "$0" read p/a --format raw > ../read
        rm ballast
        "$0" append p/a ../lines
        "$0" verify > /dev/null
        "$0" read p/a --format raw > ../read-later
    "#;
    let Some(said) = with_own_mounts(&world, script) else { return };
    let done: usize = said
        .split("acknowledged ")
        .nth(1)
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!(done >= 2 && said.contains("No space left on device"), "{said}");
    let (read, later) =
        (fs::read(world.path("read")).unwrap(), fs::read(world.path("read-later")).unwrap());
    let expected = lines.repeat(done);
    assert!(read.starts_with(&expected), "{} of {} bytes", read.len(), expected.len());
    assert!(
        later.starts_with(&read) && later.ends_with(&lines),
        "{} bytes, then {}",
        read.len(),
        later.len()
    );
    // Of a refused append, only whole groups may be present.
    let rest = &later[expected.len()..later.len() - lines.len()];
    assert!(
        lines.starts_with(rest) && (rest.is_empty() || rest.ends_with(b"\n")),
        "{} bytes",
        rest.len()
    );
}

/// A file system without a free page and without a free inode: the commands that free space work.
#[test]
fn a_full_disk_is_freed_by_the_program_itself() {
    let world = World::new();
    let lines = made_lines(1000);
    world.file("lines", &lines);
    let script = r#"
        mount -t tmpfs -o size=5m,nr_inodes=100 none mnt
        cd mnt
        encrypted='{"enable":true,"encrypt_type":"default"}'
        "$0" create p/kept
        "$0" create p/limited --retention-bytes 64KiB --compression none
        "$0" create p/shredded --encrypt-conf "$encrypted"
        "$0" create p/deleted --encrypt-conf "$encrypted"
        for name in kept limited shredded deleted; do "$0" append p/$name ../lines > /dev/null; done
        "$0" keys rotate-data p/shredded
        "$0" append p/shredded ../lines > /dev/null
        # The largest part of the pages, then the last ones, and all inodes.
        head -c 8000000 /dev/zero > ballast 2> /dev/null || true
        n=0
        while touch inode-$n 2> /dev/null; do n=$((n + 1)); done
        while echo x >> ballast; do :; done 2> /dev/null
        df -k --output=avail . | tail -1 | sed 's/^ */free pages: /'
        df --output=iavail . | tail -1 | sed 's/^ */free inodes: /'
        "$0" append p/kept ../lines --json 2> ../said && echo "appended" || echo "append: $?"
        cat ../said
        "$0" keys shred p/shredded --version 1 --yes
        "$0" retain
        "$0" repair p/kept --shard 0 --yes
        "$0" delete p/deleted --yes
        "$0" read p/kept --format raw > ../read-on-the-full-disk
        "$0" verify > /dev/null
        rm ballast inode-*
        "$0" append p/kept ../lines > /dev/null
        "$0" read p/kept --format raw > ../read
        "$0" status --json
    "#;
    let Some(said) = with_own_mounts(&world, script) else { return };
    assert!(said.contains("free pages: 0\n") && said.contains("free inodes: 0\n"), "{said}");
    assert!(said.contains("append: 1\n") && said.contains("\"code\":\"disk_full\""), "{said}");
    let status: Value = serde_json::from_str(&said[said.find("\n{\n").unwrap()..]).unwrap();
    let whole = json!({"bytes": 1 << 20, "wanted_bytes": 1 << 20, "inodes": 4, "wanted_inodes": 4});
    assert_eq!(status["reserve"], whole);
    let [read, later] =
        ["read-on-the-full-disk", "read"].map(|name| fs::read(world.path(name)).unwrap());
    assert!(read.starts_with(&lines), "{} bytes", read.len());
    assert_eq!(later, [read, lines].concat());
}

#[test]
fn what_is_mounted_read_only_can_be_read_and_is_not_written() {
    let world = World::new();
    world.create("p/a", &service("sm4"));
    let lines = made_lines(100);
    world.ok(&["append", "p/a", &world.file("lines", &lines)]);
    let script = r#"
        mount --bind . mnt
        mount -o remount,ro,bind mnt
        cd mnt
        "$0" list
        "$0" status p/a > /dev/null
        "$0" read p/a --format raw | cmp - lines
        "$0" verify > /dev/null
        for command in "append p/a lines" "create p/b" "keys rotate-data p/a" "delete p/a --yes"; do
            if "$0" $command 2> /dev/shm/said-$$; then echo "$command was done"; else echo "status $?"; fi
            cat /dev/shm/said-$$
        done
        rm /dev/shm/said-$$
    "#;
    let Some(said) = with_own_mounts(&world, script) else { return };
    assert_eq!(said.matches("status 1\n").count(), 4, "{said}");
    assert_eq!(said.matches("Read-only file system").count(), 4, "{said}");
    assert_eq!(world.read("p/a"), lines);
}

/// If the file is truncated, the reader gets an error and does not crash.
#[test]
fn a_file_that_is_cut_short_under_a_reader_is_an_error() {
    let world = World::new();
    world.ok(&["create", "p/a", "--compression", "none"]);
    let lines = made_lines(200_000);
    world.ok(&["append", "p/a", &world.file("lines", &lines)]);
    let segment = world.segments("envelog-data").remove(0);
    let len = fs::metadata(&segment).unwrap().len();
    let mut reading = Running::start(world.command(&["read", "p/a", "--format", "raw"]));
    // The reader is in the middle of the file and waits for this pipe.
    let (mut stdout, mut read) = (reading.stdout.take().unwrap(), vec![0; 1000]);
    stdout.read_exact(&mut read).unwrap();
    fs::OpenOptions::new().write(true).open(&segment).unwrap().set_len(len / 3).unwrap();
    stdout.read_to_end(&mut read).unwrap();
    reading.finish().sentence(5);
    assert!(
        lines.starts_with(&read) && read.len() < lines.len() / 2,
        "{} of {} bytes",
        read.len(),
        lines.len()
    );
}
