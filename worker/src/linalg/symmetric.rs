//! Symmetric matrices as the solvers multiply by them: laid out once, for all products of a search.
//!
//! A library packs what is on the right of a product each time; with as few rows as a block has that takes up to a fifth of the
//! product, and reads the matrix once more. Measured beside the `gemm` crate, in GFLOP/s of an AVX2 thread with blocks of 144
//! rows: 70 against 65 with 1536 columns, 70 against 59 with 576; and where two threads share a cache, each 68 against 55 and 71
//! against 58.
//!
//! The matrix is read from memory once for each product, and a search has eleven of them. The next panel is asked for while one is in
//! use: of an AVX-512 thread with eleven matrices of 1536 columns in turn that makes 160 GFLOP/s out of 93 to 133 with 96 rows,
//! and 160 to 163 out of 102 to 114 with 48.

use std::cell::RefCell;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::gemm::row_tile;
use super::kernel::{self, LINE, Lines, TILE_ROWS, tile};

/// Most of the inner dimension that is summed up before it is added to the product: so much of a panel, and of the rows it meets,
/// stays in the second cache. The bits of a product depend on it.
const MOST_DEPTH: usize = 1536;
/// Rows that are laid out at a time.
const MOST_ROWS: usize = 192;

/// A symmetric matrix `[n, n]`, in panels of so many columns as a tile of a product has.
#[derive(Debug)]
pub struct Symmetric {
    n: usize,
    /// Columns of a panel, which are whole vectors.
    width: usize,
    /// One panel after another, each by rows; the last is filled up with zeros.
    panels: Lines,
}

impl PartialEq for Symmetric {
    fn eq(&self, other: &Self) -> bool {
        (self.n, self.width) == (other.n, other.width) && self.panels() == other.panels()
    }
}

impl Symmetric {
    /// Lays out a row-major `matrix [n, n]`, of which what lies on and below the diagonal is read.
    pub fn new(matrix: &[f32]) -> Self {
        let n = matrix.len().isqrt();
        Self::of_rows(n, |row| &matrix[row * n..=row * (n + 1)])
    }

    /// Lays out the matrix of such a [`Self::triangle`], `n·(n + 1)/2` numbers.
    pub fn of_triangle(triangle: &[f32], n: usize) -> Self {
        Self::of_rows(n, |row| &triangle[row * (row + 1) / 2..][..=row])
    }

    /// Lays out a matrix whose rows are given as far as the diagonal; on the calling thread, which may have others wait for it.
    fn of_rows<'a>(n: usize, row: impl Fn(usize) -> &'a [f32]) -> Self {
        let width = kernel::tile_columns();
        let length = n.div_ceil(width) * width * n;
        let mut laid_out = Lines::zeros(length);
        let panels = laid_out.get_mut();
        // Loops of a length that the compiler knows: of any other they take twice as long.
        match width {
            2 => lay_out_panels::<2>(panels, n, row),
            8 => lay_out_panels::<8>(panels, n, row),
            16 => lay_out_panels::<16>(panels, n, row),
            32 => lay_out_panels::<32>(panels, n, row),
            _ => unreachable!("vectors have 1, 4, 8 or 16 numbers"),
        }
        Self { n, width, panels: laid_out }
    }

    fn panels(&self) -> &[f32] {
        self.panels.get()
    }

    /// What lies on and below the diagonal, row by row.
    pub fn triangle(&self) -> Vec<f32> {
        let (n, width) = (self.n, self.width);
        let mut triangle = Vec::with_capacity(n * (n + 1) / 2);
        for row in 0..n {
            for (panel, first) in self.panels().chunks_exact(width * n).zip((0..=row).step_by(width)) {
                triangle.extend_from_slice(&panel[row * width..][..width.min(row + 1 - first)]);
            }
        }
        triangle
    }

    /// Its width.
    pub fn n(&self) -> usize {
        self.n
    }

    /// The diagonal.
    pub fn diagonal(&self) -> impl Iterator<Item = f32> {
        let panels = self.panels();
        (0..self.n).map(move |j| panels[(j / self.width * self.n + j) * self.width + j % self.width])
    }

    /// Computes `out ← keep·out + scale·a·self` with row-major `out` and `a [rows, n]` on the calling thread. Each element is
    /// summed up in the order of the inner dimension whatever the rows and, where they have fused operations, the machine's vectors, so
    /// that bits depend on neither.
    pub fn multiply(&self, out: &mut [f32], keep: f32, a: &[f32], scale: f32) {
        assert_eq!(a.len(), out.len(), "a product with a square matrix is as large as its left-hand side");
        assert!(a.len().is_multiple_of(self.n.max(1)), "rows of {} elements", self.n);
        LEFT.with_borrow_mut(|left| Arch::new().dispatch(Multiply { matrix: self, out, keep, a, scale, left }));
    }

    /// The product of row-major `a [rows, n]` and this, row tiles in parallel.
    pub fn product(&self, a: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; a.len()];
        let tile = (row_tile(a.len() / self.n.max(1)) * self.n).max(1);
        let tiles = out.par_chunks_mut(tile).zip(a.par_chunks(tile));
        tiles.for_each(|(out, a)| self.multiply(out, 0.0, a, 1.0));
        out
    }
}

