//! Says that the engine is to be built with the locks of shuttle: `src/sync.rs`.

fn main() {
    println!("cargo::rustc-cfg=shuttle");
    // Backends that are tested elsewhere.
    println!(r#"cargo::rustc-check-cfg=cfg(feature, values("kms-aliyun", "kms-aws", "kms-pkcs11"))"#);
    println!("cargo::rerun-if-changed=build.rs");
}
