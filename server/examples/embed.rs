//! The shortest log service: the SDKs of Alibaba Cloud SLS write to it and read from it, and each
//! Logstore can be under the master key of its customer.
//!
//! ```sh
//! cargo run --package envelog-server --example embed -- DIR
//! ```

use std::{error::Error, fs, future::Future, net::SocketAddr, path::Path, sync::Arc};

use envelog::{Store, crypto::AwsLc, kms::LocalKms};
use envelog_server::Server;
use tokio::{runtime::Builder, signal::ctrl_c};

type Done = Result<(), Box<dyn Error + Send + Sync>>;

fn main() -> Done {
    let dir = std::env::args_os().nth(1).ok_or("give a directory")?;
    let tell = |address| println!("listening on http://{address}, until Ctrl+C");
    serve(dir.as_ref(), "127.0.0.1:8099".parse()?, tell, async { drop(ctrl_c().await) })
}

/// Serves the store in a directory until `stop` is ready.
pub(crate) fn serve(
    dir: &Path,
    address: SocketAddr,
    tell: impl FnOnce(SocketAddr),
    stop: impl Future<Output = ()>,
) -> Done {
    fs::create_dir_all(dir)?;
    // A directory that plays the KMS of the customers.
    let kms = Arc::new(LocalKms::create_or_open(dir.join("kms"))?);
    let builder = Store::builder(dir.join("store"), dir.join("keyring"), AwsLc::new()).kms(kms);
    let store = builder.open_or_create()?;
    // Without access keys it serves this machine alone.
    let server = Server::builder().bind(address)?;
    tell(server.local_addr());
    let runtime = Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(server.run(store.clone(), stop))?;
    Ok(store.close()?)
}
