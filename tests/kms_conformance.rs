//! The conformance suite detects backends that break the rules, and accepts one that does not.
//!
//! The backend of these tests is a client of a small server, which keeps its keys in an embedded
//! KMS. A call needs two exchanges: a greeting and a request. A [`Bug`] breaks the client or the
//! server in one way.

#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fmt,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::{Duration, Instant},
};

use envelog::{
    crypto::SecretKey,
    kms::{Cmk, EncryptionContext, Kms, KmsCall, KmsError, LocalKms, RevokedReason},
    testing::conformance::{self, Admin, AdminError, Outcome, Report, Settings, Subject},
};
use serde_json::{Value, json};
use tempfile::TempDir;

const REGION: &str = "cn-hangzhou";
const ROLE: &str = "role";
const PASSWORD: &str = "the-password-of-the-service";

/// A way to break the rules for a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bug {
    None,
    /// The first value of the context is not bound.
    LosesAnEntry,
    /// Names and values are bound as one text.
    JoinsTheContext,
    /// The server decrypts with the key that the wrapped key names.
    IgnoresTheCmk,
    /// A wrapped key that does not open gives zeros.
    OpensAnything,
    PanicsOnShortKeys,
    PanicsInVersions,
    /// A wrapped key is remembered by its bytes.
    CachesKeys,
    DisabledIsInvalid,
    PendingIsDisabled,
    DeletedIsUnreachable,
    CreatesMissingKeys,
    DeniedIsDisabled,
    /// Only the newest version of a key opens.
    ForgetsVersions,
    VersionsAreConstant,
    /// A deleted key opens under a key of the same name.
    KeepsDeletedKeys,
    /// A call that finds another call under way fails.
    OneCallAtATime,
    /// A call waits for the call before it.
    CallsWaitForEachOther,
    ServesEverything,
    ServesByAsking,
    RefusedIsRevoked,
    IgnoresTheTimeout,
    GivesUpAtOnce,
    HalfAnAnswerIsInvalid,
    /// Each exchange has the whole time limit.
    TimesEachExchange,
    NoDetail,
    DetailOfTwoLines,
    ErrorHasTheKey,
    DebugHasThePassword,
    WrappedHasTheKey,
}

/// The keys of the server, by their names.
struct Server {
    local: LocalKms,
    names: Mutex<BTreeMap<String, String>>,
    /// The identifiers of deleted keys, by their names.
    old: Mutex<BTreeMap<String, String>>,
    bug: Bug,
    _dir: TempDir,
}

impl Server {
    fn start(bug: Bug) -> (Arc<Self>, SocketAddr) {
        let dir = tempfile::tempdir().unwrap();
        let local = LocalKms::create_or_open(dir.path().join("kms")).unwrap();
        let server = Arc::new(Self {
            local,
            names: Mutex::default(),
            old: Mutex::default(),
            bug,
            _dir: dir,
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let serving = Arc::clone(&server);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (serving, stream) = (Arc::clone(&serving), stream.unwrap());
                // A client may disconnect at any time.
                thread::spawn(move || drop(serving.serve(&stream)));
            }
        });
        (server, address)
    }

    fn serve(&self, stream: &TcpStream) -> std::io::Result<()> {
        stream.set_nodelay(true)?;
        let mut lines = BufReader::new(stream).lines();
        let mut line = || lines.next().unwrap_or(Err(std::io::ErrorKind::UnexpectedEof.into()));
        assert_eq!(line()?, PASSWORD);
        writeln!(&*stream, "welcome")?;
        let request: Value = serde_json::from_str(&line()?)?;
        writeln!(&*stream, "{}", self.answer(&request))
    }

    fn id(&self, name: &str) -> Option<String> {
        self.names.lock().unwrap().get(name).cloned()
    }

    fn create(&self, name: &str) {
        let id = self.local.create_key(REGION, &[ROLE]).unwrap();
        self.names.lock().unwrap().insert(name.to_owned(), id);
    }

    fn answer(&self, request: &Value) -> Value {
        let name = request["cmk"].as_str().unwrap();
        let mut context: EncryptionContext =
            serde_json::from_value(request["context"].clone()).unwrap();
        if self.bug == Bug::LosesAnEntry {
            context = context.iter().skip(1).map(|(n, v)| (n.to_owned(), v.to_owned())).collect();
        }
        if self.bug == Bug::JoinsTheContext {
            let text: String =
                context.iter().map(|(name, value)| format!("{name}{value}")).collect();
            context = [("context".to_owned(), text)].into();
        }
        if self.bug == Bug::CreatesMissingKeys && self.id(name).is_none() {
            self.create(name);
        }
        let cmk = |id: String| Cmk { cmk_key_id: id, arn: ROLE.into(), region_id: REGION.into() };
        let bytes = unhex(request["bytes"].as_str().unwrap());
        let ask = |cmk: &Cmk| -> Result<Vec<u8>, KmsError> {
            let call = KmsCall { cmk, context: &context, timeout: Duration::from_secs(9) };
            if request["wrap"] == true {
                let mut key = bytes.clone().try_into().unwrap();
                return self.local.wrap(&call, &SecretKey::from_bytes(&mut key));
            }
            self.local.unwrap(&call, &bytes).map(|key| key.expose().to_vec())
        };
        let mut answer = ask(&cmk(self.id(name).unwrap_or_default()));
        if self.bug == Bug::IgnoresTheCmk && matches!(answer, Err(KmsError::Invalid { .. })) {
            let named = bytes.get(8..28).map(|id| String::from_utf8_lossy(id).into_owned());
            answer = ask(&cmk(named.unwrap_or_default()));
        }
        if let (Bug::KeepsDeletedKeys, Err(_), Some(id)) =
            (self.bug, &answer, self.old.lock().unwrap().get(name))
        {
            answer = ask(&cmk(id.clone()));
        }
        match answer {
            Ok(bytes) => json!({ "bytes": hex(&bytes) }),
            Err(KmsError::Revoked { reason, .. }) => json!({ "revoked": reason }),
            Err(_) => json!({ "invalid": true }),
        }
    }
}

