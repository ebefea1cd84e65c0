//! Scans of a segment without a footer: which blocks it has, and up to where it is durable.
//!
//! A scan keeps no list of blocks, since a file may have room for very many. A caller that needs
//! the blocks goes over the file again, and fails if it finds others than the scan did.

use super::{
    record::Head,
    segments::{End, Opened, Proof, SegmentList, read_footer},
};
use crate::{
    Error, Result,
    crypto::wipe,
    keys::gate::Gate,
    segment::{
        BlockHeader, BlockKind, BlockView, Footer, FooterBuilder, ScanReport, ScanVerdict,
        ScannedBlock, end_of_data, scan,
    },
};

/// The result of a scan.
pub(super) struct Scanned<'a> {
    list: &'a SegmentList,
    opened: &'a Opened,
    report: ScanReport,
    /// How blocks behind damage were recognised.
    proof: Proof,
    /// The totals of all blocks that were found.
    all: FooterBuilder,
    /// The bytes of those blocks.
    found: u64,
    /// Whether one of them lies behind damage.
    behind: bool,
}

impl<'a> Scanned<'a> {
    /// Scans a segment that is not known to be sealed.
    pub(super) fn of(list: &'a SegmentList, opened: &'a Opened, proof: Proof) -> Result<Self> {
        let (len, footer_at) = blocks_end(list, opened, proof)?;
        let (mut all, mut found, mut behind) = (FooterBuilder::of(&opened.header), 0, false);
        let mut report = pass(opened, len, Some((list.gate(), proof)), |block, payload| {
            add(&mut all, &block, payload);
            found += block.header.block_len();
            behind |= !block.contiguous;
            Ok(())
        })?;
        if let Some(mark) = footer_at {
            report.mark = mark;
            if report.end < mark {
                report.verdict = ScanVerdict::Damaged { at: report.end, mark };
            }
        }
        Ok(Self { list, opened, report, proof, all, found, behind })
    }

    /// Goes over the blocks that the scan has found once more.
    ///
    /// # Errors
    /// [`Error::Corrupt`], at the end, if they are not the same any more.
    pub(super) fn again(
        &self,
        mut on_block: impl FnMut(ScannedBlock, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let mut all = FooterBuilder::of(&self.opened.header);
        let behind = self.behind.then_some((&**self.list.gate(), self.proof));
        let report = pass(self.opened, self.report.data_end, behind, |block, payload| {
            add(&mut all, &block, payload);
            on_block(block, payload)
        })?;
        if all.digest() != self.all.digest() {
            let what = "the segment was changed while it was being read";
            return Err(Error::corrupt(self.opened.at(report.end), what));
        }
        Ok(())
    }

    /// Checks that everything that is known to have been durable is there. Returns the offset up to
    /// which the segment was durable.
    pub(super) fn check_durable_part(&self) -> Result<u64> {
        let (opened, report) = (self.opened, &self.report);
        if let ScanVerdict::Damaged { at, mark } = report.verdict {
            let what = format!("a block below the durable mark ({mark}) is damaged");
            return Err(Error::corrupt(opened.at(at).block(report.blocks), what));
        }
        // A reader may have opened the segment before the writer sealed it. The head of a sealed
        // segment does not say where its blocks end.
        let usable = |head: &Head| !(head.sealed && matches!(opened.end, End::Unknown));
        let Some(head) = self.recorded_head().filter(usable) else { return Ok(report.mark) };
        if report.end < head.bytes {
            let what = format!(
                "a block below what the catalogue knows to be durable ({}) is damaged",
                head.bytes
            );
            return Err(Error::corrupt(opened.at(report.end).block(report.blocks), what));
        }
        // The digest covers the hash of the header too, and so the id of the segment.
        if in_place(opened, head.bytes)?.digest() != head.digest {
            let what = format!(
                "{} is another segment than the catalogue knows",
                opened.name.path.display()
            );
            return Err(Error::RolledBack { what });
        }
        Ok(report.mark.max(head.bytes))
    }

    /// The offset up to which the segment is known to have been durable, damaged or not.
    pub(super) fn durable_mark(&self) -> u64 {
        self.report.mark.max(self.recorded_head().map_or(0, |head| head.bytes))
    }

    /// Where the last block in place ends.
    pub(super) fn end(&self) -> u64 {
        self.report.end
    }

    /// Where the last block ends, in place or behind damage. If the durable part is damaged, all of
    /// the file counts.
    pub(super) fn data_end(&self) -> u64 {
        match self.report.verdict {
            ScanVerdict::Damaged { .. } => self.report.data_end,
            _ if self.behind => self.report.data_end,
            _ => self.report.end,
        }
    }

    /// How many bytes belong to no block that can be read.
    pub(super) fn bytes_lost(&self) -> u64 {
        self.report.data_end.saturating_sub(self.opened.header.body_start + self.found)
    }

    /// The head in this segment that the catalogue has.
    fn recorded_head(&self) -> Option<Head> {
        self.list.record().head.filter(|head| head.ordinal == self.opened.name.ordinal)
    }
}

/// Checks the tags of blocks, one after the other.
pub(super) struct Prover<'a> {
    gate: &'a Gate,
    opened: &'a Opened,
    bytes: Vec<u8>,
    plain: Vec<u8>,
}

