//! `inspect`: shows one segment file without any key.

use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

use envelog::{
    crypto::HashAlg,
    ids::{LogstoreId, SegmentId, StoreId},
    inspect::{
        BlockHeader, Compression, DecodedHeader, Footer, KeySource, Predecessor, SegmentHeader,
    },
};
use serde::{
    Serialize, Serializer,
    ser::{Error as _, SerializeSeq as _},
};

use crate::{
    args::InspectArgs,
    exit::{Failure, Result, Status, both},
    input, output,
    setup::Setup,
};

/// The longest header: 272 bytes, 64 KiB of extensions, commitment and CRC.
const HEADER_BYTES_MAX: u64 = 272 + (64 << 10) + 36;
const FOOTER_MAGIC: &[u8] = b"EFTR";
/// The length of the CRC32 that ends a block.
const CRC_LEN: usize = 4;
/// How much to read at once when checking for zeros.
const READ_BYTES: u64 = 1 << 20;
/// Blocks per printed table: a table is in memory as a whole.
const TABLE_ROWS_MAX: usize = 1 << 12;

pub(crate) fn run(setup: &Setup, args: &InspectArgs) -> Result {
    let path = &args.file;
    let file = input::open_regular(path)?;
    let len = file.metadata().map_err(|error| Failure::file("read", path, &error))?.len();
    let segment = Segment { file, path, len };
    let decoded = SegmentHeader::decode(&segment.read(0, len.min(HEADER_BYTES_MAX))?)
        .map_err(|error| segment.damaged(0, "header", &error))?;

    // Read the blocks a second time to print them: a file may have more of them than fit in memory.
    let (at, end) = segment.walk(decoded.body_start, len, |_, _| Ok(()))?;
    let blocks = Blocks { segment: &segment, start: decoded.body_start, end: at };
    let footer = match &end {
        Part::Footer(footer) => Some(footer.as_ref()),
        _ => None,
    };
    let printed = if setup.json {
        let header = HeaderAnswer::from(&decoded);
        let footer = footer.map(|footer| FooterAnswer::new(&decoded, footer));
        output::json(&Report { file: output::path(path), bytes: len, header, blocks, footer })
    } else {
        print(&segment, &decoded, blocks, footer)
    };
    let verdict = match &end {
        Part::Damage(what) => Err(segment.damaged(at, "block", what)),
        _ => Ok(()),
    };
    both(printed, verdict)
}

#[derive(Serialize)]
struct Report<'a> {
    blocks: Blocks<'a>,
    bytes: u64,
    file: String,
    footer: Option<FooterAnswer>,
    header: HeaderAnswer,
}

/// The blocks between two offsets of a segment, read on demand.
#[derive(Clone, Copy)]
struct Blocks<'a> {
    segment: &'a Segment<'a>,
    start: u64,
    end: u64,
}

impl Blocks<'_> {
    fn each(&self, each: impl FnMut(u64, &BlockHeader) -> Result) -> Result {
        self.segment.walk(self.start, self.end, each).map(drop)
    }
}

impl Serialize for Blocks<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut seq = serializer.serialize_seq(None)?;
        let mut failed = None;
        let walked = self.each(|at, block| {
            if failed.is_none() {
                failed = seq.serialize_element(&BlockAnswer::new(at, block)).err();
            }
            Ok(())
        });
        match (failed, walked) {
            (Some(error), _) => Err(error),
            (None, Err(_)) => Err(S::Error::custom("the file can no longer be read")),
            (None, Ok(())) => seq.end(),
        }
    }
}

struct Segment<'a> {
    file: File,
    path: &'a Path,
    len: u64,
}

/// The structure that begins at an offset.
enum Part {
    Block(BlockHeader),
    Footer(Box<Footer>),
    /// The end of a segment that has not been sealed.
    End,
    Damage(String),
}

