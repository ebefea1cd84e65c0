//! Logstores: their JSON, and the calls that create, change, list and delete them.

use std::sync::Arc;

use envelog::{
    EncryptConf, Error, Logstore, LogstoreConfig, LogstoreName, LogstoreSpec, admin::ShardStatus,
};
use serde_json::{Map, Value, json};

use crate::{
    auth::Caller,
    call::Call,
    error::{ApiError, Result},
    names,
    response::Answer,
    service::{self, Service},
};

/// The time to live that means for ever, in days.
const TTL_FOR_EVER: u64 = 3650;
const TTL_DEFAULT: u64 = 30;
const SHARDS_DEFAULT: u64 = 2;
const MAX_SPLIT_SHARD: &str = "maxSplitShard";
/// The most names in an answer.
const LIST_MAX: u64 = 500;
/// How often an update is merged again after another update has changed the Logstore.
const UPDATE_TRIES: usize = 4;

/// The fields that the engine has, or that the service makes up.
const OWN_FIELDS: [&str; 8] = [
    "logstoreName",
    "projectName",
    "ttl",
    "shardCount",
    "encrypt_conf",
    "createTime",
    "lastModifyTime",
    "revision",
];
const BOOLEANS: [&str; 3] = ["enable_tracking", "autoSplit", "appendMeta"];
const NUMBERS: [&str; 3] = [MAX_SPLIT_SHARD, "hot_ttl", "infrequentAccessTTL"];
const TEXTS: [&str; 2] = ["telemetryType", "mode"];

/// The JSON of a Logstore, as a client sent it.
#[derive(Debug)]
pub(crate) struct Sent {
    name: Option<String>,
    ttl_days: Option<u64>,
    shard_count: Option<u64>,
    encrypt_conf: Option<EncryptConf>,
    revision: Option<u64>,
    /// All other fields.
    fields: Map<String, Value>,
}

impl Sent {
    /// # Errors
    /// 400 that names the field.
    pub(crate) fn parse(body: &[u8]) -> Result<Self> {
        let mut fields = json_object(body)?;
        // Clients write a field that is not set as null.
        fields.retain(|_, value| !value.is_null());
        let sent = Self {
            name: text(&fields, "logstoreName")?,
            ttl_days: number(&fields, "ttl")?,
            shard_count: number(&fields, "shardCount")?,
            revision: number(&fields, "revision")?,
            encrypt_conf: fields.get("encrypt_conf").map(encrypt_conf).transpose()?,
            fields: Map::new(),
        };
        fields.retain(|name, _| !OWN_FIELDS.contains(&&**name));
        check_fields(&fields)?;
        Ok(Self { fields, ..sent })
    }

    /// An update of the encryption alone.
    ///
    /// # Errors
    /// As [`Sent::parse`].
    pub(crate) fn of_encryption(conf: &Value, revision: Option<u64>) -> Result<Self> {
        Ok(Self {
            name: None,
            ttl_days: None,
            shard_count: None,
            encrypt_conf: Some(encrypt_conf(conf)?),
            revision,
            fields: Map::new(),
        })
    }

    /// # Errors
    /// 400 if the time to live is out of range.
    fn ttl(&self) -> Result<Option<Option<u32>>> {
        match self.ttl_days {
            None => Ok(None),
            Some(TTL_FOR_EVER) => Ok(Some(None)),
            Some(days @ 1..TTL_FOR_EVER) => Ok(Some(u32::try_from(days).ok())),
            Some(days) => Err(ApiError::bad(
                "LogStoreInfoInvalid",
                format!("ttl is {days}, it must be 1 to 3650, and 3650 is for ever"),
            )),
        }
    }

    /// # Errors
    /// 401 if the configuration names a role that the caller may not pass and `now` does not.
    fn check_role(&self, caller: &Caller, now: Option<&EncryptConf>) -> Result<()> {
        let new = self.encrypt_conf.as_ref().and_then(|conf| conf.user_cmk_info.as_ref());
        let old = now.and_then(|conf| conf.user_cmk_info.as_ref());
        match new {
            Some(cmk) if new != old => caller.require_role(&cmk.arn),
            _ => Ok(()),
        }
    }
}

/// # Errors
/// 400 if the body is not one JSON object.
pub(crate) fn json_object(body: &[u8]) -> Result<Map<String, Value>> {
    serde_json::from_slice(body)
        .map_err(|error| ApiError::bad("PostBodyInvalid", format!("the body is not JSON: {error}")))
}

pub(crate) fn text(fields: &Map<String, Value>, name: &str) -> Result<Option<String>> {
    let not_text = || invalid(name, "text");
    let text = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(not_text);
    fields.get(name).map(text).transpose()
}

