//! Proximal maps.

/// The proximal map of `threshold·|a|`: moves `a` towards zero by `threshold`, and to exactly `+0.0` if it is closer.
///
/// Source: ALGORITHMS.md §3.
#[inline]
pub fn soft_threshold(a: f32, threshold: f32) -> f32 {
    let shrunk = a.abs() - threshold;
    if shrunk > 0.0 { shrunk.copysign(a) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn soft_threshold_minimises_its_objective(a in -5.0f32..5.0, threshold in 0.0f32..3.0, other in -5.0f32..5.0) {
            let objective = |v: f32| 0.5 * f64::from(v - a).powi(2) + f64::from(threshold) * f64::from(v.abs());
            prop_assert!(objective(soft_threshold(a, threshold)) <= objective(other) + 1e-6);
        }
    }

    #[test]
    fn small_values_become_positive_zero() {
        assert_eq!(soft_threshold(-0.5, 1.0).to_bits(), 0);
    }
}
