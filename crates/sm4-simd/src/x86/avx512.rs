//! 512-bit vectors: AVX-512 (F and BW) with GFNI.

use core::arch::x86_64::*;

use super::tables::{self, Lane};
use crate::{
    field::{FAR, FROM_FIELD, NEAR, TO_FIELD},
    simd::Vector,
};

#[derive(Clone, Copy)]
pub(super) struct Zmm(__m512i);

#[inline(always)]
unsafe fn constant(lane: &Lane) -> __m512i {
    arch! { _mm512_broadcast_i32x4(_mm_loadu_si128(lane.as_ptr().cast())) }
}

/// Each row of a matrix in all places. It is a parameter of the type, because transposing it takes
/// longer than a round. The compiler must not do that during encryption.
#[inline(always)]
unsafe fn matrix<const ROWS: u64>() -> __m512i {
    arch! { _mm512_set1_epi64(ROWS as i64) }
}

impl Vector for Zmm {
    const BLOCKS: usize = 16;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        arch! { Self(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        arch! { _mm512_storeu_si512(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn splat(word: u32) -> Self {
        arch! { Self(_mm512_set1_epi32(word as i32)) }
    }

    #[inline(always)]
    unsafe fn indices() -> Self {
        arch! { Self(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        arch! { Self(_mm512_add_epi32(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        arch! { Self(_mm512_xor_si512(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn swap_bytes(self) -> Self {
        arch! { Self(_mm512_shuffle_epi8(self.0, constant(&tables::SWAP_BYTES))) }
    }

    #[inline(always)]
    unsafe fn transpose([a, b, c, d]: [Self; 4]) -> [Self; 4] {
        arch! {
            let (ab, cd) = (_mm512_unpacklo_epi32(a.0, b.0), _mm512_unpacklo_epi32(c.0, d.0));
            let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a.0, b.0), _mm512_unpackhi_epi32(c.0, d.0));
            [
                Self(_mm512_unpacklo_epi64(ab, cd)),
                Self(_mm512_unpackhi_epi64(ab, cd)),
                Self(_mm512_unpacklo_epi64(ab_high, cd_high)),
                Self(_mm512_unpackhi_epi64(ab_high, cd_high)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn enter_field(self) -> Self {
        arch! { Self(_mm512_gf2p8affine_epi64_epi8::<0>(self.0, matrix::<{ TO_FIELD.matrix.gfni() }>())) }
    }

    #[inline(always)]
    unsafe fn leave_field(self) -> Self {
        arch! { Self(_mm512_gf2p8affine_epi64_epi8::<0>(self.0, matrix::<{ FROM_FIELD.matrix.gfni() }>())) }
    }

    #[inline(always)]
    unsafe fn near_and_far(self) -> [Self; 2] {
        arch! {
            [
                Self(_mm512_gf2p8affineinv_epi64_epi8::<0>(self.0, matrix::<{ NEAR.matrix.gfni() }>())),
                Self(_mm512_gf2p8affineinv_epi64_epi8::<{ FAR.constant as i32 }>(self.0, matrix::<{ FAR.matrix.gfni() }>())),
            ]
        }
    }

    #[inline(always)]
    unsafe fn turn<const BYTES: usize>(self) -> Self {
        arch! { Self(_mm512_shuffle_epi8(self.0, constant(&tables::TURNS[BYTES]))) }
    }
}
