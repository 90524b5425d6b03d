//! The attention half of a layer and its gradients. Scores are computed anew on the way back: they are the one thing that
//! grows with the square of the sequence.

use rayon::prelude::*;

use super::linear::{self, Matrix};
use crate::linalg::gemm::{View, gemm};
use crate::model::fused::{Causal, causal_softmax_rows, sum_of};
use crate::model::{Anatomy, HeadNorm, Rotation};

/// Query rows of one block (over the heads that share their keys), as in the forward pass.
const BLOCK_ROWS: usize = 256;
const BLOCK_MULTIPLE: usize = 16;

/// q, k and v as they attend, and what they were before their norms.
struct Projected {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    raw: Option<[Vec<f32>; 2]>,
}

/// W_o·attention(W_q·x, W_k·x, W_v·x) of sequences of `tokens`: `[rows, hidden]` to `[rows, hidden]`.
pub(super) fn output(shape: &Anatomy, tokens: usize, weights: &[Matrix], x: &[f32]) -> Vec<f32> {
    let Projected { q, k, v, .. } = project(shape, weights, x);
    linear::forward(&attend(shape, tokens, &q, &k, &v), &weights[3], bias(shape, 1, 0))
}

/// Gradients of the four weights, given that of the output as a function of the output.
pub(super) fn gradients(
    shape: &Anatomy,
    tokens: usize,
    weights: &[Matrix],
    x: &[f32],
    loss: impl FnOnce(Vec<f32>) -> Vec<f32>,
) -> Vec<Vec<f32>> {
    let Projected { q, k, v, raw } = project(shape, weights, x);
    let attended = attend(shape, tokens, &q, &k, &v);
    let dy = loss(linear::forward(&attended, &weights[3], bias(shape, 1, 0)));
    let of_output = linear::weight_gradient(&dy, &attended, weights[3].rows(), weights[3].columns);
    let [mut dq, mut dk, dv] = attend_backward(shape, tokens, &q, &k, &v, &linear::input_gradient(&dy, &weights[3]));
    rotate(&mut dq, weights[0].rows(), shape, true);
    rotate(&mut dk, weights[1].rows(), shape, true);
    if let (Some([q_norm, k_norm]), Some([q, k])) = (&shape.head_norms, &raw) {
        norm_backward(&mut dq, q, q_norm);
        norm_backward(&mut dk, k, k_norm);
    }
    let of = |weight: &Matrix, dy: &[f32]| linear::weight_gradient(dy, x, weight.rows(), weight.columns);
    vec![of(&weights[0], &dq), of(&weights[1], &dk), of(&weights[2], &dv), of_output]
}

fn bias(shape: &Anatomy, group: usize, member: usize) -> Option<&[f32]> {
    shape.biases[group][member].as_deref()
}

fn project(shape: &Anatomy, weights: &[Matrix], x: &[f32]) -> Projected {
    let project = |member: usize| linear::forward(x, &weights[member], bias(shape, 0, member));
    let (mut q, mut k, v) = (project(0), project(1), project(2));
    let mut raw = None;
    if let Some([q_norm, k_norm]) = &shape.head_norms {
        raw = Some([q.clone(), k.clone()]);
        norm(&mut q, q_norm);
        norm(&mut k, k_norm);
    }
    rotate(&mut q, weights[0].rows(), shape, false);
    rotate(&mut k, weights[1].rows(), shape, false);
    Projected { q, k, v, raw }
}

/// Turns every head of `[rows, width]` by its token's angles, or back.
fn rotate(x: &mut [f32], width: usize, shape: &Anatomy, back: bool) {
    let Some(Rotation { cos, sin }) = &shape.rotation else { return };
    let half = shape.head_dim / 2;
    let tokens = cos.len() / half;
    let sign = if back { -1.0 } else { 1.0 };
    x.par_chunks_mut(width).enumerate().for_each(|(row, x)| {
        let start = row % tokens * half;
        let (cos, sin) = (&cos[start..start + half], &sin[start..start + half]);
        for head in x.chunks_exact_mut(shape.head_dim) {
            let (left, right) = head.split_at_mut(half);
            for ((l, r), (c, s)) in left.iter_mut().zip(right).zip(cos.iter().zip(sin)) {
                (*l, *r) = (*l * c - sign * *r * s, *r * c + sign * *l * s);
            }
        }
    });
}

