//! Eight writers and eight readers, concurrent with key rotations, revocations, rolls, and status
//! and verification calls.
//!
//! `ENVELOG_THREADS_SECONDS` sets the duration. `cargo xtask sanitize` runs this test under
//! ThreadSanitizer.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    env,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use common::*;
use envelog::{
    AppendOptions, EncryptConf, EncryptType, Error, Logstore, LogstoreSpec, Position, ReadMode,
    ReadOptions, ShardChoice, Store, admin::VerifyOptions,
};

const SHARDS: u32 = 2;
const WRITERS: usize = 8;
const READERS: usize = 8;

/// The acknowledgements of a writer: shard, number and text.
type Acknowledged = Vec<(u32, u64, String)>;

/// Appends as fast as possible. Waits while the key is revoked; every other error is a failure.
fn write(writer: usize, logstore: &Logstore, stop: &AtomicBool) -> Acknowledged {
    let durability = [buffered(), written(), synced()][writer % 3].durability;
    let mut acknowledged = Vec::new();
    for n in 0.. {
        let shard = (n + writer) as u32 % SHARDS;
        let text = format!("{writer} {n} {}", "x".repeat(n * 37 % 300));
        let options =
            AppendOptions::default().durability(durability).shard(ShardChoice::Shard(shard));
        while !stop.load(Ordering::Relaxed) {
            match logstore.append(record(&text), &options) {
                Ok(appended) => {
                    acknowledged.push((shard, appended.seq, text.clone()));
                    break;
                }
                Err(Error::Revoked { .. }) => thread::sleep(millis(1)),
                Err(error) => panic!("writer {writer}: {error}"),
            }
        }
        if stop.load(Ordering::Relaxed) {
            break;
        }
    }
    acknowledged
}

/// Follows a shard until it has read everything up to the shard's end after the writers have
/// stopped. Returns the sequence numbers.
fn follow(reader: usize, logstore: &Logstore, stop: &AtomicBool) -> Vec<u64> {
    let shard = reader as u32 % SHARDS;
    let mode = [ReadMode::Pread, ReadMode::Map][reader / 4 % 2];
    let (mut seqs, mut of_writer) = (Vec::new(), [None; WRITERS]);
    loop {
        let last_round = stop.load(Ordering::SeqCst);
        let options = ReadOptions::default()
            .from(Position::Seq(seqs.last().map_or(0, |seq| seq + 1)))
            .mode(mode);
        let found = match logstore.read(shard, &options) {
            Ok(found) => found,
            Err(Error::Revoked { .. }) => continue,
            Err(error) => panic!("reader {reader}: {error}"),
        };
        for record in found {
            let record = match record {
                Ok(record) => record,
                Err(Error::Revoked { .. }) => break,
                Err(error) => panic!("reader {reader}: {error}"),
            };
            // Numbers increase, with gaps where appends were refused. The records of one writer are
            // in its order.
            assert!(
                seqs.last() < Some(&record.seq),
                "reader {reader}: {} after {:?}",
                record.seq,
                seqs.last()
            );
            seqs.push(record.seq);
            let text = std::str::from_utf8(&record.bytes).unwrap();
            let mut words = text.split(' ').map(|word| word.parse::<usize>());
            let (writer, n) = (words.next().unwrap().unwrap(), words.next().unwrap().unwrap());
            assert!(
                of_writer[writer] < Some(n),
                "reader {reader}: {text:?} after {:?}",
                of_writer[writer]
            );
            of_writer[writer] = Some(n);
        }
        if last_round {
            return seqs;
        }
    }
}

