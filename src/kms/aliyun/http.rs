//! Bounded exchanges with an HTTP server: in the time that is left of a call, and with answers of limited size.

use std::{fmt, io, io::Read as _, net::IpAddr, sync::Arc, time::Duration};

use ureq::{
    Agent, Error,
    http::{Request, Uri},
    tls::{RootCerts, TlsConfig, TlsProvider},
};
use zeroize::Zeroizing;

use crate::io::{Clock, SystemClock};

/// The longest body that is read of an answer; those that are expected have less than 4 KiB.
const BODY_MAX: usize = 64 * 1024;
/// Connections kept for the next call, to each host and in all. More calls than that at once open connections of their own.
const IDLE_CONNECTIONS_MAX: usize = 16;

/// When a call has to be over.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline(Duration);

impl Deadline {
    pub(super) fn within(timeout: Duration) -> Self {
        Self(SystemClock.uptime().saturating_add(timeout))
    }

    /// The time that is left; `None` when there is none.
    pub(super) fn left(self) -> Option<Duration> {
        self.0.checked_sub(SystemClock.uptime()).filter(|left| !left.is_zero())
    }

    /// One at which half of the time that is left has passed.
    pub(super) fn halfway(self) -> Self {
        Self::within(self.left().unwrap_or_default() / 2)
    }
}

/// Where a service is: scheme, host and port.
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    /// As in `http://127.0.0.1:8080`.
    origin: String,
    /// As in `127.0.0.1:8080`, which is what the header `Host` says.
    pub(super) authority: String,
}

impl Endpoint {
    /// The endpoint that a URL names, which has nothing but scheme, host and port.
    pub(super) fn parse(url: &str) -> Result<Self, &'static str> {
        let uri: Uri = url.parse().map_err(|_| "an endpoint is no URL")?;
        let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else {
            return Err("an endpoint has no scheme or no host");
        };
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() || authority.as_str().contains('@') {
            return Err("an endpoint has more than scheme, host and port");
        }
        let loopback = || authority.host().trim_matches(['[', ']']).parse().is_ok_and(|ip: IpAddr| ip.is_loopback());
        match scheme {
            "https" => {}
            "http" if loopback() => {}
            _ => return Err("an endpoint is not https: (http: is for this machine alone, as 127.0.0.1)"),
        }
        Ok(Self { origin: format!("{scheme}://{authority}"), authority: authority.to_string() })
    }

    /// The public endpoint of a service in a region, which has letters, digits and hyphens alone.
    pub(super) fn regional(service: &str, region_id: &str) -> Self {
        let authority = format!("{service}.{region_id}.aliyuncs.com");
        Self { origin: format!("https://{authority}"), authority }
    }

    /// The metadata service of an ECS instance, at a link-local address that only the instance itself can reach.
    pub(super) fn instance_metadata() -> Self {
        let authority = "100.100.100.200".to_owned();
        Self { origin: format!("http://{authority}"), authority }
    }

    fn is_plain(&self) -> bool {
        self.origin.starts_with("http:")
    }
}

/// Why there is no answer.
#[derive(Debug)]
pub(super) struct NoAnswer {
    /// One clause, without anything of the request or the answer.
    pub(super) why: String,
    /// Whether the connection broke, as one that had been kept does when the server gave it up: asking again may help.
    pub(super) broken: bool,
}

/// An answer, whatever its status. It is wiped, as it may hold a key.
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Zeroizing<Vec<u8>>,
}

/// A client whose connections are kept for later calls.
#[derive(Clone)]
pub(super) struct Http(Agent);

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Http(..)")
    }
}

impl Http {
    pub(super) fn new() -> Self {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        // The trust anchors are the system's, so that an operator decides, and read again for each new connection.
        let tls = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(provider)
            .root_certs(RootCerts::PlatformVerifier)
            .build();
        let config = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .max_response_header_size(16 * 1024)
            .max_idle_connections(IDLE_CONNECTIONS_MAX)
            .max_idle_connections_per_host(IDLE_CONNECTIONS_MAX)
            .user_agent(concat!("envelog/", env!("CARGO_PKG_VERSION")))
            .accept("application/json")
            .build();
        Self(config.into())
    }

