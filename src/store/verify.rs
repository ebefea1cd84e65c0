//! Verification: everything that can be checked, checked, and every fault named with its place.

use std::{collections::BTreeSet, path::PathBuf};

use serde::Serialize;

use super::{
    Checkpoint, Store, StoreShared,
    builder::verify_identity,
    catalogue::load_newest,
    checkpoint::{CheckpointBody, CheckpointEntry},
};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    crypto::wipe,
    error::Location,
    keys::AuditEvent,
    logstore::{LogstoreShared, Meta},
    segment::{BlockHeader, BlockKind, FooterBuilder, check_groups, entries},
    shard::{End, Head, Load, Opened, Proof, ReadMode, SegmentReader, Shard, ShardRecord},
    sync::{lock, read},
};

/// What is to be verified.
#[derive(Clone, Debug, Default)]
pub struct VerifyOptions {
    /// Only this Logstore; `None` verifies all, and the key audit log.
    pub logstore: Option<LogstoreName>,
    /// Verifies without the Logstores' keys, so it also works while a key is revoked. It checks CRCs, digests and the chain of segments.
    /// They find bit rot, missing pieces and changed payloads. They do not find a payload behind the last head in the catalogue or a
    /// checkpoint that an attacker changed along with its CRC and digest.
    pub keyless: bool,
    /// What must still be there.
    pub against: Option<Checkpoint>,
}

/// How far a verification is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifyProgress {
    /// Bytes of segments looked at so far.
    pub bytes: u64,
    /// Bytes of all segments to be looked at.
    pub bytes_total: u64,
}

/// Something that is not as it was written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Fault {
    /// The Logstore it concerns, if one.
    pub logstore: Option<LogstoreName>,
    /// The file.
    #[serde(serialize_with = "crate::error::path_if_any_as_text")]
    pub file: Option<PathBuf>,
    /// The block in it, if it is one.
    pub block: Option<u32>,
    /// The offset in bytes.
    pub offset: Option<u64>,
    /// `corrupt`, `tampered`, `wrong_key`, `truncated`, `rolled_back`, …: the code of the error.
    pub kind: &'static str,
    /// What it is, in a sentence.
    pub message: String,
}

impl Fault {
    fn of(logstore: Option<&LogstoreName>, error: &Error) -> Self {
        let at = match error {
            Error::WrongKey { at }
            | Error::Tampered { at, .. }
            | Error::Corrupt { at, .. }
            | Error::Truncated { at, .. } => Some(at),
            _ => None,
        };
        let file = match error {
            Error::RetiredKeyVersion { path, .. } => Some(path),
            _ => at.map(|at| &at.file),
        };
        Self {
            logstore: logstore.cloned(),
            file: file.cloned(),
            block: at.and_then(|at| at.block),
            offset: at.map(|at| at.offset),
            kind: error.code(),
            message: error.to_string(),
        }
    }
}

/// What a verification found.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// What is not as it was written.
    pub faults: Vec<Fault>,
    /// Logstores that could not be verified with their keys, and why.
    #[serde(skip)]
    pub refused: Vec<(LogstoreName, Error)>,
    /// What is worth knowing and no fault: torn tails that the next append will drop, what retention dropped since the checkpoint.
    pub notes: Vec<String>,
    /// Segments looked at.
    pub segments: u64,
    /// Blocks looked at.
    pub blocks: u64,
    /// Groups in them.
    pub groups: u64,
    /// Bytes of the segments.
    pub bytes: u64,
}

impl VerifyReport {
    /// Whether everything is as it was written, as far as it could be looked at.
    pub fn is_clean(&self) -> bool {
        self.faults.is_empty()
    }
}

impl Store {
    /// Verifies the store, or one Logstore, and against a checkpoint if there is one. Goes on after a fault, to find all.
    ///
    /// # Errors
    /// Only what keeps it from verifying at all: what is found wrong is in the report.
    pub fn verify(&self, options: &VerifyOptions, progress: &mut dyn FnMut(VerifyProgress)) -> Result<VerifyReport> {
        self.shared.verify(options, progress)
    }
}

struct Verification<'a> {
    keyless: bool,
    report: VerifyReport,
    state: VerifyProgress,
    progress: &'a mut dyn FnMut(VerifyProgress),
}

