//! Code for both tests.

use sm4_simd::Backend;

/// The backends of this machine. Prints them, and fails if the accelerated ones are missing
/// although the machine has them.
pub(crate) fn backends() -> Vec<Backend> {
    let available: Vec<_> =
        Backend::ALL.into_iter().filter(|backend| backend.is_available()).collect();
    println!("backends: {available:?}");
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if is_x86_feature_detected!("aes") && is_x86_feature_detected!("sse4.1") {
        assert!(available.len() > 1, "only the portable backend on a machine with AES-NI");
    }
    available
}
