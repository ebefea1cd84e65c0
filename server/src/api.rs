//! The calls of the API: which request is which, the permission that it needs, and its function.

use std::sync::Arc;

use bytes::Bytes;
use hyper::Method;
use serde_json::Value;

use crate::{
    admin,
    auth::{Caller, Right, Use},
    call::Call,
    console::View,
    cursors::{self, shard_of},
    encryption,
    error::{ApiError, Result},
    groups, logstores, pull,
    put::{self, Head},
    query,
    response::Answer,
    service::{self, Service},
    shards,
};

/// The longest body of a call that writes no logs, in bytes.
const JSON_BYTES_MAX: usize = 64 << 10;

/// A body that needs no more memory than this, in bytes, is decompressed and checked in well under
/// a millisecond.
const SMALL_BYTES_MAX: usize = 128 << 10;

/// The calls.
#[derive(Debug)]
enum Action {
    Administer,
    CreateProject,
    ListProjects,
    GetProject,
    UpdateProject,
    DeleteProject,
    CreateLogstore,
    ListLogstores,
    GetLogstore(String),
    UpdateLogstore(String),
    UpdateEncryption(String),
    DeleteLogstore(String),
    ListShards(String),
    ChangeShard(String, String),
    Put(String, Head),
    Cursor(String, String),
    CursorTime(String, String),
    Pull(String, String),
    Groups(String, Option<String>),
    GetLogs(String),
    GetLogsOfQuery(String),
    Histograms(String),
    Console(View),
}

/// A call that its caller may do, before its body is read.
#[derive(Debug)]
pub(crate) struct Plan {
    action: Action,
    /// The project of the call. Empty for those that need none.
    project: String,
}

impl Plan {
    /// # Errors
    /// 400 if the service has no such call, and 401 if the caller may not do it.
    pub(crate) fn of(call: &Call, caller: &Caller) -> Result<Self> {
        let (action, right) = action_of(call)?;
        if matches!(action, Action::Administer) {
            // Its Logstore is in the body.
            admin::check_caller(caller)?;
            return Ok(Self { action, project: String::new() });
        }
        if matches!(action, Action::CreateProject | Action::ListProjects | Action::Console(_)) {
            // Their projects are not in the host: they check the right themselves.
            return Ok(Self { action, project: String::new() });
        }
        let project = call.project.clone();
        let project = project.ok_or_else(|| {
            ApiError::parameter("the host names no project: it must be PROJECT.ENDPOINT")
        })?;
        caller.require(right, &project)?;
        Ok(Self { action, project })
    }

    /// What the limits of an access key count it as.
    pub(crate) fn counts_as(&self) -> Use {
        if let Action::Put(..) = self.action { Use::Write } else { Use::Other }
    }

    /// The longest body that the call may have, in bytes.
    pub(crate) fn body_max(&self) -> usize {
        match &self.action {
            Action::Put(_, head) => head.body_max(),
            Action::Administer => admin::BODY_BYTES_MAX,
            _ => JSON_BYTES_MAX,
        }
    }

    /// The memory that the call takes for a body of `len` bytes.
    pub(crate) fn memory(&self, len: usize) -> usize {
        match &self.action {
            Action::Put(_, head) => head.memory(len),
            _ => len,
        }
    }

    /// Does the call. `check` compares the body with its signed digest, and comes first.
    ///
    /// # Errors
    /// As the service has them.
    pub(crate) async fn run(
        self,
        service: &Arc<Service>,
        caller: &Caller,
        call: Call,
        body: Bytes,
        check: impl FnOnce(&[u8]) -> Result<()> + Send + 'static,
    ) -> Result<Answer> {
        if let Action::Put(logstore, head) = self.action {
            let open = service.logstore(&self.project, &logstore).await?;
            let is_small = head.memory(body.len()) <= SMALL_BYTES_MAX;
            let prepare = move || {
                check(&body)?;
                head.payload(body).map(|payload| (head, payload))
            };
            // A thread for a small body would cost more than the work.
            let (head, payload) = if is_small { prepare()? } else { service::run(prepare).await? };
            return put::put(&open, &head, payload).await;
        }
        check(&body)?;
        match self.action {
            Action::Administer => admin::begin(service, caller, &call, &body).await,
            Action::CreateProject => logstores::create_project(service, caller, &body).await,
            Action::ListProjects => logstores::list_projects(service, caller, &call),
            Action::Console(view) => view.answer(service, caller, &call).await,
            Action::GetProject | Action::UpdateProject | Action::DeleteProject => {
                self.run_project(service, body).await
            }
            Action::CreateLogstore => {
                logstores::create(service, caller, &self.project, &body).await
            }
            Action::ListLogstores => {
                let (service, project) = (Arc::clone(service), self.project);
                service::run(move || logstores::list(&service, &project, &call)).await
            }
            _ => self.run_logstore(service, caller, call, body).await,
        }
    }

