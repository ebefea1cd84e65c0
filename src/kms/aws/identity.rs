//! The service's own credentials, from the sources that other AWS tools use, and request signing.

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    io::Read,
    path::PathBuf,
    pin::pin,
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc},
    task::{Poll, Waker},
    thread,
    time::Duration,
};

use bytes::Bytes;
use reqsign_aws_v4::{
    AssumeRoleWithWebIdentityCredentialProvider, Credential, ECSCredentialProvider,
    EnvCredentialProvider, IMDSv2CredentialProvider, ProcessCredentialProvider,
    ProfileCredentialProvider, RequestSigner, SSOCredentialProvider,
};
use reqsign_core::{
    CommandExecute, CommandOutput, Context, Env, Error, FileRead, HttpSend, OsEnv,
    ProvideCredential, ProvideCredentialDyn, SignRequest, time::Timestamp,
};
use sha2::{Digest, Sha256};
use ureq::http::{self, Request, Uri, request::Parts};
use zeroize::Zeroize;

use super::paused;
use crate::{
    ids::hex_encode,
    io::read_configured,
    kms::{
        KmsError,
        deadline::Deadline,
        http::{ANSWER_BYTES_MAX, Http},
        kept::{Fetched, Kept, Login, Own},
    },
};

/// The largest file of credentials or tokens, in bytes.
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// The pause between two checks whether a process that has closed its output has ended.
const EXIT_PAUSE: Duration = Duration::from_millis(5);

/// Newer credentials are looked for this long before the kept ones expire.
const EARLY: Duration = Duration::from_secs(120);

/// Credentials at AWS. Wiped on drop.
pub(super) struct AccessKey {
    /// Without its end: the signer refuses credentials that have expired by the local clock.
    credential: Credential,
    ends: Option<Timestamp>,
}

impl AccessKey {
    pub(super) fn new(mut credential: Credential) -> Self {
        let ends = credential.expires_in.take();
        Self { credential, ends }
    }
}

impl Login for AccessKey {
    fn id(&self) -> &str {
        &self.credential.access_key_id
    }

    fn is_fresh(&self) -> bool {
        self.ends.is_none_or(|ends| Timestamp::now() + EARLY < ends)
    }
}

impl Drop for AccessKey {
    fn drop(&mut self) {
        self.credential.secret_access_key.zeroize();
        self.credential.session_token.zeroize();
    }
}

type Provider = Arc<dyn ProvideCredentialDyn<Credential = Credential>>;

/// The service's identity at AWS.
#[derive(Clone)]
pub(super) struct Identity {
    /// The possible sources of credentials, in the order in which they are tried.
    providers: Vec<(&'static str, Provider)>,
    env: Arc<dyn Env>,
    http: Http,
    /// The last credentials, if they expire. Credentials from the environment and from files are
    /// read again each time, because they may be replaced at any time.
    kept: Arc<Kept<AccessKey>>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.providers.iter().map(|(name, _)| name).collect();
        f.debug_struct("Identity").field("providers", &names).finish_non_exhaustive()
    }
}

