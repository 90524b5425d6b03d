//! What an owner's waiting for its assistants is made of.

use std::collections::BTreeMap;

use crate::unit::Phases;

/// Seconds in which an owner had nothing to do that anybody waited for.
#[derive(Debug, PartialEq, Default)]
pub(crate) struct Waiting {
    /// For assistants that compute.
    computed: f64,
    /// For letters on their way, and to pack and unpack them: what other workers cost that a single one has not.
    moved: f64,
    /// In which solutions were measured meanwhile, by group.
    measured: BTreeMap<usize, f64>,
}

impl Waiting {
    /// Notes a wait that a letter ended which was `on_its_way` so long; a letter that came while there was other work is not
    /// waited for longer than the wait itself.
    pub(super) fn add(&mut self, seconds: f64, on_its_way: f64) {
        let moved = on_its_way.clamp(0.0, seconds.max(0.0));
        self.moved += moved;
        self.computed += seconds - moved;
    }

    /// Notes packing or unpacking.
    pub(super) fn add_packing(&mut self, seconds: f64) {
        self.moved += seconds;
    }

    /// Notes that it was no waiting: solutions of a group were measured.
    pub(super) fn add_measuring(&mut self, group: usize, seconds: f64) {
        *self.measured.entry(group).or_default() += seconds;
    }

    /// All of it.
    pub(crate) fn seconds(&self) -> f64 {
        self.computed + self.moved + self.measured.values().sum::<f64>()
    }

    /// Books it, if there was any.
    pub(crate) fn book(self, phases: &mut Phases) {
        for (phase, seconds) in [("wait", self.computed), ("transfer", self.moved)] {
            if seconds > 0.0 {
                phases.add(phase, seconds, 0.0);
            }
        }
        for (group, seconds) in self.measured {
            phases.add_to(Some(group), "verify", seconds, 0.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_letter_is_waited_for_as_long_as_it_is_on_its_way_while_somebody_waits() {
        let mut waiting = Waiting::default();
        // It came while the owner was at work; half of the wait; all of it.
        for (seconds, on_its_way) in [(0.0, 3.0), (4.0, 2.0), (1.0, 5.0), (2.0, 0.0)] {
            waiting.add(seconds, on_its_way);
        }
        waiting.add_packing(0.5);
        for (group, seconds) in [(1, 0.25), (2, 0.5), (1, 0.5)] {
            waiting.add_measuring(group, seconds);
        }
        assert_eq!(waiting, Waiting { computed: 4.0, moved: 3.5, measured: BTreeMap::from([(1, 0.75), (2, 0.5)]) });
        assert!((waiting.seconds() - 8.75).abs() < 1e-12);
    }
}
