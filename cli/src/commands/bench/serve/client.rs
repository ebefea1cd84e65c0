//! A client of the service that takes little of the machine: it sends requests that were made
//! beforehand, over one connection.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::Duration,
};

use md5::{Digest, Md5};

use crate::exit::{Failure, Result};

/// A service that has not answered by then has failed.
const PATIENCE: Duration = Duration::from_secs(120);
const PROJECT: &str = "bench";

/// A request of a client that has no access key, which a service without access keys accepts.
fn request(method: &str, target: &str, headers: &str, body: &[u8]) -> Vec<u8> {
    let digest = match body {
        [] => String::new(),
        body => {
            let hex: String = Md5::digest(body).iter().map(|byte| format!("{byte:02X}")).collect();
            format!("Content-MD5: {hex}\r\n")
        }
    };
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: {PROJECT}.sls.local\r\nAuthorization: LOG bench:AAAA\r\n\
         Date: Thu, 01 Jan 1970 00:00:00 GMT\r\nContent-Length: {}\r\n{digest}{headers}\r\n",
        body.len()
    );
    [head.as_bytes(), body].concat()
}

/// PutLogs of an encoded group.
pub(super) fn put_request(logstore: &str, group: &[u8], is_compressed: bool) -> Vec<u8> {
    let target = format!("/logstores/{logstore}/shards/lb");
    let mut headers = format!(
        "Content-Type: application/x-protobuf\r\nx-log-apiversion: 0.6.0\r\nx-log-bodyrawsize: {}\r\n",
        group.len()
    );
    if !is_compressed {
        return request("POST", &target, &headers, group);
    }
    headers.push_str("x-log-compresstype: lz4\r\n");
    request("POST", &target, &headers, &lz4_flex::block::compress(group))
}

/// An answer of the service.
pub(super) struct Answer {
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        let lines = self.head.lines().filter_map(|line| line.split_once(':'));
        let mut named = lines.filter(|(it, _)| it.eq_ignore_ascii_case(name));
        named.next().map(|(_, value)| value.trim())
    }
}

/// A connection to the service.
pub(super) struct Client {
    stream: TcpStream,
}

impl Client {
    pub(super) fn connect(address: SocketAddr) -> Result<Self> {
        let failed = |error| Failure::other(format!("cannot connect to the service: {error}"));
        let stream = TcpStream::connect(address).map_err(failed)?;
        stream.set_nodelay(true).map_err(failed)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(failed)?;
        Ok(Self { stream })
    }

    /// Sends a request, and returns the answer, which must be a success.
    pub(super) fn exchange(&mut self, request: &[u8]) -> Result<Answer> {
        let failed = |error| Failure::other(format!("the service does not answer: {error}"));
        self.stream.write_all(request).map_err(failed)?;
        let mut bytes = Vec::with_capacity(1024);
        let head = loop {
            let before = bytes.len();
            if let Some(end) = bytes.windows(4).position(|it| it == b"\r\n\r\n") {
                break end;
            }
            bytes.resize(before + 1024, 0);
            let more = self.stream.read(&mut bytes[before..]).map_err(failed)?;
            if more == 0 {
                return Err(Failure::other("the service has closed the connection"));
            }
            bytes.truncate(before + more);
        };
        let mut answer = Answer {
            head: String::from_utf8_lossy(&bytes[..head]).into_owned(),
            body: bytes.split_off(head + 4),
        };
        let len: usize =
            answer.header("content-length").and_then(|len| len.parse().ok()).unwrap_or(0);
        let have = answer.body.len().min(len);
        answer.body.resize(len, 0);
        self.stream.read_exact(&mut answer.body[have..]).map_err(failed)?;
        if answer.head.starts_with("HTTP/1.1 200 ") {
            return Ok(answer);
        }
        let body = String::from_utf8_lossy(&answer.body).into_owned();
        Err(Failure::other(format!("the service refuses a call of the measurement: {body}")))
    }

    pub(super) fn get(&mut self, target: &str) -> Result<Answer> {
        self.exchange(&request("GET", target, "", &[]))
    }

    /// Creates the project and a Logstore that is encrypted under the service key.
    pub(super) fn create(&mut self, logstore: &str, shards: u32) -> Result {
        let project = format!(r#"{{"projectName":"{PROJECT}"}}"#);
        self.exchange(&request("POST", "/", "", project.as_bytes()))?;
        let body = format!(
            r#"{{"logstoreName":"{logstore}","shardCount":{shards},"encrypt_conf":{{"enable":true,"encrypt_type":"default"}}}}"#
        );
        self.exchange(&request("POST", "/logstores", "", body.as_bytes())).map(drop)
    }

    /// Searches all logs for a word that no log has.
    pub(super) fn scan(&mut self, logstore: &str, absent: &str) -> Result {
        let target =
            format!("/logstores/{logstore}?type=log&from=0&to=4294967295&line=1&query={absent}");
        let answer = self.get(&target)?;
        match (answer.header("x-log-progress"), answer.header("x-log-count")) {
            (Some("Complete"), Some("0")) => Ok(()),
            _ => Err(Failure::other("the search did not read all logs")),
        }
    }

    /// Reads shard 0 from its begin to its end. Returns the bytes of logs.
    pub(super) fn pull(&mut self, logstore: &str) -> Result<u64> {
        let shard = format!("/logstores/{logstore}/shards/0");
        let begin = self.get(&format!("{shard}?type=cursor&from=begin"))?;
        let begin: serde_json::Value = serde_json::from_slice(&begin.body).unwrap_or_default();
        let mut cursor = begin["cursor"].as_str().unwrap_or_default().to_owned();
        let mut bytes = 0;
        loop {
            let escaped = cursor.replace('=', "%3D");
            let answer = self.get(&format!("{shard}?type=log&count=1000&cursor={escaped}"))?;
            if answer.body.is_empty() {
                return Ok(bytes);
            }
            bytes += answer.body.len() as u64;
            answer.header("x-log-cursor").unwrap_or_default().clone_into(&mut cursor);
        }
    }
}
