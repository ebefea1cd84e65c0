//! Input from operators and users: JSON, names, identifiers, URLs, and command-line values.

use envelog::{
    EncryptConf, EncryptType, LogstoreConfig, LogstoreName, LogstoreSpec, Store,
    crypto::Sm4Simd,
    ids::{KeyringId, LogstoreId, StoreId},
    kms,
};

use crate::golden::{DIR, KEYRING, clock, manual};

/// Parses text as each type that the API accepts as text.
pub fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(name) = text.parse::<LogstoreName>() {
        assert_eq!(name.to_string().parse(), Ok(name));
    }
    for id in [
        text.parse::<StoreId>().map(|id| id.to_string()),
        text.parse::<LogstoreId>().map(|id| id.to_string()),
        text.parse::<KeyringId>().map(|id| id.to_string()),
    ]
    .into_iter()
    .flatten()
    {
        assert_eq!(id, text);
    }
    if let Err(error) = kms::from_url(text) {
        drop(error.to_string());
    }
    if let Ok(conf) = EncryptConf::from_json(text) {
        let json = serde_json::to_string(&conf).expect("a configuration serializes");
        assert_eq!(EncryptConf::from_json(&json), Ok(conf.clone()));
        if conf.user_cmk_info.is_none() {
            create_with(conf);
        }
    }
    if let Ok(config) = LogstoreConfig::from_json(text) {
        let json = serde_json::to_string(&config).expect("a configuration serializes");
        assert_eq!(LogstoreConfig::from_json(&json), Ok(config.clone()));
        update_with(&config);
    }
}

fn store() -> Store {
    let disk = crate::common::memory::MemoryDisk::of(&Default::default());
    let builder =
        Store::builder(DIR, KEYRING, Sm4Simd::new()).disk(disk).clock(clock()).options(manual());
    builder.create().expect("a new store in memory")
}

fn create_with(conf: EncryptConf) {
    let name = "project/logstore".parse().expect("a name");
    let spec = LogstoreSpec::default().encrypt_conf(conf);
    store().create_logstore(&name, spec).expect("a configuration that was checked");
}

/// The store accepts a configuration unchanged, or refuses it and changes nothing.
fn update_with(config: &LogstoreConfig) {
    let store = store();
    let name = "project/logstore".parse().expect("a name");
    let spec = LogstoreSpec::default().encrypt_conf(EncryptConf::service_key(EncryptType::Sm4));
    let before = store.create_logstore(&name, spec).expect("a new Logstore").config();
    // The store would always refuse another revision or another name for that reason alone.
    let mut config = config.clone().revision(before.revision);
    config.name = name.clone();
    match store.update_logstore(&name, config) {
        Ok(after) => assert_eq!(after.revision, before.revision + 1),
        Err(error) => {
            drop(error.to_string());
            assert_eq!(store.logstore(&name).expect("it is there").config(), before);
        }
    }
    store.close().expect("nothing was appended");
}

// The parsers of the command line. It is a program, not a library, so the file is included here.
#[allow(dead_code, unreachable_pub)]
#[path = "../../cli/src/values.rs"]
mod command_line;

/// Parses text as each type of value of the command line.
pub fn values(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = command_line::position(text);
    let _ = command_line::switch(text);
    let _ = command_line::count(text);
    if let Ok(bytes) = command_line::bytes(text) {
        assert_eq!(command_line::bytes(&command_line::show_bytes(bytes)), Ok(bytes));
    }
    if let Ok(delay) = command_line::delay(text) {
        // A duration of centuries, in nanoseconds, is beyond the parser.
        let shown = command_line::delay(&command_line::show_duration(delay));
        assert!(shown == Ok(delay) || delay.as_nanos() > i64::MAX as u128, "{delay:?}");
    }
    if let Ok(duration) = command_line::duration(text) {
        assert!(!duration.is_zero());
    }
    if let Ok(seconds) = command_line::seconds(text) {
        assert!((0.05..=3600.0).contains(&seconds));
    }
}
