//! Runs the unsafe code under AddressSanitizer, which is part of the stable toolchain, and under
//! Miri, which needs a nightly one. Runs the threaded tests under ThreadSanitizer. It must also
//! instrument the standard library, which only a nightly toolchain can rebuild.

use std::process::{Command, Stdio};

use crate::{Done, cargo, fuzz::host, target_dir, toolchain};

/// The tests that run the unsafe code: all of `sm4-simd`, and the engine's secret memory and mapped
/// files.
const TESTS: [&[&str]; 2] = [
    &["--package", "sm4-simd", "--features", "gcm", "--lib", "--tests"],
    &[
        "--package",
        "envelog",
        "--no-default-features",
        "--lib",
        "--",
        "crypto::",
        "io::",
        "segment::",
    ],
];

/// The tests that Miri can run. Miri has no vector instructions beyond SSE2, no page locks and no
/// maps, so these are the software vectors, the portable backend and the decoders.
const MIRI: [&[&str]; 1] = [&["--package", "sm4-simd", "--features", "gcm", "--lib"]];

/// Eight writers with eight readers, thread schedules with several callers of a KMS, and the loss of
/// a key while the disk hangs.
const THREADS: [&str; 8] =
    ["--package", "envelog", "--test", "threads", "--test", "revocation", "--test", "loss"];

pub(crate) fn sanitize(args: &[String]) -> Done {
    let stable_only = match args {
        [] => false,
        [arg] if arg == "--stable-only" => true,
        _ => return Err("sanitize takes no argument but --stable-only".to_owned()),
    };
    let host = host()?;
    let target_dir = target_dir().join("sanitize");
    let target_dir = target_dir.to_string_lossy();
    for tests in TESTS {
        // The option is unstable in name only: the runtime is part of the stable toolchain. The
        // standard library is not instrumented, which hides no error in the instrumented code. Run
        // one thread at a time, because quarantined memory adds up.
        let words: Vec<&str> = ["test", "--locked", "--target", &host]
            .into_iter()
            .chain(tests.iter().copied())
            .collect();
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
    if stable_only {
        eprintln!("xtask: Miri and ThreadSanitizer were NOT run, as --stable-only says");
        return Ok(());
    }
    let installed = Command::new("cargo")
        .args(["+nightly", "miri", "--version"])
        .stderr(Stdio::null())
        .output();
    if !installed.is_ok_and(|output| output.status.success()) {
        return Err(
            "AddressSanitizer found nothing. Miri is not installed: get it with `rustup toolchain install nightly \
                    --component miri,rust-src`, or leave it out with --stable-only"
                .to_owned(),
        );
    }
    for tests in MIRI {
        toolchain::cargo(
            "nightly",
            &[&["miri", "test", "--locked"], tests].concat(),
            &[
                ("MIRIFLAGS", "-Zmiri-strict-provenance -Zmiri-symbolic-alignment-check"),
                ("CARGO_TARGET_DIR", &target_dir),
            ],
        )?;
    }
    toolchain::cargo(
        "nightly",
        &[&["test", "--locked", "-Zbuild-std", "--target", &host], &THREADS[..]].concat(),
        &[
            ("RUSTFLAGS", "-Zsanitizer=thread"),
            ("TSAN_OPTIONS", "halt_on_error=1"),
            ("CARGO_TARGET_DIR", &format!("{target_dir}/thread")),
        ],
    )
}
