//! The seam to a library that moves bytes between two devices, and the thread on which one pair of it lives.
//!
//! All that can go wrong is dealt with here, for whatever library: joining that does not end, the wrong side being met, a
//! transfer that hangs, an abort from elsewhere. What is behind [`Communicator`] only begins things and looks how they stand.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use espalier_common::clock::Stopwatch;
use tokio::sync::oneshot;

use super::link::{BodyError, Patience};

/// One side of a pair, as a library has it. Made, used and dropped on one thread; nothing in it waits for the other side.
pub trait Communicator {
    /// The rank and the number of ranks that the library gave this side.
    ///
    /// # Errors
    /// `Library`.
    fn seat(&mut self) -> Result<(u32, u32), BodyError>;

    /// Begins to send a body to the other side.
    ///
    /// # Errors
    /// `Library`.
    fn begin_send(&mut self, body: &[u8]) -> Result<(), BodyError>;

    /// Begins to receive a body from the other side.
    ///
    /// # Errors
    /// `Library`.
    fn begin_receive(&mut self, bytes: usize) -> Result<(), BodyError>;

    /// Whether what was begun last is done; joining is the first.
    ///
    /// # Errors
    /// `Library`, which is all that is heard of a side that died.
    fn is_done(&mut self) -> Result<bool, BodyError>;

    /// The body that was received last, once that is done.
    ///
    /// # Errors
    /// `Library`.
    fn received(&mut self) -> Result<Vec<u8>, BodyError>;

    /// Begins to take leave once all is done: what was sent is on its way until then.
    ///
    /// # Errors
    /// `Library`.
    fn begin_leave(&mut self) -> Result<(), BodyError>;

    /// Stops whatever is under way, for good; the other side hears of it or does not.
    fn abort(&mut self);
}

/// Makes one side of a pair, on the thread on which it stays.
pub type Join = Box<dyn FnOnce() -> Result<Box<dyn Communicator>, BodyError> + Send>;

/// What is to be transferred.
#[derive(Debug)]
pub(super) enum Transfer {
    Send(Bytes),
    Receive(usize),
}

struct Order {
    transfer: Transfer,
    done: oneshot::Sender<Result<Vec<u8>, BodyError>>,
}

/// Transfers that wait: one a direction, and those are begun in turns.
const QUEUE: usize = 4;
/// How often a transfer is looked at: often at first, as most are short.
const GLANCES: [Duration; 2] = [Duration::from_micros(20), Duration::from_millis(1)];
/// How long a thread without work waits before it looks whether it is still wanted.
const IDLE: Duration = Duration::from_millis(200);

/// Which of two sides this is, and of what pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seat {
    /// 0 for the owner, 1 for the assistant.
    pub rank: u32,
    /// Names the pair.
    pub pair: u32,
}

impl Seat {
    /// The side `rank` of the pair that `id` is the name of.
    pub fn new(rank: u32, id: &[u8]) -> Self {
        Self { rank, pair: crc32fast::hash(id) }
    }

    /// What each side says first: a body of 12 bytes that only the other side of the same pair says.
    fn hello(self) -> [u8; 12] {
        let mut hello = [0; 12];
        for (place, word) in hello.chunks_exact_mut(4).zip([self.pair, self.rank, 2]) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        hello
    }

    fn other(self) -> Self {
        Self { rank: 1 - self.rank, ..self }
    }
}

/// The thread of one side of a pair.
#[derive(Debug)]
pub(super) struct Driver {
    orders: SyncSender<Order>,
    signals: Arc<Signals>,
}

/// What the thread and its handle tell each other besides orders.
#[derive(Debug, Default)]
struct Signals {
    /// Set once: why the thread has to stop at once.
    stop: OnceLock<BodyError>,
    /// The handle is gone.
    is_unwanted: AtomicBool,
    /// Counts while the thread is not stuck inside the library.
    beats: AtomicU64,
}

impl Driver {
    /// Starts the thread, which joins. The receiver hears once the other side was met.
    pub(super) fn start(
        join: Join,
        seat: Seat,
        patience: Patience,
    ) -> Result<(Self, oneshot::Receiver<Result<(), BodyError>>), BodyError> {
        let (orders, queue) = sync_channel(QUEUE);
        let (met, meeting) = oneshot::channel();
        let signals = Arc::new(Signals::default());
        let worker = Worker { signals: Arc::clone(&signals), patience };
        let live = move || worker.live(join, seat, met, &queue);
        let started = std::thread::Builder::new().name("link".to_owned()).spawn(live);
        started.map_err(|error| BodyError::Library { doing: "starting a thread", said: error.to_string() })?;
        Ok((Self { orders, signals }, meeting))
    }

    /// Begins a transfer as soon as those before it are done. Never waits.
    pub(super) fn begin(
        &self,
        transfer: Transfer,
        done: oneshot::Sender<Result<Vec<u8>, BodyError>>,
    ) -> Result<(), BodyError> {
        self.orders.try_send(Order { transfer, done }).map_err(|error| match error {
            TrySendError::Full(_) => BodyError::OutOfTurn { what: "one transfer too many" },
            TrySendError::Disconnected(_) => self.stopped().cloned().unwrap_or(BodyError::HungUp),
        })
    }

    /// Stops it, and what is under way. The first reason counts.
    pub(super) fn stop(&self, reason: BodyError) {
        let _ = self.signals.stop.set(reason);
    }

