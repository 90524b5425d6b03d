//! Seconds, arithmetic and error of every method on a real layer problem and on made ones, against the speed of a plain matrix product measured
//! in the same process. `cargo bench -p espalier-worker --bench solvers [-- --large] [-- --method NAME]`.

#![allow(clippy::print_stdout, reason = "a table is what this program is for")]

use std::sync::Arc;

use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use espalier_common::clock::Stopwatch;
use espalier_common::pattern::Pattern;
use espalier_worker::calibrate::gram::GramAccumulator;
use espalier_worker::linalg::{factor, gemm, matrix, select};
use espalier_worker::prune::{self, InputStats, Problem, SolveCtx, verify};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// A measured time is the best of this many.
const REPEATS: usize = 3;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let large = arguments.iter().any(|argument| argument == "--large");
    let only = arguments.iter().position(|argument| argument == "--method").and_then(|at| arguments.get(at + 1));
    let mut shapes = vec![(192, 576), (576, 576), (1536, 576), (576, 1536)];
    if large {
        shapes.push((4096, 4096));
    }
    println!("{} threads", rayon::current_num_threads());
    let (weight, stats) = real_layer()?;
    table("SmolLM2-135M, layer 2, v_proj", &weight, &stats, only)?;
    for (rows, columns) in shapes {
        let (weight, stats) = made_layer(rows, columns)?;
        table("made", &weight, &stats, only)?;
    }
    Ok(())
}

fn table(title: &str, weight: &Tensor, stats: &Arc<InputStats>, only: Option<&String>) -> Result<()> {
    let (rows, columns) = weight.dims2()?;
    println!("\n{title} [{rows}, {columns}]");
    let peak = kernels(rows, columns);
    println!("method                  pattern   seconds  GEMMs  GFLOP/s  peak      error");
    for (name, params) in methods() {
        if only.is_some_and(|only| only != name) {
            continue;
        }
        let profile = params.get("profile").and_then(Value::as_str).unwrap_or_default();
        for pattern in [half(), Pattern::Unstructured { sparsity: 0.7 }, Pattern::NofM { keep: 2, of: 4 }] {
            let run = solve(name, &params, weight, stats, pattern)?;
            let gemms = run.flops / (2.0 * rows as f64 * (columns as f64).powi(2));
            let speed = run.flops / run.seconds / 1e9;
            println!(
                "{:<22} {:>8} {:>9.4} {gemms:>6.1} {speed:>8.1} {:>4.0}% {:>10.6}",
                format!("{name} {profile}"),
                pattern.to_string(),
                run.seconds,
                100.0 * speed / peak,
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
    ]
}

struct Run {
    seconds: f64,
    flops: f64,
    error: f64,
}

/// Prepares and solves, nothing shared with an earlier run.
fn solve(name: &str, params: &Value, weight: &Tensor, stats: &Arc<InputStats>, pattern: Pattern) -> Result<Run> {
    let (solver, _) = prune::build(name, params)?;
    let ctx = SolveCtx::default();
    let problem = Problem { tensor: "bench.weight", weight, pattern, imported: None };
    let mut best: Option<Run> = None;
    for _ in 0..REPEATS {
        let watch = Stopwatch::start();
        let solution = solver.prepare(Arc::clone(stats), &ctx)?.solve(&problem, &ctx)?;
        let seconds = watch.seconds();
        let error = verify::verify(&problem, stats, &solution.weight)?.rel_error;
        if best.as_ref().is_none_or(|best| seconds < best.seconds) {
            best = Some(Run { seconds, flops: solution.flops, error });
        }
    }
    best.ok_or_else(|| anyhow::anyhow!("no repeats"))
}

/// Measures the kernels and returns the speed of the product `[rows, columns]·[columns, columns]` in GFLOP/s: the peak.
fn kernels(rows: usize, columns: usize) -> f64 {
    let a = random(1, rows * columns);
    let b = random(2, columns * columns);
    let flops = 2.0 * rows as f64 * (columns as f64).powi(2);
    let peak = flops / seconds(|| gemm::product(&a, &b, columns, columns)) / 1e9;
    let mut matrix: Vec<f32> = b.iter().map(|value| value / columns as f32).collect();
    (0..columns).for_each(|j| matrix[j * (columns + 1)] = 1.0);
    (0..columns).for_each(|i| (0..i).for_each(|j| matrix[i * columns + j] = matrix[j * columns + i]));
    let inverse = seconds(|| factor::inverse(matrix.clone(), columns));
    let upper = seconds(|| factor::upper_of_inverse(&matrix, columns));
    let mut keep = vec![0; a.len()];
    let whole = seconds(|| select::keep_largest(&a, a.len() / 2, &mut keep));
    let groups = seconds(|| select::keep_n_of_m(&a, 2, 4, &mut keep));
    println!(
        "product {peak:.0} GFLOP/s · inverse {:.1} ms ({:.0} GFLOP/s) · upper factor {:.1} ms · select {:.2} ms · 2:4 {:.2} ms",
        inverse * 1e3,
        (columns as f64).powi(3) / inverse / 1e9,
        upper * 1e3,
        whole * 1e3,
        groups * 1e3
    );
    peak
}

/// The best of some repeats, after one that warms up.
fn seconds<T>(mut work: impl FnMut() -> T) -> f64 {
    std::hint::black_box(work());
    (0..7)
        .map(|_| {
            let watch = Stopwatch::start();
            std::hint::black_box(work());
            watch.seconds()
        })
        .fold(f64::INFINITY, f64::min)
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
