//! `POST /admin`: administrative commands, while the service runs. The program that embeds the
//! service defines the commands. The service checks the caller, records the command in the audit log,
//! and sends the output.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use envelog::{Error, LogstoreName, Store};
use tokio::{
    sync::{Semaphore, mpsc},
    task::{JoinHandle, spawn_blocking},
    time::{interval, sleep},
};

use crate::{
    auth::{Caller, Right, Signed},
    call::Call,
    error::{ApiError, Result},
    response::{Answer, Chunks},
    service::{self, Service},
};

/// The longest body of a command, in bytes. A verification sends a checkpoint.
pub(crate) const BODY_BYTES_MAX: usize = 16 << 20;
/// The commands that may run at once.
const COMMANDS_MAX: usize = 4;
/// The lines of output that wait for a client.
const LINES_MAX: usize = 64;
/// How often a command without output shows that it is alive.
const ALIVE_EVERY: Duration = Duration::from_secs(10);
/// The signatures that are remembered. Older ones are forgotten once they are too old to be valid.
const SIGNATURES_MAX: usize = 10_000;
/// How far the time of a signature may be ahead of the clock, in seconds.
const AHEAD_MAX_S: u64 = 5;
const NONCE_BYTES_MIN: usize = 16;

/// The administrative commands of the program that serves; for
/// [`ServerBuilder::administration`](crate::ServerBuilder::administration).
pub trait Administration: fmt::Debug + Send + Sync {
    /// Reads a command from the body of a request. Does nothing else.
    ///
    /// # Errors
    /// A sentence for the caller.
    fn command(&self, body: &[u8]) -> std::result::Result<Box<dyn AdminCommand>, String>;
}

/// An administrative command.
pub trait AdminCommand: Send {
    /// The one Logstore that the command reads and changes. `None` for the whole store: only a key
    /// for all projects may do it.
    fn logstore(&self) -> Option<LogstoreName>;

    /// The roles that the command lets the service use.
    fn roles(&self) -> Vec<String>;

    /// The command in words, for the key audit log. Without secrets.
    fn describe(&self) -> String;

    /// Does the command. Blocks. The client may be gone: the command then goes on to its end.
    fn run(self: Box<Self>, store: &Store, output: AdminOutput);
}

/// The output of a command to its client: lines, each one JSON document.
#[derive(Debug)]
pub struct AdminOutput(mpsc::Sender<Bytes>);

impl AdminOutput {
    /// Sends a line. Waits for a slow client, and not for one that has gone.
    pub fn send(&self, line: &str) {
        // A client that has gone, or takes nothing for half a minute, has no connection any more.
        let _ = self.0.blocking_send(encoded(line));
    }

    /// Sends a line if the client takes it now, such as a report of progress.
    pub fn offer(&self, line: &str) {
        let _ = self.0.try_send(encoded(line));
    }
}

fn encoded(line: &str) -> Bytes {
    format!("{line}\n").into()
}

/// The administration of a service, with what it remembers.
#[derive(Debug)]
pub(crate) struct Admin {
    commands: Option<Arc<dyn Administration>>,
    running: Arc<Semaphore>,
    once: Once,
}

impl Admin {
    pub(crate) fn new(commands: Option<Arc<dyn Administration>>, began: SystemTime) -> Self {
        let running = Arc::new(Semaphore::new(COMMANDS_MAX));
        Self { commands, running, once: Once::new(seconds(began)) }
    }
}

/// Refuses a caller that may administer nothing, before its body is read.
pub(crate) fn check_caller(caller: &Caller) -> Result<()> {
    match caller {
        Caller::Local => {
            let message = "administration needs an access key: start the service with access keys";
            Err(ApiError::unauthorized("Unauthorized", message))
        }
        Caller::Key(key) if !key.may_somewhere(Right::Admin) => {
            let message = "the access key has no permission (admin)";
            Err(ApiError::unauthorized("Unauthorized", message))
        }
        Caller::Key(_) => Ok(()),
    }
}

