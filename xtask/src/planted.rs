//! Tests the tests: plants known bugs, each of which a test must detect.
//!
//! A file in `tests/planted` is a patch of `src`. Its first line describes the bug, and its second
//! line names the test that must detect it. The task copies the tree, applies the patch and runs
//! the test. A patch that does not apply, does not compile or is not caught is an error.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use crate::{Done, cargo_program};

const DIR: &str = "tests/planted";

struct Bug {
    name: String,
    patch: PathBuf,
    what: String,
    /// The arguments of `cargo test` that select the test, split at white space.
    caught_by: Vec<String>,
}

impl Bug {
    fn read(patch: &Path) -> Result<Self, String> {
        let name = patch.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let text = fs::read_to_string(patch)
            .map_err(|error| format!("cannot read {}: {error}", patch.display()))?;
        let mut lines = text.lines();
        let mut line = |prefix: &str| {
            lines.next().and_then(|line| line.strip_prefix(prefix)).map(str::to_owned)
        };
        let what = line("# ")
            .ok_or_else(|| format!("{name}: the first line does not describe the bug"))?;
        let caught_by = line("# caught by: ")
            .ok_or_else(|| format!("{name}: the second line names no test"))?;
        let caught_by = caught_by.split_whitespace().map(str::to_owned).collect();
        Ok(Self { name, patch: patch.to_owned(), what, caught_by })
    }
}

/// A copy of the tree, removed on drop.
struct Copy {
    dir: PathBuf,
    target: PathBuf,
}

impl Drop for Copy {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

impl Copy {
    fn make(root: &Path) -> Result<Self, String> {
        let dir = env::temp_dir().join(format!("envelog-planted-{}", std::process::id()));
        let copy = Self { dir, target: root.join("target/planted") };
        let mut git = Command::new("git");
        git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
            .current_dir(root);
        let listed = run("git ls-files", &mut git)?;
        if !listed.status.success() {
            return Err("`git ls-files`, which selects the files to copy, failed".to_owned());
        }
        for file in String::from_utf8_lossy(&listed.stdout)
            .split('\0')
            .filter(|file| root.join(file).is_file())
        {
            let to = copy.dir.join(file);
            let made = fs::create_dir_all(to.parent().unwrap_or(&copy.dir))
                .and_then(|()| fs::copy(root.join(file), &to));
            made.map_err(|error| format!("cannot copy {file}: {error}"))?;
        }
        Ok(copy)
    }

    fn apply(&self, bug: &Bug, back: bool) -> Done {
        let mut git = Command::new("git");
        git.arg("apply").args(back.then_some("--reverse")).arg(&bug.patch).current_dir(&self.dir);
        let applied = run("git apply", &mut git)?;
        let said = String::from_utf8_lossy(&applied.stderr).into_owned();
        if applied.status.success() {
            Ok(())
        } else {
            Err(format!("the patch does not apply: {said}"))
        }
    }

    fn test(&self, args: &[String], build_only: bool) -> Result<Output, String> {
        let mut cargo = Command::new(cargo_program());
        cargo
            .args(["test", "--locked", "--package", "envelog"])
            .args(build_only.then_some("--no-run"))
            .args(args);
        cargo.env("CARGO_TARGET_DIR", &self.target).current_dir(&self.dir);
        run("cargo test", &mut cargo)
    }

    fn catches(&self, bug: &Bug) -> Done {
        let built = self.test(&bug.caught_by, true)?;
        if !built.status.success() {
            return Err(format!(
                "it does not compile:\n{}",
                String::from_utf8_lossy(&built.stderr)
            ));
        }
        let tested = self.test(&bug.caught_by, false)?;
        let said = String::from_utf8_lossy(&tested.stdout).into_owned();
        let sweep = bug.caught_by.iter().any(|arg| arg == "sweep");
        let caught = !tested.status.success()
            // The watchdog of a hanging test ends the whole process.
            && (said.contains("test result: FAILED") || said.contains("ended by the watchdog"))
            && (!sweep || said.contains(" violations: ["));
        if caught {
            Ok(())
        } else {
            Err(format!("NOT CAUGHT by `cargo test {}`", bug.caught_by.join(" ")))
        }
    }
}

fn run(what: &str, command: &mut Command) -> Result<Output, String> {
    command.output().map_err(|error| format!("cannot run `{what}`: {error}"))
}

/// Plants every bug, or only the named ones.
pub(crate) fn planted(names: &[String]) -> Done {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let root =
        root.canonicalize().map_err(|error| format!("cannot find the workspace: {error}"))?;
    let entries =
        fs::read_dir(root.join(DIR)).map_err(|error| format!("cannot list {DIR}: {error}"))?;
    let mut patches: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    patches.retain(|path| path.extension().is_some_and(|extension| extension == "patch"));
    patches.sort();
    let mut bugs = patches.iter().map(|patch| Bug::read(patch)).collect::<Result<Vec<_>, _>>()?;
    if let Some(unknown) = names.iter().find(|name| bugs.iter().all(|bug| bug.name != **name)) {
        return Err(format!("{DIR}/{unknown}.patch does not exist"));
    }
    bugs.retain(|bug| names.is_empty() || names.contains(&bug.name));
    let copy = Copy::make(&root)?;
    // A test that fails without a bug would appear to catch every bug.
    for args in bugs.iter().map(|bug| &bug.caught_by).collect::<BTreeSet<_>>() {
        eprintln!("xtask: without a bug: cargo test {}", args.join(" "));
        let tested = copy.test(args, false)?;
        if !tested.status.success() {
            let said = [tested.stdout, tested.stderr].concat();
            return Err(format!(
                "`cargo test {}` fails without a bug:\n{}",
                args.join(" "),
                String::from_utf8_lossy(&said)
            ));
        }
    }
    let mut escaped = Vec::new();
    for bug in &bugs {
        let found = copy.apply(bug, false).and_then(|()| {
            let caught = copy.catches(bug);
            copy.apply(bug, true).and(caught)
        });
        match found {
            Ok(()) => eprintln!("xtask: {}: caught. {}", bug.name, bug.what),
            Err(error) => {
                eprintln!("xtask: {}: {error}. {}", bug.name, bug.what);
                escaped.push(bug.name.as_str());
            }
        }
    }
    eprintln!("xtask: {} of {} planted bugs caught", bugs.len() - escaped.len(), bugs.len());
    if escaped.is_empty() { Ok(()) } else { Err(format!("not caught: {}", escaped.join(", "))) }
}
