//! The assistant's side of a shared layer: it does what the owner's letters ask for, in their order. It keeps nothing, unless it
//! has a share of its own to keep.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{Device, Tensor};
use espalier_common::checkpoint::cast;
use espalier_common::clock::Stopwatch;
use espalier_common::digest::Digest;
use espalier_common::fault::Fault;
use espalier_common::ids::{Boundary, LayerIndex};
use espalier_common::outline::LayerOutline;
use espalier_proto::v1 as pb;
use espalier_proto::v1::head::Matter;
use rayon::prelude::*;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use super::measuring::tiles_of;
use super::share::{Share, sampling};
use super::{LayerSizes, statistics};
use crate::boundary;
use crate::calibrate::cache::Entry;
use crate::calibrate::tree::{Portion, Sampling};
use crate::keeping::{Keeping, by_sequence};
use crate::linalg::{matrix, on_host, values};
use crate::prune::measure::Measuring;
use crate::prune::{Groundwork, GroupSolver, InputStats, Problem, RowBlock, Solution};
use crate::run::Run;
use crate::source::Workplace;
use crate::transport::parcel::{Body, numbers};
use crate::transport::{Letter, Outgoing, Received};
use crate::unit::{Phases, TaskError};

/// The line to the owner.
pub struct OwnerLine {
    /// What it says.
    pub orders: mpsc::Receiver<Received>,
    /// What it is answered.
    pub answers: mpsc::Sender<Outgoing>,
}

/// What an assistant has of a layer.
#[derive(Debug, Clone)]
pub struct Part {
    /// Its leaves.
    pub leaves: Range<usize>,
    /// Where it has its share from, or what it makes it from. Otherwise it is lent that.
    pub keeping: Option<Keeping>,
}

/// Assists with a layer until the owner hangs up; tells the owner if it cannot.
///
/// # Errors
/// What it told the owner.
pub fn assist(place: &Workplace<'_>, layer: LayerIndex, part: Part, line: OwnerLine) -> Result<(), Fault> {
    let answers = line.answers.clone();
    let assisted = Assistant::begin(place, layer, part, line).and_then(Assistant::serve);
    match assisted {
        Ok(()) => tracing::info!(%layer, "assisted"),
        Err(TaskError::Cancelled) => tracing::info!(%layer, "assistance ended"),
        Err(error) => {
            let fault = error.fault();
            tracing::warn!(%layer, %fault, "cannot assist");
            // The owner may be gone; then it needs no answer.
            let _ = answers.blocking_send(Outgoing::of(Matter::Fault(fault.clone().into())));
            return Err(fault);
        }
    }
    Ok(())
}

struct Assistant<'a> {
    place: &'a Workplace<'a>,
    layer: LayerIndex,
    line: OwnerLine,
    outline: LayerOutline,
    sizes: LayerSizes,
    keeps: bool,
    share: Share,
    /// The group whose gram came last.
    prepared: Option<Prepared>,
    /// What it was asked to measure last, while it does so, and the seconds that it took so far.
    measuring: Option<(pb::Measure, Measuring, f64)>,
    phases: Phases,
}

/// A group whose gram is there.
struct Prepared {
    group: usize,
    gram: Tensor,
    groundwork: Option<Arc<dyn Groundwork>>,
    /// Once all statistics are there.
    complete: Option<Complete>,
}

/// A group whose statistics are there.
struct Complete {
    stats: Arc<InputStats>,
    /// The dense weight of each member, by row.
    dense: Vec<Tensor>,
    /// Until the group is solved.
    solver: Option<Box<dyn GroupSolver>>,
    /// What each member became, as stored: once it is solved.
    applied: Vec<Tensor>,
}

/// The owner's next letter; `None` once it has hung up.
fn next(place: &Workplace<'_>, line: &mut OwnerLine) -> Result<Option<Letter>, TaskError> {
    let (orders, token) = (&mut line.orders, place.control.token());
    let received = place.runtime.block_on(async {
        tokio::select! {
            received = orders.recv() => Ok(received),
            () = token.cancelled() => Err(TaskError::Cancelled),
        }
    });
    Ok(received?.and_then(|received| heard(place, received)))
}

