//! The service keyring: the engine's own root keys, in a file apart from the data.
//!
//! The engine makes it once, together with the store. It holds versions. Each version is a random
//! 256-bit root. The engine derives from it the keys that authenticate metadata, wrap data keys and
//! protect the integrity of segments that are not encrypted.
//!
//! A rotation adds a version. When every document of the store is under the new version, the
//! rotation retires the older ones. They stay in the file, since older envelopes and segments need
//! them, but authenticate no document any more.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use super::{
    envelope::{self, EnvelopeIdentity},
    keyring_file::KeyringFile,
    keyring_seal::{KeyringIdentity, KeyringSeal, SealedBody},
};
use crate::{
    Error, Result,
    config::check_cmk,
    crypto::{CryptoProvider, HashAlg, SecretKey, derive},
    document::{Document, DocumentKind, UnverifiedDocument},
    error::Location,
    ids::{KeyringId, LogstoreId, StoreId, hex_decode, hex_encode},
    io::Random,
    kms::Cmk,
    wire::Features,
};

/// The most versions a keyring may hold.
const VERSIONS_MAX: usize = 10_000;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    accepts: u32,
    /// Left out while the store has no anchor.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    anchored: bool,
    versions: Vec<VersionBody>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct VersionBody {
    version: u32,
    created_us: u64,
    root: Zeroizing<String>,
}

struct Version {
    created_us: u64,
    root: SecretKey,
}

/// A document with keys in it. They are wiped on drop, also when the document is refused: another
/// store's keyring holds that store's keys.
struct Wiped<'a>(UnverifiedDocument<'a>);

impl Drop for Wiped<'_> {
    fn drop(&mut self) {
        self.0.wipe();
    }
}

/// The service keyring in memory.
pub(crate) struct Keyring {
    file: Arc<KeyringFile>,
    store: StoreId,
    id: KeyringId,
    /// The feature bits of the file.
    features: Features,
    /// Whether the store has an anchor. It is then not opened for writing without it.
    anchored: bool,
    /// The oldest version that still authenticates documents. It is below the newest version only
    /// while a rotation is unfinished.
    accepts: u32,
    /// Whether retired versions authenticate documents too: for a backup that is known to be good.
    accepts_retired: bool,
    versions: BTreeMap<u32, Version>,
    /// The master key that the file is under; `None` for a file that holds the roots themselves.
    cmk: Option<Cmk>,
    seal: KeyringSeal,
}

impl std::fmt::Debug for Keyring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Keyring")
            .field("id", &self.id)
            .field("newest", &self.newest())
            .field("accepts", &self.accepts)
            .finish_non_exhaustive()
    }
}

/// A new or changed keyring that is not written yet, and the bytes of its file.
pub(crate) struct NewKeyring {
    keyring: Keyring,
    bytes: Zeroizing<Vec<u8>>,
}

impl NewKeyring {
    /// The keyring in memory, whose file does not exist yet.
    pub(crate) fn keyring(&self) -> &Keyring {
        &self.keyring
    }

    /// Writes it durably. The caller does so before anything depends on it.
    ///
    /// # Errors
    /// [`Error::KeyringExists`], [`Error::Io`].
    pub(crate) fn write(self) -> Result<Keyring> {
        self.keyring.file.create(&self.bytes)?;
        Ok(self.keyring)
    }

    /// Replaces the file durably. On an error the file has not changed.
    ///
    /// # Errors
    /// As [`KeyringFile::replace`].
    pub(crate) fn replace(self) -> Result<Keyring> {
        self.keyring.file.replace(&self.bytes)?;
        Ok(self.keyring)
    }
}

impl Keyring {
    /// Makes a new keyring with one version, under a master key if one is given. Writes nothing.
    /// Calls the KMS if there is a master key.
    pub(crate) fn prepare(
        random: &dyn Random,
        file: Arc<KeyringFile>,
        store: StoreId,
        now_us: u64,
        seal: KeyringSeal,
        cmk: Option<Cmk>,
    ) -> Result<NewKeyring> {
        let draw = |error| Error::io("draw a random key for", file.path())(error);
        let root = SecretKey::generate(random).map_err(draw)?;
        let keyring = Self {
            store,
            id: KeyringId::random(random).map_err(draw)?,
            file,
            features: Features::default(),
            anchored: false,
            accepts: 1,
            accepts_retired: false,
            versions: BTreeMap::from([(1, Version { created_us: now_us, root })]),
            cmk,
            seal,
        };
        keyring.encoded(random)
    }

