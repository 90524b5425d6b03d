//! What an owner knows of solutions that are being measured: which tiles are whose, and what was found of them.

use std::collections::VecDeque;
use std::sync::Arc;

use candle_core::Tensor;
use espalier_common::clock::Stopwatch;
use espalier_proto::v1 as pb;

use super::measuring::{Tiles, asked};
use crate::prune::InputStats;
use crate::prune::measure::{Measuring, Tile, numbers_of_row, relative};
use crate::transport::parcel::numbers;

/// The relative error of a matrix, and that on held-out inputs if there are any.
pub(crate) type RelativeErrors = (f64, Option<f64>);

/// Groups that are being measured, and those that were. Of the latter nothing is kept but their errors.
#[derive(Default)]
pub(super) struct Measurements {
    ongoing: Vec<Ongoing>,
    errors: Vec<(usize, Vec<RelativeErrors>)>,
    /// What the owner spent on it.
    seconds: f64,
}

impl Measurements {
    /// Begins with a group.
    ///
    /// # Errors
    /// What the tensor backend says.
    pub(super) fn begin(
        &mut self,
        tiles: Tiles,
        pairs: Vec<(Tensor, Tensor)>,
        stats: Arc<InputStats>,
    ) -> candle_core::Result<()> {
        self.ongoing.push(Ongoing::begin(tiles, pairs, stats)?);
        Ok(())
    }

    /// Whether the owner has anything to measure.
    pub(super) fn has_own(&self) -> bool {
        self.ongoing.iter().any(|ongoing| !ongoing.own.is_empty())
    }

    /// Measures a piece, if there is one; returns of which group it was, and the seconds that it took.
    ///
    /// # Errors
    /// What the tensor backend says.
    pub(super) fn go_on(&mut self) -> candle_core::Result<Option<(usize, f64)>> {
        let Some(ongoing) = self.ongoing.iter_mut().find(|ongoing| !ongoing.own.is_empty()) else { return Ok(None) };
        let (watch, group) = (Stopwatch::start(), ongoing.group);
        ongoing.go_on()?;
        self.settle();
        let seconds = watch.seconds();
        self.seconds += seconds;
        Ok(Some((group, seconds)))
    }

    /// Keeps what an assistant measured; false if it is not what it was asked for.
    pub(super) fn take(&mut self, number: usize, measured: &pb::Measure, body: &[u8]) -> bool {
        let ongoing = self.ongoing.iter_mut().find(|ongoing| ongoing.group == measured.group as usize);
        let is_taken = ongoing.is_some_and(|ongoing| ongoing.take(number, measured, body));
        self.settle();
        is_taken
    }

    /// Leaves what an assistant did not measure to the owner.
    pub(super) fn adopt(&mut self, number: usize) {
        self.ongoing.iter_mut().for_each(|ongoing| ongoing.adopt(number));
    }

    /// Whether an assistant has yet to answer.
    pub(super) fn waits_for(&self, number: usize) -> bool {
        self.ongoing.iter().any(|ongoing| !ongoing.lent[number].is_empty())
    }

    /// What the owner spent on all that was begun.
    pub(super) fn seconds(&self) -> f64 {
        self.seconds
    }

    /// The errors of groups that are measured and were not asked for yet, in order.
    pub(super) fn take_errors(&mut self) -> Vec<(usize, Vec<RelativeErrors>)> {
        let mut errors = std::mem::take(&mut self.errors);
        errors.sort_unstable_by_key(|(group, _)| *group);
        errors
    }

    fn settle(&mut self) {
        self.errors.extend(self.ongoing.extract_if(.., |ongoing| ongoing.is_done()).map(Ongoing::errors));
    }
}

/// A group whose solutions are being measured.
struct Ongoing {
    group: usize,
    pairs: Vec<(Tensor, Tensor)>,
    stats: Arc<InputStats>,
    /// The owner's tiles; those of an assistant that was given up on follow.
    own: VecDeque<Measuring>,
    /// Of each assistant, until it answers.
    lent: Vec<Vec<Tile>>,
    /// Of each member, row by row.
    numbers: Vec<Vec<f64>>,
}

impl Ongoing {
    fn begin(
        Tiles { group, own, lent }: Tiles,
        pairs: Vec<(Tensor, Tensor)>,
        stats: Arc<InputStats>,
    ) -> candle_core::Result<Self> {
        let width = numbers_of_row(stats.held_out.is_some());
        let numbers = pairs.iter().map(|(solution, _)| Ok(vec![0.0; solution.dim(0)? * width]));
        let numbers = numbers.collect::<candle_core::Result<_>>()?;
        let own = VecDeque::from([Measuring::new(own, pairs.clone(), Arc::clone(&stats))]);
        Ok(Self { group, pairs, stats, own, lent, numbers })
    }

    /// Measures a piece of what is the owner's.
    fn go_on(&mut self) -> candle_core::Result<()> {
        if let Some(own) = self.own.front_mut()
            && !own.go_on()?
            && let Some(own) = self.own.pop_front()
        {
            own.into_measured().for_each(|(tile, numbers)| self.put(&tile, &numbers));
        }
        Ok(())
    }