impl<'a> Prover<'a> {
    pub(super) fn new(gate: &'a Gate, opened: &'a Opened) -> Self {
        Self { gate, opened, bytes: Vec::new(), plain: Vec::new() }
    }

    /// Whether there is a block with this header at `offset` whose tag holds under the key of the
    /// segment. If that key was destroyed on purpose, the CRC32 alone decides.
    pub(super) fn holds(&mut self, offset: u64, header: &BlockHeader) -> Result<bool> {
        self.bytes.resize(header.block_len() as usize, 0);
        let read = self.opened.read_at(offset, &mut self.bytes)?;
        let view = match BlockView::parse(self.bytes.get(..read).unwrap_or_default()) {
            Ok(view) if view.header == *header => view,
            // It has been changed since it was found.
            _ => return Ok(false),
        };
        self.plain.clear();
        self.plain.resize(view.payload.len(), 0);
        let plain = &mut self.plain;
        let held = self.gate.with_cipher(&self.opened.header, &self.opened.name.path, |cipher| {
            Ok(cipher
                .open_block(&header.nonce(), view.header_bytes, view.payload, &view.tag, plain)
                .is_ok())
        });
        wipe(plain);
        match held {
            Err(Error::Shredded { .. }) => Ok(true),
            held => held,
        }
    }
}

/// Adds a block that was found to the totals of a segment.
pub(super) fn add(builder: &mut FooterBuilder, block: &ScannedBlock, payload: &[u8]) {
    let payload_hash = builder.hash_payload(payload);
    builder.add(block.offset, &block.header, &payload_hash, &block.tag);
}

/// The totals of the blocks in place in front of offset `end`. Needs no key.
pub(super) fn in_place(opened: &Opened, end: u64) -> Result<FooterBuilder> {
    let mut builder = FooterBuilder::of(&opened.header);
    pass(opened, end, None, |block, payload| {
        add(&mut builder, &block, payload);
        Ok(())
    })?;
    Ok(builder)
}

/// The totals of the blocks in place in front of offset `end` and of the first block with a group
/// that was received after `until_us`; where the last of them ends; and whether there is such a
/// group. Needs no key.
pub(super) fn front_until(
    opened: &Opened,
    end: u64,
    until_us: u64,
) -> Result<(FooterBuilder, u64, bool)> {
    let mut builder = FooterBuilder::of(&opened.header);
    let (mut at, mut is_over) = (opened.header.body_start, false);
    pass(opened, end, None, |block, payload| {
        is_over |= block.header.kind != BlockKind::Mark && block.header.last_time_us > until_us;
        if !is_over {
            at = block.offset + block.header.block_len();
            add(&mut builder, &block, payload);
        }
        Ok(())
    })?;
    Ok((builder, at, is_over))
}

