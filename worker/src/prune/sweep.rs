//! A block of columns of SparseGPT's sweep, rows side by side in vectors.
//!
//! Source: SparseGPT (arXiv 2301.00774), algorithm 1, the loop inside a block.
//! Deviation: a column takes what all columns before it in the block owe it at once, when its turn comes, instead of passing
//! its own error on to every column behind it. The sums are the same; they stay in registers, and rows are independent.

use std::ops::Range;

use crate::linalg::lanes::{Lanes, in_lanes};
use crate::linalg::select;

/// Rows side by side.
const LANES: usize = 32;
/// Columns that read the errors before them together.
const TOGETHER: usize = 4;

/// One column of some rows.
type Column = [f32; LANES];

/// A block of columns and what its sweep needs of the factor U.
pub(super) struct Span {
    columns: Range<usize>,
    n: usize,
    /// `U[j, c]` for columns j and c of the block, c by c.
    factors: Vec<f32>,
    /// See `Compensation::costs`.
    costs: Vec<f32>,
    /// N and M, if N of every M columns stay and the sweep is to choose them.
    group: Option<(usize, usize)>,
}

impl Span {
    /// The block `columns` of the upper triangular `upper [n, n]`.
    pub(super) fn new(
        upper: &[f32],
        n: usize,
        columns: Range<usize>,
        costs: Vec<f32>,
        group: Option<(usize, usize)>,
    ) -> Self {
        let factors = columns.clone().flat_map(|c| columns.clone().map(move |j| upper[j * n + c])).collect();
        Self { columns, n, factors, costs, group }
    }

    /// Carries `weight [rows, n]` through the block, choosing what stays where that is left to it. Returns the errors
    /// `[rows, width]` that the columns after the block have to make up for.
    pub(super) fn sweep(&self, weight: &mut [f32], keep: &mut [u8]) -> Vec<f32> {
        let width = self.columns.len();
        let mut errors = vec![0.0; weight.len() / self.n * width];
        let mut strip = Strip::new(width);
        let rows = weight.chunks_mut(self.n * LANES).zip(keep.chunks_mut(self.n * LANES));
        for ((weight, keep), errors) in rows.zip(errors.chunks_mut(width * LANES)) {
            strip.load(weight, keep, self);
            in_lanes(Sweep { strip: &mut strip, span: self });
            strip.store(weight, keep, errors, self);
        }
        errors
    }

    /// `U[.., c]` of the block.
    #[inline(always)]
    fn factors_of(&self, c: usize) -> &[f32] {
        let width = self.columns.len();
        &self.factors[c * width..][..width]
    }
}

/// A strip on its way through a block.
struct Sweep<'a> {
    strip: &'a mut Strip,
    span: &'a Span,
}

impl Lanes for Sweep<'_> {
    type Output = ();

    #[inline(always)]
    fn run(self) {
        self.strip.run(self.span);
    }
}

/// As many rows as there are lanes, transposed. Lanes without a row hold zeros that are kept.
struct Strip {
    weight: Vec<Column>,
    errors: Vec<Column>,
    keep: Vec<[u8; LANES]>,
    /// Scores and choices of one group of each lane.
    scores: Vec<f32>,
    chosen: Vec<u8>,
}

impl Strip {
    fn new(width: usize) -> Self {
        Self {
            weight: vec![[0.0; LANES]; width],
            errors: vec![[0.0; LANES]; width],
            keep: vec![[1; LANES]; width],
            scores: Vec::new(),
            chosen: Vec::new(),
        }
    }

    fn load(&mut self, weight: &[f32], keep: &[u8], span: &Span) {
        if weight.len() < span.n * LANES {
            self.weight.fill([0.0; LANES]);
            self.keep.fill([1; LANES]);
        }
        for (lane, (weight, keep)) in weight.chunks(span.n).zip(keep.chunks(span.n)).enumerate() {
            let row = weight[span.columns.clone()].iter().zip(&keep[span.columns.clone()]);
            for ((column, kept), (w, k)) in self.weight.iter_mut().zip(&mut self.keep).zip(row) {
                (column[lane], kept[lane]) = (*w, *k);
            }
        }
    }

