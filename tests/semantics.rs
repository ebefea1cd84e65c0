//! The semantics of the log service, rule by rule, through the public API.

#![allow(clippy::unwrap_used)]

mod common;

use std::{fs, path::PathBuf};

use common::{catalogue::catalogue_file, *};
use envelog::{
    Cmk, Compression, EncryptConf, EncryptType, Error, ErrorKind, KeyState, Logstore,
    LogstoreConfig, LogstoreSpec, RotateDataKey, Store,
    admin::{ReplaceCmk, RetainOptions, VerifyOptions},
    audit::AuditEvent,
    crypto::Suite,
    error::ConfigError,
    inspect::{KeySource, SegmentHeader},
    kms::RevokedReason,
};

/// The suite and key source in the header of each segment of a Logstore.
fn headers(world: &World, logstore: &Logstore) -> Vec<(Suite, KeySource)> {
    segments(&world.logstore_dir(logstore), 0)
        .iter()
        .map(|path| SegmentHeader::decode(&fs::read(path).unwrap()).unwrap().header)
        .map(|header| (header.suite, header.key_source))
        .collect()
}

fn off() -> EncryptConf {
    EncryptConf { enable: false, encrypt_type: None, user_cmk_info: None }
}

fn with_conf(store: &Store, logstore: &Logstore, conf: Option<EncryptConf>) -> LogstoreConfig {
    store.logstore(logstore.name()).unwrap().config().encrypt_conf(conf)
}

fn update(
    store: &Store,
    logstore: &Logstore,
    conf: Option<EncryptConf>,
) -> Result<LogstoreConfig, Error> {
    store.update_logstore(logstore.name(), with_conf(store, logstore, conf))
}

/// The metadata files with their contents.
fn metadata(world: &World, logstore: &Logstore) -> Vec<(PathBuf, Vec<u8>)> {
    let paths = [
        world.store_dir().join("STORE"),
        catalogue_file(&world.store_dir()),
        meta_path(&world.logstore_dir(logstore)),
        world.keyring(),
    ];
    paths.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

#[test]
fn s1_the_service_key_needs_no_kms_and_data_keys_differ() {
    let world = World::manual();
    let random = std::sync::Arc::new(RecordingRandom::default());
    // The store has no KMS at all.
    let builder = Store::builder(world.store_dir(), world.keyring(), envelog::crypto::AwsLc::new())
        .insecure_random_for_tests(random.clone());
    let store = builder.clone().create().unwrap();
    let (a, b) = (world.service(&store, "p/a"), world.service(&store, "p/b"));
    put(&a, "in a");
    put(&b, "in b");
    store.close().unwrap();
    // No random value is drawn twice: the data keys and the salts all differ.
    let mut draws = random.draws();
    let count = draws.len();
    draws.sort_unstable();
    draws.dedup();
    assert_eq!(draws.len(), count);

    // A segment of one Logstore does not open in the other, which has a different data key.
    let store = builder.clone().open().unwrap();
    assert_eq!(texts(&store.logstore(&name("p/a")).unwrap()), ["in a"]);
    assert_eq!(texts(&store.logstore(&name("p/b")).unwrap()), ["in b"]);
    store.close().unwrap();
    let (from, to) = (segments(&world.logstore_dir(&a), 0), segments(&world.logstore_dir(&b), 0));
    fs::copy(&from[0], &to[0]).unwrap();
    let store = builder.open().unwrap();
    let error = try_texts(&store.logstore(&name("p/b")).unwrap()).unwrap_err();
    assert!(matches!(error, Error::Tampered { .. } | Error::RolledBack { .. }), "{error}");
}

#[test]
fn s1_service_keys_never_expire() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "one");
    // Ten years by either clock, without a single KMS call.
    for _ in 0..10 {
        world.clock.advance(365 * DAY);
        store.tick();
    }
    put(&logstore, "two");
    assert_eq!(texts(&logstore), ["one", "two"]);
    assert_eq!(logstore.key_status().state, KeyState::Active);
    assert_eq!(logstore.key_status().lease_left, None);
    assert_eq!(world.kms.calls(), 0);
}

#[test]
fn s1_byok_the_customer_controls_the_master_key() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let logstore = world.byok(&store, "p/l", &cmk);
    put(&logstore, "one");
    // Rotation: envelopes under the old version still open, and new ones are under the new version.
    world.local().rotate(&cmk.cmk_key_id).unwrap();
    logstore.revalidate_now().unwrap();
    assert_eq!(store.keys().rotate_data_key(logstore.name()).unwrap(), 2);
    put(&logstore, "two");
    assert_eq!(texts(&logstore), ["one", "two"]);
    // Disabling and enabling.
    world.local().disable(&cmk.cmk_key_id).unwrap();
    assert_revoked(logstore.revalidate_now(), RevokedReason::Disabled);
    world.local().enable(&cmk.cmk_key_id).unwrap();
    logstore.revalidate_now().unwrap();
    // Replacement, and deletion of the old key.
    let other = world.cmk();
    store.keys().replace_cmk(logstore.name(), other.clone(), ReplaceCmk::default()).unwrap();
    world.local().delete(&cmk.cmk_key_id).unwrap();
    put(&logstore, "three");
    assert_eq!(texts(&logstore), ["one", "two", "three"]);
    assert_eq!(logstore.config().encrypt_conf.unwrap().user_cmk_info, Some(other));
}

