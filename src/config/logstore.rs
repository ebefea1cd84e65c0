//! The configuration of a Logstore, and the rules for changing it.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use super::{
    LogstoreName,
    shards::{self, ShardInfo},
};
use crate::{
    crypto::{Cipher, HashAlg, Suite},
    kms::{Cmk, RevokedReason},
    segment::Compression,
};

/// The most shards a Logstore may have.
pub const SHARDS_MAX: u32 = 256;
/// The longest time to live, in days (ten years).
pub const TTL_DAYS_MAX: u32 = 3650;
/// The smallest [`RotateDataKey::max_bytes`].
pub const ROTATE_BYTES_MIN: u64 = 1 << 20;
/// The longest `cmk_key_id`, `arn` or `region_id`, in bytes.
pub const CMK_FIELD_BYTES_MAX: usize = 1024;

/// The reason why a configuration was refused. Each rule has one variant. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// A name breaks the syntax.
    #[error("the {part} name \"{name}\" is refused: {why}")]
    Name {
        /// The part.
        part: &'static str,
        /// The name, shortened and escaped.
        name: String,
        /// The reason.
        why: &'static str,
    },
    /// The JSON is malformed, or has an unknown field or value. The text names it.
    #[error("the configuration is not valid: {0}")]
    Json(String),
    /// `encrypt_type` is required if `enable` is true.
    #[error("encrypt_type is required when enable is true: give \"default\" (AES) or \"sm4\"")]
    EncryptTypeRequired,
    /// `encrypt_type` names an algorithm that is not supported.
    #[error("encrypt_type \"{0}\" is not supported: give \"default\" (AES) or \"sm4\"")]
    EncryptTypeUnsupported(String),
    /// A field of `user_cmk_info` is empty, or too long.
    #[error("user_cmk_info.{field} is refused: it must have 1 to 1024 bytes")]
    CmkField {
        /// The field.
        field: &'static str,
    },
    /// The update leaves out `encrypt_conf` of a Logstore that has one.
    #[error(
        "the update must include encrypt_conf, since the Logstore has one: get the configuration, change it, send it back"
    )]
    EncryptConfRequired,
    /// The update would change between service key and BYOK.
    #[error("the encryption method is fixed ({fixed}) and cannot be changed")]
    MethodFixed {
        /// The fixed method.
        fixed: &'static str,
    },
    /// The update would change the algorithm.
    #[error("the encryption algorithm is fixed (encrypt_type \"{fixed}\") and cannot be changed")]
    AlgorithmFixed {
        /// The fixed algorithm.
        fixed: EncryptType,
    },
    /// The update would change the customer master key.
    #[error("the customer master key is fixed ({fixed}); use the operation that replaces it")]
    CmkFixed {
        /// The fixed `cmk_key_id`.
        fixed: String,
    },
    /// The update was built on an older revision.
    #[error(
        "the update is built on revision {given}, the configuration is at revision {current}: get it again"
    )]
    RevisionOutdated {
        /// The revision in the update.
        given: u64,
        /// The revision of the configuration.
        current: u64,
    },
    /// The update would change a field that only another operation changes.
    #[error("{field} cannot be changed by an update")]
    FieldFixed {
        /// The field.
        field: &'static str,
    },
    /// A number is out of its range.
    #[error("{field} is {given}, it must be {min} to {max}")]
    OutOfRange {
        /// The field.
        field: &'static str,
        /// The given number.
        given: u64,
        /// The smallest allowed number.
        min: u64,
        /// The largest allowed number.
        max: u64,
    },
    /// No KMS serves the region.
    #[error("no KMS serves region {region}: BYOK is not possible there")]
    NoKmsForRegion {
        /// The `region_id`.
        region: String,
    },
    /// The KMS refuses the customer master key of a new envelope. Unlike the other variants this is
    /// no fault of the configuration: the owner of the key can allow its use
    /// ([`ErrorKind::Revoked`](crate::ErrorKind::Revoked)).
    #[error("customer master key {cmk} cannot be used, because it is {reason} ({detail}); {}", reason.remedy())]
    CmkRefused {
        /// The `cmk_key_id`.
        cmk: String,
        /// The reason.
        reason: RevokedReason,
        /// The KMS's explanation.
        detail: String,
    },
    /// A shard cannot be split at this hash key.
    #[error(
        "shard {shard} cannot be split at hash key {key}: the key must be above {begin} and below {end}"
    )]
    SplitKey {
        /// The shard.
        shard: u32,
        /// The key, as 32 hexadecimal digits.
        key: String,
        /// The first key of the shard.
        begin: String,
        /// The end of its range.
        end: String,
    },
    /// A shard cannot be merged: no readwrite shard has the range behind its own.
    #[error("shard {shard} has no readwrite neighbour on its right to be merged with")]
    NoNeighbour {
        /// The shard.
        shard: u32,
    },
    /// The operation needs a customer master key and the Logstore has none.
    #[error("the Logstore does not use a customer master key")]
    NotByok,
    /// The operation needs a data key and the Logstore has none.
    #[error("the Logstore has no data key: it was never encrypted")]
    NotEncrypted,
    /// The data-key version cannot be shredded.
    #[error("data-key version {version} cannot be shredded: {why}")]
    CannotShred {
        /// The version.
        version: u32,
        /// The reason.
        why: &'static str,
    },
}