fn number(fields: &Map<String, Value>, name: &str) -> Result<Option<u64>> {
    fields
        .get(name)
        .map(|value| value.as_u64().ok_or_else(|| invalid(name, "a number")))
        .transpose()
}

fn invalid(name: &str, expected: &str) -> ApiError {
    ApiError::bad("LogStoreInfoInvalid", format!("{name} must be {expected}"))
}

/// The type of each field that clients rely on.
fn check_fields(fields: &Map<String, Value>) -> Result<()> {
    for (name, value) in fields {
        let name = &**name;
        let expected = match name {
            _ if BOOLEANS.contains(&name) && !value.is_boolean() => "true or false",
            _ if NUMBERS.contains(&name) && !value.is_i64() => "a number",
            _ if TEXTS.contains(&name) && !value.is_string() => "text",
            MAX_SPLIT_SHARD if !value.as_u64().is_some_and(|it| (1..=256).contains(&it)) => {
                "within range [1, 256]"
            }
            _ => continue,
        };
        return Err(invalid(name, expected));
    }
    Ok(())
}

/// # Errors
/// 400, if a type of encryption is missing or unknown with the message of the service.
fn encrypt_conf(value: &Value) -> Result<EncryptConf> {
    if !value.is_object() || value.get("user_cmk_info").is_some_and(Value::is_array) {
        return Err(invalid("encrypt_conf", "a JSON object, and user_cmk_info in it, too"));
    }
    let kind = value.get("encrypt_type").and_then(Value::as_str);
    let enable = value.get("enable").and_then(Value::as_bool);
    if kind.is_some_and(|kind| !matches!(kind, "default" | "sm4"))
        || (enable == Some(true) && kind.is_none())
    {
        let message = "The encrypt_conf is invalid, [encrypt_type] key is missing or not supported";
        return Err(ApiError::bad("LogStoreInfoInvalid", message));
    }
    Ok(EncryptConf::from_json(&value.to_string())?)
}

/// The number of shards that can be written.
fn shard_count(config: &LogstoreConfig) -> u64 {
    let writable = config.shards.iter().filter(|shard| shard.status == ShardStatus::ReadWrite);
    writable.count() as u64
}

/// The JSON of a Logstore. It has each field that some client requires.
fn json_of(config: &LogstoreConfig, fields: Map<String, Value>) -> Value {
    let mut all = json!({
        "enable_tracking": false,
        "autoSplit": false,
        "maxSplitShard": 64,
        "appendMeta": false,
        "telemetryType": "",
        "mode": "standard",
    });
    let Some(map) = all.as_object_mut() else { return all };
    map.extend(fields);
    map.insert("logstoreName".to_owned(), json!(config.name.logstore()));
    map.insert("ttl".to_owned(), json!(config.ttl_days.map_or(TTL_FOR_EVER, u64::from)));
    map.insert("shardCount".to_owned(), json!(shard_count(config)));
    map.insert("createTime".to_owned(), json!(config.create_time));
    map.insert("lastModifyTime".to_owned(), json!(config.last_modify_time));
    map.insert("revision".to_owned(), json!(config.revision));
    if let Some(conf) = &config.encrypt_conf {
        map.insert("encrypt_conf".to_owned(), json!(conf));
    }
    all
}

/// `POST /logstores`.
pub(crate) async fn create(
    service: &Arc<Service>,
    caller: &Caller,
    project: &str,
    body: &[u8],
) -> Result<Answer> {
    let sent = Sent::parse(body)?;
    let name = sent.name.as_deref();
    let name = name.ok_or_else(|| invalid("logstoreName", "given"))?;
    names::check_logstore(name)?;
    let name = LogstoreName::new(project, name)?;
    sent.check_role(caller, None)?;
    let shards = sent.shard_count.unwrap_or(SHARDS_DEFAULT);
    let shards = u32::try_from(shards).map_err(|_| invalid("shardCount", "1 to 256"))?;
    let mut spec = LogstoreSpec::default().shard_count(shards);
    spec.ttl_days = sent.ttl()?.unwrap_or(Some(TTL_DEFAULT as u32));
    spec.encrypt_conf = sent.encrypt_conf;
    let service = Arc::clone(service);
    service::run(move || {
        service.projects.get(name.project())?;
        let logstore = service.store.create_logstore(&name, spec)?;
        let id = logstore.id().to_string();
        service.projects.keep_fields(&name, &id, sent.fields).inspect_err(|_| {
            // The project was deleted at the same time, or the disk is full: nothing was created.
            let deleted = service.store.delete_logstore(&name);
            let failed =
                |error| tracing::error!(%error, logstore = %name, "cannot be deleted again");
            let _ = deleted.map_err(failed);
        })
    })
    .await?;
    Ok(Answer::empty())
}

