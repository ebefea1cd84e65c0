//! The deterministic parts of a simulation with a seed: a random source that can fail, a KMS with
//! injected faults, and a cipher provider that records every seal.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt, io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use envelog::{
    Cmk,
    crypto::{AeadKey, Cipher, CryptoError, CryptoProvider, SecretKey},
    io::Random,
    kms::{Kms, KmsCall, KmsError, RevokedReason},
};

use super::{Provider, REGION, ROLE, disk::Dice};

/// A random source with a seed.
#[derive(Debug)]
pub(crate) struct SeededRandom {
    dice: Mutex<Dice>,
    fails: AtomicBool,
}

impl SeededRandom {
    pub(crate) fn new(seed: u64, stream: u64) -> Arc<Self> {
        Arc::new(Self { dice: Mutex::new(Dice::new(seed, stream)), fails: AtomicBool::new(false) })
    }

    /// Sets whether the next draw fails.
    pub(crate) fn fail_next(&self, fails: bool) {
        self.fails.store(fails, Ordering::SeqCst);
    }
}

impl Random for SeededRandom {
    fn fill(&self, buf: &mut [u8]) -> io::Result<()> {
        if self.fails.swap(false, Ordering::SeqCst) {
            return Err(io::Error::other("no randomness"));
        }
        let mut dice = self.dice.lock().unwrap();
        for part in buf.chunks_mut(8) {
            part.copy_from_slice(&dice.next().to_le_bytes()[..part.len()]);
        }
        Ok(())
    }
}

// ---- the record of all seals ----

type Seal = ([u8; 32], [u8; 12]);

/// Records every key and nonce of a seal, and every key. A copy of a setup has its own record,
/// which is also checked against the seals from before the copy.
#[derive(Debug, Default)]
pub(crate) struct Ledger {
    before: Option<Arc<Ledger>>,
    seals: Mutex<HashSet<Seal>>,
    keys: Mutex<BTreeSet<[u8; 32]>>,
    repeated: Mutex<Option<String>>,
}

impl Ledger {
    /// A record for a copy of the setup, which continues separately.
    pub(crate) fn fork(self: &Arc<Self>) -> Arc<Self> {
        Arc::new(Self { before: Some(Arc::clone(self)), ..Self::default() })
    }

    fn has(&self, seal: &Seal) -> bool {
        self.seals.lock().unwrap().contains(seal)
            || self.before.as_ref().is_some_and(|before| before.has(seal))
    }

    fn note(&self, key: [u8; 32], nonce: [u8; 12], bound: &[u8], plain: &[u8]) {
        let again = self.before.as_ref().is_some_and(|before| before.has(&(key, nonce)));
        if again || !self.seals.lock().unwrap().insert((key, nonce)) {
            let what = format!(
                "a key met the nonce {nonce:02x?} twice, over {} and {} bytes",
                bound.len(),
                plain.len()
            );
            self.repeated.lock().unwrap().get_or_insert(what);
        }
    }

    /// The first seal that repeated a key and nonce, if any.
    pub(crate) fn repeated(&self) -> Option<String> {
        self.repeated.lock().unwrap().clone()
    }

    pub(crate) fn seals(&self) -> u64 {
        self.seals.lock().unwrap().len() as u64
    }

    /// Keys that only the engine and the KMS may know: data keys and keys derived from them.
    pub(crate) fn keys(&self) -> Vec<[u8; 32]> {
        let mut keys = self.before.as_ref().map_or_else(Vec::new, |before| before.keys());
        keys.extend(self.keys.lock().unwrap().iter());
        keys
    }

    fn add_key(&self, key: &[u8]) {
        let mut padded = [0; 32];
        padded[..key.len()].copy_from_slice(key);
        self.keys.lock().unwrap().insert(padded);
    }
}

/// AWS-LC and RustCrypto, with every seal recorded.
#[derive(Clone, Debug)]
pub(crate) struct Recorded(pub(crate) Arc<Ledger>);

struct RecordedKey {
    key: Box<dyn AeadKey>,
    bytes: [u8; 32],
    ledger: Arc<Ledger>,
}

impl CryptoProvider for Recorded {
    fn name(&self) -> &'static str {
        "recorded"
    }

    fn aead(&self, cipher: Cipher, key: &[u8]) -> Result<Box<dyn AeadKey>, CryptoError> {
        let mut bytes = [0; 32];
        bytes[..key.len()].copy_from_slice(key);
        self.0.add_key(key);
        Ok(Box::new(RecordedKey {
            key: Provider.aead(cipher, key)?,
            bytes,
            ledger: Arc::clone(&self.0),
        }))
    }
}

impl AeadKey for RecordedKey {
    fn seal(
        &self,
        nonce: &[u8; 12],
        aad: &[u8],
        in_out: &mut [u8],
    ) -> Result<[u8; 16], CryptoError> {
        self.ledger.note(self.bytes, *nonce, aad, in_out);
        // An envelope under the service key: only a data key is sealed in this form.
        if in_out.len() == 32 && aad.len() == 42 {
            self.ledger.add_key(in_out);
        }
        self.key.seal(nonce, aad, in_out)
    }

