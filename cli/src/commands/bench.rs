//! `bench`: the rates of this machine.

mod open_store;
mod payload_hash;
#[cfg(feature = "serve")]
mod serve;

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use bytes::Bytes;
use envelog::{
    AppendOptions, Durability, EncryptConf, EncryptType, Logstore, LogstoreName, LogstoreSpec,
    Payload, ReadOptions, Store, StoreBuilder,
    crypto::{AeadKey, Cipher, CryptoProvider},
    inspect::Compression,
};
use serde::Serialize;

use self::open_store::Opening;
use crate::{
    args::BenchArgs,
    exit::{Failure, Result},
    input, interrupt, lines,
    output::{self, Progress},
    setup::{Setup, builder, provider},
};

const GROUP_BYTES: usize = 64 * 1024;
/// Runs of each cell. The cells of a comparison take turns, and the median is reported.
const ROUNDS: usize = 9;
/// A run appends at most this much, so that it does not fill the disk.
const RUN_BYTES_MAX: u64 = 1 << 30;
/// The size of a Logstore for the read measurements.
const READ_BYTES: u64 = 16 << 20;

/// The answer of `bench`.
#[derive(Serialize)]
struct Answer<'a> {
    rows: &'a [Row],
}

pub(crate) fn run(setup: &Setup, args: &BenchArgs) -> Result {
    interrupt::defer()?;
    let parent = args.dir.clone().unwrap_or_else(std::env::temp_dir);
    let dir = tempfile::Builder::new()
        .prefix("envelog-bench-")
        .tempdir_in(&parent)
        .map_err(|error| Failure::file("make a directory in", &parent, &error))?;
    let bench = Bench {
        dir: dir.path().to_owned(),
        groups: groups(&args.files)?,
        budget: Duration::from_secs_f64(args.seconds / ROUNDS as f64),
    };
    #[cfg(feature = "serve")]
    if args.serve {
        return bench.serve(args.connections, setup.json);
    }
    let (rows, base) = if args.payload_hash {
        (bench.payload_hash()?, "not hashed")
    } else {
        (bench.rows()?, "none")
    };
    if setup.json {
        return output::json(&Answer { rows: &rows });
    }
    print(&rows, base)
}

/// The lines of the files, or generated ones, in groups of 64 KiB.
fn groups(files: &[PathBuf]) -> Result<Vec<Group>> {
    let mut groups = Vec::new();
    if files.is_empty() {
        groups.extend(lines::groups("made", made_lines(), GROUP_BYTES)?);
    }
    for path in files {
        groups.extend(lines::groups(
            &input::base_name(path),
            input::read_logs(path)?,
            GROUP_BYTES,
        )?);
    }
    if groups.is_empty() {
        return Err(Failure::other("these files contain no logs to measure with"));
    }
    groups
        .iter()
        .map(|lines| {
            let bytes = lines.group.encode_to_bytes();
            Ok(Group { payload: Payload::encoded(bytes.clone())?, bytes })
        })
        .collect()
}

/// Some megabytes that look like the log of a web server, the same each time.
fn made_lines() -> Bytes {
    let mut state = 1_u64;
    let mut random = move |below: u64| {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    let mut text = String::new();
    for second in 0..30_000 {
        let (method, status) =
            [("GET", 200), ("GET", 200), ("POST", 201), ("GET", 404)][random(4) as usize];
        let path =
            ["/", "/login", "/api/v1/orders", "/static/app.js", "/health"][random(5) as usize];
        text += &format!(
            "10.0.{}.{} - - [31/Jan/2026:{:02}:{:02}:{:02} +0000] \"{method} {path}?id={} HTTP/1.1\" {status} {}\n",
            random(4),
            random(250),
            second / 3600,
            second / 60 % 60,
            second % 60,
            random(1_000_000),
            random(50_000),
        );
    }
    text.into()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Suite {
    None,
    Aes,
    Sm4,
}

impl Suite {
    const ALL: [Self; 3] = [Self::None, Self::Aes, Self::Sm4];

    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Aes => "aes",
            Self::Sm4 => "sm4",
        }
    }

    fn conf(self) -> Option<EncryptConf> {
        match self {
            Self::None => None,
            Self::Aes => Some(EncryptConf::service_key(EncryptType::Aes)),
            Self::Sm4 => Some(EncryptConf::service_key(EncryptType::Sm4)),
        }
    }

    /// A key for the suite's cipher. Unencrypted data is authenticated with AES.
    fn key(self) -> Result<Box<dyn AeadKey>> {
        let cipher = match self {
            Self::None | Self::Aes => Cipher::Aes256Gcm,
            Self::Sm4 => Cipher::Sm4Gcm,
        };
        provider().aead(cipher, &vec![7; cipher.key_len()]).map_err(crypto_failure)
    }
}

