//! The whole path with the real programs: `prune` on one machine, its workers, and what is left behind.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use espalier_common::pattern::Pattern;
use half::bf16;
use harness::checkpoint::{Safetensors, is_sublayer, same_files};
use harness::process::{Workplace, wait_for_end};
use harness::{golden, tiny};

const SAMPLES: &str = "8";
const SEQUENCE_LENGTH: &str = "64";
/// How long an interrupted run may take to clean up.
const GRACE: Duration = Duration::from_secs(20);

/// Prunes a tiny model into `out` of a fresh workplace. Paths are relative to it, so that runs differ in nothing else.
fn pruned(model: &str, more: &[&str]) -> Result<Workplace> {
    let workplace = Workplace::new();
    let (model, text) = (tiny(model), golden().join("text/wikitext2-valid-head.txt"));
    let mut arguments = vec!["prune", utf8(&model), "--output", "out", "--run", "run"];
    arguments.extend(["--calibration", utf8(&text), "--samples", SAMPLES, "--seq-len", SEQUENCE_LENGTH]);
    arguments.extend(more);
    workplace.run(arguments)?.success()?;
    Ok(workplace)
}

fn utf8(path: &Path) -> &str {
    path.to_str().expect("the repository's path is UTF-8")
}

fn assert_workers_do_not_matter(model: &str, propagation: &str) {
    let runs = same_from_1_2_and_3_workers(model, &["--method", "sparsegpt", "--propagation", propagation]);
    // In a chain, workers that would be idle help.
    if propagation == "pruned" {
        assert!(runs[1].assistants_lost() == 0 && runs[1].bytes_moved() > 1_000_000, "{model}: nobody helped");
    }
}

/// A run, for what its report says.
struct Pruned(Workplace);

impl Pruned {
    fn totals(&self) -> serde_json::Value {
        let report = fs::read_to_string(self.0.path().join("run/report.json")).unwrap();
        serde_json::from_str::<serde_json::Value>(&report).unwrap()["totals"].clone()
    }

    fn bytes_moved(&self) -> u64 {
        self.totals()["bytes_moved"].as_u64().unwrap()
    }

    fn assistants_lost(&self) -> u64 {
        self.totals()["assistants_lost"].as_u64().unwrap()
    }
}

fn same_from_1_2_and_3_workers(model: &str, flags: &[&str]) -> Vec<Pruned> {
    let run = |workers| {
        let pruned = pruned(model, &[flags, &["--workers", workers]].concat());
        Pruned(pruned.unwrap_or_else(|error| panic!("{model}, {flags:?}, {workers} workers: {error:#}")))
    };
    let runs: Vec<Pruned> = ["1", "2", "3"].map(run).into();
    for many in &runs[1..] {
        same_files(&runs[0].0.path().join("out"), &many.0.path().join("out"))
            .unwrap_or_else(|error| panic!("{model}, {flags:?}, 1 against more workers: {error:#}"));
    }
    runs
}

#[test]
fn every_method_has_the_same_bytes_from_1_2_and_3_workers_in_a_chain() {
    let blocks = ["--method", "espalier", "--set", "method.row_block=32"];
    let methods: [&[&str]; 8] = [
        &blocks,
        &["--method", "espalier", "--pattern", "2:4", "--set", "method.row_block=48", "--set", "method.alpha=0.2"],
        &["--method", "sparsegpt", "--pattern", "2:4"],
        &["--method", "alps"],
        &["--method", "fista"],
        &["--method", "wanda"],
        &["--method", "magnitude"],
        &["--method", "espalier", "--set", "method.reconstruct=submodule", "--set", "method.reconstruct_epochs=2"],
    ];
    for flags in methods {
        same_from_1_2_and_3_workers("llama-tiny", flags);
    }
    for method in ["slimgpt", "fasp", "spap"] {
        same_from_1_2_and_3_workers("llama-tiny", &["--method", method, "--sparsity", "0.3"]);
    }
}

