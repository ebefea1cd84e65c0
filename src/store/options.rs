//! The settings of a store.

use std::time::Duration;

use crate::{
    Error, Result,
    keys::audit::FILE_BYTES_LIMIT,
    segment::{BLOCK_LIST_BYTES_MAX, SEGMENT_BYTES_MAX},
};

/// The threads that do the background work: flushing partial batches, writing mark blocks, rolling
/// by age, retention, lease renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Background {
    /// Threads of the store.
    #[default]
    Threads,
    /// A thread of the embedder, which calls [`Store::tick`](crate::Store::tick). For simulations
    /// and tests.
    Manual,
}

/// The settings of a store. They are not stored: each opening passes its own.
///
/// ```
/// use std::time::Duration;
/// use envelog::StoreOptions;
/// let options = StoreOptions::default().revalidate_every(Duration::from_secs(10)).workers(4);
/// # assert!(options.check().is_ok());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreOptions {
    /// The interval at which the engine asks the KMS whether a master key may still be used. 30 s
    /// by default; 100 ms to 1 h. After a reachable KMS begins to refuse a key, no operation
    /// succeeds that starts later than this plus [`StoreOptions::kms_timeout`]. As soon as the
    /// engine knows of the refusal, it wipes the data keys, the reading keys and the read-ahead of
    /// all Logstores under the key, without I/O in between: within 50 ms for 1,000 Logstores. The
    /// keys of segments that are being written follow within `kms_timeout`, during which
    /// acknowledged groups are sealed.
    pub revalidate_every: Duration,
    /// How long a key may be used after the last successful call was sent, while the KMS does not
    /// answer. 5 min by default; at least `revalidate_every`, at most 24 h.
    pub outage_grace: Duration,
    /// As `outage_grace`, for the master key that the service keyring is under: after this time the
    /// store refuses all operations that need a key, until the KMS answers. Zero: an outage never
    /// has this effect, and a refusal of the KMS still has it. 1 h by default; zero, or
    /// `revalidate_every` to 168 h.
    pub service_outage_grace: Duration,
    /// The time limit of one call to the KMS. 1 s by default; 10 ms to 1 min.
    pub kms_timeout: Duration,
    /// The threads that do the background work.
    pub background: Background,
    /// The number of worker threads, which run the background jobs: flushes, mark blocks, rolls,
    /// heads and retention. 2 by default; 1 to 64.
    pub workers: usize,
    /// The most bytes of groups in one block. A queue with this many bytes is written at once, even
    /// if no caller waits. 256 KiB by default; 4 KiB to 32 MiB. A larger group gets a block of its
    /// own.
    pub block_bytes: usize,
    /// The time after which a partial batch is written if no caller waits for it. 100 ms by
    /// default; at most 10 s.
    pub linger: Duration,
    /// The size on disk at which a segment is sealed and the next one begun, in bytes. 64 MiB by
    /// default; 4 KiB to 3 GiB.
    pub segment_bytes: u64,
    /// The age at which a segment is sealed and the next one begun. 6 h by default; at least 1 s.
    pub segment_age: Duration,
    /// The memory for groups that wait to be written, in the whole store, in bytes. Appends wait
    /// while it is full, except that each shard may have one group beyond it: a Logstore whose KMS
    /// hangs must not stop the others. 64 MiB by default; at least 1 MiB.
    pub pending_bytes_max: usize,
    /// The number of readers that may be open at once. 1,024 by default; at least 1.
    pub readers_max: usize,
    /// The number of followers ([`Logstore::follow`](crate::Logstore::follow)) that may be open at
    /// once. 16,384 by default; at least 1.
    pub followers_max: usize,
    /// The size at which a new file of the key audit log is begun, in bytes. 4 MiB by default;
    /// 4 KiB to 64 MiB.
    pub audit_file_bytes: u64,
    /// The interval at which retention is applied. The catalogue remembers the last run, so a
    /// process that is open for a shorter time applies it too. 60 s by default; at least 1 s.
    pub retention_every: Duration,
    /// How far the wall clock must advance before retention by age trusts it again after a jump: it
    /// was more than 24 h ahead of the newest time that the store trusts. 1 h by default; at least
    /// 1 s. [`RetainOptions::trust_clock`](crate::admin::RetainOptions::trust_clock) does not wait.
    pub clock_settle: Duration,
    /// The interval at which the catalogue records the end of the synced part of each open
    /// segment. An attacker without a key can cut off unnoticed only data that was synced since.
    /// 10 s by default; 100 ms to 1 h.
    pub head_every: Duration,
    /// How long the anchor may be behind before appends fail with [`Error::AnchorBehind`]. `None`
    /// by default: an anchor that fails stops nothing. At least 1 s.
    pub anchor_required: Option<Duration>,
    /// Whether a shard that a full disk has stopped writes again by itself once there is room. Its
    /// end is then recovered as after a crash. If acknowledged groups were not synced, the next
    /// append, [`Logstore::sync`](crate::Logstore::sync) or close fails with the failure, once. The
    /// store tries this after 1 s, and after up to 64 s each time that the disk is still full. On by
    /// default. Otherwise the caller calls
    /// [`Logstore::reopen_shard`](crate::Logstore::reopen_shard).
    pub reopen_full_shards: bool,
    /// Whether the group may read the files and directories that the store creates: modes 0640 and
    /// 0750 in place of 0600 and 0700. Off by default. Existing files keep their mode.
    pub group_read: bool,
    /// Whether the group may read the service keyring: a keyring that it can read is accepted, and
    /// a new one gets mode 0640. Off by default.
    pub keyring_group_read: bool,
    /// Whether the store may be written on a network file system. Off by default: two writers on
    /// two machines lose acknowledged data, unless the file system keeps `flock` locks across
    /// machines and its caches coherent. Detected by `statfs(2)`, on Linux only. File systems
    /// behind FUSE are not detected.
    pub allow_network_fs: bool,
    pub(super) hash_payloads: bool,
}

