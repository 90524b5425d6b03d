//! The strategy `data`, with the real programs: every worker keeps its share of the calibration sequences, and the checkpoint has
//! the bytes of the strategy `layers`, whatever is killed on the way.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use espalier_common::ids::Lease;
use espalier_coordinator::schedule::Record;
use harness::checkpoint::same_files;
use harness::process::{PATIENCE, Running, Workplace, kill, pause, proceed};
use harness::{golden, tiny};
use serde_json::Value;

use crate::cluster::Cluster;
use crate::past::{LAYERS, commits, each_layer_once, files, outstanding, process_of, schedule};
use crate::resume::killed_after;

const GRACE: Duration = Duration::from_secs(20);
const DATA: [&str; 2] = ["--strategy", "data"];

fn utf8(path: &Path) -> &str {
    path.to_str().expect("the repository's path is UTF-8")
}

/// Paths are relative, so that runs differ in nothing else.
fn prune(model: &str, more: &[&str]) -> Vec<String> {
    let (model, text) = (tiny(model), golden().join("text/wikitext2-valid-head.txt"));
    let arguments = ["prune", utf8(&model), "--output", "out", "--run", "run", "--calibration", utf8(&text)];
    let size: &[&str] = if more.contains(&"--samples") { &[] } else { &["--samples", "32", "--seq-len", "128"] };
    arguments.iter().chain(size).chain(more).map(|argument| (*argument).to_owned()).collect()
}

fn done(model: &str, more: &[&str]) -> Result<Workplace> {
    let workplace = Workplace::new();
    workplace.run(prune(model, more))?.success()?;
    Ok(workplace)
}

fn same_output(reference: &Workplace, other: &Workplace) -> Result<()> {
    same_files(&reference.path().join("out"), &other.path().join("out"))
}

fn report(workplace: &Workplace) -> Result<Value> {
    Ok(serde_json::from_slice(&fs::read(workplace.path().join("run/report.json"))?)?)
}

/// `layers` from one worker, and `data` from one, two and three.
fn same_bytes(model: &str, flags: &[&str]) -> Result<()> {
    let small = ["--samples", "12", "--seq-len", "64"];
    let layers = done(model, &[&small, flags].concat())?;
    ensure!(report(&layers)?["strategy"]["strategy"] == "layers");
    for workers in ["1", "2", "3"] {
        let data = done(model, &[&small, flags, &DATA, &["--workers", workers]].concat())?;
        same_output(&layers, &data)?;
        let report = report(&data)?;
        ensure!(report["strategy"]["strategy"] == "data", "{}", report["strategy"]);
        let totals = &report["totals"];
        ensure!(totals["assistants_lost"] == 0 && totals["retries"] == 0, "{totals}");
        let helped =
            totals["links"].as_array().map_or(0, |links| links.iter().filter_map(|l| l["times"].as_u64()).sum());
        let wanted: u64 = workers.parse()?;
        ensure!(helped == (wanted - 1) * LAYERS as u64, "{workers} workers: {totals}");
        // They are of one machine and one user.
        let kinds = totals["links"].to_string();
        ensure!(helped == 0 || kinds.contains("\"shm\"") && !kinds.contains("\"grpc\""), "{kinds}");
    }
    Ok(())
}

#[test]
fn data_has_the_bytes_of_layers_from_1_2_and_3_workers_whatever_the_method() {
    same_bytes("llama-tiny", &["--method", "espalier"]).unwrap();
    same_bytes("opt-tiny", &["--method", "sparsegpt", "--held-out", "0.25"]).unwrap();
    same_bytes("qwen2-tiny", &["--method", "alps", "--pattern", "2:4"]).unwrap();
    same_bytes("qwen2-tiny", &["--method", "wanda"]).unwrap();
}

#[test]
fn workers_that_may_not_share_memory_talk_over_grpc_and_give_the_same_bytes() {
    let flags = ["--method", "sparsegpt", "--workers", "2"];
    let shared = done("llama-tiny", &flags).unwrap();
    let mut apart = Workplace::new();
    apart.set("ESPALIER__WORKER__SHARED_MEMORY", "false");
    apart.run(prune("llama-tiny", &flags)).unwrap().success().unwrap();
    same_output(&shared, &apart).unwrap();
    let links = |run: &Workplace| report(run).unwrap()["totals"]["links"].to_string();
    let (shared, apart) = (links(&shared), links(&apart));
    assert!(shared.contains("\"shm\"") && !apart.contains("\"shm\""), "{shared} {apart}");
    assert!(apart.contains("\"grpc\"") && !apart.contains("declined"), "{apart}");
}

