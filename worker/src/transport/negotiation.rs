//! What joins a pair: decided from the facts of both sides, agreed on before the first letter, and told.
//!
//! The owner of a layer offers what it has, with the name of a pair to be made. The assistant agrees or says why not; then both
//! meet, and the owner has the last word, so that both know whether the pair is there. Whatever fails on the way, bodies go in
//! pieces on the stream itself, as between any two workers, and the report says why.

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

/// A carrier, and what became of the attempts to use it.
#[derive(Debug)]
pub struct Joining {
    carrier: Arc<dyn Carrier>,
    /// Why workers, by their endpoints, were not met. What is between two of them does not change: it is not tried again with
    /// each layer, as the time that a failure takes is that of many layers.
    unmet: Mutex<BTreeMap<String, String>>,
}

impl Joining {
    /// Before any attempt.
    pub fn by(carrier: Arc<dyn Carrier>) -> Arc<Self> {
        Arc::new(Self { carrier, unmet: Mutex::default() })
    }

    /// The library.
    pub fn carrier(&self) -> &Arc<dyn Carrier> {
        &self.carrier
    }

    fn unmet(&self) -> MutexGuard<'_, BTreeMap<String, String>> {
        self.unmet.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What to offer to a worker, if anything: the name of a pair.
    ///
    /// # Errors
    /// Why nothing is offered.
    pub fn offer_to(&self, endpoint: &str) -> Result<Vec<u8>, String> {
        if let Some(reason) = self.unmet().get(endpoint) {
            return Err(reason.clone());
        }
        self.carrier.new_id().map_err(|error| error.to_string())
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

/// Whether two sides can be joined; if not, why, as the report says it.
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
    /// The pair, and what it wants to have said to the other side; none if bodies go in pieces.
    pub pair: Option<(Paired, mpsc::Receiver<Turn>)>,
    /// As it is reported.
    pub link: LinkUse,
}

impl Agreed {
    /// Bodies go in pieces; why, if the owner has something faster.
    pub fn on_pieces(declined: Option<String>) -> Self {
        Self { pair: None, link: LinkUse { kind: LinkKind::Grpc, declined } }
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

type Met = Result<(Paired, mpsc::Receiver<Turn>), BodyError>;

async fn meet(carrier: &Arc<dyn Carrier>, id: Vec<u8>, rank: u32) -> Met {
    let (said, turns) = mpsc::channel(super::paired::TURNS);
    let (seat, joining) = (Seat::new(rank, &id), Arc::clone(carrier));
    let join = Box::new(move || joining.join(&id, rank));
    Ok((Paired::meet(carrier.facts().kind, join, seat, carrier.patience(), said).await?, turns))
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
    let carrier = &joining.carrier;
    let heard = tokio::time::timeout(patience, parcels.next()).await.map_err(|_| NegotiationError::Silent)?;
    let met: Result<_, String> = match answer_of(heard)?.declined {
        Some(reason) => Err(reason),
        // A side that could not join after all says so: nobody waits for it then.
        None => tokio::select! {
            met = meet(carrier, id, 0) => met.map_err(|error| failed(carrier, &error)),
            heard = parcels.next() => Err(answer_of(heard)?.declined.ok_or(NegotiationError::OutOfTurn)?),
        }
        .inspect_err(|reason| joining.was_unmet(endpoint, reason)),
    };
    let failed = met.as_ref().err().cloned();
    say(out, parcel::Content::LinkVerdict(LinkVerdict { failed: failed.clone() })).await?;
    let kind = carrier.facts().kind;
    Ok(match met {
        Ok(pair) => Agreed { pair: Some(pair), link: LinkUse { kind, declined: None } },
        Err(_) => Agreed::on_pieces(failed),
    })
}

fn failed(carrier: &Arc<dyn Carrier>, error: &BodyError) -> String {
    format!("{} did not come about: {error}", carrier.facts().kind.name())
}

/// The assistant's side.
///
/// # Errors
/// See [`NegotiationError`].
pub async fn considered<E>(
    carrier: Option<&Arc<dyn Carrier>>,
    offer: LinkOffer,
    parcels: &mut (impl Stream<Item = Result<Parcel, E>> + Unpin),
    out: &mpsc::Sender<Parcel>,
    patience: Duration,
) -> Result<Agreed, NegotiationError> {
    let facts = offer.facts.unwrap_or_default();
    let decided = decide(&facts, carrier.map(|carrier| carrier.facts()));
    let answer = |declined| parcel::Content::LinkAnswer(LinkAnswer { declined });
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
            let heard = tokio::time::timeout(longest, parcels.next()).await;
            verdict_of(heard.map_err(|_| NegotiationError::Silent)?)?
        }
    };
    if verdict.failed.is_some() {
        return Ok(Agreed::on_pieces(verdict.failed));
    }
    let pair = met.ok_or(NegotiationError::OutOfTurn)?;
    let link = LinkUse { kind: pair.0.kind(), declined: None };
    Ok(Agreed { pair: Some(pair), link })
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