#[test]
fn s2_aes_and_sm4_with_either_method() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    for (n, (encrypt_type, method, suite)) in [
        (EncryptType::Aes, None, Suite::Aes256Gcm),
        (EncryptType::Sm4, None, Suite::Sm4Gcm),
        (EncryptType::Aes, Some(cmk.clone()), Suite::Aes256Gcm),
        (EncryptType::Sm4, Some(cmk), Suite::Sm4Gcm),
    ]
    .into_iter()
    .enumerate()
    {
        let conf = EncryptConf {
            enable: true,
            encrypt_type: Some(encrypt_type),
            user_cmk_info: method.clone(),
        };
        let spec = LogstoreSpec::default().encrypt_conf(conf);
        let logstore = store.create_logstore(&name(&format!("p/l{n}")), spec).unwrap();
        put(&logstore, "secret");
        assert_eq!(texts(&logstore), ["secret"]);
        assert_eq!(headers(&world, &logstore), [(suite, KeySource::DataKey(1))]);
        let status = logstore.status().unwrap();
        assert_eq!(status.method, if method.is_some() { "byok" } else { "service_key" });
        assert_eq!(status.encrypt_type, Some(encrypt_type));
        assert!(status.encrypting);
    }
    store.close().unwrap();
    let store = world.open();
    for n in 0..4 {
        assert_eq!(texts(&store.logstore(&name(&format!("p/l{n}"))).unwrap()), ["secret"]);
    }
}

