//! The server: its settings, its listener, its connections, and its end.

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::{self, IpAddr, SocketAddr},
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use envelog::Store;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};
use tokio_io_timeout::TimeoutStream;

use crate::{
    admin::{Admin, Administration},
    auth::{AccessKeys, KeysError},
    calls::{Calls, UntilStop},
    console::Console,
    groups::Groups,
    http,
    memory::Budget,
    metrics::Counters,
    projects::{OpenError, Projects},
    service::{OpenLogstores, Service},
    state::{StateDir, StateError},
    tls::{Tls, TlsError},
};

/// The time in which a request's head must come. Also how long an idle connection is kept.
const HEAD_TIME_MAX: Duration = Duration::from_secs(60);
/// How long a client may go without taking a part of an answer.
const WRITE_STALL_MAX: Duration = Duration::from_secs(30);
const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(10);
/// The longest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 32 << 10;
/// How often the files of access keys and certificates are looked at.
const REFRESH_EVERY: Duration = Duration::from_secs(1);
/// How long to wait when the system has no file descriptors for a new connection.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// The reason why a server cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Off loopback, the settings would leave the service open.
    #[error("{0}")]
    Open(&'static str),
    /// A setting is out of its range.
    #[error("{0}")]
    Setting(String),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// The error of the system.
        source: io::Error,
    },
    /// The access keys.
    #[error(transparent)]
    Keys(#[from] KeysError),
    /// The certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The state of the service.
    #[error(transparent)]
    State(#[from] StateError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] envelog::Error),
}

impl From<OpenError> for ServeError {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::State(error) => error.into(),
            OpenError::Engine(error) => error.into(),
        }
    }
}

/// The settings of a [`Server`]; from [`Server::builder`].
#[derive(Debug)]
pub struct ServerBuilder {
    state_dir: Option<PathBuf>,
    access_keys: Option<PathBuf>,
    tls: Option<(PathBuf, PathBuf)>,
    plain_http: bool,
    base_host: String,
    region: String,
    memory_max: usize,
    connections_max: usize,
    drain: Duration,
    administration: Option<Arc<dyn Administration>>,
}

impl ServerBuilder {
    /// The directory of the service's own state: projects, fields of Logstores, consumer groups. By
    /// default the path of the store with `.service` behind it.
    #[must_use]
    pub fn state_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.state_dir = Some(path.into());
        self
    }

    /// The file of access keys. Without one, the server listens on loopback addresses only, and
    /// every caller may do everything.
    #[must_use]
    pub fn access_keys(mut self, path: impl Into<PathBuf>) -> Self {
        self.access_keys = Some(path.into());
        self
    }

    /// Serves HTTPS, with the certificate chain and the private key in these PEM files. They are
    /// read again when they change.
    #[must_use]
    pub fn tls(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.tls = Some((certificate.into(), key.into()));
        self
    }

    /// Allows plain HTTP on addresses other than loopback. Off by default: logs would cross the
    /// network in the clear.
    #[must_use]
    pub fn plain_http(mut self, allow: bool) -> Self {
        self.plain_http = allow;
        self
    }

    /// The host name of the service. Clients put the project in front of it. `sls.local` by
    /// default.
    #[must_use]
    pub fn base_host(mut self, name: impl Into<String>) -> Self {
        self.base_host = name.into();
        self
    }

    /// The region that projects report. `local` by default.
    #[must_use]
    pub fn region(mut self, name: impl Into<String>) -> Self {
        self.region = name.into();
        self
    }

    /// The memory for the bodies of requests and answers, in bytes. Calls wait while it is used up.
    /// 256 MiB by default; at least 32 MiB, which one large call takes.
    #[must_use]
    pub fn memory_max(mut self, bytes: usize) -> Self {
        self.memory_max = bytes;
        self
    }

    /// The number of connections that may be open at once. 16,384 by default; at least 1.
    #[must_use]
    pub fn connections_max(mut self, number: usize) -> Self {
        self.connections_max = number;
        self
    }

    /// How long calls that are under way may take to end when the server stops. 30 s by default.
    #[must_use]
    pub fn drain(mut self, time: Duration) -> Self {
        self.drain = time;
        self
    }

    /// The administrative commands that callers with the permission may send to `POST /admin`. By
    /// default there are none.
    #[must_use]
    pub fn administration(mut self, commands: Arc<dyn Administration>) -> Self {
        self.administration = Some(commands);
        self
    }

    /// Listens on `address`, after all checks that need no store. Clients can connect from now on;
    /// [`Server::run`] serves them. Blocks for file I/O.
    ///
    /// # Errors
    /// As [`ServeError`] says. [`ServeError::Open`] if the settings would leave the service open to
    /// others than this machine.
    pub fn bind(self, address: SocketAddr) -> Result<Server, ServeError> {
        self.check(address)?;
        let keys = self.access_keys.as_deref().map(AccessKeys::load).transpose()?;
        let tls = match &self.tls {
            Some((certificate, key)) => Some(Arc::new(Tls::load(certificate, key)?)),
            None => None,
        };
        let failed = |source| ServeError::Listen { address, source };
        let began = SystemTime::now();
        let listener = net::TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        Ok(Server { settings: self, keys, tls, listener, address, began })
    }

    fn check(&self, address: SocketAddr) -> Result<(), ServeError> {
        if !address.ip().is_loopback() {
            if self.access_keys.is_none() {
                return Err(ServeError::Open(
                    "without access keys the service listens on loopback addresses only: give \
                     --access-keys FILE, or listen on 127.0.0.1",
                ));
            }
            if self.tls.is_none() && !self.plain_http {
                return Err(ServeError::Open(
                    "off loopback the service needs a certificate: give --tls-cert and --tls-key, \
                     or --plain-http if something in front of it encrypts",
                ));
            }
        }
        if !is_host(&self.base_host) {
            return Err(ServeError::Setting(format!(
                "base_host is {:?}, it must be a host name without a scheme and a port",
                self.base_host
            )));
        }
        if self.memory_max < 32 << 20 || self.connections_max == 0 {
            let why = "memory_max must be at least 32 MiB, and connections_max at least 1";
            return Err(ServeError::Setting(why.to_owned()));
        }
        Ok(())
    }

    fn state_path(&self, store: &Store) -> PathBuf {
        let beside = |store: &Path| {
            let mut path = store.as_os_str().to_owned();
            path.push(".service");
            PathBuf::from(path)
        };
        self.state_dir.clone().unwrap_or_else(|| beside(store.path()))
    }
}

