//! Many producers and consumers at once, while the service is killed and started again.
//!
//! Each producer puts numbered groups, and never the same one twice: a put whose answer does not
//! come may be stored or not, but once at most. Each consumer follows one shard from its begin. At
//! the end all consumers of a shard must have seen the same groups in the same order, those of a
//! producer in the order in which it sent them, none twice, each as it was put, and every one that
//! was acknowledged.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    io::stdin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use aliyun_log_rust_sdk::{Client, EncryptConf};
use serde_json::json;
use tokio::{task::JoinHandle, time::sleep};

use crate::{begin, client, group, texts};

const PROJECT: &str = "load";
const LOGSTORES: [&str; 2] = ["mine", "other"];
const SHARDS: i32 = 4;
const LOGS: u64 = 3;
/// After how many acknowledged groups a line is printed.
const TOLD_EVERY: u64 = 200;
const AGAIN_AFTER: Duration = Duration::from_millis(50);

/// A group, by its producer and its number there.
type Id = (usize, u64);

/// What a producer or a consumer has to do with a shard.
type Shard = (&'static str, i32);

#[derive(Default)]
struct Progress {
    stop: AtomicBool,
    acknowledged: AtomicU64,
}

pub(crate) async fn run(conf: &EncryptConf, producers: usize, consumers: usize) {
    let client = Arc::new(client());
    client.create_project(PROJECT).description("").send().await.unwrap();
    let service_key = EncryptConf::new(true, "default");
    for (logstore, conf) in LOGSTORES.into_iter().zip([conf, &service_key]) {
        let create = client.create_logstore(PROJECT, logstore).shard_count(SHARDS).ttl(3);
        create.encrypt_conf(conf.clone()).send().await.unwrap();
    }
    let progress = Arc::new(Progress::default());
    let producing: Vec<JoinHandle<Produced>> = (0..producers)
        .map(|number| tokio::spawn(produce(Arc::clone(&client), Arc::clone(&progress), number)))
        .collect();
    let consuming: Vec<(Shard, JoinHandle<Vec<Id>>)> = (0..consumers)
        .map(|number| {
            let shard = (LOGSTORES[number % 2], (number / 2) as i32 % SHARDS);
            let consumer = consume(Arc::clone(&client), Arc::clone(&progress), shard);
            (shard, tokio::spawn(consumer))
        })
        .collect();
    println!("ready");
    let stop = Arc::clone(&progress);
    std::thread::spawn(move || {
        stdin().lines().for_each(drop);
        stop.stop.store(true, Ordering::SeqCst);
    });
    let mut produced = Vec::new();
    for producer in producing {
        produced.push(producer.await.unwrap());
    }
    let mut consumed: BTreeMap<Shard, Vec<Vec<Id>>> = BTreeMap::new();
    for (shard, consumer) in consuming {
        consumed.entry(shard).or_default().push(consumer.await.unwrap());
    }
    check(&produced, &consumed);
    let groups: usize = consumed.values().map(|of_shard| of_shard[0].len()).sum();
    let acknowledged: usize = produced.iter().map(|it| it.acknowledged.len()).sum();
    let unanswered: usize = produced.iter().map(|it| it.unanswered).sum();
    println!(
        "{}",
        json!({ "acknowledged": acknowledged, "unanswered": unanswered, "stored": groups })
    );
}

/// What became of the groups of a producer.
#[derive(Default)]
struct Produced {
    acknowledged: BTreeSet<u64>,
    unanswered: usize,
    sent: u64,
}

/// The texts of a group follow from its id, so that a change of them shows.
fn texts_of((producer, number): Id) -> Vec<String> {
    let padding = "abcdefghij".repeat((number % 40) as usize);
    (0..LOGS).map(|log| format!("{producer} {number} {log} {padding}")).collect()
}

async fn produce(client: Arc<Client>, progress: Arc<Progress>, producer: usize) -> Produced {
    let mut produced = Produced::default();
    while !progress.stop.load(Ordering::SeqCst) {
        let number = produced.sent;
        produced.sent += 1;
        let texts = texts_of((producer, number));
        let group = group(texts.iter().map(String::as_str));
        let put = client.put_logs(PROJECT, LOGSTORES[producer % 2]).log_group(group);
        if put.send().await.is_err() {
            produced.unanswered += 1;
            sleep(AGAIN_AFTER).await;
            continue;
        }
        produced.acknowledged.insert(number);
        let all = progress.acknowledged.fetch_add(1, Ordering::SeqCst) + 1;
        if all.is_multiple_of(TOLD_EVERY) {
            println!("{all}");
        }
    }
    produced
}

/// Follows a shard. Ends at its end after the producers have stopped.
async fn consume(
    client: Arc<Client>,
    progress: Arc<Progress>,
    (logstore, shard): Shard,
) -> Vec<Id> {
    let mut cursor = loop {
        match begin(&client, PROJECT, logstore, shard).await {
            Ok(cursor) => break cursor,
            Err(_) => sleep(AGAIN_AFTER).await,
        }
    };
    let mut seen = Vec::new();
    let mut last_looks = 0;
    loop {
        let is_over = progress.stop.load(Ordering::SeqCst);
        let pull = client.pull_logs(PROJECT, logstore, shard).cursor(&cursor).count(100);
        let Ok(pulled) = pull.send().await else {
            sleep(AGAIN_AFTER).await;
            continue;
        };
        let pulled = pulled.take_body();
        for group in pulled.log_group_list() {
            let got: Vec<&str> = texts(std::slice::from_ref(group)).collect();
            let mut words = got[0].split(' ');
            let mut number = || words.next().and_then(|it| it.parse::<u64>().ok()).expect("an id");
            let id = (number() as usize, number());
            assert_eq!(got, texts_of(id), "a group was changed");
            seen.push(id);
        }
        if !pulled.log_group_list().is_empty() {
            assert!(!pulled.next_cursor().is_empty());
            pulled.next_cursor().clone_into(&mut cursor);
            continue;
        }
        if is_over {
            // The last puts may be under way when the producers are told to stop.
            last_looks += 1;
            if last_looks > 100 {
                return seen;
            }
        }
        sleep(AGAIN_AFTER).await;
    }
}

fn check(produced: &[Produced], consumed: &BTreeMap<Shard, Vec<Vec<Id>>>) {
    let mut stored: HashMap<Id, Shard> = HashMap::new();
    for (shard, consumers) in consumed {
        for seen in consumers {
            assert!(*seen == consumers[0], "two consumers of {shard:?} have seen different logs");
        }
        let mut last: HashMap<usize, u64> = HashMap::new();
        for &id in &consumers[0] {
            let before = stored.insert(id, *shard);
            assert!(before.is_none(), "{id:?} is in {before:?} and {shard:?}");
            let earlier = last.insert(id.0, id.1);
            assert!(earlier.is_none_or(|it| it < id.1), "{id:?} comes behind {earlier:?}");
            assert!(id.1 < produced[id.0].sent, "{id:?} was never sent");
            assert_eq!(LOGSTORES[id.0 % 2], shard.0, "{id:?} is in another Logstore");
        }
    }
    for (producer, it) in produced.iter().enumerate() {
        let lost = it.acknowledged.iter().filter(|&&it| !stored.contains_key(&(producer, it)));
        let lost: Vec<_> = lost.collect();
        assert!(lost.is_empty(), "acknowledged groups of {producer} are lost: {lost:?}");
    }
}
