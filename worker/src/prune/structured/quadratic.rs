//! The error of a consumer's output as a function of its weight, and the best weight on a given set of inputs.

use super::PairProblem;
use crate::linalg::factor::NotPositiveDefinite;
use crate::linalg::values;
use crate::linalg::wide::{Cholesky, product};
use crate::prune::{InputStats, SolveError};

/// How often damping is multiplied by ten before a layer is given up.
const MOST_RAISES: u32 = 3;

/// `E(V) = tr((V − T)·H·(V − T)ᵀ)`, up to a constant the error of the outputs of V, all in f64.
///
/// `H = G + δI` with δ a share of G's mean diagonal, and `T = C·H⁻¹` with `C = W·((1−α)G + αKᵀ) + δW`: the unconstrained
/// best weight for the blend of targets `α·WX + (1−α)·WX̂`. With α = 0, T is W.
///
/// Source: ALGORITHMS.md §0 (ridge towards W, target blend), §2 (the error in terms of its optimum).
#[derive(Debug, Clone)]
pub struct Quadratic {
    /// Outputs of the consumer.
    pub rows: usize,
    /// Inputs, with the constant one if there is a bias.
    pub n: usize,
    /// Inputs in a block.
    pub block: usize,
    /// Equal runs of blocks that lose alike.
    pub runs: usize,
    /// Blocks; they are the first `blocks · block` inputs, and only the constant one may follow.
    pub blocks: usize,
    /// H `[n, n]`.
    pub hessian: Vec<f64>,
    /// T `[rows, n]`.
    pub target: Vec<f64>,
    /// W `[rows, n]`, the bias last.
    pub dense: Vec<f64>,
    /// H⁻¹ `[n, n]`.
    pub inverse: Vec<f64>,
    /// Share of the mean diagonal that was added.
    pub damping: f64,
    /// How often it had to be raised.
    pub raised: u32,
    /// Inputs that were never active.
    pub dead_channels: u32,
}

impl Quadratic {
    /// Sets the problem up; `blend` is α, and is taken as 0 where the statistics have no dense side.
    ///
    /// # Errors
    /// `Shape` if the statistics or the blocks do not fit the weight; `NotFinite`; `NotPositiveDefinite` when damping was
    /// raised three times.
    pub fn new(problem: &PairProblem<'_>, damping: f64, blend: f64) -> Result<Self, SolveError> {
        let (rows, columns) = problem.weight.dims2()?;
        let n = columns + usize::from(problem.bias.is_some());
        let (width, block) = (problem.stats.gram.dim(0)?, problem.block);
        let runs = problem.runs;
        let fits = block > 0 && runs > 0 && columns.is_multiple_of(block * runs) && problem.remove.is_multiple_of(runs);
        if width != n || !fits || problem.remove >= columns / block {
            return Err(SolveError::Blocks { columns, width, block, remove: problem.remove });
        }
        let dense = augmented(problem)?;
        let gram = finite("gram", &problem.stats.gram)?;
        let mean = (0..n).map(|j| gram[j * n + j]).sum::<f64>() / n as f64;
        // Without any input every weight is as good as another; the ridge then keeps W.
        let unit = if mean > 0.0 { mean } else { 1.0 };
        let mut quadratic = Self {
            rows,
            n,
            block,
            runs,
            blocks: columns / block,
            hessian: Vec::new(),
            target: Vec::new(),
            inverse: Vec::new(),
            dead_channels: (0..n).filter(|j| gram[j * n + j] <= 0.0).count() as u32,
            dense,
            damping,
            raised: 0,
        };
        let factor = loop {
            quadratic.hessian.clone_from(&gram);
            (0..n).for_each(|j| quadratic.hessian[j * n + j] += quadratic.damping * unit);
            match Cholesky::new(quadratic.hessian.clone(), n) {
                Ok(factor) => break factor,
                Err(_) if quadratic.raised < MOST_RAISES => {
                    quadratic.raised += 1;
                    quadratic.damping = if quadratic.damping > 0.0 { quadratic.damping * 10.0 } else { 1e-4 };
                }
                Err(NotPositiveDefinite { pivot }) => {
                    let damping = quadratic.damping;
                    return Err(SolveError::NotPositiveDefinite { columns: n, pivot, damping });
                }
            }
        };
        quadratic.inverse = factor.inverse();
        quadratic.target = quadratic.dense.clone();
        if let Some(statistics) = problem.stats.dense.as_ref().filter(|_| blend > 0.0) {
            // C − W·H = α·W·(K − G)ᵀ, so T = W + α·W·(K − G)ᵀ·H⁻¹.
            let cross = finite("cross", &statistics.cross)?;
            let towards: Vec<f64> = (0..n * n).map(|at| blend * (cross[at % n * n + at / n] - gram[at])).collect();
            let mut step = product(&quadratic.dense, &towards, n, n);
            factor.solve(&mut step);
            quadratic.target.iter_mut().zip(step).for_each(|(target, step)| *target += step);
        }
        Ok(quadratic)
    }

