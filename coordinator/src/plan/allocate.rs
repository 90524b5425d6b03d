//! How sparse each layer becomes, so that the whole model is as sparse as was asked.

use std::collections::BTreeMap;

use espalier_common::outline::{LayerOutline, ModelOutline};
use espalier_common::pattern::Pattern;

/// No layer gets sparser than this, and none denser than 0.
pub(super) const SPARSEST: f64 = 0.95;
/// How many zeros of each tensor may be moved to meet the budget to the weight.
const MOST_MOVED: i64 = 3;
/// A layer's sparsity lies this far above a whole number of zeros (as a share of one), so that no product with a tensor's
/// size comes near a half, where rounding would hang on the last bit.
const OFF_THE_HALF: f64 = 0.2137;

/// One pattern a layer, sparser by `spread` at the last layer than at the first along a logarithm. The model has exactly as
/// many zeros as with `sparsity` everywhere, as far as the sizes of its tensors allow.
///
/// Source: SlimGPT, arXiv 2412.18110, eq. 6: r_i = r_0 + (r_{n−1} − r_0)·ln(i+1)/ln n.
/// Deviation: r_0 follows from the spread and the budget, counted in weights instead of layers; the paper does not state it.
pub fn logarithmic(outline: &ModelOutline, sparsity: f64, spread: f64) -> Vec<Pattern> {
    let layers = outline.layers.len();
    let shape: Vec<f64> = (0..layers).map(|layer| spread * rise(layer, layers)).collect();
    let sizes: Vec<f64> = outline.layers.iter().map(|layer| size(layer) as f64).collect();
    let level = balance(&shape, &sizes, sparsity);
    exact(&outline.layers, &level, sparsity, (0.0, SPARSEST.max(sparsity)))
}

/// ln(i+1) / ln n: 0 at the first layer, 1 at the last.
fn rise(layer: usize, layers: usize) -> f64 {
    if layers < 2 { 0.0 } else { ((layer + 1) as f64).ln() / (layers as f64).ln() }
}

pub(super) fn size(layer: &LayerOutline) -> usize {
    layer.sublayers().map(|sublayer| sublayer.elements()).sum()
}

fn bounded(sparsity: f64, target: f64) -> f64 {
    sparsity.clamp(0.0, SPARSEST.max(target))
}

/// `shape` moved up or down as a whole, within bounds, until its mean, weighted by `sizes`, is `target`.
pub(super) fn balance(shape: &[f64], sizes: &[f64], target: f64) -> Vec<f64> {
    let total: f64 = sizes.iter().sum();
    let at = |offset: f64| shape.iter().map(move |share| bounded(share + offset, target));
    let mean = |offset: f64| at(offset).zip(sizes).map(|(sparsity, size)| sparsity * size).sum::<f64>() / total;
    let (mut low, mut high) = (-2.0, 2.0);
    // 60 halvings leave nothing between the two that f64 could tell apart.
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if mean(middle) < target { low = middle } else { high = middle }
    }
    at(high).collect()
}

/// Zeros of a layer whose tensors all have this sparsity.
pub(super) fn zeros(layer: &LayerOutline, sparsity: f64) -> i64 {
    let pattern = Pattern::Unstructured { sparsity };
    layer.sublayers().map(|sublayer| pattern.zeros(sublayer.rows, sublayer.columns) as i64).sum()
}

/// Sparsities next to `sparsity` and within bounds, by the number of zeros that they add to a layer; `sparsity` itself adds none.
fn neighbours(layer: &LayerOutline, sparsity: f64, (least, largest): (f64, f64)) -> BTreeMap<i64, f64> {
    let here = zeros(layer, sparsity);
    let mut found = BTreeMap::from([(0, sparsity)]);
    for sublayer in layer.sublayers() {
        let elements = sublayer.elements() as f64;
        for moved in -MOST_MOVED..=MOST_MOVED {
            let near = ((elements * sparsity).round() + moved as f64 + OFF_THE_HALF) / elements;
            if near >= least && near <= largest {
                found.entry(zeros(layer, near) - here).or_insert(near);
            }
        }
    }
    found
}

/// Moves a few zeros between layers so that the model has as many as with `target` everywhere. Tensors of one layer that are
/// of one size change together, so where all have the same sizes the nearest count is what can be had. No layer is moved out of
/// `bounds`, the least and the largest sparsity, in which all of `level` lie.
pub(super) fn exact(layers: &[LayerOutline], level: &[f64], target: f64, bounds: (f64, f64)) -> Vec<Pattern> {
    let budget: i64 = layers.iter().map(|layer| zeros(layer, target)).sum();
    let have: i64 = layers.iter().zip(level).map(|(layer, &sparsity)| zeros(layer, sparsity)).sum();
    let gap = budget - have;
    let options: Vec<_> =
        layers.iter().zip(level).map(|(layer, &sparsity)| neighbours(layer, sparsity, bounds)).collect();
    let widest = options.iter().flat_map(|options| options.keys()).map(|moved| moved.abs()).max().unwrap_or(0);
    // What a prefix of the layers can add up to, and the last layer's part in it. Sums that stray further from the way to the
    // gap than one layer can bring back are not needed.
    let (low, high) = (gap.min(0) - 2 * widest, gap.max(0) + 2 * widest);
    let mut reached = vec![BTreeMap::from([(0, 0)])];
    for options in &options {
        let mut next = BTreeMap::new();
        for sum in reached[reached.len() - 1].keys() {
            for moved in options.keys().filter(|moved| (low..=high).contains(&(sum + **moved))) {
                next.entry(sum + moved).or_insert(*moved);
            }
        }
        reached.push(next);
    }
    let mut sum = reached[layers.len()].keys().copied().min_by_key(|sum| (gap - sum).abs()).unwrap_or(0);
    let mut patterns = Vec::with_capacity(layers.len());
    for (options, reached) in options.iter().zip(&reached[1..]).rev() {
        let moved = reached[&sum];
        patterns.push(Pattern::Unstructured { sparsity: options[&moved] });
        sum -= moved;
    }
    patterns.reverse();
    patterns
}