#[test]
fn with_data_less_is_moved() {
    let moved = |strategy: &str| -> Result<u64> {
        let run = done("llama-tiny", &["--method", "wanda", "--strategy", strategy, "--workers", "2"])?;
        Ok(report(&run)?["totals"]["bytes_moved"].as_u64().unwrap_or(0))
    };
    let (layers, data) = (moved("layers").unwrap(), moved("data").unwrap());
    assert!(data > 0 && data < layers, "{data} against {layers}");
}

/// Kills the owner of a layer, or one that has a share and helps, after some commits. All are stopped meanwhile.
fn kill_one(running: &mut Running, run: &Path, after: usize, is_owner: bool) -> Result<Lease> {
    loop {
        running.wait_until("the lease", || (commits(run).len() >= after).then(|| outstanding(run))?)?;
        let children = running.children()?;
        children.iter().try_for_each(|&child| pause(child))?;
        let owner = outstanding(run).and_then(|lease| Some((lease, process_of(run, &children, lease.worker)?)));
        let victim = owner.and_then(|(lease, owner)| {
            let victim = children.iter().copied().find(|&child| (child == owner) == is_owner)?;
            Some((lease, victim))
        });
        if let Some((_, process)) = victim {
            kill(process)?;
        }
        let others = children.iter().copied().filter(|&child| victim.is_none_or(|(_, killed)| killed != child));
        others.into_iter().try_for_each(proceed)?;
        if let Some((lease, _)) = victim {
            return Ok(lease);
        }
    }
}

#[test]
fn a_killed_worker_with_a_share_costs_no_byte() {
    let more = ["--set", "method.row_block=32"];
    let reference = done("llama-tiny", &more).unwrap();
    for (is_owner, after) in [(true, 1), (false, 1), (true, 2), (false, 2)] {
        let workplace = Workplace::new();
        let run = workplace.path().join("run");
        let command = prune("llama-tiny", &[&more[..], &DATA, &["--workers", "3"]].concat());
        let mut running = workplace.start(command).unwrap();
        let lease = kill_one(&mut running, &run, after, is_owner).unwrap();
        let finished = running.finish(PATIENCE).unwrap().success().unwrap();
        assert!(finished.stderr.contains("is lost"), "{}", finished.stderr);
        let again = |record: &Record| matches!(record, Record::Leased { lease: other } if other.unit == lease.unit && other.attempt > lease.attempt);
        assert_eq!(schedule(&run).iter().any(again), is_owner, "{lease}: only an owner's death costs a lease");
        each_layer_once(&run).unwrap();
        same_output(&reference, &workplace).unwrap();
    }
}

#[test]
fn a_killed_run_is_resumed_as_it_was_begun_and_may_change_its_strategy() {
    let reference = done("opt-tiny", &[]).unwrap();
    for (stored_every, more, strategy) in
        [("0", &[][..], "data"), ("1", &[][..], "data"), ("0", &["--strategy", "layers"][..], "layers")]
    {
        let mut workplace = Workplace::new();
        workplace.set("ESPALIER__COORDINATOR__STORED_EVERY", stored_every);
        let run = workplace.path().join("run");
        killed_after(&workplace, &prune("opt-tiny", &[&DATA[..], &["--workers", "3"]].concat()), 2).unwrap();
        let before = commits(&run);
        assert!(before.len() < LAYERS, "the kill came too late");
        let resume = ["resume", "run", "--workers", "2"];
        let finished = workplace.run(resume.iter().chain(more)).unwrap().success().unwrap();
        assert_eq!(report(&workplace).unwrap()["strategy"]["strategy"], strategy);
        assert!(finished.stdout.contains("strategy data") == (strategy == "data"), "{}", finished.stdout);
        assert!(commits(&run).starts_with(&before));
        each_layer_once(&run).unwrap();
        same_output(&reference, &workplace).unwrap();
        assert!(files(&run.join("activations")).is_empty(), "left behind");
    }
}

/// Workers that outlive their coordinator use what they kept, and it is what was committed.
#[test]
fn a_restarted_coordinator_goes_on_with_the_shares_that_outlived_it() {
    let reference = done("llama-tiny", &[]).unwrap();
    let mut cluster = Cluster::start(3).unwrap();
    let command = prune("llama-tiny", &DATA);
    let mut follower = cluster.submit(&command).unwrap();
    let run = cluster.run();
    follower.wait_until("a commit", || (!commits(&run).is_empty()).then_some(())).unwrap();
    cluster.restart().unwrap();
    let before = commits(&run);
    assert!(before.len() < LAYERS, "the kill came too late");
    assert_eq!(follower.finish(GRACE).unwrap().code(), Some(75));
    // What the job was submitted with is remembered.
    let follower = cluster.submit(&prune("llama-tiny", &[])).unwrap();
    follower.finish(PATIENCE).unwrap().success().unwrap();
    assert_eq!(report(&cluster.workplace).unwrap()["strategy"]["asked"], "data");
    assert!(commits(&run).starts_with(&before));
    each_layer_once(&run).unwrap();
    same_output(&reference, &cluster.workplace).unwrap();
}

