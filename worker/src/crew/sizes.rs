//! How large the body of each letter about a layer is: known to both sides before the first one, so that nothing is allocated
//! because a peer says so.

use std::ops::Range;

use espalier_common::ids::LayerIndex;
use espalier_proto::v1::head::Matter;
use espalier_proto::v1::{Block, Hidden, Measure, Part};

use super::finish::DIGEST_DIGITS;
use super::share::sampling;
use super::statistics;
use crate::calibrate::tree::{Branch, LEAVES, Portion, Sampling, sequences_of};
use crate::cut_task::header_of;
use crate::prune::MOST_PARTS;
use crate::prune::measure::numbers_of_row;
use crate::run::Run;
use crate::unit::TaskError;

/// Sizes of what a layer's owner and an assistant may say to each other.
#[derive(Debug, Clone)]
pub struct LayerSizes {
    streams: usize,
    leaves: Range<usize>,
    sequences: Range<usize>,
    states_bytes: u64,
    groups: Vec<Group>,
}

#[derive(Debug, Clone)]
struct Group {
    rows: Vec<usize>,
    sampling: Sampling,
    stored_bytes: u64,
}

impl Group {
    /// How many rows these parts of its members are: it must have all of them, and no more in all than it has.
    fn rows_of(&self, parts: impl Iterator<Item = (u32, u32, u32)>) -> Option<u64> {
        let mut rows = 0u64;
        for (member, first, count) in parts {
            if u64::from(first) + u64::from(count) > *self.rows.get(member as usize)? as u64 {
                return None;
            }
            rows += u64::from(count);
        }
        (rows <= self.rows.iter().sum::<usize>() as u64).then_some(rows)
    }
}

impl LayerSizes {
    /// Sizes for the share `leaves` of a layer.
    ///
    /// # Errors
    /// `MissingTensor`, and what the model says of the layer.
    pub fn new(run: &Run, layer: LayerIndex, leaves: Range<usize>) -> Result<Self, TaskError> {
        let outline = run.model.decoder.outline(layer)?;
        let mut groups = Vec::new();
        for members in &outline.groups {
            let mut stored_bytes = 0;
            for member in members {
                let (_, dtype, _) = header_of(&*run.model.checkpoint, &member.tensor)?;
                stored_bytes += (member.elements() * dtype.bytes()) as u64;
            }
            let rows = members.iter().map(|member| member.rows).collect();
            let columns = members.first().map_or(0, |member| member.columns);
            groups.push(Group { rows, sampling: sampling(run, columns), stored_bytes });
        }
        let with_dense = groups.first().is_some_and(|group| group.sampling.with_dense);
        let states = run.tokens.sequence_length().saturating_mul(run.model.decoder.hidden_size());
        Ok(Self {
            streams: if with_dense { 2 } else { 1 },
            sequences: sequences_of(&leaves, run.tokens.sequences()),
            leaves,
            states_bytes: (states as u64).saturating_mul(4),
            groups,
        })
    }

    /// Streams of hidden states: the dense one rides along where it is compared.
    pub fn streams(&self) -> usize {
        self.streams
    }

    /// The share's sequences.
    pub fn sequences(&self) -> Range<usize> {
        self.sequences.clone()
    }

    /// What an owner may say, and the bytes of its body.
    pub fn of_order(&self, matter: &Matter) -> Option<u64> {
        match matter {
            Matter::Hidden(hidden) => self.of_states(*hidden),
            Matter::Gather(group) => self.group(*group).map(|_| 0),
            Matter::Solve(solve) => self.of_blocks(solve.group, solve.blocks.iter().copied()).map(|_| 0),
            Matter::Statistics(told) => {
                self.group(told.group).map(|group| statistics::bytes(&group.sampling, Portion::told(told.rest)))
            }
            Matter::Apply(group) => self.group(*group).map(|group| group.stored_bytes),
            Matter::Make(make) => {
                (make.parts.len() <= MOST_PARTS).then_some(self.group(make.group)).flatten().map(|_| 0)
            }
            Matter::Part(part) => self.of_part(*part),
            Matter::Measure(measure) => self.of_tiles(measure).map(|_| 0),
            Matter::Finish(_) => Some(0),
            Matter::Keep(keep) => (keep.layer_sha256.len() == DIGEST_DIGITS).then_some(0),
            _ => None,
        }
    }

    /// What an assistant may say, and the bytes of its body.
    pub fn of_answer(&self, matter: &Matter) -> Option<u64> {
        match matter {
            Matter::Ready(_) | Matter::Fault(_) => Some(0),
            Matter::Sums(sums) => {
                let branch = Branch { first: sums.first_leaf as usize, leaves: sums.leaves as usize };
                let is_ours = branch.leaves <= LEAVES && Branch::of(&self.leaves).contains(&branch);
                let group = self.group(sums.group).filter(|_| is_ours);
                group.map(|group| group.sampling.values(branch, Portion::told(sums.rest)) as u64 * 8)
            }
            Matter::Solved(solved) => {
                let blocks: Option<Vec<Block>> = solved.blocks.iter().map(|solved| solved.block).collect();
                self.of_blocks(solved.group, blocks?.into_iter())
            }
            Matter::Part(part) => self.of_part(*part),
            Matter::Measured(measure) => self.of_tiles(measure),
            Matter::Output(hidden) => self.of_states(*hidden),
            Matter::Keeping(keep) if keep.stores => Some((self.streams * self.sequences.len() * DIGEST_DIGITS) as u64),
            Matter::Keeping(_) => Some(0),
            _ => None,
        }
    }

    fn group(&self, group: u32) -> Option<&Group> {
        self.groups.get(group as usize)
    }

    fn of_part(&self, part: Part) -> Option<u64> {
        let group = self.group(part.group).filter(|_| (part.part as usize) < MOST_PARTS);
        group.map(|group| statistics::triangle_bytes(&group.sampling))
    }

    fn of_states(&self, hidden: Hidden) -> Option<u64> {
        let is_ours = (hidden.stream as usize) < self.streams && self.sequences.contains(&(hidden.sequence as usize));
        is_ours.then_some(self.states_bytes)
    }

    /// Bytes of the rows of some blocks of a group.
    fn of_blocks(&self, group: u32, blocks: impl Iterator<Item = Block>) -> Option<u64> {
        let group = self.group(group)?;
        let rows = group.rows_of(blocks.map(|block| (block.member, block.first_row, block.rows)))?;
        Some(rows * group.sampling.columns as u64 * 4)
    }

    /// Bytes of what is measured of some rows of a group.
    fn of_tiles(&self, measure: &Measure) -> Option<u64> {
        let group = self.group(measure.group)?;
        let rows = group.rows_of(measure.tiles.iter().map(|tile| (tile.member, tile.first_row, tile.rows)))?;
        Some(rows * numbers_of_row(group.sampling.has_held_out()) as u64 * 8)
    }
}