#[test]
fn eight_write_and_eight_read_while_everything_else_goes_on() {
    let seconds = env::var("ENVELOG_THREADS_SECONDS").map_or(1, |seconds| seconds.parse().unwrap());
    let mut world = World::threads();
    world.options.segment_bytes = 128 << 10;
    world.options.linger = millis(2);
    world.options.revalidate_every = millis(100);
    world.options.outage_grace = Duration::from_secs(20);
    let store = world.create();
    let cmk = world.cmk();
    let spec = |conf| LogstoreSpec::default().encrypt_conf(conf).shard_count(SHARDS);
    let service = EncryptConf::service_key(EncryptType::Sm4);
    let byok = EncryptConf::byok(EncryptType::Aes, cmk.clone());
    let logstores = [("p/service", service), ("p/byok", byok)]
        .map(|(text, conf)| store.create_logstore(&name(text), spec(conf)).unwrap());
    let beside: Store = world.builder().open_read_only().unwrap();
    let (stop, written) = (AtomicBool::new(false), AtomicBool::new(false));
    let (acknowledged, seen) = thread::scope(|scope| {
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let (logstore, stop) = (&logstores[writer % 2], &stop);
                scope.spawn(move || write(writer, logstore, stop))
            })
            .collect();
        let readers: Vec<_> = (0..READERS)
            .map(|reader| {
                let logstore = &logstores[reader / 2 % 2];
                let logstore = if reader < 4 {
                    logstore.clone()
                } else {
                    beside.logstore(logstore.name()).unwrap()
                };
                let written = &written;
                scope.spawn(move || follow(reader, &logstore, written))
            })
            .collect();
        let began = Instant::now();
        for round in 0.. {
            let logstore = &logstores[round % 2];
            match round % 8 {
                0 => drop(store.keys().rotate_data_key(logstore.name()).unwrap()),
                1 => logstore.roll().unwrap(),
                2 => drop(store.keys().rewrap(logstore.name()).unwrap()),
                3 => drop(store.keys().rotate_service_key().unwrap()),
                4 => drop(store.admin().checkpoint().unwrap()),
                5 => {
                    world.local().disable(&cmk.cmk_key_id).unwrap();
                    thread::sleep(world.options.revalidate_every * 2);
                    world.local().enable(&cmk.cmk_key_id).unwrap();
                    eventually("the key is back", || {
                        logstores[1].read(0, &ReadOptions::default()).is_ok()
                    });
                }
                6 => drop(store.metrics()),
                _ => {
                    let report =
                        store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
                    assert!(report.is_clean(), "{:?}", report.faults);
                }
            }
            if began.elapsed() >= Duration::from_secs(seconds) {
                break;
            }
        }
        stop.store(true, Ordering::SeqCst);
        let acknowledged: Vec<Acknowledged> =
            writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        logstores.iter().for_each(|logstore| logstore.sync().unwrap());
        written.store(true, Ordering::SeqCst);
        (acknowledged, readers.into_iter().map(|reader| reader.join().unwrap()).collect::<Vec<_>>())
    });
    drop((logstores, beside));
    store.close().unwrap();
    // All acknowledged records are present under their numbers, and every reader has read all
    // records.
    let store = world.open();
    let mut count = 0;
    for (n, text) in ["p/service", "p/byok"].into_iter().enumerate() {
        let logstore = store.logstore(&name(text)).unwrap();
        for shard in 0..SHARDS {
            let found = records(&logstore, shard).unwrap();
            for (_, seq, text) in
                acknowledged.iter().skip(n).step_by(2).flatten().filter(|of| of.0 == shard)
            {
                let at = found.binary_search_by_key(seq, |record| record.seq).unwrap();
                assert_eq!(found[at].bytes, text.as_bytes());
                count += 1;
            }
            let readers = (0..READERS)
                .filter(|reader| (reader / 2 % 2, *reader as u32 % SHARDS) == (n, shard));
            for reader in readers {
                assert!(
                    found.iter().map(|record| &record.seq).eq(&seen[reader]),
                    "reader {reader}"
                );
            }
        }
    }
    println!("{count} acknowledged by {WRITERS} writers, all there");
    assert!(count > WRITERS * 10, "{count}");
}
