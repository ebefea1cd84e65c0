//! The life of a project and a Logstore.

use aliyun_log_rust_sdk::{Client, EncryptConf, EncryptUserCmkConf, get_cursor_models::CursorPos};

use crate::{client, drain, group, now, put, refused};

const PROJECT: &str = "rust-life";
const LOGSTORE: &str = "logs";
const SHARDS: i32 = 3;

pub(crate) async fn run(conf: &EncryptConf) {
    let client = client();
    projects(&client).await;
    configurations(&client, conf).await;
    let logs = data(&client, conf).await;
    consumer_groups(&client).await;
    later_encryption(&client, conf).await;
    // S4: the logs that are stored stay readable when encryption is switched off.
    let off = EncryptConf { enable: false, ..conf.clone() };
    client.update_logstore(PROJECT, LOGSTORE).encrypt_conf(off).send().await.unwrap();
    put(&client, PROJECT, LOGSTORE, "in the clear").await.unwrap();
    assert_eq!(all(&client).await.len(), logs + 1);
    client.delete_logstore(PROJECT, LOGSTORE).send().await.unwrap();
    refused(client.get_logstore(PROJECT, LOGSTORE).send().await, 404, "LogStoreNotExist");
    client.delete_project(PROJECT).send().await.unwrap();
    refused(client.get_project(PROJECT).send().await, 404, "ProjectNotExist");
    println!("done");
}

async fn projects(client: &Client) {
    client.create_project(PROJECT).description("a life").send().await.unwrap();
    let again = client.create_project(PROJECT).description("").send().await;
    refused(again, 400, "ProjectAlreadyExist");
    let got = client.get_project(PROJECT).send().await.unwrap();
    assert_eq!(got.get_body().description(), "a life");
    client.update_project(PROJECT).description("a long life").send().await.unwrap();
    let got = client.get_project(PROJECT).send().await.unwrap();
    assert_eq!(got.get_body().description(), "a long life");
    let listed = client.list_projects(0, 100).send().await.unwrap();
    assert!(listed.get_body().projects().iter().any(|it| it.project_name() == PROJECT));
}

/// S1 to S6, and S9.
async fn configurations(client: &Client, conf: &EncryptConf) {
    let create = |conf: EncryptConf| {
        let create = client.create_logstore(PROJECT, LOGSTORE).shard_count(SHARDS).ttl(3);
        create.encrypt_conf(conf).send()
    };
    // S2, S3: no other algorithm, and none left out.
    for encrypt_type in [Some("aes_ecb".to_owned()), None] {
        let why = create(EncryptConf { encrypt_type, ..conf.clone() }).await;
        let why = refused(why, 400, "LogStoreInfoInvalid");
        assert!(why.contains("encrypt_type"), "{why}");
    }
    // S9: no KMS serves the region, or the role has no permission. No Logstore is made.
    if let Some(cmk) = &conf.user_cmk_info {
        let elsewhere = EncryptUserCmkConf { region_id: "nowhere".to_owned(), ..cmk.clone() };
        let why = create(conf.clone().with_user_cmk(elsewhere)).await;
        let why = refused(why, 400, "ParameterInvalid");
        assert!(why.contains("nowhere"), "{why}");
        let unknown = EncryptUserCmkConf { cmk_key_id: "key-unknown".to_owned(), ..cmk.clone() };
        refused(create(conf.clone().with_user_cmk(unknown)).await, 403, "KmsKeyRevoked");
        let role = EncryptUserCmkConf { arn: "acs:ram::1:role/other".to_owned(), ..cmk.clone() };
        refused(create(conf.clone().with_user_cmk(role)).await, 401, "Unauthorized");
    }
    refused(client.get_logstore(PROJECT, LOGSTORE).send().await, 404, "LogStoreNotExist");
    create(conf.clone()).await.unwrap();
    refused(create(conf.clone()).await, 400, "LogStoreAlreadyExist");
    assert_config(client, conf, 3).await;

    // S5: an update must carry encrypt_conf, and changes neither method nor algorithm nor CMK.
    let update = |conf: EncryptConf| {
        client.update_logstore(PROJECT, LOGSTORE).ttl(9).encrypt_conf(conf).send()
    };
    let without = client.update_logstore(PROJECT, LOGSTORE).ttl(9).send().await;
    let why = refused(without, 400, "ParameterInvalid");
    assert!(why.contains("encrypt_conf"), "{why}");
    let other = match conf.encrypt_type.as_deref() {
        Some("sm4") => "default",
        _ => "sm4",
    };
    let other_type = EncryptConf { encrypt_type: Some(other.to_owned()), ..conf.clone() };
    let cmk = EncryptUserCmkConf::new("key-other", "acs:ram::13234:role/logsource", "cn-hangzhou");
    for changed in [other_type, conf.clone().with_user_cmk(cmk)] {
        refused(update(changed).await, 400, "ParameterInvalid");
    }
    assert_config(client, conf, 3).await;
    update(conf.clone()).await.unwrap();
    assert_config(client, conf, 9).await;
    let listed = client.list_logstores(PROJECT, 0, 100).send().await.unwrap();
    assert_eq!(listed.get_body().logstores(), &[LOGSTORE]);
}

