//! Clients of the log service with the unmodified SDK for Rust, for the tests of `envelog serve`:
//!
//! - `life_cycle CONF`: the life of a project and a Logstore with this `encrypt_conf`;
//! - `revoked CONF`: two Logstores, one under a customer's key; does what standard input says;
//! - `load CONF PRODUCERS CONSUMERS`: many clients at once, until standard input ends.
//!
//! The SDK asks for the host `PROJECT.sls.local`, which it finds by the proxy in `HTTP_PROXY`.

mod life_cycle;
mod load;
mod revoked;

use std::{
    env,
    time::{SystemTime, UNIX_EPOCH},
};

use aliyun_log_rust_sdk::{
    Client, Config, EncryptConf, Error, FromConfig, get_cursor_models::CursorPos,
};
use aliyun_log_sdk_protobuf::{Log, LogGroup};

#[tokio::main]
async fn main() {
    let args: Vec<String> = env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["life_cycle", conf] => life_cycle::run(&conf_of(conf)).await,
        ["revoked", conf] => revoked::run(&conf_of(conf)).await,
        ["load", conf, producers, consumers] => {
            let number = |text: &str| text.parse().expect("a number");
            load::run(&conf_of(conf), number(producers), number(consumers)).await;
        }
        _ => panic!("no such program: {args:?}"),
    }
}

fn conf_of(json: &str) -> EncryptConf {
    serde_json::from_str(json).expect("an encrypt_conf")
}

/// A client that reports the first failure of a call.
fn client() -> Client {
    let config = Config::builder()
        .endpoint("http://sls.local")
        .access_key("tester", "secret of tester")
        .max_retry(0)
        .build();
    Client::from_config(config.expect("a configuration")).expect("a client")
}

fn now() -> u32 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock");
    u32::try_from(since.as_secs()).expect("a time before 2106")
}

/// A group with one log for each text.
fn group<'a>(texts: impl IntoIterator<Item = &'a str>) -> LogGroup {
    let mut group = LogGroup::new();
    for text in texts {
        let mut log = Log::from_unixtime(now());
        log.add_content_kv("text", text);
        group.add_log(log);
    }
    group
}

async fn put(client: &Client, project: &str, logstore: &str, text: &str) -> Result<(), Error> {
    client.put_logs(project, logstore).log_group(group([text])).send().await.map(drop)
}

/// The texts in groups.
fn texts(groups: &[LogGroup]) -> impl Iterator<Item = &str> {
    let logs = groups.iter().flat_map(|group| group.logs());
    logs.flat_map(|log| log.contents()).map(|content| content.value().as_str())
}

async fn begin(
    client: &Client,
    project: &str,
    logstore: &str,
    shard: i32,
) -> Result<String, Error> {
    let cursor = client.get_cursor(project, logstore, shard).cursor_pos(CursorPos::Begin);
    Ok(cursor.send().await?.get_body().cursor().to_owned())
}

/// The texts of all logs in a shard.
async fn drain(
    client: &Client,
    project: &str,
    logstore: &str,
    shard: i32,
) -> Result<Vec<String>, Error> {
    let mut cursor = begin(client, project, logstore, shard).await?;
    let mut found = Vec::new();
    loop {
        let pull = client.pull_logs(project, logstore, shard).cursor(&cursor).count(10);
        let pulled = pull.send().await?.take_body();
        assert_eq!(*pulled.log_group_count() as usize, pulled.log_group_list().len());
        found.extend(texts(pulled.log_group_list()).map(str::to_owned));
        if *pulled.next_cursor() == cursor {
            return Ok(found);
        }
        pulled.next_cursor().clone_into(&mut cursor);
    }
}

/// Checks that a call was refused with this status and code. Returns the message.
fn refused<T>(result: Result<T, Error>, status: u32, code: &str) -> String {
    match result {
        Err(Error::Server { error_code, error_message, http_status, request_id }) => {
            assert_eq!((http_status, &*error_code), (status, code), "{error_message}");
            assert_eq!(request_id.map_or(0, |id| id.len()), 24);
            error_message
        }
        Err(error) => panic!("{error}, and not {status} {code}"),
        Ok(_) => panic!("accepted, and not refused with {status} {code}"),
    }
}