/// A log service that listens; from [`ServerBuilder::bind`].
#[derive(Debug)]
pub struct Server {
    settings: ServerBuilder,
    keys: Option<AccessKeys>,
    tls: Option<Arc<Tls>>,
    listener: net::TcpListener,
    address: SocketAddr,
    /// When clients could connect.
    began: SystemTime,
}

impl Server {
    /// The default settings.
    pub fn builder() -> ServerBuilder {
        ServerBuilder {
            state_dir: None,
            access_keys: None,
            tls: None,
            plain_http: false,
            base_host: "sls.local".to_owned(),
            region: "local".to_owned(),
            memory_max: 256 << 20,
            connections_max: 16_384,
            drain: Duration::from_secs(30),
            administration: None,
        }
    }

    /// The address that it listens on.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Whether it checks who calls.
    pub fn has_access_keys(&self) -> bool {
        self.keys.is_some()
    }

    /// Serves a store, which must be open for writing, until `stop` is ready. Then it accepts no
    /// more connections, lets the calls that are under way end, and returns. Every call that was
    /// answered with success is on disk then. The caller closes the store. Blocks for file I/O
    /// before it serves the first call.
    ///
    /// # Errors
    /// [`ServeError::State`] or [`ServeError::Engine`] if the state of the service cannot be read.
    pub async fn run(self, store: Store, stop: impl Future<Output = ()>) -> Result<(), ServeError> {
        let Self { settings, keys, tls, listener, address, began } = self;
        let (stopping, is_stopping) = watch::channel(false);
        let service = Arc::new(open(&settings, keys, store, began, is_stopping)?);
        let failed = |source| ServeError::Listen { address, source };
        let listener = TcpListener::from_std(listener).map_err(failed)?;
        let refreshing = tokio::spawn(refresh(Arc::clone(&service), tls.clone()));
        let graceful = GracefulShutdown::new();
        let mut stop = pin!(stop);
        let permits = Arc::new(Semaphore::new(settings.connections_max));
        loop {
            let (accepted, permit) = tokio::select! {
                () = &mut stop => break,
                accepted = accept(&listener, &permits) => accepted,
            };
            let Some((stream, peer)) = accepted else { continue };
            let connection =
                serve(Arc::clone(&service), stream, peer, tls.clone(), graceful.watcher());
            tokio::spawn(async move {
                let _permit = permit;
                connection.await;
            });
        }
        drop(listener);
        // Calls that wait for logs end now.
        let _ = stopping.send(true);
        refreshing.abort();
        if timeout(settings.drain, graceful.shutdown()).await.is_err() {
            tracing::warn!("calls were still under way when the service stopped");
        }
        Ok(())
    }
}

/// Whether this is a name of DNS, or an IP address.
fn is_host(name: &str) -> bool {
    let is_label = |label: &str| {
        let is_part = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
        (1..=63).contains(&label.len()) && label.bytes().all(is_part)
    };
    name.parse::<IpAddr>().is_ok() || (name.len() <= 253 && name.split('.').all(is_label))
}

