//! Splits and merges of shards through the service, and the consumer groups that read them.

#![allow(clippy::unwrap_used)]

mod common;

use std::time::{Duration, Instant};

use common::{Ask, World, group, pull_target};
use serde_json::{Value, json};

const NULL: Value = Value::Null;
const MIDDLE: &str = "80000000000000000000000000000000";
const QUARTER: &str = "40000000000000000000000000000000";

/// A service with the Logstore `one` of two shards.
fn world() -> World {
    let world = World::new();
    world.create("one", &NULL);
    world
}

fn change(world: &World, shard: &str, query: &str) -> common::Answer {
    world.call("POST", &format!("/logstores/one/shards/{shard}?action={query}"), &NULL)
}

/// The numbers of the shards in an answer, and whether each is read-only.
fn numbers(shards: &Value) -> Vec<(u64, bool)> {
    let shards = shards.as_array().unwrap().iter();
    shards.map(|it| (it["shardID"].as_u64().unwrap(), it["status"] == "readonly")).collect()
}

fn list(world: &World) -> Value {
    world.ok("GET", "/logstores/one/shards", &NULL).json()
}

fn put_by_key(world: &World, key: &str, text: &str) {
    let mut ask = Ask::put("one", group(text));
    ask.target = format!("/logstores/one/shards/route?key={key}");
    let answer = ask.send(world);
    assert_eq!(answer.status, 200, "{}", answer.text());
}

fn cursor(world: &World, shard: u32, from: &str) -> String {
    let target = format!("/logstores/one/shards/{shard}?type=cursor&from={from}");
    world.ok("GET", &target, &NULL).json()["cursor"].as_str().unwrap().to_owned()
}

/// The number of groups in a shard.
fn count(world: &World, shard: u32) -> usize {
    let begin = cursor(world, shard, "begin");
    let answer = world.ok("GET", &pull_target("one", shard, &begin), &NULL);
    answer.header("x-log-count").parse().unwrap()
}

#[test]
fn a_split_and_a_merge_answer_as_the_service_does() {
    let world = world();
    put_by_key(&world, &"0".repeat(32), "before");
    let split = change(&world, "0", &format!("split&key={QUARTER}"));
    assert_eq!(split.status, 200, "{}", split.text());
    let split = split.json();
    assert_eq!(numbers(&split), [(0, true), (2, false), (3, false)]);
    assert_eq!(split[1]["exclusiveEndKey"], QUARTER);
    assert_eq!(split[2]["inclusiveBeginKey"], QUARTER);
    assert_eq!(split[2]["exclusiveEndKey"], MIDDLE);
    assert!(split[1]["createTime"].as_u64().unwrap() > 1_700_000_000);
    put_by_key(&world, &"0".repeat(32), "low");
    put_by_key(&world, QUARTER, "high");
    put_by_key(&world, &"F".repeat(32), "other");
    assert_eq!([0, 1, 2, 3].map(|shard| count(&world, shard)), [1, 1, 1, 1]);

    let merge = change(&world, "3", "merge").json();
    assert_eq!(numbers(&merge), [(4, false), (3, true), (1, true)]);
    assert_eq!(
        numbers(&list(&world)),
        [(0, true), (1, true), (2, false), (3, true), (4, false)],
        "read-only shards are listed while they may have data"
    );
    // An empty key splits in the middle.
    let even = change(&world, "2", "split&key=").json();
    assert_eq!(even[1]["exclusiveEndKey"], "20000000000000000000000000000000");
    assert_eq!(world.ok("GET", "/logstores/one", &NULL).json()["shardCount"], 3);
    world.ok("PUT", "/logstores/one", &json!({ "ttl": 9, "shardCount": 3 }));
    for _ in 0..6 {
        assert_eq!(world.put("one", "by load balancing").status, 200);
    }
    assert_eq!([0, 1, 2, 3].map(|shard| count(&world, shard)), [1, 1, 1, 1]);
    assert_eq!([4, 5, 6].map(|shard| count(&world, shard)), [2, 2, 2]);
}

#[test]
fn what_cannot_be_split_or_merged_is_refused() {
    let world = world();
    change(&world, "0", "split&key=");
    for (shard, query) in [
        ("9", "split&key="),
        ("x", "split&key="),
        ("4294967296", "merge"),
        ("0", "split&key="),
        ("0", "merge"),
        ("1", "merge"),
        ("1", "split&key=80"),
        ("1", &*format!("split&key={MIDDLE}")),
        ("1", &*format!("split&key={}", "f".repeat(32))),
        ("1", &*format!("split&key={}", "g".repeat(32))),
        ("1", "split&shardCount=3"),
        ("1", "grow"),
        ("1", ""),
    ] {
        let refused = change(&world, shard, query);
        let (status, code) = (refused.status, refused.code());
        assert_eq!((status, &*code), (400, "ParameterInvalid"), "{shard} {query}");
    }
    let refused = change(&world, "9", "merge");
    assert!(refused.text().contains("invalid shard id"), "{}", refused.text());
    let missing = world.call("POST", "/logstores/two/shards/0?action=split", &NULL);
    assert_eq!((missing.status, missing.code()), (404, "LogStoreNotExist".to_owned()));
    for key in ["reader", "writer"] {
        let split = Ask::new("POST", "/logstores/one/shards/1?action=split").by(key);
        assert_eq!(split.refused(&world, 401), "Unauthorized");
    }
    let delete = world.call("DELETE", "/logstores/one/shards/0", &NULL);
    assert_eq!(delete.code(), "NotSupported");
    assert_eq!(list(&world).as_array().unwrap().len(), 4);
}

