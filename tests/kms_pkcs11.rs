//! Keys in a PKCS#11 token, with SoftHSM.

#![allow(clippy::unwrap_used)]

#[path = "common/kms_backend.rs"]
mod kms_backend;
#[path = "common/pkcs11.rs"]
mod pkcs11;

use std::{
    fs,
    net::SocketAddr,
    os::unix::process::CommandExt,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use envelog::{
    AppendOptions, Cmk, EncryptConf, EncryptType, Error, Logstore, LogstoreSpec, Payload, Position,
    ReadOptions, Store, StoreBuilder, StoreOptions,
    crypto::{AwsLc, SecretKey},
    kms::{EncryptionContext, Kms, KmsCall, KmsError, RevokedReason, from_url},
    testing::conformance::{Admin, Subject, unsupported},
};
use kms_backend::{NETWORK, a_logstore_follows_its_key, conforms};
use pkcs11::{PIN, Token, in_own_process};

const REGION: &str = "cn-hangzhou";
const SECRET: [u8; 32] = [7; 32];

fn cmk(name: &str) -> Cmk {
    Cmk { cmk_key_id: name.to_owned(), arn: "pkcs11:user".to_owned(), region_id: REGION.to_owned() }
}

fn context(value: &str) -> EncryptionContext {
    EncryptionContext::from([
        ("envelog:store".to_owned(), value.to_owned()),
        ("envelog:purpose".to_owned(), "test".to_owned()),
    ])
}

fn wrap(kms: &dyn Kms, key: &str) -> Result<Vec<u8>, KmsError> {
    let (cmk, context, mut secret) = (cmk(key), context("a"), SECRET);
    let call = KmsCall { cmk: &cmk, context: &context, timeout: Duration::from_secs(20) };
    kms.wrap(&call, &SecretKey::from_bytes(&mut secret))
}

fn unwrap_in(
    kms: &dyn Kms,
    key: &str,
    context: &EncryptionContext,
    wrapped: &[u8],
) -> Result<[u8; 32], KmsError> {
    let cmk = cmk(key);
    let call = KmsCall { cmk: &cmk, context, timeout: Duration::from_secs(20) };
    kms.unwrap(&call, wrapped).map(|key| *key.expose())
}

fn unwrap(kms: &dyn Kms, key: &str, wrapped: &[u8]) -> Result<[u8; 32], KmsError> {
    unwrap_in(kms, key, &context("a"), wrapped)
}

#[track_caller]
fn assert_revoked<T: std::fmt::Debug>(answer: Result<T, KmsError>, wanted: RevokedReason) {
    assert!(
        matches!(&answer, Err(KmsError::Revoked { reason, .. }) if *reason == wanted),
        "{wanted}: {answer:?}"
    );
}

#[track_caller]
fn assert_unreachable<T: std::fmt::Debug>(answer: Result<T, KmsError>, words: &str) {
    assert!(
        matches!(&answer, Err(KmsError::Unreachable { detail }) if detail.contains(words)),
        "{answer:?}"
    );
}

#[track_caller]
fn assert_invalid<T: std::fmt::Debug>(answer: Result<T, KmsError>, words: &str) {
    assert!(
        matches!(&answer, Err(KmsError::Invalid { detail }) if detail.contains(words)),
        "{answer:?}"
    );
}

/// Fails if SoftHSM is missing. [`Token::admin`] also starts this test.
#[test]
fn softhsm_is_there() {
    pkcs11::admin();
}

#[test]
fn a_key_is_wrapped_for_its_context_alone() {
    in_own_process("a_key_is_wrapped_for_its_context_alone", |token| {
        token.admin("generate cmk 0a");
        token.admin("generate other 0b");
        let kms = from_url(&token.uri()).unwrap();
        assert!(kms.serves(REGION) && !kms.serves("cn-beijing"));
        let wrapped = wrap(&*kms, "cmk").unwrap();
        assert_eq!(wrapped.len(), 66);
        assert_ne!(wrap(&*kms, "cmk").unwrap(), wrapped);
        assert!(!wrapped.windows(8).any(|part| part == &SECRET[..8]));
        assert_eq!(unwrap(&*kms, "cmk", &wrapped), Ok(SECRET));
        assert_eq!(unwrap(&*kms, "id:0a", &wrapped), Ok(SECRET), "by its other name");
        let shorter = EncryptionContext::from([("envelog:store".to_owned(), "a".to_owned())]);
        for other in [context("b"), EncryptionContext::new(), shorter] {
            assert_invalid(unwrap_in(&*kms, "cmk", &other, &wrapped), "another context");
        }
        assert_invalid(unwrap(&*kms, "other", &wrapped), "another key");
        for at in 0..wrapped.len() {
            let mut damaged = wrapped.clone();
            damaged[at] ^= 1;
            assert_invalid(unwrap(&*kms, "cmk", &damaged), "");
            assert_invalid(unwrap(&*kms, "cmk", &wrapped[..at]), "");
        }
        assert_invalid(unwrap(&*kms, "cmk", &[&wrapped[..], &[0]].concat()), "length");
        assert_eq!(unwrap(&*kms, "cmk", &wrapped), Ok(SECRET), "after all that");
        let elsewhere = Cmk { region_id: "cn-beijing".to_owned(), ..cmk("cmk") };
        let call =
            KmsCall { cmk: &elsewhere, context: &context("a"), timeout: Duration::from_secs(20) };
        assert_invalid(kms.unwrap(&call, &wrapped), "region");
        assert!(!format!("{kms:?}").contains(PIN));
    });
}

#[test]
fn what_the_owner_does_to_a_key_counts_at_the_next_call() {
    in_own_process("what_the_owner_does_to_a_key_counts_at_the_next_call", |token| {
        token.admin("generate cmk 0a");
        let kms = from_url(&token.uri()).unwrap();
        let wrapped = wrap(&*kms, "cmk").unwrap();
        assert_eq!(unwrap(&*kms, "cmk", &wrapped), Ok(SECRET));

        token.admin("decrypt cmk false");
        assert_revoked(unwrap(&*kms, "cmk", &wrapped), RevokedReason::Disabled);
        assert_revoked(wrap(&*kms, "cmk"), RevokedReason::Disabled);
        token.admin("decrypt cmk true");
        assert_eq!(unwrap(&*kms, "cmk", &wrapped), Ok(SECRET));

        token.admin("encrypt cmk false");
        assert_revoked(wrap(&*kms, "cmk"), RevokedReason::Disabled);
        assert_eq!(unwrap(&*kms, "cmk", &wrapped), Ok(SECRET), "it may still decrypt");
        token.admin("encrypt cmk true");

        token.admin("generate cmk 0b");
        assert_invalid(unwrap(&*kms, "cmk", &wrapped), "several");
        assert_eq!(unwrap(&*kms, "id:0a", &wrapped), Ok(SECRET));
        assert_invalid(unwrap(&*kms, "id:0b", &wrapped), "another key");

        token.admin("destroy cmk");
        token.admin("destroy cmk");
        for name in ["cmk", "id:0a", "id:0A", "id:", "id:xy"] {
            assert_revoked(unwrap(&*kms, name, &wrapped), RevokedReason::Deleted);
            assert_revoked(wrap(&*kms, name), RevokedReason::Deleted);
        }
        token.admin("generate weak 0c short");
        token.admin("generate loose 0d extractable");
        for name in ["weak", "loose"] {
            assert_revoked(wrap(&*kms, name), RevokedReason::NotPermitted);
        }
    });
}

#[test]
fn a_token_that_is_away_is_an_outage_and_comes_back() {
    in_own_process("a_token_that_is_away_is_an_outage_and_comes_back", |token| {
        token.admin("generate cmk 0a");
        // The token is configured before it is present.
        token.take_away();
        let kms = from_url(&token.uri()).unwrap();
        assert_unreachable(wrap(&*kms, "cmk"), "");
        token.put_back();
        let wrapped = wrap(&*kms, "cmk").unwrap();
        // A token that is removed while in use is never mistaken for one without keys.
        for _ in 0..3 {
            token.take_away();
            for _ in 0..3 {
                assert_unreachable(unwrap(&*kms, "cmk", &wrapped), "");
                assert_unreachable(unwrap(&*kms, "none", &wrapped), "");
            }
            token.put_back();
            assert_eq!(unwrap(&*kms, "cmk", &wrapped), Ok(SECRET));
        }
        // There are tokens, but not the configured one.
        let other = from_url(&token.uri().replace("token=logs", "token=other")).unwrap();
        assert_unreachable(unwrap(&*other, "cmk", &wrapped), "no token");
        assert_eq!(
            unwrap(&*kms, "cmk", &wrapped),
            Ok(SECRET),
            "whatever the other one did to the module"
        );
        for (part, same) in [
            ("slot-id=1", false),
            ("manufacturer=SoftHSM%20project", true),
            ("model=SoftHSM%20v2", true),
        ] {
            let kms = from_url(&token.uri().replace("token=logs", &format!("token=logs;{part}")))
                .unwrap();
            assert_eq!(unwrap(&*kms, "cmk", &wrapped).is_ok(), same, "{part}");
        }
        let library =
            from_url(&token.uri().replace("token=logs", "library-manufacturer=Another")).unwrap();
        assert_invalid(unwrap(&*library, "cmk", &wrapped), "module");
        let missing = from_url("pkcs11:?region=cn-hangzhou&module-path=/nowhere/p11.so").unwrap();
        assert_unreachable(unwrap(&*missing, "cmk", &wrapped), "/nowhere/p11.so");
    });
}

#[test]
fn a_refused_pin_is_an_outage_and_is_not_tried_again() {
    in_own_process("a_refused_pin_is_an_outage_and_is_not_tried_again", |token| {
        token.admin("generate cmk 0a");
        let file = token.path("pin");
        let uri = token.uri_with(&format!("&pin-source=file:{}", file.display()));
        let kms = from_url(&uri).unwrap();
        assert_unreachable(wrap(&*kms, "cmk"), "the PIN cannot be read");
        fs::write(&file, "\n").unwrap();
        assert_unreachable(wrap(&*kms, "cmk"), "empty");
        fs::write(&file, "123456\n").unwrap();
        assert_unreachable(wrap(&*kms, "cmk"), "CKR_PIN_INCORRECT");
        // The stored PIN would now be right, but the backend must not retry it.
        pkcs11::change_pin(PIN, "123456");
        assert_unreachable(wrap(&*kms, "cmk"), "not tried again");
        let another = from_url(
            &uri.replace("pin-source", "x")
                .replace(&format!("x=file:{}", file.display()), "pin-value=123456"),
        );
        assert_unreachable(wrap(&*another.unwrap(), "cmk"), "not tried again");
        pkcs11::change_pin("123456", "777777");
        fs::write(&file, "777777").unwrap();
        let wrapped = wrap(&*kms, "cmk").unwrap();
        assert_eq!(unwrap(&*kms, "cmk", &wrapped), Ok(SECRET));
        let none = from_url(&token.uri_with("")).unwrap();
        // One login serves all sessions of a process, so the case without a PIN must be first.
        drop(kms);
        assert_unreachable(wrap(&*none, "cmk"), "wants a PIN");
    });
}

#[test]
fn a_lost_session_login_or_module_is_got_back_at_the_next_call() {
    in_own_process("a_lost_session_login_or_module_is_got_back_at_the_next_call", |token| {
        token.admin("generate cmk 0a");
        let kms = from_url(&token.uri()).unwrap();
        let wrapped = wrap(&*kms, "cmk").unwrap();
        let other = pkcs11::context();
        other.clone().finalize().unwrap();
        assert_eq!(unwrap(&*kms, "cmk", &wrapped), Ok(SECRET), "finalized");
        other.finalize().unwrap();
        let other = pkcs11::context();
        assert_eq!(unwrap(&*kms, "cmk", &wrapped), Ok(SECRET), "without its sessions");
        let session = other.open_ro_session(pkcs11::slot(&other)).unwrap();
        session.logout().unwrap();
        assert_eq!(unwrap(&*kms, "cmk", &wrapped), Ok(SECRET), "logged out");
    });
}

#[test]
fn a_module_that_others_have_initialized_is_not_finalized() {
    in_own_process("a_module_that_others_have_initialized_is_not_finalized", |token| {
        token.admin("generate cmk 0a");
        let others = pkcs11::context();
        let session = others.open_ro_session(pkcs11::slot(&others)).unwrap();
        let kms = from_url(&token.uri()).unwrap();
        let wrapped = wrap(&*kms, "cmk").unwrap();
        let absent = from_url(&token.uri().replace("token=logs", "token=other")).unwrap();
        assert_unreachable(unwrap(&*absent, "cmk", &wrapped), "no token");
        session.get_session_info().unwrap();
    });
}

#[test]
fn many_threads_at_once_and_a_lost_login_under_them() {
    in_own_process("many_threads_at_once_and_a_lost_login_under_them", |token| {
        token.admin("generate cmk 0a");
        token.admin("generate other 0b");
        let kms = from_url(&token.uri()).unwrap();
        let wrapped =
            [("cmk", wrap(&*kms, "cmk").unwrap()), ("other", wrap(&*kms, "other").unwrap())];
        let all = |times: usize| {
            thread::scope(|scope| {
                for n in 0..48 {
                    let (kms, (key, wrapped)) = (&kms, &wrapped[n % 2]);
                    scope.spawn(move || {
                        (0..times)
                            .for_each(|_| assert_eq!(unwrap(&**kms, key, wrapped), Ok(SECRET)));
                    });
                }
            });
        };
        all(20);
        let other = pkcs11::context();
        let session = other.open_ro_session(pkcs11::slot(&other)).unwrap();
        // Without a login the keys are invisible. While some threads log in again, others search
        // for the keys and must not report them as deleted.
        for _ in 0..20 {
            session.logout().unwrap();
            all(1);
        }
    });
}

#[test]
fn a_forked_child_touches_nothing_of_its_parent() {
    in_own_process("a_forked_child_touches_nothing_of_its_parent", |token| {
        token.admin("generate cmk 0a");
        let kms = from_url(&token.uri()).unwrap();
        let wrapped = wrap(&*kms, "cmk").unwrap();
        let (in_child, wrapped_in_child) = (Arc::clone(&kms), wrapped.clone());
        let mut child = Command::new("true");
        // No other thread of the parent uses the KMS, so no thread that is gone can hold one of its
        // locks. The closure does not print, and the child ends with its return value. SAFETY: the
        // closure runs in a forked child, which contains only the forking thread. It takes no lock
        // that another thread held, and the C library keeps its allocator usable across `fork`.
        unsafe {
            child.pre_exec(move || match unwrap(&*in_child, "cmk", &wrapped_in_child) {
                // SoftHSM does not allow another initialization in a child.
                Err(KmsError::Unreachable { .. }) => Ok(()),
                _ => Err(std::io::Error::from_raw_os_error(100)),
            });
        }
        assert!(child.status().unwrap().success());
        drop(child);
        assert_eq!(unwrap(&*kms, "cmk", &wrapped), Ok(SECRET));
    });
}

// ---- the tests of every backend ----

/// The token as the suite's subject. A key is named by its number.
struct Softhsm<'a> {
    token: &'a Token,
    created: AtomicU8,
}

