//! SM4-GCM against RFC 8998 and against RustCrypto's `aes-gcm` over `sm4`, with every backend and
//! every multiplication of this machine.

#![allow(clippy::unwrap_used)]

mod common;

use aes_gcm::{
    AesGcm,
    aead::{AeadInOut, KeyInit, Nonce, Tag, consts::U12, inout::InOutBuf},
};
use common::backends;
use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};
use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};
use sm4_simd::{
    Backend, Sm4, Sm4Gcm,
    cipher::{Array, BlockCipherEncrypt, zeroize::ZeroizeOnDrop},
};

type Oracle = AesGcm<sm4::Sm4, U12>;

/// Every pair of a backend and a multiplication.
fn all() -> Vec<(Backend, &'static str)> {
    let multipliers: Vec<_> = Sm4Gcm::multipliers().collect();
    println!("multiplications: {multipliers:?}");
    backends()
        .into_iter()
        .flat_map(|backend| multipliers.iter().map(move |&multiplier| (backend, multiplier)))
        .collect()
}

/// Pairs that cover every backend and every multiplication, for tests in which all pairs would take
/// too long.
fn each() -> Vec<(Backend, &'static str)> {
    let (backends, multipliers) = (backends(), Sm4Gcm::multipliers().collect::<Vec<_>>());
    let count = backends.len().max(multipliers.len());
    (0..count).map(|i| (backends[i % backends.len()], multipliers[i % multipliers.len()])).collect()
}

fn random(rng: &mut StdRng, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rng.fill_bytes(&mut bytes);
    bytes
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<_> = text.chars().filter(|c| !c.is_whitespace()).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(&pair.iter().collect::<String>(), 16).unwrap())
        .collect()
}

