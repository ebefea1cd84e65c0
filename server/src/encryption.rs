//! `PUT /logstores/{logstore}/encryption`: another form of `encrypt_conf`, on its own.

use envelog::{EncryptConf, Logstore};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::{
    auth::Caller,
    error::{ApiError, Result},
    logstores::{self, Sent},
    response::Answer,
    service::Service,
};

/// The body of the call.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct Body {
    enable: Option<bool>,
    encrypt_type: Option<String>,
    user_cmk_info: Option<KeyInfo>,
    /// As *get* returns it. An addition.
    revision: Option<u64>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct KeyInfo {
    key_id: String,
    role_arn: String,
    region_id: String,
}

impl Body {
    /// The `encrypt_conf` that the body asks for. A field that it leaves out keeps its present value:
    /// the method, the algorithm and the key of a Logstore are fixed once they are set.
    ///
    /// # Errors
    /// 400 if neither says whether new data is encrypted.
    fn conf(self, now: Option<&EncryptConf>) -> Result<Value> {
        let enable = self.enable.or_else(|| now.map(|now| now.enable));
        let enable = enable.ok_or_else(|| {
            ApiError::bad("PostBodyInvalid", "enable is missing, and the Logstore has none")
        })?;
        let cmk = self.user_cmk_info.map(
            |it| json!({ "cmk_key_id": it.key_id, "arn": it.role_arn, "region_id": it.region_id }),
        );
        let cmk = cmk.or_else(|| now.and_then(|now| Some(json!(now.user_cmk_info.as_ref()?))));
        let kind = self.encrypt_type.map(Value::from);
        let kind = kind.or_else(|| now.and_then(|now| Some(json!(now.encrypt_type?))));
        let mut conf = json!({ "enable": enable });
        for (name, value) in [("encrypt_type", kind), ("user_cmk_info", cmk)] {
            if let Some(value) = value {
                conf[name] = value;
            }
        }
        Ok(conf)
    }
}

/// Blocks for file I/O and KMS calls.
pub(crate) fn update(
    service: &Service,
    caller: &Caller,
    logstore: &Logstore,
    body: &[u8],
) -> Result<Answer> {
    let fields = Value::Object(logstores::json_object(body)?);
    let body: Body = serde_json::from_value(fields).map_err(|error| {
        ApiError::bad("PostBodyInvalid", format!("the body is not as expected: {error}"))
    })?;
    let revision = body.revision;
    let conf = body.conf(logstore.config().encrypt_conf.as_ref())?;
    logstores::update(service, caller, logstore, Sent::of_encryption(&conf, revision)?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn conf(body: &str, now: Option<&str>) -> Value {
        let now = now.map(|text| EncryptConf::from_json(text).unwrap());
        serde_json::from_str::<Body>(body).unwrap().conf(now.as_ref()).unwrap()
    }

    #[test]
    fn what_the_body_leaves_out_stays() {
        let now = r#"{"enable": true, "encrypt_type": "sm4", "user_cmk_info":
            {"cmk_key_id": "k", "arn": "a", "region_id": "r"}}"#;
        let off = json!({ "enable": false, "encrypt_type": "sm4", "user_cmk_info":
            { "cmk_key_id": "k", "arn": "a", "region_id": "r" } });
        assert_eq!(conf(r#"{"enable": false}"#, Some(now)), off);
        let on = conf("{}", Some(now));
        assert_eq!(on, serde_json::from_str::<Value>(now).unwrap());
        let refusal = serde_json::from_str::<Body>("{}").unwrap().conf(None).unwrap_err();
        assert!(refusal.message.contains("enable"), "{refusal:?}");
        let whole = r#"{"enable": false, "encryptType": "sm4", "userCmkInfo":
            {"keyId": "k", "roleArn": "a", "regionId": "r"}}"#;
        assert_eq!(conf(whole, None), off);
        assert_eq!(conf(r#"{"enable": true}"#, None), json!({ "enable": true }));
        for wrong in [r#"{"enable": true, "encrypt_type": "sm4"}"#, r#"{"enable": 1}"#] {
            serde_json::from_str::<Body>(wrong).unwrap_err();
        }
    }
}