impl<'a> Softhsm<'a> {
    fn new(token: &'a Token) -> Self {
        Self { token, created: AtomicU8::new(0) }
    }

    fn generate(&self, name: &str) {
        // Another identifier for each key object.
        let id = self.created.fetch_add(1, Ordering::SeqCst);
        self.token.admin(&format!("generate {name} {id:02x}"));
    }

    fn admin(&self, words: &str) -> Admin {
        self.token.admin(words);
        Ok(())
    }
}

impl Subject for Softhsm<'_> {
    fn kms(&self) -> Arc<dyn Kms> {
        from_url(&self.token.uri()).unwrap()
    }

    fn create_key(&self) -> Admin<Cmk> {
        let name = format!("cmk-{}", self.created.load(Ordering::SeqCst));
        self.generate(&name);
        Ok(cmk(&name))
    }

    fn missing_key(&self) -> Cmk {
        cmk("none")
    }

    fn disable(&self, cmk: &Cmk) -> Admin {
        self.admin(&format!("decrypt {} false", cmk.cmk_key_id))
    }

    fn enable(&self, cmk: &Cmk) -> Admin {
        self.admin(&format!("decrypt {} true", cmk.cmk_key_id))
    }

    fn schedule_deletion(&self, _: &Cmk) -> Admin {
        unsupported("PKCS#11 has no scheduled deletion")
    }

    fn cancel_deletion(&self, _: &Cmk) -> Admin {
        unsupported("PKCS#11 has no scheduled deletion")
    }

    fn delete(&self, cmk: &Cmk) -> Admin {
        self.admin(&format!("destroy {}", cmk.cmk_key_id))
    }

    fn recreate(&self, cmk: &Cmk) -> Admin {
        self.delete(cmk)?;
        self.generate(&cmk.cmk_key_id);
        Ok(())
    }

    fn rotate(&self, _: &Cmk) -> Admin {
        unsupported("a key object has no versions")
    }

    fn withdraw(&self, _: &Cmk) -> Admin {
        unsupported("PKCS#11 has no roles")
    }

    fn permit(&self, _: &Cmk) -> Admin {
        unsupported("PKCS#11 has no roles")
    }

    fn server(&self) -> Admin<SocketAddr> {
        unsupported("a token is called in the process, and a call cannot be interrupted")
    }

    fn kms_at(&self, _: SocketAddr) -> Admin<Arc<dyn Kms>> {
        unsupported("a token is called in the process, and a call cannot be interrupted")
    }

    fn secrets(&self) -> Vec<String> {
        vec![PIN.to_owned()]
    }
}

