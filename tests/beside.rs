//! Concurrent operations: one operation changes state while another one is in progress.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    path::Path,
    sync::{Arc, Barrier, Mutex},
    thread,
    time::Duration,
};

use common::{
    counting::Counting,
    disk::{Op, Sim, SimDisk, Survives, Verdict},
    *,
};
use envelog::{
    AppendOptions, Background, Compression, EncryptConf, EncryptType, Error, Logstore,
    LogstoreSpec, Position, ReadOptions, ShardChoice, Store,
    admin::{ReplaceCmk, VerifyOptions, VerifyReport},
    crypto::AwsLc,
    io::Clock,
    kms::{LocalKms, RevokedReason},
};

fn to_shard(shard: u32, options: AppendOptions) -> AppendOptions {
    options.shard(ShardChoice::Shard(shard))
}

/// A clock that runs an action when the time is read.
struct Tripwire {
    clock: Arc<TestClock>,
    /// The action. It returns whether it has acted; until then, every read runs it again.
    trip: Mutex<Option<Box<dyn FnMut() -> bool + Send>>>,
}

impl std::fmt::Debug for Tripwire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tripwire")
    }
}

impl Tripwire {
    fn asked(&self) -> &TestClock {
        let trip = self.trip.lock().unwrap().take();
        if let Some(mut trip) = trip
            && !trip()
        {
            *self.trip.lock().unwrap() = Some(trip);
        }
        &self.clock
    }
}

impl Clock for Tripwire {
    fn uptime(&self) -> Duration {
        self.asked().uptime()
    }

    fn wall_us(&self) -> u64 {
        self.asked().wall_us()
    }
}

// ---- configuration changes and buffered data ----

/// Acknowledged data is sealed when its key is revoked, but never into an unencrypted segment that
/// was begun before encryption was enabled.
#[test]
fn records_after_enabling_encryption_are_never_written_plain() {
    let world = World::manual();
    let store = world.create();
    let cmk = world.cmk();
    let off = EncryptConf { enable: false, ..EncryptConf::byok(EncryptType::Sm4, cmk.clone()) };
    for (text, conf) in [("p/none", None), ("p/off", Some(off))] {
        let spec = LogstoreSpec::default().compression(Compression::None).encrypt_conf(conf);
        let logstore = store.create_logstore(&name(text), spec).unwrap();
        put(&logstore, "before");
        let mut config = store.logstore(&name(text)).unwrap().config();
        config.encrypt_conf = Some(EncryptConf::byok(EncryptType::Sm4, cmk.clone()));
        store.update_logstore(&name(text), config).unwrap();
        logstore.append(record("secret in the buffer"), &buffered()).unwrap();
        world.local().disable(&cmk.cmk_key_id).unwrap();
        assert_revoked(logstore.revalidate_now(), RevokedReason::Disabled);
        let in_clear = |what: &str| {
            files(&world.store_dir())
                .into_values()
                .any(|bytes| memchr::memmem::find(&bytes, what.as_bytes()).is_some())
        };
        assert!(in_clear("before"), "the search finds what is there");
        assert!(!in_clear("secret in the buffer"), "{text}");
        world.local().enable(&cmk.cmk_key_id).unwrap();
        logstore.revalidate_now().unwrap();
        logstore.sync().unwrap();
        assert_eq!(texts(&logstore), ["before", "secret in the buffer"]);
        assert!(!in_clear("secret in the buffer"), "{text}");
    }
}

/// A read-only process switches to the master key that the writer put in place within the bound,
/// even if it reads no new data.
#[test]
fn a_reader_follows_a_replaced_master_key_within_the_bound() {
    for how in [ReplaceCmk::default(), ReplaceCmk::default().fresh_data_key(false)] {
        let world = World::manual();
        let (old, new) = (world.cmk(), world.cmk());
        let store = world.create();
        put(&world.byok(&store, "p/l", &old), "one");
        let reader = world.builder().open_read_only().unwrap();
        let logstore = reader.logstore(&name("p/l")).unwrap();
        assert_eq!(texts(&logstore), ["one"]);
        store.keys().replace_cmk(&name("p/l"), new.clone(), how).unwrap();
        world.local().disable(&new.cmk_key_id).unwrap();
        // Until its next look at the metadata, the reader uses the old key.
        world.clock.advance(world.options.revalidate_every);
        assert_revoked(try_texts(&logstore), RevokedReason::Disabled);
        // The reader reports the revocation of the new key: an idle tail ends, and its data key is
        // wiped.
        world.local().enable(&new.cmk_key_id).unwrap();
        world.clock.advance(world.options.revalidate_every);
        assert_eq!(texts(&logstore), ["one"]);
        let mut open = logstore.read(0, &ReadOptions::default()).unwrap();
        assert!(open.next().unwrap().is_ok());
        world.local().disable(&new.cmk_key_id).unwrap();
        world.clock.advance(world.options.revalidate_every);
        reader.tick();
        assert_revoked(open.next().unwrap(), RevokedReason::Disabled);
        // Revoking the old key does not affect the reader.
        world.local().enable(&new.cmk_key_id).unwrap();
        world.local().disable(&old.cmk_key_id).unwrap();
        world.clock.advance(world.options.revalidate_every);
        assert_eq!(texts(&logstore), ["one"]);
        // The deletion of a Logstore takes effect as soon, and so does closing, for every handle.
        let other = reader.logstore(&name("p/l")).unwrap();
        store.delete_logstore(&name("p/l")).unwrap();
        world.clock.advance(world.options.revalidate_every);
        assert!(matches!(try_texts(&logstore), Err(Error::Closed(_))));
        assert!(matches!(try_texts(&other), Err(Error::Closed(_))));
    }
}

