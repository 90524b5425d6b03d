//! What joins a pair: decided from the facts of both sides, agreed on before the first letter, and told.
//!
//! The owner of a layer offers what it has, with the name of a pair to be made. The assistant agrees or says why not; then both
//! meet, and the owner has the last word, so that both know whether the pair is there. A worker without a library offers memory of
//! its machine: who agrees makes a ring there, which the owner opens. Whatever fails on the way, bodies go in pieces on the stream
//! itself, as between any two workers, and the report says why; that two are not on one machine is no failure.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use espalier_common::report::{LinkKind, LinkUse};
use espalier_proto::v1::{LinkAnswer, LinkFacts, LinkOffer, LinkVerdict, Parcel, parcel};
use futures::{Stream, StreamExt as _};
use tokio::sync::mpsc;

use super::communicator::{Communicator, Seat};
use super::link::{BodyError, Link as _, Patience};
use super::paired::Paired;
use super::ring::{NAME_BYTES, Ring, SharedMemory};
use super::turns::Turn;

/// A library that joins this worker's device with another's.
pub trait Carrier: Debug + Send + Sync {
    /// What the other side has to know.
    fn facts(&self) -> &Facts;

    /// A name for a new pair.
    ///
    /// # Errors
    /// `Library`.
    fn new_id(&self) -> Result<Vec<u8>, BodyError>;

    /// Begins to join the pair of that name, on the calling thread.
    ///
    /// # Errors
    /// `Library`.
    fn join(&self, id: &[u8], rank: u32) -> Result<Box<dyn Communicator>, BodyError>;

    /// What transfers may take.
    fn patience(&self) -> Patience {
        Patience::default()
    }
}

/// What a worker can be joined by, and what became of the attempts to use it.
#[derive(Debug)]
pub struct Joining {
    carrier: Option<Arc<dyn Carrier>>,
    memory: Option<SharedMemory>,
    /// Why workers, by their endpoints, were not met by the library, or have no memory to share with. What is between two of them
    /// does not change: it is not tried again with each layer, as the time that a failure takes is that of many layers.
    unmet: Mutex<BTreeMap<String, String>>,
}

impl Joining {
    /// Before any attempt; `None` if there is nothing to join with.
    pub fn by(carrier: Option<Arc<dyn Carrier>>, memory: Option<SharedMemory>) -> Option<Arc<Self>> {
        let is_able = carrier.is_some() || memory.is_some();
        is_able.then(|| Arc::new(Self { carrier, memory, unmet: Mutex::default() }))
    }

    fn unmet(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.unmet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is offered: the library if there is one.
    pub fn facts(&self) -> LinkFacts {
        match (&self.carrier, &self.memory) {
            (Some(carrier), _) => carrier.facts().into(),
            (None, memory) => memory.as_ref().map(facts_of).unwrap_or_default(),
        }
    }

    /// What to offer to a worker, if anything: the name of a pair, or of a ring.
    ///
    /// # Errors
    /// Why nothing is offered.
    pub fn offer_to(&self, endpoint: &str) -> Result<Vec<u8>, String> {
        if let Some(reason) = self.unmet().get(endpoint) {
            return Err(reason.clone());
        }
        match &self.carrier {
            Some(carrier) => carrier.new_id().map_err(|error| error.to_string()),
            None => Ok(SharedMemory::new_name().to_vec()),
        }
    }

    /// Remembers a worker that was not met.
    fn was_unmet(&self, endpoint: &str, reason: &str) {
        self.unmet().insert(endpoint.to_owned(), reason.to_owned());
    }
}

/// What is known of one side of a pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The library.
    pub kind: LinkKind,
    /// Its version.
    pub version: u32,
    /// Names the machine, as it was booted.
    pub host: String,
    /// Names the device.
    pub device: String,
    /// What the device is.
    pub architecture: String,
    /// Whether what it sends may leave the machine: it is not encrypted on its way.
    pub leaves_host: bool,
}

