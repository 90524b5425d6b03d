//! Seconds, arithmetic and error of every method on a real layer problem and on made ones, against the fastest plain matrix
//! product that the same process finds, of the problem's own shape or of 1536 by 1536 by 1536: `cargo bench --workspace --bench solvers [-- --method NAME] [--columns WIDTH]`.

#![allow(clippy::print_stdout, reason = "a table is what this program is for")]

use std::sync::Arc;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use espalier_common::clock::Stopwatch;
use espalier_common::pattern::Pattern;
use espalier_worker::calibrate::gram::GramAccumulator;
use espalier_worker::linalg::gemm::View;
use espalier_worker::linalg::pcg::{self, Limits, Quadratic};
use espalier_worker::linalg::symmetric::Symmetric;
use espalier_worker::linalg::{factor, gemm, matrix, select, spectral, values};
use espalier_worker::prune::{self, InputStats, Problem, Solution, SolveCtx, verify};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// A solve is repeated this often, or until it has taken this many seconds.
const REPEATS: usize = 5;
const MOST_SECONDS: f64 = 2.0;
/// Width of the square product that peak speed is also looked for with.
const SQUARE: usize = 1536;
/// Steps of conjugate gradients that are timed.
const STEPS: usize = 10;
/// Wider problems than this are solved for few rows and at one sparsity.
const WIDE: usize = 2048;

/// What to leave out.
struct Choice {
    method: Option<String>,
    columns: Option<usize>,
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let value =
        |flag: &str| arguments.iter().position(|argument| argument == flag).and_then(|at| arguments.get(at + 1));
    let columns = value("--columns").map(|columns| columns.parse()).transpose()?;
    let choice = Choice { method: value("--method").cloned(), columns };
    let chosen = |columns: usize| choice.columns.is_none_or(|only| only == columns);
    println!("{} threads", rayon::current_num_threads());
    if chosen(576) {
        let (weight, stats) = real_layer()?;
        table("SmolLM2-135M, layer 2, v_proj", &weight, &stats, &choice)?;
    }
    // SmolLM2's q, k and v stacked, up, down; and as wide as a LLaMA of seven billion weights.
    for (rows, columns) in [(960, 576), (1536, 576), (576, 1536), (512, 4096)] {
        if chosen(columns) {
            let (weight, stats) = made_layer(rows, columns)?;
            table("made", &weight, &stats, &choice)?;
        }
    }
    Ok(())
}

fn table(title: &str, weight: &Tensor, stats: &Arc<InputStats>, choice: &Choice) -> Result<()> {
    let (rows, columns) = weight.dims2()?;
    println!("\n{title} [{rows}, {columns}]");
    kernels(&values(weight)?, &values(&stats.gram)?, columns);
    if columns > WIDE {
        println!("512 of 4096 rows, 50 % only");
    }
    println!("method                  pattern   seconds  GEMMs  GFLOP/s  of peak      error");
    for (name, params) in methods() {
        if choice.method.as_ref().is_some_and(|only| only != name) {
            continue;
        }
        let profile = params.get("profile").and_then(Value::as_str).unwrap_or_default();
        let patterns = [half(), Pattern::Unstructured { sparsity: 0.7 }, Pattern::NofM { keep: 2, of: 4 }];
        for pattern in patterns.into_iter().take(if columns > WIDE { 1 } else { 3 }) {
            // A mask of Wanda's, which has the pattern.
            let mask =
                (name == "refit").then(|| solution("wanda", &Value::Null, &problem(weight, pattern, None), stats));
            let mask = mask.transpose()?.map(|solution| solution.weight);
            let asked = if mask.is_some() { Pattern::Imported } else { pattern };
            let run = solve(name, &params, &problem(weight, asked, mask.as_ref()), stats)?;
            let gemms = run.flops / (2.0 * rows as f64 * (columns as f64).powi(2));
            println!(
                "{:<22} {:>8} {:>9.4} {gemms:>6.1} {:>8.1} {:>7.0}% {:>10.6}",
                format!("{name} {profile}"),
                pattern.to_string(),
                run.seconds,
                run.flops / run.seconds / 1e9,
                100.0 * run.share,
                run.error
            );
        }
    }
    Ok(())
}

fn half() -> Pattern {
    Pattern::Unstructured { sparsity: 0.5 }
}