#[test]
fn every_handle_of_a_reader_ends_when_it_is_closed() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    put(&world.byok(&store, "p/l", &cmk), "one");
    let reader = world.builder().open_read_only().unwrap();
    let first = reader.logstore(&name("p/l")).unwrap();
    store.keys().rotate_data_key(&name("p/l")).unwrap();
    let second = reader.logstore(&name("p/l")).unwrap();
    assert_eq!((texts(&first), texts(&second)), (vec!["one".to_owned()], vec!["one".to_owned()]));
    let other = reader.clone();
    reader.close().unwrap();
    for logstore in [&first, &second] {
        assert!(matches!(try_texts(logstore), Err(Error::Closed(_))));
    }
    assert!(matches!(other.logstore(&name("p/l")), Err(Error::Closed(_))));
}

// ---- closing ----

/// An operation that waits while the store is closing fails with `Closed`. It must not run once the
/// store's lock is released.
#[test]
fn nothing_begins_in_a_store_that_was_closed_while_it_waited() {
    type Operation = fn(&Store) -> envelog::Result<Option<Logstore>>;
    let operations: [Operation; 5] = [
        |store| store.create_logstore(&name("p/new"), LogstoreSpec::default()).map(Some),
        |store| store.logstore(&name("p/idle")).map(Some),
        |store| store.keys().rotate_data_key(&name("p/idle")).map(|_| None),
        |store| store.delete_logstore(&name("p/idle")).map(|_| None),
        |store| store.keys().rotate_service_key().map(|_| None),
    ];
    for operation in operations {
        let sim = Sim::new();
        let store = sim.create();
        put(&sim.world.service(&store, "p/idle"), "idle");
        store.close().unwrap();
        let store = sim.open();
        put(&sim.world.service(&store, "p/busy"), "busy");
        let (began, waiting) = (Arc::new(Barrier::new(2)), Arc::new(Barrier::new(2)));
        let (disk, hooked) = (sim.disk.clone(), (Arc::clone(&began), Arc::clone(&waiting)));
        sim.disk.on_call(move |call| {
            if call.op == Op::Sync && call.is_about(".seg") {
                disk.heal();
                hooked.0.wait();
                hooked.1.wait();
                // The other thread blocks without a signal that this thread could wait for.
                thread::sleep(Duration::from_millis(50));
            }
            Verdict::Go
        });
        thread::scope(|scope| {
            let other = scope.spawn(|| {
                began.wait();
                waiting.wait();
                operation(&store)
            });
            store.clone().close().unwrap();
            match other.join().unwrap() {
                Ok(Some(logstore)) => {
                    assert!(matches!(try_put(&logstore, "late"), Err(Error::Closed(_))))
                }
                done => assert!(matches!(done, Err(Error::Closed(_))), "{done:?}"),
            }
        });
        let store = sim.open();
        assert_eq!(store.list().unwrap().len(), 2);
        assert_eq!(texts(&store.logstore(&name("p/idle")).unwrap()), ["idle"]);
    }
}

// ---- a key that is revoked and enabled ----

