//! The calls on consumer groups.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use base64::{Engine, engine::general_purpose::STANDARD};
use envelog::Logstore;
use hyper::{Method, StatusCode};
use serde_json::{Map, Value, json};

use super::{
    CHECKPOINT_BYTES_MAX, Checkpoint, Document, Group, now_us,
    readable::{self, Readable},
    timeout_of,
};
use crate::{
    call::Call,
    cursors::{Cursors, shard_of},
    error::{ApiError, Result},
    logstores::{json_object, text},
    names,
    response::Answer,
    service::Service,
    shards::Shards,
};

/// The longest timeout of a group, in seconds.
const TIMEOUT_S_MAX: f64 = 86_400.0;
const TIMEOUT_S_DEFAULT: f64 = 60.0;
/// The most consumers of a group. More than one a shard have nothing to do.
const CONSUMERS_MAX: usize = 1024;

/// Does a call below `/logstores/{logstore}/consumergroups`. Blocks for file I/O.
///
/// # Errors
/// As the service has them.
pub(crate) fn route(
    service: &Service,
    logstore: &Logstore,
    call: &Call,
    group: Option<&str>,
    body: &[u8],
) -> Result<Answer> {
    let id = logstore.id().to_string();
    let Some(name) = group else {
        return match call.method {
            Method::GET => Ok(list(service, &id)),
            Method::POST => create(service, &id, body),
            _ => Err(ApiError::unsupported("this call on consumer groups")),
        };
    };
    let found = || service.groups.get(&id, name);
    match (&call.method, call.parameter("type")) {
        (&Method::GET, _) => checkpoints(service, &*found()?, logstore, call),
        (&Method::PUT, _) => update(&*found()?, body),
        (&Method::DELETE, _) => service.groups.delete(&id, name).map(|()| Answer::empty()),
        (&Method::POST, Some("heartbeat")) => heartbeat(service, &*found()?, logstore, call, body),
        (&Method::POST, Some("checkpoint")) => {
            set_checkpoint(service, &found()?, logstore, call, body)
        }
        _ => Err(ApiError::unsupported("this call on a consumer group")),
    }
}

fn list(service: &Service, id: &str) -> Answer {
    let groups: Vec<Value> = (service.groups.list(id).iter())
        .map(|group| {
            let document = group.document();
            // A whole number of seconds is an integer to clients.
            let timeout = match document.timeout_s {
                seconds if seconds.fract() == 0.0 => json!(seconds as u64),
                seconds => json!(seconds),
            };
            json!({ "name": document.name, "timeout": timeout, "order": document.order })
        })
        .collect();
    Answer::json(&groups)
}

/// The timeout and the order in a body, where they are given.
fn settings(fields: &Map<String, Value>) -> Result<(Option<f64>, Option<bool>)> {
    let timeout = match fields.get("timeout") {
        None | Some(Value::Null) => None,
        Some(value) => {
            let seconds = value.as_f64().filter(|it| *it > 0.0 && *it <= TIMEOUT_S_MAX);
            Some(seconds.ok_or_else(|| invalid("timeout must be 1 to 86400 seconds"))?)
        }
    };
    let order = match fields.get("order") {
        None | Some(Value::Null) => None,
        Some(value) => Some(value.as_bool().ok_or_else(|| invalid("order must be true or false"))?),
    };
    Ok((timeout, order))
}

fn invalid(message: &str) -> ApiError {
    ApiError::bad("JsonInfoInvalid", message)
}

fn create(service: &Service, id: &str, body: &[u8]) -> Result<Answer> {
    let fields = json_object(body)?;
    let name = text(&fields, "consumerGroup").ok().flatten();
    let name = name.ok_or_else(|| invalid("consumerGroup must be a name"))?;
    names::check_consumer("consumerGroup", &name)?;
    let (timeout, order) = settings(&fields)?;
    let document = Document {
        name,
        timeout_s: timeout.unwrap_or(TIMEOUT_S_DEFAULT),
        order: order.unwrap_or(false),
        checkpoints: Default::default(),
    };
    service.groups.create(id, document)?;
    Ok(Answer::empty())
}

fn update(group: &Group, body: &[u8]) -> Result<Answer> {
    let (timeout, order) = settings(&json_object(body)?)?;
    let now = group.document();
    // Each start of a consumer sends its settings.
    let is_same =
        timeout.is_none_or(|it| it == now.timeout_s) && order.is_none_or(|it| it == now.order);
    if !is_same {
        group.change(|document| {
            document.timeout_s = timeout.unwrap_or(document.timeout_s);
            document.order = order.unwrap_or(document.order);
        })?;
    }
    Ok(Answer::empty())
}

