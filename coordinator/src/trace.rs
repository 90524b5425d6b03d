//! What a run's trace tells of its units: a span for each layer, and below it one for each lease, from when it was given to when
//! the loop heard how it ended. Only told, never asked: nothing is decided by it.

use std::collections::{BTreeMap, BTreeSet};

use espalier_common::ids::{LayerIndex, Lease, RunId, Unit, WorkerId};
use espalier_common::report::Outcome;
use espalier_gate::Tracer;
use espalier_gate::trace::{Context, Open, Scope, Side, TraceId};

use crate::events::About;
use crate::schedule::Record;

/// Begins the span of a run. Its trace is named by the run: one that is taken up again goes on with it.
pub(crate) fn run(tracer: &Tracer, id: &RunId, about: &About, committed: usize) -> Open {
    let open = tracer.begin(TraceId::of(&format!("espalier run {id}")), "run");
    open.with("espalier.run", id.0.clone())
        .with("espalier.model", about.model.clone())
        .with("espalier.method", about.method.clone())
        .with("espalier.pattern", about.pattern.clone())
        .with("espalier.propagation", about.propagation.clone())
        .with("espalier.layers_committed_before", committed)
}

/// The spans of one schedule's units.
pub struct UnitSpans {
    run: Scope,
    /// What the schedule is for.
    stage: &'static str,
    /// Whether it prunes: its units are parts of layers.
    has_layers: bool,
    layers: BTreeMap<LayerIndex, Open>,
    /// Layers that are pruned, and whose spans have ended.
    pruned: BTreeSet<LayerIndex>,
    units: BTreeMap<Lease, Open>,
}

impl UnitSpans {
    /// Those of a schedule that makes layers.
    pub(crate) fn of_layers(run: &Open) -> Self {
        Self::new(run.scope(), "prune", true)
    }

    /// Those of a schedule whose units stand for themselves.
    pub(crate) fn of_stage(run: &Open, stage: &'static str) -> Self {
        Self::new(run.scope(), stage, false)
    }

    fn new(run: Scope, stage: &'static str, has_layers: bool) -> Self {
        Self { run, stage, has_layers, layers: BTreeMap::new(), pruned: BTreeSet::new(), units: BTreeMap::new() }
    }

    /// Takes note of a record that is durable; `name` tells a worker's.
    pub(crate) fn note(&mut self, record: &Record, name: impl Fn(WorkerId) -> String) {
        match record {
            Record::Leased { lease } => self.begin(*lease, name(lease.worker)),
            Record::Committed { lease, outcome } => self.commit(*lease, outcome),
            Record::Failed { lease, fault } => self.fail(*lease, &fault.message),
        }
    }

    /// What goes along with the call that starts a unit.
    pub(crate) fn context(&self, lease: &Lease) -> Option<Context> {
        self.units.get(lease)?.scope().context()
    }

    /// The leases of a worker that is gone came to nothing.
    pub(crate) fn lose(&mut self, worker: WorkerId, reason: &str) {
        let lost: Vec<Lease> = self.units.keys().filter(|lease| lease.worker == worker).copied().collect();
        lost.into_iter().for_each(|lease| self.fail(lease, &format!("the worker is lost: {reason}")));
    }

    /// The schedule has ended, and with it whatever it had begun.
    pub(crate) fn end(&mut self, reason: &str) {
        let units = std::mem::take(&mut self.units).into_values();
        units.chain(std::mem::take(&mut self.layers).into_values()).for_each(|open| open.close(Err::<(), _>(reason)));
    }

    fn begin(&mut self, lease: Lease, worker: String) {
        let layer = match lease.unit {
            Unit::Prune(layer) | Unit::Forward(layer) => Some(layer),
            Unit::Evaluate(_) => None,
        };
        let place = match layer.filter(|layer| self.has_layers && !self.pruned.contains(layer)) {
            Some(layer) => {
                let open = || self.run.open(format!("layer {layer}")).with("espalier.layer", layer.0);
                self.layers.entry(layer).or_insert_with(open).scope()
            }
            None => self.run.clone(),
        };
        let mut open = place
            .open(lease.unit.to_string())
            .on(Side::Caller)
            .with("espalier.stage", self.stage)
            .with("espalier.worker", worker)
            .with("espalier.worker_number", lease.worker.0)
            .with("espalier.attempt", lease.attempt.0);
        if let Some(layer) = layer {
            open.set("espalier.layer", layer.0);
        }
        self.units.insert(lease, open);
    }

    fn commit(&mut self, lease: Lease, outcome: &Outcome) {
        // Records of an earlier life are not noted, so a lease that is committed was begun here, or is of no interest.
        let Some(mut open) = self.units.remove(&lease) else { return };
        open.set("espalier.outcome", "committed");
        if let Outcome::Pruned { assistants_lost, links, .. } = outcome {
            open.set("espalier.assistants", links.len());
            open.set("espalier.assistants_lost", *assistants_lost);
        }
        drop(open);
        if let Unit::Prune(layer) = lease.unit {
            self.layers.remove(&layer);
            self.pruned.insert(layer);
        }
    }

    fn fail(&mut self, lease: Lease, reason: &str) {
        if let Some(mut open) = self.units.remove(&lease) {
            open.set("espalier.outcome", "failed");
            open.fail(reason);
        }
    }
}
