//! Tests every backend and every multiplication of the emulated processor against the portable ones
//! and the vectors of the standards. The tests of `sm4-simd` compare the portable ones with
//! RustCrypto's. Bochs prints the bytes written to port 0xe9.

#![no_std]

use core::{
    arch::{asm, x86_64::*},
    fmt::{self, Write},
    hint::black_box,
    panic::PanicInfo,
};

use aead::{AeadInOut, inout::InOutBuf};
use sm4_simd::{
    Backend, Sm4, Sm4Gcm,
    cipher::{Array, BlockCipherDecrypt, BlockCipherEncrypt, consts::U16},
};

struct Console;

impl Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: only the console of Bochs listens to this port.
            unsafe { asm!("out 0xe9, al", in("al") byte, options(nomem, nostack)) };
        }
        Ok(())
    }
}

macro_rules! say {
    ($($argument:tt)*) => {{ let _ = writeln!(Console, $($argument)*); }};
}

/// Ends the program: Bochs exits when it receives the word "Shutdown" on this port.
fn leave() -> ! {
    for byte in *b"Shutdown" {
        // SAFETY: this port belongs to Bochs.
        unsafe { asm!("out dx, al", in("dx") 0x8900_u16, in("al") byte, options(nomem, nostack)) };
    }
    loop {
        // SAFETY: only halts the processor.
        unsafe { asm!("hlt", options(nomem, nostack)) };
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    say!("FAILED: {info}");
    leave()
}

/// A generator of test data (xorshift64*).
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        core::array::from_fn(|_| (self.next() >> 56) as u8)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            *byte = (self.next() >> 56) as u8;
        }
    }
}

const LEN_MAX: usize = 10_000;

/// Whether the emulator multiplies by a matrix as real processors do. Bochs before 2.8 inverts each
/// parity.
#[target_feature(enable = "gfni")]
fn gfni_is_right() -> bool {
    let zero = black_box(_mm_setzero_si128());
    _mm_cvtsi128_si32(_mm_gf2p8affine_epi64_epi8::<0>(zero, zero)) == 0
}

fn vectors(backend: Backend) {
    let key = 0x0123_4567_89ab_cdef_fedc_ba98_7654_3210_u128.to_be_bytes();
    let cipher = Sm4::with_backend(&key.into(), backend).expect("available");
    let mut block = Array::from(key);
    cipher.encrypt_block(&mut block);
    assert_eq!(block.0, 0x681e_df34_d206_965e_86b3_e94f_536e_4246_u128.to_be_bytes());
    for _ in 1..100_000 {
        cipher.encrypt_block(&mut block);
    }
    for _ in 0..100_000 {
        cipher.decrypt_block(&mut block);
    }
    assert_eq!(block.0, key);
}

fn blocks(backend: Backend, noise: &mut Noise) {
    let mut buffers = [[Array::<u8, U16>::default(); 150]; 4];
    let [plain, expected, out, in_place] = &mut buffers;
    for len in 0..=150 {
        let key = noise.bytes().into();
        let ours = Sm4::with_backend(&key, backend).expect("available");
        let oracle = Sm4::with_backend(&key, Backend::Portable).expect("available");
        for block in plain.iter_mut() {
            *block = noise.bytes().into();
        }
        expected[..len].copy_from_slice(&plain[..len]);
        in_place[..len].copy_from_slice(&plain[..len]);
        oracle.encrypt_blocks(&mut expected[..len]);
        ours.encrypt_blocks_inout(
            InOutBuf::new(&plain[..len], &mut out[..len]).expect("of one length"),
        );
        ours.encrypt_blocks(&mut in_place[..len]);
        assert_eq!(out[..len], expected[..len]);
        assert_eq!(in_place[..len], expected[..len]);
        ours.decrypt_blocks(&mut in_place[..len]);
        assert_eq!(in_place[..len], plain[..len]);
    }
}

fn messages(backend: Backend, multiplier: &str, noise: &mut Noise) {
    static mut BUFFERS: [[u8; LEN_MAX + 128]; 4] = [[0; LEN_MAX + 128]; 4];
    // SAFETY: there is one thread and no other reference. This function does not call itself and
    // keeps no reference from an earlier call.
    let [plain, expected, out, in_place] = unsafe { &mut *&raw mut BUFFERS };
    for len in (0..700).chain((700..4200).step_by(61)).chain([8191, 8192, 8193, 9999]) {
        let (at, to) = (len % 64, (7 * len + 1) % 64);
        let (plain, out) = (&mut plain[at..at + len], &mut out[to..to + len]);
        let (expected, in_place) = (&mut expected[..len], &mut in_place[at..at + len]);
        let (key, nonce) = (noise.bytes().into(), Array(noise.bytes::<12>()));
        let (counter, aad) = (noise.next() as u32 | 0xffff_ffe0, noise.bytes::<77>());
        let aad = &aad[..len % 78];
        noise.fill(plain);

        let ours = Sm4::with_backend(&key, backend).expect("available");
        let oracle = Sm4::with_backend(&key, Backend::Portable).expect("available");
        ours.ctr32(&nonce.0, counter, InOutBuf::new(plain, out).expect("of one length"));
        oracle.ctr32(&nonce.0, counter, InOutBuf::new(plain, expected).expect("of one length"));
        assert_eq!(out, expected);

        let ours = Sm4Gcm::with_backend(&key, backend, multiplier).expect("available");
        let oracle = Sm4Gcm::with_backend(&key, Backend::Portable, "portable").expect("available");
        let seal = |cipher: &Sm4Gcm, buffer| {
            cipher.encrypt_inout_detached(&nonce, aad, buffer).expect("short enough")
        };
        let tag = seal(&oracle, InOutBuf::new(plain, expected).expect("of one length"));
        in_place.copy_from_slice(plain);
        assert_eq!(seal(&ours, InOutBuf::new(plain, out).expect("of one length")), tag);
        assert_eq!(seal(&ours, (&mut *in_place).into()), tag);
        assert_eq!(out, expected);
        assert_eq!(in_place, expected);
        out.fill(0);
        let in_out = InOutBuf::new(expected, out).expect("of one length");
        ours.decrypt_inout_detached(&nonce, aad, in_out, &tag).expect("authentic");
        assert_eq!(out, plain);
        let mut wrong = tag;
        wrong[len % 16] ^= 1;
        assert!(ours.decrypt_inout_detached(&nonce, aad, in_place.into(), &wrong).is_err());
    }
}

/// The entry point to which `boot.s` jumps, in long mode.
#[unsafe(no_mangle)]
extern "C" fn check() -> ! {
    let mut noise = Noise(4);
    say!("detected: {}", Backend::detect());
    let has_gfni = [Backend::Avx2Gfni, Backend::Avx512Gfni].into_iter().any(Backend::is_available);
    // SAFETY: called only if the processor has the instructions.
    if has_gfni && !unsafe { gfni_is_right() } {
        say!("FAILED: this emulator computes GF2P8AFFINEQB wrongly: take Bochs 2.8 or newer");
        leave();
    }
    for backend in Backend::ALL.into_iter().filter(|backend| backend.is_available()) {
        vectors(backend);
        blocks(backend, &mut noise);
        for multiplier in Sm4Gcm::multipliers() {
            messages(backend, multiplier, &mut noise);
            say!("passed: {backend} with {multiplier}");
        }
    }
    say!("DONE");
    leave()
}
