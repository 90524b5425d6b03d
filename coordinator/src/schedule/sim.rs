//! A whole cluster in one thread, driven by a seed: workers join, die, pause and answer late, twice or out of order; the
//! coordinator dies between any two actions, or in the middle of writing a record, and is started again from its journal.
//!
//! Artifacts and hidden states are modelled by what they were computed from, and every attempt gives another artifact, so
//! that a layer which was computed from anything but the committed layers before it is seen.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use espalier_common::digest::Digest;
use espalier_common::report::Artifact;
use rand::seq::IndexedRandom as _;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

/// Steps with faults, before the calm in which everything must end.
const STORM: usize = 60;
/// Steps of calm within which it must.
const CALM: usize = 4000;
const MOST_PROCESSES: usize = 4;

/// A fault that the coordinator could have if it were written wrongly; the simulator must see each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planted {
    Nothing,
    /// Reports are believed under whatever lease the unit has now.
    DroppedFence,
    /// The last record is not durable when what follows it is carried out.
    LateSync,
    /// Committed layers are not run again between the origin and the unit.
    ForgottenReplay,
}

/// Hidden states at a boundary: the layers that made them, first to last; `None` for a layer that was run dense.
type States = Rc<Vec<Option<Digest>>>;

/// What is sent to a worker.
#[derive(Debug, Clone)]
enum Order {
    Start { lease: Lease, from: From, replay: Vec<Digest> },
    Release(Vec<Boundary>),
}

#[derive(Debug, Clone, Copy)]
enum From {
    Tokens,
    Held(Boundary),
    Peer { process: usize, boundary: Boundary },
}

#[derive(Debug, Clone)]
enum Message {
    ToWorker { process: usize, order: Order },
    ToCoordinator(Event),
}

/// A worker process. It is numbered anew with every registration, and holds what it holds.
#[derive(Debug, Default)]
struct Process {
    number: Option<WorkerId>,
    is_dead: bool,
    holdings: BTreeMap<Boundary, States>,
    newest: BTreeMap<Unit, Attempt>,
    queue: Vec<(Lease, From, Vec<Digest>)>,
}

/// What an artifact was made from, and under which lease.
#[derive(Debug, Clone)]
struct Provenance {
    lease: Lease,
    input: States,
}

struct World {
    rng: ChaCha8Rng,
    planted: Planted,
    is_chain: bool,
    layers: u32,
    scheduler: Scheduler,
    journal: Vec<Record>,
    /// Leases that were started, by unit and attempt.
    started: BTreeSet<(Unit, Attempt)>,
    provenance: BTreeMap<Digest, Provenance>,
    processes: Vec<Process>,
    /// The process that a number was given to in the present life of the coordinator.
    numbers: BTreeMap<WorkerId, usize>,
    network: Vec<Message>,
    now: u64,
    next_number: u64,
    next_artifact: u64,
    is_finished: bool,
    /// What happened, for the reader of a failure.
    faults: BTreeMap<&'static str, usize>,
}

fn limits() -> Limits {
    // Faults come without end here; how many make a run give up is tested elsewhere.
    Limits { attempts: u32::MAX, without_workers: std::time::Duration::from_secs(1 << 30), ..Limits::default() }
}