#[test]
fn s2_aes_is_the_default() {
    let conf = EncryptConf::from_json(r#"{"enable": true, "encrypt_type": "default"}"#).unwrap();
    assert_eq!(conf.encrypt_type.unwrap().suite(), Suite::Aes256Gcm);
    let conf = EncryptConf::from_json(r#"{"enable": true, "encrypt_type": "sm4"}"#).unwrap();
    assert_eq!(conf.encrypt_type.unwrap().suite(), Suite::Sm4Gcm);
}

#[test]
fn s3_json_has_exactly_these_names() {
    let json = concat!(
        r#"{"enable":true,"encrypt_type":"sm4","user_cmk_info":"#,
        r#"{"cmk_key_id":"key-1","arn":"acs:ram::13234:role/logsource","region_id":"cn-hangzhou"}}"#
    );
    let conf = EncryptConf::from_json(json).unwrap();
    let cmk = Cmk {
        cmk_key_id: "key-1".into(),
        arn: "acs:ram::13234:role/logsource".into(),
        region_id: "cn-hangzhou".into(),
    };
    assert_eq!(conf, EncryptConf::byok(EncryptType::Sm4, cmk));
    assert_eq!(serde_json::to_string(&conf).unwrap(), json);
    for json in [r#"{"enable":false}"#, r#"{"enable":true,"encrypt_type":"default"}"#] {
        let conf = EncryptConf::from_json(json).unwrap();
        assert_eq!(serde_json::to_string(&conf).unwrap(), json);
    }
    assert_eq!(EncryptConf::from_json(r#"{"enable":false}"#).unwrap(), off());
}

#[test]
fn s3_errors_name_each_unknown_or_missing_field_or_value() {
    let cmk = r#"{"cmk_key_id":"k","arn":"a","region_id":"r"}"#;
    let full = format!(r#"{{"enable":true,"encrypt_type":"default","user_cmk_info":{cmk}}}"#);
    EncryptConf::from_json(&full).unwrap();
    let without = |field: &str| {
        let mut value: serde_json::Value = serde_json::from_str(&full).unwrap();
        let object = value.as_object_mut().unwrap();
        if object.remove(field).is_none() {
            object["user_cmk_info"].as_object_mut().unwrap().remove(field).unwrap();
        }
        value.to_string()
    };
    // Missing fields.
    for field in ["enable", "cmk_key_id", "arn", "region_id"] {
        match EncryptConf::from_json(&without(field)) {
            Err(ConfigError::Json(text)) => assert!(text.contains(field), "{field}: {text}"),
            other => panic!("{field}: {other:?}"),
        }
    }
    let error = EncryptConf::from_json(&without("encrypt_type")).unwrap_err();
    assert_eq!(error, ConfigError::EncryptTypeRequired);
    assert!(error.to_string().contains("encrypt_type"));
    // Without user_cmk_info, the service key is used.
    assert_eq!(EncryptConf::from_json(&without("user_cmk_info")).unwrap().user_cmk_info, None);
    // Unknown fields and values.
    for (json, named) in [
        (full.replace("enable", "enabled"), "enabled"),
        (full.replace("encrypt_type", "encryptType"), "encryptType"),
        (full.replace("user_cmk_info", "cmk"), "cmk"),
        (full.replace("cmk_key_id", "key_id"), "key_id"),
        (full.replace("arn", "role"), "role"),
        (full.replace("region_id", "region"), "region"),
        (full.replacen('{', r#"{"extra":1,"#, 1), "extra"),
        (full.replace(r#""cmk_key_id""#, r#""extra":1,"cmk_key_id""#), "extra"),
        (full.replace("\"default\"", "\"aes\""), "aes"),
        (full.replace("\"default\"", "\"SM4\""), "SM4"),
        (full.replace("true", "1"), "1"),
        (full.replace("true", "\"yes\""), "yes"),
    ] {
        match EncryptConf::from_json(&json) {
            Err(ConfigError::Json(text)) => assert!(text.contains(named), "{json}: {text}"),
            other => panic!("{json}: {other:?}"),
        }
    }
    // Empty values, and values that are too long.
    for field in ["cmk_key_id", "arn", "region_id"] {
        for value in [String::new(), "x".repeat(1025), "a\\u0000b".into()] {
            let mut object: serde_json::Value = serde_json::from_str(&full).unwrap();
            object["user_cmk_info"][field] = serde_json::from_str(&format!("\"{value}\"")).unwrap();
            let error = EncryptConf::from_json(&object.to_string()).unwrap_err();
            assert_eq!(error, ConfigError::CmkField { field });
            assert!(error.to_string().contains(field));
        }
    }
    for json in ["", "null", "[]", "true", "{", &format!("{full} x")] {
        assert!(matches!(EncryptConf::from_json(json), Err(ConfigError::Json(_))), "{json}");
    }
}

#[test]
fn s3_what_the_json_refuses_create_refuses_too() {
    let world = World::manual();
    let store = world.create();
    let refused = |conf: EncryptConf| {
        let error = store
            .create_logstore(&name("p/l"), LogstoreSpec::default().encrypt_conf(conf))
            .unwrap_err();
        assert!(store.list().unwrap().is_empty());
        match error {
            Error::Config(error) => error,
            other => panic!("{other}"),
        }
    };
    let incomplete = EncryptConf { enable: true, encrypt_type: None, user_cmk_info: None };
    assert_eq!(refused(incomplete), ConfigError::EncryptTypeRequired);
    for field in ["cmk_key_id", "arn", "region_id"] {
        let mut cmk = world.cmk();
        match field {
            "cmk_key_id" => cmk.cmk_key_id.clear(),
            "arn" => cmk.arn.clear(),
            _ => cmk.region_id.clear(),
        }
        assert_eq!(
            refused(EncryptConf::byok(EncryptType::Sm4, cmk)),
            ConfigError::CmkField { field }
        );
    }
    assert_eq!(world.kms.calls(), 0);
}

#[test]
fn s3_a_configuration_round_trips_through_json() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.byok(&store, "p/l", &world.cmk());
    let config = store.logstore(logstore.name()).unwrap().config();
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(LogstoreConfig::from_json(&json).unwrap(), config);
    let extra = json.replacen('{', r#"{"surprise":1,"#, 1);
    assert!(LogstoreConfig::from_json(&extra).unwrap_err().to_string().contains("surprise"));
    let missing = json.replace(r#""revision":1,"#, "");
    assert!(LogstoreConfig::from_json(&missing).unwrap_err().to_string().contains("revision"));
}

#[test]
fn s4_records_from_before_encryption_stay_readable() {
    for (encrypt_type, byok) in [(EncryptType::Aes, false), (EncryptType::Sm4, true)] {
        let world = World::manual();
        let store = world.create();
        let logstore = store.create_logstore(&name("p/l"), LogstoreSpec::default()).unwrap();
        put(&logstore, "plain");
        let cmk = byok.then(|| world.cmk());
        let conf =
            EncryptConf { enable: true, encrypt_type: Some(encrypt_type), user_cmk_info: cmk };
        update(&store, &logstore, Some(conf.clone())).unwrap();
        assert_eq!(logstore.config().encrypt_conf, Some(conf));
        put(&logstore, "secret");
        assert_eq!(texts(&logstore), ["plain", "secret"]);
        let before = (Suite::Aes256Gmac, KeySource::Keyring(1));
        assert_eq!(
            headers(&world, &logstore),
            [before, (encrypt_type.suite(), KeySource::DataKey(1))]
        );
        let all: Vec<u8> = files(&world.logstore_dir(&logstore)).into_values().flatten().collect();
        assert!(memchr::memmem::find(&all, b"plain").is_some());
        assert!(memchr::memmem::find(&all, b"secret").is_none());
        store.close().unwrap();
        let logstore = world.open().logstore(&name("p/l")).unwrap();
        assert_eq!(texts(&logstore), ["plain", "secret"]);
    }
}

#[test]
fn s4_a_first_enable_false_fixes_nothing() {
    let world = World::manual();
    let store = world.create();
    // With a create and with an update; both may name an algorithm and a master key.
    let cmk = world.cmk();
    let first = EncryptConf { enable: false, ..EncryptConf::byok(EncryptType::Aes, cmk.clone()) };
    let created = store
        .create_logstore(&name("p/a"), LogstoreSpec::default().encrypt_conf(first.clone()))
        .unwrap();
    let updated = store.create_logstore(&name("p/b"), LogstoreSpec::default()).unwrap();
    update(&store, &updated, Some(off())).unwrap();
    assert_eq!(created.config().encrypt_conf, Some(first));
    assert_eq!(updated.config().encrypt_conf, Some(off()));
    assert_eq!(world.kms.calls(), 0);
    for logstore in [&created, &updated] {
        put(logstore, "plain");
        let status = logstore.status().unwrap();
        assert_eq!((status.method, status.encrypt_type, status.encrypting), ("none", None, false));
        assert_eq!(status.key.state, KeyState::None);
        assert_eq!(headers(&world, logstore), [(Suite::Aes256Gmac, KeySource::Keyring(1))]);
        assert!(
            !store
                .keys()
                .audit_records()
                .unwrap()
                .iter()
                .any(|record| record.event == AuditEvent::Created)
        );
    }
    // Nothing is fixed yet: algorithm, method and key may change while encryption is off, and at
    // the first enable.
    update(
        &store,
        &created,
        Some(EncryptConf { enable: false, ..EncryptConf::service_key(EncryptType::Sm4) }),
    )
    .unwrap();
    let conf = EncryptConf::byok(EncryptType::Sm4, world.cmk());
    update(&store, &created, Some(conf.clone())).unwrap();
    update(&store, &updated, Some(EncryptConf::service_key(EncryptType::Aes))).unwrap();
    assert_eq!(created.config().encrypt_conf, Some(conf));
    for logstore in [&created, &updated] {
        put(logstore, "secret");
        assert_eq!(texts(logstore), ["plain", "secret"]);
        assert_eq!(headers(&world, logstore)[1].1, KeySource::DataKey(1));
    }
    // Disabling a master key that was named only while encryption was off has no effect.
    world.local().disable(&cmk.cmk_key_id).unwrap();
    world.clock.advance(secs(3600));
    store.tick();
    put(&created, "more");
}

#[test]
fn s4_switching_off_and_on_again_keeps_everything_readable() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.byok(&store, "p/l", &world.cmk());
    put(&logstore, "secret one");
    let on = logstore.config().encrypt_conf.unwrap();
    update(
        &store,
        &logstore,
        Some(EncryptConf { enable: false, encrypt_type: None, ..on.clone() }),
    )
    .unwrap();
    put(&logstore, "plain");
    assert!(!logstore.status().unwrap().encrypting);
    update(&store, &logstore, Some(on)).unwrap();
    put(&logstore, "secret two");
    assert_eq!(texts(&logstore), ["secret one", "plain", "secret two"]);
    // While encryption is off, the integrity-only suite is used, with keys derived from the data
    // key.
    let key = KeySource::DataKey(1);
    let suites = [(Suite::Aes256Gcm, key), (Suite::Aes256Gmac, key), (Suite::Aes256Gcm, key)];
    assert_eq!(headers(&world, &logstore), suites);
    store.close().unwrap();
    let store = world.open();
    assert_eq!(
        texts(&store.logstore(&name("p/l")).unwrap()),
        ["secret one", "plain", "secret two"]
    );
    assert!(store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().is_clean());
}

#[test]
fn s4_recovery_after_switching_off_keeps_records_encrypted() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "shop/orders");
    logstore.append(record("confidential-confidential"), &written()).unwrap();
    let crashed = world.path().join("crashed");
    copy_dir(&world.store_dir(), &crashed);
    let dir = world.logstore_dir(&logstore);
    drop((logstore, store));
    copy_dir(&crashed, &world.store_dir());

    let store = world.open();
    let logstore = store.logstore(&name("shop/orders")).unwrap();
    update(&store, &logstore, Some(EncryptConf { encrypt_type: Some(EncryptType::Aes), ..off() }))
        .unwrap();
    logstore.append(record("public-public-public"), &synced()).unwrap();
    assert_eq!(logstore.status().unwrap().recovery[0].groups_rewritten, 1);
    assert_eq!(texts(&logstore), ["confidential-confidential", "public-public-public"]);
    store.close().unwrap();
    let holds = |text: &str| {
        files(&dir).values().any(|bytes| bytes.windows(text.len()).any(|w| w == text.as_bytes()))
    };
    assert!(!holds("confidential"));
    assert!(holds("public"));
}

#[test]
fn s5_each_refusal_is_an_error_of_its_own_and_changes_nothing() {
    let world = World::manual();
    let store = world.create();
    let (cmk, other) = (world.cmk(), world.cmk());
    let service = world.service(&store, "p/service");
    let byok = world.byok(&store, "p/byok", &cmk);
    let refused_off = {
        let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::service_key(EncryptType::Sm4));
        let logstore = store.create_logstore(&name("p/off"), spec).unwrap();
        update(
            &store,
            &logstore,
            Some(EncryptConf { enable: false, encrypt_type: None, user_cmk_info: None }),
        )
        .unwrap();
        logstore
    };
    let type_less = |conf: EncryptConf| EncryptConf { encrypt_type: None, ..conf };
    let disabled = |conf: EncryptConf| EncryptConf { enable: false, ..conf };
    let default_service = EncryptConf::service_key(EncryptType::Aes);
    let default_byok = EncryptConf::byok(EncryptType::Aes, cmk.clone());
    let other_role = Cmk { arn: "acs:ram::1:role/other".into(), ..cmk.clone() };
    let other_region = Cmk { region_id: "cn-beijing".into(), ..cmk.clone() };
    let fixed = cmk.cmk_key_id.clone();
    let method = |fixed| ConfigError::MethodFixed { fixed };
    let algorithm = |fixed| ConfigError::AlgorithmFixed { fixed };
    let cmk_fixed = || ConfigError::CmkFixed { fixed: fixed.clone() };
    let cases: Vec<(&Logstore, Option<EncryptConf>, ConfigError)> = vec![
        // A missing encrypt_conf.
        (&service, None, ConfigError::EncryptConfRequired),
        (&byok, None, ConfigError::EncryptConfRequired),
        (&refused_off, None, ConfigError::EncryptConfRequired),
        // The method.
        (&service, Some(EncryptConf::byok(EncryptType::Aes, cmk.clone())), method("service key")),
        (
            &service,
            Some(disabled(EncryptConf::byok(EncryptType::Aes, cmk.clone()))),
            method("service key"),
        ),
        (&byok, Some(default_service.clone()), method("customer master key")),
        (&byok, Some(off()), method("customer master key")),
        (
            &refused_off,
            Some(disabled(EncryptConf::byok(EncryptType::Sm4, cmk.clone()))),
            method("service key"),
        ),
        // The algorithm.
        (&service, Some(EncryptConf::service_key(EncryptType::Sm4)), algorithm(EncryptType::Aes)),
        (
            &service,
            Some(disabled(EncryptConf::service_key(EncryptType::Sm4))),
            algorithm(EncryptType::Aes),
        ),
        (
            &byok,
            Some(EncryptConf::byok(EncryptType::Sm4, cmk.clone())),
            algorithm(EncryptType::Aes),
        ),
        (&refused_off, Some(default_service.clone()), algorithm(EncryptType::Sm4)),
        // The master key: another key, another role, another region.
        (&byok, Some(EncryptConf::byok(EncryptType::Aes, other)), cmk_fixed()),
        (&byok, Some(EncryptConf::byok(EncryptType::Aes, other_role)), cmk_fixed()),
        (&byok, Some(disabled(EncryptConf::byok(EncryptType::Aes, other_region))), cmk_fixed()),
        // Incomplete configurations.
        (&service, Some(type_less(default_service)), ConfigError::EncryptTypeRequired),
        (&byok, Some(type_less(default_byok)), ConfigError::EncryptTypeRequired),
    ];
    for logstore in [&service, &byok, &refused_off] {
        put(logstore, "before");
    }
    for (logstore, conf, expected) in &cases {
        let before =
            (store.logstore(logstore.name()).unwrap().config(), metadata(&world, logstore));
        let calls = world.kms.calls();
        match update(&store, logstore, conf.clone()) {
            Err(Error::Config(error)) => assert_eq!(error, *expected, "{conf:?}"),
            other => panic!("{conf:?}: {other:?}"),
        }
        assert_eq!(
            (store.logstore(logstore.name()).unwrap().config(), metadata(&world, logstore)),
            before,
            "{conf:?}"
        );
        assert_eq!(world.kms.calls(), calls);
    }
    // The errors also have distinct codes.
    let mut codes: Vec<_> = cases.iter().map(|(_, _, error)| error.code()).collect();
    codes.sort_unstable();
    codes.dedup();
    assert_eq!(codes.len(), 5);
    for logstore in [&service, &byok, &refused_off] {
        put(logstore, "after");
        assert_eq!(texts(logstore), ["before", "after"]);
    }
    store.close().unwrap();
    let store = world.open();
    for text in ["p/service", "p/byok", "p/off"] {
        assert_eq!(texts(&store.logstore(&name(text)).unwrap()), ["before", "after"]);
    }
}

#[test]
fn s5_fixed_or_out_of_range_fields_are_refused() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    let config = store.logstore(logstore.name()).unwrap().config();
    let before = metadata(&world, &logstore);
    let refused = |update: LogstoreConfig| match store.update_logstore(logstore.name(), update) {
        Err(Error::Config(error)) => error,
        other => panic!("{other:?}"),
    };
    let field = |field| ConfigError::FieldFixed { field };
    let changed = |change: &dyn Fn(&mut LogstoreConfig)| {
        let mut changed = config.clone();
        change(&mut changed);
        changed
    };
    assert_eq!(refused(changed(&|config| config.name = name("p/other"))), field("name"));
    assert_eq!(refused(changed(&|config| config.shard_count = 2)), field("shard_count"));
    assert_eq!(refused(changed(&|config| config.shards = Vec::new())), field("shards"));
    assert_eq!(refused(changed(&|config| config.create_time = 7)), field("create_time"));
    for days in [0, 3651] {
        let error = refused(config.clone().ttl_days(days));
        assert!(matches!(error, ConfigError::OutOfRange { field: "ttl_days", .. }), "{error}");
    }
    let error = refused(config.clone().retention_bytes(0));
    assert!(matches!(error, ConfigError::OutOfRange { field: "retention_bytes", .. }), "{error}");
    assert_eq!(store.logstore(logstore.name()).unwrap().config(), config);
    assert_eq!(metadata(&world, &logstore), before);
    let missing = store.update_logstore(&name("p/missing"), config).unwrap_err();
    assert!(matches!(missing, Error::LogstoreMissing(missing) if missing == name("p/missing")));
}

#[test]
fn s5_enable_may_be_switched_without_naming_the_algorithm() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    for (logstore, cmk, encrypt_type) in [
        (world.byok(&store, "p/byok", &cmk), Some(cmk), EncryptType::Aes),
        (world.service(&store, "p/service"), None, EncryptType::Aes),
    ] {
        let without_type =
            EncryptConf { enable: false, encrypt_type: None, user_cmk_info: cmk.clone() };
        let config = update(&store, &logstore, Some(without_type)).unwrap();
        // The configuration is stored with its fixed fields.
        let conf =
            EncryptConf { enable: false, encrypt_type: Some(encrypt_type), user_cmk_info: cmk };
        assert_eq!(config.encrypt_conf, Some(conf.clone()));
        // Off again, with the type; then on.
        update(&store, &logstore, Some(conf.clone())).unwrap();
        let on = EncryptConf { enable: true, ..conf };
        assert_eq!(update(&store, &logstore, Some(on.clone())).unwrap().encrypt_conf, Some(on));
    }
}

#[test]
fn s6_an_update_replaces_everything_at_the_newest_revision() {
    let world = World::manual();
    let store = world.create();
    let spec = LogstoreSpec::default().ttl_days(7).retention_bytes(1 << 30);
    let logstore = store.create_logstore(&name("p/l"), spec).unwrap();
    let first = store.logstore(logstore.name()).unwrap().config();
    assert_eq!(
        (first.revision, first.ttl_days, first.retention_bytes),
        (1, Some(7), Some(1 << 30))
    );
    world.clock.advance(secs(60));
    let second = first.clone().ttl_days(None);
    let second = store.update_logstore(logstore.name(), second).unwrap();
    // An update removes omitted settings, keeps the others, and records its time.
    assert_eq!(
        (second.revision, second.ttl_days, second.retention_bytes),
        (2, None, Some(1 << 30))
    );
    assert_eq!(second.create_time, first.create_time);
    assert_eq!(second.last_modify_time, first.last_modify_time + 60);
    assert_eq!(store.logstore(logstore.name()).unwrap().config(), second);
    assert_eq!(logstore.config(), second);
    // Of two callers with the same revision, the second one is refused. An unknown revision is
    // refused too.
    let third = store.update_logstore(logstore.name(), second.clone().ttl_days(1)).unwrap();
    for (given, update) in [(2, second.ttl_days(2)), (1, first.clone()), (9, first.revision(9))] {
        let error = store.update_logstore(logstore.name(), update).unwrap_err();
        assert!(
            matches!(error, Error::Config(ConfigError::RevisionOutdated { given: g, current: 3 }) if g == given),
            "{error}"
        );
    }
    assert_eq!(store.logstore(logstore.name()).unwrap().config(), third);
    store.close().unwrap();
    assert_eq!(world.open().logstore(&name("p/l")).unwrap().config(), third);
}

#[test]
fn s6_key_operations_do_not_touch_the_revision() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let byok = world.byok(&store, "p/byok", &cmk);
    let service = world.service(&store, "p/service");
    put(&byok, "one");
    let got = [
        store.logstore(byok.name()).unwrap().config(),
        store.logstore(service.name()).unwrap().config(),
    ];
    store.keys().rotate_data_key(byok.name()).unwrap();
    store.keys().rotate_data_key(service.name()).unwrap();
    store.keys().shred_data_keys(service.name(), &[1]).unwrap();
    world.local().rotate(&cmk.cmk_key_id).unwrap();
    store.keys().rewrap(byok.name()).unwrap();
    store.keys().rotate_service_key().unwrap();
    assert_eq!(
        [
            store.logstore(byok.name()).unwrap().config(),
            store.logstore(service.name()).unwrap().config()
        ],
        got
    );
    let other = world.cmk();
    store.keys().replace_cmk(byok.name(), other.clone(), ReplaceCmk::default()).unwrap();
    let replaced = store.logstore(byok.name()).unwrap().config();
    assert_eq!(replaced.revision, got[0].revision);
    assert_eq!(replaced.encrypt_conf.as_ref().unwrap().user_cmk_info, Some(other));
    // A caller that read the configuration before these operations can still update it.
    store.update_logstore(service.name(), got[1].clone().ttl_days(3)).unwrap();
}

struct Revocation {
    reason: RevokedReason,
    revoke: fn(&World, &Cmk),
    restore: Option<fn(&World, &Cmk)>,
}

const REVOCATIONS: [Revocation; 4] = [
    Revocation {
        reason: RevokedReason::Disabled,
        revoke: |world, cmk| world.local().disable(&cmk.cmk_key_id).unwrap(),
        restore: Some(|world, cmk| world.local().enable(&cmk.cmk_key_id).unwrap()),
    },
    Revocation {
        reason: RevokedReason::PendingDeletion,
        revoke: |world, cmk| world.local().schedule_deletion(&cmk.cmk_key_id, 7).unwrap(),
        restore: Some(|world, cmk| world.local().cancel_deletion(&cmk.cmk_key_id).unwrap()),
    },
    Revocation {
        reason: RevokedReason::Deleted,
        revoke: |world, cmk| world.local().delete(&cmk.cmk_key_id).unwrap(),
        restore: None,
    },
    Revocation {
        reason: RevokedReason::NotPermitted,
        revoke: |world, cmk| world.local().ungrant(&cmk.cmk_key_id, ROLE).unwrap(),
        restore: Some(|world, cmk| world.local().grant(&cmk.cmk_key_id, ROLE).unwrap()),
    },
];

#[test]
fn s7_every_way_to_revoke_stops_all_reads_and_writes() {
    for Revocation { reason, revoke, restore } in REVOCATIONS {
        for enabled in [true, false] {
            let world = World::manual();
            let store = world.create();
            let cmk = world.cmk();
            let logstore = world.byok(&store, "p/l", &cmk);
            let other = world.service(&store, "p/other");
            put(&logstore, "one");
            if !enabled {
                let conf = EncryptConf { enable: false, ..logstore.config().encrypt_conf.unwrap() };
                update(&store, &logstore, Some(conf)).unwrap();
                put(&logstore, "two");
            } else {
                put(&logstore, "two");
            }
            let mut open_reader = logstore.read(0, &envelog::ReadOptions::default()).unwrap();
            assert!(open_reader.next().unwrap().is_ok());

            revoke(&world, &cmk);
            // At the latest after the bound.
            world.clock.advance(world.options.revalidate_every + world.options.kms_timeout);
            assert_revoked(try_put(&logstore, "refused"), reason);
            assert_revoked(logstore.submit(record("refused"), &buffered()), reason);
            assert_revoked(logstore.try_submit(record("refused"), &written()), reason);
            assert_revoked(logstore.read(0, &envelog::ReadOptions::default()), reason);
            assert_revoked(open_reader.next().unwrap(), reason);
            assert!(open_reader.next().is_none());
            assert_revoked(logstore.revalidate_now(), reason);
            assert_revoked(store.keys().rotate_data_key(logstore.name()), reason);
            let error = try_texts(&logstore).unwrap_err();
            assert_eq!(error.code(), "revoked");
            let text = error.to_string();
            assert!(
                text.contains("p/l")
                    && text.contains(&cmk.cmk_key_id)
                    && text.contains(&reason.to_string()),
                "{text}"
            );
            assert_eq!(logstore.key_status().state, KeyState::Revoked { reason });
            // Another Logstore still works.
            put(&other, "fine");
            assert_eq!(texts(&other), ["fine"]);
            // A new process gets the same refusal.
            store.close().unwrap();
            let store = world.open();
            let logstore = store.logstore(&name("p/l")).unwrap();
            assert_revoked(try_put(&logstore, "refused"), reason);
            assert_revoked(try_texts(&logstore), reason);
            // Keyless verification works.
            let keyless = VerifyOptions::default().keyless(true);
            assert!(store.admin().verify(&keyless, &mut |_| {}).unwrap().is_clean());
            let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
            assert!(report.refused.iter().any(|(refused, _)| *refused == name("p/l")));

            let Some(restore) = restore else {
                store.delete_logstore(&name("p/l")).unwrap();
                continue;
            };
            restore(&world, &cmk);
            world.clock.advance(world.options.revalidate_every);
            store.tick();
            put(&logstore, "three");
            assert_eq!(texts(&logstore), ["one", "two", "three"]);
        }
    }
}

#[test]
fn s7_configuration_delete_and_retention_work_while_revoked() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let spec = LogstoreSpec::default()
        .ttl_days(1)
        .encrypt_conf(EncryptConf::byok(EncryptType::Aes, cmk.clone()));
    let logstore = store.create_logstore(&name("p/l"), spec).unwrap();
    let doomed = world.byok(&store, "p/doomed", &cmk);
    put(&logstore, "old");
    logstore.roll().unwrap();
    put(&logstore, "newer");
    put(&doomed, "doomed");
    world.local().disable(&cmk.cmk_key_id).unwrap();
    world.clock.advance(secs(60));
    store.tick();
    assert_revoked(try_texts(&logstore), RevokedReason::Disabled);

    let calls = world.kms.calls();
    // The configuration, except for the settings that the data key authenticates: whether
    // encryption is on, and the retention.
    let meta = || fs::read(meta_path(&world.logstore_dir(&logstore))).unwrap();
    let (config, before) = (store.logstore(logstore.name()).unwrap().config(), meta());
    let conf = config.encrypt_conf.clone().unwrap();
    let off = Some(EncryptConf { enable: false, ..conf.clone() });
    for bound in [
        config.clone().encrypt_conf(off),
        config.clone().ttl_days(2),
        config.clone().ttl_days(None),
        config.clone().retention_bytes(1).compression(Compression::None),
    ] {
        assert_revoked(store.update_logstore(logstore.name(), bound), RevokedReason::Disabled);
        assert_eq!(
            (store.logstore(logstore.name()).unwrap().config(), meta()),
            (config.clone(), before.clone())
        );
    }
    let rotate_data_key = Some(RotateDataKey::default().max_age_days(9).max_bytes(None));
    let free = config.rotate_data_key(rotate_data_key).compression(Compression::None);
    let config = store.update_logstore(logstore.name(), free).unwrap();
    assert_eq!(
        (config.revision, config.compression, config.ttl_days),
        (2, Compression::None, Some(1))
    );
    // Retention.
    world.clock.advance(3 * DAY);
    let report = store.admin().apply_retention().unwrap();
    assert_eq!((report.segments, report.suspended), (2, false));
    assert!(segments(&world.logstore_dir(&logstore), 0).is_empty());
    // Deletion.
    let dir = world.logstore_dir(&doomed);
    store.delete_logstore(doomed.name()).unwrap();
    assert!(!dir.exists());
    assert_eq!(store.list().unwrap(), [name("p/l")]);
    // Status.
    assert_eq!(logstore.status().unwrap().segments, 0);
    assert_eq!(world.kms.calls(), calls);

    // When the key is enabled, access returns, and the sequence numbers continue.
    world.local().enable(&cmk.cmk_key_id).unwrap();
    logstore.revalidate_now().unwrap();
    let appended = logstore.append(record("after"), &synced()).unwrap();
    assert!(appended.seq >= 2);
    assert_eq!(texts(&logstore), ["after"]);
    // The changes without the key left the second tag unchanged, and the other settings can be
    // changed now.
    assert!(store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().is_clean());
    let config = update(&store, &logstore, Some(EncryptConf { enable: false, ..conf })).unwrap();
    store.update_logstore(logstore.name(), config.ttl_days(2)).unwrap();
    assert!(store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().is_clean());
    store.close().unwrap();
    let store = world.open();
    let config = store.logstore(&name("p/l")).unwrap().config();
    assert_eq!((config.ttl_days, config.encrypt_conf.unwrap().enable), (Some(2), false));
    assert_eq!(texts(&store.logstore(&name("p/l")).unwrap()), ["after"]);
}

/// In a process that has not used the key yet, retention follows the metadata while the key is
/// revoked.
#[test]
fn s7_retention_works_in_a_process_that_starts_while_revoked() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let spec = LogstoreSpec::default()
        .ttl_days(1)
        .encrypt_conf(EncryptConf::byok(EncryptType::Aes, cmk.clone()));
    let logstore = store.create_logstore(&name("p/l"), spec).unwrap();
    put(&logstore, "old");
    store.close().unwrap();
    drop(logstore);
    world.local().disable(&cmk.cmk_key_id).unwrap();
    world.clock.advance(2 * DAY);
    let store = world.open();
    let options = RetainOptions::default().trust_clock(true);
    assert_eq!(store.admin().retain(&options).unwrap().segments, 1);
}

#[test]
fn s7_enabling_again_restores_access_without_a_restart() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let logstore = world.byok(&store, "p/l", &cmk);
    let mut expected = Vec::new();
    for round in 0..5 {
        let texts_of = |kind: &str| format!("{round} {kind}");
        put(&logstore, &texts_of("synced"));
        logstore.append(record(&texts_of("written")), &written()).unwrap();
        logstore.append(record(&texts_of("buffered")), &buffered()).unwrap();
        expected.extend([texts_of("synced"), texts_of("written"), texts_of("buffered")]);
        world.local().disable(&cmk.cmk_key_id).unwrap();
        world.clock.advance(secs(31));
        store.tick();
        assert_revoked(try_put(&logstore, "refused"), RevokedReason::Disabled);
        world.local().enable(&cmk.cmk_key_id).unwrap();
        // Automatically at the next renewal, without a request.
        world.clock.advance(secs(30));
        store.tick();
        assert_eq!(logstore.key_status().state, KeyState::Active);
        assert_eq!(texts(&logstore), expected);
    }
    let events: Vec<_> =
        store.keys().audit_records().unwrap().into_iter().map(|record| record.event).collect();
    assert_eq!(events.iter().filter(|event| **event == AuditEvent::Revoked).count(), 5);
    assert_eq!(events.iter().filter(|event| **event == AuditEvent::Recovered).count(), 5);
    store.close().unwrap();
    assert_eq!(texts(&world.open().logstore(&name("p/l")).unwrap()), expected);
}

