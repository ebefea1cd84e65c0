//! The probes: a small random key for each master key, which the KMS unwraps to renew the lease.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use tracing::warn;

use super::{KeyService, KmsOrEngine};
use crate::{
    Error, Result,
    config::check_cmk,
    crypto::{HashAlg, SecretKey, hash},
    document::{self, DOCUMENT_BYTES_MAX, Document, DocumentKind},
    error::Location,
    ids::{LogstoreId, hex_decode, hex_encode},
    io::{self, Existing, FileKind, is_temporary},
    keys::{
        envelope::{EnvelopeIdentity, KeysSection, fingerprint},
        lease::Probe,
    },
    kms::{Cmk, EncryptionContext},
};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ProbeBody {
    kms: String,
    cmk: Cmk,
    wrapped: String,
    fingerprint: String,
}

/// The contents of a probe file.
pub(crate) struct ProbeFile {
    kms: String,
    cmk: Cmk,
    wrapped: Vec<u8>,
    fingerprint: String,
    generation: u64,
}

impl ProbeFile {
    pub(crate) fn cmk(&self) -> &Cmk {
        &self.cmk
    }
}

/// A probe that was wrapped again at the KMS and is not written yet.
pub(crate) struct RewrappedProbe {
    /// The version of the master key that wraps now, if the KMS reports it.
    pub(crate) cmk_version: Option<String>,
    /// `None` if the existing probe is under this version already.
    pub(crate) new: Option<ProbeFile>,
}

impl KeyService {
    fn probe_path(&self, id: [u8; 16]) -> PathBuf {
        self.env.probes_dir().join(hex_encode(&id))
    }

    /// The id of the probe of a master key at a KMS, which is also the name of its file.
    fn probe_id(&self, kms: &str, cmk: &Cmk) -> [u8; 16] {
        let mut id = [0; 16];
        let field = |text: &str| [&(text.len() as u32).to_le_bytes(), text.as_bytes()].concat();
        let digest = hash(
            HashAlg::Sha256,
            &[
                self.env.id.as_bytes(),
                &field(kms),
                &field(&cmk.region_id),
                &field(&cmk.arn),
                &field(&cmk.cmk_key_id),
            ],
        );
        id.copy_from_slice(&digest[..16]);
        id
    }

    fn probe_context(&self) -> EncryptionContext {
        EncryptionContext::from([
            ("envelog:store".to_owned(), self.env.id.to_string()),
            ("envelog:purpose".to_owned(), "probe".to_owned()),
        ])
    }

