//! Sparsity spread over layers by a survey of the dense model, with the real programs.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use espalier_common::ids::Unit;
use espalier_coordinator::journal::{self, JournalRecord};
use espalier_coordinator::schedule::Record;
use harness::checkpoint::same_files;
use harness::process::{Workplace, wait_for_end};
use harness::{golden, tiny};
use serde_json::Value;

const LAYERS: usize = 4;

fn utf8(path: &Path) -> &str {
    path.to_str().expect("the repository's path is UTF-8")
}

/// `prune` of a tiny model into `out`, with `pattern` as the job's `[pattern]`.
fn arguments(workplace: &Workplace, model: &str, pattern: &str, more: &[&str]) -> Result<Vec<String>> {
    fs::write(
        workplace.path().join("job.toml"),
        format!(
            "[model]\nsource = {:?}\n[calibration]\nsource = {:?}\nsamples = 24\nsequence_length = 96\n\
             [method]\nname = \"sparsegpt\"\n[pattern]\n{pattern}\n[output]\nuri = \"out\"\n",
            utf8(&tiny(model)),
            utf8(&golden().join("text/wikitext2-valid-head.txt"))
        ),
    )?;
    let arguments = ["prune", "--job", "job.toml", "--run", "run", "--json"];
    Ok(arguments.iter().chain(more).map(|argument| (*argument).to_owned()).collect())
}

fn report(workplace: &Workplace, model: &str, pattern: &str, more: &[&str]) -> Result<Value> {
    workplace.run(arguments(workplace, model, pattern, more)?)?.success()?.json()
}

fn sparsities(report: &Value) -> Vec<f64> {
    let layers = report["allocation"]["layers"].as_array().cloned().unwrap_or_default();
    layers.iter().filter_map(|layer| layer["sparsity"].as_f64()).collect()
}

fn zeros(report: &Value) -> u64 {
    report["sublayers"].as_array().into_iter().flatten().filter_map(|entry| entry["zeros"].as_u64()).sum()
}

/// The same number of zeros as without allocation, unevenly spread, in the same bytes from any number of workers.
fn check(model: &str, allocation: &str, propagation: &str, below: f64, above: f64) -> Result<()> {
    let pattern = format!("sparsity = 0.6\nallocation = \"{allocation}\"");
    let uniform = report(&Workplace::new(), model, "sparsity = 0.6", &["--propagation", propagation])?;
    let one = Workplace::new();
    let found = report(&one, model, &pattern, &["--propagation", propagation, "--workers", "1"])?;
    for workers in ["2", "3"] {
        let many = Workplace::new();
        let again = report(&many, model, &pattern, &["--propagation", propagation, "--workers", workers])?;
        same_files(&one.path().join("out"), &many.path().join("out"))?;
        ensure!(again["allocation"] == found["allocation"], "{workers} workers found something else");
    }
    ensure!(zeros(&found) == zeros(&uniform), "{} zeros, not {}", zeros(&found), zeros(&uniform));
    let sparsities = sparsities(&found);
    ensure!(sparsities.len() == LAYERS, "{found}");
    // To the last bit but for what the subtraction itself rounds.
    let bounds = 0.6 - below - 1e-12..=0.6 + above + 1e-12;
    ensure!(sparsities.iter().all(|sparsity| bounds.contains(sparsity)), "{sparsities:?}");
    ensure!(found["totals"]["seconds_by_phase"]["survey"].as_f64() > Some(0.0), "{}", found["totals"]);
    let trials = found["allocation"]["trials"].as_array().cloned().unwrap_or_default();
    if allocation == "measured" {
        let loss = |trial: &Value| trial["perplexity"].as_f64().unwrap_or(f64::INFINITY);
        let chosen: Vec<&Value> = trials.iter().filter(|trial| trial["chosen"] == true).collect();
        ensure!(trials.len() == 10 && chosen.len() == 1, "{trials:?}");
        ensure!(trials.iter().all(|trial| loss(chosen[0]) <= loss(trial)), "{trials:?}");
    } else {
        ensure!(trials.is_empty() && sparsities.windows(2).any(|pair| (pair[0] - pair[1]).abs() > 0.01), "{found}");
    }
    Ok(())
}

#[test]
fn owl_spends_the_same_zeros_unevenly_and_alike_from_any_number_of_workers() {
    check("llama-tiny", "owl", "pruned", 0.16, 0.16).unwrap();
    check("opt-tiny", "owl", "dense", 0.16, 0.16).unwrap();
}

#[test]
fn measured_spends_the_same_zeros_within_bounds_and_alike_from_any_number_of_workers() {
    check("llama-tiny", "measured", "pruned", 0.15, 0.1).unwrap();
    check("qwen2-tiny", "measured", "dense", 0.15, 0.1).unwrap();
}

