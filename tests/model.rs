//! Random histories of a store, compared with a simple model.
//!
//! `PROPTEST_CASES` sets the number of histories. A failing one is shortened, printed, and recorded
//! with its seed in `tests/model.regressions`. Later runs start with the recorded ones.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "model/life.rs"]
mod life;

use envelog::Durability;
use life::{LOGSTORES, SHARDS, Step, live};
use proptest::{prelude::*, test_runner::FileFailurePersistence};

fn step() -> impl Strategy<Value = Step> {
    let durability = prop_oneof![
        Just(Durability::Buffered),
        Just(Durability::Written),
        Just(Durability::Synced)
    ];
    let append = (
        0..LOGSTORES,
        0..SHARDS + 2,
        durability,
        0..3000usize,
        1..5usize,
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(|(to, shard, durability, size, count, ticket, group)| Step::Append {
            to,
            shard,
            durability,
            size,
            count,
            ticket,
            group,
        });
    let place = || (0..4u8, 0..40usize);
    let limit = || prop::option::of(0..20u64);
    let read = (0..LOGSTORES, 0..SHARDS + 4, place(), prop::option::of(place()), limit(), limit())
        .prop_map(|(of, shard, from, to, groups, bytes)| Step::Read {
            of,
            shard,
            from,
            to,
            groups,
            bytes: bytes.map(|bytes| bytes * 300),
        });
    let logstore = || 0..LOGSTORES;
    prop_oneof![
        3 => logstore().prop_map(Step::Create),
        14 => append,
        2 => Just(Step::Wait),
        1 => logstore().prop_map(Step::Sync),
        2 => logstore().prop_map(Step::Roll),
        1 => logstore().prop_map(Step::RotateDataKey),
        1 => logstore().prop_map(Step::Rewrap),
        1 => Just(Step::RotateServiceKey),
        2 => (logstore(), 0..4u32, any::<u128>()).prop_map(|(of, shard, key)| Step::Split(of, shard, key)),
        1 => (logstore(), 0..4u32).prop_map(|(of, shard)| Step::Merge(of, shard)),
        2 => logstore().prop_map(Step::Toggle),
        1 => Just(Step::Disable),
        2 => Just(Step::Enable),
        1 => logstore().prop_map(Step::RetainDays),
        1 => (logstore(), 1..20_000u64).prop_map(|(of, bytes)| Step::RetainBytes(of, bytes)),
        1 => logstore().prop_map(Step::Delete),
        1 => Just(Step::Checkpoint),
        1 => Just(Step::Verify),
        2 => prop_oneof![1..200u64, 900..1200u64, 30_000..40_000u64, 86_000_000..90_000_000u64].prop_map(Step::Advance),
        4 => read,
        2 => Just(Step::Close),
        2 => Just(Step::Kill),
        2 => prop::option::of(any::<u64>()).prop_map(Step::CutPower),
    ]
}

fn config() -> ProptestConfig {
    let mut config = ProptestConfig::default();
    if std::env::var_os("PROPTEST_CASES").is_none() {
        config.cases = 160;
    }
    config.max_shrink_iters = 2000;
    config.failure_persistence = Some(Box::new(FileFailurePersistence::WithSource("regressions")));
    config
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn any_life_of_a_store_is_as_the_model_says(steps in prop::collection::vec(step(), 1..60)) {
        live(&steps);
    }
}