    /// The inputs of a set of blocks, ascending, the constant one last if there is one.
    pub fn inputs_of(&self, kept: &[usize]) -> Vec<usize> {
        let inputs = kept.iter().flat_map(|block| block * self.block..(block + 1) * self.block);
        inputs.chain(self.blocks * self.block..self.n).collect()
    }

    /// The weight `[rows, n]` that minimises E among those that are zero outside the blocks `kept`:
    /// `V_Q = (T·H)_Q · H_QQ⁻¹`.
    ///
    /// Source: FASP (arXiv 2501.09412), restoration; ALGORITHMS.md §7. The constant input makes it fit the bias as well.
    ///
    /// # Errors
    /// `NotPositiveDefinite`, which a part of a positive definite matrix can only be by rounding.
    pub fn restored(&self, kept: &[usize]) -> Result<Vec<f64>, SolveError> {
        let (n, inputs) = (self.n, self.inputs_of(kept));
        let k = inputs.len();
        let gone: Vec<usize> = (0..n).filter(|j| inputs.binary_search(j).is_err()).collect();
        let part = |rows: &[usize], columns: &[usize]| -> Vec<f64> {
            rows.iter().flat_map(|i| columns.iter().map(move |j| self.hessian[i * n + j])).collect()
        };
        let factor = Cholesky::new(part(&inputs, &inputs), k).map_err(|NotPositiveDefinite { pivot }| {
            SolveError::NotPositiveDefinite { columns: k, pivot, damping: self.damping }
        })?;
        // T_Q + T_P·H_PQ·H_QQ⁻¹: what the inputs that went gave is made up for by those that stay.
        let lost: Vec<f64> = self.target.chunks(n).flat_map(|row| gone.iter().map(move |&j| row[j])).collect();
        let mut step = if gone.is_empty() {
            vec![0.0; self.rows * k]
        } else {
            product(&lost, &part(&gone, &inputs), gone.len(), k)
        };
        factor.solve(&mut step);
        let mut out = vec![0.0; self.rows * n];
        for (i, row) in out.chunks_mut(n).enumerate() {
            for (q, &j) in inputs.iter().enumerate() {
                row[j] = self.target[i * n + j] + step[i * k + q];
            }
        }
        Ok(out)
    }

    /// The dense weight with nothing but zeros outside the blocks `kept`.
    pub fn masked(&self, kept: &[usize]) -> Vec<f64> {
        let mut out = vec![0.0; self.rows * self.n];
        let inputs = self.inputs_of(kept);
        for (row, dense) in out.chunks_mut(self.n).zip(self.dense.chunks(self.n)) {
            inputs.iter().for_each(|&j| row[j] = dense[j]);
        }
        out
    }

    /// `E(V)`.
    pub fn error(&self, solution: &[f64]) -> f64 {
        let delta: Vec<f64> = solution.iter().zip(&self.target).map(|(v, t)| v - t).collect();
        let image = product(&delta, &self.hessian, self.n, self.n);
        image.iter().zip(&delta).map(|(x, y)| x * y).sum()
    }

    /// Floating-point operations of the set-up and one restoration on `kept` inputs.
    pub fn flops(&self, kept: usize) -> f64 {
        let (n, k, rows) = (self.n as f64, kept as f64, self.rows as f64);
        n.powi(3) + k.powi(3) / 3.0 + 2.0 * rows * k * k + 2.0 * rows * k * (n - k)
    }
}

/// `tr((V − W)·G·(V − W)ᵀ)` over other statistics, such as the held-out ones.
pub(super) fn error_on(stats: &InputStats, solution: &[f64], dense: &[f64], n: usize) -> Result<f64, SolveError> {
    let gram = finite("held-out gram", &stats.gram)?;
    let delta: Vec<f64> = solution.iter().zip(dense).map(|(v, w)| v - w).collect();
    Ok(product(&delta, &gram, n, n).iter().zip(&delta).map(|(x, y)| x * y).sum())
}

/// `[W | b]` in f64.
fn augmented(problem: &PairProblem<'_>) -> Result<Vec<f64>, SolveError> {
    let columns = problem.weight.dim(1)?;
    let weight = finite("weight", problem.weight)?;
    let Some(bias) = problem.bias else { return Ok(weight) };
    let bias = finite("bias", bias)?;
    Ok(weight.chunks(columns).zip(bias).flat_map(|(row, bias)| row.iter().copied().chain([bias])).collect())
}

