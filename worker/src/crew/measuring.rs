//! The owner's side of measuring a group's solutions: each tile of rows is measured by somebody, and rather not by who solved it.
//! Nothing waits for it but the report. So whoever has a share of it goes on with the next group first, and measures whenever it
//! would wait for others.

use std::sync::Arc;

use candle_core::Tensor;
use espalier_common::clock::Stopwatch;
use espalier_common::shares::shares;
use espalier_proto::v1 as pb;
use espalier_proto::v1::head::Matter;

use super::board::largest_outside;
use super::measurements::RelativeErrors;
use super::owner::{Crew, GLANCE, PATIENCE};
use crate::calibrate::tree::LEAVES;
use crate::prune::InputStats;
use crate::prune::measure::Tile;
use crate::transport::Outgoing;
use crate::unit::{Phases, TaskError};

/// Who measures which tiles of a group.
pub(crate) struct Tiles {
    pub(super) group: usize,
    pub(super) own: Vec<Tile>,
    /// Of each assistant.
    pub(super) lent: Vec<Vec<Tile>>,
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
        self.measurements.begin(tiles, pairs, Arc::clone(stats))?;
        if is_shared { Ok(()) } else { self.measure_own() }
    }

    /// Whether the owner has anything to measure.
    pub(super) fn has_own_tiles(&self) -> bool {
        self.measurements.has_own()
    }

    /// Measures a piece, if there is one.
    pub(super) fn measure_some(&mut self) -> candle_core::Result<()> {
        if let Some((group, seconds)) = self.measurements.go_on()? {
            self.waiting.add_measuring(group, seconds);
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

    /// Measures what is left and waits for what assistants have yet to measure; returns the errors of the members of each group
    /// that was begun since this was asked last.
    ///
    /// # Errors
    /// `Cancelled`, and what the tensor backend says.
    pub(crate) fn measured(&mut self, phases: &mut Phases) -> Result<Vec<(usize, Vec<RelativeErrors>)>, TaskError> {
        let watch = Stopwatch::start();
        loop {
            self.measure_own()?;
            let missing = (0..self.assistants.len()).filter(|&number| self.measurements.waits_for(number));
            let missing: Vec<usize> = missing.collect();
            if missing.is_empty() {
                break;
            }
            // Shares go by leaves, of which the owner may have one and an assistant all others.
            let takes = self.measurements.seconds() * LEAVES as f64;
            if watch.seconds() > self.place.patience.as_secs_f64() + PATIENCE * takes {
                missing.into_iter().for_each(|number| self.lose(number, "it is too slow"));
                continue;
            }
            let idle = Stopwatch::start();
            if let Some((number, ..)) = self.next_letter(GLANCE)? {
                self.lose(number, "it said something out of turn");
            }
            self.waiting.add(idle.seconds(), 0.0);
        }
        self.take_waiting().book(phases);
        Ok(self.measurements.take_errors())
    }
}

/// Tiles as they are asked for.
pub(super) fn asked(group: usize, tiles: &[Tile]) -> pb::Measure {
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
