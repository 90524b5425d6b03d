//! How a run would go: the scheduler itself, driven by what each unit costs instead of by workers.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use espalier_common::calibration::{Branch, LEAVES, Split};
use espalier_common::clock::Millis;
use espalier_common::digest::Digest;
use espalier_common::ids::{Boundary, LayerIndex, Lease, Unit, WorkerId};
use espalier_common::job::Propagation;
use espalier_common::report::{Artifact, Outcome};
use espalier_common::shares::shares as deal;
use serde::Serialize;

use super::cluster::{ClusterSpec, PlannedWorker};
use super::cost::{GroupCost, JobCost, LayerCost};
use super::megaflops;
use super::memory::{Memory, Part};
use super::strategy::Strategy;
use crate::schedule::{Action, Event, Limits, Origin, Scheduler, Shape};

/// Share of its memory that a worker keeps hidden states in, if it isn't told otherwise: one part of so many.
const HIDDEN_SHARE: u64 = 4;

/// How a run would go.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Prediction {
    /// Each worker's part.
    pub workers: Vec<WorkerPart>,
    /// From the first unit to the last commit.
    pub seconds: f64,
    /// Work by phase, summed over workers.
    pub seconds_by_phase: BTreeMap<&'static str, f64>,
    /// Tensors that go from worker to worker.
    pub bytes_moved: u64,
    /// The units that each had to wait for the one before: what would have to be faster for the run to be.
    pub critical_path: Vec<Step>,
    /// Time on that path by phase.
    pub critical_seconds_by_phase: BTreeMap<&'static str, f64>,
}

/// One worker's part.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct WorkerPart {
    /// The worker.
    #[serde(flatten)]
    pub worker: PlannedWorker,
    /// Layers that it prunes.
    pub layers: Vec<LayerIndex>,
    /// Seconds that it computes or waits for data.
    pub busy_seconds: f64,
    /// What its part in a layer needs at most, its own layers and those that it assists with.
    pub memory: Memory,
    /// What its process has at its peak, with as many hidden states in memory as it keeps there if it isn't told otherwise.
    pub peak_bytes: u64,
}

/// One unit on the critical path.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Step {
    /// The unit.
    pub unit: String,
    /// Who does it.
    pub worker: String,
    /// When it begins.
    pub from_seconds: f64,
    /// When it is done.
    pub to_seconds: f64,
}

/// Why a job does not fit a cluster.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum PlanError {
    /// A layer needs more memory than a worker has.
    #[error(
        "layer {layer} does not fit worker {worker}: it needs {} GB ({} weights, {} gram, {} solver, {} one sequence), but \
         the worker has {} GB",
        gigabytes(memory.resident_bytes()), gigabytes(memory.weights_bytes), gigabytes(memory.gram_bytes),
        gigabytes(memory.solver_bytes), gigabytes(memory.sequence_bytes), gigabytes(*has_bytes)
    )]
    Memory {
        /// The layer.
        layer: usize,
        /// The worker.
        worker: String,
        /// What the layer needs.
        memory: Memory,
        /// What the worker has.
        has_bytes: u64,
    },
    /// There is nothing to plan.
    #[error("the model has no layers")]
    Empty,
    /// The scheduler did not come to an end: a broken invariant of Espalier.
    #[error("the schedule does not end")]
    Endless,
}

fn gigabytes(bytes: u64) -> String {
    format!("{:.3}", bytes as f64 / 1e9)
}

/// Predicts a run on `workers`.
///
/// # Errors
/// `Memory` for the first layer that a worker could be given but cannot hold.
pub fn predict(
    cost: &JobCost,
    (mode, strategy): (Propagation, Strategy),
    layer_bytes: &[u64],
    cluster: &ClusterSpec,
    workers: &[PlannedWorker],
) -> Result<Prediction, PlanError> {
    if cost.layers.is_empty() {
        return Err(PlanError::Empty);
    }
    // Whoever is left may have to do any layer, so each must be able to.
    for worker in workers {
        let mut needed = cost.layers.iter().map(|layer| layer.memory(&Part::ALONE)).enumerate();
        if let Some((layer, memory)) = needed.find(|(_, memory)| memory.resident_bytes() > worker.memory_bytes) {
            let (worker, has_bytes) = (worker.name.clone(), worker.memory_bytes);
            return Err(PlanError::Memory { layer, worker, memory, has_bytes });
        }
    }
    let layer_bytes = layer_bytes.to_vec();
    let shape = Shape::of_pruning(mode, strategy, layer_bytes, cost.most_hands);
    Rehearsal::new(cost, mode, cluster, workers, shape).run()
}

