//! The list of Logstores, a page at a time, and the figures of the store.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use envelog::{
    Cmk, LogstoreName, LogstoreStatus,
    metrics::{LeaseMetrics, StoreMetrics},
};
use serde_json::{Value, json};

use super::{
    figures::{Figures, GroupLag, Known},
    open,
    snapshot::{Row, Snapshot},
};
use crate::{
    auth::{Caller, Right},
    call::Call,
    error::{ApiError, Result},
    response::Answer,
    service::Service,
};

/// The most Logstores in an answer.
const PAGE_MAX: u64 = 200;
const PAGE_DEFAULT: u64 = 50;
/// The longest filter, in bytes.
const FILTER_BYTES_MAX: usize = 256;

/// How a list is ordered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sort {
    Name,
    /// The state of the key, the worst first.
    State,
    Appends,
    Reads,
    Refusals,
}

/// The parameters of a call.
#[derive(Debug)]
struct Asked {
    /// A part of the name, in lower case: names have no other letters.
    filter: String,
    /// The state that the key must have.
    state: Option<String>,
    sort: Sort,
    descending: bool,
    offset: usize,
    size: usize,
}

impl Asked {
    fn parse(call: &Call) -> Result<Self> {
        let sort = match call.parameter("sort") {
            None | Some("name") => Sort::Name,
            Some("state") => Sort::State,
            Some("appends") => Sort::Appends,
            Some("reads") => Sort::Reads,
            Some("refusals") => Sort::Refusals,
            Some(_) => {
                let message = "sort must be name, state, appends, reads or refusals";
                return Err(ApiError::parameter(message));
            }
        };
        let filter = call.parameter("filter").unwrap_or_default();
        if filter.len() > FILTER_BYTES_MAX {
            return Err(ApiError::parameter("filter must have at most 256 bytes"));
        }
        let size = call.number("size", PAGE_DEFAULT, PAGE_MAX)?;
        let offset = call.number("offset", 0, u64::MAX)?;
        Ok(Self {
            filter: filter.to_lowercase(),
            state: call.parameter("state").map(str::to_owned),
            sort,
            descending: call.flag("descending")?,
            offset: usize::try_from(offset).unwrap_or(usize::MAX),
            size: size as usize,
        })
    }

    fn matches(&self, row: &Row) -> bool {
        let has_state = |state: &String| *state == row.key.state.name();
        self.state.as_ref().is_none_or(has_state)
            && (self.filter.is_empty() || row.name.to_string().contains(&self.filter))
    }

    /// Sorts rows that are in the order of their names, which stays that of equal rows.
    fn sort(&self, rows: &mut [&Row]) {
        let rate = |rate: Option<f64>| rate.unwrap_or(0.0) as u64;
        match self.sort {
            Sort::Name => {}
            Sort::State => rows.sort_by_key(|row| row.severity()),
            Sort::Appends => rows.sort_by_key(|row| (rate(row.append_rate), row.appended)),
            Sort::Reads => rows.sort_by_key(|row| (rate(row.read_rate), row.read)),
            Sort::Refusals => rows.sort_by_key(|row| row.refusals),
        }
        if self.descending {
            rows.reverse();
        }
    }
}

/// The sums over the Logstores that a caller may look at.
#[derive(Debug, Default)]
struct Sums {
    logstores: usize,
    states: BTreeMap<&'static str, u64>,
    append_rate: Option<f64>,
    read_rate: Option<f64>,
    refusals: u64,
}

impl Sums {
    fn add(&mut self, row: &Row) {
        let add = |sum: &mut Option<f64>, rate: Option<f64>| {
            if let Some(rate) = rate {
                *sum = Some(sum.unwrap_or(0.0) + rate);
            }
        };
        self.logstores += 1;
        *self.states.entry(row.key.state.name()).or_default() += 1;
        add(&mut self.append_rate, row.append_rate);
        add(&mut self.read_rate, row.read_rate);
        self.refusals += row.refusals;
    }

    fn json(&self) -> Value {
        json!({
            "logstores": self.logstores,
            "states": self.states,
            "append_rate": self.append_rate,
            "read_rate": self.read_rate,
            "refusals": self.refusals,
        })
    }
}

