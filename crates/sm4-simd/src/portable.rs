//! The key schedule of all backends, and the cipher for processors without the instructions. The
//! cipher is bitsliced, so it runs in constant time.
//!
//! It computes sixteen blocks at once. A word of each block is held as eight *planes*. Plane `b`
//! has bit `b` of all bytes: byte `i` of block `n` (in memory order, the most significant byte
//! first) is in its bit `16 i + n`. So rotating the words by a byte rotates the planes by 16, and a
//! map of bytes is logic on planes. The state is in the field basis (`field`).

use crate::field::{FAR, FROM_FIELD, KEY_TO_FIELD, NEAR, OUTPUT, TO_FIELD};

/// Round keys in the order of encryption, in the field basis, with the constant of the S-box's
/// input. Bytes are in memory order.
pub(crate) type RoundKeys = [u32; 32];

pub(crate) type Block = [u8; 16];

/// The number of blocks that are computed at once.
pub(crate) const BLOCKS: usize = 16;

type Planes = [u64; 8];

/// The bit of block 0 for each byte of the word.
const LANES: u64 = 0x0001_0001_0001_0001;

/// FK of the key expansion: GB/T 32907-2016, section 7.3.
const FK: [u32; 4] = [0xa3b1_bac6, 0x56aa_3350, 0x677d_9197, 0xb270_22dc];

/// CK of the key expansion, by its definition: byte `j` of word `i` is `7 (4 i + j)` modulo 256.
const CK: [u32; 32] = {
    let (mut words, mut i) = ([0; 32], 0);
    while i < 128 {
        words[i / 4] |= ((7 * i as u32) & 0xff) << (24 - 8 * (i % 4));
        i += 1;
    }
    words
};

/// The key expansion: GB/T 32907-2016, section 7.3.
pub(crate) fn expand_key(key: &[u8; 16]) -> RoundKeys {
    let mut k = FK;
    for (k, bytes) in k.iter_mut().zip(key.as_chunks().0) {
        *k ^= u32::from_be_bytes(*bytes);
    }
    let mut round_keys = [0; 32];
    for (round_key, ck) in round_keys.iter_mut().zip(CK) {
        let s = substitute(k[1] ^ k[2] ^ k[3] ^ ck);
        let next = k[0] ^ s ^ s.rotate_left(13) ^ s.rotate_left(23);
        *round_key = join(key_to_field(split(next.swap_bytes())));
        k = [k[1], k[2], k[3], next];
    }
    round_keys
}

fn key_to_field(word: Planes) -> Planes {
    add::<{ KEY_TO_FIELD.constant }>(map::<{ KEY_TO_FIELD.matrix.gfni() }>(word))
}

/// The S-box on the bytes of a word.
fn substitute(word: u32) -> u32 {
    let inverse = sub_bytes(key_to_field(split(word.swap_bytes())));
    join(add::<{ OUTPUT.constant }>(map::<{ OUTPUT.matrix_after_aes().gfni() }>(inverse)))
        .swap_bytes()
}

/// Encrypts up to [`BLOCKS`] blocks. Decrypts if `round_keys` are in reverse order.
pub(crate) fn crypt(round_keys: impl Iterator<Item = u32>, blocks: &mut [Block]) {
    debug_assert!(blocks.len() <= BLOCKS);
    let mut x = [[0; 8]; 4];
    for (w, x) in x.iter_mut().enumerate() {
        *x = map::<{ TO_FIELD.matrix.gfni() }>(gather(blocks, w));
    }
    for round_key in round_keys {
        let round_key = spread(round_key);
        let mut t = [0; 8];
        for (b, t) in t.iter_mut().enumerate() {
            *t = x[1][b] ^ x[2][b] ^ x[3][b] ^ ((round_key >> b & LANES) * 0xffff);
        }
        let inverse = sub_bytes(t);
        let near = map::<{ NEAR.matrix_after_aes().gfni() }>(inverse);
        let far = add::<{ FAR.constant }>(map::<{ FAR.matrix_after_aes().gfni() }>(inverse));
        let mut next = x[0];
        for (b, next) in next.iter_mut().enumerate() {
            let (near, far) = (near[b], far[b]);
            *next ^=
                near ^ far.rotate_right(16) ^ far.rotate_right(32) ^ (near ^ far).rotate_right(48);
        }
        x = [x[1], x[2], x[3], next];
    }
    for (w, x) in x.into_iter().rev().enumerate() {
        scatter(map::<{ FROM_FIELD.matrix.gfni() }>(x), blocks, w);
    }
}

/// The bytes of a word, each in 16 bits.
fn spread(word: u32) -> u64 {
    let wide = u64::from(word);
    let wide = (wide | wide << 16) & 0x0000_ffff_0000_ffff;
    (wide | wide << 8) & 0x00ff_00ff_00ff_00ff
}