/// `GET /logstores/{logstore}`.
pub(crate) fn get(service: &Service, logstore: &Logstore) -> Answer {
    let fields = service.projects.fields(logstore.name(), &logstore.id().to_string());
    Answer::json(&json_of(&logstore.config(), fields))
}

/// `PUT /logstores/{logstore}`: merges the sent fields into the current configuration.
///
/// Blocks for file I/O and KMS calls.
pub(crate) fn update(
    service: &Service,
    caller: &Caller,
    logstore: &Logstore,
    sent: Sent,
) -> Result<Answer> {
    let ttl = sent.ttl()?;
    if sent.name.as_deref().is_some_and(|name| name != logstore.name().logstore()) {
        return Err(ApiError::parameter("logstoreName cannot be changed"));
    }
    sent.check_role(caller, logstore.config().encrypt_conf.as_ref())?;
    for tries in 1.. {
        let mut config = logstore.config();
        if sent.shard_count.is_some_and(|count| count != shard_count(&config)) {
            return Err(ApiError::parameter("shardCount cannot be changed by an update"));
        }
        config.encrypt_conf = sent.encrypt_conf.clone();
        config.ttl_days = ttl.unwrap_or(config.ttl_days);
        config.revision = sent.revision.unwrap_or(config.revision);
        match service.store.update_logstore(logstore.name(), config) {
            Err(Error::Config(envelog::error::ConfigError::RevisionOutdated { .. }))
                if sent.revision.is_none() && tries < UPDATE_TRIES => {}
            updated => {
                updated?;
                break;
            }
        }
    }
    let id = logstore.id().to_string();
    service.projects.keep_fields(logstore.name(), &id, sent.fields)?;
    Ok(Answer::empty())
}

/// `DELETE /logstores/{logstore}`. Blocks for file I/O.
pub(crate) fn delete(service: &Service, logstore: &Logstore) -> Result<Answer> {
    let name = logstore.name();
    let report = service.store.delete_logstore(name)?;
    for left in report.left {
        tracing::warn!(logstore = %name, left = %left.display(), "a deleted Logstore left a file");
    }
    service.open.forget(name);
    service.groups.forget(&logstore.id().to_string())?;
    service.projects.forget_fields(name)?;
    Ok(Answer::empty())
}

/// `GET /logstores`. Blocks for file I/O.
pub(crate) fn list(service: &Service, project: &str, call: &Call) -> Result<Answer> {
    let kept = service.projects.get(project)?;
    let matches = |name: &LogstoreName| {
        let field = |field: &str, default: &str| {
            let fields = kept.logstores.get(name.logstore()).map(|kept| &kept.fields);
            let value = fields.and_then(|fields| fields.get(field)).and_then(Value::as_str);
            call.parameter(field).is_none_or(|wanted| wanted == value.unwrap_or(default))
        };
        let pattern = call.parameter("logstoreName").unwrap_or_default();
        name.logstore().contains(pattern) && field("telemetryType", "") && field("mode", "standard")
    };
    let names = service.store.list()?;
    let served = |name: &&LogstoreName| name.project() == project && names::is_served(name);
    let found: Vec<&str> = (names.iter().filter(served))
        .filter(|name| matches(name))
        .map(LogstoreName::logstore)
        .collect();
    let page = page(call, &found)?;
    Ok(Answer::json(&json!({ "count": page.len(), "total": found.len(), "logstores": page })))
}

/// The part of a list that a call asks for with `offset` and `size`.
pub(crate) fn page<'a, T>(call: &Call, all: &'a [T]) -> Result<&'a [T]> {
    let offset = call.number("offset", 0, u64::MAX)?;
    let size = call.number("size", LIST_MAX, LIST_MAX)?;
    let begin = usize::try_from(offset).unwrap_or(usize::MAX).min(all.len());
    let end = begin.saturating_add(size as usize).min(all.len());
    Ok(&all[begin..end])
}

/// `POST /`: creates a project. Its name is in the body, since clients differ in the host.
pub(crate) async fn create_project(
    service: &Arc<Service>,
    caller: &Caller,
    body: &[u8],
) -> Result<Answer> {
    let fields = json_object(body)?;
    let name = text(&fields, "projectName")?;
    let name = name.ok_or_else(|| ApiError::parameter("projectName is missing"))?;
    names::check_project(&name)?;
    caller.require(crate::auth::Right::Admin, &name)?;
    let description = text(&fields, "description")?.unwrap_or_default();
    let group = text(&fields, "resourceGroupId")?.unwrap_or_default();
    let service = Arc::clone(service);
    service::run(move || service.projects.create(&name, &description, &group)).await?;
    Ok(Answer::empty())
}

