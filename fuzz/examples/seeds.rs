//! Generates the seeds, from the golden stores and a few texts:
//!
//! ```sh
//! RUSTFLAGS='--cfg fuzzing' cargo run --manifest-path fuzz/Cargo.toml --example seeds
//! ```

// Needed for the hooks of the instrumentation, if this is built with it.
use libfuzzer_sys as _;
use std::{collections::BTreeSet, fs, path::Path};

use envelog::{
    Compression, fuzzing,
    inspect::{BlockHeader, SegmentHeader},
};
use envelog_fuzz::{
    BODIES_END, GOLDEN, bodies, catalogue_bodies, golden, is_catalogue_file, is_meta,
    scanned_header,
};

/// Writes the seeds of a target. Writes equal seeds only once.
fn write(target: &str, seeds: impl IntoIterator<Item = Vec<u8>>) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("seeds").join(target);
    if dir.exists() {
        fs::remove_dir_all(&dir).expect("the seeds that were there");
    }
    fs::create_dir_all(&dir).expect("a directory for seeds");
    for (n, seed) in seeds.into_iter().collect::<BTreeSet<_>>().into_iter().enumerate() {
        fs::write(dir.join(format!("{n:02}")), seed).expect("a seed");
    }
}

fn main() {
    let stores: Vec<_> = (0..).zip(GOLDEN).map(|(n, name)| (n, golden(name))).collect();
    let segments: Vec<Vec<u8>> = stores
        .iter()
        .flat_map(|(_, store)| store.files(".seg").map(|(_, bytes)| bytes.to_vec()))
        .collect();
    segment_parts(&segments);
    documents();

    let groups = segments.iter().filter_map(|file| {
        let rest = &file[SegmentHeader::decode(file).ok()?.body_start as usize..];
        let header = BlockHeader::decode(rest).ok()?;
        let list = rest.get(BlockHeader::LEN..BlockHeader::LEN + header.list_len as usize)?;
        (header.compression == Compression::None).then(|| list.to_vec())
    });
    // The lists of stores without encryption, and single groups.
    let lists: Vec<Vec<u8>> =
        groups.filter(|list| envelog::group::frames(list).all(|frame| frame.is_ok())).collect();
    let alone = lists
        .iter()
        .filter_map(|list| Some(list[envelog::group::frames(list).next()?.ok()?].to_vec()));
    write("group", lists.iter().cloned().chain(alone));

    let text = "time=1700000000 level=info message=\"paid\" order=4711\n".repeat(6).into_bytes();
    let compressed = [Compression::Lz4, Compression::Zstd, Compression::None]
        .into_iter()
        .zip(0u8..)
        .map(|(method, n)| {
            let len = (text.len() as u32).to_le_bytes();
            let mut seed = vec![n, len[0], len[1], len[2]];
            fuzzing::compress(method, &text, &mut seed);
            seed
        });
    write("compression", compressed);

    let texts = |all: &[&str]| all.iter().map(|text| text.as_bytes().to_vec()).collect::<Vec<_>>();
    let shards = r#"[{"id":0,"status":"readwrite","begin_key":"00000000000000000000000000000000","end_key":"ffffffffffffffffffffffffffffffff"}]"#;
    let whole = format!(
        r#"{{"name":"project/logstore","revision":1,"shard_count":1,"ttl_days":30,"retention_bytes":null,"compression":"zstd","encrypt_conf":{{"enable":true,"encrypt_type":"sm4"}},"create_time":1700000000,"last_modify_time":1700000000,"shards":{shards}}}"#
    );
    write(
        "config",
        texts(&[
            r#"{"enable":true,"encrypt_type":"default"}"#,
            r#"{"enable":false}"#,
            r#"{"enable":true,"encrypt_type":"sm4","user_cmk_info":{"cmk_key_id":"key-1","arn":"acs:ram::1:role/r","region_id":"cn-hangzhou"}}"#,
            &whole,
            "project/logstore",
            "4f6c803719ecb363492ab715f002e326",
            "local:/var/lib/kms",
        ]),
    );
    let values = [
        "begin",
        "end",
        "17",
        "2026-01-31T12:00:00.5+08:00",
        "64KiB",
        "3 GiB",
        "500ms",
        "1h 30m",
        "2.5",
    ];
    write("values", texts(&values));
    write("service", requests());
    // `arbitrary` interprets these bytes: very different bytes, of a few lengths.
    for (target, lens) in
        [("store", [20, 60, 150, 300]), ("model", [40, 120, 300, 600]), ("sm4", [45, 60, 90, 200])]
    {
        write(target, (1u64..).zip(lens).map(|(seed, len)| noise(seed, len)));
    }
}

