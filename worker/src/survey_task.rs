//! One dense layer looked at on its way: what allocating sparsity to layers wants to know of it.
//!
//! Source: ALGORITHMS.md §8. For `owl`, the share of outlying scores |W|·‖X‖ (arXiv 2310.05175). For `measured`, each
//! sublayer's error at some sparsities, of a cheap pruner.
//!
//! The cheap pruner is SparseGPT on some rows. What matters is that its error stands in the same proportion to that of the
//! method which will do the work, in every sublayer: over those of SmolLM2's third layer SparseGPT's is 1.5 to 2.0 times that
//! of the full search, while Wanda's, which cannot make up for what goes, is 2.3 to 4.7 times it. Rows are independent, so a
//! sample of them costs little beside the gram.

use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_common::clock::Stopwatch;
use espalier_common::ids::{Boundary, LayerIndex};
use espalier_common::job::Allocation;
use espalier_common::outline::SublayerOutline;
use espalier_common::pattern::Pattern;
use espalier_common::report::{ErrorCurve, LayerSurvey, Outcome};
use espalier_common::wire::Source;
use rayon::prelude::*;

use crate::calibrate::cache::Entry;
use crate::calibrate::capture::{Lane, capture_group, finish_layer};
use crate::calibrate::gram::{GramAccumulator, GramError};
use crate::calibrate::squares::Squares;
use crate::holdings::HiddenStates;
use crate::linalg::{on_host, values};
use crate::model::DecoderLayer;
use crate::prune::verify::rel_errors;
use crate::prune::{GroupSolver, InputStats, Problem, SolveError, Solver, build};
use crate::run::RunError;
use crate::source::Workplace;
use crate::unit::{Phases, TaskError};

/// Rows of a sublayer that its error curve is measured on, spread evenly over it.
const SAMPLED_ROWS: usize = 128;
/// The cheap pruner.
const PRUNER: &str = "sparsegpt";

/// Runs a dense layer on the survey's sequences, measures what the job's allocation asks for, and holds its output.
///
/// # Errors
/// See [`TaskError`].
pub fn survey_layer(
    place: &Workplace<'_>,
    layer: LayerIndex,
    source: &Source,
    sparsities: &[f64],
) -> Result<Outcome, TaskError> {
    let mut phases = Phases::of(place.control);
    let stream = place.input(layer, source, &mut phases)?.streams.swap_remove(0);
    let decoder = &place.run.model.decoder;
    let outline = decoder.outline(layer)?;
    let loaded = place.load(layer, &mut phases)?;
    let mut survey = LayerSurvey::default();
    let mut lanes = [Lane::new(loaded, stream.clone())];
    if place.run.job.pattern.allocation == Allocation::Owl {
        let mut norms = Vec::with_capacity(outline.groups.len());
        for (group, members) in outline.groups.iter().enumerate() {
            norms.push(channel_norms(place, &mut lanes, group, members, &mut phases)?);
        }
        let multiple = place.run.job.pattern.outlier_multiple();
        let found = || outlier_share(lanes[0].layer(), &outline.groups, &norms, multiple);
        survey.outliers = Some(phases.time("survey", found)?);
        let output = finish(place, lanes, &mut phases)?;
        hold(place, layer, output);
    } else {
        let (pruner, _) = build(PRUNER, &serde_json::Value::Null).map_err(RunError::from)?;
        let mut halves = Halves::new(stream);
        for (group, members) in outline.groups.iter().enumerate() {
            let stats = gram(place, &mut lanes, group, members, &mut phases)?;
            let residual = lanes[0].mark().entries().map(|(residual, _)| residual.clone()).collect();
            halves.reach(residual, &mut survey.curves)?;
            let found = || error_curves(place, lanes[0].layer(), group, members, &*pruner, stats, sparsities);
            survey.curves.extend(phases.time("survey", found)?);
        }
        let output = finish(place, lanes, &mut phases)?;
        halves.reach(output.clone(), &mut survey.curves)?;
        hold(place, layer, output);
    }
    Ok(Outcome::Surveyed { survey, phases: phases.finish() })
}

