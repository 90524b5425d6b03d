//! One layer, from its input hidden states to its committed artifact, as a straight line: per group
//! capture → gram → solve → cast → verify → apply, so that the next group sees what the pruned one gives.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_common::checkpoint::cast;
use espalier_common::clock::Stopwatch;
use espalier_common::ids::{Boundary, LayerIndex};
use espalier_common::outline::{LayerOutline, SublayerOutline};
use espalier_common::pattern::Pattern;
use espalier_common::report::{Artifact, Outcome, SublayerReport};
use espalier_common::wire::{Shares, Source, SourceFrom};
use rayon::prelude::*;

use crate::apply::as_loaded;
use crate::artifact::{self, ArtifactError, StoredTensor};
use crate::boundary;
use crate::calibrate::capture::{Lane, finish_layer, forward_layer};
use crate::calibrate::tree::LEAVES;
use crate::crew::owner::Help;
use crate::crew::{Crew, Gathered, Input, Laying, gather_leaves};
use crate::cut_task::cut_layer;
use crate::holdings::HiddenStates;
use crate::keeping::Keeping;
use crate::linalg::on_host;
use crate::mask::MaskError;
use crate::model::DecoderLayer;
use crate::prune::verify::{check, verify};
use crate::prune::{InputStats, Problem, RowBlock, Solution};
use crate::reconstruct::{self, Draft};
use crate::source::Workplace;
use crate::unit::{Phases, TaskError};

/// Prunes a layer: leaves its artifact in the store and, in `pruned` propagation, holds its output, which is also left in the
/// store if `keeps_output`. Whoever helps, the result is the same.
///
/// # Errors
/// See [`TaskError`].
pub fn prune_layer(
    place: &Workplace<'_>,
    layer: LayerIndex,
    (source, shares): (&Source, Option<&Shares>),
    pattern: Pattern,
    keeps_output: bool,
    help: Help,
) -> Result<Outcome, TaskError> {
    if let Some(shares) = shares {
        let keeping = Keeping { source: source.clone(), predecessor: shares.predecessor.clone(), given_back: false };
        let help = Help { leaves: Some(shares.leaves.clone()), ..help };
        return prune_kept(place, layer, keeping, pattern, keeps_output, &help);
    }
    let mut phases = Phases::of(place.control);
    let run = place.run;
    let (shortages, seconds_making_room) = place.cache.shortages();
    if place.is_chain() {
        // In a chain the layers before the source are committed: nobody asks for what lies before it again.
        place.holdings.release(&run.id, |boundary| boundary < source.boundary());
    }
    let outline = run.model.decoder.outline(layer)?;
    let is_last = layer.0 as usize + 1 == run.model.decoder.layers();
    let is_run = place.is_chain() && !is_last;
    let (mut assistants_lost, mut links) = (0, Vec::new());
    let (artifact, reports, kept, output);
    if let Some((solver, structure)) = run.method.solver.structured().zip(run.structure.as_ref()) {
        let pairs = structure.layers.get(layer.0 as usize).ok_or(TaskError::NoStructure { layer })?;
        let input = place.input(layer, source, &mut phases)?;
        let mut lanes = lanes(place, place.load(layer, &mut phases)?, input);
        let cut = cut_layer(place, &mut lanes, &outline, pairs, solver, pattern, &mut phases)?;
        (reports, kept) = (cut.reports, Some(cut.kept));
        place.read_ahead(layer);
        artifact = phases.time("store", || artifact::write_layer(&*run.store, layer, &cut.stored))?;
        let finished = || finish_layer(lanes, place.cache, place.control);
        output = is_run.then(|| phases.time("forward", finished)).transpose()?.map(|streams| HiddenStates { streams });
    } else {
        // A reconstruction tunes on all sequences at once.
        let is_shared = place.is_chain() && run.method.reconstruct.is_none();
        let help = if is_shared { help } else { Help::none(help.lease) };
        let input = input(place, layer, source, &help, &mut phases)?;
        let mut crew = Crew::assemble(place, (layer, &outline), pattern, input, &help, &mut phases)?;
        let mut done = prune_groups(place, &mut crew, &outline, pattern, &mut phases)?;
        kept = None;
        place.read_ahead(layer);
        if is_run {
            crew.send_off();
        }
        artifact = phases.time("store", || store(place, layer, &done))?;
        output = is_run.then(|| crew.finish(&mut phases)).transpose()?;
        note_errors(&mut done, &mut crew, &mut phases)?;
        reports = done.into_iter().map(|done| done.report).collect();
        (assistants_lost, links) = (crew.lost(), crew.links());
    }
    let mut boundary = None;
    if let Some(output) = output {
        phases.add("forward", 0.0, place.forward_flops(&outline) * output.streams.len() as f64);
        place.holdings.hold(&run.id, Boundary(layer.0 + 1), output.clone());
        if keeps_output {
            let kept = || boundary::store(place, Boundary(layer.0 + 1), &output);
            boundary = Some(phases.time("store", kept)?);
        }
    }
    note_shortages(place, (shortages, seconds_making_room), &mut phases);
    let phases = phases.finish();
    Ok(Outcome::Pruned { artifact, sublayers: reports, kept, phases, boundary, assistants_lost, links })
}

