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
    envelope::{self, EnvelopeIdentity, fingerprint},
    keyring_file::KeyringFile,
    keyring_seal::{KeyringIdentity, KeyringSeal, SealedBody, Wrapping},
    roots::Roots,
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

/// A version without its root, which may be wiped.
#[derive(Clone)]
struct Version {
    created_us: u64,
    /// A value derived one-way from the root. It reveals another root in the file later.
    fingerprint: String,
}

impl Version {
    fn of(root: &SecretKey, created_us: u64) -> Self {
        Self { created_us, fingerprint: fingerprint(root) }
    }
}

/// A document with keys in it. They are wiped on drop, also when the document is refused: another
/// store's keyring holds that store's keys.
struct Wiped<'a>(UnverifiedDocument<'a>);

impl Drop for Wiped<'_> {
    fn drop(&mut self) {
        self.0.wipe();
    }
}

/// The service keyring in memory. It is cheap to clone, and the clones share the roots.
///
/// While the roots are wiped, its methods that need a root return the error of that wipe. The other
/// methods work.
#[derive(Clone)]
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
    roots: Arc<Roots>,
    /// The master key that the file is under; `None` for a file that holds the roots themselves.
    wrapping: Option<Wrapping>,
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
    /// The root of the version that it adds.
    added: Option<AddedRoot>,
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
        if let Some(added) = self.added {
            added.keep();
        }
        Ok(self.keyring)
    }
}

/// The root of a version that is in no file yet. All copies of the keyring share the roots, so
/// dropping this removes the root again.
struct AddedRoot {
    roots: Arc<Roots>,
    version: u32,
    is_kept: bool,
}

impl AddedRoot {
    fn add(roots: &Arc<Roots>, version: u32, root: SecretKey) -> Result<Self> {
        roots.add(version, root)?;
        Ok(Self { roots: Arc::clone(roots), version, is_kept: false })
    }

    fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for AddedRoot {
    fn drop(&mut self) {
        if !self.is_kept {
            self.roots.remove(self.version);
        }
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
            versions: BTreeMap::from([(1, Version::of(&root, now_us))]),
            roots: Arc::new(Roots::new(BTreeMap::from([(1, root)]))),
            wrapping: None,
            seal,
        };
        keyring.encoded(random, cmk.as_ref())
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
        let (body, wrapping) = match sealed_body(&parsed) {
            Some(sealed) => {
                let identity = KeyringIdentity { store, id, newest };
                let (plain, wrapping) = seal.open(path, identity, sealed)?;
                (serde_json::from_slice(&plain), Some(wrapping))
            }
            None => (serde_json::from_slice(&claimed.a), None),
        };
        let body: Body = body.map_err(|_| bad("the service keyring does not parse"))?;
        if body.versions.len() > VERSIONS_MAX {
            return Err(Error::TooMany { what: "keyring versions", limit: VERSIONS_MAX as u64 });
        }
        if let Some(wrapping) = &wrapping
            && check_cmk(&wrapping.cmk).is_err()
        {
            return Err(bad("the master key of the service keyring has an impossible name"));
        }
        let (mut versions, mut roots) = (BTreeMap::new(), BTreeMap::new());
        for (number, version) in (1..).zip(body.versions) {
            if version.version != number {
                return Err(bad(
                    "the versions of the service keyring do not ascend from 1 without a gap",
                ));
            }
            let root = secret_from_hex(&version.root)
                .ok_or_else(|| bad("a key of the service keyring does not parse"))?;
            versions.insert(version.version, Version::of(&root, version.created_us));
            roots.insert(version.version, root);
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
            roots: Arc::new(Roots::new(roots)),
            wrapping,
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

    /// Reads the file again: another process may have written it. The result has roots of its own.
    /// Calls the KMS if the keyring is under a master key.
    ///
    /// # Errors
    /// As [`Keyring::load`], and [`Error::Tampered`] if the root of a version is another one.
    pub(crate) fn reload(&self) -> Result<Self> {
        let loaded = Self::load(Arc::clone(&self.file), self.store, self.id, &self.seal)?;
        let differs = |(number, version): (&u32, &Version)| {
            loaded.versions.get(number).is_some_and(|it| it.fingerprint != version.fingerprint)
        };
        if self.versions.iter().any(differs) {
            let at = Location::new(self.path(), 0);
            return Err(Error::Tampered { at, what: "the service keyring" });
        }
        Ok(Self { accepts_retired: self.accepts_retired, ..loaded })
    }

    /// As [`Keyring::reload`]. Refuses a file that is older than this copy.
    ///
    /// # Errors
    /// As [`Keyring::reload`], and [`Error::RolledBack`].
    pub(super) fn reload_no_older(&self) -> Result<Self> {
        let loaded = self.reload()?;
        if loaded.generation() < self.generation() {
            let (path, found, known) =
                (self.path().display(), loaded.generation(), self.generation());
            let what = format!(
                "the service keyring {path} is of generation {found}, it was of {known} while the store was open"
            );
            return Err(Error::RolledBack { what });
        }
        Ok(loaded)
    }

    /// Whether another process has written its file since, and the file has no lower generation
    /// than this copy: a step of a rotation, or another master key.
    pub(crate) fn is_outdated(&self) -> Result<bool> {
        let bytes = self.file.read()?;
        let parsed = parse(&bytes, self.path(), self.store, self.id)?;
        let generation = parsed.0.unverified().generation;
        Ok(generation > self.generation()
            || (generation == self.generation() && !self.is_wrapped_as(&parsed)))
    }

    /// Whether its file names the master key, and has the sealing key, of this copy. Authenticates
    /// nothing.
    pub(super) fn is_under_same_key(&self) -> Result<bool> {
        let bytes = self.file.read()?;
        Ok(self.is_wrapped_as(&parse(&bytes, self.path(), self.store, self.id)?))
    }

    fn is_wrapped_as(&self, parsed: &Wiped<'_>) -> bool {
        match (&self.wrapping, sealed_body(parsed)) {
            (None, None) => true,
            (Some(wrapping), Some(body)) => wrapping.is_of(&body),
            _ => false,
        }
    }

    /// The generation of the file. It counts the steps of rotations (adding a version, retiring the
    /// older ones) and the first anchor.
    pub(crate) fn generation(&self) -> u64 {
        u64::from(self.newest()) + u64::from(self.accepts) - 1 + u64::from(self.anchored)
    }

    /// Verifies the file. Calls no KMS: the roots in memory authenticate a sealed file.
    pub(crate) fn verify_file(&self) -> Result<()> {
        if self.wrapping.is_none() {
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

    /// This keyring with the bytes of its file, under this master key from now on. Calls the KMS if
    /// there is one.
    fn encoded(mut self, random: &dyn Random, cmk: Option<&Cmk>) -> Result<NewKeyring> {
        let bytes = self.encode(random, cmk)?;
        Ok(NewKeyring { keyring: self, bytes, added: None })
    }

    /// As [`Keyring::encoded`], under the master key that the file is under.
    fn encoded_as_before(self, random: &dyn Random) -> Result<NewKeyring> {
        let cmk = self.cmk().cloned();
        self.encoded(random, cmk.as_ref())
    }

    /// The bytes of the file, under this master key from now on. Calls the KMS if there is one.
    fn encode(&mut self, random: &dyn Random, cmk: Option<&Cmk>) -> Result<Zeroizing<Vec<u8>>> {
        let identity = KeyringIdentity { store: self.store, id: self.id, newest: self.newest() };
        let begin = |cmk| self.seal.begin(random, self.path(), cmk, identity);
        // Before any root leaves its place: the KMS may be slow.
        let sealing = cmk.map(begin).transpose()?;
        let mut json = self.roots.with_all(|roots| self.body(roots))?;
        let a = match &sealing {
            None => std::mem::take(&mut *json),
            Some(sealing) => self.seal.seal(sealing, json)?,
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
        self.wrapping = sealing.map(|sealing| sealing.wrapping);
        Ok(bytes)
    }

    /// Part A of the document of a keyring under no master key.
    fn body(&self, roots: &BTreeMap<u32, SecretKey>) -> Zeroizing<Vec<u8>> {
        let version = |(&version, it): (&u32, &Version)| {
            let root = Zeroizing::new(hex_encode(roots.get(&version)?.expose()));
            Some(VersionBody { version, created_us: it.created_us, root })
        };
        let body = Body {
            anchored: self.anchored,
            accepts: self.accepts,
            versions: self.versions.iter().filter_map(version).collect(),
        };
        // Sized up front: a reallocation would leave a copy of the roots behind.
        let mut json = Zeroizing::new(Vec::with_capacity(256 + 192 * body.versions.len()));
        serde_json::to_writer(&mut *json, &body).expect("plain data always serializes");
        json
    }

    /// The master key that the file is under.
    pub(crate) fn cmk(&self) -> Option<&Cmk> {
        self.wrapping.as_ref().map(|wrapping| &wrapping.cmk)
    }

    /// The master key that the file is under, with the wrapped sealing key.
    pub(super) fn wrapping(&self) -> Option<&Wrapping> {
        self.wrapping.as_ref()
    }

    /// Its roots.
    pub(super) fn roots(&self) -> &Arc<Roots> {
        &self.roots
    }

    /// The same keyring with other roots in memory.
    pub(super) fn with_roots(self, roots: &Arc<Roots>) -> Self {
        Self { roots: Arc::clone(roots), ..self }
    }

    /// This keyring under another master key, or under none. Writes nothing. Calls the KMS.
    pub(crate) fn rewrap(&self, random: &dyn Random, cmk: Option<Cmk>) -> Result<NewKeyring> {
        self.clone().encoded(random, cmk.as_ref())
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
        let mut rotated = self.clone();
        rotated.versions.insert(version, Version::of(&root, now_us));
        let added = AddedRoot::add(&self.roots, version, root)?;
        let new = rotated.encoded_as_before(random)?;
        Ok(NewKeyring { added: Some(added), ..new })
    }

    /// Whether the store has an anchor.
    pub(crate) fn is_anchored(&self) -> bool {
        self.anchored
    }

    /// This keyring, for a store that has an anchor. Writes nothing. Calls the KMS if the keyring
    /// is under a master key.
    pub(crate) fn anchor(&self, random: &dyn Random) -> Result<NewKeyring> {
        Self { anchored: true, ..self.clone() }.encoded_as_before(random)
    }

    /// This keyring with every version but the newest one retired. Writes nothing. Calls the KMS if
    /// the keyring is under a master key.
    pub(crate) fn retire_older(&self, random: &dyn Random) -> Result<NewKeyring> {
        Self { accepts: self.newest(), ..self.clone() }.encoded_as_before(random)
    }

    /// Calls `use_it` with the root of a version.
    ///
    /// # Errors
    /// [`Error::KeyringTooOld`], and the error of a wipe.
    fn with_root<T>(&self, version: u32, use_it: impl FnOnce(&SecretKey) -> T) -> Result<T> {
        let (path, newest) = (self.path(), self.newest());
        let too_old = || Error::KeyringTooOld { path: path.to_owned(), needed: version, newest };
        self.versions.get(&version).ok_or_else(too_old)?;
        self.roots.with(version, use_it)?.ok_or_else(too_old)
    }

    fn derived(&self, version: u32, salt: &[u8], label: &[u8]) -> Result<SecretKey> {
        self.with_root(version, |root| derive(HashAlg::Sha256, salt, root, &[label]))
    }

    /// The key that authenticates documents under `version`.
    ///
    /// # Errors
    /// [`Error::RetiredKeyVersion`], [`Error::KeyringTooOld`].
    pub(crate) fn document_key(&self, version: u32) -> Result<SecretKey> {
        self.check_accepted(version, self.path(), "a document")?;
        self.derived(version, &[], b"envelog v2 document")
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
    /// nothing by itself. It is valid in front of a record under an accepted version.
    pub(crate) fn audit_key(&self, version: u32) -> Result<SecretKey> {
        self.derived(version, &[], b"envelog v2 audit")
    }

    /// The key that takes the place of a data key in segments of a Logstore without an envelope.
    pub(crate) fn integrity_key(&self, version: u32, logstore: LogstoreId) -> Result<SecretKey> {
        self.derived(version, logstore.as_bytes(), b"envelog v2 integrity")
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
        let wrap = |root: &_| envelope::wrap(provider, random, root, version, identity, key);
        Ok((version, self.with_root(version, wrap)??))
    }

    /// Unwraps a data key; `None` when it fails authentication.
    pub(crate) fn unwrap(
        &self,
        provider: &dyn CryptoProvider,
        version: u32,
        identity: &EnvelopeIdentity,
        wrapped: &[u8],
    ) -> Result<Option<SecretKey>> {
        let unwrap = |root: &_| envelope::unwrap(provider, root, version, identity, wrapped);
        self.with_root(version, unwrap)?
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

/// Part A of a keyring under a master key. `None` for one under no master key: the parser has
/// stopped at its first field then, before any root.
fn sealed_body(parsed: &Wiped<'_>) -> Option<SealedBody> {
    serde_json::from_slice(&parsed.0.unverified().a).ok()
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
    fn a_retired_version_has_no_document_key_but_its_other_keys() {
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

    /// Whoever has a copy has the roots that all copies share.
    #[test]
    fn a_wipe_is_for_every_copy_and_the_file_brings_the_roots_back() {
        let dir = tempfile::tempdir().unwrap();
        let (keyring, _) = made(dir.path());
        let key = *keyring.document_key(1).unwrap().expose();
        let copy = added(&keyring);
        keyring.roots().wipe(Error::Closed("it"));
        for keyring in [&keyring, &copy] {
            assert!(matches!(keyring.document_key(1), Err(Error::Closed("it"))));
            assert!(matches!(keyring.audit_key(1), Err(Error::Closed("it"))));
            assert!(matches!(keyring.rewrap(&OsRandom, None), Err(Error::Closed("it"))));
        }
        // What is no secret stays.
        assert_eq!((copy.newest(), copy.accepts(), copy.generation()), (2, 1, 2));
        assert!(matches!(copy.retire_older(&OsRandom), Err(Error::Closed("it"))));
        let back = copy.reload_no_older().unwrap();
        assert_eq!(*back.document_key(1).unwrap().expose(), key);
        assert!(copy.document_key(1).is_err());
        // A version that could not be written leaves no root behind.
        let file = back.file.read().unwrap();
        back.file.remove().unwrap();
        assert!(back.add_version(&OsRandom, 3).unwrap().replace().is_err());
        assert!(back.roots().with(3, |_| ()).unwrap().is_none());
        back.file.create(&file).unwrap();
        drop(back.add_version(&OsRandom, 3).unwrap());
        assert!(back.roots().with(3, |_| ()).unwrap().is_none());
    }

    /// Roots that were wiped are replaced by the same ones only.
    #[test]
    fn another_root_or_an_older_file_does_not_come_in() {
        let dir = tempfile::tempdir().unwrap();
        let (first, store) = made(dir.path());
        let older = first.file.read().unwrap();
        let keyring = added(&first);
        assert!(keyring.reload_no_older().is_ok());
        let replace = |bytes: &[u8]| {
            first.file.remove().unwrap();
            first.file.create(bytes).unwrap();
        };
        replace(&older);
        assert!(keyring.reload().is_ok(), "a reader keeps its own");
        assert!(matches!(keyring.reload_no_older(), Err(Error::RolledBack { .. })));
        // The keyring of an attacker who knows the ids.
        let forged = Keyring::for_tests(&dir.path().join("forged"), store);
        let forged = Keyring { id: keyring.id, file: Arc::clone(&first.file), ..forged };
        replace(&forged.clone().encode(&OsRandom, None).unwrap());
        for keyring in [&first, &keyring] {
            assert!(matches!(keyring.reload(), Err(Error::Tampered { .. })));
        }
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
            let root = keyring.with_root(1, SecretKey::duplicate).unwrap();
            keyring.versions.insert(version, Version::of(&root, 1));
            keyring.roots.add(version, root).unwrap();
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
        let root = keyring.with_root(1, |root| hex_encode(root.expose())).unwrap();
        assert!(!shown.contains(&root), "{shown}");
        assert!(shown.starts_with("Keyring"));
    }
}
