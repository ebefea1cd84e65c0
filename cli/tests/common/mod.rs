//! Shared helpers of the command-line tests: a temporary directory for each test, and the real
//! binary, run to its end or in parallel with the test.
//!
//! Uses only std: most tests run several processes in parallel and signal them, which the crates
//! that assert on commands do not support.

#![allow(dead_code, clippy::unwrap_used)]

use std::{
    env,
    ffi::OsStr,
    fs,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    thread::{self, JoinHandle},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;

pub(crate) const REGION: &str = "cn-hangzhou";
pub(crate) const ROLE: &str = "acs:ram::13234:role/logsource";
/// Kills a process that hangs. No tested process needs nearly as long.
const PATIENCE: Duration = Duration::from_secs(120);

/// A directory for a store, its keyring and its KMS.
pub(crate) struct World {
    dir: TempDir,
}

impl World {
    pub(crate) fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file and returns its path as an argument.
    pub(crate) fn file(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }

    /// The binary with these arguments, in the directory, without inherited settings.
    pub(crate) fn command<S: AsRef<OsStr>>(&self, args: &[S]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_envelog"));
        for (variable, _) in env::vars_os() {
            if variable.to_string_lossy().starts_with("ENVELOG_") {
                command.env_remove(variable);
            }
        }
        // The program must not print a backtrace even if the environment asks for one.
        command.env("RUST_BACKTRACE", "1").current_dir(self.dir.path()).args(args);
        command
    }

    pub(crate) fn run<S: AsRef<OsStr>>(&self, args: &[S]) -> Out {
        Running::start(self.command(args)).finish()
    }

    /// Runs with this standard input.
    pub(crate) fn run_with<S: AsRef<OsStr>>(&self, args: &[S], input: &[u8]) -> Out {
        let mut running = Running::start(self.command(args));
        let mut stdin = running.stdin.take().unwrap();
        let input = input.to_vec();
        // A process that fails early does not read all of its input.
        let feeding = thread::spawn(move || drop(stdin.write_all(&input)));
        let out = running.finish();
        feeding.join().unwrap();
        out
    }

    /// Runs a command that must succeed and print nothing on standard error.
    pub(crate) fn ok<S: AsRef<OsStr>>(&self, args: &[S]) -> Vec<u8> {
        let out = self.run(args);
        out.assert(0);
        assert_eq!(out.stderr, "", "{}", out.what);
        out.stdout
    }

    /// Runs a command that must print one JSON document.
    pub(crate) fn json<S: AsRef<OsStr>>(&self, args: &[S]) -> Value {
        let stdout = self.ok(args);
        serde_json::from_slice(&stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&stdout)))
    }

    /// Runs a command that must fail with this status and one sentence, and returns the sentence.
    pub(crate) fn refused<S: AsRef<OsStr>>(&self, status: i32, args: &[S]) -> String {
        self.run(args).sentence(status)
    }

    /// Creates a key in the embedded KMS.
    pub(crate) fn create_key(&self) -> String {
        let stdout = self.ok(&["kms", "create-key", "--region", REGION, "--grant", ROLE]);
        String::from_utf8(stdout).unwrap().trim_end().to_owned()
    }

    /// Creates a Logstore; `conf` is null for one without encryption.
    pub(crate) fn create(&self, name: &str, conf: &Value) {
        if conf.is_null() {
            self.ok(&["create", name]);
        } else {
            self.ok(&["create", name, "--encrypt-conf", &conf.to_string()]);
        }
    }

    /// All logs of a Logstore, each with its newline.
    pub(crate) fn read(&self, name: &str) -> Vec<u8> {
        self.ok(&["read", name, "--format", "raw"])
    }

    /// The files of the store with this extension, the largest first.
    pub(crate) fn segments(&self, store: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        find(&self.path(store), "seg", &mut found);
        found.sort_by_key(|path| std::cmp::Reverse(fs::metadata(path).unwrap().len()));
        found
    }
}

fn find(dir: &Path, extension: &str, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            find(&path, extension, found);
        } else if path.extension().is_some_and(|it| it == extension) {
            found.push(path);
        }
    }
}