/// Begins a command, and answers with its output.
pub(crate) async fn begin(
    service: &Arc<Service>,
    caller: &Caller,
    call: &Call,
    body: &[u8],
) -> Result<Answer> {
    let admin = &service.admin;
    let none = || ApiError::unsupported("administration");
    let command = admin.commands.as_ref().ok_or_else(none)?.command(body);
    let command = command.map_err(ApiError::parameter)?;
    let logstore = command.logstore();
    match &logstore {
        Some(name) => caller.require(Right::Admin, name.project())?,
        None => caller.require_everywhere(Right::Admin)?,
    }
    command.roles().iter().try_for_each(|arn| caller.require_role(arn))?;
    let permit = Arc::clone(&admin.running).try_acquire_owned();
    let permit = permit.map_err(|_| {
        ApiError::busy(format!("{COMMANDS_MAX} administrative commands are under way already"))
    })?;
    // Last of all, since the same request may not come again.
    let signed = Once::signed(call)?;
    sleep(signed.ahead(SystemTime::now())?).await;
    admin.once.admit(signed, SystemTime::now())?;
    let what = format!("access key {}: {}", caller.id(), command.describe());
    tracing::info!(what, "administrative command");
    let store = service.store.clone();
    service::run(move || Ok(store.admin().record_command(&what)?)).await?;

    let (sender, receiver) = mpsc::channel(LINES_MAX);
    let (shared, output) = (Arc::clone(service), AdminOutput(sender.clone()));
    let work = spawn_blocking(move || {
        let _permit = permit;
        command.run(&shared.store, output);
        forget_if_deleted(&shared, logstore.as_ref());
    });
    tokio::spawn(keep_alive(work, sender));
    Ok(Answer::of(Chunks::coming(receiver), "application/x-ndjson"))
}

/// Sends empty lines while a command works, so that nothing between the client and the service
/// takes the connection for a dead one.
async fn keep_alive(mut work: JoinHandle<()>, sender: mpsc::Sender<Bytes>) {
    let mut ticks = interval(ALIVE_EVERY);
    loop {
        tokio::select! {
            done = &mut work => {
                if let Err(error) = done {
                    tracing::error!(%error, "an administrative command has panicked");
                }
                return;
            }
            _ = ticks.tick() => drop(sender.try_send(Bytes::from_static(b"\n"))),
        }
    }
}

/// Drops the handle of a Logstore that a command has deleted.
fn forget_if_deleted(service: &Service, logstore: Option<&LogstoreName>) {
    if let Some(name) = logstore
        && let Err(Error::LogstoreMissing(_)) = service.store.logstore(name)
    {
        service.open.forget(name);
    }
}

/// Admits each signed request once: those of this process are remembered while they are valid, and
/// none is admitted that an earlier process may have admitted.
#[derive(Debug)]
struct Once {
    began_s: i64,
    /// The requests that were admitted.
    seen: Mutex<Vec<SignedOnce>>,
}

/// The signature of a request, with its time in seconds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct SignedOnce {
    at_s: i64,
    signature: Vec<u8>,
}

impl SignedOnce {
    /// How long until the time of the signature has come. Before that, no request is admitted: a
    /// process that begins then could not know it.
    ///
    /// # Errors
    /// 400 for more than a few seconds.
    fn ahead(&self, now: SystemTime) -> Result<Duration> {
        let ahead = u64::try_from(self.at_s.saturating_sub(seconds(now))).unwrap_or(0);
        if ahead <= AHEAD_MAX_S {
            return Ok(Duration::from_secs(ahead));
        }
        let message = "the time of the request has not come: check the clock";
        Err(ApiError::bad("RequestTimeTooSkewed", message))
    }
}

impl Once {
    fn new(began_s: i64) -> Self {
        Self { began_s, seen: Mutex::default() }
    }

    /// # Errors
    /// 401 for a request without a signature of version 4, which covers every header of the
    /// service, or without a random one among these.
    fn signed(call: &Call) -> Result<SignedOnce> {
        let refused = |message: &str| Err(ApiError::unauthorized("Unauthorized", message));
        let Some((at_s, signature)) = Signed::of(call)?.of_version_4() else {
            return refused("administration needs a signature of version 4");
        };
        if call.header("x-log-nonce").is_none_or(|nonce| nonce.len() < NONCE_BYTES_MIN) {
            return refused("administration needs a random x-log-nonce in the signed headers");
        }
        Ok(SignedOnce { at_s, signature })
    }

