//! SM4 on vectors, in one version for all instruction sets.
//!
//! A vector holds one 32-bit word of each of several blocks, so the four words of a *group* of
//! blocks are four vectors. Several groups are computed side by side, to use the time in which one
//! group waits for its results. The state is in the field basis (`field`). Everything here is
//! inlined into functions in which an instruction set is enabled (`x86`). So a software vector runs
//! the same code in the tests.

use core::{ptr, slice};

use cipher::zeroize::Zeroize;

use crate::portable::RoundKeys;

/// The bytes of a block.
const BLOCK: usize = 16;

/// Blocks in the largest group.
const GROUP_MAX: usize = 16;

/// A vector of 32-bit words with their bytes in memory order, in lanes of 128 bits.
///
/// # Safety
/// All methods require that the processor has the instructions of the vector, and that the calling
/// function is compiled for them.
pub(crate) trait Vector: Copy {
    /// The number of words in a vector, and so of blocks in a group: at most [`GROUP_MAX`].
    const BLOCKS: usize;

    /// # Safety
    /// As documented at the trait. `4 * BLOCKS` bytes must be readable.
    unsafe fn load(from: *const u8) -> Self;

    /// # Safety
    /// As documented at the trait. `4 * BLOCKS` bytes must be writable.
    unsafe fn store(self, to: *mut u8);

    /// The same word in all places, its least significant byte first.
    unsafe fn splat(word: u32) -> Self;

    /// The number of each word's block. Blocks go to the lanes in turn, as in a load of consecutive
    /// blocks: lane `l` has the blocks `l`, `l + LANES`, `l + 2 LANES` and `l + 3 LANES`.
    unsafe fn indices() -> Self;

    /// Adds word by word, modulo 2^32.
    unsafe fn add(self, other: Self) -> Self;

    unsafe fn xor(self, other: Self) -> Self;

    /// Reverses the bytes of each word.
    unsafe fn swap_bytes(self) -> Self;

    /// Transposes the matrix of 4 x 4 words in each lane.
    unsafe fn transpose(rows: [Self; 4]) -> [Self; 4];

    /// [`field::TO_FIELD`](crate::field::TO_FIELD) on each byte.
    unsafe fn enter_field(self) -> Self;

    /// [`field::FROM_FIELD`](crate::field::FROM_FIELD) on each byte.
    unsafe fn leave_field(self) -> Self;

    /// [`field::NEAR`](crate::field::NEAR) and [`field::FAR`](crate::field::FAR) of the inverse of
    /// each byte. [`Vector::turn`] undoes the byte order of the result.
    unsafe fn near_and_far(self) -> [Self; 2];

    /// Replaces each byte by the byte `BYTES` further on in its word, cyclically. Undoes the byte
    /// order of [`Vector::near_and_far`].
    unsafe fn turn<const BYTES: usize>(self) -> Self;
}

/// Words of the state of `K` groups.
type State<V, const K: usize> = [[V; 4]; K];

/// The 32 rounds, in reverse order to decrypt.
///
/// # Safety
/// As documented at [`Vector`].
#[inline(always)]
unsafe fn rounds<V: Vector, const K: usize, const DECRYPT: bool>(
    round_keys: &RoundKeys,
    x: &mut State<V, K>,
) {
    for quad in 0..8 {
        let key = |i: usize| round_keys[if DECRYPT { 31 - 4 * quad - i } else { 4 * quad + i }];
        let (k0, k1, k2, k3) = (key(0), key(1), key(2), key(3));
        // SAFETY: the caller guarantees the instructions.
        unsafe {
            let (k0, k1) = (V::splat(k0), V::splat(k1));
            for [x0, x1, x2, x3] in x.iter_mut() {
                let both = x2.xor(*x3);
                *x0 = x0.xor(t(both.xor(x1.xor(k0))));
                *x1 = x1.xor(t(both.xor(k1).xor(*x0)));
            }
            let (k2, k3) = (V::splat(k2), V::splat(k3));
            for [x0, x1, x2, x3] in x.iter_mut() {
                let both = x0.xor(*x1);
                *x2 = x2.xor(t(both.xor(x3.xor(k2))));
                *x3 = x3.xor(t(both.xor(k3).xor(*x2)));
            }
        }
    }
}

/// T of the standard, S-box and L, in the field basis.
///
/// # Safety
/// As documented at [`Vector`].
#[inline(always)]
unsafe fn t<V: Vector>(x: V) -> V {
    // SAFETY: the caller guarantees the instructions.
    unsafe {
        let [near, far] = x.near_and_far();
        near.turn::<0>().xor(far.turn::<1>()).xor(far.turn::<2>().xor(near.xor(far).turn::<3>()))
    }
}

/// The state as blocks in their order: the words reversed, as in the standard, and transposed.
///
/// # Safety
/// As documented at [`Vector`].
#[inline(always)]
unsafe fn output<V: Vector>([x0, x1, x2, x3]: [V; 4]) -> [V; 4] {
    // SAFETY: the caller guarantees the instructions.
    unsafe {
        V::transpose([x3.leave_field(), x2.leave_field(), x1.leave_field(), x0.leave_field()])
    }
}

