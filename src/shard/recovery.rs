//! What happens to a segment that nobody sealed.
//!
//! Up to its durable mark it is kept where it is, and never changed: the header of its successor says where it ends. Valid blocks
//! above the mark are rewritten into a new segment, because after a failed sync the page cache may show what the disk does not
//! have; what follows them is a torn tail, dropped and reported. Damage below the mark is corruption: reported, nothing touched.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;
use tracing::warn;

use super::{
    Head, Load, ReadMode, SegmentReader, Shard,
    segments::{End, Opened, SegmentRef, read_header},
    writer::{NewSegment, Next},
};
use crate::{
    Error, Result,
    error::Location,
    io::{OpenMode, read_exact_at},
    segment::{
        BlockKind, BlockView, DecodedHeader, Footer, FooterBuilder, Predecessor, ScanReport, ScanVerdict, ScannedBlock,
        SealBuffer, SegmentHeader, scan,
    },
    sync::{lock, read},
};

/// What recovery found in a shard that was not closed cleanly.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RecoveryNotice {
    /// The shard.
    pub shard: u32,
    /// The segment that was cut off.
    pub segment: PathBuf,
    /// Groups above the durable mark that were there and were rewritten into a new segment.
    pub groups_rewritten: u64,
    /// Bytes of the torn tail, dropped: they were never acknowledged as synced.
    pub bytes_dropped: u64,
}

/// What a repair kept and gave up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RepairReport {
    /// The shard.
    pub shard: u32,
    /// The segment that was repaired; `None` when nothing needed it.
    pub segment: Option<PathBuf>,
    /// Groups behind the damage that could be read and were rewritten.
    pub groups_salvaged: u64,
    /// Bytes that could not be read.
    pub bytes_lost: u64,
}

/// A scanned segment.
struct Scanned {
    blocks: Vec<ScannedBlock>,
    report: ScanReport,
}

impl Scanned {
    /// How many bytes belong to no block that can be read.
    fn bytes_lost(&self, opened: &Opened) -> u64 {
        let found: u64 = self.blocks.iter().map(|block| block.header.block_len()).sum();
        self.report.file_len.saturating_sub(opened.header.body_start + found)
    }
}

impl Shard {
    /// Finds out where the shard ends and deals with an unclean end. Called by the writer, with its lock held.
    pub(super) fn recover(&self) -> Result<Next> {
        for leftover in self.leftovers()? {
            self.context.disk.remove_file(&leftover).map_err(Error::io("remove", &leftover))?;
        }
        let segments = self.segments(false)?;
        if !segments.is_empty() {
            self.make_names_durable()?;
        }
        let record = self.record();
        let Some(last) = segments.last() else {
            return Ok(match record.head {
                Some(head) => Next {
                    ordinal: head.ordinal + 1,
                    first_seq: head.next_seq.max(record.first_seq),
                    last_time_us: 0,
                    predecessor: Predecessor::Sealed(head.into_end()),
                },
                None => Next {
                    ordinal: record.first_ordinal,
                    first_seq: record.first_seq,
                    last_time_us: 0,
                    predecessor: Predecessor::None,
                },
            });
        };
        let opened = self.open_segment(last)?;
        opened.header.header.features.check_writing().map_err(|error| error.in_file(&last.path, 0))?;
        match self.authenticate(&opened) {
            // Its key was destroyed on purpose: there is nothing left to authenticate, and the shard goes on behind it.
            Err(Error::Shredded { .. }) => {}
            verified => verified?,
        }
        match &opened.end {
            End::Sealed(footer) => {
                let len = opened.file.len().map_err(Error::io("get the length of", &*last.path))?;
                let head = self.last_head(&opened.header.header, &footer.footer, len);
                Ok(Next {
                    ordinal: head.ordinal + 1,
                    first_seq: head.next_seq,
                    last_time_us: footer.footer.last_time_us.max(opened.header.header.created_us),
                    predecessor: Predecessor::Sealed(head.into_end()),
                })
            }
            _ => {
                let scanned = self.scan(&opened)?;
                let mark = self.check_durable_part(&opened, &scanned)?;
                let (next, groups_rewritten) = self.cut(&opened, &scanned, mark)?;
                let bytes_dropped = scanned.bytes_lost(&opened);
                if groups_rewritten > 0 || bytes_dropped > 0 {
                    let segment = last.path.to_path_buf();
                    warn!(
                        logstore = %self.name(),
                        shard = self.id,
                        segment = %segment.display(),
                        groups_rewritten,
                        bytes_dropped,
                        "a shard was recovered"
                    );
                    lock(&self.notices).push(RecoveryNotice {
                        shard: self.id,
                        segment,
                        groups_rewritten,
                        bytes_dropped,
                    });
                }
                Ok(next)
            }
        }
    }