/// RFC 8998, appendix A.1.
#[test]
fn vector_of_rfc_8998() {
    let key: [u8; 16] = hex("0123456789ABCDEFFEDCBA9876543210").try_into().unwrap();
    let nonce = Nonce::<Sm4Gcm>::try_from(&hex("00001234567800000000ABCD")[..]).unwrap();
    let aad = hex("FEEDFACEDEADBEEFFEEDFACEDEADBEEFABADDAD2");
    let plain = hex("AAAAAAAAAAAAAAAABBBBBBBBBBBBBBBB CCCCCCCCCCCCCCCCDDDDDDDDDDDDDDDD
                     EEEEEEEEEEEEEEEEFFFFFFFFFFFFFFFF EEEEEEEEEEEEEEEEAAAAAAAAAAAAAAAA");
    let sealed = hex("17F399F08C67D5EE19D0DC9969C4BB7D 5FD46FD3756489069157B282BB200735
                      D82710CA5C22F0CCFA7CBF93D496AC15 A56834CBCF98C397B4024A2691233B8D");
    let tag = Tag::<Sm4Gcm>::try_from(&hex("83DE3541E4C2B58177E065A9BF7B62EC")[..]).unwrap();
    for (backend, multiplier) in all() {
        let cipher = Sm4Gcm::with_backend(&key.into(), backend, multiplier).unwrap();
        let mut buffer = plain.clone();
        let made = cipher.encrypt_inout_detached(&nonce, &aad, (&mut buffer[..]).into()).unwrap();
        assert_eq!((&buffer, made), (&sealed, tag), "{backend}, {multiplier}");
        cipher.decrypt_inout_detached(&nonce, &aad, (&mut buffer[..]).into(), &tag).unwrap();
        assert_eq!(buffer, plain, "{backend}, {multiplier}");
    }
}

struct Case {
    ours: Sm4Gcm,
    theirs: Oracle,
    nonce: Nonce<Sm4Gcm>,
    aad: Vec<u8>,
    plain: Vec<u8>,
    what: String,
}

impl Case {
    fn new(rng: &mut StdRng, (backend, multiplier): (Backend, &str), len: usize) -> Self {
        let key: [u8; 16] = rng.random();
        let aad_len = rng.random_range(0..300);
        Case {
            ours: Sm4Gcm::with_backend(&key.into(), backend, multiplier).unwrap(),
            theirs: Oracle::new(&key.into()),
            nonce: rng.random::<[u8; 12]>().into(),
            aad: random(rng, aad_len),
            plain: random(rng, len),
            what: format!("{backend}, {multiplier}, {len} bytes, {aad_len} of associated data"),
        }
    }

    /// The message sealed by the reference implementation.
    fn sealed(&self) -> (Vec<u8>, Tag<Sm4Gcm>) {
        let mut sealed = self.plain.clone();
        let tag = self
            .theirs
            .encrypt_inout_detached(&self.nonce, &self.aad, (&mut sealed[..]).into())
            .unwrap();
        (sealed, tag)
    }

    /// Seals and opens with input and output at the given distances from the start of their
    /// buffers.
    fn check(&self, at: usize, out_at: usize) {
        let (sealed, tag) = self.sealed();
        let (len, what) = (self.plain.len(), format!("{}, at {at} and {out_at}", self.what));
        let (mut input, mut output) = (vec![0xa5; at + len + 64], vec![0x5a; out_at + len + 64]);

        input[at..at + len].copy_from_slice(&self.plain);
        let in_out =
            InOutBuf::new(&input[at..at + len], &mut output[out_at..out_at + len]).unwrap();
        let made = self.ours.encrypt_inout_detached(&self.nonce, &self.aad, in_out).unwrap();
        assert_eq!(output[out_at..out_at + len], sealed, "{what}");
        assert_eq!(made, tag, "{what}");

        let in_place = &mut input[at..at + len];
        let made =
            self.ours.encrypt_inout_detached(&self.nonce, &self.aad, in_place.into()).unwrap();
        assert_eq!((&input[at..at + len], made), (&sealed[..], tag), "{what}");

        output[out_at..out_at + len].fill(0);
        let in_out =
            InOutBuf::new(&input[at..at + len], &mut output[out_at..out_at + len]).unwrap();
        self.ours.decrypt_inout_detached(&self.nonce, &self.aad, in_out, &tag).unwrap();
        assert_eq!(output[out_at..out_at + len], self.plain, "{what}");

        let in_place = &mut input[at..at + len];
        self.ours.decrypt_inout_detached(&self.nonce, &self.aad, in_place.into(), &tag).unwrap();
        assert_eq!(input[at..at + len], self.plain, "{what}");

        for (buffer, from, filler) in [(&input, at, 0xa5), (&output, out_at, 0x5a)] {
            let outside = buffer[..from].iter().chain(&buffer[from + len..]);
            assert!(
                outside.into_iter().all(|&byte| byte == filler),
                "{what}: wrote outside of the buffer"
            );
        }
    }
}

/// Every length from 0 to 4,200 bytes, at alignments that change with the length.
#[test]
fn every_length() {
    let mut rng = StdRng::seed_from_u64(1);
    for pair in each() {
        for len in 0..=4200 {
            Case::new(&mut rng, pair, len).check(len % 64, (7 * len + 1) % 64);
        }
    }
}

/// Every alignment of input and output at a few lengths, and lengths near the size of the hashed
/// chunks.
#[test]
fn every_alignment_and_long_messages() {
    let mut rng = StdRng::seed_from_u64(2);
    for pair in all() {
        for at in 0..64 {
            Case::new(&mut rng, pair, 1087).check(at, 63 - at);
        }
        for len in [8191, 8192, 8193, 8208, 16_384, 16_385, 24_575, 65_536, 100_003] {
            Case::new(&mut rng, pair, len).check(0, 0);
        }
    }
}

/// Any single changed bit makes opening fail, and the output stays unchanged.
#[test]
fn what_was_changed_is_refused() {
    let mut rng = StdRng::seed_from_u64(3);
    for pair in all() {
        for len in [0, 1, 16, 33, 496, 497, 1200] {
            let mut case = Case::new(&mut rng, pair, len);
            case.aad = random(&mut rng, 20);
            let (mut sealed, mut tag) = case.sealed();
            let refused = |sealed: &[u8], aad: &[u8], nonce: &Nonce<Sm4Gcm>, tag: &Tag<Sm4Gcm>| {
                let mut out = vec![0x77; sealed.len()];
                let in_out = InOutBuf::new(sealed, &mut out).unwrap();
                let result = case.ours.decrypt_inout_detached(nonce, aad, in_out, tag);
                assert!(result.is_err(), "{}", case.what);
                assert!(out.iter().all(|&byte| byte == 0x77), "{}", case.what);
            };
            for bit in 0..128 {
                tag[bit / 8] ^= 1 << (bit % 8);
                refused(&sealed, &case.aad, &case.nonce, &tag);
                tag[bit / 8] ^= 1 << (bit % 8);
            }
            for bit in (0..8 * len).step_by(if len > 100 { 37 } else { 1 }) {
                sealed[bit / 8] ^= 1 << (bit % 8);
                refused(&sealed, &case.aad, &case.nonce, &tag);
                sealed[bit / 8] ^= 1 << (bit % 8);
            }
            for bit in 0..160 {
                let mut aad = case.aad.clone();
                aad[bit / 8] ^= 1 << (bit % 8);
                refused(&sealed, &aad, &case.nonce, &tag);
            }
            for bit in 0..96 {
                let mut nonce = case.nonce;
                nonce[bit / 8] ^= 1 << (bit % 8);
                refused(&sealed, &case.aad, &nonce, &tag);
            }
            if len > 0 {
                refused(&sealed[..len - 1], &case.aad, &case.nonce, &tag);
            }
            refused(&[&sealed[..], &[0]].concat(), &case.aad, &case.nonce, &tag);
            refused(&sealed, &case.aad[..19], &case.nonce, &tag);
        }
    }
}

/// The 32-bit counter wraps without a carry into the nonce, at every position in the groups of
/// every backend.
#[test]
fn the_counter_wraps() {
    let mut rng = StdRng::seed_from_u64(4);
    for backend in backends() {
        let key: [u8; 16] = rng.random();
        let nonce: [u8; 12] = rng.random();
        let ours = Sm4::with_backend(&key.into(), backend).unwrap();
        let one = sm4::Sm4::new(&key.into());
        for back in 0..=130_u32 {
            let counter = 0_u32.wrapping_sub(back);
            let mut stream = vec![0; 150 * 16 + 5];
            ours.ctr32(&nonce, counter, (&mut stream[..]).into());
            for (i, block) in stream.chunks(16).enumerate() {
                let counter = counter.wrapping_add(i as u32);
                let mut expected =
                    Array::try_from(&[&nonce[..], &counter.to_be_bytes()].concat()[..]).unwrap();
                one.encrypt_block(&mut expected);
                assert_eq!(
                    block,
                    &expected[..block.len()],
                    "{backend}, {back} before the end, block {i}"
                );
            }
        }
    }
}

/// Buffers that begin or end at the end of accessible memory: an access beyond them faults.
#[test]
fn nothing_beyond_the_buffers_is_touched() {
    let mut rng = StdRng::seed_from_u64(5);
    let (mut input, mut output) = (Guarded::new(), Guarded::new());
    for pair in each() {
        for len in 0..=Guarded::LEN {
            if len > 600 && len % 61 != 0 {
                continue;
            }
            let case = Case::new(&mut rng, pair, len);
            let (sealed, tag) = case.sealed();
            for at_end in [false, true] {
                let (input, output) = (input.part(len, at_end), output.part(len, at_end));
                input.copy_from_slice(&case.plain);
                let in_out = InOutBuf::new(input, output).unwrap();
                let made =
                    case.ours.encrypt_inout_detached(&case.nonce, &case.aad, in_out).unwrap();
                assert_eq!((&*output, made), (&sealed[..], tag), "{}", case.what);
                let in_out = InOutBuf::new(output, input).unwrap();
                case.ours.decrypt_inout_detached(&case.nonce, &case.aad, in_out, &tag).unwrap();
                assert_eq!(input, case.plain, "{}", case.what);
            }
        }
    }
}

/// Memory between two inaccessible pages.
struct Guarded(*mut u8);

impl Guarded {
    const PAGE: usize = 4096;
    const LEN: usize = Self::PAGE;

    fn new() -> Self {
        let size = 3 * Self::PAGE;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address that the system chooses.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), size, access, MapFlags::PRIVATE) }
                .unwrap();
        for page in [0, 2] {
            // SAFETY: pages of the new mapping. No other code knows it.
            unsafe {
                mprotect(start.byte_add(page * Self::PAGE), Self::PAGE, MprotectFlags::empty())
            }
            .unwrap();
        }
        Self(start.cast())
    }

    fn part(&mut self, len: usize, at_end: bool) -> &mut [u8] {
        let offset = Self::PAGE + if at_end { Self::LEN - len } else { 0 };
        // SAFETY: within the accessible page, which lives as long as `self` and is borrowed with
        // it.
        unsafe { std::slice::from_raw_parts_mut(self.0.add(offset), len) }
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: the whole mapping. Nothing borrows it any more.
        unsafe { munmap(self.0.cast(), 3 * Self::PAGE) }.unwrap();
    }
}

#[test]
fn keys_are_wiped_and_not_shown() {
    fn wiped<T: ZeroizeOnDrop>() {
        assert!(std::mem::needs_drop::<T>());
    }
    wiped::<Sm4>();
    wiped::<Sm4Gcm>();
    let key = Sm4Gcm::new(&[7; 16].into());
    assert_eq!(format!("{key:?}"), format!("Sm4Gcm {{ backend: {:?}, .. }}", Backend::detect()));
}
