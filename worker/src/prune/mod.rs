//! Pruning methods: one file each, all behind [`Solver`].

mod admm;
pub mod alps;
mod blend;
mod condition;
pub mod espalier;
pub mod fista;
#[cfg(test)]
pub(crate) mod fixture;
pub mod magnitude;
pub mod measure;
pub mod on_device;
pub mod problem;
pub mod refit;
pub mod sparsegpt;
pub mod structured;
mod sweep;
pub mod verify;
pub mod wanda;

use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_common::fault::FaultClass;
use espalier_common::outline::Effort;
use espalier_common::pattern::Pattern;
use serde::Serialize;
use serde::de::{DeserializeOwned, Error as _};

pub(crate) use blend::usual_alpha;
pub use on_device::OnDevice;
pub use problem::{InputStats, Problem, RowBlock, Solution, SolveCtx, Statistics};
pub use structured::StructuredSolver;

use crate::device::in_order;

/// One pruning algorithm with its parameters.
///
/// Blocking. The same problem, parameters and seed give the same bits, for any number of threads.
pub trait Solver: Send + Sync {
    /// The poorest input statistics this method can work from; capture gathers no more.
    fn needs(&self) -> Statistics;
    /// Refuses patterns the method does not cover.
    ///
    /// # Errors
    /// `Unsupported`.
    fn supports(&self, pattern: Pattern) -> Result<(), SolveError>;
    /// Cuts a sublayer into blocks of rows that can be solved apart, with the zeros that each must get unless [`GroupSolver::deal`]
    /// says otherwise. Fixed by the problem alone, never by who is there to solve it. One block, unless the method can do with
    /// less than the whole matrix.
    ///
    /// # Errors
    /// See [`SolveError`].
    fn blocks(&self, problem: &Problem<'_>) -> Result<Vec<RowBlock>, SolveError> {
        Ok(vec![RowBlock::whole(problem)?])
    }
    /// Does once what all sublayers of a group share: conditioning and factorising their statistics.
    ///
    /// # Errors
    /// `NotPositiveDefinite` once damping is exhausted.
    fn prepare(&self, stats: Arc<InputStats>, ctx: &SolveCtx) -> Result<Box<dyn GroupSolver>, SolveError>;
    /// Begins with what follows from a group's gram `[in, in]` alone, if every block needs something of that which takes longer to
    /// make than to send, so that workers make it for each other.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    fn groundwork(&self, _gram: &Tensor, _ctx: &SolveCtx) -> Result<Option<Arc<dyn Groundwork>>, SolveError> {
        Ok(None)
    }
    /// The method as one that removes heads and channels, if it is one; it then solves nothing else.
    fn structured(&self) -> Option<&dyn StructuredSolver> {
        None
    }
    /// The checkpoint whose zeros and weights the method starts from, if it is one that does; empty if the job names none.
    fn imports(&self) -> Option<&str> {
        None
    }
    /// The method as one that can be solved on a device other than the CPU, if it can with these parameters.
    fn on_device(&self) -> Option<&dyn OnDevice> {
        None
    }
    /// Whether, with these parameters, the method chooses between solutions on held-out inputs, so that there must be some.
    fn needs_held_out(&self) -> bool {
        false
    }
    /// What it takes to solve a group with inputs so wide on the host, for plans. As it stands: one factor of the gram and one
    /// pass over the columns, or nothing to speak of for a method that does without the gram.
    fn effort(&self, columns: usize) -> Effort {
        if self.needs() < Statistics::Gram {
            return Effort { columns, speed_percent: 100, ..Effort::default() };
        }
        Effort { is_shared: !self.needs_held_out(), ..factored(columns) }
    }
}

/// What it takes to factor a gram and pass over the columns once.
fn factored(columns: usize) -> Effort {
    let square = (columns * columns) as u64;
    Effort {
        columns,
        // A factor, an inverse and the inverse's factor: a third, two thirds and a third of columns³.
        common_flops: 4 * square * columns as u64 / 3,
        row_flops: 2 * square,
        // Measured on two AVX-512 threads with SmolLM2-135M.
        speed_percent: 40,
        // The gram as it is worked on, its factor, and what making that takes.
        kept_bytes: 3 * F32 * square,
        row_bytes: 3 * F32 * columns as u64,
        ..Effort::default()
    }
}

