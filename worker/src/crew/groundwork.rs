//! The owner's side of a group's groundwork: each worker makes a share of it, and what they made is handed round.

use bytes::Bytes;
use espalier_common::clock::Stopwatch;
use espalier_proto::v1 as pb;
use espalier_proto::v1::head::Matter;
use rayon::prelude::*;

use super::owner::Crew;
use super::statistics;
use crate::prune::{Groundwork, InputStats, SolveError};
use crate::transport::Outgoing;
use crate::transport::parcel::{Body, bytes_of, numbers};

impl Crew<'_> {
    /// Makes what all blocks of a group need, each worker a share, and hands it round; returns the operations that it took. What
    /// an assistant does not give is made by whoever needs it.
    pub(super) fn lay(
        &mut self,
        group: usize,
        stats: &InputStats,
        groundwork: &dyn Groundwork,
    ) -> Result<f64, SolveError> {
        let columns = stats.gram.dim(1)?;
        let there: Vec<usize> = (0..self.assistants.len()).filter(|&number| self.is_there(number)).collect();
        let of_hand = |hand: usize| (hand..groundwork.parts()).step_by(1 + there.len());
        let mut wanted: Vec<Vec<usize>> = self.assistants.iter().map(|_| Vec::new()).collect();
        for (hand, &number) in there.iter().enumerate() {
            wanted[number] = of_hand(1 + hand).collect();
            let parts = wanted[number].iter().map(|&part| part as u32).collect();
            self.send(number, Outgoing::of(Matter::Make(pb::Make { group: group as u32, parts })));
        }
        let letter = |part: usize, body: Bytes| Outgoing {
            matter: Matter::Part(pb::Part { group: group as u32, part: part as u32 }),
            body: Body::Bytes(body),
        };
        let watch = Stopwatch::start();
        let own: Vec<usize> = of_hand(0).collect();
        for parts in own.chunks(rayon::current_num_threads()) {
            self.place.control.check_cancelled().map_err(|_| SolveError::Cancelled)?;
            let make = |&part: &usize| Ok::<_, SolveError>((part, statistics::triangle(&groundwork.make(part)?)));
            for (part, made) in parts.par_iter().map(make).collect::<Result<Vec<_>, _>>()? {
                let body = bytes_of(made);
                self.send_all(|| letter(part, body.clone()));
            }
        }
        let (seconds, own_leaves) = (watch.seconds(), self.own_leaves());
        let mut taken: Vec<(usize, usize, Bytes)> = Vec::new();
        let missing = wanted.iter().map(Vec::len).collect();
        let collected = self.collect((own_leaves, seconds), (missing, false), |number, matter, body| {
            let Matter::Part(told) = matter else { return false };
            let part = told.part as usize;
            let Some(place) = wanted[number].iter().position(|wanted| *wanted == part) else { return false };
            wanted[number].swap_remove(place);
            let matrix = statistics::from_triangle(&numbers::<f32>(&body), columns);
            taken.push((number, part, body.into()));
            told.group as usize == group && groundwork.take(part, matrix)
        });
        collected.map_err(|_| SolveError::Cancelled)?;
        self.place.received(taken.iter().map(|(_, _, body)| body.len() as u64).sum());
        for (number, part, body) in taken {
            there
                .iter()
                .filter(|&&other| other != number)
                .for_each(|&other| self.send(other, letter(part, body.clone())));
        }
        Ok(groundwork.parts() as f64 * groundwork.flops())
    }
}
