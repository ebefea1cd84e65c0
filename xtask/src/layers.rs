//! Checks that the modules of the engine use each other in one direction only.
//!
//! [`ORDER`] lists the top-level modules of `src` from the bottom to the top. A module may use the
//! modules below it. In the folders of [`NO_CIRCLES`] the files beside each other may use each
//! other in any order, but not in a circle; their `mod.rs` is no part of that.
//!
//! The check reads paths that begin with `crate` or `super`, in `use` items and in expressions. It
//! skips comments, strings and items under `#[cfg(test)]`. It expands no macros, and it knows no
//! re-exports but those of `lib.rs`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use crate::{Done, root};

/// The top-level modules, from the bottom to the top.
const ORDER: [&str; 23] = [
    "setters",
    "sync",
    "schedule",
    "io",
    "ids",
    "crypto",
    "wire",
    "group",
    "segment",
    "kms",
    "key_status",
    "config",
    "metrics",
    "error",
    "epoch",
    "document",
    "keys",
    "shard",
    "logstore",
    "store",
    "testing",
    "fuzzing",
    "lib",
];

/// Folders whose files use each other without a circle.
const NO_CIRCLES: [&str; 6] =
    ["keys", "keys/audit", "kms/aliyun", "testing/conformance", "kms/local", "kms/vault"];

/// Reads `src`, and prints the order if it holds.
pub(crate) fn layers() -> Done {
    let mut files = BTreeMap::new();
    read_sources(&root().join("src"), "", &mut files)?;
    let faults = check(&files);
    if !faults.is_empty() {
        return Err(format!("the modules are out of order:\n{}", faults.join("\n")));
    }
    println!("from the bottom to the top: {}", ORDER[..ORDER.len() - 1].join(", "));
    println!("without a circle of files: {}", NO_CIRCLES.join(", "));
    Ok(())
}

fn read_sources(dir: &Path, prefix: &str, files: &mut BTreeMap<String, String>) -> Done {
    let failed = |error| format!("cannot read {}: {error}", dir.display());
    for entry in fs::read_dir(dir).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let path = entry.path();
        if path.is_dir() {
            read_sources(&path, &format!("{prefix}{name}/"), files)?;
        } else if name.ends_with(".rs") {
            files.insert(format!("{prefix}{name}"), fs::read_to_string(&path).map_err(failed)?);
        }
    }
    Ok(())
}

/// The faults of these sources, which are given by their paths below `src`. A fault is a line.
fn check(files: &BTreeMap<String, String>) -> Vec<String> {
    let sources: BTreeMap<&str, Source> =
        files.iter().map(|(path, text)| (path.as_str(), Source::read(text))).collect();
    let tests: BTreeSet<String> = sources
        .iter()
        .flat_map(|(path, source)| {
            let module = module_of(path).join("/");
            source
                .test_modules
                .iter()
                .map(move |name| format!("{module}/{name}").trim_matches('/').to_owned())
        })
        .collect();
    let exports = sources.get("lib.rs").map(root_exports).unwrap_or_default();
    let modules: BTreeSet<Vec<String>> = sources.keys().map(|path| module_of(path)).collect();
    let mut faults = Vec::new();
    let mut edges: BTreeMap<(&str, String), BTreeSet<String>> = BTreeMap::new();
    for (path, source) in &sources {
        let module = module_of(path);
        if tests
            .iter()
            .any(|test| format!("{}/", module.join("/")).starts_with(&format!("{test}/")))
        {
            continue;
        }
        let here = module.first().map_or("lib", String::as_str);
        let Some(floor) = ORDER.iter().position(|name| *name == here) else {
            faults.push(format!("  src/{path}: the order does not have {here}"));
            continue;
        };
        for Used { line, path: used } in source.paths(&module) {
            let Some(first) = used.first() else { continue };
            let target = exports.get(first).unwrap_or(first);
            match ORDER.iter().position(|name| name == target) {
                Some(at) if at <= floor => {}
                Some(_) => faults
                    .push(format!("  src/{path}:{line}: {here} uses {target}, which is above it")),
                None => {
                    faults.push(format!("  src/{path}:{line}: the order does not have {first}"))
                }
            }
            for folder in NO_CIRCLES {
                if let Some((from, to)) = siblings(folder, &module, &used, &modules) {
                    edges.entry((folder, from)).or_default().insert(to);
                }
            }
        }
    }
    faults.extend(circles(&edges));
    faults
}

