//! What happens to the scheduler, and what it wants done.

use std::ops::Range;
use std::time::Duration;

use espalier_common::clock::Millis;
use espalier_common::fault::Fault;
use espalier_common::ids::{Boundary, LayerIndex, Lease, Unit, WorkerId};
use espalier_common::job::Propagation;
use espalier_common::report::Outcome;
use serde::{Deserialize, Serialize};

use crate::plan::strategy::Strategy;

/// What the scheduler is told. Time is data (`Tick`), so that a run replays from its events alone.
#[derive(Debug, Clone, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "events are few and each is moved once, into the scheduler")]
pub enum Event {
    /// A worker registered and was prepared for the run.
    WorkerJoined {
        /// Who.
        worker: WorkerId,
        /// How fast it measured itself, in any unit that all workers share; 0 if it did not.
        speed: u64,
        /// Whether others of the same beginning are on their way. Nothing is leased because of this one then, so that the first
        /// layer of a chain has assistants too; the next event leases, whatever it is.
        more_come: bool,
    },
    /// A worker left, or its process was seen to end.
    WorkerLost {
        /// Who.
        worker: WorkerId,
    },
    /// A worker is alive.
    Heartbeat {
        /// Who.
        worker: WorkerId,
    },
    /// A unit ended well, under this lease.
    UnitDone {
        /// The lease it ended under.
        lease: Lease,
        /// What came of it.
        outcome: Outcome,
        /// Boundaries that the worker now holds.
        held: Vec<Boundary>,
    },
    /// A unit failed, under this lease.
    UnitFailed {
        /// The lease it failed under.
        lease: Lease,
        /// Why.
        fault: Fault,
    },
    /// Time passed.
    Tick {
        /// The time it is.
        now: Millis,
    },
}

/// Where a unit's input comes from, in the scheduler's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The calibration tokens.
    Tokens,
    /// A boundary that a worker holds (the leased worker itself, or another).
    Held {
        /// Which boundary.
        boundary: Boundary,
        /// Who holds it.
        by: WorkerId,
    },
    /// A boundary that a committed layer left in the run's store.
    Stored {
        /// Which boundary.
        boundary: Boundary,
    },
}

impl Origin {
    /// The boundary it starts from.
    pub fn boundary(self) -> Boundary {
        match self {
            Self::Tokens => Boundary(0),
            Self::Held { boundary, .. } | Self::Stored { boundary } => boundary,
        }
    }
}

/// What the scheduler wants done. Actions are carried out in order; a `Record` is durable before the next one starts.
#[allow(clippy::large_enum_variant, reason = "actions are few and each is moved once, to the driver")]
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Append to the journal.
    Record(Record),
    /// Start a unit on the lease's worker.
    Start {
        /// The lease.
        lease: Lease,
        /// Where its input comes from; layers between it and the unit's are run again on the way.
        origin: Origin,
        /// Whether a pruned layer's output is also left in the run's store.
        keeps_output: bool,
        /// Workers that have nothing to do until the unit ends, and may help. What comes of it does not depend on them.
        assistants: Vec<WorkerId>,
        /// With the strategy `data`: the leaves of each assistant, in their order; the rest is the lease's worker's.
        shares: Option<Vec<Range<usize>>>,
    },
    /// Delete a boundary from the run's store: a later one is there.
    Discard {
        /// Which.
        boundary: Boundary,
    },
    /// Tell a worker to drop hidden states.
    Release {
        /// Who.
        worker: WorkerId,
        /// Which.
        boundaries: Vec<Boundary>,
    },
    /// Every unit is committed.
    Finish,
    /// The run cannot go on.
    Fail(Failure),
}

/// Why a run cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Failure {
    /// A unit failed for good.
    Unit {
        /// The last lease it failed under.
        lease: Lease,
        /// Why.
        fault: Fault,
        /// How many leases it had.
        attempts: u32,
    },
    /// No worker is left, and none came back in time.
    NoWorkers {
        /// Seconds waited.
        waited_seconds: u64,
    },
}

/// What the journal keeps of scheduling: enough to know what is done, and who was trusted with what.
#[allow(clippy::large_enum_variant, reason = "most records of a run are the large ones: of layers that are done")]
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Record {
    /// A lease was given.
    Leased {
        /// The lease.
        lease: Lease,
    },
    /// A unit is done: from here on it is never computed again.
    Committed {
        /// The lease it was done under.
        lease: Lease,
        /// What came of it.
        outcome: Outcome,
    },
    /// A lease ended badly.
    Failed {
        /// The lease.
        lease: Lease,
        /// Why.
        fault: Fault,
    },
}

