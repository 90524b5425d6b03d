//! A line: the letters of a layer's owner and one of its assistants. Heads go on the stream of the call, bodies over the link
//! that the two agreed on.

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use espalier_common::clock::Stopwatch;
use espalier_common::report::LinkUse;
use espalier_gate::trace::Context;
use espalier_proto::v1::head::Matter;
use espalier_proto::v1::{
    Announced as AnnouncedParcel, Clear, Head, LinkAnswer, LinkOffer, Parcel, Piece, Turn as TurnParcel, parcel, turn,
};
use futures::{Stream, StreamExt as _};
use tokio::sync::mpsc;

use super::grpc::LinkError;
use super::link::{BodyError, Link};
use super::negotiation::{Agreed, Joining, Means, considered, offered};
use super::paired::Paired;
use super::parcel::{Letter, Outgoing, ParcelError, announced, head};
use super::stream::{PIECES, Purse, StreamLink};
use super::turns::{Announced, Turn};

/// Heads that wait to be read: more than either side says before it hears something, so that they do not hold up grants.
const HEADS: usize = 64;

/// What came from a worker that shares a layer with this one.
#[derive(Debug)]
pub struct Received {
    /// Which one, as the receiver numbers them.
    pub from: usize,
    /// A letter, or why there will be none any more.
    pub letter: Result<Letter, LinkError>,
    /// From the letter's head to the last of its body.
    pub seconds: f64,
}

/// One worker that shares a layer with this one, and what is sent to it and received from it.
pub struct Line<S> {
    /// Its endpoint, or a word for it.
    pub endpoint: String,
    /// Its number.
    pub number: usize,
    /// How large the body of a letter must be, if it may come at all.
    pub size_of: S,
    /// What to send.
    pub letters: mpsc::Receiver<Outgoing>,
    /// Where to put what comes. The end of the line is the last of it.
    pub received: mpsc::Sender<Received>,
    /// What could join the two besides the stream.
    pub joining: Option<Arc<Joining>>,
    /// What an assistant's spans belong to, if its owner's unit is traced.
    pub trace: Option<Context>,
    /// Where to note what joins them.
    pub joined_by: Arc<OnceLock<LinkUse>>,
}

/// What a side knows of the owner's offer.
pub(super) enum Offer {
    /// There was none.
    None,
    /// This side could make none, because of this.
    Failed(String),
    /// This side made it: the name of the pair.
    Made(Vec<u8>),
    /// The other side made it.
    Heard(LinkOffer),
}