/// Reads the state of the service on a store.
pub(crate) fn open(
    settings: &ServerBuilder,
    keys: Option<AccessKeys>,
    store: Store,
    began: SystemTime,
    stopping: watch::Receiver<bool>,
) -> Result<Service, ServeError> {
    let state = StateDir::open(settings.state_path(&store))?;
    let projects = Projects::open(state.within("projects")?, &store)?;
    let mut ids = Vec::new();
    for name in store.list()? {
        ids.push(store.logstore(&name)?.id().to_string());
    }
    let groups = Groups::open(state.within("groups")?, &ids)?;
    Ok(Service {
        store,
        base_host: settings.base_host.to_ascii_lowercase(),
        region: settings.region.clone(),
        keys,
        projects,
        groups,
        memory: Budget::new(settings.memory_max),
        counters: Counters::default(),
        console: Console::default(),
        admin: Admin::new(settings.administration.clone(), began),
        stopping,
        open: OpenLogstores::default(),
    })
}

type Accepted = (Option<(TcpStream, SocketAddr)>, Option<tokio::sync::OwnedSemaphorePermit>);

/// The next connection, when there may be one more.
async fn accept(listener: &TcpListener, permits: &Arc<Semaphore>) -> Accepted {
    let permit = Arc::clone(permits).acquire_owned().await.ok();
    match listener.accept().await {
        Ok(connection) => (Some(connection), permit),
        Err(error) => {
            // Such as a client that has gone again, or no free file descriptor.
            tracing::warn!(%error, "cannot accept a connection");
            sleep(ACCEPT_AGAIN_AFTER).await;
            (None, None)
        }
    }
}

async fn serve(
    service: Arc<Service>,
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<Arc<Tls>>,
    watcher: hyper_util::server::graceful::Watcher,
) {
    let counted = Arc::clone(&service);
    let _connection = counted.counters.connection();
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE_STALL_MAX));
    let stream = Box::pin(stream);
    match tls {
        None => http(service, stream, peer, watcher).await,
        // Boxed, so that a connection without TLS takes no memory for it.
        Some(tls) => Box::pin(https(service, stream, peer, tls, watcher)).await,
    }
}

async fn https(
    service: Arc<Service>,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    peer: SocketAddr,
    tls: Arc<Tls>,
    watcher: hyper_util::server::graceful::Watcher,
) {
    let mut stopping = service.stopping.clone();
    let handshake = timeout(HANDSHAKE_TIME_MAX, tls.acceptor().accept(stream));
    let shaken = tokio::select! {
        shaken = handshake => shaken,
        Ok(_) = stopping.wait_for(|stopping| *stopping) => return,
    };
    match shaken {
        Ok(Ok(stream)) => http(service, stream, peer, watcher).await,
        Ok(Err(error)) => tracing::debug!(%error, %peer, "no TLS"),
        Err(_) => tracing::debug!(%peer, "the TLS handshake takes too long"),
    }
}

pub(crate) async fn http(
    service: Arc<Service>,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    peer: SocketAddr,
    watcher: hyper_util::server::graceful::Watcher,
) {
    let calls = Calls::default();
    let stream = UntilStop::new(stream, calls.clone(), service.stopping.clone());
    let handler = service_fn(move |request| {
        let call = calls.begin();
        let answer = http::handle(Arc::clone(&service), peer, request);
        async move {
            let mut answer = answer.await?;
            answer.body_mut().of_call(call);
            Ok::<_, Infallible>(answer)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), handler);
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, %peer, "a connection has ended");
    }
}

/// Takes up changes of the files of access keys and certificates.
async fn refresh(service: Arc<Service>, tls: Option<Arc<Tls>>) {
    let (mut keys_fault, mut tls_fault) = (String::new(), String::new());
    loop {
        sleep(REFRESH_EVERY).await;
        let (service, tls) = (Arc::clone(&service), tls.clone());
        let looked = tokio::task::spawn_blocking(move || {
            let keys = service.keys.as_ref().map(AccessKeys::refresh);
            let tls = tls.as_deref().map(Tls::refresh);
            (report(keys), report(tls))
        });
        if let Ok((keys, tls)) = looked.await {
            tell("access keys", keys, &mut keys_fault);
            tell("certificate", tls, &mut tls_fault);
        }
    }
}

fn report<E: ToString>(refreshed: Option<Result<bool, E>>) -> Result<bool, String> {
    refreshed.transpose().map(|changed| changed.unwrap_or(false)).map_err(|it| it.to_string())
}

/// Logs a change, and a fault once.
fn tell(what: &str, refreshed: Result<bool, String>, fault: &mut String) {
    match refreshed {
        Ok(changed) => {
            if changed {
                tracing::info!("the {what} changed and are in force");
            }
            fault.clear();
        }
        Err(new) if new != *fault => {
            tracing::error!("the {what} in force stay: {new}");
            *fault = new;
        }
        Err(_) => {}
    }
}
