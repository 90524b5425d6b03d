//! `make soak`: run after run under trouble that a seed draws, until the time is over. Workers and the coordinator are killed,
//! stand still and come back, others join, disks are full, connections break, packets are late or lost, stores err and stall; every
//! run must end with the bytes of the one that nothing happened to.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::env;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use espalier_common::clock::{Clock as _, SystemClock, unix_seconds};
use harness::TINY_MODELS;
use harness::fault::{Deed, Fault, Faults, Place};
use harness::network::{Network, Way};
use harness::process::{Running, Workplace, kill, pause, proceed};
use harness::s3::python;
use rand::seq::IndexedRandom as _;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::cluster::Cluster;
use crate::kill::{Job, lost_nothing};
use crate::s3::troubled_run;

const SECONDS: u64 = 30 * 60;
/// Machines of workers; each may have several.
const MACHINES: usize = 3;
const MOST_WORKERS: usize = 4;
/// How long a run may take once nothing happens to it any more.
const CALM: Duration = Duration::from_secs(240);

/// What happened, in all runs.
type Tally = BTreeMap<&'static str, u64>;

fn number(variable: &str, otherwise: u64) -> u64 {
    match env::var(variable) {
        Ok(text) if !text.is_empty() => text.parse().unwrap_or_else(|_| panic!("{variable}={text} is no number")),
        _ => otherwise,
    }
}

#[test]
#[ignore = "half an hour, or as long as SECONDS says: `make soak`"]
#[expect(clippy::print_stderr, reason = "the seed and the tally are for the reader")]
fn nothing_is_lost() {
    let (seconds, seed) = (number("SECONDS", SECONDS), number("SEED", unix_seconds()));
    let clock = SystemClock::default();
    let impediment = Network::impediment();
    if let Some(why) = &impediment {
        eprintln!("soak: no bad network, since none of our own can be made here: {why}");
    }
    let has_store = python().is_file();
    if !has_store {
        eprintln!("soak: no object store in trouble, since there is none: `make test-s3` installs one");
    }
    eprintln!("soak: {seconds} s from SEED={seed}");
    let mut tally = Tally::new();
    let mut references = BTreeMap::new();
    for round in 0.. {
        if clock.now().0 / 1000 >= seconds {
            break;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed.wrapping_add(round));
        let job = Job {
            model: TINY_MODELS[rng.random_range(0..3)],
            propagation: ["pruned", "dense"][rng.random_range(0..2)],
            is_surveyed: rng.random_bool(0.2),
        };
        let result = if has_store && rng.random_bool(0.2) {
            reference(&mut references, job)
                .and_then(|reference| troubled_run(&mut rng, job, reference))
                .map(|met| met.into_iter().flatten().for_each(|(kind, times)| note_store(&mut tally, &kind, times)))
        } else {
            Trouble::new(rng, job, impediment.is_none(), &mut tally)
                .and_then(|mut trouble| trouble.run(reference(&mut references, job)?))
        };
        *tally.entry("runs").or_default() += 1;
        if let Err(error) = result {
            panic!(
                "soak: LOST in run {round} of SEED={seed} ({job:?}; that run alone: SEED={})\n{error:#}\n{tally:#?}",
                seed.wrapping_add(round)
            );
        }
    }
    eprintln!("soak: nothing lost in {} s; SEED={seed}; {tally:#?}", clock.now().0 / 1000);
    assert!(tally["runs"] > 0, "no run was made in {seconds} s");
}

/// Counts what requests to a store met with.
fn note_store(tally: &mut Tally, kind: &str, times: u64) {
    let what = match kind {
        "500" => "request to a store answered with 500",
        "503" => "request to a store answered with 503",
        "late" => "request to a store answered late",
        _ => "request to a store done and answered with 500",
    };
    *tally.entry(what).or_default() += times;
}

fn reference(references: &mut BTreeMap<Job, Workplace>, job: Job) -> Result<&Workplace> {
    Ok(match references.entry(job) {
        Entry::Occupied(entry) => entry.into_mut(),
        Entry::Vacant(entry) => entry.insert(job.undisturbed()?),
    })
}

