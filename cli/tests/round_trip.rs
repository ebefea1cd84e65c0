//! Logs are read back byte for byte, with every encryption method and algorithm.
//!
//! If ENVELOG_BENCH_LOGS names a directory, its files are used instead of generated lines.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    process::Stdio,
};

use common::{Running, World, byok, made_lines, service};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// The input files: name and bytes.
fn logs() -> Vec<(String, Vec<u8>)> {
    let Some(dir) = std::env::var_os("ENVELOG_BENCH_LOGS") else {
        let mut odd =
            b"caf\xe9 \xff\xfe\n\r\n\n\n  spaces  \r\ntab\there\nnul \0 inside\n\x0b\x0c\n"
                .to_vec();
        odd.extend(vec![b'x'; 200_000]);
        odd.extend(b"\nno newline at the end");
        return vec![("lines".to_owned(), made_lines(20_000)), ("odd".to_owned(), odd)];
    };
    let mut logs: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
        .collect();
    logs.sort();
    assert!(!logs.is_empty(), "ENVELOG_BENCH_LOGS has no files");
    logs
}

/// Adds the final newline that the last line may lack.
fn with_final_newline(mut bytes: Vec<u8>) -> Vec<u8> {
    if bytes.last().is_some_and(|&last| last != b'\n') {
        bytes.push(b'\n');
    }
    bytes
}

#[test]
fn every_file_comes_back_under_every_method_and_algorithm() {
    let world = World::new();
    let key = world.create_key();
    let confs = [
        ("none", Value::Null),
        ("aes", service("default")),
        ("sm4", service("sm4")),
        ("aes-cmk", byok("default", &key)),
        ("sm4-cmk", byok("sm4", &key)),
        ("off-cmk", byok("default", &key)),
    ];
    for (number, (name, bytes)) in logs().into_iter().enumerate() {
        let file = world.file(&name, &bytes);
        let expected = with_final_newline(bytes);
        for (word, conf) in &confs {
            let logstore = format!("file-{number}/{word}");
            world.create(&logstore, conf);
            if *word == "off-cmk" {
                // Switching encryption off: new data is only authenticated, under the same data
                // key.
                let mut config = world.json(&["get", &logstore]);
                config["encrypt_conf"]["enable"] = false.into();
                world.ok(&["update", &logstore, "--config", &config.to_string()]);
            }
            let summary = world.json(&["append", &logstore, &file, "--json"]);
            let lines = expected.iter().filter(|&&byte| byte == b'\n').count();
            assert_eq!(summary["logs"], lines, "{name} under {word}");
            assert!(
                world.read(&logstore) == expected,
                "{name} under {word} is not what was appended"
            );
        }
    }
    world.ok(&["verify"]);
}

#[test]
fn source_time_and_key_of_a_log_are_kept() {
    let world = World::new();
    world.create("p/a", &Value::Null);
    let file = world.file("access.log", "one\nt\u{fc}\n");
    world.ok(&["append", "p/a", &file]);
    let now = jiff::Timestamp::now().as_second();
    let out = world.ok(&["read", "p/a", "--format", "json"]);
    let logs: Vec<Value> =
        String::from_utf8(out).unwrap().lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(logs.len(), 2);
    for (log, content) in logs.iter().zip(["one", "tü"]) {
        assert_eq!(log["source"], "access.log");
        assert_eq!(log["contents"], serde_json::json!({ "content": content }));
        assert!(
            log["time"].as_i64().unwrap() <= now && log["time"].as_i64().unwrap() > now - 600,
            "{log}"
        );
    }
}

#[test]
fn several_files_and_standard_input_go_in_one_after_another() {
    let world = World::new();
    world.create("p/a", &Value::Null);
    let (first, last) = (world.file("first", "a\nb"), world.file("last", "d\n"));
    let out = world.run_with(&["append", "p/a", &first, "-", &last, "--json"], b"c\n");
    out.assert(0);
    let summary: Value = serde_json::from_str(&out.text()).unwrap();
    assert_eq!((&summary["logs"], &summary["bytes"]), (&4.into(), &7.into()), "{summary}");
    assert_eq!(world.read("p/a"), b"a\nb\nc\nd\n");
    // Without a file argument the command reads standard input.
    world.run_with(&["append", "p/a"], b"e").assert(0);
    assert_eq!(world.read("p/a"), b"a\nb\nc\nd\ne\n");
    world.ok(&["append", "p/a", &world.file("empty", "")]);
    assert_eq!(world.read("p/a"), b"a\nb\nc\nd\ne\n");
}