#[test]
fn a_depth_weight_that_the_job_gives_is_tried() {
    let workplace = Workplace::new();
    let pattern = "sparsity = 0.7\nallocation = \"measured\"\ndepth_weights = [0.5]\nallocation_samples = 3";
    let found = report(&workplace, "opt-tiny", pattern, &[]).unwrap();
    let trials = found["allocation"]["trials"].as_array().unwrap();
    let depths: Vec<&Value> = trials.iter().map(|trial| &trial["depth_weight"]).collect();
    assert_eq!(depths, [&Value::Null, &Value::from(0.5)]);
    assert_eq!(found["allocation"]["layers"][0]["survey"]["curves"][0]["errors"].as_array().map(Vec::len), Some(6));
}

fn surveys(run: &Path) -> Vec<Record> {
    let records = journal::read(&run.join("journal")).unwrap_or_default();
    let surveys = records.into_iter().filter_map(|record| match record {
        JournalRecord::Survey(record) => Some(record),
        _ => None,
    });
    surveys.collect()
}

/// How many units of the survey are committed: layers looked at, then plans tried.
fn commits(run: &Path) -> usize {
    surveys(run).iter().filter(|record| matches!(record, Record::Committed { .. })).count()
}

/// Kills the run when so many units are committed and another is leased, takes it up again, and checks that the result is
/// the undisturbed one's and that nothing committed was leased again.
fn kill_and_resume(reference: &Workplace, pattern: &str, wanted: usize) -> Result<()> {
    let workplace = Workplace::new();
    let run = workplace.path().join("run");
    let mut running = workplace.start(arguments(&workplace, "llama-tiny", pattern, &["--workers", "2"])?)?;
    running.wait_until("the lease", || {
        let leased = matches!(surveys(&run).last(), Some(Record::Leased { .. }));
        (leased && commits(&run) >= wanted).then_some(())
    })?;
    let workers = running.children()?;
    running.kill()?;
    wait_for_end(&workers, std::time::Duration::from_secs(20))?;
    let before = commits(&run);
    workplace.run(["resume", "run", "--workers", "2"])?.success()?;
    let mut committed: BTreeMap<Unit, usize> = BTreeMap::new();
    for record in surveys(&run) {
        match record {
            Record::Committed { lease, .. } => *committed.entry(lease.unit).or_default() += 1,
            Record::Leased { lease } => ensure!(!committed.contains_key(&lease.unit), "{} again", lease.unit),
            Record::Failed { .. } => {}
        }
    }
    ensure!(committed.values().all(|count| *count == 1) && committed.len() > before, "{committed:?}");
    let plan = |workplace: &Workplace| {
        let records = journal::read(&workplace.path().join("run/journal")).unwrap_or_default();
        records.into_iter().find(|record| matches!(record, JournalRecord::Planned { .. })).context("no plan")
    };
    ensure!(plan(reference)? == plan(&workplace)?, "another plan");
    same_files(&reference.path().join("out"), &workplace.path().join("out"))
}

#[test]
fn a_run_that_is_killed_while_it_surveys_comes_to_the_same_plan() {
    let pattern = "sparsity = 0.6\nallocation = \"measured\"\ndepth_weights = [0.0, 0.1]";
    let reference = Workplace::new();
    report(&reference, "llama-tiny", pattern, &[]).unwrap();
    // In the first layer, in the third, and among the plans.
    for wanted in [0, 2, LAYERS] {
        kill_and_resume(&reference, pattern, wanted).unwrap_or_else(|error| panic!("after {wanted}: {error:#}"));
    }
}

#[test]
fn what_cannot_be_allocated_is_refused() {
    for (pattern, more, named) in [
        ("nofm = \"2:4\"\nallocation = \"owl\"", vec![], "2:4"),
        ("nofm = \"2:4\"\nallocation = \"measured\"", vec![], "2:4"),
        ("allocation = \"measured\"", vec!["--samples", "1"], "samples is 1"),
        ("allocation = \"owl\"\ndepth_weights = [0.0]", vec![], "depth_weights"),
        ("sparsity = 0.3\nallocation = \"owl\"", vec!["--method", "fasp", "--layout", "padded"], "place zeros"),
        ("sparsity = 0.3\nallocation = \"measured\"", vec!["--method", "slimgpt", "--layout", "padded"], "place zeros"),
    ] {
        let workplace = Workplace::new();
        let finished = workplace.run(arguments(&workplace, "llama-tiny", pattern, &more).unwrap()).unwrap();
        assert_eq!(finished.code(), Some(65), "{pattern}: {}", finished.stderr);
        let errors = finished.error_lines();
        assert!(errors.len() == 1 && errors[0].contains(named), "{pattern}: {errors:?}");
        assert!(!workplace.path().join("out").exists());
    }
}
