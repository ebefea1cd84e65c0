//! One Logstore: its configuration, keys, shards and consumer groups.

use std::sync::Arc;

use envelog::{Logstore, LogstoreConfig};
use serde_json::{Value, json};

use super::{
    figures::{Figures, GroupLag},
    logstore_of, overview,
};
use crate::{
    auth::{Caller, Right},
    call::Call,
    error::{ApiError, Result},
    response::Answer,
    service::{self, Service},
};

/// `GET /console/api/logstore`.
pub(super) async fn answer(service: &Arc<Service>, caller: &Caller, call: &Call) -> Result<Answer> {
    let open = logstore_of(service, caller, call, Right::Look).await?;
    let name = open.logstore.name().clone();
    let snapshot = service.console.snapshots.get(service).await?;
    let Some(row) = snapshot.row(&name) else {
        // It was created or deleted this moment.
        return Err(ApiError::no_logstore(name.logstore()));
    };
    let known = Figures::of(service, std::slice::from_ref(&name)).await.pop().flatten();
    let mut json = overview::row_json(service, caller, &snapshot, row, known.as_deref()).await;
    json["now_us"] = json!(snapshot.time_us);
    json["config"] = config_json(&open.logstore.config());
    if let Some(status) = known.as_ref().and_then(|known| known.status.as_ref().ok()) {
        json["data_keys"] = json!(status.data_keys);
        json["recovered_bytes_dropped"] =
            json!(status.recovery.iter().map(|it| it.bytes_dropped).sum::<u64>());
    }
    let may_read = caller.may(Right::Read, name.project());
    let shared = Arc::clone(service);
    // Calls no KMS, so it needs none of the threads that may hang with one.
    let more = move || {
        let groups = match may_read {
            true => Some(groups_json(&GroupLag::of(&shared, &open.logstore)?)),
            false => None,
        };
        Ok((shards_json(&open.logstore)?, groups))
    };
    let (shards, groups) = service::run(more).await?;
    json["shards"] = shards;
    json["groups"] = json!(groups);
    Ok(Answer::json(&json))
}

fn config_json(config: &LogstoreConfig) -> Value {
    json!({
        "revision": config.revision,
        "ttl_days": config.ttl_days,
        "retention_bytes": config.retention_bytes,
        "compression": config.compression,
        "create_time": config.create_time,
        "last_modify_time": config.last_modify_time,
    })
}

fn shards_json(logstore: &Logstore) -> Result<Value> {
    let mut shards = Vec::new();
    for shard in &logstore.config().shards {
        shards.push(json!({
            "id": shard.id,
            "status": shard.status,
            "begin_key": shard.begin_key,
            "end_key": shard.end_key,
            "end_seq": logstore.end_seq(shard.id)?,
        }));
    }
    Ok(json!(shards))
}

fn groups_json(groups: &[GroupLag]) -> Value {
    let of_group = |group: &GroupLag| {
        let shards: Vec<Value> = (group.progress.shards.iter().zip(&group.behind))
            .map(|(shard, behind)| {
                json!({
                    "shard": shard.shard,
                    "owner": shard.owner,
                    "updated_us": shard.updated_us,
                    "lag": behind,
                })
            })
            .collect();
        json!({
            "name": group.progress.name,
            "timeout_s": group.progress.timeout_s,
            "order": group.progress.order,
            "consumers": group.progress.consumers,
            "lag": group.total(),
            "shards": shards,
        })
    };
    json!(groups.iter().map(of_group).collect::<Vec<_>>())
}
