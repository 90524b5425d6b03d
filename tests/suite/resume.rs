//! Killed and taken up again: whatever dies on the way, the checkpoint has the bytes of the undisturbed run, and no layer is
//! committed twice.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use espalier_common::ids::Lease;
use espalier_coordinator::journal::{self, FileJournal, Journal, JournalRecord};
use espalier_coordinator::schedule::Record;
use harness::checkpoint::same_files;
use harness::fault::{Deed, Fault, Faults, Place};
use harness::process::{Running, Workplace, kill, pause, proceed, wait_for_end};
use harness::{golden, tiny};

use crate::cluster::Cluster;
use crate::past::{LAYERS, commits, each_layer_once, files, outstanding, process_of, schedule};

/// Enough work in each layer that a kill right after a commit comes long before the next one.
const WORK: [&str; 4] = ["--samples", "32", "--seq-len", "128"];
const GRACE: Duration = Duration::from_secs(20);

fn utf8(path: &Path) -> &str {
    path.to_str().expect("the repository's path is UTF-8")
}

/// The command that every test of a kind runs, disturbed or not. Paths are relative, so that runs differ in nothing else.
fn prune(model: &str, more: &[&str]) -> Vec<String> {
    let (model, text) = (tiny(model), golden().join("text/wikitext2-valid-head.txt"));
    let arguments = ["prune", utf8(&model), "--output", "out", "--run", "run", "--calibration", utf8(&text)];
    let usual: &[&str] = if more.contains(&"--method") { &[] } else { &["--method", "espalier"] };
    arguments.iter().chain(usual).chain(&WORK).chain(more).map(|argument| (*argument).to_owned()).collect()
}

fn undisturbed(model: &str, more: &[&str]) -> Result<Workplace> {
    let workplace = Workplace::new();
    workplace.run(prune(model, more))?.success()?;
    Ok(workplace)
}

fn same_output(reference: &Workplace, other: &Workplace) -> Result<()> {
    same_files(&reference.path().join("out"), &other.path().join("out"))
}

/// Kills a worker while it has a lease. All workers are stopped meanwhile, so that none ends its unit under our eyes.
fn kill_one_at_work(running: &mut Running, run: &Path, commits_before: usize) -> Result<Lease> {
    loop {
        running.wait_until("the lease", || (commits(run).len() >= commits_before).then(|| outstanding(run))?)?;
        let children = running.children()?;
        children.iter().try_for_each(|&child| pause(child))?;
        let found = outstanding(run).and_then(|lease| Some((lease, process_of(run, &children, lease.worker)?)));
        if let Some((_, process)) = found {
            kill(process)?;
        }
        let others = children.iter().filter(|&&child| found.is_none_or(|(_, process)| process != child));
        others.copied().try_for_each(proceed)?;
        if let Some((lease, _)) = found {
            return Ok(lease);
        }
    }
}

/// Kills the worker that is at work `kills` times, each time after another commit.
fn kill_workers(model: &str, more: &[&str], kills: usize) -> Result<()> {
    let reference = undisturbed(model, more)?;
    let workplace = Workplace::new();
    let run = workplace.path().join("run");
    let mut running = workplace.start(prune(model, &[more, &["--workers", "3"]].concat()))?;
    let killed: Vec<Lease> =
        (1..=kills).map(|count| kill_one_at_work(&mut running, &run, count)).collect::<Result<_>>()?;
    let finished = running.finish(harness::process::PATIENCE)?.success()?;
    let lost = finished.stderr.lines().filter(|line| line.contains("is lost")).count();
    ensure!(lost == kills, "{lost} workers were lost, not {kills}:\n{}", finished.stderr);
    let leases = schedule(&run);
    for lease in killed {
        let again = |record: &Record| matches!(record, Record::Leased { lease: other } if other.unit == lease.unit && other.attempt > lease.attempt);
        ensure!(leases.iter().any(again), "{lease} was killed, but its unit never leased again");
    }
    let report: serde_json::Value = serde_json::from_slice(&fs::read(run.join("report.json"))?)?;
    ensure!(report["totals"]["retries"].as_u64() >= Some(kills as u64), "retries: {}", report["totals"]);
    each_layer_once(&run)?;
    same_output(&reference, &workplace)
}

