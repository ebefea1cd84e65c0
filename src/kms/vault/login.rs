//! The service's own login at Vault: AppRole, Kubernetes, or a token in a file.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{
    answers::Failure,
    api::{Api, Token},
};
use crate::{
    io::{Clock, SystemClock, read_configured},
    kms::{
        KmsError,
        deadline::Deadline,
        http::{self, Answer},
    },
    sync::{LockRank, Mutex, lock},
};

/// The longest time for which a token is kept. After that the backend logs in again, so that it
/// notices that the role is gone.
const KEPT_MAX: Duration = Duration::from_secs(5 * 60);
/// The most tokens that are kept, one for each role.
const TOKENS_MAX: usize = 1024;
/// The largest file of a token or an id, in bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// The way in which the service logs in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Method {
    AppRole { mount: String, role_id: PathBuf, secret_id: PathBuf },
    Kubernetes { mount: String, jwt: PathBuf },
    TokenFile { file: PathBuf },
}

/// The logins of the service, with the tokens that it keeps.
pub(super) struct Login {
    method: Method,
    /// By the role. AppRole has one login for all.
    kept: Mutex<BTreeMap<String, Arc<Issued>>>,
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login").field("method", &self.method).finish_non_exhaustive()
    }
}

/// A token, and the facts about it that Vault has stated.
pub(super) struct Issued {
    pub(super) token: Token,
    /// The AppRole of the login.
    role: Option<String>,
    /// When the login was sent.
    since: Duration,
    /// How long the token is valid.
    lasts: Duration,
}

impl Issued {
    /// Whether the token is used for other calls too. The last third of its time is left for calls
    /// that have begun.
    fn is_fresh(&self) -> bool {
        self.age() < KEPT_MAX.min(self.lasts.saturating_mul(2) / 3)
    }

    fn age(&self) -> Duration {
        SystemClock.uptime().saturating_sub(self.since)
    }
}

impl Login {
    pub(super) fn new(method: Method) -> Self {
        Self { method, kept: Mutex::new(LockRank::KmsCredentials, BTreeMap::new()) }
    }

    /// A token for a role: a kept one, or a new one. Callers do not wait for each other.
    ///
    /// # Errors
    /// `Unreachable` if the service cannot log in. `Revoked` if the role refuses the service.
    /// `Invalid` if the login is that of another role.
    pub(super) fn token(
        &self,
        api: &Api,
        role: &str,
        deadline: Deadline,
    ) -> Result<Arc<Issued>, KmsError> {
        match self.kept(role) {
            Some(kept) => is_of(kept, role),
            None => is_of(self.issue(api, role, deadline)?, role),
        }
    }

    /// Another token in place of a refused one. `None` if the refused token is valid, so that its
    /// policies deny the request. A token that was issued after `began` was refused at its first
    /// use.
    ///
    /// # Errors
    /// As [`Login::token`].
    pub(super) fn instead_of(
        &self,
        refused: &Arc<Issued>,
        api: &Api,
        role: &str,
        began: Duration,
        deadline: Deadline,
    ) -> Result<Option<Arc<Issued>>, KmsError> {
        if let Method::TokenFile { .. } = self.method {
            // Another process may have renewed the file since.
            let newer = self.token(api, role, deadline)?;
            if newer.token != refused.token {
                return Ok(Some(newer));
            }
            return check(&newer.token, api, deadline).map(|()| None);
        }
        // Vault has just issued the token for this request, so it is valid. An older token may have
        // expired, or have no uses left.
        if refused.since >= began && refused.age() < refused.lasts {
            return Ok(None);
        }
        // Another call may have logged in meanwhile.
        if let Some(newer) = self.kept(role).filter(|kept| !Arc::ptr_eq(kept, refused)) {
            return is_of(newer, role).map(Some);
        }
        // The other half of the time is for the repeated request.
        match self.issue(api, role, deadline.halfway()) {
            // The refused token stays kept: other keys may need it while no login succeeds.
            Err(error @ KmsError::Unreachable { .. }) => {
                check(&refused.token, api, deadline).map_or(Err(error), |()| Ok(None))
            }
            issued => is_of(issued?, role).map(Some),
        }
    }

    /// The kept token for a role, if it is fresh.
    fn kept(&self, role: &str) -> Option<Arc<Issued>> {
        lock(&self.kept).get(self.key(role)).filter(|kept| kept.is_fresh()).cloned()
    }

