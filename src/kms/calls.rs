//! The calls to one KMS that have not returned, by master key.
//!
//! A call that was given up keeps its thread until the backend returns. So keys whose KMS hangs
//! would use up the threads of the others. They therefore share a part of them: a key is *hung* if
//! its last call was given up, and only some calls may be made under hung keys at once.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
};

use super::{Cmk, KmsError};
use crate::sync::{LockRank, Mutex, lock};

/// The most calls to one KMS at once, those included that were given up and have not returned.
const CALLS_MAX: usize = 1024;
/// The most calls under hung keys at once, without those that were given up. At one call per key
/// and period, and a time limit of a thirtieth of a period, this serves 3,840 hung keys.
const HUNG_CALLS_MAX: usize = 128;
/// How many calls to one KMS may be given up and not have returned when another one is made under a
/// hung key.
const LATE_CALLS_MAX: usize = 512;
/// The same for the calls under one key.
const LATE_CALLS_OF_A_KEY_MAX: usize = 4;

/// Too many calls have not returned, so no other one is made. The KMS was not asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Busy(pub(super) String);

impl From<Busy> for KmsError {
    fn from(Busy(detail): Busy) -> Self {
        Self::Unreachable { detail }
    }
}

/// The calls to one KMS.
#[derive(Debug)]
pub(super) struct Calls(Mutex<Table>);

impl Default for Calls {
    fn default() -> Self {
        Self(Mutex::new(LockRank::KmsCalls, Table::default()))
    }
}

#[derive(Debug, Default)]
struct Table {
    all: usize,
    /// Calls that were given up and have not returned.
    late: usize,
    /// Calls under keys that were hung when the call began, without the late ones.
    under_hung: usize,
    keys: HashMap<Cmk, OfKey>,
}

#[derive(Debug, Default)]
struct OfKey {
    all: usize,
    late: usize,
    hung: bool,
}

impl Calls {
    /// Notes a call that begins.
    ///
    /// # Errors
    /// [`Busy`].
    pub(super) fn begin(this: &Arc<Self>, cmk: &Cmk) -> Result<Slot, Busy> {
        let mut table = lock(&this.0);
        let (late, hung) = table.keys.get(cmk).map_or((0, false), |key| (key.late, key.hung));
        let busy = |why: String| Err(Busy(why));
        if late >= LATE_CALLS_OF_A_KEY_MAX {
            return busy(format!("{late} calls under this key have not returned"));
        }
        if hung && table.under_hung >= HUNG_CALLS_MAX {
            return busy(format!("{HUNG_CALLS_MAX} calls under keys without an answer are made"));
        }
        if table.all >= CALLS_MAX || (hung && table.late >= LATE_CALLS_MAX) {
            return busy(format!("{} calls have not returned", table.all));
        }
        table.all += 1;
        table.under_hung += usize::from(hung);
        table.keys.entry(cmk.clone()).or_default().all += 1;
        let (calls, cmk) = (Arc::clone(this), cmk.clone());
        Ok(Slot { calls, cmk, hung, phase: AtomicU8::new(IN_TIME) })
    }
}

/// The call may still be answered in time.
const IN_TIME: u8 = 0;
/// The call was given up before its answer came.
const LATE: u8 = 1;
/// The backend has returned.
const RETURNED: u8 = 2;

/// The place of one call in the table.
#[derive(Debug)]
pub(super) struct Slot {
    calls: Arc<Calls>,
    cmk: Cmk,
    /// Whether the key was hung when the call began.
    hung: bool,
    phase: AtomicU8,
}

impl Slot {
    /// Notes that the backend has returned. `false` if the call was given up before.
    pub(super) fn answer(&self) -> bool {
        self.leave() == IN_TIME
    }

    /// Notes that the call is given up. `false` if the backend has returned.
    pub(super) fn give_up(&self) -> bool {
        let mut table = lock(&self.calls.0);
        if self.phase.load(Ordering::Relaxed) != IN_TIME {
            return false;
        }
        self.phase.store(LATE, Ordering::Relaxed);
        table.late += 1;
        table.under_hung -= usize::from(self.hung);
        if let Some(key) = table.keys.get_mut(&self.cmk) {
            key.late += 1;
            key.hung = true;
        }
        true
    }