/// The letter that was received; `None` if the owner is gone.
fn heard(place: &Workplace<'_>, received: Received) -> Option<Letter> {
    match received.letter {
        Ok(letter) => {
            place.received(letter.body.len() as u64);
            Some(letter)
        }
        Err(error) => {
            tracing::debug!(%error, "the owner is gone");
            None
        }
    }
}

impl<'a> Assistant<'a> {
    /// Loads the layer, and takes its share of the hidden states or makes sure that it has it.
    fn begin(place: &'a Workplace<'a>, layer: LayerIndex, part: Part, mut line: OwnerLine) -> Result<Self, TaskError> {
        let Part { leaves, keeping } = part;
        let decoder = &place.run.model.decoder;
        let mut phases = Phases::of(place.control);
        let (outline, loaded) = (decoder.outline(layer)?, place.load(layer, &mut phases)?);
        let sizes = LayerSizes::new(place.run, layer, leaves.clone())?;
        let streams = match &keeping {
            Some(keeping) => {
                let streams = place.kept_input(layer, keeping, sizes.sequences(), &mut phases)?;
                place.let_go_before(layer);
                streams
            }
            None => Self::borrow(place, &mut line, &sizes)?,
        };
        let share = Share::new(leaves, streams.into_iter().map(|entries| (loaded.share(), entries)));
        let keeps = keeping.is_some_and(|keeping| !keeping.given_back);
        let assistant =
            Self { place, layer, line, outline, sizes, keeps, share, prepared: None, measuring: None, phases };
        assistant.answer(Outgoing::of(Matter::Ready(pb::Ready { threads: rayon::current_num_threads() as u32 })))?;
        Ok(assistant)
    }

    /// The share of the hidden states that the owner lends.
    fn borrow(place: &Workplace<'_>, line: &mut OwnerLine, sizes: &LayerSizes) -> Result<Vec<Vec<Entry>>, TaskError> {
        let shape = (place.run.tokens.sequence_length(), place.run.model.decoder.hidden_size());
        let mut streams = Vec::new();
        for stream in 0..sizes.streams() {
            let mut entries = Vec::new();
            for sequence in sizes.sequences() {
                let expected = pb::Hidden { stream: stream as u32, sequence: sequence as u32 };
                let Some(letter) = next(place, line)? else { return Err(TaskError::Cancelled) };
                if letter.matter != Matter::Hidden(expected) {
                    return Err(TaskError::OutOfTurn { what: "hidden states" });
                }
                let hidden = Tensor::from_vec(numbers::<f32>(&letter.body).into_owned(), shape, &place.run.device)?;
                entries.push(place.cache.put(hidden)?);
            }
            streams.push(entries);
        }
        Ok(streams)
    }

    fn answer(&self, letter: Outgoing) -> Result<(), TaskError> {
        self.line.answers.blocking_send(letter).map_err(|_| TaskError::Cancelled)
    }

    fn serve(mut self) -> Result<(), TaskError> {
        while let Some(Letter { matter, body }) = self.next()? {
            self.place.control.check_cancelled()?;
            match matter {
                Matter::Gather(group) => self.gather(group as usize)?,
                Matter::Statistics(told) if told.rest => self.complete(told.group as usize, &body)?,
                Matter::Statistics(told) => self.prepare(told.group as usize, &body)?,
                Matter::Make(make) => self.make(&make)?,
                Matter::Part(part) => self.take(part, &body)?,
                Matter::Solve(order) => self.solve(&order)?,
                Matter::Apply(group) => self.apply(group as usize, &body)?,
                Matter::Measure(order) => self.measure(order)?,
                Matter::Finish(pb::Finish {}) => return self.finish(),
                _ => return Err(TaskError::OutOfTurn { what: "an order" }),
            }
        }
        Ok(())
    }

    /// The owner's next letter. As long as there is none, it measures.
    fn next(&mut self) -> Result<Option<Letter>, TaskError> {
        while self.measuring.is_some() {
            match self.line.orders.try_recv() {
                Ok(received) => return Ok(heard(self.place, received)),
                Err(TryRecvError::Disconnected) => return Ok(None),
                Err(TryRecvError::Empty) => self.measure_some()?,
            }
        }
        next(self.place, &mut self.line)
    }

