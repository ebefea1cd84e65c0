//! A store that was not closed: below the durable mark every change is detected; above it is a torn
//! tail, which is dropped and reported.

use envelog::inspect::{BlockHeader, SegmentHeader};

use super::{moved::segments_of, structures::blocks, *};

/// The files on the disk when the writing process ended without closing the store.
struct Unclean {
    fixture: Fixture,
    image: Image,
    /// The unsealed segments, with their Logstores and shards.
    open: BTreeMap<PathBuf, (LogstoreName, u32)>,
    /// The offset up to which the catalogue knows each segment to be durable. Without a checkpoint,
    /// the catalogue knows no offset.
    known: BTreeMap<PathBuf, usize>,
}

impl Unclean {
    /// Each Logstore has a sealed and an open segment in its first shard: three synced records, and
    /// then two that were only written.
    fn new(checkpoint: bool) -> Self {
        let mut fixture = Fixture::new();
        let store = fixture.create();
        let mut known = BTreeMap::new();
        let mut open = BTreeMap::new();
        for logstore in [AES, SM4, PLAIN] {
            fixture.put(&store, logstore, 0);
            fixture.put(&store, logstore, 1);
            store.logstore(&name(logstore)).unwrap().roll().unwrap();
            fixture.put(&store, logstore, 0);
            fixture.put(&store, logstore, 0);
        }
        let newest = |image: &Image, logstore: &str, shard: &str| {
            let dir =
                fixture.world.logstore_dir(&store.logstore(&name(logstore)).unwrap()).join(shard);
            image.files.keys().rfind(|path| path.starts_with(&dir)).unwrap().clone()
        };
        let image = fixture.image();
        for logstore in [AES, SM4, PLAIN] {
            open.insert(newest(&image, logstore, "shard-0000"), (name(logstore), 0));
        }
        if checkpoint {
            store.admin().checkpoint().unwrap();
            let image = fixture.image();
            known = open.keys().map(|path| (path.clone(), blocks(&image.files[path]).1)).collect();
        }
        for logstore in [AES, SM4, PLAIN] {
            fixture.put(&store, logstore, 0);
            for _ in 0..2 {
                let written = fixture.written.get_mut(&(name(logstore), 0)).unwrap();
                let text = format!("{logstore} 0 {}", written.len());
                let options = common::written().shard(ShardChoice::Shard(0));
                store.logstore(&name(logstore)).unwrap().append(record(&text), &options).unwrap();
                written.push(text);
            }
        }
        let image = fixture.image();
        drop(store);
        Self { fixture, image, open, known }
    }

    /// The durable end of an open segment, if block `damaged` cannot contribute its mark.
    fn mark(&self, path: &Path, damaged: Option<usize>) -> usize {
        let bytes = &self.image.files[path];
        let header = SegmentHeader::decode(bytes).unwrap();
        let marks = blocks(bytes)
            .0
            .into_iter()
            .enumerate()
            .filter(|(number, _)| Some(*number) != damaged)
            .map(|(_, block)| BlockHeader::decode(&bytes[block]).unwrap().durable_mark as usize);
        marks
            .chain(self.known.get(path).copied())
            .max()
            .unwrap_or(0)
            .max(header.body_start as usize)
    }

    /// The number of records in each block of an open segment, and the number of records before the
    /// segment.
    fn before(&self, path: &Path) -> (Vec<usize>, usize) {
        let bytes = &self.image.files[path];
        let counts: Vec<usize> = blocks(bytes)
            .0
            .into_iter()
            .map(|block| BlockHeader::decode(&bytes[block]).unwrap().group_count as usize)
            .collect();
        let before = self.fixture.written[&self.open[path]].len() - counts.iter().sum::<usize>();
        (counts, before)
    }

    /// The records that remain if only these blocks of an open segment remain.
    fn left(&self, path: &Path, is_left: impl Fn(usize) -> bool) -> Vec<String> {
        let (counts, before) = self.before(path);
        let written = &self.fixture.written[&self.open[path]];
        let mut left = written[..before].to_vec();
        let mut at = before;
        for (number, count) in counts.into_iter().enumerate() {
            if is_left(number) {
                left.extend_from_slice(&written[at..at + count]);
            }
            at += count;
        }
        left
    }