impl From<&Facts> for LinkFacts {
    fn from(facts: &Facts) -> Self {
        let Facts { kind, version, host, device, architecture, leaves_host } = facts.clone();
        Self { kind: kind.name().to_owned(), version, host, device, architecture, leaves_host }
    }
}

/// What the other side has to know of shared memory.
fn facts_of(memory: &SharedMemory) -> LinkFacts {
    LinkFacts { kind: LinkKind::Shm.name().to_owned(), host: memory.machine().to_owned(), ..LinkFacts::default() }
}

/// Whether two sides can be joined by a library; if not, why, as the report says it.
///
/// # Errors
/// The reason.
pub fn decide(offered: &LinkFacts, own: Option<&Facts>) -> Result<(), String> {
    let Some(own) = own.filter(|own| own.kind.name() == offered.kind) else {
        return Err(format!("the other worker has no {}", offered.kind));
    };
    let name = own.kind.name();
    if own.architecture != offered.architecture {
        return Err(format!(
            "{name} is for devices of one kind, not {} and {}",
            offered.architecture, own.architecture
        ));
    }
    if own.version != offered.version {
        return Err(format!("{name} has the versions {} and {}", offered.version, own.version));
    }
    if own.host == offered.host {
        if own.device == offered.device {
            return Err(format!("{name} is for two devices, and both workers have the same"));
        }
    } else if !(own.leaves_host && offered.leaves_host) {
        return Err(format!("{name} does not encrypt, and may not leave the machine"));
    }
    Ok(())
}

/// What came of it.
#[derive(Debug)]
pub struct Agreed {
    /// What bodies go over.
    pub means: Means,
    /// As it is reported.
    pub link: LinkUse,
}

/// Why workers that are not on one machine share no memory: nobody has to be told.
const ELSEWHERE: &str = "";

/// What bodies can go over.
#[derive(Debug)]
pub enum Means {
    /// The stream alone.
    Pieces,
    /// Memory, where pieces lie that the stream tells of.
    Ring(Ring),
    /// A pair, and what it wants to have said to the other side.
    Pair(Paired, mpsc::Receiver<Turn>),
}

impl Agreed {
    /// Bodies go in pieces; why, if the owner has something faster and that is worth telling.
    pub fn on_pieces(declined: Option<String>) -> Self {
        let declined = declined.filter(|reason| reason != ELSEWHERE);
        Self { means: Means::Pieces, link: LinkUse { kind: LinkKind::Grpc, declined } }
    }

    fn on(means: Means) -> Self {
        let kind = match &means {
            Means::Pieces => LinkKind::Grpc,
            Means::Ring(_) => LinkKind::Shm,
            Means::Pair(pair, _) => pair.kind(),
        };
        Self { means, link: LinkUse { kind, declined: None } }
    }
}

/// Why the two sides could not even disagree.
#[derive(Debug, thiserror::Error)]
pub enum NegotiationError {
    /// The other side is gone, or says nothing.
    #[error("nothing was heard of a link that was offered")]
    Silent,
    /// It says something else.
    #[error("something else was said when a link was to be agreed on")]
    OutOfTurn,
}

async fn meet(carrier: &Arc<dyn Carrier>, id: Vec<u8>, rank: u32) -> Result<Means, BodyError> {
    let (said, turns) = mpsc::channel(super::paired::TURNS);
    let (seat, joining) = (Seat::new(rank, &id), Arc::clone(carrier));
    let join = Box::new(move || joining.join(&id, rank));
    let pair = Paired::meet(carrier.facts().kind, join, seat, carrier.patience(), said).await?;
    Ok(Means::Pair(pair, turns))
}

async fn say(out: &mpsc::Sender<Parcel>, content: parcel::Content) -> Result<(), NegotiationError> {
    out.send(Parcel { content: Some(content) }).await.map_err(|_| NegotiationError::Silent)
}