#[test]
fn llama_has_the_same_bytes_from_1_2_and_3_workers_in_pruned_propagation() {
    assert_workers_do_not_matter("llama-tiny", "pruned");
}

#[test]
fn llama_has_the_same_bytes_from_1_2_and_3_workers_in_dense_propagation() {
    assert_workers_do_not_matter("llama-tiny", "dense");
}

#[test]
fn opt_has_the_same_bytes_from_1_2_and_3_workers_in_pruned_propagation() {
    assert_workers_do_not_matter("opt-tiny", "pruned");
}

#[test]
fn opt_has_the_same_bytes_from_1_2_and_3_workers_in_dense_propagation() {
    assert_workers_do_not_matter("opt-tiny", "dense");
}

#[test]
fn qwen2_has_the_same_bytes_from_1_2_and_3_workers_in_pruned_propagation() {
    assert_workers_do_not_matter("qwen2-tiny", "pruned");
}

#[test]
fn qwen2_has_the_same_bytes_from_1_2_and_3_workers_in_dense_propagation() {
    assert_workers_do_not_matter("qwen2-tiny", "dense");
}

/// Counts zeros in the written file itself, and then asks `inspect` for the same numbers.
fn check_exact(method: &str, pattern: Pattern, flags: &[&str]) -> Result<()> {
    let workplace = pruned("llama-tiny", &[&["--method", method, "--workers", "2"], flags].concat())?;
    let output = workplace.path().join("out");
    let dense = Safetensors::read(&tiny("llama-tiny").join("model.safetensors"))?;
    let sparse = Safetensors::read(&output.join("model.safetensors"))?;
    let report = workplace.run(["inspect", "out", "--json"])?.success()?.json()?;
    let inspected = report["tensors"].as_array().context("inspect --json has no `tensors`")?;

    let mut names: Vec<_> = sparse.names().collect();
    let mut dense_names: Vec<_> = dense.names().collect();
    names.sort_unstable();
    dense_names.sort_unstable();
    ensure!(names == dense_names, "tensors were added or lost: {names:?}");
    for name in names {
        if !is_sublayer(name) {
            ensure!(sparse.bytes(name)? == dense.bytes(name)?, "{name} is no sublayer, but was changed");
            continue;
        }
        let [rows, columns] = sparse.shape(name)?[..] else { anyhow::bail!("{name} is no matrix") };
        let weights = sparse.bf16(name)?;
        let zeros = weights.iter().filter(|weight| is_zero(**weight)).count();
        ensure!(zeros == pattern.zeros(rows, columns), "{name} has {zeros} zeros of {}", rows * columns);
        if let Pattern::NofM { keep, of } = pattern {
            let broken =
                weights.chunks_exact(of).position(|group| group.iter().filter(|w| !is_zero(**w)).count() > keep);
            ensure!(broken.is_none(), "{name} keeps more than {keep} in group {broken:?}");
        }
        let entry =
            inspected.iter().find(|entry| entry["name"] == name).with_context(|| format!("{name} not inspected"))?;
        ensure!(entry["zeros"] == zeros && entry["elements"] == rows * columns, "inspect says of {name}: {entry}");
    }
    Ok(())
}

fn is_zero(weight: bf16) -> bool {
    weight.to_bits() & 0x7FFF == 0
}

#[test]
fn sparsity_is_exact_to_the_weight_for_every_method() {
    for method in ["magnitude", "wanda", "sparsegpt"] {
        for (sparsity, flag) in [(0.5, "0.5"), (0.37, "0.37")] {
            check_exact(method, Pattern::Unstructured { sparsity }, &["--sparsity", flag])
                .unwrap_or_else(|error| panic!("{method} at {flag}: {error:#}"));
        }
    }
}

#[test]
fn every_group_of_an_nofm_pattern_holds_it() {
    for method in ["magnitude", "wanda", "sparsegpt"] {
        for (keep, of, flag) in [(2, 4, "2:4"), (3, 8, "3:8")] {
            check_exact(method, Pattern::NofM { keep, of }, &["--pattern", flag])
                .unwrap_or_else(|error| panic!("{method} at {flag}: {error:#}"));
        }
    }
}

