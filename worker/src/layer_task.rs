//! One layer, from its input hidden states to its committed artifact, as a straight line: per group
//! capture → gram → solve → cast → verify → apply, so that the next group sees what the pruned one gives.

use std::sync::Arc;

use candle_core::Tensor;
use espalier_common::checkpoint::cast;
use espalier_common::clock::Stopwatch;
use espalier_common::ids::{Boundary, LayerIndex};
use espalier_common::outline::{LayerOutline, SublayerOutline};
use espalier_common::pattern::Pattern;
use espalier_common::report::{Outcome, SublayerReport};
use espalier_common::wire::Source;
use rayon::prelude::*;

use crate::apply::as_loaded;
use crate::artifact::{self, StoredTensor};
use crate::boundary;
use crate::calibrate::capture::{Lane, capture_group, finish_layer, forward_layer};
use crate::calibrate::gram::GramAccumulator;
use crate::cut_task::cut_layer;
use crate::holdings::HiddenStates;
use crate::mask::MaskError;
use crate::model::DecoderLayer;
use crate::prune::verify::verify;
use crate::prune::{GroupSolver, InputStats, Problem, Solution};
use crate::reconstruct::{self, Draft};
use crate::source::Workplace;
use crate::unit::{Phases, TaskError};

/// Prunes a layer: leaves its artifact in the store and, in `pruned` propagation, holds its output, which is also left in the
/// store if `keeps_output`.
///
/// # Errors
/// See [`TaskError`].
pub fn prune_layer(
    place: &Workplace<'_>,
    layer: LayerIndex,
    source: &Source,
    pattern: Pattern,
    keeps_output: bool,
) -> Result<Outcome, TaskError> {
    let mut phases = Phases::default();
    let run = place.run;
    if place.is_chain() {
        // In a chain the layers before the source are committed: nobody asks for what lies before it again.
        place.holdings.release(&run.id, |boundary| boundary < source.boundary());
    }
    let input = place.input(layer, source, &mut phases)?;
    let outline = run.model.decoder.outline(layer)?;
    let loaded = phases.time("load", || run.model.decoder.load_layer(layer))?;
    let mut lanes = lanes(place, loaded, input);
    let (stored, reports, kept);
    if let Some((solver, structure)) = run.method.solver.structured().zip(run.structure.as_ref()) {
        let pairs = structure.layers.get(layer.0 as usize).ok_or(TaskError::NoStructure { layer })?;
        let cut = cut_layer(place, &mut lanes, &outline, pairs, solver, pattern, &mut phases)?;
        (stored, reports, kept) = (cut.stored, cut.reports, Some(cut.kept));
    } else {
        let done = prune_groups(place, &mut lanes, &outline, pattern, &mut phases)?;
        (stored, reports) = done.into_iter().map(|done| (done.stored, done.report)).unzip();
        kept = None;
    }
    let artifact = phases.time("store", || artifact::write_layer(&*run.store, layer, &stored))?;
    let is_last = layer.0 as usize + 1 == run.model.decoder.layers();
    let mut boundary = None;
    if place.is_chain() && !is_last {
        let output = hold_output(place, layer, lanes, &outline, &mut phases)?;
        if keeps_output {
            let kept = || boundary::store(place, Boundary(layer.0 + 1), &output);
            boundary = Some(phases.time("store", kept)?);
        }
    }
    Ok(Outcome::Pruned { artifact, sublayers: reports, kept, phases: phases.finish(), boundary })
}

/// Prunes group after group; with a reconstruction, tunes each sub-module once its groups are pruned.
fn prune_groups(
    place: &Workplace<'_>,
    lanes: &mut [Lane],
    outline: &LayerOutline,
    pattern: Pattern,
    phases: &mut Phases,
) -> Result<Vec<Pruned>, TaskError> {
    let run = place.run;
    let (mut done, mut gathered, mut draft) = (Vec::new(), Vec::new(), None);
    for (group, members) in outline.groups.iter().enumerate() {
        let stats = Arc::new(gather(place, lanes, group, members, false, phases)?);
        if run.method.reconstruct.is_some() {
            draft = draft.or_else(|| Draft::begin(group, lanes));
        }
        for pruned in prune_group(place, lanes[0].layer(), group, members, pattern, &stats, phases)? {
            let weight = as_loaded(&pruned.stored, &run.device)?;
            lanes[0].layer_mut().set_weight(group, pruned.member, weight);
            done.push(pruned);
        }
        if draft.is_some() {
            gathered.push(stats);
        }
        if let Some((draft, options)) = draft.take_if(|draft| draft.ends_with(group)).zip(run.method.reconstruct) {
            let parts = done.iter_mut().filter(|pruned| draft.groups().contains(&pruned.group)).map(|pruned| {
                let Pruned { group, member, stored, report } = pruned;
                let outline = &outline.groups[*group][*member];
                let stats = Arc::clone(&gathered[*group - draft.groups().start]);
                // With the zeros of a mask, those that the solver left are the ones to keep.
                let solved = (pattern == Pattern::Imported).then(|| lanes[0].layer().weight(*group, *member).clone());
                let check: reconstruct::Check<'_> = Box::new(move |dense, tuned| {
                    let problem =
                        Problem { tensor: &outline.tensor, weight: dense, pattern, imported: solved.as_ref() };
                    verify(&problem, &stats, tuned).map(Some)
                });
                reconstruct::Part { place: (*group, *member), outline, stored, report: Some(report), check }
            });
            let mut parts: Vec<_> = parts.collect();
            draft.finish(place, &options, lanes, &mut parts, phases)?;
            gathered.clear();
        }
    }
    Ok(done)
}

