//! Consumer groups: their settings and checkpoints, which are durable, and their consumers, which
//! make themselves known again after a start.

mod api;
mod assign;
mod progress;
mod readable;

pub(crate) use api::route;
pub(crate) use progress::{GroupProgress, ShardProgress};

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use envelog::Logstore;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use self::assign::Assignment;
use crate::{
    cursors::Cursors,
    error::{ApiError, Result},
    projects::OpenError,
    state::StateDir,
};

/// The most groups of a Logstore.
const GROUPS_MAX: usize = 30;
/// The longest checkpoint, in bytes.
const CHECKPOINT_BYTES_MAX: usize = 1024;

/// The part of a group that is durable.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Document {
    name: String,
    timeout_s: f64,
    /// Whether a shard is read only after those from which it was split or merged.
    order: bool,
    /// By shard.
    checkpoints: BTreeMap<u32, Checkpoint>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Checkpoint {
    cursor: String,
    /// In microseconds since the Unix epoch.
    updated_us: u64,
}

/// A consumer group.
#[derive(Debug)]
struct Group {
    /// A snapshot. Reading it waits for no file.
    document: RwLock<Arc<Document>>,
    /// Held while the document is written. Without a directory the group is deleted.
    writing: Mutex<Option<StateDir>>,
    assignment: Mutex<Assignment>,
}

impl Group {
    fn new(document: Document, dir: StateDir, assignment: Assignment) -> Self {
        Self {
            document: RwLock::new(Arc::new(document)),
            writing: Mutex::new(Some(dir)),
            assignment: Mutex::new(assignment),
        }
    }

    fn document(&self) -> Arc<Document> {
        Arc::clone(&self.document.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn assignment(&self) -> MutexGuard<'_, Assignment> {
        self.assignment.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the document. It is durable when this returns. Blocks for file I/O.
    fn change(&self, change: impl FnOnce(&mut Document)) -> Result<()> {
        let writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut document = Document::clone(&self.document());
        let Some(dir) = &*writing else { return Err(no_group(&document.name)) };
        change(&mut document);
        dir.save(&file_name(&document.name), &document)?;
        *self.document.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(document);
        Ok(())
    }
}

type ByName = BTreeMap<String, Arc<Group>>;

/// The consumer groups of all Logstores, by the ids that the engine gave these.
#[derive(Debug)]
pub(crate) struct Groups {
    dir: StateDir,
    by_logstore: RwLock<HashMap<String, ByName>>,
    /// Held while a group is created or deleted.
    changing: Mutex<()>,
    began: Instant,
}

impl Groups {
    /// Reads the groups. Those of Logstores that are not in `logstores` any more are removed.
    pub(crate) fn open(dir: StateDir, logstores: &[String]) -> Result<Self, OpenError> {
        let mut by_logstore = HashMap::new();
        for id in dir.entries()? {
            let of_logstore = dir.within(&id)?;
            if !logstores.contains(&id) {
                of_logstore.remove_all()?;
                continue;
            }
            let mut groups = ByName::new();
            for name in of_logstore.names()? {
                if let Some(document) = of_logstore.load::<Document>(&name)? {
                    // A consumer that was given a shard before the start is to report it first.
                    let assignment = Assignment::recovering_until(timeout_of(&document));
                    let name = document.name.clone();
                    let group = Group::new(document, of_logstore.clone(), assignment);
                    groups.insert(name, Arc::new(group));
                }
            }
            by_logstore.insert(id, groups);
        }
        Ok(Self {
            dir,
            by_logstore: RwLock::new(by_logstore),
            changing: Mutex::new(()),
            began: Instant::now(),
        })
    }

    fn list(&self, logstore: &str) -> Vec<Arc<Group>> {
        let groups = self.by_logstore.read().unwrap_or_else(PoisonError::into_inner);
        groups.get(logstore).into_iter().flat_map(|groups| groups.values().cloned()).collect()
    }

    fn get(&self, logstore: &str, name: &str) -> Result<Arc<Group>> {
        let groups = self.by_logstore.read().unwrap_or_else(PoisonError::into_inner);
        let group = groups.get(logstore).and_then(|groups| groups.get(name));
        group.cloned().ok_or_else(|| no_group(name))
    }

    /// Creates a group. Blocks for file I/O.
    fn create(&self, logstore: &str, document: Document) -> Result<()> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.get(logstore, &document.name).is_ok() {
            let message = format!("consumer group {} already exists", document.name);
            return Err(ApiError::bad("ConsumerGroupAlreadyExist", message));
        }
        if self.list(logstore).len() >= GROUPS_MAX {
            let message =
                format!("the Logstore has {GROUPS_MAX} consumer groups, which is the limit");
            let status = hyper::StatusCode::FORBIDDEN;
            return Err(ApiError::new(status, "ConsumerGroupQuotaExceed", message));
        }
        let dir = self.dir.within(logstore)?;
        dir.save(&file_name(&document.name), &document)?;
        let name = document.name.clone();
        let group = Arc::new(Group::new(document, dir, Assignment::default()));
        let mut groups = self.by_logstore.write().unwrap_or_else(PoisonError::into_inner);
        groups.entry(logstore.to_owned()).or_default().insert(name, group);
        Ok(())
    }

    /// Deletes a group with its checkpoints. Blocks for file I/O.
    fn delete(&self, logstore: &str, name: &str) -> Result<()> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let group = self.get(logstore, name)?;
        let mut writing = group.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(dir) = writing.take() {
            dir.remove(&file_name(name))?;
        }
        let mut groups = self.by_logstore.write().unwrap_or_else(PoisonError::into_inner);
        groups.entry(logstore.to_owned()).or_default().remove(name);
        Ok(())
    }

