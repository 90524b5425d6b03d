//! Matrix maths that solvers share and that knows nothing of language models.
//!
//! Functions take row-major `f32` slices with their widths; [`values`] and [`matrix`] are the bridge to tensors. Work is cut
//! into blocks whose sizes depend on the shapes alone, and every sum has one order, so the bits of a result do not depend
//! on the number of threads.

pub mod factor;
pub mod gemm;
pub(crate) mod lanes;
pub mod ops;
#[cfg(test)]
pub(crate) mod oracle;
pub mod pcg;
pub mod prox;
pub mod quadratic;
pub mod select;
pub mod spectral;
pub mod wide;

use std::ops::Deref;

use candle_core::{DType, Device, Layout, Result, Storage, Tensor, bail};

/// The elements of a tensor as row-major f32.
///
/// # Errors
/// What the tensor backend says.
pub fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// Tensors held for reading where they are, see [`slices`].
pub fn held(tensors: &[Tensor]) -> Vec<(impl Deref<Target = Storage> + '_, &Layout)> {
    tensors.iter().map(Tensor::storage_and_layout).collect()
}

/// The elements of tensors that are held, row-major f32.
///
/// # Errors
/// If one is on another device than the CPU, not contiguous or not f32.
pub fn slices<'a>(held: &'a [(impl Deref<Target = Storage>, &Layout)]) -> Result<Vec<&'a [f32]>> {
    let slice = |(storage, layout): &'a (_, &Layout)| match (Deref::deref(storage), layout.contiguous_offsets()) {
        (Storage::Cpu(storage), Some((start, end))) => Ok(&storage.as_slice::<f32>()?[start..end]),
        _ => bail!("a contiguous tensor on the CPU was expected, not one of shape {:?}", layout.shape()),
    };
    held.iter().map(slice).collect()
}

/// The tensor where matrices are solved for: at no cost if it is there.
///
/// # Errors
/// What the tensor backend says.
pub fn on_host(tensor: &Tensor) -> Result<Tensor> {
    tensor.to_device(&Device::Cpu)
}

/// A tensor `[values.len() / columns, columns]` of row-major values.
///
/// # Errors
/// What the tensor backend says.
pub fn matrix(values: Vec<f32>, columns: usize, device: &Device) -> Result<Tensor> {
    let rows = values.len() / columns.max(1);
    Tensor::from_vec(values, (rows, columns), device)
}
