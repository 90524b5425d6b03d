//! Cholesky factors and inverses of symmetric positive definite matrices.

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{LltError, cholesky_in_place, cholesky_in_place_scratch};
use faer::linalg::matmul::triangular::{self, BlockStructure};
use faer::linalg::triangular_inverse::invert_lower_triangular;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// The matrix is not positive definite in f32; the factorisation stopped at this pivot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not positive definite at pivot {pivot}")]
pub struct NotPositiveDefinite {
    /// Index of the first pivot that is not positive.
    pub pivot: usize,
}

/// The inverse of a symmetric positive definite `matrix [n, n]`, symmetric to the bit.
///
/// # Errors
/// `NotPositiveDefinite`, with the pivot.
pub fn inverse(matrix: Vec<f32>, n: usize) -> Result<Vec<f32>, NotPositiveDefinite> {
    inverse_with(matrix, n, all_threads())
}

/// The inverses of several matrices, one thread to each: a factorisation by itself keeps two threads half busy.
///
/// # Errors
/// `NotPositiveDefinite` of the first that is not.
pub fn inverses(matrices: Vec<Vec<f32>>, n: usize) -> Result<Vec<Vec<f32>>, NotPositiveDefinite> {
    matrices.into_par_iter().map(|matrix| inverse_with(matrix, n, Par::Seq)).collect::<Vec<_>>().into_iter().collect()
}

fn inverse_with(matrix: Vec<f32>, n: usize, par: Par) -> Result<Vec<f32>, NotPositiveDefinite> {
    let lower = inverse_of_cholesky(matrix, n, par)?;
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
    // Column-major lower is row-major upper.
    mirror_upper(&mut out, n);
    Ok(out)
}

/// The upper triangular `U [n, n]` with `matrix⁻¹ = UᵀU`, row-major, zeros below the diagonal.
///
/// With J the exchange of first and last, `J·matrix·J = LLᵀ` gives `matrix = (JLJ)(JLJ)ᵀ` and so `U = J·L⁻¹·J`: one
/// factorisation and one triangular inverse, where Cholesky → inverse → Cholesky takes three factorisations' work.
///
/// # Errors
/// `NotPositiveDefinite`, with the pivot.
pub fn upper_of_inverse(matrix: &[f32], n: usize) -> Result<Vec<f32>, NotPositiveDefinite> {
    let flipped = matrix.iter().rev().copied().collect();
    let lower = inverse_of_cholesky(flipped, n, all_threads())
        .map_err(|NotPositiveDefinite { pivot }| NotPositiveDefinite { pivot: n - 1 - pivot })?;
    let mut upper = vec![0.0; n * n];
    upper.par_chunks_mut((TILE * n).max(1)).enumerate().for_each(|(band, rows)| {
        let top = band * TILE;
        let height = rows.len() / n;
        for left in (top..n).step_by(TILE) {
            for j in left..(left + TILE).min(n) {
                // Row i of the tile lies at the end of what column j of the factor, turned round, begins with.
                let column = &lower[n * n - (j * n + top + height)..][..height];
                column.iter().rev().enumerate().for_each(|(i, value)| rows[i * n + j] = *value);
            }
        }
    });
    Ok(upper)
}

/// Side of the square tiles in which matrices are transposed: one side of the copy walks down columns.
const TILE: usize = 32;

/// `L⁻¹` of `matrix = LLᵀ`, column-major; what lies above the diagonal is zero.
fn inverse_of_cholesky(mut matrix: Vec<f32>, n: usize, par: Par) -> Result<Vec<f32>, NotPositiveDefinite> {
    let mut memory = MemBuffer::new(cholesky_in_place_scratch::<f32>(n, par, Default::default()));
    cholesky_in_place(
        MatMut::from_column_major_slice_mut(&mut matrix, n, n),
        Default::default(),
        par,
        MemStack::new(&mut memory),
        Default::default(),
    )
    .map_err(|LltError::NonPositivePivot { index }| NotPositiveDefinite { pivot: index })?;
    // faer compares pivots with zero, which lets NaN through.
    if let Some(pivot) = (0..n).find(|&j| !matrix[j * n + j].is_finite()) {
        return Err(NotPositiveDefinite { pivot });
    }
    let mut lower = vec![0.0; n * n];
    invert_lower_triangular(
        MatMut::from_column_major_slice_mut(&mut lower, n, n),
        MatRef::from_column_major_slice(&matrix, n, n),
        par,
    );
    Ok(lower)
}

