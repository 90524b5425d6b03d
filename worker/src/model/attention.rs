//! Causal attention of one sequence, in blocks of query rows.

use candle_core::{Result, Tensor};

use super::fused::{Causal, causal_softmax};
use super::rope::{RopeTable, by_group};

/// Query rows of one block (over the heads that share their keys). Scores of a block then stay in the processor's cache, and
/// what lies beyond a block's last token is never computed.
const BLOCK_ROWS: usize = 256;

/// Tokens of one block are a multiple of this, which is what matrix products are fastest at.
const BLOCK_MULTIPLE: usize = 16;

/// Heads and their widths.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attention {
    /// Query heads.
    pub(super) heads: usize,
    /// Key and value heads; query heads `i·heads/kv_heads ..` share head `i`.
    pub(super) kv_heads: usize,
    /// Width of a head.
    pub(super) head_dim: usize,
    /// Number of keys a token sees, itself included.
    pub(super) window: Option<usize>,
}

impl Attention {
    /// softmax(q·kᵀ / √head_dim)·v for `q` `[tokens, heads · head_dim]` and `k`, `v` `[tokens, kv_heads · head_dim]`; the result
    /// has the shape of `q`. Exact: every row sees all its scores at once.
    pub(super) fn forward(&self, q: &Tensor, k: &Tensor, v: &Tensor, table: Option<&RopeTable>) -> Result<Tensor> {
        let Self { heads, kv_heads, head_dim, window } = *self;
        let tokens = q.dim(0)?;
        let rows_per_token = heads / kv_heads;
        let q = by_group(q, kv_heads, head_dim, table)?;
        let k = by_group(k, kv_heads, head_dim, table)?;
        let v = by_group(v, kv_heads, head_dim, None)?;
        let scale = 1.0 / (head_dim as f32).sqrt();
        let block_tokens = (BLOCK_ROWS / rows_per_token).max(1).next_multiple_of(BLOCK_MULTIPLE);
        let mut blocks = Vec::with_capacity(tokens.div_ceil(block_tokens));
        for first_token in (0..tokens).step_by(block_tokens) {
            let count = block_tokens.min(tokens - first_token);
            let first_key = window.map_or(0, |window| (first_token + 1).saturating_sub(window));
            let keys = first_token + count - first_key;
            let causal = Causal { first_token, rows_per_token, first_key, window };
            let mut groups = Vec::with_capacity(kv_heads);
            for group in 0..kv_heads {
                let q = q.get(group)?.narrow(0, first_token * rows_per_token, count * rows_per_token)?;
                let k = k.get(group)?.narrow(0, first_key, keys)?;
                let v = v.get(group)?.narrow(0, first_key, keys)?;
                let weights = causal_softmax(q.matmul(&k.t()?)?, causal, scale)?;
                groups.push(weights.matmul(&v)?.reshape((count, rows_per_token * head_dim))?);
            }
            blocks.push(Tensor::cat(&groups, 1)?);
        }
        Tensor::cat(&blocks, 0)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    fn noise(seed: f32, rows: usize, columns: usize) -> Vec<Vec<f32>> {
        let value = |i: usize| ((i as f32 + seed) * 0.731).sin() * 2.0;
        (0..rows).map(|row| (0..columns).map(|column| value(row * columns + column)).collect()).collect()
    }

    /// The definition, in f64, one output at a time.
    fn oracle(shape: Attention, q: &[Vec<f32>], k: &[Vec<f32>], v: &[Vec<f32>]) -> Vec<f64> {
        let mut out = Vec::new();
        for (token, q) in q.iter().enumerate() {
            for (head, q) in q.chunks(shape.head_dim).enumerate() {
                let start = head / (shape.heads / shape.kv_heads) * shape.head_dim;
                let seen = shape.window.map_or(0, |window| (token + 1).saturating_sub(window))..=token;
                let score = |key: usize| {
                    let dot: f64 = q.iter().zip(&k[key][start..]).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                    (dot / (shape.head_dim as f64).sqrt()).exp()
                };
                let scores: Vec<(usize, f64)> = seen.map(|key| (key, score(key))).collect();
                let sum: f64 = scores.iter().map(|(_, score)| score).sum();
                out.extend((start..start + shape.head_dim).map(|channel| {
                    scores.iter().map(|(key, score)| score / sum * f64::from(v[*key][channel])).sum::<f64>()
                }));
            }
        }
        out
    }

    #[test]
    fn blocks_of_rows_agree_with_the_definition() {
        for (heads, kv_heads, window, tokens) in
            [(4, 2, None, 300), (2, 2, None, 257), (6, 2, Some(40), 200), (3, 1, Some(500), 90), (2, 1, None, 1)]
        {
            let shape = Attention { heads, kv_heads, head_dim: 5, window };
            let (q, k, v) =
                (noise(0.0, tokens, heads * 5), noise(7.0, tokens, kv_heads * 5), noise(9.0, tokens, kv_heads * 5));
            let tensor = |rows: &[Vec<f32>]| Tensor::new(rows.to_vec(), &Device::Cpu).unwrap();
            let ours = shape.forward(&tensor(&q), &tensor(&k), &tensor(&v), None).unwrap();
            let ours = ours.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let exact = oracle(shape, &q, &k, &v);
            assert_eq!(ours.len(), exact.len());
            let worst = ours.iter().zip(&exact).fold(0.0, |max: f64, (a, b)| max.max((f64::from(*a) - b).abs()));
            assert!(worst < 1e-5, "{shape:?}, {tokens} tokens: {worst:e}");
        }
    }
}
