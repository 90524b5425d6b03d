//! One kill: a run is brought to a point, one of its processes is killed there, and what is left goes on or is taken up again.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::checkpoint::same_files;
use harness::fault::Faults;
use harness::process::{Finished, PATIENCE, Running, Workplace, kill, wait_for_end};
use harness::{golden, tiny};

use super::point::{Kind, Point, Transfer};
use crate::cluster::Cluster;
use crate::past::{each_layer_once, files, outstanding, perplexity, process_of, records};

/// How long workers may take to see that their coordinator is gone, and a follower that it has nobody to follow.
const GRACE: Duration = Duration::from_secs(40);

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Victim {
    Coordinator,
    /// The one that stands at the point, or has the lease.
    Worker,
}

/// How the processes belong together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Scene {
    /// `prune`, which starts its workers and ends with them.
    Local,
    /// A service, workers that outlive it, and a follower.
    Cluster,
}

/// What is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Job {
    pub(crate) model: &'static str,
    pub(crate) propagation: &'static str,
    pub(crate) is_surveyed: bool,
}

impl Job {
    /// The command, disturbed or not. Paths are relative, so that runs differ in nothing else.
    pub(crate) fn prune(self, workers: &str) -> Vec<String> {
        let path = |path: &Path| path.display().to_string();
        let (model, text) = (path(&tiny(self.model)), path(&golden().join("text/wikitext2-valid-head.txt")));
        let mut arguments = vec!["prune", &model, "--output", "out", "--run", "run", "--calibration", &text];
        arguments.extend(["--method", "sparsegpt", "--samples", "16", "--seq-len", "64"]);
        arguments.extend(["--propagation", self.propagation, "--workers", workers]);
        arguments.extend(["--eval", &text, "--eval-seq-len", "64", "--eval-max-windows", "5"]);
        if self.is_surveyed {
            arguments.extend(["--allocation", "owl"]);
        }
        arguments.into_iter().map(str::to_owned).collect()
    }

    /// A run that nothing happens to.
    pub(crate) fn undisturbed(self) -> Result<Workplace> {
        let workplace = Workplace::new();
        workplace.run(self.prune("1"))?.success()?;
        Ok(workplace)
    }
}

/// One row of the matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Case {
    pub(super) point: Point,
    pub(super) victim: Victim,
    pub(super) scene: Scene,
    pub(super) job: Job,
}

impl Case {
    /// Kills, goes on, and compares with the run that nothing happened to.
    pub(super) fn run(&self, reference: &Workplace) -> Result<()> {
        let faults = Faults::new(self.point.faults())?;
        let mut workplace = Workplace::new();
        // Lost workers are missed soon: nobody here is silent for long without being dead.
        workplace.set("ESPALIER__COORDINATOR__WORKER_SILENCE_SECONDS", "4");
        // Every worker gets its share of the layers, however busy the machine is.
        workplace.set("ESPALIER__WORKER__GFLOPS", "10");
        if let (Point::Behind(_), Victim::Worker) = (self.point, self.victim) {
            // Then workers keep their shares where layers wait for each other.
            workplace.set("ESPALIER__COORDINATOR__STRATEGY", "auto");
        }
        if self.point == Point::During(Transfer::StoredBoundary) {
            workplace.set("ESPALIER__COORDINATOR__STORED_EVERY", "1");
        }
        let workplace = match self.scene {
            Scene::Local => self.disturb_local(workplace, &faults)?,
            Scene::Cluster => self.disturb_cluster(workplace, &faults)?,
        };
        lost_nothing(&workplace, reference)?;
        let unfinished = unfinished(workplace.path());
        ensure!(unfinished.is_empty(), "left behind: {unfinished:?}");
        Ok(())
    }

    /// Brings `coordinator` to the point; returns what stands still there.
    fn bring(&self, faults: &Faults, coordinator: &mut Running, run: &Path) -> Result<harness::fault::Halted> {
        let last = self.point.faults().len() - 1;
        if self.point == Point::Behind(Kind::Stopped) {
            let halted = faults.wait_for(0, coordinator)?;
            coordinator.interrupt()?;
            halted.proceed();
        }
        let halted = faults.wait_for(last, coordinator)?;
        self.is_there(run).with_context(|| format!("process {} stands still", halted.process))?;
        Ok(halted)
    }

