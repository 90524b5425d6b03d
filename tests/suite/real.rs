//! A real model against reference figures: `make real`, which fetches the model, runs this.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::golden;
use harness::process::{Workplace, target_folder};
use serde_json::Value;

/// Perplexity of the dense model, and how far from it ours may lie.
const DENSE: Figure = Figure { perplexity: 21.02, tolerance: 0.003 };
const WINDOWS: u64 = 16;
const SEQUENCE_LENGTH: u64 = 2048;
const PATIENCE: Duration = Duration::from_secs(15 * 60);

/// A perplexity reached with PyTorch and the authors' code on the same tokens.
struct Figure {
    perplexity: f64,
    tolerance: f64,
}

impl Figure {
    fn check(&self, what: &str, found: f64) -> Result<()> {
        let deviation = found / self.perplexity - 1.0;
        ensure!(
            deviation.abs() <= self.tolerance,
            "{what}: perplexity {found:.3} is {:+.2} % off {}, more than {} %",
            deviation * 100.0,
            self.perplexity,
            self.tolerance * 100.0
        );
        Ok(())
    }
}

/// One way to prune, and what must come of it.
struct Run {
    method: &'static str,
    pattern: [&'static str; 2],
    figure: Figure,
}

const RUNS: [Run; 3] = [
    Run { method: "wanda", pattern: ["--sparsity", "0.5"], figure: Figure { perplexity: 44.26, tolerance: 0.015 } },
    Run { method: "sparsegpt", pattern: ["--sparsity", "0.5"], figure: Figure { perplexity: 36.84, tolerance: 0.015 } },
    Run { method: "sparsegpt", pattern: ["--pattern", "2:4"], figure: Figure { perplexity: 61.30, tolerance: 0.015 } },
];

/// Prunes with two workers and returns the report.
fn report(run: &Run) -> Result<Value> {
    let workplace = Workplace::new();
    let model = target_folder().join("real/SmolLM2-135M-Instruct.Q4_1.gguf");
    ensure!(model.is_file(), "{} is missing: `make real` fetches it", model.display());
    let data = golden().join("real");
    let (calibration, text) = (data.join("smollm2-calibration-32x512.jsonl"), data.join("wikitext2-test-head.txt"));
    let (windows, sequence_length) = (WINDOWS.to_string(), SEQUENCE_LENGTH.to_string());
    let utf8 = |path: &'_ std::path::Path| path.to_str().map(str::to_owned).context("a path is not UTF-8");
    let (model, calibration, text) = (utf8(&model)?, utf8(&calibration)?, utf8(&text)?);

    let mut arguments = vec!["prune", &model, "--output", "out", "--run", "run", "--workers", "2"];
    arguments.extend(["--method", run.method, run.pattern[0], run.pattern[1]]);
    arguments.extend(["--calibration", &calibration, "--samples", "32", "--seq-len", "512"]);
    arguments.extend(["--eval", &text, "--eval-seq-len", &sequence_length, "--eval-max-windows", &windows]);
    workplace.start(arguments)?.finish(PATIENCE)?.success()?;
    let report = fs::read(workplace.path().join("run/report.json")).context("run/report.json")?;
    Ok(serde_json::from_slice(&report)?)
}

fn number(report: &Value, pointer: &str) -> Result<f64> {
    report.pointer(pointer).and_then(Value::as_f64).with_context(|| format!("report.json has no {pointer}"))
}

#[test]
#[ignore = "needs a model from the network and minutes of time: make real"]
#[expect(clippy::print_stdout, reason = "the table is what `make real` is for")]
fn smollm2_matches_the_reference() {
    let mut failures = Vec::new();
    println!("{:<10} {:>8} {:>9} {:>9} {:>9} {:>8}", "method", "pattern", "dense", "pruned", "reference", "seconds");
    for run in &RUNS {
        let what = format!("{} {}", run.method, run.pattern[1]);
        let report = report(run).unwrap_or_else(|error| panic!("{what}: {error:#}"));
        let dense = number(&report, "/perplexity/dense").unwrap();
        let pruned = number(&report, "/perplexity/pruned").unwrap();
        let seconds = number(&report, "/totals/seconds").unwrap();
        println!(
            "{:<10} {:>8} {dense:>9.3} {pruned:>9.3} {:>9.2} {seconds:>8.1}",
            run.method, run.pattern[1], run.figure.perplexity
        );
        assert_eq!(report["perplexity"]["windows"], WINDOWS, "{what}");
        assert_eq!(report["perplexity"]["sequence_length"], SEQUENCE_LENGTH, "{what}");
        failures.extend(DENSE.check(&format!("{what}, dense"), dense).err());
        failures.extend(run.figure.check(&what, pruned).err());
    }
    assert!(failures.is_empty(), "{failures:#?}");
}