/// The inverse of [`spread`].
fn gather_bytes(wide: u64) -> u32 {
    let wide = wide & 0x00ff_00ff_00ff_00ff;
    let wide = (wide | wide >> 8) & 0x0000_ffff_0000_ffff;
    (wide | wide >> 16) as u32
}

/// The planes of one word, in the place of block 0.
fn split(word: u32) -> Planes {
    let wide = spread(word);
    core::array::from_fn(|b| wide >> b & LANES)
}

/// The inverse of [`split`]. Ignores other blocks.
fn join(planes: Planes) -> u32 {
    let mut wide = 0;
    for (b, plane) in planes.into_iter().enumerate() {
        wide |= (plane & LANES) << b;
    }
    gather_bytes(wide)
}

/// The planes of word `w` of the blocks.
fn gather(blocks: &[Block], w: usize) -> Planes {
    let word = |n: usize| {
        blocks.get(n).map_or(0, |block| spread(u32::from_le_bytes(block.as_chunks().0[w])))
    };
    let mut planes = core::array::from_fn(|n| word(n) | word(n + 8) << 8);
    transpose(&mut planes);
    planes
}

/// The inverse of [`gather`].
fn scatter(mut planes: Planes, blocks: &mut [Block], w: usize) {
    transpose(&mut planes);
    for (n, block) in blocks.iter_mut().enumerate() {
        block.as_chunks_mut().0[w] = gather_bytes(planes[n % 8] >> (n & 8)).to_le_bytes();
    }
}

/// Transposes eight matrices of 8 x 8 bits. The bytes at the same position in the eight planes are
/// the rows of one matrix. Its own inverse.
fn transpose(rows: &mut Planes) {
    for (distance, mask) in
        [(1, 0x5555_5555_5555_5555), (2, 0x3333_3333_3333_3333), (4, 0x0f0f_0f0f_0f0f_0f0f)]
    {
        for i in (0..8).filter(|i| i & distance == 0) {
            let swap = (rows[i] >> distance ^ rows[i + distance]) & mask;
            rows[i] ^= swap << distance;
            rows[i + distance] ^= swap;
        }
    }
}

/// A linear map of all bytes, given as `Matrix::gfni`. It is a compile-time constant, so the
/// compiler unrolls the sums.
#[inline(always)]
fn map<const MATRIX: u64>(x: Planes) -> Planes {
    let sum = |i: usize| {
        let term = |j: usize| if MATRIX >> (56 - 8 * i + j) & 1 == 1 { x[j] } else { 0 };
        term(0) ^ term(1) ^ term(2) ^ term(3) ^ term(4) ^ term(5) ^ term(6) ^ term(7)
    };
    [sum(0), sum(1), sum(2), sum(3), sum(4), sum(5), sum(6), sum(7)]
}

/// Adds a constant to all bytes.
#[inline(always)]
fn add<const CONSTANT: u8>(x: Planes) -> Planes {
    let plane = |b: usize| if CONSTANT >> b & 1 == 1 { !x[b] } else { x[b] };
    [plane(0), plane(1), plane(2), plane(3), plane(4), plane(5), plane(6), plane(7)]
}

