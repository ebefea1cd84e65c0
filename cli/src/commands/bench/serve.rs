//! `bench --serve`: the log service over loopback beside the engine alone.
//!
//! The service is a process of its own, so that its memory and its processor time are its own. It
//! and the clients share the machine, as the engine does with the threads that append to it.

mod client;
mod service;

use std::{
    thread,
    time::{Duration, Instant},
};

use envelog::{AppendOptions, EncryptConf, EncryptType, Logstore, LogstoreName, LogstoreSpec};
use serde::Serialize;

use self::{
    client::{Client, put_request},
    service::Service,
};
use super::{Bench, Run, median, rounded};
use crate::{
    exit::{Failure, Result},
    interrupt,
    output::{self, Progress},
};

/// The clients that put at once, and the threads that append to the engine alone.
const CLIENTS: usize = 8;
const ROUNDS: usize = 5;
/// What the scan and the pull read, in bytes of logs. A scan of the service reads up to 512 MiB.
const SCANNED_BYTES_MAX: u64 = 256 << 20;
/// A word that no log has.
const ABSENT: &str = "qzxjwk";
const SHARDS: u32 = 2;

/// The answer of `bench --serve`.
#[derive(Serialize)]
struct Answer {
    clients: usize,
    rounds: usize,
    group_bytes: usize,
    put: Vec<Put>,
    read: Vec<Read>,
    idle: Idle,
}

/// PutLogs with bodies of one form, beside appends of the same groups to the engine.
#[derive(Serialize)]
struct Put {
    body: &'static str,
    mb_per_s: f64,
    engine_mb_per_s: f64,
    /// The median of the ratios within a round.
    ratio: f64,
    p50_ms: f64,
    p99_ms: f64,
    /// Processor time for a megabyte of logs, in milliseconds.
    service_ms_per_mb: f64,
    clients_ms_per_mb: f64,
    engine_ms_per_mb: f64,
}

/// A way to read decrypted logs, beside a reader of the engine.
#[derive(Serialize)]
struct Read {
    what: &'static str,
    mb_per_s: f64,
    engine_mb_per_s: f64,
    ratio: f64,
    /// The rate for a second of processor time of the service. `None` if it took too little for the
    /// clock of the system.
    mb_per_cpu_s: Option<f64>,
}

/// The memory of the service with connections that have made a call, and are idle.
#[derive(Serialize)]
struct Idle {
    connections: usize,
    before_mib: f64,
    mib: f64,
}

impl Bench {
    pub(super) fn serve(&self, connections: usize, json: bool) -> Result {
        let progress = Progress::steps(4);
        let mut put = Vec::new();
        for is_compressed in [true, false] {
            progress.say("put");
            put.push(self.puts(is_compressed)?);
            progress.add(1);
        }
        progress.say("read");
        let read = self.service_reads()?;
        progress.add(1);
        progress.say("idle connections");
        let idle = self.idle(connections)?;
        drop(progress);
        let group_bytes = super::GROUP_BYTES;
        let answer = Answer { clients: CLIENTS, rounds: ROUNDS, group_bytes, put, read, idle };
        if json { output::json(&answer) } else { print(&answer) }
    }

    /// The service and the engine take turns.
    fn puts(&self, is_compressed: bool) -> Result<Put> {
        let service = Service::start(&self.dir, if is_compressed { "lz4" } else { "plain" })?;
        let mut client = Client::connect(service.address)?;
        client.create("put", SHARDS)?;
        let request = |group: &super::Group| put_request("put", &group.bytes, is_compressed);
        let requests: Vec<Vec<u8>> = self.groups.iter().map(request).collect();
        let store = self.store("engine")?;
        let logstore = store.create_logstore(&LogstoreName::new("bench", "put")?, spec())?;
        let mut rounds = Vec::new();
        let mut latencies = Vec::new();
        for round in 0..=ROUNDS {
            let engine = measured(None, || self.append_all(&logstore))?;
            let put =
                measured(Some(&service), || self.put_all(&service, &requests, &mut latencies))?;
            // The first round is a warm-up.
            if round > 0 {
                rounds.push((put, engine));
            } else {
                latencies.clear();
            }
        }
        drop(logstore);
        store.close()?;
        self.clear("engine")?;
        service.stop()?;
        let of = |value: &dyn Fn(&(Cost, Cost)) -> f64, steps| {
            rounded(median(&rounds.iter().map(value).collect::<Vec<_>>()), steps)
        };
        latencies.sort_unstable();
        Ok(Put {
            body: if is_compressed { "lz4" } else { "plain" },
            mb_per_s: of(&|(put, _)| put.run.mb_per_s(), 10.0),
            engine_mb_per_s: of(&|(_, engine)| engine.run.mb_per_s(), 10.0),
            ratio: of(&|(put, engine)| put.run.mb_per_s() / engine.run.mb_per_s(), 1000.0),
            p50_ms: percentile_ms(&latencies, 50),
            p99_ms: percentile_ms(&latencies, 99),
            service_ms_per_mb: of(&|(put, _)| put.service_ms_per_mb(), 100.0),
            clients_ms_per_mb: of(&|(put, _)| put.own_ms_per_mb(), 100.0),
            engine_ms_per_mb: of(&|(_, engine)| engine.own_ms_per_mb(), 100.0),
        })
    }

