//! A simulated Alibaba Cloud KMS and STS, since no emulator exists. It verifies every signature
//! itself, issues credentials of roles, and really encrypts, under keys that have states and
//! versions. It returns the errors that the official documentation lists, and any answer that a
//! test configures.
//!
//! `tests/kms_aliyun.rs` checks its signatures against the official SDK. Other packages include
//! this file by path.

#![allow(dead_code, clippy::unwrap_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, SystemTime},
};

use aes_gcm::{
    Aes256Gcm, Nonce,
    aead::{Aead, KeyInit, Payload},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, Mac};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The access key that the service logs in with.
pub(crate) const SERVICE_ID: &str = "LTAI-service";
pub(crate) const SERVICE_SECRET: &str = "secret-of-the-service";
/// The pod token that the simulation accepts.
pub(crate) const OIDC_TOKEN: &str = "token-of-the-pod";
pub(crate) const REGION: &str = "cn-hangzhou";
pub(crate) const ROLE: &str = "acs:ram::13234:role/logsource";

/// A behaviour that replaces the normal answer.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// Sends this status and body.
    Answer(u16, String),
    /// Sends these bytes unchanged and closes the connection.
    Raw(Vec<u8>),
    /// Sends one byte of an answer every 50 ms.
    Trickle,
    /// Sends nothing for as long as the client waits.
    Hang,
    /// Closes the connection.
    Close,
}

/// An error in the format of the real services.
pub(crate) fn error_body(status: u16, code: &str) -> String {
    json!({ "HttpStatus": status, "Code": code, "Message": format!("the words of {code}"), "RequestId": "A1B2-C3" })
        .to_string()
}

impl Fault {
    pub(crate) fn code(status: u16, code: &str) -> Self {
        Self::Answer(status, error_body(status, code))
    }
}

/// A received request.
#[derive(Clone, Debug)]
pub(crate) struct Seen {
    pub(crate) action: String,
    /// The request line's target.
    pub(crate) target: String,
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
    pub(crate) query: BTreeMap<String, String>,
    /// In its canonical form.
    pub(crate) canonical_query: String,
}

struct Key {
    state: &'static str,
    versions: Vec<[u8; 32]>,
    granted: BTreeSet<String>,
}

struct Session {
    secret: String,
    token: String,
    role: String,
}

