//! The lease of the service key: a refusal of its KMS closes an open store, an outage does after a
//! time, and the store works again when the KMS allows the key.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use common::{failing::FailingDisk, hanging::HangingDisk, *};
use envelog::{
    Cmk, Durability, EncryptConf, EncryptType, Error, ErrorKind, KeyState, Logstore, LogstoreSpec,
    ReadOptions, Result, Store,
    admin::{ReplaceCmk, VerifyOptions},
    audit::AuditEvent::{self, *},
    audit::AuditRecord,
    kms::{KmsError, RevokedReason, RevokedReason::Disabled},
};

/// A store whose keyring is under a master key, with a Logstore of each kind.
struct Leased {
    world: World,
    /// The master key of the keyring.
    cmk: Cmk,
    store: Store,
    service: Logstore,
    plain: Logstore,
    byok: Logstore,
}

impl Leased {
    fn new(world: World) -> Self {
        let cmk = world.cmk();
        let store = world.builder().service_cmk(cmk.clone()).create().unwrap();
        let service = world.service(&store, "p/service");
        let plain = store.create_logstore(&name("p/plain"), LogstoreSpec::default()).unwrap();
        let byok = world.byok(&store, "p/byok", &world.cmk());
        let all = Self { world, cmk, store, service, plain, byok };
        all.logstores().into_iter().for_each(|logstore| put(logstore, "first"));
        all
    }

    fn manual() -> Self {
        Self::new(World::manual())
    }

    fn logstores(&self) -> [&Logstore; 3] {
        [&self.service, &self.plain, &self.byok]
    }

    fn answer(&self, answer: Answer) {
        self.world.kms.answer_for_service_key(answer);
    }

    /// The KMS refuses the service key, and the store notices.
    fn refuse(&self) {
        self.answer(Answer::Revoked(Disabled));
        self.pass_a_period();
    }

    /// The KMS allows the service key, and the store notices.
    fn allow(&self) {
        self.answer(Answer::Real);
        self.pass_a_period();
    }

    fn pass_a_period(&self) {
        self.world.clock.advance(self.world.options.revalidate_every);
        self.store.tick();
    }

    fn pass(&self, seconds: u64) {
        for _ in 0..seconds {
            self.world.clock.advance(secs(1));
            self.store.tick();
        }
    }

    #[track_caller]
    fn assert_works(&self) {
        for logstore in self.logstores() {
            put(logstore, "works");
            assert_eq!(texts(logstore).last().unwrap(), "works");
        }
        let report = self.store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
        assert!(report.is_clean() && report.refused.is_empty(), "{report:?}");
    }

    #[track_caller]
    fn assert_refused(&self) {
        for logstore in self.logstores() {
            assert_refused(try_put(logstore, "refused"));
            assert_refused(try_texts(logstore));
            assert_refused(logstore.read(0, &ReadOptions::default()).map(drop));
        }
    }

    fn service_records(&self) -> Vec<AuditRecord> {
        service_records(&self.store)
    }
}

fn records_of(store: &Store) -> Vec<AuditRecord> {
    store.keys().audit_records().unwrap()
}

/// The transitions of the service key.
fn service_records(store: &Store) -> Vec<AuditRecord> {
    let ours = |record: &AuditRecord| {
        record.logstore.is_none() && matches!(record.event, Revoked | LeaseEnded | Recovered)
    };
    records_of(store).into_iter().filter(ours).collect()
}

fn events(records: &[AuditRecord]) -> Vec<AuditEvent> {
    records.iter().map(|record| record.event).collect()
}

fn is_refused<T>(result: &Result<T>) -> bool {
    matches!(
        result,
        Err(Error::ServiceKey { cause: KmsError::Revoked { reason: Disabled, .. }, .. })
    )
}

#[track_caller]
fn assert_refused<T: std::fmt::Debug>(result: Result<T>) {
    assert!(is_refused(&result), "expected a refusal of the service key, got {result:?}");
}

#[track_caller]
fn assert_unreachable<T: std::fmt::Debug>(result: Result<T>) {
    let unreachable =
        matches!(&result, Err(Error::ServiceKey { cause: KmsError::Unreachable { .. }, .. }));
    assert!(unreachable, "expected an outage of the service key, got {result:?}");
}

// ---- the bound ----

/// For any phase between renewal and refusal, with and without ticks.
#[test]
fn no_operation_succeeds_that_starts_after_the_bound() {
    for phase in (0..=62).step_by(9) {
        for ticking in [false, true] {
            let all = Leased::manual();
            let Leased { world, store, .. } = &all;
            let bound = world.options.revalidate_every + world.options.kms_timeout;
            for _ in 0..phase {
                world.clock.advance(millis(500));
                put(&all.service, "before");
            }
            all.answer(Answer::Revoked(Disabled));
            let mut refused = false;
            for _ in 0..20 {
                world.clock.advance(bound / 20);
                if ticking {
                    store.tick();
                }
                let now = all.logstores().map(|logstore| try_put(logstore, "maybe").is_err());
                assert!(now == [now[0]; 3] && (now[0] || !refused), "{now:?}");
                refused = now[0];
            }
            assert!(refused, "phase {phase}");
            all.assert_refused();
        }
    }
}

/// A machine that was suspended asks before it goes on.
#[test]
fn a_paused_machine_asks_first() {
    let all = Leased::manual();
    all.answer(Answer::Revoked(Disabled));
    all.world.clock.jump_wall(secs(3600));
    all.assert_refused();
}

