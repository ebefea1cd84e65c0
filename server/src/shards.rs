//! Shards: their JSON, splits and merges, and which of them there is something to read in.
//!
//! The engine keeps a shard that was split or merged for ever, since its number is not used again.
//! Clients see it until the time to live of its data is over and retention has dropped the data.

use envelog::{
    Error, Logstore, LogstoreConfig,
    admin::{ShardInfo, ShardStatus},
};
use serde_json::{Value, json};

use crate::{
    call::Call,
    error::{ApiError, Result},
    projects::now_s,
    put,
    response::Answer,
    service::Service,
};

const DAY_S: u64 = 24 * 3600;
/// The shards that a split makes. The real service makes more, if asked to.
const CHILDREN: u64 = 2;

/// The shards of a Logstore that clients see.
#[derive(Debug)]
pub(crate) struct Shards {
    config: LogstoreConfig,
    /// Those of the configuration that are not gone.
    ids: Vec<u32>,
}

impl Shards {
    /// Blocks for file I/O.
    ///
    /// # Errors
    /// The error of opening a segment of a read-only shard.
    pub(crate) fn of(logstore: &Logstore) -> Result<Self> {
        let config = logstore.config();
        let mut ids = Vec::with_capacity(config.shards.len());
        for shard in &config.shards {
            if !is_gone(logstore, &config, shard)? {
                ids.push(shard.id);
            }
        }
        Ok(Self { config, ids })
    }

    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The shards from which a shard was split or merged, and those from which these were, and so on.
    pub(crate) fn ancestors(&self, shard: u32) -> Vec<u32> {
        let mut found = Vec::new();
        let mut next = vec![shard];
        while let Some(shard) = next.pop() {
            let info = self.config.shards.get(shard as usize);
            for parent in info.into_iter().flat_map(|info| &info.parents) {
                if !found.contains(parent) {
                    found.push(*parent);
                    next.push(*parent);
                }
            }
        }
        found
    }

    pub(crate) fn parents(&self, shard: u32) -> &[u32] {
        self.config.shards.get(shard as usize).map_or(&[], |info| &info.parents)
    }

    pub(crate) fn is_read_only(&self, shard: u32) -> bool {
        let info = self.config.shards.get(shard as usize);
        info.is_some_and(|info| info.status == ShardStatus::ReadOnly)
    }
}

/// Whether retention has dropped all data of a read-only shard. One that never had data goes when
/// its data would.
fn is_gone(logstore: &Logstore, config: &LogstoreConfig, shard: &ShardInfo) -> Result<bool> {
    let Some(ttl_days) = config.ttl_days.filter(|_| shard.status == ShardStatus::ReadOnly) else {
        return Ok(false);
    };
    // It was read-only from that time on.
    let children = config.shards.iter().filter(|child| child.parents.contains(&shard.id));
    let since = children.map(|child| config.shard_create_time(child)).min();
    let is_over = since.is_some_and(|since| now_s() >= since + u64::from(ttl_days) * DAY_S);
    Ok(is_over && has_no_data(logstore, shard.id)?)
}

/// Whether a shard has no group. Blocks for file I/O.
///
/// # Errors
/// The error of opening its last segment.
pub(crate) fn has_no_data(logstore: &Logstore, shard: u32) -> Result<bool> {
    Ok(logstore.end_seq(shard)? <= logstore.first_seq(shard)?)
}

fn json_of(config: &LogstoreConfig, shard: &ShardInfo) -> Value {
    json!({
        "shardID": shard.id,
        "status": shard.status,
        "inclusiveBeginKey": shard.begin_key,
        "exclusiveEndKey": shard.end_key,
        "createTime": config.shard_create_time(shard),
    })
}

/// `GET /logstores/{logstore}/shards`. Blocks for file I/O.
pub(crate) fn list(logstore: &Logstore) -> Result<Answer> {
    let shards = Shards::of(logstore)?;
    let infos = shards.ids.iter().filter_map(|id| shards.config.shards.get(*id as usize));
    let all: Vec<Value> = infos.map(|shard| json_of(&shards.config, shard)).collect();
    Ok(Answer::json(&all))
}

/// `POST …/shards/{id}?action=split` and `…?action=merge`. Blocks for file I/O and KMS calls.
pub(crate) fn change(
    service: &Service,
    logstore: &Logstore,
    shard: &str,
    call: &Call,
) -> Result<Answer> {
    let invalid = || ApiError::parameter("invalid shard id");
    let shard: u32 = shard.parse().map_err(|_| invalid())?;
    let refused = |error| match error {
        Error::ShardMissing { .. } => invalid(),
        Error::TooMany { .. } => ApiError::parameter(error.to_string()),
        error => error.into(),
    };
    let (answered, children) = match call.required("action")? {
        "split" => {
            let split = service.store.split_shard(logstore.name(), shard, split_key(call)?);
            let split = split.map_err(refused)?;
            let children = vec![split.low.id, split.high.id];
            ([split.parent, split.low, split.high], children)
        }
        "merge" => {
            let merge = service.store.merge_shards(logstore.name(), shard).map_err(refused)?;
            let children = vec![merge.merged.id];
            ([merge.merged, merge.left, merge.right], children)
        }
        _ => return Err(ApiError::parameter("action must be split or merge")),
    };
    service.groups.add_shards(logstore, &children)?;
    let config = logstore.config();
    let all: Vec<Value> = answered.iter().map(|shard| json_of(&config, shard)).collect();
    Ok(Answer::json(&all))
}

/// The key of a split. `None` is the middle.
fn split_key(call: &Call) -> Result<Option<u128>> {
    if call.number("shardCount", CHILDREN, u64::MAX)? != CHILDREN {
        return Err(ApiError::parameter("shardCount must be 2"));
    }
    match call.parameter("key") {
        None => Ok(None),
        Some(key) => put::hash_key(key).map(Some),
    }
}