/// A unit that is under way.
struct Running {
    lease: Lease,
    from: f64,
    to: f64,
    phases: Vec<(&'static str, f64)>,
    /// The step whose end let this one begin.
    after: Option<usize>,
}

struct Rehearsal<'a> {
    cost: &'a JobCost,
    mode: Propagation,
    cluster: &'a ClusterSpec,
    workers: &'a [PlannedWorker],
    scheduler: Scheduler,
    running: Vec<Running>,
    done: Vec<Running>,
    held: BTreeMap<WorkerId, BTreeSet<Boundary>>,
    memory: BTreeMap<WorkerId, Memory>,
    bytes_moved: u64,
}

impl<'a> Rehearsal<'a> {
    fn new(
        cost: &'a JobCost,
        mode: Propagation,
        cluster: &'a ClusterSpec,
        workers: &'a [PlannedWorker],
        shape: Shape,
    ) -> Self {
        let scheduler = Scheduler::new(shape, Limits::default());
        let (running, done, held, memory) = (Vec::new(), Vec::new(), BTreeMap::new(), BTreeMap::new());
        Self { cost, mode, cluster, workers, scheduler, running, done, held, memory, bytes_moved: 0 }
    }

    fn run(mut self) -> Result<Prediction, PlanError> {
        let mut actions = Vec::new();
        for (index, worker) in self.workers.iter().enumerate() {
            let speed = megaflops(worker.gflops);
            let (worker, more_come) = (WorkerId(index as u64), index + 1 < self.workers.len());
            actions.extend(self.scheduler.step(Event::WorkerJoined { worker, speed, more_come }));
        }
        // The scheduler is asked again as each worker joins, but a unit that was begun stays where it is.
        let mut now = 0.0;
        self.begin(&actions, now, None);
        while let Some(next) = self.next_to_end() {
            let ended = self.running.swap_remove(next);
            now = ended.to;
            let event = self.end(&ended);
            self.done.push(ended);
            let after = Some(self.done.len() - 1);
            let actions = self.scheduler.step(event);
            self.begin(&actions, now, after);
            // Nobody is silent in a rehearsal, however long a unit takes.
            debug_assert!(self.scheduler.workers().count() == self.workers.len());
        }
        if !self.scheduler.is_finished() {
            return Err(PlanError::Endless);
        }
        Ok(self.summary(now))
    }

    fn next_to_end(&self) -> Option<usize> {
        let order =
            |a: &(usize, &Running), b: &(usize, &Running)| a.1.to.total_cmp(&b.1.to).then(a.1.lease.cmp(&b.1.lease));
        self.running.iter().enumerate().min_by(order).map(|(index, _)| index)
    }

    fn end(&mut self, ended: &Running) -> Event {
        let lease = ended.lease;
        let (Unit::Prune(layer) | Unit::Forward(layer)) = lease.unit else {
            return Event::Tick { now: Millis(0) };
        };
        let held = self.held.entry(lease.worker).or_default();
        held.insert(Boundary(layer.0));
        let outcome = match lease.unit {
            Unit::Prune(_) => {
                let artifact = Artifact { name: String::new(), sha256: Digest::of(&[]), bytes: 0 };
                Outcome::Pruned {
                    artifact,
                    sublayers: Vec::new(),
                    kept: None,
                    phases: Vec::new(),
                    boundary: None,
                    assistants_lost: 0,
                    links: Vec::new(),
                }
            }
            _ => Outcome::Forwarded { phases: Vec::new() },
        };
        let is_last = layer.0 as usize + 1 == self.cost.layers.len();
        if !is_last && (self.mode == Propagation::Pruned || matches!(lease.unit, Unit::Forward(_))) {
            held.insert(Boundary(layer.0 + 1));
        }
        Event::UnitDone { lease, outcome, held: held.iter().copied().collect() }
    }

