//! Blocking HTTP requests that end in time, whose answers are of bounded length.

use std::{
    fmt,
    io::{self, Read},
    sync::{Arc, OnceLock},
    thread,
    time::Duration,
};

use http::{Request, Uri, header::HeaderMap};
use rustls::{
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, pem::PemObject},
};
use ureq::{
    Agent,
    tls::{Certificate, RootCerts, TlsConfig},
};
use zeroize::Zeroizing;

use crate::{
    io::{Clock, RealDisk, SystemClock, read_file},
    kms::KmsError,
};

/// The answers asked for have a few thousand bytes; what is longer is not read to its end.
pub(super) const ANSWER_BYTES_MAX: usize = 64 * 1024;
/// A file of certificates is not larger; that of Debian has 220 KiB.
const CA_BUNDLE_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// How long a connection is kept for the next request: for longer than leases take to be renewed, unless told otherwise.
const IDLE_MAX: Duration = Duration::from_secs(50);
/// Names a file of certificates to trust in place of the system's, as for the other AWS tools.
const CA_BUNDLE: &str = "AWS_CA_BUNDLE";

/// Until when a call has to be done with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    uptime: Duration,
    timeout: Duration,
}

impl Deadline {
    pub(super) fn after(timeout: Duration) -> Self {
        Self { uptime: SystemClock.uptime() + timeout, timeout }
    }

    /// How long there is left, if any.
    pub(super) fn left(self) -> Option<Duration> {
        self.uptime.checked_sub(SystemClock.uptime()).filter(|left| !left.is_zero())
    }

    /// Waits, unless there would be no time left after it. Returns whether it has.
    #[expect(clippy::disallowed_methods, reason = "a backend has no condition that a test could signal")]
    pub(super) fn pause(self, pause: Duration) -> bool {
        let pauses = self.left().is_some_and(|left| left > pause);
        if pauses {
            thread::sleep(pause);
        }
        pauses
    }

    pub(super) fn passed(self) -> KmsError {
        unreachable(format!("no answer within {:?}", self.timeout))
    }
}

pub(super) fn unreachable(detail: impl Into<String>) -> KmsError {
    KmsError::Unreachable { detail: detail.into() }
}

/// An answer, read to its end. The body is wiped when it is dropped.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) headers: HeaderMap,
    pub(super) body: Zeroizing<Vec<u8>>,
}

/// Why there is no answer.
pub(super) enum NoAnswer {
    /// There is no time left.
    TimedOut,
    /// Worth another try.
    Failed(String),
    /// The answer is longer than one can be.
    Oversized,
}

/// A client whose connections are kept for the next request.
#[derive(Clone)]
pub(super) struct Http {
    /// Made at the first request: to name a KMS reads no certificates.
    agent: Arc<OnceLock<Agent>>,
    /// A file of certificates to trust in place of the system's.
    ca_bundle: Option<String>,
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http").field("ca_bundle", &self.ca_bundle).finish_non_exhaustive()
    }
}

impl Http {
    pub(super) fn new() -> Self {
        Self { agent: Arc::default(), ca_bundle: std::env::var(CA_BUNDLE).ok().filter(|path| !path.is_empty()) }
    }

    /// Sends a request and reads the answer, whatever its status. Follows no redirection.
    pub(super) fn send(&self, request: Request<&[u8]>, deadline: Deadline) -> Result<Answer, NoAnswer> {
        let agent = self.agent().map_err(NoAnswer::Failed)?;
        let left = deadline.left().ok_or(NoAnswer::TimedOut)?;
        // Without TLS there are only this machine and its metadata service, which no proxy reaches.
        let direct = request.uri().scheme_str() == Some("http");
        let host = request.uri().host().unwrap_or_default().to_owned();
        let mut config = agent.configure_request(request).timeout_global(Some(left));
        if direct {
            config = config.proxy(None);
        }
        let failed = |error: ureq::Error| match error {
            ureq::Error::Timeout(_) => NoAnswer::TimedOut,
            error => NoAnswer::Failed(format!("{host}: {error}")),
        };
        let mut response = agent.run(config.build()).map_err(failed)?;
        // All of it at once: a buffer that grows would leave copies of its content behind.
        let mut body = Zeroizing::new(Vec::with_capacity(ANSWER_BYTES_MAX + 1));
        let reader = response.body_mut().as_reader();
        reader.take(ANSWER_BYTES_MAX as u64 + 1).read_to_end(&mut body).map_err(|error| {
            let timed_out = error.kind() == io::ErrorKind::TimedOut || deadline.left().is_none();
            if timed_out { NoAnswer::TimedOut } else { NoAnswer::Failed(format!("{host}: {error}")) }
        })?;
        if body.len() > ANSWER_BYTES_MAX {
            return Err(NoAnswer::Oversized);
        }
        let (parts, _) = response.into_parts();
        Ok(Answer { status: parts.status.as_u16(), headers: parts.headers, body })
    }

    fn agent(&self) -> Result<&Agent, String> {
        if let Some(agent) = self.agent.get() {
            return Ok(agent);
        }
        let roots = match &self.ca_bundle {
            Some(path) => certificates_of(path)?,
            None => certificates_of_system()?,
        };
        let tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(Arc::new(aws_lc_rs::default_provider()))
            .root_certs(RootCerts::Specific(Arc::new(roots)))
            .build();
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("envelog/", env!("CARGO_PKG_VERSION")))
            .accept("")
            .max_idle_age(IDLE_MAX)
            .tls_config(tls)
            .build();
        Ok(self.agent.get_or_init(|| Agent::new_with_config(config)))
    }
}

fn certificates_of(path: &str) -> Result<Vec<Certificate<'static>>, String> {
    let pem = read_file(&RealDisk, path.as_ref(), CA_BUNDLE_BYTES_MAX)
        .map_err(|error| format!("cannot read {path}, which {CA_BUNDLE} names: {error}"))?;
    let ders: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let ders = ders.map_err(|error| format!("{path}, which {CA_BUNDLE} names, is no list of certificates: {error}"))?;
    if ders.is_empty() {
        return Err(format!("{path}, which {CA_BUNDLE} names, has no certificate"));
    }
    Ok(ders.iter().map(|der| Certificate::from_der(der).to_owned()).collect())
}

fn certificates_of_system() -> Result<Vec<Certificate<'static>>, String> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        let why = found.errors.first().map_or_else(String::new, |error| format!(": {error}"));
        return Err(format!("the system has no certificates to trust{why}; {CA_BUNDLE} may name a file of them"));
    }
    Ok(found.certs.iter().map(|der| Certificate::from_der(der).to_owned()).collect())
}

/// Whether a service at this address is on this machine, so that what is sent there without TLS goes over no network.
pub(super) fn is_loopback(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}