    pub(crate) fn seal(&self) -> &KeyringSeal {
        &self.seal
    }

    /// Reads the keyring of `store`. Calls the KMS if the keyring is under a master key.
    pub(crate) fn load(
        file: Arc<KeyringFile>,
        store: StoreId,
        id: KeyringId,
        seal: &KeyringSeal,
    ) -> Result<Self> {
        let bytes = file.read()?;
        let path = file.path();
        let parsed = parse(&bytes, path, store, id)?;
        let claimed = parsed.0.unverified();
        let bad = |what: &str| Error::corrupt(Location::new(path, 0), what);
        let (newest, features) = (claimed.keyring_version, claimed.features);
        let (body, cmk) = match serde_json::from_slice::<SealedBody>(&claimed.a) {
            Ok(sealed) => {
                let plain = seal.open(path, KeyringIdentity { store, id, newest }, &sealed)?;
                (serde_json::from_slice(&plain), Some(sealed.cmk))
            }
            // A keyring under no master key. The parser above has stopped at its first field,
            // before any root.
            Err(_) => (serde_json::from_slice(&claimed.a), None),
        };
        let body: Body = body.map_err(|_| bad("the service keyring does not parse"))?;
        if body.versions.len() > VERSIONS_MAX {
            return Err(Error::TooMany { what: "keyring versions", limit: VERSIONS_MAX as u64 });
        }
        if let Some(cmk) = &cmk
            && check_cmk(cmk).is_err()
        {
            return Err(bad("the master key of the service keyring has an impossible name"));
        }
        let mut versions = BTreeMap::new();
        for (number, version) in (1..).zip(body.versions) {
            if version.version != number {
                return Err(bad(
                    "the versions of the service keyring do not ascend from 1 without a gap",
                ));
            }
            let root = secret_from_hex(&version.root)
                .ok_or_else(|| bad("a key of the service keyring does not parse"))?;
            versions.insert(version.version, Version { created_us: version.created_us, root });
        }
        let keyring = Self {
            file: Arc::clone(&file),
            store,
            id,
            features,
            anchored: body.anchored,
            accepts: body.accepts,
            accepts_retired: false,
            versions,
            cmk,
            seal: seal.clone(),
        };
        if keyring.newest() != newest {
            return Err(bad("the service keyring contradicts itself"));
        }
        if !(1..=newest).contains(&keyring.accepts) {
            return Err(bad(
                "the oldest accepted version of the service keyring is none of its versions",
            ));
        }
        keyring.check(&parsed, newest)?;
        keyring.file.note_known(&bytes);
        Ok(keyring)
    }

    /// Reads the file again: another process may have written it. Calls the KMS if the keyring is
    /// under a master key.
    pub(crate) fn reload(&self) -> Result<Self> {
        let loaded = Self::load(Arc::clone(&self.file), self.store, self.id, &self.seal)?;
        Ok(Self { accepts_retired: self.accepts_retired, ..loaded })
    }

    /// Whether its file has a higher generation than this copy: another process has begun or
    /// finished a rotation.
    pub(crate) fn is_outdated(&self) -> Result<bool> {
        let bytes = self.file.read()?;
        Ok(parse(&bytes, self.path(), self.store, self.id)?.0.unverified().generation
            > self.generation())
    }

    /// The generation of the file. It counts the steps of rotations (adding a version, retiring the
    /// older ones) and the first anchor.
    pub(crate) fn generation(&self) -> u64 {
        u64::from(self.newest()) + u64::from(self.accepts) - 1 + u64::from(self.anchored)
    }

    /// Verifies the file. Calls no KMS: the roots in memory authenticate a sealed file.
    pub(crate) fn verify_file(&self) -> Result<()> {
        if self.cmk.is_none() {
            return self.reload().map(|_| ());
        }
        let bytes = self.file.read()?;
        let parsed = parse(&bytes, self.path(), self.store, self.id)?;
        self.check(&parsed, parsed.0.unverified().keyring_version)
    }

