//! Sparsity where it costs least: error curves of the layers, and one slope for all of them.
//!
//! Source: ALGORITHMS.md §8, cheap allocation; the depth weight is the argument of ATP (ICML 2025) that errors of early layers
//! pass through all later ones.
//! Deviation: layers compare by the damage that they do to the residual stream, not by their own relative error; and a plan
//! is chosen by trying each on held-out tokens with the cheap pruner on all layers, not by pruning the model for each.

use espalier_common::outline::ModelOutline;
use espalier_common::pattern::Pattern;
use espalier_common::report::LayerSurvey;

use super::allocate::{SPARSEST, exact, size};

/// Points at which error curves are measured.
const POINTS: usize = 6;
/// How much of the spread lies below the mean: sparing a sensitive layer needs more room than charging the others.
const BELOW: f64 = 0.6;
/// Slopes of neighbouring intervals are kept apart by this share of the largest one, so that every slope is had at one
/// sparsity only.
const APART: f64 = 1e-6;
/// Halvings that leave nothing between two f64.
const HALVINGS: usize = 200;

/// The least and the largest sparsity that a layer may get.
pub fn bounds(sparsity: f64, spread: f64) -> (f64, f64) {
    let largest = (sparsity + (1.0 - BELOW) * spread).min(SPARSEST.max(sparsity));
    ((sparsity - BELOW * spread).max(0.0), largest)
}

/// The sparsities at which curves are measured: evenly from one bound to the other; one alone if there is no room.
pub fn grid(sparsity: f64, spread: f64) -> Vec<f64> {
    let (least, largest) = bounds(sparsity, spread);
    if largest <= least {
        return vec![sparsity];
    }
    (0..POINTS).map(|point| least + (largest - least) * point as f64 / (POINTS - 1) as f64).collect()
}

/// What a layer's pruning does to the residual stream at each sparsity of the grid: the relative errors of its sublayers,
/// each times the share of the stream that its half of the layer makes up.
pub fn damage(survey: &LayerSurvey) -> Vec<f64> {
    let points = survey.curves.first().map_or(0, |curve| curve.errors.len());
    (0..points)
        .map(|point| survey.curves.iter().map(|curve| curve.share * curve.errors.get(point).unwrap_or(&0.0)).sum())
        .collect()
}

/// One pattern a layer, such that `Σ exp(−γ·l)·damage_l` is least under the budget. `damage` has each layer's damage at the
/// sparsities of [`grid`].
pub fn by_damage(
    outline: &ModelOutline,
    damage: &[Vec<f64>],
    sparsity: f64,
    spread: f64,
    depth_weight: f64,
) -> Vec<Pattern> {
    let sizes: Vec<f64> = outline.layers.iter().map(|layer| size(layer) as f64).collect();
    let weights: Vec<f64> = (0..damage.len()).map(|layer| (-depth_weight * layer as f64).exp()).collect();
    exact(&outline.layers, &levels(damage, &weights, &sizes, sparsity, spread), sparsity, bounds(sparsity, spread))
}

/// The trial with the least loss; the first of equals. A loss that is no number loses.
pub fn best(losses: &[f64]) -> usize {
    let order = |a: &(usize, &f64), b: &(usize, &f64)| a.1.is_nan().cmp(&b.1.is_nan()).then(a.1.total_cmp(b.1));
    losses.iter().enumerate().min_by(order).map_or(0, |(index, _)| index)
}

/// The sparsities at which every layer's damage, times its weight, grows by the same amount with one more zero, unless a
/// bound is in the way; their mean, weighted by `sizes`, is `sparsity`.
fn levels(damage: &[Vec<f64>], weights: &[f64], sizes: &[f64], sparsity: f64, spread: f64) -> Vec<f64> {
    let points = grid(sparsity, spread);
    if points.len() < 2 {
        return vec![sparsity; damage.len()];
    }
    let curves: Vec<Slopes> = damage.iter().map(|damage| Slopes::new(&points, damage)).collect();
    let layers = || curves.iter().zip(weights).zip(sizes);
    // One more zero is 1/size more sparsity.
    let at = |price: f64| -> Vec<f64> {
        layers().map(|((curve, weight), size)| curve.sparsity_at(price * size / weight)).collect()
    };
    let total: f64 = sizes.iter().sum();
    let mean = |levels: &[f64]| levels.iter().zip(sizes).map(|(level, size)| level * size).sum::<f64>() / total;
    let dearest = layers().map(|((curve, weight), size)| curve.largest() * weight / size).fold(0.0, f64::max);
    let (mut low, mut high) = (0.0, 2.0 * dearest);
    for _ in 0..HALVINGS {
        let middle = 0.5 * (low + high);
        if mean(&at(middle)) < sparsity { low = middle } else { high = middle }
    }
    at(high)
}

/// How steeply a layer's damage rises at each sparsity: straight between the middles of the measured intervals.
struct Slopes {
    least: f64,
    largest: f64,
    middles: Vec<f64>,
    slopes: Vec<f64>,
}

