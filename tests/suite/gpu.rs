//! A GPU, where there is one: what it prunes is what the CPU prunes, up to rounding, and it loses nothing either.
//!
//! `make test-cuda` runs these, once it has built `espalier-worker-cuda`. Without a GPU they are skipped, out loud.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use harness::checkpoint::same_files;
use harness::process::{Workplace, target_folder};
use harness::{TINY_MODELS, golden, tiny};
use serde_json::Value;

use crate::past::commits;
use crate::resume::killed_after;

/// How far the relative error of a sublayer may be off, as a share of itself: products are added up in another order, and where
/// two weights are nearly as good the other one may go, which the layers after it then see. 2 % was measured on an H100.
const ERROR: f64 = 0.05;
/// The same of a perplexity; 0.2 % was measured.
const PERPLEXITY: f64 = 0.01;

/// Whether there is a GPU; says so if not. The program must be there, start and answer.
#[allow(clippy::print_stderr, reason = "what a test leaves out is said out loud")]
fn has_gpu() -> bool {
    let asked = || -> Result<Value> {
        let program = target_folder().join("release/espalier-worker-cuda");
        let output = Command::new(&program).args(["devices", "--json"]).output().context("espalier-worker-cuda")?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(serde_json::from_slice(&output.stdout)?)
    };
    let devices = asked().expect("espalier-worker-cuda says what it can use");
    let gpus = devices["gpus"].as_array().expect("it says which GPUs there are");
    match gpus.first() {
        Some(gpu) => eprintln!("on {gpu}"),
        None => eprintln!("SKIPPED: no GPU: {}", devices["absent"]),
    }
    !gpus.is_empty()
}

fn prune(model: &str, device: &str, more: &[&str]) -> Vec<String> {
    let path = |path: &Path| path.to_str().expect("the repository's path is UTF-8").to_owned();
    let (model, text) = (path(&tiny(model)), golden().join("text"));
    let (calibration, test) =
        (path(&text.join("wikitext2-valid-head.txt")), path(&text.join("wikitext2-test-head.txt")));
    let fixed = ["prune", &model, "--output", "out", "--run", "run", "--device", device, "--calibration", &calibration];
    let sizes =
        ["--samples", "32", "--seq-len", "128", "--eval", &test, "--eval-seq-len", "128", "--eval-max-windows", "16"];
    fixed.iter().chain(&sizes).chain(more).map(|argument| (*argument).to_owned()).collect()
}

fn done(model: &str, device: &str, more: &[&str]) -> Result<Workplace> {
    let workplace = Workplace::new();
    workplace.run(prune(model, device, more))?.success()?;
    Ok(workplace)
}

fn report(workplace: &Workplace) -> Result<Value> {
    Ok(serde_json::from_slice(&fs::read(workplace.path().join("run/report.json"))?)?)
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// Compares what two reports say of each sublayer and of the model.
#[allow(clippy::print_stderr, reason = "how near they are is worth knowing")]
fn agree(what: &str, on_cpu: &Value, on_gpu: &Value) -> Result<()> {
    let sublayers = |report: &Value| report["sublayers"].as_array().cloned().unwrap_or_default();
    let (ours, theirs) = (sublayers(on_gpu), sublayers(on_cpu));
    ensure!(!ours.is_empty() && ours.len() == theirs.len(), "{what}: {} sublayers, not {}", ours.len(), theirs.len());
    let mut farthest = 0.0_f64;
    for (one, other) in ours.iter().zip(&theirs) {
        let name = format!("{what}: layer {} {}", one["layer"], one["name"]);
        ensure!(one["name"] == other["name"] && one["sparsity"] == other["sparsity"], "{name}: {one} and {other}");
        let off = (number(&one["rel_error"]) / number(&other["rel_error"]) - 1.0).abs();
        ensure!(
            off <= ERROR,
            "{name}: the error is {} on the GPU, {} on the CPU",
            one["rel_error"],
            other["rel_error"]
        );
        farthest = farthest.max(off);
    }
    let perplexity = |report: &Value| number(&report["perplexity"]["pruned"]);
    let off = (perplexity(on_gpu) / perplexity(on_cpu) - 1.0).abs();
    ensure!(off <= PERPLEXITY, "{what}: perplexities {} and {}", on_gpu["perplexity"], on_cpu["perplexity"]);
    eprintln!("{what}: errors within {farthest:.1e}, perplexity within {off:.1e}");
    Ok(())
}

#[test]
#[ignore = "for a GPU: `make test-cuda` runs this"]
fn a_gpu_prunes_as_the_cpu_does() {
    if !has_gpu() {
        return;
    }
    for (model, flags) in [
        (TINY_MODELS[0], &["--method", "espalier"][..]),
        (TINY_MODELS[1], &["--method", "espalier", "--pattern", "2:4"]),
        (TINY_MODELS[2], &["--method", "sparsegpt"]),
        (TINY_MODELS[0], &["--method", "sparsegpt", "--pattern", "2:4"]),
        (TINY_MODELS[2], &["--method", "alps"]),
        (TINY_MODELS[1], &["--method", "wanda", "--propagation", "dense"]),
        (TINY_MODELS[0], &["--method", "slimgpt"]),
    ] {
        let on = |device| report(&done(model, device, flags)?);
        let (on_cpu, on_gpu) = (on("cpu").unwrap(), on("cuda:0").unwrap());
        let devices = on_gpu["totals"]["device_by_worker"].to_string();
        assert!(devices.contains("cuda:0 ("), "{devices}");
        agree(&format!("{model} {flags:?}"), &on_cpu, &on_gpu).unwrap();
    }
}

#[test]
#[ignore = "for a GPU: `make test-cuda` runs this"]
fn a_gpu_gives_the_same_bytes_again_shared_by_two_workers_or_killed_on_the_way() {
    if !has_gpu() {
        return;
    }
    let output = |workplace: &Workplace| workplace.path().join("out");
    let reference = done("llama-tiny", "cuda:0", &[]).unwrap();
    let shared = done("llama-tiny", "cuda:0", &["--workers", "2"]).unwrap();
    same_files(&output(&reference), &output(&shared)).unwrap();
    let links = report(&shared).unwrap()["totals"]["links"].to_string();
    assert!(links.contains("both workers have the same"), "one GPU cannot be joined with itself: {links}");

    let killed = Workplace::new();
    killed_after(&killed, &prune("llama-tiny", "cuda:0", &[]), 2).unwrap();
    let before = commits(&killed.path().join("run"));
    killed.run(["resume", "run", "--device", "cuda:0"]).unwrap().success().unwrap();
    assert!(commits(&killed.path().join("run")).starts_with(&before), "commits were lost");
    same_files(&output(&reference), &output(&killed)).unwrap();
}
