//! The rules of documents, of the keyring and of the audit log.

use std::{fs, ops::Range, path::PathBuf};

use envelog::{
    Position, Result,
    admin::{Checkpoint, VerifyOptions},
    crypto::hmac_sha256,
};
use serde_json::{Value, json};

use crate::{
    common::{
        buffered,
        catalogue::{self, Layout},
        files, fix_crc, record, records, records_from, segments, synced,
    },
    forge::{Chain, Copy, Document, derived, hex},
};

/// A document of a golden store.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Store,
    Catalogue,
    Meta,
    Keyring,
    Probe,
}

/// A change of a document, and the error code with which the store is then refused.
struct Row {
    rule: &'static str,
    store: &'static str,
    which: Which,
    change: fn(&mut Document),
    code: &'static str,
    says: &'static str,
}

const fn row(
    which: Which,
    rule: &'static str,
    says: &'static str,
    change: fn(&mut Document),
) -> Row {
    Row { rule, store: "service-aes", which, change, code: "corrupt", says }
}

const fn byok(row: Row) -> Row {
    Row { store: "byok-aes", ..row }
}

const fn code(code: &'static str, row: Row) -> Row {
    Row { code, ..row }
}

fn subject(document: &mut Document) {
    document.head[40] ^= 1;
}

/// The only Logstore in a catalogue or in a checkpoint.
fn entry(body: &mut Value) -> &mut Value {
    let catalogue = if body["catalogue"].is_null() { body } else { &mut body["catalogue"] };
    catalogue["logstores"].as_object_mut().unwrap().values_mut().next().unwrap()
}

const RANGE: &str = "is out of range";
const PARSE: &str = "does not parse";

const FRAMES: &[Row] = &[
    code("tampered", row(Which::Store, "subject of STORE", "a document", subject)),
    row(Which::Store, "generation of STORE", "not 1", |document| document.set_generation(2)),
    row(Which::Store, "second part of STORE", "second part", |document| document.b = "{}".into()),
    row(Which::Store, "unknown field of STORE", PARSE, |document| {
        document.edit(|json| json["more"] = 1.into())
    }),
    code("tampered", row(Which::Catalogue, "subject of the catalogue", "a document", subject)),
    code(
        "tampered",
        row(Which::Catalogue, "store of the catalogue", "another store", |document| {
            document.head[24] ^= 1;
        }),
    ),
    code(
        "tampered",
        row(Which::Catalogue, "kind of the catalogue", "a document", |document| {
            document.head[10] = 4
        }),
    ),
    row(Which::Catalogue, "reserved bytes of a document", "reserved", |document| {
        document.head[68] = 1
    }),
    row(Which::Catalogue, "generation of the catalogue", RANGE, |document| {
        document.set_generation(0)
    }),
    row(Which::Catalogue, "second part of the catalogue", "second part", |document| {
        document.b = "{}".into()
    }),
    row(Which::Catalogue, "second tag of the catalogue", "second part", |document| {
        (document.tag_b, document.tag_b_follows) = ([7; 32], false);
    }),
    code(
        "keyring_too_old",
        row(Which::Catalogue, "keyring version of a document", "version 2", |document| {
            document.head[64] = 2;
        }),
    ),
    code("tampered", row(Which::Meta, "subject of metadata", "another Logstore", subject)),
    row(Which::Meta, "generation of metadata", RANGE, |document| document.set_generation(0)),
    code(
        "rolled_back",
        row(
            Which::Catalogue,
            "generation of metadata in the catalogue",
            "other metadata is",
            |document| {
                document.edit(|json| {
                    json["catalogue"]["logstores"]["shop/orders"]["generation"] = 4.into()
                });
            },
        ),
    ),
    code(
        "rolled_back",
        row(
            Which::Catalogue,
            "tag of metadata in the catalogue",
            "not the metadata that the catalogue knows",
            |document| {
                document.edit(|json| {
                    let tag = &mut json["catalogue"]["logstores"]["shop/orders"]["tag"];
                    // The name of the file holds the other half of it.
                    *tag = format!("{}{}", &tag.as_str().unwrap()[..32], "0".repeat(32)).into();
                });
            },
        ),
    ),
    row(Which::Meta, "second tag under the service key", "second tag", |document| {
        (document.tag_b, document.tag_b_follows) = ([7; 32], false);
    }),
    byok(row(Which::Meta, "second tag under a customer's key", "second tag", |document| {
        (document.tag_b, document.tag_b_follows) = ([0; 32], false);
    })),
    code(
        "keyring_foreign",
        row(Which::Keyring, "subject of the keyring", "another store", subject),
    ),
    row(Which::Keyring, "kind of the keyring", "no service keyring", |document| {
        document.head[10] = 4
    }),
    row(Which::Keyring, "generation of the keyring", "does not go with its versions", |document| {
        document.set_generation(2)
    }),
    byok(code("tampered", row(Which::Probe, "subject of a probe", "another master key", subject))),
    byok(row(Which::Probe, "generation of a probe", RANGE, |document| document.set_generation(0))),
];

