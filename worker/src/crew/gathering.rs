//! The owner's side of gathering a group: everyone sums up their share, the gram comes first and goes back first, and while the
//! rest is on its way all begin with what the blocks need of the gram alone.

use std::sync::Arc;
use std::time::Duration;

use candle_core::Device;
use espalier_common::clock::Stopwatch;
use espalier_proto::v1 as pb;
use espalier_proto::v1::head::Matter;

use super::groundwork::Laying;
use super::owner::{Crew, GLANCE, Step};
use super::share::sampling;
use super::statistics;
use crate::calibrate::gram::GramError;
use crate::calibrate::tree::{Branch, Forest, Portion, Sampling, Sums, sequences_of};
use crate::prune::{InputStats, Statistics};
use crate::source::Workplace;
use crate::transport::Outgoing;
use crate::transport::parcel::{Body, bytes_of, numbers};
use crate::unit::{Phases, TaskError};

/// A group's statistics, and the groundwork that is under way for its blocks.
pub(crate) struct Gathered {
    pub(crate) stats: Arc<InputStats>,
    pub(crate) laying: Option<Laying>,
}

/// What is gathered.
#[derive(Clone, Copy)]
struct Gathering {
    group: usize,
    sampling: Sampling,
    /// The owner's leaves, and the seconds that they took.
    own: (usize, f64),
}

