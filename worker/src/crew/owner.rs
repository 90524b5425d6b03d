//! The owner's side of a shared layer: what it does itself, what it lends out, and what it takes back.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use candle_core::Tensor;
use espalier_common::clock::Stopwatch;
use espalier_common::ids::{LayerIndex, Lease};
use espalier_common::outline::LayerOutline;
use espalier_common::pattern::Pattern;
use espalier_common::report::LinkUse;
use espalier_common::tasks::TaskGroup;
use espalier_common::wire::lease_to_wire;
use espalier_gate::trace::{Open, Side};
use espalier_proto::v1 as pb;
use espalier_proto::v1::head::Matter;
use tokio::sync::mpsc;

use super::LayerSizes;
use super::input::Input;
use super::measurements::Measurements;
use super::measuring::Tiles;
use super::paces::Pace;
use super::share::{Share, deal};
use super::waiting::Waiting;
use crate::calibrate::tree::{Branch, Forest, LEAVES, Portion};
use crate::linalg::by_column;
use crate::model::DecoderLayer;
use crate::prune::MOST_PARTS;
use crate::source::Workplace;
use crate::transport::parcel::Body;
use crate::transport::{Line, LinkError, Outgoing, Received};
use crate::unit::{Phases, TaskError};

/// An assistant may take so many times as long as the owner itself would.
pub(super) const PATIENCE: f64 = 4.0;
/// And this much longer, if nothing else is configured: it has a layer to load, and its machine may have other things to do for a
/// while.
pub const LEAST_PATIENCE: Duration = Duration::from_secs(30);
/// What lines may take to end once they are hung up.
const HANG_UP: Duration = Duration::from_secs(1);
/// How long an owner that solves looks for answers at a time.
pub(super) const GLANCE: Duration = Duration::from_millis(50);
/// Letters that wait to be read: more than all assistants send before they are read.
const ANSWERS: usize = 64;
/// Letters to an assistant besides those with its share: what one group takes.
const LETTERS: usize = 16 + MOST_PARTS;

/// Who an owner may ask for help, and in whose name.
#[derive(Debug, Clone)]
pub struct Help {
    /// The owner's lease.
    pub lease: Lease,
    /// Endpoints of workers that are idle meanwhile.
    pub assistants: Vec<String>,
    /// Speeds of the owner and of these, in whatever unit, by which sequences are lent out; all alike if they are not as many.
    pub speeds: Vec<f64>,
    /// With the strategy `data`: the share that each of them keeps. Otherwise they are lent theirs.
    pub leaves: Option<Vec<Range<usize>>>,
}

impl Help {
    /// Help of nobody.
    pub fn none(lease: Lease) -> Self {
        Self { lease, assistants: Vec::new(), speeds: Vec::new(), leaves: None }
    }

    /// Who helps, and with which leaves: each with some, which are of no sequence only where there are fewer sequences than leaves.
    /// The owner has the last ones, which are held out if any are: sums over these are a second set, and need not travel.
    fn shared(&self, sequences: usize) -> Vec<(&String, Range<usize>)> {
        if let Some(leaves) = &self.leaves {
            return self.assistants.iter().zip(leaves.iter().cloned()).collect();
        }
        let hands = (1 + self.assistants.len()).min(LEAVES).min(sequences);
        let dealt = deal(&self.speeds, hands, sequences);
        let first_of = |hand: usize| dealt[1..hand].iter().sum::<usize>();
        let leaves_of = |hand: usize| first_of(hand)..first_of(hand + 1);
        self.assistants.iter().zip((1..hands).map(leaves_of)).collect()
    }
}

/// What is left of all leaves, in runs as long as may be; one empty one if that is nothing.
fn rest(shared: &[(&String, Range<usize>)]) -> Vec<Range<usize>> {
    let mut runs: Vec<Range<usize>> = Vec::new();
    for leaf in (0..LEAVES).filter(|leaf| shared.iter().all(|(_, leaves)| !leaves.contains(leaf))) {
        match runs.last_mut().filter(|run| run.end == leaf) {
            Some(run) => run.end = leaf + 1,
            None => runs.push(leaf..leaf + 1),
        }
    }
    if runs.is_empty() {
        runs.push(0..0);
    }
    runs
}