fn finish(place: &Workplace<'_>, lanes: [Lane; 1], phases: &mut Phases) -> Result<Vec<Entry>, TaskError> {
    let finished = || finish_layer(lanes.into(), place.cache, place.control);
    Ok(phases.time("forward", finished)?.swap_remove(0))
}

/// The last layer's output is nobody's input.
fn hold(place: &Workplace<'_>, layer: LayerIndex, output: Vec<Entry>) {
    let next = layer.0 + 1;
    if (next as usize) < place.run.model.decoder.layers() {
        place.holdings.hold(&place.run.id, Boundary(next), HiddenStates { streams: vec![output] });
    }
}

/// The size of each input channel of a group.
fn channel_norms(
    place: &Workplace<'_>,
    lanes: &mut [Lane],
    group: usize,
    members: &[SublayerOutline],
    phases: &mut Phases,
) -> Result<Vec<f32>, TaskError> {
    let failed = |source| TaskError::Gram { tensor: members[0].tensor.clone(), source };
    let mut squares = Squares::new(members[0].columns);
    let captured =
        || capture_group(lanes, group, place.cache, place.control, |inputs| squares.add(&inputs[0]).map_err(failed));
    phases.time("forward", captured)?;
    squares.norms().map_err(failed)
}

/// The gram of a group's inputs.
fn gram(
    place: &Workplace<'_>,
    lanes: &mut [Lane],
    group: usize,
    members: &[SublayerOutline],
    phases: &mut Phases,
) -> Result<InputStats, TaskError> {
    let failed = |source: GramError| TaskError::Gram { tensor: members[0].tensor.clone(), source };
    let mut gram = GramAccumulator::new(members[0].columns, false);
    let (watch, mut gram_seconds) = (Stopwatch::start(), 0.0);
    capture_group(lanes, group, place.cache, place.control, |inputs| {
        let watch = Stopwatch::start();
        gram.add(&inputs[0], None).map_err(failed)?;
        gram_seconds += watch.seconds();
        Ok(())
    })?;
    phases.add("forward", watch.seconds() - gram_seconds, 0.0);
    phases.add("gram", gram_seconds, gram.flops());
    gram.finish(&Device::Cpu).map_err(failed)
}

/// The share of a layer's weights whose score |w|·‖x‖ is more than `multiple` times the mean score of the layer. `norms` has
/// ‖x‖ of each group's input channels.
///
/// Deviation: a share instead of percent, which drops out; ‖x‖ is a mean over tokens instead of sequences, which does too.
fn outlier_share(
    layer: &dyn DecoderLayer,
    groups: &[Vec<SublayerOutline>],
    norms: &[Vec<f32>],
    multiple: f64,
) -> Result<f64, TaskError> {
    let places = || groups.iter().enumerate().flat_map(|(group, members)| (0..members.len()).map(move |m| (group, m)));
    let of_rows = |take: &(dyn Fn(f64) -> f64 + Sync)| -> Result<f64, TaskError> {
        let mut total = 0.0;
        for (group, member) in places() {
            let (weight, norms) = (values(layer.weight(group, member))?, &norms[group]);
            // Collected in order, so that the sum's order is fixed.
            let rows: Vec<f64> = weight
                .par_chunks(norms.len().max(1))
                .map(|row| row.iter().zip(norms).map(|(w, x)| take(f64::from(w.abs()) * f64::from(*x))).sum())
                .collect();
            total += rows.iter().sum::<f64>();
        }
        Ok(total)
    };
    let weights: usize = groups.iter().flatten().map(SublayerOutline::elements).sum();
    let threshold = multiple * of_rows(&|score| score)? / weights.max(1) as f64;
    Ok(of_rows(&|score| f64::from(u8::from(score > threshold)))? / weights.max(1) as f64)
}