const BODIES: &[Row] = &[
    // The catalogue.
    row(Which::Catalogue, "doubled Logstore", "twice", |document| {
        let entry = document.json()["catalogue"]["logstores"]["shop/orders"].to_string();
        document.a = document
            .a
            .replace("\"logstores\":{", &format!("\"logstores\":{{\"shop/orders\":{entry},"));
    }),
    row(Which::Catalogue, "doubled field", PARSE, |document| {
        document.a = document.a.replace("\"logstores\":", "\"logstores\":{},\"logstores\":");
    }),
    row(Which::Catalogue, "upper-case digits", PARSE, |document| {
        document.edit(|json| {
            let entry = entry(json);
            entry["id"] = entry["id"].as_str().unwrap().to_uppercase().into();
        });
    }),
    row(Which::Catalogue, "a Logstore that is being deleted", "there twice", |document| {
        document.edit(|json| json["catalogue"]["deleting"] = json!([entry(json)["id"].clone()]));
    }),
    row(Which::Catalogue, "tag of the audit log", "tag of the audit record", |document| {
        document.edit(|json| json["catalogue"]["audit"]["tag"] = "00".into());
    }),
    row(Which::Catalogue, "a jump away from no trusted time", "no trusted time", |document| {
        let state = json!({"retained_us": 1, "jump_us": 2});
        document.edit(|json| json["catalogue"]["retention"] = state);
    }),
    row(Which::Catalogue, "an unknown field of the retention", PARSE, |document| {
        let state = json!({"retained_us": 1, "other_us": 2});
        document.edit(|json| json["catalogue"]["retention"] = state);
    }),
    row(Which::Catalogue, "shards of a Logstore and its metadata", "has 1 shards", |document| {
        document.edit(|json| {
            entry(json)["shards"].as_array_mut().unwrap().pop();
        });
    }),
    row(Which::Catalogue, "number of shards", RANGE, |document| {
        document.edit(|json| entry(json)["shards"] = json!([]));
    }),
    row(Which::Catalogue, "generation of a Logstore", RANGE, |document| {
        document.edit(|json| entry(json)["generation"] = 0.into());
    }),
    row(Which::Catalogue, "first ordinal of a shard", RANGE, |document| {
        document.edit(|json| entry(json)["shards"][0]["first_ordinal"] = 0.into());
    }),
    row(Which::Catalogue, "ordinal of a head", RANGE, |document| {
        document.edit(|json| entry(json)["shards"][0]["head"]["ordinal"] = u64::MAX.into());
    }),
    row(Which::Catalogue, "next sequence number of a head", "lies below its end", |document| {
        document.edit(|json| entry(json)["shards"][0]["head"]["next_seq"] = 5.into());
    }),
    code(
        "truncated",
        row(
            Which::Catalogue,
            "first sequence number of a shard",
            "segment 1 of the shard is missing",
            |document| {
                document.edit(|json| entry(json)["shards"][0]["first_seq"] = 1.into());
            },
        ),
    ),
    code(
        "truncated",
        row(
            Which::Catalogue,
            "a segment that the head knows",
            "segment 4 of the shard is missing",
            |document| {
                document.edit(|json| entry(json)["shards"][0]["head"]["ordinal"] = 4.into());
            },
        ),
    ),
    row(Which::Catalogue, "end of a sealed head", "another end", |document| {
        document.edit(|json| {
            let head = &mut entry(json)["shards"][0]["head"];
            (head["end_seq"], head["next_seq"]) = (7.into(), 7.into());
        });
    }),
    row(
        Which::Catalogue,
        "last receive time of a sealed head",
        "another last receive time",
        |document| {
            document.edit(|json| entry(json)["shards"][0]["head"]["last_time_us"] = 1.into());
        },
    ),
    Row {
        store: "switched-off",
        ..row(Which::Catalogue, "blocks of a sealed head", "another number of blocks", |document| {
            document.edit(|json| entry(json)["shards"][0]["head"]["blocks"] = 9.into());
        })
    },
    code(
        "rolled_back",
        row(Which::Catalogue, "digest of a sealed head", "another segment", |document| {
            document
                .edit(|json| entry(json)["shards"][0]["head"]["digest"] = "00".repeat(32).into());
        }),
    ),
    // The configuration.
    row(Which::Meta, "revision", "revision is 0", |document| {
        document.edit(|json| json["revision"] = 0.into())
    }),
    row(Which::Meta, "shard_count", "shard_count is 257", |document| {
        document.edit(|json| json["shard_count"] = 257.into());
    }),
    row(Which::Meta, "shard_count and shards", "one shard for each", |document| {
        document.edit(|json| json["shard_count"] = 3.into());
    }),
    row(Which::Meta, "payload_hash", "md5", |document| {
        document.edit(|json| json["payload_hash"] = "md5".into())
    }),
    row(Which::Meta, "ttl_days too small", "ttl_days is 0", |document| {
        document.edit(|json| json["ttl_days"] = 0.into());
    }),
    row(Which::Meta, "ttl_days too large", "ttl_days is 3651", |document| {
        document.edit(|json| json["ttl_days"] = 3651.into());
    }),
    row(Which::Meta, "retention_bytes", "retention_bytes is 0", |document| {
        document.edit(|json| json["retention_bytes"] = 0.into());
    }),
    row(Which::Meta, "rotate_data_key by age", "max_age_days is 0", |document| {
        document.edit(|json| json["rotate_data_key"] = json!({"max_age_days": 0}));
    }),
    row(Which::Meta, "rotate_data_key by bytes", "max_bytes is 1000", |document| {
        document.edit(|json| json["rotate_data_key"] = json!({"max_bytes": 1000}));
    }),
    row(Which::Meta, "compression of new blocks", PARSE, |document| {
        document.edit(|json| json["compression"] = "gzip".into());
    }),
    row(Which::Meta, "name", PARSE, |document| {
        document.edit(|json| json["name"] = "shop/../etc".into())
    }),
    row(
        Which::Meta,
        "encrypt_type while encryption is on",
        "encrypt_type is required",
        |document| {
            document.edit(|json| json["encrypt_conf"] = json!({"enable": true}));
        },
    ),
    row(
        Which::Meta,
        "a field of the customer's key in the configuration",
        "user_cmk_info.arn",
        |document| {
            document.edit(|json| {
                json["encrypt_conf"]["user_cmk_info"] =
                    json!({"cmk_key_id": "k", "arn": "", "region_id": "r"});
            });
        },
    ),
    Row {
        store: "plain",
        ..row(
            Which::Meta,
            "encryption that is on has an envelope",
            "there is no envelope",
            |document| {
                document.edit(|json| {
                    json["encrypt_conf"] = json!({"enable": true, "encrypt_type": "default"})
                });
            },
        )
    },
    row(Which::Meta, "id of a shard", "not its place", |document| {
        document.edit(|json| json["shards"][1]["id"] = 0.into());
    }),
    row(Which::Meta, "status of a shard", PARSE, |document| {
        document.edit(|json| json["shards"][1]["status"] = "closed".into());
    }),
    row(Which::Meta, "parents of a shard", "not another shard", |document| {
        document.edit(|json| json["shards"][1]["parents"] = json!([1]));
    }),
    row(
        Which::Meta,
        "range of a shard that ends before it begins",
        "range of a shard",
        |document| {
            document.edit(|json| json["shards"][1]["begin_key"] = "f".repeat(32).into());
        },
    ),
    row(Which::Meta, "digits of a range", "range of a shard", |document| {
        document.edit(|json| json["shards"][1]["end_key"] = "F".repeat(32).into());
    }),
    row(Which::Meta, "gap between ranges", "leave a gap or overlap", |document| {
        document
            .edit(|json| json["shards"][1]["begin_key"] = format!("9{}", "0".repeat(31)).into());
    }),
    row(Which::Meta, "ranges that overlap", "leave a gap or overlap", |document| {
        document
            .edit(|json| json["shards"][1]["begin_key"] = format!("7{}", "0".repeat(31)).into());
    }),
    // The keys section.
    code(
        "tampered",
        row(Which::Meta, "name in the keys section", "under another name", |document| {
            document.edit_keys(|json| json["name"] = "shop/other".into());
        }),
    ),
    row(Which::Meta, "current version", "current data-key version", |document| {
        document.edit_keys(|json| json["current"] = 1.into());
    }),
    row(Which::Meta, "envelope of the current version", "current data-key version", |document| {
        document.edit_keys(|json| {
            json["versions"][1].as_object_mut().unwrap().remove("wrapped");
        });
    }),
    row(Which::Meta, "order of versions", "do not ascend", |document| {
        document.edit_keys(|json| json["versions"].as_array_mut().unwrap().swap(0, 1));
    }),
    row(Which::Meta, "gap in versions", "do not ascend", |document| {
        document.edit_keys(|json| {
            (json["versions"][1]["version"], json["current"]) = (3.into(), 3.into())
        });
    }),
    row(Which::Meta, "keyring version of an envelope", "names a service key", |document| {
        document.edit_keys(|json| {
            json["versions"][1].as_object_mut().unwrap().remove("keyring_version");
        });
    }),
    byok(row(
        Which::Meta,
        "no keyring version under a customer's key",
        "names a service key",
        |document| {
            document.edit_keys(|json| json["versions"][0]["keyring_version"] = 1.into());
        },
    )),
    row(Which::Meta, "length of an envelope", "the envelope of a data-key version", |document| {
        document.edit_keys(|json| json["versions"][1]["wrapped"] = "00".into());
    }),
    row(Which::Meta, "fingerprint", "the fingerprint of a data-key version", |document| {
        document.edit_keys(|json| json["versions"][1]["fingerprint"] = "00".into());
    }),
    byok(row(
        Which::Meta,
        "a field of the customer's key",
        "user_cmk_info.region_id",
        |document| {
            document.tag_b_follows = false;
            document.edit_keys(|json| json["cmk"]["region_id"] = "r".repeat(1025).into());
        },
    )),
    // The keyring.
    row(Which::Keyring, "oldest accepted version below 1", "none of its versions", |document| {
        document.edit(|json| json["accepts"] = 0.into());
    }),
    row(
        Which::Keyring,
        "oldest accepted version above the newest",
        "none of its versions",
        |document| {
            document.edit(|json| json["accepts"] = 2.into());
        },
    ),
    row(Which::Keyring, "no oldest accepted version", PARSE, |document| {
        document.edit(|json| drop(json.as_object_mut().unwrap().remove("accepts")));
    }),
    row(Which::Keyring, "versions ascend from 1", "do not ascend", |document| {
        document.edit(|json| {
            let first = json["versions"][0].clone();
            json["versions"].as_array_mut().unwrap().push(first);
        });
    }),
    row(Which::Keyring, "length of a root", PARSE, |document| {
        document.edit(|json| {
            let longer = format!("{}00", json["versions"][0]["root"].as_str().unwrap());
            json["versions"][0]["root"] = longer.into();
        });
    }),
    // Probes.
    byok(code(
        "tampered",
        row(Which::Probe, "master key of a probe", "another master key", |document| {
            document.edit(|json| json["cmk"]["arn"] = "another".into());
        }),
    )),
    byok(row(Which::Probe, "envelope of a probe", PARSE, |document| {
        document.edit(|json| json["wrapped"] = "".into());
    })),
    byok(row(Which::Probe, "fingerprint of a probe", PARSE, |document| {
        document.edit(|json| json["fingerprint"] = "00".into());
    })),
];

