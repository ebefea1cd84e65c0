//! Files that exist twice, as `X` and `X.copy`, so that the loss of one of them costs nothing.

use std::{
    io,
    path::{Path, PathBuf},
};

use super::{Disk, Existing, FileKind, NewFile, is_temporary, read_file, sync_parent, write_file};

const SUFFIX: &str = ".copy";

/// The path of the second copy of the file `path`.
pub(crate) fn copy_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(SUFFIX);
    name.into()
}

/// The name of the file whose second copy has the name `name`, or else `name` itself.
pub(crate) fn original_name(name: &str) -> &str {
    name.strip_suffix(SUFFIX).unwrap_or(name)
}

/// Whether `name` is the name of the file `of`, of its second copy, or of a temporary file of
/// either.
pub(crate) fn is_either_or_temporary(name: &str, of: &str) -> bool {
    original_name(name) == of
        || is_temporary(name, of)
        || is_temporary(name, &format!("{of}{SUFFIX}"))
}

/// Writes the file `path` and its second copy, each as [`write_file`] does. The file gets its name
/// first. An object of another type that has the name of the second copy stays.
///
/// # Errors
/// The error of the file system. Each of the two is then the old or the new file.
pub(crate) fn write_twice(
    disk: &dyn Disk,
    path: &Path,
    bytes: &[u8],
    existing: Existing,
) -> io::Result<()> {
    let beside = copy_path(path);
    let original = NewFile::write(disk, path, bytes, existing)?;
    let copy = match disk.stat(&beside)? {
        Some(stat) if stat.kind != FileKind::File => None,
        _ => Some(NewFile::write(disk, &beside, bytes, existing)?),
    };
    original.give_name()?;
    copy.map_or(Ok(()), NewFile::give_name)?;
    sync_parent(disk, path)
}

/// Which of the file `path` and its second copy do not have these bytes.
pub(crate) fn lost_of_two(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> Vec<PathBuf> {
    let has_them = |path: &PathBuf| {
        read_file(disk, path, bytes.len() as u64).is_ok_and(|found| found == bytes)
    };
    [path.to_owned(), copy_path(path)].into_iter().filter(|path| !has_them(path)).collect()
}

/// Writes the file `path`, its second copy, or both again, if they do not have these bytes. An
/// object of another type that has one of these names stays.
///
/// # Errors
/// The error of the file system.
pub(crate) fn mend(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> io::Result<()> {
    for lost in lost_of_two(disk, path, bytes) {
        if disk.stat(&lost)?.is_none_or(|stat| stat.kind == FileKind::File) {
            write_file(disk, &lost, bytes, Existing::Replace)?;
        }
    }
    Ok(())
}
