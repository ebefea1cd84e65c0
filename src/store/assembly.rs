//! Wiring the parts of a store together when it is created or opened.

use std::{path::PathBuf, sync::Arc};

use tracing::{info, warn};

use super::{
    anchor::{Anchor, AnchorPlace, Feeder},
    catalogue::{self, Catalogue, Journal, Loaded, load_newest},
    core::Core,
    env::StoreEnv,
    identity::ClaimedIdentity,
    keys::KeyService,
    lock::StoreLock,
    open_store::OpenStore,
    options::{Background, StoreOptions},
    registry::{Registry, Wiring},
    reserve::Reserve,
    scheduler::Scheduler,
    trusted_clock::TrustedClock,
};
use crate::{
    Error, Result,
    config::check_cmk,
    crypto::CryptoProvider,
    epoch::{EPOCH_MAX, Fence, FencedDisk},
    ids::StoreId,
    io::{Access, Clock, Disk, Random},
    keys::{
        audit::AuditLog,
        keyring::{Keyring, NewKeyring},
        keyring_file::KeyringFile,
        keyring_seal::KeyringSeal,
        service_key::ServiceKey,
    },
    kms::{Cmk, Kms, KmsRouter},
    metrics::Counters,
    shard::{Budget, Helpers, ReaderPermits},
};

/// The parts and the settings that the caller passes to create or open a store.
#[derive(Clone, Debug)]
pub(super) struct Setup {
    pub(super) dir: PathBuf,
    pub(super) keyring: PathBuf,
    pub(super) provider: Arc<dyn CryptoProvider>,
    pub(super) kms: Vec<Arc<dyn Kms>>,
    pub(super) service_cmk: Option<Cmk>,
    pub(super) anchor: Option<Arc<dyn Anchor>>,
    pub(super) without_anchor: bool,
    pub(super) accept_retired: bool,
    pub(super) disk: Arc<dyn Disk>,
    /// The whole disk. [`Setup::rooted`] narrows `disk` down to the directory of the store.
    pub(super) outside: Arc<dyn Disk>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) random: Arc<dyn Random>,
    pub(super) options: StoreOptions,
}

/// The audit log in the directory of the store.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Audit {
    /// The keyring authenticates it.
    Ours,
    /// A lost keyring authenticated it.
    Lost,
}

/// The state of a store that is about to open.
pub(super) struct Opening {
    pub(super) keyring: Keyring,
    pub(super) catalogue: Catalogue,
    /// `None` opens the store for reading.
    pub(super) writer: Option<(StoreLock, Fence, Arc<Reserve>)>,
    pub(super) audit: Audit,
    /// How many records of the catalogue the anchor lacks, in a store that is open for reading.
    pub(super) anchor_lacks: Option<u64>,
    /// Whether the master key of the keyring has a lease.
    pub(super) leased: bool,
}

impl Opening {
    pub(super) fn for_writing(
        keyring: Keyring,
        catalogue: Catalogue,
        held: StoreLock,
        fence: Fence,
        reserve: Arc<Reserve>,
    ) -> Self {
        Self { writer: Some((held, fence, reserve)), ..Self::for_reading(keyring, catalogue) }
    }

    pub(super) fn for_reading(keyring: Keyring, catalogue: Catalogue) -> Self {
        Self {
            keyring,
            catalogue,
            writer: None,
            audit: Audit::Ours,
            anchor_lacks: None,
            leased: true,
        }
    }
}

impl Setup {
    /// The copy that the anchor has of the store. `None` when there is no anchor, or when it is not
    /// used.
    ///
    /// # Errors
    /// [`Error::Anchor`] when the anchor cannot be read, or is missing.
    pub(super) fn load_anchor(&self, keyring: &Keyring) -> Result<Option<(AnchorPlace, Vec<u8>)>> {
        let unusable = |why: String| Error::Anchor { path: self.dir.clone(), why };
        match self.anchor.as_ref().map(|anchor| anchor.load(keyring.store())) {
            Some(Err(error)) if self.without_anchor => {
                warn!(store = %keyring.store(), %error, "anchor not readable, store opened without it");
                Ok(None)
            }
            Some(Err(error)) => Err(unusable(format!("it cannot be read: {error}"))),
            Some(Ok(None)) if keyring.is_anchored() && !self.without_anchor => {
                Err(unusable("it keeps nothing of this store".to_owned()))
            }
            // No writer has such an epoch, so the name is forged.
            Some(Ok(Some((place, _)))) if place.epoch >= EPOCH_MAX => Err(unusable(format!(
                "it keeps something under the epoch {}, which no writer has had",
                place.epoch
            ))),
            Some(Ok(kept)) => Ok(kept),
            None if keyring.is_anchored() && !self.without_anchor => {
                Err(unusable("none is configured".to_owned()))
            }
            None => Ok(None),
        }
    }