    /// Reads a shard without writing, up to an error or the apparent end.
    fn read(
        &self,
        image: &Image,
        (logstore, shard): &(LogstoreName, u32),
    ) -> (Vec<String>, Option<Error>, Vec<&'static str>) {
        let store = self.fixture.builder(MemoryDisk::of(image)).open_read_only().unwrap();
        let (texts, error) = read_all(&store, logstore, *shard);
        let options = VerifyOptions::default().logstore(logstore.clone());
        let report = store.admin().verify(&options, &mut |_| {}).unwrap();
        (texts, error, report.faults.iter().map(|fault| fault.code).collect())
    }

    /// Opens for writing, appends, and reads all records. Also returns the number of bytes that
    /// recovery reports as dropped.
    fn go_on(&self, image: &Image, shard: &(LogstoreName, u32)) -> Result<(Vec<String>, u64)> {
        let (mut texts, dropped, error) = self.append_and_read(image, shard)?;
        assert!(error.is_none(), "{error:?}");
        assert_eq!(texts.pop().as_deref(), Some("after"));
        Ok((texts, dropped))
    }

    fn append_and_read(
        &self,
        image: &Image,
        (logstore, shard): &(LogstoreName, u32),
    ) -> Result<(Vec<String>, u64, Option<Error>)> {
        let store = self.fixture.builder(MemoryDisk::of(image)).open()?;
        let handle = store.logstore(logstore)?;
        let append = synced().shard(ShardChoice::Shard(*shard));
        handle.append(record("after"), &append)?;
        let dropped = handle.status()?.recovery.iter().map(|notice| notice.bytes_dropped).sum();
        let (texts, error) = read_all(&store, logstore, *shard);
        Ok((texts, dropped, error))
    }
}

fn read_all(store: &Store, logstore: &LogstoreName, shard: u32) -> (Vec<String>, Option<Error>) {
    let mut texts = Vec::new();
    let handle = match store.logstore(logstore) {
        Ok(handle) => handle,
        Err(error) => return (texts, Some(error)),
    };
    for read in handle.read(shard, &ReadOptions::default()).unwrap() {
        match read {
            Ok(record) => texts.push(String::from_utf8(record.bytes.to_vec()).unwrap()),
            Err(error) => return (texts, Some(error)),
        }
    }
    (texts, None)
}

#[test]
fn an_unclean_store_goes_on_with_all_that_is_there() {
    for checkpoint in [false, true] {
        let unclean = Unclean::new(checkpoint);
        assert!(unclean.fixture.examine(&unclean.image, None).is_clean());
        for (path, shard) in &unclean.open {
            let (texts, dropped) = unclean.go_on(&unclean.image, shard).unwrap();
            assert_eq!(
                (&texts, dropped),
                (&unclean.fixture.written[shard], 0),
                "{}",
                path.display()
            );
            assert_eq!(
                unclean.before(path).0.len(),
                if checkpoint { 6 } else { 5 },
                "a checkpoint adds a mark"
            );
        }
    }
}

/// Every byte of every file. In an open segment the result depends on the durable mark; elsewhere
/// it is as in a closed store.
#[test]
fn every_changed_byte_of_an_unclean_store_is_found_or_dropped() {
    for checkpoint in [false, true] {
        let unclean = Unclean::new(checkpoint);
        let (fixture, image) = (&unclean.fixture, &unclean.image);
        let store = fixture.builder(MemoryDisk::of(image)).open_read_only().unwrap();
        let dropped_some = AtomicUsize::new(0);
        in_parallel(&all_parts(image), |(path, _, part)| {
            for (at, flip) in part.bytes.clone().map(|at| (at, 1u8 << (at % 8))) {
                let mut bytes = image.files[path].clone();
                bytes[at] ^= flip;
                let damaged_image = image.with(path, bytes);
                let what = format!(
                    "{}, byte {at} ({}), checkpoint {checkpoint}",
                    path.display(),
                    part.name
                );
                let Some(shard) = unclean.open.get(path) else {
                    // The content of the lock file is only a hint, and the last audit record may be
                    // newer than the catalogue.
                    if FileKind::of(path) == FileKind::Lock
                        || (!checkpoint && part.name == "last newline")
                    {
                        continue;
                    }
                    let verdict =
                        fixture.examine(&damaged_image, fixture.concerned(&store, path).as_ref());
                    let codes = damaged(part);
                    let found = verdict.shows(codes) && verdict.is_verified(codes);
                    assert!(
                        if part.may_be_lost { verdict.is_clean() } else { found },
                        "{what}: {verdict:?}"
                    );
                    continue;
                };
                let blocks = blocks(&image.files[path]).0;
                let block = blocks.iter().position(|block| block.contains(&at));
                let (texts, error, verified) = unclean.read(&damaged_image, shard);
                match block {
                    Some(number) if blocks[number].end > unclean.mark(path, Some(number)) => {
                        // Above the mark: a torn tail for a reader; a writer drops and reports it.
                        assert!(
                            error.is_none() && verified.is_empty(),
                            "{what}: {error:?} {verified:?}"
                        );
                        assert_eq!(texts, unclean.left(path, |left| left < number), "{what}");
                        let (texts, _) = unclean.go_on(&damaged_image, shard).unwrap();
                        assert_eq!(texts, unclean.left(path, |left| left != number), "{what}");
                        dropped_some.fetch_add(1, Ordering::Relaxed);
                    }
                    _ => {
                        let codes = damaged(part);
                        let code = error.as_ref().map_or("none", Error::code);
                        assert!(
                            codes.contains(&code) && codes.contains(&verified[0]),
                            "{what}: {error:?} {verified:?}"
                        );
                        assert_eq!(
                            texts,
                            unclean.left(path, |left| block.is_some_and(|number| left < number))
                                [..texts.len()]
                        );
                        let refused = unclean.go_on(&damaged_image, shard).unwrap_err();
                        assert!(codes.contains(&refused.code()), "{what}: {refused}");
                    }
                }
            }
        });
        assert!(dropped_some.into_inner() > 100, "there is something above the mark");
    }
}

