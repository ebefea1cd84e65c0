//! Compares the public API of the libraries with the lists in `docs/api`.

use std::{collections::BTreeSet, fs, path::Path};

use crate::{Done, root, target_dir, toolchain};

/// The crate `public-api` reads one version of rustdoc's JSON. This toolchain writes it.
const TOOLCHAIN: &str = "1.95.0";
const LIBRARIES: [&str; 2] = ["envelog", "sm4-simd"];
/// Traits that the compiler implements, and that no caller relies on.
const LEFT_OUT: [&str; 4] = [
    " core::marker::Freeze for ",
    " core::marker::UnsafeUnpin for ",
    " core::panic::unwind_safe::RefUnwindSafe for ",
    " core::panic::unwind_safe::UnwindSafe for ",
];

pub(crate) fn api(args: &[String]) -> Done {
    let mode = match args {
        [] => "",
        [arg] if arg == "--bless" || arg == "--install" => arg,
        _ => return Err("api takes no argument but --bless or --install".to_owned()),
    };
    toolchain::install(TOOLCHAIN)?;
    if mode == "--install" {
        return Ok(());
    }
    document()?;
    let mut differ = Vec::new();
    for library in LIBRARIES {
        let path = root().join("docs/api").join(format!("{library}.txt"));
        let now = list(library)?;
        if mode == "--bless" {
            let dir = path.parent().unwrap_or(&path);
            fs::create_dir_all(dir)
                .and_then(|()| fs::write(&path, now))
                .map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        } else if differs(&path, &now)? {
            differ.push(library);
        }
    }
    if differ.is_empty() {
        return Ok(());
    }
    Err(format!(
        "the public API of {} differs from docs/api: `cargo xtask api --bless` accepts the change",
        differ.join(" and ")
    ))
}

/// Prints the lines that one of the two lists lacks. Returns whether there are any.
fn differs(path: &Path, now: &str) -> Result<bool, String> {
    let before = fs::read_to_string(path)
        .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let (before, now): (BTreeSet<_>, BTreeSet<_>) =
        (before.lines().collect(), now.lines().collect());
    for line in before.difference(&now) {
        eprintln!("-{line}");
    }
    for line in now.difference(&before) {
        eprintln!("+{line}");
    }
    Ok(before != now)
}

/// Makes rustdoc write the public items of all libraries with all features, as JSON. With the whole
/// workspace, cargo uses the dependencies that it built for the documentation.
fn document() -> Done {
    let rustdoc = toolchain::unstable_rustdoc(&toolchain::which(TOOLCHAIN, "rustdoc")?)?;
    // In this format rustdoc does not resolve links to items of hidden modules.
    let flags = "-Zunstable-options --output-format json --cap-lints warn";
    let environment = [("RUSTDOC", &*rustdoc.to_string_lossy()), ("RUSTDOCFLAGS", flags)];
    let words = ["doc", "--locked", "--workspace", "--all-features", "--no-deps", "--lib"];
    toolchain::cargo(TOOLCHAIN, &words, &environment)
}

/// The items of a library, one a line. Without implementations for every type.
fn list(library: &str) -> Result<String, String> {
    let json = target_dir().join("doc").join(format!("{}.json", library.replace('-', "_")));
    let api = public_api::Builder::from_rustdoc_json(json).omit_blanket_impls(true).build();
    let api = api.map_err(|error| format!("cannot read the JSON of rustdoc: {error}"))?;
    let lines = api.items().map(|item| item.to_string());
    let kept = lines.filter(|line| !LEFT_OUT.iter().any(|left_out| line.contains(left_out)));
    Ok(kept.map(|line| line + "\n").collect())
}