    fn check(&self, parsed: &Wiped<'_>, version: u32) -> Result<()> {
        let tampered =
            |_| Error::Tampered { at: Location::new(self.path(), 0), what: "the service keyring" };
        let key = self
            .document_key(version)
            .map_err(|error| error.retired_in(self.path(), "the service keyring"))?;
        parsed.0.check(&key).map_err(tampered)?;
        let document = parsed.0.unverified();
        document.check_frame(self.path())?;
        match document.generation == self.generation() {
            true => Ok(()),
            false => Err(Error::corrupt(
                Location::new(self.path(), 56),
                "the generation of the keyring does not go with its versions",
            )),
        }
    }

    /// This keyring with the bytes of its file. Calls the KMS if it is under a master key.
    fn encoded(self, random: &dyn Random) -> Result<NewKeyring> {
        let bytes = self.encode(random)?;
        Ok(NewKeyring { keyring: self, bytes })
    }

    /// The bytes of the file. Calls the KMS if the keyring is under a master key.
    fn encode(&self, random: &dyn Random) -> Result<Zeroizing<Vec<u8>>> {
        let body = Body {
            anchored: self.anchored,
            accepts: self.accepts,
            versions: self
                .versions
                .iter()
                .map(|(&version, v)| VersionBody {
                    version,
                    created_us: v.created_us,
                    root: Zeroizing::new(hex_encode(v.root.expose())),
                })
                .collect(),
        };
        // Sized up front: a reallocation would leave a copy of the roots behind.
        let mut json = Zeroizing::new(Vec::with_capacity(256 + 192 * body.versions.len()));
        serde_json::to_writer(&mut *json, &body).expect("plain data always serializes");
        let identity = KeyringIdentity { store: self.store, id: self.id, newest: self.newest() };
        let a = match &self.cmk {
            None => std::mem::take(&mut *json),
            Some(cmk) => self.seal.seal(random, self.path(), cmk, identity, json)?,
        };
        let mut document = Document {
            kind: DocumentKind::Keyring,
            features: Features::default(),
            store: self.store,
            subject: *self.id.as_bytes(),
            generation: self.generation(),
            keyring_version: self.newest(),
            a,
            b: Vec::new(),
            tag_b: None,
        };
        let bytes = Zeroizing::new(document.seal(&self.document_key(self.newest())?));
        document.a.zeroize();
        Ok(bytes)
    }

    /// The master key that the file is under.
    pub(crate) fn cmk(&self) -> Option<&Cmk> {
        self.cmk.as_ref()
    }

    /// This keyring under another master key, or under none. Writes nothing. Calls the KMS.
    pub(crate) fn rewrap(&self, random: &dyn Random, cmk: Option<Cmk>) -> Result<NewKeyring> {
        Self { cmk, ..self.duplicate() }.encoded(random)
    }

    /// A copy, to change or reload without the lock of the keyring: the KMS may be slow.
    pub(crate) fn duplicate(&self) -> Self {
        let copy = |version: &Version| Version {
            created_us: version.created_us,
            root: version.root.duplicate(),
        };
        Self {
            file: Arc::clone(&self.file),
            store: self.store,
            id: self.id,
            features: self.features,
            anchored: self.anchored,
            accepts: self.accepts,
            accepts_retired: self.accepts_retired,
            versions: self
                .versions
                .iter()
                .map(|(number, version)| (*number, copy(version)))
                .collect(),
            cmk: self.cmk.clone(),
            seal: self.seal.clone(),
        }
    }

    pub(crate) fn store(&self) -> StoreId {
        self.store
    }

    pub(crate) fn id(&self) -> KeyringId {
        self.id
    }

    pub(crate) fn features(&self) -> &Features {
        &self.features
    }

    pub(crate) fn path(&self) -> &Path {
        self.file.path()
    }

    pub(crate) fn file(&self) -> &KeyringFile {
        &self.file
    }

    /// The newest version. It authenticates new documents and wraps new data keys.
    pub(crate) fn newest(&self) -> u32 {
        self.versions.keys().next_back().copied().unwrap_or(0)
    }

    /// The oldest version that authenticates documents.
    pub(crate) fn accepts(&self) -> u32 {
        if self.accepts_retired { 1 } else { self.accepts }
    }

    /// Whether a rotation has added the newest version and has not retired the older ones yet.
    pub(crate) fn is_rotating(&self) -> bool {
        self.accepts < self.newest()
    }

    /// Lets retired versions authenticate documents too, in this copy.
    pub(crate) fn accept_retired(&mut self) {
        self.accepts_retired = true;
    }