    async fn run_project(self, service: &Arc<Service>, body: Bytes) -> Result<Answer> {
        let (service, name) = (Arc::clone(service), self.project);
        let project = service.projects.get(&name)?;
        match self.action {
            Action::UpdateProject => {
                let fields = logstores::json_object(&body)?;
                let description = fields.get("description").and_then(Value::as_str);
                let missing = || ApiError::parameter("description must be text");
                let description = description.ok_or_else(missing)?.to_owned();
                service::run(move || service.projects.describe(&name, &description)).await?;
            }
            Action::DeleteProject => {
                service::run(move || service.projects.delete(&name, &service.store)).await?;
            }
            _ => return Ok(Answer::json(&project.json(&name, &service.region))),
        }
        Ok(Answer::empty())
    }

    async fn run_logstore(
        self,
        service: &Arc<Service>,
        caller: &Caller,
        call: Call,
        body: Bytes,
    ) -> Result<Answer> {
        let open = service.logstore(&self.project, self.action.logstore()).await?;
        let (service, caller) = (Arc::clone(service), caller.clone());
        match self.action {
            Action::GetLogstore(_) => Ok(logstores::get(&service, &open.logstore)),
            Action::ListShards(_) => open.run(shards::list).await,
            Action::ChangeShard(_, shard) => {
                open.run(move |it| shards::change(&service, it, &shard, &call)).await
            }
            Action::UpdateLogstore(_) => {
                let sent = logstores::Sent::parse(&body)?;
                open.run(move |it| logstores::update(&service, &caller, it, sent)).await
            }
            Action::UpdateEncryption(_) => {
                open.run(move |it| encryption::update(&service, &caller, it, &body)).await
            }
            Action::DeleteLogstore(_) => open.run(move |it| logstores::delete(&service, it)).await,
            Action::Cursor(_, shard) => {
                let shard = shard_of(&open.logstore, &shard)?;
                open.run(move |it| cursors::get(it, shard, &call)).await
            }
            Action::CursorTime(_, shard) => {
                let shard = shard_of(&open.logstore, &shard)?;
                open.run(move |it| cursors::time(it, shard, &call)).await
            }
            Action::Pull(_, shard) => {
                let shard = shard_of(&open.logstore, &shard)?;
                pull::pull(&service, &open, shard, &call).await
            }
            Action::Groups(_, group) => {
                let group = group.as_deref().map(str::to_owned);
                open.run(move |it| groups::route(&service, it, &call, group.as_deref(), &body))
                    .await
            }
            action => {
                let memory = service.memory.take(query::MEMORY).await?;
                let answer = open.run(move |it| match action {
                    Action::GetLogs(_) => query::logs_of_body(it, &call, &body),
                    Action::GetLogsOfQuery(_) => query::logs_of_query(it, &call),
                    _ => query::histograms(it, &call),
                });
                Ok(answer.await?.holding(memory))
            }
        }
    }
}

impl Action {
    /// The name of the Logstore that it is about.
    fn logstore(&self) -> &str {
        match self {
            Self::GetLogstore(name)
            | Self::UpdateLogstore(name)
            | Self::UpdateEncryption(name)
            | Self::DeleteLogstore(name)
            | Self::ListShards(name)
            | Self::ChangeShard(name, _)
            | Self::Put(name, _)
            | Self::Cursor(name, _)
            | Self::CursorTime(name, _)
            | Self::Pull(name, _)
            | Self::Groups(name, _)
            | Self::GetLogs(name)
            | Self::GetLogsOfQuery(name)
            | Self::Histograms(name) => name,
            _ => "",
        }
    }
}

