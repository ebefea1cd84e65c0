//! Crashes during key operations: after a failure at any step, the store is in its old or new
//! state, and no key is lost.

#![allow(clippy::unwrap_used)]

mod common;

use std::{collections::BTreeMap, fs, path::PathBuf, sync::Arc};

use common::{
    failing::{FailingDisk, Failure},
    *,
};
use envelog::{
    Cmk, EncryptConf, EncryptType, Error, Logstore, LogstoreConfig, LogstoreSpec, ReadOptions,
    Result, Store,
    admin::{ReplaceCmk, VerifyOptions},
};

const SERVICE: &str = "p/service";
const BYOK: &str = "p/byok";
const PLAIN: &str = "p/plain";

/// All records of all shards, as text.
fn all_texts(logstore: &Logstore) -> Result<Vec<String>> {
    let merged = logstore.read_merged(&ReadOptions::default())?;
    let records: Vec<_> =
        merged.map(|item| item.map(|(_, record)| record)).collect::<Result<_>>()?;
    Ok(strings(&records))
}

fn all_of(logstore: &Logstore) -> Vec<String> {
    all_texts(logstore).unwrap()
}

/// The visible state of a Logstore: configuration and data-key versions.
#[derive(Clone, Debug, PartialEq)]
struct View {
    config: LogstoreConfig,
    method: &'static str,
    versions: Vec<(u32, bool)>,
    texts: Vec<String>,
}

impl View {
    /// Excludes times, which change with the clock.
    fn of(store: &Store, text: &str) -> Result<Self> {
        let logstore = store.logstore(&name(text))?;
        let status = logstore.status()?;
        Ok(Self {
            config: {
                let mut config = logstore.config();
                (config.last_modify_time, config.create_time) = (0, 0);
                for shard in &mut config.shards {
                    shard.create_time = shard.create_time.map(|_| 0);
                }
                config
            },
            method: status.method,
            versions: status
                .data_keys
                .iter()
                .filter(|key| key.version > 0)
                .map(|key| (key.version, key.shredded))
                .collect(),
            texts: all_texts(&logstore)?,
        })
    }

    fn all(store: &Store) -> BTreeMap<String, Self> {
        let names = store.list().unwrap();
        names
            .iter()
            .map(|name| (name.to_string(), Self::of(store, &name.to_string()).unwrap()))
            .collect()
    }
}

/// A setup with a store that every attempt starts from.
struct Scene {
    world: World,
    template: PathBuf,
    old: Cmk,
    new: Cmk,
}

impl Scene {
    fn new() -> Self {
        let world = World::manual_in_memory();
        let (old, new) = (world.cmk(), world.cmk());
        let store = world.create();
        let service = world.service(&store, SERVICE);
        let byok = world.byok(&store, BYOK, &old);
        let plain = store.create_logstore(&name(PLAIN), LogstoreSpec::default()).unwrap();
        for logstore in [&service, &byok, &plain] {
            put(logstore, "first");
        }
        store.keys().rotate_data_key(&name(SERVICE)).unwrap();
        store.keys().rotate_data_key(&name(BYOK)).unwrap();
        for logstore in [&service, &byok, &plain] {
            put(logstore, "second");
        }
        store.close().unwrap();
        let template = world.path().join("template");
        copy_dir(&world.store_dir(), &template.join("store"));
        fs::copy(world.keyring(), template.join("keyring")).unwrap();
        Self { world, template, old, new }
    }

    /// As [`Scene::new`], with the shard of each Logstore split.
    fn split() -> Self {
        let scene = Self::new();
        let store = scene.world.open();
        for text in [SERVICE, BYOK, PLAIN] {
            store.split_shard(&name(text), 0, None).unwrap();
        }
        store.close().unwrap();
        copy_dir(&scene.world.store_dir(), &scene.template.join("store"));
        scene
    }

    fn reset(&self) {
        copy_dir(&self.template.join("store"), &self.world.store_dir());
        fs::copy(self.template.join("keyring"), self.world.keyring()).unwrap();
    }