/// The module that a file is, as a path below the crate.
fn module_of(path: &str) -> Vec<String> {
    let path = path.strip_suffix(".rs").unwrap_or(path);
    let path = path.strip_suffix("/mod").unwrap_or(path);
    if path == "lib" { Vec::new() } else { path.split('/').map(str::to_owned).collect() }
}

/// Two different children of a folder, if the one uses the other.
fn siblings(
    folder: &str,
    module: &[String],
    used: &[String],
    modules: &BTreeSet<Vec<String>>,
) -> Option<(String, String)> {
    let folder: Vec<String> = folder.split('/').map(str::to_owned).collect();
    let from = module.strip_prefix(&folder[..])?.first()?;
    let to = used.strip_prefix(&folder[..])?.first()?;
    let child = [&folder[..], std::slice::from_ref(to)].concat();
    (from != to && modules.contains(&child)).then(|| (from.clone(), to.clone()))
}

/// The circles in these edges, each reported once.
fn circles(edges: &BTreeMap<(&str, String), BTreeSet<String>>) -> Vec<String> {
    let mut faults = Vec::new();
    for (folder, from) in edges.keys() {
        // The files that `from` reaches. It is in a circle if it reaches itself.
        let mut reached = BTreeSet::new();
        let mut next = vec![from.clone()];
        while let Some(at) = next.pop() {
            for to in edges.get(&(*folder, at)).into_iter().flatten() {
                if reached.insert(to.clone()) {
                    next.push(to.clone());
                }
            }
        }
        if reached.contains(from) {
            faults.push(format!("  src/{folder}: {from} is in a circle of files"));
        }
    }
    faults
}

/// The names that `lib.rs` re-exports, and the top-level module of each.
fn root_exports(lib: &Source) -> BTreeMap<String, String> {
    let mut exports = BTreeMap::new();
    let tokens = &lib.tokens;
    for (at, token) in tokens.iter().enumerate() {
        if token.text != "use" {
            continue;
        }
        for path in tree(tokens, &mut (at + 1)) {
            if let (Some(first), Some(last)) = (path.first(), path.last()) {
                exports.insert(last.clone(), first.clone());
            }
        }
    }
    exports
}

/// A word or a sign, and the line that it is on.
#[derive(Clone, Debug)]
struct Token {
    text: String,
    line: usize,
}

/// A path that is used, from the crate on.
struct Used {
    line: usize,
    path: Vec<String>,
}

/// A source file without comments, strings and tests.
struct Source {
    tokens: Vec<Token>,
    /// The modules in other files that are only compiled for tests.
    test_modules: Vec<String>,
}

impl Source {
    fn read(text: &str) -> Self {
        let all = tokens(text);
        let (mut tokens, mut test_modules) = (Vec::new(), Vec::new());
        let mut at = 0;
        while at < all.len() {
            if !is_test_attribute(&all[at..]) {
                tokens.push(all[at].clone());
                at += 1;
                continue;
            }
            while text_at(&all, at) == "#" {
                at = end_of_group(&all, at + 1);
            }
            let begin = at;
            while at < all.len() && !matches!(all[at].text.as_str(), "{" | ";") {
                at += 1;
            }
            if text_at(&all, at) == "{" {
                at = end_of_group(&all, at);
            } else if let Some(word) = all[begin..at].iter().position(|token| token.text == "mod") {
                test_modules.push(text_at(&all, begin + word + 1).to_owned());
            }
        }
        Self { tokens, test_modules }
    }

    /// All paths that begin with `crate` or `super`. `module` is the module of the file.
    fn paths(&self, module: &[String]) -> Vec<Used> {
        let tokens = &self.tokens;
        let mut used = Vec::new();
        let mut module = module.to_vec();
        // How many braces are open, and of those that open an inline module, how many were open
        // before.
        let (mut depth, mut inline) = (0_usize, Vec::new());
        let mut at = 0;
        while at < tokens.len() {
            let line = tokens[at].line;
            match tokens[at].text.as_str() {
                "mod" if text_at(tokens, at + 2) == "{" => {
                    module.push(tokens[at + 1].text.clone());
                    inline.push(depth);
                    depth += 1;
                    at += 3;
                }
                "{" => {
                    depth += 1;
                    at += 1;
                }
                "}" => {
                    depth = depth.saturating_sub(1);
                    if inline.last() == Some(&depth) {
                        inline.pop();
                        module.pop();
                    }
                    at += 1;
                }
                // `pub(crate)` and `pub(super)` are no paths.
                "crate" | "super" if text_at(tokens, at + 1) == "::" => {
                    let mut from =
                        if tokens[at].text == "crate" { Vec::new() } else { module.clone() };
                    while text_at(tokens, at) == "super" && text_at(tokens, at + 1) == "::" {
                        from.pop();
                        at += 2;
                    }
                    if text_at(tokens, at) == "crate" {
                        at += 2;
                    }
                    for path in tree(tokens, &mut at) {
                        used.push(Used { line, path: [&from[..], &path].concat() });
                    }
                }
                _ => at += 1,
            }
        }
        used
    }
}

