//! A whole directory: a golden store with files that are damaged, cut, moved, mixed with those of
//! other stores, or made up.

use std::path::{Path, PathBuf};

use arbitrary::{Arbitrary, Unstructured};

use crate::{
    common::memory::Image,
    crc,
    golden::{DIR, KEYRING, picked},
};

/// An edit of the files. Numbers choose the files, in the order of their paths.
#[derive(Arbitrary, Debug)]
enum Edit {
    /// Changes a byte.
    Flip {
        file: u8,
        at: u16,
        by: u8,
    },
    /// Writes bytes over others, or behind them.
    Overwrite {
        file: u8,
        at: u16,
        with: Vec<u8>,
    },
    /// Writes zeros, like a hole in a file or a bad sector.
    Zero {
        file: u8,
        at: u16,
        len: u16,
    },
    Cut {
        file: u8,
        to: u16,
    },
    /// Removes a part. The bytes behind it move up.
    TakeOut {
        file: u8,
        at: u16,
        len: u16,
    },
    /// Repeats a part.
    Repeat {
        file: u8,
        at: u16,
        len: u16,
    },
    Remove {
        file: u8,
    },
    Swap {
        one: u8,
        other: u8,
    },
    /// Replaces a file by another one of the same store, or of another store.
    Copy {
        store: u8,
        from: u8,
        to: u8,
    },
    /// Gives a segment the name of another one.
    Rename {
        file: u8,
        ordinal: u8,
        first_seq: u16,
        epoch: u8,
    },
    /// Adds a made-up or a leftover file.
    Add {
        dir: u8,
        name: u8,
        contents: Vec<u8>,
    },
    /// Corrects the CRC32s of a file.
    Fix {
        file: u8,
    },
}

/// Applies edits, and then uses every operation of the store.
pub fn store(data: &[u8]) {
    let mut source = Unstructured::new(data);
    let Ok(which) = u8::arbitrary(&mut source) else { return };
    let golden = picked(which);
    let mut image = golden.image.clone();
    let mut keyring_lost = false;
    for _ in 0..24 {
        let Ok(edit) = Edit::arbitrary(&mut source) else { break };
        keyring_lost |=
            matches!(edit, Edit::Remove { .. }) && !image.files.contains_key(Path::new(KEYRING));
        apply(&mut image, edit);
        if source.is_empty() {
            break;
        }
    }
    golden.examine(&image);
    if which & 0x80 != 0 || keyring_lost {
        golden.recover(&image);
    }
}

fn path_of(image: &Image, file: u8) -> Option<PathBuf> {
    image.files.keys().nth(usize::from(file) % image.files.len().max(1)).cloned()
}

fn apply(image: &mut Image, edit: Edit) {
    let range = |bytes: &Vec<u8>, at: u16, len: u16| {
        let at = usize::from(at).min(bytes.len());
        at..(at + usize::from(len)).min(bytes.len())
    };
    match edit {
        Edit::Flip { file, at, by } => in_file(image, file, |bytes| {
            if let Some(len) = bytes.len().checked_sub(1) {
                bytes[usize::from(at) % (len + 1)] ^= by;
            }
        }),
        Edit::Overwrite { file, at, with } => in_file(image, file, |bytes| {
            let at = usize::from(at).min(bytes.len());
            bytes.resize(bytes.len().max(at + with.len()), 0);
            bytes[at..at + with.len()].copy_from_slice(&with);
        }),
        Edit::Zero { file, at, len } => in_file(image, file, |bytes| {
            let range = range(bytes, at, len);
            bytes[range].fill(0);
        }),
        Edit::Cut { file, to } => in_file(image, file, |bytes| bytes.truncate(usize::from(to))),
        Edit::TakeOut { file, at, len } => {
            in_file(image, file, |bytes| drop(bytes.drain(range(bytes, at, len))))
        }
        Edit::Repeat { file, at, len } => in_file(image, file, |bytes| {
            let range = range(bytes, at, len);
            let part = bytes[range.clone()].to_vec();
            bytes.splice(range.end..range.end, part);
        }),
        Edit::Remove { file } => {
            if let Some(path) = path_of(image, file) {
                image.files.remove(&path);
            }
        }
        Edit::Swap { one, other } => {
            if let (Some(one), Some(other)) = (path_of(image, one), path_of(image, other)) {
                let (first, second) = (image.files[&one].clone(), image.files[&other].clone());
                image.files.insert(one, second);
                image.files.insert(other, first);
            }
        }
        Edit::Copy { store, from, to } => {
            let other = &picked(store).image;
            if let (Some(from), Some(to)) = (path_of(other, from), path_of(image, to)) {
                image.files.insert(to, other.files[&from].clone());
            }
        }
        Edit::Rename { file, ordinal, first_seq, epoch } => {
            let name = format!("{ordinal:010}-{first_seq:020}-{epoch:010}.seg");
            if let Some(path) =
                path_of(image, file).filter(|path| path.extension().is_some_and(|end| end == "seg"))
                && let Some(bytes) = image.files.remove(&path)
            {
                image.files.insert(path.with_file_name(name), bytes);
            }
        }
        Edit::Add { dir, name, contents } => {
            let dirs: Vec<&PathBuf> = image.dirs.iter().collect();
            let dir = dirs
                .get(usize::from(dir) % dirs.len().max(1))
                .map_or(Path::new(DIR), |dir| dir.as_path());
            let name = match name % 10 {
                0 => "meta-0000000009-0123456789abcdef",
                1 => "0000000009-0000000001",
                2 => "0000000009-0000000001.tmp",
                3 => "audit-000002.log",
                4 => "0000000001-00000000000000000000-0000000001.seg",
                5 => "0000000009-00000000000000000900-0000000001.seg",
                6 => "0000000009-00000000000000000900-0000000001.tmp",
                7 => "0000000001-00000000000000000000-0000000009.seg",
                8 => "EPOCH",
                _ => "stray",
            };
            let path = dir.join(name);
            image.files.insert(path, contents);
        }
        Edit::Fix { file } => {
            if let Some(path) = path_of(image, file) {
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                in_file(image, file, |bytes| crc::fix(&name, bytes));
            }
        }
    }
}

fn in_file(image: &mut Image, file: u8, edit: impl FnOnce(&mut Vec<u8>)) {
    if let Some(path) = path_of(image, file)
        && let Some(bytes) = image.files.get_mut(&path)
    {
        edit(bytes);
    }
}