struct State {
    keys: BTreeMap<String, Key>,
    /// The number of keys created so far.
    created: usize,
    /// The existing roles, and whether each trusts the service.
    roles: BTreeMap<String, bool>,
    sessions: BTreeMap<String, Session>,
    /// The sessions that `AssumeRole` refuses, each with this status and code.
    refused: BTreeMap<String, (u16, &'static str)>,
    nonces: BTreeSet<String>,
    faults: BTreeMap<String, Fault>,
    seen: Vec<Seen>,
    /// The plaintext keys returned so far, in base64.
    plaintexts: Vec<String>,
    streams: Vec<TcpStream>,
    /// Whether old dates and nonces are accepted, which the tests make the SDK send.
    timeless: bool,
    /// The delay of each answer.
    delay: Duration,
}

/// The simulation. Its threads end with the process.
#[derive(Clone)]
pub(crate) struct Aliyun {
    address: SocketAddr,
    state: Arc<Mutex<State>>,
}

impl Aliyun {
    /// Starts the simulation with [`ROLE`], which trusts the service.
    pub(crate) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let state = State {
            keys: BTreeMap::new(),
            created: 0,
            roles: BTreeMap::from([(ROLE.to_owned(), true)]),
            sessions: BTreeMap::new(),
            refused: BTreeMap::new(),
            nonces: BTreeSet::new(),
            faults: BTreeMap::new(),
            seen: Vec::new(),
            plaintexts: Vec::new(),
            streams: Vec::new(),
            timeless: false,
            delay: Duration::ZERO,
        };
        let it =
            Self { address: listener.local_addr().unwrap(), state: Arc::new(Mutex::new(state)) };
        let serving = it.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (serving, stream) = (serving.clone(), stream.unwrap());
                serving.state().streams.push(stream.try_clone().unwrap());
                // Ignore errors of a client that disconnects.
                thread::spawn(move || drop(serving.serve(&stream)));
            }
        });
        it
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// The value for `--kms`.
    pub(crate) fn kms_url(&self) -> String {
        format!("aliyun-kms://{REGION}?endpoint={0}&sts-endpoint={0}", self.endpoint())
    }

    /// Creates a key that [`ROLE`] may use.
    pub(crate) fn create_key(&self) -> String {
        let mut state = self.state();
        state.created += 1;
        let id = format!("key-hzz{:08}", state.created);
        let key = Key {
            state: "Enabled",
            versions: vec![random()],
            granted: BTreeSet::from([ROLE.to_owned()]),
        };
        state.keys.insert(id.clone(), key);
        id
    }

    /// Sets the state of a key: `Enabled`, `Disabled`, `PendingDeletion`, `PendingImport`,
    /// `Unavailable`.
    pub(crate) fn set_state(&self, key: &str, to: &'static str) {
        self.state().keys.get_mut(key).unwrap().state = to;
    }

    pub(crate) fn rotate(&self, key: &str) {
        self.state().keys.get_mut(key).unwrap().versions.push(random());
    }

    pub(crate) fn delete(&self, key: &str) {
        self.state().keys.remove(key).unwrap();
    }

    pub(crate) fn ungrant(&self, key: &str) {
        self.state().keys.get_mut(key).unwrap().granted.clear();
    }

    /// Lets [`ROLE`] use the key again.
    pub(crate) fn grant(&self, key: &str) {
        self.state().keys.get_mut(key).unwrap().granted.insert(ROLE.to_owned());
    }

    /// Sets whether [`ROLE`] trusts the service; `None` removes the role.
    pub(crate) fn set_role(&self, trusts: Option<bool>) {
        let mut state = self.state();
        state.roles.remove(ROLE);
        state.roles.extend(trusts.map(|trusts| (ROLE.to_owned(), trusts)));
    }

    /// Sets the fault for all further calls of the action; `None` restores the normal answer.
    pub(crate) fn set_fault(&self, action: &str, fault: Option<Fault>) {
        let mut state = self.state();
        state.faults.remove(action);
        state.faults.extend(fault.map(|fault| (action.to_owned(), fault)));
    }

    pub(crate) fn set_delay(&self, delay: Duration) {
        self.state().delay = delay;
    }

    /// Accepts dates and nonces that were used before.
    pub(crate) fn set_timeless(&self) {
        self.state().timeless = true;
    }

    /// Takes the requests received since the previous call.
    pub(crate) fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state().seen)
    }

    /// The number of connections accepted so far.
    pub(crate) fn connections(&self) -> usize {
        self.state().streams.len()
    }

    /// Closes every connection, as a server does with idle connections.
    pub(crate) fn close_connections(&self) {
        for stream in &self.state().streams {
            // Some connections are closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Adds a session of a role, as if `AssumeRole` had created it.
    pub(crate) fn add_session(&self, id: &str, secret: &str, token: &str) {
        let session =
            Session { secret: secret.to_owned(), token: token.to_owned(), role: ROLE.to_owned() };
        self.state().sessions.insert(id.to_owned(), session);
    }

    /// Makes `AssumeRole` refuse the sessions that exist now, as after a role was replaced.
    pub(crate) fn refuse_sessions(&self, status: u16, code: &'static str) {
        let mut state = self.state();
        state.refused = state.sessions.keys().map(|id| (id.clone(), (status, code))).collect();
    }

    /// The secrets issued so far.
    pub(crate) fn secrets(&self) -> Vec<String> {
        let state = self.state();
        state
            .sessions
            .values()
            .flat_map(|it| [it.secret.clone(), it.token.clone()])
            .chain(state.plaintexts.clone())
            .collect()
    }

    fn serve(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream);
        while let Some((seen, method)) = read_request(&mut reader)? {
            let (delay, fault) = {
                let mut state = self.state();
                state.seen.push(seen.clone());
                (state.delay, state.faults.get(&seen.action).cloned())
            };
            thread::sleep(delay);
            let (status, body) = match fault {
                None => self
                    .answer(&method, &seen)
                    .map_or_else(|(status, body)| (status, body), |body| (200, body.to_string())),
                Some(Fault::Answer(status, body)) => (status, body),
                Some(Fault::Raw(bytes)) => {
                    (&*stream).write_all(&bytes)?;
                    return stream.shutdown(Shutdown::Both);
                }
                Some(Fault::Trickle) => return trickle(stream),
                Some(Fault::Hang) => {
                    let mut rest = Vec::new();
                    return reader.read_to_end(&mut rest).map(drop);
                }
                Some(Fault::Close) => return stream.shutdown(Shutdown::Both),
            };
            let head = format!(
                "HTTP/1.1 {status} OK\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                body.len()
            );
            (&*stream).write_all(&[head.as_bytes(), body.as_bytes()].concat())?;
        }
        Ok(())
    }

    fn answer(&self, method: &str, seen: &Seen) -> Result<Value, (u16, String)> {
        let refuse = |status, code: &str| (status, error_body(status, code));
        let mut state = self.state();
        if method != "POST" {
            return Err(refuse(403, "UnsupportedHTTPMethod"));
        }
        if seen.action == "AssumeRoleWithOIDC" {
            let form = pairs(&String::from_utf8_lossy(&seen.body));
            let is = |name: &str, value: &str| form.get(name).is_some_and(|it| it == value);
            if !is("OIDCToken", OIDC_TOKEN)
                || !is("OIDCProviderArn", "acs:ram::1:oidc-provider/ack")
            {
                return Err(refuse(400, "AuthenticationFail.OIDCToken.Invalid"));
            }
            return Ok(issue(&mut state, form.get("RoleArn").map_or("", String::as_str)));
        }
        let caller =
            authenticate(&mut state, seen).map_err(|(status, code)| refuse(status, code))?;
        let parameter = |name: &str| {
            seen.query.get(name).cloned().ok_or_else(|| refuse(400, "MissingParameter"))
        };
        match seen.action.as_str() {
            "AssumeRole" => {
                let authorization = &seen.headers["authorization"];
                let signer = authorization.split(['=', ',']).nth(1).unwrap_or_default();
                if let Some(&(status, code)) = state.refused.get(signer) {
                    return Err(refuse(status, code));
                }
                let arn = parameter("RoleArn")?;
                if parameter("RoleSessionName")?.len() < 2 || parameter("DurationSeconds")? != "900"
                {
                    return Err(refuse(400, "InvalidParameter.DurationSeconds"));
                }
                if !arn.starts_with("acs:ram::") {
                    return Err(refuse(400, "InvalidParameter.RoleArn"));
                }
                match state.roles.get(&arn) {
                    None => Err(refuse(404, "EntityNotExist.Role")),
                    Some(false) => Err(refuse(403, "NoPermission")),
                    Some(true) => Ok(issue(&mut state, &arn)),
                }
            }
            "GenerateDataKey" => {
                let id = parameter("KeyId")?;
                let key =
                    usable(&state, &id, &caller).map_err(|(status, code)| refuse(status, code))?;
                if parameter("KeySpec")? != "AES_256" {
                    return Err(refuse(400, "InvalidParameter"));
                }
                let plaintext = random();
                let version = key.versions.len() - 1;
                let mut blob = format!("{id} {version} ").into_bytes();
                let nonce: [u8; 12] = *random().first_chunk().unwrap();
                let aad = context(seen).map_err(|()| refuse(400, "InvalidParameter"))?;
                let sealed = Aes256Gcm::new_from_slice(&key.versions[version])
                    .unwrap()
                    .encrypt(&Nonce::from(nonce), Payload { msg: &plaintext, aad: aad.as_bytes() })
                    .unwrap();
                blob.extend_from_slice(&nonce);
                blob.extend_from_slice(&sealed);
                state.plaintexts.push(STANDARD.encode(plaintext));
                Ok(json!({
                    "KeyId": id, "KeyVersionId": version.to_string(), "RequestId": "A1B2-C3",
                    "CiphertextBlob": STANDARD.encode(blob), "Plaintext": STANDARD.encode(plaintext),
                }))
            }
            "Decrypt" => {
                let blob = parameter("CiphertextBlob")?;
                let (id, version, nonce, sealed) =
                    open(&blob).ok_or_else(|| refuse(400, "InvalidParameter"))?;
                let key =
                    usable(&state, &id, &caller).map_err(|(status, code)| refuse(status, code))?;
                let aad = context(seen).map_err(|()| refuse(400, "InvalidParameter"))?;
                let plaintext = key
                    .versions
                    .get(version)
                    .and_then(|material| {
                        let payload = Payload { msg: &sealed, aad: aad.as_bytes() };
                        Aes256Gcm::new_from_slice(material)
                            .unwrap()
                            .decrypt(&Nonce::from(nonce), payload)
                            .ok()
                    })
                    .ok_or_else(|| refuse(400, "InvalidParameter"))?;
                Ok(json!({
                    "KeyId": id, "KeyVersionId": version.to_string(), "RequestId": "A1B2-C3",
                    "Plaintext": STANDARD.encode(plaintext),
                }))
            }
            "DescribeKey" => {
                let id = parameter("KeyId")?;
                let key = permitted(&state, &id, &caller)
                    .map_err(|(status, code)| refuse(status, code))?;
                Ok(
                    json!({ "KeyMetadata": { "KeyId": id, "KeyState": key.state }, "RequestId": "A1B2-C3" }),
                )
            }
            _ => Err(refuse(404, "InvalidAction.NotFound")),
        }
    }
}

