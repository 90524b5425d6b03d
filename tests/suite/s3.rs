//! Runs whose journal and artifacts are on S3, against a real server process: the same bytes as on this machine, and never
//! two coordinators that both commit.
//!
//! Without a server these tests say that they are skipped; `make test-s3` installs one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};
use espalier_common::ids::{Attempt, LayerIndex, Lease, Unit, WorkerId};
use espalier_common::store::{self, BlobStore, conformance};
use espalier_coordinator::journal::{self, JournalError, JournalRecord};
use espalier_coordinator::schedule::Record;
use harness::checkpoint::same_files;
use harness::process::{PATIENCE, Running, Workplace, kill, wait_for_end};
use harness::s3::{BUCKET, S3Server, Trouble};
use harness::{golden, tiny};
use rand::Rng;

use crate::kill::Job;

const LAYERS: usize = 4;

fn url(name: &str) -> String {
    format!("s3://{BUCKET}/{name}")
}

fn open(server: &S3Server, name: &str) -> Result<Arc<dyn BlobStore>> {
    Ok(store::open(&url(name), &server.settings())?)
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("the repository's path is UTF-8")
}

/// Prunes the tiny LLaMA with its run at `run`: enough work in each layer that a kill after a commit comes before the next.
fn prune(run: &str) -> Vec<String> {
    let (model, text) = (tiny("llama-tiny"), golden().join("text/wikitext2-valid-head.txt"));
    let arguments = ["prune", utf8(&model), "--output", "out", "--run", run, "--calibration", utf8(&text)];
    let work = ["--samples", "32", "--seq-len", "128", "--method", "espalier"];
    arguments.iter().chain(&work).map(|argument| (*argument).to_owned()).collect()
}

fn records(store: &dyn BlobStore) -> Vec<JournalRecord> {
    journal::read_run(store).unwrap_or_default()
}

fn committed(records: &[JournalRecord]) -> Vec<LayerIndex> {
    let layer = |record: &JournalRecord| match record {
        JournalRecord::Prune(Record::Committed { lease, .. }) => match lease.unit {
            Unit::Prune(layer) => Some(layer),
            _ => None,
        },
        _ => None,
    };
    records.iter().filter_map(layer).collect()
}

fn takeovers(records: &[JournalRecord]) -> usize {
    records.iter().filter(|record| matches!(record, JournalRecord::TakenOver(_))).count()
}

/// Starts a run, and kills it with all its workers once a layer is committed and the next one leased.
fn killed_after_a_commit(workplace: &Workplace, store: &dyn BlobStore, run: &str) -> Result<()> {
    let mut running = workplace.start(prune(run))?;
    running.wait_until("a commit and the next lease", || {
        let records = records(store);
        let is_leased = matches!(records.last(), Some(JournalRecord::Prune(Record::Leased { .. })));
        (!committed(&records).is_empty() && is_leased).then_some(())
    })?;
    let workers = running.children()?;
    running.kill()?;
    wait_for_end(&workers, PATIENCE)
}

fn each_layer_once(store: &dyn BlobStore) -> Result<()> {
    let mut layers = committed(&records(store));
    layers.sort_unstable();
    let all: Vec<_> = (0..LAYERS as u32).map(LayerIndex).collect();
    ensure!(layers == all, "committed: {layers:?}");
    Ok(())
}

#[test]
fn a_store_on_s3_conforms() {
    let Some(server) = S3Server::start().unwrap() else { return };
    conformance::check(&*open(&server, "conformance").unwrap());
    conformance::check(&*open(&server, "").unwrap());
}

#[test]
fn of_two_writers_on_s3_one_is_fenced() {
    let Some(server) = S3Server::start().unwrap() else { return };
    let store = open(&server, "run").unwrap();
    let lease = Lease { unit: Unit::Prune(LayerIndex(0)), worker: WorkerId(1), attempt: Attempt(1) };
    let record = JournalRecord::Prune(Record::Leased { lease });
    let (mut first, _) = journal::open(&store).unwrap();
    first.append(&record).unwrap();
    let (mut second, found) = journal::open(&store).unwrap();
    assert!(found.contains(&record) && takeovers(&found) == 2, "{found:?}");
    assert!(matches!(first.append(&record), Err(JournalError::Fenced { index: 2, .. })));
    second.append(&record).unwrap();
    assert_eq!(records(store.as_ref()).len(), 4);
}

