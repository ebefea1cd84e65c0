//! The console: a page for operators, and the data that it shows.
//!
//! The page ([`page`]) is a few files without any data, so they need no signature. The data are
//! calls of the API below `/console/api/`: they are signed as all others, and the page computes
//! these signatures in the browser. There is no session, no cookie, and no call that changes
//! anything. Each call leaves out the projects that its caller's access key does not have.

mod audit;
mod detail;
mod figures;
mod overview;
mod page;
mod snapshot;
mod tail;

pub(crate) use page::{file, guard, owns};

use std::sync::Arc;

use envelog::LogstoreName;
use serde_json::json;

use self::{audit::Audit, figures::Figures, snapshot::Snapshots};
use crate::{
    auth::{Caller, Right},
    call::Call,
    error::{ApiError, Result},
    groups::now_us,
    response::Answer,
    service::{Open, Service},
};

/// What the console keeps between two calls, so that many viewers cost no more than one.
#[derive(Debug, Default)]
pub(crate) struct Console {
    snapshots: Snapshots,
    figures: Figures,
    audit: Audit,
}

/// A part of the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum View {
    Session,
    Overview,
    Logstore,
    Audit,
    Tail,
}

impl View {
    /// The view with this name in a path.
    pub(crate) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "session" => Self::Session,
            "overview" => Self::Overview,
            "logstore" => Self::Logstore,
            "audit" => Self::Audit,
            "tail" => Self::Tail,
            _ => return None,
        })
    }

    /// # Errors
    /// 401 if the caller may not see it, and those of reading the data.
    pub(crate) async fn answer(
        self,
        service: &Arc<Service>,
        caller: &Caller,
        call: &Call,
    ) -> Result<Answer> {
        match self {
            Self::Session => Ok(session(service, caller)),
            Self::Overview => overview::answer(service, caller, call).await,
            Self::Logstore => detail::answer(service, caller, call).await,
            Self::Audit => audit::answer(service, caller, call).await,
            Self::Tail => tail::answer(service, caller, call).await,
        }
    }
}

/// Who the caller is, and where.
fn session(service: &Service, caller: &Caller) -> Answer {
    let key = caller
        .key()
        .map(|key| json!({ "id": key.id(), "projects": key.projects(), "allow": key.allowed() }));
    Answer::json(&json!({
        "key": key,
        "everywhere": caller.may_everywhere(Right::Look),
        "audit": caller.may_everywhere(Right::Admin),
        "store": service.store.id().to_string(),
        "region": service.region,
        "version": env!("CARGO_PKG_VERSION"),
        "now_us": now_us(),
    }))
}

/// The Logstore that a call names, if the caller has the right in its project.
async fn logstore_of(
    service: &Arc<Service>,
    caller: &Caller,
    call: &Call,
    right: Right,
) -> Result<Open> {
    let (project, logstore) = (call.required("project")?, call.required("logstore")?);
    caller.require(right, project)?;
    service.logstore(project, logstore).await
}

/// The Logstore of a row.
async fn open(service: &Arc<Service>, name: &LogstoreName) -> Result<Open> {
    service.logstore(name.project(), name.logstore()).await
}

fn refuse_audit() -> ApiError {
    let message = "the audit log is that of the whole store: it takes an access key with the \
                   permission admin and the projects [\"*\"]";
    ApiError::unauthorized("Unauthorized", message)
}
