//! Software vectors for the tests. They run the algorithms of `simd` and `ghash` at widths, and
//! with instructions, that the machine may lack. They follow the pseudo-code of Intel's manual
//! (Software Developer's Manual, volume 2), independently of the vectors in `x86`.

use std::vec::Vec;

use crate::{
    field::{FAR, FROM_FIELD, NEAR, TO_FIELD, aes_inverse, aes_sbox},
    ghash::{Elements, REDUCTION},
    simd::Vector,
};

type Lane = [u8; 16];

/// `LANES` lanes of 128 bits. With `AES`, the S-box uses `AESENCLAST`, otherwise
/// `GF2P8AFFINEINVQB`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Soft<const LANES: usize, const AES: bool>([Lane; LANES]);

/// `GF2P8AFFINEQB` on a byte: `affine_byte` in the manual.
fn affine(matrix: u64, constant: u8, x: u8) -> u8 {
    let rows = matrix.to_le_bytes();
    let parity = |i: usize| (rows[7 - i] & x).count_ones() as u8 & 1;
    (0..8).fold(0, |y, i| y | (parity(i) ^ (constant >> i & 1)) << i)
}

/// `AESENCLAST` with a round key of zero: ShiftRows and SubBytes of FIPS 197.
fn aes_last_round(state: Lane) -> Lane {
    core::array::from_fn(|i| aes_sbox(state[(i + 4 * (i % 4)) % 16]))
}

impl<const LANES: usize, const AES: bool> Soft<LANES, AES> {
    fn words(self) -> impl Iterator<Item = u32> {
        self.0.into_iter().flat_map(|lane| lane.as_chunks().0.to_vec()).map(u32::from_le_bytes)
    }

    fn from_words(words: impl Iterator<Item = u32>) -> Self {
        let bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        let (lanes, rest) = bytes.as_chunks();
        assert!(rest.is_empty());
        Self(lanes.try_into().expect("as many lanes as there are"))
    }

    fn bytes(self, f: impl Fn(u8) -> u8) -> Self {
        Self(self.0.map(|lane| lane.map(&f)))
    }
}

impl<const LANES: usize, const AES: bool> Vector for Soft<LANES, AES> {
    const BLOCKS: usize = 4 * LANES;

    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: the caller guarantees the memory. Arrays of bytes need no alignment.
        unsafe { from.cast::<Self>().read_unaligned() }
    }

    unsafe fn store(self, to: *mut u8) {
        // SAFETY: the caller guarantees the memory. Arrays of bytes need no alignment.
        unsafe { to.cast::<Self>().write_unaligned(self) }
    }

    unsafe fn splat(word: u32) -> Self {
        Self::from_words(core::iter::repeat_n(word, 4 * LANES))
    }

    unsafe fn indices() -> Self {
        Self::from_words((0..4 * LANES).map(|i| (i / 4 + i % 4 * LANES) as u32))
    }

    unsafe fn add(self, other: Self) -> Self {
        Self::from_words(self.words().zip(other.words()).map(|(a, b)| a.wrapping_add(b)))
    }

    unsafe fn xor(self, other: Self) -> Self {
        Self::from_words(self.words().zip(other.words()).map(|(a, b)| a ^ b))
    }

    unsafe fn swap_bytes(self) -> Self {
        Self::from_words(self.words().map(u32::swap_bytes))
    }

    unsafe fn transpose(rows: [Self; 4]) -> [Self; 4] {
        let rows = rows.map(|row| row.words().collect::<Vec<_>>());
        core::array::from_fn(|i| {
            Self::from_words((0..4 * LANES).map(|j| rows[j % 4][j / 4 * 4 + i]))
        })
    }

    unsafe fn enter_field(self) -> Self {
        self.bytes(|x| affine(const { TO_FIELD.matrix.gfni() }, 0, x))
    }

    unsafe fn leave_field(self) -> Self {
        self.bytes(|x| affine(const { FROM_FIELD.matrix.gfni() }, 0, x))
    }

    unsafe fn near_and_far(self) -> [Self; 2] {
        if AES {
            let sbox = Self(self.0.map(aes_last_round));
            let [near, far] = const { [NEAR.after_aes(), FAR.after_aes()] };
            [sbox.bytes(|x| near.apply(x)), sbox.bytes(|x| far.apply(x))]
        } else {
            let inverse = self.bytes(aes_inverse);
            let [near, far] = const { [NEAR.matrix.gfni(), FAR.matrix.gfni()] };
            [inverse.bytes(|x| affine(near, 0, x)), inverse.bytes(|x| affine(far, FAR.constant, x))]
        }
    }

    unsafe fn turn<const BYTES: usize>(self) -> Self {
        let from = |i: usize| {
            let turned = i / 4 * 4 + (i + BYTES) % 4;
            // ShiftRows moved row r of column c to column c - r.
            if AES { (turned + 16 - 4 * (turned % 4)) % 16 } else { turned }
        };
        Self(self.0.map(|lane| core::array::from_fn(|i| lane[from(i)])))
    }
}

