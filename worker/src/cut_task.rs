//! One layer of a structured job: per coupled pair, capture the consumer's inputs → choose blocks → cut.
//!
//! Tensors keep their shapes: rows and columns that go are zeroed, so that later layers, replays and artifacts work as
//! they do for any other method. They are sliced when the checkpoint is assembled.

use candle_core::Tensor;
use espalier_common::checkpoint::{Checkpoint, CheckpointError, Dtype, cast};
use espalier_common::clock::Stopwatch;
use espalier_common::ids::LayerIndex;
use espalier_common::outline::{LayerOutline, SublayerOutline};
use espalier_common::pattern::Pattern;
use espalier_common::report::SublayerReport;
use espalier_common::structure::{Kept, LayerStructure, Pair, Structure};

use crate::apply::{apply_named, as_loaded, bias_name};
use crate::artifact::StoredTensor;
use crate::calibrate::capture::{Lane, capture_group};
use crate::layer_task::gather;
use crate::prune::structured::{PairProblem, PairSolution};
use crate::prune::verify::{Verified, verify_cut};
use crate::prune::{InputStats, StructuredSolver};
use crate::source::Workplace;
use crate::unit::{Phases, TaskError};

/// A layer that was cut.
pub(crate) struct Cut {
    /// The tensors that changed, at full shape.
    pub(crate) stored: Vec<StoredTensor>,
    /// One entry a consumer.
    pub(crate) reports: Vec<SublayerReport>,
    /// What stays.
    pub(crate) kept: Kept,
}

/// Cuts both pairs of a layer, attention first, so that the feed-forward part sees what attention still gives.
///
/// # Errors
/// See [`TaskError`].
pub(crate) fn cut_layer(
    place: &Workplace<'_>,
    lanes: &mut [Lane],
    outline: &LayerOutline,
    pairs: &LayerStructure,
    solver: &dyn StructuredSolver,
    pattern: Pattern,
    phases: &mut Phases,
) -> Result<Cut, TaskError> {
    let Pattern::Blocks { attention, channels } = pattern else { return Err(TaskError::NoBlocks(pattern)) };
    let mut cut = Cut { stored: Vec::new(), reports: Vec::new(), kept: Kept::default() };
    for (group, members) in outline.groups.iter().enumerate() {
        let pair = pairs.pairs().find(|pair| members.iter().any(|member| member.tensor == pair.consumer));
        let Some(pair) = pair else {
            capture_group(lanes, group, place.cache, place.control, |_| Ok(()))?;
            continue;
        };
        let is_attention = pairs.attention.as_ref() == Some(pair);
        let remove = if is_attention { attention } else { channels };
        let at = Site { place, group, sublayer: &members[0], pair, remove };
        let (kept, stored, report) = at.cut(lanes, solver, phases)?;
        apply_named(lanes[0].layer_mut(), outline, &stored, &place.run.device)?;
        cut.stored.extend(stored);
        cut.reports.push(report);
        if is_attention {
            cut.kept.attention = Some(kept);
        } else {
            cut.kept.channels = kept;
        }
    }
    Ok(cut)
}

/// One pair about to be cut.
struct Site<'a> {
    place: &'a Workplace<'a>,
    /// The consumer's group.
    group: usize,
    /// The consumer.
    sublayer: &'a SublayerOutline,
    pair: &'a Pair,
    /// Blocks to remove.
    remove: usize,
}

