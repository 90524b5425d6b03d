//! The continuation ramp of a search: the penalty ρ, its growth, and how long it usually takes.

use serde::{Deserialize, Serialize};

use crate::prune::MOST_PARTS;

/// First penalty; ten times more costs 9 % of error, ten times less only iterations.
const FIRST_RHO: f64 = 0.1;
const LARGEST_RHO: f64 = 1e6;

/// How much time to spend on the support.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Profile {
    /// About 20 iterations.
    Fast,
    /// About 33 iterations.
    Balanced,
    /// About 60 iterations.
    Best,
}

impl Profile {
    /// The ramp's growth and the over-relaxation σ.
    fn ramp(self) -> (f64, f32) {
        match self {
            Self::Fast => (1.5, 1.5),
            Self::Balanced => (1.25, 1.0),
            Self::Best => (1.12, 1.0),
        }
    }

    /// Steps of the ramp that a search takes at most times.
    pub(super) fn usual_steps(self) -> usize {
        match self {
            Self::Fast => 7,
            Self::Balanced => 11,
            Self::Best => 20,
        }
    }

    /// Steps of the ramp that a search takes at least, as seen on SmolLM2-135M; a step that is not taken costs time alone.
    pub(super) fn least_steps(self) -> usize {
        match self {
            Self::Fast => 6,
            Self::Balanced => 10,
            Self::Best => MOST_PARTS - 1,
        }
    }
}

/// The penalty ρ on its way up, and what else a search goes by.
#[derive(Debug, Clone, Copy)]
pub(in crate::prune) struct Ramp {
    rho: f64,
    growth: f64,
    sigma: f32,
}

impl Ramp {
    /// Iterations between two looks at the support.
    pub(in crate::prune) const CHECK_EVERY: u32 = 3;
    /// The search ends when fewer than this share of the kept weights changed places.
    pub(in crate::prune) const SETTLED: f64 = 2e-4;

    pub(super) fn new(profile: Profile) -> Self {
        let (growth, sigma) = profile.ramp();
        Self { rho: FIRST_RHO, growth, sigma }
    }

    /// ρ.
    pub(in crate::prune) fn rho(&self) -> f32 {
        self.rho as f32
    }

    /// The over-relaxation σ.
    pub(in crate::prune) fn sigma(&self) -> f32 {
        self.sigma
    }

    /// Goes a step up.
    pub(in crate::prune) fn advance(&mut self) {
        self.rho = (self.rho * self.growth).min(LARGEST_RHO);
    }

    /// ρ so many steps further up.
    pub(super) fn rho_of(mut self, steps: usize) -> f32 {
        (0..steps).for_each(|_| self.advance());
        self.rho()
    }

    /// The steps after this one.
    pub(super) fn ahead(self) -> impl Iterator<Item = f32> {
        let next = |ramp: &Self| {
            let mut ramp = *ramp;
            ramp.advance();
            Some(ramp)
        };
        std::iter::successors(next(&self), next).map(|ramp| ramp.rho())
    }
}