/// The call that a request is, and the right that it takes.
fn action_of(call: &Call) -> Result<(Action, Right)> {
    let segments: Vec<&str> = call.segments.iter().map(String::as_str).collect();
    let kind = call.parameter("type").unwrap_or_default();
    Ok(match (call.method.as_str(), &segments[..]) {
        ("POST", []) => (Action::CreateProject, Right::Admin),
        ("GET", []) if call.project.is_none() => (Action::ListProjects, Right::Look),
        ("GET", []) => (Action::GetProject, Right::Look),
        ("PUT", []) => (Action::UpdateProject, Right::Admin),
        ("DELETE", []) => (Action::DeleteProject, Right::Admin),
        ("POST", ["admin"]) if call.project.is_none() => (Action::Administer, Right::Admin),
        ("POST", ["logstores"]) => (Action::CreateLogstore, Right::Admin),
        ("GET", ["logstores"]) => (Action::ListLogstores, Right::Look),
        ("GET", ["console", "api", view]) => {
            (Action::Console(View::named(view).ok_or_else(|| unknown(call))?), Right::Look)
        }
        (method, ["logstores", name]) => of_logstore(call, method, name, kind)?,
        (method, ["logstores", name, rest @ ..]) => below_logstore(call, method, name, rest, kind)?,
        _ => return Err(unknown(call)),
    })
}

fn of_logstore(call: &Call, method: &str, name: &str, kind: &str) -> Result<(Action, Right)> {
    let name = name.to_owned();
    Ok(match (method, kind) {
        ("GET", "log") => (Action::GetLogsOfQuery(name), Right::Read),
        ("GET", "histogram") => (Action::Histograms(name), Right::Read),
        ("GET", "") => (Action::GetLogstore(name), Right::Look),
        ("PUT", _) => (Action::UpdateLogstore(name), Right::Admin),
        ("DELETE", _) => (Action::DeleteLogstore(name), Right::Admin),
        ("POST", _) => (Action::Put(name, Head::parse(call, false)?), Right::Write),
        _ => return Err(unknown(call)),
    })
}

fn below_logstore(
    call: &Call,
    method: &str,
    name: &str,
    rest: &[&str],
    kind: &str,
) -> Result<(Action, Right)> {
    let name = name.to_owned();
    Ok(match (method, rest) {
        ("PUT", ["encryption"]) => (Action::UpdateEncryption(name), Right::Admin),
        ("GET", ["shards"]) => (Action::ListShards(name), Right::Look),
        ("POST", ["shards", "lb"]) => (Action::Put(name, Head::parse(call, false)?), Right::Write),
        ("POST", ["shards", "route"]) => {
            (Action::Put(name, Head::parse(call, true)?), Right::Write)
        }
        ("GET", ["shards", shard]) => match kind {
            "cursor" => (Action::Cursor(name, (*shard).to_owned()), Right::Read),
            "cursor_time" => (Action::CursorTime(name, (*shard).to_owned()), Right::Read),
            "log" | "logs" => (Action::Pull(name, (*shard).to_owned()), Right::Read),
            _ => return Err(unknown(call)),
        },
        ("POST", ["shards", shard]) => {
            (Action::ChangeShard(name, (*shard).to_owned()), Right::Admin)
        }
        ("DELETE", ["shards", _]) => return Err(ApiError::unsupported("deleting shards")),
        ("POST", ["logs"]) => (Action::GetLogs(name), Right::Read),
        ("GET" | "POST", ["consumergroups"]) => (Action::Groups(name, None), Right::Read),
        (_, ["consumergroups", group]) => {
            (Action::Groups(name, Some((*group).to_owned())), Right::Read)
        }
        _ => return Err(unknown(call)),
    })
}

fn unknown(call: &Call) -> ApiError {
    let method = match call.method {
        Method::GET | Method::POST | Method::PUT | Method::DELETE => call.method.as_str(),
        _ => "this method",
    };
    let path: String = call.path.escape_default().take(200).collect();
    ApiError::unsupported(format!("{method} {path}"))
}