impl Slopes {
    /// From the damage at some sparsities, ascending. A curve that is not convex is measured badly, or levels off where all
    /// is lost; neighbouring intervals are then taken together until the slopes rise.
    fn new(points: &[f64], damage: &[f64]) -> Self {
        let intervals = points.windows(2).zip(damage.windows(2));
        let slopes: Vec<f64> =
            intervals.clone().map(|(s, d)| ((d[1] - d[0]) / (s[1] - s[0])).max(0.0)).map(finite).collect();
        let mut slopes = rising(&slopes);
        let steepest = slopes.last().copied().filter(|slope| *slope > 0.0);
        let apart = APART * steepest.unwrap_or(1.0);
        slopes.iter_mut().enumerate().for_each(|(index, slope)| *slope += apart * index as f64);
        let middles = intervals.map(|(s, _)| 0.5 * (s[0] + s[1])).collect();
        Self { least: points[0], largest: points[points.len() - 1], middles, slopes }
    }

    /// The slope at the largest sparsity.
    fn largest(&self) -> f64 {
        self.slope_at(self.largest)
    }

    fn slope_at(&self, sparsity: f64) -> f64 {
        let last = self.middles.len() - 1;
        if last == 0 {
            return self.slopes[0];
        }
        // Beyond the outermost middles, the line through the last two goes on.
        let right = self.middles.partition_point(|middle| *middle < sparsity).clamp(1, last);
        let (x, y) = (&self.middles[right - 1..=right], &self.slopes[right - 1..=right]);
        (y[0] + (y[1] - y[0]) * (sparsity - x[0]) / (x[1] - x[0])).max(0.0)
    }

    /// The sparsity at which the slope is `slope`, within bounds.
    fn sparsity_at(&self, slope: f64) -> f64 {
        let last = self.middles.len() - 1;
        if last == 0 {
            return if slope < self.slopes[0] { self.least } else { self.largest };
        }
        let right = self.slopes.partition_point(|other| *other < slope).clamp(1, last);
        let (x, y) = (&self.middles[right - 1..=right], &self.slopes[right - 1..=right]);
        (x[0] + (x[1] - x[0]) * (slope - y[0]) / (y[1] - y[0])).clamp(self.least, self.largest)
    }
}

fn finite(slope: f64) -> f64 {
    if slope.is_finite() { slope } else { f64::MAX.sqrt() }
}

/// The nearest values (in least squares) that do not fall: neighbours that do are replaced by their mean.
fn rising(values: &[f64]) -> Vec<f64> {
    let mut pools: Vec<(f64, usize)> = Vec::new();
    for &value in values {
        pools.push((value, 1));
        while let [.., (a, m), (b, n)] = pools[..]
            && a > b
        {
            pools.truncate(pools.len() - 2);
            pools.push(((a * m as f64 + b * n as f64) / (m + n) as f64, m + n));
        }
    }
    pools.into_iter().flat_map(|(mean, count)| std::iter::repeat_n(mean, count)).collect()
}

#[cfg(test)]
mod tests {
    use espalier_common::report::ErrorCurve;
    use proptest::prelude::*;

    use super::super::allocate::tests::{SMOL, layer, model, total};
    use super::super::allocate::zeros;
    use super::*;

    /// Damage `scale · s^power`: its slope is `scale · power · s^(power − 1)`.
    fn curve(scale: f64, power: f64, sparsity: f64, spread: f64) -> Vec<f64> {
        grid(sparsity, spread).iter().map(|s| scale * s.powf(power)).collect()
    }

    #[test]
    fn equal_curves_are_uniform_and_a_steeper_one_is_spared() {
        let outline = model(vec![layer(&SMOL); 4]);
        let alike = vec![curve(0.3, 3.0, 0.6, 0.25); 4];
        for pattern in by_damage(&outline, &alike, 0.6, 0.25, 0.0) {
            assert!((pattern.sparsity() - 0.6).abs() < 1e-4, "{pattern}");
        }
        let mut steeper = alike;
        steeper[2] = curve(0.4, 3.0, 0.6, 0.25);
        let patterns = by_damage(&outline, &steeper, 0.6, 0.25, 0.0);
        assert!(patterns[2].sparsity() < 0.59 && patterns[0].sparsity() > 0.6, "{patterns:?}");
        assert_eq!(total(&outline, &patterns), 4 * zeros(&outline.layers[0], 0.6));
    }

    #[test]
    fn a_depth_weight_charges_later_layers() {
        let outline = model(vec![layer(&SMOL); 6]);
        let alike = vec![curve(0.3, 3.0, 0.6, 0.25); 6];
        let patterns = by_damage(&outline, &alike, 0.6, 0.25, 0.05);
        assert!(patterns.windows(2).all(|pair| pair[0].sparsity() < pair[1].sparsity()), "{patterns:?}");
        // With s³, equal slopes mean s ∝ exp(γ·l/2): the interpolated slopes are near it.
        let ratio = patterns[5].sparsity() / patterns[0].sparsity();
        assert!((ratio - (0.05_f64 * 5.0 / 2.0).exp()).abs() < 0.01, "{ratio}");
    }

