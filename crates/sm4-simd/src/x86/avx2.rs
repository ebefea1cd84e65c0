//! 256-bit vectors: AVX2 with GFNI, with VAES, or with AES-NI on each half.

use core::{arch::x86_64::*, marker::PhantomData};

use super::tables::{self, Lane};
use crate::{
    field::{FAR, FROM_FIELD, NEAR, TO_FIELD},
    simd::Vector,
};

/// The computation of the S-box on a 256-bit vector.
///
/// # Safety
/// As [`Vector`].
pub(super) trait Substitution: Copy {
    /// The tables for [`Vector::turn`].
    const TURNS: &[Lane; 4];

    unsafe fn enter_field(x: __m256i) -> __m256i;
    unsafe fn leave_field(x: __m256i) -> __m256i;
    unsafe fn near_and_far(x: __m256i) -> [__m256i; 2];
}

#[derive(Clone, Copy)]
pub(super) struct Ymm<S>(__m256i, PhantomData<S>);

impl<S> Ymm<S> {
    #[inline(always)]
    fn new(x: __m256i) -> Self {
        Self(x, PhantomData)
    }
}

#[inline(always)]
unsafe fn constant(lane: &Lane) -> __m256i {
    arch! { _mm256_broadcastsi128_si256(_mm_loadu_si128(lane.as_ptr().cast())) }
}

#[inline(always)]
unsafe fn nibbles(x: __m256i) -> [__m256i; 2] {
    arch! {
        let mask = _mm256_set1_epi8(15);
        [_mm256_and_si256(x, mask), _mm256_and_si256(_mm256_srli_epi32::<4>(x), mask)]
    }
}

#[inline(always)]
unsafe fn look_up(tables: &[Lane; 2], nibbles: [__m256i; 2]) -> __m256i {
    arch! {
        _mm256_xor_si256(
            _mm256_shuffle_epi8(constant(&tables[0]), nibbles[0]),
            _mm256_shuffle_epi8(constant(&tables[1]), nibbles[1]),
        )
    }
}

/// `GF2P8AFFINEINVQB` on the whole vector.
#[derive(Clone, Copy)]
pub(super) struct Gfni;

/// Each row of a matrix in all places. It is a parameter of the type, because transposing it takes
/// longer than a round. The compiler must not do that during encryption.
#[inline(always)]
unsafe fn matrix<const ROWS: u64>() -> __m256i {
    arch! { _mm256_set1_epi64x(ROWS as i64) }
}

impl Substitution for Gfni {
    const TURNS: &[Lane; 4] = &tables::TURNS;

    #[inline(always)]
    unsafe fn enter_field(x: __m256i) -> __m256i {
        arch! { _mm256_gf2p8affine_epi64_epi8::<0>(x, matrix::<{ TO_FIELD.matrix.gfni() }>()) }
    }

    #[inline(always)]
    unsafe fn leave_field(x: __m256i) -> __m256i {
        arch! { _mm256_gf2p8affine_epi64_epi8::<0>(x, matrix::<{ FROM_FIELD.matrix.gfni() }>()) }
    }

    #[inline(always)]
    unsafe fn near_and_far(x: __m256i) -> [__m256i; 2] {
        arch! {
            [
                _mm256_gf2p8affineinv_epi64_epi8::<0>(x, matrix::<{ NEAR.matrix.gfni() }>()),
                _mm256_gf2p8affineinv_epi64_epi8::<{ FAR.constant as i32 }>(x, matrix::<{ FAR.matrix.gfni() }>()),
            ]
        }
    }
}

macro_rules! aes {
    ($name:ident, $doc:literal, $sub_bytes:ident) => {
        #[doc = $doc]
        #[derive(Clone, Copy)]
        pub(super) struct $name;

        impl Substitution for $name {
            const TURNS: &[Lane; 4] = &tables::TURNS_AFTER_AES;

            #[inline(always)]
            unsafe fn enter_field(x: __m256i) -> __m256i {
                arch! { look_up(&tables::TO_FIELD_NIBBLES, nibbles(x)) }
            }

            #[inline(always)]
            unsafe fn leave_field(x: __m256i) -> __m256i {
                arch! { look_up(&tables::FROM_FIELD_NIBBLES, nibbles(x)) }
            }

            #[inline(always)]
            unsafe fn near_and_far(x: __m256i) -> [__m256i; 2] {
                arch! {
                    let nibbles = nibbles($sub_bytes(x));
                    [look_up(&tables::NEAR_NIBBLES, nibbles), look_up(&tables::FAR_NIBBLES, nibbles)]
                }
            }
        }
    };
}

aes!(Vaes, "`AESENCLAST` on the whole vector.", sub_bytes);
aes!(AesHalves, "`AESENCLAST` on each half.", sub_bytes_by_halves);

#[inline(always)]
unsafe fn sub_bytes(x: __m256i) -> __m256i {
    arch! { _mm256_aesenclast_epi128(x, _mm256_setzero_si256()) }
}

#[inline(always)]
unsafe fn sub_bytes_by_halves(x: __m256i) -> __m256i {
    arch! {
        let low = _mm_aesenclast_si128(_mm256_castsi256_si128(x), _mm_setzero_si128());
        let high = _mm_aesenclast_si128(_mm256_extracti128_si256::<1>(x), _mm_setzero_si128());
        _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high)
    }
}

impl<S: Substitution> Vector for Ymm<S> {
    const BLOCKS: usize = 8;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        arch! { Self::new(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        arch! { _mm256_storeu_si256(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn splat(word: u32) -> Self {
        arch! { Self::new(_mm256_set1_epi32(word as i32)) }
    }

    #[inline(always)]
    unsafe fn indices() -> Self {
        arch! { Self::new(_mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        arch! { Self::new(_mm256_add_epi32(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        arch! { Self::new(_mm256_xor_si256(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn swap_bytes(self) -> Self {
        arch! { Self::new(_mm256_shuffle_epi8(self.0, constant(&tables::SWAP_BYTES))) }
    }

    #[inline(always)]
    unsafe fn transpose([a, b, c, d]: [Self; 4]) -> [Self; 4] {
        arch! {
            let (ab, cd) = (_mm256_unpacklo_epi32(a.0, b.0), _mm256_unpacklo_epi32(c.0, d.0));
            let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a.0, b.0), _mm256_unpackhi_epi32(c.0, d.0));
            [
                Self::new(_mm256_unpacklo_epi64(ab, cd)),
                Self::new(_mm256_unpackhi_epi64(ab, cd)),
                Self::new(_mm256_unpacklo_epi64(ab_high, cd_high)),
                Self::new(_mm256_unpackhi_epi64(ab_high, cd_high)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn enter_field(self) -> Self {
        arch! { Self::new(S::enter_field(self.0)) }
    }

    #[inline(always)]
    unsafe fn leave_field(self) -> Self {
        arch! { Self::new(S::leave_field(self.0)) }
    }

    #[inline(always)]
    unsafe fn near_and_far(self) -> [Self; 2] {
        arch! { S::near_and_far(self.0).map(Self::new) }
    }

    #[inline(always)]
    unsafe fn turn<const BYTES: usize>(self) -> Self {
        arch! { Self::new(_mm256_shuffle_epi8(self.0, constant(&S::TURNS[BYTES]))) }
    }
}
