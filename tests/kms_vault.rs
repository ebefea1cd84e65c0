//! The backend of Vault and OpenBao, tested against a real OpenBao server.

#![allow(clippy::unwrap_used)]

#[path = "common/kms_backend.rs"]
mod kms_backend;
#[path = "common/openbao.rs"]
mod openbao;

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, Once},
    thread,
    time::Duration,
};

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use envelog::{
    crypto::SecretKey,
    kms::{Cmk, EncryptionContext, Kms, KmsCall, KmsError, from_url},
    testing::conformance::{Admin, Subject, unsupported},
};
use kms_backend::{a_logstore_follows_its_key, conforms};
use openbao::OpenBao;
use serde_json::{Value, json};

const REGION: &str = "eu-1";
const ROLE: &str = "envelog";
const KEY: [u8; 32] = *b"the data key, which is a secret!";
const TIMEOUT: Duration = Duration::from_secs(20);

fn cmk(key: &str, role: &str) -> Cmk {
    Cmk { cmk_key_id: key.to_owned(), arn: role.to_owned(), region_id: REGION.to_owned() }
}

fn context() -> EncryptionContext {
    [("envelog:store".to_owned(), "7f3a".to_owned())].into()
}

fn wrap(kms: &dyn Kms, cmk: &Cmk) -> Result<Vec<u8>, KmsError> {
    let call = KmsCall { cmk, context: &context(), timeout: TIMEOUT };
    kms.wrap(&call, &SecretKey::from_bytes(&mut KEY.clone()))
}

fn unwrap(kms: &dyn Kms, cmk: &Cmk, wrapped: &[u8]) -> Result<[u8; 32], KmsError> {
    let call = KmsCall { cmk, context: &context(), timeout: TIMEOUT };
    kms.unwrap(&call, wrapped).map(|key| *key.expose())
}

/// The kind of an error.
#[track_caller]
fn kind<T: std::fmt::Debug>(answer: Result<T, KmsError>) -> String {
    match answer.unwrap_err() {
        KmsError::Revoked { reason, .. } => format!("{reason:?}"),
        KmsError::Unreachable { .. } => "Unreachable".to_owned(),
        KmsError::Invalid { .. } => "Invalid".to_owned(),
        other => panic!("{other}"),
    }
}

/// Both operations fail in this way.
#[track_caller]
fn assert_both(kms: &dyn Kms, cmk: &Cmk, wrapped: &[u8], expected: &str) {
    let (unwrapped, wrapped) = (unwrap(kms, cmk, wrapped), wrap(kms, cmk));
    let texts = format!("{unwrapped:?} {wrapped:?}");
    assert_eq!((kind(unwrapped).as_str(), kind(wrapped).as_str()), (expected, expected), "{texts}");
}

// ---- the tests of every backend ----

/// A way to log in, as the URL names it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Auth {
    AppRole,
    Kubernetes,
}

/// A server with a role, as the suite's subject. A key is named by its number.
struct Vault {
    bao: OpenBao,
    auth: Auth,
    /// The parameters of the URL that belong to the login.
    login: String,
    created: Mutex<usize>,
    permitted: Mutex<BTreeSet<String>>,
    _kubernetes: Option<Kubernetes>,
}

impl Vault {
    fn start(auth: Auth) -> Self {
        let bao = OpenBao::start();
        let (login, kubernetes) = match auth {
            Auth::AppRole => {
                let (role_id, secret_id) = bao.create_approle("", ROLE, &json!({}));
                (format!("approle&role-id-file={role_id}&secret-id-file={secret_id}"), None)
            }
            Auth::Kubernetes => {
                let kubernetes = Kubernetes::start(&bao);
                kubernetes.create_role(&bao, ROLE);
                let jwt = bao.file("jwt", &kubernetes.token("envelog"));
                (format!("kubernetes&jwt-file={jwt}"), Some(kubernetes))
            }
        };
        let (created, permitted) = Default::default();
        Self { bao, auth, login, created, permitted, _kubernetes: kubernetes }
    }

    fn write_policy(&self) {
        let permitted: Vec<_> = self.permitted.lock().unwrap().iter().cloned().collect();
        self.bao.set_policy("", ROLE, &permitted);
    }
}

impl Subject for Vault {
    fn kms(&self) -> Arc<dyn Kms> {
        self.kms_at(self.server().unwrap()).unwrap()
    }