    fn begin(&mut self, actions: &[Action], now: f64, after: Option<usize>) {
        for action in actions {
            match action {
                Action::Start { lease, origin, assistants, shares, .. } => {
                    let phases = self.phases(*lease, *origin, (assistants, shares.as_deref()));
                    let seconds: f64 = phases.iter().map(|(_, seconds)| seconds).sum();
                    self.running.push(Running { lease: *lease, from: now, to: now + seconds, phases, after });
                }
                Action::Release { worker, boundaries } => {
                    if let Some(held) = self.held.get_mut(worker) {
                        held.retain(|boundary| !boundaries.contains(boundary));
                    }
                }
                Action::Record(_) | Action::Finish | Action::Fail(_) | Action::Discard { .. } => {}
            }
        }
    }

    /// What a unit does on its worker, phase by phase, in seconds.
    fn phases(
        &mut self,
        lease: Lease,
        origin: Origin,
        (assistants, shares): (&[WorkerId], Option<&[Range<usize>]>),
    ) -> Vec<(&'static str, f64)> {
        let (Unit::Prune(layer) | Unit::Forward(layer)) = lease.unit else { return Vec::new() };
        let speed = self.workers[lease.worker.0 as usize].gflops * 1e9;
        let efficiency = self.cluster.products.efficiency;
        // Whoever keeps its share has it: nobody comes or goes in a rehearsal.
        let first = if shares.is_some() { layer.0 } else { origin.boundary().0 };
        let layers = &self.cost.layers[first as usize..=layer.0 as usize];
        let load_bytes: u64 = layers.iter().map(|layer| layer.load_bytes).sum();
        let mut phases = Vec::new();
        match origin {
            Origin::Held { by, .. } if by != lease.worker => {
                self.bytes_moved = self.bytes_moved.saturating_add(self.cost.boundary_bytes);
                let bytes_per_second = self.cluster.network.gigabits_per_second * 1e9 / 8.0;
                phases.push(("fetch", self.cost.boundary_bytes as f64 / bytes_per_second));
            }
            _ => {}
        }
        phases.push(("load", load_bytes as f64 / (self.cluster.storage.gigabytes_per_second * 1e9)));
        let (own, before) = layers.split_last().expect("a unit has a layer");
        let replayed: f64 = before.iter().map(|layer| layer.forward_flops * layer.streams as f64).sum();
        let copies = if let Unit::Prune(_) = lease.unit { own.room.lanes } else { own.streams };
        let lent = if self.cost.is_shared { self.cost.most_hands - 1 } else { 0 };
        let assistants = if shares.is_some() { assistants } else { &assistants[..assistants.len().min(lent)] };
        let crew: Vec<WorkerId> = [lease.worker].into_iter().chain(assistants.iter().copied()).collect();
        let speeds: Vec<f64> = crew.iter().map(|worker| self.workers[worker.0 as usize].gflops * 1e9).collect();
        let leaves: Vec<Range<usize>> = match shares {
            Some(kept) => {
                // What nobody else keeps is one run of them.
                let first = (0..LEAVES).find(|leaf| kept.iter().all(|kept| !kept.contains(leaf))).unwrap_or(LEAVES);
                let own = LEAVES.saturating_sub(kept.iter().map(Range::len).sum());
                std::iter::once(first..first + own).chain(kept.iter().cloned()).collect()
            }
            None => in_turn(&deal(&speeds, LEAVES)),
        };
        // Sequences are shared out beforehand, so that whoever is last counts.
        let slowest = |(leaves, speed): (&Range<usize>, &f64)| leaves.len() as f64 / LEAVES as f64 / speed;
        let gathering = leaves.iter().zip(&speeds).map(slowest).fold(0.0, f64::max);
        for (hand, (&worker, leaves)) in crew.iter().zip(leaves.iter().cloned()).enumerate() {
            let is_owner = hand == 0;
            let kept = match shares {
                Some(_) => leaves.len() as u64,
                None if is_owner => LEAVES as u64,
                None => 0,
            };
            let needed = match lease.unit {
                Unit::Prune(_) => own.memory(&Part { leaves, others: crew.len() as u64 - 1, is_owner, kept }),
                _ => own.memory_of_forward(),
            };
            // Who keeps its share lets go of the one before as it begins the next layer.
            let waiting_bytes = if shares.is_some() { 0 } else { self.waiting_bytes(worker, layer) };
            let needed = needed.beside(waiting_bytes);
            let memory = self.memory.entry(worker).or_default();
            *memory = memory.larger(needed);
        }
        if crew.len() > 1 {
            let bytes = self.shared_bytes(own, &leaves, shares.is_none());
            self.bytes_moved = self.bytes_moved.saturating_add(bytes);
            phases.push(("transfer", bytes as f64 * 8.0 / (self.cluster.network.gigabits_per_second * 1e9)));
        }
        phases.push(("forward", (replayed / speed + own.forward_flops * copies as f64 * gathering) / efficiency));
        if let Unit::Prune(_) = lease.unit {
            phases.push(("gram", own.gram_flops() * gathering / efficiency));
            phases.push(("solve", own.groups.iter().map(|group| solving_seconds(group, &speeds)).sum()));
            // Measured by all who have the statistics, which are those who solve.
            let are_many = own.groups.iter().any(|group| group.solving_bytes(crew.len() as u64 - 1) > 0);
            let measuring = if are_many { speeds.iter().sum() } else { speed };
            phases.push(("verify", own.verify_flops / (measuring * efficiency)));
            phases.push(("store", own.store_bytes as f64 / (self.cluster.storage.gigabytes_per_second * 1e9)));
        }
        phases
    }

