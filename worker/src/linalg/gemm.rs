//! Products of dense blocks: the one place that hands pointers to the `gemm` crate.

use rayon::prelude::*;

/// As few rows are not divided among threads: where the right-hand side is packed, each part does so anew. With 1536 columns that
/// takes as long as multiplying 20 to 90 rows.
const UNDIVIDED: usize = 144;
/// The most rows of a block: what is done to its product afterwards should still find it in the cache.
const LARGEST_ROW_TILE: usize = 384;

/// Rows of a block that one thread multiplies at a time: a quarter of them all, within bounds, and all blocks about as large.
/// The number of threads has no say, so that bits do not depend on it.
pub fn row_tile(rows: usize) -> usize {
    let most = rows.div_ceil(4).clamp(UNDIVIDED, LARGEST_ROW_TILE);
    rows.max(1).div_ceil(rows.div_ceil(most).max(1)).next_multiple_of(48)
}

/// A rectangular part of a row-major matrix, or of its transpose.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// The first `columns` elements of each row of a matrix whose rows are `stride` apart; `data` starts at its first element.
    pub fn new(data: &'a [f32], rows: usize, columns: usize, stride: usize) -> Self {
        assert_fits(data.len(), rows, columns, stride);
        Self { data, rows, columns, row_stride: stride, column_stride: 1 }
    }

    /// The same elements with rows and columns exchanged.
    #[must_use]
    pub fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }
}

/// Computes `out ← keep·out + scale·a·b` on the calling thread.
///
/// `out` starts at the first element of an `a.rows` by `b.columns` part of a row-major matrix whose rows are `stride` apart.
pub fn gemm(out: &mut [f32], stride: usize, keep: f32, a: View<'_>, b: View<'_>, scale: f32) {
    gemm_on(gemm::Parallelism::None, out, stride, keep, a, b, scale);
}

/// [`gemm()`] on all threads, which share what is packed of `a` and `b`. Threads divide rows and columns, never the inner
/// dimension, so bits do not depend on their number.
pub fn gemm_parallel(out: &mut [f32], stride: usize, keep: f32, a: View<'_>, b: View<'_>, scale: f32) {
    let threads = gemm::Parallelism::Rayon(rayon::current_num_threads());
    gemm_on(threads, out, stride, keep, a, b, scale);
}

fn gemm_on(
    threads: gemm::Parallelism,
    out: &mut [f32],
    stride: usize,
    keep: f32,
    a: View<'_>,
    b: View<'_>,
    scale: f32,
) {
    assert_eq!(a.columns, b.rows, "inner dimensions");
    assert_fits(out.len(), a.rows, b.columns, stride);
    if a.rows == 0 || b.columns == 0 {
        return;
    }
    let step = |stride: usize| isize::try_from(stride).expect("a slice is no longer than isize::MAX");
    #[allow(unsafe_code, reason = "the gemm crate takes pointers")]
    // SAFETY: `assert_fits` holds for all three blocks (on construction for `a` and `b`), so every index the product
    // touches lies inside its slice; `out` is borrowed mutably, so it aliases neither input.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
            1,
            step(stride),
            keep != 0.0,
            a.data.as_ptr(),
            step(a.column_stride),
            step(a.row_stride),
            b.data.as_ptr(),
            step(b.column_stride),
            step(b.row_stride),
            keep,
            scale,
            false,
            false,
            false,
            threads,
        );
    }
}

/// The product of row-major `a [rows, inner]` and `b [inner, columns]`, row tiles in parallel.
pub fn product(a: &[f32], b: &[f32], inner: usize, columns: usize) -> Vec<f32> {
    let rows = a.len() / inner.max(1);
    let mut out = vec![0.0; rows * columns];
    let right = View::new(b, inner, columns, columns);
    let tile = row_tile(rows);
    out.par_chunks_mut((tile * columns).max(1))
        .zip(a.par_chunks((tile * inner).max(1)))
        .for_each(|(out, a)| gemm(out, columns, 0.0, View::new(a, a.len() / inner, inner, inner), right, 1.0));
    out
}

fn assert_fits(length: usize, rows: usize, columns: usize, stride: usize) {
    assert!(columns <= stride || rows <= 1, "rows of {columns} elements overlap at stride {stride}");
    let end =
        rows.checked_sub(1).and_then(|last| last.checked_mul(stride)).and_then(|start| start.checked_add(columns));
    assert!(rows == 0 || end.is_some_and(|end| end <= length), "a {rows} by {columns} block leaves its slice");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::oracle;

    #[test]
    fn product_equals_the_naive_loops_at_awkward_shapes() {
        for (rows, inner, columns) in [(1, 1, 1), (3, 5, 7), (97, 33, 130), (192, 257, 65)] {
            let a = oracle::random(1, rows * inner);
            let b = oracle::random(2, inner * columns);
            let expected = oracle::product(&oracle::wide(&a), &oracle::wide(&b), inner, columns);
            let tolerance = 4.0 * inner as f64 * f64::from(f32::EPSILON);
            for (x, y) in product(&a, &b, inner, columns).iter().zip(expected) {
                assert!((f64::from(*x) - y).abs() <= tolerance, "{x} {y}");
            }
        }
    }

    #[test]
    fn rows_are_divided_evenly_and_few_are_not() {
        for (rows, tile) in [(0, 48), (1, 48), (144, 144), (145, 96), (192, 96), (576, 144), (1536, 384), (4096, 384)] {
            assert_eq!(row_tile(rows), tile, "{rows}");
        }
    }

    #[test]
    fn bits_do_not_depend_on_the_number_of_threads() {
        let a = oracle::random(1, 577 * 576);
        let b = oracle::random(2, 576 * 576);
        let results: Vec<_> =
            [1, 2, 3].map(|threads| oracle::with_threads(threads, || product(&a, &b, 576, 576))).into();
        assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn shared_products_equal_those_of_one_thread_bit_for_bit() {
        let (a, b) = (oracle::random(1, 577 * 1031), oracle::random(2, 1031 * 193));
        let (left, right) = (View::new(&a, 577, 1031, 1031), View::new(&b, 1031, 193, 193));
        let mut expected = vec![1.0; 577 * 193];
        gemm(&mut expected, 193, 0.5, left, right, 2.0);
        for threads in [1, 2, 3, 7] {
            let mut out = vec![1.0; 577 * 193];
            oracle::with_threads(threads, || gemm_parallel(&mut out, 193, 0.5, left, right, 2.0));
            assert!(out == expected, "{threads} threads");
        }
    }

    #[test]
    fn a_strided_block_is_updated_and_nothing_else() {
        let (a, b) = (oracle::random(3, 4), oracle::random(4, 4));
        let mut out = [1.0; 3 * 5];
        gemm(&mut out[6..], 5, 1.0, View::new(&a, 2, 2, 2), View::new(&b, 2, 2, 2).transposed(), -1.0);
        for (index, value) in out.iter().enumerate() {
            let touched = [6, 7, 11, 12].contains(&index);
            assert_eq!(touched, (value - 1.0).abs() > 0.0, "{index}");
        }
    }

    #[test]
    #[should_panic(expected = "leaves its slice")]
    fn a_block_that_leaves_its_slice_is_refused() {
        View::new(&[0.0; 5], 2, 3, 3);
    }
}