const BESIDE: &str = "the configuration beside the keys section";
const SECTION: &str = "the keys section of the metadata";

/// Makes the same change in the configuration and in the keys section, and leaves the second tag
/// unchanged: the most that the service keyring alone can do.
fn in_both(document: &mut Document, change: fn(&mut Value)) {
    document.tag_b_follows = false;
    document.edit(change);
    document.edit_keys(change);
}

fn off(document: &mut Document) {
    in_both(document, |json| {
        let place = if json["encrypt_conf"].is_object() {
            &mut json["encrypt_conf"]["enable"]
        } else {
            &mut json["enable"]
        };
        *place = false.into();
    });
}

fn another_master_key(document: &mut Document) {
    in_both(document, |json| {
        let place = if json["encrypt_conf"].is_object() {
            &mut json["encrypt_conf"]["user_cmk_info"]
        } else {
            &mut json["cmk"]
        };
        place["cmk_key_id"] = "key-0123456789abcdef".into();
    });
}

fn no_envelope(document: &mut Document) {
    (document.b, document.tag_b) = (String::new(), [0; 32]);
    document.edit(|json| drop(json.as_object_mut().unwrap().remove("encrypt_conf")));
}

/// The settings that the keys section authenticates.
const BOUND: &[Row] = &[
    byok(code(
        "tampered",
        row(Which::Meta, "enable in the configuration alone", BESIDE, |document| {
            document.edit(|json| json["encrypt_conf"]["enable"] = false.into());
        }),
    )),
    byok(code("tampered", row(Which::Meta, "enable", SECTION, off))),
    byok(code(
        "tampered",
        row(Which::Meta, "encrypt_conf beside an envelope", BESIDE, |document| {
            document.edit(|json| drop(json.as_object_mut().unwrap().remove("encrypt_conf")));
        }),
    )),
    byok(code(
        "tampered",
        row(Which::Meta, "ttl_days in the configuration alone", BESIDE, |document| {
            document.edit(|json| json["ttl_days"] = 1.into());
        }),
    )),
    byok(code(
        "tampered",
        row(Which::Meta, "ttl_days in the keys section alone", BESIDE, |document| {
            document.tag_b_follows = false;
            document.edit_keys(|json| json["ttl_days"] = 1.into());
        }),
    )),
    byok(code(
        "tampered",
        row(Which::Meta, "ttl_days", SECTION, |document| {
            in_both(document, |json| json["ttl_days"] = 1.into())
        }),
    )),
    byok(code(
        "tampered",
        row(Which::Meta, "retention_bytes in the configuration alone", BESIDE, |document| {
            document.edit(|json| json["retention_bytes"] = 1.into());
        }),
    )),
    byok(code(
        "tampered",
        row(Which::Meta, "retention_bytes", SECTION, |document| {
            in_both(document, |json| json["retention_bytes"] = 1.into());
        }),
    )),
    code(
        "tampered",
        row(Which::Meta, "retention_bytes under the service key", BESIDE, |document| {
            document.edit_keys(|json| json["retention_bytes"] = 1.into());
        }),
    ),
    byok(code(
        "tampered",
        row(Which::Meta, "ordinals of a data key", SECTION, |document| {
            document.tag_b_follows = false;
            document.edit_keys(|json| json["versions"][1]["ordinals"] = json!([100]));
        }),
    )),
    byok(code(
        "tampered",
        row(Which::Meta, "since", SECTION, |document| {
            document.tag_b_follows = false;
            document.edit_keys(|json| json["since"] = 2.into());
        }),
    )),
    byok(code(
        "tampered",
        row(Which::Meta, "master key in the keys section alone", BESIDE, |document| {
            document.tag_b_follows = false;
            document.edit_keys(|json| json["cmk"]["cmk_key_id"] = "key-0123456789abcdef".into());
        }),
    )),
    // Changes by a holder of the data key.
    byok(row(
        Which::Meta,
        "one ordinal of a data key for each shard",
        "one ordinal for each shard",
        |document| {
            document.edit_keys(|json| {
                json["versions"]
                    .as_array_mut()
                    .unwrap()
                    .iter_mut()
                    .for_each(|version| version["ordinals"] = json!([1, 1]));
            });
        },
    )),
    byok(row(
        Which::Meta,
        "the same shards in each data key",
        "different numbers of shards",
        |document| {
            document.edit_keys(|json| json["versions"][1]["ordinals"] = json!([1, 1]));
        },
    )),
    byok(row(Which::Meta, "an ordinal of a data key", RANGE, |document| {
        document.edit_keys(|json| json["versions"][0]["ordinals"] = json!([0]));
    })),
    byok(row(
        Which::Meta,
        "a data key before the one that it replaces",
        "before the one that it replaces",
        |document| {
            document.edit_keys(|json| json["versions"][0]["ordinals"] = json!([100]));
        },
    )),
    byok(row(Which::Meta, "since in range", RANGE, |document| {
        document.edit_keys(|json| json["since"] = 0.into());
    })),
    byok(row(
        Which::Meta,
        "since and the generation",
        "older than the first envelope",
        |document| {
            document.edit_keys(|json| json["since"] = 3.into());
        },
    )),
    byok(row(
        Which::Meta,
        "segments under data keys before the first",
        "before the first of them",
        |document| {
            document.edit_keys(|json| json["versions"][0]["ordinals"] = json!([2]));
        },
    )),
    byok(row(
        Which::Meta,
        "segments of older metadata under data keys",
        "does not go with its key",
        |document| {
            document.edit_keys(|json| json["since"] = 2.into());
        },
    )),
    row(Which::Meta, "drawn under a service key", "names a service key beside", |document| {
        document.edit_keys(|json| {
            drop(json["versions"][0].as_object_mut().unwrap().remove("drawn_under"))
        });
    }),
    byok(row(
        Which::Meta,
        "drawn under a service key beside a customer's key",
        "names a service key beside",
        |document| {
            document.edit_keys(|json| json["versions"][0]["drawn_under"] = 1.into());
        },
    )),
    row(
        Which::Meta,
        "drawn under a newer service key than wrapped",
        "older service key than it was drawn",
        |document| {
            document.edit_keys(|json| json["versions"][0]["drawn_under"] = 2.into());
        },
    ),
    byok(row(Which::Meta, "since is there", PARSE, |document| {
        document.edit_keys(|json| drop(json.as_object_mut().unwrap().remove("since")));
    })),
    code(
        "unsupported_feature",
        row(Which::Meta, "another kind of probe", "probe \"each\"", |document| {
            document.edit_keys(|json| json["probe"] = "each".into());
        }),
    ),
];