impl Verification<'_> {
    /// Puts an error where it belongs. `Err` is one that is no finding.
    fn note(&mut self, logstore: Option<&LogstoreName>, error: Error) -> Result<()> {
        match (error.kind(), logstore) {
            (ErrorKind::Integrity, _) => self.report.faults.push(Fault::of(logstore, &error)),
            (ErrorKind::Revoked | ErrorKind::KmsUnreachable, Some(name)) => {
                if !self.report.refused.iter().any(|(refused, _)| refused == name) {
                    self.report.refused.push((name.clone(), error));
                }
            }
            _ if matches!(error, Error::Shredded { .. }) => self.report.notes.push(error.to_string()),
            _ if matches!(
                error,
                Error::KeyringTooOld { .. }
                    | Error::NewerFormat { .. }
                    | Error::OlderFormat { .. }
                    | Error::UnsupportedFeature { .. }
            ) =>
            {
                self.report.faults.push(Fault::of(logstore, &error));
            }
            _ => return Err(error),
        }
        Ok(())
    }

    fn advance(&mut self, bytes: u64) {
        self.state.bytes += bytes;
        (self.progress)(self.state);
    }
}

impl StoreShared {
    fn verify(&self, options: &VerifyOptions, progress: &mut dyn FnMut(VerifyProgress)) -> Result<VerifyReport> {
        self.keys.check_process()?;
        let against = options.against.as_ref().map(|checkpoint| self.open_checkpoint(checkpoint)).transpose()?;
        let mut verification = Verification {
            keyless: options.keyless,
            report: VerifyReport::default(),
            state: VerifyProgress::default(),
            progress,
        };
        let names = {
            let _admin = lock(&self.admin);
            self.reload_catalogue()?;
            match &options.logstore {
                Some(name) => drop(self.entry(name)?),
                None => self.verify_store(against.as_ref(), &mut verification)?,
            }
            self.names()
        };
        let mut logstores = Vec::new();
        for name in names.iter().filter(|name| options.logstore.as_ref().is_none_or(|only| only == *name)) {
            match self.logstore(name) {
                Ok(logstore) => logstores.push(logstore),
                Err(error) => verification.note(Some(name), error)?,
            }
        }
        for logstore in &logstores {
            for shard in &logstore.shards {
                for segment in shard.segments(true).unwrap_or_default().iter() {
                    let stat = self.disk.stat(&segment.path).map_err(Error::io("look for", &*segment.path))?;
                    verification.state.bytes_total += stat.map_or(0, |stat| stat.len);
                }
            }
        }
        for logstore in &logstores {
            let expected = against.as_ref().and_then(|against| against.logstores.get(&logstore.name));
            let faults = verification.report.faults.len();
            let verified = self.verify_logstore(logstore, expected, &mut verification);
            verification.keyless = options.keyless;
            // Closing the store, which closes the gates too, is marked before it does.
            if logstore.gate.is_closed() && !lock(&self.admin).closed {
                // What was found missing was being deleted.
                verification.report.faults.truncate(faults);
                verification.report.notes.push(format!("Logstore {} was deleted meanwhile", logstore.name));
            } else {
                verified?;
            }
        }
        Ok(verification.report)
    }

    /// What belongs to no single Logstore: the audit log, directories that nobody knows, what the checkpoint knows of all.
    fn verify_store(&self, against: Option<&CheckpointBody>, verification: &mut Verification<'_>) -> Result<()> {
        for checked in self.verify_documents() {
            if let Err(error) = checked {
                verification.note(None, error)?;
            }
        }
        let catalogue = self.catalogue.now().clone();
        let mut heads = vec![&catalogue.audit];
        heads.extend(against.map(|against| &against.audit));
        let records = match self.audit.verified(&heads) {
            Ok(records) => records,
            Err(error) => {
                verification.note(None, error)?;
                Vec::new()
            }
        };
        let deleted = records.iter().filter(|record| record.event == AuditEvent::Deleted);
        let deleted: BTreeSet<_> = deleted.filter_map(|record| record.logstore_id).collect();
        for (name, entry) in &catalogue.logstores {
            if deleted.contains(&entry.id) {
                let what = format!("Logstore {name} is there, and the audit log says that it was deleted");
                verification.note(Some(name), Error::RolledBack { what })?;
            }
        }
        match self.audit.strangers() {
            Ok(notes) => verification.report.notes.extend(notes),
            Err(error) => verification.note(None, error)?,
        }
        if read(&self.keyring).is_rotating() {
            let note = "the rotation of the service key is unfinished, and older versions are accepted";
            verification.report.notes.push(note.to_owned());
        }
        for id in &catalogue.deleting {
            let dir = self.logstore_dir(*id);
            verification
                .report
                .notes
                .push(format!("the files of a deleted Logstore are not all gone: {}", dir.display()));
        }
        for (dir, may_have_segments) in self.unlisted()? {
            if may_have_segments {
                let what = format!("the catalogue does not know {}, which has segments in it", dir.display());
                verification.note(None, Error::RolledBack { what })?;
            }
        }
        let Some(against) = against else { return Ok(()) };
        if catalogue.generation < against.catalogue_generation {
            let what = format!(
                "the catalogue is of generation {}, it was {} at the checkpoint",
                catalogue.generation, against.catalogue_generation
            );
            verification.note(None, Error::RolledBack { what })?;
        }
        for (name, expected) in &against.logstores {
            let same = catalogue.logstores.get(name).is_some_and(|entry| entry.id == expected.id);
            let deleted = records.iter().skip(against.audit.number as usize).any(|record| {
                record.logstore_id == Some(expected.id)
                    && matches!(record.event, AuditEvent::DeleteIntended | AuditEvent::Deleted)
            });
            if deleted {
                verification.report.notes.push(format!("Logstore {name} was deleted since the checkpoint"));
            } else if !same {
                let what = format!("Logstore {name}, which the checkpoint knows, is not there");
                verification.note(Some(name), Error::RolledBack { what })?;
            }
        }
        Ok(())
    }