    fn gather(&mut self, group: usize) -> Result<(), TaskError> {
        self.prepared = None;
        self.phases.enter(Some(group));
        let watch = Stopwatch::start();
        let forest = self.share.gather(self.place, group, &self.outline.groups[group], &mut self.phases)?;
        let first = &self.outline.groups[group][0];
        let failed = |source| TaskError::Gram { tensor: first.tensor.clone(), source };
        let sampling = sampling(self.place.run, first.columns);
        let (grams, rests) = self.phases.time("gram", || forest.split()).map_err(failed)?;
        let seconds = watch.seconds();
        for (portion, forest) in Portion::EACH.into_iter().zip([grams, rests]) {
            for (branch, sums) in forest.into_branches() {
                if sampling.values(branch, portion) > 0 {
                    let (first_leaf, leaves) = (branch.first as u32, branch.leaves as u32);
                    let told = pb::Sums { group: group as u32, first_leaf, leaves, rest: portion.is_rest(), seconds };
                    let values = self.phases.time("gram", || sums.into_values()).map_err(failed)?;
                    self.answer(Outgoing::with_values(Matter::Sums(told), values))?;
                }
            }
        }
        Ok(())
    }

    /// Begins with a group's gram, which is all there is of its statistics in some runs.
    fn prepare(&mut self, group: usize, body: &[u8]) -> Result<(), TaskError> {
        let (tensor, sampling) = self.sampled(group);
        let gram = statistics::unpack_gram(&sampling, body, &Device::Cpu)?;
        let (solver, ctx) = (&self.place.run.method.solver, self.place.control.solve_ctx());
        let groundwork = self.phases.time("solve", || solver.groundwork(&gram, &ctx));
        let groundwork = groundwork.map_err(|source| TaskError::Solve { tensor, source })?;
        self.prepared = Some(Prepared { group, gram, groundwork, complete: None });
        if statistics::bytes(&sampling, Portion::Rest) == 0 { self.complete(group, &[]) } else { Ok(()) }
    }

    /// Makes the solver of a group ready, all of whose statistics are there now.
    fn complete(&mut self, group: usize, body: &[u8]) -> Result<(), TaskError> {
        let (tensor, sampling) = self.sampled(group);
        let prepared = self.prepared.as_mut().filter(|prepared| prepared.group == group && prepared.complete.is_none());
        let prepared = prepared.ok_or(TaskError::OutOfTurn { what: "statistics" })?;
        let stats = statistics::unpack_rest(&sampling, prepared.gram.clone(), body, &Device::Cpu)?;
        let (stats, method, ctx) = (Arc::new(stats), &self.place.run.method.solver, self.place.control.solve_ctx());
        let solver = self.phases.time("solve", || match &prepared.groundwork {
            Some(groundwork) => Arc::clone(groundwork).complete(Arc::clone(&stats)),
            None => method.prepare(Arc::clone(&stats), &ctx),
        });
        let solver = Some(solver.map_err(|source| TaskError::Solve { tensor, source })?);
        // Once for all blocks: on the host weights are turned.
        let members = 0..self.outline.groups[group].len();
        let dense = members.map(|member| on_host(self.share.layer().weight(group, member)));
        let dense = dense.collect::<candle_core::Result<_>>()?;
        prepared.complete = Some(Complete { stats, dense, solver, applied: Vec::new() });
        Ok(())
    }

    /// The first tensor of a group, and what is summed of its inputs.
    fn sampled(&self, group: usize) -> (String, Sampling) {
        let first = &self.outline.groups[group][0];
        (first.tensor.clone(), sampling(self.place.run, first.columns))
    }

    fn groundwork(&self, group: u32) -> Result<&dyn Groundwork, TaskError> {
        let prepared = self.prepared.as_ref().filter(|prepared| prepared.group == group as usize);
        let groundwork = prepared.and_then(|prepared| prepared.groundwork.as_deref());
        groundwork.ok_or(TaskError::OutOfTurn { what: "groundwork" })
    }