    /// Makes `operation` fail at its first file operation, its second, and so on until it
    /// completes, in each way. Checks the store after each attempt.
    fn campaign(&self, operation: impl Fn(&Self, &Store) -> Result<()>, changed: &[&str]) {
        let (before, after) = {
            self.reset();
            let store = self.world.open();
            let before = View::all(&store);
            operation(self, &store).unwrap();
            let store = self.reopened(store);
            (before, View::all(&store))
        };
        let mut attempts = 0;
        for failure in Failure::ALL {
            for count in 0.. {
                let at = format!("{failure:?} after {count}");
                self.reset();
                let disk = FailingDisk::default();
                let store = self.world.builder().disk(Arc::new(disk.clone())).open().unwrap();
                // All Logstores are open and have an open segment.
                for text in [SERVICE, BYOK, PLAIN] {
                    let logstore = store.logstore(&name(text)).unwrap();
                    assert_eq!(all_of(&logstore), ["first", "second"]);
                    put(&logstore, "third");
                }
                disk.fail_after(count, failure);
                let outcome = operation(self, &store);
                let ran_through = !disk.has_failed();
                disk.disarm();
                drop(store);
                if ran_through {
                    outcome.unwrap();
                    break;
                }
                if let Err(error) = &outcome {
                    assert!(
                        matches!(error, Error::Io { .. } | Error::Latched { .. }),
                        "{at}: {error:?}"
                    );
                }
                attempts += 1;
                self.check(&at, &before, &after, outcome.is_ok(), changed);
            }
        }
        assert!(attempts > 10, "{attempts}");
    }

    fn reopened(&self, store: Store) -> Store {
        store.close().unwrap();
        self.world.open()
    }

    /// Checks the store after a failure: each Logstore has its old or new state, no data is lost,
    /// verification is clean, and the store is usable.
    fn check(
        &self,
        at: &str,
        before: &BTreeMap<String, View>,
        after: &BTreeMap<String, View>,
        succeeded: bool,
        changed: &[&str],
    ) {
        let store = self.world.open();
        for listed in store.list().unwrap() {
            let text = listed.to_string();
            let mut view =
                View::of(&store, &text).unwrap_or_else(|error| panic!("{at}: {text}: {error}"));
            if view.texts.len() == 3 {
                assert_eq!(view.texts.pop().unwrap(), "third", "{at}: {text}");
            } else {
                assert!(!before.contains_key(&text), "{at}: {text} lost what was synced");
            }
            let (old, new) = (before.get(&text), after.get(&text));
            assert!(Some(&view) == old || Some(&view) == new, "{at}: {text} is mixed: {view:?}");
            // An operation that reported success must have taken effect.
            assert!(!succeeded || Some(&view) == new, "{at}: {text} has gone back: {view:?}");
        }
        for text in before.keys().chain(after.keys()) {
            let exists = store.list().unwrap().contains(&name(text));
            let (old, new) = (before.contains_key(text), after.contains_key(text));
            assert!(exists == old || exists == new, "{at}: {text}");
            assert!(!succeeded || exists == new, "{at}: {text}");
            assert!(old == new || changed.contains(&text.as_str()), "{at}: {text}");
        }
        // Every envelope can be unwrapped, every tag is valid, and so is the audit log.
        let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
        assert!(report.is_clean() && report.refused.is_empty(), "{at}: {report:?}");
        store.keys().audit_records().unwrap();
        store.admin().checkpoint().unwrap_or_else(|error| panic!("{at}: {error}"));
        // The store continues to work, and the interrupted operation can be repeated.
        for listed in store.list().unwrap() {
            put(&store.logstore(&listed).unwrap(), "fourth");
        }
        store.close().unwrap_or_else(|error| panic!("{at}: {error}"));
        let store = self.world.open();
        for listed in store.list().unwrap() {
            assert_eq!(all_of(&store.logstore(&listed).unwrap()).last().unwrap(), "fourth", "{at}");
        }
        store.close().unwrap();
    }
}

fn conf(encrypt_conf: EncryptConf) -> LogstoreSpec {
    LogstoreSpec::default().encrypt_conf(encrypt_conf)
}

fn enable(store: &Store, encrypt_conf: EncryptConf) -> Result<()> {
    let config = store.logstore(&name(PLAIN))?.config();
    store.update_logstore(&name(PLAIN), config.encrypt_conf(encrypt_conf)).map(|_| ())
}

#[test]
fn creating_a_logstore() {
    let scene = Scene::new();
    let create = |store: &Store, encrypt_conf| {
        store.create_logstore(&name("p/new"), conf(encrypt_conf)).map(|_| ())
    };
    scene
        .campaign(|_, store| create(store, EncryptConf::service_key(EncryptType::Sm4)), &["p/new"]);
    // Under a master key for which the store has no probe yet.
    scene.campaign(
        |scene, store| create(store, EncryptConf::byok(EncryptType::Aes, scene.new.clone())),
        &["p/new"],
    );
}

#[test]
fn turning_encryption_on() {
    let scene = Scene::new();
    scene.campaign(|_, store| enable(store, EncryptConf::service_key(EncryptType::Aes)), &[PLAIN]);
    scene.campaign(
        |scene, store| enable(store, EncryptConf::byok(EncryptType::Sm4, scene.new.clone())),
        &[PLAIN],
    );
}

