//! The backend of Alibaba Cloud KMS, tested against a simulated KMS and STS, and compared with the
//! official SDK.

#![allow(clippy::unwrap_used)]

#[path = "common/aliyun.rs"]
mod aliyun;
#[path = "common/kms_backend.rs"]
mod kms_backend;
#[path = "common/python.rs"]
mod python;

use std::{
    env, fs,
    net::SocketAddr,
    path::Path,
    process::Command,
    sync::{Arc, Mutex, Once},
    thread,
    time::{Duration, Instant},
};

use aliyun::{Aliyun, Fault, OIDC_TOKEN, REGION, ROLE, SERVICE_ID, SERVICE_SECRET, error_body};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use envelog::{
    crypto::SecretKey,
    kms::{AliyunKms, Cmk, EncryptionContext, Kms, KmsCall, KmsError, RevokedReason},
    testing::conformance::{Admin, Subject, unsupported},
};
use kms_backend::{a_logstore_follows_its_key, conforms};
use serde_json::{Value, json};

const TIMEOUT: Duration = Duration::from_secs(20);
const KEY: [u8; 32] = *b"the data key, which nobody sees!";

/// The simulation with one key, and a backend that uses it.
struct World {
    aliyun: Aliyun,
    kms: AliyunKms,
    cmk: Cmk,
    context: EncryptionContext,
    timeout: Duration,
}

fn cmk(cmk_key_id: String) -> Cmk {
    Cmk { cmk_key_id, arn: ROLE.to_owned(), region_id: REGION.to_owned() }
}

/// A backend for the simulation at this endpoint.
fn backend(endpoint: &str) -> AliyunKms {
    let kms = AliyunKms::new(REGION).unwrap().with_access_key(SERVICE_ID, SERVICE_SECRET);
    kms.with_endpoint(endpoint).unwrap().with_sts_endpoint(endpoint).unwrap()
}

impl World {
    fn new() -> Self {
        listen_to_the_log();
        let aliyun = Aliyun::start();
        let kms = backend(&aliyun.endpoint());
        let cmk = cmk(aliyun.create_key());
        let context = [("envelog:store", "1"), ("envelog:suite", "AES-256-GCM *~ é")];
        let context = context.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        Self { aliyun, kms, cmk, context, timeout: TIMEOUT }
    }

    fn call(&self) -> KmsCall<'_> {
        KmsCall { cmk: &self.cmk, context: &self.context, timeout: self.timeout }
    }

    fn wrap(&self) -> Result<Vec<u8>, KmsError> {
        let mut key = KEY;
        self.kms.wrap(&self.call(), &SecretKey::from_bytes(&mut key))
    }

    fn unwrap(&self, wrapped: &[u8]) -> Result<[u8; 32], KmsError> {
        self.kms.unwrap(&self.call(), wrapped).map(|key| *key.expose())
    }

    fn actions(&self) -> Vec<String> {
        self.aliyun.take_seen().into_iter().map(|seen| seen.action).collect()
    }

    /// The outcome of wrapping and unwrapping, which must be the same.
    fn outcome(&self, wrapped: &[u8]) -> String {
        let outcome = kind(&self.unwrap(wrapped).unwrap_err());
        assert_eq!(kind(&self.wrap().unwrap_err()), outcome);
        outcome
    }
}

/// The kind of an error. Checks that the detail is neither empty nor long.
fn kind(error: &KmsError) -> String {
    let (kind, detail) = match error {
        KmsError::Revoked { reason, detail } => (format!("{reason:?}"), detail),
        KmsError::Unreachable { detail } => ("Unreachable".to_owned(), detail),
        KmsError::Invalid { detail } => ("Invalid".to_owned(), detail),
        other => panic!("{other}"),
    };
    assert!((1..200).contains(&detail.len()) && !detail.contains('\n'), "{detail:?}");
    kind
}

// ---- the tests of every backend ----

/// The simulation as the suite's subject.
impl Subject for Aliyun {
    fn kms(&self) -> Arc<dyn Kms> {
        Arc::new(backend(&self.endpoint()))
    }

    fn create_key(&self) -> Admin<Cmk> {
        Ok(cmk(self.create_key()))
    }

    fn missing_key(&self) -> Cmk {
        cmk("key-hzz99999999".to_owned())
    }

    fn disable(&self, cmk: &Cmk) -> Admin {
        self.set_state(&cmk.cmk_key_id, "Disabled");
        Ok(())
    }

    fn enable(&self, cmk: &Cmk) -> Admin {
        self.set_state(&cmk.cmk_key_id, "Enabled");
        Ok(())
    }

    fn schedule_deletion(&self, cmk: &Cmk) -> Admin {
        self.set_state(&cmk.cmk_key_id, "PendingDeletion");
        Ok(())
    }