fn finite(what: &'static str, tensor: &candle_core::Tensor) -> Result<Vec<f64>, SolveError> {
    let values = values(tensor)?;
    if values.iter().any(|value| !value.is_finite()) {
        return Err(SolveError::NotFinite { what });
    }
    Ok(values.into_iter().map(f64::from).collect())
}

#[cfg(test)]
mod tests {
    use super::super::consumer::fixture::{self, Consumer};
    use super::*;
    use crate::linalg::oracle;

    #[test]
    fn restoration_is_the_least_squares_solution_on_what_stays() {
        for bias in [false, true] {
            let consumer = Consumer::random(4, 5, 12, 2, bias);
            let quadratic = Quadratic::new(&consumer.problem(0), 0.01, 0.0).unwrap();
            let kept = [0, 2, 3, 5];
            let solved = quadratic.restored(&kept).unwrap();
            let inputs = quadratic.inputs_of(&kept);
            let keep: Vec<bool> = (0..quadratic.n).map(|j| inputs.contains(&j)).collect();
            for (row, dense) in solved.chunks(quadratic.n).zip(quadratic.dense.chunks(quadratic.n)) {
                let expected = oracle::least_squares_on_support(dense, &quadratic.hessian, &keep);
                assert!(row.iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-9), "bias: {bias}");
            }
        }
    }

    #[test]
    fn restoration_satisfies_the_normal_equations() {
        let consumer = Consumer::random(5, 6, 24, 1, true);
        let quadratic = Quadratic::new(&consumer.problem(0), 0.01, 0.0).unwrap();
        let kept: Vec<usize> = (0..24).filter(|j| j % 3 != 1).collect();
        let solved = quadratic.restored(&kept).unwrap();
        let delta: Vec<f64> = solved.iter().zip(&quadratic.target).map(|(v, t)| v - t).collect();
        let gradient = product(&delta, &quadratic.hessian, quadratic.n, quadratic.n);
        let size = quadratic.hessian.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        for row in gradient.chunks(quadratic.n) {
            for j in quadratic.inputs_of(&kept) {
                assert!(row[j].abs() < 1e-11 * size, "{}", row[j]);
            }
        }
    }

    #[test]
    fn restoring_never_raises_the_error_and_removing_nothing_is_the_identity() {
        for seed in 0..8 {
            let consumer = Consumer::random(seed, 5, 16, 1, seed % 2 == 0);
            let quadratic = Quadratic::new(&consumer.problem(0), 0.01, 0.0).unwrap();
            let kept: Vec<usize> = (0..16).filter(|j| !(j + seed as usize).is_multiple_of(4)).collect();
            let (restored, masked) = (quadratic.restored(&kept).unwrap(), quadratic.masked(&kept));
            assert!(quadratic.error(&restored) <= quadratic.error(&masked));
            let all: Vec<usize> = (0..16).collect();
            assert_eq!(quadratic.restored(&all).unwrap(), quadratic.dense);
        }
    }

    #[test]
    fn the_blended_target_is_the_best_dense_weight_for_it() {
        let consumer = Consumer::random_with_dense(6, 4, 10);
        let quadratic = Quadratic::new(&consumer.problem(0), 1e-9, 1.0).unwrap();
        let stats = &consumer.stats;
        let cross = fixture::wide(&stats.dense.as_ref().unwrap().cross);
        // T·G = W·Kᵀ.
        let left = oracle::product(&quadratic.target, &fixture::wide(&stats.gram), 10, 10);
        let right = oracle::product(&quadratic.dense, &oracle::transpose(&cross, 10), 10, 10);
        assert!(left.iter().zip(right).all(|(x, y)| (x - y).abs() < 1e-6));
    }

    #[test]
    fn blocks_that_do_not_fit_are_refused() {
        let consumer = Consumer::random(1, 3, 12, 2, false);
        let problem = consumer.problem(6);
        assert!(matches!(Quadratic::new(&problem, 0.01, 0.0), Err(SolveError::Blocks { remove: 6, .. })));
        let problem = PairProblem { block: 5, ..consumer.problem(1) };
        assert!(matches!(Quadratic::new(&problem, 0.01, 0.0), Err(SolveError::Blocks { block: 5, .. })));
    }

    #[test]
    fn inputs_that_are_never_active_do_not_break_it() {
        let mut consumer = Consumer::random(2, 3, 8, 1, false);
        consumer.silence(5);
        let quadratic = Quadratic::new(&consumer.problem(0), 0.0, 0.0).unwrap();
        assert_eq!(quadratic.dead_channels, 1);
        assert!(quadratic.damping > 0.0 && quadratic.raised == 1);
    }
}