#[test]
fn auto_says_what_it_took_and_why() {
    let small = ["--samples", "8", "--seq-len", "64", "--method", "wanda", "--workers", "2"];
    // Which of two possible strategies costs less hangs on the speeds that the workers measure.
    for (more, possible) in [
        (&[][..], &[("data", "with layers"), ("layers", "with data")][..]),
        (&["--propagation", "dense"], &[("layers", "data cannot be used")]),
        (&["--set", "method.reconstruct=submodule", "--held-out", "0.25"], &[("layers", "in one place")]),
    ] {
        let mut workplace = Workplace::new();
        // The environment is as good as a flag.
        workplace.set("ESPALIER__COORDINATOR__STRATEGY", "auto");
        let finished = workplace.run(prune("llama-tiny", &[&small[..], more].concat())).unwrap().success().unwrap();
        let said = &report(&workplace).unwrap()["strategy"];
        assert_eq!(said["asked"], "auto");
        let (strategy, why) = possible.iter().find(|(strategy, _)| said["strategy"] == *strategy).unwrap();
        assert!(said["why"].as_str().is_some_and(|said| said.contains(why)), "{said}");
        let line = format!("strategy {strategy}: ");
        assert!(finished.stderr.contains(&line) && finished.stdout.contains(&line), "{}", finished.stderr);
    }
}

#[test]
fn data_is_refused_where_it_cannot_be_used_before_anything_is_computed() {
    for more in [
        &["--method", "wanda", "--propagation", "dense"][..],
        &["--method", "wanda", "--set", "method.reconstruct=submodule", "--held-out", "0.25"][..],
        &["--method", "fasp", "--sparsity", "0.4"][..],
    ] {
        let workplace = Workplace::new();
        let finished = workplace.run(prune("llama-tiny", &[&DATA[..], more, &["--workers", "2"]].concat())).unwrap();
        assert_eq!(finished.code(), Some(65), "{more:?}: {}", finished.stderr);
        let errors = finished.error_lines();
        let is_told = errors.len() == 1 && errors[0].contains("strategy `data` cannot be used for this job");
        assert!(is_told, "{more:?}: {}", finished.stderr);
        let left: Vec<_> = fs::read_dir(workplace.path()).unwrap().collect();
        assert!(left.is_empty(), "{more:?} left {left:?}");
    }
    let unknown = Workplace::new().run(prune("llama-tiny", &["--strategy", "tensors"])).unwrap();
    assert_eq!(unknown.code(), Some(2), "{}", unknown.stderr);
}

#[test]
fn a_plan_knows_both_strategies_and_chooses_by_cost() {
    let workplace = Workplace::new();
    let cluster = |count: usize| {
        let text = format!("[[workers]]\nname = \"box\"\ncount = {count}\nmemory = \"8GB\"\ngflops = 50.0\n");
        fs::write(workplace.path().join("cluster.toml"), text).unwrap();
    };
    let model = tiny("llama-tiny");
    let plan = |more: &[&str]| {
        // Sums over held-out sequences travel with `data` alone: an owner that lends keeps those sequences.
        let plan = ["plan", utf8(&model), "--cluster", "cluster.toml", "--samples", "8", "--seq-len", "64"];
        let plan = [&plan[..], &["--held-out", "0"]].concat();
        workplace.run(plan.iter().chain(more)).unwrap()
    };
    let json = |more: &[&str]| plan(&[more, &["--json"]].concat()).success().unwrap().json().unwrap();
    cluster(3);
    let auto = json(&["--strategy", "auto"]);
    assert_eq!(auto["strategy"]["strategy"], "data", "{auto}");
    let moved = |strategy: &str| auto["strategies"][strategy]["bytes_moved"].as_u64().unwrap();
    assert!(moved("data") < moved("layers") && auto["bytes_moved"] == moved("data"), "{auto}");
    let seconds = |strategy: &str| auto["strategies"][strategy]["seconds"].as_f64().unwrap();
    assert!(seconds("data") < seconds("layers"), "{auto}");
    assert_eq!(json(&[])["strategy"]["strategy"], "layers");
    let text = plan(&["--strategy", "auto"]).success().unwrap().stdout;
    assert!(text.contains("strategy data: ") && text.contains("layers would take"), "{text}");
    assert_eq!(json(&["--strategy", "auto", "--propagation", "dense"])["strategy"]["strategy"], "layers");
    let refused = plan(&["--strategy", "data", "--propagation", "dense"]);
    assert_eq!(refused.code(), Some(65), "{}", refused.stderr);
    cluster(1);
    assert_eq!(json(&["--strategy", "auto"])["strategy"]["strategy"], "layers");
}
