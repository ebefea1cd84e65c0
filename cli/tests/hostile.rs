//! Hostile names, logs and files: escape sequences, links and pipes in place of files, and core
//! dumps.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    ffi::{OsStr, OsString},
    fs::{self, File, OpenOptions},
    io::{Read, Write},
    os::unix::{
        ffi::{OsStrExt, OsStringExt},
        fs::{PermissionsExt, symlink},
    },
    path::Path,
    process::{Command, Stdio},
    thread,
};

use common::{Running, World, byok, made_lines, service};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;

/// Characters that control a terminal, as names and logs may contain them: C0, DEL, C1 as a
/// character, and a change of direction.
const EVIL: &str = "e\x1b]0;x\x07\x1b[2Jv\x7f\u{9b}31mi\u{202e}\u{2066}l";
/// The escaped form of [`EVIL`].
const SHOWN: &str = r"e\x1b]0;x\x07\x1b[2Jv\x7f\u{9b}31mi\u{202e}\u{2066}l";

/// A pseudo terminal: the program's end and the user's end.
fn terminal() -> (File, File) {
    let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&user).unwrap();
    unlockpt(&user).unwrap();
    let name = ptsname(&user, Vec::new()).unwrap();
    let program = OpenOptions::new()
        .read(true)
        .write(true)
        .open(Path::new(std::ffi::OsStr::from_bytes(name.to_bytes())));
    (program.unwrap(), user.into())
}

/// The streams that are a terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    Both,
    Out,
    Err,
}

/// Runs a command on a terminal. Returns its status, the terminal output, and the output of the
/// other stream.
fn on_terminal(mut command: Command, shown: Shown) -> (i32, Vec<u8>, Vec<u8>) {
    let (program, mut user) = terminal();
    let (mut reader, writer) = std::io::pipe().unwrap();
    let stream = |is_shown| {
        if is_shown {
            Stdio::from(program.try_clone().unwrap())
        } else {
            Stdio::from(writer.try_clone().unwrap())
        }
    };
    command
        .stdin(Stdio::null())
        .stdout(stream(shown != Shown::Err))
        .stderr(stream(shown != Shown::Out));
    let mut child = command.spawn().unwrap();
    // Drop our copies of the program's ends: reading ends only when all of them are closed.
    drop((command, program, writer));
    let reading = thread::spawn(move || {
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        // On Linux, reading a terminal fails when no process has its other end open.
        while let Ok(read @ 1..) = user.read(&mut chunk) {
            text.extend_from_slice(&chunk[..read]);
        }
        text
    });
    let mut piped = Vec::new();
    reader.read_to_end(&mut piped).unwrap();
    let status = child.wait().unwrap().code().unwrap();
    (status, reading.join().unwrap(), piped)
}

