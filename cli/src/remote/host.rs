//! The side of the service: runs the command on the store that is open, and sends its output.

use std::{
    fmt,
    io::ErrorKind,
    path::{Component, Path, PathBuf},
};

use envelog::{LogstoreName, Store};
use envelog_server::{AdminCommand, AdminOutput, Administration};
use serde::{Deserialize, Serialize};

use crate::{
    call::Call,
    exit::{Failure, Result, Status},
    output::{self, End, Piece},
    setup::Setup,
};

/// The body of a request.
#[derive(Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Request {
    pub(super) call: Call,
    /// Whether the answer is JSON, and not text.
    pub(super) json: bool,
}

/// The administrative commands of a service.
pub(crate) struct Host {
    setup: Setup,
    /// The directory below which backups are made. `None`: nowhere.
    backup_dir: Option<PathBuf>,
}

impl fmt::Debug for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Host").field("backup_dir", &self.backup_dir).finish_non_exhaustive()
    }
}

impl Host {
    pub(crate) fn new(setup: Setup, backup_dir: Option<PathBuf>) -> Self {
        Self { setup, backup_dir }
    }
}

impl Administration for Host {
    fn command(&self, body: &[u8]) -> std::result::Result<Box<dyn AdminCommand>, String> {
        let request: Request = serde_json::from_slice(body)
            .map_err(|error| format!("this is no administrative command: {error}"))?;
        let logstore = request.call.logstore().map_err(|failure| failure.to_string())?;
        let mut setup = self.setup.clone();
        setup.json = request.json;
        let backup_dir = self.backup_dir.clone();
        Ok(Box::new(Command { call: request.call, logstore, setup, backup_dir }))
    }
}

struct Command {
    call: Call,
    logstore: Option<LogstoreName>,
    setup: Setup,
    backup_dir: Option<PathBuf>,
}

impl AdminCommand for Command {
    fn logstore(&self) -> Option<LogstoreName> {
        self.logstore.clone()
    }

    fn roles(&self) -> Vec<String> {
        self.call.role().map(str::to_owned).into_iter().collect()
    }

    fn describe(&self) -> String {
        self.call.describe()
    }

    fn run(self: Box<Self>, store: &Store, output: AdminOutput) {
        let Self { mut call, mut setup, backup_dir, .. } = *self;
        setup.served = Some(store.clone());
        let sink = move |piece: Piece| {
            let Ok(line) = serde_json::to_string(&piece) else { return };
            match piece {
                Piece::Progress(_) => output.offer(&line),
                _ => output.send(&line),
            }
        };
        output::to_caller(sink, || {
            let done = match &mut call {
                Call::Backup(args) => backup_path(backup_dir.as_deref(), &args.dir)
                    .map(|path| args.dir = path)
                    .and_then(|()| call.run(&setup)),
                _ => call.run(&setup),
            };
            output::end(End::of(done));
        });
    }
}

/// The directory of a backup that a caller asks for: below the one that the operator has set, and
/// reached through no link.
fn backup_path(allowed: Option<&Path>, asked: &Path) -> Result<PathBuf> {
    let refused = |why: String| Failure::new(Status::Refused, "backup_dir", why);
    let allowed = allowed.ok_or_else(|| {
        refused("this service makes no backups: start it with --backup-dir DIR".to_owned())
    })?;
    let below = asked.strip_prefix(allowed).unwrap_or(asked);
    let parts: Vec<_> = below.components().collect();
    let is_below = parts.iter().all(|part| matches!(part, Component::Normal(_)));
    if parts.is_empty() || !is_below {
        let why =
            "the directory of a backup must be below that of --backup-dir, and given without ..";
        return Err(refused(format!("{}: {why}", asked.display())));
    }
    // The operator may have named a link.
    let mut path =
        allowed.canonicalize().map_err(|error| Failure::file("open", allowed, &error))?;
    for part in parts {
        path.push(part);
        match path.symlink_metadata() {
            Ok(metadata) if metadata.is_dir() => {}
            Ok(_) => {
                let why = "it is not a directory, or a symbolic link to one";
                return Err(refused(format!("{}: {why}", path.display())));
            }
            // The backup makes it.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(Failure::file("look at", &path, &error)),
        }
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::{fs, os::unix::fs::symlink};

    use super::*;

    #[test]
    fn a_backup_stays_below_the_directory_of_the_operator() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (allowed, outside) = (root.join("allowed"), root.join("outside"));
        fs::create_dir_all(allowed.join("sub")).unwrap();
        fs::create_dir(&outside).unwrap();
        symlink(&outside, allowed.join("link")).unwrap();
        fs::write(allowed.join("file"), "").unwrap();
        let path = |asked: &str| backup_path(Some(&allowed), Path::new(asked));
        for (asked, wanted) in [
            ("daily", "daily"),
            ("sub/daily", "sub/daily"),
            ("sub//daily/", "sub/daily"),
            (allowed.join("new").to_str().unwrap(), "new"),
        ] {
            assert_eq!(path(asked).unwrap(), allowed.join(wanted), "{asked}");
        }
        for asked in [
            "",
            ".",
            "..",
            "../outside",
            "sub/../../outside",
            "link",
            "link/daily",
            "file",
            "/",
            outside.to_str().unwrap(),
            &format!("{}/../outside", allowed.display()),
            allowed.to_str().unwrap(),
        ] {
            assert!(path(asked).is_err(), "{asked}");
        }
        assert!(backup_path(None, Path::new("daily")).is_err());
        // The operator's own link is followed.
        let link = root.join("operator");
        symlink(&allowed, &link).unwrap();
        assert_eq!(backup_path(Some(&link), Path::new("new")).unwrap(), allowed.join("new"));
    }
}