    fn create_key(&self) -> Admin<Cmk> {
        let name = {
            let mut created = self.created.lock().unwrap();
            *created += 1;
            format!("orders-{created}")
        };
        self.bao.create_key("transit", &name);
        let cmk = cmk(&name, ROLE);
        self.permit(&cmk)?;
        Ok(cmk)
    }

    fn missing_key(&self) -> Cmk {
        let cmk = cmk("never", ROLE);
        self.permit(&cmk).unwrap();
        cmk
    }

    fn disable(&self, cmk: &Cmk) -> Admin {
        self.bao.soft_delete("transit", &cmk.cmk_key_id);
        Ok(())
    }

    fn enable(&self, cmk: &Cmk) -> Admin {
        self.bao.restore("transit", &cmk.cmk_key_id);
        Ok(())
    }

    fn schedule_deletion(&self, _: &Cmk) -> Admin {
        unsupported("Transit has no scheduled deletion")
    }

    fn cancel_deletion(&self, _: &Cmk) -> Admin {
        unsupported("Transit has no scheduled deletion")
    }

    fn delete(&self, cmk: &Cmk) -> Admin {
        self.bao.delete_key("transit", &cmk.cmk_key_id);
        Ok(())
    }

    fn recreate(&self, cmk: &Cmk) -> Admin {
        self.delete(cmk)?;
        self.bao.create_key("transit", &cmk.cmk_key_id);
        Ok(())
    }

    fn rotate(&self, cmk: &Cmk) -> Admin {
        self.bao.rotate("transit", &cmk.cmk_key_id);
        Ok(())
    }

    fn withdraw(&self, cmk: &Cmk) -> Admin {
        self.permitted.lock().unwrap().remove(&cmk.cmk_key_id);
        self.write_policy();
        Ok(())
    }

    fn permit(&self, cmk: &Cmk) -> Admin {
        self.permitted.lock().unwrap().insert(cmk.cmk_key_id.clone());
        self.write_policy();
        Ok(())
    }

    fn server(&self) -> Admin<SocketAddr> {
        Ok(match self.auth {
            Auth::AppRole => self.bao.address(),
            Auth::Kubernetes => self.bao.tls_address(),
        })
    }

    fn kms_at(&self, address: SocketAddr) -> Admin<Arc<dyn Kms>> {
        let server = match self.auth {
            Auth::AppRole => format!("http://{address}?"),
            Auth::Kubernetes => {
                format!("https://{address}?ca-file={}&", self.bao.ca_file().display())
            }
        };
        Ok(from_url(&format!("vault:{server}region={REGION}&auth={}", self.login)).unwrap())
    }

    fn secrets(&self) -> Vec<String> {
        let files = self.login.split("file=").skip(1);
        // The first file of an AppRole is its role id, which is no secret.
        let secrets = files.skip(usize::from(self.auth == Auth::AppRole));
        secrets.map(|file| fs::read_to_string(file.split('&').next().unwrap()).unwrap()).collect()
    }
}

/// AppRole, without TLS.
#[test]
fn openbao_conforms_with_an_approle() {
    conforms(&Vault::start(Auth::AppRole), &["pending-deletion"]);
}

/// Kubernetes, with TLS.
#[test]
fn openbao_conforms_with_kubernetes_and_tls() {
    conforms(&Vault::start(Auth::Kubernetes), &["pending-deletion"]);
}

#[test]
fn a_logstore_follows_its_key_in_openbao() {
    a_logstore_follows_its_key(&Vault::start(Auth::AppRole));
}

// ---- keys ----

/// A server, a key that the role `envelog` may use, and a backend that logs in with that AppRole.
struct World {
    bao: OpenBao,
    kms: Arc<dyn Kms>,
    cmk: Cmk,
    files: (String, String),
}

impl World {
    fn new() -> Self {
        Self::with(&json!({}))
    }

    /// With these settings of the AppRole.
    fn with(settings: &Value) -> Self {
        listen_to_the_log();
        let bao = OpenBao::start();
        bao.create_key("transit", "orders");
        bao.set_policy("", ROLE, &["orders".to_owned()]);
        let files = bao.create_approle("", ROLE, settings);
        let kms = from_url(&bao.approle_url(&files)).unwrap();
        Self { bao, kms, cmk: cmk("orders", ROLE), files }
    }

    fn wrap(&self) -> Result<Vec<u8>, KmsError> {
        wrap(&*self.kms, &self.cmk)
    }

    fn unwrap(&self, wrapped: &[u8]) -> Result<[u8; 32], KmsError> {
        unwrap(&*self.kms, &self.cmk, wrapped)
    }

