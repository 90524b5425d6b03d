//! Cholesky factors and inverses of symmetric positive definite matrices.
//!
//! Everything rests on `M = L⁻¹` of `A = LLᵀ`, found by halves: with `M₁` that of the leading block, `Y = M₁A₁₂` is `L₂₁ᵀ`, the
//! trailing block becomes `A₂₂ − YᵀY`, and with its `M₂` the corner is `−M₂YᵀM₁`. All of it is products of blocks, for the
//! fastest kernel there is; only the diagonal blocks are loops. What is known to be zero is left out strip by strip.
//! The halves need no inverse but those of triangles, whose condition is the root of the matrix's.

use std::ops::Range;

use rayon::prelude::*;

use super::gemm::{View, gemm};
use super::lanes::{Lanes, in_lanes};
use super::symmetric::Symmetric;

/// The widest block that is factored in loops.
const BASE: usize = 72;
/// The most rows of a strip.
const STRIP: usize = 96;

/// The matrix is not positive definite in f32; the factorisation stopped at this pivot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not positive definite at pivot {pivot}")]
pub struct NotPositiveDefinite {
    /// Index of the first pivot that is not positive.
    pub pivot: usize,
}

/// The inverse of a symmetric positive definite `matrix [n, n]`.
///
/// # Errors
/// `NotPositiveDefinite`, with the pivot.
pub fn inverse(mut matrix: Vec<f32>, n: usize) -> Result<Symmetric, NotPositiveDefinite> {
    let lower = inverse_of_cholesky(&mut matrix, n)?;
    // A⁻¹ = MᵀM: on and below the diagonal, and M is zero above its own.
    let mut product = matrix;
    in_strips(&mut product, n, |top, height, rows| {
        let below = &lower[top * n..];
        let left = View::new(&below[top..], n - top, height, n).transposed();
        gemm(rows, n, 0.0, left, View::new(below, n - top, top + height, n), 1.0);
    });
    drop(lower);
    Ok(Symmetric::new(&product))
}

/// The upper triangular `U [n, n]` with `matrix⁻¹ = UᵀU`, row-major, zeros below the diagonal.
///
/// With J the exchange of first and last, `J·matrix·J = LLᵀ` gives `matrix = (JLJ)(JLJ)ᵀ` and so `U = J·L⁻¹·J`: one
/// factorisation and one triangular inverse, where Cholesky → inverse → Cholesky takes three factorisations' work.
///
/// # Errors
/// `NotPositiveDefinite`, with the pivot.
pub fn upper_of_inverse(matrix: &[f32], n: usize) -> Result<Vec<f32>, NotPositiveDefinite> {
    let mut flipped: Vec<f32> = matrix.iter().rev().copied().collect();
    let mut upper = inverse_of_cholesky(&mut flipped, n)
        .map_err(|NotPositiveDefinite { pivot }| NotPositiveDefinite { pivot: n - 1 - pivot })?;
    upper.reverse();
    Ok(upper)
}

/// `L⁻¹ [n, n]` of `matrix = LLᵀ`, zeros above the diagonal. Of `matrix` the upper triangle is read, and overwritten.
pub(super) fn inverse_of_cholesky(matrix: &mut [f32], n: usize) -> Result<Vec<f32>, NotPositiveDefinite> {
    let mut lower = vec![0.0; n * n];
    let mut scratch = vec![0.0; if n > BASE { half(n) * half(n) } else { 0 }];
    by_halves(matrix, &mut lower, &mut scratch, n, 0..n)?;
    Ok(lower)
}

/// Writes the inverse factor of the rows and columns `block` of `a` to the same place in `m`; the rows of both are `n` apart.
/// `scratch` holds a quarter of the block.
fn by_halves(
    a: &mut [f32],
    m: &mut [f32],
    scratch: &mut [f32],
    n: usize,
    block: Range<usize>,
) -> Result<(), NotPositiveDefinite> {
    let (first, size) = (block.start, block.len());
    if size <= BASE {
        return in_lanes(InLoops { a, m, n, block });
    }
    let (head, tail) = (half(size), size - half(size));
    let middle = first + head;
    by_halves(a, m, scratch, n, first..middle)?;

    // Y = M₁·A₁₂ [head, tail] in place of A₁₂; row i of M₁ ends at i.
    let (above, below) = a.split_at_mut(middle * n);
    let (leading, corner) = (&m[first * n + first..], &mut above[first * n + middle..]);
    let right = &*corner;
    in_strips(&mut scratch[..head * tail], tail, |top, height, out| {
        let left = View::new(&leading[top * n..], height, top + height, n);
        gemm(out, tail, 0.0, left, View::new(right, top + height, tail, n), 1.0);
    });
    for (row, y) in corner.chunks_mut(n).zip(scratch[..head * tail].chunks(tail)) {
        row[..tail].copy_from_slice(y);
    }
    // A₂₂ ← A₂₂ − YᵀY, on and above the diagonal.
    let y = &*corner;
    in_strips(&mut below[..tail * n], n, |top, height, out| {
        let left = View::new(&y[top..], head, height, n).transposed();
        gemm(&mut out[middle + top..], n, 1.0, left, View::new(&y[top..], head, tail - top, n), -1.0);
    });
    by_halves(a, m, scratch, n, middle..block.end)?;

    // M₂₁ = −(M₂·Yᵀ)·M₁; row i of M₂ ends at i, column j of M₁ begins at j.
    let y = &a[first * n + middle..];
    let (above, below) = m.split_at_mut(middle * n);
    let (leading, trailing) = (&above[first * n + first..], &below[middle..]);
    in_strips(&mut scratch[..tail * head], head, |top, height, out| {
        let left = View::new(&trailing[top * n..], height, top + height, n);
        gemm(out, head, 0.0, left, View::new(y, head, top + height, n).transposed(), 1.0);
    });
    let product = &*scratch;
    in_strips(&mut below[..tail * n], n, |top, height, out| {
        for left in (0..head).step_by(strip(head)) {
            let width = strip(head).min(head - left);
            let columns = View::new(&leading[left * n + left..], head - left, width, n);
            let rows = View::new(&product[top * head + left..], height, head - left, head);
            gemm(&mut out[first + left..], n, 0.0, rows, columns, -1.0);
        }
    });
    Ok(())
}

