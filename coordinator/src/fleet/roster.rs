//! Who is there: workers as they registered, and one listener that is told of what they say.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use espalier_common::build::BUILD;
use espalier_common::fault::Fault;
use espalier_common::ids::{Boundary, Lease, RunId, WorkerId};
use espalier_common::report::Outcome;
use espalier_gate::Dialer;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use super::{CallError, GrpcWorkerClient, WorkerClient};

/// Events that may wait for the driver: workers are told to wait when it is this far behind.
const PENDING_EVENTS: usize = 256;

/// What a worker brings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Offer {
    /// A name for people.
    pub name: String,
    /// Where its services are.
    pub endpoint: String,
    /// Its build's version.
    pub build: String,
    /// The instruction set that results depend on.
    pub instruction_set: String,
    /// Compute threads.
    pub threads: u32,
    /// Memory it may use.
    pub memory_bytes: u64,
    /// What it computes on.
    pub device: String,
    /// Measured f32 matrix-product speed.
    pub gflops: f64,
}

/// What workers say.
#[derive(Debug, Clone, PartialEq)]
pub enum FleetEvent {
    /// A worker registered.
    Joined(WorkerId),
    /// A worker left, or its process was seen to end.
    Lost(WorkerId),
    /// A worker is alive, and this is what it is doing.
    Heartbeat {
        /// Who.
        worker: WorkerId,
        /// What it runs, and how far it is.
        progress: Vec<(Lease, String, u32, u32)>,
    },
    /// A unit ended.
    Report {
        /// Of which run.
        run: RunId,
        /// Under which lease.
        lease: Lease,
        /// How.
        result: Box<Result<Outcome, Fault>>,
        /// What the worker holds now.
        held: Vec<Boundary>,
    },
}

/// Why a worker is not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RosterError {
    /// Another version.
    #[error("worker {name} is version {theirs}, but this coordinator is version {ours}: results could differ")]
    Build {
        /// The worker.
        name: String,
        /// Its version.
        theirs: String,
        /// Our version.
        ours: String,
    },
    /// Another instruction set than that of the workers that are there, or were when the run began.
    #[error("worker {name} computes with {theirs}, but the others with {ours}: results could differ in the last bit")]
    InstructionSet {
        /// The worker.
        name: String,
        /// Its instruction set.
        theirs: String,
        /// The others'.
        ours: String,
    },
    /// Its endpoint is no URL.
    #[error("worker {name} cannot be called at {endpoint}: {reason}")]
    Endpoint {
        /// The worker.
        name: String,
        /// Its endpoint.
        endpoint: String,
        /// Why not.
        reason: String,
    },
}

/// One worker of the roster.
#[derive(Clone)]
pub struct Member {
    /// What it brings.
    pub offer: Offer,
    /// Calls to it.
    pub client: Arc<dyn WorkerClient>,
    /// Highest resident memory it reported.
    pub peak_rss_bytes: u64,
    /// Hidden states it received from other workers.
    pub bytes_received: u64,
}

struct Inner {
    /// Names this life of the coordinator: a worker that was numbered in another is not taken for one of ours.
    life: u64,
    next: u64,
    members: BTreeMap<WorkerId, Member>,
    /// Those that are gone, for the report.
    past: BTreeMap<WorkerId, Member>,
    listener: Option<mpsc::Sender<FleetEvent>>,
    /// Whether there is nothing left to do, ever.
    is_dismissed: bool,
    /// What the run under way is computed with, even if nobody is there.
    instruction_set: Option<String>,
}

impl Inner {
    /// What a worker has to compute with.
    fn instruction_sets(&self) -> impl Iterator<Item = &String> {
        self.instruction_set.iter().chain(self.members.values().map(|member| &member.offer.instruction_set))
    }
}

/// As long as it is there, the roster takes none but workers of one instruction set.
pub struct Pinned {
    roster: Roster,
}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.roster.lock().instruction_set = None;
    }
}

