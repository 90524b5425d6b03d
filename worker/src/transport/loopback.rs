//! Two workers in one process: bodies are handed over.

use async_trait::async_trait;
use bytes::Bytes;
use espalier_common::report::LinkKind;
use tokio::sync::{Mutex, mpsc};
use tokio_util::sync::CancellationToken;

use super::link::{BodyError, Link};

/// Bodies that wait to be received; they are in memory already.
const QUEUE: usize = 4;

/// One end of a pair.
#[derive(Debug)]
pub struct Loopback {
    out: mpsc::Sender<Bytes>,
    inbox: Mutex<mpsc::Receiver<Bytes>>,
    /// Of both ends.
    ended: CancellationToken,
    /// What ended it at this end.
    reason: std::sync::OnceLock<String>,
}

/// Both ends of a link.
pub fn pair() -> (Loopback, Loopback) {
    let ((to_second, from_first), (to_first, from_second)) = (mpsc::channel(QUEUE), mpsc::channel(QUEUE));
    let ended = CancellationToken::new();
    let end = |out, inbox| Loopback {
        out,
        inbox: Mutex::new(inbox),
        ended: ended.clone(),
        reason: std::sync::OnceLock::new(),
    };
    (end(to_second, from_second), end(to_first, from_first))
}

impl Loopback {
    fn end(&self) -> BodyError {
        match self.reason.get() {
            Some(reason) => BodyError::Aborted { reason: reason.clone() },
            None => BodyError::HungUp,
        }
    }
}

#[async_trait]
impl Link for Loopback {
    fn kind(&self) -> LinkKind {
        LinkKind::Loopback
    }

    async fn send(&self, body: Bytes) -> Result<(), BodyError> {
        if body.is_empty() {
            return Ok(());
        }
        tokio::select! {
            biased;
            () = self.ended.cancelled() => Err(self.end()),
            sent = self.out.send(body) => sent.map_err(|_| BodyError::HungUp),
        }
    }

    async fn receive(&self, bytes: usize) -> Result<Vec<u8>, BodyError> {
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let mut inbox = self.inbox.lock().await;
        let body = tokio::select! {
            biased;
            () = self.ended.cancelled() => return Err(self.end()),
            body = inbox.recv() => body.ok_or(BodyError::HungUp)?,
        };
        if body.len() != bytes {
            self.abort("a body has another size than must come");
            return Err(BodyError::Size { found: body.len() as u64, expected: bytes as u64 });
        }
        Ok(body.into())
    }

    fn abort(&self, reason: &str) {
        let _ = self.reason.set(reason.to_owned());
        self.ended.cancel();
    }
}
