//! The key audit log, for callers that may administer the whole store.

use std::{sync::Arc, time::Instant};

use envelog::audit::AuditRecord;
use serde_json::json;
use tokio::sync::Mutex;

use super::refuse_audit;
use crate::{
    auth::{Caller, Right},
    call::Call,
    error::Result,
    groups::now_us,
    response::Answer,
    service::{self, Service},
};

/// The newest records that can be shown. The command line exports all of them.
const RECORDS_MAX: usize = 5_000;
/// Records are kept this many times as long as it takes to read and verify the log.
const REST: u32 = 50;
const PAGE_MAX: u64 = 200;
const PAGE_DEFAULT: u64 = 100;

/// The records, the newest first, as they were when the store had written so many.
#[derive(Debug)]
struct Records {
    written: u64,
    read_us: u64,
    /// Not read again before.
    due: Instant,
    /// The number of records in the log.
    total: u64,
    newest: Vec<AuditRecord>,
    /// The fault of the log, if it is not as it was written.
    fault: Option<String>,
}

impl Records {
    /// Reads and verifies the whole log. Blocks for file I/O.
    fn read(service: &Service, written: u64) -> Self {
        let (began, read_us) = (Instant::now(), now_us());
        let mut read =
            Self { written, read_us, due: began, total: 0, newest: Vec::new(), fault: None };
        match service.store.keys().audit_records() {
            Ok(records) => {
                read.total = records.len() as u64;
                read.newest = records.into_iter().rev().take(RECORDS_MAX).collect();
            }
            Err(error) => {
                tracing::error!(%error, "the key audit log cannot be read");
                read.fault = Some(error.code().to_owned());
            }
        }
        read.due = Instant::now() + began.elapsed() * REST;
        read
    }
}

/// The records that were read last.
#[derive(Debug, Default)]
pub(super) struct Audit(Mutex<Option<Arc<Records>>>);

impl Audit {
    /// The records. Reads them again if there are more.
    async fn get(&self, service: &Arc<Service>) -> Result<Arc<Records>> {
        let mut last = self.0.lock().await;
        let written = service.console.snapshots.get(service).await?.metrics.audit_records;
        let is_current = |it: &&Arc<Records>| {
            (it.written == written && it.fault.is_none()) || Instant::now() < it.due
        };
        if let Some(last) = last.as_ref().filter(is_current) {
            return Ok(Arc::clone(last));
        }
        let service = Arc::clone(service);
        let new = Arc::new(service::run(move || Ok(Records::read(&service, written))).await?);
        *last = Some(Arc::clone(&new));
        Ok(new)
    }
}

/// `GET /console/api/audit`.
pub(super) async fn answer(service: &Arc<Service>, caller: &Caller, call: &Call) -> Result<Answer> {
    if !caller.may_everywhere(Right::Admin) {
        return Err(refuse_audit());
    }
    let size = call.number("size", PAGE_DEFAULT, PAGE_MAX)? as usize;
    let offset = usize::try_from(call.number("offset", 0, u64::MAX)?).unwrap_or(usize::MAX);
    let filter = call.parameter("filter").unwrap_or_default().to_lowercase();
    let records = service.console.audit.get(service).await?;
    let texts = |record: &AuditRecord| {
        let event = json!(record.event);
        let logstore = record.logstore.as_ref().map(ToString::to_string).unwrap_or_default();
        format!("{} {logstore} {}", event.as_str().unwrap_or_default(), record.detail)
    };
    let matches =
        |record: &&AuditRecord| filter.is_empty() || texts(record).to_lowercase().contains(&filter);
    let found: Vec<&AuditRecord> = records.newest.iter().filter(matches).collect();
    let page: Vec<&AuditRecord> = found.iter().skip(offset).take(size).copied().collect();
    Ok(Answer::json(&json!({
        "total": records.total,
        "searched": records.newest.len(),
        "matching": found.len(),
        "offset": offset,
        "verified_us": records.read_us,
        "fault": records.fault,
        "records": page,
    })))
}