    #[test]
    fn damage_counts_each_sublayer_by_what_its_half_makes_up() {
        let curve = |share, errors: [f64; 2]| ErrorCurve { tensor: "t".into(), share, errors: errors.to_vec() };
        let survey = LayerSurvey { outliers: None, curves: vec![curve(0.5, [0.1, 0.2]), curve(0.25, [0.4, 0.8])] };
        let found = damage(&survey);
        assert!((found[0] - 0.15).abs() < 1e-12 && (found[1] - 0.3).abs() < 1e-12);
        assert!(damage(&LayerSurvey::default()).is_empty());
    }

    #[test]
    fn slopes_that_fall_are_pooled() {
        assert_eq!(rising(&[1.0, 3.0, 2.0, 4.0]), [1.0, 2.5, 2.5, 4.0]);
        assert_eq!(rising(&[3.0, 2.0, 1.0]), [2.0; 3]);
        assert_eq!(rising(&[]), [0.0; 0]);
    }

    #[test]
    fn the_least_loss_wins_and_what_is_no_number_does_not() {
        assert_eq!(best(&[3.0, 2.0, 2.0, 5.0]), 1);
        assert_eq!(best(&[f64::NAN, 7.0, f64::INFINITY]), 1);
        assert_eq!(best(&[]), 0);
    }

    #[test]
    fn without_room_or_with_flat_curves_all_layers_are_alike() {
        let outline = model(vec![layer(&SMOL); 3]);
        for (damage, spread, depth) in [(vec![vec![0.1]; 3], 0.0, 0.03), (vec![vec![0.0; POINTS]; 3], 0.25, 0.0)] {
            for pattern in by_damage(&outline, &damage, 0.5, spread, depth) {
                assert!((pattern.sparsity() - 0.5).abs() < 1e-3, "{pattern}");
            }
        }
    }

    proptest! {
        #[test]
        fn unbounded_layers_have_one_slope_and_the_budget_is_met(
            layers in prop::collection::vec((0.01..1.0f64, 1.3..5.0f64, 8usize..40), 2..12),
            sparsity in 0.2..0.9f64,
            depth in 0.0..0.1f64,
        ) {
            let spread = 0.25;
            let outline = model(layers.iter().map(|&(_, _, width)| layer(&[(width, 64), (64, 61)])).collect());
            let damage: Vec<_> = layers.iter().map(|&(scale, power, _)| curve(scale, power, sparsity, spread)).collect();
            let sizes: Vec<f64> = outline.layers.iter().map(|layer| size(layer) as f64).collect();
            let weights: Vec<f64> = (0..layers.len()).map(|layer| (-depth * layer as f64).exp()).collect();
            let levels = levels(&damage, &weights, &sizes, sparsity, spread);
            let (least, largest) = bounds(sparsity, spread);
            let points = grid(sparsity, spread);
            let prices: Vec<f64> = (0..layers.len())
                .map(|l| weights[l] / sizes[l] * Slopes::new(&points, &damage[l]).slope_at(levels[l]))
                .collect();
            let inside = |l: &usize| levels[*l] > least + 1e-9 && levels[*l] < largest - 1e-9;
            let free: Vec<f64> = (0..layers.len()).filter(inside).map(|l| prices[l]).collect();
            let price = free.first().copied();
            for other in &free {
                prop_assert!((other / free[0] - 1.0).abs() < 1e-5, "{free:?}");
            }
            for (l, level) in levels.iter().enumerate() {
                prop_assert!((least..=largest).contains(level));
                if let Some(price) = price {
                    prop_assert!(*level > least + 1e-9 || prices[l] >= price * (1.0 - 1e-5));
                    prop_assert!(*level < largest - 1e-9 || prices[l] <= price * (1.0 + 1e-5));
                }
            }
            let mean = levels.iter().zip(&sizes).map(|(level, size)| level * size).sum::<f64>() / sizes.iter().sum::<f64>();
            prop_assert!((mean - sparsity).abs() < 1e-6, "{mean}");

            let patterns = by_damage(&outline, &damage, sparsity, spread, depth);
            for pattern in &patterns {
                prop_assert!((least..=largest).contains(&pattern.sparsity()), "{pattern} from {least} to {largest}");
            }
            let budget: i64 = outline.layers.iter().map(|layer| zeros(layer, sparsity)).sum();
            prop_assert!((total(&outline, &patterns) - budget).abs() <= 1);
        }

        #[test]
        fn a_heavier_layer_never_gets_more_zeros(
            scales in prop::collection::vec(0.01..1.0f64, 2..8),
            sparsity in 0.2..0.9f64,
            factor in 1.0..4.0f64,
        ) {
            let damage: Vec<_> = scales.iter().map(|&scale| curve(scale, 2.5, sparsity, 0.25)).collect();
            let (sizes, mut weights) = (vec![1e6; scales.len()], vec![1.0; scales.len()]);
            let before = levels(&damage, &weights, &sizes, sparsity, 0.25);
            weights[0] = factor;
            let after = levels(&damage, &weights, &sizes, sparsity, 0.25);
            prop_assert!(after[0] <= before[0] + 1e-9);
        }
    }
}