    /// One exchange. `target` begins with a slash; `Host` is set, as the endpoint has it.
    pub(super) fn exchange(
        &self,
        method: &str,
        endpoint: &Endpoint,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
        deadline: Deadline,
    ) -> Result<Answer, NoAnswer> {
        let left = deadline.left().ok_or_else(|| NoAnswer { why: "no time was left".to_owned(), broken: false })?;
        let mut request = Request::builder().method(method).uri(format!("{}{target}", endpoint.origin));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(body).map_err(|_| NoAnswer {
            why: "what is to be sent does not fit into an HTTP request".to_owned(),
            broken: false,
        })?;
        let config = self.0.configure_request(request).timeout_global(Some(left));
        // A proxy of the environment is for the way to the cloud, not for this machine and its metadata service.
        let config = if endpoint.is_plain() { config.proxy(None) } else { config };
        let told = |error: Error| no_answer(&error, endpoint);
        let mut answer = self.0.run(config.build()).map_err(told)?;
        let mut bytes = Zeroizing::new(vec![0; BODY_MAX + 1]);
        let mut reader = answer.body_mut().as_reader();
        let mut len = 0;
        while len < bytes.len() {
            match reader.read(&mut bytes[len..]) {
                Ok(0) => break,
                Ok(read) => len += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(told(error.into())),
            }
        }
        if len > BODY_MAX {
            return Err(NoAnswer {
                why: format!("{} answered with more than {BODY_MAX} bytes", endpoint.authority),
                broken: false,
            });
        }
        bytes.truncate(len);
        Ok(Answer { status: answer.status().as_u16(), body: bytes })
    }
}

fn no_answer(error: &Error, endpoint: &Endpoint) -> NoAnswer {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, NotConnected, UnexpectedEof};
    let host = &endpoint.authority;
    let (why, broken) = match error {
        Error::Timeout(_) => (format!("no answer of {host} in time"), false),
        Error::HostNotFound => (format!("the name {host} does not resolve"), false),
        Error::ConnectionFailed => (format!("no connection to {host}"), false),
        Error::Io(error) => {
            let broken =
                matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | NotConnected | UnexpectedEof);
            (format!("{host}: {error}"), broken)
        }
        Error::Rustls(error) => (format!("no TLS connection to {host}: {error}"), false),
        Error::Tls(error) => (format!("no TLS connection to {host}: {error}"), false),
        // The others may quote what was sent or received.
        _ => (format!("the answer of {host} is not HTTP"), false),
    };
    NoAnswer { why, broken }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn an_endpoint_is_https_or_on_this_machine() {
        for (url, authority) in [
            ("https://kms.cn-hangzhou.aliyuncs.com", "kms.cn-hangzhou.aliyuncs.com"),
            ("https://kst-1.cryptoservice.kms.aliyuncs.com/", "kst-1.cryptoservice.kms.aliyuncs.com"),
            ("http://127.0.0.1:8080", "127.0.0.1:8080"),
            ("http://[::1]:8080", "[::1]:8080"),
        ] {
            assert_eq!(Endpoint::parse(url).unwrap().authority, authority);
        }
        for url in [
            "http://kms.cn-hangzhou.aliyuncs.com",
            "http://localhost:1",
            "http://127.0.0.1.evil.example",
            "ftp://127.0.0.1",
            "https://user:secret@host",
            "https://host/path",
            "https://host?query",
            "kms.cn-hangzhou.aliyuncs.com",
            "/",
            "",
        ] {
            let refused = Endpoint::parse(url).unwrap_err();
            assert!(!refused.contains("secret"), "{refused}");
        }
    }
}
