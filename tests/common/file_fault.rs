//! Faults of whole files.

use std::{
    fs::{self, OpenOptions},
    os::unix::fs::FileExt,
    path::Path,
};

/// A fault of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum FileFault {
    Lost,
    Emptied,
    CutInHalf,
    Zeroed,
    /// The second half only: the header stays.
    HalfZeroed,
}

impl FileFault {
    pub(crate) const ALL: [Self; 5] =
        [Self::Lost, Self::Emptied, Self::CutInHalf, Self::Zeroed, Self::HalfZeroed];

    pub(crate) fn apply(self, path: &Path) {
        let len = fs::metadata(path).unwrap().len();
        let open = || OpenOptions::new().write(true).open(path).unwrap();
        let zero = |from: u64| open().write_all_at(&vec![0; (len - from) as usize], from).unwrap();
        match self {
            Self::Lost => fs::remove_file(path).unwrap(),
            Self::Emptied => open().set_len(0).unwrap(),
            Self::CutInHalf => open().set_len(len / 2).unwrap(),
            Self::Zeroed => zero(0),
            Self::HalfZeroed => zero(len / 2),
        }
    }
}
