//! Names of things: a bare integer never names one.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Names one run: one job on one set of calibration tokens.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RunId(pub String);

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

macro_rules! integer_id {
    ($(#[$doc:meta])* $name:ident($integer:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $integer);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

integer_id!(
    /// Names one worker process, as the coordinator that registered it numbers them.
    WorkerId(u64)
);
integer_id!(
    /// Index of a decoder layer, from 0.
    LayerIndex(u32)
);
integer_id!(
    /// Index of a boundary: boundary `b` is the input of layer `b`, boundary 0 the output of the embedding.
    Boundary(u32)
);
integer_id!(
    /// Counts the leases given for one unit, from 1.
    Attempt(u32)
);

/// A unit of work that is leased to one worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Runs a dense layer, from its boundary to the next.
    Forward(LayerIndex),
    /// Prunes a layer.
    Prune(LayerIndex),
    /// Evaluates one share of the evaluation windows.
    Evaluate(u32),
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forward(layer) => write!(f, "forward {layer}"),
            Self::Prune(layer) => write!(f, "prune {layer}"),
            Self::Evaluate(share) => write!(f, "evaluate {share}"),
        }
    }
}

/// The right of one worker to do one unit, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Lease {
    /// What is to be done.
    pub unit: Unit,
    /// Who does it.
    pub worker: WorkerId,
    /// Which try this is.
    pub attempt: Attempt,
}

impl fmt::Display for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} on worker {} (attempt {})", self.unit, self.worker, self.attempt)
    }
}
