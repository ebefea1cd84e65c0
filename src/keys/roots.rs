//! The root keys of a service keyring in memory.
//!
//! All copies of a keyring share them, so that one wipe is for every copy: an operation that
//! changes or verifies the keyring may have a copy for as long as a disk hangs. A thread holds the
//! lock of the roots while it derives a key, and for no I/O and no KMS call.

use std::{collections::BTreeMap, fmt};

use crate::{
    Error, Result,
    crypto::SecretKey,
    sync::{
        LockRank, RwLock,
        atomic::{AtomicU64, Ordering},
        read, write,
    },
};

/// The root keys, by version, unless they are wiped.
pub(super) struct Roots {
    state: RwLock<State>,
    /// Counts the wipes.
    losses: AtomicU64,
}

struct State {
    roots: BTreeMap<u32, SecretKey>,
    /// Set while the roots are wiped: the error of an operation that needs one.
    wiped: Option<Error>,
}

impl Roots {
    pub(super) fn new(roots: BTreeMap<u32, SecretKey>) -> Self {
        let state = State { roots, wiped: None };
        Self { state: RwLock::new(LockRank::KeyringRoots, state), losses: AtomicU64::new(0) }
    }

    /// Calls `use_it` with a root. `None` if there is no such version.
    ///
    /// # Errors
    /// The roots are wiped.
    pub(super) fn with<T>(
        &self,
        version: u32,
        use_it: impl FnOnce(&SecretKey) -> T,
    ) -> Result<Option<T>> {
        self.with_all(|roots| roots.get(&version).map(use_it))
    }

    /// Calls `use_them` with all roots.
    ///
    /// # Errors
    /// As [`Roots::with`].
    pub(super) fn with_all<T>(
        &self,
        use_them: impl FnOnce(&BTreeMap<u32, SecretKey>) -> T,
    ) -> Result<T> {
        let state = read(&self.state);
        match &state.wiped {
            Some(error) => Err(error.clone()),
            None => Ok(use_them(&state.roots)),
        }
    }

    /// Adds the root of a new version.
    ///
    /// # Errors
    /// As [`Roots::with`].
    pub(super) fn add(&self, version: u32, root: SecretKey) -> Result<()> {
        let mut state = write(&self.state);
        match &state.wiped {
            Some(error) => Err(error.clone()),
            None => {
                state.roots.insert(version, root);
                Ok(())
            }
        }
    }

    /// Removes the root of a version that did not come into force.
    pub(super) fn remove(&self, version: u32) {
        write(&self.state).roots.remove(&version);
    }

    /// Wipes the roots. From now on their use is refused with this error.
    pub(super) fn wipe(&self, error: Error) {
        let mut state = write(&self.state);
        state.roots.clear();
        state.wiped = Some(error);
        self.losses.fetch_add(1, Ordering::AcqRel);
    }

    /// Takes over the roots of a keyring that was read from its file, unless there was a wipe since
    /// the number of wipes was `losses`.
    ///
    /// # Errors
    /// There was a wipe.
    pub(super) fn refill(&self, from: &Self, losses: u64) -> Result<()> {
        let fresh = std::mem::take(&mut write(&from.state).roots);
        let mut state = write(&self.state);
        if self.losses() != losses {
            return Err(state.wiped.clone().unwrap_or(Error::Closed("the service keyring")));
        }
        state.roots = fresh;
        state.wiped = None;
        Ok(())
    }

    /// Replaces the error of an operation that needs a wiped root.
    pub(super) fn refuse_with(&self, error: Error) {
        if let Some(wiped) = &mut write(&self.state).wiped {
            *wiped = error;
        }
    }

    /// The error of an operation that needs a root, while the roots are wiped.
    pub(super) fn wiped(&self) -> Option<Error> {
        read(&self.state).wiped.clone()
    }

    /// How often the roots were wiped so far.
    pub(super) fn losses(&self) -> u64 {
        self.losses.load(Ordering::Acquire)
    }
}

impl fmt::Debug for Roots {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Roots").field("losses", &self.losses()).finish_non_exhaustive()
    }
}