#[test]
fn a_partial_group_goes_out_by_itself_and_is_acknowledged() {
    let world = World::new();
    world.create("p/a", &service("default"));
    let mut append = Running::start(world.command(&["append", "p/a", "-", "--ack"]));
    let acks = append.lines();
    let mut stdin = append.stdin.take().unwrap();
    stdin.write_all(b"one\ntwo\nthe beginning of a third").unwrap();
    // Standard input stays open, so only the time limit flushes these lines.
    assert_eq!(acks.recv().unwrap(), "2");
    assert_eq!(
        world.read("p/a"),
        b"one\ntwo\n",
        "what is acknowledged can be read while the writer runs"
    );
    stdin.write_all(b" line\n").unwrap();
    assert_eq!(acks.recv().unwrap(), "3");
    stdin.write_all(b"a fourth without its newline").unwrap();
    drop(stdin);
    assert_eq!(acks.recv().unwrap(), "4");
    let out = append.finish();
    out.assert(0);
    assert!(out.stderr.contains("4 logs"), "{}", out.stderr);
    assert_eq!(
        world.read("p/a"),
        b"one\ntwo\nthe beginning of a third line\na fourth without its newline\n"
    );
}

#[test]
fn groups_are_as_large_as_asked_and_acknowledged_in_order() {
    let world = World::new();
    world.create("p/a", &Value::Null);
    let text = made_lines(1000);
    let file = world.file("f", &text);
    let mut numbers = Vec::new();
    for durability in ["buffered", "written", "synced"] {
        let out = world.run(&[
            "append",
            "p/a",
            &file,
            "--ack",
            "--durability",
            durability,
            "--group-bytes",
            "2KiB",
        ]);
        out.assert(0);
        let acks: Vec<usize> = out.text().lines().map(|line| line.parse().unwrap()).collect();
        assert!(acks.is_sorted() && acks.len() > 20, "{acks:?}");
        assert_eq!(acks.last(), Some(&1000));
        numbers.push(acks);
    }
    assert!(numbers.iter().all(|acks| *acks == numbers[0]), "groups do not depend on durability");
    assert!(world.read("p/a") == text.repeat(3));
}

#[test]
fn positions_choose_what_is_read() {
    let world = World::new();
    world.ok(&["create", "p/a", "--shards", "2"]);
    let file = world.file("f", "0\n1\n2\n3\n4\n");
    // One log per group, so sequence numbers match line numbers.
    world.ok(&["append", "p/a", &file, "--shard", "1", "--group-bytes", "1"]);
    let read = |args: &[&str]| world.ok(&[&["read", "p/a"], args].concat());
    assert_eq!(read(&[]), b"0\n1\n2\n3\n4\n");
    assert_eq!(read(&["--shard", "0"]), b"");
    assert_eq!(read(&["--shard", "1", "--from", "3"]), b"3\n4\n");
    assert_eq!(read(&["--shard", "1", "--from", "1", "--to", "3"]), b"1\n2\n");
    assert_eq!(read(&["--from", "end"]), b"");
    assert_eq!(read(&["--from", "begin", "--to", "end"]), b"0\n1\n2\n3\n4\n");
    assert_eq!(read(&["--from", "begin", "--to", "begin"]), b"");
    assert_eq!(read(&["--limit", "2"]), b"0\n1\n");
    assert_eq!(read(&["--limit", "0"]), b"");
    assert_eq!(read(&["--from", "2026-01-01T00:00:00Z", "--to", "2000-01-01T00:00:00+08:00"]), b"");
    assert_eq!(read(&["--from", "2000-01-01T00:00:00Z"]), b"0\n1\n2\n3\n4\n");
    assert_eq!(read(&["--from", "2200-01-01T00:00:00Z"]), b"");
    // By the receive time of the third line: that line and all lines received at the same time or
    // later.
    let third: Value =
        serde_json::from_slice(&read(&["--from", "2", "--limit", "1", "--json"])).unwrap();
    let from_third = read(&["--from", third["receive_time"].as_str().unwrap()]);
    assert!(from_third.ends_with(b"2\n3\n4\n"), "{}", String::from_utf8_lossy(&from_third));
    assert!(world.refused(1, &["read", "p/a", "--shard", "7"]).contains("no shard 7"));
}

