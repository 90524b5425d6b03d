//! Structured methods: whole attention heads and feed-forward channels go, and the model gets smaller.
//!
//! A layer has two coupled pairs: the rows of q, k, v with the columns of o, and the rows of gate and up (fc1) with the
//! columns of down (fc2). Removing a block of the consumer's columns makes the producers' rows useless, so a method looks
//! at the consumer alone: which blocks of its input go, and what the columns that stay become.
//!
//! All methods share [`Quadratic`], the error of the consumer's output in f64, and the closed-form restoration in it; they
//! differ in how they choose.

pub mod columns;
mod consumer;
pub mod fasp;
mod group_obs;
mod quadratic;
pub mod slimgpt;
pub mod spap;

use candle_core::Tensor;

use super::{InputStats, SolveCtx, SolveError};
pub use quadratic::Quadratic;

/// A method that removes blocks of a consumer's input.
pub trait StructuredSolver: Send + Sync {
    /// Whether it also removes attention heads; if not, the feed-forward channels carry the whole budget.
    fn cuts_attention(&self) -> bool;
    /// How the rows of feed-forward producers that stay are updated with the consumer, if they are.
    fn sweeps(&self) -> Option<Sweeps> {
        None
    }
    /// Chooses the blocks that go, and what the weight on the others becomes.
    ///
    /// # Errors
    /// See [`SolveError`].
    fn solve(&self, problem: &PairProblem<'_>, ctx: &SolveCtx) -> Result<PairSolution, SolveError>;
}

/// How producer and consumer of a feed-forward pair are updated in turn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sweeps {
    /// Turns at most.
    pub most: u32,
    /// What holds the auxiliary hidden states to those that the producers give, as a share of the consumer's mean curvature.
    pub tie: f64,
    /// Share of a gram's mean diagonal that is added to it.
    pub damping: f64,
}

/// The consumer of one coupled pair.
#[derive(Debug, Clone, Copy)]
pub struct PairProblem<'a> {
    /// Full tensor name, for messages.
    pub tensor: &'a str,
    /// Dense weight `[out, in]`, f32.
    pub weight: &'a Tensor,
    /// Its bias `[out]`, if it has one; the statistics then have a constant 1 as their last input, so that the bias is fitted
    /// with the weight.
    pub bias: Option<&'a Tensor>,
    /// Statistics of its inputs, `in` wide, or `in + 1` with a bias.
    pub stats: &'a InputStats,
    /// Consecutive inputs that go or stay together: the query heads of one KV head, say, or 1.
    pub block: usize,
    /// The blocks are so many runs of equal length, and each loses as many as the others.
    pub runs: usize,
    /// Blocks to remove.
    pub remove: usize,
}

/// A cut consumer.
#[derive(Debug, Clone)]
pub struct PairSolution {
    /// Blocks that stay, ascending.
    pub kept: Vec<usize>,
    /// `[out, in]`, f32, zero in the columns of the blocks that went.
    pub weight: Tensor,
    /// `[out]`, if there was one.
    pub bias: Option<Tensor>,
    /// Steps of the choice.
    pub iterations: u32,
    /// Share of the mean diagonal that was added to the gram.
    pub damping: f64,
    /// How often damping had to be raised.
    pub damping_raised: u32,
    /// Inputs that were never active.
    pub dead_channels: u32,
    /// Floating-point operations of the factorisations and products.
    pub flops: f64,
}
