//! Bodies in pieces, on the stream on which the two workers talk anyway: what works between any two. Two that are on one machine
//! say there which pieces lie in memory that both have open.
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
use super::ring::{RING_BYTES, Ring};

/// Pieces that wait to be put together. A full queue holds the stream back.
pub const PIECES: usize = 4;

/// What the receiver has granted.
#[derive(Debug, Clone)]
pub struct Purse {
    granted: Arc<Semaphore>,
    window: usize,
}

impl Purse {
    /// A window, granted from the start.
    fn of(window: u64) -> Self {
        let window = window as usize;
        Self { granted: Arc::new(Semaphore::new(window)), window }
    }

    /// Adds a grant; false if there was never so much to grant.
    #[must_use]
    pub fn grant(&self, bytes: u64) -> bool {
        let more = usize::try_from(bytes).unwrap_or(usize::MAX);
        let is_owed = self.granted.available_permits().saturating_add(more) <= self.window;
        if is_owed {
            self.granted.add_permits(more);
        }
        is_owed
    }
}

/// One end of a stream of parcels.
#[derive(Debug)]
pub struct StreamLink {
    out: mpsc::Sender<Parcel>,
    purse: Purse,
    /// Where pieces lie, if not in their parcels.
    ring: Option<Ring>,
    /// Bytes that were written to the ring.
    written: Mutex<u64>,
    inbox: Mutex<Inbox>,
    /// A body that has begun to come goes on coming.
    inactivity: Duration,
    ended: CancellationToken,
    reason: std::sync::OnceLock<String>,
}

/// What comes.
#[derive(Debug)]
struct Inbox {
    pieces: mpsc::Receiver<Piece>,
    ledger: Grants,
    /// Bytes that were read from the ring.
    read: u64,
}

impl StreamLink {
    /// Sends to `out`, as far as the receiver grants it. Whoever reads the stream puts pieces into the other end of `pieces`.
    pub fn new(
        out: mpsc::Sender<Parcel>,
        pieces: mpsc::Receiver<Piece>,
        ring: Option<Ring>,
        inactivity: Duration,
    ) -> Self {
        let window = if ring.is_some() { RING_BYTES } else { WINDOW_BYTES };
        Self {
            out,
            purse: Purse::of(window),
            ring,
            written: Mutex::default(),
            inbox: Mutex::new(Inbox { pieces, ledger: Grants::new(window), read: 0 }),
            inactivity,
            ended: CancellationToken::new(),
            reason: std::sync::OnceLock::new(),
        }
    }

    /// Where grants go.
    pub fn purse(&self) -> Purse {
        self.purse.clone()
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

/// What became of shared memory.
fn lost(doing: &'static str) -> impl Fn(std::io::Error) -> BodyError {
    move |error| BodyError::Library { doing, said: error.to_string() }
}

#[async_trait]
impl Link for StreamLink {
    fn kind(&self) -> LinkKind {
        if self.ring.is_some() { LinkKind::Shm } else { LinkKind::Grpc }
    }

    async fn send(&self, body: Bytes) -> Result<(), BodyError> {
        self.until_ended(async {
            let mut written = self.written.lock().await;
            for mut piece in pieces(body) {
                let paid = self.purse.granted.acquire_many(piece.data.len() as u32);
                tokio::select! {
                    paid = paid => paid.map_err(|_| BodyError::HungUp)?.forget(),
                    // Nothing will be granted any more.
                    () = self.out.closed() => return Err(BodyError::HungUp),
                }
                if let Some(ring) = &self.ring {
                    // It copies a piece at most, as encoding one would.
                    let data = std::mem::take(&mut piece.data);
                    ring.write(*written, &data).map_err(lost("writing to shared memory"))?;
                    piece.bytes = data.len() as u32;
                    *written += data.len() as u64;
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
            let Inbox { pieces, ledger, read } = &mut *inbox;
            let mut body = PieceBox::new(bytes);
            while !body.is_whole() {
                let silent = |_| BodyError::Silent { seconds: self.inactivity.as_secs() };
                let piece = tokio::time::timeout(self.inactivity, pieces.recv()).await.map_err(silent)?;
                let piece = piece.ok_or(BodyError::HungUp)?;
                let taken = match &self.ring {
                    Some(ring) => {
                        body.add_from(&piece, |bytes| {
                            ring.read(*read, bytes).map_err(lost("reading from shared memory"))
                        })?;
                        *read += u64::from(piece.bytes);
                        u64::from(piece.bytes)
                    }
                    None => {
                        body.add(&piece)?;
                        piece.data.len() as u64
                    }
                };
                if let Some(bytes) = ledger.consume(taken) {
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