/// Copies what lies above the diagonal below it.
pub fn mirror_upper(matrix: &mut [f32], n: usize) {
    for top in (0..n).step_by(TILE) {
        for left in (0..=top).step_by(TILE) {
            for i in top..(top + TILE).min(n) {
                for j in left..(left + TILE).min(i) {
                    matrix[i * n + j] = matrix[j * n + i];
                }
            }
        }
    }
}

/// As many threads as the pool has: faer splits outputs, never sums, so bits stay (there is a test).
fn all_threads() -> Par {
    Par::rayon(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::oracle;

    fn spd(seed: u64, n: usize) -> Vec<f32> {
        let x = oracle::inputs(seed, 2 * n, n);
        let mut gram: Vec<f32> = oracle::gram(&x, &x, n).iter().map(|&v| v as f32).collect();
        let mean = (0..n).map(|j| gram[j * n + j]).sum::<f32>() / n as f32;
        (0..n).for_each(|j| gram[j * n + j] += 0.01 * mean);
        gram
    }

    #[test]
    fn inverse_times_matrix_is_the_identity() {
        for n in [1, 2, 7, 65, 130] {
            let matrix = spd(n as u64, n);
            let inv = inverse(matrix.clone(), n).unwrap();
            let identity = oracle::product(&oracle::wide(&inv), &oracle::wide(&matrix), n, n);
            for (index, value) in identity.iter().enumerate() {
                let expected = if index / n == index % n { 1.0 } else { 0.0 };
                assert!((value - expected).abs() < 2e-3, "n={n} {value}");
            }
        }
    }

    #[test]
    fn upper_factor_multiplies_to_the_inverse() {
        let n = 67;
        let matrix = spd(3, n);
        let upper = oracle::wide(&upper_of_inverse(&matrix, n).unwrap());
        let back = oracle::product(&oracle::transpose(&upper, n), &upper, n, n);
        let expected = oracle::inverse(&oracle::wide(&matrix), n);
        let size = expected.iter().fold(0.0f64, |a, b| a.max(b.abs()));
        for (x, y) in back.iter().zip(expected) {
            assert!((x - y).abs() < 1e-4 * size, "{x} {y}");
        }
        assert!((0..n * n).all(|index| index / n <= index % n || upper[index].abs() <= 0.0));
    }

    #[test]
    fn failure_names_the_pivot() {
        let mut matrix = vec![0.0; 9];
        (0..3).for_each(|j| matrix[j * 4] = 1.0);
        matrix[4] = -1.0;
        assert_eq!(inverse(matrix.clone(), 3), Err(NotPositiveDefinite { pivot: 1 }));
        matrix[4] = 1.0;
        matrix[8] = 0.0;
        assert_eq!(upper_of_inverse(&matrix, 3), Err(NotPositiveDefinite { pivot: 2 }));
        matrix[8] = f32::NAN;
        assert!(inverse(matrix, 3).is_err());
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let n = 700;
        let matrix = spd(5, n);
        let results: Vec<_> = [1, 2, 3, 5]
            .map(|threads| oracle::with_threads(threads, || (inverse(matrix.clone(), n), upper_of_inverse(&matrix, n))))
            .into();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
        let together = inverses(vec![matrix.clone(), matrix.clone()], n).unwrap();
        assert!(together.iter().all(|inverse| Ok(inverse) == results[0].0.as_ref()));
    }
}