impl World {
    fn new(seed: u64, planted: Planted) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (layers, is_chain) = (rng.random_range(1..7u32), rng.random_bool(0.6));
        Self {
            planted,
            is_chain,
            layers,
            scheduler: Scheduler::new(Self::shape(layers, is_chain), limits()),
            rng,
            journal: Vec::new(),
            started: BTreeSet::new(),
            provenance: BTreeMap::new(),
            processes: Vec::new(),
            numbers: BTreeMap::new(),
            network: Vec::new(),
            now: 0,
            next_number: 0,
            next_artifact: 0,
            is_finished: false,
            faults: BTreeMap::new(),
        }
    }

    fn shape(layers: u32, is_chain: bool) -> Shape {
        let layer_bytes = (0..layers).map(|layer| 1 + u64::from(layer % 3)).collect();
        if is_chain { Shape::PruneChain { layer_bytes } } else { Shape::PruneApart { layer_bytes } }
    }

    fn fault(&mut self, name: &'static str) {
        *self.faults.entry(name).or_default() += 1;
    }

    // The coordinator.

    /// Steps the scheduler and carries out its actions, unless the coordinator dies before it is through with them.
    fn tell(&mut self, event: Event, may_crash: bool) -> Result<(), String> {
        let event = match event {
            Event::UnitDone { lease, outcome, held } if self.planted == Planted::DroppedFence => {
                let now = self.scheduler.units.get(&lease.unit);
                let lease = if let Some(UnitState::Leased { lease }) = now { *lease } else { lease };
                Event::UnitDone { lease, outcome, held }
            }
            event => event,
        };
        let actions = self.scheduler.step(event);
        invariants::check(&self.scheduler).map_err(|broken| broken.to_string())?;
        let crash_at = (may_crash && self.rng.random_bool(0.15)).then(|| self.rng.random_range(0..=actions.len()));
        let all = actions.len();
        for (index, action) in actions.into_iter().enumerate() {
            if crash_at == Some(index) {
                // A record in the middle of which it dies is a torn tail, and cut.
                self.fault(if matches!(action, Action::Record(_)) { "torn record" } else { "crash before an action" });
                return self.restart();
            }
            match action {
                Action::Record(record) => self.append(record)?,
                Action::Start { lease, origin } => self.start(lease, origin)?,
                Action::Release { worker, boundaries } => {
                    if let Some(&process) = self.numbers.get(&worker) {
                        self.network.push(Message::ToWorker { process, order: Order::Release(boundaries) });
                    }
                }
                Action::Finish => self.is_finished = true,
                Action::Fail(failure) => return Err(format!("the run gave up: {failure:?}")),
            }
        }
        if crash_at == Some(all) {
            self.fault("crash after the actions");
            return self.restart();
        }
        self.replay_is_faithful()
    }

    /// Appends a record, and checks that it may be there.
    fn append(&mut self, record: Record) -> Result<(), String> {
        let committed = self.committed();
        match &record {
            Record::Committed { lease, outcome } => {
                if committed.contains_key(&lease.unit) {
                    return Err(format!("{} is committed twice", lease.unit));
                }
                if let (Unit::Prune(layer), Outcome::Pruned { artifact, .. }) = (lease.unit, outcome) {
                    let made = &self.provenance[&artifact.sha256];
                    if made.lease != *lease {
                        return Err(format!("{lease} is committed with what {} made", made.lease));
                    }
                    let wanted: Option<Vec<Option<Digest>>> = (0..layer.0)
                        .map(|before| match self.is_chain {
                            true => committed.get(&Unit::Prune(LayerIndex(before))).cloned(),
                            false => Some(None),
                        })
                        .collect();
                    if wanted.as_ref() != Some(&*made.input) {
                        return Err(format!("{lease} was computed from {:?}, not from {wanted:?}", made.input));
                    }
                }
            }
            Record::Leased { lease } if committed.contains_key(&lease.unit) => {
                return Err(format!("{lease} is given though the unit is committed"));
            }
            Record::Leased { .. } | Record::Failed { .. } => {}
        }
        self.journal.push(record);
        Ok(())
    }

    /// Units that the journal has as committed, with the digest of what was pruned.
    fn committed(&self) -> BTreeMap<Unit, Option<Digest>> {
        let commits = self.journal.iter().filter_map(|record| match record {
            Record::Committed { lease, outcome: Outcome::Pruned { artifact, .. } } => {
                Some((lease.unit, Some(artifact.sha256)))
            }
            Record::Committed { lease, .. } => Some((lease.unit, None)),
            _ => None,
        });
        commits.collect()
    }

    fn start(&mut self, lease: Lease, origin: Origin) -> Result<(), String> {
        if !self.journal.contains(&Record::Leased { lease }) {
            return Err(format!("{lease} is started before it is recorded"));
        }
        if !self.started.insert((lease.unit, lease.attempt)) {
            return Err(format!("{lease} is started a second time"));
        }
        let from = match origin {
            Origin::Tokens => From::Tokens,
            Origin::Held { boundary, by } if by == lease.worker => From::Held(boundary),
            Origin::Held { boundary, by } => From::Peer { process: self.numbers[&by], boundary },
        };
        let (Unit::Prune(layer) | Unit::Forward(layer)) = lease.unit else { return Err("an evaluation".to_owned()) };
        let committed = self.committed();
        let mut replay: Vec<Digest> = (origin.boundary().0..layer.0)
            .filter_map(|layer| committed.get(&Unit::Prune(LayerIndex(layer))).copied().flatten())
            .filter(|_| self.is_chain)
            .collect();
        if self.planted == Planted::ForgottenReplay {
            replay.clear();
        }
        let process = self.numbers[&lease.worker];
        let order = Order::Start { lease, from, replay };
        self.network.push(Message::ToWorker { process, order });
        Ok(())
    }

    /// The coordinator is gone: what it knew is in the journal, and its workers do not know the new one.
    fn restart(&mut self) -> Result<(), String> {
        if self.planted == Planted::LateSync {
            self.journal.pop();
        }
        self.scheduler = Scheduler::replay(Self::shape(self.layers, self.is_chain), limits(), &self.journal)
            .starting_at(Millis(self.now));
        self.numbers.clear();
        for process in &mut self.processes {
            process.number = None;
        }
        self.tell(Event::Tick { now: Millis(self.now) }, false)
    }

    fn replay_is_faithful(&self) -> Result<(), String> {
        let rebuilt = Scheduler::replay(Self::shape(self.layers, self.is_chain), limits(), &self.journal);
        let committed = |scheduler: &Scheduler| -> Vec<Unit> {
            let committed = scheduler.units().filter(|(_, state)| **state == UnitState::Committed);
            committed.map(|(unit, _)| unit).collect()
        };
        if committed(&rebuilt) != committed(&self.scheduler) {
            return Err("the journal does not give back what is committed".to_owned());
        }
        Ok(())
    }

    // Workers.

    /// A process registers, again if it was known by another number.
    fn register(&mut self, index: usize, may_crash: bool) -> Result<(), String> {
        self.next_number += 1;
        let number = WorkerId(self.next_number);
        let former = self.processes[index].number.replace(number);
        // What it was doing is given up; a unit that is nearly through still leaves behind what it holds.
        for (lease, from, replay) in std::mem::take(&mut self.processes[index].queue) {
            if self.rng.random_bool(0.5) {
                let _ = self.compute(index, lease, from, &replay);
            }
        }
        self.numbers.insert(number, index);
        if let Some(worker) = former.filter(|former| self.numbers.contains_key(former)) {
            self.tell(Event::WorkerLost { worker }, may_crash)?;
        }
        // The coordinator may have died meanwhile.
        if self.processes[index].number == Some(number) {
            self.tell(Event::WorkerJoined { worker: number }, may_crash)?;
        }
        Ok(())
    }

    fn deliver(&mut self, message: Message, may_crash: bool) -> Result<(), String> {
        match message {
            Message::ToCoordinator(event) => self.tell(event, may_crash),
            Message::ToWorker { process, order } => {
                let there = &mut self.processes[process];
                match order {
                    _ if there.is_dead => {}
                    Order::Release(boundaries) => {
                        there.holdings.retain(|boundary, _| !boundaries.contains(boundary));
                    }
                    Order::Start { lease, from, replay } => {
                        let newest = there.newest.entry(lease.unit).or_insert(Attempt(0));
                        if lease.attempt > *newest {
                            *newest = lease.attempt;
                            there.queue.retain(|(other, ..)| other.unit != lease.unit);
                            there.queue.push((lease, from, replay));
                        }
                    }
                }
                Ok(())
            }
        }
    }

    /// A process does the first unit of its queue and reports it.
    fn work(&mut self, index: usize) {
        if self.processes[index].is_dead || self.processes[index].queue.is_empty() {
            return;
        }
        let (lease, from, replay) = self.processes[index].queue.remove(0);
        let event = match self.compute(index, lease, from, &replay) {
            Some(outcome) => {
                Event::UnitDone { lease, outcome, held: self.processes[index].holdings.keys().copied().collect() }
            }
            None => {
                let fault = Fault { class: FaultClass::RetryElsewhere, message: "its input is gone".to_owned() };
                Event::UnitFailed { lease, fault }
            }
        };
        self.network.push(Message::ToCoordinator(event));
    }

    /// What a unit computes; `None` if its input is not there.
    fn compute(&mut self, index: usize, lease: Lease, from: From, replay: &[Digest]) -> Option<Outcome> {
        let (Unit::Prune(layer) | Unit::Forward(layer)) = lease.unit else { return None };
        let (start, mut states) = match from {
            From::Tokens => (0, Vec::new()),
            From::Held(boundary) => (boundary.0, self.processes[index].holdings.get(&boundary)?.to_vec()),
            From::Peer { process, boundary } => {
                let peer = Some(&self.processes[process]).filter(|peer| !peer.is_dead)?;
                (boundary.0, peer.holdings.get(&boundary)?.to_vec())
            }
        };
        if self.is_chain {
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
        if layer.0 + 1 < self.layers && self.is_chain == made.is_some() {
            let mut output = input.to_vec();
            output.push(made);
            self.processes[index].holdings.insert(Boundary(layer.0 + 1), Rc::new(output));
        }
        Some(match made {
            Some(sha256) => Outcome::Pruned {
                artifact: Artifact { name: format!("layers/{layer}"), sha256, bytes: 1 },
                sublayers: Vec::new(),
                phases: Vec::new(),
            },
            None => Outcome::Forwarded { phases: Vec::new() },
        })
    }

    fn living(&self) -> Vec<usize> {
        (0..self.processes.len()).filter(|&index| !self.processes[index].is_dead).collect()
    }

    /// Time passes; those in `beating` say that they live. One that the coordinator has given up on registers again.
    fn pass_time(&mut self, millis: u64, beating: &[usize], may_crash: bool) -> Result<(), String> {
        self.now += millis;
        for &index in beating {
            let known = self.processes[index].number.filter(|number| self.numbers.contains_key(number));
            match known {
                Some(worker) => self.tell(Event::Heartbeat { worker }, false)?,
                None => self.register(index, may_crash)?,
            }
        }
        self.tell(Event::Tick { now: Millis(self.now) }, may_crash)?;
        // The driver takes silent workers out of the roster.
        let there: BTreeSet<WorkerId> = self.scheduler.workers().collect();
        self.numbers.retain(|number, _| there.contains(number));
        Ok(())
    }

    // The schedule.

    fn storm(&mut self) -> Result<(), String> {
        let living = self.living();
        match self.rng.random_range(0..100) {
            0..10 if living.len() < MOST_PROCESSES => {
                self.processes.push(Process::default());
                self.register(self.processes.len() - 1, true)
            }
            0..16 => {
                let Some(&index) = living.choose(&mut self.rng) else { return Ok(()) };
                self.fault("killed worker");
                self.processes[index].is_dead = true;
                // A local worker's end is seen at once, another's silence later.
                match self.processes[index].number.filter(|number| self.numbers.contains_key(number)) {
                    Some(worker) if self.rng.random_bool(0.5) => {
                        self.tell(Event::WorkerLost { worker }, true)?;
                        self.numbers.remove(&worker);
                        Ok(())
                    }
                    _ => Ok(()),
                }
            }
            16..20 => {
                self.fault("crash");
                self.restart()
            }
            20..30 => {
                let (millis, rate) = (self.rng.random_range(0..9000), self.rng.random_range(0.3..1.0));
                let beating: Vec<usize> = living.into_iter().filter(|_| self.rng.random_bool(rate)).collect();
                self.pass_time(millis, &beating, true)
            }
            30..60 => {
                if let Some(&index) = living.choose(&mut self.rng) {
                    self.work(index);
                }
                Ok(())
            }
            _ => self.deliver_any(true),
        }
    }

    /// Delivers a message, whichever it is; in a storm some stay and come again, and some starts are taken for lost.
    fn deliver_any(&mut self, is_storm: bool) -> Result<(), String> {
        if self.network.is_empty() {
            return Ok(());
        }
        let index = self.rng.random_range(0..self.network.len());
        let message = if is_storm && self.rng.random_bool(0.2) {
            self.fault("duplicate");
            self.network[index].clone()
        } else {
            self.network.swap_remove(index)
        };
        if let Message::ToWorker { order: Order::Start { lease, .. }, .. } = &message
            && is_storm
            && self.rng.random_bool(0.1)
        {
            // The call timed out; the worker may have heard it all the same.
            let lease = *lease;
            self.fault("lost start");
            if self.rng.random_bool(0.5) {
                self.deliver(message, true)?;
            }
            let fault = Fault { class: FaultClass::RetryElsewhere, message: "no answer".to_owned() };
            return self.tell(Event::UnitFailed { lease, fault }, true);
        }
        self.deliver(message, is_storm)
    }

    /// Everything that lives works on, nothing dies, and one more worker comes: all must be done in the end.
    fn calm(&mut self) -> Result<(), String> {
        self.processes.push(Process::default());
        self.register(self.processes.len() - 1, false)?;
        for step in 0..CALM {
            if self.is_finished {
                return Ok(());
            }
            let living = self.living();
            match step % 3 {
                0 => self.deliver_any(false)?,
                1 => {
                    if let Some(&index) = living.choose(&mut self.rng) {
                        self.work(index);
                    }
                }
                _ => self.pass_time(500, &living, false)?,
            }
        }
        Err(format!("not done after {CALM} steps of calm: {:?}", self.scheduler.units))
    }

    fn run(&mut self) -> Result<(), String> {
        for _ in 0..STORM {
            self.storm()?;
            if self.is_finished && self.rng.random_bool(0.5) {
                break;
            }
        }
        self.is_finished = false;
        self.restart()?;
        self.calm()?;
        let all = Self::shape(self.layers, self.is_chain).units().len();
        let committed = self.committed().len();
        if committed == all { Ok(()) } else { Err(format!("finished with {committed} of {all} units")) }
    }
}