/// Fails if the text contains control characters other than newline and tab.
fn assert_harmless(text: &[u8], what: &str) {
    let text =
        std::str::from_utf8(text).unwrap_or_else(|error| panic!("{what}: {error}: {text:?}"));
    let harmful = |c: char| {
        (c.is_control() && !matches!(c, '\n' | '\r' | '\t'))
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    assert!(!text.contains(harmful), "{what}: {text:?}");
}

#[test]
fn no_name_and_no_log_commands_the_terminal() {
    let world = World::new();
    let store = format!("store {EVIL}");
    // Lines that end in the middle of a character, and C1 as a raw byte.
    let logs = [EVIL.as_bytes(), b"\nraw \x9b2J\x9d0;x\x9c \xe2\x80\nwith\ttab\r\n"].concat();
    let file = world.file(EVIL, &logs);
    let out = |name: &str| format!("{name} {EVIL}");
    let base = |args: &[&str]| {
        [args, &["--store", &*store]].concat().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    world.ok(&base(&["create", "p/a", "--encrypt-conf", &service("sm4").to_string()]));
    world.ok(&base(&["append", "p/a", &file]));
    let key = String::from_utf8(world.ok(&base(&[
        "kms",
        "create-key",
        "--region",
        "cn-hangzhou",
        "--grant",
        EVIL,
    ])))
    .unwrap();
    fs::create_dir(world.path(&store).join("audit/audit-000002.log")).unwrap();
    let segment = world.segments(&store)[0].clone();
    let named = world.path(&out("segment"));
    fs::copy(segment, &named).unwrap();
    let missing = out("nowhere");
    let mut conf = byok("sm4", EVIL);
    conf["user_cmk_info"]["arn"] = EVIL.into();
    let conf = conf.to_string();
    let (checkpoint, backup, audit) = (out("checkpoint"), out("backup"), out("audit"));
    let commands: Vec<(Vec<&str>, i32, bool)> = vec![
        (vec!["read", "p/a"], 0, true),
        (vec!["read", "p/a", "--json"], 0, false),
        (vec!["tail", "p/a"], 0, true),
        (vec!["tail", "p/a", "--json"], 0, false),
        (vec!["kms", "list"], 0, true),
        (vec!["kms", "list", "--json"], 0, false),
        (vec!["verify"], 0, true),
        (vec!["verify", "--json"], 0, false),
        (vec!["inspect", named.to_str().unwrap()], 0, true),
        (vec!["inspect", named.to_str().unwrap(), "--json"], 0, false),
        (vec!["checkpoint", "--out", &*checkpoint], 0, true),
        (vec!["checkpoint", "--out", &*checkpoint], 1, true),
        (vec!["checkpoint", "--out", &*checkpoint, "--json"], 1, false),
        (vec!["keys", "backup", "--out", &*backup], 0, true),
        (vec!["keys", "audit", "--out", &*audit], 0, true),
        (vec!["keys", "audit"], 0, false),
        (vec!["keys", "rotate-service"], 0, true),
        (vec!["status"], 0, false),
        (vec!["-v", "verify"], 0, true),
        (vec!["create", "p/b", "--encrypt-conf", &*conf], 3, false),
        (vec!["get", EVIL], 6, false),
        (vec!["append", "p/a", &*missing], 1, true),
        (vec!["inspect", &*missing], 1, true),
        (vec!["verify", "--against", &*missing], 1, true),
        (vec!["read", "p/a", "--from", EVIL], 2, false),
        (vec!["read", "p/a", "--from", "\x1b[2J\x1b]0;x\x07"], 2, false),
        (vec!["kms", "grant", key.trim(), EVIL], 0, false),
        (vec!["kms", "disable", EVIL], 1, false),
        (vec!["list", EVIL], 2, false),
    ];
    for (args, status, is_shown) in commands {
        let mut command = world.command(&base(&args));
        command.env("NO_COLOR", "1");
        let (ended, text, _) = on_terminal(command, Shown::Both);
        let what = format!("{args:?}: {}", String::from_utf8_lossy(&text));
        assert_eq!(ended, status, "{what}");
        assert_harmless(&text, &what);
        assert!(!text.is_empty(), "{what}");
        // The sequence is escaped, not removed. A table may break it across lines.
        assert!(!is_shown || String::from_utf8_lossy(&text).contains(r"\x1b]0;x"), "{what}");
    }
    // With colours enabled, all escape sequences must be our own.
    for args in [
        &["kms", "list"][..],
        &["status"],
        &["verify", "--keyless"],
        &["list", EVIL],
        &["list", "\x1b[2J\x1b]0;x\x07"],
    ] {
        let (_, text, _) = on_terminal(world.command(&base(args)), Shown::Both);
        let text = String::from_utf8_lossy(&text);
        assert!(!text.contains("\x1b]") && !text.contains("\x1b[2J"), "{args:?}: {text:?}");
    }
}

#[test]
fn a_terminal_gets_escaped_lines_and_a_pipe_every_byte() {
    let world = World::new();
    let logs = [EVIL.as_bytes(), b"\nraw \x9b2J \xc3\xa9 \xe2\x80\nwith\ttab\r\n"].concat();
    world.create("p/a", &service("default"));
    world.ok(&["append", "p/a", &world.file("lines", &logs)]);
    assert_eq!(world.read("p/a"), logs);
    // Only the stream that is a terminal gets escapes.
    let (_, _, piped) = on_terminal(world.command(&["read", "p/a", "--format", "raw"]), Shown::Err);
    assert_eq!(piped, logs);
    for command in ["read", "tail"] {
        let (_, text, _) =
            on_terminal(world.command(&[command, "p/a", "--format", "raw"]), Shown::Out);
        let expected = format!("{SHOWN}\r\nraw \\x9b2J é \\xe2\\x80\r\nwith\ttab\\x0d\r\n");
        assert_eq!(String::from_utf8_lossy(&text), expected, "{command}");
    }
    let (_, text, _) = on_terminal(world.command(&["read", "p/a", "--json"]), Shown::Out);
    let first: serde_json::Value =
        serde_json::from_slice(text.split(|byte| *byte == b'\n').next().unwrap()).unwrap();
    assert_eq!(first["contents"]["content"], EVIL);
    let missing = format!("nowhere {EVIL}");
    let command = |args: &[&str]| world.command(&[&["inspect", &*missing], args].concat());
    let (_, text, _) = on_terminal(command(&[]), Shown::Err);
    assert!(String::from_utf8_lossy(&text).contains(SHOWN), "{text:?}");
    // A message is one harmless line in a file, too.
    let (_, shown, piped) = on_terminal(command(&[]), Shown::Out);
    assert!(shown.is_empty() && String::from_utf8(piped).unwrap().contains(SHOWN));
    let (_, text, _) = on_terminal(command(&["--json"]), Shown::Err);
    let error: serde_json::Value = serde_json::from_slice(&text).unwrap();
    assert!(error["error"]["message"].as_str().unwrap().contains(EVIL), "{error}");
}

/// Runs the program from a shell, after a setup command.
fn after(world: &World, first: &str, args: &[&str]) -> common::Out {
    let program = env!("CARGO_BIN_EXE_envelog");
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("{first}; exec \"$0\" \"$@\""), program])
        .args(args)
        .current_dir(world.path(""));
    Running::start(command).finish()
}