#[cfg(test)]
pub(super) mod tests {
    use espalier_common::outline::SublayerOutline;
    use proptest::prelude::*;

    use super::*;

    pub(in crate::plan) fn layer(shapes: &[(usize, usize)]) -> LayerOutline {
        let sublayer = |&(rows, columns): &(usize, usize)| {
            vec![SublayerOutline { tensor: "t".into(), rows, columns, dtype: "F32".into() }]
        };
        LayerOutline { groups: shapes.iter().map(sublayer).collect(), bytes: 0 }
    }

    pub(in crate::plan) fn model(layers: Vec<LayerOutline>) -> ModelOutline {
        ModelOutline {
            family: "llama".into(),
            layers,
            hidden_size: 1,
            vocabulary_size: 1,
            max_sequence_length: None,
            other_bytes: 0,
            method_version: "1".into(),
            method_params: serde_json::Value::Null,
            needs_dense: false,
            imports_zeros: false,
            needs_whole: false,
            structure: None,
            efforts: Vec::new(),
        }
    }

    pub(in crate::plan) fn total(outline: &ModelOutline, patterns: &[Pattern]) -> i64 {
        outline.layers.iter().zip(patterns).map(|(layer, pattern)| zeros(layer, pattern.sparsity())).sum()
    }

    /// The seven matrices of a layer of SmolLM2-135M.
    pub(in crate::plan) const SMOL: [(usize, usize); 7] =
        [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)];

    #[test]
    fn equal_layers_follow_the_papers_formula() {
        // With r_0 = 0 and 32 layers the paper's formula gives r_31 = S / 0.7354: 0.272 at 20 %, 0.680 at 50 %.
        for (sparsity, last) in [(0.2, 0.27197), (0.5, 0.67992)] {
            let patterns = logarithmic(&model(vec![layer(&SMOL); 32]), sparsity, last);
            for (index, pattern) in patterns.iter().enumerate() {
                let expected = last * ((index + 1) as f64).ln() / 32f64.ln();
                assert!((pattern.sparsity() - expected).abs() < 1e-4, "layer {index}: {pattern}");
            }
        }
    }

    #[test]
    fn the_budget_is_met_to_the_weight() {
        let outline = model(vec![layer(&SMOL); 30]);
        for sparsity in [0.1, 0.5, 0.63, 0.7] {
            let patterns = logarithmic(&outline, sparsity, 0.16);
            assert_eq!(total(&outline, &patterns), 30 * zeros(&outline.layers[0], sparsity), "{sparsity}");
            assert!(patterns.windows(2).all(|pair| pair[0].sparsity() < pair[1].sparsity()));
        }
    }

    #[test]
    fn no_spread_and_a_single_layer_are_uniform() {
        for outline in [model(vec![layer(&SMOL); 4]), model(vec![layer(&SMOL)])] {
            let spread = if outline.layers.len() == 1 { 0.3 } else { 0.0 };
            for pattern in logarithmic(&outline, 0.5, spread) {
                assert!((pattern.sparsity() - 0.5).abs() < 1e-4, "{pattern}");
            }
        }
        assert!(logarithmic(&model(Vec::new()), 0.5, 0.1).is_empty());
    }

    proptest! {
        #[test]
        fn layers_of_any_size_stay_in_bounds_and_meet_the_budget(
            widths in prop::collection::vec((1usize..40, 1usize..40), 2..12),
            sparsity in 0.0..0.94f64,
            spread in 0.0..0.9f64,
        ) {
            let layers = widths.iter().map(|&shape| layer(&[shape, (shape.1, 61)])).collect();
            let outline = model(layers);
            let patterns = logarithmic(&outline, sparsity, spread);
            prop_assert_eq!(patterns.len(), outline.layers.len());
            for pattern in &patterns {
                prop_assert!((0.0..=SPARSEST.max(sparsity)).contains(&pattern.sparsity()));
                pattern.validate().unwrap();
            }
            let budget: i64 = outline.layers.iter().map(|layer| zeros(layer, sparsity)).sum();
            prop_assert!((total(&outline, &patterns) - budget).abs() <= 1);
        }
    }
}