    /// The head of the shard when its last segment is sealed. Numbers behind its end may have been given to groups that were still
    /// queued when it was sealed, or are above the mark of what it was recovered from: only a head that the catalogue has noted says
    /// where the next segment may begin before the reserved limit.
    pub(crate) fn last_head(&self, header: &SegmentHeader, footer: &Footer, file_len: u64) -> Head {
        let head = Head::sealed(header, footer, file_len);
        let noted = self.record().head.filter(|noted| noted.sealed && noted.ordinal == head.ordinal);
        let next_seq = noted.map_or(header.limit_seq, |noted| noted.next_seq.max(head.next_seq));
        Head { next_seq, ..head }
    }

    fn scan(&self, opened: &Opened) -> Result<Scanned> {
        let path = &*opened.name.path;
        let (len, mark) = self.blocks_end(opened)?;
        let mut blocks = Vec::new();
        let mut report =
            scan(&opened.header, len, |offset, buf| opened.file.read_at(buf, offset), |block| blocks.push(block))
                .map_err(Error::io("read", path))?;
        if let Some(mark) = mark {
            report.mark = mark;
            if report.end < mark {
                report.verdict = ScanVerdict::Damaged { at: report.end, mark };
            }
        }
        Ok(Scanned { blocks, report })
    }

    /// Whether everything that is known to have been durable is there. Returns up to where that was.
    fn check_durable_part(&self, opened: &Opened, scanned: &Scanned) -> Result<u64> {
        let report = &scanned.report;
        if let ScanVerdict::Damaged { at, mark } = report.verdict {
            let what = format!("a block below the durable mark ({mark}) is damaged");
            return Err(Error::corrupt(opened.at(at).block(report.blocks), what));
        }
        let Some(head) = self.record().head.filter(|head| head.ordinal == opened.name.ordinal) else {
            return Ok(report.mark);
        };
        if report.end < head.bytes {
            let what = format!("a block below what the catalogue knows to be durable ({}) is damaged", head.bytes);
            return Err(Error::corrupt(opened.at(report.end).block(report.blocks), what));
        }
        // The digest is over the hash of the header too, and so over the id of the segment.
        if self.build(opened, scanned.blocks.iter().take(head.blocks as usize)).digest() != head.digest {
            let what = format!("{} is another segment than the catalogue knows", opened.name.path.display());
            return Err(Error::RolledBack { what });
        }
        Ok(report.mark.max(head.bytes))
    }