/// Kills a worker that helps with a layer: its owner goes on under the same lease.
#[test]
fn a_killed_assistant_costs_neither_a_byte_nor_a_lease() {
    let more = ["--propagation", "pruned", "--set", "method.row_block=32"];
    let reference = undisturbed("llama-tiny", &more).unwrap();
    let workplace = Workplace::new();
    let run = workplace.path().join("run");
    let mut running = workplace.start(prune("llama-tiny", &[&more[..], &["--workers", "3"]].concat())).unwrap();
    // After a commit, so that nobody joins in the middle.
    let found = loop {
        running.wait_until("the lease", || (!commits(&run).is_empty()).then(|| outstanding(&run))?).unwrap();
        let children = running.children().unwrap();
        children.iter().try_for_each(|&child| pause(child)).unwrap();
        let owner = outstanding(&run).and_then(|lease| Some((lease, process_of(&run, &children, lease.worker)?)));
        let assistant = owner.and_then(|(_, owner)| children.iter().copied().find(|&child| child != owner));
        if let Some(assistant) = assistant {
            kill(assistant).unwrap();
        }
        let others = children.iter().copied().filter(|&child| Some(child) != assistant);
        others.into_iter().try_for_each(proceed).unwrap();
        if let Some((lease, _)) = owner {
            break lease;
        }
    };
    running.finish(harness::process::PATIENCE).unwrap().success().unwrap();
    let again = |record: &Record| matches!(record, Record::Leased { lease } if lease.unit == found.unit && lease.attempt > found.attempt);
    assert!(!schedule(&run).iter().any(again), "{found} was given up, though only an assistant died");
    each_layer_once(&run).unwrap();
    same_output(&reference, &workplace).unwrap();
}

#[test]
fn a_killed_worker_costs_no_byte_in_pruned_propagation() {
    kill_workers("llama-tiny", &["--propagation", "pruned"], 2).unwrap();
}

#[test]
fn a_killed_worker_costs_no_byte_in_dense_propagation() {
    kill_workers("opt-tiny", &["--propagation", "dense"], 2).unwrap();
}

/// Starts a run, kills it once `commits` layers are committed, and waits until its workers are gone too.
pub(crate) fn killed_after(workplace: &Workplace, arguments: &[String], wanted: usize) -> Result<()> {
    let run = workplace.path().join("run");
    let mut running = workplace.start(arguments)?;
    running.wait_until("the lease", || {
        (commits(&run).len() >= wanted && matches!(schedule(&run).last(), Some(Record::Leased { .. }))).then_some(())
    })?;
    let workers = running.children()?;
    running.kill()?;
    // They hold on to their standard input, which ended with it.
    wait_for_end(&workers, GRACE)
}

/// Kills the program after each number of commits in `kills`, one after another in the same run, and takes it up each time.
fn kill_program(model: &str, more: &[&str], kills: &[usize]) -> Result<()> {
    let reference = undisturbed(model, more)?;
    let workplace = Workplace::new();
    let run = workplace.path().join("run");
    let resume: Vec<String> = ["resume", "run", "--workers", "2"].map(str::to_owned).to_vec();
    let mut arguments = prune(model, more);
    let mut before = Vec::new();
    for &wanted in kills {
        killed_after(&workplace, &arguments, wanted)?;
        let now = commits(&run);
        ensure!(now.starts_with(&before), "commits were lost: {before:?}, then {now:?}");
        ensure!(now.len() < LAYERS, "the kill came too late");
        ensure!(!workplace.path().join("out").exists(), "the output is there before it is complete");
        before = now;
        arguments.clone_from(&resume);
    }
    workplace.run(&resume)?.success()?;
    ensure!(commits(&run).starts_with(&before), "commits were lost in the last life");
    each_layer_once(&run)?;
    same_output(&reference, &workplace)
}

