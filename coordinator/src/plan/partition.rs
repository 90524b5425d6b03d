//! Which worker owns which layers.

/// Cuts layers into `parts` contiguous runs of nearly equal bytes, minimising the largest run; returns for each layer the
/// index of its part. Parts are used in order; with fewer layers than parts the last parts stay empty.
///
/// The largest run is minimal among all contiguous cuts (bisection on the bound, then first fit).
pub fn contiguous(layer_bytes: &[u64], parts: usize) -> Vec<usize> {
    let parts = parts.max(1);
    let mut low = layer_bytes.iter().copied().max().unwrap_or(0);
    let mut high = layer_bytes.iter().sum::<u64>().max(low);
    while low < high {
        let bound = low + (high - low) / 2;
        if runs_needed(layer_bytes, bound) <= parts { high = bound } else { low = bound + 1 }
    }
    first_fit(layer_bytes, low, parts)
}

/// Cuts layers into contiguous runs for workers of the given speeds, in their order, so that the slowest to be through with
/// its bytes is through as early as possible. Speeds within a quarter of each other count as equal: measurements differ by
/// that much, and a cut that changes with them helps nobody. A worker that is too slow for any layer gets none.
pub fn by_speed(layer_bytes: &[u64], speeds: &[u64]) -> Vec<usize> {
    let fastest = speeds.iter().copied().max().unwrap_or(0).max(1);
    let slowest = speeds.iter().copied().min().unwrap_or(0);
    if slowest == 0 || u128::from(fastest) * 4 <= u128::from(slowest) * 5 {
        return contiguous(layer_bytes, speeds.len());
    }
    // What a worker gets through while the fastest gets through `bound` bytes.
    let room = |speed: u64, bound: u64| (u128::from(bound) * u128::from(speed) / u128::from(fastest)) as u64;
    let fill = |bound: u64| {
        let (mut part, mut filled) = (0, 0u64);
        let mut owners = Vec::with_capacity(layer_bytes.len());
        for &bytes in layer_bytes {
            while filled.saturating_add(bytes) > room(*speeds.get(part)?, bound) {
                part += 1;
                filled = 0;
            }
            filled += bytes;
            owners.push(part);
        }
        Some(owners)
    };
    // With room for everything, the fastest alone is enough.
    let (mut low, mut high) = (0, layer_bytes.iter().fold(0u64, |sum, &bytes| sum.saturating_add(bytes)));
    while low < high {
        let bound = low + (high - low) / 2;
        if fill(bound).is_some() { high = bound } else { low = bound + 1 }
    }
    fill(low).unwrap_or_else(|| contiguous(layer_bytes, speeds.len()))
}

fn runs_needed(layer_bytes: &[u64], bound: u64) -> usize {
    let mut runs = 1;
    let mut filled = 0;
    for &bytes in layer_bytes {
        if filled + bytes > bound {
            runs += 1;
            filled = 0;
        }
        filled += bytes;
    }
    runs
}

fn first_fit(layer_bytes: &[u64], bound: u64, parts: usize) -> Vec<usize> {
    let mut part = 0;
    let mut filled = 0;
    let mut owner = Vec::with_capacity(layer_bytes.len());
    for (layer, &bytes) in layer_bytes.iter().enumerate() {
        // A later part must not stay empty while layers are left to give it.
        let others_would_starve = layer_bytes.len() - layer < parts - part && filled > 0;
        if filled + bytes > bound || others_would_starve {
            part = (part + 1).min(parts - 1);
            filled = 0;
        }
        filled += bytes;
        owner.push(part);
    }
    owner
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn equal_layers_are_cut_evenly() {
        assert_eq!(contiguous(&[1; 6], 2), [0, 0, 0, 1, 1, 1]);
        assert_eq!(contiguous(&[1; 4], 3), [0, 0, 1, 2]);
        assert_eq!(contiguous(&[1; 2], 4), [0, 1]);
    }

    #[test]
    fn a_heavy_layer_stands_alone() {
        assert_eq!(contiguous(&[1, 1, 9, 1], 3), [0, 0, 1, 2]);
    }

    #[test]
    fn faster_workers_get_more_and_measurement_noise_changes_nothing() {
        assert_eq!(by_speed(&[1; 6], &[200, 100]), [0, 0, 0, 0, 1, 1]);
        assert_eq!(by_speed(&[1; 6], &[100, 110]), contiguous(&[1; 6], 2));
        assert_eq!(by_speed(&[1; 3], &[1000, 1]), [0, 0, 0]);
        assert_eq!(by_speed(&[1; 3], &[1, 1000]), [1, 1, 1]);
        assert_eq!(by_speed(&[1; 4], &[0, 100]), contiguous(&[1; 4], 2));
    }

    proptest! {
        #[test]
        fn no_other_contiguous_cut_is_through_earlier(
            bytes in prop::collection::vec(1u64..50, 1..7),
            speeds in prop::collection::vec(1u64..100, 1..4),
        ) {
            let fastest = *speeds.iter().max().unwrap();
            prop_assume!(fastest * 4 > speeds.iter().min().unwrap() * 5);
            let longest = |owners: &[usize]| {
                (0..speeds.len())
                    .map(|part| bytes.iter().zip(owners).filter(|(_, o)| **o == part).map(|(b, _)| b).sum::<u64>())
                    .zip(&speeds)
                    .map(|(sum, speed)| (sum * fastest).div_ceil(*speed))
                    .max()
                    .unwrap()
            };
            let found = by_speed(&bytes, &speeds);
            // Every way to write down non-decreasing owners.
            let mut all = vec![Vec::new()];
            for _ in &bytes {
                all = all
                    .into_iter()
                    .flat_map(|cut: Vec<usize>| {
                        (cut.last().copied().unwrap_or(0)..speeds.len()).map(move |part| [&cut[..], &[part]].concat())
                    })
                    .collect();
            }
            let best = all.iter().map(|cut| longest(cut)).min().unwrap();
            prop_assert_eq!(longest(&found), best);
        }

        #[test]
        fn parts_are_contiguous_and_none_is_larger_than_it_must_be(bytes in prop::collection::vec(1u64..100, 1..24), parts in 1usize..6) {
            let owner = contiguous(&bytes, parts);
            prop_assert!(owner.windows(2).all(|pair| pair[1] == pair[0] || pair[1] == pair[0] + 1));
            prop_assert!(owner[0] == 0 && *owner.last().unwrap() < parts);
            let used = owner.last().unwrap() + 1;
            prop_assert_eq!(used, parts.min(bytes.len()));
            let total: u64 = bytes.iter().sum();
            let largest = (0..used).map(|part| bytes.iter().zip(&owner).filter(|(_, o)| **o == part).map(|(b, _)| b).sum::<u64>()).max().unwrap();
            let heaviest = *bytes.iter().max().unwrap();
            prop_assert!(largest <= total / parts as u64 + heaviest);
        }
    }
}
