//! Memory for secrets. It is page-locked and kept out of core dumps if the system allows it, and
//! wiped when a secret is dropped.
//!
//! Keys live in slots of 64 bytes, cut from chunks of 16 KiB. A chunk is mapped once and never
//! unmapped, so the few pages that the system lets a process lock hold many keys. A free slot is
//! always zero.

use std::{
    fmt, io, mem,
    sync::{Mutex, MutexGuard, PoisonError},
};

use bytes::Bytes;
use zeroize::{Zeroize, ZeroizeOnDrop};

use crate::io::Random;

const CHUNK_BYTES: usize = 16 * 1024;
const CHUNK_SLOTS: usize = CHUNK_BYTES / mem::size_of::<Slot>();

/// A secret of 32 bytes. It is wiped on drop, and cannot be printed or cloned by accident.
///
/// On Linux, a forked child process finds zeros in its place.
pub struct SecretKey {
    /// Only `drop` takes it out.
    slot: Option<&'static mut Slot>,
}

impl SecretKey {
    /// Moves a secret into locked memory: copies it and wipes the source.
    #[must_use]
    pub fn from_bytes(source: &mut [u8; 32]) -> Self {
        let mut key = Self::zeroed();
        key.expose_mut().copy_from_slice(source);
        source.zeroize();
        key
    }

    /// Creates a new random secret.
    ///
    /// # Errors
    /// The error of the source of randomness.
    pub fn generate(random: &dyn Random) -> io::Result<Self> {
        let mut key = Self::zeroed();
        random.fill(key.expose_mut())?;
        Ok(key)
    }

    /// A second copy in locked memory.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        let mut key = Self::zeroed();
        key.expose_mut().copy_from_slice(self.expose());
        key
    }

    /// The secret itself. Do not copy it into memory that is not wiped.
    #[must_use]
    pub fn expose(&self) -> &[u8; 32] {
        &self.slot.as_ref().expect("the slot is there until drop").0
    }

    /// An empty secret, to be filled in through [`SecretKey::expose_mut`].
    pub(super) fn zeroed() -> Self {
        Self { slot: Some(pool().take()) }
    }

    pub(super) fn expose_mut(&mut self) -> &mut [u8; 32] {
        &mut self.slot.as_mut().expect("the slot is there until drop").0
    }
}

impl Drop for SecretKey {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            slot.0.zeroize();
            pool().free.push(slot);
        }
    }
}

impl ZeroizeOnDrop for SecretKey {}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

/// Overwrites plaintext that is no longer needed, at the speed of `memset`.
pub(crate) fn wipe(bytes: &mut [u8]) {
    bytes.fill(0);
    zeroize::optimization_barrier(bytes);
}

/// Overwrites plaintext that is no longer needed, unless another part of the process holds it too.
/// The caller of the engine owns that copy.
pub(crate) fn wipe_shared(bytes: Bytes) {
    if let Ok(mut bytes) = bytes.try_into_mut() {
        wipe(&mut bytes);
    }
}

/// How much of the stack is overwritten, in bytes: more than key schedules, hashes and HKDF use
/// below their caller.
const STACK_BYTES: usize = 32 << 10;

/// Runs a function that handles secrets, and then overwrites the stack that it used. Values that
/// wipe themselves on drop leave copies behind where they were moved from.
pub(crate) fn on_clean_stack<T>(act: impl FnOnce() -> T) -> T {
    /// A separate frame, so that the wipe begins above it.
    #[inline(never)]
    fn run<T>(act: impl FnOnce() -> T) -> T {
        act()
    }

    #[inline(never)]
    fn overwrite() {
        wipe(&mut [0xff; STACK_BYTES]);
    }

    let done = run(act);
    overwrite();
    done
}

/// How much memory for secrets is locked, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LockStatus {
    /// Locked memory. It is never written to swap.
    pub locked_bytes: usize,
    /// Memory that could not be locked, mostly because `RLIMIT_MEMLOCK` is used up. Secrets there
    /// work too, but may be swapped out.
    pub unlocked_bytes: usize,
}

/// How much of this process's memory for secrets is locked. A service reports it to the operator.
#[must_use]
pub fn memory_lock_status() -> LockStatus {
    pool().status
}