/// The backend.
struct Client {
    address: SocketAddr,
    bug: Bug,
    cache: Mutex<BTreeMap<Vec<u8>, [u8; 32]>>,
    calling: Mutex<()>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let password = if self.bug == Bug::DebugHasThePassword { PASSWORD } else { ".." };
        f.debug_struct("Client").field("password", &password).finish_non_exhaustive()
    }
}

impl Client {
    fn unreachable(&self, why: impl fmt::Display) -> KmsError {
        KmsError::Unreachable { detail: why.to_string() }
    }

    /// Sends a line and reads a line.
    fn exchange(
        &self,
        mut stream: &TcpStream,
        line: &str,
        limit: Duration,
        began: Instant,
    ) -> Result<String, KmsError> {
        writeln!(stream, "{line}").map_err(|error| self.unreachable(error))?;
        let began = if self.bug == Bug::TimesEachExchange { Instant::now() } else { began };
        let mut answer = Vec::new();
        while !answer.ends_with(b"\n") {
            let left = limit.checked_sub(began.elapsed()).filter(|left| !left.is_zero());
            let left = left.ok_or_else(|| self.unreachable("no answer in time"))?;
            stream.set_read_timeout(Some(left)).unwrap();
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(1) => answer.push(byte[0]),
                Ok(_) => return Err(self.unreachable("the answer has no end")),
                Err(error) => return Err(self.unreachable(error)),
            }
        }
        String::from_utf8(answer).map_err(|error| self.unreachable(error))
    }

    fn ask(&self, call: &KmsCall<'_>, wrap: bool, bytes: &[u8]) -> Result<Vec<u8>, KmsError> {
        let _calling = match self.bug {
            Bug::CallsWaitForEachOther => Some(self.calling.lock().unwrap()),
            Bug::OneCallAtATime => {
                let calling = self.calling.try_lock();
                Some(calling.map_err(|_| self.unreachable("another call is under way"))?)
            }
            _ => None,
        };
        let began = Instant::now();
        let limit = match self.bug {
            Bug::IgnoresTheTimeout => Duration::from_secs(4),
            Bug::GivesUpAtOnce => call.timeout.min(Duration::from_millis(150)),
            _ => call.timeout,
        };
        if limit.is_zero() {
            return Err(self.unreachable("no time"));
        }
        let stream = TcpStream::connect_timeout(&self.address, limit).map_err(|error| {
            if self.bug == Bug::RefusedIsRevoked {
                return KmsError::Revoked {
                    reason: RevokedReason::Disabled,
                    detail: error.to_string(),
                };
            }
            self.unreachable(error)
        })?;
        let _ = stream.set_nodelay(true);
        self.exchange(&stream, PASSWORD, limit, began)?;
        let request = json!({
            "cmk": call.cmk.cmk_key_id, "context": call.context, "wrap": wrap, "bytes": hex(bytes),
        });
        let answer = self.exchange(&stream, &request.to_string(), limit, began);
        let answer = answer.map_err(|error| match (self.bug, &error) {
            (Bug::HalfAnAnswerIsInvalid, KmsError::Unreachable { detail })
                if detail.contains("end") =>
            {
                KmsError::Invalid { detail: detail.clone() }
            }
            _ => error,
        })?;
        let answer: Value = serde_json::from_str(&answer).unwrap();
        if let Some(bytes) = answer["bytes"].as_str() {
            return Ok(unhex(bytes));
        }
        let Ok(reason) = serde_json::from_value(answer["revoked"].clone()) else {
            let detail = match self.bug {
                Bug::NoDetail => String::new(),
                Bug::DetailOfTwoLines => "invalid\nwrapped key".to_owned(),
                _ => "invalid wrapped key".to_owned(),
            };
            return Err(KmsError::Invalid { detail });
        };
        let detail = if self.bug == Bug::ErrorHasTheKey && wrap {
            format!("cannot wrap {bytes:?}")
        } else {
            "the server refuses".to_owned()
        };
        match (self.bug, reason) {
            (Bug::DisabledIsInvalid, RevokedReason::Disabled) => Err(KmsError::Invalid { detail }),
            (Bug::DeletedIsUnreachable, RevokedReason::Deleted) => Err(self.unreachable(detail)),
            (Bug::PendingIsDisabled, RevokedReason::PendingDeletion)
            | (Bug::DeniedIsDisabled, RevokedReason::NotPermitted) => {
                Err(KmsError::Revoked { reason: RevokedReason::Disabled, detail })
            }
            (_, reason) => Err(KmsError::Revoked { reason, detail }),
        }
    }

    fn version(&self, wrapped: &[u8]) -> Option<String> {
        LocalKms::at("/nowhere").cmk_version(wrapped)
    }
}

