//! Kernels of our own: what one is called with, and where its CUDA C is.
//!
//! Each belongs to a candle custom op in [`crate::linalg::ops`], whose CPU pass says what the kernel does. The CUDA C is
//! compiled at run time, when a kernel is first launched, without fused multiply-add and without fast maths, so that
//! elementwise passes give the CPU's bits; sums over a row are in f64. Tests compile it for the host and hold every kernel
//! against its CPU pass, launched as a GPU would be.

use candle_core::{CudaStorage, Layout, Result};

use super::backend;
use crate::linalg::factor::NotPositiveDefinite;

/// The CUDA C of all kernels.
pub const SOURCE: &str = include_str!("kernels/espalier.cu");

/// Threads of a block, in every kernel.
pub const THREADS: u32 = 256;

/// Blocks of a kernel that goes through its elements with strides: enough to fill any GPU.
const MOST_BLOCKS: usize = 4096;

/// A kernel and how many blocks of [`THREADS`] threads it is launched with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// Its name in [`SOURCE`].
    pub kernel: &'static str,
    /// Blocks.
    pub blocks: u32,
}

impl Launch {
    /// A thread an element, or one for several of them if they are many.
    pub fn over(kernel: &'static str, elements: usize) -> Self {
        let blocks = elements.div_ceil(THREADS as usize).clamp(1, MOST_BLOCKS);
        Self { kernel, blocks: blocks as u32 }
    }

    /// A block a row, or one for several of them if they are many.
    pub fn rows(kernel: &'static str, rows: usize) -> Self {
        Self { kernel, blocks: rows.clamp(1, 1 << 16) as u32 }
    }
}

/// An argument of a kernel whose tensors are `S`.
pub enum Arg<'a, S> {
    /// A contiguous tensor that is read.
    Read(&'a S, &'a Layout),
    /// A contiguous tensor that is written.
    Write(&'a mut S, &'a Layout),
    /// A number of elements, rows or the like.
    Count(usize),
    /// A number that is computed with.
    Number(f32),
}

/// A kernel with its arguments, in the kernel's order.
pub struct Call<'a, S> {
    /// How it is launched.
    pub launch: Launch,
    /// With what.
    pub args: Vec<Arg<'a, S>>,
}

impl Call<'_, CudaStorage> {
    /// Launches the kernel on the device of its tensors.
    ///
    /// # Errors
    /// If a tensor is not contiguous, the kernels do not compile, or the driver refuses; in the build for the CPU always.
    pub fn run(self) -> Result<()> {
        backend::launch(self.launch, self.args)
    }
}

/// Memory for `length` numbers on the device of a tensor; it is undefined until a kernel has written all of it.
///
/// # Errors
/// If there is none; in the build for the CPU always.
pub fn f32_like(tensor: &CudaStorage, length: usize) -> Result<CudaStorage> {
    backend::f32_like(tensor, length)
}

/// As [`f32_like`], for bytes.
///
/// # Errors
/// As [`f32_like`].
pub fn u8_like(tensor: &CudaStorage, length: usize) -> Result<CudaStorage> {
    backend::u8_like(tensor, length)
}

/// As [`f32_like`], for counts that are zero to begin with.
///
/// # Errors
/// As [`f32_like`].
pub fn counts_like(tensor: &CudaStorage, length: usize) -> Result<CudaStorage> {
    backend::counts_like(tensor, length)
}

/// `L⁻¹ [n, n]`, zeros above the diagonal, of `matrix = LLᵀ`, by cuSOLVER and cuBLAS.
///
/// # Errors
/// The pivot at which it is not positive definite; and what the libraries say, in the build for the CPU always.
pub fn inverse_of_cholesky(
    matrix: &CudaStorage,
    layout: &Layout,
    n: usize,
) -> Result<std::result::Result<CudaStorage, NotPositiveDefinite>> {
    backend::inverse_of_cholesky(matrix, layout, n)
}