/// How patient and how careful the scheduler is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A worker that was not heard of for this long is lost.
    pub worker_silence: Duration,
    /// Without any worker for this long, the run is given up.
    pub without_workers: Duration,
    /// Failures of one unit on one worker after which that worker is given up on for it.
    pub attempts: u32,
    /// Workers given up on for one unit after which the run ends with its last fault.
    pub poisoned_on: u32,
    /// In a chain, the hidden states behind every so many layers, and those that go to another worker, are also stored, so
    /// that a run which loses its workers begins there again and not at the tokens; 0: never.
    pub stored_every: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            worker_silence: Duration::from_secs(15),
            without_workers: Duration::from_secs(60),
            attempts: 3,
            poisoned_on: 3,
            stored_every: 0,
        }
    }
}

/// What has to be done, before any of it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shape {
    /// Layers in a chain: each sees the pruned ones before it.
    PruneChain {
        /// Bytes of each layer.
        layer_bytes: Vec<u64>,
    },
    /// The same chain, in which every worker keeps its share of the calibration sequences from layer to layer.
    PruneTogether {
        /// Bytes of each layer.
        layer_bytes: Vec<u64>,
        /// As many workers may have a share.
        most_hands: usize,
    },
    /// Layers on dense inputs: a chain of dense forwards, and prunings that only wait for their input.
    PruneApart {
        /// Bytes of each layer.
        layer_bytes: Vec<u64>,
    },
    /// A chain of dense layers, each looked at as it is run; what is found is all that stays.
    Survey {
        /// Bytes of each layer.
        layer_bytes: Vec<u64>,
    },
    /// Independent shares of the evaluation windows, or independent trials.
    Evaluate {
        /// Index of the first one: two evaluations of one run must not share leases.
        first: u32,
        /// Number of shares.
        shares: u32,
    },
}

impl Shape {
    /// The shape of pruning layers of these bytes; `most_hands` workers may keep a share with the strategy `data`, of which there
    /// is nothing where layers do not wait for each other.
    pub fn of_pruning(mode: Propagation, strategy: Strategy, layer_bytes: Vec<u64>, most_hands: usize) -> Self {
        match (mode, strategy) {
            (Propagation::Pruned, Strategy::Layers) => Self::PruneChain { layer_bytes },
            (Propagation::Pruned, Strategy::Data) => Self::PruneTogether { layer_bytes, most_hands },
            (Propagation::Dense, _) => Self::PruneApart { layer_bytes },
        }
    }

    /// Every unit, with the one unit it waits for.
    pub(super) fn units(&self) -> Vec<(Unit, Option<Unit>)> {
        let layers = |bytes: &[u64]| (0..bytes.len() as u32).map(LayerIndex);
        let before = |layer: LayerIndex| layer.0.checked_sub(1).map(LayerIndex);
        match self {
            Self::PruneChain { layer_bytes } | Self::PruneTogether { layer_bytes, .. } => {
                layers(layer_bytes).map(|layer| (Unit::Prune(layer), before(layer).map(Unit::Prune))).collect()
            }
            Self::PruneApart { layer_bytes } => {
                let last = LayerIndex(layer_bytes.len().saturating_sub(1) as u32);
                let forwards = layers(layer_bytes)
                    .filter(|&layer| layer != last)
                    .map(|layer| (Unit::Forward(layer), before(layer).map(Unit::Forward)));
                let prunes = layers(layer_bytes).map(|layer| (Unit::Prune(layer), before(layer).map(Unit::Forward)));
                forwards.chain(prunes).collect()
            }
            Self::Survey { layer_bytes } => {
                layers(layer_bytes).map(|layer| (Unit::Forward(layer), before(layer).map(Unit::Forward))).collect()
            }
            Self::Evaluate { first, shares } => {
                (*first..first + shares).map(|share| (Unit::Evaluate(share), None)).collect()
            }
        }
    }

    /// Bytes of each layer; empty for an evaluation.
    pub(super) fn layer_bytes(&self) -> &[u64] {
        match self {
            Self::PruneChain { layer_bytes }
            | Self::PruneTogether { layer_bytes, .. }
            | Self::PruneApart { layer_bytes }
            | Self::Survey { layer_bytes } => layer_bytes,
            Self::Evaluate { .. } => &[],
        }
    }

    /// The unit that a layer is done with.
    pub(super) fn last_unit(&self, layer: LayerIndex) -> Unit {
        match self {
            Self::Survey { .. } => Unit::Forward(layer),
            _ => Unit::Prune(layer),
        }
    }
}