impl Crew<'_> {
    /// Brings all sequences before a group and sums up its inputs. Where blocks of the group are solved by several workers, they
    /// get the statistics, and begin with the groundwork.
    ///
    /// # Errors
    /// See [`TaskError`].
    pub(crate) fn gather(&mut self, group: usize, blocks: usize, phases: &mut Phases) -> Result<Gathered, TaskError> {
        let first = &self.outline.groups[group][0];
        let failed = |source| TaskError::Gram { tensor: first.tensor.clone(), source };
        let unsolved = |source| TaskError::Solve { tensor: first.tensor.clone(), source };
        self.adopt(phases)?;
        let mut forest = Forest::default();
        let (watch, leaves) = (Stopwatch::start(), self.own_leaves());
        self.gather_own(0, group, &mut forest, phases)?;
        if !self.has_help() {
            let stats = phases.time("gram", || forest.finish(&Device::Cpu)).map_err(failed)?;
            return Ok(Gathered { stats: Arc::new(stats), laying: None });
        }
        let own = (leaves, watch.seconds());
        let all = self.place.run.tokens.sequences();
        let sequences = self.shares.iter().map(|share| sequences_of(share.leaves(), all).len()).sum();
        self.pace.add(sequences, own.1);
        let gathering = Gathering { group, sampling: sampling(self.place.run, first.columns), own };
        let (mut grams, mut rests) = phases.time("gram", || forest.split()).map_err(failed)?;

        let here = self.shares.len();
        self.collect_sums(gathering, (Portion::Gram, &mut grams), None, phases)?;
        self.gather_of_the_lost(here, group, (Some(&mut grams), &mut rests), phases)?;
        let gram = phases.time("gram", || grams.finish(&Device::Cpu)).map_err(failed)?;

        let is_shared = self.is_shared(blocks);
        let mut laying = None;
        if is_shared {
            self.send_statistics(gathering, Portion::Gram, || statistics::pack_gram(&gram.gram))?;
            let ctx = self.place.control.solve_ctx();
            let groundwork = phases.time("solve", || self.place.run.method.solver.groundwork(&gram.gram, &ctx));
            let [gram, rest] = Portion::EACH.map(|portion| statistics::bytes(&gathering.sampling, portion));
            let groundwork = groundwork.map_err(unsolved)?;
            laying = groundwork.map(|groundwork| self.lend_parts(group, groundwork, (gram, rest)));
        }

        let here = self.shares.len();
        self.collect_sums(gathering, (Portion::Rest, &mut rests), laying.as_mut(), phases)?;
        phases.add("solve", laying.as_ref().map_or(0.0, Laying::seconds), 0.0);
        self.gather_of_the_lost(here, group, (None, &mut rests), phases)?;
        let stats = phases.time("gram", || rests.complete(gram, &Device::Cpu)).map_err(failed)?;
        if is_shared {
            self.send_statistics(gathering, Portion::Rest, || statistics::pack_rest(&gathering.sampling, &stats))?;
            self.statistics_of = Some(group);
        }
        if group + 1 == self.outline.groups.len() {
            self.note_paces();
        }
        self.take_waiting().book(phases);
        Ok(Gathered { stats: Arc::new(stats), laying })
    }

    /// Notes how fast everyone brought their share through the layer.
    fn note_paces(&self) {
        for assistant in self.assistants.iter().filter(|assistant| !assistant.leaves.is_empty()) {
            self.place.paces.note(&assistant.endpoint, self.pace, assistant.pace);
        }
    }

    /// Takes a portion of the sums of everyone who is there; while it is on its way, the owner makes its parts of the groundwork.
    fn collect_sums(
        &mut self,
        Gathering { group, sampling, own }: Gathering,
        (portion, forest): (Portion, &mut Forest),
        mut laying: Option<&mut Laying>,
        phases: &mut Phases,
    ) -> Result<(), TaskError> {
        let first = &self.outline.groups[group][0];
        let branches: Vec<Vec<Branch>> = self.assistants.iter().map(|one| Branch::of(&one.leaves)).collect();
        let mut wanted = branches.clone();
        wanted.iter_mut().for_each(|wanted| wanted.retain(|branch| sampling.values(*branch, portion) > 0));
        let mut bodies: Vec<Vec<(Branch, Vec<u8>)>> = vec![Vec::new(); wanted.len()];
        let mut took: Vec<f64> = vec![0.0; wanted.len()];
        let mut collection = self.collection(own, (wanted.iter().map(Vec::len).collect(), false));
        loop {
            let mut take = |number: usize, matter, body| {
                let Matter::Sums(told) = matter else { return false };
                let is_asked = told.group as usize == group && Portion::told(told.rest) == portion;
                if !is_asked || !told.seconds.is_finite() {
                    return false;
                }
                let branch = Branch { first: told.first_leaf as usize, leaves: told.leaves as usize };
                let Some(place) = wanted[number].iter().position(|wanted| *wanted == branch) else { return false };
                wanted[number].swap_remove(place);
                bodies[number].push((branch, body));
                took[number] = told.seconds;
                true
            };
            let has_parts = laying.as_ref().is_some_and(|laying| laying.has_own());
            let wait = if has_parts { Duration::ZERO } else { GLANCE };
            match (self.collect_one(&mut collection, wait, &mut take)?, &mut laying) {
                (Step::Done, _) => break,
                (Step::Waited, Some(laying)) if has_parts => {
                    let failed = |source| TaskError::Solve { tensor: first.tensor.clone(), source };
                    let watch = Stopwatch::start();
                    self.make_some(laying).map_err(failed)?;
                    collection.was_busy(watch.seconds());
                }
                _ => {}
            }
        }
        let failed = |source| TaskError::Gram { tensor: first.tensor.clone(), source };
        // A worker alone adds up its own branches, too.
        let adding = Stopwatch::start();
        let there: Vec<usize> = (0..bodies.len()).filter(|&number| self.is_there(number)).collect();
        for number in there {
            for (branch, body) in std::mem::take(&mut bodies[number]) {
                self.place.received(body.len() as u64);
                forest.insert_values(&sampling, (branch, portion), &numbers::<f64>(&body)).map_err(failed)?;
            }
            for branch in branches[number].iter().filter(|branch| sampling.values(**branch, portion) == 0) {
                forest.insert(*branch, Sums::default()).map_err(failed)?;
            }
            if portion == Portion::Gram {
                let assistant = &mut self.assistants[number];
                assistant.pace.add(sequences_of(&assistant.leaves, sampling.sequences).len(), took[number]);
            }
            tracing::trace!(number, group, ?portion, "sums are there");
        }
        phases.add("gram", adding.seconds(), 0.0);
        Ok(())
    }

    /// Gathers the shares of assistants that were given up on, which are the owner's shares from the one numbered `first` on: what
    /// is summed already is not taken twice.
    fn gather_of_the_lost(
        &mut self,
        first: usize,
        group: usize,
        (grams, rests): (Option<&mut Forest>, &mut Forest),
        phases: &mut Phases,
    ) -> Result<(), TaskError> {
        self.adopt(phases)?;
        let mut forest = Forest::default();
        self.gather_own(first, group, &mut forest, phases)?;
        let failed = |source| TaskError::Gram { tensor: self.outline.groups[group][0].tensor.clone(), source };
        let (more, more_rests) = phases.time("gram", || forest.split()).map_err(failed)?;
        let insert = |forest: &mut Forest, more: Forest| {
            more.into_branches().try_for_each(|(branch, sums)| forest.insert(branch, sums))
        };
        grams.map_or(Ok(()), |grams| insert(grams, more)).and_then(|()| insert(rests, more_rests)).map_err(failed)
    }

    /// Whether so many blocks of a group are solved together.
    fn is_shared(&self, blocks: usize) -> bool {
        let Workplace { run, .. } = self.place;
        let solver = &run.method.solver;
        // Who solves on a device is faster than anybody whom blocks would have to be sent to, and takes them in order.
        let is_on_device = !run.device.is_cpu() && solver.on_device().is_some();
        // A method that looks at no more than norms is through before its statistics are sent.
        !is_on_device && solver.needs() >= Statistics::Gram && blocks > 1 && self.has_help()
    }

    /// Sends a portion of a group's statistics to whoever is there, unless it is empty.
    fn send_statistics(
        &mut self,
        Gathering { group, sampling, .. }: Gathering,
        portion: Portion,
        pack: impl FnOnce() -> candle_core::Result<Vec<f32>>,
    ) -> Result<(), TaskError> {
        if statistics::bytes(&sampling, portion) > 0 {
            let packing = Stopwatch::start();
            let failed = |source| TaskError::Gram { tensor: self.outline.groups[group][0].tensor.clone(), source };
            let packed = bytes_of(pack().map_err(GramError::from).map_err(failed)?);
            let matter = || Matter::Statistics(pb::Statistics { group: group as u32, rest: portion.is_rest() });
            self.send_all(|| Outgoing { matter: matter(), body: Body::Bytes(packed.clone()) });
            self.waiting.add_packing(packing.seconds());
        }
        Ok(())
    }
}
