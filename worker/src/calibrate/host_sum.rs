//! One second moment, summed on the host in f64.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::linalg::factor::mirror_upper;
use crate::linalg::kernel::{self, LINE, Lines, TILE_ROWS, tile};

/// Numbers that a thread adds at a time.
const CHUNK: usize = 1 << 15;

/// `Σ aᵀb`, cut into square tiles that lie one behind the other, each row by row; of a symmetric sum only those on and above the
/// diagonal. So it is a stretch of numbers to whoever sends or adds it.
#[derive(Debug, Clone)]
pub(super) struct HostSum {
    columns: usize,
    symmetric: bool,
    values: Vec<f64>,
}

/// Where a tile is in the matrix.
#[derive(Debug, Clone, Copy)]
struct Tile {
    top: usize,
    left: usize,
    height: usize,
    width: usize,
}

/// Rows and columns of a tile: small ones waste less work on the diagonal, and of narrow inputs they stay in the cache.
fn side(columns: usize) -> usize {
    if columns <= 2048 { 48 } else { 96 }
}

/// Columns of a sum that a thread takes at a time, a multiple of as many before them: some tiles, and some of the kernel's. Of a
/// symmetric sum those left of the diagonal are left out.
const ABREAST: usize = 96;

fn tiles(columns: usize, symmetric: bool) -> impl Iterator<Item = Tile> {
    let side = side(columns);
    let size = move |start: usize| side.min(columns - start);
    (0..columns)
        .step_by(side)
        .flat_map(move |top| (0..columns).step_by(side).map(move |left| (top, left)))
        .filter(move |(top, left)| !symmetric || left >= top)
        .map(move |(top, left)| Tile { top, left, height: size(top), width: size(left) })
}

/// Inputs of some tokens, cut into strips of columns as the kernel reads them: of as many as its tiles have rows, and again of as
/// many as they have columns. Strips lie one behind the other, each token by token, and the last is filled up with zeros.
#[derive(Debug, Default)]
pub(super) struct Strips {
    tokens: usize,
    left: Vec<f32>,
    right: Lines,
}

impl Strips {
    /// Takes other inputs, `[tokens, columns]` row-major.
    pub(super) fn fill(&mut self, rows: &[f32], columns: usize) {
        self.tokens = rows.len() / columns.max(1);
        let length = |width: usize| columns.next_multiple_of(width) * self.tokens;
        let [left, right] = [TILE_ROWS, kernel::tile_columns()].map(length);
        self.left.resize(left, 0.0);
        if self.right.get().len() != right {
            self.right = Lines::zeros(right);
        }
        cut(&mut self.left, TILE_ROWS, rows, columns);
        cut(self.right.get_mut(), kernel::tile_columns(), rows, columns);
    }
}

fn cut(strips: &mut [f32], width: usize, rows: &[f32], columns: usize) {
    let tokens = rows.len() / columns.max(1);
    strips.par_chunks_mut((width * tokens).max(1)).enumerate().for_each(|(index, strip)| {
        let first = index * width;
        let known = width.min(columns - first);
        for (to, row) in strip.chunks_exact_mut(width).zip(rows.chunks_exact(columns)) {
            to[..known].copy_from_slice(&row[first..first + known]);
            to[known..].fill(0.0);
        }
    });
}

/// Adds products of strips to tiles that lie abreast.
struct AddAbreast<'a, 'b> {
    tiles: &'a mut [(Tile, &'b mut [f64])],
    left: &'a Strips,
    right: &'a Strips,
}

impl WithSimd for AddAbreast<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { tiles, left, right } = self;
        let (Some((first, _)), Some((last, _))) = (tiles.first(), tiles.last()) else { return };
        let (columns, width) = (first.left..last.left + last.width, kernel::columns_of::<S>());
        let rows = first.top..first.top + first.height;
        let (left_strips, right_strips) = (TILE_ROWS * left.tokens, width * right.tokens);
        let all = right.right.get();
        let share = right_strips.div_ceil(rows.len().div_ceil(TILE_ROWS)).max(1).next_multiple_of(LINE);
        for strip in columns.start / width..columns.end.div_ceil(width) {
            let from = strip * width;
            // What comes after this strip is what is needed next.
            let (strip, rest) = all[strip * right_strips..].split_at(right_strips);
            let mut ahead = rest.chunks(share);
            for top in rows.clone().step_by(TILE_ROWS) {
                let left = &left.left[top / TILE_ROWS * left_strips..][..left_strips];
                let sums = tile(simd, left, strip, ahead.next().unwrap_or_default());
                for (row, sums) in (top - rows.start..rows.len()).zip(&sums) {
                    let sums: &[f32] = bytemuck::cast_slice(sums);
                    for (tile, values) in tiles.iter_mut() {
                        let (start, end) = (from.max(tile.left), (from + width).min(tile.left + tile.width));
                        if start < end {
                            let values = &mut values[row * tile.width + start - tile.left..][..end - start];
                            let more = &sums[start - from..end - from];
                            values.iter_mut().zip(more).for_each(|(value, more)| *value += f64::from(*more));
                        }
                    }
                }
            }
        }
    }
}