    #[track_caller]
    fn assert_both(&self, wrapped: &[u8], expected: &str) {
        assert_both(&*self.kms, &self.cmk, wrapped, expected);
    }
}

#[test]
fn a_wrapped_key_is_transits_ciphertext_bound_to_the_context() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    let ciphertext = String::from_utf8(wrapped.clone()).unwrap();
    assert!(ciphertext.starts_with("vault:v1:"), "{ciphertext}");
    assert_eq!(world.kms.cmk_version(&wrapped).unwrap(), "1");
    // As `bao write transit/decrypt/orders` does it.
    let decrypt = |associated_data: &[u8]| {
        let associated_data = BASE64_STANDARD.encode(associated_data);
        let request = json!({ "ciphertext": ciphertext, "associated_data": associated_data });
        world.bao.ask("POST", "transit/decrypt/orders", &request)
    };
    let (status, answer) = decrypt(b"\x01\0\0\0\x0d\0\0\0envelog:store\x04\0\0\x007f3a");
    assert_eq!((status, &answer["data"]["plaintext"]), (200, &BASE64_STANDARD.encode(KEY).into()));
    assert_eq!(decrypt(b"").0, 400);
    // And the other way round.
    let request = json!({
        "plaintext": BASE64_STANDARD.encode([9; 32]),
        "associated_data": BASE64_STANDARD.encode(context().to_bytes()),
    });
    let answer = world.bao.ok("POST", "transit/encrypt/orders", &request);
    let wrapped = answer["data"]["ciphertext"].as_str().unwrap();
    assert_eq!(world.unwrap(wrapped.as_bytes()), Ok([9; 32]));
}

#[test]
fn a_version_below_the_minimum_is_disabled_until_allowed() {
    let world = World::new();
    let first = world.wrap().unwrap();
    world.bao.rotate("transit", "orders");
    let second = world.wrap().unwrap();
    assert_eq!(world.kms.cmk_version(&second).unwrap(), "2");
    let least = |version: u32| {
        world.bao.configure("transit", "orders", &json!({ "min_decryption_version": version }));
    };
    least(2);
    assert_eq!(kind(world.unwrap(&first)), "Disabled");
    assert_eq!(world.unwrap(&second), Ok(KEY));
    least(1);
    assert_eq!(world.unwrap(&first), Ok(KEY));
    // A version that was trimmed is gone forever, but Vault answers the same.
    let settings = json!({ "min_decryption_version": 2, "min_encryption_version": 2 });
    world.bao.configure("transit", "orders", &settings);
    world.bao.ok("POST", "transit/keys/orders/trim", &json!({ "min_available_version": 2 }));
    assert_eq!(kind(world.unwrap(&first)), "Disabled");
    assert_eq!(world.unwrap(&second), Ok(KEY));
}

#[test]
fn wrapping_never_creates_a_key() {
    let world = World::new();
    // Both a role that may create keys, and one that may not.
    for capabilities in [r#"["create", "update"]"#, r#"["update"]"#] {
        let policy = format!("path \"transit/*\" {{ capabilities = {capabilities} }}");
        world.bao.write_policy("", ROLE, &policy);
        let missing = cmk("missing", ROLE);
        assert_both(&*world.kms, &missing, &world.wrap().unwrap(), "Deleted");
        let (status, _) = world.bao.ask("GET", "transit/keys/missing", &Value::Null);
        assert_eq!(status, 404, "with {capabilities}");
    }
    // A role that may encrypt alone gets no wrapped key.
    let encrypt = r#"path "transit/encrypt/*" { capabilities = ["update"] }"#;
    world.bao.write_policy("", ROLE, encrypt);
    let kms = from_url(&world.bao.approle_url(&world.files)).unwrap();
    assert_eq!(kind(wrap(&*kms, &world.cmk)), "NotPermitted");
    assert_eq!(kind(wrap(&*kms, &cmk("missing", ROLE))), "NotPermitted");
}