fn text_at(tokens: &[Token], at: usize) -> &str {
    tokens.get(at).map_or("", |token| token.text.as_str())
}

/// Whether these tokens begin with `#[cfg(…test…)]`.
fn is_test_attribute(tokens: &[Token]) -> bool {
    let begins =
        ["#", "[", "cfg", "("].iter().enumerate().all(|(at, text)| text_at(tokens, at) == *text);
    begins && tokens[..end_of_group(tokens, 1)].iter().any(|token| token.text == "test")
}

/// Where the group ends that opens at `at`.
fn end_of_group(tokens: &[Token], mut at: usize) -> usize {
    let mut depth = 0_usize;
    while at < tokens.len() {
        match tokens[at].text.as_str() {
            "(" | "[" | "{" => depth += 1,
            ")" | "]" | "}" => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
        if depth == 0 {
            break;
        }
    }
    at
}

/// The paths of a use tree, or the one path of an expression, from `at` on, which is moved behind
/// it.
fn tree(tokens: &[Token], at: &mut usize) -> Vec<Vec<String>> {
    if text_at(tokens, *at) == "{" {
        *at += 1;
        let mut paths = Vec::new();
        while *at < tokens.len() && text_at(tokens, *at) != "}" {
            paths.extend(tree(tokens, at));
            if text_at(tokens, *at) == "," {
                *at += 1;
            }
        }
        *at += 1;
        return paths;
    }
    let first = text_at(tokens, *at).to_owned();
    *at += 1;
    let mut rest = if text_at(tokens, *at) == "::" && begins_tree(text_at(tokens, *at + 1)) {
        *at += 1;
        tree(tokens, at)
    } else {
        vec![Vec::new()]
    };
    if text_at(tokens, *at) == "as" {
        *at += 2;
    }
    for path in &mut rest {
        path.insert(0, first.clone());
    }
    rest
}

fn begins_tree(text: &str) -> bool {
    text == "{"
        || text == "*"
        || text.chars().next().is_some_and(|first| first.is_alphabetic() || first == '_')
}

/// The words and signs of a source, without comments and literals.
fn tokens(text: &str) -> Vec<Token> {
    let chars: Vec<char> = text.chars().collect();
    let (mut tokens, mut line, mut at) = (Vec::new(), 1, 0);
    while at < chars.len() {
        let begin = at;
        let rest = &chars[at..];
        match rest {
            ['/', '/', ..] => at += rest.iter().position(|&c| c == '\n').unwrap_or(rest.len()),
            ['/', '*', ..] => at += block_comment(rest),
            ['r' | 'b' | 'c', ..] if raw_string(rest).is_some() => {
                at += raw_string(rest).unwrap_or(1)
            }
            ['"', ..] => at += string(rest),
            ['\'', '\\', ..] => {
                at += 3 + rest[3..].iter().position(|&c| c == '\'').map_or(0, |end| end + 1)
            }
            ['\'', _, '\'', ..] => at += 3,
            [':', ':', ..] => {
                tokens.push(Token { text: "::".to_owned(), line });
                at += 2;
            }
            [c, ..] if c.is_alphanumeric() || *c == '_' => {
                let end = rest.iter().position(|&c| !(c.is_alphanumeric() || c == '_'));
                at += end.unwrap_or(rest.len());
                tokens.push(Token { text: chars[begin..at].iter().collect(), line });
            }
            [c, ..] => {
                if !c.is_whitespace() {
                    tokens.push(Token { text: c.to_string(), line });
                }
                at += 1;
            }
            [] => {}
        }
        at = at.min(chars.len());
        line += chars[begin..at].iter().filter(|&&c| c == '\n').count();
    }
    tokens
}

/// The length of the block comment that begins here. They nest.
fn block_comment(rest: &[char]) -> usize {
    let (mut depth, mut at) = (0_usize, 0);
    while at < rest.len() {
        match &rest[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// The length of the string that begins here with a quotation mark.
fn string(rest: &[char]) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            '\\' => at += 2,
            '"' => return at + 1,
            _ => at += 1,
        }
    }
    at
}

/// The length of the raw string that begins here, if one does.
fn raw_string(rest: &[char]) -> Option<usize> {
    let prefix = rest.iter().take_while(|c| matches!(c, 'r' | 'b' | 'c')).count();
    if !rest[..prefix].contains(&'r') {
        return None;
    }
    let marks = rest[prefix..].iter().take_while(|&&c| c == '#').count();
    let begin = prefix + marks + 1;
    (rest.get(begin - 1) == Some(&'"')).then_some(())?;
    let ends = |at: &usize| {
        rest[*at] == '"'
            && rest[at + 1..].iter().take(marks).filter(|&&c| c == '#').count() == marks
    };
    let end = (begin..rest.len()).find(ends);
    Some(end.map_or(rest.len(), |end| end + 1 + marks))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn of(files: &[(&str, &str)]) -> Vec<String> {
        check(&files.iter().map(|(path, text)| ((*path).to_owned(), (*text).to_owned())).collect())
    }

    #[test]
    fn the_tree_is_in_order() {
        let mut files = BTreeMap::new();
        read_sources(&root().join("src"), "", &mut files).unwrap();
        assert!(files.len() > 50);
        assert_eq!(check(&files), Vec::<String>::new());
        // With one upward import it is not.
        let planted = "\nuse crate::{io::Disk, store::{self, Store}};\n";
        files.get_mut("crypto/kdf.rs").unwrap().push_str(planted);
        let line = files["crypto/kdf.rs"].lines().count();
        let faults = check(&files);
        assert!(faults.iter().all(|fault| *fault == faults[0]), "{faults:?}");
        assert_eq!(
            faults[0],
            format!("  src/crypto/kdf.rs:{line}: crypto uses store, which is above it")
        );
    }

    #[test]
    fn upward_paths_are_found_wherever_they_are() {
        let upward = "  src/io/mod.rs:2: io uses kms, which is above it";
        for text in [
            "use crate::sync;\nuse crate::kms::Kms;",
            "\nuse crate::{sync::lock, kms::{Kms, Cmk}};",
            "\nfn f() -> crate::kms::Cmk { crate::sync::f() }",
            "\nuse super::kms;",
            "mod inner {\n    use super::super::kms::Cmk; }",
            "/* crate::store */ // crate::store\nconst A: (&str, char) = (r#\"crate::store\"#, '\"'); use crate::kms;",
            "#[cfg(feature = \"a\")]\nuse crate::kms;",
        ] {
            let mut faults = of(&[("io/mod.rs", text)]);
            faults.dedup();
            assert_eq!(faults, [upward], "{text}");
        }
    }

    #[test]
    fn downward_paths_tests_and_re_exports_are_fine() {
        let lib = "pub use error::{Error, Result};\npub use kms::Cmk as MasterKey;\n";
        let store = "use crate::{Error, kms::Cmk};\nmod inner { use super::super::io::Disk; }\n";
        let io = "#[cfg(test)]\nmod tests { use crate::store::Store; }\n#[cfg(test)]\n#[allow(a)]\npub(crate) mod fakes;\n";
        let faults = of(&[
            ("lib.rs", lib),
            ("store.rs", store),
            ("io/mod.rs", io),
            ("io/fakes.rs", "use crate::store::Store;"),
        ]);
        assert_eq!(faults, Vec::<String>::new());
        assert_eq!(
            of(&[("lib.rs", lib), ("io/mod.rs", "use crate::Error;")]),
            ["  src/io/mod.rs:1: io uses error, which is above it"]
        );
    }

    #[test]
    fn circles_of_files_are_found() {
        let lease = ("keys/lease.rs", "use super::{envelope::fingerprint, pool::Pool};");
        let envelope = ("keys/envelope.rs", "use crate::crypto::hash;");
        let fine = of(&[lease, envelope, ("keys/pool.rs", "use crate::io::Clock;")]);
        assert_eq!(fine, Vec::<String>::new());
        let circle = of(&[lease, envelope, ("keys/pool.rs", "use crate::keys::lease::Lease;")]);
        assert_eq!(
            circle,
            ["lease", "pool"].map(|file| format!("  src/keys: {file} is in a circle of files"))
        );
    }
}
