//! The service's own credentials at a cloud: kept between calls, and fetched again when they are
//! refused.

use std::sync::Arc;

use super::deadline::Deadline;
use crate::sync::{LockRank, Mutex, lock};

/// Credentials of the service's own.
pub(super) trait Login {
    /// The id of the access key. Credentials with the same id are the same.
    fn id(&self) -> &str;

    /// Whether it is too early to look for newer ones.
    fn is_fresh(&self) -> bool;
}

/// Credentials that a source has given.
pub(super) enum Fetched<L> {
    /// The next calls use them too.
    Keep(L),
    /// The source is asked at each call, because it gives others at any time.
    Once(L),
}

/// The credentials of one call.
pub(super) struct Own<L> {
    pub(super) login: Arc<L>,
    /// Whether this call has asked the source already.
    asked: bool,
}

impl<L> Own<L> {
    /// Credentials that the source has given to this call.
    pub(super) fn new(login: Arc<L>) -> Self {
        Self { login, asked: true }
    }
}

/// The place of the kept credentials. No caller waits for another.
pub(super) struct Kept<L>(Mutex<Option<Arc<L>>>);

impl<L> Default for Kept<L> {
    fn default() -> Self {
        Self(Mutex::new(LockRank::KmsCredentials, None))
    }
}

impl<L: Login> Kept<L> {
    /// The credentials for a call: the kept ones if they are fresh, or else new ones. If the source
    /// gives no new ones, the kept ones are tried. The server decides whether they are valid: the
    /// local clock may be wrong.
    ///
    /// # Errors
    /// The error of `fetch` without any credentials.
    pub(super) fn get<E>(
        &self,
        deadline: Deadline,
        fetch: impl FnOnce(Deadline) -> Result<Fetched<L>, E>,
    ) -> Result<Own<L>, E> {
        match self.kept() {
            Some(kept) if kept.is_fresh() => Ok(Own { login: kept, asked: false }),
            Some(kept) => Ok(Own::new(self.fetch(deadline.halfway(), fetch).unwrap_or(kept))),
            None => self.fetch(deadline, fetch).map(Own::new),
        }
    }

    /// Other credentials in place of refused ones. `None` if the call has asked the source already,
    /// or if the source gives no others. The source gets half of the time that is left, so that the
    /// refusal can still be reported in time.
    pub(super) fn instead_of<E>(
        &self,
        refused: &Own<L>,
        deadline: Deadline,
        fetch: impl FnOnce(Deadline) -> Result<Fetched<L>, E>,
    ) -> Option<Arc<L>> {
        if refused.asked {
            return None;
        }
        let is_other = |login: &Arc<L>| login.id() != refused.login.id();
        // Another call may have fetched them in the meantime.
        let newer = match self.kept().filter(is_other) {
            Some(newer) => newer,
            None => self.fetch(deadline.halfway(), fetch).ok()?,
        };
        Some(newer).filter(is_other)
    }

    fn kept(&self) -> Option<Arc<L>> {
        lock(&self.0).clone()
    }