#[test]
fn s8_replacing_a_master_key_is_an_operation_of_its_own() {
    let world = World::manual();
    let store = world.create();
    let (old, new) = (world.cmk(), world.cmk());
    let logstore = world.byok(&store, "p/l", &old);
    put(&logstore, "one");
    // Not through an update.
    let error = update(&store, &logstore, Some(EncryptConf::byok(EncryptType::Aes, new.clone())))
        .unwrap_err();
    assert!(matches!(error, Error::Config(ConfigError::CmkFixed { .. })));
    // Two envelopes: the existing one, and that of the fresh data key.
    assert_eq!(
        store.keys().replace_cmk(logstore.name(), new.clone(), ReplaceCmk::default()).unwrap(),
        2
    );
    put(&logstore, "two");
    assert_eq!(texts(&logstore), ["one", "two"]);
    let sources: Vec<_> =
        headers(&world, &logstore).into_iter().map(|(_, source)| source).collect();
    assert_eq!(sources, [KeySource::DataKey(1), KeySource::DataKey(2)]);
    // With `keep_data_key`, without a fresh data key.
    let newer = world.cmk();
    assert_eq!(
        store
            .keys()
            .replace_cmk(
                logstore.name(),
                newer.clone(),
                ReplaceCmk::default().fresh_data_key(false)
            )
            .unwrap(),
        2
    );
    put(&logstore, "three");
    assert_eq!(headers(&world, &logstore).last().unwrap().1, KeySource::DataKey(2));
    // The update rule accepts the new master key.
    update(&store, &logstore, Some(EncryptConf::byok(EncryptType::Aes, newer))).unwrap();
    let events: Vec<_> =
        store.keys().audit_records().unwrap().into_iter().map(|record| record.event).collect();
    assert_eq!(events.iter().filter(|event| **event == AuditEvent::ReplaceIntended).count(), 2);
    assert_eq!(events.iter().filter(|event| **event == AuditEvent::Replaced).count(), 2);
    store.close().unwrap();
    // The old and the second master key are no longer needed.
    for gone in [&old, &new] {
        world.local().delete(&gone.cmk_key_id).unwrap();
    }
    assert_eq!(texts(&world.open().logstore(&name("p/l")).unwrap()), ["one", "two", "three"]);
}

