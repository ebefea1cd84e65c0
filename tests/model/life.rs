//! The steps of a store's history, and the model of the store. `tests/model.rs` and the fuzzer
//! generate the steps.

#![allow(clippy::unwrap_used)]

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::common::{
    disk::{Sim, Survives},
    *,
};
use bytes::Bytes;
use envelog::{
    AppendOptions, Cmk, Durability, EncryptConf, EncryptType, Error, Logstore, LogstoreSpec,
    Payload, Position, ReadMode, ReadOptions, Record, Result, ShardChoice, Store, Ticket,
    admin::{Checkpoint, ShardStatus, VerifyOptions},
    error::ConfigError,
    inspect::BlockKind,
    io::Random,
    kms::RevokedReason,
};

pub(crate) const SHARDS: u32 = 2;
pub(crate) const LOGSTORES: usize = 4;

#[derive(Clone, Debug)]
pub(crate) enum Step {
    Create(usize),
    Append {
        to: usize,
        shard: u32,
        durability: Durability,
        size: usize,
        count: usize,
        ticket: bool,
        group: bool,
    },
    Wait,
    Sync(usize),
    Roll(usize),
    RotateDataKey(usize),
    Rewrap(usize),
    RotateServiceKey,
    /// Splits a readwrite shard at this key, or in the middle if that is not in its range.
    Split(usize, u32, u128),
    /// Merges a readwrite shard with its neighbour.
    Merge(usize, u32),
    Toggle(usize),
    Disable,
    Enable,
    RetainDays(usize),
    RetainBytes(usize, u64),
    Delete(usize),
    Checkpoint,
    Verify,
    Advance(u64),
    Read {
        of: usize,
        shard: u32,
        from: (u8, usize),
        to: Option<(u8, usize)>,
        groups: Option<u64>,
        bytes: Option<u64>,
    },
    Close,
    Kill,
    CutPower(Option<u64>),
}

/// A Logstore with that many shards is not split or merged any more.
const SHARDS_ENOUGH: usize = 12;

/// One of the readwrite shards.
fn writable(logstore: &Logstore, pick: u32) -> u32 {
    let shards = logstore.config().shards;
    let shards: Vec<u32> = shards
        .iter()
        .filter(|shard| shard.status == ShardStatus::ReadWrite)
        .map(|shard| shard.id)
        .collect();
    shards[pick as usize % shards.len()]
}

/// The known outcome of an append.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Known {
    /// No caller has waited for its ticket yet.
    Pending,
    /// The append failed, but the record may be present.
    Failed,
    Acknowledged(Durability),
}

#[derive(Clone, Debug)]
struct Item {
    seq: u64,
    time_us: u64,
    kind: BlockKind,
    bytes: Bytes,
    known: Known,
    /// Retention may have dropped the record, or the record was not written yet when retention ran
    /// or when the key was lost.
    optional: bool,
    /// A crash may have lost the record. The recovery of the shard decides.
    in_doubt: bool,
}

impl Item {
    fn raise(&mut self, durability: Durability) {
        match self.known {
            Known::Acknowledged(known) => self.known = Known::Acknowledged(known.max(durability)),
            Known::Failed => self.known = Known::Acknowledged(durability),
            Known::Pending => {}
        }
    }
}

#[derive(Default)]
struct Shard {
    items: Vec<Item>,
    /// The highest number used. Numbers up to it are never assigned again.
    used: Option<u64>,
    /// Whether it was written to or synced since it was opened, which recovers it.
    recovered: bool,
}

struct Shelf {
    handle: Logstore,
    shards: Vec<Shard>,
    byok: bool,
    /// Records older than this may have been dropped from the front.
    dropped_before_us: u64,
}

struct Life {
    sim: Sim,
    cmk: Cmk,
    store: Option<Store>,
    reading: Option<Store>,
    shelves: Vec<Option<Shelf>>,
    tickets: Vec<(usize, usize, u64, Durability, Ticket)>,
    disabled: bool,
    checkpoint: Option<Checkpoint>,
    appended: u64,
    power_was_cut: bool,
}

/// A random source with the same numbers in every run, without repetitions in a run.
#[derive(Debug)]
struct Repeatable(AtomicU64);