impl ConfigError {
    /// A short stable word for the variant, for programs.
    pub fn code(&self) -> &'static str {
        match self {
            ConfigError::Name { .. } => "name_refused",
            ConfigError::Json(_) => "configuration_invalid",
            ConfigError::EncryptTypeRequired => "encrypt_type_required",
            ConfigError::EncryptTypeUnsupported(_) => "encrypt_type_unsupported",
            ConfigError::CmkField { .. } => "cmk_field_refused",
            ConfigError::EncryptConfRequired => "encrypt_conf_required",
            ConfigError::MethodFixed { .. } => "method_fixed",
            ConfigError::AlgorithmFixed { .. } => "algorithm_fixed",
            ConfigError::CmkFixed { .. } => "cmk_fixed",
            ConfigError::RevisionOutdated { .. } => "revision_outdated",
            ConfigError::FieldFixed { .. } => "field_fixed",
            ConfigError::OutOfRange { .. } => "out_of_range",
            ConfigError::NoKmsForRegion { .. } => "no_kms_for_region",
            ConfigError::CmkRefused { .. } => "cmk_refused",
            ConfigError::SplitKey { .. } => "split_key_refused",
            ConfigError::NoNeighbour { .. } => "no_neighbour",
            ConfigError::NotByok => "not_byok",
            ConfigError::NotEncrypted => "not_encrypted",
            ConfigError::CannotShred { .. } => "cannot_shred",
        }
    }
}

/// The algorithm of a Logstore: the value of `encrypt_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[non_exhaustive]
pub enum EncryptType {
    /// AES-256-GCM. In JSON and as text it is `"default"`, not `"aes"`: the service that this engine
    /// is for has named the values of `encrypt_type`.
    Aes,
    /// `"sm4"`: SM4-GCM (RFC 8998).
    Sm4,
}

impl EncryptType {
    /// The suite for new data while encryption is on.
    pub fn suite(self) -> Suite {
        match self {
            EncryptType::Aes => Suite::Aes256Gcm,
            EncryptType::Sm4 => Suite::Sm4Gcm,
        }
    }

    /// The cipher of that suite.
    pub fn cipher(self) -> Cipher {
        self.suite().cipher()
    }

    fn as_str(self) -> &'static str {
        match self {
            EncryptType::Aes => "default",
            EncryptType::Sm4 => "sm4",
        }
    }
}

impl fmt::Display for EncryptType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for EncryptType {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        match text {
            "default" => Ok(EncryptType::Aes),
            "sm4" => Ok(EncryptType::Sm4),
            other => Err(ConfigError::EncryptTypeUnsupported(other.chars().take(64).collect())),
        }
    }
}

impl TryFrom<String> for EncryptType {
    type Error = ConfigError;