    pub(super) fn keyring_seal(&self) -> KeyringSeal {
        let inline = self.options.background == Background::Manual;
        let kms =
            KmsRouter::new(&self.kms, self.options.kms_timeout, inline, Arc::clone(&self.clock));
        KeyringSeal::new(Arc::clone(&self.provider), kms)
    }

    /// Refuses to write a store on a network file system, unless the options allow it.
    pub(super) fn check_file_system(&self) -> Result<()> {
        let found = self
            .disk
            .network_file_system(&self.dir)
            .map_err(Error::io("look at the file system of", &self.dir))?;
        match found.filter(|_| !self.options.allow_network_fs) {
            Some(kind) => Err(Error::NetworkFileSystem { path: self.dir.clone(), kind }),
            None => Ok(()),
        }
    }

    /// Who may access the files of the store.
    pub(super) fn access(&self) -> Access {
        if self.options.group_read { Access::GroupRead } else { Access::Owner }
    }

    /// The same store on the disk beneath its directory, which follows no symlink.
    pub(super) fn rooted(self) -> Result<Self> {
        let disk =
            self.disk.beneath(&self.dir, self.access()).map_err(|error| match error.kind() {
                std::io::ErrorKind::NotFound => Error::StoreMissing { path: self.dir.clone() },
                std::io::ErrorKind::NotADirectory => Error::NotAStore { path: self.dir.clone() },
                _ => Error::io("open", &self.dir)(error),
            })?;
        Ok(Self { disk, ..self })
    }

    /// As [`Setup::rooted`], for a store that is to be written: its disk can use the reserve.
    pub(super) fn rooted_for_writing(self) -> Result<(Self, Arc<Reserve>)> {
        let rooted = self.rooted()?;
        let reserve = Reserve::new(Arc::clone(&rooted.disk), &rooted.dir);
        Ok((Self { disk: reserve.disk(), ..rooted }, reserve))
    }

    /// The file of the keyring. It is outside the store, so it is located on the whole disk.
    pub(super) fn keyring_file(&self, outside: &dyn Disk) -> Result<Arc<KeyringFile>> {
        let access =
            if self.options.keyring_group_read { Access::GroupRead } else { Access::Owner };
        KeyringFile::locate(outside, &self.keyring, &self.dir, access).map(Arc::new)
    }

    pub(super) fn new_keyring(
        &self,
        file: &Arc<KeyringFile>,
        store: StoreId,
        now_us: u64,
    ) -> Result<NewKeyring> {
        if let Some(cmk) = &self.service_cmk {
            check_cmk(cmk)?;
        }
        let file = Arc::clone(file);
        Keyring::prepare(
            &*self.random,
            file,
            store,
            now_us,
            self.keyring_seal(),
            self.service_cmk.clone(),
        )
    }

    pub(super) fn load_keyring(
        &self,
        outside: &dyn Disk,
        identity: &ClaimedIdentity,
    ) -> Result<Keyring> {
        Keyring::load(
            self.keyring_file(outside)?,
            identity.store,
            identity.keyring,
            &self.keyring_seal(),
        )
    }

    /// Raises the writer epoch above that of every earlier writer and above `above`, and reads the
    /// catalogue that the last writer left.
    pub(super) fn take_over(
        &self,
        store: StoreId,
        keyring: &Keyring,
        above: u64,
    ) -> Result<(Fence, Loaded)> {
        let mut above = above.max(catalogue::newest_epoch(&*self.disk, &self.dir)?);
        loop {
            let fence = Fence::raise(&*self.disk, &self.dir, store, above, &*self.random)?;
            let found = load_newest(&*self.disk, &self.dir, store, keyring)?;
            if found.place.epoch < fence.epoch() {
                return Ok((fence, found));
            }
            // The epoch file was lost, or an older copy was put in its place.
            above = found.place.epoch;
        }
    }

