//! A plan tried: the whole model pruned roughly, in memory, and its loss on sequences that were kept apart.
//!
//! Source: ALGORITHMS.md §8, the grid over depth weights. Wanda prunes, since it needs no more than the norms of the inputs
//! that the layers before, already pruned, give: errors add up on their way as they will in earnest.

use espalier_common::ids::LayerIndex;
use espalier_common::outline::SublayerOutline;
use espalier_common::pattern::Pattern;
use espalier_common::report::Outcome;
use rayon::prelude::*;

use crate::calibrate::cache::Entry;
use crate::calibrate::capture::{Lane, capture_group, finish_layer, map_batches};
use crate::calibrate::evaluate::nll;
use crate::calibrate::squares::Squares;
use crate::linalg::{matrix, values};
use crate::prune::wanda;
use crate::source::Workplace;
use crate::unit::{Phases, TaskError};

/// Prunes the model to `patterns`, one a layer, with as many calibration sequences as are kept apart for trials, and returns
/// the loss of each of those. One layer at a time is in memory; hidden states are in the cache.
///
/// # Errors
/// `PlanLength`, and whatever the layers and the cache say.
pub fn try_patterns(place: &Workplace<'_>, patterns: &[Pattern]) -> Result<Outcome, TaskError> {
    let (run, mut phases) = (place.run, Phases::of(place.control));
    let decoder = &run.model.decoder;
    if patterns.len() != decoder.layers() {
        return Err(TaskError::PlanLength { patterns: patterns.len(), layers: decoder.layers() });
    }
    let total = run.tokens.sequences();
    let trial = run.job.trial_samples().min(total);
    let calibrating = run.job.survey_samples().min(trial);
    let sequences: Vec<usize> = (0..calibrating).chain(total - trial..total).collect();
    let embed = |sequence| Ok(place.cache.put(decoder.embed(run.tokens.sequence(sequence))?)?);
    let mut hidden: Vec<Entry> =
        phases.time("load", || map_batches(sequences, place.cache.device(), place.control, "embed", embed))?;
    for (layer, pattern) in (0..).map(LayerIndex).zip(patterns) {
        let outline = decoder.outline(layer)?;
        let loaded = place.load(layer, &mut phases)?;
        let mut lanes = [Lane::new(loaded, hidden)];
        let pruned = || -> Result<Vec<Entry>, TaskError> {
            for (group, members) in outline.groups.iter().enumerate() {
                prune_group(place, &mut lanes, group, members, *pattern, calibrating)?;
            }
            Ok(finish_layer(lanes.into(), place.cache, place.control)?.swap_remove(0))
        };
        hidden = phases.time("forward", pruned)?;
    }
    let head = phases.time("load", || decoder.load_head())?;
    let windows: Vec<(&[u32], Entry)> = (total - trial..total)
        .map(|sequence| run.tokens.sequence(sequence))
        .zip(hidden.split_off(calibrating))
        .collect();
    let loss = |(window, hidden): (&[u32], Entry)| Ok(nll(&*head, window, &hidden.take()?)?);
    let window_nll =
        phases.time("evaluate", || map_batches(windows, place.cache.device(), place.control, "evaluate", loss))?;
    Ok(Outcome::Evaluated { window_nll, phases: phases.finish() })
}

/// Prunes the members of a group in place, by the inputs that the first `calibrating` sequences bring.
fn prune_group(
    place: &Workplace<'_>,
    lanes: &mut [Lane; 1],
    group: usize,
    members: &[SublayerOutline],
    pattern: Pattern,
    calibrating: usize,
) -> Result<(), TaskError> {
    let failed = |source| TaskError::Gram { tensor: members[0].tensor.clone(), source };
    let (mut squares, mut seen) = (Squares::new(members[0].columns), 0);
    capture_group(lanes, group, place.cache, place.control, |inputs| {
        let here = calibrating.saturating_sub(seen).min(inputs[0].len());
        seen += inputs[0].len();
        squares.add(&inputs[0][..here]).map_err(failed)
    })?;
    let norms = squares.norms().map_err(failed)?;
    let layer = lanes[0].layer();
    let masked = |member: usize| -> Result<_, TaskError> {
        let weight = layer.weight(group, member);
        let mut masked = values(weight)?;
        let keep = wanda::keep(&masked, &norms, pattern);
        masked.iter_mut().zip(keep).for_each(|(w, keep)| *w = if keep == 1 { *w } else { 0.0 });
        Ok(matrix(masked, norms.len(), weight.device())?)
    };
    let masked = (0..members.len()).into_par_iter().map(masked).collect::<Result<Vec<_>, _>>()?;
    for (member, weight) in masked.into_iter().enumerate() {
        lanes[0].layer_mut().set_weight(group, member, weight)?;
    }
    Ok(())
}