    fn cancel_deletion(&self, cmk: &Cmk) -> Admin {
        self.enable(cmk)
    }

    fn delete(&self, cmk: &Cmk) -> Admin {
        self.delete(&cmk.cmk_key_id);
        Ok(())
    }

    fn recreate(&self, _: &Cmk) -> Admin {
        unsupported("Alibaba Cloud draws the identifiers of keys, and uses none twice")
    }

    fn rotate(&self, cmk: &Cmk) -> Admin {
        self.rotate(&cmk.cmk_key_id);
        Ok(())
    }

    fn withdraw(&self, cmk: &Cmk) -> Admin {
        self.ungrant(&cmk.cmk_key_id);
        Ok(())
    }

    fn permit(&self, cmk: &Cmk) -> Admin {
        self.grant(&cmk.cmk_key_id);
        Ok(())
    }

    fn server(&self) -> Admin<SocketAddr> {
        Ok(self.address())
    }

    fn kms_at(&self, address: SocketAddr) -> Admin<Arc<dyn Kms>> {
        Ok(Arc::new(backend(&format!("http://{address}"))))
    }

    fn secrets(&self) -> Vec<String> {
        vec![SERVICE_SECRET.to_owned()]
    }
}

#[test]
fn alibaba_cloud_kms_conforms() {
    conforms(&Aliyun::start(), &["recreation"]);
}

#[test]
fn a_logstore_follows_its_key_in_alibaba_cloud_kms() {
    a_logstore_follows_its_key(&Aliyun::start());
}

// ---- captures everything that is logged, at the most detailed level ----

static LOG: Mutex<String> = Mutex::new(String::new());

struct Listener;

impl log::Log for Listener {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let mut log = LOG.lock().unwrap();
        log.push_str(&record.args().to_string());
        log.push('\n');
    }

    fn flush(&self) {}
}

fn listen_to_the_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Listener).unwrap();
        log::set_max_level(log::LevelFilter::Trace);
    });
}

// ---- wrapping and unwrapping ----

#[test]
fn a_key_unwraps_only_with_its_own_context() {
    let mut world = World::new();
    let wrapped = world.wrap().unwrap();
    assert_eq!(world.unwrap(&wrapped), Ok(KEY));
    assert_ne!(world.wrap().unwrap(), wrapped);

    let context = world.context.clone();
    for other in [
        EncryptionContext::new(),
        EncryptionContext::from([("envelog:store".to_owned(), "1".to_owned())]),
        context.iter().map(|(name, value)| (name.to_owned(), format!("{value} "))).collect(),
    ] {
        world.context = other;
        assert_eq!(kind(&world.unwrap(&wrapped).unwrap_err()), "Invalid");
    }
    world.context = context;
    // The key may be used, but it is not the requested one.
    let id = std::mem::replace(&mut world.cmk.cmk_key_id, world.aliyun.create_key());
    assert_eq!(kind(&world.unwrap(&wrapped).unwrap_err()), "Invalid");
    world.cmk.cmk_key_id = format!("acs:kms:{REGION}:13234:key/{id}");
    assert_eq!(world.unwrap(&wrapped), Ok(KEY));
    for alias in ["alias/logs".to_owned(), format!("acs:kms:{REGION}:13234:alias/logs")] {
        world.cmk.cmk_key_id = alias;
        world.aliyun.take_seen();
        assert_eq!(world.outcome(&wrapped), "Invalid");
        assert!(world.actions().is_empty(), "a call was made for an alias");
    }
}

#[test]
fn a_damaged_wrapped_key_is_invalid_wherever_it_is_damaged() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    for byte in 0..wrapped.len() {
        let mut damaged = wrapped.clone();
        damaged[byte] ^= 4;
        // The simulation stores the key id readably, so a changed byte can name another key.
        assert_eq!(kind(&world.unwrap(&damaged).unwrap_err()), "Invalid", "byte {byte}");
    }
    for len in (0..53).chain([54, wrapped.len() - 1]) {
        assert_eq!(kind(&world.unwrap(&wrapped[..len]).unwrap_err()), "Invalid", "cut at {len}");
    }
    let long = [&wrapped[..53], &[b'A'; 4097]].concat();
    assert_eq!(kind(&world.unwrap(&long).unwrap_err()), "Invalid");
    assert_eq!(world.unwrap(&wrapped), Ok(KEY));
}

