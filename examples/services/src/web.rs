//! A log service with axum.
//!
//! | request | does |
//! |---|---|
//! | `POST /PROJECT/LOGSTORE` | appends the lines of the body as one log group; answers when it is synced |
//! | `GET /PROJECT/LOGSTORE?from=SEQ` | streams the lines from a group on, and then new ones as they come |
//!
//! No request has a thread of its own. Calls that may block go to [`spawn_blocking`]: here only the
//! first use of a Logstore and the beginning of a stream. An append does not block: the engine's
//! own threads call the KMS and write the files.

use std::{collections::HashMap, sync::Arc};

use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{Path, Query, State},
    http::{HeaderValue, StatusCode, header::RETRY_AFTER},
    response::{IntoResponse, Response},
    routing::post,
};
use envelog::{
    AppendOptions, Error, ErrorKind, Logstore, LogstoreName, Position, ReadOptions, Store,
};
use futures_util::StreamExt;
use serde_json::json;
use tokio::{sync::RwLock, task::spawn_blocking};

/// The service.
#[derive(Clone)]
struct Service {
    store: Store,
    /// The Logstores that were used before.
    open: Arc<RwLock<HashMap<LogstoreName, Logstore>>>,
}

impl Service {
    async fn logstore(&self, project: &str, logstore: &str) -> Result<Logstore, Refusal> {
        let name: LogstoreName = format!("{project}/{logstore}").parse().map_err(Error::from)?;
        if let Some(open) = self.open.read().await.get(&name) {
            return Ok(open.clone());
        }
        let store = self.store.clone();
        let opened = blocking(move || store.logstore(&name)).await?;
        self.open.write().await.insert(opened.name().clone(), opened.clone());
        Ok(opened)
    }
}

/// The routes of the service.
pub fn router(store: Store) -> Router {
    let service = Service { store, open: Arc::default() };
    Router::new().route("/{project}/{logstore}", post(append).get(read)).with_state(service)
}

async fn append(
    State(service): State<Service>,
    Path((project, logstore)): Path<(String, String)>,
    body: Bytes,
) -> Result<Response, Refusal> {
    let logstore = service.logstore(&project, &logstore).await?;
    let group = crate::group_of(&body, crate::now_s());
    let appended = logstore.append_async(&group, &AppendOptions::default()).await?;
    Ok(Json(json!({ "shard": appended.shard, "seq": appended.seq })).into_response())
}

async fn read(
    State(service): State<Service>,
    Path((project, logstore)): Path<(String, String)>,
    Query(query): Query<HashMap<String, String>>,
) -> Result<Response, Refusal> {
    let logstore = service.logstore(&project, &logstore).await?;
    let from = query.get("from").map_or(Ok(0), |from| from.parse());
    let from = from.map_err(|_| Error::InvalidArgument("from is not a number".to_owned()))?;
    let options = ReadOptions::default().from(Position::Seq(from));
    let follow = blocking(move || logstore.follow(0, &options)).await?;
    let lines =
        follow.into_stream().map(|record| Ok::<_, Error>(crate::lines_of(&record?.group()?)));
    Ok(Body::from_stream(lines).into_response())
}

/// Runs a call that may block in a thread that may.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> envelog::Result<T> + Send + 'static,
) -> Result<T, Refusal> {
    let done = spawn_blocking(call).await;
    Ok(done.map_err(|_| Error::Closed("the service"))??)
}

/// An error, as the client sees it.
struct Refusal(Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        // The kind says who has to act, so it decides whether the client shall try again.
        let (status, retry_after_s) = match self.0.kind() {
            ErrorKind::Invalid => (StatusCode::BAD_REQUEST, None),
            ErrorKind::NotFound => (StatusCode::NOT_FOUND, None),
            ErrorKind::Exists => (StatusCode::CONFLICT, None),
            ErrorKind::Busy => (StatusCode::TOO_MANY_REQUESTS, Some("1")),
            ErrorKind::Revoked => (StatusCode::FORBIDDEN, None),
            ErrorKind::KmsUnreachable => (StatusCode::SERVICE_UNAVAILABLE, Some("5")),
            ErrorKind::NoRoom => (StatusCode::INSUFFICIENT_STORAGE, None),
            ErrorKind::Unavailable | ErrorKind::Closed => {
                (StatusCode::SERVICE_UNAVAILABLE, Some("30"))
            }
            _ => (StatusCode::INTERNAL_SERVER_ERROR, None),
        };
        let body = json!({ "error": self.0 });
        let mut response = (status, Json(body)).into_response();
        if let Some(seconds) = retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static(seconds));
        }
        response
    }
}