impl Random for Repeatable {
    fn fill(&self, buf: &mut [u8]) -> io::Result<()> {
        for part in buf.chunks_mut(8) {
            let mut number =
                self.0.fetch_add(1, Ordering::SeqCst).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            number = (number ^ (number >> 31)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            part.copy_from_slice(&number.to_le_bytes()[..part.len()]);
        }
        Ok(())
    }
}

fn text_of(n: usize) -> String {
    format!("p/l{n}")
}

/// Updates the model with the records read from a shard. After a crash (`survived`), no record with
/// a higher acknowledged durability may be missing; records after a hole reappear once the shard is
/// recovered. Otherwise only unwritten records may be missing, at the end.
fn settle(
    shard: &mut Shard,
    found: &[Record],
    survived: Option<Durability>,
    dropped_before_us: u64,
) {
    let mut left = found.iter().peekable();
    let (mut any, mut unseen) = (false, false);
    let mut kept = Vec::new();
    for mut item in shard.items.drain(..) {
        if let Some(record) = left.next_if(|record| record.seq == item.seq) {
            let same = (record.receive_time_us, record.kind, &record.bytes)
                == (item.time_us, item.kind, &item.bytes);
            assert!(same, "{} is not what was appended", item.seq);
            assert!(!unseen, "{} is there, something before it is not", item.seq);
            if item.known == Known::Pending && survived.is_some() {
                item.known = Known::Failed; // the process that held its ticket is gone
            }
            item.raise(Durability::Written);
            (item.optional, item.in_doubt) = (false, false);
            any = true;
            kept.push(item);
            continue;
        }
        let unwritten =
            matches!(item.known, Known::Pending | Known::Acknowledged(Durability::Buffered));
        let dropped = !any && item.time_us < dropped_before_us;
        item.optional |= dropped && unwritten;
        match (item.known, survived) {
            (_, None) if item.in_doubt => {
                if !shard.recovered {
                    kept.push(item);
                }
            }
            (_, None) if item.optional => kept.push(item),
            _ if item.optional || dropped => {}
            (Known::Failed, None) => {}
            (Known::Acknowledged(known), Some(survived)) if known >= survived => {
                panic!("{} was acknowledged as {known:?} and is lost", item.seq);
            }
            (_, Some(_)) => {
                item.in_doubt = true;
                item.known = Known::Failed;
                kept.push(item);
            }
            (Known::Pending | Known::Acknowledged(Durability::Buffered), None) => {
                unseen = true;
                kept.push(item);
            }
            (Known::Acknowledged(known), None) => {
                panic!("{} is {known:?} and cannot be read", item.seq)
            }
        }
    }
    assert_eq!(left.next().map(|record| record.seq), None, "a record that was never appended");
    shard.items = kept;
}

impl Life {
    fn new() -> Self {
        let mut sim = Sim::new();
        sim.world.options.segment_bytes = 8 << 10;
        sim.world.options.block_bytes = 4 << 10;
        let cmk = sim.world.cmk();
        let random = Arc::new(Repeatable(AtomicU64::new(0)));
        sim.customize(move |builder| builder.insecure_random_for_tests(random.clone()));
        let store = sim.create();
        let reading = sim.builder().open_read_only().unwrap();
        Self {
            sim,
            cmk,
            store: Some(store),
            reading: Some(reading),
            shelves: (0..LOGSTORES).map(|_| None).collect(),
            tickets: Vec::new(),
            disabled: false,
            checkpoint: None,
            appended: 0,
            power_was_cut: false,
        }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    fn now_us(&self) -> u64 {
        envelog::io::Clock::wall_us(&*self.sim.world.clock)
    }

    /// Whether the Logstore must refuse operations that need its key.
    fn refused(&self, n: usize) -> bool {
        self.disabled && self.shelves[n].as_ref().is_some_and(|shelf| shelf.byok)
    }

    /// Checks the result of an operation that needs the key. Returns `None` if it was refused, as
    /// expected.
    fn gated<T: std::fmt::Debug>(&self, n: usize, result: Result<T>) -> Option<T> {
        if self.refused(n) {
            assert_revoked(result, RevokedReason::Disabled);
            return None;
        }
        Some(result.unwrap())
    }

    fn tick(&self) {
        self.store().tick();
        if let Some(reading) = &self.reading {
            reading.tick();
        }
    }

    fn create(&mut self, n: usize) {
        let conf = match n {
            0 => None,
            1 => Some(EncryptConf::service_key(EncryptType::Aes)),
            2 => Some(EncryptConf::byok(EncryptType::Sm4, self.cmk.clone())),
            _ => Some(EncryptConf::byok(EncryptType::Aes, self.cmk.clone())),
        };
        let spec = LogstoreSpec::default().shard_count(SHARDS).encrypt_conf(conf);
        let created = self.store().create_logstore(&name(&text_of(n)), spec);
        if self.shelves[n].is_some() {
            assert!(matches!(created, Err(Error::LogstoreExists(_))));
            return;
        }
        if n >= 2 && self.disabled {
            assert!(
                matches!(created, Err(Error::Config(ConfigError::CmkRefused { .. }))),
                "{created:?}"
            );
            return;
        }
        let shards = (0..SHARDS).map(|_| Shard::default()).collect();
        self.shelves[n] =
            Some(Shelf { handle: created.unwrap(), shards, byok: n >= 2, dropped_before_us: 0 });
    }

    fn append(
        &mut self,
        n: usize,
        shard: u32,
        durability: Durability,
        size: usize,
        ticket: bool,
        as_group: bool,
    ) {
        let Some(shelf) = &self.shelves[n] else { return };
        let shard = writable(&shelf.handle, shard);
        self.appended += 1;
        let text = format!("{} {}", self.appended, "abcdefgh".repeat(size / 8));
        let payload =
            if as_group { Payload::try_from(&group(&text, 2)).unwrap() } else { record(&text) };
        let kind = if as_group { BlockKind::Groups } else { BlockKind::Opaque };
        let bytes = if as_group { group(&text, 2).encode_to_bytes() } else { Bytes::from(text) };
        let options =
            AppendOptions::default().shard(ShardChoice::Shard(shard)).durability(durability);
        let time_us = self.now_us();
        let (seq, known, ticket) = match ticket {
            true => {
                let Some(ticket) = self.gated(n, shelf.handle.try_submit(payload, &options)) else {
                    return;
                };
                (ticket.appended().unwrap().seq, Known::Pending, Some(ticket))
            }
            false => {
                let Some(appended) = self.gated(n, shelf.handle.append(payload, &options)) else {
                    return;
                };
                (appended.seq, Known::Acknowledged(durability), None)
            }
        };
        let place = &mut self.shelves[n].as_mut().unwrap().shards[shard as usize];
        assert!(place.used.is_none_or(|used| seq > used), "{seq} was given before");
        (place.used, place.recovered) = (Some(seq), true);
        if let Known::Acknowledged(durability) = known {
            // All records before it are at least as durable.
            place
                .items
                .iter_mut()
                .filter(|item| item.known != Known::Failed)
                .for_each(|item| item.raise(durability));
        }
        place.items.push(Item {
            seq,
            time_us,
            kind,
            bytes,
            known,
            optional: false,
            in_doubt: false,
        });
        if let Some(ticket) = ticket {
            self.tickets.push((n, shard as usize, seq, durability, ticket));
        }
    }

    /// Splits a readwrite shard at this key, or merges it with its neighbour. What the parents have
    /// accepted is durable then, and they accept no more.
    fn reshard(&mut self, n: usize, shard: u32, key: Option<u128>) {
        let Some(shelf) = &self.shelves[n] else { return };
        let shard = writable(&shelf.handle, shard);
        let (store, name) = (self.store().clone(), shelf.handle.name().clone());
        let config = shelf.handle.config();
        if config.shards.len() >= SHARDS_ENOUGH {
            return;
        }
        let (parents, children) = match key {
            Some(key) => {
                let owns = config.shards[shard as usize].owns(key);
                let begins = config.shards[shard as usize].begin_key == format!("{key:032x}");
                let at = Some(key).filter(|key| owns && !begins && *key < u128::MAX);
                let split = store.split_shard(&name, shard, at);
                let Some(split) = self.gated(n, split) else { return };
                (vec![split.parent], vec![split.low, split.high])
            }
            None => {
                let merge = store.merge_shards(&name, shard);
                let end_key = &config.shards[shard as usize].end_key;
                if *end_key == "f".repeat(32) {
                    let refused = merge.unwrap_err();
                    assert!(matches!(refused, Error::Config(ConfigError::NoNeighbour { .. })));
                    return;
                }
                let Some(merge) = self.gated(n, merge) else { return };
                (vec![merge.left, merge.right], vec![merge.merged])
            }
        };
        let shelf = self.shelves[n].as_mut().unwrap();
        for parent in parents {
            let place = &mut shelf.shards[parent.id as usize];
            place.recovered = true;
            let kept = place.items.iter_mut().filter(|item| item.known != Known::Failed);
            kept.for_each(|item| item.raise(Durability::Synced));
            let options = AppendOptions::default().shard(ShardChoice::Shard(parent.id));
            let refused = shelf.handle.append(record("late"), &options).unwrap_err();
            let ids: Vec<u32> = children.iter().map(|child| child.id).collect();
            assert!(matches!(refused, Error::ShardReadOnly { children, .. } if children == ids));
        }
        for child in children {
            assert_eq!(child.id as usize, shelf.shards.len(), "no number is used twice");
            shelf.shards.push(Shard::default());
            let key = u128::from_str_radix(&child.begin_key, 16).unwrap();
            let owner = shelf
                .handle
                .config()
                .shards
                .iter()
                .find(|shard| shard.status == ShardStatus::ReadWrite && shard.owns(key))
                .map(|shard| shard.id);
            assert_eq!(owner, Some(child.id));
        }
    }

    /// Waits for all tickets.
    fn wait(&mut self) {
        for (n, shard, seq, durability, ticket) in std::mem::take(&mut self.tickets) {
            let result = ticket.wait();
            let Some(shelf) = &mut self.shelves[n] else { continue };
            let Some(item) = shelf.shards[shard].items.iter_mut().find(|item| item.seq == seq)
            else {
                continue;
            };
            match result {
                Ok(appended) => {
                    assert_eq!((appended.shard as usize, appended.seq), (shard, seq));
                    item.known = Known::Acknowledged(durability);
                }
                Err(error) => {
                    // The key may have been disabled since the submission.
                    assert!(is_revoked(&error, RevokedReason::Disabled) && shelf.byok, "{error}");
                    item.known = Known::Failed;
                }
            }
        }
    }

    fn durable(&mut self, n: usize) {
        let shelf = self.shelves[n].as_mut().unwrap();
        // Recovery makes the records of an earlier process durable.
        let recovered = shelf.shards.iter_mut().filter(|shard| shard.recovered);
        for item in recovered.flat_map(|shard| &mut shard.items) {
            if item.known != Known::Failed {
                item.raise(Durability::Synced);
            }
        }
    }

    fn records(&self, n: usize, shard: u32) -> Result<Vec<Record>> {
        records(&self.shelves[n].as_ref().unwrap().handle, shard)
    }

    /// Reads all readable records, with the store and with a read-only opener, and compares them
    /// with the model.
    fn check(&mut self, survived: Option<Durability>) {
        for n in 0..LOGSTORES {
            if self.shelves[n].is_none() {
                let missing = self.store().logstore(&name(&text_of(n)));
                assert!(matches!(missing, Err(Error::LogstoreMissing(_))));
                continue;
            }
            let shards = self.shelves[n].as_ref().unwrap().shards.len();
            for shard in 0..shards as u32 {
                let found = self.records(n, shard);
                let reading = self.reading.as_ref().unwrap();
                let beside = reading
                    .logstore(&name(&text_of(n)))
                    .and_then(|logstore| records(&logstore, shard));
                let Some(found) = self.gated(n, found) else {
                    assert_revoked(beside, RevokedReason::Disabled);
                    continue;
                };
                assert!(beside.unwrap() == found, "the other opener does not see the same");
                let shelf = self.shelves[n].as_mut().unwrap();
                settle(
                    &mut shelf.shards[shard as usize],
                    &found,
                    survived,
                    shelf.dropped_before_us,
                );
            }
            if !self.refused(n) {
                self.shelves[n].as_mut().unwrap().dropped_before_us = 0;
            }
        }
    }

    fn read(
        &mut self,
        n: usize,
        shard: u32,
        from: (u8, usize),
        to: Option<(u8, usize)>,
        limits: [Option<u64>; 2],
    ) {
        let Some(shelf) = &self.shelves[n] else { return };
        let shard = shard % shelf.shards.len() as u32;
        let Some(all) = self.gated(n, self.records(n, shard)) else { return };
        let place = |(kind, index): (u8, usize)| match (kind, all.get(index % (all.len() + 1))) {
            (1, _) => (Position::End, all.len()),
            (0, _) | (_, None) => (Position::Begin, 0),
            (2, Some(record)) => {
                // A number above the end is an error.
                let end = all.last().map_or(0, |last| last.seq + 1);
                let seq = (record.seq + (index as u64 / 20)).min(end);
                (Position::Seq(seq), all.partition_point(|record| record.seq < seq))
            }
            (_, Some(record)) => {
                let time = record.receive_time_us + (index as u64 / 20);
                (Position::Time(time), all.partition_point(|record| record.receive_time_us < time))
            }
        };
        let (from, begin) = place(from);
        let (to, end) = to.map_or((None, all.len()), |to| (Some(place(to).0), place(to).1));
        let [max_groups, max_bytes] = limits;
        let mut expected = Vec::new();
        let mut bytes = 0;
        for record in &all[begin..end.max(begin)] {
            if max_groups.is_some_and(|max| expected.len() as u64 >= max)
                || max_bytes.is_some_and(|max| bytes >= max)
            {
                break;
            }
            bytes += record.bytes.len() as u64;
            expected.push(record.clone());
        }
        for mode in [ReadMode::Pread, ReadMode::Map] {
            let options = ReadOptions::default()
                .from(from)
                .to(to)
                .max_groups(max_groups)
                .max_bytes(max_bytes)
                .mode(mode);
            let found: Vec<Record> =
                shelf.handle.read(shard, &options).unwrap().collect::<Result<_>>().unwrap();
            assert!(found == expected, "{options:?}");
        }
    }

    /// Whether each shard keeps no more than its limit.
    fn is_within(&self, handle: &Logstore, retention_bytes: Option<u64>) -> bool {
        let dir = self.sim.world.logstore_dir(handle);
        (0..SHARDS).all(|shard| {
            let segments = self.sim.disk.segments(&dir, shard);
            let bytes = segments.iter().map(|path| self.sim.disk.bytes(path).len() as u64);
            // The newest segment with data stays, and an empty one may be open.
            retention_bytes.is_none_or(|max| segments.len() <= 2 || bytes.sum::<u64>() <= max)
        })
    }

    fn retain(&mut self, n: usize, ttl_days: Option<u32>, retention_bytes: Option<u64>) {
        let Some(shelf) = &self.shelves[n] else { return };
        let handle = shelf.handle.clone();
        let with = |ttl_days, retention_bytes| {
            handle.config().ttl_days(ttl_days).retention_bytes(retention_bytes)
        };
        let updated = self.store().update_logstore(handle.name(), with(ttl_days, retention_bytes));
        if self.refused(n) && (ttl_days.is_some() || retention_bytes.is_some()) {
            // The data key authenticates the retention settings.
            assert_revoked(updated, RevokedReason::Disabled);
            return;
        }
        updated.unwrap();
        let mut report = self.store().admin().apply_retention().unwrap();
        assert!(!report.suspended);
        if !self.is_within(&handle, retention_bytes) {
            // Segments behind the last head stay, and recovery makes some without a new head.
            handle.sync().unwrap();
            report.segments += self.store().admin().apply_retention().unwrap().segments;
        }
        // A power loss may bring back dropped files. Recovery removes them again.
        assert!(
            self.power_was_cut || self.is_within(&handle, retention_bytes),
            "more than {retention_bytes:?} is kept"
        );
        self.store().update_logstore(handle.name(), with(None, None)).unwrap();
        let oldest_us = ttl_days
            .map_or(u64::MAX, |days| self.now_us() - u64::from(days) * DAY.as_micros() as u64);
        let shelf = self.shelves[n].as_mut().unwrap();
        shelf.dropped_before_us =
            shelf.dropped_before_us.max(if report.segments > 0 { oldest_us } else { 0 });
    }

    fn verify(&mut self) {
        for keyless in [true, false] {
            let mut options = VerifyOptions::default().keyless(keyless);
            options.against = self.checkpoint.clone();
            let report = self.store().admin().verify(&options, &mut |_| {}).unwrap();
            assert!(report.is_clean(), "{:?}", report.faults);
            let refused: Vec<_> =
                (0..LOGSTORES).filter(|n| !keyless && self.refused(*n)).map(text_of).collect();
            let named: Vec<_> =
                report.refused.iter().map(|(logstore, _)| logstore.to_string()).collect();
            assert_eq!(named, refused);
        }
    }

    /// The key is lost: groups that are in no block, and that the active segment does not take, are
    /// lost with it.
    fn may_lose_buffered(&mut self) {
        let byok = self.shelves.iter_mut().flatten().filter(|shelf| shelf.byok);
        for item in byok.flat_map(|shelf| &mut shelf.shards).flat_map(|shard| &mut shard.items) {
            item.optional |= item.known == Known::Acknowledged(Durability::Buffered);
        }
    }

    fn enable(&mut self) {
        if !self.disabled {
            return;
        }
        self.sim.world.local().enable(&self.cmk.cmk_key_id).unwrap();
        self.disabled = false;
        self.sim.world.clock.advance(secs(32));
        self.tick();
    }

    /// Opens the store again, in a new process.
    fn reopen(&mut self, survived: Durability) {
        self.store = Some(self.sim.open());
        self.reading = Some(self.sim.builder().open_read_only().unwrap());
        for n in 0..LOGSTORES {
            let found = self.store().logstore(&name(&text_of(n)));
            match &mut self.shelves[n] {
                None => assert!(matches!(found, Err(Error::LogstoreMissing(_)))),
                Some(shelf) => {
                    shelf.handle = found.unwrap();
                    shelf.shards.iter_mut().for_each(|shard| shard.recovered = false);
                }
            }
        }
        // Comparing the records requires the key.
        self.check_gates();
        self.enable();
        self.check(Some(survived));
    }

    /// Checks that a Logstore without an accessible key refuses its first operation.
    fn check_gates(&self) {
        for n in (0..LOGSTORES).filter(|n| self.refused(*n)) {
            let handle = &self.shelves[n].as_ref().unwrap().handle;
            assert_revoked(try_put(handle, "refused"), RevokedReason::Disabled);
            assert_revoked(self.records(n, 0), RevokedReason::Disabled);
        }
    }

    /// A kill or a power loss: operations on the old handles no longer matter.
    fn crash(&mut self, sim_disk: disk::SimDisk, survived: Durability) {
        let abandoned = (self.store.take(), self.reading.take(), std::mem::take(&mut self.tickets));
        let handles: Vec<Logstore> =
            self.shelves.iter().flatten().map(|shelf| shelf.handle.clone()).collect();
        self.sim.disk = sim_disk;
        self.reopen(survived);
        drop((abandoned, handles));
    }

    fn run(&mut self, step: &Step) {
        match step.clone() {
            Step::Create(n) => self.create(n),
            Step::Append { to, shard, durability, size, count, ticket, group } => {
                for _ in 0..count {
                    self.append(to, shard, durability, size, ticket, group);
                }
            }
            Step::Wait => self.wait(),
            Step::Sync(n) => {
                self.wait();
                let Some(shelf) = &self.shelves[n] else { return };
                let mut result = shelf.handle.sync();
                while let Err(Error::GroupsLost { .. }) = result {
                    // Each shard reports its lost groups once.
                    result = shelf.handle.sync();
                }
                match self.refused(n) {
                    // There may be no data left to sync.
                    true => assert!(
                        result.is_ok() || is_revoked(&result.unwrap_err(), RevokedReason::Disabled)
                    ),
                    false => {
                        result.unwrap();
                        let shelf = self.shelves[n].as_mut().unwrap();
                        shelf.shards.iter_mut().for_each(|shard| shard.recovered = true);
                        self.durable(n);
                    }
                }
            }
            Step::Roll(n) => {
                self.wait();
                let Some(shelf) = &self.shelves[n] else { return };
                let result = shelf.handle.roll();
                match self.refused(n) {
                    true => assert!(
                        result.is_ok() || is_revoked(&result.unwrap_err(), RevokedReason::Disabled)
                    ),
                    false => {
                        result.unwrap();
                        self.durable(n);
                    }
                }
            }
            Step::RotateDataKey(n) | Step::Rewrap(n) => {
                let Some(shelf) = &self.shelves[n] else { return };
                let encrypted = shelf.handle.config().encrypt_conf.is_some();
                let result = match step {
                    Step::Rewrap(_) => self.store().keys().rewrap(shelf.handle.name()),
                    _ => self.store().keys().rotate_data_key(shelf.handle.name()),
                };
                match encrypted {
                    true => drop(self.gated(n, result)),
                    false => {
                        assert!(matches!(result, Err(Error::Config(ConfigError::NotEncrypted))))
                    }
                }
            }
            Step::RotateServiceKey => {
                self.store().keys().rotate_service_key().unwrap();
                if let Some(against) = self.checkpoint.take() {
                    let options = VerifyOptions::default().against(against);
                    let refused = self.store().admin().verify(&options, &mut |_| {});
                    assert!(matches!(refused, Err(Error::RetiredKeyVersion { .. })), "{refused:?}");
                }
            }
            Step::Split(n, shard, key) => self.reshard(n, shard, Some(key)),
            Step::Merge(n, shard) => self.reshard(n, shard, None),
            Step::Toggle(n) => {
                let Some(shelf) = &self.shelves[n] else { return };
                let config = shelf.handle.config();
                let conf = match config.encrypt_conf.clone() {
                    None => EncryptConf::service_key(EncryptType::Sm4),
                    Some(conf) => EncryptConf { enable: !conf.enable, ..conf },
                };
                let config = config.encrypt_conf(conf);
                drop(self.gated(n, self.store().update_logstore(shelf.handle.name(), config)));
            }
            Step::Disable => {
                if !self.disabled {
                    self.sim.world.local().disable(&self.cmk.cmk_key_id).unwrap();
                    self.disabled = true;
                    self.may_lose_buffered();
                    self.sim.world.clock.advance(secs(32));
                    self.tick();
                    // Some tickets have failed.
                    self.wait();
                }
                self.check_gates();
            }
            Step::Enable => self.enable(),
            Step::RetainDays(n) => self.retain(n, Some(1), None),
            Step::RetainBytes(n, bytes) => self.retain(n, None, Some(bytes)),
            Step::Delete(n) => {
                let Some(shelf) = self.shelves[n].take() else { return };
                self.store().delete_logstore(shelf.handle.name()).unwrap();
                assert!(matches!(try_put(&shelf.handle, "late"), Err(Error::Closed(_))));
                self.tickets.retain(|(of, ..)| *of != n);
            }
            Step::Checkpoint => {
                self.wait();
                self.checkpoint = Some(self.store().admin().checkpoint().unwrap());
                for n in 0..LOGSTORES {
                    if self.shelves[n].is_some() && !self.refused(n) {
                        self.durable(n);
                    }
                }
            }
            Step::Verify => self.verify(),
            Step::Advance(by) => {
                self.sim.world.clock.advance(millis(by));
                self.tick();
            }
            Step::Read { of, shard, from, to, groups, bytes } => {
                self.read(of, shard, from, to, [groups, bytes])
            }
            Step::Close => {
                self.wait();
                let closed = self.store.take().unwrap().close();
                let survived = match &closed {
                    Ok(()) => Durability::Buffered,
                    // Buffered groups were lost because there was no key to seal them.
                    Err(error) => {
                        let lost = matches!(error, Error::GroupsLost { .. });
                        assert!(
                            lost || self.disabled && is_revoked(error, RevokedReason::Disabled),
                            "{error}"
                        );
                        Durability::Written
                    }
                };
                self.reopen(survived);
            }
            Step::Kill => {
                let disk = self.sim.disk.kill();
                self.crash(disk, Durability::Written);
            }
            Step::CutPower(seed) => {
                let survives = seed.map_or(Survives::Synced, |seed| Survives::Some { seed });
                let disk = self.sim.disk.crash(survives);
                self.power_was_cut = true;
                self.crash(disk, Durability::Synced);
            }
        }
        self.check(None);
    }
}

/// Runs a whole history of these steps. The fuzzer calls this function too.
pub(crate) fn live(steps: &[Step]) {
    let mut life = Life::new();
    // Starts with some data, so that short histories are not empty.
    for n in 0..LOGSTORES {
        life.run(&Step::Create(n));
    }
    for step in steps {
        life.run(step);
    }
    life.verify();
    life.enable();
    life.run(&Step::Close);
    life.verify();
}