#[test]
fn a_refusal_closes_every_operation() {
    let all = Leased::manual();
    let Leased { world, store, service, .. } = &all;
    put(service, "second");
    let mut reader = service.read(0, &ReadOptions::default()).unwrap();
    assert_eq!(reader.next().unwrap().unwrap().bytes, "first");
    let checkpoint = store.admin().checkpoint().unwrap();
    let ticket = service.submit(record("submitted"), &synced()).unwrap();
    let config = service.config();
    all.answer(Answer::Revoked(Disabled));
    world.clock.advance(secs(31));
    // The block was decrypted before.
    assert_refused(reader.next().unwrap());
    assert!(reader.next().is_none());
    assert_refused(ticket.wait());
    all.assert_refused();
    for logstore in all.logstores() {
        assert_refused(logstore.sync().and_then(|()| try_put(logstore, "x")));
    }
    let (keys, admin) = (store.keys(), store.admin());
    let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::service_key(EncryptType::Aes));
    assert_refused(store.create_logstore(&name("p/new"), spec));
    assert_refused(store.update_logstore(service.name(), config));
    assert_refused(store.delete_logstore(service.name()));
    assert_refused(keys.rotate_data_key(service.name()));
    assert_refused(keys.rotate_due_data_keys());
    assert_refused(keys.rewrap(service.name()));
    assert_refused(keys.rewrap_all(&Default::default(), &mut |_| {}).map(drop));
    assert_refused(keys.replace_cmk(all.byok.name(), world.cmk(), ReplaceCmk::default()));
    assert_refused(keys.shred_data_keys(service.name(), &[1]));
    assert_refused(keys.rotate_service_key());
    assert_refused(keys.rewrap_keyring(None));
    assert_refused(keys.audit_records());
    assert_refused(keys.verify_audit(None).map(drop));
    assert_refused(keys.export_audit());
    assert_refused(admin.checkpoint());
    assert_refused(admin.apply_retention());
    assert_refused(admin.repair(service.name(), 0, &Default::default()));
    assert_refused(admin.verify(&VerifyOptions::default(), &mut |_| {}));
    let against = VerifyOptions::default().against(checkpoint);
    assert_refused(admin.verify(&against, &mut |_| {}));
    // The error says which key of which KMS.
    let error = try_texts(service).unwrap_err();
    assert_eq!((error.kind(), error.code()), (ErrorKind::Revoked, "service_key_revoked"));
    for part in [&*all.cmk.cmk_key_id, REGION, "disabled", "keyring"] {
        assert!(error.to_string().contains(part), "{error}");
    }
}

#[test]
fn operations_that_need_no_key_go_on() {
    let all = Leased::manual();
    let Leased { store, service, .. } = &all;
    all.refuse();
    all.assert_refused();
    assert_eq!(store.list().unwrap().len(), 3);
    assert_eq!(store.logstore(service.name()).unwrap().id(), service.id());
    assert_eq!(service.status().unwrap().segments, 1);
    assert_eq!(service.end_seq(0).unwrap(), 1);
    assert!(store.metrics().refusals.disabled > 0);
    assert_eq!(store.keys().service_cmk(), Some(all.cmk.clone()));
    let usage = store.keys().usage().unwrap();
    assert!(usage.service_keys.iter().all(|key| !key.safe_to_destroy));
    let options = VerifyOptions::default().keyless(true);
    let report = store.admin().verify(&options, &mut |_| {}).unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!((report.segments, report.blocks), (3, 3));
    assert!(report.notes.iter().any(|note| note.contains("not verified")), "{:?}", report.notes);
    assert_eq!(report.refused.len(), 3, "their metadata needs the service key");
}

// ---- the return ----

#[test]
fn the_key_returns_without_a_restart_or_a_lost_record() {
    let all = Leased::manual();
    let Leased { world, store, .. } = &all;
    for logstore in all.logstores() {
        logstore.append(record("buffered"), &buffered()).unwrap();
        logstore.append(record("written"), &written()).unwrap();
    }
    let before = records_of(store).len();
    all.refuse();
    all.assert_refused();
    // Acknowledged groups were sealed before the wipe.
    for logstore in all.logstores() {
        let path = &segments(&world.logstore_dir(logstore), 0)[0];
        assert!(fs::read(path).unwrap().ends_with(b"SEAL"));
    }
    for _ in 0..4 {
        all.pass_a_period();
        all.assert_refused();
    }
    let asked = world.kms.keyrings().len();
    all.answer(Answer::Real);
    all.pass_a_period();
    assert_eq!(world.kms.keyrings().len(), asked + 2, "the probe, and the keyring in its file");
    for logstore in all.logstores() {
        assert_eq!(texts(logstore), ["first", "buffered", "written"]);
    }
    all.assert_works();
    let records = records_of(store).split_off(before);
    assert_eq!(events(&records), [Revoked, Recovered]);
    assert!(records.iter().all(|record| record.logstore.is_none()));
    assert_eq!(records[0].detail, "disabled");
    // The record of the loss was written when it happened.
    assert!(records[1].time_us - records[0].time_us >= 5 * 30_000_000);
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean(), "{report:?}");
}