impl Segment<'_> {
    /// Walks the blocks between two offsets. Returns the offset where they end and the structure
    /// found there.
    fn walk(
        &self,
        mut at: u64,
        end: u64,
        mut each: impl FnMut(u64, &BlockHeader) -> Result,
    ) -> Result<(u64, Part)> {
        while at < end {
            match self.part(at)? {
                Part::Block(header) => {
                    each(at, &header)?;
                    at += header.block_len();
                }
                other => return Ok((at, other)),
            }
        }
        Ok((at, Part::End))
    }

    fn part(&self, at: u64) -> Result<Part> {
        let head = self.read(at, (self.len - at).min(BlockHeader::LEN as u64))?;
        if head.iter().all(|&byte| byte == 0) && self.only_zeros(at)? {
            return Ok(Part::End);
        }
        if head.starts_with(FOOTER_MAGIC) {
            let len = self.len - at;
            if len > Footer::LEN_MAX {
                return Ok(Part::Damage(format!("footer: {len} bytes is longer than any footer")));
            }
            return Ok(match Footer::decode(&self.read(at, len)?) {
                Ok(decoded) => Part::Footer(Box::new(decoded.footer)),
                Err(error) => Part::Damage(format!("footer: {error}")),
            });
        }
        let header = match BlockHeader::decode(&head) {
            Ok(header) => header,
            Err(error) => return Ok(Part::Damage(error.to_string())),
        };
        if header.block_len() > self.len - at {
            return Ok(Part::Damage("the file ends inside the block".to_owned()));
        }
        let block = self.read(at, header.block_len())?;
        let crc_holds = block
            .split_last_chunk::<CRC_LEN>()
            .is_some_and(|(covered, crc)| crc32fast::hash(covered) == u32::from_le_bytes(*crc));
        Ok(if crc_holds {
            Part::Block(header)
        } else {
            Part::Damage("the CRC32 does not match".to_owned())
        })
    }

    /// Whether the file contains only zeros from an offset on.
    fn only_zeros(&self, mut at: u64) -> Result<bool> {
        while at < self.len {
            let bytes = self.read(at, (self.len - at).min(READ_BYTES))?;
            if bytes.iter().any(|&byte| byte != 0) {
                return Ok(false);
            }
            at += bytes.len() as u64;
        }
        Ok(true)
    }

    fn read(&self, at: u64, len: u64) -> Result<Vec<u8>> {
        let len = usize::try_from(len)
            .map_err(|_| Failure::other("the file is too large for this machine"))?;
        let mut bytes = vec![0; len];
        match self.file.read_exact_at(&mut bytes, at) {
            Ok(()) => Ok(bytes),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(Failure::other(
                format!("{} became shorter while it was read", self.path.display()),
            )),
            Err(error) => Err(Failure::file("read", self.path, &error)),
        }
    }

    fn damaged(&self, at: u64, what: &str, why: &dyn std::fmt::Display) -> Failure {
        let message = format!(
            "{}: the {what} at byte {at} is damaged or not yet written: {why}",
            self.path.display()
        );
        Failure::new(Status::Integrity, "corrupt", message)
    }
}

fn print(
    segment: &Segment<'_>,
    decoded: &DecodedHeader,
    blocks: Blocks<'_>,
    footer: Option<&Footer>,
) -> Result {
    let header = &decoded.header;
    let mut table = output::table(&["header", ""], &[]);
    table
        .add_row(["file", &segment.path.display().to_string()])
        .add_row(["bytes", &segment.len.to_string()])
        .add_row(["suite", header.suite.name()])
        .add_row(["store", &header.store.to_string()])
        .add_row(["Logstore", &header.logstore.to_string()])
        .add_row(["segment", &header.segment.to_string()])
        .add_row(["shard", &header.shard.to_string()])
        .add_row(["ordinal", &header.ordinal.to_string()])
        .add_row(["epoch", &header.epoch.to_string()])
        .add_row(["generation", &header.generation.to_string()])
        .add_row([
            "sequence numbers",
            &format!("{} to {}, not included", header.first_seq, header.limit_seq),
        ])
        .add_row(["created", &output::moment(header.created_us)])
        .add_row(["receive times went back", &format!("{} times", header.setbacks)])
        .add_row(["key", &key_source(header.key_source)])
        .add_row(["salt", &hex(&header.salt)])
        .add_row(["commitment", &hex(&decoded.commitment)])
        .add_row(["predecessor", &predecessor(&header.predecessor)])
        .add_row(["payload hash", header.payload_hash.name()])
        .add_row(["extensions", &header.extensions.len().to_string()]);
    output::print_wide_table(&table)?;

    let mut table = block_table();
    let mut rows = 0;
    blocks.each(|at, block| {
        if rows == TABLE_ROWS_MAX {
            output::print_wide_table(&table)?;
            (table, rows) = (block_table(), 0);
        }
        rows += 1;
        table.add_row([
            block.number.to_string(),
            at.to_string(),
            block.kind.name().to_owned(),
            block.compression.to_string(),
            block.payload_len.to_string(),
            block.raw_len.to_string(),
            block.group_count.to_string(),
            block.log_count.to_string(),
            block.first_seq.to_string(),
            output::moment(block.first_time_us),
            block.durable_mark.to_string(),
        ]);
        Ok(())
    })?;
    output::print_wide_table(&table)?;

    let Some(footer) = footer else {
        return output::line("no footer: the segment has not been sealed");
    };
    let mut table = output::table(&["footer", ""], &[]);
    table
        .add_row(["offset", &footer.offset.to_string()])
        .add_row(["blocks", &footer.block_count.to_string()])
        .add_row(["groups", &footer.group_count.to_string()])
        .add_row(["logs", &footer.log_count.to_string()])
        .add_row(["raw bytes", &footer.raw_bytes.to_string()])
        .add_row(["end of sequence", &footer.end_seq.to_string()])
        .add_row(["received from", &output::moment(footer.first_time_us)])
        .add_row(["received to", &output::moment(footer.last_time_us)])
        .add_row(["rewritten by recovery", if footer.recovered { "yes" } else { "no" }])
        .add_row(["body", &hex(&footer.body)])
        .add_row(["digest", &hex(&footer.digest(header.payload_hash, &decoded.header_hash))])
        .add_row(["index entries", &footer.index.len().to_string()]);
    output::print_wide_table(&table)
}