#[test]
fn softhsm_conforms() {
    in_own_process("softhsm_conforms", |token| {
        let lacks = ["pending-deletion", "not-permitted", "rotation"];
        conforms(&Softhsm::new(token), &[&lacks[..], &NETWORK].concat());
    });
}

#[test]
fn a_logstore_follows_its_key_in_a_token() {
    in_own_process("a_logstore_follows_its_key_in_a_token", |token| {
        a_logstore_follows_its_key(&Softhsm::new(token));
    });
}

// ---- with a store ----

/// Long enough for a slow machine: the test triggers checks with `revalidate_now` and waits for the
/// rest.
const PATIENCE: Duration = Duration::from_secs(60);

fn builder(token: &Token) -> StoreBuilder {
    let mut options = StoreOptions::default();
    options.revalidate_every = Duration::from_millis(100);
    options.outage_grace = Duration::from_millis(500);
    options.kms_timeout = Duration::from_secs(10);
    let kms = from_url(&token.uri()).unwrap();
    Store::builder(token.path("store"), token.path("keyring"), AwsLc::new())
        .kms(kms)
        .options(options)
}

fn put(logstore: &Logstore, text: &str) -> Result<(), Error> {
    logstore.append(Payload::opaque(text.to_owned()).unwrap(), &AppendOptions::default()).map(drop)
}