/// Rows of the leading part of a block that is cut in two.
fn half(size: usize) -> usize {
    (size / 2).next_multiple_of(8)
}

/// Rows of a strip when `rows` are cut into as few as may be.
fn strip(rows: usize) -> usize {
    rows.div_ceil(rows.div_ceil(STRIP).max(1)).next_multiple_of(8)
}

/// Calls `work(top, height, rows)` for strips of the rows of `out`, which are `stride` wide.
fn in_strips(out: &mut [f32], stride: usize, work: impl Fn(usize, usize, &mut [f32]) + Sync) {
    let height = strip(out.len() / stride.max(1));
    out.par_chunks_mut((height * stride).max(1))
        .enumerate()
        .for_each(|(index, rows)| work(index * height, rows.len() / stride, rows));
}

struct InLoops<'a> {
    a: &'a mut [f32],
    m: &'a mut [f32],
    n: usize,
    block: Range<usize>,
}

impl Lanes for InLoops<'_> {
    type Output = Result<(), NotPositiveDefinite>;

    #[inline(always)]
    fn run(self) -> Self::Output {
        in_loops(self.a, self.m, self.n, self.block)
    }
}

/// What [`by_halves`] does, row by row: the Cholesky factor, transposed, in place of the upper triangle of `a`, then its inverse by
/// forward substitution.
#[inline(always)]
fn in_loops(a: &mut [f32], m: &mut [f32], n: usize, block: Range<usize>) -> Result<(), NotPositiveDefinite> {
    for k in block.clone() {
        let (done, rest) = a.split_at_mut((k + 1) * n);
        let row = &mut done[k * n + k..k * n + block.end];
        let pivot = row[0];
        // NaN is not above zero.
        if !(pivot > 0.0 && pivot.is_finite()) {
            return Err(NotPositiveDefinite { pivot: k });
        }
        let factor = 1.0 / pivot.sqrt();
        row.iter_mut().for_each(|value| *value *= factor);
        for (i, below) in (k + 1..block.end).zip(rest.chunks_mut(n)) {
            let row = &row[i - k..];
            let share = row[0];
            below[i..block.end].iter_mut().zip(row).for_each(|(value, upper)| *value -= share * upper);
        }
    }
    for i in block.clone() {
        let (done, rest) = m.split_at_mut(i * n);
        let row = &mut rest[block.start..=i];
        for k in block.start..i {
            let share = a[k * n + i];
            let earlier = &done[k * n + block.start..=k * n + k];
            row.iter_mut().zip(earlier).for_each(|(value, inverse)| *value -= share * inverse);
        }
        let factor = 1.0 / a[i * n + i];
        row.iter_mut().for_each(|value| *value *= factor);
        row[i - block.start] = factor;
    }
    Ok(())
}

/// Side of the square tiles in which matrices are transposed: one side of the copy walks down columns.
const TILE: usize = 32;

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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::oracle;

    #[test]
    fn inverse_times_matrix_is_the_identity() {
        for n in [1, 2, 7, 65, 73, 130, 200] {
            let matrix = oracle::spd(n as u64, n);
            let identity = inverse(matrix.clone(), n).unwrap().product(&matrix);
            for (index, value) in identity.iter().enumerate() {
                let expected = if index / n == index % n { 1.0 } else { 0.0 };
                assert!((value - expected).abs() < 2e-3, "n={n} {value}");
            }
        }
    }

    #[test]
    fn upper_factor_multiplies_to_the_inverse() {
        for n in [67, 190] {
            upper_factor_multiplies_back(n);
        }
    }

    fn upper_factor_multiplies_back(n: usize) {
        let matrix = oracle::spd(3, n);
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
        assert_eq!(inverse(matrix.clone(), 3).unwrap_err(), NotPositiveDefinite { pivot: 1 });
        matrix[4] = 1.0;
        matrix[8] = 0.0;
        assert_eq!(upper_of_inverse(&matrix, 3), Err(NotPositiveDefinite { pivot: 2 }));
        matrix[8] = f32::NAN;
        assert!(inverse(matrix, 3).is_err());
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let n = 700;
        let matrix = oracle::spd(5, n);
        let results: Vec<_> = [1, 2, 3, 5]
            .map(|threads| {
                let inverse = || inverse(matrix.clone(), n).unwrap().triangle();
                oracle::with_threads(threads, || (inverse(), upper_of_inverse(&matrix, n)))
            })
            .into();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    }
}