#[test]
fn the_role_is_assumed_for_each_call_without_caching() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    for _ in 0..3 {
        world.unwrap(&wrapped).unwrap();
    }
    let seen = world.aliyun.take_seen();
    let actions: Vec<_> = seen.iter().map(|seen| seen.action.as_str()).collect();
    let once = |action| ["AssumeRole", action];
    assert_eq!(
        actions,
        [once("GenerateDataKey"), once("Decrypt"), once("Decrypt"), once("Decrypt")].concat()
    );
    let tokens: std::collections::BTreeSet<_> =
        seen.iter().filter_map(|it| it.headers.get("x-acs-security-token")).collect();
    assert_eq!(tokens.len(), 4);
    assert_eq!(world.aliyun.connections(), 1, "a connection is kept");

    world.aliyun.set_role(Some(false));
    assert_eq!(kind(&world.unwrap(&wrapped).unwrap_err()), "NotPermitted");
    assert_eq!(world.actions(), ["AssumeRole"]);
    world.aliyun.set_role(Some(true));
    assert_eq!(world.unwrap(&wrapped), Ok(KEY));
}

#[test]
fn changes_of_key_and_role_take_effect_at_the_next_call() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    let id = &world.cmk.cmk_key_id;
    world.aliyun.rotate(id);
    assert_eq!(
        world.unwrap(&wrapped),
        Ok(KEY),
        "what an older version of the key has wrapped opens"
    );
    for (state, expected) in [
        ("Disabled", "Disabled"),
        ("PendingDeletion", "PendingDeletion"),
        ("PendingImport", "Disabled"),
        ("Unavailable", "Unreachable"),
    ] {
        world.aliyun.set_state(id, state);
        assert_eq!(world.outcome(&wrapped), expected, "{state}");
        world.aliyun.set_state(id, "Enabled");
        assert_eq!(world.unwrap(&wrapped), Ok(KEY));
    }
    world.aliyun.set_role(None);
    assert_eq!(world.outcome(&wrapped), "NotPermitted");
    world.aliyun.set_role(Some(false));
    assert_eq!(world.outcome(&wrapped), "NotPermitted");
    world.aliyun.set_role(Some(true));
    world.aliyun.ungrant(id);
    assert_eq!(world.outcome(&wrapped), "NotPermitted");
    world.aliyun.delete(id);
    assert_eq!(world.outcome(&wrapped), "Deleted");
}

// ---- the meaning of errors ----