/// `PCLMULQDQ`.
fn clmul(a: u64, b: u64) -> u128 {
    (0..64).fold(0, |product, i| product ^ (u128::from(b >> i & 1) * (u128::from(a) << i)))
}

fn low(lane: Lane) -> u64 {
    u128::from_le_bytes(lane) as u64
}

fn high(lane: Lane) -> u64 {
    (u128::from_le_bytes(lane) >> 64) as u64
}

fn xor(a: Lane, b: Lane) -> Lane {
    (u128::from_le_bytes(a) ^ u128::from_le_bytes(b)).to_le_bytes()
}

impl<const LANES: usize> Elements for Soft<LANES, false> {
    const LANES: usize = LANES;

    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: the caller guarantees the memory.
        unsafe { Vector::load(from) }
    }

    unsafe fn load_one(from: &Lane) -> Self {
        Self(core::array::from_fn(|i| if i == 0 { *from } else { [0; 16] }))
    }

    unsafe fn first(self) -> Lane {
        self.0[0]
    }

    unsafe fn reverse(self) -> Self {
        Self(self.0.map(|lane| u128::from_le_bytes(lane).to_be_bytes()))
    }

    unsafe fn xor(self, other: Self) -> Self {
        Self(core::array::from_fn(|i| xor(self.0[i], other.0[i])))
    }

    unsafe fn multiply(self, other: Self) -> [Self; 3] {
        let product = |f: &dyn Fn(Lane, Lane) -> u128| {
            Self(core::array::from_fn(|i| f(self.0[i], other.0[i]).to_le_bytes()))
        };
        [
            product(&|a, b| clmul(low(a), low(b))),
            product(&|a, b| clmul(low(a), high(b)) ^ clmul(high(a), low(b))),
            product(&|a, b| clmul(high(a), high(b))),
        ]
    }

    unsafe fn reduce_half(self) -> Self {
        Self(self.0.map(|lane| {
            let swapped = u128::from_le_bytes(lane).rotate_left(64);
            (clmul(low(lane), REDUCTION) ^ swapped).to_le_bytes()
        }))
    }

    unsafe fn fold(self) -> Self {
        // SAFETY: software needs no instructions.
        unsafe { Self::load_one(&self.0.into_iter().fold([0; 16], xor)) }
    }
}

#[cfg(test)]
mod tests {
    use std::vec;

    use ::ghash::{GHash, universal_hash::UniversalHash};
    use cipher::{BlockCipherEncrypt, KeyInit};
    use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

    use super::*;
    use crate::{ghash, portable, simd};

    fn random(rng: &mut StdRng, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        rng.fill_bytes(&mut bytes);
        bytes
    }

    /// The step of each loop. Miri is slow, so it takes larger steps.
    const STEP: usize = if cfg!(miri) { 97 } else { 1 };

