//! From a choice of blocks to a solution: what all structured methods do before and after choosing.

use candle_core::Tensor;
use espalier_common::pattern::Pattern;
use serde::{Deserialize, Serialize};

use super::{PairProblem, PairSolution, Quadratic};
use crate::prune::SolveError;

/// What a choice came to.
pub(super) struct Choice {
    /// Blocks that stay, ascending.
    pub(super) kept: Vec<usize>,
    /// The weight `[rows, n]`, zero outside them.
    pub(super) weight: Vec<f64>,
    /// Steps it took.
    pub(super) iterations: u32,
    /// Floating-point operations beyond the set-up and one restoration.
    pub(super) flops: f64,
}

/// Parameters that all restoring methods have.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Ridge {
    /// Share of the gram's mean diagonal that is added to it.
    pub(super) damping: f64,
    /// How far targets lean towards the dense model's outputs (1) from those on the corrected inputs (0).
    pub(super) blend: f64,
}

impl Default for Ridge {
    fn default() -> Self {
        Self { damping: 0.01, blend: 0.0 }
    }
}

impl Ridge {
    /// Says what is wrong with the parameters.
    pub(super) fn check(&self) -> Result<(), &'static str> {
        match () {
            () if !(self.damping >= 0.0 && self.damping.is_finite()) => Err("damping must be at least 0"),
            () if !(0.0..=1.0).contains(&self.blend) => Err("blend must be between 0 and 1"),
            () => Ok(()),
        }
    }

    /// What the parameters need to be known of the inputs.
    pub(super) fn needs(&self) -> crate::prune::Statistics {
        if self.blend > 0.0 { crate::prune::Statistics::GramAndCross } else { crate::prune::Statistics::Gram }
    }
}

/// Puts a choice into tensors.
///
/// # Errors
/// What the tensor backend says.
pub(super) fn solution(
    problem: &PairProblem<'_>,
    quadratic: &Quadratic,
    choice: Choice,
) -> Result<PairSolution, SolveError> {
    let Choice { kept, weight, iterations, flops } = choice;
    let (n, columns) = (quadratic.n, quadratic.blocks * quadratic.block);
    let device = problem.weight.device();
    let narrow: Vec<f32> = weight.chunks(n).flat_map(|row| row[..columns].iter().map(|&v| v as f32)).collect();
    let bias: Option<Vec<f32>> = problem.bias.map(|_| weight.chunks(n).map(|row| row[columns] as f32).collect());
    Ok(PairSolution {
        flops: flops + quadratic.flops(kept.len() * quadratic.block),
        kept,
        weight: Tensor::from_vec(narrow, (quadratic.rows, columns), device)?,
        bias: bias.map(|bias| Tensor::from_vec(bias, quadratic.rows, device)).transpose()?,
        iterations,
        damping: quadratic.damping,
        damping_raised: quadratic.raised,
        dead_channels: quadratic.dead_channels,
    })
}

/// The blocks with the smallest scores go, as many from each of `runs` equal runs; ties go from the front. Returns what
/// stays, ascending.
pub(super) fn keep_best(scores: &[f64], remove: usize, runs: usize) -> Vec<usize> {
    let run = scores.len() / runs;
    let stay = |start: usize| {
        let mut order: Vec<usize> = (start..start + run).collect();
        order.sort_by(|&a, &b| scores[a].total_cmp(&scores[b]));
        let mut kept = order.split_off((remove / runs).min(run));
        kept.sort_unstable();
        kept
    };
    (0..runs).flat_map(|index| stay(index * run)).collect()
}

/// Accepts a share of zeros, which structured methods read as a share of parameters, and layers cut by it.
///
/// # Errors
/// `Unsupported`.
pub(super) fn supports_shares(method: &'static str, pattern: Pattern) -> Result<(), SolveError> {
    let reason = match pattern {
        Pattern::NofM { .. } => "it removes whole heads and channels",
        Pattern::Imported => "it chooses what goes itself",
        pattern if pattern.validate().is_err() => "it is out of range",
        _ => return Ok(()),
    };
    Err(SolveError::Unsupported { method, pattern, reason })
}

/// What a structured method answers when it is asked to solve a matrix by itself.
pub(super) fn needs_pairs(method: &'static str, pattern: Pattern) -> SolveError {
    SolveError::Unsupported { method, pattern, reason: "it solves coupled pairs, not single matrices" }
}

