//! The parts of an open store.

use std::sync::Arc;

use super::{
    catalogue, env::StoreEnv, keys::KeyService, registry::Registry, reserve::ReserveStatus,
};

/// The context, the keys and the Logstores of an open store. Each operation is a function that
/// takes a `Core`.
#[derive(Clone)]
pub(crate) struct Core {
    pub(crate) env: Arc<StoreEnv>,
    pub(crate) keys: Arc<KeyService>,
    pub(crate) registry: Arc<Registry>,
}

impl Core {
    /// Makes the missing part of the reserve, if there is space for it.
    pub(crate) fn tend_reserve(&self) {
        self.env.reserve.tend(&catalogue::dir(&self.env.dir));
    }

    /// The state of the reserve.
    pub(crate) fn reserve_status(&self) -> ReserveStatus {
        let dir = catalogue::dir(&self.env.dir);
        // The writer of the store has the reserve of a store that is open for reading.
        self.env.reserve.status(self.env.read_only.then_some(&*dir))
    }
}
