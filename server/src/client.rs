//! Signs requests, for programs that call the service: the command line does.

use std::{path::Path, time::SystemTime};

pub use hyper::Method;
use hyper::Request;
use jiff::Timestamp;
use rand::{TryRng, rngs::SysRng};
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::{
    auth::{self, KeysError, sign_v4},
    call::Call,
};

/// An access key.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// The id.
    pub id: String,
    /// The secret. Wiped on drop.
    pub secret: Zeroizing<String>,
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Key").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Key {
    /// Reads a key from a file with the JSON `{"id": "…", "secret": "…"}`. The file must belong to
    /// the user of this process or to root, with mode 0600. Blocks for file I/O.
    ///
    /// # Errors
    /// As [`KeysError`] says.
    pub fn load(path: &Path) -> Result<Self, KeysError> {
        auth::read_private(path)
    }
}

/// A random value for [`sign`].
///
/// # Errors
/// The system has no randomness.
pub fn nonce() -> std::io::Result<String> {
    let mut bytes = [0; 16];
    SysRng.try_fill_bytes(&mut bytes).map_err(std::io::Error::other)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The headers that sign a request of JSON to a path without parameters, by version 4 of the
/// signature. `host` is the value of the header `Host`, and `nonce` is random: it makes the
/// signature different from every other. Empty if the path or the host is not valid.
pub fn sign(
    key: &Key,
    method: &Method,
    host: &str,
    path: &str,
    nonce: &str,
    body: &[u8],
    now: SystemTime,
) -> Vec<(&'static str, String)> {
    let date = Timestamp::try_from(now)
        .map_or_else(|_| String::new(), |time| time.strftime("%Y%m%dT%H%M%SZ").to_string());
    let mut headers = vec![
        ("content-type", "application/json".to_owned()),
        ("x-log-apiversion", "0.6.0".to_owned()),
        ("x-log-bodyrawsize", body.len().to_string()),
        ("x-log-content-sha256", crate::auth::sha256_hex(body)),
        ("x-log-date", date),
        ("x-log-nonce", nonce.to_owned()),
    ];
    let mut request = Request::builder().method(method).uri(path).header("host", host);
    for (name, value) in &headers {
        request = request.header(*name, value);
    }
    let Ok(request) = request.body(()) else { return Vec::new() };
    // The name of this host alone is the base: the signature does not depend on it.
    let bare = host.rsplit_once(':').map_or(host, |(host, _)| host).to_ascii_lowercase();
    let Ok(call) = Call::new(request.into_parts().0, &bare) else { return Vec::new() };
    headers.push(("authorization", sign_v4(&call, &key.id, key.secret.as_bytes())));
    headers
}
