//! A real model against reference figures: `make real` and `make real-methods`, which fetch the model, run this.
//!
//! References are perplexities reached with PyTorch and the authors' code on the same tokens.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use harness::golden;
use harness::process::{Workplace, target_folder};
use serde_json::Value;

/// Perplexity of the dense model.
const DENSE: f64 = 21.02;
const WINDOWS: u64 = 16;
const SEQUENCE_LENGTH: u64 = 2048;
/// Seeds whose windows methods are compared on.
const SEEDS: u64 = 3;
const PATIENCE: Duration = Duration::from_secs(60 * 60);

/// What a perplexity must be, given what the reference reached.
#[derive(Clone, Copy)]
enum Bound {
    /// So near the reference, as a share of it.
    Near { reference: f64, tolerance: f64 },
    /// At most this share of the reference.
    AtMost { reference: f64, share: f64 },
}

impl Bound {
    fn reference(self) -> f64 {
        match self {
            Self::Near { reference, .. } | Self::AtMost { reference, .. } => reference,
        }
    }

    fn check(self, what: &str, found: f64) -> Result<()> {
        let share = found / self.reference();
        let (holds, wanted) = match self {
            Self::Near { tolerance, .. } => ((share - 1.0).abs() <= tolerance, format!("within {tolerance}")),
            Self::AtMost { share: most, .. } => (share <= most, format!("at most {most}")),
        };
        let reference = self.reference();
        ensure!(holds, "{what}: perplexity {found:.3} is {share:.4} of {reference}; wanted: {wanted}");
        Ok(())
    }
}

/// One way to prune, and what must come of it.
#[derive(Clone, Copy)]
struct Run {
    method: &'static str,
    pattern: [&'static str; 2],
    /// What is set beside them.
    options: &'static [&'static str],
    bound: Bound,
}

impl Run {
    const fn new(
        method: &'static str,
        pattern: [&'static str; 2],
        options: &'static [&'static str],
        bound: Bound,
    ) -> Self {
        Self { method, pattern, options, bound }
    }

    fn reconstructs(&self) -> bool {
        self.options.iter().any(|option| option.starts_with("method.reconstruct="))
    }

    fn name(&self) -> String {
        let options = self.options.iter().filter(|option| **option != "--set");
        let options = options.map(|option| option.trim_start_matches("method."));
        [self.method].into_iter().chain(options).collect::<Vec<_>>().join(" ")
    }
}

const fn near(reference: f64, tolerance: f64) -> Bound {
    Bound::Near { reference, tolerance }
}

const fn at_most(share: f64, reference: f64) -> Bound {
    Bound::AtMost { reference, share }
}

const HALF: [&str; 2] = ["--sparsity", "0.5"];
const MOST: [&str; 2] = ["--sparsity", "0.7"];
const TWO_OF_FOUR: [&str; 2] = ["--pattern", "2:4"];
const BEST: &[&str] = &["--set", "method.profile=best"];
/// All sequences are solved on, and no target but the dense weight's own is chosen on some of them.
const PLAIN: &[&str] = &["--held-out", "0"];
const DENSE_INPUTS: &[&str] = &["--propagation", "dense"];
const RECONSTRUCTED: &[&str] = &["--set", "method.reconstruct=submodule"];
const ALLOCATED: &[&str] = &["--set", "method.reconstruct=submodule", "--allocation", "measured"];
const BASELINES: [Run; 3] = [
    Run::new("wanda", HALF, &[], near(44.26, 0.015)),
    Run::new("sparsegpt", HALF, &[], near(36.84, 0.015)),
    Run::new("sparsegpt", TWO_OF_FOUR, &[], near(61.30, 0.015)),
];

const ALPS: Run = Run::new("alps", HALF, &[], near(31.98, 0.01));
const ESPALIER: Run = Run::new("espalier", HALF, &[], at_most(0.97, 31.98));
const ESPALIER_RECONSTRUCTED: Run = Run::new("espalier", HALF, RECONSTRUCTED, at_most(0.94, 31.98));

