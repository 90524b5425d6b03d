//! Bad networks: workers on machines of their own, whose packets come late, get lost, or do not come at all. The run ends with
//! the same bytes, or stops with exit code 75 and ends with them once it is taken up again.

use anyhow::{Context, Result, ensure};
use harness::fault::{Deed, Fault, Faults, Place};
use harness::network::{Network, Traffic, Way};
use harness::process::{PATIENCE, Running, Workplace};

use crate::cluster::{COORDINATOR, Cluster};
use crate::kill::{Job, lost_nothing};
use crate::past::commits;

/// A worker that says nothing for so long is given up on; short, so that the tests are.
const SILENCE: &str = "4";
/// Chance of lost packets.
const SEED: u64 = 20;

/// Runs a test, or says why it cannot.
#[expect(clippy::print_stderr, reason = "a skipped test is loud")]
fn on_a_network(machines: usize, test: impl FnOnce(Network) -> Result<()>) {
    if let Some(why) = Network::impediment() {
        // Nextest shows it with `--no-capture`, and the report of a run lists the test.
        eprintln!("SKIPPED: no network of our own can be made here: {why}");
        return;
    }
    Network::new(machines, SEED).and_then(test).unwrap_or_else(|error| panic!("{error:#}"));
}

/// A cluster with a worker on each machine but the first, at a job.
struct Spread {
    cluster: Cluster,
    command: Vec<String>,
    reference: Workplace,
}

impl Spread {
    fn start(network: Network, job: Job, faults: Option<&Faults>) -> Result<Self> {
        let reference = job.undisturbed()?;
        let mut workplace = Workplace::new();
        workplace.set("ESPALIER__COORDINATOR__WORKER_SILENCE_SECONDS", SILENCE);
        workplace.set("ESPALIER__WORKER__GFLOPS", "10");
        let variables = faults.map(Faults::variables).unwrap_or_default();
        let cluster = Cluster::start_in(workplace, Some(network), 2, &variables)?;
        Ok(Self { cluster, command: job.prune("2"), reference })
    }

    fn submit(&self) -> Result<Running> {
        self.cluster.submit(&self.command)
    }

    fn set(&mut self, machine: usize, way: Way) -> Result<Traffic> {
        self.cluster.network.as_mut().context("the cluster has a network")?.set(machine, way)
    }

    /// Place of a worker that has a lease, once a layer is committed.
    fn at_work(&mut self) -> Result<usize> {
        self.cluster.wait_until(
            "a lease",
            |cluster| {
                if commits(&cluster.run()).is_empty() { None } else { cluster.at_work() }
            },
        )
    }

    fn wait_until_missed(&mut self, workers: usize) -> Result<()> {
        let missed = |text: &str| text.lines().filter(|line| line.contains("worker is silent")).count();
        self.cluster.wait_until("silence", |cluster| (missed(&cluster.coordinator.errors()) >= workers).then_some(()))
    }

    /// The follower ends well, or says that it was interrupted and the job ends well when it is submitted again; then
    /// everything is as on one machine.
    fn ends_as_ever(&self, follower: Running) -> Result<()> {
        let finished = follower.finish(PATIENCE)?;
        match finished.code() {
            Some(75) => drop(self.submit()?.finish(PATIENCE)?.success()?),
            _ => drop(finished.success()?),
        }
        lost_nothing(&self.cluster.workplace, &self.reference)
    }
}

fn job(model: &'static str, propagation: &'static str) -> Job {
    Job { model, propagation, is_surveyed: false }
}

#[test]
fn packets_that_are_late_or_lost_cost_time_only() {
    on_a_network(3, |mut network| {
        for machine in 1..3 {
            network.set(machine, Way { lost_of_thousand: 50, delay_milliseconds: 50 })?;
        }
        let mut spread = Spread::start(network, job("llama-tiny", "dense"), None)?;
        let follower = spread.submit()?;
        spread.ends_as_ever(follower)?;
        let traffic = spread.set(1, Way::default())?;
        ensure!(traffic.dropped > 10 && traffic.forwarded > 100, "too little went over the network: {traffic:?}");
        Ok(())
    });
}

#[test]
fn a_worker_that_is_cut_off_is_done_without_and_let_in_again() {
    on_a_network(3, |network| {
        let mut spread = Spread::start(network, job("opt-tiny", "pruned"), None)?;
        let follower = spread.submit()?;
        let at = spread.at_work()?;
        let machine = spread.cluster.workers[at].machine;
        let before = spread.set(machine, Way::CUT)?;
        spread.wait_until_missed(1)?;
        let after = spread.set(machine, Way::default())?;
        ensure!(after.dropped > before.dropped, "nothing was cut off");
        spread.ends_as_ever(follower)
    });
}

#[test]
fn a_coordinator_that_is_cut_off_from_everybody_waits_and_goes_on() {
    on_a_network(3, |network| {
        let mut spread = Spread::start(network, job("qwen2-tiny", "dense"), None)?;
        let follower = spread.submit()?;
        let _ = spread.at_work()?;
        for machine in 1..3 {
            spread.set(machine, Way::CUT)?;
        }
        spread.wait_until_missed(2)?;
        for machine in 1..3 {
            spread.set(machine, Way::default())?;
        }
        spread.ends_as_ever(follower)
    });
}

/// The worker dies while nobody can be told: for the others its connections stay open, and nothing comes over them.
#[test]
fn connections_that_are_open_on_one_side_only_are_given_up() {
    on_a_network(3, |network| {
        let mut spread = Spread::start(network, job("llama-tiny", "pruned"), None)?;
        let follower = spread.submit()?;
        let at = spread.at_work()?;
        let mut worker = spread.cluster.workers.swap_remove(at);
        spread.set(worker.machine, Way::CUT)?;
        worker.process.kill()?;
        spread.wait_until_missed(1)?;
        spread.set(worker.machine, Way::default())?;
        spread.ends_as_ever(follower)
    });
}

/// The same with the coordinator: workers that are cut off from it do not hear that it died, and belong to the next one.
#[test]
fn workers_that_did_not_hear_their_coordinator_die_belong_to_the_next() {
    on_a_network(3, |network| {
        let mut spread = Spread::start(network, job("opt-tiny", "dense"), None)?;
        let follower = spread.submit()?;
        let _ = spread.at_work()?;
        spread.set(COORDINATOR, Way::CUT)?;
        spread.cluster.coordinator.kill()?;
        spread.set(COORDINATOR, Way::default())?;
        spread.cluster.start_again()?;
        spread.ends_as_ever(follower)
    });
}

/// A worker that stands still in the middle of sending: its machine takes what is sent to it, and nobody ever answers.
#[test]
fn a_peer_that_takes_everything_and_answers_nothing_is_given_up() {
    on_a_network(3, |network| {
        let place = Place::Sent { bytes: 100_000 };
        let faults = Faults::new(vec![Fault { program: "espalier-worker", place, deed: Deed::Stop }])?;
        let mut spread = Spread::start(network, job("qwen2-tiny", "pruned"), Some(&faults))?;
        let follower = spread.submit()?;
        // It stands still to the end of the test.
        let _mute = faults.wait_for(0, &mut spread.cluster.coordinator)?;
        spread.ends_as_ever(follower)
    });
}