    pub(super) fn stopped(&self) -> Option<&BodyError> {
        self.signals.stop.get()
    }

    /// Differs from what it was before, unless the thread is stuck inside the library.
    pub(super) fn beats(&self) -> u64 {
        self.signals.beats.load(Ordering::Relaxed)
    }
}

impl Drop for Driver {
    /// A transfer that nobody waits for any more must not keep the device.
    fn drop(&mut self) {
        self.signals.is_unwanted.store(true, Ordering::Relaxed);
    }
}

/// What the thread has besides the communicator.
struct Worker {
    signals: Arc<Signals>,
    patience: Patience,
}

impl Worker {
    fn live(self, join: Join, seat: Seat, met: oneshot::Sender<Result<(), BodyError>>, orders: &Receiver<Order>) {
        let mut communicator = match join() {
            Ok(communicator) => communicator,
            Err(error) => {
                let _ = self.signals.stop.set(error.clone());
                let _ = met.send(Err(error)); // whoever waited may be through with it
                return;
            }
        };
        let meeting = self.meet(&mut *communicator, seat);
        let is_met = meeting.is_ok();
        if let Err(error) = &meeting {
            self.break_off(&mut *communicator, error);
        }
        let _ = met.send(meeting);
        if is_met {
            self.serve(&mut *communicator, orders);
        }
    }

    /// Joins, and makes sure of who is there.
    fn meet(&self, communicator: &mut dyn Communicator, seat: Seat) -> Result<(), BodyError> {
        self.wait(communicator, "joining", 0)?;
        let found = communicator.seat()?;
        if found != (seat.rank, 2) {
            let found = format!("rank {} of {}", found.0, found.1);
            return Err(BodyError::Stranger { found, expected: seat.rank });
        }
        let say = |communicator: &mut dyn Communicator| {
            communicator.begin_send(&seat.hello())?;
            self.wait(communicator, "saying hello", seat.hello().len())
        };
        if seat.rank == 0 {
            say(communicator)?;
        }
        communicator.begin_receive(seat.hello().len())?;
        self.wait(communicator, "hearing hello", seat.hello().len())?;
        let heard = communicator.received()?;
        if heard != seat.other().hello() {
            return Err(BodyError::Stranger { found: format!("{heard:02x?}"), expected: seat.other().rank });
        }
        if seat.rank == 1 {
            say(communicator)?;
        }
        Ok(())
    }

    fn serve(&self, communicator: &mut dyn Communicator, orders: &Receiver<Order>) {
        loop {
            self.signals.beats.fetch_add(1, Ordering::Relaxed);
            if let Some(error) = self.signals.stop.get() {
                return self.break_off(communicator, error);
            }
            let Order { transfer, done } = match orders.recv_timeout(IDLE) {
                Ok(order) => order,
                Err(RecvTimeoutError::Timeout) => continue,
                // Why it was stopped, if it was, is looked at first.
                Err(RecvTimeoutError::Disconnected) if self.signals.stop.get().is_some() => continue,
                Err(RecvTimeoutError::Disconnected) => return self.leave(communicator),
            };
            let moved = self.carry_out(communicator, transfer);
            if let Err(error) = &moved {
                self.break_off(communicator, error);
                let _ = done.send(moved);
                return;
            }
            let _ = done.send(moved);
        }
    }

    /// Goes when nothing is under way here, and the other side may still be at the end of something.
    fn leave(&self, communicator: &mut dyn Communicator) {
        self.signals.is_unwanted.store(false, Ordering::Relaxed);
        let left = communicator.begin_leave().and_then(|()| self.wait(communicator, "leaving", 0));
        if let Err(error) = left {
            self.break_off(communicator, &error);
        }
    }

    fn carry_out(&self, communicator: &mut dyn Communicator, transfer: Transfer) -> Result<Vec<u8>, BodyError> {
        match transfer {
            Transfer::Send(body) => {
                communicator.begin_send(&body)?;
                self.wait(communicator, "sending", body.len())?;
                Ok(Vec::new())
            }
            Transfer::Receive(bytes) => {
                communicator.begin_receive(bytes)?;
                self.wait(communicator, "receiving", bytes)?;
                communicator.received()
            }
        }
    }

    /// Waits until what was begun is done, as long as it may take, unless the link is to stop.
    fn wait(&self, communicator: &mut dyn Communicator, what: &'static str, bytes: usize) -> Result<(), BodyError> {
        let (watch, seconds) = (Stopwatch::start(), self.patience.seconds(bytes));
        let [mut glance, rare] = GLANCES;
        while !communicator.is_done()? {
            self.signals.beats.fetch_add(1, Ordering::Relaxed);
            if let Some(error) = self.signals.stop.get() {
                return Err(error.clone());
            }
            if self.signals.is_unwanted.load(Ordering::Relaxed) {
                return Err(BodyError::Aborted { reason: "nobody waits for it any more".to_owned() });
            }
            if watch.seconds() > seconds {
                return Err(BodyError::Overdue { what, bytes, seconds });
            }
            std::thread::sleep(glance);
            glance = (glance * 2).min(rare);
        }
        Ok(())
    }

    fn break_off(&self, communicator: &mut dyn Communicator, error: &BodyError) {
        tracing::debug!(%error, "a link between devices ends");
        let _ = self.signals.stop.set(error.clone());
        communicator.abort();
    }
}