/// The first of `seeds` that fails, and how.
fn first_failure(seeds: std::ops::Range<u64>, planted: Planted) -> Option<(u64, String)> {
    seeds.into_iter().find_map(|seed| World::new(seed, planted).run().err().map(|error| (seed, error)))
}

#[test]
fn ten_thousand_schedules_lose_nothing_and_commit_nothing_wrong() {
    let mut faults: BTreeMap<&str, usize> = BTreeMap::new();
    for seed in 0..10_000 {
        let mut world = World::new(seed, Planted::Nothing);
        if let Err(error) = world.run() {
            panic!("seed {seed}: {error}\nfaults: {:?}\njournal: {:#?}", world.faults, world.journal);
        }
        for (name, count) in world.faults {
            *faults.entry(name).or_default() += count;
        }
    }
    for name in ["killed worker", "crash", "crash before an action", "torn record", "duplicate", "lost start"] {
        assert!(faults.get(name).is_some_and(|count| *count > 500), "{name} is too rare: {faults:?}");
    }
}

#[test]
fn a_planted_fault_is_seen_within_a_thousand_schedules() {
    for planted in [Planted::DroppedFence, Planted::LateSync, Planted::ForgottenReplay] {
        assert!(first_failure(0..1000, planted).is_some(), "{planted:?} is not seen");
    }
}