impl Kms for Client {
    fn name(&self) -> &str {
        "toy"
    }

    fn serves(&self, region_id: &str) -> bool {
        match self.bug {
            Bug::ServesEverything => true,
            Bug::ServesByAsking => {
                let context = EncryptionContext::new();
                let cmk = Cmk { cmk_key_id: "".into(), arn: "".into(), region_id: "".into() };
                let timeout = Duration::from_secs(3);
                let call = KmsCall { cmk: &cmk, context: &context, timeout };
                let is_there =
                    !matches!(self.ask(&call, false, &[]), Err(KmsError::Unreachable { .. }));
                is_there && region_id == REGION
            }
            _ => region_id == REGION,
        }
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        let mut wrapped = self.ask(call, true, key.expose())?;
        if self.bug == Bug::WrappedHasTheKey {
            wrapped.extend_from_slice(&key.expose()[..12]);
        }
        Ok(wrapped)
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        if self.bug == Bug::PanicsOnShortKeys {
            assert!(wrapped.len() > 9, "the wrapped key is too short");
        }
        let wrapped = match self.bug {
            Bug::WrappedHasTheKey => &wrapped[..wrapped.len().saturating_sub(12)],
            _ => wrapped,
        };
        if let (Bug::CachesKeys, Some(key)) = (self.bug, self.cache.lock().unwrap().get(wrapped)) {
            return Ok(SecretKey::from_bytes(&mut key.clone()));
        }
        if self.bug == Bug::ForgetsVersions
            && self.version(wrapped).is_some_and(|it| it.as_str() < "3")
        {
            let newest = self.ask(call, true, &[7; 32])?;
            if self.version(&newest).unwrap().as_str() >= "3" {
                return Err(KmsError::Invalid { detail: "an old version".to_owned() });
            }
        }
        let answer = self.ask(call, false, wrapped);
        let mut key: [u8; 32] = match (self.bug, answer) {
            (Bug::OpensAnything, Err(KmsError::Invalid { .. })) => [0; 32],
            (_, answer) => answer?.try_into().unwrap(),
        };
        self.cache.lock().unwrap().insert(wrapped.to_vec(), key);
        Ok(SecretKey::from_bytes(&mut key))
    }

    fn cmk_version(&self, wrapped: &[u8]) -> Option<String> {
        match self.bug {
            Bug::VersionsAreConstant => Some("1".to_owned()),
            Bug::PanicsInVersions => Some(wrapped[20].to_string()),
            _ => self.version(wrapped),
        }
    }
}

struct Toy {
    server: Arc<Server>,
    address: SocketAddr,
    bug: Bug,
    created: Mutex<usize>,
}