#[test]
fn tail_gives_the_last_and_follows() {
    let world = World::new();
    world.create("p/a", &service("sm4"));
    let text = made_lines(500);
    world.ok(&["append", "p/a", &world.file("f", &text), "--group-bytes", "1KiB"]);
    let last = |count: usize| {
        let lines: Vec<_> = text.split_inclusive(|&byte| byte == b'\n').collect();
        lines[lines.len() - count..].concat()
    };
    assert_eq!(world.ok(&["tail", "p/a"]), last(10));
    assert_eq!(world.ok(&["tail", "p/a", "-n", "133"]), last(133));
    assert_eq!(world.ok(&["tail", "p/a", "-n", "100000"]), text);
    assert_eq!(world.ok(&["tail", "p/a", "-n", "0"]), b"");

    let mut tail = Running::start(world.command(&["tail", "p/a", "-n", "1", "-f"]));
    let lines = tail.lines();
    assert_eq!(lines.recv().unwrap().as_bytes(), last(1).trim_ascii_end());
    world.run_with(&["append", "p/a"], b"more\n").assert(0);
    assert_eq!(lines.recv().unwrap(), "more");
    // Another writer starts a new segment.
    world.run_with(&["append", "p/a"], b"and more\n").assert(0);
    assert_eq!(lines.recv().unwrap(), "and more");
    tail.kill();
}

/// `tail -f` has no new log to write, so a failed write cannot tell it that its reader is gone.
#[test]
fn tail_ends_with_its_reader() {
    let world = World::new();
    world.create("p/a", &service("sm4"));
    world.run_with(&["append", "p/a"], b"one\n").assert(0);
    let mut tail = Running::start(world.command(&["tail", "p/a", "-f"]));
    let mut line = [0; 4];
    tail.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    drop(tail.stdout.take());
    let out = tail.wait();
    out.assert(0);
    assert_eq!(out.stderr, "");
}

#[test]
fn an_interrupted_append_keeps_what_was_whole() {
    let world = World::new();
    world.create("p/a", &Value::Null);
    let mut append = Running::start(world.command(&["append", "p/a", "-", "--ack"]));
    let acks = append.lines();
    append.stdin.as_mut().unwrap().write_all(b"one\ntwo\nhalf of").unwrap();
    assert_eq!(acks.recv().unwrap(), "2");
    append.interrupt();
    let stdin = append.stdin.take();
    let out = append.wait();
    drop(stdin);
    out.assert(130);
    assert_eq!(world.read("p/a"), b"one\ntwo\n");
    world.ok(&["verify"]);
}

/// The reader of the acknowledgements does not read, so the process waits for it without end.
#[test]
fn a_second_signal_ends_an_append_that_waits() {
    let world = World::new();
    world.create("p/a", &Value::Null);
    let lines = world.file("lines", "0123456789abcdef\n".repeat(20_000));
    let mut command = world.command(&[
        "append",
        "p/a",
        &lines,
        "--ack",
        "--group-bytes",
        "1",
        "--durability",
        "buffered",
    ]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut append = command.spawn().unwrap();
    let pid = Pid::from_child(&append);
    let mut first = [0; 2];
    append.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"1\n");
    kill_process(pid, Signal::INT).unwrap();
    let mut said = String::new();
    BufReader::new(append.stderr.as_mut().unwrap()).read_line(&mut said).unwrap();
    assert!(said.contains("a second signal ends this at once"), "{said}");
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(append.wait().unwrap().code(), Some(130));
    world.ok(&["append", "p/a", &world.file("more", "more\n")]);
    world.ok(&["verify"]);
}

#[test]
fn a_terminated_append_that_kept_everything_succeeds() {
    for (input, status) in [("one\ntwo\n", 0), ("one\ntwo\nhalf of", 130)] {
        let world = World::new();
        world.create("p/a", &Value::Null);
        let mut append = Running::start(world.command(&["append", "p/a", "-", "--ack"]));
        let acks = append.lines();
        append.stdin.as_mut().unwrap().write_all(input.as_bytes()).unwrap();
        assert_eq!(acks.recv().unwrap(), "2");
        append.terminate();
        let stdin = append.stdin.take();
        let out = append.wait();
        drop(stdin);
        out.assert(status);
        assert_eq!(world.read("p/a"), b"one\ntwo\n");
    }
}

