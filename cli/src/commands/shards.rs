//! `shards`, `split`, `merge`.

use envelog::{
    LogstoreConfig,
    admin::{ShardInfo, ShardStatus},
};
use serde::Serialize;

use crate::{
    args::{MergeArgs, NameArgs, SplitArgs},
    exit::{Failure, Result},
    output,
    setup::{Setup, name},
};

/// The answer of `shards`.
#[derive(Serialize)]
struct Listed {
    shards: Vec<ShardInfo>,
}

pub(crate) fn list(setup: &Setup, args: &NameArgs) -> Result {
    let store = setup.open_read_only()?;
    let config = store.logstore(&name(&args.name)?)?.config();
    if setup.json {
        return output::json(&Listed { shards: config.shards });
    }
    for shard in &config.shards {
        output::line(described(&config, shard))?;
    }
    Ok(())
}

/// A shard on one line.
fn described(config: &LogstoreConfig, shard: &ShardInfo) -> String {
    let ShardInfo { id, begin_key, end_key, parents, .. } = shard;
    let mut line = format!("shard {id}  {begin_key} to {end_key}  ");
    line += match shard.status {
        ShardStatus::ReadOnly => "readonly",
        _ => "readwrite",
    };
    for (word, shards) in [("from", parents), ("now", &config.children(*id))] {
        let numbers: Vec<String> = shards.iter().map(u32::to_string).collect();
        if !numbers.is_empty() {
            line += &format!("  {word} {}", numbers.join(", "));
        }
    }
    line
}

pub(crate) fn split(setup: &Setup, args: &SplitArgs) -> Result {
    let name = name(&args.name)?;
    let at = args.key.as_deref().map(hash_key).transpose()?;
    let store = setup.open()?;
    let split = store.split_shard(&name, args.shard, at)?;
    setup.close(store)?;
    if setup.json {
        return output::json(&split);
    }
    let (low, high) = (split.low.id, split.high.id);
    output::line(format_args!(
        "split shard {} of {name} at {}: shard {low} takes the lower keys, shard {high} the others",
        args.shard, split.high.begin_key
    ))
}

pub(crate) fn merge(setup: &Setup, args: &MergeArgs) -> Result {
    let name = name(&args.name)?;
    let store = setup.open()?;
    let merge = store.merge_shards(&name, args.shard)?;
    setup.close(store)?;
    if setup.json {
        return output::json(&merge);
    }
    let (left, right) = (merge.left.id, merge.right.id);
    let merged = merge.merged.id;
    output::line(format_args!("merged shards {left} and {right} of {name} into shard {merged}"))
}

/// A hash key of 32 hexadecimal digits.
fn hash_key(text: &str) -> Result<u128> {
    let is_key = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let key = u128::from_str_radix(text, 16).ok().filter(|_| is_key);
    key.ok_or_else(|| Failure::usage(format!("--key {text}: give 32 hexadecimal digits")))
}