async fn assert_config(client: &Client, conf: &EncryptConf, ttl: i32) {
    let got = client.get_logstore(PROJECT, LOGSTORE).send().await.unwrap().take_body();
    assert_eq!((*got.ttl(), *got.shard_count()), (ttl, SHARDS));
    let json = |conf: &EncryptConf| serde_json::to_value(conf).unwrap();
    assert_eq!(json(got.encrypt_conf().as_ref().unwrap()), json(conf));
}

/// Returns the number of logs.
async fn data(client: &Client, conf: &EncryptConf) -> usize {
    let wanted =
        ["compressed ".repeat(100), "world \u{4e16}\u{754c}".to_owned(), "last".to_owned()];
    for text in &wanted {
        put(client, PROJECT, LOGSTORE, text).await.unwrap();
    }
    let mut tagged = group(["tagged"]);
    tagged.set_topic("topic").set_source("source").add_log_tag_kv("k", "v");
    client.put_logs(PROJECT, LOGSTORE).log_group(tagged.clone()).send().await.unwrap();
    refused(
        client.put_logs(PROJECT, LOGSTORE).log_group(group([])).send().await,
        400,
        "PostBodyInvalid",
    );
    refused(put(client, PROJECT, "none", "x").await, 404, "LogStoreNotExist");

    let shards = client.list_shards(PROJECT, LOGSTORE).send().await.unwrap().take_body();
    let ids: Vec<i32> = shards.shards().iter().map(|shard| *shard.shard_id()).collect();
    assert_eq!(ids, (0..SHARDS).collect::<Vec<_>>(), "{conf:?}");
    let mut all = all(client).await;
    all.sort();
    let mut expected: Vec<String> = wanted.iter().cloned().chain(["tagged".to_owned()]).collect();
    expected.sort();
    assert_eq!(all, expected);
    // A raw pull gives the same groups.
    let (mut raw_groups, mut same) = (0, false);
    for shard in ids {
        let begin = crate::begin(client, PROJECT, LOGSTORE, shard).await.unwrap();
        let raw = client.pull_logs_raw(PROJECT, LOGSTORE, shard).cursor(&begin).count(1000);
        raw_groups += raw.send().await.unwrap().get_body().log_group_count();
        let pull = client.pull_logs(PROJECT, LOGSTORE, shard).cursor(&begin).count(1000);
        let pulled = pull.send().await.unwrap().take_body();
        same |= pulled.log_group_list().contains(&tagged);
        let end = client.get_cursor(PROJECT, LOGSTORE, shard).cursor_pos(CursorPos::End);
        assert_eq!(end.send().await.unwrap().get_body().cursor(), pulled.next_cursor());
        let early = client.get_cursor(PROJECT, LOGSTORE, shard);
        let early = early.cursor_pos(CursorPos::UnixTimeStamp(i64::from(now()) - 3600));
        assert_eq!(early.send().await.unwrap().get_body().cursor(), begin);
    }
    assert!(raw_groups == 4 && same);
    let pull = client.pull_logs(PROJECT, LOGSTORE, 0).cursor("bad!").count(1);
    refused(pull.send().await, 400, "ParameterInvalid");
    let missing = client.get_cursor(PROJECT, LOGSTORE, SHARDS).cursor_pos(CursorPos::Begin);
    refused(missing.send().await, 400, "ShardNotExist");

    let times = (i64::from(now()) - 60, i64::from(now()) + 60);
    let get = client.get_logs(PROJECT, LOGSTORE).from(times.0).to(times.1);
    let found = get.query("(LAST or tagged) and not world").lines(10).send().await.unwrap();
    assert!(found.get_body().is_complete());
    let mut found: Vec<&str> = found.get_body().logs().iter().map(|log| &*log["text"]).collect();
    found.sort_unstable();
    assert_eq!(found, ["last", "tagged"]);
    let sql = client.get_logs(PROJECT, LOGSTORE).from(times.0).to(times.1).query("* | select 1");
    refused(sql.send().await, 400, "ParameterInvalid");
    expected.len()
}

