//! The API of the service, by requests over a socket.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use common::{Answer, Ask, World, group, keys, pull_target, write_keys};
use envelog::{LogstoreName, Store};
use envelog_server::{
    AdminCommand, AdminOutput, Administration, Server, ServerBuilder,
    client::{Key, Method, nonce, sign},
};
use jiff::SignedDuration;
use serde_json::{Value, json};

const NULL: Value = Value::Null;

#[test]
fn projects_and_logstores_live_and_die() {
    let world = World::new();
    world.ok("POST", "/", &json!({ "projectName": "app", "description": "d" }));
    assert_eq!(
        world.call("POST", "/", &json!({ "projectName": "app" })).code(),
        "ProjectAlreadyExist"
    );
    assert_eq!(world.ok("GET", "/", &NULL).json()["description"], "d");
    world.ok("PUT", "/", &json!({ "description": "e" }));
    let conf = json!({ "enable": true, "encrypt_type": "default" });
    let body = json!({ "logstoreName": "one", "ttl": 7, "shardCount": 3, "autoSplit": true,
                       "hot_ttl": 30, "encrypt_conf": conf });
    world.ok("POST", "/logstores", &body);
    assert_eq!(world.call("POST", "/logstores", &body).code(), "LogStoreAlreadyExist");
    let got = world.ok("GET", "/logstores/one", &NULL).json();
    for (name, value) in body.as_object().unwrap() {
        assert_eq!(&got[name], value, "{name}");
    }
    let shards = world.ok("GET", "/logstores/one/shards", &NULL).json();
    assert_eq!(shards.as_array().unwrap().len(), 3);
    assert_eq!(shards[2]["exclusiveEndKey"], "f".repeat(32));
    world.ok("POST", "/logstores", &json!({ "logstoreName": "two", "telemetryType": "Metrics" }));
    let list = |query: &str| world.ok("GET", &format!("/logstores?{query}"), &NULL).json();
    assert_eq!(list("logstoreName=&offset=&size=")["logstores"], json!(["one", "two"]));
    assert_eq!(list("logstoreName=n")["logstores"], json!(["one"]));
    assert_eq!(list("telemetryType=Metrics")["logstores"], json!(["two"]));
    let page = list("offset=1&size=1");
    assert_eq!((&page["count"], &page["total"]), (&json!(1), &json!(2)));

    assert_eq!(world.call("DELETE", "/", &NULL).code(), "ProjectNotEmpty");
    for name in ["one", "two"] {
        world.ok("DELETE", &format!("/logstores/{name}"), &NULL);
        assert_eq!(
            world.call("GET", &format!("/logstores/{name}"), &NULL).code(),
            "LogStoreNotExist"
        );
    }
    // A new Logstore of the same name has nothing of the old one.
    world.ok("POST", "/logstores", &json!({ "logstoreName": "one" }));
    let got = world.ok("GET", "/logstores/one", &NULL).json();
    assert_eq!((&got["ttl"], &got["autoSplit"]), (&json!(30), &json!(false)));
    assert!(got.get("encrypt_conf").is_none() && got.get("hot_ttl").is_none());
    world.ok("DELETE", "/logstores/one", &NULL);
    world.ok("DELETE", "/", &NULL);
    assert_eq!(world.call("GET", "/", &NULL).code(), "ProjectNotExist");
    assert_eq!(world.call("GET", "/logstores/one", &NULL).code(), "ProjectNotExist");
}

#[test]
fn an_update_merges_and_an_illegal_one_changes_nothing() {
    let world = World::new();
    let conf = json!({ "enable": true, "encrypt_type": "default" });
    world.create("one", &conf);
    let update = |body: &Value| world.call("PUT", "/logstores/one", body);
    let (_, byok) = world.byok();
    for (body, code) in [
        (json!({ "ttl": 5 }), "ParameterInvalid"),
        (
            json!({ "ttl": 5, "encrypt_conf": { "enable": true, "encrypt_type": "sm4" } }),
            "ParameterInvalid",
        ),
        (json!({ "ttl": 5, "encrypt_conf": byok }), "ParameterInvalid"),
        (json!({ "ttl": 5, "shardCount": 9, "encrypt_conf": conf }), "ParameterInvalid"),
        (json!({ "ttl": 5, "revision": 99, "encrypt_conf": conf }), "ParameterInvalid"),
        (json!({ "ttl": 0, "encrypt_conf": conf }), "LogStoreInfoInvalid"),
    ] {
        let refused = update(&body);
        assert_eq!((refused.status, refused.code()), (400, code.to_owned()), "{body}");
        assert_ne!(refused.json()["errorMessage"], "redundant key exist in json");
    }
    assert_eq!(world.ok("GET", "/logstores/one", &NULL).json()["ttl"], 30);
    world.ok("PUT", "/logstores/one", &json!({ "ttl": 5, "x": 1, "encrypt_conf": conf }));
    let off = json!({ "enable": false, "encrypt_type": "default" });
    world.ok("PUT", "/logstores/one", &json!({ "encrypt_conf": off }));
    let got = world.ok("GET", "/logstores/one", &NULL).json();
    assert_eq!((&got["ttl"], &got["x"], &got["encrypt_conf"]), (&json!(5), &json!(1), &off));
}