#[test]
fn a_killed_run_is_resumed_after_any_number_of_commits() {
    for commits in 0..LAYERS - 1 {
        kill_program("llama-tiny", &["--propagation", "pruned"], &[commits])
            .unwrap_or_else(|error| panic!("after {commits} commits: {error:#}"));
    }
}

#[test]
fn a_run_that_is_killed_again_and_again_is_resumed_each_time() {
    kill_program("qwen2-tiny", &["--propagation", "pruned"], &[0, 1, 2]).unwrap();
    kill_program("opt-tiny", &["--propagation", "dense"], &[1, 2]).unwrap();
}

/// What a structured layer keeps is in its artifact and its record: heads and channels that went, producers that were
/// updated, biases that were fitted anew.
#[test]
fn structured_results_survive_killed_workers_and_killed_programs() {
    let swept = ["--method", "spap", "--sparsity", "0.4", "--held-out", "0.25"];
    let cut = ["--method", "slimgpt", "--sparsity", "0.4"];
    let tuned =
        ["--method", "fasp", "--sparsity", "0.4", "--held-out", "0.25", "--set", "method.reconstruct=submodule"];
    kill_workers("llama-tiny", &cut, 1).unwrap();
    kill_workers("opt-tiny", &tuned, 1).unwrap();
    kill_program("qwen2-tiny", &swept, &[1, 2]).unwrap();
    kill_program("llama-tiny", &cut, &[0, 2]).unwrap();
}

#[test]
fn a_torn_journal_loses_no_commit_and_repeats_no_layer() {
    let more = ["--propagation", "pruned"];
    let reference = undisturbed("llama-tiny", &more).unwrap();
    let workplace = Workplace::new();
    killed_after(&workplace, &prune("llama-tiny", &more), 1).unwrap();
    let path = workplace.path().join("run/journal");
    let before = commits(&workplace.path().join("run"));
    let mut bytes = fs::read(&path).unwrap();
    // Half of a record, as a crash in the middle of a write would leave it.
    bytes.extend_from_slice(b"0badc0de {\"prune\":{\"committed\":{\"lease\":{\"unit\":{\"pru");
    fs::write(&path, bytes).unwrap();
    workplace.run(["resume", "run"]).unwrap().success().unwrap();
    assert!(commits(&workplace.path().join("run")).starts_with(&before));
    each_layer_once(&workplace.path().join("run")).unwrap();
    same_output(&reference, &workplace).unwrap();
}

/// A full disk is nothing that the job is to blame for: the run stops, keeps what it has, and goes on once there is space.
#[test]
fn a_full_disk_costs_no_layer_wherever_it_is_met() {
    let more = ["--propagation", "pruned"];
    let reference = undisturbed("llama-tiny", &more).unwrap();
    for file in ["/.out.partial-", "/run/journal", "/run/tokens/.put-"] {
        let number = if file == "/run/journal" { 6 } else { 1 };
        let place = Place::Written { file, text: "", number };
        let faults = Faults::new(vec![Fault { program: "espalier", place, deed: Deed::Fail }]).unwrap();
        let workplace = Workplace::new();
        let command = prune("llama-tiny", &more);
        let running = workplace.start_with("espalier", &command, &faults.variables()).unwrap();
        let finished = running.finish(harness::process::PATIENCE).unwrap();
        assert!(faults.happened(0).is_some(), "{file} was not written");
        assert_eq!(finished.code(), Some(75), "{file}: {}", finished.stderr);
        assert!(finished.stderr.contains("No space left"), "{file}: {}", finished.stderr);
        let before = commits(&workplace.path().join("run"));
        workplace.run(&command).unwrap().success().unwrap();
        assert!(commits(&workplace.path().join("run")).starts_with(&before), "{file}: commits were lost");
        assert_eq!(before.len(), if file == "/.out.partial-" { LAYERS } else { before.len() }, "{file}");
        each_layer_once(&workplace.path().join("run")).unwrap();
        same_output(&reference, &workplace).unwrap();
    }
}