    /// Makes parts of a group's groundwork; each is sent as soon as it is there.
    fn make(&self, order: &pb::Make) -> Result<(), TaskError> {
        let (groundwork, control) = (self.groundwork(order.group)?, self.place.control);
        let sublayer = &self.outline.groups[order.group as usize][0];
        order.parts.par_iter().try_for_each(|&part| {
            control.check_cancelled()?;
            let made = groundwork.make(part as usize);
            let made = made.map_err(|source| TaskError::Solve { tensor: sublayer.tensor.clone(), source })?;
            tracing::trace!(order.group, part, "a part is made");
            let matter = Matter::Part(pb::Part { group: order.group, part });
            self.answer(Outgoing::with_values(matter, made))
        })
    }

    fn take(&self, part: pb::Part, body: &[u8]) -> Result<(), TaskError> {
        let is_taken = self.groundwork(part.group)?.take(part.part as usize, &numbers(body));
        tracing::trace!(part.group, part.part, is_taken, "a part came");
        if is_taken { Ok(()) } else { Err(TaskError::OutOfTurn { what: "a part of groundwork" }) }
    }

    fn solve(&mut self, order: &pb::Solve) -> Result<(), TaskError> {
        let watch = Stopwatch::start();
        let solved = self.solve_blocks(order);
        self.phases.add("solve", watch.seconds(), 0.0);
        solved
    }

    fn solve_blocks(&self, order: &pb::Solve) -> Result<(), TaskError> {
        let group = order.group as usize;
        let ready = self.prepared.as_ref().filter(|prepared| prepared.group == group);
        let ready = ready.and_then(|prepared| prepared.complete.as_ref());
        let solver = ready.and_then(|ready| Some((&ready.dense, ready.solver.as_deref()?)));
        let (dense, solver) = solver.ok_or(TaskError::OutOfTurn { what: "an order to solve" })?;
        let pattern = Run::layer_pattern(&order.pattern_json)?;
        let (place, ctx) = (self.place, self.place.control.solve_ctx());
        let solve = |block: &pb::Block| -> Result<(pb::SolvedBlock, Vec<f32>), TaskError> {
            let member = block.member as usize;
            let sublayer = &self.outline.groups[group][member];
            let mask = place.run.mask.as_ref();
            let imported = mask.map(|mask| mask.weight(sublayer, &Device::Cpu)).transpose()?;
            let weight = &dense[member];
            let problem = Problem { tensor: &sublayer.tensor, weight, pattern, imported: imported.as_ref() };
            let rows = RowBlock {
                first: block.first_row as usize,
                rows: block.rows as usize,
                zeros: usize::try_from(block.zeros).unwrap_or(usize::MAX).min(sublayer.elements()),
            };
            let watch = Stopwatch::start();
            let solved = problem.solve_rows(&rows, |problem, zeros| solver.solve_block(problem, zeros, &ctx));
            let solved = solved.map_err(|source| TaskError::Solve { tensor: sublayer.tensor.clone(), source })?;
            Ok((told(*block, &solved, watch.seconds()), values(&solved.weight)?))
        };
        let solved = order.blocks.par_iter().map(solve).collect::<Result<Vec<_>, TaskError>>()?;
        let (blocks, rows): (Vec<_>, Vec<_>) = solved.into_iter().unzip();
        let matter = Matter::Solved(pb::Solved { order: order.order, group: order.group, blocks });
        self.answer(Outgoing::with_values(matter, rows.concat()))
    }

    fn apply(&mut self, group: usize, body: &[u8]) -> Result<(), TaskError> {
        let mut rest = body;
        let prepared = self.prepared.as_mut().filter(|prepared| prepared.group == group);
        let mut ready = prepared.and_then(|prepared| {
            prepared.groundwork = None;
            prepared.complete.as_mut()
        });
        if let Some(ready) = &mut ready {
            ready.solver = None;
        }
        for (member, sublayer) in self.outline.groups[group].iter().enumerate() {
            let (_, dtype, _) = self.place.stored_as(sublayer)?;
            let (stored, others) = rest.split_at(sublayer.elements() * dtype.bytes());
            rest = others;
            let weight = matrix(cast::f32_from_bytes(dtype, stored), sublayer.columns, &self.place.run.device)?;
            if let Some(ready) = &mut ready {
                ready.applied.push(weight.clone());
            }
            self.share.set_weight(group, member, weight)?;
        }
        Ok(())
    }

