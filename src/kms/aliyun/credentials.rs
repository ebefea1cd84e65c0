//! The service's own identity, under which it assumes the customers' roles.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::Deserialize;
use serde_json::Value;
use ureq::http::Uri;
use zeroize::Zeroizing;

use super::{
    exchange,
    sign::{self, Credentials},
};
use crate::{
    io::{Clock, SystemClock, read_configured},
    kms::{
        deadline::Deadline,
        http::{Answer, Http},
        kept::{Fetched, Kept, Login, Own},
    },
};

/// How long fetched credentials are kept before newer ones are looked for. The shortest credentials
/// that a server issues last for 15 minutes.
const FRESH: Duration = Duration::from_secs(5 * 60);
/// The largest profile or token file, in bytes.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// The metadata service of an ECS instance, at a link-local address that only the instance itself
/// can reach.
const INSTANCE_METADATA: &str = "http://100.100.100.200";
/// How long a token of the metadata service is valid, in seconds. Each token is used at once, and
/// at most twice.
const METADATA_TOKEN_SECONDS: &str = "60";

/// Temporary credentials in the form that STS and the metadata service issue.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Issued {
    access_key_id: String,
    access_key_secret: Zeroizing<String>,
    security_token: Zeroizing<String>,
}

impl From<Issued> for Credentials {
    fn from(issued: Issued) -> Self {
        Self {
            id: issued.access_key_id,
            secret: issued.access_key_secret,
            token: Some(issued.security_token),
        }
    }
}

/// The answer to `AssumeRole` and `AssumeRoleWithOIDC`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Assumed {
    pub(super) credentials: Issued,
}

/// Credentials of the service's own, and the time by which the service had them.
pub(super) struct ServiceLogin {
    pub(super) credentials: Credentials,
    since: Duration,
}

impl From<Credentials> for ServiceLogin {
    fn from(credentials: Credentials) -> Self {
        Self { credentials, since: SystemClock.uptime() }
    }
}

impl Login for ServiceLogin {
    fn id(&self) -> &str {
        &self.credentials.id
    }

    fn is_fresh(&self) -> bool {
        SystemClock.uptime() < self.since + FRESH
    }
}

/// The source of the service's credentials.
#[derive(Clone)]
pub(super) enum Source {
    /// Given by the embedder.
    Fixed(Arc<ServiceLogin>),
    /// The sources of the official SDKs, in their order.
    Default(Arc<Kept<ServiceLogin>>),
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fixed(_) => "Fixed(..)",
            Self::Default(_) => "Default(..)",
        })
    }
}

impl Source {
    /// The credentials for a call, or one clause on why there are none.
    pub(super) fn get(
        &self,
        http: &Http,
        sts: &Uri,
        deadline: Deadline,
    ) -> Result<Own<ServiceLogin>, String> {
        let kept = match self {
            Self::Fixed(credentials) => return Ok(Own::new(Arc::clone(credentials))),
            Self::Default(kept) => kept,
        };
        // The environment is read again each time, so a replaced key takes effect at once.
        if let Some(credentials) = from_environment()? {
            return Ok(Own::new(Arc::new(credentials.into())));
        }
        kept.get(deadline, |deadline| fetch(http, sts, deadline))
    }

    /// Other credentials in place of kept ones that STS has refused, if there are any.
    pub(super) fn instead_of(
        &self,
        refused: &Own<ServiceLogin>,
        http: &Http,
        sts: &Uri,
        deadline: Deadline,
    ) -> Option<Arc<ServiceLogin>> {
        match self {
            Self::Fixed(_) => None,
            Self::Default(kept) => {
                kept.instead_of(refused, deadline, |deadline| fetch(http, sts, deadline))
            }
        }
    }
}