#[test]
fn a_caller_may_do_what_its_key_allows() {
    let world = World::new();
    world.create("one", &NULL);
    let cursor_of = "/logstores/one/shards/0?type=cursor&from=begin";
    let allowed = [
        (Ask::new("GET", "/logstores/one"), vec!["root", "reader", "writer", "admin"]),
        (Ask::new("GET", cursor_of), vec!["root", "reader"]),
        (Ask::new("GET", "/logstores/one/consumergroups"), vec!["root", "reader"]),
        (Ask::put("one", group("x")), vec!["root", "writer"]),
        (Ask::new("PUT", "/logstores/one").json("{}"), vec!["root", "admin"]),
    ];
    for (ask, who) in allowed {
        for key in ["root", "reader", "writer", "admin"] {
            let answer = ask.clone().by(key).send(&world);
            let expected = if who.contains(&key) { 200 } else { 401 };
            assert_eq!(answer.status, expected, "{key} {} {}", ask.method, ask.target);
        }
    }
    // Other projects are out of reach, also by the name in a body.
    let other = Ask { host: "other.sls.local".to_owned(), ..Ask::new("GET", "/") };
    assert_eq!(other.by("admin").refused(&world, 401), "Unauthorized");
    let body = json!({ "projectName": "other" }).to_string();
    let create = Ask::new("POST", "/").json(body);
    assert_eq!(create.by("admin").refused(&world, 401), "Unauthorized");
    // A list has only the projects of the caller.
    world.ok("POST", "/", &json!({ "projectName": "hidden" }));
    let list = Ask { host: "sls.local".to_owned(), ..Ask::new("GET", "/?offset=0&size=10") };
    assert_eq!(list.clone().send(&world).json()["total"], 2);
    assert_eq!(list.by("reader").send(&world).json()["projects"][0]["projectName"], "app");
    // A role may be passed only by who may pass it.
    let (_, conf) = world.byok();
    let create = Ask::new("POST", "/logstores");
    let create = create.json(json!({ "logstoreName": "two", "encrypt_conf": conf }).to_string());
    assert_eq!(create.clone().by("admin").refused(&world, 401), "Unauthorized");
    assert_eq!(world.call("GET", "/logstores/two", &NULL).code(), "LogStoreNotExist");
    assert_eq!(create.send(&world).status, 200);
}

