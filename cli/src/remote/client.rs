//! The side of the command line: sends a command to a service, and prints what comes back.

use std::{
    env,
    io::{BufRead, BufReader, Read},
    net::IpAddr,
    path::Path,
    sync::{
        Arc,
        mpsc::{RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::{Duration, SystemTime},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use envelog_server::client::{Key, Method, nonce, sign};
use rustls::{
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, pem::PemObject},
};
use serde::Deserialize;
use ureq::{
    Agent, Body,
    http::{Response, Uri},
    tls::{Certificate, RootCerts, TlsConfig},
};

use super::host::Request;
use crate::{
    args::Global,
    call::Call,
    commands::keys::write_new,
    exit::{Failure, Result, Status},
    input,
    output::{self, End, Piece, Progress, Step},
};

const PATH: &str = "/admin";
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the service may take to accept a command.
const ACCEPT_TIME_MAX: Duration = Duration::from_secs(60);
/// How long the service may be silent: it sends something every ten seconds.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// The longest line of an answer, in bytes. The whole audit log may be one.
const LINE_BYTES_MAX: u64 = 64 << 20;
const SIGN_AGAIN_AFTER: Duration = Duration::from_millis(1100);
const REFUSAL_BYTES_MAX: u64 = 64 << 10;
const ID_VARIABLE: &str = "ENVELOG_ACCESS_KEY_ID";
const SECRET_VARIABLE: &str = "ENVELOG_ACCESS_KEY_SECRET";

/// A service, and the key with which this process asks it.
pub(crate) struct Service {
    url: String,
    /// Without the port.
    host: String,
    key: Key,
    agent: Agent,
    json: bool,
}

impl Service {
    pub(crate) fn new(endpoint: &str, global: &Global) -> Result<Self> {
        let (url, host) = address(endpoint)?;
        let key = key(global.access_key.as_deref())?;
        let roots = match &global.ca {
            Some(path) => RootCerts::Specific(Arc::new(certificates(path)?)),
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
            .proxy(None)
            .timeout_connect(Some(CONNECT_TIME_MAX))
            .timeout_recv_response(Some(ACCEPT_TIME_MAX))
            .user_agent(concat!("envelog/", env!("CARGO_PKG_VERSION")))
            .accept("")
            .tls_config(tls)
            .build();
        let agent = Agent::new_with_config(config);
        Ok(Self { url, host, key, agent, json: global.json.unwrap_or(false) })
    }

    /// Has the service run a command, and prints its output as if it ran here.
    pub(crate) fn run(self, call: Call) -> Result {
        output::escape_all();
        // Refuse here what needs no service to check.
        call.logstore()?;
        let request = Request { call, json: self.json };
        let body = serde_json::to_vec(&request)
            .map_err(|error| Failure::usage(format!("the arguments are no text: {error}")))?;
        let response = self.send(&body).or_else(|refusal| match refusal {
            // A service admits what was signed after the second in which it started.
            Refusal::Expired => {
                thread::sleep(SIGN_AGAIN_AFTER);
                self.send(&body)
            }
            refusal => Err(refusal),
        });
        let response = response.map_err(Refusal::into_failure)?;
        let lines = Lines::of(response)?;
        let mut printer = Printer::default();
        while let Some(line) = lines.next()? {
            match serde_json::from_str(&line) {
                Ok(Piece::End(end)) => return printer.end(end, &request),
                Ok(piece) => printer.print(piece, request.call.out())?,
                Err(error) => {
                    let why = format!("the answer of the service is not as expected: {error}");
                    return Err(Failure::other(why));
                }
            }
        }
        Err(broken("the service ended the connection"))
    }

    fn send(&self, body: &[u8]) -> std::result::Result<Response<Body>, Refusal> {
        let nonce = nonce().map_err(|error| Failure::other(format!("no randomness: {error}")))?;
        let now = SystemTime::now();
        let headers = sign(&self.key, &Method::POST, &self.host, PATH, &nonce, body, now);
        let mut request = self.agent.post(&self.url);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let response = request.send(body).map_err(|error| {
            let message = format!("no answer from the service at {}: {error}", self.url);
            Failure::new(Status::Unavailable, "service_unreachable", message)
        })?;
        if response.status() == 200 { Ok(response) } else { Err(refusal(response)) }
    }
}

/// Why a service does not run a command.
enum Refusal {
    /// It was signed before the service started.
    Expired,
    Other(Failure),
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        Self::Other(failure)
    }
}

impl Refusal {
    fn into_failure(self) -> Failure {
        match self {
            Self::Expired => Failure::refused(
                "access_refused",
                "the service takes the request for one from before its start: check the clock of this machine",
            ),
            Self::Other(failure) => failure,
        }
    }
}

/// The URL of the administration, and its host without the port. Plain HTTP goes to this machine
/// alone: an answer over a network must come from the service.
fn address(endpoint: &str) -> Result<(String, String)> {
    let wrong = |why: &str| Failure::usage(format!("--endpoint {why}"));
    let uri: Uri = endpoint.parse().map_err(|_| wrong("is not a URL"))?;
    let authority = uri.authority().ok_or_else(|| wrong("is not a URL with a host"))?;
    if authority.as_str().contains('@') || !matches!(uri.path(), "" | "/") || uri.query().is_some()
    {
        return Err(wrong("is a scheme, a host and a port, and nothing more"));
    }
    let host = authority.host().to_ascii_lowercase();
    // What follows the host must be a port, which the parser of URLs does not check.
    let port = &authority.as_str()[host.len()..];
    if host.is_empty()
        || !(port.is_empty() || authority.port_u16().is_some_and(|number| number > 0))
    {
        return Err(wrong("needs a host, and a port from 1 to 65535 if there is a colon"));
    }
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let is_here =
        bare == "localhost" || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    match uri.scheme_str() {
        Some("https") => {}
        Some("http") if is_here => {}
        Some("http") => return Err(wrong("must be https: off this machine")),
        _ => return Err(wrong("must be an https: URL")),
    }
    let scheme = uri.scheme_str().unwrap_or_default();
    Ok((format!("{scheme}://{host}{port}{PATH}"), host))
}

/// The access key: from the file, or from the environment.
fn key(file: Option<&Path>) -> Result<Key> {
    if let Some(path) = file {
        return Key::load(path).map_err(|error| Failure::refused("access_key", error.to_string()));
    }
    match (env::var(ID_VARIABLE), env::var(SECRET_VARIABLE)) {
        (Ok(id), Ok(secret)) => Ok(Key { id, secret: secret.into() }),
        _ => Err(Failure::usage(format!(
            "--endpoint needs an access key: give --access-key FILE, or {ID_VARIABLE} and {SECRET_VARIABLE}"
        ))),
    }
}

fn certificates(path: &Path) -> Result<Vec<Certificate<'static>>> {
    let refused = |why: &str| Failure::refused("ca", format!("{} {why}", path.display()));
    let pem = input::read_text(path)?;
    let ders: std::result::Result<Vec<_>, _> =
        CertificateDer::pem_slice_iter(pem.as_bytes()).collect();
    let ders = ders.map_err(|_| refused("is not a list of certificates in PEM"))?;
    if ders.is_empty() {
        return Err(refused("has no certificate"));
    }
    Ok(ders.iter().map(|der| Certificate::from_der(der).to_owned()).collect())
}

/// The error of a service that does not run the command.
fn refusal(response: Response<Body>) -> Refusal {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer {
        error_code: String,
        error_message: String,
    }
    let status = response.status().as_u16();
    let mut text = String::new();
    let read = response.into_body().into_reader().take(REFUSAL_BYTES_MAX).read_to_string(&mut text);
    let answer = read.ok().and_then(|_| serde_json::from_str::<Answer>(&text).ok());
    let Some(Answer { error_code, error_message }) = answer else {
        return Failure::other(format!("the service answers with status {status}")).into();
    };
    if error_code == "RequestTimeExpired" {
        return Refusal::Expired;
    }
    let message = format!("the service refuses the command: {error_message} ({error_code})");
    let failure = match status {
        400 => Failure::usage(message),
        401 | 403 => Failure::refused("access_refused", message),
        503 => Failure::new(Status::Unavailable, "service_busy", message),
        _ => Failure::other(message),
    };
    failure.into()
}

fn broken(why: &str) -> Failure {
    let message = format!(
        "{why} before the end of the command: it may go on there, or not be done; `keys audit` shows whether it began, `status` what is now"
    );
    Failure::new(Status::Unavailable, "service_unreachable", message)
}

/// The lines of an answer, read by a thread of their own, since a read has no time limit.
struct Lines(std::sync::mpsc::Receiver<std::io::Result<String>>);

impl Lines {
    fn of(response: Response<Body>) -> Result<Self> {
        let (sender, receiver) = sync_channel(1);
        let read = move || read_lines(response, &sender);
        thread::Builder::new()
            .name("answer".to_owned())
            .spawn(read)
            .map_err(|error| Failure::other(format!("cannot start a thread: {error}")))?;
        Ok(Self(receiver))
    }

    /// The next line that is not empty. `None` at the end.
    fn next(&self) -> Result<Option<String>> {
        loop {
            match self.0.recv_timeout(SILENCE_MAX) {
                Ok(Ok(line)) if line.trim().is_empty() => {}
                Ok(Ok(line)) => return Ok(Some(line)),
                Ok(Err(error)) => return Err(broken(&format!("the connection broke ({error})"))),
                Err(RecvTimeoutError::Timeout) => return Err(broken("the service is silent")),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
    }
}

fn read_lines(response: Response<Body>, sender: &SyncSender<std::io::Result<String>>) {
    let mut reader = BufReader::new(response.into_body().into_reader());
    loop {
        let mut line = String::new();
        let read = (&mut reader).take(LINE_BYTES_MAX + 1).read_line(&mut line);
        let read = read.and_then(|_| match line.len() as u64 {
            ..=LINE_BYTES_MAX => Ok(line.len()),
            _ => Err(too_long()),
        });
        let sent = match read {
            Ok(0) => return,
            Ok(_) => sender.send(Ok(line)),
            Err(error) => {
                let _ = sender.send(Err(error));
                return;
            }
        };
        if sent.is_err() {
            return;
        }
    }
}

fn too_long() -> std::io::Error {
    let mib = LINE_BYTES_MAX >> 20;
    let why = format!("a line has more than {mib} MiB; `keys audit --out FILE` has shorter ones");
    std::io::Error::other(why)
}

/// Prints the output of a command that runs elsewhere.
#[derive(Default)]
struct Printer {
    /// The bar, with the total that it was made for.
    progress: Option<(Step, Progress)>,
    /// The file that the command makes, as far as it has come.
    file: Option<Vec<u8>>,
    has_file: bool,
    has_answer: bool,
    has_text: bool,
}

impl Printer {
    fn print(&mut self, piece: Piece, out: Option<&Path>) -> Result {
        if let Piece::Progress(step) = piece {
            self.show(step);
            return Ok(());
        }
        if let Piece::File(part) = piece {
            let part = STANDARD.decode(part);
            let part = part.map_err(|error| Failure::other(format!("no base64: {error}")))?;
            self.file.get_or_insert_default().extend(part);
            self.has_file = true;
            return Ok(());
        }
        self.progress = None;
        self.write_file(out)?;
        self.has_answer |= matches!(piece, Piece::Answer(_));
        self.has_text |= matches!(piece, Piece::Line(_) | Piece::Table(_) | Piece::WideTable(_));
        match piece {
            Piece::Line(text) => output::line(text),
            Piece::Answer(json) => output::json_of_text(json.get()),
            Piece::Note(text) => {
                output::notice(text);
                Ok(())
            }
            Piece::Table(table) => output::print_table(&table),
            Piece::WideTable(table) => output::print_wide_table(&table),
            Piece::Progress(_) | Piece::File(_) | Piece::End(_) => Ok(()),
        }
    }

    fn end(mut self, end: End, request: &Request) -> Result {
        self.progress = None;
        self.write_file(request.call.out())?;
        end.result()?;
        let is_whole = match &request.call {
            call if call.out().is_some() => self.has_file,
            _ if request.json => self.has_answer,
            // As text, a store without Logstores may need no word.
            Call::List | Call::Status(_) => true,
            _ => self.has_answer || self.has_text,
        };
        if is_whole {
            return Ok(());
        }
        Err(Failure::other("the service says that the command is done, and has sent no answer"))
    }

    fn show(&mut self, step: Step) {
        let is_new = self.progress.as_ref().is_none_or(|(at, _)| at.total != step.total);
        if is_new {
            let bar = match step.unit.as_str() {
                "bytes" => Progress::bytes(step.total),
                _ => Progress::steps(step.total.unwrap_or_default()),
            };
            self.progress = Some((step.clone(), bar));
        }
        if let Some((_, bar)) = &self.progress {
            bar.set(step.done);
            if !step.at.is_empty() {
                bar.say(step.at);
            }
        }
    }

    /// Writes the file, once all of it has come, under the name that the arguments have.
    fn write_file(&mut self, out: Option<&Path>) -> Result {
        match (self.file.take(), out) {
            (Some(bytes), Some(path)) => write_new(path, &bytes),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn an_endpoint_is_https_or_on_this_machine() {
        for (endpoint, url, host) in [
            ("https://logs.example.org", "https://logs.example.org/admin", "logs.example.org"),
            ("https://l.example:444/", "https://l.example:444/admin", "l.example"),
            ("http://127.0.0.1:8099", "http://127.0.0.1:8099/admin", "127.0.0.1"),
            ("http://[::1]:8099", "http://[::1]:8099/admin", "[::1]"),
            ("http://localhost:1", "http://localhost:1/admin", "localhost"),
            ("HTTPS://Logs.Example:65535", "https://logs.example:65535/admin", "logs.example"),
            ("Http://LOCALHOST", "http://localhost/admin", "localhost"),
        ] {
            let (found_url, found_host) = address(endpoint).unwrap();
            assert_eq!((&*found_url, &*found_host), (url, host));
        }
        for endpoint in [
            "http://logs.example.org",
            "http://127.0.0.1.evil.example",
            "ftp://127.0.0.1",
            "https://user:secret@host",
            "https://host/path",
            "https://host?query",
            "logs.example.org",
            "",
            "http://127.0.0.1:99999",
            "http://127.0.0.1:65536",
            "http://127.0.0.1:0",
            "http://127.0.0.1:",
            "https://host:-1",
            "https://host:1:2",
            "https://:1",
        ] {
            let refused = address(endpoint).unwrap_err();
            assert_eq!(refused.status(), Status::Usage, "{endpoint}");
            assert!(!refused.to_string().contains("secret"), "{refused}");
        }
    }
}
