//! Opening an existing store.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use tracing::warn;

use super::{
    anchor::AnchorPlace,
    anchoring,
    assembly::{Audit, Opening, Setup},
    catalogue::{self, Catalogue, load_newest},
    core::Core,
    creation::{self, Remains},
    identity::{ClaimedIdentity, identity_path, mend_identity, verify_identity, write_identity},
    keyring_loss::{self, RecoverProgress, RecoverReport, Recoverable},
    lock::StoreLock,
    logstores,
    open_store::OpenStore,
    reserve::Reserve,
};
use crate::{
    Error, Result,
    config::LogstoreName,
    epoch::Fence,
    ids::StoreId,
    keys::{AuditEvent, keyring::Keyring},
    kms::Cmk,
    segment::Features,
};

/// Opens a store for reading and writing.
pub(super) fn open(setup: Setup) -> Result<OpenStore> {
    setup.options.check()?;
    if setup.accept_retired {
        let what =
            "a store that accepts retired versions of the service key is opened read-only alone";
        return Err(Error::InvalidArgument(what.to_owned()));
    }
    let outside = Arc::clone(&setup.disk);
    let (setup, reserve) = setup.rooted_for_writing()?;
    let identity = claimed_identity(&setup)?;
    check_writing(&identity.features, &identity_path(&setup.dir))?;
    setup.check_file_system()?;
    let held = StoreLock::take(&*setup.disk, &setup.dir)?;
    let mut keyring = setup.load_keyring(&*outside, &identity)?;
    check_writing(keyring.features(), keyring.path())?;
    verify_identity(&*setup.disk, &setup.dir, &keyring)?;
    // The directory is an authentic store. Nothing in it is written before this point.
    let _borrowed = reserve.borrow();
    let held = match held {
        Some(held) => held,
        None => {
            let held = StoreLock::take_or_create(&*setup.disk, &setup.dir)?;
            if keyring.is_outdated()? {
                keyring = keyring.reload()?;
            }
            verify_identity(&*setup.disk, &setup.dir, &keyring)?;
            held
        }
    };
    creation::create_missing_directories(&*setup.disk, &setup.dir)?;
    // Syncs the directory, because an earlier process may have died between a rename and its
    // sync.
    setup.disk.sync_dir(&setup.dir).map_err(Error::io("sync", &setup.dir))?;
    let kept = setup.load_anchor(&keyring)?;
    let above = kept.as_ref().map_or(0, |(place, _)| place.epoch);
    let (fence, found) = setup.take_over(identity.store, &keyring, above)?;
    check_writing(&found.features, &found.path)?;
    compare_with_anchor(&setup, &keyring, &found.catalogue, kept.as_ref())?;
    if keyring.newest() > found.keyring_version {
        keyring.file().sync_name()?;
    }
    keyring.file().remove_leftovers();
    if let Err(error) = mend_identity(&*setup.disk, &setup.dir, &keyring) {
        warn!(%error, "second copy of STORE not written");
    }
    creation::forget(&*setup.disk, &setup.dir);
    let without_anchor = setup.without_anchor;
    let opening = Opening::for_writing(keyring, found.catalogue, held, fence, Arc::clone(&reserve));
    let store = setup.assemble(opening)?;
    anchoring::begin(store.core(), without_anchor)?;
    logstores::clean_up(store.core())?;
    store.core().tend_reserve();
    Ok(store)
}

/// Opens a store for reading.
pub(super) fn open_read_only(setup: Setup) -> Result<OpenStore> {
    setup.options.check()?;
    let outside = Arc::clone(&setup.disk);
    let setup = setup.rooted()?;
    let identity = claimed_identity(&setup)?;
    let mut keyring = setup.load_keyring(&*outside, &identity)?;
    if setup.accept_retired {
        keyring.accept_retired();
    }
    verify_identity(&*setup.disk, &setup.dir, &keyring)?;
    // Read before the catalogue, which a writer may change in between: the anchor then never
    // has records that the catalogue lacks.
    let kept = match &setup.anchor {
        Some(_) => setup.load_anchor(&keyring)?,
        None => None,
    };
    let found = load_newest(&*setup.disk, &setup.dir, identity.store, &keyring)?;
    let kept = compare_with_anchor(&setup, &keyring, &found.catalogue, kept.as_ref())?;
    let reached = found.catalogue.generation;
    let anchor_lacks = kept.map(|kept| reached.saturating_sub(kept));
    setup.assemble(Opening { anchor_lacks, ..Opening::for_reading(keyring, found.catalogue) })
}