    fn build<'a>(&self, opened: &Opened, blocks: impl Iterator<Item = &'a ScannedBlock>) -> FooterBuilder {
        let header = &opened.header;
        let mut builder = FooterBuilder::new(header.header.suite.hash(), &header.header_hash, header.header.first_seq);
        for block in blocks {
            builder.add(block.offset, &block.header, &block.tag);
        }
        builder
    }

    /// Ends a segment at `mark`, and rewrites the groups found above it into a new one. Returns where the shard goes on, and how many
    /// groups were rewritten.
    fn cut(&self, opened: &Opened, scanned: &Scanned, mark: u64) -> Result<(Next, u64)> {
        let kept = |block: &&ScannedBlock| block.contiguous && block.offset + block.header.block_len() <= mark;
        let below = self.build(opened, scanned.blocks.iter().take_while(kept));
        let header = &opened.header.header;
        let last_block = scanned.blocks.iter().map(|block| block.header.last_time_us).max();
        let cut = Head {
            ordinal: header.ordinal,
            segment: header.segment,
            sealed: false,
            blocks: below.so_far().block_count,
            bytes: mark,
            end_seq: below.so_far().end_seq,
            next_seq: header.limit_seq,
            digest: below.digest(),
        };
        let mut next = Next {
            ordinal: header.ordinal + 1,
            first_seq: header.limit_seq,
            last_time_us: last_block.unwrap_or(0).max(header.created_us),
            predecessor: Predecessor::Cut(cut.into_end()),
        };
        let above = || {
            let data = |block: &&ScannedBlock| block.header.kind != BlockKind::Mark;
            scanned.blocks.iter().skip_while(kept).filter(data)
        };
        let groups = above().map(|block| u64::from(block.header.group_count)).sum();
        if let Some(first) = above().next() {
            let limit_seq = next.first_seq;
            match self.rewrite(opened, above(), Next { first_seq: first.header.first_seq, ..next.clone() }) {
                // Nobody can read them any more.
                Err(Error::Shredded { .. }) => return Ok((next, 0)),
                rewritten => {
                    let rewritten = rewritten?;
                    next = Next { first_seq: rewritten.first_seq.max(limit_seq), ..rewritten };
                }
            }
        }
        Ok((next, groups))
    }

    /// Writes `blocks` of a segment into a new one, sealed under its own key, and gives it its name when it is durable.
    fn rewrite<'a>(&self, opened: &Opened, blocks: impl Iterator<Item = &'a ScannedBlock>, next: Next) -> Result<Next> {
        let mut plan = *read(&self.context.plan);
        if opened.header.header.suite.encrypts() {
            // What was encrypted stays encrypted, also if encryption has been turned off since.
            plan.suite = plan.suite.encrypting();
        }
        let new = NewSegment::create(self, &next, &plan)?;
        let written = self.rewrite_into(opened, blocks, &new);
        self.context.gate.end_segment(new.header.header.segment);
        let (builder, len) = written?;
        let head = Head::sealed(&new.header.header, &builder.build(0, [0; 8], true), len);
        let name = SegmentRef {
            ordinal: next.ordinal,
            first_seq: next.first_seq,
            path: Arc::clone(&new.path),
            active: None,
            sealed: Some(head.clone().into_end()),
        };
        self.set_segments(|segments| segments.push(name));
        Ok(Next {
            ordinal: head.ordinal + 1,
            first_seq: head.next_seq,
            last_time_us: next.last_time_us,
            predecessor: Predecessor::Sealed(head.into_end()),
        })
    }

    fn rewrite_into<'a>(
        &self,
        opened: &Opened,
        blocks: impl Iterator<Item = &'a ScannedBlock>,
        new: &NewSegment,
    ) -> Result<(FooterBuilder, u64)> {
        let gate = &self.context.gate;
        let path = &*opened.name.path;
        let target = &new.header;
        let mut builder = FooterBuilder::new(target.header.suite.hash(), &target.header_hash, target.header.first_seq);
        let mut offset = target.body_start;
        let mut bytes = Vec::new();
        let mut buffer = SealBuffer::default();
        for block in blocks {
            bytes.resize(block.header.block_len() as usize, 0);
            read_exact_at(&*opened.file, &mut bytes, block.offset).map_err(Error::io("read", path))?;
            let at = opened.at(block.offset).block(block.header.number);
            let view = BlockView::parse(&bytes).map_err(|error| Error::corrupt(at.clone(), error.to_string()))?;
            let payload = buffer.begin();
            payload.resize(SealBuffer::PAYLOAD_AT + view.payload.len(), 0);
            gate.with_cipher(&opened.header, path, |cipher| {
                let (_, plain) = payload.split_at_mut(SealBuffer::PAYLOAD_AT);
                cipher
                    .open_block(&view.header.nonce(), view.header_bytes, view.payload, &view.tag, plain)
                    .map_err(|_| Error::Tampered { at, what: "a block" })
            })?;
            let mut header = view.header;
            header.segment_tag = target.segment_tag();
            header.number = builder.so_far().block_count;
            header.durable_mark = target.body_start;
            self.context
                .random
                .fill(&mut header.nonce_random)
                .map_err(Error::io("draw a random nonce for", &*new.path))?;
            let sealing = buffer.with_header(&target.header_hash, &header);
            let tag = gate.with_cipher(target, &new.path, |cipher| {
                cipher.seal_block(&header.nonce(), sealing, SealBuffer::PAYLOAD_AT).map_err(Error::Crypto)
            })?;
            let sealed = buffer.finish(&tag);
            new.file.write_at(sealed, offset).map_err(Error::io("write a block to", &*new.path))?;
            builder.add(offset, &header, &tag);
            offset += sealed.len() as u64;
        }
        let len = new.seal(self, &builder, offset)?;
        new.publish(self)?;
        Ok((builder, len))
    }

    /// Where the shard stands by what is on disk, for a checkpoint of a shard that this process does not write.
    pub(super) fn head_on_disk(&self) -> Result<Option<Head>> {
        if !self.context.read_only {
            self.make_names_durable()?;
        }
        let segments = self.segments(true)?;
        let Some(last) = segments.last() else { return Ok(self.record().head) };
        let opened = self.open_segment(last)?;
        let header = &opened.header.header;
        match &opened.end {
            End::Sealed(footer) => {
                let len = opened.file.len().map_err(Error::io("get the length of", &*last.path))?;
                Ok(Some(self.last_head(header, &footer.footer, len)))
            }
            End::Active(view) => Ok(Some(view.head())),
            End::Cut(_) | End::Unknown => {
                let scanned = self.scan(&opened)?;
                let mark = self.check_durable_part(&opened, &scanned)?;
                let kept = |block: &&ScannedBlock| block.offset + block.header.block_len() <= mark;
                let builder = self.build(&opened, scanned.blocks.iter().take_while(kept));
                Ok(Some(Head {
                    ordinal: header.ordinal,
                    segment: header.segment,
                    sealed: false,
                    blocks: builder.so_far().block_count,
                    bytes: mark,
                    end_seq: builder.so_far().end_seq,
                    next_seq: header.limit_seq,
                    digest: builder.digest(),
                }))
            }
        }
    }

    /// One past the last sequence number that a reader can see, authenticated: a reader begins or ends there.
    pub(super) fn proven_end_seq(&self) -> Result<u64> {
        let segments = self.segments(true)?;
        let Some(last) = segments.last() else { return self.end_seq() };
        let opened = self.open_segment(last)?;
        self.authenticate(&opened)?;
        Ok(match &opened.end {
            End::Sealed(footer) => {
                let end_seq = footer.footer.end_seq;
                // The last blocks have to end there too, or a reader would end before them.
                let mut reader = SegmentReader::new(opened, ReadMode::Pread)?;
                reader.seek(end_seq.saturating_sub(1), 0);
                reader.prove_end(self, &self.context.gate)?;
                end_seq
            }
            End::Cut(end) => end.end_seq,
            End::Active(view) => view.with_builder(|builder| builder.so_far().end_seq),
            End::Unknown => {
                let mut end_seq = opened.header.header.first_seq;
                let mut reader = SegmentReader::new(opened, ReadMode::Pread)?;
                while let Load::Block(header) = reader.load(self)? {
                    reader.prove_place(&header, &self.context.gate)?;
                    end_seq = header.end_seq();
                    reader.pass();
                }
                reader.prove_passed(&self.context.gate)?;
                end_seq
            }
        })
    }

    /// One past the last sequence number that a reader can see.
    pub(crate) fn end_seq(&self) -> Result<u64> {
        let segments = self.segments(true)?;
        let Some(last) = segments.last() else {
            let record = self.record();
            return Ok(record.head.map_or(record.first_seq, |head| head.end_seq.max(record.first_seq)));
        };
        let opened = self.open_segment(last)?;
        Ok(match &opened.end {
            End::Sealed(footer) => footer.footer.end_seq,
            End::Cut(end) => end.end_seq,
            End::Active(view) => view.with_builder(|builder| builder.so_far().end_seq),
            End::Unknown => self.scan(&opened)?.report.end_seq,
        })
    }

    /// Gives up what is damaged at the end of the shard, so that it can be written again: everything readable is kept. Returns what
    /// that was.
    pub(crate) fn repair(&self) -> Result<RepairReport> {
        let mut writer = lock(&self.writer);
        let none = RepairReport { shard: self.id, segment: None, groups_salvaged: 0, bytes_lost: 0 };
        let segments = self.segments(true)?;
        let Some(last) = segments.last().filter(|last| last.active.is_none()) else { return Ok(none) };
        if self.recover_is_possible(last)? {
            return Ok(none);
        }
        let path = &*last.path;
        let file = self.context.disk.open(path, OpenMode::Read).map_err(Error::io("open", path))?;
        let header = Arc::new(read_header(&*file, path)?);
        let opened = Opened { name: last.clone(), file, header, end: End::Unknown, vouched: None };
        self.authenticate(&opened)?;
        let scanned = self.scan(&opened)?;
        let (next, groups_salvaged) = self.cut(&opened, &scanned, scanned.report.end)?;
        writer.next = Some(next);
        writer.begin_segment(self)?;
        Ok(RepairReport {
            shard: self.id,
            segment: Some(path.to_path_buf()),
            groups_salvaged,
            bytes_lost: scanned.bytes_lost(&opened),
        })
    }

    /// Whether opening and recovering the last segment would succeed without a repair.
    fn recover_is_possible(&self, last: &SegmentRef) -> Result<bool> {
        let damaged = |error: &Error| matches!(error, Error::Corrupt { .. } | Error::Truncated { .. });
        let checked = self.open_segment(last).and_then(|opened| match &opened.end {
            End::Unknown => {
                let scanned = self.scan(&opened)?;
                self.check_durable_part(&opened, &scanned).map(|_| ())
            }
            _ => Ok(()),
        });
        match checked {
            Ok(()) => Ok(true),
            Err(error) if damaged(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Counts the blocks of a segment without a footer, up to `end`.
    pub(crate) fn count(&self, opened: &Opened, end: u64) -> Result<Footer> {
        let scanned = self.scan(opened)?;
        let within = |block: &&ScannedBlock| block.contiguous && block.offset < end;
        Ok(self.build(opened, scanned.blocks.iter().take_while(within)).so_far().clone())
    }

    /// Authenticates what reading a segment, or going on behind it, rests on before its first block: its header, and what says where
    /// it ends.
    pub(super) fn authenticate(&self, opened: &Opened) -> Result<()> {
        // Where a key was destroyed on purpose there is nothing left to authenticate, nor to read.
        let prove = |header: &DecodedHeader, path: &Path| match self.context.gate.with_cipher(header, path, |_| Ok(()))
        {
            Err(Error::Shredded { .. }) => Ok(()),
            proved => proved,
        };
        match &opened.end {
            End::Active(_) => return Ok(()),
            End::Sealed(_) => self.verify_footer(opened)?,
            End::Cut(_) | End::Unknown => {
                prove(&opened.header, &opened.name.path)?;
                if let Some((header, path)) = self.successor(&opened.name)? {
                    prove(&header, &path)?;
                }
            }
        }
        self.check_rules(opened)
    }

    /// Authenticates the footer of a sealed segment.
    pub(crate) fn verify_footer(&self, opened: &Opened) -> Result<()> {
        let End::Sealed(decoded) = &opened.end else { return Ok(()) };
        let path = &*opened.name.path;
        let footer = &decoded.footer;
        let encoded = footer.encode();
        self.context.gate.with_cipher(&opened.header, path, |cipher| {
            cipher
                .verify_tag_only(&footer.nonce(), &encoded, &decoded.tag)
                .map_err(|_| Error::Tampered { at: Location::new(path, footer.offset), what: "the footer" })
        })
    }

    /// What a scan says about damage at the end of a segment that nobody sealed: an error below the durable mark, nothing above it.
    pub(super) fn damage_in_open_segment(&self, opened: &Opened) -> Result<()> {
        let scanned = self.scan(opened)?;
        self.check_durable_part(opened, &scanned).map(|_| ())
    }
}
