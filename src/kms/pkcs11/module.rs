//! Modules: shared libraries that speak PKCS#11, each loaded and initialized once in a process.

use std::{
    collections::BTreeMap,
    mem,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use zeroize::Zeroizing;

use super::outcome::{is_initialized_already, outcome, unreachable};
use crate::{
    io::{Clock, SystemClock},
    kms::KmsError,
    sync::{Condvar, LockRank, Mutex, lock, wait_timeout},
};

/// How many calls may be in one module at once. A call into a module cannot be interrupted; when this many have not come back, more
/// would not help, and each would cost a thread.
const CALLS_MAX: usize = 32;

/// Every module that was asked for. `C_Initialize` is once a process, whoever needs the module.
static MODULES: Mutex<BTreeMap<PathBuf, Arc<Module>>> = Mutex::new(LockRank::KmsModules, BTreeMap::new());

/// When a call must be done.
#[derive(Clone, Copy)]
pub(super) struct Deadline(Duration);

impl Deadline {
    pub(super) fn after(timeout: Duration) -> Self {
        Self(SystemClock.uptime().saturating_add(timeout))
    }

    fn left(self) -> Duration {
        self.0.saturating_sub(SystemClock.uptime())
    }

    /// Between two calls into the module: none is begun that nobody waits for any more.
    pub(super) fn check(self) -> Result<(), KmsError> {
        if self.left().is_zero() { Err(unreachable("the token took too long")) } else { Ok(()) }
    }
}

/// One module.
pub(super) struct Module {
    path: PathBuf,
    /// The process that it was loaded in. By the standard a forked child has to initialize it for itself.
    pid: u32,
    /// Whether the process that this one was forked from had it loaded.
    inherited: bool,
    gate: Mutex<Gate>,
    changed: Condvar,
    /// PINs that a token has refused: by the token, the last one. They are not tried again, as tokens lock after a few.
    pub(super) refused: Mutex<BTreeMap<String, Zeroizing<String>>>,
}

#[derive(Default)]
struct Gate {
    /// Loaded, and initialized once at least.
    context: Option<Pkcs11>,
    /// Whether it was we who initialized it, and not another part of the process.
    ours: bool,
    /// Counts how often it was initialized. Handles of one life mean nothing, or something else, in the next.
    life: u64,
    calls: usize,
    /// Somebody loads or initializes it, and all others wait.
    closed: bool,
}

impl Module {
    /// The module of that path. Loads nothing.
    pub(super) fn at(path: &Path) -> Arc<Self> {
        let mut modules = lock(&MODULES);
        let pid = std::process::id();
        let known = modules.get(path);
        if let Some(module) = known.filter(|module| module.pid == pid) {
            return Arc::clone(module);
        }
        let module = Arc::new(Self {
            path: path.to_owned(),
            pid,
            inherited: known.is_some(),
            gate: Mutex::new(LockRank::KmsModule, Gate::default()),
            changed: Condvar::new(),
            refused: Mutex::new(LockRank::KmsRefusedPins, BTreeMap::new()),
        });
        // What came through `fork` is the parent's: it is left as it is, its destructors would call into the module.
        mem::forget(modules.insert(path.to_owned(), Arc::clone(&module)));
        module
    }

    /// Enters the module, loading it if it is not, as soon as there is room.
    pub(super) fn enter(self: &Arc<Self>, deadline: Deadline) -> Result<Entered, KmsError> {
        let mut gate = lock(&self.gate);
        while gate.closed || gate.calls >= CALLS_MAX {
            let left = deadline.left();
            if left.is_zero() {
                return Err(unreachable("earlier calls to the module have not come back"));
            }
            gate = wait_timeout(&self.changed, gate, left);
        }
        gate.calls += 1;
        let known = gate.context.clone();
        gate.closed = known.is_none();
        drop(gate);
        let inside = Inside(Arc::clone(self));
        if let Some(context) = known {
            return Ok(Entered { inside, context });
        }
        let loaded = Pkcs11::new(&self.path).map_err(|error| outcome(&error));
        let ready = loaded.and_then(|context| self.initialize(&context).map(|ours| (context, ours)));
        let mut gate = lock(&self.gate);
        gate.closed = false;
        if let Ok((context, ours)) = &ready {
            gate.context = Some(context.clone());
            gate.ours = *ours;
        }
        drop(gate);
        self.changed.notify_all();
        Ok(Entered { inside, context: ready?.0 })
    }

    /// Enters to give back what was opened in that life of the module; `None` when there is nothing to give back any more.
    pub(super) fn enter_again(self: &Arc<Self>, life: u64) -> Option<Inside> {
        if self.pid != std::process::id() {
            return None;
        }
        let mut gate = lock(&self.gate);
        if gate.closed || gate.life != life {
            return None;
        }
        gate.calls += 1;
        drop(gate);
        Some(Inside(Arc::clone(self)))
    }

    /// Whether what was opened in that life can still be used in this process.
    pub(super) fn lives(&self, life: u64) -> bool {
        self.pid == std::process::id() && lock(&self.gate).life == life
    }

    /// Initializes it. Returns whether it was not so already.
    fn initialize(&self, context: &Pkcs11) -> Result<bool, KmsError> {
        match context.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
            Ok(()) => Ok(true),
            Err(error) if is_initialized_already(&error) && self.inherited => Err(unreachable(
                "the module was initialized in the process that this one was forked from, and cannot be here",
            )),
            Err(error) if is_initialized_already(&error) => Ok(false),
            Err(error) => Err(outcome(&error)),
        }
    }
}

/// Counts as a call until it is dropped.
pub(super) struct Inside(Arc<Module>);

impl Drop for Inside {
    fn drop(&mut self) {
        lock(&self.0.gate).calls -= 1;
        self.0.changed.notify_all();
    }
}

/// A call in a module.
pub(super) struct Entered {
    inside: Inside,
    context: Pkcs11,
}

impl Entered {
    pub(super) fn module(&self) -> &Arc<Module> {
        &self.inside.0
    }

    pub(super) fn context(&self) -> &Pkcs11 {
        &self.context
    }

    /// Which life of the module this is.
    pub(super) fn life(&self) -> u64 {
        lock(&self.module().gate).life
    }

    /// Finalizes the module and initializes it anew, so that it looks afresh for slots and tokens: some know only those that were
    /// there when it was initialized. Every session ends. Does so only if nobody else is in it and it is ours to finalize; returns
    /// whether it was initialized.
    pub(super) fn initialize_anew(&self) -> Result<bool, KmsError> {
        let module = self.module();
        let mut gate = lock(&module.gate);
        if gate.calls > 1 {
            return Ok(false);
        }
        gate.closed = true;
        gate.life += 1;
        let ours = mem::replace(&mut gate.ours, false);
        drop(gate);
        if ours {
            // Whatever it says, what counts is whether it can be initialized.
            let _ = self.context.clone().finalize();
        }
        let initialized = module.initialize(&self.context);
        let mut gate = lock(&module.gate);
        gate.closed = false;
        gate.ours = matches!(initialized, Ok(true));
        drop(gate);
        module.changed.notify_all();
        initialized
    }
}
