//! The Transit engine of HashiCorp Vault and of OpenBao, over HTTPS.

mod answers;
mod api;
mod login;
#[cfg(test)]
mod tests;
mod wrapped;

use std::{path::PathBuf, sync::Arc};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde::Serialize;
use ureq::http::HeaderValue;

use self::{
    answers::{Failure, Meaning, NO_TYPE},
    api::Api,
    login::{Login, Method},
};
use super::{
    Kms, KmsCall, KmsError, KmsUrlError, RevokedReason, base64_key,
    deadline::Deadline,
    http::{self, Answer, Http},
};
use crate::{
    crypto::SecretKey,
    io::{Clock, SystemClock},
    sync::atomic::{AtomicBool, Ordering},
};

/// The token of a pod's service account.
/// <https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/>
const POD_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";
/// A wrapped key of no key, for a question about a master key.
const NO_CIPHERTEXT: &str = "vault:v1:";
/// How many other tokens a request tries after a refused one: a token that another call has fetched
/// meanwhile, and a new one.
const OTHER_TOKENS_MAX: u32 = 2;
/// The longest name of a key, in bytes. Longer names fit into no URL.
const NAME_BYTES_MAX: usize = 256;

/// The Transit engine of HashiCorp Vault or OpenBao.
///
/// [`Cmk::cmk_key_id`](super::Cmk::cmk_key_id) is the name of a Transit key of an AEAD type, such
/// as `aes256-gcm96`. [`Cmk::region_id`](super::Cmk::region_id) is the region that the URL names:
/// Vault has no regions. [`Cmk::arn`](super::Cmk::arn) names the role under which the service uses
/// the key, as the next section says.
///
/// Vault encrypts and decrypts the data key itself (`encrypt/NAME`, `decrypt/NAME`), with the
/// context as associated data ([`EncryptionContext::to_bytes`](super::EncryptionContext::to_bytes),
/// in base64). The wrapped key is Vault's ciphertext, `vault:vVERSION:…`, unchanged, and
/// [`Kms::cmk_version`] is the version in it. Associated data need Vault 1.13 or newer, or OpenBao:
/// an older Vault ignores them. So the first `wrap` of a backend also asks Vault to decrypt the
/// wrapped key with other associated data, and fails with `Invalid` unless Vault refuses that.
///
/// # The login and the role
///
/// | `auth` | login | `arn` |
/// |---|---|---|
/// | `kubernetes` | with the token of the pod's service account, as the role that `arn` names | the name of a role of the Kubernetes auth method |
/// | `approle` | with a role id and a secret id, each in a file | the name of that AppRole, which the backend compares with the one that Vault states: `Invalid` if it is another |
/// | `token-file` | none: the token is in a file, which Vault Agent or another process renews | any text, since the backend cannot compare it; Logstores share a lease only if they have the same `arn` |
///
/// The backend reads these files at each login, and the token file at each call. It keeps an issued
/// token for two thirds of its time to live, and at most for 5 minutes; it keeps no token with a
/// limited number of uses. Then it logs in again, without renewing the token. If Vault denies a
/// request with a kept token, the backend logs in again once and repeats the request. If it cannot
/// log in then, it asks Vault whether the kept token is valid. Vault evaluates the policies of a
/// token at each request.
///
/// # How answers are sorted
///
/// Vault has no error codes, only statuses and sentences. The backend compares the sentences, which
/// are the same in Vault and OpenBao except as stated.
///
/// From the Transit engine:
///
/// | status | sentence | result | source |
/// |---|---|---|---|
/// | 400 | `encryption key not found`; `policy not found` (Vault up to 0.10) | `Revoked`: deleted | 1, 5 |
/// | 400 | `unknown key type none`: `encrypt` would have created the missing key, and the backend prevents that | `Revoked`: deleted | 1, 5 |
/// | 400 | `refusing to use soft-deleted key` (OpenBao) | `Revoked`: disabled | 2, 5 |
/// | 400 | `ciphertext or signature version is disallowed by policy (too old)`: `min_decryption_version` is above the version of the wrapped key, or the version was trimmed | `Revoked`: disabled | 2, 5 |
/// | 400 | any other: a damaged wrapped key, another context, a version that the key does not have, a key of a type that binds no context | `Invalid` | 1, 2, 5 |
/// | 403 | `permission denied`, with a token that is valid | `Revoked`: not permitted; deleted or disabled if `decrypt` says so, because a role that may not create keys gets 403 for `encrypt` with a missing key | 3, 5 |
/// | 403 | `permission denied`, with a token that is not valid or cannot be checked | `Unreachable` | 3, 5 |
/// | 404 | `namespace not found`, `no handler for route …`: the URL names the mount and the namespace, and a missing one looks like a wrong one | `Unreachable` | 3, 5 |
/// | 412, 429, 472, 473 | a node that is behind or on standby, a quota | `Unreachable` | 4 |
/// | 3xx | a standby node that cannot forward the request | `Unreachable` | 4 |
/// | 5xx | 503 if the server or the namespace is sealed, or the namespace is locked | `Unreachable` | 3, 4, 5 |
/// | any | an answer that is not a list of sentences (a proxy, say), any other status | `Unreachable` | |
/// | 200 | an unexpected body, a plaintext that is not 32 bytes long, a ciphertext of another form; any answer of more than 64 KiB | `Invalid` | |
///
/// From a login:
///
/// | login | status | sentence | result | source |
/// |---|---|---|---|---|
/// | Kubernetes | 400 | `invalid role name …`: the customer has deleted the role | `Revoked`: not permitted | 6, 5 |
/// | Kubernetes | 403 | `service account name not authorized`, `namespace not authorized`: the role admits this service account no more | `Revoked`: not permitted | 6, 5 |
/// | Kubernetes | 403 | any other: the pod's token is refused or has expired, the API of Kubernetes cannot be asked, no such mount | `Unreachable` | 6, 5 |
/// | AppRole | 400 | `invalid role or secret ID`: the AppRole or the secret id is gone. Vault does not say which | `Unreachable` | 5 |
/// | any | any other | | `Unreachable` | |
/// | any | 200 | no token in the answer | `Invalid` | |
///
/// Also `Unreachable`: no connection, no name resolved, no trusted certificate, no answer in time,
/// a file that is missing or empty.
///
/// Sources: 1 `builtin/logical/transit/path_encrypt.go` and `path_decrypt.go`; 2
/// `sdk/helper/keysutil/policy.go`; 3 `sdk/logical/response_util.go`; 4 "HTTP status codes" of the
/// API documentation, and `sys/health`; 5 the answers of OpenBao 2.7.2 to `tests/kms_vault.rs`; 6
/// `path_login.go` of the Kubernetes auth method. 1 to 3 and 6 are in both projects.
///
/// # Limits
///
/// - **Deleting a role does not end its tokens.** Vault lets the tokens of a deleted AppRole or
///   Kubernetes role live on, so the backend notices the deletion when it logs in again: within 5
///   minutes. Then a Kubernetes role is revoked, and an AppRole an outage. To withdraw the
///   permission within the bound of the engine, change the policy, or disable or delete the key.
/// - **With `token-file`, the token must be allowed to look itself up**
///   (`auth/token/lookup-self`, which the policy `default` allows). Without that the backend cannot
///   tell a denial by the policy from an expired token, and treats both as an outage.
/// - A wrapped key whose version was damaged can name a version that `min_decryption_version`
///   disallows. Then it is revoked (disabled) and not invalid.
///
/// # Key material
///
/// The backend wipes requests, answers, tokens and secret ids. It cannot wipe the buffers of `ureq`
/// and `rustls` that held them, which are reused for the next request and freed with the
/// connection.
#[derive(Clone, Debug)]
pub struct VaultKms {
    region: String,
    mount: String,
    api: Api,
    login: Arc<Login>,
    /// Whether the server has shown that it binds associated data.
    binds: Arc<AtomicBool>,
}