/// Runs a dense layer, holding its input and its output.
///
/// # Errors
/// See [`TaskError`].
pub fn run_dense_layer(place: &Workplace<'_>, layer: LayerIndex, source: &Source) -> Result<Outcome, TaskError> {
    let mut phases = Phases::default();
    let input = place.input(layer, source, &mut phases)?;
    let decoder = &place.run.model.decoder;
    let outline = decoder.outline(layer)?;
    let loaded = phases.time("load", || decoder.load_layer(layer))?;
    let watch = Stopwatch::start();
    let forward = |hidden| forward_layer(&*loaded, hidden, place.cache, place.control);
    let streams = input.streams.into_iter().map(forward).collect::<Result<Vec<_>, _>>()?;
    phases.add("forward", watch.seconds(), place.forward_flops(&outline));
    place.holdings.hold(&place.run.id, Boundary(layer.0 + 1), HiddenStates { streams });
    Ok(Outcome::Forwarded { phases: phases.finish() })
}

/// Lane 0 is the one that is pruned; lane 1, if the solver or a reconstruction asks for it, stays dense beside it.
fn lanes(place: &Workplace<'_>, layer: Box<dyn DecoderLayer>, input: HiddenStates) -> Vec<Lane> {
    let mut streams = input.streams;
    if place.needs_dense() && streams.len() == 1 {
        streams.push(streams[0].clone());
    }
    let copies: Vec<_> = streams.iter().map(|_| layer.share()).collect();
    copies.into_iter().zip(streams).map(|(layer, hidden)| Lane::new(layer, hidden)).collect()
}

/// Brings all sequences before a group and sums up its inputs, the held-out ones apart; `constant` puts a 1 after each input.
pub(crate) fn gather(
    place: &Workplace<'_>,
    lanes: &mut [Lane],
    group: usize,
    members: &[SublayerOutline],
    constant: bool,
    phases: &mut Phases,
) -> Result<InputStats, TaskError> {
    let first = &members[0];
    let failed = |source| TaskError::Gram { tensor: first.tensor.clone(), source };
    let sequences = place.run.tokens.sequences();
    let calibrating = sequences - place.run.job.held_out_samples().min(sequences - 1);
    let cross = place.needs_cross();
    let width = first.columns + usize::from(constant);
    let accumulator = || GramAccumulator::new(width, cross);
    let (mut gram, mut held_out) = (accumulator(), (calibrating < sequences).then(accumulator));
    let (mut seen, mut gram_seconds) = (0, 0.0);
    let watch = Stopwatch::start();
    capture_group(lanes, group, place.cache, place.control, |mut inputs| {
        let watch = Stopwatch::start();
        if constant {
            inputs.iter_mut().flatten().try_for_each(append_constant)?;
        }
        let here = calibrating.saturating_sub(seen).min(inputs[0].len());
        let dense = inputs.get(1).filter(|_| cross);
        if here > 0 {
            gram.add(&inputs[0][..here], dense.map(|dense| &dense[..here])).map_err(failed)?;
        }
        if let Some(held_out) = held_out.as_mut().filter(|_| here < inputs[0].len()) {
            held_out.add(&inputs[0][here..], dense.map(|dense| &dense[here..])).map_err(failed)?;
        }
        seen += inputs[0].len();
        gram_seconds += watch.seconds();
        Ok(())
    })?;
    let forward_seconds = watch.seconds() - gram_seconds;
    let watch = Stopwatch::start();
    let flops = gram.flops() + held_out.as_ref().map_or(0.0, GramAccumulator::flops);
    let mut stats = gram.finish(&place.run.device).map_err(failed)?;
    if let Some(held_out) = held_out {
        stats.held_out = Some(Arc::new(held_out.finish(&place.run.device).map_err(failed)?));
    }
    phases.add("gram", gram_seconds + watch.seconds(), flops);
    // What ran to get here is the group before.
    phases.add("forward", forward_seconds, 0.0);
    Ok(stats)
}