impl Site<'_> {
    fn cut(
        &self,
        lanes: &mut [Lane],
        solver: &dyn StructuredSolver,
        phases: &mut Phases,
    ) -> Result<(Vec<u32>, Vec<StoredTensor>, SublayerReport), TaskError> {
        let (place, sublayer) = (self.place, self.sublayer);
        let has_bias = lanes[0].layer().bias(self.group, 0).is_some();
        let members = std::slice::from_ref(sublayer);
        let stats = gather(place, lanes, self.group, members, has_bias, phases)?;
        let layer = lanes[0].layer();
        let (weight, bias) = (layer.weight(self.group, 0), layer.bias(self.group, 0));
        let problem = PairProblem {
            tensor: &sublayer.tensor,
            weight,
            bias,
            stats: &stats,
            block: self.pair.block,
            remove: self.remove,
        };
        place.control.set_progress("solve", 0, 1);
        let watch = Stopwatch::start();
        let failed = |source| TaskError::Solve { tensor: sublayer.tensor.clone(), source };
        let solution = solver.solve(&problem, &place.control.solve_ctx()).map_err(failed)?;
        let seconds = watch.seconds();
        phases.add("solve", seconds, solution.flops);
        let watch = Stopwatch::start();
        let consumer = self.consumer(&solution)?;
        let verified = self.verify(&problem, &consumer, &solution.kept, &stats)?;
        phases.add("verify", watch.seconds(), 0.0);
        let kept: Vec<u32> = solution.kept.iter().map(|&block| block as u32).collect();
        let mut stored = phases.time("load", || self.producers(&kept))?;
        stored.extend(consumer);
        let report = SublayerReport {
            tensor: sublayer.tensor.clone(),
            rel_error: verified.rel_error,
            held_out_error: verified.held_out_error,
            zeros: verified.zeros,
            elements: verified.elements,
            seconds,
            iterations: solution.iterations,
            damping: solution.damping,
            damping_raised: solution.damping_raised,
            dead_channels: solution.dead_channels,
            reconstruction: None,
        };
        Ok((kept, stored, report))
    }

    /// The consumer's weight, and its bias if it has one, in the type that is stored.
    fn consumer(&self, solution: &PairSolution) -> Result<Vec<StoredTensor>, TaskError> {
        let checkpoint = &*self.place.run.model.checkpoint;
        let weight = Some((self.sublayer.tensor.clone(), &solution.weight));
        let bias = solution.bias.as_ref().map(|bias| (bias_name(&self.sublayer.tensor), bias));
        let store = |(name, tensor): (String, &Tensor)| {
            let (name, dtype, shape) = header_of(checkpoint, &name)?;
            let bytes = cast::bytes_from_f32(dtype, &tensor.flatten_all()?.to_vec1::<f32>()?);
            Ok(StoredTensor { name, dtype, shape, bytes })
        };
        weight.into_iter().chain(bias).map(store).collect()
    }

    /// Measures what will be stored: no solver marks its own work.
    fn verify(
        &self,
        problem: &PairProblem<'_>,
        stored: &[StoredTensor],
        kept: &[usize],
        stats: &InputStats,
    ) -> Result<Verified, TaskError> {
        let device = &self.place.run.device;
        let augmented = |weight: &Tensor, bias: Option<&Tensor>| match bias {
            Some(bias) => Tensor::cat(&[weight, &bias.unsqueeze(1)?], 1),
            None => Ok(weight.clone()),
        };
        let dense = augmented(problem.weight, problem.bias)?;
        let weight = as_loaded(&stored[0], device)?;
        let bias = stored.get(1).map(|bias| as_loaded(bias, device)).transpose()?;
        let solved = augmented(&weight, bias.as_ref())?;
        let inputs = self.pair.blocks * self.pair.block;
        let stays = |column: usize| column >= inputs || kept.binary_search(&(column / self.pair.block)).is_ok();
        verify_cut(problem.tensor, &dense, &solved, stays, stats)
            .map_err(|source| TaskError::Verify { tensor: problem.tensor.to_owned(), source })
    }

    /// The producers as the checkpoint has them, with the rows that go zeroed.
    fn producers(&self, kept: &[u32]) -> Result<Vec<StoredTensor>, TaskError> {
        let checkpoint = &*self.place.run.model.checkpoint;
        let producers = self.pair.slices.iter().filter(|slice| slice.axis == 0);
        producers
            .map(|slice| {
                let (name, dtype, shape) = header_of(checkpoint, &slice.tensor)?;
                let mut bytes = checkpoint.read(&name)?;
                let block = bytes.len() / self.pair.blocks;
                for (index, block) in bytes.chunks_exact_mut(block.max(1)).enumerate() {
                    if kept.binary_search(&(index as u32)).is_err() {
                        block.fill(0);
                    }
                }
                Ok(StoredTensor { name, dtype, shape, bytes })
            })
            .collect()
    }
}

/// Name, element type and shape of every tensor that the artifact of a cut layer has.
///
/// # Errors
/// `MissingTensor`, `NoStructure`.
pub(crate) fn cut_tensors(
    checkpoint: &dyn Checkpoint,
    structure: &Structure,
    layer: LayerIndex,
) -> Result<Vec<(String, Dtype, Vec<usize>)>, TaskError> {
    let pairs = structure.layers.get(layer.0 as usize).ok_or(TaskError::NoStructure { layer })?;
    let mut headers = Vec::new();
    for pair in pairs.pairs() {
        for slice in &pair.slices {
            headers.push(header_of(checkpoint, &slice.tensor)?);
        }
        if pair.fits_bias {
            headers.push(header_of(checkpoint, &bias_name(&pair.consumer))?);
        }
    }
    Ok(headers)
}

fn header_of(checkpoint: &dyn Checkpoint, name: &str) -> Result<(String, Dtype, Vec<usize>), TaskError> {
    let header = checkpoint
        .header(name)
        .ok_or_else(|| CheckpointError::MissingTensor { path: checkpoint.path().clone(), tensor: name.to_owned() })?;
    Ok((name.to_owned(), header.dtype, header.shape.clone()))
}