/// The golden problem of `tests/golden/problems`.
fn real_layer() -> Result<(Tensor, Arc<InputStats>)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden/problems/smollm2_layer2_v_proj.safetensors");
    let tensors = candle_core::safetensors::load(path, &Device::Cpu)?;
    let tensor = |name: &str| tensors.get(name).ok_or_else(|| anyhow::anyhow!("{path}: no tensor {name}"));
    let tokens: i32 = 16 * 512;
    let gram = (tensor("gram")? / f64::from(tokens))?;
    let stats = InputStats { gram, dense: None, tokens: tokens as usize, held_out: None };
    Ok((tensor("weight")?.to_dtype(DType::F32)?, Arc::new(stats)))
}

fn methods() -> Vec<(&'static str, Value)> {
    vec![
        ("magnitude", json!({})),
        ("wanda", json!({})),
        ("sparsegpt", json!({})),
        ("fista", json!({})),
        ("alps", json!({})),
        ("espalier", json!({ "profile": "fast" })),
        ("espalier", json!({ "profile": "balanced" })),
        ("espalier", json!({ "profile": "best" })),
        ("refit", json!({})),
    ]
}

/// The repeat of median speed.
struct Run {
    seconds: f64,
    flops: f64,
    /// Of the speed of plain products just before and after.
    share: f64,
    error: f64,
}

fn problem<'a>(weight: &'a Tensor, pattern: Pattern, imported: Option<&'a Tensor>) -> Problem<'a> {
    Problem { tensor: "bench.weight", weight, pattern, imported }
}

/// Prepares and solves, nothing shared with an earlier solve.
fn solution(name: &str, params: &Value, problem: &Problem<'_>, stats: &Arc<InputStats>) -> Result<Solution> {
    let (solver, _) = prune::build(name, params)?;
    let ctx = SolveCtx::default();
    Ok(solver.prepare(Arc::clone(stats), &ctx)?.solve(problem, solver.blocks(problem)?, &ctx)?)
}

/// Solves again and again.
fn solve(name: &str, params: &Value, problem: &Problem<'_>, stats: &Arc<InputStats>) -> Result<Run> {
    let (rows, columns) = problem.weight.dims2()?;
    let (mut runs, mut spent) = (Vec::new(), 0.0);
    while runs.len() < REPEATS && spent < MOST_SECONDS {
        let before = peak(rows, columns);
        let watch = Stopwatch::start();
        let solution = solution(name, params, problem, stats)?;
        let seconds = watch.seconds();
        let peak = before.max(peak(rows, columns));
        let error = verify::verify(problem, stats, &solution.weight)?.rel_error;
        runs.push(Run { seconds, flops: solution.flops, share: solution.flops / seconds / peak, error });
        spent += seconds;
    }
    runs.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let median = (runs.len() - 1) / 2;
    runs.into_iter().nth(median).ok_or_else(|| anyhow::anyhow!("no repeats"))
}

/// The speed of plain products right now, all threads on one product: of the shape `[rows, columns]·[columns, columns]` or of a
/// large square, whichever is faster.
fn peak(rows: usize, columns: usize) -> f64 {
    plain_product(rows, columns).max(plain_product(SQUARE, SQUARE))
}

/// The best of ten products or of a fifth of a second.
fn plain_product(rows: usize, columns: usize) -> f64 {
    let (a, b) = (random(1, rows * columns), random(2, columns * columns));
    let mut out = vec![0.0; rows * columns];
    let (left, right) = (View::new(&a, rows, columns, columns), View::new(&b, columns, columns, columns));
    let (mut best, mut spent) = (f64::INFINITY, 0.0);
    for _ in 0..10 {
        let watch = Stopwatch::start();
        gemm::gemm_parallel(&mut out, columns, 0.0, left, right, 1.0);
        std::hint::black_box(&out);
        best = watch.seconds().min(best);
        spent += watch.seconds();
        if spent > 0.2 {
            break;
        }
    }
    2.0 * rows as f64 * (columns as f64).powi(2) / best
}