/// One run and what happens to it.
struct Trouble<'a> {
    rng: ChaCha8Rng,
    cluster: Cluster,
    command: Vec<String>,
    faults: Faults,
    rules: Vec<Fault>,
    /// Faults that were seen, by place in the list.
    seen: Vec<bool>,
    tally: &'a mut Tally,
}

/// Places at which a call may fail or a program stand still.
const PLACES: [(&str, Place); 8] = [
    ("espalier-worker", Place::Written { file: "/layers/.put-", text: "", number: 1 }),
    ("espalier-worker", Place::Written { file: "/activations/", text: "", number: 3 }),
    ("espalier-worker", Place::Sent { bytes: 100_000 }),
    ("espalier-worker", Place::Received { bytes: 100_000 }),
    ("espalier-worker", Place::Read { file: "/run/tokens/", number: 1 }),
    ("espalier", Place::Written { file: "/run/journal", text: "", number: 7 }),
    ("espalier", Place::Written { file: "/run/tokens/.put-", text: "", number: 1 }),
    ("espalier", Place::Written { file: "/.out.partial-", text: "", number: 2 }),
];

impl<'a> Trouble<'a> {
    fn new(mut rng: ChaCha8Rng, job: Job, has_network: bool, tally: &'a mut Tally) -> Result<Self> {
        let count = rng.random_range(0..3);
        let deeds = [Deed::Stop, Deed::Fail];
        let places: Vec<_> = PLACES.choose_multiple(&mut rng, count).copied().collect();
        let rule = |(program, place)| Fault { program, place, deed: deeds[rng.random_range(0..2)] };
        let rules: Vec<Fault> = places.into_iter().map(rule).collect();
        let faults = Faults::new(rules.clone())?;
        let mut workplace = Workplace::new();
        workplace.set("ESPALIER__COORDINATOR__WORKER_SILENCE_SECONDS", "3");
        workplace.set("ESPALIER__COORDINATOR__STORED_EVERY", if rng.random_bool(0.5) { "1" } else { "0" });
        // Where layers wait for each other, `auto` takes `data`.
        workplace.set("ESPALIER__COORDINATOR__STRATEGY", if rng.random_bool(0.5) { "auto" } else { "layers" });
        let network = if has_network { Some(Network::new(MACHINES + 1, rng.random())?) } else { None };
        let workers = rng.random_range(1..=MACHINES);
        let cluster = Cluster::start_in(workplace, network, workers, &faults.variables())?;
        Ok(Self { rng, cluster, command: job.prune("2"), seen: vec![false; rules.len()], faults, rules, tally })
    }