/// One cache line, so that two secrets never share one.
#[repr(align(64))]
struct Slot([u8; 32]);

const _: () = assert!(mem::size_of::<Slot>() == 64);

struct Pool {
    /// All slots are zero. The capacity is the number of all slots, so returning a slot never
    /// allocates.
    free: Vec<&'static mut Slot>,
    slots: usize,
    status: LockStatus,
}

static POOL: Mutex<Pool> = Mutex::new(Pool {
    free: Vec::new(),
    slots: 0,
    status: LockStatus { locked_bytes: 0, unlocked_bytes: 0 },
});

fn pool() -> MutexGuard<'static, Pool> {
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    fn take(&mut self) -> &'static mut Slot {
        loop {
            match self.free.pop() {
                Some(slot) => return slot,
                None => self.grow(),
            }
        }
    }

    fn grow(&mut self) {
        let (chunk, locked) = mapped_chunk().unwrap_or_else(|| (heap_chunk(), false));
        if locked {
            self.status.locked_bytes += CHUNK_BYTES;
        } else {
            self.status.unlocked_bytes += CHUNK_BYTES;
        }
        self.slots += chunk.len();
        self.free.reserve(self.slots);
        self.free.extend(chunk);
    }
}

/// A chunk in a mapping of its own, and whether it is locked. `None` if the system cannot map more.
#[cfg(all(unix, not(miri)))]
fn mapped_chunk() -> Option<(&'static mut [Slot], bool)> {
    use std::{ptr, slice};

    use rustix::mm::{MapFlags, ProtFlags, mlock, mmap_anonymous};

    // SAFETY: a new private mapping, where the system finds room for it, touches no memory that is
    // in use.
    let start = unsafe {
        mmap_anonymous(
            ptr::null_mut(),
            CHUNK_BYTES,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE,
        )
    }
    .ok()?;
    #[cfg(any(target_os = "linux", target_os = "android"))]
    for advice in [rustix::mm::Advice::LinuxDontDump, rustix::mm::Advice::LinuxWipeOnFork] {
        // SAFETY: the range is the new mapping, and neither advice changes the bytes that this
        // process reads there. An old kernel refuses an advice that it does not know, and the
        // memory stays usable.
        let _ = unsafe { rustix::mm::madvise(start, CHUNK_BYTES, advice) };
    }
    // SAFETY: the range is the new mapping, which is readable.
    let locked = unsafe { mlock(start, CHUNK_BYTES) }.is_ok();
    // SAFETY: the mapping is CHUNK_BYTES long, aligned to a page and so to a slot, writable, zeroed
    // (any bytes are a valid `Slot`) and never unmapped. No other code knows it: this is the only
    // reference to it.
    let slots = unsafe { slice::from_raw_parts_mut(start.cast::<Slot>(), CHUNK_SLOTS) };
    Some((slots, locked))
}

/// Miri has no `mlock`, and other systems have no `mmap`: their chunks come from the heap.
#[cfg(not(all(unix, not(miri))))]
fn mapped_chunk() -> Option<(&'static mut [Slot], bool)> {
    None
}