    fn fetch<E>(
        &self,
        deadline: Deadline,
        fetch: impl FnOnce(Deadline) -> Result<Fetched<L>, E>,
    ) -> Result<Arc<L>, E> {
        let (login, keep) = match fetch(deadline)? {
            Fetched::Keep(login) => (Arc::new(login), true),
            Fetched::Once(login) => (Arc::new(login), false),
        };
        *lock(&self.0) = keep.then(|| Arc::clone(&login));
        Ok(login)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{cell::Cell, time::Duration};

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq)]
    struct Key(&'static str, bool);

    impl Login for Key {
        fn id(&self) -> &str {
            self.0
        }

        fn is_fresh(&self) -> bool {
            self.1
        }
    }

    const FRESH: Key = Key("fresh", true);
    const STALE: Key = Key("stale", false);

    fn deadline() -> Deadline {
        Deadline::after(Duration::from_secs(100))
    }

    /// Kept credentials and their source, which counts the requests.
    struct World {
        kept: Kept<Key>,
        gives: Cell<Result<Key, ()>>,
        asked: Cell<u32>,
    }

    impl World {
        fn new(gives: Key) -> Self {
            Self { kept: Kept::default(), gives: Cell::new(Ok(gives)), asked: Cell::new(0) }
        }

        fn fetch(&self) -> Result<Fetched<Key>, ()> {
            self.asked.set(self.asked.get() + 1);
            self.gives.get().map(Fetched::Keep)
        }

        fn get(&self) -> Result<Own<Key>, ()> {
            self.kept.get(deadline(), |_| self.fetch())
        }

        fn instead_of(&self, refused: &Own<Key>) -> Option<Key> {
            self.kept.instead_of(refused, deadline(), |_| self.fetch()).map(|login| *login)
        }
    }

    #[test]
    fn fresh_ones_are_kept_and_stale_ones_are_a_last_resort() {
        let world = World::new(FRESH);
        for _ in 0..3 {
            assert_eq!(*world.get().unwrap().login, FRESH);
        }
        assert_eq!(world.asked.get(), 1);

        let world = World::new(STALE);
        world.gives.set(Err(()));
        assert!(world.get().is_err());
        world.gives.set(Ok(STALE));
        assert_eq!(*world.get().unwrap().login, STALE);
        world.gives.set(Err(()));
        let own = world.get().unwrap();
        assert_eq!((*own.login, world.asked.get()), (STALE, 3));
        // This call has asked already.
        assert_eq!((world.instead_of(&own), world.asked.get()), (None, 3));
        world.gives.set(Ok(FRESH));
        assert_eq!(*world.get().unwrap().login, FRESH);
    }

    #[test]
    fn refused_ones_are_replaced_once_by_others() {
        let world = World::new(FRESH);
        let new = world.get().unwrap();
        assert_eq!((world.instead_of(&new), world.asked.get()), (None, 1));

        let (first, second) = (world.get().unwrap(), world.get().unwrap());
        world.gives.set(Err(()));
        assert_eq!((world.instead_of(&first), world.asked.get()), (None, 2));
        world.gives.set(Ok(FRESH));
        assert_eq!((world.instead_of(&first), world.asked.get()), (None, 3), "the same ones");
        let other = Key("other", true);
        world.gives.set(Ok(other));
        assert_eq!((world.instead_of(&first), world.asked.get()), (Some(other), 4));
        // Another call finds what this one has fetched.
        assert_eq!((world.instead_of(&second), world.asked.get()), (Some(other), 4));
        assert_eq!((*world.get().unwrap().login, world.asked.get()), (other, 4));
    }

    #[test]
    fn ones_that_a_source_gives_at_each_call_are_not_kept() {
        let kept = Kept::default();
        let once = |key| move |_| Ok::<_, ()>(Fetched::Once(key));
        for key in [FRESH, STALE] {
            let own = kept.get(deadline(), once(key)).unwrap();
            assert_eq!(*own.login, key);
            assert!(kept.instead_of(&own, deadline(), once(FRESH)).is_none());
        }
    }

    #[test]
    fn a_source_gets_half_of_the_time_if_there_is_an_alternative() {
        let left = |deadline: Deadline| deadline.left().unwrap().as_secs();
        let kept = Kept::default();
        let fetch = |expected: std::ops::RangeInclusive<u64>| {
            move |deadline| {
                assert!(expected.contains(&left(deadline)), "{} s", left(deadline));
                Ok::<_, ()>(Fetched::Keep(STALE))
            }
        };
        kept.get(deadline(), fetch(90..=100)).unwrap();
        kept.get(deadline(), fetch(40..=50)).unwrap();
        let own = Own { login: Arc::new(STALE), asked: false };
        assert!(kept.instead_of(&own, deadline(), fetch(40..=50)).is_none());
    }
}