fn trickle(mut stream: &TcpStream) -> io::Result<()> {
    stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")?;
    loop {
        stream.write_all(b" ")?;
        thread::sleep(Duration::from_millis(50));
    }
}

/// Issues temporary credentials of a role.
fn issue(state: &mut State, role: &str) -> Value {
    let id = format!("STS.{}", state.sessions.len() + 1);
    let (secret, token) = (hex(&random()), format!("{}+/=", STANDARD.encode(random())));
    let session = Session { secret: secret.clone(), token: token.clone(), role: role.to_owned() };
    state.sessions.insert(id.clone(), session);
    json!({
        "RequestId": "A1B2-C3",
        "Credentials": {
            "AccessKeyId": id, "AccessKeySecret": secret, "SecurityToken": token, "Expiration": "2100-01-01T00:00:00Z",
        },
    })
}

/// Returns the signer of the request: the service (`None`) or a role.
fn authenticate(state: &mut State, seen: &Seen) -> Result<Option<String>, (u16, &'static str)> {
    const INCOMPLETE: (u16, &str) = (400, "IncompleteSignature");
    let header = |name: &str| seen.headers.get(name).map(String::as_str).ok_or(INCOMPLETE);
    let rest =
        header("authorization")?.strip_prefix("ACS3-HMAC-SHA256 Credential=").ok_or(INCOMPLETE)?;
    let (id, rest) = rest.split_once(",SignedHeaders=").ok_or(INCOMPLETE)?;
    let (names, signature) = rest.split_once(",Signature=").ok_or(INCOMPLETE)?;
    let (secret, caller) = match state.sessions.get(id) {
        Some(session) if seen.headers.get("x-acs-security-token") != Some(&session.token) => {
            return Err((400, "InvalidSecurityToken.MismatchWithAccessKey"));
        }
        Some(session) => (session.secret.clone(), Some(session.role.clone())),
        None if id == SERVICE_ID => (SERVICE_SECRET.to_owned(), None),
        None => return Err((404, "InvalidAccessKeyId.NotFound")),
    };
    let signed: BTreeSet<_> = names.split(';').collect();
    let must = |name: &str| name == "host" || name.starts_with("x-acs-");
    let required = [
        "host",
        "x-acs-action",
        "x-acs-content-sha256",
        "x-acs-date",
        "x-acs-signature-nonce",
        "x-acs-version",
    ];
    if !required.iter().all(|name| signed.contains(name))
        || seen.headers.keys().any(|name| must(name) && !signed.contains(name.as_str()))
    {
        return Err(INCOMPLETE);
    }
    let version = if seen.action == "AssumeRole" { "2015-04-01" } else { "2016-01-20" };
    if header("x-acs-version")? != version {
        return Err((404, "InvalidVersion"));
    }
    let body_hash = hex(&Sha256::digest(&seen.body));
    let mut lines = String::new();
    for name in &signed {
        lines += &format!("{name}:{}\n", header(name)?);
    }
    let canonical = format!("POST\n/\n{}\n{lines}\n{names}\n{body_hash}", seen.canonical_query);
    let to_sign = format!("ACS3-HMAC-SHA256\n{}", hex(&Sha256::digest(canonical)));
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
    mac.update(to_sign.as_bytes());
    if header("x-acs-content-sha256")? != body_hash
        || hex(&mac.finalize().into_bytes()) != signature
    {
        return Err((400, "SignatureDoesNotMatch"));
    }
    if !state.timeless {
        let date: jiff::Timestamp =
            header("x-acs-date")?.parse().map_err(|_| (400, "InvalidTimeStamp.Format"))?;
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        if now.abs_diff(date.as_second().try_into().unwrap_or(0)) > 15 * 60 {
            return Err((400, "InvalidTimeStamp.Expired"));
        }
        if !state.nonces.insert(header("x-acs-signature-nonce")?.to_owned()) {
            return Err((400, "SignatureNonceUsed"));
        }
    }
    Ok(caller)
}

