//! Blocking HTTP requests with a deadline and answers of bounded length, for cloud KMSs.

use std::{
    fmt,
    io::{self, Read},
    net::IpAddr,
    sync::{Arc, OnceLock},
    time::Duration,
};

use rustls::{
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, pem::PemObject},
};
#[cfg(any(feature = "kms-aws", feature = "kms-vault"))]
use serde::Serialize;
#[cfg(feature = "kms-aws")]
use ureq::http::HeaderMap;
use ureq::{
    Agent, Error,
    http::{Request, Uri},
    tls::{Certificate, RootCerts, TlsConfig},
};
use zeroize::Zeroizing;

#[cfg(any(feature = "kms-aws", feature = "kms-vault"))]
use super::KmsError;
use super::deadline::Deadline;
use crate::io::read_configured;

/// The longest answer, in bytes. The expected answers have a few thousand bytes. A longer one is
/// not read to its end.
pub(super) const ANSWER_BYTES_MAX: usize = 64 * 1024;
const HEADER_BYTES_MAX: usize = 16 * 1024;
/// The largest accepted file of certificates, in bytes. Debian's has 220 KiB.
const CA_BUNDLE_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// How long an idle connection is kept for the next request: longer than the default interval of
/// lease renewals.
const IDLE_MAX: Duration = Duration::from_secs(50);
/// The most idle connections, to each host and in total. Further concurrent calls open their own
/// connections.
const IDLE_CONNECTIONS_MAX: usize = 16;

/// Parses the URL of an endpoint: only a scheme, a host and a port. Plain `http:` is allowed only
/// for this machine.
pub(super) fn endpoint(url: &str) -> Result<Uri, &'static str> {
    let uri: Uri = url.parse().map_err(|_| "an endpoint is not a URL")?;
    let Some(authority) = uri.authority() else {
        return Err("an endpoint is not a URL with a host");
    };
    if authority.as_str().contains('@') || !matches!(uri.path(), "" | "/") || uri.query().is_some()
    {
        return Err("an endpoint is a scheme, a host and a port, and nothing more");
    }
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    // RFC 6761, section 6.3: the name resolves to the loopback address.
    let loopback =
        host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    match uri.scheme_str() {
        Some("https") => Ok(uri),
        Some("http") if loopback => Ok(uri),
        Some("http") => Err("keys go to another machine only by https:"),
        _ => Err("an endpoint is an https: URL"),
    }
}

/// `host:port`, without the port if it is the scheme's default: the value of the header `Host`.
pub(super) fn authority(uri: &Uri) -> &str {
    uri.authority().map_or("", |authority| authority.as_str())
}

/// An answer of any status, read to its end. The body is wiped on drop, because it may hold a key.
pub(super) struct Answer {
    pub(super) status: u16,
    #[cfg(feature = "kms-aws")]
    pub(super) headers: HeaderMap,
    pub(super) body: Zeroizing<Vec<u8>>,
}

/// The reason why there is no answer, with the host. It contains nothing of the request or the
/// answer.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// The time limit has passed.
    TimedOut(String),
    /// The answer is too long.
    TooLong(String),
    /// The connection broke. The server may have closed an idle connection, so a retry may help.
    Broken(String),
    /// Any other failure.
    Failed(String),
}

impl fmt::Display for NoAnswer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TimedOut(host) => write!(f, "no answer of {host} in time"),
            Self::TooLong(host) => {
                write!(f, "{host} answered with more than {ANSWER_BYTES_MAX} bytes")
            }
            Self::Broken(why) | Self::Failed(why) => f.write_str(why),
        }
    }
}

/// The body of a request, as JSON. Wiped on drop.
#[cfg(any(feature = "kms-aws", feature = "kms-vault"))]
pub(super) fn json(request: &impl Serialize) -> Result<Zeroizing<Vec<u8>>, KmsError> {
    /// Ids and contexts have a few hundred bytes, a ciphertext in base64 has at most 8 KiB, and a
    /// token some KiB. A buffer that had to grow would leave a copy of its content behind.
    const BODY_BYTES: usize = 32 * 1024;
    let mut body = Zeroizing::new(Vec::with_capacity(BODY_BYTES));
    serde_json::to_writer(&mut *body, request)
        .map_err(|_| KmsError::invalid("the request cannot be encoded"))?;
    Ok(body)
}

/// A client that keeps connections for the next request.
#[derive(Clone)]
pub(super) struct Http {
    /// Created at the first request, so that creating a KMS reads no certificates.
    agent: Arc<OnceLock<Agent>>,
    /// A setting and the file that it names. The certificates in that file replace the system's.
    ca_bundle: Option<(&'static str, String)>,
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http").field("ca_bundle", &self.ca_bundle).finish_non_exhaustive()
    }
}

impl Http {
    /// A client that trusts the certificates of the system, or those in a file, which a setting of
    /// this name names.
    #[cfg(feature = "kms-vault")]
    pub(super) fn trusting(setting: &'static str, file: Option<String>) -> Self {
        Self { agent: Arc::default(), ca_bundle: file.map(|file| (setting, file)) }
    }

    /// A client that trusts the certificates of the system, or those in the file that this variable
    /// of the environment names.
    #[cfg(any(feature = "kms-aliyun", feature = "kms-aws"))]
    pub(super) fn new(ca_bundle: Option<&'static str>) -> Self {
        let named = |variable| {
            Some((variable, std::env::var(variable).ok().filter(|path| !path.is_empty())?))
        };
        Self { agent: Arc::default(), ca_bundle: ca_bundle.and_then(named) }
    }