#[test]
fn a_pull_at_the_end_of_a_parent_waits_for_nothing() {
    let world = world();
    put_by_key(&world, &"0".repeat(32), "before");
    change(&world, "0", "split&key=");
    let (begin, end) = (cursor(&world, 0, "begin"), cursor(&world, 0, "end"));
    let first = world.ok("GET", &pull_target("one", 0, &begin), &NULL);
    assert_eq!((first.header("x-log-count"), first.header("x-log-cursor")), ("1", &*end));
    let began = Instant::now();
    let at_end = format!("{}&wait=30000", pull_target("one", 0, &end));
    let at_end = world.ok("GET", &at_end, &NULL);
    assert_eq!((at_end.header("x-log-count"), at_end.header("x-log-cursor")), ("0", &*end));
    assert!(began.elapsed() < Duration::from_secs(30), "it has waited for the whole time");
}

/// A group, as its consumers see it.
struct Group<'a>(&'a World, String);

impl<'a> Group<'a> {
    fn new(world: &'a World, name: &str, order: bool) -> Self {
        let body = json!({ "consumerGroup": name, "timeout": 60, "order": order });
        world.ok("POST", "/logstores/one/consumergroups", &body);
        Self(world, format!("/logstores/one/consumergroups/{name}"))
    }

    fn beat(&self, held: &[u64]) -> Vec<u64> {
        let target = format!("{}?type=heartbeat&consumer=c", self.1);
        let answer = self.0.ok("POST", &target, &json!(held)).json();
        answer.as_array().unwrap().iter().map(|it| it.as_u64().unwrap()).collect()
    }

    fn save(&self, shard: u32, cursor: &str) {
        let target = format!("{}?type=checkpoint&consumer=c&forceSuccess=True", self.1);
        self.0.ok("POST", &target, &json!({ "shard": shard, "checkpoint": cursor }));
    }

    fn checkpoint(&self, shard: u32) -> String {
        let answer = self.0.ok("GET", &format!("{}?shard={shard}", self.1), &NULL).json();
        answer[0]["checkpoint"].as_str().unwrap().to_owned()
    }
}

#[test]
fn a_group_with_order_reads_the_parents_first() {
    let world = world();
    put_by_key(&world, &"0".repeat(32), "before");
    let group = Group::new(&world, "ordered", true);
    assert_eq!(group.beat(&[]), [0, 1]);
    change(&world, "0", "split&key=");
    assert_eq!(group.beat(&[0, 1]), [0, 1], "the children wait for the checkpoint of their parent");
    group.save(0, &cursor(&world, 0, "begin"));
    assert_eq!(group.beat(&[0, 1]), [0, 1], "which is not at its end yet");
    // The child is split too, before its parent is read.
    put_by_key(&world, &"0".repeat(32), "in the child");
    change(&world, "2", "split&key=");
    group.save(0, &cursor(&world, 0, "end"));
    assert_eq!(group.beat(&[0, 1]), [1, 2, 3]);
    group.save(2, &cursor(&world, 2, "end"));
    assert_eq!(group.beat(&[1, 2, 3]), [1, 3, 4, 5]);
    change(&world, "5", "merge");
    // Neither has data, so neither has to be read.
    assert_eq!(group.beat(&[1, 3, 4, 5]), [1, 4, 6]);
}

/// A child that waits for its grandparent does so also if its parent has nothing to read.
#[test]
fn an_empty_parent_does_not_hide_an_unread_grandparent() {
    let world = world();
    put_by_key(&world, &"0".repeat(32), "before");
    let group = Group::new(&world, "ordered", true);
    change(&world, "0", "split&key=");
    change(&world, "2", "split&key=");
    assert_eq!(group.beat(&[]), [0, 1]);
    group.save(0, &cursor(&world, 0, "end"));
    assert_eq!(group.beat(&[0, 1]), [1, 3, 4, 5]);
}

#[test]
fn a_group_without_order_gets_the_children_at_once() {
    let world = world();
    put_by_key(&world, &"0".repeat(32), "before");
    let group = Group::new(&world, "unordered", false);
    assert_eq!(group.beat(&[]), [0, 1]);
    change(&world, "0", "split&key=");
    assert_eq!(group.beat(&[0, 1]), [0, 1, 2, 3]);
    group.save(0, &cursor(&world, 0, "end"));
    assert_eq!(group.beat(&[0, 1, 2, 3]), [1, 2, 3], "nothing is left to read in the parent");
}

/// A consumer that begins at the end of unknown shards must not skip what a child has received
/// before the consumer knows it.
#[test]
fn a_group_begins_with_the_first_log_of_a_child() {
    let mut world = world();
    let before = Group::new(&world, "before", true).1;
    change(&world, "0", "split&key=");
    put_by_key(&world, &"0".repeat(32), "in the child");
    let group = Group(&world, before.clone());
    assert_eq!(group.checkpoint(2), cursor(&world, 2, "begin"));
    assert_ne!(group.checkpoint(2), cursor(&world, 2, "end"));
    assert_eq!(group.checkpoint(1), "");
    let after = Group::new(&world, "after", true);
    assert_eq!(after.checkpoint(2), "", "the consumer says where a new group begins");
    // A service that died behind the split has stored no checkpoint. The group has read the parent.
    after.save(0, &cursor(&world, 0, "end"));
    assert_eq!(after.checkpoint(2), cursor(&world, 2, "begin"));
    let begin = cursor(&world, 2, "begin");
    world.stop();
    let (address, stop, serving) = common::start(
        envelog_server::Server::builder().access_keys(world.keys_path()),
        world.store.clone(),
    );
    world.address = address;
    assert_eq!(Group(&world, before).checkpoint(2), begin, "it is durable");
    let _ = stop.send(());
    serving.join().unwrap();
}
