//! The service as a process of its own.

use std::{
    io::BufReader,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    param::clock_ticks_per_second,
    process::{Pid, Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit},
    time::{ClockId, clock_gettime},
};

use serde_json::{Deserializer, Value};

use crate::exit::{Failure, Result};

/// Open files of a process besides its connections.
const OTHER_FILES: u64 = 512;

/// `envelog serve` on a store of its own. It ends with this value.
pub(super) struct Service {
    child: Child,
    store: PathBuf,
    pub(super) address: SocketAddr,
}

impl Service {
    pub(super) fn start(dir: &Path, name: &str) -> Result<Self> {
        let failed =
            |error: std::io::Error| Failure::other(format!("cannot start the service: {error}"));
        let mut command = Command::new(std::env::current_exe().map_err(failed)?);
        // Settings from the environment are for the user's stores.
        for (variable, _) in std::env::vars_os() {
            if variable.to_string_lossy().starts_with("ENVELOG_") {
                command.env_remove(variable);
            }
        }
        let store = dir.join(format!("serve-{name}"));
        command.arg("--store").arg(&store);
        command.args(["serve", "--listen", "127.0.0.1:0", "--json"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().map_err(failed)?;
        let stdout = child.stdout.take().map(BufReader::new);
        let mut told = stdout.map(|it| Deserializer::from_reader(it).into_iter::<Value>());
        let told = told.as_mut().and_then(Iterator::next);
        let told = told.and_then(std::result::Result::ok).unwrap_or_default();
        let address = told["address"].as_str().and_then(|address| address.parse().ok());
        // From here on it ends with the value.
        let unknown = SocketAddr::from(([127, 0, 0, 1], 0));
        let service = Self { child, store, address: address.unwrap_or(unknown) };
        match address {
            Some(_) => Ok(service),
            None => Err(Failure::other("the service has not started: try `envelog serve`")),
        }
    }

    /// The processor time that it has taken.
    pub(super) fn processor_time(&self) -> Result<Duration> {
        let stat = self.proc("stat")?;
        // The name of the program may have spaces. utime and stime are the fields 14 and 15.
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11);
        let ticks: u64 = fields.take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        Ok(Duration::from_secs_f64(ticks as f64 / clock_ticks_per_second() as f64))
    }

    /// Its memory in RAM.
    pub(super) fn memory_mib(&self) -> Result<f64> {
        let status = self.proc("status")?;
        let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = resident.and_then(|it| it.trim().strip_suffix(" kB")).map(str::parse::<f64>);
        match kib {
            Some(Ok(kib)) => Ok(super::rounded(kib / 1024.0, 10.0)),
            _ => Err(Failure::other("the system does not tell the memory of a process")),
        }
    }

    fn proc(&self, file: &str) -> Result<String> {
        let path = format!("/proc/{}/{file}", self.child.id());
        std::fs::read_to_string(&path)
            .map_err(|error| Failure::file("read", Path::new(&path), &error))
    }

    /// Ends it as a service manager does, and removes its store.
    pub(super) fn stop(mut self) -> Result {
        let failed = |error| Failure::other(format!("the service does not stop: {error}"));
        kill_process(Pid::from_child(&self.child), Signal::TERM)
            .map_err(|error| failed(error.into()))?;
        let status = self.child.wait().map_err(failed)?;
        if !status.success() {
            return Err(Failure::other(format!("the service has failed: {status}")));
        }
        // Frees the space for the next measurement.
        std::fs::remove_dir_all(&self.store)
            .map_err(|error| Failure::file("remove", &self.store, &error))
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The processor time of this process.
pub(super) fn own_processor_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Allows this process, and the service that it starts, this many connections.
pub(super) fn raise_open_files(connections: usize) -> Result {
    let wanted = connections as u64 + OTHER_FILES;
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_none_or(|current| current >= wanted) {
        return Ok(());
    }
    let raised = Rlimit { current: Some(wanted), maximum: limit.maximum };
    setrlimit(Resource::Nofile, raised).map_err(|error| {
        Failure::other(format!(
            "{connections} connections need {wanted} open files, which the system refuses \
             ({error}): raise the limit (ulimit -Hn), or give fewer --connections"
        ))
    })
}