/// Requests to the service: the form of the input, the head, and the body.
fn requests() -> Vec<Vec<u8>> {
    let put = "content-type: application/x-protobuf\nx-log-bodyrawsize:";
    let group = b"\x0a\x17\x08\x80\xe2\xcf\xaa\x06\x12\x0f\x0a\x04text\x12\x07order 1";
    let mut requests = Vec::new();
    let mut add = |form: u8, head: &str, body: &[u8]| {
        requests.push([&[form], head.as_bytes(), b"\n\n", body].concat());
    };
    for form in [1, 2] {
        add(form, &format!("POST /logstores/one/shards/lb\n{put} 25"), group);
        add(form, "GET /logstores/one/shards/0?type=cursor&from=begin", b"");
    }
    for head in [
        "GET /?offset=0&size=10\nhost: sls.local",
        "GET /logstores?offset=&size=&logstoreName=o",
        "GET /logstores/one",
        "GET /logstores/one/shards",
        "GET /logstores/one/shards/0?type=cursor_time&cursor=MTIz",
        "GET /logstores/one/shards/0?type=logs&cursor=MTIz&count=10&end_cursor=MTIz\naccept-encoding: lz4",
        "GET /logstores/one?type=log&from=0&to=4294967295&query=order%20and%20not%20(%22a%20b%22%20or%20c)&reverse=True",
        "GET /logstores/one?type=histogram&from=1&to=4294967295&query=*",
        "GET /logstores/one/consumergroups",
        "GET /logstores/one/consumergroups/g?shard=0",
        "DELETE /logstores/one/consumergroups/g",
        "DELETE /logstores/one",
        "DELETE /",
        "GET /metrics",
    ] {
        add(2, head, b"");
    }
    for (head, body) in [
        ("POST /", r#"{"projectName":"new","description":"d"}"#),
        ("PUT /", r#"{"description":"e"}"#),
        (
            "POST /logstores",
            r#"{"logstoreName":"two","ttl":3,"shardCount":2,"encrypt_conf":{"enable":true,"encrypt_type":"sm4"}}"#,
        ),
        (
            "PUT /logstores/one",
            r#"{"ttl":3650,"revision":1,"encrypt_conf":{"enable":true,"encrypt_type":"default"}}"#,
        ),
        (
            "POST /logstores/one/logs",
            r#"{"from":0,"to":4294967295,"line":10,"offset":0,"query":"order 1","reverse":false}"#,
        ),
        (
            "POST /logstores/one/consumergroups",
            r#"{"consumerGroup":"h","timeout":6.0,"order":false}"#,
        ),
        ("PUT /logstores/one/consumergroups/g", r#"{"timeout":60,"order":true}"#),
        ("POST /logstores/one/consumergroups/g?type=heartbeat&consumer=c", "[0]"),
        (
            "POST /logstores/one/consumergroups/g?type=checkpoint&consumer=c&forceSuccess=True",
            r#"{"shard":0,"checkpoint":"MTIz"}"#,
        ),
    ] {
        add(2, head, body.as_bytes());
    }
    for (name, form) in
        [("lz4", Compression::Lz4), ("zstd", Compression::Zstd), ("deflate", Compression::None)]
    {
        let mut body = Vec::new();
        fuzzing::compress(form, group, &mut body);
        add(
            2,
            &format!(
                "POST /logstores/one/shards/route?key={}\nx-log-compresstype: {name}\n{put} 25",
                "0".repeat(32)
            ),
            &body,
        );
    }
    let v4 = "authorization: SLS4-HMAC-SHA256 Credential=x/20231114/local/sls/aliyun_v4_request,Signature=00\nx-log-date: 20231114T221320Z\nx-log-content-sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    add(1, &format!("GET /logstores\n{v4}"), b"");
    add(2, &format!("GET /logstores\n{v4}"), b"");
    requests.push(b"\0GET http://app.sls.local/logstores HTTP/1.1\r\nHost: app.sls.local\r\nAuthorization: LOG x:AAAA\r\nDate: x\r\n\r\n".to_vec());
    requests.push(b"\0POST / HTTP/1.1\r\nHost: sls.local\r\nTransfer-Encoding: chunked\r\nAuthorization: LOG x:AAAA\r\nDate: x\r\n\r\n2\r\n{}\r\n0\r\n\r\n".to_vec());
    requests
}

fn segment_parts(segments: &[Vec<u8>]) {
    let parts = |take: &dyn Fn(&[u8], usize) -> Option<Vec<u8>>| -> Vec<Vec<u8>> {
        let body_start =
            |file: &[u8]| SegmentHeader::decode(file).map(|header| header.body_start as usize);
        segments.iter().filter_map(|file| take(file, body_start(file).ok()?)).collect()
    };
    write("segment_header", parts(&|file, body| Some(file[..body].to_vec())));
    write("block", parts(&|file, body| Some(file.get(body..body + BlockHeader::LEN)?.to_vec())));
    let footer = |file: &[u8], _| {
        let (rest, trailer) = file.split_last_chunk::<16>()?;
        let len = u32::from_le_bytes(*trailer.first_chunk()?) as usize;
        (trailer.ends_with(b"SEAL") && len <= rest.len()).then(|| file[file.len() - len..].to_vec())
    };
    write("footer", parts(&footer));
    // The target accepts only blocks of the segment whose header it has. The others are noise of a
    // valid form.
    let (header, _) = scanned_header();
    let bodies =
        parts(&|file, body| Some(file[body..].to_vec()).filter(|_| file.starts_with(header)));
    let torn = bodies.iter().map(|body| body[..body.len() / 2].to_vec());
    let hole = bodies.iter().map(|body| [&vec![0; 40], &body[..]].concat());
    write("scan", bodies.iter().cloned().chain(torn).chain(hole));
}

/// Files of the golden stores, unchanged and as bodies.
fn documents() {
    let file = |store: &str, is_it: &dyn Fn(&Path) -> bool| {
        golden(store).files("").find(|(path, _)| is_it(path)).map(|(_, bytes)| bytes.to_vec())
    };
    let as_is = |which: u8, bytes: &[u8]| [&[0, which], bytes].concat();
    let by_bodies = |which: u8, document: &[u8]| {
        let (a, b) = bodies(document).expect("a golden document");
        [&[3, which], a, &[BODIES_END], b].concat()
    };
    let both = |is_it: &dyn Fn(&Path) -> bool| -> Vec<Vec<u8>> {
        let found =
            (0..).zip(GOLDEN).filter_map(|(which, store)| Some((which, file(store, is_it)?)));
        found.flat_map(|(which, bytes)| [as_is(which, &bytes), by_bodies(which, &bytes)]).collect()
    };
    write("metadata", both(&|path| is_meta(path)));
    write(
        "keyring",
        both(&|path| path.ends_with("keyring")).into_iter().take(4).map(|mut seed| {
            // A keyring has no second body.
            if seed[0] == 3 {
                seed.pop();
            }
            seed
        }),
    );
    let kinds: [&dyn Fn(&Path) -> bool; 2] = [&|path| path.ends_with("STORE"), &|path| {
        path.parent().is_some_and(|dir| dir.ends_with("probes"))
    }];
    let kinds = (1u8..).zip(kinds);
    let catalogues = (0u8..).zip(GOLDEN).take(2).flat_map(|(which, store)| {
        let bytes = file(store, &is_catalogue_file).expect("a golden store has a catalogue");
        let by_bodies =
            [&[3, which], &catalogue_bodies(&bytes).expect("a golden catalogue")[..]].concat();
        [as_is(which, &bytes), by_bodies].map(|seed| [&[0], &seed[..]].concat())
    });
    write(
        "catalogue",
        kinds
            .flat_map(|(n, is_it)| {
                both(is_it).into_iter().take(4).map(move |seed| [&[n], &seed[..]].concat())
            })
            .chain(catalogues),
    );

    let logs = (0u8..).zip(GOLDEN).filter_map(|(which, store)| {
        Some((which, file(store, &|path| path.extension().is_some_and(|end| end == "log"))?))
    });
    write(
        "audit",
        logs.flat_map(|(which, log)| {
            let records: Vec<&[u8]> = log
                .split(|&byte| byte == b'\n')
                .filter_map(|line| line.split(|&b| b == b'\t').next())
                .collect();
            [as_is(which, &log), [&[3, which], &records.join(&b'\n')[..]].concat()]
        }),
    );
    let wrapped = ["service-aes", "service-sm4", "byok-aes", "switched-off"].into_iter().zip(0u8..);
    write(
        "envelope",
        wrapped.map(|(store, n)| {
            let meta = file(store, &|path| is_meta(path)).expect("a golden store has a Logstore");
            let keys: serde_json::Value =
                serde_json::from_slice(bodies(&meta).expect("golden metadata").1).expect("keys");
            let hex = keys["versions"][0]["wrapped"].as_str().expect("a wrapped key").to_owned();
            let bytes = (0..hex.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal"));
            [n].into_iter().chain(bytes).collect::<Vec<u8>>()
        }),
    );
    let kms = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/v2/byok-aes/kms");
    let key = fs::read_dir(kms.join("keys"))
        .expect("keys")
        .next()
        .expect("a key")
        .expect("an entry")
        .path();
    let files = [(0u8, key), (1, kms.join("kms.json"))];
    write(
        "kms_files",
        files.map(|(n, path)| [&[n], &fs::read(path).expect("a golden KMS")[..]].concat()),
    );
}

fn noise(mut seed: u64, len: usize) -> Vec<u8> {
    let next = || {
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (seed >> 56) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}