#[test]
fn s8_a_refused_replacement_changes_nothing() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let logstore = world.byok(&store, "p/l", &cmk);
    let service = world.service(&store, "p/service");
    let plain = store.create_logstore(&name("p/plain"), LogstoreSpec::default()).unwrap();
    put(&logstore, "one");
    let before = fs::read(meta_path(&world.logstore_dir(&logstore))).unwrap();
    let replace = |logstore: &Logstore, new: Cmk| {
        store.keys().replace_cmk(logstore.name(), new, ReplaceCmk::default()).unwrap_err()
    };
    let good = world.cmk();
    assert!(matches!(replace(&service, good.clone()), Error::Config(ConfigError::NotByok)));
    assert!(matches!(replace(&plain, good.clone()), Error::Config(ConfigError::NotEncrypted)));
    let elsewhere = Cmk { region_id: "us-west-1".into(), ..good.clone() };
    assert!(matches!(
        replace(&logstore, elsewhere),
        Error::Config(ConfigError::NoKmsForRegion { .. })
    ));
    let role = Cmk { arn: "acs:ram::1:role/nobody".into(), ..good.clone() };
    assert!(matches!(replace(&logstore, role), Error::Config(ConfigError::CmkRefused { .. })));
    let empty = Cmk { cmk_key_id: String::new(), ..good.clone() };
    assert!(matches!(replace(&logstore, empty), Error::Config(ConfigError::CmkField { .. })));
    let disabled = world.cmk();
    world.local().disable(&disabled.cmk_key_id).unwrap();
    assert!(matches!(replace(&logstore, disabled), Error::Config(ConfigError::CmkRefused { .. })));
    // The old master key must be usable, because its envelopes have to be unwrapped.
    world.local().disable(&cmk.cmk_key_id).unwrap();
    world.clock.advance(secs(31));
    assert_revoked(
        store.keys().replace_cmk(logstore.name(), good, ReplaceCmk::default()),
        RevokedReason::Disabled,
    );
    assert_eq!(fs::read(meta_path(&world.logstore_dir(&logstore))).unwrap(), before);
    world.local().enable(&cmk.cmk_key_id).unwrap();
    logstore.revalidate_now().unwrap();
    put(&logstore, "two");
    assert_eq!(texts(&logstore), ["one", "two"]);
}