/// One line of the result.
#[derive(Clone, Serialize)]
struct Row {
    what: &'static str,
    suite: &'static str,
    compression: &'static str,
    group_bytes: usize,
    durability: Option<&'static str>,
    callers: usize,
    mb_per_s: Option<f64>,
    /// The ratio to suite none with the same settings, or to the same suite without payload hashes,
    /// taken in each round.
    ratio: Option<f64>,
    /// Set only for the row that measures the opening of a store.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    opening: Option<Opening>,
}

impl Row {
    fn new(what: &'static str, suite: Suite) -> Self {
        Self {
            what,
            suite: suite.name(),
            compression: Compression::None.name(),
            group_bytes: GROUP_BYTES,
            durability: None,
            callers: 1,
            mb_per_s: None,
            ratio: None,
            opening: None,
        }
    }
}

/// A log group, encoded.
struct Group {
    payload: Payload,
    bytes: Bytes,
}

/// The settings of an append measurement.
#[derive(Clone, Copy)]
struct Appending {
    compression: Compression,
    durability: Durability,
    callers: usize,
}

struct Bench {
    dir: PathBuf,
    groups: Vec<Group>,
    /// The time limit of one run.
    budget: Duration,
}

impl Bench {
    fn rows(&self) -> Result<Vec<Row>> {
        let progress = Progress::steps(9);
        let mut rows = Vec::new();
        let (lz4, none) = (Compression::Lz4, Compression::None);
        let (buffered, synced) = (Durability::Buffered, Durability::Synced);
        for (compression, durability, callers) in
            [(lz4, buffered, 1), (none, buffered, 1), (lz4, synced, 1), (lz4, synced, 4)]
        {
            progress.say("append");
            rows.extend(self.appends(Appending { compression, durability, callers })?);
            progress.add(1);
        }
        for compression in [lz4, none] {
            progress.say("read");
            rows.extend(self.reads(compression)?);
            progress.add(1);
        }
        progress.say("seal");
        rows.extend(self.seals()?);
        progress.add(1);
        progress.say("open");
        rows.extend(self.opens()?);
        progress.add(1);
        progress.say("open a store");
        rows.push(self.open_store()?);
        Ok(rows)
    }

    /// Measures appends without encryption, with AES and with SM4 in turn. The buffered and
    /// compressed case also measures a plain file.
    fn appends(&self, how: Appending) -> Result<Vec<Row>> {
        let store = self.store("append")?;
        // Every run appends as many bytes as the unencrypted one manages within its time limit, or
        // fewer if its own time limit ends first.
        let warm = self.append_run(&store, Suite::None, how, RUN_BYTES_MAX)?;
        let bytes = warm.bytes.max(GROUP_BYTES as u64);
        for suite in [Suite::Aes, Suite::Sm4] {
            self.append_run(&store, suite, how, bytes / 8)?;
        }
        let with_plain =
            how.durability == Durability::Buffered && how.compression == Compression::Lz4;
        let mut plain = Vec::new();
        let mut rates = vec![Vec::new(); Suite::ALL.len()];
        for round in 0..ROUNDS {
            if with_plain {
                plain.push(self.plain_write_run(bytes)?.mb_per_s());
            }
            // Each suite goes first equally often, because a run leaves work in the disk's queue
            // for the next.
            for turn in 0..Suite::ALL.len() {
                let index = (round + turn) % Suite::ALL.len();
                rates[index]
                    .push(self.append_run(&store, Suite::ALL[index], how, bytes)?.mb_per_s());
            }
        }
        store.close()?;
        self.clear("append")?;
        let durability = match how.durability {
            Durability::Synced => "synced",
            _ => "buffered",
        };
        let row = |what, suite| Row {
            compression: how.compression.name(),
            durability: Some(durability),
            callers: how.callers,
            ..Row::new(what, suite)
        };
        let mut rows = Vec::new();
        if with_plain {
            let plain_row =
                Row { compression: Compression::None.name(), ..row("plain_write", Suite::None) };
            rows.push(rated(plain_row, &plain, Some(&plain)));
        }
        for (suite, of_suite) in Suite::ALL.into_iter().zip(&rates) {
            rows.push(rated(row("append", suite), of_suite, rates.first()));
        }
        Ok(rows)
    }

