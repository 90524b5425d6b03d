//! A library of communicators in memory, in which things go wrong on demand. It is as strict as the real one: a transfer is
//! done when both sides have begun with it, one that the other side does not match never is, and nothing says why.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use espalier_common::report::LinkKind;

use super::communicator::Communicator;
use super::link::{BodyError, Patience};
use super::negotiation::{Carrier, Facts};

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mishap {
    /// Joining is refused.
    Refuses,
    /// Joining never ends.
    Lingers,
    /// The library gives another rank than was asked for.
    Misplaces,
    /// A transfer never ends, on either side.
    Hangs,
    /// The side dies: the other hears of it, as of a remote error.
    Dies,
    /// A byte changes on the way.
    Damages,
}

/// A mishap of one rank, at its transfer of this number; hellos are the first two.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    pub(crate) mishap: Mishap,
    pub(crate) rank: u32,
    pub(crate) transfer: usize,
}

#[derive(Debug, Default)]
struct Meeting {
    joined: [bool; 2],
    posted: [Option<Posted>; 2],
    transfers: [usize; 2],
    dead: bool,
}

#[derive(Debug)]
enum Posted {
    Sends(Vec<u8>),
    Receives(usize),
    /// Both had begun; what came, if anything was to come.
    Done(Vec<u8>),
    Stuck,
}

/// What all workers of a test have in common.
#[derive(Debug, Default)]
pub(crate) struct Hub {
    meetings: Mutex<BTreeMap<Vec<u8>, Meeting>>,
    ids: AtomicU32,
    plan: Option<Plan>,
    /// Mishaps that came to pass.
    fired: AtomicU32,
    aborted: AtomicU32,
    left: AtomicU32,
    bytes: AtomicU32,
}

impl Hub {
    pub(crate) fn new(plan: Option<Plan>) -> Arc<Self> {
        Arc::new(Self { plan, ..Self::default() })
    }

    /// What joins the device of this number.
    pub(crate) fn carrier(self: &Arc<Self>, device: u32) -> Arc<dyn Carrier> {
        let facts = Facts {
            kind: LinkKind::Nccl,
            version: 1,
            host: "here".to_owned(),
            device: format!("device {device}"),
            architecture: "fake".to_owned(),
            leaves_host: false,
        };
        Arc::new(FakeCarrier { hub: Arc::clone(self), facts })
    }

    pub(crate) fn fired(&self) -> u32 {
        self.fired.load(Ordering::Relaxed)
    }

    /// Sides that were aborted, and sides that took leave.
    pub(crate) fn ended(&self) -> (u32, u32) {
        (self.aborted.load(Ordering::Relaxed), self.left.load(Ordering::Relaxed))
    }

    /// Bytes that went over.
    pub(crate) fn bytes(&self) -> u32 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Short where something is to take too long, and else longer than anything takes.
    pub(crate) fn patience(&self) -> Patience {
        // Whoever is to be met and does not come says nothing either.
        let hangs = self.plan.is_some_and(|plan| plan.transfer < 2 || plan.mishap == Mishap::Hangs);
        Patience { least: Duration::from_millis(if hangs { 300 } else { 20_000 }), bytes_per_second: 1e9 }
    }

    fn has(&self, mishap: Mishap, rank: u32, transfer: usize) -> bool {
        let is_now =
            self.plan.is_some_and(|plan| plan.mishap == mishap && plan.rank == rank && plan.transfer == transfer);
        self.fired.fetch_add(is_now.into(), Ordering::Relaxed);
        is_now
    }

    fn meetings(&self) -> MutexGuard<'_, BTreeMap<Vec<u8>, Meeting>> {
        self.meetings.lock().expect("no test panics with it")
    }
}

#[derive(Debug)]
struct FakeCarrier {
    hub: Arc<Hub>,
    facts: Facts,
}

impl Carrier for FakeCarrier {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn new_id(&self) -> Result<Vec<u8>, BodyError> {
        Ok(self.hub.ids.fetch_add(1, Ordering::Relaxed).to_le_bytes().to_vec())
    }

    fn join(&self, id: &[u8], rank: u32) -> Result<Box<dyn Communicator>, BodyError> {
        let hub = Arc::clone(&self.hub);
        if hub.has(Mishap::Refuses, rank, 0) {
            return Err(BodyError::Library { doing: "joining", said: "not today".to_owned() });
        }
        let (lingers, misplaced) = (hub.has(Mishap::Lingers, rank, 0), hub.has(Mishap::Misplaces, rank, 0));
        hub.meetings().entry(id.to_vec()).or_default().joined[rank as usize] = !lingers;
        Ok(Box::new(Fake { hub, id: id.to_vec(), rank, misplaced, state: FakeState::Joining }))
    }