#[test]
fn s9_without_kms_or_permission_no_logstore_is_created() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let before = files(&world.store_dir());
    let refused = |cmk: Cmk| {
        let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::byok(EncryptType::Aes, cmk));
        let error = store.create_logstore(&name("p/l"), spec).unwrap_err();
        assert!(store.list().unwrap().is_empty());
        assert!(matches!(store.logstore(&name("p/l")), Err(Error::LogstoreMissing(_))));
        assert!(fs::read_dir(world.store_dir().join("logstores")).unwrap().next().is_none());
        error
    };
    let error = refused(Cmk { region_id: "us-west-1".into(), ..cmk.clone() });
    assert!(
        matches!(&error, Error::Config(ConfigError::NoKmsForRegion { region }) if region == "us-west-1")
    );
    assert!(error.to_string().contains("us-west-1"));
    let error = refused(Cmk { arn: "acs:ram::1:role/nobody".into(), ..cmk.clone() });
    assert!(
        matches!(&error, Error::Config(ConfigError::CmkRefused { reason, .. }) if *reason == RevokedReason::NotPermitted)
    );
    assert_eq!(error.kind(), ErrorKind::Revoked);
    let error = refused(Cmk { cmk_key_id: "key-0123456789abcdef".into(), ..cmk.clone() });
    assert!(
        matches!(&error, Error::Config(ConfigError::CmkRefused { reason, .. }) if *reason == RevokedReason::Deleted)
    );
    assert_eq!(error.kind(), ErrorKind::Revoked);
    world.local().disable(&cmk.cmk_key_id).unwrap();
    let error = refused(cmk.clone());
    assert!(
        matches!(&error, Error::Config(ConfigError::CmkRefused { reason, .. }) if *reason == RevokedReason::Disabled)
    );
    assert_eq!(error.kind(), ErrorKind::Revoked);
    world.local().enable(&cmk.cmk_key_id).unwrap();
    world.kms.answer(Answer::Unreachable);
    let error = refused(cmk.clone());
    assert!(matches!(&error, Error::KmsUnreachable { region, .. } if region == REGION), "{error}");
    world.kms.answer(Answer::Invalid);
    assert!(matches!(refused(cmk.clone()), Error::KmsInvalid { .. }));
    assert_eq!(files(&world.store_dir()), before);
    // A KMS that returns a wrong key on unwrap is refused too.
    world.kms.answer(Answer::WrongKey);
    assert!(matches!(refused(cmk.clone()), Error::KmsInvalid { .. }));
    world.kms.answer(Answer::Real);
    put(&world.byok(&store, "p/l", &cmk), "at last");
}

#[test]
fn s9_without_any_kms_only_the_service_key_works() {
    let world = World::manual();
    let store = Store::builder(world.store_dir(), world.keyring(), envelog::crypto::AwsLc::new())
        .create()
        .unwrap();
    let service = world.service(&store, "p/service");
    put(&service, "fine");
    let conf = EncryptConf::byok(EncryptType::Sm4, world.cmk());
    let error = store
        .create_logstore(&name("p/l"), LogstoreSpec::default().encrypt_conf(conf.clone()))
        .unwrap_err();
    assert!(matches!(error, Error::Config(ConfigError::NoKmsForRegion { .. })));
    let plain = store.create_logstore(&name("p/plain"), LogstoreSpec::default()).unwrap();
    let before = metadata(&world, &plain);
    let error = update(&store, &plain, Some(conf)).unwrap_err();
    assert!(matches!(error, Error::Config(ConfigError::NoKmsForRegion { .. })));
    assert_eq!(metadata(&world, &plain), before);
    assert_eq!(plain.config().revision, 1);
    put(&plain, "still here");
    assert_eq!(store.list().unwrap(), [name("p/plain"), name("p/service")]);
}