    /// Hidden states that a worker has before other layers than the one that it has a part in.
    fn waiting_bytes(&self, worker: WorkerId, layer: LayerIndex) -> u64 {
        let held = self.held.get(&worker).into_iter().flatten();
        let waiting = held.filter(|boundary| boundary.0 != layer.0).count() as u64;
        self.cost.boundary_bytes.saturating_mul(waiting)
    }

    /// Bytes that the owner of a layer and its assistants send each other.
    fn shared_bytes(&self, layer: &LayerCost, leaves: &[Range<usize>], is_lent: bool) -> u64 {
        let assistants = leaves.len() as u64 - 1;
        let lent: usize = if is_lent { leaves[1..].iter().map(Range::len).sum() } else { 0 };
        // Each share goes to its assistant and comes back.
        let hidden = self.cost.boundary_bytes.saturating_mul(2 * lent as u64) / LEAVES as u64;
        let of_group = |group: &GroupCost| {
            // Sums over each branch of the shares, and what the weights became, for everybody.
            let sums = group.sums_bytes.saturating_mul(travelling_sums(&leaves[1..], layer.room.split));
            let applied = group.stored_bytes.saturating_mul(assistants);
            sums.saturating_add(applied).saturating_add(group.solving_bytes(assistants))
        };
        layer.groups.iter().map(of_group).fold(hidden, u64::saturating_add)
    }

    fn summary(self, seconds: f64) -> Prediction {
        let name = |worker: WorkerId| self.workers[worker.0 as usize].name.clone();
        let sum = |steps: &mut dyn Iterator<Item = &Running>| {
            let mut sums: BTreeMap<&'static str, f64> = BTreeMap::new();
            for (phase, seconds) in steps.flat_map(|step| &step.phases) {
                *sums.entry(phase).or_default() += seconds;
            }
            sums
        };
        let mut path = Vec::new();
        let mut at = self.done.len().checked_sub(1);
        while let Some(index) = at {
            path.push(&self.done[index]);
            at = self.done[index].after;
        }
        path.reverse();
        let parts = self.workers.iter().enumerate().map(|(index, worker)| {
            let own: Vec<&Running> = self.done.iter().filter(|step| step.lease.worker.0 == index as u64).collect();
            let pruned = own.iter().filter_map(|step| match step.lease.unit {
                Unit::Prune(layer) => Some(layer),
                Unit::Forward(_) | Unit::Evaluate(_) => None,
            });
            let mut layers: Vec<LayerIndex> = pruned.collect();
            layers.sort_unstable();
            let memory = self.memory.get(&WorkerId(index as u64)).copied().unwrap_or_default();
            WorkerPart {
                worker: worker.clone(),
                memory,
                peak_bytes: memory.peak_bytes(worker.memory_bytes / HIDDEN_SHARE),
                layers,
                busy_seconds: own.iter().fold(0.0, |sum, step| sum + step.to - step.from),
            }
        });
        let step = |step: &&Running| Step {
            unit: step.lease.unit.to_string(),
            worker: name(step.lease.worker),
            from_seconds: step.from,
            to_seconds: step.to,
        };
        Prediction {
            workers: parts.collect(),
            seconds,
            seconds_by_phase: sum(&mut self.done.iter()),
            bytes_moved: self.bytes_moved,
            critical_path: path.iter().map(step).collect(),
            critical_seconds_by_phase: sum(&mut path.iter().copied()),
        }
    }
}

