//! A coordinator with its workers, all of them processes of their own, on one machine or each on one of its own.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use espalier_common::clock::{Clock as _, SystemClock};
use espalier_common::ids::WorkerId;
use harness::network::Network;
use harness::process::{PATIENCE, Running, Workplace};

use crate::past::{is_registered_as, outstanding};

/// Environment variables of one process.
pub(crate) type Variables = [(&'static str, String)];

/// The machine of the coordinator and of those who follow it.
pub(crate) const COORDINATOR: usize = 0;

/// A worker, and the machine that it is on.
pub(crate) struct Member {
    pub(crate) process: Running,
    pub(crate) machine: usize,
}

/// The processes, and the folder they run in; they end before it goes.
pub(crate) struct Cluster {
    pub(crate) coordinator: Running,
    pub(crate) url: String,
    pub(crate) workers: Vec<Member>,
    pub(crate) workplace: Workplace,
    pub(crate) network: Option<Network>,
    /// How many workers a run waits for.
    pub(crate) wanted: usize,
}

impl Cluster {
    pub(crate) fn start(workers: usize) -> Result<Self> {
        Self::start_in(Workplace::new(), None, workers, &[])
    }

    /// Starts it in a folder that is there, on a network if there is one; `variables` are for its first processes, not for
    /// those that come later.
    pub(crate) fn start_in(
        workplace: Workplace,
        network: Option<Network>,
        workers: usize,
        variables: &Variables,
    ) -> Result<Self> {
        let address = format!("{}:0", network.as_ref().map_or("127.0.0.1".to_owned(), |n| n.address(COORDINATOR)));
        let (coordinator, url) = coordinator(&workplace, network.as_ref(), &address, workers, variables)?;
        let mut cluster = Self { coordinator, url, workers: Vec::new(), workplace, network, wanted: workers };
        for machine in 1..=workers {
            cluster.add_worker(machine, &[], variables)?;
        }
        Ok(cluster)
    }

    /// Starts a worker on a machine, with more arguments.
    pub(crate) fn add_worker(&mut self, machine: usize, more: &[&str], variables: &Variables) -> Result<()> {
        let listen = format!("{}:0", self.network.as_ref().map_or("127.0.0.1".to_owned(), |n| n.address(machine)));
        let arguments = ["serve", "--coordinator", &self.url, "--threads", "1", "--listen", &listen];
        let arguments = arguments.iter().chain(more);
        let by = on(self.network.as_ref(), machine);
        let process = self.workplace.start_on(&by, "espalier-worker", arguments, variables)?;
        self.workers.push(Member { process, machine });
        Ok(())
    }

    /// Kills the coordinator and starts it again with the same command.
    pub(crate) fn restart(&mut self) -> Result<()> {
        self.coordinator.kill()?;
        self.start_again()
    }

    /// Starts the coordinator again, which has ended.
    pub(crate) fn start_again(&mut self) -> Result<()> {
        let address = self.url.trim_start_matches("http://").to_owned();
        (self.coordinator, self.url) = coordinator(&self.workplace, self.network.as_ref(), &address, self.wanted, &[])?;
        Ok(())
    }

    /// Submits what a `prune` command says, and follows it.
    pub(crate) fn submit(&self, prune: &[String]) -> Result<Running> {
        let arguments = prune.iter().map(String::as_str).chain(["--coordinator", &self.url]);
        self.workplace.start_on(&on(self.network.as_ref(), COORDINATOR), "espalier", arguments, &[])
    }

    pub(crate) fn run(&self) -> PathBuf {
        self.workplace.path().join("run")
    }

    /// Place in `workers` of the one that the coordinator numbered so.
    pub(crate) fn position(&self, worker: WorkerId) -> Option<usize> {
        self.workers.iter().position(|member| is_registered_as(&member.process.errors(), worker))
    }

    /// Place in `workers` of one that has a lease.
    pub(crate) fn at_work(&self) -> Option<usize> {
        self.position(outstanding(&self.run())?.worker)
    }

    /// Waits until `seen` finds something.
    pub(crate) fn wait_until<T>(&mut self, what: &str, mut seen: impl FnMut(&Self) -> Option<T>) -> Result<T> {
        let clock = SystemClock::default();
        loop {
            if let Some(found) = seen(self) {
                return Ok(found);
            }
            let errors = || self.coordinator.errors();
            ensure!(Duration::from_millis(clock.now().0) < PATIENCE, "no {what} after {PATIENCE:?}\n{}", errors());
            let ended = self.coordinator.ended()?;
            ensure!(ended.is_none(), "the coordinator ended before {what}\n{}", self.coordinator.errors());
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn on(network: Option<&Network>, machine: usize) -> Vec<String> {
    network.map(|network| network.on(machine)).unwrap_or_default()
}

fn coordinator(
    workplace: &Workplace,
    network: Option<&Network>,
    address: &str,
    workers: usize,
    variables: &Variables,
) -> Result<(Running, String)> {
    let workers = workers.to_string();
    let arguments = ["coordinator", "--listen", address, "--runs", "runs", "--workers", &workers];
    let mut coordinator = workplace.start_on(&on(network, COORDINATOR), "espalier", arguments, variables)?;
    let url = coordinator.wait_for_line("listening on ")?;
    Ok((coordinator, url))
}