/// The same with a recomputed CRC: a reader gets the written records or an error.
#[test]
fn every_forged_byte_of_an_open_segment_is_found_or_dropped() {
    let unclean = Unclean::new(false);
    let image = &unclean.image;
    let open: Vec<_> = all_parts(image)
        .into_iter()
        .filter(|(path, _, _)| unclean.open.contains_key(path))
        .collect();
    in_parallel(&open, |(path, kind, part)| {
        let bytes = part.bytes.clone().filter(|_| part.covered.is_some());
        for (at, flip) in bytes.map(|at| (at, 1u8 << (at % 8))) {
            let mut bytes = image.files[path].clone();
            bytes[at] ^= flip;
            fix_crc(*kind, part, &mut bytes);
            let damaged_image = image.with(path, bytes);
            let what = format!("{}, byte {at} ({})", path.display(), part.name);
            let shard = &unclean.open[path];
            let written = &unclean.fixture.written[shard];
            let blocks = blocks(&image.files[path]).0;
            let block = blocks.iter().position(|block| block.contains(&at));
            let (texts, error, verified) = unclean.read(&damaged_image, shard);
            assert_eq!(texts, written[..texts.len()], "{what}");
            let above =
                block.is_some_and(|number| blocks[number].end > unclean.mark(path, Some(number)));
            let found = error.is_some() && !verified.is_empty();
            assert!(found || above, "{what}: {error:?} {verified:?}");
            match unclean.append_and_read(&damaged_image, shard) {
                // Recovery does not change the data below the mark; a reader detects the forgery.
                Ok((texts, _, Some(error))) => {
                    assert!(!above && error.code() == "tampered", "{what}: {error}");
                    assert_eq!(texts, written[..texts.len()], "{what}");
                }
                // A block that cannot be placed is treated as torn.
                Ok((mut texts, dropped, None)) => {
                    assert!(above && dropped > 0, "{what}");
                    assert_eq!(texts.pop().as_deref(), Some("after"));
                    assert_eq!(
                        Some(texts),
                        block.map(|number| unclean.left(path, |left| left != number)),
                        "{what}"
                    );
                }
                Err(error) => {
                    let codes: &[&str] = match part.name {
                        // It claims to be newer than the metadata.
                        "generation" => &["rolled_back", "wrong_key"],
                        "key source" | "key version" => {
                            &["corrupt", "keyring_too_old", "rolled_back", "wrong_key"]
                        }
                        "commitment" | "salt" | "created" | "predecessor" | "limit seq" => {
                            &["wrong_key"]
                        }
                        _ => &[
                            "tampered",
                            "wrong_key",
                            "corrupt",
                            "truncated",
                            "newer_format",
                            "unsupported_feature",
                        ],
                    };
                    assert!(codes.contains(&error.code()), "{what}: {error}");
                }
            }
        }
    });
}