fn path(copy: &Copy, which: Which) -> PathBuf {
    match which {
        Which::Store => copy.path("store/STORE"),
        Which::Catalogue => copy.catalogue(),
        Which::Meta => catalogue::meta_path(&copy.logstore_dir()),
        Which::Keyring => copy.path("keyring"),
        Which::Probe => files(&copy.path("store/probes")).into_keys().next().unwrap(),
    }
}

/// Opens the store and reads all records.
fn use_all(copy: &Copy, read_only: bool) -> Result<()> {
    let store = if read_only { copy.builder().open_read_only()? } else { copy.builder().open()? };
    for name in store.list()? {
        let logstore = store.logstore(&name)?;
        for shard in 0..logstore.config().shard_count {
            records(&logstore, shard)?;
        }
    }
    Ok(())
}

fn change(copy: &Copy, which: Which, change: impl FnOnce(&mut Document)) {
    match which {
        Which::Catalogue => copy.change_catalogue(change),
        _ => copy.change_document(&path(copy, which), change),
    }
}

fn check(row: &Row) {
    let copy = Copy::of(row.store);
    change(&copy, row.which, |_| {});
    use_all(&copy, true).unwrap();
    change(&copy, row.which, row.change);
    // A damaged probe counts as missing. Only a verification reports it.
    let is_missing = row.which == Which::Probe && row.code == "corrupt";
    for read_only in [true, false] {
        if is_missing {
            use_all(&copy, read_only).unwrap_or_else(|error| panic!("{}: {error}", row.rule));
            continue;
        }
        let error = use_all(&copy, read_only).expect_err(row.rule);
        assert_eq!(error.code(), row.code, "{}: {error}", row.rule);
        assert!(error.to_string().contains(row.says), "{}: {error}", row.rule);
    }
    let Ok(store) = copy.builder().open_read_only() else { return };
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    assert!(report.faults.iter().any(|fault| fault.code == row.code), "{}: {report:?}", row.rule);
}

