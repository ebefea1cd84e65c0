//! `serve`.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use envelog::Store;
use envelog_server::{ServeError, Server};
use serde_json::json;
use tokio::{runtime::Builder, time::sleep};

use crate::{
    args::ServeArgs,
    exit::{Failure, Result, Status, both},
    interrupt, output,
    remote::Host,
    setup::Setup,
};

/// How often to look whether a signal has come.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// How long calls that block may go on when the service has stopped.
const LAST_CALLS: Duration = Duration::from_secs(5);

pub(crate) fn run(setup: &Setup, args: &ServeArgs) -> Result {
    interrupt::defer()?;
    // Refuse everything that needs no store to check before creating one.
    let server = listen(setup, args)?;
    let new_store = !setup.keyring.exists();
    let store = setup.builder().open_or_create()?;
    if new_store {
        setup.notice(format_args!(
            "created the keyring {}: keep a copy of it elsewhere, nothing can be read without it",
            output::path(&setup.keyring)
        ));
    }
    if !server.has_access_keys() {
        setup.notice(
            "there are no access keys: every program on this machine may do everything; give --access-keys FILE",
        );
    }
    let served = tell(setup, server.local_addr(), args).and_then(|()| serve(server, &store));
    both(served, setup.close(store))
}

fn listen(setup: &Setup, args: &ServeArgs) -> Result<Server> {
    if let Some(dir) = args.backup_dir.as_deref().filter(|dir| !dir.is_dir()) {
        let message = format!("--backup-dir {} is not a directory", dir.display());
        return Err(Failure::usage(message));
    }
    let host = Host::new(setup.clone(), args.backup_dir.clone());
    let mut builder = Server::builder()
        .administration(Arc::new(host))
        .plain_http(args.plain_http.unwrap_or(false))
        .base_host(&args.base_host)
        .region(&args.region);
    if let Some(keys) = &args.access_keys {
        builder = builder.access_keys(keys);
    }
    match (&args.tls_cert, &args.tls_key) {
        (Some(certificate), Some(key)) => builder = builder.tls(certificate, key),
        (None, None) => {}
        _ => return Err(Failure::usage("--tls-cert and --tls-key are given together")),
    }
    Ok(builder.bind(args.listen)?)
}

/// Serves until a signal comes.
fn serve(server: Server, store: &Store) -> Result {
    let runtime = Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::other(format!("cannot start threads: {error}")))?;
    let signal = async {
        while !interrupt::asked() {
            sleep(LOOK_EVERY).await;
        }
    };
    let served = runtime.block_on(server.run(store.clone(), signal));
    runtime.shutdown_timeout(LAST_CALLS);
    Ok(served?)
}

/// Prints the address, which a port of 0 has the system choose.
fn tell(setup: &Setup, address: SocketAddr, args: &ServeArgs) -> Result {
    let scheme = if args.tls_cert.is_some() { "https" } else { "http" };
    if setup.json {
        let secured = args.access_keys.is_some();
        return output::json(&json!({
            "address": address,
            "endpoint": format!("{scheme}://{}:{}", args.base_host, address.port()),
            "access_keys": secured,
        }));
    }
    output::line(format_args!("listening on {scheme}://{address}"))
}

impl From<ServeError> for Failure {
    fn from(error: ServeError) -> Self {
        let message = error.to_string();
        match error {
            ServeError::Engine(error) => error.into(),
            ServeError::Open(_) | ServeError::Setting(_) => Self::usage(message),
            ServeError::Keys(_) => Self::new(Status::Refused, "access_keys", message),
            ServeError::Tls(_) => Self::new(Status::Refused, "certificate", message),
            ServeError::Listen { .. } => Self::new(Status::Unavailable, "listen", message),
            _ => Self::other(message),
        }
    }
}