impl VaultKms {
    /// The server of the URL `vault:SERVER?region=REGION&auth=…`. SERVER is the URL of a server,
    /// such as `https://vault.example:8200`. Plain `http:` is allowed only for this machine. Makes
    /// no call. The values of the parameters are percent-encoded:
    ///
    /// | parameter | value |
    /// |---|---|
    /// | `region` | the `region_id` of the master keys that this server has; required |
    /// | `auth` | `approle`, `kubernetes` or `token-file`; required |
    /// | `mount` | the path of the Transit engine, `transit` by default. It may begin with namespaces below `namespace` |
    /// | `namespace` | the namespace of the login and of the engine |
    /// | `auth-mount` | the path of the auth method, `approle` or `kubernetes` by default |
    /// | `role-id-file`, `secret-id-file` | with `approle`: the files of the two ids; required |
    /// | `jwt-file` | with `kubernetes`: the file of the service account's token, by default that of a pod |
    /// | `token-file` | with `token-file`: the file of the token; required |
    /// | `ca-file` | a file of certificates (PEM), which replace the system's |
    ///
    /// ```
    /// use envelog::kms::{Kms, VaultKms};
    ///
    /// let url = "vault:https://vault.example:8200?region=eu-1&auth=kubernetes&namespace=logs";
    /// let kms = VaultKms::from_url(url)?;
    /// assert!(kms.serves("eu-1"));
    /// # Ok::<_, envelog::kms::KmsUrlError>(())
    /// ```
    ///
    /// # Errors
    /// [`KmsUrlError::Malformed`].
    pub fn from_url(url: &str) -> Result<Self, KmsUrlError> {
        Parameters::parse(url).and_then(Parameters::into_kms).map_err(|why| {
            let url = "vault:https://HOST?region=REGION&auth=approle|kubernetes|token-file";
            KmsUrlError::Malformed(format!("{why}; it is written {url}&…"))
        })
    }