/// `[tokens, in]` to `[tokens, in + 1]`, the last column being 1: its weight is a bias.
fn append_constant(inputs: &mut Tensor) -> Result<(), TaskError> {
    let ones = Tensor::ones((inputs.dim(0)?, 1), inputs.dtype(), inputs.device())?;
    *inputs = Tensor::cat(&[&*inputs, &ones], 1)?;
    Ok(())
}

/// One sublayer as it will be stored, checked.
struct Pruned {
    group: usize,
    member: usize,
    stored: StoredTensor,
    report: SublayerReport,
}

/// Solves the sublayers of a group in parallel.
fn prune_group(
    place: &Workplace<'_>,
    layer: &dyn DecoderLayer,
    group: usize,
    members: &[SublayerOutline],
    pattern: Pattern,
    stats: &Arc<InputStats>,
    phases: &mut Phases,
) -> Result<Vec<Pruned>, TaskError> {
    let ctx = place.control.solve_ctx();
    let failed = |tensor: &str| {
        let tensor = tensor.to_owned();
        move |source| TaskError::Solve { tensor, source }
    };
    place.control.set_progress("solve", 0, members.len());
    let watch = Stopwatch::start();
    let solver = place.run.method.solver.prepare(Arc::clone(stats), &ctx).map_err(failed(&members[0].tensor))?;
    let solver: &dyn GroupSolver = &*solver;
    let imported = |sublayer| place.run.mask.as_ref().map(|mask| mask.weight(sublayer, &place.run.device)).transpose();
    let imported: Vec<Option<Tensor>> = members.iter().map(imported).collect::<Result<_, MaskError>>()?;
    let problem = |member: usize| Problem {
        tensor: &members[member].tensor,
        weight: layer.weight(group, member),
        pattern,
        imported: imported[member].as_ref(),
    };
    let solve = |(member, sublayer): (usize, &SublayerOutline)| {
        let watch = Stopwatch::start();
        let solution = solver.solve(&problem(member), &ctx).map_err(failed(&sublayer.tensor))?;
        Ok((solution, watch.seconds()))
    };
    let solved: Vec<(Solution, f64)> = members.par_iter().enumerate().map(solve).collect::<Result<_, TaskError>>()?;
    phases.add("solve", watch.seconds(), solved.iter().map(|(solution, _)| solution.flops).sum());
    let watch = Stopwatch::start();
    let check = |((member, sublayer), (solution, seconds)): ((usize, &SublayerOutline), (Solution, f64))| {
        check(place, &problem(member), (group, member), sublayer, solution, seconds, stats)
    };
    let pruned = members.par_iter().enumerate().zip(solved).map(check).collect::<Result<_, TaskError>>();
    phases.add("verify", watch.seconds(), 0.0);
    pruned
}

/// Casts a solution to the type that is stored, and measures what the cast gives: no solver marks its own work.
fn check(
    place: &Workplace<'_>,
    problem: &Problem<'_>,
    (group, member): (usize, usize),
    sublayer: &SublayerOutline,
    solution: Solution,
    seconds: f64,
    stats: &InputStats,
) -> Result<Pruned, TaskError> {
    let (name, dtype, shape) = place.stored_as(sublayer)?;
    let bytes = cast::kept_bytes_from_f32(dtype, &solution.weight.flatten_all()?.to_vec1::<f32>()?);
    let stored = StoredTensor { name, dtype, shape, bytes };
    let weight = as_loaded(&stored, &place.run.device)?;
    let verified = verify(problem, stats, &weight)
        .map_err(|source| TaskError::Verify { tensor: sublayer.tensor.clone(), source })?;
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
        alpha: solution.alpha,
        reconstruction: None,
    };
    Ok(Pruned { group, member, stored, report })
}

/// Runs what is left of the layer, and holds and returns its output.
fn hold_output(
    place: &Workplace<'_>,
    layer: LayerIndex,
    lanes: Vec<Lane>,
    outline: &LayerOutline,
    phases: &mut Phases,
) -> Result<HiddenStates, TaskError> {
    let watch = Stopwatch::start();
    let flops = place.forward_flops(outline) * lanes.len() as f64;
    let streams = finish_layer(lanes, place.cache, place.control)?;
    phases.add("forward", watch.seconds(), flops);
    let output = HiddenStates { streams };
    place.holdings.hold(&place.run.id, Boundary(layer.0 + 1), output.clone());
    Ok(output)
}
