//! The engine's log events.

use std::{
    io,
    sync::{Arc, Mutex, Once},
};

use tracing_subscriber::{fmt::format::FmtSpan, layer::SubscriberExt};

/// All log events, as text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Traced(Arc<Mutex<Vec<u8>>>);

impl Traced {
    /// Records events at every level while `act` runs in this thread.
    pub(crate) fn while_running<T>(&self, act: impl FnOnce() -> T) -> T {
        self.recording(FmtSpan::NONE, act)
    }

    /// As [`Traced::while_running`], and the end of each span.
    #[allow(dead_code)]
    pub(crate) fn while_running_with_spans<T>(&self, act: impl FnOnce() -> T) -> T {
        self.recording(FmtSpan::CLOSE, act)
    }

    fn recording<T>(&self, spans: FmtSpan, act: impl FnOnce() -> T) -> T {
        // Keep a global subscriber for all levels: otherwise a callsite may be cached as disabled
        // while another test has no subscriber.
        static ON: Once = Once::new();
        ON.call_once(|| {
            tracing::subscriber::set_global_default(tracing_subscriber::registry()).unwrap()
        });
        let traced = self.clone();
        let layer = tracing_subscriber::fmt::layer()
            .with_ansi(false)
            .with_span_events(spans)
            .with_writer(move || traced.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), act)
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl io::Write for Traced {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