    /// Asks Transit about the key of a call. Returns a success, or the reason for a failure.
    fn ask(
        &self,
        call: &KmsCall<'_>,
        operation: &str,
        body: &[u8],
        deadline: Deadline,
    ) -> Result<Answer, KmsError> {
        let name = &call.cmk.cmk_key_id;
        if !is_key_name(name) {
            return Err(KmsError::invalid("cmk_key_id is not the name of a Transit key"));
        }
        let (role, began) = (&call.cmk.arn, SystemClock.uptime());
        let path = format!("{}/{operation}/{name}", self.mount);
        let mut login = self.login.token(&self.api, role, deadline)?;
        let mut others = OTHER_TOKENS_MAX;
        loop {
            let answer = self.api.post(&path, Some(&login.token), body, deadline)?;
            if answer.status == 200 {
                return Ok(answer);
            }
            let failure = Failure::of_transit(&answer);
            if failure.meaning == Meaning::Denied {
                let other = self.login.instead_of(&login, &self.api, role, began, deadline)?;
                if let Some(other) = other {
                    if others == 0 {
                        return Err(KmsError::unreachable("each token of the service is refused"));
                    }
                    (login, others) = (other, others - 1);
                    continue;
                }
            }
            return Err(failure.error(&format!("{operation} with {name} at {}", self.api.host())));
        }
    }

    fn decrypt(
        &self,
        call: &KmsCall<'_>,
        ciphertext: &str,
        associated_data: &[u8],
        deadline: Deadline,
    ) -> Result<Answer, KmsError> {
        #[derive(Serialize)]
        struct Request<'a> {
            ciphertext: &'a str,
            associated_data: &'a str,
        }
        let associated_data = &BASE64_STANDARD.encode(associated_data);
        let body = http::json(&Request { ciphertext, associated_data })?;
        self.ask(call, "decrypt", &body, deadline)
    }

    /// The reason of a denied `encrypt`. A role that may not create keys gets the same answer for a
    /// missing key, but `decrypt` tells the two apart.
    fn why_denied(&self, call: &KmsCall<'_>, denied: KmsError, deadline: Deadline) -> KmsError {
        use RevokedReason::{Deleted, Disabled};
        match self.decrypt(call, NO_CIPHERTEXT, &[], deadline) {
            Err(error @ KmsError::Revoked { reason: Deleted | Disabled, .. }) => error,
            _ => denied,
        }
    }

    /// Checks that the server binds associated data, unless it has shown that before.
    fn check_binding(
        &self,
        call: &KmsCall<'_>,
        ciphertext: &str,
        deadline: Deadline,
    ) -> Result<(), KmsError> {
        if self.binds.load(Ordering::Relaxed) {
            return Ok(());
        }
        let other = [&call.context.to_bytes()[..], b"another"].concat();
        match self.decrypt(call, ciphertext, &other, deadline) {
            Ok(_) => Err(KmsError::invalid(
                "the server does not bind the context: Vault 1.13 or newer, or OpenBao, is needed",
            )),
            Err(KmsError::Invalid { .. }) => {
                self.binds.store(true, Ordering::Relaxed);
                Ok(())
            }
            // The key that encrypts must decrypt too.
            Err(error) => Err(error),
        }
    }
}

impl Kms for VaultKms {
    fn name(&self) -> &str {
        "vault"
    }

    fn serves(&self, region_id: &str) -> bool {
        region_id == self.region
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        #[derive(Serialize)]
        struct Request<'a> {
            plaintext: &'a str,
            associated_data: &'a str,
            r#type: &'a str,
        }
        let deadline = Deadline::after(call.timeout);
        let body = http::json(&Request {
            plaintext: &base64_key::encode(key),
            associated_data: &BASE64_STANDARD.encode(call.context.to_bytes()),
            r#type: NO_TYPE,
        })?;
        let answer = self.ask(call, "encrypt", &body, deadline).map_err(|error| match error {
            KmsError::Revoked { reason: RevokedReason::NotPermitted, .. } => {
                self.why_denied(call, error, deadline)
            }
            error => error,
        })?;
        let ciphertext = answers::ciphertext(&answer)?;
        self.check_binding(call, &ciphertext, deadline)?;
        Ok(ciphertext.into_bytes())
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        let ciphertext =
            str::from_utf8(wrapped).ok().filter(|_| wrapped::version(wrapped).is_some());
        let ciphertext = ciphertext
            .ok_or_else(|| KmsError::invalid("it is not a key that Transit has wrapped"))?;
        let deadline = Deadline::after(call.timeout);
        let answer = self.decrypt(call, ciphertext, &call.context.to_bytes(), deadline)?;
        answers::plaintext(&answer)
    }

    fn cmk_version(&self, wrapped: &[u8]) -> Option<String> {
        wrapped::version(wrapped).map(str::to_owned)
    }
}