    /// The store's own documents, as they are on disk now.
    fn verify_documents(&self) -> [Result<()>; 3] {
        let keyring = read(&self.keyring);
        // Rolling shards add records meanwhile.
        let known = self.catalogue.now().generation;
        let catalogue = load_newest(&*self.disk, &self.dir, self.id, &keyring).and_then(|found| {
            let found = found.catalogue.generation;
            if self.read_only || found >= known {
                return Ok(());
            }
            Err(Error::RolledBack {
                what: format!("the catalogue is of generation {found}, it was written as {known}"),
            })
        });
        [verify_identity(&*self.disk, &self.dir, &keyring), keyring.verify_file(), catalogue]
    }

    /// Reads the metadata that is in force from its file.
    fn meta_on_disk(&self, logstore: &LogstoreShared) -> Result<Meta> {
        loop {
            let current = lock(&logstore.meta).reference();
            let found = Meta::load(&*self.disk, &logstore.dir, self.id, logstore.id, &read(&self.keyring), &current);
            if found.is_ok() {
                return found;
            }
            // It may have been replaced meanwhile, by this process or by the writer that a reader follows.
            if self.read_only {
                logstore.gate.catch_up()?;
            }
            if lock(&logstore.meta).reference() == current {
                return found;
            }
        }
    }

    fn verify_logstore(
        &self,
        logstore: &LogstoreShared,
        expected: Option<&CheckpointEntry>,
        verification: &mut Verification<'_>,
    ) -> Result<()> {
        let name = &logstore.name;
        let expected = expected.filter(|expected| expected.id == logstore.id);
        let generation = lock(&logstore.meta).generation;
        let mut on_disk = None;
        match self.meta_on_disk(logstore) {
            Ok(found) => on_disk = found.tagged,
            Err(error) => verification.note(Some(name), error)?,
        }
        if let Some(expected) = expected.filter(|expected| generation < expected.generation) {
            let what =
                format!("the metadata is of generation {generation}, it was {} at the checkpoint", expected.generation);
            verification.note(Some(name), Error::RolledBack { what })?;
        }
        let section = logstore.keys_section().filter(|_| !verification.keyless);
        if section.is_some()
            && logstore.gate.is_unproved()
            && let Err(error) = logstore.gate.admit().and_then(|_| logstore.gate.prove())
        {
            // No data key is used then, and what needs none is verified all the same.
            verification.note(Some(name), error)?;
            verification.keyless = true;
        }
        // The segments' keys prove themselves by their commitments; the envelopes of versions without segments are proved here.
        if let Some(section) = &section {
            let with_keys = !verification.keyless;
            for (version, _) in section.envelopes().filter(|_| with_keys) {
                let unwrapped = logstore.gate.admit().and_then(|_| logstore.gate.unwrap(version.version));
                let checked = unwrapped.and_then(|key| match &on_disk {
                    Some(tagged) if version.version == section.current => tagged.prove(&key),
                    _ => Ok(()),
                });
                if let Err(error) = checked {
                    verification.note(Some(name), error)?;
                }
            }
            if let Some(cmk) = &section.cmk
                && let Ok(kms) = self.kms.serving(&cmk.region_id)
                && let Err(error) = self.load_probe(kms.name(), cmk)
            {
                verification.note(Some(name), error)?;
            }
        }
        for (index, shard) in logstore.shards.iter().enumerate() {
            let record = expected.and_then(|expected| expected.shards.get(index));
            self.verify_shard(name, shard, record, verification)?;
        }
        Ok(())
    }