/// Without ticks, the next operation renews the lease, and reads the keyring.
#[test]
fn the_next_operation_brings_the_store_back() {
    let operations: [fn(&Leased) -> Result<()>; 6] = [
        |all| try_put(&all.service, "x"),
        |all| try_texts(&all.plain).map(drop),
        |all| all.byok.sync(),
        |all| all.store.keys().rotate_data_key(&name("p/service")).map(drop),
        |all| all.store.keys().audit_records().map(drop),
        |all| all.store.admin().verify(&VerifyOptions::default(), &mut |_| {}).map(drop),
    ];
    for operation in operations {
        let all = Leased::manual();
        all.answer(Answer::Revoked(Disabled));
        all.world.clock.advance(secs(31));
        all.assert_refused();
        all.answer(Answer::Real);
        all.world.clock.advance(secs(31));
        operation(&all).unwrap();
        all.assert_works();
        assert_eq!(events(&all.service_records()), [Revoked, Recovered]);
    }
}

/// Each reason, again and again, with the limit of ten records an hour.
#[test]
fn a_key_that_is_toggled_fills_no_log() {
    let all = Leased::manual();
    let reasons = [
        RevokedReason::Disabled,
        RevokedReason::PendingDeletion,
        RevokedReason::Deleted,
        RevokedReason::NotPermitted,
    ];
    for (n, reason) in reasons.iter().cycle().take(20).enumerate() {
        all.answer(Answer::Revoked(*reason));
        all.pass_a_period();
        let refused = try_put(&all.service, "x").unwrap_err();
        assert!(refused.to_string().contains(&reason.to_string()), "{refused}");
        all.allow();
        put(&all.service, &format!("{n}"));
    }
    let records = all.service_records();
    assert_eq!(records.len(), 10);
    assert_eq!(all.store.metrics().audit_left_out, 30);
    all.world.clock.advance(secs(3600));
    all.store.tick();
    let records = all.service_records();
    assert_eq!((records.len(), records[10].event), (11, Recovered));
    assert!(records[10].detail.contains("29 transitions"), "{:?}", records[10]);
}

/// The next process finds the loss on record, and records the return.
#[test]
fn a_store_that_was_closed_while_it_was_refused_opens_again() {
    let all = Leased::manual();
    all.service.append(record("buffered"), &buffered()).unwrap();
    all.refuse();
    let Leased { world, store, service, plain, byok, .. } = all;
    assert_refused(store.close());
    drop((service, plain, byok));
    assert_refused(world.builder().open().map(drop));
    world.kms.answer(Answer::Real);
    let store = world.open();
    store.tick();
    assert_eq!(texts(&store.logstore(&name("p/service")).unwrap()), ["first", "buffered"]);
    assert_eq!(events(&service_records(&store)), [Revoked, Recovered]);
}

// ---- the audit log ----

#[test]
fn a_failing_audit_disk_delays_no_wipe_and_the_record_follows() {
    let mut world = World::manual();
    world.options.head_every = secs(3600);
    let disk = FailingDisk::default();
    let cmk = world.cmk();
    let builder = world.builder().disk(Arc::new(disk.clone())).service_cmk(cmk);
    let store = builder.create().unwrap();
    let service = world.service(&store, "p/l");
    put(&service, "first");
    disk.break_paths(Some("/audit/"));
    let answer = |answer| {
        world.kms.answer_for_service_key(answer);
        world.clock.advance(secs(30));
        store.tick();
    };
    answer(Answer::Revoked(Disabled));
    assert_refused(try_put(&service, "refused"));
    disk.break_paths(None);
    world.clock.advance(secs(60));
    answer(Answer::Real);
    assert_eq!(texts(&service), ["first"]);
    let records = service_records(&store);
    assert_eq!(events(&records), [Revoked, Recovered]);
    let detail = &records[0].detail;
    assert!(detail.starts_with("disabled; recorded 90 s later"), "{detail}");
    assert_eq!(records[1].detail, "");
    // A failure at both times loses the two records, and no other.
    disk.break_paths(Some("/audit/"));
    answer(Answer::Revoked(Disabled));
    answer(Answer::Real);
    disk.break_paths(None);
    assert_eq!(texts(&service), ["first"]);
    answer(Answer::Revoked(Disabled));
    answer(Answer::Real);
    assert_eq!(events(&service_records(&store)), [Revoked, Recovered, Revoked, Recovered]);
    assert!(store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().is_clean());
}

/// With threads: the wipe waits for a hanging audit disk for `kms_timeout` at most.
#[test]
fn a_hanging_audit_disk_delays_no_wipe_and_the_record_follows() {
    let world = quick();
    let disk = HangingDisk::of(".log");
    let builder = world.builder().disk(Arc::new(disk.clone())).service_cmk(world.cmk());
    let store = builder.create().unwrap();
    let service = world.service(&store, "p/l");
    put(&service, "first");
    disk.hang(true);
    world.kms.answer_for_service_key(Answer::Revoked(Disabled));
    eventually("the audit log hangs", || disk.hanging() > 0);
    let began = Instant::now();
    // The last step of the loss.
    let path = segments(&world.logstore_dir(&service), 0).remove(0);
    eventually("it is sealed", || fs::read(&path).unwrap().ends_with(b"SEAL"));
    assert!(began.elapsed() < world.options.kms_timeout + secs(2), "{:?}", began.elapsed());
    assert_refused(try_put(&service, "refused"));
    // The keyring is back while the log still hangs, and data is read and written.
    world.kms.answer(Answer::Real);
    eventually("it is back", || try_put(&service, "second").is_ok());
    assert_eq!(texts(&service), ["first", "second"]);
    disk.hang(false);
    eventually("all is on record", || {
        let records = service_records(&store);
        events(&records) == [Revoked, Recovered]
    });
    store.close().unwrap();
}

