//! How fast other workers are, by what they took for their shares of layers that this worker owned.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a layer's pace counts beside all before it.
const NEWEST: f64 = 0.5;

/// Speeds of other workers, as shares of this one's.
///
/// What a worker says of itself when it starts is measured in a tenth of a second; who was interrupted in it would get little to do
/// for the whole run.
#[derive(Debug, Default)]
pub struct Paces {
    known: Mutex<HashMap<String, f64>>,
}

/// Sequences that somebody brought through groups of a layer, and how long that took.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Pace {
    pub(super) sequences: usize,
    pub(super) seconds: f64,
}

impl Pace {
    /// Adds a group.
    pub(super) fn add(&mut self, sequences: usize, seconds: f64) {
        self.sequences += sequences;
        self.seconds += seconds;
    }

    fn speed(self) -> Option<f64> {
        let speed = self.sequences as f64 / self.seconds;
        (speed > 0.0 && speed.is_finite()).then_some(speed)
    }
}

impl Paces {
    fn known(&self) -> MutexGuard<'_, HashMap<String, f64>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Speeds of this worker and of these, if all of them are known.
    pub fn speeds(&self, endpoints: &[String]) -> Option<Vec<f64>> {
        let known = self.known();
        let others = endpoints.iter().map(|endpoint| known.get(endpoint).copied());
        [Some(1.0)].into_iter().chain(others).collect()
    }

    /// Notes what a layer took this worker and another; nothing if either had nothing to do.
    pub(super) fn note(&self, endpoint: &str, own: Pace, other: Pace) {
        let (Some(own), Some(other)) = (own.speed(), other.speed()) else { return };
        let mut known = self.known();
        let speed = known.entry(endpoint.to_owned()).or_insert(other / own);
        *speed += NEWEST * (other / own - *speed);
        tracing::debug!(endpoint, seen = other / own, speed, "an assistant's pace");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(sequences: usize, seconds: f64) -> Pace {
        let mut pace = Pace::default();
        pace.add(sequences, seconds);
        pace
    }

    #[test]
    fn what_is_seen_last_counts_half_and_who_was_not_seen_is_not_guessed() {
        let paces = Paces::default();
        let both = ["a".to_owned(), "b".to_owned()];
        assert_eq!(paces.speeds(&both), None);
        paces.note("a", pace(6, 1.0), pace(3, 1.0));
        assert_eq!((paces.speeds(&both), paces.speeds(&both[..1])), (None, Some(vec![1.0, 0.5])));
        paces.note("b", pace(6, 2.0), pace(6, 1.0));
        paces.note("a", pace(6, 1.0), pace(9, 1.0));
        assert_eq!(paces.speeds(&both), Some(vec![1.0, 1.0, 2.0]));
        assert_eq!(paces.speeds(&[]), Some(vec![1.0]));
    }

    #[test]
    fn who_had_nothing_to_do_has_no_pace() {
        let paces = Paces::default();
        for (own, other) in [(pace(0, 0.0), pace(3, 1.0)), (pace(3, 1.0), pace(0, 0.0)), (pace(3, 1.0), pace(3, 0.0))] {
            paces.note("a", own, other);
        }
        assert_eq!(paces.speeds(&["a".to_owned()]), None);
    }
}