/// Normalises every head in place.
fn norm(x: &mut [f32], norm: &HeadNorm) {
    x.par_chunks_mut(norm.weight.len()).for_each(|x| {
        let factor = norm_factor(x, norm);
        x.iter_mut().zip(&norm.weight).for_each(|(x, w)| *x *= factor * w);
    });
}

/// Turns gradients after the norm into gradients before it; `x` is what was normalised.
///
/// With f = 1/√(mean(x²) + ε): dx = f·(w∘dy) − x·f³/n·Σ x·w·dy.
fn norm_backward(dy: &mut [f32], x: &[f32], norm: &HeadNorm) {
    let width = norm.weight.len();
    dy.par_chunks_mut(width).zip(x.par_chunks(width)).for_each(|(dy, x)| {
        let factor = norm_factor(x, norm);
        dy.iter_mut().zip(&norm.weight).for_each(|(dy, w)| *dy *= w);
        let dot: f32 = dy.iter().zip(x).map(|(dy, x)| dy * x).sum();
        let pull = dot * factor * factor * factor / width as f32;
        dy.iter_mut().zip(x).for_each(|(dy, x)| *dy = *dy * factor - x * pull);
    });
}

fn norm_factor(x: &[f32], norm: &HeadNorm) -> f32 {
    1.0 / (sum_of(x, |x| x * x) / x.len() as f32 + norm.epsilon).sqrt()
}

/// One sequence and one key head, with the query heads that share it.
struct Part<'a> {
    shape: &'a Anatomy,
    tokens: usize,
    sequence: usize,
    head: usize,
    k: &'a [f32],
    v: &'a [f32],
}

/// Query rows of a part, from one token on, and the keys that they see.
struct Block {
    rows: std::ops::Range<usize>,
    causal: Causal,
    keys: usize,
}

impl<'a> Part<'a> {
    /// All parts, sequence by sequence.
    fn all(shape: &'a Anatomy, tokens: usize, k: &'a [f32], v: &'a [f32]) -> impl IndexedParallelIterator<Item = Self> {
        let sequences = k.len() / (tokens * shape.kv_heads * shape.head_dim);
        let part = move |index: usize| {
            let (sequence, head) = (index / shape.kv_heads, index % shape.kv_heads);
            Self { shape, tokens, sequence, head, k, v }
        };
        (0..sequences * shape.kv_heads).into_par_iter().map(part)
    }

