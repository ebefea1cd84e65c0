//! A key and nonce pair is never reused: over reopenings, crashes, rotations, copies, and repeating
//! random numbers.
//!
//! The commitment of a segment identifies its key: both derive from the data key, the salt and the
//! hash of the header.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::{HashMap, HashSet},
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
};

use common::{
    failing::{FailingDisk, Failure},
    *,
};
use envelog::{
    Store,
    inspect::{BlockHeader, DecodedFooter, SegmentHeader},
    io::Random,
};

/// The seals of one segment: the key and its nonces.
#[derive(Debug)]
struct Sealed {
    file: PathBuf,
    salt: [u8; 32],
    commitment: [u8; 32],
    /// Each nonce with the sealed bytes, to recognize the same block again.
    nonces: Vec<([u8; 12], Vec<u8>)>,
}

/// Parses every segment below `dir`, including those without a footer.
fn sealed(dir: &Path) -> Vec<Sealed> {
    let segments =
        files(dir).into_iter().filter(|(path, _)| path.extension().is_some_and(|ext| ext == "seg"));
    segments
        .map(|(file, bytes)| {
            let header = SegmentHeader::decode(&bytes).unwrap();
            let (mut at, mut nonces) = (header.body_start as usize, Vec::new());
            while let Ok(block) = BlockHeader::decode(&bytes[at..]) {
                let end = at + block.block_len() as usize;
                let Some(sealed) = bytes.get(at..end) else { break };
                nonces.push((block.nonce(), sealed.to_vec()));
                at = end;
            }
            if let Ok(DecodedFooter { footer, .. }) = envelog::inspect::Footer::decode(&bytes[at..])
            {
                nonces.push((footer.nonce(), bytes[at..].to_vec()));
            }
            Sealed { file, salt: header.header.salt, commitment: header.commitment, nonces }
        })
        .collect()
}

/// All seals seen so far.
#[derive(Default)]
struct Ledger {
    by_key: HashMap<([u8; 32], [u8; 12]), Vec<u8>>,
    by_salt: HashMap<([u8; 32], [u8; 12]), Vec<u8>>,
    /// Whether salts may repeat.
    salts_repeat: bool,
}

impl Ledger {
    /// Adds the current state of the disk. The same sealed bytes may appear again; other bytes
    /// under the same key and nonce must not.
    #[track_caller]
    fn take(&mut self, dir: &Path) {
        for segment in sealed(dir) {
            for (nonce, bytes) in segment.nonces {
                let once =
                    self.by_key.entry((segment.commitment, nonce)).or_insert_with(|| bytes.clone());
                assert!(*once == bytes, "key and nonce met twice in {}", segment.file.display());
                if !self.salts_repeat {
                    let once =
                        self.by_salt.entry((segment.salt, nonce)).or_insert_with(|| bytes.clone());
                    assert!(
                        *once == bytes,
                        "salt and nonce met twice in {}",
                        segment.file.display()
                    );
                }
            }
        }
    }

    fn keys(&self) -> usize {
        self.by_key.keys().map(|(key, _)| key).collect::<HashSet<_>>().len()
    }

    /// The number of blocks and footers.
    fn sealed(&self) -> usize {
        self.by_key.len()
    }
}

/// A predictable random source: a counter, spread over the bytes.
#[derive(Debug)]
struct Foreseeable(AtomicU64);

impl Foreseeable {
    fn seeded(seed: u64) -> Arc<Self> {
        Arc::new(Self(AtomicU64::new(seed)))
    }
}

impl Random for Foreseeable {
    fn fill(&self, buf: &mut [u8]) -> io::Result<()> {
        for chunk in buf.chunks_mut(8) {
            let n = self.0.fetch_add(1, Ordering::SeqCst);
            let spread = n
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(31)
                .wrapping_mul(0xbf58_476d_1ce4_e5b9);
            chunk.copy_from_slice(&spread.to_le_bytes()[..chunk.len()]);
        }
        Ok(())
    }
}