/// The same with the strategy `data`: each worker has its share of the layer's input, and keeps its share of the output.
fn prune_kept(
    place: &Workplace<'_>,
    layer: LayerIndex,
    keeping: Keeping,
    pattern: Pattern,
    keeps_output: bool,
    help: &Help,
) -> Result<Outcome, TaskError> {
    let run = place.run;
    if !place.is_chain() || run.method.reconstruct.is_some() || run.structure.is_some() {
        return Err(TaskError::NotShared);
    }
    let mut phases = Phases::of(place.control);
    let shortages = place.cache.shortages();
    let outline = run.model.decoder.outline(layer)?;
    let input = Input::Kept(keeping, place.streams());
    let mut crew = Crew::assemble(place, (layer, &outline), pattern, input, help, &mut phases)?;
    place.let_go_before(layer);
    let mut done = prune_groups(place, &mut crew, &outline, pattern, &mut phases)?;
    place.read_ahead(layer);
    let is_last = layer.0 as usize + 1 == run.model.decoder.layers();
    if !is_last {
        crew.send_off();
    }
    let artifact = phases.time("store", || store(place, layer, &done))?;
    let mut boundary = None;
    if !is_last {
        phases.add("forward", 0.0, place.forward_flops(&outline) * place.streams() as f64);
        boundary = crew.keep(&artifact, keeps_output, &mut phases)?;
    }
    note_errors(&mut done, &mut crew, &mut phases)?;
    let sublayers = done.into_iter().map(|done| done.report).collect();
    let (assistants_lost, links) = (crew.lost(), crew.links());
    note_shortages(place, shortages, &mut phases);
    let phases = phases.finish();
    Ok(Outcome::Pruned { artifact, sublayers, kept: None, phases, boundary, assistants_lost, links })
}

/// Writes what a layer became.
fn store(place: &Workplace<'_>, layer: LayerIndex, done: &[Pruned]) -> Result<Artifact, ArtifactError> {
    artifact::write_layer(&*place.run.store, layer, done.iter().map(|done| &done.stored))
}

/// Puts into the reports of pruned sublayers what was measured of them.
fn note_errors(done: &mut [Pruned], crew: &mut Crew<'_>, phases: &mut Phases) -> Result<(), TaskError> {
    for (group, errors) in crew.measured(phases)? {
        for pruned in done.iter_mut().filter(|pruned| pruned.group == group) {
            (pruned.report.rel_error, pruned.report.held_out_error) = errors[pruned.member];
        }
    }
    Ok(())
}

/// Books the time that went into making room on a device, by what the cache said before.
fn note_shortages(place: &Workplace<'_>, (before, seconds_before): (u32, f64), phases: &mut Phases) {
    let (now, seconds) = place.cache.shortages();
    if now > before {
        phases.add("make-room", seconds - seconds_before, 0.0);
    }
}

/// Prunes group after group; with a reconstruction, tunes each sub-module once its groups are pruned.
fn prune_groups(
    place: &Workplace<'_>,
    crew: &mut Crew<'_>,
    outline: &LayerOutline,
    pattern: Pattern,
    phases: &mut Phases,
) -> Result<Vec<Pruned>, TaskError> {
    let run = place.run;
    let (mut done, mut gathered, mut draft) = (Vec::new(), Vec::new(), None);
    for (group, members) in outline.groups.iter().enumerate() {
        phases.enter(Some(group));
        crew.ask_on(group);
        let cut = cut_into_blocks(place, crew.layer(), (group, members), pattern)?;
        let Gathered { stats, laying } = crew.gather(group, cut.iter().map(Vec::len).sum(), phases)?;
        if run.method.reconstruct.is_some() {
            draft = draft.or_else(|| Draft::begin(group, crew.alone().lanes()));
        }
        done.extend(prune_group(place, crew, (group, members), (pattern, cut), (&stats, laying), phases)?);
        if draft.is_some() {
            note_errors(&mut done, crew, phases)?;
            gathered.push(stats);
        }
        if let Some((draft, options)) = draft.take_if(|draft| draft.ends_with(group)).zip(run.method.reconstruct) {
            let parts = done.iter_mut().filter(|pruned| draft.groups().contains(&pruned.group)).map(|pruned| {
                let Pruned { group, member, stored, report } = pruned;
                let outline = &outline.groups[*group][*member];
                let stats = Arc::clone(&gathered[*group - draft.groups().start]);
                // With the zeros of a mask, those that the solver left are the ones to keep.
                let solved = (pattern == Pattern::Imported).then(|| crew.layer().weight(*group, *member).clone());
                let check: reconstruct::Check<'_> = Box::new(move |dense, tuned| {
                    let problem =
                        Problem { tensor: &outline.tensor, weight: dense, pattern, imported: solved.as_ref() };
                    verify(&problem, &stats, tuned).map(Some)
                });
                reconstruct::Part { place: (*group, *member), outline, stored, report: Some(report), check }
            });
            let mut parts: Vec<_> = parts.collect();
            draft.finish(place, &options, crew.alone().lanes_mut(), &mut parts, phases)?;
            gathered.clear();
        }
    }
    phases.enter(None);
    Ok(done)
}