    /// # Errors
    /// 401 for a request that has come before, and 400 for one that may have.
    fn admit(&self, signed: SignedOnce, now: SystemTime) -> Result<()> {
        if signed.at_s <= self.began_s {
            let message = "the request was signed before the service started: sign it again";
            return Err(ApiError::bad("RequestTimeExpired", message));
        }
        let oldest = seconds(now).saturating_sub_unsigned(Signed::VALID_S);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.retain(|known| known.at_s >= oldest);
        if seen.contains(&signed) {
            let message = "the same request has come before: sign each request anew";
            return Err(ApiError::unauthorized("Unauthorized", message));
        }
        if seen.len() >= SIGNATURES_MAX {
            return Err(ApiError::busy("too many administrative commands in a short time"));
        }
        seen.push(signed);
        Ok(())
    }
}

fn seconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    i64::try_from(since).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use hyper::{Method, Request};

    use super::*;
    use crate::client::{Key, sign};

    const AT_S: u64 = 1_700_000_000;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn call(nonce: &str, signed: SystemTime) -> Call {
        let key = Key { id: "id".to_owned(), secret: "secret".to_owned().into() };
        let headers = sign(&key, &Method::POST, "sls.local", "/admin", nonce, b"{}", signed);
        let mut request = Request::post("/admin").header("Host", "sls.local");
        for (name, value) in headers {
            request = request.header(name, value);
        }
        Call::new(request.body(()).unwrap().into_parts().0, "sls.local").unwrap()
    }

    fn admit(once: &Once, call: &Call, now: u64) -> Result<()> {
        once.admit(Once::signed(call)?, at(now))
    }

    #[test]
    fn a_request_is_admitted_once() {
        let once = Once::new(AT_S as i64 - 1);
        let first = call("0123456789abcdef", at(AT_S));
        admit(&once, &first, AT_S).unwrap();
        // Also after others, and as long as its time is valid.
        admit(&once, &call("another nonce, 123", at(AT_S)), AT_S).unwrap();
        for later in [0, 899, 900] {
            let refusal = admit(&once, &first, AT_S + later).unwrap_err();
            assert!(refusal.message.contains("has come before"), "{refusal:?}");
        }
        // The digits of a signature may be of either case.
        let mut loud = call("0123456789abcdef", at(AT_S));
        let header = loud.headers.get_mut("authorization").unwrap();
        let (credential, digits) = header.to_str().unwrap().split_once("Signature=").unwrap();
        *header = format!("{credential}Signature={}", digits.to_uppercase()).parse().unwrap();
        assert!(admit(&once, &loud, AT_S).unwrap_err().message.contains("has come before"));
        // Those that are no longer valid are forgotten.
        admit(&once, &call("the last of them.", at(AT_S + 5000)), AT_S + 5000).unwrap();
        assert_eq!(once.seen.lock().unwrap().len(), 1);
    }

    #[test]
    fn a_request_that_an_earlier_process_may_have_admitted_is_refused() {
        let once = Once::new(AT_S as i64);
        for before in [0, 1, 100] {
            let refusal = admit(&once, &call("0123456789abcdef", at(AT_S - before)), AT_S);
            assert_eq!(refusal.unwrap_err().code, "RequestTimeExpired");
        }
        // A process admits none whose time has not come.
        let of_future = |by| {
            let signed = Once::signed(&call("0123456789abcdef", at(AT_S + by))).unwrap();
            signed.ahead(at(AT_S)).map(|wait| wait.as_secs()).map_err(|refusal| refusal.code)
        };
        assert_eq!((of_future(0), of_future(3)), (Ok(0), Ok(3)));
        assert_eq!(of_future(600), Err("RequestTimeTooSkewed"));
    }

    #[test]
    fn a_request_without_a_nonce_is_refused() {
        let refusal = Once::signed(&call("short", at(AT_S))).unwrap_err();
        assert!(refusal.message.contains("x-log-nonce"), "{refusal:?}");
    }
}
