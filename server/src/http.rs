//! From an HTTP request to its answer: head, signature, permission, body, call.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::{Method, Request, Response, StatusCode, body::Incoming, header::CONTENT_LENGTH};
use rand::{TryRng, rngs::SysRng};
use tokio::time::timeout;

use crate::{
    api::Plan,
    auth::authenticate,
    call::{self, Call},
    console,
    error::{ApiError, Result},
    memory::Memory,
    metrics,
    put::too_large,
    response::{Answer, Chunks},
    service::{self, Service},
};

/// How long a body may take to come.
const BODY_TIME_MAX: Duration = Duration::from_secs(120);
/// How long a client may go without sending a part of its body.
const BODY_STALL_MAX: Duration = Duration::from_secs(20);
/// The bytes of a refused request's body that are read, so that its client sees the refusal and not
/// a broken connection.
const DRAIN_BYTES_MAX: usize = 16 << 20;
const DRAIN_TIME_MAX: Duration = Duration::from_secs(5);

/// Answers a request.
pub(crate) async fn handle(
    service: Arc<Service>,
    peer: SocketAddr,
    request: Request<Incoming>,
) -> std::result::Result<Response<Chunks>, Infallible> {
    let id = request_id();
    // The HTTP library keeps room for this future as long as a connection is open, idle ones
    // included: the large ones are boxed.
    let host = call::host(request.headers(), request.uri());
    if request.method() == Method::GET
        && let Some(answer) = Box::pin(operation(&service, peer, host, request.uri().path())).await
    {
        return Ok(answer.into_response(&id));
    }
    let of_console = console::owns(request.uri().path());
    let answer = match Box::pin(answer(&service, request)).await {
        Ok(answer) => answer,
        Err(error) => {
            tracing::info!(id, code = error.code, status = error.status.as_u16(), "refused");
            service.counters.refused(error.status);
            error.answer()
        }
    };
    service.counters.answered();
    let answer = if of_console { console::guard(answer) } else { answer };
    Ok(answer.into_response(&id))
}

/// 24 upper-case hexadecimal digits.
fn request_id() -> String {
    let mut id = [0; 12];
    // Without randomness from the system, an id is all zeros: calls need it for nothing.
    let _ = SysRng.try_fill_bytes(&mut id);
    id.iter().map(|byte| format!("{byte:02X}")).collect()
}

/// Answers the requests of operators and their tools, which have no signature.
async fn operation(
    service: &Arc<Service>,
    peer: SocketAddr,
    host: &str,
    path: &str,
) -> Option<Answer> {
    Some(match path {
        "/healthz" => Answer::text(StatusCode::OK, "ok\n"),
        "/readyz" if *service.stopping.borrow() => {
            Answer::text(StatusCode::SERVICE_UNAVAILABLE, "stopping\n")
        }
        "/readyz" => Answer::text(StatusCode::OK, "ready\n"),
        // A browser on this machine may have been led here by a name of another site. As a call, the
        // request is refused for its host.
        _ if call::project_of(host, &service.base_host).is_err() => return None,
        // Metrics name every Logstore.
        "/metrics" if !peer.ip().to_canonical().is_loopback() => {
            Answer::text(StatusCode::FORBIDDEN, "metrics are for this machine alone\n")
        }
        "/metrics" => {
            let shared = Arc::clone(service);
            let text = service::run(move || Ok(metrics::text(&shared))).await;
            text.map_or_else(|error| error.answer(), metrics::answer)
        }
        path => return console::file(path, service.keys.is_some()),
    })
}

async fn answer(service: &Arc<Service>, request: Request<Incoming>) -> Result<Answer> {
    let (parts, mut body) = request.into_parts();
    let head = (|| {
        let call = Call::new(parts, &service.base_host)?;
        let (caller, digest) = authenticate(&call, service.keys.as_ref(), SystemTime::now())?;
        let plan = Plan::of(&call, &caller)?;
        caller.spend(plan.counts_as(), Instant::now()).inspect_err(|_| {
            service.counters.limited();
        })?;
        Ok((call, caller, digest, plan))
    })();
    let read = match head {
        Err(refusal) => Err(refusal),
        Ok((call, caller, digest, plan)) => match read_body(service, &call, &plan, &mut body).await
        {
            Err(refusal) => Err(refusal),
            Ok(read) => Ok((call, caller, digest, plan, read)),
        },
    };
    let (call, caller, digest, plan, (bytes, _memory)) = match read {
        Ok(read) => read,
        Err(refusal) => {
            drain(&mut body).await;
            return Err(refusal);
        }
    };
    caller.owe(bytes.len() as u64, Instant::now());
    let answer = plan.run(service, &caller, call, bytes, move |body| digest.check(body)).await?;
    caller.owe(answer.body.left(), Instant::now());
    Ok(answer)
}

/// Reads a body into memory that is accounted for.
async fn read_body(
    service: &Service,
    call: &Call,
    plan: &Plan,
    body: &mut Incoming,
) -> Result<(Bytes, Option<Memory>)> {
    let max = plan.body_max();
    let announced: Option<usize> = match call.header(CONTENT_LENGTH.as_str()) {
        // The HTTP library has checked that it is a number. One that is too long for this machine
        // is too long.
        Some(text) => Some(text.parse().unwrap_or(usize::MAX)),
        None if hyper::body::Body::is_end_stream(body) => Some(0),
        None => None,
    };
    let len = announced.unwrap_or(max);
    if len > max {
        return Err(too_large(call, CONTENT_LENGTH.as_str(), max));
    }
    if len == 0 {
        return Ok((Bytes::new(), None));
    }
    let memory = service.memory.take(plan.memory(len)).await?;
    let read = async {
        // The memory for the announced length is accounted for.
        let mut bytes = BytesMut::with_capacity(announced.unwrap_or(0));
        while let Some(part) = next_part(body).await? {
            if part.len() > max - bytes.len() {
                return Err(too_large(call, CONTENT_LENGTH.as_str(), max));
            }
            bytes.extend_from_slice(&part);
        }
        Ok(bytes.freeze())
    };
    let bytes = timeout(BODY_TIME_MAX, read).await.map_err(|_| too_slow())??;
    Ok((bytes, Some(memory)))
}

/// The next part of a body.
async fn next_part(body: &mut Incoming) -> Result<Option<Bytes>> {
    loop {
        let frame = timeout(BODY_STALL_MAX, body.frame()).await.map_err(|_| too_slow())?;
        match frame {
            None => return Ok(None),
            Some(Err(_)) => {
                return Err(ApiError::bad("PostBodyInvalid", "the body ends too early"));
            }
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

fn too_slow() -> ApiError {
    let message = "the body takes too long to come";
    ApiError::new(StatusCode::REQUEST_TIMEOUT, "RequestTimeout", message)
}

/// Reads and forgets the rest of a body.
async fn drain(body: &mut Incoming) {
    let rest = async {
        let mut left = DRAIN_BYTES_MAX;
        while let Some(Ok(frame)) = body.frame().await {
            let len = frame.data_ref().map_or(0, Bytes::len);
            match left.checked_sub(len) {
                Some(it) => left = it,
                None => return,
            }
        }
    };
    let _ = timeout(DRAIN_TIME_MAX, rest).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_has_24_hexadecimal_digits() {
        let id = request_id();
        assert!(id.len() == 24 && id.bytes().all(|it| b"0123456789ABCDEF".contains(&it)), "{id}");
        assert_ne!(id, request_id());
    }
}