    fn patience(&self) -> Patience {
        self.hub.patience()
    }
}

#[derive(Debug, PartialEq)]
enum FakeState {
    Joining,
    Moving,
    Has(Vec<u8>),
    Leaving,
    Gone,
}

struct Fake {
    hub: Arc<Hub>,
    id: Vec<u8>,
    rank: u32,
    misplaced: bool,
    state: FakeState,
}

impl Fake {
    fn post(&mut self, posted: Posted) -> Result<(), BodyError> {
        assert!(!matches!(self.state, FakeState::Joining | FakeState::Moving | FakeState::Gone), "{:?}", self.state);
        let mut meetings = self.hub.meetings();
        let meeting = meetings.get_mut(&self.id).expect("it was joined");
        let (own, other) = (self.rank as usize, 1 - self.rank as usize);
        let transfer = meeting.transfers[own];
        meeting.transfers[own] += 1;
        let happens = |mishap| self.hub.has(mishap, self.rank, transfer);
        self.state = FakeState::Moving;
        if happens(Mishap::Dies) {
            meeting.dead = true;
            return Err(BodyError::Library { doing: "moving", said: "this side dies".to_owned() });
        }
        let posted = match posted {
            _ if happens(Mishap::Hangs) => Posted::Stuck,
            Posted::Sends(mut body) => {
                if happens(Mishap::Damages) {
                    body[0] ^= 1;
                }
                Posted::Sends(body)
            }
            posted => posted,
        };
        let moved = match (&posted, &meeting.posted[other]) {
            (Posted::Sends(body), Some(Posted::Receives(bytes))) if body.len() == *bytes => {
                Some([Vec::new(), body.clone()])
            }
            (Posted::Receives(bytes), Some(Posted::Sends(body))) if body.len() == *bytes => {
                Some([body.clone(), Vec::new()])
            }
            _ => None,
        };
        match moved {
            Some([mine, theirs]) => {
                self.hub.bytes.fetch_add((mine.len() + theirs.len()) as u32, Ordering::Relaxed);
                meeting.posted[own] = Some(Posted::Done(mine));
                meeting.posted[other] = Some(Posted::Done(theirs));
            }
            None => meeting.posted[own] = Some(posted),
        }
        Ok(())
    }
}

impl Communicator for Fake {
    fn seat(&mut self) -> Result<(u32, u32), BodyError> {
        Ok((if self.misplaced { 1 - self.rank } else { self.rank }, 2))
    }

    fn begin_send(&mut self, body: &[u8]) -> Result<(), BodyError> {
        self.post(Posted::Sends(body.to_vec()))
    }

    fn begin_receive(&mut self, bytes: usize) -> Result<(), BodyError> {
        self.post(Posted::Receives(bytes))
    }

    fn is_done(&mut self) -> Result<bool, BodyError> {
        let mut meetings = self.hub.meetings();
        let meeting = meetings.get_mut(&self.id).expect("it was joined");
        if meeting.dead {
            return Err(BodyError::Library { doing: "moving", said: "the other side died".to_owned() });
        }
        match self.state {
            FakeState::Joining if meeting.joined == [true, true] => self.state = FakeState::Has(Vec::new()),
            FakeState::Moving => match meeting.posted[self.rank as usize].take() {
                Some(Posted::Done(body)) => self.state = FakeState::Has(body),
                posted => meeting.posted[self.rank as usize] = posted,
            },
            FakeState::Leaving => {
                self.hub.left.fetch_add(1, Ordering::Relaxed);
                self.state = FakeState::Gone;
            }
            _ => {}
        }
        Ok(matches!(self.state, FakeState::Has(_) | FakeState::Gone))
    }

    fn received(&mut self) -> Result<Vec<u8>, BodyError> {
        match std::mem::replace(&mut self.state, FakeState::Has(Vec::new())) {
            FakeState::Has(body) => Ok(body),
            other => panic!("nothing was received: {other:?}"),
        }
    }

    fn begin_leave(&mut self) -> Result<(), BodyError> {
        self.state = FakeState::Leaving;
        Ok(())
    }

    fn abort(&mut self) {
        self.hub.aborted.fetch_add(1, Ordering::Relaxed);
        self.state = FakeState::Gone;
    }
}