#[test]
fn report_holds_the_perplexities_that_eval_prints() {
    let text = golden().join("text/wikitext2-test-head.txt");
    let windows = ["--eval-seq-len", "64", "--eval-max-windows", "8"];
    let workplace =
        pruned("llama-tiny", &[&["--method", "wanda", "--workers", "2", "--eval", utf8(&text)], &windows[..]].concat())
            .unwrap();
    let report = fs::read_to_string(workplace.path().join("run/report.json")).unwrap();
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    let model = tiny("llama-tiny");
    for (of, key) in [(utf8(&model), "dense"), ("out", "pruned")] {
        let evaluated = workplace
            .run(["eval", of, "--text", utf8(&text), "--seq-len", "64", "--max-windows", "8", "--json"])
            .and_then(|finished| finished.success()?.json())
            .unwrap();
        assert_eq!(evaluated["perplexity"], report["perplexity"][key], "{key}: {evaluated}");
    }
    assert_eq!(report["perplexity"]["sequence_length"], 64);
    assert_eq!(report["perplexity"]["windows"], 8);
}

#[test]
fn the_environment_lies_between_a_job_file_and_the_flags() {
    let mut workplace = Workplace::new();
    workplace.set("ESPALIER__PATTERN__SPARSITY", "0.25");
    workplace.set("ESPALIER__METHOD__NAME", "magnitude");
    let (model, text) = (tiny("llama-tiny"), golden().join("text/wikitext2-valid-head.txt"));
    fs::write(workplace.path().join("job.toml"), "[method]\nname = \"sparsegpt\"\n[pattern]\nnofm = \"2:4\"\n")
        .unwrap();
    let pruned = |output: &str, more: &[&str]| {
        let arguments = ["prune", utf8(&model), "--job", "job.toml", "--output", output, "--json", "--calibration"];
        let size = [utf8(&text), "--samples", "4", "--seq-len", "32"];
        workplace.run([&arguments[..], &size, more].concat()).and_then(|ended| ended.success()?.json()).unwrap()
    };
    let report = pruned("environment", &[]);
    assert_eq!((&report["method"]["name"], &report["totals"]["sparsity"]), (&"magnitude".into(), &0.25.into()));
    let report = pruned("flags", &["--method", "wanda", "--sparsity", "0.5"]);
    assert_eq!((&report["method"]["name"], &report["totals"]["sparsity"]), (&"wanda".into(), &0.5.into()));
    workplace.set("ESPALIER__PATTERN__SPARSTY", "0.25");
    let arguments = ["prune", "m", "--job", "job.toml", "--output", "out", "--calibration", "c"];
    let finished = workplace.run(arguments).unwrap();
    assert_eq!(finished.code(), Some(65), "{}", finished.stderr);
    assert!(finished.stderr.contains("did you mean sparsity?"), "{}", finished.stderr);
}

#[test]
fn interrupt_leaves_neither_output_nor_workers() {
    let workplace = Workplace::new();
    let (model, text) = (tiny("llama-tiny"), golden().join("text/wikitext2-valid-head.txt"));
    let arguments = ["prune", utf8(&model), "--output", "out", "--run", "run", "--workers", "2"];
    // Enough work that the interrupt comes long before the end.
    let work = ["--calibration", utf8(&text), "--samples", "128", "--seq-len", "256", "--method", "sparsegpt"];
    let mut running = workplace.start(arguments.into_iter().chain(work)).unwrap();
    let workers = running.wait_for_children(2).unwrap();
    running.interrupt().unwrap();
    let finished = running.finish(GRACE).unwrap();

    assert_eq!(finished.code(), Some(75), "{}", finished.stderr);
    assert_eq!(finished.error_lines().len(), 1, "{}", finished.stderr);
    wait_for_end(&workers, GRACE).unwrap();
    let left: Vec<_> = fs::read_dir(workplace.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name == "run"), "left behind: {left:?}");
}
