//! Passes over tensors that run where the tensors are: candle custom ops, a CPU pass and a CUDA kernel each.
//!
//! On the CPU they are the passes of [`crate::linalg`]; solvers that run on the host call those themselves. A solver that runs
//! on a device ([`crate::prune::on_device`]) calls these, and so the same program runs, and is tested, on the CPU too.
//!
//! **Numerical contract.** Elementwise passes and selections give the same bits on every device. Sums over a row are in f64,
//! in another order on each device: they differ by at most `n·2⁻⁵³` of the sum of the terms' sizes, which an f32 result shows
//! in its last place at most. Products and factorisations are f32 with f32 accumulation (TF32 only if `worker.tf32` asks for
//! it), in an order that is the library's own: two devices differ by at most `c·n·ε` times the sizes of the factors (ε = 2⁻²⁴),
//! and an inverse by that times the matrix's condition.

mod accumulate;
mod admm;
mod conjugate;
mod factor;
mod select;
mod sweep;

use candle_core::{CpuStorage, Layout, Result, bail};

pub use self::accumulate::accumulate;
pub use self::admm::{right_side, update};
pub use self::conjugate::{Goals, conjugate_step};
pub use self::factor::{FactorError, inverse, mirrored, upper_of_inverse};
pub use self::select::{keep_largest, keep_n_of_m};
pub use self::sweep::{MOST_COLUMNS, Swept, sweep};

/// A storage with its layout, as custom ops are given them.
type Place<'a, S> = (&'a S, &'a Layout);

/// The same of one that is written.
type PlaceMut<'a, S> = (&'a mut S, &'a Layout);

/// The values of a contiguous tensor of the host.
fn values<'a, T: candle_core::WithDType>(place: Place<'a, CpuStorage>) -> Result<&'a [T]> {
    match place.1.contiguous_offsets() {
        Some((start, end)) => Ok(&place.0.as_slice::<T>()?[start..end]),
        None => bail!("a pass wants a contiguous tensor, not one of shape {:?}", place.1.shape()),
    }
}

/// The values of a contiguous f32 tensor of the host, to be changed.
fn values_mut<'a>(place: PlaceMut<'a, CpuStorage>) -> Result<&'a mut [f32]> {
    match (place.1.contiguous_offsets(), place.0) {
        (Some((start, end)), CpuStorage::F32(values)) => Ok(&mut values[start..end]),
        _ => bail!("a pass wants a contiguous f32 tensor of shape {:?}", place.1.shape()),
    }
}

#[cfg(test)]
pub(crate) mod host;
