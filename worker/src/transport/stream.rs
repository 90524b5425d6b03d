//! Bodies in pieces, on the stream on which the two workers talk anyway: what works between any two.
//!
//! Each piece has its place and a checksum, and none is sent that the receiver has no room for: it grants bytes, and grants
//! again what it has taken.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use espalier_common::report::LinkKind;
use espalier_proto::v1::{Parcel, Piece, parcel};
use tokio::sync::{Mutex, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::WINDOW_BYTES;
use super::credit::Grants;
use super::link::{BodyError, Link};
use super::parcel::{PieceBox, pieces};

/// Pieces that wait to be put together. A full queue holds the stream back.
pub const PIECES: usize = 4;

/// What the receiver has granted.
#[derive(Debug, Clone)]
pub struct Purse(Arc<Semaphore>);

impl Default for Purse {
    /// A window, granted from the start.
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(WINDOW_BYTES as usize)))
    }
}

impl Purse {
    /// Adds a grant; false if there was never so much to grant.
    #[must_use]
    pub fn grant(&self, bytes: u64) -> bool {
        let more = usize::try_from(bytes).unwrap_or(usize::MAX);
        let is_owed = self.0.available_permits().saturating_add(more) <= WINDOW_BYTES as usize;
        if is_owed {
            self.0.add_permits(more);
        }
        is_owed
    }
}

/// One end of a stream of parcels.
#[derive(Debug)]
pub struct StreamLink {
    out: mpsc::Sender<Parcel>,
    purse: Purse,
    inbox: Mutex<(mpsc::Receiver<Piece>, Grants)>,
    /// A body that has begun to come goes on coming.
    inactivity: Duration,
    ended: CancellationToken,
    reason: std::sync::OnceLock<String>,
}

impl StreamLink {
    /// Sends to `out`, as far as `purse` goes. Whoever reads the stream puts pieces into the other end of `inbox`.
    pub fn new(out: mpsc::Sender<Parcel>, purse: Purse, inbox: mpsc::Receiver<Piece>, inactivity: Duration) -> Self {
        Self {
            out,
            purse,
            inbox: Mutex::new((inbox, Grants::new(WINDOW_BYTES))),
            inactivity,
            ended: CancellationToken::new(),
            reason: std::sync::OnceLock::new(),
        }
    }

    async fn until_ended<T>(&self, work: impl Future<Output = Result<T, BodyError>>) -> Result<T, BodyError> {
        tokio::select! {
            biased;
            () = self.ended.cancelled() => {
                let reason = self.reason.get().cloned().unwrap_or_default();
                Err(BodyError::Aborted { reason })
            }
            done = work => done.inspect_err(|error| self.abort(&error.to_string())),
        }
    }

    async fn say(&self, content: parcel::Content) -> Result<(), BodyError> {
        self.out.send(Parcel { content: Some(content) }).await.map_err(|_| BodyError::HungUp)
    }
}

#[async_trait]
impl Link for StreamLink {
    fn kind(&self) -> LinkKind {
        LinkKind::Grpc
    }

    async fn send(&self, body: Bytes) -> Result<(), BodyError> {
        self.until_ended(async {
            for piece in pieces(body) {
                let paid = self.purse.0.acquire_many(piece.data.len() as u32);
                tokio::select! {
                    paid = paid => paid.map_err(|_| BodyError::HungUp)?.forget(),
                    // Nothing will be granted any more.
                    () = self.out.closed() => return Err(BodyError::HungUp),
                }
                self.say(parcel::Content::Piece(piece)).await?;
            }
            Ok(())
        })
        .await
    }

    async fn receive(&self, bytes: usize) -> Result<Vec<u8>, BodyError> {
        self.until_ended(async {
            let mut inbox = self.inbox.lock().await;
            let (inbox, ledger) = &mut *inbox;
            let mut body = PieceBox::new(bytes);
            while !body.is_whole() {
                let silent = |_| BodyError::Silent { seconds: self.inactivity.as_secs() };
                let piece = tokio::time::timeout(self.inactivity, inbox.recv()).await.map_err(silent)?;
                let piece = piece.ok_or(BodyError::HungUp)?;
                body.add(&piece)?;
                if let Some(bytes) = ledger.consume(piece.data.len() as u64) {
                    // A sender that is done no longer listens.
                    let _ = self.say(parcel::Content::CreditBytes(bytes)).await;
                }
            }
            Ok(body.into_bytes())
        })
        .await
    }

    fn abort(&self, reason: &str) {
        let _ = self.reason.set(reason.to_owned());
        self.ended.cancel();
    }
}