/// Where the first block with a group begins that was received after `until_us`, in front of offset
/// `end`. Blocks behind damage are recognised by their CRC32. Needs no key.
pub(super) fn first_after(
    opened: &Opened,
    gate: &Gate,
    end: u64,
    until_us: u64,
) -> Result<Option<u64>> {
    let mut first = None;
    pass(opened, end, Some((gate, Proof::Crc)), |block, _| {
        if block.header.kind != BlockKind::Mark && block.header.last_time_us > until_us {
            first.get_or_insert(block.offset);
        }
        Ok(())
    })?;
    Ok(first)
}

/// Counts the blocks in place of a segment without a footer, up to `end`. Needs no key. Also
/// returns where the last of them ends.
pub(super) fn count(opened: &Opened, end: u64) -> Result<(Footer, u64)> {
    let mut builder = FooterBuilder::of(&opened.header);
    let report = pass(opened, end, None, |block, _| {
        builder.count(block.offset, &block.header);
        Ok(())
    })?;
    Ok((builder.so_far().clone(), report.end))
}

/// Checks the end of a segment that is not sealed: damage below the durable mark is an error, and a
/// torn tail above it is none.
pub(super) fn check_open_end(list: &SegmentList, opened: &Opened, proof: Proof) -> Result<()> {
    Scanned::of(list, opened, proof)?.check_durable_part().map(|_| ())
}

/// Where the data ends of a segment that is not known to be sealed, whose blocks in place end at
/// `from`. Zeros at the end of the file are not data: nothing has been written there yet.
pub(super) fn data_end(
    list: &SegmentList,
    opened: &Opened,
    from: u64,
    proof: Proof,
) -> Result<u64> {
    let (end, _) = blocks_end(list, opened, proof)?;
    end_of_data(|offset, buf: &mut [u8]| opened.read_at(offset, buf), from, end)
}

/// Where the blocks end of a segment that is not known to be sealed: at the end of the file; or
/// where its footer begins, if the tag of that holds. Everything in front of such a footer is
/// durable, since the writer syncs the blocks before it writes the footer.
fn blocks_end(list: &SegmentList, opened: &Opened, proof: Proof) -> Result<(u64, Option<u64>)> {
    let len = opened.file_len()?;
    let sealed = match read_footer(&*opened.file, &opened.name.path, &opened.header, len) {
        Ok(Some(sealed)) if proof == Proof::Tag => sealed,
        Err(error @ Error::Io { .. }) => return Err(error),
        _ => return Ok((len, None)),
    };
    let at = sealed.footer.offset;
    let opened = Opened { end: End::Sealed(sealed.into()), ..opened.clone() };
    match list.verify_footer(&opened) {
        Ok(()) => Ok((at, Some(at))),
        Err(Error::Tampered { .. } | Error::Shredded { .. }) => Ok((len, None)),
        Err(error) => Err(error),
    }
}

/// Goes over the blocks of a segment up to offset `len`: those in place, and with `behind` also
/// those behind damage.
fn pass(
    opened: &Opened,
    len: u64,
    behind: Option<(&Gate, Proof)>,
    on_block: impl FnMut(ScannedBlock, &[u8]) -> Result<()>,
) -> Result<ScanReport> {
    let read_at = |offset, buf: &mut [u8]| opened.read_at(offset, buf);
    match behind {
        None => scan(&opened.header, len, read_at, on_block, None),
        Some((gate, Proof::Tag)) => {
            let mut prover = Prover::new(gate, opened);
            let mut by_tag = |offset, header: &BlockHeader| prover.holds(offset, header);
            scan(&opened.header, len, read_at, on_block, Some(&mut by_tag))
        }
        Some((_, Proof::Crc)) => {
            scan(&opened.header, len, read_at, on_block, Some(&mut |_, _| Ok(true)))
        }
    }
}
