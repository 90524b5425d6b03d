//! Second moments that grow on a device other than the CPU, and are merged and averaged there as long as its memory lasts.
//!
//! As on the host, though there chunks are shorter, products of a chunk of tokens are f32 and chunks are added in f64, in the order
//! given; sums are added and divided in f64, which gives the same bits on any device.

use candle_core::{DType, Device, Result, Tensor};

use super::gram::CHUNK_TOKENS;
use crate::device::memory::to_host;
use crate::linalg::ops;

/// `Σ X̂ᵀX̂`, and `Σ X̂ᵀX` and `Σ XᵀX` if dense inputs come beside the corrected ones; each `[columns, columns]` f64.
#[derive(Debug, Clone)]
pub(super) struct DeviceSums {
    gram: Tensor,
    dense: Option<(Tensor, Tensor)>,
}

impl DeviceSums {
    /// Empty sums.
    pub(super) fn new(columns: usize, with_dense: bool, device: &Device) -> Result<Self> {
        let zeros = || Tensor::zeros((columns, columns), DType::F64, device);
        let dense = if with_dense { Some((zeros()?, zeros()?)) } else { None };
        Ok(Self { gram: zeros()?, dense })
    }

    /// Adds the inputs of one sequence, `[tokens, columns]`. If it fails, the sums are as they were: what takes memory comes
    /// first, so that a step may be done again.
    pub(super) fn add(&self, corrected: &Tensor, dense: Option<&Tensor>) -> Result<()> {
        let mut products = self.products(&self.gram, corrected, corrected)?;
        if let (Some(dense), Some((cross, gram))) = (dense, &self.dense) {
            products.extend(self.products(cross, corrected, dense)?);
            products.extend(self.products(gram, dense, dense)?);
        }
        products.iter().try_for_each(|(sum, product)| ops::accumulate(sum, product))
    }

    /// `aᵀb` of each chunk of tokens, with the sum that it is to be added to.
    fn products<'a>(&self, sum: &'a Tensor, a: &Tensor, b: &Tensor) -> Result<Vec<(&'a Tensor, Tensor)>> {
        let tokens = a.dim(0)?;
        let chunk = |start: usize| {
            let length = CHUNK_TOKENS.min(tokens - start);
            let (a, b) = (a.narrow(0, start, length)?, b.narrow(0, start, length)?);
            Ok((sum, a.t()?.matmul(&b)?))
        };
        (0..tokens).step_by(CHUNK_TOKENS).map(chunk).collect()
    }

    /// Adds other sums over the same columns, which must have dense inputs if these do. It takes no memory.
    pub(super) fn merge(&self, other: &Self) -> Result<()> {
        self.each().zip(other.each()).try_for_each(|(sum, more)| ops::accumulate(sum, more))
    }

    /// Bytes of the sums.
    pub(super) fn bytes(&self) -> u64 {
        self.each().map(|sum| (sum.elem_count() * size_of::<f64>()) as u64).sum()
    }

    /// The device that they are on.
    pub(super) fn device(&self) -> &Device {
        self.gram.device()
    }

    /// The sums, row-major, in the order of [`Self::each`].
    pub(super) fn to_host(&self) -> Result<Vec<Vec<f64>>> {
        self.each().map(|sum| sum.flatten_all()?.to_vec1()).collect()
    }

    /// The means over `tokens` tokens, row-major f32, in the order of [`Self::each`].
    pub(super) fn means(&self, tokens: usize) -> Result<Vec<Vec<f32>>> {
        let mean = |(at, sum): (usize, &Tensor)| {
            let tokens = Tensor::new(tokens as f64, sum.device())?;
            let mean = sum.broadcast_div(&tokens)?.to_dtype(DType::F32)?;
            if at != CROSS {
                ops::mirrored(&mean)?;
            }
            to_host(&mean)
        };
        self.each().enumerate().map(mean).collect()
    }

    /// The sums: of corrected inputs and, if there are dense ones, of corrected with dense ones and of dense ones.
    fn each(&self) -> impl Iterator<Item = &Tensor> {
        [&self.gram].into_iter().chain(self.dense.iter().flat_map(|(cross, gram)| [cross, gram]))
    }
}

/// Which of the sums is not symmetric.
const CROSS: usize = 1;