#[test]
fn a_signature_that_is_wrong_or_late_is_refused_before_anything_is_stored() {
    let world = World::new();
    world.create("one", &NULL);
    let put = Ask::put("one", group("never"));
    let wrong = Ask { secret: "wrong".to_owned(), ..put.clone() };
    assert_eq!(wrong.refused(&world, 401), "SignatureNotMatch");
    assert_eq!(put.clone().by("nobody").refused(&world, 401), "InvalidAccessKeyId");
    for minutes in [-16, 16] {
        let time = put.time + SignedDuration::from_mins(minutes);
        assert_eq!(Ask { time, ..put.clone() }.refused(&world, 400), "RequestTimeTooSkewed");
    }
    assert_eq!(
        put.clone().header("x-acs-security-token", "t").refused(&world, 401),
        "Unauthorized"
    );
    // A body that is not the signed one.
    let mut request = put.signed();
    *request.last_mut().unwrap() ^= 1;
    assert_eq!(common::exchange(world.address, &request).code(), "SignatureNotMatch");
    // No signature at all.
    let unsigned = common::exchange(world.address, &put.raw(&put.headers));
    assert_eq!((unsigned.status, unsigned.code()), (401, "Unauthorized".to_owned()));
    assert!(world.pull_all("one").is_empty());
    // The key is taken away while the service runs.
    assert_eq!(put.send(&world).status, 200);
    let mut fewer = keys();
    fewer["keys"].as_array_mut().unwrap().remove(2);
    write_keys(&world.keys_path(), &fewer);
    let mut answer = put.clone().by("writer").send(&world);
    for _ in 0..100 {
        if answer.status == 401 {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        answer = put.clone().by("writer").send(&world);
    }
    assert_eq!(answer.code(), "InvalidAccessKeyId");
}

#[test]
fn each_fault_of_a_put_has_its_code_and_stores_nothing() {
    let world = World::new();
    world.create("one", &NULL);
    let good = group("x");
    let put = |body: Vec<u8>| Ask::put("one", body);
    let route = |query: &str| Ask {
        target: format!("/logstores/one/shards/route{query}"),
        ..put(good.clone())
    };
    for (ask, status, code) in [
        (put(good.clone()).without("content-type"), 400, "MissingContentType"),
        (put(good.clone()).header("content-type", "text/plain"), 415, "InvalidContentType"),
        (put(good.clone()).without("x-log-bodyrawsize"), 400, "MissingBodyRawSize"),
        (put(good.clone()).header("x-log-bodyrawsize", "-1"), 400, "ParameterInvalid"),
        (put(good.clone()).header("x-log-bodyrawsize", "7"), 400, "PostBodyInvalid"),
        (put(good.clone()).header("x-log-bodyrawsize", "10485761"), 413, "PostBodyTooLarge"),
        (put(good.clone()).header("x-log-compresstype", "snappy"), 400, "InvalidCompressType"),
        (put(good.clone()).header("x-log-compresstype", "lz4"), 400, "PostBodyUncompressError"),
        (put(good.clone()).header("x-log-mode", "batch_group"), 400, "NotSupported"),
        (put(b"\x0a\x05ab".to_vec()), 400, "PostBodyInvalid"),
        (put(Vec::new()), 400, "PostBodyInvalid"),
        (route(""), 400, "ParameterInvalid"),
        (route("?key=xyz"), 400, "ParameterInvalid"),
        (route(&format!("?key=+{}", "0".repeat(31))), 400, "ParameterInvalid"),
        (Ask::put("absent", good.clone()), 404, "LogStoreNotExist"),
        (put(vec![0; (10 << 20) + 1]), 413, "PostBodyTooLarge"),
    ] {
        assert_eq!(ask.refused(&world, status), code, "{:?}", ask.headers);
    }
    // The message has the limit of the call.
    let large = Ask::new("PUT", "/logstores/one").json(vec![b' '; (64 << 10) + 1]).send(&world);
    assert_eq!((large.status, &*large.code()), (413, "PostBodyTooLarge"));
    assert!(large.text().contains("Body size 65537 must little than 65536."), "{}", large.text());
    // A bomb: 10 MiB of zeros, announced as 1 KiB, and as more than the limit.
    let bomb = lz4_flex::block::compress(&vec![0; 10 << 20]);
    for (size, code) in [("1024", "PostBodyUncompressError"), ("1073741824", "PostBodyTooLarge")] {
        let ask = put(bomb.clone()).header("x-log-compresstype", "lz4");
        let answer = ask.header("x-log-bodyrawsize", size).send(&world);
        assert_eq!(answer.code(), code);
    }
    assert!(world.pull_all("one").is_empty());
}

#[test]
fn what_is_put_in_any_form_is_pulled_in_any_form() {
    let world = World::new();
    world.create("one", &json!({ "enable": true, "encrypt_type": "sm4" }));
    let raw = group(&"text ".repeat(1000));
    let forms: [(&str, Vec<u8>); 3] = [
        ("lz4", lz4_flex::block::compress(&raw)),
        ("zstd", zstd::bulk::compress(&raw, 1).unwrap()),
        ("deflate", {
            let mut encoder =
                flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(&raw).unwrap();
            encoder.finish().unwrap()
        }),
    ];
    let key = "0".repeat(32);
    for (form, body) in &forms {
        let ask = Ask {
            target: format!("/logstores/one/shards/route?key={key}"),
            ..Ask::put("one", body.clone())
        };
        let ask = ask
            .header("x-log-compresstype", form)
            .header("x-log-bodyrawsize", &raw.len().to_string());
        assert_eq!(ask.send(&world).status, 200, "{form}");
    }
    let begin = world.ok("GET", "/logstores/one/shards/0?type=cursor&from=begin", &NULL).json();
    let begin = begin["cursor"].as_str().unwrap();
    let mut list = Vec::new();
    (0..3).for_each(|_| envelog::group::put_frame(&mut list, &raw));
    for (accept, form) in [("", ""), ("lz4", "lz4"), ("zstd", "zstd"), ("gzip, deflate", "deflate")]
    {
        let answer = Ask::new("GET", &pull_target("one", 0, begin))
            .header("accept-encoding", accept)
            .send(&world);
        assert_eq!(answer.header("x-log-compresstype"), form);
        assert_eq!(
            (answer.header("x-log-count"), answer.header("content-type")),
            ("3", common::PROTOBUF)
        );
        let size: usize = answer.header("x-log-bodyrawsize").parse().unwrap();
        let body = match form {
            "lz4" => lz4_flex::block::decompress(&answer.body, size).unwrap(),
            "zstd" => zstd::bulk::decompress(&answer.body, size).unwrap(),
            "deflate" => {
                let mut raw = Vec::new();
                flate2::read::ZlibDecoder::new(&answer.body[..]).read_to_end(&mut raw).unwrap();
                raw
            }
            _ => answer.body,
        };
        assert!(body == list, "{form}: {} and {}", body.len(), list.len());
    }
}

#[test]
fn cursors_lead_through_a_shard_and_wrong_ones_are_refused() {
    let world = World::new();
    world.create("one", &NULL);
    let shard = "/logstores/one/shards/0";
    let cursor = |from: &str| {
        let answer = world.ok("GET", &format!("{shard}?type=cursor&from={from}"), &NULL).json();
        answer["cursor"].as_str().unwrap().to_owned()
    };
    assert_eq!(cursor("begin"), cursor("end"));
    let key = "0".repeat(32);
    for _ in 0..5 {
        let ask = Ask {
            target: format!("{shard}/../route?key={key}").replace("/0/..", ""),
            ..Ask::put("one", group("x"))
        };
        assert_eq!(ask.send(&world).status, 200);
    }
    let (begin, end) = (cursor("begin"), cursor("end"));
    assert_ne!(begin, end);
    assert_eq!((cursor("0"), cursor("99999999999")), (begin.clone(), end.clone()));
    // Two at a time, and not beyond an end.
    let pull = |cursor: &str, more: &str| {
        let target = pull_target("one", 0, cursor).replace("count=100", more);
        world.ok("GET", &target, &NULL)
    };
    let (mut at, mut counts) = (begin.clone(), Vec::new());
    while at != end {
        let answer = pull(&at, "count=2");
        counts.push(answer.header("x-log-count").to_owned());
        at = answer.header("x-log-cursor").to_owned();
    }
    assert_eq!(counts, ["2", "2", "1"]);
    let nothing = pull(&end, "count=2");
    assert_eq!((nothing.header("x-log-count"), nothing.header("x-log-bodyrawsize")), ("0", "0"));
    assert_eq!(nothing.header("x-log-cursor"), end);
    for name in ["end_cursor", "endCursor"] {
        let answer = pull(&begin, &format!("count=9&{name}={}", begin.replace('=', "%3D")));
        assert_eq!(answer.header("x-log-count"), "0");
    }
    let beyond = {
        use base64::{Engine, engine::general_purpose::STANDARD};
        let number: u64 =
            String::from_utf8(STANDARD.decode(&end).unwrap()).unwrap().parse().unwrap();
        STANDARD.encode((number + 1).to_string())
    };
    for (target, code) in [
        (pull_target("one", 0, "!!!!"), "ParameterInvalid"),
        (pull_target("one", 0, "MQ=="), "ParameterInvalid"),
        (pull_target("one", 0, &beyond), "ParameterInvalid"),
        (pull_target("one", 7, &begin), "ShardNotExist"),
        (pull_target("one", 0, &begin).replace("count=100", "count=0"), "ParameterInvalid"),
        (pull_target("one", 0, &begin).replace("count=100", "count=1001"), "ParameterInvalid"),
        (format!("{}&query=x", pull_target("one", 0, &begin)), "NotSupported"),
        (format!("{shard}?type=cursor&from=soon"), "ParameterInvalid"),
        (format!("{shard}?type=cursor"), "ParameterInvalid"),
        // The Python client knows this code alone.
        (format!("{shard}?type=cursor_time&cursor=MA=="), "InvalidCursor"),
    ] {
        assert_eq!(Ask::new("GET", &target).refused(&world, 400), code, "{target}");
    }
}

#[test]
fn a_pull_that_waits_gets_what_is_put_meanwhile() {
    let world = World::new();
    world.create("one", &NULL);
    let end = world.ok("GET", "/logstores/one/shards/0?type=cursor&from=end", &NULL).json();
    let target = format!("{}&wait=30000", pull_target("one", 0, end["cursor"].as_str().unwrap()));
    std::thread::scope(|threads| {
        let waiting = threads.spawn(|| world.ok("GET", &target, &NULL));
        for _ in 0..2 {
            assert_eq!(world.put("one", "x").status, 200);
        }
        assert_ne!(waiting.join().unwrap().header("x-log-count"), "0");
    });
}

#[test]
fn a_revoked_key_is_one_clear_refusal() {
    let world = World::new();
    let (key, conf) = world.byok();
    world.create("mine", &conf);
    world.create("other", &json!({ "enable": true, "encrypt_type": "default" }));
    assert_eq!(world.put("mine", "before").status, 200);
    let cursor = world.ok("GET", "/logstores/mine/shards/0?type=cursor&from=begin", &NULL).json();
    let pull = Ask::new("GET", &pull_target("mine", 0, cursor["cursor"].as_str().unwrap()));
    let now = jiff::Timestamp::now().as_second();
    let search = json!({ "from": now - 60, "to": now + 60, "query": "*" }).to_string();
    let search = Ask::new("POST", "/logstores/mine/logs").json(search);
    assert_eq!(search.send(&world).json()["meta"]["count"], 1);

    world.kms.disable(&key).unwrap();
    // 200 ms between questions to the KMS, and its time-out.
    std::thread::sleep(Duration::from_millis(1500));
    for ask in [Ask::put("mine", group("never")), pull.clone(), search.clone()] {
        let answer = ask.send(&world);
        assert_eq!((answer.status, answer.code()), (403, "KmsKeyRevoked".to_owned()));
        assert!(answer.text().contains("enable the key"), "{}", answer.text());
    }
    // Calls that need no key go on, and so does the other Logstore.
    world.ok("GET", "/logstores/mine", &NULL);
    assert_eq!(world.put("other", "x").status, 200);
    assert_eq!(world.pull_all("other"), ["x"]);

    world.kms.enable(&key).unwrap();
    let mut answer = pull.send(&world);
    for _ in 0..100 {
        if answer.status == 200 {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        answer = pull.send(&world);
    }
    assert_eq!(world.pull_all("mine"), ["before"]);
}

#[test]
fn an_outage_of_the_kms_asks_to_come_back() {
    let world = World::new();
    let (_, conf) = world.byok();
    world.create("mine", &conf);
    world.create("other", &json!({ "enable": true, "encrypt_type": "default" }));
    assert_eq!(world.put("mine", "before").status, 200);
    let (kms, away) = (world.dir.path().join("kms"), world.dir.path().join("away"));
    std::fs::rename(&kms, &away).unwrap();
    // The grace of 1 s, and the time-out of a call.
    std::thread::sleep(Duration::from_millis(2500));
    let answer = world.put("mine", "never");
    assert_eq!((answer.status, answer.code()), (503, "ServerBusy".to_owned()));
    assert_eq!(answer.header("retry-after"), "5");
    assert_eq!(world.put("other", "x").status, 200);
    std::fs::rename(&away, &kms).unwrap();
    let mut answer = world.put("mine", "after");
    for _ in 0..100 {
        if answer.status == 200 {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
        answer = world.put("mine", "after");
    }
    assert_eq!(world.pull_all("mine"), ["after", "before"]);
}

#[test]
fn a_key_that_cannot_be_used_makes_no_logstore() {
    let world = World::new();
    world.create("one", &NULL);
    let (key, conf) = world.byok();
    let create = |conf: &Value| {
        world.call("POST", "/logstores", &json!({ "logstoreName": "two", "encrypt_conf": conf }))
    };
    world.kms.disable(&key).unwrap();
    let refused = create(&conf);
    assert_eq!((refused.status, refused.code()), (403, "KmsKeyRevoked".to_owned()));
    let mut elsewhere = conf.clone();
    elsewhere["user_cmk_info"]["region_id"] = json!("nowhere");
    let refused = create(&elsewhere);
    assert!(refused.status == 400 && refused.text().contains("nowhere"), "{}", refused.text());
    assert_eq!(world.call("GET", "/logstores/two", &NULL).code(), "LogStoreNotExist");
    assert_eq!(world.ok("GET", "/logstores", &NULL).json()["total"], 1);
}

#[test]
fn consumer_groups_keep_checkpoints_and_say_who_owns_a_shard() {
    let world = World::new();
    world.create("one", &NULL);
    let groups = "/logstores/one/consumergroups";
    let group = &format!("{groups}/g%20%C3%A9");
    assert_eq!(world.call("GET", group, &NULL).code(), "ConsumerGroupNotExist");
    let body = json!({ "consumerGroup": "g é", "timeout": 6.0, "order": true });
    world.ok("POST", groups, &body);
    assert_eq!(world.call("POST", groups, &body).code(), "ConsumerGroupAlreadyExist");
    assert_eq!(world.call("POST", groups, &json!({ "timeout": 6 })).code(), "JsonInfoInvalid");
    world.ok("PUT", group, &json!({ "timeout": 20 }));
    let list = world.ok("GET", groups, &NULL).json();
    assert_eq!(list, json!([{ "name": "g é", "timeout": 20, "order": true }]));

    let beat = |consumer: &str, held: Value| {
        world.call("POST", &format!("{group}?type=heartbeat&consumer={consumer}"), &held)
    };
    assert_eq!(beat("c", json!([])).json(), json!([0, 1]));
    assert_eq!(beat("d", json!([])).json(), json!([]));
    assert_eq!(beat("e", json!([0])).code(), "NotExistConsumerWithBody");
    assert_eq!(beat("c", json!([0, 1])).json(), json!([0]));
    assert_eq!(beat("c", json!("x")).code(), "JsonInfoInvalid");

    let set = |query: &str, body: Value| {
        world.call("POST", &format!("{group}?type=checkpoint&{query}"), &body)
    };
    let checkpoint = json!({ "shard": 1, "checkpoint": "MTIz" });
    assert_eq!(set("consumer=d", checkpoint.clone()).code(), "ConsumerNotMatch");
    assert_eq!(set("consumer=x", checkpoint.clone()).code(), "ConsumerNotExsit");
    assert_eq!(set("consumer=c&forceSuccess=False", checkpoint.clone()).status, 200);
    assert_eq!(
        set("consumer=&forceSuccess=True", json!({ "shard": 0, "checkpoint": "MQ==" })).status,
        200
    );
    let absent = set("forceSuccess=true", json!({ "shard": 9, "checkpoint": "MQ==" }));
    assert_eq!((absent.status, absent.code()), (404, "ShardNotExist".to_owned()));
    assert_eq!(
        set("forceSuccess=true", json!({ "shard": 0, "checkpoint": "!" })).code(),
        "InvalidShardCheckPoint"
    );
    let one = world.ok("GET", &format!("{group}?shard=1"), &NULL).json();
    assert_eq!((&one[0]["checkpoint"], &one[0]["consumer"]), (&json!("MTIz"), &json!("c")));
    assert!(one[0]["updateTime"].as_u64().unwrap() > 1_700_000_000_000_000);
    assert_eq!(world.ok("GET", &format!("{group}?shard=9"), &NULL).json(), json!([]));
    assert_eq!(world.ok("GET", group, &NULL).json().as_array().unwrap().len(), 2);
    world.ok("DELETE", group, &NULL);
    world.ok("POST", groups, &body);
    assert_eq!(world.ok("GET", group, &NULL).json()[1]["checkpoint"], "");
}

#[test]
fn logs_are_found_by_time_and_words() {
    let world = World::new();
    world.create("one", &NULL);
    for text in ["GET /a 200", "GET /b 404", "POST /a 200"] {
        assert_eq!(world.put("one", text).status, 200);
    }
    let now = jiff::Timestamp::now().as_second();
    let search = |more: Value| {
        let mut body = json!({ "from": now - 60, "to": now + 60, "line": 10 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = world.call("POST", "/logstores/one/logs", &body);
        let texts: Vec<String> = match answer.status {
            200 => answer.json()["data"]
                .as_array()
                .unwrap()
                .iter()
                .map(|log| log["text"].as_str().unwrap().to_owned())
                .collect(),
            _ => vec![answer.code()],
        };
        texts
    };
    assert_eq!(search(json!({ "query": "get and not 404" })), ["GET /a 200"]);
    assert_eq!(search(json!({ "query": "\"/a 200\"" })).len(), 2);
    let all = search(json!({ "query": "*" }));
    let (first, rest) = (search(json!({ "line": 1 })), search(json!({ "offset": 1 })));
    assert_eq!([first, rest].concat(), all);
    let mut reversed = search(json!({ "reverse": true }));
    reversed.reverse();
    assert_eq!(reversed, all);
    assert!(search(json!({ "from": 0, "to": 100 })).is_empty());
    for refused in
        [json!({ "query": "* | select 1" }), json!({ "line": 101 }), json!({ "from": now + 99 })]
    {
        assert_eq!(search(refused), ["ParameterInvalid"]);
    }
    let query =
        format!("/logstores/one?type=histogram&from={}&to={}&query=get", now - 60, now + 60);
    let answer = world.ok("GET", &query, &NULL);
    assert_eq!((answer.header("x-log-progress"), answer.header("x-log-count")), ("Complete", "2"));
    let total: u64 =
        answer.json().as_array().unwrap().iter().map(|it| it["count"].as_u64().unwrap()).sum();
    assert_eq!(total, 2);
    let query = query.replace("histogram", "log");
    assert_eq!(world.ok("GET", &query, &NULL).json().as_array().unwrap().len(), 2);
}

#[test]
fn encryption_is_updated_alone_and_its_fixed_parts_are_kept() {
    let world = World::new();
    let (_, byok) = world.byok();
    world.create("service", &json!({ "enable": true, "encrypt_type": "sm4" }));
    world.create("byok", &byok);
    world.create("none", &NULL);
    let put = |logstore: &str, body: Value| {
        world.call("PUT", &format!("/logstores/{logstore}/encryption"), &body)
    };
    let conf = |logstore: &str| {
        let got = world.ok("GET", &format!("/logstores/{logstore}"), &NULL).json();
        got.get("encrypt_conf").cloned().unwrap_or_default()
    };
    let cmk = &byok["user_cmk_info"];
    let info =
        json!({ "keyId": cmk["cmk_key_id"], "roleArn": cmk["arn"], "regionId": cmk["region_id"] });
    let others = json!({ "keyId": "another", "roleArn": cmk["arn"], "regionId": cmk["region_id"] });
    // Neither method, nor algorithm, nor key can be switched.
    for (logstore, body, status, code) in [
        ("service", json!({ "enable": true, "userCmkInfo": info }), 400, "ParameterInvalid"),
        ("service", json!({ "enable": true, "encryptType": "default" }), 400, "ParameterInvalid"),
        ("byok", json!({ "enable": false, "userCmkInfo": others }), 400, "ParameterInvalid"),
        ("byok", json!({ "enable": false, "revision": 99 }), 400, "ParameterInvalid"),
        ("none", json!({ "enable": true }), 400, "LogStoreInfoInvalid"),
        ("none", json!({ "enable": true, "encryptType": "rot13" }), 400, "LogStoreInfoInvalid"),
        ("none", json!({ "enable": true, "encrypt_type": "sm4" }), 400, "PostBodyInvalid"),
        ("missing", json!({ "enable": false }), 404, "LogStoreNotExist"),
    ] {
        let before = (conf("service"), conf("byok"), conf("none"));
        let answer = put(logstore, body.clone());
        assert_eq!((answer.status, &*answer.code()), (status, code), "{logstore} {body}");
        assert_eq!((conf("service"), conf("byok"), conf("none")), before, "{logstore} {body}");
    }
    for enable in [false, true] {
        assert_eq!(put("service", json!({ "enable": enable })).status, 200);
        assert_eq!(conf("service"), json!({ "enable": enable, "encrypt_type": "sm4" }));
        let whole = json!({ "enable": enable, "encryptType": "sm4", "userCmkInfo": info });
        assert_eq!(put("byok", whole).status, 200);
        assert_eq!(
            (&conf("byok")["enable"], &conf("byok")["user_cmk_info"]),
            (&json!(enable), cmk)
        );
    }
    let revision = world.ok("GET", "/logstores/none", &NULL).json()["revision"].clone();
    let new =
        json!({ "enable": true, "encryptType": "sm4", "userCmkInfo": info, "revision": revision });
    // A role may be passed only by who may pass it.
    let ask = Ask::new("PUT", "/logstores/none/encryption").json(new.to_string());
    assert_eq!(ask.by("admin").refused(&world, 401), "Unauthorized");
    assert_eq!(put("none", new.clone()).status, 200);
    assert_eq!(conf("none"), byok);
    assert_eq!(put("none", new).status, 400, "the revision is outdated");
}

#[test]
fn a_key_over_its_limits_waits_and_others_do_not() {
    let world = World::new();
    world.create("one", &NULL);
    let with_limits = |limits: Value| {
        let mut keys = keys();
        for id in [1, 2] {
            keys["keys"][id]["limits"] = limits.clone();
        }
        write_keys(&world.keys_path(), &keys);
    };
    // The service looks for new limits every second.
    let in_the_end = |ask: &Ask, wanted: &dyn Fn(&Answer) -> bool| loop {
        let answer = ask.send(&world);
        if wanted(&answer) {
            return answer;
        }
    };
    with_limits(json!({ "requests_per_s": 1 }));
    let list = Ask::new("GET", "/logstores/one/shards").by("reader");
    let refused = in_the_end(&list, &|answer| answer.status == 403);
    assert_eq!((&*refused.code(), refused.header("retry-after")), ("ReadQuotaExceed", "1"));
    let put = Ask::put("one", group("x")).by("writer");
    let refused = in_the_end(&put, &|answer| answer.status == 403);
    assert_eq!(refused.code(), "WriteQuotaExceed");
    // Neither another key, nor a call whose signature is wrong.
    assert!((0..5).all(|_| list.clone().by("root").send(&world).status == 200));
    let forged = Ask { secret: "a guess".to_owned(), ..list.clone() };
    assert_eq!(forged.refused(&world, 401), "SignatureNotMatch");

    // The body of one put is more than the allowance of a minute.
    with_limits(json!({ "bytes_per_s": 1000 }));
    let large = Ask::put("one", group(&"x".repeat(100_000))).by("writer");
    let refused = in_the_end(&large, &|answer| {
        answer.status == 403 && answer.header("retry-after").len() > 1
    });
    assert_eq!(refused.code(), "WriteQuotaExceed");
    let get = Ask::new("GET", "/metrics").send(&world).text();
    let limited =
        get.lines().find(|line| line.starts_with("envelog_serve_limited_total ")).unwrap();
    let limited: u64 = limited.rsplit_once(' ').unwrap().1.parse().unwrap();
    assert!(limited >= 3, "{limited}");
}

#[test]
fn a_service_without_commands_administers_nothing() {
    let world = World::new();
    let ask = Ask { host: "sls.local".to_owned(), ..Ask::new("POST", "/admin").json("{}") };
    assert_eq!(ask.refused(&world, 400), "NotSupported");
    assert_eq!(ask.clone().by("reader").refused(&world, 401), "Unauthorized");
    // It is a path of the service, not of a project.
    assert_eq!(Ask::new("POST", "/admin").json("{}").refused(&world, 400), "NotSupported");
}

/// Lets the commands end that wait.
static GO: AtomicBool = AtomicBool::new(false);

#[derive(Debug)]
struct Echo;

impl Administration for Echo {
    fn command(&self, body: &[u8]) -> Result<Box<dyn AdminCommand>, String> {
        Ok(Box::new(EchoCommand(String::from_utf8(body.to_vec()).map_err(|it| it.to_string())?)))
    }
}

/// Answers with its body, and waits if that says so.
struct EchoCommand(String);

impl AdminCommand for EchoCommand {
    fn logstore(&self) -> Option<LogstoreName> {
        None
    }

    fn roles(&self) -> Vec<String> {
        Vec::new()
    }

    fn describe(&self) -> String {
        "echo".to_owned()
    }

    fn run(self: Box<Self>, _: &Store, output: AdminOutput) {
        output.send(&self.0);
        while self.0.contains("wait") && !GO.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn commands_need_a_fresh_signature_of_version_4_and_their_number_is_limited() {
    let world = World::with(|builder| builder.administration(Arc::new(Echo)));
    // A service admits what was signed after the second in which it started.
    std::thread::sleep(Duration::from_millis(1100));
    let ask = Ask { host: "sls.local".to_owned(), ..Ask::new("POST", "/admin").json("{}") };
    let refused = ask.send(&world);
    assert!(refused.status == 401 && refused.text().contains("version 4"), "{}", refused.text());
    let signed = |body: &str| {
        let key = Key { id: "root".to_owned(), secret: common::secret("root").into() };
        let (method, now) = (Method::POST, std::time::SystemTime::now());
        let headers =
            sign(&key, &method, "sls.local", "/admin", &nonce().unwrap(), body.as_bytes(), now);
        let headers: Vec<_> =
            headers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        Ask { body: body.as_bytes().to_vec(), ..ask.clone() }.raw(&headers)
    };
    let answer = common::exchange(world.address, &signed("\"one\""));
    assert_eq!(answer.status, 200, "{}", answer.text());
    assert!(answer.text().contains("\"one\"\n"), "{}", answer.text());
    let waiting: Vec<_> = (0..4)
        .map(|_| {
            let mut stream = TcpStream::connect(world.address).unwrap();
            stream.write_all(&signed("\"wait\"")).unwrap();
            let mut first = [0; 12];
            stream.read_exact(&mut first).unwrap();
            assert_eq!(&first, b"HTTP/1.1 200");
            stream
        })
        .collect();
    let refused = common::exchange(world.address, &signed("\"five\""));
    assert_eq!((refused.status, &*refused.code()), (503, "ServerBusy"));
    // Other calls go on, and a command frees its place at its end, also without its client.
    world.ok("POST", "/", &json!({ "projectName": "app" }));
    drop(waiting);
    GO.store(true, Ordering::Relaxed);
    while common::exchange(world.address, &signed("\"six\"")).status != 200 {}
}

#[test]
fn operators_see_health_and_metrics_without_a_signature() {
    let world = World::new();
    world.create("one", &NULL);
    let get = |path: &str| {
        let ask = Ask::new("GET", path);
        common::exchange(world.address, &ask.raw(&[]))
    };
    assert_eq!((get("/healthz").status, get("/readyz").text()), (200, "ready\n".to_owned()));
    let metrics = get("/metrics").text();
    for word in
        ["envelog_serve_requests_total ", "envelog_serve_connections ", "envelog_kms_call_seconds"]
    {
        assert!(metrics.contains(word), "{word}: {metrics}");
    }
    assert!(metrics.ends_with("# EOF\n") && metrics.matches("# EOF").count() == 1);
    // A page of another site reads nothing by a name of its own for this machine.
    let from = |host: &str, path: &str| {
        let ask = Ask { host: host.to_owned(), ..Ask::new("GET", path) };
        common::exchange(world.address, &ask.raw(&[])).status
    };
    for path in ["/metrics", "/console", "/console/main.js"] {
        for host in ["evil.example:8099", "", "sls.local.evil.example"] {
            assert_eq!(from(host, path), 400, "{host} {path}");
        }
        for host in ["127.0.0.1:8099", "[::1]:8099", "localhost", "sls.local:8099"] {
            assert_eq!(from(host, path), 200, "{host} {path}");
        }
    }
    assert_eq!((from("evil.example", "/healthz"), from("", "/readyz")), (200, 200));
}

#[test]
fn a_base_host_is_a_host_name() {
    let bind = |name: &str| Server::builder().base_host(name).bind("127.0.0.1:0".parse().unwrap());
    for name in ["", "http://x", "a b", "x:8099", "a..b", ".a", "é", &"a.".repeat(130)] {
        let refusal = bind(name).map(drop).unwrap_err().to_string();
        assert!(refusal.contains("base_host"), "{name}: {refusal}");
    }
    for name in ["sls.local", "Logs.Example-1.org", "127.0.0.1", "localhost"] {
        bind(name).unwrap();
    }
}

#[test]
fn an_encryption_is_a_json_object() {
    let world = World::new();
    world.create("one", &json!({ "enable": true, "encrypt_type": "sm4" }));
    for conf in [
        json!([true, "sm4"]),
        json!([]),
        json!("sm4"),
        json!({ "enable": true,
        "encrypt_type": "sm4", "user_cmk_info": ["k", "a", "r"] }),
    ] {
        let body = json!({ "logstoreName": "two", "ttl": 1, "encrypt_conf": conf });
        let ask = Ask::new("POST", "/logstores").json(body.to_string());
        assert_eq!(ask.refused(&world, 400), "LogStoreInfoInvalid", "{conf}");
    }
    let put = |body: &str| Ask::new("PUT", "/logstores/one/encryption").json(body);
    assert_eq!(put("[false, \"sm4\"]").refused(&world, 400), "PostBodyInvalid");
    assert_eq!(put("{}").send(&world).status, 200);
    let get = world.ok("GET", "/logstores/one", &NULL).json();
    assert_eq!(get["encrypt_conf"]["enable"], json!(true));
}

#[test]
fn a_stop_lets_calls_end_and_loses_nothing() {
    let mut world = World::new();
    world.create("one", &NULL);
    let end = world.ok("GET", "/logstores/one/shards/0?type=cursor&from=end", &NULL).json();
    let target = format!("{}&wait=30000", pull_target("one", 0, end["cursor"].as_str().unwrap()));
    let request = Ask::new("GET", &target).signed();
    // One call waits for logs, one connection idles, and one has sent half of a request.
    let address = world.address;
    let waiting = std::thread::spawn(move || common::exchange(address, &request));
    let _idle = TcpStream::connect(address).unwrap();
    let body = vec![b'x'; 100];
    let put = Ask::put("one", group(&String::from_utf8(body).unwrap())).signed();
    let mut half = TcpStream::connect(address).unwrap();
    half.write_all(&put[..put.len() - 10]).unwrap();
    std::thread::sleep(Duration::from_millis(300));
    std::thread::scope(|threads| {
        let stopping = threads.spawn(|| world.stop());
        std::thread::sleep(Duration::from_millis(300));
        half.write_all(&put[put.len() - 10..]).unwrap();
        let mut answer = Vec::new();
        half.read_to_end(&mut answer).unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
        stopping.join().unwrap();
    });
    let pulled = waiting.join().unwrap();
    assert!(pulled.status == 200 && ["0", "1"].contains(&pulled.header("x-log-count")));
    let logstore = world.store.logstore(&"app/one".parse().unwrap()).unwrap();
    let groups: usize =
        (0..2).map(|shard| logstore.read(shard, &Default::default()).unwrap().count()).sum();
    assert_eq!(groups, 1);
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn off_loopback_nothing_is_open_by_default() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys.json");
    write_keys(&path, &keys());
    let bind = |builder: ServerBuilder| {
        builder.bind("0.0.0.0:0".parse().unwrap()).map(drop).map_err(|it| it.to_string())
    };
    let builder = Server::builder;
    assert!(bind(builder().plain_http(true)).unwrap_err().contains("--access-keys"));
    assert!(bind(builder().access_keys(&path)).unwrap_err().contains("--tls-cert"));
    bind(builder().access_keys(&path).plain_http(true)).unwrap();
}
