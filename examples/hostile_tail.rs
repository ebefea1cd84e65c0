//! Measures recovery and verification with 64 MiB of hostile bytes at the end of a segment: the
//! time, and the peak memory.
//!
//! `cargo run --release --all-features --example hostile_tail [MIB]`

#![allow(clippy::unwrap_used)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    io::Write as _,
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Instant,
};

use common::*;
use envelog::{
    Compression, EncryptConf, EncryptType, LogstoreSpec,
    admin::VerifyOptions,
    inspect::{BlockHeader, BlockKind},
};

/// Counts allocated bytes and their peak.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: `System` does all the work; this only counts the sizes.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        MOST.fetch_max(now, Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps to the contract of `dealloc`; `memory` came from `System`.
        unsafe { System.dealloc(memory, layout) }
    }
}

/// Tag and CRC32.
const SUFFIX: usize = 20;
const BLOCK_LEN_MIN: usize = BlockHeader::LEN + SUFFIX;
/// The longest payload.
const PAYLOAD_MAX: usize = 32 << 20;

/// Builds the bytes of a tail from the header of the last block in front of it, the offset of the
/// tail, and its length.
type Make = fn(&BlockHeader, u64, usize) -> Vec<u8>;

fn main() {
    let mib: usize = std::env::args().nth(1).map_or(64, |mib| mib.parse().unwrap());
    println!("{mib} MiB behind the last whole block\n");
    println!(
        "| tail | suite | recovery and an append | most memory | verification without keys | most memory |"
    );
    println!("|---|---|---|---|---|---|");
    let tails: [(&str, Make); 8] = [
        ("zeros", |_, _, len| vec![0; len]),
        ("random bytes", |_, _, len| random(len)),
        ("headers every 96 bytes that claim the most", |like, mark, len| {
            headers(like, mark, len, |_, left| left)
        }),
        ("headers every 96 bytes that claim any length", |like, mark, len| {
            headers(like, mark, len, |n, left| {
                left - n.wrapping_mul(2_654_435_761) % (left / 2 + 1)
            })
        }),
        ("whole marks, out of their place", |like, mark, len| marks(like, mark, len, 1)),
        ("whole marks, each in its place", |like, mark, len| marks(like, mark, len, 0)),
        ("whole blocks within each other", nested),
        ("the same, of 1 MiB each", |like, mark, len| {
            (0..len >> 20).flat_map(|_| nested(like, mark, 1 << 20)).collect()
        }),
    ];
    for (what, make) in tails {
        for encrypted in [false, true] {
            measure(what, make, encrypted, mib << 20);
        }
    }
}

fn measure(what: &str, make: Make, encrypted: bool, len: usize) {
    let world = World::manual();
    let store = world.create();
    let mut spec = LogstoreSpec::default().compression(Compression::None);
    if encrypted {
        spec = spec.encrypt_conf(EncryptConf::service_key(EncryptType::Aes));
    }
    let logstore = store.create_logstore(&name("p/l"), spec).unwrap();
    for text in ["first", "second"] {
        put(&logstore, text);
    }
    // The state that a process leaves when it is killed now.
    let killed = world.path().join("killed");
    copy_dir(&world.store_dir(), &killed);
    let dir = world.logstore_dir(&logstore);
    drop((logstore, store));
    copy_dir(&killed, &world.store_dir());
    append_tail(&segments(&dir, 0)[0], make, len);

    let store = world.open();
    let keyless = VerifyOptions::default().keyless(true);
    let verification = timed(|| drop(store.admin().verify(&keyless, &mut |_| {}).unwrap()));
    let logstore = store.logstore(&name("p/l")).unwrap();
    let recovery = timed(|| put(&logstore, "next"));
    assert_eq!(texts(&logstore), ["first", "second", "next"], "{what}");
    let suite = if encrypted { "AES-256-GCM" } else { "AES-256-GMAC" };
    println!("| {what} | {suite} | {recovery} | {verification} |");
}

