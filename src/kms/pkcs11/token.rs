//! Tokens: finding the right one, logging in, and sessions.

use std::{mem, path::Path, sync::Arc};

use cryptoki::{
    session::{Session, SessionState, UserType},
    slot::{Slot, TokenInfo},
    types::AuthPin,
};
use zeroize::Zeroizing;

use super::{
    module::{Entered, Module, in_time},
    outcome::{is_logged_in_already, is_not_initialized, is_wrong_pin, outcome, said},
    uri::{Pin, Uri},
};
use crate::{
    io::read_configured,
    kms::{KmsError, deadline::Deadline},
    sync::{LockRank, Mutex, lock},
};

/// The most idle sessions that are kept. More are opened for concurrent calls, and closed after
/// them.
const KEPT_MAX: usize = 8;
/// The longest PIN file, in bytes.
const PIN_FILE_BYTES_MAX: u64 = 4096;

/// A session in which the user is logged in.
pub(super) struct Open {
    /// Taken out by `drop` alone.
    session: Option<Session>,
    slot: Slot,
    module: Arc<Module>,
    /// The life of the module in which the session was opened.
    life: u64,
}

impl Drop for Open {
    fn drop(&mut self) {
        // In another life, or in a forked child, the session's number is invalid or belongs to
        // another session.
        let inside = self.module.enter_again(self.life);
        let session = self.session.take();
        if inside.is_none() {
            mem::forget(session);
        }
    }
}

/// Idle sessions.
pub(super) struct Kept(Mutex<Vec<Open>>);

impl Default for Kept {
    fn default() -> Self {
        Self(Mutex::new(LockRank::KmsSessions, Vec::new()))
    }
}

impl Kept {
    pub(super) fn take(&self) -> Option<Open> {
        loop {
            let open = lock(&self.0).pop()?;
            if open.module.lives(open.life) {
                return Some(open);
            }
        }
    }

    pub(super) fn keep(&self, open: Open) {
        let mut sessions = lock(&self.0);
        if sessions.len() < KEPT_MAX {
            sessions.push(open);
            return;
        }
        drop(sessions);
        drop(open);
    }
}

impl Open {
    /// Opens a session with the token of the URI, and logs in.
    pub(super) fn new(uri: &Uri, entered: &Entered, deadline: Deadline) -> Result<Self, KmsError> {
        let (slot, info) = match find(uri, entered, deadline) {
            Ok(found) => found,
            // The token may be present, but the module may not have noticed it yet.
            Err(absent @ KmsError::Unreachable { .. }) => {
                in_time(deadline)?;
                if !entered.initialize_anew()? {
                    return Err(absent);
                }
                find(uri, entered, deadline)?
            }
            Err(error) => return Err(error),
        };
        in_time(deadline)?;
        let session = entered.context().open_ro_session(slot).map_err(|error| outcome(&error))?;
        let module = Arc::clone(entered.module());
        let open = Self { session: Some(session), slot, module, life: entered.life() };
        in_time(deadline)?;
        open.log_in(uri, entered, &info)?;
        Ok(open)
    }

    pub(super) fn session(&self) -> &Session {
        self.session.as_ref().expect("the session is there until drop")
    }

    /// Whether the user is logged in. Without a login, private keys are invisible.
    fn is_logged_in(&self) -> Result<bool, KmsError> {
        let info = self.session().get_session_info().map_err(|error| outcome(&error))?;
        Ok(matches!(info.session_state(), SessionState::RoUser | SessionState::RwUser))
    }