/// The rows that the caller may look at and that match, in order, and the sums over the first.
fn select<'a>(rows: &'a [Row], caller: &Caller, asked: &Asked) -> (Vec<&'a Row>, Sums) {
    let (mut found, mut sums) = (Vec::new(), Sums::default());
    // Rows of one project are side by side.
    let mut last: Option<(&str, bool)> = None;
    for row in rows {
        let project = row.name.project();
        let may = match last {
            Some((known, may)) if known == project => may,
            _ => caller.may(Right::Look, project),
        };
        last = Some((project, may));
        if may {
            sums.add(row);
            if asked.matches(row) {
                found.push(row);
            }
        }
    }
    asked.sort(&mut found);
    (found, sums)
}

/// `GET /console/api/overview`.
pub(super) async fn answer(service: &Arc<Service>, caller: &Caller, call: &Call) -> Result<Answer> {
    let asked = Asked::parse(call)?;
    let snapshot = service.console.snapshots.get(service).await?;
    let figures = &service.console.figures;
    if figures.len() > snapshot.rows.len() {
        figures.keep(|name| snapshot.row(name).is_some());
    }
    let (found, sums) = select(&snapshot.rows, caller, &asked);
    let page: Vec<&Row> = found.iter().skip(asked.offset).take(asked.size).copied().collect();
    let names: Vec<LogstoreName> = page.iter().map(|row| row.name.clone()).collect();
    let known = Figures::of(service, &names).await;
    let mut logstores = Vec::with_capacity(page.len());
    for (row, known) in page.iter().zip(&known) {
        logstores.push(row_json(service, caller, &snapshot, row, known.as_deref()).await);
    }
    Ok(Answer::json(&json!({
        "now_us": snapshot.time_us,
        "matching": found.len(),
        "offset": asked.offset,
        "logstores": logstores,
        "sums": sums.json(),
        "store": caller.may_everywhere(Right::Look).then(|| store_json(service, &snapshot.metrics)),
    })))
}

/// A Logstore of the list.
pub(super) async fn row_json(
    service: &Arc<Service>,
    caller: &Caller,
    snapshot: &Snapshot,
    row: &Row,
    known: Option<&Known>,
) -> Value {
    let status = known.and_then(|known| known.status.as_ref().ok());
    let id = open(service, &row.name).await.ok().map(|open| open.logstore.id());
    let age = lease_of(&snapshot.metrics, id, status).and_then(|lease| lease.age);
    let mut json = json!({
        "project": row.name.project(),
        "logstore": row.name.logstore(),
        "key": row.key,
        "lease_age_s": age.map(|age| age.as_secs_f64()),
        "appended": row.appended,
        "read": row.read,
        "append_rate": row.append_rate,
        "read_rate": row.read_rate,
        "refusals": row.refusals,
        "queued_bytes": row.queued_bytes,
        "figures": status.map(status_json),
        "fault": known.and_then(|known| known.status.as_ref().err()),
    });
    if let Some(known) = known
        && caller.may(Right::Read, row.name.project())
    {
        let most = known.groups.iter().filter_map(GroupLag::total).max();
        json["consumers"] = json!({ "groups": known.groups.len(), "lag": most });
    }
    json
}

/// The lease on which the key of a Logstore depends.
fn lease_of<'a>(
    metrics: &'a StoreMetrics,
    id: Option<envelog::ids::LogstoreId>,
    status: Option<&LogstoreStatus>,
) -> Option<&'a LeaseMetrics> {
    let own = metrics.leases.iter().find(|it| it.logstore.is_some() && it.logstore == id);
    let cmk: Option<&Cmk> = status.and_then(|status| status.cmk.as_ref());
    let shared = || {
        let shares = |it: &&LeaseMetrics| it.logstore.is_none() && Some(&it.cmk) == cmk;
        metrics.leases.iter().find(shares)
    };
    let of_service = || match status.map(|status| status.method) {
        Some("service_key") => metrics.service_lease.as_ref(),
        _ => None,
    };
    own.or_else(shared).or_else(of_service)
}

