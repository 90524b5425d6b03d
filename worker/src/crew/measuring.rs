//! The owner's side of measuring a group's solutions: each tile of rows is measured by somebody, and rather not by who solved it.

use candle_core::Tensor;
use espalier_common::clock::Stopwatch;
use espalier_common::shares::shares;
use espalier_proto::v1 as pb;
use espalier_proto::v1::head::Matter;

use super::board::largest_outside;
use super::owner::Crew;
use crate::prune::InputStats;
use crate::prune::measure::{Tile, measure, numbers_of_row};
use crate::transport::Outgoing;
use crate::transport::parcel::numbers;
use crate::unit::TaskError;

/// Who measures which tiles of a group.
pub(crate) struct Tiles {
    group: usize,
    own: Vec<Tile>,
    /// Of each assistant.
    lent: Vec<Vec<Tile>>,
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

    /// Measures `pairs` of what the members of a group became, as stored, and were: for each its numbers, row by row. What an
    /// assistant does not give is measured here.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub(crate) fn measure(
        &mut self,
        Tiles { group, own, mut lent }: Tiles,
        pairs: &[(&Tensor, &Tensor)],
        stats: &InputStats,
    ) -> Result<Vec<Vec<f64>>, TaskError> {
        let watch = Stopwatch::start();
        let mut measured = measure(&own, pairs, stats)?;
        let mut tiles = own;
        let width = numbers_of_row(stats.held_out.is_some());
        let missing = lent.iter().map(|lent| usize::from(!lent.is_empty())).collect();
        let place = self.place;
        self.collect((self.own_leaves(), watch.seconds()), (missing, false), |number, matter, body| {
            place.received(body.len() as u64);
            if matter != Matter::Measured(asked(group, &lent[number])) {
                return false;
            }
            let values = numbers::<f64>(&body);
            if values.iter().any(|value| !value.is_finite()) {
                return false;
            }
            let mut rest = &*values;
            for tile in std::mem::take(&mut lent[number]) {
                let (here, others) = rest.split_at(tile.rows.len() * width);
                measured.push(here.to_vec());
                tiles.push(tile);
                rest = others;
            }
            true
        })?;
        let left = lent.concat();
        measured.extend(measure(&left, pairs, stats)?);
        tiles.extend(left);
        let mut numbers: Vec<Vec<f64>> = Vec::new();
        for (solution, _) in pairs {
            numbers.push(vec![0.0; solution.dim(0)? * width]);
        }
        for (Tile { member, rows }, measured) in tiles.into_iter().zip(measured) {
            numbers[member][rows.start * width..rows.end * width].copy_from_slice(&measured);
        }
        Ok(numbers)
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