impl Default for Inner {
    fn default() -> Self {
        Self {
            // Never 0, which is what a message that lacks the field says.
            life: rand::random_range(1..=u64::MAX),
            next: 0,
            members: BTreeMap::new(),
            past: BTreeMap::new(),
            listener: None,
            is_dismissed: false,
            instruction_set: None,
        }
    }
}

/// Who is there.
#[derive(Clone, Default)]
pub struct Roster {
    inner: Arc<Mutex<Inner>>,
    dialer: Dialer,
}

impl Roster {
    /// Nobody is there yet; workers will be called through `dialer`.
    pub fn new(dialer: Dialer) -> Self {
        Self { dialer, ..Self::default() }
    }

    /// Names this life of the coordinator.
    pub fn life(&self) -> u64 {
        self.lock().life
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nobody panics while holding the roster")
    }

    /// Whether workers are to be told that nothing is left to do.
    pub fn is_dismissed(&self) -> bool {
        self.lock().is_dismissed
    }

    /// Tells every worker, with its next heartbeat, that nothing is left to do, and waits until all have left; `patience` at
    /// most, for one that does not beat is gone already.
    pub async fn dismiss(&self, patience: Duration) {
        self.lock().is_dismissed = true;
        let (_, mut fleet) = self.listen();
        let left = async {
            while !self.lock().members.is_empty() {
                if fleet.recv().await.is_none() {
                    return;
                }
            }
        };
        // Whoever has not left by then finds the coordinator gone, and ends by that.
        let _ = tokio::time::timeout(patience, left).await;
    }

    /// What the workers that are there compute with.
    pub fn instruction_set(&self) -> Option<String> {
        self.lock().members.values().next().map(|member| member.offer.instruction_set.clone())
    }

    /// Lets none in that compute with anything else, as long as the first of the results is there. The second are those that are in
    /// already and do, with what they compute with.
    pub fn pin(&self, instruction_set: &str) -> (Pinned, BTreeMap<WorkerId, String>) {
        let mut inner = self.lock();
        inner.instruction_set = Some(instruction_set.to_owned());
        let others = inner.members.iter().map(|(id, member)| (*id, member.offer.instruction_set.clone()));
        let others = others.filter(|(_, found)| found != instruction_set).collect();
        (Pinned { roster: self.clone() }, others)
    }

    /// Lets a worker in. One that registers again from the same endpoint replaces its former self.
    ///
    /// # Errors
    /// `Build`, `InstructionSet`, `Endpoint`.
    pub async fn register(&self, offer: Offer) -> Result<WorkerId, RosterError> {
        if offer.build != BUILD {
            return Err(RosterError::Build { name: offer.name, theirs: offer.build, ours: BUILD.to_owned() });
        }
        let client =
            GrpcWorkerClient::new(&offer.endpoint, &self.dialer).map_err(|error: CallError| RosterError::Endpoint {
                name: offer.name.clone(),
                endpoint: offer.endpoint.clone(),
                reason: error.to_string(),
            })?;
        let (worker, replaced) = {
            let mut inner = self.lock();
            let replaced = inner.members.iter().find(|(_, m)| m.offer.endpoint == offer.endpoint).map(|(id, _)| *id);
            if let Some(ours) = inner.instruction_sets().find(|ours| **ours != offer.instruction_set) {
                let (theirs, ours) = (offer.instruction_set, ours.to_owned());
                return Err(RosterError::InstructionSet { name: offer.name, theirs, ours });
            }
            if let Some(member) = replaced.and_then(|id| inner.members.remove(&id).map(|member| (id, member))) {
                inner.past.insert(member.0, member.1);
            }
            inner.next += 1;
            let worker = WorkerId(inner.next);
            let member = Member { offer, client: Arc::new(client), peak_rss_bytes: 0, bytes_received: 0 };
            inner.members.insert(worker, member);
            (worker, replaced)
        };
        if let Some(former) = replaced {
            self.tell(FleetEvent::Lost(former)).await;
        }
        self.tell(FleetEvent::Joined(worker)).await;
        Ok(worker)
    }

