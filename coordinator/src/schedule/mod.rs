//! Who does what, when, and what follows a failure: a pure state machine. No async, no clock, no IO, no tensors.

mod event;
pub mod invariants;
mod policy;
mod shares;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use espalier_common::clock::Millis;
use espalier_common::fault::Fault;
use espalier_common::ids::{Attempt, Boundary, LayerIndex, Lease, Unit, WorkerId};
use espalier_common::report::Outcome;

pub use event::{Action, Event, Failure, Limits, Origin, Record, Shape};

use self::policy::{Trouble, Verdict};
use self::shares::Shares;
use crate::plan::partition;

/// Where a unit stands.
///
/// ```text
/// Blocked ──(its predecessor commits)──▶ Ready ──lease──▶ Leased ──done──▶ Committed
///                                          ▲                │
///                                          └── lost/failed ─┘
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UnitState {
    /// Waits for another unit.
    Blocked {
        /// The other unit.
        on: Unit,
    },
    /// May be leased, to a worker that it just failed on after a while.
    Ready,
    /// A worker has it.
    Leased {
        /// Under this lease; reports under any other are dropped.
        lease: Lease,
    },
    /// Done for good.
    Committed,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct WorkerState {
    last_seen: Millis,
    speed: u64,
    running: Option<Lease>,
    /// The lease of another worker that it helps with. It is free again when the lease ends, however it ends.
    assists: Option<Lease>,
    /// What the unit it runs began with.
    began_with: Origin,
}

/// The scheduler of one run (or of one evaluation).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scheduler {
    shape: Shape,
    limits: Limits,
    now: Millis,
    units: BTreeMap<Unit, UnitState>,
    workers: BTreeMap<WorkerId, WorkerState>,
    /// Owner of each layer that is not committed yet; decides placement, never the result.
    owners: BTreeMap<LayerIndex, WorkerId>,
    held: BTreeMap<Boundary, BTreeSet<WorkerId>>,
    /// Boundaries in the run's store.
    stored: BTreeSet<Boundary>,
    /// With the strategy `data`: who keeps what.
    shares: Shares,
    trouble: BTreeMap<Unit, Trouble>,
    alone_since: Option<Millis>,
    ended: bool,
}

impl Scheduler {
    /// A scheduler with nothing done and nobody there.
    pub fn new(shape: Shape, limits: Limits) -> Self {
        let units = shape
            .units()
            .into_iter()
            .map(|(unit, on)| (unit, on.map_or(UnitState::Ready, |on| UnitState::Blocked { on })))
            .collect();
        Self {
            shape,
            limits,
            now: Millis(0),
            units,
            workers: BTreeMap::new(),
            owners: BTreeMap::new(),
            held: BTreeMap::new(),
            stored: BTreeSet::new(),
            shares: Shares::default(),
            trouble: BTreeMap::new(),
            alone_since: Some(Millis(0)),
            ended: false,
        }
    }

    /// Sets the time at which the schedule begins: patience is counted from here.
    #[must_use]
    pub fn starting_at(mut self, now: Millis) -> Self {
        self.now = now;
        self.alone_since = Some(now);
        self
    }

