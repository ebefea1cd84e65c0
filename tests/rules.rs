//! Tests every rule of `docs/format.md` with a store that breaks only that rule.
//!
//! The stores are golden stores, changed and re-sealed with the keys: all CRCs, tags, digests,
//! links and heads are valid.

#![allow(clippy::unwrap_used)]

mod common;
#[path = "rules/documents.rs"]
mod documents;
#[path = "rules/forge.rs"]
mod forge;

use common::{copy_dir, records, segments, synced};
use envelog::{
    Cmk, Compression, EncryptConf, EncryptType, ErrorKind, Position, ReadMode, ReadOptions, Record,
    Result, Store,
    admin::{VerifyOptions, VerifyReport},
    crypto::Suite,
    inspect::{
        BlockHeader, BlockKind, Extension, IndexEntry, KeySource, Predecessor, SEGMENT_BYTES_MAX,
        SegmentHeader,
    },
    kms::LocalKms,
};
use forge::{Chain, Copy, Patch};

const OTHER_VERSION: &str = "under another version of the data key";

/// A change of one shard of a golden store, and the expected results.
struct Row {
    rule: &'static str,
    store: &'static str,
    shard: u32,
    change: fn(&mut Chain<'_>),
    /// The error code that a reader gets. For a rule that only `verify` checks, the reader returns
    /// all data.
    read: Option<&'static str>,
    /// The code of every fault that `verify` reports.
    verify: &'static str,
    /// A part of the message of one of the faults.
    says: &'static str,
    /// Whether `verify` finds it without the key.
    keyless: bool,
}

/// A rule about unencrypted parts: header, block headers, footer.
const fn open(rule: &'static str, says: &'static str, change: fn(&mut Chain<'_>)) -> Row {
    Row {
        rule,
        store: "service-aes",
        shard: 0,
        change,
        read: Some("corrupt"),
        verify: "corrupt",
        says,
        keyless: true,
    }
}

/// A rule about encrypted parts.
const fn sealed(rule: &'static str, says: &'static str, change: fn(&mut Chain<'_>)) -> Row {
    Row { keyless: false, ..open(rule, says, change) }
}

/// A rule that only `verify` checks.
const fn verified(row: Row) -> Row {
    Row { read: None, ..row }
}

const fn of(store: &'static str, row: Row) -> Row {
    Row { store, ..row }
}

const fn found(code: &'static str, row: Row) -> Row {
    Row { read: Some(code), verify: code, ..row }
}

fn u16(value: u16) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

fn u32(value: u32) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

fn u64(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

fn patch(patch: &mut Patch, at: usize, bytes: Vec<u8>) {
    patch.push((at, bytes));
}

// ---- headers, and the context of a segment ----

const SEGMENTS: &[Row] = &[
    found(
        "newer_format",
        open("version of a header", "format version 3", |chain| {
            patch(&mut chain.segments[0].header_patch, 8, u16(3));
        }),
    ),
    open("version 0 of a header", "version", |chain| {
        patch(&mut chain.segments[0].header_patch, 8, u16(0))
    }),
    found(
        "unsupported_feature",
        open("incompatible feature of a header", "0x10", |chain| {
            patch(&mut chain.segments[0].header_patch, 24, u32(0x10));
        }),
    ),
    found(
        "unsupported_feature",
        open("suite of a header", "cipher suite 9", |chain| {
            patch(&mut chain.segments[0].header_patch, 10, u16(9));
        }),
    ),
    found(
        "unsupported_feature",
        open("payload hash of a header", "payload hash 3", |chain| {
            patch(&mut chain.segments[0].header_patch, 248, u16(3));
        }),
    ),
    open("key source of a header", "key source", |chain| {
        patch(&mut chain.segments[0].header_patch, 120, u32(2))
    }),
    open("reserved bytes of a header", "reserved", |chain| {
        patch(&mut chain.segments[0].header_patch, 251, vec![1])
    }),
    open("kind of the predecessor", "predecessor", |chain| {
        patch(&mut chain.segments[1].header_patch, 160, u32(3))
    }),
    open("no predecessor is all zeros", "predecessor", |chain| {
        patch(&mut chain.segments[0].header_patch, 232, u64(1));
    }),
    open("no predecessor has no last receive time", "predecessor", |chain| {
        patch(&mut chain.segments[0].header_patch, 240, u64(1));
    }),
    open("limit not below the first", "limit", |chain| chain.segments[1].header.limit_seq = 3),
    found(
        "unsupported_feature",
        open("critical header extension", "critical header extension 1", |chain| {
            let extension =
                Extension { kind: Extension::DICTIONARY, critical: true, data: vec![1] };
            chain.segments[0].header.extensions.push(extension);
        }),
    ),
    open("flags of a header extension", "header extension", |chain| {
        chain.segments[0].header.extensions.push(Extension {
            kind: 2,
            critical: false,
            data: vec![0; 8],
        });
        patch(&mut chain.segments[0].header_patch, 274, u16(2));
    }),
    open("extensions fill their room", "header extension", |chain| {
        chain.segments[0].header.extensions.push(Extension {
            kind: 2,
            critical: false,
            data: vec![0; 8],
        });
        patch(&mut chain.segments[0].header_patch, 276, u32(7));
    }),
    found(
        "tampered",
        open("shard of a segment", "belongs elsewhere", |chain| chain.segments[0].header.shard = 1),
    ),
    found(
        "tampered",
        open("store of a segment", "belongs elsewhere", |chain| {
            patch(&mut chain.segments[0].header_patch, 32, vec![7; 16]);
        }),
    ),
    found(
        "tampered",
        open("Logstore of a segment", "belongs elsewhere", |chain| {
            patch(&mut chain.segments[0].header_patch, 48, vec![7; 16]);
        }),
    ),
    found(
        "tampered",
        open("ordinal of a segment", "belongs elsewhere", |chain| {
            patch(&mut chain.segments[2].header_patch, 88, u64(9));
        }),
    ),
    found(
        "tampered",
        open("first sequence number of a segment and its name", "belongs elsewhere", |chain| {
            patch(&mut chain.segments[2].header_patch, 96, u64(6));
        }),
    ),
    found(
        "rolled_back",
        open("generation of a segment", "is older than", |chain| {
            chain.segments[1].header.generation = 3;
        }),
    ),
    open(
        "suite and key source: the keyring's key encrypts nothing",
        "does not go with its key",
        |chain| {
            let segment = &mut chain.segments[0];
            (segment.header.suite, segment.header.key_source) =
                (Suite::Aes256Gcm, KeySource::Keyring(1));
        },
    ),
    // Only the service keyring, for a Logstore with an envelope.
    open("key source: not behind a data key", "follows one under a data key", |chain| {
        let header = &mut chain.segments[2].header;
        (header.suite, header.key_source) = (Suite::Aes256Gmac, KeySource::Keyring(1));
    }),
    open(
        "key source: not in front of a data key either",
        "follows one under a data key",
        |chain| {
            let header = &mut chain.segments[0].header;
            (header.suite, header.key_source) = (Suite::Aes256Gmac, KeySource::Keyring(1));
        },
    ),
    of(
        "byok-aes",
        open(
            "key source: the last segment of a Logstore under a customer's key",
            "follows one under",
            |chain| {
                let header = &mut chain.segments.last_mut().unwrap().header;
                (header.suite, header.key_source) = (Suite::Aes256Gmac, KeySource::Keyring(1));
            },
        ),
    ),
    of(
        "byok-aes",
        open(
            "key source: every segment of a Logstore under a customer's key",
            "follows one under",
            |chain| {
                for segment in &mut chain.segments {
                    (segment.header.suite, segment.header.key_source) =
                        (Suite::Aes256Gmac, KeySource::Keyring(1));
                }
            },
        ),
    ),
    of(
        "byok-aes",
        open(
            "key source: one more segment behind those under a customer's key",
            "follows one under",
            |chain| {
                chain.append_under_the_keyring();
            },
        ),
    ),
    open("data key: one more segment under an older version", OTHER_VERSION, |chain| {
        chain.append_under(Suite::Aes256Gcm, KeySource::DataKey(1));
    }),
    of(
        "byok-aes",
        open(
            "data key: one more segment under an older version, under a customer's key",
            OTHER_VERSION,
            |chain| {
                chain.append_under(Suite::Aes256Gcm, KeySource::DataKey(1));
            },
        ),
    ),
    of(
        "byok-aes",
        open("data key: the last segment under an older version", OTHER_VERSION, |chain| {
            chain.segments.last_mut().unwrap().header.key_source = KeySource::DataKey(1);
        }),
    ),
    of(
        "byok-aes",
        open("data key: the first segment under a newer version", OTHER_VERSION, |chain| {
            chain.segments[0].header.key_source = KeySource::DataKey(2);
        }),
    ),
    of(
        "service-sm4",
        open("suite and data key: one cipher", "does not go with its key", |chain| {
            chain.segments[0].header.suite = Suite::Aes256Gmac;
        }),
    ),
    found(
        "rolled_back",
        open("data-key version of a segment", "data-key version 3", |chain| {
            patch(&mut chain.segments[2].header_patch, 124, u32(3));
        }),
    ),
    // The predecessor.
    found(
        "tampered",
        open("a predecessor is named", "denies its predecessor", |chain| {
            chain.segments[1].header.predecessor = Predecessor::None;
        }),
    ),
    // A reader proves the segments of the older data key first.
    Row {
        read: Some("rolled_back"),
        ..open("the predecessor is the one before", "not the one before it", |chain| {
            chain.segments[2].link = |end| end.ordinal = 1;
        })
    },
    open(
        "a segment begins behind its predecessor's end",
        "lies below the end of the one before",
        |chain| {
            let segment = &mut chain.segments[1];
            segment.header.first_seq = 2;
            segment.blocks[0].header.first_seq = 2;
        },
    ),
    open("the same, the end of the predecessor denied", "another end than the footer", |chain| {
        let segment = &mut chain.segments[1];
        segment.header.first_seq = 2;
        segment.blocks[0].header.first_seq = 2;
        segment.link = |end| end.end_seq = 2;
    }),
    found(
        "truncated",
        open(
            "names of segments ascend by their first sequence numbers",
            "segment 3 of the shard is missing",
            |chain| {
                let segment = &mut chain.segments[2];
                segment.header.first_seq = 0;
                segment.blocks[0].header.first_seq = 0;
            },
        ),
    ),
    open("blocks of a sealed predecessor", "another number of blocks", |chain| {
        chain.segments[1].link = |end| end.blocks -= 1;
    }),
    open("end of a sealed predecessor", "another end", |chain| {
        chain.segments[1].link = |end| end.end_seq -= 1
    }),
    open("last receive time of a sealed predecessor", "another last receive time", |chain| {
        chain.segments[1].link = |end| end.last_time_us -= 1;
    }),
    found(
        "rolled_back",
        open("bytes of a sealed predecessor", "another segment than", |chain| {
            chain.segments[1].link = |end| end.bytes += 1;
        }),
    ),
    found(
        "rolled_back",
        open("digest of a sealed predecessor", "another segment", |chain| {
            chain.segments[1].link = |end| end.digest[0] ^= 1;
        }),
    ),
    open(
        "a segment is made after the last receive time before it",
        "made before the last receive time",
        |chain| {
            chain.segments[1].header.created_us = chain.segments[0].blocks[0].header.first_time_us;
        },
    ),
    open("without setbacks there is no latest time", "latest receive time", |chain| {
        patch(&mut chain.segments[1].header_patch, 264, u64(1));
    }),
    open("no setback in front of the first segment", "in front of the first segment", |chain| {
        chain.segments[0].header.setbacks = 1;
    }),
    open("a setback is made before the last receive time", "and do not", |chain| {
        (chain.segments[1].header.setbacks, chain.segments[1].header.latest_us) = (1, u64::MAX);
    }),
    open("the latest time is not before the last one", "is before the last one", |chain| {
        chain.segments[1].header.setbacks = 1;
    }),
    open(
        "the latest time is that of the segments before",
        "is not that of the segments",
        |chain| {
            let time_us = chain.segments[0].blocks[0].header.first_time_us;
            let header = &mut chain.segments[1].header;
            (header.created_us, header.setbacks, header.latest_us) = (time_us, 1, u64::MAX);
        },
    ),
    of(
        "recovered",
        open("end of a cut predecessor", "end", |chain| {
            chain.segments[2].link = |end| end.end_seq -= 1;
        }),
    ),
    of(
        "recovered",
        open("last receive time of a cut predecessor", "do not end as it was ended", |chain| {
            chain.segments[2].link = |end| end.last_time_us += 1;
        })
        .with("last receive time of the blocks", Some("corrupt")),
    ),
    of(
        "recovered",
        found(
            "truncated",
            open("blocks of a cut predecessor", "it should have 2", |chain| {
                chain.segments[2].link = |end| end.blocks += 1;
            }),
        ),
    ),
    of(
        "recovered",
        open("bytes of a cut predecessor", "block", |chain| {
            chain.segments[2].link = |end| end.bytes -= 1;
        }),
    ),
    of(
        "recovered",
        open("a cut predecessor keeps its header", "cut within its header", |chain| {
            chain.segments[2].link = |end| (end.bytes, end.blocks, end.end_seq) = (100, 0, 1);
        }),
    ),
    verified(of(
        "recovered",
        open("digest of a cut predecessor", "not those that the successor names", |chain| {
            chain.segments[2].link = |end| end.digest[0] ^= 1;
        }),
    )),
];

// ---- blocks ----

const BLOCKS: &[Row] = &[
    open("kind of a block", "kind of the block", |chain| {
        patch(&mut chain.segments[0].blocks[0].patch, 4, vec![4])
    }),
    open("compression of a block", "compression", |chain| {
        patch(&mut chain.segments[0].blocks[0].patch, 5, vec![3]);
    }),
    open("flags of a block", "flags", |chain| {
        patch(&mut chain.segments[0].blocks[0].patch, 6, vec![1])
    }),
    open("reserved bytes of a block", "reserved", |chain| {
        patch(&mut chain.segments[0].blocks[0].patch, 80, vec![1]);
    }),
    found(
        "tampered",
        open("segment tag of a block", "the place of a block", |chain| {
            patch(&mut chain.segments[0].blocks[0].patch, 8, vec![0; 8]);
        }),
    ),
    found(
        "tampered",
        open("number of a block", "the place of a block", |chain| {
            patch(&mut chain.segments[0].blocks[1].patch, 16, u32(7));
        }),
    ),
    open("raw length of a block", "raw length", |chain| {
        chain.segments[0].blocks[0].header.raw_len -= 1
    }),
    open("count of a block of groups", "number of groups", |chain| {
        chain.segments[0].blocks[0].put(BlockKind::Groups, 0, &[], &[]);
    }),
    open("logs of opaque records", "number of logs", |chain| {
        let block = chain.segments[0]
            .blocks
            .iter_mut()
            .find(|block| block.header.kind == BlockKind::Opaque);
        block.unwrap().header.log_count = 1;
    }),
    open("length of a list", "length of the list", |chain| {
        patch(&mut chain.segments[0].blocks[0].patch, 36, u32((32 << 20) + 1));
    }),
    open("times of a block", "receive times", |chain| {
        let header = &mut chain.segments[0].blocks[0].header;
        header.last_time_us = header.first_time_us - 1;
    }),
    open("sequence numbers end below 2^64", "first sequence number", |chain| {
        patch(&mut chain.segments[0].blocks[0].patch, 40, u64(u64::MAX));
    }),
    open(
        "sequence numbers of a block begin within the segment",
        "below those of the block before",
        |chain| {
            chain.segments[1].blocks[0].header.first_seq = 3;
        },
    ),
    open(
        "sequence numbers of blocks do not run backwards",
        "below those of the block before",
        |chain| {
            let blocks = &mut chain.segments[0].blocks;
            blocks.last_mut().unwrap().header.first_seq = 1;
        },
    ),
    open("sequence numbers of a block end within the segment", "beyond the limit", |chain| {
        chain.segments[0].header.limit_seq = 3;
    }),
    open(
        "receive times of blocks do not run backwards",
        "received before the block before it",
        |chain| {
            let blocks = &mut chain.segments[0].blocks;
            let time_us = blocks[0].header.first_time_us;
            blocks.last_mut().unwrap().set_time(time_us - 1);
        },
    ),
    open(
        "receive times of segments do not run backwards",
        "received before the block before it",
        |chain| {
            let time_us = chain.segments[0].blocks[0].header.first_time_us;
            chain.segments[1].blocks[0].set_time(time_us);
        },
    ),
    of(
        "unclean",
        open("the same in an open segment", "received before the block before it", |chain| {
            let open = chain.segments.last_mut().unwrap();
            let time_us = open.blocks[0].header.first_time_us;
            open.blocks.last_mut().unwrap().set_time(time_us - 1);
        }),
    ),
    open("a durable mark lies at most at its own block", "durable mark", |chain| {
        patch(&mut chain.segments[0].blocks[0].patch, 64, u64(309));
    }),
    open("a durable mark lies at least at the end of the header", "durable mark", |chain| {
        patch(&mut chain.segments[0].blocks[0].patch, 64, u64(307));
    }),
    open("a mark has no payload", "contents of a mark", |chain| {
        chain.segments[0].blocks[0].header.kind = BlockKind::Mark;
        chain.segments[0].blocks[0].header.log_count = 0;
    }),
    open("the times of a mark are equal", "receive times of a mark", |chain| {
        let mut mark = chain.segments[0].blocks.last().unwrap().mark();
        mark.header.first_time_us -= 1;
        chain.segments[0].blocks.push(mark);
    }),
    open("a mark lies behind the groups before it", "below those of the block before", |chain| {
        let mut mark = chain.segments[0].blocks.last().unwrap().mark();
        mark.header.first_seq -= 1;
        chain.segments[0].blocks.push(mark);
    }),
    // The payload.
    sealed("a list has as many records as the count says, not fewer", "fewer records", |chain| {
        let header = &mut chain.segments[0].blocks[0].header;
        header.group_count += 1;
        header.raw_len += 4;
        header.payload_len += 4;
        let last = chain.segments[0].blocks[0].payload.last_chunk::<4>().unwrap().to_vec();
        chain.segments[0].blocks[0].payload.extend(last);
        chain.segments[0].blocks.truncate(1);
    }),
    sealed("and not more", "more records", |chain| {
        let block = chain.segments[0]
            .blocks
            .iter_mut()
            .rfind(|block| block.header.kind == BlockKind::Opaque)
            .unwrap();
        block.put_opaque(&[b"one", b"two"], &[0, 0]);
        block.header.group_count = 1;
        block.header.raw_len -= 4;
        block.header.payload_len -= 4;
        block.payload.truncate(block.payload.len() - 4);
    }),
    sealed("a list is one of frames", "does not parse", |chain| {
        chain.segments[0].blocks[0].list_mut()[0] = 0x12
    }),
    sealed("a frame is written in the shortest way", "shortest", |chain| {
        let block = &mut chain.segments[1].blocks[0];
        block.put(BlockKind::Opaque, 0, &[b"one"], &[0]);
        let payload = [&[0x0a, 0x83, 0x00][..], &block.payload[2..]].concat();
        block.header.list_len += 1;
        block.store(Compression::None, payload.len(), payload);
    }),
    sealed("an opaque record has 16 MiB at most", "beyond the limit", |chain| {
        chain.segments[1].blocks[0].put_opaque(&[&vec![0; (16 << 20) + 1]], &[0]);
    }),
    sealed("the table begins with the first receive time", "first receive time", |chain| {
        chain.segments[1].blocks[0].put_opaque(&[b"one"], &[1]);
    }),
    sealed("the table does not run backwards", "run backwards within its table", |chain| {
        chain.segments[2].blocks[0].put_opaque(&[b"one", b"two", b"three"], &[0, 5, 3]);
    }),
    sealed("the table ends with the last receive time", "last receive time", |chain| {
        chain.segments[2].blocks[0].put_opaque(&[b"one", b"two"], &[0, 5]);
        chain.segments[2].blocks[0].header.last_time_us += 1;
    }),
    verified(sealed("a group is a valid log group", "group 0 of it", |chain| {
        let block = &mut chain.segments[1].blocks[0];
        // The field number of the first log.
        block.list_mut()[2] = 0x0b;
    })),
    verified(sealed(
        "the groups have as many logs as the header says",
        "have 1 logs, its header says 2",
        |chain| {
            chain.segments[1].blocks[0].header.log_count = 2;
        },
    )),
    verified(of(
        "plain",
        open("the same, without the key where nothing is encrypted", "its header says", |chain| {
            chain.segments[0].blocks[0].header.log_count += 1;
        }),
    )),
    sealed("lz4 decompresses to the raw length", "compressed payload", |chain| {
        let block = &mut chain.segments[1].blocks[0];
        block.put_opaque(&[&[7; 500]], &[0]);
        let (raw_len, short) =
            (block.payload.len(), lz4_flex::block::compress(&block.payload[..500]));
        block.store(Compression::Lz4, raw_len, short);
    }),
    sealed("zstd states the raw length", "compressed payload", |chain| {
        let block = &mut chain.segments[1].blocks[0];
        block.put_opaque(&[&[7; 500]], &[0]);
        let (raw_len, short) =
            (block.payload.len(), zstd::bulk::compress(&block.payload[..500], 1).unwrap());
        block.store(Compression::Zstd, raw_len, short);
    }),
    sealed("zstd is one frame", "compressed payload", |chain| {
        let block = &mut chain.segments[1].blocks[0];
        block.put_opaque(&[&[7; 500]], &[0]);
        let (raw_len, mut frames) =
            (block.payload.len(), zstd::bulk::compress(&block.payload, 1).unwrap());
        frames.extend(zstd::bulk::compress(b"", 1).unwrap());
        block.store(Compression::Zstd, raw_len, frames);
    }),
    open("what is compressed is shorter", "payload length", |chain| {
        let block = &mut chain.segments[1].blocks[0];
        block.header.compression = Compression::Lz4;
    }),
];

// ---- footers ----

const fn footer(rule: &'static str, says: &'static str, change: fn(&mut Chain<'_>)) -> Row {
    verified(open(rule, says, change))
}

const DISAGREES: &str = "does not agree with the blocks";

const FOOTERS: &[Row] = &[
    found(
        "newer_format",
        open("version of a footer", "format version 3", |chain| {
            patch(&mut chain.segments[0].footer_patch, 4, u16(3));
        }),
    ),
    open("reserved bytes of a footer", "reserved", |chain| {
        patch(&mut chain.segments[0].footer_patch, 6, vec![1])
    }),
    open("the other reserved bytes", "reserved", |chain| {
        patch(&mut chain.segments[0].footer_patch, 92, vec![1])
    }),
    open("flags of a footer", "flags", |chain| {
        patch(&mut chain.segments[0].footer_patch, 88, vec![2])
    }),
    open("number of index entries", "index entries", |chain| {
        patch(&mut chain.segments[0].footer_patch, 20, u32(65_537));
    }),
    found(
        "truncated",
        open("blocks that a footer counts", "it should have", |chain| {
            let blocks = chain.segments[0].blocks.len() as u32;
            patch(&mut chain.segments[0].footer_patch, 16, u32(blocks + 1));
        }),
    ),
    footer("groups that a footer counts", DISAGREES, |chain| {
        patch(&mut chain.segments[1].footer_patch, 24, u64(0x0))
    })
    .with("number of index entries", Some("corrupt")),
    footer("groups fit into the sequence numbers", "more groups", |chain| {
        patch(&mut chain.segments[1].footer_patch, 24, u64(2));
    })
    .with("more groups", Some("corrupt")),
    footer("groups are counted right", DISAGREES, |chain| {
        patch(&mut chain.segments[0].footer_patch, 24, u64(3))
    }),
    footer("logs that a footer counts", DISAGREES, |chain| {
        patch(&mut chain.segments[0].footer_patch, 32, u64(99))
    }),
    footer("bytes that a footer counts", DISAGREES, |chain| {
        patch(&mut chain.segments[0].footer_patch, 40, u64(9))
    }),
    open("end of the sequence numbers, too low", "do not end as", |chain| {
        patch(&mut chain.segments[0].footer_patch, 48, u64(3));
        patch(&mut chain.segments[0].footer_patch, 24, u64(3));
    })
    .with(DISAGREES, Some("corrupt")),
    open(
        "end of the sequence numbers, beyond the limit",
        "not within those of the segment",
        |chain| {
            patch(&mut chain.segments[2].footer_patch, 48, u64(1 << 60));
        },
    ),
    open("first receive time of a footer", DISAGREES, |chain| {
        let time_us = chain.segments[0].blocks[0].header.first_time_us;
        patch(&mut chain.segments[0].footer_patch, 56, u64(time_us - 1));
    }),
    open("last receive time of a footer", DISAGREES, |chain| {
        let time_us = chain.segments[0].blocks.last().unwrap().header.last_time_us;
        patch(&mut chain.segments[0].footer_patch, 64, u64(time_us + 1));
    }),
    open("times of a footer", "receive times of the footer", |chain| {
        patch(&mut chain.segments[0].footer_patch, 56, u64(u64::MAX));
    }),
    open("offset of a footer", "not where it says", |chain| {
        patch(&mut chain.segments[0].footer_patch, 72, u64(100_000));
    }),
    footer("hash over the blocks in a footer", DISAGREES, |chain| {
        patch(&mut chain.segments[0].footer_patch, 96, vec![7; 32])
    }),
    footer("a footer without groups has no times", "time", |chain| {
        // A segment without groups that has times.
        let segment = &mut chain.segments[2];
        segment.blocks.clear();
        patch(&mut segment.footer_patch, 64, u64(1));
    })
    .with("times or sequence numbers of groups, and counts none", Some("corrupt")),
    // The index.
    open("an index names the first block of groups", DISAGREES, |chain| {
        chain.segments[0].index = |index| {
            let second = second_block(index[0]);
            *index = vec![second];
        };
    }),
    footer("an index names no block within 64 KiB of another", DISAGREES, |chain| {
        chain.segments[0].index = |index| index.push(second_block(index[0]));
    }),
    open("offsets of an index ascend", "index", |chain| {
        chain.segments[0].index = |index| index.push(second_block(index[0]));
        patch(&mut chain.segments[0].footer_patch, 128 + 32, u64(308));
    }),
    open("an index lies within the segment", "index", |chain| {
        patch(&mut chain.segments[0].footer_patch, 128 + 24, u32(50));
    }),
    open("reserved bytes of an index", "reserved bytes of the index", |chain| {
        patch(&mut chain.segments[0].footer_patch, 128 + 28, u32(1));
    }),
    open("an index names places behind the header", "in front of the blocks", |chain| {
        patch(&mut chain.segments[0].footer_patch, 128, u64(307));
    }),
    found(
        "tampered",
        open("number in an index", "the place of a block", |chain| {
            patch(&mut chain.segments[0].footer_patch, 128 + 24, u32(1));
        }),
    )
    .with_verify("corrupt", DISAGREES),
    open("sequence number in an index", "not the block that the index names", |chain| {
        let segment = &mut chain.segments[1];
        segment.header.first_seq = 4;
        patch(&mut segment.header_patch, 96, u64(4));
        segment.blocks[0].header.first_seq = 5;
        chain.segments[2].header.first_seq = 6;
        chain.segments[2].blocks[0].header.first_seq = 6;
        patch(&mut chain.segments[1].footer_patch, 128 + 8, u64(4));
    })
    .with(DISAGREES, Some("corrupt")),
    open("time in an index", "not the block that the index names", |chain| {
        patch(&mut chain.segments[0].footer_patch, 128 + 16, u64(1));
    })
    .with(DISAGREES, Some("corrupt")),
];

/// The index entry of the second block of the first segment of `service-aes`, derived from that of
/// the first.
fn second_block(first: IndexEntry) -> IndexEntry {
    let copy = Copy::of("service-aes");
    let chain = Chain::load(&copy, 0);
    let blocks = &chain.segments[0].blocks;
    let number =
        1 + blocks[1..].iter().position(|block| block.header.kind != BlockKind::Mark).unwrap();
    let offset =
        first.offset + blocks[..number].iter().map(|block| block.header.block_len()).sum::<u64>();
    let (header, number) = (&blocks[number].header, number as u32);
    IndexEntry {
        offset,
        first_seq: header.first_seq,
        first_time_us: header.first_time_us,
        block: number,
    }
}

impl Row {
    /// The same, where `verify` and the reader report different errors.
    const fn with(self, says: &'static str, read: Option<&'static str>) -> Self {
        Self { says, read, ..self }
    }

    const fn with_verify(self, verify: &'static str, says: &'static str) -> Self {
        Self { verify, says, ..self }
    }
}

fn verify(store: &Store, keyless: bool) -> VerifyReport {
    let options = VerifyOptions::default().keyless(keyless);
    store.admin().verify(&options, &mut |_| {}).unwrap()
}

/// The sequence numbers in a shard from `from` on, as a reader returns them in one mode.
fn read(store: &Store, shard: u32, from: u64, mode: ReadMode) -> Result<Vec<u64>> {
    let name = store.list()?.remove(0);
    let options = ReadOptions::default().mode(mode).from(Position::Seq(from));
    store.logstore(&name)?.read(shard, &options)?.map(|record| Ok(record?.seq)).collect()
}

#[test]
fn what_is_sealed_again_unchanged_is_as_it_was() {
    for which in
        ["service-aes", "service-sm4", "byok-aes", "plain", "switched-off", "recovered", "unclean"]
    {
        let copy = Copy::of(which);
        let expected = all(&copy);
        for shard in 0..expected.len() as u32 {
            let mut chain = Chain::load(&copy, shard);
            chain.segments.iter_mut().for_each(|segment| segment.header.salt[0] ^= 1);
            chain.save();
        }
        assert_eq!(all(&copy), expected, "{which}");
        let store = copy.builder().open_read_only().unwrap();
        for keyless in [false, true] {
            let report = verify(&store, keyless);
            assert!(report.is_clean() && report.refused.is_empty(), "{which}: {report:?}");
        }
    }
}

/// All records of the shards of the only Logstore.
fn all(copy: &Copy) -> Vec<Vec<Record>> {
    let store = copy.builder().open_read_only().unwrap();
    let logstore = store.logstore(&store.list().unwrap()[0]).unwrap();
    (0..logstore.config().shard_count).map(|shard| records(&logstore, shard).unwrap()).collect()
}

fn check(row: &Row) {
    let Row { rule, store, shard, change, read: expected, verify: code, says, keyless } = *row;
    let copy = Copy::of(store);
    let written: Vec<u64> = all(&copy)[shard as usize].iter().map(|record| record.seq).collect();
    let mut chain = Chain::load(&copy, shard);
    change(&mut chain);
    chain.save();
    let store = copy.builder().open_read_only().unwrap();
    for mode in [ReadMode::Pread, ReadMode::Map] {
        match (read(&store, shard, 0, mode), expected) {
            (Err(error), Some(code)) => assert_eq!(error.code(), code, "{rule}: {error}"),
            (Ok(seqs), None) => {
                assert_eq!(seqs, written, "{rule}");
                for (index, &seq) in written.iter().enumerate() {
                    assert_eq!(
                        read(&store, shard, seq, mode).unwrap(),
                        written[index..],
                        "{rule}, from {seq}"
                    );
                }
            }
            (result, _) => panic!("{rule}: expected {expected:?}, got {result:?}"),
        }
    }
    for without in [false, true] {
        let report = verify(&store, without);
        let faults = &report.faults;
        if without && !keyless {
            assert!(faults.is_empty(), "{rule}: {faults:?}");
            continue;
        }
        assert!(
            faults.iter().any(|fault| fault.message.contains(says)),
            "{rule} (keyless: {without}): {faults:?}"
        );
        for fault in faults {
            assert_eq!(fault.code, code, "{rule}: {faults:?}");
            let placed = fault
                .file
                .as_ref()
                .is_some_and(|file| file.extension().is_some_and(|ext| ext == "seg"));
            let no_place = ["rolled_back", "newer_format", "unsupported_feature"].contains(&code);
            assert!(no_place || (placed && fault.offset.is_some()), "{rule}: {fault:?}");
        }
    }
    drop(store);
    // A writer may refuse the shard or continue after it. It neither panics nor deletes segments
    // that it cannot read.
    let before = segments(&copy.logstore_dir(), shard);
    if let Ok(store) = copy.builder().open() {
        for name in store.list().unwrap() {
            let logstore = store.logstore(&name).unwrap();
            let _ = logstore.append(common::record("more"), &synced());
        }
    }
    assert!(before.iter().all(|path| path.exists()), "{rule}");
}

/// Checks every row and lists all failures.
fn check_all(rows: &[Row]) {
    let fails = |row: &&Row| std::panic::catch_unwind(|| check(row)).is_err();
    let failed: Vec<_> = rows.iter().filter(fails).map(|row| row.rule).collect();
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn the_rules_of_headers_and_chains() {
    check_all(SEGMENTS);
}

/// A file of more than 4 GiB is not a segment, regardless of its contents.
#[test]
fn the_longest_segment() {
    let copy = Copy::of("unclean");
    let path = segments(&copy.logstore_dir(), 0).pop().unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(SEGMENT_BYTES_MAX + 1)
        .unwrap();
    let store = copy.builder().open_read_only().unwrap();
    assert_eq!(read(&store, 0, 0, ReadMode::Pread).unwrap_err().code(), "corrupt");
    for keyless in [false, true] {
        let report = verify(&store, keyless);
        let found: Vec<_> =
            report.faults.iter().map(|fault| (fault.code, fault.file.clone())).collect();
        assert_eq!(found, [("corrupt", Some(path.clone()))], "{report:?}");
    }
}

#[test]
fn the_rules_of_blocks() {
    check_all(BLOCKS);
}

/// The holder of a segment's key can change a payload so that its tag stays valid. The digest
/// commits to the payload, so verification finds the change, with or without the keys. If the
/// forger also recomputes every later digest, a comparison with a checkpoint finds it.
#[test]
fn a_payload_forged_under_its_tag_is_found() {
    for which in ["service-aes", "service-sm4", "plain", "switched-off"] {
        let copy = Copy::of(which);
        let mut chain = Chain::load(&copy, 0);
        let last = chain.segments.last_mut().unwrap();
        let groups = last.blocks[0].header.group_count as usize;
        last.blocks[0].put_opaque(&vec![&[7; 100][..]; groups], &vec![0; groups]);
        chain.save();
        let written = all(&copy);
        let store = copy.builder().open_read_only().unwrap();
        let checkpoint = store.admin().checkpoint().unwrap();
        let verify = |keyless, against| {
            let store = copy.builder().open_read_only().unwrap();
            let options = VerifyOptions::default().keyless(keyless).against(against);
            let faults = store.admin().verify(&options, &mut |_| {}).unwrap().faults;
            faults.into_iter().map(|fault| (fault.code, fault.message)).collect::<Vec<_>>()
        };
        let says = |faults: &[(&str, String)], code, text: &str| {
            faults.iter().any(|(kind, message)| *kind == code && message.contains(text))
        };
        for keyless in [false, true] {
            assert_eq!(verify(keyless, Some(checkpoint.clone())), [], "{which}");
        }

        let path = segments(&copy.logstore_dir(), 0).pop().unwrap();
        let before = std::fs::read(&path).unwrap();
        copy.forge_payload(&path);
        let forged = std::fs::read(&path).unwrap();
        // A reader does not detect it: the tag is valid.
        assert_ne!(all(&copy), written, "{which}");
        for keyless in [false, true] {
            for against in [None, Some(checkpoint.clone())] {
                let faults = verify(keyless, against.clone());
                assert!(says(&faults, "corrupt", DISAGREES), "{which}: {faults:?}");
                let found = says(&faults, "rolled_back", "is not what it was");
                assert!(found || against.is_none(), "{which}: {faults:?}");
            }
        }

        // The footer and the catalogue are recomputed. The block is still the forged one.
        Chain::load(&copy, 0).save();
        let fitted = std::fs::read(&path).unwrap();
        let body_start = SegmentHeader::decode(&before).unwrap().body_start as usize;
        let end =
            body_start + BlockHeader::decode(&before[body_start..]).unwrap().block_len() as usize;
        assert_eq!(fitted[..end], forged[..end], "{which}");
        assert_eq!(
            fitted[end - 20..end - 4],
            before[end - 20..end - 4],
            "{which}: the tag has changed"
        );
        for keyless in [false, true] {
            assert_eq!(verify(keyless, None), [], "{which}");
            let faults = verify(keyless, Some(checkpoint.clone()));
            assert!(says(&faults, "rolled_back", "is not what it was"), "{which}: {faults:?}");
        }
    }
}

/// A description of the forgery, the error code for a reader, whether a writer is stopped too (it
/// checks only the last segment), and the forgery itself.
type Forgery = (&'static str, &'static str, bool, fn(&Copy));

const FORGERIES: &[Forgery] = &[
    ("a segment appended", "retired_key_version", true, |copy| {
        let mut chain = Chain::load(copy, 0);
        chain.append_under_the_keyring();
        chain.save_segments();
    }),
    ("the last segment with another payload", "rolled_back", true, |copy| {
        let mut chain = Chain::load(copy, 0);
        chain.segments[1].blocks[0].put_opaque(&[b"forged"], &[0]);
        chain.save_segments();
    }),
    (
        "the first segment with another payload, and the next one made to fit",
        "rolled_back",
        true,
        |copy| {
            let mut chain = Chain::load(copy, 0);
            chain.segments[0].blocks[1].put_opaque(&[b"forged"], &[0]);
            chain.save_segments();
        },
    ),
    ("the first segment alone with another payload", "rolled_back", false, |copy| {
        let second = segments(&copy.logstore_dir(), 0).remove(1);
        let good = std::fs::read(&second).unwrap();
        let mut chain = Chain::load(copy, 0);
        chain.segments[0].blocks[1].put_opaque(&[b"forged"], &[0]);
        chain.save_segments();
        std::fs::write(second, good).unwrap();
    }),
    (
        "another payload under the tag and the footer that were there",
        "retired_key_version",
        true,
        |copy| {
            copy.forge_payload(&segments(&copy.logstore_dir(), 0)[1]);
        },
    ),
];

/// A holder of an older data key can make whole segments that hold together. A reader accepts them
/// only if the catalogue, which the newest segment continues, proves them.
#[test]
fn segments_that_an_older_data_key_replaces_are_refused() {
    for store in ["service-aes", "byok-aes"] {
        let copy = Copy::of(store);
        let key = |path: &std::path::PathBuf| {
            SegmentHeader::decode(&std::fs::read(path).unwrap()).unwrap().header.key_source
        };
        let paths = segments(&copy.logstore_dir(), 0);
        let newer: Vec<_> =
            paths.iter().filter(|path| key(path) != KeySource::DataKey(1)).collect();
        assert!(!newer.is_empty() && newer.len() < paths.len(), "{store}");
        let kept: Vec<_> = newer.iter().map(|path| std::fs::read(path).unwrap()).collect();
        let mut chain = Chain::load(&copy, 0);
        chain.segments[0].header.salt[0] ^= 1;
        chain.save_segments();
        for (path, bytes) in newer.iter().zip(kept) {
            std::fs::write(path, bytes).unwrap();
        }
        let opened = copy.builder().open_read_only().unwrap();
        for mode in [ReadMode::Pread, ReadMode::Map] {
            let error = read(&opened, 0, 0, mode).expect_err(store);
            assert_eq!(error.code(), "rolled_back", "{store}: {error}");
            let logstore = opened.logstore(&opened.list().unwrap()[0]).unwrap();
            let mut reader = logstore
                .read(0, &ReadOptions::default().from(Position::Begin))
                .and_then(|mut reader| reader.next_block());
            assert!(reader.as_mut().is_err(), "{store}: a forged record is read");
        }
    }
}

/// A holder of a retired service key version can seal any unencrypted segment. The engine accepts
/// such a segment only if the catalogue, which the newest version authenticates, proves it.
#[test]
fn segments_that_a_holder_of_the_old_root_forges_are_refused() {
    for &(what, code, stops_writer, forge) in FORGERIES {
        let copy = Copy::of("plain");
        let append = |store: &Store| {
            let logstore = store.logstore(&store.list()?.remove(0))?;
            logstore.append(common::record(&"appended ".repeat(20)), &synced()).map(drop)
        };
        let store = copy.builder().open().unwrap();
        append(&store).unwrap();
        assert_eq!(store.keys().rotate_service_key().unwrap(), 2);
        store.close().unwrap();
        assert_eq!(all(&copy)[0].len(), 3);
        forge(&copy);
        let store = copy.builder().open_read_only().unwrap();
        for mode in [ReadMode::Pread, ReadMode::Map] {
            let error = read(&store, 0, 0, mode).expect_err(what);
            assert_eq!(
                (error.code(), error.kind()),
                (code, ErrorKind::Integrity),
                "{what}: {error}"
            );
        }
        for keyless in [false, true] {
            let faults = verify(&store, keyless).faults;
            assert!(
                faults.iter().any(|fault| fault.code == code),
                "{what} (keyless: {keyless}): {faults:?}"
            );
        }
        let appended = copy.builder().open().and_then(|store| append(&store));
        let appended = appended.map_err(|error| error.code());
        assert_eq!(appended, if stops_writer { Err(code) } else { Ok(()) }, "{what}");
    }
}

/// A rotation cannot end a segment left by a killed process if the next segment needs a customer's
/// key that is revoked. The head that the rotation recorded is then valid, and no block after it.
#[test]
fn forged_blocks_after_a_recorded_head_are_refused() {
    let copy = Copy::of("plain");
    let kms = LocalKms::create_or_open(copy.path("kms")).unwrap();
    let id = kms.create_key(common::REGION, &[common::ROLE]).unwrap();
    let cmk = Cmk {
        cmk_key_id: id.clone(),
        arn: common::ROLE.to_owned(),
        region_id: common::REGION.to_owned(),
    };
    let store = copy.builder().open().unwrap();
    let logstore = store.logstore(&store.list().unwrap()[0]).unwrap();
    logstore.append(common::record("in the open segment"), &synced()).unwrap();
    copy_dir(&copy.path("store"), &copy.path("killed"));
    drop((logstore, store));
    copy_dir(&copy.path("killed"), &copy.path("store"));
    let store = copy.builder().open().unwrap();
    let logstore = store.logstore(&store.list().unwrap()[0]).unwrap();
    let conf = EncryptConf::byok(EncryptType::Aes, cmk);
    let config = logstore.config().encrypt_conf(conf);
    store.update_logstore(logstore.name(), config).unwrap();
    drop((logstore, store));
    kms.disable(&id).unwrap();
    let store = copy.builder().open().unwrap();
    assert_eq!(store.keys().rotate_service_key_with(&mut |_| {}).unwrap().left_open.len(), 1);
    store.close().unwrap();
    kms.enable(&id).unwrap();
    let written = all(&copy);
    assert_eq!(written[0].len(), 3);

    let mut chain = Chain::load(&copy, 0);
    let open = chain.segments.last_mut().unwrap();
    // The old footer does not match the changed segment.
    open.footer = None;
    let mut forged = open.blocks[0].clone();
    forged.header.first_seq = forged.header.end_seq();
    forged.header.durable_mark = u64::MAX;
    forged.put_opaque(&[b"forged"], &[0]);
    open.blocks.push(forged);
    chain.save_segments();
    assert_eq!(all(&copy), written);
    let genuine = copy.path("genuine");
    copy_dir(&copy.path("store"), &genuine);
    // The blocks up to the recorded head cannot be replaced either.
    let mut chain = Chain::load(&copy, 0);
    chain.segments.last_mut().unwrap().blocks[0].put_opaque(&[b"forged in its place"], &[0]);
    chain.save_segments();
    let store = copy.builder().open_read_only().unwrap();
    let error = read(&store, 0, 0, ReadMode::Pread).unwrap_err();
    assert_eq!(error.code(), "rolled_back", "{error}");
    copy_dir(&genuine, &copy.path("store"));

    let store = copy.builder().open().unwrap();
    store
        .logstore(&store.list().unwrap()[0])
        .unwrap()
        .append(common::record("after"), &synced())
        .unwrap();
    store.close().unwrap();
    let found = all(&copy);
    assert_eq!(
        (&found[0][..3], &*found[0][3].bytes, found[0].len()),
        (&written[0][..], &b"after"[..], 4)
    );
}

/// A reader that reads to the end of a shard does not end early.
#[test]
fn the_end_of_a_shard_is_the_end_of_its_blocks() {
    let copy = Copy::of("service-aes");
    let mut chain = Chain::load(&copy, 0);
    let last = chain.segments.last_mut().unwrap();
    last.blocks[0].put_opaque(&[b"one", b"two"], &[0, 0]);
    patch(&mut last.footer_patch, 48, u64(6));
    patch(&mut last.footer_patch, 24, u64(1));
    chain.save();
    let store = copy.builder().open_read_only().unwrap();
    let logstore = store.logstore(&store.list().unwrap()[0]).unwrap();
    for options in
        [ReadOptions::default().to(Position::End), ReadOptions::default().from(Position::End)]
    {
        assert_eq!(logstore.read(0, &options).unwrap_err().code(), "corrupt");
    }
}

/// A reader that begins at a time misses no group of an earlier segment, although a footer claims an
/// earlier begin of its own segment.
#[test]
fn a_segment_begins_when_its_first_group_was_received() {
    let copy = Copy::of("service-aes");
    let mut chain = Chain::load(&copy, 0);
    let before_us = chain.segments[0].blocks[0].header.first_time_us;
    patch(&mut chain.segments[1].footer_patch, 56, u64(before_us));
    chain.save();
    let store = copy.builder().open_read_only().unwrap();
    let logstore = store.logstore(&store.list().unwrap()[0]).unwrap();
    let mut reader =
        logstore.read(0, &ReadOptions::default().from(Position::Time(before_us + 1))).unwrap();
    assert_eq!(reader.next().unwrap().unwrap().seq, 1);
    assert_eq!(reader.find_map(Result::err).unwrap().code(), "corrupt");
}

#[test]
fn the_rules_of_footers() {
    check_all(FOOTERS);
}
