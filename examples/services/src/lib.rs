//! Two small log services on envelog: [`web`] with axum and tokio, [`lines`] with plain threads.

pub mod lines;
pub mod web;

use bytes::Bytes;
use envelog::{
    LogGroup,
    group::{Content, Log},
};

/// One log for each line.
pub fn group_of(lines: &[u8], time_s: u32) -> LogGroup {
    let lines = lines.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    let log = |line: &[u8]| Log {
        time: time_s,
        contents: vec![Content {
            key: Bytes::from_static(b"content"),
            value: Bytes::copy_from_slice(line),
        }],
        ..Log::default()
    };
    LogGroup { logs: lines.map(log).collect(), ..LogGroup::default() }
}

/// The lines of a group, each with a newline.
pub fn lines_of(group: &LogGroup) -> Bytes {
    let mut lines = Vec::new();
    for content in group.logs.iter().flat_map(|log| &log.contents) {
        lines.extend_from_slice(&content.value);
        lines.push(b'\n');
    }
    lines.into()
}

/// The time now, in seconds since the Unix epoch.
pub fn now_s() -> u32 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u32::try_from(since.as_secs()).unwrap_or(u32::MAX))
}
