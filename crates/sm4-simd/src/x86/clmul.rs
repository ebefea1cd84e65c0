//! Carry-less multiplications on 128, 256 and 512 bits.

use core::arch::x86_64::*;

use super::tables::Lane;
use crate::ghash::{self, Elements, Powers, REDUCTION};

/// For `PSHUFB`: reverses the bytes of a lane.
const REVERSE: Lane = [15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0];

/// The functions of one width: `ghash`, inlined where the instructions are enabled.
macro_rules! width {
    ($name:ident, $vector:ty, $features:literal) => {
        pub(crate) mod $name {
            use super::*;

            /// # Safety
            /// The processor must have the features.
            #[target_feature(enable = $features)]
            pub(crate) unsafe fn expand(key: &[u8; 16]) -> Powers {
                // SAFETY: the features are enabled here.
                unsafe { ghash::expand::<$vector>(key) }
            }

            /// # Safety
            /// The processor must have the features.
            #[target_feature(enable = $features)]
            pub(crate) unsafe fn update(powers: &Powers, sum: &mut [u8; 16], data: &[u8]) {
                // SAFETY: the features are enabled here.
                unsafe { ghash::update::<$vector>(powers, sum, data) }
            }
        }
    };
}

width!(ghash_128, X1, "pclmulqdq,ssse3");
width!(ghash_256, X2, "vpclmulqdq,pclmulqdq,avx2");
width!(ghash_512, X4, "vpclmulqdq,pclmulqdq,avx512f,avx512bw");

#[inline(always)]
unsafe fn lane(bytes: &[u8; 16]) -> __m128i {
    arch! { _mm_loadu_si128(bytes.as_ptr().cast()) }
}

#[inline(always)]
unsafe fn bytes(lane: __m128i) -> [u8; 16] {
    let mut bytes = [0; 16];
    arch! { _mm_storeu_si128(bytes.as_mut_ptr().cast(), lane) };
    bytes
}

#[derive(Clone, Copy)]
pub(crate) struct X1(__m128i);

impl Elements for X1 {
    const LANES: usize = 1;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        arch! { Self(_mm_loadu_si128(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_one(from: &[u8; 16]) -> Self {
        arch! { Self(lane(from)) }
    }

    #[inline(always)]
    unsafe fn first(self) -> [u8; 16] {
        arch! { bytes(self.0) }
    }

    #[inline(always)]
    unsafe fn reverse(self) -> Self {
        arch! { Self(_mm_shuffle_epi8(self.0, lane(&REVERSE))) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        arch! { Self(_mm_xor_si128(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> [Self; 3] {
        arch! {
            let (a, b) = (self.0, other.0);
            let middle = _mm_xor_si128(_mm_clmulepi64_si128::<0x01>(a, b), _mm_clmulepi64_si128::<0x10>(a, b));
            [Self(_mm_clmulepi64_si128::<0x00>(a, b)), Self(middle), Self(_mm_clmulepi64_si128::<0x11>(a, b))]
        }
    }

    #[inline(always)]
    unsafe fn reduce_half(self) -> Self {
        arch! {
            let product = _mm_clmulepi64_si128::<0x00>(self.0, _mm_set1_epi64x(REDUCTION as i64));
            Self(_mm_xor_si128(product, _mm_shuffle_epi32::<0x4e>(self.0)))
        }
    }

    #[inline(always)]
    unsafe fn fold(self) -> Self {
        self
    }
}

#[derive(Clone, Copy)]
pub(crate) struct X2(__m256i);

impl Elements for X2 {
    const LANES: usize = 2;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        arch! { Self(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_one(from: &[u8; 16]) -> Self {
        arch! { Self(_mm256_zextsi128_si256(lane(from))) }
    }

    #[inline(always)]
    unsafe fn first(self) -> [u8; 16] {
        arch! { bytes(_mm256_castsi256_si128(self.0)) }
    }

    #[inline(always)]
    unsafe fn reverse(self) -> Self {
        arch! { Self(_mm256_shuffle_epi8(self.0, _mm256_broadcastsi128_si256(lane(&REVERSE)))) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        arch! { Self(_mm256_xor_si256(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> [Self; 3] {
        arch! {
            let (a, b) = (self.0, other.0);
            let middle =
                _mm256_xor_si256(_mm256_clmulepi64_epi128::<0x01>(a, b), _mm256_clmulepi64_epi128::<0x10>(a, b));
            [Self(_mm256_clmulepi64_epi128::<0x00>(a, b)), Self(middle), Self(_mm256_clmulepi64_epi128::<0x11>(a, b))]
        }
    }

    #[inline(always)]
    unsafe fn reduce_half(self) -> Self {
        arch! {
            let product = _mm256_clmulepi64_epi128::<0x00>(self.0, _mm256_set1_epi64x(REDUCTION as i64));
            Self(_mm256_xor_si256(product, _mm256_shuffle_epi32::<0x4e>(self.0)))
        }
    }

    #[inline(always)]
    unsafe fn fold(self) -> Self {
        arch! {
            let sum = _mm_xor_si128(_mm256_castsi256_si128(self.0), _mm256_extracti128_si256::<1>(self.0));
            Self(_mm256_zextsi128_si256(sum))
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct X4(__m512i);

impl Elements for X4 {
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        arch! { Self(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_one(from: &[u8; 16]) -> Self {
        arch! { Self(_mm512_zextsi128_si512(lane(from))) }
    }

    #[inline(always)]
    unsafe fn first(self) -> [u8; 16] {
        arch! { bytes(_mm512_castsi512_si128(self.0)) }
    }

    #[inline(always)]
    unsafe fn reverse(self) -> Self {
        arch! { Self(_mm512_shuffle_epi8(self.0, _mm512_broadcast_i32x4(lane(&REVERSE)))) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Self) -> Self {
        arch! { Self(_mm512_xor_si512(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn multiply(self, other: Self) -> [Self; 3] {
        arch! {
            let (a, b) = (self.0, other.0);
            let middle =
                _mm512_xor_si512(_mm512_clmulepi64_epi128::<0x01>(a, b), _mm512_clmulepi64_epi128::<0x10>(a, b));
            [Self(_mm512_clmulepi64_epi128::<0x00>(a, b)), Self(middle), Self(_mm512_clmulepi64_epi128::<0x11>(a, b))]
        }
    }

    #[inline(always)]
    unsafe fn reduce_half(self) -> Self {
        arch! {
            let product = _mm512_clmulepi64_epi128::<0x00>(self.0, _mm512_set1_epi64(REDUCTION as i64));
            Self(_mm512_xor_si512(product, _mm512_shuffle_epi32::<0x4e>(self.0)))
        }
    }

    #[inline(always)]
    unsafe fn fold(self) -> Self {
        arch! {
            let halves = _mm256_xor_si256(_mm512_castsi512_si256(self.0), _mm512_extracti64x4_epi64::<1>(self.0));
            let sum = _mm_xor_si128(_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
            Self(_mm512_zextsi128_si512(sum))
        }
    }
}
