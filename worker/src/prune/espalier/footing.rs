//! What of a group follows from its gram alone, so that workers can begin before they have the other statistics.

use std::sync::Arc;

use candle_core::Tensor;

use super::{Group, Params, RAMP_STEPS, Ramp};
use crate::prune::admm::Inverses;
use crate::prune::condition::Conditioned;
use crate::prune::{Groundwork, GroupSolver, InputStats, SolveError};

/// From this width on an inverse takes longer to make than to send: n³ operations at 100 GFLOP/s against 2n² bytes at 1 GB/s,
/// and as much again for what sending costs the processors. Models of tests are narrow, and are to go this way too.
const WORTH_SENDING: usize = if cfg!(test) { 48 } else { 400 };
/// The ρ at which nothing pulls towards a pattern.
pub(super) const UNCONSTRAINED: f32 = 0.0;

/// Whether the inverses of groups so wide are made by all workers.
pub(super) fn is_laid(columns: usize) -> bool {
    columns >= WORTH_SENDING && Inverses::remembers(columns, RAMP_STEPS)
}

/// What follows from a group's gram: itself conditioned, and inverses as they are asked for.
pub(super) struct Footing {
    pub(super) conditioned: Arc<Conditioned>,
    pub(super) inverses: Inverses,
    pub(super) params: Params,
}

impl Footing {
    /// Conditions `gram [in, in]`.
    ///
    /// # Errors
    /// As [`Conditioned::factored`].
    pub(super) fn new(gram: &Tensor, params: Params) -> Result<Self, SolveError> {
        let (conditioned, ()) = Conditioned::factored(gram, params.damping, |_| Ok(()))?;
        let conditioned = Arc::new(conditioned);
        Ok(Self { inverses: Inverses::new(Arc::clone(&conditioned)), conditioned, params })
    }

    /// What a search begins with.
    pub(super) fn ramp(&self) -> Ramp {
        Ramp::new(self.params.profile)
    }

    /// Whether a search needs V̂° of a target blend.
    pub(super) fn is_blended(&self) -> bool {
        self.params.alpha > 0.0
    }

    /// ρ of a part of the groundwork.
    fn rho_of(&self, part: usize) -> f32 {
        let step = if self.is_blended() { part.checked_sub(1) } else { Some(part) };
        step.map_or(UNCONSTRAINED, |step| self.ramp().rho_of(step))
    }
}

/// The inverse that leads to V̂° where there is a target blend, and those of the ramp's first steps.
impl Groundwork for Footing {
    fn complete(self: Arc<Self>, stats: Arc<InputStats>) -> Result<Box<dyn GroupSolver>, SolveError> {
        Ok(Box::new(Group::new(self, &stats)?))
    }

    fn parts(&self) -> usize {
        usize::from(self.is_blended()) + self.params.profile.least_steps()
    }

    fn flops(&self) -> f64 {
        self.inverses.flops()
    }

    fn make(&self, part: usize) -> Result<Vec<f32>, SolveError> {
        Ok(self.inverses.at(self.rho_of(part), [])?.0.triangle())
    }

    fn take(&self, part: usize, triangle: &[f32]) -> bool {
        part < self.parts() && self.inverses.take(self.rho_of(part), triangle)
    }
}
