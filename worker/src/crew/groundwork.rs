//! The owner's side of a group's groundwork: each worker makes a share of it, and what they made is handed round.

use std::sync::Arc;

use bytes::Bytes;
use espalier_common::clock::Stopwatch;
use espalier_proto::v1 as pb;
use espalier_proto::v1::head::Matter;
use rayon::prelude::*;

use super::owner::Crew;
use crate::prune::{Groundwork, SolveError};
use crate::transport::Outgoing;
use crate::transport::parcel::{Body, bytes_of, numbers};

/// Operations of making parts in the time in which a byte of the gram is sent, unpacked and conditioned: measured over loopback,
/// 50 GFLOP/s and a third of a GB/s.
const OPERATIONS_A_BYTE: f64 = 150.0;
/// The same of a byte of the other statistics, which the owner sums up and packs before its first part, less what assistants take to
/// unpack it after their last: 70 GFLOP/s and 0.7 GB/s.
const OPERATIONS_A_BYTE_OF_REST: f64 = 100.0;

/// Groundwork that is being laid, and who makes which parts of it.
pub(crate) struct Laying {
    group: usize,
    pub(crate) groundwork: Arc<dyn Groundwork>,
    /// Parts that the owner has yet to make.
    own: Vec<usize>,
    /// Assistants that are there.
    there: Vec<usize>,
    /// Of each assistant.
    wanted: Vec<Vec<usize>>,
    /// What the owner's parts took so far.
    seconds: f64,
}

impl Laying {
    /// Whether the owner has a part to make.
    pub(super) fn has_own(&self) -> bool {
        !self.own.is_empty()
    }

    /// What the owner's parts took so far.
    pub(super) fn seconds(&self) -> f64 {
        self.seconds
    }
}

/// Shares of so many parts: each goes to the hand that is through first, where the owner, the first hand, begins so many parts later
/// and so do all others.
fn deal(parts: usize, (owner, others): (f64, f64), hands: usize) -> Vec<Vec<usize>> {
    let mut dealt = vec![Vec::new(); hands];
    for part in 0..parts {
        let ends = |hand: usize| dealt[hand].len() as f64 + if hand == 0 { owner } else { others };
        let first = (0..hands).min_by(|&a, &b| ends(a).total_cmp(&ends(b))).unwrap_or(0);
        dealt[first].push(part);
    }
    dealt
}

impl Crew<'_> {
    /// Asks assistants for their shares of what all blocks of a group need. They were sent the gram; the sizes in bytes are its own, and
    /// that of the other statistics.
    pub(super) fn lend_parts(
        &mut self,
        group: usize,
        groundwork: Arc<dyn Groundwork>,
        (gram, rest): (u64, u64),
    ) -> Laying {
        let there: Vec<usize> = (0..self.assistants.len()).filter(|&number| self.is_there(number)).collect();
        let parts_of = |bytes: u64, operations: f64| bytes as f64 * operations / groundwork.flops();
        let later = (parts_of(rest, OPERATIONS_A_BYTE_OF_REST), parts_of(gram, OPERATIONS_A_BYTE));
        let mut dealt = deal(groundwork.parts(), later, 1 + there.len());
        let mut wanted: Vec<Vec<usize>> = self.assistants.iter().map(|_| Vec::new()).collect();
        for (&number, lent) in there.iter().zip(dealt.drain(1..)).filter(|(_, lent)| !lent.is_empty()) {
            let parts = lent.iter().map(|&part| part as u32).collect();
            self.send(number, Outgoing::of(Matter::Make(pb::Make { group: group as u32, parts })));
            wanted[number] = lent;
        }
        self.laid = Some(group);
        Laying { group, groundwork, own: dealt.remove(0), there, wanted, seconds: 0.0 }
    }

    /// Makes as many of the owner's parts as there are threads, and hands them round.
    ///
    /// # Errors
    /// See [`SolveError`].
    pub(super) fn make_some(&mut self, laying: &mut Laying) -> Result<(), SolveError> {
        self.place.control.check_cancelled().map_err(|_| SolveError::Cancelled)?;
        let watch = Stopwatch::start();
        let count = rayon::current_num_threads().min(laying.own.len());
        let parts: Vec<usize> = laying.own.drain(..count).collect();
        let make = |&part: &usize| Ok::<_, SolveError>((part, laying.groundwork.make(part)?));
        for (part, made) in parts.par_iter().map(make).collect::<Result<Vec<_>, _>>()? {
            tracing::trace!(laying.group, part, "a part is made");
            let body = bytes_of(made);
            self.send_all(|| letter(laying.group, part, body.clone()));
        }
        laying.seconds += watch.seconds();
        Ok(())
    }

    /// Makes what is left of the owner's parts, takes those of the others and hands them round; returns the operations that all of
    /// it took. What an assistant does not give is made by whoever needs it.
    ///
    /// # Errors
    /// See [`SolveError`].
    pub(super) fn lay(&mut self, mut laying: Laying) -> Result<f64, SolveError> {
        while laying.has_own() {
            self.make_some(&mut laying)?;
        }
        let Laying { group, groundwork, there, mut wanted, seconds, .. } = laying;
        let own_leaves = self.own_leaves();
        let mut taken: Vec<(usize, usize, Bytes)> = Vec::new();
        let missing = wanted.iter().map(Vec::len).collect();
        let collected = self.collect((own_leaves, seconds), (missing, false), |number, matter, body| {
            let Matter::Part(told) = matter else { return false };
            // The body is as large as a part of the group that it is told to be of.
            if told.group as usize != group {
                return false;
            }
            let part = told.part as usize;
            let Some(place) = wanted[number].iter().position(|wanted| *wanted == part) else { return false };
            wanted[number].swap_remove(place);
            let is_taken = groundwork.take(part, &numbers(&body));
            taken.push((number, part, body.into()));
            tracing::trace!(group, part, is_taken, "a part came");
            is_taken
        });
        collected.map_err(|_| SolveError::Cancelled)?;
        self.laid = None;
        self.place.received(taken.iter().map(|(_, _, body)| body.len() as u64).sum());
        for (number, part, body) in taken {
            let others = there.iter().filter(|&&other| other != number);
            others.for_each(|&other| self.send(other, letter(group, part, body.clone())));
        }
        Ok(groundwork.parts() as f64 * groundwork.flops())
    }
}

fn letter(group: usize, part: usize, body: Bytes) -> Outgoing {
    let matter = Matter::Part(pb::Part { group: group as u32, part: part as u32 });
    Outgoing { matter, body: Body::Bytes(body) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_dealt_evenly_and_who_is_late_makes_fewer() {
        assert_eq!(deal(5, (0.0, 0.0), 2), [vec![0, 2, 4], vec![1, 3]]);
        assert_eq!(deal(5, (0.0, 1.5), 2), [vec![0, 1, 3], vec![2, 4]]);
        assert_eq!(deal(5, (1.5, 0.0), 2), [vec![2, 4], vec![0, 1, 3]]);
        assert_eq!(deal(5, (0.0, 9.0), 3), [vec![0, 1, 2, 3, 4], vec![], vec![]]);
        assert_eq!(deal(2, (0.0, 1.0), 1), [vec![0, 1]]);
    }
}
