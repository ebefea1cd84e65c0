//! The anchor: a store that is older or shorter than its anchor is detected, and a failing anchor
//! does not stop the store.

#![allow(clippy::unwrap_used)]

mod common;

use std::{
    collections::BTreeMap,
    fs, io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use common::{
    disk::{Sim, Survives, Verdict},
    *,
};
use envelog::{
    Error, LogstoreSpec, Result, Store, StoreBuilder,
    admin::{Anchor, AnchorPlace, DirAnchor},
    audit::AuditEvent,
    ids::StoreId,
};

const NAME: &str = "p/l";

type AllKept = BTreeMap<StoreId, (AnchorPlace, Vec<u8>)>;

/// An in-memory anchor that fails on request.
#[derive(Clone, Debug, Default)]
struct MemoryAnchor {
    kept: Arc<Mutex<AllKept>>,
    fails: Arc<AtomicBool>,
}

impl MemoryAnchor {
    fn reach(&self) -> io::Result<()> {
        match self.fails.load(Ordering::SeqCst) {
            true => Err(io::Error::other("the anchor is out of reach")),
            false => Ok(()),
        }
    }

    fn fail(&self, fails: bool) {
        self.fails.store(fails, Ordering::SeqCst);
    }

    fn bytes(&self) -> usize {
        self.kept.lock().unwrap().values().map(|(_, bytes)| bytes.len()).sum()
    }
}

impl Anchor for MemoryAnchor {
    fn load(&self, store: StoreId) -> io::Result<Option<(AnchorPlace, Vec<u8>)>> {
        self.reach()?;
        Ok(self.kept.lock().unwrap().get(&store).cloned())
    }

    fn replace(&self, store: StoreId, place: AnchorPlace, bytes: &[u8]) -> io::Result<()> {
        self.reach()?;
        let before = self.kept.lock().unwrap().insert(store, (place, bytes.to_vec()));
        assert!(before.is_none_or(|(before, _)| before <= place));
        Ok(())
    }

    fn append(&self, store: StoreId, place: AnchorPlace, len: u64, bytes: &[u8]) -> io::Result<()> {
        self.reach()?;
        let mut kept = self.kept.lock().unwrap();
        let (kept_place, kept) = kept.get_mut(&store).unwrap();
        assert_eq!((*kept_place, kept.len() as u64), (place, len));
        kept.extend_from_slice(bytes);
        Ok(())
    }
}

fn is_rolled_back(result: &Result<Store>) -> bool {
    matches!(result, Err(Error::RolledBack { .. }))
}

#[test]
fn a_whole_older_store_put_back_is_rolled_back() {
    let world = World::manual();
    let anchors = tempfile::tempdir().unwrap();
    let anchored = || world.builder().anchor(Arc::new(DirAnchor::new(anchors.path())));
    let store = anchored().create().unwrap();
    let logstore = world.service(&store, NAME);
    put(&logstore, "first");
    store.close().unwrap();
    let old = tempfile::tempdir().unwrap();
    copy_dir(&world.store_dir(), old.path());
    let store = anchored().open().unwrap();
    put(&store.logstore(&name(NAME)).unwrap(), "second");
    assert_eq!(store.admin().anchor_status().behind, None);
    store.close().unwrap();
    let status = anchored().open_read_only().unwrap().admin().anchor_status();
    assert_eq!((status.configured, status.records_behind), (true, Some(0)));

    copy_dir(old.path(), &world.store_dir());
    let before = files(&world.store_dir());
    assert!(is_rolled_back(&anchored().open()));
    assert!(is_rolled_back(&anchored().open_read_only()));
    let untouched = |path: &Path| !path.ends_with("EPOCH");
    let changed: Vec<_> =
        files(&world.store_dir()).into_iter().filter(|(path, _)| untouched(path)).collect();
    assert_eq!(changed, before.into_iter().filter(|(path, _)| untouched(path)).collect::<Vec<_>>());
    // The store can be read without the anchor, and written only with an explicit option.
    assert_eq!(
        texts(&world.builder().open_read_only().unwrap().logstore(&name(NAME)).unwrap()),
        ["first"]
    );
    let error = world.builder().open().unwrap_err();
    assert!(matches!(error, Error::Anchor { .. }), "{error:?}");
    let store = world.builder().without_anchor().open().unwrap();
    let records = store.keys().audit_records().unwrap();
    assert_eq!(records.last().unwrap().event, AuditEvent::OpenedWithoutAnchor);
    // A diverging history that is longer than the anchor's.
    let logstore = store.logstore(&name(NAME)).unwrap();
    for number in 0..20 {
        put(&logstore, &format!("fork {number}"));
        logstore.roll().unwrap();
    }
    store.close().unwrap();
    assert!(is_rolled_back(&anchored().open()));
}

#[test]
fn sealed_segments_cannot_be_cut_with_an_older_catalogue() {
    let mut world = World::manual();
    world.options.segment_bytes = 4096;
    let anchor = MemoryAnchor::default();
    let anchored = |world: &World| world.builder().anchor(Arc::new(anchor.clone()));
    let store = anchored(&world).create().unwrap();
    let logstore = world.service(&store, NAME);
    put(&logstore, "first");
    let catalogue = tempfile::tempdir().unwrap();
    copy_dir(&world.store_dir().join("catalogue"), catalogue.path());
    for number in 0..6 {
        put(&logstore, &format!("{number} {}", noise(number, 3000)));
    }
    let all = segments(&world.logstore_dir(&logstore), 0);
    assert!(all.len() >= 3, "{all:?}");
    // Simulates a kill of the process.
    std::mem::forget(store);
    for segment in &all[1..] {
        fs::remove_file(segment).unwrap();
    }
    let opened = |builder: StoreBuilder| {
        builder.open_read_only().and_then(|store| try_texts(&store.logstore(&name(NAME))?))
    };
    let error = opened(world.builder()).unwrap_err();
    assert!(matches!(error, Error::Truncated { .. }), "the catalogue alone tells: {error:?}");
    copy_dir(catalogue.path(), &world.store_dir().join("catalogue"));
    assert!(
        opened(world.builder()).unwrap().len() < 6,
        "without an anchor, an older catalogue hides it"
    );
    assert!(matches!(opened(anchored(&world)), Err(Error::RolledBack { .. })));
}

#[test]
fn what_was_deleted_or_dropped_is_no_rollback() {
    let mut world = World::manual();
    world.options.segment_bytes = 4096;
    let anchor = MemoryAnchor::default();
    let anchored = |world: &World| world.builder().anchor(Arc::new(anchor.clone()));
    let store = anchored(&world).create().unwrap();
    for text in [NAME, "p/gone", "p/plain"] {
        let logstore = match text {
            "p/plain" => store.create_logstore(&name(text), LogstoreSpec::default()).unwrap(),
            _ => world.service(&store, text),
        };
        (0..4).for_each(|number| put(&logstore, &format!("{number} {}", noise(number, 3000))));
    }
    store.close().unwrap();
    // This opening does not update the anchor.
    let store = world.builder().without_anchor().open().unwrap();
    store.delete_logstore(&name("p/gone")).unwrap();
    store.delete_logstore(&name("p/plain")).unwrap();
    store.create_logstore(&name("p/plain"), LogstoreSpec::default()).unwrap();
    let mut config = store.logstore(&name(NAME)).unwrap().config();
    config.retention_bytes = Some(1);
    store.update_logstore(&name(NAME), config).unwrap();
    put(&store.logstore(&name(NAME)).unwrap(), "newest");
    assert!(store.admin().apply_retention().unwrap().segments > 0);
    store.close().unwrap();
    let store = anchored(&world).open().unwrap();
    assert_eq!(store.admin().anchor_status().behind, None);
    store.close().unwrap();
}

#[test]
fn an_anchor_that_is_missing_or_empty_is_an_error_of_its_own() {
    let world = World::manual();
    let anchor = MemoryAnchor::default();
    let anchored = || world.builder().anchor(Arc::new(anchor.clone()));
    // The first update of an anchor must succeed.
    world.create().close().unwrap();
    anchor.fail(true);
    let is_anchor_error = |result: Result<Store>| match result {
        Err(Error::Anchor { why, .. }) => why,
        other => panic!("{other:?}"),
    };
    assert!(is_anchor_error(anchored().open()).contains("cannot be read"));
    anchor.fail(false);
    anchored().open().unwrap().close().unwrap();
    assert!(is_anchor_error(world.builder().open()).contains("none is configured"));
    anchor.fail(true);
    assert!(is_anchor_error(anchored().open()).contains("cannot be read"));
    anchor.fail(false);
    anchor.kept.lock().unwrap().clear();
    assert!(is_anchor_error(anchored().open()).contains("keeps nothing"));
    world.builder().open_read_only().unwrap();
    world.builder().without_anchor().open().unwrap().close().unwrap();
}

#[test]
fn an_anchor_that_fails_stops_nothing_unless_it_is_required() {
    let mut world = World::manual();
    let anchor = MemoryAnchor::default();
    world.options.anchor_required = Some(secs(60));
    let store = world.builder().anchor(Arc::new(anchor.clone())).create().unwrap();
    let logstore = world.service(&store, NAME);
    let kept = anchor.bytes();
    anchor.fail(true);
    put(&logstore, "first");
    world.clock.advance(secs(11));
    store.tick();
    let status = store.admin().anchor_status();
    assert!(status.behind.is_some() && status.error.unwrap().contains("out of reach"));
    assert!(store.metrics().anchor_failures > 0);
    put(&logstore, "second");
    world.clock.advance(secs(61));
    store.tick();
    let error = try_put(&logstore, "third").unwrap_err();
    assert!(matches!(error, Error::AnchorBehind { .. }), "{error:?}");
    assert_eq!(texts(&logstore), ["first", "second"]);
    assert_eq!(anchor.bytes(), kept);
    anchor.fail(false);
    world.clock.advance(secs(31));
    store.tick();
    assert_eq!(store.admin().anchor_status().behind, None);
    put(&logstore, "third");
    assert!(anchor.bytes() > kept);
    store.close().unwrap();
    world.builder().anchor(Arc::new(anchor.clone())).open().unwrap().close().unwrap();
}

#[test]
fn threads_feed_the_anchor() {
    let mut world = World::threads();
    world.options.segment_bytes = 4096;
    let anchors = tempfile::tempdir().unwrap();
    let anchored = || world.builder().anchor(Arc::new(DirAnchor::new(anchors.path())));
    let store = anchored().create().unwrap();
    let logstore = world.service(&store, NAME);
    for number in 0..20 {
        put(&logstore, &format!("{number} {}", noise(number, 3000)));
    }
    eventually("the anchor is up to date", || store.admin().anchor_status().behind.is_none());
    store.close().unwrap();
    let store = anchored().open().unwrap();
    assert_eq!(texts(&store.logstore(&name(NAME)).unwrap()).len(), 20);
    store.close().unwrap();
}

/// The anchor never records more than the store's durable state: after a power loss at any
/// operation, the store opens with its anchor.
#[test]
fn the_anchor_is_fed_after_the_store_is_synced() {
    let mut sim = Sim::new();
    sim.world.options.segment_bytes = 4096;
    let anchor = MemoryAnchor::default();
    let store = sim.builder().anchor(Arc::new(anchor.clone())).create().unwrap();
    put(&sim.world.service(&store, NAME), "before");
    store.close().unwrap();
    let (image, mut world, kept) = (sim.disk, sim.world, anchor.kept.lock().unwrap().clone());
    for nth in 1.. {
        let sim = Sim::of(world, image.fork());
        let anchor =
            MemoryAnchor { kept: Arc::new(Mutex::new(kept.clone())), ..MemoryAnchor::default() };
        let began = sim.disk.changes();
        // The power loss also affects the updates of the anchor.
        let fed = anchor.clone();
        sim.disk.on_call(move |call| match call.op.changes() && call.number >= began + nth {
            true => {
                fed.fail(true);
                Verdict::Fail(io::ErrorKind::Other)
            }
            false => Verdict::Go,
        });
        let run = || -> Result<()> {
            let store = sim.builder().anchor(Arc::new(anchor.clone())).open()?;
            let logstore = store.logstore(&name(NAME))?;
            for number in 0..3 {
                try_put(&logstore, &format!("{number} {}", noise(number, 3000)))?;
            }
            sim.world.clock.advance(secs(11));
            store.tick();
            store.create_logstore(&name("p/new"), LogstoreSpec::default())?;
            store.close()
        };
        let done = run();
        let ended = sim.disk.changes() - began >= nth;
        anchor.fail(false);
        let after = sim.disk.crash(Survives::Synced);
        let builder = sim.world.builder().disk(Arc::new(after)).anchor(Arc::new(anchor.clone()));
        let store = builder
            .open()
            .unwrap_or_else(|error| panic!("the power failed at operation {nth}: {error}"));
        store.close().unwrap();
        world = sim.world;
        if !ended {
            done.unwrap();
            break;
        }
    }
}

/// If recording an idle shard's head in the catalogue fails, the next run of the job records it.
#[test]
fn a_head_that_could_not_be_noted_is_noted_later() {
    let sim = Sim::new();
    let store = sim.create();
    let logstore = sim.world.service(&store, NAME);
    put(&logstore, "first");
    let noted = || {
        let files = sim.disk.files(&sim.world.store_dir().join("catalogue"));
        files
            .into_values()
            .any(|bytes| contains(&bytes, b"\"reached\"") || contains(&bytes, b"\"head\""))
    };
    assert!(!noted());
    sim.disk.on_call(|call| match call.op.changes() && call.is_about("catalogue") {
        true => Verdict::Refuse(io::ErrorKind::StorageFull),
        false => Verdict::Go,
    });
    sim.world.clock.advance(secs(11));
    store.tick();
    sim.disk.heal();
    assert!(!noted());
    sim.world.clock.advance(secs(11));
    store.tick();
    assert!(noted());
    drop(store);
}

fn contains(bytes: &[u8], what: &[u8]) -> bool {
    bytes.windows(what.len()).any(|window| window == what)
}
