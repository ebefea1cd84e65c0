//! The segment that this process writes, as its readers see it.

use std::sync::Arc;

use super::{hashing::PayloadHash, record::Head};
use crate::{
    io::DiskFile,
    segment::{BlockHeader, DecodedHeader, Footer, FooterBuilder},
    sync::{LockRank, Mutex, lock},
};

/// How far the active segment has been written. The writer adds blocks, readers look.
#[derive(Debug)]
pub(crate) struct ActiveView {
    pub(crate) file: Arc<dyn DiskFile>,
    pub(crate) header: Arc<DecodedHeader>,
    progress: Mutex<Progress>,
}

impl ActiveView {
    pub(super) fn new(file: Arc<dyn DiskFile>, header: Arc<DecodedHeader>) -> Arc<Self> {
        let (builder, visible) = (FooterBuilder::of(&header), header.body_start);
        Arc::new(Self {
            file,
            header,
            progress: Mutex::new(
                LockRank::ActiveView,
                Progress { visible, builder, pending: None },
            ),
        })
    }

    /// Adds a block that has been written and ends at `end`.
    pub(super) fn add(
        &self,
        offset: u64,
        header: &BlockHeader,
        payload_hash: PayloadHash,
        tag: &[u8; 16],
        end: u64,
    ) {
        let mut progress = lock(&self.progress);
        progress.settle();
        progress.builder.count(offset, header);
        progress.pending = Some(PendingBlock { header: *header, payload_hash, tag: *tag });
        progress.visible = end;
    }

    /// How far the file may be read.
    pub(crate) fn visible(&self) -> u64 {
        lock(&self.progress).visible
    }

    /// The totals and the digest of all blocks so far. May wait for a payload hash.
    pub(super) fn builder(&self) -> FooterBuilder {
        lock(&self.progress).settle().clone()
    }

    /// Looks at the totals of all blocks so far. Their digest may lack the last block.
    pub(crate) fn with_counts<R>(&self, look: impl FnOnce(&Footer) -> R) -> R {
        look(lock(&self.progress).builder.so_far())
    }

    /// The head of the shard, if the segment ended behind its last block. May wait for a payload
    /// hash.
    pub(crate) fn head(&self) -> Head {
        let mut progress = lock(&self.progress);
        let visible = progress.visible;
        Head::open(&self.header, progress.settle(), visible)
    }
}

struct Progress {
    visible: u64,
    /// Counts all blocks. Its digest lacks the last one while that block is pending.
    builder: FooterBuilder,
    pending: Option<PendingBlock>,
}

/// A block that the digest does not cover yet.
struct PendingBlock {
    header: BlockHeader,
    payload_hash: PayloadHash,
    tag: [u8; 16],
}

impl Progress {
    /// Adds the last block to the digest.
    fn settle(&mut self) -> &FooterBuilder {
        if let Some(PendingBlock { header, payload_hash, tag }) = self.pending.take() {
            self.builder.add_to_digest(&header, &payload_hash.settle(), &tag);
        }
        &self.builder
    }
}

impl std::fmt::Debug for Progress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Progress").field("visible", &self.visible).finish_non_exhaustive()
    }
}