    fn append_all(&self, logstore: &Logstore) -> Result<u64> {
        let started = Instant::now();
        let options = AppendOptions::default();
        in_threads(|index| {
            let mut bytes = 0;
            for group in self.groups.iter().cycle().skip(index * 7) {
                logstore.append(group.payload.clone(), &options)?;
                bytes += group.bytes.len() as u64;
                if started.elapsed() >= self.budget {
                    break;
                }
            }
            Ok(bytes)
        })
        .map(|bytes| bytes.into_iter().sum())
    }

    fn put_all(
        &self,
        service: &Service,
        requests: &[Vec<u8>],
        latencies: &mut Vec<Duration>,
    ) -> Result<u64> {
        let started = Instant::now();
        let results = in_threads(|index| {
            let mut client = Client::connect(service.address)?;
            let (mut bytes, mut latencies) = (0, Vec::new());
            for (request, group) in requests.iter().zip(&self.groups).cycle().skip(index * 7) {
                let began = Instant::now();
                client.exchange(request)?;
                latencies.push(began.elapsed());
                bytes += group.bytes.len() as u64;
                if started.elapsed() >= self.budget {
                    break;
                }
            }
            Ok((bytes, latencies))
        })?;
        let mut sum = 0;
        for (bytes, of_thread) in results {
            sum += bytes;
            latencies.extend(of_thread);
        }
        Ok(sum)
    }

    /// One client and one reader of the engine, which read the same logs in turn.
    fn service_reads(&self) -> Result<Vec<Read>> {
        let service = Service::start(&self.dir, "read")?;
        let mut client = Client::connect(service.address)?;
        client.create("read", 1)?;
        let store = self.store("engine")?;
        let logstore =
            store.create_logstore(&LogstoreName::new("bench", "read")?, spec().shard_count(1))?;
        let (started, mut bytes) = (Instant::now(), 0);
        for group in self.groups.iter().cycle() {
            client.exchange(&put_request("read", &group.bytes, true))?;
            logstore.append(group.payload.clone(), &AppendOptions::default())?;
            bytes += group.bytes.len() as u64;
            if bytes >= SCANNED_BYTES_MAX || started.elapsed() >= self.budget * 8 {
                break;
            }
        }
        let mut scans = Vec::new();
        let mut pulls = Vec::new();
        for round in 0..=ROUNDS {
            let engine = measured(None, || read_all(&logstore))?;
            let scan = measured(Some(&service), || client.scan("read", ABSENT).map(|()| bytes))?;
            let pull = measured(Some(&service), || client.pull("read"))?;
            if round > 0 {
                scans.push((scan, engine));
                pulls.push((pull, engine));
            }
        }
        drop(logstore);
        store.close()?;
        self.clear("engine")?;
        service.stop()?;
        let row = |what, rounds: &[(Cost, Cost)]| {
            let of = |value: &dyn Fn(&(Cost, Cost)) -> f64, steps| {
                rounded(median(&rounds.iter().map(value).collect::<Vec<_>>()), steps)
            };
            Read {
                what,
                mb_per_s: of(&|(it, _)| it.run.mb_per_s(), 10.0),
                engine_mb_per_s: of(&|(_, engine)| engine.run.mb_per_s(), 10.0),
                ratio: of(&|(it, engine)| it.run.mb_per_s() / engine.run.mb_per_s(), 1000.0),
                mb_per_cpu_s: Some(of(&|(it, _)| 1000.0 / it.service_ms_per_mb(), 10.0))
                    .filter(|rate| rate.is_finite()),
            }
        };
        Ok(vec![row("get_logs", &scans), row("pull_logs", &pulls)])
    }

    fn idle(&self, connections: usize) -> Result<Idle> {
        service::raise_open_files(connections)?;
        let service = Service::start(&self.dir, "idle")?;
        let before_mib = service.memory_mib()?;
        let mut idle = Vec::with_capacity(connections);
        for _ in 0..connections {
            interrupt::check()?;
            let mut client = Client::connect(service.address)?;
            client.get("/healthz")?;
            idle.push(client);
        }
        let mib = service.memory_mib()?;
        // The first connection is still one.
        idle.iter_mut().take(1).try_for_each(|client| client.get("/healthz").map(drop))?;
        drop(idle);
        service.stop()?;
        Ok(Idle { connections, before_mib, mib })
    }
}