/// A layer's sequences, with whoever has them.
pub(crate) struct Crew<'a> {
    pub(super) place: &'a Workplace<'a>,
    pub(super) layer: LayerIndex,
    pub(super) outline: &'a LayerOutline,
    pub(super) pattern: Pattern,
    pub(super) input: Input,
    /// The owner's own shares: one or more, and those of assistants that were given up on.
    pub(super) shares: Vec<Share>,
    pub(super) assistants: Vec<Assistant>,
    answers: Option<mpsc::Receiver<Received>>,
    lines: TaskGroup,
    pub(super) lost: u32,
    /// Waiting that is not booked yet.
    pub(super) waiting: Waiting,
    /// How long the last letter was on its way.
    pub(super) on_its_way: f64,
    pub(super) next_order: u32,
    /// Groups that assistants were asked to gather.
    asked: usize,
    /// The owner's, with its share of this layer.
    pub(super) pace: Pace,
    /// Sums and parts of assistants that were through with a group before others.
    early: VecDeque<(usize, Matter, Vec<u8>)>,
    /// The group whose statistics assistants have.
    pub(super) statistics_of: Option<usize>,
    /// The group whose groundwork they make parts of.
    pub(super) laid: Option<usize>,
    /// Of solutions, by group.
    pub(super) measurements: Measurements,
}

/// Letters that are waited for.
pub(super) struct Collection {
    /// The owner's leaves, and the seconds that it took for the like.
    own: (usize, f64),
    /// Of each assistant.
    missing: Vec<usize>,
    /// Whether an assistant is through when none of its is missing.
    last: bool,
    /// Letters that came before it began and were not looked at since.
    early: usize,
    watch: Stopwatch,
    /// Seconds in which the owner did other things.
    busy: f64,
    /// Since when nothing was done but wait.
    idle: Stopwatch,
}

impl Collection {
    /// Notes that the owner did other things for so long, and was waiting for nobody.
    pub(super) fn was_busy(&mut self, seconds: f64) {
        self.busy += seconds;
        self.idle = Stopwatch::start();
    }
}

/// What a step of waiting came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// Nothing is missing any more.
    Done,
    /// A letter was taken.
    Took,
    /// None came.
    Waited,
}

/// An assistant, as long as it is one.
pub(super) struct Assistant {
    pub(super) endpoint: String,
    pub(super) leaves: Range<usize>,
    letters: mpsc::Sender<Outgoing>,
    /// What joins it with the owner, once that is agreed on.
    joined_by: Arc<OnceLock<LinkUse>>,
    /// With its share of this layer.
    pub(super) pace: Pace,
    /// Blocks that it solves at a time; `None` until it has its share and says so.
    pub(super) threads: Option<usize>,
    is_there: bool,
    /// It has given all that it was asked for, and hangs up.
    is_through: bool,
    /// Its help, in the trace of the layer.
    span: Open,
}

