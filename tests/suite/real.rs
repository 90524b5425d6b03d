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

/// The model and the texts, as arguments.
struct Inputs {
    model: String,
    calibration: String,
    text: String,
}

impl Inputs {
    fn find() -> Result<Self> {
        let model = target_folder().join("real/SmolLM2-135M-Instruct.Q4_1.gguf");
        ensure!(model.is_file(), "{} is missing: `make real` fetches it", model.display());
        let data = golden().join("real");
        let utf8 = |path: std::path::PathBuf| path.to_str().map(str::to_owned).context("a path is not UTF-8");
        Ok(Self {
            model: utf8(model)?,
            calibration: utf8(data.join("smollm2-calibration-32x512.jsonl"))?,
            text: utf8(data.join("wikitext2-test-head.txt"))?,
        })
    }
}

/// Prunes with two workers; returns the report.
fn prune(workplace: &Workplace, inputs: &Inputs, run: &Run) -> Result<Value> {
    let mut arguments = vec!["prune", &inputs.model, "--output", "out", "--run", "run", "--workers", "2"];
    arguments.extend(["--method", run.method, run.pattern[0], run.pattern[1]]);
    arguments.extend(["--calibration", &inputs.calibration, "--samples", "32", "--seq-len", "512"]);
    workplace.start(arguments)?.finish(PATIENCE)?.success()?;
    let report = fs::read(workplace.path().join("run/report.json")).context("run/report.json")?;
    Ok(serde_json::from_slice(&report)?)
}

/// Evaluates with two workers; returns the perplexity.
fn evaluate(workplace: &Workplace, inputs: &Inputs, model: &str) -> Result<f64> {
    let (windows, sequence_length) = (WINDOWS.to_string(), SEQUENCE_LENGTH.to_string());
    let mut arguments = vec!["eval", model, "--text", &inputs.text, "--workers", "2", "--json"];
    arguments.extend(["--seq-len", &sequence_length, "--max-windows", &windows]);
    let answer = workplace.start(arguments)?.finish(PATIENCE)?.success()?.json()?;
    ensure!(answer["windows"] == WINDOWS, "{model}: {} windows", answer["windows"]);
    answer["perplexity"].as_f64().context("no perplexity")
}

#[test]
#[ignore = "needs a model from the network and minutes of time: make real"]
#[expect(clippy::print_stdout, reason = "the table is what `make real` is for")]
fn smollm2_matches_the_reference() {
    let inputs = Inputs::find().unwrap();
    let dense = evaluate(&Workplace::new(), &inputs, &inputs.model).unwrap();
    println!("dense perplexity {dense:.3}, reference {}", DENSE.perplexity);
    let mut failures: Vec<_> = DENSE.check("dense", dense).err().into_iter().collect();
    println!(
        "{:<10} {:>8} {:>10} {:>10} {:>8} {:>12}",
        "method", "pattern", "perplexity", "reference", "seconds", "peak RSS MB"
    );
    for run in &RUNS {
        let what = format!("{} {}", run.method, run.pattern[1]);
        let workplace = Workplace::new();
        let report = prune(&workplace, &inputs, run).unwrap_or_else(|error| panic!("{what}: {error:#}"));
        let pruned = evaluate(&workplace, &inputs, "out").unwrap_or_else(|error| panic!("{what}: {error:#}"));
        let totals = &report["totals"];
        let workers = totals["peak_rss_bytes_by_worker"].as_object().into_iter().flat_map(|peaks| peaks.values());
        let peak: f64 = workers.chain([&totals["coordinator_peak_rss_bytes"]]).filter_map(Value::as_f64).sum();
        println!(
            "{:<10} {:>8} {pruned:>10.3} {:>10.2} {:>8.1} {:>12.0}",
            run.method,
            run.pattern[1],
            run.figure.perplexity,
            totals["seconds"].as_f64().unwrap_or(f64::NAN),
            peak / 1e6,
        );
        failures.extend(run.figure.check(&what, pruned).err());
    }
    assert!(failures.is_empty(), "{failures:#?}");
}