#[test]
fn a_key_that_binds_no_context_is_invalid() {
    let world = World::new();
    let create = |name: &str, settings: &Value| {
        world.bao.ok("POST", &format!("transit/keys/{name}"), settings);
    };
    create("rsa", &json!({ "type": "rsa-2048" }));
    create("derived", &json!({ "derived": true }));
    create("signing", &json!({ "type": "ed25519" }));
    create("small", &json!({ "type": "aes128-gcm96" }));
    create("chacha", &json!({ "type": "chacha20-poly1305" }));
    let names = ["rsa", "derived", "signing", "small", "chacha"];
    world.bao.set_policy("", ROLE, &names.map(str::to_owned));
    let wrapped = wrap(&*world.kms, &cmk("small", ROLE)).unwrap();
    for (name, words) in
        [("rsa", "non-AEAD"), ("derived", "'context' for key derivation"), ("signing", "non-AEAD")]
    {
        let cmk = cmk(name, ROLE);
        assert_both(&*world.kms, &cmk, &wrapped, "Invalid");
        let error = wrap(&*world.kms, &cmk).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    for name in ["small", "chacha"] {
        let wrapped = wrap(&*world.kms, &cmk(name, ROLE)).unwrap();
        assert_eq!(unwrap(&*world.kms, &cmk(name, ROLE), &wrapped), Ok(KEY));
    }
    let long = "a".repeat(999);
    for name in ["", "..", "a/b", "../keys/small", "small?x", "sm all", "-a", "é", &long] {
        assert_both(&*world.kms, &cmk(name, ROLE), &wrapped, "Invalid");
    }
}

// ---- the server ----

#[test]
fn a_sealed_server_is_an_outage() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    world.bao.seal();
    world.assert_both(&wrapped, "Unreachable");
    // Also without a token.
    let kms = from_url(&world.bao.approle_url(&world.files)).unwrap();
    assert_both(&*kms, &world.cmk, &wrapped, "Unreachable");
    world.bao.unseal();
    assert_eq!(world.unwrap(&wrapped), Ok(KEY));
    assert_eq!(unwrap(&*kms, &world.cmk, &wrapped), Ok(KEY));
}

#[test]
fn a_quota_is_an_outage() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    let quota = json!({ "rate": 0.001, "path": "transit" });
    world.bao.ok("POST", "sys/quotas/rate-limit/one", &quota);
    // The first request after that may pass.
    let _ = world.unwrap(&wrapped);
    world.assert_both(&wrapped, "Unreachable");
    world.bao.ok("DELETE", "sys/quotas/rate-limit/one", &Value::Null);
    assert_eq!(world.unwrap(&wrapped), Ok(KEY));
}

#[test]
fn a_missing_mount_is_an_outage() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    world.bao.write_policy("", ROLE, r#"path "elsewhere/*" { capabilities = ["update"] }"#);
    let url = world.bao.approle_url(&world.files) + "&mount=elsewhere";
    assert_both(&*from_url(&url).unwrap(), &world.cmk, &wrapped, "Unreachable");
    let url = world.bao.approle_url(&world.files) + "&auth-mount=elsewhere";
    assert_both(&*from_url(&url).unwrap(), &world.cmk, &wrapped, "Unreachable");
    // The engine may be at another path.
    world.bao.ok("POST", "sys/mounts/elsewhere", &json!({ "type": "transit" }));
    world.bao.create_key("elsewhere", "orders");
    let url = world.bao.approle_url(&world.files) + "&mount=elsewhere";
    let kms = from_url(&url).unwrap();
    let wrapped = wrap(&*kms, &world.cmk).unwrap();
    assert_eq!(unwrap(&*kms, &world.cmk, &wrapped), Ok(KEY));
    // The default path is another engine, which the policy does not allow.
    world.assert_both(&wrapped, "NotPermitted");
}

#[test]
fn a_namespace_has_keys_roles_and_policies_of_its_own() {
    let world = World::new();
    world.bao.ok("POST", "sys/namespaces/customer", &json!({}));
    world.bao.ok("POST", "customer/sys/mounts/transit", &json!({ "type": "transit" }));
    world.bao.ok("POST", "customer/sys/auth/approle", &json!({ "type": "approle" }));
    world.bao.create_key("customer/transit", "orders");
    world.bao.set_policy("customer/", ROLE, &["orders".to_owned()]);
    let files = world.bao.create_approle("customer/", ROLE, &json!({}));
    let url = world.bao.approle_url(&files);
    let inside = from_url(&format!("{url}&namespace=customer")).unwrap();
    let wrapped = wrap(&*inside, &world.cmk).unwrap();
    assert_eq!(unwrap(&*inside, &world.cmk, &wrapped), Ok(KEY));
    // The key of the same name outside is another one.
    assert_eq!(kind(world.unwrap(&wrapped)), "Invalid");
    // The role of the namespace is unknown outside.
    assert_both(&*from_url(&url).unwrap(), &world.cmk, &wrapped, "Unreachable");

    // A login outside, with an engine inside.
    let rule = |operation: &str| {
        let path = format!("customer/transit/{operation}/orders");
        format!("path \"{path}\" {{ capabilities = [\"update\"] }}\n")
    };
    world.bao.write_policy("", ROLE, &(rule("encrypt") + &rule("decrypt")));
    let url = world.bao.approle_url(&world.files) + "&mount=customer/transit";
    assert_eq!(unwrap(&*from_url(&url).unwrap(), &world.cmk, &wrapped), Ok(KEY));

    let sealed_or_gone = |expected| assert_both(&*inside, &world.cmk, &wrapped, expected);
    world.bao.soft_delete("customer/transit", "orders");
    sealed_or_gone("Disabled");
    world.bao.restore("customer/transit", "orders");
    let namespace = format!("{}&namespace=nowhere", world.bao.approle_url(&files));
    assert_both(&*from_url(&namespace).unwrap(), &world.cmk, &wrapped, "Unreachable");
    world.bao.ok("DELETE", "sys/namespaces/customer", &Value::Null);
    sealed_or_gone("Unreachable");
}