/// What every structured method has in common of [`crate::prune::Solver`].
macro_rules! structured_solver {
    ($solver:ty, $name:expr, $needs:expr) => {
        impl crate::prune::Solver for $solver {
            fn needs(&self) -> crate::prune::Statistics {
                #[allow(clippy::redundant_closure_call, reason = "the macro takes a function of the solver")]
                ($needs)(self)
            }

            fn supports(&self, pattern: espalier_common::pattern::Pattern) -> Result<(), crate::prune::SolveError> {
                #[allow(clippy::redundant_closure_call, reason = "the macro takes a function of the solver")]
                super::consumer::supports_shares(($name)(self), pattern)
            }

            fn prepare(
                &self,
                _: std::sync::Arc<crate::prune::InputStats>,
                _: &crate::prune::SolveCtx,
            ) -> Result<Box<dyn crate::prune::GroupSolver>, crate::prune::SolveError> {
                let pattern = espalier_common::pattern::Pattern::Unstructured { sparsity: 0.0 };
                #[allow(clippy::redundant_closure_call, reason = "the macro takes a function of the solver")]
                Err(super::consumer::needs_pairs(($name)(self), pattern))
            }

            fn structured(&self) -> Option<&dyn super::StructuredSolver> {
                Some(self)
            }
        }
    };
}
pub(super) use structured_solver;

#[cfg(test)]
pub(super) mod fixture {
    //! Consumers for the tests of all structured methods.

    use candle_core::{Device, Tensor};

    use super::*;
    use crate::linalg::{matrix, oracle, values};
    use crate::prune::problem::DenseStats;
    use crate::prune::{InputStats, SolveCtx, build};

    pub(crate) struct Consumer {
        pub(crate) weight: Tensor,
        pub(crate) bias: Option<Tensor>,
        pub(crate) stats: InputStats,
        pub(crate) block: usize,
        pub(crate) runs: usize,
    }

    pub(crate) fn wide(tensor: &Tensor) -> Vec<f64> {
        oracle::wide(&values(tensor).unwrap())
    }

    fn with_constant(x: &[f32], columns: usize) -> Vec<f32> {
        x.chunks(columns).flat_map(|row| row.iter().copied().chain([1.0])).collect()
    }

    fn tensor(values: &[f64], n: usize) -> Tensor {
        matrix(values.iter().map(|&v| v as f32).collect(), n, &Device::Cpu).unwrap()
    }

    impl Consumer {
        pub(crate) fn random(seed: u64, rows: usize, columns: usize, block: usize, bias: bool) -> Self {
            // Inputs with a mean, as after an activation.
            let x: Vec<f32> = oracle::inputs(seed, 5 * columns, columns).iter().map(|x| x.max(-0.1)).collect();
            let (x, n) = if bias { (with_constant(&x, columns), columns + 1) } else { (x, columns) };
            let held: Vec<f32> = x.chunks(n).skip(4 * columns).flatten().copied().collect();
            let stats = |x: &[f32]| InputStats {
                gram: tensor(&oracle::gram(x, x, n), n),
                dense: None,
                tokens: x.len() / n,
                held_out: None,
            };
            let mut calibration = stats(&x[..4 * columns * n]);
            calibration.held_out = Some(std::sync::Arc::new(stats(&held)));
            Self {
                weight: matrix(oracle::random(seed + 50, rows * columns), columns, &Device::Cpu).unwrap(),
                bias: bias.then(|| Tensor::from_vec(oracle::random(seed + 70, rows), rows, &Device::Cpu).unwrap()),
                stats: calibration,
                block,
                runs: 1,
            }
        }

        pub(crate) fn random_with_dense(seed: u64, rows: usize, columns: usize) -> Self {
            let x = oracle::inputs(seed, 6 * columns, columns);
            let noise = oracle::random(seed + 1, x.len());
            let corrected: Vec<f32> = x.iter().zip(noise).map(|(x, e)| x + 0.2 * e).collect();
            let stats = InputStats {
                gram: tensor(&oracle::gram(&corrected, &corrected, columns), columns),
                dense: Some(DenseStats {
                    cross: tensor(&oracle::gram(&corrected, &x, columns), columns),
                    gram: tensor(&oracle::gram(&x, &x, columns), columns),
                }),
                tokens: 6 * columns,
                held_out: None,
            };
            let weight = matrix(oracle::random(seed + 50, rows * columns), columns, &Device::Cpu).unwrap();
            Self { weight, bias: None, stats, block: 1, runs: 1 }
        }

        /// Makes an input one that is never active.
        pub(crate) fn silence(&mut self, input: usize) {
            let n = self.stats.gram.dim(0).unwrap();
            let mut gram = values(&self.stats.gram).unwrap();
            (0..n).for_each(|j| (gram[input * n + j], gram[j * n + input]) = (0.0, 0.0));
            self.stats.gram = matrix(gram, n, &Device::Cpu).unwrap();
        }

