//! Appends, reads and the block ciphers, each suite compared with the store without encryption.
//!
//! `cargo bench --bench engine` generates its own log lines. `ENVELOG_BENCH_LOGS=DIR` takes the
//! files of a directory instead.
#![allow(missing_docs, clippy::unwrap_used)]

use std::{fs, hint::black_box, path::Path, time::Instant};

use bytes::Bytes;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use envelog::{
    AppendOptions, Compression, Durability, EncryptConf, EncryptType, LogGroup, Logstore,
    LogstoreSpec, Payload, ReadMode, ReadOptions, Store,
    crypto::{Cipher, CryptoProvider, RustCrypto},
    group::{Content, Log},
};

use envelog::crypto::AwsLc as Fast;

const GROUP_BYTES: usize = 64 << 10;
const SUITES: [(&str, Option<EncryptType>); 3] =
    [("none", None), ("aes", Some(EncryptType::Aes)), ("sm4", Some(EncryptType::Sm4))];

/// Lines of the files in `ENVELOG_BENCH_LOGS`, or lines that look like those of a web server.
fn lines() -> Vec<Vec<u8>> {
    if let Some(dir) = std::env::var_os("ENVELOG_BENCH_LOGS") {
        let mut files: Vec<_> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        return files
            .iter()
            .flat_map(|file| {
                fs::read(file)
                    .unwrap()
                    .split(|&byte| byte == b'\n')
                    .map(<[u8]>::to_vec)
                    .collect::<Vec<_>>()
            })
            .collect();
    }
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut draw = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    (0..40_000)
        .map(|n| {
            format!(
                "10.0.{}.{} - - [24/Nov/2026:03:{:02}:{:02} +0000] \"GET /api/v1/orders/{} HTTP/1.1\" {} {} {}ms",
                draw(256),
                draw(256),
                n / 60 % 60,
                n % 60,
                draw(1_000_000),
                [200, 200, 200, 304, 404, 500][draw(6) as usize],
                draw(50_000),
                draw(900)
            )
            .into_bytes()
        })
        .collect()
}

/// Encoded groups of about 64 KiB.
fn groups() -> Vec<Payload> {
    let mut groups = Vec::new();
    let mut logs = Vec::new();
    let mut size = 0;
    for line in lines() {
        size += line.len() + 20;
        let contents = vec![Content::new("content", Bytes::from(line))];
        logs.push(Log { time: 1_700_000_000, contents, time_ns: Some(0) });
        if size >= GROUP_BYTES {
            let group = LogGroup { logs: std::mem::take(&mut logs), ..LogGroup::default() };
            groups.push(Payload::try_from(&group).unwrap());
            size = 0;
        }
    }
    groups
}

fn store(dir: &Path) -> Store {
    Store::builder(dir.join("store"), dir.join("keyring"), Fast::new()).create().unwrap()
}

fn logstore(
    store: &Store,
    name: &str,
    encrypt: Option<EncryptType>,
    compression: Compression,
) -> Logstore {
    let encrypt_conf = encrypt.map(EncryptConf::service_key);
    let spec = LogstoreSpec::default().compression(compression).encrypt_conf(encrypt_conf);
    store.create_logstore(&format!("bench/{name}-{compression}").parse().unwrap(), spec).unwrap()
}

fn append(criterion: &mut Criterion) {
    let groups = groups();
    let bytes: usize = groups.iter().map(Payload::len).sum();
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for compression in [Compression::Lz4, Compression::None] {
        let mut group = criterion.benchmark_group(format!("append-{compression}"));
        group.throughput(Throughput::Bytes(bytes as u64)).sample_size(10);
        for (suite, encrypt) in SUITES {
            let logstore = logstore(&store, suite, encrypt, compression);
            group.bench_function(BenchmarkId::from_parameter(suite), |bencher| {
                bencher.iter(|| {
                    for payload in &groups {
                        logstore
                            .append(
                                payload.clone(),
                                &AppendOptions::default().durability(Durability::Buffered),
                            )
                            .unwrap();
                    }
                    logstore.sync().unwrap();
                });
            });
            drop(logstore);
            store
                .delete_logstore(&format!("bench/{suite}-{compression}").parse().unwrap())
                .unwrap();
        }
    }
}