    fn open(
        &self,
        nonce: &[u8; 12],
        aad: &[u8],
        ciphertext: &[u8],
        tag: &[u8; 16],
        out: &mut [u8],
    ) -> Result<(), CryptoError> {
        self.key.open(nonce, aad, ciphertext, tag, out)
    }
}

// ---- the KMS ----

/// The stream of random numbers that only the KMS uses.
const KMS_STREAM: u64 = u64::MAX;

/// A KMS in memory with two master keys. It can refuse one of them, and fail one call in N.
pub(crate) struct SeededKms {
    masters: BTreeMap<String, [u8; 32]>,
    disabled: Mutex<BTreeSet<String>>,
    state: Mutex<KmsState>,
    ledger: Arc<Ledger>,
}

#[derive(Clone)]
struct KmsState {
    dice: Dice,
    /// Fails one call in this many; 0 disables failures.
    one_fails_in: u64,
}

impl fmt::Debug for SeededKms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SeededKms")
    }
}

/// A master key of the [`SeededKms`].
pub(crate) fn cmk(n: u64) -> Cmk {
    Cmk { cmk_key_id: format!("key-{n}"), arn: ROLE.into(), region_id: REGION.into() }
}

impl SeededKms {
    pub(crate) fn new(seed: u64, ledger: &Arc<Ledger>) -> Arc<Self> {
        let mut dice = Dice::new(seed, KMS_STREAM);
        let mut master = |n| (cmk(n).cmk_key_id, std::array::from_fn(|_| dice.next() as u8));
        let masters = (0..2).map(&mut master).collect();
        let state = Mutex::new(KmsState { dice, one_fails_in: 0 });
        Arc::new(Self { masters, disabled: Mutex::default(), state, ledger: Arc::clone(ledger) })
    }

    /// A healthy KMS for a copy of the setup, with its own answers.
    pub(crate) fn fork(&self, seed: u64, ledger: &Arc<Ledger>) -> Arc<Self> {
        let state = Mutex::new(KmsState { dice: Dice::new(seed, KMS_STREAM), one_fails_in: 0 });
        let disabled = Mutex::new(self.disabled.lock().unwrap().clone());
        Arc::new(Self {
            masters: self.masters.clone(),
            disabled,
            state,
            ledger: Arc::clone(ledger),
        })
    }

    pub(crate) fn disable(&self, cmk: &Cmk) {
        self.disabled.lock().unwrap().insert(cmk.cmk_key_id.clone());
    }

    pub(crate) fn enable_all(&self) {
        self.disabled.lock().unwrap().clear();
    }

    /// Makes one call in `count` fail from now on, in varying ways; 0 disables failures.
    pub(crate) fn fail_one_in(&self, count: u64) {
        self.state.lock().unwrap().one_fails_in = count;
    }

    fn mood(&self, call: &KmsCall<'_>) -> Result<&[u8; 32], KmsError> {
        if self.disabled.lock().unwrap().contains(&call.cmk.cmk_key_id) {
            return Err(KmsError::Revoked {
                reason: RevokedReason::Disabled,
                detail: "it is disabled".into(),
            });
        }
        let mut state = self.state.lock().unwrap();
        let one_in = state.one_fails_in;
        if one_in > 0 && state.dice.roll(one_in) == 0 {
            return Err(match state.dice.roll(2) {
                0 => KmsError::Unreachable { detail: "no answer".into() },
                _ => KmsError::Invalid { detail: "nonsense".into() },
            });
        }
        let none =
            || KmsError::Revoked { reason: RevokedReason::Deleted, detail: "there is none".into() };
        self.masters.get(&call.cmk.cmk_key_id).ok_or_else(none)
    }
}

impl Kms for SeededKms {
    fn name(&self) -> &str {
        "seeded"
    }

    fn serves(&self, region_id: &str) -> bool {
        region_id == REGION
    }

    fn wrap(&self, call: &KmsCall<'_>, key: &SecretKey) -> Result<Vec<u8>, KmsError> {
        let master = self.mood(call)?;
        self.ledger.add_key(key.expose());
        let mut nonce = [0; 12];
        nonce[..8].copy_from_slice(&self.state.lock().unwrap().dice.next().to_le_bytes());
        let mut sealed = *key.expose();
        let context = format!("{:?}", call.context);
        let tag = Provider
            .aead(Cipher::Aes256Gcm, master)
            .unwrap()
            .seal(&nonce, context.as_bytes(), &mut sealed)
            .unwrap();
        Ok([&nonce[..], &sealed, &tag].concat())
    }

    fn unwrap(&self, call: &KmsCall<'_>, wrapped: &[u8]) -> Result<SecretKey, KmsError> {
        let master = self.mood(call)?;
        let malformed = || KmsError::Invalid { detail: "it is not what was wrapped".into() };
        let (nonce, rest) = wrapped.split_first_chunk().ok_or_else(malformed)?;
        let (sealed, tag) = rest.split_last_chunk().ok_or_else(malformed)?;
        let context = format!("{:?}", call.context);
        let mut key = [0; 32];
        let opening = Provider.aead(Cipher::Aes256Gcm, master).unwrap();
        opening.open(nonce, context.as_bytes(), sealed, tag, &mut key).map_err(|_| malformed())?;
        Ok(SecretKey::from_bytes(&mut key))
    }
}