    fn try_from(text: String) -> Result<Self, ConfigError> {
        text.parse()
    }
}

impl From<EncryptType> for String {
    fn from(value: EncryptType) -> String {
        value.as_str().to_owned()
    }
}

/// `encrypt_conf`: whether and how a Logstore is encrypted.
///
/// ```
/// use envelog::EncryptConf;
/// let conf: EncryptConf = EncryptConf::from_json(r#"{"enable": true, "encrypt_type": "sm4"}"#).unwrap();
/// assert!(conf.enable && conf.user_cmk_info.is_none());
/// assert!(EncryptConf::from_json(r#"{"enable": true}"#).is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EncryptConf {
    /// Whether new data is encrypted.
    pub enable: bool,
    /// The algorithm; required when `enable` is true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encrypt_type: Option<EncryptType>,
    /// The customer master key (BYOK). Without it, the service key is used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_cmk_info: Option<Cmk>,
}

impl EncryptConf {
    /// Encryption with the service key.
    pub fn service_key(encrypt_type: EncryptType) -> Self {
        Self { enable: true, encrypt_type: Some(encrypt_type), user_cmk_info: None }
    }

    /// Encryption under a customer master key.
    pub fn byok(encrypt_type: EncryptType, cmk: Cmk) -> Self {
        Self { enable: true, encrypt_type: Some(encrypt_type), user_cmk_info: Some(cmk) }
    }

    /// Parses `encrypt_conf` from JSON and checks it in isolation.
    ///
    /// # Errors
    /// A [`ConfigError`] that names the field or value.
    pub fn from_json(json: &str) -> Result<Self, ConfigError> {
        let conf: Self = parse_json(json)?;
        conf.check()?;
        Ok(conf)
    }

    /// Checks that the configuration is complete in itself, independent of earlier configurations.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        if self.enable && self.encrypt_type.is_none() {
            return Err(ConfigError::EncryptTypeRequired);
        }
        if let Some(cmk) = &self.user_cmk_info {
            check_cmk(cmk)?;
        }
        Ok(())
    }
}

pub(crate) fn check_cmk(cmk: &Cmk) -> Result<(), ConfigError> {
    for (field, value) in
        [("cmk_key_id", &cmk.cmk_key_id), ("arn", &cmk.arn), ("region_id", &cmk.region_id)]
    {
        if value.is_empty() || value.len() > CMK_FIELD_BYTES_MAX || value.contains('\0') {
            return Err(ConfigError::CmkField { field });
        }
    }
    Ok(())
}

/// The envelope that the KMS unwraps to renew the lease of a Logstore's master key.
///
/// A setting of the engine, beside `encrypt_conf`. It takes effect under a customer master key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum ProbeMode {
    /// One probe for all Logstores under the same master key and role: one call per
    /// [`revalidate_every`](crate::StoreOptions::revalidate_every) for all of them. If a key
    /// policy denies one Logstore by its encryption context, the engine notices that only when it
    /// unwraps an envelope of the Logstore.
    #[default]
    Shared,
    /// The Logstore's own envelope. The engine notices within the bound on revocation that the key
    /// policy denies this Logstore alone, such as by `envelog:logstore`. Each Logstore costs a call
    /// per period: 10,000 Logstores at 30 s make 333 calls a second.
    Own,
}

impl ProbeMode {
    /// Its name in the metadata.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Shared => "shared",
            Self::Own => "own",
        }
    }

    /// The mode of this name, if there is one.
    pub(crate) fn of_name(name: &str) -> Option<Self> {
        [Self::Shared, Self::Own].into_iter().find(|mode| mode.name() == name)
    }
}

fn parse_json<'a, T: Deserialize<'a>>(json: &'a str) -> Result<T, ConfigError> {
    serde_json::from_str(json).map_err(|error| ConfigError::Json(error.to_string()))
}