/// Runs several cycles on a store: appends, rotations, and a clean or unclean end. `random`
/// provides the random source of each opening.
fn cycles(
    world: &mut World,
    ledger: &mut Ledger,
    random: impl Fn(u64) -> Option<Arc<dyn Random>>,
    cycles: u64,
) {
    world.options.segment_bytes = 4096;
    let open = |disk: &FailingDisk, cycle: u64, create: bool| -> Store {
        let builder = world.builder().disk(Arc::new(disk.clone()));
        let builder = match random(cycle) {
            Some(random) => builder.insecure_random_for_tests(random),
            None => builder,
        };
        if create { builder.create().unwrap() } else { builder.open().unwrap() }
    };
    let store = open(&FailingDisk::default(), 0, true);
    world.byok(&store, "p/l", &world.cmk());
    store.close().unwrap();
    for cycle in 1..=cycles {
        let disk = FailingDisk::default();
        let store = open(&disk, cycle, false);
        let logstore = store.logstore(&name("p/l")).unwrap();
        for n in 0..4 {
            put(&logstore, &format!("synced {cycle} {n}"));
            // A text of different numbers, which does not compress.
            let long: String = (0..40)
                .map(|k| format!("{:x}", (cycle * 1_000 + n * 100 + k).wrapping_mul(0x9e37_79b9)))
                .collect();
            logstore.append(record(&long), &written()).unwrap();
            ledger.take(&world.store_dir());
        }
        match cycle % 5 {
            0 => drop(store.keys().rotate_data_key(&name("p/l")).unwrap()),
            1 => drop(store.keys().rewrap(&name("p/l")).unwrap()),
            2 => logstore.roll().unwrap(),
            _ => {}
        }
        world.clock.advance(secs(2));
        store.tick();
        // Every second end is unclean: the process dies in the middle of a write.
        if cycle % 2 == 0 {
            disk.fail_after(cycle % 7, Failure::Death);
            for n in 0..8 {
                let _ = try_put(&logstore, &format!("lost {cycle} {n}"));
            }
            ledger.take(&world.store_dir());
        }
        drop((logstore, store));
        ledger.take(&world.store_dir());
    }
}

#[test]
fn over_reopenings_crashes_and_rotations() {
    let (mut world, mut ledger) = (World::manual(), Ledger::default());
    cycles(&mut world, &mut ledger, |_| None, 40);
    assert!(
        ledger.keys() > 40 && ledger.sealed() > 300,
        "{} keys, {} sealed",
        ledger.keys(),
        ledger.sealed()
    );
    let store = world.open();
    let texts = texts(&store.logstore(&name("p/l")).unwrap());
    assert_eq!(texts.iter().filter(|text| text.starts_with("synced")).count(), 40 * 4);
}

#[test]
fn with_randomness_that_is_known_beforehand() {
    let (mut world, mut ledger) = (World::manual(), Ledger::default());
    let source = Foreseeable::seeded(1);
    cycles(&mut world, &mut ledger, |_| Some(source.clone()), 20);
    assert!(ledger.keys() > 20, "{}", ledger.keys());
}

/// Each opening starts with the same random numbers, as on a machine whose generator is restored
/// with its memory. Salts and the random half of the nonces repeat. The header's position in the
/// shard still makes every key different.
#[test]
fn with_randomness_that_repeats_at_each_opening() {
    let (mut world, mut ledger) =
        (World::manual(), Ledger { salts_repeat: true, ..Ledger::default() });
    cycles(&mut world, &mut ledger, |_| Some(Foreseeable::seeded(7)), 20);
    assert!(ledger.keys() > 20, "{}", ledger.keys());
    let salts: Vec<_> =
        sealed(&world.store_dir()).into_iter().map(|segment| segment.salt).collect();
    let distinct: HashSet<_> = salts.iter().collect();
    assert!(distinct.len() < salts.len(), "the randomness did not repeat");
}

/// A machine is resumed twice from one memory snapshot in the middle of a segment: the key and the
/// next block numbers are the same. The system's generator differs, as in a virtual machine, and
/// supplies the random half of the nonce.
#[test]
fn in_a_process_resumed_twice_in_the_middle_of_a_segment() {
    let resumed = [11, 12].map(|seed| {
        let world = World::manual();
        let random = Foreseeable::seeded(3);
        let store = world.builder().insecure_random_for_tests(random.clone()).create().unwrap();
        let logstore = world.service(&store, "p/l");
        (0..5).for_each(|n| put(&logstore, &format!("common {n}")));
        random.0.store(seed << 32, Ordering::SeqCst);
        (0..5).for_each(|n| put(&logstore, &format!("resumed as {seed}: {n}")));
        drop(logstore);
        store.close().unwrap();
        world
    });
    let mut ledger = Ledger::default();
    resumed.iter().for_each(|world| ledger.take(&world.store_dir()));
    let [one, other] = resumed.each_ref().map(|world| sealed(&world.store_dir()).remove(0));
    assert_eq!(
        (one.commitment, one.nonces.len()),
        (other.commitment, other.nonces.len()),
        "it was one process"
    );
    let number = |nonce: &[u8; 12]| nonce[..4].to_vec();
    for (n, (one, other)) in one.nonces.iter().zip(&other.nonces).enumerate() {
        assert_eq!(number(&one.0), number(&other.0));
        assert_eq!((one == other, one.0 == other.0), (n < 5, n < 5), "block {n}");
    }
}

