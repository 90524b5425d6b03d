//! What stands in for CUDA in the build for the CPU: there are no GPUs, and so nobody can have one of their tensors.

use std::sync::Arc;

use candle_core::{CudaStorage, Device, Error, Layout, Result, Tensor};
use espalier_common::device::Gpu;

use super::kernels::{Arg, Launch};
use crate::linalg::factor::NotPositiveDefinite;
use crate::transport::Carrier;

/// The GPUs there are, or why none can be used.
pub(super) fn gpus() -> std::result::Result<Vec<Gpu>, String> {
    Err("this is the build for the CPU, without CUDA: start espalier-worker-cuda".to_owned())
}

pub(super) fn open(_: usize, _: bool) -> Result<Device> {
    Err(Error::NotCompiledWithCudaSupport)
}

/// What joins a GPU with another worker's, or why nothing does.
pub(super) fn carrier(_: &Device, _: bool) -> std::result::Result<Arc<dyn Carrier>, String> {
    Err("this is the build for the CPU, without CUDA".to_owned())
}

pub(super) fn free_bytes(_: &Device) -> Option<u64> {
    None
}

pub(super) fn to_host(_: &Tensor) -> Result<Vec<f32>> {
    Err(Error::NotCompiledWithCudaSupport)
}

pub(super) fn peak_bytes(_: &Device) -> u64 {
    0
}

pub(super) fn is_out_of_memory(_: &Error) -> bool {
    false
}

pub(super) fn launch(_: Launch, _: Vec<Arg<'_, CudaStorage>>) -> Result<()> {
    Err(Error::NotCompiledWithCudaSupport)
}

pub(super) fn f32_like(_: &CudaStorage, _: usize) -> Result<CudaStorage> {
    Err(Error::NotCompiledWithCudaSupport)
}

pub(super) fn u8_like(_: &CudaStorage, _: usize) -> Result<CudaStorage> {
    Err(Error::NotCompiledWithCudaSupport)
}

pub(super) fn counts_like(_: &CudaStorage, _: usize) -> Result<CudaStorage> {
    Err(Error::NotCompiledWithCudaSupport)
}

pub(super) fn inverse_of_cholesky(
    _: &CudaStorage,
    _: &Layout,
    _: usize,
) -> Result<std::result::Result<CudaStorage, NotPositiveDefinite>> {
    Err(Error::NotCompiledWithCudaSupport)
}

/// Host memory that a GPU copies from: there is none.
#[derive(Debug)]
pub enum Pinned {}

impl Pinned {
    /// Copies a tensor to the host.
    ///
    /// # Errors
    /// Always: there is no such tensor.
    pub fn copy_of(_: &Tensor) -> Result<Self> {
        Err(Error::NotCompiledWithCudaSupport)
    }

    /// The tensor `[rows, columns]`, back on its device.
    ///
    /// # Errors
    /// Never: there is none.
    pub fn load(&self, _: (usize, usize)) -> Result<Tensor> {
        match *self {}
    }
}