    /// A split or a merge has made these shards: a consumer begins with their first groups, also if
    /// it is to begin at the end of shards that it does not know. Blocks for file I/O.
    pub(crate) fn add_shards(&self, logstore: &Logstore, shards: &[u32]) -> Result<()> {
        let begin = Cursors::of(&logstore.config()).text(0);
        for group in self.list(&logstore.id().to_string()) {
            let added = group.change(|document| {
                for shard in shards {
                    let checkpoint = || Checkpoint { cursor: begin.clone(), updated_us: now_us() };
                    document.checkpoints.entry(*shard).or_insert_with(checkpoint);
                }
            });
            match added {
                // It was deleted meanwhile.
                Err(error) if error.status == hyper::StatusCode::NOT_FOUND => {}
                added => added?,
            }
        }
        Ok(())
    }

    /// Removes the groups of a Logstore that is deleted. Blocks for file I/O.
    pub(crate) fn forget(&self, logstore: &str) -> Result<()> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let groups = {
            let mut all = self.by_logstore.write().unwrap_or_else(PoisonError::into_inner);
            all.remove(logstore)
        };
        let Some(groups) = groups else { return Ok(()) };
        for group in groups.values() {
            *group.writing.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        Ok(self.dir.within(logstore)?.remove_all()?)
    }

    /// The time since the service began, by a clock that only advances.
    fn now(&self) -> Duration {
        self.began.elapsed()
    }
}

fn no_group(name: &str) -> ApiError {
    let message = format!("consumer group {name} does not exist");
    ApiError::new(hyper::StatusCode::NOT_FOUND, "ConsumerGroupNotExist", message)
}

fn timeout_of(document: &Document) -> Duration {
    Duration::try_from_secs_f64(document.timeout_s).unwrap_or_default()
}

/// The name of a group may hold any character, and that of a file not.
fn file_name(name: &str) -> String {
    Sha256::digest(name.as_bytes())[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(crate) fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn document(name: &str) -> Document {
        Document {
            name: name.to_owned(),
            timeout_s: 6.0,
            order: true,
            checkpoints: BTreeMap::new(),
        }
    }

    #[test]
    fn groups_and_checkpoints_survive_a_start_and_end_with_their_logstore() {
        let dir = tempfile::tempdir().unwrap();
        let open = |logstores: &[&str]| {
            let state = StateDir::open(dir.path().join("groups")).unwrap();
            Groups::open(state, &logstores.iter().map(|it| it.to_string()).collect::<Vec<_>>())
        };
        let groups = open(&[]).unwrap();
        groups.create("one", document("a/é")).unwrap();
        groups.create("two", document("a/é")).unwrap();
        assert_eq!(groups.create("one", document("a/é")).unwrap_err().status, 400);
        let set = |document: &mut Document| {
            document.checkpoints.insert(3, Checkpoint { cursor: "MA==".to_owned(), updated_us: 1 });
        };
        groups.get("one", "a/é").unwrap().change(set).unwrap();

        let groups = open(&["one"]).unwrap();
        let kept = groups.get("one", "a/é").unwrap().document();
        assert_eq!(kept.checkpoints[&3].cursor, "MA==");
        assert_eq!(groups.get("two", "a/é").unwrap_err().code, "ConsumerGroupNotExist");
        let group = groups.get("one", "a/é").unwrap();
        groups.forget("one").unwrap();
        // A late checkpoint must not create the file of a deleted group again.
        assert_eq!(group.change(set).unwrap_err().code, "ConsumerGroupNotExist");
        assert!(open(&["one"]).unwrap().list("one").is_empty());
    }

    #[test]
    fn a_logstore_has_thirty_groups_at_most() {
        let dir = tempfile::tempdir().unwrap();
        let groups = Groups::open(StateDir::open(dir.path().join("g")).unwrap(), &[]).unwrap();
        for index in 0..GROUPS_MAX {
            groups.create("one", document(&index.to_string())).unwrap();
        }
        assert_eq!(
            groups.create("one", document("x")).unwrap_err().code,
            "ConsumerGroupQuotaExceed"
        );
        groups.delete("one", "7").unwrap();
        groups.create("one", document("x")).unwrap();
    }
}
