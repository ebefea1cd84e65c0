//! GetLogs and GetHistograms, by a scan.

mod expression;
mod needle;
mod scan;

use std::ops::Range;

use envelog::{
    LogGroup, Logstore,
    group::{Content, Log},
};
use serde_json::{Map, Value, json};

use self::{
    expression::Expression,
    scan::{First, Place, Progress, Search, fetch},
};
use crate::{
    call::Call,
    compression::{Form, HEADER, RAW_SIZE},
    cursors::shard_of,
    error::{ApiError, Result},
    logstores::json_object,
    response::{Answer, Chunks},
};

/// The most logs in an answer.
const LINES_MAX: u64 = 100;
const LINES_DEFAULT: u64 = 100;
/// How far into the logs that match a page may reach.
const PAGED_MAX: u64 = 10_000;
/// An answer ends behind the log that makes it this long, in bytes of logs.
const ANSWER_BYTES: usize = 10 << 20;
/// The memory that a call is accounted for: its answer, and the block that it reads.
pub(crate) const MEMORY: usize = 16 << 20;
/// The most parts of a histogram.
const PARTS: u64 = 60;

/// The parameters of a call, from its query or its body.
struct Parameters(Map<String, Value>);

impl Parameters {
    fn of_query(call: &Call) -> Self {
        let pair = |(name, value): &(String, String)| (name.clone(), json!(value));
        Self(call.query.iter().filter(|(_, value)| !value.is_empty()).map(pair).collect())
    }

    fn text(&self, name: &str) -> Result<Option<&str>> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(ApiError::parameter(format!("{name} must be text"))),
        }
    }

    fn number(&self, name: &str) -> Result<Option<u64>> {
        let wrong = || ApiError::parameter(format!("{name} must be a number"));
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => text.parse().map(Some).map_err(|_| wrong()),
            Some(value) => value.as_u64().map(Some).ok_or_else(wrong),
        }
    }

    fn flag(&self, name: &str) -> Result<bool> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
            Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
            Some(_) => Err(ApiError::parameter(format!("{name} must be true or false"))),
        }
    }

    fn times(&self) -> Result<Range<u64>> {
        let missing = |name| ApiError::parameter(format!("{name} is missing"));
        let from = self.number("from")?.ok_or_else(|| missing("from"))?;
        let to = self.number("to")?.ok_or_else(|| missing("to"))?;
        if from > to {
            return Err(ApiError::parameter("from is behind to"));
        }
        Ok(from..to)
    }

    fn search(&self) -> Result<Search> {
        if self.flag("powerSql")? || self.0.contains_key("session") {
            return Err(ApiError::unsupported("SQL"));
        }
        Ok(Search {
            times: self.times()?,
            topic: self.text("topic")?.filter(|topic| !topic.is_empty()).map(str::to_owned),
            expression: Expression::parse(self.text("query")?.unwrap_or_default())?,
            shard: None,
        })
    }
}

/// The logs of a page.
struct Page {
    logs: Vec<Value>,
    progress: Progress,
}

fn page(logstore: &Logstore, parameters: &Parameters) -> Result<Page> {
    let search = parameters.search()?;
    // The name differs between clients.
    let lines = parameters.number("line")?.or(parameters.number("lines")?);
    let lines = lines.unwrap_or(LINES_DEFAULT);
    let offset = parameters.number("offset")?.unwrap_or(0);
    if lines > LINES_MAX || offset > PAGED_MAX {
        return Err(ApiError::parameter(format!(
            "line must be up to {LINES_MAX}, and offset up to {PAGED_MAX}: narrow the times"
        )));
    }
    let mut first = First::new((offset + lines) as usize, parameters.flag("reverse")?);
    let mut progress = search.run(logstore, |place, _, _| first.add(place))?;
    let (mut logs, mut bytes) = (Vec::new(), 0);
    for place in first.skip(offset as usize) {
        if bytes > ANSWER_BYTES {
            progress = Progress::Incomplete;
            break;
        }
        if let Some((group, log)) = fetch(logstore, place)? {
            bytes += log.contents.iter().map(|it| it.key.len() + it.value.len()).sum::<usize>();
            logs.push(log_json(&group, &log));
        }
    }
    Ok(Page { logs, progress })
}

/// A log as text. Bytes that are not UTF-8 are replaced.
fn log_json(group: &LogGroup, log: &Log) -> Value {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let mut fields = Map::new();
    for Content { key, value } in &log.contents {
        fields.insert(text(key), json!(text(value)));
    }
    for tag in &group.log_tags {
        fields.insert(format!("__tag__:{}", text(&tag.key)), json!(text(&tag.value)));
    }
    let optional = |bytes: &Option<bytes::Bytes>| text(bytes.as_deref().unwrap_or_default());
    fields.insert("__topic__".to_owned(), json!(optional(&group.topic)));
    fields.insert("__source__".to_owned(), json!(optional(&group.source)));
    fields.insert("__time__".to_owned(), json!(log.time.to_string()));
    if let Some(ns) = log.time_ns {
        fields.insert("__time_ns_part__".to_owned(), json!(ns.to_string()));
    }
    Value::Object(fields)
}

/// `POST /logstores/{logstore}/logs`. Blocks for file I/O and KMS calls.
pub(crate) fn logs_of_body(logstore: &Logstore, call: &Call, body: &[u8]) -> Result<Answer> {
    let Page { logs, progress } = page(logstore, &Parameters(json_object(body)?))?;
    let meta = json!({ "progress": progress.name(), "count": logs.len(), "hasSQL": false });
    let text = json!({ "meta": meta, "data": logs }).to_string();
    let answer = match Form::of_accept(call.header("accept-encoding")) {
        None => Answer::of(Chunks::new([text.into()]), "application/json"),
        Some(form) => {
            let body = form.compress(text.as_bytes())?;
            Answer::of(Chunks::new([body]), "application/json")
                .with(HEADER, form.name())
                .with(RAW_SIZE, text.len())
        }
    };
    Ok(with_progress(answer, progress))
}

/// `GET /logstores/{logstore}?type=log`. Blocks for file I/O and KMS calls.
pub(crate) fn logs_of_query(logstore: &Logstore, call: &Call) -> Result<Answer> {
    let Page { logs, progress } = page(logstore, &Parameters::of_query(call))?;
    let answer = Answer::json(&logs).with("x-log-count", logs.len());
    Ok(with_progress(answer, progress))
}

/// `GET /logstores/{logstore}?type=histogram`. Blocks for file I/O and KMS calls.
pub(crate) fn histograms(logstore: &Logstore, call: &Call) -> Result<Answer> {
    let mut search = Parameters::of_query(call).search()?;
    search.shard = call.parameter("shard").map(|shard| shard_of(logstore, shard)).transpose()?;
    let Range { start, end } = search.times;
    let part = (end - start).div_ceil(PARTS).max(1);
    let mut counts = vec![0_u64; (end - start).div_ceil(part) as usize];
    let progress = search.run(logstore, |_: Place, _, log| {
        counts[((u64::from(log.time) - start) / part) as usize] += 1;
    })?;
    let parts: Vec<Value> = (counts.iter().zip(0..))
        .map(|(count, index)| {
            let from = start + part * index;
            let to = from.saturating_add(part).min(end);
            json!({ "from": from, "to": to, "count": count, "progress": progress.name() })
        })
        .collect();
    let answer = Answer::json(&parts).with("x-log-count", counts.iter().sum::<u64>());
    Ok(with_progress(answer, progress))
}

fn with_progress(answer: Answer, progress: Progress) -> Answer {
    answer.with("x-log-progress", progress.name())
}
