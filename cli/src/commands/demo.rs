//! `demo`: encryption and revocation in one run.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use envelog::{
    AppendOptions, Durability, EncryptConf, EncryptType, ErrorKind, Logstore, LogstoreName,
    LogstoreSpec, ReadOptions, Store, StoreOptions,
    admin::VerifyOptions,
    group::LogGroup,
    inspect::Compression,
    kms::{Cmk, LocalKms},
};
use memchr::memmem;
use serde::Serialize;

use crate::{
    args::DemoArgs,
    exit::{Failure, Result, Status, both},
    input, interrupt,
    lines::{self, CONTENT},
    output::{self, Cell, Progress},
    setup::{Setup, builder},
};

const GROUP_BYTES: usize = 64 * 1024;
const REGION: &str = "cn-hangzhou";
const ROLE: &str = "acs:ram::13234:role/logsource";
/// The number of log excerpts to search for in the files of the store.
const SAMPLES: usize = 100;
const SAMPLE_BYTES_MIN: usize = 16;
/// The number of checks, for the progress bar.
const CHECKS: u64 = 18;

/// Built-in logs, for a run without files.
const TEXTS: [(&str, &str); 4] = [
    ("README.md", include_str!("../../README.md")),
    ("demo.rs", include_str!("demo.rs")),
    ("append.rs", include_str!("append.rs")),
    ("args.rs", include_str!("../args.rs")),
];

pub(crate) fn run(setup: &Setup, args: &DemoArgs) -> Result {
    interrupt::defer()?;
    let texts = texts(&args.files)?;
    let (dir, _temporary) = directory(args.dir.as_deref())?;
    let mut demo = Demo::new(&dir, texts)?;
    let outcome = demo.run();
    demo.progress = None;
    outcome?;
    let printed = demo.report(setup.json).and_then(|()| match &args.dir {
        Some(dir) if !setup.json => {
            output::line(format_args!("the store is in {}", dir.join("store").display()))
        }
        _ => Ok(()),
    });
    both(printed, demo.verdict())
}

fn texts(files: &[PathBuf]) -> Result<Vec<(String, Bytes)>> {
    if files.is_empty() {
        return Ok(TEXTS
            .iter()
            .map(|(name, text)| ((*name).to_owned(), Bytes::from(*text)))
            .collect());
    }
    files.iter().map(|path| Ok((input::base_name(path), input::read_logs(path)?))).collect()
}

/// The requested directory, or a temporary one that is removed when the second value is dropped.
fn directory(asked: Option<&Path>) -> Result<(PathBuf, Option<tempfile::TempDir>)> {
    let Some(dir) = asked else {
        let temporary = tempfile::Builder::new()
            .prefix("envelog-demo-")
            .tempdir()
            .map_err(|error| Failure::file("make a directory in", &std::env::temp_dir(), &error))?;
        return Ok((temporary.path().to_owned(), Some(temporary)));
    };
    fs::create_dir_all(dir).map_err(|error| Failure::file("make the directory", dir, &error))?;
    let mut entries =
        fs::read_dir(dir).map_err(|error| Failure::file("read the directory", dir, &error))?;
    if entries.next().is_some() {
        return Err(Failure::other(format!(
            "{} is not empty: give a directory of its own",
            dir.display()
        )));
    }
    Ok((dir.to_owned(), None))
}

/// The answer of `demo`.
#[derive(Serialize)]
struct Answer<'a> {
    checks: &'a [Check],
    rates: Vec<MeasuredRate>,
}

#[derive(Serialize)]
struct MeasuredRate {
    what: &'static str,
    bytes: u64,
    mb_per_s: f64,
}

/// A condition that the demo checked.
#[derive(Serialize)]
struct Check {
    what: String,
    held: bool,
    detail: String,
}

struct Rate {
    what: &'static str,
    bytes: u64,
    elapsed: Duration,
}