async fn consumer_groups(client: &Client) {
    let create =
        || client.create_consumer_group(PROJECT, LOGSTORE, "g 1").timeout(30).order(true).send();
    create().await.unwrap();
    refused(create().await, 400, "ConsumerGroupAlreadyExist");
    client
        .update_consumer_group(PROJECT, LOGSTORE, "g 1")
        .timeout(60)
        .order(false)
        .send()
        .await
        .unwrap();
    let listed = client.list_consumer_groups(PROJECT, LOGSTORE).send().await.unwrap().take_body();
    let it = &listed.consumer_groups()[0];
    assert_eq!((&**it.consumer_group_name(), *it.timeout(), *it.order()), ("g 1", 60, false));
    let beat =
        client.consumer_group_heartbeat(PROJECT, LOGSTORE, "g 1").consumer("one").shards(vec![]);
    assert_eq!(beat.send().await.unwrap().get_body().shards(), &[0, 1, 2]);
    let begin = crate::begin(client, PROJECT, LOGSTORE, 1).await.unwrap();
    let update = client.update_consumer_group_checkpoint(PROJECT, LOGSTORE, "g 1").shard_id(1);
    update.consumer_id("one").checkpoint(&begin).force_success(false).send().await.unwrap();
    let get = client.get_consumer_group_checkpoint(PROJECT, LOGSTORE, "g 1").shard_id(1);
    let kept = get.send().await.unwrap().take_body();
    assert_eq!(*kept.checkpoints()[0].checkpoint(), begin);
    client.delete_consumer_group(PROJECT, LOGSTORE, "g 1").send().await.unwrap();
    let beat =
        client.consumer_group_heartbeat(PROJECT, LOGSTORE, "g 1").consumer("one").shards(vec![]);
    refused(beat.send().await, 404, "ConsumerGroupNotExist");
}

/// S4: encryption begins with a later update, and logs from before it stay readable.
async fn later_encryption(client: &Client, conf: &EncryptConf) {
    client.create_logstore(PROJECT, "later").shard_count(1).ttl(3).send().await.unwrap();
    put(client, PROJECT, "later", "before").await.unwrap();
    client.update_logstore(PROJECT, "later").encrypt_conf(conf.clone()).send().await.unwrap();
    put(client, PROJECT, "later", "after").await.unwrap();
    assert_eq!(drain(client, PROJECT, "later", 0).await.unwrap(), ["before", "after"]);
    client.delete_logstore(PROJECT, "later").send().await.unwrap();
}

/// The texts of all logs.
async fn all(client: &Client) -> Vec<String> {
    let mut all = Vec::new();
    for shard in 0..SHARDS {
        all.extend(drain(client, PROJECT, LOGSTORE, shard).await.unwrap());
    }
    all
}
