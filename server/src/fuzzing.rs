//! Internal functions for the fuzz targets in `fuzz/`. They exist only under `--cfg fuzzing`, which
//! fuzzers set.

#![allow(missing_docs)]

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use envelog::Store;
use hyper_util::server::graceful::GracefulShutdown;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    join,
    sync::watch,
    time::timeout,
};

use crate::{
    Server,
    auth::AccessKeys,
    server::{ServeError, http, open},
    service::Service,
};

/// Room for any request, and for most answers.
const PIPE_BYTES: usize = 1 << 20;

/// The service stops when a call takes longer. The tail of the console ends only then.
const CALL_TIME_MAX: Duration = Duration::from_secs(120);

/// A service without a listener.
#[derive(Debug)]
pub struct Fuzzed {
    service: Arc<Service>,
    stopping: watch::Sender<bool>,
}

impl Fuzzed {
    /// # Errors
    /// As [`Server::run`].
    pub fn new(
        store: Store,
        state_dir: PathBuf,
        access_keys: Option<PathBuf>,
    ) -> Result<Self, ServeError> {
        let settings = Server::builder().state_dir(state_dir);
        let keys = access_keys.map(|path| AccessKeys::load(&path)).transpose()?;
        let (stopping, is_stopping) = watch::channel(false);
        let service = open(&settings, keys, store, std::time::SystemTime::now(), is_stopping)?;
        Ok(Self { service: Arc::new(service), stopping })
    }

    /// Answers the bytes of a connection, behind which the client waits. Needs a runtime whose time
    /// is paused: the service closes the connection when its patience ends.
    pub async fn answer(&self, request: &[u8]) -> Vec<u8> {
        let (mut client, connection) = duplex(PIPE_BYTES);
        let peer = SocketAddr::from(([127, 0, 0, 1], 1));
        // Connections end when this is dropped.
        let graceful = GracefulShutdown::new();
        let served = http(Arc::clone(&self.service), connection, peer, graceful.watcher());
        let exchanged = async {
            // The service may close the connection early.
            let _ = client.write_all(request).await;
            let mut answer = Vec::new();
            if timeout(CALL_TIME_MAX, client.read_to_end(&mut answer)).await.is_err() {
                self.stopping.send_replace(true);
                let _ = client.read_to_end(&mut answer).await;
            }
            answer
        };
        let (_, answer) = join!(served, exchanged);
        self.stopping.send_replace(false);
        answer
    }
}
