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

#[cfg(test)]
mod tests {
    use super::*;

    fn roots(versions: u32) -> Roots {
        let root = |version| (version, SecretKey::from_bytes(&mut [version as u8; 32]));
        Roots::new((1..=versions).map(root).collect())
    }

    fn first(roots: &Roots) -> Option<u8> {
        roots.with(1, |root| root.expose()[0]).ok().flatten()
    }

    #[test]
    fn a_wipe_refuses_every_use_with_its_error() {
        let roots = roots(2);
        assert_eq!((first(&roots), roots.losses()), (Some(1), 0));
        assert!(roots.with(3, |_| ()).is_ok_and(|found| found.is_none()));
        roots.refuse_with(Error::Closed("not wiped"));
        assert!(roots.wiped().is_none());
        roots.wipe(Error::Closed("it"));
        assert!(matches!(roots.with(1, |_| ()), Err(Error::Closed("it"))));
        assert!(matches!(roots.with_all(BTreeMap::len), Err(Error::Closed("it"))));
        let root = SecretKey::from_bytes(&mut [3; 32]);
        assert!(matches!(roots.add(3, root), Err(Error::Closed("it"))));
        assert!(read(&roots.state).roots.is_empty());
        roots.refuse_with(Error::Closed("another"));
        assert!(matches!(roots.wiped(), Some(Error::Closed("another"))));
    }

    /// Roots that were read from the file before a wipe do not come in after it.
    #[test]
    fn roots_come_back_unless_they_were_wiped_meanwhile() {
        let [held, fresh, late] = [roots(1), roots(2), roots(2)];
        held.wipe(Error::Closed("it"));
        let losses = held.losses();
        held.refill(&fresh, losses).unwrap();
        assert_eq!((first(&held), read(&held.state).roots.len()), (Some(1), 2));
        held.wipe(Error::Closed("again"));
        let refused = held.refill(&late, losses);
        assert!(matches!(refused, Err(Error::Closed("again"))), "{refused:?}");
        assert_eq!(first(&held), None);
        // And none is left in the copy.
        assert!(read(&late.state).roots.is_empty());
    }

    #[test]
    fn debug_shows_no_key() {
        assert_eq!(format!("{:?}", roots(1)), "Roots { losses: 0, .. }");
    }
}