/// Runs a dense layer, holding its input and its output.
///
/// # Errors
/// See [`TaskError`].
pub fn run_dense_layer(place: &Workplace<'_>, layer: LayerIndex, source: &Source) -> Result<Outcome, TaskError> {
    let mut phases = Phases::of(place.control);
    let input = place.input(layer, source, &mut phases)?;
    let decoder = &place.run.model.decoder;
    let outline = decoder.outline(layer)?;
    let loaded = place.load(layer, &mut phases)?;
    let watch = Stopwatch::start();
    let forward = |hidden| forward_layer(&*loaded, hidden, place.cache, place.control);
    let streams = input.streams.into_iter().map(forward).collect::<Result<Vec<_>, _>>()?;
    phases.add("forward", watch.seconds(), place.forward_flops(&outline));
    place.holdings.hold(&place.run.id, Boundary(layer.0 + 1), HiddenStates { streams });
    Ok(Outcome::Forwarded { phases: phases.finish() })
}

/// Lane 0 is the one that is pruned; lane 1, if the solver or a reconstruction asks for it, stays dense beside it.
fn lanes(place: &Workplace<'_>, layer: Box<dyn DecoderLayer>, input: HiddenStates) -> Vec<Lane> {
    let streams = with_dense(place, input).streams;
    let copies: Vec<_> = streams.iter().map(|_| layer.share()).collect();
    copies.into_iter().zip(streams).map(|(layer, hidden)| Lane::new(layer, hidden)).collect()
}

/// The hidden states before a layer: all of them, to lend; or shares that everyone makes, where there are committed layers to run
/// through first, which would take their owner alone as much longer as there are helpers.
fn input(
    place: &Workplace<'_>,
    layer: LayerIndex,
    source: &Source,
    help: &Help,
    phases: &mut Phases,
) -> Result<Input, TaskError> {
    let is_for_all = matches!(source.from, SourceFrom::Tokens | SourceFrom::Stored { .. });
    if is_for_all && !source.replay.is_empty() && !help.assistants.is_empty() {
        let keeping = Keeping { source: source.clone(), predecessor: source.replay.last().cloned(), given_back: true };
        return Ok(Input::Kept(keeping, place.streams()));
    }
    Ok(Input::Lent(with_dense(place, place.input(layer, source, phases)?)))
}

/// The dense stream beside the corrected one, if it is asked for; where they are the same there is but one to begin with.
fn with_dense(place: &Workplace<'_>, mut input: HiddenStates) -> HiddenStates {
    if place.needs_dense() && input.streams.len() == 1 {
        input.streams.push(input.streams[0].clone());
    }
    input
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
    let forest = gather_leaves(place, lanes, group, members, (0..LEAVES, constant), phases)?;
    let failed = |source| TaskError::Gram { tensor: members[0].tensor.clone(), source };
    phases.time("gram", || forest.finish(&Device::Cpu)).map_err(failed)
}

/// One sublayer as it will be stored, checked.
struct Pruned {
    group: usize,
    member: usize,
    stored: StoredTensor,
    report: SublayerReport,
}

/// The blocks of rows that each member of a group is cut into.
fn cut_into_blocks(
    place: &Workplace<'_>,
    layer: &dyn DecoderLayer,
    (group, members): (usize, &[SublayerOutline]),
    pattern: Pattern,
) -> Result<Vec<Vec<RowBlock>>, TaskError> {
    let cut = |(member, sublayer): (usize, &SublayerOutline)| {
        let weight = layer.weight(group, member);
        let problem = Problem { tensor: &sublayer.tensor, weight, pattern, imported: None };
        let failed = |source| TaskError::Solve { tensor: sublayer.tensor.clone(), source };
        place.run.method.solver.blocks(&problem).map_err(failed)
    };
    members.iter().enumerate().map(cut).collect()
}