impl<S: Fn(&Matter) -> Option<u64>> Line<S> {
    /// Agrees on a link, and carries letters until either side has no more to say. `patience` is what the other side may be
    /// silent for where it must say something.
    pub(super) async fn carry(
        &mut self,
        offer: Offer,
        mut parcels: impl Stream<Item = Result<Parcel, LinkError>> + Unpin,
        out: &mpsc::Sender<Parcel>,
        patience: Duration,
    ) -> Result<(), LinkError> {
        let endpoint = self.endpoint.clone();
        let agreed = match (offer, &self.joining) {
            (Offer::None, _) => Ok(Agreed::on_pieces(None)),
            (Offer::Failed(reason), _) => Ok(Agreed::on_pieces(Some(reason))),
            (Offer::Made(id), Some(joining)) => offered((joining, &endpoint), id, &mut parcels, out, patience).await,
            (Offer::Made(_), None) => Ok(Agreed::on_pieces(None)),
            (Offer::Heard(offer), joining) => considered(joining.as_deref(), offer, &mut parcels, out, patience).await,
        };
        let agreed = agreed.map_err(|source| LinkError::Negotiation { endpoint: endpoint.clone(), source })?;
        match &agreed.link.declined {
            Some(reason) => tracing::info!(endpoint, reason, "bodies go in pieces"),
            None => tracing::debug!(endpoint, kind = agreed.link.kind.name(), "joined"),
        }
        let _ = self.joined_by.set(agreed.link);
        let ((heads, headed), (pieces, pieced)) = (mpsc::channel(HEADS), mpsc::channel(PIECES));
        let (ring, pair) = match agreed.means {
            Means::Pieces => (None, None),
            Means::Ring(ring) => (Some(ring), None),
            Means::Pair(pair, turns) => (None, Some((pair, turns))),
        };
        let stream = StreamLink::new(out.clone(), pieced, ring, patience);
        let (pair, mut turns) = pair.unzip();
        let link: &dyn Link = match &pair {
            Some(pair) => pair,
            None => &stream,
        };
        let inboxes = Inboxes { heads, pieces, purse: stream.purse(), pair: pair.as_ref() };
        let sorting = async {
            inboxes.sort(parcels, &endpoint).await;
            std::future::pending::<Infallible>().await
        };
        let speaking = async {
            while let Some(turn) = next(&mut turns).await {
                if out.send(Parcel { content: Some(said(turn)) }).await.is_err() {
                    break; // the other side went away, as reading tells
                }
            }
            std::future::pending::<Infallible>().await
        };
        let Self { number, size_of, letters, received, .. } = self;
        tokio::select! {
            written = write(letters, link, &endpoint, out) => written,
            read = read(headed, link, (&endpoint, *number), size_of, received) => read,
            never = sorting => match never {},
            never = speaking => match never {},
        }
    }

    pub(super) async fn tell_end(&self, ended: Result<(), LinkError>) {
        if let Err(error) = ended {
            // Whoever listened may be through with it.
            let _ = self.received.send(Received { from: self.number, letter: Err(error), seconds: 0.0 }).await;
        }
    }
}

async fn next(turns: &mut Option<mpsc::Receiver<Turn>>) -> Option<Turn> {
    turns.as_mut()?.recv().await
}

/// A turn as it is said.
fn said(turn: Turn) -> parcel::Content {
    let turn = match turn {
        Turn::Announced(Announced { bytes, crc32 }) => turn::Turn::Announced(AnnouncedParcel { bytes, crc32 }),
        Turn::Clear => turn::Turn::Clear(Clear {}),
        Turn::Go { own } => turn::Turn::Own(own),
    };
    parcel::Content::Turn(TurnParcel { turn: Some(turn) })
}

/// A turn as it was said.
fn heard(turn: TurnParcel) -> Option<Turn> {
    Some(match turn.turn? {
        turn::Turn::Announced(AnnouncedParcel { bytes, crc32 }) => Turn::Announced(Announced { bytes, crc32 }),
        turn::Turn::Clear(Clear {}) => Turn::Clear,
        turn::Turn::Own(own) => Turn::Go { own },
    })
}

/// Where parcels go that come on the stream.
struct Inboxes<'a> {
    heads: mpsc::Sender<Result<Head, LinkError>>,
    pieces: mpsc::Sender<Piece>,
    purse: Purse,
    pair: Option<&'a Paired>,
}

