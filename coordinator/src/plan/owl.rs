//! Layers with many outlying weights keep more of them.
//!
//! Source: Yin et al., *Outlier Weighed Layerwise Sparsity* (OWL), arXiv 2310.05175, section 3; ALGORITHMS.md §8.
//! Deviation: the mean is taken over weights, not layers, so that the budget is met where layers differ in size; no layer
//! leaves `[0, 0.95]`.

use espalier_common::outline::ModelOutline;
use espalier_common::pattern::Pattern;

use super::allocate::{SPARSEST, balance, exact, size};

/// One pattern a layer: the one with most outliers is less sparse by `spread` (the paper's 2λ) than the one with fewest, the
/// others lie between, in proportion. `outliers` has one share a layer, of any scale.
pub fn by_outliers(outline: &ModelOutline, outliers: &[f64], sparsity: f64, spread: f64) -> Vec<Pattern> {
    let (least, most) = outliers
        .iter()
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), &share| (least.min(share), most.max(share)));
    let range = most - least;
    let shape: Vec<f64> =
        outliers.iter().map(|share| if range > 0.0 { spread * (most - share) / range } else { 0.0 }).collect();
    let sizes: Vec<f64> = outline.layers.iter().map(|layer| size(layer) as f64).collect();
    exact(&outline.layers, &balance(&shape, &sizes, sparsity), sparsity, (0.0, SPARSEST.max(sparsity)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::allocate::tests::{SMOL, layer, model, total};
    use super::super::allocate::zeros;
    use super::*;

    /// The authors' rule on layers of one size: ρ = 2λ(D − min)/(max − min), moved so that its mean is 1 − S.
    fn published(outliers: &[f64], sparsity: f64, lambda: f64) -> Vec<f64> {
        let least = outliers.iter().copied().fold(f64::INFINITY, f64::min);
        let most = outliers.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let keep: Vec<f64> = outliers.iter().map(|d| (d - least) * (1.0 / (most - least) * lambda * 2.0)).collect();
        let mean = keep.iter().sum::<f64>() / keep.len() as f64;
        keep.iter().map(|keep| 1.0 - (keep - mean + (1.0 - sparsity))).collect()
    }

    #[test]
    fn equal_layers_follow_the_papers_rule_and_meet_the_budget() {
        let outline = model(vec![layer(&SMOL); 8]);
        let outliers = [0.09, 0.02, 0.05, 0.01, 0.03, 0.012, 0.04, 0.06];
        let patterns = by_outliers(&outline, &outliers, 0.7, 0.16);
        for (pattern, expected) in patterns.iter().zip(published(&outliers, 0.7, 0.08)) {
            assert!((pattern.sparsity() - expected).abs() < 1e-4, "{pattern} {expected}");
        }
        assert_eq!(total(&outline, &patterns), 8 * zeros(&outline.layers[0], 0.7));
    }

    #[test]
    fn layers_without_a_difference_are_uniform() {
        let outline = model(vec![layer(&SMOL); 3]);
        for pattern in by_outliers(&outline, &[0.25; 3], 0.5, 0.16) {
            assert!((pattern.sparsity() - 0.5).abs() < 1e-4, "{pattern}");
        }
    }

    proptest! {
        #[test]
        fn more_outliers_never_mean_more_zeros(
            shares in prop::collection::vec((0.0..0.2f64, 8usize..40), 2..10),
            sparsity in 0.05..0.94f64,
            spread in 0.0..0.5f64,
        ) {
            let outline = model(shares.iter().map(|&(_, width)| layer(&[(width, 64), (64, 61)])).collect());
            let outliers: Vec<f64> = shares.iter().map(|&(share, _)| share).collect();
            let patterns = by_outliers(&outline, &outliers, sparsity, spread);
            let budget: i64 = outline.layers.iter().map(|layer| zeros(layer, sparsity)).sum();
            prop_assert!((total(&outline, &patterns) - budget).abs() <= 1);
            for (a, pattern) in outliers.iter().zip(&patterns) {
                prop_assert!((0.0..=SPARSEST.max(sparsity)).contains(&pattern.sparsity()));
                for (b, other) in outliers.iter().zip(&patterns) {
                    // A few weights are moved to meet the budget.
                    prop_assert!(a < b || pattern.sparsity() <= other.sparsity() + 4.0 * 4.0 / 512.0);
                }
            }
        }
    }
}
