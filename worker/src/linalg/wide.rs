//! The same maths in f64, for problems that are solved once a layer and subtract nearly equal numbers while they are at it.
//!
//! As in the rest of the module, outputs are split over threads and sums never are, so bits do not depend on their number.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul;
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::linalg::triangular_solve::{solve_lower_triangular_in_place, solve_upper_triangular_in_place};
use faer::{Accum, MatMut, MatRef, Par};

use super::factor::NotPositiveDefinite;

/// The product of row-major `a [rows, inner]` and `b [inner, columns]`.
pub fn product(a: &[f64], b: &[f64], inner: usize, columns: usize) -> Vec<f64> {
    let mut out = vec![0.0; a.len() / inner.max(1) * columns];
    multiply(&mut out, Accum::Replace, a, b, inner, columns, 1.0);
    out
}

/// Subtracts the product of row-major `a [rows, inner]` and `b [inner, columns]` from `out`.
pub fn subtract_product(out: &mut [f64], a: &[f64], b: &[f64], inner: usize, columns: usize) {
    multiply(out, Accum::Add, a, b, inner, columns, -1.0);
}

fn multiply(out: &mut [f64], accumulate: Accum, a: &[f64], b: &[f64], inner: usize, columns: usize, scale: f64) {
    let rows = a.len() / inner.max(1);
    matmul::matmul(
        MatMut::from_row_major_slice_mut(out, rows, columns),
        accumulate,
        MatRef::from_row_major_slice(a, rows, inner),
        MatRef::from_row_major_slice(b, inner, columns),
        scale,
        Par::rayon(0),
    );
}

/// The Cholesky factor of a symmetric positive definite matrix.
#[derive(Debug, Clone)]
pub struct Cholesky {
    n: usize,
    /// Column-major; meaningful on and below the diagonal.
    lower: Vec<f64>,
}

impl Cholesky {
    /// Factors `matrix [n, n]`.
    ///
    /// # Errors
    /// `NotPositiveDefinite`, with the pivot.
    pub fn new(mut matrix: Vec<f64>, n: usize) -> Result<Self, NotPositiveDefinite> {
        let par = Par::rayon(0);
        let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f64>(n, par, Default::default()));
        cholesky_in_place(
            MatMut::from_column_major_slice_mut(&mut matrix, n, n),
            Default::default(),
            par,
            MemStack::new(&mut memory),
            Default::default(),
        )
        .map_err(|LltError::NonPositivePivot { index }| NotPositiveDefinite { pivot: index })?;
        // faer compares pivots with zero, which lets NaN through.
        match (0..n).find(|&j| !matrix[j * n + j].is_finite()) {
            Some(pivot) => Err(NotPositiveDefinite { pivot }),
            None => Ok(Self { n, lower: matrix }),
        }
    }

    fn factor(&self) -> MatRef<'_, f64> {
        MatRef::from_column_major_slice(&self.lower, self.n, self.n)
    }

    /// Replaces each row b of `rows [_, n]` by `L⁻¹b`; its squared length is then `b·A⁻¹·bᵀ`.
    pub fn half_solve(&self, rows: &mut [f64]) {
        let count = rows.len() / self.n.max(1);
        // Rows of a row-major matrix are columns of a column-major one.
        let right = MatMut::from_column_major_slice_mut(rows, self.n, count);
        solve_lower_triangular_in_place(self.factor(), right, Par::rayon(0));
    }

    /// Replaces each row b of `rows [_, n]` by the x with `x·A = b`.
    pub fn solve(&self, rows: &mut [f64]) {
        self.half_solve(rows);
        let count = rows.len() / self.n.max(1);
        let right = MatMut::from_column_major_slice_mut(rows, self.n, count);
        solve_upper_triangular_in_place(self.factor().transpose(), right, Par::rayon(0));
    }

    /// The inverse `[n, n]`, symmetric to the bit.
    pub fn inverse(&self) -> Vec<f64> {
        let (n, par) = (self.n, Par::rayon(0));
        let mut lower = vec![0.0; n * n];
        invert_lower_triangular(MatMut::from_column_major_slice_mut(&mut lower, n, n), self.factor(), par);
        let mut out = vec![0.0; n * n];
        let factor = MatRef::from_column_major_slice(&lower, n, n);
        triangular::matmul(
            MatMut::from_column_major_slice_mut(&mut out, n, n),
            BlockStructure::TriangularLower,
            Accum::Replace,
            factor.transpose(),
            BlockStructure::TriangularUpper,
            factor,
            BlockStructure::TriangularLower,
            1.0,
            par,
        );
        for i in 0..n {
            for j in 0..i {
                out[i * n + j] = out[j * n + i];
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::oracle;

    fn spd(seed: u64, n: usize) -> Vec<f64> {
        let x = oracle::inputs(seed, 2 * n + 3, n);
        let mut gram = oracle::gram(&x, &x, n);
        (0..n).for_each(|j| gram[j * n + j] += 1e-3);
        gram
    }

    #[test]
    fn inverse_and_solve_agree_with_elimination() {
        for n in [1, 3, 17, 70] {
            let matrix = spd(n as u64, n);
            let factor = Cholesky::new(matrix.clone(), n).unwrap();
            let expected = oracle::inverse(&matrix, n);
            let size = expected.iter().fold(0.0f64, |a, b| a.max(b.abs()));
            for (x, y) in factor.inverse().iter().zip(&expected) {
                assert!((x - y).abs() <= 1e-9 * size, "n={n}: {x} {y}");
            }
            let rows = oracle::wide(&oracle::random(9, 4 * n));
            let mut solved = rows.clone();
            factor.solve(&mut solved);
            for (x, y) in oracle::product(&solved, &matrix, n, n).iter().zip(&rows) {
                assert!((x - y).abs() <= 1e-9, "n={n}: {x} {y}");
            }
        }
    }

    #[test]
    fn products_agree_with_the_naive_loops() {
        for (rows, inner, columns) in [(1, 1, 1), (3, 5, 7), (33, 17, 65)] {
            let a = oracle::wide(&oracle::random(1, rows * inner));
            let b = oracle::wide(&oracle::random(2, inner * columns));
            let expected = oracle::product(&a, &b, inner, columns);
            let mut rest = expected.clone();
            subtract_product(&mut rest, &a, &b, inner, columns);
            assert!(product(&a, &b, inner, columns).iter().zip(&expected).all(|(x, y)| (x - y).abs() < 1e-12));
            assert!(rest.iter().all(|x| x.abs() < 1e-12));
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let n = 500;
        let matrix = spd(5, n);
        let run = || {
            let factor = Cholesky::new(matrix.clone(), n).unwrap();
            let inverse = factor.inverse();
            let mut rows = matrix[..n * 40].to_vec();
            factor.solve(&mut rows);
            (product(&inverse, &matrix, n, n), inverse, rows)
        };
        let results: Vec<_> = [1, 2, 3].map(|threads| oracle::with_threads(threads, run)).into();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn failure_names_the_pivot() {
        let matrix = vec![1.0, 0.0, 0.0, -1.0];
        assert_eq!(Cholesky::new(matrix, 2).unwrap_err(), NotPositiveDefinite { pivot: 1 });
    }
}