#[test]
fn every_code_of_kms_has_its_meaning() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    let check = |status, code: &str, expected: &str| {
        for action in ["GenerateDataKey", "Decrypt"] {
            world.aliyun.set_fault(action, Some(Fault::code(status, code)));
        }
        assert_eq!(world.outcome(&wrapped), expected, "{status} {code}");
    };
    for (status, code, expected) in [
        (403, "Forbidden.NoPermission", "NotPermitted"),
        (403, "Forbidden.RAM", "NotPermitted"),
        (403, "NoPermission", "NotPermitted"),
        (403, "NotAuthorized", "NotPermitted"),
        (409, "Rejected.Disabled", "Disabled"),
        (409, "Rejected.PendingImport", "Disabled"),
        (409, "Rejected.PendingDeletion", "PendingDeletion"),
        (409, "Rejected.Unavailable", "Unreachable"),
        (400, "InvalidParameter", "Invalid"),
        (400, "MissingParameter", "Invalid"),
        (400, "ParseRequestParameterException", "Invalid"),
        (400, "UnsupportedOperation", "Invalid"),
        (400, "Throttling", "Unreachable"),
        (400, "Throttling.User", "Unreachable"),
        (429, "Throttling.Api", "Unreachable"),
        (404, "InvalidAccessKeyId.NotFound", "Unreachable"),
        (400, "InvalidAccessKeyId.Inactive", "Unreachable"),
        (400, "InvalidSecurityToken.Expired", "Unreachable"),
        (400, "InvalidSecurityToken.Malformed", "Unreachable"),
        (400, "MissingSecurityToken", "Unreachable"),
        (400, "SignatureDoesNotMatch", "Unreachable"),
        (400, "IncompleteSignature", "Unreachable"),
        (400, "SignatureNonceUsed", "Unreachable"),
        (400, "IllegalTimestamp", "Unreachable"),
        (400, "InvalidTimeStamp.Expired", "Unreachable"),
        (400, "RequestTimeTooSkewed", "Unreachable"),
        (403, "Forbidden.AccessKey", "Unreachable"),
        (403, "Forbidden.InDebt", "Unreachable"),
        (403, "Forbidden.InDebtOverdue", "Unreachable"),
        (403, "Forbidden.KmsServiceNotEnabled", "Unreachable"),
        (403, "Forbidden.ProhibitedByRiskControl", "Unreachable"),
        (403, "Forbidden.UbsmsInvalidBid", "Unreachable"),
        (403, "Forbidden.UbsmsInvalidUserid", "Unreachable"),
        (404, "Forbidden.ResourceNotFound", "Unreachable"),
        (403, "Forbidden", "Unreachable"),
        (400, "SomethingNew", "Unreachable"),
        (500, "InternalFailure", "Unreachable"),
        (503, "ServiceUnavailableTemporary", "Unreachable"),
        (503, "ServiceUnavailable", "Unreachable"),
        // An error is a refusal only with the HTTP status of a refusal.
        (500, "Rejected.Disabled", "Unreachable"),
        (302, "Rejected.Disabled", "Unreachable"),
        (201, "Forbidden.KeyNotFound", "Unreachable"),
    ] {
        check(status, code, expected);
    }
    // For a code that does not concern the key, the backend queries the key's state.
    for (state, expected) in [
        ("Disabled", "Disabled"),
        ("PendingImport", "Disabled"),
        ("PendingDeletion", "PendingDeletion"),
        ("Enabled", "Unreachable"),
        ("Unavailable", "Unreachable"),
    ] {
        world.aliyun.set_state(&world.cmk.cmk_key_id, state);
        check(409, "Rejected.Unavailable", expected);
        check(400, "SomethingNew", expected);
        check(400, "Throttling", "Unreachable");
    }
    // `Decrypt` does not name the key, so a missing key may be another one, which a damaged wrapped
    // key names.
    for code in ["Forbidden.KeyNotFound", "Forbidden.AliasNotFound"] {
        for action in ["GenerateDataKey", "Decrypt"] {
            world.aliyun.set_fault(action, Some(Fault::code(404, code)));
        }
        for (state, expected) in [
            ("Enabled", "Invalid"),
            ("Disabled", "Disabled"),
            ("PendingDeletion", "PendingDeletion"),
            ("Unavailable", "Deleted"),
        ] {
            world.aliyun.set_state(&world.cmk.cmk_key_id, state);
            assert_eq!(kind(&world.unwrap(&wrapped).unwrap_err()), expected, "{code} {state}");
            assert_eq!(kind(&world.wrap().unwrap_err()), "Deleted", "{code} {state}");
        }
        for (status, code) in
            [(403, "Forbidden.NoPermission"), (404, "Forbidden.KeyNotFound"), (500, "")]
        {
            world.aliyun.set_fault("DescribeKey", Some(Fault::code(status, code)));
            assert_eq!(kind(&world.unwrap(&wrapped).unwrap_err()), "Deleted", "{status} {code}");
        }
        world.aliyun.set_fault("DescribeKey", None);
    }
    // A denied or invalid answer about the state does not change the outcome.
    world.aliyun.set_fault("DescribeKey", Some(Fault::code(403, "Forbidden.NoPermission")));
    check(400, "SomethingNew", "Unreachable");
    world.aliyun.set_fault("DescribeKey", Some(Fault::Answer(200, "[]".to_owned())));
    check(400, "SomethingNew", "Unreachable");
    world.aliyun.set_fault("DescribeKey", Some(Fault::code(404, "Forbidden.KeyNotFound")));
    check(400, "SomethingNew", "Deleted");
}

#[test]
fn every_code_of_sts_has_its_meaning() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    world.aliyun.take_seen();
    let check = |fault, expected: &str| {
        let what = format!("{fault:?}");
        world.aliyun.set_fault("AssumeRole", Some(fault));
        assert_eq!(world.outcome(&wrapped), expected, "{what}");
        assert!(world.actions().iter().all(|action| action == "AssumeRole"), "{what}");
    };
    for (status, code, expected) in [
        (404, "EntityNotExist.Role", "NotPermitted"),
        (403, "NoPermission", "NotPermitted"),
        (400, "InvalidParameter", "Invalid"),
        (400, "InvalidParameter.RoleArn", "Invalid"),
        (400, "InvalidParameter.DurationSeconds", "Invalid"),
        (404, "InvalidAccessKeyId.NotFound", "Unreachable"),
        (400, "InvalidAccessKeyId.Inactive", "Unreachable"),
        (400, "InvalidSecurityToken.Expired", "Unreachable"),
        (400, "InvalidSecurityToken.Malformed", "Unreachable"),
        (400, "MissingSecurityToken", "Unreachable"),
        (400, "SignatureDoesNotMatch", "Unreachable"),
        (400, "InvalidTimeStamp.Expired", "Unreachable"),
        (400, "Throttling.User", "Unreachable"),
        (403, "Forbidden.KeyNotFound", "Unreachable"),
        (403, "SomethingNew", "Unreachable"),
        (500, "InternalError", "Unreachable"),
        (503, "ServiceUnavailable", "Unreachable"),
        (500, "EntityNotExist.Role", "Unreachable"),
    ] {
        check(Fault::code(status, code), expected);
    }
    let no_permission = |message: &str, policy: Value| {
        let body = json!({
            "Code": "NoPermission", "Message": message, "RequestId": "A1B2-C3", "AccessDeniedDetail": policy,
        });
        Fault::Answer(403, body.to_string())
    };
    for (policy, expected) in [
        ("AssumeRolePolicy", "NotPermitted"),
        ("ControlPolicy", "NotPermitted"),
        ("AccountLevelIdentityBasedPolicy", "Unreachable"),
        ("ResourceGroupLevelIdentityBasedPolicy", "Unreachable"),
        ("SessionPolicy", "Unreachable"),
    ] {
        check(
            no_permission(
                "You are not authorized to do this action.",
                json!({ "PolicyType": policy }),
            ),
            expected,
        );
    }
    check(
        no_permission("You are not authorized to do this action.", json!("words")),
        "NotPermitted",
    );
    check(no_permission("Roles may not be assumed by root accounts.", Value::Null), "Unreachable");
    world.aliyun.set_fault("AssumeRole", None);
    assert_eq!(world.unwrap(&wrapped), Ok(KEY));
}

