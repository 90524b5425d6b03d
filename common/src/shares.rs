//! How what is shared out beforehand is dealt to workers that are not equally fast.

/// Deals `things` of one size to workers of the given speeds, in their order: so that the slowest to be through with its share is
/// through as early as possible, and everybody has one at least, if there are enough. Speeds within a quarter of each other
/// count as equal, as do speeds that say nothing: measurements differ by that much.
pub fn shares(speeds: &[f64], things: usize) -> Vec<usize> {
    let workers = speeds.len();
    let (mut slowest, mut fastest) = (f64::INFINITY, 0.0f64);
    for &speed in speeds {
        (slowest, fastest) = (slowest.min(speed), fastest.max(speed));
    }
    // No comparison holds of what is no number.
    let differ = slowest > 0.0 && fastest.is_finite() && fastest > 1.25 * slowest;
    if !differ || things < workers {
        return (0..workers).map(|worker| (worker + 1) * things / workers - worker * things / workers).collect();
    }
    let mut dealt = vec![1; workers];
    for _ in workers..things {
        let through = |worker: usize| (dealt[worker] + 1) as f64 / speeds[worker];
        // The first of equals, so that everybody deals the same way.
        let next = (0..workers).min_by(|&a, &b| through(a).total_cmp(&through(b))).unwrap_or(0);
        dealt[next] += 1;
    }
    dealt
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn faster_workers_get_more_and_measurement_noise_changes_nothing() {
        assert_eq!(shares(&[100.0, 100.0], 8), [4, 4]);
        assert_eq!(shares(&[100.0, 120.0, 110.0], 8), [2, 3, 3]);
        assert_eq!(shares(&[300.0, 100.0], 8), [6, 2]);
        assert_eq!(shares(&[100.0, 700.0], 8), [1, 7]);
        assert_eq!(shares(&[1e4, 1.0, 1.0], 8), [6, 1, 1]);
    }

    #[test]
    fn speeds_that_say_nothing_count_as_equal_and_too_few_things_leave_some_without() {
        for speeds in [[0.0, 5.0], [f64::NAN, 5.0], [1.0, f64::INFINITY], [-1.0, 1.0]] {
            assert_eq!(shares(&speeds, 8), [4, 4], "{speeds:?}");
        }
        assert_eq!(shares(&[1.0, 2.0, 4.0], 2), [0, 1, 1]);
        assert_eq!(shares(&[], 8), [0; 0]);
    }

    proptest! {
        #[test]
        fn no_other_deal_is_through_earlier(speeds in prop::collection::vec(1.0f64..10.0, 2..5), things in 4usize..9) {
            let through = |dealt: &[usize]| {
                dealt.iter().zip(&speeds).map(|(&things, speed)| things as f64 / speed).fold(0.0, f64::max)
            };
            let found = shares(&speeds, things);
            prop_assert_eq!(found.iter().sum::<usize>(), things);
            prop_assert!(found.iter().all(|share| *share > 0));
            let fastest = speeds.iter().copied().fold(0.0, f64::max);
            prop_assume!(fastest > 1.25 * speeds.iter().copied().fold(f64::INFINITY, f64::min));
            // Every way to give each worker one at least.
            let mut all = vec![Vec::new()];
            for _ in 1..speeds.len() {
                all = all.into_iter().flat_map(|deal: Vec<usize>| (1..things).map(move |more| [&deal[..], &[more]].concat())).collect();
            }
            let whole = all.into_iter().filter_map(|mut deal| {
                let rest = things.checked_sub(deal.iter().sum()).filter(|rest| *rest > 0)?;
                deal.push(rest);
                Some(deal)
            });
            let best = whole.map(|deal| through(&deal)).fold(f64::INFINITY, f64::min);
            prop_assert!(through(&found) <= best * (1.0 + 1e-12));
        }
    }
}
