//! What must always be true of a scheduler. Serves `debug_assert!`, the simulator and the tests alike.

use espalier_common::ids::{Unit, WorkerId};

use super::{Scheduler, UnitState};

/// An invariant that does not hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// A unit is leased to a worker that is not there or is busy with something else.
    #[error("{unit} is leased, but its worker does not run it")]
    LeaseWithoutWorker {
        /// The unit.
        unit: Unit,
    },
    /// A worker runs something that is not leased to it.
    #[error("a worker runs {unit}, which is not leased to it")]
    WorkerWithoutLease {
        /// The unit.
        unit: Unit,
    },
    /// A worker helps with a lease that is over, or its own, or while it has work of its own.
    #[error("a worker assists with {unit}, but cannot")]
    StrayAssistant {
        /// The unit.
        unit: Unit,
    },
    /// A unit waits for one that is committed, or was let loose before the one it waits for was.
    #[error("{unit} is out of order")]
    OutOfOrder {
        /// The unit.
        unit: Unit,
    },
    /// A unit is leased to a worker that it must not have yet.
    #[error("{unit} is leased before its wait is over")]
    TooEarly {
        /// The unit.
        unit: Unit,
    },
    /// A unit that ends the run is still tried.
    #[error("{unit} is poisoned, but the schedule goes on")]
    Poisoned {
        /// The unit.
        unit: Unit,
    },
    /// With the strategy `data`, some leaves are nobody's or two workers'.
    #[error("the shares of the calibration sequences are not all of them, each once")]
    Shares,
    /// With the strategy `data`, a worker has a share and is there, but has no part in the layer that is pruned.
    #[error("worker {worker} has a share, but no part in {unit}")]
    IdleShare {
        /// The worker.
        worker: WorkerId,
        /// The unit.
        unit: Unit,
    },
    /// A boundary is said to be held by nobody, or by a worker that is gone.
    #[error("boundary {boundary} is held by nobody that is there")]
    HeldByNobody {
        /// The boundary's index.
        boundary: u32,
    },
}

/// Checks a scheduler.
///
/// # Errors
/// The first invariant that does not hold.
pub fn check(scheduler: &Scheduler) -> Result<(), Broken> {
    for (unit, state) in &scheduler.units {
        if let UnitState::Leased { lease } = state {
            let runs = scheduler.workers.get(&lease.worker).is_some_and(|worker| worker.running == Some(*lease));
            if !runs || lease.unit != *unit {
                return Err(Broken::LeaseWithoutWorker { unit: *unit });
            }
            if !scheduler.trouble.get(unit).is_none_or(|trouble| trouble.may_have(lease.worker, scheduler.now)) {
                return Err(Broken::TooEarly { unit: *unit });
            }
        }
    }
    let poisoned = scheduler.trouble.iter().find(|(_, trouble)| trouble.is_poisoned(&scheduler.limits));
    if let Some((unit, _)) = poisoned.filter(|_| !scheduler.ended) {
        return Err(Broken::Poisoned { unit: *unit });
    }
    for worker in scheduler.workers.values() {
        if let Some(lease) = worker.running
            && scheduler.units.get(&lease.unit) != Some(&UnitState::Leased { lease })
        {
            return Err(Broken::WorkerWithoutLease { unit: lease.unit });
        }
    }
    for (worker, state) in &scheduler.workers {
        if let Some(lease) = state.assists
            && (state.running.is_some()
                || lease.worker == *worker
                || scheduler.units.get(&lease.unit) != Some(&UnitState::Leased { lease }))
        {
            return Err(Broken::StrayAssistant { unit: lease.unit });
        }
    }
    if !scheduler.shares.are_whole() {
        return Err(Broken::Shares);
    }
    let leased = scheduler.units.values().find_map(|state| match state {
        UnitState::Leased { lease } => Some(*lease),
        _ => None,
    });
    if let Some(lease) = leased.filter(|_| scheduler.keeps_shares()) {
        let has_part = |worker: &WorkerId| {
            let state = scheduler.workers.get(worker);
            state.is_none_or(|state| state.running == Some(lease) || state.assists == Some(lease))
        };
        if let Some(worker) = scheduler.shares.workers().find(|worker| !has_part(worker)) {
            return Err(Broken::IdleShare { worker, unit: lease.unit });
        }
        if scheduler.shares.of(lease.worker).is_empty() {
            return Err(Broken::IdleShare { worker: lease.worker, unit: lease.unit });
        }
    }
    for (unit, on) in scheduler.shape.units() {
        let blocked = matches!(scheduler.units[&unit], UnitState::Blocked { .. });
        let waits = on.is_some_and(|on| scheduler.units[&on] != UnitState::Committed);
        if blocked != waits && scheduler.units[&unit] != UnitState::Committed {
            return Err(Broken::OutOfOrder { unit });
        }
    }
    for (boundary, holders) in &scheduler.held {
        if holders.is_empty() || holders.iter().any(|worker| !scheduler.workers.contains_key(worker)) {
            return Err(Broken::HeldByNobody { boundary: boundary.0 });
        }
    }
    Ok(())
}