#[test]
fn the_services_own_login_refused_is_no_revocation() {
    let mut world = World::new();
    let wrapped = world.wrap().unwrap();
    for (id, secret) in [("LTAI-nobody", SERVICE_SECRET), (SERVICE_ID, "another secret")] {
        world.kms = world.kms.clone().with_access_key(id, secret);
        assert_eq!(world.outcome(&wrapped), "Unreachable");
    }
}

/// Set in the child process that runs a test body with the credentials of a pod.
const IN_POD: &str = "ENVELOG_TEST_IN_POD";

/// Runs a test in its own process with the variables of a pod in the environment. Changing the
/// environment of this process while other tests run would be unsound.
fn in_pod(test: &str, body: fn(World)) {
    if env::var_os(IN_POD).is_some() {
        let mut world = World::new();
        let kms = AliyunKms::new(REGION).unwrap().with_endpoint(&world.aliyun.endpoint()).unwrap();
        world.kms = kms.with_sts_endpoint(&world.aliyun.endpoint()).unwrap();
        return body(world);
    }
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    fs::write(&token, OIDC_TOKEN).unwrap();
    let mut command = Command::new(env::current_exe().unwrap());
    for (name, _) in env::vars_os() {
        if name.to_string_lossy().starts_with("ALIBABA_CLOUD_") {
            command.env_remove(name);
        }
    }
    command
        .env("ALIBABA_CLOUD_ROLE_ARN", "acs:ram::1:role/log-service")
        .env("ALIBABA_CLOUD_OIDC_PROVIDER_ARN", "acs:ram::1:oidc-provider/ack")
        .env("ALIBABA_CLOUD_OIDC_TOKEN_FILE", token);
    let out = command.args(["--exact", test, "--nocapture"]).env(IN_POD, "1").output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(
        out.status.success() && text.contains("1 passed"),
        "{text}{}",
        String::from_utf8_lossy(&out.stderr)
    );
}

#[test]
fn refused_kept_credentials_are_fetched_again_in_the_same_call() {
    in_pod("refused_kept_credentials_are_fetched_again_in_the_same_call", |world| {
        let wrapped = world.wrap().unwrap();
        assert_eq!(world.unwrap(&wrapped), Ok(KEY));
        let first =
            ["AssumeRoleWithOIDC", "AssumeRole", "GenerateDataKey", "AssumeRole", "Decrypt"];
        assert_eq!(world.actions(), first);
        for (status, code) in [
            (403, "NoPermission"),
            (404, "InvalidAccessKeyId.NotFound"),
            (400, "InvalidAccessKeyId.Inactive"),
            (400, "InvalidSecurityToken.Expired"),
            (400, "InvalidSecurityToken.Malformed"),
            (400, "SignatureDoesNotMatch"),
            (403, "SomethingNew"),
        ] {
            world.aliyun.refuse_sessions(status, code);
            assert_eq!(world.unwrap(&wrapped), Ok(KEY), "{code}");
            let again = ["AssumeRole", "AssumeRoleWithOIDC", "AssumeRole", "Decrypt"];
            assert_eq!(world.actions(), again, "{code}");
            assert_eq!(world.unwrap(&wrapped), Ok(KEY), "{code}");
            assert_eq!(world.actions(), ["AssumeRole", "Decrypt"], "{code}");
        }
        // A refusal of the new ones too is the role's, and each call looks for new ones once.
        world.aliyun.set_role(Some(false));
        for _ in 0..2 {
            assert_eq!(kind(&world.unwrap(&wrapped).unwrap_err()), "NotPermitted");
            assert_eq!(world.actions(), ["AssumeRole", "AssumeRoleWithOIDC", "AssumeRole"]);
        }
        // Other failures say nothing about the credentials.
        world.aliyun.set_role(Some(true));
        for (fault, expected) in [
            (Fault::code(503, "ServiceUnavailable"), "Unreachable"),
            (Fault::code(400, "Throttling.User"), "Unreachable"),
            (Fault::Answer(403, "<html>".to_owned()), "Unreachable"),
            (Fault::code(400, "InvalidParameter.RoleArn"), "Invalid"),
        ] {
            world.aliyun.set_fault("AssumeRole", Some(fault.clone()));
            assert_eq!(kind(&world.unwrap(&wrapped).unwrap_err()), expected, "{fault:?}");
            assert_eq!(world.actions(), ["AssumeRole"], "{fault:?}");
        }
    });
}