    /// The files that have the name of a probe.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn probe_paths(&self) -> Result<Vec<PathBuf>> {
        let dir = self.env.probes_dir();
        let entries = match self.env.disk.list_dir(&dir) {
            // A reader creates no directory.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            entries => entries.map_err(Error::io("list", &dir))?,
        };
        let files = entries.iter().filter(|entry| is_probe(&entry.name));
        Ok(files.map(|entry| dir.join(&entry.name)).collect())
    }

    /// The probe of a master key. `None` if no KMS serves its region, or if there is no probe yet.
    ///
    /// # Errors
    /// [`Error::Io`], and the integrity errors of the file.
    pub(crate) fn load_probe(&self, cmk: &Cmk) -> Result<Option<Probe>> {
        let Ok(kms) = self.kms.serving(&cmk.region_id) else { return Ok(None) };
        let path = self.probe_path(self.probe_id(kms.name(), cmk));
        let found = match self.read_probe(&path) {
            Err(error) if error.is_not_found() => return Ok(None),
            found => found?,
        };
        if found.kms != kms.name() || found.cmk != *cmk {
            return Err(Error::Tampered {
                at: Location::new(&path, 0),
                what: "the probe of another master key",
            });
        }
        Ok(Some(self.probe(&found)))
    }

    /// As [`KeyService::load_probe`], but a damaged probe is none: the envelopes take its place.
    ///
    /// # Errors
    /// [`Error::Io`], and the integrity errors of a probe that was forged or exchanged.
    pub(super) fn usable_probe(&self, cmk: &Cmk) -> Result<Option<Probe>> {
        match self.load_probe(cmk) {
            Err(error) if error.is_loss() => {
                warn!(key = %cmk.cmk_key_id, %error, "probe damaged; an envelope takes its place");
                Ok(None)
            }
            found => found,
        }
    }

    fn probe(&self, file: &ProbeFile) -> Probe {
        let (wrapped, fingerprint) = (file.wrapped.clone(), file.fingerprint.clone());
        Probe { wrapped, context: self.probe_context(), fingerprint }
    }

    /// Reads a probe from its file. The name of the file must be the id of the probe.
    ///
    /// # Errors
    /// [`Error::Io`], and the integrity errors of the file.
    pub(crate) fn read_probe(&self, path: &Path) -> Result<ProbeFile> {
        let document = self.with_keyring(|keyring| {
            let bytes = io::read_file(&*self.env.disk, path, DOCUMENT_BYTES_MAX)
                .map_err(Error::io("read", path))?;
            document::open(&bytes, DocumentKind::Probe, path, |version| {
                keyring.document_key(version)
            })
        })?;
        let malformed = || Error::corrupt(Location::new(path, 80), "the probe does not parse");
        let ProbeBody { kms, cmk, wrapped, fingerprint } =
            serde_json::from_slice(&document.a).map_err(|_| malformed())?;
        let id = self.probe_id(&kms, &cmk);
        if document.store != self.env.id || document.subject != id || self.probe_path(id) != path {
            return Err(Error::Tampered {
                at: Location::new(path, 0),
                what: "the probe of another master key",
            });
        }
        let wrapped =
            hex_decode(&wrapped).filter(|wrapped| !wrapped.is_empty()).ok_or_else(malformed)?;
        if check_cmk(&cmk).is_err()
            || hex_decode(&fingerprint).is_none_or(|bytes| bytes.len() != 16)
        {
            return Err(malformed());
        }
        Ok(ProbeFile { kms, cmk, wrapped, fingerprint, generation: document.generation })
    }

    /// The version of the master key that wraps a probe, if the KMS reports it.
    pub(crate) fn probe_version(&self, probe: &ProbeFile) -> Option<String> {
        self.cmk_version(&probe.cmk, &probe.wrapped)
    }

    /// Makes the probe of a master key at the KMS, if there is none yet. Writes nothing.
    ///
    /// # Errors
    /// The error of the KMS, [`Error::Io`], and the integrity errors of the existing probe.
    pub(crate) fn new_probe(
        &self,
        cmk: &Cmk,
    ) -> std::result::Result<Option<ProbeFile>, KmsOrEngine> {
        let kms = self.serving(cmk)?;
        if self.usable_probe(cmk)?.is_some() {
            return Ok(None);
        }
        let secret = self.draw_probe_key()?;
        let wrapped = kms.wrap(cmk, self.probe_context(), &secret).map_err(KmsOrEngine::Kms)?;
        let (kms, fingerprint) = (kms.name().to_owned(), fingerprint(&secret));
        Ok(Some(ProbeFile { kms, cmk: cmk.clone(), wrapped, fingerprint, generation: 1 }))
    }

    /// Writes a new probe, unless another operation has written one for the same master key. The
    /// caller holds the administration.
    ///
    /// # Errors
    /// [`Error::Io`], and the integrity errors of the existing probe.
    pub(crate) fn add_probe(&self, probe: ProbeFile) -> Result<()> {
        match self.usable_probe(&probe.cmk)? {
            Some(_) => Ok(()),
            None => self.write_probe(probe),
        }
    }

    fn draw_probe_key(&self) -> Result<SecretKey> {
        SecretKey::generate(&*self.env.random)
            .map_err(Error::io("draw a random key for", self.env.probes_dir()))
    }

    fn write_probe(&self, probe: ProbeFile) -> Result<()> {
        let id = self.probe_id(&probe.kms, &probe.cmk);
        let path = self.probe_path(id);
        let ProbeFile { kms, cmk, wrapped, fingerprint, generation } = probe;
        let body = ProbeBody { kms, cmk, wrapped: hex_encode(&wrapped), fingerprint };
        let keyring = self.keyring();
        let version = keyring.newest();
        let document = Document {
            subject: id,
            ..Document::new(DocumentKind::Probe, self.env.id, generation, version, &body)
        };
        let bytes = document.seal(&keyring.document_key(version)?);
        io::write_file(&*self.env.disk, &path, &bytes, Existing::Replace)
            .map_err(Error::io("write", &path))
    }

    /// An envelope of a Logstore in the place of a probe.
    ///
    /// # Errors
    /// [`Error::Corrupt`] if no envelope is left.
    pub(super) fn envelope_probe(&self, section: &KeysSection, id: LogstoreId) -> Result<Probe> {
        let entry = section.versions.iter().rev().find(|entry| entry.wrapped.is_some());
        let wrapped = entry.and_then(|entry| Some((entry, hex_decode(entry.wrapped.as_deref()?)?)));
        let Some((entry, wrapped)) = wrapped else {
            let what = format!("no envelope of Logstore {} can be used", section.name);
            return Err(Error::corrupt(Location::new(self.env.logstore_dir(id), 0), what));
        };
        let identity = EnvelopeIdentity {
            store: self.env.id,
            logstore: id,
            version: entry.version,
            suite: section.encrypt_type.suite(),
        };
        Ok(Probe { wrapped, context: identity.context(), fingerprint: entry.fingerprint.clone() })
    }

    /// Wraps the probe of a master key again at the KMS, or wraps a new one if there is none.
    /// Writes nothing.
    ///
    /// # Errors
    /// The error of the KMS, [`Error::Io`], and the integrity errors of the existing probe.
    pub(crate) fn rewrap_probe(
        &self,
        cmk: &Cmk,
    ) -> std::result::Result<RewrappedProbe, KmsOrEngine> {
        let kms = &self.serving(cmk)?;
        let path = self.probe_path(self.probe_id(kms.name(), cmk));
        let found = match self.read_probe(&path) {
            Err(error) if error.is_not_found() || error.is_loss() => None,
            found => Some(found?),
        };
        let (secret, generation) = match &found {
            Some(found) => {
                let secret = kms
                    .unwrap(cmk, self.probe_context(), &found.wrapped)
                    .map_err(KmsOrEngine::Kms)?;
                if fingerprint(&secret) != found.fingerprint {
                    return Err(KmsOrEngine::invalid("it unwrapped the probe to another key"));
                }
                (secret, found.generation.saturating_add(1))
            }
            None => (self.draw_probe_key()?, 1),
        };
        let wrapped = self.wrap_proved(kms, cmk, self.probe_context(), &secret)?;
        let cmk_version = self.cmk_version(cmk, &wrapped);
        if let Some(found) = &found
            && cmk_version.is_some()
            && self.probe_version(found) == cmk_version
        {
            return Ok(RewrappedProbe { cmk_version, new: None });
        }
        let (kms, fingerprint) = (kms.name().to_owned(), fingerprint(&secret));
        let new = ProbeFile { kms, cmk: cmk.clone(), wrapped, fingerprint, generation };
        Ok(RewrappedProbe { cmk_version, new: Some(new) })
    }

    /// Writes a rewrapped probe and renews the lease with it. The caller holds the administration:
    /// a rotation of the service key also writes the probes, and would otherwise replace this
    /// probe by the older one that it has read.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn put_probe(&self, probe: ProbeFile) -> Result<()> {
        let (cmk, renewed) = (probe.cmk.clone(), self.probe(&probe));
        self.write_probe(probe)?;
        self.renew_with(&cmk, renewed);
        Ok(())
    }

    /// Writes all probes under the newest version of the service key. `written` counts them. An
    /// error does not stop the run. The caller holds the administration.
    ///
    /// # Errors
    /// The first error.
    pub(crate) fn rewrite_probes(&self, written: &mut u64) -> Result<()> {
        let dir = self.env.probes_dir();
        let mut result = Ok(());
        for entry in self.env.disk.list_dir(&dir).map_err(Error::io("list", &dir))? {
            if entry.kind != FileKind::File || !is_probe(&entry.name) {
                continue;
            }
            let rewritten = self.read_probe(&dir.join(&entry.name)).and_then(|mut probe| {
                probe.generation = probe.generation.saturating_add(1);
                self.write_probe(probe)
            });
            *written += u64::from(rewritten.is_ok());
            result = result.and(rewritten);
        }
        result
    }

    /// Removes the probes, which a lost keyring has authenticated. The envelopes of the Logstores
    /// take their place.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn remove_probes(&self) -> Result<()> {
        let dir = self.env.probes_dir();
        for entry in self.env.disk.list_dir(&dir).map_err(Error::io("list", &dir))? {
            let stem = entry.name.split('.').next().unwrap_or_default();
            let ours = is_probe(&entry.name) || (is_probe(stem) && is_temporary(&entry.name, stem));
            if entry.kind != FileKind::File || !ours {
                continue;
            }
            let path = dir.join(&entry.name);
            self.env.disk.remove_file(&path).map_err(Error::io("remove", &path))?;
        }
        Ok(())
    }
}

/// Whether a file name is the name of a probe.
fn is_probe(name: &str) -> bool {
    hex_decode(name).is_some_and(|id| id.len() == 16)
}
