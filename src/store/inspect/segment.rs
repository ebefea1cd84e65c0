//! Verification of one segment: its key, its blocks, its end, and the heads recorded in it.

use std::{fmt::Display, sync::Arc};

use super::report::{VerifyFault, VerifyReport};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    crypto::wipe,
    error::Location,
    segment::{BlockHeader, BlockKind, DecodedHeader, FooterBuilder, check_groups, entries},
    shard::{End, Head, Load, Opened, Proof, ReadMode, SegmentReader, Shard},
};

/// The check of one segment under way.
pub(super) struct SegmentCheck<'c> {
    report: &'c mut VerifyReport,
    name: &'c LogstoreName,
    shard: &'c Shard,
    header: Arc<DecodedHeader>,
    /// The end of the segment when it was opened.
    end: End,
    file_len: u64,
    reader: SegmentReader,
    /// The counts and the digest of the blocks so far.
    builder: FooterBuilder,
    /// The heads in the catalogue and the checkpoint that the blocks have not reached yet.
    heads: Vec<&'c Head>,
    /// Whether the blocks are checked without the key of the segment.
    keyless: bool,
    damaged: bool,
}

impl<'c> SegmentCheck<'c> {
    /// Verifies a segment, without its key if `keyless`. `heads` are its recorded heads. `before`
    /// has the header of the segment before it and the receive time of the last group there, if
    /// they are known, and then those of this segment.
    ///
    /// # Errors
    /// An error that ends the check of this segment. The caller adds it to the report.
    pub(super) fn run(
        report: &'c mut VerifyReport,
        keyless: bool,
        name: &'c LogstoreName,
        shard: &'c Shard,
        opened: Opened,
        heads: Vec<&'c Head>,
        before: &mut Option<(Arc<DecodedHeader>, u64)>,
    ) -> Result<()> {
        let before_it =
            before.take().filter(|(header, _)| header.ordinal + 1 == opened.name.ordinal);
        let keyless = check_start(report, keyless, name, shard, &opened)?;
        let header = Arc::clone(&opened.header);
        let mut check = Self {
            report,
            name,
            shard,
            end: opened.end.clone(),
            file_len: opened
                .file
                .len()
                .map_err(Error::io("get the length of", &*opened.name.path))?,
            reader: SegmentReader::new(opened, ReadMode::Pread)?,
            builder: FooterBuilder::of(&header),
            header,
            heads,
            keyless,
            damaged: false,
        };
        if let Some((header, last_time_us)) = before_it
            && let Err(error) = check.reader.follow(&header, last_time_us)
        {
            check.note(error)?;
        }
        while check.step()? {}
        *before = Some((Arc::clone(&check.header), check.reader.last_time_us()));
        check.finish()
    }

    fn note(&mut self, error: Error) -> Result<()> {
        self.report.note(Some(self.name), error)
    }

    /// Checks the next block. Returns whether there may be more blocks.
    fn step(&mut self) -> Result<bool> {
        self.check_heads();
        self.reader.proof = if self.keyless { Proof::Crc } else { Proof::Tag };
        match self.reader.load(self.shard.list()) {
            Ok(Load::Block(block)) => self.check_block(&block).map(|()| true),
            Ok(Load::End) => Ok(false),
            Ok(Load::NotYet) => self.note_torn_tail().map(|()| false),
            Err(error)
                if !self.keyless
                    && matches!(error.kind(), ErrorKind::Revoked | ErrorKind::KmsUnreachable) =>
            {
                self.note(error)?;
                self.keyless = true;
                Ok(true)
            }
            // Reported when the segment was opened.
            Err(_) if matches!(self.end, End::Damaged(_)) => {
                self.damaged = true;
                self.heads.clear();
                Ok(false)
            }
            Err(error @ (Error::Corrupt { .. } | Error::Tampered { .. })) => {
                self.damaged = true;
                self.heads.clear();
                self.note(error)?;
                self.reader.pass_damage()
            }
            Err(error) => Err(error),
        }
    }

    /// Compares the blocks so far with the heads that end here.
    fn check_heads(&mut self) {
        let Self { report, name, shard, header, end, file_len, reader, builder, heads, .. } = self;
        let faults = &mut report.faults;
        let lacks_footer = matches!(end, End::Damaged(_));
        heads.retain(|head| {
            let so_far = builder.so_far();
            if so_far.block_count != head.blocks {
                return true;
            }
            let same = head.segment == header.segment && builder.digest() == head.digest;
            let bytes = match head.sealed {
                // The missing end was reported when the segment was opened.
                true if lacks_footer => head.bytes,
                true => *file_len,
                false => reader.offset,
            };
            let last_time_us = header.last_time_us(so_far);
            let ends = (so_far.end_seq, bytes, last_time_us)
                == (head.end_seq, head.bytes, head.last_time_us);
            if !same {
                let what =
                    format!("segment {} of shard {} is not what it was", head.ordinal, shard.id());
                faults.push(VerifyFault::of(Some(name), &Error::RolledBack { what }));
            } else if !ends {
                let what = format!(
                    "the catalogue or the checkpoint says that {} blocks end elsewhere",
                    head.blocks
                );
                faults.push(VerifyFault::of(Some(name), &Error::corrupt(reader.here(), what)));
            }
            false
        });
    }