#[test]
fn a_file_size_limit_is_an_error() {
    let world = World::new();
    world.ok(&["create", "p/a", "--compression", "none"]);
    let file = world.file("lines", "0123456789abcdef\n".repeat(20_000));
    let binary = env!("CARGO_BIN_EXE_envelog");
    // 64 blocks of 1,024 bytes, by POSIX of 512.
    let script = format!("ulimit -f 64 && exec {binary} append p/a {file}");
    let out = std::process::Command::new("sh")
        .args(["-c", &script])
        .current_dir(world.path("."))
        .output()
        .unwrap();
    assert_eq!(out.status.code(), Some(1), "{out:?}");
    assert!(!out.stderr.is_empty());
    world.ok(&["append", "p/a", &world.file("more", "more\n")]);
    assert!(world.read("p/a").ends_with(b"more\n"));
    world.ok(&["verify"]);
}

#[test]
fn a_read_begins_some_time_ago() {
    let world = World::new();
    world.create("p/a", &Value::Null);
    world.ok(&["append", "p/a", &world.file("lines", "one\ntwo\n")]);
    for since in ["1h", "5m", "90s", "1d", "2w", "1d 12h"] {
        assert_eq!(world.ok(&["read", "p/a", "--since", since]), b"one\ntwo\n", "{since}");
    }
    for wrong in ["1mo", "1", "0d", "-1d"] {
        world.run(&["read", "p/a", &format!("--since={wrong}")]).assert(2);
    }
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(world.ok(&["read", "p/a", "--since", "10ms"]), b"");
    assert_eq!(world.ok(&["read", "p/a", "--from", "@1000000000"]), b"one\ntwo\n");
    world.run(&["read", "p/a", "--since", "1h", "--from", "begin"]).assert(2);
    let refused = world.run(&["read", "p/a", "--from", "1772452800"]);
    refused.assert(2);
    assert!(refused.stderr.contains("@1772452800"), "{}", refused.stderr);
}

#[test]
fn long_lines_are_counted() {
    let world = World::new();
    world.create("p/a", &Value::Null);
    let line = vec![b'x'; (10 << 20) + 1];
    let file = world.file("lines", [&b"before\n"[..], &line, b"\nafter\n"].concat());
    world.refused(1, &["append", "p/a", &file]);
    assert_eq!(world.read("p/a"), b"before\n");
    let report = world.json(&["append", "p/a", &file, "--long-lines", "skip", "--json"]);
    assert_eq!((&report["logs"], &report["long_lines"]), (&json!(2), &json!(1)));
    let report = world.json(&["append", "p/a", &file, "--long-lines", "split", "--json"]);
    assert_eq!((&report["logs"], &report["long_lines"]), (&json!(4), &json!(1)));
}

/// The limit applies to all shards together: after it is reached, the remaining shards are not
/// opened.
#[test]
fn a_limit_ends_the_reading_and_not_only_of_one_shard() {
    let world = World::new();
    world.ok(&["create", "p/a", "--shards", "2"]);
    for shard in ["0", "1"] {
        world.ok(&["append", "p/a", &world.file("line", "one\n"), "--shard", shard]);
    }
    let second = world
        .segments("envelog-data")
        .into_iter()
        .find(|path| path.to_str().unwrap().contains("shard-0001"));
    std::fs::write(second.unwrap(), "damaged").unwrap();
    assert_eq!(world.ok(&["read", "p/a", "--limit", "1"]), b"one\n");
    world.refused(5, &["read", "p/a"]);
}

/// The largest group also has room for its source name.
#[test]
fn a_group_of_the_largest_size_fits_with_the_name_of_its_file() {
    let world = World::new();
    world.ok(&["create", "p/a", "--compression", "none"]);
    let line = [vec![b'x'; (8 << 20) - 64], b"\n".to_vec()].concat();
    let file = world.file(&"n".repeat(240), line.repeat(2));
    world.ok(&["append", "p/a", &file, "--group-bytes", "16MiB"]);
    assert_eq!(world.read("p/a"), line.repeat(2));
}
