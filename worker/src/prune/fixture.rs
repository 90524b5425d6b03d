//! Layer problems for the tests of all methods, and what every method must do with them.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use espalier_common::pattern::Pattern;
use serde_json::Value;

use super::problem::DenseStats;
use super::{InputStats, Problem, Solution, SolveCtx, build};
use crate::linalg::pcg::{self, Limits, Quadratic};
use crate::linalg::symmetric::Symmetric;
use crate::linalg::{matrix, oracle, quadratic, values};

/// A weight and the gram of its inputs.
pub(crate) struct LayerProblem {
    pub(crate) weight: Vec<f32>,
    pub(crate) gram: Vec<f32>,
    pub(crate) stats: Arc<InputStats>,
    pub(crate) columns: usize,
}

impl LayerProblem {
    pub(crate) fn new(weight: Vec<f32>, gram: Vec<f32>, columns: usize, tokens: usize) -> Self {
        let stats = InputStats {
            gram: matrix(gram.clone(), columns, &Device::Cpu).unwrap(),
            dense: None,
            tokens,
            held_out: None,
        };
        Self { weight, gram, stats: Arc::new(stats), columns }
    }

    pub(crate) fn tensor(&self) -> Tensor {
        matrix(self.weight.clone(), self.columns, &Device::Cpu).unwrap()
    }

    /// Dense weights where `solved` is zero.
    pub(crate) fn dropped<'a>(&'a self, solved: &'a [f32]) -> impl Iterator<Item = f32> + 'a {
        self.weight.iter().zip(solved).filter(|(_, v)| v.to_bits() == 0).map(|(w, _)| *w)
    }

    /// Dense and solved weights where `solved` is not zero.
    pub(crate) fn kept<'a>(&'a self, solved: &'a [f32]) -> impl Iterator<Item = (f32, f32)> + 'a {
        self.weight.iter().zip(solved).filter(|(_, v)| v.to_bits() != 0).map(|(w, v)| (*w, *v))
    }

    /// `tr((V−W)G(V−W)ᵀ) / tr(WGWᵀ)`.
    pub(crate) fn rel_error(&self, solved: &[f32]) -> f64 {
        quadratic::errors(solved, &self.weight, &self.gram, None, self.columns).iter().sum::<f64>()
            / quadratic::energy(&self.weight, &self.gram, self.columns)
    }
}

/// A random problem with correlated inputs.
pub(crate) fn random(seed: u64, rows: usize, columns: usize, tokens: usize) -> LayerProblem {
    let x = oracle::inputs(seed, tokens, columns);
    let gram = oracle::gram(&x, &x, columns).iter().map(|&v| v as f32).collect();
    LayerProblem::new(oracle::random(seed + 100, rows * columns), gram, columns, tokens)
}

/// A problem whose inputs were changed by what was pruned before, token by token.
pub(crate) struct Corrected {
    /// The problem, with both sides' statistics.
    pub(crate) problem: LayerProblem,
    /// X, `[tokens, columns]`.
    pub(crate) dense: Vec<f32>,
    /// X̂, `[tokens, columns]`.
    pub(crate) inputs: Vec<f32>,
}

impl Corrected {
    /// `‖V·X̂ᵀ − W·Xᵀ‖²` on the tokens themselves, in f64.
    pub(crate) fn error(&self, solved: &[f32]) -> f64 {
        let n = self.problem.columns;
        let (solved, weight) = (oracle::wide(solved), oracle::wide(&self.problem.weight));
        let mut error = 0.0;
        for (inputs, dense) in self.inputs.chunks(n).zip(self.dense.chunks(n)) {
            for (v, w) in solved.chunks(n).zip(weight.chunks(n)) {
                let output = |weight: &[f64], inputs: &[f32]| -> f64 {
                    weight.iter().zip(inputs).map(|(w, x)| w * f64::from(*x)).sum()
                };
                error += (output(v, inputs) - output(w, dense)).powi(2);
            }
        }
        error
    }