        pub(crate) fn problem(&self, remove: usize) -> PairProblem<'_> {
            PairProblem {
                tensor: "a.weight",
                weight: &self.weight,
                bias: self.bias.as_ref(),
                stats: &self.stats,
                block: self.block,
                runs: self.runs,
                remove,
            }
        }

        pub(crate) fn solve(&self, method: &str, params: &serde_json::Value, remove: usize) -> PairSolution {
            let (solver, _) = build(method, params).unwrap();
            solver.structured().unwrap().solve(&self.problem(remove), &SolveCtx::default()).unwrap()
        }

        /// `[V | b]` of a solution, in f64.
        pub(crate) fn augmented(&self, solution: &PairSolution) -> Vec<f64> {
            let weight = wide(&solution.weight);
            let Some(bias) = &solution.bias else { return weight };
            let columns = self.weight.dim(1).unwrap();
            let rows = weight.chunks(columns).zip(wide(bias));
            rows.flat_map(|(row, bias)| row.iter().copied().chain([bias]).collect::<Vec<_>>()).collect()
        }

        /// The calibration error of a solution.
        pub(crate) fn error(&self, solution: &PairSolution) -> f64 {
            Quadratic::new(&self.problem(0), 0.01, 0.0).unwrap().error(&self.augmented(solution))
        }
    }

    /// Every run of blocks loses as many as the others, and the best of each stay.
    pub(crate) fn assert_runs_lose_alike(method: &str) {
        let mut consumer = Consumer::random(9, 5, 36, 3, true);
        for (runs, remove) in [(3, 3), (3, 6), (4, 4), (2, 10), (12, 0)] {
            consumer.runs = runs;
            let kept = consumer.solve(method, &serde_json::json!({}), remove).kept;
            assert_eq!(kept.len(), 12 - remove, "{method}");
            let of_run = |run: usize| kept.iter().filter(|&&block| block / (12 / runs) == run).count();
            assert!((0..runs).all(|run| of_run(run) == (12 - remove) / runs), "{method}: {kept:?}");
        }
        let (solver, _) = build(method, &serde_json::json!({})).unwrap();
        let problem = PairProblem { runs: 3, ..consumer.problem(4) };
        let refused = solver.structured().unwrap().solve(&problem, &SolveCtx::default());
        assert!(matches!(refused, Err(SolveError::Blocks { remove: 4, .. })), "{method}: 4 blocks of 3 runs");
    }

    /// ALGORITHMS.md §11, *All* and *Structured*, as far as one consumer goes.
    pub(crate) fn assert_obeys_invariants(method: &str, attention: bool) {
        let params = serde_json::json!({});
        for (seed, rows, columns, block, bias) in
            [(1, 7, 24, 1, false), (2, 5, 40, 1, true), (3, 9, 24, 4, true), (4, 3, 30, 10, false)]
        {
            if block > 1 && !attention {
                continue;
            }
            let consumer = Consumer::random(seed, rows, columns, block, bias);
            let blocks = columns / block;
            for remove in [0, 1, blocks / 2, blocks - 1] {
                let solved = consumer.solve(method, &params, remove);
                assert_eq!(solved.kept.len(), blocks - remove, "{method}");
                assert!(solved.kept.is_sorted());
                let weight = values(&solved.weight).unwrap();
                for (at, value) in weight.iter().enumerate() {
                    let stays = solved.kept.contains(&(at % columns / block));
                    assert!(value.is_finite() && (stays || value.to_bits() == 0), "{method}: {at} is {value}");
                }
                if remove == 0 {
                    assert_eq!(weight, values(&consumer.weight).unwrap(), "{method}: removing nothing changes weights");
                }
                let threads = oracle::with_threads(3, || consumer.solve(method, &params, remove));
                assert_eq!(values(&threads.weight).unwrap(), weight, "{method}: bits depend on threads");
                assert_eq!(threads.kept, solved.kept);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_scores_go_and_ties_go_from_the_front() {
        assert_eq!(keep_best(&[3.0, 1.0, 2.0, 1.0], 2, 1), [0, 2]);
        assert_eq!(keep_best(&[1.0, 1.0, 1.0], 1, 1), [1, 2]);
        assert_eq!(keep_best(&[1.0], 0, 1), [0]);
        assert_eq!(keep_best(&[3.0, 4.0, 2.0, 1.0], 2, 2), [1, 2]);
    }
}
