//! Wrapped keys: round trips, binding, damage, versions.

use crate::kms::EncryptionContext;
use crate::testing::conformance::run::{
    Caller, Check, Run, Sample, Wanted, accepted, context, context_of, failed, refused,
};

/// The most places of a wrapped key that are damaged. Each costs a call.
const PLACES_MAX: usize = 48;

pub(in crate::testing::conformance) fn round_trip(run: &Run<'_>) -> Check {
    let (caller, later) = (run.caller(), run.caller());
    let cmk = run.subject.create_key()?;
    let long = "x".repeat(500);
    for context in [
        context("1"),
        EncryptionContext::new(),
        context_of(&[("envelog:purpose", "probe"), ("é ü 中", "\" \\ / & = + % {} []")]),
        context_of(&[("envelog:long", &long)]),
    ] {
        let key = run.key()?;
        let wrapped = accepted(caller.wrap(&cmk, &context, &key)?, "wrapping a key")?;
        let sample = Sample { cmk: cmk.clone(), context, key, wrapped };
        caller.opens(&sample, "a key")?;
        later.opens(&sample, "a key in an instance that did not wrap it")?;
    }
    // The same key twice, and another master key.
    let sample = run.sample_under(&caller, cmk)?;
    caller.works(&sample, "after other keys")?;
    caller.works(&run.sample(&caller)?, "under another master key")
}

pub(in crate::testing::conformance) fn context_binding(run: &Run<'_>) -> Check {
    let caller = run.caller();
    let sample = run.sample(&caller)?;
    let entries: Vec<(&str, &str)> = sample.context.iter().collect();
    let changed = |change: fn(&mut Vec<(&str, &str)>)| {
        let mut entries = entries.clone();
        change(&mut entries);
        context_of(&entries)
    };
    let others = [
        ("another value", context("2")),
        ("no entries", EncryptionContext::new()),
        ("a missing entry", changed(|entries| entries.retain(|entry| entry.1 != "1"))),
        ("a missing last entry", changed(|entries| entries.truncate(3))),
        ("an additional entry", changed(|entries| entries.push(("envelog:zone", "a")))),
        ("a value in another case", changed(|entries| entries[3].1 = "aes-256-gcm")),
        ("a space behind a value", changed(|entries| entries[3].1 = "AES-256-GCM ")),
        ("another name", changed(|entries| entries[0].0 = "envelog:key")),
        ("the values of two names exchanged", {
            changed(|entries| {
                let first = entries[0].1;
                entries[0].1 = entries[1].1;
                entries[1].1 = first;
            })
        }),
    ];
    for (what, other) in others {
        let answer = caller.unwrap(&sample.cmk, &other, &sample.wrapped)?;
        refused(answer, Wanted::Invalid, &format!("unwrapping in a context with {what}"))?;
    }
    caller.opens(&sample, "in its own context afterwards")
}

pub(in crate::testing::conformance) fn context_boundaries(run: &Run<'_>) -> Check {
    let caller = run.caller();
    let (cmk, key) = (run.subject.create_key()?, run.key()?);
    // Each has the same letters in the same order.
    let contexts = [
        context_of(&[("ab", "cdef")]),
        context_of(&[("abc", "def")]),
        context_of(&[("a", "bcdef")]),
        context_of(&[("ab", "c"), ("de", "f")]),
        context_of(&[("a", "b"), ("cd", "ef")]),
        context_of(&[("a", "b"), ("c", "d"), ("e", "f")]),
    ];
    for (number, context) in contexts.iter().enumerate() {
        let wrapped = accepted(caller.wrap(&cmk, context, &key)?, "wrapping a key")?;
        for (other_number, other) in contexts.iter().enumerate() {
            let answer = caller.unwrap(&cmk, other, &wrapped)?;
            let what = format!("unwrapping in {other:?} a key wrapped in {context:?}");
            if number == other_number {
                accepted(answer, &what)?;
            } else {
                refused(answer, Wanted::Invalid, &what)?;
            }
        }
    }
    Ok(())
}

pub(in crate::testing::conformance) fn other_key(run: &Run<'_>) -> Check {
    let caller = run.caller();
    let (sample, other) = (run.sample(&caller)?, run.sample(&caller)?);
    let answer = caller.unwrap(&other.cmk, &sample.context, &sample.wrapped)?;
    refused(answer, Wanted::Invalid, "unwrapping under another master key")?;
    caller.opens(&sample, "under its own master key afterwards")
}

pub(in crate::testing::conformance) fn damaged(run: &Run<'_>) -> Check {
    let caller = run.caller();
    let sample = run.sample(&caller)?;
    for (what, bytes) in damages(run, &sample.wrapped)? {
        let answer = caller.unwrap(&sample.cmk, &sample.context, &bytes)?;
        refused(answer, Wanted::Invalid, &format!("unwrapping {what}"))?;
    }
    caller.opens(&sample, "the intact key afterwards")
}

pub(in crate::testing::conformance) fn cmk_version(run: &Run<'_>) -> Check {
    let (caller, later) = (run.caller(), run.caller());
    let sample = run.sample(&caller)?;
    let version = caller.cmk_version(&sample.wrapped)?;
    if version.as_ref().is_some_and(String::is_empty) {
        return failed("the version of a master key is empty");
    }
    for (caller, what) in [(&caller, "asked again"), (&later, "in another instance")] {
        let again = caller.cmk_version(&sample.wrapped)?;
        if again != version {
            return failed(format!("the version is {version:?}, and {what} {again:?}"));
        }
    }
    total(run, &caller, &sample.wrapped)
}

/// `cmk_version` takes any bytes.
fn total(run: &Run<'_>, caller: &Caller<'_>, wrapped: &[u8]) -> Check {
    for len in 0..wrapped.len() {
        caller.cmk_version(&wrapped[..len])?;
    }
    for at in 0..wrapped.len() {
        for bit in 0..8 {
            let mut bytes = wrapped.to_vec();
            bytes[at] ^= 1 << bit;
            caller.cmk_version(&bytes)?;
        }
    }
    for (_, bytes) in damages(run, wrapped)? {
        caller.cmk_version(&bytes)?;
    }
    Ok(())
}

/// Bytes that are not this wrapped key, and descriptions of them.
fn damages(run: &Run<'_>, wrapped: &[u8]) -> Check<Vec<(String, Vec<u8>)>> {
    let mut all = vec![("no bytes".to_owned(), Vec::new())];
    // Both ends, and places evenly between them.
    let step = wrapped.len().div_ceil(PLACES_MAX).max(1);
    let last = wrapped.len().saturating_sub(1);
    for at in (0..wrapped.len()).step_by(step).chain([last]).filter(|&at| at < wrapped.len()) {
        let mut bytes = wrapped.to_vec();
        bytes[at] ^= 1 << (at % 8);
        all.push((format!("a wrapped key with a changed bit in byte {at}"), bytes));
    }
    for len in (0..wrapped.len()).step_by(step * 2).chain([last]) {
        all.push((format!("a wrapped key cut to {len} bytes"), wrapped[..len].to_vec()));
    }
    for extra in [1, 1024, 1024 * 1024] {
        let bytes = [wrapped, &vec![b'A'; extra]].concat();
        all.push((format!("a wrapped key with {extra} bytes behind it"), bytes));
    }
    all.push(("a wrapped key twice".to_owned(), [wrapped, wrapped].concat()));
    for len in [1, 7, 16, 32, 64, wrapped.len(), 1000, 100_000] {
        all.push((format!("{len} random bytes"), run.random(len)?));
        all.push((format!("{len} zeros"), vec![0; len]));
    }
    Ok(all)
}