    fn put(&mut self, Tile { member, rows }: &Tile, numbers: &[f64]) {
        let width = numbers_of_row(self.stats.held_out.is_some());
        self.numbers[*member][rows.start * width..rows.end * width].copy_from_slice(numbers);
    }

    /// Keeps what an assistant measured; false if it is not what it was asked for.
    fn take(&mut self, number: usize, measured: &pb::Measure, body: &[u8]) -> bool {
        let values = numbers::<f64>(body);
        let lent = &self.lent[number];
        if lent.is_empty() || *measured != asked(self.group, lent) || values.iter().any(|value| !value.is_finite()) {
            return false;
        }
        let mut rest = &*values;
        for tile in std::mem::take(&mut self.lent[number]) {
            let (here, others) = rest.split_at(tile.rows.len() * numbers_of_row(self.stats.held_out.is_some()));
            self.put(&tile, here);
            rest = others;
        }
        true
    }

    /// Leaves what an assistant did not measure to the owner.
    fn adopt(&mut self, number: usize) {
        let tiles = std::mem::take(&mut self.lent[number]);
        if !tiles.is_empty() {
            self.own.push_back(Measuring::new(tiles, self.pairs.clone(), Arc::clone(&self.stats)));
        }
    }

    fn is_done(&self) -> bool {
        self.own.is_empty() && self.lent.iter().all(Vec::is_empty)
    }

    fn errors(self) -> (usize, Vec<RelativeErrors>) {
        let has_held_out = self.stats.held_out.is_some();
        (self.group, self.numbers.iter().map(|numbers| relative(numbers, has_held_out)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prune::fixture;
    use crate::prune::measure::measure;
    use crate::transport::parcel::bytes_of;

    const ROWS: usize = 300;

    /// A group of one matrix whose first tile is lent to the second assistant; its tiles, and what these measure.
    fn begun() -> (Measurements, Arc<InputStats>, Vec<Tile>, Vec<Vec<f64>>) {
        let (split, _) = fixture::random_corrected(7, ROWS, 24, 90).split(60);
        let (dense, stats) = (split.problem.tensor(), Arc::new((*split.problem.stats).clone()));
        let solution = (&dense * 0.9).unwrap();
        let tiles: Vec<Tile> = Tile::of(0, ROWS).collect();
        let all = measure(&tiles, &[(&solution, &dense)], &stats).unwrap();
        let mut measurements = Measurements::default();
        let dealt = Tiles { group: 2, own: tiles[1..].to_vec(), lent: vec![Vec::new(), tiles[..1].to_vec()] };
        measurements.begin(dealt, vec![(solution, dense)], Arc::clone(&stats)).unwrap();
        (measurements, stats, tiles, all)
    }

    fn by_the_owner(measurements: &mut Measurements) {
        while measurements.has_own() {
            assert!(matches!(measurements.go_on(), Ok(Some((2, _)))));
        }
        assert!(matches!(measurements.go_on(), Ok(None)));
    }

    #[test]
    fn what_an_assistant_does_not_measure_is_measured_by_the_owner() {
        let (mut measurements, _, _, all) = begun();
        by_the_owner(&mut measurements);
        assert!(measurements.waits_for(1) && !measurements.waits_for(0) && measurements.take_errors().is_empty());
        measurements.adopt(1);
        measurements.adopt(1);
        by_the_owner(&mut measurements);
        assert!(!measurements.waits_for(1) && measurements.seconds() > 0.0);
        assert_eq!(measurements.take_errors(), [(2, vec![relative(&all.concat(), true)])]);
    }

    #[test]
    fn an_assistant_is_believed_for_what_it_was_asked_for_and_once() {
        let (mut measurements, _, tiles, all) = begun();
        let (told, body) = (asked(2, &tiles[..1]), bytes_of(all[0].clone()));
        assert!(!measurements.take(0, &told, &body), "another was asked");
        for wrong in [asked(1, &tiles[..1]), asked(2, &tiles[1..2])] {
            assert!(!measurements.take(1, &wrong, &body), "{wrong:?}");
        }
        assert!(!measurements.take(1, &told, &bytes_of(vec![f64::NAN; all[0].len()])));
        assert!(measurements.take(1, &told, &body) && !measurements.take(1, &told, &body));
        by_the_owner(&mut measurements);
        assert_eq!(measurements.take_errors(), [(2, vec![relative(&all.concat(), true)])]);
    }

    #[test]
    fn statistics_are_let_go_of_once_they_are_measured_by() {
        let (mut measurements, stats, tiles, all) = begun();
        by_the_owner(&mut measurements);
        assert!(Arc::strong_count(&stats) > 1, "an assistant may be lost yet");
        assert!(measurements.take(1, &asked(2, &tiles[..1]), &bytes_of(all[0].clone())));
        assert_eq!(Arc::strong_count(&stats), 1);
    }
}