/// Seconds that workers of these speeds take to solve a group: what each does for itself, what they make for each other, and
/// blocks, of which whoever is through takes another one.
fn solving_seconds(group: &GroupCost, speeds: &[f64]) -> f64 {
    let effort = &group.effort;
    let is_shared = effort.is_shared && group.blocks().count() > 1;
    let speeds = if is_shared { speeds } else { &speeds[..1] };
    let slowest = speeds.iter().copied().fold(f64::INFINITY, f64::min);
    let own_parts = effort.parts.div_ceil(speeds.len());
    let before = effort.common_flops as f64 + own_parts as f64 * effort.part_flops as f64;
    let mut busy = vec![0.0f64; speeds.len()];
    for rows in group.blocks() {
        let seconds = |hand: usize| busy[hand] + rows as f64 * effort.row_flops as f64 / speeds[hand];
        let next = (0..speeds.len()).min_by(|&a, &b| seconds(a).total_cmp(&seconds(b))).unwrap_or(0);
        busy[next] = seconds(next);
    }
    let blocks = busy.into_iter().fold(0.0, f64::max);
    (before / slowest + blocks) * 100.0 / f64::from(effort.speed_percent.max(1))
}

/// Which leaves the owner and its assistants have, of so many each: the owner the last ones.
fn in_turn(leaves: &[usize]) -> Vec<Range<usize>> {
    let mut first = 0;
    let mut ranges: Vec<Range<usize>> = Vec::new();
    for &leaves in leaves[1..].iter().chain(&leaves[..1]) {
        ranges.push(first..first + leaves);
        first += leaves;
    }
    ranges.rotate_right(1);
    ranges
}

/// Sums over whole branches of the tree of leaves that the shares of assistants are.
fn travelling_sums(shares: &[Range<usize>], split: Split) -> u64 {
    shares.iter().flat_map(Branch::of).map(|branch| split.sums(branch) as u64).sum()
}

#[cfg(test)]
mod tests {
    use espalier_common::outline::Effort;

    use super::super::cost::{self, tests::job, tests::outline};
    use super::*;

    fn cluster(gflops: &[f64], memory_bytes: u64) -> (ClusterSpec, Vec<PlannedWorker>) {
        let workers = gflops.iter().enumerate().map(|(index, &gflops)| PlannedWorker {
            name: format!("w{index}"),
            memory_bytes,
            gflops,
        });
        (ClusterSpec::usual(), workers.collect())
    }

    fn plan_of(mode: &str, layers: usize, gflops: &[f64], memory_bytes: u64) -> Result<Prediction, PlanError> {
        let (outline, job) = (outline(layers), job(mode));
        let (cluster, workers) = cluster(gflops, memory_bytes);
        let cost = cost::count(&outline, &job, cluster.solver);
        let layer_bytes: Vec<u64> = outline.layers.iter().map(|layer| layer.bytes).collect();
        predict(&cost, (job.propagation.mode, Strategy::Layers), &layer_bytes, &cluster, &workers)
    }

    #[test]
    fn a_chain_is_its_own_critical_path_and_moves_one_boundary_a_handover() {
        let plan = plan_of("pruned", 6, &[1.0, 1.0, 1.0], u64::MAX).unwrap();
        assert_eq!(plan.critical_path.len(), 6);
        // Two handovers, and in each layer two of three shares that go out and come back: six of eight leaves, [2, 3, 3].
        let boundary = 320 * 64 * 4;
        // The groups are one block each, which is the owner's. Sums come over leaves 0 and 1, 2, 3, and 4 and 5; what the weights
        // became goes to both assistants in bf16.
        let of_group = |(rows, columns): (u64, u64)| 4 * (columns * (columns + 1) / 2 * 8) + 2 * 2 * rows * columns;
        let groups: u64 = [(64, 64), (256, 64), (64, 256)].map(of_group).iter().sum();
        assert_eq!(plan.bytes_moved, 2 * boundary + 6 * (2 * boundary * 6 / 8 + groups));
        let one = plan_of("pruned", 6, &[1.0], u64::MAX).unwrap();
        assert!(plan.seconds < 0.75 * one.seconds, "{} against {}", plan.seconds, one.seconds);
        let layers: Vec<usize> = plan.workers.iter().map(|part| part.layers.len()).collect();
        assert_eq!(layers, [2, 2, 2]);
        let busy: f64 = plan.workers.iter().map(|part| part.busy_seconds).sum();
        assert!((busy - plan.seconds).abs() < 1e-9);
        let phases: f64 = plan.critical_seconds_by_phase.values().sum();
        assert!((phases - plan.seconds).abs() < 1e-9);
    }