impl Inboxes<'_> {
    /// Sorts parcels until there are no more; why that is, is the last of the heads.
    async fn sort(self, mut parcels: impl Stream<Item = Result<Parcel, LinkError>> + Unpin, endpoint: &str) {
        let wrong = |source| LinkError::Body { endpoint: endpoint.to_owned(), source };
        let end = loop {
            let content = match parcels.next().await {
                Some(Ok(parcel)) => parcel.content,
                Some(Err(error)) => break error,
                None => break wrong(BodyError::HungUp),
            };
            let taken = match content {
                Some(parcel::Content::Head(head)) => self.heads.send(Ok(head)).await.map_err(|_| BodyError::HungUp),
                Some(parcel::Content::Piece(piece)) if self.pair.is_none() => {
                    self.pieces.send(piece).await.map_err(|_| BodyError::HungUp)
                }
                Some(parcel::Content::CreditBytes(bytes)) => {
                    if self.purse.grant(bytes) {
                        Ok(())
                    } else {
                        Err(BodyError::OutOfTurn { what: "a grant of more than a window" })
                    }
                }
                Some(parcel::Content::Turn(turn)) => match (self.pair, heard(turn)) {
                    (Some(pair), Some(turn)) => pair.hear(turn),
                    _ => Err(ParcelError::OutOfTurn.into()),
                },
                // It crossed with the word that the two have not met.
                Some(parcel::Content::LinkAnswer(LinkAnswer { declined: Some(_) })) if self.pair.is_none() => Ok(()),
                _ => Err(ParcelError::OutOfTurn.into()),
            };
            if let Err(error) = taken {
                break wrong(error);
            }
        };
        if let Some(pair) = self.pair {
            pair.hung_up();
        }
        let _ = self.heads.send(Err(end)).await; // whoever reads may be through with it
    }
}

/// A link alone, whose other end is that of the stream.
#[cfg(test)]
pub(super) fn bare(
    parcels: impl Stream<Item = Result<Parcel, LinkError>> + Unpin + Send + 'static,
    out: mpsc::Sender<Parcel>,
    ring: Option<super::ring::Ring>,
    tasks: &espalier_common::tasks::TaskGroup,
) -> StreamLink {
    let ((heads, _), (pieces, pieced)) = (mpsc::channel(HEADS), mpsc::channel(PIECES));
    let link = StreamLink::new(out, pieced, ring, Duration::from_secs(30));
    let (token, purse) = (tasks.token(), link.purse());
    tasks.spawn(async move {
        let inboxes = Inboxes { heads, pieces, purse, pair: None };
        token.run_until_cancelled(inboxes.sort(parcels, "the other end")).await;
    });
    link
}

/// Sends letters.
async fn write(
    letters: &mut mpsc::Receiver<Outgoing>,
    link: &dyn Link,
    endpoint: &str,
    out: &mpsc::Sender<Parcel>,
) -> Result<(), LinkError> {
    while let Some(Outgoing { matter, body }) = letters.recv().await {
        let unreadable = |source| LinkError::Unreadable { endpoint: endpoint.to_owned(), source };
        let failed = |source| LinkError::Body { endpoint: endpoint.to_owned(), source };
        let body = tokio::task::spawn_blocking(move || body.into_bytes()).await.map_err(|_| LinkError::Cancelled)?;
        let body = body.map_err(unreadable)?;
        let opening = parcel::Content::Head(head(matter, &body));
        out.send(Parcel { content: Some(opening) }).await.map_err(|_| failed(BodyError::HungUp))?;
        link.send(body).await.map_err(failed)?;
    }
    Ok(())
}

/// Receives letters.
async fn read(
    mut heads: mpsc::Receiver<Result<Head, LinkError>>,
    link: &dyn Link,
    (endpoint, number): (&str, usize),
    size_of: &impl Fn(&Matter) -> Option<u64>,
    received: &mpsc::Sender<Received>,
) -> Result<(), LinkError> {
    let wrong = |source: BodyError| LinkError::Body { endpoint: endpoint.to_owned(), source };
    while let Some(head) = heads.recv().await {
        let watch = Stopwatch::start();
        let (matter, bytes) = announced(head?, size_of).map_err(|error| wrong(error.into()))?;
        let body = match link.receive(bytes).await {
            Ok(body) => body,
            Err(error) => {
                // What the stream itself said at its end tells more.
                let end = std::iter::from_fn(|| heads.try_recv().ok()).find_map(Result::err);
                return Err(end.filter(|_| error == BodyError::HungUp).unwrap_or_else(|| wrong(error)));
            }
        };
        let (letter, seconds) = (Ok(Letter { matter, body }), watch.seconds());
        if received.send(Received { from: number, letter, seconds }).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}