    /// All versions, and when each was made, in microseconds since the Unix epoch.
    pub(crate) fn versions(&self) -> impl Iterator<Item = (u32, u64)> {
        self.versions.iter().map(|(&version, made)| (version, made.created_us))
    }

    /// This keyring with another version, which authenticates documents beside the older ones.
    /// Writes nothing. Calls the KMS if the keyring is under a master key.
    pub(crate) fn add_version(&self, random: &dyn Random, now_us: u64) -> Result<NewKeyring> {
        if self.versions.len() >= VERSIONS_MAX {
            return Err(Error::TooMany { what: "keyring versions", limit: VERSIONS_MAX as u64 });
        }
        let version = self.newest() + 1;
        let root =
            SecretKey::generate(random).map_err(Error::io("draw a random key for", self.path()))?;
        let mut rotated = self.duplicate();
        rotated.versions.insert(version, Version { created_us: now_us, root });
        rotated.encoded(random)
    }

    /// Whether the store has an anchor.
    pub(crate) fn is_anchored(&self) -> bool {
        self.anchored
    }

    /// This keyring, for a store that has an anchor. Writes nothing. Calls the KMS if the keyring
    /// is under a master key.
    pub(crate) fn anchor(&self, random: &dyn Random) -> Result<NewKeyring> {
        Self { anchored: true, ..self.duplicate() }.encoded(random)
    }

    /// This keyring with every version but the newest one retired. Writes nothing. Calls the KMS if
    /// the keyring is under a master key.
    pub(crate) fn retire_older(&self, random: &dyn Random) -> Result<NewKeyring> {
        Self { accepts: self.newest(), ..self.duplicate() }.encoded(random)
    }

    fn root(&self, version: u32) -> Result<&SecretKey> {
        self.versions.get(&version).map(|v| &v.root).ok_or_else(|| Error::KeyringTooOld {
            path: self.path().to_owned(),
            needed: version,
            newest: self.newest(),
        })
    }

    /// The key that authenticates documents under `version`.
    ///
    /// # Errors
    /// [`Error::RetiredKeyVersion`], [`Error::KeyringTooOld`].
    pub(crate) fn document_key(&self, version: u32) -> Result<SecretKey> {
        self.check_accepted(version, self.path(), "a document")?;
        Ok(derive(HashAlg::Sha256, &[], self.root(version)?, &[b"envelog v2 document"]))
    }

    /// Refuses a thing that a retired version authenticates.
    ///
    /// # Errors
    /// [`Error::RetiredKeyVersion`], about `what` in `path`.
    pub(crate) fn check_accepted(
        &self,
        version: u32,
        path: &Path,
        what: &'static str,
    ) -> Result<()> {
        let accepts = self.accepts();
        match (1..accepts).contains(&version) {
            true => Err(Error::RetiredKeyVersion { path: path.to_owned(), what, version, accepts }),
            false => Ok(()),
        }
    }

    /// The key that tags audit records under `version`. A record under a retired version proves
    /// nothing by itself. It counts in front of a record under an accepted version.
    pub(crate) fn audit_key(&self, version: u32) -> Result<SecretKey> {
        Ok(derive(HashAlg::Sha256, &[], self.root(version)?, &[b"envelog v2 audit"]))
    }

    /// The key that takes the place of a data key in segments of a Logstore without an envelope.
    pub(crate) fn integrity_key(&self, version: u32, logstore: LogstoreId) -> Result<SecretKey> {
        Ok(derive(
            HashAlg::Sha256,
            logstore.as_bytes(),
            self.root(version)?,
            &[b"envelog v2 integrity"],
        ))
    }

    /// Wraps a data key under the newest version.
    pub(crate) fn wrap(
        &self,
        provider: &dyn CryptoProvider,
        random: &dyn Random,
        identity: &EnvelopeIdentity,
        key: &SecretKey,
    ) -> Result<(u32, Vec<u8>)> {
        let version = self.newest();
        let wrapped =
            envelope::wrap(provider, random, self.root(version)?, version, identity, key)?;
        Ok((version, wrapped))
    }

    /// Unwraps a data key; `None` when it fails authentication.
    pub(crate) fn unwrap(
        &self,
        provider: &dyn CryptoProvider,
        version: u32,
        identity: &EnvelopeIdentity,
        wrapped: &[u8],
    ) -> Result<Option<SecretKey>> {
        envelope::unwrap(provider, self.root(version)?, version, identity, wrapped)
    }
}