    fn log_in(&self, uri: &Uri, entered: &Entered, info: &TokenInfo) -> Result<(), KmsError> {
        // All sessions of a process share one login.
        if !info.login_required() || self.is_logged_in()? {
            return Ok(());
        }
        let logged_in = |error: cryptoki::error::Error| {
            if is_logged_in_already(&error) { Ok(()) } else { Err(error) }
        };
        let pin = match &uri.pin {
            Pin::Value(pin) => Some(pin.clone()),
            Pin::File(path) => Some(read_pin(path)?),
            Pin::None if info.protected_authentication_path() => None,
            Pin::None => {
                return Err(KmsError::unreachable(
                    "the token wants a PIN: give pin-source or pin-value",
                ));
            }
        };
        let Some(pin) = pin else {
            let answer = self.session().login(UserType::User, None);
            return answer.or_else(logged_in).map_err(|error| outcome(&error));
        };
        // Held through the login, so that two threads do not both try a wrong PIN.
        let mut refused = lock(&entered.module().refused);
        let token = format!("{}/{}/{}", info.manufacturer_id(), info.serial_number(), info.label());
        if refused.get(&token) == Some(&pin) {
            return Err(KmsError::unreachable(
                "the token has refused this PIN, which is not tried again, as tokens lock after a few tries: correct it",
            ));
        }
        // As long as its text, so that the library's own copy is made without another copy.
        let given = AuthPin::from(String::clone(&pin));
        match self.session().login(UserType::User, Some(&given)).or_else(logged_in) {
            Ok(()) => Ok(()),
            Err(error) if is_wrong_pin(&error) => {
                refused.insert(token, pin);
                Err(KmsError::unreachable(format!(
                    "the token refuses the PIN ({}): correct it",
                    said(&error)
                )))
            }
            Err(error) => Err(outcome(&error)),
        }
    }

    /// Checks that a missing object is really missing: the token is present, and the user is logged
    /// in.
    pub(super) fn check_presence(&self, uri: &Uri, entered: &Entered) -> Result<(), KmsError> {
        let info = entered
            .context()
            .get_token_info(self.slot)
            .map_err(|error| KmsError::unreachable(said(&error)))?;
        if !uri.matches(&info) {
            return Err(KmsError::unreachable("another token is in the slot"));
        }
        if info.login_required() && !self.is_logged_in()? {
            return Err(KmsError::unreachable("the token has ended the login"));
        }
        Ok(())
    }
}

/// Finds the one token that matches the URI.
fn find(uri: &Uri, entered: &Entered, deadline: Deadline) -> Result<(Slot, TokenInfo), KmsError> {
    let context = entered.context();
    if uri.asks_for_library() {
        let info = context.get_library_info().map_err(|error| outcome(&error))?;
        if !uri.matches_library(&info) {
            return Err(KmsError::invalid("the module is not the one that library-… asks for"));
        }
    }
    let slots = context.get_slots_with_token().map_err(|error| {
        if is_not_initialized(&error) {
            KmsError::unreachable("the module was finalized")
        } else {
            outcome(&error)
        }
    })?;
    let (mut found, mut silent) = (None, None);
    for slot in slots {
        in_time(deadline)?;
        if uri.slot_id.is_some_and(|id| id != slot.id()) {
            continue;
        }
        match context.get_token_info(slot) {
            Ok(info) if !info.token_initialized() || !uri.matches(&info) => {}
            Ok(_) if found.is_some() => {
                return Err(KmsError::invalid(
                    "several tokens are what the URI says: add a serial or slot-id",
                ));
            }
            Ok(info) => found = Some((slot, info)),
            Err(error) => silent = Some(said(&error)),
        }
    }
    found.ok_or_else(|| {
        KmsError::unreachable(match silent {
            None => "no token is there that is what the URI says".to_owned(),
            Some(said) => format!("no token answers that is what the URI says ({said})"),
        })
    })
}

/// The first line of the file.
fn read_pin(path: &Path) -> Result<Zeroizing<String>, KmsError> {
    let unreadable = |why: String| {
        KmsError::unreachable(format!("the PIN cannot be read from {}: {why}", path.display()))
    };
    let bytes =
        read_configured(path, PIN_FILE_BYTES_MAX).map_err(|error| unreadable(error.to_string()))?;
    let bytes = Zeroizing::new(bytes);
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let pin = std::str::from_utf8(line).map_err(|_| unreadable("it is not UTF-8".to_owned()))?;
    if pin.is_empty() {
        return Err(unreadable("it is empty".to_owned()));
    }
    Ok(Zeroizing::new(pin.to_owned()))
}