#[test]
fn a_run_on_s3_that_is_killed_and_resumed_gives_the_bytes_of_a_local_one() {
    let Some(server) = S3Server::start().unwrap() else { return };
    let local = Workplace::new();
    local.run(prune("run")).unwrap().success().unwrap();
    let workplace = server.workplace();
    let (store, run) = (open(&server, "runs/1").unwrap(), url("runs/1"));
    killed_after_a_commit(&workplace, store.as_ref(), &run).unwrap();
    assert!(!workplace.path().join("out").exists(), "the output is there before it is complete");
    let before = committed(&records(store.as_ref()));
    workplace.run(["resume", &run, "--workers", "2"]).unwrap().success().unwrap();
    assert!(committed(&records(store.as_ref())).starts_with(&before), "commits were lost");
    each_layer_once(store.as_ref()).unwrap();
    same_files(&local.path().join("out"), &workplace.path().join("out")).unwrap();

    let names = store.list("").unwrap();
    for file in ["job.toml", "fingerprint.json", "report.json", "journal/00000000", "tokens/"] {
        assert!(names.iter().any(|name| name.starts_with(file)), "{file} is not among {names:?}");
    }
    let rest = names.iter().find(|name| ["layers/", "activations/"].iter().any(|folder| name.starts_with(folder)));
    assert_eq!(rest, None, "left behind");
    let left: Vec<_> = std::fs::read_dir(workplace.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["out"], "what the run keeps is on S3 alone");
    let told = workplace.run(["report", &run, "--json"]).unwrap().success().unwrap().json().unwrap();
    let kept: serde_json::Value = serde_json::from_slice(&store.get("report.json").unwrap()).unwrap();
    assert_eq!(told, kept);
}

/// [`prune`] with another output, in several shards.
fn prune_to(output: &str, run: &str) -> Vec<String> {
    let arguments = prune(run).into_iter().map(|argument| if argument == "out" { output.to_owned() } else { argument });
    arguments.chain(["--shard-size".to_owned(), "200KB".to_owned()]).collect()
}

#[test]
fn a_checkpoint_on_s3_has_the_bytes_of_a_local_one() {
    let Some(server) = S3Server::start().unwrap() else { return };
    let workplace = server.workplace();
    workplace.run(prune_to("out", "run")).unwrap().success().unwrap();
    workplace.run(prune_to(&url("out"), "other")).unwrap().success().unwrap();
    let local = store::LocalStore::open(&workplace.path().join("out")).unwrap();
    let there = open(&server, "out").unwrap();
    let names = local.list("").unwrap();
    assert!(names.iter().any(|name| name == "model.safetensors.index.json"), "{names:?}");
    assert_eq!(there.list("").unwrap(), names);
    for name in names {
        assert!(there.get(&name).unwrap() == local.get(&name).unwrap(), "{name} differs");
    }
    let finished = workplace.run(prune_to(&url("out"), "third")).unwrap();
    assert_eq!(finished.code(), Some(65), "{}", finished.stderr);
    assert!(finished.stderr.contains("not an empty directory"), "{}", finished.stderr);
}