    /// Begins to measure rows of a group that was applied, for which alone its statistics are needed from here on. What is left of
    /// the group before is measured first.
    fn measure(&mut self, order: pb::Measure) -> Result<(), TaskError> {
        self.measure_all()?;
        let prepared = self.prepared.take().filter(|prepared| prepared.group == order.group as usize);
        let applied = prepared.and_then(|prepared| prepared.complete).filter(|ready| !ready.applied.is_empty());
        let Complete { stats, dense, applied, .. } =
            applied.ok_or(TaskError::OutOfTurn { what: "an order to measure" })?;
        let pairs = applied.into_iter().zip(dense).collect();
        let measuring = Measuring::new(tiles_of(&order), pairs, stats);
        self.measuring = Some((order, measuring, 0.0));
        Ok(())
    }

    /// Measures a piece, and answers once all is measured.
    fn measure_some(&mut self) -> Result<(), TaskError> {
        self.place.control.check_cancelled()?;
        let Some((_, measuring, seconds)) = &mut self.measuring else { return Ok(()) };
        let watch = Stopwatch::start();
        let goes_on = measuring.go_on()?;
        *seconds += watch.seconds();
        if !goes_on && let Some((order, measuring, seconds)) = self.measuring.take() {
            self.phases.add_to(Some(order.group as usize), "verify", seconds, 0.0);
            let numbers: Vec<f64> = measuring.into_measured().flat_map(|(_, numbers)| numbers).collect();
            self.answer(Outgoing::with_values(Matter::Measured(order), numbers))?;
        }
        Ok(())
    }

    fn measure_all(&mut self) -> Result<(), TaskError> {
        while self.measuring.is_some() {
            self.measure_some()?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<(), TaskError> {
        // Nobody waits for an assistant that is through with its share.
        self.measure_all()?;
        let Self { place, layer, mut line, outline: _, sizes, keeps, share, prepared, measuring: _, mut phases } = self;
        drop(prepared);
        phases.enter(None);
        place.read_ahead(layer);
        let output = share.finish(place, &mut phases)?;
        if keeps {
            // The owner says what the layer has become as soon as it knows.
            let Some(letter) = next(place, &mut line)? else { return Ok(()) };
            let Matter::Keep(keep) = letter.matter else { return Err(TaskError::OutOfTurn { what: "an order" }) };
            let digests = Self::keep(place, Boundary(layer.0 + 1), &keep, &sizes, output)?;
            let answer = Outgoing::with_values(Matter::Keeping(keep), digests.into_bytes());
            return line.answers.blocking_send(answer).map_err(|_| TaskError::Cancelled);
        }
        for (stream, entries) in output.into_iter().enumerate() {
            for (sequence, entry) in sizes.sequences().zip(entries) {
                let matter = Matter::Output(pb::Hidden { stream: stream as u32, sequence: sequence as u32 });
                let letter = Outgoing { matter, body: Body::States(entry) };
                line.answers.blocking_send(letter).map_err(|_| TaskError::Cancelled)?;
            }
        }
        Ok(())
    }

    /// Keeps the share's output as what the layer's digest gives; returns what it is named by in the run's store, if it is also
    /// to be there.
    fn keep(
        place: &Workplace<'_>,
        next: Boundary,
        keep: &pb::Keep,
        sizes: &LayerSizes,
        output: Vec<Vec<Entry>>,
    ) -> Result<String, TaskError> {
        let layer = Digest::try_from(keep.layer_sha256.clone());
        let layer = layer.map_err(|_| TaskError::OutOfTurn { what: "a layer without a digest" })?;
        let mut digests = String::new();
        if keep.stores {
            let streams: Vec<&[Entry]> = output.iter().map(Vec::as_slice).collect();
            let stored = boundary::put(place, next, &streams)?;
            digests = stored.iter().flatten().map(ToString::to_string).collect();
        }
        place.holdings.keep(&place.run.id, next, Some(layer), by_sequence(sizes.sequences(), output));
        Ok(digests)
    }
}

/// What the owner is told of a block that was solved.
fn told(block: pb::Block, solved: &Solution, seconds: f64) -> pb::SolvedBlock {
    pb::SolvedBlock {
        block: Some(block),
        iterations: solved.iterations,
        damping: solved.damping,
        damping_raised: solved.damping_raised,
        dead_channels: solved.dead_channels,
        flops: solved.flops,
        seconds,
        alpha: solved.alpha,
    }
}