type Refused = (u16, &'static str);

fn permitted<'a>(state: &'a State, id: &str, caller: &Option<String>) -> Result<&'a Key, Refused> {
    let key = state.keys.get(id).ok_or((404, "Forbidden.KeyNotFound"))?;
    if caller.as_ref().is_some_and(|role| key.granted.contains(role)) {
        Ok(key)
    } else {
        Err((403, "Forbidden.NoPermission"))
    }
}

fn usable<'a>(state: &'a State, id: &str, caller: &Option<String>) -> Result<&'a Key, Refused> {
    let key = permitted(state, id, caller)?;
    match key.state {
        "Enabled" => Ok(key),
        "Disabled" => Err((409, "Rejected.Disabled")),
        "PendingDeletion" => Err((409, "Rejected.PendingDeletion")),
        "PendingImport" => Err((409, "Rejected.PendingImport")),
        _ => Err((409, "Rejected.Unavailable")),
    }
}

fn open(blob: &str) -> Option<(String, usize, [u8; 12], Vec<u8>)> {
    let blob = STANDARD.decode(blob).ok()?;
    let mut parts = blob.splitn(3, |byte| *byte == b' ');
    let id = String::from_utf8(parts.next()?.to_vec()).ok()?;
    let version = std::str::from_utf8(parts.next()?).ok()?.parse().ok()?;
    let (nonce, sealed) = parts.next()?.split_first_chunk()?;
    Some((id, version, *nonce, sealed.to_vec()))
}

