//! Removing groups of inputs one after another, exactly: the optimal brain surgeon of whole columns.
//!
//! Source: SlimGPT (arXiv 2412.18110) as summarised in ALGORITHMS.md §5; Hassibi and Stork, "Second order derivatives for
//! network pruning" (1992), for several columns at once.

use rayon::prelude::*;

use super::Quadratic;
use crate::linalg::factor::NotPositiveDefinite;
use crate::linalg::wide::{Cholesky, subtract_product};
use crate::prune::SolveError;

/// A weight from which inputs are removed; what stays is always the best there is without those that went.
#[derive(Debug, Clone)]
pub(super) struct Shrinking {
    n: usize,
    damping: f64,
    /// `[rows, n]`; zero in the inputs that went.
    pub(super) weight: Vec<f64>,
    /// H⁻¹ of the inputs that stay, `[n, n]`; zero in the rows and columns of those that went.
    inverse: Vec<f64>,
    /// What the removals so far have cost.
    pub(super) cost: f64,
}

impl Shrinking {
    /// Starts at the best dense weight.
    pub(super) fn new(quadratic: &Quadratic) -> Self {
        Self {
            n: quadratic.n,
            damping: quadratic.damping,
            weight: quadratic.target.clone(),
            inverse: quadratic.inverse.clone(),
            cost: 0.0,
        }
    }

    /// What removing single inputs would cost: `‖W_:j‖² / (H⁻¹)_jj`.
    pub(super) fn costs_of_columns(&self, inputs: &[usize]) -> Vec<f64> {
        let n = self.n;
        let mut squares = vec![0.0; n];
        for row in self.weight.chunks(n) {
            squares.iter_mut().zip(row).for_each(|(square, w)| *square += w * w);
        }
        inputs.iter().map(|&j| squares[j] / self.inverse[j * n + j]).collect()
    }

    /// What removing a group of inputs at once would cost: `tr(W_g·[(H⁻¹)_gg]⁻¹·W_gᵀ) = ‖L⁻¹·W_gᵀ‖²`.
    ///
    /// # Errors
    /// `NotPositiveDefinite`, which a part of H⁻¹ can only be by rounding.
    pub(super) fn cost_of_group(&self, group: &[usize]) -> Result<f64, SolveError> {
        let factor = self.factor(group)?;
        let mut columns = self.columns(group);
        factor.half_solve(&mut columns);
        Ok(columns.iter().map(|x| x * x).sum())
    }

    /// The costs of several groups, each as if it went alone; the groups are factored as a batch, in parallel.
    ///
    /// # Errors
    /// As [`Self::cost_of_group`].
    pub(super) fn costs_of_groups(&self, groups: &[Vec<usize>]) -> Result<Vec<f64>, SolveError> {
        groups.par_iter().map(|group| self.cost_of_group(group)).collect()
    }

    /// Removes a group: `W −= W_g·[(H⁻¹)_gg]⁻¹·(H⁻¹)_g:` and `H⁻¹ −= (H⁻¹)_:g·[(H⁻¹)_gg]⁻¹·(H⁻¹)_g:`.
    ///
    /// # Errors
    /// As [`Self::cost_of_group`].
    pub(super) fn remove(&mut self, group: &[usize]) -> Result<(), SolveError> {
        let (n, g) = (self.n, group.len());
        let factor = self.factor(group)?;
        let rows: Vec<f64> = group.iter().flat_map(|&i| self.inverse[i * n..(i + 1) * n].iter().copied()).collect();
        let mut columns = self.columns(group);
        let dropped = columns.clone();
        factor.solve(&mut columns);
        self.cost += columns.iter().zip(dropped).map(|(x, w)| x * w).sum::<f64>();
        subtract_product(&mut self.weight, &columns, &rows, g, n);
        // (H⁻¹)_:g is the transpose of `rows`.
        let mut left: Vec<f64> =
            (0..n).flat_map(|j| (0..g).map(move |k| (k, j))).map(|(k, j)| rows[k * n + j]).collect();
        factor.solve(&mut left);
        subtract_product(&mut self.inverse, &left, &rows, g, n);
        for &j in group {
            self.weight.iter_mut().skip(j).step_by(n).for_each(|w| *w = 0.0);
            (0..n).for_each(|i| (self.inverse[i * n + j], self.inverse[j * n + i]) = (0.0, 0.0));
        }
        Ok(())
    }