/// Parses the file, and checks that it claims to be the keyring of this store.
fn parse<'a>(bytes: &'a [u8], path: &Path, store: StoreId, id: KeyringId) -> Result<Wiped<'a>> {
    let parsed = Wiped(UnverifiedDocument::parse(bytes).map_err(|error| error.in_file(path, 0))?);
    let claimed = parsed.0.unverified();
    if claimed.kind != DocumentKind::Keyring {
        return Err(Error::corrupt(Location::new(path, 0), "it is no service keyring"));
    }
    if claimed.store != store || claimed.subject != *id.as_bytes() {
        return Err(Error::KeyringForeign { path: path.to_owned() });
    }
    Ok(parsed)
}

fn secret_from_hex(hex: &str) -> Option<SecretKey> {
    let bytes = Zeroizing::new(hex_decode(hex)?);
    let mut key = Zeroizing::new([0; 32]);
    if bytes.len() != key.len() {
        return None;
    }
    key.copy_from_slice(&bytes);
    Some(SecretKey::from_bytes(&mut key))
}

#[cfg(test)]
impl Keyring {
    /// A new keyring in a real file, under no master key.
    pub(crate) fn for_tests(path: &Path, store: StoreId) -> Self {
        let seal = KeyringSeal::new(
            Arc::new(crate::crypto::RustCrypto::new()),
            crate::kms::KmsRouter::for_tests(),
        );
        let new =
            Self::prepare(&crate::io::OsRandom, KeyringFile::for_tests(path), store, 1, seal, None)
                .unwrap();
        new.write().unwrap()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{Disk as _, OpenMode, OsRandom, RealDisk};

    fn made(dir: &Path) -> (Keyring, StoreId) {
        let store = StoreId::from_bytes([5; 16]);
        (Keyring::for_tests(&dir.join("keyring"), store), store)
    }

    /// The keyring with another version, written.
    fn added(keyring: &Keyring) -> Keyring {
        keyring.add_version(&OsRandom, 2).unwrap().replace().unwrap()
    }

    #[test]
    fn it_is_made_once_rotated_and_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let (keyring, store) = made(dir.path());
        let again = Keyring::prepare(
            &OsRandom,
            Arc::clone(&keyring.file),
            store,
            1,
            keyring.seal.clone(),
            None,
        )
        .unwrap();
        assert!(matches!(again.write(), Err(Error::KeyringExists { .. })));
        let first = *keyring.document_key(1).unwrap().expose();
        assert_eq!(added(&keyring).newest(), 2);
        let loaded = keyring.reload().unwrap();
        assert_eq!(loaded.newest(), 2);
        assert_eq!(*loaded.document_key(1).unwrap().expose(), first);
        assert_ne!(*loaded.document_key(2).unwrap().expose(), first);
        assert!(matches!(
            loaded.document_key(3),
            Err(Error::KeyringTooOld { needed: 3, newest: 2, .. })
        ));
    }

    #[test]
    fn a_retired_version_authenticates_no_document_and_keeps_its_other_keys() {
        let dir = tempfile::tempdir().unwrap();
        let (keyring, _) = made(dir.path());
        assert!(!keyring.is_rotating());
        let rotating = added(&keyring);
        assert!(
            rotating.is_rotating()
                && keyring.is_outdated().unwrap()
                && !rotating.is_outdated().unwrap()
        );
        for keyring in [&rotating, &rotating.reload().unwrap()] {
            assert_eq!((keyring.accepts(), keyring.newest(), keyring.generation()), (1, 2, 2));
            assert!((1..=2).all(|version| keyring.document_key(version).is_ok()));
        }
        let retired = rotating.retire_older(&OsRandom).unwrap().replace().unwrap();
        assert!(rotating.is_outdated().unwrap() && !retired.is_outdated().unwrap());
        let mut tolerant = retired.reload().unwrap();
        for keyring in [&retired, &tolerant] {
            assert_eq!((keyring.accepts(), keyring.newest(), keyring.generation()), (2, 2, 3));
            let refused = keyring.document_key(1).map(|_| ());
            assert!(
                matches!(refused, Err(Error::RetiredKeyVersion { version: 1, accepts: 2, .. })),
                "{refused:?}"
            );
            keyring.document_key(2).unwrap();
            keyring.audit_key(1).unwrap();
            keyring.integrity_key(1, LogstoreId::from_bytes([1; 16])).unwrap();
        }
        tolerant.accept_retired();
        for keyring in [&tolerant, &tolerant.reload().unwrap()] {
            keyring.document_key(1).unwrap();
            assert!(!keyring.is_rotating());
        }
        retired.verify_file().unwrap();
    }

