//! Measures the cost of payload hashes for appends: each suite with the hashes and without them.

use envelog::{Durability, StoreOptions, inspect::Compression};

use super::{Appending, Bench, GROUP_BYTES, ROUNDS, RUN_BYTES_MAX, Row, Suite, rated};
use crate::{exit::Result, output::Progress};

const HASHED: &str = "append";
const UNHASHED: &str = "append_unhashed";

impl Bench {
    /// Buffered appends of one caller, whose only limit is the writer. The two stores take turns in
    /// every round.
    pub(super) fn payload_hash(&self) -> Result<Vec<Row>> {
        let stores = [
            self.store(HASHED)?,
            self.builder(UNHASHED)
                .options(StoreOptions::default().without_payload_hashes_for_benchmarks())
                .create()?,
        ];
        let progress = Progress::steps(2 * Suite::ALL.len() as u64);
        let mut rows = Vec::new();
        for compression in [Compression::Lz4, Compression::None] {
            for suite in Suite::ALL {
                progress.say("append");
                let how = Appending { compression, durability: Durability::Buffered, callers: 1 };
                // Every run appends as many bytes as the one without hashes manages within its time
                // limit, or fewer if its own time limit ends first.
                let bytes = self
                    .append_run(&stores[1], suite, how, RUN_BYTES_MAX)?
                    .bytes
                    .max(GROUP_BYTES as u64);
                self.append_run(&stores[0], suite, how, bytes)?;
                let mut rates = [Vec::new(), Vec::new()];
                for round in 0..ROUNDS {
                    for turn in 0..stores.len() {
                        let index = (round + turn) % stores.len();
                        rates[index]
                            .push(self.append_run(&stores[index], suite, how, bytes)?.mb_per_s());
                    }
                }
                for (what, rates_of_it) in [HASHED, UNHASHED].into_iter().zip(&rates) {
                    let compression = compression.name();
                    let row =
                        Row { compression, durability: Some("buffered"), ..Row::new(what, suite) };
                    rows.push(rated(row, rates_of_it, Some(&rates[1])));
                }
                progress.add(1);
            }
        }
        for (store, name) in stores.into_iter().zip([HASHED, UNHASHED]) {
            store.close()?;
            self.clear(name)?;
        }
        Ok(rows)
    }
}