    /// Fills a new Logstore until the time limit or `bytes_max`, then syncs and deletes it. The
    /// measured time ends when all bytes have been written to the operating system and, with
    /// `Synced`, are on the disk.
    fn append_run(
        &self,
        store: &Store,
        suite: Suite,
        how: Appending,
        bytes_max: u64,
    ) -> Result<Run> {
        interrupt::check()?;
        let name = LogstoreName::new("bench", "append")?;
        let logstore = store.create_logstore(&name, spec(suite, how.compression))?;
        let options = AppendOptions::default().durability(how.durability);
        let share = bytes_max / how.callers as u64;
        let started = Instant::now();
        let bytes = if how.callers == 1 {
            self.append_some(&logstore, &options, started, share, 0)?
        } else {
            thread::scope(|scope| {
                let callers: Vec<_> = (0..how.callers)
                    .map(|caller| {
                        let (logstore, options) = (&logstore, &options);
                        scope.spawn(move || {
                            self.append_some(logstore, options, started, share, caller)
                        })
                    })
                    .collect();
                callers.into_iter().try_fold(0, |sum, caller| {
                    caller
                        .join()
                        .unwrap_or_else(|_| Err(Failure::other("an appending thread failed")))
                        .map(|bytes| sum + bytes)
                })
            })?
        };
        let run = Run { bytes, elapsed: started.elapsed() };
        // Sync now, so that the next run does not wait for the writes of this one.
        logstore.sync()?;
        drop(logstore);
        store.delete_logstore(&name)?;
        Ok(run)
    }

    fn append_some(
        &self,
        logstore: &Logstore,
        options: &AppendOptions,
        started: Instant,
        bytes_max: u64,
        first: usize,
    ) -> Result<u64> {
        let mut bytes = 0;
        for group in self.groups.iter().cycle().skip(first) {
            logstore.append(group.payload.clone(), options)?;
            bytes += group.bytes.len() as u64;
            if bytes >= bytes_max || started.elapsed() >= self.budget {
                break;
            }
        }
        if options.durability == Durability::Buffered {
            // Wait until the last group is written, which implies that all groups before it are
            // written.
            let last = &self.groups[0];
            logstore.append(
                last.payload.clone(),
                &AppendOptions::default().durability(Durability::Written),
            )?;
            bytes += last.bytes.len() as u64;
        }
        Ok(bytes)
    }

    /// Writes the same bytes to a plain file: length prefixes, payloads, and one fdatasync at the
    /// end.
    fn plain_write_run(&self, bytes_max: u64) -> Result<Run> {
        interrupt::check()?;
        let path = self.dir.join("plain");
        let failed = |error: std::io::Error| Failure::file("write", &path, &error);
        // The records are prepared in memory beforehand, as they are for the engine.
        let prefixed: Vec<Vec<u8>> = self.groups.iter().map(length_prefixed).collect();
        let started = Instant::now();
        let mut file = File::create(&path).map_err(failed)?;
        let mut bytes = 0;
        for record in prefixed.iter().cycle() {
            file.write_all(record).map_err(failed)?;
            bytes += record.len() as u64;
            if bytes >= bytes_max || started.elapsed() >= self.budget {
                break;
            }
        }
        file.sync_data().map_err(failed)?;
        let run = Run { bytes, elapsed: started.elapsed() };
        fs::remove_file(&path).map_err(failed)?;
        Ok(run)
    }