/// When a Logstore gets a new data-key version automatically: at the first limit reached. It takes
/// effect while encryption is on.
///
/// A Logstore can have 10,000 versions in total, including destroyed ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct RotateDataKey {
    /// Rotate once the current version is this many days old: 1 to [`TTL_DAYS_MAX`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_age_days: Option<u32>,
    /// Rotate once the segments under the current version have this many bytes on disk: at least
    /// [`ROTATE_BYTES_MIN`]. Counts every segment that was present when the store was opened or was
    /// written since, even if retention has dropped it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bytes: Option<u64>,
}

impl RotateDataKey {
    setters! {
        max_age_days: u32, optional;
        max_bytes: u64, optional;
    }

    fn check(&self) -> Result<(), ConfigError> {
        if let Some(days) = self.max_age_days {
            range("rotate_data_key.max_age_days", days.into(), 1, TTL_DAYS_MAX.into())?;
        }
        if let Some(bytes) = self.max_bytes {
            range("rotate_data_key.max_bytes", bytes, ROTATE_BYTES_MIN, u64::MAX)?;
        }
        Ok(())
    }
}

/// The settings for [`crate::Store::create_logstore`].
///
/// ```
/// use envelog::{EncryptConf, EncryptType, LogstoreSpec};
/// let conf = EncryptConf::service_key(EncryptType::Sm4);
/// let spec = LogstoreSpec::default().shard_count(4).ttl_days(30).encrypt_conf(conf);
/// # assert!(spec.check().is_ok());
/// ```
///
/// As JSON every field may be missing, and has the value of `Default` then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct LogstoreSpec {
    /// The number of shards that divide the hash range: 1 to [`SHARDS_MAX`].
    pub shard_count: u32,
    /// The age in days at which whole segments are dropped: 1 to [`TTL_DAYS_MAX`]. `None` keeps
    /// them for ever.
    pub ttl_days: Option<u32>,
    /// The bytes of segments that a shard keeps. Above it, the oldest segments are dropped. `None`
    /// is no limit.
    pub retention_bytes: Option<u64>,
    /// When the data key rotates automatically. `None` is never.
    pub rotate_data_key: Option<RotateDataKey>,
    /// How blocks are compressed.
    pub compression: Compression,
    /// The hash by which the digest of a segment commits to its stored payloads.
    pub payload_hash: HashAlg,
    /// Encryption. A later update may add it.
    pub encrypt_conf: Option<EncryptConf>,
    /// How a revocation is noticed.
    pub probe: ProbeMode,
}

impl Default for LogstoreSpec {
    /// One shard, kept for ever, lz4, SHA-256, no `encrypt_conf`.
    fn default() -> Self {
        Self {
            shard_count: 1,
            ttl_days: None,
            retention_bytes: None,
            rotate_data_key: None,
            compression: Compression::Lz4,
            payload_hash: HashAlg::Sha256,
            encrypt_conf: None,
            probe: ProbeMode::Shared,
        }
    }
}

impl LogstoreSpec {
    setters! {
        shard_count: u32;
        ttl_days: u32, optional;
        retention_bytes: u64, optional;
        rotate_data_key: RotateDataKey, optional;
        compression: Compression;
        payload_hash: HashAlg;
        encrypt_conf: EncryptConf, optional;
        probe: ProbeMode;
    }

    /// Checks the rules that need no other state. [`crate::Store::create_logstore`] may still fail:
    /// the name may be taken, and the KMS may refuse.
    ///
    /// # Errors
    /// The broken rule. Each rule has one variant.
    pub fn check(&self) -> Result<(), ConfigError> {
        range("shard_count", self.shard_count.into(), 1, SHARDS_MAX.into())?;
        check_retention(self.ttl_days, self.retention_bytes)?;
        self.rotate_data_key.map_or(Ok(()), |policy| policy.check())?;
        self.encrypt_conf.as_ref().map_or(Ok(()), EncryptConf::check)
    }
}

fn range(field: &'static str, given: u64, min: u64, max: u64) -> Result<(), ConfigError> {
    if (min..=max).contains(&given) {
        Ok(())
    } else {
        Err(ConfigError::OutOfRange { field, given, min, max })
    }
}