fn check_all(rows: &[Row]) {
    let fails = |row: &&Row| std::panic::catch_unwind(|| check(row)).is_err();
    let failed: Vec<_> = rows.iter().filter(fails).map(|row| row.rule).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn the_rules_of_frames() {
    check_all(FRAMES);
}

#[test]
fn the_rules_of_bodies() {
    check_all(BODIES);
}

#[test]
fn the_rules_of_what_the_data_key_binds() {
    check_all(BOUND);
}

/// The service keyring alone can forge metadata that switches encryption off or omits the
/// customer's key. No append follows such metadata and writes unencrypted data.
#[test]
fn no_forged_metadata_leads_to_an_append_in_the_clear() {
    const CANARY: &str = "never in plaintext";
    let in_the_configuration: fn(&mut Document) = |document| {
        document.edit(|json| json["encrypt_conf"]["enable"] = false.into());
    };
    let without_a_tag: fn(&mut Document) = |document| {
        off(document);
        document.tag_b = [0; 32];
    };
    type Forgery = (&'static str, &'static [&'static str], fn(&mut Document));
    let forgeries: [Forgery; 6] = [
        (
            "no envelope, and a segment in the clear behind the others",
            &["rolled_back"],
            no_envelope,
        ),
        ("off in the configuration", &["tampered"], in_the_configuration),
        ("off in both parts", &["tampered"], off),
        ("off, and no second tag", &["corrupt"], without_a_tag),
        ("no envelope", &["rolled_back"], no_envelope),
        ("another master key", &["revoked", "kms_invalid"], another_master_key),
    ];
    for (rule, codes, change) in forgeries {
        let copy = Copy::of("byok-aes");
        if rule.contains("behind the others") {
            let mut chain = Chain::load(&copy, 0);
            chain.append_under_the_keyring();
            chain.save();
        }
        copy.change_document(&path(&copy, Which::Meta), change);
        let append = || -> Result<()> {
            let store = copy.builder().open()?;
            let logstore = store.logstore(&store.list()?[0])?;
            let _ = logstore.append(record(CANARY), &buffered());
            logstore.append(record(CANARY), &synced())?;
            Ok(())
        };
        let error = append().expect_err(rule);
        assert!(codes.contains(&error.code()), "{rule}: {error}");
        let all: Vec<u8> = files(&copy.path("store")).into_values().flatten().collect();
        assert!(memchr::memmem::find(&all, CANARY.as_bytes()).is_none(), "{rule}");
    }
}

/// Reading a segment under the keyring needs no data key. However, the data key must first prove
/// that the shard may contain such a segment.
#[test]
fn a_keyring_segment_is_read_only_where_the_data_key_allows_it() {
    let copy = Copy::of("byok-aes");
    let mut chain = Chain::load(&copy, 0);
    chain.append_under_the_keyring();
    let forged = &mut chain.segments.last_mut().unwrap().header;
    forged.generation = 1;
    let from = Position::Seq(forged.first_seq);
    chain.save();
    copy.change_document(&path(&copy, Which::Meta), |document| {
        document.tag_b_follows = false;
        document.edit_keys(|json| {
            json["since"] = 2.into();
            for version in json["versions"].as_array_mut().unwrap() {
                version["ordinals"] = json!([4]);
            }
        });
    });
    for read_only in [true, false] {
        let store = if read_only { copy.builder().open_read_only() } else { copy.builder().open() }
            .unwrap();
        let logstore = store.logstore(&store.list().unwrap()[0]).unwrap();
        assert_eq!(records_from(&logstore, 0, from).unwrap_err().code(), "tampered");
        if !read_only {
            assert_eq!(
                logstore.append(record("behind it"), &synced()).unwrap_err().code(),
                "tampered"
            );
        }
    }
}

/// Retention does not apply a time to live that only the service keyring authenticates.
#[test]
fn a_forged_time_to_live_drops_nothing() {
    let copy = Copy::of("byok-aes");
    copy.change_document(&path(&copy, Which::Meta), |document| {
        in_both(document, |json| json["ttl_days"] = 1.into())
    });
    let before = segments(&copy.logstore_dir(), 0);
    let store = copy.builder().open().unwrap();
    assert_eq!(store.admin().apply_retention().unwrap_err().code(), "tampered");
    assert_eq!(segments(&copy.logstore_dir(), 0), before);
}

/// A configuration change by the owner does not authenticate forged metadata.
#[test]
fn no_change_of_keys_or_settings_signs_what_was_forged() {
    let copy = Copy::of("byok-aes");
    copy.change_document(&path(&copy, Which::Meta), |document| {
        in_both(document, |json| json["ttl_days"] = 1.into())
    });
    let store = copy.builder().open().unwrap();
    let name = store.list().unwrap().remove(0);
    let longer = store.logstore(&name).unwrap().config().ttl_days(9);
    for refused in [
        store.keys().rotate_data_key(&name).map(drop),
        store.keys().rewrap(&name).map(drop),
        store.keys().shred_data_keys(&name, &[1]),
        store.update_logstore(&name, longer).map(drop),
    ] {
        assert_eq!(refused.unwrap_err().code(), "tampered");
    }
    store.close().unwrap();
    assert_eq!(use_all(&copy, true).unwrap_err().code(), "tampered");
}

/// The generation of the metadata is not bound. An attacker can restore an older keys section with
/// its tag, but segments under newer data keys reveal it.
#[test]
fn segments_under_newer_keys_reveal_an_older_keys_section() {
    let copy = Copy::of("byok-aes");
    let older = Document::read(&fs::read(path(&copy, Which::Meta)).unwrap());
    let store = copy.builder().open().unwrap();
    let logstore = store.logstore(&store.list().unwrap()[0]).unwrap();
    store.keys().rotate_data_key(logstore.name()).unwrap();
    logstore.append(record("under the third version"), &synced()).unwrap();
    store.close().unwrap();
    drop(logstore);
    use_all(&copy, true).unwrap();
    copy.change_document(&path(&copy, Which::Meta), |document| {
        (document.b, document.tag_b, document.tag_b_follows) = (older.b, older.tag_b, false);
    });
    for read_only in [true, false] {
        assert_eq!(use_all(&copy, read_only).unwrap_err().code(), "rolled_back");
    }
}

/// Under a customer's key the metadata has a second tag, which the keyring cannot compute.
#[test]
fn the_second_tag_is_verified_where_the_data_key_is_at_hand() {
    let copy = Copy::of("byok-aes");
    copy.change_document(&path(&copy, Which::Meta), |document| {
        (document.tag_b[0], document.tag_b_follows) = (document.tag_b[0] ^ 1, false);
    });
    let store = copy.builder().open_read_only().unwrap();
    let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
    let found: Vec<_> =
        report.faults.iter().map(|fault| (fault.code, fault.file.clone())).collect();
    assert_eq!(found, [("tampered", Some(path(&copy, Which::Meta)))], "{report:?}");
}

#[test]
fn the_rules_of_checkpoints() {
    for (rule, code, change) in [
        ("none", None, (|_| {}) as fn(&mut Document)),
        ("subject", Some("tampered"), subject),
        ("generation", Some("corrupt"), |document| document.set_generation(1)),
        ("unknown field", Some("corrupt"), |document| {
            document.edit(|json| json["more"] = 1.into())
        }),
        ("tag of the audit log", Some("corrupt"), |document| {
            document.edit(|json| json["audit"]["tag"] = "".into())
        }),
        ("shards", Some("corrupt"), |document| {
            document.edit(|json| entry(json)["shards"] = json!([]))
        }),
        ("doubled Logstore", Some("corrupt"), |document| {
            let entry = document.json()["logstores"]["shop/orders"].to_string();
            document.a = document
                .a
                .replace("\"logstores\":{", &format!("\"logstores\":{{\"shop/orders\":{entry},"));
        }),
    ] {
        let copy = Copy::of("service-sm4");
        copy.change_document(&copy.path("checkpoint"), change);
        let against = Some(Checkpoint::from_bytes(fs::read(copy.path("checkpoint")).unwrap()));
        let store = copy.builder().open_read_only().unwrap();
        let verified =
            store.admin().verify(&VerifyOptions::default().against(against), &mut |_| {});
        assert_eq!(verified.as_ref().err().map(|error| error.code()), code, "{rule}: {verified:?}");
    }
}

/// Every field of a head in a checkpoint is compared.
#[test]
fn the_rules_of_heads_in_a_checkpoint() {
    for (field, value) in [("end_seq", 1), ("bytes", 1), ("blocks", 1)] {
        let copy = Copy::of("service-sm4");
        copy.change_document(&copy.path("checkpoint"), |document| {
            document.edit(|json| entry(json)["shards"][0]["head"][field] = value.into());
        });
        let against = Some(Checkpoint::from_bytes(fs::read(copy.path("checkpoint")).unwrap()));
        let store = copy.builder().open_read_only().unwrap();
        let report =
            store.admin().verify(&VerifyOptions::default().against(against), &mut |_| {}).unwrap();
        assert!(!report.is_clean(), "{field}: {report:?}");
    }
}

/// Lines of the audit log, with recomputed tags and chain.
#[test]
fn the_rules_of_the_audit_log() {
    type Change = fn(&mut Vec<Value>);
    let rows: [(&str, &str, Change); 5] = [
        ("none", "", |_| {}),
        ("a gap in the numbers", "tampered", |records| records[2]["number"] = 9.into()),
        ("the first number", "tampered", |records| records[0]["number"] = 0.into()),
        ("keyring version", "keyring_too_old", |records| records[1]["keyring_version"] = 2.into()),
        ("unknown event", "corrupt", |records| records[1]["event"] = "forgotten".into()),
    ];
    for (rule, code, change) in rows {
        let copy = Copy::of("service-aes");
        let log = copy.path("store/audit/audit-000001.log");
        let text = fs::read_to_string(&log).unwrap();
        let mut records: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line.split('\t').next().unwrap()).unwrap())
            .collect();
        change(&mut records);
        let key = derived(&copy.root(1), &[], "envelog v2 audit");
        let (mut tag, mut lines) = (String::new(), String::new());
        for record in &records {
            let json = record.to_string();
            tag = hex(&hmac_sha256(&key, &[tag.as_bytes(), json.as_bytes()]));
            let line = format!("{json}\t{tag}");
            lines += &format!("{line}\t{:08x}\n", crc32fast::hash(line.as_bytes()));
        }
        fs::write(&log, lines).unwrap();
        copy.change_catalogue(|document| {
            document.edit(|json| {
                json["catalogue"]["audit"] = json!({"number": records.len(), "tag": tag})
            });
        });
        let store = copy.builder().open_read_only().unwrap();
        let found = store.keys().audit_records().err().map_or("", |error| error.code());
        assert_eq!(found, code, "{rule}");
        let report = store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap();
        assert_eq!(
            report.faults.first().map_or("", |fault| fault.code),
            code,
            "{rule}: {report:?}"
        );
    }
}

// ---- the journal of the catalogue ----

/// A parsed catalogue file.
struct Journal<'a> {
    copy: &'a Copy,
    document: Vec<u8>,
    /// The bytes between the document and the tips.
    padding: Vec<u8>,
    tips: [Vec<u8>; 2],
    records: Vec<Vec<u8>>,
    /// The bytes after the last record.
    rest: Vec<u8>,
    /// The name of the file.
    name: String,
}