    /// Takes the call out of the table, once. Returns its phase before.
    fn leave(&self) -> u8 {
        let mut table = lock(&self.calls.0);
        let was = self.phase.swap(RETURNED, Ordering::Relaxed);
        if was == RETURNED {
            return was;
        }
        let late = usize::from(was == LATE);
        table.all -= 1;
        table.late -= late;
        table.under_hung -= usize::from(self.hung && was == IN_TIME);
        if let Some(key) = table.keys.get_mut(&self.cmk) {
            key.all -= 1;
            key.late -= late;
            key.hung &= was == LATE;
            if key.all == 0 && !key.hung {
                table.keys.remove(&self.cmk);
            }
        }
        was
    }
}

impl Drop for Slot {
    /// The call was never made, for want of a thread.
    fn drop(&mut self) {
        self.leave();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn cmk(key: usize) -> Cmk {
        let cmk_key_id = format!("key-{key}");
        Cmk { cmk_key_id, arn: "role".to_owned(), region_id: "region".to_owned() }
    }

    fn counts(calls: &Calls) -> (usize, usize, usize, usize) {
        let table = lock(&calls.0);
        (table.all, table.late, table.under_hung, table.keys.len())
    }

    /// A call that is given up, so that its key is hung.
    fn late(calls: &Arc<Calls>, key: usize) -> Slot {
        let slot = Calls::begin(calls, &cmk(key)).unwrap();
        assert!(slot.give_up() && !slot.give_up());
        slot
    }

    #[test]
    fn a_key_is_hung_until_a_call_under_it_is_answered_in_time() {
        let calls = Arc::default();
        let first = late(&calls, 0);
        assert_eq!(counts(&calls), (1, 1, 0, 1));
        assert!(!first.answer(), "after its time limit");
        assert_eq!(counts(&calls), (0, 0, 0, 1));
        let second = Calls::begin(&calls, &cmk(0)).unwrap();
        assert_eq!(counts(&calls), (1, 0, 1, 1));
        assert!(second.answer() && !second.give_up());
        drop(second);
        assert_eq!(counts(&calls), (0, 0, 0, 0));
        drop(Calls::begin(&calls, &cmk(0)).unwrap());
        assert_eq!(counts(&calls), (0, 0, 0, 0), "a call that was never made");
    }

    #[test]
    fn one_hung_key_keeps_only_so_many_threads() {
        let calls = Arc::default();
        let mut slots: Vec<_> = (0..LATE_CALLS_OF_A_KEY_MAX).map(|_| late(&calls, 0)).collect();
        assert!(Calls::begin(&calls, &cmk(0)).is_err());
        assert!(Calls::begin(&calls, &cmk(1)).is_ok(), "another key");
        slots.pop();
        assert!(Calls::begin(&calls, &cmk(0)).is_ok());
    }

    #[test]
    fn hung_keys_share_a_part_of_the_threads() {
        let calls = Arc::default();
        let keys = LATE_CALLS_MAX + HUNG_CALLS_MAX;
        let returned: Vec<_> = (0..keys).map(|key| late(&calls, key)).collect();
        drop(returned);
        let begin = |key| Calls::begin(&calls, &cmk(key));
        let active: Vec<_> = (0..HUNG_CALLS_MAX).map(|key| begin(key).unwrap()).collect();
        assert!(begin(HUNG_CALLS_MAX).is_err());
        let healthy: Vec<_> = (keys..keys + 100).map(|key| begin(key).unwrap()).collect();
        // Once they are late, others may be called, up to a limit of its own.
        active.iter().for_each(|slot| assert!(slot.give_up()));
        let more: Vec<_> = (HUNG_CALLS_MAX..LATE_CALLS_MAX)
            .map(|key| begin(key).inspect(|slot| assert!(slot.give_up())).unwrap())
            .collect();
        assert!(begin(keys - 1).is_err());
        assert!(begin(keys + 100).is_ok());
        drop((active, more, healthy));
        assert!(begin(keys - 1).is_ok());
        // And there is an end to the threads.
        let all: Vec<_> = (0..CALLS_MAX).map(|key| begin(2 * keys + key).unwrap()).collect();
        assert!(begin(0).is_err() && begin(4 * keys).is_err());
        drop(all);
        assert!(begin(0).is_ok());
    }
}
