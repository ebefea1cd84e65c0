//! A Logstore under a customer's key. It is written, refused while the customer disables the key,
//! and available again when the customer enables it.
//!
//! `cargo run --example byok`

use std::sync::Arc;

use envelog::{
    AppendOptions, Cmk, EncryptConf, EncryptType, Error, LogstoreSpec, Payload, ReadOptions, Store,
    crypto::RustCrypto, kms::LocalKms,
};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;

    // The customer's side: a master key, and a role that may use it.
    let kms = LocalKms::create_or_open(dir.path().join("customer-kms"))?;
    let role = "acs:ram::13234:role/logsource";
    let cmk_key_id = kms.create_key("cn-hangzhou", &[role])?;

    // The service's side.
    let store =
        Store::builder(dir.path().join("store"), dir.path().join("keyring"), RustCrypto::new())
            .kms(Arc::new(kms.clone()))
            .create()?;
    let cmk = Cmk {
        cmk_key_id: cmk_key_id.clone(),
        arn: role.to_owned(),
        region_id: "cn-hangzhou".to_owned(),
    };
    let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::byok(EncryptType::Sm4, cmk));
    let logstore = store.create_logstore(&"shop/payments".parse()?, spec)?;
    logstore.append(Payload::opaque("paid 12.50")?, &AppendOptions::default())?;

    // The customer disables the key. The engine refuses everything within `revalidate_every`;
    // `revalidate_now` makes it refuse at once.
    kms.disable(&cmk_key_id)?;
    match logstore.revalidate_now() {
        Err(Error::Revoked { reason, .. }) => println!("refused: the key is {reason}"),
        other => return Err(format!("expected a refusal, got {other:?}").into()),
    }

    kms.enable(&cmk_key_id)?;
    logstore.revalidate_now()?;
    for record in logstore.read(0, &ReadOptions::default())? {
        println!("{}", String::from_utf8_lossy(&record?.bytes));
    }
    store.close()?;
    Ok(())
}