/// The key is enabled again while the shards handle a revocation one by one. The segment that the
/// first shard then begins is not part of that revocation, and the next revocation wipes its key.
#[test]
fn a_key_enabled_during_a_wipe_is_wiped_at_the_next_revocation() {
    let mut world = World::threads();
    world.options.revalidate_every = millis(200);
    world.options.linger = secs(10);
    let disk = SimDisk::new(world.path());
    let store = world.builder().disk(Arc::new(disk.clone())).create().unwrap();
    let cmk = world.cmk();
    let spec = LogstoreSpec::default().shard_count(2);
    let logstore = store
        .create_logstore(
            &name("p/l"),
            spec.encrypt_conf(EncryptConf::byok(EncryptType::Aes, cmk.clone())),
        )
        .unwrap();
    for shard in 0..2 {
        logstore.append(record("one"), &to_shard(shard, synced())).unwrap();
    }
    let hang = disk.hang(|call| call.is_about("shard-0001"));
    world.local().disable(&cmk.cmk_key_id).unwrap();
    thread::scope(|threads| {
        threads.spawn(|| logstore.revalidate_now());
        hang.wait_for(1);
        world.local().enable(&cmk.cmk_key_id).unwrap();
        let append = || logstore.append(record("back"), &to_shard(0, written())).is_ok();
        eventually("the key is back", append);
        hang.release();
    });
    eventually("the loss is dealt with", || logstore.revalidate_now().is_ok());
    logstore.append(record("buffered"), &to_shard(0, buffered())).unwrap();
    world.local().disable(&cmk.cmk_key_id).unwrap();
    assert_revoked(logstore.revalidate_now(), RevokedReason::Disabled);
    world.local().enable(&cmk.cmk_key_id).unwrap();
    logstore.revalidate_now().unwrap();
    logstore.append(record("after"), &to_shard(0, synced())).unwrap();
    assert_eq!(strings(&records(&logstore, 0).unwrap()), ["one", "back", "buffered", "after"]);
}

/// A key is unwrapped just before a revocation and inserted just after the wipe. The engine must
/// remove it again.
#[test]
fn no_key_is_left_by_whoever_was_loading_it_when_it_was_lost() {
    let world = World::manual();
    let keys = Counting::default();
    let clock = Arc::new(Tripwire { clock: Arc::clone(&world.clock), trip: Mutex::default() });
    let builder =
        Store::builder(world.store_dir(), world.keyring(), keys.clone()).options(world.options);
    let store =
        builder.kms(Arc::clone(&world.kms) as _).clock(Arc::clone(&clock) as _).create().unwrap();
    let cmk = world.cmk();
    let logstore = world.byok(&store, "p/l", &cmk);
    let without = keys.count();
    put(&logstore, "one");
    store.keys().rotate_data_key(&name("p/l")).unwrap();
    put(&logstore, "two");
    // The first segment uses a key version that is not in memory any more.
    let calls = world.kms.calls();
    let (kms, logstore_too, cmk_too) = (Arc::clone(&world.kms), logstore.clone(), cmk.clone());
    *clock.trip.lock().unwrap() = Some(Box::new(move || {
        if kms.calls() == calls {
            return false;
        }
        kms.local().disable(&cmk_too.cmk_key_id).unwrap();
        assert_revoked(elsewhere(|| logstore_too.revalidate_now()), RevokedReason::Disabled);
        true
    }));
    assert_revoked(try_texts(&logstore), RevokedReason::Disabled);
    assert!(clock.trip.lock().unwrap().is_none(), "the key had to be unwrapped");
    assert_eq!(keys.count(), without, "a key is left in memory");
    world.local().enable(&cmk.cmk_key_id).unwrap();
    logstore.revalidate_now().unwrap();
    assert_eq!(texts(&logstore), ["one", "two"]);
}

/// A KMS that is missing at its first use is an outage, which ends when the KMS appears.
#[test]
fn an_embedded_kms_that_was_missing_at_first_is_found_later() {
    let world = World::manual();
    let dir = world.path().join("apart");
    let kms = LocalKms::create_or_open(&dir).unwrap();
    let id = kms.create_key("cn-shanghai", &["role"]).unwrap();
    let cmk = envelog::Cmk { cmk_key_id: id, arn: "role".into(), region_id: "cn-shanghai".into() };
    let builder = || world.builder().kms(Arc::new(LocalKms::at(&dir)));
    let store = builder().create().unwrap();
    put(&world.byok(&store, "p/l", &cmk), "one");
    store.close().unwrap();
    let away = world.path().join("away");
    fs::rename(&dir, &away).unwrap();
    let store = builder().open().unwrap();
    let logstore = store.logstore(&name("p/l")).unwrap();
    assert!(matches!(try_texts(&logstore), Err(Error::KmsUnreachable { .. })));
    fs::rename(&away, &dir).unwrap();
    world.clock.advance(world.options.revalidate_every * 2);
    assert_eq!(texts(&logstore), ["one"]);
    put(&logstore, "two");
}

// ---- retention during a read or a verification ----

/// A store with segments of one hour each and a retention of one day.
fn with_old_segments() -> (World, Store, Logstore) {
    let mut world = World::manual();
    world.options.segment_bytes = 4 << 10;
    let store = world.create();
    let conf = EncryptConf::service_key(EncryptType::Aes);
    let spec = LogstoreSpec::default().ttl_days(1).compression(Compression::None);
    let logstore = store.create_logstore(&name("p/l"), spec.encrypt_conf(conf)).unwrap();
    for n in 0..8 {
        let text = n.to_string().repeat(5000);
        put(&logstore, &text);
        world.clock.advance(secs(3600));
    }
    assert!(segments(&world.logstore_dir(&logstore), 0).len() > 5);
    (world, store, logstore)
}