/// A process that does not know which metadata is on the disk begins no segment: in one of the two
/// cases its key would be wrong.
#[test]
fn an_interrupted_first_envelope_leaves_only_readable_segments() {
    let scene = Scene::new();
    for failure in Failure::ALL {
        for count in 0.. {
            let at = format!("{failure:?} after {count}");
            scene.reset();
            let disk = FailingDisk::default();
            let store = scene.world.builder().disk(Arc::new(disk.clone())).open().unwrap();
            let logstore = store.logstore(&name(PLAIN)).unwrap();
            put(&logstore, "third");
            disk.fail_after(count, failure);
            let _ = enable(&store, EncryptConf::byok(EncryptType::Sm4, scene.new.clone()));
            let ran_through = !disk.has_failed();
            disk.disarm();
            let mut expected = vec!["first", "second", "third"];
            // First with the open shard, then after reopening it.
            let appended = [false, true].map(|again| {
                if again {
                    logstore.reopen_shard(0).unwrap();
                }
                try_put(&logstore, "fourth").is_ok()
            });
            expected.extend(appended.iter().filter(|done| **done).map(|_| "fourth"));
            drop((store, logstore));
            let store = scene.world.open();
            let found = all_of(&store.logstore(&name(PLAIN)).unwrap());
            assert_eq!(found, expected, "{at}");
            let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
            assert!(report.is_clean() && report.refused.is_empty(), "{at}: {report:?}");
            put(&store.logstore(&name(PLAIN)).unwrap(), "fifth");
            store.close().unwrap();
            if ran_through {
                break;
            }
        }
    }
}

#[test]
fn rotating_a_data_key() {
    let scene = Scene::new();
    scene.campaign(|_, store| store.keys().rotate_data_key(&name(SERVICE)).map(|_| ()), &[SERVICE]);
    scene.campaign(|_, store| store.keys().rotate_data_key(&name(BYOK)).map(|_| ()), &[BYOK]);
}

/// A split or a merge is whole or not there, whatever fails. The parent keeps its data.
#[test]
fn splitting_a_shard() {
    let scene = Scene::new();
    for text in [SERVICE, BYOK, PLAIN] {
        scene.campaign(|_, store| store.split_shard(&name(text), 0, None).map(|_| ()), &[text]);
    }
}

#[test]
fn merging_shards() {
    let scene = Scene::split();
    for text in [SERVICE, BYOK] {
        scene.campaign(|_, store| store.merge_shards(&name(text), 1).map(|_| ()), &[text]);
    }
}

#[test]
fn rewrapping() {
    let scene = Scene::new();
    scene.campaign(|_, store| store.keys().rewrap(&name(SERVICE)).map(|_| ()), &[SERVICE]);
    scene.campaign(|_, store| store.keys().rewrap(&name(BYOK)).map(|_| ()), &[BYOK]);
}

#[test]
fn rotating_the_service_key() {
    Scene::new().campaign(|_, store| store.keys().rotate_service_key().map(|_| ()), &[SERVICE]);
}

#[test]
fn replacing_a_master_key() {
    let scene = Scene::new();
    let replace = |scene: &Scene, store: &Store, how| {
        store.keys().replace_cmk(&name(BYOK), scene.new.clone(), how).map(|_| ())
    };
    scene.campaign(|scene, store| replace(scene, store, ReplaceCmk::default()), &[BYOK]);
    scene.campaign(
        |scene, store| replace(scene, store, ReplaceCmk::default().fresh_data_key(false)),
        &[BYOK],
    );
}

/// After an interrupted replacement, exactly one of the two master keys is needed.
#[test]
fn an_interrupted_replacement_needs_only_one_master_key() {
    let scene = Scene::new();
    for failure in Failure::ALL {
        for count in 0.. {
            scene.reset();
            let disk = FailingDisk::default();
            let store = scene.world.builder().disk(Arc::new(disk.clone())).open().unwrap();
            all_of(&store.logstore(&name(BYOK)).unwrap());
            disk.fail_after(count, failure);
            let _ = store.keys().replace_cmk(&name(BYOK), scene.new.clone(), ReplaceCmk::default());
            let ran_through = !disk.has_failed();
            disk.disarm();
            drop(store);
            if ran_through {
                break;
            }
            let store = scene.world.open();
            let fixed = store
                .logstore(&name(BYOK))
                .unwrap()
                .config()
                .encrypt_conf
                .unwrap()
                .user_cmk_info
                .unwrap();
            assert!(fixed == scene.old || fixed == scene.new);
            let other = if fixed == scene.old { &scene.new } else { &scene.old };
            scene.world.local().disable(&other.cmk_key_id).unwrap();
            let logstore = store.logstore(&name(BYOK)).unwrap();
            assert_eq!(all_of(&logstore), ["first", "second"], "{failure:?} after {count}");
            put(&logstore, "third");
            store.close().unwrap();
            scene.world.local().enable(&other.cmk_key_id).unwrap();
        }
    }
}