struct Demo {
    dir: PathBuf,
    kms: LocalKms,
    cmk: Cmk,
    groups: Vec<LogGroup>,
    /// The expected output of a read: every line and a newline.
    expected: Vec<u8>,
    samples: Vec<Vec<u8>>,
    checks: Vec<Check>,
    rates: Vec<Rate>,
    /// Present until there is a result to print.
    progress: Option<Progress>,
}

impl Demo {
    fn new(dir: &Path, texts: Vec<(String, Bytes)>) -> Result<Self> {
        let mut groups = Vec::new();
        for (name, text) in texts {
            groups.extend(
                lines::groups(&name, text, GROUP_BYTES)?.into_iter().map(|lines| lines.group),
            );
        }
        if groups.is_empty() {
            return Err(Failure::other("these files contain no logs to show"));
        }
        let mut expected = Vec::new();
        groups.iter().for_each(|group| put_lines(group, &mut expected));
        let kms = LocalKms::create_or_open(dir.join("store.kms"))?;
        let cmk = Cmk {
            cmk_key_id: kms.create_key(REGION, &[ROLE])?,
            arn: ROLE.to_owned(),
            region_id: REGION.to_owned(),
        };
        let samples = samples(&expected);
        Ok(Self {
            dir: dir.to_owned(),
            kms,
            cmk,
            groups,
            expected,
            samples,
            checks: Vec::new(),
            rates: Vec::new(),
            progress: Some(Progress::steps(CHECKS)),
        })
    }

    fn open(&self) -> Result<Store> {
        let mut options = StoreOptions::default();
        options.revalidate_every = Duration::from_secs(1);
        let builder = builder(&self.dir.join("store"), &self.dir.join("store.keyring"));
        Ok(builder.kms(Arc::new(self.kms.clone())).options(options).open_or_create()?)
    }

    fn run(&mut self) -> Result {
        let service_name = LogstoreName::new("demo", "service-aes")?;
        let customer_name = LogstoreName::new("demo", "customer-sm4")?;
        let store = self.open()?;
        let service_conf = EncryptConf::service_key(EncryptType::Aes);
        let service = store
            .create_logstore(&service_name, LogstoreSpec::default().encrypt_conf(service_conf))?;
        let customer_conf = EncryptConf::byok(EncryptType::Sm4, self.cmk.clone());
        let customer = store
            .create_logstore(&customer_name, LogstoreSpec::default().encrypt_conf(customer_conf))?;

        self.control()?;
        self.append("append, AES, service key", &service)?;
        self.append("append, SM4, customer's key", &customer)?;
        self.read("read, AES, service key", &service)?;
        self.read("read, SM4, customer's key", &customer)?;
        self.search()?;
        self.verify(&store, "verify with all keys", &VerifyOptions::default(), &[])?;
        interrupt::check()?;

        let mut open_reader = customer.read(0, &ReadOptions::default())?;
        self.check(
            "a reader is open",
            open_reader.next().is_some_and(|record| record.is_ok()),
            "it returned a group",
        );
        self.kms.disable(&self.cmk.cmk_key_id)?;
        self.refused("the key is disabled", customer.revalidate_now());
        self.refused(
            "append to the customer's Logstore",
            append(&customer, &self.groups[0]).map(drop),
        );
        let read = customer
            .read(0, &ReadOptions::default())
            .and_then(|mut reader| reader.next().transpose());
        self.refused("read of the customer's Logstore", read.map(drop));
        self.refused("the reader that was open", open_reader.next().transpose().map(drop));
        self.verify(&store, "verify with keys", &VerifyOptions::default(), &[&customer_name])?;
        let keyless = VerifyOptions::default().keyless(true);
        self.verify(&store, "verify without keys", &keyless, &[])?;
        let other = append(&service, &self.groups[0]).and_then(|()| service.sync());
        self.check("append to the other Logstore", other.is_ok(), "it still works");
        let read = read_all(&service)?;
        self.check(
            "read of the other Logstore",
            read.starts_with(&self.expected),
            "it still works",
        );
        interrupt::check()?;

        self.kms.enable(&self.cmk.cmk_key_id)?;
        customer.revalidate_now()?;
        let read = read_all(&customer)?;
        self.check("the key is enabled: read again", read == self.expected, "every byte is there");
        append(&customer, &self.groups[0])?;
        store.close()?;

        let store = self.open()?;
        put_lines(&self.groups[0], &mut self.expected);
        for name in [&service_name, &customer_name] {
            let read = read_all(&store.logstore(name)?)?;
            self.check(
                &format!("closed, opened: read {name}"),
                read == self.expected,
                "every byte is there",
            );
        }
        self.search()?;
        Ok(store.close()?)
    }

