//! A half of a layer as a function of its weights: what is tuned as one.

use std::ops::Range;

use super::linear::Matrix;
use super::{attention, feed_forward};
use crate::model::Anatomy;

/// Which half.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Half {
    /// q, k, v → o.
    Attention,
    /// (gate,) up → down.
    FeedForward,
}

impl Half {
    /// The half whose first group is `group`.
    pub(super) fn starting_at(group: usize) -> Option<Self> {
        [Self::Attention, Self::FeedForward].into_iter().find(|half| half.groups().start == group)
    }

    /// Its groups.
    pub(super) fn groups(self) -> Range<usize> {
        match self {
            Self::Attention => 0..2,
            Self::FeedForward => 2..4,
        }
    }
}

/// A half of a layer for sequences of one length, from the input of its first group to what it adds to the residual stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct SubModule<'a> {
    /// Which half.
    pub(super) half: Half,
    /// What stands between the weights.
    pub(super) anatomy: &'a Anatomy,
    /// Length of a sequence.
    pub(super) tokens: usize,
}

impl SubModule<'_> {
    /// What it gives for whole sequences `[rows, in]` laid one after the other: `[rows, hidden]`.
    pub(super) fn output(&self, weights: &[Matrix], x: &[f32]) -> Vec<f32> {
        match self.half {
            Half::Attention => attention::output(self.anatomy, self.tokens, weights, x),
            Half::FeedForward => feed_forward::output(self.anatomy, weights, x),
        }
    }

    /// The gradient of a loss with regard to each weight; `loss` turns the output into the loss' gradient there.
    pub(super) fn gradients(
        &self,
        weights: &[Matrix],
        x: &[f32],
        loss: impl FnOnce(Vec<f32>) -> Vec<f32>,
    ) -> Vec<Vec<f32>> {
        match self.half {
            Half::Attention => attention::gradients(self.anatomy, self.tokens, weights, x, loss),
            Half::FeedForward => feed_forward::gradients(self.anatomy, weights, x, loss),
        }
    }

    /// Operations of the weight products of an output, and of a gradient.
    pub(super) fn flops(&self, weights: &[Matrix], rows: usize) -> (f64, f64) {
        let product = |weights: &[Matrix]| {
            2.0 * rows as f64 * weights.iter().map(|weight| weight.values.len()).sum::<usize>() as f64
        };
        (product(weights), 2.0 * product(weights) + product(&weights[weights.len() - 1..]))
    }
}
