//! Payload hashes, computed in parallel with the writing of blocks.
//!
//! The digest of a segment covers each payload. A helper hashes the payload of a written block
//! while the writer makes the next one.

use std::sync::Arc;

use super::helpers::{Deferred, Helpers, Scratch};
use crate::{
    crypto::{HashAlg, hash},
    segment::SealBuffer,
};

/// A payload shorter than this, in bytes, is hashed at once: waking a thread takes longer.
const BESIDE_BYTES_MIN: usize = 16 << 10;

/// The hash of a payload, which may not be computed yet.
pub(crate) struct PayloadHash(Arc<Deferred<Block, [u8; 32]>>);

/// A completed block whose payload is to be hashed.
struct Block {
    algorithm: HashAlg,
    buffer: SealBuffer,
    helpers: Arc<Helpers>,
}

impl Block {
    /// Hashes the payload. The buffer is free for another block.
    fn hash(self, _: &mut Scratch) -> [u8; 32] {
        let hashed = hash(self.algorithm, &[self.buffer.stored_payload()]);
        self.helpers.give_back(self.buffer);
        hashed
    }
}

impl PayloadHash {
    /// Hashes the payload of a completed block.
    pub(super) fn of(helpers: &Arc<Helpers>, algorithm: HashAlg, buffer: SealBuffer) -> Self {
        if !helpers.hashes() {
            helpers.give_back(buffer);
            return Self(Deferred::known([0; 32], Block::hash));
        }
        let long = buffer.stored_payload().len() >= BESIDE_BYTES_MIN;
        let block = Block { algorithm, buffer, helpers: Arc::clone(helpers) };
        let pending = Deferred::new(block, Block::hash);
        if !(long && helpers.push(&pending)) {
            pending.run(&mut Scratch::default());
        }
        Self(pending)
    }

    /// The hash. Hashes the payload if no thread has begun to, and waits for a thread that has.
    pub(crate) fn settle(self) -> [u8; 32] {
        self.0.settle(&mut Scratch::default())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::segment::{BlockHeader, BlockKind, Compression};

    const HEADER_HASH: [u8; 32] = [7; 32];

    /// A completed block.
    fn block(payload: &[u8]) -> SealBuffer {
        let mut buffer = SealBuffer::default();
        buffer.begin().extend_from_slice(payload);
        let len = payload.len() as u32;
        let header = BlockHeader {
            kind: BlockKind::Opaque,
            compression: Compression::None,
            segment_tag: [7; 8],
            number: 0,
            payload_len: len,
            raw_len: len,
            group_count: 1,
            log_count: 0,
            list_len: len - 4,
            first_seq: 0,
            first_time_us: 0,
            last_time_us: 0,
            durable_mark: 0,
            nonce_random: [0; 8],
        };
        buffer.with_header(&HEADER_HASH, &header);
        buffer.finish(&[9; 16]);
        buffer
    }

    /// Payloads shorter and longer than the length from which the thread hashes them.
    fn payloads() -> Vec<Vec<u8>> {
        (0..40_u8)
            .map(|n| vec![n; if n % 3 == 0 { 100 } else { BESIDE_BYTES_MIN + usize::from(n) }])
            .collect()
    }

    #[track_caller]
    fn check(pending: PayloadHash, algorithm: HashAlg, payload: &[u8]) {
        assert_eq!(pending.settle(), hash(algorithm, &[payload]));
    }

    #[test]
    fn each_payload_gets_its_hash() {
        for threads in [false, true] {
            let helpers = Helpers::new(true);
            if threads {
                helpers.spawn().unwrap();
            }
            for algorithm in [HashAlg::Sha256, HashAlg::Sm3] {
                // One behind, as a writer does it; then all at once, which is more than may wait.
                let mut before = None;
                for payload in payloads() {
                    let pending = PayloadHash::of(&helpers, algorithm, block(&payload));
                    if let Some((pending, payload)) = before.replace((pending, payload)) {
                        check(pending, algorithm, &payload);
                    }
                }
                let pending: Vec<_> = payloads()
                    .into_iter()
                    .map(|payload| (PayloadHash::of(&helpers, algorithm, block(&payload)), payload))
                    .collect();
                for (pending, payload) in pending.into_iter().rev() {
                    check(pending, algorithm, &payload);
                }
            }
            helpers.stop();
        }
    }

    #[test]
    fn many_writers_share_the_helpers() {
        let helpers = Helpers::new(true);
        helpers.spawn().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for payload in payloads() {
                        let pending = PayloadHash::of(&helpers, HashAlg::Sha256, block(&payload));
                        check(pending, HashAlg::Sha256, &payload);
                    }
                });
            }
        });
        helpers.stop();
    }
}
