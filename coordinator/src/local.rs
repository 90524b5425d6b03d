//! Workers on this machine: started by this process, and gone with it.

mod program;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use espalier_common::device::DeviceChoice;
use espalier_common::tasks::TaskGroup;
use tokio::process::{Child, ChildStdin, Command};
use tracing::{info, warn};

use self::program::Picked;
use crate::error::RunError;
use crate::fleet::Roster;

/// How long workers get to end by themselves.
const GRACE: Duration = Duration::from_secs(5);

/// Threads of worker `index` of `workers` that share a machine's; those that do not divide evenly go to the first. No result
/// depends on it.
fn threads_of(threads: usize, index: usize, workers: usize) -> usize {
    ((threads + workers - 1 - index) / workers).max(1)
}

/// What the workers are started with.
pub struct Launch {
    /// The worker program; empty: the build beside this program that `device` asks for.
    pub program: PathBuf,
    /// What the workers compute on.
    pub device: DeviceChoice,
    /// How many.
    pub workers: usize,
    /// Their compute threads, in all.
    pub threads: usize,
    /// Where their logs go, one file each.
    pub logs: PathBuf,
    /// The coordinator they belong to.
    pub coordinator: SocketAddr,
}

/// Worker processes of this process. They watch their standard input and end when it closes, even if this process is killed.
pub struct LocalWorkers {
    watches: TaskGroup,
    /// Open as long as the workers shall live.
    leashes: Vec<ChildStdin>,
    /// What was chosen for them to compute on, and why, if anything was.
    told: Option<String>,
}

impl LocalWorkers {
    /// Starts the workers. One that ends by itself is taken out of the roster at once.
    ///
    /// # Errors
    /// `Launch`, `Folder`; `Device` if a GPU was asked for that cannot be had.
    pub async fn start(launch: &Launch, roster: &Roster) -> Result<Self, RunError> {
        let executable = std::env::current_exe().ok();
        let folder = executable.as_deref().and_then(|path| path.parent());
        let picked = program::pick(launch.device, &launch.program, folder).await?;
        for device in &picked.devices {
            info!(program = %picked.program.display(), %device, reason = picked.reason, "workers compute on");
        }
        std::fs::create_dir_all(&launch.logs).map_err(|source| RunError::folder(&launch.logs, source))?;
        let watches = TaskGroup::new();
        let mut leashes = Vec::new();
        for index in 0..launch.workers {
            let name = name_of(index);
            let threads = threads_of(launch.threads, index, launch.workers);
            let mut child = start_one(&picked, index, threads, launch)?;
            leashes.extend(child.stdin.take());
            let (roster, token) = (roster.clone(), watches.token());
            watches.spawn(async move {
                tokio::select! {
                    status = child.wait() => {
                        warn!(name, ?status, "worker process ended");
                        remove_by_name(&roster, &name).await;
                    }
                    () = token.cancelled() => end(&name, &mut child).await,
                }
            });
        }
        Ok(Self { watches, leashes, told: picked.told() })
    }

    /// What people should know of what the workers compute on: there were two builds, and one was chosen.
    pub fn told(&self) -> Option<&str> {
        self.told.as_deref()
    }

    /// Ends all workers and waits until they are gone.
    pub async fn stop(self) {
        drop(self.leashes);
        self.watches.shut_down(GRACE * 2).await;
    }
}

async fn end(name: &str, child: &mut Child) {
    if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
        warn!(name, "worker process does not end by itself: killing it");
        if let Err(error) = child.kill().await {
            warn!(name, %error, "worker process cannot be killed");
        }
    }
}

async fn remove_by_name(roster: &Roster, name: &str) {
    for (worker, member) in roster.members() {
        if member.offer.name == name {
            roster.remove(worker).await;
        }
    }
}

fn name_of(index: usize) -> String {
    format!("local-{index}")
}

fn start_one(picked: &Picked, index: usize, threads: usize, launch: &Launch) -> Result<Child, RunError> {
    let name = name_of(index);
    let log_path = launch.logs.join(format!("{name}.log"));
    let log = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&log_path)
        .map_err(|source| RunError::folder(&log_path, source))?;
    Command::new(&picked.program)
        .arg("serve")
        .args(["--coordinator", &format!("http://{}", launch.coordinator)])
        .args(["--listen", "127.0.0.1:0", "--name", &name, "--exit-with-stdin", "--local"])
        .args(["--threads", &threads.to_string(), "--workers-here", &launch.workers.to_string()])
        .args(["--device", &picked.device(index).to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::from(log))
        // Ctrl-C is for this process; it tells the workers in its own way.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|source| RunError::Launch { path: picked.program.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_worker_has_a_thread_and_none_is_lost() {
        let shares =
            |threads, workers| (0..workers).map(|index| threads_of(threads, index, workers)).collect::<Vec<_>>();
        assert_eq!(shares(5, 3), [2, 2, 1]);
        assert_eq!(shares(2, 3), [1, 1, 1]);
    }
}