    /// `(αC + (1 − α)WG + δW)(G + δI)⁻¹` in f64, δ being `damping` times the mean of G's diagonal: the best weights towards
    /// the blended target when there is no pattern.
    pub(crate) fn unconstrained(&self, alpha: f64, damping: f64) -> Vec<f64> {
        let n = self.problem.columns;
        let mut gram = oracle::gram(&self.inputs, &self.inputs, n);
        // C = W·XᵀX̂.
        let dense = oracle::gram(&self.dense, &self.inputs, n);
        let ridge = damping * (0..n).map(|j| gram[j * (n + 1)]).sum::<f64>() / n as f64;
        let mut target: Vec<f64> = dense.iter().zip(&gram).map(|(k, g)| alpha * k + (1.0 - alpha) * g).collect();
        (0..n).for_each(|j| target[j * (n + 1)] += ridge);
        (0..n).for_each(|j| gram[j * (n + 1)] += ridge);
        let right = oracle::product(&oracle::wide(&self.problem.weight), &target, n, n);
        oracle::product(&right, &oracle::inverse(&gram, n), n, n)
    }

    /// The tokens but the last `held_out`, whose statistics are held out, and those.
    pub(crate) fn split(self, held_out: usize) -> (Self, Self) {
        let Self { problem: LayerProblem { weight, columns, .. }, dense, inputs } = self;
        let solving = inputs.len() - held_out * columns;
        let part = |range: std::ops::Range<usize>| {
            corrected(weight.clone(), inputs[range.clone()].to_vec(), dense[range].to_vec(), columns)
        };
        let (mut first, last) = (part(0..solving), part(solving..inputs.len()));
        let stats = InputStats { held_out: Some(Arc::clone(&last.problem.stats)), ..(*first.problem.stats).clone() };
        first.problem.stats = Arc::new(stats);
        (first, last)
    }
}

/// A random problem whose inputs are the dense ones mixed with their neighbours and with noise.
pub(crate) fn random_corrected(seed: u64, rows: usize, columns: usize, tokens: usize) -> Corrected {
    let dense = oracle::inputs(seed, tokens, columns);
    let noise = oracle::random(seed + 300, dense.len());
    let inputs = (0..dense.len()).map(|at| {
        let neighbour = if (at + 1) % columns == 0 { at + 1 - columns } else { at + 1 };
        0.9 * dense[at] + 0.2 * dense[neighbour] + 0.1 * noise[at]
    });
    let inputs = inputs.collect();
    corrected(oracle::random(seed + 100, rows * columns), inputs, dense, columns)
}

fn corrected(weight: Vec<f32>, inputs: Vec<f32>, dense: Vec<f32>, columns: usize) -> Corrected {
    let moments = |a: &[f32], b: &[f32]| {
        let sums: Vec<f32> = oracle::gram(a, b, columns).iter().map(|&v| v as f32).collect();
        matrix(sums, columns, &Device::Cpu).unwrap()
    };
    let statistics = DenseStats { cross: moments(&inputs, &dense), gram: moments(&dense, &dense) };
    let gram = values(&moments(&inputs, &inputs)).unwrap();
    let mut problem = LayerProblem::new(weight, gram, columns, inputs.len() / columns);
    problem.stats = Arc::new(InputStats { dense: Some(statistics), ..(*problem.stats).clone() });
    Corrected { problem, dense, inputs }
}

/// Unstructured and N:M patterns; the latter need widths divisible by 4 and 8.
pub(crate) fn patterns() -> Vec<Pattern> {
    vec![
        Pattern::Unstructured { sparsity: 0.5 },
        Pattern::Unstructured { sparsity: 0.731 },
        Pattern::NofM { keep: 2, of: 4 },
        Pattern::NofM { keep: 5, of: 8 },
        Pattern::NofM { keep: 1, of: 4 },
    ]
}

/// Solves with a method by name.
pub(crate) fn solution(method: &str, params: &Value, problem: &LayerProblem, pattern: Pattern) -> Solution {
    let (solver, _) = build(method, params).unwrap();
    solver.supports(pattern).unwrap();
    let ctx = SolveCtx::default();
    let group = solver.prepare(Arc::clone(&problem.stats), &ctx).unwrap();
    let weight = problem.tensor();
    let problem = Problem { tensor: "a.weight", weight: &weight, pattern, imported: None };
    group.solve(&problem, solver.blocks(&problem).unwrap(), &ctx).unwrap()
}