fn answer_of<E>(heard: Option<Result<Parcel, E>>) -> Result<LinkAnswer, NegotiationError> {
    match heard.and_then(Result::ok).ok_or(NegotiationError::Silent)?.content {
        Some(parcel::Content::LinkAnswer(answer)) => Ok(answer),
        _ => Err(NegotiationError::OutOfTurn),
    }
}

/// The owner's side, once its offer of `id` to an endpoint was sent.
///
/// # Errors
/// See [`NegotiationError`].
pub async fn offered<E>(
    (joining, endpoint): (&Joining, &str),
    id: Vec<u8>,
    parcels: &mut (impl Stream<Item = Result<Parcel, E>> + Unpin),
    out: &mpsc::Sender<Parcel>,
    patience: Duration,
) -> Result<Agreed, NegotiationError> {
    let heard = tokio::time::timeout(patience, parcels.next()).await.map_err(|_| NegotiationError::Silent)?;
    let met: Result<_, String> = match (answer_of(heard)?.declined, &joining.carrier, &joining.memory) {
        (Some(reason), Some(_), _) => Err(reason),
        (None, Some(carrier), _) => {
            // A side that could not join after all says so: nobody waits for it then.
            let met = tokio::select! {
                met = meet(carrier, id, 0) => met.map_err(|error| failed(carrier, &error)),
                heard = parcels.next() => Err(answer_of(heard)?.declined.ok_or(NegotiationError::OutOfTurn)?),
            };
            met.inspect_err(|reason| joining.was_unmet(endpoint, reason))
        }
        (Some(reason), None, _) => {
            if reason == ELSEWHERE {
                joining.was_unmet(endpoint, &reason);
            }
            Err(reason)
        }
        (None, None, memory) => on_ring(memory.as_ref(), &id, "open", SharedMemory::open).await.map(Means::Ring),
    };
    say(out, parcel::Content::LinkVerdict(LinkVerdict { failed: met.as_ref().err().cloned() })).await?;
    Ok(met.map_or_else(|reason| Agreed::on_pieces(Some(reason)), Agreed::on))
}

fn failed(carrier: &Arc<dyn Carrier>, error: &BodyError) -> String {
    format!("{} did not come about: {error}", carrier.facts().kind.name())
}

fn ring_name(id: &[u8]) -> Option<&[u8; NAME_BYTES]> {
    id.try_into().ok()
}

/// Opens or makes a ring, where files are waited for.
async fn on_ring(
    memory: Option<&SharedMemory>,
    name: &[u8],
    doing: &'static str,
    open: fn(&SharedMemory, &[u8; NAME_BYTES]) -> std::io::Result<Ring>,
) -> Result<Ring, String> {
    let failed = |why: String| format!("shm did not come about: cannot {doing} a ring: {why}");
    let memory = memory.ok_or("shm was not offered")?.clone();
    let name = *ring_name(name).ok_or_else(|| failed("it has another name".to_owned()))?;
    let opened = tokio::task::spawn_blocking(move || open(&memory, &name)).await;
    opened.map_err(|error| failed(error.to_string()))?.map_err(|error| failed(error.to_string()))
}

