//! Causal attention of one sequence, in blocks of query rows.

use candle_core::{Result, Tensor};

use super::fused::{Causal, causal_softmax};
use super::rope::{RopeTable, by_group};

/// Query rows of one block (over the heads that share their keys). Scores of a block then stay in the processor's cache, and
/// what lies beyond a block's last token is never computed.
const BLOCK_ROWS: usize = 256;

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
        let block_tokens = (BLOCK_ROWS / rows_per_token).max(1);
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