impl<'a> Journal<'a> {
    fn of(copy: &'a Copy) -> Self {
        let path = copy.catalogue();
        let file = fs::read(&path).unwrap();
        let layout = Layout::of(&file);
        let take = |range: &Range<usize>| file[range.clone()].to_vec();
        Self {
            copy,
            document: take(&layout.document),
            padding: take(&(layout.document.end..layout.tips[0].start)),
            tips: layout.tips.each_ref().map(take),
            records: layout.records.iter().map(take).collect(),
            rest: Vec::new(),
            name: path.file_name().unwrap().to_str().unwrap().to_owned(),
        }
    }

    fn save(&self) {
        let path = self.copy.catalogue();
        let (tips, records) = (self.tips.concat(), self.records.concat());
        let file = [&self.document[..], &self.padding, &tips, &records, &self.rest].concat();
        fs::remove_file(&path).unwrap();
        fs::write(path.with_file_name(&self.name), file).unwrap();
    }

    /// The number and the tag of the last record.
    fn last(&self) -> (u64, [u8; 32]) {
        let record = self.records.last().expect("the golden store has records");
        (u64::from_le_bytes(record[8..16].try_into().unwrap()), catalogue::record_tag(record))
    }

    /// The slot of the tip that names the last record.
    fn newest(&mut self) -> &mut Vec<u8> {
        let slot = self.last().0 % 2;
        &mut self.tips[slot as usize]
    }

    fn older(&mut self) -> &mut Vec<u8> {
        let slot = (self.last().0 + 1) % 2;
        &mut self.tips[slot as usize]
    }

    /// Makes the newest tip name this record.
    fn name(&mut self, number: u64, tag: [u8; 32]) {
        let slot = number % 2;
        self.tips[slot as usize] =
            catalogue::tip(slot as u32, 1, number, &tag, &self.copy.document_key(1));
    }

    /// Appends a record as a writer does.
    fn append(&mut self, changes: Value) {
        self.append_as(self.last().0 + 1, 1, changes);
    }

