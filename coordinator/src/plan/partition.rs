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

    proptest! {
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