    fn shared(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    fn scale(&self) -> f32 {
        1.0 / (self.shape.head_dim as f32).sqrt()
    }

    /// This part of `[rows, heads · head_dim]`, as `[tokens · shared, head_dim]`.
    fn queries(&self, x: &[f32]) -> Vec<f32> {
        let (part, row) = (self.shared() * self.shape.head_dim, self.shape.heads * self.shape.head_dim);
        let sequence = &x[self.sequence * self.tokens * row..][..self.tokens * row];
        sequence.chunks_exact(row).flat_map(|x| &x[self.head * part..][..part]).copied().collect()
    }

    /// The keys or values from `first` on.
    fn seen<'b>(&self, x: &'b [f32], first: usize, count: usize) -> View<'b> {
        let (width, row) = (self.shape.head_dim, self.shape.kv_heads * self.shape.head_dim);
        let start = (self.sequence * self.tokens + first) * row + self.head * width;
        View::new(&x[start..], count, width, row)
    }

    fn blocks(&self) -> impl Iterator<Item = Block> {
        let (shared, tokens, window) = (self.shared(), self.tokens, self.shape.window);
        let step = (BLOCK_ROWS / shared).max(1).next_multiple_of(BLOCK_MULTIPLE);
        (0..tokens).step_by(step).map(move |first_token| {
            let count = step.min(tokens - first_token);
            let first_key = window.map_or(0, |window| (first_token + 1).saturating_sub(window));
            Block {
                rows: first_token * shared..(first_token + count) * shared,
                causal: Causal { first_token, rows_per_token: shared, first_key, window },
                keys: first_token + count - first_key,
            }
        })
    }

    /// Rows of `x [.., head_dim]`.
    fn rows<'b>(&self, x: &'b [f32], rows: &std::ops::Range<usize>) -> View<'b> {
        let width = self.shape.head_dim;
        View::new(&x[rows.start * width..], rows.len(), width, width)
    }

    /// Attention weights `[rows, keys]` of a block.
    fn weights(&self, q: &[f32], block: &Block) -> Vec<f32> {
        let mut scores = vec![0.0; block.rows.len() * block.keys];
        let keys = self.seen(self.k, block.causal.first_key, block.keys);
        gemm(&mut scores, block.keys, 0.0, self.rows(q, &block.rows), keys.transposed(), 1.0);
        causal_softmax_rows(&mut scores, block.keys, block.causal, self.scale());
        scores
    }

    fn forward(&self, q: &[f32]) -> Vec<f32> {
        let width = self.shape.head_dim;
        let q = self.queries(q);
        let mut out = vec![0.0; q.len()];
        for block in self.blocks() {
            let weights = self.weights(&q, &block);
            let left = View::new(&weights, block.rows.len(), block.keys, block.keys);
            let values = self.seen(self.v, block.causal.first_key, block.keys);
            gemm(&mut out[block.rows.start * width..], width, 0.0, left, values, 1.0);
        }
        out
    }

    /// Gradients of this part's q, k and v.
    ///
    /// With P the attention weights and O = P·V: dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P∘(dP − rowsum(P∘dP))/√d, dQ = dS·K, dK = dSᵀ·Q.
    fn backward(&self, q: &[f32], out: &[f32]) -> [Vec<f32>; 3] {
        let width = self.shape.head_dim;
        let (q, out) = (self.queries(q), self.queries(out));
        let mut dq = vec![0.0; q.len()];
        let mut dk = vec![0.0; self.tokens * width];
        let mut dv = dk.clone();
        for block in self.blocks() {
            let (first, keys) = (block.causal.first_key, block.keys);
            let weights = self.weights(&q, &block);
            let (q_rows, out_rows) = (self.rows(&q, &block.rows), self.rows(&out, &block.rows));
            let view = |values| View::new(values, block.rows.len(), keys, keys);
            gemm(&mut dv[first * width..], width, 1.0, view(&weights).transposed(), out_rows, 1.0);
            let mut scores = vec![0.0; weights.len()];
            gemm(&mut scores, keys, 0.0, out_rows, self.seen(self.v, first, keys).transposed(), 1.0);
            for (dp, p) in scores.chunks_exact_mut(keys).zip(weights.chunks_exact(keys)) {
                let mean: f32 = dot(p, dp);
                dp.iter_mut().zip(p).for_each(|(dp, p)| *dp = p * (*dp - mean) * self.scale());
            }
            gemm(&mut dq[block.rows.start * width..], width, 0.0, view(&scores), self.seen(self.k, first, keys), 1.0);
            gemm(&mut dk[first * width..], width, 1.0, view(&scores).transposed(), q_rows, 1.0);
        }
        [dq, dk, dv]
    }
}

/// Σ a·b, sixteen lanes at a time.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0f32; 16];
    for (a, b) in a.chunks(16).zip(b.chunks(16)) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += a * b;
        }
    }
    lanes.iter().sum()
}

fn attend(shape: &Anatomy, tokens: usize, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
    let parts: Vec<Vec<f32>> = Part::all(shape, tokens, k, v).map(|part| part.forward(q)).collect();
    join(&parts, shape.kv_heads, tokens)
}

fn attend_backward(shape: &Anatomy, tokens: usize, q: &[f32], k: &[f32], v: &[f32], out: &[f32]) -> [Vec<f32>; 3] {
    let parts: Vec<[Vec<f32>; 3]> = Part::all(shape, tokens, k, v).map(|part| part.backward(q, out)).collect();
    [0, 1, 2].map(|which| {
        let parts: Vec<&[f32]> = parts.iter().map(|part| part[which].as_slice()).collect();
        join(&parts, shape.kv_heads, tokens)
    })
}

/// Puts the parts of each sequence, `[tokens, width]` each, side by side again.
fn join<P: AsRef<[f32]>>(parts: &[P], heads: usize, tokens: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(parts.iter().map(|part| part.as_ref().len()).sum());
    for sequence in parts.chunks_exact(heads) {
        let width = sequence[0].as_ref().len() / tokens;
        for token in 0..tokens {
            sequence.iter().for_each(|part| out.extend_from_slice(&part.as_ref()[token * width..][..width]));
        }
    }
    out
}