#[test]
fn a_refusal_holds_if_no_newer_credentials_can_be_had() {
    in_pod("a_refusal_holds_if_no_newer_credentials_can_be_had", |mut world| {
        let wrapped = world.wrap().unwrap();
        world.timeout = Duration::from_secs(3);
        for fault in [
            Fault::code(503, "ServiceUnavailable"),
            Fault::code(400, "AuthenticationFail.OIDCToken.Expired"),
            Fault::Answer(200, "{}".to_owned()),
            Fault::Close,
            Fault::Hang,
            Fault::Trickle,
        ] {
            let what = format!("{fault:?}");
            world.aliyun.set_fault("AssumeRoleWithOIDC", Some(fault));
            world.aliyun.set_role(Some(false));
            let began = Instant::now();
            assert_eq!(kind(&world.unwrap(&wrapped).unwrap_err()), "NotPermitted", "{what}");
            // The refusal is reported in time.
            assert!(began.elapsed() < world.timeout, "{what}: {:?}", began.elapsed());
            world.aliyun.set_role(Some(true));
            assert_eq!(world.unwrap(&wrapped), Ok(KEY), "{what}: the kept ones stay");
        }
    });
}

#[test]
fn an_invalid_answer_is_neither_a_revocation_nor_a_success() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    let (right, other) = (STANDARD.encode([7; 32]), "key-hzz99999999");
    let id = &world.cmk.cmk_key_id;
    let answer = |key: &str, plaintext: &str, blob: Value| {
        Fault::Answer(
            200,
            json!({ "KeyId": key, "Plaintext": plaintext, "CiphertextBlob": blob }).to_string(),
        )
    };
    let mut faults = vec![
        (answer(other, &right, json!("QUJD")), "Invalid"),
        (answer(id, &STANDARD.encode([7; 31]), json!("QUJD")), "Invalid"),
        (answer(id, &STANDARD.encode([7; 33]), json!("QUJD")), "Invalid"),
        (answer(id, "", json!("QUJD")), "Invalid"),
        (answer(id, "no base64, but of some 44 characters or more.", json!("QUJD")), "Invalid"),
        // A valid key, but an invalid ciphertext.
        (answer(id, &right, json!("not base64!")), "Invalid"),
        (Fault::Answer(200, "[".repeat(60_000)), "Invalid"),
    ];
    for body in ["", "null", "[]", "{}", "<html>", r#"{"KeyId":1,"Plaintext":[]}"#, "\u{0}"] {
        faults.push((Fault::Answer(200, body.to_owned()), "Invalid"));
        faults.push((Fault::Answer(403, body.to_owned()), "Unreachable"));
        faults.push((Fault::Answer(409, body.to_owned()), "Unreachable"));
    }
    for (status, body) in [
        (200, " ".repeat(70_000)),
        (409, format!("{}{}", " ".repeat(70_000), error_body(409, "Rejected.Disabled"))),
    ] {
        faults.push((Fault::Answer(status, body), "Unreachable"));
    }
    for raw in [
        &b"no HTTP at all\r\n\r\n"[..],
        b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{}",
        b"HTTP/1.1 409 Conflict\r\ncontent-length: 1000\r\n\r\n{\"Code\":\"Rejected.Disabled\"}",
        b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n",
        b"HTTP/1.1 204 No Content\r\n\r\n",
        &[&b"HTTP/1.1 200 OK\r\nx: "[..], &[b'a'; 100_000], b"\r\n\r\n"].concat(),
        &[0xff; 4096],
        b"",
    ] {
        faults.push((Fault::Raw(raw.to_vec()), "Unreachable"));
    }
    for (fault, expected) in faults {
        for at_sts in [false, true] {
            let what = format!("{at_sts} {:.80}", format!("{fault:?}"));
            let actions =
                if at_sts { &["AssumeRole"][..] } else { &["GenerateDataKey", "Decrypt"] };
            actions.iter().for_each(|action| world.aliyun.set_fault(action, Some(fault.clone())));
            assert_eq!(world.outcome(&wrapped), expected, "{what}");
            actions.iter().for_each(|action| world.aliyun.set_fault(action, None));
        }
    }
    assert_eq!(world.unwrap(&wrapped), Ok(KEY));
}

