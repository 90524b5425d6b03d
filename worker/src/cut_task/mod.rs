//! One layer of a structured job: per coupled pair, capture the consumer's inputs → choose blocks → cut → tune what stays.
//!
//! Tensors keep their shapes: rows and columns that go are zeroed, so that later layers, replays and artifacts work as
//! they do for any other method. They are sliced when the checkpoint is assembled.

mod order;
mod site;
mod split;

use espalier_common::checkpoint::{Checkpoint, CheckpointError, Dtype};
use espalier_common::ids::LayerIndex;
use espalier_common::outline::LayerOutline;
use espalier_common::pattern::Pattern;
use espalier_common::report::SublayerReport;
use espalier_common::structure::{Kept, LayerStructure, Pair, Structure};

use self::site::Site;
use crate::apply::{apply_named, bias_name};
use crate::artifact::StoredTensor;
use crate::calibrate::capture::{Lane, Mark, capture_group};
use crate::prune::StructuredSolver;
use crate::reconstruct::Draft;
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

/// Where the lanes stood before a pair's producers.
#[derive(Default)]
struct Before {
    /// For a reconstruction, if the job asks for one.
    draft: Option<Draft>,
    /// Of the corrected lane, for a method that updates producers.
    mark: Option<Mark>,
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
    let mut before = Before::default();
    for group in 0..outline.groups.len() {
        let Some(pair) = pair_of(pairs, outline, group) else {
            capture_group(lanes, group, place.cache, place.control, |_| Ok(()))?;
            if let Some(pair) = pair_of(pairs, outline, group + 1) {
                let updates = solver.sweeps().is_some() && *pair == pairs.channels && channels > 0;
                let draft = place.run.method.reconstruct.and_then(|_| Draft::begin(group, lanes));
                before = Before { draft, mark: updates.then(|| lanes[0].mark()) };
            }
            continue;
        };
        let is_attention = pairs.attention.as_ref() == Some(pair);
        let remove = if is_attention { attention } else { channels };
        let Before { draft, mark } = std::mem::take(&mut before);
        let site = Site { place, outline, group, pair, remove };
        let mut done = site.cut(lanes, solver, mark.as_ref(), phases)?;
        apply_named(lanes[0].layer_mut(), outline, &done.stored, &place.run.device)?;
        if let Some(mark) = mark.filter(|_| done.moved) {
            // The producers that stay give something else now.
            lanes[0].rewind(mark);
            capture_group(&mut lanes[..1], group, place.cache, place.control, |_| Ok(()))?;
        }
        if let Some((draft, options)) = draft.zip(place.run.method.reconstruct) {
            site.tune(draft, &options, lanes, &mut done, phases)?;
        }
        cut.stored.extend(done.stored);
        cut.reports.push(done.report);
        if is_attention {
            cut.kept.attention = Some(done.kept);
        } else {
            cut.kept.channels = done.kept;
        }
    }
    Ok(cut)
}

/// The pair whose consumer is in a group.
fn pair_of<'a>(pairs: &'a LayerStructure, outline: &LayerOutline, group: usize) -> Option<&'a Pair> {
    let members = outline.groups.get(group)?;
    pairs.pairs().find(|pair| members.iter().any(|member| member.tensor == pair.consumer))
}

/// The names of the tensors that the artifact of a cut pair has: the producers with their biases, whether or not rows of
/// them go, the consumer, and its bias if it has one.
fn names_of(pair: &Pair, outline: &LayerOutline) -> Vec<String> {
    let mut names: Vec<String> =
        pair.slices.iter().filter(|slice| slice.axis == 0).map(|slice| slice.tensor.clone()).collect();
    let consumer = outline.groups.iter().position(|group| group.iter().any(|member| member.tensor == pair.consumer));
    let producers = consumer.and_then(|group| outline.groups.get(group.checked_sub(1)?));
    let whole = producers.into_iter().flatten().map(|member| &member.tensor);
    let whole: Vec<String> = whole.filter(|&name| !names.contains(name)).cloned().collect();
    names.extend(whole);
    names.push(pair.consumer.clone());
    names.extend(pair.fits_bias.then(|| bias_name(&pair.consumer)));
    names
}

/// Name, element type and shape of every tensor that the artifact of a cut layer has.
///
/// # Errors
/// `MissingTensor`, `NoStructure`.
pub(crate) fn cut_tensors(
    checkpoint: &dyn Checkpoint,
    structure: &Structure,
    outline: &LayerOutline,
    layer: LayerIndex,
) -> Result<Vec<(String, Dtype, Vec<usize>)>, TaskError> {
    let pairs = structure.layers.get(layer.0 as usize).ok_or(TaskError::NoStructure { layer })?;
    let names = pairs.pairs().flat_map(|pair| names_of(pair, outline));
    names.map(|name| header_of(checkpoint, &name)).collect()
}

/// Name, element type and shape of a tensor of the checkpoint.
///
/// # Errors
/// `MissingTensor`.
pub(crate) fn header_of(checkpoint: &dyn Checkpoint, name: &str) -> Result<(String, Dtype, Vec<usize>), TaskError> {
    let header = checkpoint
        .header(name)
        .ok_or_else(|| CheckpointError::MissingTensor { path: checkpoint.path().clone(), tensor: name.to_owned() })?;
    Ok((name.to_owned(), header.dtype, header.shape.clone()))
}