impl<'a> Crew<'a> {
    /// Calls the assistants of a layer, if there are any, and lends them shares of its input unless they keep their own; then
    /// loads the layer, as they do. What no assistant has is the owner's.
    ///
    /// # Errors
    /// What the model says of the layer; if shares are kept, see [`TaskError`].
    pub(crate) fn assemble(
        place: &'a Workplace<'a>,
        (index, outline): (LayerIndex, &'a LayerOutline),
        pattern: Pattern,
        input: Input,
        help: &Help,
        phases: &mut Phases,
    ) -> Result<Self, TaskError> {
        let shared = help.shared(place.run.tokens.sequences());
        let (heard, answers) = mpsc::channel(ANSWERS);
        let mut crew = Self {
            place,
            layer: index,
            outline,
            pattern,
            input,
            shares: Vec::new(),
            assistants: Vec::new(),
            answers: (!shared.is_empty()).then_some(answers),
            lines: TaskGroup::new(),
            lost: 0,
            waiting: Waiting::default(),
            on_its_way: 0.0,
            next_order: 0,
            asked: 0,
            pace: Pace::default(),
            early: VecDeque::new(),
            statistics_of: None,
            laid: None,
            measurements: Measurements::default(),
        };
        let streams = crew.input.streams();
        for (number, (endpoint, leaves)) in shared.iter().cloned().enumerate() {
            let sizes = Arc::new(LayerSizes::new(place.run, index, leaves.clone())?);
            let share = sizes.sequences();
            let (letters, queue) = mpsc::channel(share.len() * streams + LETTERS);
            let joined_by = Arc::new(OnceLock::new());
            let span = place.control.trace().open("lend").on(Side::Caller).with("espalier.peer", endpoint.as_str());
            let line = Line {
                endpoint: endpoint.clone(),
                number,
                size_of: move |matter: &Matter| sizes.of_answer(matter),
                letters: queue,
                received: heard.clone(),
                joining: place.joining.cloned(),
                trace: span.scope().context(),
                joined_by: Arc::clone(&joined_by),
            };
            let begin = pb::Begin {
                lease: Some(lease_to_wire(&place.run.id, help.lease)),
                first_leaf: leaves.start as u32,
                end_leaf: leaves.end as u32,
                link: None,
                kept: crew.input.told(),
            };
            let (token, peers) = (crew.lines.token(), place.peers.clone());
            let _runtime = place.runtime.enter();
            crew.lines.spawn(async move {
                tokio::select! {
                    () = line.call(&peers, begin) => {}
                    () = token.cancelled() => {}
                }
            });
            crew.assistants.push(Assistant {
                endpoint: endpoint.clone(),
                leaves,
                letters,
                joined_by,
                pace: Pace::default(),
                threads: None,
                is_there: true,
                is_through: false,
                span,
            });
            for letter in crew.input.lent(share) {
                crew.send(number, letter);
            }
        }
        let loaded = place.load(index, phases)?;
        // Assistants make theirs meanwhile, if they have to.
        for leaves in rest(&shared) {
            let own = crew.input.share(place, index, leaves, |_| loaded.share(), phases)?;
            crew.shares.push(own);
        }
        Ok(crew)
    }

    /// The layer, as far as it is pruned.
    pub(crate) fn layer(&self) -> &dyn DecoderLayer {
        self.shares[0].layer()
    }

    /// Assistants that were given up on.
    pub(crate) fn lost(&self) -> u32 {
        self.lost
    }

    /// What joined the owner with its assistants.
    pub(crate) fn links(&self) -> Vec<LinkUse> {
        self.assistants.iter().filter_map(|assistant| assistant.joined_by.get().cloned()).collect()
    }

    /// Sends a letter, unless the assistant is given up on. The queue holds all letters that can be due.
    pub(super) fn send(&mut self, number: usize, letter: Outgoing) {
        let assistant = &self.assistants[number];
        if assistant.is_there && assistant.letters.try_send(letter).is_err() {
            self.lose(number, "it does not take what it is sent");
        }
    }

    pub(super) fn send_all(&mut self, letter: impl Fn() -> Outgoing) {
        (0..self.assistants.len()).for_each(|number| self.send(number, letter()));
    }

    /// Whether any assistant is there.
    pub(super) fn has_help(&self) -> bool {
        self.assistants.iter().any(|assistant| assistant.is_there)
    }

    pub(super) fn is_there(&self, number: usize) -> bool {
        self.assistants.get(number).is_some_and(|assistant| assistant.is_there)
    }

    /// Gives an assistant up: whatever comes of it now is too late.
    pub(super) fn lose(&mut self, number: usize, reason: &str) {
        let assistant = &mut self.assistants[number];
        if std::mem::replace(&mut assistant.is_there, false) {
            tracing::warn!(assistant = assistant.endpoint, reason, "going on without an assistant");
            // Its line ends when nothing can be sent any more.
            assistant.letters = mpsc::channel(1).0;
            assistant.span.fail(reason);
            self.lost += 1;
            self.measurements.adopt(number);
        }
    }

    /// The next letter of an assistant that is still one, within `wait`; faults and ends of lines are dealt with here.
    pub(super) fn next_letter(&mut self, wait: Duration) -> Result<Option<(usize, Matter, Vec<u8>)>, TaskError> {
        let Some(answers) = &mut self.answers else { return Ok(None) };
        let token = self.place.control.token();
        let received = self.place.runtime.block_on(async {
            tokio::select! {
                received = tokio::time::timeout(wait, answers.recv()) => Ok(received.ok().flatten()),
                () = token.cancelled() => Err(TaskError::Cancelled),
            }
        })?;
        let Some(Received { from, letter, seconds }) = received.filter(|received| self.is_there(received.from)) else {
            return Ok(None);
        };
        self.on_its_way = seconds;
        match letter {
            Ok(letter) => match letter.matter {
                Matter::Fault(fault) => self.lose(from, &fault.message),
                Matter::Measured(measured) => {
                    self.place.received(letter.body.len() as u64);
                    if !self.measurements.take(from, &measured, &letter.body) {
                        self.lose(from, "it measured something else than what it was asked for");
                    }
                }
                Matter::Ready(ready) => self.assistants[from].threads = Some((ready.threads as usize).clamp(1, 1024)),
                matter => return Ok(Some((from, matter, letter.body))),
            },
            Err(_) if self.assistants[from].is_through => {}
            Err(error) => self.lose(from, &described(&error)),
        }
        Ok(None)
    }

    /// Waits for as many letters of each assistant as are `missing`, as long as they may take by what the owner took for the
    /// leaves and in the seconds of `own`. An assistant whose letter `take` does not want is given up on; one that has sent all
    /// of its `last` letters may hang up.
    pub(super) fn collect(
        &mut self,
        own: (usize, f64),
        missing: (Vec<usize>, bool),
        mut take: impl FnMut(usize, Matter, Vec<u8>) -> bool,
    ) -> Result<(), TaskError> {
        if self.assistants.is_empty() {
            return Ok(());
        }
        let mut collection = self.collection(own, missing);
        while self.collect_one(&mut collection, GLANCE, &mut take)? != Step::Done {}
        Ok(())
    }

    /// Begins to wait, as [`Self::collect`] does. Who has no sequence in its leaves has nothing more to say at the end.
    pub(super) fn collection(&mut self, own: (usize, f64), (missing, last): (Vec<usize>, bool)) -> Collection {
        let said_all = self.assistants.iter_mut().zip(&missing).filter(|(_, missing)| last && **missing == 0);
        said_all.for_each(|(assistant, _)| assistant.is_through = true);
        let (watch, idle) = (Stopwatch::start(), Stopwatch::start());
        Collection { own, missing, last, early: self.early.len(), watch, busy: 0.0, idle }
    }

    /// A step of [`Self::collect`], which takes no longer than `wait`, a letter and a piece of what is to be measured.
    pub(super) fn collect_one(
        &mut self,
        collection: &mut Collection,
        wait: Duration,
        take: &mut impl FnMut(usize, Matter, Vec<u8>) -> bool,
    ) -> Result<Step, TaskError> {
        let missing = &mut collection.missing;
        let late: Vec<usize> =
            (0..missing.len()).filter(|&number| self.is_there(number) && missing[number] > 0).collect();
        let Some(most) = late.iter().map(|&number| self.assistants[number].leaves.len()).max() else {
            self.waiting.add(collection.idle.seconds(), 0.0);
            return Ok(Step::Done);
        };
        // Whoever has to make its share runs it through all groups of the layers before this one first.
        let is_on_its_way = late.iter().any(|&number| self.assistants[number].threads.is_none());
        let groups = if is_on_its_way { 1 + self.input.behind() * self.outline.groups.len() } else { 1 };
        let own = collection.own;
        let takes = own.1 * groups as f64 * most as f64 / own.0.max(1) as f64;
        let allowed = self.place.patience.as_secs_f64() + PATIENCE * takes;
        if collection.watch.seconds() - collection.busy > allowed {
            late.into_iter().for_each(|number| self.lose(number, "it is too slow"));
            return Ok(Step::Waited);
        }
        let letter = if collection.early > 0 {
            collection.early -= 1;
            self.early.pop_front().filter(|(number, ..)| self.is_there(*number))
        } else {
            self.next_letter(if self.has_own_tiles() { Duration::ZERO } else { wait })?
        };
        let Some((number, matter, body)) = letter else {
            // Whoever does not want to wait has other things to do.
            if !wait.is_zero() && self.has_own_tiles() {
                let watch = Stopwatch::start();
                self.measure_some()?;
                collection.was_busy(watch.seconds());
            }
            return Ok(Step::Waited);
        };
        self.waiting.add(collection.idle.seconds(), self.on_its_way);
        let unpacking = Stopwatch::start();
        if missing[number] == 0 && !collection.last && self.may_be_early(number, &matter) {
            self.early.push_back((number, matter, body));
        } else if missing[number] > 0 && take(number, matter, body) {
            missing[number] -= 1;
            self.assistants[number].is_through = collection.last && missing[number] == 0;
        } else {
            self.lose(number, "it said something out of turn");
        }
        self.waiting.add_packing(unpacking.seconds());
        collection.idle = Stopwatch::start();
        Ok(Step::Took)
    }

    /// Whether this may come while others are waited for: sums of the group that assistants went on with, and parts of the
    /// groundwork that is laid; no more than there are.
    fn may_be_early(&self, number: usize, matter: &Matter) -> bool {
        let is_sums = |matter: &Matter| matches!(matter, Matter::Sums(_));
        let alike = self.early.iter().filter(|(early, other, _)| *early == number && is_sums(other) == is_sums(matter));
        match matter {
            Matter::Sums(sums) => {
                let letters = Branch::of(&self.assistants[number].leaves).len() * Portion::EACH.len();
                sums.group as usize + 1 == self.asked && alike.count() < letters
            }
            Matter::Part(part) => self.laid == Some(part.group as usize) && alike.count() < MOST_PARTS,
            _ => false,
        }
    }

    /// Takes over the shares of assistants that are gone.
    pub(super) fn adopt(&mut self, phases: &mut Phases) -> Result<(), TaskError> {
        for number in 0..self.assistants.len() {
            let leaves = self.assistants[number].leaves.clone();
            let is_here = leaves.is_empty() || self.shares.iter().any(|share| *share.leaves() == leaves);
            if self.is_there(number) || is_here {
                continue;
            }
            let lanes = self.shares[0].lanes();
            let layer = |stream: usize| lanes[stream].layer().share();
            let adopted = self.input.share(self.place, self.layer, leaves, layer, phases)?;
            self.shares.push(adopted);
        }
        Ok(())
    }

    /// Lets assistants gather a group, if there is one and they are not at it yet.
    pub(crate) fn ask_on(&mut self, group: usize) {
        if (self.asked..self.outline.groups.len()).contains(&group) {
            self.asked = group + 1;
            self.send_all(|| Outgoing::of(Matter::Gather(group as u32)));
        }
    }

    /// What was waited since this was asked last.
    pub(crate) fn take_waiting(&mut self) -> Waiting {
        std::mem::take(&mut self.waiting)
    }

    pub(super) fn own_leaves(&self) -> usize {
        self.shares.iter().map(|share| share.leaves().len()).sum()
    }

    /// Gathers the owner's shares, from the one numbered `first` on.
    pub(super) fn gather_own(
        &mut self,
        first: usize,
        group: usize,
        forest: &mut Forest,
        phases: &mut Phases,
    ) -> Result<(), TaskError> {
        let (place, members) = (self.place, &self.outline.groups[group]);
        for share in &mut self.shares[first..] {
            for (branch, sums) in share.gather(place, group, members, phases)?.into_branches() {
                let failed = |source| TaskError::Gram { tensor: members[0].tensor.clone(), source };
                forest.insert(branch, sums).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Puts the pruned weights of a group into every copy of the layer, and lends out what is to be measured of them; assistants
    /// then go on. `stored` has the bytes of all members.
    ///
    /// # Errors
    /// What the tensor backend says.
    pub(crate) fn apply(
        &mut self,
        group: usize,
        weights: &[Tensor],
        stored: impl FnOnce() -> Vec<u8>,
    ) -> Result<Tiles, TaskError> {
        if !self.assistants.is_empty() {
            let stored = Bytes::from(stored());
            self.send_all(|| Outgoing { matter: Matter::Apply(group as u32), body: Body::Bytes(stored.clone()) });
        }
        let tiles = self.lend_tiles(group);
        self.ask_on(group + 1);
        for (member, weight) in weights.iter().enumerate() {
            // Once for all shares.
            let weight = by_column(weight.clone())?;
            for share in &mut self.shares {
                share.set_weight(group, member, weight.clone())?;
            }
        }
        Ok(tiles)
    }

    /// The only share of a crew of one.
    pub(crate) fn alone(&mut self) -> &mut Share {
        &mut self.shares[0]
    }
}

impl Drop for Crew<'_> {
    /// Hangs up: assistants have nothing that would be missed.
    fn drop(&mut self) {
        self.place.runtime.block_on(self.lines.shut_down(HANG_UP));
    }
}

/// An error and what caused it, in a line.
fn described(error: &LinkError) -> String {
    let source = std::error::Error::source(error).map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}
