//! Work on many tensors: on all cores, or in the order of a device.

use candle_core::Device;
use rayon::prelude::*;

/// Maps items, results in order: on the CPU on all compute threads at once; on any other device one after another on the
/// calling thread, which is the one that owns the device. Ends with the first error.
///
/// # Errors
/// What `work` says.
pub fn in_order<I: Send, T: Send, E: Send>(
    device: &Device,
    items: Vec<I>,
    work: impl Fn(I) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    if device.is_cpu() { items.into_par_iter().map(&work).collect() } else { items.into_iter().map(work).collect() }
}
