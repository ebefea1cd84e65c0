//! Says that the engine is to be built with the locks of shuttle: `src/sync.rs`.

fn main() {
    println!("cargo::rustc-cfg=shuttle");
    println!("cargo::rerun-if-changed=build.rs");
}
