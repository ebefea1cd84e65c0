//! The memory of a process.

#![cfg(target_os = "linux")]
#![allow(dead_code, clippy::unwrap_used)]

use std::{fs, os::unix::fs::FileExt};

/// Calls `look` with each region of memory that a process can read, and whether a core dump
/// includes it. Keeps no copy of a region.
pub(crate) fn each_region(pid: u32, mut look: impl FnMut(bool, &[u8])) {
    let memory = fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let mut bytes: Vec<u8> = Vec::new();
    for line in fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap().lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            look(!flags.split(' ').any(|flag| flag == "dd"), &bytes);
            bytes.fill(0);
        } else if let Some((range, rest)) = line.split_once(' ')
            && let Some((from, to)) = range.split_once('-')
            && rest.starts_with('r')
        {
            let at = |text| u64::from_str_radix(text, 16).unwrap();
            bytes.resize((at(to) - at(from)) as usize, 0);
            // Unreadable pages are the kernel's and contain no data of the process.
            let read = memory.read_at(&mut bytes, at(from)).unwrap_or(0);
            bytes.truncate(read);
        }
    }
}