    fn check_block(&mut self, block: &BlockHeader) -> Result<()> {
        self.report.blocks += 1;
        self.report.groups += u64::from(block.group_count);
        let (payload_hash, tag) = self.reader.loaded_digest_parts()?;
        self.builder.add(self.reader.offset, block, &payload_hash, &tag);
        let (place, at) = (self.reader.check_place(block), self.reader.here());
        let raw = match (self.keyless, self.header.suite.encrypts()) {
            (false, _) => self.reader.open(self.shard.gate()).map(Some),
            // A segment that is authenticated and not encrypted is readable without the key.
            (true, false) => self.reader.open_unproved().map(Some),
            (true, true) => Ok(None),
        };
        self.reader.skip();
        match raw {
            Ok(raw) => {
                let contents = raw.map_or(Ok(()), |mut raw| {
                    let checked = check_contents(block, &raw, at);
                    wipe(&mut raw);
                    checked
                });
                for checked in [place, contents] {
                    if let Err(error) = checked {
                        self.note(error)?;
                    }
                }
                Ok(())
            }
            Err(error) => {
                self.keyless |= error.kind() != ErrorKind::Integrity;
                self.note(error)
            }
        }
    }

    /// Adds a note about bytes at the end of an open segment that are no block. They are above the
    /// durable mark.
    fn note_torn_tail(&mut self) -> Result<()> {
        if !matches!(self.end, End::Unknown) {
            return Ok(());
        }
        let SegmentReader { opened, offset, proof, .. } = &self.reader;
        let left = self.shard.data_end(opened, *offset, *proof)?;
        if left > *offset {
            let note = format!(
                "{} ends in {} bytes that are no block, above the durable mark: the next append drops them",
                opened.name.path.display(),
                left - offset
            );
            self.report.notes.push(note);
        }
        Ok(())
    }

    /// Checks the end of the segment, unless it is damaged.
    fn finish(mut self) -> Result<()> {
        for head in std::mem::take(&mut self.heads) {
            let what = format!(
                "segment {} has fewer blocks than the {} it had",
                head.ordinal, head.blocks
            );
            self.note(Error::RolledBack { what })?;
        }
        if self.damaged {
            return Ok(());
        }
        let corrupt =
            |what: &str| Err(Error::corrupt(self.reader.opened.at(self.reader.offset), what));
        let builder = &self.builder;
        match &self.end {
            End::Sealed(footer) => {
                let expected = &footer.footer;
                let found =
                    self.builder.build(expected.offset, expected.nonce_random, expected.recovered);
                if found != *expected {
                    return corrupt("the footer does not agree with the blocks");
                }
            }
            End::Cut(cut) if cut.digest != builder.digest() => {
                return corrupt("the blocks are not those that the successor names");
            }
            End::Cut(cut) if cut.end_seq != builder.so_far().end_seq => {
                return corrupt(
                    "the blocks end at another sequence number than the successor says",
                );
            }
            End::Cut(cut) if cut.last_time_us != self.header.last_time_us(builder.so_far()) => {
                return corrupt(
                    "the last receive time of the blocks is another than the successor says",
                );
            }
            _ => {}
        }
        Ok(())
    }
}

/// Checks the key of a segment, its footer if it has one, and the rules for its header. Returns
/// whether the blocks are to be checked without the key.
fn check_start(
    report: &mut VerifyReport,
    mut keyless: bool,
    name: &LogstoreName,
    shard: &Shard,
    opened: &Opened,
) -> Result<bool> {
    let mut version_missing = false;
    if !keyless {
        // Deriving the key checks its commitment.
        let gate = shard.gate();
        let checked = gate.with_cipher(&opened.header, &opened.name.path, |_| Ok(()));
        if let Err(error) = checked.and_then(|()| shard.verify_footer(opened)) {
            version_missing = matches!(error, Error::RolledBack { .. });
            report.note(Some(name), error)?;
            keyless = true;
        }
    }
    // The rules would report a missing data-key version a second time.
    if !version_missing && let Err(error) = shard.check_rules(opened) {
        report.note(Some(name), error)?;
    }
    Ok(keyless)
}

/// Checks the raw bytes of a block: its list and its receive times, and the groups in it.
fn check_contents(block: &BlockHeader, raw: &[u8], at: Location) -> Result<()> {
    let mut frames = Vec::new();
    let broken = |rule: &dyn Display| Error::corrupt(at.clone(), format!("a block: {rule}"));
    entries(block, raw, |entry| frames.push(entry.bytes)).map_err(|rule| broken(&rule))?;
    if block.kind == BlockKind::Groups {
        check_groups(block, raw, &frames).map_err(|rule| broken(&rule))?;
    }
    Ok(())
}