/// Solves the sublayers of a group, puts them into the layer as they will be stored, and checks them.
fn prune_group(
    place: &Workplace<'_>,
    crew: &mut Crew<'_>,
    (group, members): (usize, &[SublayerOutline]),
    (pattern, cut): (Pattern, Vec<Vec<RowBlock>>),
    (stats, laying): (&Arc<InputStats>, Option<Laying>),
    phases: &mut Phases,
) -> Result<Vec<Pruned>, TaskError> {
    let (ctx, device) = (place.control.solve_ctx(), &place.run.device);
    let failed = |member: usize| {
        let tensor = members[member].tensor.clone();
        move |source| TaskError::Solve { tensor, source }
    };
    place.control.set_progress("solve", 0, members.len());
    let watch = Stopwatch::start();
    let solver = match &laying {
        Some(laying) => Arc::clone(&laying.groundwork).complete(Arc::clone(stats)),
        None => place.prepare_solver(Arc::clone(stats)),
    };
    let solver = solver.map_err(failed(0))?;
    tracing::debug!(group, seconds = watch.seconds(), "the solver is ready");
    let phase = place.solve_phase(solver.device().is_some());
    let imported = |sublayer| place.run.mask.as_ref().map(|mask| mask.weight(sublayer, &Device::Cpu)).transpose();
    let imported: Vec<Option<Tensor>> = members.iter().map(imported).collect::<Result<_, MaskError>>()?;
    let dense = (0..members.len()).map(|member| on_host(crew.layer().weight(group, member)));
    let dense: Vec<Tensor> = dense.collect::<candle_core::Result<_>>()?;
    let problem = |member: usize| Problem {
        tensor: &members[member].tensor,
        weight: &dense[member],
        pattern,
        imported: imported[member].as_ref(),
    };
    let problems: Vec<Problem<'_>> = (0..members.len()).map(problem).collect();
    let solved = crew.solve(group, (&*solver, laying), (&problems, cut), &ctx);
    let solved = solved.map_err(|(member, source)| failed(member)(source))?;
    drop(solver);
    let (seconds, waiting) = (watch.seconds(), crew.take_waiting());
    phases.add(phase, seconds - waiting.seconds(), solved.iter().map(|(solution, _)| solution.flops).sum());
    waiting.book(phases);
    let watch = Stopwatch::start();
    let store = |(sublayer, (solution, _)): (&SublayerOutline, &(Solution, f64))| {
        let (name, dtype, shape) = place.stored_as(sublayer)?;
        let bytes = cast::kept_bytes_from_f32(dtype, &solution.weight.flatten_all()?.to_vec1::<f32>()?);
        let stored = StoredTensor { name, dtype, shape, bytes };
        let weight = as_loaded(&stored, device)?;
        Ok((stored, weight))
    };
    let stored = members.par_iter().zip(&solved).map(store).collect::<Result<Vec<_>, TaskError>>()?;
    let (stored, weights): (Vec<StoredTensor>, Vec<Tensor>) = stored.into_iter().unzip();
    let tiles =
        crew.apply(group, &weights, || stored.iter().map(|stored| &*stored.bytes).collect::<Vec<_>>().concat())?;
    let checked = |((problem, sublayer), weight): ((&Problem<'_>, &SublayerOutline), &Tensor)| {
        check(problem, weight).map_err(|source| TaskError::Verify { tensor: sublayer.tensor.clone(), source })
    };
    let zeros: Vec<u64> =
        problems.par_iter().zip(members).zip(&weights).map(checked).collect::<Result<_, TaskError>>()?;
    let pairs = weights.into_iter().zip(dense.iter().cloned()).collect();
    crew.measure(tiles, pairs, stats)?;
    let (seconds, waiting) = (watch.seconds(), crew.take_waiting());
    phases.add("verify", seconds - waiting.seconds(), 0.0);
    waiting.book(phases);
    let mut done = Vec::new();
    let parts = members.iter().zip(solved).zip(stored).zip(zeros).enumerate();
    for (member, (((sublayer, (solution, seconds)), stored), zeros)) in parts {
        let report = SublayerReport {
            tensor: sublayer.tensor.clone(),
            // Once it is measured.
            rel_error: f64::NAN,
            held_out_error: None,
            zeros,
            elements: sublayer.elements() as u64,
            seconds,
            iterations: solution.iterations,
            damping: solution.damping,
            damping_raised: solution.damping_raised,
            dead_channels: solution.dead_channels,
            alpha: solution.alpha,
            reconstruction: None,
        };
        done.push(Pruned { group, member, stored, report });
    }
    Ok(done)
}