    fn append_as(&mut self, number: u64, version: u32, changes: Value) {
        let key = self.copy.document_key(version);
        let changes = changes.to_string();
        let record = catalogue::record(number, version, changes.as_bytes(), &self.last().1, &key);
        self.records.push(record);
        let (number, tag) = self.last();
        self.name(number, tag);
    }

    /// The name and id of a Logstore, for use in a change.
    fn logstore(&self) -> Value {
        let mut logstores = self.body()["catalogue"]["logstores"].take();
        let (name, entry) = logstores.as_object_mut().unwrap().iter_mut().next().unwrap();
        json!({"name": name, "id": entry["id"]})
    }

    fn body(&self) -> Value {
        let file = fs::read(self.copy.catalogue()).unwrap();
        catalogue::folded(&file).0
    }
}

/// The fields of a change of the only Logstore, with additional ones.
fn about(journal: &Journal<'_>, more: Value) -> Value {
    let mut change = journal.logstore();
    change.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    change
}

/// A change of a catalogue file, and the error code with which the store is then refused, if it is.
type JournalRow = (&'static str, Option<(&'static str, &'static str)>, fn(&mut Journal<'_>));

const JOURNALS: &[JournalRow] = &[
    ("nothing changed", None, |_| {}),
    ("a change", None, |journal| {
        let change = about(journal, json!({"shard": 0, "first_ordinal": 1, "first_seq": 0}));
        journal.append(json!([{"dropped": change}]));
    }),
    ("a record without changes", None, |journal| journal.append(json!([]))),
    // The snapshot.
    ("another name", Some(("tampered", "under another name")), |journal| {
        journal.name = journal.name.replace("-0000000001", "-0000000002");
    }),
    ("another epoch", Some(("tampered", "under another name")), |journal| {
        journal.name = journal.name.replace("0000000001-", "0000000002-");
    }),
    (
        "bytes between the snapshot and the tips",
        Some(("corrupt", "does not continue with zeros")),
        |journal| {
            journal.padding[0] = 1;
        },
    ),
    // Tips.
    ("a tip of another catalogue", Some(("tampered", "a tip of another catalogue")), |journal| {
        let (number, _) = journal.last();
        journal.name(number, [7; 32]);
    }),
    (
        "a tip that names an earlier record wrongly",
        Some(("tampered", "a tip of another catalogue")),
        |journal| {
            let (number, _) = journal.last();
            journal.name(number - 1, [7; 32]);
        },
    ),
    ("a tip in the other slot", Some(("tampered", "a tip of the catalogue")), |journal| {
        journal.tips.swap(0, 1);
    }),
    ("tag of a tip", Some(("tampered", "a tip of the catalogue")), |journal| {
        let tip = journal.newest();
        tip[60] ^= 1;
        fix_crc(&mut tip[..92]);
    }),
    ("magic of a tip", Some(("corrupt", "magic")), |journal| {
        let tip = journal.newest();
        tip[0] ^= 1;
        fix_crc(&mut tip[..92]);
    }),
    ("reserved bytes of a tip", Some(("corrupt", "reserved bytes of a tip")), |journal| {
        let tip = journal.newest();
        tip[12] = 1;
        fix_crc(&mut tip[..92]);
    }),
    ("keyring version of a tip", Some(("keyring_too_old", "version 9")), |journal| {
        let tip = journal.newest();
        tip[8] = 9;
        fix_crc(&mut tip[..92]);
    }),
    ("both tips damaged", Some(("corrupt", "neither of its tips")), |journal| {
        journal.tips.iter_mut().for_each(|tip| tip[20] ^= 1);
    }),
    ("bytes behind both tips", Some(("corrupt", "neither of its tips")), |journal| {
        journal.tips.iter_mut().for_each(|tip| tip[511] = 1);
    }),
    ("one tip torn, and the record that it was to name is there", None, |journal| {
        journal.newest().fill(0)
    }),
    (
        "one tip torn, and the record that it was to name is not there",
        Some(("truncated", "was synced")),
        |journal| {
            journal.older().fill(0);
        },
    ),
    ("a tip that was not written", None, |journal| {
        let tips = journal.tips.clone();
        journal.append(json!([]));
        journal.tips = tips;
    }),
    // Records.
    ("tag of a record", Some(("tampered", "a record of the catalogue")), |journal| {
        let record = &mut journal.records[0];
        let at = record.len() - 30;
        record[at] ^= 1;
        fix_crc(record);
    }),
    ("changes of a record", Some(("tampered", "a record of the catalogue")), |journal| {
        let record = &mut journal.records[0];
        record[30] ^= 1;
        fix_crc(record);
    }),
    ("a record that follows another", Some(("tampered", "a record of the catalogue")), |journal| {
        journal.records.remove(0);
    }),
    ("the last record cut", Some(("truncated", "was synced")), |journal| {
        let record = journal.records.last_mut().unwrap();
        record.truncate(record.len() - 1);
    }),
    ("the last record cut to a part of its magic", Some(("truncated", "was synced")), |journal| {
        journal.records.last_mut().unwrap().truncate(3);
    }),
    ("the last record missing", Some(("truncated", "was synced")), |journal| {
        drop(journal.records.pop())
    }),
    ("the last record zeroed", Some(("truncated", "was synced")), |journal| {
        journal.records.last_mut().unwrap().fill(0);
    }),
    ("the last record damaged", Some(("corrupt", "was synced")), |journal| {
        journal.records.last_mut().unwrap()[30] ^= 1;
    }),
    ("a record in front of the last damaged", Some(("corrupt", "was synced")), |journal| {
        journal.records[0][30] ^= 1
    }),
    ("number of a record", Some(("corrupt", "not the next one")), |journal| {
        journal.append_as(journal.last().0 + 2, 1, json!([]));
    }),
    ("number of a record, again", Some(("corrupt", "not the next one")), |journal| {
        journal.append_as(journal.last().0, 1, json!([]));
    }),
    ("reserved bytes of a record", Some(("corrupt", "reserved bytes of a record")), |journal| {
        let before = journal.last().1;
        journal.append(json!([]));
        let key = journal.copy.document_key(1);
        let record = journal.records.last_mut().unwrap();
        record[20] = 1;
        let end = record.len() - 36;
        let tag = hmac_sha256(&key, &[&record[..end], &before]);
        record[end..end + 32].copy_from_slice(&tag);
        fix_crc(record);
        let (number, tag) = journal.last();
        journal.name(number, tag);
    }),
    ("keyring version of a record", Some(("keyring_too_old", "version 9")), |journal| {
        journal.append_as(journal.last().0 + 1, 9, json!([]));
    }),
    ("zeros behind the last record", None, |journal| journal.rest = vec![0; 5000]),
    ("a torn record behind the last one", None, |journal| {
        journal.rest = journal.records[0][..40].to_vec();
    }),
    // Changes.
    ("unknown change", Some(("corrupt", PARSE)), |journal| {
        journal.append(json!([{"forgotten": {}}]))
    }),
    ("unknown field of a change", Some(("corrupt", PARSE)), |journal| {
        let change = about(journal, json!({"more": 1}));
        journal.append(json!([{"deleted": change}]));
    }),
    ("no list of changes", Some(("corrupt", PARSE)), |journal| journal.append(json!({}))),
    (
        "a Logstore that is not there",
        Some(("corrupt", "a Logstore that is not there")),
        |journal| {
            journal.append(json!([{"deleted": {"name": "shop/other", "id": "0".repeat(32)}}]));
        },
    ),
    (
        "another Logstore of the name",
        Some(("corrupt", "a Logstore that is not there")),
        |journal| {
            let change = about(journal, json!({"id": "0".repeat(32)}));
            journal.append(json!([{"deleted": change}]));
        },
    ),
    ("a shard that is not there", Some(("corrupt", "a shard that is not there")), |journal| {
        let change = about(journal, json!({"shard": 2, "first_ordinal": 1, "first_seq": 0}));
        journal.append(json!([{"dropped": change}]));
    }),
    ("a Logstore that is there", Some(("corrupt", "makes a Logstore that is there")), |journal| {
        let shards = journal.body()["catalogue"]["logstores"]["shop/orders"]["shards"].clone();
        let change = about(
            journal,
            json!({"id": "0".repeat(32), "generation": 1, "tag": "0".repeat(64), "shards": shards}),
        );
        journal.append(json!([{"created": change}]));
    }),
    (
        "the generation of metadata",
        Some(("corrupt", "takes the metadata of a Logstore back")),
        |journal| {
            let change = about(journal, json!({"generation": 1, "tag": "0".repeat(64)}));
            journal.append(json!([{"replaced": change}]));
        },
    ),
    ("the first ordinal", Some(("corrupt", RANGE)), |journal| {
        let change = about(journal, json!({"shard": 0, "first_ordinal": u64::MAX, "first_seq": 0}));
        journal.append(json!([{"dropped": change}]));
    }),
    ("retention", Some(("corrupt", "takes retention back")), |journal| {
        let change = about(journal, json!({"shard": 0, "first_ordinal": 0, "first_seq": 0}));
        journal.append(json!([{"dropped": change}]));
    }),
    ("the head of a shard", Some(("corrupt", "lies below its end")), |journal| {
        let mut head =
            journal.body()["catalogue"]["logstores"]["shop/orders"]["shards"][0]["head"].clone();
        head["next_seq"] = 0.into();
        let change = about(journal, json!({"shard": 0, "head": head}));
        journal.append(json!([{"reached": change}]));
    }),
    ("the state of retention", None, |journal| {
        let state = json!({"retained_us": 1, "trusted_us": 1, "jump_us": 2});
        journal.append(json!([{"retained": state}]));
    }),
    ("a jump of the clock", Some(("corrupt", "no trusted time")), |journal| {
        journal.append(json!([{"retained": {"retained_us": 1, "jump_us": 2}}]));
    }),
    ("the tag of the audit log", Some(("corrupt", "tag of the audit record")), |journal| {
        journal.append(json!([{"audited": {"number": 3, "tag": "00"}}]));
    }),
];