#[test]
fn files_for_the_user_are_new_files_of_the_user_alone() {
    let world = World::new();
    world.create("p/a", &service("default"));
    world.ok(&["append", "p/a", &world.file("lines", made_lines(10))]);
    let commands: [&[&str]; 3] =
        [&["checkpoint", "--out"], &["keys", "backup", "--out"], &["keys", "audit", "--out"]];
    for command in commands {
        for umask in ["000", "077", "277", "377"] {
            // A checkpoint writes to the store too, which these umasks prevent.
            if command[0] == "checkpoint" && umask != "000" && umask != "077" {
                continue;
            }
            after(&world, &format!("umask {umask}"), &[command, &["new"]].concat()).assert(0);
            let metadata = fs::metadata(world.path("new")).unwrap();
            assert_eq!(metadata.permissions().mode() & 0o7777, 0o600, "{command:?} under {umask}");
            assert!(metadata.len() > 0);
            fs::remove_file(world.path("new")).unwrap();
        }
        // The command overwrites no existing file and does not write through a link.
        fs::write(world.path("victim"), "precious").unwrap();
        symlink("victim", world.path("link")).unwrap();
        symlink("nowhere", world.path("dangling")).unwrap();
        fs::create_dir(world.path("directory")).unwrap();
        assert!(Command::new("mkfifo").arg(world.path("fifo")).status().unwrap().success());
        for there in ["victim", "link", "dangling", "directory", "fifo", "/dev/null", "/dev/full"] {
            let sentence = world.refused(1, &[command, &[there]].concat());
            assert!(sentence.contains("cannot create") && sentence.contains(there), "{sentence}");
        }
        assert_eq!(fs::read(world.path("victim")).unwrap(), b"precious");
        assert!(!world.path("nowhere").exists());
        // A partially written file is removed.
        if command[0] == "keys" {
            let out = after(&world, "trap '' XFSZ; ulimit -f 0", &[command, &["partial"]].concat());
            assert!(out.sentence(1).contains("cannot write"), "{}", out.stderr);
            assert!(!world.path("partial").exists());
        }
        for name in ["victim", "link", "dangling", "fifo"] {
            fs::remove_file(world.path(name)).unwrap();
        }
        fs::remove_dir(world.path("directory")).unwrap();
    }
}