/// Bytes of an f32.
const F32: u64 = size_of::<f32>() as u64;

/// A solver made ready for the inputs of one group.
///
/// A sublayer is solved block by block, as [`Solver::blocks`] cuts it: [`Self::solve_block`] solves one block whoever has the others.
/// It may be called from several threads at once, unless it solves on a device.
pub trait GroupSolver: Send + Sync {
    /// The device that it solves on, block after block, called by the thread that owns it; `None` for the host.
    fn device(&self) -> Option<&Device> {
        None
    }
    /// Deals the zeros of a sublayer out to its blocks by what the whole matrix would lose first, if the method does so.
    ///
    /// # Errors
    /// See [`SolveError`].
    fn deal(&self, _problem: &Problem<'_>, _blocks: &mut [RowBlock]) -> Result<(), SolveError> {
        Ok(())
    }
    /// Minimises ‖X̂·W'ᵀ − X·Wᵀ‖²_F over the W' that obey `problem.pattern`, for the rows of one block: `problem` has these rows
    /// alone, and `zeros` of its weights must go.
    ///
    /// # Errors
    /// See [`SolveError`].
    fn solve_block(&self, problem: &Problem<'_>, zeros: usize, ctx: &SolveCtx) -> Result<Solution, SolveError>;
    /// Solves a sublayer that is cut into these blocks.
    ///
    /// # Errors
    /// See [`SolveError`].
    fn solve(&self, problem: &Problem<'_>, mut blocks: Vec<RowBlock>, ctx: &SolveCtx) -> Result<Solution, SolveError> {
        self.deal(problem, &mut blocks)?;
        let solve =
            |block: RowBlock| problem.solve_rows(&block, |problem, zeros| self.solve_block(problem, zeros, ctx));
        Solution::joined(in_order(self.device().unwrap_or(&Device::Cpu), blocks, solve)?)
    }
}

/// What every block of a group needs and takes long to make: symmetric matrices `[in, in]`, the same bits whoever makes them. A
/// part that is not there when a block needs it is made on the spot, so it can be lost.
pub trait Groundwork: Send + Sync {
    /// The solver that [`Solver::prepare`] would give, on this groundwork; `stats` are those whose gram it was laid on.
    ///
    /// # Errors
    /// As [`Solver::prepare`].
    fn complete(self: Arc<Self>, stats: Arc<InputStats>) -> Result<Box<dyn GroupSolver>, SolveError>;
    /// How many parts are worth making before the first block; at most [`MOST_PARTS`]. What is needed first comes first.
    fn parts(&self) -> usize;
    /// Operations that a part takes.
    fn flops(&self) -> f64;
    /// Makes a part, unless it is there, and remembers it; returns what lies on and below the diagonal, row by row.
    ///
    /// # Errors
    /// See [`SolveError`].
    fn make(&self, part: usize) -> Result<Vec<f32>, SolveError>;
    /// Remembers a part that another worker made and returned; false if it is not what it should be.
    fn take(&self, part: usize, triangle: &[f32]) -> bool;
}

/// The most parts that a [`Groundwork`] has.
pub const MOST_PARTS: usize = 17;

/// Every method there is: those that place zeros, from the plainest to the best, then those that remove whole structures.
pub const METHODS: &[Method] = &[
    magnitude::METHOD,
    wanda::METHOD,
    sparsegpt::METHOD,
    fista::METHOD,
    alps::METHOD,
    espalier::METHOD,
    refit::METHOD,
    structured::columns::MAGNITUDE,
    structured::columns::WANDA,
    structured::fasp::METHOD,
    structured::spap::METHOD,
    structured::slimgpt::METHOD,
];

/// Builds the solver of a method by name.
///
/// # Errors
/// `Unknown` with the names there are, or `Params`.
pub fn build(name: &str, params: &serde_json::Value) -> Result<Built, MethodError> {
    match METHODS.iter().find(|method| method.name == name) {
        Some(method) => Ok((method.build)(params)?),
        None => {
            let known = METHODS.iter().map(|method| method.name).collect::<Vec<_>>().join(", ");
            Err(MethodError::Unknown { name: name.to_owned(), known })
        }
    }
}

/// Reads a method's parameters (`null` for all defaults), checks them, and gives them back with every default filled in.
fn read_params<P: Serialize + DeserializeOwned + Default>(
    method: &'static str,
    params: &serde_json::Value,
    check: impl FnOnce(&P) -> Result<(), &'static str>,
) -> Result<(P, serde_json::Value), ParamsError> {
    let read = || {
        let params = if params.is_null() { P::default() } else { P::deserialize(params)? };
        check(&params).map_err(serde_json::Error::custom)?;
        let filled = serde_json::to_value(&params)?;
        Ok((params, filled))
    };
    read().map_err(|source| ParamsError { method, source })
}

/// One row of [`METHODS`].
pub struct Method {
    /// As a job names it.
    pub name: &'static str,
    /// Changes whenever the method's output bits may change; part of a run's fingerprint.
    pub version: &'static str,
    /// One line for `espalier-worker methods`.
    pub summary: &'static str,
    /// Reads the parameters (unknown ones are errors) and returns the solver and the parameters with every default filled in.
    pub build: fn(&serde_json::Value) -> Result<Built, ParamsError>,
}

/// A solver, and its parameters with every default filled in.
pub type Built = (Box<dyn Solver>, serde_json::Value);

/// Why a method cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum MethodError {
    /// There is no such method.
    #[error("there is no method `{name}`; there are {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// It does not take these parameters.
    #[error(transparent)]
    Params(#[from] ParamsError),
}

/// Parameters that a method cannot take.
#[derive(Debug, thiserror::Error)]
#[error("parameters of method {method}")]
pub struct ParamsError {
    /// The method.
    pub method: &'static str,
    /// What is wrong with them.
    #[source]
    pub source: serde_json::Error,
}

/// Why a problem has no solution.
#[derive(Debug, thiserror::Error)]
pub enum SolveError {
    /// The method does not cover the pattern.
    #[error("method {method} cannot prune to {pattern}: {reason}")]
    Unsupported {
        /// The method.
        method: &'static str,
        /// What was asked.
        pattern: Pattern,
        /// Why not.
        reason: &'static str,
    },
    /// Damping was raised as often as it may be.
    #[error("gram of {columns} inputs is not positive definite at pivot {pivot} with damping {damping:e}")]
    NotPositiveDefinite {
        /// Width of the gram.
        columns: usize,
        /// Where the factorisation stopped.
        pivot: usize,
        /// Share of the mean diagonal that had been added.
        damping: f64,
    },
    /// A statistic holds NaN or infinity.
    #[error("{what} holds a value that is not finite")]
    NotFinite {
        /// Which one.
        what: &'static str,
    },
    /// Blocks of inputs that cannot be removed from the weight.
    #[error("{remove} blocks of {block} inputs cannot be removed from {columns} with statistics of {width}")]
    Blocks {
        /// Inputs of the weight.
        columns: usize,
        /// Inputs of the statistics.
        width: usize,
        /// Inputs in a block.
        block: usize,
        /// Blocks to remove.
        remove: usize,
    },
    /// The run was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The tensor library failed.
    #[error("tensor backend failed")]
    Backend(#[from] candle_core::Error),
}

impl SolveError {
    /// What may be done about it.
    pub fn class(&self) -> FaultClass {
        match self {
            Self::Unsupported { .. } | Self::NotPositiveDefinite { .. } | Self::NotFinite { .. } => FaultClass::Reject,
            Self::Blocks { .. } => FaultClass::Bug,
            Self::Cancelled => FaultClass::RetryElsewhere,
            Self::Backend(_) => FaultClass::RetryElsewhere,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_unknown_method_is_answered_with_the_known_ones() {
        let message = build("sparsgpt", &json!({})).err().unwrap().to_string();
        assert!(
            message.contains("sparsgpt") && METHODS.iter().all(|method| message.contains(method.name)),
            "{message}"
        );
    }

    #[test]
    fn every_method_has_defaults_and_refuses_unknown_parameters() {
        for method in METHODS {
            let (_, filled) = build(method.name, &json!({})).unwrap();
            let (_, again) = build(method.name, &filled).unwrap();
            assert_eq!(filled, again);
            assert!(build(method.name, &json!({ "no_such_parameter": 1 })).is_err());
        }
    }
}
