//! The metrics of the service, behind those of the engine.

use std::{
    fmt::Write,
    sync::atomic::{AtomicU64, Ordering},
};

use hyper::StatusCode;
use serde_json::{Value, json};

use crate::{response::Answer, service::Service};

/// The end of the engine's metrics.
const END: &str = "# EOF\n";

/// Counts requests and connections.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    answered: AtomicU64,
    refused: AtomicU64,
    failed: AtomicU64,
    limited: AtomicU64,
    connections: AtomicU64,
}

/// A connection, as long as it is open.
#[derive(Debug)]
pub(crate) struct Connection<'a>(&'a AtomicU64);

impl Drop for Connection<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Counters {
    pub(crate) fn answered(&self) {
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn refused(&self, status: StatusCode) {
        let counter = if status.is_server_error() { &self.failed } else { &self.refused };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// The counts, for the console.
    pub(crate) fn json(&self) -> Value {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        json!({
            "answered": read(&self.answered),
            "refused": read(&self.refused),
            "failed": read(&self.failed),
            "connections": read(&self.connections),
        })
    }

    /// A call was refused by the limits of its access key.
    pub(crate) fn limited(&self) {
        self.limited.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn connection(&self) -> Connection<'_> {
        self.connections.fetch_add(1, Ordering::Relaxed);
        Connection(&self.connections)
    }
}

/// The metrics as OpenMetrics text.
pub(crate) fn text(service: &Service) -> String {
    let engine = service.store.metrics().to_prometheus();
    let mut text = engine.strip_suffix(END).unwrap_or(&engine).to_owned();
    let counters = &service.counters;
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let mut add = |name: &str, kind: &str, help: &str, value: u64| {
        let sample = if kind == "counter" { "_total" } else { "" };
        // Writing to a string does not fail.
        let _ =
            write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name}{sample} {value}\n");
    };
    add("envelog_serve_requests", "counter", "Calls answered.", read(&counters.answered));
    add(
        "envelog_serve_refused",
        "counter",
        "Calls refused with a status of 4xx.",
        read(&counters.refused),
    );
    add(
        "envelog_serve_failed",
        "counter",
        "Calls failed with a status of 5xx.",
        read(&counters.failed),
    );
    add(
        "envelog_serve_limited",
        "counter",
        "Calls refused by the limits of their access key.",
        read(&counters.limited),
    );
    add("envelog_serve_connections", "gauge", "Open connections.", read(&counters.connections));
    add(
        "envelog_serve_body_bytes",
        "gauge",
        "Memory set aside for bodies.",
        service.memory.taken() as u64,
    );
    text.push_str(END);
    text
}

/// The answer with these metrics.
pub(crate) fn answer(text: String) -> Answer {
    let answer = Answer::text(StatusCode::OK, text);
    answer.with("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")
}
