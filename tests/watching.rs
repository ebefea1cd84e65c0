//! Monitoring of a store: its counters and its log events.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "common/traced.rs"]
mod traced;

use std::sync::Arc;

use common::{
    failing::{FailingDisk, Failure},
    *,
};
use envelog::{
    KeyState, LogstoreSpec, ReadOptions,
    kms::RevokedReason,
    metrics::{LATENCY_BUCKETS_US, StoreMetrics},
};
use traced::Traced;

fn appended(metrics: &StoreMetrics, suite: &str) -> (u64, u64) {
    let of_suite = metrics.bytes.iter().find(|bytes| bytes.suite == suite).unwrap();
    (of_suite.appended, of_suite.read)
}

#[test]
fn the_four_answers_of_a_kms_are_counted_apart() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    let logstore = world.byok(&store, "p/byok", &cmk);
    put(&logstore, "first");
    let before = store.metrics();
    assert!(before.kms.success.count >= 3 && before.kms.revoked.count == 0, "{before:?}");
    assert_eq!(before.leases.len(), 1);
    assert_eq!((&before.leases[0].cmk, &before.leases[0].status.state), (&cmk, &KeyState::Active));
    assert_eq!(before.leases[0].age, Some(secs(0)));
    world.clock.advance(secs(7));
    assert_eq!(store.metrics().leases[0].age, Some(secs(7)));

    world.kms.answer(Answer::Invalid);
    logstore.revalidate_now().unwrap();
    world.kms.answer(Answer::Unreachable);
    logstore.revalidate_now().unwrap();
    logstore.revalidate_now().unwrap();
    world.kms.answer(Answer::Revoked(RevokedReason::PendingDeletion));
    assert!(logstore.revalidate_now().is_err());
    assert!(try_put(&logstore, "refused").is_err());
    let after = store.metrics();
    let calls = |metrics: &StoreMetrics| {
        let kms = metrics.kms;
        [kms.success, kms.revoked, kms.unreachable, kms.invalid].map(|calls| calls.count)
    };
    assert_eq!(calls(&after), [calls(&before)[0], 1, 2, 1]);
    for calls in [after.kms.success, after.kms.revoked, after.kms.unreachable, after.kms.invalid] {
        assert_eq!(calls.histogram.iter().sum::<u64>(), calls.count);
        assert!(calls.max_us <= calls.sum_us || calls.count == 0);
    }
    assert!(after.refusals.pending_deletion >= 2, "{after:?}");
    assert_eq!(
        (after.refusals.disabled, after.refusals.unreachable, after.leases[0].age),
        (0, 0, None)
    );
    let json = serde_json::to_value(&after).unwrap();
    assert_eq!(json["kms"]["unreachable"]["count"], 2);
}

#[test]
fn bytes_syncs_and_failures_are_counted() {
    let world = World::manual();
    let disk = FailingDisk::default();
    let store = world.builder().disk(Arc::new(disk.clone())).create().unwrap();
    let service = world.service(&store, "p/service");
    let plain = store.create_logstore(&name("p/plain"), LogstoreSpec::default()).unwrap();
    for logstore in [&service, &plain] {
        put(logstore, "0123456789");
    }
    let metrics = store.metrics();
    // A record is framed by its tag and length.
    assert_eq!(
        (appended(&metrics, "AES-256-GCM"), appended(&metrics, "AES-256-GMAC")),
        ((12, 0), (12, 0))
    );
    assert_eq!(appended(&metrics, "SM4-GCM"), (0, 0));
    assert_eq!(texts(&service), ["0123456789"]);
    let metrics = store.metrics();
    assert_eq!(
        (appended(&metrics, "AES-256-GCM"), appended(&metrics, "AES-256-GMAC")),
        ((12, 12), (12, 0))
    );
    assert_eq!((metrics.segments_begun, metrics.segments_sealed, metrics.sync_failures), (2, 0, 0));
    assert!(metrics.syncs >= 2 && metrics.audit_records == 2, "{metrics:?}");
    service.roll().unwrap();
    assert_eq!(store.metrics().segments_sealed, 1);

    // The write of the block succeeds, and so does the check of the epoch, which reads the file and
    // its metadata. The sync fails.
    let traced = Traced::default();
    disk.fail_after(3, Failure::Once);
    assert!(traced.while_running(|| try_put(&plain, "lost")).is_err());
    disk.disarm();
    let metrics = store.metrics();
    assert_eq!((metrics.sync_failures, metrics.writers_latched), (1, 1));
    assert!(
        traced.text().contains("ERROR") && traced.text().contains("fsync failed"),
        "{}",
        traced.text()
    );
    assert!(traced.text().contains("shard writer latched"), "{}", traced.text());
    disk.fail_after(0, Failure::Once);
    assert!(store.keys().rotate_data_key(service.name()).is_err());
    disk.disarm();
    assert_eq!(store.metrics().audit_failures, 1);
}

