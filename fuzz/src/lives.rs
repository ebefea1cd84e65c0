//! Any life of a store, as encoded in the bytes, against the model of `tests/model.rs`.

use arbitrary::{Arbitrary, Result, Unstructured};
use envelog::Durability;

use crate::life::{LOGSTORES, SHARDS, Step, live};

/// The steps of a life: crashes, power losses, revocation and return of a customer's key, rotation,
/// retention, and reads of every kind.
pub fn model(data: &[u8]) {
    let mut source = Unstructured::new(data);
    let mut steps = Vec::new();
    while !source.is_empty() && steps.len() < 60 {
        let Ok(step) = step(&mut source) else { break };
        steps.push(step);
    }
    live(&steps);
}

fn step(u: &mut Unstructured<'_>) -> Result<Step> {
    let logstore = |u: &mut Unstructured<'_>| u.int_in_range(0..=LOGSTORES - 1);
    let place = |u: &mut Unstructured<'_>| {
        Ok::<_, arbitrary::Error>((u.int_in_range(0..=3)?, u.int_in_range(0..=39)?))
    };
    let limit = |u: &mut Unstructured<'_>| {
        Ok::<_, arbitrary::Error>(if bool::arbitrary(u)? {
            Some(u.int_in_range(0..=19u64)?)
        } else {
            None
        })
    };
    Ok(match u.int_in_range(0..=33u8)? {
        0 => Step::Create(logstore(u)?),
        1 => Step::Wait,
        2 => Step::Sync(logstore(u)?),
        3 | 4 => Step::Roll(logstore(u)?),
        5 => Step::RotateDataKey(logstore(u)?),
        6 => Step::Rewrap(logstore(u)?),
        7 => Step::RotateServiceKey,
        8 => Step::Toggle(logstore(u)?),
        9 => Step::Disable,
        10 => Step::Enable,
        11 => Step::RetainDays(logstore(u)?),
        12 => Step::RetainBytes(logstore(u)?, u.int_in_range(1..=20_000)?),
        13 => Step::Delete(logstore(u)?),
        14 => Step::Checkpoint,
        15 => Step::Verify,
        16 => Step::Advance(u.int_in_range(1..=200)?),
        17 => Step::Advance(u.int_in_range(30_000..=40_000)?),
        18 => Step::Advance(u.int_in_range(86_000_000..=90_000_000)?),
        19 => Step::Close,
        20 => Step::Kill,
        21 => Step::CutPower(None),
        22 => Step::CutPower(Some(u.arbitrary()?)),
        23..=25 => Step::Read {
            of: logstore(u)?,
            shard: u.int_in_range(0..=SHARDS + 1)?,
            from: place(u)?,
            to: if u.arbitrary()? { Some(place(u)?) } else { None },
            groups: limit(u)?,
            bytes: limit(u)?.map(|bytes| bytes * 300),
        },
        32 => Step::Split(logstore(u)?, u.int_in_range(0..=3)?, u.arbitrary()?),
        33 => Step::Merge(logstore(u)?, u.int_in_range(0..=3)?),
        _ => Step::Append {
            to: logstore(u)?,
            shard: u.int_in_range(0..=SHARDS + 1)?,
            durability: *u.choose(&[
                Durability::Buffered,
                Durability::Written,
                Durability::Synced,
            ])?,
            size: u.int_in_range(0..=3000)?,
            count: u.int_in_range(1..=4)?,
            ticket: u.arbitrary()?,
            group: u.arbitrary()?,
        },
    })
}