/// Encrypts or decrypts `K` groups of blocks.
///
/// # Safety
/// As documented at [`Vector`]. `K` groups must be readable from `input` and writable to `output`,
/// which are equal or do not overlap.
#[inline(always)]
unsafe fn crypt_groups<V: Vector, const K: usize, const DECRYPT: bool>(
    round_keys: &RoundKeys,
    input: *const u8,
    output_: *mut u8,
) {
    // SAFETY: the caller guarantees the instructions and the memory.
    unsafe {
        let row = |group: usize, row: usize| (4 * group + row) * 4 * V::BLOCKS;
        let mut x: State<V, K> = [[V::splat(0); 4]; K];
        for (g, x) in x.iter_mut().enumerate() {
            for (i, x) in x.iter_mut().enumerate() {
                *x = V::load(input.add(row(g, i)));
            }
            let [x0, x1, x2, x3] = V::transpose(*x);
            *x = [x0.enter_field(), x1.enter_field(), x2.enter_field(), x3.enter_field()];
        }
        rounds::<V, K, DECRYPT>(round_keys, &mut x);
        for (g, x) in x.into_iter().enumerate() {
            for (i, blocks) in output(x).into_iter().enumerate() {
                blocks.store(output_.add(row(g, i)));
            }
        }
    }
}

/// Encrypts or decrypts `blocks` blocks.
///
/// # Safety
/// As documented at [`Vector`]. The blocks must be readable from `input` and writable to `output`,
/// which are equal or do not overlap.
#[inline(always)]
pub(crate) unsafe fn crypt<V: Vector, const K: usize, const DECRYPT: bool>(
    round_keys: &RoundKeys,
    mut input: *const u8,
    mut output: *mut u8,
    mut blocks: usize,
) {
    // SAFETY: the caller guarantees the instructions and the memory. The remaining length shrinks
    // as the pointers advance, and the buffer holds `K` groups.
    unsafe {
        while blocks >= K * V::BLOCKS {
            crypt_groups::<V, K, DECRYPT>(round_keys, input, output);
            (input, output) = (input.add(K * V::BLOCKS * BLOCK), output.add(K * V::BLOCKS * BLOCK));
            blocks -= K * V::BLOCKS;
        }
        if blocks > 0 {
            let mut buffer = [[0; GROUP_MAX * BLOCK]; K];
            let whole = buffer.as_mut_ptr().cast();
            ptr::copy_nonoverlapping(input, whole, blocks * BLOCK);
            if blocks > V::BLOCKS {
                crypt_groups::<V, K, DECRYPT>(round_keys, whole, whole);
            } else {
                crypt_groups::<V, 1, DECRYPT>(round_keys, whole, whole);
            }
            ptr::copy_nonoverlapping(whole, output, blocks * BLOCK);
        }
    }
}

/// Adds the key stream of `K` groups, beginning with `counter`.
///
/// # Safety
/// As [`crypt_groups`].
#[inline(always)]
unsafe fn ctr_groups<V: Vector, const K: usize>(
    round_keys: &RoundKeys,
    nonce: [V; 3],
    counter: u32,
    input: *const u8,
    output_: *mut u8,
) {
    // SAFETY: the caller guarantees the instructions and the memory.
    unsafe {
        let [n0, n1, n2] = nonce;
        let mut x: State<V, K> = [[n0, n1, n2, n0]; K];
        for (g, x) in x.iter_mut().enumerate() {
            let counters = V::splat(counter.wrapping_add((g * V::BLOCKS) as u32)).add(V::indices());
            x[3] = counters.swap_bytes().enter_field();
        }
        rounds::<V, K, false>(round_keys, &mut x);
        for (g, x) in x.into_iter().enumerate() {
            for (i, stream) in output(x).into_iter().enumerate() {
                let at = (4 * g + i) * 4 * V::BLOCKS;
                V::load(input.add(at)).xor(stream).store(output_.add(at));
            }
        }
    }
}

/// Adds to `len` bytes the key stream of the blocks `nonce || counter`, `nonce || counter + 1`, …
/// modulo 2^32.
///
/// # Safety
/// As documented at [`Vector`]. `len` bytes must be readable from `input` and writable to `output`,
/// which are equal or do not overlap.
#[inline(always)]
pub(crate) unsafe fn ctr<V: Vector, const K: usize>(
    round_keys: &RoundKeys,
    nonce: &[u8; 12],
    mut counter: u32,
    mut input: *const u8,
    mut output: *mut u8,
    mut len: usize,
) {
    let group = V::BLOCKS * BLOCK;
    // SAFETY: the caller guarantees the instructions and the memory. The remaining length shrinks
    // as the pointers advance, and the buffer holds `K` groups.
    unsafe {
        let [n0, n1, n2] = [0, 4, 8]
            .map(|i| u32::from_le_bytes([nonce[i], nonce[i + 1], nonce[i + 2], nonce[i + 3]]));
        let nonce =
            [V::splat(n0).enter_field(), V::splat(n1).enter_field(), V::splat(n2).enter_field()];
        while len >= K * group {
            ctr_groups::<V, K>(round_keys, nonce, counter, input, output);
            (input, output) = (input.add(K * group), output.add(K * group));
            counter = counter.wrapping_add((K * V::BLOCKS) as u32);
            len -= K * group;
        }
        if len > 0 {
            let mut buffer = [[0; GROUP_MAX * BLOCK]; K];
            let whole: *mut u8 = buffer.as_mut_ptr().cast();
            ptr::copy_nonoverlapping(input, whole, len);
            if len > group {
                ctr_groups::<V, K>(round_keys, nonce, counter, whole, whole);
            } else {
                ctr_groups::<V, 1>(round_keys, nonce, counter, whole, whole);
            }
            ptr::copy_nonoverlapping(whole, output, len);
            // For input of zeros, the buffer holds the key stream.
            slice::from_raw_parts_mut(whole, len).zeroize();
        }
    }
}