/// How the error of each member of a group grows with its sparsity.
fn error_curves(
    place: &Workplace<'_>,
    layer: &dyn DecoderLayer,
    group: usize,
    members: &[SublayerOutline],
    pruner: &dyn Solver,
    stats: InputStats,
    sparsities: &[f64],
) -> Result<Vec<ErrorCurve>, TaskError> {
    let ctx = place.control.solve_ctx();
    let failed = |tensor: &str| {
        let tensor = tensor.to_owned();
        move |source: SolveError| TaskError::Solve { tensor, source }
    };
    let stats = Arc::new(stats);
    let solver = pruner.prepare(Arc::clone(&stats), &ctx).map_err(failed(&members[0].tensor))?;
    let solver: &dyn GroupSolver = &*solver;
    let curve = |(member, sublayer): (usize, &SublayerOutline)| {
        let tensor = sublayer.tensor.as_str();
        let weight = on_host(&sampled(layer.weight(group, member))?)?;
        let error = |sparsity: &f64| {
            let pattern = Pattern::Unstructured { sparsity: *sparsity };
            let problem = Problem { tensor, weight: &weight, pattern, imported: None };
            let blocks = pruner.blocks(&problem).map_err(failed(tensor))?;
            let solved = solver.solve(&problem, blocks, &ctx).map_err(failed(tensor))?.weight;
            rel_errors(&solved, &weight, &stats)
                .map(|(error, _)| error)
                .map_err(|source| TaskError::Verify { tensor: tensor.to_owned(), source: source.into() })
        };
        let errors = sparsities.iter().map(error).collect::<Result<_, TaskError>>()?;
        // The share is known once the half is through.
        Ok(ErrorCurve { tensor: tensor.to_owned(), share: 0.0, errors })
    };
    members.par_iter().enumerate().map(curve).collect()
}

/// Rows of a matrix, spread evenly over it.
fn sampled(weight: &Tensor) -> Result<Tensor, TaskError> {
    let rows = weight.dim(0)?;
    if rows <= SAMPLED_ROWS {
        return Ok(weight.clone());
    }
    let chosen: Vec<u32> = (0..SAMPLED_ROWS).map(|index| (index * rows / SAMPLED_ROWS) as u32).collect();
    // Rows are picked before they are turned, where the matrix lies.
    let chosen = Tensor::new(chosen, weight.device())?;
    Ok(if weight.is_contiguous() {
        weight.index_select(&chosen, 0)?
    } else {
        weight.t()?.index_select(&chosen, 1)?.t()?
    })
}

/// The residual stream, followed from half to half: it changes where one ends.
struct Halves {
    before: Vec<Entry>,
    /// Curves whose half is through.
    through: usize,
}

impl Halves {
    fn new(input: Vec<Entry>) -> Self {
        Self { before: input, through: 0 }
    }

    /// The stream is `now` here. If that is new, a half has ended, and all curves since the last one are its.
    fn reach(&mut self, now: Vec<Entry>, curves: &mut [ErrorCurve]) -> Result<(), TaskError> {
        let share = moved(&self.before, &now)?;
        if share > 0.0 {
            curves[self.through..].iter_mut().for_each(|curve| curve.share = share);
            (self.before, self.through) = (now, curves.len());
        }
        Ok(())
    }
}