fn texts(logstore: &Logstore) -> Result<Vec<String>, Error> {
    let reader = logstore.read(0, &ReadOptions::default().from(Position::Begin))?;
    reader.map(|record| Ok(String::from_utf8(record?.bytes.to_vec()).unwrap())).collect()
}

/// Waits until the Logstore gives this result, while leases are renewed and expire.
#[track_caller]
fn wait_for(logstore: &Logstore, wanted: impl Fn(&Result<Vec<String>, Error>) -> bool) {
    let began = Instant::now();
    loop {
        let found = texts(logstore);
        if wanted(&found) {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "still {found:?}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_logstore_lives_and_dies_with_its_key_in_the_token() {
    in_own_process("a_logstore_lives_and_dies_with_its_key_in_the_token", |token| {
        token.admin("generate cmk 0a");
        token.admin("generate loose 0d extractable");
        let store = builder(token).create().unwrap();
        let spec = |key: &str| {
            LogstoreSpec::default().encrypt_conf(EncryptConf::byok(EncryptType::Sm4, cmk(key)))
        };
        let refused =
            store.create_logstore(&"p/refused".parse().unwrap(), spec("loose")).unwrap_err();
        assert!(
            matches!(&refused, Error::Config(_))
                && refused.to_string().contains("can leave the token"),
            "{refused}"
        );
        let logstore = store.create_logstore(&"p/customer".parse().unwrap(), spec("cmk")).unwrap();
        let plain =
            store.create_logstore(&"p/other".parse().unwrap(), LogstoreSpec::default()).unwrap();
        put(&logstore, "before").unwrap();
        put(&plain, "before").unwrap();

        token.admin("decrypt cmk false");
        wait_for(
            &logstore,
            |found| matches!(found, Err(Error::Revoked { reason: RevokedReason::Disabled, cmk, .. }) if cmk == "cmk"),
        );
        assert!(matches!(put(&logstore, "no"), Err(Error::Revoked { .. })));
        assert_eq!(texts(&plain).unwrap(), ["before"]);
        token.admin("decrypt cmk true");
        wait_for(&logstore, |found| found.as_ref().is_ok_and(|texts| texts == &["before"]));
        put(&logstore, "between").unwrap();

        token.take_away();
        wait_for(&logstore, |found| matches!(found, Err(Error::KmsUnreachable { .. })));
        assert!(matches!(put(&logstore, "no"), Err(Error::KmsUnreachable { .. })));
        put(&plain, "meanwhile").unwrap();
        token.put_back();
        wait_for(&logstore, |found| {
            found.as_ref().is_ok_and(|texts| texts == &["before", "between"])
        });
        put(&logstore, "after").unwrap();

        // A rotation creates another key object.
        token.admin("generate next 0b");
        let name = "p/customer".parse().unwrap();
        store
            .keys()
            .replace_cmk(&name, cmk("next"), envelog::admin::ReplaceCmk::default())
            .unwrap();
        token.admin("destroy cmk");
        put(&logstore, "rotated").unwrap();
        drop((logstore, plain));
        store.close().unwrap();

        let store = builder(token).open().unwrap();
        let logstore = store.logstore(&name).unwrap();
        assert_eq!(texts(&logstore).unwrap(), ["before", "between", "after", "rotated"]);
        token.admin("destroy next");
        wait_for(&logstore, |found| {
            matches!(found, Err(Error::Revoked { reason: RevokedReason::Deleted, .. }))
        });
        assert_eq!(
            texts(&store.logstore(&"p/other".parse().unwrap()).unwrap()).unwrap(),
            ["before", "meanwhile"]
        );
    });
}

#[test]
fn the_service_key_lives_in_the_token_too() {
    in_own_process("the_service_key_lives_in_the_token_too", |token| {
        token.admin("generate service 0a");
        token.admin("generate next 0b");
        let name = "p/l".parse().unwrap();
        let store = builder(token).service_cmk(cmk("service")).create().unwrap();
        let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::service_key(EncryptType::Sm4));
        put(&store.create_logstore(&name, spec).unwrap(), "before").unwrap();
        store.close().unwrap();
        let sealed = fs::read(token.path("keyring")).unwrap();

        // Without the token, opening fails as an outage; with a key that may not decrypt, as a
        // refusal.
        token.take_away();
        let error = builder(token).open().unwrap_err();
        assert!(
            matches!(&error, Error::ServiceKey { cause: KmsError::Unreachable { .. }, .. }),
            "{error:?}"
        );
        token.put_back();
        token.admin("decrypt service false");
        let error = builder(token).open().unwrap_err();
        assert!(
            matches!(
                &error,
                Error::ServiceKey {
                    cause: KmsError::Revoked { reason: RevokedReason::Disabled, .. },
                    ..
                }
            ),
            "{error:?}"
        );
        token.admin("decrypt service true");

        // A rotation creates another key object, which cannot open ciphertexts of the first.
        let store = builder(token).open().unwrap();
        let logstore = store.logstore(&name).unwrap();
        assert_eq!(texts(&logstore).unwrap(), ["before"]);
        store.keys().rewrap_keyring(Some(cmk("next"))).unwrap();
        store.keys().rotate_service_key().unwrap();
        token.admin("destroy service");
        put(&logstore, "after").unwrap();
        drop(logstore);
        store.close().unwrap();
        assert_ne!(fs::read(token.path("keyring")).unwrap(), sealed);
        let store = builder(token).open().unwrap();
        assert_eq!(texts(&store.logstore(&name).unwrap()).unwrap(), ["before", "after"]);
        drop(store);
        token.admin("destroy next");
        let error = builder(token).open().unwrap_err();
        assert!(
            matches!(
                &error,
                Error::ServiceKey {
                    cause: KmsError::Revoked { reason: RevokedReason::Deleted, .. },
                    ..
                }
            ),
            "{error:?}"
        );
    });
}