    /// The key under which the token for a role is kept.
    fn key<'a>(&self, role: &'a str) -> &'a str {
        match self.method {
            Method::Kubernetes { .. } => role,
            Method::AppRole { .. } | Method::TokenFile { .. } => "",
        }
    }

    /// Logs in, or reads the token, and keeps a token that was issued.
    fn issue(&self, api: &Api, role: &str, deadline: Deadline) -> Result<Arc<Issued>, KmsError> {
        let since = SystemClock.uptime();
        let auth = match &self.method {
            Method::TokenFile { file } => {
                let token = token(read("token-file", file)?)?;
                return Ok(Arc::new(Issued { token, role: None, since, lasts: Duration::ZERO }));
            }
            Method::AppRole { mount, role_id, secret_id } => {
                #[derive(Serialize)]
                struct Request<'a> {
                    role_id: &'a str,
                    secret_id: &'a str,
                }
                let role_id = read("role-id-file", role_id)?;
                let secret_id = read("secret-id-file", secret_id)?;
                let request = Request { role_id: &role_id, secret_id: &secret_id };
                let failure = Failure::of_own_login;
                log_in(api, "AppRole", mount, &request, failure, deadline)?
            }
            Method::Kubernetes { mount, jwt } => {
                #[derive(Serialize)]
                struct Request<'a> {
                    role: &'a str,
                    jwt: &'a str,
                }
                let request = Request { role, jwt: &read("jwt-file", jwt)? };
                let failure = Failure::of_kubernetes_login;
                log_in(api, "Kubernetes", mount, &request, failure, deadline)?
            }
        };
        let role_name = match self.method {
            Method::AppRole { .. } => {
                let name = auth.metadata.and_then(|metadata| metadata.role_name);
                Some(name.ok_or_else(|| KmsError::invalid("the login names no AppRole"))?)
            }
            Method::Kubernetes { .. } | Method::TokenFile { .. } => None,
        };
        // A token without an end has the duration 0.
        let lasts = match auth.lease_duration {
            0 => Duration::MAX,
            seconds => Duration::from_secs(seconds),
        };
        let token = token(auth.client_token)?;
        let issued = Arc::new(Issued { token, role: role_name, since, lasts });
        // Other calls could use up a token with a limited number of uses.
        if auth.num_uses != 0 {
            return Ok(issued);
        }
        let mut kept = lock(&self.kept);
        if kept.len() >= TOKENS_MAX {
            kept.clear();
        }
        kept.insert(self.key(role).to_owned(), Arc::clone(&issued));
        Ok(issued)
    }
}

/// Fails if the login is that of another AppRole than `arn` names.
fn is_of(issued: Arc<Issued>, role: &str) -> Result<Arc<Issued>, KmsError> {
    match &issued.role {
        Some(own) if own != role => Err(KmsError::invalid(format!(
            "the service is logged in as another AppRole than {role}, which arn names"
        ))),
        _ => Ok(issued),
    }
}

/// The part of an answer to a login that is used.
#[derive(Deserialize)]
struct Auth {
    client_token: Zeroizing<String>,
    /// In seconds.
    #[serde(default)]
    lease_duration: u64,
    /// 0 without a limit.
    #[serde(default)]
    num_uses: u64,
    metadata: Option<Metadata>,
}

#[derive(Deserialize)]
struct Metadata {
    role_name: Option<String>,
}

/// Sends a login.
fn log_in(
    api: &Api,
    kind: &str,
    mount: &str,
    request: &impl Serialize,
    failure: fn(&Answer) -> Failure,
    deadline: Deadline,
) -> Result<Auth, KmsError> {
    #[derive(Deserialize)]
    struct Success {
        auth: Auth,
    }
    let body = http::json(request)?;
    let answer = api.post(&format!("auth/{mount}/login"), None, &body, deadline)?;
    if answer.status != 200 {
        let what = format!("the login with {kind} at {}", api.host());
        return Err(failure(&answer).error(&what));
    }
    // The parser's error may quote a value.
    let success: Success = serde_json::from_slice(&answer.body)
        .map_err(|_| KmsError::invalid(format!("the login with {kind} gave no token")))?;
    Ok(success.auth)
}

/// Checks that a token is valid. By default each token may look itself up.
fn check(token: &Token, api: &Api, deadline: Deadline) -> Result<(), KmsError> {
    #[derive(Deserialize)]
    struct Found {
        #[serde(rename = "data")]
        _data: serde::de::IgnoredAny,
    }
    let answer = api.get("auth/token/lookup-self", token, deadline)?;
    if answer.status == 200 && serde_json::from_slice::<Found>(&answer.body).is_ok() {
        return Ok(());
    }
    let what = format!("looking up the service's own token at {}", api.host());
    Err(Failure::of_own_login(&answer).error(&what))
}

fn token(text: Zeroizing<String>) -> Result<Token, KmsError> {
    Token::new(text)
        .ok_or_else(|| KmsError::unreachable("the token of the service is empty or damaged"))
}

/// The content of a file without the white space around it.
fn read(setting: &str, file: &Path) -> Result<Zeroizing<String>, KmsError> {
    let unreadable = |why: String| {
        KmsError::unreachable(format!(
            "cannot read {}, which {setting} names: {why}",
            file.display()
        ))
    };
    let bytes = read_configured(file, FILE_BYTES_MAX);
    let bytes = Zeroizing::new(bytes.map_err(|error| unreadable(error.to_string()))?);
    let text = str::from_utf8(&bytes).map_err(|_| unreadable("it is not UTF-8".to_owned()))?;
    match text.trim() {
        "" => Err(unreadable("it is empty".to_owned())),
        text => Ok(Zeroizing::new(text.to_owned())),
    }
}
