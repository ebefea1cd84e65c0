//! What the engine says of itself.

use std::{
    io,
    sync::{Arc, Mutex, Once},
};

use tracing_subscriber::layer::SubscriberExt;

/// Everything that is traced, as text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Traced(Arc<Mutex<Vec<u8>>>);

impl Traced {
    /// Traces at every level while `act` runs, in this thread.
    pub(crate) fn while_running<T>(&self, act: impl FnOnce() -> T) -> T {
        // As long as there is a subscriber for everything, no place is switched off because another test had none just then.
        static ON: Once = Once::new();
        ON.call_once(|| tracing::subscriber::set_global_default(tracing_subscriber::registry()).unwrap());
        let traced = self.clone();
        let layer = tracing_subscriber::fmt::layer().with_ansi(false).with_writer(move || traced.clone());
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