/// The context in canonical form, regardless of order and white space in the request.
fn context(seen: &Seen) -> Result<String, ()> {
    let text = seen.query.get("EncryptionContext").map_or("{}", String::as_str);
    let context: BTreeMap<String, String> = serde_json::from_str(text).map_err(drop)?;
    Ok(format!("{context:?}"))
}

fn read_request(reader: &mut impl BufRead) -> io::Result<Option<(Seen, String)>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace().map(str::to_owned);
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        match line.trim_end().split_once(':') {
            Some((name, value)) => {
                headers.insert(name.to_ascii_lowercase(), value.trim().to_owned())
            }
            None => break,
        };
    }
    let len = headers.get("content-length").and_then(|len| len.parse().ok()).unwrap_or(0);
    let mut body = vec![0; len];
    reader.read_exact(&mut body)?;
    let (path, query) = target.split_once('?').unwrap_or((&target, ""));
    let query = pairs(query);
    let action = headers
        .get("x-acs-action")
        .or(query.get("Action"))
        .cloned()
        .unwrap_or_else(|| path.to_owned());
    let canonical_query = canonical(&query);
    Ok(Some((
        Seen { action, target: target.clone(), headers, body, query, canonical_query },
        method,
    )))
}

fn pairs(text: &str) -> BTreeMap<String, String> {
    let decode =
        |text: &str| percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned();
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (decode(name), decode(value))).collect()
}

fn canonical(query: &BTreeMap<String, String>) -> String {
    const ESCAPED: &AsciiSet =
        &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');
    let encode = |text: &str| utf8_percent_encode(text, ESCAPED).to_string();
    query
        .iter()
        .map(|(name, value)| format!("{}={}", encode(name), encode(value)))
        .collect::<Vec<_>>()
        .join("&")
}

fn random() -> [u8; 32] {
    let mut bytes = [0; 32];
    File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    bytes
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