    /// Checks that what stands still does so where it should.
    fn is_there(&self, run: &Path) -> Result<()> {
        let journal = fs::read(run.join("journal")).unwrap_or_default();
        let is_torn = journal.last().is_some_and(|last| *last != b'\n');
        match self.point {
            Point::Behind(kind) => {
                let last = records(run).last().and_then(Kind::of);
                ensure!(last == Some(kind) && !is_torn, "the last record is {last:?}");
            }
            Point::During(Transfer::JournalRecord) => ensure!(is_torn, "no record is half written"),
            // Counted in the process itself, which stands in the middle of them.
            Point::During(Transfer::HiddenStatesSent | Transfer::HiddenStatesReceived) => {}
            Point::During(_) => {
                let place = run.parent().context("a run's folder has a parent")?;
                let half = unfinished(place).iter().any(|path| fs::metadata(path).is_ok_and(|half| half.len() > 0));
                ensure!(half, "no file is half written");
            }
        }
        Ok(())
    }

    fn disturb_local(&self, workplace: Workplace, faults: &Faults) -> Result<Workplace> {
        let run = workplace.path().join("run");
        let mut running = workplace.start_with("espalier", self.job.prune("2"), &faults.variables())?;
        let halted = self.bring(faults, &mut running, &run)?;
        let workers = running.children()?;
        match self.victim {
            Victim::Coordinator => {
                running.kill()?;
                halted.proceed();
                // They hold on to their standard input, which ended with it.
                wait_for_end(&workers, GRACE)?;
                self.resume(&workplace)?;
            }
            Victim::Worker => {
                let at_work = || {
                    let holder = outstanding(&run).and_then(|lease| process_of(&run, &workers, lease.worker));
                    holder.or_else(|| workers.first().copied())
                };
                let stands = workers.contains(&halted.process).then_some(halted.process);
                kill(stands.or_else(at_work).context("there is no worker")?)?;
                halted.proceed();
                let finished = running.finish(PATIENCE)?;
                match finished.code() {
                    Some(75) if self.point.is_before_plan() || self.point == Point::Behind(Kind::Stopped) => {
                        self.resume(&workplace)?;
                    }
                    _ => drop(finished.success()?),
                }
            }
        }
        Ok(workplace)
    }

    /// Takes the run up with another number of workers; a run that is not there yet begins again.
    fn resume(&self, workplace: &Workplace) -> Result<Finished> {
        let has = |name: &str| workplace.path().join("run").join(name).exists();
        if has("job.toml") && has("journal") {
            workplace.run(["resume", "run", "--workers", "1"])?.success()
        } else {
            workplace.run(self.job.prune("1"))?.success()
        }
    }

    fn disturb_cluster(&self, workplace: Workplace, faults: &Faults) -> Result<Workplace> {
        let command = self.job.prune("2");
        let mut cluster = Cluster::start_in(workplace, None, 2, &faults.variables())?;
        let run = cluster.run();
        let follower = cluster.submit(&command)?;
        let halted = self.bring(faults, &mut cluster.coordinator, &run)?;
        match self.victim {
            Victim::Coordinator => {
                cluster.coordinator.kill()?;
                halted.proceed();
                cluster.start_again()?;
                let lost = follower.finish(GRACE)?;
                ensure!(lost.code() == Some(75), "a follower says that it lost its coordinator: {}", lost.stderr);
                // Submitted again under the same key: it follows the job that goes on.
                cluster.submit(&command)?.finish(PATIENCE)?.success()?;
            }
            Victim::Worker => {
                let stands = cluster.workers.iter().position(|member| member.process.id() == halted.process);
                let at = stands.or_else(|| cluster.at_work()).unwrap_or(0);
                cluster.workers.swap_remove(at).process.kill()?;
                halted.proceed();
                cluster.add_worker(1, &[], &[])?;
                follower.finish(PATIENCE)?.success()?;
            }
        }
        let Cluster { workplace, .. } = cluster;
        Ok(workplace)
    }
}

/// Checks that a run ended as the one that nothing happened to, and that its journal tells of nothing done twice.
pub(crate) fn lost_nothing(workplace: &Workplace, reference: &Workplace) -> Result<()> {
    let run = workplace.path().join("run");
    each_layer_once(&run)?;
    same_files(&reference.path().join("out"), &workplace.path().join("out"))?;
    let (found, expected) = (perplexity(&run)?, perplexity(&reference.path().join("run"))?);
    ensure!(found == expected, "perplexity is {found}, not {expected}");
    Ok(())
}

/// Files that somebody began to write and did not finish.
fn unfinished(folder: &Path) -> Vec<std::path::PathBuf> {
    let is_unfinished = |path: &std::path::PathBuf| {
        let parts = path.iter().filter_map(|part| part.to_str());
        parts.into_iter().any(|part| part.starts_with(".put-") || part.starts_with(".out.partial-"))
    };
    files(folder).into_iter().filter(is_unfinished).collect()
}