/// The loss of a customer's key cannot be recorded while the service key is away. It is counted,
/// and recorded later.
#[test]
fn a_customers_loss_meanwhile_is_recorded_later() {
    let all = Leased::manual();
    all.refuse();
    let about_byok = || {
        let records = records_of(&all.store);
        let ours =
            records.into_iter().filter(|record| record.logstore.as_ref() == Some(all.byok.name()));
        ours.filter(|record| record.event != Created).collect::<Vec<_>>()
    };
    let cmk = all.byok.status().unwrap().cmk.unwrap();
    all.world.local().disable(&cmk.cmk_key_id).unwrap();
    all.pass_a_period();
    all.allow();
    assert_revoked(try_put(&all.byok, "x"), Disabled);
    assert_eq!(about_byok(), []);
    // By the periodic job.
    all.world.clock.advance(all.world.options.retention_every);
    all.store.tick();
    assert_eq!(events(&about_byok()), [Revoked]);
    all.world.local().enable(&cmk.cmk_key_id).unwrap();
    all.pass_a_period();
    all.assert_works();
    assert_eq!(events(&about_byok()), [Revoked, Recovered]);
}

// ---- outages ----

#[test]
fn an_outage_closes_the_store_after_its_grace_and_not_before() {
    let mut world = World::manual();
    world.options.service_outage_grace = secs(600);
    let all = Leased::new(world);
    let status = || all.store.keys().service_key_status();
    all.pass(40);
    assert_eq!(status().state, KeyState::Active);
    all.answer(Answer::Unreachable);
    let left = status().lease_left.unwrap();
    assert!(left >= secs(600 - 40) && left <= secs(600), "{left:?}");
    for second in 1..left.as_secs() {
        all.pass(1);
        put(&all.service, "riding");
        assert_eq!(status().lease_left, Some(left - secs(second)));
    }
    assert!(matches!(status().state, KeyState::Outage { .. }));
    assert_eq!(all.service.key_status(), status());
    assert_eq!(all.byok.key_status().state, KeyState::Active);
    all.pass(1);
    for logstore in all.logstores() {
        assert_unreachable(try_put(logstore, "late"));
        assert_unreachable(try_texts(logstore));
    }
    assert_eq!(status().lease_left, Some(Duration::ZERO));
    let error = try_texts(&all.service).unwrap_err();
    assert_eq!(
        (error.kind(), error.code()),
        (ErrorKind::KmsUnreachable, "service_key_unreachable")
    );
    all.allow();
    all.assert_works();
    let records = all.service_records();
    assert_eq!(events(&records), [LeaseEnded, Recovered]);
    assert!(records[0].detail.starts_with("unreachable: "), "{:?}", records[0]);
    assert_eq!(status().state, KeyState::Active);
}

#[test]
fn without_a_grace_only_a_refusal_closes_the_store() {
    let mut world = World::manual();
    world.options.service_outage_grace = Duration::ZERO;
    let all = Leased::new(world);
    let status = || all.store.keys().service_key_status();
    assert_eq!((status().state, status().lease_left), (KeyState::Active, None));
    for answer in [Answer::Unreachable, Answer::Invalid, Answer::WrongKey] {
        all.answer(answer);
        for _ in 0..50 {
            all.world.clock.advance(secs(3600));
            all.store.tick();
            put(&all.service, "riding");
            put(&all.plain, "riding");
        }
        assert!(matches!(status().state, KeyState::Outage { .. }));
        assert_eq!(status().lease_left, None);
    }
    all.refuse();
    all.assert_refused();
    assert_eq!(status().lease_left, Some(Duration::ZERO));
    // An outage behind a refusal brings nothing back.
    all.answer(Answer::Unreachable);
    all.pass(120);
    for logstore in all.logstores() {
        assert_unreachable(try_put(logstore, "x"));
    }
    all.allow();
    all.assert_works();
    assert_eq!(events(&all.service_records()), [Revoked, Recovered]);
}

#[test]
fn wrong_answers_are_an_outage() {
    for answer in [Answer::Invalid, Answer::WrongKey] {
        let mut world = World::manual();
        world.options.service_outage_grace = secs(60);
        let all = Leased::new(world);
        all.answer(answer);
        all.pass(59);
        put(&all.service, "riding");
        all.pass(1);
        let refused = try_put(&all.service, "x");
        let Err(Error::ServiceKey { cause: KmsError::Invalid { .. }, .. }) = refused else {
            panic!("{refused:?}")
        };
        assert_eq!(refused.unwrap_err().code(), "service_key_invalid");
        all.allow();
        all.assert_works();
        assert!(all.service_records()[0].detail.starts_with("invalid: "));
    }
}

// ---- the keyring changes ----