fn read(criterion: &mut Criterion) {
    let groups = groups();
    let bytes: usize = groups.iter().map(Payload::len).sum();
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    let mut group = criterion.benchmark_group("read-lz4");
    group.throughput(Throughput::Bytes(bytes as u64)).sample_size(20);
    for (suite, encrypt) in SUITES {
        let logstore = logstore(&store, suite, encrypt, Compression::Lz4);
        for payload in &groups {
            logstore
                .append(payload.clone(), &AppendOptions::default().durability(Durability::Buffered))
                .unwrap();
        }
        logstore.roll().unwrap();
        logstore.sync().unwrap();
        logstore.roll().unwrap();
        group.bench_function(BenchmarkId::from_parameter(suite), |bencher| {
            bencher.iter(|| {
                let reader = logstore.read(0, &ReadOptions::default()).unwrap();
                let read: usize = reader.map(|record| record.unwrap().bytes.len()).sum();
                assert_eq!(read, bytes);
            });
        });
    }
}

/// Compares the two ways to read sealed segments from the page cache. They take turns, and the best
/// round of each is used, so other work on the machine favours neither. Prints how much a map reads
/// per byte of positional reads.
fn read_modes(criterion: &mut Criterion) {
    let groups = groups();
    let bytes = 8 * groups.iter().map(Payload::len).sum::<usize>();
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path());
    for compression in [Compression::None, Compression::Lz4] {
        for (suite, encrypt) in SUITES {
            let logstore = logstore(&store, suite, encrypt, compression);
            for payload in (0..8).flat_map(|_| &groups) {
                logstore
                    .append(
                        payload.clone(),
                        &AppendOptions::default().durability(Durability::Buffered),
                    )
                    .unwrap();
            }
            logstore.roll().unwrap();
            let round = |mode| {
                let began = Instant::now();
                let reader = logstore.read(0, &ReadOptions::default().mode(mode)).unwrap();
                let read: usize = reader.map(|record| record.unwrap().bytes.len()).sum();
                assert_eq!(read, bytes);
                began.elapsed().as_secs_f64()
            };
            let mut best = [f64::MAX; 2];
            let mut group = criterion.benchmark_group(format!("read-mode-{compression}"));
            group.sample_size(10).bench_function(BenchmarkId::from_parameter(suite), |bencher| {
                bencher.iter_custom(|rounds| {
                    let began = Instant::now();
                    for _ in 0..rounds {
                        for (best, mode) in best.iter_mut().zip([ReadMode::Pread, ReadMode::Map]) {
                            *best = best.min(round(mode));
                        }
                    }
                    began.elapsed()
                });
            });
            group.finish();
            if best[0] < f64::MAX {
                let speed = best.map(|seconds| bytes as f64 / seconds / (1 << 20) as f64);
                let [pread, map] = speed;
                println!(
                    "{suite}, {compression}: pread {pread:.0} MiB/s, map {map:.0} MiB/s, map/pread {:.2}",
                    map / pread
                );
            }
        }
    }
}

fn ciphers(criterion: &mut Criterion) {
    let providers: [(&str, &dyn CryptoProvider); 2] =
        [("fast", &Fast::new()), ("rustcrypto", &RustCrypto::new())];
    for cipher in [Cipher::Aes256Gcm, Cipher::Sm4Gcm] {
        let mut group = criterion.benchmark_group(format!("{cipher:?}"));
        for len in [4 << 10, 64 << 10] {
            group.throughput(Throughput::Bytes(len as u64));
            for (name, provider) in providers {
                let key = provider.aead(cipher, &vec![7; cipher.key_len()]).unwrap();
                group.bench_function(BenchmarkId::new(format!("seal-{name}"), len), |bencher| {
                    let mut nonce = 0_u64;
                    bencher.iter_batched_ref(
                        || vec![0; len],
                        |buf| {
                            nonce += 1;
                            let mut bytes = [0; 12];
                            bytes[..8].copy_from_slice(&nonce.to_le_bytes());
                            black_box(key.seal(&bytes, &[], buf).unwrap());
                        },
                        BatchSize::SmallInput,
                    );
                });
            }
        }
    }
}

criterion_group!(benches, append, read, read_modes, ciphers);
criterion_main!(benches);