// ---- logins ----

#[test]
fn a_token_is_kept_and_replaced_when_it_is_refused() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    let tokens = world.bao.tokens();
    for _ in 0..5 {
        assert_eq!(world.unwrap(&wrapped), Ok(KEY));
    }
    assert_eq!(world.bao.tokens(), tokens, "it logged in again");
    for _ in 0..3 {
        world.bao.revoke_approle_tokens();
        assert_eq!(world.unwrap(&wrapped), Ok(KEY));
        assert_eq!(world.wrap().map(|wrapped| wrapped.len()), Ok(wrapped.len()));
    }
    // A permission that only new tokens have is used at the next call.
    world.bao.create_key("transit", "more");
    world.bao.set_policy("", "more", &["more".to_owned()]);
    let more = cmk("more", ROLE);
    assert_both(&*world.kms, &more, &wrapped, "NotPermitted");
    let role = json!({ "token_policies": [ROLE, "more"] });
    world.bao.ok("POST", "auth/approle/role/envelog", &role);
    assert!(wrap(&*world.kms, &more).is_ok());
}

#[test]
fn a_token_that_has_expired_is_replaced() {
    for settings in [json!({ "token_ttl": "1s" }), json!({ "token_num_uses": 1 })] {
        let world = World::with(&settings);
        let wrapped = world.wrap().unwrap();
        for _ in 0..3 {
            thread::sleep(Duration::from_millis(1200));
            assert_eq!(world.unwrap(&wrapped), Ok(KEY), "{settings}");
        }
    }
    let batch = World::with(&json!({ "token_type": "batch", "token_ttl": "1s" }));
    let wrapped = batch.wrap().unwrap();
    thread::sleep(Duration::from_millis(1200));
    assert_eq!(batch.unwrap(&wrapped), Ok(KEY));
}

#[test]
fn a_refused_login_is_an_outage_a_denied_key_a_revocation() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    let url = world.bao.approle_url(&world.files);
    // The service's own credentials: a wrong, an empty and a missing secret id.
    let secret_id = fs::read_to_string(&world.files.1).unwrap();
    for text in [Some("a-wrong-secret-id"), Some(" \n"), Some("\u{7f}\""), None] {
        match text {
            Some(text) => fs::write(&world.files.1, text).unwrap(),
            None => fs::remove_file(&world.files.1).unwrap(),
        }
        let kms = from_url(&url).unwrap();
        assert_both(&*kms, &world.cmk, &wrapped, "Unreachable");
        // A kept token does not need it.
        assert_eq!(world.unwrap(&wrapped), Ok(KEY));
        fs::write(&world.files.1, format!("{secret_id}\n")).unwrap();
        assert_eq!(unwrap(&*kms, &world.cmk, &wrapped), Ok(KEY), "after {text:?}");
    }
    // The policy.
    world.bao.set_policy("", ROLE, &[]);
    world.assert_both(&wrapped, "NotPermitted");
    world.bao.set_policy("", ROLE, &["orders".to_owned()]);
    assert_eq!(world.unwrap(&wrapped), Ok(KEY));
    // The token is revoked and the secret id destroyed: the service cannot log in.
    world.bao.ok(
        "POST",
        "auth/approle/role/envelog/secret-id/destroy",
        &json!({
            "secret_id": secret_id,
        }),
    );
    world.bao.revoke_approle_tokens();
    world.assert_both(&wrapped, "Unreachable");
    fs::write(&world.files.1, world.bao.new_secret_id("", ROLE)).unwrap();
    assert_eq!(world.unwrap(&wrapped), Ok(KEY));
    // Vault lets the tokens of a deleted role live on. Without a token, the login is refused.
    world.bao.ok("DELETE", "auth/approle/role/envelog", &Value::Null);
    assert_eq!(world.unwrap(&wrapped), Ok(KEY));
    assert_both(&*from_url(&url).unwrap(), &world.cmk, &wrapped, "Unreachable");
}

