//! One second moment, summed on the host in f64.

use rayon::prelude::*;

use crate::linalg::factor::mirror_upper;
use crate::linalg::gemm::{View, gemm};

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

/// Columns of a panel, which are some tiles': what is packed of the rows of a product serves all of them.
fn panel(columns: usize) -> usize {
    side(columns) * if columns <= 2048 { 3 } else { 2 }
}

fn tiles(columns: usize, symmetric: bool) -> impl Iterator<Item = Tile> {
    let side = side(columns);
    let size = move |start: usize| side.min(columns - start);
    (0..columns)
        .step_by(side)
        .flat_map(move |top| (0..columns).step_by(side).map(move |left| (top, left)))
        .filter(move |(top, left)| !symmetric || left >= top)
        .map(move |(top, left)| Tile { top, left, height: size(top), width: size(left) })
}

/// Inputs of some tokens, cut into panels of columns, one behind the other: so a product reads what lies together. Of 1536
/// columns it takes half the time that it takes where they are.
#[derive(Debug, Default)]
pub(super) struct Panels {
    columns: usize,
    tokens: usize,
    values: Vec<f32>,
}

impl Panels {
    /// Takes other inputs, `[tokens, columns]` row-major.
    pub(super) fn fill(&mut self, rows: &[f32], columns: usize) {
        let tokens = rows.len() / columns.max(1);
        (self.columns, self.tokens) = (columns, tokens);
        self.values.resize(rows.len(), 0.0);
        let most = panel(columns);
        self.values.par_chunks_mut((most * tokens).max(1)).enumerate().for_each(|(at, panel)| {
            let width = panel.len() / tokens;
            for (to, row) in panel.chunks_mut(width).zip(rows.chunks(columns)) {
                to.copy_from_slice(&row[at * most..][..width]);
            }
        });
    }

    /// `[tokens, width]` from a column on, all of one panel.
    fn columns(&self, first: usize, width: usize) -> View<'_> {
        let most = panel(self.columns);
        let panel = first / most * most;
        let stride = most.min(self.columns - panel);
        View::new(&self.values[panel * self.tokens + first - panel..], self.tokens, width, stride)
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

    /// Adds `aᵀb` of the inputs of some tokens; the product is f32.
    pub(super) fn add(&mut self, a: &Panels, b: &Panels) {
        let panel = panel(self.columns);
        let abreast = |(one, _): &(Tile, _), (other, _): &(Tile, _)| {
            (one.top, one.left / panel) == (other.top, other.left / panel)
        };
        let mut tiles = self.tiles_mut();
        let products: Vec<_> = tiles.chunk_by_mut(abreast).collect();
        products.into_par_iter().for_each_init(Vec::new, |product, tiles| {
            let Tile { top, left, height, .. } = tiles[0].0;
            let width = tiles.iter().map(|(tile, _)| tile.width).sum();
            product.resize(height * width, 0.0);
            gemm(product, width, 0.0, a.columns(top, height).transposed(), b.columns(left, width), 1.0);
            for (tile, sum) in tiles {
                for (sums, row) in sum.chunks_mut(tile.width).zip(product.chunks(width)) {
                    let more = &row[tile.left - left..][..tile.width];
                    sums.iter_mut().zip(more).for_each(|(sum, x)| *sum += f64::from(*x));
                }
            }
        });
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