impl Default for StoreOptions {
    fn default() -> Self {
        Self {
            revalidate_every: Duration::from_secs(30),
            outage_grace: Duration::from_secs(300),
            service_outage_grace: Duration::from_secs(3600),
            kms_timeout: Duration::from_secs(1),
            background: Background::Threads,
            workers: 2,
            block_bytes: 256 << 10,
            linger: Duration::from_millis(100),
            segment_bytes: 64 << 20,
            segment_age: Duration::from_secs(6 * 3600),
            pending_bytes_max: 64 << 20,
            readers_max: 1024,
            followers_max: 16_384,
            audit_file_bytes: 4 << 20,
            retention_every: Duration::from_secs(60),
            clock_settle: Duration::from_secs(3600),
            head_every: Duration::from_secs(10),
            anchor_required: None,
            reopen_full_shards: true,
            group_read: false,
            keyring_group_read: false,
            allow_network_fs: false,
            hash_payloads: true,
        }
    }
}

impl StoreOptions {
    setters! {
        revalidate_every: Duration;
        outage_grace: Duration;
        service_outage_grace: Duration;
        kms_timeout: Duration;
        background: Background;
        workers: usize;
        block_bytes: usize;
        linger: Duration;
        segment_bytes: u64;
        segment_age: Duration;
        pending_bytes_max: usize;
        readers_max: usize;
        followers_max: usize;
        audit_file_bytes: u64;
        retention_every: Duration;
        clock_settle: Duration;
        head_every: Duration;
        anchor_required: Duration, optional;
        reopen_full_shards: bool;
        group_read: bool;
        keyring_group_read: bool;
        allow_network_fs: bool;
    }

    /// Leaves the hashes of the payloads out of the digests of segments. Verification reports such
    /// a store as corrupt. A benchmark uses this to measure the cost of the hashes, and then
    /// deletes the store.
    #[doc(hidden)]
    #[must_use]
    pub fn without_payload_hashes_for_benchmarks(self) -> Self {
        Self { hash_payloads: false, ..self }
    }

    /// Checks that each setting is in its range. The builder does so too, when it creates or opens
    /// a store.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`], which names the first setting that is not.
    pub fn check(&self) -> Result<()> {
        let hour = Duration::from_secs(3600);
        let (ms, s) = (Duration::from_millis, Duration::from_secs);
        let ranges = [
            ("revalidate_every (100 ms to 1 h)", (ms(100)..=hour).contains(&self.revalidate_every)),
            (
                "outage_grace (revalidate_every to 24 h)",
                (self.revalidate_every..=24 * hour).contains(&self.outage_grace),
            ),
            (
                "service_outage_grace (zero, or revalidate_every to 168 h)",
                self.service_outage_grace.is_zero()
                    || (self.revalidate_every..=7 * 24 * hour).contains(&self.service_outage_grace),
            ),
            ("kms_timeout (10 ms to 1 min)", (ms(10)..=s(60)).contains(&self.kms_timeout)),
            ("workers (1 to 64)", (1..=64).contains(&self.workers)),
            (
                "block_bytes (4 KiB to 32 MiB)",
                (4 << 10..=BLOCK_LIST_BYTES_MAX as usize).contains(&self.block_bytes),
            ),
            ("linger (at most 10 s)", self.linger <= s(10)),
            (
                "segment_bytes (4 KiB to 3 GiB)",
                (4 << 10..=SEGMENT_BYTES_MAX / 4 * 3).contains(&self.segment_bytes),
            ),
            ("segment_age (at least 1 s)", self.segment_age >= s(1)),
            ("pending_bytes_max (at least 1 MiB)", self.pending_bytes_max >= 1 << 20),
            ("readers_max (at least 1)", self.readers_max >= 1),
            ("followers_max (at least 1)", self.followers_max >= 1),
            (
                "audit_file_bytes (4 KiB to 64 MiB)",
                (4 << 10..=FILE_BYTES_LIMIT).contains(&self.audit_file_bytes),
            ),
            ("retention_every (at least 1 s)", self.retention_every >= s(1)),
            ("clock_settle (at least 1 s)", self.clock_settle >= s(1)),
            (
                "anchor_required (at least 1 s)",
                self.anchor_required.is_none_or(|limit| limit >= s(1)),
            ),
            ("head_every (100 ms to 1 h)", (ms(100)..=s(3600)).contains(&self.head_every)),
        ];
        match ranges.iter().find(|(_, within)| !within) {
            Some((what, _)) => Err(Error::InvalidArgument(format!("{what} is out of its range"))),
            None => Ok(()),
        }
    }
}