#[test]
fn what_must_be_a_file_is_one_and_logs_may_come_through_a_pipe() {
    let world = World::new();
    world.create("p/a", &service("default"));
    world.ok(&["append", "p/a", &world.file("lines", made_lines(10))]);
    let fifo = world.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    fs::create_dir(world.path("directory")).unwrap();
    symlink("fifo", world.path("link")).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(world.path("socket")).unwrap();
    for there in ["fifo", "link", "directory", "socket", "/dev/zero", "/dev/null"] {
        let at = &*format!("@{there}");
        let all = [
            vec!["inspect", there],
            vec!["verify", "--against", there],
            vec!["keys", "audit", "--verify", "--against", there],
            vec!["update", "p/a", "--config", at],
            vec!["create", "p/b", "--encrypt-conf", at],
            vec!["keys", "rewrap-keyring", "--service-cmk", at],
        ];
        for command in all {
            let sentence = world.refused(1, &command);
            assert!(
                sentence.contains(&format!("{there} is not a regular file")),
                "{command:?}: {sentence}"
            );
        }
    }
    drop(socket);
    // A link to a regular file is accepted for reading.
    world.ok(&["checkpoint", "--out", "checkpoint"]);
    symlink("checkpoint", world.path("linked")).unwrap();
    world.ok(&["verify", "--against", "linked"]);
    let lines = made_lines(5);
    let writing = {
        let (fifo, lines) = (fifo.clone(), lines.clone());
        thread::spawn(move || {
            File::options().write(true).open(fifo).unwrap().write_all(&lines).unwrap()
        })
    };
    world.ok(&["append", "p/a", fifo.to_str().unwrap()]);
    writing.join().unwrap();
    assert_eq!(world.read("p/a"), [made_lines(10), lines].concat());
}