#[test]
fn latencies_and_queues_are_measured() {
    let world = World::manual();
    let store = world.create();
    let logstores = ["p/a", "p/b"].map(|text| world.service(&store, text));
    for n in 0..3 {
        logstores[0].append(record(&format!("{n}")), &buffered()).unwrap();
    }
    put(&logstores[1], "0123456789");
    let metrics = store.metrics();
    assert!(metrics.pending_bytes > 0);
    let figures = |metrics: &StoreMetrics| -> Vec<(String, [u64; 4])> {
        let of = |it: &envelog::metrics::LogstoreMetrics| {
            (it.name.to_string(), [it.groups, it.bytes, it.queued_groups, it.queued_bytes])
        };
        metrics.logstores.iter().map(of).collect()
    };
    let expected = |a| vec![("p/a".to_owned(), a), ("p/b".to_owned(), [1, 10, 0, 0])];
    assert_eq!(figures(&metrics), expected([0, 0, 3, 3]));
    assert_eq!((metrics.append_latency.count, metrics.sync_latency.count), (1, metrics.syncs));
    world.clock.advance(millis(100));
    store.tick();
    let metrics = store.metrics();
    assert_eq!(figures(&metrics), expected([3, 3, 0, 0]));
    assert_eq!(metrics.pending_bytes, 0);
    // By the clock of the test, these three took exactly 100 ms each, and the other one no time.
    let appends = metrics.append_latency;
    assert_eq!((appends.count, appends.sum_us), (4, 300_000));
    let bucket = |bound| LATENCY_BUCKETS_US.iter().position(|it| *it == bound).unwrap();
    assert_eq!((appends.histogram[0], appends.histogram[bucket(100_000)]), (1, 3));
}

#[test]
fn reads_and_refusals_are_counted_by_logstore() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    let (mine, other) = (world.byok(&store, "p/mine", &cmk), world.service(&store, "p/other"));
    put(&mine, "0123456789");
    put(&other, "0123456789");
    assert_eq!(mine.read(0, &ReadOptions::default()).unwrap().count(), 1);
    world.kms.answer(Answer::Revoked(RevokedReason::Disabled));
    assert!(mine.revalidate_now().is_err());
    assert!(try_put(&mine, "refused").is_err());
    let metrics = store.metrics();
    let figures: Vec<_> = metrics.logstores.iter().map(|it| (it.bytes_read, it.refusals)).collect();
    let read: u64 = metrics.bytes.iter().map(|it| it.read).sum();
    assert!(read > 10 && metrics.refusals.disabled > 0, "{metrics:?}");
    assert_eq!(figures, [(read, metrics.refusals.disabled), (0, 0)]);
}

#[cfg(feature = "prometheus")]
#[test]
fn metrics_are_text_for_prometheus() {
    let world = World::manual();
    let cmk = world.cmk();
    let store = world.create();
    let logstore = world.byok(&store, "p/byok", &cmk);
    put(&logstore, "0123456789");
    logstore.append(record("waits"), &buffered()).unwrap();
    world.kms.answer(Answer::Revoked(RevokedReason::Disabled));
    assert!(logstore.revalidate_now().is_err());
    let text = store.metrics().to_prometheus();
    let key = &cmk.cmk_key_id;
    for line in [
        "# TYPE envelog_append_seconds histogram".to_owned(),
        "envelog_append_seconds_bucket{le=\"+Inf\"} 2".to_owned(),
        "envelog_kms_call_seconds_count{outcome=\"revoked\"} 1".to_owned(),
        "envelog_logstore_groups_total{logstore=\"p/byok\"} 2".to_owned(),
        "envelog_logstore_key_usable{logstore=\"p/byok\"} 0.0".to_owned(),
        "envelog_logstore_read_bytes_total{logstore=\"p/byok\"} 0".to_owned(),
        "envelog_logstore_refusals_total{logstore=\"p/byok\"} 1".to_owned(),
        "envelog_groups_lost_total 0".to_owned(),
        format!("envelog_lease_usable{{cmk=\"{key}\",region=\"cn-hangzhou\",of=\"shared\"}} 0.0"),
    ] {
        assert!(text.lines().any(|found| found == line), "no line {line} in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn spans_surround_the_expensive_steps() {
    let world = World::manual();
    let traced = Traced::default();
    traced.while_running_with_spans(|| {
        let store = world.create();
        let logstore = world.byok(&store, "p/byok", &world.cmk());
        put(&logstore, "first");
        store.close().unwrap();
    });
    let text = traced.text();
    for span in ["kms_call{kms=", "append{logstore=p/byok shard=0 from=0 to=1}", "fsync{", "seal{"]
    {
        assert!(text.contains(span), "no span {span}: {text}");
    }
}

/// Events report the whole life of a key, in order, and no single append or read.
#[test]
fn what_happens_to_keys_is_said_and_appends_are_silent() {
    let world = World::manual();
    let cmk = world.cmk();
    let traced = Traced::default();
    traced.while_running(|| {
        let store = world.create();
        let logstore = world.byok(&store, "p/byok", &cmk);
        put(&logstore, "first");
        // The lines about the first answer of the KMS come with the next operation.
        put(&logstore, "second");
        let lines = traced.text().lines().count();
        for n in 0..100 {
            put(&logstore, &format!("number {n}"));
        }
        assert_eq!(texts(&logstore).len(), 102);
        let text = traced.text();
        assert!(text.lines().count() <= lines + 2, "appends and reads are traced: {text}");
        store.keys().rotate_data_key(logstore.name()).unwrap();
        put(&logstore, "under the new key");
        for answer in [Answer::Unreachable, Answer::Revoked(RevokedReason::Disabled), Answer::Real]
        {
            world.kms.answer(answer);
            world.clock.advance(secs(40));
            store.tick();
        }
        put(&logstore, "last");
        store.close().unwrap();
    });
    let text = traced.text();
    let mut rest = &text[..];
    for said in [
        "store opened",
        "KMS call succeeded",
        "segment begun",
        "RotateIntended",
        "Rotated",
        "KMS unreachable",
        "master key refused",
        "segment sealed",
        "Revoked",
        "lease renewed after refusal",
        "Recovered",
        "store closed",
    ] {
        let at = rest
            .find(said)
            .unwrap_or_else(|| panic!("\"{said}\" is not said, or too early: {text}"));
        rest = &rest[at..];
    }
    assert!(
        text.contains("outcome=\"unreachable\"") && text.contains("outcome=\"revoked\""),
        "{text}"
    );
}
