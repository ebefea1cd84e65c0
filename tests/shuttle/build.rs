//! Builds the engine with the locks of shuttle: see `src/sync.rs`.

fn main() {
    println!("cargo::rustc-cfg=shuttle");
    // Declare the features of backends that other packages test.
    println!(
        r#"cargo::rustc-check-cfg=cfg(feature, values("kms-aliyun", "kms-aws", "kms-conformance", "kms-pkcs11", "kms-vault"))"#
    );
    println!("cargo::rerun-if-changed=build.rs");
}
