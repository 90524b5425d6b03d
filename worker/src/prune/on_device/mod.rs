//! Methods on a device other than the CPU.
//!
//! A method that can be solved there says so by [`Solver::on_device`](super::Solver::on_device). What goes in and what comes
//! out is on the host, as with any solver, and so are blocks and conditioning. What takes
//! time, factorisations, products, passes over the weights and where their zeros are, are tensors on the device ([`crate::linalg::ops`]). The same
//! program runs on the CPU in tests. It follows the host's solver step by step; results differ by rounding, see the contract
//! there, and by what a choice between two weights makes of that.
//!
//! Blocks are solved one after another on the thread that owns the device. Methods without a way here are solved on the host,
//! and the time that takes is booked on a phase of its own.

pub(super) mod espalier;
pub(super) mod measure;
mod search;
pub(super) mod sparsegpt;

use std::sync::Arc;

use candle_core::Device;

use super::condition::Conditioned;
use super::{GroupSolver, InputStats, SolveCtx, SolveError};
use crate::linalg::factor::NotPositiveDefinite;
use crate::linalg::ops::FactorError;

/// A method that can be solved on a device.
pub trait OnDevice {
    /// As [`Solver::prepare`](super::Solver::prepare), to solve on `device`; the statistics are on the host.
    ///
    /// # Errors
    /// `NotPositiveDefinite` once damping is exhausted; `Backend`.
    fn prepare_on(
        &self,
        stats: Arc<InputStats>,
        device: &Device,
        ctx: &SolveCtx,
    ) -> Result<Box<dyn GroupSolver>, SolveError>;
}

/// A factorisation's failure, as a solver reports it.
fn refused(conditioned: &Conditioned, error: FactorError) -> SolveError {
    match error {
        FactorError::NotPositiveDefinite(NotPositiveDefinite { pivot }) => {
            SolveError::NotPositiveDefinite { columns: conditioned.n, pivot, damping: conditioned.damping }
        }
        FactorError::Backend(error) => error.into(),
    }
}