fn heap_chunk() -> &'static mut [Slot] {
    let mut chunk = Vec::new();
    chunk.resize_with(CHUNK_SLOTS, || Slot([0; 32]));
    chunk.leak()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::thread;

    use super::*;
    use crate::io::OsRandom;

    /// Every free slot must be zero. No slot may be lost or in the pool twice.
    fn check_pool() {
        let pool = pool();
        assert!(pool.free.iter().all(|slot| slot.0 == [0; 32]), "a free slot was not wiped");
        assert!(pool.free.len() <= pool.slots);
        assert!(pool.free.capacity() >= pool.slots, "giving a slot back could allocate");
        assert_eq!(
            pool.slots * mem::size_of::<Slot>(),
            pool.status.locked_bytes + pool.status.unlocked_bytes
        );
    }

    #[test]
    fn a_secret_is_moved_in_and_its_source_wiped() {
        let mut source = [0xa5; 32];
        let key = SecretKey::from_bytes(&mut source);
        assert_eq!(source, [0; 32]);
        assert_eq!(key.expose(), &[0xa5; 32]);
        let copy = key.duplicate();
        assert_ne!(key.expose().as_ptr(), copy.expose().as_ptr());
        drop(key);
        assert_eq!(copy.expose(), &[0xa5; 32]);
        drop(copy);
        check_pool();
    }

    #[test]
    fn debug_shows_nothing() {
        let key = SecretKey::from_bytes(&mut [0x41; 32]);
        assert_eq!(format!("{key:?} {:?}", Some(&key)), "SecretKey(..) Some(SecretKey(..))");
        assert_eq!(format!("{key:#?}"), "SecretKey(..)");
    }

    #[test]
    fn it_is_wiped_on_drop_and_can_cross_threads() {
        fn is<T: ZeroizeOnDrop + Send + Sync + 'static>() {}
        is::<SecretKey>();
    }

    #[test]
    fn generated_secrets_differ_and_failure_is_passed_on() {
        #[derive(Debug)]
        struct Broken;
        impl Random for Broken {
            fn fill(&self, buf: &mut [u8]) -> io::Result<()> {
                buf[0] = 1;
                Err(io::ErrorKind::Other.into())
            }
        }
        let [a, b] = [(); 2].map(|()| SecretKey::generate(&OsRandom).unwrap());
        assert_ne!(a.expose(), b.expose());
        assert_ne!(a.expose(), &[0; 32]);
        assert!(SecretKey::generate(&Broken).is_err());
        check_pool();
    }

    #[test]
    fn more_secrets_than_a_chunk_holds() {
        let count = CHUNK_SLOTS * 2 + 1;
        let keys: Vec<_> = (0..count).map(|i| SecretKey::from_bytes(&mut [i as u8; 32])).collect();
        assert!(keys.iter().enumerate().all(|(i, key)| key.expose() == &[i as u8; 32]));
        let status = memory_lock_status();
        assert!(status.locked_bytes + status.unlocked_bytes >= 3 * CHUNK_BYTES);
        drop(keys);
        check_pool();
    }

    #[test]
    fn threads_never_see_each_others_secrets() {
        let rounds = if cfg!(miri) { 10 } else { 2_000 };
        thread::scope(|scope| {
            for thread in 0..8_u8 {
                scope.spawn(move || {
                    let mut live = Vec::new();
                    for round in 0..rounds {
                        let mark = thread.wrapping_mul(31).wrapping_add(round as u8) | 1;
                        live.push((mark, SecretKey::from_bytes(&mut [mark; 32])));
                        assert!(live.iter().all(|(mark, key)| key.expose() == &[*mark; 32]));
                        if live.len() > 20 {
                            live.swap_remove(round % 20);
                        }
                    }
                });
            }
            for _ in 0..rounds / 10 {
                check_pool();
            }
        });
        check_pool();
    }

    /// The kernel's flags for the pages: locked (`lo`), not dumped (`dd`), wiped on fork (`wf`).
    #[cfg(all(target_os = "linux", not(miri)))]
    #[test]
    #[expect(clippy::disallowed_methods, reason = "the kernel's view is in a file")]
    fn the_kernel_confirms_the_protection() {
        let key = SecretKey::from_bytes(&mut [9; 32]);
        let address = key.expose().as_ptr() as usize;
        // Some sandboxes have no such file, or show no flags in it. Then there is nothing to
        // compare.
        let Ok(maps) = std::fs::read_to_string("/proc/self/smaps") else { return };
        let mut inside = false;
        let mut flags = None;
        for line in maps.lines() {
            let range = line.split(' ').next().and_then(|word| word.split_once('-'));
            if let Some((from, to)) = range
                && let (Ok(from), Ok(to)) =
                    (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
            {
                inside = (from..to).contains(&address);
            } else if inside && let Some(found) = line.strip_prefix("VmFlags:") {
                flags = Some(format!("{found} "));
            }
        }
        let Some(flags) = flags else { return };
        assert!(flags.contains(" dd "), "{flags}");
        assert!(flags.contains(" wf "), "{flags}");
        if memory_lock_status().unlocked_bytes == 0 {
            assert!(flags.contains(" lo "), "{flags}");
        }
    }
}