    fn verify_shard(
        &self,
        name: &LogstoreName,
        shard: &Shard,
        expected: Option<&ShardRecord>,
        verification: &mut Verification<'_>,
    ) -> Result<()> {
        let segments = match shard.segments(true) {
            Ok(segments) => segments,
            Err(error) => return verification.note(Some(name), error),
        };
        let record = shard.record();
        let checkpoint = expected.and_then(|expected| expected.head.as_ref());
        for head in record.head.iter().chain(checkpoint) {
            let reached = segments.last().map_or(record.first_ordinal - 1, |last| last.ordinal);
            if head.ordinal > reached {
                let what = format!("shard {} ends at segment {reached}, it had {}", shard.id(), head.ordinal);
                verification.note(Some(name), Error::RolledBack { what })?;
            } else if head.ordinal < record.first_ordinal {
                verification.report.notes.push(format!("retention dropped segment {} of {name}", head.ordinal));
            }
        }
        // When the last group before the next segment was received.
        let mut last_time_us = 0;
        for segment in segments.iter() {
            let stat = self.disk.stat(&segment.path).map_err(Error::io("look for", &*segment.path))?;
            let len = stat.map_or(0, |stat| stat.len);
            let heads: Vec<&Head> =
                record.head.iter().chain(checkpoint).filter(|head| head.ordinal == segment.ordinal).collect();
            let checked = match shard.open_listed(segment) {
                Ok(Some(opened)) => self.verify_segment(name, shard, opened, &heads, &mut last_time_us, verification),
                Ok(None) => {
                    verification.report.notes.push(format!("retention dropped segment {} of {name}", segment.ordinal));
                    continue;
                }
                Err(error) => Err(error),
            };
            if let Err(error) = checked {
                verification.note(Some(name), error)?;
            }
            verification.report.segments += 1;
            verification.report.bytes += len;
            verification.advance(len);
        }
        Ok(())
    }

