//! The service keyring under a master key: the KMS calls of opening, the files, rotation,
//! conversion and recovery.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;

use common::*;
use envelog::{
    Cmk, Error, ErrorKind, Store,
    admin::VerifyOptions,
    audit::AuditEvent,
    error::ConfigError,
    kms::{KmsError, RevokedReason},
};

/// A store whose keyring is under a master key, with a Logstore under its service key.
fn made() -> (World, Cmk, Store) {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.builder().service_cmk(cmk.clone()).create().unwrap();
    put(&world.service(&store, "p/l"), "before");
    (world, cmk, store)
}

fn found(store: &Store) -> Vec<String> {
    texts(&store.logstore(&name("p/l")).unwrap())
}

#[track_caller]
fn assert_service_key(
    opened: Result<Store, Error>,
    kind: ErrorKind,
    code: &str,
    wanted: impl Fn(&KmsError) -> bool,
) {
    let error = opened.unwrap_err();
    assert!(matches!(&error, Error::ServiceKey { cause, .. } if wanted(cause)), "{error:?}");
    assert_eq!((error.kind(), error.code()), (kind, code));
}

#[test]
fn opening_asks_the_kms_once_and_nothing_asks_it_again() {
    let (world, cmk, store) = made();
    assert_eq!((world.kms.calls(), store.keys().service_cmk()), (1, Some(cmk.clone())));
    store.close().unwrap();
    let store = world.open();
    assert_eq!((world.kms.calls(), store.keys().service_cmk()), (2, Some(cmk)));
    let reader = world.builder().open_read_only().unwrap();
    assert_eq!(world.kms.calls(), 3);
    assert_eq!(
        (found(&store), found(&reader)),
        (vec!["before".to_owned()], vec!["before".to_owned()])
    );
    put(&store.logstore(&name("p/l")).unwrap(), "after");
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean(), "{report:?}");
    // An open store no longer needs the KMS for its service key.
    world.kms.answer(Answer::Revoked(RevokedReason::Disabled));
    assert_eq!(found(&store), ["before", "after"]);
    put(&world.service(&store, "p/later"), "made while it was refused");
    assert!(store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().is_clean());
    assert_eq!(world.kms.calls(), 3);
}

#[test]
fn a_sealed_keyring_file_contains_no_root() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    put(&world.service(&store, "p/l"), "before");
    let open = fs::read(world.keyring()).unwrap();
    let json = String::from_utf8_lossy(&open).into_owned();
    let root = json.split("\"root\":\"").nth(1).unwrap()[..64].to_owned();

    store.keys().rewrap_keyring(Some(cmk.clone())).unwrap();
    assert_eq!(store.keys().service_cmk(), Some(cmk));
    let sealed = String::from_utf8_lossy(&fs::read(world.keyring()).unwrap()).into_owned();
    assert!(
        !sealed.contains(&root) && !sealed.contains("\"root\"") && sealed.contains("\"sealed\"")
    );
    for key in world.kms.wrapped_keys() {
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        assert!(!sealed.contains(&hex));
    }
    store.close().unwrap();
    let store = world.open();
    assert_eq!(found(&store), ["before"]);

    store.keys().rewrap_keyring(None).unwrap();
    assert_eq!((fs::read(world.keyring()).unwrap(), store.keys().service_cmk()), (open, None));
    let events: Vec<_> =
        store.keys().audit_records().unwrap().iter().map(|record| record.event).collect();
    let rewraps = [AuditEvent::KeyringRewrapIntended, AuditEvent::KeyringRewrapped];
    assert_eq!(events[events.len() - 4..], [rewraps, rewraps].concat());
    store.close().unwrap();
    world.kms.answer(Answer::Unreachable);
    assert_eq!(found(&world.open()), ["before"], "it no longer needs a KMS");
}

#[test]
fn an_outage_and_a_refusal_are_told_apart_and_pass() {
    let (world, _, store) = made();
    store.close().unwrap();
    for (answer, kind, code) in [
        (Answer::Unreachable, ErrorKind::KmsUnreachable, "service_key_unreachable"),
        (Answer::Revoked(RevokedReason::Disabled), ErrorKind::Revoked, "service_key_revoked"),
        (Answer::Invalid, ErrorKind::KmsUnreachable, "service_key_invalid"),
        (Answer::WrongKey, ErrorKind::KmsUnreachable, "service_key_invalid"),
    ] {
        world.kms.answer(answer);
        let wanted = |cause: &KmsError| match answer {
            Answer::Unreachable => matches!(cause, KmsError::Unreachable { .. }),
            Answer::Revoked(wanted) => {
                matches!(cause, KmsError::Revoked { reason, .. } if *reason == wanted)
            }
            _ => matches!(cause, KmsError::Invalid { .. }),
        };
        assert_service_key(world.builder().open(), kind, code, wanted);
        assert_service_key(world.builder().open_read_only(), kind, code, wanted);
    }
    let without =
        Store::builder(world.store_dir(), world.keyring(), envelog::crypto::AwsLc::new()).open();
    assert_service_key(without, ErrorKind::KmsUnreachable, "service_key_unreachable", |cause| {
        cause.to_string().contains(REGION)
    });
    world.kms.answer(Answer::Real);
    assert_eq!(found(&world.open()), ["before"]);
}