/// The parameters of a URL.
#[derive(Default)]
struct Parameters {
    server: String,
    region: Option<String>,
    auth: Option<String>,
    mount: Option<String>,
    namespace: Option<String>,
    auth_mount: Option<String>,
    role_id_file: Option<String>,
    secret_id_file: Option<String>,
    jwt_file: Option<String>,
    token_file: Option<String>,
    ca_file: Option<String>,
}

impl Parameters {
    fn parse(url: &str) -> Result<Self, &'static str> {
        let rest = url.strip_prefix("vault:").ok_or("it does not begin with vault:")?;
        let (server, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut all = Self { server: server.to_owned(), ..Self::default() };
        for (name, value) in form_urlencoded::parse(query.as_bytes()) {
            let place = match &*name {
                "region" => &mut all.region,
                "auth" => &mut all.auth,
                "mount" => &mut all.mount,
                "namespace" => &mut all.namespace,
                "auth-mount" => &mut all.auth_mount,
                "role-id-file" => &mut all.role_id_file,
                "secret-id-file" => &mut all.secret_id_file,
                "jwt-file" => &mut all.jwt_file,
                "token-file" => &mut all.token_file,
                "ca-file" => &mut all.ca_file,
                _ => return Err("it has an unknown parameter"),
            };
            if value.is_empty() || place.replace(value.into_owned()).is_some() {
                return Err("a parameter is empty or given twice");
            }
        }
        Ok(all)
    }

    fn into_kms(mut self) -> Result<VaultKms, &'static str> {
        let method = self.method()?;
        let given = [
            &self.auth_mount,
            &self.role_id_file,
            &self.secret_id_file,
            &self.jwt_file,
            &self.token_file,
        ];
        if given.iter().any(|parameter| parameter.is_some()) {
            return Err("a parameter belongs to another auth");
        }
        let namespace = self.namespace.map(|name| HeaderValue::from_str(&name));
        let namespace = namespace.transpose().map_err(|_| "namespace is not one")?;
        let mount = self.mount.unwrap_or_else(|| "transit".to_owned());
        if !is_path(&mount) {
            return Err("mount is not a path of names");
        }
        Ok(VaultKms {
            region: self.region.ok_or("region is missing")?,
            mount,
            api: Api {
                server: http::endpoint(&self.server)?,
                namespace,
                http: Http::trusting("ca-file", self.ca_file),
            },
            login: Arc::new(Login::new(method)),
            binds: Arc::default(),
        })
    }

    /// The way to log in. Takes the parameters that belong to it.
    fn method(&mut self) -> Result<Method, &'static str> {
        let mut mount = |default: &str| {
            let mount = self.auth_mount.take().unwrap_or_else(|| default.to_owned());
            if is_path(&mount) { Ok(mount) } else { Err("auth-mount is not a path of names") }
        };
        Ok(match self.auth.as_deref() {
            Some("approle") => Method::AppRole {
                mount: mount("approle")?,
                role_id: self.role_id_file.take().ok_or("role-id-file is missing")?.into(),
                secret_id: self.secret_id_file.take().ok_or("secret-id-file is missing")?.into(),
            },
            Some("kubernetes") => Method::Kubernetes {
                mount: mount("kubernetes")?,
                jwt: self.jwt_file.take().map_or_else(|| POD_TOKEN.into(), PathBuf::from),
            },
            Some("token-file") => Method::TokenFile {
                file: self.token_file.take().ok_or("token-file is missing")?.into(),
            },
            Some(_) => return Err("auth is none of the three"),
            None => return Err("auth is missing"),
        })
    }
}

/// Whether Transit accepts the name of a key (`GenericNameRegex` of `sdk/framework`).
fn is_key_name(name: &str) -> bool {
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    let ends = [name.as_bytes().first(), name.as_bytes().last()];
    name.len() <= NAME_BYTES_MAX
        && ends.iter().all(|end| end.is_some_and(is_word))
        && name.bytes().all(|byte| is_word(&byte) || matches!(byte, b'-' | b'.'))
}

/// Whether this is a path of mounts and namespaces, without a slash at an end.
fn is_path(path: &str) -> bool {
    path.split('/').all(is_key_name)
}
