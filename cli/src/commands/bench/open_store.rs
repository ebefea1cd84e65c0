//! Measures how long opening a store with many sealed segments takes, and shows that it reads no
//! data and calls no KMS.

use std::{
    fmt, io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use envelog::{
    AppendOptions, Durability, EncryptConf, EncryptType, LogstoreName, Payload,
    crypto::SecretKey,
    inspect::Compression,
    io::{Access, DirEntry, Disk, DiskFile, FileStat, Map, OpenMode, RealDisk},
    kms::{Cmk, Kms, KmsCall, KmsError, LocalKms},
};
use serde::Serialize;

use super::{Bench, ROUNDS, Row, Suite, median, rounded, spec};
use crate::{exit::Result, interrupt};

/// The number of sealed segments in the store.
const SEGMENTS: u64 = 2000;
const REGION: &str = "local";
const ROLE: &str = "bench";

/// The time of opening, and the files and KMS calls it needed.
#[derive(Clone, Serialize)]
pub(super) struct Opening {
    segments: u64,
    /// Time to open the store and the Logstore.
    pub(super) ms: f64,
    /// Segment files opened meanwhile.
    segment_files_opened: u64,
    kms_calls: u64,
    /// Further time until the shard knows its end.
    ms_to_end: f64,
    segment_files_opened_to_end: u64,
}

impl fmt::Display for Opening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Opening a store of {} sealed segments opened {} segment files and called the KMS {} times; finding the end of the \
             shard then took {:.2} ms and opened {}.",
            self.segments,
            self.segment_files_opened,
            self.kms_calls,
            self.ms_to_end,
            self.segment_files_opened_to_end
        )
    }
}

impl Bench {
    /// Opens a Logstore under a customer's key, which is the case that might need the most KMS
    /// calls.
    pub(super) fn open_store(&self) -> Result<Row> {
        let name = LogstoreName::new("bench", "segments")?;
        let kms = LocalKms::create_or_open(self.dir.join("segments.kms"))?;
        let cmk = Cmk {
            cmk_key_id: kms.create_key(REGION, &[ROLE])?,
            arn: ROLE.to_owned(),
            region_id: REGION.to_owned(),
        };
        let kms = Arc::new(CountedKms { kms, calls: AtomicU64::new(0) });
        let builder = || self.builder("segments").kms(Arc::clone(&kms) as _);

        let store = builder()
            .disk(Arc::new(CountedDisk { unsynced: true, ..CountedDisk::default() }))
            .create()?;
        let conf = EncryptConf::byok(EncryptType::Aes, cmk);
        let logstore = store
            .create_logstore(&name, spec(Suite::None, Compression::None).encrypt_conf(conf))?;
        for _ in 0..SEGMENTS {
            interrupt::check()?;
            let payload = Payload::opaque("a segment of its own")?;
            logstore.append(payload, &AppendOptions::default().durability(Durability::Written))?;
            logstore.roll()?;
        }
        drop(logstore);
        store.close()?;

        let disk = Arc::new(CountedDisk::default());
        let mut times = Vec::new();
        let mut times_to_end = Vec::new();
        let (mut opened, mut called, mut opened_to_end) = (0, 0, 0);
        for round in 0..=ROUNDS {
            interrupt::check()?;
            disk.segments_opened.store(0, Ordering::Relaxed);
            kms.calls.store(0, Ordering::Relaxed);
            let started = Instant::now();
            let store = builder().disk(Arc::clone(&disk) as _).open()?;
            let logstore = store.logstore(&name)?;
            let ready = started.elapsed();
            opened = disk.segments_opened.swap(0, Ordering::Relaxed).max(opened);
            called = kms.calls.load(Ordering::Relaxed).max(called);
            let started = Instant::now();
            logstore.end_seq(0)?;
            let to_end = started.elapsed();
            opened_to_end = disk.segments_opened.load(Ordering::Relaxed).max(opened_to_end);
            // The first round is a warm-up.
            if round > 0 {
                times.push(ready.as_secs_f64() * 1e3);
                times_to_end.push(to_end.as_secs_f64() * 1e3);
            }
            drop(logstore);
            store.close()?;
        }
        self.clear("segments")?;
        let opening = Opening {
            segments: SEGMENTS,
            ms: rounded(median(&times), 100.0),
            segment_files_opened: opened,
            kms_calls: called,
            ms_to_end: rounded(median(&times_to_end), 100.0),
            segment_files_opened_to_end: opened_to_end,
        };
        Ok(Row { opening: Some(opening), ..Row::new("open_store", Suite::Aes) })
    }
}

/// The embedded KMS with its calls counted.
#[derive(Debug)]
struct CountedKms {
    kms: LocalKms,
    calls: AtomicU64,
}

impl Kms for CountedKms {
    fn name(&self) -> &str {
        self.kms.name()
    }

    fn serves(&self, region_id: &str) -> bool {
        self.kms.serves(region_id)
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> std::result::Result<Vec<u8>, KmsError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.kms.wrap(call, key)
    }

    fn unwrap(
        &self,
        call: &KmsCall<'_>,
        wrapped: &[u8],
    ) -> std::result::Result<SecretKey, KmsError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.kms.unwrap(call, wrapped)
    }
}

/// The real file system. Counts the segment files that are opened.
#[derive(Clone, Debug, Default)]
struct CountedDisk {
    segments_opened: Arc<AtomicU64>,
    /// Skips syncs while the segments are created, which is not measured and would take minutes on
    /// a slow disk.
    unsynced: bool,
}

impl Disk for CountedDisk {
    /// Counts opens below the directory too. The benchmark's own directory contains no symlinks.
    fn beneath(&self, _dir: &Path, _access: Access) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(self.clone()))
    }

    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        if path.extension().is_some_and(|extension| extension == "seg") {
            self.segments_opened.fetch_add(1, Ordering::Relaxed);
        }
        let file = RealDisk.open(path, mode)?;
        Ok(if self.unsynced { Arc::new(Unsynced(file)) } else { file })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename_new(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        if self.unsynced { Ok(()) } else { RealDisk.sync_dir(path) }
    }

    fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        RealDisk.list_dir(path)
    }

    fn stat(&self, path: &Path) -> io::Result<Option<FileStat>> {
        RealDisk.stat(path)
    }
}

#[derive(Debug)]
struct Unsynced(Arc<dyn DiskFile>);

impl DiskFile for Unsynced {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(buf, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }

    fn stat(&self) -> io::Result<FileStat> {
        self.0.stat()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn try_lock(&self) -> io::Result<bool> {
        self.0.try_lock()
    }

    fn map(&self) -> io::Result<Map> {
        self.0.map()
    }
}