fn heartbeat(
    service: &Service,
    group: &Group,
    logstore: &Logstore,
    call: &Call,
    body: &[u8],
) -> Result<Answer> {
    let consumer = call.required("consumer")?;
    names::check_consumer("consumer", consumer)?;
    let held: BTreeSet<u32> =
        serde_json::from_slice(body).map_err(|_| invalid("the body must be a list of shards"))?;
    let document = group.document();
    let readable = Readable::of(logstore, &document)?;
    let (now, timeout) = (service.groups.now(), timeout_of(&document));
    let mut assignment = group.assignment();
    if !assignment.is_consumer(consumer) && assignment.consumers() >= CONSUMERS_MAX {
        return Err(ApiError::parameter(format!("the group has {CONSUMERS_MAX} consumers")));
    }
    match assignment.heartbeat(now, timeout, consumer, &held, &readable) {
        // Always a list: without one the Python client asks again at once, and for ever.
        Ok(assigned) => Ok(Answer::json(&assigned)),
        Err(assign_error) => {
            let super::assign::Unknown = assign_error;
            let message = format!("consumer {consumer} is not known: report no shards to join");
            Err(ApiError::bad("NotExistConsumerWithBody", message))
        }
    }
}

fn checkpoints(
    service: &Service,
    group: &Group,
    logstore: &Logstore,
    call: &Call,
) -> Result<Answer> {
    let (all, cursors) = (Shards::of(logstore)?, Cursors::of(&logstore.config()));
    let wanted = match call.parameter("shard") {
        None => None,
        Some(text) => {
            Some(text.parse::<u32>().map_err(|_| ApiError::parameter("invalid shard id"))?)
        }
    };
    let document = group.document();
    let (now, timeout): (Duration, Duration) = (service.groups.now(), timeout_of(&document));
    let mut assignment = group.assignment();
    assignment.expire(now, timeout);
    // Each shard has an entry: clients wait for the one of a shard that they own.
    let entries: Vec<Value> = (all.ids().iter())
        .filter(|shard| wanted.is_none_or(|wanted| wanted == **shard))
        .map(|shard| {
            let checkpoint = document.checkpoints.get(shard);
            let cursor = match checkpoint {
                Some(checkpoint) => checkpoint.cursor.clone(),
                None => readable::begin(&all, *shard, &document, cursors),
            };
            json!({
                "shard": shard,
                "checkpoint": cursor,
                "updateTime": checkpoint.map_or(0, |it| it.updated_us),
                "consumer": assignment.owner(*shard).unwrap_or_default(),
            })
        })
        .collect();
    Ok(Answer::json(&entries))
}

fn set_checkpoint(
    service: &Service,
    group: &Arc<Group>,
    logstore: &Logstore,
    call: &Call,
    body: &[u8],
) -> Result<Answer> {
    let fields = json_object(body)?;
    let shard = fields.get("shard").and_then(Value::as_u64);
    let shard = shard.ok_or_else(|| invalid("shard must be a number"))?;
    let shard = shard_of(logstore, &shard.to_string())
        .map_err(|error| ApiError { status: StatusCode::NOT_FOUND, ..error })?;
    let cursor = text(&fields, "checkpoint").ok().flatten();
    let cursor =
        cursor.filter(|it| it.len() <= CHECKPOINT_BYTES_MAX && STANDARD.decode(it).is_ok());
    let cursor = cursor.ok_or_else(|| {
        ApiError::bad("InvalidShardCheckPoint", "the checkpoint is not base64 text")
    })?;
    if !call.flag("forceSuccess")? {
        require_owner(service, group, shard, call.parameter("consumer").unwrap_or_default())?;
    }
    group.change(|document| {
        document.checkpoints.insert(shard, Checkpoint { cursor, updated_us: now_us() });
    })?;
    Ok(Answer::empty())
}

/// # Errors
/// 400 if the consumer does not own the shard.
fn require_owner(service: &Service, group: &Group, shard: u32, consumer: &str) -> Result<()> {
    let mut assignment = group.assignment();
    assignment.expire(service.groups.now(), timeout_of(&group.document()));
    if assignment.owner(shard) == Some(consumer) {
        return Ok(());
    }
    // Clients look for these codes, misspelled as they are.
    let code = match assignment.is_consumer(consumer) {
        true => "ConsumerNotMatch",
        false => "ConsumerNotExsit",
    };
    Err(ApiError::bad(code, format!("consumer {consumer} does not own shard {shard}")))
}