/// The key source rule checks earlier segments, which retention may have dropped since they were
/// listed.
#[test]
fn plain_segments_dropped_during_a_verification_are_no_fault() {
    let mut world = World::manual();
    world.options.segment_bytes = 4 << 10;
    let store = world.create();
    let spec = LogstoreSpec::default().ttl_days(1).compression(Compression::None);
    let logstore = store.create_logstore(&name("p/l"), spec).unwrap();
    for n in 0..8 {
        put(&logstore, &n.to_string().repeat(5000));
        world.clock.advance(secs(3600));
    }
    let mut config = store.logstore(&name("p/l")).unwrap().config();
    config.encrypt_conf = Some(EncryptConf::service_key(EncryptType::Aes));
    store.update_logstore(&name("p/l"), config).unwrap();
    put(&logstore, "sealed");
    let reader = world.builder().open_read_only().unwrap();
    let report = verify_beside(&reader, || {
        world.clock.advance(secs(20 * 3600));
        let dropped = store.admin().apply_retention().unwrap().segments;
        assert!((2..7).contains(&dropped), "{dropped}");
    });
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    assert!(
        report.notes.iter().any(|note| note.contains("retention dropped")),
        "{:?}",
        report.notes
    );
    let read = records_from(&reader.logstore(&name("p/l")).unwrap(), 0, Position::Begin).unwrap();
    assert_eq!(strings(&read).last().unwrap(), "sealed");
}

/// Verifies a store and runs `act` once in the middle.
fn verify_beside(store: &Store, mut act: impl FnMut()) -> VerifyReport {
    let mut begun = false;
    store
        .admin()
        .verify(&VerifyOptions::default(), &mut |_| {
            if !std::mem::replace(&mut begun, true) {
                act();
            }
        })
        .unwrap()
}

#[test]
fn what_retention_drops_meanwhile_is_no_fault_and_no_hole() {
    for reads_only in [false, true] {
        let (world, store, logstore) = with_old_segments();
        let reader = world.builder().open_read_only().unwrap();
        let looking = if reads_only { &reader } else { &store };
        let before = segments(&world.logstore_dir(&logstore), 0).len();
        let report = verify_beside(looking, || {
            world.clock.advance(secs(22 * 3600));
            assert!(store.admin().apply_retention().unwrap().segments > 2);
        });
        assert!(report.faults.is_empty(), "{:?}", report.faults);
        assert!(
            report.notes.iter().any(|note| note.contains("retention dropped")),
            "{:?}",
            report.notes
        );
        let left = segments(&world.logstore_dir(&logstore), 0).len();
        assert!(left < before);
        // A handle that listed the segments earlier continues with the remaining ones.
        let found = looking.logstore(&name("p/l")).unwrap();
        let all = found.status().unwrap();
        assert_eq!(all.segments as usize, left);
        let from = ReadOptions::default().from(Position::Time(0));
        let read: Vec<_> = found.read(0, &from).unwrap().collect::<envelog::Result<_>>().unwrap();
        assert_eq!(read.len() as u64, all.groups);
    }
}

#[test]
fn a_logstore_that_is_deleted_meanwhile_is_no_fault() {
    let (_world, store, logstore) = with_old_segments();
    let report = verify_beside(&store, || drop(store.delete_logstore(logstore.name()).unwrap()));
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    assert!(
        report.notes.iter().any(|note| note.contains("was deleted meanwhile")),
        "{:?}",
        report.notes
    );
}

// ---- the location of a store ----

/// The store directory's entry in its parent must be durable too, also if the path does not name
/// the parent.
#[test]
fn a_store_with_a_relative_path_is_there_after_the_power_fails() {
    let world = World::manual();
    // The keyring is in another directory: syncing that one must not hide a missing sync of the
    // parent.
    let disk = SimDisk::new(Path::new("keys"));
    let builder = |disk: &SimDisk| {
        let options = world.options;
        assert_eq!(options.background, Background::Manual);
        let builder = Store::builder("data", "keys/keyring", AwsLc::new()).options(options);
        builder.clock(Arc::clone(&world.clock) as _).disk(Arc::new(disk.clone()))
    };
    let store = builder(&disk).create().unwrap();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "kept");
    let after = disk.crash(Survives::Synced);
    let store = builder(&after).open().unwrap();
    assert_eq!(texts(&store.logstore(&name("p/l")).unwrap()), ["kept"]);
}