/// Asks the sources behind the environment.
fn fetch(http: &Http, sts: &Uri, deadline: Deadline) -> Result<Fetched<ServiceLogin>, String> {
    if let Some(credentials) = from_oidc(http, sts, deadline)? {
        return Ok(Fetched::Keep(credentials.into()));
    }
    let role = match from_cli_profile()? {
        Some(Profile::Key(credentials)) => return Ok(Fetched::Once(credentials.into())),
        Some(Profile::InstanceRole(role)) => role,
        None if variable("ALIBABA_CLOUD_ECS_METADATA_DISABLED").is_some_and(|it| it == "true") => {
            return Err("there are no credentials in the environment nor in ~/.aliyun/config.json"
                .to_owned());
        }
        None => variable("ALIBABA_CLOUD_ECS_METADATA"),
    };
    // On a machine that is not an ECS instance, that address gives no answer. The error must be
    // returned before the caller gives up on the call.
    let metadata = Uri::from_static(INSTANCE_METADATA);
    let credentials =
        from_instance(http, &metadata, role.as_deref(), deadline.halfway()).map_err(|why| {
            format!("no credentials in the environment, and none of the ECS instance: {why}")
        })?;
    Ok(Fetched::Keep(credentials.into()))
}

/// The value of a variable of the environment, if it is not empty.
fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

fn from_environment() -> Result<Option<Credentials>, String> {
    let id = variable("ALIBABA_CLOUD_ACCESS_KEY_ID");
    let secret = variable("ALIBABA_CLOUD_ACCESS_KEY_SECRET").map(Zeroizing::new);
    match (id, secret) {
        (Some(id), Some(secret)) => {
            let token = variable("ALIBABA_CLOUD_SECURITY_TOKEN").map(Zeroizing::new);
            Ok(Some(Credentials { id, secret, token }))
        }
        (None, None) => Ok(None),
        _ => Err(
            "of ALIBABA_CLOUD_ACCESS_KEY_ID and ALIBABA_CLOUD_ACCESS_KEY_SECRET only one is set"
                .to_owned(),
        ),
    }
}

/// Exchanges the OpenID Connect token of a cluster's pod (RRSA of ACK) for credentials.
fn from_oidc(http: &Http, sts: &Uri, deadline: Deadline) -> Result<Option<Credentials>, String> {
    let (Some(role), Some(provider), Some(file)) = (
        variable("ALIBABA_CLOUD_ROLE_ARN"),
        variable("ALIBABA_CLOUD_OIDC_PROVIDER_ARN"),
        variable("ALIBABA_CLOUD_OIDC_TOKEN_FILE"),
    ) else {
        return Ok(None);
    };
    let token = Zeroizing::new(
        read(Path::new(&file)).map_err(|why| format!("the OIDC token file: {why}"))?,
    );
    let token = std::str::from_utf8(&token).map_err(|_| "the OIDC token file is not text")?;
    let session = variable("ALIBABA_CLOUD_ROLE_SESSION_NAME");
    let form = sign::Pairs::from([
        ("DurationSeconds", "3600"),
        ("OIDCProviderArn", &provider),
        ("OIDCToken", token.trim()),
        ("RoleArn", &role),
        ("RoleSessionName", session.as_deref().unwrap_or(super::SESSION)),
    ]);
    let body = Zeroizing::new(sign::encode(&form));
    let target = format!(
        "/?{}",
        sign::encode(&sign::Pairs::from([
            ("Action", "AssumeRoleWithOIDC"),
            ("Format", "JSON"),
            ("Timestamp", &super::timestamp()),
            ("Version", super::STS_VERSION),
        ]))
    );
    let headers = [("content-type", "application/x-www-form-urlencoded")];
    let answer = exchange(http, "POST", sts, &target, &headers, body.as_bytes(), deadline)
        .map_err(|why| format!("AssumeRoleWithOIDC: {why}"))?;
    let assumed: Assumed = parse(&answer).map_err(|why| format!("AssumeRoleWithOIDC {why}"))?;
    Ok(Some(assumed.credentials.into()))
}

/// The credentials in a profile of the official command line.
#[derive(Debug)]
pub(super) enum Profile {
    Key(Credentials),
    /// The role of the ECS instance, with its name if the profile has one.
    InstanceRole(Option<String>),
}