    #[test]
    fn a_group_in_blocks_is_solved_by_all_and_the_faster_does_more() {
        let effort = Effort {
            columns: 64,
            parts: 3,
            part_flops: 100,
            row_flops: 10,
            block_rows: 16,
            speed_percent: 50,
            is_shared: true,
            ..Effort::default()
        };
        let group = |is_shared| GroupCost {
            rows: vec![64],
            gram_flops: 0.0,
            effort: Effort { is_shared, ..effort },
            sums_bytes: 0,
            statistics_bytes: 0,
            stored_bytes: 0,
        };
        // Three parts and four blocks of 160; of two equals one makes two parts; one that is three times as fast takes three blocks.
        for (speeds, flops) in [(&[1.0][..], 300.0 + 640.0), (&[1.0, 1.0], 200.0 + 320.0), (&[1.0, 3.0], 200.0 + 160.0)]
        {
            assert!((solving_seconds(&group(true), speeds) - 2.0 * flops).abs() < 1e-9, "{speeds:?}");
            assert!((solving_seconds(&group(false), speeds) - 2.0 * 940.0).abs() < 1e-9, "{speeds:?}");
        }
    }

    #[test]
    fn independent_layers_go_faster_with_more_workers_and_never_beyond_their_number() {
        let one = plan_of("dense", 8, &[1.0], u64::MAX).unwrap();
        let two = plan_of("dense", 8, &[1.0, 1.0], u64::MAX).unwrap();
        assert!(two.seconds < 0.65 * one.seconds, "{} against {}", two.seconds, one.seconds);
        assert!(two.seconds >= 0.5 * one.seconds);
        assert_eq!(two.workers.iter().map(|part| part.layers.len()).sum::<usize>(), 8);
    }

    #[test]
    fn hidden_states_that_wait_for_their_layers_take_memory() {
        let hidden = |layers, gflops: &[f64]| {
            let plan = plan_of("dense", layers, gflops, u64::MAX).unwrap();
            plan.workers.iter().map(|part| part.memory.activation_bytes).max().unwrap()
        };
        let boundary = 320 * 64 * 4;
        // Alone, a worker runs all layers before it prunes the first one.
        assert_eq!(hidden(6, &[1.0]) - hidden(1, &[1.0]), 5 * boundary);
        assert!(hidden(6, &[1.0, 1.0]) < hidden(6, &[1.0]));
    }

    #[test]
    fn every_phase_takes_as_long_as_its_products_do_at_the_speed_they_reach() {
        let (outline, job) = (outline(1), job("pruned"));
        let (mut cluster, workers) = cluster(&[1.0], u64::MAX);
        let cost = cost::count(&outline, &job, cluster.solver);
        let layer = &cost.layers[0];
        cluster.products.efficiency = 0.5;
        let layer_bytes = [outline.layers[0].bytes];
        let plan = predict(&cost, (job.propagation.mode, Strategy::Layers), &layer_bytes, &cluster, &workers).unwrap();
        for (phase, seconds) in [
            ("forward", layer.forward_flops / 0.5e9),
            ("gram", layer.gram_flops() / 0.5e9),
            ("verify", layer.verify_flops / 0.5e9),
            ("solve", layer.solve_flops() / 0.4e9),
            ("store", layer.store_bytes as f64 / (cluster.storage.gigabytes_per_second * 1e9)),
        ] {
            let found = plan.seconds_by_phase[phase];
            assert!((found / seconds - 1.0).abs() < 1e-9, "{phase}: {found} {seconds}");
        }
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let error = plan_of("pruned", 2, &[1.0], 100_000).unwrap_err();
        assert!(matches!(error, PlanError::Memory { layer: 0, .. }));
        let message = error.to_string();
        assert!(message.contains("worker w0") && message.contains("GB"), "{message}");
    }
}
