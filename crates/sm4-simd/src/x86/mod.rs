//! The vectors of x86-64, and the functions in which each instruction set is enabled.

/// Calls intrinsics in the method of a vector.
macro_rules! arch {
    ($($body:tt)*) => {{
        // SAFETY: the methods of vectors require that the processor has the instructions, and that
        // the memory they load or store is accessible.
        unsafe { $($body)* }
    }};
}

mod avx2;
mod avx512;
#[cfg(feature = "gcm")]
mod clmul;
pub(crate) mod detect;
mod sse;
mod tables;

#[cfg(feature = "gcm")]
pub(crate) use clmul::{ghash_128, ghash_256, ghash_512};

use crate::{portable::RoundKeys, simd};

/// The functions of one backend: `simd`, inlined where the instruction set is enabled.
macro_rules! backend {
    ($name:ident, $vector:ty, $groups:literal, $features:literal) => {
        pub(crate) mod $name {
            use super::*;

            /// # Safety
            /// The processor must have the features. Otherwise as [`simd::crypt`].
            #[target_feature(enable = $features)]
            pub(crate) unsafe fn crypt<const DECRYPT: bool>(
                round_keys: &RoundKeys,
                input: *const u8,
                output: *mut u8,
                blocks: usize,
            ) {
                // SAFETY: the features are enabled here. The caller guarantees the memory.
                unsafe {
                    simd::crypt::<$vector, $groups, DECRYPT>(round_keys, input, output, blocks)
                }
            }

            /// # Safety
            /// The processor must have the features. Otherwise as [`simd::ctr`].
            #[target_feature(enable = $features)]
            pub(crate) unsafe fn ctr(
                round_keys: &RoundKeys,
                nonce: &[u8; 12],
                counter: u32,
                input: *const u8,
                output: *mut u8,
                len: usize,
            ) {
                // SAFETY: the features are enabled here. The caller guarantees the memory.
                unsafe {
                    simd::ctr::<$vector, $groups>(round_keys, nonce, counter, input, output, len)
                }
            }
        }
    };
}

backend!(aes_ni, sse::Xmm, 4, "aes,ssse3,sse4.1");
backend!(avx2_aes_ni, avx2::Ymm<avx2::AesHalves>, 4, "avx2,aes");
backend!(avx2_vaes, avx2::Ymm<avx2::Vaes>, 4, "avx2,aes,vaes");
backend!(avx2_gfni, avx2::Ymm<avx2::Gfni>, 4, "avx2,gfni");
backend!(avx512_gfni, avx512::Zmm, 4, "avx512f,avx512bw,gfni");