    fn note(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    fn run(&mut self, reference: &Workplace) -> Result<()> {
        let clock = SystemClock::default();
        let mut left = self.rng.random_range(2..9);
        let mut calm_since = None;
        let mut follower = self.cluster.submit(&self.command)?;
        loop {
            if let Some(status) = follower.ended()? {
                match status.code() {
                    Some(0) => break,
                    Some(75) => {
                        self.note("interrupted, and submitted again");
                        self.revive()?;
                        follower = self.cluster.submit(&self.command)?;
                    }
                    _ => return Err(anyhow::anyhow!("the follower ended: {status}\n{}", follower.errors())),
                }
            }
            self.see_faults()?;
            if left > 0 {
                left -= 1;
                thread::sleep(Duration::from_millis(self.rng.random_range(20..900)));
                self.disturb()?;
            } else {
                let since = *calm_since.get_or_insert(clock.now());
                self.revive()?;
                thread::sleep(Duration::from_millis(20));
                let waited = Duration::from_millis(clock.now().0 - since.0);
                ensure!(waited < CALM, "not done after {waited:?} of calm\n{}", self.story(&follower));
            }
        }
        lost_nothing(&self.cluster.workplace, reference).with_context(|| self.story(&follower))
    }

    /// A process that stands still at a fault is killed, or goes on after a while.
    fn see_faults(&mut self) -> Result<()> {
        for index in 0..self.rules.len() {
            let Some(process) = self.faults.happened(index).filter(|_| !self.seen[index]) else { continue };
            self.seen[index] = true;
            if self.rules[index].deed == Deed::Fail {
                self.note("a call that failed");
            } else if self.rng.random_bool(0.5) {
                self.note("killed in the middle of a transfer");
                kill(process)?;
            } else {
                self.note("stood still in the middle of a transfer");
                thread::sleep(Duration::from_millis(self.rng.random_range(0..5000)));
                proceed(process)?;
            }
        }
        Ok(())
    }

    fn disturb(&mut self) -> Result<()> {
        let count = self.cluster.workers.len();
        match self.rng.random_range(0..100) {
            0..25 if count > 0 => {
                self.note("killed worker");
                let at = self.rng.random_range(0..count);
                // It may have been killed where it stood still.
                let mut member = self.cluster.workers.swap_remove(at);
                if member.process.ended()?.is_none() {
                    member.process.kill()?;
                }
            }
            0..45 if count < MOST_WORKERS => {
                self.note("joined worker");
                let machine = self.rng.random_range(1..=MACHINES);
                // Little memory: hidden states go to the disk.
                let more: &[&str] = if self.rng.random_bool(0.5) { &["--memory-budget", "100000"] } else { &[] };
                self.cluster.add_worker(machine, more, &[])?;
            }
            0..60 if count > 0 => {
                self.note("pause");
                let at = self.rng.random_range(0..count);
                let process = self.cluster.workers[at].process.id();
                if self.cluster.workers[at].process.ended()?.is_none() {
                    pause(process)?;
                    thread::sleep(Duration::from_millis(self.rng.random_range(100..5000)));
                    proceed(process)?;
                }
            }
            0..80 => {
                self.note("killed coordinator");
                if self.cluster.coordinator.ended()?.is_none() {
                    self.cluster.coordinator.kill()?;
                }
                thread::sleep(Duration::from_millis(self.rng.random_range(0..1500)));
                self.cluster.start_again()?;
            }
            _ if self.cluster.network.is_some() => {
                let machine = self.rng.random_range(0..=MACHINES);
                let ways = [
                    Way::CUT,
                    Way { lost_of_thousand: 50, delay_milliseconds: 0 },
                    Way { lost_of_thousand: 0, delay_milliseconds: 50 },
                    Way { lost_of_thousand: 20, delay_milliseconds: 100 },
                ];
                let way = *ways.choose(&mut self.rng).context("there are some")?;
                self.note(if way == Way::CUT { "partition" } else { "slow or lossy link" });
                if let Some(network) = &mut self.cluster.network {
                    network.set(machine, way)?;
                }
                if way == Way::CUT {
                    thread::sleep(Duration::from_millis(self.rng.random_range(100..5000)));
                    if let Some(network) = &mut self.cluster.network {
                        network.set(machine, Way::default())?;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Whatever is needed for a run to go on is there again.
    fn revive(&mut self) -> Result<()> {
        if self.cluster.coordinator.ended()?.is_some() {
            self.cluster.start_again()?;
        }
        let mut living = 0;
        for member in &mut self.cluster.workers {
            living += usize::from(member.process.ended()?.is_none());
        }
        while living < self.cluster.wanted {
            let machine = self.rng.random_range(1..=MACHINES);
            self.cluster.add_worker(machine, &[], &[])?;
            living += 1;
        }
        Ok(())
    }

    fn story(&self, follower: &Running) -> String {
        let workers = self.cluster.workers.iter().map(|member| member.process.errors());
        let logs: Vec<String> =
            [follower.errors(), self.cluster.coordinator.errors()].into_iter().chain(workers).collect();
        let tails = logs.iter().map(|log| {
            let lines: Vec<&str> = log.lines().collect();
            lines[lines.len().saturating_sub(30)..].join("\n")
        });
        tails.collect::<Vec<_>>().join("\n----\n")
    }
}