/// A machine is resumed twice from one disk snapshot, and both copies continue to write the same
/// store.
#[test]
fn in_two_copies_that_go_on_from_the_same_state() {
    // After a clean end, and in the middle of a segment.
    for clean in [true, false] {
        let world = World::manual();
        let store = world.create();
        let logstore = world.byok(&store, "p/l", &world.cmk());
        let service = world.service(&store, "p/s");
        for logstore in [&logstore, &service] {
            put(logstore, "common");
            logstore.append(record("above the mark"), &written()).unwrap();
        }
        if clean {
            drop((logstore, service));
            store.close().unwrap();
        }
        let copies = ["a", "b"].map(|copy| world.path().join(copy));
        copies.iter().for_each(|copy| copy_dir(&world.store_dir(), copy));
        let mut ledger = Ledger::default();
        for copy in &copies {
            // Same time, same calls, and data that differs in one byte.
            let builder = Store::builder(copy, world.keyring(), envelog::crypto::AwsLc::new());
            let builder = builder
                .kms(Arc::clone(&world.kms) as _)
                .disk(Arc::new(QuickDisk))
                .options(world.options);
            let store = builder.clock(Arc::clone(&world.clock) as _).open().unwrap();
            for text in ["p/l", "p/s"] {
                let logstore = store.logstore(&name(text)).unwrap();
                for n in 0..5 {
                    put(&logstore, &format!("{} {n}", copy.display()));
                }
                assert_eq!(texts(&logstore).len(), 7);
            }
            store.close().unwrap();
            ledger.take(copy);
        }
        // Both copies assigned the same sequence numbers, under different keys.
        let last = |copy: &Path| {
            sealed(copy)
                .into_iter()
                .map(|segment| segment.file.file_name().unwrap().to_owned())
                .max()
        };
        assert_eq!(last(&copies[0]), last(&copies[1]));
        assert!(ledger.keys() >= 6, "{}", ledger.keys());
    }
}

#[test]
fn a_copied_store_is_locked_for_itself_and_read_as_the_original() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "one");
    let copy = world.path().join("copy");
    copy_dir(&world.store_dir(), &copy);
    assert!(matches!(world.builder().open(), Err(envelog::Error::Locked { .. })));
    let copied =
        Store::builder(&copy, world.keyring(), envelog::crypto::AwsLc::new()).open().unwrap();
    let in_copy = copied.logstore(&name("p/l")).unwrap();
    put(&in_copy, "two");
    put(&logstore, "three");
    assert_eq!(
        (texts(&in_copy), texts(&logstore)),
        (vec!["one".to_owned(), "two".to_owned()], vec!["one".to_owned(), "three".to_owned()])
    );
    drop((in_copy, logstore));
    copied.close().unwrap();
    store.close().unwrap();
    // Segments of one copy are rejected in the other: the chain identifies the right predecessor.
    let name_of = |dir: &Path| {
        files(dir)
            .into_keys()
            .filter(|path| path.extension().is_some_and(|ext| ext == "seg"))
            .max()
            .unwrap()
    };
    let (from, to) = (name_of(&copy), name_of(&world.store_dir()));
    fs::copy(from, to).unwrap();
    let store = world.open();
    let error = try_texts(&store.logstore(&name("p/l")).unwrap()).unwrap_err();
    assert_eq!(error.kind(), envelog::ErrorKind::Integrity, "{error:?}");
}

/// Each envelope is sealed under a fresh key, so that its fixed nonce never repeats: all salts
/// differ.
#[test]
fn envelopes_never_share_a_salt() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    let salts = Mutex::new(Vec::new());
    let take = || {
        for (_, _, wrapped) in envelopes(&world, &logstore) {
            salts.lock().unwrap().push(wrapped.unwrap()[..64].to_owned());
        }
    };
    take();
    for _ in 0..3 {
        store.keys().rotate_data_key(logstore.name()).unwrap();
        store.keys().rewrap(logstore.name()).unwrap();
        take();
        store.keys().rotate_service_key().unwrap();
        take();
    }
    let salts = salts.into_inner().unwrap();
    assert_eq!(salts.iter().collect::<HashSet<_>>().len(), salts.len());
}