#[test]
fn a_keyring_under_no_master_key_has_no_lease() {
    let world = World::manual();
    let store = world.create();
    let logstore = world.service(&store, "p/l");
    put(&logstore, "first");
    world.kms.answer(Answer::Revoked(Disabled));
    for _ in 0..10 {
        world.clock.advance(secs(3600));
        store.tick();
        put(&logstore, "more");
    }
    assert_eq!((world.kms.calls(), store.keys().renewal_calls()), (0, 0));
    let status = store.keys().service_key_status();
    assert_eq!((status.state, status.lease_left), (KeyState::Active, None));
    assert_eq!(store.metrics().service_lease, None);
}

#[test]
fn the_lease_follows_the_keyring_to_another_master_key() {
    let all = Leased::manual();
    let (keys, old, new) = (all.store.keys(), &all.cmk, all.world.cmk());
    keys.rewrap_keyring(Some(new.clone())).unwrap();
    // The old key concerns the store no more.
    all.world.kms.answer_for_master_key(&old.cmk_key_id, Answer::Revoked(Disabled));
    all.pass(100);
    all.assert_works();
    assert_eq!(all.store.metrics().service_lease.unwrap().cmk, new);
    all.world.kms.answer_for_master_key(&new.cmk_key_id, Answer::Revoked(Disabled));
    all.pass(31);
    all.assert_refused();
    let error = try_texts(&all.service).unwrap_err();
    assert!(error.to_string().contains(&new.cmk_key_id), "{error}");
    all.world.kms.answer(Answer::Real);
    all.pass(31);
    all.assert_works();
    assert_eq!(events(&all.service_records()), [Revoked, Recovered]);
}

#[test]
fn a_keyring_that_is_put_under_no_master_key_is_free_and_back() {
    let all = Leased::manual();
    let keys = all.store.keys();
    all.refuse();
    assert_refused(keys.rewrap_keyring(None));
    assert_eq!(keys.service_cmk(), Some(all.cmk.clone()));
    all.allow();
    keys.rewrap_keyring(None).unwrap();
    let asked = all.world.kms.keyrings().len();
    all.refuse();
    all.pass(100);
    all.assert_works();
    assert_eq!(all.world.kms.keyrings().len(), asked);
    assert_eq!((all.store.metrics().service_lease, keys.service_cmk()), (None, None));
    // And under one again.
    all.answer(Answer::Real);
    keys.rewrap_keyring(Some(all.cmk.clone())).unwrap();
    all.assert_works();
    all.refuse();
    all.assert_refused();
    all.allow();
    all.assert_works();
}

#[test]
fn a_rotation_keeps_the_lease_and_changes_its_probe() {
    let all = Leased::manual();
    assert_eq!(all.store.keys().rotate_service_key().unwrap(), 2);
    let asked = all.world.kms.keyrings().len();
    all.pass_a_period();
    assert_eq!(all.world.kms.keyrings()[asked..], ["2"]);
    all.refuse();
    all.assert_refused();
    assert_refused(all.store.keys().rotate_service_key());
    all.allow();
    all.assert_works();
    assert_eq!(all.store.keys().rotate_service_key().unwrap(), 3);
    all.refuse();
    all.allow();
    all.assert_works();
    for logstore in all.logstores() {
        assert_eq!(texts(logstore)[0], "first");
    }
    assert_eq!(all.world.kms.keyrings().last().unwrap(), "3");
}

/// A rotation that a refusal interrupts is continued.
#[test]
fn a_rotation_that_is_interrupted_is_continued() {
    let all = Leased::manual();
    let (keys, world) = (all.store.keys(), &all.world);
    let mut steps = 0;
    let refused = keys.rotate_service_key_with(&mut |_| {
        steps += 1;
        if steps == 2 {
            world.kms.answer_for_service_key(Answer::Revoked(Disabled));
            world.clock.advance(secs(31));
        }
    });
    assert_refused(refused.map(drop));
    all.assert_refused();
    assert!(keys.is_service_rotation_unfinished());
    all.allow();
    all.assert_works();
    let done = keys.rotate_service_key_with(&mut |_| {}).unwrap();
    assert!(done.continued && done.version == 2, "{done:?}");
    all.assert_works();
}

/// The master key of the service may be a customer's key too.
#[test]
fn one_master_key_for_the_service_and_a_customer() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.builder().service_cmk(cmk.clone()).create().unwrap();
    let [byok, service] = [world.byok(&store, "p/byok", &cmk), world.service(&store, "p/service")];
    put(&byok, "first");
    put(&service, "first");
    let pass = || {
        world.clock.advance(secs(31));
        store.tick();
    };
    // Each has a probe of its own.
    let (probes, keyrings) = (world.kms.probes(), world.kms.keyrings().len());
    pass();
    assert_eq!((world.kms.probes(), world.kms.keyrings().len()), (probes + 1, keyrings + 1));
    world.kms.answer_for_service_key(Answer::Revoked(Disabled));
    pass();
    assert_refused(try_put(&byok, "x"));
    assert_refused(try_put(&service, "x"));
    world.kms.answer(Answer::Revoked(Disabled));
    pass();
    assert_refused(try_put(&byok, "x"));
    // The customer's refusal alone.
    world.kms.answer_for_service_key(Answer::Real);
    pass();
    assert_revoked(try_put(&byok, "x"), Disabled);
    put(&service, "second");
    world.kms.answer(Answer::Real);
    pass();
    put(&byok, "second");
    assert_eq!(
        (texts(&byok), texts(&service)),
        (texts(&service), vec!["first".into(), "second".into()])
    );
}

