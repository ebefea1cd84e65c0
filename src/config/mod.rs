//! Names and settings of Logstores, and the rules for changing settings. This module defines only
//! values and performs no operations.

mod logstore;
mod name;
mod shards;

pub use logstore::{
    CMK_FIELD_BYTES_MAX, ConfigError, EncryptConf, EncryptType, LogstoreConfig, LogstoreSpec,
    ProbeMode, ROTATE_BYTES_MIN, RotateDataKey, SHARDS_MAX, TTL_DAYS_MAX,
};
pub(crate) use logstore::{FixedEncryption, check_cmk};
pub use name::{LogstoreName, NAME_BYTES_MAX};
pub(crate) use shards::Resharding;
pub use shards::{ShardInfo, ShardStatus};
