//! PutLogs.

use envelog::{AppendOptions, Payload, ShardChoice};
use hyper::{StatusCode, header::CONTENT_TYPE};

use crate::{
    call::Call,
    compression::{Form, HEADER, RAW_SIZE},
    error::{ApiError, Result},
    response::Answer,
    service::Open,
};

/// The largest body, before and after decompression, in bytes.
pub(crate) const RAW_BYTES_MAX: usize = 10 << 20;
/// The bytes by which a compressed body may exceed a raw one. Data that cannot be compressed grows.
const GROWTH_MAX: usize = RAW_BYTES_MAX / 255 + 1024;
const KEY_DIGITS: usize = 32;
const MEDIA_TYPE: &str = "application/x-protobuf";

/// The form and size of a body, and its shard, from the head of a request.
#[derive(Debug)]
pub(crate) struct Head {
    form: Option<Form>,
    raw_size: usize,
    shard: ShardChoice,
}

impl Head {
    /// # Errors
    /// The refusals that need no body.
    pub(crate) fn parse(call: &Call, is_routed: bool) -> Result<Self> {
        match call.headers.get(CONTENT_TYPE).map(|it| it.as_bytes()) {
            None => return Err(ApiError::bad("MissingContentType", "Content-Type is missing")),
            Some(it) if it.starts_with(MEDIA_TYPE.as_bytes()) => {}
            Some(_) => {
                let message = format!("Content-Type must be {MEDIA_TYPE}");
                let status = StatusCode::UNSUPPORTED_MEDIA_TYPE;
                return Err(ApiError::new(status, "InvalidContentType", message));
            }
        }
        if call.header("x-log-mode").is_some_and(|mode| mode != "log_group") {
            return Err(ApiError::unsupported("x-log-mode"));
        }
        let raw_size = call.header(RAW_SIZE);
        let raw_size = raw_size.ok_or_else(|| {
            ApiError::bad("MissingBodyRawSize", "the header x-log-bodyrawsize is missing")
        })?;
        let raw_size: u64 = raw_size
            .parse()
            .map_err(|_| ApiError::parameter("x-log-bodyrawsize is not a number"))?;
        let raw_size = usize::try_from(raw_size).ok().filter(|&size| size <= RAW_BYTES_MAX);
        let form = Form::of_request(call.header(HEADER))?;
        let shard = if is_routed { routed(call)? } else { ShardChoice::RoundRobin };
        Ok(Self {
            form,
            raw_size: raw_size.ok_or_else(|| too_large(call, RAW_SIZE, RAW_BYTES_MAX))?,
            shard,
        })
    }

    /// The longest body, in bytes.
    pub(crate) fn body_max(&self) -> usize {
        if self.form.is_some() { RAW_BYTES_MAX + GROWTH_MAX } else { RAW_BYTES_MAX }
    }

    /// The memory that the call takes for a body of `len` bytes.
    pub(crate) fn memory(&self, len: usize) -> usize {
        len + if self.form.is_some() { self.raw_size } else { 0 }
    }

    /// Decompresses and checks a body.
    ///
    /// # Errors
    /// 400 for a body that differs from its head, or is no log group.
    pub(crate) fn payload(&self, body: bytes::Bytes) -> Result<Payload> {
        let raw = match self.form {
            Some(form) => form.decompress(&body, self.raw_size)?,
            None if body.len() == self.raw_size => body,
            None => {
                let message = format!(
                    "the body has {} bytes, and x-log-bodyrawsize is {}",
                    body.len(),
                    self.raw_size
                );
                return Err(ApiError::bad("PostBodyInvalid", message));
            }
        };
        Ok(Payload::encoded(raw)?)
    }
}

/// The refusal of a body whose size, in this header, is more than `max` bytes.
pub(crate) fn too_large(call: &Call, header: &str, max: usize) -> ApiError {
    let size = call.header(header).unwrap_or("of the request");
    let message = format!("Body size {size} must little than {max}.");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "PostBodyTooLarge", message)
}

fn routed(call: &Call) -> Result<ShardChoice> {
    hash_key(call.required("key")?).map(ShardChoice::HashKey)
}

/// # Errors
/// 400 if the text is no hash key.
pub(crate) fn hash_key(key: &str) -> Result<u128> {
    let is_key = key.len() == KEY_DIGITS && key.bytes().all(|byte| byte.is_ascii_hexdigit());
    let key = u128::from_str_radix(key, 16).ok().filter(|_| is_key);
    let wrong = || ApiError::parameter(format!("key must have {KEY_DIGITS} hexadecimal digits"));
    key.ok_or_else(wrong)
}

/// Appends a group, and answers when it is on disk.
pub(crate) async fn put(open: &Open, head: &Head, payload: Payload) -> Result<Answer> {
    let options = AppendOptions::default().shard(head.shard);
    open.logstore.append_async(payload, &options).await?;
    Ok(Answer::empty())
}