#[test]
fn a_worker_that_could_not_read_the_tokens_is_asked_again() {
    let more = ["--propagation", "dense"];
    let reference = undisturbed("qwen2-tiny", &more).unwrap();
    let place = Place::Read { file: "/run/tokens/", number: 1 };
    let faults = Faults::new(vec![Fault { program: "espalier-worker", place, deed: Deed::Fail }]).unwrap();
    let workplace = Workplace::new();
    let running = workplace.start_with("espalier", prune("qwen2-tiny", &more), &faults.variables()).unwrap();
    running.finish(harness::process::PATIENCE).unwrap().success().unwrap();
    assert!(faults.happened(0).is_some(), "nothing failed");
    same_output(&reference, &workplace).unwrap();
}

#[test]
fn a_second_coordinator_of_a_run_in_a_folder_is_refused_and_told_who_holds_it() {
    let workplace = Workplace::new();
    let run = workplace.path().join("run");
    let mut first = workplace.start(prune("llama-tiny", &[])).unwrap();
    first.wait_until("a commit", || (!commits(&run).is_empty()).then_some(())).unwrap();
    let second = workplace.run(["resume", "run"]).unwrap();
    assert_eq!(second.code(), Some(75), "{}", second.stderr);
    let errors = second.error_lines();
    for named in ["run/journal is in use by another coordinator: process ", "--output out"] {
        assert!(errors.len() == 1 && errors[0].contains(named), "{named}: {errors:?}");
    }
    // A lock goes with the process, however that ends.
    let workers = first.children().unwrap();
    first.kill().unwrap();
    wait_for_end(&workers, GRACE).unwrap();
    workplace.run(["resume", "run"]).unwrap().success().unwrap();
    each_layer_once(&run).unwrap();
}

#[test]
fn a_run_of_another_job_is_refused_and_says_what_differs() {
    let workplace = Workplace::new();
    killed_after(&workplace, &prune("llama-tiny", &[]), 1).unwrap();
    let before = fs::read(workplace.path().join("run/journal")).unwrap();
    let finished = workplace.run(prune("llama-tiny", &["--seed", "7", "--sparsity", "0.25"])).unwrap();
    assert_eq!(finished.code(), Some(65), "{}", finished.stderr);
    let errors = finished.error_lines();
    for named in ["job.calibration.seed: the run has 0, now it is 7", "job.pattern.sparsity"] {
        assert!(errors.len() == 1 && errors[0].contains(named), "{named}: {errors:?}");
    }
    // The model itself may have changed as well, under the same name.
    let job = workplace.path().join("run/job.toml");
    let text = fs::read_to_string(&job).unwrap();
    let other = utf8(&tiny("llama-tiny")).replace("llama-tiny", "qwen2-tiny");
    fs::write(&job, text.replace(utf8(&tiny("llama-tiny")), &other)).unwrap();
    let finished = workplace.run(["resume", "run"]).unwrap();
    assert_eq!(finished.code(), Some(65), "{}", finished.stderr);
    assert!(finished.stderr.contains("job.model.source: the run has"), "{}", finished.stderr);
    assert_eq!(fs::read(workplace.path().join("run/journal")).unwrap(), before, "a refusal changes nothing");
}

/// Writes the journal of a run in a folder again, as if it had been computed with `instruction_set`; returns what it was.
fn computed_with(run: &Path, instruction_set: &str) -> Result<String> {
    let path = run.join("journal");
    let mut was = None;
    let records = journal::read(&path)?;
    fs::remove_file(&path)?;
    let (mut journal, _) = FileJournal::open(&path)?;
    for mut record in records {
        if let JournalRecord::Computing { instruction_set: frozen } = &mut record {
            was = Some(std::mem::replace(frozen, instruction_set.to_owned()));
        }
        journal.append(&record)?;
    }
    was.context("the journal does not say what was computed with")
}