/// `GET /` of no project: lists those that the caller may look at.
pub(crate) fn list_projects(service: &Service, caller: &Caller, call: &Call) -> Result<Answer> {
    let group = call.parameter("resourceGroupId");
    let pattern = call.parameter("projectName").unwrap_or_default();
    let mut all = service.projects.list();
    all.retain(|(name, project)| {
        caller.may(crate::auth::Right::Look, name)
            && name.contains(pattern)
            && group.is_none_or(|group| group == project.resource_group_id)
    });
    let page: Vec<Value> =
        page(call, &all)?.iter().map(|(name, it)| it.json(name, &service.region)).collect();
    Ok(Answer::json(&json!({ "count": page.len(), "total": all.len(), "projects": page })))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn refused(body: &str) -> ApiError {
        Sent::parse(body.as_bytes()).and_then(|sent| sent.ttl().map(|_| ())).unwrap_err()
    }

    #[test]
    fn a_body_is_taken_apart() {
        let sent = Sent::parse(
            br#"{"logstoreName": "l", "ttl": 3650, "shardCount": 2, "autoSplit": true, "x": [1],
                 "mode": null, "encrypt_conf": {"enable": false, "user_cmk_info": null}}"#,
        )
        .unwrap();
        assert_eq!((sent.ttl().unwrap(), sent.shard_count), (Some(None), Some(2)));
        assert_eq!(json!(sent.fields), json!({ "autoSplit": true, "x": [1] }));
        assert!(!sent.encrypt_conf.unwrap().enable);
    }

    #[test]
    fn each_fault_has_its_code() {
        for (body, code, word) in [
            ("[]", "PostBodyInvalid", "JSON"),
            ("{", "PostBodyInvalid", "JSON"),
            (r#"{"ttl": 0}"#, "LogStoreInfoInvalid", "ttl"),
            (r#"{"ttl": "1"}"#, "LogStoreInfoInvalid", "ttl"),
            (r#"{"ttl": 3651}"#, "LogStoreInfoInvalid", "3650"),
            (r#"{"autoSplit": 1}"#, "LogStoreInfoInvalid", "autoSplit"),
            (
                r#"{"maxSplitShard": 257}"#,
                "LogStoreInfoInvalid",
                "maxSplitShard must be within range [1, 256]",
            ),
            (
                r#"{"encrypt_conf": {"enable": true}}"#,
                "LogStoreInfoInvalid",
                "[encrypt_type] key is missing or not supported",
            ),
            (
                r#"{"encrypt_conf": {"enable": true, "encrypt_type": "rot13"}}"#,
                "LogStoreInfoInvalid",
                "not supported",
            ),
            (r#"{"encrypt_conf": {"enable": false, "x": 1}}"#, "LogStoreInfoInvalid", "`x`"),
            (
                r#"{"encrypt_conf": {"enable": true, "encrypt_type": "sm4", "user_cmk_info": {}}}"#,
                "LogStoreInfoInvalid",
                "cmk_key_id",
            ),
        ] {
            let refusal = refused(body);
            assert!(refusal.code == code && refusal.message.contains(word), "{body}: {refusal:?}");
        }
    }

    #[test]
    fn an_answer_has_every_field_that_a_client_requires() {
        let now = crate::projects::now_s();
        let config = LogstoreConfig::from_json(
            &json!({
                "name": "p/l", "revision": 3, "shard_count": 1, "compression": "lz4",
                "create_time": now, "last_modify_time": now,
                "shards": [{ "id": 0, "status": "readwrite", "begin_key": "0".repeat(32),
                             "end_key": "f".repeat(32) }],
            })
            .to_string(),
        )
        .unwrap();
        let fields = json!({ "autoSplit": true, "own": "x" }).as_object().unwrap().clone();
        let json = json_of(&config, fields);
        assert_eq!(
            (&json["ttl"], &json["autoSplit"], &json["own"]),
            (&json!(3650), &json!(true), &json!("x"))
        );
        for field in [
            "enable_tracking",
            "maxSplitShard",
            "appendMeta",
            "telemetryType",
            "mode",
            "createTime",
        ] {
            assert!(!json[field].is_null(), "{field}");
        }
        assert!(json.get("encrypt_conf").is_none());
    }
}