    /// Sends a request and reads the answer. It follows no redirection.
    pub(super) fn send(
        &self,
        request: Request<&[u8]>,
        deadline: Deadline,
    ) -> Result<Answer, NoAnswer> {
        let agent = self.agent().map_err(NoAnswer::Failed)?;
        let host = authority(request.uri()).to_owned();
        let Some(left) = deadline.left() else { return Err(NoAnswer::TimedOut(host)) };
        // Plain `http:` goes only to this machine or its metadata service, and no proxy reaches
        // those.
        let direct = request.uri().scheme_str() == Some("http");
        let mut config = agent.configure_request(request).timeout_global(Some(left));
        if direct {
            config = config.proxy(None);
        }
        let mut response = agent.run(config.build()).map_err(|error| no_answer(&error, &host))?;
        // Allocated at its full length: a buffer that grows would leave copies of its content
        // behind.
        let mut body = Zeroizing::new(vec![0; ANSWER_BYTES_MAX + 1]);
        let (mut reader, mut len) = (response.body_mut().as_reader(), 0);
        while len < body.len() {
            match reader.read(&mut body[len..]) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(no_answer(&error.into(), &host)),
            }
        }
        if len > ANSWER_BYTES_MAX {
            return Err(NoAnswer::TooLong(host));
        }
        body.truncate(len);
        let (parts, _) = response.into_parts();
        Ok(Answer {
            status: parts.status.as_u16(),
            #[cfg(feature = "kms-aws")]
            headers: parts.headers,
            body,
        })
    }

    fn agent(&self) -> Result<&Agent, String> {
        if let Some(agent) = self.agent.get() {
            return Ok(agent);
        }
        let roots = match &self.ca_bundle {
            Some((setting, path)) => RootCerts::Specific(Arc::new(certificates(setting, path)?)),
            None => RootCerts::PlatformVerifier,
        };
        let tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(Arc::new(aws_lc_rs::default_provider()))
            .root_certs(roots)
            .build();
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_response_header_size(HEADER_BYTES_MAX)
            .max_idle_age(IDLE_MAX)
            .max_idle_connections(IDLE_CONNECTIONS_MAX)
            .max_idle_connections_per_host(IDLE_CONNECTIONS_MAX)
            .user_agent(concat!("envelog/", env!("CARGO_PKG_VERSION")))
            .accept("")
            .tls_config(tls)
            .build();
        Ok(self.agent.get_or_init(|| Agent::new_with_config(config)))
    }
}

fn no_answer(error: &Error, host: &str) -> NoAnswer {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, TimedOut, UnexpectedEof,
    };
    match error {
        Error::Timeout(_) => NoAnswer::TimedOut(host.to_owned()),
        Error::Io(error) => match error.kind() {
            TimedOut => NoAnswer::TimedOut(host.to_owned()),
            BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof => {
                NoAnswer::Broken(format!("{host}: {error}"))
            }
            _ => NoAnswer::Failed(format!("{host}: {error}")),
        },
        Error::HostNotFound => NoAnswer::Failed(format!("the name {host} does not resolve")),
        Error::ConnectionFailed => NoAnswer::Failed(format!("no connection to {host}")),
        Error::Rustls(error) => NoAnswer::Failed(format!("no TLS connection to {host}: {error}")),
        Error::Tls(error) => NoAnswer::Failed(format!("no TLS connection to {host}: {error}")),
        // Other errors may quote parts of the request or the answer.
        _ => NoAnswer::Failed(format!("the answer of {host} is not HTTP")),
    }
}

fn certificates(setting: &str, path: &str) -> Result<Vec<Certificate<'static>>, String> {
    let pem = read_configured(path.as_ref(), CA_BUNDLE_BYTES_MAX)
        .map_err(|error| format!("cannot read {path}, which {setting} names: {error}"))?;
    let ders: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&pem).collect();
    let ders = ders.map_err(|error| {
        format!("{path}, which {setting} names, is not a list of certificates: {error}")
    })?;
    if ders.is_empty() {
        return Err(format!("{path}, which {setting} names, has no certificate"));
    }
    Ok(ders.iter().map(|der| Certificate::from_der(der).to_owned()).collect())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn an_endpoint_is_https_or_on_this_machine() {
        for (url, wanted) in [
            ("https://kms.cn-hangzhou.aliyuncs.com", "kms.cn-hangzhou.aliyuncs.com"),
            (
                "https://kst-1.cryptoservice.kms.aliyuncs.com/",
                "kst-1.cryptoservice.kms.aliyuncs.com",
            ),
            ("http://127.0.0.1:8080", "127.0.0.1:8080"),
            ("http://[::1]:8080", "[::1]:8080"),
            ("http://localhost:1", "localhost:1"),
        ] {
            assert_eq!(authority(&endpoint(url).unwrap()), wanted);
        }
        for url in [
            "http://kms.cn-hangzhou.aliyuncs.com",
            "http://127.0.0.1.evil.example",
            "http://localhost.evil.example",
            "ftp://127.0.0.1",
            "https://user:secret@host",
            "https://host/path",
            "https://host?query",
            "kms.cn-hangzhou.aliyuncs.com",
            "/",
            "",
        ] {
            let refused = endpoint(url).unwrap_err();
            assert!(!refused.contains("secret"), "{refused}");
        }
    }
}