/// As the service creates one, under the service key.
fn spec() -> LogstoreSpec {
    let conf = EncryptConf::service_key(EncryptType::Aes);
    LogstoreSpec::default().shard_count(SHARDS).encrypt_conf(Some(conf))
}

fn read_all(logstore: &Logstore) -> Result<u64> {
    let mut reader = logstore.read(0, &envelog::ReadOptions::default())?;
    let mut bytes = 0;
    while let Some(block) = reader.next_block()? {
        bytes += block.list.len() as u64;
    }
    Ok(bytes)
}

fn in_threads<T: Send>(run: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    let run = &run;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..CLIENTS).map(|index| scope.spawn(move || run(index))).collect();
        let failed = |_| Err(Failure::other("a thread of the measurement failed"));
        threads.into_iter().map(|thread| thread.join().unwrap_or_else(failed)).collect()
    })
}

/// A run with the processor time that it took.
#[derive(Clone, Copy)]
struct Cost {
    run: Run,
    own: Duration,
    service: Duration,
}

impl Cost {
    fn own_ms_per_mb(&self) -> f64 {
        self.own.as_secs_f64() * 1e9 / self.run.bytes as f64
    }

    fn service_ms_per_mb(&self) -> f64 {
        self.service.as_secs_f64() * 1e9 / self.run.bytes as f64
    }
}

fn measured(service: Option<&Service>, run: impl FnOnce() -> Result<u64>) -> Result<Cost> {
    interrupt::check()?;
    let of_service = || service.map_or(Ok(Duration::ZERO), Service::processor_time);
    let (own, theirs, started) = (service::own_processor_time(), of_service()?, Instant::now());
    let bytes = run()?;
    let run = Run { bytes, elapsed: started.elapsed() };
    Ok(Cost {
        run,
        own: service::own_processor_time().saturating_sub(own),
        service: of_service()?.saturating_sub(theirs),
    })
}

fn percentile_ms(sorted: &[Duration], percent: usize) -> f64 {
    let at = (sorted.len() * percent / 100).min(sorted.len().saturating_sub(1));
    rounded(sorted.get(at).copied().unwrap_or_default().as_secs_f64() * 1e3, 100.0)
}

fn print(answer: &Answer) -> Result {
    let mut table = output::table(
        &["body", "service MB/s", "engine MB/s", "ratio", "p50 ms", "p99 ms", "CPU ms/MB"],
        &[1, 2, 3, 4, 5],
    );
    for put in &answer.put {
        table.add_row([
            put.body.to_owned(),
            format!("{:.0}", put.mb_per_s),
            format!("{:.0}", put.engine_mb_per_s),
            format!("{:.3}", put.ratio),
            format!("{:.2}", put.p50_ms),
            format!("{:.2}", put.p99_ms),
            format!(
                "service {:.2}, clients {:.2}; engine {:.2}",
                put.service_ms_per_mb, put.clients_ms_per_mb, put.engine_ms_per_mb
            ),
        ]);
    }
    output::line(format_args!(
        "PutLogs, {} clients, groups of {}, synced, encrypted under the service key:",
        answer.clients,
        output::size(answer.group_bytes as u64)
    ))?;
    output::print_wide_table(&table)?;
    let header = ["call", "service MB/s", "engine MB/s", "ratio", "MB per CPU second"];
    let mut table = output::table(&header, &[1, 2, 3, 4]);
    for read in &answer.read {
        table.add_row([
            read.what.to_owned(),
            format!("{:.0}", read.mb_per_s),
            format!("{:.0}", read.engine_mb_per_s),
            format!("{:.3}", read.ratio),
            read.mb_per_cpu_s.map_or_else(|| "-".to_owned(), |rate| format!("{rate:.0}")),
        ]);
    }
    output::line("One reader; get_logs searches for a word that no log has:")?;
    output::print_wide_table(&table)?;
    let Idle { connections, before_mib, mib } = answer.idle;
    output::line(format_args!(
        "Memory with {} idle connections: {mib:.0} MiB (without: {before_mib:.0} MiB).",
        output::count(connections as u64)
    ))?;
    output::line(format_args!("Medians of {} interleaved runs.", answer.rounds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_few_values() {
        let sorted: Vec<Duration> = (1..=4).map(Duration::from_millis).collect();
        assert_eq!((percentile_ms(&sorted, 50), percentile_ms(&sorted, 99)), (3.0, 4.0));
        assert_eq!(percentile_ms(&[], 50), 0.0);
    }
}