fn append_tail(segment: &Path, make: Make, len: usize) {
    let bytes = fs::read(segment).unwrap();
    let last = bytes.windows(4).rposition(|magic| magic == b"EBLK").unwrap();
    let like = BlockHeader::decode(&bytes[last..]).unwrap();
    let tail = make(&like, bytes.len() as u64, len);
    fs::OpenOptions::new().append(true).open(segment).unwrap().write_all(&tail).unwrap();
}

/// The duration of `act`, and its peak memory beyond the memory in use before.
fn timed(act: impl FnOnce()) -> String {
    let before = NOW.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let began = Instant::now();
    act();
    let (took, most) = (began.elapsed(), MOST.load(Ordering::Relaxed) - before);
    format!("{:.2} s | {:.1} MiB", took.as_secs_f64(), most as f64 / f64::from(1 << 20))
}

fn random(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..len / 8).flat_map(|_| next()).collect()
}

/// A header that is plausible behind the last block.
fn header(like: &BlockHeader, mark: u64, payload_len: usize) -> BlockHeader {
    let raw_len = payload_len as u32;
    let (number, first_seq) = (like.number + 1, like.end_seq());
    let (kind, group_count) = (BlockKind::Opaque, 1);
    let fields = BlockHeader {
        kind,
        number,
        first_seq,
        group_count,
        log_count: 0,
        durable_mark: mark,
        ..*like
    };
    BlockHeader {
        compression: Compression::None,
        payload_len: raw_len,
        raw_len,
        list_len: raw_len - 4,
        ..fields
    }
}

fn headers(
    like: &BlockHeader,
    mark: u64,
    len: usize,
    claimed: impl Fn(usize, usize) -> usize,
) -> Vec<u8> {
    let mut tail = Vec::with_capacity(len);
    while tail.len() + 2 * BLOCK_LEN_MIN < len {
        let left = (len - tail.len() - BLOCK_LEN_MIN).min(PAYLOAD_MAX);
        let payload_len = claimed(tail.len(), left).max(6);
        tail.extend_from_slice(&header(like, mark, payload_len).encode());
    }
    tail.resize(len, 0);
    tail
}

fn marks(like: &BlockHeader, mark: u64, len: usize, skip: u32) -> Vec<u8> {
    let mut tail = Vec::with_capacity(len);
    for number in like.number + 1 + skip.. {
        if tail.len() + BLOCK_LEN_MIN > len {
            break;
        }
        let fields =
            BlockHeader { kind: BlockKind::Mark, number, group_count: 0, ..header(like, mark, 4) };
        let fields = BlockHeader { payload_len: 0, raw_len: 0, list_len: 0, ..fields };
        let mut block = [&fields.encode()[..], &[0xfa; SUFFIX]].concat();
        fix_crc(&mut block);
        tail.extend_from_slice(&block);
    }
    tail
}

/// Blocks nested within each other, in as many such nests as fit.
fn nested(like: &BlockHeader, mark: u64, len: usize) -> Vec<u8> {
    let mut tail = Vec::with_capacity(len);
    while len - tail.len() >= 2 * BLOCK_LEN_MIN {
        let most = (len - tail.len()).min(PAYLOAD_MAX);
        let (mut headers, core, mut suffixes) = (Vec::new(), [0x45; 13], Vec::new());
        let mut crc = crc32fast::Hasher::new();
        crc.update(&core);
        for inner in
            (core.len()..).step_by(BLOCK_LEN_MIN).take_while(|inner| inner + BLOCK_LEN_MIN <= most)
        {
            // Not in its place: the scan would report it as a forged block there.
            let header =
                BlockHeader { number: like.number + 2, ..header(like, mark, inner) }.encode();
            let mut covered = crc32fast::Hasher::new();
            covered.update(&header);
            covered.combine(&crc);
            covered.update(&[0xfa; SUFFIX - 4]);
            let suffix = covered.clone().finalize().to_le_bytes();
            covered.update(&suffix);
            crc = covered;
            headers.push(header);
            suffixes.extend_from_slice(&[0xfa; SUFFIX - 4]);
            suffixes.extend_from_slice(&suffix);
        }
        tail.extend(headers.iter().rev().flatten());
        tail.extend_from_slice(&core);
        tail.extend_from_slice(&suffixes);
    }
    tail
}