/// A run that goes on where machines are of another kind would be of two kinds of numbers.
#[test]
fn a_run_is_not_taken_up_by_workers_that_round_otherwise() {
    let reference = undisturbed("llama-tiny", &[]).unwrap();
    let workplace = Workplace::new();
    let run = workplace.path().join("run");
    killed_after(&workplace, &prune("llama-tiny", &[]), 1).unwrap();
    let before = commits(&run);
    let ours = computed_with(&run, "an abacus").unwrap();
    let refused = workplace.run(["resume", "run"]).unwrap();
    assert_eq!(refused.code(), Some(75), "{}", refused.stderr);
    let errors = refused.error_lines();
    let expected = format!("was computed with an abacus so far, but the workers compute with {ours}");
    assert!(errors.len() == 1 && errors[0].contains(&expected), "{errors:?}");
    assert_eq!(commits(&run), before);
    computed_with(&run, &ours).unwrap();
    workplace.run(["resume", "run"]).unwrap().success().unwrap();
    each_layer_once(&run).unwrap();
    same_output(&reference, &workplace).unwrap();
}

/// The same in a cluster, where the right ones may follow: whoever does not fit is sent away, first or not, and the run waits.
#[test]
fn a_cluster_waits_for_workers_that_round_as_the_first_did() {
    let reference = undisturbed("llama-tiny", &[]).unwrap();
    let mut cluster = Cluster::start(1).unwrap();
    let run = cluster.run();
    let follower = cluster.submit(&prune("llama-tiny", &[])).unwrap();
    cluster.wait_until("a commit", |_| (!commits(&run).is_empty()).then_some(())).unwrap();
    cluster.workers.remove(0).process.kill().unwrap();
    cluster.coordinator.kill().unwrap();
    drop(follower);
    let before = commits(&run);
    let ours = computed_with(&run, "an abacus").unwrap();
    cluster.start_again().unwrap();
    cluster.add_worker(1, &[], &[]).unwrap();
    let refused = cluster.workers.remove(0).process.finish(GRACE);
    let refused = refused.unwrap_or_else(|error| panic!("{error:#}\n{}", cluster.coordinator.errors()));
    assert_eq!(refused.code(), Some(75), "{}", refused.stderr);
    let expected = format!("computes with {ours}, but the others with an abacus");
    assert!(refused.stderr.contains(&expected), "{}", refused.stderr);
    assert!(cluster.coordinator.ended().unwrap().is_none(), "{}", cluster.coordinator.errors());
    cluster.coordinator.kill().unwrap();
    assert_eq!(commits(&run), before);
    computed_with(&run, &ours).unwrap();
    cluster.start_again().unwrap();
    cluster.add_worker(1, &[], &[]).unwrap();
    let follower = cluster.submit(&prune("llama-tiny", &[])).unwrap();
    follower.finish(harness::process::PATIENCE).unwrap().success().unwrap();
    each_layer_once(&run).unwrap();
    same_output(&reference, &cluster.workplace).unwrap();
}

#[test]
fn a_cluster_gives_the_bytes_of_one_machine() {
    let reference = undisturbed("llama-tiny", &[]).unwrap();
    let cluster = Cluster::start(2).unwrap();
    cluster.submit(&prune("llama-tiny", &[])).unwrap().finish(harness::process::PATIENCE).unwrap().success().unwrap();
    same_output(&reference, &cluster.workplace).unwrap();
    // The same job again is the same job: nothing is computed, and the report is the same.
    let again = cluster.submit(&prune("llama-tiny", &[])).unwrap().finish(GRACE).unwrap().success().unwrap();
    assert!(again.stdout.contains("sparsity"), "{}", again.stdout);
    each_layer_once(&cluster.run()).unwrap();
}