// ---- timeouts and connections ----

/// Extra time for a busy machine.
const PATIENCE: Duration = Duration::from_secs(8);

#[test]
fn the_whole_call_keeps_within_its_time() {
    let mut world = World::new();
    let wrapped = world.wrap().unwrap();
    world.timeout = Duration::from_millis(400);
    for fault in [Fault::Hang, Fault::Trickle] {
        for action in ["AssumeRole", "Decrypt"] {
            world.aliyun.set_fault(action, Some(fault.clone()));
            let began = Instant::now();
            assert_eq!(
                kind(&world.unwrap(&wrapped).unwrap_err()),
                "Unreachable",
                "{fault:?} {action}"
            );
            let took = began.elapsed();
            assert!(
                took >= world.timeout - Duration::from_millis(50),
                "{fault:?} {action}: gave up after {took:?}"
            );
            assert!(took < world.timeout + PATIENCE, "{fault:?} {action}: {took:?}");
            world.aliyun.set_fault(action, None);
        }
    }
    // Each of the two requests is within the timeout, but their sum is not.
    world.timeout = Duration::from_secs(1);
    world.aliyun.set_delay(Duration::from_millis(700));
    assert_eq!(kind(&world.unwrap(&wrapped).unwrap_err()), "Unreachable");
    assert_eq!(world.actions().last().unwrap(), "Decrypt");
    world.aliyun.set_delay(Duration::ZERO);
    world.timeout = Duration::ZERO;
    assert_eq!(world.outcome(&wrapped), "Unreachable");
    assert!(world.actions().is_empty());
}

#[test]
fn a_connection_that_breaks_is_tried_once_more() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    for _ in 0..5 {
        world.aliyun.close_connections();
        assert_eq!(world.unwrap(&wrapped), Ok(KEY));
    }
    world.aliyun.take_seen();
    world.aliyun.set_fault("Decrypt", Some(Fault::Close));
    assert_eq!(kind(&world.unwrap(&wrapped).unwrap_err()), "Unreachable");
    let seen = world.aliyun.take_seen();
    let actions: Vec<_> = seen.iter().map(|seen| seen.action.as_str()).collect();
    assert_eq!(actions, ["AssumeRole", "Decrypt", "Decrypt"]);
    let nonce = |number: usize| &seen[number].headers["x-acs-signature-nonce"];
    assert_ne!(nonce(1), nonce(2));
}

#[test]
fn who_is_not_there_is_unreachable() {
    let mut world = World::new();
    let wrapped = world.wrap().unwrap();
    world.timeout = Duration::from_secs(2);
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let kms = world.kms.clone();
    // The simulation does not speak TLS, and the reserved host name does not resolve.
    let tls = world.aliyun.endpoint().replace("http:", "https:");
    for url in [&format!("http://{gone}"), &tls, "https://kms.invalid"] {
        for at in [AliyunKms::with_endpoint, AliyunKms::with_sts_endpoint] {
            world.kms = at(kms.clone(), url).unwrap();
            let began = Instant::now();
            assert_eq!(world.outcome(&wrapped), "Unreachable", "{url}");
            assert!(began.elapsed() < world.timeout + PATIENCE, "{url}: {:?}", began.elapsed());
        }
    }
}

#[test]
fn many_threads_call_at_once_and_none_waits_for_another() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    world.aliyun.set_delay(Duration::from_millis(100));
    let began = Instant::now();
    thread::scope(|scope| {
        for _ in 0..32 {
            scope.spawn(|| {
                for _ in 0..3 {
                    assert_eq!(world.unwrap(&wrapped), Ok(KEY));
                }
            });
        }
    });
    // One after the other, the calls would take 19 s.
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
}

// ---- secrets ----

