//! The choice of instructions.

use core::fmt;

/// An implementation of the cipher for one set of instructions.
///
/// All backends give the same results, in constant time: none looks up an address that depends on a
/// key or on data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Backend {
    /// Bitsliced, in 64-bit registers. Runs on every processor.
    Portable,
    /// x86-64 with AES-NI, SSSE3 and SSE4.1.
    AesNi,
    /// x86-64 with AVX2 and AES-NI.
    Avx2AesNi,
    /// x86-64 with AVX2 and VAES.
    Avx2Vaes,
    /// x86-64 with AVX2 and GFNI.
    Avx2Gfni,
    /// x86-64 with AVX-512 (F and BW) and GFNI.
    Avx512Gfni,
}

impl Backend {
    /// All backends, the fastest last.
    pub const ALL: [Backend; 6] = [
        Backend::Portable,
        Backend::AesNi,
        Backend::Avx2AesNi,
        Backend::Avx2Vaes,
        Backend::Avx2Gfni,
        Backend::Avx512Gfni,
    ];

    /// The fastest backend of this processor. New keys use it.
    #[must_use]
    pub fn detect() -> Self {
        Self::ALL
            .into_iter()
            .rev()
            .find(|backend| backend.is_available())
            .unwrap_or(Backend::Portable)
    }

    /// Whether this processor and the operating system support it.
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Backend::Portable => true,
            #[cfg(target_arch = "x86_64")]
            _ => crate::x86::detect::has(self),
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// A short name for logs and benchmarks, such as `avx2-vaes`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Backend::Portable => "portable",
            Backend::AesNi => "aes-ni",
            Backend::Avx2AesNi => "avx2-aes-ni",
            Backend::Avx2Vaes => "avx2-vaes",
            Backend::Avx2Gfni => "avx2-gfni",
            Backend::Avx512Gfni => "avx512-gfni",
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
