//! One pair that is cut: its consumer solved, its producers' rows zeroed, and what stays tuned if the job asks for it.

use std::collections::BTreeMap;

use candle_core::Tensor;
use espalier_common::checkpoint::cast;
use espalier_common::clock::Stopwatch;
use espalier_common::outline::{LayerOutline, SublayerOutline};
use espalier_common::report::{Reconstruction, SublayerReport};
use espalier_common::structure::Pair;

use super::order::Order;
use super::split::{self, Updated};
use super::{header_of, names_of};
use crate::apply::{as_loaded, bias_name};
use crate::artifact::StoredTensor;
use crate::calibrate::capture::{Lane, Mark};
use crate::layer_task::gather;
use crate::linalg::on_host;
use crate::prune::structured::{PairProblem, PairSolution};
use crate::prune::verify::{Verified, VerifyError, verify_cut, verify_rows};
use crate::prune::{InputStats, StructuredSolver};
use crate::reconstruct::{Check, Draft, Options, Part};
use crate::source::Workplace;
use crate::unit::{Phases, TaskError};

/// One pair about to be cut.
pub(super) struct Site<'a> {
    pub(super) place: &'a Workplace<'a>,
    pub(super) outline: &'a LayerOutline,
    /// The consumer's group; the producers' is the one before it.
    pub(super) group: usize,
    pub(super) pair: &'a Pair,
    /// Blocks to remove.
    pub(super) remove: usize,
}

/// A pair that was cut.
pub(super) struct Done {
    /// Blocks that stay, ascending.
    pub(super) kept: Vec<u32>,
    /// As [`names_of`] has them.
    pub(super) stored: Vec<StoredTensor>,
    pub(super) report: SublayerReport,
    /// Whether producers' rows that stay are others than the dense ones.
    pub(super) moved: bool,
    /// Of the consumer's inputs.
    stats: InputStats,
}