impl Toy {
    fn start(bug: Bug) -> Self {
        let (server, address) = Server::start(bug);
        Self { server, address, bug, created: Mutex::default() }
    }

    fn cmk(name: String) -> Cmk {
        Cmk { cmk_key_id: name, arn: ROLE.into(), region_id: REGION.into() }
    }

    fn administer<E: fmt::Display>(
        &self,
        cmk: &Cmk,
        change: impl FnOnce(&LocalKms, &str) -> Result<(), E>,
    ) -> Admin {
        let id = self.server.id(&cmk.cmk_key_id).unwrap();
        change(&self.server.local, &id).map_err(AdminError::failed)
    }
}

impl Subject for Toy {
    fn kms(&self) -> Arc<dyn Kms> {
        self.kms_at(self.address).unwrap()
    }

    fn create_key(&self) -> Admin<Cmk> {
        let mut created = self.created.lock().unwrap();
        *created += 1;
        let name = format!("key-{created}");
        self.server.create(&name);
        Ok(Self::cmk(name))
    }

    fn missing_key(&self) -> Cmk {
        Self::cmk("none".to_owned())
    }

    fn disable(&self, cmk: &Cmk) -> Admin {
        self.administer(cmk, LocalKms::disable)
    }

    fn enable(&self, cmk: &Cmk) -> Admin {
        self.administer(cmk, LocalKms::enable)
    }

    fn schedule_deletion(&self, cmk: &Cmk) -> Admin {
        self.administer(cmk, |local, id| local.schedule_deletion(id, 7))
    }

    fn cancel_deletion(&self, cmk: &Cmk) -> Admin {
        self.administer(cmk, LocalKms::cancel_deletion)
    }

    fn delete(&self, cmk: &Cmk) -> Admin {
        self.administer(cmk, LocalKms::delete)
    }

    fn recreate(&self, cmk: &Cmk) -> Admin {
        if self.bug == Bug::KeepsDeletedKeys {
            let id = self.server.id(&cmk.cmk_key_id).unwrap();
            self.server.old.lock().unwrap().insert(cmk.cmk_key_id.clone(), id);
        } else {
            self.delete(cmk)?;
        }
        self.server.create(&cmk.cmk_key_id);
        Ok(())
    }

    fn rotate(&self, cmk: &Cmk) -> Admin {
        self.administer(cmk, LocalKms::rotate)
    }

    fn withdraw(&self, cmk: &Cmk) -> Admin {
        self.administer(cmk, |local, id| local.ungrant(id, ROLE))
    }

    fn permit(&self, cmk: &Cmk) -> Admin {
        self.administer(cmk, |local, id| local.grant(id, ROLE))
    }

    fn server(&self) -> Admin<SocketAddr> {
        Ok(self.address)
    }

    fn kms_at(&self, address: SocketAddr) -> Admin<Arc<dyn Kms>> {
        let (bug, cache, calling) = (self.bug, Mutex::default(), Mutex::default());
        Ok(Arc::new(Client { address, bug, cache, calling }))
    }

    fn secrets(&self) -> Vec<String> {
        vec![PASSWORD.to_owned()]
    }
}

fn run(bug: Bug) -> Report {
    let mut settings = Settings::default();
    settings.short_timeout = Duration::from_millis(400);
    conformance::run(&Toy::start(bug), &settings)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    let digits = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(digits).collect()
}

#[test]
fn a_backend_that_keeps_the_rules_passes_every_check() {
    let report = run(Bug::None);
    report.assert_conforming();
    assert_eq!(report.not_applicable(), [""; 0], "{report}");
    assert_eq!(report.checks().len(), 23);
    println!("{report}");
}