#[test]
fn no_secret_is_in_a_url_a_log_an_error_or_debug_output() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    world.unwrap(&wrapped).unwrap();
    world.aliyun.set_state(&world.cmk.cmk_key_id, "Disabled");
    let mut shown = format!("{:?} {:?}", world.kms, world.unwrap(&wrapped));
    for action in ["AssumeRole", "Decrypt"] {
        // A server that returns secrets in its answers, both in errors and in successes.
        for status in [200, 403] {
            let body = json!({ "Code": KEY, "Plaintext": STANDARD.encode(KEY), "AccessKeySecret": SERVICE_SECRET });
            world.aliyun.set_fault(action, Some(Fault::Answer(status, body.to_string())));
            shown += &format!("{:?}", world.unwrap(&wrapped));
            let body = json!({ "Code": SERVICE_SECRET.replace('-', " "), "RequestId": STANDARD.encode(KEY) });
            world.aliyun.set_fault(action, Some(Fault::Answer(status, body.to_string())));
            shown += &format!("{:?}", world.unwrap(&wrapped));
        }
    }
    let log = LOG.lock().unwrap().clone();
    assert!(
        log.contains("GenerateDataKey") || log.contains("KeySpec=AES_256"),
        "the log is listened to:\n{log:.2000}"
    );
    let targets: String = world.aliyun.take_seen().into_iter().map(|seen| seen.target).collect();
    let hex: String = KEY.iter().map(|byte| format!("{byte:02x}")).collect();
    let mut secrets = world.aliyun.secrets();
    secrets.extend([
        SERVICE_SECRET.to_owned(),
        STANDARD.encode(KEY),
        hex,
        String::from_utf8_lossy(&KEY).into_owned(),
    ]);
    assert!(secrets.len() > 8);
    for secret in secrets {
        let escaped = secret.replace('+', "%2B").replace('/', "%2F").replace('=', "%3D");
        for (place, text) in [("URL", &targets), ("log", &log), ("error", &shown)] {
            assert!(!text.contains(&secret) && !text.contains(&escaped), "a secret is in {place}");
        }
    }
}

// ---- comparison with the official SDK ----

fn sdk(arguments: &[&str]) -> String {
    let python = python::with_packages(
        "aliyun-sdk",
        &["alibabacloud-kms20160120==3.3.1", "alibabacloud-sts20150401==1.2.0"],
    );
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kms_aliyun/sdk.py");
    let output = Command::new(python)
        .arg(script)
        .args(arguments)
        .env_remove("NO_PROXY")
        .env_remove("no_proxy")
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// A unit test in `src/kms/aliyun/sign.rs` computes the same signatures of these requests without
/// the SDK.
#[test]
fn the_official_sdk_signs_as_it_did() {
    let aliyun = Aliyun::start();
    aliyun.create_key();
    aliyun.set_timeless();
    aliyun.add_session("STS.fixed", "secret-of-the-session", "token+of/the=session==");
    sdk(&["record", &aliyun.port().to_string()]);
    let requests: Vec<Value> = aliyun.take_seen().iter().map(|seen| {
        let authorization = &seen.headers["authorization"];
        let between = |from: &str, to: &str| authorization.split_once(from).unwrap().1.split(to).next().unwrap();
        let names = between("SignedHeaders=", ",").split(';');
        let secret = if seen.action == "AssumeRole" { SERVICE_SECRET } else { "secret-of-the-session" };
        json!({
            "action": seen.action, "access_key_id": between("Credential=", ","), "access_key_secret": secret,
            "query": seen.query, "canonical_query": seen.canonical_query, "body": String::from_utf8_lossy(&seen.body),
            "signed_headers": names.map(|name| (name, &seen.headers[name])).collect::<std::collections::BTreeMap<_, _>>(),
            "authorization": authorization,
        })
    }).collect();
    let now = serde_json::to_string_pretty(&requests).unwrap() + "\n";
    let recorded = include_str!("kms_aliyun/sdk.json");
    assert!(
        now == recorded,
        "the SDK no longer sends what tests/kms_aliyun/sdk.json holds, but:\n{now}"
    );
}

#[test]
fn the_official_sdk_decrypts_keys_wrapped_by_the_backend() {
    let world = World::new();
    let port = world.aliyun.port().to_string();
    let id = &world.cmk.cmk_key_id;
    let said: Value =
        serde_json::from_str(&sdk(&["use", &port, id, ROLE, SERVICE_ID, SERVICE_SECRET])).unwrap();
    assert_eq!(said, json!({ "same": true, "key": id, "state": "Enabled" }));

    let wrapped = world.wrap().unwrap();
    let blob = std::str::from_utf8(&wrapped[53..]).unwrap();
    let decrypt = |context: &EncryptionContext| -> Value {
        let context = serde_json::to_string(context).unwrap();
        serde_json::from_str(&sdk(&[
            "decrypt",
            &port,
            ROLE,
            SERVICE_ID,
            SERVICE_SECRET,
            blob,
            &context,
        ]))
        .unwrap()
    };
    assert_eq!(decrypt(&world.context), json!({ "key": id }));
    assert_eq!(decrypt(&EncryptionContext::new()), json!({ "code": "InvalidParameter" }));
    world.aliyun.set_state(id, "Disabled");
    assert_eq!(decrypt(&world.context), json!({ "code": "Rejected.Disabled" }));
    assert_eq!(
        kind(&world.unwrap(&wrapped).unwrap_err()),
        format!("{:?}", RevokedReason::Disabled)
    );
}
