//! `cargo run -p envelog-examples --bin lines -- STORE ADDRESS`: see [`envelog_examples::lines`].

use std::{error::Error, net::TcpListener};

use envelog::{EncryptConf, EncryptType, LogstoreSpec, Store, crypto::AwsLc};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().unwrap_or_else(|| "envelog-example".to_owned());
    let address = args.next().unwrap_or_else(|| "127.0.0.1:8081".to_owned());
    let store = Store::builder(&dir, format!("{dir}.keyring"), AwsLc::new()).open_or_create()?;
    let name = "app/lines".parse()?;
    let logstore = if store.list()?.contains(&name) {
        store.logstore(&name)?
    } else {
        let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::service_key(EncryptType::Aes));
        store.create_logstore(&name, spec)?
    };
    let listener = TcpListener::bind(&address)?;
    println!("echo a line | nc -N {}", address.replace(':', " "));
    envelog_examples::lines::serve(&listener, &logstore)?;
    Ok(())
}
