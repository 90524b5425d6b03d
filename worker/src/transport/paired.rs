//! A link over a pair of communicators. What the two sides have to agree on before a body goes, they say on a stream of turns
//! beside it: which body, who begins, and in what order ([`super::turns`]). The end of that stream is the end of the link.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use espalier_common::report::LinkKind;
use tokio::sync::{mpsc, oneshot};

use super::communicator::{Driver, Join, Seat, Transfer};
use super::link::{BodyError, Link, Patience};
use super::turns::{Act, Announced, Turn, Turns};

/// Turns that wait to be said: neither side has more to say before it hears something.
pub const TURNS: usize = 8;

/// A thread that is stuck inside one call of the library for so long is left behind; calls begin something, or copy it.
const STUCK: Duration = Duration::from_secs(30);

type Done = oneshot::Receiver<Result<Vec<u8>, BodyError>>;
type Doing = oneshot::Sender<Result<Vec<u8>, BodyError>>;

/// One end of a pair.
#[derive(Debug)]
pub struct Paired {
    kind: LinkKind,
    driver: Driver,
    state: Mutex<State>,
}

/// A transfer that waits for its turn.
#[derive(Debug)]
struct State {
    turns: Turns,
    said: mpsc::Sender<Turn>,
    sending: Option<(Bytes, Doing)>,
    receiving: Option<Waiting>,
}

/// Someone who waits for a body: told what it is once it begins.
#[derive(Debug)]
struct Waiting {
    begun: oneshot::Sender<Announced>,
    done: Doing,
}

impl Paired {
    /// Meets the other side. What is to be said to it goes to `said`; what it says comes by [`Self::hear`].
    ///
    /// # Errors
    /// See [`BodyError`].
    pub async fn meet(
        kind: LinkKind,
        join: Join,
        seat: Seat,
        patience: Patience,
        said: mpsc::Sender<Turn>,
    ) -> Result<Self, BodyError> {
        let (driver, met) = Driver::start(join, seat, patience)?;
        // Joining, and a hello each way.
        let longest = 3 * patience.least + STUCK;
        match tokio::time::timeout(longest, met).await {
            Ok(Ok(met)) => met?,
            Ok(Err(_)) => return Err(BodyError::HungUp),
            Err(_) => {
                return Err(BodyError::Overdue { what: "meeting", bytes: 0, seconds: longest.as_secs_f64() });
            }
        }
        let state = State { turns: Turns::new(seat.rank == 0), said, sending: None, receiving: None };
        Ok(Self { kind, driver, state: Mutex::new(state) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whatever panics in between leaves turns that the other side does not follow, which is an error there.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes what the other side says.
    ///
    /// # Errors
    /// See [`BodyError`]; the link is at its end then.
    pub fn hear(&self, turn: Turn) -> Result<(), BodyError> {
        let mut state = self.state();
        let acts = state.turns.hear(turn);
        self.act(&mut state, acts)
    }

    /// The other side will say no more.
    pub fn hung_up(&self) {
        self.end(&mut self.state(), BodyError::HungUp);
    }

    /// Does what the turns ask for. All of it never waits, so that both sides begin in one order.
    fn act(&self, state: &mut State, acts: Result<Vec<Act>, BodyError>) -> Result<(), BodyError> {
        let acted = acts.and_then(|acts| {
            for act in acts {
                match act {
                    Act::Say(turn) => {
                        state.said.try_send(turn).map_err(|error| match error {
                            mpsc::error::TrySendError::Full(_) => BodyError::OutOfTurn { what: "a flood of turns" },
                            mpsc::error::TrySendError::Closed(_) => BodyError::HungUp,
                        })?;
                    }
                    Act::Send => {
                        let (body, done) = state.sending.take().expect("it was announced, so it is there");
                        self.driver.begin(Transfer::Send(body), done)?;
                    }
                    Act::Receive(body) => {
                        let Waiting { begun, done } = state.receiving.take().expect("it was wanted, so it is there");
                        let _ = begun.send(body); // whoever wanted it may have gone
                        self.driver.begin(Transfer::Receive(body.bytes as usize), done)?;
                    }
                }
            }
            Ok(())
        });
        if let Err(error) = &acted {
            self.end(state, error.clone());
        }
        acted
    }

    /// Nobody waits on a link that has ended: what waits for a turn hears of it as its other half goes.
    fn end(&self, state: &mut State, error: BodyError) {
        self.driver.stop(error);
        (state.sending, state.receiving) = (None, None);
    }

    fn ended(&self) -> BodyError {
        self.driver.stopped().cloned().unwrap_or(BodyError::HungUp)
    }

    fn check(&self) -> Result<(), BodyError> {
        self.driver.stopped().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Waits for the end of a transfer. How long it may take is the thread's to watch, as long as that is alive.
    async fn done(&self, what: &'static str, bytes: usize, mut done: Done) -> Result<Vec<u8>, BodyError> {
        let mut beats = self.driver.beats();
        let moved = loop {
            match tokio::time::timeout(STUCK, &mut done).await {
                Ok(Ok(moved)) => break moved,
                Ok(Err(_)) => break Err(self.ended()),
                Err(_) => {
                    let before = std::mem::replace(&mut beats, self.driver.beats());
                    if before == beats {
                        break Err(BodyError::Overdue { what, bytes, seconds: STUCK.as_secs_f64() });
                    }
                }
            }
        };
        moved.inspect_err(|error| self.end(&mut self.state(), error.clone()))
    }
}

#[async_trait]
impl Link for Paired {
    fn kind(&self) -> LinkKind {
        self.kind
    }

    async fn send(&self, body: Bytes) -> Result<(), BodyError> {
        if body.is_empty() {
            return Ok(());
        }
        let (bytes, crc32) = (body.len(), crc32fast::hash(&body));
        let announced = Announced { bytes: bytes as u64, crc32 };
        let (doing, done) = oneshot::channel();
        {
            let mut state = self.state();
            self.check()?;
            if state.sending.is_some() {
                return Err(BodyError::OutOfTurn { what: "a second body to be sent" });
            }
            state.sending = Some((body, doing));
            let acts = state.turns.send(announced);
            self.act(&mut state, acts)?;
        }
        // Until the receiver is there: as long as it has other things to do. If it dies, the stream of turns ends.
        self.done("sending", bytes, done).await.map(drop)
    }

    async fn receive(&self, bytes: usize) -> Result<Vec<u8>, BodyError> {
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let (begun, beginning) = oneshot::channel();
        let (doing, done) = oneshot::channel();
        {
            let mut state = self.state();
            self.check()?;
            if state.receiving.is_some() {
                return Err(BodyError::OutOfTurn { what: "a second body to be received" });
            }
            state.receiving = Some(Waiting { begun, done: doing });
            let acts = state.turns.receive(bytes as u64);
            self.act(&mut state, acts)?;
        }
        let announced = beginning.await.map_err(|_| self.ended())?;
        let body = self.done("receiving", bytes, done).await?;
        if body.len() != bytes || crc32fast::hash(&body) != announced.crc32 {
            let error = BodyError::Checksum { bytes };
            self.end(&mut self.state(), error.clone());
            return Err(error);
        }
        Ok(body)
    }

    fn abort(&self, reason: &str) {
        self.end(&mut self.state(), BodyError::Aborted { reason: reason.to_owned() });
    }
}