    /// Rebuilds what `records` say is done. Leases of the past are not revived: whoever held one must be leased again, so a
    /// report under an old lease is dropped (its attempt number is spent).
    pub fn replay<'a>(shape: Shape, limits: Limits, records: impl IntoIterator<Item = &'a Record>) -> Self {
        let mut scheduler = Self::new(shape, limits);
        for record in records {
            match record {
                Record::Leased { lease } => {
                    let trouble = scheduler.trouble.entry(lease.unit).or_default();
                    trouble.leases = trouble.leases.max(lease.attempt.0);
                }
                Record::Committed { lease, outcome } => {
                    // Older ones were deleted, or will be with the run.
                    if let Some(boundary) = stored_boundary(lease.unit, outcome) {
                        scheduler.stored = BTreeSet::from([boundary]);
                    }
                    scheduler.mark_committed(lease.unit);
                }
                // Faults of an earlier life do not count against a resumed run: its machines are others.
                Record::Failed { .. } => {}
            }
        }
        scheduler
    }

    /// Advances on one event.
    #[must_use]
    pub fn step(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.ended {
            return actions;
        }
        let holds_back = matches!(event, Event::WorkerJoined { more_come: true, .. });
        match event {
            Event::WorkerJoined { worker, speed, .. } => self.add(worker, speed),
            Event::WorkerLost { worker } => self.remove(worker),
            Event::Heartbeat { worker } => self.hear(worker),
            Event::UnitDone { lease, outcome, held } if self.holds(lease) => {
                self.commit(lease, outcome, &held, &mut actions);
            }
            Event::UnitFailed { lease, fault } if self.holds(lease) => self.fail(lease, fault, &mut actions),
            // An older lease: that worker was given up on, and what it made is garbage.
            Event::UnitDone { .. } | Event::UnitFailed { .. } => {}
            Event::Tick { now } => self.pass_time(now, &mut actions),
        }
        if !self.ended && !holds_back {
            self.lease_ready_units(&mut actions);
            self.finish_if_done(&mut actions);
        }
        debug_assert_eq!(invariants::check(self), Ok(()));
        actions
    }

    /// Whether every unit is committed.
    pub fn is_finished(&self) -> bool {
        self.units.values().all(|state| *state == UnitState::Committed)
    }

    /// Every unit and where it stands.
    pub fn units(&self) -> impl Iterator<Item = (Unit, &UnitState)> {
        self.units.iter().map(|(unit, state)| (*unit, state))
    }

    /// The workers that are there.
    pub fn workers(&self) -> impl Iterator<Item = WorkerId> {
        self.workers.keys().copied()
    }

    fn holds(&self, lease: Lease) -> bool {
        matches!(self.units.get(&lease.unit), Some(UnitState::Leased { lease: held }) if *held == lease)
    }

    fn add(&mut self, worker: WorkerId, speed: u64) {
        let state =
            WorkerState { last_seen: self.now, speed, running: None, assists: None, began_with: Origin::Tokens };
        self.workers.insert(worker, state);
        self.alone_since = None;
        self.assign_owners();
    }

    fn remove(&mut self, worker: WorkerId) {
        let Some(state) = self.workers.remove(&worker) else { return };
        if let Some(lease) = state.running {
            self.units.insert(lease.unit, UnitState::Ready);
            self.dismiss_assistants(lease);
        }
        for holders in self.held.values_mut() {
            holders.remove(&worker);
        }
        self.held.retain(|_, holders| !holders.is_empty());
        if self.workers.is_empty() {
            self.alone_since = Some(self.now);
        }
        self.assign_owners();
    }

    fn hear(&mut self, worker: WorkerId) {
        if let Some(state) = self.workers.get_mut(&worker) {
            state.last_seen = self.now;
        }
    }

    fn pass_time(&mut self, now: Millis, actions: &mut Vec<Action>) {
        self.now = self.now.max(now);
        let silent: Vec<WorkerId> = self
            .workers
            .iter()
            .filter(|(_, state)| state.last_seen.after(self.limits.worker_silence) < self.now)
            .map(|(worker, _)| *worker)
            .collect();
        for worker in silent {
            self.remove(worker);
        }
        if let Some(since) = self.alone_since
            && since.after(self.limits.without_workers) < self.now
        {
            let waited_seconds = (self.now.0 - since.0) / 1000;
            self.end(Action::Fail(Failure::NoWorkers { waited_seconds }), actions);
        }
    }

    /// Spreads the layers that are not committed over the workers that are there, contiguously, by bytes and speed. A layer
    /// that is being worked on stays where it is.
    fn assign_owners(&mut self) {
        let pending: Vec<LayerIndex> = (0..self.shape.layer_bytes().len() as u32)
            .map(LayerIndex)
            .filter(|layer| self.units.get(&self.shape.last_unit(*layer)) != Some(&UnitState::Committed))
            .collect();
        let workers: Vec<WorkerId> = self.workers.keys().copied().collect();
        self.owners.clear();
        if workers.is_empty() {
            return;
        }
        if self.keeps_shares() {
            // No hidden states travel, whoever has the lease. The fastest of those with a share has all: some of its work is
            // its own.
            let has_share = |worker: &WorkerId| self.shares.workers().any(|other| other == *worker);
            let nobody_has = !workers.iter().any(has_share);
            let may = self.workers.iter().filter(|(worker, _)| nobody_has || has_share(worker));
            let fastest = may.max_by_key(|(worker, state)| (state.speed, std::cmp::Reverse(**worker)));
            let owner = *fastest.expect("somebody is there").0;
            self.owners = pending.into_iter().map(|layer| (layer, owner)).collect();
            return;
        }
        let bytes: Vec<u64> = pending.iter().map(|layer| self.shape.layer_bytes()[layer.0 as usize]).collect();
        let speeds: Vec<u64> = self.workers.values().map(|state| state.speed).collect();
        let parts = partition::by_speed(&bytes, &speeds);
        self.owners = pending.iter().zip(parts).map(|(layer, part)| (*layer, workers[part])).collect();
    }

    fn commit(&mut self, lease: Lease, outcome: Outcome, held: &[Boundary], actions: &mut Vec<Action>) {
        self.free(lease);
        if !self.keeps_shares() {
            for boundary in held {
                self.held.entry(*boundary).or_default().insert(lease.worker);
            }
        }
        let stored = stored_boundary(lease.unit, &outcome);
        actions.push(Action::Record(Record::Committed { lease, outcome }));
        if let Some(boundary) = stored {
            let older = std::mem::replace(&mut self.stored, BTreeSet::from([boundary]));
            actions.extend(older.into_iter().map(|boundary| Action::Discard { boundary }));
        }
        self.mark_committed(lease.unit);
        self.release_what_nobody_needs(actions);
        if self.keeps_shares() && self.is_finished() {
            self.release_shares(actions);
        }
    }

    /// Whether workers keep their shares (strategy `data`): what is kept is theirs to know, and no boundary is held whole.
    fn keeps_shares(&self) -> bool {
        matches!(self.shape, Shape::PruneTogether { .. })
    }

    /// Lets go of everyone's shares once all layers are pruned. Until then each worker drops what it needs no more by itself, when
    /// it has its share of the next boundary.
    fn release_shares(&self, actions: &mut Vec<Action>) {
        let boundaries: Vec<Boundary> = (0..self.shape.layer_bytes().len() as u32).map(Boundary).collect();
        let release = |worker| Action::Release { worker, boundaries: boundaries.clone() };
        actions.extend(self.workers.keys().copied().map(release));
    }

    fn mark_committed(&mut self, unit: Unit) {
        self.units.insert(unit, UnitState::Committed);
        for state in self.units.values_mut() {
            if *state == (UnitState::Blocked { on: unit }) {
                *state = UnitState::Ready;
            }
        }
    }

    fn free(&mut self, lease: Lease) {
        if let Some(worker) = self.workers.get_mut(&lease.worker)
            && worker.running == Some(lease)
        {
            worker.running = None;
        }
        self.dismiss_assistants(lease);
    }

    fn dismiss_assistants(&mut self, lease: Lease) {
        for worker in self.workers.values_mut().filter(|worker| worker.assists == Some(lease)) {
            worker.assists = None;
        }
    }

    fn fail(&mut self, lease: Lease, fault: Fault, actions: &mut Vec<Action>) {
        self.doubt_origin(lease.worker);
        self.free(lease);
        self.units.insert(lease.unit, UnitState::Ready);
        actions.push(Action::Record(Record::Failed { lease, fault: fault.clone() }));
        let trouble = self.trouble.entry(lease.unit).or_default();
        let verdict = trouble.note(lease, fault.class, self.now, self.workers.keys().copied(), &self.limits);
        if verdict == Verdict::End {
            let attempts = trouble.failures;
            self.end(Action::Fail(Failure::Unit { lease, fault, attempts }), actions);
        }
    }

    /// What a failed unit began with may be why it failed (its holder is gone, or dropped it): the next try begins elsewhere.
    fn doubt_origin(&mut self, worker: WorkerId) {
        match self.workers.get(&worker).map(|state| state.began_with) {
            Some(Origin::Held { boundary, by }) => {
                if let Some(holders) = self.held.get_mut(&boundary) {
                    holders.remove(&by);
                    if holders.is_empty() {
                        self.held.remove(&boundary);
                    }
                }
            }
            Some(Origin::Stored { boundary }) => {
                self.stored.remove(&boundary);
            }
            Some(Origin::Tokens) | None => {}
        }
    }

    fn idle(&self) -> Vec<WorkerId> {
        let idle = self.workers.iter().filter(|(_, state)| state.running.is_none() && state.assists.is_none());
        idle.map(|(worker, _)| *worker).collect()
    }

    /// Gives every idle worker the unit that suits it best.
    fn lease_ready_units(&mut self, actions: &mut Vec<Action>) {
        let idle = self.idle();
        // Owners first, so that nobody takes away what its owner is free to do.
        for pass in [Self::best_own_unit, Self::best_other_unit] {
            for worker in &idle {
                if self.workers[worker].running.is_none()
                    && let Some(unit) = pass(self, *worker)
                {
                    self.lease(unit, *worker, actions);
                }
            }
        }
        self.name_assistants(actions);
    }

    /// In a chain one layer is pruned at a time: whoever has nothing to do when it begins helps with it.
    fn name_assistants(&mut self, actions: &mut [Action]) {
        if !matches!(self.shape, Shape::PruneChain { .. } | Shape::PruneTogether { .. }) {
            return;
        }
        let begun = actions.iter_mut().find_map(|action| match action {
            Action::Start { lease, origin, assistants, shares, .. } => Some((*lease, *origin, assistants, shares)),
            _ => None,
        });
        let Some((lease, origin, assistants, shares)) = begun else { return };
        *assistants = self.idle();
        for worker in &*assistants {
            self.workers.get_mut(worker).expect("idle workers are there").assists = Some(lease);
        }
        if let (Shape::PruneTogether { layer_bytes, most_hands }, Unit::Prune(layer)) = (&self.shape, lease.unit) {
            let behind = layer.0.saturating_sub(origin.boundary().0) as usize;
            let left = layer_bytes.len().saturating_sub(layer.0 as usize);
            self.shares.settle(lease.worker, assistants, *most_hands, (behind, left));
            *shares = Some(assistants.iter().map(|worker| self.shares.of(*worker)).collect());
        }
    }

    fn is_ready_for(&self, unit: Unit, worker: WorkerId) -> bool {
        let is_over = self.trouble.get(&unit).is_none_or(|trouble| trouble.may_have(worker, self.now));
        self.units[&unit] == UnitState::Ready && is_over && !self.is_shunned(unit, worker)
    }

    /// A unit for which a worker was given up on goes elsewhere, as long as there is an elsewhere.
    fn is_shunned(&self, unit: Unit, worker: WorkerId) -> bool {
        self.trouble.get(&unit).is_some_and(|trouble| {
            trouble.is_given_up(worker) && self.workers.keys().any(|other| !trouble.is_given_up(*other))
        })
    }

    fn owner(&self, unit: Unit) -> Option<WorkerId> {
        match unit {
            Unit::Forward(layer) | Unit::Prune(layer) => self.owners.get(&layer).copied(),
            Unit::Evaluate(_) => None,
        }
    }

    /// The first ready unit the worker owns. `Unit`'s order puts forwards before prunings: others wait for them.
    fn best_own_unit(&self, worker: WorkerId) -> Option<Unit> {
        self.units.keys().copied().find(|unit| self.is_ready_for(*unit, worker) && self.owner(*unit) == Some(worker))
    }

    /// A ready unit whose owner cannot start it now: the first forward or share, or the last pruning (the one its owner would
    /// come to last).
    fn best_other_unit(&self, worker: WorkerId) -> Option<Unit> {
        let ready = |unit: &&Unit| {
            self.is_ready_for(**unit, worker)
                && self.owner(**unit).is_none_or(|owner| {
                    self.workers.get(&owner).is_none_or(|owner| owner.running.is_some())
                        || self.is_shunned(**unit, owner)
                })
        };
        let first = self.units.keys().find(ready)?;
        let last = self.units.keys().rev().find(ready)?;
        Some(if matches!(first, Unit::Prune(_)) { *last } else { *first })
    }

    fn lease(&mut self, unit: Unit, worker: WorkerId, actions: &mut Vec<Action>) {
        let trouble = self.trouble.entry(unit).or_default();
        trouble.leases += 1;
        let lease = Lease { unit, worker, attempt: Attempt(trouble.leases) };
        let origin = self.origin(unit, worker);
        self.units.insert(unit, UnitState::Leased { lease });
        let state = self.workers.get_mut(&worker).expect("only workers that are there are leased to");
        state.running = Some(lease);
        state.began_with = origin;
        actions.push(Action::Record(Record::Leased { lease }));
        actions.push(Action::Start {
            lease,
            origin,
            keeps_output: self.keeps_output(unit, worker),
            assistants: Vec::new(),
            shares: None,
        });
    }

    /// In a chain, outputs that another worker will need, and those behind every so many layers, are stored.
    fn keeps_output(&self, unit: Unit, worker: WorkerId) -> bool {
        let Unit::Prune(layer) = unit else { return false };
        let layer_bytes = match &self.shape {
            Shape::PruneChain { layer_bytes } | Shape::PruneTogether { layer_bytes, .. } => layer_bytes,
            _ => return false,
        };
        let next = layer.0 + 1;
        let is_stage_end =
            !self.keeps_shares() && self.owners.get(&LayerIndex(next)).is_some_and(|owner| *owner != worker);
        let every = self.limits.stored_every;
        every > 0 && (next as usize) < layer_bytes.len() && (is_stage_end || next.is_multiple_of(every))
    }

    /// The nearest boundary at or before the unit's layer that somebody holds, the worker itself if it does, or that is stored.
    fn origin(&self, unit: Unit, worker: WorkerId) -> Origin {
        let (Unit::Forward(layer) | Unit::Prune(layer)) = unit else { return Origin::Tokens };
        let stored = self.stored.range(..=Boundary(layer.0)).next_back().copied();
        let held = self.held.range(..=Boundary(layer.0)).next_back();
        let held = held.filter(|(boundary, _)| stored.is_none_or(|stored| **boundary >= stored));
        let otherwise = stored.map_or(Origin::Tokens, |boundary| Origin::Stored { boundary });
        held.map_or(otherwise, |(boundary, holders)| {
            let by = if holders.contains(&worker) {
                worker
            } else {
                *holders.first().expect("boundaries without holders are dropped")
            };
            Origin::Held { boundary: *boundary, by }
        })
    }

    /// Boundary `b` is needed while layer `b` is not pruned, or its dense forward is still to come.
    fn is_needed(&self, boundary: Boundary) -> bool {
        let layer = LayerIndex(boundary.0);
        [Unit::Prune(layer), Unit::Forward(layer)]
            .iter()
            .any(|unit| self.units.get(unit).is_some_and(|state| *state != UnitState::Committed))
    }

    fn release_what_nobody_needs(&mut self, actions: &mut Vec<Action>) {
        let useless: Vec<Boundary> = self.held.keys().copied().filter(|boundary| !self.is_needed(*boundary)).collect();
        let mut by_worker: BTreeMap<WorkerId, Vec<Boundary>> = BTreeMap::new();
        for boundary in useless {
            for worker in self.held.remove(&boundary).unwrap_or_default() {
                by_worker.entry(worker).or_default().push(boundary);
            }
        }
        actions.extend(by_worker.into_iter().map(|(worker, boundaries)| Action::Release { worker, boundaries }));
    }

    fn finish_if_done(&mut self, actions: &mut Vec<Action>) {
        if self.is_finished() {
            self.end(Action::Finish, actions);
        }
    }

    fn end(&mut self, action: Action, actions: &mut Vec<Action>) {
        self.ended = true;
        actions.push(action);
    }
}

/// The boundary that a committed unit left in the store.
fn stored_boundary(unit: Unit, outcome: &Outcome) -> Option<Boundary> {
    match (unit, outcome) {
        (Unit::Prune(layer), Outcome::Pruned { boundary: Some(_), .. }) => Some(Boundary(layer.0 + 1)),
        _ => None,
    }
}
