//! The owner's side of measuring a group's solutions: each tile of rows is measured by somebody, and rather not by who solved it.
//! Nothing waits for it but the report. So whoever has a share of it goes on with the next group first, and measures whenever it
//! would wait for others.

use std::collections::VecDeque;
use std::sync::Arc;

use candle_core::Tensor;
use espalier_common::clock::Stopwatch;
use espalier_common::shares::shares;
use espalier_proto::v1 as pb;
use espalier_proto::v1::head::Matter;

use super::board::largest_outside;
use super::owner::{Crew, GLANCE, PATIENCE};
use crate::calibrate::tree::LEAVES;
use crate::prune::InputStats;
use crate::prune::measure::{Measuring, Tile, numbers_of_row, relative};
use crate::transport::Outgoing;
use crate::transport::parcel::numbers;
use crate::unit::{Phases, TaskError};

/// Who measures which tiles of a group.
pub(crate) struct Tiles {
    group: usize,
    own: Vec<Tile>,
    /// Of each assistant.
    lent: Vec<Vec<Tile>>,
}

/// A group whose solutions are being measured.
pub(super) struct Ongoing {
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

/// The relative error of a matrix, and that on held-out inputs if there are any.
pub(crate) type RelativeErrors = (f64, Option<f64>);

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
    pub(super) fn adopt(&mut self, number: usize) {
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

impl Crew<'_> {
    /// Asks assistants that have a group's statistics to measure their shares of it, by how many sequences each has. They solved from
    /// the last on and measure the first.
    pub(super) fn lend_tiles(&mut self, group: usize) -> Tiles {
        let rows = self.outline.groups[group].iter().map(|member| member.rows).enumerate();
        let tiles: Vec<Tile> = rows.flat_map(|(member, rows)| Tile::of(member, rows)).collect();
        let order = largest_outside(&tiles.iter().map(|tile| tile.rows.len()).collect::<Vec<_>>());
        let mut own: Vec<Tile> = order.into_iter().map(|tile| tiles[tile].clone()).collect();
        let helps = |number: &usize| self.is_there(*number) && self.statistics_of == Some(group);
        let there: Vec<usize> = (0..self.assistants.len()).filter(helps).collect();
        let weights = there.iter().map(|&number| self.assistants[number].leaves.len() as f64);
        let weights: Vec<f64> = weights.chain([self.own_leaves() as f64]).collect();
        let mut lent = vec![Vec::new(); self.assistants.len()];
        for (&number, count) in there.iter().zip(shares(&weights, own.len())) {
            lent[number] = own.drain(..count).collect();
            if count > 0 {
                self.send(number, Outgoing::of(Matter::Measure(asked(group, &lent[number]))));
            }
        }
        Tiles { group, own, lent }
    }

    /// Begins to measure `pairs` of what the members of a group became, as stored, and were; if nobody has a share of it, all is
    /// measured at once. What is left of the owner's tiles of the group before is measured first, or its statistics would pile up.
    ///
    /// # Errors
    /// `Cancelled`, and what the tensor backend says.
    pub(crate) fn measure(
        &mut self,
        tiles: Tiles,
        pairs: Vec<(Tensor, Tensor)>,
        stats: &Arc<InputStats>,
    ) -> Result<(), TaskError> {
        let is_shared = tiles.lent.iter().any(|lent| !lent.is_empty());
        self.measure_own()?;
        self.ongoing.push(Ongoing::begin(tiles, pairs, Arc::clone(stats))?);
        if is_shared { Ok(()) } else { self.measure_own() }
    }

    /// Whether the owner has anything to measure.
    pub(super) fn has_own_tiles(&self) -> bool {
        self.ongoing.iter().any(|ongoing| !ongoing.own.is_empty())
    }

    /// Measures a piece, if there is one.
    pub(super) fn measure_some(&mut self) -> candle_core::Result<()> {
        if let Some(ongoing) = self.ongoing.iter_mut().find(|ongoing| !ongoing.own.is_empty()) {
            let watch = Stopwatch::start();
            ongoing.go_on()?;
            self.waiting.add_measuring(ongoing.group, watch.seconds());
        }
        Ok(())
    }

    fn measure_own(&mut self) -> Result<(), TaskError> {
        while self.has_own_tiles() {
            self.place.control.check_cancelled()?;
            self.measure_some()?;
        }
        Ok(())
    }

    /// Keeps what an assistant measured; false if it is not what it was asked for.
    pub(super) fn take_measured(&mut self, number: usize, measured: &pb::Measure, body: &[u8]) -> bool {
        self.place.received(body.len() as u64);
        let ongoing = self.ongoing.iter_mut().find(|ongoing| ongoing.group == measured.group as usize);
        ongoing.is_some_and(|ongoing| ongoing.take(number, measured, body))
    }

    /// Measures what is left and waits for what assistants have yet to measure; returns the errors of the members of each group
    /// that was begun since this was asked last.
    ///
    /// # Errors
    /// `Cancelled`, and what the tensor backend says.
    pub(crate) fn measured(&mut self, phases: &mut Phases) -> Result<Vec<(usize, Vec<RelativeErrors>)>, TaskError> {
        let watch = Stopwatch::start();
        self.measure_own()?;
        let own = watch.seconds();
        while !self.ongoing.iter().all(Ongoing::is_done) {
            let idle = Stopwatch::start();
            if let Some((number, ..)) = self.next_letter(GLANCE)? {
                self.lose(number, "it said something out of turn");
            }
            self.waiting.add(idle.seconds(), 0.0);
            if watch.seconds() > self.place.patience.as_secs_f64() + PATIENCE * own * LEAVES as f64 {
                let is_late = |number: &usize| self.ongoing.iter().any(|ongoing| !ongoing.lent[*number].is_empty());
                let late: Vec<usize> = (0..self.assistants.len()).filter(is_late).collect();
                late.into_iter().for_each(|number| self.lose(number, "it is too slow"));
            }
            self.measure_own()?;
        }
        self.take_waiting().book(phases);
        Ok(std::mem::take(&mut self.ongoing).into_iter().map(Ongoing::errors).collect())
    }
}

/// Tiles as they are asked for.
fn asked(group: usize, tiles: &[Tile]) -> pb::Measure {
    let tile = |Tile { member, rows }: &Tile| pb::Tile {
        member: *member as u32,
        first_row: rows.start as u32,
        rows: rows.len() as u32,
    };
    pb::Measure { group: group as u32, tiles: tiles.iter().map(tile).collect() }
}

/// Tiles as they were asked for.
pub(super) fn tiles_of(measure: &pb::Measure) -> Vec<Tile> {
    let tile = |tile: &pb::Tile| {
        let first = tile.first_row as usize;
        Tile { member: tile.member as usize, rows: first..first + tile.rows as usize }
    };
    measure.tiles.iter().map(tile).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::prune::fixture;
    use crate::prune::measure::measure;
    use crate::transport::parcel::bytes_of;

    const ROWS: usize = 300;

    /// A group of one matrix whose first tile is lent, and what all of it measures.
    fn begun() -> (Ongoing, Vec<Tile>, Vec<Vec<f64>>) {
        let (split, _) = fixture::random_corrected(7, ROWS, 24, 90).split(60);
        let (dense, stats) = (split.problem.tensor(), Arc::clone(&split.problem.stats));
        let solution = (&dense * 0.9).unwrap();
        let tiles: Vec<Tile> = Tile::of(0, ROWS).collect();
        let all = measure(&tiles, &[(&solution, &dense)], &stats).unwrap();
        let dealt = Tiles { group: 2, own: tiles[1..].to_vec(), lent: vec![Vec::new(), tiles[..1].to_vec()] };
        (Ongoing::begin(dealt, vec![(solution, dense)], stats).unwrap(), tiles, all)
    }

    fn measured_by_the_owner(ongoing: &mut Ongoing) {
        while !ongoing.own.is_empty() {
            ongoing.go_on().unwrap();
        }
    }

    #[test]
    fn what_an_assistant_does_not_measure_is_measured_by_the_owner() {
        let (mut ongoing, _, all) = begun();
        measured_by_the_owner(&mut ongoing);
        assert!(!ongoing.is_done());
        ongoing.adopt(1);
        ongoing.adopt(1);
        measured_by_the_owner(&mut ongoing);
        assert!(ongoing.is_done());
        assert_eq!(ongoing.errors(), (2, vec![relative(&all.concat(), true)]));
    }

    #[test]
    fn an_assistant_is_believed_for_what_it_was_asked_for_and_once() {
        let (mut ongoing, tiles, all) = begun();
        let (told, body) = (asked(2, &tiles[..1]), bytes_of(all[0].clone()));
        assert!(!ongoing.take(0, &told, &body), "another was asked");
        assert!(!ongoing.take(1, &asked(1, &tiles[..1]), &body) && !ongoing.take(1, &asked(2, &tiles[1..2]), &body));
        assert!(!ongoing.take(1, &told, &bytes_of(vec![f64::NAN; all[0].len()])));
        assert!(ongoing.take(1, &told, &body) && !ongoing.take(1, &told, &body));
        measured_by_the_owner(&mut ongoing);
        assert!(ongoing.is_done());
        assert_eq!(ongoing.errors(), (2, vec![relative(&all.concat(), true)]));
    }
}