    fn verify_segment(
        &self,
        name: &LogstoreName,
        shard: &Shard,
        opened: Opened,
        heads: &[&Head],
        last_time_us: &mut u64,
        verification: &mut Verification<'_>,
    ) -> Result<()> {
        let gate = shard.gate();
        let mut keyless = verification.keyless;
        let mut version_missing = false;
        if !keyless {
            // Derives the key, which checks the commitment; the footer is authenticated if there is one.
            let checked = gate
                .with_cipher(&opened.header, &opened.name.path, |_| Ok(()))
                .and_then(|()| shard.verify_footer(&opened));
            if let Err(error) = checked {
                version_missing = matches!(error, Error::RolledBack { .. });
                verification.note(Some(name), error)?;
                keyless = true;
            }
        }
        // The rules find a missing version too.
        if !version_missing && let Err(error) = shard.check_rules(&opened) {
            verification.note(Some(name), error)?;
        }
        let header = std::sync::Arc::clone(&opened.header);
        let end = opened.end.clone();
        let file_len = opened.file.len().map_err(Error::io("get the length of", &*opened.name.path))?;
        let mut builder = FooterBuilder::of(&header);
        let mut heads: Vec<&&Head> = heads.iter().collect();
        let mut damaged = false;
        let mut reader = SegmentReader::new(opened, ReadMode::Pread)?;
        if let Err(error) = reader.follow(*last_time_us) {
            verification.note(Some(name), error)?;
        }
        loop {
            heads.retain(|head| {
                let reached = builder.so_far().block_count == head.blocks;
                let same = head.segment == header.header.segment && builder.digest() == head.digest;
                let bytes = if head.sealed { file_len } else { reader.offset };
                let last_time_us = header.header.last_time_us(builder.so_far());
                let ends =
                    (builder.so_far().end_seq, bytes, last_time_us) == (head.end_seq, head.bytes, head.last_time_us);
                if reached && !same {
                    let what = format!("segment {} of shard {} is not what it was", head.ordinal, shard.id());
                    verification.report.faults.push(Fault::of(Some(name), &Error::RolledBack { what }));
                } else if reached && !ends {
                    let what =
                        format!("the catalogue or the checkpoint says that {} blocks end elsewhere", head.blocks);
                    verification.report.faults.push(Fault::of(Some(name), &Error::corrupt(reader.here(), what)));
                }
                !reached
            });
            reader.proof = if keyless { Proof::Crc } else { Proof::Tag };
            let loaded = match reader.load(shard.list()) {
                Err(error) if !keyless && matches!(error.kind(), ErrorKind::Revoked | ErrorKind::KmsUnreachable) => {
                    verification.note(Some(name), error)?;
                    keyless = true;
                    continue;
                }
                Err(error @ (Error::Corrupt { .. } | Error::Tampered { .. })) => {
                    damaged = true;
                    heads.clear();
                    verification.note(Some(name), error)?;
                    if reader.pass_damage()? {
                        continue;
                    }
                    break;
                }
                loaded => loaded?,
            };
            match loaded {
                Load::Block(block) => {
                    verification.report.blocks += 1;
                    verification.report.groups += u64::from(block.group_count);
                    let (payload_hash, tag) = reader.loaded_digest_parts()?;
                    builder.add(reader.offset, &block, &payload_hash, &tag);
                    let (place, at) = (reader.check_place(&block), reader.here());
                    let raw = match (keyless, header.header.suite.encrypts()) {
                        (false, _) => reader.open(gate).map(Some),
                        // What is only authenticated can be looked into without the key.
                        (true, false) => reader.open_unproved().map(Some),
                        (true, true) => Ok(None),
                    };
                    reader.skip();
                    match raw {
                        Ok(raw) => {
                            let contents = raw.map_or(Ok(()), |mut raw| {
                                let checked = check_contents(&block, &raw, at);
                                wipe(&mut raw);
                                checked
                            });
                            for checked in [place, contents] {
                                if let Err(error) = checked {
                                    verification.note(Some(name), error)?;
                                }
                            }
                        }
                        Err(error) => {
                            keyless |= error.kind() != ErrorKind::Integrity;
                            verification.note(Some(name), error)?;
                        }
                    }
                }
                Load::End => break,
                Load::NotYet => {
                    if matches!(end, End::Unknown) {
                        let left = shard.data_end(&reader.opened, reader.offset, reader.proof)?;
                        if left > reader.offset {
                            let note = format!(
                                "{} ends in {} bytes that are no block, above the durable mark: the next append drops them",
                                reader.opened.name.path.display(),
                                left - reader.offset
                            );
                            verification.report.notes.push(note);
                        }
                    }
                    break;
                }
            }
        }
        *last_time_us = (*last_time_us).max(reader.last_time_us());
        for head in heads {
            let what = format!("segment {} has fewer blocks than the {} it had", head.ordinal, head.blocks);
            verification.note(Some(name), Error::RolledBack { what })?;
        }
        if damaged {
            return Ok(());
        }
        let at = || reader.opened.at(reader.offset);
        match &end {
            End::Sealed(footer) => {
                let found = builder.build(footer.footer.offset, footer.footer.nonce_random, footer.footer.recovered);
                if found != footer.footer {
                    return Err(Error::corrupt(at(), "the footer does not agree with the blocks"));
                }
            }
            End::Cut(cut) if cut.digest != builder.digest() => {
                return Err(Error::corrupt(at(), "the blocks are not those that the successor names"));
            }
            End::Cut(cut) if cut.end_seq != builder.so_far().end_seq => {
                return Err(Error::corrupt(at(), "the blocks end at another sequence number than the successor says"));
            }
            End::Cut(cut) if cut.last_time_us != header.header.last_time_us(builder.so_far()) => {
                return Err(Error::corrupt(
                    at(),
                    "the last receive time of the blocks is another than the successor says",
                ));
            }
            _ => {}
        }
        Ok(())
    }
}

/// Checks the raw bytes of a block: its list and its receive times, and the groups in it.
fn check_contents(block: &BlockHeader, raw: &[u8], at: Location) -> Result<()> {
    let mut frames = Vec::new();
    let broken = |rule: &dyn std::fmt::Display| Error::corrupt(at.clone(), format!("a block: {rule}"));
    entries(block, raw, |entry| frames.push(entry.bytes)).map_err(|rule| broken(&rule))?;
    if block.kind == BlockKind::Groups {
        check_groups(block, raw, &frames).map_err(|rule| broken(&rule))?;
    }
    Ok(())
}