/// The AES S-box without its constant, on all bytes: the circuit of 113 gates by J. Boyar and R.
/// Peralta ("A depth-16 circuit for the AES S-box", 2011, and its successors, SLP_AES_113), in its
/// names: `u0` and `s0` are the most significant bits.
fn sub_bytes([u7, u6, u5, u4, u3, u2, u1, u0]: Planes) -> Planes {
    let y14 = u3 ^ u5;
    let y13 = u0 ^ u6;
    let y12 = y13 ^ y14;
    let t1 = u4 ^ y12;
    let y15 = t1 ^ u5;
    let t2 = y12 & y15;
    let y6 = y15 ^ u7;
    let y20 = t1 ^ u1;
    let y9 = u0 ^ u3;
    let y11 = y20 ^ y9;
    let t12 = y9 & y11;
    let y7 = u7 ^ y11;
    let y8 = u0 ^ u5;
    let t0 = u1 ^ u2;
    let y10 = y15 ^ t0;
    let y17 = y10 ^ y11;
    let t13 = y14 & y17;
    let t14 = t13 ^ t12;
    let y19 = y10 ^ y8;
    let t15 = y8 & y10;
    let t16 = t15 ^ t12;
    let y16 = t0 ^ y11;
    let y21 = y13 ^ y16;
    let t7 = y13 & y16;
    let y18 = u0 ^ y16;
    let y1 = t0 ^ u7;
    let y4 = y1 ^ u3;
    let t5 = y4 & u7;
    let t6 = t5 ^ t2;
    let t18 = t6 ^ t16;
    let t22 = t18 ^ y19;
    let y2 = y1 ^ u0;
    let t10 = y2 & y7;
    let t11 = t10 ^ t7;
    let t20 = t11 ^ t16;
    let t24 = t20 ^ y18;
    let y5 = y1 ^ u6;
    let t8 = y5 & y1;
    let t9 = t8 ^ t7;
    let t19 = t9 ^ t14;
    let t23 = t19 ^ y21;
    let y3 = y5 ^ y8;
    let t3 = y3 & y6;
    let t4 = t3 ^ t2;
    let t17 = t4 ^ y20;
    let t21 = t17 ^ t14;
    let t26 = t21 & t23;
    let t27 = t24 ^ t26;
    let t31 = t22 ^ t26;
    let t25 = t21 ^ t22;
    let t28 = t25 & t27;
    let t29 = t28 ^ t22;
    let z14 = t29 & y2;
    let z5 = t29 & y7;
    let t30 = t23 ^ t24;
    let t32 = t31 & t30;
    let t33 = t32 ^ t24;
    let t35 = t27 ^ t33;
    let t36 = t24 & t35;
    let t38 = t27 ^ t36;
    let t39 = t29 & t38;
    let t40 = t25 ^ t39;
    let t43 = t29 ^ t40;
    let z3 = t43 & y16;
    let tc12 = z3 ^ z5;
    let z12 = t43 & y13;
    let z13 = t40 & y5;
    let z4 = t40 & y1;
    let tc6 = z3 ^ z4;
    let t34 = t23 ^ t33;
    let t37 = t36 ^ t34;
    let t41 = t40 ^ t37;
    let z8 = t41 & y10;
    let z17 = t41 & y8;
    let t44 = t33 ^ t37;
    let z0 = t44 & y15;
    let z9 = t44 & y12;
    let z10 = t37 & y3;
    let z1 = t37 & y6;
    let tc5 = z1 ^ z0;
    let tc11 = tc6 ^ tc5;
    let z11 = t33 & y4;
    let t42 = t29 ^ t33;
    let t45 = t42 ^ t41;
    let z7 = t45 & y17;
    let tc8 = z7 ^ tc6;
    let z16 = t45 & y14;
    let z6 = t42 & y11;
    let tc16 = z6 ^ tc8;
    let z15 = t42 & y9;
    let tc20 = z15 ^ tc16;
    let tc1 = z15 ^ z16;
    let tc2 = z10 ^ tc1;
    let tc21 = tc2 ^ z11;
    let tc3 = z9 ^ tc2;
    let s0 = tc3 ^ tc16;
    let s3 = tc3 ^ tc11;
    let s1 = s3 ^ tc16;
    let tc13 = z13 ^ tc1;
    let z2 = t33 & u7;
    let tc4 = z0 ^ z2;
    let tc7 = z12 ^ tc4;
    let tc9 = z8 ^ tc7;
    let tc10 = tc8 ^ tc9;
    let tc17 = z14 ^ tc10;
    let s5 = tc21 ^ tc17;
    let tc26 = tc17 ^ tc20;
    let s2 = tc26 ^ z17;
    let tc14 = tc4 ^ tc12;
    let tc18 = tc13 ^ tc14;
    let s6 = tc10 ^ tc18;
    let s7 = z12 ^ tc18;
    let s4 = tc14 ^ s3;
    [s7, s6, s5, s4, s3, s2, s1, s0]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::field::{aes_inverse, aes_sbox};

    #[test]
    fn the_circuit_is_the_aes_sbox() {
        for first in (0..=255_u8).step_by(16) {
            let mut blocks: [Block; 16] = core::array::from_fn(|n| [first + n as u8; 16]);
            scatter(sub_bytes(gather(&blocks, 0)), &mut blocks, 0);
            for (n, block) in blocks.iter().enumerate() {
                assert_eq!(block[..4], [aes_sbox(first + n as u8) ^ 0x63; 4]);
            }
        }
    }

    #[test]
    fn words_go_into_planes_and_back() {
        let blocks: [Block; 16] =
            core::array::from_fn(|n| core::array::from_fn(|i| (n * 16 + i) as u8));
        for len in 0..=16 {
            let mut copy = [[0; 16]; 16];
            for w in 0..4 {
                scatter(gather(&blocks[..len], w), &mut copy, w);
            }
            assert_eq!(copy[..len], blocks[..len]);
            assert_eq!(copy[len..], [[0; 16]; 16][len..]);
        }
        for word in [0, 1, 0x0123_4567, u32::MAX] {
            assert_eq!(join(split(word)), word);
        }
    }

    #[test]
    fn a_word_is_substituted_byte_by_byte() {
        let sbox = |x| OUTPUT.apply(aes_inverse(KEY_TO_FIELD.apply(x)));
        for word in [0, 0x0123_4567, 0x89ab_cdef, u32::MAX] {
            assert_eq!(substitute(word).to_be_bytes(), u32::to_be_bytes(word).map(sbox));
        }
    }
}
