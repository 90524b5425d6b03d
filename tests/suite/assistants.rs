//! Assistants that do not do what they were asked for: their owner does without them, and the bytes are the same.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use espalier_common::clock::{Clock as _, SystemClock};
use harness::checkpoint::same_files;
use harness::process::{PATIENCE, Workplace, pause, proceed};
use harness::{golden, tiny};
use serde_json::Value;

use crate::cluster::{Cluster, Member};

/// Seconds that an owner gives an assistant, beside a multiple of its own.
const PATIENCE_SECONDS: u64 = 2;
/// What giving up may take on a machine that has other things to do: far less than the 30 s of workers that are not told.
const SOON: Duration = Duration::from_secs(20);

fn prune() -> Vec<String> {
    let (model, text) = (tiny("llama-tiny"), golden().join("text/wikitext2-valid-head.txt"));
    let (model, text) = (model.display().to_string(), text.display().to_string());
    let arguments = ["prune", &model, "--output", "out", "--run", "run", "--calibration", &text];
    // Blocks enough to be shared.
    let work = ["--samples", "32", "--seq-len", "128", "--method", "espalier", "--set", "method.row_block=16"];
    arguments.into_iter().chain(work).map(str::to_owned).collect()
}

/// Three workers, one of them faster, so that shares differ.
fn uneven_cluster() -> Result<Cluster> {
    let mut workplace = Workplace::new();
    // Not the coordinator is to miss it, but the owner.
    workplace.set("ESPALIER__COORDINATOR__WORKER_SILENCE_SECONDS", "120");
    workplace.set("ESPALIER__WORKER__ASSISTANT_PATIENCE_SECONDS", &PATIENCE_SECONDS.to_string());
    workplace.set("ESPALIER__WORKER__GFLOPS", "10");
    let mut cluster = Cluster::start_in(workplace, None, 2, &[])?;
    cluster.add_worker(1, &[], &[("ESPALIER__WORKER__GFLOPS", "30".to_owned())])?;
    cluster.wait_until("three workers", |cluster| {
        let is_registered = |member: &Member| member.process.errors().contains("registered");
        cluster.workers.iter().all(is_registered).then_some(())
    })?;
    Ok(cluster)
}

#[test]
fn an_assistant_that_stands_still_is_given_up_on_and_changes_no_byte() {
    let check = || -> Result<()> {
        let reference = Workplace::new();
        reference.run(prune())?.success()?;
        let mut cluster = uneven_cluster()?;
        let follower = cluster.submit(&prune())?;
        let owner = cluster.wait_until("a lease", Cluster::at_work)?;
        let process = cluster.workers[(owner + 1) % 3].process.id();
        pause(process)?;
        let clock = SystemClock::default();
        let gave_up = |cluster: &Cluster| {
            cluster.workers[owner].process.errors().contains("going on without an assistant").then_some(())
        };
        cluster.wait_until("an owner that goes on alone", gave_up)?;
        let waited = Duration::from_millis(clock.now().0);
        proceed(process)?;
        ensure!(waited < SOON, "the owner waited {waited:?}");
        follower.finish(PATIENCE)?.success()?;
        same_files(&reference.path().join("out"), &cluster.workplace.path().join("out"))?;
        let report = std::fs::read(cluster.run().join("report.json")).context("run/report.json")?;
        let report: Value = serde_json::from_slice(&report)?;
        ensure!(report["totals"]["assistants_lost"].as_u64() > Some(0), "{}", report["totals"]);
        Ok(())
    };
    check().unwrap_or_else(|error| panic!("{error:#}"));
}