#[test]
fn a_model_on_s3_is_read_by_range_and_so_is_the_output() {
    let Some(server) = S3Server::start().unwrap() else { return };
    let workplace = server.workplace();
    let (model, there) = (store::LocalStore::open(&tiny("llama-tiny")).unwrap(), open(&server, "model").unwrap());
    for name in model.list("").unwrap() {
        there.put(&name, &model.get(&name).unwrap()).unwrap();
    }
    let text = golden().join("text/wikitext2-test-head.txt");
    let evaluated = ["--eval", utf8(&text), "--eval-seq-len", "128", "--eval-max-windows", "4", "--json"];
    let command = |model: &str, output: &str, run: &str| -> Vec<String> {
        let mut arguments = prune(run);
        arguments[1] = model.to_owned();
        // What is read is of interest, not how well it is pruned.
        for (long, short) in [("espalier", "wanda"), ("32", "8")] {
            arguments.iter_mut().filter(|argument| *argument == long).for_each(|argument| *argument = short.to_owned());
        }
        let arguments =
            arguments.into_iter().map(|argument| if argument == "out" { output.to_owned() } else { argument });
        arguments.chain(evaluated.iter().map(|argument| (*argument).to_owned())).collect()
    };
    let local = command(utf8(&tiny("llama-tiny")), "out", "run");
    let local = workplace.run(local).unwrap().success().unwrap().json().unwrap();
    let remote = command(&url("model"), &url("out"), &url("run"));
    let remote = workplace.run(remote).unwrap().success().unwrap().json().unwrap();
    assert!(local["perplexity"]["pruned"].as_f64() > Some(1.0), "{local}");
    assert_eq!(remote["perplexity"], local["perplexity"]);
    // The manifest and the model card tell where the model was.
    for name in ["model.safetensors", "config.json", "tokenizer.json"] {
        assert_eq!(remote["files"][name], local["files"][name], "{name}");
    }
}

/// Runs a command again as long as it says that it was interrupted.
fn until_done(workplace: &Workplace, command: &[String], run: &str) -> Result<u32> {
    let mut finished = workplace.run(command)?;
    for interruptions in 0..10 {
        match finished.code() {
            Some(75) => finished = workplace.run(["resume", run, "--workers", "2"])?,
            _ => return finished.success().map(|_| interruptions),
        }
    }
    anyhow::bail!("interrupted again and again: {}", finished.stderr)
}

#[test]
fn a_store_that_errs_stalls_and_answers_wrongly_costs_time_only() {
    let Some(server) = S3Server::start_troubled(Trouble { seed: 123, of_thousand: 150 }).unwrap() else { return };
    let local = Workplace::new();
    local.run(prune("run")).unwrap().success().unwrap();
    let workplace = server.workplace();
    until_done(&workplace, &prune(&url("run")), &url("run")).unwrap();
    let troubles = server.troubles().unwrap();
    assert!(["500", "503", "late", "lost", "stalled"].iter().all(|kind| troubles.contains_key(*kind)), "{troubles:?}");
    each_layer_once(open(&server, "run").unwrap().as_ref()).unwrap();
    same_files(&local.path().join("out"), &workplace.path().join("out")).unwrap();
}

/// A run on a store in trouble, whose coordinator and workers are killed now and then; gives what was met with.
pub(crate) fn troubled_run(
    rng: &mut impl Rng,
    job: Job,
    reference: &Workplace,
) -> Result<Option<BTreeMap<String, u64>>> {
    let trouble = Trouble { seed: rng.random(), of_thousand: rng.random_range(20..200) };
    let Some(server) = S3Server::start_troubled(trouble)? else { return Ok(None) };
    let (workplace, run) = (server.workplace(), url("run"));
    let replaced = |argument: String| if argument == "run" { run.clone() } else { argument };
    let prune: Vec<String> = job.prune("2").into_iter().map(replaced).collect();
    let resume = ["resume", &run, "--workers", "2"].map(str::to_owned).to_vec();
    let next = || -> Result<&[String]> {
        let is_created = |record: &JournalRecord| matches!(record, JournalRecord::Created(_));
        Ok(if records(open(&server, "run")?.as_ref()).iter().any(is_created) { &resume } else { &prune })
    };
    let mut is_done = false;
    for _ in 0..rng.random_range(0..4) {
        let mut running = workplace.start(next()?)?;
        thread::sleep(Duration::from_millis(rng.random_range(200..6000)));
        if running.ended()?.is_none() {
            let workers = running.children()?;
            match workers.first().filter(|_| rng.random_bool(0.5)) {
                // It may have ended by itself.
                Some(worker) => drop(kill(*worker)),
                None => {
                    running.kill()?;
                    wait_for_end(&workers, PATIENCE)?;
                }
            }
        }
        is_done = running.finish(PATIENCE)?.code() == Some(0);
        if is_done {
            break;
        }
    }
    if !is_done {
        until_done(&workplace, next()?, &run)?;
    }
    each_layer_once(open(&server, "run")?.as_ref())?;
    same_files(&reference.path().join("out"), &workplace.path().join("out"))?;
    Ok(Some(server.troubles()?))
}