/// The assistant's side.
///
/// # Errors
/// See [`NegotiationError`].
pub async fn considered<E>(
    joining: Option<&Joining>,
    offer: LinkOffer,
    parcels: &mut (impl Stream<Item = Result<Parcel, E>> + Unpin),
    out: &mpsc::Sender<Parcel>,
    patience: Duration,
) -> Result<Agreed, NegotiationError> {
    let facts = offer.facts.unwrap_or_default();
    if facts.kind == LinkKind::Shm.name() {
        let memory = joining.and_then(|joining| joining.memory.as_ref());
        let made = match memory {
            None => Err("the other worker has no shm".to_owned()),
            Some(memory) if memory.machine() != facts.host => Err(ELSEWHERE.to_owned()),
            memory => on_ring(memory, &offer.id, "make", SharedMemory::create).await,
        };
        say(out, answer(made.as_ref().err().cloned())).await?;
        return match last_word(parcels, patience).await?.failed {
            Some(reason) => Ok(Agreed::on_pieces(Some(reason))),
            None => made.map(|ring| Agreed::on(Means::Ring(ring))).map_err(|_| NegotiationError::OutOfTurn),
        };
    }
    let carrier = joining.and_then(|joining| joining.carrier.as_ref());
    let decided = decide(&facts, carrier.map(|carrier| carrier.facts()));
    say(out, answer(decided.as_ref().err().cloned())).await?;
    let mut met = None;
    let mut verdict = None;
    if let (Ok(()), Some(carrier)) = (&decided, carrier) {
        let meeting = meet(carrier, offer.id.to_vec(), 1);
        tokio::pin!(meeting);
        let met_at_last = tokio::select! {
            met = &mut meeting => met,
            // The owner could not join, or has seen this side join before this side knows of it.
            heard = parcels.next() => {
                verdict = Some(verdict_of(heard)?);
                match &verdict {
                    Some(LinkVerdict { failed: None }) => meeting.await,
                    _ => Err(BodyError::HungUp),
                }
            }
        };
        match met_at_last {
            Ok(pair) => met = Some(pair),
            Err(_) if verdict.is_some() => {}
            Err(error) => say(out, answer(Some(failed(carrier, &error)))).await?,
        }
    }
    let verdict = match verdict {
        Some(verdict) => verdict,
        None => {
            // The owner may be about to meet somebody who is not there any more.
            let longest = patience + carrier.map_or(Duration::ZERO, |carrier| 3 * carrier.patience().least);
            last_word(parcels, longest).await?
        }
    };
    match verdict.failed {
        Some(reason) => Ok(Agreed::on_pieces(Some(reason))),
        None => met.map(Agreed::on).ok_or(NegotiationError::OutOfTurn),
    }
}

fn answer(declined: Option<String>) -> parcel::Content {
    parcel::Content::LinkAnswer(LinkAnswer { declined })
}

async fn last_word<E>(
    parcels: &mut (impl Stream<Item = Result<Parcel, E>> + Unpin),
    patience: Duration,
) -> Result<LinkVerdict, NegotiationError> {
    let heard = tokio::time::timeout(patience, parcels.next()).await;
    verdict_of(heard.map_err(|_| NegotiationError::Silent)?)
}

fn verdict_of<E>(heard: Option<Result<Parcel, E>>) -> Result<LinkVerdict, NegotiationError> {
    match heard.and_then(Result::ok).ok_or(NegotiationError::Silent)?.content {
        Some(parcel::Content::LinkVerdict(verdict)) => Ok(verdict),
        _ => Err(NegotiationError::OutOfTurn),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            kind: LinkKind::Nccl,
            version: 23_203,
            host: "a".to_owned(),
            device: "0".to_owned(),
            architecture: "sm_90".to_owned(),
            leaves_host: false,
        }
    }

    #[test]
    fn only_devices_that_can_be_joined_are() {
        let here = facts();
        let next = Facts { device: "1".to_owned(), ..facts() };
        assert_eq!(decide(&(&here).into(), Some(&next)), Ok(()));
        let declined = |other: Facts, why: &str| {
            for (offered, own) in [(&here, &other), (&other, &here)] {
                let reason = decide(&offered.into(), Some(own)).unwrap_err();
                assert!(reason.contains(why), "{reason}");
            }
        };
        declined(facts(), "both workers have the same");
        declined(Facts { version: 23_000, ..next.clone() }, "versions");
        declined(Facts { architecture: "sm_80".to_owned(), ..next.clone() }, "devices of one kind");
        assert!(decide(&(&here).into(), None).unwrap_err().contains("has no nccl"));
        let there = Facts { host: "b".to_owned(), ..facts() };
        declined(there.clone(), "may not leave the machine");
        // Both must have been told so.
        let there = Facts { leaves_host: true, ..there };
        declined(there.clone(), "may not leave the machine");
        assert_eq!(decide(&(&there).into(), Some(&Facts { leaves_host: true, ..here })), Ok(()));
    }
}