/// Lists the Logstores that [`recover_without_keyring`] may recover.
pub(super) fn recoverable(setup: Setup) -> Result<Vec<Recoverable>> {
    let outside = Arc::clone(&setup.disk);
    let setup = setup.rooted()?;
    let identity = claimed_identity(&setup)?;
    let keyring = setup.keyring_file(&*outside)?;
    if keyring.exists()? {
        return Err(Error::KeyringExists { path: keyring.path().to_owned() });
    }
    keyring_loss::recoverable(&*setup.disk, &setup.dir, identity.store)
}

/// Opens a store with a new keyring, and recovers the expected Logstores.
pub(super) fn recover_without_keyring(
    setup: Setup,
    expected: &BTreeMap<LogstoreName, Cmk>,
    progress: &mut dyn FnMut(&RecoverProgress),
) -> Result<(OpenStore, RecoverReport)> {
    setup.options.check()?;
    let outside = Arc::clone(&setup.disk);
    let (setup, reserve) = setup.rooted_for_writing()?;
    let identity = claimed_identity(&setup)?;
    check_writing(&identity.features, &identity_path(&setup.dir))?;
    setup.check_file_system()?;
    let held = StoreLock::take_or_create(&*setup.disk, &setup.dir)?;
    let now_us = setup.clock.wall_us();
    let file = setup.keyring_file(&*outside)?;
    let keyring = setup.new_keyring(&file, identity.store, now_us)?.write()?;
    // Until the new STORE file is in place, the old one names the old keyring, so an
    // interrupted recovery can start again.
    let recover = |core: &Core| keyring_loss::recover_logstores(core, expected, progress);
    let writer = (held, reserve);
    let recovered = recover_with(setup, writer, keyring, identity.store, now_us, recover);
    if recovered.is_err() {
        // Nothing depends on the new keyring yet.
        let _ = file.remove();
    }
    recovered
}

fn recover_with(
    setup: Setup,
    (held, reserve): (StoreLock, Arc<Reserve>),
    keyring: Keyring,
    id: StoreId,
    now_us: u64,
    recover: impl FnOnce(&Core) -> Result<RecoverReport>,
) -> Result<(OpenStore, RecoverReport)> {
    let (disk, dir) = (Arc::clone(&setup.disk), setup.dir.clone());
    let above = catalogue::newest_epoch(&*disk, &dir)?;
    let fence = Fence::raise(&*disk, &dir, id, above, &*setup.random)?;
    let catalogue = Catalogue { generation: 1, ..Catalogue::default() };
    let opening = Opening::for_writing(keyring, catalogue, held, fence, reserve);
    let opening = Opening { audit: Audit::Lost, ..opening };
    let store = setup.assemble(opening)?;
    let Core { keys, registry, .. } = store.core();
    let report = recover(store.core()).inspect_err(|error| {
        // The catalogue stays under the old keyring, which may still be found. The new keyring
        // is discarded.
        registry.exclusive().latch(error.clone());
    })?;
    write_identity(&*disk, &dir, id, &keys.keyring(), now_us)?;
    keys.audit().record(AuditEvent::KeyringReplaced, None, "")?;
    anchoring::begin(store.core(), false)?;
    store.core().tend_reserve();
    Ok((store, report))
}

/// Reads the `STORE` file without a key.
///
/// # Errors
/// [`Error::StoreMissing`], [`Error::NotAStore`], and as [`ClaimedIdentity::read`].
fn claimed_identity(setup: &Setup) -> Result<ClaimedIdentity> {
    match ClaimedIdentity::read(&*setup.disk, &setup.dir)? {
        Some(identity) => Ok(identity),
        None => {
            Remains::look(&*setup.disk, &setup.dir)?;
            Err(Error::StoreMissing { path: setup.dir.clone() })
        }
    }
}

/// Compares the store with the copy in its anchor, before anything in the store is changed.
/// Returns the number of the last record in that copy.
///
/// # Errors
/// [`Error::RolledBack`]; the integrity errors of the copy.
fn compare_with_anchor(
    setup: &Setup,
    keyring: &Keyring,
    catalogue: &Catalogue,
    kept: Option<&(AnchorPlace, Vec<u8>)>,
) -> Result<Option<u64>> {
    let (Some(anchor), Some((place, kept))) =
        (&setup.anchor, kept.filter(|_| !setup.without_anchor))
    else {
        return Ok(None);
    };
    let path = anchor.name_of(keyring.store(), *place);
    let kept = catalogue::load_mirror(kept, &path, keyring.store(), keyring)?;
    let reader = Setup { anchor: None, ..setup.clone() };
    let opening = Opening::for_reading(keyring.clone(), catalogue.clone());
    // It lives as long as this comparison.
    let reader = reader.assemble(Opening { leased: false, ..opening })?;
    anchoring::check(reader.core(), &kept)?;
    Ok(Some(kept.generation))
}

fn check_writing(features: &Features, path: &Path) -> Result<()> {
    features.check_writing().map_err(|error| error.in_file(path, 0))
}