/// Measures the kernels on a problem of this shape.
fn kernels(weight: &[f32], gram: &[f32], columns: usize) {
    let rows = weight.len() / columns;
    let right = random(2, columns * columns);
    let peak = peak(rows, columns);
    let speed = |flops: f64, seconds: f64| {
        format!("{:.0} GFLOP/s, {:.0} % of peak", flops / seconds / 1e9, 100.0 * flops / seconds / peak)
    };
    let mut matrix: Vec<f32> = right.iter().map(|value| value / columns as f32).collect();
    (0..columns).for_each(|j| matrix[j * (columns + 1)] = 1.0);
    (0..columns).for_each(|i| (0..i).for_each(|j| matrix[i * columns + j] = matrix[j * columns + i]));
    let (square, cube) = (2.0 * rows as f64 * (columns as f64).powi(2), (columns as f64).powi(3));
    println!("peak of plain products: {:.0} GFLOP/s", peak / 1e9);
    let line = |name: &str, seconds: f64, flops: Option<f64>| {
        let speed = flops.map_or(String::new(), |flops| speed(flops, seconds));
        println!("{name:<34} {:>9.3} ms  {speed}", 1e3 * seconds);
    };
    line("product in row tiles", seconds(|| gemm::product(weight, &right, columns, columns)), Some(square));
    line("inverse", seconds(|| factor::inverse(matrix.clone(), columns)), Some(cube));
    let factor = Symmetric::new(&matrix);
    line("product with a matrix laid out", seconds(|| factor.product(weight)), Some(square));
    line("upper factor of the inverse", seconds(|| factor::upper_of_inverse(&matrix, columns)), None);
    line("largest eigenvalue", seconds(|| spectral::largest_eigenvalue(gram, columns)), None);

    let mut keep = vec![0; weight.len()];
    let half = weight.len() / 2;
    line("select per row", seconds(|| select::keep_largest_per_row(weight, columns, |_| columns / 2, &mut keep)), None);
    line("select 2:4", seconds(|| select::keep_n_of_m(weight, 2, 4, &mut keep)), None);
    line("select", seconds(|| select::keep_largest(weight, half, &mut keep)), None);

    let mut start = weight.to_vec();
    select::zero_dropped(&mut start, &keep);
    let gram = Symmetric::new(gram);
    let quadratic = Quadratic { anchor: weight, shift: None, gram: &gram };
    let refit = || pcg::refit(quadratic, &start, &keep, Limits { steps: STEPS, tolerance: 0.0 });
    let flops = refit().flops;
    line(&format!("conjugate gradients, {STEPS} steps"), seconds(refit), Some(flops));
}

/// The best of some repeats, after one that warms up.
fn seconds<T>(mut work: impl FnMut() -> T) -> f64 {
    std::hint::black_box(work());
    let (mut best, mut spent) = (f64::INFINITY, 0.0);
    for _ in 0..7 {
        let watch = Stopwatch::start();
        std::hint::black_box(work());
        best = watch.seconds().min(best);
        spent += watch.seconds();
        if spent > 1.0 {
            break;
        }
    }
    best
}

/// A weight and the statistics of four tokens a channel, with a shared component and channels of different size.
fn made_layer(rows: usize, columns: usize) -> Result<(Tensor, Arc<InputStats>)> {
    let tokens = 4 * columns;
    let mut inputs = random(3, tokens * columns);
    let shared = random(4, tokens * 16);
    let mixing = random(5, 16 * columns);
    let mixed = gemm::product(&shared, &mixing, 16, columns);
    for (row, mixed) in inputs.chunks_mut(columns).zip(mixed.chunks(columns)) {
        for (j, (x, m)) in row.iter_mut().zip(mixed).enumerate() {
            *x = (*x + 3.0 * m) * (4.0 * mixing[j]).exp();
        }
    }
    let sequences: Vec<Tensor> = inputs
        .chunks(columns * 512)
        .map(|rows| matrix(rows.to_vec(), columns, &Device::Cpu))
        .collect::<Result<_, _>>()?;
    let mut accumulator = GramAccumulator::new(columns, false);
    let watch = Stopwatch::start();
    accumulator.add(&sequences, None)?;
    println!("\ngram of {tokens} tokens: {:.1} GFLOP/s", accumulator.flops() / watch.seconds() / 1e9);
    let stats = accumulator.finish(&Device::Cpu)?;
    Ok((matrix(random(6, rows * columns), columns, &Device::Cpu)?, Arc::new(stats)))
}

fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random::<f32>() - 0.5).collect()
}
