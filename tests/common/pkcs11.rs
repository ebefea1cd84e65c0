//! A SoftHSM token for a test, and its administration from another process.
//!
//! A PKCS#11 module is initialized once per process, with the tokens that the environment names, so
//! each test runs in its own process: [`in_own_process`] starts the test's binary again for it.
//! [`Token::admin`] does the same, to change keys without the knowledge of the tested process.

#![allow(dead_code, clippy::unwrap_used)]

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use cryptoki::{
    context::{CInitializeArgs, CInitializeFlags, Pkcs11},
    mechanism::Mechanism,
    object::{Attribute, ObjectClass, ObjectHandle},
    session::{Session, UserType},
    slot::Slot,
    types::AuthPin,
};

pub(crate) const PIN: &str = "987654";
const TEST: &str = "ENVELOG_TOKEN_TEST";
const ADMIN: &str = "ENVELOG_TOKEN_ADMIN";
const CONF: &str = "SOFTHSM2_CONF";
/// The test that every binary with this module has, and that [`Token::admin`] starts.
const ADMIN_TEST: &str = "softhsm_is_there";

/// The path of the SoftHSM module. Without the module, these tests fail.
pub(crate) fn module() -> PathBuf {
    let known = [
        "/usr/lib/softhsm/libsofthsm2.so",
        "/usr/lib64/softhsm/libsofthsm2.so",
        "/usr/local/lib/softhsm/libsofthsm2.so",
        "/opt/homebrew/lib/softhsm/libsofthsm2.so",
    ];
    let found = known.iter().map(Path::new).find(|path| path.exists());
    found.expect("SoftHSM is needed for this test: install the package softhsm2").to_owned()
}

/// A token in a directory, which the environment of this process and its children names.
pub(crate) struct Token {
    dir: PathBuf,
}

impl Token {
    fn conf(dir: &Path) -> PathBuf {
        dir.join("softhsm2.conf")
    }

    fn create(dir: &Path) {
        fs::create_dir(dir.join("tokens")).unwrap();
        let conf =
            format!("directories.tokendir = {}\nlog.level = ERROR\n", dir.join("tokens").display());
        fs::write(Self::conf(dir), conf).unwrap();
        let made = Command::new("softhsm2-util")
            .args(["--init-token", "--free", "--label", "logs", "--so-pin", "0000", "--pin", PIN])
            .env(CONF, Self::conf(dir))
            .output()
            .expect("softhsm2-util is needed for this test: install the package softhsm2");
        assert!(made.status.success(), "{made:?}");
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// The token's URI with additional query parameters.
    pub(crate) fn uri_with(&self, more: &str) -> String {
        format!("pkcs11:token=logs?region=cn-hangzhou&module-path={}{more}", module().display())
    }

    pub(crate) fn uri(&self) -> String {
        self.uri_with(&format!("&pin-value={PIN}"))
    }

    /// Runs an administrative command in another process: see [`admin`].
    #[track_caller]
    pub(crate) fn admin(&self, words: &str) {
        let done = Command::new(env::current_exe().unwrap())
            .args([ADMIN_TEST, "--exact", "--nocapture"])
            .env(ADMIN, words)
            .env_remove(TEST)
            .output()
            .unwrap();
        assert!(done.status.success(), "{words}: {done:?}");
    }

    /// Removes the token, as if it had been unplugged.
    pub(crate) fn take_away(&self) {
        fs::rename(self.path("tokens"), self.path("away")).unwrap();
    }

    pub(crate) fn put_back(&self) {
        fs::rename(self.path("away"), self.path("tokens")).unwrap();
    }
}

/// Runs a test in its own process, with its own token.
#[track_caller]
pub(crate) fn in_own_process(test: &str, body: impl FnOnce(&Token)) {
    if env::var(TEST).is_ok_and(|running| running == test) {
        let conf = PathBuf::from(env::var_os(CONF).unwrap());
        return body(&Token { dir: conf.parent().unwrap().to_owned() });
    }
    let dir = tempfile::tempdir().unwrap();
    Token::create(dir.path());
    let done = Command::new(env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(TEST, test)
        .env(CONF, Token::conf(dir.path()))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(
        done.status.success() && said.contains("1 passed"),
        "{test}: {}\n{said}\n{}",
        done.status,
        String::from_utf8_lossy(&done.stderr)
    );
}

/// The child's side: runs the command from [`Token::admin`], or without a command checks that
/// SoftHSM works.
pub(crate) fn admin() {
    let context = context();
    let Ok(words) = env::var(ADMIN) else {
        assert!(context.get_library_info().unwrap().library_description().contains("PKCS11"));
        return;
    };
    let session = context.open_rw_session(slot(&context)).unwrap();
    let words: Vec<_> = words.split(' ').collect();
    session.login(UserType::User, Some(&pin(PIN))).unwrap();
    let yes = |word| word == "true";
    match words[..] {
        ["generate", label, id] => generate(&session, label, id, 32, false),
        ["generate", label, id, "short"] => generate(&session, label, id, 16, false),
        ["generate", label, id, "extractable"] => generate(&session, label, id, 32, true),
        ["destroy", label] => session.destroy_object(key(&session, label)).unwrap(),
        ["encrypt", label, to] => {
            session.update_attributes(key(&session, label), &[Attribute::Encrypt(yes(to))]).unwrap()
        }
        ["decrypt", label, to] => {
            session.update_attributes(key(&session, label), &[Attribute::Decrypt(yes(to))]).unwrap()
        }
        _ => panic!("{words:?}"),
    }
}

/// The module, as another component of the same process uses it.
pub(crate) fn context() -> Pkcs11 {
    let context = Pkcs11::new(module()).unwrap();
    // Another component may have initialized it already.
    let _ = context.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK));
    context
}

/// Changes the PIN in this process: a process that has loaded SoftHSM keeps the PIN that it read.
pub(crate) fn change_pin(old: &str, new: &str) {
    let context = context();
    let session = context.open_rw_session(slot(&context)).unwrap();
    session.set_pin(&pin(old), &pin(new)).unwrap();
}

/// The slot of the token.
pub(crate) fn slot(context: &Pkcs11) -> Slot {
    context.get_slots_with_initialized_token().unwrap()[0]
}

fn pin(text: &str) -> AuthPin {
    AuthPin::from(text.to_owned())
}

fn key(session: &Session, label: &str) -> ObjectHandle {
    let found = session.find_objects(&[
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::Token(true),
        Attribute::Label(label.as_bytes().to_vec()),
    ]);
    found.unwrap()[0]
}

/// Creates an AES key with an id of one byte, given in hexadecimal.
fn generate(session: &Session, label: &str, id: &str, bytes: u64, extractable: bool) {
    let template = [
        Attribute::Token(true),
        Attribute::Private(true),
        Attribute::Sensitive(true),
        Attribute::Extractable(extractable),
        Attribute::Encrypt(true),
        Attribute::Decrypt(true),
        Attribute::ValueLen(bytes.into()),
        Attribute::Label(label.as_bytes().to_vec()),
        Attribute::Id(vec![u8::from_str_radix(id, 16).unwrap()]),
    ];
    session.generate_key(&Mechanism::AesKeyGen, &template).unwrap();
}
