//! The parts of an open store.

use std::sync::Arc;

use super::{env::StoreEnv, keys::KeyService, registry::Registry};

/// The context, the keys and the Logstores of an open store. Each operation is a function that
/// takes a `Core`.
#[derive(Clone)]
pub(crate) struct Core {
    pub(crate) env: Arc<StoreEnv>,
    pub(crate) keys: Arc<KeyService>,
    pub(crate) registry: Arc<Registry>,
}
