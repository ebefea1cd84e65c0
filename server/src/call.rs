//! A call of the API: the signed parts of a request, which decide its effect.

use std::net::IpAddr;

use hyper::{HeaderMap, Method, Uri, http::request::Parts};
use percent_encoding::percent_decode_str;

use crate::error::{ApiError, Result};

/// The most parameters of a query.
const PARAMETERS_MAX: usize = 64;

/// A request without its body.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) method: Method,
    /// The host that the client asked for, as it sent it.
    pub(crate) host: String,
    /// The project in the host.
    pub(crate) project: Option<String>,
    /// The path, decoded.
    pub(crate) path: String,
    /// The parts of the path, decoded one by one.
    pub(crate) segments: Vec<String>,
    /// The parameters, decoded, in the order of their names. No name comes twice.
    pub(crate) query: Vec<(String, String)>,
    pub(crate) headers: HeaderMap,
}

impl Call {
    /// # Errors
    /// 400 for a path or a query that is not UTF-8, and for a parameter that comes twice.
    pub(crate) fn new(parts: Parts, base_host: &str) -> Result<Self> {
        let host = host(&parts.headers, &parts.uri).to_owned();
        let raw = parts.uri.path();
        let mut segments: Vec<String> =
            raw.split('/').skip(1).map(decode).collect::<Result<_>>()?;
        if segments.last().is_some_and(String::is_empty) {
            segments.pop();
        }
        Ok(Self {
            project: project_of(&host, base_host)?,
            host,
            path: decode(raw)?,
            segments,
            query: parse_query(parts.uri.query().unwrap_or_default())?,
            method: parts.method,
            headers: parts.headers,
        })
    }

    /// A parameter. One without a value counts as absent, since clients send such.
    pub(crate) fn parameter(&self, name: &str) -> Option<&str> {
        let found = self.query.iter().find(|(it, _)| it == name)?;
        (!found.1.is_empty()).then_some(&*found.1)
    }

    /// A parameter that must be there.
    pub(crate) fn required(&self, name: &str) -> Result<&str> {
        let missing = || ApiError::parameter(format!("the parameter {name} is missing"));
        self.parameter(name).ok_or_else(missing)
    }

    /// A parameter that is a number within a range.
    pub(crate) fn number(&self, name: &str, default: u64, max: u64) -> Result<u64> {
        let Some(text) = self.parameter(name) else { return Ok(default) };
        let number = text.parse().ok().filter(|&number| number <= max);
        number.ok_or_else(|| ApiError::parameter(format!("{name} must be a number up to {max}")))
    }

    /// A parameter that is `true` or `false`, in any case.
    pub(crate) fn flag(&self, name: &str) -> Result<bool> {
        match self.parameter(name) {
            None => Ok(false),
            Some(text) if text.eq_ignore_ascii_case("true") => Ok(true),
            Some(text) if text.eq_ignore_ascii_case("false") => Ok(false),
            Some(_) => Err(ApiError::parameter(format!("{name} must be true or false"))),
        }
    }

    /// A header as text. Without those that are no text.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

/// The host that a client asks for. Empty if it names none.
pub(crate) fn host<'a>(headers: &'a HeaderMap, uri: &'a Uri) -> &'a str {
    let header = headers.get(hyper::header::HOST).and_then(|host| host.to_str().ok());
    let authority = uri.authority().map(|authority| authority.as_str());
    header.or(authority).unwrap_or_default()
}

fn decode(text: &str) -> Result<String> {
    let decoded = percent_decode_str(text).decode_utf8();
    decoded.map(Into::into).map_err(|_| ApiError::parameter("the path is not UTF-8"))
}

fn parse_query(text: &str) -> Result<Vec<(String, String)>> {
    // The decoder would replace bytes that are not UTF-8.
    let utf8 = percent_decode_str(text).decode_utf8().is_ok();
    if !utf8 || text.split('&').count() > PARAMETERS_MAX {
        return Err(ApiError::parameter("the query is not UTF-8, or has too many parameters"));
    }
    let mut query: Vec<(String, String)> =
        form_urlencoded::parse(text.as_bytes()).into_owned().collect();
    query.sort();
    // A signature covers all of them, but which one counts would be a guess.
    if let Some(twice) = query.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(ApiError::parameter(format!("the parameter {} comes twice", twice[0].0)));
    }
    Ok(query)
}

/// The project in a host: the label in front of the base name, or of an address of this machine.
///
/// # Errors
/// 400 for a host that is not the service's.
pub(crate) fn project_of(host: &str, base_host: &str) -> Result<Option<String>> {
    let without_port = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    };
    let name = without_port.to_ascii_lowercase();
    let is_base = |name: &str| {
        let address = name.trim_start_matches('[').trim_end_matches(']');
        name == base_host || name == "localhost" || address.parse::<IpAddr>().is_ok()
    };
    if is_base(&name) {
        return Ok(None);
    }
    match name.split_once('.') {
        Some((project, rest)) if is_base(rest) => Ok(Some(project.to_owned())),
        _ => Err(ApiError::parameter(format!(
            "the host is neither {base_host} nor PROJECT.{base_host}: check the endpoint, or --base-host"
        ))),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use hyper::Request;

    use super::*;

    fn call(uri: &str, host: &str) -> Result<Call> {
        let request = Request::builder().uri(uri).header("Host", host).body(()).unwrap();
        Call::new(request.into_parts().0, "sls.local")
    }

    #[test]
    fn the_project_is_the_label_in_front_of_the_base_host() {
        for (host, project) in [
            ("sls.local", None),
            ("sls.local:8099", None),
            ("Demo.SLS.local:8099", Some("demo")),
            ("127.0.0.1:80", None),
            ("p.127.0.0.1", Some("p")),
            ("p.localhost:8099", Some("p")),
            ("[::1]:8099", None),
        ] {
            assert_eq!(call("/", host).unwrap().project.as_deref(), project, "{host}");
        }
        for host in ["", "other.example", "a.b.sls.local", "sls.local.evil"] {
            assert_eq!(call("/", host).unwrap_err().code, "ParameterInvalid", "{host}");
        }
        // A proxy sends the whole URI, and with it a host.
        let absolute = call("http://p.sls.local:8099/logstores?", "p.sls.local").unwrap();
        assert_eq!((&*absolute.path, absolute.segments.len()), ("/logstores", 1));
    }

    #[test]
    fn path_and_query_are_decoded_once() {
        let call = call("/a/g%20v4%2F?consumer=c+1%2F%C3%A9&size=&b=%2541", "sls.local").unwrap();
        assert_eq!(call.segments, ["a", "g v4/"]);
        assert_eq!(call.path, "/a/g v4/");
        assert_eq!(call.parameter("consumer"), Some("c 1/é"));
        assert_eq!(call.parameter("b"), Some("%41"));
        assert_eq!((call.parameter("size"), call.number("size", 7, 9).unwrap()), (None, 7));
    }

    #[test]
    fn a_parameter_that_comes_twice_or_is_no_utf8_is_refused() {
        for uri in ["/?a=1&a=2", "/?a=%ff", "/%ff"] {
            assert_eq!(call(uri, "sls.local").unwrap_err().status, 400, "{uri}");
        }
    }
}