fn check_retention(ttl_days: Option<u32>, retention_bytes: Option<u64>) -> Result<(), ConfigError> {
    if let Some(days) = ttl_days {
        range("ttl_days", days.into(), 1, TTL_DAYS_MAX.into())?;
    }
    if let Some(bytes) = retention_bytes {
        range("retention_bytes", bytes, 1, u64::MAX)?;
    }
    Ok(())
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The whole configuration of a Logstore, as *get* returns it and *update* accepts it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct LogstoreConfig {
    /// Project and Logstore. An update cannot change it.
    pub name: LogstoreName,
    /// Counts the changes of the configuration, but not of keys. An update must carry the current
    /// number.
    pub revision: u64,
    /// The number of shards, including those that were split or merged. An update cannot change it.
    pub shard_count: u32,
    /// See [`LogstoreSpec::ttl_days`].
    #[serde(default)]
    pub ttl_days: Option<u32>,
    /// See [`LogstoreSpec::retention_bytes`].
    #[serde(default)]
    pub retention_bytes: Option<u64>,
    /// See [`LogstoreSpec::rotate_data_key`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotate_data_key: Option<RotateDataKey>,
    /// The compression of new blocks.
    pub compression: Compression,
    /// For new segments: see [`LogstoreSpec::payload_hash`].
    #[serde(default, skip_serializing_if = "is_default")]
    pub payload_hash: HashAlg,
    /// Encryption, if it was ever configured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encrypt_conf: Option<EncryptConf>,
    /// See [`LogstoreSpec::probe`].
    #[serde(default, skip_serializing_if = "is_default")]
    pub probe: ProbeMode,
    /// The creation time, in seconds since the Unix epoch. An update cannot change it.
    pub create_time: u64,
    /// The time of the last update, in seconds since the Unix epoch. The value in an update is
    /// ignored.
    pub last_modify_time: u64,
    /// The shards, by their numbers. An update cannot change them:
    /// [`Store::split_shard`](crate::Store::split_shard) and
    /// [`Store::merge_shards`](crate::Store::merge_shards) do.
    pub shards: Vec<ShardInfo>,
}

impl LogstoreConfig {
    setters! {
        revision: u64;
        ttl_days: u32, optional;
        retention_bytes: u64, optional;
        rotate_data_key: RotateDataKey, optional;
        compression: Compression;
        payload_hash: HashAlg;
        encrypt_conf: EncryptConf, optional;
        probe: ProbeMode;
    }

    /// Parses a configuration from JSON.
    ///
    /// # Errors
    /// [`ConfigError::Json`], which names an unknown field or value, or a missing field.
    pub fn from_json(json: &str) -> Result<Self, ConfigError> {
        parse_json(json)
    }

    /// Checks the rules of the format for a configuration read from metadata.
    ///
    /// # Errors
    /// The rule that it breaks.
    pub(crate) fn check(&self) -> Result<(), String> {
        let settings = || {
            range("revision", self.revision, 1, u64::MAX)?;
            range("shard_count", self.shard_count.into(), 1, SHARDS_MAX.into())?;
            check_retention(self.ttl_days, self.retention_bytes)?;
            self.rotate_data_key.map_or(Ok(()), |policy| policy.check())?;
            self.encrypt_conf.as_ref().map_or(Ok(()), EncryptConf::check)
        };
        settings().map_err(|error| error.to_string())?;
        if self.shards.len() != self.shard_count as usize {
            return Err("there is not one shard for each of shard_count".to_owned());
        }
        shards::check(&self.shards)
    }

    /// The shards that took the range of a shard when it was split or merged. None for a readwrite
    /// shard.
    pub fn children(&self, shard: u32) -> Vec<u32> {
        let is_child = |info: &&ShardInfo| info.parents.contains(&shard);
        self.shards.iter().filter(is_child).map(|info| info.id).collect()
    }

    /// When a shard was created, in seconds since the Unix epoch.
    pub fn shard_create_time(&self, shard: &ShardInfo) -> u64 {
        shard.create_time.unwrap_or(self.create_time)
    }

    /// The configuration with these changed and added shards.
    pub(crate) fn resharded(&self, shards: Vec<ShardInfo>, now_s: u64) -> Self {
        Self {
            revision: self.revision + 1,
            last_modify_time: now_s,
            shard_count: shards.len() as u32,
            shards,
            ..self.clone()
        }
    }

    pub(crate) fn new(
        name: LogstoreName,
        spec: LogstoreSpec,
        now_s: u64,
    ) -> Result<Self, ConfigError> {
        spec.check()?;
        Ok(Self {
            name,
            revision: 1,
            shard_count: spec.shard_count,
            ttl_days: spec.ttl_days,
            retention_bytes: spec.retention_bytes,
            rotate_data_key: spec.rotate_data_key,
            compression: spec.compression,
            payload_hash: spec.payload_hash,
            encrypt_conf: spec.encrypt_conf,
            probe: spec.probe,
            create_time: now_s,
            last_modify_time: now_s,
            shards: shards::divide(spec.shard_count),
        })
    }

    /// The configuration that results from `update`, or the rule that refuses it.
    ///
    /// `fixed` holds the settings that the first `enable: true` has fixed, if there was one.
    pub(crate) fn updated(
        &self,
        update: Self,
        fixed: Option<&FixedEncryption>,
        now_s: u64,
    ) -> Result<Self, ConfigError> {
        if update.name != self.name {
            return Err(ConfigError::FieldFixed { field: "name" });
        }
        if update.revision != self.revision {
            return Err(ConfigError::RevisionOutdated {
                given: update.revision,
                current: self.revision,
            });
        }
        for (field, same) in [
            ("shard_count", update.shard_count == self.shard_count),
            ("shards", update.shards == self.shards),
            ("create_time", update.create_time == self.create_time),
        ] {
            if !same {
                return Err(ConfigError::FieldFixed { field });
            }
        }
        check_retention(update.ttl_days, update.retention_bytes)?;
        update.rotate_data_key.map_or(Ok(()), |policy| policy.check())?;
        let encrypt_conf = match (&self.encrypt_conf, update.encrypt_conf) {
            (Some(_), None) => return Err(ConfigError::EncryptConfRequired),
            (_, None) => None,
            (_, Some(conf)) => {
                // The first enable must be complete. Once the algorithm is fixed, a configuration
                // may omit it while encryption is off.
                conf.check()?;
                Some(match fixed {
                    Some(fixed) => fixed.admit(conf)?,
                    None => conf,
                })
            }
        };
        Ok(Self { revision: self.revision + 1, last_modify_time: now_s, encrypt_conf, ..update })
    }
}

/// The settings that the first `enable: true` has fixed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FixedEncryption {
    pub(crate) encrypt_type: EncryptType,
    pub(crate) cmk: Option<Cmk>,
}

