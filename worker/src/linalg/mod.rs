//! Matrix maths that solvers share and that knows nothing of language models.
//!
//! Functions take row-major `f32` slices with their widths; [`values`] and [`matrix`] are the bridge to tensors. Work is cut
//! into blocks whose sizes depend on the shapes alone, and every sum has one order, so the bits of a result do not depend
//! on the number of threads.

pub mod factor;
pub mod gemm;
pub(crate) mod kernel;
pub(crate) mod lanes;
pub mod ops;
#[cfg(test)]
pub(crate) mod oracle;
pub mod pcg;
pub mod prox;
pub mod quadratic;
pub mod select;
pub mod spectral;
pub mod symmetric;
mod transpose;
pub mod wide;

use std::ops::Deref;
use std::slice::from_ref;

use candle_core::{DType, Device, Layout, Result, Storage, Tensor, bail};

pub use self::transpose::transposed;
use crate::device::memory::to_host;

/// The elements of a tensor as row-major f32.
///
/// # Errors
/// What the tensor backend says.
pub fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    if lies_by_column(tensor) {
        let by_column = tensor.t()?;
        return Ok(transposed(slices(&held(from_ref(&by_column)))?[0], tensor.dim(0)?));
    }
    to_host(&tensor.to_dtype(DType::F32)?)
}

/// The same matrix `[rows, columns]` f32 with its columns one after another in memory, if it is on the CPU. As the right-hand
/// factor of `x·Wᵀ` it then needs no strided reads; tensors of another device are left as they are.
///
/// # Errors
/// What the tensor backend says.
pub fn by_column(matrix: Tensor) -> Result<Tensor> {
    if !matrix.device().is_cpu() || lies_by_column(&matrix) {
        return Ok(matrix);
    }
    let (rows, columns) = matrix.dims2()?;
    let by_row = matrix.to_dtype(DType::F32)?.contiguous()?;
    let by_column = transposed(slices(&held(from_ref(&by_row)))?[0], columns);
    Tensor::from_vec(by_column, (columns, rows), &Device::Cpu)?.t()
}

fn lies_by_column(tensor: &Tensor) -> bool {
    let is_f32_on_host = tensor.device().is_cpu() && tensor.dtype() == DType::F32;
    is_f32_on_host
        && matches!((tensor.dims(), tensor.stride()), ([rows, columns], [1, stride]) if *columns > 1 && stride == rows)
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

/// The tensor where matrices are solved for, its rows one after another: at no cost if it is there and so.
///
/// # Errors
/// What the tensor backend says.
pub fn on_host(tensor: &Tensor) -> Result<Tensor> {
    if lies_by_column(tensor) {
        return Tensor::from_vec(values(tensor)?, tensor.shape(), &Device::Cpu);
    }
    tensor.to_device(&Device::Cpu)?.contiguous()
}

/// A tensor `[values.len() / columns, columns]` of row-major values.
///
/// # Errors
/// What the tensor backend says.
pub fn matrix(values: Vec<f32>, columns: usize, device: &Device) -> Result<Tensor> {
    let rows = values.len() / columns.max(1);
    Tensor::from_vec(values, (rows, columns), device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_matrix_by_column_is_the_same_matrix() {
        for (rows, columns) in [(17, 40), (1, 40), (40, 1)] {
            let elements = oracle::random(1, rows * columns);
            let matrix = matrix(elements.clone(), columns, &Device::Cpu).unwrap();
            let turned = by_column(matrix).unwrap();
            assert_eq!(turned.dims(), [rows, columns]);
            assert!(turned.t().unwrap().is_contiguous());
            assert_eq!(values(&turned).unwrap(), elements);
            let back = on_host(&turned).unwrap();
            assert!(back.is_contiguous());
            assert_eq!(values(&back).unwrap(), elements);
            assert_eq!(values(&by_column(turned).unwrap()).unwrap(), elements);
        }
    }
}