    /// Wires the parts of a store together.
    pub(super) fn assemble(self, opening: Opening) -> Result<OpenStore> {
        let Opening { keyring, catalogue, writer, audit: found, anchor_lacks, leased } = opening;
        let id = keyring.store();
        let kms = keyring.seal().kms().clone();
        let counters = Arc::new(Counters::new(Arc::clone(kms.meter())));
        let service = ServiceKey::new(keyring, Arc::clone(&counters), writer.is_none());
        let service = Arc::new(service);
        let known = catalogue.audit.clone();
        let (held, fence, reserve) = match writer {
            Some((held, fence, reserve)) => (Some(held), Some(Arc::new(fence)), reserve),
            None => (None, None, Reserve::new(Arc::clone(&self.disk), &self.dir)),
        };
        let audit = AuditLog::new(
            Arc::clone(&self.disk),
            Arc::clone(&self.clock),
            Arc::clone(&service),
            self.dir.join("audit"),
            self.options.audit_file_bytes,
            Arc::clone(&counters),
            fence.clone(),
        );
        if found == Audit::Ours {
            audit.find_end(&known)?;
            if let Some(held) = &held {
                audit.make_durable(&known)?;
                if !held.is_clean() {
                    audit.begin_new_file();
                }
            }
        }
        let trusted = TrustedClock::new(&*self.clock, catalogue.retention.as_ref());
        let (disk, journal) = self.journal(id, &service, catalogue, fence.as_ref());
        if held.is_some() && found == Audit::Ours {
            // Before any shard is read: an earlier catalogue must not be in force any more.
            journal.rewrite()?;
        }
        let env = Arc::new(StoreEnv {
            id,
            read_only: held.is_none(),
            disk,
            reserve,
            outside: self.outside,
            trusted,
            dir: self.dir,
            options: self.options,
            clock: self.clock,
            random: self.random,
            provider: self.provider,
        });
        let anchor = self.anchor.filter(|_| held.is_some());
        let anchor = anchor
            .map(|anchor| Feeder::new(anchor, id, Arc::clone(&env.clock), Arc::clone(&counters)));
        let keys = KeyService::new(Arc::clone(&env), service, kms, counters, audit);
        warn_of_rotation(id, &keys.keyring());
        // Nothing after this point refuses to open the store, except a thread that does not start.
        let held = held.map(|mut held| {
            held.note_process();
            held
        });
        let wiring = wiring(&env, anchor)?;
        let registry =
            Registry::new(Arc::clone(&env), Arc::clone(&keys), journal, fence, held, wiring);
        if leased {
            registry.watch_service_key()?;
        }
        info!(store = %id, dir = %env.dir.display(), read_only = env.read_only, "store opened");
        Ok(OpenStore::new(Core { env, keys, registry }, anchor_lacks))
    }

    /// The journal of the catalogue, and the disk of the store. In a store that is open for
    /// writing, the disk checks the fence before each rename.
    fn journal(
        &self,
        id: StoreId,
        service: &Arc<ServiceKey>,
        catalogue: Catalogue,
        fence: Option<&Arc<Fence>>,
    ) -> (Arc<dyn Disk>, Journal) {
        let (disk, service) = (Arc::clone(&self.disk), Arc::clone(service));
        match fence {
            Some(fence) => {
                let disk: Arc<dyn Disk> = Arc::new(FencedDisk::new(disk, Arc::clone(fence)));
                let (on, fence) = (Arc::clone(&disk), Arc::clone(fence));
                (disk, Journal::for_writing(on, &self.dir, id, service, catalogue, fence))
            }
            None => {
                let journal =
                    Journal::for_reading(Arc::clone(&disk), &self.dir, id, service, catalogue);
                (disk, journal)
            }
        }
    }
}

/// The parts that the Logstores of a store share. Starts the threads of the store.
fn wiring(env: &StoreEnv, anchor: Option<Arc<Feeder>>) -> Result<Wiring> {
    let scheduler = Scheduler::new(Arc::clone(&env.clock));
    let helpers = Helpers::new(env.options.hash_payloads);
    if env.has_threads() {
        // A read-only opener needs a thread for its followers alone.
        let spawned = match env.read_only {
            true => scheduler.spawn(1),
            false => scheduler.spawn(env.options.workers).and_then(|()| helpers.spawn()),
        };
        spawned.map_err(Error::io("start threads for", &env.dir))?;
    }
    let budget = Budget::new(env.options.pending_bytes_max);
    let permits = ReaderPermits::new(env.options.readers_max, env.options.followers_max);
    Ok(Wiring { scheduler, budget, helpers, permits, anchor })
}

fn warn_of_rotation(store: StoreId, keyring: &Keyring) {
    if keyring.is_rotating() {
        let (accepts, newest) = (keyring.accepts(), keyring.newest());
        warn!(%store, accepts, newest, "service key rotation unfinished: `rotate_service_key` continues it");
    }
}
