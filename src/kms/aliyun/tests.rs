//! Tests of the metadata service, which has a fixed address. So `tests/kms_aliyun.rs` cannot cover
//! it.

#![allow(clippy::unwrap_used)]

use std::{
    io::{BufRead, BufReader, Write},
    net::TcpListener,
    sync::mpsc::{Receiver, channel},
    thread,
    time::Duration,
};

use ureq::http::Uri;

use super::{
    Http,
    credentials::{Profile, from_instance, profile_of},
    http, key_of, timestamp,
};
use crate::kms::deadline::Deadline;

const SECONDS: Duration = Duration::from_secs(10);

/// A metadata service that answers with these bodies, one after the other, and reports the
/// requests.
fn metadata(answers: &'static [(u16, &'static str)]) -> (Uri, Receiver<String>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = http::endpoint(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for (status, body) in answers {
            let (stream, _) = listener.accept().unwrap();
            let head: Vec<_> = BufReader::new(&stream)
                .lines()
                .map(Result::unwrap)
                .take_while(|line| !line.is_empty())
                .collect();
            let extra =
                head.iter().find(|line| line.starts_with("x-aliyun-ecs-metadata-token")).cloned();
            sender.send(format!("{} {}", head[0], extra.unwrap_or_default())).unwrap();
            let answer = format!(
                "HTTP/1.1 {status} X\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                body.len()
            );
            (&stream).write_all(answer.as_bytes()).unwrap();
        }
    });
    (endpoint, receiver)
}

const ISSUED: &str =
    r#"{"AccessKeyId":"STS.1","AccessKeySecret":"hush","SecurityToken":"token","Code":"Success"}"#;

#[test]
fn an_instance_gets_the_credentials_of_its_role_with_a_token() {
    let (endpoint, asked) =
        metadata(&[(200, "the-token=="), (200, "log-service\n"), (200, ISSUED)]);
    let credentials =
        from_instance(&Http::new(None), &endpoint, None, Deadline::after(SECONDS)).unwrap();
    assert_eq!((credentials.id.as_str(), credentials.secret.as_str()), ("STS.1", "hush"));
    assert_eq!(credentials.token.as_deref().map(String::as_str), Some("token"));
    assert_eq!(format!("{credentials:?}"), "Credentials(..)");
    let path = "/latest/meta-data/ram/security-credentials/";
    assert_eq!(
        asked.iter().collect::<Vec<_>>(),
        [
            "PUT /latest/api/token HTTP/1.1 x-aliyun-ecs-metadata-token-ttl-seconds: 60".to_owned(),
            format!("GET {path} HTTP/1.1 x-aliyun-ecs-metadata-token: the-token=="),
            format!("GET {path}log-service HTTP/1.1 x-aliyun-ecs-metadata-token: the-token=="),
        ]
    );
    // If the role is named, the metadata service is not asked for it.
    let (endpoint, asked) = metadata(&[(200, "the-token=="), (200, ISSUED)]);
    from_instance(&Http::new(None), &endpoint, Some("named"), Deadline::after(SECONDS)).unwrap();
    assert!(asked.iter().nth(1).unwrap().starts_with(&format!("GET {path}named ")));
}

#[test]
fn a_metadata_service_that_is_none_gives_no_credentials() {
    for answers in [
        &[(404, "")][..],
        &[(200, "")],
        &[(200, "two\nlines")],
        &[(200, "<html></html>")],
        &[(200, "token"), (403, "")],
        &[(200, "token"), (200, "../../user-data?")],
        &[(200, "token"), (200, "role"), (404, "not found")],
        &[(200, "token"), (200, "role"), (200, "")],
        &[(200, "token"), (200, "role"), (200, r#"{"AccessKeyId":"hush"}"#)],
    ] {
        let (endpoint, _asked) = metadata(answers);
        let why =
            from_instance(&Http::new(None), &endpoint, None, Deadline::after(SECONDS)).unwrap_err();
        assert!(
            why.starts_with("the metadata service ") && !why.contains("hush"),
            "{answers:?}: {why}"
        );
    }
}

#[test]
fn a_profile_of_the_official_cli_is_understood_or_refused() {
    let config = br#"{
        "current": "default",
        "profiles": [
            { "name": "default", "mode": "AK", "access_key_id": "LTAI", "access_key_secret": "hush", "region_id": "cn-hangzhou" },
            { "name": "sts", "mode": "StsToken", "access_key_id": "STS.1", "access_key_secret": "hush", "sts_token": "token" },
            { "name": "no-token", "mode": "StsToken", "access_key_id": "STS.1", "access_key_secret": "hush" },
            { "name": "no-secret", "mode": "AK", "access_key_id": "LTAI", "access_key_secret": "" },
            { "name": "ecs", "mode": "EcsRamRole", "ram_role_name": "log-service" },
            { "name": "any-ecs", "mode": "EcsRamRole", "ram_role_name": "" },
            { "name": "sso", "mode": "CloudSSO", "access_key_id": "LTAI", "access_key_secret": "hush" }
        ],
        "meta_path": ""
    }"#;
    let key = |name| match profile_of(config, name).unwrap() {
        Profile::Key(key) => {
            (key.id, key.secret.to_string(), key.token.map(|token| token.to_string()))
        }
        Profile::InstanceRole(role) => panic!("{role:?}"),
    };
    assert_eq!(key(None), ("LTAI".to_owned(), "hush".to_owned(), None));
    assert_eq!(key(Some("sts")), ("STS.1".to_owned(), "hush".to_owned(), Some("token".to_owned())));
    let role = |name| match profile_of(config, Some(name)).unwrap() {
        Profile::InstanceRole(role) => role,
        Profile::Key(_) => panic!("{name}"),
    };
    assert_eq!((role("ecs"), role("any-ecs")), (Some("log-service".to_owned()), None));
    for (config, name) in [
        (&config[..], Some("no-token")),
        (config, Some("no-secret")),
        (config, Some("sso")),
        (config, Some("nobody")),
        (b"", None),
        (b"{}", None),
        (br#"{"profiles":[{"name":"","access_key_secret":{"hush":1}}]}"#, None),
    ] {
        let why = profile_of(config, name).err().unwrap();
        assert!(!why.contains("hush"), "{why}");
    }
}

#[test]
fn a_key_has_32_bytes_in_base64() {
    let key = |text| key_of(text).map(|key| *key.expose()).ok();
    assert_eq!(
        key("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="),
        Some(std::array::from_fn(|n| n as u8))
    );
    for text in [
        "",
        "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8",
        "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHg==",
        "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8g",
        "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8gISIjJCUmJygpKissLS4v",
        "!AECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=",
    ] {
        assert_eq!(key(text), None, "{text}");
    }
}

#[test]
fn the_date_is_one_of_iso_8601_to_the_second() {
    let date = timestamp();
    let shape: String = date.chars().map(|c| if c.is_ascii_digit() { '9' } else { c }).collect();
    assert_eq!(shape, "9999-99-99T99:99:99Z", "{date}");
}
