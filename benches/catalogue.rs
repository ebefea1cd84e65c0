//! The cost of the catalogue, in one run: `cargo bench --bench catalogue`.
//!
//! Prints how long the 10,000th Logstore takes compared with the 10th. Prints how much a roll
//! writes and syncs in a store of 4,000 shards, compared with a store of a single shard.

#![allow(clippy::unwrap_used, clippy::disallowed_methods, clippy::disallowed_types)]

use std::{
    io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use envelog::{
    AppendOptions, Background, LogstoreSpec, Payload, ShardChoice, Store, StoreOptions,
    crypto::AwsLc,
    io::{Access, DirEntry, Disk, DiskFile, FileStat, Map, OpenMode, Owner, RealDisk},
};

/// The amounts written and synced.
#[derive(Debug, Default)]
struct Counts {
    bytes: AtomicU64,
    syncs: AtomicU64,
}

impl Counts {
    fn take(&self) -> (u64, u64) {
        (self.bytes.swap(0, Relaxed), self.syncs.swap(0, Relaxed))
    }
}

#[derive(Debug)]
struct CountingDisk(Arc<dyn Disk>, Arc<Counts>);

#[derive(Debug)]
struct CountingFile(Arc<dyn DiskFile>, Arc<Counts>);

impl Disk for CountingDisk {
    fn beneath(&self, dir: &Path, access: Access) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(Self(self.0.beneath(dir, access)?, Arc::clone(&self.1))))
    }
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(CountingFile(self.0.open(path, mode)?, Arc::clone(&self.1))))
    }
    fn resolve(&self, path: &Path) -> io::Result<std::path::PathBuf> {
        self.0.resolve(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename_new(from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.0.remove_file(path)
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.0.create_dir(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.0.remove_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.1.syncs.fetch_add(1, Relaxed);
        self.0.sync_dir(path)
    }
    fn list_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        self.0.list_dir(path)
    }
    fn stat(&self, path: &Path) -> io::Result<Option<FileStat>> {
        self.0.stat(path)
    }
}

impl DiskFile for CountingFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.1.bytes.fetch_add(buf.len() as u64, Relaxed);
        self.0.write_at(buf, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.1.syncs.fetch_add(1, Relaxed);
        self.0.sync_data()
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn stat(&self) -> io::Result<FileStat> {
        self.0.stat()
    }
    fn set_owner(&self, owner: Owner) -> io::Result<()> {
        self.0.set_owner(owner)
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

fn store(dir: &Path, counts: &Arc<Counts>) -> Store {
    let mut options = StoreOptions::default();
    options.background = Background::Manual;
    let disk = CountingDisk(Arc::new(RealDisk), Arc::clone(counts));
    Store::builder(dir.join("store"), dir.join("keyring"), AwsLc::new())
        .disk(Arc::new(disk))
        .options(options)
        .open_or_create()
        .unwrap()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

fn create(store: &Store, number: u32, shard_count: u32) -> Duration {
    let name = format!("bench/l{number:05}").parse().unwrap();
    let began = Instant::now();
    store.create_logstore(&name, LogstoreSpec::default().shard_count(shard_count)).unwrap();
    began.elapsed()
}

fn creating() {
    let dir = tempfile::tempdir_in(".").unwrap();
    let counts = Arc::<Counts>::default();
    let store = store(dir.path(), &counts);
    let mut early = Vec::new();
    let mut late = Vec::new();
    let (mut early_counts, mut late_counts) = ((0, 0), (0, 0));
    for number in 0..10_000 {
        counts.take();
        let took = create(&store, number, 1);
        if (5..15).contains(&number) {
            early.push(took);
            early_counts = counts.take();
        } else if number >= 9_990 {
            late.push(took);
            late_counts = counts.take();
        }
    }
    let (early, late) = (median(early), median(late));
    println!(
        "creating a Logstore     the 10th: {early:?}, {} bytes, {} syncs",
        early_counts.0, early_counts.1
    );
    println!(
        "                    the 10,000th: {late:?}, {} bytes, {} syncs",
        late_counts.0, late_counts.1
    );
    println!(
        "                    time of the 10,000th / the 10th: {:.2}",
        late.as_secs_f64() / early.as_secs_f64()
    );
    let began = Instant::now();
    store.close().unwrap();
    println!("closing a store of 10,000 Logstores: {:?}", began.elapsed());
}

/// The cost of a roll of one shard, in a store with this many shards.
fn roll(shards: u32) -> (u64, u64) {
    let dir = tempfile::tempdir_in(".").unwrap();
    let counts = Arc::<Counts>::default();
    let store = store(dir.path(), &counts);
    let per_logstore = shards.min(200);
    (0..shards / per_logstore).for_each(|number| {
        create(&store, number, per_logstore);
    });
    let logstore = store.logstore(&"bench/l00000".parse().unwrap()).unwrap();
    let append = || {
        let options = AppendOptions::default().shard(ShardChoice::Shard(0));
        logstore.append(Payload::opaque("a record").unwrap(), &options).unwrap();
    };
    append();
    counts.take();
    logstore.roll().unwrap();
    let rolled = counts.take();
    append();
    store.close().unwrap();
    rolled
}

fn main() {
    creating();
    let (alone, beside) = (roll(1), roll(4_000));
    println!("a roll in a store of 1 shard: {} bytes, {} syncs", alone.0, alone.1);
    println!("       in a store of 4,000 shards: {} bytes, {} syncs", beside.0, beside.1);
    println!("       bytes beside 4,000 / alone: {:.2}", beside.0 as f64 / alone.0 as f64);
}
