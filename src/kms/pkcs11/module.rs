//! Modules: shared libraries that implement PKCS#11. A process loads and initializes each module
//! once.

use std::{
    collections::BTreeMap,
    mem,
    path::{Path, PathBuf},
    sync::Arc,
};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use zeroize::Zeroizing;

use super::outcome::{is_initialized_already, outcome};
use crate::{
    kms::{KmsError, deadline::Deadline},
    sync::{Condvar, LockRank, Mutex, lock, wait_timeout},
};

/// The most calls in one module at once. A call into a module cannot be interrupted. If this many
/// calls have not returned, more calls would not help, and each would cost a thread.
const CALLS_MAX: usize = 32;

/// All modules that were requested. A process may call `C_Initialize` only once, for all users of
/// the module.
static MODULES: Mutex<BTreeMap<PathBuf, Arc<Module>>> =
    Mutex::new(LockRank::KmsModules, BTreeMap::new());

/// Called between two calls into the module. Fails if the caller has stopped waiting.
pub(super) fn in_time(deadline: Deadline) -> Result<(), KmsError> {
    let late = || KmsError::unreachable("the token took too long");
    deadline.left().map(drop).ok_or_else(late)
}

/// One module.
pub(super) struct Module {
    path: PathBuf,
    /// The process that loaded it. By the standard, a forked child must initialize it for itself.
    pid: u32,
    /// Whether the parent process had it loaded before the fork.
    inherited: bool,
    gate: Mutex<Gate>,
    changed: Condvar,
    /// The last refused PIN for each token. It is not tried again, as tokens lock after a few wrong
    /// PINs.
    pub(super) refused: Mutex<BTreeMap<String, Zeroizing<String>>>,
}

#[derive(Default)]
struct Gate {
    /// Set once the module is loaded and has been initialized at least once.
    context: Option<Pkcs11>,
    /// Whether this backend initialized it, and not another part of the process.
    ours: bool,
    /// The number of initializations. A handle from one life of the module is invalid in the next,
    /// or names another object.
    life: u64,
    calls: usize,
    /// Whether a thread is loading or initializing the module. All others wait.
    closed: bool,
}

impl Module {
    /// The module with this path. Does not load it.
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
        // The parent's modules are left alone after `fork`: their destructors would call into the
        // module.
        mem::forget(modules.insert(path.to_owned(), Arc::clone(&module)));
        module
    }

    /// Enters the module as soon as there is room. Loads it first if necessary.
    pub(super) fn enter(self: &Arc<Self>, deadline: Deadline) -> Result<Entered, KmsError> {
        let mut gate = lock(&self.gate);
        while gate.closed || gate.calls >= CALLS_MAX {
            let Some(left) = deadline.left() else {
                return Err(KmsError::unreachable(
                    "earlier calls to the module have not come back",
                ));
            };
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
        let ready =
            loaded.and_then(|context| self.initialize(&context).map(|ours| (context, ours)));
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

    /// Enters the module to close objects from that life. `None` if that life has ended, so there
    /// is nothing to close.
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

    /// Whether objects from that life are still valid in this process.
    pub(super) fn lives(&self, life: u64) -> bool {
        self.pid == std::process::id() && lock(&self.gate).life == life
    }

    /// Initializes the module. Returns `false` if it was initialized already.
    fn initialize(&self, context: &Pkcs11) -> Result<bool, KmsError> {
        match context.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
            Ok(()) => Ok(true),
            Err(error) if is_initialized_already(&error) && self.inherited => {
                Err(KmsError::unreachable(
                    "the module was initialized in the process that this one was forked from, and cannot be here",
                ))
            }
            Err(error) if is_initialized_already(&error) => Ok(false),
            Err(error) => Err(outcome(&error)),
        }
    }
}

/// A call in progress, until it is dropped.
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

    /// The current life of the module.
    pub(super) fn life(&self) -> u64 {
        lock(&self.module().gate).life
    }

    /// Finalizes and initializes the module, so that it looks for slots and tokens again: some
    /// modules know only the tokens that were present at initialization. Every session ends. Does
    /// so only if no other call is in the module and this backend initialized it. Returns whether
    /// it was initialized.
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
            // The result is ignored: only the initialization decides.
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