    fn store(&self, weight: &mut [f32], keep: &mut [u8], errors: &mut [f32], span: &Span) {
        let rows = weight.chunks_mut(span.n).zip(keep.chunks_mut(span.n)).zip(errors.chunks_mut(span.columns.len()));
        for (lane, ((weight, keep), errors)) in rows.enumerate() {
            let row = weight[span.columns.clone()].iter_mut().zip(&mut keep[span.columns.clone()]).zip(errors);
            for (((w, k), e), c) in row.zip(0..) {
                (*w, *k, *e) = (self.weight[c][lane], self.keep[c][lane], self.errors[c][lane]);
            }
        }
    }

    #[inline(always)]
    fn run(&mut self, span: &Span) {
        let width = span.columns.len();
        let step = span.group.map_or(TOGETHER, |(_, of)| of);
        for first in (0..width).step_by(step) {
            let end = (first + step).min(width);
            self.collect(span, first..end);
            if let Some((kept, of)) = span.group {
                self.choose(&span.costs[first..end], first, kept, of);
            }
            for c in first..end {
                let factors = span.factors_of(c);
                let mut column = self.weight[c];
                for (error, factor) in self.errors[first..c].iter().zip(&factors[first..c]) {
                    owe(&mut column, error, *factor);
                }
                let (error, kept) = (&mut self.errors[c], &self.keep[c]);
                for lane in 0..LANES {
                    let stays = kept[lane] == 1;
                    error[lane] = if stays { 0.0 } else { column[lane] / factors[c] };
                    column[lane] = if stays { column[lane] } else { 0.0 };
                }
                self.weight[c] = column;
            }
        }
    }

    /// Takes from some columns what all columns before the first of them owe.
    #[inline(always)]
    fn collect(&mut self, span: &Span, columns: Range<usize>) {
        let earlier = &self.errors[..columns.start];
        let mut at = columns.start;
        while at + TOGETHER <= columns.end {
            let mut sums: [Column; TOGETHER] = std::array::from_fn(|k| self.weight[at + k]);
            let factors: [&[f32]; TOGETHER] = std::array::from_fn(|k| &span.factors_of(at + k)[..earlier.len()]);
            for (j, error) in earlier.iter().enumerate() {
                for k in 0..TOGETHER {
                    owe(&mut sums[k], error, factors[k][j]);
                }
            }
            self.weight[at..at + TOGETHER].copy_from_slice(&sums);
            at += TOGETHER;
        }
        for c in at..columns.end {
            let mut sum = self.weight[c];
            for (error, factor) in earlier.iter().zip(span.factors_of(c)) {
                owe(&mut sum, error, *factor);
            }
            self.weight[c] = sum;
        }
    }

    /// Chooses `kept` of the `of` columns from `first` on, in each lane.
    #[inline(always)]
    fn choose(&mut self, costs: &[f32], first: usize, kept: usize, of: usize) {
        self.scores.resize(LANES * of, 0.0);
        self.chosen.resize(LANES * of, 0);
        for (k, cost) in costs.iter().enumerate() {
            for lane in 0..LANES {
                self.scores[lane * of + k] = self.weight[first + k][lane].abs() / cost;
            }
        }
        select::keep_n_of_groups(&self.scores, kept, of, &mut self.chosen);
        for k in 0..of {
            for lane in 0..LANES {
                self.keep[first + k][lane] = self.chosen[lane * of + k];
            }
        }
    }
}

/// `column ← column − error·factor`.
#[inline(always)]
fn owe(column: &mut Column, error: &Column, factor: f32) {
    for lane in 0..LANES {
        column[lane] -= error[lane] * factor;
    }
}
