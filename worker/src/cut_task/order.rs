//! Blocks whose inputs are apart are solved side by side: a solver knows only of consecutive ones.

use std::sync::Arc;

use candle_core::{Result, Tensor};
use espalier_common::structure::Pair;

use crate::prune::InputStats;
use crate::prune::problem::DenseStats;

/// The order that brings the inputs of each block together; the constant input, if there is one, stays last.
pub(super) struct Order {
    /// The input at each place.
    forth: Vec<u32>,
    /// The place of each input.
    back: Vec<u32>,
}

impl Order {
    /// The order of a pair's inputs; `None` where they are in order.
    pub(super) fn of(pair: &Pair) -> Option<Self> {
        if pair.stride <= 1 {
            return None;
        }
        let forth: Vec<u32> = (0..pair.blocks).flat_map(|block| pair.inputs(block)).map(|input| input as u32).collect();
        let mut back = vec![0; forth.len()];
        forth.iter().enumerate().for_each(|(place, &input)| back[input as usize] = place as u32);
        Some(Self { forth, back })
    }

    /// The columns of a weight `[out, in]`, block by block.
    pub(super) fn columns(&self, weight: &Tensor) -> Result<Tensor> {
        weight.index_select(&Tensor::new(&self.forth[..], weight.device())?, 1)
    }

    /// The columns as they were.
    pub(super) fn columns_back(&self, weight: &Tensor) -> Result<Tensor> {
        weight.index_select(&Tensor::new(&self.back[..], weight.device())?, 1)
    }

    /// The statistics of the inputs, block by block.
    pub(super) fn stats(&self, stats: &InputStats) -> Result<InputStats> {
        let dense = match &stats.dense {
            Some(dense) => Some(DenseStats { cross: self.square(&dense.cross)?, gram: self.square(&dense.gram)? }),
            None => None,
        };
        let held_out = match &stats.held_out {
            Some(held_out) => Some(Arc::new(self.stats(held_out)?)),
            None => None,
        };
        Ok(InputStats { gram: self.square(&stats.gram)?, dense, tokens: stats.tokens, held_out })
    }

    fn square(&self, gram: &Tensor) -> Result<Tensor> {
        let constant = self.forth.len() as u32..gram.dim(0)? as u32;
        let order: Vec<u32> = self.forth.iter().copied().chain(constant).collect();
        let order = Tensor::new(order, gram.device())?;
        gram.index_select(&order, 0)?.index_select(&order, 1)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use candle_core::Device;

    use super::*;
    use crate::linalg::{matrix, oracle, values};

    /// Two KV heads of width 4 with 3 query heads each.
    fn pair() -> Pair {
        Pair {
            consumer: "o".into(),
            blocks: 8,
            block: 3,
            stride: 4,
            runs: 2,
            parameters: 1,
            fits_bias: true,
            slices: Vec::new(),
            config: BTreeMap::new(),
            divides: None,
        }
    }

    #[test]
    fn outputs_do_not_depend_on_the_order_and_the_order_can_be_undone() {
        let (order, n) = (Order::of(&pair()).unwrap(), 24);
        let weight = matrix(oracle::random(1, 5 * n), n, &Device::Cpu).unwrap();
        let sorted = order.columns(&weight).unwrap();
        assert_ne!(values(&sorted).unwrap(), values(&weight).unwrap());
        assert_eq!(values(&order.columns_back(&sorted).unwrap()).unwrap(), values(&weight).unwrap());
        // The error of a weight, seen through its bias' column too: tr(W·G·Wᵀ).
        let x = oracle::random(2, 60 * (n + 1));
        let gram = oracle::gram(&x, &x, n + 1);
        let gram = matrix(gram.iter().map(|&g| g as f32).collect(), n + 1, &Device::Cpu).unwrap();
        let bias = matrix(oracle::random(3, 5), 1, &Device::Cpu).unwrap();
        let stats = InputStats { gram: gram.clone(), dense: None, tokens: 60, held_out: None };
        let stats = order.stats(&InputStats { held_out: Some(Arc::new(stats.clone())), ..stats }).unwrap();
        let energy = |weight: &Tensor, gram: &Tensor| {
            let weight = Tensor::cat(&[weight, &bias], 1).unwrap();
            let image = weight.matmul(gram).unwrap();
            (image * weight).unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap()
        };
        let expected = energy(&weight, &gram);
        for gram in [&stats.gram, &stats.held_out.unwrap().gram] {
            assert!((energy(&sorted, gram) / expected - 1.0).abs() < 1e-5);
        }
    }

    #[test]
    fn consecutive_inputs_are_left_alone() {
        assert!(Order::of(&Pair { stride: 1, ..pair() }).is_none());
    }
}