#[test]
fn arn_is_the_approle_of_the_login() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    for other in ["another", "", "Envelog"] {
        let cmk = cmk("orders", other);
        assert_both(&*world.kms, &cmk, &wrapped, "Invalid");
        let error = unwrap(&*world.kms, &cmk, &wrapped).unwrap_err().to_string();
        assert!(error.contains("another AppRole"), "{error}");
    }
    assert_eq!(world.unwrap(&wrapped), Ok(KEY));
}

#[test]
fn a_token_in_a_file_is_read_at_each_call() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    let settings = json!({ "policies": [ROLE], "ttl": "1h" });
    let file = world.bao.file("token", "");
    let url = format!(
        "vault:http://{}?region={REGION}&auth=token-file&token-file={file}",
        world.bao.address()
    );
    let kms = from_url(&url).unwrap();
    let cmk = cmk("orders", "any text");
    let put = |token: &str| fs::write(&file, token).unwrap();
    assert_both(&*kms, &cmk, &wrapped, "Unreachable");
    let token = world.bao.create_token(&settings);
    put(&format!("{token}\n"));
    assert_eq!(unwrap(&*kms, &cmk, &wrapped), Ok(KEY));
    // A denial by the policy, and tokens that are not valid.
    world.bao.set_policy("", ROLE, &[]);
    assert_both(&*kms, &cmk, &wrapped, "NotPermitted");
    world.bao.set_policy("", ROLE, &["orders".to_owned()]);
    world.bao.ok("POST", "auth/token/revoke", &json!({ "token": token }));
    assert_both(&*kms, &cmk, &wrapped, "Unreachable");
    for text in ["s.no-token", "two words", "\u{e9}", "", "a\nb"] {
        put(text);
        assert_both(&*kms, &cmk, &wrapped, "Unreachable");
    }
    put(&world.bao.create_token(&settings));
    assert_eq!(unwrap(&*kms, &cmk, &wrapped), Ok(KEY));
    let short = world.bao.create_token(&json!({ "policies": [ROLE], "ttl": "1s" }));
    put(&short);
    thread::sleep(Duration::from_millis(1500));
    assert_both(&*kms, &cmk, &wrapped, "Unreachable");
    // A token that may not look itself up cannot show that it is valid.
    let blind = json!({ "policies": ["other"], "no_default_policy": true });
    put(&world.bao.create_token(&blind));
    assert_both(&*kms, &cmk, &wrapped, "Unreachable");
}

