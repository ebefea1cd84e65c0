//! The projects, and the fields of their Logstores that the engine does not have. The engine has
//! only names `PROJECT/LOGSTORE`; each project is a document of the service.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{SystemTime, UNIX_EPOCH},
};

use envelog::{LogstoreName, Store};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{
    error::{ApiError, Result},
    names,
    state::{StateDir, StateError},
};

/// The most projects of a service.
const PROJECTS_MAX: usize = 10_000;
/// The longest description, in bytes.
const DESCRIPTION_BYTES_MAX: usize = 1024;

/// A project.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Project {
    pub(crate) description: String,
    pub(crate) resource_group_id: String,
    /// In seconds since the Unix epoch, as the next one.
    create_time: u64,
    last_modify_time: u64,
    /// The fields of its Logstores, by name.
    pub(crate) logstores: BTreeMap<String, Fields>,
}

/// The fields of a Logstore that the service keeps.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fields {
    /// The id that the engine gave it. Fields of another id belong to an earlier one of its name.
    pub(crate) id: String,
    /// The fields of its JSON that the engine does not have.
    pub(crate) fields: Map<String, Value>,
}

impl Project {
    fn new(description: &str, resource_group_id: &str) -> Self {
        let now = now_s();
        Self {
            description: description.to_owned(),
            resource_group_id: resource_group_id.to_owned(),
            create_time: now,
            last_modify_time: now,
            logstores: BTreeMap::new(),
        }
    }

    /// Its JSON, as clients read it: all values are text.
    pub(crate) fn json(&self, name: &str, region: &str) -> Value {
        json!({
            "projectName": name,
            "description": self.description,
            "resourceGroupId": self.resource_group_id,
            "status": "Normal",
            "owner": "",
            "region": region,
            "createTime": time_text(self.create_time),
            "lastModifyTime": time_text(self.last_modify_time),
            "dataRedundancyType": "LRS",
        })
    }
}

pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn time_text(seconds: u64) -> String {
    let time = i64::try_from(seconds).ok().and_then(|it| Timestamp::from_second(it).ok());
    time.map_or_else(String::new, |time| time.strftime("%Y-%m-%d %H:%M:%S").to_string())
}

/// All projects.
#[derive(Debug)]
pub(crate) struct Projects {
    dir: StateDir,
    /// A snapshot of each. Reading one waits for no file.
    known: RwLock<BTreeMap<String, Arc<Project>>>,
    /// Held while a document is changed.
    changing: Mutex<()>,
}

impl Projects {
    /// Reads the projects, and takes up each project of the engine that has no document yet.
    pub(crate) fn open(dir: StateDir, store: &Store) -> Result<Self, OpenError> {
        let mut known = BTreeMap::new();
        for name in dir.names()? {
            if let Some(project) = dir.load::<Project>(&name)? {
                known.insert(name, Arc::new(project));
            }
        }
        for name in store.list()?.iter().filter(|name| names::is_served(name)) {
            if !known.contains_key(name.project()) {
                let project = Project::new("", "");
                dir.save(name.project(), &project)?;
                known.insert(name.project().to_owned(), Arc::new(project));
            }
        }
        Ok(Self { dir, known: RwLock::new(known), changing: Mutex::new(()) })
    }

    /// # Errors
    /// 404.
    pub(crate) fn get(&self, name: &str) -> Result<Arc<Project>> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.get(name).cloned().ok_or_else(|| ApiError::no_project(name))
    }

    pub(crate) fn list(&self) -> Vec<(String, Arc<Project>)> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.iter().map(|(name, project)| (name.clone(), Arc::clone(project))).collect()
    }

    /// Blocks for file I/O.
    ///
    /// # Errors
    /// 400 if the name is refused or taken.
    pub(crate) fn create(&self, name: &str, description: &str, group: &str) -> Result<()> {
        names::check_project(name)?;
        check_description(description)?;
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.get(name).is_ok() {
            let message = format!("project {name} already exists");
            return Err(ApiError::bad("ProjectAlreadyExist", message));
        }
        if self.list().len() >= PROJECTS_MAX {
            let message = format!("the service has {PROJECTS_MAX} projects, which is its limit");
            return Err(ApiError::new(hyper::StatusCode::FORBIDDEN, "ProjectQuotaExceed", message));
        }
        self.put(name, Project::new(description, group))
    }

    /// Blocks for file I/O.
    ///
    /// # Errors
    /// 404.
    pub(crate) fn describe(&self, name: &str, description: &str) -> Result<()> {
        check_description(description)?;
        self.change(name, |project| project.description = description.to_owned())
    }

    /// Deletes a project without Logstores. Blocks for file I/O.
    ///
    /// # Errors
    /// 404, or 400 if the project has a Logstore.
    pub(crate) fn delete(&self, name: &str, store: &Store) -> Result<()> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.get(name)?;
        if let Some(left) = store.list()?.iter().find(|it| it.project() == name) {
            let message = format!(
                "project {name} still has Logstores, such as {}: delete them first",
                left.logstore()
            );
            return Err(ApiError::bad("ProjectNotEmpty", message));
        }
        self.dir.remove(name)?;
        self.known.write().unwrap_or_else(PoisonError::into_inner).remove(name);
        Ok(())
    }

    /// Adds fields to those that are kept of a Logstore. Fields of an earlier Logstore of its name
    /// are forgotten. Blocks for file I/O.
    ///
    /// # Errors
    /// 404 if there is no such project.
    pub(crate) fn keep_fields(
        &self,
        name: &LogstoreName,
        id: &str,
        fields: Map<String, Value>,
    ) -> Result<()> {
        self.change(name.project(), |project| {
            let kept = project.logstores.remove(name.logstore()).filter(|kept| kept.id == id);
            let mut all = kept.map(|kept| kept.fields).unwrap_or_default();
            all.extend(fields);
            let kept = Fields { id: id.to_owned(), fields: all };
            project.logstores.insert(name.logstore().to_owned(), kept);
        })
    }

    /// Forgets the fields of a Logstore that is deleted. Blocks for file I/O.
    ///
    /// # Errors
    /// 404 if there is no such project.
    pub(crate) fn forget_fields(&self, name: &LogstoreName) -> Result<()> {
        self.change(name.project(), |project| drop(project.logstores.remove(name.logstore())))
    }

    /// The fields of the Logstore with this name and id.
    pub(crate) fn fields(&self, name: &LogstoreName, id: &str) -> Map<String, Value> {
        let project = self.get(name.project()).ok();
        let kept = project.as_ref().and_then(|project| project.logstores.get(name.logstore()));
        kept.filter(|kept| kept.id == id).map(|kept| kept.fields.clone()).unwrap_or_default()
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Project)) -> Result<()> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut project = Project::clone(&*self.get(name)?);
        change(&mut project);
        project.last_modify_time = now_s();
        self.put(name, project)
    }

    fn put(&self, name: &str, project: Project) -> Result<()> {
        self.dir.save(name, &project)?;
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.insert(name.to_owned(), Arc::new(project));
        Ok(())
    }
}

fn check_description(description: &str) -> Result<()> {
    if description.len() <= DESCRIPTION_BYTES_MAX {
        return Ok(());
    }
    Err(ApiError::parameter(format!("description has more than {DESCRIPTION_BYTES_MAX} bytes")))
}

/// Why the state cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// A document of the service.
    #[error(transparent)]
    State(#[from] StateError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] envelog::Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_text() {
        assert_eq!(time_text(1_700_000_000), "2023-11-14 22:13:20");
    }
}
