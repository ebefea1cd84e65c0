//! 128-bit vectors: SSSE3, SSE4.1 and AES-NI.

use core::arch::x86_64::*;

use super::tables::{self, Lane};
use crate::simd::Vector;

#[derive(Clone, Copy)]
pub(super) struct Xmm(__m128i);

#[inline(always)]
unsafe fn constant(lane: &Lane) -> __m128i {
    arch! { _mm_loadu_si128(lane.as_ptr().cast()) }
}

/// The low and the high nibbles of the bytes.
#[inline(always)]
unsafe fn nibbles(x: __m128i) -> [__m128i; 2] {
    arch! {
        let mask = _mm_set1_epi8(15);
        [_mm_and_si128(x, mask), _mm_and_si128(_mm_srli_epi32::<4>(x), mask)]
    }
}

#[inline(always)]
unsafe fn look_up(tables: &[Lane; 2], nibbles: [__m128i; 2]) -> __m128i {
    arch! {
        _mm_xor_si128(
            _mm_shuffle_epi8(constant(&tables[0]), nibbles[0]),
            _mm_shuffle_epi8(constant(&tables[1]), nibbles[1]),
        )
    }
}

impl Vector for Xmm {
    const BLOCKS: usize = 4;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        arch! { Self(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        arch! { _mm_storeu_si128(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn splat(word: u32) -> Self {
        arch! { Self(_mm_set1_epi32(word as i32)) }
    }

    #[inline(always)]
    unsafe fn indices() -> Self {
        arch! { Self(_mm_setr_epi32(0, 1, 2, 3)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        arch! { Self(_mm_add_epi32(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        arch! { Self(_mm_xor_si128(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn swap_bytes(self) -> Self {
        arch! { Self(_mm_shuffle_epi8(self.0, constant(&tables::SWAP_BYTES))) }
    }

    #[inline(always)]
    unsafe fn transpose([a, b, c, d]: [Self; 4]) -> [Self; 4] {
        arch! {
            let (ab, cd) = (_mm_unpacklo_epi32(a.0, b.0), _mm_unpacklo_epi32(c.0, d.0));
            let (ab_high, cd_high) = (_mm_unpackhi_epi32(a.0, b.0), _mm_unpackhi_epi32(c.0, d.0));
            [
                Self(_mm_unpacklo_epi64(ab, cd)),
                Self(_mm_unpackhi_epi64(ab, cd)),
                Self(_mm_unpacklo_epi64(ab_high, cd_high)),
                Self(_mm_unpackhi_epi64(ab_high, cd_high)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn enter_field(self) -> Self {
        arch! { Self(look_up(&tables::TO_FIELD_NIBBLES, nibbles(self.0))) }
    }

    #[inline(always)]
    unsafe fn leave_field(self) -> Self {
        arch! { Self(look_up(&tables::FROM_FIELD_NIBBLES, nibbles(self.0))) }
    }

    #[inline(always)]
    unsafe fn near_and_far(self) -> [Self; 2] {
        arch! {
            let nibbles = nibbles(_mm_aesenclast_si128(self.0, _mm_setzero_si128()));
            [Self(look_up(&tables::NEAR_NIBBLES, nibbles)), Self(look_up(&tables::FAR_NIBBLES, nibbles))]
        }
    }

    #[inline(always)]
    unsafe fn turn<const BYTES: usize>(self) -> Self {
        arch! { Self(_mm_shuffle_epi8(self.0, constant(&tables::TURNS_AFTER_AES[BYTES]))) }
    }
}