    /// Reads sealed segments, from the page cache.
    fn reads(&self, compression: Compression) -> Result<Vec<Row>> {
        let store = self.store("read")?;
        let options = AppendOptions::default().durability(Durability::Buffered);
        let mut names = Vec::new();
        for suite in Suite::ALL {
            interrupt::check()?;
            let name = LogstoreName::new("bench", suite.name())?;
            let logstore = store.create_logstore(&name, spec(suite, compression))?;
            let mut bytes = 0;
            for group in self.groups.iter().cycle() {
                logstore.append(group.payload.clone(), &options)?;
                bytes += group.bytes.len() as u64;
                if bytes >= READ_BYTES {
                    break;
                }
            }
            logstore.sync()?;
            names.push(name);
        }
        store.close()?;

        let store = self.builder("read").open_read_only()?;
        let logstores =
            names.iter().map(|name| Ok(store.logstore(name)?)).collect::<Result<Vec<_>>>()?;
        for logstore in &logstores {
            self.read_run(logstore)?;
        }
        let mut rates = vec![Vec::new(); Suite::ALL.len()];
        for _ in 0..ROUNDS {
            for (logstore, rates) in logstores.iter().zip(&mut rates) {
                rates.push(self.read_run(logstore)?.mb_per_s());
            }
        }
        drop(logstores);
        store.close()?;
        self.clear("read")?;
        Ok(Suite::ALL
            .into_iter()
            .zip(&rates)
            .map(|(suite, of_suite)| {
                rated(
                    Row { compression: compression.name(), ..Row::new("read", suite) },
                    of_suite,
                    rates.first(),
                )
            })
            .collect())
    }

    fn read_run(&self, logstore: &Logstore) -> Result<Run> {
        interrupt::check()?;
        let started = Instant::now();
        let mut bytes = 0;
        while started.elapsed() < self.budget {
            let mut reader = logstore.read(0, &ReadOptions::default())?;
            while let Some(block) = reader.next_block()? {
                bytes += block.list.len() as u64;
                if started.elapsed() >= self.budget {
                    break;
                }
            }
        }
        Ok(Run { bytes, elapsed: started.elapsed() })
    }

    /// Measures sealing alone. A block without encryption is authenticated nevertheless.
    fn seals(&self) -> Result<Vec<Row>> {
        self.cipher_rows("seal", |suite| {
            let key = suite.key()?;
            let mut block = vec![0; GROUP_BYTES];
            Ok(match suite {
                Suite::None => Box::new(move |nonce| {
                    key.seal(nonce, &block, &mut []).map(drop).map_err(crypto_failure)
                }),
                _ => Box::new(move |nonce| {
                    key.seal(nonce, &[], &mut block).map(drop).map_err(crypto_failure)
                }),
            })
        })
    }

    /// Measures opening alone.
    fn opens(&self) -> Result<Vec<Row>> {
        self.cipher_rows("open", |suite| {
            let key = suite.key()?;
            let mut block = vec![0; GROUP_BYTES];
            let nonce = [0; 12];
            if suite == Suite::None {
                let tag = key.seal(&nonce, &block, &mut []).map_err(crypto_failure)?;
                return Ok(Box::new(move |_| {
                    key.open(&nonce, &block, &[], &tag, &mut []).map_err(crypto_failure)
                }));
            }
            let tag = key.seal(&nonce, &[], &mut block).map_err(crypto_failure)?;
            let mut out = vec![0; GROUP_BYTES];
            Ok(Box::new(move |_| {
                key.open(&nonce, &[], &block, &tag, &mut out).map_err(crypto_failure)
            }))
        })
    }

    fn cipher_rows(
        &self,
        what: &'static str,
        make: impl Fn(Suite) -> Result<Work>,
    ) -> Result<Vec<Row>> {
        let mut works = Suite::ALL.into_iter().map(make).collect::<Result<Vec<_>>>()?;
        let mut rates = vec![Vec::new(); works.len()];
        for round in 0..=ROUNDS {
            for (work, rates) in works.iter_mut().zip(&mut rates) {
                interrupt::check()?;
                let rate = self.work_run(work)?.mb_per_s();
                // The first round is a warm-up.
                if round > 0 {
                    rates.push(rate);
                }
            }
        }
        Ok(Suite::ALL
            .into_iter()
            .zip(&rates)
            .map(|(suite, of_suite)| rated(Row::new(what, suite), of_suite, rates.first()))
            .collect())
    }