fn block_table() -> output::Table {
    output::table(
        &[
            "block",
            "offset",
            "kind",
            "compression",
            "stored",
            "raw",
            "groups",
            "logs",
            "first seq",
            "received",
            "durable to",
        ],
        &[0, 1, 4, 5, 6, 7, 8, 10],
    )
}

/// A header in the answer.
#[derive(Serialize)]
struct HeaderAnswer {
    suite: &'static str,
    store: StoreId,
    logstore: LogstoreId,
    segment: SegmentId,
    shard: u32,
    ordinal: u64,
    epoch: u64,
    generation: u64,
    first_seq: u64,
    limit_seq: u64,
    created: String,
    setbacks: u32,
    key: String,
    salt: String,
    commitment: String,
    predecessor: String,
    payload_hash: HashAlg,
    extensions: Vec<u16>,
    body_start: u64,
}

impl From<&DecodedHeader> for HeaderAnswer {
    fn from(decoded: &DecodedHeader) -> Self {
        let header = &decoded.header;
        Self {
            suite: header.suite.name(),
            store: header.store,
            logstore: header.logstore,
            segment: header.segment,
            shard: header.shard,
            ordinal: header.ordinal,
            epoch: header.epoch,
            generation: header.generation,
            first_seq: header.first_seq,
            limit_seq: header.limit_seq,
            created: output::moment(header.created_us),
            setbacks: header.setbacks,
            key: key_source(header.key_source),
            salt: hex(&header.salt),
            commitment: hex(&decoded.commitment),
            predecessor: predecessor(&header.predecessor),
            payload_hash: header.payload_hash,
            extensions: header.extensions.iter().map(|extension| extension.kind).collect(),
            body_start: decoded.body_start,
        }
    }
}

/// A block in the answer.
#[derive(Serialize)]
struct BlockAnswer {
    number: u32,
    offset: u64,
    kind: &'static str,
    compression: Compression,
    payload_bytes: u32,
    raw_bytes: u32,
    groups: u32,
    logs: u32,
    first_seq: u64,
    first_receive_time: String,
    last_receive_time: String,
    durable_mark: u64,
}

impl BlockAnswer {
    fn new(offset: u64, block: &BlockHeader) -> Self {
        Self {
            number: block.number,
            offset,
            kind: block.kind.name(),
            compression: block.compression,
            payload_bytes: block.payload_len,
            raw_bytes: block.raw_len,
            groups: block.group_count,
            logs: block.log_count,
            first_seq: block.first_seq,
            first_receive_time: output::moment(block.first_time_us),
            last_receive_time: output::moment(block.last_time_us),
            durable_mark: block.durable_mark,
        }
    }
}

/// A footer in the answer.
#[derive(Serialize)]
struct FooterAnswer {
    offset: u64,
    blocks: u32,
    groups: u64,
    logs: u64,
    raw_bytes: u64,
    end_seq: u64,
    first_receive_time: String,
    last_receive_time: String,
    recovered: bool,
    body: String,
    digest: String,
    index_entries: usize,
}

impl FooterAnswer {
    fn new(decoded: &DecodedHeader, footer: &Footer) -> Self {
        Self {
            offset: footer.offset,
            blocks: footer.block_count,
            groups: footer.group_count,
            logs: footer.log_count,
            raw_bytes: footer.raw_bytes,
            end_seq: footer.end_seq,
            first_receive_time: output::moment(footer.first_time_us),
            last_receive_time: output::moment(footer.last_time_us),
            recovered: footer.recovered,
            body: hex(&footer.body),
            digest: hex(&footer.digest(decoded.header.payload_hash, &decoded.header_hash)),
            index_entries: footer.index.len(),
        }
    }
}

fn key_source(source: KeySource) -> String {
    match source {
        KeySource::DataKey(version) => format!("data key, version {version}"),
        KeySource::Keyring(version) => format!("service keyring, version {version}"),
    }
}

fn predecessor(predecessor: &Predecessor) -> String {
    let (how, end) = match predecessor {
        Predecessor::None => return "none".to_owned(),
        Predecessor::Sealed(end) => ("sealed", end),
        Predecessor::Cut(end) => ("cut off by a crash", end),
    };
    format!(
        "{how}: ordinal {}, segment {}, {} blocks, {} bytes, to sequence {}, received to {}, digest {}",
        end.ordinal,
        end.segment,
        end.blocks,
        end.bytes,
        end.end_seq,
        output::moment(end.last_time_us),
        hex(&end.digest)
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
