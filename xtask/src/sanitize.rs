//! The unsafe code under AddressSanitizer, which the stable toolchain brings, and under Miri, which only a nightly one has.

use std::process::{Command, Stdio};

use crate::{Done, cargo, fuzz::host, root, target_dir};

/// The tests that run the unsafe code: all of `sm4-simd`, and of the engine the secret memory and the mapped files.
const TESTS: [&[&str]; 2] = [
    &["--package", "sm4-simd", "--features", "gcm", "--lib", "--tests"],
    &["--package", "envelog", "--no-default-features", "--lib", "--", "crypto::", "io::", "segment::"],
];

/// What Miri can run: it has no vector instructions beyond SSE2, no page locks and no maps, so the vectors in software, the portable
/// backend, and the decoders.
const MIRI: [&[&str]; 1] = [&["--package", "sm4-simd", "--features", "gcm", "--lib"]];

pub(crate) fn sanitize(args: &[String]) -> Done {
    let no_miri = match args {
        [] => false,
        [arg] if arg == "--no-miri" => true,
        _ => return Err("sanitize takes nothing but --no-miri".to_owned()),
    };
    let host = host()?;
    let target_dir = target_dir().join("sanitize");
    let target_dir = target_dir.to_string_lossy();
    for tests in TESTS {
        // The option is unstable in name only: the runtime is part of the stable toolchain. The standard library is not instrumented,
        // which hides nothing of the code that is. One thread at a time, as quarantined memory adds up.
        let words: Vec<&str> =
            ["test", "--locked", "--target", &host].into_iter().chain(tests.iter().copied()).collect();
        cargo(
            &words,
            &[
                ("RUSTC_BOOTSTRAP", "1"),
                ("RUSTFLAGS", "-Zsanitizer=address -Cforce-frame-pointers=yes"),
                ("ASAN_OPTIONS", "detect_stack_use_after_return=1:strict_string_checks=1"),
                ("CARGO_TARGET_DIR", &target_dir),
            ],
        )?;
    }
    if no_miri {
        eprintln!("xtask: Miri was NOT run, as --no-miri says");
        return Ok(());
    }
    let installed = Command::new("cargo").args(["+nightly", "miri", "--version"]).stderr(Stdio::null()).output();
    if !installed.is_ok_and(|output| output.status.success()) {
        return Err(
            "AddressSanitizer found nothing. Miri is not installed: get it with `rustup toolchain install nightly \
                    --component miri,rust-src`, or leave it out with --no-miri"
                .to_owned(),
        );
    }
    for tests in MIRI {
        miri(tests, &target_dir)?;
    }
    Ok(())
}

fn miri(tests: &[&str], target_dir: &str) -> Done {
    eprintln!("xtask: cargo +nightly miri test {}", tests.join(" "));
    // By its name, not `CARGO`, which is that of the stable toolchain.
    let status = Command::new("cargo")
        .args(["+nightly", "miri", "test", "--locked"])
        .args(tests)
        .env_remove("CARGO")
        .env_remove("RUSTC")
        .env_remove("RUSTUP_TOOLCHAIN")
        .env("CARGO_TARGET_DIR", target_dir)
        .env("MIRIFLAGS", "-Zmiri-strict-provenance -Zmiri-symbolic-alignment-check")
        .current_dir(root())
        .status()
        .map_err(|error| format!("cannot run Miri: {error}"))?;
    if status.success() { Ok(()) } else { Err(format!("Miri found something ({status})")) }
}