/// The current profile of `~/.aliyun/config.json`, or the one that `ALIBABA_CLOUD_PROFILE` names.
/// `None` without that file.
fn from_cli_profile() -> Result<Option<Profile>, String> {
    if variable("ALIBABA_CLOUD_CLI_PROFILE_DISABLED").is_some_and(|it| it == "true") {
        return Ok(None);
    }
    let Some(home) = variable("HOME") else { return Ok(None) };
    let bytes = match read(&PathBuf::from(home).join(".aliyun/config.json")) {
        Ok(bytes) => Zeroizing::new(bytes),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(format!("~/.aliyun/config.json: {error}")),
    };
    profile_of(&bytes, variable("ALIBABA_CLOUD_PROFILE").as_deref())
        .map(Some)
        .map_err(|why| format!("~/.aliyun/config.json {why}"))
}

pub(super) fn profile_of(bytes: &[u8], name: Option<&str>) -> Result<Profile, &'static str> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(default)]
        current: String,
        profiles: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        name: String,
        #[serde(default)]
        mode: String,
        #[serde(default)]
        access_key_id: String,
        #[serde(default)]
        access_key_secret: Zeroizing<String>,
        #[serde(default)]
        sts_token: Zeroizing<String>,
        #[serde(default)]
        ram_role_name: String,
    }
    // The parser's error may quote a value.
    let config: Config =
        serde_json::from_slice(bytes).map_err(|_| "is not what `aliyun configure` writes")?;
    let name = name.unwrap_or(&config.current);
    let entry = config
        .profiles
        .into_iter()
        .find(|it| it.name == name)
        .ok_or("has no profile of that name")?;
    let key = |token| {
        if entry.access_key_id.is_empty() || entry.access_key_secret.is_empty() {
            return Err("has a profile without an access key");
        }
        Ok(Profile::Key(Credentials {
            id: entry.access_key_id,
            secret: entry.access_key_secret,
            token,
        }))
    };
    match entry.mode.as_str() {
        "AK" => key(None),
        "StsToken" if entry.sts_token.is_empty() => Err("has a profile without its security token"),
        "StsToken" => key(Some(entry.sts_token)),
        "EcsRamRole" => {
            Ok(Profile::InstanceRole(Some(entry.ram_role_name).filter(|role| !role.is_empty())))
        }
        _ => Err("has a profile of another mode than AK, StsToken and EcsRamRole"),
    }
}

/// The credentials of the role of an ECS instance, from its metadata service in hardened mode (with
/// a token).
pub(super) fn from_instance(
    http: &Http,
    metadata: &Uri,
    role: Option<&str>,
    deadline: Deadline,
) -> Result<Credentials, String> {
    const ROLES: &str = "/latest/meta-data/ram/security-credentials/";
    let ask = |method, target: &str, headers: &[(&str, &str)]| {
        let answer = exchange(http, method, metadata, target, headers, &[], deadline)
            .map_err(|why| why.to_string())?;
        match answer.status {
            200 => Ok(answer),
            status => Err(format!("the metadata service answered with status {status}")),
        }
    };
    let word = |answer: &Answer| {
        let word = std::str::from_utf8(&answer.body).unwrap_or_default().trim();
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.=+/".contains(c);
        let fits = !word.is_empty() && word.chars().all(plain);
        fits.then(|| word.to_owned())
            .ok_or_else(|| "the metadata service answered nonsense".to_owned())
    };
    let ttl = [("x-aliyun-ecs-metadata-token-ttl-seconds", METADATA_TOKEN_SECONDS)];
    let token = Zeroizing::new(word(&ask("PUT", "/latest/api/token", &ttl)?)?);
    let token = [("x-aliyun-ecs-metadata-token", token.as_str())];
    let role = match role {
        Some(role) => role.to_owned(),
        None => word(&ask("GET", ROLES, &token)?)?,
    };
    let issued: Issued = parse(&ask("GET", &format!("{ROLES}{role}"), &token)?)
        .map_err(|why| format!("the metadata service {why}"))?;
    Ok(issued.into())
}

fn parse<T: for<'a> Deserialize<'a>>(answer: &Answer) -> Result<T, String> {
    if answer.status != 200 {
        let error: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
        return Err(format!("answered {}", super::outcome::code_of(&error, answer.status)));
    }
    // The parser's error may quote a value.
    serde_json::from_slice(&answer.body).map_err(|_| "answered no credentials".to_owned())
}

fn read(path: &Path) -> std::io::Result<Vec<u8>> {
    read_configured(path, FILE_BYTES_MAX)
}