/// As [`solution`], on a device.
pub(crate) fn solution_on(
    method: &str,
    params: &Value,
    problem: &LayerProblem,
    pattern: Pattern,
    device: &Device,
) -> Solution {
    let (solver, _) = build(method, params).unwrap();
    let ctx = SolveCtx::default();
    let group = solver.on_device().unwrap().prepare_on(Arc::clone(&problem.stats), device, &ctx).unwrap();
    assert!(group.device().is_some_and(|own| own.same_device(device)));
    let weight = problem.tensor();
    let problem = Problem { tensor: "a.weight", weight: &weight, pattern, imported: None };
    group.solve(&problem, solver.blocks(&problem).unwrap(), &ctx).unwrap()
}

/// The values of [`solution`].
pub(crate) fn solve(method: &str, params: Value, problem: &LayerProblem, pattern: Pattern) -> Vec<f32> {
    values(&solution(method, &params, problem, pattern).weight).unwrap()
}

/// Counts exact zeros with a positive sign.
pub(crate) fn zeros(solved: &[f32]) -> usize {
    solved.iter().filter(|v| v.to_bits() == 0).count()
}

pub(crate) fn assert_obeys(solved: &[f32], columns: usize, pattern: Pattern) {
    assert!(solved.iter().all(|v| v.is_finite()));
    assert_eq!(zeros(solved), pattern.zeros(solved.len() / columns, columns), "{pattern}");
    if let Pattern::NofM { keep, of } = pattern {
        assert!(solved.chunks(of).all(|group| zeros(group) == of - keep), "{pattern}");
    }
}

/// ALGORITHMS.md §11, *All*.
pub(crate) fn assert_obeys_invariants(method: &str, params: Value, pattern: Pattern) {
    // Widths that no block divides; fewer tokens than inputs; a dead channel; many equal weights.
    for (seed, rows, columns, tokens) in [(1, 7, 24, 60), (2, 33, 136, 400), (3, 5, 40, 11), (4, 1, 8, 30)] {
        let mut problem = random(seed, rows, columns, tokens);
        if seed == 2 {
            let mut gram = problem.gram.clone();
            (0..columns).for_each(|j| (gram[5 * columns + j], gram[j * columns + 5]) = (0.0, 0.0));
            problem = LayerProblem::new(problem.weight, gram, columns, tokens);
        }
        if seed == 3 {
            let tied = problem.weight.iter().map(|w| if *w < 0.0 { -0.25 } else { 0.25 }).collect();
            problem = LayerProblem::new(tied, problem.gram, columns, tokens);
        }
        let solved = solve(method, params.clone(), &problem, pattern);
        assert_obeys(&solved, columns, pattern);

        let threads = oracle::with_threads(3, || solve(method, params.clone(), &problem, pattern));
        assert_eq!(threads, solved, "{method} {pattern}: bits depend on threads");

        let gram = problem.gram.iter().map(|g| g * 4.0).collect();
        let louder = LayerProblem::new(problem.weight.clone(), gram, columns, tokens);
        let louder = solve(method, params.clone(), &louder, pattern);
        let same = louder.iter().zip(&solved).filter(|(a, b)| (a.to_bits() == 0) == (b.to_bits() == 0)).count();
        assert_eq!(same, solved.len(), "{method} {pattern}: the support depends on the inputs' scale");

        let nothing = match pattern {
            Pattern::NofM { of, .. } => Pattern::NofM { keep: of, of },
            _ => Pattern::Unstructured { sparsity: 0.0 },
        };
        assert_eq!(
            solve(method, params.clone(), &problem, nothing),
            problem.weight,
            "{method}: sparsity 0 changes weights"
        );
    }
}

/// How many of twenty problems there are on which the support that `method` finds is better than magnitude's, each with its best
/// weights.
pub(crate) fn better_supports_than_magnitude(method: &str) -> usize {
    let is_better = |seed: &u64| {
        let (rows, n) = (24, 48);
        let problem = random(*seed, rows, n, 150);
        let pattern = Pattern::Unstructured { sparsity: 0.6 };
        let gram = Symmetric::new(&problem.gram);
        let refitted = |solved: &[f32]| {
            let keep: Vec<u8> = solved.iter().map(|v| u8::from(v.abs() > 0.0)).collect();
            let quadratic = Quadratic { anchor: &problem.weight, shift: None, gram: &gram };
            let limits = Limits { steps: 200, tolerance: 1e-12 };
            problem.rel_error(&pcg::refit(quadratic, solved, &keep, limits).values)
        };
        let of = |method: &str| refitted(&solve(method, Value::Null, &problem, pattern));
        of(method) < of("magnitude")
    };
    (0..20).filter(is_better).count()
}