/// Every length of every open segment: below the end that the catalogue knows it is truncation;
/// above it is a torn tail.
#[test]
fn every_truncation_of_an_open_segment_is_found_or_dropped() {
    for checkpoint in [false, true] {
        let unclean = Unclean::new(checkpoint);
        let image = &unclean.image;
        let lens = |path: &PathBuf| 0..image.files[path].len();
        let cuts: Vec<_> =
            unclean.open.keys().flat_map(|path| lens(path).map(move |len| (path, len))).collect();
        in_parallel(&cuts, |&(path, len)| {
            let bytes = &image.files[path];
            let damaged_image = image.with(path, bytes[..len].to_vec());
            let shard = &unclean.open[path];
            let body_start = SegmentHeader::decode(bytes).unwrap().body_start as usize;
            let known = unclean.known.get(path).copied().unwrap_or(0).max(body_start);
            let (texts, error, verified) = unclean.read(&damaged_image, shard);
            let going_on = unclean.go_on(&damaged_image, shard);
            if len < known {
                let code = error.as_ref().map(Error::code);
                assert_eq!(
                    (code, verified[0]),
                    (Some("truncated"), "truncated"),
                    "{} cut to {len}",
                    path.display()
                );
                assert_eq!(going_on.unwrap_err().code(), "truncated");
            } else {
                let whole = blocks(bytes).0.iter().filter(|block| block.end <= len).count();
                let left = unclean.left(path, |number| number < whole);
                assert!(
                    error.is_none() && verified.is_empty(),
                    "{} cut to {len}: {error:?}",
                    path.display()
                );
                assert_eq!(texts, left);
                let (texts, dropped) = going_on.unwrap();
                let end = whole.checked_sub(1).map_or(body_start, |last| blocks(bytes).0[last].end);
                // Zeros at the end are unwritten space.
                let data =
                    bytes[end..len].iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
                assert_eq!((texts, dropped), (left, data as u64));
            }
        });
    }
}

/// The catalogue periodically records the synced end of an open segment. From then on, blocks that
/// no mark covers yet cannot be cut off undetected.
#[test]
fn synced_blocks_that_the_catalogue_has_noted_are_missed() {
    for noted in [false, true] {
        let mut fixture = Fixture::new();
        let store = fixture.create();
        for logstore in [AES, SM4, PLAIN] {
            fixture.put(&store, logstore, 0);
            fixture.put(&store, logstore, 0);
        }
        if noted {
            fixture.world.clock.advance(fixture.world.options.head_every);
            store.tick();
        }
        let image = fixture.image();
        drop(store);
        for logstore in [AES, SM4, PLAIN] {
            let path = segments_of(&fixture, &image, logstore, 0).pop().unwrap();
            let bytes = &image.files[&path];
            // A mark may follow the groups.
            let last = &blocks(bytes).0[1];
            let cut = image.with(&path, bytes[..last.start].to_vec());
            let store = fixture.builder(MemoryDisk::of(&cut)).open_read_only().unwrap();
            let error = read_all(&store, &name(logstore), 0).1.map(|error| error.code());
            let options = VerifyOptions::default().logstore(name(logstore));
            let faults = store.admin().verify(&options, &mut |_| {}).unwrap().faults;
            let verdict = (error, faults.iter().map(|fault| fault.code).collect::<Vec<_>>());
            let appended = fixture.builder(MemoryDisk::of(&cut)).open().and_then(|store| {
                let options = synced().shard(ShardChoice::Shard(0));
                store.logstore(&name(logstore))?.append(record("after"), &options)
            });
            match noted {
                true => {
                    assert_eq!(verdict, (Some("truncated"), vec!["truncated"]), "{logstore}");
                    assert_eq!(appended.unwrap_err().code(), "truncated", "{logstore}");
                }
                false => {
                    assert_eq!(verdict, (None, vec![]), "{logstore}");
                    appended.unwrap();
                }
            }
        }
    }
}

/// Bytes after the last block were never acknowledged. Zeros are ignored.
#[test]
fn what_follows_the_last_block_is_dropped_and_reported() {
    let unclean = Unclean::new(false);
    for (path, shard) in &unclean.open {
        let more: Vec<u8> = (0..700).map(|n| (n * 31 % 251) as u8).collect();
        for (more, expected) in
            [(vec![0; 700], 0), ([&more[..], &[0; 50]].concat(), 700), (more, 700)]
        {
            let longer = [&unclean.image.files[path][..], &more].concat();
            let (texts, dropped) = unclean.go_on(&unclean.image.with(path, longer), shard).unwrap();
            assert_eq!((&texts, dropped), (&unclean.fixture.written[shard], expected));
        }
    }
}
