//! `cargo run -p envelog-examples --bin web -- STORE ADDRESS`: see [`envelog_examples::web`].

use std::error::Error;

use envelog::{EncryptConf, EncryptType, LogstoreSpec, Store, crypto::AwsLc};

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().unwrap_or_else(|| "envelog-example".to_owned());
    let address = args.next().unwrap_or_else(|| "127.0.0.1:8080".to_owned());
    let store = Store::builder(&dir, format!("{dir}.keyring"), AwsLc::new()).open_or_create()?;
    let name = "app/logs".parse()?;
    if !store.list()?.contains(&name) {
        let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::service_key(EncryptType::Aes));
        store.create_logstore(&name, spec)?;
    }
    let listener = tokio::net::TcpListener::bind(&address).await?;
    println!("curl --data-binary 'a line' http://{address}/{name}");
    let stopped = async { drop(tokio::signal::ctrl_c().await) };
    axum::serve(listener, envelog_examples::web::router(store.clone()))
        .with_graceful_shutdown(stopped)
        .await?;
    store.close()?;
    Ok(())
}