    #[test]
    fn its_keys_are_all_different() {
        let dir = tempfile::tempdir().unwrap();
        let (keyring, _) = made(dir.path());
        let logstore = |n| keyring.integrity_key(1, LogstoreId::from_bytes([n; 16])).unwrap();
        let keys = [
            keyring.document_key(1).unwrap(),
            keyring.audit_key(1).unwrap(),
            logstore(1),
            logstore(2),
        ];
        let distinct: std::collections::HashSet<[u8; 32]> =
            keys.iter().map(|key| *key.expose()).collect();
        assert_eq!(distinct.len(), keys.len());
    }

    #[test]
    fn absent_foreign_and_damaged_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let (keyring, store) = made(dir.path());
        let load = |store, id| {
            Keyring::load(Arc::clone(&keyring.file), store, id, &keyring.seal).map(|_| ())
        };
        assert!(matches!(
            load(StoreId::from_bytes([6; 16]), keyring.id()),
            Err(Error::KeyringForeign { .. })
        ));
        let other = KeyringId::from_bytes([6; 16]);
        assert!(matches!(load(store, other), Err(Error::KeyringForeign { .. })));
        let missing = Keyring::load(
            KeyringFile::for_tests(&dir.path().join("none")),
            store,
            keyring.id(),
            &keyring.seal,
        );
        assert!(matches!(missing, Err(Error::KeyringMissing { .. })));
    }

    #[test]
    fn its_file_is_verified_as_it_is_now() {
        let dir = tempfile::tempdir().unwrap();
        let (keyring, _) = made(dir.path());
        keyring.verify_file().unwrap();
        assert!(keyring.versions().eq([(1, 1)]));
        let mut bytes = keyring.file.read().unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        keyring.file.replace(&bytes).unwrap();
        assert!(keyring.verify_file().is_err());
    }

    /// A writer that another one has taken over from does not put its keyring in place of the
    /// other's.
    #[test]
    fn a_keyring_that_another_process_has_replaced_stays() {
        let dir = tempfile::tempdir().unwrap();
        let (keyring, store) = made(dir.path());
        let path = keyring.path().to_owned();
        let file = || KeyringFile::for_tests(&path);
        let load = |file| Keyring::load(file, store, keyring.id(), &keyring.seal).unwrap();
        let (first, second) = (load(file()), load(file()));
        let rotated = added(&second);
        let refused = first.anchor(&OsRandom).unwrap().replace();
        assert!(matches!(refused, Err(Error::KeyringChanged { .. })), "{refused:?}");
        // While another process replaces the file, it is locked.
        let held = RealDisk.open(&path, OpenMode::Read).unwrap();
        assert!(held.try_lock().unwrap());
        let refused = rotated.retire_older(&OsRandom).unwrap().replace();
        assert!(matches!(refused, Err(Error::Locked { .. })), "{refused:?}");
        drop(held);
        let retired = rotated.retire_older(&OsRandom).unwrap().replace().unwrap();
        assert_eq!((retired.newest(), load(file()).newest()), (2, 2));
    }

    #[test]
    fn the_largest_one_can_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let (mut keyring, _) = made(dir.path());
        for version in 2..VERSIONS_MAX as u32 {
            let root = keyring.root(1).unwrap().duplicate();
            keyring.versions.insert(version, Version { created_us: 1, root });
        }
        let largest = added(&keyring);
        assert!(matches!(largest.add_version(&OsRandom, 3), Err(Error::TooMany { .. })));
        let loaded = largest.reload().unwrap();
        assert_eq!(loaded.versions().count(), VERSIONS_MAX);
        assert_eq!(loaded.versions().last(), Some((VERSIONS_MAX as u32, 2)));
    }

    #[test]
    fn debug_shows_no_key() {
        let dir = tempfile::tempdir().unwrap();
        let (keyring, _) = made(dir.path());
        let shown = format!("{keyring:?}");
        assert!(!shown.contains(&hex_encode(keyring.root(1).unwrap().expose())), "{shown}");
        assert!(shown.starts_with("Keyring"));
    }
}
