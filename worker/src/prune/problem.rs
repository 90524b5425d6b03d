//! What a solver is given and what it gives back.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::{Device, Tensor};
use espalier_common::pattern::Pattern;

use super::SolveError;

/// How much must be known of a group's inputs. Each level includes the ones before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Statistics {
    /// Nothing: weights only.
    Nothing,
    /// ‖X̂_j‖² of each input channel.
    Norms,
    /// X̂ᵀX̂.
    Gram,
    /// X̂ᵀX̂, X̂ᵀX and XᵀX: dense against corrected inputs.
    GramAndCross,
}

/// Second moments of a group's inputs over calibration tokens: X dense, X̂ corrected inputs `[tokens, in]`.
///
/// Whatever a method needs, the report needs the gram to measure errors with; so `gram` is always there, and a method that
/// asks for less just does not look at it.
#[derive(Debug, Clone)]
pub struct InputStats {
    /// X̂ᵀX̂ / tokens, `[in, in]` f32, symmetric.
    pub gram: Tensor,
    /// The statistics of dense against corrected inputs; `None` when X̂ = X is assumed (targets are W·X̂).
    pub dense: Option<DenseStats>,
    /// Number of calibration tokens.
    pub tokens: usize,
    /// The same over the held-out tokens, if any were held out.
    pub held_out: Option<Arc<InputStats>>,
}

impl InputStats {
    /// The same where a device can multiply by them; what was held out of these stays behind.
    ///
    /// # Errors
    /// What the tensor backend says.
    pub fn to_device(&self, device: &Device) -> candle_core::Result<Self> {
        let moved = |dense: &DenseStats| -> candle_core::Result<DenseStats> {
            Ok(DenseStats { cross: dense.cross.to_device(device)?, gram: dense.gram.to_device(device)? })
        };
        let dense = self.dense.as_ref().map(moved).transpose()?;
        Ok(Self { gram: self.gram.to_device(device)?, dense, tokens: self.tokens, held_out: None })
    }
}

/// The dense side of [`InputStats`].
#[derive(Debug, Clone)]
pub struct DenseStats {
    /// X̂ᵀX / tokens, `[in, in]` f32.
    pub cross: Tensor,
    /// XᵀX / tokens, `[in, in]` f32.
    pub gram: Tensor,
}

/// One sublayer to prune.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    /// Full tensor name, for messages and seeds.
    pub tensor: &'a str,
    /// Dense weight `[out, in]`, f32.
    pub weight: &'a Tensor,
    /// The zeros it must get.
    pub pattern: Pattern,
    /// With [`Pattern::Imported`]: the matrix `[out, in]`, f32, that has them.
    pub imported: Option<&'a Tensor>,
}

/// Rows of a sublayer that are solved apart from the others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowBlock {
    /// The first row.
    pub first: usize,
    /// How many.
    pub rows: usize,
    /// Weights of the block that must become zero.
    pub zeros: usize,
}

impl RowBlock {
    /// All rows of a problem, with all of its zeros.
    ///
    /// # Errors
    /// If the weight is no matrix.
    pub fn whole(problem: &Problem<'_>) -> candle_core::Result<Self> {
        let (rows, columns) = problem.weight.dims2()?;
        Ok(Self { first: 0, rows, zeros: problem.pattern.zeros(rows, columns) })
    }

    /// Blocks of `height` rows, and one of what is left; each with the zeros of its own share.
    ///
    /// # Errors
    /// If the weight is no matrix.
    pub fn each(problem: &Problem<'_>, height: usize) -> Result<Vec<Self>, SolveError> {
        let (rows, columns) = problem.weight.dims2()?;
        let block = |first: usize| {
            let end = (first + height).min(rows);
            Self { first, rows: end - first, zeros: problem.pattern.zeros_in_part(first, end, columns) }
        };
        Ok((0..rows).step_by(height.max(1)).map(block).collect())
    }
}

impl Problem<'_> {
    /// Hands the rows of one block to `solve`, as a problem of their own, with the zeros they must get.
    ///
    /// # Errors
    /// What `solve` says, and `Backend` if the block has rows that the weight does not.
    pub fn solve_rows(
        &self,
        block: &RowBlock,
        solve: impl FnOnce(&Problem<'_>, usize) -> Result<Solution, SolveError>,
    ) -> Result<Solution, SolveError> {
        let of = |matrix: &Tensor| matrix.narrow(0, block.first, block.rows);
        let (weight, imported) = (of(self.weight)?, self.imported.map(of).transpose()?);
        solve(&Problem { weight: &weight, imported: imported.as_ref(), ..*self }, block.zeros)
    }
}

/// A pruned sublayer, or some rows of one.
#[derive(Debug, Clone)]
pub struct Solution {
    /// `[out, in]`, f32, obeying the pattern exactly.
    pub weight: Tensor,
    /// Iterations of the method's main loop; 1 for one-shot methods.
    pub iterations: u32,
    /// Share of the mean diagonal that was added to the gram.
    pub damping: f64,
    /// How often damping had to be raised.
    pub damping_raised: u32,
    /// Input channels that were never active (zero on the gram's diagonal).
    pub dead_channels: u32,
    /// The target blend that was taken, if one was asked for: it is less if that is better on held-out inputs.
    pub alpha: Option<f64>,
    /// Floating-point operations of the matrix products and factorisations (shared ones are counted by the first user).
    pub flops: f64,
}

impl Solution {
    /// Puts the solutions of consecutive blocks of rows together. Iterations are those of the block that took most, α is the mean
    /// over rows.
    ///
    /// # Errors
    /// `Backend` if there is no block, or blocks are not of one width.
    pub fn joined(mut blocks: Vec<Self>) -> Result<Self, SolveError> {
        if blocks.len() == 1 {
            return Ok(blocks.remove(0));
        }
        let weights: Vec<&Tensor> = blocks.iter().map(|block| &block.weight).collect();
        let weight = Tensor::cat(&weights, 0)?;
        let iterations = blocks.iter().map(|block| block.iterations).max().unwrap_or(0);
        let flops = blocks.iter().map(|block| block.flops).sum();
        let alphas = blocks.iter().map(|block| Some(block.alpha? * block.weight.dim(0).ok()? as f64));
        let alpha = alphas.sum::<Option<f64>>().map(|sum| sum / weight.dim(0).map_or(1.0, |rows| rows as f64));
        let first = blocks.swap_remove(0);
        Ok(Self { weight, iterations, alpha, flops, ..first })
    }
}

/// What a solver may know of its surroundings: a cancellation flag, and nothing that changes its result.
#[derive(Debug, Clone, Default)]
pub struct SolveCtx {
    cancelled: Arc<AtomicBool>,
}

impl SolveCtx {
    /// A context that is cancelled when `flag` is set.
    pub fn new(flag: Arc<AtomicBool>) -> Self {
        Self { cancelled: flag }
    }

    /// Called once per block or iteration.
    ///
    /// # Errors
    /// `Cancelled`.
    pub fn check_cancelled(&self) -> Result<(), SolveError> {
        if self.cancelled.load(Ordering::Relaxed) { Err(SolveError::Cancelled) } else { Ok(()) }
    }
}