/// `‖after − before‖² / ‖after‖²` of the hidden states, mean over tokens: relative to each token, since the norm that follows
/// makes them all of one size, and a few tokens of huge states would hide the others.
fn moved(before: &[Entry], after: &[Entry]) -> Result<f64, TaskError> {
    let of_sequence = |(before, after): (&Entry, &Entry)| -> Result<(f64, usize), TaskError> {
        let width = after.shape().1;
        let (before, after) = (values(&before.load()?)?, values(&after.load()?)?);
        let tokens = before.chunks_exact(width).zip(after.chunks_exact(width));
        let share = |(before, after): (&[f32], &[f32])| {
            let square = |x: f64| x * x;
            let step: f64 = before.iter().zip(after).map(|(a, b)| square(f64::from(*b) - f64::from(*a))).sum();
            let size: f64 = after.iter().map(|b| square(f64::from(*b))).sum();
            if size > 0.0 { step / size } else { 0.0 }
        };
        Ok((tokens.clone().map(share).sum(), tokens.len()))
    };
    let pairs: Vec<_> = before.iter().zip(after).collect();
    let sums = pairs.into_par_iter().map(of_sequence).collect::<Result<Vec<_>, _>>()?;
    let (sum, tokens) = sums.into_iter().fold((0.0, 0), |(sum, tokens), (more, n)| (sum + more, tokens + n));
    Ok(sum / tokens.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use espalier_common::checkpoint;
    use espalier_common::outline::LayerOutline;

    use super::*;
    use crate::calibrate::cache::ActivationCache;
    use crate::linalg::by_column;

    fn layer() -> (Box<dyn DecoderLayer>, LayerOutline) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/families/llama-gqa-tied");
        let decoder = crate::model::open(checkpoint::open(&path).unwrap(), &Device::Cpu).unwrap();
        (decoder.load_layer(LayerIndex(0)).unwrap(), decoder.outline(LayerIndex(0)).unwrap())
    }

    #[test]
    fn outliers_are_counted_over_the_whole_layer() {
        let (layer, outline) = layer();
        let norms: Vec<Vec<f32>> = outline
            .groups
            .iter()
            .map(|members| (0..members[0].columns).map(|j| 0.1 + (j * j % 17) as f32).collect())
            .collect();
        let mut scores = Vec::new();
        for (group, members) in outline.groups.iter().enumerate() {
            for member in 0..members.len() {
                for row in layer.weight(group, member).to_vec2::<f32>().unwrap() {
                    scores.extend(row.iter().zip(&norms[group]).map(|(w, x)| f64::from(w.abs()) * f64::from(*x)));
                }
            }
        }
        let mean = scores.iter().sum::<f64>() / scores.len() as f64;
        for multiple in [1.0, 2.0, 3.0] {
            let above = scores.iter().filter(|score| **score > multiple * mean).count();
            let found = outlier_share(&*layer, &outline.groups, &norms, multiple).unwrap();
            assert!((found - above as f64 / scores.len() as f64).abs() < 1e-12, "{multiple}: {found}");
            assert!(found > 0.0);
            // What every score is multiplied by drops out.
            let larger: Vec<Vec<f32>> = norms.iter().map(|group| group.iter().map(|x| x * 8.0).collect()).collect();
            let again = outlier_share(&*layer, &outline.groups, &larger, multiple).unwrap();
            assert!((found - again).abs() < 1e-12);
        }
    }

    #[test]
    fn a_half_ends_where_the_residual_stream_changes() {
        let cache = ActivationCache::new(u64::MAX, std::env::temp_dir());
        let entries = |values: [f32; 4]| {
            vec![cache.put(Tensor::from_vec(values.to_vec(), (2, 2), &Device::Cpu).unwrap()).unwrap()]
        };
        let curve = || ErrorCurve { tensor: "t".into(), share: 0.0, errors: Vec::new() };
        let (before, after) = (entries([3.0, 0.0, 0.0, 1.0]), entries([3.0, 4.0, 0.0, 2.0]));
        let mut halves = Halves::new(before.clone());
        let mut curves = vec![curve()];
        halves.reach(before, &mut curves).unwrap();
        curves.push(curve());
        halves.reach(after.clone(), &mut curves).unwrap();
        curves.push(curve());
        halves.reach(after, &mut curves).unwrap();
        // 16 of 25 at the first token, 1 of 4 at the second.
        let share = (16.0 / 25.0 + 0.25) / 2.0;
        for (curve, expected) in curves.iter().zip([share, share, 0.0]) {
            assert!((curve.share - expected).abs() < 1e-9, "{curves:?}");
        }
    }

    #[test]
    fn sampled_rows_are_spread_over_the_matrix() {
        let matrix = |rows: usize| {
            let values = (0..rows * 2).map(|at| (at / 2) as f32).collect::<Vec<_>>();
            Tensor::from_vec(values, (rows, 2), &Device::Cpu).unwrap()
        };
        assert_eq!(sampled(&matrix(SAMPLED_ROWS)).unwrap().dim(0).unwrap(), SAMPLED_ROWS);
        for matrix in [matrix(SAMPLED_ROWS * 3), by_column(matrix(SAMPLED_ROWS * 3)).unwrap()] {
            let rows = sampled(&matrix).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(rows.len(), SAMPLED_ROWS);
            assert!(rows.iter().enumerate().all(|(index, row)| row[0].to_bits() == ((index * 3) as f32).to_bits()));
        }
    }
}