/// A core limit of zero does not apply where the system pipes core dumps to a program. If a process
/// is not dumpable at all, root owns its files in /proc, which the test checks.
#[cfg(target_os = "linux")]
#[test]
fn the_system_may_not_dump_its_memory() {
    use std::{
        os::unix::{fs::MetadataExt, process::CommandExt},
        time::{Duration, Instant},
    };
    let world = World::new();
    // Root owns the files of its own processes anyway, so another user runs the program.
    let program = world.path("envelog");
    fs::copy(env!("CARGO_BIN_EXE_envelog"), &program).unwrap();
    fs::set_permissions(world.path(""), fs::Permissions::from_mode(0o755)).unwrap();
    let is_root = rustix::process::getuid().is_root();
    let user = if is_root { 65_534 } else { rustix::process::getuid().as_raw() };
    let start = |program: &Path, args: &[&str]| {
        let mut command = Command::new(program);
        command.args(args).current_dir("/");
        if is_root {
            command.uid(user).gid(user);
        }
        Running::start(command)
    };
    let owner =
        |running: &Running| fs::metadata(format!("/proc/{}/stat", running.id())).unwrap().uid();
    // This process waits for its configuration on standard input.
    let running =
        start(&program, &["create", "p/a", "--store", "/nonexistent/store", "--encrypt-conf", "-"]);
    let begun = Instant::now();
    while owner(&running) != 0 && begun.elapsed() < Duration::from_secs(20) {
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(owner(&running), 0);
    let limits = fs::read_to_string(format!("/proc/{}/limits", running.id())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    running.kill();
    // Counter-check: a dumpable process has files of its user.
    let other = start(Path::new("/bin/cat"), &[]);
    assert_eq!(owner(&other), user);
    other.kill();
}

/// A path need not be UTF-8. JSON output replaces the invalid bytes, and the command does not fail.
#[test]
fn json_takes_any_path() {
    let world = World::new();
    let store = world.path("").join(std::ffi::OsStr::from_bytes(b"s\xff"));
    let out = |name: &str| {
        world.path("").join(std::ffi::OsStr::from_bytes(&[name.as_bytes(), b"\xff"].concat()))
    };
    let run = |args: &[&OsStr]| {
        let mut command = world.command(&["--json"]);
        let output =
            command.arg("--store").arg(&store).args(args).stdin(Stdio::null()).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let text = |text| OsStr::new(text);
    run(&[text("create"), text("p/a")]);
    let lines = world.file("lines", "one\n");
    run(&[text("append"), text("p/a"), text(&lines)]);
    assert!(run(&[text("status")])["store"].as_str().unwrap().ends_with("s\u{fffd}"));
    for (command, key) in [
        (&["keys", "backup"][..], "keyring"),
        (&["keys", "audit"], "audit"),
        (&["checkpoint"], "checkpoint"),
    ] {
        let out = out(&command.join("-"));
        let args: Vec<_> =
            command.iter().map(|word| text(word)).chain([text("--out"), out.as_os_str()]).collect();
        assert!(run(&args)[key].as_str().unwrap().ends_with('\u{fffd}'), "{command:?}");
        assert!(out.exists());
    }
    let mut logstores = fs::read_dir(store.join("logstores")).unwrap();
    let shard = logstores.next().unwrap().unwrap().path().join("shard-0000");
    let segment = fs::read_dir(&shard).unwrap().next().unwrap().unwrap().path();
    assert!(
        run(&[text("inspect"), segment.as_os_str()])["file"]
            .as_str()
            .unwrap()
            .contains("s\u{fffd}")
    );
    fs::create_dir(shard.join(std::ffi::OsStr::from_bytes(b"stray\xff"))).unwrap();
    let left = &run(&[text("delete"), text("p/a"), text("--yes")])["left"];
    assert!(left[0].as_str().unwrap().ends_with("stray\u{fffd}"), "{left}");
}

/// The memory that `inspect` uses does not grow with the number of blocks.
#[test]
fn a_file_of_many_blocks_is_inspected_in_little_memory() {
    use envelog::inspect::{BlockHeader, BlockKind, Compression, SegmentHeader};
    const BLOCKS: u32 = 150_000;
    let world = World::new();
    world.create("p/a", &service("default"));
    world.ok(&["append", "p/a", &world.file("lines", "one\n")]);
    let bytes = fs::read(&world.segments("envelog-data")[0]).unwrap();
    let body_start = SegmentHeader::decode(&bytes).unwrap().body_start as usize;
    let first = BlockHeader::decode(&bytes[body_start..]).unwrap();
    let mut file = bytes[..body_start].to_vec();
    for number in 0..BLOCKS {
        let header = BlockHeader {
            kind: BlockKind::Opaque,
            compression: Compression::None,
            number,
            payload_len: 8,
            raw_len: 8,
            group_count: 1,
            log_count: 0,
            list_len: 4,
            ..first
        };
        let block = [&header.encode()[..], &[0; 8], &[0; 16]].concat();
        file.extend_from_slice(&block);
        file.extend_from_slice(&crc32fast::hash(&block).to_le_bytes());
    }
    let path = world.file("many", file);
    let mut limited = Command::new("sh");
    // The limit is in KiB of address space. A table of all blocks would need several times as much.
    limited.args([
        "-c",
        "ulimit -v 200000; exec \"$@\"",
        "sh",
        env!("CARGO_BIN_EXE_envelog"),
        "inspect",
        &path,
    ]);
    let output = limited.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.matches(" opaque ").count(), BLOCKS as usize);
}

/// Sets the width of a terminal, in columns.
fn set_width(terminal: &File, columns: u16) {
    let mut size = rustix::termios::tcgetwinsize(terminal).unwrap();
    (size.ws_col, size.ws_row) = (columns, 50);
    rustix::termios::tcsetwinsize(terminal, size).unwrap();
}

/// The output of a command on a terminal of this width.
fn on_width(mut command: Command, columns: u16) -> String {
    let (program, mut user) = terminal();
    set_width(&user, columns);
    command.stdin(Stdio::null()).stdout(program.try_clone().unwrap()).stderr(program);
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut text = Vec::new();
    let mut chunk = [0; 4096];
    while let Ok(read @ 1..) = user.read(&mut chunk) {
        text.extend_from_slice(&chunk[..read]);
    }
    assert!(child.wait().unwrap().success());
    String::from_utf8(text).unwrap()
}

#[test]
fn without_colours_a_table_keeps_the_width_of_the_terminal() {
    let world = World::new();
    world.create("p/a", &service("default"));
    let widest = |text: &str| text.lines().map(|line| line.trim_end().chars().count()).max();
    for columns in [60, 110, 200] {
        let mut plain = world.command(&["status"]);
        plain.env("NO_COLOR", "1");
        let plain = on_width(plain, columns);
        let mut empty = world.command(&["status"]);
        empty.env("NO_COLOR", "").env("TERM", "xterm");
        let coloured = on_width(empty, columns);
        assert!(!plain.contains('\x1b'), "{plain}");
        assert!(widest(&plain) <= Some(columns.into()), "{columns}: {plain}");
        // An empty variable does not count.
        assert!(coloured.contains('\x1b'), "{coloured}");
        let mut bare = String::new();
        let mut rest = coloured.as_str();
        while let Some((before, after)) = rest.split_once('\x1b') {
            bare += before;
            rest = after.split_once('m').unwrap().1;
        }
        assert_eq!(plain, bare + rest, "{columns}");
    }
}

/// Every command works on paths that are not UTF-8, also with JSON, where such bytes are replaced.
#[cfg(target_os = "linux")]
#[test]
fn paths_need_not_be_utf_8() {
    let world = World::new();
    let name = |text: &str| OsString::from_vec([text.as_bytes(), b"-\xff\xfe"].concat());
    let run = |args: &[&OsStr]| {
        let globals = [
            ("--store", name("store")),
            ("--keyring", name("keyring")),
            ("--kms-dir", name("kms")),
            ("--anchor", name("anchor")),
        ];
        let mut command = world.command(args);
        for (option, value) in &globals {
            command.arg(option).arg(value);
        }
        command.arg("--json");
        let out = Running::start(command).finish();
        out.assert(0);
        assert_eq!(out.stderr, "", "{args:?}");
        String::from_utf8(out.stdout).unwrap()
    };
    fs::create_dir(world.path("").join(name("anchor"))).unwrap();
    let file = |text: &str, bytes: &[u8]| {
        let name = name(text);
        fs::write(world.path("").join(&name), bytes).unwrap();
        name
    };
    let at = |name: &OsStr| OsString::from_vec([b"@", name.as_bytes()].concat());
    let lines = file("lines", &made_lines(10));
    let conf = file("conf", service("sm4").to_string().as_bytes());
    run(&[OsStr::new("create"), OsStr::new("p/a"), OsStr::new("--encrypt-conf"), &at(&conf)]);
    run(&[OsStr::new("append"), OsStr::new("p/a"), &lines]);
    let config = file("config", run(&[OsStr::new("get"), OsStr::new("p/a")]).as_bytes());
    run(&[OsStr::new("update"), OsStr::new("p/a"), OsStr::new("--config"), &at(&config)]);
    assert!(run(&[OsStr::new("read"), OsStr::new("p/a")]).contains("lines-\u{fffd}\u{fffd}"));
    for command in ["list", "status", "verify", "settings", "retain"] {
        let said = run(&[OsStr::new(command)]);
        assert!(!matches!(command, "status" | "settings") || said.contains('\u{fffd}'), "{said}");
    }
    for command in [["checkpoint", "--out"], ["keys backup", "--out"], ["keys audit", "--out"]] {
        let out = name(&command[0].replace(' ', "-"));
        let words = command[0].split(' ').map(OsStr::new).chain([OsStr::new(command[1])]);
        let said = run(&words.chain([&*out]).collect::<Vec<_>>());
        assert!(said.contains('\u{fffd}'), "{said}");
    }
    run(&[OsStr::new("verify"), OsStr::new("--against"), &name("checkpoint")]);
    let mut segments = world.segments(".");
    segments.retain(|path| path.to_str().is_none());
    let said = run(&[OsStr::new("inspect"), segments[0].as_os_str()]);
    assert!(said.contains('\u{fffd}'), "{said}");
    run(&[
        OsStr::new("repair"),
        OsStr::new("p/a"),
        OsStr::new("--shard"),
        OsStr::new("0"),
        OsStr::new("--yes"),
    ]);
    run(&[OsStr::new("delete"), OsStr::new("p/a"), OsStr::new("--yes")]);
}

/// Progress is for a person: on a terminal, and not beside JSON.
#[test]
fn progress_is_shown_on_a_terminal_only() {
    for (json, shown) in [(false, true), (true, false)] {
        let world = World::new();
        world.create("p/a", &Value::Null);
        let (program, mut user) = terminal();
        set_width(&user, 100);
        let mut command = world.command(&["append", "p/a", "-"]);
        if json {
            command.arg("--json");
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(program.try_clone().unwrap());
        let mut child = command.spawn().unwrap();
        drop((command, program));
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"one\n").unwrap();
        let reading = thread::spawn(move || {
            let (mut text, mut chunk) = (Vec::new(), [0; 4096]);
            while let Ok(read @ 1..) = user.read(&mut chunk) {
                text.extend_from_slice(&chunk[..read]);
            }
            text
        });
        // The bar comes after a second of work.
        thread::sleep(std::time::Duration::from_millis(2500));
        drop(stdin);
        assert!(child.wait().unwrap().success());
        let text = String::from_utf8(reading.join().unwrap()).unwrap();
        assert_eq!(text.contains("4 B"), shown, "{text:?}");
        assert!(shown || text.is_empty(), "{text:?}");
    }
}

/// One form of time everywhere: RFC 3339 in UTC, with six digits.
#[test]
fn every_time_has_one_form() {
    let world = World::new();
    let key = world.create_key();
    world.create("p/a", &service("sm4"));
    world.ok(&["create", "p/b", "--encrypt-conf", &byok("default", &key).to_string()]);
    world.ok(&["append", "p/b", &world.file("lines", made_lines(10))]);
    let segment = world.segments("envelog-data")[0].to_str().unwrap().to_owned();
    let mut count = 0;
    for args in [
        &["read", "p/b", "--format", "json"][..],
        &["tail", "p/b", "--format", "json"],
        &["inspect", &segment],
        &["inspect", &segment, "--json"],
        &["kms", "list"],
        &["kms", "list", "--json"],
        &["keys", "usage"],
        &["keys", "audit"],
        &["doctor"],
        &["status"],
        &["retain", "-vv"],
    ] {
        let out = world.run(args);
        let text = out.text() + &out.stderr;
        let bytes = text.as_bytes();
        let is_date = |at: usize| {
            let Some(window) = bytes.get(at..at + 11) else { return false };
            window.iter().enumerate().all(|(index, byte)| match index {
                4 | 7 => *byte == b'-',
                10 => matches!(byte, b'T' | b' '),
                _ => byte.is_ascii_digit(),
            }) && bytes.get(at + 13) == Some(&b':')
        };
        let mut of_command = 0;
        // The lines of the log have times of their own.
        let is_content = |at: usize| text[..at].ends_with("\"content\":\"");
        for at in (0..bytes.len()).filter(|at| is_date(*at) && !is_content(*at)) {
            let time = &text[at..(at + 27).min(text.len())];
            let rest = time[19..].strip_prefix('.').and_then(|rest| rest.strip_suffix('Z'));
            let six = rest.is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit()));
            assert!(six && &time[10..11] == "T", "{args:?}: {time:?}");
            of_command += 1;
        }
        assert!(of_command > 0 || args == ["status"], "{args:?} has no time: {text}");
        count += of_command;
    }
    assert!(count > 30, "{count}");
}
