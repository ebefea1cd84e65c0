//! Authentic pieces in a wrong place or from an earlier time, missing pieces, and forged pieces.

use envelog::{
    Position,
    admin::RewrapOptions,
    crypto::Suite,
    inspect::{
        BlockHeader, BlockKind, Compression, Footer, KeySource, Predecessor, PredecessorEnd,
        SegmentHeader,
    },
};

use super::{
    common::catalogue::{Layout, catalogue_dir},
    structures::blocks,
    *,
};

/// The segments of a shard in an image, oldest first.
pub(crate) fn segments_of(
    fixture: &Fixture,
    image: &Image,
    logstore: &str,
    shard: u32,
) -> Vec<PathBuf> {
    let store = fixture.builder(MemoryDisk::of(image)).open_read_only().unwrap();
    let dir = fixture
        .world
        .logstore_dir(&store.logstore(&name(logstore)).unwrap())
        .join(format!("shard-{shard:04}"));
    image.files.keys().filter(|path| path.starts_with(&dir)).cloned().collect()
}

fn meta_of(fixture: &Fixture, image: &Image, logstore: &str) -> PathBuf {
    let dir = segments_of(fixture, image, logstore, 0)[0].ancestors().nth(2).unwrap().to_owned();
    newest_meta(&dir, image.files.keys().cloned()).unwrap()
}