impl HostSum {
    /// How many numbers one is.
    pub(super) fn length(columns: usize, symmetric: bool) -> usize {
        tiles(columns, symmetric).map(|tile| tile.height * tile.width).sum()
    }

    pub(super) fn new(columns: usize, symmetric: bool) -> Self {
        Self { columns, symmetric, values: vec![0.0; Self::length(columns, symmetric)] }
    }

    /// One that is so many numbers, as [`Self::values`] has them.
    pub(super) fn from_values(columns: usize, symmetric: bool, values: Vec<f64>) -> Self {
        debug_assert_eq!(values.len(), Self::length(columns, symmetric));
        Self { columns, symmetric, values }
    }

    pub(super) fn values(&self) -> &[f64] {
        &self.values
    }

    pub(super) fn into_values(self) -> Vec<f64> {
        self.values
    }

    fn tiles_mut(&mut self) -> Vec<(Tile, &mut [f64])> {
        let mut rest = &mut self.values[..];
        let cut = |tile: Tile| {
            let (here, others) = std::mem::take(&mut rest).split_at_mut(tile.height * tile.width);
            rest = others;
            (tile, here)
        };
        tiles(self.columns, self.symmetric).map(cut).collect()
    }

    /// Adds `aᵀb` of the inputs of some tokens, each product f32 in the order of the tokens.
    pub(super) fn add(&mut self, a: &Strips, b: &Strips) {
        let abreast = |(one, _): &(Tile, _), (other, _): &(Tile, _)| {
            (one.top, one.left / ABREAST) == (other.top, other.left / ABREAST)
        };
        let mut tiles = self.tiles_mut();
        let together: Vec<_> = tiles.chunk_by_mut(abreast).collect();
        together.into_par_iter().for_each(|tiles| Arch::new().dispatch(AddAbreast { tiles, left: a, right: b }));
    }

    /// Adds a whole matrix, row-major.
    pub(super) fn add_matrix(&mut self, matrix: &[f64]) {
        let n = self.columns;
        self.tiles_mut().into_par_iter().for_each(|(tile, sum)| {
            for (i, row) in sum.chunks_mut(tile.width).enumerate() {
                let more = &matrix[(tile.top + i) * n + tile.left..][..tile.width];
                row.iter_mut().zip(more).for_each(|(sum, x)| *sum += x);
            }
        });
    }

    /// Adds the numbers of another sum of this shape. Which of two is added to which makes no difference to the bits.
    pub(super) fn merge(&mut self, more: &[f64]) {
        self.values.par_chunks_mut(CHUNK).zip(more.par_chunks(CHUNK)).for_each(|(sum, more)| {
            sum.iter_mut().zip(more).for_each(|(sum, x)| *sum += x);
        });
    }

    /// The mean over `tokens`, the whole matrix row-major.
    pub(super) fn mean(&self, tokens: usize) -> Vec<f32> {
        let n = self.columns;
        let mut out = vec![0.0; n * n];
        let mut rest = &self.values[..];
        let cut = |tile: Tile| {
            let (here, others) = rest.split_at(tile.height * tile.width);
            rest = others;
            (tile, here)
        };
        let tiles: Vec<(Tile, &[f64])> = tiles(n, self.symmetric).map(cut).collect();
        let side = tiles.first().map_or(1, |(tile, _)| tile.height);
        let bands: Vec<&[(Tile, &[f64])]> = tiles.chunk_by(|(one, _), (other, _)| one.top == other.top).collect();
        out.par_chunks_mut((side * n).max(1)).zip(bands).for_each(|(band, tiles)| {
            for (tile, sums) in tiles {
                for (row, sums) in band.chunks_mut(n).zip(sums.chunks(tile.width)) {
                    let means = row[tile.left..][..tile.width].iter_mut();
                    means.zip(sums).for_each(|(mean, sum)| *mean = (sum / tokens as f64) as f32);
                }
            }
        });
        if self.symmetric {
            mirror_upper(&mut out, n);
        }
        out
    }
}