thread_local! {
    /// Where the left-hand side of a product is laid out.
    static LEFT: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

struct Multiply<'a> {
    matrix: &'a Symmetric,
    out: &'a mut [f32],
    keep: f32,
    a: &'a [f32],
    scale: f32,
    left: &'a mut Vec<f32>,
}

impl WithSimd for Multiply<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { matrix, out, keep, a, scale, left } = self;
        let (n, width, panels) = (matrix.n, matrix.width, matrix.panels());
        assert_eq!(width, kernel::columns_of::<S>(), "laid out for other vectors");
        if n == 0 {
            return;
        }
        let depth = n.div_ceil(n.div_ceil(MOST_DEPTH));
        for first in (0..n).step_by(depth) {
            let inner = first..n.min(first + depth);
            let keep = if first == 0 { keep } else { 1.0 };
            let panel = |at: usize| &panels[at * width * n..][inner.start * width..inner.end * width];
            for (out, a) in out.chunks_mut(MOST_ROWS * n).zip(a.chunks(MOST_ROWS * n)) {
                lay_out(left, a, n, inner.clone());
                let tiles = left.len() / (TILE_ROWS * inner.len());
                let share = (width * inner.len()).div_ceil(tiles).next_multiple_of(LINE);
                for columns in (0..n).step_by(width) {
                    // The next panel comes from memory while this one is in use; after the last, the first for whatever follows.
                    let next = if columns + width < n { columns / width + 1 } else { 0 };
                    let (panel, mut ahead) = (panel(columns / width), panel(next).chunks(share));
                    for (left, out) in left.chunks_exact(TILE_ROWS * inner.len()).zip(out.chunks_mut(TILE_ROWS * n)) {
                        let sums = tile(simd, left, panel, ahead.next().unwrap_or_default());
                        for (out, sums) in out.chunks_exact_mut(n).zip(&sums) {
                            let sums: &[f32] = bytemuck::cast_slice(sums);
                            let out = out[columns..].iter_mut().zip(sums);
                            if keep == 0.0 {
                                out.for_each(|(out, sum)| *out = scale * sum);
                            } else {
                                out.for_each(|(out, sum)| *out = keep * *out + scale * sum);
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Lays out a symmetric matrix, whose rows are given as far as the diagonal, in panels of so many columns.
fn lay_out_panels<'a, const WIDTH: usize>(panels: &mut [f32], n: usize, row: impl Fn(usize) -> &'a [f32]) {
    /// Rows that are read abreast: the machine sees as many streams coming.
    const ABREAST: usize = 16;
    /// Rows that are written again for each column while the first cache has them.
    const AGAIN: usize = 128;
    let (panels, _) = panels.as_chunks_mut::<WIDTH>();
    for top in (0..n).step_by(ABREAST) {
        let rows = top..n.min(top + ABREAST);
        for (panel, first) in panels.chunks_exact_mut(n).zip((0..rows.end).step_by(WIDTH)) {
            for (to, below) in panel[rows.clone()].iter_mut().zip(rows.clone()) {
                let known = row(below).get(first..).unwrap_or_default();
                match known.first_chunk() {
                    Some(whole) => *to = *whole,
                    None => to[..known.len()].copy_from_slice(known),
                }
            }
        }
    }
    // Above the diagonal a column is what the row of its number is beside it.
    for (panel, first) in panels.chunks_exact_mut(n.max(1)).zip((0..n).step_by(WIDTH)) {
        let end = n.min(first + WIDTH);
        for (rows, top) in panel[..end].chunks_mut(AGAIN).zip((0..end).step_by(AGAIN)) {
            for slot in 0..end - first {
                let beside = row(first + slot).get(top..).unwrap_or_default();
                rows.iter_mut().zip(beside).for_each(|(to, value)| to[slot] = *value);
            }
        }
    }
}

/// Lays the columns `inner` of rows `a [rows, n]` out tile by tile, and in a tile column by column; rows that lack are zeros.
#[inline(always)]
fn lay_out(left: &mut Vec<f32>, a: &[f32], n: usize, inner: Range<usize>) {
    /// Columns that are written again for each row while the first cache has them.
    const COLUMNS: usize = 64;
    let rows = a.len() / n;
    left.resize(rows.next_multiple_of(TILE_ROWS) * inner.len(), 0.0);
    for (tile, a) in left.chunks_exact_mut(TILE_ROWS * inner.len()).zip(a.chunks(TILE_ROWS * n)) {
        if a.len() < TILE_ROWS * n {
            tile.fill(0.0);
        }
        let (columns, _) = tile.as_chunks_mut::<TILE_ROWS>();
        for (columns, first) in columns.chunks_mut(COLUMNS).zip(inner.clone().step_by(COLUMNS)) {
            for (slot, row) in a.chunks_exact(n).enumerate() {
                columns.iter_mut().zip(&row[first..]).for_each(|(column, value)| column[slot] = *value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linalg::oracle;

    #[test]
    fn panels_of_any_width_hold_the_columns() {
        fn laid_out<const WIDTH: usize>(n: usize) {
            let entry = |row: usize, column: usize| (row.max(column) * 1000 + row.min(column)) as f32;
            let rows: Vec<Vec<f32>> = (0..n).map(|row| (0..=row).map(|column| entry(row, column)).collect()).collect();
            let mut panels = vec![0.0; n.div_ceil(WIDTH) * WIDTH * n];
            lay_out_panels::<WIDTH>(&mut panels, n, |row| &rows[row]);
            for (at, found) in panels.into_iter().enumerate() {
                let (panel, row, slot) = (at / (WIDTH * n), at / WIDTH % n, at % WIDTH);
                let column = panel * WIDTH + slot;
                let expected = if column < n { entry(row, column) } else { 0.0 };
                assert!(found.to_bits() == expected.to_bits(), "{WIDTH} wide, {n}: {row}, {column}");
            }
        }
        for n in [0, 1, 15, 17, 127, 129, 300] {
            laid_out::<2>(n);
            laid_out::<8>(n);
            laid_out::<16>(n);
            laid_out::<32>(n);
        }
    }

    #[test]
    fn products_equal_the_naive_loops_at_awkward_shapes() {
        for (rows, n) in [(1, 1), (5, 3), (6, 16), (7, 33), (193, 40), (13, MOST_DEPTH + 9)] {
            let (a, matrix) = (oracle::random(1, rows * n), oracle::spd(2, n));
            let exact = oracle::product(&oracle::wide(&a), &oracle::wide(&matrix), n, n);
            let size = exact.iter().fold(1.0f64, |size, value| size.max(value.abs()));
            let tolerance = n as f64 * f64::from(f32::EPSILON) * size;
            let packed = Symmetric::new(&matrix);
            for (x, y) in packed.product(&a).iter().zip(&exact) {
                assert!((f64::from(*x) - y).abs() <= tolerance, "{rows} rows of {n}: {x} {y}");
            }
            let mut out = vec![2.0; a.len()];
            packed.multiply(&mut out, 0.5, &a, -3.0);
            for (x, y) in out.iter().zip(&exact) {
                assert!((f64::from(*x) - (1.0 - 3.0 * y)).abs() <= 4.0 * tolerance, "{rows} rows of {n}: {x} {y}");
            }
        }
    }

    #[test]
    fn what_is_not_kept_is_not_read() {
        let mut out = [f32::NAN; 4];
        Symmetric::new(&[2.0, 1.0, 1.0, 3.0]).multiply(&mut out, 0.0, &[1.0, 0.0, 1.0, 1.0], 1.0);
        assert_eq!(out.map(f32::to_bits), [2.0f32, 1.0, 3.0, 4.0].map(f32::to_bits));
    }

    #[test]
    fn bits_of_a_row_depend_on_neither_its_neighbours_nor_threads() {
        let n = 77;
        let (a, packed) = (oracle::random(1, 577 * n), Symmetric::new(&oracle::spd(2, n)));
        let expected = packed.product(&a);
        for row in [0, 5, 6, 300, 576] {
            assert!(packed.product(&a[row * n..][..n]) == expected[row * n..][..n], "{row}");
        }
        for threads in [1, 2, 3] {
            assert!(oracle::with_threads(threads, || packed.product(&a)) == expected, "{threads} threads");
        }
    }

    #[test]
    fn a_matrix_and_its_triangle_are_laid_out_alike() {
        assert!(Symmetric::new(&[]).product(&[]).is_empty());
        for n in [1, 15, 16, 17, 50] {
            let matrix = oracle::spd(3, n);
            let packed = Symmetric::new(&matrix);
            let mut lower = matrix.clone();
            (0..n).for_each(|row| lower[row * n + row + 1..(row + 1) * n].fill(f32::NAN));
            assert_eq!(Symmetric::new(&lower), packed, "what lies above the diagonal is not read");
            let triangle = packed.triangle();
            assert_eq!(triangle, (0..n).flat_map(|row| &matrix[row * n..=row * (n + 1)]).copied().collect::<Vec<_>>());
            assert_eq!(Symmetric::of_triangle(&triangle, n), packed);
            assert!(packed.diagonal().eq((0..n).map(|j| matrix[j * (n + 1)])), "{n}");
            let identity: Vec<f32> = (0..n * n).map(|at| f32::from(u8::from(at / n == at % n))).collect();
            assert_eq!(packed.product(&identity), matrix);
        }
    }

    #[test]
    #[should_panic(expected = "rows of 3 elements")]
    fn half_a_row_is_refused() {
        Symmetric::new(&[0.0; 9]).multiply(&mut [0.0; 4], 0.0, &[0.0; 4], 1.0);
    }
}