/// What the authors' code made of a golden problem.
pub(crate) struct Reference {
    pub(crate) pattern: Pattern,
    pub(crate) support: Vec<bool>,
    pub(crate) error: f64,
}

/// Golden grams are sums; this many stand for the tokens, and only scale.
pub(crate) const GOLDEN_TOKENS: f64 = 8192.0;

/// A golden problem, and `method`'s reference solutions at 50 %, 70 % and 2:4.
pub(crate) fn golden(file: &str, method: &str) -> (LayerProblem, Vec<Reference>) {
    let tensors = golden_tensors(file);
    let columns = tensors["gram"].dim(0).unwrap();
    let gram = values(&tensors["gram"]).unwrap().iter().map(|g| g / GOLDEN_TOKENS as f32).collect();
    let problem = LayerProblem::new(values(&tensors["weight"]).unwrap(), gram, columns, GOLDEN_TOKENS as usize);
    let references = references(file, method, &problem);
    (problem, references)
}

fn golden_tensors(file: &str) -> HashMap<String, Tensor> {
    let path = format!("{}/../tests/golden/problems/{file}.safetensors", env!("CARGO_MANIFEST_DIR"));
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

/// `method`'s solutions of a golden problem at 50 %, 70 % and 2:4 that `file` holds.
pub(crate) fn references(file: &str, method: &str, problem: &LayerProblem) -> Vec<Reference> {
    let tensors = golden_tensors(file);
    [
        ("50", Pattern::Unstructured { sparsity: 0.5 }),
        ("70", Pattern::Unstructured { sparsity: 0.7 }),
        ("2of4", Pattern::NofM { keep: 2, of: 4 }),
    ]
    .map(|(case, pattern)| {
        if let Some(solution) = tensors.get(&format!("{method}_{case}")) {
            let solution = values(solution).unwrap();
            let error = problem.rel_error(&solution);
            return Reference { pattern, support: solution.iter().map(|v| v.abs() > 0.0).collect(), error };
        }
        let bits: Vec<u8> = tensors[&format!("{method}_{case}.support")].to_vec1().unwrap();
        let support = (0..problem.weight.len()).map(|i| bits[i / 8] >> (i % 8) & 1 == 1).collect();
        let error =
            tensors[&format!("{method}_{case}.error")].to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap()[0];
        Reference { pattern, support, error }
    })
    .into()
}

/// Share of the weights kept by both among those the reference keeps in live channels: the reference may spend budget on dead
/// ones.
pub(crate) fn overlap(problem: &LayerProblem, solved: &[f32], reference: &[bool]) -> f64 {
    let n = problem.columns;
    let live = |index: usize| problem.gram[index % n * (n + 1)] > 0.0;
    let kept: Vec<usize> = (0..solved.len()).filter(|&index| reference[index] && live(index)).collect();
    kept.iter().filter(|&&index| solved[index].abs() > 0.0).count() as f64 / kept.len() as f64
}

/// Support overlap of at least the first, and an error of at most the second of `limits` times the reference's, on both problems.
pub(crate) fn assert_agrees_with_reference(
    method: &str,
    params: Value,
    reference: &str,
    limits: impl Fn(&str, Pattern) -> (f64, f64),
) {
    for file in ["synthetic_64x96", "smollm2_layer2_v_proj"] {
        let (problem, references) = golden(file, reference);
        for Reference { pattern, support, error } in references {
            let solved = solve(method, params.clone(), &problem, pattern);
            assert_obeys(&solved, problem.columns, pattern);
            let (overlap, found) = (overlap(&problem, &solved, &support), problem.rel_error(&solved));
            let (least_overlap, most_error) = limits(file, pattern);
            // Four digits are known of the reference's error on the real problem.
            assert!(
                overlap >= least_overlap && found <= error * most_error + 5e-6,
                "{file} {pattern}: overlap {overlap:.5}, error {found:.6} against {error:.6}"
            );
        }
    }
}