    fn the_cipher<V: Vector>() {
        let mut rng = StdRng::seed_from_u64(6);
        // The largest number is whole groups and a rest.
        let most = 2 * 2 * V::BLOCKS + 3;
        for len in (0..=most).step_by(STEP.min(most)) {
            let key: [u8; 16] = rng.random();
            let oracle = sm4::Sm4::new(&key.into());
            let round_keys = portable::expand_key(&key);

            let plain = random(&mut rng, 16 * len);
            let mut sealed = plain.clone();
            for block in sealed.as_chunks_mut::<16>().0 {
                oracle.encrypt_block(block.into());
            }
            let mut out = vec![0; plain.len()];
            // SAFETY: software needs no instructions; both buffers have `len` blocks.
            unsafe {
                simd::crypt::<V, 2, false>(&round_keys, plain.as_ptr(), out.as_mut_ptr(), len)
            };
            assert_eq!(out, sealed, "{len} blocks");
            let in_place = out.as_mut_ptr();
            // SAFETY: software needs no instructions; the buffer has `len` blocks.
            unsafe { simd::crypt::<V, 2, true>(&round_keys, in_place, in_place, len) };
            assert_eq!(out, plain, "{len} blocks");
        }
        for len in (0..16 * (2 * 2 * V::BLOCKS + 1)).step_by(7 * STEP) {
            let (key, nonce): ([u8; 16], [u8; 12]) = (rng.random(), rng.random());
            let counter = 0_u32.wrapping_sub(rng.random_range(0..40));
            let plain = random(&mut rng, len);
            let mut out = vec![0; len];
            let round_keys = portable::expand_key(&key);
            // SAFETY: software needs no instructions; both buffers have `len` bytes.
            unsafe {
                simd::ctr::<V, 2>(
                    &round_keys,
                    &nonce,
                    counter,
                    plain.as_ptr(),
                    out.as_mut_ptr(),
                    len,
                )
            };
            let oracle = sm4::Sm4::new(&key.into());
            for (i, (out, plain)) in out.chunks(16).zip(plain.chunks(16)).enumerate() {
                let mut block = [0; 16];
                block[..12].copy_from_slice(&nonce);
                block[12..].copy_from_slice(&counter.wrapping_add(i as u32).to_be_bytes());
                oracle.encrypt_block((&mut block).into());
                for (j, plain) in plain.iter().enumerate() {
                    assert_eq!(out[j], plain ^ block[j], "{len} bytes, block {i}");
                }
            }
        }
    }

    #[test]
    fn the_cipher_with_gfni_at_128_bits() {
        the_cipher::<Soft<1, false>>();
    }

    #[test]
    fn the_cipher_with_gfni_at_256_bits() {
        the_cipher::<Soft<2, false>>();
    }

    #[test]
    fn the_cipher_with_gfni_at_512_bits() {
        the_cipher::<Soft<4, false>>();
    }

    #[test]
    fn the_cipher_with_aes_at_128_bits() {
        the_cipher::<Soft<1, true>>();
    }

    #[test]
    fn the_cipher_with_aes_at_256_bits() {
        the_cipher::<Soft<2, true>>();
    }

    fn the_hash<V: Elements>() {
        let mut rng = StdRng::seed_from_u64(7);
        for len in (0..=3 * 256 + 33).step_by(STEP) {
            let key: [u8; 16] = rng.random();
            let (first, data) = (random(&mut rng, 21), random(&mut rng, len));
            let mut oracle = GHash::new(&key.into());
            oracle.update_padded(&first);
            oracle.update_padded(&data);
            let mut sum = [0; 16];
            // SAFETY: software needs no instructions.
            unsafe {
                let powers = ghash::expand::<V>(&key);
                ghash::update::<V>(&powers, &mut sum, &first);
                ghash::update::<V>(&powers, &mut sum, &data);
            }
            sum.reverse();
            assert_eq!(sum, oracle.finalize().0, "{len} bytes");
        }
    }

    #[test]
    fn the_hash_at_128_bits() {
        the_hash::<Soft<1, false>>();
    }

    #[test]
    fn the_hash_at_256_bits() {
        the_hash::<Soft<2, false>>();
    }

    #[test]
    fn the_hash_at_512_bits() {
        the_hash::<Soft<4, false>>();
    }
}