#[test]
fn a_restarted_coordinator_goes_on_with_its_job_and_the_workers_that_outlived_it() {
    let more = ["--propagation", "pruned"];
    let reference = undisturbed("llama-tiny", &more).unwrap();
    let mut cluster = Cluster::start(2).unwrap();
    let mut follower = cluster.submit(&prune("llama-tiny", &more)).unwrap();
    let run = cluster.run();
    follower.wait_until("a commit", || (!commits(&run).is_empty()).then_some(())).unwrap();
    cluster.restart().unwrap();
    let before = commits(&run);
    assert!(before.len() < LAYERS, "the kill came too late");
    let lost = follower.finish(GRACE).unwrap();
    assert_eq!(lost.code(), Some(75), "a follower says that it lost its coordinator: {}", lost.stderr);
    // Submitted again under the same key: it follows the job that goes on.
    let follower = cluster.submit(&prune("llama-tiny", &more)).unwrap();
    follower.finish(harness::process::PATIENCE).unwrap().success().unwrap();
    assert!(commits(&run).starts_with(&before));
    each_layer_once(&run).unwrap();
    same_output(&reference, &cluster.workplace).unwrap();
}

/// A run that stores every boundary and was killed after two layers.
fn killed_with_boundaries(method: &str) -> Result<Workplace> {
    let mut workplace = Workplace::new();
    workplace.set("ESPALIER__COORDINATOR__STORED_EVERY", "1");
    killed_after(&workplace, &prune("llama-tiny", &["--set", method]), 2)?;
    Ok(workplace)
}

#[test]
fn a_resumed_run_begins_at_the_nearest_stored_boundary() {
    let method = "method.damping=0.02";
    let reference = undisturbed("llama-tiny", &["--set", method]).unwrap();
    let log = |workplace: &Workplace| fs::read_to_string(workplace.path().join("run/logs/local-0.log")).unwrap();
    let is_read = "hidden states read from the store";

    let workplace = killed_with_boundaries(method).unwrap();
    assert!(!log(&workplace).contains(is_read));
    workplace.run(["resume", "run"]).unwrap().success().unwrap();
    assert!(log(&workplace).contains(is_read), "{}", log(&workplace));
    same_output(&reference, &workplace).unwrap();
    assert_eq!(files(&workplace.path().join("run/activations")), Vec::<PathBuf>::new(), "left behind");

    // Damaged ones are not believed: the run begins at the tokens again.
    let workplace = killed_with_boundaries(method).unwrap();
    let stored = files(&workplace.path().join("run/activations"));
    let damaged: Vec<_> = stored.iter().filter(|path| path.extension().is_some_and(|kind| kind == "f32")).collect();
    assert!(!damaged.is_empty(), "{stored:?}");
    for path in damaged {
        let mut bytes = fs::read(path).unwrap();
        bytes[5] ^= 1;
        fs::write(path, bytes).unwrap();
    }
    let finished = workplace.run(["resume", "run"]).unwrap().success().unwrap();
    assert!(finished.stderr.contains("has digest"), "{}", finished.stderr);
    same_output(&reference, &workplace).unwrap();
}

#[test]
fn a_plan_names_what_does_not_fit() {
    let workplace = Workplace::new();
    let cluster = |memory: &str| {
        let text = format!("[[workers]]\nname = \"box\"\ncount = 2\nmemory = \"{memory}\"\ngflops = 50.0\n");
        fs::write(workplace.path().join("cluster.toml"), text).unwrap();
    };
    let model = tiny("llama-tiny");
    let plan = ["plan", utf8(&model), "--cluster", "cluster.toml", "--samples", "8", "--seq-len", "64"];
    cluster("8GB");
    let finished = workplace.run(plan.iter().chain(&["--json"])).unwrap().success().unwrap().json().unwrap();
    assert_eq!(finished["critical_path"].as_array().map(Vec::len), Some(LAYERS), "{finished}");
    assert!(finished["seconds"].as_f64() > Some(0.0) && finished["bytes_moved"].as_u64() > Some(0), "{finished}");
    workplace.run(plan).unwrap().success().unwrap();
    cluster("1MB");
    let finished = workplace.run(plan).unwrap();
    assert_eq!(finished.code(), Some(65), "{}", finished.stderr);
    let errors = finished.error_lines();
    assert!(errors.len() == 1 && errors[0].contains("layer 0 does not fit worker box-0"), "{errors:?}");
    let left: Vec<_> = fs::read_dir(workplace.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["cluster.toml"], "a plan writes nothing");
}