impl FixedEncryption {
    /// Fills in the omitted fields of `conf`, or returns the rule that it breaks.
    fn admit(&self, conf: EncryptConf) -> Result<EncryptConf, ConfigError> {
        match (&self.cmk, &conf.user_cmk_info) {
            (None, Some(_)) => return Err(ConfigError::MethodFixed { fixed: "service key" }),
            (Some(_), None) => {
                return Err(ConfigError::MethodFixed { fixed: "customer master key" });
            }
            (Some(fixed), Some(given)) if fixed != given => {
                return Err(ConfigError::CmkFixed { fixed: fixed.cmk_key_id.clone() });
            }
            _ => {}
        }
        if conf.encrypt_type.is_some_and(|given| given != self.encrypt_type) {
            return Err(ConfigError::AlgorithmFixed { fixed: self.encrypt_type });
        }
        Ok(EncryptConf { encrypt_type: Some(self.encrypt_type), ..conf })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn cmk(id: &str) -> Cmk {
        Cmk {
            cmk_key_id: id.into(),
            arn: "acs:ram::13234:role/logsource".into(),
            region_id: "cn-hangzhou".into(),
        }
    }

    fn config(conf: Option<EncryptConf>) -> LogstoreConfig {
        let spec = LogstoreSpec { encrypt_conf: conf, ..LogstoreSpec::default() };
        LogstoreConfig::new("p/l".parse().unwrap(), spec, 1).unwrap()
    }

    fn fixed(cmk: Option<Cmk>) -> FixedEncryption {
        FixedEncryption { encrypt_type: EncryptType::Aes, cmk }
    }

    #[test]
    fn json_names_what_is_wrong() {
        let error = |json| EncryptConf::from_json(json).unwrap_err();
        assert_eq!(error(r#"{"enable":true}"#), ConfigError::EncryptTypeRequired);
        assert!(error(r#"{"enable":true,"encrypt_type":"m4"}"#).to_string().contains("m4"));
        assert!(
            error(r#"{"enable":true,"encrypt_type":"default","x":1}"#).to_string().contains("`x`")
        );
        assert!(
            error(r#"{"enable":true,"encrypt_type":"sm4","user_cmk_info":{"cmk_key_id":"k","arn":"a"}}"#)
                .to_string()
                .contains("region_id")
        );
        assert_eq!(
            error(
                r#"{"enable":true,"encrypt_type":"sm4","user_cmk_info":{"cmk_key_id":"","arn":"a","region_id":"r"}}"#
            ),
            ConfigError::CmkField { field: "cmk_key_id" }
        );
        assert!(EncryptConf::from_json(r#"{"enable":false}"#).is_ok());
    }

    #[test]
    fn update_rules() {
        let service = config(Some(EncryptConf::service_key(EncryptType::Aes)));
        let with = |conf| LogstoreConfig { encrypt_conf: conf, ..service.clone() };
        let update = |conf| service.updated(with(conf), Some(&fixed(None)), 2);
        assert_eq!(update(None), Err(ConfigError::EncryptConfRequired));
        assert_eq!(
            update(Some(EncryptConf::service_key(EncryptType::Sm4))),
            Err(ConfigError::AlgorithmFixed { fixed: EncryptType::Aes })
        );
        assert_eq!(
            update(Some(EncryptConf::byok(EncryptType::Aes, cmk("k")))),
            Err(ConfigError::MethodFixed { fixed: "service key" })
        );
        let off =
            update(Some(EncryptConf { enable: false, encrypt_type: None, user_cmk_info: None }))
                .unwrap();
        assert_eq!(off.encrypt_conf.unwrap().encrypt_type, Some(EncryptType::Aes));
        assert_eq!(off.revision, 2);

        let byok = config(Some(EncryptConf::byok(EncryptType::Aes, cmk("k"))));
        let update = |conf| {
            byok.updated(
                LogstoreConfig { encrypt_conf: conf, ..byok.clone() },
                Some(&fixed(Some(cmk("k")))),
                2,
            )
        };
        assert_eq!(
            update(Some(EncryptConf::service_key(EncryptType::Aes))),
            Err(ConfigError::MethodFixed { fixed: "customer master key" })
        );
        assert_eq!(
            update(Some(EncryptConf::byok(EncryptType::Aes, cmk("other")))),
            Err(ConfigError::CmkFixed { fixed: "k".into() })
        );
    }

    #[test]
    fn an_old_revision_or_a_fixed_field_is_refused() {
        let current = config(None);
        let stale = LogstoreConfig { revision: 0, ..current.clone() };
        assert_eq!(
            current.updated(stale, None, 2),
            Err(ConfigError::RevisionOutdated { given: 0, current: 1 })
        );
        let shards = LogstoreConfig { shard_count: 2, ..current.clone() };
        assert_eq!(
            current.updated(shards, None, 2),
            Err(ConfigError::FieldFixed { field: "shard_count" })
        );
        let renamed = LogstoreConfig { name: "p/other".parse().unwrap(), ..current.clone() };
        assert_eq!(
            current.updated(renamed, None, 2),
            Err(ConfigError::FieldFixed { field: "name" })
        );
        let ttl = LogstoreConfig { ttl_days: Some(0), ..current.clone() };
        assert!(matches!(current.updated(ttl, None, 2), Err(ConfigError::OutOfRange { .. })));
    }
}
