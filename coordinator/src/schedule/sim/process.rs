//! The worker's side: what is sent to a process, what it holds, and what it computes.

use std::collections::BTreeMap;
use std::rc::Rc;

use espalier_common::digest::Digest;
use espalier_common::fault::FaultClass;
use espalier_common::report::{Artifact, LayerSurvey};

use super::super::*;
use super::{Kind, Provenance, World};

/// Hidden states at a boundary: the layers that made them, first to last; `None` for a layer that was run dense.
pub(super) type States = Rc<Vec<Option<Digest>>>;

/// What is sent to a worker.
#[derive(Debug, Clone)]
pub(super) enum Order {
    Start { lease: Lease, from: From, replay: Vec<Digest>, keeps_output: bool },
    Release(Vec<Boundary>),
}

#[derive(Debug, Clone, Copy)]
pub(super) enum From {
    Tokens,
    Held(Boundary),
    Peer { process: usize, boundary: Boundary },
    Stored { boundary: Boundary, artifact: Digest },
}

#[derive(Debug, Clone)]
pub(super) enum Message {
    ToWorker { process: usize, order: Order },
    ToCoordinator(Event),
}

/// A worker process. It is numbered anew with every registration, and holds what it holds.
#[derive(Debug, Default)]
pub(super) struct Process {
    pub(super) number: Option<WorkerId>,
    pub(super) is_dead: bool,
    pub(super) holdings: BTreeMap<Boundary, States>,
    pub(super) newest: BTreeMap<Unit, Attempt>,
    pub(super) queue: Vec<Task>,
}

/// A unit as it waits in a process.
#[derive(Debug, Clone)]
pub(super) struct Task {
    pub(super) lease: Lease,
    pub(super) from: From,
    pub(super) replay: Vec<Digest>,
    pub(super) keeps_output: bool,
}

impl World {
    pub(super) fn deliver(&mut self, message: Message, may_crash: bool) -> Result<(), String> {
        match message {
            Message::ToCoordinator(event) => self.tell(event, may_crash),
            Message::ToWorker { process, order } => {
                let there = &mut self.processes[process];
                match order {
                    _ if there.is_dead => {}
                    Order::Release(boundaries) => {
                        there.holdings.retain(|boundary, _| !boundaries.contains(boundary));
                    }
                    Order::Start { lease, from, replay, keeps_output } => {
                        let newest = there.newest.entry(lease.unit).or_insert(Attempt(0));
                        if lease.attempt > *newest {
                            *newest = lease.attempt;
                            there.queue.retain(|task| task.lease.unit != lease.unit);
                            there.queue.push(Task { lease, from, replay, keeps_output });
                        }
                    }
                }
                Ok(())
            }
        }
    }

    /// A process does the first unit of its queue and reports it; if `fails`, that it may be tried again.
    pub(super) fn work(&mut self, index: usize, fails: bool) {
        if self.processes[index].is_dead || self.processes[index].queue.is_empty() {
            return;
        }
        let task = self.processes[index].queue.remove(0);
        let lease = task.lease;
        let event = match self.compute(index, &task) {
            Some(_) if fails => {
                self.fault("passing fault");
                let fault = Fault { class: FaultClass::RetryHere, message: "no space".to_owned() };
                Event::UnitFailed { lease, fault }
            }
            Some(outcome) => {
                Event::UnitDone { lease, outcome, held: self.processes[index].holdings.keys().copied().collect() }
            }
            None => {
                let fault = Fault { class: FaultClass::RetryElsewhere, message: "its input is gone".to_owned() };
                Event::UnitFailed { lease, fault }
            }
        };
        self.send(Message::ToCoordinator(event));
    }

    /// What a unit computes; `None` if its input is not there.
    pub(super) fn compute(&mut self, index: usize, task: &Task) -> Option<Outcome> {
        let Task { lease, from, ref replay, keeps_output } = *task;
        let (Unit::Prune(layer) | Unit::Forward(layer)) = lease.unit else { return None };
        let (start, mut states) = match from {
            From::Tokens => (0, Vec::new()),
            From::Held(boundary) => (boundary.0, self.processes[index].holdings.get(&boundary)?.to_vec()),
            From::Peer { process, boundary } => {
                let peer = Some(&self.processes[process]).filter(|peer| !peer.is_dead)?;
                (boundary.0, peer.holdings.get(&boundary)?.to_vec())
            }
            From::Stored { boundary, artifact } => (boundary.0, self.store.get(&(boundary, artifact))?.to_vec()),
        };
        if self.is_chain() {
            self.processes[index].holdings.retain(|boundary, _| boundary.0 >= start);
        }
        states.extend((start..layer.0).enumerate().map(|(step, _)| replay.get(step).copied()));
        let input: States = Rc::new(states);
        self.processes[index].holdings.insert(Boundary(layer.0), input.clone());
        let made = match lease.unit {
            Unit::Prune(_) => {
                self.next_artifact += 1;
                let digest = Digest::of(&self.next_artifact.to_le_bytes());
                self.provenance.insert(digest, Provenance { lease, input: input.clone() });
                Some(digest)
            }
            _ => None,
        };
        let artifact = |sha256| Artifact { name: String::new(), sha256, bytes: 1 };
        let mut kept = None;
        if layer.0 + 1 < self.layers && self.is_chain() == made.is_some() {
            let mut output = input.to_vec();
            output.push(made);
            let (output, boundary) = (Rc::new(output), Boundary(layer.0 + 1));
            self.processes[index].holdings.insert(boundary, Rc::clone(&output));
            if keeps_output {
                let digest = Digest::of(format!("{output:?}").as_bytes());
                self.store.insert((boundary, digest), output);
                kept = Some(artifact(digest));
            }
        }
        Some(match made {
            Some(sha256) => Outcome::Pruned {
                artifact: artifact(sha256),
                sublayers: Vec::new(),
                kept: None,
                phases: Vec::new(),
                boundary: kept,
                assistants_lost: 0,
                links: Vec::new(),
            },
            None if self.kind == Kind::Survey => {
                let survey = LayerSurvey { outliers: Some(input.len() as f64), curves: Vec::new() };
                Outcome::Surveyed { survey, phases: Vec::new() }
            }
            None => Outcome::Forwarded { phases: Vec::new() },
        })
    }
}