    fn append(&mut self, what: &'static str, logstore: &Logstore) -> Result {
        let started = Instant::now();
        self.groups.iter().try_for_each(|group| append(logstore, group))?;
        logstore.sync()?;
        self.rates.push(Rate {
            what,
            bytes: self.expected.len() as u64,
            elapsed: started.elapsed(),
        });
        Ok(())
    }

    fn read(&mut self, what: &'static str, logstore: &Logstore) -> Result {
        let started = Instant::now();
        let read = read_all(logstore)?;
        self.rates.push(Rate { what, bytes: read.len() as u64, elapsed: started.elapsed() });
        let detail = format!(
            "{} lines, {}, equal byte for byte",
            count_lines(&read),
            output::size(read.len() as u64)
        );
        self.check(what, read == self.expected, &detail);
        Ok(())
    }

    /// Shows that the search can find plaintext: it searches a separate store with the same logs,
    /// neither encrypted nor compressed.
    fn control(&mut self) -> Result {
        let dir = self.dir.join("control");
        let store = builder(&dir, &self.dir.join("control.keyring")).create()?;
        let plain = LogstoreSpec::default().compression(Compression::None);
        let logstore = store.create_logstore(&LogstoreName::new("demo", "plain")?, plain)?;
        self.groups.iter().try_for_each(|group| append(&logstore, group))?;
        drop(logstore);
        store.close()?;
        let (found, _) = self.files_with_plaintext(&dir)?;
        let (held, detail) = match (found.len(), self.samples.len()) {
            (_, 0) => (true, "no line of these files is long enough to look for"),
            (0, _) => (false, "it found nothing"),
            _ => (true, "it found excerpts of the logs"),
        };
        self.check("a search of an unencrypted store", held, detail);
        fs::remove_dir_all(&dir).map_err(|error| Failure::file("remove", &dir, &error))
    }

    /// Returns the files below a directory that contain excerpts of the logs, and the total number
    /// of files.
    fn files_with_plaintext(&self, dir: &Path) -> Result<(Vec<String>, usize)> {
        let mut files = 0;
        let mut found = Vec::new();
        each_file(dir, &mut |path| {
            let bytes = input::read_file(path)?;
            files += 1;
            if self.samples.iter().any(|sample| memmem::find(&bytes, sample).is_some()) {
                found.push(path.display().to_string());
            }
            Ok(())
        })?;
        Ok((found, files))
    }

    /// Searches every file of the store for excerpts of the logs.
    fn search(&mut self) -> Result {
        let (found, files) = self.files_with_plaintext(&self.dir.join("store"))?;
        let detail = format!(
            "searched {files} files for {} excerpts of the logs: found none",
            self.samples.len()
        );
        let detail =
            if found.is_empty() { detail } else { format!("found in {}", found.join(", ")) };
        self.check("no plaintext in the store", found.is_empty(), &detail);
        Ok(())
    }

    fn verify(
        &mut self,
        store: &Store,
        what: &str,
        options: &VerifyOptions,
        refused: &[&LogstoreName],
    ) -> Result {
        let report = store.admin().verify(options, &mut |_| {})?;
        let as_expected = report.refused.iter().map(|(name, _)| name).eq(refused.iter().copied())
            && report.refused.iter().all(|(_, error)| error.kind() == ErrorKind::Revoked);
        let detail = match (report.faults.len(), refused) {
            (0, []) => format!("{} blocks, no fault", report.blocks),
            (0, _) => "the customer's Logstore is refused, the other has no fault".to_owned(),
            (faults, _) => format!("{faults} faults"),
        };
        self.check(what, report.faults.is_empty() && as_expected, &detail);
        Ok(())
    }