#[test]
fn opening_calls_the_kms_of_the_service_once_and_no_customers() {
    let all = Leased::manual();
    let Leased { world, store, service, plain, byok, .. } = all;
    store.close().unwrap();
    drop((service, plain, byok));
    let calls = world.kms.calls();
    let store = world.open();
    let reader = world.builder().open_read_only().unwrap();
    assert_eq!(world.kms.calls(), calls + 2);
    for store in [&store, &reader] {
        assert_eq!(texts(&store.logstore(&name("p/service")).unwrap()), ["first"]);
    }
    assert_eq!(world.kms.calls(), calls + 2, "the call of the opening counts for the lease");
    assert_eq!(texts(&store.logstore(&name("p/byok")).unwrap()), ["first"]);
    assert!(world.kms.calls() > calls + 2);
}

// ---- the file of the keyring ----

#[test]
fn a_keyring_file_that_is_damaged_meanwhile_is_waited_for() {
    type Damage = fn(&World, &[u8]) -> (ErrorKind, &'static str);
    let damages: [Damage; 4] = [
        |world, _| {
            fs::remove_file(world.keyring()).unwrap();
            (ErrorKind::Unavailable, "missing")
        },
        |world, whole| {
            write_private(&world.keyring(), &whole[..whole.len() / 2]);
            (ErrorKind::Integrity, "truncated")
        },
        |world, whole| {
            let mut bytes = whole.to_vec();
            let middle = bytes.len() / 2;
            bytes[middle] = if bytes[middle] == b'0' { b'1' } else { b'0' };
            fix_crc(&mut bytes);
            write_private(&world.keyring(), bytes);
            (ErrorKind::Integrity, "keyring")
        },
        |world, whole| {
            write_private(&world.keyring(), whole);
            fs::set_permissions(
                world.keyring(),
                std::os::unix::fs::PermissionsExt::from_mode(0o644),
            )
            .unwrap();
            (ErrorKind::Unavailable, "chmod")
        },
    ];
    for damage in damages {
        let all = Leased::manual();
        all.service.append(record("buffered"), &buffered()).unwrap();
        let whole = fs::read(all.world.keyring()).unwrap();
        all.refuse();
        all.assert_refused();
        let (kind, text) = damage(&all.world, &whole);
        all.allow();
        for logstore in all.logstores() {
            for refused in [try_put(logstore, "x"), try_texts(logstore).map(drop)] {
                let Err(error @ Error::KeyringNotRead { .. }) = refused else {
                    panic!("{refused:?}")
                };
                assert_eq!((error.kind(), error.code()), (kind, "keyring_not_read"));
                assert!(error.to_string().contains(text), "{error}");
            }
        }
        // Not asked about again and again.
        let asked = all.world.kms.keyrings().len();
        for _ in 0..10 {
            try_put(&all.service, "x").unwrap_err();
        }
        assert_eq!(all.world.kms.keyrings().len(), asked);
        write_private(&all.world.keyring(), &whole);
        all.pass_a_period();
        assert_eq!(texts(&all.service), ["first", "buffered"]);
        all.assert_works();
        assert_eq!(events(&all.service_records()), [Revoked, Recovered]);
    }
}

/// Another keyring of the same names, and an older one, do not take the place of the one that was
/// wiped.
#[test]
fn only_the_keyring_that_was_wiped_comes_back() {
    let all = Leased::manual();
    let old = fs::read(all.world.keyring()).unwrap();
    all.store.keys().rotate_service_key().unwrap();
    let whole = fs::read(all.world.keyring()).unwrap();
    all.refuse();
    write_private(&all.world.keyring(), &old);
    all.allow();
    let refused = try_put(&all.service, "x").unwrap_err();
    assert_eq!((refused.kind(), refused.code()), (ErrorKind::Integrity, "keyring_not_read"));
    assert!(refused.to_string().contains("generation 1"), "{refused}");
    write_private(&all.world.keyring(), &whole);
    all.pass_a_period();
    all.assert_works();
}

/// The operator may put the keyring under another master key while the old one is refused, with a
/// copy of the store's keyring and another process.
#[test]
fn a_keyring_file_under_another_master_key_ends_a_refusal() {
    let all = Leased::manual();
    let whole = fs::read(all.world.keyring()).unwrap();
    let other = all.world.cmk();
    all.store.keys().rewrap_keyring(Some(other.clone())).unwrap();
    let moved = fs::read(all.world.keyring()).unwrap();
    all.store.keys().rewrap_keyring(Some(all.cmk.clone())).unwrap();
    let here = fs::read(all.world.keyring()).unwrap();
    all.world.kms.answer_for_master_key(&all.cmk.cmk_key_id, Answer::Revoked(Disabled));
    all.pass(31);
    all.assert_refused();
    // Another copy under the same master key is refused as well.
    for (bytes, works) in [(&whole, false), (&here, false), (&moved, true)] {
        write_private(&all.world.keyring(), bytes);
        all.pass(31);
        assert_eq!(try_put(&all.service, "maybe").is_ok(), works);
    }
    all.assert_works();
    assert_eq!(all.store.keys().service_cmk(), Some(other.clone()));
    // It is leased under that key.
    all.world.kms.answer_for_master_key(&other.cmk_key_id, Answer::Revoked(Disabled));
    all.pass(31);
    all.assert_refused();
    all.world.kms.answer(Answer::Real);
    all.pass(31);
    all.assert_works();
    assert_eq!(events(&all.service_records()), [Revoked, Recovered, Revoked, Recovered]);
}

// ---- readers in other processes ----

#[test]
fn a_read_only_opener_has_the_lease_too() {
    let all = Leased::manual();
    let reader = all.world.builder().open_read_only().unwrap();
    let logstore = reader.logstore(&name("p/service")).unwrap();
    let mut open = logstore.read(0, &ReadOptions::default()).unwrap();
    assert_eq!(texts(&logstore), ["first"]);
    let pass = || {
        all.pass_a_period();
        reader.tick();
    };
    all.answer(Answer::Revoked(Disabled));
    pass();
    assert_refused(open.next().unwrap());
    assert_refused(try_texts(&logstore));
    assert_refused(reader.list());
    assert_refused(reader.logstore(&name("p/byok")).map(drop));
    assert_refused(reader.keys().audit_records());
    assert_eq!(reader.keys().service_key_status().state, KeyState::Revoked { reason: Disabled });
    let before = events(&records_of_allowed(&all, &pass));
    assert_eq!(texts(&logstore), ["first"]);
    assert_eq!(reader.list().unwrap().len(), 3);
    // The reader writes nothing: the records are the writer's.
    assert_eq!(before.iter().filter(|event| **event == Recovered).count(), 1);
    all.assert_works();
}

/// Allows the key, and returns the records of the writer.
fn records_of_allowed(all: &Leased, pass: &dyn Fn()) -> Vec<AuditRecord> {
    all.answer(Answer::Real);
    pass();
    all.service_records()
}

/// A reader follows the keyring of its writer to another master key: when it is used, and when the
/// old master key is refused before that.
#[test]
fn a_read_only_opener_follows_another_master_key() {
    for used in [true, false] {
        let all = Leased::manual();
        let reader = all.world.builder().open_read_only().unwrap();
        let logstore = reader.logstore(&name("p/service")).unwrap();
        let (old, other) = (&all.cmk, all.world.cmk());
        all.store.keys().rewrap_keyring(Some(other.clone())).unwrap();
        if used {
            all.world.clock.advance(secs(30));
            assert_eq!(texts(&logstore), ["first"]);
            assert_eq!(reader.keys().service_cmk(), Some(other.clone()));
        }
        all.world.kms.answer_for_master_key(&old.cmk_key_id, Answer::Revoked(Disabled));
        for _ in 0..3 {
            all.world.clock.advance(secs(30));
            reader.tick();
        }
        assert_eq!(texts(&logstore), ["first"], "used before: {used}");
        assert_eq!(reader.keys().service_cmk(), Some(other.clone()));
        all.world.kms.answer_for_master_key(&other.cmk_key_id, Answer::Revoked(Disabled));
        all.world.clock.advance(secs(31));
        assert_refused(try_texts(&logstore));
        // And to none.
        all.world.kms.answer(Answer::Real);
        all.pass_a_period();
        all.store.keys().rewrap_keyring(None).unwrap();
        all.world.kms.answer(Answer::Revoked(Disabled));
        for _ in 0..2 {
            all.world.clock.advance(secs(31));
            reader.tick();
        }
        assert_eq!(texts(&logstore), ["first"]);
        assert_eq!(reader.keys().service_cmk(), None);
    }
}

// ---- threads ----

/// Short periods, in real time.
fn quick() -> World {
    let mut world = World::threads();
    world.options.revalidate_every = millis(100);
    world.options.kms_timeout = millis(600);
    world.options.outage_grace = millis(2000);
    world
}

#[test]
fn threads_notice_a_refusal_and_a_return_by_themselves() {
    let all = Leased::new(quick());
    let sealed = |logstore: &Logstore| {
        let path = segments(&all.world.logstore_dir(logstore), 0).remove(0);
        fs::read(path).unwrap().ends_with(b"SEAL")
    };
    all.answer(Answer::Revoked(Disabled));
    // No operation drives it.
    eventually("the segments are sealed", || all.logstores().iter().all(|it| sealed(it)));
    assert_refused(try_put(&all.service, "refused"));
    let asked = all.world.kms.keyrings().len();
    eventually("it is asked again", || all.world.kms.keyrings().len() > asked + 3);
    all.answer(Answer::Real);
    eventually("the return is on record", || {
        let records = all.store.keys().audit_records().unwrap_or_default();
        records.last().is_some_and(|record| record.event == Recovered)
    });
    all.assert_works();
    assert_eq!(events(&all.service_records()), [Revoked, Recovered]);
    all.store.close().unwrap();
}

/// Appends, readers and administration run while the KMS refuses and allows the key.
#[test]
fn nothing_acknowledged_is_lost_while_the_key_toggles() {
    let world = quick();
    let cmk = world.cmk();
    let store = world.builder().service_cmk(cmk).create().unwrap();
    let logstores =
        [world.service(&store, "p/service"), world.byok(&store, "p/byok", &world.cmk())];
    let stop = AtomicBool::new(false);
    let running = || !stop.load(Ordering::SeqCst);
    let fits = |error: &Error| matches!(error, Error::ServiceKey { .. });
    let (acknowledged, tried, done) = thread::scope(|scope| {
        let writers: Vec<_> = (0..4)
            .map(|n| {
                let logstore = &logstores[n % 2];
                scope.spawn(move || {
                    let mut acknowledged = Vec::new();
                    for count in 0.. {
                        if !running() {
                            break;
                        }
                        let text = format!("{n} {count}");
                        let options = [synced(), written(), buffered()][count % 3];
                        match logstore.append(record(&text), &options) {
                            Ok(_) => acknowledged.push((text, options.durability)),
                            Err(error) => assert!(fits(&error), "{error:?}"),
                        }
                    }
                    (n % 2, acknowledged)
                })
            })
            .collect();
        let readers: Vec<_> = (0..2)
            .map(|n| {
                let logstore = &logstores[n];
                scope.spawn(move || {
                    let mut refused = 0;
                    while running() {
                        match try_texts(logstore) {
                            Ok(_) => {}
                            Err(error) => {
                                assert!(fits(&error), "{error:?}");
                                refused += 1;
                            }
                        }
                    }
                    refused
                })
            })
            .collect();
        let admin = scope.spawn(|| {
            let mut done = 0;
            for count in 0.. {
                if !running() {
                    break;
                }
                let new = name(&format!("p/new{count}"));
                let operations: [Result<()>; 5] = [
                    store.create_logstore(&new, LogstoreSpec::default()).map(drop),
                    store.keys().rotate_data_key(logstores[count % 2].name()).map(drop),
                    store.delete_logstore(&new).map(drop),
                    store.admin().checkpoint().map(drop),
                    store.keys().rotate_service_key().map(drop),
                ];
                for result in operations {
                    match result {
                        Ok(()) => done += 1,
                        Err(error) => assert!(
                            fits(&error)
                                || matches!(
                                    error,
                                    Error::LogstoreMissing(_) | Error::LogstoreExists(_)
                                ),
                            "{error:?}"
                        ),
                    }
                }
            }
            done
        });
        for _ in 0..4 {
            thread::sleep(millis(300));
            world.kms.answer_for_service_key(Answer::Revoked(Disabled));
            eventually("it is refused", || is_refused(&try_put(&logstores[0], "probe")));
            thread::sleep(millis(300));
            world.kms.answer(Answer::Real);
            eventually("it is back", || try_put(&logstores[0], "probe").is_ok());
        }
        stop.store(true, Ordering::SeqCst);
        let acknowledged: Vec<_> = writers.into_iter().map(|it| it.join().unwrap()).collect();
        let refused: u64 = readers.into_iter().map(|it| it.join().unwrap()).sum();
        (acknowledged, refused, admin.join().unwrap())
    });
    assert!(tried > 0 && done > 0, "{tried} reads refused, {done} administrative operations done");
    // Buffered groups that could not be sealed in time are lost, counted and reported.
    for logstore in &logstores {
        match logstore.sync() {
            Err(Error::GroupsLost { .. }) => logstore.sync().unwrap(),
            synced => synced.unwrap(),
        }
    }
    let found = logstores.each_ref().map(texts);
    let mut missing = 0;
    for (at, acknowledged) in &acknowledged {
        assert!(!acknowledged.is_empty());
        let mut rest = &found[*at][..];
        for (text, durability) in acknowledged {
            match rest.iter().position(|it| it == text) {
                Some(place) => rest = &rest[place + 1..],
                None => {
                    assert_eq!(*durability, Durability::Buffered, "{text} is there, in its order");
                    missing += 1;
                }
            }
        }
    }
    assert_eq!(missing, store.metrics().groups_lost);
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.is_clean() && report.refused.is_empty(), "{report:?}");
    store.close().unwrap();
    let store = world.open();
    for (logstore, found) in logstores.iter().zip(found) {
        assert_eq!(texts(&store.logstore(logstore.name()).unwrap()), found);
    }
}