fn fenced(running: Running) -> Result<()> {
    let finished = running.finish(PATIENCE)?;
    ensure!(finished.code() == Some(75), "exit {:?}, not 75: {}", finished.code(), finished.stderr);
    let errors = finished.error_lines();
    ensure!(errors.len() == 1 && errors[0].contains("another coordinator has taken over"), "{errors:?}");
    Ok(())
}

#[test]
fn of_two_that_resume_a_run_at_once_one_is_fenced_and_one_ends_well() {
    let Some(server) = S3Server::start().unwrap() else { return };
    let workplace = server.workplace();
    let (store, run) = (open(&server, "run").unwrap(), url("run"));
    killed_after_a_commit(&workplace, store.as_ref(), &run).unwrap();
    let before = takeovers(&records(store.as_ref()));
    let mut first = workplace.start(["resume", &run]).unwrap();
    first.wait_until("its takeover", || (takeovers(&records(store.as_ref())) > before).then_some(())).unwrap();
    let second = workplace.start(["resume", &run]).unwrap();
    fenced(first).unwrap();
    second.finish(PATIENCE).unwrap().success().unwrap();
    each_layer_once(store.as_ref()).unwrap();
}

#[test]
fn a_run_is_looked_at_and_cancelled_by_its_url() {
    let Some(server) = S3Server::start().unwrap() else { return };
    let workplace = server.workplace();
    let (store, run) = (open(&server, "run").unwrap(), url("run"));
    let mut running = workplace.start(prune(&run)).unwrap();
    running.wait_until("a commit", || (!committed(&records(store.as_ref())).is_empty()).then_some(())).unwrap();
    let status = workplace.run(["status", &run, "--json"]).unwrap().success().unwrap().json().unwrap();
    assert!(status["committed"].as_u64() >= Some(1) && status["layers"] == LAYERS, "{status}");
    workplace.run(["cancel", &run]).unwrap().success().unwrap();
    fenced(running).unwrap();
    assert!(
        matches!(records(store.as_ref()).last(), Some(JournalRecord::Stopped { reason, .. }) if reason == "cancelled")
    );
    workplace.run(["resume", &run]).unwrap().success().unwrap();
    each_layer_once(store.as_ref()).unwrap();
    assert_eq!(workplace.run(["cancel", &run]).unwrap().code(), Some(65), "it is done");
}

#[test]
fn of_two_coordinators_on_one_root_the_first_is_fenced() {
    let Some(server) = S3Server::start().unwrap() else { return };
    let workplace = server.workplace();
    let start = || -> Result<(Running, String)> {
        let mut coordinator = workplace.start(["coordinator", "--listen", "127.0.0.1:0", "--runs", &url("runs")])?;
        let address = coordinator.wait_for_line("listening on ")?;
        Ok((coordinator, address))
    };
    let (first, address) = start().unwrap();
    let (second, _) = start().unwrap();
    let submit = prune(&url("run")).into_iter().chain(["--coordinator".to_owned(), address]);
    let refused = workplace.run(submit).unwrap();
    assert!(refused.stderr.contains("another coordinator has taken over"), "{}", refused.stderr);
    fenced(first).unwrap();
    second.interrupt().unwrap();
    second.finish(PATIENCE).unwrap().success().unwrap();
}

#[test]
fn what_will_never_work_is_refused_at_once() {
    let Some(server) = S3Server::start().unwrap() else { return };
    let workplace = server.workplace();
    for (run, named) in [("s3://no-such-bucket/run", "NoSuchBucket"), ("ftp://host/run", "ftp://host/run")] {
        let finished = workplace.run(prune(run)).unwrap();
        assert_eq!(finished.code(), Some(65), "{run}: {}", finished.stderr);
        let errors = finished.error_lines();
        assert!(errors.len() == 1 && errors[0].contains(named), "{errors:?}");
        assert!(!finished.stderr.contains("test-secret"), "{}", finished.stderr);
    }
}