/// The model and the texts, as arguments.
struct Inputs {
    model: String,
    calibration: String,
    /// What windows are drawn from where seeds are compared.
    seeded_text: String,
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
            seeded_text: utf8(golden().join("text/wikitext2-valid-head.txt"))?,
            text: utf8(data.join("wikitext2-test-head.txt"))?,
        })
    }
}

/// Prunes on the reference's tokens or on windows that a seed draws; returns the report.
fn prune(workplace: &Workplace, inputs: &Inputs, run: &Run, seed: Option<u64>) -> Result<Value> {
    // Reconstruction is the owner's alone, which has all threads only if it is the only worker.
    let workers = if run.reconstructs() { "1" } else { "2" };
    let mut arguments = vec!["prune", &inputs.model, "--output", "out", "--run", "run", "--workers", workers];
    arguments.extend(["--method", run.method]);
    arguments.extend(run.pattern.iter().chain(run.options));
    let seeded = seed.map(|seed| seed.to_string());
    match &seeded {
        None => arguments.extend(["--calibration", &inputs.calibration]),
        Some(seed) => arguments.extend(["--calibration", &inputs.seeded_text, "--seed", seed]),
    }
    arguments.extend(["--samples", "32", "--seq-len", "512"]);
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

/// Prunes and evaluates; prints a row of the table. Gives the perplexity.
#[expect(clippy::print_stdout, reason = "the table is what these runs are for")]
fn row(inputs: &Inputs, run: &Run, seed: Option<u64>) -> Result<f64> {
    let workplace = Workplace::new();
    let report = prune(&workplace, inputs, run, seed)?;
    let pruned = evaluate(&workplace, inputs, "out")?;
    let totals = &report["totals"];
    let workers = totals["peak_rss_bytes_by_worker"].as_object().into_iter().flat_map(|peaks| peaks.values());
    let peak: f64 = workers.chain([&totals["coordinator_peak_rss_bytes"]]).filter_map(Value::as_f64).sum();
    println!(
        "| {} | {} | {pruned:.3} | {:.2} | {:.0} | {:.0} |",
        run.name(),
        run.pattern[1],
        run.bound.reference(),
        totals["seconds"].as_f64().unwrap_or(f64::NAN),
        peak / 1e6,
    );
    Ok(pruned)
}

#[expect(clippy::print_stdout, reason = "the table is what these runs are for")]
fn heading() {
    println!("| method | pattern | perplexity | reference | seconds | peak RSS MB |\n|---|---|---|---|---|---|");
}

/// One row a run, and all that was not as it should be.
fn table(inputs: &Inputs, runs: &[Run]) -> Vec<String> {
    heading();
    let failure = |run: &Run| {
        let what = format!("{} {}", run.name(), run.pattern[1]);
        let checked = row(inputs, run, None).and_then(|found| run.bound.check(&what, found));
        checked.err().map(|error| format!("{what}: {error:#}"))
    };
    runs.iter().filter_map(failure).collect()
}

#[test]
#[ignore = "needs a model from the network and minutes of time: make real"]
#[expect(clippy::print_stdout, reason = "the table is what `make real` is for")]
fn smollm2_matches_the_reference() {
    let inputs = Inputs::find().unwrap();
    let dense = evaluate(&Workplace::new(), &inputs, &inputs.model).unwrap();
    println!("dense perplexity {dense:.3}, reference {DENSE}");
    let mut failures: Vec<_> =
        near(DENSE, 0.003).check("dense", dense).err().map(|error| format!("{error:#}")).into_iter().collect();
    failures.extend(table(&inputs, &BASELINES));
    assert!(failures.is_empty(), "{failures:#?}");
}

/// ALPS' references are what Espalier's own method is held against. It is ahead; with the dense weight's own targets it is
/// their equal at 70 % and 2:4, up to what chance does to models this far gone. FISTA, on the dense model's inputs
/// as its paper has it, has none, so it is held against SparseGPT's. A model that is this far gone as Wanda's at 2:4 and
/// SparseGPT's at 70 % magnifies what differs in the last bits.
mod methods {
    use super::*;

    /// A test for each run, so that `make real-methods ROWS=` can pick some of them.
    macro_rules! rows {
        ($($name:ident: $run:expr;)*) => {$(
            #[test]
            #[ignore = "needs a model from the network and minutes of time: make real-methods"]
            fn $name() {
                let run: Run = $run;
                let found = row(&Inputs::find().unwrap(), &run, None).unwrap();
                run.bound.check(stringify!($name), found).unwrap();
            }
        )*};
    }

    rows! {
        alps_50: ALPS;
        alps_70: Run::new("alps", MOST, &[], near(77.61, 0.01));
        alps_2of4: Run::new("alps", TWO_OF_FOUR, &[], near(47.41, 0.01));
        espalier_50: ESPALIER;
        espalier_70: Run::new("espalier", MOST, &[], at_most(0.9, 77.61));
        espalier_2of4: Run::new("espalier", TWO_OF_FOUR, &[], at_most(0.97, 47.41));
        espalier_best_50: Run::new("espalier", HALF, BEST, at_most(0.97, 31.98));
        espalier_best_70: Run::new("espalier", MOST, BEST, at_most(0.9, 77.61));
        espalier_best_2of4: Run::new("espalier", TWO_OF_FOUR, BEST, at_most(0.97, 47.41));
        espalier_plain_50: Run::new("espalier", HALF, PLAIN, at_most(1.0, 31.98));
        espalier_plain_70: Run::new("espalier", MOST, PLAIN, near(77.61, 0.02));
        espalier_plain_2of4: Run::new("espalier", TWO_OF_FOUR, PLAIN, near(47.41, 0.02));
        espalier_reconstructed_50: ESPALIER_RECONSTRUCTED;
        espalier_reconstructed_2of4: Run::new("espalier", TWO_OF_FOUR, RECONSTRUCTED, at_most(0.9, 47.41));
        espalier_allocated_70: Run::new("espalier", MOST, ALLOCATED, at_most(0.9, 77.61));
        fista_50: Run::new("fista", HALF, DENSE_INPUTS, at_most(1.01, 36.84));
        fista_70: Run::new("fista", MOST, DENSE_INPUTS, at_most(1.01, 141.05));
        fista_2of4: Run::new("fista", TWO_OF_FOUR, DENSE_INPUTS, at_most(1.01, 61.30));
        sparsegpt_70: Run::new("sparsegpt", MOST, &[], near(141.05, 0.05));
        wanda_2of4: Run::new("wanda", TWO_OF_FOUR, &[], near(148.67, 0.03));
    }
}

#[test]
#[ignore = "needs a model from the network and half an hour: make real-methods"]
#[expect(clippy::print_stdout, reason = "the table is what these runs are for")]
fn seeds_keep_the_order_of_methods_whatever_the_calibration_windows() {
    let inputs = Inputs::find().unwrap();
    heading();
    let means = [ALPS, ESPALIER, ESPALIER_RECONSTRUCTED].map(|run| {
        let found: Vec<f64> = (0..SEEDS).map(|seed| row(&inputs, &run, Some(seed)).unwrap()).collect();
        let mean = found.iter().sum::<f64>() / SEEDS as f64;
        let variance = found.iter().map(|found| (found - mean).powi(2)).sum::<f64>() / (SEEDS - 1) as f64;
        println!("{}: mean {mean:.3}, standard deviation {:.3}", run.name(), variance.sqrt());
        mean
    });
    assert!(means[1] <= means[0] && means[2] <= 0.94 * means[0], "{means:?}");
}