    fn work_run(&self, work: &mut Work) -> Result<Run> {
        let started = Instant::now();
        let mut blocks = 0_u64;
        while started.elapsed() < self.budget {
            let mut nonce = [0; 12];
            nonce[..8].copy_from_slice(&blocks.to_le_bytes());
            work(&nonce)?;
            blocks += 1;
        }
        Ok(Run { bytes: blocks * GROUP_BYTES as u64, elapsed: started.elapsed() })
    }

    fn builder(&self, name: &str) -> StoreBuilder {
        builder(&self.dir.join(name), &self.dir.join(format!("{name}.keyring")))
    }

    fn store(&self, name: &str) -> Result<Store> {
        Ok(self.builder(name).create()?)
    }

    /// Removes a store and its keyring, to free the space.
    fn clear(&self, name: &str) -> Result {
        let remove = |path: &Path, removed: std::io::Result<()>| {
            removed.map_err(|error| Failure::file("remove", path, &error))
        };
        let store = self.dir.join(name);
        remove(&store, fs::remove_dir_all(&store))?;
        let keyring = self.dir.join(format!("{name}.keyring"));
        remove(&keyring, fs::remove_file(&keyring))
    }
}

/// The operation to repeat, given a nonce.
type Work = Box<dyn FnMut(&[u8; 12]) -> Result>;

#[derive(Clone, Copy)]
struct Run {
    bytes: u64,
    elapsed: Duration,
}

impl Run {
    fn mb_per_s(&self) -> f64 {
        output::mb_per_s(self.bytes, self.elapsed)
    }
}

fn spec(suite: Suite, compression: Compression) -> LogstoreSpec {
    LogstoreSpec::default().compression(compression).encrypt_conf(suite.conf())
}

fn length_prefixed(group: &Group) -> Vec<u8> {
    [&(group.bytes.len() as u32).to_le_bytes(), &group.bytes[..]].concat()
}

fn crypto_failure(error: envelog::crypto::CryptoError) -> Failure {
    envelog::Error::Crypto(error).into()
}

/// Sets the median rate, and the median of the ratios to `base` in the same round.
fn rated(row: Row, rates: &[f64], base: Option<&Vec<f64>>) -> Row {
    let ratio = base.map(|base| {
        let ratios: Vec<f64> = rates.iter().zip(base).map(|(rate, base)| rate / base).collect();
        rounded(median(&ratios), 1000.0)
    });
    Row { mb_per_s: Some(rounded(median(rates), 10.0)), ratio, ..row }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn rounded(value: f64, steps: f64) -> f64 {
    (value * steps).round() / steps
}

/// `base` names the denominator of the ratios.
fn print(rows: &[Row], base: &str) -> Result {
    let ratio = format!("ratio to {base}");
    let mut table = output::table(
        &["what", "suite", "compression", "group", "durability", "callers", "MB/s", &ratio],
        &[3, 5, 6, 7],
    );
    for row in rows {
        let rate = match (row.mb_per_s, &row.opening) {
            (Some(rate), _) => format!("{rate:.0}"),
            (None, Some(opening)) => format!("{:.2} ms", opening.ms),
            (None, None) => String::new(),
        };
        table.add_row([
            row.what.to_owned(),
            row.suite.to_owned(),
            row.compression.to_owned(),
            output::size(row.group_bytes as u64),
            row.durability.unwrap_or("-").to_owned(),
            row.callers.to_string(),
            rate,
            row.ratio.map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.3}")),
        ]);
    }
    output::print_wide_table(&table)?;
    output::line(format_args!(
        "Medians of {ROUNDS} interleaved runs. The time of buffered appends ends when all bytes are written to the operating \
         system. That of plain_write includes one fdatasync."
    ))?;
    rows.iter().filter_map(|row| row.opening.as_ref()).try_for_each(output::line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_the_median_of_the_pairs() {
        let row = rated(
            Row::new("append", Suite::Aes),
            &[90.0, 300.0, 10.0],
            Some(&vec![100.0, 300.0, 100.0]),
        );
        assert_eq!((row.mb_per_s, row.ratio), (Some(90.0), Some(0.9)));
    }

    #[test]
    fn made_lines_are_the_same_each_time() {
        assert_eq!(made_lines(), made_lines());
        assert!(made_lines().len() > 2_000_000);
    }
}
