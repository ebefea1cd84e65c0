//! What both tests need.

use sm4_simd::Backend;

/// The backends to test: all that can run here. Says which, and fails where the accelerated ones should have been among them.
pub(crate) fn backends() -> Vec<Backend> {
    let available: Vec<_> = Backend::ALL.into_iter().filter(|backend| backend.is_available()).collect();
    println!("backends: {available:?}");
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    if is_x86_feature_detected!("aes") && is_x86_feature_detected!("sse4.1") {
        assert!(available.len() > 1, "only the portable backend on a machine with AES-NI");
    }
    available
}
