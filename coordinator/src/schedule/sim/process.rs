//! The worker's side: what is sent to a process, what it holds, and what it computes.

use std::collections::BTreeMap;
use std::ops::Range;
use std::rc::Rc;

use espalier_common::calibration::LEAVES;
use espalier_common::digest::Digest;
use espalier_common::fault::FaultClass;
use espalier_common::report::{Artifact, LayerSurvey};
use rand::Rng as _;

use super::super::*;
use super::{Kind, Planted, Provenance, World};

/// Hidden states at a boundary: the layers that made them, first to last; `None` for a layer that was run dense.
pub(super) type States = Rc<Vec<Option<Digest>>>;

/// What is sent to a worker.
#[derive(Debug, Clone)]
pub(super) enum Order {
    Start { lease: Lease, from: From, replay: Vec<Digest>, keeps_output: bool, shares: Option<TheirShares> },
    Release(Vec<Boundary>),
}

/// Processes, and the leaves that each has.
pub(super) type Leaves = Vec<(usize, Range<usize>)>;

/// With the strategy `data`: the leaves of each assistant's process, and what the layer before became.
#[derive(Debug, Clone)]
pub(super) struct TheirShares {
    pub(super) leaves: Leaves,
    pub(super) predecessor: Option<Digest>,
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
    /// Leaf by leaf, what it keeps of a boundary, and of which layer that came.
    pub(super) shares: BTreeMap<Boundary, BTreeMap<usize, (Option<Digest>, States)>>,
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
    pub(super) shares: Option<TheirShares>,
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
                        there.shares.retain(|boundary, _| !boundaries.contains(boundary));
                    }
                    Order::Start { lease, from, replay, keeps_output, shares } => {
                        let newest = there.newest.entry(lease.unit).or_insert(Attempt(0));
                        if lease.attempt > *newest {
                            *newest = lease.attempt;
                            there.queue.retain(|task| task.lease.unit != lease.unit);
                            there.queue.push(Task { lease, from, replay, keeps_output, shares });
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
        let Task { lease, from, ref replay, keeps_output, ref shares } = *task;
        if let Some(shares) = shares {
            return self.compute_together(index, task, shares);
        }
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
        let mut kept = None;
        if layer.0 + 1 < self.layers && self.is_chain() == made.is_some() {
            let mut output = input.to_vec();
            output.push(made);
            let (output, boundary) = (Rc::new(output), Boundary(layer.0 + 1));
            self.processes[index].holdings.insert(boundary, Rc::clone(&output));
            if keeps_output {
                let digest = Digest::of(format!("{output:?}").as_bytes());
                self.store.insert((boundary, digest), output);
                kept = Some(digest);
            }
        }
        Some(match made {
            Some(sha256) => pruned(sha256, kept),
            None if self.kind == Kind::Survey => {
                let survey = LayerSurvey { outliers: Some(input.len() as f64), curves: Vec::new() };
                Outcome::Surveyed { survey, phases: Vec::new() }
            }
            None => Outcome::Forwarded { phases: Vec::new() },
        })
    }

    /// What a layer becomes whose crew keeps its shares: each leaf is brought before the layer where it is, or by the owner if its
    /// assistant is gone.
    fn compute_together(&mut self, owner: usize, task: &Task, shares: &TheirShares) -> Option<Outcome> {
        let Unit::Prune(layer) = task.lease.unit else { return None };
        let mut by = [owner; LEAVES];
        for (process, leaves) in &shares.leaves {
            if self.processes[*process].is_dead || self.rng.random_bool(0.1) {
                self.fault("lost assistant");
            } else {
                by[leaves.clone()].fill(*process);
            }
        }
        let mut inputs: Vec<States> = Vec::new();
        for (leaf, process) in by.into_iter().enumerate() {
            let states = self.leaf_before(process, leaf, layer, task, shares)?;
            self.keep(process, Boundary(layer.0), leaf, shares.predecessor, &states);
            inputs.push(states);
        }
        for process in by {
            self.processes[process].shares.retain(|boundary, _| *boundary >= Boundary(layer.0));
        }
        self.next_artifact += 1;
        let digest = Digest::of(&self.next_artifact.to_le_bytes());
        // One leaf that came of something else is enough to be seen.
        let wrong = inputs.iter().find(|states| **states != inputs[0]);
        let input = Rc::clone(wrong.unwrap_or(&inputs[0]));
        let input =
            if wrong.is_some() && self.is_committed_input(layer, &input) { Rc::clone(&inputs[0]) } else { input };
        self.provenance.insert(digest, Provenance { lease: task.lease, input: Rc::clone(&input) });
        let mut kept = None;
        if layer.0 + 1 < self.layers {
            let mut output = input.to_vec();
            output.push(Some(digest));
            let (output, next) = (Rc::new(output), Boundary(layer.0 + 1));
            for (leaf, process) in by.into_iter().enumerate() {
                self.keep(process, next, leaf, Some(digest), &output);
            }
            if task.keeps_output {
                let stored = Digest::of(format!("{output:?}").as_bytes());
                self.store.insert((next, stored), output);
                kept = Some(stored);
            }
        }
        Some(pruned(digest, kept))
    }

    /// Whether states are what the committed layers before `layer` give.
    fn is_committed_input(&self, layer: LayerIndex, states: &States) -> bool {
        let committed = self.committed();
        let wanted = (0..layer.0).map(|before| committed.get(&Unit::Prune(LayerIndex(before))).copied().flatten());
        wanted.eq(states.iter().copied())
    }

    fn keep(&mut self, process: usize, boundary: Boundary, leaf: usize, of: Option<Digest>, states: &States) {
        self.processes[process].shares.entry(boundary).or_default().insert(leaf, (of, Rc::clone(states)));
    }

    /// One leaf before a layer: as the process keeps it of what is committed, or made from where the task begins.
    fn leaf_before(
        &mut self,
        process: usize,
        leaf: usize,
        layer: LayerIndex,
        task: &Task,
        shares: &TheirShares,
    ) -> Option<States> {
        let begin = match task.from {
            From::Stored { boundary, .. } => boundary.0,
            _ => 0,
        };
        for boundary in (begin..=layer.0).rev() {
            let of = if boundary == layer.0 {
                shares.predecessor
            } else if boundary > begin {
                task.replay.get((boundary - begin - 1) as usize).copied()
            } else {
                continue;
            };
            let kept =
                self.processes[process].shares.get(&Boundary(boundary)).and_then(|kept| kept.get(&leaf)).cloned();
            let Some((came_of, states)) = kept else { continue };
            if came_of == of || self.planted == Planted::BelievedShare {
                self.fault("kept share");
                let mut states = states.to_vec();
                states.extend(task.replay.iter().skip((boundary - begin) as usize).copied().map(Some));
                return Some(Rc::new(states));
            }
        }
        self.fault("made share");
        let mut states = match task.from {
            From::Tokens => Vec::new(),
            From::Stored { boundary, artifact } => self.store.get(&(boundary, artifact))?.to_vec(),
            From::Held(_) | From::Peer { .. } => return None,
        };
        states.extend(task.replay.iter().copied().map(Some));
        Some(Rc::new(states))
    }
}

/// A layer that was pruned, and what its output is stored as.
fn pruned(sha256: Digest, boundary: Option<Digest>) -> Outcome {
    let artifact = |sha256| Artifact { name: String::new(), sha256, bytes: 1 };
    Outcome::Pruned {
        artifact: artifact(sha256),
        sublayers: Vec::new(),
        kept: None,
        phases: Vec::new(),
        boundary: boundary.map(artifact),
        assistants_lost: 0,
        links: Vec::new(),
    }
}