#[test]
fn deleting_a_logstore() {
    let scene = Scene::new();
    for text in [SERVICE, BYOK, PLAIN] {
        scene.campaign(|_, store| store.delete_logstore(&name(text)).map(drop), &[text]);
    }
}

#[test]
fn taking_a_checkpoint() {
    Scene::new().campaign(|_, store| store.admin().checkpoint().map(|_| ()), &[]);
}

#[test]
fn closing() {
    Scene::new().campaign(|_, store| store.clone().close(), &[]);
}

/// Shredding is final: after a failure, the versions and all data under them are present, or both
/// are gone.
#[test]
fn shredding() {
    let scene = Scene::new();
    for text in [SERVICE, BYOK] {
        for failure in Failure::ALL {
            for count in 0.. {
                scene.reset();
                let disk = FailingDisk::default();
                let store = scene.world.builder().disk(Arc::new(disk.clone())).open().unwrap();
                all_of(&store.logstore(&name(text)).unwrap());
                disk.fail_after(count, failure);
                let outcome = store.keys().shred_data_keys(&name(text), &[1]);
                let ran_through = !disk.has_failed();
                disk.disarm();
                drop(store);
                if ran_through {
                    outcome.unwrap();
                    break;
                }
                let store = scene.world.open();
                let logstore = store.logstore(&name(text)).unwrap();
                let shredded = logstore.status().unwrap().data_keys[0].shredded;
                assert!(shredded || outcome.is_err(), "{text}: {failure:?} after {count}");
                match all_texts(&logstore) {
                    Ok(texts) => assert!(!shredded && texts == ["first", "second"]),
                    Err(error) => {
                        assert!(
                            shredded && matches!(error, Error::Shredded { version: 1, .. }),
                            "{error:?}"
                        );
                    }
                }
                let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
                assert!(report.is_clean(), "{text}: {failure:?} after {count}: {report:?}");
                store.close().unwrap();
            }
        }
    }
}

/// Retention destroys a data key with the last segment under it. After an interruption at any step,
/// the store reads the remaining data, and the next run of retention completes the work.
#[test]
fn retention_that_destroys_data_keys() {
    let scene = Scene::new();
    for text in [SERVICE, BYOK] {
        for failure in Failure::ALL {
            let mut attempts = 0;
            for count in 0.. {
                let at = format!("{text}: {failure:?} after {count}");
                scene.reset();
                let disk = FailingDisk::default();
                let store = scene.world.builder().disk(Arc::new(disk.clone())).open().unwrap();
                let logstore = store.logstore(&name(text)).unwrap();
                let config = logstore.config().retention_bytes(1);
                store.update_logstore(&name(text), config).unwrap();
                put(&logstore, "third");
                disk.fail_after(count, failure);
                let outcome = store.admin().apply_retention();
                let ran_through = !disk.has_failed();
                disk.disarm();
                drop((logstore, store));
                if ran_through {
                    assert_eq!(outcome.unwrap().data_keys, 1, "{at}");
                    break;
                }
                attempts += 1;
                let store = scene.world.open();
                let logstore = store.logstore(&name(text)).unwrap();
                let left = all_of(&logstore);
                assert_eq!(left.last().unwrap(), "third", "{at}: {left:?}");
                let shredded = logstore.status().unwrap().data_keys[0].shredded;
                assert!(
                    !shredded || !left.contains(&"first".to_owned()),
                    "{at}: a key was destroyed before its segments"
                );
                let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
                assert!(report.is_clean() && report.refused.is_empty(), "{at}: {report:?}");
                put(&logstore, "fourth");
                logstore.roll().unwrap();
                put(&logstore, "fifth");
                store.admin().apply_retention().unwrap();
                let keys = logstore.status().unwrap().data_keys;
                assert!(keys[0].shredded && !keys[1].shredded, "{at}: {keys:?}");
                let intended = |record: &envelog::audit::AuditRecord| {
                    record.event == envelog::audit::AuditEvent::ShredIntended
                };
                assert!(
                    store.keys().audit_records().unwrap().iter().any(intended),
                    "{at}: it is on record"
                );
                store.close().unwrap();
            }
            assert!(attempts > 10, "{attempts}");
        }
    }
}