/// A KMS that hangs is an outage: it delays nobody before the grace has passed.
#[test]
fn a_kms_that_hangs_is_an_outage() {
    let mut world = quick();
    // Much longer than the loop below, which a busy machine may stretch.
    world.options.service_outage_grace = secs(4);
    let all = Leased::new(world);
    all.answer(Answer::Hang);
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    while began.elapsed() < millis(1500) {
        let before = Instant::now();
        put(&all.service, "riding");
        slowest = slowest.max(before.elapsed());
    }
    assert!(slowest < secs(5), "{slowest:?}");
    eventually("it is closed", || {
        matches!(
            try_put(&all.service, "x"),
            Err(Error::ServiceKey { cause: KmsError::Unreachable { .. }, .. })
        )
    });
    assert!(began.elapsed() >= millis(1600), "{:?}", began.elapsed());
    all.answer(Answer::Real);
    eventually("it is back", || try_put(&all.service, "x").is_ok());
    eventually("and all of it", || {
        all.logstores().iter().all(|logstore| try_put(logstore, "x").is_ok())
    });
}

#[test]
fn closing_ends_while_the_key_is_refused() {
    let all = Leased::new(quick());
    all.answer(Answer::Revoked(Disabled));
    eventually("it is refused", || is_refused(&try_put(&all.service, "x")));
    let Leased { world, store, service, plain, byok, .. } = all;
    let began = Instant::now();
    assert_refused(store.close());
    assert!(began.elapsed() < secs(5));
    assert!(matches!(try_put(&service, "x"), Err(Error::Closed(_) | Error::ServiceKey { .. })));
    drop((service, plain, byok));
    world.kms.answer(Answer::Real);
    assert_eq!(texts(&world.open().logstore(&name("p/plain")).unwrap()), ["first"]);
}