/// Recomputes the CRC of the part of a segment that begins at `part` and has `len` bytes, CRC
/// included.
fn with_crc(mut bytes: Vec<u8>, part: usize, len: usize) -> Vec<u8> {
    let end = part + len - 4;
    let crc = crc32fast::hash(&bytes[part..end]);
    bytes[end..end + 4].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// The image with the contents of two files exchanged.
fn exchanged(image: &Image, a: &Path, b: &Path) -> Image {
    image.with(a, image.files[b].clone()).with(b, image.files[a].clone())
}

/// The image with block `number` of `to` replaced by the first block of `from`.
fn transplanted(image: &Image, from: &[u8], to: &Path, number: usize) -> Image {
    let mut bytes = image.files[to].clone();
    let source = blocks(from).0[0].clone();
    let target = blocks(&bytes).0[number].clone();
    assert_eq!(
        source.len(),
        target.len(),
        "the blocks are of one length, so that nothing else moves"
    );
    bytes[target].copy_from_slice(&from[source]);
    image.with(to, bytes)
}

/// Checks that both using and verifying the store report `code`.
#[track_caller]
fn assert_found(fixture: &Fixture, what: &str, image: &Image, code: &str) {
    let verdict = fixture.examine(image, None);
    assert!(
        verdict.shows(&[code]) && verdict.is_verified(&[code]),
        "{what}, expected {code}: {verdict:?}"
    );
}

#[test]
fn a_block_in_another_place_is_tampering() {
    let (fixture, other) = (Fixture::closed(), Fixture::closed());
    let (image, foreign) = (fixture.image(), other.image());
    let first = segments_of(&fixture, &image, AES, 0);
    let file = |path: &PathBuf| image.files[path].clone();
    let within = |number| transplanted(&image, &file(&first[0]), &first[0], number);
    let second_shard = &segments_of(&fixture, &image, AES, 1)[0];
    let logstore = &segments_of(&fixture, &image, SM4, 0)[0];
    let store = foreign.files[&segments_of(&other, &foreign, AES, 0)[0]].clone();
    for (what, damaged) in [
        ("another block of the segment", within(1)),
        ("of another segment", transplanted(&image, &file(&first[1]), &first[0], 0)),
        ("of another shard", transplanted(&image, &file(second_shard), &first[0], 0)),
        ("of another Logstore", transplanted(&image, &file(logstore), &first[0], 0)),
        ("of another store", transplanted(&image, &store, &first[0], 0)),
    ] {
        assert_found(&fixture, what, &damaged, "tampered");
        // With adapted plaintext fields, as far as possible without the key.
        let mut bytes = damaged.files[&first[0]].clone();
        let target =
            blocks(&file(&first[0])).0[if what.starts_with("another") { 1 } else { 0 }].clone();
        let original = &file(&first[0])[target.clone()];
        bytes[target.start + 8..target.start + 20].copy_from_slice(&original[8..20]);
        let fitted = image.with(&first[0], with_crc(bytes, target.start, target.len()));
        assert_found(&fixture, what, &fitted, "tampered");
    }
    // Two blocks exchanged.
    let mut bytes = file(&first[0]);
    let (a, b) = (blocks(&bytes).0[0].clone(), blocks(&bytes).0[1].clone());
    let (one, two) = (bytes[a.clone()].to_vec(), bytes[b.clone()].to_vec());
    bytes[a].copy_from_slice(&two);
    bytes[b].copy_from_slice(&one);
    assert_found(&fixture, "two blocks exchanged", &image.with(&first[0], bytes), "tampered");
}

#[test]
fn a_segment_in_another_place_is_tampering() {
    let (fixture, other) = (Fixture::closed(), Fixture::closed());
    let (image, foreign) = (fixture.image(), other.image());
    let first = segments_of(&fixture, &image, AES, 0);
    let second_shard = &segments_of(&fixture, &image, AES, 1)[0];
    let logstore = &segments_of(&fixture, &image, SM4, 0)[0];
    let unencrypted = &segments_of(&fixture, &image, PLAIN, 0)[0];
    let store = foreign.files[&segments_of(&other, &foreign, AES, 0)[0]].clone();
    for (what, damaged) in [
        ("exchanged within the shard", exchanged(&image, &first[0], &first[1])),
        ("exchanged between shards", exchanged(&image, &first[0], second_shard)),
        ("exchanged between Logstores", exchanged(&image, &first[0], logstore)),
        ("exchanged with one that is not encrypted", exchanged(&image, &first[0], unencrypted)),
        ("of another store", image.with(&first[0], store)),
    ] {
        assert_found(&fixture, what, &damaged, "tampered");
    }
    // Only the header, or only the footer, of another segment.
    let (own, others) = (&image.files[&first[1]], &image.files[second_shard]);
    let (body_start, end) =
        (SegmentHeader::decode(own).unwrap().body_start as usize, blocks(own).1);
    assert_eq!((own.len(), end), (others.len(), blocks(others).1), "so that nothing else moves");
    for (what, spliced) in [
        ("the header of another segment", [&others[..body_start], &own[body_start..]].concat()),
        ("the footer of another segment", [&own[..end], &others[end..]].concat()),
    ] {
        assert_found(&fixture, what, &image.with(&first[1], spliced), "tampered");
    }
    // A copy at the end, under the next name.
    let next = first[2].with_file_name("0000000004-00000000000000000004-0000000001.seg");
    assert_found(
        &fixture,
        "a copy behind the last",
        &image.with(&next, image.files[&first[2]].clone()),
        "tampered",
    );
}

#[test]
fn a_document_in_another_place_is_tampering_or_foreign() {
    let (fixture, other) = (Fixture::closed(), Fixture::closed());
    let (image, foreign) = (fixture.image(), other.image());
    let from_other = |path: &Path| {
        let inside = path.strip_prefix(fixture.world.path()).unwrap();
        foreign.files[&other.world.path().join(inside)].clone()
    };
    let store_file = |file: &str| fixture.world.store_dir().join(file);
    let (identity, audit) = (store_file("STORE"), store_file("audit/audit-000001.log"));
    let catalogue = image.catalogue_file(&fixture.world.store_dir());
    let snapshot = image.files[&catalogue][Layout::of(&image.files[&catalogue]).document].to_vec();
    let (aes, sm4) = (meta_of(&fixture, &image, AES), meta_of(&fixture, &image, SM4));
    let others = foreign.files[&meta_of(&other, &foreign, AES)].clone();
    let keyring = fixture.world.keyring();
    let probe_of = |image: &Image| {
        image.files.keys().find(|path| FileKind::of(path) == FileKind::Probe).unwrap().clone()
    };
    let probe = probe_of(&image);
    for (what, damaged, code) in [
        ("metadata exchanged", exchanged(&image, &aes, &sm4), "tampered"),
        ("the metadata of another store", image.with(&aes, others), "tampered"),
        (
            "the catalogue of another store",
            image.with(&catalogue, from_other(&catalogue)),
            "tampered",
        ),
        ("a catalogue in the place of metadata", image.with(&aes, snapshot), "tampered"),
        (
            "metadata in the place of the catalogue",
            image.with(&catalogue, image.files[&aes].clone()),
            "tampered",
        ),
        (
            "the probe of another store",
            image.with(&probe, foreign.files[&probe_of(&foreign)].clone()),
            "tampered",
        ),
        ("the audit log of another store", image.with(&audit, from_other(&audit)), "tampered"),
        (
            "the identity of another store",
            image.with(&identity, from_other(&identity)),
            "keyring_foreign",
        ),
        (
            "the keyring of another store",
            image.with(&keyring, from_other(&keyring)),
            "keyring_foreign",
        ),
    ] {
        assert_found(&fixture, what, &damaged, code);
    }
}

#[test]
fn whatever_is_missing_is_missed() {
    let fixture = Fixture::closed();
    let image = fixture.image();
    let first = segments_of(&fixture, &image, AES, 0);
    let shard = first[0].parent().unwrap();
    let logstore = shard.parent().unwrap();
    let store_file = |file: &str| fixture.world.store_dir().join(file);
    let nothing = Image::default();
    let emptied = |dir: &Path| {
        let mut emptied = image.with_dir_of(dir, &nothing);
        emptied.dirs.insert(dir.to_owned());
        emptied
    };
    for (what, damaged, code) in [
        ("the first segment", image.without(&first[0]), "truncated"),
        ("a middle one", image.without(&first[1]), "truncated"),
        ("the last one", image.without(&first[2]), "truncated"),
        ("the last two", image.without(&first[2]).without(&first[1]), "truncated"),
        ("all of a shard's", emptied(shard), "truncated"),
        ("a shard", image.with_dir_of(shard, &nothing), "truncated"),
        ("a Logstore", image.with_dir_of(logstore, &nothing), "truncated"),
        (
            "the metadata",
            image.without(&newest_meta(logstore, image.files.keys().cloned()).unwrap()),
            "truncated",
        ),
        (
            "the catalogue",
            image.without(&image.catalogue_file(&fixture.world.store_dir())),
            "truncated",
        ),
        (
            "the directory of the catalogue",
            image.with_dir_of(&store_file("catalogue"), &nothing),
            "truncated",
        ),
        ("the audit log", image.without(&store_file("audit/audit-000001.log")), "truncated"),
        ("the identity", image.without(&store_file("STORE")), "not_a_store"),
        ("the keyring", image.without(&fixture.world.keyring()), "keyring_missing"),
    ] {
        assert_found(&fixture, what, &damaged, code);
    }
}

#[test]
fn whatever_is_longer_than_it_was_is_corrupt() {
    let fixture = Fixture::closed();
    let image = fixture.image();
    for (path, bytes) in &image.files {
        if FileKind::of(path) == FileKind::Lock {
            continue; // see what_may_be_lost_is_known_by_name
        }
        for (what, more) in
            [("zeros", [0; 700]), ("garbage", std::array::from_fn(|n| (n * 31 % 251) as u8))]
        {
            let longer = image.with(path, [&bytes[..], &more, b"\n"].concat());
            if [FileKind::Audit, FileKind::Catalogue, FileKind::Epoch].contains(&FileKind::of(path))
            {
                // A record torn by a crash is unknown to other files. Bytes after the slots of the
                // epoch are ignored.
                assert!(
                    fixture.examine(&longer, None).is_clean(),
                    "{what} behind {}",
                    path.display()
                );
            } else {
                assert_found(
                    &fixture,
                    &format!("{what} behind {}", path.display()),
                    &longer,
                    "corrupt",
                );
            }
        }
    }
}

/// An earlier version of a file, put back.
#[test]
fn what_is_older_than_it_was_is_rolled_back() {
    let mut fixture = Fixture::closed();
    let old = fixture.image();
    let mut open = None;
    fixture.reopened(|fixture, store| {
        fixture.put(store, AES, 0);
        open = Some(fixture.image());
        for days in [10, 20] {
            let mut config = store.logstore(&name(AES)).unwrap().config();
            config.ttl_days = Some(days);
            store.update_logstore(&name(AES), config).unwrap();
        }
        store.keys().rotate_data_key(&name(SM4)).unwrap();
    });
    let mut checkpoint = None;
    fixture.reopened(|_, store| checkpoint = Some(store.admin().checkpoint().unwrap()));
    let (image, open, checkpoint) = (fixture.image(), open.unwrap(), checkpoint.unwrap());
    assert!(fixture.examine(&image, None).is_clean());
    assert_eq!(fixture.verify_against(&image, &checkpoint), [""; 0]);

    let put_back = |path: &Path, from: &Image| image.with(path, from.files[path].clone());
    let catalogue = catalogue_dir(&fixture.world.store_dir());
    let audit = fixture.world.store_dir().join("audit/audit-000001.log");
    let older_meta = |logstore| {
        let was = old.files[&meta_of(&fixture, &old, logstore)].clone();
        image.with(&meta_of(&fixture, &image, logstore), was)
    };
    let aes = meta_of(&fixture, &image, AES);
    let last = segments_of(&fixture, &image, AES, 0).pop().unwrap();
    for (what, damaged, code) in [
        ("the metadata", older_meta(AES), "rolled_back"),
        ("the metadata, before a rotation", older_meta(SM4), "rolled_back"),
        ("the audit log", put_back(&audit, &old), "truncated"),
        ("a segment from before it was sealed", put_back(&last, &open), "truncated"),
    ] {
        assert_found(&fixture, what, &damaged, code);
    }
    // A reader goes by the newer metadata, as in a copy of a store whose catalogue was copied first.
    let older_catalogue = image.with_dir_of(&catalogue, &old);
    let verdict = fixture.examine(&older_catalogue, None);
    assert!(verdict.is_verified(&["rolled_back"]), "{verdict:?}");
    assert_eq!(verdict.keyless.first(), Some(&"rolled_back"), "{verdict:?}");
    let writer = fixture.builder(MemoryDisk::of(&older_catalogue)).open().unwrap();
    for logstore in [AES, SM4] {
        let refused = writer.logstore(&name(logstore)).map(drop).unwrap_err();
        assert_eq!(refused.code(), "rolled_back");
    }
    drop(writer);
    let logstore = aes.parent().unwrap();
    assert_found(&fixture, "a whole Logstore", &image.with_dir_of(logstore, &old), "rolled_back");

    // The old copy of the whole store is consistent in itself. Only a comparison with outside
    // knowledge detects it, which is the purpose of a checkpoint.
    let whole = image.with_dir_of(&fixture.world.store_dir(), &old);
    let store = fixture.builder(MemoryDisk::of(&whole)).open_read_only().unwrap();
    assert!(store.admin().verify(&VerifyOptions::default(), &mut |_| {}).unwrap().is_clean());
    let found = fixture.verify_against(&whole, &checkpoint);
    assert!(
        !found.is_empty() && found.iter().all(|code| ["rolled_back", "truncated"].contains(code)),
        "{found:?}"
    );
}

/// Only the catalogue is from before a clean close. The other files are newer and contain more than
/// it knows.
#[test]
fn a_checkpoint_finds_a_consistent_older_catalogue() {
    let mut fixture = Fixture::closed();
    let old = fixture.image();
    let mut checkpoint = None;
    fixture.reopened(|fixture, store| {
        fixture.put(store, AES, 0);
        checkpoint = Some(store.admin().checkpoint().unwrap());
    });
    let (image, checkpoint) = (fixture.image(), checkpoint.unwrap());
    let damaged = image.with_dir_of(&catalogue_dir(&fixture.world.store_dir()), &old);
    // No data is lost: all records can be read.
    assert!(fixture.examine(&damaged, None).is_clean());
    assert_eq!(fixture.verify_against(&damaged, &checkpoint), ["rolled_back"]);
    // With the old catalogue, the newest segment can be removed too. Only a checkpoint detects that
    // as well.
    let last = segments_of(&fixture, &image, AES, 0).pop().unwrap();
    let found = fixture.verify_against(&damaged.without(&last), &checkpoint);
    assert_eq!(found, ["rolled_back", "rolled_back"]);
}

/// An old copy of the keyring with a newer store.
#[test]
fn an_older_keyring_is_too_old() {
    let mut fixture = Fixture::closed();
    let old = fixture.image();
    fixture.reopened(|_, store| {
        store.keys().rotate_service_key().unwrap();
    });
    let keyring = fixture.world.keyring();
    let damaged = fixture.image().with(&keyring, old.files[&keyring].clone());
    assert_found(&fixture, "an old keyring", &damaged, "keyring_too_old");
}

/// Another wrapping of the same key proves as much. An older probe is accepted, and so is a keyring
/// from before it was put under a master key, until the service key is rotated.
#[test]
fn what_was_only_wrapped_again_is_taken_as_it_was() {
    let mut fixture = Fixture::closed();
    let old = fixture.image();
    let probes = fixture.world.store_dir().join("probes");
    let probe = old.files.keys().find(|path| path.starts_with(&probes)).unwrap().clone();
    let keyring = fixture.world.keyring();
    fixture.reopened(|fixture, store| {
        let cmk = store
            .logstore(&name(SM4))
            .unwrap()
            .config()
            .encrypt_conf
            .unwrap()
            .user_cmk_info
            .unwrap();
        fixture.world.local().rotate(&cmk.cmk_key_id).unwrap();
        store.keys().rewrap_all(&RewrapOptions::default(), &mut |_| {}).unwrap();
        store.keys().rewrap_keyring(Some(fixture.world.cmk())).unwrap();
    });
    let image = fixture.image();
    for path in [&probe, &keyring] {
        assert_ne!(image.files[path], old.files[path]);
        let back = image.with(path, old.files[path].clone());
        let verdict = fixture.examine(&back, None);
        assert!(verdict.is_clean(), "{}: {verdict:?}", path.display());
    }
    fixture.reopened(|_, store| assert_eq!(store.keys().rotate_service_key().unwrap(), 2));
    let back = fixture.image().with(&keyring, old.files[&keyring].clone());
    assert_found(&fixture, "a keyring from before", &back, "keyring_too_old");
}

/// Opening and writing a store do not hide records removed from its audit log. While the log has
/// fewer records than the catalogue knows, they are missing. Later, a different record has the
/// number of the last one that the catalogue knows.
#[test]
fn what_was_taken_from_the_audit_log_stays_missed() {
    let fixture = Fixture::closed();
    let image = fixture.image();
    let audit = fixture.world.store_dir().join("audit/audit-000001.log");
    let lines: Vec<&[u8]> = image.files[&audit].split_inclusive(|&byte| byte == b'\n').collect();
    for left in 0..lines.len() {
        let disk = MemoryDisk::of(&image.with(&audit, lines[..left].concat()));
        fixture.builder(Arc::clone(&disk)).open().unwrap().close().unwrap();
        assert_found(&fixture, "closed again", &disk.image(), "truncated");
        let store = fixture.builder(Arc::clone(&disk)).open().unwrap();
        store.keys().rotate_data_key(&name(AES)).unwrap();
        store.close().unwrap();
        // The rotation is recorded twice: its intent and its completion.
        let expected = if left + 2 < lines.len() { "truncated" } else { "rolled_back" };
        assert_found(&fixture, "with new records", &disk.image(), expected);
    }
}

/// A block forged without the key.
fn forged_block(header: &BlockHeader, payload: &[u8]) -> Vec<u8> {
    let bytes = [&header.encode()[..], payload, &[0x88; 16], &[0; 4]].concat();
    let len = bytes.len();
    with_crc(bytes, 0, len)
}

/// The best segment that can be forged without the key, after the last one of a shard.
fn forged_segment(
    image: &Image,
    last: &Path,
    suite: Suite,
    key_source: KeySource,
) -> (PathBuf, Vec<u8>) {
    let bytes = &image.files[last];
    let before = SegmentHeader::decode(bytes).unwrap();
    let footer = Footer::decode(&bytes[blocks(bytes).1..]).unwrap().footer;
    let header = SegmentHeader {
        suite,
        key_source,
        ordinal: before.header.ordinal + 1,
        first_seq: footer.end_seq,
        limit_seq: u64::MAX,
        predecessor: Predecessor::Sealed(PredecessorEnd {
            ordinal: before.header.ordinal,
            segment: before.header.segment,
            blocks: footer.block_count,
            bytes: bytes.len() as u64,
            end_seq: footer.end_seq,
            digest: footer.digest(before.header.payload_hash, &before.header_hash),
            last_time_us: footer.last_time_us,
        }),
        ..before.header
    };
    let encoded = header.encode();
    let hash = header.hash(&encoded);
    let mut forged = SegmentHeader::finish(encoded, &[0x77; 32]);
    let list = b"\x0a\x06forged\0\0\0\0";
    let block = BlockHeader {
        kind: BlockKind::Opaque,
        compression: Compression::None,
        segment_tag: hash[..8].try_into().unwrap(),
        number: 0,
        payload_len: list.len() as u32,
        raw_len: list.len() as u32,
        group_count: 1,
        log_count: 0,
        list_len: list.len() as u32 - 4,
        first_seq: footer.end_seq,
        first_time_us: 0,
        last_time_us: 0,
        durable_mark: forged.len() as u64,
        nonce_random: [0; 8],
    };
    forged.extend(forged_block(&block, list));
    let name = format!("{:010}-{:020}-0000000001.seg", header.ordinal, header.first_seq);
    (last.with_file_name(name), forged)
}

#[test]
fn a_forged_segment_is_a_wrong_key_and_nothing_is_built_on_it() {
    let fixture = Fixture::closed();
    let image = fixture.image();
    for logstore in [AES, SM4, PLAIN] {
        let last = segments_of(&fixture, &image, logstore, 0).pop().unwrap();
        let version = if logstore == PLAIN { KeySource::Keyring(1) } else { KeySource::DataKey(1) };
        for (suite, source) in [
            (Suite::Aes256Gmac, KeySource::Keyring(1)),
            (Suite::Sm4Gmac, version),
            (Suite::Aes256Gcm, version),
        ] {
            let (path, bytes) = forged_segment(&image, &last, suite, source);
            let body = SegmentHeader::decode(&bytes).unwrap().body_start as usize;
            for (what, bytes) in
                [("with a record", bytes.clone()), ("without one", bytes[..body].to_vec())]
            {
                let damaged = image.with(&path, bytes);
                assert_found(
                    &fixture,
                    &format!("{logstore} {suite:?} {what}"),
                    &damaged,
                    "wrong_key",
                );
                let store = fixture.builder(MemoryDisk::of(&damaged)).open().unwrap();
                let append = synced().shard(ShardChoice::Shard(0));
                let appended =
                    store.logstore(&name(logstore)).unwrap().append(record("more"), &append);
                assert!(
                    matches!(appended, Err(Error::WrongKey { .. })),
                    "{logstore} {suite:?} {what}: {appended:?}"
                );
            }
            // Damage below a forged mark would look repairable, and no block would be left to prove
            // the key.
            let block = BlockHeader::decode(&bytes[body..]).unwrap();
            let mark = BlockHeader {
                kind: BlockKind::Mark,
                number: 1,
                payload_len: 0,
                raw_len: 0,
                group_count: 0,
                list_len: 0,
                durable_mark: body as u64 + 50,
                ..block
            };
            let damaged = [&bytes[..body], &[0; 50], &forged_block(&mark, b"")[..]].concat();
            let store =
                fixture.builder(MemoryDisk::of(&image.with(&path, damaged))).open().unwrap();
            let repaired = store.admin().repair(&name(logstore), 0, &Default::default());
            assert!(
                matches!(repaired, Err(Error::WrongKey { .. })),
                "{logstore} {suite:?}: {repaired:?}"
            );
        }
    }
}

/// A segment's header records the end of its predecessor. A segment without blocks has no block
/// that authenticates its header.
#[test]
fn a_header_that_cuts_its_predecessor_short_is_not_believed() {
    let mut fixture = Fixture::new();
    let store = fixture.create();
    for _ in 0..3 {
        fixture.put(&store, AES, 0);
    }
    let logstore = store.logstore(&name(AES)).unwrap();
    logstore.roll().unwrap();
    // The next segment is begun, and the record waits in memory.
    logstore.append(record("waits"), &buffered().shard(ShardChoice::Shard(0))).unwrap();
    let image = fixture.image();
    let [first, last] = &segments_of(&fixture, &image, AES, 0)[..] else { panic!("there are two") };
    let mut decoded = SegmentHeader::decode(&image.files[last]).unwrap();
    let Predecessor::Sealed(end) = decoded.header.predecessor else { panic!("it was sealed") };
    let bytes = blocks(&image.files[first]).0[0].end as u64;
    decoded.header.predecessor =
        Predecessor::Cut(PredecessorEnd { blocks: 1, bytes, end_seq: 1, ..end });
    let forged = SegmentHeader::finish(decoded.header.encode(), &decoded.commitment);

    let written = &fixture.written[&(name(AES), 0)];
    let disk = MemoryDisk::of(&image);
    let running = fixture.builder(Arc::clone(&disk)).open_read_only().unwrap();
    read_prefix(&running, &name(AES), 0, written).unwrap();
    disk.overwrite(last, forged);
    let fresh = fixture.builder(disk).open_read_only().unwrap();
    for store in [fresh, running] {
        let read = read_prefix(&store, &name(AES), 0, written);
        assert!(matches!(read, Err(Error::WrongKey { .. })), "{read:?}");
    }
}

/// A reader skips blocks whose headers say that they contain no wanted record. It must still
/// authenticate those headers.
#[test]
fn a_block_that_hides_is_found() {
    let fixture = Fixture::closed();
    let image = fixture.image();
    let path = &segments_of(&fixture, &image, AES, 0)[0];
    let original = &image.files[path];
    let range = blocks(original).0[1].clone();
    let header = BlockHeader::decode(&original[range.clone()]).unwrap();
    let far = 1 << 60;
    for (what, options, changed) in [
        ("it says it is older", ReadOptions::default(), BlockHeader { first_seq: 0, ..header }),
        (
            "it says it is newer than what is read",
            ReadOptions::default().to(Position::Seq(2)),
            BlockHeader { first_seq: far, ..header },
        ),
        (
            "it says it was received earlier",
            ReadOptions::default().from(Position::Time(header.first_time_us)),
            BlockHeader { first_time_us: 0, last_time_us: 0, ..header },
        ),
        (
            "it says it was received later",
            ReadOptions::default().to(Position::Time(header.last_time_us + 1)),
            BlockHeader { first_time_us: far, last_time_us: far, ..header },
        ),
    ] {
        let mut bytes = original.clone();
        bytes[range.start..range.start + BlockHeader::LEN].copy_from_slice(&changed.encode());
        let damaged = image.with(path, with_crc(bytes, range.start, range.len()));
        let store = fixture.builder(MemoryDisk::of(&damaged)).open_read_only().unwrap();
        let logstore = store.logstore(&name(AES)).unwrap();
        let read: Result<Vec<_>> = logstore.read(0, &options).unwrap().collect();
        assert!(matches!(read, Err(Error::Tampered { .. })), "{what}: {read:?}");
    }
}

/// A footer that claims an earlier end of the shard would make a reader end or begin there.
#[test]
fn a_forged_end_of_a_shard_is_found() {
    let fixture = Fixture::closed();
    let image = fixture.image();
    let path = &segments_of(&fixture, &image, AES, 1)[0];
    let mut bytes = image.files[path].clone();
    let at = blocks(&bytes).1;
    // One more than the last sequence number.
    bytes[at + 48..at + 56].copy_from_slice(&9u64.to_le_bytes());
    let len = bytes.len() - 16 - at;
    let damaged = image.with(path, with_crc(bytes, at, len));
    let store = fixture.builder(MemoryDisk::of(&damaged)).open_read_only().unwrap();
    let logstore = store.logstore(&name(AES)).unwrap();
    let end = Position::End;
    for options in [ReadOptions::default().from(end), ReadOptions::default().to(end)] {
        let reader = logstore.read(1, &options);
        assert!(matches!(reader, Err(Error::Tampered { .. })), "{reader:?}");
    }
}