    fn refused(&mut self, what: &str, outcome: envelog::Result<()>) {
        match outcome {
            Err(error) if error.kind() == ErrorKind::Revoked => {
                self.check(what, true, "refused: the key is revoked");
            }
            Err(error) => self.check(what, false, &format!("another error: {error}")),
            Ok(()) => self.check(what, false, "it was not refused"),
        }
    }

    fn check(&mut self, what: &str, held: bool, detail: &str) {
        if let Some(progress) = &self.progress {
            progress.say(what.to_owned());
            progress.add(1);
        }
        self.checks.push(Check { what: what.to_owned(), held, detail: detail.to_owned() });
    }

    fn report(&self, json: bool) -> Result {
        if json {
            let rates = self.rates.iter().map(|rate| MeasuredRate {
                what: rate.what,
                bytes: rate.bytes,
                mb_per_s: output::mb_per_s(rate.bytes, rate.elapsed),
            });
            return output::json(&Answer { checks: &self.checks, rates: rates.collect() });
        }
        let mut table = output::table(&["step", "held", "result"], &[]);
        for check in &self.checks {
            let held = output::verdict(if check.held { "yes" } else { "NO" }, check.held);
            table.add_row([Cell::new(&check.what), held, Cell::new(&check.detail)]);
        }
        output::print_wide_table(&table)?;
        let mut table = output::table(&["rate", "size", "time", "MB/s"], &[1, 2, 3]);
        for rate in &self.rates {
            table.add_row([
                rate.what.to_owned(),
                output::size(rate.bytes),
                format!("{:.1} ms", rate.elapsed.as_secs_f64() * 1e3),
                format!("{:.0}", output::mb_per_s(rate.bytes, rate.elapsed)),
            ]);
        }
        output::print_wide_table(&table)
    }

    fn verdict(&self) -> Result {
        match self.checks.iter().find(|check| !check.held) {
            None => Ok(()),
            Some(failed) => Err(Failure::new(
                Status::Other,
                "demo_failed",
                format!("the demo failed at \"{}\": {}", failed.what, failed.detail),
            )),
        }
    }
}

fn append(logstore: &Logstore, group: &LogGroup) -> envelog::Result<()> {
    logstore.append(group, &AppendOptions::default().durability(Durability::Buffered)).map(drop)
}

/// The content of every log, each followed by a newline.
fn read_all(logstore: &Logstore) -> Result<Vec<u8>> {
    let mut all = Vec::new();
    for record in logstore.read(0, &ReadOptions::default())? {
        put_lines(&record?.group()?, &mut all);
    }
    Ok(all)
}

fn put_lines(group: &LogGroup, out: &mut Vec<u8>) {
    for content in group
        .logs
        .iter()
        .flat_map(|log| &log.contents)
        .filter(|content| &content.key[..] == CONTENT)
    {
        out.extend_from_slice(&content.value);
        out.push(b'\n');
    }
}

/// Lines from all parts of the text that are too long to occur by accident.
fn samples(text: &[u8]) -> Vec<Vec<u8>> {
    let long: Vec<&[u8]> =
        text.split(|&byte| byte == b'\n').filter(|line| line.len() >= SAMPLE_BYTES_MIN).collect();
    long.iter().step_by(long.len().div_ceil(SAMPLES).max(1)).map(|line| line.to_vec()).collect()
}

fn count_lines(text: &[u8]) -> usize {
    memchr::memchr_iter(b'\n', text).count()
}

fn each_file(dir: &Path, visit: &mut impl FnMut(&Path) -> Result) -> Result {
    let entries =
        fs::read_dir(dir).map_err(|error| Failure::file("read the directory", dir, &error))?;
    for entry in entries {
        let path = entry.map_err(|error| Failure::file("read the directory", dir, &error))?.path();
        if path.is_dir() {
            each_file(&path, visit)?;
        } else {
            visit(&path)?;
        }
    }
    Ok(())
}