fn status_json(status: &LogstoreStatus) -> Value {
    json!({
        "method": status.method,
        "algorithm": status.algorithm,
        "encrypting": status.encrypting,
        "cmk": status.cmk,
        "segments": status.segments,
        "logs": status.logs,
        "raw": status.bytes_raw,
        "compressed": status.bytes_compressed,
        "stored": status.bytes_stored,
        // Its reason names files: the log of the service has it.
        "latched": status.latched.is_some(),
        "unreadable_segments": status.unreadable_segments,
        "losses": status.losses.len(),
    })
}

/// The figures of the whole store, for callers that may look at all projects.
fn store_json(service: &Service, metrics: &StoreMetrics) -> Value {
    let mean = |it: &envelog::metrics::LatencyMetrics| {
        (it.count > 0).then(|| Duration::from_micros(it.sum_us / it.count).as_secs_f64())
    };
    json!({
        "refusals": metrics.refusals,
        "kms": {
            "success": metrics.kms.success.count,
            "revoked": metrics.kms.revoked.count,
            "unreachable": metrics.kms.unreachable.count,
            "invalid": metrics.kms.invalid.count,
        },
        "append_mean_s": mean(&metrics.append_latency),
        "sync_mean_s": mean(&metrics.sync_latency),
        "pending_bytes": metrics.pending_bytes,
        "sync_failures": metrics.sync_failures,
        "writers_latched": metrics.writers_latched,
        "groups_lost": metrics.groups_lost,
        "audit_failures": metrics.audit_failures,
        "retention_suspended": metrics.retention_suspended,
        "reserve_short": metrics.reserve_short,
        "service": service.counters.json(),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    /// 10,000 Logstores in 100 projects, by name.
    fn rows() -> Vec<Row> {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let provider = envelog::crypto::AwsLc::new();
        let store =
            envelog::Store::builder(path("store"), path("keyring"), provider).create().unwrap();
        let spec = envelog::LogstoreSpec::default();
        let key = store.create_logstore(&"p/l".parse().unwrap(), spec).unwrap().key_status();
        let row = |index: u64| Row {
            name: format!("p-{:03}/l-{index:05}", index / 100).parse().unwrap(),
            key: key.clone(),
            appended: index,
            read: 0,
            refusals: u64::from(index == 4_321),
            queued_bytes: 0,
            append_rate: Some((index % 1_000) as f64),
            read_rate: None,
        };
        (0..10_000).map(row).collect()
    }

    fn asked(filter: &str, sort: Sort, descending: bool) -> Asked {
        let filter = filter.to_owned();
        Asked { filter, state: None, sort, descending, offset: 0, size: 50 }
    }

    #[test]
    fn ten_thousand_logstores_are_filtered_and_sorted() {
        let rows = rows();
        let names = |asked: &Asked| {
            let (found, sums) = select(&rows, &Caller::Local, asked);
            assert_eq!((sums.logstores, sums.refusals, sums.states["none"]), (10_000, 1, 10_000));
            found.iter().map(|row| row.name.to_string()).collect::<Vec<_>>()
        };
        let all = names(&asked("", Sort::Name, false));
        assert_eq!((all.len(), &*all[0], &*all[9_999]), (10_000, "p-000/l-00000", "p-099/l-09999"));
        assert_eq!(names(&asked("042/", Sort::Name, true))[0], "p-042/l-04299");
        assert_eq!(names(&asked("", Sort::Refusals, true))[0], "p-043/l-04321");
        // Equal rates: the one that has appended more.
        assert_eq!(names(&asked("", Sort::Appends, true))[..2], ["p-099/l-09999", "p-089/l-08999"]);
        let revoked = Asked { state: Some("revoked".to_owned()), ..asked("", Sort::Name, false) };
        assert!(names(&revoked).is_empty());
    }

    #[test]
    fn a_key_finds_its_projects_alone_and_their_sums() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.json");
        let keys = r#"{"keys": [{"id": "a", "secret": "s", "projects": ["p-00*", "p-042"],
                       "allow": ["write"]}]}"#;
        std::fs::write(&path, keys).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&path, mode).unwrap();
        let key = crate::auth::AccessKeys::load(&path).unwrap().find("a").unwrap();
        let rows = rows();
        let (found, sums) = select(&rows, &Caller::Key(key), &asked("", Sort::Name, false));
        assert_eq!((found.len(), sums.logstores, sums.refusals), (1_100, 1_100, 0));
        assert_eq!(found[1_000].name.to_string(), "p-042/l-04200");
    }
}
