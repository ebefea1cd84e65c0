//! The metrics of a store as text for Prometheus.

use std::fmt::Error;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, NoLabelSet, text},
    metrics::MetricType,
    registry::Registry,
};

use super::{KMS_LATENCY_BUCKETS_MS, KmsCalls, LATENCY_BUCKETS_US, LatencyMetrics, StoreMetrics};
use crate::key_status::{KeyState, KeyStatus};

impl StoreMetrics {
    /// The metrics in the text format of OpenMetrics 1.0, which Prometheus scrapes. Every name
    /// begins with `envelog_`; times are in seconds, and sizes in bytes. Serve it as
    /// [`PROMETHEUS_CONTENT_TYPE`](super::PROMETHEUS_CONTENT_TYPE).
    ///
    /// The label `of` of a lease says who shares it: `shared` for all Logstores under the master key,
    /// `service_key`, or the id of one Logstore.
    pub fn to_prometheus(&self) -> String {
        let mut registry = Registry::with_prefix("envelog");
        registry.register_collector(Box::new(Figures(self.clone())));
        let mut text = String::new();
        // Writing to a `String` does not fail.
        let _ = text::encode(&mut text, &registry);
        text
    }
}

type Labels<const N: usize> = [(&'static str, String); N];

#[derive(Debug)]
struct Figures(StoreMetrics);

impl Collector for Figures {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let mut out = Encoder(encoder);
        self.keys(&mut out)?;
        self.data(&mut out)?;
        self.logstores(&mut out)
    }
}

impl Figures {
    fn keys(&self, out: &mut Encoder<'_>) -> Result<(), Error> {
        let StoreMetrics { kms, leases, service_lease, refusals, .. } = &self.0;
        let outcomes = [
            ("success", &kms.success),
            ("revoked", &kms.revoked),
            ("unreachable", &kms.unreachable),
            ("invalid", &kms.invalid),
        ];
        let calls =
            outcomes.map(|(word, calls)| ([("outcome", word.to_owned())], kms_calls(calls)));
        out.histograms("kms_call_seconds", "Calls to KMSs, by outcome", &calls)?;
        let refused = [
            ("disabled", refusals.disabled),
            ("pending_deletion", refusals.pending_deletion),
            ("deleted", refusals.deleted),
            ("not_permitted", refusals.not_permitted),
            ("unreachable", refusals.unreachable),
            ("invalid", refusals.invalid),
        ];
        let refused = refused.map(|(reason, count)| ([("reason", reason.to_owned())], count));
        out.counters("refusals", "Refused uses of keys, by reason", &refused)?;

        let of_service = service_lease.iter().map(|lease| (lease, "service_key".to_owned()));
        let of_customers = leases.iter().map(|lease| {
            let logstore = lease.logstore.map_or_else(|| "shared".to_owned(), |id| id.to_string());
            (lease, logstore)
        });
        let leases: Vec<_> = of_customers.chain(of_service).collect();
        let labels = |lease: &super::LeaseMetrics, of: &str| -> Labels<3> {
            [
                ("cmk", lease.cmk.cmk_key_id.clone()),
                ("region", lease.cmk.region_id.clone()),
                ("of", of.to_owned()),
            ]
        };
        let usable: Vec<_> = leases
            .iter()
            .map(|(lease, of)| (labels(lease, of), f64::from(u8::from(is_usable(&lease.status)))))
            .collect();
        out.gauges("lease_usable", "1 if the lease admits operations, otherwise 0", &usable)?;
        let left: Vec<_> = leases
            .iter()
            .filter_map(|(lease, of)| {
                Some((labels(lease, of), lease.status.lease_left?.as_secs_f64()))
            })
            .collect();
        out.gauges("lease_left_seconds", "The time left in the lease", &left)
    }

    fn data(&self, out: &mut Encoder<'_>) -> Result<(), Error> {
        let metrics = &self.0;
        let suite = |suite: &str| [("suite", suite.to_owned())];
        let appended: Vec<_> =
            metrics.bytes.iter().map(|bytes| (suite(bytes.suite), bytes.appended)).collect();
        out.counters("appended_bytes", "Bytes of groups written, before compression", &appended)?;
        let read: Vec<_> =
            metrics.bytes.iter().map(|bytes| (suite(bytes.suite), bytes.read)).collect();
        out.counters("read_bytes", "Bytes of groups read, after decompression", &read)?;
        let none: Labels<0> = [];
        let appends = latency(&metrics.append_latency);
        out.histograms("append_seconds", "From submission to written", &[(none.clone(), appends)])?;
        let syncs = latency(&metrics.sync_latency);
        out.histograms("sync_seconds", "Syncs of segments", &[(none.clone(), syncs)])?;
        let pending = [(none.clone(), metrics.pending_bytes as f64)];
        out.gauges("pending_bytes", "The used part of the memory budget", &pending)?;
        for (name, help, count) in [
            ("segments_begun", "Segments begun", metrics.segments_begun),
            ("segments_sealed", "Segments sealed", metrics.segments_sealed),
            ("sync_failures", "Syncs of segments that failed", metrics.sync_failures),
            (
                "writers_latched",
                "Failures that stopped the writer of a shard",
                metrics.writers_latched,
            ),
            (
                "groups_lost",
                "Acknowledged groups that were lost with their key",
                metrics.groups_lost,
            ),
            ("anchor_failures", "Failed updates of the anchor", metrics.anchor_failures),
            ("audit_records", "Records written to the key audit log", metrics.audit_records),
            ("audit_failures", "Records that could not be written", metrics.audit_failures),
            ("audit_left_out", "Key transitions that the audit log omits", metrics.audit_left_out),
        ] {
            out.counters(name, help, &[(none.clone(), count)])?;
        }
        let suspended = f64::from(u8::from(metrics.retention_suspended));
        let help = "1 if retention by age is suspended, otherwise 0";
        out.gauges("retention_suspended", help, &[(none.clone(), suspended)])?;
        let short = f64::from(u8::from(metrics.reserve_short));
        let help = "1 if a part of the room for a full disk is missing, otherwise 0";
        out.gauges("reserve_short", help, &[(none, short)])
    }

    fn logstores(&self, out: &mut Encoder<'_>) -> Result<(), Error> {
        let logstores = &self.0.logstores;
        let name = |it: &super::LogstoreMetrics| [("logstore", it.name.to_string())];
        let groups: Vec<_> = logstores.iter().map(|it| (name(it), it.groups)).collect();
        out.counters("logstore_groups", "Groups written", &groups)?;
        let bytes: Vec<_> = logstores.iter().map(|it| (name(it), it.bytes)).collect();
        out.counters("logstore_bytes", "Bytes of groups written, before compression", &bytes)?;
        let read: Vec<_> = logstores.iter().map(|it| (name(it), it.bytes_read)).collect();
        out.counters("logstore_read_bytes", "Bytes of groups read, after decompression", &read)?;
        let refused: Vec<_> = logstores.iter().map(|it| (name(it), it.refusals)).collect();
        out.counters("logstore_refusals", "Refused uses of the key", &refused)?;
        let queued: Vec<_> =
            logstores.iter().map(|it| (name(it), it.queued_groups as f64)).collect();
        out.gauges("logstore_queued_groups", "Groups that wait to be written", &queued)?;
        let queued: Vec<_> =
            logstores.iter().map(|it| (name(it), it.queued_bytes as f64)).collect();
        out.gauges("logstore_queued_bytes", "Bytes of the groups that wait", &queued)?;
        let usable: Vec<_> = logstores
            .iter()
            .map(|it| (name(it), f64::from(u8::from(is_usable(&it.key)))))
            .collect();
        out.gauges("logstore_key_usable", "1 if the key may be used, otherwise 0", &usable)
    }
}

/// Whether operations are admitted. An outage admits them until the lease ends.
fn is_usable(status: &KeyStatus) -> bool {
    match &status.state {
        KeyState::Revoked { .. } => false,
        KeyState::Outage { .. } => status.lease_left.is_some_and(|left| !left.is_zero()),
        KeyState::None | KeyState::Active | KeyState::Idle => true,
    }
}

/// A histogram: the sum in seconds, and the count of each bucket with its upper bound.
struct Histogram {
    sum_s: f64,
    buckets: Vec<(f64, u64)>,
}

impl Histogram {
    fn new(sum_us: u64, bounds_s: impl Iterator<Item = f64>, counts: &[u64]) -> Self {
        let bounds = bounds_s.chain([f64::INFINITY]);
        let buckets = bounds.zip(counts.iter().copied()).collect();
        Self { sum_s: sum_us as f64 / 1e6, buckets }
    }
}

fn kms_calls(calls: &KmsCalls) -> Histogram {
    let bounds = KMS_LATENCY_BUCKETS_MS.iter().map(|&ms| ms as f64 / 1e3);
    Histogram::new(calls.sum_us, bounds, &calls.histogram)
}

fn latency(latency: &LatencyMetrics) -> Histogram {
    let bounds = LATENCY_BUCKETS_US.iter().map(|&us| us as f64 / 1e6);
    Histogram::new(latency.sum_us, bounds, &latency.histogram)
}

/// Writes metrics, each with one value for each set of labels.
struct Encoder<'a>(DescriptorEncoder<'a>);

impl Encoder<'_> {
    fn counters<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: &[(Labels<N>, u64)],
    ) -> Result<(), Error> {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        values.iter().try_for_each(|(labels, value)| {
            metric.encode_family(labels)?.encode_counter::<NoLabelSet, _, u64>(value, None)
        })
    }

    fn gauges<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: &[(Labels<N>, f64)],
    ) -> Result<(), Error> {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Gauge)?;
        values
            .iter()
            .try_for_each(|(labels, value)| metric.encode_family(labels)?.encode_gauge(value))
    }

    fn histograms<const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        values: &[(Labels<N>, Histogram)],
    ) -> Result<(), Error> {
        let mut metric = self.0.encode_descriptor(name, help, None, MetricType::Histogram)?;
        values.iter().try_for_each(|(labels, Histogram { sum_s, buckets })| {
            let count = buckets.iter().map(|(_, count)| count).sum();
            let mut of_labels = metric.encode_family(labels)?;
            of_labels.encode_histogram::<NoLabelSet>(*sum_s, count, buckets, None)
        })
    }
}