#[test]
fn arn_is_the_kubernetes_role_to_log_in_as() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    let kubernetes = Kubernetes::start(&world.bao);
    let file = world.bao.file("jwt", &kubernetes.token("envelog"));
    let url = format!(
        "vault:https://{}?ca-file={}&region={REGION}&auth=kubernetes&jwt-file={file}",
        world.bao.tls_address(),
        world.bao.ca_file().display()
    );
    let kms = from_url(&url).unwrap();
    // Two customers, each with a role, a policy and a key.
    world.bao.create_key("transit", "invoices");
    world.bao.set_policy("", "billing", &["invoices".to_owned()]);
    kubernetes.create_role(&world.bao, ROLE);
    kubernetes.create_role(&world.bao, "billing");
    let invoices = cmk("invoices", "billing");
    let billed = wrap(&*kms, &invoices).unwrap();
    for _ in 0..2 {
        assert_eq!(unwrap(&*kms, &world.cmk, &wrapped), Ok(KEY));
        assert_eq!(unwrap(&*kms, &invoices, &billed), Ok(KEY));
        // One customer's role is no way to the other's key.
        assert_both(&*kms, &cmk("invoices", ROLE), &billed, "NotPermitted");
        assert_both(&*kms, &cmk("orders", "billing"), &wrapped, "NotPermitted");
    }

    // The customer refuses the service account, or deletes the role. A new instance has no token.
    let fresh = || from_url(&url).unwrap();
    let bind = |names: &str, namespaces: &str| {
        let settings = json!({
            "bound_service_account_names": names, "bound_service_account_namespaces": namespaces,
        });
        world.bao.ok("POST", "auth/kubernetes/role/envelog", &settings);
    };
    bind("another", "logs");
    assert_both(&*fresh(), &world.cmk, &wrapped, "NotPermitted");
    bind("envelog", "another");
    assert_both(&*fresh(), &world.cmk, &wrapped, "NotPermitted");
    bind("envelog", "logs");
    assert_eq!(unwrap(&*fresh(), &world.cmk, &wrapped), Ok(KEY));
    world.bao.ok("DELETE", "auth/kubernetes/role/envelog", &Value::Null);
    assert_both(&*fresh(), &world.cmk, &wrapped, "NotPermitted");
    // Vault lets the tokens of a deleted role live on.
    assert_eq!(unwrap(&*kms, &world.cmk, &wrapped), Ok(KEY));
    kubernetes.create_role(&world.bao, ROLE);

    // The service's own token: unknown to Kubernetes, expired, no token at all, no file.
    kubernetes.remove_tokens();
    assert_both(&*fresh(), &world.cmk, &wrapped, "Unreachable");
    for text in [kubernetes.token_until("envelog", 1_700_000_100), "nonsense".to_owned()] {
        fs::write(&file, text).unwrap();
        assert_both(&*fresh(), &world.cmk, &wrapped, "Unreachable");
    }
    fs::remove_file(&file).unwrap();
    assert_both(&*fresh(), &world.cmk, &wrapped, "Unreachable");
    fs::write(&file, kubernetes.token("envelog")).unwrap();
    assert_eq!(unwrap(&*fresh(), &world.cmk, &wrapped), Ok(KEY));
}

#[test]
fn tls_trusts_the_given_certificate_alone() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    let (role_id, secret_id) = &world.files;
    let url = |host: &str, more: &str| {
        format!(
            "vault:https://{host}:{}?region={REGION}&auth=approle&role-id-file={role_id}\
             &secret-id-file={secret_id}{more}",
            world.bao.tls_address().port()
        )
    };
    let ca = format!("&ca-file={}", world.bao.ca_file().display());
    for host in ["127.0.0.1", "localhost"] {
        assert_eq!(unwrap(&*from_url(&url(host, &ca)).unwrap(), &world.cmk, &wrapped), Ok(KEY));
    }
    let empty = world.bao.file("empty", "");
    for (host, more) in [
        // A name that is not in the certificate; the certificates of the system; no certificate.
        ("127.0.0.2", ca.as_str()),
        ("127.0.0.1", ""),
        ("127.0.0.1", &format!("&ca-file={empty}")),
        ("127.0.0.1", "&ca-file=/nowhere/ca.pem"),
    ] {
        let kms = from_url(&url(host, more)).unwrap();
        assert_both(&*kms, &world.cmk, &wrapped, "Unreachable");
    }
}

// ---- secrets ----

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

/// Records all log lines of the HTTP and TLS libraries.
fn listen_to_the_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        log::set_logger(&Listener).unwrap();
        log::set_max_level(log::LevelFilter::Trace);
    });
}

#[test]
fn no_secret_is_in_a_log_an_error_or_debug_output() {
    let world = World::new();
    let wrapped = world.wrap().unwrap();
    world.unwrap(&wrapped).unwrap();
    let token = world.bao.create_token(&json!({ "policies": ["none"], "ttl": "1h" }));
    let file = world.bao.file("token", &token);
    let url = format!(
        "vault:http://{}?region={REGION}&auth=token-file&token-file={file}",
        world.bao.address()
    );
    let by_token = from_url(&url).unwrap();
    let mut shown = format!("{:?} {by_token:?}", world.kms);
    shown += &format!("{:?}", unwrap(&*by_token, &world.cmk, &wrapped));
    world.bao.set_policy("", ROLE, &[]);
    shown += &format!("{:?} {:?} {:?}", world.wrap(), world.unwrap(&wrapped), world.kms);
    let log = LOG.lock().unwrap().clone();
    assert!(log.contains("/v1/transit/decrypt/orders"), "the log is listened to:\n{log:.2000}");
    let secret_id = fs::read_to_string(&world.files.1).unwrap();
    let hex: String = KEY.iter().map(|byte| format!("{byte:02x}")).collect();
    let key = String::from_utf8_lossy(&KEY).into_owned();
    for secret in [token, secret_id, BASE64_STANDARD.encode(KEY), hex, key] {
        for (place, text) in [("log", &log), ("error", &shown)] {
            assert!(!text.contains(&secret), "a secret is in {place}");
        }
    }
}