#[test]
fn a_refusal_at_creation_makes_nothing() {
    let world = World::manual();
    let cmk = world.cmk();
    let elsewhere = Cmk { region_id: "cn-nowhere".to_owned(), ..cmk.clone() };
    let refused = world.builder().service_cmk(elsewhere).create().unwrap_err();
    assert!(matches!(refused, Error::Config(ConfigError::NoKmsForRegion { .. })), "{refused}");
    let empty = Cmk { arn: String::new(), ..cmk.clone() };
    assert!(matches!(
        world.builder().service_cmk(empty).create(),
        Err(Error::Config(ConfigError::CmkField { .. }))
    ));
    world.kms.answer(Answer::Revoked(RevokedReason::NotPermitted));
    let refused = world.builder().service_cmk(cmk.clone()).open_or_create().unwrap_err();
    assert!(
        matches!(refused, Error::ServiceKey { cause: KmsError::Revoked { .. }, .. }),
        "{refused}"
    );
    assert!(!world.store_dir().exists() && !world.keyring().exists());
    world.kms.answer(Answer::Real);
    world.builder().service_cmk(cmk).open_or_create().unwrap().close().unwrap();
}

#[test]
fn it_is_rotated_under_its_master_key_or_stays_as_it_was() {
    let (world, cmk, store) = made();
    let reader = world.builder().open_read_only().unwrap();
    let before = fs::read(world.keyring()).unwrap();
    world.kms.answer(Answer::Unreachable);
    let refused = store.keys().rotate_service_key().unwrap_err();
    assert!(matches!(refused, Error::ServiceKey { .. }), "{refused}");
    assert_eq!(fs::read(world.keyring()).unwrap(), before);
    put(&store.logstore(&name("p/l")).unwrap(), "under the old version");
    world.kms.answer(Answer::Real);
    assert_eq!(store.keys().rotate_service_key().unwrap(), 2);
    put(&store.logstore(&name("p/l")).unwrap(), "under the new one");
    let all = ["before", "under the old version", "under the new one"];
    // The reader asks the KMS to unwrap the keyring that was written since.
    assert_eq!(found(&reader), all);
    store.close().unwrap();
    let store = world.open();
    assert_eq!(
        (found(&store), store.keys().service_cmk()),
        (all.map(str::to_owned).to_vec(), Some(cmk))
    );
    store.close().unwrap();
    fs::write(world.keyring(), before).unwrap();
    assert!(matches!(
        world.builder().open(),
        Err(Error::KeyringTooOld { needed: 2, newest: 1, .. })
    ));
}

#[test]
fn the_keyring_moves_to_another_master_key_or_stays_as_it_is() {
    let (world, cmk, store) = made();
    let before = fs::read(world.keyring()).unwrap();
    let other = world.cmk();
    world.kms.answer_for_master_key(&other.cmk_key_id, Answer::Revoked(RevokedReason::Disabled));
    assert!(matches!(
        store.keys().rewrap_keyring(Some(other.clone())),
        Err(Error::ServiceKey { .. })
    ));
    assert_eq!(
        (fs::read(world.keyring()).unwrap(), store.keys().service_cmk()),
        (before, Some(cmk.clone()))
    );
    world.kms.answer_for_master_key(&cmk.cmk_key_id, Answer::Revoked(RevokedReason::Deleted));
    store.keys().rewrap_keyring(Some(other.clone())).unwrap();
    store.close().unwrap();
    let store = world.open();
    assert_eq!(
        (found(&store), store.keys().service_cmk()),
        (vec!["before".to_owned()], Some(other))
    );
}

/// A change of any byte of the file is detected, even with a corrected CRC.
#[test]
fn every_forged_byte_is_found() {
    let (world, _, store) = made();
    store.close().unwrap();
    let whole = fs::read(world.keyring()).unwrap();
    let covered = whole.len() - 4;
    for at in 0..covered {
        let mut forged = whole.clone();
        forged[at] ^= 1;
        let crc = crc32fast::hash(&forged[..covered]).to_le_bytes();
        forged[covered..].copy_from_slice(&crc);
        fs::write(world.keyring(), &forged).unwrap();
        let error = world
            .builder()
            .open_read_only()
            .map(drop)
            .expect_err(&format!("byte {at} does not matter"));
        assert!(
            matches!(
                error,
                Error::Tampered { .. }
                    | Error::Corrupt { .. }
                    | Error::Truncated { .. }
                    | Error::KeyringForeign { .. }
                    | Error::NewerFormat { .. }
                    | Error::OlderFormat { .. }
                    | Error::UnsupportedFeature { .. }
                    | Error::ServiceKey { .. }
            ),
            "byte {at}: {error}"
        );
    }
    fs::write(world.keyring(), whole).unwrap();
    assert_eq!(found(&world.open()), ["before"]);
}

#[test]
fn a_new_keyring_of_a_recovered_store_can_be_under_one_too() {
    let (world, cmk, store) = made();
    put(&world.byok(&store, "p/customer", &cmk), "kept");
    store.close().unwrap();
    fs::remove_file(world.keyring()).unwrap();
    let (store, report) = world.builder().service_cmk(cmk.clone()).recover_all().unwrap();
    assert_eq!((report.recovered, report.lost.len()), (vec![name("p/customer")], 1));
    store.close().unwrap();
    let store = world.open();
    assert_eq!(store.keys().service_cmk(), Some(cmk));
    assert_eq!(texts(&store.logstore(&name("p/customer")).unwrap()), ["kept"]);
}
