//! Verification of a whole store: checks everything that can be checked, and lists each fault with
//! its place.

use std::{collections::BTreeSet, path::Path};

use super::{
    audit_export::accepted_loss,
    checkpoint::{CheckpointBody, CheckpointEntry, open_checkpoint},
    report::{VerifyFault, VerifyOptions, VerifyProgress, VerifyReport},
    segment::SegmentCheck,
};
use crate::{
    Error, ErrorKind, Result,
    config::LogstoreName,
    epoch,
    error::Location,
    io::{self, FileKind},
    keys::{
        AuditEvent, AuditRecord,
        envelope::{KeysSection, TaggedKeys},
    },
    logstore::{LogstoreShared, Meta},
    shard::{Head, SegmentRef, Shard, ShardRecord},
    store::{
        catalogue::{Catalogue, Loaded, load_newest},
        core::Core,
        identity::{identity_path, load_identity},
        lock,
    },
};

/// A verification under way.
struct Verification<'a> {
    core: &'a Core,
    /// Whether all Logstores are verified, and the documents of the store too.
    is_whole: bool,
    keyless: bool,
    report: VerifyReport,
    state: VerifyProgress,
    progress: &'a mut dyn FnMut(VerifyProgress),
}

impl Verification<'_> {
    fn advance(&mut self, bytes: u64) {
        self.state.bytes += bytes;
        (self.progress)(self.state);
    }

    /// Verifies the parts that belong to no single Logstore: the documents of the store, the audit
    /// log, directories that the catalogue does not list, and the checkpoint. The caller holds the
    /// administration.
    fn store(&mut self, against: Option<&CheckpointBody>) -> Result<()> {
        self.documents()?;
        let catalogue = self.core.registry.catalogue().clone();
        let records = self.audit_log(&catalogue, against)?;
        if self.core.keys.keyring().is_rotating() {
            let note =
                "the rotation of the service key is unfinished, and older versions are accepted";
            self.report.notes.push(note.to_owned());
        }
        for id in &catalogue.deleting {
            let dir = self.core.env.logstore_dir(*id);
            let note =
                format!("the files of a deleted Logstore are not all gone: {}", dir.display());
            self.report.notes.push(note);
        }
        for (dir, may_have_segments) in self.core.registry.unlisted()? {
            if may_have_segments {
                let what = format!(
                    "the catalogue does not know {}, which has segments in it; if it is of another store, move it away",
                    dir.display()
                );
                self.report.note(None, Error::RolledBack { what })?;
            }
        }
        against.map_or(Ok(()), |against| self.catalogue(&catalogue, &records, against))
    }

    /// Verifies the documents of the store, as they are on disk now.
    fn documents(&mut self) -> Result<()> {
        let Core { env, keys, registry } = self.core;
        let keyring = keys.keyring();
        match load_identity(&*env.disk, &env.dir, &keyring) {
            Ok((_, bytes)) => self.copies(&identity_path(&env.dir), &bytes),
            Err(error) => self.report.note(None, error)?,
        }
        // Shards that roll add records to the catalogue at the same time.
        let known = registry.catalogue().generation;
        match load_newest(&*env.disk, &env.dir, env.id, &keyring) {
            Ok(Loaded { catalogue, lost, .. }) => {
                let found = catalogue.generation;
                if !env.read_only && found < known {
                    let what = format!(
                        "the catalogue is of generation {found}, it was written as {known}"
                    );
                    self.report.note(None, Error::RolledBack { what })?;
                }
                if let Some(lost) = lost {
                    self.report.lost_copy(&lost);
                }
            }
            Err(error) => self.report.note(None, error)?,
        }
        if let Err(error) = keyring.verify_file() {
            self.report.note(None, error)?;
        }
        self.writer_files()
    }

    /// Checks that no other object has the name of a file that a writer needs. If there is no such
    /// file, the next writer makes it.
    fn writer_files(&mut self) -> Result<()> {
        let env = &self.core.env;
        for name in [lock::NAME, epoch::NAME] {
            let path = env.dir.join(name);
            let stat = env.disk.stat(&path).map_err(Error::io("look for", &path))?;
            if let Some(stat) = stat.filter(|stat| stat.kind != FileKind::File) {
                let (expected, found) = (FileKind::File, stat.kind);
                self.report.note(None, Error::WrongFileType { path, expected, found })?;
            }
        }
        Ok(())
    }

    /// Verifies the probes. Reading one may load a newer keyring, so the caller does not hold the
    /// administration.
    fn probes(&mut self) -> Result<()> {
        let keys = &self.core.keys;
        for path in keys.probe_paths()? {
            match keys.read_probe(&path) {
                Err(error) if !error.is_not_found() => self.report.note(None, error)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// Verifies the audit log, and compares the catalogue with it. Returns the records; none if
    /// the log has a fault.
    fn audit_log(
        &mut self,
        catalogue: &Catalogue,
        against: Option<&CheckpointBody>,
    ) -> Result<Vec<AuditRecord>> {
        let audit = self.core.keys.audit();
        let mut heads = vec![&catalogue.audit];
        heads.extend(against.map(|against| &against.audit));
        let records = match audit.verified(&heads) {
            Ok(records) => records,
            Err(error) => {
                self.report.note(None, error)?;
                Vec::new()
            }
        };
        let deleted = records.iter().filter(|record| record.event == AuditEvent::Deleted);
        let deleted: BTreeSet<_> = deleted.filter_map(|record| record.logstore_id).collect();
        for (name, entry) in &catalogue.logstores {
            if deleted.contains(&entry.id) {
                let what =
                    format!("Logstore {name} is there, and the audit log says that it was deleted");
                self.report.note(Some(name), Error::RolledBack { what })?;
            }
        }
        self.report.notes.extend(records.iter().filter_map(accepted_loss));
        match audit.strangers() {
            Ok(notes) => self.report.notes.extend(notes),
            Err(error) => self.report.note(None, error)?,
        }
        Ok(records)
    }

    /// Compares the catalogue with a checkpoint.
    fn catalogue(
        &mut self,
        catalogue: &Catalogue,
        records: &[AuditRecord],
        against: &CheckpointBody,
    ) -> Result<()> {
        if catalogue.generation < against.catalogue_generation {
            let what = format!(
                "the catalogue is of generation {}, it was {} at the checkpoint",
                catalogue.generation, against.catalogue_generation
            );
            self.report.note(None, Error::RolledBack { what })?;
        }
        for (name, expected) in &against.logstores {
            let same = catalogue.logstores.get(name).is_some_and(|entry| entry.id == expected.id);
            let since = records.iter().skip(against.audit.number as usize);
            let since = since.filter(|record| record.logstore_id == Some(expected.id));
            let has = |event| since.clone().any(|record| record.event == event);
            let deleted = has(AuditEvent::DeleteIntended) || has(AuditEvent::Deleted);
            if has(AuditEvent::GivenUp) {
                let what =
                    format!("Logstore {name}, which the checkpoint knows, was lost and given up");
                self.report.note(
                    Some(name),
                    Error::Truncated {
                        at: Location::new(self.core.env.logstore_dir(expected.id), 0),
                        what,
                    },
                )?;
            } else if has(AuditEvent::MetadataAdopted) && same {
                let what =
                    format!("metadata of Logstore {name} was lost, and other was put in force");
                self.report.note(Some(name), Error::RolledBack { what })?;
            } else if deleted {
                self.report.notes.push(format!("Logstore {name} was deleted since the checkpoint"));
            } else if !same {
                let what = format!("Logstore {name}, which the checkpoint knows, is not there");
                self.report.note(Some(name), Error::RolledBack { what })?;
            }
        }
        Ok(())
    }

    fn logstore(
        &mut self,
        logstore: &LogstoreShared,
        expected: Option<&CheckpointEntry>,
    ) -> Result<()> {
        let name = &logstore.name;
        let expected = expected.filter(|expected| expected.id == logstore.id);
        let generation = logstore.generation();
        let mut on_disk = None;
        match self.meta_on_disk(logstore) {
            Ok(found) => on_disk = found.tagged,
            Err(error) => self.report.note(Some(name), error)?,
        }
        let named = self.core.registry.entry(name).map(|entry| entry.generation);
        if let Ok(named) = named.as_ref()
            && *named < generation
            && self.core.env.read_only
        {
            let what = format!(
                "the metadata of Logstore {name} is of generation {generation}, the catalogue names {named}"
            );
            self.report.note(Some(name), Error::RolledBack { what })?;
        }
        if let Some(expected) = expected.filter(|expected| generation < expected.generation) {
            let what = format!(
                "the metadata is of generation {generation}, it was {} at the checkpoint",
                expected.generation
            );
            self.report.note(Some(name), Error::RolledBack { what })?;
        }
        if let Some(section) = logstore.keys_section() {
            // The verification of the whole store reads all probes.
            if !self.is_whole
                && let Some(cmk) = &section.cmk
                && let Err(error) = self.core.keys.load_probe(cmk)
            {
                self.report.note(Some(name), error)?;
            }
            if !self.keyless {
                self.keys(logstore, &section, on_disk.as_deref())?;
            }
        }
        for (index, shard) in logstore.table().shards().iter().enumerate() {
            let record = expected.and_then(|expected| expected.shards.get(index));
            self.shard(name, shard, record)?;
        }
        Ok(())
    }

    /// Reads the metadata in force from its file.
    fn meta_on_disk(&mut self, logstore: &LogstoreShared) -> Result<Meta> {
        let Core { env, keys, .. } = self.core;
        loop {
            let current = logstore.meta_reference();
            let found = Meta::load(
                &*env.disk,
                &logstore.dir,
                env.id,
                logstore.id,
                &keys.keyring(),
                &current,
            );
            let found = match found {
                Ok((meta, bytes)) => {
                    self.copies(&current.path(&logstore.dir), &bytes);
                    return Ok(meta);
                }
                Err(error) => error,
            };
            // This process, or the writer that a reader follows, may have replaced the metadata.
            if env.read_only {
                logstore.gate.catch_up()?;
            }
            if logstore.meta_reference() == current {
                return Err(found);
            }
        }
    }

    /// Notes a lost or damaged copy of a file that exists twice. `bytes` are those of the other.
    fn copies(&mut self, path: &Path, bytes: &[u8]) {
        for lost in io::lost_of_two(&*self.core.env.disk, path, bytes) {
            self.report.lost_copy(&lost);
        }
    }

    /// Verifies the keys section and the envelopes of a Logstore. The commitments of the
    /// segments prove the keys with segments; this proves the keys without one too.
    fn keys(
        &mut self,
        logstore: &LogstoreShared,
        section: &KeysSection,
        on_disk: Option<&TaggedKeys>,
    ) -> Result<()> {
        let (name, gate) = (&logstore.name, &logstore.gate);
        if gate.is_unproved()
            && let Err(error) = gate.admit().and_then(|_| gate.prove())
        {
            // No data key can be used, so the rest is verified without keys.
            self.report.note(Some(name), error)?;
            self.keyless = true;
        }
        let with_keys = !self.keyless;
        for (version, _) in section.envelopes().filter(|_| with_keys) {
            let unwrapped = gate.admit().and_then(|_| gate.unwrap(version.version));
            let checked = unwrapped.and_then(|key| match on_disk {
                Some(tagged) if version.version == section.current => tagged.prove(&key),
                _ => Ok(()),
            });
            if let Err(error) = checked {
                self.report.note(Some(name), error)?;
            }
        }
        Ok(())
    }

    /// Notes the accepted losses of a shard. A loss that the checkpoint does not have is a fault, if
    /// the checkpoint has the data.
    fn losses(
        &mut self,
        name: &LogstoreName,
        shard: &Shard,
        record: &ShardRecord,
        expected: Option<&ShardRecord>,
    ) -> Result<()> {
        for loss in &record.losses {
            let what = format!(
                "shard {} of {name} has lost groups from number {} to before {} (segments {} to {})",
                shard.id(),
                loss.from_seq,
                loss.end_seq,
                loss.first,
                loss.last
            );
            self.report.notes.push(format!("{what}, and the loss was accepted"));
            let had = expected
                .filter(|expected| !expected.losses.contains(loss))
                .and_then(|expected| expected.head.as_ref());
            if had.is_some_and(|head| head.ordinal >= loss.first) {
                let what = format!("{what}, which the checkpoint has");
                self.report.note(Some(name), Error::RolledBack { what })?;
            }
        }
        Ok(())
    }

    fn shard(
        &mut self,
        name: &LogstoreName,
        shard: &Shard,
        expected: Option<&ShardRecord>,
    ) -> Result<()> {
        let segments = match shard.segments(true) {
            Ok(segments) => segments,
            Err(error) => return self.report.note(Some(name), error),
        };
        match shard.strangers() {
            Ok(strangers) => self.report.notes.extend(strangers.iter().map(|path| {
                let (path, shard) = (path.display(), shard.id());
                format!("{path} has the name of a segment, and is none of shard {shard} of {name}")
            })),
            Err(error) => self.report.note(Some(name), error)?,
        }
        let record = shard.record();
        self.losses(name, shard, &record, expected)?;
        let checkpoint = expected.and_then(|expected| expected.head.as_ref());
        for head in record.head.iter().chain(checkpoint) {
            let reached =
                segments.last().map_or(record.first_ordinal - 1, SegmentRef::last_ordinal);
            if head.ordinal > reached {
                let what = format!(
                    "shard {} ends at segment {reached}, it had {}",
                    shard.id(),
                    head.ordinal
                );
                self.report.note(Some(name), Error::RolledBack { what })?;
            } else if head.ordinal < record.first_ordinal {
                self.report
                    .notes
                    .push(format!("retention dropped segment {} of {name}", head.ordinal));
            }
        }
        let mut before = None;
        for segment in segments.iter() {
            let loss = record.loss(segment.ordinal);
            let is_lost = loss.is_some();
            if segment.is_missing() {
                if !is_lost {
                    self.report.note(Some(name), segment.missing())?;
                }
                continue;
            }
            let stat = self
                .core
                .env
                .disk
                .stat(&segment.path)
                .map_err(Error::io("look for", &*segment.path))?;
            let len = stat.map_or(0, |stat| stat.len);
            let heads: Vec<&Head> = record
                .head
                .iter()
                .chain(checkpoint)
                .filter(|head| head.ordinal == segment.ordinal && !is_lost)
                .collect();
            let opened = match shard.open_listed(segment) {
                Err(error) if error.is_loss() || loss.is_some_and(|loss| loss.covers(&error)) => {
                    if !is_lost {
                        self.report.note(Some(name), error.clone())?;
                    }
                    // The blocks in front of the damage are checked all the same.
                    match shard.open_damaged(segment, error) {
                        // Nothing of it can be read.
                        Err(error) if error.kind() == ErrorKind::Integrity => continue,
                        opened => opened.map(Some),
                    }
                }
                opened => opened,
            };
            let faults = self.report.faults.len();
            let checked = match opened {
                Ok(Some(opened)) => {
                    let (report, keyless) = (&mut self.report, self.keyless);
                    SegmentCheck::run(report, keyless, name, shard, opened, heads, &mut before)
                }
                Ok(None) => {
                    self.report
                        .notes
                        .push(format!("retention dropped segment {} of {name}", segment.ordinal));
                    continue;
                }
                Err(error) => Err(error),
            };
            if let Err(error) = checked {
                self.report.note(Some(name), error)?;
            }
            if let Some(loss) = loss {
                // The operator has accepted these faults.
                let is_covered = |fault: &VerifyFault| {
                    loss.tampered || matches!(fault.code, "corrupt" | "truncated")
                };
                let found = self.report.faults.split_off(faults.min(self.report.faults.len()));
                self.report.faults.extend(found.into_iter().filter(|fault| !is_covered(fault)));
            }
            self.report.segments += 1;
            self.report.bytes += len;
            self.advance(len);
        }
        Ok(())
    }
}

/// Verifies a store, or one Logstore.
pub(in crate::store) fn verify(
    core: &Core,
    options: &VerifyOptions,
    progress: &mut dyn FnMut(VerifyProgress),
) -> Result<VerifyReport> {
    core.keys.check_process()?;
    let service_key = core.keys.admit_service_key();
    if !options.keyless {
        service_key.clone()?;
    }
    let against =
        options.against.as_ref().map(|checkpoint| open_checkpoint(core, checkpoint)).transpose()?;
    let report = VerifyReport { keyless: options.keyless, ..VerifyReport::default() };
    let mut verification = Verification {
        core,
        is_whole: options.logstore.is_none(),
        keyless: options.keyless,
        report,
        state: Default::default(),
        progress,
    };
    if service_key.is_ok() {
        core.registry.reload_catalogue()?;
    }
    let names = {
        let _admin = core.registry.exclusive();
        match &service_key {
            Ok(()) if options.logstore.is_none() => verification.store(against.as_ref())?,
            Ok(()) => {}
            // The catalogue in memory lists the Logstores, and segments are checked without a key.
            Err(error) => {
                let note = format!("documents and the key audit log not verified: {error}");
                verification.report.notes.push(note);
            }
        }
        if let Some(name) = &options.logstore {
            drop(core.registry.entry(name)?);
        }
        core.registry.names()
    };
    if service_key.is_ok() && options.logstore.is_none() {
        verification.probes()?;
    }
    let mut logstores = Vec::new();
    for name in
        names.iter().filter(|name| options.logstore.as_ref().is_none_or(|only| only == *name))
    {
        match core.registry.logstore(name) {
            Ok(logstore) => logstores.push(logstore),
            Err(error) => verification.report.note(Some(name), error)?,
        }
    }
    for logstore in &logstores {
        verification.state.bytes_total += segment_bytes(core, logstore)?;
    }
    for logstore in &logstores {
        let expected = against.as_ref().and_then(|against| against.logstores.get(&logstore.name));
        let faults = verification.report.faults.len();
        let verified = verification.logstore(logstore, expected);
        verification.keyless = options.keyless;
        // Closing the store sets its own mark before it closes the gates.
        if logstore.gate.is_closed() && !core.registry.is_closed() {
            // The faults were objects that the deletion has removed.
            verification.report.faults.truncate(faults);
            verification
                .report
                .notes
                .push(format!("Logstore {} was deleted meanwhile", logstore.name));
        } else {
            verified?;
        }
    }
    Ok(verification.report)
}

/// The bytes on disk of all segments of a Logstore.
fn segment_bytes(core: &Core, logstore: &LogstoreShared) -> Result<u64> {
    let mut bytes = 0;
    for shard in logstore.table().shards() {
        let segments = shard.segments(true).unwrap_or_default();
        for segment in segments.iter().filter(|segment| !segment.is_missing()) {
            let stat =
                core.env.disk.stat(&segment.path).map_err(Error::io("look for", &*segment.path))?;
            bytes += stat.map_or(0, |stat| stat.len);
        }
    }
    Ok(bytes)
}