fn check_journal(&(rule, expected, change): &JournalRow) {
    let copy = Copy::of("service-aes");
    let mut journal = Journal::of(&copy);
    assert!(journal.records.len() > 2, "{rule}: there is something to change");
    change(&mut journal);
    journal.save();
    for read_only in [true, false] {
        let found = use_all(&copy, read_only).map_err(|error| (error.code(), error.to_string()));
        match (found, expected) {
            (Ok(()), None) => {}
            (Err((code, message)), Some((expected, says))) => {
                assert!(code == expected && message.contains(says), "{rule}: {message}");
            }
            (found, _) => panic!("{rule}: {found:?}"),
        }
    }
    if expected.is_none() {
        let report = copy
            .builder()
            .open_read_only()
            .unwrap()
            .admin()
            .verify(&VerifyOptions::default(), &mut |_| {})
            .unwrap();
        assert!(report.is_clean(), "{rule}: {report:?}");
    }
}

#[test]
fn the_rules_of_the_catalogues_journal() {
    let fails = |row: &&JournalRow| std::panic::catch_unwind(|| check_journal(row)).is_err();
    let failed: Vec<_> = JOURNALS.iter().filter(fails).map(|row| row.0).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

/// A record signed by an older service key version after one of a newer version is refused, also
/// while a rotation is unfinished.
#[test]
fn a_record_under_an_older_service_key_is_refused() {
    for (accepts, code, says) in [
        (1_u32, "tampered", "older service key"),
        (2, "retired_key_version", "the catalogue is authenticated by version 1"),
    ] {
        let copy = Copy::of("service-sm4");
        copy.change_document(&copy.path("keyring"), |document| {
            document.edit(|json| json["accepts"] = accepts.into());
            document.set_generation(1 + u64::from(accepts));
        });
        let mut journal = Journal::of(&copy);
        let version = |record: &[u8]| u32::from_le_bytes(record[16..20].try_into().unwrap());
        assert_eq!(version(journal.records.last().expect("a record behind the rotation")), 2);
        journal.append(json!([]));
        journal.save();
        for read_only in [true, false] {
            let error = use_all(&copy, read_only).unwrap_err();
            assert!(error.code() == code && error.to_string().contains(says), "{error}");
        }
    }
}

/// An earlier writer's file that reappears after a crash is ignored.
#[test]
fn an_older_file_of_the_catalogue_does_not_count() {
    let copy = Copy::of("service-aes");
    let older = copy.catalogue().with_file_name("0000000000-0000000009");
    fs::write(&older, "not even a document").unwrap();
    use_all(&copy, true).unwrap();
    use_all(&copy, false).unwrap();
    assert!(!older.exists(), "a writer removes it");
}