    /// `(H⁻¹)_gg = LLᵀ`.
    fn factor(&self, group: &[usize]) -> Result<Cholesky, SolveError> {
        let block = group.iter().flat_map(|&i| group.iter().map(move |&j| self.inverse[i * self.n + j])).collect();
        Cholesky::new(block, group.len()).map_err(|NotPositiveDefinite { pivot }| SolveError::NotPositiveDefinite {
            columns: group.len(),
            pivot,
            damping: self.damping,
        })
    }

    /// `W_g`, `[rows, g]`.
    fn columns(&self, group: &[usize]) -> Vec<f64> {
        self.weight.chunks(self.n).flat_map(|row| group.iter().map(move |&j| row[j])).collect()
    }

    /// Operations of removing `g` inputs.
    pub(super) fn flops(&self, g: usize) -> f64 {
        2.0 * (self.weight.len() + self.inverse.len()) as f64 * g as f64
    }

    /// `H⁻¹·H`, for tests of how far rounding has come.
    #[cfg(test)]
    fn drift(&self, hessian: &[f64], kept: &[usize]) -> f64 {
        let n = self.n;
        let identity = crate::linalg::wide::product(&self.inverse, hessian, n, n);
        let worst = |i: usize, j: usize| (identity[i * n + j] - f64::from(u8::from(i == j))).abs();
        kept.iter().flat_map(|&i| kept.iter().map(move |&j| worst(i, j))).fold(0.0, f64::max)
    }
}

#[cfg(test)]
mod tests {
    use super::super::consumer::fixture::Consumer;
    use super::*;

    fn quadratic(seed: u64, columns: usize, bias: bool) -> Quadratic {
        Quadratic::new(&Consumer::random(seed, 5, columns, 1, bias).problem(0), 0.01, 0.0).unwrap()
    }

    #[test]
    fn the_cost_of_a_group_is_the_rise_in_error_after_refitting() {
        for (seed, group) in [(1, vec![3]), (2, vec![0, 1, 2, 3]), (3, vec![1, 7, 10])] {
            let quadratic = quadratic(seed, 12, seed == 2);
            let shrinking = Shrinking::new(&quadratic);
            let kept: Vec<usize> = (0..12).filter(|j| !group.contains(j)).collect();
            let refitted = quadratic.error(&quadratic.restored(&kept).unwrap());
            let cost = shrinking.cost_of_group(&group).unwrap();
            assert!((cost / refitted - 1.0).abs() < 1e-9, "{cost} {refitted}");
        }
    }

    #[test]
    fn columns_are_groups_of_one() {
        let shrinking = Shrinking::new(&quadratic(4, 10, false));
        let groups: Vec<Vec<usize>> = (0..10).map(|j| vec![j]).collect();
        let all: Vec<usize> = (0..10).collect();
        let apart = shrinking.costs_of_groups(&groups).unwrap();
        for (x, y) in shrinking.costs_of_columns(&all).iter().zip(apart) {
            assert!((x / y - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn removing_step_by_step_ends_at_the_least_squares_weight() {
        let quadratic = quadratic(5, 20, true);
        let mut shrinking = Shrinking::new(&quadratic);
        for group in [vec![2, 3], vec![17], vec![0, 9, 11, 4]] {
            let expected = shrinking.cost + shrinking.cost_of_group(&group).unwrap();
            shrinking.remove(&group).unwrap();
            assert!((shrinking.cost / expected - 1.0).abs() < 1e-12);
        }
        let kept: Vec<usize> = (0..20).filter(|j| ![2, 3, 17, 0, 9, 11, 4].contains(j)).collect();
        let restored = quadratic.restored(&kept).unwrap();
        assert!(shrinking.weight.iter().zip(&restored).all(|(x, y)| (x - y).abs() < 1e-9));
        assert!((shrinking.cost / quadratic.error(&restored) - 1.0).abs() < 1e-9);
        let gone: Vec<usize> = quadratic.inputs_of(&kept);
        assert!(shrinking.inverse.iter().all(|x| x.is_finite()));
        assert_eq!(gone.len(), 14);
    }

    #[test]
    fn the_inverse_stays_the_inverse_of_what_stays() {
        let quadratic = quadratic(6, 16, false);
        let mut shrinking = Shrinking::new(&quadratic);
        for j in 0..12 {
            shrinking.remove(&[j]).unwrap();
        }
        let drift = shrinking.drift(&quadratic.hessian, &[12, 13, 14, 15]);
        assert!(drift < 1e-9, "{drift:e}");
    }
}