impl Identity {
    /// The identity of a profile, or else the first one that is found.
    pub(super) fn new(region: &str, profile: Option<&str>, env: Arc<dyn Env>, http: Http) -> Self {
        let of_profiles: [(&'static str, Provider); 3] = match profile {
            Some(profile) => [
                ("profile", Arc::new(ProfileCredentialProvider::new().with_profile(profile))),
                ("profile with SSO", Arc::new(SSOCredentialProvider::new().with_profile(profile))),
                (
                    "profile with a process",
                    Arc::new(ProcessCredentialProvider::new().with_profile(profile)),
                ),
            ],
            None => [
                ("profile", Arc::new(ProfileCredentialProvider::new())),
                ("profile with SSO", Arc::new(SSOCredentialProvider::new())),
                ("profile with a process", Arc::new(ProcessCredentialProvider::new())),
            ],
        };
        let mut providers: Vec<(&'static str, Provider)> = Vec::new();
        if profile.is_none() {
            let mut web_identity = AssumeRoleWithWebIdentityCredentialProvider::new()
                .with_region(region.to_owned())
                .with_regional_sts_endpoint();
            if env.var("AWS_ROLE_SESSION_NAME").is_none() {
                web_identity = web_identity.with_role_session_name(super::SESSION_NAME.to_owned());
            }
            providers.push(("environment", Arc::new(EnvCredentialProvider::new())));
            providers.push(("web identity", Arc::new(web_identity)));
        }
        providers.extend(of_profiles);
        if profile.is_none() {
            providers.push(("container", Arc::new(ECSCredentialProvider::new())));
            providers.push(("instance metadata", Arc::new(InstanceMetadata)));
        }
        Self { providers, env, http, kept: Arc::default() }
    }

    /// The credentials for a call.
    ///
    /// # Errors
    /// `Unreachable` if there are none. The customer has not refused in this case.
    pub(super) fn own(&self, deadline: Deadline) -> Result<Own<AccessKey>, KmsError> {
        self.kept.get(deadline, |deadline| self.fetch(deadline))
    }

    /// Other credentials in place of kept ones that STS has refused, if there are any.
    pub(super) fn instead_of(
        &self,
        refused: &Own<AccessKey>,
        deadline: Deadline,
    ) -> Option<Arc<AccessKey>> {
        self.kept.instead_of(refused, deadline, |deadline| self.fetch(deadline))
    }

    /// Asks the sources.
    fn fetch(&self, deadline: Deadline) -> Result<Fetched<AccessKey>, KmsError> {
        let context = Context::new()
            .with_env(Environment(Arc::clone(&self.env)))
            .with_file_read(Files)
            .with_http_send(Sender { http: self.http.clone(), deadline })
            .with_command_execute(Commands { deadline });
        for (name, provider) in &self.providers {
            let none = |why: &dyn fmt::Display| {
                KmsError::unreachable(format!(
                    "the service has no AWS credentials of its own: {name}: {why}"
                ))
            };
            match at_once(provider.provide_credential_dyn(&context)) {
                Ok(None) => {}
                Ok(Some(credential))
                    if credential.access_key_id.is_empty()
                        || credential.secret_access_key.is_empty() =>
                {
                    return Err(none(&"they are empty"));
                }
                Ok(Some(credential)) => {
                    let key = AccessKey::new(credential);
                    return Ok(match key.ends {
                        Some(_) => Fetched::Keep(key),
                        None => Fetched::Once(key),
                    });
                }
                // The next source may be another identity, so it is not tried. The error's text may
                // quote an answer, so the message gives only the error's kind.
                Err(_) if deadline.left().is_none() => return Err(none(&"no answer in time")),
                Err(error) => return Err(none(&error.kind())),
            }
        }
        Err(KmsError::unreachable(
            "the service has no AWS credentials of its own, in no place where they are looked for",
        ))
    }
}

/// The metadata service of the instance, with a new token each time: the provider of the library
/// would keep a token that the metadata service may refuse by now.
#[derive(Debug)]
struct InstanceMetadata;

impl ProvideCredential for InstanceMetadata {
    type Credential = Credential;

    async fn provide_credential(&self, context: &Context) -> Result<Option<Credential>, Error> {
        IMDSv2CredentialProvider::new().provide_credential(context).await
    }
}

/// The head of a signed POST request.
///
/// # Errors
/// `Unreachable` if the credentials cannot sign.
pub(super) fn sign(
    login: &AccessKey,
    (service, region): (&str, &str),
    uri: &Uri,
    headers: &[(&'static str, &str)],
    body: &[u8],
) -> Result<Parts, KmsError> {
    let digest = Sha256::digest(body);
    let mut request = Request::post(uri).header("x-amz-content-sha256", hex_encode(&digest));
    for &(name, value) in headers {
        request = request.header(name, value);
    }
    let cannot =
        |error: &dyn fmt::Display| KmsError::unreachable(format!("cannot sign a request: {error}"));
    let (mut parts, ()) = request.body(()).map_err(|error| cannot(&error))?.into_parts();
    let signer = RequestSigner::new(service, region).with_standard_session_token();
    at_once(signer.sign_request(&Context::new(), &mut parts, Some(&login.credential), None))
        .map_err(|error| cannot(&error.kind()))?;
    Ok(parts)
}

/// The result of a future that never waits: all functions that it calls here block.
fn at_once<T>(future: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    match pin!(future).poll(&mut std::task::Context::from_waker(Waker::noop())) {
        Poll::Ready(outcome) => outcome,
        Poll::Pending => Err(Error::unexpected("it waits")),
    }
}

/// An environment that treats an empty variable as unset, as the other AWS tools do.
#[derive(Debug)]
struct Environment(Arc<dyn Env>);

impl Env for Environment {
    fn var(&self, key: &str) -> Option<String> {
        self.0.var(key).filter(|value| !value.is_empty())
    }

    fn vars(&self) -> HashMap<String, String> {
        self.0.vars().into_iter().filter(|(_, value)| !value.is_empty()).collect()
    }

    fn home_dir(&self) -> Option<PathBuf> {
        self.0.home_dir()
    }
}

/// The environment of the process. [`OsEnv`] panics if any variable is not UTF-8, even an unrelated
/// one.
#[derive(Debug)]
pub(super) struct ProcessEnv;

impl Env for ProcessEnv {
    fn var(&self, key: &str) -> Option<String> {
        OsEnv.var(key)
    }

    fn vars(&self) -> HashMap<String, String> {
        std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect()
    }

    fn home_dir(&self) -> Option<PathBuf> {
        OsEnv.home_dir()
    }
}

#[derive(Debug)]
struct Files;

impl FileRead for Files {
    async fn file_read(&self, path: &str) -> Result<Vec<u8>, Error> {
        Ok(read_configured(path.as_ref(), FILE_BYTES_MAX)?)
    }
}

#[derive(Debug)]
struct Sender {
    http: Http,
    deadline: Deadline,
}

impl HttpSend for Sender {
    async fn http_send(&self, request: Request<Bytes>) -> Result<http::Response<Bytes>, Error> {
        let (parts, body) = request.into_parts();
        let answer = self.http.send(Request::from_parts(parts, &body[..]), self.deadline);
        let answer = answer.map_err(|why| Error::unexpected(why.to_string()))?;
        let mut response = http::Response::builder()
            .status(answer.status)
            .body(Bytes::copy_from_slice(&answer.body))?;
        *response.headers_mut() = answer.headers;
        Ok(response)
    }
}

/// Runs the program in a profile's `credential_process`.
#[derive(Debug)]
struct Commands {
    deadline: Deadline,
}

/// A process that does not outlive the call that started it.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl CommandExecute for Commands {
    async fn command_execute<'a>(
        &'a self,
        program: &'a str,
        args: &'a [&'a str],
    ) -> Result<CommandOutput, Error> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = Running(command.spawn()?);
        let stdout = child.0.stdout.take().ok_or_else(|| Error::unexpected("it has no output"))?;
        let (sender, output) = mpsc::sync_channel(1);
        thread::Builder::new().name("envelog-kms-pipe".to_owned()).spawn(move || {
            let mut text = Vec::new();
            // The caller may have stopped waiting for the output.
            let read = stdout.take(ANSWER_BYTES_MAX as u64).read_to_end(&mut text);
            let _ = sender.send(read.map(|_| text));
        })?;
        let left = self.deadline.left().unwrap_or_default();
        let stdout =
            output.recv_timeout(left).map_err(|_| Error::unexpected("no answer in time"))??;
        let status = loop {
            match child.0.try_wait()? {
                Some(status) => break status,
                None if paused(EXIT_PAUSE, self.deadline) => {}
                None => return Err(Error::unexpected("no answer in time")),
            }
        };
        Ok(CommandOutput { status: status.code().unwrap_or(-1), stdout, stderr: Vec::new() })
    }
}
