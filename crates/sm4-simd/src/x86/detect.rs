//! Detection of the processor's instructions.

use crate::backend::Backend;

cpufeatures::new!(aes_ni, "aes", "ssse3", "sse4.1");
cpufeatures::new!(avx2, "avx2", "aes");
cpufeatures::new!(avx512, "avx512f", "avx512bw");
#[cfg(feature = "gcm")]
cpufeatures::new!(pclmulqdq, "pclmulqdq", "ssse3");

/// Extensions that CPUID reports in ECX of leaf 7.
///
/// `cpufeatures` has names for them, but it reports them only if the operating system saves the
/// registers of AVX-512, which the 256-bit forms do not need. The code checks for AVX2 first, which
/// implies that leaf 7 exists and that 256-bit registers are saved.
#[derive(Clone, Copy)]
#[repr(u32)]
enum Leaf7 {
    Gfni = 1 << 8,
    Vaes = 1 << 9,
    #[cfg(feature = "gcm")]
    Vpclmulqdq = 1 << 10,
}

fn has_avx2_and(extension: Leaf7) -> bool {
    if !avx2::get() || cfg!(miri) {
        return false;
    }
    #[allow(unused_unsafe, reason = "unsafe in the oldest supported Rust versions")]
    // SAFETY: all x86-64 processors have CPUID. Where a program may not use it (SGX), `avx2` is
    // false.
    let leaf = unsafe { core::arch::x86_64::__cpuid_count(7, 0) };
    leaf.ecx & extension as u32 != 0
}

pub(crate) fn has(backend: Backend) -> bool {
    match backend {
        Backend::Portable => true,
        Backend::AesNi => aes_ni::get(),
        Backend::Avx2AesNi => avx2::get(),
        Backend::Avx2Vaes => has_avx2_and(Leaf7::Vaes),
        Backend::Avx2Gfni => has_avx2_and(Leaf7::Gfni),
        Backend::Avx512Gfni => avx512::get() && has_avx2_and(Leaf7::Gfni),
    }
}

#[cfg(feature = "gcm")]
pub(crate) fn has_clmul_128() -> bool {
    pclmulqdq::get()
}

#[cfg(feature = "gcm")]
pub(crate) fn has_clmul_256() -> bool {
    pclmulqdq::get() && has_avx2_and(Leaf7::Vpclmulqdq)
}

#[cfg(feature = "gcm")]
pub(crate) fn has_clmul_512() -> bool {
    avx512::get() && has_clmul_256()
}