#[test]
fn each_broken_rule_is_detected() {
    const BUGS: [(Bug, &str); 29] = [
        (Bug::LosesAnEntry, "context-binding"),
        (Bug::JoinsTheContext, "context-boundaries"),
        (Bug::IgnoresTheCmk, "other-key"),
        (Bug::OpensAnything, "damaged-wrapped-key"),
        (Bug::PanicsOnShortKeys, "damaged-wrapped-key"),
        (Bug::PanicsInVersions, "cmk-version"),
        (Bug::CachesKeys, "disabled"),
        (Bug::DisabledIsInvalid, "disabled"),
        (Bug::PendingIsDisabled, "pending-deletion"),
        (Bug::DeletedIsUnreachable, "deleted"),
        (Bug::CreatesMissingKeys, "missing-key"),
        (Bug::DeniedIsDisabled, "not-permitted"),
        (Bug::ForgetsVersions, "rotation"),
        (Bug::VersionsAreConstant, "rotation"),
        (Bug::KeepsDeletedKeys, "recreation"),
        (Bug::OneCallAtATime, "concurrency"),
        (Bug::CallsWaitForEachOther, "independent-calls"),
        (Bug::ServesEverything, "routing"),
        (Bug::ServesByAsking, "routing-in-an-outage"),
        (Bug::RefusedIsRevoked, "connection-refused"),
        (Bug::IgnoresTheTimeout, "no-answer"),
        (Bug::GivesUpAtOnce, "no-answer"),
        (Bug::HalfAnAnswerIsInvalid, "half-an-answer"),
        (Bug::TimesEachExchange, "slow-answer"),
        (Bug::NoDetail, "error-details"),
        (Bug::DetailOfTwoLines, "error-details"),
        (Bug::ErrorHasTheKey, "no-secret-shown"),
        (Bug::DebugHasThePassword, "no-secret-shown"),
        (Bug::WrappedHasTheKey, "no-secret-shown"),
    ];
    thread::scope(|scope| {
        let runs = BUGS.map(|(bug, check)| (bug, check, scope.spawn(move || run(bug))));
        for (bug, check, running) in runs {
            let report = running.join().unwrap();
            assert!(report.failed().contains(&check), "{bug:?} is not detected:\n{report}");
            let failed = report
                .checks()
                .iter()
                .filter(|check| matches!(&check.outcome, Outcome::Failed(why) if !why.is_empty()));
            assert_eq!(failed.count(), report.failed().len(), "a failure has no reason:\n{report}");
            println!("{bug:?}: {:?}", report.failed());
        }
    });
}

#[test]
fn an_operation_that_a_kms_lacks_is_reported_with_its_reason() {
    struct Bare(Toy);

    impl Subject for Bare {
        fn kms(&self) -> Arc<dyn Kms> {
            self.0.kms()
        }

        fn create_key(&self) -> Admin<Cmk> {
            self.0.create_key()
        }

        fn missing_key(&self) -> Cmk {
            self.0.missing_key()
        }

        fn disable(&self, _: &Cmk) -> Admin {
            conformance::unsupported("no key can be disabled")
        }

        fn enable(&self, _: &Cmk) -> Admin {
            conformance::unsupported("no key can be disabled")
        }

        fn schedule_deletion(&self, _: &Cmk) -> Admin {
            Err(AdminError::failed("the administrator has no connection"))
        }

        fn cancel_deletion(&self, _: &Cmk) -> Admin {
            panic!("no deletion is scheduled")
        }

        fn delete(&self, _: &Cmk) -> Admin {
            panic!("the administrator panics")
        }

        fn recreate(&self, _: &Cmk) -> Admin {
            conformance::unsupported("a name is used once")
        }

        fn rotate(&self, cmk: &Cmk) -> Admin {
            self.0.rotate(cmk)
        }

        fn withdraw(&self, cmk: &Cmk) -> Admin {
            self.0.withdraw(cmk)
        }

        fn permit(&self, cmk: &Cmk) -> Admin {
            self.0.permit(cmk)
        }

        fn server(&self) -> Admin<SocketAddr> {
            conformance::unsupported("it has no network")
        }

        fn kms_at(&self, _: SocketAddr) -> Admin<Arc<dyn Kms>> {
            conformance::unsupported("it has no network")
        }

        fn secrets(&self) -> Vec<String> {
            self.0.secrets()
        }

        fn not_applicable(&self, check: &str) -> Option<String> {
            (check == "rotation").then(|| "the server rotates once a year".to_owned())
        }
    }

    let report = conformance::run(&Bare(Toy::start(Bug::None)), &Settings::default());
    assert_eq!(
        report.not_applicable(),
        [
            "disabled",
            "rotation",
            "recreation",
            "connection-refused",
            "no-answer",
            "half-an-answer",
            "slow-answer",
            "independent-calls",
            "routing-in-an-outage",
        ],
        "{report}"
    );
    assert_eq!(report.failed(), ["pending-deletion", "deleted"], "{report}");
    let text = report.to_string();
    for reason in [
        "no key can be disabled",
        "the server rotates once a year",
        "the administrator failed: the administrator has no connection",
        "deleted panicked: the administrator panics",
    ] {
        assert!(text.contains(reason), "{text}");
    }
    let panic = std::panic::catch_unwind(|| report.assert_conforming()).unwrap_err();
    assert!(panic.downcast_ref::<String>().unwrap().contains("the administrator panics"));
}