    /// Takes a worker out.
    pub async fn remove(&self, worker: WorkerId) {
        let was_there = {
            let mut inner = self.lock();
            let member = inner.members.remove(&worker);
            let was_there = member.is_some();
            inner.past.extend(member.map(|member| (worker, member)));
            was_there
        };
        if was_there {
            self.tell(FleetEvent::Lost(worker)).await;
        }
    }

    /// Takes a worker out without telling the listener: for the listener itself, which knows. A worker that lives after all
    /// learns from its next heartbeat that it is not known, and registers again.
    pub fn forget(&self, worker: WorkerId) {
        let mut inner = self.lock();
        let member = inner.members.remove(&worker);
        inner.past.extend(member.map(|member| (worker, member)));
    }

    /// Notes what a worker measured; false if it is not known.
    pub fn note(&self, worker: WorkerId, peak_rss_bytes: u64, bytes_received: u64) -> bool {
        let mut inner = self.lock();
        let Some(member) = inner.members.get_mut(&worker) else { return false };
        member.peak_rss_bytes = member.peak_rss_bytes.max(peak_rss_bytes);
        member.bytes_received = member.bytes_received.max(bytes_received);
        true
    }

    /// Hands an event to the listener, waiting if it is behind; without a listener the event is dropped.
    pub async fn tell(&self, event: FleetEvent) {
        let listener = self.lock().listener.clone();
        if let Some(listener) = listener {
            // A listener that is gone has no more interest in events.
            let _ = listener.send(event).await;
        }
    }

    /// Listens from now on, in place of whoever listened before; also returns who is there already.
    pub fn listen(&self) -> (Vec<WorkerId>, mpsc::Receiver<FleetEvent>) {
        let (sender, receiver) = mpsc::channel(PENDING_EVENTS);
        let mut inner = self.lock();
        inner.listener = Some(sender);
        (inner.members.keys().copied().collect(), receiver)
    }

    /// A worker that is there.
    pub fn member(&self, worker: WorkerId) -> Option<Member> {
        self.lock().members.get(&worker).cloned()
    }

    /// All workers that are there.
    pub fn members(&self) -> BTreeMap<WorkerId, Member> {
        self.lock().members.clone()
    }

    /// All workers that ever were.
    pub fn everyone(&self) -> BTreeMap<WorkerId, Member> {
        let inner = self.lock();
        inner.past.iter().chain(&inner.members).map(|(id, member)| (*id, member.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(name: &str, instruction_set: &str) -> Offer {
        Offer {
            name: name.to_owned(),
            endpoint: format!("http://127.0.0.1:1/{name}"),
            build: BUILD.to_owned(),
            instruction_set: instruction_set.to_owned(),
            threads: 1,
            memory_bytes: 1,
            device: "cpu".to_owned(),
            gflops: 1.0,
        }
    }

    #[tokio::test]
    async fn a_run_keeps_its_workers_alike_even_when_all_of_them_are_others() {
        let roster = Roster::default();
        assert_eq!(roster.instruction_set(), None);
        assert_eq!(roster.pin("avx2").1, BTreeMap::new());
        let first = roster.register(offer("first", "avx512")).await.unwrap();
        assert_eq!(roster.pin("avx2").1, [(first, "avx512".to_owned())].into());
        let (pinned, others) = roster.pin(&roster.instruction_set().unwrap());
        assert!(others.is_empty());
        roster.remove(first).await;
        let refused = roster.register(offer("second", "avx2")).await.unwrap_err();
        assert!(matches!(&refused, RosterError::InstructionSet { ours, .. } if ours == "avx512"), "{refused}");
        drop(pinned);
        roster.register(offer("second", "avx2")).await.unwrap();
    }

    #[tokio::test]
    async fn a_worker_of_another_build_is_not_let_in() {
        let other = Offer { build: format!("{BUILD}1"), ..offer("other", "avx2") };
        assert!(matches!(Roster::default().register(other).await, Err(RosterError::Build { .. })));
    }
}