impl Site<'_> {
    fn sublayer(&self) -> &SublayerOutline {
        &self.outline.groups[self.group][0]
    }

    /// Chooses the blocks that stay and solves for what they become; `mark` is where the corrected lane stood before the
    /// producers, if the method may update these.
    pub(super) fn cut(
        &self,
        lanes: &mut [Lane],
        solver: &dyn StructuredSolver,
        mark: Option<&Mark>,
        phases: &mut Phases,
    ) -> Result<Done, TaskError> {
        let (place, sublayer) = (self.place, self.sublayer());
        let has_bias = lanes[0].layer().bias(self.group, 0).is_some();
        let stats = gather(place, lanes, self.group, std::slice::from_ref(sublayer), has_bias, phases)?;
        place.control.set_progress("solve", 0, 1);
        let watch = Stopwatch::start();
        let mut solution = self.solve(&lanes[0], solver, &stats)?;
        phases.add(place.solve_phase(false), watch.seconds(), solution.flops);
        let updated = match mark.zip(solver.sweeps()) {
            Some((mark, sweeps)) => split::update(self, &lanes[0], mark, sweeps, &solution, phases)?,
            None => None,
        };
        let seconds = watch.seconds();
        let (mut producers, mut reconstruction, mut remeasured) = (BTreeMap::new(), None, None);
        if let Some(Updated { weight, bias, up, before, after, sweeps, rel_error, held_out_error }) = updated {
            solution = PairSolution { weight, bias, ..solution };
            remeasured = Some((rel_error, held_out_error));
            producers.extend([up]);
            reconstruction = Some(Reconstruction { error_before: before, error_after: after, epochs: sweeps });
        }
        let watch = Stopwatch::start();
        let moved = !producers.is_empty();
        let kept: Vec<u32> = solution.kept.iter().map(|&block| block as u32).collect();
        let stored = phases.time("load", || self.stored(&solution, &producers))?;
        let weight = as_loaded(named(&stored, &sublayer.tensor), &place.run.device)?;
        let bias = self.bias(&stored)?;
        let layer = lanes[0].layer();
        let dense = augmented(layer.weight(self.group, 0), layer.bias(self.group, 0))?;
        let verified = self.verify(&dense, &augmented(&weight, bias.as_ref())?, &kept, &stats);
        let verified = verified.map_err(|source| self.wrong(&sublayer.tensor, source))?;
        phases.add("verify", watch.seconds(), 0.0);
        // The statistics are those of the producers as they were.
        let (rel_error, held_out_error) = remeasured.unwrap_or((verified.rel_error, verified.held_out_error));
        let report = SublayerReport {
            tensor: sublayer.tensor.clone(),
            rel_error,
            held_out_error,
            zeros: verified.zeros,
            elements: verified.elements,
            seconds,
            iterations: solution.iterations,
            damping: solution.damping,
            damping_raised: solution.damping_raised,
            dead_channels: solution.dead_channels,
            alpha: None,
            reconstruction,
        };
        Ok(Done { kept, stored, report, moved, stats })
    }

    fn solve(&self, lane: &Lane, solver: &dyn StructuredSolver, stats: &InputStats) -> Result<PairSolution, TaskError> {
        let Self { pair, remove, .. } = *self;
        let tensor = &self.sublayer().tensor;
        let weight = &on_host(lane.layer().weight(self.group, 0))?;
        let bias = lane.layer().bias(self.group, 0).map(on_host).transpose()?;
        let bias = bias.as_ref();
        let Pair { block, runs, .. } = *pair;
        let problem = PairProblem { tensor, weight, bias, stats, block, runs, remove };
        let solve = |problem: &PairProblem<'_>| {
            let failed = |source| TaskError::Solve { tensor: tensor.clone(), source };
            solver.solve(problem, &self.place.control.solve_ctx()).map_err(failed)
        };
        let Some(order) = Order::of(pair) else { return solve(&problem) };
        let (weight, stats) = (order.columns(weight)?, order.stats(stats)?);
        let solution = solve(&PairProblem { weight: &weight, stats: &stats, ..problem })?;
        Ok(PairSolution { weight: order.columns_back(&solution.weight)?, ..solution })
    }

    /// What will be stored, in order: `producers` as they were updated, the others as the checkpoint has them, all with the
    /// rows that go zeroed; then the consumer.
    fn stored(
        &self,
        solution: &PairSolution,
        producers: &BTreeMap<String, Vec<f32>>,
    ) -> Result<Vec<StoredTensor>, TaskError> {
        let checkpoint = &*self.place.run.model.checkpoint;
        let consumer_bias = bias_name(&self.pair.consumer);
        let store = |name: String| {
            let (name, dtype, shape) = header_of(checkpoint, &name)?;
            let solved = match &solution.bias {
                _ if name == self.pair.consumer => Some(&solution.weight),
                Some(bias) if name == consumer_bias => Some(bias),
                _ => None,
            };
            let mut bytes = match (solved, producers.get(&name)) {
                (Some(solved), _) => cast::kept_bytes_from_f32(dtype, &solved.flatten_all()?.to_vec1::<f32>()?),
                (None, Some(updated)) => cast::kept_bytes_from_f32(dtype, updated),
                (None, None) => checkpoint.read(&name)?,
            };
            if self.pair.slices.iter().any(|slice| slice.axis == 0 && slice.tensor == name) {
                let block = bytes.len() / self.pair.blocks;
                for (index, block) in bytes.chunks_exact_mut(block.max(1)).enumerate() {
                    if solution.kept.binary_search(&index).is_err() {
                        block.fill(0);
                    }
                }
            }
            Ok(StoredTensor { name, dtype, shape, bytes })
        };
        names_of(self.pair, self.outline).into_iter().map(store).collect()
    }

    /// The consumer's bias as it will be stored.
    fn bias(&self, stored: &[StoredTensor]) -> Result<Option<Tensor>, TaskError> {
        let name = bias_name(&self.pair.consumer);
        let bias = stored.iter().find(|stored| stored.name == name);
        Ok(bias.map(|bias| as_loaded(bias, &self.place.run.device)).transpose()?)
    }

    /// Measures what will be stored, bias and all: no solver marks its own work.
    fn verify(
        &self,
        dense: &Tensor,
        solved: &Tensor,
        kept: &[u32],
        stats: &InputStats,
    ) -> Result<Verified, VerifyError> {
        let inputs = self.pair.blocks * self.pair.block;
        let stays =
            |column: usize| column >= inputs || kept.binary_search(&(self.pair.block_of(column) as u32)).is_ok();
        verify_cut(&self.pair.consumer, dense, solved, stays, stats)
    }

    fn wrong(&self, tensor: &str, source: VerifyError) -> TaskError {
        TaskError::Verify { tensor: tensor.to_owned(), source }
    }

    /// Tunes what stays of the half towards what the dense one gives; zeros stay zeros.
    pub(super) fn tune(
        &self,
        draft: Draft,
        options: &Options,
        lanes: &mut [Lane],
        done: &mut Done,
        phases: &mut Phases,
    ) -> Result<(), TaskError> {
        let bias = self.bias(&done.stored)?;
        let dense_bias = lanes[1].layer().bias(self.group, 0).cloned();
        let Done { kept, stored, report, stats, .. } = done;
        let (kept, stats) = (&*kept, &*stats);
        let mut stored: BTreeMap<String, &mut StoredTensor> =
            stored.iter_mut().map(|stored| (stored.name.clone(), stored)).collect();
        let mut report = Some(report);
        let mut parts = Vec::new();
        for group in [self.group - 1, self.group] {
            for (member, outline) in self.outline.groups[group].iter().enumerate() {
                let name = outline.tensor.as_str();
                let is_consumer = group == self.group;
                let check: Check<'_> = if is_consumer {
                    let (bias, dense_bias) = (bias.clone(), dense_bias.clone());
                    Box::new(move |dense, tuned| {
                        let dense = augmented(dense, dense_bias.as_ref())?;
                        self.verify(&dense, &augmented(tuned, bias.as_ref())?, kept, stats).map(Some)
                    })
                } else {
                    let slice = self.pair.slices.iter().find(|slice| slice.axis == 0 && slice.tensor == name);
                    let width = slice.map(|slice| slice.width);
                    let stays =
                        move |row: usize| width.is_none_or(|width| kept.binary_search(&((row / width) as u32)).is_ok());
                    Box::new(move |_, tuned| verify_rows(name, tuned, stays).map(|()| None))
                };
                let stored = stored.remove(name).expect("every member of a cut pair is stored");
                let report = if is_consumer { report.take() } else { None };
                parts.push(Part { place: (group, member), outline, stored, report, check });
            }
        }
        draft.finish(self.place, options, lanes, &mut parts, phases)
    }
}

/// `[W | b]`.
fn augmented(weight: &Tensor, bias: Option<&Tensor>) -> candle_core::Result<Tensor> {
    match bias {
        Some(bias) => Tensor::cat(&[weight, &bias.unsqueeze(1)?], 1),
        None => Ok(weight.clone()),
    }
}

fn named<'a>(stored: &'a [StoredTensor], name: &str) -> &'a StoredTensor {
    stored.iter().find(|stored| stored.name == name).expect("the consumer of a cut pair is stored")
}