/// Copies a directory recursively.
pub(crate) fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_dir(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// Encryption under the service key.
pub(crate) fn service(encrypt_type: &str) -> Value {
    json!({ "enable": true, "encrypt_type": encrypt_type })
}

/// Encryption under a customer's key.
pub(crate) fn byok(encrypt_type: &str, key: &str) -> Value {
    let cmk = json!({ "cmk_key_id": key, "arn": ROLE, "region_id": REGION });
    json!({ "enable": true, "encrypt_type": encrypt_type, "user_cmk_info": cmk })
}

/// Generates this many numbered lines.
pub(crate) fn made_lines(count: usize) -> Vec<u8> {
    let line = |n| {
        format!("2026-01-31 12:00:{:02} INFO request {n} served in {} ms\n", n % 60, n * 7 % 997)
    };
    (0..count).map(line).collect::<String>().into_bytes()
}

/// The result of a process.
pub(crate) struct Out {
    /// The exit status; `None` if a signal ended the process.
    pub(crate) status: Option<i32>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: String,
    what: String,
}

impl Out {
    pub(crate) fn assert(&self, status: i32) {
        assert_eq!(self.status, Some(status), "{}\n{}{}", self.what, self.text(), self.stderr);
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Requires this status and exactly one sentence on standard error, and returns the sentence.
    pub(crate) fn sentence(&self, status: i32) -> String {
        self.assert(status);
        let said = self.stderr.trim_end();
        assert!(
            said.starts_with("envelog: ") && said.lines().count() == 1,
            "{}: not one sentence: {said}",
            self.what
        );
        said["envelog: ".len()..].to_owned()
    }

    /// Like [`Out::sentence`] with `--json`: returns the code and the sentence.
    pub(crate) fn json_error(&self, status: i32) -> (String, String) {
        self.assert(status);
        let said: Value = serde_json::from_str(&self.stderr)
            .unwrap_or_else(|error| panic!("{error}: {}", self.stderr));
        assert_eq!(said.as_object().unwrap().len(), 1, "{said}");
        let text = |field: &str| said["error"][field].as_str().unwrap().to_owned();
        assert!(!text("kind").is_empty());
        (text("code"), text("message"))
    }
}

/// Kills the process on drop, so that it does not outlive a test that fails.
struct Ending(Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process that runs in parallel with the test. A watchdog kills it when it takes far too long,
/// which shows as an end by a signal.
pub(crate) struct Running {
    pub(crate) stdin: Option<ChildStdin>,
    pub(crate) stdout: Option<ChildStdout>,
    child: Ending,
    stderr: JoinHandle<String>,
    /// Dropping it ends the watchdog.
    watched: Sender<()>,
    what: String,
}

impl Running {
    pub(crate) fn start(command: Command) -> Self {
        Self::start_for(PATIENCE, command)
    }

    /// Starts a process that may live this long.
    pub(crate) fn start_for(patience: Duration, command: Command) -> Self {
        Self::start_with(patience, command, Stdio::piped())
    }

    /// Starts a process with this standard input.
    pub(crate) fn start_reading(command: Command, stdin: Stdio) -> Self {
        Self::start_with(PATIENCE, command, stdin)
    }

    fn start_with(patience: Duration, mut command: Command, stdin: Stdio) -> Self {
        let what = format!("{:?}", command.get_args().collect::<Vec<_>>());
        command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stderr = child.stderr.take().unwrap();
        let stderr = thread::spawn(move || {
            let mut text = Vec::new();
            stderr.read_to_end(&mut text).unwrap();
            String::from_utf8(text).unwrap()
        });
        let (watched, ended) = channel();
        let pid = Pid::from_child(&child);
        thread::spawn(move || {
            if ended.recv_timeout(patience) == Err(RecvTimeoutError::Timeout) {
                let _ = kill_process(pid, Signal::KILL);
            }
        });
        Self {
            stdin: child.stdin.take(),
            stdout: child.stdout.take(),
            child: Ending(child),
            stderr,
            watched,
            what,
        }
    }

    /// The lines of standard output as they arrive. They end with the process.
    pub(crate) fn lines(&mut self) -> Receiver<String> {
        let stdout = BufReader::new(self.stdout.take().unwrap());
        let (sender, receiver) = channel();
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        receiver
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.0.id()
    }

    /// Sends SIGKILL.
    pub(crate) fn kill(mut self) {
        self.child.0.kill().unwrap();
        drop(self.stdin.take());
        self.wait();
    }

    /// Sends the signal of Ctrl-C.
    pub(crate) fn interrupt(&self) {
        kill_process(Pid::from_child(&self.child.0), Signal::INT).unwrap();
    }

    /// Sends the signal by which a service manager stops a service.
    pub(crate) fn terminate(&self) {
        kill_process(Pid::from_child(&self.child.0), Signal::TERM).unwrap();
    }

    /// Closes standard input, reads the rest of standard output, and waits for the end.
    pub(crate) fn finish(mut self) -> Out {
        drop(self.stdin.take());
        self.wait()
    }

    /// Like [`Running::finish`], but standard input stays open: the process has to end by itself.
    pub(crate) fn wait(mut self) -> Out {
        let mut stdout = Vec::new();
        if let Some(mut pipe) = self.stdout.take() {
            pipe.read_to_end(&mut stdout).unwrap();
        }
        let status = self.child.0.wait().unwrap().code();
        drop(self.watched);
        Out { status, stdout, stderr: self.stderr.join().unwrap(), what: self.what }
    }
}