// ---- the API of Kubernetes ----

/// A stand-in for the API of Kubernetes that reviews tokens. OpenBao asks it at each login.
struct Kubernetes {
    /// The tokens that exist.
    valid: Arc<Mutex<BTreeSet<String>>>,
}

impl Kubernetes {
    /// Starts the API, and configures the auth method of the server with it.
    fn start(bao: &OpenBao) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let valid: Arc<Mutex<BTreeSet<String>>> = Arc::default();
        let tokens = Arc::clone(&valid);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (tokens, stream) = (Arc::clone(&tokens), stream.unwrap());
                thread::spawn(move || drop(review_tokens(&stream, &tokens)));
            }
        });
        bao.ok("POST", "sys/auth/kubernetes", &json!({ "type": "kubernetes" }));
        let config = json!({
            "kubernetes_host": format!("http://{address}"), "disable_local_ca_jwt": true,
            "token_reviewer_jwt": "the-token-of-the-reviewer",
            "kubernetes_ca_cert": fs::read_to_string(bao.ca_file()).unwrap(),
        });
        bao.ok("POST", "auth/kubernetes/config", &config);
        Self { valid }
    }

    /// Creates a role for the service account `envelog` of the namespace `logs`, with the policy of
    /// the same name.
    fn create_role(&self, bao: &OpenBao, name: &str) {
        let settings = json!({
            "bound_service_account_names": "envelog", "bound_service_account_namespaces": "logs",
            "token_policies": [name],
        });
        bao.ok("POST", &format!("auth/kubernetes/role/{name}"), &settings);
    }

    /// Issues a token of a service account of the namespace `logs`.
    fn token(&self, account: &str) -> String {
        self.token_until(account, 4_000_000_000)
    }

    /// Issues a token that expires at this time, in seconds since the Unix epoch.
    fn token_until(&self, account: &str, expires: u64) -> String {
        let part = |json: Value| BASE64_URL_SAFE_NO_PAD.encode(json.to_string());
        let claims = json!({
            "iss": "kubernetes/serviceaccount", "iat": 1_700_000_000, "nbf": 1_700_000_000,
            "exp": expires,
            "kubernetes.io": {
                "namespace": "logs", "serviceaccount": { "name": account, "uid": "uid-1" },
            },
        });
        let number = self.valid.lock().unwrap().len();
        let token = format!(
            "{}.{}.{}",
            part(json!({ "alg": "RS256", "typ": "JWT" })),
            part(claims),
            BASE64_URL_SAFE_NO_PAD.encode(format!("a signature, number {number}"))
        );
        self.valid.lock().unwrap().insert(token.clone());
        token
    }

    /// Removes all tokens.
    fn remove_tokens(&self) {
        self.valid.lock().unwrap().clear();
    }
}

/// Serves `TokenReview` on one connection.
fn review_tokens(stream: &TcpStream, valid: &Mutex<BTreeSet<String>>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let (mut len, mut first) = (0, true);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if first {
                assert!(line.contains("/apis/authentication.k8s.io/v1/tokenreviews"), "{line}");
                first = false;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                len = value.trim().parse().unwrap();
            }
            if line.trim_end().is_empty() {
                break;
            }
        }
        let mut body = vec![0; len];
        reader.read_exact(&mut body)?;
        let review: Value = serde_json::from_slice(&body)?;
        let token = review["spec"]["token"].as_str().unwrap();
        let status = if valid.lock().unwrap().contains(token) {
            let claims = BASE64_URL_SAFE_NO_PAD.decode(token.split('.').nth(1).unwrap()).unwrap();
            let claims: Value = serde_json::from_slice(&claims)?;
            let account = &claims["kubernetes.io"]["serviceaccount"];
            let name = format!("system:serviceaccount:logs:{}", account["name"].as_str().unwrap());
            json!({ "authenticated": true, "user": { "username": name, "uid": account["uid"] } })
        } else {
            json!({ "authenticated": false })
        };
        let answer = json!({
            "kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "status": status,
        })
        .to_string();
        let len = answer.len();
        write!(
            &*stream,
            "HTTP/1.1 201 Created\r\ncontent-type: application/json\r\ncontent-length: {len}\r\n\
             \r\n{answer}"
        )?;
    }
}
